"""Timing on a device: medians of CUDA graph replays, the copy bandwidth, and the library attentions to compare with.

On a CPU the same functions time with perf_counter, so that the commands can be tried out where no GPU is; such figures
say nothing about speed.
"""

import math
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

CALLS = 10  # of a graph, at least
REPLAYS = 9
COLD = 4  # the data of one graph is at least this many times the L2 cache, so that no call finds the last one's there
MOST_COPIES = 128


def machine(device: torch.device) -> dict[str, str]:
    """What a figure was measured on: the device's name, and the versions of torch and Triton."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, no measure of speed"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"device": name, "torch": version("torch"), "triton": triton}


def copies_for(nbytes: int, device: torch.device) -> int:
    """Copies of data of `nbytes` bytes that calls take turns with, so that each finds its own outside the L2 cache."""
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


def copy_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Bytes a second of a device-to-device copy of `nbytes` bytes, read and written ones counted."""
    if device.type != "cuda":
        nbytes = min(nbytes, 1 << 22)
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median_ms(lambda i: target.copy_(source), device) * 1e3


def random_kv(
    batch: int, num_kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys and values [copies, B, Hkv, tokens, head_dim] of a 16-bit cache, as many copies as `copies_for` says."""
    nbytes = 2 * batch * num_kv_heads * tokens * head_dim * dtype.itemsize
    shape = (copies_for(nbytes, device), batch, num_kv_heads, tokens, head_dim)
    return torch.randn(shape, dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device)


def sdpa_ms(query: Tensor, keys: Tensor, values: Tensor) -> float:
    """Milliseconds of one step of scaled_dot_product_attention with its flash backend (any backend on a CPU).

    Args:
        query: [B, Hkv, G, head_dim]: the query heads of a KV head stand where tokens do, so that the backend reads each key
            once; no mask is needed, since all of them see every key.
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
    """One step of FlexAttention, compiled, on copy i; arguments as in `sdpa_ms`. The first call compiles."""
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
