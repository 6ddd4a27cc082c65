"""The protocol that all rows of a comparison share, for rivals: what is in 16 bits, what is stored,
and how it is counted.

Teacher-forced windows; the first N tokens and the last W in 16 bits; a page leaves the window as a
whole, and a query reads everything behind it as it is stored. This is kernels/attention.py's rule,
through `attend` itself.
"""

import torch

from kvfold.compress.bench.rivals import Rival
from kvfold.compress.models.attention_hook import Tap
from kvfold.exports.account import Geometry
from kvfold.kernels.attention import Tile, attend, packed_tokens
from kvfold.kernels.quantizer import to_float16

TILE = 512  # tokens of a tile: queries skip the tiles that they read in the other form


def page_tokens(rival: Rival, least: int) -> int:
    """Tokens that leave the window together: `least`, or the blocks of a scheme that needs more at
    once."""
    return max(rival.block_tokens, least // rival.block_tokens * rival.block_tokens)


def rival_bits(rival: Rival, geometry: Geometry, num_layers: int, tokens: int) -> float:
    """Bits per cached element of a sequence of `tokens` tokens, all that is resident counted as for
    an artifact."""
    packed = rival.payload_bits(geometry.head_dim) * geometry.packed_elements(tokens, num_layers)
    fixed = 8 * num_layers * geometry.fixed_nbytes(tokens)
    return (fixed + packed) / geometry.elements(tokens, num_layers)


def rival_tap(rival: Rival, geometry: Geometry) -> Tap:
    """A tap that attends with what `rival` keeps of the keys and values behind the window."""
    g = geometry

    def tap(module, query, key, value, mask, scaling, **extras):
        tokens = key.shape[2]
        packed = packed_tokens(tokens, g.sinks, g.window, g.page_tokens)
        if packed == 0:
            return None
        positions = torch.arange(tokens, device=key.device)
        limit = (
            g.sinks
            + (positions + 1 - g.sinks - g.window).clamp_min(0) // g.page_tokens * g.page_tokens
        )
        keys, values = to_float16(key[0]).float(), to_float16(value[0]).float()
        behind = slice(g.sinks, g.sinks + packed)
        stored_keys, stored_values = rival.quantise(keys[:, behind], values[:, behind])
        tiles = [Tile(keys[:, : g.sinks], values[:, : g.sinks], positions[: g.sinks], False)]
        for start in range(g.sinks, tokens, TILE):
            part = slice(start, start + TILE)
            tiles.append(Tile(keys[:, part], values[:, part], positions[part], False))
        for start in range(0, packed, TILE):
            part = slice(start, min(start + TILE, packed))
            tiles.append(
                Tile(stored_keys[:, part], stored_values[:, part], positions[behind][part], True)
            )
        narrow = None if mask is None else mask[0, 0]
        out = attend(
            query[0], positions, limit, tiles, sinks=g.sinks, scaling=scaling, mask=narrow, **extras
        )
        return out.transpose(0, 1)[None].to(query.dtype)

    return tap
