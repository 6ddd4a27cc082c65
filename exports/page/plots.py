"""The model card's two pictures, drawn from kv_cache.json alone: the same metadata gives the same
bytes."""

from pathlib import Path
from typing import Any

from kvfold.exports.account import cache_nbytes
from kvfold.exports.schema import Metadata

BITS_NAME = "bits.png"
MEMORY_NAME = "memory.png"
KEY_COLOUR, VALUE_COLOUR, PLAIN_COLOUR = (
    "#0072b2",
    "#d55e00",
    "#808080",
)  # told apart by the colour-blind too
POINTS = 64  # of each line in the memory plot


def draw_plots(folder: Path, metadata: Metadata) -> None:
    """Writes bits.png (payload bits of each layer's keys and values) and memory.png (bytes against
    tokens) into a folder."""
    _save(folder / BITS_NAME, _bits(metadata))
    _save(folder / MEMORY_NAME, _memory(metadata))


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import (
        Figure,
    )  # without pyplot: no display, no state of the process is touched

    figure = Figure(figsize=(7.2, 2.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _bits(metadata: Metadata) -> Any:
    figure, axes = _figure()
    layers = range(len(metadata.layers))
    axes.bar(
        [i - 0.2 for i in layers],
        [layer.key.payload_bits for layer in metadata.layers],
        0.4,
        color=KEY_COLOUR,
        label="keys",
    )
    axes.bar(
        [i + 0.2 for i in layers],
        [layer.value.payload_bits for layer in metadata.layers],
        0.4,
        color=VALUE_COLOUR,
        label="values",
    )
    axes.set(xlabel="layer", ylabel="bits per element in pages", xlim=(-0.8, len(layers) - 0.2))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(ncols=2, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def _memory(metadata: Metadata) -> Any:
    figure, axes = _figure()
    longest = max([metadata.account.at, *map(int, metadata.account.bytes_at)])
    lengths = sorted({max(1, longest * i // POINTS) for i in range(1, POINTS + 1)})
    geometry, formats = metadata.geometry, metadata.formats
    plain = [2 * geometry.elements(n, len(formats)) / 2**20 for n in lengths]
    axes.plot(lengths, plain, color=PLAIN_COLOUR, linestyle="--", label="16-bit cache")
    axes.plot(
        lengths,
        [cache_nbytes(geometry, formats, n) / 2**20 for n in lengths],
        color=KEY_COLOUR,
        label="packed cache",
    )
    axes.set(
        xlabel="tokens of one sequence",
        ylabel="MiB resident",
        xlim=(0, longest),
        ylim=(0, plain[-1] * 1.05),
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, loc="upper left")
    return figure


def _save(path: Path, figure: Any) -> None:
    figure.savefig(path, metadata={"Software": None})  # nor matplotlib's version in the bytes
