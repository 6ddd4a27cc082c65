"""The reference quantiser: encodes blocks of tokens to packed bytes and decodes them. It defines the semantics that every
other implementation is tested against, and it is what calibration, search, evaluation and the CPU path run.

Two kinds of codes (c in 0 … L−1):

* "scale": x̂_i = τ·step(L_i)·(c_i − (L_i − 1)/2) with τ = rms over the stored channels, one a token. The caller brings
  channels to unit variance, so step(L) is the Gaussian optimum and no zero point is needed.
* "scale_min": x̂_i = m + s·c_i with m = clip·min, s = clip·(max − min)/(L − 1) over the token's group (asymmetric per-token
  codes as KIVI's, 2402.02750, stores values; the clip is SKVQ's, 2405.06219), both rounded to their stored type before coding.
"""

import torch
from torch import Tensor

from kvfold.kernels.formats import GAUSSIAN_STEP, RAW, TRIT, Format
from kvfold.kernels.packing import pack_plane, pack_trits, unpack_plane, unpack_trits

E4M3_MAX = 448.0
FP16_MAX = 65504.0


def to_float16(x: Tensor) -> Tensor:
    """Casts to float16, saturating: values past ±65504 become ±65504, never inf. NaN stays NaN."""
    return x.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def _store_param(x: Tensor, param_dtype: str) -> tuple[Tensor, Tensor]:
    """Rounds float32 parameters [..., T, p] to their stored type. Returns (bytes uint8 [..., T, p·size], rounded float32)."""
    e4m3 = param_dtype == "e4m3"
    stored = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn) if e4m3 else to_float16(x)
    return stored.contiguous().view(torch.uint8), stored.float()


def _load_param(data: Tensor, param_dtype: str) -> Tensor:
    """Inverse of `_store_param`: uint8 [..., T, p·size] → float32 [..., T, p]."""
    own = data.clone(memory_format=torch.contiguous_format)  # a slice may start at an odd byte
    return own.view(torch.float8_e4m3fn if param_dtype == "e4m3" else torch.float16).float()


def _class_rows(fmt: Format, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels and steps of every channel, float32 [head_dim] each (0 and 1 where nothing is coded)."""
    levels = [n if n != RAW else 0 for channels, n in fmt.classes for _ in range(channels)]
    steps = [GAUSSIAN_STEP.get(n, 1.0) for channels, n in fmt.classes for _ in range(channels)]
    return torch.tensor(levels, dtype=torch.float32, device=device), torch.tensor(steps, device=device)


def encode(x: Tensor, fmt: Format, clip: Tensor | None = None) -> Tensor:
    """Quantises and packs a block of tokens.

    Args:
        x: float [..., T, head_dim]; computed in float32.
        fmt: the format, of the same head_dim.
        clip: for "scale_min", the factor on (minimum, maximum), broadcastable to [..., 1, 1]; 1 if absent.
    Returns:
        uint8 [..., fmt.nbytes(T)], laid out as formats.py draws it.
    """
    x = x.float()
    params = None
    codes = None
    if fmt.params == "scale":
        levels, steps = _class_rows(fmt, x.device)
        coded = levels > 0
        tau = (
            x[..., coded].square().mean(-1, keepdim=True).sqrt() if bool(coded.any()) else x.new_zeros(*x.shape[:-1], 1)
        )
        params, tau = _store_param(tau, fmt.param_dtype)
        u = x / (tau.clamp_min(torch.finfo(torch.float32).tiny) * steps) + levels / 2
        codes = torch.minimum(u.floor().clamp_min(0), (levels - 1).clamp_min(0)).to(torch.uint8)
    elif fmt.params == "scale_min":
        top = fmt.classes[0][1] - 1
        grouped = x.unflatten(-1, (fmt.num_groups, -1))  # [..., T, G, group]
        low, high = grouped.amin(-1), grouped.amax(-1)
        if clip is not None:
            low, high = low * clip, high * clip
        pair = torch.stack((low, (high - low) / top), -1)  # [..., T, G, 2]
        params, pair = _store_param(pair.flatten(-2), fmt.param_dtype)
        minimum, scale = pair.unflatten(-1, (fmt.num_groups, 2)).unbind(-1)
        u = (grouped - minimum[..., None]) / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        codes = u.round().clamp(0, top).flatten(-2).to(torch.uint8)
    parts = []
    for plane in fmt.planes:
        channels = slice(plane.start, plane.start + plane.channels)
        if plane.width == 16:
            row = to_float16(x[..., channels]).contiguous().view(torch.uint8)
        elif plane.width == TRIT:
            assert codes is not None
            row = pack_trits(codes[..., channels])
        else:
            assert codes is not None
            row = pack_plane((codes[..., channels] >> plane.shift) & (2**plane.width - 1), plane.width)
        parts.append(row.flatten(-2))
    if params is not None:
        parts.append(params.flatten(-2))
    return torch.cat(parts, -1)


def decode(packed: Tensor, fmt: Format, tokens: int) -> Tensor:
    """Inverse of `encode` up to quantisation: uint8 [..., fmt.nbytes(tokens)] → float32 [..., tokens, head_dim]."""
    levels, steps = _class_rows(fmt, packed.device)
    lead = packed.shape[:-1]
    out = torch.zeros(*lead, tokens, fmt.head_dim, device=packed.device)
    offset = 0
    for plane in fmt.planes:
        rows = packed[..., offset : offset + tokens * plane.row_nbytes].unflatten(-1, (tokens, plane.row_nbytes))
        offset += tokens * plane.row_nbytes
        channels = slice(plane.start, plane.start + plane.channels)
        if plane.width == 16:
            out[..., channels] = rows.clone(memory_format=torch.contiguous_format).view(torch.float16).float()
        elif plane.width == TRIT:
            out[..., channels] = unpack_trits(rows, plane.channels).float()
        else:
            out[..., channels] += unpack_plane(rows, plane.width).float() * (1 << plane.shift)
    if fmt.params == "none":
        return out
    params = _load_param(packed[..., offset:].unflatten(-1, (tokens, fmt.param_row_nbytes)), fmt.param_dtype)
    if fmt.params == "scale":
        coded = levels > 0
        values = (out - (levels - 1) / 2) * (params * steps)
        raw = torch.tensor([n == RAW for channels, n in fmt.classes for _ in range(channels)], device=packed.device)
        return torch.where(coded, values, torch.where(raw, out, torch.zeros_like(out)))
    minimum, scale = params.unflatten(-1, (fmt.num_groups, 2)).unbind(-1)
    return (out.unflatten(-1, (fmt.num_groups, -1)) * scale[..., None] + minimum[..., None]).flatten(-2)


def round_trip(x: Tensor, fmt: Format, clip: Tensor | None = None) -> Tensor:
    """decode(encode(x)): float [..., T, head_dim] → float32 of the same shape, through packed bytes."""
    return decode(encode(x, fmt, clip), fmt, x.shape[-2])
