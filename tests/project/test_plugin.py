"""An artifact under transformers' own loader: with kvfold registered, without that, and where there
is no kvfold."""

import copy
import filecmp
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import prepared
import pytest
import torch
import transformers
from conftest import FAMILIES, save_tiny
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

import kvfold
from kvfold import KvfoldError, runtime
from kvfold.autoclass import stock_from_pretrained
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.reader import read_artifact

IDS = torch.arange(150).remainder(128)[None]

# a finder that refuses kvfold, so that an installed one can't be found either
BLOCK = """
import sys
class Block:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "kvfold":
            raise ImportError(name)
sys.meta_path.insert(0, Block)
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging
logging.disable_progress_bar()
def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
ids = torch.arange(150).remainder(128)[None]
"""


def python(code: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", prepared.alone(code), *map(str, args)],
        capture_output=True,
        text=True,
    )


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def assert_same_files(a: Path, b: Path) -> None:
    assert listing(a) == listing(b)
    assert filecmp.cmpfiles(a, b, listing(a), shallow=False) == (listing(a), [], [])


# -- without kvfold

STOCK = """
for pair in zip(sys.argv[1::2], sys.argv[2::2]):
    original, artifact = (load(path) for path in pair)
    with torch.no_grad():
        a, b = (model(ids) for model in (original, artifact))
    assert type(original) is type(artifact) and type(b.past_key_values) is DynamicCache
    assert b.past_key_values.layers[0].keys.shape == a.past_key_values.layers[0].keys.shape
    same = [model.generate(ids, max_new_tokens=20, do_sample=False).tolist() for model in (original, artifact)]
    print(float((a.logits - b.logits).abs().max() / a.logits.abs().max()), same[0] == same[1])
assert not any(name.partition(".")[0] == "kvfold" for name in sys.modules)
"""


def test_a_stock_environment_computes_the_original(tmp_path, text_file, recipe_file, no_plots):
    """Keys are transformed where they are written, values in float32 weights: rounding of the last
    bits is all that is left."""
    pairs = []
    for family in FAMILIES:
        pairs += [save_tiny(tmp_path / family, family, torch.float32), tmp_path / f"{family}-out"]
        budget = (
            "15.0" if family == "phi3" else "4.0"
        )  # every layer slides: hardly more than the 16-bit rows is cached
        compress(
            str(pairs[-2]), budget, pairs[-1], calib=str(text_file), recipe=load_recipe(recipe_file)
        )
    done = prepared.python("transformers", BLOCK + STOCK, *pairs)
    assert (done.returncode, done.stderr) == (0, "")  # no warning either
    for family, line in zip(FAMILIES, done.stdout.splitlines(), strict=True):
        error, same_text = line.split()
        assert float(error) < 1e-5 and same_text == "True", family


def test_a_stock_environment_computes_the_original_to_the_bit(
    tmp_path, tiny_folder, text_file, recipe_file
):
    """Where nothing is folded into the weights: however keys are transformed, it is done where they
    are written."""
    pairs = []
    for key in ("whiten", "reorder"):
        recipe = tmp_path / f"{key}.yaml"
        recipe.write_text(
            recipe_file.read_text() + f"value: {{transform: none}}\nkey: {{transform: {key}}}\n"
        )
        pairs += [tiny_folder, tmp_path / key]
        compress(
            str(tiny_folder), "5.0", pairs[-1], calib=str(text_file), recipe=load_recipe(recipe)
        )
    done = prepared.python("transformers", BLOCK + STOCK, *pairs)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "0.0 True\n" * 2), done.stderr


def test_a_stock_environment_saves_a_plain_checkpoint(tmp_path, tiny_artifact):
    """Re-saved without kvfold it is no artifact, so nobody takes it for one."""
    code = BLOCK + "load(sys.argv[1]).save_pretrained(sys.argv[2])"
    done = prepared.python("transformers", code, tiny_artifact, tmp_path / "plain")
    assert done.stderr == ""
    assert listing(tmp_path / "plain") == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    with pytest.raises(KvfoldError, match="not an artifact"):
        runtime.load_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("key", ["none", "smooth", "reorder", "whiten"])
def test_no_form_needs_a_model_type_of_its_own(tmp_path, tiny_folder, text_file, recipe_file, key):
    """What would be misread elsewhere must not call itself a llama. Nothing of the kind is made:
    the config is the original's, and the weights that an order of channels would have to be folded
    into are the original's too."""
    from safetensors.torch import load_file

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_file.read_text() + f"key: {{transform: {key}}}\n")
    compress(
        str(tiny_folder), "6.0", tmp_path / "out", calib=str(text_file), recipe=load_recipe(recipe)
    )
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        tiny_folder / "config.json"
    ).read_bytes()
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "out")
    )
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"v_proj", "o_proj"} | ({"q_proj", "k_proj"} if key == "smooth" else set())


# -- with kvfold


@torch.no_grad()
@pytest.mark.parametrize(
    "order",
    [
        "import kvfold, transformers; kvfold.register()",
        "import kvfold; kvfold.register(); import transformers",
        "import kvfold; kvfold.unregister(); kvfold.register(); kvfold.register()",
        "import transformers, kvfold; kvfold.register()",
        "from transformers import AutoModelForCausalLM; import kvfold; kvfold.register(); kvfold.register()",
    ],
)
def test_registering_is_enough(tiny_artifact, tiny_folder, order):
    code = f"""
import sys
{order}
assert ("torch" in sys.modules) == ("AutoModelForCausalLM" in {order!r})
from transformers import AutoModelForCausalLM
import torch
ids = torch.arange(150).remainder(128)[None]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model(ids).past_key_values).__name__, \
model.generate(ids, max_new_tokens=16, do_sample=False)[0].tolist(), sep="|")
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[2])(ids).past_key_values).__name__)
kvfold.unregister()
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])(ids).past_key_values).__name__)
print(type(model(ids).past_key_values).__name__, len(sys.meta_path), AutoModelForCausalLM.from_pretrained.__module__)
"""
    imported = order.startswith("from transformers")  # all else begins with nothing imported
    done = begin(imported)(code, tiny_artifact, tiny_folder)
    assert done.returncode == 0, done.stderr
    [packed, plain, back, stays] = done.stdout.splitlines()
    wanted = runtime.load_pretrained(tiny_artifact, device="cpu").generate(
        IDS, max_new_tokens=16, do_sample=False
    )
    assert packed == f"QuantizedKVCache|{wanted[0].tolist()}"
    assert plain == back == "DynamicCache"
    name, finders, module = stays.split()
    assert [name, finders] == ["QuantizedKVCache", stock_finders(imported)] and module.startswith(
        "transformers."
    )


def begin(imported: bool):
    """What runs code: in a process that has imported transformers, or in one that has nothing."""
    return functools.partial(prepared.python, "transformers") if imported else python


@functools.cache
def stock_finders(imported: bool) -> str:
    """How many finders a process has that has imported transformers alone."""
    code = "import sys, transformers; print(len(sys.meta_path))"
    return begin(imported)(code).stdout.strip()


UNTOUCHED = """
import sys
finders = len(sys.meta_path)
def untouched():
    there = "transformers" in sys.modules
    assert len(sys.meta_path) in (finders, finders + there)  # of its own, for its lazy modules
    if there:
        from transformers import AutoModelForCausalLM
        assert AutoModelForCausalLM.from_pretrained.__func__.__module__.startswith("transformers.")
        assert not hasattr(AutoModelForCausalLM.from_pretrained.__func__, "kvfold_stock")
{order}
untouched()
from transformers import AutoModelForCausalLM
import torch
untouched()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model(torch.arange(150).remainder(128)[None]).past_key_values).__name__, \
model.dtype, hasattr(model, "kv_artifact"))
"""


@torch.no_grad()
@pytest.mark.parametrize(
    "order",
    [
        # one process for both: what the first had changed would still be so after the second
        "import kvfold; untouched(); import kvfold.runtime",
        (
            "from transformers import AutoModelForCausalLM; "
            "import kvfold.runtime, kvfold.compress.cli, kvfold.runtime.calls.plugin"
        ),
        (
            "from kvfold.autoclass import stock_from_pretrained; stock_from_pretrained(sys.argv[1]); untouched(); "
            "from kvfold import runtime; runtime.load_pretrained(sys.argv[1])"
        ),
    ],
)
def test_an_import_leaves_transformers_alone(tiny_artifact, order):
    """What else runs in the process loads what it loaded before."""
    kind = "transformers" if order.startswith("from transformers") else "torch"
    done = prepared.python(kind, UNTOUCHED.format(order=order), tiny_artifact)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["DynamicCache torch.bfloat16 False"]


def test_registering_and_taking_back_are_exact(tiny_artifact):
    before = vars(AutoModelForCausalLM).get("from_pretrained")
    for _ in range(2):
        kvfold.register()
        ours = vars(AutoModelForCausalLM)["from_pretrained"].__func__
        kvfold.register()
        assert (
            vars(AutoModelForCausalLM)["from_pretrained"].__func__ is ours
            and ours.kvfold_stock is before.__func__
        )
        kept = AutoModelForCausalLM.from_pretrained
        kvfold.unregister()
        kvfold.unregister()
        assert vars(AutoModelForCausalLM)["from_pretrained"].__func__ is before.__func__
        assert not hasattr(kept(tiny_artifact), "kv_artifact")  # a method kept from then follows


def test_somebody_who_wraps_it_too_is_left_there(tiny_artifact, monkeypatch):
    kvfold.register()
    ours, asked = AutoModelForCausalLM.from_pretrained, []

    @functools.wraps(ours.__func__)
    def theirs(cls, *args, **options):
        asked.append(args)
        return ours(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(theirs))
    kvfold.unregister()
    assert AutoModelForCausalLM.from_pretrained.__func__ is theirs
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tiny_artifact), "kv_artifact")
    kvfold.register()
    assert (
        hasattr(AutoModelForCausalLM.from_pretrained(tiny_artifact), "kv_artifact")
        and len(asked) == 2
    )
    monkeypatch.undo()
    kvfold.unregister()
    assert not hasattr(AutoModelForCausalLM.from_pretrained, "kvfold_stock")


@torch.no_grad()
def test_either_model_in_either_state(tiny_artifact):
    """Both in one process, to compare them."""
    assert kvfold.stock_from_pretrained is stock_from_pretrained
    for change in (kvfold.register, kvfold.unregister):
        change()
        stock = kvfold.stock_from_pretrained(tiny_artifact)
        packed = runtime.load_pretrained(tiny_artifact, device="cpu", dtype=torch.bfloat16)
        assert type(stock(IDS).past_key_values) is DynamicCache and not hasattr(
            stock, "kv_artifact"
        )
        assert isinstance(packed(IDS).past_key_values, runtime.QuantizedKVCache)


def test_import_stays_light():
    """Only the standard library; a fraction of what importing torch takes."""
    done = python(
        "import sys; before = set(sys.modules); import kvfold; print(*sorted(set(sys.modules) - before))"
    )
    packages = {name.partition(".")[0] for name in done.stdout.split()} - {"kvfold"}
    assert packages <= sys.stdlib_module_names, packages


@torch.no_grad()
def test_the_same_model_as_load_pretrained(tiny_artifact, registered):
    ours, theirs = (
        runtime.load_pretrained(tiny_artifact),
        AutoModelForCausalLM.from_pretrained(tiny_artifact),
    )
    assert type(ours) is type(theirs) is LlamaForCausalLM
    assert (ours.dtype, ours.device, ours.training) == (
        theirs.dtype,
        theirs.device,
        theirs.training,
    )
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    a, b = (model(IDS).past_key_values for model in (ours, theirs))
    assert isinstance(b, runtime.QuantizedKVCache) and a.nbytes == b.nbytes
    assert theirs.kv_artifact.metadata == ours.kv_artifact.metadata


@torch.no_grad()
def test_options_mean_what_they_mean_to_transformers(tiny_artifact, registered):
    for options in (
        {"dtype": torch.bfloat16},
        {"torch_dtype": "bfloat16"},
        {"device_map": "cpu", "dtype": "auto"},
        {"device_map": {"": "cpu"}},
    ):
        model = AutoModelForCausalLM.from_pretrained(tiny_artifact, **options)
        assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
        assert isinstance(model(IDS).past_key_values, runtime.QuantizedKVCache)
    model, info = AutoModelForCausalLM.from_pretrained(str(tiny_artifact), output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM) and not info["missing_keys"]
    pipe = transformers.pipeline("text-generation", model=str(tiny_artifact))
    assert (
        hasattr(pipe.model, "kv_artifact")
        and len(pipe("a cache", max_new_tokens=4)[0]["generated_text"]) > 7
    )


def test_a_damaged_artifact_is_refused(tmp_path, tiny_artifact, registered):
    damaged = shutil.copytree(tiny_artifact, tmp_path / "damaged")
    (damaged / "kv_cache.safetensors").write_bytes(b"")
    with pytest.raises(KvfoldError, match=r"kv_cache\.safetensors"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_other_models_load_as_ever(tiny_folder, tmp_path, registered):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert not hasattr(model, "kv_artifact") and model.dtype == torch.bfloat16
    for name in ("no/such-model", tmp_path / "nothing", 3):
        with pytest.raises((OSError, ValueError, TypeError)) as ours:
            AutoModelForCausalLM.from_pretrained(name)
        with pytest.raises(type(ours.value)) as theirs:
            stock_from_pretrained(name)
        assert str(ours.value) == str(theirs.value)


def test_the_concrete_classes_stay_stock(tiny_artifact, registered):
    for model in (
        LlamaForCausalLM.from_pretrained(tiny_artifact),
        stock_from_pretrained(tiny_artifact),
    ):
        assert not hasattr(model, "kv_artifact") and model.dtype == torch.bfloat16


# -- save_pretrained


def test_saved_again_it_is_the_same_artifact(tmp_path, tiny_artifact, registered):
    """Byte for byte, though a CPU computes in float32."""
    for i, load in enumerate((runtime.load_pretrained, AutoModelForCausalLM.from_pretrained)):
        model = load(tiny_artifact)
        assert model.dtype == torch.float32
        model.save_pretrained(tmp_path / f"{i}")
        assert_same_files(tiny_artifact, tmp_path / f"{i}")
        model.save_pretrained(tmp_path / f"{i}")  # over itself
        assert_same_files(tiny_artifact, tmp_path / f"{i}")
    assert listing(tmp_path) == ["0", "1"]


@torch.no_grad()
def test_changed_weights_are_saved_as_they_are(tmp_path, tiny_artifact):
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    name, weight = "model.layers.1.mlp.up_proj.weight", model.model.layers[1].mlp.up_proj.weight
    weight.add_(1e-6)  # less than bfloat16 could hold
    model.save_pretrained(tmp_path / "out", max_shard_size="60KB")
    artifact = read_artifact(tmp_path / "out")
    assert (
        "model.safetensors" not in artifact.metadata.files
        and sum("model-" in n for n in artifact.metadata.files) > 2
    )
    again = runtime.load_pretrained(tmp_path / "out", device="cpu")
    assert torch.equal(again.state_dict()[name], weight)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    again.save_pretrained(tmp_path / "third")
    read_artifact(tmp_path / "third")


def test_saved_beside_other_files(tmp_path, tiny_artifact):
    """As scripts do it: tokenizer first, then the model, or the other way round."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_artifact)
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "first")
    mine = (tmp_path / "first" / "tokenizer.json").read_bytes()
    (tmp_path / "first" / "notes.txt").write_text("mine")
    (tmp_path / "first" / "kv_cache.safetensors").write_bytes(b"of something else")
    model.save_pretrained(tmp_path / "first")
    read_artifact(tmp_path / "first")
    assert (tmp_path / "first" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "first" / "tokenizer.json").read_bytes() == mine
    model.save_pretrained(tmp_path / "last")
    transformers.AutoTokenizer.from_pretrained(tiny_artifact).save_pretrained(tmp_path / "last")
    read_artifact(tmp_path / "last")
    assert listing(tmp_path) == ["first", "last"]


def test_what_cannot_be_saved(tmp_path, tiny_artifact):
    folder = shutil.copytree(tiny_artifact, tmp_path / "gone")
    model = runtime.load_pretrained(folder, device="cpu")
    with pytest.raises(KvfoldError, match="kvfold push"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(KvfoldError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    shutil.rmtree(folder)
    with pytest.raises(KvfoldError, match="is gone"):
        model.save_pretrained(tmp_path / "out")
    assert listing(tmp_path) == ["file"]


def test_a_copy_saves_its_own_weights(tmp_path, tiny_artifact):
    model = copy.deepcopy(runtime.load_pretrained(tiny_artifact, device="cpu"))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "out")
    read_artifact(tmp_path / "out")
    saved = stock_from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)
