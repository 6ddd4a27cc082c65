"""GGUF files: bytes all over, and numbers and texts of the header."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from gguf_files import write_gguf

from fuzz.mutate import corrupt, replace_file
from kvfold.compress.models import resolve_model

NUMBERS = (0, 1, 2, 3, 5, 7, 8, 127, 255, 1000, 2**16, 10**6, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
FIELDS = (
    b"general.architecture", b"llama.block_count", b"llama.attention.head_count", b"llama.attention.head_count_kv",
    b"llama.embedding_length", b"llama.feed_forward_length", b"llama.context_length", b"llama.rope.dimension_count",
    b"llama.rope.freq_base", b"llama.vocab_size", b"llama.attention.layer_norm_rms_epsilon",
    b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type", b"tokenizer.ggml.merges", b"tokenizer.ggml.model",
    b"tokenizer.ggml.bos_token_id", b"token_embd.weight", b"blk.0.attn_q.weight", b"blk.1.ffn_up.weight",
)  # fmt: skip


class Ggufs:
    """Cases from one tiny Llama."""

    name = "gguf"

    def __init__(self, scratch: Path) -> None:
        file = scratch / "good.gguf"
        write_gguf(file, torch.float16)
        self.data = file.read_bytes()
        self.fields = [name for name in FIELDS if name in self.data]
        with cache_in(scratch / "good"):
            self.wanted = weights(resolve_model(str(file)).path)

    def make(self, folder: Path, rng: Random) -> tuple[str, None]:
        file, kind = (
            folder / "model.gguf",
            rng.choice(("head", "head", "bytes", "field", "field", "field", "place")),
        )
        data = bytearray(self.data)
        file.write_bytes(data)
        if kind == "place":
            return f"{kind} {replace_file(file, rng)}", None
        if kind == "field":
            name = rng.choice(self.fields)
            place = data.index(name) + len(name) + rng.choice((0, 4, 4, 4, 8, 12))
            new = (
                struct.pack("<I", rng.choice(NUMBERS))
                if rng.random() < 0.8
                else rng.randbytes(rng.randrange(1, 9))
            )
            data[place : place + len(new)] = new
            kind = f"{kind} {name.decode()} {place} {new!r}"
        else:
            data = bytearray(corrupt(bytes(data), rng, {"head": 64, "bytes": len(data) // 8}[kind]))
        file.write_bytes(data)
        return kind, None

    def check(self, folder: Path, made: None, rng: Random) -> str:
        """Converts it; what was refused leaves nothing."""
        with cache_in(folder / "cache"):
            try:
                found = weights(resolve_model(str(folder / "model.gguf")).path)
            finally:
                assert not list(folder.rglob("*.part-*"))
        return "same" if found == self.wanted else "another"


def weights(folder: Path) -> bytes:
    """The converted weights."""
    return (folder / "model.safetensors").read_bytes()


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Converted models go there."""
    before = os.environ.get("KVFOLD_CACHE")
    os.environ["KVFOLD_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["KVFOLD_CACHE"]
        else:
            os.environ["KVFOLD_CACHE"] = before
