"""Generation through the packed cache: every way of feeding a sequence gives the same, row by
row."""

import pytest
import torch
from conftest import char_tokenizer, families, save_tiny

from kvfold import KVBudgetExceeded, KvfoldError, runtime
from kvfold.compress.cli.table import describe
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.account import cache_nbytes
from kvfold.exports.page.report import account_parts
from kvfold.runtime.load import plain_cache

TEXT = "the cache of a long sequence holds keys and values for every token that was read before and after it all"
# where every layer slides, hardly more than the 16-bit rows is cached at all
BUDGETS = {"phi3": "15.0"}
SLIDING = {
    "phi3": [60] * 3,
    "gemma2": [0, 40, 0],
    "gemma3_text": [40, 0, 40],
    "gpt_oss": [40, 0, 40],
    "smollm3": [0, 0, 40],
}


@pytest.fixture(scope="module", params=families("qwen2", "qwen3"))  # tiny_artifact is a Llama
def model(request, tmp_path_factory, text_file, recipe_file):
    folder = tmp_path_factory.mktemp(request.param)
    source = save_tiny(folder / "model", request.param)
    compress(
        str(source), BUDGETS.get(request.param, "4.0"), folder / "artifact", calib=str(text_file),
        recipe=load_recipe(recipe_file),
    )  # fmt: skip
    return runtime.load_pretrained(folder / "artifact", device="cpu")


def ids(text=TEXT):
    return char_tokenizer()(text, return_tensors="pt").input_ids


def rms_ratio(a, b):
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@pytest.fixture
def precise(model):
    """(the model in float64, how far apart two orders of its sums may be). In float32 a random
    model amplifies what lies on a quantiser's edge; gpt-oss's experts know no float64, and are
    compared in the mean."""
    if model.config.model_type == "gpt_oss":
        yield model, 0.02
        return
    yield model.double(), 1e-3
    model.float()


@torch.no_grad()
def test_a_plain_forward_reads_back_what_a_token_at_a_time_reads(precise):
    model, bound = precise
    tokens = ids()
    out = model(tokens)
    assert isinstance(out.past_key_values, runtime.QuantizedKVCache)
    packed, geometry = out.past_key_values, model.kv_artifact.geometry
    assert [layer.table.state[0].tolist() for layer in packed.layers] == [[104, 9]] * 3
    held = [  # by a query where a crop may come back to
        9 - (104 - geometry.rollback - sliding + 1 - 3) // 8 if sliding else 9
        for sliding in SLIDING.get(model.config.model_type, [0] * 3)
    ]
    assert [layer.num_pages() for layer in packed.layers] == held
    assert packed.nbytes == cache_nbytes(geometry, packed.formats, 104)
    cache, steps = None, []
    for t in range(tokens.shape[1]):
        step = model(tokens[:, t : t + 1], past_key_values=cache)
        cache = step.past_key_values
        steps.append(step.logits)
    assert rms_ratio(torch.cat(steps, 1), out.logits) < bound
    assert rms_ratio(steps[-1], out.logits[:, -1:]) < bound
    with plain_cache(model):
        reference = model(tokens).logits
    assert (
        rms_ratio(out.logits, reference) > 0.02
    )  # quantised values were read, not the 16-bit ones
    assert rms_ratio(model(tokens, use_cache=False).logits, out.logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("chunk", [7, 40])  # of one token: above
def test_chunked_prefill_equals_one_shot(precise, chunk):
    model, tolerance = precise
    tokens = ids()
    whole = model(tokens).logits[:, -1]
    cache = None
    for part in tokens.split(chunk, 1):
        out = model(part, past_key_values=cache)
        cache = out.past_key_values
    assert rms_ratio(out.logits[:, -1], whole) < tolerance


@torch.no_grad()
def test_left_padding_gives_each_row_what_it_gives_alone(model):
    tokenizer = char_tokenizer()
    tokenizer.padding_side = "left"
    texts = [TEXT, TEXT[11:60], TEXT[:5], TEXT[30:]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    out = model(**batch)
    for b, text in enumerate(texts):
        alone = model(ids(text))
        assert rms_ratio(out.logits[b, -len(text) :], alone.logits[0]) < 0.02
        assert (
            out.past_key_values.layers[1].table.state[b].tolist()
            == alone.past_key_values.layers[1].table.state[0].tolist()
        )
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)
    for b, text in enumerate(texts):
        alone = model.generate(ids(text), max_new_tokens=6, do_sample=False)
        assert together[b, -6:].tolist() == alone[0, -6:].tolist()


@torch.no_grad()
def test_padding_longer_than_a_prefill_chunk(model):
    tokenizer = char_tokenizer()
    tokenizer.padding_side = "left"
    batch = tokenizer([TEXT, TEXT[:20]], return_tensors="pt", padding=True)
    cache = None
    for start in range(0, batch.input_ids.shape[1], 30):
        part = slice(start, start + 30)
        seen = batch.attention_mask[:, : start + 30]
        places = (seen.cumsum(-1) - 1).clamp_min(0)[:, part]
        out = model(
            batch.input_ids[:, part],
            attention_mask=seen,
            position_ids=places,
            past_key_values=cache,
        )
        cache = out.past_key_values
    assert cache.layers[0].lengths() == [len(TEXT), 20]
    assert rms_ratio(out.logits[1, -1], model(ids(TEXT[:20])).logits[0, -1]) < 0.02


@torch.no_grad()
def test_generate_modes(model):
    tokens = ids(TEXT[:70])
    greedy = model.generate(
        tokens, max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    assert isinstance(greedy.past_key_values, runtime.QuantizedKVCache)
    chunked = model.generate(tokens, max_new_tokens=12, do_sample=False, prefill_chunk_size=16)
    assert chunked[0, 70] == greedy.sequences[0, 70]
    one_beam = model.generate(tokens, max_new_tokens=12, do_sample=False, num_beams=1)
    assert torch.equal(one_beam, greedy.sequences)
    assert model.generate(
        tokens, max_new_tokens=5, num_beams=3, do_sample=False, num_return_sequences=3
    ).shape == (
        3,
        75,
    )
    torch.manual_seed(0)
    first = model.generate(tokens, max_new_tokens=8, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    assert torch.equal(
        first, model.generate(tokens, max_new_tokens=8, do_sample=True, num_return_sequences=2)
    )
    assert not torch.equal(first[0], first[1])


@torch.no_grad()
def test_a_cache_goes_on_over_turns(model):
    tokens = ids()
    cache = model(tokens[:, :50]).past_key_values
    out = model(tokens[:, 50:], past_key_values=cache)
    assert out.past_key_values is cache and cache.get_seq_length() == tokens.shape[1]
    assert rms_ratio(out.logits[:, -1], model(tokens).logits[:, -1]) < 0.03


def test_options_that_do_not_exist_are_refused(model, tiny_artifact, monkeypatch):
    with pytest.raises(KvfoldError, match="cache_implementation='static'"):
        model.generate(ids(), max_new_tokens=2, cache_implementation="static")
    for option, value in (("policy", "progressive"), ("attention", "flash"), ("kv_budget", "much")):
        with pytest.raises(KvfoldError, match=value):
            runtime.load_pretrained(tiny_artifact, **{option: value})
    with pytest.raises(KvfoldError, match="too small"):
        runtime.load_pretrained(tiny_artifact, kv_budget="1KiB")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        KvfoldError, match=r"attention='triton' can't be used: the kernels need a CUDA device"
    ):
        runtime.load_pretrained(tiny_artifact, device="cpu", attention="triton")
    with pytest.raises(KvfoldError, match="cuda_graph=True needs a CUDA device"):
        runtime.load_pretrained(tiny_artifact, device="cpu", cuda_graph=True)


@torch.no_grad()
def test_a_budget_stops_generation_before_it_is_passed(tiny_artifact):
    model = runtime.load_pretrained(tiny_artifact, device="cpu", kv_budget="24KiB")
    with pytest.raises(KVBudgetExceeded, match="24576"):
        model.generate(ids(), max_new_tokens=300, do_sample=False)


@torch.no_grad()
def test_bfloat16_and_float32_agree(tiny_artifact):
    wide = runtime.load_pretrained(tiny_artifact, device="cpu")
    narrow = runtime.load_pretrained(tiny_artifact, device="cpu", dtype=torch.bfloat16)
    assert (
        next(wide.parameters()).dtype == torch.float32
        and next(narrow.parameters()).dtype == torch.bfloat16
    )
    tokens = ids()
    assert rms_ratio(narrow(tokens).logits.float(), wide(tokens).logits) < 0.3
    assert narrow(tokens).past_key_values.nbytes == wide(tokens).past_key_values.nbytes


@torch.no_grad()
def test_saving_keeps_the_class_name(tiny_artifact, tmp_path):
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    model.config.save_pretrained(tmp_path)
    assert '"LlamaForCausalLM"' in (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_what_the_allocator_budgets_is_stated_shown_and_resident(model):
    """The account of an artifact whose layers slide, wherever it is told, and a cache that is
    really filled."""
    metadata = model.kv_artifact.metadata
    account, geometry = metadata.account, metadata.geometry
    assert list(geometry.sliding) == SLIDING.get(model.config.model_type, [])
    assert metadata.format_version == 5
    shown = describe(metadata)
    assert (
        shown["bytes"]
        == account.bytes
        == sum(nbytes for _, _, nbytes in account_parts(metadata))
        <= metadata.budget.bytes
    )
    sides = sum(layer[side]["bytes"] for layer in shown["layers"] for side in ("key", "value"))
    assert sides == account.page_bytes
    assert (
        shown["bytes_16bit"] == account.bytes_16bit
        and shown["effective_bits"] == account.effective_bits
    )
    tokens = torch.randint(0, 128, (1, 512), generator=torch.Generator().manual_seed(0))
    cache = model(tokens).past_key_values
    assert cache.nbytes == account.bytes_at["512"] == describe(metadata, 512)["bytes"]
    rows = cache.report()
    assert sum(row["bytes"] for row in rows) == cache.nbytes
    elements = [2 * 2 * 16 * min(512, sliding or 512) for sliding in geometry.sliding or [0] * 3]
    assert [row["effective_bits"] for row in rows] == [
        8 * row["bytes"] / n for row, n in zip(rows, elements, strict=True)
    ]


@torch.no_grad()
def test_positions_beyond_the_calibrated_ones_are_named_once(
    tmp_path, tiny_folder, text_file, recipe_file, caplog
):
    artifact = compress(
        str(tiny_folder),
        "4.0",
        tmp_path / "out",
        calib=str(text_file),
        recipe=load_recipe(recipe_file),
        context=300,
    )
    covered = artifact.metadata.calibration.covered_positions
    assert 300 <= covered < 2048
    model = runtime.load_pretrained(artifact.path, device="cpu")
    tokens = torch.randint(1, 128, (1, covered + 2), generator=torch.Generator().manual_seed(0))
    said = []
    cache = None
    with caplog.at_level("WARNING", logger="kvfold"):
        for part in (
            slice(0, covered),
            slice(covered, covered + 1),
            slice(covered + 1, covered + 2),
        ):
            cache = model(tokens[:, part], past_key_values=cache).past_key_values
            said.append(caplog.text.count(f"calibrated for positions up to {covered}"))
    assert said == [0, 1, 1]
