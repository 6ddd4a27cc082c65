"""After `import kvfold`, transformers' `AutoModelForCausalLM.from_pretrained` gives an artifact its packed cache.

Why it is done by wrapping that one method, and not by a quantizer registered with transformers: a quantizer is chosen by
`quantization_config` in config.json, and an artifact with one is no plain checkpoint any more: stock transformers warns of an unknown
quantization type, and other engines refuse it.

Why by a hook on the import: `import kvfold` would otherwise load torch and transformers.
"""

import sys
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from kvfold.pretrained import stock_from_pretrained

__all__ = ["install", "stock_from_pretrained", "wrap"]

MODULE = "transformers.models.auto.modeling_auto"


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


def wrap(module: ModuleType) -> None:
    """Wraps `from_pretrained` of a module's AutoModelForCausalLM, once."""
    auto: Any = module.AutoModelForCausalLM
    stock = auto.from_pretrained.__func__
    if hasattr(stock, "kvfold_stock"):
        return

    @wraps(stock)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        from kvfold.runtime.calls.plugin import load_if_artifact

        return load_if_artifact(stock.__get__(cls), pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.kvfold_stock = stock  # type: ignore[attr-defined]
    auto.from_pretrained = classmethod(from_pretrained)


def install() -> None:
    """Wraps the class now if it is there, else when it will be."""
    if MODULE in sys.modules:
        wrap(sys.modules[MODULE])
    elif Watch not in sys.meta_path:
        sys.meta_path.insert(0, Watch)
