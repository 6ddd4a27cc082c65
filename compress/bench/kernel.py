"""`kvfold bench kernel`: attention over packed pages against 16-bit attention, after the
correctness gate."""

import math
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.bench.cases import DISTINCT, Case, Pair, Shape, make_case, pair
from kvfold.compress.bench.gate import append_options, gate_cases, lowering, run_append, run_gate
from kvfold.compress.bench.tools import (
    copies_for,
    flex_call,
    flex_ms,
    median_ms,
    random_kv,
    sdpa_ms,
)
from kvfold.exports.account import Geometry, table_entries
from kvfold.kernels.gpu.attention import pick_splits
from kvfold.kernels.gpu.queries import empty_queries
from kvfold.kernels.gpu.records import KeyTransform

LARGE = 131072  # tokens of a batch from which on the 16-bit kernel and FlexAttention are timed too
WRITE_BATCH = 16  # sequences from which on appending and lowering are timed


@dataclass(frozen=True)
class Settings:
    """What is the same for all rows."""

    device: torch.device
    head_dim: int = 128
    sinks: int = 5
    window: int = 128
    page_tokens: int = 32
    gate_tokens: int = 3333
    flex: bool = True
    jobs: int = 0  # processes that compile in advance; 0: none
    seed: int = 0

    def geometry(self, num_kv_heads: int) -> Geometry:
        return Geometry(num_kv_heads, self.head_dim, self.sinks, self.window, self.page_tokens)

    def splits(self, shape: Shape) -> int:
        """As `attention` chooses them for a cache of this shape."""
        pages = self.geometry(shape.num_kv_heads).num_pages(shape.tokens) + 1
        entries = table_entries(pages)
        programs = shape.batch * shape.num_kv_heads
        return pick_splits(programs, entries * self.page_tokens, self.device)


@dataclass(frozen=True)
class Baseline:
    """Milliseconds of 16-bit attention of one shape; a text says why there is no figure, None that
    none was asked for."""

    sdpa: float
    flex: float | str | None
    own: float | None


# -- compiling in advance --------------------------------------------------------------------------


def warm_attention(
    settings: Settings, formats: Pair, heads: tuple[int, int], splits: int, writes: bool
) -> None:
    """Compiles what a row of the table runs, on a cache of two pages: constants are the row's,
    sizes are not."""
    g = settings.geometry(heads[1])
    tokens = g.sinks + g.window + 2 * g.page_tokens
    case = make_case(g, formats, heads[0], [tokens], settings.device)
    out = torch.empty(1, 1, heads[0], g.head_dim, dtype=torch.float16, device=settings.device)
    case.attend(out, case.prepare(), splits=splits)
    if writes:
        for call in write_calls(case, heads[0]):
            call(0)


def warm_flex(settings: Settings, shape: Shape) -> None:
    """Compiles FlexAttention for a shape; if it does not compile, the row will say why."""
    try:
        query, keys, values = plain_tensors(settings, shape)
        flex_call(query, keys[:1], values[:1])(0)
    except Exception:
        return


def variants(settings: Settings, names: list[str], shapes: list[Shape]) -> list[tuple]:
    """Arguments of `warm_attention` for every kernel that the table needs, without repeats."""
    wanted: dict[tuple, bool] = {}
    for shape in shapes:
        for name in [*names, *(["16"] if is_large(shape) else [])]:
            formats = pair(name, settings.head_dim)
            key = (formats, (shape.num_heads, shape.num_kv_heads), settings.splits(shape))
            wanted[key] = wanted.get(key, False) or (shape.batch >= WRITE_BATCH and name != "16")
    return [(settings, *key, writes) for key, writes in wanted.items()]


def _run(task: tuple[Callable, tuple]) -> Any:
    function, arguments = task
    return function(*arguments)


def prepare(
    settings: Settings, names: list[str], shapes: list[Shape]
) -> list[tuple[str, float, float]]:
    """Runs the gate and, in `jobs` processes, compiles everything at the same time; returns the
    gate's checks."""
    s = settings
    cases = gate_cases(names, s.head_dim)
    regions = (s.sinks, s.window, s.page_tokens, s.gate_tokens, s.device)
    tasks: list[tuple[Callable, tuple]] = [
        (run_gate, (case, *regions, s.seed + i)) for i, case in enumerate(cases)
    ]
    gates = len(tasks)
    if s.jobs:
        if s.flex:
            tasks += [(warm_flex, (s, shape)) for shape in shapes if is_large(shape)]
        tasks += [(warm_attention, arguments) for arguments in variants(s, names, shapes)]
        with ProcessPoolExecutor(s.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(_run, tasks))
    else:
        results = [_run(task) for task in tasks]
    return [check for checks in results[:gates] for check in checks]


# -- timing ----------------------------------------------------------------------------------------


def is_large(shape: Shape) -> bool:
    """Whether a shape is large enough for the baselines that are slow to set up."""
    return shape.batch * shape.tokens >= LARGE


def plain_tensors(settings: Settings, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """float16 query, keys and values as `sdpa_ms` takes them."""
    group = shape.num_heads // shape.num_kv_heads
    query = torch.randn(
        shape.batch, shape.num_kv_heads, group, settings.head_dim, device=settings.device
    ).half()
    keys, values = random_kv(
        shape.batch,
        shape.num_kv_heads,
        shape.tokens,
        settings.head_dim,
        torch.float16,
        settings.device,
    )
    return query, keys, values


def measure_baseline(settings: Settings, shape: Shape) -> Baseline:
    """Times 16-bit attention of one shape."""
    query, keys, values = plain_tensors(settings, shape)
    sdpa = sdpa_ms(query, keys, values)
    flex = flex_ms(query, keys, values) if settings.flex and is_large(shape) else None
    del query, keys, values
    return Baseline(sdpa, flex, attention_ms(settings, "16", shape)[0] if is_large(shape) else None)


def attention_ms(settings: Settings, name: str, shape: Shape) -> tuple[float, Case]:
    """Milliseconds of attention (both kernels), and the caches that it ran on."""
    g = settings.geometry(shape.num_kv_heads)
    formats = pair(name, settings.head_dim)
    nbytes = shape.batch * g.num_pages(shape.tokens) * sum(map(g.page_nbytes, formats))
    copies = copies_for(nbytes, settings.device)
    case = make_case(
        g,
        formats,
        shape.num_heads,
        [shape.tokens] * shape.batch,
        settings.device,
        copies=copies,
        distinct=DISTINCT,
    )
    queries = case.prepare()
    out = torch.empty(
        shape.batch, 1, shape.num_heads, g.head_dim, dtype=torch.float16, device=settings.device
    )
    splits = settings.splits(shape)
    return median_ms(lambda i: case.attend(out, queries, i, splits), settings.device, copies), case


def write_calls(case: Case, num_heads: int) -> list[Callable[[int], None]]:
    """Calls that append a token to every sequence, without and with a page that comes due, and that
    lower a page of each.

    Keys of one scale a token go through a matrix and an offset first, as artifacts store them.
    """
    g, batch, device = case.geometry, len(case.lengths), case.slab.device
    keys, values = (
        torch.randn(batch, g.num_kv_heads, 1, g.head_dim, device=device).bfloat16()
        for _ in range(2)
    )
    query = case.query.bfloat16()
    queries = empty_queries(batch, num_heads, g.num_kv_heads, g.head_dim, device)
    options = append_options(g)
    if case.formats[0].kind.symmetric:
        square = torch.randn(g.num_kv_heads, g.head_dim, g.head_dim, device=device)
        matrix = torch.linalg.qr(square).Q.contiguous()
        offset = torch.randn(g.num_kv_heads, g.head_dim, device=device)
        options |= {"transform": KeyTransform(matrix, offset, matrix.mT.contiguous())}
    pages = case.states[:, 1]
    packed = g.sinks + g.window + pages * g.page_tokens

    def append(length: Tensor) -> Callable[[int], None]:
        state = torch.stack((length, pages), 1).int().contiguous()
        return lambda i: run_append(case, keys, values, query, state, queries, options)

    source, target, lower = lowering(g, case.formats, batch, device)

    def lowered(i: int) -> None:
        assert len(source) == len(target)  # kept alive here: `lower` has bare addresses
        lower()

    # the number of pages stays, or rises, with (length + 1 − sinks − window) / page_tokens
    return [append(packed), append(packed + g.page_tokens - 1), lowered]


def measure_writes(settings: Settings, case: Case, shape: Shape) -> tuple[float, float]:
    """Milliseconds a step of appending and packing, and of lowering one page of each sequence a
    page's worth of steps."""
    idle, due, lower = (
        median_ms(call, settings.device) for call in write_calls(case, shape.num_heads)
    )
    steps = case.geometry.page_tokens
    return ((steps - 1) * idle + due) / steps, lower / steps


def measure(
    settings: Settings, name: str, shape: Shape, baseline: Baseline, stream: float
) -> dict[str, Any]:
    """One row of the table.

    Args:
        stream: bytes a second of the best stream.
    Returns:
        format, shape, ms, packed_bytes, bytes_per_s, share_of_best_stream, ratios `sdpa`, `own16`
        and `flex` (None or a reason where there is none), `append` and `lower` as shares of ms
        (None below a batch of WRITE_BATCH), and all milliseconds.
    """
    ms, case = attention_ms(settings, name, shape)
    rate = case.packed_nbytes / ms * 1e3
    append = lower = None
    if shape.batch >= WRITE_BATCH:
        append, lower = measure_writes(settings, case, shape)
    flex = baseline.flex
    return {
        "format": name,
        "shape": str(shape),
        "ms": ms,
        "packed_bytes": case.packed_nbytes,
        "bytes_per_s": rate,
        "share_of_best_stream": rate / stream,
        "ratio_sdpa": baseline.sdpa / ms,
        "ratio_own16": None if baseline.own is None else baseline.own / ms,
        "ratio_flex": flex / ms if isinstance(flex, float) else flex,
        "append_share": None if append is None else append / ms,
        "lower_share": None if lower is None else lower / ms,
        "sdpa_ms": baseline.sdpa,
        "own16_ms": baseline.own,
        "flex_ms": flex,
        "append_ms": append,
        "lower_ms": lower,
    }


def line(row: dict[str, Any], where: dict[str, str]) -> str:
    """One row as text, the machine and the versions at its end."""
    parts = [
        f"{row['format']:<7} {row['shape']:<17} {row['ms'] * 1e3:8.1f} µs {row['bytes_per_s'] / 1e12:6.3f} TB/s",
        f"{row['share_of_best_stream']:5.3f} of the best stream {row['ratio_sdpa']:6.2f}× SDPA-flash fp16",
    ]
    if row["ratio_own16"] is not None:
        parts.append(f"{row['ratio_own16']:.2f}× own 16-bit")
    if row["ratio_flex"] is not None:
        flex = row["ratio_flex"]
        parts.append(
            f"{flex:.2f}× FlexAttention" if isinstance(flex, float) else f"FlexAttention {flex}"
        )
    if row["append_share"] is not None:
        parts.append(
            f"append {row['append_share']:.2%} lower {row['lower_share']:.2%} of it a step"
        )
    return "  ".join(
        [*parts, f"| {where['device']}, torch {where['torch']}, triton {where['triton']}"]
    )


def rows(
    settings: Settings, names: list[str], shapes: list[Shape], stream: float
) -> Iterable[dict[str, Any]]:
    """Rows of the table, a shape at a time."""
    for shape in shapes:
        baseline = measure_baseline(settings, shape)
        for name in names:
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()
            row = measure(settings, name, shape, baseline, stream)
            assert math.isfinite(row["ms"])
            yield row
