"""What PyTorch's ambient modes would do to the cache, kept out: autograd, inference mode, autocast,
a default device.

A cache outlives the mode of whoever fills it: what is made in inference mode can't be written
outside of it, what is recorded for autograd is kept alive and may not be written at all, and
autocast rounds products that are meant in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import KvfoldError

AUTOCAST = ("cpu", "cuda")  # device types that the cache runs on
NOTHING = nullcontext()


def neutral() -> AbstractContextManager[Any]:
    """A context in which code computes as without any ambient mode, and records nothing for
    autograd."""
    casts = [device for device in AUTOCAST if torch.is_autocast_enabled(device)]
    placed = torch.get_default_device().type != "cpu"  # tensors that name no device are the host's
    if not (
        casts or placed or torch.is_inference_mode_enabled()
    ):  # as a rule: a step has many layers
        return torch.no_grad() if torch.is_grad_enabled() else NOTHING
    return _without(casts, placed)


@contextmanager
def _without(casts: list[str], placed: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())  # leaving inference mode turns gradients on
        for device in casts:
            stack.enter_context(torch.autocast(device, enabled=False))
        if placed:
            stack.enter_context(torch.device("cpu"))
        yield


def neutrally(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function in `neutral`."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with neutral():
            return function(*args, **kwargs)

    return run


def modes(device: torch.device) -> bool:
    """Whether a mode is on in which a model computes other numbers than without: a captured step
    must not be replayed in it."""
    return torch.is_autocast_enabled(device.type) or torch.get_default_dtype() != torch.float32


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is a sentence."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise KvfoldError(
            "Gradients don't pass through keys and values that are packed; run the forward pass inside "
            "`with runtime.plain_cache(model):`, where the cache is transformers' own of 16 bits."
        )


def no_gradient(out: Tensor, *sources: Tensor) -> Tensor:
    """`out`, computed from `sources` without autograd, so that a backward pass which reaches it
    raises KvfoldError instead of leaving out a part of the gradient."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in sources):
        return NoGradient.apply(out, *sources)
    return out
