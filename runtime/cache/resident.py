"""What several caches take together."""

from kvfold.runtime.cache.cache import QuantizedKVCache


def resident_nbytes(caches: list[QuantizedKVCache]) -> int:
    """Bytes of several caches on the device, each tensor that they share once."""
    tensors = [
        t for cache in caches for layer in cache.layers for t in layer.tensors() if t.numel()
    ]
    tensors += [t for cache in caches for t in cache.policy.tensors()]
    tensors += [t for cache in caches for t in cache.states.tensors()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
