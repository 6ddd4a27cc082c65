"""A uniform int8 or int4 cache that onnxruntime's GroupQueryAttention (domain com.microsoft) reads
and writes itself.

With a static scale s and offset μ of each channel, a key is stored as clamp(round((k − μ) / s)),
−128 … 127 or −8 … 7. The operator knows no offsets: keys and values are shifted before it. A shift
of all keys by μ adds the same to every logit of a query, which softmax doesn't see; values' is
added to the output, since weights sum to 1. int4 codes plus 8 lie two to a byte, the even channel
low.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.exports.onnx.attention import CacheTensor, Call
from kvfold.exports.onnx.graph import INT8, INT32, UINT8, Constants, Graph


@dataclass(frozen=True)
class UniformCodec:
    """Static scales of the keys or values of one layer.

    Attributes:
        bits: 8 or 4.
        scale: float32 [Hkv, D], positive.
        offset: float32 [Hkv, D], or None for zero.
    """

    bits: int
    scale: Tensor
    offset: Tensor | None = None

    def round_trip(self, x: Tensor) -> Tensor:
        """What the operator reads back of float32 [..., Hkv, T, D]."""
        half = 2 ** (self.bits - 1)
        scale = self.scale[:, None].to(x.device)
        offset = (
            torch.zeros_like(scale) if self.offset is None else self.offset[:, None].to(x.device)
        )
        return ((x - offset) / scale).round().clamp(-half, half - 1) * scale + offset


def gqa_tensors(bits: int, num_kv_heads: int, head_dim: int) -> list[CacheTensor]:
    """The cache of one layer: codes of keys and values [B, Hkv, L, D], int4 two to a byte."""
    dims = ("batch", num_kv_heads, "past", head_dim if bits == 8 else head_dim // 2)
    return [CacheTensor(name, INT8 if bits == 8 else UINT8, dims) for name in ("key", "value")]


class GqaAttention:
    """Writes the layers of one graph, each as one GroupQueryAttention.

    Args:
        codecs: (keys, values) of each layer.
    """

    def __init__(self, codecs: list[tuple[UniformCodec, UniformCodec]]) -> None:
        self.codecs = codecs
        self.lengths: tuple[str, str] | None = None

    def write(
        self, constants: Constants, call: Call, tensors: list[str]
    ) -> tuple[Graph, list[str]]:
        """Nodes of one layer; see PackedAttention.write."""
        g = Graph(constants)
        query, key, value, past_key, past_value, *sinks_logit = tensors
        codecs = self.codecs[call.index]
        heads, dim = codecs[0].scale.shape
        shifted = [
            x if codec.offset is None else g.op("Sub", x, g.array(codec.offset.numpy()[:, None]))
            for x, codec in zip((key, value), codecs, strict=True)
        ]
        if self.lengths is None:
            total = g.op("Add", g.size(key, 2), g.size(past_key, 2))
            last = g.op("Expand", g.op("Sub", total, g.ints(1)), g.size(query, 0))
            self.lengths = g.cast(last, INT32), g.cast(g.op("Squeeze", total, g.ints(0)), INT32)
        flat = [
            g.reshape(g.transpose(x, 0, 2, 1, 3), 0, 0, n * dim)
            for x, n in zip((query, *shifted), (call.num_heads, heads, heads), strict=True)
        ]
        scales = [g.array(codec.scale.numpy()[None, :, None]) for codec in codecs]
        options = {"softcap": call.softcap} if call.softcap is not None else {}
        if call.sliding:
            options["local_window_size"] = call.sliding
        out, *present = g.op(
            "GroupQueryAttention",
            *flat, past_key, past_value, *self.lengths, "", "", "", "", sinks_logit[0] if sinks_logit else "", *scales,
            domain="com.microsoft", outputs=3, num_heads=call.num_heads, kv_num_heads=heads, scale=call.scaling,
            k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=codecs[0].bits, **options,
        )  # fmt: skip
        out = g.reshape(out, 0, 0, call.num_heads, dim)
        if codecs[1].offset is not None:
            back = codecs[1].offset.repeat_interleave(call.num_heads // heads, 0)
            if sinks_logit:
                raise AssertionError("with a sink logit the weights of values don't sum to 1")
            out = g.op("Add", out, g.array(back.numpy()))
        return g, [out, *present]
