"""What turns the plugin on, and what is refused in a sentence. No engine is started."""

import logging
import shutil
from dataclasses import replace

import engine  # skips this module where vLLM is not installed  # noqa: F401
import pytest
import vllm
from vllm.config import KVTransferConfig, get_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.plugins import load_general_plugins
from vllm.v1.core import kv_cache_utils

from kvfold import KvfoldError
from kvfold.exports.reader import read_artifact, update_artifact
from kvfold.runtime.private_names import VLLM_NAMES, is_there, report
from kvfold.runtime.vllm import register as plugin
from kvfold.runtime.vllm import settings
from kvfold.runtime.vllm.version import check_version, is_tested


def arguments(model, **options) -> EngineArgs:
    return EngineArgs(
        str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=512, **options
    )


def test_the_plugin_is_an_entry_point_and_registers_once():
    load_general_plugins()
    made = EngineArgs.create_engine_config
    plugin.register()
    assert made.kvfold and EngineArgs.create_engine_config is made


def test_an_artifacts_folder_turns_it_on(tiny_artifact):
    config = arguments(tiny_artifact).create_engine_config()
    assert settings.folder_of(config) == str(tiny_artifact.resolve())
    assert config.cache_config.block_size == 128
    assert config.scheduler_config.max_num_batched_tokens == 2048
    config = arguments(
        tiny_artifact, block_size=64, max_num_batched_tokens=512
    ).create_engine_config()
    assert config.cache_config.block_size == 64
    assert config.scheduler_config.max_num_batched_tokens == 512


def test_ranks_that_divide_no_heads_are_refused(tiny_artifact):
    config = arguments(tiny_artifact).create_engine_config()
    config.parallel_config.tensor_parallel_size = 3
    with pytest.raises(KvfoldError, match=r"--tensor-parallel-size 3 divides the 2 KV heads .*"):
        settings.check_config(config, read_artifact(tiny_artifact))


def test_wider_weights_than_the_served_type_are_told(tiny_artifact, caplog):
    artifact = read_artifact(tiny_artifact)
    provenance = artifact.metadata.provenance.model_copy(update={"fused_dtype": "float32"})
    metadata = artifact.metadata.model_copy(update={"provenance": provenance})
    for dtype, told in (("float32", False), ("bfloat16", True)):
        caplog.clear()
        config = EngineArgs(
            str(tiny_artifact), skip_tokenizer_init=True, dtype=dtype, max_model_len=512
        )
        with caplog.at_level(logging.WARNING, "kvfold"):
            settings.check_config(
                config.create_engine_config(), replace(artifact, metadata=metadata)
            )
        assert ("--dtype float32" in caplog.text) == told


def test_any_other_model_is_left_alone(tiny_folder):
    config = arguments(tiny_folder, kv_cache_dtype="auto").create_engine_config()
    assert settings.folder_of(config) is None and config.additional_config == {}
    assert arguments(tiny_folder, pipeline_parallel_size=2).pipeline_parallel_size == 2


REFUSED = [
    ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 .* leave it out"),
    ({"attention_backend": "FLASH_ATTN"}, "--attention-backend .* leave it out"),
    ({"block_size": 100}, "block of 100 tokens .* multiple of 8"),
    ({"pipeline_parallel_size": 2}, "Pipeline parallelism .* --pipeline-parallel-size"),
    ({"enable_lora": True}, "LoRA .* --enable-lora"),
    ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
    (
        {
            "kv_transfer_config": KVTransferConfig(
                kv_connector="ExampleConnector", kv_role="kv_both"
            )
        },
        "KV connector .* --kv-transfer-config",
    ),
    (
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 30,
                "prompt_lookup_max": 3,
            }
        },
        "num_speculative_tokens is 30, .* 24 tokens",
    ),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[next(iter(o)) for o, _ in REFUSED])
def test_what_is_not_right_over_packed_pages_is_refused_by_name(tiny_artifact, options, words):
    with pytest.raises(KvfoldError, match=words):
        arguments(tiny_artifact, **options).create_engine_config()


def test_a_draft_model_is_refused(tiny_artifact, tiny_folder):
    drafts = {"model": str(tiny_folder), "num_speculative_tokens": 2, "method": "draft_model"}
    with pytest.raises(KvfoldError, match=r"Speculation by 'draft_model' .* use method ngram"):
        arguments(tiny_artifact, speculative_config=drafts).create_engine_config()


def test_an_artifact_without_an_index_is_refused_with_the_command_that_adds_it(
    tiny_artifact, tmp_path
):
    old = shutil.copytree(tiny_artifact, tmp_path / "old")
    (old / "model.safetensors.index.json").unlink()
    update_artifact(old)
    with pytest.raises(KvfoldError, match="kvfold validate --fix"):
        arguments(old).create_engine_config()


def test_a_damaged_artifact_is_refused(tiny_artifact, tmp_path):
    copy = shutil.copytree(tiny_artifact, tmp_path / "copy")
    with open(copy / "model.safetensors", "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    with pytest.raises(KvfoldError, match=r"model\.safetensors .* does not match its sha256"):
        arguments(copy).create_engine_config()


def test_another_version_is_refused_for_artifacts_alone(tiny_artifact, tiny_folder):
    class Args:
        """In the place of EngineArgs."""

        revision = hf_token = download_dir = None

        def __init__(self, model):
            self.model = str(model)

        def create_engine_config(self):
            return "stock"

    plugin.wrap_arguments(Args, "0.40.1")
    assert Args(tiny_folder).create_engine_config() == "stock"
    with pytest.raises(KvfoldError, match=r"This is vLLM 0\.40\.1, but .* >=0\.32,<0\.33"):
        Args(tiny_artifact).create_engine_config()


def test_the_tested_range():
    assert all(map(is_tested, ("0.32.0", "0.32.5", "0.32.1rc1+cpu", vllm.__version__)))
    assert not any(map(is_tested, ("0.31.0", "0.33.0", "1.0", "dev", "")))
    check_version("0.32.0")


def test_an_untested_version_has_its_layers_left_alone(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.40.0")
    before = Attention.__init__, kv_cache_utils.get_kv_cache_groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineArgs, "create_engine_config", lambda self: None)
        plugin.register()
        assert EngineArgs.create_engine_config.kvfold
    assert (Attention.__init__, kv_cache_utils.get_kv_cache_groups) == before


def test_an_artifact_is_refused_where_layers_could_not_be_wrapped(monkeypatch, tiny_artifact):
    def fail():
        raise AttributeError("moved elsewhere")

    monkeypatch.setattr(plugin, "wrap_layers", fail)
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: "stock")
    plugin.register()
    with pytest.raises(KvfoldError, match=r"can't be set up .*AttributeError: moved elsewhere"):
        arguments(tiny_artifact).create_engine_config()


def test_registering_never_raises(monkeypatch, caplog):
    def fail(*args):
        raise AttributeError("moved elsewhere")

    monkeypatch.setattr(plugin, "wrap_layers", fail)
    monkeypatch.setattr(plugin, "wrap_arguments", fail)
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: None)
    with caplog.at_level(logging.ERROR, "kvfold"):
        plugin.register()
    assert "not registered" in caplog.text and "moved elsewhere" in caplog.text


def test_the_functions_that_are_wrapped_are_called_by_the_names_that_are_wrapped():
    """A copy of a name that a module of vLLM's keeps for itself would go past us."""
    from vllm.model_executor.layers import attention
    from vllm.model_executor.layers.attention import attention as module

    assert attention.Attention is module.Attention is Attention
    assert kv_cache_utils.get_kv_cache_configs.__globals__["get_kv_cache_groups"].__wrapped__
    with pytest.raises(AssertionError):
        get_current_vllm_config()  # what tells a layer its model, while one is made


@pytest.mark.parametrize("name", VLLM_NAMES, ids=lambda name: name.name)
def test_a_private_name_of_vllms_is_still_there(name):
    assert is_there(name), report(name)


def test_a_hub_id_turns_it_on(tiny_artifact, tmp_path, monkeypatch):
    """A repository that holds an artifact; one that holds none, or is not there, is vLLM's own
    affair."""
    found = {"someone/small": tiny_artifact}

    def download(repo, name, **options):
        if repo not in found:
            raise OSError(repo)
        assert name == "kv_cache.json" and options == {
            "revision": "main",
            "token": "t",
            "cache_dir": None,
        }
        return str(found[repo] / name)

    monkeypatch.setattr(settings, "hf_hub_download", download)
    monkeypatch.setattr(settings, "resolve_artifact", lambda repo, revision, **hub: found[repo])
    hub = {"token": "t", "cache_dir": None}
    assert settings.find_artifact("someone/small", "main", **hub) == tiny_artifact
    assert settings.find_artifact("someone/else", "main", **hub) is None
    args = arguments(tiny_artifact)
    args.model = "someone/small"
    settings.prepare(args, tiny_artifact)
    assert (args.model, args.served_model_name) == (str(tiny_artifact), "someone/small")
