"""What a saved cache takes on disk, plain and entropy-coded; what its parts are worth by entropy and
by the coders of the standard library; how fast they are.

    python benchmarks/saved_bytes.py DIR [--tokens 4096] [--text TEXT] [--json FILE]

Bits are of one code: as pages hold it, by the entropy of the codes of a class (of one layer, keys or
values), of a channel, and as coded. Rates are of plain bytes, per second of a processor.
"""

import argparse
import json
import lzma
import math
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from offload import text_ids
from torch import Tensor

from kvfold import runtime
from kvfold.compress.models import quiet_transformers
from kvfold.runtime.cache import entropy, storage

CHUNK = 512  # tokens of the text at a time
SAMPLE = 4  # lzma, which is slow, sees the pages of each fourth layer
CODERS: dict[str, Callable[[bytes], bytes]] = {
    "zlib, Huffman only": lambda data: entropy.deflate(iter([_bytes(data)])).numpy().tobytes(),
    "zlib": lambda data: zlib.compress(data),
    "lzma": lambda data: lzma.compress(data, preset=6),
}


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` gives, and the seconds of a processor that it took."""
    begun = time.process_time()
    return run(), time.process_time() - begun


def bits(codes: np.ndarray) -> float:
    """Entropy of uint8 [...], in bits an element."""
    counts = np.bincount(codes.reshape(-1))
    shares = counts[counts > 0] / codes.size
    return float(-(shares * np.log2(shares)).sum())


def parts_of(layers: list[tuple], coded: dict[str, list[float]]) -> None:
    """Adds up, by part: numbers, and bits of them as stored, by class, by channel and as coded."""
    for found, geometry, formats in layers:
        for planes, section in entropy.page_sections(found["pages"], geometry, formats):
            size = 8.0 * len(entropy.deflate(iter([section])))
            if not planes:
                data = section.numpy()
                row = [data.size, 8.0 * data.size, bits(data) * data.size, float("nan"), size]
                name = "parameters and other bytes"
            else:
                width, count = entropy.packing(planes)
                codes = torch.stack(
                    [(section >> width * i) & (2**width - 1) for i in range(count)], -1
                ).numpy()
                own = sum(bits(x) * x.size for head in codes for x in head)
                row = [codes.size, width * codes.size, bits(codes) * codes.size, own, size]
                name = f"codes of {width} bits"
            coded[name] = [a + b for a, b in zip(coded[name], row, strict=True)]
        for name in ("keys", "values"):
            for which, data in zip(("low", "high"), entropy.row_sections(found[name]), strict=True):
                size, n = 8.0 * len(entropy.deflate(iter([data]))), data.numel()
                row = [n, 8.0 * n, bits(data.numpy()) * n, float("nan"), size]
                name_ = f"16-bit rows, {which} bytes"
                coded[name_] = [a + b for a, b in zip(coded[name_], row, strict=True)]


@torch.inference_mode()
def filled(model: Any, ids: Tensor) -> Any:
    """The cache of a text, int64 [1, tokens]."""
    cache = None
    for part in ids.split(CHUNK, 1):
        cache = model(part, past_key_values=cache, logits_to_keep=1).past_key_values
    return cache


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument(
        "--text", help="text file, or datasets id as ID:CONFIG:SPLIT; default: the held-out text"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    ids = text_ids(args.artifact, args.text, args.tokens)
    model = runtime.load_pretrained(args.artifact, device="cpu")
    cache = filled(model, ids)
    report: dict[str, Any] = {"artifact": args.artifact.name, "tokens": args.tokens}
    with tempfile.TemporaryDirectory() as folder:
        plain, coded, again = (Path(folder) / name for name in ("plain", "coded", "again"))
        _, report["plain_save_s"] = timed(lambda: cache.save(plain))
        _, report["coded_save_s"] = timed(lambda: cache.save(coded, entropy_coded=True))
        _, report["plain_load_s"] = timed(lambda: runtime.load_cache(plain, model))
        restored, report["coded_load_s"] = timed(lambda: runtime.load_cache(coded, model))
        restored.save(again)
        report["same"] = again.read_bytes() == plain.read_bytes()
        report["plain_bytes"], report["coded_bytes"] = plain.stat().st_size, coded.stat().st_size
        tensors, streams = storage.read_file(plain)[1], storage.read_file(coded)[1]
    names = entropy.NAMES
    layers = [
        ({n: tensors[f"layers.{i}.{n}"] for n in names}, layer.geometry, layer.formats)
        for i, layer in enumerate(cache.layers)
    ]
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)
    parts_of(layers, parts)
    report["parts"] = {
        name: {"numbers": int(n)}
        | {
            key: None if math.isnan(x) else round(x / n, 4)
            for key, x in zip(("stored", "class", "channel", "coded"), rest, strict=True)
        }
        for name, (n, *rest) in sorted(parts.items())
    }
    pages = [found["pages"].numpy().tobytes() for found, _, _ in layers]
    total = sum(map(len, pages))
    report["pages_as_they_lie"] = {}
    for name, coder in CODERS.items():
        some = pages[::SAMPLE] if name == "lzma" else pages
        sizes, seconds = timed(lambda coder=coder, some=some: [len(coder(x)) for x in some])
        own = sum(map(len, some))
        report["pages_as_they_lie"][name] = {"share": sum(sizes) / own, "MB/s": own / seconds / 1e6}

    def stored(i: int) -> dict[str, Tensor]:
        return {name: streams[f"layers.{i}.{name}"] for name in names}

    plain_bytes = sum(x.nbytes for x in tensors.values())
    _, code = timed(lambda: [entropy.code_layer(*layer) for layer in layers])
    _, decode = timed(
        lambda: [
            entropy.decode_layer(stored(i), found["keys"].shape[1], len(found["pages"]), *rest)
            for i, (found, *rest) in enumerate(layers)
        ]
    )
    raw = [x.numpy().tobytes() for x in streams.values()]
    _, inflate = timed(lambda: [zlib.decompress(x, -15) for x in raw])
    own = [torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in pages]
    _, copy = timed(lambda: [x.clone() for x in own])
    report["MB/s"] = {
        "code": plain_bytes / code / 1e6, "decode": plain_bytes / decode / 1e6,
        "inflate alone": plain_bytes / inflate / 1e6, "copy of pages": total / copy / 1e6,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
