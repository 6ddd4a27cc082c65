"""Queries as the attention kernel reads them: laid out, scaled to float16's middle, and with what
logits lack of a key's mean."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kvfold.kernels.gpu.device.constants import LOG2_E
from kvfold.kernels.gpu.mean import STEPS_BLOCK, MeanOf, MeanTerm, mean_term
from kvfold.kernels.key_mean import STEP, TurnTables, padded_fast

PROMPT_COLUMNS = 16  # query columns of a program over a prompt
QUERY_TOP = 7  # queries are scaled so that the largest component lies in [2^6, 2^7]


def logit_factor(scaling: float, softcap: float | None) -> float:
    """What products of queries and keys are multiplied with: the softmax's scaling, in base 2 where
    nothing bends logits first."""
    return scaling if softcap else scaling * LOG2_E.value


@dataclass(frozen=True)
class Queries:
    """Queries as the kernel reads them.

    Attributes:
        data: float16 [B, Hkv, query blocks, N, head_dim]; column n of a block is query n // G, head
            n mod G of the group.
        scale: float32 [B, Hkv], softmax scaling, log2 e and the inverse of what `data` was
            multiplied with.
        columns: of N that are queries; N is padded to 8 at least.
        group: G, query heads of a KV head.
        tokens: queries of a sequence.
        shift: float32 [B, Hkv, query blocks, N], softmax scaling times q·μ, which every logit of a
            query lacks where keys are stored as k − μ; only a soft-cap and sink logits see it. None
            for zero.
        mean: what logits lack where keys are stored without a mean that turns; None for nothing.
    """

    data: Tensor
    scale: Tensor
    columns: int
    group: int
    tokens: int
    shift: Tensor | None = None
    mean: MeanTerm | None = None


def prepare_queries(
    query: Tensor,
    num_kv_heads: int,
    scaling: float,
    softcap: float | None = None,
    shift: Tensor | None = None,
    mean: MeanOf | None = None,
) -> Queries:
    """Scales queries [B, num_heads, T, head_dim], in the keys' basis, to float16's middle and lays
    them out.

    The power of two is one for all queries of a KV head, so that it can go into the scale of the
    keys.

    Args:
        shift: float32 [B, num_heads, T], q·μ of what the keys leave out; None for zero.
        mean: of keys that are stored without a mean that turns, with the queries before they went
            into the keys' basis.
    """
    batch, heads, tokens, dim = query.shape
    group = heads // num_kv_heads
    grouped = query.float().view(batch, num_kv_heads, group, tokens, dim)
    largest = grouped.abs().amax((2, 3, 4)).clamp_min(1e-30)
    power = torch.exp2(QUERY_TOP - torch.ceil(torch.log2(largest)))  # [B, Hkv]
    columns = group if tokens == 1 else max(1, PROMPT_COLUMNS // group) * group
    each = columns // group
    blocks = -(-tokens // each)
    padded = max(8, 1 << (columns - 1).bit_length())

    def columns_of(x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, Hkv, group, tokens, n] → [B, Hkv, blocks, padded, n]."""
        data = torch.zeros(
            batch, num_kv_heads, blocks * each, group, x.shape[-1], dtype=dtype, device=query.device
        )
        data[:, :, :tokens] = x.transpose(2, 3)
        data = data.view(batch, num_kv_heads, blocks, columns, x.shape[-1])
        return torch.nn.functional.pad(data, (0, 0, 0, padded - columns)).contiguous()

    data = columns_of(grouped * power[:, :, None, None, None], torch.float16)
    if shift is not None:
        shifts = (shift.float() * scaling).view(batch, num_kv_heads, group, tokens, 1)
        shift = columns_of(shifts, torch.float32).squeeze(-1)
    factor = logit_factor(scaling, softcap)
    term = None if mean is None else mean_term(mean, lambda x: columns_of(x, torch.float32), factor)
    return Queries(data, factor / power, columns, group, tokens, shift, term)


def empty_queries(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    shift: bool = False,
    tables: TurnTables | None = None,
    tokens: int = 0,
    *,
    stays: bool = True,
) -> Queries:
    """Room for the queries of one decoding step, which `append_step` fills; with `shift`, for
    Queries.shift too.

    Args:
        tables: of the rotating mean that the layer's keys are stored without; None for none.
        tokens: positions that the room for its term covers, from 0 on.
        stays: it is cleared once and kept; else its columns that are no queries hold anything.
    """
    make = torch.zeros if stays else torch.empty
    group = num_heads // num_kv_heads
    padded = max(8, triton.next_power_of_2(group))
    floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
    data = make(batch, num_kv_heads, 1, padded, head_dim, dtype=torch.float16, device=device)
    shifts = make(batch, num_kv_heads, 1, padded, **floats) if shift else None
    mean = None
    if tables is not None:
        tables.reach(tokens)
        steps = -(-(tokens // STEP + 1) // STEPS_BLOCK) * STEPS_BLOCK
        rows = 2 * padded_fast(head_dim)
        coefficients = make(batch, num_kv_heads, 1, 2, rows, padded, **floats)
        bias = make(batch, num_kv_heads, 1, steps, padded, **floats)
        mean = MeanTerm(coefficients, bias, 0, tables.kernel_tables)
    return Queries(data, make(batch, num_kv_heads, **floats), group, group, 1, shifts, mean)
