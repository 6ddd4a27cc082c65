"""Turns what the search found into an artifact."""

import json
import os
import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvfold.compress.memory import room_for_weights
from kvfold.compress.models import ALIASES, Source, load_model
from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.models.streamed import load_streamed
from kvfold.compress.models.streamed import save_model as save_weights
from kvfold.compress.plan import Plan
from kvfold.compress.progress import stage
from kvfold.compress.search import Found
from kvfold.compress.search.candidates import KeyCandidate
from kvfold.compress.search.fold import fold_layers
from kvfold.errors import KvfoldError
from kvfold.exports.account import cache_nbytes, effective_bits, payload_bits, stock_nbytes
from kvfold.exports.architectures import text_of
from kvfold.exports.page.card import Base
from kvfold.exports.page.licence import Licence, find_licence
from kvfold.exports.place import full_disk
from kvfold.exports.reader import Artifact
from kvfold.exports.schema import (
    HEADS_VERSION,
    ROLLBACK_VERSION,
    STATES_VERSION,
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
from kvfold.exports.weights import weights_nbytes
from kvfold.exports.writer import write_artifact
from kvfold.pretrained import reason_of, tokenizer_from_pretrained
from kvfold.version import __version__

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
ROUNDING_LIMIT = (
    1e-3  # nats of KL that rounding the fused weights may cost before they are written in float32
)


def export(plan: Plan, found: Found, out: Path) -> Artifact:
    """Writes the artifact of what the search found; the checkpoint is read again, in its own dtype.

    Args:
        found: the choices; where rounding the fused weights costs more than ROUNDING_LIMIT they are
            written in float32.
        out: the artifact's folder.
    """
    layers = found.layers
    stage("writing and checking the artifact")
    own: torch.dtype = plan.config.dtype or torch.float32
    dtype = own if found.rounding_kl <= ROUNDING_LIMIT else torch.float32
    specs = [LayerSpec(_fused_key(layer.key), layer.value.spec) for layer in layers]

    def save_model(folder: Path) -> None:
        model = _stored(plan)
        fold_layers(model, plan.arch, layers, dtype, True, folder)
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map  # code that an artifact has not
        save_weights(model, folder)
        own_cache(folder / "generation_config.json")
        save_tokenizer(plan.tokenizer, folder)
        for name in PROCESSOR_FILES:
            if plan.arch.tower and (plan.source.path / name).is_file():
                shutil.copyfile(plan.source.path / name, folder / name)

    metadata = _metadata(plan, found, specs, dtype)
    return write_artifact(
        out, metadata, specs, save_model, plan.recipe.dump(), base_of(plan.source)
    )


def _stored(plan: Plan) -> Any:
    """The checkpoint in its own types: in memory, or, where it would take more than its share of
    that, in its files."""
    cpu = torch.device("cpu")
    if weights_nbytes(plan.source.path, "auto") <= room_for_weights(cpu, plan.max_memory):
        return load_model(plan.source.path, "auto", cpu)
    return load_streamed(plan.source.path, plan.arch, None, cpu, TAP)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer as files that lie side by side: several named chat templates would be a
    folder of their own, so they go into tokenizer_config.json. What code it could be loaded with
    instead (auto_map) is left out, for an artifact has none."""
    tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer.save_pretrained(
        folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict)
    )


def own_cache(file: Path) -> None:
    """Takes another cache's name out of generation_config.json: an artifact brings its own packed
    cache, beside which there is none.

    In the file, because transformers writes a config that was changed only if nothing else in it is
    amiss.
    """
    fields = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if fields.get("cache_implementation") not in (None, "dynamic"):
        stage(
            f"leaving out cache_implementation '{fields.pop('cache_implementation')}': the artifact brings its own "
            "cache"
        )
        file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_exportable(plan: Plan, work: Path) -> None:
    """Writes the small files as `export` will, so that what can't be written is refused before the
    search.

    Args:
        work: folder for them; nothing stays there.
    Raises:
        KvfoldError: which of them can't be written, and why.
    """
    with TemporaryDirectory(dir=work) as scratch:
        folder = Path(scratch)
        for what, save in (
            ("config.json", plan.config.save_pretrained),
            ("tokenizer", lambda place: save_tokenizer(plan.tokenizer, place)),
        ):
            try:
                save(folder)
            except Exception as error:  # whatever a tokenizer's own files make it raise
                if full_disk(error):  # the caller's to tell
                    raise
                raise KvfoldError(
                    f"The {what} of '{plan.source.name}' cannot be written again ({type(error).__name__}: "
                    f"{reason_of(error)}), so no artifact could be made; correct the model's files."
                ) from error
        if stray := [p.name for p in folder.iterdir() if not p.is_file()]:
            raise KvfoldError(
                f"The tokenizer of '{plan.source.name}' writes the folder {stray[0]}, but an artifact's files lie side "
                "by side; give one whose files do."
            )
        tokenizer_from_pretrained(folder)
    for text in base_of(plan.source).licence.texts:
        if not os.access(text, os.R_OK):
            raise KvfoldError(
                f"'{text}' cannot be read, but goes with the weights; give a copy of the model that can be read."
            )


def base_of(source: Source) -> Base:
    """What the model card says of the base model: its id on the Hub where that is known, and its
    licence."""
    alias = ALIASES.get(source.name)
    if alias is not None:
        return Base(alias.repo_id, Licence(alias.license))
    return Base(source.name if source.revision else None, find_licence(source.path))


def _fused_key(key: KeyCandidate) -> KeySpec:
    """The key's spec as the runtime applies it: a pair scale has gone into the weights."""
    return key.spec if key.pair_scale is None else replace(key.spec, matrix=None)


def _metadata(plan: Plan, found: Found, specs: list[LayerSpec], dtype: torch.dtype) -> Metadata:
    g, at, pairs = plan.geometry, plan.budget.at, plan.arch.rope_pairs
    formats = [(spec.key.format, spec.value.format) for spec in specs]

    def side(spec: KeySpec | ValueSpec, loss: float) -> SideModel:
        tensors: list = [
            name
            for name in ("matrix", "offset", "clip", "frequencies")
            if getattr(spec, name, None) is not None
        ]
        fmt = FormatModel(**spec.format.to_dict())
        return SideModel(
            format=fmt,
            transforms=list(spec.transforms),
            tensors=tensors,
            payload_bits=spec.format.payload_bits,
            predicted_loss=loss,
        )

    optional: dict[str, Any] = {"sliding": list(g.sliding)} if g.sliding else {}
    if plan.states is not None:
        optional["states"] = plan.states
    if g.heads:
        optional["heads"] = [list(x) for x in g.heads]
    if g.shared:
        optional["shared"] = list(g.shared)
    if g.chunked:
        optional["chunked"] = True
    if pairs != "halves":
        optional["rope_pairs"] = pairs
    nbytes = cache_nbytes(g, formats, at)
    raw = g.raw_nbytes(plan.num_layers)
    pages = sum(
        g.of_layer(i).side_nbytes(fmt, at, g.sliding_of(i))
        for i, pair in enumerate(formats)
        for fmt in pair
    )
    lengths = [2**i for i in range(9, 31) if 2**i <= text_of(plan.config).max_position_embeddings]
    usual = ROLLBACK_VERSION if plan.states is None else STATES_VERSION
    return Metadata(
        format_version=HEADS_VERSION if g.heads or g.shared or g.chunked else usual,
        cache=CacheModel(
            num_layers=plan.num_layers,
            num_heads=text_of(plan.config).num_attention_heads,
            num_kv_heads=g.num_kv_heads,
            head_dim=g.head_dim,
            sinks=g.sinks,
            window=g.window,
            page_tokens=g.page_tokens,
            rollback=g.rollback,
            **optional,
        ),
        layers=[
            LayerModel(key=side(spec.key, layer.key_loss), value=side(spec.value, layer.value_loss))
            for spec, layer in zip(specs, found.layers, strict=True)
        ],
        budget=BudgetModel(request=plan.budget.request, at=at, bytes=plan.budget.nbytes),
        account=AccountModel(
            at=at,
            bytes=nbytes,
            bytes_16bit=stock_nbytes(g, at, plan.num_layers),
            page_bytes=pages,
            raw_bytes=raw,
            table_bytes=nbytes - pages - raw - g.state_nbytes,
            bytes_at={str(n): cache_nbytes(g, formats, n) for n in lengths},
            effective_bits=effective_bits(g, nbytes, [at], plan.num_layers),
            payload_bits=payload_bits(formats),
        ),
        calibration=CalibrationModel(
            source=plan.text_name,
            num_sequences=len(plan.sequences),
            seq_len=plan.sequences[0].shape[1],
            seed=plan.recipe.seed,
            spread=plan.spread,
            covered_positions=plan.spread * plan.sequences[0].shape[1],
            kl=found.kl,
        ),
        provenance=ProvenanceModel(
            model=plan.source.name,
            revision=plan.source.revision,
            rounding_kl=found.rounding_kl,
            fused_dtype=str(dtype).removeprefix("torch."),
            libraries={
                "kvfold": __version__,
                "python": platform.python_version(),
                "torch": version("torch"),
                "transformers": version("transformers"),
            },
        ),
        files={},
    )
