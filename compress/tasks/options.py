"""Which tasks `kvfold eval` is asked for, and which of its options go together."""

from pathlib import Path

from kvfold.compress.tasks import TASKS
from kvfold.errors import KvfoldError

TASK_OPTIONS = {
    "limit": "how many prompts of a task",
    "batch_size": "prompts at a time",
    "task_data": "a task's data",
    "time_limit": "when tasks stop",
    "run_code": "running what a task wrote",
    "context": "how long a task's prompts are",
    "samples": "where answers go",
    "resume": "going on with a task",
    "seed": "a task's random numbers",
    "draws": "how many answers a prompt gets",
    "temperature": "how answers are sampled",
}
NOT_WITH_TASKS = {"against", "windows", "first_window", "seq_len"}


def check_options(given: set[str], tasks: str | None) -> None:
    """Refuses options of `kvfold eval` that have no effect.

    Args:
        given: parameters named on the command line.
        tasks: the value of --tasks.
    """
    flags = {name: "--" + name.replace("_", "-") for name in given}
    if tasks is None:
        for name in sorted(given & TASK_OPTIONS.keys()):
            raise KvfoldError(
                f"{flags[name]} says {TASK_OPTIONS[name]}, and no task is asked for; add --tasks or drop it."
            )
    elif wrong := sorted(given & NOT_WITH_TASKS):
        raise KvfoldError(
            f"{flags[wrong[0]]} belongs to the perplexity measurement, which --tasks replaces; drop one of the two."
        )


def parse_tasks(names: str, data: str | None, run_code: bool) -> list[str]:
    """The tasks of a comma-separated list, each once.

    Raises:
        KvfoldError: an unknown task; one that runs code without `run_code`; data that no task, or
            more than one, reads.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in wanted:
        if name not in TASKS:
            raise KvfoldError(f"--tasks '{name}' is not a task; use {', '.join(TASKS)}.")
        if TASKS[name].runs_code and not run_code:
            raise KvfoldError(
                f"Task {name} runs programs that the model writes, under limits but with your rights; "
                "give --run-code to accept that, best in a container."
            )
    if not wanted:
        raise KvfoldError(f"--tasks '{names}' names no task; use {', '.join(TASKS)}.")
    readers = [name for name in wanted if TASKS[name].has_data]
    if data is not None and not readers:
        raise KvfoldError(
            f"--task-data '{data}' is read by none of {', '.join(wanted)}, which make their own; drop it."
        )
    if data is not None and len(readers) > 1 and not Path(data).is_dir():
        raise KvfoldError(
            f"--task-data '{data}' cannot serve {' and '.join(readers)}; give a folder that holds both."
        )
    return wanted
