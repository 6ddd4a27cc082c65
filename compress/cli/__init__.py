"""The command line: `kvfold compress | eval | inspect | generate | validate | bench | kernels`."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kvfold.compress.bench import speed as bench_speed
from kvfold.compress.bench.quality import bench
from kvfold.compress.cli.compress import DeviceOption, JsonFlag, compress_command
from kvfold.compress.cli.export import export
from kvfold.compress.cli.kernels import kernels
from kvfold.compress.cli.push import push_command
from kvfold.compress.cli.report import report_command
from kvfold.compress.cli.table import describe, print_table, with_error
from kvfold.compress.exit_codes import exit_code
from kvfold.compress.progress import console, print_anything
from kvfold.errors import KvfoldError
from kvfold.exports.reader import fix_artifact, read_artifact, read_metadata, update_artifact
from kvfold.exports.schema import METADATA_NAME, MOST_SEED
from kvfold.exports.units import printable
from kvfold.pretrained import tokenizer_from_pretrained

# click's own, or that of the copy of click which newer releases of typer carry
UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
app.command("compress")(compress_command)
app.add_typer(export, name="export")
app.command("report")(report_command)
app.add_typer(bench, name="bench")
app.add_typer(kernels, name="kernels")
bench_speed.add_to(bench)


@app.command("inspect")
def inspect_command(
    artifact: Annotated[str, typer.Argument(help="The artifact's folder or Hub id.")],
    at: Annotated[
        int | None, typer.Option(help="Tokens of one sequence; default: the budget's length.")
    ] = None,
    as_json: JsonFlag = False,
    live: Annotated[
        bool, typer.Option("--live", help="Show the cache while the model continues --prompt.")
    ] = False,
    prompt: Annotated[str, typer.Option(help="--live: text to continue.")] = "The key-value cache",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="--live: tokens to add at the most.")
    ] = 256,
    policy: Annotated[
        str, typer.Option(help="--live: floor, or progressive with --kv-budget.")
    ] = "floor",
    kv_budget: Annotated[
        str | None, typer.Option(help="--live: bytes that the cache may take, e.g. 512MiB.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Shows formats, bits and bytes by layer; with --live, of a cache that fills."""
    from kvfold.runtime.load import resolve_artifact

    if live:
        from kvfold.compress.cli.live import watch
        from kvfold.compress.plan import pick_device

        watch(artifact, prompt, max_new_tokens, policy, kv_budget, pick_device(device), as_json)
        return
    metadata = read_metadata(resolve_artifact(artifact, allow_patterns=METADATA_NAME))
    if as_json:
        print(json.dumps(describe(metadata, at)))
    else:
        print_table(metadata, at)


@app.command("validate")
def validate_command(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="After an edit: sign the files as they are now, if all else is valid."
        ),
    ] = False,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix", help="Add what earlier versions did not write and serving engines need."
        ),
    ] = False,
) -> None:
    """Checks every hash, tensor and field of an artifact, and that its model and tokenizer load."""
    if fix:
        written = fix_artifact(artifact)
        print(
            f"{artifact}: wrote {', '.join(written)}."
            if written
            else f"{artifact}: nothing was missing."
        )
    if update:
        changed = update_artifact(artifact)
        print(
            f"{artifact}: signed {', '.join(changed)} anew."
            if changed
            else f"{artifact}: nothing has changed."
        )
    from kvfold.runtime.load import read_model

    found = read_artifact(artifact)
    read_model(found, "auto", device_map="meta")
    if any(name.startswith("tokenizer") for name in found.metadata.files):
        tokenizer_from_pretrained(artifact)
    print(
        printable(
            f"{artifact} is a valid artifact of {found.metadata.provenance.model}, format_version "
            f"{found.metadata.format_version}."
        )
    )


@app.command("eval")
def eval_command(
    ctx: typer.Context,
    artifact: Annotated[str, typer.Argument(help="The artifact's folder or Hub id.")],
    against: Annotated[
        str | None,
        typer.Option(
            help="Model whose 16-bit cache is the reference; default: the artifact's weights."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text file, or datasets id as ID:CONFIG:SPLIT; default: the held-out text."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows that do not overlap.")] = 3,
    first_window: Annotated[int, typer.Option(min=0, help="Window to begin with.")] = 0,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    device: DeviceOption = "auto",
    attention: Annotated[
        str, typer.Option(help="auto, reference (plain torch) or triton.")
    ] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead, tasks by generation: gsm8k, humaneval, needle, retrieval; --text is then the haystack."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Tasks: prompts of each at the most.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Tasks: prompts at a time.")] = 16,
    task_data: Annotated[
        str | None,
        typer.Option(help="Tasks: .jsonl file, folder, or datasets id as ID:CONFIG:SPLIT."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(min=0.0, help="Tasks: stop after a batch, in about so many seconds."),
    ] = None,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Tasks: allow humaneval to run the model's programs, in a process of their own with limits and what "
            "fences the system has. That stops accidents; it is no wall against a program that means harm, so run it "
            "in a container.",
        ),
    ] = False,
    draws: Annotated[int, typer.Option(min=1, help="Tasks: answers sampled for each prompt.")] = 1,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Tasks: of sampling; 0 is greedy text.")
    ] = 0.0,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tasks: tokens of prompt and answer; default: the model's maximum."
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Tasks: folder of the answers; default artifacts/NAME.tasks."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Tasks: go on with the answers that are there.")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_SEED - 1,
            help="Tasks: seed of needle, retrieval and the order of batches.",
        ),
    ] = 0,
) -> None:
    """Measures perplexity, KL and top-1 agreement, or tasks, through the packed cache against the
    16-bit cache."""
    from kvfold.compress.evaluate import evaluate
    from kvfold.compress.plan import pick_device
    from kvfold.compress.tasks.options import check_options
    from kvfold.compress.tasks.report import print_tasks
    from kvfold.compress.tasks.run import run_tasks

    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    check_options({name for name, x in sources.items() if x and x.name == "COMMANDLINE"}, tasks)
    if json_file and not json_file.absolute().parent.is_dir():
        raise KvfoldError(
            f"--json '{json_file}' lies in a folder that does not exist; make it or choose another file."
        )
    if tasks is not None:
        report = run_tasks(
            artifact, tasks, data=task_data, limit=limit, batch_size=batch_size, time_limit=time_limit,
            run_code=run_code, draws=draws, temperature=temperature, context=context, text=text, seed=seed,
            samples=samples, resume=resume, device=pick_device(device), attention=attention,
        )  # fmt: skip
        if json_file:  # first: stdout may be closed or full
            json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print_tasks(report)
        return
    e = evaluate(
        artifact,
        against=against,
        text=text,
        windows=windows,
        first_window=first_window,
        seq_len=seq_len,
        device=pick_device(device),
        attention=attention,
    )
    if json_file:
        json_file.write_text(json.dumps(e.to_dict(), indent=1) + "\n", encoding="utf-8")
    title = Text(printable(f"{e.artifact} on {e.text}: {e.windows} windows of {e.seq_len} tokens"))
    table = Table(title=title, title_justify="left")
    for column in ("cache", "effective bits", "payload bits", "loss", "perplexity", "KL", "top-1"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("16-bit", "16", "16", f"{e.nll_16bit:.4f}", f"{e.ppl_16bit:.3f}", "", "")
    table.add_row(
        "packed",
        f"{e.effective_bits:.3f}",
        f"{e.payload_bits:.3f}",
        f"{e.dnll:+.4f}{with_error(e.dnll_se)}",
        f"{e.ppl:.3f}",
        f"{e.kl:.4f}{with_error(e.kl_se)}",
        f"{e.top1_agreement:.4f}",
    )
    console().print(table)


@app.command("generate")
def generate_command(
    artifact: Annotated[str, typer.Argument(help="The artifact's folder or Hub id.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at the most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt through the chat template.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED - 1, help="For sampling.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Continues a prompt through the packed cache."""
    from kvfold.compress.cli.generate import generate
    from kvfold.compress.plan import pick_device

    generate(artifact, prompt, max_new_tokens, temperature, chat, seed, pick_device(device))


app.command("push")(push_command)


def main(args: list[str] | None = None, prog: str = "kvfold") -> None:
    """Runs the command line: exit code 0 done, 2 wrong usage or input (one line), 1 failure, 130
    interrupted (one line).

    Args:
        args: what stands after the command's name; default: of this process.
        prog: what the command is called in its help.
    """
    words = (sys.argv[1:] if args is None else args) or ["--help"]
    sys.exit(exit_code(lambda: _run(words, prog), words))


def _run(words: list[str], prog: str) -> int:
    import torch

    from kvfold.compress.models import quiet_transformers

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    print_anything()
    quiet_transformers()
    torch.set_flush_denormal(True)  # masked softmax is several times slower with denormals on a CPU
    try:
        return app(words, prog_name=prog, standalone_mode=False)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else prog
        print(
            f"kvfold: {' '.join(error.format_message().split())} See `{command} --help`.",
            file=sys.stderr,
        )
    except KvfoldError as error:
        print(f"kvfold: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return 2
