"""After `kvfold.register()`, transformers' `AutoModelForCausalLM.from_pretrained` gives an artifact
its packed cache, until `kvfold.unregister()`. It changes the class for the whole process, so it is
never done by an import.

Why it is done by wrapping that one method, and not by a quantizer registered with transformers: a
quantizer is chosen by `quantization_config` in config.json, and an artifact with one is no plain
checkpoint any more: stock transformers warns of an unknown quantization type, and other engines
refuse it.

Why by a hook on the import where transformers isn't imported yet:
`register` would otherwise load torch and transformers.
"""

import sys
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from kvfold.pretrained import stock_from_pretrained

__all__ = ["register", "stock_from_pretrained", "unregister", "wrap"]

MODULE = "transformers.models.auto.modeling_auto"
METHOD = "from_pretrained"


class Watch:
    """A finder (importlib's protocol) that has MODULE loaded as ever, and then wraps its class."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class State:
    """Whether `register` holds; a method that somebody kept from then asks it too."""

    registered = False
    wrapper: Any = None  # ours, whatever others have wrapped around it since


def wrap(module: ModuleType) -> None:
    """Wraps `from_pretrained` of a module's AutoModelForCausalLM, once."""
    auto: Any = module.AutoModelForCausalLM
    stock = auto.from_pretrained.__func__
    if hasattr(stock, "kvfold_stock"):
        return

    @wraps(stock)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not State.registered:
            return stock.__get__(cls)(pretrained_model_name_or_path, *args, **kwargs)
        from kvfold.runtime.calls.plugin import load_if_artifact

        return load_if_artifact(stock.__get__(cls), pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.kvfold_stock = stock  # type: ignore[attr-defined]
    from_pretrained.kvfold_inherited = METHOD not in vars(auto)  # type: ignore[attr-defined]
    State.wrapper = from_pretrained
    auto.from_pretrained = classmethod(from_pretrained)


def unwrap(module: ModuleType) -> None:
    """Takes `wrap` back, unless somebody has wrapped the method once more since; then ours hands
    everything on."""
    auto: Any = module.AutoModelForCausalLM
    ours: Any = State.wrapper
    there = getattr(vars(auto).get(METHOD), "__func__", None)
    if there is not ours or ours is None:
        return
    if ours.kvfold_inherited:
        del auto.from_pretrained
    else:
        auto.from_pretrained = classmethod(ours.kvfold_stock)
    State.wrapper = None


def register() -> None:
    """Has transformers' `AutoModelForCausalLM.from_pretrained`, and so its pipelines, give an
    artifact its packed cache, in this process: what `kvfold.runtime.load_pretrained` gives. Other
    models load as ever. Called again, it changes nothing."""
    State.registered = True
    if MODULE in sys.modules:
        wrap(sys.modules[MODULE])
    elif Watch not in sys.meta_path:
        sys.meta_path.insert(0, Watch)  # when transformers is imported


def unregister() -> None:
    """Takes `register` back: an artifact then loads as stock transformers loads it, with a 16-bit
    cache. Models that are loaded stay."""
    State.registered = False
    if Watch in sys.meta_path:
        sys.meta_path.remove(Watch)
    if MODULE in sys.modules:
        unwrap(sys.modules[MODULE])
