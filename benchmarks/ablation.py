"""Takes the ingredients out of the recipe `best` one at a time, at equal payload bits, through the
packed cache.

usage: python benchmarks/ablation.py [MODEL …] [--bits 2.25] [--text FILE|DATASET] [--windows 8] [--rows NAME,…]
                                     [--jobs 1]

Every row is a real artifact, compressed anew and measured on each window alone; rows that calibrate
alike share their statistics. Prints Markdown, and writes Markdown and JSON, after each row; run
again, it goes on where it stopped.
--jobs makes so many rows at a time, the GPUs shared out between them.
"""

import argparse
import time
from pathlib import Path

from kvfold.compress.bench.runs import (
    Rows,
    comparable,
    folder_of,
    geometry_of,
    make,
    mean_and_error,
    measure,
    side_by_side,
)
from kvfold.compress.models import quiet_transformers
from kvfold.compress.recipe import Recipe, load_recipe

MODELS = ("smollm2-135m", "Qwen/Qwen2.5-0.5B-Instruct")
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
ANY = {
    "levels": [2, 3, 4, 8, 16, 32, 64, 256, 65536],
    "params": ["scale", "scale_min"],
}  # formats of one class

OLD = ["maths", "drama", "prose", "code"]
KEY_BITS, VALUE_BITS = Recipe().key.bits, Recipe().value.bits

# name → what the row changes; None stands for the value that fits the changed transform
ROWS: dict[str, dict] = {
    "best": {},
    "best, seed 1": {"seed": 1},
    "best, seed 2": {"seed": 2},
    "K: no whitening by the queries": {"key": {"without": ["metric"]}},
    "K: no mixing inside classes": {"key": {"without": ["mixing"]}},
    "K: a mean that doesn't turn": {"key": {"without": ["rotation"]}},
    "K: any of five parts of the mean": {"key": {"mean_factors": [1.0, 0.75, 0.5, 0.25, 0.0]}},
    "K: all of the mean": {"key": {"mean_factors": [1.0]}},
    "K: no offset": {"key": {"without": ["offset"]}},
    "K: same bits in all channels": {"key": {"bits": [], **ANY}},
    "K: no transform": {"key": {"transform": "none", "bits": None, **ANY}},
    "K: all tokens count alike": {"key": {"without": ["attention"]}},
    "V: all tokens count alike": {"value": {"without": ["attention"]}},
    "both: all tokens count alike": {
        "key": {"without": ["attention"]},
        "value": {"without": ["attention"]},
    },
    "both: all tokens count alike; K: all of the mean": {
        "key": {"without": ["attention"], "mean_factors": [1.0]},
        "value": {"without": ["attention"]},
    },
    "V: mixed bits only": {"value": {"levels": [65536]}},
    "V: same bits in all channels": {"value": {"bits": [], **ANY}},
    "V: same bits, orthogonal basis": {"value": {"transform": "rotate", "bits": None, **ANY}},
    "V: same bits, orthogonal basis, ternary at least": {
        "value": {"transform": "rotate", "bits": None}
    },
    "V: no transform": {"value": {"transform": "none", "bits": None, **ANY}},
    "V: clip search": {"value": {"clip": True}},
    "positions not spread": {"calibration": {"spread": 1}},
    "positions all spread alike": {"calibration": {"graded": False}},
    "one format for all layers": {"fixed": True},
    "first-order sensitivities": {"sensitivity": {"method": "first-order"}},
    "a forward pass a candidate": {"sensitivity": {"method": "kl"}},
    "a forward pass a candidate; catalogue off": {
        "sensitivity": {"method": "kl"},
        "catalogue": False,
        "pairs": 0,
    },
    "a forward pass a candidate; K: a mean that doesn't turn": {
        "sensitivity": {"method": "kl"},
        "key": {"without": ["rotation"]},
    },
    "a forward pass a candidate; catalogue off; K: a mean that doesn't turn": {
        "sensitivity": {"method": "kl"},
        "catalogue": False,
        "pairs": 0,
        "key": {"without": ["rotation"]},
    },
    "one probe a kind": {"sensitivity": {"probes": 1}},
    "2 directions": {"sensitivity": {"directions": 2}},
    "8 directions": {"sensitivity": {"directions": 8}},
    "drawn anew": {"seed": 1},
    "1 sink": {"sinks": 1},
    "32 sinks": {"sinks": 32},
    "64 sinks": {"sinks": 64},
    "catalogue off": {"catalogue": False, "pairs": 0},
    "2 pairs of formats": {"pairs": 2},
    "4 pairs of formats": {"pairs": 4},
    "6 pairs of formats": {"pairs": 6},
    "12 pairs of formats": {"pairs": 12},
    "any number of any pairs": {"pairs": 0},
    "catalogue off; also K 0.5, V 0.25": {
        "catalogue": False,
        "key": {"bits": [0.5, *KEY_BITS]},
        "value": {"bits": [0.25, *VALUE_BITS]},
    },
    "catalogue off; quarter steps of bits": {
        "catalogue": False,
        "key": {"bits": [i / 4 for i in range(2, 21)]},
        "value": {"bits": [i / 4 for i in range(1, 14)]},
    },
    "two probe sequences": {"sensitivity": {"num_sequences": 2}},
    "five probe sequences": {"sensitivity": {"num_sequences": 5}},
    "no conversations": {"sensitivity": {"conversations": 0}},
    "6 conversations": {"sensitivity": {"conversations": 6}},
    "no recall text": {
        "calibration": {"texts": OLD, "num_sequences": 4},
        "sensitivity": {"num_sequences": 4},
    },
    "no recall text; probes: maths, drama, code": {
        "calibration": {"texts": ["maths", "drama", "code", "prose"], "num_sequences": 4},
        "sensitivity": {"num_sequences": 3},
    },
    "no recall text; probes: maths, drama": {
        "calibration": {"texts": OLD, "num_sequences": 4},
        "sensitivity": {"num_sequences": 2},
    },
    "probe sequences twice as long": {"sensitivity": {"seq_len": 2048}},
    "twice the calibration": {"calibration": {"num_sequences": 10}},
    "skvq": {"recipe": "skvq"},
    "pm-kvq": {
        "recipe": "pm-kvq",
        "least": 2.75,
    },  # its smallest format has 2.5 bits; a little more leaves a choice
}


def chosen(part: str, row: str) -> bool:
    """Whether `part`, in lower case, asks for a row: by its name, or by a part of it that is no other
    row's name."""
    names = {name.lower() for name in ROWS}
    return part == row.lower() or (part not in names and part in row.lower())


def recipe_for(change: dict, model: str, bits: float) -> Recipe:
    """`best` with the tables' sinks, or another recipe, with a row's change."""
    data = comparable(load_recipe(change.get("recipe"))).model_dump()
    for name, value in change.items():
        if isinstance(value, dict):
            data[name] |= value
        elif name not in ("recipe", "fixed", "least"):
            data[name] = value
    if change.get(
        "fixed"
    ):  # values with 2 bits, keys with the water-filled format that the rest of the bits pays
        head_dim = geometry_of(model, Recipe())[0].head_dim
        value_bits = 2 + 16 / head_dim
        data["value"] |= {"bits": [], "levels": [4], "params": ["scale_min"]}
        data["key"] |= {
            "bits": [int((2 * bits - value_bits) * head_dim / 8 - 1 + 1e-9) * 8 / head_dim],
            "levels": [],
        }
    return Recipe.model_validate(data)


def table(rows: dict[str, dict]) -> str:
    """Markdown of the rows so far; differences to `best` are paired by window."""
    lines = [
        "| row | payload bits | K | V | Δloss | KL | KL − best's | top-1 | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ((name, rows[name]) for name in ROWS if name in rows):
        kl, loss = mean_and_error(row["kl"]), mean_and_error(row["dnll"])
        rest = (
            [a - b for a, b in zip(row["kl"], rows["best"]["kl"], strict=True)]
            if "best" in rows
            else [0.0]
        )
        difference = mean_and_error(rest)
        lines.append(
            f"| {name} | {row['payload_bits']:.3f} | {row['key_bits']:.3f} | {row['value_bits']:.3f} "
            f"| {loss[0]:+.4f} ± {loss[1]:.4f} "
            f"| {kl[0]:.4f} ± {kl[1]:.4f} | {difference[0]:+.4f} ± {difference[1]:.4f} "
            f"| {mean_and_error(row['top1'])[0]:.3f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def measured(change: dict, model: str, options: argparse.Namespace) -> dict:
    """One row: an artifact made and measured."""
    quiet_transformers()
    begun = time.monotonic()
    recipe = recipe_for(change, model, options.bits)
    artifact = folder_of(options.out / Path(model).name, options.jobs) / "artifact"
    figures = make(
        model, recipe, max(options.bits, change.get("least", 0)), artifact, options.device
    )
    seconds = time.monotonic() - begun
    found = measure(
        artifact,
        options.text,
        options.first_window,
        options.windows,
        options.seq_len,
        options.device,
    )
    lists = {
        "kl": [e.kl for e in found],
        "dnll": [e.dnll for e in found],
        "top1": [e.top1_agreement for e in found],
    }
    return {**figures, **lists, "seconds": seconds, "change": change}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--bits", type=float, default=2.25)
    parser.add_argument("--text", default=WIKITEXT)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--first-window", type=int, default=0)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", help="names, or parts of several, between commas")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("artifacts/ablation"))
    options = parser.parse_args()
    wanted = [part.strip().lower() for part in options.rows.split(",")] if options.rows else [""]
    for model in options.models:
        name = Path(model).name
        shared = {
            k: getattr(options, k) for k in ("bits", "text", "windows", "first_window", "seq_len")
        }
        done = Rows(options.out / f"ablation-{name}.json", {"model": model, **shared})
        left = {
            row: (change, model, options)
            for row, change in ROWS.items()
            if row not in done and any(chosen(part, row) for part in wanted)
        }
        for row, found in side_by_side(measured, left, options.jobs):
            done.add(row, found)
            text = table(done.rows)
            (options.out / f"ablation-{name}.md").write_text(text, encoding="utf-8")
            print(f"{name}\n{text}", flush=True)


if __name__ == "__main__":
    main()
