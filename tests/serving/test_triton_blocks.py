"""A step of an engine by the Triton kernels, under the interpreter where there is no GPU, against the
same step in plain torch, page by page and token by token."""

import random

import pytest
import torch
from test_blocks import (
    CASES,
    DIM,
    HEADS,
    PAGE,
    SCALE,
    SINKS,
    SPECS,
    Pool,
    drawn,
    part,
)

pytest.importorskip("triton")
import quick_operations

from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.compile.launch import noting
from kvfold.kernels.formats import Format, uniform
from kvfold.runtime.backends import triton as runtime_triton
from kvfold.runtime.vllm.batch import Chunk, DeviceBatch, divide
from kvfold.runtime.vllm.served_kernels import Served, launches_of
from kvfold.runtime.vllm.torch_attention import BlockPages, Blocks
from kvfold.runtime.vllm.triton_attention import attend_step, scratch_nbytes

MOST = 320  # tokens of a request
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not quick_operations.KNOWN:
    # make test runs these, by the version that constraints.txt names
    pytest.skip("this Triton's interpreter takes no numbers for masks", allow_module_level=True)


class KernelPool(Pool):
    """Steps by kernels. Requests with one new token come first, as in an engine's step, and behind
    them `padding` rows that are nobody's."""

    padding = 2

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        for memory in self.blocks:
            memory[0] = 0  # of an engine's pool nobody has block 0, and it is never written
        self.blocks = Blocks(*(memory.to(DEVICE) for memory in self.blocks))
        self.layer.to(torch.device(DEVICE))

    def attend(self, batch, query, keys, values, out) -> None:
        singles, behind = divide(batch.starts)
        chunks = [Chunk(i, *batch.starts[i : i + 2], batch.lengths[i]) for i in behind]
        tables = [batch.packed_table, batch.raw_table]
        lengths, slots = torch.tensor(batch.lengths, dtype=torch.int32), batch.raw_slots
        if not chunks:  # padded, as a captured step is
            tables = [torch.nn.functional.pad(x, (0, 0, 0, self.padding)) for x in tables]
            lengths = torch.nn.functional.pad(lengths, (0, self.padding))
            slots = torch.nn.functional.pad(slots, (0, self.padding), value=-1)
            query, keys, values = (
                torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.padding))
                for x in (query, keys, values)
            )
            singles += self.padding
        room = torch.full_like(query, torch.nan).to(DEVICE)
        given = DeviceBatch(
            singles,
            chunks,
            MOST,
            lengths.to(DEVICE),
            *(x.to(DEVICE) for x in tables),
            slots.to(DEVICE),
        )
        states = (x.to(DEVICE) for x in (query, keys, values))
        attend_step(self.layer, self.blocks, given, *states, SCALE, self.options, room)
        out.copy_(room[: len(out)])
        self.check(room[len(out) :])

    def check(self, rest) -> None:
        """Of nobody's rows and block."""
        assert not rest.any()
        assert not any(memory[0].any() for memory in self.blocks)


def same_pages(a: Pool, b: Pool, names) -> None:
    """Both pools have the same bytes in the pages of these requests."""
    for name in names:
        size = BlockPages(a.layer, a.blocks.packed).sizes[0]
        count = max(a.lengths[name] - a.layer.layout.sinks - a.layer.layout.window, 0) // PAGE
        for page in range(count):
            entry, place = a.layer.layout.place(page)
            start = place * a.layer.page_stride
            found = [
                pool.blocks.packed[pool.tables[name][0][entry], start : start + size].cpu()
                for pool in (a, b)
            ]
            assert torch.equal(*found), (name, page)


SPECS = SPECS | {
    "planes": LayerSpec(
        KeySpec(Format(((8, 8), (8, 2))), (), SPECS["constant mean"].key.matrix),
        ValueSpec(uniform(DIM, 3)),
    ),
    "four bits": LayerSpec(KeySpec(uniform(DIM, 16)), ValueSpec(uniform(DIM, 16))),
}


@pytest.mark.parametrize(("name", "options"), [*CASES, ("planes", {}), ("four bits", {})])
def test_kernels_write_the_same_pages_and_read_them_alike(name, options, monkeypatch):
    """Prompts, chunks of any size and single tokens in one step, blocks in no order."""
    monkeypatch.setattr(runtime_triton, "LEAST_ROWS", 16)
    kernels, plain = KernelPool(SPECS[name], **options), Pool(SPECS[name], **options)
    rng = random.Random(3)
    lengths = {"a": 130, "b": 3, "c": 75}
    states = {n: drawn(length, i) for i, (n, length) in enumerate(lengths.items())}
    while left := [n for n in lengths if plain.lengths.get(n, 0) < lengths[n]]:
        step = {}
        for n in rng.sample(left, rng.randint(1, len(left))):
            first = plain.lengths.get(n, 0)
            step[n] = part(states[n], first, min(first + rng.choice((1, 1, 17, 60)), lengths[n]))
        step = dict(sorted(step.items(), key=lambda item: item[1][0].shape[1] > 1))
        found, expected = kernels.step(step), plain.step(step)
        for n in step:
            torch.testing.assert_close(found[n], expected[n], atol=4e-3, rtol=4e-3)
    same_pages(kernels, plain, lengths)


@pytest.mark.parametrize("name", ["turning mean", "planes"])
def test_single_tokens_pack_each_page_as_it_comes_due(name):
    """Requests of several lengths, each at another place of its page."""
    kernels, plain = KernelPool(SPECS[name]), Pool(SPECS[name])
    lengths = {"a": 90, "b": 47, "c": 33, "d": 1}
    states = {n: drawn(length + 12, i) for i, (n, length) in enumerate(lengths.items())}
    for pool in (kernels, plain):
        pool.step({n: part(states[n], 0, lengths[n]) for n in ("a", "b", "c")})
        pool.step({"d": part(states["d"], 0, 1)})
    for t in range(12):
        step = {n: part(states[n], lengths[n] + t, lengths[n] + t + 1) for n in lengths}
        found, expected = kernels.step(step), plain.step(step)
        for n in step:
            torch.testing.assert_close(found[n], expected[n], atol=4e-3, rtol=4e-3)
    same_pages(kernels, plain, lengths)


def test_prompts_may_end_within_the_sinks():
    """There is nothing behind the sinks to read or to pack then."""
    kernels, plain = KernelPool(SPECS["turning mean"]), Pool(SPECS["turning mean"])
    states = {"a": drawn(SINKS - 1, 0), "b": drawn(50, 1)}
    for step in (
        {n: part(states[n], 0, SINKS - 1) for n in states},
        {"b": part(states["b"], SINKS - 1, 50)},
    ):
        found, expected = kernels.step(step), plain.step(step)
        for n in step:
            torch.testing.assert_close(found[n], expected[n], atol=4e-3, rtol=4e-3)
    same_pages(kernels, plain, {"a": SINKS - 1, "b": 50})


def test_a_step_may_fill_blocks_that_another_request_of_it_reads():
    """A prompt with the blocks of one that is read in the same step, then tokens that are taken back
    as drafts are."""
    kernels, plain = KernelPool(SPECS["turning mean"]), Pool(SPECS["turning mean"])
    states = {"a": drawn(110, 0), "b": drawn(110, 0)}
    other = drawn(3, 7)
    for pool in (kernels, plain):
        pool.step({"a": part(states["a"], 0, 40)})
    for pool in (kernels, plain):
        pool.share("a", "b", 32)
    steps = [
        {"b": part(states["b"], 32, 75), "a": part(states["a"], 40, 75)},
        {"a": part(states["a"], 75, 76), "b": other},
        {"a": part(states["a"], 76, 77), "b": part(states["b"], 75, 110)},
    ]
    for step, advance in zip(steps, (True, False, True), strict=True):
        if not advance:  # of "b" alone: drafts that turn out wrong
            step = {"b": step["b"]}
        found, expected = (pool.step(step, advance) for pool in (kernels, plain))
        for n in step:
            torch.testing.assert_close(found[n], expected[n], atol=4e-3, rtol=4e-3)
        if not advance:
            found, expected = (
                pool.step({"a": part(states["a"], 75, 76)}) for pool in (kernels, plain)
            )
            torch.testing.assert_close(found["a"], expected["a"], atol=4e-3, rtol=4e-3)
    same_pages(kernels, plain, states)


def test_a_step_of_nobody_writes_nothing():
    """Block tables of zeros and slots of −1, as an engine's own trials bring them, with lengths of
    many pages."""
    pool = KernelPool(SPECS["turning mean"])
    pool.step({"a": part(drawn(90, 0), 0, 90)})
    before = [memory.clone() for memory in pool.blocks]
    tables = torch.zeros(2, 40, dtype=torch.int32, device=DEVICE)
    states = tuple(x.transpose(0, 1).to(DEVICE) for x in drawn(61, 3))
    batch = DeviceBatch(
        1, [Chunk(1, 1, 61, 90)], MOST, torch.tensor([90, 90], dtype=torch.int32, device=DEVICE),
        tables, tables, torch.full((61,), -1, device=DEVICE),
    )  # fmt: skip
    out = torch.zeros_like(states[0])
    attend_step(pool.layer, pool.blocks, batch, *states, SCALE, pool.options, out)
    for memory, old in zip(pool.blocks, before, strict=True):
        assert torch.equal(memory.cpu().view(torch.uint8), old.cpu().view(torch.uint8))


class NotedPool(KernelPool):
    """Steps of which nothing runs."""

    def check(self, rest) -> None:
        """Nothing was written."""


def _kernels(launches) -> set:
    """Kernels, as the compiler tells them apart."""
    return {
        (
            x.kernel.fn.__name__,
            str(sorted(x.options.items(), key=str)),
            *(str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in x.args),
        )
        for x in launches
    }


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_steps_launch_is_compiled_before(name, options):
    pool = NotedPool(SPECS[name], **options)
    states = {n: drawn(400, i) for i, n in enumerate("abcde")}
    served = Served(pool.layer, 2 * HEADS, pool.options, torch.float32, 8, MOST)
    known = _kernels(launches_of([served], 132))
    with noting(132) as found:
        pool.step({"a": part(states["a"], 0, 1)})
        pool.step({n: part(states[n], 0, 200 + i) for i, n in enumerate("bcde")})
        pool.step({"a": part(states["a"], 1, 2), "b": part(states["b"], 200, 203)})
        pool.step({"c": part(states["c"], 201, 320)})
        for t in range(3):
            pool.step({n: part(states[n], 203 + t, 204 + t) for n in "bde"})
    assert _kernels(found) <= known
    # layers of one sort have one set of kernels
    assert len(launches_of([served, served], 132)) == len(launches_of([served], 132))


@pytest.mark.parametrize(
    ("starts", "singles", "behind"),
    [
        ([0], 0, []),
        ([0, 1, 2, 3], 3, []),
        ([0, 1, 2, 2, 7], 2, [3]),
        ([0, 5, 6, 6], 0, [0, 1]),
        ([0, 1, 1, 1], 1, []),
    ],
)
def test_a_step_is_divided_where_single_tokens_end(starts, singles, behind):
    assert divide(starts) == (singles, behind)


def test_room_beside_the_pool_grows_with_sequences_and_their_length(monkeypatch):
    """A sequence's bias alone takes 4 bytes a query and step of the slow pairs."""
    monkeypatch.setattr("kvfold.runtime.vllm.triton_attention.multiprocessors", lambda device: 132)
    layer = Pool(SPECS["turning mean"]).layer
    few, many, longer = (
        scratch_nbytes(64, n, most, 2 * 2, layer) for n, most in ((1, 4096), (9, 4096), (9, 8192))
    )
    assert many - few >= 8 * 2 * 8 * 4 * 4096 // 32
    assert longer - many >= 9 * 2 * 8 * 4 * 4096 // 32
