"""`kvfold inspect --live`: the cache's tokens, pages by format and bytes by layer, while the model
generates."""

import json
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from kvfold.compress.progress import console
from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.exports.units import format_nbytes
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.load import load_pretrained, resolve_artifact

EVERY = 16  # generated tokens between two tables where there is no terminal


def table_of(cache: QuantizedKVCache) -> Table:
    """A cache's report: a row for each layer, and the sum in the title."""
    rows = cache.report()
    tokens = rows[0]["tokens"] or [0]
    elements = cache.geometry.elements(sum(tokens), len(rows))
    packed = cache.nbytes - cache.states.nbytes
    bits = f"{8 * packed / elements:.3f} effective bits" if elements else "empty"
    limit = f" of {format_nbytes(cache.budget)}" if cache.budget is not None else ""
    table = Table(
        title=f"{max(tokens)} tokens, {format_nbytes(cache.nbytes)}{limit}, {bits}",
        title_justify="left",
    )
    for column in ("layer", "tokens", "pages by format", "bytes", "effective bits"):
        table.add_column(
            column,
            justify="left" if "format" in column else "right",
            no_wrap="format" not in column,
        )
    for layer, row in enumerate(rows):
        pages = ", ".join(f"{count} × {name}" for name, count in row["pages"].items() if count)
        table.add_row(
            str(layer),
            " ".join(map(str, row["tokens"])),
            pages,
            f"{row['bytes']:,}",
            f"{row['effective_bits']:.3f}",
        )
    return table


class Watcher(BaseStreamer):
    """Shows a cache after every token on a terminal, else after the prompt and every EVERY tokens;
    and at the end.

    Args:
        cache: what the model generates with.
        console: where to.
    """

    def __init__(self, cache: QuantizedKVCache, console: Console) -> None:
        self.cache, self.console, self.steps = cache, console, 0
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, before the model has seen it, then with each
        token."""
        if self.steps and self.live is not None:
            self.live.start()
            self.live.update(table_of(self.cache), refresh=True)
        elif self.steps and self.steps % EVERY == 1:
            self.console.print(table_of(self.cache))
        self.steps += 1

    def end(self) -> None:
        """Called by `generate` when it is done, and by `watch` when it was cut short."""
        if self.live is not None:
            self.live.update(table_of(self.cache), refresh=True)
            self.live.stop()
        else:
            self.console.print(table_of(self.cache))


def watch(
    artifact: str,
    prompt: str,
    max_new_tokens: int,
    policy: str = "floor",
    kv_budget: str | None = None,
    device: torch.device | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Generates greedily and shows the cache meanwhile, on stdout.

    Args:
        artifact: folder or Hub id.
        policy, kv_budget, device: as in load_pretrained.
        as_json: prints the last report as one JSON list instead, and nothing meanwhile.
    Returns:
        The cache's last report.
    Raises:
        KvfoldError: no artifact, an empty prompt, or a budget that the prompt alone passes.
    """
    path = resolve_artifact(artifact)
    model: Any = load_pretrained(path, device=device, policy=policy, kv_budget=kv_budget)
    inputs = tokenizer_from_pretrained(path)(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise KvfoldError(
            "The prompt is empty and the tokenizer adds nothing to it; give some text."
        )
    cache = model.new_kv_cache()
    watcher = Watcher(cache, console(quiet=as_json))
    try:
        model.generate(
            **inputs.to(model.device), past_key_values=cache, max_new_tokens=max_new_tokens, streamer=watcher,
            do_sample=False, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
    except KVBudgetExceeded:
        watcher.end()
        raise
    if as_json:
        print(json.dumps(cache.report()))
    return cache.report()
