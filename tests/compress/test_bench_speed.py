"""`kvfold bench kernel | prompt | decode | memory` on tiny shapes: the gate, the figures' arithmetic, caches that only
look full."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import CONFIGS, tiny_model

from kvfold import KvfoldError
from kvfold.compress.bench import cases as bench_cases
from kvfold.compress.bench import decode as bench_decode
from kvfold.compress.bench import gate as bench_gate
from kvfold.compress.bench import kernel as bench_kernel
from kvfold.compress.bench import memory as bench_memory
from kvfold.compress.bench import model as bench_model
from kvfold.compress.bench import prompt as bench_prompt
from kvfold.compress.bench.cases import Shape, finer, held_rows, make_case, pair
from kvfold.compress.bench.gate import GateCase, gate_cases, run_gate
from kvfold.compress.bench.tools import copies_for, machine, measured_streams, median_ms
from kvfold.compress.cli import main
from kvfold.exports.account import Geometry, batch_nbytes
from kvfold.exports.architectures import head_dim_of
from kvfold.kernels.attention import packed_tokens
from kvfold.kernels.formats import uniform
from kvfold.kernels.gpu.read import SETTINGS, read_words
from kvfold.kernels.pages import UNIT, page_address
from kvfold.runtime.cache.cache import QuantizedKVCache

CPU = torch.device("cpu")
REGIONS = (3, 16, 16)  # sinks, window, page_tokens
SMALL = ["--sinks", 3, "--window", 16, "--page-tokens", 16]
GATE = GateCase("tiny", pair("k2v2", 64), (2, 1))


@pytest.fixture
def kvfold(monkeypatch, capsys):
    """Runs a command: (exit code, stdout, stderr)."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvfold", "bench", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def small_gate(monkeypatch):
    """One small case instead of all formats."""
    monkeypatch.setattr(bench_kernel, "gate_cases", lambda names, head_dim: [GATE])


def best_of(streams: list[dict]) -> float:
    """Bytes a second of the best of a command's streams."""
    return max(stream["bytes_per_s"] for stream in streams)


def gate(case: GateCase = GATE, tokens: int = 75, seed: int = 0) -> dict[str, bool]:
    """Whether each check of a case passed."""
    return {
        name: error <= most for name, error, most in run_gate(case, *REGIONS, tokens, CPU, seed)
    }


# -- cases and the gate ----------------------------------------------------------------------------


@pytest.mark.parametrize("sinks, window, page_tokens", [(3, 16, 16), (0, 5, 16), (5, 0, 32)])
def test_rows_held_are_what_a_simulated_ring_holds(sinks, window, page_tokens):
    g = Geometry(1, 64, sinks, window, page_tokens)
    rows: dict[int, int] = {}  # row → token
    for t in range(300):
        rows[t if t < sinks else sinks + (t - sinks) % g.ring] = t
        packed = packed_tokens(t + 1, sinks, window, page_tokens)
        wanted = [u for u in range(t + 1) if u < sinks or u >= sinks + packed]
        assert [rows[r] for r in held_rows(g, t + 1)] == wanted


def test_a_case_is_poisoned_where_nothing_may_be_read():
    g = Geometry(2, 64, *REGIONS)
    case = make_case(g, pair("k2v2", 64), 4, [75, 3], CPU, copies=2)
    counts = [g.num_pages(75), 0]
    assert counts[0] == 3 and case.states.tolist() == [[75, 3], [3, 0]]
    own = {page_address(page): page for page in case.slab}
    used = [int(case.tables[c, 0, i]) for c in range(2) for i in range(3)]
    assert len(set(used)) == 6
    for c in range(2):
        for b, count in enumerate(counts):
            for i in range(count):
                assert torch.equal(
                    own[int(case.tables[c, b, i])], case.pages[case.content[c, b, i]]
                )
            assert bool((own[int(case.tables[c, b, count])] == bench_cases.POISON).all())
            held = case.held(b)
            raw = case.raw_keys[c, b].isnan().all(-1)
            assert not raw[:, held].any() and int((~raw).sum()) == 2 * len(held)
    assert (
        case.packed_nbytes == 3 * sum(map(g.page_nbytes, case.formats))
        and case.pages.shape[1] % UNIT == 0
    )


def test_pages_to_lower_from_have_the_same_channels_and_more_bits():
    for name in bench_cases.PAIRS:
        if name == "16":
            continue
        for fmt in pair(name, 128):
            fine = finer(fmt)
            assert [n for n, _ in fine.classes] == [n for n, _ in fmt.classes]
            assert all(a > b for (_, a), (_, b) in zip(fine.classes, fmt.classes, strict=True))


def test_formats_are_those_of_the_log():
    assert pair("best", 128)[0].classes == ((32, 16), (16, 8), (32, 4), (32, 2), (16, 0))
    assert pair("best-b", 128)[0].classes == ((16, 16), (48, 4), (48, 2), (16, 0))
    assert pair("k2v1.6", 128) == (uniform(128, 4), uniform(128, 3))
    assert {pair("best", 128)[0].params, pair("best-b", 128)[0].params} == {"scale"}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gate_passes(seed):
    passed = gate(seed=seed)
    assert set(passed) == {"tiny, float16", "tiny, bfloat16"} and all(passed.values())


def test_the_gate_passes_on_what_is_written():
    passed = gate(GateCase("best", pair("best", 64), (2, 1), writes=True), tokens=40)
    assert set(passed) == {
        "best, float16",
        "best, bfloat16",
        "best, append",
        "best, lower",
    } and all(passed.values())


def test_the_gate_covers_every_measured_format_and_other_heads():
    cases = gate_cases(list(bench_cases.PAIRS), 128)
    assert {c.formats for c in cases} >= {pair(name, 128) for name in bench_cases.PAIRS}
    assert {c.formats[0].head_dim for c in cases} == {64, 80, 96, 128, 256}
    assert len({c.name for c in cases}) == len(cases)
    assert (
        all(a[0] % a[1] == 0 for a in (c.heads for c in cases))
        and len({c.heads for c in cases}) > 3
    )


@pytest.mark.parametrize("fault", ["scale", "one head", "nothing written", "one token"])
def test_the_gate_fails_on_a_wrong_output(monkeypatch, fault):
    real = bench_cases.attention

    def wrong(queries, cache, formats, out, *args, **kwargs):
        if fault == "nothing written":
            return out
        if fault == "one token":
            cache = cache._replace(state=cache.state - torch.tensor([1, 0], dtype=torch.int32))
        real(queries, cache, formats, out, *args, **kwargs)
        if fault == "scale":
            out *= 1.02
        if fault == "one head":
            out[-1, :, -1] = out[-1, :, 0]
        return out

    monkeypatch.setattr(bench_cases, "attention", wrong)
    assert not any(gate().values())


@pytest.mark.parametrize("name", ["append_step", "lower_pages"])
def test_the_gate_fails_where_nothing_was_written(monkeypatch, name):
    monkeypatch.setattr(bench_gate, name, lambda *args, **kwargs: None)
    passed = gate(GateCase("tiny", pair("k2v2", 64), (1, 1), writes=True), tokens=20)
    assert [check for check, good in passed.items() if not good] == [f"tiny, {name.split('_')[0]}"]


# -- kvfold bench kernel ---------------------------------------------------------------------------


def test_kernel_command(kvfold, small_gate, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_kernel, "LARGE", 70)
    monkeypatch.setattr(bench_kernel, "WRITE_BATCH", 2)
    file = tmp_path / "k.json"
    shapes = "2/1x1x60,1/1x2x60"
    code, out, err = kvfold(
        "kernel",
        "--head-dim",
        64,
        "--formats",
        "k2v2",
        "--shapes",
        shapes,
        "--gate-tokens",
        75,
        *SMALL,
        "--json",
        file,
    )
    assert code == 0, err
    found = json.loads(file.read_text())
    assert found.keys() == {"seed", "gate", "seconds", "rows", "machine", "streams"}
    assert len(found["gate"]) == 2 and all(
        c["passed"] and 0 < c["error"] < c["at_most"] for c in found["gate"]
    )
    small, large = found["rows"]
    assert small["shape"] == "2/1x1x60" and large["shape"] == "1/1x2x60"
    for row in found["rows"]:
        assert row["bytes_per_s"] == pytest.approx(row["packed_bytes"] / row["ms"] * 1e3)
        assert row["share_of_best_stream"] == pytest.approx(
            row["bytes_per_s"] / best_of(found["streams"])
        )
        assert row["ratio_sdpa"] == pytest.approx(row["sdpa_ms"] / row["ms"])
    pages = Geometry(1, 64, *REGIONS).num_pages(60)
    assert (
        small["packed_bytes"] * 2
        == large["packed_bytes"]
        == 2 * pages * 2 * uniform(64, 4).nbytes(16)
    )
    assert small["own16_ms"] is None and small["append_ms"] is None and small["ratio_flex"] is None
    assert large["ratio_own16"] == pytest.approx(large["own16_ms"] / large["ms"])
    assert (
        large["append_share"] == pytest.approx(large["append_ms"] / large["ms"])
        and large["lower_ms"] > 0
    )
    assert large["ratio_flex"] == "not compiled on a CPU"
    lines = [line for line in out.splitlines() if "SDPA" in line]
    assert len(lines) == 2 and all(
        f"torch {torch.__version__}"[:10] in line and "triton" in line for line in lines
    )
    assert (
        "CPU, no measure of speed" in lines[0] and "own 16-bit" in lines[1] and "append" in lines[1]
    )


def test_kernel_command_prints_no_speed_if_the_gate_fails(
    kvfold, small_gate, monkeypatch, tmp_path
):
    monkeypatch.setattr(bench_cases, "attention", lambda *args, **kwargs: None)
    monkeypatch.setattr(bench_kernel, "rows", None)  # not even measured
    file = tmp_path / "k.json"
    args = (
        "--head-dim",
        64,
        "--formats",
        "k2v2",
        "--shapes",
        "2/1x1x60",
        "--gate-tokens",
        75,
        *SMALL,
        "--seed",
        7,
    )
    code, out, err = kvfold("kernel", *args, "--json", file)
    assert code == 1 and out == ""
    assert "2 of 2 checks failed (seed 7)" in err
    found = json.loads(file.read_text())
    assert found["rows"] == [] and [c["passed"] for c in found["gate"]] == [False, False]
    assert found["gate"][0]["error"] is None  # NaN


def test_other_processes_compile_and_check(small_gate):
    settings = bench_kernel.Settings(CPU, 64, *REGIONS, gate_tokens=40, jobs=1)
    shapes = [Shape(2, 1, 1, 60)]
    assert [(s, w) for *_, s, w in bench_kernel.variants(settings, ["k2v2", "k2v2"], shapes)] == [
        (2, False)
    ]
    checks = bench_kernel.prepare(settings, ["k2v2"], shapes)
    assert [name for name, *_ in checks] == ["tiny, float16", "tiny, bfloat16"]
    assert all(error <= most for _, error, most in checks)


def test_timing_calls_take_turns_with_the_copies():
    seen: list[int] = []
    assert median_ms(seen.append, CPU, 3) >= 0
    assert seen == [0, 0, 1, 2]
    assert copies_for(1, CPU) == 1
    assert machine(CPU).keys() == {"device", "torch", "triton"}


def test_streams_are_named_and_the_best_comes_first():
    streams = measured_streams(CPU, 1 << 18)
    rates = [stream.bytes_per_s for stream in streams]
    assert len({stream.name for stream in streams}) == len(streams) >= 3
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_stream_reads_every_word_once(setting):
    x = torch.randint(-(2**31), 2**31 - 1, (7 * setting.words,)).int()
    for programs in (1, 3, 9):  # more than there are blocks
        out = torch.full((programs,), 77, dtype=torch.int32)
        read_words(x, out, setting)
        assert np.bitwise_xor.reduce(out.numpy()) == np.bitwise_xor.reduce(x.numpy())


@pytest.mark.parametrize(
    "text", ["32x1x4096", "32/8x1", "32/0x1x9", "32/5x1x9", "32/8x0x9", "a/bx1x2"]
)
def test_shapes_that_are_none(text):
    with pytest.raises(KvfoldError, match=text):
        Shape.parse(text)


@pytest.mark.parametrize(
    "args, words",
    [
        (("kernel", "--formats", "k9"), "k9"),
        (("kernel", "--head-dim", 96), "96"),
        (("kernel", "--page-tokens", 24), "24"),
        (("kernel", "--gate-tokens", 0), "gate-tokens"),
        (("kernel", "--json", "no/such/folder/x.json"), "no/such/folder"),
        (("prompt", "--chunk", 0), "chunk"),
        (("prompt", "--shape", "llama9"), "llama9"),
        (("decode", "--shape", "llama9"), "llama9"),
        (("decode", "--shape", "tiny", "--baselines", "some"), "some"),
        (("memory", "--long-format", "k9"), "k9"),
        (("memory", "--tokens", 0), "tokens"),
    ],
)
def test_wrong_options(kvfold, args, words):
    code, out, err = kvfold(*args)
    assert code == 2 and out == "" and words in err and len(err.splitlines()) == 1


# -- whole models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k2v2", "best", "k2v1.6", "16"])
def test_a_filled_cache_is_what_its_lengths_say(name):
    config = bench_model.model_config("tiny")
    g = Geometry(config.num_key_value_heads, head_dim_of(config), *REGIONS)
    formats = bench_model.layer_formats(name, g.head_dim, config.num_hidden_layers)
    artifact = bench_model.make_artifact(config, g, formats)
    tokens = 101
    cache = QuantizedKVCache(artifact.specs, g)
    bench_model.fill_cache(cache, 2, tokens, torch.bfloat16, CPU)
    assert cache.nbytes == batch_nbytes(g, formats, [tokens] * 2)
    assert cache.get_seq_length() == tokens and cache.formats == formats
    for layer in cache.layers:
        pages = g.num_pages(tokens)
        assert (
            layer.table.state.tolist() == [[tokens, pages]] * 2 and layer.lengths() == [tokens] * 2
        )
        assert [len(ids) for ids in layer.table.pages()] == [pages] * 2
        for b in range(2):
            assert layer.table.block_table[b, :pages].tolist() == layer.table.pool.addresses(
                layer.table.pages()[b]
            )
            for x in layer.held.read_pages(layer.table.pages()[b]):
                assert (
                    bool(x.isfinite().all()) and 0.2 < float(x.std()) < 2
                )  # of unit normal keys and values
        assert layer.window.keys.isfinite().all() and layer.window.values.isfinite().all()


@torch.no_grad()
def test_a_filled_cache_goes_on_like_one_that_was_read_in():
    """After enough steps to move pages out of the window: lengths, pages and bytes of a cache that
    grew by steps."""
    model = bench_model.build_model("tiny", CPU)
    g = Geometry(1, 64, *REGIONS)
    formats = bench_model.layer_formats("best", 64, 2)
    artifact, triton = bench_model.attach_formats(model, formats, g)
    assert not triton
    cache = QuantizedKVCache(artifact.specs, g)
    bench_model.fill_cache(cache, 2, 50, torch.bfloat16, CPU)
    for _ in range(20):
        logits = model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=cache).logits
    assert logits.shape == (2, 1, 128) and bool(logits.isfinite().all())
    assert cache.layers[0].table.state.tolist() == [[70, g.num_pages(70)]] * 2 and g.num_pages(
        70
    ) > g.num_pages(50)
    assert cache.nbytes == batch_nbytes(g, formats, [70] * 2)


def test_patterns_of_best_differ_by_layer():
    a, b, c = bench_model.layer_formats("best", 128, 3)
    assert a == c == pair("best", 128) and b == pair("best-b", 128)
    assert bench_model.layer_formats("k4v4", 128, 2) == [pair("k4v4", 128)] * 2


@pytest.mark.parametrize("shape, count", [("llama3-8b", 8030261248), ("llama2-7b", 6738415616)])
def test_shapes_are_the_published_models(shape, count):
    """By their numbers of parameters, untied."""
    c = bench_model.model_config(shape)
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size + 2)
    assert not c.tie_word_embeddings
    assert 2 * c.vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size == count


PROMPT = (
    "prompt",
    "--shape",
    "tiny",
    "--tokens",
    60,
    "--chunk",
    40,
    "--formats",
    "k2v2,best",
    *SMALL,
    "--gate-tokens",
    75,
)


def test_prompt_command(kvfold, monkeypatch, tmp_path):
    file = tmp_path / "p.json"
    monkeypatch.setattr(bench_prompt, "REPEATS", 1)
    code, out, err = kvfold(*PROMPT, "--json", file)
    assert code == 0, err
    found = json.loads(file.read_text())
    base, *rows = found["rows"]
    assert [base["cache"], *(row["cache"] for row in rows)] == ["dynamic", "k2v2", "best"] and base[
        "ratio"
    ] is None
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(60 / row["ms"] * 1e3)
        assert row["ratio"] == pytest.approx(base["ms"] / row["ms"]) and row["peak_bytes"] is None
    assert len(out.splitlines()) == 4 and "8 checks passed" in out


@pytest.mark.parametrize(("fault", "wrong"), [("packed", 2), ("decoded", 1)])
def test_prompt_command_prints_no_speed_if_the_gate_fails(kvfold, monkeypatch, fault, wrong):
    real = bench_prompt.attend_queries

    def twice(queries, first, runs, *args):
        return real(queries, first, [*runs, *runs], *args)  # where there are pages

    if fault == "packed":  # nothing is written
        monkeypatch.setattr(bench_prompt, "attention", lambda *args, **kwargs: args[3])
    else:
        monkeypatch.setattr(bench_prompt, "attend_queries", twice)
    monkeypatch.setattr(bench_prompt, "prompt_rows", None)  # not even measured
    code, out, err = kvfold(*[x if x != "k2v2,best" else "k2v2" for x in PROMPT])
    assert code == 1 and out == "" and err.count("gate: k2v2") == wrong


def test_decode_command(kvfold, tmp_path):
    file = tmp_path / "d.json"
    code, out, err = kvfold(
        "decode", "--shape", "tiny", "--tokens", 60, "--batch", 2, "--formats", "k2v2,best", "--baselines", "eager",
        *SMALL, "--json", file
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(file.read_text())
    assert found.keys() == {"machine", "streams", "rows"}
    g = Geometry(1, 64, *REGIONS)
    for row, name in zip(found["rows"], ("k2v2", "best"), strict=True):
        assert row["format"] == name and row["batch"] == 2 and row["tokens"] == 60
        assert row["cache_bytes"] == batch_nbytes(
            g, bench_model.layer_formats(name, 64, 2), [60, 60]
        )
        steps = 3 + bench_decode.REPEATS * 2  # a page of each sequence comes due in them
        held = batch_nbytes(g, bench_model.layer_formats(name, 64, 2), [60 + steps] * 2)
        assert row["resident_bytes"] == held > row["cache_bytes"]
        nbytes = row["weights_bytes"] + row["cache_bytes"]
        assert row["floor_ms"] == pytest.approx(nbytes / best_of(found["streams"]) * 1e3)
        assert row["over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert row["ratio"] == pytest.approx(row["baselines_ms"]["eager"] / row["ms"])
    first, *lines = out.splitlines()
    assert len(lines) == 2 and "eager" in lines[0] and found["streams"][0]["name"] in first


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("no kernel image")])
def test_a_baseline_that_fails_says_why(monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setitem(bench_decode.BASELINES, "eager", fail)
    rows = bench_decode.decode_rows("tiny", 1, 40, ["k2v2"], ["eager"], REGIONS, CPU, 1e9)
    assert rows[0]["ratio"] is None
    assert ("out of memory" if isinstance(error, torch.OutOfMemoryError) else "no kernel") in rows[
        0
    ]["baselines_ms"]["eager"]


def test_eager_baseline_ends_at_the_length_it_says(monkeypatch):
    """The baseline's cache holds all tokens and the steps that were timed."""
    seen = []
    real = bench_decode.steps_ms

    def spy(step, *args):
        ms = real(step, *args)
        seen.append(step.__closure__)
        return ms

    monkeypatch.setattr(bench_decode, "steps_ms", spy)
    model = tiny_model("llama")
    bench_decode.eager_step_ms(model, 1, 50, steps=3)
    (cache,) = [c.cell_contents for c in seen[0] if hasattr(c.cell_contents, "get_seq_length")]
    assert cache.get_seq_length() == 50 + 2 + 3 * bench_decode.REPEATS
    assert CONFIGS["llama"]().num_hidden_layers == len(cache.layers)


def test_largest_batch_is_the_largest_that_ran():
    tried = []

    def run(batch: int) -> str:
        tried.append(batch)
        if batch > 97:
            raise torch.OutOfMemoryError("full")
        return f"ran {batch}"

    assert bench_memory.largest_batch(1000, 10, run, CPU) == (96, "ran 96")
    assert tried == [100, 98, 96]
    assert bench_memory.largest_batch(9, 10, run, CPU) == (0, None)


def test_memory_command(kvfold, tmp_path):
    file = tmp_path / "m.json"
    limit, tokens = 400_000, 60
    code, out, err = kvfold(
        "memory", "--shape", "tiny", "--tokens", tokens, "--limit", limit, "--long-shape", "tiny", "--long-tokens", 333,
        *SMALL, "--json", file,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(file.read_text())
    g = Geometry(1, 64, *REGIONS)
    eager, own, packed = found["rows"]
    assert [row["cache"] for row in found["rows"]] == ["eager", "16", "k2v2"]
    for row in (own, packed):
        one = batch_nbytes(
            g, bench_model.layer_formats(row["cache"], 64, 2), [tokens + bench_decode.ROOM]
        )
        assert row["batch"] == limit // one
    for row in found["rows"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
    assert packed["batch"] > own["batch"] and "ratio" not in own and "ratio" not in eager
    best = max(eager["tokens_per_s"], own["tokens_per_s"])
    assert packed["ratio"] == pytest.approx(packed["tokens_per_s"] / best)
    long = found["long"]
    assert (
        long["tokens"] == 333
        and long["format"] == "k2v1.6"
        and long["peak_bytes"] is None
        and long["ms"] > 0
    )
    assert long["cache_bytes"] == batch_nbytes(g, bench_model.layer_formats("k2v1.6", 64, 2), [333])
    assert len(out.splitlines()) == 4
