"""Adapters (LoRA and the like) of the original model on its artifact, some of whose weights stand
in another basis."""

from pathlib import PurePath
from typing import Any

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import row_of

JOINT = ("qkv_proj", "query_key_value")  # projections of queries, keys and values
FOLDED_KEYS = {
    "smooth"
}  # transforms of keys that are folded into weights; others are applied where keys are written


def moved_projections(specs: Any) -> set[str]:
    """Names of projections whose weights differ from the original model's by more than rounding;
    `specs`: one LayerSpec a layer."""
    found: set[str] = set()
    if any(spec.value.transforms for spec in specs):
        found |= {"v_proj", "o_proj", "dense", "out_proj", *JOINT}
    if any(FOLDED_KEYS & set(spec.key.transforms) for spec in specs):
        found |= {"q_proj", "k_proj", "q_norm", "k_norm", *JOINT}
    return found


def check_adapters(model: Any, artifact: Any) -> None:
    """Refuses adapters that were trained on another model and reach into projections that stand in
    another basis here.

    PEFT keeps the configs of a model's adapters as its `peft_config`; each names the model that it
    was trained on. The basis itself is not stored (exports/FORMAT.md), so factors for another one
    can't be moved to it.

    Args:
        model: a causal language model that was loaded from `artifact`.
    Raises:
        KvfoldError: there is such an adapter.
    """
    adapters = vars(model).get("peft_config")  # nn.Module looks everywhere else before it says no
    if not isinstance(adapters, dict) or not adapters:
        return
    foreign = {
        name: base
        for name, config in adapters.items()
        if (base := foreign_base(config, model, artifact))
    }
    if not foreign:
        return
    moved = moved_projections(artifact.specs)
    if "v_proj" in moved:  # a gate's rows are in the order of values
        moved |= {row_of(model.config).gate} - {""}
    for path, module in type(model).named_modules(model):
        projection = path.rsplit(".", 1)[-1]
        if projection not in moved or not hasattr(module, "base_layer"):
            continue
        held = {
            name
            for attribute in getattr(module, "adapter_layer_names", ())
            for name in getattr(module, attribute)
        }
        for name in sorted(held & foreign.keys()):
            raise KvfoldError(
                f"Adapter '{name}' changes {projection}, but was trained on '{foreign[name]}', "
                f"and this artifact's {projection} stands in "
                "another basis; merge it into the original (merge_and_unload) and compress that, "
                "or train one on the artifact."
            )


def foreign_base(config: Any, model: Any, artifact: Any) -> str | None:
    """The model that an adapter was trained on, if that isn't the artifact. By names, as a folder
    may have moved."""
    base = getattr(config, "base_model_name_or_path", None)
    if base is None or str(base) == str(model.name_or_path):
        return None
    name = PurePath(str(base)).name
    source = getattr(getattr(artifact.metadata, "provenance", None), "model", None)
    original = (
        source is not None and PurePath(source).name == name
    )  # an artifact may have its original's name
    return None if name == PurePath(artifact.path).name and not original else str(base)
