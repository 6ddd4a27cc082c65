"""The model card as it is on the Hub: its figures, the commands beside them, the lines that load
it."""

import json
import re
from pathlib import Path

import pytest
from hub_artifact import files_on, set_licence

from kvfold.exports.reader import read_artifact
from kvfold.exports.units import format_nbytes

pytest_plugins = ("hub_client",)


@pytest.fixture(scope="module")
def results(tmp_path_factory, client, server, tiny_artifact, text_file) -> Path:
    file = tmp_path_factory.mktemp("results") / "results.json"
    code, _, err = client(
        "eval", tiny_artifact, "--text", text_file, "--windows", 2, "--seq-len", 256, "--json", file
    )
    assert code == 0, err
    return file


def test_card_states_what_was_measured(push, hub, artifact, results):
    from huggingface_hub import ModelCard

    before = (artifact / "README.md").read_text()
    push("--results", results)
    assert (artifact / "README.md").read_text() == before
    card = ModelCard(files_on(hub)["README.md"].decode())
    figures = json.loads(results.read_text())
    found = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert found == {
        "perplexity, packed cache": figures["ppl"],
        "perplexity, unquantised cache": figures["ppl_16bit"],
        "KL divergence of the packed from the unquantised cache, nats": figures["kl"],
        "top-1 agreement with the unquantised cache": figures["top1_agreement"],
    }
    assert (card.data.model_name, card.data.license, card.data.pipeline_tag) == (
        "small",
        "apache-2.0",
        "text-generation",
    )
    assert f"{figures['kl']:.4f} ± {figures['kl_se']:.4f}" in card.text
    read_artifact(artifact)


def test_every_figure_of_the_card_comes_from_the_command_beside_it(
    client, push, hub, artifact, results, text_file
):
    push("--results", results)
    card = files_on(hub)["README.md"].decode()
    rows = re.findall(
        r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \| `kvfold (inspect someone/small --at \d+)` \|$",
        card,
        re.MULTILINE,
    )
    assert len(rows) == 3
    for tokens, packed, plain, ratio, command in rows:
        code, out, err = client(*command.split(), "--json")
        assert code == 0, err
        info = json.loads(out)
        assert info["at"] == int(tokens)
        assert (format_nbytes(info["bytes"]), format_nbytes(info["bytes_16bit"])) == (packed, plain)
        assert f"{info['bytes_16bit'] / info['bytes']:.2f}" == ratio
    [command] = re.findall(r"^`kvfold (eval .+)` prints row 1\.$", card, re.MULTILINE)
    command = command.replace(text_file.name, str(text_file))  # which the reader has to have
    code, out, err = client(*command.split(), "--json", results.parent / "again.json")
    assert code == 0, err
    again = json.loads((results.parent / "again.json").read_text())
    row = (
        f"{again['ppl_16bit']:.3f} → {again['ppl']:.3f} "
        f"| {again['kl']:.4f} ± {again['kl_se']:.4f} | {again['top1_agreement']:.4f} |"
    )
    assert row in card
    info = json.loads(client("inspect", "someone/small", "--json")[1])
    assert (
        f"{info['effective_bits']:.3f} bits per cached element" in card
        and f"{info['payload_bits']:.3f} in the packed" in card
    )
    assert f"{info['kl']:.4f} nats of KL" in card


def test_the_lines_that_load_it(client, push, hub):
    push()
    card = files_on(hub)["README.md"].decode()
    [code] = re.findall(r"```python\n(.+?)```", card, re.DOTALL)
    assert 'path = "someone/small"' in code
    returned, out, err = client(code=code)
    assert returned == 0, err
    assert out.replace(" ", "").startswith(
        "Thekey-valuecache"
    )  # the tiny tokenizer puts spaces between letters


@pytest.mark.parametrize(
    "fault", ["missing", "not JSON", "no figures", "another artifact", "infinite"]
)
def test_results_that_are_not_of_this_artifact(refused, hub, results, tmp_path, fault):
    figures = json.loads(results.read_text())
    file = tmp_path / "wrong.json"
    match fault:
        case "not JSON":
            file.write_text("kl: 1")
        case "no figures":
            file.write_text("{}")
        case "another artifact":
            file.write_text(
                json.dumps({**figures, "effective_bits": figures["effective_bits"] + 0.01})
            )
        case "infinite":
            file.write_text(json.dumps({**figures, "kl": float("inf")}))
    refused(str(file), options=["--results", file])
    assert not hub.log


def test_a_card_that_the_hub_does_not_take(refused, artifact):
    set_licence(artifact, "mit\nbase_model: not-an-id")
    refused("base_model", "not valid")


def test_a_card_whose_front_matter_is_broken(refused, hub, artifact):
    card = (artifact / "README.md").read_text()
    (artifact / "README.md").write_text(card.replace("tags:", "tags: ["))
    refused("README.md", "front matter")
    assert not hub.log
