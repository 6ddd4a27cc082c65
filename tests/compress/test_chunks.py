"""Layers that attend in chunks, and queries that grow with the position (llama4): as transformers
computes both, over several chunks."""

import json

import pytest
import torch
from conftest import CONFIGS, save_tiny, tiny_model
from family_checks import IDS, RECIPE, kl, relative
from family_configs import config_of

from kvfold import KvfoldError, runtime
from kvfold.compress.pipeline import compress
from kvfold.exports.account import batch_nbytes
from kvfold.exports.architectures import is_chunked, sliding_windows_of
from kvfold.exports.reader import read_artifact
from kvfold.exports.schema import dump_metadata
from kvfold.runtime.backends.reference import REFERENCE

pytestmark = pytest.mark.usefixtures("no_plots")
GROWING = {"floor_scale": 32, "attn_scale": 0.7}


@pytest.fixture
def packed(tmp_path, text_file, monkeypatch):
    def make(**own):
        monkeypatch.setitem(CONFIGS, "llama4_text", lambda: config_of("llama4_text", **own))
        source = save_tiny(tmp_path / "model", "llama4_text", torch.float32)
        return compress(
            str(source), "14", tmp_path / "out", calib=str(text_file), recipe=RECIPE, context=400
        )

    return make


def test_chunks_are_windows_of_another_kind():
    config = CONFIGS["llama4_text"]()
    assert sliding_windows_of(config) == (40, 40, 0, 40) and is_chunked(config)
    config.layer_types = ["full_attention"] * 4
    assert sliding_windows_of(config) == () and not is_chunked(config)


@torch.no_grad()
def test_chunks_and_growing_queries_are_transformers_own(packed):
    """In prompts, parts of any length, and padded rows, whose queries transformers has grow by
    columns."""
    artifact = packed(**GROWING)
    plain = tiny_model("llama4_text", attention="eager")
    mask = torch.ones_like(IDS)
    mask[1, :37] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = plain(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    model = runtime.load_pretrained(artifact.path, device="cpu", attention="reference")
    for sizes in ((150,), (39, 1, 1, 40, 69), (100, *[1] * 50)):
        cache, parts, seen = model.new_kv_cache(), [], 0
        for size in sizes:
            new = slice(seen, seen + size)
            parts.append(
                model(IDS[:, new], attention_mask=mask[:, : new.stop], past_key_values=cache).logits
            )
            seen += size
        found = torch.cat(parts, 1)
        assert kl(expected[0], found[0]) < 1e-3 and kl(expected[1, 37:], found[1, 37:]) < 1e-3
        formats = artifact.formats
        assert cache.nbytes == batch_nbytes(cache.geometry, formats, [150, 113])
    unlike = plain(IDS[1:, 37:], use_cache=False).logits[0]
    assert relative(expected[1, 37:], unlike) > 1e-3  # the queries of the test do grow


@torch.no_grad()
def test_kernels_compute_the_first_chunk_alone(packed, monkeypatch):
    """The reference, which reads masks, computes what comes later in layers with chunks."""
    artifact = packed()
    asked, attend = [], type(REFERENCE).attend
    monkeypatch.setattr(
        type(REFERENCE),
        "attend",
        lambda self, layer, *args: asked.append(layer.layer_idx) or attend(self, layer, *args),
    )
    model = runtime.load_pretrained(artifact.path, device="cpu", attention="triton")
    cache = model.new_kv_cache()
    first = model(IDS[:1, :39], past_key_values=cache).logits
    assert not asked
    model(IDS[:1, 39:40], past_key_values=cache)
    assert not asked
    second = model(IDS[:1, 40:43], past_key_values=cache).logits
    last = model(IDS[:1, 43:44], past_key_values=cache).logits
    assert asked == [0, 1, 3, 0, 1, 3]
    expected = tiny_model("llama4_text", attention="eager")(IDS[:1, :44], use_cache=False).logits
    for found, part in ((first, slice(39)), (second, slice(40, 43)), (last, slice(43, 44))):
        assert kl(expected[:, part], found) < 1e-3


def test_what_chunks_do_not_allow_is_refused(packed):
    artifact = packed()
    with pytest.raises(KvfoldError, match="counts the tokens of each step there; leave cuda_graph"):
        runtime.load_pretrained(artifact.path, device="cpu", cuda_graph=True)
    fields = json.loads((artifact.path / "kv_cache.json").read_text())
    assert fields["format_version"] == 7 and fields["cache"]["chunked"] is True
    cache = artifact.metadata.cache.model_copy(update={"chunked": False})
    changed = artifact.metadata.model_copy(update={"cache": cache, "format_version": 5})
    (artifact.path / "kv_cache.json").write_text(dump_metadata(changed))
    with pytest.raises(KvfoldError, match="differ in whether layers attend in chunks"):
        read_artifact(artifact.path)
