"""Whether a model that is read layer by layer gives the artifact of one that is held whole, to the
byte.

usage: python benchmarks/layer_by_layer.py MODEL… [--budget 2.5] [--recipe benchmarks/few_tokens.yaml]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).with_name("few_tokens.yaml")
STREAMED = ["--max-memory", "1MiB"]  # too little for any model's weights


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, by their relative paths."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def main() -> int:
    """Prints the table; 1 if any file differs."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--budget", default="2.5")
    parser.add_argument("--recipe", default=str(RECIPE))
    options = parser.parse_args()
    print("| model | whole | layer by layer | files that differ |\n|---|---|---|---|")
    worst = 0
    for model in options.models:
        found, seconds = [], []
        with tempfile.TemporaryDirectory() as scratch:
            for name, more in (("whole", []), ("streamed", STREAMED)):
                out = Path(scratch) / name / "artifact"
                words = [model, "--budget", options.budget, "--recipe", options.recipe]
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-m", "kvfold", "compress", *words, "--out", str(out), *more],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                seconds.append(time.perf_counter() - start)
                found.append(files_of(out))
        one, other = found
        differ = sorted(x for x in one.keys() | other.keys() if one.get(x) != other.get(x))
        cells = [Path(model).name, *(f"{x:.0f} s" for x in seconds)]
        print(
            "| " + " | ".join([*cells, ", ".join(differ) or f"none of {len(one)}"]) + " |",
            flush=True,
        )
        worst |= bool(differ)
    return worst


if __name__ == "__main__":
    sys.exit(main())
