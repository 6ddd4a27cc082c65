"""`load_pretrained`: an artifact, local or on the Hub, as a transformers model that reads back a
packed cache."""

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from kvfold.errors import KvfoldError
from kvfold.exports.account import batch_nbytes
from kvfold.exports.cache_model import MOST_TOKENS
from kvfold.exports.reader import Artifact, read_artifact, read_metadata
from kvfold.exports.units import parse_nbytes
from kvfold.exports.weights import weights_nbytes
from kvfold.memory import is_out_of_memory, need_memory, reason_of_shortage
from kvfold.pretrained import config_from_pretrained, reason_of, stock_from_pretrained
from kvfold.runtime.attachment import attach
from kvfold.runtime.backends.choose import choose_triton
from kvfold.runtime.budget.choose import check_choice
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.calls.hybrid import check_states
from kvfold.runtime.calls.options import HUB, check_names, device_of, device_of_map, dtype_of
from kvfold.runtime.generate.ahead import begin_ahead
from kvfold.runtime.generate.compile import begin_folder, compiling
from kvfold.runtime.parallel import check_heads, check_plan, own_device, own_part, plan_options

if TYPE_CHECKING:  # transformers' models take seconds to import: kernels are compiled meanwhile
    from transformers import PreTrainedModel

log = logging.getLogger("kvfold")


def resolve_artifact(
    path_or_repo_id: str | Path, revision: str | None = None, **hub_kwargs: Any
) -> Path:
    """The local folder of an artifact; a Hub id is downloaded (or taken from the Hub's cache).

    Raises:
        KvfoldError: neither a folder nor a repository that can be reached.
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(path_or_repo_id), revision=revision, **hub_kwargs))
    except (
        HFValidationError,
        RepositoryNotFoundError,
        LocalEntryNotFoundError,
        HfHubHTTPError,
        OSError,
    ) as error:
        raise KvfoldError(
            f"'{path_or_repo_id}' is neither a folder nor a Hub repository that can be reached "
            f"({type(error).__name__}); give an artifact's folder or the id of one that was pushed."
        ) from error


@compiling()
def load_pretrained(
    path_or_repo_id: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    kv_budget: int | str | None = None,
    policy: str = "floor",
    offload: bool = False,
    attention: str = "auto",
    cuda_graph: bool | str = "auto",
    rollback: int | None = None,
    batch_invariant: bool = False,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    tp_plan: str | None = None,
    trust_remote_code: bool | None = None,
    **hub_kwargs: Any,
) -> "PreTrainedModel":
    """Loads an artifact as a transformers model in eval mode whose every forward pass reads a
    packed cache.

    Args:
        path_or_repo_id: an artifact's folder, or a Hub id.
        device: default: CUDA if there is one, else the CPU.
        dtype: of weights and activations, a type or its name; "auto" is the checkpoint's own, and
            so is the default, but float32 on a CPU, where decoding in bfloat16 is an order of
            magnitude slower.
        revision: of the Hub repository.
        kv_budget: bytes ("1GiB" or an int) that a cache may never pass; KVBudgetExceeded is raised
            before it would. With offload, bytes on the device.
        policy: "floor" stores at the searched bit-widths at once; "progressive" starts in 16 bits
            and lowers pages, the least harmful first, as kv_budget fills, between the steps of
            decoding.
        offload: as kv_budget fills, the oldest pages go to host memory, packed as they are. Each
            step copies them in again, a layer at a time, through a staging buffer (two on a GPU, so
            that one layer's are copied while another attends). The buffer must hold a layer's, so
            that a budget reaches further by the number of layers at the most.
        attention: "reference" is plain torch on any device, "triton" the kernels; "auto" picks by
            device.
        cuda_graph: "auto" replays one captured decoding step wherever that can be, so that decoding
            isn't bound by Python: on a GPU, with the kernels and without offload, for steps of one
            token a sequence. Memory grows as without; each time the block table has doubled the
            step is captured again. All else (beams, drafts, hidden states, a model whose code waits
            for the device) runs as with False, by itself. A captured step calls no hooks of inner
            modules: where there are some, nothing is captured. Long texts have the step's norms,
            gates and RoPE compiled by torch.compile, which takes seconds once
            (TORCHDYNAMO_DISABLE=1 does without). True: an error instead where nothing can be
            captured; False: never.
        rollback: tokens by which a cache may be cropped exactly, as if they had never come: their
            16-bit rows are kept longer. None: what the artifact states, a page unless its recipe
            says otherwise and none in artifacts before format version 5, or 0 where kv_budget has
            no room for that beside sinks, window and one page. 0 saves its rows. Assisted and
            prompt-lookup decoding see to what they take back by themselves.
        batch_invariant: attention gives a sequence the same bits in whatever batch it is decoded:
            the kernels divide its pages by its own length alone, 1024 tokens to a program: too few
            programs for a short sequence alone, and more than fit at once for a large batch. The
            model's matrix products remain their library's.
        torch_dtype, device_map: as transformers calls `dtype` and, where it names one device,
            `device`.
        tp_plan: "auto" divides the model among the processes that torchrun starts, by transformers'
            plan for its family: each holds its heads' weights and pages, and kv_budget is what the
            cache of each may take. Without CUDA graphs.
        trust_remote_code: taken for scripts that pass it to everything; an artifact has no code,
            and none is run.
        hub_kwargs: for huggingface_hub.snapshot_download, e.g. `token`, `cache_dir`,
            `local_files_only`.
    Returns:
        A PreTrainedModel; `generate`, `model(ids)` and chunked calls read quantised keys and values
        back. `outputs.past_key_values` is a QuantizedKVCache; `model.new_kv_cache()` gives an empty
        one to pass and to watch.
    Raises:
        KvfoldError: not an artifact, a damaged one, or a value that an option does not have.
        TypeError: an option that does not exist, or that transformers has and kvfold cannot follow.
    """
    known = inspect.signature(load_pretrained).parameters
    check_names(
        "load_pretrained", hub_kwargs, (HUB | set(known)) - {"path_or_repo_id", "hub_kwargs"}
    )
    for both in (
        ("dtype", dtype, "torch_dtype", torch_dtype),
        ("device", device, "device_map", device_map),
    ):
        if both[1] is not None and both[3] is not None:
            raise TypeError(
                f"load_pretrained() got both {both[0]} and {both[2]}, which mean the same; give one."
            )
    dtype = dtype_of("torch_dtype", torch_dtype) if dtype is None else dtype_of("dtype", dtype)
    check_values(kv_budget, policy, offload, attention, cuda_graph, rollback)
    progressive = policy == "progressive"
    budget = None if kv_budget is None else parse_nbytes(kv_budget)
    target = device_of(device) if device is not None else default_device()
    if device_map is not None:
        target = device_of_map(device_map, target)
    ranks = 1
    if tp_plan is not None:
        check_plan(tp_plan, device, device_map, cuda_graph)
        target, ranks, cuda_graph = own_device(), int(os.environ["WORLD_SIZE"]), False
    folder = resolve_artifact(
        path_or_repo_id, revision, **{k: v for k, v in hub_kwargs.items() if k in HUB}
    )
    metadata = read_metadata(folder)
    check_states(metadata.cache, rollback, cuda_graph)
    if tp_plan is not None:
        check_heads(metadata.cache, config_from_pretrained(folder))
    triton = choose_triton(attention, target, metadata)
    computed = dtype if isinstance(dtype, torch.dtype) else None  # compiled while weights are read
    kernels = begin_folder(folder, target, computed, progressive, ranks) if triton else None
    artifact = read_artifact(folder) if tp_plan is None else own_part(read_artifact(folder))
    ladders = progressive_policy(artifact) if progressive else None
    if budget is not None and kv_budget is not None:
        rollback = fitting_rollback(budget, kv_budget, artifact, rollback, ladders)
    wanted = dtype or default_dtype(target) or "auto"
    model = read_model(artifact, wanted, **({} if tp_plan is None else plan_options()))
    if tp_plan is None:
        model = model.to(target)
    if (triton := kernels is not None and kernels.usable(attention == "triton")) and ranks == 1:
        begin_ahead(folder, target, computed, progressive)
    if cuda_graph is True and not (triton and target.type == "cuda"):
        raise KvfoldError(
            f"cuda_graph=True needs a CUDA device and the Triton kernels, but this is {target}; leave it out."
        )
    log.info("attention: %s on %s", "Triton kernels" if triton else "plain-torch reference", target)
    try:
        return attach(
            model,
            artifact,
            budget,
            triton,
            cuda_graph,
            rollback=rollback,
            batch_invariant=batch_invariant,
            policy=ladders,
            offload=offload,
        )
    finally:
        # an exception that transformers caught may keep this frame, and with it the weights, until
        # the next collection
        del model


def check_values(
    kv_budget: int | str | None,
    policy: str,
    offload: bool,
    attention: str,
    cuda_graph: bool | str,
    rollback: int | None,
) -> None:
    """Refuses values that options of load_pretrained don't have, and options that exclude each
    other.

    Raises:
        KvfoldError: naming the option.
    """
    if policy not in ("floor", "progressive"):
        raise KvfoldError(
            f"policy '{policy}' is not one this version knows; use 'floor' or 'progressive'."
        )
    check_choice(kv_budget is not None, policy == "progressive", offload)
    if cuda_graph not in (True, False, "auto"):
        raise KvfoldError(
            f"cuda_graph={cuda_graph!r} is not one this version knows; use 'auto', True or False."
        )
    if offload and cuda_graph is True:
        raise KvfoldError(
            "cuda_graph=True needs pages that stay where they are, but offload=True moves them; leave one of them out."
        )
    if attention not in ("auto", "reference", "triton"):
        raise KvfoldError(
            f"attention '{attention}' is not one this version knows; use 'auto', 'reference' or 'triton'."
        )
    if rollback is not None and (
        isinstance(rollback, bool)
        or not isinstance(rollback, int)
        or not 0 <= rollback <= MOST_TOKENS
    ):
        raise KvfoldError(
            f"rollback={rollback!r} is not a number of tokens; give 0 to {MOST_TOKENS}, or leave it out."
        )


def fitting_rollback(
    budget: int,
    kv_budget: int | str,
    artifact: Artifact,
    rollback: int | None,
    ladders: Ladders | None,
) -> int:
    """The rollback under a budget: what was asked for, else the artifact's, or 0 where that is too
    much; refuses a budget that one page of one sequence would pass.

    Args:
        budget, kv_budget: in bytes, and as it was given.
        rollback: in tokens; None for the default.
    Raises:
        KvfoldError: the budget is too small.
    """

    def least(rollback: int) -> int:
        g = replace(artifact.geometry, rollback=rollback)
        if ladders is not None:
            return ladders.least_nbytes(g, g.sinks + g.window + g.page_tokens)
        return batch_nbytes(g, artifact.formats, [1])

    wanted = artifact.geometry.rollback if rollback is None else rollback
    if budget >= least(wanted):
        return wanted
    if rollback is None and budget >= least(0):
        log.info("rollback: 0, because kv_budget=%s has no room for %d tokens", kv_budget, wanted)
        return 0
    kept = f", a rollback of {rollback} tokens" if rollback else ""
    raise KvfoldError(
        f"kv_budget={kv_budget} is too small: sinks, window{kept} and one page take {least(rollback or 0)} bytes; "
        "give at least that."
    )


def read_model(artifact: Artifact, dtype: torch.dtype | str, **placement: Any) -> Any:
    """The plain model of a checked artifact, complete.

    Args:
        placement: e.g. `device_map="meta"`, to see whether all fits without reading the weights.
    Raises:
        KvfoldError: its config.json and its weights don't make one, or there is too little memory.
    """
    if not placement:
        need_memory(weights_nbytes(artifact.path, dtype), f"'{artifact.path}', its weights alone,")
    try:
        model, info = stock_from_pretrained(
            artifact.path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them, the error doesn't
            **placement,
        )
    except KvfoldError:
        raise
    except Exception as error:  # a config.json whose fields have the right names can hold anything
        if is_out_of_memory(error):
            raise KvfoldError(
                f"There is too little memory to load '{artifact.path}' ({reason_of_shortage(error)}); free "
                "some, or choose a smaller model."
            ) from error
        raise KvfoldError(
            f"config.json and the weights in '{artifact.path}' make no model "
            f"({type(error).__name__}: {reason_of(error)}); write or "
            "download the artifact again."
        ) from error
    check_complete(info, artifact)
    return model


def progressive_policy(artifact: Artifact) -> Ladders:
    """The ladders of the progressive policy by an artifact's own predicted losses."""
    losses = [
        (layer.key.predicted_loss, layer.value.predicted_loss) for layer in artifact.metadata.layers
    ]
    return Ladders(artifact.specs, losses, artifact.geometry)


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device | None) -> torch.dtype | None:
    """float32 on a CPU, where decoding in bfloat16 is an order of magnitude slower; else None, the
    checkpoint's own."""
    return torch.float32 if device is not None and device.type == "cpu" else None


def check_complete(info: Any, artifact: Artifact) -> None:
    """Refuses weights that transformers filled with random numbers; `info`: its
    output_loading_info."""
    if absent := sorted(info["missing_keys"]):
        raise KvfoldError(
            f"'{artifact.path}' lacks the weight {absent[0]}; write or download the artifact again."
        )
    if other := sorted(info["mismatched_keys"], key=str):
        name = other[0][0] if isinstance(other[0], tuple) else other[0]
        raise KvfoldError(
            f"The weight {name} in '{artifact.path}' has not the shape that config.json gives it; "
            "write or download the artifact again."
        )


@contextmanager
def plain_cache(model: Any) -> Iterator[None]:
    """Plain forward passes of a loaded model keep transformers' own unquantised cache while this
    lasts."""
    with model.kv_attachment.plain():
        yield
