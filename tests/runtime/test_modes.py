"""Every way of generating, against transformers' own 16-bit cache where pages keep 16 bits, and
else against plain decoding."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import NIGHTLY, families, tiny_model
from transformers import DynamicCache

from kvfold import KvfoldError, runtime
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import sliding_windows_of
from kvfold.exports.reader import Artifact
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.runtime.load import attach

HEADS, DIM, LAYERS = 2, 16, 3
GENERATOR = torch.Generator().manual_seed(5)
RAW = LayerSpec(KeySpec(raw16(DIM)), ValueSpec(raw16(DIM)))
BASIS = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=GENERATOR))[0].contiguous()
PACKED = LayerSpec(
    KeySpec(
        Format(((8, 64), (8, 16))),
        matrix=BASIS,
        offset=torch.randn(HEADS, DIM, generator=GENERATOR),
    ),
    ValueSpec(uniform(DIM, 16)),
)
PROMPT = torch.randint(1, 128, (1, 75), generator=GENERATOR)
PROMPT[:, 40:60] = PROMPT[:, 10:30]  # something to look up
NEW = 17  # two pages and more


def packed_model(family="llama", spec=RAW, page=8, window=10, budget=None, **options):
    """A tiny model on a packed cache, as load_pretrained makes it, without a file."""
    model = tiny_model(family)
    geometry = Geometry(HEADS, DIM, 3, window, page, sliding_windows_of(model.config))
    known = SimpleNamespace(
        calibration=SimpleNamespace(covered_positions=10**9), digest=f"{family}-{page}",
        geometry=geometry, formats=[],
    )  # fmt: skip
    artifact = Artifact(Path("tiny"), known, [spec] * LAYERS)
    return attach(model, artifact, budget, **options)


class HalfCache(DynamicCache):
    """transformers' cache, of numbers rounded to float16 as ours rounds them."""

    def update(self, keys, values, layer_idx, *args, **kwargs):
        return super().update(
            keys.half().float(), values.half().float(), layer_idx, *args, **kwargs
        )


def text_16bit(family, ids, mask=None, **options):
    """What transformers itself generates."""
    model = tiny_model(family, attention="eager")
    cache = HalfCache(config=model.config)
    torch.manual_seed(1)
    return model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=NEW,
        pad_token_id=0,
        **options,
    )


def text(model, ids=PROMPT, mask=None, **options):
    torch.manual_seed(1)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, **options)


GREEDY = {"do_sample": False}
MODES = {
    "greedy": GREEDY,
    "chunks": {**GREEDY, "prefill_chunk_size": 16},
    "beams": {**GREEDY, "num_beams": 3},
    "beams returned": {**GREEDY, "num_beams": 4, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
    "sampled beams": {"do_sample": True, "num_beams": 2, "temperature": 0.8},
    "lookup": {**GREEDY, "prompt_lookup_num_tokens": 12},
    "penalty": {**GREEDY, "repetition_penalty": 1.3},
}


@torch.no_grad()
@pytest.mark.parametrize("family", families("qwen2"))
def test_pages_of_16_bits_generate_what_transformers_generates(family):
    model, wanted = packed_model(family), {}
    for name, options in MODES.items():
        found = text(model, **options)
        plain = {
            k: v
            for k, v in options.items()
            if k not in ("prefill_chunk_size", "prompt_lookup_num_tokens")
        }
        key = str(plain)  # the same for a prompt in chunks, and for drafts of it
        if key not in wanted:
            wanted[key] = text_16bit(family, PROMPT, **plain)
        assert torch.equal(found, wanted[key]), name


@torch.no_grad()
@pytest.mark.parametrize("spec", [RAW, PACKED], ids=["raw", "packed"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_assisted_text_is_greedy_text(family, spec):
    """Drafts from a smaller 16-bit model, from a packed one, and from the prompt; hardly any is
    right, so crops are many."""
    model = packed_model(family, spec)
    greedy = text(model, **GREEDY)
    assert torch.equal(
        text(model, prompt_lookup_num_tokens=20, max_matching_ngram_size=1, **GREEDY), greedy
    )
    schedules = ("constant", "heuristic")
    for i, assistant in enumerate(
        (
            tiny_model("llama", seed=3),
            packed_model("gemma3_text", PACKED),
            packed_model(family, spec),
        )
    ):
        # each assistant meets both, on raw pages the one and on packed pages the other
        for schedule in schedules if NIGHTLY else (schedules[(i + (spec is RAW)) % 2],):
            assistant.generation_config.num_assistant_tokens = 7
            assistant.generation_config.num_assistant_tokens_schedule = schedule
            assistant.generation_config.assistant_confidence_threshold = 0.0
            out = text(model, assistant_model=assistant, return_dict_in_generate=True, **GREEDY)
            assert torch.equal(out.sequences, greedy)
            assert out.past_key_values.get_seq_length() == PROMPT.shape[1] + NEW - 1
    assert out.past_key_values.geometry.rollback >= 7


def left_padded(lengths):
    """ids and mask of random rows of these lengths."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, n in enumerate(lengths):
        ids[b, -n:] = torch.randint(1, 128, (n,), generator=torch.Generator().manual_seed(n))
        mask[b, -n:] = 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("spec", [RAW, PACKED], ids=["raw", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt_oss"])
@pytest.mark.parametrize(
    "options", [GREEDY, {**GREEDY, "num_beams": 2}, {**GREEDY, "prefill_chunk_size": 20}]
)
def test_rows_of_a_left_padded_batch_are_each_row_alone(family, spec, options):
    model = packed_model(family, spec)
    lengths = [75, 31, 2, *([52] if NIGHTLY or options is GREEDY else [])]
    ids, mask = left_padded(lengths)
    together = text(model, ids, mask, **options)
    for b, n in enumerate(lengths):
        alone = text(model, ids[b : b + 1, -n:], **options)
        assert together[b, -NEW:].tolist() == alone[0, -NEW:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3"])
def test_beams_do_not_depend_on_the_size_of_pages(family):
    found = [text(packed_model(family, RAW, page), num_beams=3, **GREEDY) for page in (8, 16, 24)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.no_grad()
@pytest.mark.parametrize("family", families("qwen3"))
def test_beams_of_packed_pages_are_those_of_a_pass_over_the_whole_text(family):
    """Without a cache each step reads the text anew, quantised in the same places."""
    model = packed_model(family, PACKED)
    assert torch.equal(
        text(model, num_beams=3, **GREEDY), text(model, num_beams=3, use_cache=False, **GREEDY)
    )


@torch.no_grad()
@pytest.mark.parametrize("family", families("mistral"))
def test_crop_and_continue_is_never_having_generated(family):
    """With both signs, over page boundaries, again and again: not a bit of the tokens that were
    taken back is left."""
    model = packed_model(family, PACKED, rollback=40)
    fresh = model(PROMPT).past_key_values
    used = model(PROMPT).past_key_values
    lengths = [8, 1, 16, 23, 40]
    for i, tokens in enumerate(lengths):
        for part in torch.randint(
            1, 128, (1, tokens), generator=torch.Generator().manual_seed(i)
        ).split(5, 1):
            model(part, past_key_values=used)
        used.crop(-tokens if i % 2 else PROMPT.shape[1])
    assert used.get_seq_length() == fresh.get_seq_length() == 75
    slides = bool(
        model.kv_artifact.geometry.sliding
    )  # what a window has once left behind does not come back, nor is it read
    assert used.nbytes < fresh.nbytes if slides else used.report() == fresh.report()
    goes_on = torch.randint(1, 128, (1, 30), generator=torch.Generator().manual_seed(99))
    for part in (goes_on[:, :1], goes_on[:, 1:20], goes_on[:, 20:21], goes_on[:, 21:]):
        assert torch.equal(
            model(part, past_key_values=used).logits, model(part, past_key_values=fresh).logits
        )


@torch.no_grad()
def test_a_rollback_takes_its_rows_and_nothing_else():
    plain, longer = packed_model(spec=PACKED), packed_model(spec=PACKED, rollback=20)
    out, other = (model(PROMPT) for model in (plain, longer))
    assert torch.equal(out.logits, other.logits)
    rows = 40 - 24  # 10 + 8 + 20 tokens in pages of 8, and 10 + 8
    assert (
        other.past_key_values.nbytes - out.past_key_values.nbytes
        == LAYERS * rows * HEADS * DIM * 2 * 2
    )


def test_a_rollback_that_is_no_number_of_tokens_is_refused(tiny_artifact):
    for wrong in (-1, True, 2.5, "8"):
        with pytest.raises(KvfoldError, match=f"rollback={wrong!r}"):
            runtime.load_pretrained(tiny_artifact, device="cpu", rollback=wrong)
    model = runtime.load_pretrained(tiny_artifact, device="cpu", rollback=5)
    assert model(PROMPT).past_key_values.geometry.rollback == 5


def turns_in_one_cache(model):
    """The cache behind four turns of a conversation, each of them as without it."""
    turns = [PROMPT, *torch.randint(1, 128, (3, 1, 13), generator=torch.Generator().manual_seed(2))]
    cache, ids = None, torch.zeros(1, 0, dtype=torch.long)
    for turn in turns:
        ids = torch.cat((ids, turn), 1)
        out = model.generate(
            ids, past_key_values=cache, max_new_tokens=9, return_dict_in_generate=True, **GREEDY
        )
        assert torch.equal(out.sequences, model.generate(ids, max_new_tokens=9, **GREEDY))
        ids, cache = out.sequences, out.past_key_values
    return cache


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_turns_of_a_conversation_go_on_in_one_cache(family):
    model = packed_model(family, PACKED)
    cache = turns_in_one_cache(model)
    nbytes = cache.nbytes
    cache.reset()
    assert cache.nbytes == 0 < nbytes and cache.get_seq_length() == 0
    again = model.generate(PROMPT, past_key_values=cache, max_new_tokens=9, **GREEDY)
    assert torch.equal(again, model.generate(PROMPT, max_new_tokens=9, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_chosen_and_repeated_go_on_as_themselves(family):
    model = packed_model(family, PACKED)
    lengths = [60, 33, 47]
    ids, mask = left_padded(lengths)
    more = torch.randint(1, 128, (5, 20), generator=torch.Generator().manual_seed(7))
    cache = model(ids, attention_mask=mask).past_key_values
    cache.batch_repeat_interleave(2)
    chosen = torch.tensor([4, 0, 3, 3, 5])  # of 0 0 1 1 2 2
    cache.batch_select_indices(chosen)
    rows = [[0, 0, 1, 1, 2, 2][i] for i in chosen.tolist()]
    seen = torch.cat((mask[rows], torch.ones_like(more)), 1)
    together = model(more, attention_mask=seen, past_key_values=cache).logits
    for b, row in enumerate(rows):
        alone = model(torch.cat((ids[row : row + 1, -lengths[row] :], more[b : b + 1]), 1)).logits[
            :, -20:
        ]
        torch.testing.assert_close(
            together[b : b + 1], alone, rtol=0, atol=0.02 * float(alone.std())
        )
    assert cache.layers[1].lengths() == [lengths[row] + 20 for row in rows]


# -- forks


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_forks_go_on_by_themselves_and_share_their_pages(family):
    model = packed_model(family, PACKED)
    prefix = torch.randint(1, 128, (2, 150), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(prefix)
    mask[1, :21] = 0
    cache = model(prefix, attention_mask=mask).past_key_values
    before, pages = cache.nbytes, [layer.num_pages() for layer in cache.layers]
    forks = cache.fork(3)
    own = sum(
        x.nbytes
        for layer in cache.layers
        for x in (
            layer.window.keys,
            layer.window.values,
            layer.table.state,
            layer.table.block_table,
        )
    )
    assert [fork.nbytes for fork in forks] == [before] * 3 and cache.nbytes == before
    assert runtime.resident_nbytes([cache, *forks]) == before + 3 * own
    assert [len(layer.table.pool) for layer in cache.layers] == pages
    ends = torch.randint(1, 128, (4, 2, 40), generator=torch.Generator().manual_seed(8))
    seen = torch.cat((mask, torch.ones(2, 40, dtype=torch.long)), 1)
    for part in (
        slice(0, 1),
        slice(1, 30),
        slice(30, 40),
    ):  # in turns, so that one could disturb another
        outs = [
            model(end[:, part], attention_mask=seen[:, : 150 + part.stop], past_key_values=fork)
            for end, fork in zip(ends, [cache, *forks], strict=True)
        ]
        for end, out in zip(ends, outs, strict=True):
            fresh = model(prefix, attention_mask=mask).past_key_values
            for start in (0, 1, 30):
                if start < part.stop:
                    stop = {0: 1, 1: 30, 30: 40}[start]
                    alone = model(
                        end[:, start:stop],
                        attention_mask=seen[:, : 150 + stop],
                        past_key_values=fresh,
                    )
            assert torch.equal(out.logits, alone.logits)
    forks[0].crop(2)
    forks[1].batch_select_indices(torch.tensor([1]))
    del outs, out
    shared = {id(layer.table.pool) for x in (cache, *forks) for layer in x.layers}
    assert len(shared) == LAYERS
    pools = [layer.table.pool for layer in cache.layers]
    forks[2].reset()
    cache.reset()
    del forks, cache
    assert [len(pool) for pool in pools] == [0] * LAYERS  # the last owner is gone


def test_a_fork_of_nothing():
    cache = packed_model().new_kv_cache()
    with pytest.raises(KvfoldError, match=r"fork\(0\)"):
        cache.fork(0)
    [other] = cache.fork(1)
    assert other.nbytes == 0 and other.get_seq_length() == 0


# -- a cache on disk


@torch.no_grad()
@pytest.mark.parametrize("family", families("llama"))
@pytest.mark.parametrize("rollback", [0, 20])
def test_a_restored_cache_goes_on_bit_for_bit(family, rollback, tmp_path):
    model = packed_model(family, PACKED, rollback=rollback)
    ids, mask = left_padded([90, 33, 2])
    cache = model(ids, attention_mask=mask).past_key_values
    for _ in range(7):
        mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 1, 2, 0]))
    mask = mask[[0, 1, 2, 0]]
    cache.save(tmp_path / "prefix.kv")
    assert [file.name for file in tmp_path.iterdir()] == ["prefix.kv"]
    again = runtime.load_cache(tmp_path / "prefix.kv", model)
    assert again.report() == cache.report() and again.nbytes == cache.nbytes
    again.save(tmp_path / "again.kv")
    assert (tmp_path / "prefix.kv").read_bytes() == (tmp_path / "again.kv").read_bytes()
    if rollback:
        cache.crop(-20)
        again.crop(-20)
        mask = mask[:, :-20]
    more = torch.randint(1, 128, (4, 30), generator=torch.Generator().manual_seed(3))
    for part in (slice(0, 1), slice(1, 25), slice(25, 26), slice(26, 30)):
        mask = torch.cat((mask, torch.ones(4, part.stop - part.start, dtype=torch.long)), 1)
        outs = [
            model(more[:, part], attention_mask=mask, past_key_values=x) for x in (cache, again)
        ]
        assert torch.equal(outs[0].logits, outs[1].logits)


@torch.no_grad()
def test_a_file_that_is_no_fitting_cache_is_refused(tmp_path):
    model = packed_model(spec=PACKED)
    path = tmp_path / "prefix.kv"
    with pytest.raises(KvfoldError, match="holds no tokens"):
        model.new_kv_cache().save(path)
    cache = model(PROMPT).past_key_values
    cache.save(path)
    data = path.read_bytes()

    def refused(words, loader=model):
        with pytest.raises(KvfoldError, match=words) as caught:
            runtime.load_cache(path, loader)
        assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0

    refused("cache of another artifact", packed_model(spec=PACKED, page=16))
    refused("kv_budget is 5000", packed_model(spec=PACKED, budget=5000))
    refused("one is not", tiny_model("llama"))
    for at in range(10, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        refused("cache")
        path.write_bytes(data[:at])
        refused("cache")
    path.write_bytes(data.replace(b'\\"version\\": 1', b'\\"version\\": 3'))
    refused("version 3, but this kvfold reads 1 and 2")
    path.unlink()
    refused("is no file")
    with pytest.raises(KvfoldError, match="cannot be written"):
        cache.save(tmp_path / "no" / "such" / "folder.kv")
    cache.artifact = None
    with pytest.raises(KvfoldError, match="belongs to no artifact"):
        cache.save(path)
    assert list(tmp_path.iterdir()) == []


# -- bad input


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_nan_is_reported_and_the_cache_goes_on(family):
    model = packed_model(family, PACKED)
    cache, fresh = model(PROMPT).past_key_values, model(PROMPT).past_key_values
    weight = model.base_model.layers[1].self_attn.v_proj.weight
    whole = weight.clone()
    weight[0] = float("nan")
    for tokens in (1, 3):
        with pytest.raises(
            FloatingPointError, match=r"Layer 1 computed a value .* at position 75 of sequence 0"
        ):
            model(PROMPT[:, :tokens], past_key_values=cache)
    weight.copy_(whole)
    assert [layer.columns for layer in cache.layers] == [75] * LAYERS
    assert torch.equal(
        model(PROMPT[:, :1], past_key_values=cache).logits,
        model(PROMPT[:, :1], past_key_values=fresh).logits,
    )
    cache.layers[0].update(
        *torch.randn(2, 1, HEADS, 1, DIM)
    )  # as a call does that fails after the first layer
    with pytest.raises(KvfoldError, match="layers of 76 and of 77 tokens"):
        model(PROMPT[:, :1], past_key_values=cache)


@torch.no_grad()
def test_tokens_past_the_models_maximum_are_transformers_own_affair():
    model = packed_model()
    model.config.max_position_embeddings = 80
    assert torch.equal(text(model, **GREEDY), text_16bit("llama", PROMPT, **GREEDY))  # 99 tokens


@torch.no_grad()
def test_drafting_on_a_cache_that_holds_tokens_is_refused():
    """transformers gives it the whole text, as it does to its own cache; that went wrong in
    silence."""
    model = packed_model(spec=PACKED)
    cache = model(PROMPT[:, :50]).past_key_values
    for options in (
        {"prompt_lookup_num_tokens": 5},
        {"assistant_model": tiny_model("llama", seed=3)},
    ):
        with pytest.raises(KvfoldError, match=r"a cache that holds tokens \(50\)"):
            text(model, past_key_values=cache, **options, **GREEDY)
    assert torch.equal(text(model, past_key_values=cache, **GREEDY), text(model, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_that_knew_no_rollback_learns_it(family):
    model = packed_model(family, PACKED)
    fresh, used = model(PROMPT).past_key_values, model(PROMPT).past_key_values
    more = torch.randint(1, 128, (1, 60), generator=torch.Generator().manual_seed(4))
    used.extend_rollback(19)
    model(more[:, 20:39], past_key_values=used)
    used.crop(-19)
    for part in (more[:, :1], more[:, 1:]):
        assert torch.equal(
            model(part, past_key_values=used).logits, model(part, past_key_values=fresh).logits
        )
