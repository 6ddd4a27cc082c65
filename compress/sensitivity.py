"""How much each layer's keys or values matter: the KL that quantising them alone costs, measured on the real model.

One probe quantises one side of one layer through packed bytes, sinks and window left in 16 bits, and runs the rest of the
model as it is. For L layers that is 2·L probes of half a forward pass each on average: a probe starts at its layer from
stored hidden states. The KL of a format that was not probed is the probed KL times the ratio of the two measured
distortions, since KL is quadratic in a small error.
"""

import json
import os
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.candidates import KeyCandidate, ValueCandidate
from kvfold.compress.layerwise import LayerRunner
from kvfold.compress.progress import progress
from kvfold.compress.tap import Tap, tapped
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import Architecture, logits_of
from kvfold.exports.spec import KeySpec, ValueSpec
from kvfold.kernels.attention import Tile, attend
from kvfold.kernels.quantizer import round_trip, to_float16

KL_BLOCK = 128  # positions whose logits are in memory at a time
TILE_TOKENS = 512  # of a sequence; a tile that no query of a block may read from its side is left out


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
    """Causal attention of one whole sequence as the packed cache computes it, with either side left as it is.

    Args:
        query: [H, T, D]; key, value: [Hkv, T, D]; after RoPE.
        value_matrix: float [Hkv, D, D], the basis that values are quantised in; it is undone on the output.
        mask: bool [T, T] where attention is narrower than causal, e.g. a sliding window.
        softcap, sinks_logit: as in kernels.attention.attend.
    Returns:
        float32 [H, T, D].
    """
    tokens = key.shape[1]
    positions = torch.arange(tokens, device=query.device)
    seen = (positions + 1 - geometry.sinks - geometry.window).clamp_min(0)
    limit = geometry.sinks + seen // geometry.page_tokens * geometry.page_tokens
    raw_k, raw_v = key.float(), value.float()
    shift = key_spec.shift(query) if key_spec is not None and (softcap is not None or sinks_logit is not None) else None
    if key_spec is not None:
        raw_k, query = to_float16(key_spec.apply(raw_k)).float(), key_spec.apply_query(query)
    if value_matrix is not None:
        raw_v = raw_v @ value_matrix.float().mT
    cached_k, cached_v = raw_k, raw_v
    if key_spec is not None:
        cached_k = round_trip(raw_k, key_spec.format, None if key_spec.clip is None else key_spec.clip[:, None, None])
    if value_spec is not None:
        clip = None if value_spec.clip is None else value_spec.clip[:, None, None]
        cached_v = round_trip(to_float16(raw_v), value_spec.format, clip)
    sinks, end = min(geometry.sinks, tokens), int(limit[-1])
    raw_cuts = [0, *range(sinks, tokens, TILE_TOKENS), tokens]
    tiles = [Tile(raw_k[:, a:b], raw_v[:, a:b], positions[a:b], False) for a, b in pairwise(raw_cuts)]
    packed_cuts = [*range(sinks, end, TILE_TOKENS), end]
    tiles += [Tile(cached_k[:, a:b], cached_v[:, a:b], positions[a:b], True) for a, b in pairwise(packed_cuts)]
    out = attend(
        query, positions, limit, tiles,
        sinks=geometry.sinks, scaling=scaling, mask=mask, softcap=softcap, sinks_logit=sinks_logit, shift=shift,
    )  # fmt: skip
    if value_matrix is not None:
        inverse = torch.linalg.inv(value_matrix.double()).float()
        out = (out.unflatten(0, (inverse.shape[0], -1)) @ inverse.mT[:, None]).flatten(0, 1)
    return out


class Probe:
    """The unquantised model on the probe sequences: hidden states before every layer, and log-probabilities.

    Args:
        model: loaded with attention tap.NAME.
        arch: its row in the table.
        sequences: int64 [1, T] each.
        stride: every how many positions the KL is taken.
    """

    def __init__(self, model: Any, arch: Architecture, sequences: list[Tensor], stride: int) -> None:
        self.model, self.stride = model, stride
        self.attentions = arch.attention_modules(model)
        self.device = next(model.parameters()).device
        self.runners = [LayerRunner(model, arch, ids.to(self.device)) for ids in sequences]
        self.hidden: list[list[Tensor]] = []
        self.final: list[Tensor] = []
        for runner in progress(self.runners, "baseline", "sequence"):
            states = [runner.embedded]
            for i in range(len(self.attentions)):
                states.append(runner.run(i, states[-1]))
            self.hidden.append(states[:-1])
            self.final.append(self._normed(states[-1]))

    def _normed(self, hidden: Tensor) -> Tensor:
        return self.model.base_model.norm(hidden[0, :: self.stride])

    def kl(self, finals: list[Tensor]) -> float:
        """Mean KL(baseline ‖ probe) in nats over the strided positions; `finals`: normed hidden states [n, hidden_size]."""
        total, count = 0.0, 0
        for base, other in zip(self.final, finals, strict=True):
            for block in range(0, len(base), KL_BLOCK):
                rows = slice(block, block + KL_BLOCK)
                p = logits_of(self.model, base[rows]).log_softmax(-1)
                q = logits_of(self.model, other[rows]).log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
                count += len(p)
        return max(total / count, 0.0)

    def measure(self, layer: int, tap: Tap) -> float:
        """KL with one layer's attention replaced by `tap`."""
        finals = []
        for runner, hidden in zip(self.runners, self.hidden, strict=True):
            with tapped(self.attentions[layer], tap):
                state = runner.run(layer, hidden[layer])
            finals.append(self._normed(runner.run_from(layer + 1, state)))
        return self.kl(finals)

    def whole_model(self, taps: list[Tap] | None = None) -> float:
        """KL of the model as its weights are now, with every layer tapped if `taps` are given, against the baseline."""
        with ExitStack() as stack:
            for attention, tap in zip(self.attentions, taps or [], strict=False):
                stack.enter_context(tapped(attention, tap))
            return self._whole_model()

    def _whole_model(self) -> float:
        return self.kl([self._normed(runner.run_from(0, runner.embedded)) for runner in self.runners])


def packing_tap(
    geometry: Geometry,
    device: torch.device,
    key_spec: KeySpec | None = None,
    value_spec: ValueSpec | None = None,
    value_matrix: Tensor | None = None,
) -> Tap:
    """A tap that computes `packed_attention` of either side or both."""
    options: dict[str, Any] = {
        "key_spec": key_spec and key_spec.to(device),
        "value_spec": value_spec and value_spec.to(device),
        "value_matrix": None if value_matrix is None else value_matrix.to(device),
    }

    def tap(module, query, key, value, mask, scaling, **extras):
        narrow = None if mask is None else mask[0, 0]
        out = packed_attention(query[0], key[0], value[0], geometry, scaling, mask=narrow, **options, **extras)
        return out.transpose(0, 1)[None].to(query.dtype)

    return tap


def sensitivities(
    probe: Probe,
    keys: list[KeyCandidate],
    values: list[ValueCandidate],
    matrices: list[Tensor],
    geometry: Geometry,
    work: Path,
) -> tuple[list[float], list[float]]:
    """KL of quantising each layer's keys alone and values alone.

    Args:
        keys, values: the candidate to probe in each layer.
        matrices: float64 [Hkv, D, D], the fused value basis of each layer.
        work: folder for sensitivity.json, from which an interrupted run goes on.
    Returns:
        (KL of keys, KL of values) by layer, in nats.
    """
    path = work / "sensitivity.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    jobs = [(side, layer) for layer in range(len(keys)) for side in ("key", "value")]
    for side, layer in progress(jobs, "sensitivity", "probe"):
        name = f"{layer}.{side}"
        if name in found:
            continue
        if side == "key":
            tap = packing_tap(geometry, probe.device, key_spec=keys[layer].spec)
        else:
            tap = packing_tap(geometry, probe.device, value_spec=values[layer].spec, value_matrix=matrices[layer])
        found[name] = probe.measure(layer, tap)
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(found))
        os.replace(scratch, path)
    return [found[f"{i}.key"] for i in range(len(keys))], [found[f"{i}.value"] for i in range(len(keys))]
