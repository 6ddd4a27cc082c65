"""Reference attention over a cache of three regions: sinks and window in 16 bits, pages in between.
Plain torch, any device.

The semantics that kernels are tested against. With N sinks, a window of W tokens and pages of P
tokens, the page of tokens [N + pP, N + (p+1)P) leaves the window, whole, once W tokens follow it.
So a query at position t reads

    packed(t) = P·floor(max(0, t + 1 − N − W) / P)      tokens N … N + packed(t) − 1 from pages, all
    others up to t raw,

and one pass over a prompt gives what feeding it token by token gives. Queries of a prompt read
decoded pages; a single one, of a decoding step, multiplies with the codes as they are packed
(codes.py), which rounds differently and decodes nothing.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.kernels.codes import Codes
from kvfold.kernels.key_mean import TurnTables

QUERY_BLOCK = 512  # queries scored at a time: bounds the score matrix to [num_heads, 512, tile]


class Tile(NamedTuple):
    """A run of cached tokens of one sequence, in rising position or, as codes, in their order; the
    first token comes first."""

    keys: Tensor | Codes  # [num_kv_heads, n, head_dim]
    values: Tensor | Codes  # [num_kv_heads, n, head_dim]
    positions: Tensor  # int64 [n]
    packed: bool


class KeyMean(NamedTuple):
    """What the logits of some queries lack because keys are stored without their rotating mean
    (key_mean.py)."""

    tables: TurnTables
    coefficients: Tensor  # complex64 [num_heads, T, head_dim / 2]

    def logits(self, rows: slice, positions: Tensor) -> Tensor:
        """q·m_t of queries `rows` and keys at int64 positions [n]: float32 [num_heads, rows, n]."""
        return self.tables.logits(self.coefficients[:, rows], positions)


def packed_tokens(seq_len: int, sinks: int, window: int, page_tokens: int) -> int:
    """Tokens that sit in pages once a sequence holds `seq_len` tokens."""
    return max(0, seq_len - sinks - window) // page_tokens * page_tokens


def attend(
    query: Tensor,
    positions: Tensor,
    packed_limit: Tensor,
    tiles: Iterable[Tile],
    *,
    sinks: int,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks_logit: Tensor | None = None,
    shift: Tensor | None = None,
    mean: KeyMean | None = None,
) -> Tensor:
    """Softmax attention of T queries of one sequence over tiles, one tile in memory at a time
    (online softmax).

    Args:
        query: [num_heads, T, head_dim], in the keys' basis.
        positions: int64 [T], rising positions of the queries.
        packed_limit: int64 [T], not falling; query t reads positions sinks … packed_limit[t] − 1
            from packed tiles only.
        tiles: every cached position at least once as it is to be read.
        sinks: first positions, always raw.
        scaling: factor on the logits.
        mask: bool [T, seq_len] by position, True where the query may look; None for plain causal.
        softcap: logits become softcap · tanh(logits / softcap) (Gemma 2).
        sinks_logit: [num_heads], the logit of one more column, without a value, in every softmax of
            a head (gpt-oss).
        shift: [num_heads, T], added to a query's products with keys, before `scaling`. The softmax
            alone would not see it, but a soft-cap and a sink logit do: they need the q · μ that
            keys stored as k − μ leave out.
        mean: of keys that are stored without a mean that turns with their position; None for none.
    Returns:
        float32 [num_heads, T, head_dim]; zeros for a query that may look at nothing.
    """
    num_heads, num_queries, head_dim = query.shape
    q = query.float() * scaling
    if mean is not None:
        mean = KeyMean(mean.tables, mean.coefficients * scaling)
    out = torch.zeros(num_heads, num_queries, head_dim, dtype=torch.float32, device=query.device)
    top = torch.full(
        (num_heads, num_queries, 1), -torch.inf, dtype=torch.float32, device=query.device
    )
    total = torch.zeros(num_heads, num_queries, 1, dtype=torch.float32, device=query.device)
    if sinks_logit is not None:
        top, total = sinks_logit.float()[:, None, None].expand_as(top).clone(), total + 1
    blocks = []
    for start in range(0, num_queries, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, num_queries))
        blocks.append(
            (
                rows,
                int(positions[rows][-1]),
                int(packed_limit[rows][0]),
                int(packed_limit[rows][-1]),
            )
        )
    for tile in tiles:
        if tile.positions.numel() == 0:
            continue
        keys, values = (x if isinstance(x, Codes) else x.float() for x in tile[:2])
        num_kv_heads, size = len(keys), tile.positions.numel()
        first, last = int(tile.positions[0]), int(tile.positions[-1])
        for rows, last_query, limit_low, limit_high in blocks:
            unseen = (
                first >= limit_high
                if tile.packed
                else (first > last_query or (first >= sinks and last < limit_low))
            )
            if unseen:
                continue
            limit = packed_limit[rows, None]
            visible = None  # all of it
            if not tile.packed:
                visible = ((tile.positions < sinks) | (tile.positions >= limit)) & (
                    tile.positions <= positions[rows, None]
                )
            elif mask is not None or last >= limit_low:
                visible = tile.positions < limit  # [Tq, n]
            if mask is not None and visible is not None:
                visible = visible & mask[rows][:, tile.positions]
                if not bool(visible.any()):  # beyond a sliding window
                    continue
            q_block = q[:, rows].reshape(num_kv_heads, -1, head_dim)  # [Hkv, G·Tq, D]
            scores = (
                keys.products(q_block) if isinstance(keys, Codes) else q_block @ keys.mT
            )  # [Hkv, G·Tq, n]
            scores = scores.view(num_heads, -1, size)
            if shift is not None:
                scores += shift[:, rows, None] * scaling
            if mean is not None:
                scores += mean.logits(rows, tile.positions)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            if visible is not None:
                scores = scores.masked_fill_(~visible, -torch.inf)
            new_top = torch.maximum(top[:, rows], scores.amax(-1, keepdim=True))
            base = new_top.masked_fill(new_top == -torch.inf, 0.0)
            weights = scores.sub_(base).exp_()
            rescale = (top[:, rows] - base).exp()
            total[:, rows] = total[:, rows] * rescale + weights.sum(-1, keepdim=True)
            weights = weights.view(num_kv_heads, -1, size)
            partial = values.weighted(weights) if isinstance(values, Codes) else weights @ values
            out[:, rows] = out[:, rows] * rescale + partial.view(num_heads, -1, head_dim)
            top[:, rows] = new_top
    return out / total.masked_fill(total == 0, 1.0)


def attend_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks_logit: Tensor | None = None,
) -> Tensor:
    """Attention over plain tensors, for models whose soft-cap or sink logits
    scaled_dot_product_attention lacks.

    Args:
        query: [B, num_heads, T, head_dim].
        key, value: [B, num_kv_heads, S, head_dim].
        mask: bool [B or 1, 1, T, S]; None for causal, with the last query at the last key.
        scaling, softcap, sinks_logit: as in `attend`.
    Returns:
        float32 [B, num_heads, T, head_dim].
    """
    tokens, seen = query.shape[2], key.shape[2]
    places = torch.arange(seen, device=query.device)
    # a mask alone says what is visible: the keys may be a window's, or lie in a longer buffer
    last = places[seen - tokens :] if mask is None else places[-1:].expand(tokens)
    none_packed = torch.zeros_like(last)
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    for b in range(len(query)):
        row_mask = None if mask is None else mask[min(b, len(mask) - 1), 0]
        out[b] = attend(
            query[b], last, none_packed, [Tile(key[b], value[b], places, False)],
            sinks=0, scaling=scaling, mask=row_mask, softcap=softcap, sinks_logit=sinks_logit,
        )  # fmt: skip
    return out
