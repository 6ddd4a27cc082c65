"""A cache as the inputs of the ONNX graphs (exports/onnx/ONNX.md),
so that onnxruntime goes on where this runtime is."""

import numpy as np
import torch

from kvfold.errors import KvfoldError
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.sequence import PASSED


def onnx_inputs(cache: QuantizedKVCache) -> dict[str, np.ndarray]:
    """What the graphs of `--form packed` take as past.I.…, copied; `OnnxRunner.cache_of` takes it.

    Args:
        cache: of B sequences of one length, with policy="floor".
    Returns:
        For each layer I: past.I.pages, uint8 [B, pages, bytes of a page], zeros for pages that a
            sliding window has left behind;
        past.I.key_rows and past.I.value_rows, float16 [B, num_kv_heads, R, head_dim]: the sinks and
        what is behind the last page.
    Raises:
        KvfoldError: the cache is empty, its sequences differ in length, or its pages may have other
            formats than the artifact's; or layers keep states.
    """
    if cache.states:
        raise KvfoldError(
            "ONNX graphs take keys and values, but layers of this model keep states beside them; go on with this "
            "runtime."
        )
    found: dict[str, np.ndarray] = {}
    for i, layer in enumerate(cache.layers):
        lengths = layer.lengths()
        if not lengths or len(set(lengths)) > 1:
            raise KvfoldError(
                f"ONNX graphs take sequences of one length, but the cache's have {lengths} tokens; give one alone."
            )
        if len(layer.rungs) > 1:
            raise KvfoldError(
                "ONNX graphs read the artifact's formats only, and policy='progressive' has others; load with 'floor'."
            )
        window, pool, ids_of = layer.window, layer.table.pool, layer.table.pages()
        sinks, length, count = layer.geometry.sinks, lengths[0], len(ids_of[0])
        pages = torch.zeros(
            len(lengths), count, pool.page_nbytes, dtype=torch.uint8, device=layer.device
        )
        for row, ids in zip(pages, ids_of, strict=True):
            passed = ids.count(PASSED)
            if passed < count:
                row[passed:] = pool.load(ids[passed:])
        slots = torch.cat(
            (
                window.slots(0, min(sinks, length)),
                window.slots(sinks + count * layer.geometry.page_tokens, length),
            )
        )
        tensors = {
            "pages": pages,
            "key_rows": window.keys[:, :, slots],
            "value_rows": window.values[:, :, slots],
        }
        found |= {f"past.{i}.{name}": tensor.cpu().numpy() for name, tensor in tensors.items()}
    return found
