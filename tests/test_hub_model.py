"""MODEL as a Hub id and an artifact loaded by Hub id, against a local server that speaks the Hub's download protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves `repositories`: Hub id → folder."""

    repositories: dict[str, Path] = {}  # noqa: RUF012

    def log_message(self, *args):
        pass

    def _send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        for repo, folder in self.repositories.items():
            files = sorted(p.name for p in folder.iterdir())
            if path.startswith(f"/api/models/{repo}/tree/"):
                rows = [
                    {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": self._etag(folder / n)}
                    for n in files
                ]
                return self._send(200, json.dumps(rows).encode(), Content_Type="application/json")
            if path in (
                f"/api/models/{repo}",
                f"/api/models/{repo}/revision/main",
                f"/api/models/{repo}/revision/{COMMIT}",
            ):
                info = {
                    "id": repo,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": name} for name in files],
                    "private": False,
                }
                return self._send(200, json.dumps(info).encode(), Content_Type="application/json")
            if path.startswith(f"/{repo}/resolve/"):
                file = folder / path.rsplit("/", 1)[1]
                if file.is_file():
                    return self._send(200, file.read_bytes(), ETag=f'"{self._etag(file)}"', X_Repo_Commit=COMMIT)
                return self._send(404, X_Error_Code="EntryNotFound")
        return self._send(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    @staticmethod
    def _etag(file):
        return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tiny_folder, tiny_artifact, tmp_path):
    """Environment of a process that knows the local server as its only Hub."""
    Hub.repositories = {"someone/tiny": tiny_folder, "someone/small": tiny_artifact}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    yield environment | {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    server.shutdown()


def run(environment, *arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


def test_a_hub_id_is_fetched_and_its_revision_stated(hub, tmp_path, text_file, recipe_file):
    out = tmp_path / "out"
    options = ["--budget", "4.0", "--calib", text_file, "--recipe", recipe_file, "--out", out]
    done = run(hub, "-m", "kvfold.compress.cli", "compress", "someone/tiny", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    provenance = json.loads((out / "kv_cache.json").read_text())["provenance"]
    assert (provenance["model"], provenance["revision"]) == ("someone/tiny", COMMIT)
    unknown = run(hub, "-m", "kvfold.compress.cli", "compress", "someone/other")
    assert unknown.returncode == 2 and "'someone/other'" in unknown.stderr.splitlines()[-1]


def test_an_artifact_loads_by_its_hub_id_and_then_offline(hub):
    code = "from kvfold import runtime; m = runtime.load_pretrained('someone/small', device='cpu'); print(len(m.kv_artifact.specs))"
    for environment in (hub, {**hub, "HF_HUB_OFFLINE": "1"}):
        done = run(environment, "-c", code)
        assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
