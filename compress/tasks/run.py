"""`kvfold eval --tasks`: accuracy by generation through the packed cache and through the 16-bit cache, on the same prompts."""

import hashlib
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from kvfold import __version__
from kvfold.compress.progress import progress, stage
from kvfold.compress.tasks import TASKS
from kvfold.compress.tasks.generator import CacheName, PairedGenerator, batches_of
from kvfold.compress.tasks.mcnemar import compare
from kvfold.compress.tasks.samples import Samples
from kvfold.compress.tasks.task import Judgement, Prompt, Setting, Task
from kvfold.compress.text import HELD_OUT, read_documents
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, cache_nbytes
from kvfold.kernels.attention import packed_tokens
from kvfold.runtime.load import load_pretrained, resolve_artifact

CACHES: tuple[CacheName, CacheName] = ("16bit", "packed")
TASK_OPTIONS = {
    "limit": "how many prompts of a task", "batch_size": "prompts at a time", "task_data": "a task's data", "time_limit": "when tasks stop",
    "run_code": "running what a task wrote", "context": "how long a task's prompts are", "samples": "where answers go", "resume": "going on with a task",
    "seed": "a task's random numbers",
}  # fmt: skip
NOT_WITH_TASKS = {"against", "windows", "first_window", "seq_len"}


@dataclass(frozen=True)
class TaskResult:
    """One task's figures over the prompts that both caches answered; accuracies are shares of 1, points percentage points."""

    task: str
    prompts: int  # that there are
    pairs: int  # answered by both
    accuracy_16bit: float
    accuracy: float
    lost: int  # right with the 16-bit cache alone
    gained: int  # right with the packed cache alone
    points: float
    points_se: float | None
    p: float  # McNemar, exact, two-sided
    same_text: float  # share of pairs with the same continuation to the last character
    packed_share: (
        float  # of the tokens that a new token reads, those read from pages: mean over new tokens, then prompts
    )
    prompt_tokens: float  # mean
    new_tokens_16bit: float  # mean
    new_tokens: float  # mean
    effective_bits: float  # of all these sequences at their end, everything resident counted
    seconds_16bit: float  # of generating
    seconds: float


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
        KvfoldError: an unknown task; one that runs code without `run_code`; data that no task, or more than one, reads.
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
        raise KvfoldError(f"--task-data '{data}' cannot serve {' and '.join(readers)}; give a folder that holds both.")
    return wanted


def packed_share(geometry: Geometry, prompt_tokens: int, new_tokens: int) -> float:
    """Share of tokens read from pages when a token is made, mean over the new ones (at least the first)."""
    shares = [
        packed_tokens(n, geometry.sinks, geometry.window, geometry.page_tokens) / n
        for n in range(prompt_tokens, prompt_tokens + max(1, new_tokens))
    ]
    return sum(shares) / len(shares)


class TaskRunner:
    """Runs tasks on a loaded artifact.

    Args:
        model: from load_pretrained.
        tokenizer: the artifact's.
        samples: folder of the answers.
        key: what answers depend on besides the prompts.
        batch_size: prompts at a time.
        resume: go on with the answers that are there.
    """

    def __init__(self, model: Any, tokenizer: Any, samples: Path, key: dict, batch_size: int, resume: bool) -> None:
        self.generator = PairedGenerator(model, tokenizer)
        self.geometry: Geometry = model.kv_artifact.geometry
        self.formats = model.kv_artifact.formats
        self.samples, self.key, self.batch_size, self.resume = samples, key, batch_size, resume

    def run(self, name: str, task: Task, setting: Setting, seconds: float | None) -> TaskResult:
        """Answers a task's prompts, or as many batches of them as the time allows.

        Args:
            seconds: no batch begins that, going by those before, would end later; None for no limit.
        """
        begun = time.monotonic()
        prompts = task.prompts(setting)
        samples = Samples(self.samples / f"{name}.jsonl", {"task": name, **self.key}, self.resume)
        batches = batches_of([p for p in prompts if not samples.has(p)], self.batch_size, task.max_new_tokens)
        random.Random(setting.seed).shuffle(batches)  # stopping early must not leave the short prompts alone
        spent: list[float] = []
        for batch in progress(batches, name, "batch"):
            start = time.monotonic()
            usual = spent[1:] or spent or [0.0]  # the first one compiles and loads
            if seconds is not None and start - begun + sum(usual) / len(usual) > seconds:
                break
            samples.add(self._answer(task, batch))
            spent.append(time.monotonic() - start)
        found = [samples.records[p.id] for p in prompts if p.id in samples.records]
        if not found:
            raise KvfoldError(f"--time-limit left no time for a batch of {name}; give more seconds or fewer tasks.")
        return self._result(name, len(prompts), found)

    def _answer(self, task: Task, batch: list[Prompt]) -> list[dict[str, Any]]:
        texts, seconds = {}, {}
        for cache in CACHES:
            start = time.monotonic()
            texts[cache] = self.generator.generate(batch, cache, task.max_new_tokens, task.stops)
            seconds[cache] = (time.monotonic() - start) / len(batch)
        jobs = list(dict.fromkeys((row, texts[cache][row][0]) for cache in CACHES for row in range(len(batch))))
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1) if task.runs_code else 1) as pool:
            judged = dict(zip(jobs, pool.map(lambda job: task.judge(batch[job[0]], job[1]), jobs), strict=True))
        return [
            {
                "id": prompt.id,
                "prompt_sha256": prompt.sha256,
                "prompt_tokens": len(prompt.ids),
                "facts": {k: v for k, v in prompt.facts.items() if not isinstance(v, str) or len(v) < 100},
                "packed_share": packed_share(self.geometry, len(prompt.ids), texts["packed"][row][1]),
                **{cache: self._side(*texts[cache][row], judged[row, texts[cache][row][0]], seconds[cache]) for cache in CACHES},
            }
            for row, prompt in enumerate(batch)
        ]  # fmt: skip

    @staticmethod
    def _side(text: str, new_tokens: int, judged: Judgement, seconds: float) -> dict[str, Any]:
        return {
            "answer": judged.answer,
            "correct": judged.correct,
            "new_tokens": new_tokens,
            "seconds": seconds,
            "text": text,
        }

    def _result(self, name: str, prompts: int, records: list[dict[str, Any]]) -> TaskResult:
        pair = compare([r["16bit"]["correct"] for r in records], [r["packed"]["correct"] for r in records])
        lengths = [r["prompt_tokens"] + r["packed"]["new_tokens"] for r in records]

        def mean(values: list[Any]) -> float:
            return sum(values) / len(values)

        return TaskResult(
            task=name,
            prompts=prompts,
            pairs=pair.n,
            accuracy_16bit=pair.accuracy_first,
            accuracy=pair.accuracy,
            lost=pair.lost,
            gained=pair.gained,
            points=pair.points,
            points_se=pair.points_se,
            p=pair.p,
            same_text=mean([r["16bit"]["text"] == r["packed"]["text"] for r in records]),
            packed_share=mean([r["packed_share"] for r in records]),
            prompt_tokens=mean([r["prompt_tokens"] for r in records]),
            new_tokens_16bit=mean([r["16bit"]["new_tokens"] for r in records]),
            new_tokens=mean([r["packed"]["new_tokens"] for r in records]),
            effective_bits=8
            * sum(cache_nbytes(self.geometry, self.formats, n) for n in lengths)
            / sum(self.geometry.elements(n, len(self.formats)) for n in lengths),
            seconds_16bit=sum(r["16bit"]["seconds"] for r in records),
            seconds=sum(r["packed"]["seconds"] for r in records),
        )


def run_tasks(
    artifact: str,
    names: str,
    *,
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    time_limit: float | None = None,
    run_code: bool = False,
    context: int | None = None,
    text: str | None = None,
    seed: int = 0,
    samples: Path | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Measures an artifact on tasks.

    Args:
        artifact: folder or Hub id.
        names: tasks, separated by commas.
        data: file, folder or datasets id of the task that reads one.
        limit: prompts of each task at the most.
        time_limit: seconds from now in which all tasks should be done; what is left is shared between the tasks left.
        context: tokens of prompt and answer at the most; default and limit: the model's maximum.
        text: haystack, a file or datasets id; default: the held-out text that the package ships.
        samples: folder of the answers, one JSON-lines file a task; default artifacts/NAME.tasks.
        resume: go on with the answers that are there.
        device, dtype: as in load_pretrained. On a CPU, by default, the "16-bit" cache is float32: a stricter reference.
    Returns:
        {model, artifact, device, dtype, batch_size, payload_bits, context, seed, samples, tasks: [TaskResult as a dict]}
    """
    begun = time.monotonic()
    wanted = parse_tasks(names, data, run_code)
    path = resolve_artifact(artifact)
    model: Any = load_pretrained(path, device=device, dtype=dtype)
    metadata = model.kv_artifact.metadata
    most = model.config.max_position_embeddings
    if context is not None and context > most:
        raise KvfoldError(f"--context {context} passes the model's maximum of {most}; give that or less.")
    tokenizer = AutoTokenizer.from_pretrained(path)
    haystack = "\n\n".join(read_documents(text, default=(HELD_OUT,))[1])
    folder = (
        samples
        or Path("artifacts") / f"{path.resolve().name if Path(artifact).is_dir() else Path(artifact).name}.tasks"
    )
    info = {
        "artifact_sha256": hashlib.sha256((path / "kv_cache.json").read_bytes()).hexdigest(),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"kvfold": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    runner = TaskRunner(model, tokenizer, folder, info, batch_size, resume)
    results = []
    for done, name in enumerate(wanted):
        setting = Setting(tokenizer, context or most, limit, data, haystack, seed)
        left = None if time_limit is None else (begun + time_limit - time.monotonic()) / (len(wanted) - done)
        results.append(runner.run(name, TASKS[name], setting, left))
        r = results[-1]
        stage(f"{name}: {r.pairs} of {r.prompts} prompts, {r.accuracy_16bit:.3f} → {r.accuracy:.3f}, p {r.p:.3f}")
    return {
        "model": metadata.provenance.model,
        "artifact": Path(artifact).name,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": info["dtype"],
        "batch_size": batch_size,
        "payload_bits": metadata.account.payload_bits,
        "context": context or most,
        "seed": seed,
        "samples": str(folder),
        "tasks": [asdict(r) for r in results],
    }


def print_tasks(report: dict[str, Any]) -> None:
    """The table of `kvfold eval --tasks`, on stdout."""
    table = Table(
        title=f"{report['artifact']}: packed cache ({report['payload_bits']:.3f} payload bits) against {report['dtype']}, paired",
        title_justify="left",
    )
    for column in (
        "task",
        "pairs",
        "16-bit",
        "packed",
        "points",
        "lost",
        "gained",
        "p",
        "same text",
        "prompt",
        "packed tokens",
        "bits",
    ):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for r in report["tasks"]:
        error = "" if r["points_se"] is None else f" ± {r['points_se']:.2f}"
        table.add_row(
            r["task"], f"{r['pairs']}/{r['prompts']}", f"{r['accuracy_16bit']:.3f}", f"{r['accuracy']:.3f}", f"{r['points']:+.2f}{error}",
            str(r["lost"]), str(r["gained"]), f"{r['p']:.3f}", f"{r['same_text']:.2f}", f"{r['prompt_tokens']:.0f}", f"{r['packed_share']:.2f}",
            f"{r['effective_bits']:.2f}",
        )  # fmt: skip
    Console(width=140 if not sys.stdout.isatty() else None).print(table)
    print(f"Answers, one prompt a line: {report['samples']}")
