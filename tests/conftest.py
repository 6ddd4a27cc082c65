"""Tiny models and tokenizers built from literals: no network, no weights."""

import gc
import os
import re
from functools import partial

if gc.isenabled():  # until all is imported and collected, which stays
    gc.disable()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KVFOLD_COMPILE_AHEAD", "0")  # of tests on a GPU
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # as the command line does: test workers and their processes share the cores

from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported

import quick_interpreter
from family_configs import OWN, TOWERS, config_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForImageTextToText

from kvfold.exports.architectures import row_of

# KVFOLD_TESTS=nightly: other random cases each time, as many as each test states; else the same few
# each time
NIGHTLY = os.environ.get("KVFOLD_TESTS") == "nightly"
settings.register_profile("quick", derandomize=True)
settings.register_profile("nightly")
settings.load_profile("nightly" if NIGHTLY else "quick")


def examples(count: int) -> int:
    """How many of a test's `count` random cases are tried."""
    return count if NIGHTLY else max(20, count // 6)


pytest.register_assert_rewrite("real_artifact")  # helpers that assert
if os.environ.get("TRITON_INTERPRET") == "1":
    quick_interpreter.install()
torch.set_num_threads(1)  # test workers share the cores
with torch.device("meta"):  # PyTorch notes at first use what makes tensors: `poisoned` is not it
    torch.empty(0)

SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    # windows are shorter than the tests' sequences, and caps low enough to bend the logits
    "gemma2": lambda: Gemma2Config(
        **SHAPE, sliding_window=40, layer_types=[FULL, SLIDING, FULL], query_pre_attn_scalar=24,
        attn_logit_softcapping=4.0, final_logit_softcapping=5.0, pad_token_id=0, tie_word_embeddings=False,
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **SHAPE, sliding_window=40, layer_types=[SLIDING, FULL, SLIDING], query_pre_attn_scalar=24, pad_token_id=0,
        rope_parameters={FULL: {"rope_type": "default", "rope_theta": 1e6},
                         SLIDING: {"rope_type": "default", "rope_theta": 1e3}},
    ),
    "phi3": lambda: Phi3Config(**SHAPE, sliding_window=60, pad_token_id=0),
    "smollm3": lambda: SmolLM3Config(
        **SHAPE, no_rope_layers=[1, 0, 1], pad_token_id=0, use_sliding_window=True, sliding_window=40,
        layer_types=[FULL, FULL, SLIDING],
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SHAPE, sliding_window=40, layer_types=[SLIDING, FULL, SLIDING], pad_token_id=0,
        num_local_experts=2, num_experts_per_tok=2,  # a choice of experts would amplify rounding
        rope_parameters={  # the default's own, for SHAPE's number of positions
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 64,
        },
    ),
}  # fmt: skip
FAMILIES = sorted(CONFIGS)
# to a cache they are one: no layer slides, every channel turns, and neither caps nor sinks bend logits
PLAIN = ("llama", "mistral", "qwen2", "qwen3")
MORE_FAMILIES = [
    *sorted(set(OWN) & set(CONFIG_MAPPING)),
    *sorted(TOWERS),
]  # that this transformers has
CONFIGS |= {family: partial(config_of, family) for family in MORE_FAMILIES}


def families(*kept: str) -> list:
    """FAMILIES as a test's parameters: of the plain ones all but `kept` are slow cases."""
    return [
        pytest.param(family, marks=[pytest.mark.slow] * (family in PLAIN and family not in kept))
        for family in FAMILIES
    ]


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str | None = None
):
    """A random model whose attention isn't flat: weights large enough that heads look at few
    tokens, biases not zero."""
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if family in TOWERS else AutoModelForCausalLM
    model = kind.from_config(CONFIGS[family](), dtype=torch.float32, attn_implementation=attention)
    plus = row_of(model.config).norm_plus
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5).sub_(plus)
            elif plus and "embed_tokens" in name:
                parameter.normal_(
                    0, 0.5 / parameter.shape[1] ** 0.5
                )  # Gemma multiplies embeddings by that root
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 0.25 if "_proj" in name else 0.5)
    return model.to(dtype).eval()


def char_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of ASCII."""
    vocab = {chr(i): i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", pad_token=chr(0))


def save_tiny(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint folder of a tiny model."""
    tiny_model(family, dtype).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


TINY_RECIPE = """
window: 24
page_tokens: 8
sinks: 3
calibration: {num_sequences: 2, seq_len: 256, sample_tokens: 128}
sensitivity: {num_sequences: 1, seq_len: 192}
"""


@pytest.fixture
def registered():
    """`AutoModelForCausalLM.from_pretrained` knows artifacts."""
    import kvfold

    kvfold.register()
    yield
    kvfold.unregister()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Some 4,000 characters of plain text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = [
        "the",
        "cache",
        "of",
        "a",
        "long",
        "sequence",
        "holds",
        "keys",
        "and",
        "values",
        "for",
        "every",
        "token",
        "that",
        "was",
        "read",
        "before",
    ]
    rng = torch.Generator().manual_seed(1)
    picked = torch.randint(0, len(words), (800,), generator=rng).tolist()
    path.write_text(" ".join(words[i] for i in picked) + "\n")
    return path


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny Llama checkpoint in bfloat16."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory, tiny_folder, text_file, recipe_file) -> Path:
    """An artifact of the tiny Llama at 4 effective bits; don't write into it."""
    from kvfold.compress.pipeline import compress
    from kvfold.compress.recipe import load_recipe

    out = tmp_path_factory.mktemp("artifacts") / "tiny"
    compress(str(tiny_folder), "4.0", out, calib=str(text_file), recipe=load_recipe(recipe_file))
    return out


_read: dict[tuple, tuple[int, ...]] = {}


@pytest.fixture(scope="session", autouse=True)
def _texts_tokenized_once():
    """Runs are calibrated on the built-in texts too: a tokenizer of the same content makes the same
    tokens of them, which are not looked for again."""
    from kvfold.compress import text as module

    real = module.tokenize

    def tokenize(tokenizer, text: str) -> list[int]:
        content = getattr(tokenizer, "backend_tokenizer", None)
        if len(text) < 10_000 or content is None:
            return real(tokenizer, text)
        key = (type(tokenizer), content.to_str(), text)
        if key not in _read:
            _read[key] = tuple(real(tokenizer, text))
        return list(_read[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "tokenize", tokenize)
        yield


_drawn: dict[str, dict[str, bytes]] = {}


def draw_once(folder, metadata):
    """In place of draw_plots: the same metadata, the same bytes, which are not drawn again."""
    from kvfold.exports.page.plots import draw_plots

    key = metadata.model_dump_json()
    if key not in _drawn:
        before = {path.name for path in folder.iterdir()}
        draw_plots(folder, metadata)
        new = [path for path in folder.iterdir() if path.name not in before]
        _drawn[key] = {path.name: path.read_bytes() for path in new}
    for name, data in _drawn[key].items():
        (folder / name).write_bytes(data)


@pytest.fixture(scope="session", autouse=True)
def _plots_drawn_once():
    """Runs that end in one artifact draw its plots, which take a third of their time, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvfold.exports.writer.draw_plots", draw_once)
        yield


@pytest.fixture
def no_plots(monkeypatch):
    """Artifacts without plots, which take as long as a tiny model's whole search: for tests that
    write many, and look at other things."""
    monkeypatch.setattr("kvfold.exports.writer.draw_plots", lambda folder, metadata: None)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """`torch.empty` hands out NaN and the largest integers, so that nothing relies on what it
    happens to hold."""
    real = torch.empty

    def poisoned(*args, **kwargs):
        tensor = real(*args, **kwargs)
        if tensor.device.type != "meta":
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool and not tensor.is_complex():
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


# Cases that repeat what a quicker one beside them asserts, on other inputs: `make test ARGS="-m
# 'not real'"` runs them too.
SLOW = re.compile(
    r"test_triton_finite.py::test_it_is_reported_before_a_page_and_the_cache_goes_on\[(0-key-0-nan|1-value-1-inf)\]"
    r"|test_offload.py::test_kernels_read_what_was_brought\[2\]"
    r"|test_triton_mean.py::test_kernels_add_what_keys_lack\[pages of two steps\]"
    r"|test_triton_attention.py::test_every_format\[(2 bits|mixed both"
    r"|ternary keys, 3 bits|ternary 96|16 and 8 bits|groups)-8\]"
    r"|test_triton_attention.py::test_every_format\[(ternary values|ternary 128"
    r"|8 and 6 bits, 80|6 and 16 bits|wide)-32\]"
    r"|test_triton_attention.py::test_every_format\[(mixed keys|ternary symmetric"
    r"|4 and 5 bits, 96|wide|groups|ternary 96)-128\]"
    r"|test_triton_attention.py::test_prompts_read_what_token_by_token_reads\[(0-70-1-16 and 8 bits|0-70-1-mixed keys"
    r"|70-20-3-2 bits|70-20-3-ternary values|131-2-4-mixed keys|131-2-4-16 and 8 bits|20-19-2-2 bits"
    r"|20-19-2-ternary values)\]"
    r"|test_triton_attention.py::test_prompts_read_all_sinks_however_many_blocks_they_fill\["
    r"(33-140|64-60|64-140|100-60)-"
    r"|test_more_families.py::test_a_family_is_what_its_row_says\[(granitemoe|granitemoeshared|ernie4_5_moe|exaone_moe"
    r"|hunyuan_v1_moe|cohere2_moe|idefics3|llava_next|internlm3|flex_olmo|ministral|glm4|olmoe|solar_open|arcee"
    r"|bamba|lfm2_moe|qwen3_5_text|qwen3_5_moe_text|granitemoe_swa|qwen3_vl_moe)\]"
    r"|test_hybrids.py::test_pages_of_16_bits_generate_what_transformers_generates\[(bamba|lfm2_moe|olmo_hybrid"
    r"|qwen3_5_text|qwen3_5_moe_text)\]"
    r"|test_hybrids.py::test_rows_of_a_left_padded_batch_are_each_row_alone\[(granitemoehybrid|lfm2|nemotron_h)\]"
    r"|test_hybrids.py::test_beams_of_packed_pages_are_those_of_a_pass_over_the_whole_text\[(granitemoehybrid|lfm3"
    r"|nemotron_h)\]"
    r"|test_hybrid_search.py::test_a_model_read_layer_by_layer_gives_the_same_artifact_which_saves_itself\[qwen3_5"
    r"|test_hybrid_search.py::test_a_checkpoint_of_towers_is_read_as_its_language_model_alone\[qwen3_5\]"
    r"|test_optimum.py::test_same_words\[args[1-4]\]"
    r"|test_modes.py::test_rows_of_a_left_padded_batch_are_each_row_alone\["
    r"options[12]-(qwen3|gemma2|phi3|gpt_oss)-raw\]"
    r"|test_modes.py::test_rows_of_a_left_padded_batch_are_each_row_alone\["
    r"(options1-(qwen3|phi3)|options0-(qwen3|gemma2|phi3|gpt_oss))-packed\]"
    r"|test_ahead.py::test_another_artifacts_kernels_are_all_among_the_catalogues\[False\]"
    r"|test_triton_encode.py::test_pages_equal_the_reference\[(64@1.6|128@1.6|48@1.6|8@1 48@5)"
    r"|test_triton_encode.py::test_lowered_pages_equal_the_reference\[(16-40@8|64@4 asym g32|8@6 32@5|128@1.6)"
    r"|test_plugin.py::test_registering_is_enough\[(import transformers, kvfold"
    r"|import kvfold, transformers|import kvfold; kvfold.unreg)"
    r"|test_hub_push.py::test_status\[(429|418)-headers[12]-words[12]-(GET /api/models/|POST /api/repos/create)\]"
)


def pytest_runtest_setup(item):
    """What a test before has changed for the whole process: the command line flushes denormal
    numbers."""
    torch.set_flush_denormal(False)


def pytest_collection_finish():
    """Nothing that was imported is looked through for garbage."""
    gc.freeze()
    gc.enable()


# files with the longest tests, beside those of the Triton kernels
LONG = (
    "test_ahead.py",
    "test_compile.py",
    "test_differential.py",
    "test_interrupt.py",
    "test_modes.py",
    "test_processes.py",
)


def pytest_collection_modifyitems(items):
    """Marks what is slow; the kernels' tests and other long ones begin, so that no worker is left
    with them."""
    items.sort(key=lambda item: not item.path.name.startswith(("test_triton", *LONG)))
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
