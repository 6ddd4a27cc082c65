"""`kvfold eval --tasks`: accuracy by generation through the packed cache and through the 16-bit
cache, on the same prompts."""

import hashlib
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from kvfold.compress.progress import progress, stage
from kvfold.compress.tasks import TASKS
from kvfold.compress.tasks.generator import CacheName, PairedGenerator, batches_of
from kvfold.compress.tasks.options import parse_tasks
from kvfold.compress.tasks.report import TaskResult, packed_share, summarise
from kvfold.compress.tasks.samples import Samples
from kvfold.compress.tasks.task import Judgement, Prompt, Setting, Task
from kvfold.compress.text import HELD_OUT, read_documents
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.load import load_pretrained, resolve_artifact
from kvfold.version import __version__

CACHES: tuple[CacheName, CacheName] = ("16bit", "packed")


class TaskRunner:
    """Runs tasks on a loaded artifact.

    Args:
        model: from load_pretrained.
        tokenizer: the artifact's.
        samples: folder of the answers.
        key: what answers depend on besides the prompts.
        batch_size: prompts at a time.
        resume: go on with the answers that are there.
        draws, temperature: answers to each prompt from each cache, and how they are sampled; 0 for
            greedy ones.
        seed: of sampling.
    """

    def __init__(
        self, model: Any, tokenizer: Any, samples: Path, key: dict, batch_size: int, resume: bool, draws: int = 1,
        temperature: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.generator = PairedGenerator(model, tokenizer, temperature, seed)
        self.draws = draws
        if temperature:
            key = {**key, "temperature": temperature, "seed": seed}
        self.geometry: Geometry = model.kv_artifact.geometry
        self.formats = model.kv_artifact.formats
        self.samples, self.key, self.batch_size, self.resume = samples, key, batch_size, resume

    def run(
        self, name: str, task: Task, setting: Setting, seconds: float | None
    ) -> TaskResult | None:
        """Answers a task's prompts, or as many batches of them as the time allows; None if that is
        not one.

        Args:
            seconds: no batch begins that, going by those before, would end later; None for no
                limit.
        """
        begun = time.monotonic()
        questions = task.prompts(setting)
        rounds = list(zip(*(question.draws(self.draws) for question in questions), strict=True))
        prompts = [prompt for drawn in rounds for prompt in drawn]
        samples = Samples(self.samples / f"{name}.jsonl", {"task": name, **self.key}, self.resume)
        # a round of draws at a time: a run that stops early has answers to many prompts, not all
        # answers to a few
        left = ([p for p in drawn if not samples.has(p)] for drawn in rounds)
        batches = [
            b for drawn in left for b in batches_of(drawn, self.batch_size, task.max_new_tokens)
        ]
        random.Random(setting.seed).shuffle(
            batches
        )  # stopping early must not leave the short prompts alone
        spent: list[float] = []
        for batch in progress(batches, name, "batch"):
            start = time.monotonic()
            usual = spent[1:] or spent or [0.0]  # the first one compiles and loads
            if seconds is not None and start - begun + sum(usual) / len(usual) > seconds:
                break
            samples.add(self._answer(task, batch))
            spent.append(time.monotonic() - start)
        found = [samples.records[p.id] for p in prompts if p.id in samples.records]
        return (
            summarise(name, len(questions), found, self.geometry, self.formats) if found else None
        )

    def _answer(self, task: Task, batch: list[Prompt]) -> list[dict[str, Any]]:
        texts, seconds = {}, {}
        for cache in CACHES:
            start = time.monotonic()
            texts[cache] = self.generator.generate(batch, cache, task.max_new_tokens, task.stops)
            seconds[cache] = (time.monotonic() - start) / len(batch)
        jobs = list(
            dict.fromkeys(
                (row, texts[cache][row][0]) for cache in CACHES for row in range(len(batch))
            )
        )
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1) if task.runs_code else 1) as pool:
            judged = dict(
                zip(
                    jobs, pool.map(lambda job: task.judge(batch[job[0]], job[1]), jobs), strict=True
                )
            )
        return [
            {
                "id": prompt.id,
                "prompt_sha256": prompt.sha256,
                "prompt_tokens": len(prompt.ids),
                "facts": {
                    k: v for k, v in prompt.facts.items() if not isinstance(v, str) or len(v) < 100
                },
                "packed_share": packed_share(
                    self.geometry, len(prompt.ids), texts["packed"][row][1]
                ),
                **{
                    cache: self._side(
                        *texts[cache][row], judged[row, texts[cache][row][0]], seconds[cache]
                    )
                    for cache in CACHES
                },
            }
            for row, prompt in enumerate(batch)
        ]

    @staticmethod
    def _side(text: str, new_tokens: int, judged: Judgement, seconds: float) -> dict[str, Any]:
        return {
            "answer": judged.answer,
            "correct": judged.correct,
            "new_tokens": new_tokens,
            "seconds": seconds,
            "text": text,
        }


def run_tasks(
    artifact: str,
    names: str,
    *,
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    time_limit: float | None = None,
    run_code: bool = False,
    draws: int = 1,
    temperature: float = 0.0,
    context: int | None = None,
    text: str | None = None,
    seed: int = 0,
    samples: Path | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
) -> dict[str, Any]:
    """Measures an artifact on tasks.

    Args:
        artifact: folder or Hub id.
        names: tasks, separated by commas.
        data: file, folder or datasets id of the task that reads one.
        limit: prompts of each task at the most.
        time_limit: seconds from now in which all tasks should be done; what is left is shared
            between the tasks left.
        draws, temperature: answers sampled for each prompt; 0 is greedy text, of which a second one
            would say nothing new.
        context: tokens of prompt and answer at the most; default and limit: the model's maximum.
        text: haystack, a file or datasets id; default: the held-out text that the package ships.
        samples: folder of the answers, one JSON-lines file a task; default artifacts/NAME.tasks.
        resume: go on with the answers that are there.
        device, dtype, attention: as in load_pretrained. On a CPU, by default, the "16-bit" cache is
            float32: a stricter reference.
    Returns:
        {model, artifact, device, dtype, batch_size, payload_bits, context, seed, draws,
        temperature, samples, tasks: [TaskResult as a dict]}
    """
    begun = time.monotonic()
    wanted = parse_tasks(names, data, run_code)
    if draws > 1 and not temperature:
        raise KvfoldError(
            f"--draws {draws} would get the same greedy answer {draws} times; give a --temperature too."
        )
    path = resolve_artifact(artifact)
    model: Any = load_pretrained(path, device=device, dtype=dtype, attention=attention)
    metadata = model.kv_artifact.metadata
    most = model.config.get_text_config().max_position_embeddings
    if context is not None and context > most:
        raise KvfoldError(
            f"--context {context} passes the model's maximum of {most}; give that or less."
        )
    tokenizer = tokenizer_from_pretrained(path)
    haystack = "\n\n".join(read_documents(text, default=(HELD_OUT,))[1])
    folder = (
        samples
        or Path("artifacts")
        / f"{path.resolve().name if Path(artifact).is_dir() else Path(artifact).name}.tasks"
    )
    info = {
        "artifact_sha256": hashlib.sha256((path / "kv_cache.json").read_bytes()).hexdigest(),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {
            "kvfold": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    runner = TaskRunner(
        model, tokenizer, folder, info, batch_size, resume, draws, temperature, seed
    )
    results = []
    for done, name in enumerate(wanted):
        setting = Setting(tokenizer, context or most, limit, data, haystack, seed)
        left = (
            None
            if time_limit is None
            else (begun + time_limit - time.monotonic()) / (len(wanted) - done)
        )
        r = runner.run(name, TASKS[name], setting, left)
        if r is None:
            stage(f"{name}: no time was left")
            continue
        results.append(r)
        stage(
            f"{name}: {r.pairs} of {r.prompts * draws} answers, {r.accuracy_16bit:.3f} → {r.accuracy:.3f}, p {r.p:.3f}"
        )
    if not results:
        raise KvfoldError(
            f"--time-limit {time_limit:g} left no time for a single batch; give more seconds."
        )
    return {
        "model": metadata.provenance.model,
        "artifact": Path(artifact).name,
        "device": torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else model.device.type,
        "dtype": info["dtype"],
        "batch_size": batch_size,
        "payload_bits": metadata.account.payload_bits,
        "context": context or most,
        "seed": seed,
        "draws": draws,
        "temperature": temperature,
        "samples": str(folder),
        "tasks": [asdict(r) for r in results],
    }
