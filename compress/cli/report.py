"""The command `kvfold report`."""

from pathlib import Path
from typing import Annotated

import typer

from kvfold.exports.page.report import read_results, write_report


def report_command(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON of measured rows, each with payload_bits, kl and name (or artifact); repeatable."
        ),
    ] = None,
) -> None:
    """Writes report.html again, with measured rows; prints its path."""
    print(write_report(artifact, [row for path in results or [] for row in read_results(path)]))
