"""Calibration: statistics of queries, keys and values, layer by layer, with interpolated positions.

Positional interpolation (after PM-KVQ, 2505.18610): token t of an L-token sequence stands at
position s·t, so that L tokens cover s·L positions. Only the rotation depends on the position, so a
key that the model rotated to position t is rotated on by (s − 1)·t; the hidden states stay those of
the plain text and no extra forward pass is needed.
"""

import json
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfold.compress.attended import attended
from kvfold.compress.fuse import output_name
from kvfold.compress.models.attention_hook import tapped
from kvfold.compress.models.layerwise import LayerRunner
from kvfold.compress.models.rope import frequencies, norm_weights, rotate_on, turns
from kvfold.compress.progress import progress
from kvfold.compress.work import forget, keep, kept
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import (
    Architecture,
    attention_layers_of,
    head_dim_of,
    num_kv_heads_of,
)
from kvfold.kernels.key_mean import STEP, RopePairs, turn_tables

ATTENDED = {f"attended_{name}": "key" for name in ("keys", "mean", "rest", "turned")}
ATTENDED |= {"attended_values": "value"}  # whose weights it is taken with
LEAST_WEIGHT = 0.05  # of any token, in the mean of its sequence's
SKIP_TOKENS = 8  # first tokens of each sequence: the sinks stay in 16 bits and are outliers


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one layer over all calibration tokens, per KV head; keys and queries after RoPE
    at spread positions.

    Attributes:
        key_mean: float64 [Hkv, D].
        key_cov: float64 [Hkv, D, D], centred.
        query_moment: float64 [Hkv, D, D], E[q qᵀ] over tokens and the group's query heads.
        value_mean, value_cov: like the keys'.
        output_metric: float64 [Hkv, D, D], mean of W_oᵀ W_o over the group's query heads: ‖W_o Δv‖²
            = Δvᵀ G Δv.
        key_range, value_range: float64 [Hkv, 2, D], minimum and maximum of each channel.
        key_sample, value_sample: float32 [Hkv, S, D], tokens drawn evenly from each sequence, one
            sequence after another.
        query_sample: float32 [H, S, D], queries of the same tokens.
        sample_lengths: int64 [number of sequences], tokens drawn from each; they sum to S.
        scaling: float64 [], factor on the logits.
        frequencies: float32 [n/2], ω of the layer's RoPE; of no elements where keys don't turn.
        center: float64 [Hkv, D], mean of keys before RoPE, or the part of it that is taken off.
        rest_moment: float64 [Hkv, D, D], E[r rᵀ] of r = k − m_t, m_t the rotating mean
            (kernels/key_mean.py).
        rest_sample: float32 [Hkv, S, D], r of the tokens of key_sample.
        attended_keys, attended_mean, attended_rest, attended_turned, attended_values: second moments
            E[k kᵀ], E[r rᵀ], E[m_t m_tᵀ] and E[v vᵀ], float64 [Hkv, D, D], and E[k], float64
            [Hkv, D], in which each token counts as much as later queries attend to it
            (attended.py).
    """

    key_mean: Tensor
    key_cov: Tensor
    query_moment: Tensor
    value_mean: Tensor
    value_cov: Tensor
    output_metric: Tensor
    key_range: Tensor
    value_range: Tensor
    key_sample: Tensor
    value_sample: Tensor
    query_sample: Tensor
    sample_lengths: Tensor
    scaling: Tensor
    frequencies: Tensor
    center: Tensor
    rest_moment: Tensor
    rest_sample: Tensor
    attended_keys: Tensor
    attended_mean: Tensor
    attended_rest: Tensor
    attended_turned: Tensor
    attended_values: Tensor

    def save(self, path: Path) -> None:
        """Writes all fields; the file appears complete."""
        found = {f.name: getattr(self, f.name).contiguous().cpu() for f in fields(self)}
        keep(path, lambda scratch: save_file(found, scratch))

    @classmethod
    def load(cls, path: Path) -> "LayerStats":
        return cls(**load_file(path))

    def with_mean(self, factors: Tensor) -> "LayerStats":
        """Where that part of the rotating mean is taken off, f·m_t.

        What stays is r + (1 − f)·m_t. Its second moment is Σ_r + (1 − f)²·E[m_t m_tᵀ], since r
        before RoPE has no mean, and E[m_t m_tᵀ] is E[k kᵀ] − Σ_r for the same reason. Of attended
        tokens r may have one, and E[r m_tᵀ] + E[m_t rᵀ] is what E[k kᵀ] has more than both.

        Args:
            factors: float64 [Hkv], f of each head, of statistics with all of it taken off.
        """
        stays = (1 - factors)[:, None, None]
        keys = self.key_cov + self.key_mean[:, :, None] * self.key_mean[:, None, :]
        rest, turned = self.attended_rest, self.attended_turned
        return replace(
            self,
            center=self.center * factors[:, None],
            rest_moment=self.rest_moment + stays**2 * (keys - self.rest_moment),
            rest_sample=self.rest_sample + stays.float() * (self.key_sample - self.rest_sample),
            attended_rest=rest + stays * (self.attended_keys - rest - turned) + stays**2 * turned,
            attended_turned=factors[:, None, None] ** 2 * turned,
        )


def _with_floor(weights: Tensor) -> Tensor:
    """Weights [Hkv, T] with a part that is the same for all tokens, and all alike where there are none."""
    mean = weights.mean(1, keepdim=True)
    return torch.where(mean > 0, weights + LEAST_WEIGHT * mean, 1.0)


class _Accumulator:
    """Sums over sequences of one layer; its keys stay until their mean is known."""

    def __init__(
        self,
        layer: int,
        num_kv_heads: int,
        sample_tokens: int,
        omega: Tensor | None,
        pairs: RopePairs = "halves",
    ) -> None:
        self.layer, self.num_kv_heads, self.sample_tokens, self.omega = (
            layer,
            num_kv_heads,
            sample_tokens,
            omega,
        )
        self.pairs = pairs
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self.ranges: dict[str, Tensor] = {}
        self.samples: dict[str, list[Tensor]] = {"query": [], "key": [], "value": [], "rest": []}
        self.keys: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.scaling = 1.0

    def _add(self, name: str, amount: Tensor) -> None:
        self.sums[name] = self.sums[name] + amount if name in self.sums else amount

    def add(
        self,
        query: Tensor,
        key: Tensor,
        unturned: Tensor,
        value: Tensor,
        places: Tensor,
        weights: tuple[Tensor, Tensor],
        scaling: float,
    ) -> None:
        """Of one sequence: query [H, T, D], key and value [Hkv, T, D]; key and query stand at int64
        positions `places` [T].

        unturned: the keys before RoPE.
        weights: of keys and of values, float64 [Hkv, T] each.
        """
        q, k, v = query.double(), key.double(), value.double()
        grouped = q.unflatten(0, (self.num_kv_heads, -1)).flatten(1, 2)
        self._add("query_moment", grouped.mT @ grouped / (q.shape[0] // self.num_kv_heads))
        for name, x in (("key", k), ("value", v)):
            self._add(f"{name}_sum", x.sum(1))
            self._add(f"{name}_moment", x.mT @ x)
            low, high = x.amin(1), x.amax(1)
            if name in self.ranges:
                low, high = (
                    torch.minimum(low, self.ranges[name][:, 0]),
                    torch.maximum(high, self.ranges[name][:, 1]),
                )
            self.ranges[name] = torch.stack((low, high), 1)
        self._add("center_sum", unturned.double().sum(1))
        of_keys, of_values = (_with_floor(x) for x in weights)
        self._add("key_weight", of_keys.sum(1))
        self._add("value_weight", of_values.sum(1))
        self._add("attended_mean", (of_keys[..., None] * k).sum(1))
        self._add("attended_keys", (of_keys[..., None] * k).mT @ k)
        self._add("attended_values", (of_values[..., None] * v).mT @ v)
        drawn = (
            torch.linspace(0, k.shape[1] - 1, min(self.sample_tokens, k.shape[1]), device=k.device)
            .round()
            .long()
        )
        for name, x in (("query", query), ("key", key), ("value", value)):
            self.samples[name].append(x[:, drawn].float())
        self.keys.append((key.float(), places, drawn, of_keys))
        self.count += k.shape[1]
        self.scaling = scaling

    def _take_off(self, center: Tensor) -> None:
        """Sums over the keys without their rotating mean.

        Positions are `step` apart, which may be a multiple of what the slow pairs' turn is held
        for: places within such a run are taken from the token's number instead, so that all of them
        occur.
        """
        for key, places, drawn, weights in self.keys:
            turned = torch.zeros_like(key)
            if self.omega is not None:
                tables = turn_tables(
                    tuple(self.omega.tolist()), key.shape[-1], 0, key.device, self.pairs
                )
                turned = tables.mean_at(
                    center.float(), places, torch.arange(len(places), device=key.device) % STEP
                )
            rest = (key - turned).double()
            self._add("rest_moment", rest.mT @ rest)
            for name, x in (("rest", rest), ("turned", turned.double())):
                self._add(f"attended_{name}", (weights[..., None] * x).mT @ x)
            self.samples["rest"].append(rest[:, drawn].float())
        self.keys.clear()

    def finish(self, output_metric: Tensor) -> LayerStats:
        found: dict[str, Tensor] = {"output_metric": output_metric}
        for name in ("key", "value"):
            mean = self.sums[f"{name}_sum"] / self.count
            found[f"{name}_mean"] = mean
            found[f"{name}_cov"] = (
                self.sums[f"{name}_moment"] / self.count - mean[:, :, None] * mean[:, None, :]
            )
            found[f"{name}_range"] = self.ranges[name]
        found["frequencies"] = torch.empty(0) if self.omega is None else self.omega
        found["center"] = self.sums["center_sum"] / self.count
        self._take_off(found["center"])
        for name, parts in self.samples.items():
            found[f"{name}_sample"] = torch.cat(parts, 1)
        for name in ("query_moment", "rest_moment"):
            found[name] = self.sums[name] / self.count
        for name, side in ATTENDED.items():
            weight = self.sums[f"{side}_weight"]
            found[name] = self.sums[name] / weight.view(-1, *[1] * (self.sums[name].ndim - 1))
        found["sample_lengths"] = torch.tensor([x.shape[1] for x in self.samples["key"]])
        found["scaling"] = torch.tensor(self.scaling, dtype=torch.float64)
        for name, tensor in found.items():
            if not bool(torch.isfinite(tensor).all()):
                raise KvfoldError(
                    f"Layer {self.layer} gives NaN or infinity ({name}) on the calibration text, so nothing can be "
                    "fitted to it; check that the model's weights are whole, or calibrate in float32 (--device cpu)."
                )
        return LayerStats(**{name: tensor.cpu() for name, tensor in found.items()})


def output_metric(attention: Any, num_kv_heads: int, head_dim: int) -> Tensor:
    """Mean of W_oᵀ W_o over each group's query heads, float64 [Hkv, D, D]."""
    heads = (
        getattr(attention, output_name(attention))
        .weight.double()
        .unflatten(1, (-1, head_dim))
        .permute(1, 2, 0)
    )  # [H, D, hidden]
    return (heads @ heads.mT).unflatten(0, (num_kv_heads, -1)).mean(1)


def calibrate(
    model: Any,
    arch: Architecture,
    sequences: list[Tensor],
    steps: list[int],
    sample_tokens: int,
    work: Path,
) -> list[LayerStats]:
    """Statistics of every layer that attends; what `work` already holds is not computed again.

    Args:
        model: loaded with attention tap.NAME.
        sequences: int64 [1, T] each.
        steps: s of each sequence, the step between interpolated positions.
        sample_tokens: tokens drawn from all sequences together, per head.
        work: folder for stats_*.safetensors and the hidden states that the next layer starts from.
    """
    layers = arch.decoder_layers(model)
    places = attention_layers_of(model.config)
    stats: list[LayerStats] = []
    while len(stats) < len(places) and (
        found := kept(work / f"stats_{len(stats):03d}.safetensors", LayerStats.load)
    ):
        stats.append(found)
    if len(stats) == len(places):
        return stats
    done = min(
        places[len(stats)],
        kept(work / "hidden.json", lambda path: int(json.loads(path.read_text())["layer"]), 0),
    )
    saved: dict[str, Tensor] = (
        kept(work / f"hidden_{done:03d}.safetensors", load_file, {}) if done else {}
    )
    if set(saved) != {str(i) for i in range(len(sequences))}:
        done = 0
    del stats[sum(place < done for place in places) :]
    config = model.config
    device = next(model.parameters()).device
    num_kv_heads, head_dim = num_kv_heads_of(config), head_dim_of(config)
    runners = [LayerRunner(model, arch, ids.to(device)) for ids in sequences]
    if done == 0:
        hidden = [runner.embedded for runner in runners]
    else:
        hidden = [saved[str(i)].to(device) for i in range(len(sequences))]
    per_sequence = -(-sample_tokens // len(sequences))
    end = places[-1] + 1
    for place in progress(range(done, end), "calibrate", "layer", done, end):
        if place not in places:
            hidden = [runner.run(place, h) for runner, h in zip(runners, hidden, strict=True)]
            _save_hidden(work, place + 1, hidden)
            continue
        index = places.index(place)
        attention = layers[place].get_submodule(arch.attention)
        last = max(
            runner.embedded.shape[1] * step for runner, step in zip(runners, steps, strict=True)
        )
        sums = _Accumulator(
            place,
            num_kv_heads,
            per_sequence,
            frequencies(model, arch, index, last - 1),
            arch.rope_pairs,
        )
        norms = norm_weights(attention, arch)
        metric = output_metric(attention, num_kv_heads, head_dim)

        def tap(
            module,
            query,
            key,
            value,
            mask,
            scaling,
            step,
            sums=sums,
            index=index,
            norms=norms,
            metric=metric,
            **extras,
        ):
            places = torch.arange(key.shape[2], device=key.device)[None]
            near, far = (turns(model, arch, index, places * s) for s in (1, step))
            still = None if near is None else torch.ones_like(near)
            spread_q, spread_k = (
                rotate_on(x, near, far, arch.rope_pairs, w)
                for x, w in zip((query, key), norms, strict=True)
            )
            kept = slice(min(SKIP_TOKENS, key.shape[2] // 2), None)
            unturned = rotate_on(key, near, still, arch.rope_pairs)[0, :, kept]
            of_kept = (
                spread_q[0, :, kept],
                spread_k[0, :, kept],
                unturned,
                value[0, :, kept].float(),
            )
            weights = attended(
                query[0], key[0], value[0], metric, scaling,
                None if mask is None else mask[0, 0], **extras,
            )  # fmt: skip
            of_keys, of_values = (x[:, kept] for x in weights)
            sums.add(*of_kept, places[0, kept] * step, (of_keys, of_values), scaling)
            return None

        after = []
        for runner, h, step in zip(runners, hidden, steps, strict=True):
            with tapped(attention, partial(tap, step=step)):
                after.append(runner.run(place, h))
        hidden = after
        stats.append(sums.finish(metric))
        stats[-1].save(work / f"stats_{index:03d}.safetensors")
        _save_hidden(work, place + 1, hidden)
    return stats


def _save_hidden(work: Path, layer: int, hidden: list[Tensor]) -> None:
    """Keeps the input of `layer` and forgets the one before; hidden.json names the file that is
    complete."""
    tensors = {str(i): h.contiguous().cpu() for i, h in enumerate(hidden)}
    keep(work / f"hidden_{layer:03d}.safetensors", lambda scratch: save_file(tensors, scratch))
    keep(work / "hidden.json", lambda scratch: scratch.write_text(json.dumps({"layer": layer})))
    forget(work / f"hidden_{layer - 1:03d}.safetensors")
