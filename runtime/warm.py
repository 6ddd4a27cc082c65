"""Compiles an artifact's kernels ahead, in several processes: for formats that differ by layer, attention has kernels of its own,
of some seconds each. Triton keeps the result on disk, so the next process finds it."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from kvfold.errors import KVBudgetExceeded
from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format
from kvfold.runtime.cache import QuantizedKVCache
from kvfold.runtime.policy import Progressive

AMPLE = 1 << 40  # bytes
Job = tuple[dict, dict, bool, bool, bool, bool]  # key format, value format; matrix, offset, key clip, value clip given


def warm_up(model: Any, jobs: int | None = None) -> int:
    """Compiles every kernel that `model`, from load_pretrained, will call, and returns how many pairs of formats it has.

    Args:
        jobs: processes; default: one a core, at most one a pair. With 1, nothing is started.
    """
    artifact = model.kv_artifact
    config = model.config.get_text_config()
    parameter = next(model.parameters())
    if not model.kv_triton or parameter.device.type != "cuda":
        return 0
    wanted: dict[str, Job] = {}
    for spec in artifact.specs:
        given = (spec.key.matrix is not None, spec.key.offset is not None, spec.key.clip is not None)
        job = (spec.key.format.to_dict(), spec.value.format.to_dict(), *given, spec.value.clip is not None)
        wanted[repr(job)] = job
    work = list(wanted.values())
    count = min(jobs or os.cpu_count() or 1, len(work))
    bends = _bends(config, artifact.geometry)
    device, progressive = str(parameter.device), model.kv_policy is not None
    shared = (artifact.geometry, config.num_attention_heads, parameter.dtype, device, bends, progressive)
    if count == 1:
        _compile(work, *shared)
    else:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in [pool.submit(_compile, work[i::count], *shared) for i in range(count)]:
                done.result()
    return len(work)


def _bends(config: Any, geometry: Geometry) -> list[tuple[float | None, bool, int]]:
    """What the layers of a model ask of attention beside a softmax: (soft-cap, whether there are sink logits, window)."""
    cap = getattr(config, "attn_logit_softcapping", None)
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = geometry.page_tokens  # any: it is no constant of the kernels
    return [(cap, config.model_type == "gpt_oss", window * (kind == "sliding_attention")) for kind in sorted(types)]


@torch.no_grad()
def _compile(
    work: list[Job], geometry: Geometry, num_heads: int, dtype: torch.dtype, device: str,
    bends: list[tuple[float | None, bool, int]], progressive: bool,
) -> None:  # fmt: skip
    """Runs a prompt and a step of one layer of each kind; with the progressive policy also every rung, and every step down."""
    heads, dim = geometry.num_kv_heads, geometry.head_dim
    for key, value, matrix, offset, key_clip, value_clip in work:
        eye = torch.eye(dim).expand(heads, dim, dim).contiguous()
        ones = torch.ones(heads)
        spec = LayerSpec(
            KeySpec(
                Format.from_dict(key), (), eye if matrix else None, torch.zeros(heads, dim) if offset else None,
                ones if key_clip else None,
            ),
            ValueSpec(Format.from_dict(value), (), ones if value_clip else None),
        )  # fmt: skip
        policy = Progressive([spec], [(1.0, 1.0)], geometry) if progressive else None
        first = geometry.sinks + geometry.window + 2 * geometry.page_tokens
        for cap, sinks, sliding in bends:
            cache = QuantizedKVCache([spec], geometry, AMPLE if progressive else None, True, 0, policy)
            logits = torch.zeros(num_heads, device=device, dtype=dtype) if sinks else None
            for tokens in (first, 1, *([geometry.page_tokens] * 2 * len(policy.rungs[0]) if policy else []), 1):
                keys, values, query = (
                    torch.randn(1, n, tokens, dim, device=device, dtype=dtype) for n in (heads, heads, num_heads)
                )
                try:
                    view = cache.update(keys, values, 0)[0]
                except KVBudgetExceeded:  # all is on the floor
                    break
                view.attend(query, dim**-0.5, None, cap, logits, sliding)
                if policy is not None:
                    cache.budget = cache.nbytes  # so that what comes next sends pages down
    if device != "cpu":
        torch.cuda.synchronize(device)
