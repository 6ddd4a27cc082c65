"""Saved caches: bytes, the JSON object in the header, tensors; the hash as it was or made to
fit."""

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

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
        file = scratch / "good.kv"
        self.model(ids, attention_mask=mask).past_key_values.save(file)
        self.data, self.mask = file.read_bytes(), mask
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
        kind = rng.choice(("bytes", "field", "field", "field", "tensors", "tensors", "place"))
        if kind == "place":
            file.write_bytes(self.data)
            return f"{kind} {replace_file(file, rng)}", False
        if kind == "bytes":
            file.write_bytes(corrupt(self.data, rng, rng.choice((None, 4000))))
            return kind, False
        header, _ = read_header(self.data)
        state = json.loads(header["__metadata__"][storage.FIELD])
        data, what = self.data, ""
        if kind == "field":
            for _ in range(rng.choice((1, 1, 2))):
                what = tamper(state, rng)
        else:
            data, what = tamper_tensors(self.data, rng)
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
