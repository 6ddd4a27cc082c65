"""report.html: what an artifact is, in plots:
one page that needs nothing else and is the same for the same artifact."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvfold.errors import KvfoldError
from kvfold.exports.account import (
    STATE_NBYTES,
    Geometry,
    cache_nbytes,
    stock_nbytes,
)
from kvfold.exports.files import REPORT_NAME
from kvfold.exports.page.card import environment
from kvfold.exports.page.charts import Chart, layer_bars, loss_points, memory_lines
from kvfold.exports.reader import read_metadata
from kvfold.exports.schema import Metadata
from kvfold.exports.scratch import write_whole
from kvfold.exports.units import format_nbytes
from kvfold.kernels.formats import Format
from kvfold.version import __version__

WIDTHS = {
    "wide": 545,
    "narrow": 340,
}  # of the two drawings of each chart: about a card's pixels, desktop and phone


class Result(BaseModel):
    """One measured row: KL in nats per token to the 16-bit cache at `payload_bits`. Other fields of
    a row are ignored.

    `name` defaults to the artifact's, as `kvfold eval --json` writes it; effective_bits, kl_se,
    text, windows and seq_len are shown where they are given.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=200)
    payload_bits: float = Field(gt=0, le=64)
    kl: float = Field(ge=0)
    effective_bits: float | None = Field(default=None, gt=0)
    kl_se: float | None = Field(default=None, ge=0)
    text: str | None = None
    windows: int | None = None
    seq_len: int | None = None
    ours: bool = False


def read_results(path: Path) -> list[Result]:
    """Measured rows of a JSON file: one object of `kvfold eval --json`, a list of such, or a
    benchmark's object with `rows`, whose own text, windows and seq_len hold for every row.

    Raises:
        KvfoldError: no such file, not JSON, or a row without payload_bits, kl and a name.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise KvfoldError(
            f"--results '{path}' cannot be read; give a JSON file that `kvfold eval --json` wrote."
        ) from None
    except ValueError as error:
        raise KvfoldError(
            f"--results '{path}' is not JSON ({error}); give a file of `kvfold eval --json`."
        ) from None
    shared: dict[str, Any] = {}
    if isinstance(data, dict) and isinstance(data.get("rows"), list):
        shared, data = (
            {k: data[k] for k in ("text", "windows", "seq_len") if k in data},
            data["rows"],
        )
    rows = data if isinstance(data, list) else [data]
    if not rows:
        raise KvfoldError(f"--results '{path}' holds no row; give one object or a list of objects.")
    found = []
    for i, row in enumerate(rows):
        named = row
        if isinstance(row, dict):
            ours = "artifact" in row or row.get("kind") == "artifact"
            named = {**shared, "name": row.get("artifact"), "ours": ours, **row}
        try:
            found.append(Result.model_validate(named))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise KvfoldError(
                f"Row {i} of --results '{path}' is not valid at {place}: {first['msg']}; a row needs payload_bits, "
                "kl and name."
            ) from None
    return found


def code_row_nbytes(fmt: Format) -> int:
    """Bytes of one token's codes of one head, without parameters and padding."""
    return sum(plane.storage.row_nbytes(plane.channels) for plane in fmt.planes)


def account_parts(metadata: Metadata) -> list[tuple[str, str, int]]:
    """The account at the budget's length, cut up: (id, what, bytes); the bytes add up to
    `account.bytes`.

    What a page takes beyond its codes and parameters is padding.
    """
    geometry, at = metadata.geometry, metadata.account.at
    layers = metadata.cache.num_layers
    sides = [
        (fmt, geometry.of_layer(i), geometry.sliding_of(i))
        for i, pair in enumerate(metadata.formats)
        for fmt in pair
    ]
    rows = [
        own.held_pages(at, sliding) * own.page_tokens * own.num_kv_heads
        for _, own, sliding in sides
    ]
    codes = sum(n * code_row_nbytes(fmt) for n, (fmt, *_) in zip(rows, sides, strict=True))
    params = sum(
        n * fmt.num_params * fmt.param_nbytes for n, (fmt, *_) in zip(rows, sides, strict=True)
    )
    packed = sum(own.side_nbytes(fmt, at, sliding) for fmt, own, sliding in sides)
    token = geometry.raw_nbytes(layers) // geometry.raw_rows
    state = layers * STATE_NBYTES
    raw = token * geometry.raw_rows
    kept = geometry.state_nbytes
    table = metadata.account.bytes - packed - raw - state - kept
    return [
        ("codes", "codes in pages", codes),
        ("params", "scales and minima in pages", params),
        ("padding", "padding of pages", packed - codes - params),
        ("window", f"window of {geometry.window} tokens, 16-bit", token * geometry.window),
        (
            "open",
            f"open page of {geometry.page_tokens} tokens, 16-bit",
            token * geometry.page_tokens,
        ),
        (
            "rollback",
            f"rollback of {geometry.rollback} tokens in whole pages, 16-bit",
            token * (geometry.ring - geometry.window - geometry.page_tokens),
        ),
        ("sinks", f"{geometry.sinks} sinks, 16-bit", token * geometry.sinks),
        ("tables", "block tables", table),
        ("state", "lengths and page counts", state),
        *([("states", "states of layers, at any length", kept)] if kept else []),
    ]


def _lengths(metadata: Metadata) -> list[int]:
    """Powers of two from 512 up to the longest length that the artifact accounts for, and the
    budget's length."""
    top = max([metadata.account.at, *(int(n) for n in metadata.account.bytes_at)])
    powers = [2**i for i in range(9, 31) if 2**i <= top]
    return sorted({*powers, metadata.account.at})


def _memory(width: int, metadata: Metadata) -> Chart:
    geometry: Geometry = metadata.geometry
    lengths, layers = _lengths(metadata), metadata.cache.num_layers
    lines = {
        "16-bit cache": [(n, stock_nbytes(geometry, n, layers)) for n in lengths],
        "this artifact": [(n, cache_nbytes(geometry, metadata.formats, n)) for n in lengths],
    }
    return memory_lines(width, lines, (metadata.account.at, metadata.account.bytes))


def _loss(width: int, metadata: Metadata, results: Sequence[Result]) -> Chart:
    bits, kl = metadata.account.payload_bits, metadata.calibration.kl
    points = [
        (
            "predicted",
            bits,
            kl,
            "0",
            f"0: this artifact on calibration text, {kl:.4g} nats at {bits:.3f} bits",
        )
    ]
    for i, r in enumerate(results, 1):
        tip = f"{i}: {r.name}, {r.kl:.4g} nats at {r.payload_bits:.3f} bits"
        points.append(("kvfold" if r.ours else "other", r.payload_bits, r.kl, str(i), tip))
    return loss_points(width, points)


def report_html(metadata: Metadata, results: Sequence[Result] = ()) -> str:
    """The page's text: a function of kv_cache.json and the measured rows alone.

    Args:
        results: measured rows; without any the page says how to add them.
    """
    sides = [(layer.key, layer.value) for layer in metadata.layers]
    formats = metadata.formats
    rows: list[dict[str, Any]] = [
        {
            "layer": i,
            "key": str(formats[i][0]),
            "key_bits": k.payload_bits,
            "key_loss": k.predicted_loss,
            "key_transforms": ", ".join(k.transforms),
            "value": str(formats[i][1]),
            "value_bits": v.payload_bits,
            "value_loss": v.predicted_loss,
            "value_transforms": ", ".join(v.transforms),
            "bytes": sum(
                metadata.geometry.of_layer(i).side_nbytes(
                    fmt, metadata.account.at, metadata.geometry.sliding_of(i)
                )
                for fmt in formats[i]
            ),
        }
        for i, (k, v) in enumerate(sides)
    ]
    bits = {"K": [r["key_bits"] for r in rows], "V": [r["value_bits"] for r in rows]}
    loss = {"K": [r["key_loss"] for r in rows], "V": [r["value_loss"] for r in rows]}
    bit_tips = [
        f"layer {r['layer']}: K {r['key_bits']:.3f} bits, V {r['value_bits']:.3f} bits"
        for r in rows
    ]
    loss_tips = [
        f"layer {r['layer']}: K {r['key_loss']:.2e}, V {r['value_loss']:.2e} nats" for r in rows
    ]
    parts, total, start = [], metadata.account.bytes, 0
    for name, what, nbytes in account_parts(metadata):
        parts.append(
            {
                "id": name,
                "what": what,
                "bytes": nbytes,
                "share": nbytes / total,
                "start": start / total,
            }
        )
        start += nbytes
    # names of models, texts and rows come from files that others wrote
    env = environment(autoescape=True, lstrip_blocks=True)
    template = env.get_template("report.html.jinja")
    return template.render(
        **metadata.model_dump(),
        rows=rows,
        parts=parts,
        results=list(results),
        predicted=sum(r["key_loss"] + r["value_loss"] for r in rows),
        bits_charts={k: layer_bars(w, bits, bit_tips, stacked=False) for k, w in WIDTHS.items()},
        loss_charts={k: layer_bars(w, loss, loss_tips, stacked=True) for k, w in WIDTHS.items()},
        memory_charts={k: _memory(w, metadata) for k, w in WIDTHS.items()},
        kl_charts={k: _loss(w, metadata, results) for k, w in WIDTHS.items()},
        size=format_nbytes,
        version=__version__,
    )


def write_report(folder: Path, results: Sequence[Result] = ()) -> Path:
    """Rewrites report.html of an artifact's folder, with measured rows if there are any; it appears
    complete.

    Raises:
        KvfoldError: no artifact there, or a folder that can't be written.
    """
    text = report_html(read_metadata(folder), results)
    path = folder / REPORT_NAME
    try:
        write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise KvfoldError(
            f"'{path}' cannot be written ({error.strerror}); make the artifact's folder writable or copy it."
        ) from error
    return path
