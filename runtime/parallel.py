"""Tensor parallelism: transformers divides the weights of each layer among processes, and each
process caches the keys and values of its own KV heads.

A process quantises and lowers what it holds; nothing of the cache is sent. Policies decide by
bytes, tokens and predicted losses, which are the same in all processes, so that they stay in step
without a word.
"""

import os
from dataclasses import replace
from typing import Any

import torch

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import text_of
from kvfold.exports.cache_model import CacheModel
from kvfold.exports.reader import Artifact

DIVIDED = "colwise"  # what transformers' plans say of a projection whose outputs are divided
KEYS = ("k_proj", "query_key_value")


def check_plan(tp_plan: Any, device: Any, device_map: Any, cuda_graph: bool | str) -> None:
    """Refuses what can't be loaded on several processes.

    Args:
        tp_plan, device, device_map, cuda_graph: load_pretrained's.
    Raises:
        KvfoldError: another plan than transformers' own, no torchrun, or an option that takes
            one process.
    """
    if tp_plan != "auto":
        raise KvfoldError(
            f"tp_plan={tp_plan!r} is not one this version knows; use 'auto', transformers' own plan, or leave it out."
        )
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise KvfoldError(
            "tp_plan='auto' divides a model among the processes that torchrun starts, but this is a single one; "
            "say torchrun --nproc-per-node 2 SCRIPT, or leave tp_plan out."
        )
    for name, value in (("device", device), ("device_map", device_map)):
        if value is not None:
            raise KvfoldError(
                f"{name}={value!r} and tp_plan='auto' exclude each other, since each process takes the device of its "
                "own number; leave one of them out."
            )
    if cuda_graph is True:
        raise KvfoldError(
            "cuda_graph=True captures the steps of one process, and tp_plan='auto' is several; leave one of them out."
        )


def plan_options() -> dict[str, Any]:
    """How transformers' from_pretrained is asked for its own plan."""
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def own_device() -> torch.device:
    """The device of this process: the CUDA device of its number on this host, or the CPU.

    Raises:
        KvfoldError: more processes on this host than CUDA devices.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise KvfoldError(
            f"Process {number} of this host, counted from 0, has no CUDA device of its own, since there are {count}; "
            f"start at most {count} processes a host."
        )
    return torch.device("cuda", number)


def check_heads(cache: CacheModel, config: Any) -> None:
    """Refuses a model whose KV heads can't be divided among the processes.

    Args:
        cache: the artifact's.
        config: the model's.
    Raises:
        KvfoldError: heads that leave no equal parts, or a family whose plan doesn't divide them.
    """
    ranks, text = int(os.environ["WORLD_SIZE"]), text_of(config)
    if cache.states is not None:
        raise KvfoldError(
            f"tp_plan='auto' divides heads of keys and values among processes, but layers of a '{text.model_type}' "
            "model keep states, which it does not divide; leave tp_plan out."
        )
    if cache.heads or cache.shared:
        raise KvfoldError(
            f"tp_plan='auto' divides the same heads of all layers among processes, but layers of a '{text.model_type}' "
            "model have other heads than others; leave tp_plan out."
        )
    plan = getattr(text, "base_model_tp_plan", None) or {}
    divided = [kind for name, kind in plan.items() if name.rpartition(".")[2] in KEYS]
    if divided != [DIVIDED]:
        raise KvfoldError(
            f"transformers' plan for '{text.model_type}' divides no KV heads among processes; leave tp_plan out."
        )
    heads, queries = cache.num_kv_heads, cache.num_heads
    if heads % ranks or queries % ranks:
        raise KvfoldError(
            f"{ranks} processes divide the {heads} KV heads and {queries} query heads of this model into no equal "
            f"parts; start as many as divide {heads}."
        )


def own_part(artifact: Artifact) -> Artifact:
    """What of an artifact this process caches, if its heads can be divided (`check_heads`)."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    count = artifact.metadata.cache.num_kv_heads // ranks
    part = slice(rank * count, (rank + 1) * count)
    return replace(artifact, specs=[spec.of_heads(part) for spec in artifact.specs], heads=part)
