"""What `AutoModelForCausalLM.from_pretrained` does once kvfold is imported (kvfold/autoclass.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from kvfold.exports.reader import is_artifact, read_artifact, read_metadata
from kvfold.exports.schema import METADATA_NAME
from kvfold.runtime.compile import begin_folder, compiling
from kvfold.runtime.load import attach, check_complete, choose_triton, default_device, default_dtype, resolve_artifact

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


@compiling()
def load_if_artifact(stock: Callable[..., Any], name: Any, *args: Any, **kwargs: Any) -> Any:
    """Loads a model as transformers would; if it is an artifact, validated and with its packed cache, as load_pretrained does.

    Args:
        stock: transformers' own `from_pretrained`.
        name, args, kwargs: what it was called with. Where neither `device_map` nor `dtype` is given, load_pretrained's defaults hold;
            what is given means what it means to transformers.
    Raises:
        KvfoldError: a damaged artifact.
    """
    hub = {option: kwargs[option] for option in HUB_OPTIONS if kwargs.get(option) is not None}
    if kwargs.get("subfolder") or not _names_artifact(name, hub):
        return stock(name, *args, **kwargs)
    folder = resolve_artifact(name, **hub)
    options = {option: value for option, value in kwargs.items() if option not in HUB_OPTIONS}
    wants_info = options.pop("output_loading_info", False)
    device = None if options.get("device_map") is not None else default_device()
    if options.get("dtype") is None and options.get("torch_dtype") is None:
        options["dtype"] = default_dtype(device) or "auto"
    kernels = None
    if device is not None and choose_triton("auto", device, read_metadata(folder)):
        given = options.get("dtype") or options.get("torch_dtype")
        kernels = begin_folder(folder, device, given if isinstance(given, torch.dtype) else None, False)
    artifact = read_artifact(folder)
    model, info = stock(artifact.path, *args, **options, output_loading_info=True)
    check_complete(info, artifact)
    model = model if device is None else model.to(device)
    triton = choose_triton("auto", model.device, artifact)
    if triton:
        kernels = kernels or begin_folder(folder, model.device, model.dtype, False)
        triton = kernels.usable(required=False)
    try:
        model = attach(model, artifact, triton=triton)
        return (model, info) if wants_info else model
    finally:
        del model  # as in load_pretrained


def _names_artifact(name: Any, hub: dict[str, Any]) -> bool:
    """Whether a folder or a Hub repository is an artifact; of the latter only kv_cache.json is asked for."""
    try:
        if Path(name).is_dir():
            return is_artifact(Path(name))
        hf_hub_download(str(name), METADATA_NAME, **hub)
        return True
    except (HfHubHTTPError, HFValidationError, OSError, TypeError, ValueError):
        return False  # not there, or not to be reached: what transformers says of it is the better message
