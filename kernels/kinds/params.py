"""Parameters of a token, scales and minima, as they are stored: e4m3 or float16."""

import torch
from torch import Tensor

E4M3_MAX = 448.0
E4M3_VALUES = (
    torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
)  # of every byte
FP16_MAX = 65504.0
TINY = torch.finfo(torch.float32).tiny  # a scale that is divided by counts as this at the least
PARAM_NBYTES = {"e4m3": 1, "fp16": 2}


def to_float16(x: Tensor) -> Tensor:
    """Casts to float16, saturating: values past ±65504 become ±65504, never inf. NaN stays NaN."""
    return x.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def store_param(x: Tensor, param_dtype: str) -> tuple[Tensor, Tensor]:
    """Rounds float32 parameters [..., T, p] to their stored type. Returns (bytes uint8 [..., T,
    p·size], rounded float32)."""
    e4m3 = param_dtype == "e4m3"
    stored = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn) if e4m3 else to_float16(x)
    return stored.contiguous().view(torch.uint8), stored.float()


def load_param(data: Tensor, param_dtype: str) -> Tensor:
    """Inverse of `store_param`: uint8 [..., T, p·size] → float32 [..., T, p]."""
    if param_dtype == "e4m3" and data.device.type == "cpu":  # seven times faster than the cast
        return E4M3_VALUES.index_select(0, data.int().flatten()).view(data.shape)
    own = data.clone(memory_format=torch.contiguous_format)  # a slice may start at an odd byte
    return own.view(torch.float8_e4m3fn if param_dtype == "e4m3" else torch.float16).float()
