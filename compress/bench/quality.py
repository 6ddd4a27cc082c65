"""`kvfold bench quality`: artifacts and rivals at equal bits."""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvfold.errors import KvfoldError

bench = typer.Typer(help="Measures artifacts and rivals.")

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"


def split(text: str) -> list[str]:
    """The parts of a,b,c."""
    return [part.strip() for part in text.split(",") if part.strip()]


def choose(asked: str, known: list[str]) -> list[str]:
    """Names of rivals from "all", "none" or a,b.

    Raises:
        KvfoldError: a name that is not in the table.
    """
    if asked in ("all", "none"):
        return known if asked == "all" else []
    for name in split(asked):
        if name not in known:
            raise KvfoldError(
                f"--rivals names '{name}', which is not in the table; choose from {', '.join(known)}."
            )
    return split(asked)


@bench.command("quality")
def quality_command(
    model: Annotated[
        str, typer.Argument(help="Alias, checkpoint folder, .gguf, or Hub id: the original model.")
    ],
    budgets: Annotated[
        str, typer.Option(help="Compress to these budgets and measure them: 2.3,3.0,4.5.")
    ] = "",
    artifacts: Annotated[str, typer.Option(help="Folders of finished artifacts: DIR,DIR.")] = "",
    rivals: Annotated[str, typer.Option(help="all, none, or names: kivi,skvq.")] = "all",
    bits: Annotated[str, typer.Option(help="Code bits of the rivals: 2,3,4.")] = "2",
    text: Annotated[
        str, typer.Option(help="Text file, or datasets id as ID:CONFIG:SPLIT.")
    ] = WIKITEXT,
    windows: Annotated[int, typer.Option(min=1, help="Windows that do not overlap.")] = 3,
    first_window: Annotated[int, typer.Option(min=0, help="Window to begin with.")] = 0,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16: what the model computes in.")
    ] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default artifacts/bench-MODEL.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows that are there and add what is missing.")
    ] = False,
) -> None:
    """Compares artifacts and rivals: perplexity, KL and top-1 at their bits.
    Writes quality.json, .md, .png and .svg."""
    import torch

    from kvfold.compress.bench import compare, report
    from kvfold.compress.plan import pick_device

    names = choose(rivals, list(compare.RIVALS))
    if dtype not in ("float32", "bfloat16", "float16"):
        raise KvfoldError(
            f"--dtype '{dtype}' is not one to compute in; choose float32, bfloat16 or float16."
        )
    widths = split(bits)
    if not all(width in ("2", "3", "4") for width in widths):
        raise KvfoldError(f"--bits '{bits}' is not a list of rivals' code bits; choose from 2,3,4.")
    folders = [Path(folder) for folder in split(artifacts)]
    for folder in folders:
        if not folder.is_dir():
            raise KvfoldError(
                f"--artifacts names '{folder}', which is not a folder; give folders that kvfold compress wrote."
            )
    target = (
        out
        or Path("artifacts")
        / f"bench-{Path(model).stem if model.endswith('.gguf') else Path(model).name}"
    )
    settings = compare.Settings(
        model,
        text,
        windows,
        first_window,
        seq_len,
        pick_device(device),
        getattr(torch, dtype),
        target,
    )
    run = compare.Comparison(settings, resume)
    for folder in [*(run.build(budget, resume) for budget in split(budgets)), *folders]:
        run.artifact(folder)
    for width in widths:
        for name in names:
            run.rival(name, int(width))
    table = report.markdown(run.result)
    (target / "quality.md").write_text(table, encoding="utf-8")
    print(table)
    if importlib.util.find_spec("matplotlib") is None:
        print("No plot: matplotlib is not installed.", file=sys.stderr)
    elif run.result["rows"]:
        report.plot(run.result, target)
    print(target)
