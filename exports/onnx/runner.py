"""Runs an exported folder with onnxruntime and numpy alone: how the graphs are meant to be used.

    runner = OnnxRunner("smollm2-onnx")
    for token in runner.generate([[504, 1536, 28]], max_new_tokens=32): ...

Both graphs take token ids and a cache and give logits and the longer cache; what a call's outputs
name "present.…", the next call's inputs name "past.…". An empty cache has zero in every free
dimension but the batch.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

CHUNK = 512  # tokens of a prompt at a time: bounds the score matrix; any split gives the same cache
NUMPY = {
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
}

Cache = dict[str, onnxruntime.OrtValue]


class OnnxRunner:
    """Two sessions over one folder.

    Args:
        folder: what `kvfold export onnx` wrote.
        threads: of each operator; 0 for all cores.
    """

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.prefill, self.decode = (
            onnxruntime.InferenceSession(
                str(Path(folder) / f"{stem}.onnx"), options, providers=["CPUExecutionProvider"]
            )
            for stem in ("prefill", "decode")
        )
        # GroupQueryAttention takes several tokens behind others for one sequence only
        stated = {
            name: json.loads(text)
            for name, text in self.prefill.get_modelmeta().custom_metadata_map.items()
        }
        self.whole_batches = stated.get("kvfold.form") == "gqa"
        self.chunk = int(stated.get("kvfold.chunk", CHUNK))
        self.past = [i for i in self.prefill.get_inputs() if i.name.startswith("past.")]
        self.outputs = [o.name for o in self.prefill.get_outputs()]

    def empty(self, batch: int = 1) -> Cache:
        """A cache of no tokens for `batch` sequences of one length."""
        cache = {}
        for tensor in self.past:
            shape = [
                batch if d == "batch" else 0 if isinstance(d, str) else d for d in tensor.shape
            ]
            cache[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros(shape, NUMPY[tensor.type])
            )
        return cache

    @staticmethod
    def cache_of(arrays: dict[str, np.ndarray]) -> Cache:
        """A cache of given arrays by name, e.g. one that was saved."""
        return {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x))
            for name, x in arrays.items()
        }

    def __call__(
        self, ids: np.ndarray, cache: Cache, keep: Sequence[int] | None = None
    ) -> tuple[np.ndarray, Cache]:
        """One call of a graph: `decode` for one token, else `prefill`.

        Args:
            ids: int64 [B, T], the tokens behind those in the cache.
            cache: stays as it is.
            keep: places in this call, 0 … T − 1, whose logits are wanted; default: all.
        Returns:
            (float32 [B, len(keep), vocabulary], the cache with these tokens)
        """
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        at = np.arange(ids.shape[1]) if keep is None else np.asarray(keep)
        session = self.decode if ids.shape[1] == 1 else self.prefill
        feeds = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(x)
            for name, x in (("input_ids", ids), ("logits_at", at.astype(np.int64)))
        }
        logits, *present = session.run_with_ort_values(self.outputs, feeds | cache)
        return logits.numpy(), {
            name.replace("present.", "past."): t
            for name, t in zip(self.outputs[1:], present, strict=True)
        }

    def read(
        self, ids: np.ndarray, cache: Cache | None = None, chunk: int | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Takes in a prompt [B, T], `chunk` tokens at a time: (logits of its last token [B,
        vocabulary], the cache)."""
        ids = np.asarray(ids)
        cache = self.empty(len(ids)) if cache is None else cache
        chunk = ids.shape[1] if self.whole_batches and len(ids) > 1 else chunk or self.chunk
        for start in range(0, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            logits, cache = self(part, cache, [part.shape[1] - 1])
        return logits[:, 0], cache

    def generate(
        self, ids: Sequence[Sequence[int]] | np.ndarray, max_new_tokens: int, end: int | None = None
    ) -> Iterator[np.ndarray]:
        """Greedy continuation of prompts of one length: yields int64 [B] a token, until all
        sequences have ended.

        Args:
            ids: [B, T].
            end: token that ends a sequence; None for none.
        """
        logits, cache = self.read(np.asarray(ids))
        ended = np.zeros(len(logits), bool)
        for count in range(max_new_tokens):
            token = logits.argmax(-1)
            yield token
            ended |= token == end
            if ended.all() or count + 1 == max_new_tokens:
                return
            logits, cache = self(token[:, None], cache)
            logits = logits[:, 0]


def nbytes(cache: Cache) -> int:
    """Bytes of a cache's tensors."""
    return sum(tensor.numpy().nbytes for tensor in cache.values())
