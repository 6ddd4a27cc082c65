"""`compress`: calibrate → candidates → sensitivities → allocation → fuse → export."""

import platform
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from kvfold import __version__
from kvfold.compress.allocate import Choice, allocate, least_nbytes
from kvfold.compress.budget import Budget, parse_budget
from kvfold.compress.calibrate import LayerStats, calibrate
from kvfold.compress.candidates import KeyCandidate, ValueCandidate, key_candidates, value_basis, value_candidates
from kvfold.compress.fuse import fuse_pair_scale, fuse_values
from kvfold.compress.models import ALIASES, Source, load_model, read_config, resolve_model
from kvfold.compress.recipe import Recipe
from kvfold.compress.sensitivity import Probe, sensitivities
from kvfold.compress.tap import NAME as TAP
from kvfold.compress.text import read_documents, sample_sequences
from kvfold.compress.work import fingerprint, open_work, weights_fingerprint
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, cache_nbytes, payload_bits
from kvfold.exports.architectures import Architecture, architecture_of, head_dim_of, num_kv_heads_of
from kvfold.exports.reader import Artifact
from kvfold.exports.schema import (
    FORMAT_VERSION,
    AccountModel,
    BudgetModel,
    CacheModel,
    CalibrationModel,
    FormatModel,
    LayerModel,
    Metadata,
    ProvenanceModel,
    SideModel,
)
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.exports.writer import check_output, write_artifact
from kvfold.kernels.formats import TRIT, Format, uniform

ROUNDING_LIMIT = 1e-3  # nats of KL that rounding the fused weights may cost before they are written in float32


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the weights are read."""

    source: Source
    config: Any
    arch: Architecture
    geometry: Geometry
    budget: Budget
    recipe: Recipe
    tokenizer: Any
    sequences: list[Tensor]
    text_name: str
    spread: int

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers


@dataclass(frozen=True)
class Layer:
    """One layer's choices: what the search found."""

    key: KeyCandidate
    value: ValueCandidate
    matrix: Tensor  # float64 [Hkv, D, D], fused into v_proj and o_proj
    key_loss: float
    value_loss: float


def compress(
    model: str,
    budget: str,
    out: Path,
    *,
    calib: str | None = None,
    recipe: Recipe | None = None,
    device: str = "auto",
    context: int | None = None,
    resume: bool = False,
) -> Artifact:
    """Compresses a model and writes the artifact.

    Args:
        model: alias, folder, .gguf or Hub id.
        budget: "2.5" or "512MiB@32768".
        out: the artifact's folder.
        calib: text file or datasets id; None for the built-in text.
        recipe: choices; None for the defaults.
        device: "auto", "cpu", "cuda", ….
        context: tokens at which plain bits count.
        resume: go on with what an interrupted run of the same options left.
    Raises:
        KvfoldError: any bad input, in one sentence; nothing is left behind.
    """
    recipe = recipe or Recipe()
    plan = _plan(model, budget, calib, recipe, context)
    weights = sum(p.stat().st_size for p in plan.source.path.glob("*.safetensors"))
    check_output(out, int(2.2 * weights) + (64 << 20))
    target = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    key = fingerprint(
        {
            "kvfold": __version__,
            "model": weights_fingerprint(plan.source.path),
            "recipe": recipe.model_dump(mode="json"),
            "tokens": [s.tolist() for s in plan.sequences],
            "budget": [plan.budget.at, plan.budget.nbytes, plan.spread],
            "device": target.type,
        }
    )
    work = open_work(out, key, resume)
    try:
        with torch.inference_mode():
            layers, rounding_kl = _search(plan, work, target)
            artifact = _export(plan, layers, rounding_kl, out)
    except KvfoldError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)
    return artifact


def _plan(model: str, budget: str, calib: str | None, recipe: Recipe, context: int | None) -> Plan:
    source = resolve_model(model)
    config = read_config(source.path)
    arch = architecture_of(config)
    geometry = Geometry(num_kv_heads_of(config), head_dim_of(config), recipe.sinks, recipe.window, recipe.page_tokens)
    allowance = parse_budget(budget, geometry, config.num_hidden_layers, config.max_position_embeddings, context)
    k, v = _least_formats(recipe, geometry.head_dim)
    _check_reach(allowance, geometry, config.num_hidden_layers, cache_nbytes(geometry, [(k, v)] * config.num_hidden_layers, allowance.at))
    name, documents = read_documents(calib)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    c = recipe.calibration
    sequences = sample_sequences(tokenizer, documents, c.num_sequences, min(c.seq_len, config.max_position_embeddings), recipe.seed, name)
    spread = c.spread or max(1, ceil(allowance.at / sequences[0].shape[1]))
    return Plan(source, config, arch, geometry, allowance, recipe, tokenizer, sequences, name, spread)


def _least_formats(recipe: Recipe, head_dim: int) -> tuple[Format, Format]:
    """The smallest formats that the search can choose, as far as size goes."""
    value = uniform(head_dim, 3, "e4m3", recipe.value.group_size)
    if recipe.key.transform != "whiten":
        return uniform(head_dim, 3, "e4m3", recipe.key.group_size), value
    coded = max(8, int(min(recipe.key.bits) * head_dim) // 8 * 8)
    whole, rest = divmod(coded, head_dim)
    if whole:  # a bit or more each: any format of that many code bits has the same size
        return Format(((head_dim, {1: 2, 2: 4, 3: 8, 4: 16}[whole]),)), value
    return Format(((rest, 2), (head_dim - rest, 0))), value


def _check_reach(budget: Budget, geometry: Geometry, num_layers: int, least: int) -> None:
    if budget.nbytes < least:
        bits = ceil(8000 * least / geometry.elements(budget.at, num_layers)) / 1000
        raise KvfoldError(
            f"Budget '{budget.request}' is {budget.nbytes} bytes at {budget.at} tokens, out of reach: the smallest cache of this model takes "
            f"{least} bytes; ask for at least {bits} bits or {least}B@{budget.at}."
        )


def _search(plan: Plan, work: Path, device: torch.device) -> tuple[list[Layer], float]:
    """Returns the layers' choices, and the KL that rounding the fused weights to the model's own type costs."""
    recipe, geometry, budget = plan.recipe, plan.geometry, plan.budget
    dtype: torch.dtype = plan.config.dtype or torch.float32
    model = load_model(plan.source.path, torch.float32 if device.type == "cpu" else dtype, device, TAP)
    stats = calibrate(model, plan.arch, plan.sequences, plan.spread, recipe.calibration.sample_tokens, work)
    matrices, keys, values = [], [], []
    for i, layer in enumerate(tqdm(stats, desc="candidates", unit="layer")):
        matrices.append(value_basis(layer, recipe, i))
        keys.append(key_candidates(layer, recipe, i, plan.arch.qk_norm))
        values.append(value_candidates(layer, recipe, matrices[-1]))
    s = recipe.sensitivity
    probe = Probe(model, plan.arch, [ids[:, : s.seq_len] for ids in plan.sequences[: s.num_sequences]], s.stride)
    fixed = plan.num_layers * geometry.fixed_nbytes(budget.at)
    packed = geometry.elements(geometry.num_pages(budget.at) * geometry.page_tokens, plan.num_layers)
    target_bits = 8 * (budget.nbytes - fixed) / max(packed, 1)
    probed_keys = [_nearest(group, target_bits) for group in keys]
    probed_values = [_nearest(group, target_bits) for group in values]
    key_kl, value_kl = sensitivities(probe, probed_keys, probed_values, matrices, geometry, work)

    def choices(group, probed, kl) -> list[Choice]:
        unit = kl / probed.distortion if probed.distortion > 0 else 0.0
        return [Choice(geometry.side_nbytes(c.spec.format, budget.at), unit * c.distortion) for c in group]

    groups = [choices(keys[i], probed_keys[i], key_kl[i]) for i in range(plan.num_layers)]
    groups += [choices(values[i], probed_values[i], value_kl[i]) for i in range(plan.num_layers)]
    _check_reach(budget, geometry, plan.num_layers, fixed + least_nbytes(groups))
    chosen = allocate(groups, budget.nbytes - fixed)
    layers = []
    for i in range(plan.num_layers):
        k, v = chosen[i], chosen[plan.num_layers + i]
        losses = groups[i][k].loss, groups[plan.num_layers + i][v].loss
        layers.append(Layer(keys[i][k], values[i][v], matrices[i], *losses))
    for attention, layer in zip(plan.arch.attention_modules(model), layers, strict=True):
        _set_parameters(attention, fused_parameters(attention, plan.arch, layer), dtype)
    return layers, probe.whole_model()


def fused_parameters(attention: Any, arch: Architecture, layer: Layer) -> dict[str, Tensor]:
    """All parameters of an attention module that the layer's choices change, float64, by name; the module stays."""
    fused = fuse_values(attention, layer.matrix)
    if layer.key.pair_scale is not None:
        fused |= fuse_pair_scale(attention, layer.key.pair_scale, arch)
    return fused


def _set_parameters(attention: Any, fused: dict[str, Tensor], dtype: torch.dtype, keep: bool = False) -> None:
    """Puts parameters rounded to `dtype` into the module; `keep`: as that type, not as the module's own."""
    for name, value in fused.items():
        parameter = attention.get_parameter(name)
        rounded = value.to(dtype)
        parameter.data = rounded if keep else rounded.to(parameter.dtype)


def _nearest(group: list, bits: float):
    """The quantised candidate whose payload is nearest to `bits`."""
    return min(group[:-1], key=lambda c: abs(c.spec.format.payload_bits - bits))


def _export(plan: Plan, layers: list[Layer], rounding_kl: float, out: Path) -> Artifact:
    own: torch.dtype = plan.config.dtype or torch.float32
    dtype = own if rounding_kl <= ROUNDING_LIMIT else torch.float32
    specs = [LayerSpec(_fused_key(layer.key), layer.value.spec) for layer in layers]

    def save_model(folder: Path) -> None:
        model = load_model(plan.source.path, "auto", torch.device("cpu"))
        for attention, layer in zip(plan.arch.attention_modules(model), layers, strict=True):
            _set_parameters(attention, fused_parameters(attention, plan.arch, layer), dtype, keep=True)
        model.save_pretrained(folder)
        plan.tokenizer.save_pretrained(folder)

    metadata = _metadata(plan, layers, specs, rounding_kl, dtype)
    alias = ALIASES.get(plan.source.name)
    return write_artifact(out, metadata, specs, save_model, plan.recipe.dump(), alias.license if alias else None)


def _fused_key(key: KeyCandidate) -> KeySpec:
    """The key's spec as the runtime applies it: a pair scale has gone into the weights."""
    return key.spec if key.pair_scale is None else replace(key.spec, matrix=None)


def _metadata(plan: Plan, layers: list[Layer], specs: list[LayerSpec], rounding_kl: float, dtype: torch.dtype) -> Metadata:
    g, at = plan.geometry, plan.budget.at
    formats = [(spec.key.format, spec.value.format) for spec in specs]

    def side(spec: KeySpec | ValueSpec, loss: float) -> SideModel:
        tensors: list = [name for name in ("matrix", "offset", "clip") if getattr(spec, name, None) is not None]
        fmt = FormatModel(**spec.format.to_dict())
        return SideModel(
            format=fmt, transforms=list(spec.transforms), tensors=tensors, payload_bits=spec.format.payload_bits, predicted_loss=loss
        )

    nbytes = cache_nbytes(g, formats, at)
    raw = plan.num_layers * g.raw_rows * g.num_kv_heads * g.head_dim * 4
    pages = sum(g.side_nbytes(k, at) + g.side_nbytes(v, at) for k, v in formats)
    elements = g.elements(at, plan.num_layers)
    return Metadata(
        format_version=FORMAT_VERSION,
        cache=CacheModel(
            num_layers=plan.num_layers, num_heads=plan.config.num_attention_heads, num_kv_heads=g.num_kv_heads, head_dim=g.head_dim,
            sinks=g.sinks, window=g.window, page_tokens=g.page_tokens,
        ),
        layers=[
            LayerModel(key=side(spec.key, layer.key_loss), value=side(spec.value, layer.value_loss))
            for spec, layer in zip(specs, layers, strict=True)
        ],
        budget=BudgetModel(request=plan.budget.request, at=at, bytes=plan.budget.nbytes),
        account=AccountModel(
            at=at, bytes=nbytes, bytes_16bit=2 * elements, page_bytes=pages, raw_bytes=raw, table_bytes=nbytes - pages - raw,
            effective_bits=8 * nbytes / elements, payload_bits=payload_bits(formats),
        ),
        calibration=CalibrationModel(
            source=plan.text_name, num_sequences=len(plan.sequences), seq_len=plan.sequences[0].shape[1], seed=plan.recipe.seed,
            spread=plan.spread, covered_positions=plan.spread * plan.sequences[0].shape[1],
        ),
        provenance=ProvenanceModel(
            model=plan.source.name, revision=plan.source.revision, rounding_kl=rounding_kl, fused_dtype=str(dtype).removeprefix("torch."),
            libraries={"kvfold": __version__, "python": platform.python_version(), "torch": version("torch"), "transformers": version("transformers")},
        ),
        files={},
    )  # fmt: skip
