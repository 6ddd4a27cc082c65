"""What compressing assumes of a family is compared with the model: a row that is wrong is refused,
in one sentence."""

from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, FAMILIES, save_tiny, tiny_model
from family_configs import config_of
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.pipeline import compress
from kvfold.compress.search.check import check_model
from kvfold.errors import KvfoldError
from kvfold.exports import architectures
from kvfold.exports.architectures import ARCHITECTURES, Architecture
from kvfold.exports.refused import REFUSED

IDS = torch.randint(1, 128, (1, 90), generator=torch.Generator().manual_seed(4))
FOLDED, TURNED, LOGITS = "folding a change of basis", "keys of layer", "logits of its layers"


@pytest.fixture
def bitnet(monkeypatch):
    """A family that the table has by mistake: between its attention and o_proj stands a norm."""
    if "bitnet" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no BitNet")
    monkeypatch.setitem(CONFIGS, "bitnet", lambda: config_of("bitnet"))
    monkeypatch.setitem(ARCHITECTURES, "bitnet", Architecture("bitnet"))
    monkeypatch.delitem(REFUSED, "bitnet")
    return "bitnet"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_pass_and_stay_as_they_were(family, dtype):
    model, same = (tiny_model(family, dtype, attention=TAP) for _ in range(2))
    arch = ARCHITECTURES[family]
    found = check_model(model, arch, IDS, family, scaled=True)
    unit = 1e-6 if dtype == torch.float32 else 0.02
    assert max(found.values()) < unit and found["values"] > 0 and found["rounding"] > 0
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_before_o_proj_is_seen(bitnet, dtype):
    with pytest.raises(KvfoldError, match=FOLDED):
        check_model(
            tiny_model(bitnet, dtype, attention=TAP), ARCHITECTURES[bitnet], IDS, "b", scaled=False
        )


def test_compress_refuses_it_before_the_search_and_leaves_nothing(bitnet, tmp_path, text_file):
    source = save_tiny(tmp_path / "model", bitnet)
    with pytest.raises(
        KvfoldError, match="'model' is not what kvfold knows of model family 'bitnet'"
    ) as caught:
        compress(str(source), "9.5", tmp_path / "out", calib=str(text_file))
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "family, wrong, words",
    [
        ("glm", {"rope_pairs": "halves"}, TURNED),
        ("nanochat", {"rope_pairs": "halves"}, TURNED),
        ("cohere", {"rope_repeats": False}, TURNED),
        ("exaone4", {"rope_if_sliding": False}, f"{TURNED} 1"),
        ("hunyuan_v1_dense", {"norm_after_rope": False}, TURNED),
        ("granite", {"logit_divisor": ""}, LOGITS),
        ("cohere2", {"logit_factor": ""}, LOGITS),
        ("olmo2", {"qk_norm": False}, FOLDED),
        ("qwen3_moe", {"qk_norm": False}, FOLDED),
    ],
)
def test_a_wrong_row_is_refused(family, wrong, words, monkeypatch):
    if family not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such family")
    row = replace(ARCHITECTURES[family], **wrong)
    monkeypatch.setitem(architectures.ARCHITECTURES, family, row)
    with pytest.raises(KvfoldError, match=words):
        check_model(tiny_model(family, attention=TAP), row, IDS, family, scaled=True)


def test_values_that_are_clamped_are_refused_by_name():
    with pytest.raises(KvfoldError, match="clamps values"):
        architectures.architecture_of(config_of("olmo", clip_qkv=8.0))
