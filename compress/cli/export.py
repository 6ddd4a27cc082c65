"""The commands `kvfold export …`: an artifact's weights in forms that other engines read."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvfold.compress.progress import console

export = typer.Typer(help="Writes an artifact's weights in a form that another engine reads.")

ArtifactArgument = Annotated[Path, typer.Argument(help="The artifact's folder.")]
OutArgument = Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")]
CalibOption = Annotated[
    str | None,
    typer.Option(help="Text file, or datasets id as ID:CONFIG:SPLIT; default: the built-in text."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]


@export.command("compressed-tensors")
def compressed_tensors_command(
    artifact: ArtifactArgument,
    out: OutArgument,
    strategy: Annotated[
        str, typer.Option(help="Scales: tensor (one a layer) or attn_head (one a KV head).")
    ] = "tensor",
    calib: CalibOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Plain weights with calibrated fp8 KV scales, for vLLM and SGLang. The last line printed is
    the folder."""
    from kvfold.compress.plan import pick_device
    from kvfold.compress.targets.engines import export_compressed_tensors

    export_compressed_tensors(artifact, out, strategy, calib, pick_device(device))
    print(out)


@export.command("modelopt")
def modelopt_command(
    artifact: ArtifactArgument,
    out: OutArgument,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Mean payload bits, 4.5 (all NVFP4) to 8 (all FP8); default: the artifact's, at least 4.5."
        ),
    ] = None,
    calib: CalibOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Plain weights with a per-layer map of FP8 and NVFP4 caches,
    for engines that read Model Optimizer's checkpoints."""
    from kvfold.compress.plan import pick_device
    from kvfold.compress.targets.engines import export_modelopt

    found = export_modelopt(artifact, out, bits, calib, pick_device(device))
    table = Table(title="KL of each layer alone, in nats", title_justify="left")
    for column in ("layer", "format", *found.losses):
        table.add_column(column, justify="left" if column == "format" else "right", no_wrap=True)
    for i, algo in enumerate(found.algos):
        table.add_row(str(i), algo, *(f"{losses[i]:.2e}" for losses in found.losses.values()))
    console().print(table)
    print(
        f"{found.bits:.3f} payload bits; KL on calibration text {found.kl:.2e} nats with all layers in their formats."
    )
    print(out)


@export.command("onnx")
def onnx_command(
    artifact: ArtifactArgument,
    out: OutArgument,
    form: Annotated[
        str,
        typer.Option(
            help="Cache: packed (the artifact's own), gqa (uniform, for GroupQueryAttention) or 16bit."
        ),
    ] = "packed",
    bits: Annotated[int | None, typer.Option(help="Of gqa: 8 or 4; default 8.")] = None,
    calib: CalibOption = None,
    device: DeviceOption = "auto",
) -> None:
    """ONNX graphs for onnxruntime, cache included. The last line printed is the folder."""
    from kvfold.compress.plan import pick_device
    from kvfold.compress.targets.onnx import export_onnx

    found = export_onnx(artifact, out, form, bits, calib, pick_device(device))
    cost = "" if found.kl is None else f"; KL on calibration text {found.kl:.2e} nats"
    print(f"{found.nbytes} bytes; {found.cache_bits:.3f} payload bits a cached element{cost}.")
    print(out)
