"""`kvfold push`: an artifact to the Hugging Face Hub."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def push_command(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    repo_id: Annotated[
        str, typer.Argument(help="OWNER/NAME on the Hub; made if it does not exist.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; made if it does not exist. Default: main.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="What `kvfold eval … --json FILE` wrote, for the card; may be repeated."),
    ] = None,
    i_know: Annotated[
        bool,
        typer.Option(
            "--i-know",
            help="The base model's licence lets me redistribute it, though kvfold can't tell.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Publishes an artifact as one commit. The last line printed is its address."""
    from kvfold.exports.page.hub import push_to_hub

    pushed = push_to_hub(
        artifact,
        repo_id,
        private=private,
        revision=revision,
        allow_restricted_licence=i_know,
        results=results or (),
    )
    print(json.dumps(asdict(pushed)) if as_json else pushed.url)
