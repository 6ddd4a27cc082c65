"""Models whose files make no sense together are refused before the search, in a sentence; what can
be used is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import char_tokenizer, save_tiny
from refusals import checkpoint, edit_config, kvfold, refused  # noqa: F401  (fixtures)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from kvfold import KvfoldError, runtime
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.compress.text import MOST_CHARS, read_documents
from kvfold.exports.reader import read_artifact

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
    ],
)
def test_a_weight_that_is_no_number(refused, checkpoint, monkeypatch, name, value):
    monkeypatch.setattr(
        "kvfold.compress.search.calibrate", None
    )  # refused before anything is computed
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(name, "NaN or infinity", "'model'", model=checkpoint)


def test_a_tied_head_is_looked_at_too(refused, tmp_path):
    folder = save_tiny(tmp_path / "model", "llama", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["model.embed_tokens.weight"][3, 3] = NAN
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused("NaN or infinity", model=edit_config(folder, tie_word_embeddings=True))


def test_a_row_that_no_text_uses_may_be_anything(tmp_path, checkpoint, text_file, recipe_file):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.embed_tokens.weight"][1] = NAN
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    compress(
        str(checkpoint),
        "4.0",
        tmp_path / "out",
        calib=str(text_file),
        recipe=load_recipe(recipe_file),
    )


def test_finite_weights_whose_logits_are_not(refused, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], 3e38)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused("logits", "NaN or infinite", model=checkpoint)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 0}, ["num_hidden_layers 0", "1 to 1000"]),
        ({"num_hidden_layers": 10**7}, ["num_hidden_layers 10000000"]),
        ({"num_key_value_heads": 3}, ["4 attention heads for 3"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads"]),
    ],
)
def test_numbers_of_layers_and_heads(refused, checkpoint, fields, words):
    refused(*words, model=edit_config(checkpoint, **fields))


def test_config_without_end(refused, checkpoint):
    (checkpoint / "config.json").write_text("[" * 100_000)
    refused("config.json", "not JSON", model=checkpoint)


def test_index_that_leaves_the_folder(refused, checkpoint, tmp_path):
    shutil.move(checkpoint / "model.safetensors", tmp_path / "outside.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../outside.safetensors"}}))
    refused("'../outside.safetensors'", "beside it", model=checkpoint)


def test_index_that_transformers_cannot_use(refused, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "part.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")})
    )  # no "metadata"
    refused(checkpoint, "make no model", model=checkpoint)


@pytest.mark.parametrize(
    "fields",
    [{"cache_implementation": "nonsense"}, {"max_new_tokens": -3}, {"num_return_sequences": 3}],
)
def test_generation_config_that_cannot_be_written_again(refused, checkpoint, fields):
    (checkpoint / "generation_config.json").write_text(json.dumps(fields))
    refused(str(next(iter(fields))), "generation_config.json", model=checkpoint)


# -- tokenizers


def test_tokenizer_of_another_model(refused, checkpoint):
    fields = json.loads((checkpoint / "tokenizer.json").read_text())
    fields["model"]["vocab"] = {word: i + 100 for word, i in fields["model"]["vocab"].items()}
    (checkpoint / "tokenizer.json").write_text(json.dumps(fields))
    refused("vocab_size is 128", "tokenizer", model=checkpoint)


@pytest.mark.parametrize("content", ["{", "{}", "[", '{"model": 3}', "null"])
def test_tokenizer_that_is_none(refused, checkpoint, content):
    (checkpoint / "tokenizer.json").write_text(content)
    refused(checkpoint, "tokenizer", model=checkpoint)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}x",
        "{{ nothing.of.this }}",
        "{{ 3 | nonsense }}",
        "{%",
    ],
)
def test_a_chat_template_that_fails_is_left_out(
    tmp_path, checkpoint, text_file, recipe_file, template
):
    (checkpoint / "chat_template.jinja").write_text(template)
    compress(
        str(checkpoint),
        "4.0",
        tmp_path / "out",
        calib=str(text_file),
        recipe=load_recipe(recipe_file),
    )


def test_several_chat_templates_lie_side_by_side_with_the_rest(
    tmp_path, checkpoint, text_file, recipe_file
):
    templates = {
        "default": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "tool_use": "{{ tools }}",
        "rag": "{{ documents }}",
    }
    tokenizer = char_tokenizer()
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(checkpoint)
    assert (checkpoint / "additional_chat_templates").is_dir()
    out = compress(
        str(checkpoint),
        "4.0",
        tmp_path / "out",
        calib=str(text_file),
        recipe=load_recipe(recipe_file),
    ).path
    assert all(file.is_file() for file in out.iterdir())
    assert AutoTokenizer.from_pretrained(out).chat_template == templates
    read_artifact(out)


def test_a_tokenizer_that_cannot_be_written_is_refused_before_the_search(
    refused, checkpoint, monkeypatch
):
    def fail(self, *args, **kwargs):
        raise NotImplementedError("no way back")

    monkeypatch.setattr("kvfold.compress.pipeline.search", None)
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    refused("tokenizer of 'model'", "no way back", model=checkpoint)


def test_another_cache_is_left_out_of_the_generation_config(
    tmp_path, checkpoint, text_file, recipe_file, capsys
):
    (checkpoint / "generation_config.json").write_text(
        json.dumps(
            {"cache_implementation": "static", "do_sample": False, "temperature": 0.3, "top_k": 7}
        )
    )
    out = compress(
        str(checkpoint),
        "4.0",
        tmp_path / "out",
        calib=str(text_file),
        recipe=load_recipe(recipe_file),
    ).path
    written = json.loads((out / "generation_config.json").read_text())
    assert "cache_implementation" not in written and written["top_k"] == 7
    assert "leaving out cache_implementation 'static'" in capsys.readouterr().err


# -- text


def test_a_large_text_is_read_in_part(tmp_path, caplog):
    file = tmp_path / "large.txt"
    file.write_text("a é" * (MOST_CHARS // 3 + 1000))
    [text] = read_documents(str(file))[1]
    assert len(text) == MOST_CHARS and "only the first" in caplog.text
    Path(file).write_text(text)
    caplog.clear()
    assert read_documents(str(file))[1] == [text] and not caplog.text


# -- memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_too_little_memory_is_no_fault_of_the_files(
    refused, checkpoint, tiny_artifact, monkeypatch, error
):
    def fail(*args, **kwargs):
        raise error

    for module in ("kvfold.compress.models", "kvfold.runtime.load"):
        monkeypatch.setattr(f"{module}.stock_from_pretrained", fail)
    refused("too little memory", model=checkpoint)
    with pytest.raises(KvfoldError, match="too little memory"):
        runtime.load_pretrained(tiny_artifact)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_quantised_without_saying_so(refused, checkpoint, dtype):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused("lm_head.weight", "quantised", "bfloat16, float16 or float32", model=checkpoint)
