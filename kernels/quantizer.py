"""The reference quantiser: encodes blocks of tokens to packed bytes and decodes them. It defines
the semantics that every other implementation is tested against, and it is what calibration, search,
evaluation and the CPU path run. How numbers become codes, and codes bytes, is in kinds/.
"""

import torch
from torch import Tensor

from kvfold.kernels.formats import Format
from kvfold.kernels.kinds.params import load_param
from kvfold.kernels.kinds.params import to_float16 as to_float16
from kvfold.kernels.kinds.storage import FIELDS


def _by_word(params: Tensor) -> Tensor:
    """Parameters [..., T, p, size] in token order → [..., p·T·size], each parameter's tokens in
    word order."""
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
        clip: for "scale_min", the factor on (minimum, maximum), broadcastable to [..., 1, 1]; 1 if
            absent.
    Returns:
        uint8 [..., fmt.nbytes(T)], laid out as formats.py draws it.
    """
    codes, params = fmt.kind.encode(x.float(), fmt, clip)
    parts = []
    for plane in fmt.planes:
        channels = slice(plane.start, plane.start + plane.channels)
        own, storage = codes[..., channels], plane.storage
        parts.append(
            storage.pack((own >> plane.shift) & (2**plane.width - 1) if storage.binary else own)
        )
    if params is not None:
        parts.append(_by_word(params.unflatten(-1, (fmt.num_params, -1))))
    return torch.cat(parts, -1)


def decode(packed: Tensor, fmt: Format, tokens: int) -> Tensor:
    """Inverse of `encode` up to quantisation: uint8 [..., fmt.nbytes(tokens)] → float32 [...,
    tokens, head_dim]."""
    if fmt.raw:
        return load_param(packed.unflatten(-1, (tokens, 2 * fmt.head_dim)), "fp16")
    found = torch.zeros(
        *packed.shape[:-1], tokens, fmt.head_dim, dtype=torch.uint8, device=packed.device
    )
    offset = 0
    for plane in fmt.planes:
        part = packed[..., offset : offset + plane.nbytes(tokens)]
        offset += plane.nbytes(tokens)
        own = found[..., plane.start : plane.start + plane.channels]
        bits = plane.storage.unpack(part, tokens, plane.channels)
        if plane.shift:
            own |= bits << plane.shift
        else:
            own.copy_(bits)
    stored = _by_token(packed[..., offset:], fmt.num_params, fmt.param_nbytes)
    params = load_param(stored.flatten(-2), fmt.param_dtype)  # [..., T, p]
    return fmt.kind.decode(found, params, fmt)


def round_trip(x: Tensor, fmt: Format, clip: Tensor | None = None) -> Tensor:
    """decode(encode(x)): float [..., T, head_dim] → float32 of the same shape, through packed
    bytes, for any T."""
    tokens = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % FIELDS))
    return decode(encode(padded, fmt, clip), fmt, padded.shape[-2])[..., :tokens, :]
