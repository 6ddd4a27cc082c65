"""Calibration: statistics of queries, keys and values, layer by layer, with interpolated positions.

Positional interpolation (after PM-KVQ, 2505.18610): token t of an L-token sequence stands at
position s·t, so that L tokens cover s·L positions. Only the rotation depends on the position, so a
key that the model rotated to position t is rotated on by (s − 1)·t; the hidden states stay those of
the plain text and no extra forward pass is needed.
"""

import json
from collections.abc import Iterable, Sequence
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
from kvfold.compress.moments import Moments, Part
from kvfold.compress.processes import Processes
from kvfold.compress.progress import progress
from kvfold.compress.work import forget, keep, kept
from kvfold.exports.architectures import (
    Architecture,
    attention_layers_of,
    heads_of,
)

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


def output_metric(modules: Sequence[Any], num_kv_heads: int, head_dim: int) -> Tensor:
    """Mean of W_oᵀ W_o over each group's query heads, of all attention modules that read the same
    values: float64 [Hkv, D, D]."""
    found = []
    for attention in modules:
        heads = (
            getattr(attention, output_name(attention))
            .weight.double()
            .unflatten(1, (-1, head_dim))
            .permute(1, 2, 0)
        )  # [H, D, hidden]
        found.append((heads @ heads.mT).unflatten(0, (num_kv_heads, -1)).mean(1))
    return found[0] if len(found) == 1 else torch.stack(found).mean(0)


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
    Returns:
        One a layer in process 0, which adds up and writes; [] in the others.
    """
    processes = Processes.current()
    share = processes.share([ids.shape[1] for ids in sequences])
    places = attention_layers_of(model.config)
    stats, begin, saved = (
        _finished(work, places, len(sequences)) if processes.first else ([], 0, [])
    )
    done, end = processes.broadcast(begin), places[-1] + 1  # of the model's layers
    if done == end:
        return stats
    config = model.config
    device = next(model.parameters()).device
    heads, reading = heads_of(config), arch.reading_modules(model)
    runners = {i: LayerRunner(model, arch, sequences[i].to(device)) for i in share.own}
    hidden = {i: runner.embedded for i, runner in runners.items()}
    for i in range(len(sequences) if done else 0):
        state = processes.from_first(partial(saved.__getitem__, i))
        if i in hidden:
            hidden[i] = state.to(device)
    saved.clear()
    per_sequence = -(-sample_tokens // len(sequences))
    for place in progress(range(done, end), "calibrate", "layer", done, end):
        if place not in places:
            for i, runner in runners.items():
                hidden[i] = runner.run(place, hidden[i])
            states = list(share.map(lambda i: hidden[i].contiguous().cpu()))
            if processes.first:
                _save_hidden(work, place + 1, states)
            continue
        index = places.index(place)
        attention, (num_kv_heads, head_dim) = reading[index][0], heads[index]
        last = max(ids.shape[1] * step for ids, step in zip(sequences, steps, strict=True))
        sums = Moments(
            place,
            num_kv_heads,
            per_sequence,
            frequencies(model, arch, index, last - 1),
            arch.rope_pairs,
        )
        norms = norm_weights(attention, arch)
        metric = output_metric(reading[index], num_kv_heads, head_dim)

        def tap(
            module,
            query,
            key,
            value,
            mask,
            scaling,
            which,
            found,
            sums=sums,
            index=index,
            norms=norms,
            metric=metric,
            **extras,
        ):
            places = torch.arange(key.shape[2], device=key.device)[None]
            step = steps[which]
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
            weighed = of_keys, of_values
            found.append(sums.part(which, *of_kept, places[0, kept] * step, weighed, scaling))

        def part(i: int, tap=tap, attention=attention, place=place) -> Part:
            found: list[Part] = []
            with tapped(attention, partial(tap, which=i, found=found)):
                hidden[i] = runners[i].run(place, hidden[i])
            return found[0]

        for x in share.map(part):
            sums.add(x)
        center = processes.from_first(sums.center)
        for x in share.map(partial(sums.rest, center)):
            sums.add(x)
        if processes.first:
            stats.append(LayerStats(**sums.finish(metric)))
            stats[-1].save(work / f"stats_{index:03d}.safetensors")
        states = list(share.map(lambda i: hidden[i].contiguous().cpu()))
        if processes.first:
            _save_hidden(work, place + 1, states)
    return stats


def _finished(
    work: Path, places: Sequence[int], sequences: int
) -> tuple[list[LayerStats], int, list[Tensor]]:
    """Statistics of the first layers that an earlier run has left, the model's number of the layer
    to go on with, and each sequence's input of that.

    Args:
        places: numbers of the layers that attend, which statistics are of.
    """
    stats: list[LayerStats] = []
    while len(stats) < len(places) and (
        found := kept(work / f"stats_{len(stats):03d}.safetensors", LayerStats.load)
    ):
        stats.append(found)
    if len(stats) == len(places):
        return stats, places[-1] + 1, []
    done = min(
        places[len(stats)],
        kept(work / "hidden.json", lambda path: int(json.loads(path.read_text())["layer"]), 0),
    )
    saved: dict[str, Tensor] = (
        kept(work / f"hidden_{done:03d}.safetensors", load_file, {}) if done else {}
    )
    names = [str(i) for i in range(sequences)]
    if set(saved) != set(names):
        return [], 0, []
    whole = sum(place < done for place in places)
    return stats[:whole], done, [saved[name] for name in names]


def _save_hidden(work: Path, layer: int, hidden: Iterable[Tensor]) -> None:
    """Keeps the input of `layer` and forgets the one before; hidden.json names the file that is
    complete."""
    tensors = {str(i): h for i, h in enumerate(hidden)}
    keep(work / f"hidden_{layer:03d}.safetensors", lambda scratch: save_file(tensors, scratch))
    keep(work / "hidden.json", lambda scratch: scratch.write_text(json.dumps({"layer": layer})))
    forget(work / f"hidden_{layer - 1:03d}.safetensors")
