"""Loss by position at equal peak bytes: pages lowered as memory fills, against the searched bits at
once, and whole layers.

usage: python benchmarks/progressive.py MODEL_OR_DIR [--tokens 4096] [--share S] [--text FILE|DATASET] [--windows 1]
                                        [--chunk 128] [--device auto] [--out artifacts/progressive]

The budget is a share of the 16-bit cache of so many tokens. A model is compressed so that its floor
takes just that at the end, by default a fifth; for an artifact the default is what its own floor
takes at the end. Text is teacher-forced in chunks through one cache of each rule, and beside it
through an unquantised cache in 16 bits (float32 on a CPU), without a budget:

    floor         every page at the searched bits at once progressive   pages go down one at a time,
    the least harmful first whole layers  PM-KVQ's rule (arXiv 2505.18610) on the same ladders: all
    pages of a layer, keys and values, go down
                  together when the layer passes its own share of the budget, and new pages start
                  where their layer stands

Prints Markdown; writes Markdown, JSON and a plot after each row. Run again with the same options,
it goes on where it stopped.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvfold.compress.bench.runs import Rows, geometry_of, mean_and_error
from kvfold.compress.evaluate import LOGIT_BLOCK, windows_of
from kvfold.compress.models import quiet_transformers
from kvfold.compress.pipeline import compress
from kvfold.compress.plan import pick_device
from kvfold.compress.progress import progress
from kvfold.compress.recipe import Recipe
from kvfold.compress.text import read_documents
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import logits_of
from kvfold.exports.reader import Artifact, is_artifact, read_artifact, read_metadata
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.budget.ladder import Ladders, Step
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.load import load_pretrained, plain_cache, progressive_policy

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
FLOOR, PAGES, LAYERS = RULES = ("floor", "progressive", "whole layers")
BINS = 16  # stretches of the text that a mean loss is shown of


class WholeLayers(Ladders):
    """PM-KVQ's rule: a layer goes down with all its pages once they pass its share of the budget,
    which is its part of the floor."""

    whole_layers = True

    def steps(self, losses: Sequence[tuple[float, float]]) -> list[Step]:
        """The layer that is largest against its own floor goes first."""
        found = []
        for layer, sizes in enumerate(self.sizes):
            for rung in range(len(sizes) - 1, 0, -1):
                found.append(
                    Step(layer, rung, sizes[rung] - sizes[rung - 1], -sizes[rung] / sizes[0])
                )
        return found


def budget_of(artifact: Artifact, tokens: int, share: float | None) -> int:
    """Bytes: a share of the unquantised 16-bit cache of one sequence, or what the floor takes.

    Raises:
        KvfoldError: the floor takes more.
    """
    least = progressive_policy(artifact).least_nbytes(artifact.geometry, tokens)
    if share is None:
        return least
    budget = int(share * 2 * artifact.geometry.elements(tokens, len(artifact.specs)))
    if least > budget:
        raise KvfoldError(
            f"The floor of '{artifact.path}' takes {least} bytes at {tokens} tokens, "
            f"more than the budget of {budget}; raise --share."
        )
    return budget


def new_cache(model: Any, rule: str, budget: int) -> Any:
    """An empty cache of one sequence."""
    artifact = model.kv_artifact
    if rule == FLOOR:
        return QuantizedKVCache(
            artifact.specs, artifact.geometry, budget, backend_of(model.kv_triton)
        )
    ladders = progressive_policy(artifact)
    if rule == LAYERS:
        losses = [(x.key.predicted_loss, x.value.predicted_loss) for x in artifact.metadata.layers]
        ladders = WholeLayers(artifact.specs, losses, artifact.geometry)
    return QuantizedKVCache(artifact.specs, artifact.geometry, budget, ladders=ladders)


@torch.inference_mode()
def losses_of(model: Any, ids: Tensor, rule: str, budget: int, chunk: int) -> dict[str, Any]:
    """Teacher-forced losses of ids [1, T] under a rule.

    Returns:
        nll, plain_nll, kl: of every token but the first; plain_nll is the unquantised cache's, kl
            from it to the rule's, in nats;
        positions, bytes, bits: of the cache after each chunk (bits: mean of an element in pages);
            peak_bytes, seconds (both caches').
    """
    cache, plain = new_cache(model, rule, budget), DynamicCache(config=model.config)
    begun = time.monotonic()
    found: dict[str, list[float]] = {"nll": [], "plain_nll": [], "kl": []}
    trace: dict[str, list] = {"positions": [], "bytes": [], "bits": []}
    for start in progress(range(0, ids.shape[1], chunk), rule, "chunk"):
        part = ids[:, start : start + chunk]
        hidden = model.base_model(
            input_ids=part, past_key_values=cache, use_cache=True
        ).last_hidden_state[0]
        with plain_cache(model):
            true = model.base_model(
                input_ids=part, past_key_values=plain, use_cache=True
            ).last_hidden_state[0]
        targets = ids[0, start + 1 : start + 1 + part.shape[1]]
        for row in range(0, len(targets), LOGIT_BLOCK):
            wanted = targets[row : row + LOGIT_BLOCK, None]
            ours, theirs = (
                logits_of(model, x[row : row + len(wanted)]).float().log_softmax(-1)
                for x in (hidden, true)
            )
            found["nll"] += (-ours.gather(1, wanted))[:, 0].tolist()
            found["plain_nll"] += (-theirs.gather(1, wanted))[:, 0].tolist()
            found["kl"] += (theirs.exp() * (theirs - ours)).sum(-1).tolist()
        trace["positions"].append(start + part.shape[1])
        trace["bytes"].append(cache.nbytes)
        trace["bits"].append(page_bits(cache))
    seconds = time.monotonic() - begun
    pages = [list(layer.table.pool.counts) for layer in cache.layers]  # by rung, floor first
    return {**found, **trace, "peak_bytes": max(trace["bytes"]), "seconds": seconds, "pages": pages}


def page_bits(cache: QuantizedKVCache) -> float:
    """Mean bits of an element in pages, parameters included; 16 while there are none."""
    g = cache.geometry
    pages = sum(len(layer.table.pool) for layer in cache.layers)
    nbytes = sum(layer.table.pool.nbytes for layer in cache.layers)
    return 8 * nbytes / (2 * pages * g.page_tokens * g.num_kv_heads * g.head_dim) if pages else 16.0


def means(
    rows: dict[str, Any], rule: str, windows: int, part: slice, what: str
) -> tuple[float, float]:
    """Mean over a stretch of all windows of "kl", or of "loss" over the unquantised cache's, and
    its standard error over blocks of 64 tokens."""
    blocks: list[float] = []
    for window in range(windows):
        row = rows[f"{rule}, {window}"]
        values = (
            row["kl"]
            if what == "kl"
            else [a - b for a, b in zip(row["nll"], row["plain_nll"], strict=True)]
        )
        values = values[part]
        blocks += [
            sum(values[i : i + 64]) / len(values[i : i + 64]) for i in range(0, len(values), 64)
        ]
    return mean_and_error(blocks)


def table(rows: dict[str, Any], windows: int, budget: int, tokens: int) -> str:
    """Markdown: KL to the unquantised cache and loss over its loss by quarters of the text, peak
    bytes and bits of the pages at the end."""
    size = tokens - 1
    parts = [slice(size * i // 4, size * (i + 1) // 4) for i in range(4)] + [slice(0, size)]
    heads = [f"tokens {q.start}–{q.stop}" for q in parts[:-1]]
    lines = [
        (
            f"Budget {budget} bytes. Nats per token, ± standard error over blocks of 64 tokens; "
            "Δloss is over the unquantised cache's."
        ),
        "",
        f"| rule | peak bytes | bits in pages at the end | | {' | '.join(heads)} | all |",
        "|---" * (len(heads) + 5) + "|",
    ]
    for rule in RULES:
        if any(f"{rule}, {window}" not in rows for window in range(windows)):
            continue
        row = [rows[f"{rule}, {window}"] for window in range(windows)]
        bits = sum(r["bits"][-1] for r in row) / windows
        for what, name, sign in (("kl", "KL", ""), ("loss", "Δloss", "+")):
            found = [means(rows, rule, windows, part, what) for part in parts]
            cells = " | ".join(f"{mean:{sign}.4f} ± {error:.4f}" for mean, error in found)
            lines.append(
                f"| {rule} | {max(r['peak_bytes'] for r in row)} | {bits:.2f} | {name} | {cells} |"
            )
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: dict[str, Any], windows: int, budget: int, tokens: int) -> None:
    """KL to the unquantised cache, loss over its loss, bits of the pages and resident bytes, by
    position; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7.2, 9.0), dpi=120, layout="constrained")
    kl, loss, bits, size = figure.subplots(4, 1, sharex=True)
    edges = [(tokens - 1) * i // BINS for i in range(BINS + 1)]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    for rule, colour in zip(RULES, ("#808080", "#0072b2", "#d55e00"), strict=True):
        if any(f"{rule}, {window}" not in rows for window in range(windows)):
            continue
        for axes, what in ((kl, "kl"), (loss, "loss")):
            found = [
                means(rows, rule, windows, slice(a, b), what) for a, b in itertools.pairwise(edges)
            ]
            axes.errorbar(
                middles,
                [m for m, _ in found],
                [e for _, e in found],
                color=colour,
                label=rule,
                capsize=2,
            )
        row = rows[f"{rule}, 0"]
        bits.plot(row["positions"], row["bits"], color=colour)
        size.plot(row["positions"], [n / 2**20 for n in row["bytes"]], color=colour)
    kl.set(ylabel="KL to 16 bits, nats", ylim=(0, None))
    loss.axhline(0, color="black", linewidth=0.5)
    loss.set(ylabel="nats over 16 bits")
    if kl.get_legend_handles_labels()[0]:
        kl.legend(frameon=False)
    bits.set(ylabel="bits in pages", ylim=(0, 17))
    size.axhline(budget / 2**20, color="black", linestyle="--", linewidth=0.8)
    size.set(ylabel="MiB resident", xlabel="position", ylim=(0, None))
    for axes in (kl, loss, bits, size):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path)


def artifact_for(model: str, tokens: int, share: float, out: Path, device: str) -> Path:
    """The artifact to measure: the given one, or one whose floor takes what the budget leaves
    beside the ladders' own bytes."""
    if is_artifact(Path(model)):
        return Path(model)
    folder = out / f"{Path(model).name}-{share:g}-at-{tokens}"
    if not is_artifact(folder):
        geometry, layers, _ = geometry_of(model, Recipe())
        spare = layers * geometry.segments_nbytes(4)
        budget = int(share * 2 * geometry.elements(tokens, layers)) - spare
        compress(model, f"{budget}B@{tokens}", folder, device=device, resume=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="alias, folder or id of a model, or an artifact's folder")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--share", type=float, help="of the 16-bit cache")
    parser.add_argument("--text", default=WIKITEXT)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--first-window", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("artifacts/progressive"))
    options = parser.parse_args()
    quiet_transformers()
    torch.set_flush_denormal(True)  # masked softmax is several times slower with denormals on a CPU
    wanted = [rule.strip() for rule in options.rules.split(",")]
    if unknown := [rule for rule in wanted if rule not in RULES]:
        raise KvfoldError(
            f"--rules has '{unknown[0]}', which is no rule; choose from {', '.join(RULES)}."
        )
    device = pick_device(options.device)
    share = 0.2 if options.share is None and not is_artifact(Path(options.model)) else options.share
    path = artifact_for(options.model, options.tokens, share or 0.2, options.out, options.device)
    artifact = read_artifact(path)
    budget = budget_of(artifact, options.tokens, share)
    model: Any = load_pretrained(path, device=device)
    if options.tokens > model.config.max_position_embeddings:
        raise KvfoldError(
            f"--tokens {options.tokens} is more than the model's "
            f"{model.config.max_position_embeddings} positions; ask for fewer."
        )
    tokenizer = tokenizer_from_pretrained(path)
    name, documents = read_documents(options.text)
    batches = windows_of(
        tokenizer,
        "\n\n".join(documents),
        options.tokens,
        options.first_window,
        options.windows,
        name,
    )
    kept = {k: getattr(options, k) for k in ("tokens", "text", "first_window", "chunk")}
    shared = {
        **kept,
        "budget": budget,
        "windows": len(batches),
        "device": device.type,
        "files": read_metadata(path).files,
    }
    stem = options.out / f"progressive-{Path(options.model).name}"
    done = Rows(stem.with_suffix(".json"), shared)
    for window, ids in enumerate(batches):
        for rule in wanted:
            if (key := f"{rule}, {window}") in done:
                continue
            done.add(key, losses_of(model, ids.to(device), rule, budget, options.chunk))
            seen = min(len(batches), window + 1)
            text = table(done.rows, seen, budget, options.tokens)
            stem.with_suffix(".md").write_text(text, encoding="utf-8")
            draw(stem.with_suffix(".png"), done.rows, seen, budget, options.tokens)
    print(table(done.rows, len(batches), budget, options.tokens))


if __name__ == "__main__":
    main()
