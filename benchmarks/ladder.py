"""What a format costs a layer's attention in the searched basis: why the progressive policy's rungs
are what they are.

usage: python benchmarks/ladder.py DIR [--text FILE|DATASET] [--tokens 1024]

Keys or values of every layer go through the packed bytes of one format; the figure is the squared
error of what the attention adds to the residual stream over its own square, mean and largest of the
layers. Formats that follow a floor's classes are given for the layers whose floor has classes.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from kvfold.compress.models import load_model, quiet_transformers
from kvfold.compress.models.attention_hook import NAME, tapped
from kvfold.compress.text import HELD_OUT, read_documents, tokenize
from kvfold.exports.architectures import ARCHITECTURES
from kvfold.exports.reader import read_artifact
from kvfold.exports.spec import clip_rows
from kvfold.kernels.attention import attend_plain
from kvfold.kernels.catalogue import code_bits, key_formats
from kvfold.kernels.formats import Format, uniform
from kvfold.kernels.quantizer import round_trip, to_float16
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.budget.ladder import widened


def cut(floor: Format) -> Format | None:
    """The catalogue's first cut of 4 bits, for floors that have classes."""
    cuts = [f for f in key_formats(floor.head_dim) if f.params == "scale" and code_bits(f) == 4]
    return cuts[0] if cuts and floor.params == "scale" else None


FORMATS: dict[str, Callable[[Format], Format | None]] = {
    "floor": lambda floor: floor,
    "4 bits, asymmetric e4m3": lambda floor: uniform(floor.head_dim, 16),
    "4 bits, asymmetric e4m3, groups of 32": lambda floor: uniform(floor.head_dim, 16, "e4m3", 32),
    "4 bits, the floor's classes widened": lambda floor: (
        widened(floor, 4) if floor.params == "scale" else None
    ),
    "4 bits, a cut of the catalogue": cut,
    "8 bits, symmetric e4m3": lambda floor: Format(((floor.head_dim, 256),)),
    "8 bits, asymmetric e4m3": lambda floor: uniform(floor.head_dim, 256),
    "8 bits, asymmetric fp16": lambda floor: uniform(floor.head_dim, 256, "fp16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    quiet_transformers()
    artifact = read_artifact(options.artifact)
    model = load_model(artifact.path, torch.float32, torch.device("cpu"), NAME)
    attentions = ARCHITECTURES[model.config.model_type].attention_modules(model)
    documents = read_documents(options.text, default=(HELD_OUT,))[1]
    tokens = tokenize(tokenizer_from_pretrained(artifact.path), "\n\n".join(documents))[
        : options.tokens
    ]
    errors: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def measure(
        module, query: Tensor, key: Tensor, value: Tensor, mask, scaling: float, **extras
    ) -> None:
        """query [1, H, T, D], key and value [1, Hkv, T, D] after RoPE."""
        spec = artifact.specs[module.layer_idx]
        places = torch.arange(key.shape[2])
        z = to_float16(spec.key.apply(key, places, artifact.geometry.sinks)).float()
        v, q = to_float16(value).float(), spec.key.apply_query(query)
        mean = spec.key.transform(key) - z  # what a reader adds to the logits, as keys

        def added(z: Tensor, v: Tensor) -> Tensor:
            out = attend_plain(q, z + mean, v, scaling, mask, **extras)
            return module.o_proj(out.transpose(1, 2).flatten(2))

        exact = added(z, v)
        for side, part in (("K", spec.key), ("V", spec.value)):
            for name, choose in FORMATS.items():
                fmt = choose(part.format)
                if fmt is None:
                    continue
                clip = clip_rows(part.clip) if name == "floor" else None
                found = (
                    (round_trip(z[0], fmt, clip)[None], v)
                    if side == "K"
                    else (z, round_trip(v[0], fmt, clip)[None])
                )
                error = float((added(*found) - exact).square().mean() / exact.square().mean())
                errors.setdefault((name, side), []).append((fmt.payload_bits, error))

    with torch.inference_mode(), ExitStack() as stack:
        for attention in attentions:
            stack.enter_context(tapped(attention, measure))
        model(torch.tensor([tokens]), use_cache=False)
    print(
        "| format | side | layers | payload bits | mean error | largest |\n|---|---|---|---|---|---|"
    )
    for (name, side), rows in sorted(
        errors.items(), key=lambda item: (item[0][1], list(FORMATS).index(item[0][0]))
    ):
        bits, error = (torch.tensor(x) for x in zip(*rows, strict=True))
        print(
            f"| {name} | {side} | {len(rows)} | {bits.mean():.3f} | {error.mean():.1e} | {error.max():.1e} |"
        )


if __name__ == "__main__":
    main()
