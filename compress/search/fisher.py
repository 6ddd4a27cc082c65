"""How much each layer's keys or values matter, to second order: no forward pass for each candidate.

A change Δo of a layer's attention output changes the logits by J·Δo to first order, and the KL of
the next token by

    KL ≈ ½ · Δoᵀ·F·Δo,  F = Σ_s J_sᵀ (diag(p_s) − p_s·p_sᵀ) J_s,

F being the Fisher information of the output at o, p_s the probabilities at position s. F is never
formed: with ξ of random signs, u_s = √p_s ∘ ξ − p_s·(√p_sᵀξ) has the covariance diag(p_s) −
p_s·p_sᵀ, so that G = Σ_s J_sᵀ·u_s, one backward pass for all layers and positions, has E[(G·Δo)²] =
Δoᵀ·F·Δo. The errors of the KV heads of a layer are rounding errors of different numbers, which add
up in squares: E[(G·Δo)²] is the sum over KV heads of E[(G_h·Δo_h)²], and that estimate is as many
times less noisy. Positions far from each other add up in squares too, nearly: signs at different
positions are independent, and a position's logits are mostly changed by errors of its own and of
near ones. So the product is squared over SPAN positions at a time. The sum is some 3 % less
then, alike for all that is compared, and a layer's loss from four directions is less noisy than
it was from sixteen (benchmarks/LOG.md).

Δo of a candidate takes that layer's attention alone, through packed bytes (packed_attention.py).
Where later layers read a layer's keys and values too, their gradients by those add up and go back
through it; the losses of such a layer itself are measured by forward passes (search/__init__.py).

Layers are run again one at a time from stored hidden states, all passages through one before the
next, so that one layer's activations are in memory, and what it does is known when its candidates
are made; and only positions that read pages are run at all.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.models.attention_hook import attend_as_usual, tapped
from kvfold.compress.search.candidates import KeyCandidate, ValueCandidate
from kvfold.compress.search.first_order import attend_whole
from kvfold.compress.search.packed_attention import packed_attention
from kvfold.compress.search.sensitivity import (
    KL_BLOCK,
    Job,
    Probe,
    check_finite_loss,
    keep_losses,
    last_rows,
    put_behind,
    read_losses,
    specs_of,
)
from kvfold.compress.work import kept
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import logits_of
from kvfold.exports.schema import MOST_SEED

SPAN = 32  # positions


def random_signs(shape: torch.Size, rng: torch.Generator, device: torch.device) -> Tensor:
    """float32, each −1 or 1: the bits of random numbers of 64 bits, since a number for each sign
    takes a core longer than a GPU takes for all the rest. Drawn on the CPU, so that no device
    changes them."""
    count = shape.numel()
    words = torch.empty(-(-count // 64), dtype=torch.int64).random_(-(2**63), None, generator=rng)
    one_byte = torch.arange(8, dtype=torch.uint8, device=device)
    bits = words.view(torch.uint8).to(device)[:, None] >> one_byte & 1
    return (2.0 * bits - 1.0).flatten()[:count].view(shape)


def directions(probe: Probe, index: int, normed: Tensor, count: int, seed: int) -> Tensor:
    """Gradients of Σ_s u_s·logits_s by the normed hidden states, for `count` draws of u.

    Args:
        index: of the passage, which seeds the draws with `seed`.
        normed: [n, hidden_size], at the positions that count.
    Returns:
        [count, n, hidden_size], in the type of `normed`.
    """
    rng = torch.Generator().manual_seed((seed * 1_000_003 + index) % MOST_SEED)
    found = torch.empty(count, *normed.shape, dtype=normed.dtype, device=normed.device)
    for start in range(0, len(normed), KL_BLOCK):
        rows = slice(start, start + KL_BLOCK)
        with torch.enable_grad():
            leaf = normed[rows].detach().requires_grad_()
            logits = logits_of(probe.model, leaf)
        p = logits.detach().float().softmax(-1)
        roots = p.sqrt()
        for draw in found:
            u = roots * random_signs(p.shape, rng, p.device)
            u -= p * u.sum(-1, keepdim=True)
            (draw[rows],) = torch.autograd.grad(logits, leaf, u.to(logits.dtype), retain_graph=True)
    return found


class _Recorder:
    """A tap that attends as usual for the last n of a passage's T positions and keeps what it saw.

    Args:
        keys, values: [1, Hkv, T - n, D], of the positions before.
    Attributes:
        query, key, value: [H, n, D], [Hkv, T, D] and [Hkv, T, D], after RoPE.
        scaling, extras: as a tap gets them.
        mask: bool [n, T] or None.
        out: [1, n, H, D] with its graph.
        joined: keys and values [1, Hkv, T, D] with theirs.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.before = keys, values

    def __call__(self, module, query, key, value, mask, scaling, **extras):
        self.scaling, self.extras = scaling, extras
        self.mask = None if mask is None else mask[0, 0]
        key, value, mask = put_behind(*self.before, key, value, mask)
        self.joined = key, value
        self.query, self.key, self.value = (x[0].detach() for x in (query, key, value))
        if extras:
            self.out = attend_whole(query, key, value, mask, scaling, **extras)
        else:
            self.out = attend_as_usual(module, query, key, value, mask, scaling)
        return self.out


class _Reader:
    """A tap for the last n of a passage's T positions in a layer that reads an earlier one's keys and
    values.

    Args:
        keys, values: [1, Hkv, T, D], what it reads.
    Attributes:
        sources: the same as leaves of the graph.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.sources = keys.detach().requires_grad_(), values.detach().requires_grad_()

    def __call__(self, module, query, key, value, mask, scaling, **extras):
        keys, values = self.sources
        mask = last_rows(mask, query, keys)
        if extras:
            return attend_whole(query, keys, values, mask, scaling, **extras)
        return attend_as_usual(module, query, keys, values, mask, scaling)


@dataclass(frozen=True)
class Seen:
    """What one layer's attention does for the last n of a passage's T positions, with the gradients
    by its output.

    Attributes:
        query, key, value: [H, n, D], [Hkv, T, D] and [Hkv, T, D], after RoPE.
        scaling: factor on the logits.
        options: mask, softcap and sinks_logit, as packed_attention takes them.
        plain: float32 [H, n, D], the output of unquantised keys and values.
        gradients: float32 [directions, Hkv, H / Hkv, n, D].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    options: dict[str, Any]
    plain: Tensor
    gradients: Tensor

    def products(self, geometry: Geometry, specs: dict[str, Any]) -> Tensor:
        """G_h·Δo_h of each direction, KV head h and position: float32 [directions, Hkv, n].

        Args:
            geometry: sinks, window and page size.
            specs: key_spec, or value_spec and value_matrix, of packed_attention.
        """
        error = packed_attention(
            self.query, self.key, self.value, geometry, self.scaling, **specs, **self.options
        )
        error -= self.plain
        return (self.gradients * error.unflatten(0, self.gradients.shape[1:3])).sum((2, 4))

    def loss(self, geometry: Geometry, specs: dict[str, Any]) -> Tensor:
        """½·Σ (G_h·Δo_h)² of each KV head h, over spans of positions, mean over directions: nats,
        summed over the passage's positions, float64 [Hkv]. Arguments as of `products`."""
        each = self.products(geometry, specs)
        spans = torch.nn.functional.pad(each, (0, -each.shape[-1] % SPAN)).unflatten(-1, (-1, SPAN))
        return spans.sum(-1).double().square().sum(-1).mean(0) / 2


class Sweep:
    """Backward passes through all layers, one at a time from the last to the first, on all of a
    probe's passages.

    Args:
        probe: of the model as it was read.
        geometry: sinks, window and page size that candidates are measured with.
        count: directions for each passage.
        seed: of the directions.
    """

    def __init__(self, probe: Probe, geometry: Geometry, count: int, seed: int) -> None:
        self.probe, self.geometry, self.count, self.seed = probe, geometry, count, seed
        self.gradients: dict[int, Tensor] = {}  # of each passage, by the next layer's output
        # of each passage and layer whose keys and values others read, by both: [count, 2, 1, Hkv, T,
        # D], the sum of the readers so far
        self.read: dict[tuple[int, int], Tensor] = {}
        self.next = probe.num_layers - 1  # of the model's layers

    def at(self, layer: int) -> list[Seen]:
        """What one of the layers that attend does on every passage that this process has, in their
        order; layers are asked for from the last on, each once, and may be left out."""
        place = self.probe.places[layer]
        assert place <= self.next
        while self.next > place:
            for i in self.probe.share.own:
                self._back(i)
            self.next -= 1
        seen = [self._step(i) for i in self.probe.share.own]
        self.next -= 1
        return seen

    def _back(self, index: int) -> tuple[_Recorder | None, list[Tensor]]:
        """One passage through layer `next`, and back.

        Returns:
            (what its attention saw, gradients [1, n, H, D] by what that gave, one a direction); (None, [])
            where the layer doesn't attend.
        """
        probe, place, gradient = self.probe, self.next, self.gradients.get(index)
        first, tap, reader = probe.early[index], None, None
        source, read = probe.sources.get(place), None
        leaf = probe.hidden[index][place][:, first:].detach()
        with torch.enable_grad(), ExitStack() as stack:
            leaf.requires_grad_()
            if place in probe.places:
                layer = probe.places.index(place)
                tap = _Recorder(*probe.past[index][layer])
                stack.enter_context(tapped(probe.attentions[layer], tap))
                read = self.read.pop((index, layer), None)
            elif source is not None:
                reader = _Reader(*probe.whole[index][source])
                module = probe.reading[source][1 + self._turn(place)]
                stack.enter_context(tapped(module, reader))
            state = probe.runners[index].run(place, leaf, first)
            if gradient is None:
                state = probe.normed(index, state, first)
                gradient = directions(probe, index, state, self.count, self.seed)
            sources = [leaf, *([] if tap is None else [tap.out])]
            sources += [] if reader is None else reader.sources
            ends = (state, *(() if tap is None or read is None else tap.joined))
            found = [
                torch.autograd.grad(
                    ends, sources, (g, *(() if read is None else read[i])), retain_graph=True
                )
                for i, g in enumerate(gradient)
            ]
        self.gradients[index] = torch.stack([by_leaf for by_leaf, *_ in found])
        if source is not None:
            both = torch.stack([torch.stack(rest) for _, *rest in found])
            name = index, source
            self.read[name] = both if name not in self.read else self.read[name] + both
            return None, []
        return tap, [by_out for _, *outs in found for by_out in outs]

    def _turn(self, place: int) -> int:
        """How many layers read the same keys and values between the layer that has them and `place`,
        which reads them too."""
        sources = self.probe.sources
        return sum(sources[other] == sources[place] for other in sources if other < place)

    def _step(self, index: int) -> Seen:
        """One passage through layer `next`, which attends, and back."""
        tap, gradients = self._back(index)
        assert tap is not None
        by_out = torch.stack([g[0] for g in gradients]).transpose(1, 2).float()  # [count, H, n, D]
        options: dict[str, Any] = {"mask": tap.mask, **tap.extras}
        plain = packed_attention(
            tap.query, tap.key, tap.value, self.geometry, tap.scaling, **options
        )
        heads = by_out.unflatten(1, (len(tap.key), -1))
        return Seen(tap.query, tap.key, tap.value, tap.scaling, options, plain, heads)


class Losses:
    """Losses to second order, layer by layer from the last on, kept in a file. Several processes
    ask for the same ones together.

    Args:
        sweep: runs where a loss is not in the file.
        path: from which an interrupted run goes on.
    """

    def __init__(self, sweep: Sweep, path: Path) -> None:
        self.sweep, self.path = sweep, path
        self.processes = sweep.probe.processes
        self.found: dict[str, float] = self.processes.from_first(
            lambda: kept(path, read_losses, {})
        )
        self.positions = sweep.probe.positions
        self._seen: tuple[int, dict[int, Seen]] = -1, {}

    def of(self, layer: int, named: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
        """KL in nats, mean over the probe's positions, that each KV head has of each choice.

        Args:
            layer: the last one asked for, or one before it.
            named: arguments of packed_attention by a name that is the layer's own.
        Raises:
            KvfoldError: the model's logits are no numbers.
        """
        geometry, device = self.sweep.geometry, self.sweep.probe.device
        keys = {
            name: [f"{layer}.{name}.{h}" for h in range(geometry.of_layer(layer).num_kv_heads)]
            for name in named
        }
        left = [name for name in named if not set(keys[name]) <= set(self.found)]
        if left and self._seen[0] != layer:
            own = self.sweep.probe.share.own
            self._seen = layer, dict(zip(own, self.sweep.at(layer), strict=True))
        specs = [{side: x.to(device) for side, x in named[name].items()} for name in left]

        def of_passage(i: int) -> Tensor:
            """float64 [names, Hkv], not yet divided by the positions."""
            return torch.stack([self._seen[1][i].loss(geometry, x) for x in specs])

        if left:
            each = list(self.sweep.probe.share.map(of_passage))
            self.found |= self.processes.from_first(lambda: self._mean(each, left, keys))
        if left and self.processes.first:
            keep_losses(self.path, self.found)
        return {name: [self.found[key] for key in keys[name]] for name in named}

    def _mean(
        self, each: list[Tensor], left: list[str], keys: dict[str, list[str]]
    ) -> dict[str, float]:
        """Losses by their names in the file, from those of every passage."""
        found: dict[str, float] = {}
        for n, name in enumerate(left):
            losses = torch.stack([x[n] for x in each]).sum(0).cpu() / self.positions
            check_finite_loss(float(losses.sum()))
            found |= dict(zip(keys[name], losses.tolist(), strict=True))
        return found

    def of_jobs(
        self,
        layer: int,
        jobs: Sequence[Job],
        keys: list[list[KeyCandidate]],
        values: list[list[ValueCandidate]],
    ) -> dict[Job, float]:
        """The loss in nats of each of a layer's `jobs`, from the candidates of all layers."""
        names = {job: f"{job[0]}.{job[2]}" for job in jobs}
        named = {names[job]: specs_of(job[0], keys, values, layer, job[2]) for job in jobs}
        found = self.of(layer, named)
        return {job: sum(found[names[job]]) for job in jobs}
