"""Moments of one layer's queries, keys and values: what each sequence adds, and their sums.

A sequence's part needs nothing of the others', so that several processes can share the sequences
(processes.py); adding parts up in the order of the sequences is quick.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.key_mean import STEP, RopePairs, turn_tables

ATTENDED = {f"attended_{name}": "key" for name in ("keys", "mean", "rest", "turned")}
ATTENDED |= {"attended_values": "value"}  # whose weights it is taken with
LEAST_WEIGHT = 0.05  # of any token, in the mean of its sequence's


def _with_floor(weights: Tensor) -> Tensor:
    """Weights [Hkv, T] with a part that is the same for all tokens, and all alike where there are none."""
    mean = weights.mean(1, keepdim=True)
    return torch.where(mean > 0, weights + LEAST_WEIGHT * mean, 1.0)


@dataclass
class Part:
    """What one sequence adds to a layer's sums."""

    sums: dict[str, Tensor]
    samples: dict[str, Tensor]
    ranges: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    scaling: float = 1.0


class Moments:
    """Sums over sequences of one layer; each sequence's keys stay with the process that has it
    until their mean is known."""

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
        self.keys: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.scaling = 1.0

    def part(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        unturned: Tensor,
        value: Tensor,
        places: Tensor,
        weights: tuple[Tensor, Tensor],
        scaling: float,
    ) -> Part:
        """Of sequence `index`: query [H, T, D], key and value [Hkv, T, D]; key and query stand at
        int64 positions `places` [T].

        unturned: the keys before RoPE.
        weights: of keys and of values, float64 [Hkv, T] each.
        """
        q, k, v = query.double(), key.double(), value.double()
        grouped = q.unflatten(0, (self.num_kv_heads, -1)).flatten(1, 2)
        found = Part({}, {}, count=k.shape[1], scaling=scaling)
        sums = found.sums
        sums["query_moment"] = grouped.mT @ grouped / (q.shape[0] // self.num_kv_heads)
        for name, x in (("key", k), ("value", v)):
            sums[f"{name}_sum"] = x.sum(1)
            sums[f"{name}_moment"] = x.mT @ x
            found.ranges[name] = torch.stack((x.amin(1), x.amax(1)), 1)
        sums["center_sum"] = unturned.double().sum(1)
        of_keys, of_values = (_with_floor(x) for x in weights)
        sums["key_weight"], sums["value_weight"] = of_keys.sum(1), of_values.sum(1)
        sums["attended_mean"] = (of_keys[..., None] * k).sum(1)
        sums["attended_keys"] = (of_keys[..., None] * k).mT @ k
        sums["attended_values"] = (of_values[..., None] * v).mT @ v
        count = min(self.sample_tokens, k.shape[1])
        drawn = torch.linspace(0, k.shape[1] - 1, count, device=k.device).round().long()
        for name, x in (("query", query), ("key", key), ("value", value)):
            found.samples[name] = x[:, drawn].float()
        self.keys[index] = key.float(), places, drawn, of_keys
        return found

    def rest(self, center: Tensor, index: int) -> Part:
        """Of sequence `index`, whose `part` has been taken: of its keys without their rotating mean.

        Positions are `step` apart, which may be a multiple of what the slow pairs' turn is held
        for: places within such a run are taken from the token's number instead, so that all of them
        occur.
        """
        key, places, drawn, weights = self.keys.pop(index)
        turned = torch.zeros_like(key)
        if self.omega is not None:
            tables = turn_tables(
                tuple(self.omega.tolist()), key.shape[-1], 0, key.device, self.pairs
            )
            turned = tables.mean_at(
                center.float(), places, torch.arange(len(places), device=key.device) % STEP
            )
        rest = (key - turned).double()
        sums = {"rest_moment": rest.mT @ rest}
        for name, x in (("rest", rest), ("turned", turned.double())):
            sums[f"attended_{name}"] = (weights[..., None] * x).mT @ x
        return Part(sums, {"rest": rest[:, drawn].float()})

    def add(self, part: Part) -> None:
        """Adds what a sequence gives; the order of sequences decides the last bits."""
        for name, amount in part.sums.items():
            self.sums[name] = self.sums[name] + amount if name in self.sums else amount
        for name, x in part.ranges.items():
            if name in self.ranges:
                low = torch.minimum(x[:, 0], self.ranges[name][:, 0])
                x = torch.stack((low, torch.maximum(x[:, 1], self.ranges[name][:, 1])), 1)
            self.ranges[name] = x
        for name, tokens in part.samples.items():
            self.samples[name].append(tokens)
        self.count += part.count
        self.scaling = part.scaling if part.count else self.scaling

    def center(self) -> Tensor:
        """Mean of keys before RoPE, float64 [Hkv, D]."""
        return self.sums["center_sum"] / self.count

    def finish(self, output_metric: Tensor) -> dict[str, Tensor]:
        """The fields of a LayerStats (calibrate.py), on the CPU.

        Raises:
            KvfoldError: NaN or infinity in one.
        """
        found: dict[str, Tensor] = {"output_metric": output_metric}
        for name in ("key", "value"):
            mean = self.sums[f"{name}_sum"] / self.count
            found[f"{name}_mean"] = mean
            found[f"{name}_cov"] = (
                self.sums[f"{name}_moment"] / self.count - mean[:, :, None] * mean[:, None, :]
            )
            found[f"{name}_range"] = self.ranges[name]
        found["frequencies"] = torch.empty(0) if self.omega is None else self.omega
        found["center"] = self.center()
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
        return {name: tensor.cpu() for name, tensor in found.items()}
