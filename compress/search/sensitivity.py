"""How much each layer's keys or values matter: the KL that quantising them alone costs, measured on
the real model.

One probe quantises one side of one layer through packed bytes, sinks and window (of 128 tokens at
the most) left in 16 bits, and runs the rest of the model as it is. It is cheap because
- a probe starts at its layer from stored hidden states, so that it costs half a forward pass on average;
- one format of each kind of a side is probed, not all (extrapolation.py);
- the layers' losses add up (the artifact states how well), so that choices need no probing together;
- the first tokens, which read no page, are as they were in every layer: behind the probed layer only the others are
  computed, with the first ones' keys and values as they were;
- logits are compared at every `stride`-th position of plain text only, with the baseline's probabilities kept where
  they fit BASE_NBYTES.
With L layers and n probed formats a layer that is n·L/2 forward passes a sequence, less those first
tokens. It runs in float32, because in bfloat16 the rounding of the rest of the model alone is as
large as one layer's KL.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.models.attention_hook import Tap, attend_as_usual, tapped
from kvfold.compress.models.layerwise import LayerRunner
from kvfold.compress.processes import Processes
from kvfold.compress.progress import progress
from kvfold.compress.search.candidates import KeyCandidate, ValueCandidate
from kvfold.compress.search.packed_attention import packed_attention
from kvfold.compress.work import keep, kept
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import (
    Architecture,
    attention_layers_of,
    keeps_states,
    last_norm_of,
    logits_of,
    readers_of,
)
from kvfold.exports.spec import KeySpec, ValueSpec

KL_BLOCK = 128  # positions whose logits are in memory at a time
Candidate = KeyCandidate | ValueCandidate
Job = tuple[str, int, int]  # "key" or "value", layer, candidate
BASE_NBYTES = 1 << 30  # of the baseline's log-probabilities


@dataclass(frozen=True)
class Passage:
    """A sequence that is probed.

    Attributes:
        ids: int64 [1, T].
        stride: every how many positions the KL is taken.
        start: the first of them.
    """

    ids: Tensor
    stride: int = 1
    start: int = 0

    @property
    def positions(self) -> int:
        """How many of its positions count."""
        return len(range(self.start, self.ids.shape[1], self.stride))


class Probe:
    """The unquantised model on passages: hidden states before every layer, and log-probabilities.
    Several processes share the passages, and call the methods together; what `runners`, `hidden`,
    `past`, `final` and `base` hold is by the numbers of the passages that this one has.

    Args:
        model: loaded with attention tap.NAME.
        arch: its row in the table.
        passages: the mean is over the positions of all of them.
        early: first positions that no tap of `measure` changes anything for. Where layers keep a
            state, all positions are run all the same: the others begin with what the first ones
            leave there.

    Attributes:
        num_layers: of the model.
        places: numbers of the layers that attend with keys and values of their own; `attentions`,
            `past` and taps go by these.
        sources: number of each later layer that reads one's keys and values → which one's.
        whole: of each passage, keys and values [1, Hkv, T, D] of those that are read so.
        hidden: of each passage, states [1, T, hidden_size] before every layer of the model.
    """

    def __init__(
        self, model: Any, arch: Architecture, passages: Sequence[Passage], early: int = 0
    ) -> None:
        self.model, self.passages = model, passages
        self.reading = arch.reading_modules(model)
        self.attentions = [modules[0] for modules in self.reading]
        self.places = attention_layers_of(model.config)
        readers = readers_of(model.config)
        self.sources = {
            place: self.places.index(i) for i, others in readers.items() for place in others
        }
        self.num_layers = len(arch.decoder_layers(model))
        self.device = next(model.parameters()).device
        early = 0 if keeps_states(model.config) else early
        self.early = [min(early, x.ids.shape[1] - 1) for x in passages]
        self.positions = sum(x.positions for x in passages)
        self.processes = Processes.current()
        costs = [x.ids.shape[1] - first for x, first in zip(passages, self.early, strict=True)]
        self.share = self.processes.share(costs)
        self.runners = {
            i: LayerRunner(model, arch, passages[i].ids.to(self.device)) for i in self.share.own
        }
        self.hidden: dict[int, list[Tensor]] = {}
        self.final: dict[int, Tensor] = {}
        # keys and values [1, Hkv, early, D] of each layer
        self.past: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.whole: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        shared = set(self.sources.values())
        for index in progress(self.share.own, "baseline", "sequence"):
            runner = self.runners[index]
            states, past = [runner.embedded], list[tuple[Tensor, Tensor]]()
            self.whole[index] = {}
            attentions = dict(zip(self.places, self.attentions, strict=True))
            for i in range(self.num_layers):
                with ExitStack() as stack:
                    if i in attentions:
                        layer = len(past)
                        kept = self.whole[index] if layer in shared else None
                        tap = _keep(past, self.early[index], layer, kept)
                        stack.enter_context(tapped(attentions[i], tap))
                    states.append(runner.run(i, states[-1]))
            self.hidden[index] = states[:-1]
            self.past[index] = past
            self.final[index] = self.normed(index, states[-1])
        (vocabulary,) = set(self.share.all(lambda i: logits_of(model, self.final[i][:1]).shape[-1]))
        # of all processes' passages: a product of more rows may differ in its last bits
        small = self.positions * vocabulary * 4 <= BASE_NBYTES
        own = self.final.items()
        self.base = {i: logits_of(model, x).log_softmax(-1) for i, x in own} if small else None

    def normed(self, index: int, hidden: Tensor, first: int = 0) -> Tensor:
        """[n, hidden_size] at the positions of a passage that count, of its last layer's states [1,
        T − first, hidden_size]."""
        passage = self.passages[index]
        skipped = max(0, -(-(first - passage.start) // passage.stride))
        kept = hidden[0, passage.start + skipped * passage.stride - first :: passage.stride]
        return last_norm_of(self.model)(kept)

    def _kl(self, index: int, other: Tensor) -> list[float]:
        """Σ KL(baseline ‖ probe) in nats of each KL_BLOCK of the positions that count in a passage.

        Args:
            other: normed hidden states [n, hidden_size], of the last n of them where they are
                fewer: the others are taken to be the baseline's.
        """
        base, found = self.final[index], []
        first = len(base) - len(other)
        for block in range(0, len(other), KL_BLOCK):
            q = logits_of(self.model, other[block : block + KL_BLOCK]).log_softmax(-1)
            rows = slice(first + block, first + block + len(q))
            p = (
                logits_of(self.model, base[rows]).log_softmax(-1)
                if self.base is None
                else self.base[index][rows]
            )
            found.append(float((p.exp() * (p - q)).sum()))
        return found

    def _mean_kl(self, final: Callable[[int], Tensor], count: int | None = None) -> float:
        """Mean KL(baseline ‖ probe) in nats over the positions that count of the first `count`
        passages, or of all.

        Args:
            final: `other` of `_kl`, from the number of a passage that this process has.
        """
        chosen = range(len(self.passages))[:count]
        blocks = list(self.share.map(lambda i: self._kl(i, final(i)) if i in chosen else []))
        positions = sum(self.passages[i].positions for i in chosen)

        def mean() -> float:
            total = 0.0
            for loss in itertools.chain.from_iterable(blocks):
                total += loss  # `sum` rounds otherwise, depending on Python's version
            check_finite_loss(total)
            return max(total / positions, 0.0)

        return self.processes.from_first(mean)

    def measure(self, layer: int, tap: Tap) -> float:
        """KL with the attention of one of the layers that attend replaced by `tap`, which leaves
        the `early` positions as they are."""
        place = self.places[layer]

        def final(i: int) -> Tensor:
            runner, first = self.runners[i], self.early[i]
            with ExitStack() as stack:
                for attention in self.reading[layer]:
                    stack.enter_context(tapped(attention, tap))
                state = runner.run(place, self.hidden[i][place])[:, first:]
                for modules, (keys, values) in zip(
                    self.reading[layer + 1 :], self.past[i][layer + 1 :], strict=True
                ):
                    for attention in modules if first else ():
                        stack.enter_context(tapped(attention, _behind(keys, values)))
                for other, (keys, values) in self.whole[i].items():
                    for attention in self.reading[other][1:] if other < layer else ():
                        stack.enter_context(tapped(attention, instead(keys, values)))
                state = runner.run_from(place + 1, state, first)
            return self.normed(i, state, first)

        return self._mean_kl(final)

    def whole_model(self, taps: list[Tap] | None = None, count: int | None = None) -> float:
        """KL of the model as its weights are now, with every layer tapped if `taps` are given,
        against the baseline, on the first `count` passages or on all."""
        with ExitStack() as stack:
            for modules, tap in zip(self.reading, taps or [], strict=False):
                for attention in modules:
                    stack.enter_context(tapped(attention, tap))
            return self._mean_kl(self._whole, count)

    def _whole(self, index: int) -> Tensor:
        runner = self.runners[index]
        return self.normed(index, runner.run_from(0, runner.embedded))


def check_finite_loss(loss: float) -> None:
    """Raises KvfoldError for a loss that is no number."""
    if not math.isfinite(loss):
        raise KvfoldError(
            "The model's logits are NaN or infinite on the calibration text, so no loss can be measured; check that "
            "its weights are whole, or compute in float32 (--device cpu)."
        )


def _keep(
    past: list[tuple[Tensor, Tensor]],
    early: int,
    layer: int,
    whole: dict[int, tuple[Tensor, Tensor]] | None,
) -> Tap:
    """A tap that changes nothing and notes the first keys and values, and in `whole` all of them."""

    def tap(module, query, key, value, mask, scaling, **extras):
        if whole is not None:
            whole[layer] = key, value
        past.append((key[:, :, :early].clone(), value[:, :, :early].clone()))

    return tap


def put_behind(
    keys: Tensor, values: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the last n of a sequence's T positions attend to.

    Args:
        keys, values: [1, Hkv, T - n, D], of the first positions.
        key, value: [1, Hkv, n, D].
        mask: bool [1, 1, n, T] where attention is narrower than causal, else None.
    Returns:
        (keys, values, mask): [1, Hkv, T, D] twice, and bool [1, 1, n, T].
    """
    first, tokens = keys.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(tokens, first + tokens, dtype=torch.bool, device=key.device).tril(first)[
            None, None
        ]
    return torch.cat((keys, key), 2), torch.cat((values, value), 2), mask


def _behind(keys: Tensor, values: Tensor) -> Tap:
    """A tap for the last positions of a sequence, whose first ones have these keys and values."""

    def tap(module, query, key, value, mask, scaling, **extras):
        key, value, mask = put_behind(keys, values, key, value, mask)
        return attend_as_usual(module, query, key, value, mask, scaling, extras=extras)

    return tap


def instead(keys: Tensor, values: Tensor) -> Tap:
    """A tap for the last positions of a sequence that attend to these keys and values [1, Hkv, T,
    D] of all of it, whatever they are given."""

    def tap(module, query, key, value, mask, scaling, **extras):
        mask = last_rows(mask, query, keys)
        return attend_as_usual(module, query, keys, values, mask, scaling, extras=extras)

    return tap


def last_rows(mask: Tensor | None, query: Tensor, keys: Tensor) -> Tensor | None:
    """The mask of queries [1, H, n, D] that are the last of the T positions of `keys`: bool [1, 1, n,
    T], or None for all T of them and causal."""
    n, tokens = query.shape[2], keys.shape[2]
    if mask is not None or n == tokens:
        return mask
    return torch.ones(n, tokens, dtype=torch.bool, device=keys.device).tril(tokens - n)[None, None]


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
        out = packed_attention(
            query[0], key[0], value[0], geometry, scaling, mask=narrow, **options, **extras
        )
        return out.transpose(0, 1)[None].to(query.dtype)

    return tap


def read_losses(path: Path) -> dict[str, float]:
    """What `keep_losses` wrote.

    Raises:
        OSError, ValueError: it isn't that.
    """
    found = json.loads(path.read_text())
    numbers = found.values() if isinstance(found, dict) else [found]
    if not all(isinstance(loss, float) and math.isfinite(loss) for loss in numbers):
        raise ValueError("losses are numbers by name")
    return found


def keep_losses(path: Path, found: dict[str, float]) -> None:
    """Writes losses in nats by name, for a run that goes on; the file appears complete."""
    keep(path, lambda scratch: scratch.write_text(json.dumps(found)))


def measured(
    probe: Probe,
    jobs: Sequence[Job],
    keys: list[list[KeyCandidate]],
    values: list[list[ValueCandidate]],
    geometry: Geometry,
    work: Path,
) -> dict[Job, float]:
    """KL in nats of each of the `jobs`, by a forward pass each.

    Args:
        keys, values: candidates of each layer.
        work: folder for sensitivity.json, from which an interrupted run goes on.
    """
    path, processes = work / "sensitivity.json", Processes.current()
    found = processes.from_first(lambda: kept(path, read_losses, {}))
    for side, layer, c in progress(jobs, "sensitivity", "probe"):
        name = f"{layer}.{side}.{c}"
        if name in found:
            continue
        found[name] = probe.measure(
            layer, packing_tap(geometry, probe.device, **specs_of(side, keys, values, layer, c))
        )
        if processes.first:
            keep_losses(path, found)
    return {(side, layer, c): found[f"{layer}.{side}.{c}"] for side, layer, c in jobs}


def specs_of(
    side: str,
    keys: list[list[KeyCandidate]],
    values: list[list[ValueCandidate]],
    layer: int,
    candidate: int,
) -> dict[str, Any]:
    """One candidate as arguments of `packing_tap` and `packed_attention`."""
    if side == "key":
        return {"key_spec": keys[layer][candidate].spec}
    chosen = values[layer][candidate]
    return {"value_spec": chosen.spec, "value_matrix": chosen.matrix}
