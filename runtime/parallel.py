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
from kvfold.exports.reader import Artifact

DIVIDED = "colwise"  # what transformers' plans say of a projection whose outputs are divided
KEYS = ("k_proj", "query_key_value")


def check_plan(tp_plan: Any, device: Any, cuda_graph: bool | str) -> None:
    """Refuses what can't be loaded on several processes.

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
    if device is not None:
        raise KvfoldError(
            f"device={device!r} and tp_plan='auto' exclude each other, since each process takes the device of its "
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
    """The device of this process: the CUDA device of its number on this host, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def own_part(artifact: Artifact, config: Any) -> Artifact:
    """What of an artifact this process caches.

    Args:
        artifact: of all heads.
        config: the model's.
    Raises:
        KvfoldError: heads that can't be divided, or a family whose plan doesn't divide them.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    text = text_of(config)
    if artifact.metadata.cache.states is not None:
        raise KvfoldError(
            f"tp_plan='auto' divides heads of keys and values among processes, but layers of a '{text.model_type}' "
            "model keep states, which it does not divide; leave tp_plan out."
        )
    plan = getattr(text, "base_model_tp_plan", None) or {}
    divided = [kind for name, kind in plan.items() if name.rpartition(".")[2] in KEYS]
    if divided != [DIVIDED]:
        raise KvfoldError(
            f"transformers' plan for '{text.model_type}' divides no KV heads among processes; leave tp_plan out."
        )
    heads, queries = artifact.metadata.cache.num_kv_heads, artifact.metadata.cache.num_heads
    if heads % ranks or queries % ranks:
        raise KvfoldError(
            f"{ranks} processes divide the {heads} KV heads and {queries} query heads of this model into no equal "
            f"parts; start as many as divide {heads}."
        )
    count = heads // ranks
    part = slice(rank * count, (rank + 1) * count)
    return replace(artifact, specs=[spec.of_heads(part) for spec in artifact.specs], heads=part)
