"""Loads an artifact and generates from it through a packed KV cache."""

import sys as _sys

if (
    __name__ == "runtime"
):  # the bare folder, imported from the repository root: hand over the one real module
    import importlib as _importlib

    _sys.modules[__name__] = _importlib.import_module("kvfold.runtime")
else:
    from kvfold.runtime.cache.cache import QuantizedKVCache
    from kvfold.runtime.cache.onnx_inputs import onnx_inputs
    from kvfold.runtime.cache.resident import resident_nbytes
    from kvfold.runtime.cache.restore import load_cache
    from kvfold.runtime.generate.compile import warm_up
    from kvfold.runtime.load import load_pretrained, plain_cache

    __all__ = [
        "QuantizedKVCache",
        "load_cache",
        "load_pretrained",
        "onnx_inputs",
        "plain_cache",
        "resident_nbytes",
        "warm_up",
    ]
