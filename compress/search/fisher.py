"""How much each layer's keys or values matter, to second order: no forward pass for each candidate.

A change Δo of a layer's attention output changes the logits by J·Δo to first order, and the KL of
the next token by

    KL ≈ ½ · Δoᵀ·F·Δo,  F = Σ_s J_sᵀ (diag(p_s) − p_s·p_sᵀ) J_s,

F being the Fisher information of the output at o, p_s the probabilities at position s. F is never
formed: with ξ of random signs, u_s = √p_s ∘ ξ − p_s·(√p_sᵀξ) has the covariance diag(p_s) −
p_s·p_sᵀ, so that G = Σ_s J_sᵀ·u_s, one backward pass for all layers and positions, has E[(G·Δo)²] =
Δoᵀ·F·Δo. The errors of the KV heads of a layer are rounding errors of different numbers, which add
up in squares: E[(G·Δo)²] is the sum over KV heads of E[(G_h·Δo_h)²], and that estimate is as many
times less noisy.

Δo of a candidate takes that layer's attention alone, through packed bytes as in sensitivity.py.
Layers are run again one at a time from stored hidden states, so that one layer's activations are in
memory, and only positions that read pages are run at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.models.attention_hook import attend_as_usual, tapped
from kvfold.compress.progress import progress
from kvfold.compress.search.candidates import KeyCandidate, ValueCandidate
from kvfold.compress.search.first_order import attend_whole
from kvfold.compress.search.sensitivity import (
    KL_BLOCK,
    Job,
    Probe,
    check_finite_loss,
    keep_losses,
    packed_attention,
    put_behind,
    read_losses,
    specs_of,
)
from kvfold.compress.work import kept
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import logits_of
from kvfold.exports.schema import MOST_SEED


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
            signs = torch.randint(0, 2, p.shape, generator=rng, dtype=torch.int8).to(p.device)
            u = roots * (2.0 * signs - 1.0)
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
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.before = keys, values

    def __call__(self, module, query, key, value, mask, scaling, **extras):
        self.scaling, self.extras = scaling, extras
        self.mask = None if mask is None else mask[0, 0]
        key, value, mask = put_behind(*self.before, key, value, mask)
        self.query, self.key, self.value = (x[0].detach() for x in (query, key, value))
        if extras:
            self.out = attend_whole(query, key, value, mask, scaling, **extras)
        else:
            self.out = attend_as_usual(module, query, key, value, mask, scaling)
        return self.out


def passage_losses(
    probe: Probe,
    index: int,
    jobs: Sequence[Job],
    keys: list[list[KeyCandidate]],
    values: list[list[ValueCandidate]],
    geometry: Geometry,
    count: int,
    seed: int,
) -> dict[Job, list[float]]:
    """½·(G_h·Δo_h)² of each KV head h on one of the probe's passages, mean over `count` directions.

    Args:
        index: of the passage.
        jobs, keys, values, count, seed: as in `fisher_losses`.
        geometry: sinks, window and page size that candidates are measured with.
    Returns:
        nats of each KV head for each job, summed over the passage's positions.
    """
    found: dict[Job, list[float]] = {}
    first = probe.early[index]
    gradient: Tensor | None = None  # [count, 1, n, hidden_size] by a layer's output
    for layer in reversed(range(len(probe.attentions))):
        tap = _Recorder(*probe.past[index][layer])
        leaf = probe.hidden[index][layer][:, first:].detach()
        with torch.enable_grad(), tapped(probe.attentions[layer], tap):
            leaf.requires_grad_()
            state = probe.runners[index].run(layer, leaf, first)
            if gradient is None:
                state = probe.normed(index, state, first)
                gradient = directions(probe, index, state, count, seed)
            both = [
                torch.autograd.grad(state, (leaf, tap.out), g, retain_graph=True) for g in gradient
            ]
        gradient = torch.stack([by_leaf for by_leaf, _ in both])
        by_out = torch.stack([g[0] for _, g in both]).transpose(1, 2).float()  # [count, H, n, D]
        del state, both
        options: dict[str, Any] = {"mask": tap.mask, **tap.extras}
        heads = by_out.unflatten(1, (geometry.num_kv_heads, -1))  # [count, Hkv, G, n, D]
        plain = packed_attention(tap.query, tap.key, tap.value, geometry, tap.scaling, **options)
        for side, at, c in jobs:
            if at != layer:
                continue
            specs = {
                name: x.to(probe.device)
                for name, x in specs_of(side, keys, values, layer, c).items()
            }
            error = packed_attention(
                tap.query, tap.key, tap.value, geometry, tap.scaling, **specs, **options
            )
            error -= plain
            products = (heads * error.unflatten(0, (geometry.num_kv_heads, -1))).flatten(2).sum(-1)
            found[side, at, c] = (products.double().square().sum(0) / (2 * count)).tolist()
    return found


def head_losses(
    probe: Probe,
    jobs: Sequence[Job],
    keys: list[list[KeyCandidate]],
    values: list[list[ValueCandidate]],
    geometry: Geometry,
    count: int,
    seed: int,
    path: Path,
    label: str = "sensitivity",
) -> dict[Job, list[float]]:
    """KL to second order, in nats, that each KV head has of each of the `jobs`, mean over the
    probe's positions.

    Args:
        keys, values, geometry, count, seed: as in `fisher_losses`.
        path: file of finished passages, from which an interrupted run goes on.
        label: of the progress line.
    Raises:
        KvfoldError: the model's logits are no numbers.
    """
    found = kept(path, read_losses, {})
    heads = range(geometry.num_kv_heads)

    def name(index: int, job: Job, head: int) -> str:
        return f"{index}.{'.'.join(map(str, job))}.{head}"

    passages = range(len(probe.passages))
    for index in progress(passages, label, "passage"):
        if all(name(index, job, head) in found for job in jobs for head in heads):
            continue
        losses = passage_losses(probe, index, jobs, keys, values, geometry, count, seed)
        check_finite_loss(sum(map(sum, losses.values())))
        for job in jobs:
            found |= {name(index, job, head): losses[job][head] for head in heads}
        keep_losses(path, found)
    positions = sum(map(len, probe.final))
    return {
        job: [sum(found[name(i, job, head)] for i in passages) / positions for head in heads]
        for job in jobs
    }


def fisher_losses(
    probe: Probe,
    jobs: Sequence[Job],
    keys: list[list[KeyCandidate]],
    values: list[list[ValueCandidate]],
    geometry: Geometry,
    count: int,
    seed: int,
    work: Path,
) -> dict[Job, float]:
    """KL to second order, in nats, of each of the `jobs`, mean over the probe's positions.

    Args:
        keys, values: candidates of each layer.
        count: directions for each passage.
        geometry: sinks, window and page size that candidates are measured with.
        seed: of the directions.
        work: folder for fisher.json, from which an interrupted run goes on.
    Raises:
        KvfoldError: the model's logits are no numbers.
    """
    path = work / "fisher.json"
    found = head_losses(probe, jobs, keys, values, geometry, count, seed, path)
    return {job: sum(heads) for job, heads in found.items()}
