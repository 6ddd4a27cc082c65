"""Which kernels an artifact needs, found by going through a prompt and steps of its layers without
running any, and compiled while the weights are read."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import (
    ARCHITECTURES,
    heads_of,
    is_chunked,
    shared_layers_of,
    sliding_windows_of,
)
from kvfold.exports.reader import read_metadata, tensor_shapes
from kvfold.exports.schema import Metadata
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.compile.launch import Launch, noting
from kvfold.pretrained import config_from_pretrained

log = logging.getLogger("kvfold")
AMPLE = 1 << 40  # bytes
CONTEXTS = (
    2**12,
    2**14,
    2**17,
)  # tokens that block tables have room for: how many parts are merged is a constant of a kernel
# tokens behind a prompt that is continued, so that its pages are decoded once for all queries
LEAST_CHUNK = 1024
DRAFTS = 3  # tokens of a call that is no step and no prompt


class Kind(NamedTuple):
    """What of a layer decides which kernels it needs."""

    spec: LayerSpec  # on the CPU; what its tensors hold does not matter
    sliding: int
    softcap: float | None
    sinks_logit: bool
    num_kv_heads: int = 0  # where layers have different ones; 0: the geometry's
    shared: bool = False  # other layers read it too, so that steps store before they attend


def placeholder(metadata: Metadata, layer: int) -> LayerSpec:
    """A layer's formats, with tensors of the right shapes and no meaning."""
    shapes = tensor_shapes(metadata)
    dim = metadata.cache.heads_of(layer)[1]

    def side(name: str, model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"format": model.format.build()}
        for tensor in model.tensors:
            shape = shapes[f"layers.{layer}.{name}.{tensor}"]
            if tensor == "frequencies":
                found[tensor] = (1.0,)
            else:
                one = (
                    torch.eye(dim, dtype=torch.float32)
                    if tensor == "matrix"
                    else torch.ones((), dtype=torch.float32)
                )
                found[tensor] = one.expand(shape).contiguous()
        return found

    model = metadata.layers[layer]
    return LayerSpec(KeySpec(**side("key", model.key)), ValueSpec(**side("value", model.value)))


def kinds_of(specs: Sequence[LayerSpec], config: Any) -> list[Kind]:
    """The distinct kinds of layers among `specs`, one a layer of a model of this config."""
    text = config.get_text_config()
    sliding = sliding_windows_of(text) or [0] * len(specs)
    if is_chunked(text):  # kernels run while there is one chunk, all of which is seen
        sliding = [0] * len(specs)
    shapes, shared = heads_of(text), shared_layers_of(text)
    heads = [count if len(set(shapes)) > 1 else 0 for count, _ in shapes]
    cap = getattr(text, "attn_logit_softcapping", None)
    found: dict[tuple, Kind] = {}
    for i, (spec, window, count) in enumerate(zip(specs, sliding, heads, strict=True)):
        tensors = (spec.key.matrix, spec.key.offset, spec.key.clip, spec.value.clip)
        of_tensors = tuple(None if tensor is None else tuple(tensor.shape) for tensor in tensors)
        rest = spec.key.turns, window > 0, count, i in shared
        name = (spec.key.format, spec.value.format, of_tensors, *rest)
        if name not in found:
            sinks = ARCHITECTURES[text.model_type].sink_logits
            found[name] = Kind(spec, window, cap, sinks, count, i in shared)
    return list(found.values())


@torch.no_grad()
def launches_of(
    kinds: Sequence[Kind],
    geometry: Geometry,
    num_heads: int,
    dtype: torch.dtype,
    progressive: bool = False,
    multiprocessors: int = 132,
    drafts: bool = True,
) -> list[Launch]:
    """What layers of these kinds launch: in prompts, short and long, in a prompt that is continued,
    in decoding steps at any length, and with the progressive policy with pages on every rung and on
    the way down. Nothing runs, and all tensors are on the CPU.

    Args:
        num_heads: query heads.
        dtype: of the model's activations.
        multiprocessors: of the device that will run them.
        drafts: also what a few tokens behind packed ones launch, as drafts and a short turn of a
            conversation do, which take one more kernel for each pair of formats.
    """
    found: list[Launch] = []
    for kind in kinds:
        with noting(multiprocessors) as noted:
            _walk(kind, geometry, num_heads, dtype, progressive, drafts)
        found += noted
    return found


def _walk(
    kind: Kind,
    geometry: Geometry,
    num_heads: int,
    dtype: torch.dtype,
    progressive: bool,
    drafts: bool,
) -> None:
    from kvfold.runtime.backends.base import LoweredPages
    from kvfold.runtime.backends.triton import TRITON
    from kvfold.runtime.budget.ladder import Ladders
    from kvfold.runtime.cache.cache import QuantizedKVCache

    heads, dim = kind.num_kv_heads or geometry.num_kv_heads, kind.spec.key.format.head_dim
    page = geometry.page_tokens
    logits = torch.zeros(num_heads, dtype=dtype) if kind.sinks_logit else None
    own = Geometry(
        heads,
        dim,
        geometry.sinks,
        geometry.window,
        page,
        (kind.sliding,) if kind.sliding else (),
        shared=(0,) if kind.shared else (),
    )
    ladders = Ladders([kind.spec], [(1.0, 1.0)], own) if progressive else None
    first = own.sinks + own.window + 2 * page
    rungs = len(ladders.rungs[0]) if ladders else 1
    every = ladders.rungs[0] if ladders else ()
    for source, target in itertools.combinations(range(len(every))[::-1], 2):
        above, below = (
            [torch.zeros(own.pair_nbytes(x.key.format, x.value.format), dtype=torch.uint8)]
            for x in (every[source], every[target])
        )
        TRITON.lower_pages(own, [LoweredPages(above, below, every[source], every[target])])
    prompts = [(1, 3), (1, first), *([] if progressive else [(2, first)])]
    if not kind.sliding:
        prompts.append((1, first + LEAST_CHUNK))
    for batch, tokens in prompts:
        cache = QuantizedKVCache([kind.spec], own, AMPLE if progressive else None, TRITON, ladders)
        longest = tokens >= LEAST_CHUNK
        # a page more at each rung, so that one of them comes due on the way down
        calls = [
            tokens,
            1,
            *([page] * 2 * rungs if progressive else []),
            *([LEAST_CHUNK] if longest else []),
            1,
            *([DRAFTS] if drafts and tokens >= first else []),
        ]
        for new in calls:
            keys, values = (torch.zeros(batch, heads, new, dim, dtype=dtype) for _ in range(2))
            query = torch.zeros(batch, num_heads, new, dim, dtype=dtype)
            try:
                view = cache.update(keys, values, 0)[0]
            except KVBudgetExceeded:  # all is on the floor
                break
            view.attend(query, dim**-0.5, None, kind.softcap, logits, kind.sliding)
            if progressive:
                cache.set_budget(cache.nbytes)  # so that what comes next sends pages down
        if tokens != first or batch != 1:
            continue
        layer, step = cache.layers[0], torch.zeros(1, heads, 1, dim, dtype=dtype)
        cache.set_budget(AMPLE if progressive else None)
        for context in CONTEXTS:
            view = cache.update(step, step, 0)[0]
            layer.table.reserve(context // page)
            view.attend(
                torch.zeros(1, num_heads, 1, dim, dtype=dtype),
                dim**-0.5,
                None,
                kind.softcap,
                logits,
                kind.sliding,
            )


class Compilation:
    """An artifact's kernels while they are compiled.

    Attributes:
        jobs: kernels.compile.build.Job of each.
    """

    def __init__(self, launches: list[Launch], builder: Any, device: torch.device) -> None:
        from kvfold.kernels.compile.build import Job, jobs_of, target_of

        self.launches, self.builder, self.device = launches, builder, device
        self.jobs: list[Job] = []
        if builder is not None:
            self.jobs = jobs_of(launches, target_of(device))
            builder.build(self.jobs)

    def usable(self, required: bool) -> bool:
        """Waits until the kernels are compiled and reads them into this process; False, with a
        warning, if one could not be compiled.

        Raises:
            KvfoldError: it could not be, and `required` says that the kernels were asked for.
        """
        from kvfold.kernels.compile.build import preload

        if self.builder is None:
            return True
        self.builder.wait()
        if not self.builder.failed:
            if not self.builder.lost:
                with torch.cuda.device(self.device):
                    preload(self.launches)
            return True
        job, message = self.builder.failed[0]
        text = f"{len(self.builder.failed)} of {len(self.jobs)} kernels can't be compiled, {job.label} first: {message}"
        if required:
            raise KvfoldError(
                f"attention='triton' can't be used: {text}; use attention='auto' or 'reference'."
            )
        log.warning("attention: plain-torch reference, because %s", text)
        return False


_begun: ContextVar[list[Any] | None] = ContextVar("begun", default=None)


@contextmanager
def compiling() -> Iterator[None]:
    """What `begin` starts while this lasts is over at its end, however it ends."""
    token = _begun.set([])
    try:
        yield
    finally:
        for builder in _begun.get() or []:
            builder.stop()
        _begun.reset(token)


def begin(
    device: torch.device, find: Callable[[int], list[Launch]], jobs: int | None = None
) -> Compilation:
    """Starts to compile the kernels of a model.

    Args:
        device: with Triton's interpreter the CPU: there is nothing to compile.
        find: the launches, for a device of so many multiprocessors; called after the compiler's
            process was started, which then imports.
        jobs: processes; default: one a core.
    """
    from kvfold.kernels.compile.build import Builder

    if device.type != "cuda":
        return Compilation([], None, device)
    builder = Builder(jobs)
    begun = _begun.get()
    if begun is not None:
        begun.append(builder)
    builder.start()
    return Compilation(
        find(torch.cuda.get_device_properties(device).multi_processor_count), builder, device
    )


def begin_folder(
    folder: Path, device: torch.device, dtype: torch.dtype | None, progressive: bool, ranks: int = 1
) -> Compilation:
    """Starts to compile the kernels of an artifact's folder, of which only kv_cache.json and
    config.json are read; but for those that drafts need, which ahead.py compiles behind them.

    Args:
        dtype: of the model's activations; None for that of its weights.
        ranks: processes that the heads are divided among.
    """
    find = partial(artifact_launches, folder, dtype, progressive, ranks=ranks, drafts=False)
    return begin(device, find)


class Model(NamedTuple):
    """What of an artifact decides which kernels it needs."""

    kinds: list[Kind]
    geometry: Geometry
    num_heads: int  # query heads
    dtype: torch.dtype  # of activations


def read_kinds(folder: Path, dtype: torch.dtype | None) -> Model:
    """Reads an artifact's kv_cache.json and config.json.

    Args:
        dtype: of activations; default: of the weights.
    """
    metadata, config = read_metadata(folder), config_from_pretrained(folder)
    kinds = kinds_of([placeholder(metadata, i) for i in range(metadata.cache.num_layers)], config)
    dtype = dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return Model(kinds, metadata.geometry, metadata.cache.num_heads, dtype)


def artifact_launches(
    folder: Path,
    dtype: torch.dtype | None,
    progressive: bool,
    multiprocessors: int,
    ranks: int = 1,
    drafts: bool = True,
) -> list[Launch]:
    """What a model from an artifact's folder will launch.

    Args:
        dtype: of its activations; default: of its weights.
        ranks: processes that its heads are divided among, in equal parts.
        drafts: as in `launches_of`.
    """
    kinds, whole, heads, dtype = read_kinds(folder, dtype)
    part = replace(whole, num_kv_heads=whole.num_kv_heads // ranks)
    own = kinds
    if ranks > 1:
        own = [x._replace(spec=x.spec.of_heads(slice(0, part.num_kv_heads))) for x in kinds]
    return launches_of(own, part, heads // ranks, dtype, progressive, multiprocessors, drafts)


def warm_up(model: Any, jobs: int | None = None) -> int:
    """Compiles the kernels that `model`, from load_pretrained, will call, as load_pretrained does,
    and returns how many they are.

    Args:
        jobs: processes; default: one a core.
    """
    parameter = next(model.parameters())
    if not model.kv_triton or parameter.device.type != "cuda":
        return 0
    artifact, progressive = model.kv_artifact, model.kv_policy is not None
    kinds, heads = kinds_of(artifact.specs, model.config), artifact.num_heads
    with compiling():
        find = partial(launches_of, kinds, artifact.geometry, heads, parameter.dtype, progressive)
        found = begin(parameter.device, find, jobs)
        found.usable(required=True)
    return len(found.jobs)
