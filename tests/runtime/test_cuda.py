"""The same artifact on a GPU: compress, load and generate there, and agree with the CPU."""

import gc
import logging
import weakref
from functools import partial

import pytest
import torch
from conftest import TINY_RECIPE, char_tokenizer, save_tiny

from kvfold import runtime
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports import account
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import uniform
from kvfold.runtime import attachment
from kvfold.runtime.backends.reference import REFERENCE
from kvfold.runtime.backends.triton import TRITON
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.layer import PackedLayer
from kvfold.runtime.cache.shared import SharedState
from kvfold.runtime.generate import graph as graphs
from kvfold.runtime.generate.graph import DecodingStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TEXT = "the cache of a long sequence holds keys and values for every token that was read before and after it all"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_gpu_agrees_with_cpu(family, dtype, tmp_path, text_file, recipe_file):
    source = save_tiny(tmp_path / "model", family)
    artifact = compress(
        str(source),
        "6.0",
        tmp_path / "out",
        calib=str(text_file),
        recipe=load_recipe(recipe_file),
        device="cuda",
    )
    ids = char_tokenizer()(TEXT, return_tensors="pt").input_ids
    on_cpu = runtime.load_pretrained(artifact.path, device="cpu")(ids)
    model = runtime.load_pretrained(artifact.path, device="cuda", dtype=dtype)
    out = model(ids.cuda())
    error = (
        out.logits.float().cpu() - on_cpu.logits
    ).square().mean().sqrt() / on_cpu.logits.square().mean().sqrt()
    # sums in another order tip a searched scale now and then, and with it a token's codes
    assert float(error) < (0.04 if dtype == torch.float32 else 0.3)
    assert out.past_key_values.nbytes == on_cpu.past_key_values.nbytes
    assert model.generate(ids.cuda(), max_new_tokens=40, do_sample=False).shape == (
        1,
        len(TEXT) + 40,
    )
    peak = torch.cuda.memory_allocated()
    del out
    assert torch.cuda.memory_allocated() < peak  # a cache that goes out of use frees its memory


TEXTS = ["of it", TEXT]


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_oss", "gemma3_text"])
def paths(request, tmp_path_factory, text_file):
    """One artifact of a family: plain, soft-capped with windows, sink logits with windows, windows
    alone."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "recipe.yaml").write_text(TINY_RECIPE.replace("page_tokens: 8", "page_tokens: 16"))
    source = save_tiny(folder / "model", request.param)
    recipe = load_recipe(folder / "recipe.yaml")
    return compress(
        str(source), "9.0", folder / "out", calib=str(text_file), recipe=recipe, device="cuda"
    ).path


def relative(got, expected):
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def test_keys_and_values_of_two_types(paths):
    """Under autocast RoPE leaves queries and keys in float32 and values in bfloat16."""
    model = runtime.load_pretrained(paths, device="cuda", dtype=torch.float32)
    ids = torch.randint(1, 128, (2, 70), generator=torch.Generator().manual_seed(3)).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got, _, _ = decode(model, ids, 50)
    expected, _, _ = decode(model, ids, 50)
    errors = sorted(map(relative, got, expected))
    assert errors[len(errors) // 2] < 0.3 and all(bool(x.isfinite().all()) for x in got)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-2), (torch.bfloat16, 1e-1)])
@torch.no_grad()
def test_kernels_agree_with_the_reference(paths, dtype, tolerance):
    """A ragged batch padded on the left: prompt, steps in which pages come due, a chunk, steps.

    Kernels multiply in float16. Where a model of this size makes more of that than the tolerance,
    all of it in float16 is the bound.
    """
    ids = torch.randint(1, 128, (2, 97), generator=torch.Generator().manual_seed(4)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    parts = [
        slice(0, 61),
        *(slice(t, t + 1) for t in range(61, 80)),
        slice(80, 91),
        *(slice(t, t + 1) for t in range(91, 97)),
    ]

    def run(attention, dtype):
        model = runtime.load_pretrained(paths, device="cuda", dtype=dtype, attention=attention)
        assert model.kv_triton == (attention == "triton")
        cache, logits, sizes = None, [], []
        for part in parts:
            out = model(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache)
            cache = out.past_key_values
            logits.append(out.logits[mask[:, part].bool()])
            sizes.append(cache.nbytes)
        return logits, sizes, cache

    expected, sizes, cache = run("reference", dtype)
    got, got_sizes, got_cache = run("triton", dtype)
    assert got_sizes == sizes
    if dtype == torch.float32:
        tolerance = max(tolerance, *map(relative, run("reference", torch.float16)[0], expected))
    assert max(map(relative, got, expected)) < tolerance
    for one, other in zip(cache.layers, got_cache.layers, strict=True):
        assert one.table.state.tolist() == other.table.state.tolist()


@torch.no_grad()
def test_a_graph_generates_what_the_kernels_generate(paths):
    tokenizer = char_tokenizer()
    tokenizer.padding_side = "left"
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True).to("cuda")
    options = {
        "max_new_tokens": 50,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    plain, graph = (
        runtime.load_pretrained(
            paths, device="cuda", dtype=torch.float32, attention="triton", cuda_graph=on
        ).generate(**batch, **options)
        for on in (False, True)
    )
    length = batch.input_ids.shape[1]
    for t, (got, expected) in enumerate(zip(graph.logits, plain.logits, strict=True)):
        assert relative(got, expected) < 1e-3, t
        if not torch.equal(
            graph.sequences[:, : length + t + 1], plain.sequences[:, : length + t + 1]
        ):
            top = (
                expected.topk(2).values
            )  # a near tie may be broken otherwise, and then all that follows is another text
            assert float((top[:, 0] - top[:, 1]).min()) < 1e-2
            break
    states = [
        [layer.table.state.tolist() for layer in out.past_key_values.layers]
        for out in (plain, graph)
    ]
    assert states[0] == states[1]
    assert all(
        layer.lengths() == [n for n, _ in layer.table.state.tolist()]
        for layer in graph.past_key_values.layers
    )


@torch.no_grad()
def test_a_sequences_bits_are_the_same_in_every_batch(paths):
    """From the same hidden states: one layer's attention, alone and beside a longer sequence."""
    artifact = runtime.load_pretrained(
        paths, device="cuda", attention="triton", batch_invariant=True
    ).kv_artifact
    spec, geometry = artifact.specs[0], artifact.geometry
    heads, dim, lengths = geometry.num_kv_heads, geometry.head_dim, [2777, 30011]
    alone, both = (
        PackedLayer([spec], SharedState(geometry, [0] * n, True), 0, TRITON) for n in (1, 2)
    )
    both.shared.set_padding([max(lengths) - n for n in lengths])
    prompt = [torch.randn(2, heads, max(lengths), dim, device="cuda") for _ in "kv"]
    both.update(*prompt)
    alone.update(*(x[:1, :, max(lengths) - lengths[0] :] for x in prompt))
    for _ in range(40):
        states = [torch.randn(2, n, 1, dim, device="cuda") for n in (heads, heads, 4 * heads)]
        together = both.update(*states[:2])[0].attend(states[2], 0.25, None)
        single = alone.update(*(x[:1] for x in states[:2]))[0].attend(states[2][:1], 0.25, None)
        assert torch.equal(single[0], together[0])


@pytest.mark.parametrize("graph", [False, True])
@torch.no_grad()
def test_a_value_that_is_not_finite_is_reported_before_it_is_packed(graph, tmp_path, text_file):
    """In steps that wait for nothing, captured or not; the cache then goes on from where it
    came."""
    (tmp_path / "recipe.yaml").write_text(TINY_RECIPE.replace("page_tokens: 8", "page_tokens: 16"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    path = compress(
        str(save_tiny(tmp_path / "m")), "9.0", tmp_path / "out", calib=str(text_file), recipe=recipe
    ).path
    model = runtime.load_pretrained(
        path, device="cuda", dtype=torch.float32, attention="triton", cuda_graph=graph
    )
    ids = torch.randint(1, 128, (1, 150), generator=torch.Generator().manual_seed(4)).cuda()
    cache = model.new_kv_cache()

    def step():
        t = cache.get_seq_length()
        return model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits

    model(input_ids=ids[:, :61], past_key_values=cache)
    for _ in range(5):
        step()
    assert isinstance(cache.steps.captured, DecodingStep) == graph
    weight = model.base_model.layers[1].self_attn.v_proj.weight
    whole = weight.clone()
    weight[0] = float("inf")
    step()
    weight.copy_(whole)
    with pytest.raises(
        FloatingPointError, match=r"Layer 1 computed a value .* at position 66 of sequence 0"
    ):
        for _ in range(16):
            step()
    assert (
        cache.get_seq_length() == 66
        and [layer.table.state.tolist()[0][0] for layer in cache.layers] == [66] * 3
    )
    logits = [step() for _ in range(40)][-1]
    assert relative(logits, model(input_ids=ids[:, :106]).logits[:, -1:]) < 0.05


@pytest.fixture
def captures(monkeypatch):
    """Captured steps of models loaded from here on, as they are made; none with compiled small
    operations."""
    made = []

    class Counted(DecodingStep):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self.reads)

    monkeypatch.setattr(attachment, "Decoding", partial(graphs.Decoding, capture=Counted))
    monkeypatch.setattr(graphs, "FUSE_AFTER", 10**9)
    return made


def decode(model, ids, prompt, batch_mask=None):
    """Logits of a prompt and of steps of given tokens, and the cache's bytes after each."""
    cache, found, sizes = model.new_kv_cache(), [], []
    for part in (slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, ids.shape[1]))):
        mask = None if batch_mask is None else batch_mask[:, : part.stop]
        found.append(
            model(input_ids=ids[:, part], attention_mask=mask, past_key_values=cache).logits[:, -1:]
        )
        sizes.append(cache.nbytes)
    return found, sizes, cache


def waits(model):
    """Whether a model's own code waits for the device, so that no step of it can be captured:
    experts in some releases of transformers."""
    return bool(model.kv_decoding.refused) and model.config.model_type == "gpt_oss"


@pytest.mark.parametrize("invariant", [False, True])
@torch.no_grad()
def test_a_plain_load_replays_and_captures_again_as_it_grows(
    invariant, paths, captures, monkeypatch
):
    """A ragged batch padded on the left, from two pages to more than sixteen."""
    ids = torch.randint(1, 128, (2, 320), generator=torch.Generator().manual_seed(6)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    options = {"device": "cuda", "dtype": torch.float32, "batch_invariant": invariant}
    model, other = (
        runtime.load_pretrained(paths, cuda_graph=on, **options) for on in ("auto", False)
    )
    monkeypatch.setattr(account, "LEAST_ENTRIES", 2)  # of tables that double early
    got, got_sizes, cache = decode(model, ids, 70, mask)
    if waits(model):
        assert not captures and cache.steps.captured is None
    else:
        # the first, and at 5, 9 and 17 pages
        assert len(captures) >= 4 and isinstance(cache.steps.captured, DecodingStep)
    plain, sizes, other = decode(other, ids, 70, mask)
    assert got_sizes == sizes and other.steps.captured is None
    assert max(map(relative, got, plain)) < 1e-3
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert (
            one.table.state.tolist() == two.table.state.tolist() and one.lengths() == two.lengths()
        )
        assert [s.passed for s in one.table.sequences] == [s.passed for s in two.table.sequences]
    count = len(captures)
    model(
        input_ids=ids[:, :3], past_key_values=cache
    )  # another turn, in which no tensor is replaced
    for t in range(5):
        model(input_ids=ids[:, t : t + 1], past_key_values=cache)
    assert len(captures) == count


@torch.no_grad()
def test_progressive_in_a_graph_lowers_what_the_reference_lowers(paths, captures, monkeypatch):
    """Under a budget that sends most pages down: the same bytes after every step, the same rungs,
    and near logits."""
    ids = torch.randint(1, 128, (2, 400), generator=torch.Generator().manual_seed(7)).cuda()
    least = runtime.load_pretrained(paths, device="cuda").kv_artifact
    budget = int(1.05 * account.batch_nbytes(least.geometry, least.formats, [400, 400]))
    options = {
        "device": "cuda",
        "dtype": torch.float32,
        "policy": "progressive",
        "kv_budget": budget,
    }
    model, other = (
        runtime.load_pretrained(paths, attention=name, **options) for name in ("auto", "reference")
    )
    assert model.kv_triton
    monkeypatch.setattr(account, "LEAST_ENTRIES", 2)
    got, got_sizes, cache = decode(model, ids, 70)
    assert max(got_sizes) <= budget
    assert waits(model) or (len(captures) >= 3 and isinstance(cache.steps.captured, DecodingStep))
    expected, sizes, other_cache = decode(other, ids, 70)
    assert got_sizes == sizes and sum(layer.table.pool.counts[0] for layer in cache.layers) > 0
    for one, two in zip(cache.layers, other_cache.layers, strict=True):
        rungs = [
            [[layer.table.pool.rung(i) for i in row] for row in layer.table.pages()]
            for layer in (one, two)
        ]
        assert rungs[0] == rungs[1] and one.table.state.tolist() == two.table.state.tolist()
        assert torch.equal(one.table.segments, two.table.segments)
    # a searched scale that tips may send a token to another expert
    errors = sorted(map(relative, got, expected))
    assert errors[len(errors) // 2] < 2e-2 and errors[-1] < 0.15


@torch.no_grad()
def test_a_model_that_waits_for_the_device_goes_on_by_itself(paths, caplog):
    """Sampling, whose random numbers a capture that failed would have left in disorder; and so
    where only the capture finds out."""
    ids = torch.randint(1, 128, (1, 60), generator=torch.Generator().manual_seed(4)).cuda()
    for probed in (False, True):
        model = runtime.load_pretrained(paths, device="cuda", dtype=torch.float32)
        model.kv_decoding.probed = probed
        mlp = model.base_model.layers[0].mlp
        own = mlp.forward
        mlp.forward = lambda x, own=own: (float(x.sum()), own(x))[1]
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kvfold"):
            out = model.generate(ids, max_new_tokens=30, do_sample=True)
            model.generate(ids, max_new_tokens=5, do_sample=True)
        assert out.shape == (1, 90)
        (record,) = [x for x in caplog.records if "CUDA graph" in x.getMessage()]
        assert "can't be captured" in record.getMessage()


@torch.no_grad()
def test_a_model_that_goes_frees_its_graphs(paths):
    ids = torch.randint(1, 128, (1, 60), generator=torch.Generator().manual_seed(4)).cuda()
    held = []
    for _ in range(2):  # the first leaves what a process keeps: tables, workspaces
        model = runtime.load_pretrained(paths, device="cuda", dtype=torch.float32)
        out = model.generate(ids, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
        assert isinstance(out.past_key_values.steps.captured, DecodingStep)
        step = weakref.ref(out.past_key_values.steps.captured)
        del model, out
        gc.collect()
        assert step() is None
        held.append(torch.cuda.memory_allocated())
    assert held[1] <= held[0] + (1 << 16)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "queries", "shared"),
    [(((1, 256), (1, 512)), 8, (0, 1)), (((4, 256), (1, 512)), 16, ()), (((1, 64),), 71, ())],
    ids=["layers that are shared", "heads of two shapes", "71 queries a head"],
)
def test_heads_of_any_shape_are_read_as_the_reference_does(heads, queries, shared, dtype):
    """A prompt, one that goes on, and steps."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    specs = [
        LayerSpec(
            KeySpec(
                uniform(dim, 16), matrix=torch.linalg.qr(drawn(n, dim, dim))[0].contiguous(),
                offset=drawn(n, dim) / 4, frequencies=(1.0, 0.1, 0.01),
            ),
            ValueSpec(uniform(dim, 8)),
        )
        for n, dim in heads
    ]  # fmt: skip
    several = heads if len(heads) > 1 else ()
    windows = (512, 0) if several else ()
    g = account.Geometry(*heads[0], 64, 128, 32, windows, 0, 0, several, shared)
    caches = [QuantizedKVCache(specs, g, None, backend) for backend in (TRITON, REFERENCE)]
    seen = 0
    for tokens in (1500, 33, *[1] * 40):
        rows, columns = torch.arange(seen, seen + tokens)[:, None], torch.arange(seen + tokens)
        for i, (n, dim) in enumerate(heads):
            keys, values = (drawn(2, n, tokens, dim).to("cuda", dtype) for _ in range(2))
            window = g.sliding_of(i)
            mask = (columns <= rows) & (columns > rows - window) if window else None
            mask = None if mask is None else mask.expand(2, 1, -1, -1).cuda()
            views = [cache.update(keys, values, i)[0] for cache in caches]
            for _ in range(3 if i in shared else 1):
                query = drawn(2, queries, tokens, dim).to("cuda", dtype)
                ours, theirs = (
                    view.attend(query, dim**-0.5, mask, sliding=window) for view in views
                )
                assert relative(ours, theirs) < 0.01
        for cache in caches:
            cache.finish_call()
        seen += tokens
        formats = [(spec.key.format, spec.value.format) for spec in specs]
        assert caches[0].nbytes == account.batch_nbytes(g, formats, [seen, seen])
