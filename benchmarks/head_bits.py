"""What bits by head would be worth: formats chosen for each KV head, or for two parts of a layer's KV heads,
instead of for all heads of a layer, at the same bytes of pages.

usage: python benchmarks/head_bits.py MODEL --text FILE [--budget 2.5] [--first 3] [--windows 4] [--device auto]
                                      [--work DIR]

A head's losses are those of the search (compress/search/fisher.py), which has them by head; where a
candidate was not measured, the head's share of the layer's loss is interpolated between those that
were. All choices are then measured together through packed bytes: KL in nats on windows of 2048
tokens of the text, with as many sinks as the recipe has and at most as long a window as losses are
measured with. The runtime keeps one format for all heads of a layer, so this is no artifact.
--work keeps the calibration and all losses for another call.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvfold.compress.models import quiet_transformers
from kvfold.compress.plan import make_plan, pick_device
from kvfold.compress.recipe import load_recipe
from kvfold.compress.search import Measured, measure
from kvfold.compress.search.allocate import Choice, allocate
from kvfold.compress.search.packed_attention import packed_attention
from kvfold.compress.search.sensitivity import Passage, Probe
from kvfold.exports.spec import LayerSpec

SEQ_LEN = 2048


def head_losses(x: Measured, found: dict[str, float], side: str, layer: int) -> np.ndarray:
    """Losses in nats of a layer's candidates, by KV head: float64 [candidates, Hkv]."""
    group: Any = (x.keys if side == "key" else x.values)[layer]
    whole = np.array((x.key_losses if side == "key" else x.value_losses)[layer])
    heads = x.near.of_layer(layer).num_kv_heads
    seen = [c for c in range(len(group)) if f"{layer}.{side}.{c}.0" in found]
    seen = sorted((c for c in seen if group[c].distortion > 0), key=lambda c: group[c].distortion)
    own = np.array([[found[f"{layer}.{side}.{c}.{h}"] for h in range(heads)] for c in seen])
    own = np.maximum(own, 1e-12 * own.max())
    shares = np.log(own / own.sum(1, keepdims=True))
    at = np.log([group[c].distortion for c in seen])
    wanted = np.log([max(c.distortion, 1e-30) for c in group])
    each = np.exp(np.stack([np.interp(wanted, at, shares[:, h]) for h in range(heads)], 1))
    return whole[:, None] * each / each.sum(1, keepdims=True)


def chosen(x: Measured, losses: dict, room: int, at: int, parts: int) -> tuple[dict, float]:
    """The candidate of each (side, layer, head), and the loss that is foretold.

    Args:
        losses: of each (side, layer), as `head_losses` gives them.
        room: bytes of pages at `at` tokens.
        parts: of a layer's heads that have formats of their own; heads of like importance are
            together.
    """
    groups: list[list[Choice]] = []
    names: list[tuple[str, int, list[int]]] = []
    for (side, layer), own in losses.items():
        geometry, sliding = x.near.of_layer(layer), x.near.sliding_of(layer)
        candidates: Any = (x.keys if side == "key" else x.values)[layer]
        heads = own.shape[1]
        order = np.argsort(-own.sum(0)).tolist()
        size = math.ceil(heads / min(parts, heads))
        for start in range(0, heads, size):
            some = order[start : start + size]
            nbytes = [geometry.side_nbytes(c.spec.format, at, sliding) for c in candidates]
            groups.append([
                Choice(n * len(some) // heads, float(own[c, some].sum())) for c, n in enumerate(nbytes)
            ])  # fmt: skip
            names.append((side, layer, some))
    picked = allocate(groups, room)
    found = {
        (side, layer, h): c
        for (side, layer, some), c in zip(names, picked, strict=True)
        for h in some
    }
    return found, sum(group[c].loss for group, c in zip(groups, picked, strict=True))


def tap_of(x: Measured, picked: dict, layer: int) -> Any:
    """A tap in which each KV head has the formats that were chosen for it."""
    device, heads = x.probe.device, x.near.of_layer(layer).num_kv_heads
    own = []
    for h in range(heads):
        key = x.keys[layer][picked["key", layer, h]]
        value = x.values[layer][picked["value", layer, h]]
        spec = LayerSpec(key.spec, value.spec).of_heads(slice(h, h + 1)).to(device)
        own.append((spec, value.matrix[h : h + 1].to(device)))

    def tap(module, query, key, value, mask, scaling, **extras):
        narrow = None if mask is None else mask[0, 0]
        grouped = query[0].unflatten(0, (heads, -1))
        out = [
            packed_attention(
                grouped[h], key[0, h : h + 1], value[0, h : h + 1], x.near, scaling, spec.key, spec.value,
                matrix, narrow, **extras,
            )
            for h, (spec, matrix) in enumerate(own)
        ]  # fmt: skip
        return torch.cat(out).transpose(0, 1)[None].to(query.dtype)

    return tap


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budget", default="2.5")
    parser.add_argument("--first", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path)
    o = parser.parse_args()
    quiet_transformers()
    plan = make_plan(o.model, o.budget, None, load_recipe(), None)
    with tempfile.TemporaryDirectory() as scratch:
        work = o.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        x = measure(plan, work, pick_device(o.device))
        found = json.loads((work / "fisher.json").read_text())
    losses = {
        (side, i): head_losses(x, found, side, i)
        for side in ("key", "value")
        for i in range(plan.num_layers)
    }
    at = plan.budget.at
    room = plan.budget.nbytes - plan.geometry.all_fixed_nbytes(at, plan.num_layers)
    ids = plan.tokenizer(o.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    windows = [ids[:, i * SEQ_LEN : (i + 1) * SEQ_LEN] for i in range(o.first, o.first + o.windows)]
    early = x.near.sinks + x.near.window + x.near.page_tokens - 1
    probe = Probe(x.model, plan.arch, [Passage(w) for w in windows], early)
    print("| formats for | loss foretold | KL | pairs of formats |\n|---|---|---|---|", flush=True)
    for name, parts in (
        ("all heads of a layer", 1),
        ("two parts of its heads", 2),
        ("each head", 10**6),
    ):
        picked, foretold = chosen(x, losses, room, at, parts)
        pairs = {
            (x.keys[i][c].spec.format, x.values[i][picked["value", i, h]].spec.format)
            for (side, i, h), c in picked.items()
            if side == "key"
        }
        kl = probe.whole_model([tap_of(x, picked, i) for i in range(plan.num_layers)])
        print(f"| {name} | {foretold:.4f} | {kl:.4f} | {len(pairs)} |", flush=True)


if __name__ == "__main__":
    main()
