"""The small operations of a captured step, compiled: norms, the gate of an MLP, RoPE. Run one by
one they are most of a step's kernels, and each takes longer to start than to run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

ROPE = "apply_rotary_pos_emb"  # a global of transformers' modeling files
BATCHES = 64  # sizes that one function is compiled for before others run uncompiled


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch.compile, with intermediate results rounded as eager operations round
    them."""
    return torch.compile(function, dynamic=False, options={"emulate_precision_casts": True})


def fusible(module: nn.Module) -> bool:
    """Norms, and MLPs of plain linear layers: what computes the same for any token and reads
    nothing but its input."""
    if "forward" in vars(module):  # somebody else's hook
        return False
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        return True
    layers = [
        child
        for child in module.modules()
        if next(child.parameters(recurse=False), None) is not None
    ]
    return name.endswith("MLP") and all(type(layer) is nn.Linear for layer in layers)


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """While this lasts, the model's small operations run compiled, and as they are where the
    compiler fails, with its warning.

    Compiling takes seconds the first time a batch size is seen and is kept on disk; with
    TORCHDYNAMO_DISABLE=1 nothing is compiled.
    """
    changed = [module for module in model.modules() if fusible(module)]
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    ropes = [(home, getattr(home, ROPE)) for home in homes if hasattr(home, ROPE)]
    dynamo: Any = torch._dynamo.config
    try:
        for module in changed:
            module.forward = partial(compiled(type(module).forward), module)
        for home, rope in ropes:
            setattr(home, ROPE, compiled(rope))
        with dynamo.patch(
            suppress_errors=True, recompile_limit=BATCHES
        ):  # an error in the middle of a step would spoil the cache
            yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)
        for home, rope in ropes:
            setattr(home, ROPE, rope)
