"""What a task's answers come to: accuracies, their difference and what was read packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from kvfold.compress.progress import console
from kvfold.compress.tasks.mcnemar import compare, compare_draws
from kvfold.compress.tasks.task import DRAW
from kvfold.exports.account import Geometry, cache_nbytes, effective_bits
from kvfold.kernels.attention import packed_tokens
from kvfold.kernels.formats import Format


@dataclass(frozen=True)
class TaskResult:
    """One task's figures over the prompts that both caches answered; accuracies are shares of 1,
    points percentage points."""

    task: str
    prompts: int  # that there are
    pairs: int  # of answers: prompts that both answered, times the draws of each
    accuracy_16bit: float
    accuracy: float
    lost: int  # right with the 16-bit cache alone
    gained: int  # right with the packed cache alone
    points: float
    points_se: float | None
    # two-sided: McNemar, exact; for several draws of a prompt a permutation test over prompts
    p: float
    same_text: float  # share of pairs with the same continuation to the last character
    # of the tokens that a new token reads, those read from pages: mean over new tokens, then
    # prompts
    packed_share: float
    prompt_tokens: float  # mean
    new_tokens_16bit: float  # mean
    new_tokens: float  # mean
    effective_bits: float  # of all these sequences at their end, everything resident counted
    seconds_16bit: float  # of generating
    seconds: float


def packed_share(geometry: Geometry, prompt_tokens: int, new_tokens: int) -> float:
    """Share of tokens read from pages when a token is made, mean over the new ones (at least the
    first)."""
    shares = [
        packed_tokens(n, geometry.sinks, geometry.window, geometry.page_tokens) / n
        for n in range(prompt_tokens, prompt_tokens + max(1, new_tokens))
    ]
    return sum(shares) / len(shares)


def summarise(
    task: str,
    prompts: int,
    records: Sequence[dict[str, Any]],
    geometry: Geometry,
    formats: Sequence[tuple[Format, Format]],
) -> TaskResult:
    """The figures of one task.

    Args:
        prompts: how many the task has.
        records: those that both caches answered, as they stand in the file of answers; at least
            one.
        geometry: sinks, window, page length and heads of the packed cache.
        formats: its (key format, value format) of each layer.
    """
    questions: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        questions.setdefault(r["id"].partition(DRAW)[0], []).append(r)
    sides = [
        [[r[cache]["correct"] for r in rows] for rows in questions.values()]
        for cache in ("16bit", "packed")
    ]
    single = len(questions) == len(records)
    pair = compare(*([x[0] for x in side] for side in sides)) if single else compare_draws(*sides)
    lengths = [r["prompt_tokens"] + r["packed"]["new_tokens"] for r in records]
    nbytes = sum(cache_nbytes(geometry, formats, n) for n in lengths)

    def mean(values: list[Any]) -> float:
        return sum(values) / len(values)

    return TaskResult(
        task=task,
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
        effective_bits=effective_bits(geometry, nbytes, lengths, len(formats)),
        seconds_16bit=sum(r["16bit"]["seconds"] for r in records),
        seconds=sum(r["packed"]["seconds"] for r in records),
    )


def print_tasks(report: dict[str, Any]) -> None:
    """The table of `kvfold eval --tasks`, on stdout."""
    table = Table(
        title=f"{report['artifact']}: packed cache ({report['payload_bits']:.3f} payload bits) "
        f"against {report['dtype']}, paired",
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
            r["task"],
            f"{r['pairs']}/{r['prompts'] * report['draws']}",
            f"{r['accuracy_16bit']:.3f}",
            f"{r['accuracy']:.3f}",
            f"{r['points']:+.2f}{error}",
            str(r["lost"]),
            str(r["gained"]),
            f"{r['p']:.3f}",
            f"{r['same_text']:.2f}",
            f"{r['prompt_tokens']:.0f}",
            f"{r['packed_share']:.2f}",
            f"{r['effective_bits']:.2f}",
        )
    console(140).print(table)
    print(f"Answers, one prompt a line: {report['samples']}")
