"""Calibrates on one domain and tests on the others: KL at equal payload bits, through the packed
cache.

usage: python benchmarks/domains.py [MODEL] [--domain NAME=CALIBRATION,TEST …] [--bits 2.25] [--windows 4]
                                    [--seq-len 512] [--alone] [--jobs 1]

Without --domain the built-in texts are calibrated on, and the tests are the held-out text's maths,
drama and prose, and a module of Python's standard library. A row is a calibration, a column a test;
"all" is the built-in text as a whole. A text that is given is joined by the built-in one, as
`kvfold compress --calib` does; with --alone it is all that is calibrated on. --jobs makes so many
rows at a time, the GPUs shared out between them. Goes on where an interrupted run stopped.
"""

import argparse
import csv
import inspect
from pathlib import Path

from kvfold.compress.bench.runs import (
    Rows,
    comparable,
    folder_of,
    make,
    mean_and_error,
    measure,
    side_by_side,
)
from kvfold.compress.models import quiet_transformers
from kvfold.compress.recipe import load_recipe
from kvfold.compress.text import HELD_OUT, data_text

LIMIT = 2.0  # times the loss that calibrating on the test's own domain gives


def built_in(folder: Path) -> dict[str, tuple[str, str]]:
    """Texts to calibrate and to test on, by domain. None is in both."""
    folder.mkdir(parents=True, exist_ok=True)
    text = data_text(HELD_OUT)
    maths = text.index("\n", text.rindex("The answer is ")) + 1
    prose = text.index("\n = ", maths) + 1
    tests = {
        "maths": text[:maths],
        "drama": text[maths:prose],
        "prose": text[prose:],
        "code": inspect.getsource(csv),
    }
    found = {}
    for name, test in tests.items():
        paths = folder / f"{name}-calibration.txt", folder / f"{name}-test.txt"
        for path, part in zip(paths, (data_text(f"{name}.txt"), test), strict=True):
            path.write_text(part, encoding="utf-8")
        found[name] = (str(paths[0]), str(paths[1]))
    return found


def table(rows: dict[str, dict], names: list[str]) -> str:
    """Markdown: KL by calibration and test, and how many times the loss of the test's own domain
    that is."""
    lines = [
        "| calibrated on | " + " | ".join(names) + " | worst ratio |",
        "|---" * (len(names) + 2) + "|",
    ]
    for calibration, row in rows.items():
        cells, ratios = [], []
        for name in names:
            mean, error = mean_and_error(row["kl"][name])
            own = mean_and_error(rows[name]["kl"][name])[0] if name in rows else mean
            ratios.append(mean / own)
            cells.append(f"{mean:.4f} ± {error:.4f} ({mean / own:.2f})")
        lines.append(f"| {calibration} | " + " | ".join(cells) + f" | {max(ratios):.2f} |")
    return "\n".join(lines) + "\n"


def worst(rows: dict[str, dict], names: list[str]) -> float:
    """The largest ratio of a loss to the one of the test's own calibration."""
    own = {name: mean_and_error(rows[name]["kl"][name])[0] for name in names}
    return max(mean_and_error(rows[c]["kl"][t])[0] / own[t] for c in names for t in names)


def measured(
    calibration: str | None, domains: dict[str, tuple[str, str]], options: argparse.Namespace
) -> dict:
    """One row: an artifact made and measured on every test."""
    quiet_transformers()
    recipe = comparable(load_recipe(options.recipe))
    if options.alone:
        recipe = recipe.model_copy(
            update={"calibration": recipe.calibration.model_copy(update={"general": False})}
        )
    artifact = folder_of(options.out / Path(options.model).name, options.jobs) / "artifact"
    figures = make(options.model, recipe, options.bits, artifact, options.device, calibration)
    kl = {
        test: [
            e.kl
            for e in measure(artifact, text, 0, options.windows, options.seq_len, options.device)
        ]
        for test, (_, text) in domains.items()
    }
    return {**figures, "kl": kl}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument(
        "--domain",
        action="append",
        default=[],
        help="NAME=CALIBRATION,TEST: text files or datasets ids",
    )
    parser.add_argument("--bits", type=float, default=2.25)
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--rows", help="calibrations, between commas; default: all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("artifacts/domains"))
    options = parser.parse_args()
    domains: dict[str, tuple[str, str]] = {}
    for text in options.domain:
        name, _, both = text.partition("=")
        calibration, comma, test = both.rpartition(",")
        if not comma:
            parser.error(f"--domain '{text}' is not NAME=CALIBRATION,TEST")
        domains[name] = (calibration, test)
    domains = domains or built_in(options.out / "texts")
    names = list(domains)
    shared = {
        k: getattr(options, k) for k in ("model", "bits", "recipe", "windows", "seq_len", "alone")
    }
    label = Path(options.model).name
    done = Rows(options.out / f"domains-{label}.json", {**shared, "domains": domains})
    wanted = options.rows.split(",") if options.rows else [*names, "all"]
    calibrations = {name: calibration for name, (calibration, _) in domains.items()} | {"all": None}
    left = {
        n: (c, domains, options) for n, c in calibrations.items() if n in wanted and n not in done
    }
    for name, row in side_by_side(measured, left, options.jobs):
        done.add(name, row)
        (options.out / f"domains-{label}.md").write_text(table(done.rows, names), encoding="utf-8")
    markdown = table({name: done.rows[name] for name in calibrations if name in done}, names)
    (options.out / f"domains-{label}.md").write_text(markdown, encoding="utf-8")
    print(markdown)
    if all(name in done for name in names):
        print(
            f"worst ratio between single domains: {worst(done.rows, names):.2f} (limit {LIMIT:g})"
        )


if __name__ == "__main__":
    main()
