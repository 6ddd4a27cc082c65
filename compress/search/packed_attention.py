"""A layer's attention as a packed cache computes it, for one sequence whose keys and values are all at
hand: what the search measures candidates by.

Keys and values go through packed bytes; what is attended to is what those stand for in the basis
before any transform. The runtime multiplies queries by the transform and leaves a mean to the logits
instead, which is the same up to rounding.
"""

from itertools import pairwise

import torch
from torch import Tensor

from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, ValueSpec, clip_rows
from kvfold.kernels.attention import Tile, attend
from kvfold.kernels.quantizer import round_trip, to_float16

BLOCK_ROWS = 128  # queries of a call to PyTorch's attention
TILE_TOKENS = (
    512  # of a sequence; a tile that no query of a block may read from its side is left out
)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Geometry,
    scaling: float,
    key_spec: KeySpec | None = None,
    value_spec: ValueSpec | None = None,
    value_matrix: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks_logit: Tensor | None = None,
) -> Tensor:
    """Causal attention of one sequence as the packed cache computes it, with either side left as it
    is.

    Args:
        query: [H, n, D], of the last n ≤ T tokens; key, value: [Hkv, T, D]; after RoPE.
        value_matrix: float [Hkv, D, D], the basis that values are quantised in; it is undone on the
            output.
        mask: bool [n, T] where attention is narrower than causal, e.g. a sliding window.
        softcap, sinks_logit: as in kernels.attention.attend.
    Returns:
        float32 [H, n, D].
    """
    tokens = key.shape[1]
    positions = torch.arange(tokens, device=query.device)
    asked = positions[tokens - query.shape[1] :]
    seen = (asked + 1 - geometry.sinks - geometry.window).clamp_min(0)
    limit = geometry.sinks + seen // geometry.page_tokens * geometry.page_tokens
    raw_k = packed_k = key.float()
    raw_v = packed_v = value.float()
    if key_spec is not None:
        z = to_float16(key_spec.apply(raw_k, positions, geometry.sinks)).float()
        decoded = round_trip(z, key_spec.format, clip_rows(key_spec.clip))
        mean = key_spec.mean(positions, geometry.sinks)
        raw_k, packed_k = (_as_before(x, key_spec.query_matrix, mean) for x in (z, decoded))
    if value_spec is not None or value_matrix is not None:
        z = raw_v if value_matrix is None else raw_v @ value_matrix.float().mT
        if value_spec is not None:
            z = round_trip(to_float16(z), value_spec.format, clip_rows(value_spec.clip))
        inverse = None if value_matrix is None else torch.linalg.inv(value_matrix.double()).float()
        packed_v = _as_before(z, inverse, None)
    raw, packed = (raw_k, raw_v), (packed_k, packed_v)
    if softcap is None and sinks_logit is None:
        return _attend_blocks(query.float(), raw, packed, asked, limit, geometry, scaling, mask)
    sinks, end = min(geometry.sinks, tokens), int(limit[-1])
    tiles = [
        Tile(raw_k[:, a:b], raw_v[:, a:b], positions[a:b], False)
        for a, b in pairwise([0, *range(sinks, tokens, TILE_TOKENS), tokens])
    ]
    tiles += [
        Tile(packed_k[:, a:b], packed_v[:, a:b], positions[a:b], True)
        for a, b in pairwise([*range(sinks, end, TILE_TOKENS), end])
    ]
    return attend(
        query, asked, limit, tiles,
        sinks=geometry.sinks, scaling=scaling, mask=mask, softcap=softcap, sinks_logit=sinks_logit,
    )  # fmt: skip


def _as_before(z: Tensor, inverse: Tensor | None, mean: Tensor | None) -> Tensor:
    """What stored z [Hkv, T, D] stand for, in the basis before any transform: their products with
    queries, and what is summed of them, are those that the runtime finds in the other basis."""
    if inverse is not None:
        z = z @ inverse.mT
    return z if mean is None else z + mean


def _attend_blocks(
    query: Tensor,
    raw: tuple[Tensor, Tensor],
    packed: tuple[Tensor, Tensor],
    asked: Tensor,
    limit: Tensor,
    geometry: Geometry,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    """Softmax attention by PyTorch's own kernel, some queries at a time: each block of them reads
    its sinks and its window from `raw`, what lies between from `packed`.

    Args:
        query: float32 [H, n, D].
        raw, packed: (keys, values), float32 [Hkv, T, D] each.
        asked, limit: int64 [n], a query's position and the end of the pages that it reads.
        mask: as in packed_attention.
    Returns:
        float32 [H, n, D].
    """
    heads = len(raw[0])
    grouped, out = query.unflatten(0, (heads, -1)), torch.empty_like(query)
    places = torch.arange(raw[0].shape[1], device=query.device)
    ends = asked.tolist(), limit.tolist()
    for start in range(0, len(asked), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        low, high, end = ends[1][start], ends[1][rows][-1], ends[0][rows][-1] + 1
        sinks = min(geometry.sinks, end)
        keys, values = (
            torch.cat((x[:, :sinks], y[:, geometry.sinks : high], x[:, low:end]), 1)
            for x, y in zip(raw, packed, strict=True)
        )
        at = torch.cat((places[:sinks], places[geometry.sinks : high], places[low:end]))
        now, last = asked[rows, None], limit[rows, None]
        visible = at <= now
        visible[:, sinks : sinks + high - geometry.sinks] = places[geometry.sinks : high] < last
        visible[:, len(at) - max(0, end - low) :] &= places[low:end] >= last
        if mask is not None:
            visible &= mask[rows][:, at]
        block = grouped[:, :, rows]
        found = torch.nn.functional.scaled_dot_product_attention(
            block.flatten(1, 2)[None], keys[None], values[None],
            visible.repeat(block.shape[1], 1)[None, None], scale=scaling,
        )  # fmt: skip
        out[:, rows] = found[0].unflatten(1, block.shape[1:3]).flatten(0, 1)
    return out
