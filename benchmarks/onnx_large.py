"""The ONNX export of a model whose weights pass 2 GB, where a graph can't hold them itself: does it
load, and give the runtime's logits?

    python benchmarks/onnx_large.py [--vocab 270000] [--hidden 4096] [--layers 2] [--json FILE]

Weights are random, of a Llama with one large matrix of embeddings; the artifact has pages of 8
bits. Takes some seven times the weights in memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kvfold import runtime
from kvfold.compress.models import quiet_transformers
from kvfold.exports.onnx.runner import OnnxRunner
from kvfold.pretrained import model_from_config

SIDE = "{transform: none, levels: [256], clip: false}"
RECIPE = (
    f"key: {SIDE}\nvalue: {SIDE}\nwindow: 32\npage_tokens: 16\n"
    f"calibration: {{num_sequences: 1, seq_len: 256, sample_tokens: 128}}\n"
)
PROMPT, NEW = 150, 6  # tokens


def save_model(folder: Path, vocab: int, hidden: int, layers: int) -> None:
    """A random checkpoint in bfloat16, with a tokenizer of one token a character."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512), head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = model_from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20GB")
    letters = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?").save_pretrained(folder)


def kvfold(*args: object) -> None:
    """A command in a process of its own, whose memory is given back."""
    subprocess.run([sys.executable, "-m", "kvfold.compress.cli", *map(str, args)], check=True)


def reference(artifact: Path, ids: torch.Tensor) -> tuple[list[int], np.ndarray]:
    """(greedy tokens [NEW], logits before each of them and after the last [NEW + 1, 1, vocab]) by
    kvfold's own runtime."""
    model: Any = runtime.load_pretrained(artifact, device="cpu", dtype=torch.float32)
    tokens, logits = [], []
    with torch.inference_mode():
        out = model(ids, logits_to_keep=1)
        for _ in range(NEW):
            logits.append(out.logits[:, -1].numpy().copy())
            tokens.append(int(logits[-1].argmax()))
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values)
        logits.append(out.logits[:, -1].numpy().copy())
    return tokens, np.array(logits)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=270_000)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        save_model(place / "model", args.vocab, args.hidden, args.layers)
        (place / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        artifact, graphs = place / "artifact", place / "graphs"
        kvfold(
            "compress",
            place / "model",
            "--budget",
            "12.0",
            "--recipe",
            place / "recipe.yaml",
            "--out",
            artifact,
        )
        started = time.perf_counter()
        kvfold("export", "onnx", artifact, graphs)
        seconds = time.perf_counter() - started
        ids = torch.randint(0, args.vocab, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        tokens, wanted = reference(artifact, ids)
        runner = OnnxRunner(graphs)
        logits, cache = runner.read(ids.numpy())
        error = [float(np.abs(logits - wanted[0]).max())]
        for token, logits in zip(tokens, wanted[1:], strict=True):
            found, cache = runner(np.array([[token]]), cache)
            error.append(float(np.abs(found[:, 0] - logits).max()))
        report = {
            "graph_bytes": {
                p.name: p.stat().st_size
                for p in sorted(graphs.iterdir())
                if p.suffix in (".onnx", ".bin")
            },
            "export_s": round(seconds, 1),
            "largest_logit_error": max(error),
            "rms_logit": float(np.sqrt(np.square(wanted).mean())),
            "peak_memory_bytes": {
                name: resource.getrusage(who).ru_maxrss * 1024
                for name, who in (
                    ("compress, export", resource.RUSAGE_CHILDREN),
                    ("run", resource.RUSAGE_SELF),
                )
            },
        }
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
