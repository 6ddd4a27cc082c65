"""Static scales for the uniform int8 and int4 cache of onnxruntime's GroupQueryAttention, one for
each channel."""

from typing import Any

import torch
from torch import Tensor

from kvfold.compress.models.attention_hook import Tap, tapped
from kvfold.compress.models.layerwise import LayerRunner
from kvfold.compress.models.rope import rotate_on, turns
from kvfold.compress.progress import progress
from kvfold.exports.architectures import Architecture
from kvfold.exports.onnx.gqa import UniformCodec
from kvfold.kernels.attention import attend_plain

FACTORS = 16  # ranges that are tried: all of it, and down to half
LEAST_SCALE = 1e-6  # of a channel that never changes


def fit_codec(x: Tensor, bits: int, centred: bool) -> UniformCodec:
    """The scale and offset of each channel with the least squared error over a sample.

    Args:
        x: float32 [Hkv, N, D].
        bits: 8 or 4.
        centred: put the middle of a channel's range in the middle of the codes; else its offset is
            0.
    """
    levels = 2**bits
    low, high = x.amin(1), x.amax(1)
    if centred:
        middle, reach = (low + high) / 2, (high - low) / 2
    else:
        middle, reach = torch.zeros_like(low), torch.maximum(low.abs(), high.abs())
    best = torch.full_like(low, torch.inf)
    scale, offset = torch.ones_like(low), torch.zeros_like(low)
    for factor in torch.linspace(1, 0.5, FACTORS).tolist():
        step = (2 * factor * reach / (levels - 1 if centred else levels - 2)).clamp_min(LEAST_SCALE)
        shift = middle + step / 2 if centred else middle  # codes reach one further down than up
        tried = UniformCodec(bits, step, shift if centred else None)
        loss = (tried.round_trip(x) - x).square().mean(1)
        better = loss < best
        best = torch.where(better, loss, best)
        scale, offset = torch.where(better, step, scale), torch.where(better, shift, offset)
    return UniformCodec(bits, scale, offset if centred else None)


def calibrate_codecs(
    model: Any, arch: Architecture, sequences: list[Tensor], spread: int, bits: int
) -> list[tuple[UniformCodec, UniformCodec]]:
    """(keys, values) of every layer, from all tokens of calibration text, since the operator keeps
    no token in 16 bits.

    Args:
        model: loaded with attention tap.NAME.
        sequences: int64 [1, T] each.
        spread: distance between the positions of neighbouring tokens: key channels that RoPE turns
            slowly show their range only over a long context (see calibrate.py).
    """
    device = next(model.parameters()).device
    runners = [LayerRunner(model, arch, ids.to(device)) for ids in sequences]
    hidden = [runner.embedded for runner in runners]
    found = []
    for i, attention in enumerate(progress(arch.attention_modules(model), "calibrate", "layer")):
        seen: dict[str, list[Tensor]] = {"key": [], "value": []}
        seen_by: set[str] = set()

        def tap(
            module, query, key, value, mask, scaling, seen=seen, seen_by=seen_by, i=i, **extras
        ):
            places = torch.arange(key.shape[2], device=key.device)[None]
            near, far = (turns(model, arch, i, places * step) for step in (1, spread))
            seen["key"] += [key[0].float(), rotate_on(key, near, far)[0]]
            seen["value"].append(value[0].float())
            seen_by.update(extras)
            return None

        with tapped(attention, tap):
            hidden = [runner.run(i, h) for runner, h in zip(runners, hidden, strict=True)]
        # a soft-cap and a sink logit see the shift of logits that an offset of keys makes; with the
        # latter weights don't sum to 1
        key = fit_codec(torch.cat(seen["key"], 1).cpu(), bits, centred=not seen_by)
        value = fit_codec(
            torch.cat(seen["value"], 1).cpu(), bits, centred="sinks_logit" not in seen_by
        )
        found.append((key, value))
    return found


def codec_tap(codecs: tuple[UniformCodec, UniformCodec]) -> Tap:
    """A tap whose attention reads keys and values back as the operator stores them."""

    def tap(module, query, key, value, mask, scaling, **extras):
        stored_k, stored_v = (
            codec.round_trip(x.float()) for codec, x in zip(codecs, (key, value), strict=True)
        )
        return (
            attend_plain(query.float(), stored_k, stored_v, scaling, mask, **extras)
            .transpose(1, 2)
            .to(query.dtype)
        )

    return tap
