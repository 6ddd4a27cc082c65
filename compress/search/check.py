"""Whether a model is what compressing assumes, found out on a real text before anything is
searched.

Four things are assumed of every family, and each is compared with what the model itself computes:

| assumed | compared | bound |
|---|---|---|
| layers run one at a time, the last norm and the head make its logits | its own logits | LOGITS |
| keys at other positions are keys turned on | keys that the layer computes there | TURNED |
| a basis of values folds into v_proj and o_proj | the attention's output | FOLDED times the rounding |
| a pair scale of keys folds into projections or norms | the same | the same |

The rounding is measured in the same run: the basis is folded in, rounded to the type that is
computed in, and folded out again, which leaves the weights as they were but for that rounding,
whatever the model computes between them. Each attention is asked on its own, because the experts
behind it may be chosen otherwise for the last bit of an input. It takes about five passes over
CHECKED tokens, one layer at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.fuse import fuse_outputs, fuse_pair_scale, fuse_values, value_bases
from kvfold.compress.models.attention_hook import tapped
from kvfold.compress.models.layerwise import LayerRunner
from kvfold.compress.models.rope import norm_weights, rotate_on, turns
from kvfold.compress.models.streamed import present
from kvfold.compress.transforms.basis import mixing_matrix
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import (
    Architecture,
    attention_layers_of,
    heads_of,
    last_norm_of,
    logits_of,
    readers_of,
    text_of,
)
from kvfold.kernels.key_mean import join_pairs

CHECKED = 128  # tokens of text
STEP = 7  # between the other positions
# relative error of logits; 1e-6 in float32 and 0.005 in bfloat16 where layers are the model's
LOGITS = 0.02
TURNED = 0.05  # of keys; 1e-5 in float32 and 0.006 in bfloat16 where RoPE is understood
# times the rounding; up to 3 where a fold is exact, 1e6 in float32 and 150 in bfloat16 behind a
# norm
FOLDED = 10
# relative error that is never asked about: some models compute in float32 whatever their type
LEAST = 1e-6


class Call:
    """What an attention module is called with in a `with` block, so that it can be called again."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __enter__(self) -> "Call":
        self._hook = self.attention.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _note(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.args, self.kwargs = args, kwargs

    def output(self, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """The module's output, with some of its parameters replaced, rounded to their types."""
        saved = {name: self.attention.get_parameter(name).data for name in parameters or {}}
        shared = self.kwargs.get("shared_kv_states")  # for later layers, which must not read these
        before = dict(shared or {})
        try:
            for name, value in (parameters or {}).items():
                self.attention.get_parameter(name).data = value.to(saved[name].dtype)
            return self.attention(*self.args, **self.kwargs)[0]
        finally:
            for name, data in saved.items():
                self.attention.get_parameter(name).data = data
            if shared is not None:
                shared.update(before)


class _Rounded:
    """An attention module as `fuse` sees it, with some parameters replaced."""

    def __init__(self, attention: Any, parameters: dict[str, Tensor]) -> None:
        self.attention, self.parameters = attention, parameters

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.attention, name)
        own = {
            k.rpartition(".")[2]: v
            for k, v in self.parameters.items()
            if k.rpartition(".")[0] == name
        }
        return _Rounded(found, own) if own else self.parameters.get(name, found)


def _relative(error: Tensor, to: Tensor) -> float:
    """‖error‖ / ‖to‖; 0 where both are."""
    size = float(error.double().norm())
    return size and size / max(float(to.double().norm()), 1e-300)


@torch.no_grad()
def check_model(
    model: Any, arch: Architecture, ids: Tensor, name: str, scaled: bool
) -> dict[str, float]:
    """Compares what compressing assumes of a model with what the model computes.

    Args:
        model: loaded with attention tap.NAME; left as it was.
        ids: int64 [1, T], text; CHECKED tokens of it are read.
        name: of the model, for the refusal.
        scaled: whether a pair scale will be folded into queries and keys too.
    Returns:
        The largest relative errors by name: "logits", "turned", "values", "keys", and the
            "rounding" of the last two.
    Raises:
        KvfoldError: which assumption doesn't hold, in which layer.
    """
    device = next(model.parameters()).device
    ids = ids[:, :CHECKED].to(device)
    places = torch.arange(ids.shape[1], device=device)[None]
    numbers = attention_layers_of(model.config)
    near, far = (LayerRunner(model, arch, ids, places * step) for step in (1, STEP))
    found = dict.fromkeys(("logits", "turned", "values", "keys", "rounding"), 0.0)
    hidden = near.embedded

    def check(what: str, error: float, bound: float, sentence: str) -> None:
        found[what] = max(found[what], error)
        if not error <= bound and error > LEAST:
            raise KvfoldError(
                f"'{name}' is not what kvfold knows of model family '{arch.model_type}': {sentence} by a relative "
                f"{error:.2g} (at most {max(bound, LEAST):.2g} is rounding); give a checkpoint without such changes."
            )

    def checked(index: int, attention: Any, hidden: Tensor) -> Tensor:
        keys: list[Tensor] = []

        def note(
            module: Any,
            query: Tensor,
            key: Tensor,
            *rest: Any,
            keys: list[Tensor] = keys,
            **extras: Any,
        ) -> None:
            keys.append(key)

        with tapped(attention, note):
            far.run(numbers[index], hidden)
            with Call(attention) as call:
                after = near.run(numbers[index], hidden)
        apart = [turns(model, arch, index, places * step) for step in (1, STEP)]
        moved = rotate_on(
            keys[1], apart[0], apart[1], arch.rope_pairs, norm_weights(attention, arch)[1]
        )
        error = _relative(moved - keys[0].float(), keys[0])
        check(
            "turned",
            error,
            TURNED,
            f"keys of layer {numbers[index]} at other positions differ from keys that were turned on",
        )
        for side, fold in folds(model, arch, scaled, index).items():
            before = call.output()
            fused = fold(attention, False)
            rounded = {k: v.to(attention.get_parameter(k).dtype) for k, v in fused.items()}
            rounding = _relative(
                call.output(fold(_Rounded(attention, rounded), True)) - before, before
            )
            found["rounding"] = max(found["rounding"], rounding)
            error = _relative(call.output(fused) - before, before)
            what = f"folding a change of basis into layer {numbers[index]} changes what its attention gives"
            unit = max(torch.finfo(x.dtype).eps / 2 for x in rounded.values())
            check(side, error, FOLDED * max(rounding, unit), what)
        return after

    def reading(number: int, source: int, hidden: Tensor) -> Tensor:
        """As `checked`, of a layer that reads the keys and values of layer `source`."""
        attention = arch.decoder_layers(model)[number].get_submodule(arch.attention)
        with Call(attention) as call:
            after = near.run(number, hidden)
        heads, dim = heads_of(model.config)[numbers.index(source)]
        generator = torch.Generator().manual_seed(number)
        matrix = torch.stack([mixing_matrix(dim, generator) for _ in range(heads)])
        before = call.output()
        unit = torch.finfo(before.dtype).eps / 2
        kind = text_of(model.config).layer_types[number]
        error = _relative(_read_folded(call, kind, matrix) - before, before)
        what = f"layer {number} does not read the values of layer {source}, in whatever basis they stand,"
        check("values", error, FOLDED * 10 * unit, f"{what} and what it gives differs")
        return after

    attentions = dict(zip(numbers, arch.attention_modules(model), strict=True))
    sources = {place: i for i, others in readers_of(model.config).items() for place in others}
    for number, layer in enumerate(arch.decoder_layers(model)):
        with present(layer):
            if number in attentions:
                hidden = checked(numbers.index(number), attentions[number], hidden)
            elif number in sources:
                hidden = reading(number, sources[number], hidden)
            else:
                hidden = near.run(number, hidden)
    logits = model(ids, use_cache=False).logits.float()
    error = _relative(logits_of(model, last_norm_of(model)(hidden)) - logits, logits)
    check("logits", error, LOGITS, "logits of its layers, last norm and head differ from its own")
    return found


Fold = Callable[[Any, bool], dict[str, Tensor]]


def folds(model: Any, arch: Architecture, scaled: bool, layer: int) -> dict[str, Fold]:
    """What is folded into one layer, and out again: an orthogonal basis of values, or, where a gate
    lets nothing else through, a permutation with scales; then scales of pairs of keys."""
    heads, dim = heads_of(model.config)[layer]
    generator = torch.Generator().manual_seed(layer)
    matrix = torch.stack([mixing_matrix(dim, generator) for _ in range(heads)])
    half = torch.exp2(torch.rand(1, dim // 2, generator=generator, dtype=torch.float64) - 0.5)
    scale = join_pairs(half, half, arch.rope_pairs).expand(heads, -1)

    inverse = matrix.mT
    if arch.gate:
        orders = torch.stack([torch.randperm(dim, generator=generator) for _ in range(heads)])
        powers = torch.exp2(torch.randint(-1, 2, (heads, dim), generator=generator).double())
        matrix = torch.diag_embed(powers).gather(1, orders[..., None].expand_as(matrix))
        inverse = torch.linalg.inv(matrix)

    def values(attention: Any, out: bool) -> dict[str, Tensor]:
        return fuse_values(attention, inverse if out else matrix, arch.gate)

    def keys(attention: Any, out: bool) -> dict[str, Tensor]:
        return fuse_pair_scale(attention, 1 / scale if out else scale, arch)

    found: dict[str, Fold] = {"keys": keys} if scaled else {}
    if value_bases(arch.attention_modules(model)[layer], arch) != "none":
        found = {"values": values, **found}
    return found


def _read_folded(call: Call, layer_type: str, matrix: Tensor) -> Tensor:
    """What a layer that reads an earlier one's keys and values gives where those values come in the
    basis `matrix`, float64 [Hkv, D, D], and its o_proj undoes it."""
    shared = call.kwargs["shared_kv_states"]
    keys, values = plain = shared[layer_type]
    turned = (values.double() @ matrix.to(values.device).mT).to(values.dtype)
    try:
        shared[layer_type] = keys, turned
        return call.output(fuse_outputs(call.attention, torch.linalg.inv(matrix)))
    finally:
        shared[layer_type] = plain
