"""The correctness gate of `kvfold bench kernel`: kernels against float32 on the same codes. If it
fails, no speed counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.bench.cases import (
    PAIRS,
    Case,
    Pair,
    classes,
    finer,
    held_rows,
    make_case,
    random_pages,
    regions_of,
)
from kvfold.exports.account import Geometry
from kvfold.kernels.formats import raw16, uniform
from kvfold.kernels.gpu.append import append_step
from kvfold.kernels.gpu.attention import attention
from kvfold.kernels.gpu.encode import lower_jobs, lower_pages
from kvfold.kernels.gpu.queries import Queries, empty_queries
from kvfold.kernels.gpu.records import FormatChange, PagedCache, PageFormat
from kvfold.kernels.pages import page_address
from kvfold.kernels.quantizer import decode, encode

LARGEST_ERROR = {
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}  # ‖out − reference‖ / ‖reference‖ of any sequence and head
LOWER_LIMIT = 0.01  # share by which the error of lowered pages may differ from the reference's
# of a page's bytes that may differ from the reference's: a last bit of float32 decides some codes
LARGEST_SHARE = 1e-3


@dataclass(frozen=True)
class GateCase:
    """One combination to check: formats, and heads as (query heads, KV heads)."""

    name: str
    formats: Pair
    heads: tuple[int, int] = (8, 2)
    writes: bool = False  # check appending and lowering too
    rungs: bool = False  # check pages of four formats in one call too


def gate_cases(names: list[str], head_dim: int) -> list[GateCase]:
    """The measured formats, and at other head sizes what else the kernels read. The slowest to
    compile come first."""
    mixed = ((2, 16), (1, 8), (2, 4), (2, 2), (1, 0))
    return [
        GateCase("classes, head_dim 256", (classes(256, *mixed), uniform(256, 4)), (4, 1)),
        *(GateCase(name, PAIRS[name](head_dim), writes=name != "16") for name in names),
        GateCase("four rungs", PAIRS["best"](head_dim), rungs=True),
        *(GateCase(f"{name}, one query head", PAIRS[name](head_dim), (2, 2)) for name in names[:1]),
        GateCase("groups of 64", (uniform(128, 4, "e4m3", 64), uniform(128, 4, "e4m3", 64))),
        GateCase(
            "classes, ternary values, head_dim 64", (classes(64, *mixed), uniform(64, 3)), (6, 2)
        ),
        GateCase(
            "3 and 5 bits, head_dim 96", (uniform(96, 8, "fp16"), uniform(96, 32, "fp16")), (7, 1)
        ),
        GateCase("8 and 6 bits, head_dim 80", (uniform(80, 256, "fp16"), uniform(80, 64, "fp16"))),
        GateCase("16-bit keys, head_dim 64", (raw16(64), uniform(64, 256, "fp16"))),
    ]


def lengths_of(geometry: Geometry, tokens: int) -> list[int]:
    """A ragged batch: `tokens`, an odd half of it, one page, and less than the sinks or the window
    hold."""
    g = geometry
    return [tokens, tokens // 2 | 1, g.sinks + g.window + g.page_tokens + 1, 3]


def poison(device: torch.device) -> None:
    """Leaves NaN in the memory that the next allocations get."""
    if device.type == "cuda":
        sizes = [1 << 26] + [1 << 17] * 64 + [1 << 12] * 256
        blocks = [torch.full((n,), torch.nan, device=device) for n in sizes]
        torch.cuda.synchronize(device)
        del blocks


def run_gate(
    case: GateCase,
    sinks: int,
    window: int,
    page_tokens: int,
    tokens: int,
    device: torch.device,
    seed: int,
) -> list[tuple[str, float, float]]:
    """Checks one case with fresh random inputs: (what, error, largest error allowed) of each check;
    NaN errors fail too."""
    torch.manual_seed(seed)
    heads, kv_heads = case.heads
    geometry = Geometry(kv_heads, case.formats[0].head_dim, sinks, window, page_tokens)
    found = []
    if case.rungs:
        error = rungs_error(geometry, heads, lengths_of(geometry, tokens), device)
        return [(f"{case.name}, float16", error, LARGEST_ERROR[torch.float16])]
    for dtype, bar in LARGEST_ERROR.items():
        data = make_case(geometry, case.formats, heads, lengths_of(geometry, tokens), device, dtype)
        queries = data.prepare()
        out = torch.full(
            (len(data.lengths), 1, heads, geometry.head_dim), torch.nan, dtype=dtype, device=device
        )
        poison(device)
        data.attend(out, queries)
        name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
        found.append((name, worst_error(data, out), bar))
    if case.writes:
        found.append(
            (f"{case.name}, append", append_difference(geometry, case, device), LARGEST_SHARE)
        )
        found.append(
            (f"{case.name}, lower", lower_difference(geometry, case.formats, device), LOWER_LIMIT)
        )
    return found


def rungs_error(
    geometry: Geometry, num_heads: int, lengths: list[int], device: torch.device
) -> float:
    """Largest relative error of any sequence and head where pages are of four formats, as the
    progressive policy leaves them.

    Sequence b has its pages cut at other places than the others, one rung of sequence 0 being
    empty; all rungs share sinks and window.
    """
    g, dim = geometry, geometry.head_dim
    ladder = [
        PAIRS["best"](dim),
        PAIRS["k4v4"](dim),
        (uniform(dim, 256, "fp16"),) * 2,
        (raw16(dim),) * 2,
    ]
    cases = [make_case(g, formats, num_heads, lengths, device) for formats in ladder]
    base, table = cases[-1], cases[-1].tables[0].clone()
    edges = []
    for b, length in enumerate(lengths):
        count = g.num_pages(length)
        cuts = [0, count // 3, count // 3 + (count // 5) * (b > 0), count - count // 4, count]
        for rung, case in enumerate(cases):
            table[b, cuts[rung] : cuts[rung + 1]] = case.tables[0, b, cuts[rung] : cuts[rung + 1]]
        edges.append(cuts)
    out = torch.full(
        (len(lengths), 1, num_heads, dim), torch.nan, dtype=torch.float16, device=device
    )
    poison(device)
    segments = torch.tensor(edges, dtype=torch.int32, device=device)
    cache = PagedCache(table, base.states, base.raw_keys[0], base.raw_values[0], segments)
    attention(base.prepare(), cache, ladder, out, regions_of(g))
    errors = []
    for b, cuts in enumerate(edges):
        sides: list[list[Tensor]] = [[], []]
        for rung, case in enumerate(cases):
            found = case.pages[case.content[0, b, cuts[rung] : cuts[rung + 1]]]
            at = g.page_nbytes(ladder[rung][0])
            for side, part, fmt in zip(
                sides, (found[:, :at], found[:, at:]), ladder[rung], strict=True
            ):
                rows = decode(part.unflatten(1, (g.num_kv_heads, -1)), fmt, g.page_tokens)
                side.append(rows.transpose(0, 1).flatten(1, 2))
        for side, raw in zip(sides, (base.raw_keys, base.raw_values), strict=True):
            side.append(raw[0, b][:, base.held(b)].float())
        keys, values = (torch.cat(side, 1) for side in sides)
        query = base.query[b, :, 0].float().unflatten(0, (g.num_kv_heads, -1))
        expected = ((query @ keys.mT * dim**-0.5).softmax(-1) @ values).flatten(0, 1)
        errors.append((out[b, 0].float() - expected).norm(dim=-1) / expected.norm(dim=-1))
    return float(torch.stack(errors).max())


def worst_error(case: Case, out: Tensor) -> float:
    """Largest relative error of any sequence and head; NaN if any is NaN."""
    errors = []
    for b in range(len(case.lengths)):
        expected = case.expected(b)
        errors.append((out[b, 0].float() - expected).norm(dim=-1) / expected.norm(dim=-1))
    return float(torch.stack(errors).max())  # max keeps NaN


def append_difference(geometry: Geometry, case: GateCase, device: torch.device) -> float:
    """Share of bytes that differ from the reference's where one step appends a token and packs the
    page that came due."""
    g = geometry
    heads, kv_heads = case.heads
    lengths = [g.sinks + g.window + (pages + 1) * g.page_tokens - 1 for pages in (2, 0)]
    data = make_case(g, case.formats, heads, lengths, device)
    keys, values = (torch.randn(2, kv_heads, 1, g.head_dim, device=device).half() for _ in range(2))
    queries = empty_queries(2, heads, kv_heads, g.head_dim, device)
    run_append(data, keys, values, data.query, data.states, queries, append_options(g))
    wrong = total = 0
    for b, length in enumerate(lengths):
        rows = held_rows(g, length + 1)[-1]
        for raw, new in ((data.raw_keys, keys), (data.raw_values, values)):
            wrong += int((raw[0, b, :, rows] != new[b, :, 0]).sum())
        first = g.sinks + g.num_pages(length) * g.page_tokens
        slots = [g.sinks + (t - g.sinks) % g.ring for t in range(first, first + g.page_tokens)]
        sides = zip((data.raw_keys, data.raw_values), case.formats, strict=True)
        expected = torch.cat(
            [encode(raw[0, b][:, slots].cpu(), fmt).flatten() for raw, fmt in sides]
        )
        page = data.slab[len(data.slab) - len(lengths) + b]
        wrong += int((page.cpu() != expected).sum())
        total += page.numel()
    return wrong / total


def run_append(
    case: Case,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    state: Tensor,
    queries: Queries,
    options: dict[str, Any],
) -> None:
    """`append_step` on copy 0 of a case, whose lengths and pages are `state`'s."""
    cache = case.cache()._replace(state=state)
    append_step(
        keys,
        values,
        query,
        cache,
        queries,
        [PageFormat(*case.formats)],
        regions_of(case.geometry),
        **options,
    )


def append_options(geometry: Geometry) -> dict[str, Any]:
    """What `append_step` takes by name, without transforms."""
    return {"scaling": geometry.head_dim**-0.5}


def lowering(
    geometry: Geometry, formats: Pair, pages: int, device: torch.device
) -> tuple[Tensor, Tensor, Callable[[], None]]:
    """Pages of a finer format, room for the same pages in `formats`, and what lowers them, for as
    long as both live."""
    old = (finer(formats[0]), finer(formats[1]))
    source = random_pages(geometry, old, pages, device)
    target = torch.empty(
        pages, sum(map(geometry.page_nbytes, formats)), dtype=torch.uint8, device=device
    )
    sources, targets = ([page_address(x) for x in pool] for pool in (source, target))
    shape = {"num_kv_heads": geometry.num_kv_heads, "page_tokens": geometry.page_tokens}
    work = FormatChange(sources, targets, PageFormat(*old), PageFormat(*formats))
    (jobs,) = lower_jobs([work], **shape, device=device)
    return source, target, lambda: lower_pages(jobs, **shape)


def lower_difference(geometry: Geometry, formats: Pair, device: torch.device) -> float:
    """By what share the error of lowered pages differs from that of the reference's.

    Not bytes: what a finer grid holds lies often half-way between two levels of the coarser one,
    and such a tie may go either way with the last bit of a division.
    """
    g = geometry
    source, target, lower = lowering(g, formats, 3, device)
    lower()
    old = finer(formats[0]), finer(formats[1])
    splits = g.page_nbytes(old[0]), g.page_nbytes(formats[0])
    worst = 0.0
    for i, (coarse, fine) in enumerate(zip(formats, old, strict=True)):
        part, got = (
            (x[:, :n], x[:, n:])[i].cpu().unflatten(1, (g.num_kv_heads, -1))
            for x, n in zip((source, target), splits, strict=True)
        )
        rows = decode(part, fine, g.page_tokens)
        errors = [
            float((decode(x, coarse, g.page_tokens) - rows).square().mean())
            for x in (got, encode(rows, coarse))
        ]  # fmt: skip
        share = abs(errors[0] - errors[1]) / max(errors[1], 1e-12)
        worst = worst if share <= worst else share  # keeps NaN
    return worst
