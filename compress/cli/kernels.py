"""The commands `kvfold kernels …`: what an artifact compiles, and a folder of kernels filled
ahead."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvfold.errors import KvfoldError

kernels = typer.Typer(
    help="Shows the GPU kernels that artifacts need, and compiles them ahead, with no GPU present."
)

ArchOption = Annotated[str, typer.Option(help="The GPU's architecture, e.g. sm_80, sm_89, sm_90.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="Of activations: bfloat16, float16 or float32; default: the weights'."),
]
PolicyOption = Annotated[str, typer.Option(help="floor, or progressive for every rung besides.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def check_options(arch: str, dtype: str | None, policy: str) -> None:
    """Refuses options that do not exist.

    Raises:
        KvfoldError: such an option.
    """
    from triton import knobs

    from kvfold.kernels.compile.build import CAPABILITIES

    if arch not in CAPABILITIES:
        raise KvfoldError(
            f"--arch '{arch}' is not one this version knows; use one of {', '.join(CAPABILITIES)}."
        )
    if policy not in ("floor", "progressive"):
        raise KvfoldError(
            f"--policy '{policy}' is not one this version knows; use 'floor' or 'progressive'."
        )
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise KvfoldError(
            f"--dtype '{dtype}' is not one that kernels take; use bfloat16, float16 or float32."
        )
    if knobs.runtime.interpret:
        raise KvfoldError("TRITON_INTERPRET=1 runs kernels without compiling them; unset it.")


def policies(policy: str) -> tuple[bool, ...]:
    """Whether pages have rungs, in each of the models to be compiled for."""
    return (False, True) if policy == "progressive" else (False,)


def artifact_jobs(folders: list[Path], arch: str, dtype: str | None, policy: str) -> list[Any]:
    """kernels.compile.build.Job of every distinct kernel that artifacts need on an architecture."""
    import torch

    from kvfold.kernels.compile.build import CAPABILITIES, MULTIPROCESSORS, jobs_of, target_of
    from kvfold.runtime.generate.compile import artifact_launches

    wanted = None if dtype is None else getattr(torch, dtype)
    count = MULTIPROCESSORS[CAPABILITIES[arch]]
    launches = [
        x
        for path in folders
        for rungs in policies(policy)
        for x in artifact_launches(path, wanted, rungs, count)
    ]
    return jobs_of(launches, target_of(arch))


def catalogue_jobs(
    dims: list[int], heads: tuple[int, int], arch: str, dtype: str | None, policy: str
) -> list[Any]:
    """kernels.compile.build.Job of the catalogue's pairs of formats, as the default recipe stores
    them.

    Args:
        heads: query heads and KV heads, which kernels have as constants.
    Raises:
        KvfoldError: a head_dim that the catalogue lacks.
    """
    import torch

    from kvfold.compress.recipe import Recipe
    from kvfold.exports.account import Geometry
    from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
    from kvfold.kernels import catalogue
    from kvfold.kernels.compile.build import CAPABILITIES, MULTIPROCESSORS, jobs_of, target_of
    from kvfold.runtime.generate.ahead import catalogue_kinds
    from kvfold.runtime.generate.compile import Kind, launches_of

    recipe, count, found = Recipe(), MULTIPROCESSORS[CAPABILITIES[arch]], []
    for dim in dims:
        pairs = catalogue.pairs(dim)
        if not pairs:
            raise KvfoldError(
                f"--head-dim {dim} is none that the catalogue has; use {catalogue.HEAD_DIMS}."
            )
        eye = torch.eye(dim).expand(heads[1], dim, dim).contiguous()
        key = KeySpec(pairs[0][0], matrix=eye, offset=torch.ones(heads[1], dim), frequencies=(1.0,))
        kinds = catalogue_kinds([Kind(LayerSpec(key, ValueSpec(pairs[0][1])), 0, None, False)])
        geometry = Geometry(heads[1], dim, recipe.sinks, recipe.least_window, recipe.page_tokens)
        for rungs in policies(policy):
            found += launches_of(
                kinds, geometry, heads[0], getattr(torch, dtype or "bfloat16"), rungs, count
            )
    return jobs_of(found, target_of(arch))


@kernels.command("list")
def list_command(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    arch: ArchOption = "sm_90",
    dtype: DtypeOption = None,
    policy: PolicyOption = "floor",
    as_json: JsonFlag = False,
) -> None:
    """Shows the kernels that an artifact needs, and which of them the cache folder has."""
    from kvfold.kernels.compile.build import is_built
    from kvfold.kernels.compile.kernel_cache import folder, install

    check_options(arch, dtype, policy)
    install()
    jobs = artifact_jobs([artifact], arch, dtype, policy)
    found = {job.hash: is_built(job) for job in jobs}
    if as_json:
        rows = [{"name": job.name, "hash": job.hash, "compiled": found[job.hash]} for job in jobs]
        print(json.dumps({"folder": folder(), "arch": arch, "kernels": rows}))
        return
    table = Table(
        title=f"{sum(found.values())} of {len(jobs)} kernels are in {folder()}",
        title_justify="left",
    )
    for column in ("kernel", "constants", "compiled"):
        table.add_column(column)
    for job in jobs:
        table.add_row(
            job.name, job.label.partition("(")[2].rstrip(")"), "yes" if found[job.hash] else "no"
        )
    Console(width=160).print(table)


@kernels.command("build")
def build_command(
    artifact: Annotated[
        list[Path] | None,
        typer.Option(help="An artifact's folder, whose kernels to compile; repeatable."),
    ] = None,
    arch: ArchOption = "sm_90",
    dtype: DtypeOption = None,
    policy: PolicyOption = "floor",
    catalogue: Annotated[
        bool,
        typer.Option(
            "--catalogue",
            help="Compile the catalogue's formats, for --head-dim, --heads and --kv-heads.",
        ),
    ] = False,
    head_dim: Annotated[
        str, typer.Option(help="--catalogue: channels of a head, separated by commas.")
    ] = "64,128",
    heads: Annotated[int, typer.Option(min=1, help="--catalogue: query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="--catalogue: KV heads.")] = 8,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
) -> None:
    """Compiles what the cache folder (TRITON_CACHE_DIR) lacks. The last line printed is the
    folder."""
    from kvfold.kernels.compile.build import Builder
    from kvfold.kernels.compile.kernel_cache import folder

    if not artifact and not catalogue:
        raise KvfoldError(
            "Nothing says which kernels to compile; give --artifact DIR, once or more, or --catalogue."
        )
    if catalogue and (
        heads % kv_heads or not all(part.strip().isdecimal() for part in head_dim.split(","))
    ):
        raise KvfoldError(
            f"--head-dim {head_dim} must be numbers, and --heads {heads} a multiple of --kv-heads {kv_heads}; change "
            "them."
        )
    check_options(arch, dtype, policy)
    with Builder(jobs) as builder:
        builder.start()
        wanted = artifact_jobs(artifact or [], arch, dtype, policy)
        if catalogue:
            more = catalogue_jobs(
                [int(x) for x in head_dim.split(",")], (heads, kv_heads), arch, dtype, policy
            )
            wanted = list({job.hash: job for job in [*wanted, *more]}.values())
        builder.build(wanted)
        builder.wait()
    for job, message in builder.failed:
        print(f"{job.label}: {message}")
    if builder.failed or builder.lost:
        raise typer.Exit(1)
    print(f"{builder.count} kernels, {builder.compiled} compiled now")
    print(folder())
