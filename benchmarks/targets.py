"""The table of aims: KL of `best` at stated payload bits through the packed cache, WikiText-2's
test split.

usage: python benchmarks/targets.py [NAME=MODEL …] [--rows PART,…] [--text FILE|DATASET] [--device auto]

NAME is smollm2, qwen or gemma, MODEL where its checkpoint is (Hub id, folder, .gguf or alias).
Prints Markdown, and writes Markdown and JSON, after each row; run again, it goes on where it
stopped.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from kvfold.compress.bench.runs import Rows, comparable, make, mean_and_error, measure
from kvfold.compress.models import quiet_transformers
from kvfold.compress.recipe import load_recipe

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
MODELS = {
    "smollm2": "smollm2-135m",
    "qwen": "Qwen/Qwen2.5-0.5B-Instruct",
    "gemma": "google/gemma-3-270m-it",
}


@dataclass(frozen=True)
class Row:
    """One aim: `windows` windows of `seq_len` tokens from window `first` on, at `bits` of payload,
    KL at most `aim` nats."""

    model: str
    bits: float
    first: int
    windows: int
    seq_len: int
    aim: float

    @property
    def name(self) -> str:
        last = self.first + self.windows - 1
        span = f"{self.first}-{last}" if self.windows > 1 else str(self.first)
        return f"{self.model} {self.bits:g}, {self.seq_len}, {span}"


ROWS = (
    Row("smollm2", 2.25, 0, 3, 2048, 0.009),
    Row("smollm2", 2.25, 3, 8, 2048, 0.009),
    Row("smollm2", 2.25, 0, 1, 8192, 0.014),
    Row("smollm2", 1.93, 0, 3, 2048, 0.016),
    Row("smollm2", 1.85, 3, 8, 2048, 0.0164),  # what 2.25 bits took in the version of 2026-11-23
    Row("smollm2", 3.2, 0, 3, 2048, 0.011),
    Row("smollm2", 4.2, 0, 3, 2048, 0.004),
    Row("qwen", 2.25, 0, 2, 2048, 0.012),
    Row("gemma", 2.25, 0, 2, 2048, 0.01),
)


def table(rows: dict[str, dict]) -> str:
    """Markdown of the rows so far."""
    lines = [
        "| model, bits, window, windows | payload bits | Δloss | KL | aim | top-1 |",
        "|---" * 6 + "|",
    ]
    for name, row in rows.items():
        kl, loss = mean_and_error(row["kl"]), mean_and_error(row["dnll"])
        lines.append(
            f"| {name} | {row['payload_bits']:.3f} | {loss[0]:+.4f} ± {loss[1]:.4f} | {kl[0]:.4f} ± {kl[1]:.4f} "
            f"| {row['aim']:g} | {mean_and_error(row['top1'])[0]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="NAME=MODEL")
    parser.add_argument("--rows", help="parts of rows' names, between semicolons")
    parser.add_argument("--text", default=WIKITEXT)
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("artifacts/targets"))
    options = parser.parse_args()
    quiet_transformers()
    models = dict(MODELS)
    for given in options.models:
        name, equals, path = given.partition("=")
        if not equals or name not in MODELS:
            parser.error(f"'{given}' is not NAME=MODEL with one of the names {', '.join(MODELS)}")
        models[name] = path
    wanted = options.rows.split(";") if options.rows else [""]
    done = Rows(
        options.out / "targets.json",
        {"models": models, "text": options.text, "recipe": options.recipe},
    )
    made: dict[tuple[str, float], dict] = {}
    for row in ROWS:
        if row.name in done.rows or not any(part.strip() in row.name for part in wanted):
            continue
        artifact = options.out / f"{row.model}-{row.bits:g}"
        if (row.model, row.bits) not in made:
            begun = time.monotonic()
            figures = make(
                models[row.model],
                comparable(load_recipe(options.recipe)),
                row.bits,
                artifact,
                options.device,
            )
            made[row.model, row.bits] = {**figures, "compress_seconds": time.monotonic() - begun}
        found = measure(artifact, options.text, row.first, row.windows, row.seq_len, options.device)
        lists = {
            "kl": [e.kl for e in found],
            "dnll": [e.dnll for e in found],
            "top1": [e.top1_agreement for e in found],
        }
        done.add(row.name, {**made[row.model, row.bits], **lists, "aim": row.aim})
        text = table(done.rows)
        (options.out / "targets.md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main()
