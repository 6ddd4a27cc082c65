"""The rivals of `kvfold bench quality`: sizes, formulas, the window rule, and the command."""

import json
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from scipy.integrate import quad
from scipy.stats import norm

from kvfold import KvfoldError
from kvfold.compress.bench import compare, protocol, report, rivals
from kvfold.compress.bench.rivals import (
    codecs,
    kvarn,
    nqkv,
    oscar,
    skvq,
    transformers_cache,
    turboquant,
)
from kvfold.compress.calibrate import LayerStats
from kvfold.compress.cli import main
from kvfold.compress.evaluate import evaluate
from kvfold.compress.models.attention_hook import NAME, tapped
from kvfold.exports.account import Geometry, cache_nbytes
from kvfold.exports.architectures import architecture_of
from kvfold.kernels.formats import uniform
from kvfold.kernels.quantizer import round_trip

RIVALS = rivals.RIVALS


def make_stats(head_dim: int = 64, heads: int = 2, tokens: int = 384) -> LayerStats:
    """Keys with outlier channels and an offset, values smaller, queries that prefer some
    channels."""
    rng = torch.Generator().manual_seed(head_dim)
    key = torch.randn(heads, tokens, head_dim, generator=rng) * (
        0.2 + 3 * torch.rand(heads, 1, head_dim, generator=rng)
    )
    key += torch.randn(heads, 1, head_dim, generator=rng)
    value = 0.3 * torch.randn(heads, tokens, head_dim, generator=rng)
    query = (
        torch.randn(heads, tokens, head_dim, generator=rng)
        * torch.rand(heads, 1, head_dim, generator=rng)
    ).double()

    def moment(x):
        return x.mT.double() @ x.double() / tokens

    return LayerStats(
        key.double().mean(1), moment(key - key.mean(1, keepdim=True)), moment(query), value.double().mean(1),
        moment(value - value.mean(1, keepdim=True)), torch.eye(head_dim).double().expand(heads, -1, -1).clone(),
        torch.stack((key.amin(1), key.amax(1)), 1).double(), torch.stack((value.amin(1), value.amax(1)), 1).double(),
        key, value, query.float(), torch.tensor([tokens]), torch.tensor(head_dim**-0.5),
        torch.empty(0), key.double().mean(1), moment(key - key.mean(1, keepdim=True)),
        key - key.mean(1, keepdim=True),
        moment(key), key.double().mean(1), moment(key - key.mean(1, keepdim=True)), 0 * moment(key), moment(value),
    )  # fmt: skip


def fitted(name: str, bits: int, stats: LayerStats):
    """A rival after calibration; skips where the library it wraps is not installed."""
    try:
        rival = RIVALS[name](bits, stats.key_mean.shape[-1])
    except KvfoldError as error:
        pytest.skip(str(error))
    if rival.needs:
        rival.calibrate(stats)
    return rival


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(8,), (3, 24), (2, 5, 40)])
def test_packed_codes_come_back(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits)).to(
        torch.uint8
    )
    packed = codecs.pack(codes, bits)
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(codecs.unpack(packed, bits), codes)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", RIVALS)
def test_claimed_bits_are_the_size_of_the_stored_arrays(name, head_dim):
    stats = make_stats(head_dim)
    for bits in RIVALS[name].widths:
        rival = fitted(name, bits, stats)
        tokens = 37 if rival.block_tokens == 1 else 2 * rival.block_tokens
        keys, values = stats.key_sample[:, :tokens], stats.value_sample[:, :tokens]
        stored = rival.encode(keys, values)
        bits_stored = (
            8 * sum(codecs.nbytes(side) for side in stored) / (keys.numel() + values.numel())
        )
        assert bits_stored == pytest.approx(rival.payload_bits(head_dim), rel=1e-12)
        allowed = {
            torch.uint8,
            torch.float16,
            torch.float8_e4m3fn,
        }  # nothing wider hides in what is stored
        assert {array.dtype for side in stored for array in side} <= allowed


@pytest.mark.parametrize("name", RIVALS)
def test_error_falls_with_bits(name):
    stats = make_stats()
    keys, values = stats.key_sample[:, :256], stats.value_sample[:, :256]
    errors = []
    for bits in RIVALS[name].widths:
        pairs = zip(fitted(name, bits, stats).quantise(keys, values), (keys, values), strict=True)
        errors.append([float((back - x).norm() / x.norm()) for back, x in pairs])
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert all(a < 0.7 * b for a, b in zip(more, fewer, strict=True))
    assert max(errors[-1]) < 0.13


@pytest.mark.parametrize("name", RIVALS)
def test_constant_and_zero_heads_stay_finite(name):
    rival = fitted(name, 2, make_stats(16))
    keys = torch.cat((torch.zeros(1, 128, 16), torch.full((1, 128, 16), 3.0)))
    for back in rival.quantise(keys, keys):
        assert torch.isfinite(back).all()
        assert back[0].abs().max() < 1e-3


def test_a_width_that_a_scheme_lacks_is_refused():
    with pytest.raises(KvfoldError, match="has no 7-bit form; choose from 2, 3, 4"):
        RIVALS["rtn"](7, 64)


def test_bits_at_a_length_count_what_an_artifact_counts():
    geometry, fmt = Geometry(3, 64, 5, 128, 32), uniform(64, 4, "e4m3")
    rival = RIVALS["rtn"](2, 64)
    assert rival.payload_bits(64) == fmt.payload_bits
    for tokens in (1, 133, 165, 2047, 32768):
        own = 8 * cache_nbytes(geometry, [(fmt, fmt)] * 7, tokens) / geometry.elements(tokens, 7)
        assert protocol.rival_bits(rival, geometry, 7, tokens) == pytest.approx(own, rel=1e-12)


# -- formulas --------------------------------------------------------------------------------------


def test_rtn_by_hand():
    row = torch.tensor(
        [-1.5, -1.4, -0.9, -0.1, 0.2, 0.6, 1.1, 1.5]
    )  # minimum −1.5 and scale 1 are exact in e4m3
    codec = codecs.Affine(2, 8)
    packed, pair = codec.encode(row)
    assert pair.float().tolist() == [[-1.5, 1.0]]
    assert codecs.unpack(packed, 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert codec.decode((packed, pair)).tolist() == [-1.5, -1.5, -0.5, -0.5, 0.5, 0.5, 1.5, 1.5]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rtn_is_the_packed_cache_s_uniform_format(bits):
    x = make_stats().key_sample[:, :48]
    codec = codecs.Affine(bits, 64)
    assert torch.equal(codec.decode(codec.encode(x)), round_trip(x, uniform(64, 2**bits, "e4m3")))


def test_kivi_keeps_a_constant_channel_and_its_blocks_apart():
    rival = RIVALS["kivi"](2, 16)
    keys = torch.randn(2, 256, 16, generator=torch.Generator().manual_seed(0))
    keys[:, :128, 5], keys[:, 128:, 5] = 40.0, -8.0
    before, _ = rival.quantise(keys, keys)
    assert torch.equal(before[:, :, 5], keys[:, :, 5])
    keys[:, 128:] *= 7
    after, _ = rival.quantise(keys, keys)
    assert torch.equal(before[:, :128], after[:, :128]) and not torch.equal(
        before[:, 128:], after[:, 128:]
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_max_points_are_the_means_of_their_cells(bits):
    points = turboquant.lloyd_max(bits).double()
    borders = [-torch.inf, *((points[1:] + points[:-1]) / 2).tolist(), torch.inf]
    for point, low, high in zip(points.tolist(), borders, borders[1:], strict=False):
        mass = norm.cdf(high) - norm.cdf(low)
        mean = quad(lambda x: x * norm.pdf(x), max(low, -12), min(high, 12))[0] / mass
        assert point == pytest.approx(mean, abs=2e-6)
    assert torch.allclose(points, -points.flip(0), atol=1e-6)
    if bits == 2:
        assert points[2:].tolist() == pytest.approx([0.4528, 1.5104], abs=1e-4)  # Max 1960, table I


def test_normal_float_4_has_its_published_points():
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert nqkv.normal_float(4).tolist() == pytest.approx(published, abs=1e-6)
    for bits in (2, 3):
        points = nqkv.normal_float(bits)
        assert (
            len(points) == 2**bits
            and points[0] == -1
            and points[-1] == 1
            and 0.0 in points.tolist()
        )
        assert (points.diff() > 0).all()


def test_a_grid_takes_the_nearest_point():
    points = nqkv.normal_float(3)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    codec = codecs.Grid(points, 32, "absmax", "fp16")
    scale = x.abs().amax(-1, keepdim=True).half().float()
    nearest = points[((x / scale)[..., None] - points).abs().argmin(-1)] * scale
    assert torch.equal(codec.decode(codec.encode(x)), nearest)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_hadamard_is_orthogonal_and_flat(head_dim):
    matrix = codecs.hadamard(head_dim)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(head_dim).double(), atol=1e-12)
    if head_dim & (head_dim - 1) == 0:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, head_dim**-0.5))


def test_oscar_spreads_the_queries_energy_evenly():
    stats = make_stats()
    matrix = oscar.rotation(stats.query_moment)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(64).double().expand(2, -1, -1), atol=1e-10)
    energy = torch.diagonal(matrix @ stats.query_moment @ matrix.mT, dim1=-2, dim2=-1)
    assert torch.allclose(energy, energy.mean(-1, keepdim=True).expand_as(energy), rtol=1e-9)


def test_clip_search_finds_the_best_of_its_grid():
    stats = make_stats()

    def error(clip):
        codec = codecs.Affine(2, 64, clip=clip)
        delta = (codec.decode(codec.encode(stats.key_sample)) - stats.key_sample).double()
        return torch.einsum("hti,hij,htj->h", delta, stats.query_moment, delta)

    found = codecs.search_clip(
        stats.key_sample, lambda clip: codecs.Affine(2, 64, clip=clip), stats.query_moment
    )
    best = torch.stack([error(torch.full((2, 1, 1), clip)) for clip in codecs.CLIPS]).amin(0)
    assert torch.allclose(error(found), best, rtol=1e-9)
    assert (found < 1).all()


def test_sinkhorn_brings_rows_and_columns_to_unit_variance():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 128, 64, generator=rng) * torch.rand(2, 1, 64, generator=rng).exp() ** 3
    x = x * torch.rand(2, 128, 1, generator=rng).exp() ** 2
    y, tokens, channels = kvarn.sinkhorn(x)
    assert torch.allclose(tokens * y * channels, x, rtol=1e-3)
    assert torch.allclose(y.std(-1, correction=0), torch.ones(2, 128), atol=1e-5)
    columns = y.std(
        -2, correction=0
    )  # all alike; 1 but for what centring along the other axis takes
    assert torch.allclose(columns, columns.mean(-1, keepdim=True).expand_as(columns), atol=1e-5)
    assert torch.allclose(columns, torch.ones(2, 64), atol=0.01)


def test_kvarn_does_not_care_for_the_size_of_a_token():
    """A token a hundred times as large shifts the others' error little, where plain blocks lose all
    the others."""
    keys = torch.randn(1, 128, 64, generator=torch.Generator().manual_seed(0))
    keys[:, 7] *= 100
    others = torch.arange(128) != 7
    errors = {}
    for name in ("kvarn", "kivi"):
        back, _ = RIVALS[name](2, 64).quantise(keys, keys)
        errors[name] = float((back - keys)[:, others].norm() / keys[:, others].norm())
    assert errors["kvarn"] < 0.5 < errors["kivi"]


def test_kvarn_keeps_factors_that_e4m3_can_hold():
    """They are known but for a constant, which must not push those that are kept out of its range,
    to zero or to its end."""
    rng = torch.Generator().manual_seed(0)
    sizes = torch.randn(2, 1, 64, generator=rng).exp() * torch.randn(2, 256, 1, generator=rng).exp()
    x = 0.3 * torch.randn(2, 256, 64, generator=rng) * sizes
    for codec in (
        kvarn.Normalised(codecs.Affine(4, 64), "tokens"),
        kvarn.Normalised(codecs.Affine(4, 128, "fp16"), "channels"),
    ):
        kept = codec.encode(x)[-1].float()
        assert kept.min() > 2**-6 and kept.max() < 448
        assert (codec.decode(codec.encode(x)) - x).norm() < 0.2 * x.norm()


def test_kvarn_gains_by_bits_where_an_offset_dwarfs_the_keys():
    """What a factor loses when it is rounded must not scale the offset."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 64, generator=rng) + 100 * torch.randn(1, 1, 64, generator=rng)
    errors = [float((RIVALS["kvarn"](bits, 64).quantise(x, x)[0] - x).norm()) for bits in (2, 3, 4)]
    assert errors[0] > 1.7 * errors[1] > 2.5 * errors[2]


def test_skvq_order_gathers_like_channels():
    sample = torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(0))
    large = torch.zeros(2, 16, dtype=torch.bool)
    large[:, ::2] = True  # 16 of 32 channels, scattered over both heads
    sample = sample * torch.where(large, 20.0, 1.0)[:, None]
    groups = skvq.cluster(sample, 16)
    assert sorted(torch.cat(groups).tolist()) == list(range(32))
    assert sorted(map(set, (g.tolist() for g in groups)), key=min) == sorted(
        (set(part.nonzero().flatten().tolist()) for part in (large.flatten(), ~large.flatten())),
        key=min,
    )
    codec = skvq.Reordered(8, groups, torch.ones(2), 2)
    back = codec.decode(codec.encode(sample))
    assert (
        float((back - sample).mT[~large].abs().max()) < 0.5
    )  # e4m3 minima; the large ones' step would be 20 times as large


def test_skvq_gives_an_outlier_a_group_of_its_own():
    sample = torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(0))
    sample[1, :, 5] *= 1000
    assert sorted(map(len, skvq.cluster(sample, 16))) == [1, 31]


def test_pm_kvq_scales_rope_pairs_alike_and_is_never_worse_than_none():
    stats = make_stats()
    stats.key_sample[:, :, (3, 40)] *= 30
    stats.key_range[:, :, (3, 40)] *= 30
    rival = fitted("pm-kvq", 2, stats)
    scale = rival.key.scale
    assert torch.equal(scale[..., :32], scale[..., 32:]) and scale.max() > scale.min()

    def error(codec):
        delta = (codec.decode(codec.encode(stats.key_sample)) - stats.key_sample).double()
        return float(torch.einsum("hti,hij,htj->", delta, stats.query_moment, delta))

    assert error(rival.key) < error(codecs.Affine(2, 64))


# -- the window rule -------------------------------------------------------------------------------


class Shifted(rivals.Rival):
    """Not a quantiser: moves what it is given, so that attention shows who read what."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def quantise(self, keys, values):
        self.seen = keys.shape[1]
        return keys + self.shift, values - self.shift


@pytest.mark.parametrize("tokens", [1, 27, 42, 43, 44, 77, 150])
def test_queries_read_stored_tokens_behind_the_window_only(tokens):
    rng = torch.Generator().manual_seed(tokens)
    query, key, value = (
        torch.randn(1, heads, tokens, 16, generator=rng).half().float() for heads in (4, 2, 2)
    )
    geometry, rival = Geometry(2, 16, 3, 24, 16), Shifted(0.5)
    out = protocol.rival_tap(rival, geometry)(SimpleNamespace(), query, key, value, None, 0.25)
    if tokens < 3 + 24 + 16:
        assert out is None
        return
    assert rival.seen == (tokens - 27) // 16 * 16
    for t in range(tokens):
        stored = max(0, t + 1 - 27) // 16 * 16  # tokens 3 … 3 + stored − 1
        keys, values = key[0, :, : t + 1].clone(), value[0, :, : t + 1].clone()
        keys[:, 3 : 3 + stored] += 0.5
        values[:, 3 : 3 + stored] -= 0.5
        for head in range(4):
            weights = (keys[head // 2] @ query[0, head, t] * 0.25).softmax(0)
            assert torch.allclose(out[0, t, head], weights @ values[head // 2], atol=1e-5)


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt_oss"])
def test_a_lossless_rival_leaves_the_model_as_it_is(family, device):
    model = tiny_model(family).to(device)
    model.set_attn_implementation(NAME)
    ids = torch.randint(0, 128, (1, 131), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        plain = model(ids, use_cache=False).logits
        for shift, same in ((0.0, True), (0.5, False)):
            with ExitStack() as stack:
                for attention in attentions(model):
                    stack.enter_context(
                        tapped(
                            attention,
                            protocol.rival_tap(Shifted(shift), Geometry(2, 16, 3, 24, 16)),
                        )
                    )
                packed = model(ids, use_cache=False).logits
            assert rms_ratio(packed[:, :42], plain[:, :42]) < 0.01  # keys and values are in float16
            assert (rms_ratio(packed, plain) < 0.01) == same
            assert torch.equal(model(ids, use_cache=False).logits, plain)


def rms_ratio(a, b):
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def attentions(model):
    return architecture_of(model.config).attention_modules(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", RIVALS)
def test_a_gpu_quantises_as_a_cpu_does(name):
    stats = make_stats()
    rival = fitted(name, 2, stats)
    keys, values = stats.key_sample[:, :128], stats.value_sample[:, :128]
    here, there = rival.quantise(keys, values), rival.quantise(keys.cuda(), values.cuda())
    for a, b in zip(here, there, strict=True):  # a value on a border may fall to either side
        assert ((a - b.cpu()).abs() < 1e-4).float().mean() > 0.995


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def kvfold(monkeypatch, capsys):
    """Runs `kvfold bench quality …`: (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["kvfold", "bench", "quality", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return run


def test_one_command_measures_artifacts_and_rivals(
    kvfold, tiny_folder, tiny_artifact, text_file, tmp_path
):
    shared = [
        tiny_folder,
        "--text",
        text_file,
        "--windows",
        2,
        "--seq-len",
        300,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    code, out, err = kvfold(*shared, "--artifacts", tiny_artifact, "--rivals", "rtn,kivi,oscar")
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "run")
    result = json.loads((tmp_path / "run" / "quality.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [f"kvfold {tiny_artifact.name}", "rtn 2", "kivi 2", "oscar 2"]
    for row in rows.values():
        assert 0 < row["kl"] < 5 and 0 < row["top1_agreement"] <= 1 and row["kl_se"] is not None
        assert (
            row["bits_at"]["2048"]
            > row["bits_at"]["8192"]
            > row["bits_at"]["32768"]
            > row["payload_bits"]
        )
        assert row["nll_16bit"] == pytest.approx(
            rows["rtn 2"]["nll_16bit"], abs=1e-5
        )  # one reference for all
    own = rows[f"kvfold {tiny_artifact.name}"]
    alone = evaluate(
        str(tiny_artifact),
        against=str(tiny_folder),
        text=str(text_file),
        windows=2,
        seq_len=300,
        dtype=torch.float32,
    )
    assert (
        own["kl"] == pytest.approx(alone.kl, rel=1e-6) and own["payload_bits"] == alone.payload_bits
    )
    table = (tmp_path / "run" / "quality.md").read_text()
    assert table in out and all(name in table for name in rows) and RIVALS["kivi"].source in table

    result["rows"][1]["kl"] = 1.25  # a row that is there is kept as it is
    (tmp_path / "run" / "quality.json").write_text(json.dumps(result))
    code, out, err = kvfold(*shared, "--rivals", "rtn", "--bits", "2,4", "--resume")
    assert code == 0, err
    again = {
        row["name"]: row
        for row in json.loads((tmp_path / "run" / "quality.json").read_text())["rows"]
    }
    assert list(again) == [*rows, "rtn 4"] and again["rtn 2"]["kl"] == 1.25
    assert again["rtn 4"]["kl"] < rows["rtn 2"]["kl"]

    shared[4] = 1
    code, out, err = kvfold(*shared, "--resume")
    assert code == 2 and "is of another model, text or protocol" in err and err.count("\n") == 1


def test_budgets_are_compressed_and_then_reused(
    kvfold, tiny_folder, text_file, tmp_path, monkeypatch
):
    made = []

    def compress(model, budget, out, **options):
        made.append((model, budget, out.name))
        raise KvfoldError("stop here")

    monkeypatch.setattr(compare, "compress", compress)
    options = [
        tiny_folder,
        "--text",
        text_file,
        "--windows",
        1,
        "--seq-len",
        300,
        "--out",
        tmp_path,
        "--budgets",
        "4.5",
    ]
    assert kvfold(*options, "--rivals", "none")[0] == 2
    assert made == [(str(tiny_folder), "4.5", f"{tiny_folder.name}-4.5")]


def test_what_is_not_installed_is_left_out_with_its_reason(
    kvfold, tiny_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(transformers_cache, "find_spec", lambda name: None)
    options = [
        tiny_folder,
        "--text",
        text_file,
        "--windows",
        1,
        "--seq-len",
        300,
        "--out",
        tmp_path,
    ]
    code, out, err = kvfold(*options, "--rivals", "hqq,quanto", "--bits", "2,3")
    assert code == 0, err
    skipped = json.loads((tmp_path / "quality.json").read_text())["skipped"]
    assert "hqq is not installed; run pip install hqq" in skipped["hqq 2"]
    assert (
        "optimum-quanto is not installed" in skipped["quanto 2"]
        and "no 3-bit form" in skipped["quanto 3"]
    )
    assert "left out: hqq 2" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rivals", "kivi,turbo"], "--rivals names 'turbo'"),
        (["--bits", "2,x"], "--bits '2,x' is not a list"),
        (["--dtype", "int8"], "--dtype 'int8'"),
        (["--artifacts", "/nowhere"], "--artifacts names '/nowhere'"),
        (["--seq-len", "100000"], "--seq-len 100000 is not between"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    kvfold, tiny_folder, text_file, tmp_path, options, message
):
    code, _, err = kvfold(tiny_folder, "--text", text_file, "--out", tmp_path / "out", *options)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_plot_is_written_both_ways(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"kind": "rival", "source": "", "kl_se": 0.01}
    points = (("a", 3), ("a", 2), ("b", 2))
    rows = [
        {**row, "name": f"{name} {bits}", "payload_bits": bits + 0.25, "kl": 1 / bits}
        for name, bits in points
    ]
    rows.append(
        {
            **row,
            "kind": "artifact",
            "source": "whiten",
            "name": "kvfold x",
            "payload_bits": 2.0,
            "kl": 0.05,
            "kl_se": None,
        }
    )
    result = {"model": "tiny", "text": "text", "windows": 1, "seq_len": 8, "rows": rows}
    assert report.series(result)["a"] == [(2.25, 0.5, 0.01), (3.25, 1 / 3, 0.01)]
    png, svg = report.plot(result, tmp_path)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and b"<svg" in svg.read_bytes()[:800]
