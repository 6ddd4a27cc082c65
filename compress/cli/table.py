"""What `kvfold inspect` and `kvfold compress` print of an artifact."""

from collections import Counter
from typing import Any

from rich.table import Table
from rich.text import Text

from kvfold.compress.progress import console
from kvfold.errors import KvfoldError
from kvfold.exports.account import cache_nbytes, effective_bits, stock_nbytes
from kvfold.exports.loss import loss_words
from kvfold.exports.schema import Metadata
from kvfold.exports.units import format_nbytes, printable


def describe(metadata: Metadata, at: int | None = None) -> dict[str, Any]:
    """What `kvfold inspect --json` prints.

    Args:
        at: tokens of one sequence; default: the budget's length.
    """
    tokens = metadata.account.at if at is None else at
    if tokens < 1:
        raise KvfoldError(f"--at {tokens} is not a number of tokens; give 1 or more.")
    geometry, formats = metadata.geometry, metadata.formats
    nbytes = cache_nbytes(geometry, formats, tokens)
    layers = [
        {
            "layer": i,
            **{
                name: {
                    "format": str(fmt),
                    "payload_bits": side.payload_bits,
                    "transforms": side.transforms,
                    "bytes": geometry.of_layer(i).side_nbytes(fmt, tokens, geometry.sliding_of(i)),
                    "predicted_loss": side.predicted_loss,
                }
                for name, side, fmt in (
                    ("key", layer.key, formats[i][0]),
                    ("value", layer.value, formats[i][1]),
                )
            },
        }
        for i, layer in enumerate(metadata.layers)
    ]
    return {
        "format_version": metadata.format_version,
        "model": metadata.provenance.model,
        "at": tokens,
        "bytes": nbytes,
        "bytes_16bit": stock_nbytes(geometry, tokens, len(formats)),
        "effective_bits": effective_bits(geometry, nbytes, [tokens], len(formats)),
        "payload_bits": metadata.account.payload_bits,
        "sinks": geometry.sinks,
        "window": geometry.window,
        "page_tokens": geometry.page_tokens,
        "rollback": geometry.rollback,
        **({"state_bytes": geometry.state_nbytes} if geometry.state_nbytes else {}),
        "kl": metadata.calibration.kl,
        "covered_positions": metadata.calibration.covered_positions,
        "kernels": {
            "pairs": len(set(formats)),
            "key_formats": len({k for k, _ in formats}),
            "value_formats": len({v for _, v in formats}),
        },
        "layers": layers,
    }


def print_table(metadata: Metadata, at: int | None = None) -> None:
    """The per-layer table and the account under it, on stdout."""
    from kvfold.compress.recipe import LEAST_WINDOW

    info = describe(metadata, at)
    title = Text(
        f"{printable(info['model'])}: one sequence of {info['at']} tokens"
    )  # as it is: no markup
    table = Table(title=title, title_justify="left")
    for column in (
        "layer",
        "K format",
        "K bits",
        "V format",
        "V bits",
        "packed bytes",
        "predicted loss",
    ):
        table.add_column(column, justify="left" if "format" in column else "right", no_wrap=True)
    for layer in info["layers"]:
        k, v = layer["key"], layer["value"]
        loss = k["predicted_loss"] + v["predicted_loss"]
        table.add_row(
            str(layer["layer"]),
            k["format"],
            f"{k['payload_bits']:.3f}",
            v["format"],
            f"{v['payload_bits']:.3f}",
            f"{k['bytes'] + v['bytes']:,}",
            f"{loss:.2e}",
        )
    console().print(table)
    total = sum(
        layer[side]["predicted_loss"] for layer in info["layers"] for side in ("key", "value")
    )
    near = f" behind {LEAST_WINDOW} of them" if info["window"] > LEAST_WINDOW else ""
    print(
        f"{format_nbytes(info['bytes'])} ({info['bytes']} bytes) instead of {format_nbytes(info['bytes_16bit'])}: "
        f"{info['effective_bits']:.3f} effective bits, {info['payload_bits']:.3f} in pages; "
        f"{info['sinks']} sinks and a window of {info['window']} tokens in 16 bits, crops exact up to "
        f"{info['rollback']}; KL on calibration text "
        f"{info['kl']:.4f} nats{near} (predictions, each layer alone, add up to {total:.4f}); "
        f"calibrated for positions up to {info['covered_positions']}."
    )
    if "state_bytes" in info:
        print(
            f"Layers above are those that attend, in order; states that layers keep at any length take "
            f"{format_nbytes(info['state_bytes'])} ({info['state_bytes']} bytes), which are in the bytes above and not "
            "in the bits."
        )
    if words := loss_words(info["kl"]):
        print(f"Warning: {words}")
    kernels = info["kernels"]
    print(
        f"Kernels: {kernels['pairs']} pairs of formats, {kernels['key_formats']} of keys and "
        f"{kernels['value_formats']} of values (K / V × layers):"
    )
    for (k, v), layers in Counter(metadata.formats).most_common():
        print(f"  {k} / {v} × {layers}")


def with_error(standard_error: float | None) -> str:
    """What stands behind a mean: nothing if there was one window."""
    return "" if standard_error is None else f" ± {standard_error:.4f}"
