"""Traces a transformers model around its cache: everything but attention becomes ONNX nodes by
`torch.onnx.export`, and each attention becomes one node of the domain "kvfold", for the writer of a
form to put its own nodes in place of it."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kvfold.errors import KvfoldError
from kvfold.exports.onnx.attention import CacheTensor, Call
from kvfold.exports.onnx.graph import FLOAT16, INT8, OPSET, UINT8

NAME = "kvfold-onnx"  # load a model with this attention to trace it
DOMAIN = "kvfold"
BATCH, TOKENS = (
    2,
    5,
)  # of the example inputs; other lengths are free, but 0 and 1 would be taken for constants
LENGTHS = {"pages": 3, "rows": 7, "past": 7}
DTYPES: dict[int, torch.dtype] = {UINT8: torch.uint8, INT8: torch.int8, FLOAT16: torch.float16}


@dataclass(frozen=True)
class Trace:
    """A traced model.

    Attributes:
        proto: the graph without weights; inputs and outputs as `cache` names them.
        weights: float32 and integer arrays by name.
        calls: of each layer's attention, in order.
    """

    proto: ModelProto
    weights: dict[str, np.ndarray]
    calls: list[Call]


class _Recorder:
    """The cache that a traced forward pass runs on, and what it noted."""

    def __init__(self) -> None:
        self.cache: list[list[Tensor]] = []
        self.calls: list[Call] = []
        self.present: list[Sequence[Tensor]] = []
        self.past: Any = 0


_recorder = _Recorder()


def _forward(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    batch, heads, tokens, dim = query.shape
    call = Call(
        module.layer_idx,
        heads,
        scaling if scaling is not None else dim**-0.5,
        softcap,
        kwargs.get("sliding_window") or 0,
    )
    cache = _recorder.cache[call.index]
    extra = [] if s_aux is None else [s_aux.float()]
    out, *present = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Attention",
        (query.float(), key.float(), value.float(), *cache, *extra),
        {"layer": call.index},
        dtypes=(torch.float32, *(t.dtype for t in cache)),
        shapes=((batch, tokens, heads, dim), *(t.shape for t in cache)),
        version=1,
    )
    _recorder.calls.append(call)
    _recorder.present.append(present)
    return out, None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # masks are the writer's


class _Step(nn.Module):
    """A forward pass on flat tensors."""

    def __init__(self, model: Any, page_tokens: int) -> None:
        super().__init__()
        self.model, self.page_tokens = model, page_tokens

    def forward(self, input_ids: Tensor, logits_at: Tensor, cache: list[list[Tensor]]) -> tuple:
        _recorder.cache, _recorder.calls, _recorder.present = cache, [], []
        past = cache[0][-1].shape[2]
        if cache[0][0].dim() == 3:
            past = past + cache[0][0].shape[1] * self.page_tokens
        positions = torch.arange(input_ids.shape[1])[None] + past
        out = self.model(
            input_ids=input_ids, position_ids=positions, use_cache=False, logits_to_keep=logits_at
        )
        return out.logits, _recorder.present


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress on stdout nor advice that its reader can't follow."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def names_of(tensors: Sequence[Sequence[CacheTensor]], prefix: str) -> list[str]:
    """Names of the cache's tensors as a graph's inputs ("past") or outputs ("present")."""
    return [f"{prefix}.{i}.{tensor.name}" for i, layer in enumerate(tensors) for tensor in layer]


def trace(model: Any, tensors: Sequence[Sequence[CacheTensor]], page_tokens: int) -> Trace:
    """Traces one forward pass of T new tokens.

    Args:
        model: a causal LM with attention `NAME`, float32, in eval mode.
        tensors: the cache, by layer. Where the first of a layer has three dimensions,
            it holds pages of `page_tokens` tokens.
    Raises:
        KvfoldError: the model computes something that ONNX has no nodes for.
    """
    import onnx_ir

    if getattr(model.config, "num_local_experts", None):
        model.set_experts_implementation(
            "batched_mm"
        )  # the default is one operation that ONNX has no nodes for
    example, shapes = [], []
    free = torch.export.Dim.DYNAMIC
    for layer in tensors:
        sizes = [
            [BATCH if d == "batch" else LENGTHS[d] if isinstance(d, str) else d for d in t.dims]
            for t in layer
        ]
        example.append(
            [torch.zeros(s, dtype=DTYPES[t.dtype]) for s, t in zip(sizes, layer, strict=True)]
        )
        shapes.append(
            [{i: free for i, d in enumerate(t.dims) if isinstance(d, str)} for t in layer]
        )
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Step(model, page_tokens).eval(),
                (ids, torch.arange(TOKENS - 1), example),
                dynamic_shapes={
                    "input_ids": {0: free, 1: free},
                    "logits_at": {0: free},
                    "cache": shapes,
                },
                input_names=["input_ids", "logits_at", *names_of(tensors, "past")],
                output_names=["logits", *names_of(tensors, "present")],
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever it meets
        reason = _root(error)
        raise KvfoldError(
            f"Model family '{model.config.model_type}' cannot be expressed in ONNX: its forward pass can't be traced "
            f"({reason}); export a model of another family."
        ) from error
    assert program is not None
    calls, _recorder.cache, _recorder.present = list(_recorder.calls), [], []
    graph = program.model.graph
    weights = {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }
    graph.initializers.clear()
    proto = onnx_ir.to_proto(program.model)
    return Trace(proto, weights, calls)


def _root(error: BaseException) -> str:
    """The first line of what an exception came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
