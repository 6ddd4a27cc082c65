"""A large loss is said, and one that breaks the model isn't written unless it is accepted."""

from dataclasses import replace

import pytest

from kvfold.compress import pipeline
from kvfold.compress.cli.table import print_table
from kvfold.compress.pipeline import check_loss, compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.loss import BROKEN_KL, LARGE_KL, REFUSED_KL, loss_words
from kvfold.exports.reader import read_artifact


def test_small_losses_take_no_words(capsys):
    for kl in (0.0, LARGE_KL):
        assert loss_words(kl) is None
        check_loss(kl, accept_loss=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "kl, words", [(0.3, "the model's answers will differ"), (BROKEN_KL + 1, "the model is broken")]
)
def test_a_large_loss_is_a_warning(kl, words, capsys):
    check_loss(kl, accept_loss=False)
    assert f"warning: A KL of {kl:.3f} nats is large: {words}" in capsys.readouterr().err


def test_a_broken_model_is_written_only_if_that_is_accepted(
    tmp_path, tiny_folder, tiny_artifact, text_file, recipe_file, monkeypatch, capsys
):
    def worse(*args):
        return replace(search(*args), kl=REFUSED_KL + 0.1)

    search = pipeline.search
    monkeypatch.setattr(pipeline, "search", worse)
    options = {"calib": str(text_file), "recipe": load_recipe(recipe_file)}
    out = tmp_path / "tiny"
    with pytest.raises(
        pipeline.Unfinished, match=r"3\.100 nats is large: the model is broken .* --accept-loss"
    ):
        compress(str(tiny_folder), "4.0", out, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.work"]
    made = compress(str(tiny_folder), "4.0", out, **options, resume=True, accept_loss=True)
    assert "warning: A KL of 3.100 nats" in capsys.readouterr().err
    assert made.metadata.calibration.kl == 3.1 and [p.name for p in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    "kl, words", [(0.02, None), (1.5, "A KL of 1.500 nats is large: the model is broken")]
)
def test_inspect_says_it(kl, words, tiny_artifact, capsys):
    metadata = read_artifact(tiny_artifact).metadata
    calibration = metadata.calibration.model_copy(update={"kl": kl})
    print_table(metadata.model_copy(update={"calibration": calibration}))
    printed = capsys.readouterr().out
    assert f"Warning: {words}" in printed if words else "Warning" not in printed
