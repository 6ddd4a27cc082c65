"""What vLLM serves of one model in the same KV memory with a packed cache, and with its own caches of
16 and of 8 bits: tokens that fit, time to the first token, time per token, tokens a second with the
memory full, and over a trace of requests. Needs a GPU and vLLM.

usage: python benchmarks/serving.py ARTIFACT [options]
       python benchmarks/serving.py --random 32,32,8,128 [--pairs 2.5a/1.75a,2.5a/2a] [options]

options: --caches packed,bf16,fp8  --memory 40GiB  --prompt 32768  --new 192  --chunk 8192  --trace N
         --seed 0  --eager  --json FILE  --fit N (requests at once; else as many as the memory holds)

Each cache is a process of its own: kvfold's plugin is turned off in those of vLLM's caches, to which
an artifact is an ordinary checkpoint. All engines start beside each other, so that the GPU must hold
the weights and the memory of all, and are then measured one at a time. --random makes an artifact of
Llama-3.1's shape with so many layers, heads, KV heads and channels a head, whose layers take turns
with --pairs of the catalogue; its weights are vLLM's dummies, and its file of them one hole. Prompts
are random tokens, prefix caching is off, decoding is captured in CUDA graphs.
"""

import argparse
import fcntl
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

CACHES = ("packed", "bf16", "fp8")
SPARE = 64  # tokens of a request beyond prompt and answer
TRACE = (
    (6.5, 1.0, 64, 8192),
    (4.5, 0.8, 8, 512),
)  # of prompts and answers: log-normal, least, most


def random_artifact(shape: str, pairs: str, folder: Path) -> Path:
    """An artifact whose weights are a hole in a file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvfold.exports import account, files, reader, schema, writer
    from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
    from kvfold.kernels import catalogue

    layers, heads, kv_heads, dim = (int(x) for x in shape.split(","))
    config = LlamaConfig(
        vocab_size=128256, hidden_size=heads * dim, intermediate_size=heads * dim * 7 // 2,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim,
        max_position_embeddings=131072, rope_theta=500000.0, bos_token_id=None, eos_token_id=None, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    named = dict(zip(catalogue.PAIRS, catalogue.pairs(dim), strict=True))
    formats = [
        pair
        for pair, _ in zip(cycle(named[x] for x in pairs.split(",")), range(layers), strict=False)
    ]
    generator = torch.Generator().manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(layers, kv_heads, dim, dim, generator=generator))[0]
    offset = torch.randn(layers, kv_heads, dim, generator=generator)
    turns = tuple(500000.0 ** (-2 * i / dim) for i in range(dim // 2))
    turns = tuple(torch.tensor(turns, dtype=torch.float32).tolist())
    specs = [
        LayerSpec(
            KeySpec(key, (), matrix[i].contiguous(), offset[i].contiguous(), frequencies=turns),
            ValueSpec(value),
        )
        for i, (key, value) in enumerate(formats)
    ]
    geometry = account.Geometry(kv_heads, dim, 64, 128, 32)

    def side(spec: Any, tensors: list) -> schema.SideModel:
        fmt = schema.FormatModel(**spec.format.to_dict())
        return schema.SideModel(
            format=fmt,
            transforms=[],
            tensors=tensors,
            payload_bits=spec.format.payload_bits,
            predicted_loss=0.0,
        )

    at = 32768
    nbytes, elements = account.cache_nbytes(geometry, formats, at), geometry.elements(at, layers)
    raw = layers * geometry.raw_rows * kv_heads * dim * 4
    pages = sum(geometry.side_nbytes(fmt, at, 0) for pair in formats for fmt in pair)
    metadata = schema.Metadata(
        format_version=schema.ROLLBACK_VERSION,
        cache=schema.CacheModel(
            num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, sinks=64, window=128,
            page_tokens=32, rollback=0,
        ),
        layers=[
            schema.LayerModel(key=side(x.key, ["matrix", "offset", "frequencies"]), value=side(x.value, []))
            for x in specs
        ],
        budget=schema.BudgetModel(request=pairs, at=at, bytes=nbytes),
        account=schema.AccountModel(
            at=at, bytes=nbytes, bytes_16bit=2 * elements, page_bytes=pages, raw_bytes=raw,
            table_bytes=nbytes - pages - raw, bytes_at={}, effective_bits=8 * nbytes / elements,
            payload_bits=account.payload_bits(formats),
        ),
        calibration=schema.CalibrationModel(
            source="none", num_sequences=1, seq_len=1, seed=0, spread=1, covered_positions=1, kl=0.0
        ),
        provenance=schema.ProvenanceModel(
            model="random", revision=None, libraries={}, rounding_kl=0.0, fused_dtype="bfloat16"
        ),
        files={},
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: list(x.shape) for name, x in LlamaForCausalLM(config).state_dict().items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sizes in shapes.items():
        first, end = end, end + 2 * int(torch.tensor(sizes).prod())
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [first, end]}
    text = json.dumps(header).encode()

    def fill(new: Path) -> None:
        config.save_pretrained(new)
        with (new / files.WEIGHTS).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        writer.write_tensors(new / schema.TENSORS_NAME, specs)

    skip_holes(files, reader, writer)
    return writer.install(folder / f"random-{shape.replace(',', '-')}", metadata, fill).path


def skip_holes(*modules: Any) -> None:
    """Weights that are a hole are not hashed: it would take longer than what is measured."""
    stock = modules[0].file_sha256

    def file_sha256(path: Path) -> str:
        return "0" * 64 if path.stat().st_size > 1 << 30 else stock(path)

    for module in modules:
        module.file_sha256 = file_sha256


class Engine:
    """An engine in this process, stepped by hand.

    Args:
        options: of the command line.
        cache: one of CACHES.
    """

    def __init__(self, options: argparse.Namespace, cache: str) -> None:
        from vllm import LLM

        from kvfold.exports import files, reader
        from kvfold.exports.units import parse_nbytes

        if options.random:
            skip_holes(files, reader)
        known = json.loads((options.artifact / "config.json").read_text())
        longest = sum(most for *_, most in TRACE) if options.trace else 0
        self.length = min(
            max(options.prompt + options.new, longest) + SPARE, known["max_position_embeddings"]
        )
        seqs = options.fit or 256
        sizes = sorted({*(2**i for i in range(8)), *range(16, 257, 16), seqs})
        begun = time.perf_counter()
        self.llm = LLM(
            str(options.artifact), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=self.length,
            max_num_seqs=seqs, max_num_batched_tokens=options.chunk, kv_cache_memory_bytes=parse_nbytes(options.memory),
            gpu_memory_utilization=0.9 / len(options.caches.split(",")),
            enable_prefix_caching=False, disable_log_stats=False, seed=0,
            load_format="dummy" if options.random else "auto", kv_cache_dtype="fp8" if cache == "fp8" else "auto",
            **({"enforce_eager": True} if options.eager else {"compilation_config": {
                "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [x for x in sizes if x <= seqs],
            }}),
        )  # fmt: skip
        self.started = time.perf_counter() - begun
        self.engine = self.llm.llm_engine
        config = self.engine.vllm_config
        self.blocks, self.block_tokens = (
            config.cache_config.num_gpu_blocks,
            config.cache_config.block_size,
        )
        self.vocab = config.model_config.get_vocab_size()
        self.rng, self.count = random.Random(options.seed), 0

    def per_request(self, cache: str, options: argparse.Namespace) -> tuple[float, int]:
        """(blocks that a request holds when it ends, blocks of prompt tokens of the step that runs
        and of the one that is being prepared)."""
        tokens = options.prompt + options.new
        if cache != "packed":
            return -(-tokens // self.block_tokens), 0
        from kvfold.exports.reader import read_metadata
        from kvfold.runtime.vllm.blocks import block_layout

        metadata = read_metadata(options.artifact)
        layout = block_layout(metadata.geometry, metadata.formats)
        rows = layout.raw_block_tokens
        window = -(-layout.raw_window() // rows) + 1
        own = -(-tokens // layout.block_tokens) + window + layout.sink_blocks
        return own, 2 * -(-options.chunk // rows)

    def run(self, lengths: list[tuple[int, int]]) -> dict[str, Any]:
        """Requests of (prompt tokens, answer tokens), all at once: when each token came, in seconds
        from the start."""
        from vllm import SamplingParams

        begun = time.perf_counter()
        answers: dict[str, int] = {}
        for prompt, new in lengths:
            self.count += 1
            ids = self.rng.choices(range(10, self.vocab), k=prompt)
            how = SamplingParams(max_tokens=new, temperature=0, detokenize=False, ignore_eos=True)
            self.engine.add_request(str(self.count), {"prompt_token_ids": ids}, how)
            answers[str(self.count)] = new
        added = time.perf_counter()
        seen = dict.fromkeys(answers, 0)
        first: dict[str, float] = {}
        steps: list[
            tuple[float, int, int]
        ] = []  # end, tokens so far, requests with a token that go on
        while self.engine.has_unfinished_requests():
            for out in self.engine.step():
                seen[out.request_id] = len(out.outputs[0].token_ids)
                first.setdefault(out.request_id, time.perf_counter() - added)
            going = sum(0 < n < answers[name] for name, n in seen.items())
            steps.append((time.perf_counter() - added, sum(seen.values()), going))
        return {"first": sorted(first.values()), "steps": steps, "prepare": added - begun}


def decode_speed(
    steps: list[tuple[float, int, int]], requests: int
) -> tuple[float | None, float | None]:
    """(tokens a second, milliseconds a step) while so many requests decode and none reads a prompt;
    None where that was never so for three steps, as with preemptions."""
    full = [(at, tokens) for at, tokens, going in steps if going == requests]
    full = full[2:]
    if len(full) < 3:
        return None, None
    seconds, tokens = full[-1][0] - full[0][0], full[-1][1] - full[0][1]
    return tokens / seconds, 1000 * seconds / (len(full) - 1)


def child(options: argparse.Namespace, cache: str) -> dict[str, Any]:
    """All figures of one cache, in this process."""
    engine = Engine(options, cache)
    turn = options.turn.open()
    fcntl.flock(turn, fcntl.LOCK_EX)  # held until this process ends
    each, chunk = engine.per_request(cache, options)
    fit = (engine.blocks - 1 - chunk) / each
    found: dict[str, Any] = {
        "start s": engine.started, "blocks": engine.blocks, "blocks a request": each,
        "tokens that fit": fit * (options.prompt + options.new), "requests that fit": int(fit),
    }  # fmt: skip
    print(json.dumps(found), file=sys.stderr, flush=True)
    engine.run([(options.prompt, 4)])  # compiles
    alone = [engine.run([(options.prompt, 48)]) for _ in range(3)]
    found["first token s"] = sorted(x["first"][0] for x in alone)[1]
    found["ms a token, 1 request"] = decode_speed(alone[1]["steps"], 1)[1]
    print(json.dumps(found), file=sys.stderr, flush=True)
    requests = options.fit or max(1, int(fit))
    crowd = engine.run([(options.prompt, options.new)] * requests)
    speed, step = decode_speed(crowd["steps"], requests)
    found |= {"requests": requests, "decode tokens/s, full": speed, "ms a step, full": step}
    found["prompt tokens/s, full"] = requests * options.prompt / crowd["first"][-1]
    found["preemptions"] = next(
        m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions"
    )
    print(json.dumps(found), file=sys.stderr, flush=True)
    if options.trace:
        rng = random.Random(options.seed)
        drawn = [
            tuple(
                min(max(int(rng.lognormvariate(mean, spread)), least), most)
                for mean, spread, least, most in TRACE
            )
            for _ in range(options.trace)
        ]
        pairs = [(min(prompt, engine.length - new), new) for prompt, new in drawn]
        trace = engine.run(pairs)
        seconds = trace["steps"][-1][0]
        found["trace tokens/s"] = sum(new for _, new in pairs) / seconds
        found["trace first token s, median"] = trace["first"][len(pairs) // 2]
    return found


def start(argv: list[str], cache: str, turn: Path) -> tuple[subprocess.Popen, Path]:
    """`child` in a process of its own, and the file that it writes its figures to."""
    out = turn.with_name(f"{cache}.json")
    env = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "kvfold" if cache == "packed" else "",
    }  # fmt: skip
    command = [sys.executable, __file__, *argv, "--child", cache, "--turn", turn, "--json", out]
    return subprocess.Popen(command, env=env, stdout=sys.stderr), out


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Figures of all caches, and what the first is of the others."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in names:
        figures = [row.get(name) for row in rows.values()]
        cells = ["–" if x is None else f"{x:,.4g}" for x in figures]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("--random")
    parser.add_argument("--pairs", default="2.5a/1.75a,2.5a/2a")
    parser.add_argument("--caches", default=",".join(CACHES))
    parser.add_argument("--memory", default="40GiB")
    for name, usual in (
        ("prompt", 32768),
        ("new", 192),
        ("chunk", 8192),
        ("trace", 0),
        ("seed", 0),
        ("fit", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=CACHES)
    parser.add_argument("--turn", type=Path)
    options = parser.parse_args()
    if options.child:
        options.json.write_text(json.dumps(child(options, options.child)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        argv = sys.argv[1:]
        if options.random:
            options.artifact = random_artifact(options.random, options.pairs, Path(scratch))
            argv = [str(options.artifact), *argv]
        elif options.artifact is None:
            parser.error("give an artifact's folder, or --random")
        turn = Path(scratch) / "turn"
        turn.touch()
        begun, rows = time.perf_counter(), {}
        started = {cache: start(argv, cache, turn) for cache in options.caches.split(",")}
        for cache, (process, out) in started.items():
            failed = process.wait()
            rows[cache] = {"failed": failed} if failed else json.loads(out.read_text())
            print(cache, json.dumps(rows[cache]), flush=True)
        print(f"{time.perf_counter() - begun:.0f} s in all")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
