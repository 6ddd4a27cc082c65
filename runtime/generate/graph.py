"""Decoding by replaying one captured step: Python launches one graph a token instead of a thousand
kernels.

Everything that changes from step to step lives on the device: the token, the sequences' lengths,
the block tables and the pages that they lead to. A page is a tensor of its own, entered between two
replays; only where a tensor that the graph itself reads is replaced (a block table that grew, the
16-bit rows of another ring) the step is captured again. Before a capture one step runs as usual,
and so compiles what must be compiled. After FUSE_AFTER steps of a model its small operations are
compiled too.
"""

import functools
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvfold.errors import KvfoldError
from kvfold.runtime.cache.ambient import modes, neutral, no_gradient
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.calls.owner import Bound, Owner
from kvfold.runtime.generate.fused import fused

log = logging.getLogger("kvfold")

WARM = "warm"  # HostSteps.captured: one step has run on these tensors, the next may be captured
# steps of a model and a batch size before its norms, gates and RoPE are compiled: torch.compile
# takes seconds, which a short answer must not wait for and a long one wins back
FUSE_AFTER = 64
PLAIN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "logits_to_keep",
    "return_dict",
}
WAITS = "synchronizing CUDA operation"  # of PyTorch's warning


def reads(cache: QuantizedKVCache) -> list[tuple[int, torch.Size]]:
    """Where the tensors of a cache lie that a step of it reads or writes, pages aside."""
    found = []
    for layer in cache.layers:
        there, _ = layer.table.next_rungs()
        found += [*layer.own_tensors(), *([] if there is None else [there])]
    return [(x.data_ptr(), x.shape) for x in found]


class DecodingStep:
    """One step of a model on one cache, captured; `begin_step` has been called for it, and such a
    step must have run before.

    Capturing runs nothing and leaves the cache's host state alone.

    Args:
        forward: the model's own.
        cache: that the step reads and appends to.
        batch_size: sequences.
        compiled: a context in which the model's small operations run compiled, or None.
    """

    devices = ("cuda",)

    def __init__(
        self,
        forward: Callable[..., Any],
        cache: QuantizedKVCache,
        batch_size: int,
        compiled: Any = None,
    ) -> None:
        device = cache.layers[0].device
        with torch.inference_mode(False):  # they outlive the mode of whoever decodes first
            self.ids, self.positions = torch.zeros(
                2, batch_size, 1, dtype=torch.long, device=device
            )
        self.reads = reads(cache)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        # other threads may do as they like meanwhile
        with (
            compiled or nullcontext(),
            torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
        ):
            self.logits = run(forward, cache, self.ids, self.positions)

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits [B, 1, vocab_size] of the tokens ids [B, 1] at positions [B or 1, 1], valid
        until the next call."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits


def run(
    forward: Callable[..., Any], cache: QuantizedKVCache, ids: Tensor, positions: Tensor
) -> Tensor:
    """The logits of a step whose host's part is done."""
    with cache.step():
        return forward(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits


class Decoding:
    """The `forward` of a model that replays a captured step wherever it can, and is the model's own
    elsewhere.

    Args:
        model: from load_pretrained; its own `forward` is kept.
        insist: an error, in the next step, where one can't be captured, instead of a warning and
            going on without.
        notice: told the columns of a cache now and then.
        capture: makes a captured step.
    """

    def __init__(
        self,
        model: Any,
        insist: bool = False,
        notice: Callable[[int], None] | None = None,
        capture: Any = DecodingStep,
    ) -> None:
        # a bound method would keep the model alive; what somebody has set on this model alone is no
        # cycle of ours
        self.owner, self.forward = (
            Owner(model),
            vars(model).get("forward") or Bound(type(model).forward, model),
        )
        self.insist, self.notice, self.capture = insist, notice, capture
        self.refused = ""  # why no step of this model can be captured
        self.probed = False  # whether steps were watched for what can't be captured
        self.waited = ""  # where the step before was seen to wait for the device
        self.steps: Counter[int] = Counter()  # replayed ones, by batch size

    @property
    def model(self) -> Any:
        return self.owner()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache: Any = kwargs.get("past_key_values")
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(cache, QuantizedKVCache) or not self.fits(cache, ids, args, kwargs):
            return self.forward(*args, **kwargs)
        if self.refused and self.insist:
            raise KvfoldError(f"{self.refused}; load with cuda_graph='auto' or False.")
        if self.refused:
            return self.forward(*args, **kwargs)
        assert ids is not None
        quiet = cache.steps.quiet > 0
        with neutral():
            begun = cache.begin_step()
        if not begun:
            return self.forward(*args, **kwargs)
        if not quiet and self.notice is not None:
            self.notice(cache.layers[0].columns)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = cache.layers[0].table.state[:, :1].long()
        try:
            with torch.no_grad():
                logits = self.logits(cache, ids, positions, cache.steps.intact)
        except BaseException:
            cache.steps.tear()
            raise
        with neutral():
            cache.finish_step()
        logits = no_gradient(logits, next(self.model.parameters()))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def as_forward(self) -> Bound:
        """What takes the place of the model's `forward`; a copy of the model goes through its own
        `kv_decoding`."""

        @functools.wraps(type(self.model).forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.kv_decoding(*args, **kwargs)

        return Bound(forward, self.model)

    def fits(self, cache: QuantizedKVCache, ids: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call is a plain decoding step: one token a sequence, on a filled cache of
        kernels, and nothing else wanted."""
        first, config = cache.layers[0], self.model.config
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or len(args) > 1:
            return False
        if not first.is_initialized or first.steps is None or cache.policy.moves_pages:
            return False
        if (
            first.batch_size != len(ids)
            or ids.device != first.device
            or first.device.type not in self.capture.devices
        ):
            return False
        if any(
            kwargs[name] is not None and kwargs[name] is not False for name in kwargs.keys() - PLAIN
        ):
            return False
        mask, positions, keep = (
            kwargs.get(name) for name in ("attention_mask", "position_ids", "logits_to_keep")
        )
        if (
            kwargs.get("use_cache") is False
            or kwargs.get("return_dict") is False
            or isinstance(keep, Tensor)
        ):
            return False
        if mask is not None and mask.dim() != 2:
            return False
        if positions is not None and tuple(positions.shape) not in ((1, 1), (len(ids), 1)):
            return False
        pads = cache.shared.padding
        if (
            len(pads) != len(ids) or max(pads) >= first.columns
        ):  # a sequence of which nothing has come yet
            return False
        if getattr(config, "output_hidden_states", False) or getattr(
            config, "output_attentions", False
        ):
            return False
        if self.model.training or torch.compiler.is_compiling() or modes(first.device):
            return False
        return (mask is None or len(mask) == len(ids)) and self.model.kv_gate.step(
            self.model, cache, mask, len(ids)
        )

    def logits(
        self, cache: QuantizedKVCache, ids: Tensor, positions: Tensor, intact: bool
    ) -> Tensor:
        """A step, replayed or as it is. `intact`: see HostSteps; the model is looked at where that
        ends, with every page at the latest."""
        step, batch = cache.steps.captured, len(ids)
        fuse = self.steps[batch] >= FUSE_AFTER and os.environ.get("TORCHDYNAMO_DISABLE") != "1"
        if step is WARM:
            step = self.captured(cache, batch, fuse)
            cache.steps.keep(step, (fuse, weights(modules_of(self.model))))
        elif step is not None and (
            cache.steps.made_with[0] != fuse or (not intact and not self.holds(step, cache))
        ):
            step = None
            cache.steps.keep(None)  # frees what it held before the step runs
        if step is not None:
            self.steps[batch] += 1
            return step(ids, positions).clone()
        if self.insist or not (self.refused or self.hooked(modules_of(self.model))):
            cache.steps.keep(WARM)
        with fused(self.model) if fuse else nullcontext(), self.watched(cache):
            return run(self.forward, cache, ids, positions)

    def holds(self, step: Any, cache: QuantizedKVCache) -> bool:
        """Whether all that a captured step reads is where it was."""
        modules = modules_of(self.model)
        there = step.reads == reads(cache) and cache.steps.made_with[1] == weights(modules)
        return there and (self.insist or not self.hooked(modules))

    def captured(self, cache: QuantizedKVCache, batch: int, fuse: bool) -> Any:
        """A captured step; None, with a warning, where there can't be one: nothing was run, and the
        step runs as usual."""
        try:
            return self.capture(self.forward, cache, batch, fused(self.model) if fuse else None)
        except (RuntimeError, NotImplementedError) as error:
            self.refuse(str(error).splitlines()[0] if str(error) else type(error).__name__)
            recover(cache.layers[0].device)
            return None

    def refuse(self, why: str) -> None:
        """From here on no step of this model is captured."""
        self.refused = f"A decoding step of {type(self.model).__name__} can't be captured in a CUDA graph ({why})"
        if not self.insist:
            log.warning("%s; Python runs it, as with cuda_graph=False.", self.refused)

    @contextmanager
    def watched(self, cache: QuantizedKVCache) -> Iterator[None]:
        """Learns, from the first steps that run as usual, whether the model's code waits for the
        device, which no capture survives. It does where two steps in a row do: the first may wait
        for memory that the allocator frees, or for what a library sets up once."""
        if self.probed or cache.layers[0].device.type != "cuda":
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        places = [f"{x.filename}:{x.lineno}" for x in found if WAITS in str(x.message)]
        self.probed = not places or bool(self.waited)
        if places:
            cache.steps.keep(None)  # the next step is watched too, not captured
        if places and self.waited:
            self.refuse(f"its code waits for the device, at {places[0]}")
        self.waited = places[0] if places else ""

    def hooked(self, modules: list[nn.Module]) -> bool:
        """Whether somebody's hooks sit on the inner ones of the model's modules: a replay would not
        call them."""
        own = (self.model, self.model.base_model)
        for module in modules:
            if "_hf_hook" in vars(module):
                return True
            if not (module._forward_hooks or module._forward_pre_hooks) or module in own:
                continue
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if any(not getattr(x, "__module__", "").startswith("transformers.") for x in hooks):
                return True
        return False


def modules_of(model: nn.Module) -> list[nn.Module]:
    """`model.modules()` in another order, in a tenth of the time: this is asked before steps."""
    found = {id(model): model}
    rest = [model]
    while rest:
        for module in rest.pop()._modules.values():
            if module is not None and id(module) not in found:
                found[id(module)] = module
                rest.append(module)
    return list(found.values())


def weights(modules: list[nn.Module]) -> list[int]:
    """Where the parameters of modules lie."""
    return [
        x.data_ptr() for module in modules for x in module._parameters.values() if x is not None
    ]


def recover(device: torch.device) -> None:
    """After a capture that failed: one that succeeds takes PyTorch's random numbers out of the
    capturing state they were left in."""
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device).add_(1)
