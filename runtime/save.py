"""`save_pretrained` of a loaded artifact: an artifact again."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.files import CARD_NAME, REPORT_NAME, foreign_names
from kvfold.exports.reader import is_artifact, read_artifact, read_metadata
from kvfold.exports.schema import METADATA_NAME, TENSORS_NAME
from kvfold.exports.scratch import NEW, remove_leftovers, scratch_folder
from kvfold.exports.writer import install

WEIGHTS = (".safetensors", ".safetensors.index.json")
CONFIG = "config.json"
OURS = {
    TENSORS_NAME,
    REPORT_NAME,
    "recipe.yaml",
}  # never taken from what lies where the model is saved


def save_artifact(
    self: Any, save_directory: str | os.PathLike, is_main_process: bool = True, **options: Any
) -> None:
    """Writes the model as an artifact: the weights as they are now, and from the artifact that it
    was loaded from its formats, transforms, recipe, tokenizer, card and report. Weights that were
    only widened to compute in are written in the type they had; a model whose weights nobody
    changed gives back every file byte for byte.

    Args:
        self: a model that kvfold loaded; the folder that it came from must still be there.
        save_directory: an artifact there is replaced. Other files stay; where there is no artifact,
            also a tokenizer or a card that was put there before.
        options: of transformers' `save_pretrained`, e.g. `max_shard_size`.
    Raises:
        KvfoldError: the folder that the model came from is gone, or an option that would not give
            an artifact.
    """
    if not is_main_process:
        return
    artifact = self.kv_artifact
    out = Path(save_directory).resolve()
    if options.pop("push_to_hub", False):
        raise KvfoldError(
            f"save_pretrained writes a folder; publish it with `kvfold push {out.name} "
            "OWNER/NAME` instead of push_to_hub."
        )
    if artifact.heads is not None:
        raise KvfoldError(
            f"This process holds a part of the model (tp_plan='auto'), which makes no artifact; copy "
            f"'{artifact.path}', or load it without tp_plan."
        )
    if out.is_file():
        raise KvfoldError(f"'{out}' is a file, but an artifact is a folder; choose another place.")
    if not is_artifact(artifact.path):
        raise KvfoldError(
            f"The folder '{artifact.path}' that this model came from is gone; load it again, then save it."
        )
    keep = out if out.is_dir() and not is_artifact(out) else None
    alone = keep is None and (not out.exists() or not foreign_names(out, read_metadata(out).files))

    def fill(folder: Path) -> None:
        state, narrowed = (
            _stored_state(self, artifact.path)
            if "state_dict" not in options
            else (options.pop("state_dict"), False)
        )
        type(self).save_pretrained(self, folder, state_dict=state, **options)
        if narrowed:
            _restore_dtype(folder / CONFIG, artifact.path / CONFIG)
        for name in [*artifact.metadata.files, CARD_NAME, REPORT_NAME]:
            if (folder / name).exists() or (name.startswith("model") and name.endswith(WEIGHTS)):
                continue
            stays = keep is not None and name not in OURS and (keep / name).is_file()
            source = (keep if stays and keep else artifact.path) / name
            if source.is_file():
                shutil.copyfile(source, folder / name)

    if alone or (keep is not None and not any(keep.iterdir())):
        install(out, artifact.metadata, fill)
        return
    remove_leftovers(out)
    with scratch_folder(out) as scratch:
        made = install(scratch / NEW / out.name, artifact.metadata, fill).path
        for file in sorted(
            made.iterdir(), key=lambda file: file.name == METADATA_NAME
        ):  # last: then all the others are there
            os.replace(file, out / file.name)
    read_artifact(out)


def _stored_state(model: Any, path: Path) -> tuple[dict[str, Tensor], bool]:
    """The state dict, with each tensor in the type that the artifact stores it in if that loses
    nothing, and whether all are. Joined ones (experts) have other names there, and the type that
    config.json states."""
    dtypes: dict[str, torch.dtype] = {}
    stated = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("dtype")
    own = getattr(torch, str(stated), None)
    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, "pt") as stored:
            dtypes |= {name: stored.get_slice(name)[..., :0].dtype for name in stored.keys()}  # noqa: SIM118
    state: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}  # tied weights stay one tensor
    exact = True
    for name, tensor in model.state_dict().items():
        wanted = dtypes.get(name, own if isinstance(own, torch.dtype) else tensor.dtype)
        if wanted != tensor.dtype and tensor.device.type != "meta":
            if tensor.data_ptr() not in done:
                narrow = tensor.to(wanted)
                done[tensor.data_ptr()] = (
                    narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
                )
            tensor = done[tensor.data_ptr()]
            exact = exact and tensor.dtype == wanted
        state[name] = tensor
    return state, exact


def _restore_dtype(config: Path, original: Path) -> None:
    """States the artifact's own dtype again; transformers has written the one that the model
    computes in."""
    fields, old = (json.loads(file.read_text(encoding="utf-8")) for file in (config, original))
    if "dtype" in old:
        fields["dtype"] = old["dtype"]
        config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
