"""The time to the first token, from nothing: fresh processes, an empty folder of kernels; and what
a step takes afterwards. Needs a GPU.

usage: python benchmarks/first_token.py ARTIFACT [SECOND] [--cores N] [--policy progressive] [--no-steady] [--json FILE]
       python benchmarks/first_token.py --random 28,12,2,128 [--bits 2.3] [--keep FOLDER]

Every row of the first table is a process of its own. The first finds an empty TRITON_CACHE_DIR and
TORCHINDUCTOR_CACHE_DIR, temporary folders that go at the end; "again" finds what it left. Where
there is a SECOND artifact, of other bits and the same head_dim, the first process lives on until
the catalogue's other kernels are compiled behind it, as a process does that answers more than once;
SECOND finds those too, and is compared with itself once more. --random makes an artifact of a Llama
with so many layers, heads, KV heads and channels a head and random weights, which is not timed;
--keep keeps it for later runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# tokens; of the steps only the last are timed, in which no block table doubles: that captures the
# step again
PROMPT, CONTEXT, STEPS, LAST = 700, 4000, 288, 160
LEVEL = 6000  # tokens whose bytes on the floor are the progressive policy's budget at CONTEXT
LIMITS = {
    "first token, empty cache": 30.0,
    "first token, empty cache, 4 cores": 75.0,
    "first token, random weights": 40.0,
}
LIMITS |= {
    "second artifact over its own load": 3.0,
    "progressive, empty cache": 45.0,
    "ms a step": 3.5,
}
LIMITS |= {
    "ms a step over StaticCache": 1.2,
    "progressive over floor at the same bytes": 1.2,
    "kernels": 30,
}


def first(artifact: str, policy: str, stay: bool) -> dict[str, Any]:
    """Seconds of importing, loading and the first token, in this process; with `stay` also until
    the catalogue's other kernels are there."""
    begun = time.perf_counter()
    import torch
    import transformers  # noqa: F401

    from kvfold import runtime

    imported = time.perf_counter()
    model: Any = runtime.load_pretrained(artifact, policy=policy, **budget(artifact, policy))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    ids = torch.randint(
        model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0)
    ).to(model.device)
    token = model.generate(ids, max_new_tokens=1, min_new_tokens=1, do_sample=False)[0, -1].item()
    done = time.perf_counter()
    parts = {"import": imported - begun, "load": loaded - imported, "token": done - loaded}
    found = {**parts, "total": done - begun, "id": token, "kernels_used": model.kv_triton}
    if stay:
        from kvfold.runtime.generate import ahead

        ahead.wait()
        found["ahead"] = time.perf_counter() - done
    if model.kv_triton and torch.cuda.is_available():
        from kvfold.kernels.compile.build import jobs_of, target_of
        from kvfold.runtime.generate.compile import artifact_launches

        count = torch.cuda.get_device_properties(model.device).multi_processor_count
        launches = artifact_launches(Path(artifact), None, policy == "progressive", count)
        found["own"] = len(jobs_of(launches, target_of(model.device)))
    return found


def budget(artifact: str, policy: str, tokens: int = LEVEL) -> dict[str, int]:
    """kv_budget of a progressive cache: what so many tokens take on the floor."""
    if policy == "floor":
        return {}
    from kvfold.exports.account import cache_nbytes
    from kvfold.exports.reader import read_metadata

    metadata = read_metadata(Path(artifact))
    return {"kv_budget": cache_nbytes(metadata.geometry, metadata.formats, tokens)}


class Clock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        value.tolist()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def step_ms(self) -> float:
        """Milliseconds a token, the mean of the last ones."""
        return (self.times[-1] - self.times[-1 - LAST]) / LAST * 1000


def decode(model: Any, tokens: int, **options: Any) -> tuple[float, Any]:
    """(milliseconds a step behind a prompt of so many tokens, the cache)."""
    import torch

    ids = torch.randint(
        model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)
    ).to(model.device)
    clock = Clock()
    out = model.generate(
        ids,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
        **options,
    )
    return clock.step_ms, out.past_key_values


def steady(artifact: str) -> dict[str, Any]:
    """Milliseconds a step of plain `load_pretrained` and `generate`, of the progressive policy, and
    of transformers' StaticCache."""
    import torch

    from kvfold import runtime
    from kvfold.autoclass import stock_from_pretrained

    def measure(tokens: int, policy: str = "floor") -> tuple[float, int]:
        model: Any = runtime.load_pretrained(artifact, policy=policy, **budget(artifact, policy))
        decode(model, tokens)
        ms, cache = decode(model, tokens)
        return ms, cache.nbytes

    found: dict[str, Any] = {}
    found["ms"], found["nbytes"] = measure(CONTEXT)
    found["progressive_ms"], found["progressive_nbytes"] = measure(CONTEXT, "progressive")
    found["level_ms"], found["level_nbytes"] = measure(LEVEL - STEPS)
    stock = (
        stock_from_pretrained(artifact, dtype="auto")
        .to("cuda" if torch.cuda.is_available() else "cpu")
        .eval()
    )
    decode(stock, CONTEXT, cache_implementation="static")  # compiles
    found["static_ms"], _ = decode(stock, CONTEXT, cache_implementation="static")
    return found


def kernels_in(folder: str) -> int:
    """Kernels of this project in a cache folder; TorchInductor's are named triton_…"""
    return sum(not path.stem.startswith("triton_") for path in Path(folder).rglob("*.cubin"))


def child(what: str, artifact: str, policy: str, cache: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    env = {
        **os.environ,
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
    }
    begun, before = time.perf_counter(), kernels_in(cache)
    env["KVFOLD_COMPILE_AHEAD"] = "1" if what == "stay" else "0"
    done = subprocess.run(
        [sys.executable, __file__, artifact, "--child", what, "--policy", policy],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{what} of {artifact} ended with {done.returncode}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "wall": time.perf_counter() - begun, "compiled": kernels_in(cache) - before}


def random_artifact(shape: str, bits: float, folder: Path) -> Path:
    """An artifact of a Llama of random weights: LAYERS,HEADS,KV_HEADS,HEAD_DIM."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from kvfold.compress.pipeline import compress
    from kvfold.compress.recipe import load_recipe

    out = folder / f"random-{shape.replace(',', '-')}-{bits}"
    if out.exists():
        return out
    layers, heads, kv_heads, dim = (int(x) for x in shape.split(","))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = {"vocab_size": 32000, "hidden_size": heads * dim, "intermediate_size": 4 * heads * dim}
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(
                **size, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim,
                max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, dtype=torch.bfloat16,
            )
        )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    letters = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?").save_pretrained(
        folder / "model"
    )
    del model
    return compress(
        str(folder / "model"), str(bits), out, recipe=load_recipe("best", None), device=device
    ).path


def table(rows: dict[str, dict[str, Any]], figures: dict[str, float]) -> str:
    """Markdown: the processes, and the issue's measures with their limits."""
    lines = [
        "| process | import, s | load, s | first token, s | together, s | kernels it added |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        parts = " | ".join(f"{row[part]:.1f}" for part in ("import", "load", "token", "total"))
        lines.append(f"| {name} | {parts} | {row['compiled']} |")
    lines += ["", "| measure | found | at most |", "|---|---|---|"]
    for name, value in figures.items():
        lines.append(f"| {name} | {value:.3g} | {LIMITS.get(name, '')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", nargs="?")
    parser.add_argument("second", nargs="?")
    parser.add_argument("--cores", type=int)
    parser.add_argument("--policy", choices=("floor", "progressive"), default="floor")
    parser.add_argument("--random", metavar="LAYERS,HEADS,KV_HEADS,HEAD_DIM")
    parser.add_argument("--bits", type=float, default=2.3)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--no-steady", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("first", "stay", "steady"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        if options.child == "steady":
            found = steady(options.artifact)
        else:
            found = first(options.artifact, options.policy, options.child == "stay")
        print(json.dumps(found))
        return
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    with tempfile.TemporaryDirectory() as scratch:
        artifact = options.artifact
        if options.random:
            artifact = str(
                random_artifact(options.random, options.bits, options.keep or Path(scratch))
            )
        if artifact is None:
            parser.error("give an artifact's folder, or --random")
        cache, rows, figures = f"{scratch}/cache", {}, {}
        name = "first token, random weights" if options.random else "first token, empty cache"
        name += f", {options.cores} cores" if options.cores else ""
        name = "progressive, empty cache" if options.policy == "progressive" else name
        rows["empty cache"] = child(
            "stay" if options.second else "first", artifact, options.policy, cache
        )
        rows["again"] = child("first", artifact, options.policy, cache)
        figures[name], figures["kernels"] = rows["empty cache"]["total"], rows["empty cache"]["own"]
        if options.second:
            rows["second artifact"] = child("first", options.second, options.policy, cache)
            rows["second artifact, again"] = child("first", options.second, options.policy, cache)
            more = rows["second artifact"]["total"] - rows["second artifact, again"]["total"]
            figures["second artifact over its own load"] = more
            figures["s from the first token until the catalogue is there"] = rows["empty cache"][
                "ahead"
            ]
        found: dict[str, Any] = {}
        if not options.no_steady:
            found = child("steady", artifact, options.policy, cache)
            figures["ms a step"], figures["ms a step of StaticCache"] = (
                found["ms"],
                found["static_ms"],
            )
            figures["ms a step over StaticCache"] = found["ms"] / found["static_ms"]
            figures["progressive over floor at the same bytes"] = (
                found["progressive_ms"] / found["level_ms"]
            )
        print(table(rows, figures))
        if options.json:
            everything = {
                "artifact": artifact,
                "cores": len(os.sched_getaffinity(0)),
                "rows": rows,
                "steady": found,
                "figures": figures,
            }
            options.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
