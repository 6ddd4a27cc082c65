"""MODEL as a Hub id and an artifact loaded by Hub id, against a local server that speaks the Hub's
download protocol."""

import json

import prepared
import pytest

pytest_plugins = ("hub_client",)


@pytest.fixture
def commit(hub, tiny_folder, tiny_artifact):
    """The model's commit on a Hub that has it and an artifact."""
    hub.add("someone/small", tiny_artifact)
    return hub.add("someone/tiny", tiny_folder)


def test_a_hub_id_is_fetched_and_its_revision_stated(
    client, commit, tmp_path, text_file, recipe_file
):
    out = tmp_path / "out"
    options = ["--budget", "4.0", "--calib", text_file, "--recipe", recipe_file, "--out", out]
    code, printed, err = client("compress", "someone/tiny", *options, token=None)
    assert code == 0, err
    assert printed.splitlines()[-1] == str(out)
    provenance = json.loads((out / "kv_cache.json").read_text())["provenance"]
    assert (provenance["model"], provenance["revision"]) == ("someone/tiny", commit)
    code, _, err = client("compress", "someone/other", token=None)
    assert code == 2 and "'someone/other'" in err.splitlines()[-1]


def test_an_artifact_loads_by_its_hub_id_and_then_offline(client, commit, hub):
    code = (
        "from kvfold import runtime; "
        "m = runtime.load_pretrained('someone/small', device='cpu'); print(len(m.kv_artifact.specs))"
    )
    assert client(token=None, code=code)[:2] == (0, "3\n")
    # what huggingface_hub reads when it is imported
    environment = hub.environment(client.folder / "hf", token=None) | {"HF_HUB_OFFLINE": "1"}
    done = prepared.python("torch", code, env=prepared.only(environment))
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
