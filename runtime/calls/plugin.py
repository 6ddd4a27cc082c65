"""What `AutoModelForCausalLM.from_pretrained` does once `kvfold.register()` was called
(kvfold/autoclass.py)."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from kvfold.exports.reader import read_artifact, read_metadata
from kvfold.pretrained import code_free
from kvfold.runtime.backends.choose import choose_triton
from kvfold.runtime.calls.locate import locate
from kvfold.runtime.calls.options import HUB, PASSED_ON, REFUSED, check_names, dtype_of
from kvfold.runtime.generate.ahead import begin_ahead
from kvfold.runtime.generate.compile import begin_folder, compiling
from kvfold.runtime.load import (
    attach,
    check_complete,
    default_device,
    default_dtype,
    load_pretrained,
    resolve_artifact,
)

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


@compiling()
def load_if_artifact(stock: Callable[..., Any], name: Any, *args: Any, **kwargs: Any) -> Any:
    """Loads a model as transformers would; if it is an artifact, validated and with its packed
    cache, as load_pretrained does.

    Args:
        stock: transformers' own `from_pretrained`.
        name, args, kwargs: what it was called with. Where neither `device_map` nor `dtype` is
            given, load_pretrained's defaults hold; what is given means what it means to
            transformers.
    Raises:
        KvfoldError: a damaged artifact, or one that needs code of its own.
        TypeError: an option that an artifact can't follow.
    """
    if kwargs.get("subfolder") or kwargs.get("gguf_file"):
        return stock(name, *args, **kwargs)
    hub = {option: kwargs[option] for option in HUB_OPTIONS if kwargs.get(option) is not None}
    artifact_there, revision = locate(name, hub)
    if revision is not None:
        hub["revision"] = kwargs["revision"] = revision
    if not artifact_there:
        return stock(name, *args, **kwargs)
    given = {
        option: value for option, value in kwargs.items() if not option.startswith("_")
    }  # of pipelines, for themselves
    known = {*PASSED_ON, *HUB_OPTIONS, "trust_remote_code"}
    check_names(
        "from_pretrained",
        given,
        known,
        (HUB | set(inspect.signature(load_pretrained).parameters)) - known,
    )
    folder = resolve_artifact(name, **hub)
    options = {
        option: value
        for option, value in kwargs.items()
        if option not in HUB_OPTIONS and option not in REFUSED
    }
    wants_info = options.pop("output_loading_info", False)
    device = None if options.get("device_map") is not None else default_device()
    dtype = options.get("dtype") if options.get("dtype") is not None else options.get("torch_dtype")
    if dtype is None:
        options["dtype"] = default_dtype(device) or "auto"
    else:
        dtype_of("dtype", dtype)
    kernels = None
    if device is not None and choose_triton("auto", device, read_metadata(folder)):
        known_dtype = dtype_of("dtype", options.get("dtype") or options.get("torch_dtype"))
        kernels = begin_folder(
            folder, device, known_dtype if isinstance(known_dtype, torch.dtype) else None, False
        )
    artifact = read_artifact(folder)
    options["ignore_mismatched_sizes"] = True  # the report names them, the error doesn't
    model, info = code_free(stock, artifact.path, *args, **options, output_loading_info=True)
    check_complete(info, artifact)
    model = model if device is None else model.to(device)
    triton = choose_triton("auto", model.device, artifact)
    if triton:
        kernels = kernels or begin_folder(folder, model.device, model.dtype, False)
        triton = kernels.usable(required=False)
    if triton:
        begin_ahead(folder, model.device, model.dtype, False)
    try:
        model = attach(model, artifact, triton=triton)
        return (model, info) if wants_info else model
    finally:
        del model  # as in load_pretrained
