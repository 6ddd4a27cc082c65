"""The rotating mean in the kernels against the plain-torch reference: prompts, steps, chunks, every
size of page."""

import pytest
import torch

from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, uniform
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.cache.cache import QuantizedKVCache

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, GROUP = 1, 2


def spec_of(dim, rotated, size, pairs="halves"):
    """Keys with a mean `size` times as large as their noise, in a basis of their own."""
    g = torch.Generator().manual_seed(dim)
    matrix = torch.linalg.qr(torch.randn(HEADS, dim, dim, generator=g))[0].contiguous()
    omega = tuple((100.0 ** (-torch.arange(rotated) / rotated)).tolist())
    offset = size * torch.randn(HEADS, dim, generator=g)
    return LayerSpec(
        KeySpec(Format(((dim, 64),)), (), matrix, offset, frequencies=omega, pairs=pairs),
        ValueSpec(uniform(dim, 16, "fp16")),
    )


def keys_of(spec, positions, sinks, noise):
    """Keys about their rotating mean, as RoPE would have made them."""
    return spec.key.mean(positions, sinks) + noise


CASES = {
    "pages of a step": (16, 8, Geometry(HEADS, 16, 5, 20, 32), 0.0, False),
    "short pages, a partial rotation": (24, 6, Geometry(HEADS, 24, 3, 9, 8), 0.0, False),
    "pages of two steps": (16, 8, Geometry(HEADS, 16, 0, 8, 64), 0.0, False),
    "pages of a span, a soft-cap": (16, 7, Geometry(HEADS, 16, 2, 4, 128), 20.0, False),
    "adjacent pairs, a partial rotation": (24, 7, Geometry(HEADS, 24, 3, 9, 8), 0.0, False),
    "swapped pairs": (16, 8, Geometry(HEADS, 16, 5, 20, 32), 0.0, False),
    "sink logits, a window that slides": (16, 8, Geometry(HEADS, 16, 4, 16, 16, (70,)), 0.0, True),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_kernels_add_what_keys_lack(case):
    """A ragged batch of two: a prompt, steps in which pages come due, a chunk, a step; logits of a
    hundred and more."""
    dim, rotated, geometry, softcap, sink = CASES[case]
    pairs = case.split()[0] if "pairs" in case else "halves"
    spec = spec_of(dim, rotated, 6.0, pairs)
    generator = torch.Generator().manual_seed(1)
    caches = [
        QuantizedKVCache([spec], geometry, backend=backend_of(triton)) for triton in (False, True)
    ]
    mask = torch.ones(2, 400)
    mask[1, :7] = 0
    logits = torch.linspace(-1, 2, GROUP * HEADS) if sink else None
    sliding = geometry.sliding_of(0)
    start, spread = 0, []
    page = geometry.page_tokens
    for tokens in (geometry.sinks + geometry.window + page + 3, 1, 1, page + 1, 1):
        end = start + tokens
        places = (torch.arange(start, end) - torch.tensor([[0], [7]])).clamp_min(0)
        noise = torch.randn(2, HEADS, tokens, dim, generator=generator)
        keys = keys_of(spec, places, geometry.sinks, noise)
        values = torch.randn(2, HEADS, tokens, dim, generator=generator)
        query = 2 * torch.randn(2, HEADS * GROUP, tokens, dim, generator=generator)
        at, seen = torch.arange(start, end)[:, None], torch.arange(end)[None]
        visible = (seen <= at) & (seen > at - (sliding or 10**6)) & (mask[:, None, None, :end] > 0)
        outs = []
        for cache in caches:
            cache.note_padding(mask[:, :end], 2)
            view, _ = cache.update(keys.to(DEVICE), values.to(DEVICE), 0)
            aux = None if logits is None else logits.to(DEVICE)
            outs.append(
                view.attend(
                    query.to(DEVICE), 0.3, visible.to(DEVICE), softcap or None, aux, sliding
                )
                .float()
                .cpu()
            )
        kept = mask[:, start:end].bool()
        got, expected = (out.transpose(1, 2)[kept] for out in (outs[1], outs[0]))
        assert float((got - expected).norm() / expected.norm()) < 6e-3
        spread.append(float((query @ keys.repeat_interleave(GROUP, 1).mT * 0.3).abs().max()))
        start = end
    assert max(spread) > 50  # or the term would not show
    for one, two in zip(*(cache.layers for cache in caches), strict=True):
        assert one.table.state.tolist() == two.table.state.tolist()
        assert (one.window.keys.float() - two.window.keys.float()).nan_to_num().abs().max() < 2e-2
