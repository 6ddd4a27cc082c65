"""Saved caches, plain or entropy-coded: bytes, the JSON object in the header, tensors, streams; the
hash as it was or made to fit."""

import copy
import json
import zlib
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fuzz.mutate import corrupt, read_header, replace_file, tamper, tamper_tensors, write_header
from kvfold import runtime
from kvfold.runtime.cache import storage


class Caches:
    """Cases from the cache of three left-padded sequences of one artifact."""

    name = "cache"

    @torch.no_grad()
    def __init__(self, artifact: Path, scratch: Path) -> None:
        self.model: Any = runtime.load_pretrained(artifact, device="cpu")
        ids = torch.randint(1, 128, (3, 90), generator=torch.Generator().manual_seed(5))
        mask = torch.ones_like(ids)
        for b, length in enumerate((90, 33, 2)):
            mask[b, : 90 - length] = 0
        file, held = scratch / "good.kv", self.model(ids, attention_mask=mask).past_key_values
        self.mask, self.forms = mask, []
        for entropy_coded in (True, False):
            held.save(file, entropy_coded=entropy_coded)
            self.forms.append(file.read_bytes())
        self.logits = self.go_on(runtime.load_cache(file, self.model))

    def go_on(self, cache: Any) -> torch.Tensor:
        """Logits of one more token of each sequence."""
        batch, columns = len(cache.layers[0].lengths()), cache.get_seq_length()
        mask = torch.ones(batch, columns + 1, dtype=torch.long)
        for b, pad in enumerate(cache.shared.padding):
            mask[b, :pad] = 0
        return self.model(
            torch.ones(batch, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache
        ).logits

    def make(self, folder: Path, rng: Random) -> tuple[str, bool]:
        file = folder / "cache.kv"
        data = rng.choice(self.forms)
        coded = data is self.forms[0]
        kinds = ["bytes", "field", "field", "field", "tensors", "tensors", "place"]
        kind = rng.choice(kinds + ["stream"] * 3 * coded)
        if kind == "place":
            file.write_bytes(data)
            return f"{kind} {replace_file(file, rng)}", False
        if kind == "bytes":
            file.write_bytes(corrupt(data, rng, rng.choice((None, 4000))))
            return kind, False
        header, _ = read_header(data)
        state, what = json.loads(header["__metadata__"][storage.FIELD]), ""
        if kind == "field":
            for _ in range(rng.choice((1, 1, 2))):
                what = tamper(state, rng)
        elif kind == "stream":
            data, what = tamper_stream(data, rng)
        else:
            data, what = tamper_tensors(data, rng)
        sealed = rng.random() < 0.9
        file.write_bytes(reseal(data, state) if sealed else data)
        return f"{kind} {what}", sealed

    @torch.no_grad()
    def check(self, folder: Path, sealed: bool, rng: Random) -> str:
        cache = runtime.load_cache(folder / "cache.kv", self.model)
        try:
            same = torch.equal(self.go_on(cache), self.logits)
        except (
            FloatingPointError
        ):  # of numbers that are finite and too large: the runtime says where
            same = False
        assert same or sealed
        return "same" if same else "another"


def tamper_stream(data: bytes, rng: Random) -> tuple[bytes, str]:
    """An entropy-coded file with another stream of one tensor."""
    tensors, (header, _) = load_tensors(data), read_header(data)
    name = rng.choice(sorted(tensors))
    stream = tensors[name].numpy().tobytes()
    how = rng.choice(("corrupt", "corrupt", "bomb", "long", "short", "again", "zlib", "empties"))
    if how == "corrupt":
        stream = corrupt(stream, rng)
    elif how == "bomb":
        stream = bomb()
    elif how == "empties":  # blocks that decode to nothing, without end
        stream = bytes((0, 0, 0, 0xFF, 0xFF)) * 100_000
    else:
        whole = zlib.decompress(stream, -15)
        whole = {
            "long": whole + bytes(rng.randrange(1, 9)),
            "short": whole[: -rng.randrange(1, 9)],
        }.get(how, whole)
        stream = zlib.compress(whole) if how == "zlib" else deflate(whole)
    tensors[name] = torch.frombuffer(bytearray(stream or b"x"), dtype=torch.uint8)
    return save_tensors(tensors, header["__metadata__"]), f"{name} {how}"


@cache
def bomb() -> bytes:
    """A stream that is a thousandth of what it decodes to."""
    return deflate(bytes(1 << 28))


def deflate(data: bytes) -> bytes:
    """A stream of DEFLATE by all its means, repetitions too."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(data) + coder.flush()


def reseal(data: bytes, state: Any) -> bytes:
    """A cache file that states `state` with a hash that fits its tensors, where it can be read at
    all."""
    try:
        tensors = load_tensors(data)
        header, body = read_header(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, MemoryError):
        return data
    state = copy.copy(state)
    if isinstance(state, dict):
        state.pop("sha256", None)
        state["sha256"] = storage._sha256(state, tensors)
    header["__metadata__"] = {storage.FIELD: json.dumps(state)}
    return write_header(header, body)
