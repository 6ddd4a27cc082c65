"""The rotating mean of keys in the logits of some queries: what the kernels read of it, and its
computation in plain torch.

device/mean.py says what the coefficients and the bias are.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.kernels.key_mean import STEP, KernelTables, TurnTables, padded_fast

STEPS_BLOCK = 64  # steps of the slow pairs whose bias one program computes


class MeanTerm(NamedTuple):
    """The rotating mean's share in the logits of some queries.

    Attributes:
        coefficients: float32 [B, Hkv, query blocks, 2, 2·F, N], A and B.
        bias: float32 [B, Hkv, query blocks, steps, N].
        first_step: of `bias`.
        tables: for the kernels.
    """

    coefficients: Tensor
    bias: Tensor
    first_step: int
    tables: KernelTables


class MeanOf(NamedTuple):
    """The rotating mean of keys and the queries of a prompt that read them.

    Attributes:
        tables: of the frequencies.
        offset: float32 [Hkv, D], mean of keys before RoPE.
        query: [B, H, T, D], after RoPE.
        first_step, end_step: steps of the slow pairs in which pages lie that the queries may read.
    """

    tables: TurnTables
    offset: Tensor
    query: Tensor
    first_step: int
    end_step: int


class StoredMean(NamedTuple):
    """The rotating mean that keys of one call were stored without, in their stored basis.

    Attributes:
        fast: float32 [Hkv, 2·F, D], the fast pairs' (key_mean.mean_bases).
        slow: float32 [Hkv, steps, D], the slow pairs' share at every step from the sinks on.
        tables: for the kernels.
    """

    fast: Tensor
    slow: Tensor
    tables: KernelTables


def stored_mean(tables: TurnTables, bases: tuple[Tensor, Tensor], tokens: int) -> StoredMean:
    """The mean of all positions below `tokens`.

    Args:
        bases: from `key_mean.mean_bases`.
    """
    tables.reach(tokens)
    fast, slow = bases
    steps = tables.kernel_tables.steps[: max(0, tokens - tables.sinks) // STEP + 1]
    return StoredMean(fast, steps.flatten(1) @ slow, tables.kernel_tables)


def mean_term(mean: MeanOf, columns_of: Callable[[Tensor], Tensor], factor: float) -> MeanTerm:
    """The term of a prompt's queries, in plain torch.

    Args:
        columns_of: lays [B, Hkv, group, T, n] out as query columns, float32 [B, Hkv, blocks, N, n].
        factor: on logits.
    """
    tables, offset, query, first_step, end_step = mean
    tables.reach(end_step * STEP + tables.sinks)
    heads = len(offset)
    c = tables.coefficients(offset, query) * factor
    fast, slow = c[..., : tables.fast], c[..., tables.fast :]
    padded = padded_fast(offset.shape[1])

    def rows(*parts: Tensor) -> Tensor:
        wide = torch.cat([torch.nn.functional.pad(x, (0, padded - tables.fast)) for x in parts], -1)
        return columns_of(wide.unflatten(1, (heads, -1))).transpose(-1, -2)

    both = torch.stack((rows(fast.real, -fast.imag), rows(-fast.imag, -fast.real)), 3)
    turn = tables.steps[first_step:end_step]
    bias = torch.cat((slow.real, -slow.imag), -1) @ torch.cat((turn.real, turn.imag), -1).mT
    bias = columns_of(bias.unflatten(1, (heads, -1))).transpose(-1, -2)
    return MeanTerm(both.contiguous(), bias.contiguous(), first_step, tables.kernel_tables)


def stored_mean_arguments(
    mean: StoredMean | None, device: torch.device
) -> tuple[Tensor | int, ...]:
    """What kernels read of a mean: fast, slow, spans, within, and the steps of `slow`."""
    if mean is None:
        none = torch.empty(0, device=device)  # nothing reads it
        return none, none, none, none.half(), 0
    tables = mean.tables
    return mean.fast, mean.slow, tables.spans, tables.within, mean.slow.shape[1]


def mean_rows(mean: StoredMean | None) -> int:
    """Rows of the fast pairs' product, 0 where no mean turns."""
    return 0 if mean is None else mean.fast.shape[1]
