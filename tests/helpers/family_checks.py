"""What every family is asked: one tiny model of it through the whole product. `measure` gives
figures, which test_more_families.py has bounds for and benchmarks/families.py puts on
docs/families.md."""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import CONFIGS, save_tiny, tiny_model
from torch import Tensor

from kvfold import runtime
from kvfold.autoclass import stock_from_pretrained
from kvfold.compress.cli import describe
from kvfold.compress.fuse import scaled_norms
from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import Recipe
from kvfold.compress.search.check import Call, check_model, folds
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import (
    Architecture,
    architecture_of,
    head_dim_of,
    rotary_dim_of,
    sliding_windows_of,
)

IDS = torch.randint(
    32, 127, (2, 150), generator=torch.Generator().manual_seed(4)
)  # printable characters
PROMPT, STEPS, PADDING, CONTEXT = 100, 10, 37, 400
BOUNDS = {
    "turned": 1e-5, "algebra": 1e-9, "logits": 1e-5, "stock": 1e-5, "kl": 0.05, "decode": 0.01, "decode_kl": 0.1,
    "padding": 0.01, "bytes": 0,
}  # fmt: skip
RECIPE = Recipe.model_validate({
    "window": 24, "page_tokens": 8, "sinks": 3, "rollback": 0, "pairs": 0, "key": {"bits": [5.0], "levels": [64, 256]},
    "value": {"bits": [3.0], "levels": [64, 256]},
    "calibration": {"num_sequences": 1, "seq_len": 192, "sample_tokens": 96},
    "sensitivity": {"num_sequences": 1, "seq_len": 128, "directions": 4, "conversations": 0},
})  # fmt: skip


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def kl(expected: Tensor, found: Tensor) -> float:
    """Mean nats of KL between logits [..., vocabulary]."""
    p, q = (x.double().log_softmax(-1) for x in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def algebra(family: str) -> float:
    """How much a basis of values changes what an attention gives in float64: the largest relative
    error of all layers."""
    model = tiny_model(family, torch.float64, attention="eager")
    model.config._experts_implementation = "eager"  # grouped products have no float64
    arch, worst = architecture_of(model.config), 0.0
    if arch.value_norm:
        own = tiny_model(family, torch.float64, attention=TAP)
        norm_in_float64(own), norm_in_float64(model)
        checked = check_model(own, arch, IDS[:1], family, False)  # layers that read others' values
        worst = checked["values"]
    for index, attention in enumerate(arch.attention_modules(model)):
        fold = folds(model, arch, False, index).get("values")
        if fold is None:  # its values take no basis
            continue
        with Call(attention) as call:
            model(IDS[:1, :40], use_cache=False)
        worst = max(worst, relative(call.output(fold(attention, False)), call.output()))
    return worst


def norm_in_float64(model: Any) -> None:
    """Makes norms of values compute in the type that they are given, not in float32."""

    def forward(x: Tensor, eps: float) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    for attention in architecture_of(model.config).attention_modules(model):
        norm: Any = attention.v_norm
        norm.forward = partial(forward, eps=norm.eps)


def takes_scales(model: Any, arch: Architecture) -> bool:
    """Whether scales of pairs of keys can be folded into a model."""
    with suppress(KvfoldError):
        scaled_norms(arch.attention_modules(model)[0], arch)
        if arch.by_layer:
            return True
        return rotary_dim_of(model.config) == head_dim_of(model.config)
    return False


@torch.no_grad()
def measure(family: str, folder: Path) -> dict[str, float]:
    """Everything that BOUNDS has a bound for, and the artifact's payload bits.

    Args:
        family: one of CONFIGS.
        folder: empty; takes a text, a checkpoint and an artifact.
    """
    config = CONFIGS[family]()
    arch = architecture_of(config)
    plain = tiny_model(family, attention=TAP)
    checked = check_model(plain, arch, IDS[:1], family, takes_scales(plain, arch))
    found = {"turned": checked["turned"], "logits": checked["logits"], "algebra": algebra(family)}

    text = folder / "text.txt"
    text.write_text(
        "".join(
            map(chr, torch.randint(32, 127, (2000,), generator=torch.Generator().manual_seed(1)))
        )
    )
    source = save_tiny(folder / "model", family, torch.float32)
    windows = sliding_windows_of(config)
    budget = 9.5 + 6 * sum(map(bool, windows)) / max(
        1, len(windows)
    )  # what slides holds little but 16-bit rows
    artifact = compress(
        str(source),
        f"{budget:.2f}",
        folder / "out",
        calib=str(text),
        recipe=RECIPE,
        context=CONTEXT,
    )
    found["payload"] = artifact.metadata.account.payload_bits
    expected = tiny_model(family, attention="eager")(IDS, use_cache=False).logits
    written: Any = stock_from_pretrained(
        artifact.path, dtype=torch.float32, attn_implementation="eager"
    )
    found["stock"] = relative(written(IDS, use_cache=False).logits, expected)

    model = runtime.load_pretrained(artifact.path, device="cpu", attention="reference")
    whole = model(IDS)
    found["kl"] = kl(expected, whole.logits)
    cache = model.new_kv_cache()
    parts = [model(IDS[:, :PROMPT], past_key_values=cache).logits]
    parts += [
        model(IDS[:, t : t + 1], past_key_values=cache).logits
        for t in range(PROMPT, PROMPT + STEPS)
    ]
    stepped = torch.cat(parts, 1)
    found["decode"] = relative(stepped, whole.logits[:, : stepped.shape[1]])
    found["decode_kl"] = kl(expected[:, PROMPT : stepped.shape[1]], stepped[:, PROMPT:])
    mask = torch.ones_like(IDS)
    mask[1, :PADDING] = 0
    together, alone = model(IDS, attention_mask=mask).logits[1, PADDING:], model(IDS[1:, PADDING:])
    found["padding"] = relative(together, alone.logits[0])
    caches = {IDS.shape[1] - PADDING: alone.past_key_values, 9: model(IDS[:1, :9]).past_key_values}
    found["bytes"] = sum(
        abs(cache.nbytes - describe(artifact.metadata, tokens)["bytes"])
        for tokens, cache in caches.items()
    )
    return found
