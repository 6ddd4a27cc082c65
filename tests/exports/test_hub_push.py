"""`kvfold push` against a local server that speaks the Hub's protocol, and what comes back from
there."""

import json
import shutil
import time

import prepared
import pytest
import torch
from hub_artifact import files_on, remake, rename_model, set_licence
from hub_server import READER, Fault, answer, drop, stall
from safetensors.torch import load_file, save_file

from kvfold import runtime
from kvfold.exports.reader import file_sha256, read_metadata
from kvfold.exports.schema import METADATA_NAME, TENSORS_NAME

pytest_plugins = ("hub_client",)
KVFOLD = "from kvfold.__main__ import main; main()"

# -- there and back

GENERATE = """
import sys, torch
from kvfold import runtime
from transformers import AutoTokenizer
for revision in sys.argv[2:]:
    model = runtime.load_pretrained("someone/small", revision=revision, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained("someone/small", revision=revision)
    ids = tokenizer(sys.argv[1], return_tensors="pt").input_ids
    print(model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist())
"""


def test_round_trip(client, hub, tmp_path, tiny_folder, text_file, recipe_file):
    """compress → push → load by the repository's id → the same text; and once more from the cache,
    offline."""
    folder, source = tmp_path / "small", shutil.copytree(tiny_folder, tmp_path / "tiny-llama")
    (source / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    options = ["--budget", "4.0", "--calib", text_file, "--recipe", recipe_file, "--out", folder]
    assert client("compress", source, *options)[0] == 0
    code, out, err = client(
        "push", folder, "someone/small", "--private", "--revision", "v1", "--json"
    )
    assert code == 0, err
    pushed = json.loads(out)
    assert (pushed["repo_id"], pushed["commit"]) == (
        "someone/small",
        hub.repos["someone/small"].branches["v1"],
    )
    assert hub.repos["someone/small"].private
    assert set(files_on(hub)) == {".gitattributes"}  # another branch

    local = {p.name: p.read_bytes() for p in folder.iterdir()}
    remote = files_on(hub, branch="v1")
    assert local.keys() == remote.keys() - {".gitattributes"} and "LICENSE" in local
    assert {name for name in local if remote[name] != local[name]} == {
        "README.md"
    }  # names the repository now
    assert set(hub.puts()) >= {
        file_sha256(folder / name) for name in ("model.safetensors", TENSORS_NAME)
    }

    prompt = "a cache that comes back from elsewhere, and is as it was"
    model = runtime.load_pretrained(folder, device="cpu")
    ids = torch.tensor([[ord(letter) for letter in prompt]])
    wanted = model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
    hub.log.clear()
    code, out, err = client(prompt, "v1", pushed["commit"], code=GENERATE)
    assert code == 0, err
    assert [json.loads(line) for line in out.splitlines()] == [wanted, wanted] and hub.log
    hub.log.clear()
    environment = hub.environment(client.folder / "hf") | {"HF_HUB_OFFLINE": "1"}
    words = (prompt, "v1", pushed["commit"])
    done = prepared.python("torch", GENERATE, *words, env=prepared.only(environment))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [wanted, wanted]
    assert not hub.log


def test_pushed_twice(push, hub, artifact):
    first = push()
    hub.log.clear()
    assert push() == first  # no commit without a change
    assert not hub.puts()


def test_a_newer_artifact_replaces_the_older_one(push, hub, artifact):
    """Its files that are gone go; what others put there stays."""
    tensors = load_file(artifact / "model.safetensors")
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    whole = shutil.copytree(artifact, artifact.parent / "whole")
    (artifact / "model.safetensors").unlink()
    for file, part in parts.items():
        save_file(
            {name: tensors[name] for name in part}, artifact / file, metadata={"format": "pt"}
        )
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    (artifact / "model.safetensors.index.json").write_text(json.dumps(index))
    listed = {*read_metadata(artifact).files, *parts, "model.safetensors.index.json"} - {
        "model.safetensors"
    }
    remake(artifact, files={name: file_sha256(artifact / name) for name in sorted(listed)})
    push()
    assert set(parts) < files_on(hub).keys()
    held = hub.repos["someone/small"]
    held.commit(
        "main", {**held.commits[held.branches["main"]], "notes.md": hub.file("notes.md", b"mine")}
    )
    push(path=whole)
    there = files_on(hub)
    assert there["notes.md"] == b"mine"
    assert there.keys() - {"notes.md", ".gitattributes"} == {p.name for p in whole.iterdir()}


def test_only_what_belongs_to_the_artifact_goes(push, hub, artifact):
    (artifact / ".env").write_text("PASSWORD=secret")
    (artifact / "report.html").write_text("<p>plots</p>")
    (artifact / "draft").mkdir()
    (artifact / "draft" / "model.safetensors").write_bytes(b"")
    push()
    assert files_on(hub).keys() & {".env", "report.html", "draft/model.safetensors"} == {
        "report.html"
    }


# -- refusals


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", METADATA_NAME])
def test_an_artifact_that_is_not_valid_is_never_sent(refused, hub, artifact, name):
    content = bytearray((artifact / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / name).write_bytes(content)
    refused(name)
    assert not hub.log


def test_no_artifact(refused, hub, tiny_folder):
    refused("not an artifact", path=tiny_folder)
    assert not hub.log


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        (None, ["unknown", "README.md"]),
        ("unknown", ["unknown", "README.md"]),
        ("gemma", ["'gemma'", "terms of its own"]),
        ("llama3.2", ["'llama3.2'", "terms of its own"]),
        ("other", ["'other'"]),
        ("cc-by-nd-4.0", ["'cc-by-nd-4.0'", "forbids"]),
    ],
)
def test_licence(refused, push, hub, artifact, licence, words):
    set_licence(artifact, licence)
    refused("tiny-llama", "--i-know", *words)
    assert not hub.log
    if licence is not None:  # without one the Hub of this test would not take the card
        push("--i-know")


def test_no_token(refused):
    refused("No token", "'someone/small'", "hf auth login", token=None)


def test_a_token_that_is_not_valid(refused):
    refused("401", "'someone/small'", "hf auth login", token="hf_stale")


def test_no_rights(refused, hub, artifact):
    refused("403", "'someone/small'", token=READER)
    hub.add("someone/small")
    refused("403", "'someone/small'", token=READER)
    refused("403", "'somebody/else'", repo="somebody/else")


@pytest.mark.parametrize(
    ("repo", "word"),
    [
        ("small", "'someone/small'"),
        ("a/b/c", "a/b/c"),
        ("someone/sm all", "sm all"),
        ("someone/-x", "-x"),
    ],
)
def test_repository_id(refused, repo, word):
    refused(word, repo=repo)


def test_another_models_artifact_is_there(refused, push, hub, artifact):
    push()
    hub.log.clear()
    rename_model(artifact, "enormous-llama")
    refused("'tiny-llama'", "'enormous-llama'", "'someone/small'")
    refused(
        "'tiny-llama'", options=["--revision", "v2"]
    )  # a branch of it would begin with the other's files
    assert hub.repos["someone/small"].branches.keys() == {"main"}


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
def test_something_else_is_there(refused, hub, name):
    hub.add("someone/small", **{name: b"mine"})
    refused(name, "'someone/small'", "no artifact")


def test_a_damaged_artifact_is_there(refused, hub):
    hub.add("someone/small", **{METADATA_NAME: b"{"})
    refused(METADATA_NAME, "'someone/small'")


def test_private_over_a_public_one(refused, push, hub):
    push()
    hub.log.clear()
    refused("public", "--private", options=["--private"])
    push()


@pytest.mark.parametrize(
    "place", ["GET /api/whoami", "GET /api/models/", "POST /api/repos/create", "POST .*/commit/"]
)
@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (404, {}, ["404"]),
        (429, {"Retry_After": "30"}, ["429", "30 seconds"]),
        (418, {"X_Error_Message": "tea"}, ["418", "tea"]),
    ],
)
def test_status(client, hub, artifact, place, status, headers, words):
    """Whatever the Hub answers, wherever: one sentence. 404 of the repository alone is no error, it
    is made then."""
    hub.faults.append(Fault(place, answer(status, **headers), times=99))
    code, out, err = client("push", artifact, "someone/small")
    assert (code, out) == (2, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("kvfold: ") and "Traceback" not in err
    assert all(word in last for word in ["someone/small", *words]), last


def test_offline(hub, artifact, tmp_path):
    environment = hub.environment(tmp_path / "hf") | {"HF_HUB_OFFLINE": "1"}
    words = ("push", artifact, "someone/small")
    done = prepared.python("torch", KVFOLD, *words, env=prepared.only(environment))
    assert (done.returncode, done.stderr.count("\n")) == (
        2,
        1,
    ) and "HF_HUB_OFFLINE" in done.stderr, done.stderr


def test_someone_else_writes_meanwhile(client, hub, artifact):
    hub.add("someone/small")

    def commit(handler):
        hub.repos["someone/small"].commit("main", {"a": hub.file("a", b"a")})
        handler.commit("someone/small", "main")

    hub.faults.append(Fault("POST .*/commit/main", commit))
    code, _, err = client("push", artifact, "someone/small")
    assert code == 2 and "412" in err.splitlines()[-1]
    assert set(files_on(hub)) == {"a"}


def test_what_arrives_is_compared(client, hub, artifact):
    """A hub that stores something else is found out: a large file, a small one, the metadata."""
    for i, name in enumerate(
        ("model.safetensors", "tokenizer_config.json", METADATA_NAME, "README.md")
    ):
        repo = f"someone/small-{i}"

        def commit(handler, name=name, repo=repo):
            handler.commit(repo, "main")
            hub.repos[repo].commits[hub.repos[repo].branches["main"]][name].content = b"{}"

        hub.faults.append(Fault(f"POST .*/{repo}/commit/main", commit))
        code, out, err = client("push", artifact, repo)
        assert (code, out) == (2, "") and name in err.splitlines()[-1] and "push again" in err, err


# -- interruptions


def test_connection_that_drops_once(push, hub):
    """huggingface_hub tries again by itself."""
    hub.faults.append(Fault("PUT /objects/", drop))
    push()
    assert len(hub.puts()) == len(set(hub.puts())) + 1


def test_rate_limit_that_passes(push, hub):
    hub.faults.append(Fault("POST .*/preupload/", answer(429, Retry_After="0")))
    push()


def test_connection_that_drops_before_the_commit(client, push, hub, artifact):
    """Nothing of it is to be seen; the next run sends no large file again."""
    hub.faults.append(Fault("POST .*/commit/main", drop))
    code, out, err = client("push", artifact, "someone/small")
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and "connection" in last and "not sent again" in last, err
    assert set(files_on(hub)) == {".gitattributes"}
    assert len(hub.puts()) >= 2
    hub.log.clear()
    push()
    assert not hub.puts()


def test_killed_while_uploading(push, hub, artifact, tmp_path):
    """The second large file hangs and the process is killed; the next run sends what is missing,
    and only that."""
    hub.faults.append(Fault(f"PUT /objects/{file_sha256(artifact / 'model.safetensors')}", stall))
    environment = prepared.only(hub.environment(tmp_path / "hf"))
    words = ("push", artifact, "someone/small")
    with prepared.start("torch", KVFOLD, *words, env=environment) as process:
        deadline = time.monotonic() + 60
        while (
            not (hub.objects and len(hub.puts()) > len(hub.objects)) and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        time.sleep(0.5)  # the other large files arrive
        process.kill()
    there = set(hub.objects)
    assert there and set(files_on(hub)) == {".gitattributes"}
    hub.log.clear()
    push()
    sent = hub.puts()
    assert file_sha256(artifact / "model.safetensors") in sent
    assert not there & set(sent)
