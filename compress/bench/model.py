"""Models of known shapes with random weights, and caches that look full: what end-to-end
measurements run on."""

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from kvfold.compress.bench.cases import DISTINCT, Pair, pair, random_pages
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.cache_model import CacheModel
from kvfold.exports.reader import Artifact
from kvfold.exports.schema import CalibrationModel, Metadata
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.pretrained import model_from_config
from kvfold.runtime.backends.choose import choose_triton
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.load import attach

MOST_TOKENS = 1 << 21  # positions that the models take

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 500000.0,
    },
    "llama2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "rope_theta": 10000.0,
    },
    "tiny": {  # to try the commands out
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "rope_theta": 10000.0,
    },
}  # fmt: skip


def free_memory(device: torch.device) -> None:
    """Gives back what went out of use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_names(shape: str, names: list[str]) -> None:
    """Refuses names of a shape or of formats that are not in the tables.

    Raises:
        KvfoldError: such a name.
    """
    if shape not in SHAPES:
        raise KvfoldError(f"Shape '{shape}' is not in the table; choose from {', '.join(SHAPES)}.")
    for name in names:
        pair(name, SHAPES[shape]["head_dim"])


def model_config(shape: str) -> LlamaConfig:
    """The configuration of a named shape."""
    size = dict(SHAPES[shape])
    rope = {"rope_type": "default", "rope_theta": size.pop("rope_theta")}
    return LlamaConfig(
        **size,
        rope_parameters=rope,
        max_position_embeddings=MOST_TOKENS,
        bos_token_id=None,
        eos_token_id=None,
    )


def build_model(shape: str, device: torch.device) -> Any:
    """A LlamaForCausalLM of a named shape with random bfloat16 weights, made on the device."""
    with device:
        model = model_from_config(
            model_config(shape), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval()


def weights_nbytes(model: Any) -> int:
    """Bytes of a model's parameters, the embedding included."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def layer_formats(name: str, head_dim: int, layers: int) -> list[Pair]:
    """Formats of each layer; the patterns of `best` differ by layer."""
    names = ("best", "best-b") if name == "best" else (name,)
    return [pair(names[i % len(names)], head_dim) for i in range(layers)]


def make_artifact(config: Any, geometry: Geometry, formats: list[Pair]) -> Artifact:
    """What `attach` needs of an artifact, without files: keys of one scale a token get a matrix and
    an offset, values a clip, as the search would give them."""
    heads, dim = geometry.num_kv_heads, geometry.head_dim
    specs = []
    for k, v in formats:
        basis = {}
        if k.kind.symmetric:
            basis = {
                "matrix": torch.linalg.qr(torch.randn(heads, dim, dim)).Q.contiguous(),
                "offset": torch.randn(heads, dim),
            }
        clip = torch.full((heads,), 0.9) if v.kind.minimum else None
        specs.append(LayerSpec(KeySpec(k, **basis), ValueSpec(v, clip=clip)))
    cache = CacheModel(
        num_layers=len(formats), num_heads=config.num_attention_heads, num_kv_heads=heads, head_dim=dim,
        sinks=geometry.sinks, window=geometry.window, page_tokens=geometry.page_tokens,
    )  # fmt: skip
    calibration = CalibrationModel.model_construct(covered_positions=config.max_position_embeddings)
    return Artifact(Path(), Metadata.model_construct(cache=cache, calibration=calibration), specs)


def attach_formats(model: Any, formats: list[Pair], geometry: Geometry) -> tuple[Artifact, bool]:
    """Attaches formats to a model whose baselines were measured before; also says whether the
    kernels run."""
    artifact = make_artifact(model.config, geometry, formats)
    triton = choose_triton("auto", model.device, artifact)
    if not hasattr(model, "kv_artifact"):
        attach(model, artifact, None, triton, cuda_graph=False)
    return artifact, triton


@torch.no_grad()
def fill_cache(
    cache: QuantizedKVCache, batch: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Makes a new cache look as if `tokens` tokens of `batch` sequences had gone through it.

    Pages are valid ones of random keys and values, repeated; lengths and pages are set on the
    device and on the host.
    """
    pages: dict[Pair, Tensor] = {}
    cache.shared.set_padding([0] * batch)
    gc.disable()  # millions of pages, each a tensor, and no garbage
    try:
        for layer in cache.layers:
            _fill_layer(layer, pages, batch, tokens, dtype, device)
    finally:
        gc.enable()


def _fill_layer(
    layer: Any,
    pages: dict[Pair, Tensor],
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    g = layer.geometry
    one = torch.zeros(batch, g.num_kv_heads, 1, g.head_dim, dtype=dtype, device=device)
    layer.lazy_initialization(one, one)
    formats = (layer.spec.key.format, layer.spec.value.format)
    if formats not in pages:
        pages[formats] = random_pages(g, formats, DISTINCT, device)
    for b in range(batch):
        layer.table.append(b, g.num_pages(tokens))
    numbers = [number for ids in layer.table.pages() for number in ids]
    for start in range(0, len(numbers), len(pages[formats])):
        part = layer.table.pool.readable(numbers[start : start + len(pages[formats])])
        torch._foreach_copy_(part, list(pages[formats][: len(part)]))
    layer.window.keys.normal_()
    layer.window.values.normal_()
    layer.count(tokens)
    for b, sequence in enumerate(layer.table.sequences):
        sequence.set_length(tokens)
        layer.table.note_state(b)
