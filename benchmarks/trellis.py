"""What a trellis would buy for the classes of one to three bits: distortion and KL through the packed
cache at exactly the same bytes, and the time of writing. Not part of the product; see LOG.md.

usage: python benchmarks/trellis.py MODEL_OR_ARTIFACT [--windows 3] [--text FILE|DATASET] [--rows PART;…]

An artifact is read as it is; of a model (Hub id, folder, alias) one of 2.25 payload bits is made.
Pages are written and read by the plain-torch reference; only the kind of code of some classes is
another (trellis_codes.py), in the same planes. The formats and the bits of the layers stay those that
were chosen for scalar codes. Classes of formats with a minimum, and of three levels, stay scalar.
The reference is the same weights with an unquantised cache, all in float32; differences are paired by
window. Errors are those of the layers that have such classes; "of the error" is their part of all
scalar codes' squared error there.

`python benchmarks/trellis_kernel.py` counts the instructions of reading and of writing.
"""

import argparse
import platform
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from trellis_codes import HASH, Code, Trellised, error_of, gaussian, hashed, trained, with_trellis

from kvfold.compress.bench.runs import comparable, make, mean_and_error
from kvfold.compress.evaluate import compare, windows_of
from kvfold.compress.models import quiet_transformers
from kvfold.compress.recipe import load_recipe
from kvfold.compress.text import read_documents
from kvfold.exports.reader import is_artifact
from kvfold.exports.spec import LayerSpec
from kvfold.kernels.formats import Format
from kvfold.kernels.quantizer import encode
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.load import load_pretrained, plain_cache

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"


@dataclass(frozen=True)
class Row:
    """Classes of these bits are trellis-coded, on one side or both."""

    bits: tuple[int, ...]
    states: int = 256
    keys: bool = False
    values: bool = True
    computed: bool = False  # the numbers, instead of looked up
    refit: bool = False  # tokens' scales to what the trellis made of them
    unbiased: bool = False  # numbers divided by 1 − error, so that none of x is taken off
    by_scale: bool = False  # tokens weigh by their squared scale instead of alike


ROWS = {
    "V scalar, scales refitted": Row((), refit=True),  # what of the gain is no trellis's
    "V 2 bits": Row((2,)),
    "V 2 bits, scales refitted": Row((2,), refit=True),
    "V 2 bits, unbiased": Row((2,), unbiased=True),
    "V 2 bits, tokens by scale": Row((2,), by_scale=True),
    "V 2 bits, computed": Row((2,), computed=True),
    "V 2 bits, 64 states": Row((2,), 64),
    "V 2 bits, 16 states": Row((2,), 16),
    "V 1, 2 and 3 bits, scales refitted": Row((1, 2, 3), refit=True),
    "K and V 2 bits, scales refitted": Row((2,), keys=True, refit=True),
    "K and V 1, 2 and 3 bits, scales refitted": Row((1, 2, 3), keys=True, refit=True),
}


@cache
def code_of(bits: int, states: int, computed: bool, unbiased: bool) -> Code:
    state_bits = states.bit_length() - 1
    if unbiased:
        code = code_of(bits, states, computed, False)
        return Code(bits, code.table / (1 - error_of(code)))
    return hashed(bits, state_bits, *HASH) if computed else trained(bits, state_bits)


def kind_of(row: Row | None) -> Trellised:
    """The row's kind of code; of none the scalar one."""
    if row is None:
        return Trellised({}, False)
    codes = {2**b: code_of(b, row.states, row.computed, row.unbiased) for b in row.bits}
    return Trellised(codes, row.refit, row.by_scale)


def put(model: Any, specs: list[LayerSpec], row: Row | None, kind: Trellised) -> None:
    """Makes caches from now on code by `kind`, in pages of the same bytes."""
    held = model.kv_artifact.specs
    for i, spec in enumerate(specs):
        sides = {"key": spec.key, "value": spec.value}
        for name, wanted in (("key", row and row.keys), ("value", row and row.values)):
            if wanted:
                fmt = with_trellis(sides[name].format, kind)
                assert fmt.nbytes(32) == sides[name].format.nbytes(32)
                sides[name] = replace(sides[name], format=fmt)
        held[i] = LayerSpec(**sides)


def share(specs: list[LayerSpec], row: Row) -> dict[str, float]:
    """Of each side, the share of channels that a row's classes hold."""
    found = {}
    for name, wanted in (("K", row.keys), ("V", row.values)):
        formats = [(spec.key if name == "K" else spec.value).format for spec in specs]
        coded = sum(
            channels
            for fmt in formats
            if fmt.kind.symmetric
            for channels, levels in fmt.classes
            if levels in {2**bits for bits in row.bits}
        )
        if wanted:
            found[name] = coded / sum(fmt.head_dim for fmt in formats)
    return found


def writing_time(kind: Trellised, pages: int = 4) -> tuple[float, float]:
    """Seconds to write the values of a page of 32 tokens of 8 heads of 128 channels, half of them of
    2 bits: (scalar, trellis)."""
    fmt = Format(((16, 8), (64, 4), (48, 2)))
    x = gaussian(pages * 8 * 32, 128, 7).view(pages, 8, 32, 128)
    found = []
    for own in (fmt, with_trellis(fmt, kind)):
        encode(x[:1], own)
        begun = time.perf_counter()
        encode(x, own)
        found.append((time.perf_counter() - begun) / pages)
    return found[0], found[1]


def chosen(part: str, name: str) -> bool:
    """Whether `part` asks for a row: by its name, or by a part of it that is no other row's name."""
    return part == name.lower() or (part not in map(str.lower, ROWS) and part in name.lower())


def artifact_of(name: str, out: Path, recipe: str) -> Path:
    """The folder of an artifact, made if `name` is a model's."""
    if is_artifact(Path(name)):
        return Path(name)
    folder = out / Path(name).name
    make(name, comparable(load_recipe(recipe)), 2.25, folder, "cpu")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL_OR_ARTIFACT")
    parser.add_argument("--text", default=WIKITEXT)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--first-window", type=int, default=0)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", help="names, or parts of several, between semicolons; all")
    parser.add_argument("--recipe", default="best", help="of an artifact that is made")
    parser.add_argument("--out", type=Path, default=Path("artifacts/trellis"))
    options = parser.parse_args()
    quiet_transformers()
    torch.set_flush_denormal(True)
    parts = options.rows.lower().split(";") if options.rows else [""]
    rows = {
        name: row for name, row in ROWS.items() if any(chosen(part.strip(), name) for part in parts)
    }
    path = artifact_of(options.model, options.out, options.recipe)
    model: Any = load_pretrained(path, device="cpu", dtype=torch.float32, attention="reference")
    name, documents = read_documents(options.text)
    windows = windows_of(
        tokenizer_from_pretrained(path),
        "\n\n".join(documents),
        options.seq_len,
        options.first_window,
        options.windows,
        name,
    )
    specs = list(model.kv_artifact.specs)
    kinds = {"scalar": kind_of(None)} | {name: kind_of(row) for name, row in rows.items()}
    kl: dict[str, list[float]] = {name: [] for name in kinds}
    seconds = dict.fromkeys(kinds, 0.0)
    with torch.inference_mode():
        for ids in windows:
            with plain_cache(model):
                reference = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
            for label, kind in kinds.items():
                put(model, specs, rows.get(label), kind)
                begun = time.perf_counter()
                packed = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
                seconds[label] += time.perf_counter() - begun
                sums = compare(model, model, reference, packed, ids[0, 1:])
                kl[label].append(float(sums[2]) / (ids.shape[1] - 1))
                print(label, kl[label], file=sys.stderr, flush=True)
    print(
        f"{platform.machine()}, torch {torch.__version__}; {path.name}, "
        f"{model.kv_artifact.metadata.account.payload_bits:.3f} payload bits; {name}, "
        f"{len(windows)} windows of {options.seq_len} from {options.first_window} on\n"
    )
    print(
        "| trellis-coded | of channels | of the error | on Gaussians | here, by bits | whole error | KL "
        "| KL − scalar's | ratio | s a window |\n" + "|---" * 10 + "|"
    )
    for label, kind in kinds.items():
        found, rest = mean_and_error(kl[label]), "| | | | | |"
        differences = mean_and_error([a - b for a, b in zip(kl[label], kl["scalar"], strict=True)])
        if label != "scalar":
            held = ", ".join(f"{side} {x:.2f}" for side, x in share(specs, rows[label]).items())
            whole, whole_own = kind.errors[0]
            changes = ", ".join(
                f"{levels.bit_length() - 1}: {100 * (own / scalar - 1):+.1f} %"
                for levels, (scalar, own) in sorted(kind.errors.items())
                if levels
            )
            part = sum(kind.errors[levels][0] for levels in kind.codes) / whole
            theory = ", ".join(
                f"{100 * (error_of(code) / kind.error(levels) - 1):+.1f} %"
                for levels, code in kind.codes.items()
            )
            rest = f"| {held} | {part:.2f} | {theory} | {changes} | {100 * (whole_own / whole - 1):+.1f} % |"
        ratio = sum(kl[label]) / sum(kl["scalar"])
        print(
            f"| {label} {rest} {found[0]:.5f} ± {found[1]:.5f} "
            f"| {differences[0]:+.5f} ± {differences[1]:.5f} | {ratio:.3f} "
            f"| {seconds[label] / len(windows):.1f} |"
        )
    for label, kind in kinds.items():
        if 4 in kind.codes:
            scalar, own = writing_time(kind)
            print(
                f"\nwriting values of a page (32 tokens × 8 heads × 128 channels, 64 of 2 bits), {label}: "
                f"{own:.3f} s on this CPU, {scalar:.3f} s scalar"
            )


if __name__ == "__main__":
    main()
