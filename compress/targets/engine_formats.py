"""The 8- and 4-bit float caches of other engines, emulated: what a value becomes once it is stored
and read back.

| format | bits an element | how |
|---|---|---|
| FP8 | 8 | e4m3(x / s) · s with one static s, saturating at ±448 |
| NVFP4 | 4.5 | e2m1 codes; for 16 neighbouring channels an e4m3 scale, relative to s / 6, so that codes reach ±6 |
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfold.compress.models.attention_hook import Tap
from kvfold.kernels.attention import attend_plain

FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # magnitudes of e2m1
FP4_BLOCK = 16
FP4_TIES = (0.25, 1.25, 2.5, 5.0)  # midpoints whose even neighbour is the lower level


def _e4m3(x: Tensor) -> Tensor:
    """Rounded to e4m3 (to nearest even, saturating), as float32."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x float [...], scale float32 that broadcasts to it → what an FP8 cache gives back,
    float32."""
    return _e4m3(x.float() / scale) * scale


def _e2m1(x: Tensor) -> Tensor:
    """Rounded to e2m1, to nearest even, saturating; float32."""
    levels = FP4_LEVELS.to(x.device)
    middle = (levels[1:] + levels[:-1]) / 2
    size = x.abs()
    index = torch.bucketize(size.contiguous(), middle, right=True)  # a midpoint goes up …
    for tie in FP4_TIES:  # … unless the level below it is the even one
        index = index - (size == tie).long()
    return levels[index].copysign(x)


def nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """x float [..., D] with D a multiple of 16 → what an NVFP4 cache gives back, float32.

    Args:
        scale: float32 that broadcasts to x's first axes, [..., 1]: absmax / 448, as for FP8.
    """
    blocks = x.float().unflatten(-1, (-1, FP4_BLOCK))
    outer = scale.unsqueeze(-1) / FP4_MAX  # of the block scales
    inner = _e4m3(blocks.abs().amax(-1, keepdim=True) / FP4_MAX / outer) * outer
    codes = _e2m1(blocks / torch.where(inner > 0, inner, torch.ones_like(inner)))
    return (codes * inner).flatten(-2)


ROUNDINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"FP8": fp8, "NVFP4": nvfp4}


def rounding_tap(
    key_algo: str | None, value_algo: str | None, key_scale: Tensor, value_scale: Tensor
) -> Tap:
    """A tap whose attention reads keys and values back from an emulated cache; every token, sinks
    and latest included.

    Args:
        key_algo, value_algo: "FP8" or "NVFP4"; None for 16 bits.
        key_scale, value_scale: float32 [1] or [num_kv_heads].
    """

    def read_back(x: Tensor, algo: str | None, scale: Tensor) -> Tensor:
        return (
            x if algo is None else ROUNDINGS[algo](x, scale.to(x.device)[:, None, None]).to(x.dtype)
        )

    def tap(module, query, key, value, mask, scaling, **extras):
        stored_k, stored_v = (
            read_back(key, key_algo, key_scale),
            read_back(value, value_algo, value_scale),
        )
        if extras:
            out = attend_plain(query, stored_k, stored_v, scaling, mask, **extras)
            return out.transpose(1, 2).to(query.dtype)
        return sdpa_attention_forward(module, query, stored_k, stored_v, mask, scaling=scaling)[0]

    return tap
