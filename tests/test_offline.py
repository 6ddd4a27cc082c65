"""After `import kvfold`, transformers asks the Hub for nothing that it doesn't ask for anyway, online and where there is no network."""

import json
import subprocess
import sys

import pytest
from hub_server import Hub

# what is loaded, by which requests, and whether with a packed cache; with kvfold and without
LOAD = """
import json, sys
if sys.argv[1] == "kvfold":
    import kvfold
import huggingface_hub.utils._http as http
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
asked = []
client = http.get_session()
send = client.send
def note(request, *args, **kwargs):
    asked.append(f"{request.method} {request.url.path}")
    return send(request, *args, **kwargs)
client.send = note
for name in sys.argv[2:]:
    name, _, revision = name.partition("@")
    options = {"revision": revision} if revision else {}
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    print(json.dumps({"packed": hasattr(model, "kv_artifact"), "asked": asked.copy()}))
    asked.clear()
"""


@pytest.fixture(scope="module")
def hub(tiny_folder, tiny_artifact, tmp_path_factory):
    """A server with a stock model and an artifact; caches of processes that have loaded both, with kvfold and without."""
    server = Hub()
    commit = server.add("someone/tiny", tiny_folder)
    server.add("someone/small", tiny_artifact)
    homes = {which: tmp_path_factory.mktemp("home") for which in ("kvfold", "stock")}
    first = {which: load(server, homes[which], which, "someone/tiny", "someone/small") for which in homes}
    yield server, homes, first, commit
    server.shutdown()


def load(server: Hub, home, which: str, *names: str, **environment: str) -> list[dict]:
    env = {**server.environment(home, token=None), **environment}
    done = subprocess.run([sys.executable, "-c", LOAD, which, *names], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_first_time(hub):
    _, _, first, _ = hub
    assert first["kvfold"][0] == first["stock"][0]
    assert [row["packed"] for row in first["kvfold"]] == [False, True]
    assert first["stock"][0]["asked"]  # or nothing was noted


def test_the_second_time(hub):
    server, homes, _, commit = hub
    names = ("someone/tiny", "someone/small", f"someone/tiny@{commit}")
    ours, theirs = (load(server, homes[which], which, *names) for which in ("kvfold", "stock"))
    assert ours[0] == theirs[0] and ours[2] == theirs[2] == {"packed": False, "asked": []}
    assert ours[1]["packed"] and len(ours[1]["asked"]) <= 2


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network(hub, environment):
    """Port 9 answers nobody."""
    server, homes, _, _ = hub
    names = ("someone/tiny", "someone/small")
    ours, theirs = (load(server, homes[which], which, *names, **environment) for which in ("kvfold", "stock"))
    assert ours[0] == theirs[0]
    assert [row["packed"] for row in ours] == [False, True]
    if "HF_HUB_OFFLINE" in environment:
        assert ours[0]["asked"] == []
