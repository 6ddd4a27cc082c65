"""`kvfold export onnx`: the compressed model as ONNX graphs."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kvfold.compress.models import load_model, read_config
from kvfold.compress.progress import stage
from kvfold.compress.targets.engines import NUM_SEQUENCES, PROBE_LEN, PROBE_STRIDE, SEQ_LEN
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import architecture_of, hybrid_of
from kvfold.exports.engines.folder import OURS, check_engine_folder
from kvfold.exports.place import new_folder
from kvfold.exports.reader import Artifact, read_artifact
from kvfold.pretrained import tokenizer_from_pretrained

FORMS = ("packed", "gqa", "16bit")
NEEDED = ("onnx", "onnxscript")
CHANGING_ROPE = (
    "longrope",
    "dynamic",
)  # another table beyond some length, chosen while the model runs

# tokens at a time where a layer has experts: the graph gathers the weights of each token's experts
EXPERTS_CHUNK = 8


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    Attributes:
        nbytes: of all files.
        cache_bits: payload bits of one cached element.
        kl: for "gqa", nats of KL with all layers in that form, on calibration text; else None.
    """

    nbytes: int
    cache_bits: float
    kl: float | None


def check_onnx(artifact: Artifact, form: str, bits: int | None) -> None:
    """Refuses what can't be expressed, before anything is computed.

    Raises:
        KvfoldError: an unknown form, bits that go with another, a missing package, or a family that
            can't be expressed.
    """
    if form not in FORMS:
        raise KvfoldError(
            f"--form '{form}' is not one that can be written; use {', '.join(FORMS[:-1])} or {FORMS[-1]}."
        )
    if bits is not None and form != "gqa":
        raise KvfoldError(
            f"--bits {bits} goes with --form gqa; the form '{form}' has the bits that it has, leave it out."
        )
    if bits not in (None, 4, 8):
        raise KvfoldError(
            f"--bits {bits} is not a width that GroupQueryAttention stores; give 8 or 4."
        )
    for name in NEEDED:
        if find_spec(name) is None:
            raise KvfoldError(
                f"The ONNX export needs the package {name}; install it with: pip install 'kvfold[onnx]'."
            )
    config = read_config(artifact.path)
    family = architecture_of(config).model_type
    if architecture_of(config).tower:
        raise KvfoldError(
            f"This '{family}' model cannot be expressed in ONNX: graphs take tokens, not images; export an artifact of "
            "its language model alone."
        )
    if hybrid_of(config) is not None:
        raise KvfoldError(
            f"This '{family}' model cannot be expressed in ONNX: graphs take keys and values of every layer and "
            "nothing else, which is not what its layers keep; run it by runtime.load_pretrained."
        )
    if artifact.metadata.cache.heads or artifact.metadata.cache.shared:
        raise KvfoldError(
            f"This '{family}' model cannot be expressed in ONNX: graphs take keys and values of as many heads and "
            "channels for every layer, and its layers differ; run it by runtime.load_pretrained."
        )
    if artifact.metadata.cache.chunked:
        raise KvfoldError(
            f"This '{family}' model cannot be expressed in ONNX: graphs attend to all tokens or to the latest, and its "
            "layers attend in chunks; run it by runtime.load_pretrained."
        )
    if family == "falcon":
        raise KvfoldError(
            "This 'falcon' model cannot be expressed in ONNX: transformers' own attention of it is inside its layers; "
            "run it by runtime.load_pretrained."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [t for t in (rope, *rope.values()) if isinstance(t, dict)]
    for table in tables:
        if table.get("rope_type") in CHANGING_ROPE:
            raise KvfoldError(
                f"This '{family}' model cannot be expressed in ONNX: its RoPE is of type '{table['rope_type']}', whose "
                "table changes with the length; export a model with a fixed table."
            )
    if form == "gqa" and bits == 4 and artifact.metadata.cache.head_dim % 2:
        raise KvfoldError(
            f"head_dim {artifact.metadata.cache.head_dim} is odd, so int4 codes don't pair up; use --bits 8."
        )


def export_onnx(
    artifact_dir: Path,
    out: Path,
    form: str,
    bits: int | None,
    calib: str | None,
    device: torch.device,
) -> OnnxExport:
    """Writes prefill.onnx, decode.onnx and weights.bin, with tokenizer and licence files beside
    them.

    Args:
        form: "packed" (the artifact's own formats), "gqa" (uniform codes with static scales), or
            "16bit".
        bits: of "gqa": 8 (default) or 4.
        calib: of "gqa": text source, None for the built-in text.
    Raises:
        KvfoldError: an invalid artifact, a place that can't be written, or what check_onnx refuses.
    """
    artifact = read_artifact(artifact_dir)
    check_engine_folder(artifact, out)
    check_onnx(artifact, form, bits)
    codecs, kl = _calibrate(artifact, bits or 8, calib, device) if form == "gqa" else (None, None)
    with new_folder(out) as scratch:
        cache_bits = _write(artifact, scratch, form, codecs)
    return OnnxExport(sum(p.stat().st_size for p in out.iterdir()), cache_bits, kl)


def _calibrate(
    artifact: Artifact, bits: int, calib: str | None, device: torch.device
) -> tuple[list, float]:
    """Codecs of all layers, and the KL that they cost together."""
    from kvfold.compress.search.sensitivity import Passage, Probe
    from kvfold.compress.targets.onnx_scales import calibrate_codecs, codec_tap
    from kvfold.compress.text import read_documents, sample_sequences

    name, documents = read_documents(calib)
    stated = artifact.metadata.calibration
    stage(f"reading {artifact.path.name}")
    model: Any = load_model(
        artifact.path, torch.float32 if device.type == "cpu" else "auto", device
    )
    arch = architecture_of(model.config)
    length = min(SEQ_LEN, model.config.max_position_embeddings)
    tokenizer = tokenizer_from_pretrained(artifact.path)
    sequences = sample_sequences(tokenizer, documents, NUM_SEQUENCES, length, stated.seed, name)
    with torch.inference_mode():
        codecs = calibrate_codecs(model, arch, sequences, stated.spread, bits)
        probe = Probe(
            model, arch, [Passage(ids[:, :PROBE_LEN], PROBE_STRIDE) for ids in sequences[:1]]
        )
        kl = probe.whole_model([codec_tap(pair) for pair in codecs])
    return codecs, kl


def _write(artifact: Artifact, folder: Path, form: str, codecs: list | None) -> float:
    """Traces the model and writes the graphs; returns the payload bits of a cached element."""
    from kvfold.exports.onnx.attention import PackedAttention, packed_tensors, raw_tensors
    from kvfold.exports.onnx.gqa import GqaAttention, gqa_tensors
    from kvfold.exports.onnx.trace import NAME, trace
    from kvfold.exports.onnx.writer import copy_side_files, write_graphs

    geometry, specs = artifact.geometry, artifact.specs
    stage("tracing the model")
    model: Any = load_model(artifact.path, torch.float32, torch.device("cpu"), NAME)
    stated: dict[str, Any] = {"form": form, "model": artifact.metadata.provenance.model}
    if getattr(model.config, "num_local_experts", None):
        stated["chunk"] = EXPERTS_CHUNK
    make: Any
    if codecs is not None:
        tensors = [gqa_tensors(codecs[0][0].bits, geometry.num_kv_heads, geometry.head_dim)] * len(
            specs
        )
        bits = float(codecs[0][0].bits)

        def make(single: bool) -> GqaAttention:
            return GqaAttention(codecs)
    elif form == "packed":
        tensors = [packed_tensors(geometry, spec) for spec in specs]
        bits = artifact.metadata.account.payload_bits
        stated |= {
            "sinks": geometry.sinks,
            "window": geometry.window,
            "page_tokens": geometry.page_tokens,
        }
        stated["formats"] = [[k.to_dict(), v.to_dict()] for k, v in artifact.formats]

        def make(single: bool) -> PackedAttention:
            return PackedAttention(geometry, specs, single)
    else:
        tensors, bits = [raw_tensors(geometry)] * len(specs), 16.0

        def make(single: bool) -> PackedAttention:
            return PackedAttention(geometry, None, single)

    traced = trace(model, tensors, geometry.page_tokens)
    stage("writing the graphs")
    write_graphs(folder, traced, tensors, make, model.config.vocab_size, stated)
    copy_side_files(artifact.path, folder, OURS)
    (folder / "README.md").write_text(_card(artifact, form, bits), encoding="utf-8")
    return bits


def _card(artifact: Artifact, form: str, bits: float) -> str:
    model = artifact.metadata.provenance.model
    kinds = {
        "packed": f"pages of {bits:.3f} payload bits an element, with sinks and window in 16 bits, in kvfold's format",
        "gqa": f"int{bits:.0f} codes with a static scale for each channel, by onnxruntime's GroupQueryAttention",
        "16bit": "float16",
    }
    return (
        f'---\nbase_model: "{model}"\nbase_model_relation: quantized\nlibrary_name: onnx\n---\n'
        f"# {model} in ONNX, with its KV cache in "
        f"{'16 bits' if form == '16bit' else 'few bits'}\n\nThe cache is stored as {kinds[form]}. `prefill.onnx` takes "
        "any number of tokens, `decode.onnx` one; both read `weights.bin`. Outputs `present.…` are the next call's "
        "inputs `past.…`; at the start these have zero in every free dimension but the batch. Sequences of a batch are "
        "equally long. `kvfold.exports.onnx.runner.OnnxRunner` shows it.\n"
    )
