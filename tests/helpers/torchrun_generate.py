"""One process of several: generates from a divided artifact by one policy and another, and writes
what it cached.

Usage: torchrun --nproc-per-node N torchrun_generate.py ARTIFACT OUT POLICY=BUDGET …
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kvfold import KvfoldError, runtime


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, attention mask), int64 [2, 90] each; the second row is padded on the left."""
    ids = torch.randint(1, 128, (2, 90), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[1, :7], mask[1, :7] = 0, 0
    return ids, mask


def answer(model: Any) -> Any:
    """40 greedy tokens with their logits and cache, as transformers' generate returns them."""
    ids, mask = prompts()
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=40,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )


def main(artifact: str, out: Path, policy: str, budget: int) -> None:
    model = runtime.load_pretrained(
        artifact, tp_plan="auto", policy=policy, kv_budget=budget or None
    )
    found = answer(model)
    cache, rank = found.past_key_values, dist.get_rank()
    other = ""
    nbytes, pages = cache.nbytes, [layer["pages"] for layer in cache.report()]
    if policy == "floor":
        cache.save(out / f"{policy}{rank}.safetensors")
        dist.barrier()
        try:
            runtime.load_cache(out / f"{policy}{1 - rank}.safetensors", model)
        except KvfoldError as error:
            other = str(error)
        cache = runtime.load_cache(out / f"{policy}{rank}.safetensors", model)
    again = model.generate(
        found.sequences, past_key_values=cache, max_new_tokens=5, do_sample=False
    )
    refused = ""
    try:
        model.save_pretrained(out / f"model{rank}")
    except KvfoldError as error:
        refused = str(error)
    rows = {
        "tokens": found.sequences.tolist(),
        "again": again.tolist(),
        "logits": torch.stack(found.logits).float().flatten().tolist(),
        "nbytes": nbytes,
        "pages": pages,
        "heads": cache.geometry.num_kv_heads,
        "refused": refused,
        "other": other,
    }
    (out / f"{policy}{rank}.json").write_text(json.dumps(rows, default=str))


def run() -> None:
    """The arguments' runs, one after another."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    artifact, out, *runs = sys.argv[1:]
    for policy, budget in (run.split("=") for run in runs):
        main(artifact, Path(out), policy, int(budget))
    dist.destroy_process_group()


if __name__ == "__main__":
    run()
