"""Artifacts and rivals on one text under one protocol, a row at a time, each saved as soon as it is
there.

Artifacts run through the real packed cache, rivals through the arrays that they store
(protocol.py). The reference is the original model, unquantised, for both.
"""

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.bench.protocol import page_tokens, rival_bits, rival_tap
from kvfold.compress.bench.rivals import RIVALS
from kvfold.compress.bench.runs import comparable
from kvfold.compress.calibrate import LayerStats, calibrate
from kvfold.compress.evaluate import compare, evaluate, figures, windows_of
from kvfold.compress.models import load_model, read_config, resolve_model
from kvfold.compress.models.attention_hook import NAME, tapped
from kvfold.compress.pipeline import compress
from kvfold.compress.progress import progress, stage
from kvfold.compress.recipe import Recipe
from kvfold.compress.text import read_documents, sample_sequences
from kvfold.compress.work import fingerprint, model_fingerprint
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, cache_nbytes, effective_bits
from kvfold.exports.architectures import (
    architecture_of,
    attention_layers_of,
    head_dim_of,
    num_kv_heads_of,
    sliding_windows_of,
)
from kvfold.exports.reader import is_artifact, read_metadata
from kvfold.exports.schema import METADATA_NAME
from kvfold.exports.scratch import write_whole
from kvfold.pretrained import tokenizer_from_pretrained

LENGTHS = (2048, 8192, 32768)  # tokens at which the whole cache is counted
FIGURES = (
    "nll_16bit",
    "nll",
    "dnll",
    "dnll_se",
    "ppl_16bit",
    "ppl",
    "kl",
    "kl_se",
    "top1_agreement",
)


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
                f"--seq-len {s.seq_len} is not between 2 and the model's maximum of "
                f"{self.config.max_position_embeddings}."
            )
        self.tokenizer = tokenizer_from_pretrained(self.source.path)
        self.text_name, documents = read_documents(s.text)
        text = "\n\n".join(documents)
        self.batches = windows_of(
            self.tokenizer, text, s.seq_len, s.first_window, s.windows, self.text_name
        )
        self.path = s.out / "quality.json"
        self.model: Any = None
        self.references: list[Tensor] = []
        self.stats: dict[int, list[LayerStats]] = {}
        recipe = comparable(Recipe())
        assert isinstance(recipe.window, int)  # `comparable` states one
        self.geometry = Geometry(
            num_kv_heads_of(self.config),
            head_dim_of(self.config),
            recipe.sinks,
            recipe.window,
            recipe.page_tokens,
            sliding_windows_of(self.config),
        )
        self.key = fingerprint(
            {
                "model": model_fingerprint(self.source.path),
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
        text = json.dumps(self.result, indent=1) + "\n"
        write_whole(self.path, lambda scratch: scratch.write_text(text, encoding="utf-8"))

    def _done(self, name: str) -> bool:
        return any(row["name"] == name for row in self.result["rows"])

    def _add(self, begun: float, **row: Any) -> None:
        row["device"] = _device_name(self.settings.device)
        row["seconds"] = round(time.monotonic() - begun, 1)
        self.result["rows"].append(row)
        self.result["skipped"].pop(row["name"], None)
        self.save()
        stage(
            f"{row['name']}: {row['payload_bits']:.3f} bits, KL {row['kl']:.4f}, {row['seconds']:.0f} s"
        )

    # -- artifacts ---------------------------------------------------------------------------------

    def build(self, budget: str, resume: bool) -> Path:
        """The artifact of the model at a budget; with `resume`, one that an earlier run finished is
        taken as it is."""
        folder = self.settings.out / f"{Path(self.source.name).name}-{budget.replace('@', '-at-')}"
        if not (resume and is_artifact(folder)):
            stage(f"compressing to {budget}")
            compress(
                self.settings.model,
                budget,
                folder,
                recipe=comparable(Recipe()),
                device=str(self.settings.device),
                resume=resume,
                accept_loss=True,  # it is measured
            )
        return folder

    def artifact(self, folder: Path) -> None:
        """Measures an artifact through its packed cache."""
        s, begun = self.settings, time.monotonic()
        metadata = read_metadata(folder)
        geometry, formats = metadata.geometry, metadata.formats
        layers = len(attention_layers_of(self.config))
        mine = self.geometry.num_kv_heads, self.geometry.head_dim, layers
        if (geometry.num_kv_heads, geometry.head_dim, len(formats)) != mine:
            raise KvfoldError(
                f"'{folder}' was not made from '{s.model}': its heads or layers differ; give its own model."
            )
        name = f"kvfold {folder.name}"
        digest = json.loads((folder / METADATA_NAME).read_text(encoding="utf-8"))["digest"]
        if any(row.get("digest") == digest for row in self.result["rows"]):
            return
        # an earlier artifact may have had the name
        self.result["rows"] = [row for row in self.result["rows"] if row["name"] != name]
        found = evaluate(
            str(folder), against=s.model, text=s.text, windows=s.windows, first_window=s.first_window,
            seq_len=s.seq_len, device=s.device, dtype=s.dtype, attention="reference",
        ).to_dict()  # fmt: skip
        sides = [side for layer in metadata.layers for side in (layer.key, layer.value)]
        transforms = sorted({transform for side in sides for transform in side.transforms})
        self._add(
            begun,
            name=name,
            kind="artifact",
            source=", ".join(transforms),
            digest=digest,
            sinks=geometry.sinks,
            window=geometry.window,
            page_tokens=geometry.page_tokens,
            payload_bits=found["payload_bits"],
            bits_at={
                str(n): effective_bits(
                    geometry, cache_nbytes(geometry, formats, n), [n], len(formats)
                )
                for n in LENGTHS
            },
            **{field: found[field] for field in FIGURES},
        )

    # -- rivals ------------------------------------------------------------------------------------

    def rival(self, name: str, bits: int) -> None:
        """Measures a rival at a number of bits, or notes why it can't be."""
        label, begun = f"{name} {bits}", time.monotonic()
        if self._done(label):
            return
        kind = RIVALS[name]
        head_dim, layers = self.geometry.head_dim, len(attention_layers_of(self.config))
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
        geometry = replace(
            self.geometry, page_tokens=page_tokens(rivals[0], self.geometry.page_tokens)
        )
        rows = []
        attentions = architecture_of(self.config).attention_modules(self.model)
        with torch.inference_mode(), ExitStack() as stack:
            for attention, rival in zip(attentions, rivals, strict=True):
                stack.enter_context(tapped(attention, rival_tap(rival, geometry)))
            for ids, reference in progress(
                list(zip(self.batches, self.references, strict=True)), label, "window"
            ):
                rows.append(self._measure(ids.to(self.settings.device), reference))
        self._add(
            begun, name=label, kind="rival", source=kind.source, sinks=geometry.sinks, window=geometry.window,
            page_tokens=geometry.page_tokens, payload_bits=rivals[0].payload_bits(head_dim),
            bits_at={str(n): rival_bits(rivals[0], geometry, layers, n) for n in LENGTHS}, **figures(rows),
        )  # fmt: skip

    def _hidden(self, ids: Tensor) -> Tensor:
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]

    def _measure(self, ids: Tensor, reference: Tensor) -> Tensor:
        return compare(self.model, self.model, reference, self._hidden(ids), ids[0, 1:]) / (
            ids.shape[1] - 1
        )

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
        sequences = sample_sequences(
            self.tokenizer, documents, c.num_sequences, size, Recipe().seed, name
        )
        spread = 1 if needs == "plain" else max(1, -(-context // sequences[0].shape[1]))
        if spread not in self.stats:
            work = self.settings.out / f"calibration-{spread}-{self.key[:12]}"
            work.mkdir(parents=True, exist_ok=True)
            with torch.inference_mode():
                self.stats[spread] = calibrate(
                    self.model,
                    architecture_of(self.config),
                    sequences,
                    [spread] * len(sequences),
                    c.sample_tokens,
                    work,
                )
        return self.stats[spread]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"
