"""Which backend reads and writes a cache."""

import logging
from importlib.util import find_spec

import torch

from kvfold.errors import KvfoldError
from kvfold.exports.reader import Artifact
from kvfold.exports.schema import Metadata
from kvfold.runtime.backends.base import Backend
from kvfold.runtime.backends.reference import REFERENCE

log = logging.getLogger("kvfold")


def backend_of(triton: bool) -> Backend:
    """The Triton kernels, which need the package triton, or plain torch."""
    if not triton:
        return REFERENCE
    from kvfold.runtime.backends.triton import TRITON

    return TRITON


def choose_triton(attention: str, device: torch.device, artifact: Artifact | Metadata) -> bool:
    """Whether the Triton kernels run.

    Raises:
        KvfoldError: "triton" was asked for, but isn't installed, or the cache needs what the
            kernels lack.
    """
    if attention == "reference" or (attention == "auto" and device.type != "cuda"):
        return False
    g = artifact.geometry
    page = g.page_tokens
    dims = {dim for _, dim in g.heads} or {g.head_dim}
    reason = ""
    if find_spec("triton") is None:
        reason = "the package triton is not installed"
    elif device.type == "cpu" and not interpreting():
        reason = "the kernels need a CUDA device"
    elif page & (page - 1) or not 8 <= page <= 128:
        reason = f"page_tokens is {page}, and kernels read pages of 8 to 128 tokens, a power of two"
    elif min(dims) < 16 or max(dims) > 512:
        reason = f"heads have {sorted(dims)} channels, and kernels read heads of 16 to 512"
    if reason and attention == "triton":
        raise KvfoldError(
            f"attention='triton' can't be used: {reason}; use attention='auto' or 'reference'."
        )
    if reason:
        log.warning("attention: plain-torch reference, because %s", reason)
    return not reason


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device: TRITON_INTERPRET=1 was set
    before they were imported."""
    from triton import knobs

    return knobs.runtime.interpret
