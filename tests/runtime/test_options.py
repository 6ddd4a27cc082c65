"""Options of the loaders: each works or is refused by name, for a folder and a Hub id alike."""

import inspect

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from kvfold import KvfoldError, runtime
from kvfold.runtime.calls.options import HUB, PASSED_ON, REFUSED

IDS = torch.arange(20)[None]
NAMES = set(inspect.signature(runtime.load_pretrained).parameters) | HUB
WHERE = ("folder", "owner/name", "no/such/folder")


@pytest.fixture(params=WHERE)
def where(request, tiny_artifact):
    """A folder that is an artifact, a Hub id, and what is neither: the options are looked at
    first."""
    return tiny_artifact if request.param == "folder" else request.param


@pytest.mark.parametrize(
    ("name", "meant"),
    [("kv_buget", "kv_budget"), ("polcy", "policy"), ("dtpye", "dtype"), ("cuda_grahp", "cuda_graph"),
     ("local_file_only", "local_files_only"), ("devcie", "device"), ("tokens", "token"), ("attn", "attention")],
)  # fmt: skip
def test_a_misspelt_option_is_named_with_the_right_one(where, name, meant):
    with pytest.raises(TypeError, match=rf"'{name}'; did you mean '{meant}'\?") as error:
        runtime.load_pretrained(where, **{name: "1KiB"})
    assert "\n" not in str(error.value)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.from_regex(r"[a-z][a-z_0-9]{0,20}", fullmatch=True).filter(
        lambda name: name not in NAMES
    )
)
def test_no_name_is_swallowed(registered, tiny_artifact, name):
    with pytest.raises(TypeError, match=rf"\b{name}\b"):
        runtime.load_pretrained(tiny_artifact, **{name: 3})
    if name not in PASSED_ON:
        with pytest.raises(TypeError, match=rf"\b{name}\b"):
            AutoModelForCausalLM.from_pretrained(tiny_artifact, **{name: 3})


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_has_and_kvfold_cannot_follow(registered, tiny_artifact, name):
    value = "none" if name != "use_safetensors" else False
    for load in (runtime.load_pretrained, AutoModelForCausalLM.from_pretrained):
        if (name, load) in (
            ("subfolder", AutoModelForCausalLM.from_pretrained),
            ("gguf_file", AutoModelForCausalLM.from_pretrained),
        ):
            continue  # there they lead to another model than the artifact
        with pytest.raises(TypeError, match=f"does not take {name}={value!r}: .*; leave it out"):
            load(tiny_artifact, **{name: value})
        if name != "use_safetensors":
            load(tiny_artifact, **{name: None})  # as wrappers pass what nobody set


@pytest.mark.parametrize(
    "name",
    [
        "kv_budget",
        "policy",
        "attention",
        "cuda_graph",
        "rollback",
        "offload",
        "batch_invariant",
        "device",
    ],
)
def test_what_load_pretrained_alone_has(registered, tiny_artifact, name):
    with pytest.raises(
        TypeError, match=rf"'{name}'; load it with kvfold's runtime\.load_pretrained"
    ):
        AutoModelForCausalLM.from_pretrained(tiny_artifact, **{name: "1GiB"})


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16), ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
     ({"torch_dtype": "float16"}, torch.float16), ({"dtype": "auto"}, torch.bfloat16),
     ({"dtype": "torch.float32"}, torch.float32),
     ({"device_map": "cpu"}, torch.float32), ({"device_map": {"": "cpu"}}, torch.float32),
     ({"device_map": torch.device("cpu")}, torch.float32),
     ({"device_map": {"model.layers.0": "cpu", "lm_head": "cpu"}, "torch_dtype": "bfloat16"}, torch.bfloat16),
     ({"trust_remote_code": True, "token": None, "local_files_only": True, "cache_dir": None}, torch.float32)],
)  # fmt: skip
def test_what_transformers_calls_otherwise_works(tiny_artifact, options, dtype):
    if not torch.cuda.is_available():
        options = {**options, "device_map": options.get("device_map", "auto")}
    model = runtime.load_pretrained(tiny_artifact, **options)
    assert model.dtype == dtype
    assert isinstance(model(IDS.to(model.device)).past_key_values, runtime.QuantizedKVCache)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [({"dtype": "bfloat61"}, KvfoldError, "dtype='bfloat61'"),
     ({"torch_dtype": torch.int8}, KvfoldError, "torch_dtype=torch.int8"),
     ({"dtype": "load"}, KvfoldError, "dtype='load'"), ({"dtype": 16}, KvfoldError, "dtype=16"),
     ({"device": "cuda:77"}, KvfoldError, "device='cuda:77'"),
     ({"device": "nonsense"}, KvfoldError, "device='nonsense'"), ({"device": "meta"}, KvfoldError, "device='meta'"),
     ({"device_map": "nonsense"}, KvfoldError, "device_map='nonsense'"),
     ({"device_map": {"a": "cpu", "b": "cuda:0"}}, TypeError, "one device"),
     ({"dtype": "auto", "torch_dtype": "auto"}, TypeError, "both dtype and torch_dtype"),
     ({"device": "cpu", "device_map": "cpu"}, TypeError, "both device and device_map")],
)  # fmt: skip
def test_values_that_are_none(tiny_artifact, options, error, words):
    with pytest.raises(error, match=words) as found:
        runtime.load_pretrained(tiny_artifact, **options)
    assert "\n" not in str(found.value)


def test_a_generation_config_that_names_another_cache(registered, tmp_path, tiny_artifact, capsys):
    """As artifacts have that an older version made of such a model, or after an edit."""
    import json
    import shutil

    from kvfold.exports.reader import update_artifact

    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    (folder / "generation_config.json").write_text(
        json.dumps({"cache_implementation": "static", "do_sample": False, "temperature": 0.3})
    )
    update_artifact(folder)
    for load in (runtime.load_pretrained, AutoModelForCausalLM.from_pretrained):
        out = load(folder).generate(IDS, max_new_tokens=2, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, runtime.QuantizedKVCache)
    model = runtime.load_pretrained(folder)
    with pytest.raises(KvfoldError, match="cache_implementation='sliding_window'"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="sliding_window")
    model.save_pretrained(
        tmp_path / "again"
    )  # a config that was changed would be refused by transformers
