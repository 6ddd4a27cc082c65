"""Which backend reads and writes a cache."""

from kvfold.runtime.backends.base import Backend
from kvfold.runtime.backends.reference import REFERENCE


def backend_of(triton: bool) -> Backend:
    """The Triton kernels, which need the package triton, or plain torch."""
    if not triton:
        return REFERENCE
    from kvfold.runtime.backends.triton import TRITON

    return TRITON
