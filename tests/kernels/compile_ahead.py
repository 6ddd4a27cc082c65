"""What test_compile.py runs in processes of their own, with the compiler: small kernels, for a
device that is not there."""

import errno
import json  # noqa: F401 - for the code that imports all of this
import os
import sys
import time

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from kvfold.kernels.compile import build as ahead
from kvfold.kernels.compile import kernel_cache
from kvfold.kernels.compile.launch import launch, noting

TARGET = ahead.target_of("sm_90")
ONE: tl.constexpr = tl.constexpr(1)


@triton.jit
def inner(x):
    return x + ONE


@triton.jit
def middle(x):
    return inner(x) * 2


@triton.jit(do_not_specialize=["free"])
def first(x_ptr, out_ptr, stride, free, SIZE: tl.constexpr, PARTS: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i * stride)
    for part in tl.static_range(len(PARTS)):
        x = middle(x) + PARTS[part] + free
    tl.store(out_ptr + i, x)


@triton.jit
def second(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, SIZE), middle(tl.arange(0, SIZE)).to(tl.float32))


@triton.jit
def broken(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, SIZE), not_there(SIZE))  # noqa: F821


@triton.jit
def crashing(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, SIZE), 1.0)


@triton.jit
def endless(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, SIZE), 2.0)


def launches(reverse: bool = False) -> list:
    """Every way in which arguments decide of a kernel: an alignment, a stride of 1, of 16 and of
    neither, constants of any kind."""
    x = torch.empty(256, dtype=torch.float16)
    out = torch.empty(256)
    with noting() as noted:
        for stride in (1, 3, 16):
            for free in (1, 16):  # no kernel of its own
                launch(
                    first, (1,), x, out, stride, free, SIZE=16, PARTS=((1, 2), (3,))[stride == 1]
                )
        launch(first, (1,), x[1:], out, 16, 1, SIZE=16, PARTS=(1, 2), num_warps=2)
        launch(second, (1,), out, SIZE=32)
    return noted[::-1] if reverse else noted


def build(
    reverse: bool = False, twice: bool = False, broken: bool = False, endless: bool = False
) -> dict:
    """Compiles them; with `broken` also one that does not compile and one whose compiler crashes,
    with `endless` one that never ends."""
    noted = launches(reverse=reverse)
    out = torch.empty(256)
    with noting() as more:
        if broken:
            launch(globals()["broken"], (1,), out, SIZE=16)
            launch(crashing, (1,), out, SIZE=16)
        if endless:
            launch(globals()["endless"], (1,), out, SIZE=16)
    jobs = ahead.jobs_of(noted + more, TARGET)
    with ahead.Builder(2) as builder:
        builder.start()
        if endless:
            print(builder.server.pid, flush=True)
        builder.build(jobs)
        builder.wait()
    compiled = builder.compiled
    if twice:
        with ahead.Builder(2) as again:
            again.build(jobs)
            again.wait()
    spare = os.environ.get(kernel_cache.SPARE)
    return {
        "count": builder.count, "compiled": compiled, "hashes": sorted(job.hash for job in jobs),
        "failed": {job.label: message for job, message in builder.failed},
        "built": [ahead.is_built(job) for job in jobs], "spare": [spare] if spare else [],
    }  # fmt: skip


class Device:
    """A driver up to where a kernel would be loaded; its tensors lie as an allocator of a device
    lays them, in units of 512 bytes."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Tensor:
    """What a launch looks at of a tensor on a device."""

    def __init__(self, like: torch.Tensor):
        self.dtype, self.offset = like.dtype, like.storage_offset() * like.element_size()

    def data_ptr(self):
        return (7 << 32) + 512 * 3 + self.offset


def launch_as_on_a_device() -> dict:
    """The kernels that launches with tensors of a device look up, through JITFunction.run, and
    whether each is found on disk."""
    found: dict[str, bool] = {}
    kernel_cache.install()
    knobs.compilation.listener = lambda *, metadata, cache_hit, **more: found.setdefault(
        metadata["hash"], cache_hit
    )
    driver.set_active(Device())
    for noted in launches():
        args = [Tensor(x) if isinstance(x, torch.Tensor) else x for x in noted.args]
        noted.kernel.run(*args, grid=(1,), warmup=True, **noted.options)
    return {"hashes": list(found), "hits": list(found.values())}


def fill_up() -> None:
    """From now on the cache folder has no space left, in this process and in the compilers'."""
    os.environ["COMPILE_AHEAD_FULL"] = "1"
    _fill_up()


def _fill_up() -> None:
    real, main = os.replace, kernel_cache.folder()

    def replace(source, target):
        if str(target).startswith(main):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    os.replace = replace


if "kvfold.kernels.compile.build_server" in sys.modules:  # imported where kernels are compiled
    if os.environ.get("COMPILE_AHEAD_FULL"):
        _fill_up()
    from kvfold.kernels.compile import build_server

    compile_job = build_server.compile_job

    def compile_or_not(job):
        if job[1] == "crashing":
            os.abort()
        if job[1] == "endless":
            time.sleep(600)
        compile_job(job)

    build_server.compile_job = compile_or_not
