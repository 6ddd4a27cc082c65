"""Compresses a model at several budgets and measures each artifact: one Markdown table and one JSON file.

usage: python benchmarks/quality.py [MODEL] [--budgets 2.3,3.0,4.5] [--text FILE|DATASET] [--windows 3] [--out artifacts]
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from kvfold.compress.cli import with_error
from kvfold.compress.evaluate import evaluate
from kvfold.compress.models import quiet_transformers
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--budgets", default="2.3,3.0,4.5")
    parser.add_argument("--text", default=WIKITEXT)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--first-window", type=int, default=0)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--out", type=Path, default=Path("artifacts"))
    options = parser.parse_args()
    quiet_transformers()
    torch.set_flush_denormal(True)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        "| budget | bits at the context | payload bits | bits at the window | ppl 16-bit | ppl | Δloss | KL | top-1 | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for budget in options.budgets.split(","):
        out = options.out / f"{Path(options.model).name}-{budget}"
        begun = time.monotonic()
        artifact = compress(options.model, budget, out, recipe=load_recipe(options.recipe))
        seconds = time.monotonic() - begun
        found = evaluate(
            str(out),
            text=options.text,
            windows=options.windows,
            first_window=options.first_window,
            seq_len=options.seq_len,
        )
        account = artifact.metadata.account
        print(
            f"| {budget} | {account.effective_bits:.3f} at {account.at} | {found.payload_bits:.3f} | {found.effective_bits:.3f} "
            f"| {found.ppl_16bit:.3f} | {found.ppl:.3f} | {found.dnll:+.4f}{with_error(found.dnll_se)} | {found.kl:.4f}{with_error(found.kl_se)} "
            f"| {found.top1_agreement:.3f} | {seconds:.0f} |",
            flush=True,
        )
        rows.append({"budget": budget, "compress_seconds": seconds, **found.to_dict()})
    path = options.out / f"quality-{Path(options.model).name}.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
