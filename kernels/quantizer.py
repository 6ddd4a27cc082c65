"""The reference quantiser: encodes blocks of tokens to packed bytes and decodes them. It defines
the semantics that every other implementation is tested against, and it is what calibration, search,
evaluation and the CPU path run.

Two kinds of codes (c in 0 … L−1):

* "scale": x̂_i = τ·step(L_i)·(c_i − (L_i − 1)/2) with τ = rms over the stored channels, one a token. The caller brings
  channels to unit variance, so step(L) is the Gaussian optimum and no zero point is needed.
* "scale_min": x̂_i = m + s·c_i with m = clip·min, s = clip·(max − min)/(L − 1) over the token's group
  (asymmetric per-token codes as KIVI's, 2402.02750, stores values; the clip is SKVQ's, 2405.06219),
  both rounded to their stored type before coding.
"""

from functools import partial

import torch
from torch import Tensor

from kvfold.kernels.formats import GAUSSIAN_STEP, Format
from kvfold.kernels.packing import FIELDS, STORAGES

E4M3_MAX = 448.0
E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # of every byte
FP16_MAX = 65504.0


def to_float16(x: Tensor) -> Tensor:
    """Casts to float16, saturating: values past ±65504 become ±65504, never inf. NaN stays NaN."""
    return x.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def _store_param(x: Tensor, param_dtype: str) -> tuple[Tensor, Tensor]:
    """Rounds float32 parameters [..., T, p] to their stored type. Returns (bytes uint8 [..., T,
    p·size], rounded float32)."""
    e4m3 = param_dtype == "e4m3"
    stored = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn) if e4m3 else to_float16(x)
    return stored.contiguous().view(torch.uint8), stored.float()


def load_param(data: Tensor, param_dtype: str) -> Tensor:
    """Inverse of `_store_param`: uint8 [..., T, p·size] → float32 [..., T, p]."""
    if param_dtype == "e4m3" and data.device.type == "cpu":  # seven times faster than the cast
        return E4M3_VALUES.index_select(0, data.int().flatten()).view(data.shape)
    own = data.clone(memory_format=torch.contiguous_format)  # a slice may start at an odd byte
    return own.view(torch.float8_e4m3fn if param_dtype == "e4m3" else torch.float16).float()


def _class_rows(fmt: Format, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels and steps of every channel, float32 [head_dim] each (0 and 1 where nothing is coded)."""
    levels = [n for channels, n in fmt.classes for _ in range(channels)]
    steps = [GAUSSIAN_STEP.get(n, 1.0) for channels, n in fmt.classes for _ in range(channels)]
    as_float = partial(torch.tensor, dtype=torch.float32, device=device)
    return as_float(levels), as_float(steps)


def _by_word(params: Tensor) -> Tensor:
    """Parameters [..., T, p, size] in token order → [..., p·T·size], each parameter's tokens in word order."""
    words = params.unflatten(-3, (FIELDS, -1)).movedim(-2, -4)  # [..., p, 8, R, size]
    return words.transpose(-2, -3).flatten(-4)


def _by_token(data: Tensor, count: int, size: int) -> Tensor:
    """Inverse of `_by_word`: [..., p·T·size] → [..., T, p, size]."""
    words = data.unflatten(-1, (count, -1, FIELDS, size))  # [..., p, R, 8, size]
    return words.transpose(-2, -3).flatten(-3, -2).movedim(-3, -2)


def encode(x: Tensor, fmt: Format, clip: Tensor | None = None) -> Tensor:
    """Quantises and packs a page of tokens.

    Args:
        x: float [..., T, head_dim], T a multiple of 8; computed in float32.
        fmt: the format, of the same head_dim.
        clip: for "scale_min", the factor on (minimum, maximum), broadcastable to [..., 1, 1]; 1 if absent.
    Returns:
        uint8 [..., fmt.nbytes(T)], laid out as formats.py draws it.
    """
    x = x.float()
    params = None
    if fmt.params == "none":
        codes = to_float16(x)
    elif fmt.params == "scale":
        levels, steps = _class_rows(fmt, x.device)
        coded = levels > 0
        tau = x[..., coded].square().mean(-1, keepdim=True).sqrt()
        params, tau = _store_param(tau, fmt.param_dtype)
        u = x / (tau.clamp_min(torch.finfo(torch.float32).tiny) * steps) + levels / 2
        codes = torch.minimum(u.floor().clamp_min(0), (levels - 1).clamp_min(0)).to(torch.uint8)
    else:
        top = fmt.classes[0][1] - 1
        grouped = x.unflatten(-1, (fmt.num_groups, -1))  # [..., T, G, group]
        low, high = grouped.amin(-1), grouped.amax(-1)
        if clip is not None:
            low, high = low * clip, high * clip
        pair = torch.stack((low, (high - low) / torch.full_like(high, top)), -1)  # [..., T, G, 2]
        params, pair = _store_param(pair.flatten(-2), fmt.param_dtype)
        minimum, scale = pair.unflatten(-1, (fmt.num_groups, 2)).unbind(-1)
        u = (grouped - minimum[..., None]) / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        codes = u.round().clamp(0, top).flatten(-2).to(torch.uint8)
    parts = []
    for plane in fmt.planes:
        channels = slice(plane.start, plane.start + plane.channels)
        own, storage = codes[..., channels], STORAGES[plane.width]
        parts.append(storage.pack((own >> plane.shift) & (2**plane.width - 1) if storage.binary else own))
    if params is not None:
        parts.append(_by_word(params.unflatten(-1, (fmt.num_params, -1))))
    return torch.cat(parts, -1)


def decode(packed: Tensor, fmt: Format, tokens: int) -> Tensor:
    """Inverse of `encode` up to quantisation: uint8 [..., fmt.nbytes(tokens)] → float32 [..., tokens, head_dim]."""
    if fmt.params == "none":
        return load_param(packed.unflatten(-1, (tokens, 2 * fmt.head_dim)), "fp16")
    found = torch.zeros(*packed.shape[:-1], tokens, fmt.head_dim, dtype=torch.uint8, device=packed.device)
    offset = 0
    for plane in fmt.planes:
        part = packed[..., offset : offset + plane.nbytes(tokens)]
        offset += plane.nbytes(tokens)
        own = found[..., plane.start : plane.start + plane.channels]
        bits = STORAGES[plane.width].unpack(part, tokens, plane.channels)
        if plane.shift:
            own |= bits << plane.shift
        else:
            own.copy_(bits)
    codes = found.float()
    stored = _by_token(packed[..., offset:], fmt.num_params, fmt.param_nbytes)
    params = load_param(stored.flatten(-2), fmt.param_dtype)  # [..., T, p]
    if fmt.params == "scale":
        start = 0
        for channels, count in fmt.classes:
            if count:
                codes[..., start : start + channels].sub_((count - 1) / 2).mul_(params * GAUSSIAN_STEP[count])
            start += channels
        return codes
    minimum, scale = params.unflatten(-1, (fmt.num_groups, 2)).unbind(-1)
    return codes.unflatten(-1, (fmt.num_groups, -1)).mul_(scale[..., None]).add_(minimum[..., None]).flatten(-2)


def round_trip(x: Tensor, fmt: Format, clip: Tensor | None = None) -> Tensor:
    """decode(encode(x)): float [..., T, head_dim] → float32 of the same shape, through packed bytes, for any T."""
    tokens = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % FIELDS))
    return decode(encode(padded, fmt, clip), fmt, padded.shape[-2])[..., :tokens, :]
