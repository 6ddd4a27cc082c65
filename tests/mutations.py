"""Delicate lines, each broken in a copy of the tree: the tests named beside it must fail.

usage: make mutations [ARGS="NUMBER …"], or python tests/mutations.py [NUMBER …]

Prints one line for each and ends with 1 if a broken line passed. Lines are found by their text, so
a line that is rewritten has to be rewritten here too: a text that is not there once is an error.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "compress",
    "exports",
    "kernels",
    "runtime",
    "src",
    "tests",
    "benchmarks",
    "docs",
    "examples",
)


class Mutation(NamedTuple):
    """One line.

    Attributes:
        file: where it is.
        before, after: text in it, and what it becomes.
        tests: files of which one must fail, wherever they are in tests/.
    """

    file: str
    before: str
    after: str
    tests: str


MUTATIONS = (
    # packing: shifts and bytes
    Mutation("kernels/kinds/bits.py", "(high << shift).bitwise_or_(low)", "(low << shift).bitwise_or_(high)",
             "test_packing.py"),
    Mutation("kernels/kinds/bits.py", "torch.stack((data & 15, data >> 4), -4)",
             "torch.stack((data >> 4, data & 15), -4)", "test_packing.py"),
    Mutation("kernels/kinds/trits.py", "* 256 + 242) // 243", "* 256 + 241) // 243", "test_packing.py"),
    Mutation("kernels/kinds/trits.py", "(0 < left <= 2) * -(-rows // 4)", "(0 < left <= 2) * (rows // 4)",
             "test_packing.py"),
    Mutation("kernels/quantizer.py", "(own >> plane.shift) & (2**plane.width - 1)", "own & (2**plane.width - 1)",
             "test_quantizer.py"),
    # scales, levels, clip, saturation
    Mutation("kernels/kinds/symmetric.py", "u.add_(levels / 2)", "u.add_((levels - 1) / 2)", "test_quantizer.py"),
    Mutation("kernels/kinds/min_max.py", "top = fmt.classes[0][1] - 1", "top = fmt.classes[0][1] - 2",
             "test_quantizer.py"),
    Mutation("kernels/kinds/min_max.py", "low, high = low * clip, high * clip", "low, high = low * clip, high",
             "test_quantizer.py"),
    Mutation("kernels/kinds/params.py", "return x.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)",
             "return x.to(torch.float16)", "test_quantizer.py"),
    # who reads what: page counts and limits
    Mutation("kernels/attention.py", "max(0, seq_len - sinks - window) // page_tokens",
             "max(0, seq_len - sinks - window + 1) // page_tokens", "test_account.py test_cache.py"),
    Mutation("kernels/attention.py", "(tile.positions >= limit)", "(tile.positions > limit)", "test_attention.py"),
    Mutation("kernels/attention.py", "tile.positions <= positions[rows, None]",
             "tile.positions < positions[rows, None]", "test_attention.py"),
    Mutation("exports/account.py", "least - sliding + 1 - self.sinks", "least - sliding + 2 - self.sinks",
             "test_sequences.py test_cache.py test_account.py"),
    Mutation("exports/account.py", "1 << (pages - 1).bit_length()", "1 << pages.bit_length()",
             "test_account.py test_cache.py"),
    # ring slots
    Mutation("runtime/cache/window.py", "(positions - sinks) % geometry.ring",
             "(positions - sinks) % (geometry.ring - geometry.page_tokens)", "test_cache.py test_sequences.py"),
    Mutation("runtime/cache/window.py", "sequence.length - g.ring)", "sequence.length - g.ring - 1)",
             "test_window.py test_sequences.py test_cache.py"),
    Mutation("exports/account.py", "self.window + self.page_tokens + self.rollback)", "self.window + self.page_tokens)",
             "test_sequences.py test_cache.py"),
    # rows that a crop brings back
    Mutation("exports/cache_model.py", "rest = c.rollback or 0, states", "rest = 0, states",
             "test_schema.py test_rollback.py"),
    Mutation("runtime/cache/store.py", "max(0, total - g.rollback), g.sinks", "total, g.sinks",
             "test_sequences.py test_rollback.py"),
    Mutation("runtime/cache/layer.py", "undo or self.geometry.rollback > 0", "undo",
             "test_sequences.py test_rollback.py"),
    # kernels
    Mutation("kernels/gpu/append.py", "sinks + tl.maximum(token - sinks, 0) % ring",
             "sinks + tl.maximum(token - sinks + 1, 0) % ring", "test_triton_encode.py"),
    Mutation("kernels/gpu/merge.py", "tl.maximum(length - sinks - window, 0) // page_tokens",
             "tl.maximum(length - sinks - window + 1, 0) // page_tokens", "test_triton_encode.py test_triton_model.py"),
    Mutation("kernels/gpu/device/raw.py", "position[:, None] >= limit[None, :]", "position[:, None] > limit[None, :]",
             "test_triton_attention.py"),
    # a prompt's kernels
    Mutation("kernels/gpu/dense.py", "packed = tl.maximum(last + 1 - sinks - window, 0)",
             "packed = tl.maximum(last - sinks - window, 0)", "test_triton_prompt.py"),
    Mutation("kernels/gpu/dense.py", "tl.where(row < sinks, row, row + before)", "row + before",
             "test_triton_prompt.py"),
    Mutation("kernels/gpu/dense.py", "(is_packed == paged)", "(is_packed | (paged == 0))", "test_triton_prompt.py"),
    Mutation("kernels/gpu/prompt.py", "(first + i) * tokens + t", "i * tokens + t", "test_triton_prompt.py"),
    # what the search measures
    Mutation("compress/search/fisher.py", "spans.sum(-1).double().square().sum(-1)",
             "spans.sum(-1).double().sum(-1).square()", "test_fisher.py"),
)  # fmt: skip


def survives(mutation: Mutation, folder: Path) -> bool:
    """Whether the tests pass on a copy of the tree with that line broken."""
    tree = folder / "tree"
    tree.mkdir()
    for name in COPIED:
        shutil.copytree(
            ROOT / name,
            tree / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    for file in ROOT.glob("*.*"):
        if file.is_file():
            shutil.copy(file, tree)
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.before) != 1:
        raise SystemExit(
            f"{mutation.file} has {text.count(mutation.before)} times '{mutation.before}'; "
            "write down the line as it is."
        )
    path.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    tests = [
        str(found)
        for name in mutation.tests.split()
        for found in (tree / "tests").glob(f"*/{name}")
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", *tests],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0


def main() -> int:
    chosen = [int(text) for text in sys.argv[1:]] or list(range(1, len(MUTATIONS) + 1))
    alive = 0
    for number in chosen:
        mutation = MUTATIONS[number - 1]
        with tempfile.TemporaryDirectory() as folder:
            passed = survives(mutation, Path(folder))
        alive += passed
        print(
            f"{number:2} {'PASSED' if passed else 'caught'} {mutation.file}: {mutation.after}",
            flush=True,
        )
    print(f"{len(chosen) - alive} of {len(chosen)} caught")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
