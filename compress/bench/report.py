"""A comparison as a Markdown table and as a Pareto plot."""

from pathlib import Path
from typing import Any

from kvfold.compress.bench.compare import LENGTHS


def _error(value: float | None, digits: int) -> str:
    return "" if value is None else f" ± {value:.{digits}f}"


def _kl_digits(kl: float) -> int:
    return 4 if kl < 0.1 else 3 if kl < 1 else 2


def markdown(result: dict[str, Any]) -> str:
    """The table, rows by whole payload bits and then by KL, with what was left out and the protocol
    under it."""
    lengths = [f"{n // 1024}K" for n in LENGTHS]
    first = result["first_window"]
    lines = [
        f"## {result['model']} on {result['text']}: windows {first} to {first + result['windows'] - 1} "
        f"of {result['seq_len']} tokens",
        "",
        "| cache | payload bits | " + " | ".join(f"bits at {n}" for n in lengths)
        + " | 16-bit tokens | perplexity | ΔNLL | KL | top-1 |",
        "|---|" + "---|" * (len(lengths) + 6),
    ]  # fmt: skip
    rows = sorted(result["rows"], key=lambda row: (round(row["payload_bits"]), row["kl"]))
    if rows:
        lines.append(
            "| unquantised | 16 |"
            + " 16 |" * len(lengths)
            + f" all | {rows[0]['ppl_16bit']:.3f} | | | |"
        )
    for row in rows:
        bold = "**" if row["kind"] == "artifact" else ""
        digits = _kl_digits(row["kl"])
        bits = " | ".join(f"{row['bits_at'][str(n)]:.3f}" for n in LENGTHS)
        lines.append(
            f"| {bold}{row['name']}{bold} | {row['payload_bits']:.3f} | {bits} | {row['sinks']} + {row['window']} + "
            f"≤{row['page_tokens'] - 1} | {row['ppl']:.3f} | {row['dnll']:+.{digits}f}{_error(row['dnll_se'], digits)} "
            f"| {row['kl']:.{digits}f}{_error(row['kl_se'], digits)} | {row['top1_agreement']:.3f} |"
        )
    lines += [
        "",
        f"Computed in {result['dtype']}. Nats per token, ± standard error over windows; KL and top-1 against the "
        "original model with an unquantised cache. Payload: codes and all scales and minima of what lies behind the "
        "window. Bits at a length: everything resident for one sequence, with sinks, window, the open page and tables. "
        "16-bit tokens: sinks + window + what a page still waits for.",
        "",
    ]
    sources = {
        row["name"].rsplit(" ", 1)[0]: row["source"] for row in rows if row["kind"] == "rival"
    }
    lines += [f"- {name}: {source}." for name, source in sources.items()]
    lines += [f"- left out: {name}, {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines) + "\n"


def series(result: dict[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """(payload bits, KL, standard error) by curve, rising in bits: artifacts by their transforms,
    rivals by name."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in result["rows"]:
        name = (
            f"kvfold ({row['source']})"
            if row["kind"] == "artifact"
            else row["name"].rsplit(" ", 1)[0]
        )
        found.setdefault(name, []).append((row["payload_bits"], row["kl"], row["kl_se"] or 0.0))
    return {name: sorted(points) for name, points in found.items()}


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes quality.png and quality.svg: KL on a log axis against payload bits. Needs
    matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    curves = series(result)
    ours = [name for name in curves if name.startswith("kvfold")]
    rivals = [name for name in curves if name not in ours]
    settings: Any = {
        "font.size": 11,
        "svg.hashsalt": "kvfold",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(8.4, 5.2), dpi=160)
        colours = pyplot.get_cmap("tab20")
        for i, name in enumerate(rivals):
            bits, kl, error = zip(*curves[name], strict=True)
            axes.errorbar(
                bits, kl, yerr=_below(kl, error), fmt="os^Dv<>Pph*X"[i % 12], color=colours(2 * i % 20 + (2 * i >= 20)),
                markersize=6.5, elinewidth=0.8, alpha=0.9, label=name,
            )  # fmt: skip
        for i, name in enumerate(ours):
            bits, kl, error = zip(*curves[name], strict=True)
            label = "kvfold" if len(ours) == 1 else name
            axes.errorbar(
                bits, kl, yerr=_below(kl, error), fmt="-o", color=("black", "crimson", "navy")[i % 3],
                linewidth=2.2, markersize=6, elinewidth=0.8, label=label, zorder=5,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("payload bits per cached element, scales and minima included")
        axes.set_ylabel("KL to the unquantised cache, nats per token")
        axes.set_title(
            f"{result['model']}, {result['windows']} windows of {result['seq_len']} tokens of {result['text']}",
            fontsize=11,
        )
        axes.grid(True, which="both", linewidth=0.4, alpha=0.5)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=10)
        paths = [folder / "quality.png", folder / "quality.svg"]
        for path in paths:
            figure.savefig(
                path,
                bbox_inches="tight",
                metadata={"Date": None} if path.suffix == ".svg" else None,
            )
        pyplot.close(figure)
    return paths


def _below(values: tuple[float, ...], errors: tuple[float, ...]) -> list[list[float]]:
    """Error bars (down, up) that stay above zero on a log axis."""
    return [[min(e, 0.9 * v) for v, e in zip(values, errors, strict=True)], list(errors)]
