"""The commands `kvfold kernels …`: what an artifact compiles, and a folder of kernels filled ahead."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvfold.errors import KvfoldError

kernels = typer.Typer(help="Shows the GPU kernels that artifacts need, and compiles them ahead, with no GPU present.")

ArchOption = Annotated[str, typer.Option(help="The GPU's architecture, e.g. sm_80, sm_89, sm_90.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="Of activations: bfloat16, float16 or float32; default: the weights'.")
]
PolicyOption = Annotated[str, typer.Option(help="floor, or progressive for every rung besides.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def jobs_for(folders: list[Path], arch: str, dtype: str | None, policy: str) -> list[Any]:
    """kernels.build.Job of every distinct kernel that artifacts need on an architecture.

    Raises:
        KvfoldError: an option that does not exist, or no artifact.
    """
    import torch
    from triton import knobs

    from kvfold.kernels.build import CAPABILITIES, MULTIPROCESSORS, jobs_of, target_of
    from kvfold.runtime.compile import artifact_launches

    if arch not in CAPABILITIES:
        raise KvfoldError(f"--arch '{arch}' is not one this version knows; use one of {', '.join(CAPABILITIES)}.")
    if policy not in ("floor", "progressive"):
        raise KvfoldError(f"--policy '{policy}' is not one this version knows; use 'floor' or 'progressive'.")
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise KvfoldError(f"--dtype '{dtype}' is not one that kernels take; use bfloat16, float16 or float32.")
    if knobs.runtime.interpret:
        raise KvfoldError("TRITON_INTERPRET=1 runs kernels without compiling them; unset it.")
    wanted = None if dtype is None else getattr(torch, dtype)
    count = MULTIPROCESSORS[CAPABILITIES[arch]]
    launches = [launch for folder in folders for launch in artifact_launches(folder, wanted, False, count)]
    if policy == "progressive":
        launches += [launch for folder in folders for launch in artifact_launches(folder, wanted, True, count)]
    return jobs_of(launches, target_of(arch))


@kernels.command("list")
def list_command(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    arch: ArchOption = "sm_90",
    dtype: DtypeOption = None,
    policy: PolicyOption = "floor",
    as_json: JsonFlag = False,
) -> None:
    """Shows the kernels that an artifact needs, and which of them the cache folder has."""
    from kvfold.kernels.build import is_built
    from kvfold.kernels.kernel_cache import folder, install

    install()
    jobs = jobs_for([artifact], arch, dtype, policy)
    found = {job.hash: is_built(job) for job in jobs}
    if as_json:
        rows = [{"name": job.name, "hash": job.hash, "compiled": found[job.hash]} for job in jobs]
        print(json.dumps({"folder": folder(), "arch": arch, "kernels": rows}))
        return
    table = Table(title=f"{sum(found.values())} of {len(jobs)} kernels are in {folder()}", title_justify="left")
    for column in ("kernel", "constants", "compiled"):
        table.add_column(column)
    for job in jobs:
        table.add_row(job.name, job.label.partition("(")[2].rstrip(")"), "yes" if found[job.hash] else "no")
    Console(width=160).print(table)


@kernels.command("build")
def build_command(
    artifact: Annotated[
        list[Path] | None, typer.Option(help="An artifact's folder, whose kernels to compile; repeatable.")
    ] = None,
    arch: ArchOption = "sm_90",
    dtype: DtypeOption = None,
    policy: PolicyOption = "floor",
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
) -> None:
    """Compiles what the cache folder (TRITON_CACHE_DIR) lacks. The last line printed is the folder."""
    from kvfold.kernels.build import Builder
    from kvfold.kernels.kernel_cache import folder

    if not artifact:
        raise KvfoldError("Nothing says which kernels to compile; give --artifact DIR, once or more.")
    with Builder(jobs) as builder:
        builder.build(jobs_for(artifact, arch, dtype, policy))
        builder.wait()
    for job, message in builder.failed:
        print(f"{job.label}: {message}")
    if builder.failed or builder.lost:
        raise typer.Exit(1)
    print(f"{builder.count} kernels, {builder.compiled} compiled now")
    print(folder())
