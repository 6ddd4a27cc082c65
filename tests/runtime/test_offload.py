"""Pages in host memory: whatever is done, the cache equals one that keeps all pages on the device,
to the bit, within its budget."""

import functools
import gc
import weakref

import pytest
import torch
from conftest import CONFIGS, SHAPE, TINY_RECIPE, char_tokenizer, examples, save_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from kvfold import KvfoldError, runtime
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.errors import KVBudgetExceeded
from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.pager import Pager, PagingPool
from kvfold.runtime.cache.resident import resident_nbytes
from kvfold.runtime.calls import hooks as calls

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, DIM = 1, 8
SPECS = [
    LayerSpec(KeySpec(uniform(DIM, 16)), ValueSpec(uniform(DIM, 4))),
    LayerSpec(KeySpec(uniform(DIM, 4, "fp16", 8)), ValueSpec(uniform(DIM, 8, "e4m3", 8))),
    LayerSpec(KeySpec(raw16(DIM)), ValueSpec(raw16(DIM))),
    LayerSpec(
        KeySpec(Format(((8, 64),)), offset=torch.ones(HEADS, DIM)), ValueSpec(uniform(DIM, 2))
    ),
    LayerSpec(KeySpec(uniform(DIM, 16)), ValueSpec(uniform(DIM, 16))),
]


def pager_of(geometry, specs, chunk_pages=2, buffers=1):
    return Pager(
        [geometry.pair_nbytes(s.key.format, s.value.format) for s in specs], chunk_pages, buffers
    )


def pair_of(geometry, budget, chunk_pages=2, buffers=1, specs=SPECS):
    pager = pager_of(geometry, specs, chunk_pages, buffers)
    return QuantizedKVCache(specs, geometry), QuantizedKVCache(
        specs, geometry, budget, offload=pager
    )


def append(caches, tokens, rows, generator, pads):
    """The same tokens for both, attended to in each layer; asserts that both see the same."""
    plain, away = caches
    mask = torch.arange(plain.get_seq_length() + tokens) >= torch.tensor(pads)[:, None]
    for cache in caches:
        cache.note_padding(mask.long(), rows)
    for i in range(len(plain.layers)):
        keys, values = torch.randn(2, rows, HEADS, tokens, DIM, generator=generator) * 2
        query = torch.randn(rows, 2 * HEADS, tokens, DIM, generator=generator)
        views = [
            cache.update(keys, values, i)[0] for cache in (away, plain)
        ]  # the one that may refuse comes first
        assert away.nbytes <= away.budget and away.nbytes == walked(away)
        out, plain_out = (view.attend(query, 0.3, None) for view in views)
        assert torch.equal(plain_out, out)


def walked(cache):
    """Bytes on the device by a walk over tensors."""
    return sum(t.nbytes for layer in cache.layers for t in layer.tensors()) + sum(
        t.nbytes for t in cache.policy.pager.tensors()
    )


def check(plain, away):
    assert away.nbytes <= away.budget and away.nbytes == walked(away) == resident_nbytes([away])
    chunks = {i: len(pool.chunks) for i, pool in away.policy.pager.pools.items()}
    assert away.policy.pager.nbytes == away.policy.pager.staging(chunks)
    assert [t.numel() for stage in away.policy.pager.stages for t in stage].count(0) == 0
    assert sum(row["host_bytes"] for row in away.report()) == away.host_nbytes
    for one, other in zip(plain.layers, away.layers, strict=True):
        assert one.lengths() == other.lengths() and one.columns == other.columns
        if not one.is_initialized:
            assert not other.is_initialized
            continue
        assert one.table.state.tolist() == other.table.state.tolist()
        assert [s.oldest for s in one.table.sequences] == [s.oldest for s in other.table.sequences]
        pool = other.table.pool
        assert one.num_pages() == other.num_pages()
        if not other.table.shares_pool:
            assert set(pool.resident) | set(pool.slots) == {
                i for ids in other.table.pages() for i in ids if i >= 0
            }
        assert not set(pool.resident) & set(pool.slots) and len(set(pool.slots.values())) == len(
            pool.slots
        )
        assert sorted([*pool.slots.values(), *pool.free]) == list(
            range(len(pool.chunks) * away.policy.pager.chunk_pages)
        )
        other.table.bring()
        for b, length in enumerate(one.lengths()):
            passed = one.table.sequences[b].passed
            ids = [layer.table.pages()[b][passed:] for layer in (one, other)]
            assert len(ids[0]) == len(ids[1]) and other.table.sequences[b].passed == passed
            for x, y in zip(*ids, strict=True):
                assert torch.equal(one.table.pool.page(x), pool.page(y))
            if ids[0]:
                for x, y in zip(
                    one.held.read_pages(ids[0]), other.held.read_pages(ids[1]), strict=True
                ):
                    assert torch.equal(x, y)
            held = [
                *range(min(one.geometry.sinks, length)),
                *range(max(one.table.sequences[b].oldest, length - one.geometry.ring), length),
            ]
            slots = one.window.slots(0, length)[held]
            assert torch.equal(one.window.keys[b][:, slots], other.window.keys[b][:, slots])
            assert torch.equal(one.window.values[b][:, slots], other.window.values[b][:, slots])
            entries = other.table.block_table[b, passed : len(other.table.pages()[b])].tolist()
            assert entries == pool.addresses(ids[1])


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 130)),
        st.tuples(st.just("append"), st.integers(1, 20)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 90)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.integers(1, 3)),
        st.tuples(st.just("fork"), st.integers(1, 2)),
        st.tuples(st.just("ring"), st.integers(0, 30)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=2,
    max_size=9,
)
geometries = st.builds(
    lambda sinks, window, page, sliding, rollback: Geometry(
        HEADS, DIM, sinks, window, page, (0, sliding, 0, 0, 0), rollback
    ),
    st.sampled_from([0, 3]),
    st.sampled_from([0, 5, 10]),
    st.sampled_from([8, 16]),
    st.sampled_from([0, 19]),
    st.sampled_from([0, 7, 8, 16]),
)


@settings(
    max_examples=examples(400),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    geometry=geometries, steps=operations, seed=st.integers(0, 2**16), room=st.integers(0, 2500),
    chunk_pages=st.sampled_from([1, 2, 3]), buffers=st.sampled_from([1, 2]), pads=st.sampled_from([[0], [0, 5]]),
)  # fmt: skip
def test_any_sequence_of_operations_equals_a_cache_without(
    geometry, steps, seed, room, chunk_pages, buffers, pads
):
    generator = torch.Generator().manual_seed(seed)
    fixed = len(SPECS) * len(pads) * geometry.table_nbytes(16)
    plain, away = pair_of(geometry, fixed + 2000 + room, chunk_pages, buffers)
    rows, forks = list(pads), []
    for name, argument in [("append", 45), *steps]:
        before = plain.get_seq_length()
        if name == "append":
            try:
                append((plain, away), argument, len(rows), generator, rows)
            except KVBudgetExceeded:  # in the first layer, before anything was stored
                assert plain.get_seq_length() == away.get_seq_length() == before
        elif name == "crop":
            refused = []
            for cache in (plain, away):
                try:
                    cache.crop(-argument)
                except KvfoldError:
                    refused.append(cache)
            assert len(refused) in (0, 2)
        elif name in ("select", "repeat"):
            chosen = (
                [i % len(rows) for i in argument]
                if name == "select"
                else [i for i in range(len(rows)) for _ in range(argument)]
            )
            if len(chosen) > 4:
                continue
            try:
                away.batch_select_indices(
                    torch.tensor(chosen)
                ) if name == "select" else away.batch_repeat_interleave(argument)
            except KVBudgetExceeded:
                check(plain, away)
                continue
            plain.batch_select_indices(torch.tensor(chosen))
            rows = [rows[i] for i in chosen]
        elif name == "fork":
            pairs = list(zip(plain.fork(argument), away.fork(argument), strict=True))
            forks = [(plain, away, list(rows)), *((*pair, list(rows)) for pair in pairs[1:])][-2:]
            plain, away = pairs[0]
        elif name == "ring":
            try:
                away.extend_rollback(argument)
                plain.extend_rollback(argument)
            except KVBudgetExceeded:
                pass
        else:
            plain.reset(), away.reset()
            assert away.nbytes == away.host_nbytes == 0
        check(plain, away)
    for one, other, fork_rows in forks:
        check(one, other)
        try:
            append((one, other), 1, len(fork_rows), generator, fork_rows)
        except KVBudgetExceeded:
            continue
        check(one, other)
    check(plain, away)


# -- whole models


@pytest.fixture(scope="module")
def path(tmp_path_factory, text_file):
    """An artifact of six layers with pages of 16 tokens."""
    folder = tmp_path_factory.mktemp("offload")
    (folder / "recipe.yaml").write_text(TINY_RECIPE.replace("page_tokens: 8", "page_tokens: 16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "llama", lambda: LlamaConfig(**{**SHAPE, "num_hidden_layers": 6}))
        source = save_tiny(folder / "model")
    recipe = load_recipe(folder / "recipe.yaml")
    return compress(
        str(source), "9.0", folder / "artifact", calib=str(text_file), recipe=recipe
    ).path


@pytest.fixture
def pair(path, monkeypatch):
    """A model that keeps all pages on the device, and one that does not, whose budget `tight`
    sets."""
    monkeypatch.setattr(calls, "Pager", functools.partial(Pager, chunk_pages=2))
    load = functools.partial(runtime.load_pretrained, path, device=DEVICE, dtype=torch.float32)
    return load(), functools.partial(load, offload=True)


def tight(cache, share=0.5):
    """A budget that leaves room for a share of a cache's pages."""
    fixed = sum(t.nbytes for layer in cache.layers for t in layer.own_tensors())
    return fixed + int(share * (resident_nbytes([cache]) - fixed))


def prompts(lengths, seed=7):
    tokenizer = char_tokenizer()
    tokenizer.padding_side = "left"
    generator = torch.Generator().manual_seed(seed)
    texts = [
        "".join(chr(i) for i in torch.randint(97, 123, (n,), generator=generator).tolist())
        for n in lengths
    ]
    return tokenizer(texts, return_tensors="pt", padding=True).to(DEVICE)


MODES = {
    "greedy, padded batch": ([211, 90, 3], {}),
    "beams": ([150], {"num_beams": 3, "num_return_sequences": 2}),
    "samples": ([150], {"do_sample": True, "num_return_sequences": 3}),
    "chunks": ([190, 181], {"prefill_chunk_size": 37}),
    "prompt lookup": ([231], {"prompt_lookup_num_tokens": 3}),
}


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_text_is_the_same(pair, mode, monkeypatch):
    plain, load = pair
    lengths, options = MODES[mode]
    batch = prompts(lengths)
    options = {
        "max_new_tokens": 40,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }
    torch.manual_seed(0)
    expected = plain.generate(**batch, **options)
    # beams begin with pages of their own, which they share in the end
    model = load(kv_budget=tight(expected.past_key_values, 0.8 if mode == "beams" else 0.5))
    seen = watch(monkeypatch)
    torch.manual_seed(0)
    got = model.generate(**batch, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(x, y) for x, y in zip(got.logits, expected.logits, strict=True))
    cache = got.past_key_values
    assert seen["pushed"] > 6 and seen["brought"] > 6
    assert cache.host_nbytes > 0 and cache.nbytes < expected.past_key_values.nbytes
    if mode != "beams":  # whose rows stand twice for a moment, as on the device
        assert seen["most"] <= cache.budget


def watch(monkeypatch):
    """Counts pages that went and came, and the most bytes on the device after any of it."""
    seen = {"pushed": 0, "brought": 0, "most": 0}
    push, copy, update = PagingPool.push, Pager._copy, QuantizedKVCache.update

    def count(name, real):
        def call(*args):
            seen[name] += 1
            return real(*args)

        return call

    def measure(cache, *args, **kwargs):
        out = update(cache, *args, **kwargs)
        seen["most"] = max(seen["most"], cache.nbytes)
        return out

    monkeypatch.setattr(PagingPool, "push", count("pushed", push))
    monkeypatch.setattr(Pager, "_copy", count("brought", copy))
    monkeypatch.setattr(QuantizedKVCache, "update", measure)
    return seen


@torch.no_grad()
def test_turns_crops_forks_and_a_file(pair, tmp_path):
    plain, load = pair
    ids = prompts([233]).input_ids
    model = load(kv_budget=tight(plain(ids).past_key_values))
    caches = [m(ids[:, :190]).past_key_values for m in (plain, model)]
    assert caches[1].host_nbytes > 0

    def same(caches, part):
        logits = [
            m(part, past_key_values=c).logits for m, c in zip((plain, model), caches, strict=True)
        ]
        assert torch.equal(*logits) and caches[1].nbytes <= caches[1].budget

    same(caches, ids[:, 190:201])
    for cache in caches:
        cache.crop(-31)
    same(caches, ids[:, 170:171])
    for cache in caches:
        cache.crop(120)  # through a page in host memory
    same(caches, ids[:, 120:133])
    forks = list(zip(*(cache.fork(2) for cache in caches), strict=True))
    for i, fork in enumerate(forks):
        same(fork, ids[:, 133 + i : 172])
    same(caches, ids[:, 140:177])
    for cache, name in zip(caches, ("plain", "away"), strict=True):
        cache.save(tmp_path / name, entropy_coded=name == "away")
    again = [
        runtime.load_cache(tmp_path / "plain", plain),
        runtime.load_cache(tmp_path / "away", model),
    ]
    crossed = [
        runtime.load_cache(tmp_path / "away", plain),
        runtime.load_cache(tmp_path / "plain", model),
    ]
    assert again[1].host_nbytes > 0 and crossed[1].host_nbytes > 0
    for loaded in (again, crossed, caches):
        fresh = [cache.fork(1)[0] for cache in loaded]
        same(fresh, ids[:, 177:178])
        same(loaded, ids[:, 177:185])
    for cache in caches:
        cache.reset()
    assert caches[1].nbytes == caches[1].host_nbytes == 0
    same(caches, ids[:, :200])
    small = load(kv_budget=40_000)
    with pytest.raises(
        KVBudgetExceeded, match="on the device, with all pages in host memory, but kv_budget is"
    ):
        runtime.load_cache(tmp_path / "away", small)


@torch.no_grad()
def test_a_budget_that_even_host_memory_does_not_save(pair):
    """Refused before the prompt, with what it takes; the cache goes on."""
    plain, load = pair
    ids = prompts([233]).input_ids
    cache = plain(ids).past_key_values
    model = load(kv_budget=tight(cache, 0.1))
    with pytest.raises(
        KVBudgetExceeded,
        match=r"233 tokens in 1 sequence.* on the device, with all pages in host memory",
    ):
        model(ids)
    used = model(ids[:, :60]).past_key_values
    with pytest.raises(KVBudgetExceeded) as told:
        model(ids[:, 60:], past_key_values=used)
    need = int(str(told.value).split("a cache of ")[1].split(" bytes")[0])
    assert need > model.new_kv_cache().budget and used.get_seq_length() == 60
    enough = load(kv_budget=need)
    cache = enough(ids[:, :60]).past_key_values
    assert torch.equal(
        enough(ids[:, 60:], past_key_values=cache).logits,
        plain(ids[:, 60:], past_key_values=plain(ids[:, :60]).past_key_values).logits,
    )
    assert cache.nbytes <= need


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is none; give kv_budget"),
        ({"kv_budget": "1GiB", "policy": "progressive"}, "policy='progressive' lowers them"),
        ({"kv_budget": "1GiB", "cuda_graph": True}, "offload=True moves them"),
    ],
)
def test_what_does_not_go_with_it_is_refused(path, options, message):
    with pytest.raises(KvfoldError, match=message):
        runtime.load_pretrained(path, offload=True, **options)
    with pytest.raises(KvfoldError, match="as kv_budget fills, but there is none; give kv_budget"):
        QuantizedKVCache(SPECS, Geometry(HEADS, DIM, 3, 5, 8), offload=Pager([64]))


def test_memory_goes_with_the_cache(pair):
    plain, load = pair
    ids = prompts([233]).input_ids
    model = load(kv_budget=tight(plain(ids).past_key_values))
    gc.disable()
    try:
        cache = model(ids).past_key_values
        left = [
            weakref.ref(x)
            for x in (cache.policy.pager, cache.layers[0].table.pool, *cache.policy.pager.tensors())
        ]
        del cache
        assert len(left) > 2 and not any(
            ref() is not None for ref in left
        )  # no cycle keeps it until a collection
    finally:
        gc.enable()


@torch.no_grad()
@pytest.mark.parametrize("buffers", [1, 2])
def test_kernels_read_what_was_brought(buffers, monkeypatch):
    """Steps and a chunk of a ragged batch by the Triton kernels, whose pages are decoded in one of
    the two cases: block tables point into the staging buffers."""
    pytest.importorskip("triton")
    from kvfold.runtime.backends import triton

    TRITON = triton.TRITON
    monkeypatch.setattr(triton, "LEAST_ROWS", 1 if buffers == 2 else 256)

    geometry = Geometry(1, 16, 3, 5, 16)
    specs = [LayerSpec(KeySpec(uniform(16, 16)), ValueSpec(uniform(16, 4)))] * 4
    page = geometry.pair_nbytes(specs[0].key.format, specs[0].value.format)
    budget = 8 * geometry.table_nbytes(16) + (7 + 4 * buffers) * page
    caches = [
        QuantizedKVCache(specs, geometry, backend=TRITON),
        QuantizedKVCache(
            specs, geometry, budget, TRITON, offload=pager_of(geometry, specs, 2, buffers)
        ),
    ]
    generator = torch.Generator().manual_seed(3)
    start = 0
    for tokens in (
        54,
        1,
        1,
        1,
        2,
    ):  # pages are due at 56 in the first sequence, at 58 with the padding of the second
        mask = torch.arange(start + tokens) >= torch.tensor([[0], [2]])
        start += tokens
        for i in range(4):
            keys, values, query = (
                torch.randn(2, 1, tokens, 16, generator=generator).to(DEVICE) for _ in "kvq"
            )
            outs = []
            for cache in caches:
                cache.note_padding(mask.long(), 2)
                view = cache.update(keys, values, i)[0]
                if tokens < 54:
                    outs.append(view.attend(query, 0.3, None))
            assert not outs or torch.equal(*outs)
            assert caches[1].nbytes <= budget
    assert [len(ids) for ids in caches[1].layers[0].table.pages()] == [3, 3] and caches[
        1
    ].host_nbytes > 0
