"""Exports for serving engines: calibrates static scales of their own cache formats on the
artifact's fused weights."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.models import load_model, read_config
from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.models.attention_hook import tapped
from kvfold.compress.models.layerwise import LayerRunner
from kvfold.compress.progress import progress, stage
from kvfold.compress.search.allocate import Choice, allocate
from kvfold.compress.search.sensitivity import Passage, Probe
from kvfold.compress.targets.engine_formats import FP4_BLOCK, FP8_MAX, rounding_tap
from kvfold.compress.text import read_documents, sample_sequences
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import Architecture, architecture_of, attention_layers_of
from kvfold.exports.engines.compressed_tensors import kv_cache_config, write_compressed_tensors
from kvfold.exports.engines.folder import attention_names, check_engine_folder
from kvfold.exports.engines.modelopt import KV_BITS, write_modelopt
from kvfold.exports.reader import Artifact, read_artifact
from kvfold.pretrained import tokenizer_from_pretrained

# RoPE turns a pair of channels; |(a, b)| ≤ √2·max(|a|, |b|), so this much room keeps every position
# within range, whichever channels are paired. A float format doesn't mind: its precision is
# relative.
KEY_HEADROOM = 2.0**0.5
NUM_SEQUENCES, SEQ_LEN = 4, 2048  # of calibration text for ranges
PROBE_LEN, PROBE_STRIDE = 1024, 4  # of the text on which layers are probed


@dataclass(frozen=True)
class Ranges:
    """Largest magnitude of each layer's keys (after RoPE) and values over all calibration tokens,
    float32 [layers, Hkv]."""

    key: Tensor
    value: Tensor

    def scales(self, per_head: bool) -> tuple[Tensor, Tensor]:
        """Static e4m3 scales of keys and values: float32 [layers, Hkv] each, or [layers, 1] for all
        heads together."""
        found = []
        for absmax in (self.key * KEY_HEADROOM, self.value):
            top = absmax if per_head else absmax.amax(1, keepdim=True)
            found.append(
                torch.where(top > 0, top, torch.ones_like(top)) / FP8_MAX
            )  # a dead head needs some scale
        return found[0], found[1]


def measure_ranges(model: Any, arch: Architecture, sequences: list[Tensor]) -> Ranges:
    """Runs the model layer by layer and notes the largest keys and values; first tokens count, as
    engines store them too.

    Args:
        model: loaded with attention tap.NAME.
        sequences: int64 [1, T] each.
    """
    places = attention_layers_of(model.config)
    attentions = dict(zip(places, arch.attention_modules(model), strict=True))
    runners = [
        LayerRunner(model, arch, ids.to(next(model.parameters()).device)) for ids in sequences
    ]
    hidden = [runner.embedded for runner in runners]
    tops: dict[str, list[Tensor]] = {"key": [], "value": []}
    for i in progress(range(places[-1] + 1), "calibrate", "layer"):
        seen: dict[str, list[Tensor]] = {"key": [], "value": []}

        def tap(module, query, key, value, mask, scaling, seen=seen, **extras):
            for name, x in (("key", key), ("value", value)):
                seen[name].append(x.detach().float().abs().amax((0, 2, 3)).cpu())
            return None

        with tapped(attentions[i], tap) if i in attentions else nullcontext():
            hidden = [runner.run(i, h) for runner, h in zip(runners, hidden, strict=True)]
        if i not in attentions:
            continue
        for name, values in seen.items():
            tops[name].append(torch.stack(values).amax(0))
    return Ranges(torch.stack(tops["key"]), torch.stack(tops["value"]))


def _prepare(
    artifact: Artifact, calib: str | None, device: torch.device
) -> tuple[Any, Architecture, list[Tensor]]:
    """The artifact's plain model, its row of the table, and calibration sequences."""
    name, documents = read_documents(calib)
    tokenizer = tokenizer_from_pretrained(artifact.path)
    stage(f"reading {artifact.path.name}")
    model: Any = load_model(
        artifact.path, torch.float32 if device.type == "cpu" else "auto", device, TAP
    )
    length = min(SEQ_LEN, model.config.max_position_embeddings)
    sequences = sample_sequences(
        tokenizer, documents, NUM_SEQUENCES, length, artifact.metadata.calibration.seed, name
    )
    return model, architecture_of(model.config), sequences


def export_compressed_tensors(
    artifact_dir: Path, out: Path, strategy: str, calib: str | None, device: torch.device
) -> None:
    """Writes the artifact's weights with a calibrated fp8 `kv_cache_scheme`.

    Args:
        strategy: "tensor" or "attn_head".
        calib: text source, None for the built-in text.
    Raises:
        KvfoldError: an invalid artifact, a place that can't be written, a missing package, a family
            that can't be expressed.
    """
    artifact = read_artifact(artifact_dir)
    check_engine_folder(artifact, out)
    attention_names(artifact)
    kv_cache_config(strategy)
    model, arch, sequences = _prepare(artifact, calib, device)
    with torch.inference_mode():
        keys, values = measure_ranges(model, arch, sequences).scales(strategy == "attn_head")
    write_compressed_tensors(artifact, out, strategy, keys, values)


@dataclass(frozen=True)
class KVMap:
    """A cache format for each layer, and what it costs on calibration text.

    Attributes:
        algos: "FP8" or "NVFP4" of each layer.
        losses: nats of KL with that layer alone in each format, by format.
        bits: mean payload bits.
        kl: nats of KL with all layers in their formats.
    """

    algos: list[str]
    losses: dict[str, list[float]]
    bits: float
    kl: float


def choose_bits(request: float | None, payload_bits: float) -> float:
    """The mean payload bits to allocate: as asked, or the artifact's own as far as the two formats
    reach.

    Raises:
        KvfoldError: a request outside of what the two formats span.
    """
    low, high = min(KV_BITS.values()), max(KV_BITS.values())
    if request is None:
        return min(max(payload_bits, low), high)
    if not low <= request <= high:
        raise KvfoldError(
            f"--bits {request} is outside of what FP8 and NVFP4 span; give {low} to {high}."
        )
    return request


def allocate_formats(losses: dict[str, list[float]], elements: int, bits: float) -> list[str]:
    """The format of each layer with the least total loss, by the same program that `compress`
    solves.

    Args:
        losses: format → nats a layer.
        elements: cached elements of one layer; bits: mean payload bits that all layers may take.
    """
    names = list(losses)
    layers = len(losses[names[0]])
    groups = [
        [Choice(int(elements * KV_BITS[n]) // 8, losses[n][i]) for n in names]
        for i in range(layers)
    ]
    return [names[c] for c in allocate(groups, int(elements * bits * layers / 8 + 1e-6))]


def export_modelopt(
    artifact_dir: Path, out: Path, bits: float | None, calib: str | None, device: torch.device
) -> KVMap:
    """Writes the artifact's weights with a per-layer map of FP8 and NVFP4 caches.

    Each layer is put into each format alone, keys and values together, and the KL of the model's
    output is measured; then all are chosen together under the mean of `bits`.

    Args:
        bits: mean payload bits, 4.5 to 8; None for the artifact's, raised to 4.5 where it has
            fewer.
        calib: text source, None for the built-in text.
    Raises:
        KvfoldError: as for export_compressed_tensors, or bits or a head_dim that the formats can't
            have.
    """
    artifact = read_artifact(artifact_dir)
    check_engine_folder(artifact, out)
    attention_names(artifact)
    cache = artifact.metadata.cache
    target = choose_bits(bits, artifact.metadata.account.payload_bits)
    if cache.head_dim % FP4_BLOCK:
        family = read_config(artifact.path).model_type
        raise KvfoldError(
            f"head_dim {cache.head_dim} of this '{family}' model is not a multiple of {FP4_BLOCK}, which NVFP4's "
            "blocks need; use `kvfold export compressed-tensors`."
        )
    model, arch, sequences = _prepare(artifact, calib, device)
    with torch.inference_mode():
        keys, values = measure_ranges(model, arch, sequences).scales(per_head=False)
        probe = Probe(
            model, arch, [Passage(ids[:, :PROBE_LEN], PROBE_STRIDE) for ids in sequences[:1]]
        )
        losses: dict[str, list[float]] = {algo: [] for algo in KV_BITS}
        for i in progress(range(cache.num_layers), "sensitivity", "layer"):
            for algo, found in losses.items():
                found.append(probe.measure(i, rounding_tap(algo, algo, keys[i], values[i])))
        algos = allocate_formats(
            losses, 2 * cache.num_kv_heads * cache.head_dim * artifact.metadata.account.at, target
        )
        kl = probe.whole_model(
            [rounding_tap(a, a, keys[i], values[i]) for i, a in enumerate(algos)]
        )
    write_modelopt(artifact, out, algos, keys[:, 0], values[:, 0])
    return KVMap(algos, losses, sum(KV_BITS[a] for a in algos) / len(algos), kl)
