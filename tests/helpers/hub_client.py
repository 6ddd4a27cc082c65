"""A process that runs commands against the local Hub, and fixtures around it (a plug-in of the
tests that push)."""

import json
import shutil
import subprocess
from pathlib import Path

import prepared
import pytest
from hub_artifact import set_licence
from hub_server import OWNER, Hub

# one process imports everything once and forks for each command: huggingface_hub reads its
# environment when it is imported
SERVE = """
import gc, json, os, sys, traceback
gc.disable()
import kvfold.exports.page.hub, kvfold.compress.evaluate
from kvfold.compress.cli import main
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
gc.freeze()
gc.enable()
for line in sys.stdin:
    job = json.loads(line)
    if (child := os.fork()) == 0:
        os.environ.pop("HF_TOKEN", None)
        os.environ.update(job["env"])
        for number, name in (1, "out"), (2, "err"):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = 1
        try:
            if job["code"]:
                sys.argv = ["-c", *job["args"]]
                exec(job["code"], {"__name__": "__main__"})
            else:
                main(job["args"])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        for stream in sys.stdout, sys.stderr:
            stream.flush()
        os._exit(code)  # taking apart what was imported takes longer than most commands
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Client:
    def __init__(self, environment: dict[str, str], folder: Path):
        self.folder = folder
        self.process = prepared.start(
            "torch",
            SERVE,
            env=prepared.only(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(
        self, *args: object, token: str | None = OWNER, code: str = ""
    ) -> tuple[int, str, str]:
        """Exit code and output of `kvfold args…`, or of `python -c code args…`."""
        out, err = (self.folder / name for name in ("out", "err"))
        job = {
            "args": [*map(str, args)],
            "code": code,
            "env": {"HF_TOKEN": token} if token else {},
            "out": str(out),
            "err": str(err),
        }
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return code, out.read_text(), err.read_text()


@pytest.fixture(scope="session")
def server():
    hub = Hub()
    yield hub
    hub.shutdown()


@pytest.fixture(scope="session")
def client(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    made = Client(server.environment(folder / "hf"), folder)
    yield made
    assert made.process.stdin
    made.process.stdin.close()
    made.process.wait()


@pytest.fixture
def hub(server):
    """The server without repositories, objects, faults."""
    for held in (server.repos, server.objects, server.log, server.faults):
        held.clear()
    return server


@pytest.fixture
def push(client, hub, artifact):
    """Pushes the artifact to someone/small; must succeed. Returns the commit."""

    def run(*options: object, path: Path = artifact, repo: str = "someone/small") -> str:
        code, out, err = client("push", path, repo, *options)
        assert code == 0, err
        oid = out.splitlines()[-1].rpartition("/")[2]
        assert oid in hub.repos[repo].commits
        return oid

    return run


@pytest.fixture
def refused(client, hub, artifact):
    """Pushes; must be refused in one sentence with these words and nothing may have been
    written."""

    def run(
        *words: str,
        options=(),
        path: Path = artifact,
        repo: str = "someone/small",
        token: str | None = OWNER,
    ) -> str:
        before = {name: dict(held.branches) for name, held in hub.repos.items()}
        code, out, err = client("push", path, repo, *options, token=token)
        assert (code, out) == (2, ""), err
        assert err.startswith("kvfold: ") and err.count("\n") == 1, err
        for word in words:
            assert word in err, err
        after = {name: dict(held.branches) for name, held in hub.repos.items() if name in before}
        assert after == before and not hub.puts()
        return err

    return run


@pytest.fixture
def artifact(tmp_path, tiny_artifact) -> Path:
    """A copy of the tiny artifact whose card states a licence."""
    copy = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    set_licence(copy, "apache-2.0")
    return copy
