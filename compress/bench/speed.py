"""`kvfold bench kernel | prompt | decode | memory`: speed and memory, each against 16-bit caches in the same run on one
machine."""

import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvfold.errors import KvfoldError

if TYPE_CHECKING:  # torch is slow to import, and --help needs none
    from kvfold.compress.bench.tools import Stream

SHAPES = [
    *(f"32/{kv}x{batch}" for kv in (32, 8) for batch in ("1x131072", "16x32768")),
    *(f"32/{kv}x1x{tokens}" for kv in (32, 8) for tokens in (4096, 8192, 16384, 32768)),
]

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the figures to this file.")
]
SinksOption = Annotated[int, typer.Option(min=0, help="First tokens, kept in 16 bits.")]
WindowOption = Annotated[int, typer.Option(min=0, help="Last tokens, kept in 16 bits.")]
PageOption = Annotated[int, typer.Option(help="Tokens of a page: 16, 32, 64 or 128.")]
BaselinesOption = Annotated[
    str, typer.Option(help="none; eager: DynamicCache; all: and StaticCache compiled.")
]


def split(text: str) -> list[str]:
    """The parts of a,b,c."""
    return [part.strip() for part in text.split(",") if part.strip()]


def check_options(json_file: Path | None, page_tokens: int, **sizes: int) -> None:
    """Refuses what could not be written or measured, before anything runs."""
    if json_file and not json_file.absolute().parent.is_dir():
        raise KvfoldError(
            f"--json '{json_file}' lies in a folder that does not exist; make it or choose another file."
        )
    if page_tokens not in (16, 32, 64, 128):
        raise KvfoldError(
            f"--page-tokens {page_tokens} is not a page that is measured; choose 16, 32, 64 or 128."
        )
    for name, size in sizes.items():
        if size < 1:
            raise KvfoldError(f"--{name} {size} is not a size; give 1 or more.")


def write_json(json_file: Path | None, result: dict[str, Any]) -> None:
    """Writes a command's figures, if a file was asked for."""
    if json_file:
        json_file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return value if value == value and abs(value) != float("inf") else None


def kernel_command(
    formats: Annotated[
        str, typer.Option(help="Formats by name: k2v2,best,best-b,k2v1.6,k4v4.")
    ] = "k2v2,best,best-b,k2v1.6,k4v4",
    shapes: Annotated[str, typer.Option(help="HEADS/KV_HEADSxBATCHxTOKENS,…")] = ",".join(SHAPES),
    head_dim: Annotated[int, typer.Option(help="Channels of a head, a multiple of 64.")] = 128,
    sinks: SinksOption = 5,
    window: WindowOption = 128,
    page_tokens: PageOption = 32,
    gate_tokens: Annotated[
        int, typer.Option(help="Longest sequence that the correctness gate checks.")
    ] = 3333,
    flex: Annotated[
        bool, typer.Option("--flex/--no-flex", help="Compare with compiled FlexAttention too.")
    ] = True,
    jobs: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that compile in advance; default: the cores."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the gate's inputs; default: a new one each time.")
    ] = None,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Times decode attention over packed pages, after checking it;
    prints no speed and exits with 1 if the check fails."""
    check_options(json_file, page_tokens, **{"gate-tokens": gate_tokens})
    from kvfold.compress.plan import pick_device

    target = pick_device(device)
    from kvfold.kernels.gpu.attention import INTERPRET

    if target.type != "cuda" and not INTERPRET:
        raise KvfoldError(
            "`kvfold bench kernel` needs a CUDA device; to try the gate on a CPU set TRITON_INTERPRET=1."
        )
    from kvfold.compress.bench import kernel as bk
    from kvfold.compress.bench.cases import Shape, pair
    from kvfold.compress.bench.tools import machine, measured_streams

    names, sizes = split(formats), [Shape.parse(text) for text in split(shapes)]
    for name in names:
        pair(name, head_dim)
    if jobs is None:
        jobs = len(os.sched_getaffinity(0)) if target.type == "cuda" else 0
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    settings = bk.Settings(
        target, head_dim, sinks, window, page_tokens, gate_tokens, flex, jobs, seed
    )
    start = time.perf_counter()
    print(f"gate and compilation in {jobs or 'no other'} processes, seed {seed}", file=sys.stderr)
    checks = bk.prepare(settings, names, sizes)
    gate: list[dict[str, Any]] = [
        {"check": name, "error": finite(error), "at_most": most, "passed": error <= most}
        for name, error, most in checks
    ]
    checked = time.perf_counter()
    result: dict[str, Any] = {
        "seed": seed,
        "gate": gate,
        "seconds": {"gate": checked - start},
        "rows": [],
    }
    failed = [check for check in gate if not check["passed"]]
    if failed:
        for check in failed:
            print(
                f"kvfold: gate: {check['check']}: error {check['error']} > {check['at_most']}",
                file=sys.stderr,
            )
        print(
            f"kvfold: {len(failed)} of {len(gate)} checks failed (seed {seed}); no speed is measured.",
            file=sys.stderr,
        )
        write_json(json_file, result)
        raise typer.Exit(1)
    where, streams = machine(target), measured_streams(target)
    worst = max(check["error"] / check["at_most"] for check in gate)
    print(
        f"gate: {len(gate)} checks passed, the worst at {worst:.2f} of what is allowed\n{best_stream(streams)}"
    )
    result |= {"machine": where, "streams": [stream._asdict() for stream in streams]}
    for row in bk.rows(settings, names, sizes, streams[0].bytes_per_s):
        print(bk.line(row, where), flush=True)
        result["rows"].append(row)
    result["seconds"]["timing"] = time.perf_counter() - checked
    print(
        f"{checked - start:.0f} s for the gate and compilation, {result['seconds']['timing']:.0f} s for timing",
        file=sys.stderr,
    )
    write_json(json_file, result)


def prompt_command(
    formats: Annotated[
        str, typer.Option(help="Formats by name: k2v2,best,k2v1.6,k4v4,16.")
    ] = "k2v2,best",
    shape: Annotated[str, typer.Option(help="llama3-8b or llama2-7b.")] = "llama3-8b",
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 32768,
    chunk: Annotated[int, typer.Option(help="Tokens that go through the model at a time.")] = 8192,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Time DynamicCache with sdpa too.")
    ] = True,
    sinks: SinksOption = 5,
    window: WindowOption = 128,
    page_tokens: PageOption = 32,
    gate_tokens: Annotated[
        int, typer.Option(help="Tokens of the correctness gate's sequence.")
    ] = 3333,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the gate's inputs; default: a new one each time.")
    ] = None,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Times a prompt of a model with random weights, after checking its attention; exits with 1 if
    the check fails."""
    check_options(
        json_file, page_tokens, tokens=tokens, chunk=chunk, **{"gate-tokens": gate_tokens}
    )
    import torch

    from kvfold.compress.bench.cases import pair
    from kvfold.compress.bench.model import SHAPES, check_names
    from kvfold.compress.bench.prompt import gate, prompt_rows
    from kvfold.compress.bench.tools import machine
    from kvfold.compress.plan import pick_device
    from kvfold.kernels.gpu.attention import INTERPRET

    target, names = pick_device(device), split(formats)
    check_names(shape, names)
    if target.type != "cuda" and not INTERPRET:
        raise KvfoldError(
            "`kvfold bench prompt` needs a CUDA device; to try the gate on a CPU set TRITON_INTERPRET=1."
        )
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    torch.manual_seed(seed)
    size, regions = SHAPES[shape], (sinks, window, page_tokens)
    heads = (size["num_attention_heads"], size["num_key_value_heads"])
    checks = gate(
        {name: pair(name, size["head_dim"]) for name in names}, regions, heads, gate_tokens, target
    )
    failed = [
        f"{name}: error {error} > {most}" for name, error, most in checks if not error <= most
    ]
    for text in failed:
        print(f"kvfold: gate: {text}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)
    where = machine(target)
    worst = max(error / most for _, error, most in checks)
    print(
        f"gate: {len(checks)} checks passed (seed {seed}), the worst at {worst:.2f} of what is allowed",
        flush=True,
    )
    rows = prompt_rows(shape, tokens, chunk, names, baseline, regions, target)
    for row in rows:
        ratio = f", {row['ratio']:.2f}× DynamicCache's speed" if row["ratio"] else ""
        peak = (
            ""
            if row["peak_bytes"] is None
            else f", peak {row['peak_bytes'] / 1e9:.2f} GB beside the weights"
        )
        speed = f"{row['ms']:.0f} ms, {row['tokens_per_s']:.0f} tokens/s"
        print(
            f"{row['cache']} {shape} 1x{tokens} by {chunk}: {speed}{ratio}{peak} | {describe(where)}",
            flush=True,
        )
    write_json(json_file, {"machine": where, "seed": seed, "rows": rows})


def decode_command(
    formats: Annotated[
        str, typer.Option(help="Formats by name: k2v2,best,k2v1.6,k4v4,16.")
    ] = "k2v2",
    shape: Annotated[str, typer.Option(help="llama3-8b or llama2-7b.")] = "llama3-8b",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens that each sequence holds.")] = 131072,
    baselines: BaselinesOption = "all",
    sinks: SinksOption = 5,
    window: WindowOption = 128,
    page_tokens: PageOption = 32,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Times whole decoding steps of a model with random weights on a full cache, replayed from a
    CUDA graph."""
    check_options(json_file, page_tokens, batch=batch, tokens=tokens)
    from kvfold.compress.bench.decode import chosen_baselines, decode_rows
    from kvfold.compress.bench.model import check_names
    from kvfold.compress.bench.tools import machine, measured_streams
    from kvfold.compress.plan import pick_device

    target = pick_device(device)
    names, kinds = split(formats), chosen_baselines(baselines)
    check_names(shape, names)
    where, streams = machine(target), measured_streams(target)
    print(best_stream(streams), flush=True)
    rate = streams[0].bytes_per_s
    rows = decode_rows(
        shape, batch, tokens, names, kinds, (sinks, window, page_tokens), target, rate
    )
    for row in rows:
        others = ", ".join(
            f"{kind} {ms:.1f} ms" if isinstance(ms, float) else f"{kind} {ms}"
            for kind, ms in row["baselines_ms"].items()
        )
        ratio = "" if row["ratio"] is None else f" {row['ratio']:.2f}× faster than the better;"
        print(
            f"{row['format']} {shape} {batch}x{tokens}: {row['ms']:.2f} ms a step, {row['over_floor']:.2f}× the floor "
            f"of {row['floor_ms']:.2f} ms;{ratio} {others or 'no baseline'} | {describe(where)}"
        )
    write_json(
        json_file, {"machine": where, "streams": [s._asdict() for s in streams], "rows": rows}
    )


def memory_command(
    formats: Annotated[
        str, typer.Option(help="Formats by name: k2v2,best,k2v1.6,k4v4; none for no batch.")
    ] = "k2v2",
    shape: Annotated[str, typer.Option(help="llama3-8b or llama2-7b.")] = "llama3-8b",
    tokens: Annotated[
        int, typer.Option(help="Tokens that each sequence of the batch holds.")
    ] = 32768,
    baselines: BaselinesOption = "eager",
    long_format: Annotated[str, typer.Option(help="Format of the long sequence.")] = "k2v1.6",
    long_shape: Annotated[str, typer.Option(help="Model of the long sequence.")] = "llama2-7b",
    long_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the long sequence; 0 leaves it out.")
    ] = 1 << 20,
    limit: Annotated[
        int, typer.Option(min=0, help="Bytes that caches may take; 0: what the device has free.")
    ] = 0,
    sinks: SinksOption = 5,
    window: WindowOption = 128,
    page_tokens: PageOption = 32,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Finds the largest batch that really runs in 16 bits and packed, with its tokens a second;
    and runs one long sequence."""
    check_options(json_file, page_tokens, tokens=tokens)
    import torch

    from kvfold.compress.bench.decode import chosen_baselines
    from kvfold.compress.bench.memory import long_row, memory_rows
    from kvfold.compress.bench.model import check_names
    from kvfold.compress.bench.tools import machine
    from kvfold.compress.plan import pick_device

    target = pick_device(device)
    names, kinds = [name for name in split(formats) if name != "none"], chosen_baselines(baselines)
    check_names(shape, names)
    check_names(long_shape, [long_format])
    where = machine(target)
    regions = (sinks, window, page_tokens)
    rows = memory_rows(shape, tokens, names, kinds, regions, target, limit) if names else []
    for row in rows:
        ratio = f", {row['ratio']:.2f}× the best in 16 bits" if row.get("ratio") else ""
        step = (
            f"{row['ms']:.1f} ms a step, {row['tokens_per_s']:.1f} tokens/s"
            if row["ms"]
            else "does not fit"
        )
        print(
            f"{row['cache']} {shape} {row['batch']}x{tokens}: {step}{ratio} | {describe(where)}",
            flush=True,
        )
    result: dict[str, Any] = {"machine": where, "rows": rows, "long": None}
    write_json(json_file, result)
    if not long_tokens:
        return
    try:
        long = long_row(long_shape, long_tokens, long_format, regions, target)
    except torch.OutOfMemoryError as error:
        print(
            f"kvfold: {long_tokens} tokens do not fit: {' '.join(str(error).split())}",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    write_json(json_file, result | {"long": long})
    peak = "" if long["peak_bytes"] is None else f", peak {long['peak_bytes'] / 1e9:.2f} GB"
    print(
        f"{long_format} {long_shape} 1x{long_tokens}: {long['ms']:.2f} ms a token, cache "
        f"{long['cache_bytes'] / 1e9:.2f} GB, weights {long['weights_bytes'] / 1e9:.2f} GB{peak} | {describe(where)}"
    )


def best_stream(streams: list["Stream"]) -> str:
    """The stream that figures are compared with, in words: what `measured_streams` found best."""
    best = streams[0]
    return f"best of {len(streams)} streams: {best.name}, {best.bytes_per_s / 1e12:.3f} TB/s"


def describe(where: dict[str, str]) -> str:
    """Machine and versions, for the end of a line."""
    return f"{where['device']}, torch {where['torch']}, triton {where['triton']}"


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    app.command("kernel")(kernel_command)
    app.command("prompt")(prompt_command)
    app.command("decode")(decode_command)
    app.command("memory")(memory_command)
