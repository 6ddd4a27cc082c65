"""What a cache costs on a task's answers, and what keeping more of a prompt's beginning in 16 bits
is worth there.

    python benchmarks/answers.py DIR --samples TASKS/humaneval.jsonl --task-data FOLDER [--task humaneval]
                                     [--sinks 5,32,64] [--prompts 16] [--least 200] [--most 0]
    python benchmarks/answers.py DIR --generate --task-data FOLDER [--sinks 64] [--batch-size 41]
                                     [--dtype bfloat16] [--limit N] [--out FOLDER]

The first reads the answers that `kvfold eval DIR --tasks humaneval` wrote with the 16-bit cache,
takes right ones after prompts of `least` tokens or more, evenly, and prints the KL to the 16-bit
cache over them, teacher-forced. The second runs the task itself, executing what the model writes.
`--sinks` reads one artifact with several numbers of sinks: formats stay the artifact's; default:
its own number.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvfold.compress.bench.runs import mean_and_error
from kvfold.compress.models import quiet_transformers
from kvfold.compress.tasks import TASKS
from kvfold.compress.tasks.run import TaskRunner
from kvfold.compress.tasks.task import Setting
from kvfold.exports.architectures import logits_of
from kvfold.exports.reader import read_artifact
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.load import attach, default_device, plain_cache, stock_from_pretrained


def with_sinks(path: Path, sinks: int | None, dtype: torch.dtype, device: str | None) -> Any:
    """The artifact's model, reading caches with so many sinks; None for its own number."""
    found = read_artifact(path)
    sinks = found.geometry.sinks if sinks is None else sinks
    model: Any = stock_from_pretrained(path, dtype=dtype).to(
        torch.device(device) if device else default_device()
    )
    cache = found.metadata.cache.model_copy(update={"sinks": sinks})
    return attach(
        model, replace(found, metadata=found.metadata.model_copy(update={"cache": cache}))
    )


def answers(
    task: str, samples: Path, setting: Setting, count: int, least: int, most: int
) -> list[tuple[Tensor, int]]:
    """(ids int64 [1, T] of prompt and 16-bit answer, tokens of the prompt) of right answers of more
    than 20 tokens."""
    prompts = {p.id: p.ids for p in TASKS[task].prompts(setting)}
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    rows = [
        r
        for r in rows
        if "16bit" in r and r["16bit"]["new_tokens"] > 20 and r["16bit"]["correct"]
        if r["prompt_tokens"] > least and not 0 < most < r["prompt_tokens"]
    ]
    found = []
    for row in rows[:: max(1, len(rows) // count)][:count]:
        new = setting.tokenizer(row["16bit"]["text"], add_special_tokens=False).input_ids
        found.append((torch.tensor([prompts[row["id"]] + new]), len(prompts[row["id"]])))
    return found


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor, start: int, cache: Any) -> Tensor:
    """float32 [T − start + 1, vocab_size], of the tokens from `start` on and the one after them."""
    out = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return logits_of(model, out.last_hidden_state[0, start - 1 :]).float().log_softmax(-1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--task", default="humaneval", choices=TASKS)
    parser.add_argument("--sinks")
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--task-data", required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--least", type=int, default=200)
    parser.add_argument("--most", type=int, default=0)
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=Path("artifacts/answers"))
    args = parser.parse_args()
    if args.generate == (args.samples is not None):
        parser.error("give either --samples or --generate")
    quiet_transformers()
    dtype, tokenizer = getattr(torch, args.dtype), tokenizer_from_pretrained(args.artifact)
    for given in [int(n) for n in args.sinks.split(",")] if args.sinks else [None]:
        model = with_sinks(args.artifact, given, dtype, args.device)
        sinks = model.kv_artifact.geometry.sinks
        setting = Setting(
            tokenizer, model.config.max_position_embeddings, args.limit, args.task_data, "", 0
        )
        if args.generate:
            runner = TaskRunner(
                model,
                tokenizer,
                args.out / str(sinks),
                {"sinks": sinks, "dtype": args.dtype},
                args.batch_size,
                True,
            )
            print(
                sinks,
                json.dumps(asdict(runner.run(args.task, TASKS[args.task], setting, None))),
                flush=True,
            )  # type: ignore[call-overload]
            continue
        kl, first, top = [], [], []
        for ids, start in answers(
            args.task, args.samples, setting, args.prompts, args.least, args.most
        ):
            ids = ids.to(model.device)
            ours = log_probabilities(
                model,
                ids,
                start,
                QuantizedKVCache(model.kv_artifact.specs, model.kv_artifact.geometry),
            )
            with plain_cache(model):
                true = log_probabilities(model, ids, start, DynamicCache(config=model.config))
            found = (true.exp() * (true - ours)).sum(-1)
            kl.append(float(found.mean()))
            first.append(float(found[0]))
            top.append(float((ours.argmax(-1) == true.argmax(-1)).float().mean()))
        mean, error = mean_and_error(kl)
        print(
            f"{sinks} sinks: KL {mean:.4f} ± {error:.4f}, "
            f"first token {mean_and_error(first)[0]:.3f}, top-1 {mean_and_error(top)[0]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
