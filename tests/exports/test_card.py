"""The licence of a base model, the model card, its plots."""

import re
import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from kvfold import KvfoldError
from kvfold.compress.export import base_of
from kvfold.compress.models import Source
from kvfold.exports.page.card import Base, model_card, published_card
from kvfold.exports.page.licence import Licence, check_redistributable, find_licence
from kvfold.exports.page.plots import draw_plots
from kvfold.exports.reader import read_artifact, read_metadata

APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"
MIT = "MIT License\n\nPermission is hereby granted,\nfree of charge, …\nTHE SOFTWARE IS PROVIDED “AS IS”"


@pytest.fixture
def metadata(tiny_artifact):
    return read_metadata(tiny_artifact)


# -- licence


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, Licence()),
        ({"README.md": "---\nlicense: mit\n---\n# a"}, Licence("mit")),
        ({"README.md": "# no front matter"}, Licence()),
        ({"README.md": "---\nlicense: [mit\n---\n"}, Licence()),
        ({"README.md": "---\nlicense: [mit, gemma]\n---\n"}, Licence()),
        ({"config.json": '{"license": "gemma"}'}, Licence("gemma")),
        ({"config.json": "[]"}, Licence()),
        (
            {"README.md": "---\nlicense: gemma\n---\n", "config.json": '{"license": "mit"}'},
            Licence("gemma"),
        ),
        ({"LICENSE": APACHE}, Licence("apache-2.0")),
        ({"LICENSE.txt": MIT}, Licence("mit")),
        (
            {"LICENSE": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "USE_POLICY.md": "No."},
            Licence("llama3.2"),
        ),
        ({"LICENSE": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT"}, Licence("llama3")),
        ({"LICENSE": "All rights reserved."}, Licence()),
        (
            {
                "README.md": "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
                "LICENSE": "Mine.",
            },
            Licence("other", "mine", "LICENSE"),
        ),
        (
            {"README.md": "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"},
            Licence("other", "mine"),
        ),
        (
            {"README.md": "---\nlicense: other\nlicense_link: https://example.com/l\n---\n"},
            Licence("other", None, "https://example.com/l"),
        ),
    ],
)
def test_find_licence(tmp_path, files, wanted):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = find_licence(tmp_path)
    assert (found.id, found.name, found.link) == (wanted.id, wanted.name, wanted.link)
    assert [text.name for text in found.texts] == sorted(
        files.keys() - {"README.md", "config.json"}
    )


@pytest.mark.parametrize(
    "licence",
    [
        "apache-2.0",
        "mit",
        "bsd-3-clause",
        "cc-by-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc0-1.0",
        "agpl-3.0",
        "openrail++",
    ],
)
def test_may_be_passed_on(tmp_path, licence):
    check_redistributable(licence, "model", tmp_path)


@pytest.mark.parametrize(
    "licence",
    [None, "", "unknown", 3, ["mit"], "MIT", "gemma", "llama2", "llama3.1", "other", "cc-by-nd-4.0", "cc-by-nc-nd-4.0",
     "mit-0", "apple-amlr"],
)  # fmt: skip
def test_is_asked_about(tmp_path, licence):
    with pytest.raises(KvfoldError, match="--i-know"):
        check_redistributable(licence, "model", tmp_path)


# -- card


def test_base_model(tmp_path):
    assert base_of(Source(tmp_path, "smollm2-135m")) == Base(
        "HuggingFaceTB/SmolLM2-135M-Instruct", Licence("apache-2.0")
    )
    assert base_of(Source(tmp_path, "someone/tiny", "0" * 40)).repo_id == "someone/tiny"
    assert base_of(Source(tmp_path, "some-folder")).repo_id is None  # which is no model's id


def test_front_matter(metadata):
    card = ModelCard(model_card(metadata, "small", Base("someone/tiny", Licence("mit"))))
    assert card.data.to_dict() == {
        "base_model": "someone/tiny", "base_model_relation": "quantized", "library_name": "kvfold", "license": "mit",
        "pipeline_tag": "text-generation", "tags": ["kvfold", "kv-cache", "quantized"],
    }  # fmt: skip
    unknown = ModelCard(model_card(metadata, "small", Base()))
    assert unknown.data.license == "unknown" and "was not found" in unknown.text
    assert not unknown.data.to_dict().keys() & {"base_model", "base_model_relation"}


def test_licence_texts_go_along(tmp_path, tiny_folder, text_file, recipe_file):
    from kvfold.compress.pipeline import compress
    from kvfold.compress.recipe import load_recipe

    source = shutil.copytree(tiny_folder, tmp_path / "model")
    (source / "LICENSE").write_text(APACHE)
    (source / "NOTICE.txt").write_text("By someone.")
    artifact = compress(
        str(source), "5.0", tmp_path / "out", calib=str(text_file), recipe=load_recipe(recipe_file)
    )
    assert artifact.metadata.files.keys() > {"LICENSE", "NOTICE.txt", "bits.png", "memory.png"}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0" and "[NOTICE.txt](NOTICE.txt)" in card.text


def test_what_people_wrote_stays(metadata):
    card = model_card(metadata, "small", Base(licence=Licence("mit"))).replace(
        "## Limits", "By me.\n\n## Limits"
    )
    published = published_card(
        card.replace("license: mit", "license: apache-2.0\nlanguage: en"), metadata, "me/it", ()
    )
    changed = ModelCard(published)
    assert (changed.data.license, changed.data.language) == (
        "apache-2.0",
        "en",
    ) and "By me." in changed.text
    assert 'path = "me/it"' in changed.text and "`kvfold inspect me/it`" in changed.text
    assert not re.search(r"kvfold \w+ small", changed.text)
    assert published_card(published, metadata, "me/it", ()) == published
    mine = published_card("# Mine\n", metadata, "me/it", ())
    assert mine.endswith("# Mine\n")


def test_a_card_without_the_marks_gets_the_table_at_its_end(metadata):
    figures = {
        "model": "tiny-llama", "text": "a text.txt", "windows": 2, "first_window": 1, "seq_len": 256,
        "effective_bits": 4.5,
        "payload_bits": 3.0, "ppl_16bit": 20.0, "ppl": 21.0, "kl": 0.0125, "kl_se": None, "top1_agreement": 0.75,
    }  # fmt: skip
    card = published_card(
        "# Mine\n",
        metadata,
        "me/it",
        [figures, {**figures, "text": "built-in", "model": "other/base"}],
    )
    body = ModelCard(card).text
    assert (
        body.startswith("# Mine\n\n<!-- quality -->")
        and "20.000 → 21.000 | 0.0125 | 0.7500 |" in body
    )
    assert (
        "`kvfold eval me/it --text 'a text.txt' --first-window 1 --windows 2 --seq-len 256` prints row 1."
        in body
    )
    assert (
        "`kvfold eval me/it --against other/base --first-window 1 --windows 2 --seq-len 256` prints row 2."
        in body
    )
    again = published_card(card, metadata, "me/it", [figures])
    assert again.count("<!-- quality -->") == 1 and "built-in" not in again


def test_a_made_card_names_a_command_for_its_search(tiny_artifact):
    """Budget, context and text as the artifact states them."""
    card = (tiny_artifact / "README.md").read_text()
    assert (
        "`kvfold compress tiny-llama --budget 4.0 --context 2048 --recipe recipe.yaml --calib text.txt`"
        in card
    )


# -- plots


def test_plots(tmp_path, metadata, tiny_artifact):
    """The same bytes each time, listed with their hashes, and something is drawn on them."""
    draw_plots(tmp_path, metadata)
    for name in ("bits.png", "memory.png"):
        assert (tmp_path / name).read_bytes() == (tiny_artifact / name).read_bytes()
        assert name in read_artifact(tiny_artifact).metadata.files
        with Image.open(tmp_path / name) as picture:
            assert (
                min(picture.size) > 300
                and len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
            )
    changed = metadata.model_copy(deep=True)
    changed.layers[0].key.payload_bits += 1
    draw_plots(tmp_path, changed)
    assert (tmp_path / "bits.png").read_bytes() != (tiny_artifact / "bits.png").read_bytes()
    assert (tmp_path / "memory.png").read_bytes() == (tiny_artifact / "memory.png").read_bytes()
