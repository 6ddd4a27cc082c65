"""The kernels that write pages take formats as data: the device chooses among them, and none is
compiled for."""

import prepared
import pytest
import torch

from kvfold.kernels.compile.launch import noting
from kvfold.kernels.formats import raw16, uniform

pytest.importorskip("triton")
from lowered import lower
from test_triton_encode import DEVICE, MIXED, POISON, Pages, assert_page, reference, rows_of

from kvfold.kernels.gpu.append import append_step
from kvfold.kernels.gpu.encode import encode_pages
from kvfold.kernels.gpu.prompt import decode_pages
from kvfold.kernels.gpu.queries import empty_queries
from kvfold.kernels.gpu.records import PagedCache, PageFormat, Regions


@pytest.mark.parametrize("given", [True, False])
def test_the_device_chooses_the_rung_of_a_page(given):
    """The page that comes due has the formats that `rungs` names when the step runs, clips
    included; without it the last ones."""
    heads, dim, size, sinks = 2, 64, 16, 1
    pairs = [
        (MIXED, uniform(dim, 3)), (uniform(dim, 4, "e4m3", 32), uniform(dim, 16, "fp16")), (raw16(dim), raw16(dim)),
        (uniform(dim, 8), uniform(dim, 4, "fp16", 16)),
    ]  # fmt: skip
    clips = [
        (None, torch.tensor([0.9, 0.8])), (torch.rand(heads, 2) * 0.2 + 0.8, None), (torch.ones(3), None),
        (torch.tensor([[0.7], [0.95]]), torch.rand(heads, 4) * 0.2 + 0.8),
    ]  # fmt: skip
    factors = zip(*clips, strict=True)
    batch = len(pairs)
    raw = [rows_of(batch, heads, sinks + size, dim, seed) for seed in (0, 1)]
    largest = max(heads * sum(f.nbytes(size) for f in pair) for pair in pairs)
    pages = Pages(batch, largest)
    state = torch.tensor([[sinks + size - 1, 0]] * batch, dtype=torch.int32, device=DEVICE)
    new = [torch.randn(batch, heads, 1, dim).to(DEVICE) for _ in "kvq"]
    rungs = torch.tensor([3, 1, 0, 2], dtype=torch.int32, device=DEVICE)
    moved = [[None if clip is None else clip.to(DEVICE) for clip in side] for side in factors]
    moved[0][2] = None
    append_step(
        *new,
        PagedCache(pages.addresses().view(batch, 1), state, *raw),
        empty_queries(batch, heads, heads, dim, DEVICE),
        [
            PageFormat(*pair, *own)
            for pair, own in zip(pairs, zip(*moved, strict=True), strict=True)
        ],
        Regions(sinks, 0, size),
        scaling=1.0,
        rungs=rungs if given else None,
    )
    for b, (page, rung) in enumerate(zip(pages.pages, rungs.tolist(), strict=True)):
        own = rung if given else batch - 1
        expected = reference(raw[0][b, :, sinks:], raw[1][b, :, sinks:], pairs[own], clips[own])
        assert_page(page[: len(expected)], expected, pairs[own], heads, size)
        assert (page[len(expected) :] == POISON).all()
    assert pages.untouched()


def test_one_kernel_serves_all_formats(monkeypatch):
    """What is started differs in tensors and numbers that no kernel is compiled for."""
    heads, size = 2, 32
    started = []
    for dim, key, value in [
        (64, MIXED, uniform(64, 3)),
        (64, uniform(64, 4, "fp16", 16), raw16(64)),
        (128, uniform(128, 3), uniform(128, 256)),
    ]:
        x = torch.zeros(1, heads, size, dim, dtype=torch.float16, device=DEVICE)
        one = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        clip = torch.ones(heads, device=DEVICE)
        places = one.long()
        with noting() as launches:
            fmt = PageFormat(key, value)
            clipped = fmt._replace(value_clip=clip if dim == 64 else None)
            encode_pages(x, x, clipped, places, one, one, page_tokens=size)
            lower(places, places, fmt, fmt, num_kv_heads=heads, page_tokens=size)
            decode_pages(places, key, value, x[0], x[0], size)
            append_step(
                x[:, :, :1], x[:, :, :1], x[:, :, :1], PagedCache(places[None], one.expand(2)[None].contiguous(), x, x),
                empty_queries(1, heads, heads, dim, DEVICE), [fmt] * 2, Regions(0, 0, size), scaling=1.0, rungs=one,
            )  # fmt: skip
        started.append(launches)
    for first, *others in zip(*started, strict=True):
        for other in others:
            assert other.kernel is first.kernel
            constants = [
                {k: v for k, v in x.options.items() if k not in ("DIM", "TABLE")}
                for x in (first, other)
            ]
            assert constants[0] == constants[1]
            for name, a, b in zip(first.kernel.arg_names, first.args, other.args, strict=False):
                assert type(a) is type(b) and (
                    not isinstance(a, torch.Tensor) or a.dtype == b.dtype
                ), name


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvfold.kernels.gpu.tables import table_length
from kvfold.kernels.gpu.append import _append_kernel
from kvfold.kernels.gpu.encode import _encode_kernel, _lower_kernel
from kvfold.kernels.gpu.dense import _dense_kernel, _query_kernel
from kvfold.kernels.gpu.prompt import _decode_kernel
from kvfold.kernels.gpu.rows import _gather_kernel, _store_kernel

FLOATS = {
    "k_clip", "v_clip", "q_scale", "q_shift", "matrix", "offset", "query_matrix", "coefficients", "bias", \
"spans", "steps", "fast", "slow", "scale", "scale_ptr", "shift_ptr", "part_out", "part_sums",
}
HALVES = {
    "keys", "values", "raw_keys", "raw_values", "q_out", "within", "q_ptr", "page_k", "page_v", "raw_k", "raw_v", \
"read_keys", "value_out",
}
INTS = {"sequences", "tokens", "state", "tables", "formats", "rungs", "pairs", "channels"}

def compile(kernel, warps=4, rows="*fp32", **constants):
    signature = {}
    attention = kernel is _dense_kernel
    for name in kernel.arg_names:
        longs = name in ("pages", "jobs", "table", "marks", "positions", "places")
        signature[name] = (
            "constexpr" if name in constants else "i32" if attention and name in ("tokens", "query")
            else "i32" if kernel in (_store_kernel, _gather_kernel) and name == "tokens"
            else "*fp32" if name in FLOATS else "*i32" if name in INTS
            else "*i64" if longs else "*u8" if name == "anchor_ptr" else "fp32" if name in ("factor", "scaling")
            else "*bf16" if name in ("new_values", "out", "sinks_logit") and kernel is not _store_kernel
            else rows if kernel is _store_kernel and name in ("keys", "values") and rows == "*bf16"
            else "*fp16" if name in HALVES or name == "out"  # under autocast RoPE's sides stay float32
            else rows if name in ("new_keys", "query") else "i32"
        )
    for parameter in kernel.params:  # or a number of 1, or one that 16 divides, would compile a kernel of its own
        free = parameter.is_constexpr or signature[parameter.name] != "i32" or parameter.do_not_specialize
        assert free or parameter.name.startswith("query_stride"), parameter.name  # which a model has once
    if "OWN" in signature:
        signature["OWN"], constants["OWN"] = "constexpr", ()
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": kernel in (_dense_kernel, _query_kernel)}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert code.asm["cubin"]

compile(_encode_kernel, ROWS=1)
compile(_encode_kernel, ROWS=4)
compile(_lower_kernel, ROWS=2)
compile(_decode_kernel, ROWS=16, MEAN=0, DIM=80)
compile(_decode_kernel, ROWS=4, MEAN=32, DIM=128)
for rows in ("*fp32", "*bf16"):
    compile(_query_kernel, rows=rows, DIM=96, GROUP=3, ROWS=32, TOP=7, MATRIX=True, INTERPRET=False)
    compile(_store_kernel, rows=rows, DIM=80, TOKENS=32, MATRIX=True, OFFSET=False, MEAN=32, INTERPRET=False)
compile(_gather_kernel, DIM=512, TOKENS=32, MEAN=128, COPY=True)
for dim in (128, 80):
    compile(_dense_kernel, 8, DIM=dim, GROUP=3, PAGE=32, M=128, N=64, STAGES=3, CAP=30.0 if dim == 80 else 0.0, \
SHIFT=dim == 80, SINKS=dim == 80)
for matrix, mean in ((False, 0), (True, 0), (True, 32)):
    compile(_append_kernel, DIM=96, ROWS=2, TABLE=table_length(96), MATRIX=matrix, OFFSET=matrix, \
SHIFT=matrix and not mean,
            MARKS=matrix, GROUP=3, N=8, TOP=7, MEAN=mean, BIAS=64)
print("compiled")
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter lets through what the compiler does not: variables that change type, shapes
    that are no constants."""
    done = prepared.python("compiler", COMPILE, env={"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "compiled"
