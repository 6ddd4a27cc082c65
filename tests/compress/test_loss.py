"""A large loss is said, and one that breaks the model isn't written unless it is accepted."""

from dataclasses import replace

import pytest

from kvfold.compress import pipeline
from kvfold.compress.cli.table import print_table
from kvfold.compress.pipeline import check_loss, compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.loss import BROKEN_KL, LARGE_KL, loss_words
from kvfold.exports.reader import read_artifact


def test_small_losses_take_no_words(capsys):
    for kl in (0.0, LARGE_KL):
        assert loss_words(kl) is None
        check_loss(kl, accept_loss=False)
    assert capsys.readouterr().err == ""


def test_a_large_loss_is_a_warning(capsys):
    check_loss(0.3, accept_loss=False)
    assert (
        "warning: A KL of 0.300 nats is large: the model's answers will differ"
        in capsys.readouterr().err
    )


def test_a_broken_model_is_written_only_if_that_is_accepted(
    tmp_path, tiny_folder, tiny_artifact, text_file, recipe_file, monkeypatch, capsys
):
    def worse(*args):
        return replace(search(*args), kl=BROKEN_KL + 2)

    search = pipeline.search
    monkeypatch.setattr(pipeline, "search", worse)
    options = {"calib": str(text_file), "recipe": load_recipe(recipe_file)}
    out = tmp_path / "tiny"
    with pytest.raises(
        pipeline.Unfinished, match=r"3\.000 nats is large: the model is broken .* --accept-loss"
    ):
        compress(str(tiny_folder), "4.0", out, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.work"]
    made = compress(str(tiny_folder), "4.0", out, **options, resume=True, accept_loss=True)
    assert "warning: A KL of 3.000 nats" in capsys.readouterr().err
    assert made.metadata.calibration.kl == 3 and [p.name for p in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    "kl, words", [(0.02, None), (1.5, "A KL of 1.500 nats is large: the model is broken")]
)
def test_inspect_says_it(kl, words, tiny_artifact, capsys):
    metadata = read_artifact(tiny_artifact).metadata
    calibration = metadata.calibration.model_copy(update={"kl": kl})
    print_table(metadata.model_copy(update={"calibration": calibration}))
    printed = capsys.readouterr().out
    assert f"Warning: {words}" in printed if words else "Warning" not in printed
