"""PM-KVQ's sensitivities (2505.18610): to first order, quantising x to x + Δ changes the loss by at most Σ|g·Δ|, g =
∂L/∂x.

L is the mean cross-entropy of the next token. One backward pass a sequence gives g for every
layer's keys (after RoPE) and values; then a candidate costs one trip through its own quantiser and
no further pass. Δ is taken in the model's own coordinates, of all tokens but the sinks. The
backward pass keeps every layer's activations, so this needs more memory than measuring the KL, and
a hundredth of the time.
"""

from contextlib import ExitStack

import torch
from torch import Tensor

from kvfold.compress.models.attention_hook import tapped
from kvfold.compress.progress import progress
from kvfold.compress.search.candidates import KeyCandidate, ValueCandidate
from kvfold.compress.search.sensitivity import KL_BLOCK, Probe
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import last_norm_of, logits_of
from kvfold.exports.spec import clip_rows
from kvfold.kernels.quantizer import round_trip, to_float16


def key_error(keys: Tensor, candidate: KeyCandidate, sinks: int) -> Tensor:
    """Δ of keys float [Hkv, T, D], float32, before any transform."""
    spec = candidate.spec.to(keys.device)
    z = spec.apply(keys, torch.arange(keys.shape[1], device=keys.device), sinks)
    delta = round_trip(to_float16(z), spec.format, clip_rows(spec.clip)) - z
    return delta if spec.query_matrix is None else delta @ spec.query_matrix.mT


def value_error(values: Tensor, candidate: ValueCandidate) -> Tensor:
    """Δ of values float [Hkv, T, D], float32, before any transform."""
    spec, matrix = candidate.spec.to(values.device), candidate.matrix.to(values.device)
    z = values.float() @ matrix.float().mT
    delta = round_trip(to_float16(z), spec.format, clip_rows(spec.clip)) - z
    return delta @ torch.linalg.inv(matrix).float().mT


def attend_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks_logit: Tensor | None = None,
) -> Tensor:
    """Attention with soft-cap and sink logits that autograd follows: kernels.attention works in
    place.

    Args:
        query, key, value: [1, H or Hkv, T, D].
        mask: bool [1, 1, T, T], None for causal.
        softcap, sinks_logit: as in kernels.attention.attend.
    Returns:
        [1, T, H, D] in the query's type.
    """
    group = query.shape[1] // key.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (key, value))
    scores = query.float() * scaling @ keys.mT
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    visible = torch.ones_like(scores, dtype=torch.bool).tril() if mask is None else mask
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks_logit is not None:
        scores = torch.cat(
            (scores, sinks_logit.float()[None, :, None, None].expand(*scores.shape[:3], 1)), -1
        )
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values).transpose(1, 2).to(query.dtype)


def gradients(
    probe: Probe, index: int, input_ids: Tensor
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(keys, values, ∂L/∂keys, ∂L/∂values) of every layer for one of the probe's sequences, [Hkv,
    T, D] each.

    Args:
        input_ids: int64 [1, T], the sequence itself.
    """
    runner, model = probe.runners[index], probe.model
    seen: list[tuple[Tensor, Tensor]] = []

    def tap(module, query, key, value, mask, scaling, **extras):
        key.retain_grad()
        value.retain_grad()
        seen.append((key, value))
        return attend_whole(query, key, value, mask, scaling, **extras) if extras else None

    with torch.enable_grad(), ExitStack() as stack:
        for attention in probe.attentions:
            stack.enter_context(tapped(attention, tap))
        hidden = runner.run_from(0, runner.embedded.detach().requires_grad_())
        final = last_norm_of(model)(hidden)[0, :-1]
        leaf = final.detach().requires_grad_()
        targets = input_ids[0, 1:].to(leaf.device)
        for start in range(0, len(targets), KL_BLOCK):  # the logits of a block at a time
            rows = slice(start, start + KL_BLOCK)
            logits = logits_of(model, leaf[rows])
            (
                torch.nn.functional.cross_entropy(logits, targets[rows], reduction="sum")
                / len(targets)
            ).backward()
        final.backward(leaf.grad)
    found = []
    for key, value in seen:
        assert key.grad is not None and value.grad is not None
        found.append((key[0].detach(), value[0].detach(), key.grad[0], value.grad[0]))
    return found


def _sum(products: Tensor, geometry: Geometry) -> float:
    return float(products[:, geometry.sinks :].abs().sum(dtype=torch.float64))


def first_order_losses(
    probe: Probe,
    sequences: list[Tensor],
    keys: list[list[KeyCandidate]],
    values: list[list[ValueCandidate]],
    geometry: Geometry,
) -> tuple[list[list[float]], list[list[float]]]:
    """Σ|g·Δ| of every candidate, mean over the sequences, in nats.

    Args:
        sequences: int64 [1, T] each, those of the probe.
        keys, values: candidates of each layer.
    Returns:
        (losses of key candidates, losses of value candidates), one list a layer.
    """
    key_losses = [[0.0] * len(group) for group in keys]
    value_losses = [[0.0] * len(group) for group in values]

    def of_sequence(index: int) -> list[tuple[list[float], list[float]]]:
        """Σ|g·Δ| of the key and the value candidates, of each layer."""
        found = []
        for layer, (k, v, key_grad, value_grad) in enumerate(
            gradients(probe, index, sequences[index])
        ):
            of_keys = [
                _sum(key_error(k, x, geometry.sinks) * key_grad, geometry) for x in keys[layer]
            ]
            of_values = [_sum(value_error(v, x) * value_grad, geometry) for x in values[layer]]
            found.append((of_keys, of_values))
        return found

    every = probe.share.map(of_sequence)
    for layers in progress(every, "first order", "sequence", total=len(sequences)):
        for layer, sides in enumerate(layers):
            for losses, more in zip((key_losses[layer], value_losses[layer]), sides, strict=True):
                for c, loss in enumerate(more):
                    losses[c] += loss / len(sequences)
    return probe.processes.broadcast((key_losses, value_losses))
