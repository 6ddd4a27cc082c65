"""Timing on a device: medians of CUDA graph replays, the best stream of bytes, and the library
attentions to compare with.

On a CPU the same functions time with perf_counter, so that the commands can be tried out where no
GPU is; such figures say nothing about speed.
"""

import math
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

CALLS = 10  # of a graph, at least
REPLAYS = 9
# the data of one graph is at least this many times the L2 cache, so that no call finds the last
# one's there
COLD = 4
MOST_COPIES = 128


def machine(device: torch.device) -> dict[str, str]:
    """What a figure was measured on: the device's name, and the versions of torch and Triton."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, no measure of speed"
    )
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"device": name, "torch": version("torch"), "triton": triton}


def copies_for(nbytes: int, device: torch.device) -> int:
    """Copies of data of `nbytes` bytes that calls take turns with, so that each finds its own
    outside the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_COPIES, math.ceil(COLD * cache / max(nbytes, 1))))


def median_ms(call: Callable[[int], object], device: torch.device, copies: int = 1) -> float:
    """Milliseconds of one call, the median over replays of a CUDA graph of CALLS calls or more.

    Args:
        call: works on copy number i of its data; must not wait for the device.
        copies: of the data.
    """
    call(0)
    calls = math.ceil(max(CALLS, copies) / copies) * copies if device.type == "cuda" else copies
    times = []
    if device.type != "cuda":
        began = time.perf_counter()
        for i in range(calls):
            call(i)
        return (time.perf_counter() - began) * 1e3 / calls
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    graph.replay()
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return statistics.median(times) / calls


class Stream(NamedTuple):
    """One way to move bytes through a device's memory, and how many a second it moved: read ones
    and written ones."""

    name: str
    bytes_per_s: float


def measured_streams(device: torch.device, nbytes: int = 1 << 31) -> list[Stream]:
    """What the memory gives at the most, by several reads and copies: the best first, which figures
    are compared with.

    Calls are timed in a row without a graph: a copy in a CUDA graph, a memcpy node, moves a third
    less than by itself. Two buffers take turns, so that each call finds its own outside the L2
    cache.

    Args:
        nbytes: of each buffer; at least COLD times the L2 cache, else at most an eighth of the
            memory. 4 MiB on a CPU.
    """
    calls: dict[str, tuple[int, Callable[[int], object]]] = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        nbytes = min(nbytes, properties.total_memory // 8)
        nbytes = max(nbytes, COLD * properties.L2_cache_size)
    else:
        nbytes = min(nbytes, 1 << 22)
    nbytes -= nbytes % (1 << 16)
    data = torch.rand(
        2, nbytes // 4, device=device
    )  # not zeros, which move faster where lines are compressed
    target = torch.empty_like(data[0])
    calls["copy_, read and written"] = 2 * nbytes, lambda i: target.copy_(data[i])
    calls["neg, read and written"] = 2 * nbytes, lambda i: torch.neg(data[i], out=target)
    calls["sum, read"] = nbytes, lambda i: data[i].sum()
    if device.type == "cuda":
        from kvfold.kernels.gpu.read import SETTINGS, Setting, read_words

        words = data.view(torch.int32)

        def reading(setting: Setting) -> Callable[[int], object]:
            out = torch.empty(
                setting.programs * properties.multi_processor_count,
                dtype=torch.int32,
                device=device,
            )
            return lambda i: read_words(words[i], out, setting)

        calls |= {str(setting): (nbytes, reading(setting)) for setting in SETTINGS}
    found = [
        Stream(name, moved / plain_ms(call, device) * 1e3) for name, (moved, call) in calls.items()
    ]
    return sorted(found, key=lambda stream: -stream.bytes_per_s)


def plain_ms(call: Callable[[int], object], device: torch.device) -> float:
    """Milliseconds of one call, the median over runs of CALLS calls in a row that take turns with
    two copies of the data.

    The device must be busy for longer than the host takes to start a call.
    """
    if device.type != "cuda":
        return median_ms(call, device, 2)
    times = []
    for _ in range(REPLAYS + 1):  # the first compiles
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(CALLS):
            call(i % 2)
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:]) / CALLS


def random_kv(
    batch: int,
    num_kv_heads: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Keys and values [copies, B, Hkv, tokens, head_dim] of a 16-bit cache, as many copies as
    `copies_for` says."""
    nbytes = 2 * batch * num_kv_heads * tokens * head_dim * dtype.itemsize
    shape = (copies_for(nbytes, device), batch, num_kv_heads, tokens, head_dim)
    return torch.randn(shape, dtype=dtype, device=device), torch.randn(
        shape, dtype=dtype, device=device
    )


def sdpa_ms(query: Tensor, keys: Tensor, values: Tensor) -> float:
    """Milliseconds of one step of scaled_dot_product_attention with its flash backend (any backend
    on a CPU).

    Args:
        query: [B, Hkv, G, head_dim]: the query heads of a KV head stand where tokens do, so that
            the backend reads each key once; no mask is needed, since all of them see every key.
        keys, values: [copies, B, Hkv, tokens, head_dim].
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(i: int) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, keys[i], values[i])

    if query.device.type != "cuda":
        return median_ms(call, query.device, len(keys))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return median_ms(call, query.device, len(keys))


def flex_call(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[int], object]:
    """One step of FlexAttention, compiled, on copy i; arguments as in `sdpa_ms`. The first call
    compiles."""
    import torch._inductor.config as inductor
    from torch.nn.attention.flex_attention import flex_attention

    inductor.compile_threads = 1  # several processes compile at a time
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda i: compiled(query, keys[i], values[i])


def flex_ms(query: Tensor, keys: Tensor, values: Tensor) -> float | str:
    """Milliseconds of one step of compiled FlexAttention; or why there is no figure."""
    if query.device.type != "cuda":
        return "not compiled on a CPU"
    try:
        return median_ms(flex_call(query, keys, values), query.device, len(keys))
    except Exception as error:  # whatever the compiler raises: the comparison is left out, and the reason stands there
        return f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
