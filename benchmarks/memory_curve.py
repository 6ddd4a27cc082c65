"""Peak memory and time of `kvfold compress` on Llama-shaped checkpoints of random bfloat16 weights
in shards.

usage: python benchmarks/memory_curve.py [1b 1.5b 3b 7b 8b 32b …] [--max-memory 8GiB] [--recipe FILE] [--device cuda]
                                         [--layers N] [--tokenizer DIR] [--keep DIR] [--limit N]

For each shape a process of its own compresses the checkpoint; the table has the most that it held
of its own (what the system can't take back: RssAnon of /proc/PID/status, every 50 ms), the most
with the pages of files that it had read (VmHWM), the most tensors that it held on a GPU, and its
time. --max-memory, --recipe and --device are handed on; 1 MiB has any model read layer by layer.
--layers makes models of so many layers, for disks that hold no more; --tokenizer is whose they
get, where the default model isn't at hand. --limit is a limit on its
memory (a cgroup's, version 1; root), so that what does not fit fails. --keep leaves the checkpoints
for another call.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from kvfold.compress.models import resolve_model
from kvfold.exports.files import INDEX
from kvfold.exports.units import format_nbytes, parse_nbytes
from kvfold.pretrained import tokenizer_from_pretrained

SHARD_NBYTES = 2 << 30
SHAPES = {  # hidden, layers, heads, KV heads, MLP
    "135m": (576, 30, 9, 3, 1536),
    "1b": (2048, 16, 32, 8, 8192),
    "1.5b": (1536, 28, 12, 2, 8960),
    "3b": (3072, 28, 24, 8, 8192),
    "7b": (4096, 32, 32, 32, 11008),
    "8b": (4096, 32, 32, 8, 14336),
    "32b": (5120, 64, 40, 8, 27648),
}
# compresses in this process, then writes the most bytes of tensors on the GPU to a file
COMPRESS = """
import sys
from kvfold.__main__ import main
out = sys.argv.pop(1)
try:
    code = main()
except SystemExit as stop:
    code = stop.code
import torch
if torch.cuda.is_available():
    open(out, "w").write(str(torch.cuda.max_memory_allocated()))
sys.exit(code)
"""


def tensors_of(config: LlamaConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's weights."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * hidden // config.num_attention_heads
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (config.vocab_size, hidden))
    ]
    for i in range(config.num_hidden_layers):
        attention = {
            "q": (hidden, hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
            "o": (hidden, hidden),
        }
        found += [
            (f"model.layers.{i}.self_attn.{x}_proj.weight", shape) for x, shape in attention.items()
        ]
        projections = {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
        found += [
            (f"model.layers.{i}.mlp.{x}_proj.weight", shape) for x, shape in projections.items()
        ]
        found += [
            (f"model.layers.{i}.{x}_layernorm.weight", (hidden,))
            for x in ("input", "post_attention")
        ]
    return [
        *found,
        ("model.norm.weight", (hidden,)),
        ("lm_head.weight", (config.vocab_size, hidden)),
    ]


def make_checkpoint(shape: str, folder: Path, layers: int | None, tokenizer_of: str) -> None:
    """Writes config, tokenizer and shards."""
    folder_of = Path(tokenizer_of)
    tokenizer = tokenizer_from_pretrained(
        folder_of if folder_of.is_dir() else resolve_model(tokenizer_of).path
    )
    hidden, most, heads, kv_heads, mlp = SHAPES[shape]
    layers = layers or most
    config = LlamaConfig(
        vocab_size=32000 if len(tokenizer) <= 32000 else len(tokenizer), hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=mlp, dtype="bfloat16",
        max_position_embeddings=32768, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # only to be quick
    rng = torch.Generator(device).manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, size in tensors_of(config):
        weight = torch.empty(size, dtype=torch.bfloat16, device=device)
        if len(size) == 1:
            weight.fill_(1)
        else:  # what a layer puts out is of the size of what it gets
            weight.normal_(
                0,
                (2 if "q_proj" in name or "k_proj" in name else 1) * size[1] ** -0.5,
                generator=rng,
            )
        shard[name] = weight.cpu()
        if sum(x.nbytes for x in shard.values()) > SHARD_NBYTES:
            write()
    write()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def held(pid: int) -> int:
    """Bytes of a process that the system can't take back; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def run(model: Path, options: list[str], limit: int | None) -> tuple[int, int, int, float, int]:
    """(bytes held at the most, those with files' pages, those on a GPU, seconds, exit code) of one
    compression."""
    on_gpu = Path(f"{model}-gpu")
    words = [
        sys.executable,
        "-c",
        COMPRESS,
        str(on_gpu),
        "compress",
        str(model),
        "--out",
        f"{model}-out",
        *options,
    ]
    prefix: list[str] = []
    if limit is not None:
        group = Path("/sys/fs/cgroup/memory/kvfold_curve")
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(limit))
        prefix = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    shutil.rmtree(f"{model}-out", ignore_errors=True)
    start, most, whole = time.perf_counter(), 0, 0
    with subprocess.Popen(prefix + words, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            most = max(most, held(child.pid))
            try:
                status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                whole = max(
                    [whole, *(int(x.split()[1]) << 10 for x in status if x.startswith("VmHWM:"))]
                )
            except OSError:
                pass
            time.sleep(0.05)
    seconds = time.perf_counter() - start
    shutil.rmtree(f"{model}-out", ignore_errors=True)
    there = int(on_gpu.read_text()) if on_gpu.exists() else 0
    on_gpu.unlink(missing_ok=True)
    return most, whole, there, seconds, child.returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shapes", nargs="*", default=["1b", "3b", "7b"], choices=[*SHAPES, []], metavar="SHAPE"
    )
    parser.add_argument("--max-memory")
    parser.add_argument("--recipe")
    parser.add_argument("--device")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokenizer", default="smollm2-135m")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--limit")
    o = parser.parse_args()
    options = [word for name in ("max_memory", "recipe", "device") if getattr(o, name)
               for word in (f"--{name.replace('_', '-')}", getattr(o, name))]  # fmt: skip
    print(
        "| shape | weights in bfloat16 | held | with files' pages | on the GPU | time | exit |\n"
        "|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for shape in o.shapes:
            name = f"{shape}, {o.layers} layers" if o.layers else shape
            model = (o.keep or Path(scratch)) / name.replace(", ", "-").replace(" ", "-")
            if not (model / INDEX).is_file():
                model.mkdir(parents=True, exist_ok=True)
                make_checkpoint(shape, model, o.layers, o.tokenizer)
            nbytes = sum(p.stat().st_size for p in model.glob("*.safetensors"))
            most, whole, there, seconds, code = run(
                model, options, parse_nbytes(o.limit) if o.limit else None
            )
            sizes = " | ".join(map(format_nbytes, (nbytes, most, whole, there)))
            print(f"| {name} | {sizes} | {seconds:.0f} s | {code} |", flush=True)
            if o.keep is None:
                shutil.rmtree(model)


if __name__ == "__main__":
    main()
