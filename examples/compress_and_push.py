"""Compresses a model, measures the artifact, publishes it on the Hub and loads it from there by its
id.

    hf auth login
    python compress_and_push.py Qwen/Qwen2.5-0.5B-Instruct OWNER/NAME --budget 3.0 --private

The licence of the base model must be known to allow it, or --i-know says that you may.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kvfold import KvfoldError, runtime
from kvfold.compress.evaluate import evaluate
from kvfold.compress.naming import default_output
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.page.hub import push_to_hub


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example; `argv` as on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hub id, checkpoint folder, .gguf, or the alias smollm2-135m")
    parser.add_argument("repo_id", help="OWNER/NAME; made if it does not exist")
    parser.add_argument(
        "--budget", default="2.5", help="mean bits (2.5), or bytes at a length (512MiB@32768)"
    )
    parser.add_argument(
        "--out", type=Path, help="the artifact's folder (default: artifacts/MODEL-BUDGET)"
    )
    parser.add_argument(
        "--calib", help="text file of your domain (default: the built-in text alone)"
    )
    parser.add_argument(
        "--recipe", default="best", help="a recipe's name or YAML file (default: %(default)s)"
    )
    parser.add_argument(
        "--windows", type=int, default=2, help="windows of held-out text to measure on"
    )
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of such a window")
    parser.add_argument("--private", action="store_true")
    parser.add_argument(
        "--i-know", action="store_true", help="the licence lets me redistribute the model"
    )
    args = parser.parse_args(argv)

    out = args.out or default_output(args.model, args.budget)
    artifact = compress(
        args.model, args.budget, out, calib=args.calib, recipe=load_recipe(args.recipe)
    )
    account = artifact.metadata.account
    print(
        f"{out}: {account.effective_bits:.2f} bits an element at {account.at} tokens, everything counted"
    )

    measured = evaluate(str(out), windows=args.windows, seq_len=args.seq_len)
    results = out.with_name(out.name + ".eval.json")  # beside the artifact, not in it
    results.write_text(json.dumps(measured.to_dict(), indent=1) + "\n", encoding="utf-8")
    print(
        f"KL {measured.kl:.4f} nats, top-1 agreement {measured.top1_agreement:.3f} on held-out text"
    )

    pushed = push_to_hub(
        out,
        args.repo_id,
        private=args.private,
        results=[results],  # rows of the model card
        allow_restricted_licence=args.i_know,
    )
    print(f"pushed as commit {pushed.commit}: {pushed.url}")

    model = runtime.load_pretrained(args.repo_id, revision=pushed.commit)
    print(f"loaded {args.repo_id} again: {len(model.kv_artifact.specs)} layers with a packed cache")


if __name__ == "__main__":
    try:
        main()
    except KvfoldError as error:
        sys.exit(f"compress_and_push: {error}")
