"""What benchmarks that make and measure many artifacts share: rows that outlive an interrupted run,
budgets by payload."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kvfold.compress.evaluate import Evaluation, evaluate
from kvfold.compress.models import read_config, resolve_model
from kvfold.compress.models.states import states_of
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import Recipe
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import (
    architecture_of,
    attention_layers_of,
    head_dim_of,
    num_kv_heads_of,
    sliding_windows_of,
)
from kvfold.exports.scratch import write_whole

# tokens in 16 bits at a sequence's beginning, as SKVQ has them (arXiv 2405.06219): the same in all
# rows of all tables
SINKS = 5
CONTEXT = 32768  # tokens at which budgets count, or the model's maximum


class Rows:
    """Finished rows by name, in a JSON file that is rewritten whole after each; a run with the same
    options goes on there.

    Args:
        path: of the file.
        options: what all rows depend on; rows of other options are dropped.
    """

    def __init__(self, path: Path, options: dict) -> None:
        self.path, self.options = path, json.loads(json.dumps(options))
        found = json.loads(path.read_text()) if path.is_file() else {}
        self.rows: dict[str, Any] = (
            found.get("rows", {}) if found.get("options") == self.options else {}
        )

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def add(self, name: str, row: Any) -> None:
        self.rows[name] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"options": self.options, "rows": self.rows}, indent=1) + "\n"
        write_whole(self.path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def side_by_side(work: Callable, tasks: dict[str, tuple], jobs: int) -> Iterator[tuple[str, Any]]:
    """(name, work(*arguments)) of every task as it is done: one after another, or in `jobs`
    processes that share the GPUs out."""
    if jobs == 1:
        for name, arguments in tasks.items():
            yield name, work(*arguments)
        return
    context = get_context("spawn")
    started = context.Value("i", 0)
    with ProcessPoolExecutor(
        jobs, context, _take_device, (started, torch.cuda.device_count(), jobs)
    ) as pool:
        found = {pool.submit(work, *arguments): name for name, arguments in tasks.items()}
        try:
            for future in as_completed(found):
                yield found[future], future.result()
        finally:  # of an error: nothing is begun whose result nobody would keep
            pool.shutdown(wait=False, cancel_futures=True)


def _take_device(started: Any, devices: int, jobs: int) -> None:
    """In a process of its own, before it uses a GPU: the next one in turn becomes its only one."""
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if devices:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = given.split(",") if given else [str(i) for i in range(devices)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % devices]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def folder_of(out: Path, jobs: int) -> Path:
    """Where a process works; its rows share their statistics there, and no two processes write one
    file."""
    return out if jobs == 1 else out / str(os.getpid())


def comparable(recipe: Recipe) -> Recipe:
    """A recipe with no more sinks, no longer a window and no more rollback than the tables' other
    rows have; by default an artifact keeps more."""
    return recipe.model_copy(
        update={"sinks": min(recipe.sinks, SINKS), "window": recipe.least_window, "rollback": 0}
    )


def geometry_of(model: str, recipe: Recipe) -> tuple[Geometry, int, int]:
    """Shape of a model's cache under a recipe, its number of layers, and the tokens that its
    budgets count at."""
    config = read_config(resolve_model(model).path)
    heads = num_kv_heads_of(config), head_dim_of(config)
    states = states_of(config, architecture_of(config))
    shape = Geometry(
        *heads,
        recipe.sinks,
        recipe.least_window,
        recipe.page_tokens,
        sliding_windows_of(config),
        recipe.most_rollback,
        0 if states is None else states.nbytes(),
    )
    return shape, len(attention_layers_of(config)), min(CONTEXT, config.max_position_embeddings)


def budget_for_payload(model: str, recipe: Recipe, bits: float) -> str:
    """The budget in bytes that leaves `bits` of payload for every packed element, whatever sinks
    and window take.

    Where layers slide it counts at the shortest window: all layers then hold as much, and the
    payload is the mean of the layers'.
    """
    geometry, layers, at = geometry_of(model, recipe)
    at = min([at, *(window for window in geometry.sliding if window)])
    packed = geometry.packed_elements(at, layers)
    fixed = layers * geometry.fixed_nbytes(at) + geometry.state_nbytes
    return f"{fixed + int(bits * packed / 8)}B@{at}"


def make(
    model: str, recipe: Recipe, bits: float, out: Path, device: str, calib: str | None = None
) -> dict:
    """Compresses at a payload; the calibration is kept beside `out` for runs that share it. Returns
    the artifact's figures."""
    budget = budget_for_payload(model, recipe, bits)
    c = recipe.calibration
    if not c.spread:  # the whole context, wherever the budget counts
        spread = max(1, ceil(geometry_of(model, recipe)[2] / c.seq_len))
        recipe = recipe.model_copy(update={"calibration": c.model_copy(update={"spread": spread})})
    kept = out.parent / "statistics"
    made = compress(
        model,
        budget,
        out,
        calib=calib,
        recipe=recipe,
        device=device,
        statistics=kept,
        resume=True,
        accept_loss=True,
    ).metadata
    return {
        "payload_bits": made.account.payload_bits,
        "key_bits": sum(layer.key.payload_bits for layer in made.layers) / len(made.layers),
        "value_bits": sum(layer.value.payload_bits for layer in made.layers) / len(made.layers),
        "predicted": sum(
            layer.key.predicted_loss + layer.value.predicted_loss for layer in made.layers
        ),
        "calibration_kl": made.calibration.kl,
    }


def measure(
    artifact: Path, text: str, first: int, windows: int, seq_len: int, device: str
) -> list[Evaluation]:
    """Each window on its own, in float32: differences between artifacts are then paired by window.

    Pages are read by the plain-torch reference on every device: kernels would be compiled anew for
    each row's formats.
    """
    place = None if device == "auto" else device
    return [
        evaluate(
            str(artifact),
            text=text,
            windows=1,
            first_window=i,
            seq_len=seq_len,
            device=place,
            dtype=torch.float32,
            attention="reference",
        )
        for i in range(first, first + windows)
    ]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error (0 for one value)."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
