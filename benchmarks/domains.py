"""Calibrates on one domain and tests on the others: KL at equal payload bits, through the packed cache.

usage: python benchmarks/domains.py [MODEL] [--domain NAME=CALIBRATION,TEST …] [--bits 2.25] [--windows 2] [--seq-len 512]

Without --domain the built-in texts are used: the first two thirds of each to calibrate on, the rest to test on. A row is a
calibration, a column a test; "all" is calibrated on every domain's text in turn. Goes on where an interrupted run stopped.
"""

import argparse
from pathlib import Path

from runs import Rows, make, mean_and_error, measure

from kvfold.compress.models import quiet_transformers
from kvfold.compress.recipe import load_recipe
from kvfold.compress.text import data_text, read_documents

BUILT_IN = ("maths", "prose", "code")
LIMIT = 2.0  # times the loss that calibrating on the test's own domain gives


def built_in(folder: Path) -> dict[str, tuple[str, str]]:
    """Texts to calibrate and to test on, by domain, cut from the package's own at a line's end."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in BUILT_IN:
        text = data_text(f"{name}.txt")
        cut = text.index("\n", 2 * len(text) // 3)
        paths = folder / f"{name}-calibration.txt", folder / f"{name}-test.txt"
        for path, part in zip(paths, (text[:cut], text[cut:]), strict=True):
            path.write_text(part, encoding="utf-8")
        found[name] = (str(paths[0]), str(paths[1]))
    return found


def table(rows: dict[str, dict], names: list[str]) -> str:
    """Markdown: KL by calibration and test, and how many times the loss of the test's own domain that is."""
    lines = ["| calibrated on | " + " | ".join(names) + " | worst ratio |", "|---" * (len(names) + 2) + "|"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument(
        "--domain", action="append", default=[], help="NAME=CALIBRATION,TEST: text files or datasets ids"
    )
    parser.add_argument("--bits", type=float, default=2.25)
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("artifacts/domains"))
    options = parser.parse_args()
    quiet_transformers()
    domains: dict[str, tuple[str, str]] = {}
    for text in options.domain:
        name, _, both = text.partition("=")
        calibration, comma, test = both.rpartition(",")
        if not comma:
            parser.error(f"--domain '{text}' is not NAME=CALIBRATION,TEST")
        domains[name] = (calibration, test)
    domains = domains or built_in(options.out / "texts")
    names = list(domains)
    mixed = options.out / "texts" / "all.txt"
    mixed.parent.mkdir(parents=True, exist_ok=True)
    parts = [read_documents(calibration)[1][0] for calibration, _ in domains.values()]
    shortest = min(map(len, parts))
    mixed.write_text("\n\n".join(part[:shortest] for part in parts), encoding="utf-8")
    shared = {k: getattr(options, k) for k in ("model", "bits", "recipe", "windows", "seq_len")}
    label = Path(options.model).name
    done = Rows(options.out / f"domains-{label}.json", {**shared, "domains": domains})
    recipe = load_recipe(options.recipe)
    for name, calibration in [*((n, c) for n, (c, _) in domains.items()), ("all", str(mixed))]:
        if name not in done:
            artifact = options.out / label / "artifact"
            figures = make(options.model, recipe, options.bits, artifact, options.device, calibration)
            kl = {
                test: [e.kl for e in measure(artifact, text, 0, options.windows, options.seq_len, options.device)]
                for test, (_, text) in domains.items()
            }
            done.add(name, {**figures, "kl": kl})
        markdown = table(done.rows, names)
        (options.out / f"domains-{label}.md").write_text(markdown, encoding="utf-8")
    print(markdown)
    print(f"worst ratio between single domains: {worst(done.rows, names):.2f} (limit {LIMIT:g})")


if __name__ == "__main__":
    main()
