"""MODEL as a Hub id and an artifact loaded by Hub id, against a local server that speaks the Hub's
download protocol."""

import json
import subprocess
import sys

import pytest
from hub_server import Hub


@pytest.fixture
def hub(tiny_folder, tiny_artifact, tmp_path):
    """Environment of a process that knows the local server as its only Hub, and the model's
    commit."""
    server = Hub()
    commit = server.add("someone/tiny", tiny_folder)
    server.add("someone/small", tiny_artifact)
    yield server.environment(tmp_path / "hf", token=None) | {"COMMIT": commit}
    server.shutdown()


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def test_a_hub_id_is_fetched_and_its_revision_stated(hub, tmp_path, text_file, recipe_file):
    out = tmp_path / "out"
    options = ["--budget", "4.0", "--calib", text_file, "--recipe", recipe_file, "--out", out]
    done = run(hub, "-m", "kvfold.compress.cli", "compress", "someone/tiny", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    provenance = json.loads((out / "kv_cache.json").read_text())["provenance"]
    assert (provenance["model"], provenance["revision"]) == ("someone/tiny", hub["COMMIT"])
    unknown = run(hub, "-m", "kvfold.compress.cli", "compress", "someone/other")
    assert unknown.returncode == 2 and "'someone/other'" in unknown.stderr.splitlines()[-1]


def test_an_artifact_loads_by_its_hub_id_and_then_offline(hub):
    code = (
        "from kvfold import runtime; "
        "m = runtime.load_pretrained('someone/small', device='cpu'); print(len(m.kv_artifact.specs))"
    )
    for environment in (hub, {**hub, "HF_HUB_OFFLINE": "1"}):
        done = run(environment, "-c", code)
        assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
