"""`kvfold compress`: a checkpoint whose KV cache is small."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kvfold.compress.cli.table import describe, print_table
from kvfold.compress.naming import default_output
from kvfold.exports.schema import MOST_SEED
from kvfold.exports.units import parse_nbytes

OutOption = Annotated[
    Path | None, typer.Option(help="The artifact's folder; default artifacts/MODEL-BUDGET.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def compress_command(
    model: Annotated[
        str, typer.Argument(help="Alias (smollm2-135m), checkpoint folder, .gguf, or Hub id.")
    ],
    budget: Annotated[
        str,
        typer.Option(
            help="Mean bits per cached element (2.5), or bytes at a length (512MiB@32768)."
        ),
    ] = "2.5",
    out: OutOption = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Text file, or datasets id as ID:CONFIG:SPLIT, joined by the built-in text; default: that alone."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="best, skvq, skvq-v1.5, pm-kvq, or a YAML file of choices.")
    ] = "best",
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens at which plain bits count; default 32768 or the model's maximum."
        ),
    ] = None,
    device: DeviceOption = "auto",
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_SEED - 1, help="Seed of everything random; default 0."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run left.")
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory to count on (8GiB); default: what is free. Bigger models are read layer by layer."
        ),
    ] = None,
    accept_loss: Annotated[
        bool,
        typer.Option(
            "--accept-loss", help="Write the artifact also where the measured KL is above 3 nats."
        ),
    ] = False,
    processes: Annotated[
        int,
        typer.Option(min=1, help="Processes on a CPU that share the work and the cores."),
    ] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Writes a checkpoint whose KV cache is small. The last line printed is its path.

    Where torchrun or accelerate launch starts several, they share the work, and the first one prints.
    """
    from kvfold.compress.launch import join
    from kvfold.compress.local import check_processes, started
    from kvfold.compress.pipeline import compress
    from kvfold.compress.processes import Processes
    from kvfold.compress.recipe import load_recipe

    target = out or default_output(model, budget)
    check_processes(processes, device, [model, recipe, calib])
    flags = (("--resume", resume), ("--accept-loss", accept_loss))
    given = {
        "budget": budget, "out": target, "recipe": recipe, "calib": calib, "context": context, "device": device,
        "seed": seed, "max-memory": max_memory,
    }  # fmt: skip
    words = [
        x for name, value in given.items() if value is not None for x in (f"--{name}", str(value))
    ]
    words = ["compress", *words, *(name for name, on in flags if on), "--", model]
    with started(processes, words), join(device) as own_device:
        artifact = compress(
            model,
            budget,
            target,
            calib=calib,
            recipe=load_recipe(recipe, seed),
            device=own_device,
            context=context,
            resume=resume,
            max_memory=None if max_memory is None else parse_nbytes(max_memory),
            accept_loss=accept_loss,
        )
        prints = Processes.current().first
    if not prints:
        return
    if as_json:
        print(json.dumps({"artifact": str(target), **describe(artifact.metadata)}))
        return
    print_table(artifact.metadata)
    print(target)
