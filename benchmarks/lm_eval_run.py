"""EleutherAI's lm-evaluation-harness on an artifact, through its HFLM wrapper: the packed cache,
and the same weights in stock transformers.

usage: python benchmarks/lm_eval_run.py DIR --tasks arc_easy,gsm8k [--limit N] [--include-path FOLDER] [--cache both]
                                        [--json FILE]

Needs the extra `lm-eval` (`pip install 'kvfold[lm-eval]'`); its tasks fetch their data with
`datasets`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kvfold import stock_from_pretrained
from kvfold.compress.cli.table import with_error
from kvfold.compress.models import quiet_transformers
from kvfold.compress.plan import pick_device
from kvfold.errors import KvfoldError
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.load import load_pretrained, resolve_artifact


def import_harness() -> tuple[Any, Any, Any]:
    """(simple_evaluate, TaskManager, HFLM) of the harness.

    Raises:
        KvfoldError: it is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise KvfoldError(
            f"The lm-evaluation-harness is not installed ({error.name} is missing); pip install 'kvfold[lm-eval]'."
        ) from error
    return simple_evaluate, TaskManager, HFLM


def load(path: Path, cache: str, device: str) -> Any:
    """The artifact with its packed cache, or its weights in stock transformers in the same type."""
    target = pick_device(device)
    packed: Any = load_pretrained(path, device=target)
    if cache == "packed":
        return packed
    return stock_from_pretrained(path, dtype=packed.dtype).to(target).eval()


def figures(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """task → metric → value; standard errors are metrics named `…_stderr`."""
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }


def print_table(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """One Markdown row a task and metric."""
    print(f"| task | metric | {' | '.join(results)} |\n|---|---|{'---|' * len(results)}")
    first = next(iter(results.values()))
    for task, metrics in first.items():
        for metric in (m for m in metrics if "_stderr" not in m):
            name = metric.replace(",", "_stderr,")
            cells = [
                f"{r[task][metric]:.4f}{with_error(r[task].get(name))}" for r in results.values()
            ]
            print(f"| {task} | {metric} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--cache", choices=("both", "16bit", "packed"), default="both")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--chat", action="store_true", help="put prompts through the chat template")
    parser.add_argument("--include-path", help="folder of task definitions of your own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    simple_evaluate, task_manager, wrapper = import_harness()
    quiet_transformers()
    path = resolve_artifact(options.artifact)
    tokenizer = tokenizer_from_pretrained(path)
    results = {}
    for cache in ("16bit", "packed") if options.cache == "both" else (options.cache,):
        model = wrapper(
            pretrained=load(path, cache, options.device),
            tokenizer=tokenizer,
            batch_size=options.batch_size,
        )
        found = simple_evaluate(
            model=model,
            tasks=options.tasks.split(","),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.chat,
            task_manager=task_manager(include_path=options.include_path),
        )
        results[cache] = figures(found)
    print_table(results)
    if options.json:
        options.json.write_text(
            json.dumps({"artifact": path.name, **results}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    try:
        main()
    except KvfoldError as error:
        print(f"lm_eval_run: {error}", file=sys.stderr)
        sys.exit(2)
