"""What reaches attention, one case each: what falls back, what is refused, what is said once, and
what a model and a cache leave behind."""

import copy
import gc
import logging
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from differential import DIM, SPEC, VOCAB, packed_model, stock_model
from transformers import DynamicCache, StaticCache
from transformers.generation.utils import GenerationMixin

from kvfold import KvfoldError, runtime
from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import raw16
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.calls import masks
from kvfold.runtime.calls.lora import check_adapters

PATHS = ["reference", "kernels"]
IDS = torch.randint(1, VOCAB, (1, 26), generator=torch.Generator().manual_seed(2))


def model_on(path, **options):
    if path == "kernels":
        pytest.importorskip("triton")
    return packed_model("llama", path == "kernels", **options)


def warnings_of(caplog):
    return [
        x.getMessage()
        for x in caplog.records
        if x.name == "kvfold" and x.levelno == logging.WARNING
    ]


# -- masks -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_kernels_leave_a_mask_with_holes_to_the_reference_and_say_so_once(caplog):
    model = model_on("kernels")
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[:, 4:6] = 0
    cache = model(IDS[:, :10], attention_mask=mask).past_key_values
    assert not cache.shared.plain
    mask = torch.cat((mask, torch.ones(1, 1, dtype=torch.long)), 1)
    model(IDS[:, :1], attention_mask=mask, past_key_values=cache)
    assert [
        text for text in warnings_of(caplog) if "Triton kernels don't read" in text
    ] == warnings_of(caplog)
    assert len(warnings_of(caplog)) == 1
    model(IDS[:, :1], past_key_values=cache)
    assert cache.shared.plain  # the next call is the kernels' again


@torch.no_grad()
def test_the_reference_reads_pages_of_kernels_and_they_go_on_with_its():
    found = []
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, 14:17] = mask[:, 30] = 0
    for path in PATHS:
        model, logits = model_on(path, window=6), []
        cache = model(IDS).past_key_values
        for start, end, shown in (
            (0, 1, True),
            (1, 2, False),
            (2, 9, False),
            (9, 10, True),
            (10, 11, False),
        ):
            columns = cache.get_seq_length() + end - start
            own = None if shown else mask[:, :columns]
            logits.append(
                model(IDS[:, start:end], attention_mask=own, past_key_values=cache).logits
            )
        assert len(cache.layers[0].table.pages()[0]) == 3
        found.append(logits)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=0.03, rtol=0.01)


@torch.no_grad()
def test_documents_packed_in_a_row_are_refused_and_one_document_is_not():
    model, positions = model_on("reference"), torch.arange(10)[None]
    restart = torch.cat((positions[:, :6], positions[:, :4]), 1)
    with pytest.raises(KvfoldError, match="position_ids restart within a row"):
        model(IDS[:, :10], position_ids=restart, use_cache=False)
    out = model(IDS[:, :10], position_ids=positions, use_cache=False)
    want = stock_model("llama")(IDS[:, :10], position_ids=positions, use_cache=False)
    torch.testing.assert_close(out.logits, want.logits, atol=0.05, rtol=0.01)
    assert out.past_key_values is None
    # with a cache transformers lets the documents see each other, and so does the packed model
    out, want = (x(IDS[:, :10], position_ids=restart) for x in (model, stock_model("llama")))
    torch.testing.assert_close(out.logits, want.logits, atol=0.05, rtol=0.01)
    with pytest.raises(KvfoldError, match="cu_seq_lens_q"):
        model(IDS[:, :10], cu_seq_lens_q=torch.tensor([0, 4, 10]))


@torch.no_grad()
def test_masks_of_four_dimensions_must_hide_the_padding_that_is_known():
    model = model_on("reference")
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    cache = model(IDS[:, :6].repeat(2, 1), attention_mask=mask).past_key_values
    square = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    with pytest.raises(KvfoldError, match="shows columns that an earlier mask said are padding"):
        model(IDS[:, :1].repeat(2, 1), attention_mask=square, past_key_values=cache)
    square[1, :, :, :3] = False
    got = model(IDS[:, :1].repeat(2, 1), attention_mask=square, past_key_values=cache).logits
    alone = model(torch.cat((IDS[:, 3:6], IDS[:, :1]), 1)).logits[:, -1]
    torch.testing.assert_close(got[1], alone, atol=0.05, rtol=0.01)
    with pytest.raises(KvfoldError, match=r"torch\.int64; give bool"):
        model(
            IDS[:, :1].repeat(2, 1),
            attention_mask=torch.ones(2, 1, 1, 8, dtype=torch.long),
            past_key_values=cache,
        )
    for bad in ([[True]], torch.ones(1, 1, 1, 9, dtype=torch.bool), {"linear_attention": square}):
        with pytest.raises(KvfoldError, match="attention_mask"):
            model(IDS[:, :1].repeat(2, 1), attention_mask=bad, past_key_values=cache)


@torch.no_grad()
def test_a_mask_that_shows_what_lies_behind_a_sliding_window_is_refused():
    model = packed_model("gemma2")
    square = torch.ones(1, 1, 15, 15, dtype=torch.bool).tril()
    with pytest.raises(KvfoldError, match="behind the sliding window"):
        model(IDS[:, :15], attention_mask=square)
    near = square & ~square.tril(-9)
    own = {"full_attention": square, "sliding_attention": near}
    torch.testing.assert_close(
        model(IDS[:, :15], attention_mask=own).logits, model(IDS[:, :15]).logits
    )


@torch.no_grad()
def test_generate_reads_its_mask_once(monkeypatch):
    """Each reading is a wait for the device: none in a step."""
    model, reads = model_on("reference"), []
    real = masks.note
    monkeypatch.setattr(
        masks,
        "note",
        lambda mask, columns, **made: (reads.append(columns.width), real(mask, columns, **made))[1],
    )
    ids = IDS.repeat(2, 1)[:, :12]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    read = []
    visible = torch.Tensor.cumsum
    monkeypatch.setattr(
        torch.Tensor,
        "cumsum",
        lambda self, *a, **k: (read.append(self.dtype), visible(self, *a, **k))[1],
    )
    text = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert reads == list(range(12, 21)) and read.count(torch.bool) == 1
    alone = model.generate(ids[:1, 3:], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(text[0, 12:], alone[0, 9:])
    assert (
        GenerationMixin._update_model_kwargs_for_generation
        is type(model)._update_model_kwargs_for_generation
    )


def test_a_mask_that_was_written_is_read_again():
    mask = torch.ones(2, 6, dtype=torch.long)
    assert masks.read_columns(mask, 6).leads == (0, 0)
    mask[0, :2] = 0
    assert masks.read_columns(mask, 6) == (6, (2, 0), (4, 6))
    longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    masks.grown(mask, longer)
    assert getattr(longer, masks.TAG)[0] == masks.read_columns(longer.clone(), 7)
    with torch.inference_mode():
        mine = torch.ones(1, 6, dtype=torch.long)
        assert masks.read_columns(mine, 6).leads == (0,)
        made = torch.cat((mine, mine[:, :1]), 1)
        masks.grown(mine, made)
        assert getattr(made, masks.TAG) == ((7, (0,), (7,)), masks.MADE)
        mine[0, 0] = 0  # which counts no version
        assert masks.read_columns(mine, 6).leads == (1,)
    mask[1, 3] = 0  # not what `longer` was made of any more
    other = longer.clone()
    masks.grown(mask, other)
    assert not hasattr(other, masks.TAG)


# -- caches ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_a_copy_of_a_cache_has_pages_of_its_own(path):
    model = model_on(path, window=6)
    cache = model(IDS).past_key_values
    twin, shallow = copy.deepcopy(cache), copy.copy(cache)
    right = model(IDS[:, :1], past_key_values=twin).logits
    pool, other = cache.layers[0].table.pool, shallow.layers[0].table.pool
    assert len(pool) and not {x.data_ptr() for x in pool.tensors()} & {
        x.data_ptr() for x in other.tensors()
    }
    assert shallow.nbytes == cache.nbytes == sum(x.nbytes for x in shallow.layers[0].tensors())
    cache.crop(3)
    model(IDS[:, 5:20], past_key_values=cache)  # pages are freed and written anew
    assert torch.equal(model(IDS[:, :1], past_key_values=shallow).logits, right)
    for tokens in (9, 1, 8):  # the copies go on, pages and all
        steps = [model(IDS[:, :tokens], past_key_values=x).logits for x in (twin, shallow)]
        assert torch.equal(*steps)
    for broken in (cache, cache.layers[0]):
        with pytest.raises(KvfoldError):
            pickle.dumps(broken)
    with pytest.raises(KvfoldError, match=r"cache\.save"):
        pickle.dumps(cache)
    with pytest.raises(KvfoldError, match="copied by itself"):
        copy.deepcopy(cache.layers[0])


@torch.no_grad()
def test_a_copy_of_a_cache_whose_pages_may_go_to_host_memory_shares_them():
    model = packed_model("llama", window=6, budget=10_000, offload=True)
    cache = model(IDS).past_key_values
    twin = copy.deepcopy(cache)
    assert (
        twin.layers[0].table.pool is cache.layers[0].table.pool and twin.layers[0].table.shares_pool
    )
    got = [model(IDS[:, :3], past_key_values=x).logits for x in (cache, twin)]
    assert torch.equal(*got)


@torch.no_grad()
def test_another_batch_or_artifact_is_refused(tmp_path):
    model = model_on("reference")
    cache = model(IDS).past_key_values
    with pytest.raises(
        KvfoldError, match=r"2 sequence\(s\).*holds 1.*batch_repeat_interleave.*fork"
    ):
        model(IDS[:, :3].repeat(2, 1), past_key_values=cache)
    with pytest.raises(KvfoldError, match="batch_repeat_interleave"):
        model.generate(
            torch.cat((IDS, IDS[:, :2]), 1),
            past_key_values=cache,
            num_return_sequences=2,
            do_sample=True,
        )
    cache.batch_repeat_interleave(2)
    assert model(IDS[:, :3].repeat(2, 1), past_key_values=cache).logits.shape[0] == 2
    cache.artifact = "another"
    with pytest.raises(KvfoldError, match="cache of another artifact"):
        model(IDS[:, :3].repeat(2, 1), past_key_values=cache)


@torch.no_grad()
def test_a_cache_that_is_not_packed_is_named_once(caplog):
    model = model_on("reference")
    for other in (DynamicCache(), DynamicCache(), StaticCache(model.config, 64)):
        out = model(IDS, past_key_values=other)
        assert out.past_key_values is other
    model(IDS[:, :1], past_key_values=copy.deepcopy(other))
    assert warnings_of(caplog) == [
        text for text in warnings_of(caplog) if "DynamicCache of 16 bits" in text
    ]
    assert len(warnings_of(caplog)) == 1
    foreign = DynamicCache()
    foreign.update(
        torch.zeros(1, 1, 4, DIM), torch.zeros(1, 1, 4, DIM), 0
    )  # as prefix tuning passes them
    with pytest.raises(KvfoldError, match="holds 4 tokens that this model has not computed"):
        model(IDS, past_key_values=foreign)
    with runtime.plain_cache(model):
        model(IDS, past_key_values=foreign)
    with runtime.plain_cache(model):
        out = model.generate(
            IDS, max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0, do_sample=False
        )
    assert isinstance(out.past_key_values, DynamicCache)
    want = stock_model("llama").generate(IDS, max_new_tokens=3, pad_token_id=0, do_sample=False)
    assert torch.equal(out.sequences, want)
    model.train()
    assert isinstance(model(IDS).past_key_values, DynamicCache)
    assert "training mode" in warnings_of(caplog)[-1]


@torch.no_grad()
@pytest.mark.parametrize(
    "call",
    [
        lambda model, cache: model(IDS, past_key_values=cache),
        lambda model, cache: model.generate(
            IDS, past_key_values=cache, max_new_tokens=2, pad_token_id=0
        ),
    ],
    ids=["call", "generate"],
)
def test_what_is_no_cache(call):
    model = model_on("reference")
    call(model, ())
    with pytest.raises(KvfoldError, match="past_key_values is a tuple"):
        call(model, ((torch.zeros(1, 1, 4, DIM), torch.zeros(1, 1, 4, DIM)),))


def test_a_crop_behind_a_page_is_named_once_and_an_exact_one_is_not(caplog):
    def cropped(rollback, spec=SPEC):
        told = []
        geometry = Geometry(1, DIM, 3, 6, 8, rollback=rollback)
        cache = QuantizedKVCache([spec], geometry, tell=lambda key, *args: told.append(key))
        keys, values = torch.randn(2, 1, 1, 40, DIM, generator=torch.Generator().manual_seed(1))
        cache.note_padding(None, 1)
        cache.update(keys[:, :, :22], values[:, :, :22], 0)
        for t in range(22, 28):  # the 25th token pushes a page out
            cache.update(keys[:, :, t : t + 1], values[:, :, t : t + 1], 0)
        cache.crop(-7)
        return told

    assert cropped(0) == ["crop"] and not cropped(7)
    raw = LayerSpec(KeySpec(raw16(DIM)), ValueSpec(raw16(DIM)))
    assert not cropped(0, raw)  # pages of 16 bits lose nothing
    model = model_on("reference", window=6)
    with torch.no_grad():
        for _ in range(2):
            model(IDS).past_key_values.crop(-9)
            model(IDS[:, :8]).past_key_values.crop(-5)  # all in the window
    assert len(warnings_of(caplog)) == 1 and "rollback=9" in warnings_of(caplog)[0]


# -- options ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_another_attention_function_is_refused_until_it_is_set_back():
    model = model_on("reference")
    want = model(IDS).logits
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        with pytest.raises(
            KvfoldError, match=f"attn_implementation='{name}' reads no packed cache"
        ):
            model.generate(IDS, max_new_tokens=2)
        with runtime.plain_cache(model):
            assert torch.isfinite(model(IDS).logits).all()
    with runtime.plain_cache(model):
        assert model(IDS, output_attentions=True).attentions[0].shape[-1] == 26
    model.set_attn_implementation("kvfold")
    assert torch.equal(model(IDS).logits, want)


@torch.no_grad()
def test_options_that_a_packed_cache_does_not_serve():
    model = model_on("reference")
    for call in (model, lambda ids, **options: model.generate(ids, max_new_tokens=2, **options)):
        with pytest.raises(KvfoldError, match="output_attentions=True"):
            call(IDS, output_attentions=True)
    with pytest.raises(KvfoldError, match="generate_batch brings a paged"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
    model.config.is_causal = False
    with pytest.raises(KvfoldError, match="looks both ways"):
        model(IDS)


def adapter(base):
    """A model with an adapter on v_proj and on an MLP projection, as PEFT leaves it."""
    model = model_on("reference")
    config = SimpleNamespace(base_model_name_or_path=base)
    for parent, name in (
        (model.model.layers[0].self_attn, "v_proj"),
        (model.model.layers[0].mlp, "up_proj"),
    ):
        wrapped = torch.nn.Module()
        wrapped.base_layer, wrapped.lora_A = (
            getattr(parent, name),
            torch.nn.ModuleDict({"default": torch.nn.Identity()}),
        )
        wrapped.adapter_layer_names = ("lora_A",)
        wrapped.forward = wrapped.base_layer.forward
        setattr(parent, name, wrapped)
    vars(model)["peft_config"] = {"default": config}
    return model


@torch.no_grad()
def test_an_adapter_of_the_original_is_refused_before_it_is_used_or_merged():
    model = adapter("owner/original")
    with pytest.raises(
        KvfoldError, match="Adapter 'default' changes v_proj, but was trained on 'owner/original'"
    ):
        model(IDS)
    with pytest.raises(KvfoldError, match="merge it into the original"):
        list(model.modules())
    own = adapter("elsewhere/tiny")  # the artifact's own name
    assert own(IDS).logits.shape[1] == 26
    own.kv_artifact.metadata.provenance = SimpleNamespace(
        model="owner/tiny"
    )  # the original has that name, too
    with pytest.raises(KvfoldError, match="trained on 'elsewhere/tiny'"):
        own(IDS)
    plain = LayerSpec(KeySpec(raw16(DIM)), ValueSpec(raw16(DIM)))
    check_adapters(
        model, SimpleNamespace(specs=[plain], path="tiny", metadata=None)
    )  # nothing stands in another basis


# -- what is left behind ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_model_and_its_caches_go_at_once(path):
    gc.collect()
    gc.disable()
    try:
        model = model_on(path)
        left = [weakref.ref(model), weakref.ref(model.model)]
        with torch.no_grad():
            left.append(weakref.ref(model(IDS).past_key_values))
            cache = model.new_kv_cache()
            left.append(weakref.ref(cache))
            model.generate(
                IDS,
                past_key_values=cache,
                prompt_lookup_num_tokens=4,
                max_new_tokens=6,
                pad_token_id=0,
                do_sample=False,
            )
            del cache
        twin = copy.deepcopy(model)
        assert (
            twin.new_kv_cache.owner() is twin
            and twin.model._forward_pre_hooks is not model.model._forward_pre_hooks
        )
        left.append(weakref.ref(twin))
        del model, twin
        assert [x() is None for x in left] == [True] * 5
    finally:
        gc.enable()
