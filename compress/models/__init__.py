"""MODEL: an alias, a local .gguf, a local checkpoint folder, or a Hub id, turned into a folder that
transformers loads."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.models.gguf import ALIASES, alias_gguf, convert_gguf
from kvfold.compress.models.shape import check_shape
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import ARCHITECTURES, TEXT_ALONE, TOWERS, architecture_of
from kvfold.exports.files import CARD_NAME, INDEX, WEIGHTS, read_index
from kvfold.exports.page.licence import TEXTS
from kvfold.exports.reader import is_artifact
from kvfold.exports.weights import check_weights_fit, stored_shapes, weights_nbytes
from kvfold.memory import is_out_of_memory, need_memory, reason_of_shortage
from kvfold.pretrained import config_from_pretrained, read_fields, reason_of, stock_from_pretrained

DTYPES = {"BF16", "F16", "F32", "F64"}  # of weights, as safetensors calls them


@dataclass(frozen=True)
class Source:
    """A model to compress: its folder, the name that an artifact states, and its revision on the
    Hub."""

    path: Path
    name: str
    revision: str | None = None


def resolve_model(model: str, revision: str | None = None) -> Source:
    """Finds or fetches MODEL.

    Raises:
        KvfoldError: unknown, unreachable, damaged, without weights, or of a family that is not
            supported.
    """
    try:
        path = Path(model).expanduser()
    except RuntimeError:
        raise KvfoldError(
            f"Model '{model}' lies in a home directory that this user has not; give its full path."
        ) from None
    if model in ALIASES:
        source = Source(convert_gguf(alias_gguf(model)), model)
    elif is_gguf(path):
        if not path.is_file():
            raise KvfoldError(
                f"Model '{model}' is not a file; give the path of a GGUF that exists."
            )
        source = Source(convert_gguf(path), path.stem)
    elif path.is_dir():
        source = Source(path, path.resolve().name)
    elif path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise KvfoldError(
            f"Model '{model}' is not a checkpoint folder; give a folder, a .gguf, a Hub id or an alias "
            f"({', '.join(ALIASES)})."
        )
    else:
        source = _from_hub(model, revision)
    check_checkpoint(source.path)
    return source


def is_gguf(path: Path) -> bool:
    """Whether a file's name says that it is a GGUF, in capitals too."""
    return path.suffix.lower() == ".gguf"


def _from_hub(repo_id: str, revision: str | None) -> Source:
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", CARD_NAME, *TEXTS]
    try:
        path = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise KvfoldError(
            f"Model '{repo_id}' is neither an alias ({', '.join(ALIASES)}), a folder, a .gguf nor a Hub id that can be "
            f"reached ({type(error).__name__}); check the spelling and the network."
        ) from error
    try:
        commit = model_info(repo_id, revision=revision).sha
    except (HfHubHTTPError, OSError):
        commit = path.name  # offline: a snapshot's folder is named after its commit
    return Source(path, repo_id, commit)


def read_config(path: Path) -> Any:
    """The transformers config of a checkpoint folder.

    Raises:
        KvfoldError: there is none, or it can't be read.
    """
    stated = read_fields(path)
    if stated is None:
        raise KvfoldError(
            f"'{path}' holds no config.json, so it is not a model folder; give a Hugging Face checkpoint."
        )
    family = stated.get("model_type")
    if not isinstance(family, str):
        raise KvfoldError(
            f"config.json in '{path}' names no model_type; give a Hugging Face checkpoint."
        )
    # refused by name, whether or not this transformers knows it
    if family not in {*ARCHITECTURES, *TOWERS, *TEXT_ALONE}:
        architecture_of(SimpleNamespace(**stated))
    return config_from_pretrained(path)


def check_checkpoint(path: Path) -> None:
    """Checks a checkpoint folder before anything expensive: family, files, and each safetensors
    header against its size.

    Raises:
        KvfoldError: what is wrong, by name.
    """
    config = read_config(path)
    architecture_of(config)
    check_shape(config, path)
    if quantised := getattr(config, "quantization_config", None):
        stated = quantised if isinstance(quantised, dict) else vars(quantised)
        raise KvfoldError(
            f"The weights in '{path}' are quantised ({stated.get('quant_method', 'by an unknown method')}), so nothing "
            "can be folded into them; give the model in bfloat16, float16 or float32."
        )
    if is_artifact(path):
        raise KvfoldError(f"'{path}' is already compressed by kvfold; give the original model.")
    index = path / INDEX
    names = sorted(set(read_index(index).values())) if index.is_file() else [WEIGHTS]
    for name in names:
        if Path(name).name != name:
            raise KvfoldError(
                f"'{index}' names '{name}', which does not lie beside it; download it again."
            )
        file = path / name
        if not file.is_file():
            raise KvfoldError(
                f"'{path}' holds no {name}, so the model has no weights; give a folder with safetensors files."
            )
        _check_safetensors(file)
    fix = "give a checkpoint whose weights fit its config.json"
    check_weights_fit(path, config, stored_shapes([path / name for name in names], fix), fix)


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < size else {}
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max(entry["data_offsets"][1] for entry in tensors.values())
        dtypes = {name: entry["dtype"] for name, entry in tensors.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise KvfoldError(
            f"'{file}' is not a readable safetensors file; download it again."
        ) from None
    if 8 + length + end != size:
        raise KvfoldError(
            f"'{file}' is truncated: its header describes {8 + length + end} bytes, the file has {size}; download it "
            "again."
        )
    for name, dtype in sorted(dtypes.items()):
        if name.endswith(("weight", "bias", "proj")) and dtype not in DTYPES:
            raise KvfoldError(
                f"The tensor {name} in '{file}' is {dtype}, quantised without a quantization_config that says how; "
                "give the model in bfloat16, float16 or float32."
            )


def load_model(
    path: Path, dtype: torch.dtype | str, device: torch.device, attention: str = TAP
) -> PreTrainedModel:
    """Loads a checkpoint for computing, in eval mode and without gradients; of an artifact the
    plain model.

    Args:
        attention: name of an attention function; the default can be tapped and computes every
            family.
    Raises:
        KvfoldError: tensors are missing or have the wrong shape, or there is too little memory.
    """
    need_memory(weights_nbytes(path, dtype), f"'{path}', its weights alone,")
    loaded: Any
    try:
        loaded = stock_from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them, the error doesn't
        )
    except KvfoldError:
        raise
    except Exception as error:  # what transformers raises for files of any content
        if is_out_of_memory(error):
            raise KvfoldError(
                f"There is too little memory to load '{path}' ({reason_of_shortage(error)}); free some, or choose a "
                "smaller model."
            ) from error
        raise KvfoldError(
            f"The files in '{path}' make no model ({type(error).__name__}: {reason_of(error)}); give a checkpoint "
            "whose weights fit its config.json and generation_config.json."
        ) from error
    model, report = loaded
    for kind, what in (("mismatched_keys", "of the wrong shape"), ("missing_keys", "missing")):
        found = report.get(kind)
        if found:
            first = sorted(found, key=str)[0]
            name = first[0] if isinstance(first, tuple) else first
            raise KvfoldError(
                f"The tensor {name} in '{path}' is {what}, so its weights do not fit config.json; give a matching pair."
            )
    return model.to(device).eval().requires_grad_(False)


def quiet_transformers() -> None:
    """Silences transformers' own progress bars and advice; ours say what goes on."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
