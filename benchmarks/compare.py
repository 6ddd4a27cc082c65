"""Artifacts and rivals on one text under one protocol, a row at a time, each saved as soon as it is there.

Protocol: teacher-forced windows; the first N tokens and the last W in 16 bits; a page leaves the window as a whole, and a
query reads everything behind it as it is stored (the rule of kernels/attention.py, through `attend` itself). Artifacts run
through the real packed cache; rivals through the arrays that they store. The reference is the original model, unquantised,
for both.
"""

import json
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from kvfold.compress.calibrate import LayerStats, calibrate
from kvfold.compress.evaluate import compare, evaluate, figures, windows_of
from kvfold.compress.models import load_model, read_config, resolve_model
from kvfold.compress.pipeline import compress
from kvfold.compress.progress import progress, stage
from kvfold.compress.recipe import Recipe
from kvfold.compress.tap import NAME, Tap, tapped
from kvfold.compress.text import read_documents, sample_sequences
from kvfold.compress.work import fingerprint, weights_fingerprint
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, cache_nbytes
from kvfold.exports.architectures import architecture_of, head_dim_of, num_kv_heads_of
from kvfold.exports.reader import is_artifact, read_metadata
from kvfold.exports.schema import METADATA_NAME
from kvfold.kernels.attention import Tile, attend, packed_tokens
from kvfold.kernels.quantizer import to_float16

from .rivals import RIVALS, Rival

LENGTHS = (2048, 8192, 32768)  # tokens at which the whole cache is counted
TILE = 512  # tokens of a tile: queries skip the tiles that they read in the other form


@dataclass(frozen=True)
class Settings:
    """What all rows of a comparison share."""

    model: str
    text: str
    windows: int
    first_window: int
    seq_len: int
    device: torch.device
    dtype: torch.dtype
    out: Path


def rival_bits(rival: Rival, geometry: Geometry, num_layers: int, tokens: int) -> float:
    """Bits per cached element of a sequence of `tokens` tokens, all that is resident counted as for an artifact."""
    page = rival.payload_bits(geometry.head_dim) * 2 * geometry.num_kv_heads * geometry.head_dim * geometry.page_tokens
    layer = 8 * geometry.fixed_nbytes(tokens) + geometry.num_pages(tokens) * page
    return num_layers * layer / geometry.elements(tokens, num_layers)


def rival_tap(rival: Rival, geometry: Geometry) -> Tap:
    """A tap that attends with what `rival` keeps of the keys and values behind the window."""
    g = geometry

    def tap(module, query, key, value, mask, scaling):
        tokens = key.shape[2]
        packed = packed_tokens(tokens, g.sinks, g.window, g.page_tokens)
        if packed == 0:
            return None
        positions = torch.arange(tokens, device=key.device)
        limit = g.sinks + (positions + 1 - g.sinks - g.window).clamp_min(0) // g.page_tokens * g.page_tokens
        keys, values = to_float16(key[0]).float(), to_float16(value[0]).float()
        behind = slice(g.sinks, g.sinks + packed)
        stored_keys, stored_values = rival.quantise(keys[:, behind], values[:, behind])
        tiles = [Tile(keys[:, : g.sinks], values[:, : g.sinks], positions[: g.sinks], False)]
        for start in range(g.sinks, tokens, TILE):
            part = slice(start, start + TILE)
            tiles.append(Tile(keys[:, part], values[:, part], positions[part], False))
        for start in range(0, packed, TILE):
            part = slice(start, min(start + TILE, packed))
            tiles.append(Tile(stored_keys[:, part], stored_values[:, part], positions[behind][part], True))
        narrow = None if mask is None else mask[0, 0]
        out = attend(query[0], positions, limit, tiles, sinks=g.sinks, scaling=scaling, mask=narrow)
        return out.transpose(0, 1)[None].to(query.dtype)

    return tap


class Comparison:
    """The rows of one comparison, kept in `OUT/quality.json`.

    Raises:
        KvfoldError: no such model or text; to be resumed, but the file is of other settings.
    """

    def __init__(self, settings: Settings, resume: bool) -> None:
        s = settings
        self.settings = s
        self.source = resolve_model(s.model)
        self.config = read_config(self.source.path)
        if not 2 <= s.seq_len <= self.config.max_position_embeddings:
            raise KvfoldError(
                f"--seq-len {s.seq_len} is not between 2 and the model's maximum of {self.config.max_position_embeddings}."
            )
        self.tokenizer = AutoTokenizer.from_pretrained(self.source.path)
        self.text_name, documents = read_documents(s.text)
        text = "\n\n".join(documents)
        self.batches = windows_of(self.tokenizer, text, s.seq_len, s.first_window, s.windows, self.text_name)
        self.path = s.out / "quality.json"
        self.model: Any = None
        self.references: list[Tensor] = []
        self.stats: dict[int, list[LayerStats]] = {}
        recipe = Recipe()
        shape = num_kv_heads_of(self.config), head_dim_of(self.config)
        self.geometry = Geometry(*shape, recipe.sinks, recipe.window, recipe.page_tokens)
        self.key = fingerprint(
            {
                "model": weights_fingerprint(self.source.path),
                "windows": [batch.tolist() for batch in self.batches],
                "dtype": str(s.dtype),
                "protocol": [recipe.sinks, recipe.window, recipe.page_tokens],
            }
        )
        self.result = self._open(resume)

    def _open(self, resume: bool) -> dict[str, Any]:
        s = self.settings
        if resume and self.path.is_file():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["key"] != self.key:
                raise KvfoldError(
                    f"'{self.path}' is of another model, text or protocol; repeat those or drop --resume."
                )
            return found
        return {
            "key": self.key,
            "model": self.source.name,
            "text": self.text_name,
            "windows": len(self.batches),
            "first_window": s.first_window,
            "seq_len": s.seq_len,
            "dtype": str(s.dtype).removeprefix("torch."),
            "rows": [],
            "skipped": {},
        }

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".part")
        scratch.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, self.path)

    def _done(self, name: str) -> bool:
        return any(row["name"] == name for row in self.result["rows"])

    def _add(self, begun: float, **row: Any) -> None:
        row["device"] = _device_name(self.settings.device)
        row["seconds"] = round(time.monotonic() - begun, 1)
        self.result["rows"].append(row)
        self.result["skipped"].pop(row["name"], None)
        self.save()
        stage(f"{row['name']}: {row['payload_bits']:.3f} bits, KL {row['kl']:.4f}, {row['seconds']:.0f} s")

    # -- artifacts -----------------------------------------------------------------------------------------------------

    def build(self, budget: str, resume: bool) -> Path:
        """The artifact of the model at a budget; with `resume`, one that an earlier run finished is taken as it is."""
        folder = self.settings.out / f"{Path(self.source.name).name}-{budget.replace('@', '-at-')}"
        if not (resume and is_artifact(folder)):
            stage(f"compressing to {budget}")
            compress(self.settings.model, budget, folder, device=str(self.settings.device), resume=resume)
        return folder

    def artifact(self, folder: Path) -> None:
        """Measures an artifact through its packed cache."""
        s, begun = self.settings, time.monotonic()
        metadata = read_metadata(folder)
        geometry, formats = metadata.geometry, metadata.formats
        mine = self.geometry.num_kv_heads, self.geometry.head_dim, self.config.num_hidden_layers
        if (geometry.num_kv_heads, geometry.head_dim, len(formats)) != mine:
            raise KvfoldError(
                f"'{folder}' was not made from '{s.model}': its heads or layers differ; give its own model."
            )
        name, digest = (
            f"kvfold {folder.name}",
            json.loads((folder / METADATA_NAME).read_text(encoding="utf-8"))["digest"],
        )
        if any(row.get("digest") == digest for row in self.result["rows"]):
            return
        self.result["rows"] = [
            row for row in self.result["rows"] if row["name"] != name
        ]  # another artifact had the name
        found = evaluate(
            str(folder), against=s.model, text=s.text, windows=s.windows, first_window=s.first_window,
            seq_len=s.seq_len, device=s.device, dtype=s.dtype,
        ).to_dict()  # fmt: skip
        transforms = sorted(
            {t for layer in metadata.layers for side in (layer.key, layer.value) for t in side.transforms}
        )
        self._add(
            begun, name=name, kind="artifact", source=", ".join(transforms), digest=digest, sinks=geometry.sinks,
            window=geometry.window, page_tokens=geometry.page_tokens, payload_bits=found["payload_bits"],
            bits_at={str(n): 8 * cache_nbytes(geometry, formats, n) / geometry.elements(n, len(formats)) for n in LENGTHS},
            **{field: found[field] for field in FIGURES},
        )  # fmt: skip

    # -- rivals --------------------------------------------------------------------------------------------------------

    def rival(self, name: str, bits: int) -> None:
        """Measures a rival at a number of bits, or notes why it can't be."""
        label, begun = f"{name} {bits}", time.monotonic()
        if self._done(label):
            return
        kind = RIVALS[name]
        head_dim, layers = self.geometry.head_dim, self.config.num_hidden_layers
        try:
            rivals = [kind(bits, head_dim) for _ in range(layers)]
        except KvfoldError as error:
            stage(f"{label} left out: {error}")
            self.result["skipped"][label] = str(error)
            self.save()
            return
        self._load()
        if kind.needs:
            for rival, stats in zip(rivals, self._statistics(kind.needs), strict=True):
                rival.calibrate(stats)
        page = max(kind.block_tokens, self.geometry.page_tokens)
        geometry = Geometry(
            self.geometry.num_kv_heads, head_dim, self.geometry.sinks, self.geometry.window, page // kind.block_tokens * kind.block_tokens
        )  # fmt: skip
        rows = []
        attentions = architecture_of(self.config).attention_modules(self.model)
        with torch.inference_mode(), ExitStack() as stack:
            for attention, rival in zip(attentions, rivals, strict=True):
                stack.enter_context(tapped(attention, rival_tap(rival, geometry)))
            for ids, reference in progress(list(zip(self.batches, self.references, strict=True)), label, "window"):
                rows.append(self._measure(ids.to(self.settings.device), reference))
        self._add(
            begun, name=label, kind="rival", source=kind.source, sinks=geometry.sinks, window=geometry.window,
            page_tokens=geometry.page_tokens, payload_bits=rivals[0].payload_bits(head_dim),
            bits_at={str(n): rival_bits(rivals[0], geometry, layers, n) for n in LENGTHS}, **figures(rows),
        )  # fmt: skip

    def _hidden(self, ids: Tensor) -> Tensor:
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]

    def _measure(self, ids: Tensor, reference: Tensor) -> Tensor:
        head = self.model.lm_head
        return compare(head, head, reference, self._hidden(ids), ids[0, 1:]) / (ids.shape[1] - 1)

    def _load(self) -> None:
        if self.model is not None:
            return
        s = self.settings
        self.model = load_model(self.source.path, s.dtype, s.device, NAME)
        with torch.inference_mode():
            self.references = [self._hidden(ids.to(s.device)) for ids in self.batches]

    def _statistics(self, needs: str) -> list[LayerStats]:
        """Of the text that kvfold itself calibrates on, kept in OUT for the next run."""
        c, context = Recipe().calibration, min(32768, self.config.max_position_embeddings)
        size = min(c.seq_len, self.config.max_position_embeddings)
        name, documents = read_documents(None)
        sequences = sample_sequences(self.tokenizer, documents, c.num_sequences, size, Recipe().seed, name)
        spread = 1 if needs == "plain" else max(1, -(-context // sequences[0].shape[1]))
        if spread not in self.stats:
            work = self.settings.out / f"calibration-{spread}-{self.key[:12]}"
            work.mkdir(parents=True, exist_ok=True)
            with torch.inference_mode():
                self.stats[spread] = calibrate(
                    self.model, architecture_of(self.config), sequences, spread, c.sample_tokens, work
                )
        return self.stats[spread]


FIGURES = ("nll_16bit", "nll", "dnll", "dnll_se", "ppl_16bit", "ppl", "kl", "kl_se", "top1_agreement")


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )
