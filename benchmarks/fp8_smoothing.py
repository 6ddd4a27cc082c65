"""What transforms folded into the weights buy other engines' caches: KL with FP8 and NVFP4 keys and
values, emulated.

Every token is stored, sinks and latest included, as vLLM and TensorRT-LLM do; scales are static,
one a layer and side ("tensor") or one a KV head ("head"), calibrated on the built-in text after the
transform is folded in. The reference is the original weights with an unquantised cache; all is
computed in float32. Prints one Markdown table.

usage: python benchmarks/fp8_smoothing.py [MODEL] [--text FILE|DATASET] [--windows 3] [--seq-len 1024] [--json FILE]
"""

import argparse
import json
import platform
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from kvfold.compress.calibrate import calibrate
from kvfold.compress.evaluate import windows_of
from kvfold.compress.fuse import fuse_pair_scale, fuse_values
from kvfold.compress.models import load_model, quiet_transformers, read_config, resolve_model
from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.search.fold import set_parameters
from kvfold.compress.search.sensitivity import Passage, Probe
from kvfold.compress.targets.engine_formats import FP8_MAX, rounding_tap
from kvfold.compress.targets.engines import measure_ranges
from kvfold.compress.text import read_documents, sample_sequences
from kvfold.compress.transforms.rotate import balance, rotate
from kvfold.compress.transforms.smooth import pair_scale
from kvfold.exports.architectures import architecture_of
from kvfold.pretrained import tokenizer_from_pretrained

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
# name, value basis, exponent of the pair scale of keys
WEIGHTS = [
    ("original", None, None),
    ("V rotated (what an artifact holds)", rotate, None),
    ("V balanced", balance, None),
    ("K pair scale, exponent 0.5", None, 0.5),
    ("K pair scale, exponent 1", None, 1.0),
]
# column, format of keys, of values, scales per head
CACHES = [
    ("V FP8", None, "FP8", False),
    ("K FP8", "FP8", None, False),
    ("K, V FP8", "FP8", "FP8", False),
    ("V FP8 per head", None, "FP8", True),
    ("K FP8 per head", "FP8", None, True),
    ("V NVFP4", None, "NVFP4", False),
    ("K NVFP4", "NVFP4", None, False),
]


@contextmanager
def folded(model, arch, stats, basis, exponent):
    """The model with a value basis and a pair scale folded into its weights while this lasts."""
    saved = []
    for i, (attention, found) in enumerate(zip(arch.attention_modules(model), stats, strict=True)):
        fused = {}
        if basis is not None:
            fused |= fuse_values(attention, basis(found, torch.Generator().manual_seed(i)))
        if exponent is not None:
            fused |= fuse_pair_scale(attention, pair_scale(found, exponent, arch.qk_norm), arch)
        saved.append(
            (attention, {name: attention.get_parameter(name).detach().clone() for name in fused})
        )
        set_parameters(attention, fused, torch.float32)
    try:
        yield
    finally:
        for attention, parameters in saved:
            set_parameters(attention, parameters, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--text", default=WIKITEXT)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calib-sequences", type=int, default=4)
    parser.add_argument(
        "--caches", help="only these columns, by name and separated by ';'; default: all"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet_transformers()
    torch.set_flush_denormal(True)
    source = resolve_model(options.model)
    arch = architecture_of(read_config(source.path))
    tokenizer = tokenizer_from_pretrained(source.path)
    model = load_model(source.path, torch.float32, torch.device("cpu"), TAP)
    name, documents = read_documents(options.text)
    windows = windows_of(
        tokenizer, "\n\n".join(documents), options.seq_len, 0, options.windows, name
    )
    sequences = sample_sequences(
        tokenizer, read_documents(None)[1], options.calib_sequences, options.seq_len, 0, "built-in"
    )
    chosen = options.caches.split(";") if options.caches else [row[0] for row in CACHES]
    rows = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as work:
        stats = calibrate(model, arch, sequences, [1] * len(sequences), 512, Path(work))
        probes = [Probe(model, arch, [Passage(ids, 4)]) for ids in windows]

        def measure(key, value, key_scales, value_scales) -> list[float]:
            taps = [
                rounding_tap(key, value, *scales)
                for scales in zip(key_scales, value_scales, strict=True)
            ]
            return [probe.whole_model(taps) for probe in probes]

        for weights, basis, exponent in WEIGHTS:
            # a transform of one side is judged on caches that store that side
            todo = [
                c
                for c in CACHES
                if c[0] in chosen and not (exponent and not c[1]) and not (basis and not c[2])
            ]
            if not todo:
                continue
            with folded(model, arch, stats, basis, exponent):
                ranges = measure_ranges(model, arch, sequences)
                rounding = max(probe.whole_model() for probe in probes)
                for cache, key, value, per_head in todo:
                    rows.append(
                        [weights, cache, measure(key, value, *ranges.scales(per_head)), rounding]
                    )
                    print(*rows[-1], file=sys.stderr, flush=True)
                if weights == "original" and any(c[1] for c in todo):
                    bare = ranges.key.amax(1, keepdim=True) / FP8_MAX
                    rows.append(
                        [weights, "K FP8, no headroom", measure("FP8", None, bare, bare), rounding]
                    )
                    print(*rows[-1], file=sys.stderr, flush=True)
    print(
        f"{platform.machine()}, torch {torch.__version__}; {name}, {options.windows} windows of {options.seq_len}"
    )
    print("| weights | cache | KL, nats | against original, by window |")
    print("|---|---|---|---|")
    base = {cache: kls for weights, cache, kls, _ in rows if weights == "original"}
    for weights, cache, kls, _ in rows:
        kl = torch.tensor(kls)
        error = f" ± {kl.std() / len(kls) ** 0.5:.1e}" if len(kls) > 1 else ""
        ratio = (
            ""
            if weights == "original"
            else " ".join(f"{a / b:.2f}" for a, b in zip(kls, base[cache], strict=True))
        )
        print(f"| {weights} | {cache} | {kl.mean():.2e}{error} | {ratio} |")
    if options.json:
        keys = ("weights", "cache", "kl_by_window", "kl_of_folding_alone")
        options.json.write_text(
            json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
