"""What may be passed to `load_pretrained`, and to transformers' `from_pretrained` of an artifact:
an option works or is refused by name."""

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from huggingface_hub import snapshot_download

from kvfold.errors import KvfoldError

HUB = frozenset(inspect.signature(snapshot_download).parameters) - {
    "repo_id",
    "repo_type",
    "revision",
    "dry_run",
}
PASSED_ON = {  # of from_pretrained, and mean there what they mean to transformers
    "config", "generation_config", "dtype", "torch_dtype", "device_map", "output_loading_info",
    "max_memory", "offload_folder",
    "offload_buffers", "low_cpu_mem_usage", "weights_only", "tqdm_class", "proxies", "code_revision", "adapter_kwargs",
}  # fmt: skip
# options of transformers that would change what is computed, or whose effect kvfold would undo
REFUSED = {
    "attn_implementation": "an artifact brings its own attention; load_pretrained's "
    "attention='reference' or 'triton' chooses",
    "experts_implementation": "an artifact is computed as its family's own code does",
    "quantization_config": "the weights stay in 16 bits, it is the KV cache that is quantised",
    "load_in_8bit": "the weights stay in 16 bits, it is the KV cache that is quantised",
    "load_in_4bit": "the weights stay in 16 bits, it is the KV cache that is quantised",
    "state_dict": "an artifact's weights are its own; load them, then change them",
    "use_kernels": "an artifact brings its own kernels",
    "kernel_config": "an artifact brings its own kernels",
    "allow_all_kernels": "an artifact brings its own kernels",
    "tp_size": "torchrun says among how many processes a model is divided",
    "device_mesh": "torchrun and tp_plan='auto' divide a model among processes",
    "distributed_config": "torchrun and tp_plan='auto' divide a model among processes",
    "gguf_file": "an artifact's weights are safetensors",
    "variant": "an artifact has one set of weights",
    "subfolder": "an artifact's files lie side by side in one folder; give that folder",
    "key_mapping": "an artifact's tensors have their family's own names",
    "use_safetensors": "an artifact's weights are safetensors",
}
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_names(
    function: str, given: Mapping[str, Any], known: Iterable[str], elsewhere: Iterable[str] = ()
) -> None:
    """Refuses options that nobody knows.

    Args:
        function: whose they are.
        known: names that are right.
        elsewhere: names that are right for load_pretrained alone.
    Raises:
        TypeError: naming the option, and the one that may have been meant or what to do.
    """
    known = sorted(known)
    for name, value in given.items():
        unset = value is None or value is (
            name == "use_safetensors"
        )  # what wrappers pass on where nobody set anything
        if name in known or (unset and name in REFUSED):
            continue
        if name in REFUSED:
            raise TypeError(
                f"{function}() does not take {name}={value!r}: {REFUSED[name]}; leave it out."
            )
        if name in elsewhere:
            raise TypeError(
                f"{function}() of an artifact does not take '{name}'; load it with kvfold's "
                f"runtime.load_pretrained(…, {name}={value!r})."
            )
        near = get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"the options are {', '.join(known)}."
        raise TypeError(f"{function}() got an unexpected keyword argument '{name}'; {hint}")


def dtype_of(name: str, value: Any) -> torch.dtype | str | None:
    """A floating type given as torch.bfloat16 or "bfloat16"; "auto" is the checkpoint's own; None
    stays.

    Raises:
        KvfoldError: it is none.
    """
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise KvfoldError(
            f"{name}={value!r} is not a type that a model can compute in; give torch.bfloat16, "
            "torch.float16, torch.float32 or 'auto'."
        )
    return found


def device_of(value: Any, name: str = "device") -> torch.device:
    """A device that is there and can hold numbers.

    Raises:
        KvfoldError: there is none of that name.
    """
    try:
        device = torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, TypeError, ValueError):
        device = None
    if device is None or device.type == "meta":
        raise KvfoldError(
            f"{name}={value!r} is not a device that this PyTorch can compute on; give 'cpu' or 'cuda'."
        )
    return device


def device_of_map(device_map: Any, default: torch.device) -> torch.device:
    """The one device that transformers' `device_map` names.

    Raises:
        KvfoldError: no such device.
        TypeError: it spreads the model over several.
    """
    if isinstance(device_map, str) and device_map in PLACEMENTS:
        if torch.cuda.device_count() > 1:
            raise TypeError(
                f"load_pretrained() does not take device_map={device_map!r} where there are several GPUs: a model is "
                "put on one; give device='cuda:0', or call kvfold.register() and use "
                "AutoModelForCausalLM.from_pretrained."
            )
        return default
    named = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    if len({str(x) for x in named}) != 1:
        raise TypeError(
            f"load_pretrained() does not take device_map={device_map!r}: a model is put on one "
            "device; give device='cuda:0'."
        )
    return device_of(named[0], "device_map")
