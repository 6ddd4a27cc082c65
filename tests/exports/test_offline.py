"""After `kvfold.register()`, transformers asks the Hub for nothing that it doesn't ask for anyway,
online and where there is no network."""

import json

import prepared
import pytest
from hub_server import Hub

pytest_plugins = ("hub_client",)

# what is loaded, by which requests, and whether with a packed cache: by transformers' method as
# kvfold wraps it, and as it is
LOAD = """
import json, sys
import kvfold
from kvfold.pretrained import stock_from_pretrained
kvfold.register()
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
home = sys.argv[1]
for name in sys.argv[2:]:
    row = []
    for which, load in (("kvfold", AutoModelForCausalLM.from_pretrained), ("stock", stock_from_pretrained)):
        repo, _, revision = name.partition("@")
        model = load(repo, cache_dir=f"{home}/{which}", **({"revision": revision} if revision else {}))
        row.append({"packed": hasattr(model, "kv_artifact"), "asked": asked.copy()})
        asked.clear()
    print(json.dumps(row))
"""
MODEL, ARTIFACT = "someone/tiny", "someone/small"


@pytest.fixture(scope="module")
def hub(server, client, tiny_folder, tiny_artifact, tmp_path_factory):
    """A server with a stock model and an artifact, and a process that loads them twice."""
    for held in (server.repos, server.objects, server.log, server.faults):
        held.clear()
    commit = server.add(MODEL, tiny_folder)
    server.add(ARTIFACT, tiny_artifact)
    home = tmp_path_factory.mktemp("home")
    names = (MODEL, ARTIFACT, MODEL, ARTIFACT, f"{MODEL}@{commit}")
    code, out, err = client(home, *names, token=None, code=LOAD)
    assert code == 0, err
    return server, home, [json.loads(line) for line in out.splitlines()]


def load(server: Hub, home, *names: str, **environment: str) -> list[list[dict]]:
    """Of each name what happened with kvfold, and without."""
    env = {**server.environment(home, token=None), **environment}
    done = prepared.python("torch", LOAD, home, *names, env=prepared.only(env))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_with_a_network(hub):
    first, artifact, second, artifact_again, pinned = hub[2]
    assert first[0] == first[1] and first[1]["asked"]  # or nothing was noted
    assert second[0] == second[1]
    assert pinned == [{"packed": False, "asked": []}] * 2
    assert (
        artifact[0]["packed"]
        and artifact_again[0]["packed"]
        and len(artifact_again[0]["asked"]) <= 2
    )


@pytest.mark.parametrize(
    "environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}]
)
def test_without_a_network(hub, environment):
    """Port 9 answers nobody."""
    server, home, _ = hub
    model, artifact = load(server, home, MODEL, ARTIFACT, **environment)
    assert model[0] == model[1] and not model[0]["packed"]
    assert artifact[0]["packed"] and len(artifact[0]["asked"]) <= len(artifact[1]["asked"]) + 1
    if "HF_HUB_OFFLINE" in environment:
        assert model[0]["asked"] == artifact[0]["asked"] == []
