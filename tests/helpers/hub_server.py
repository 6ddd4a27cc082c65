"""A Hub in this process: the HTTP protocol that huggingface_hub speaks, on 127.0.0.1, with faults
to order.

Repositories hold branches, commits and files; large files go through Git LFS (batch, PUT, verify),
small ones through the commit.
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import yaml

OWNER, READER = (
    "hf_owner",
    "hf_reader",
)  # tokens: of the user `someone`, and of one who may only read
BIG = 20_000  # bytes from which a file goes through LFS, as *.safetensors always do
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LICENCES = {
    "apache-2.0",
    "mit",
    "gemma",
    "llama3.2",
    "other",
    "unknown",
    "cc-by-nd-4.0",
}  # some of those the Hub knows


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class File:
    content: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        """What git knows the file by: of a large one, the pointer's."""
        return git_oid(f"sha256:{sha256(self.content)}".encode() if self.lfs else self.content)

    @property
    def etag(self) -> str:
        return sha256(self.content) if self.lfs else self.oid


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        text = json.dumps([branch, len(self.commits), sorted((n, f.oid) for n, f in files.items())])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What to do instead, the next `times` times that a request line matches."""

    pattern: str  # of "METHOD /path"
    act: Callable[["Handler"], None]
    times: int = 1


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.log: list[str] = []  # request lines
        self.faults: list[Fault] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is part of what is tested."""

    def add(
        self, repo_id: str, folder: Path | None = None, private: bool = False, **files: bytes
    ) -> str:
        """Makes a repository and fills it; returns the commit."""
        self.repos[repo_id] = repo = Repo(private)
        content = {p.name: p.read_bytes() for p in sorted(folder.iterdir())} if folder else {}
        return repo.commit(
            "main",
            {
                n: self.file(n, c)
                for n, c in {**content, **files, ".gitattributes": ATTRIBUTES}.items()
            },
        )

    def file(self, name: str, content: bytes) -> File:
        lfs = name.endswith(".safetensors") or len(content) >= BIG
        if lfs:
            self.objects[sha256(content)] = content
        return File(content, lfs)

    def environment(self, home: Path, token: str | None = OWNER) -> dict[str, str]:
        """Of a process that knows this server as its only Hub."""
        kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        ours |= {
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        }
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    def puts(self) -> list[str]:
        """SHA-256 of every object whose upload was begun."""
        return [line.rpartition("/")[2] for line in self.log if line.startswith("PUT ")]


def answer(status: int, **headers: str) -> Callable[["Handler"], None]:
    """A fault: another status."""

    def act(handler: "Handler") -> None:
        handler.body()
        handler.send(status, {"error": f"by order: {status}"}, **headers)

    return act


def drop(handler: "Handler") -> None:
    """A fault: half of the body is read, then the connection is gone."""
    handler.rfile.read(int(handler.headers.get("Content-Length", 0)) // 2)
    handler.close_connection = True
    handler.connection.shutdown(2)


def stall(handler: "Handler") -> None:
    """A fault: no answer for as long as anyone waits."""
    time.sleep(60)
    handler.close_connection = True


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def send(self, status: int, body: object = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self) -> None:
        path = unquote(self.path.partition("?")[0])
        line = f"{self.command} {path}"
        self.server.log.append(line)
        self.user = {f"Bearer {OWNER}": "someone", f"Bearer {READER}": "reader"}.get(
            self.headers.get("Authorization", "")
        )
        for fault in self.server.faults:
            if fault.times and re.search(fault.pattern, line):
                fault.times -= 1
                return fault.act(self)
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, line)
            if match:
                return method(self, **match.groupdict())
        self.send(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def repo(self, repo_id: str, write: bool = False) -> Repo | None:
        """The repository, if this user may do that; else None, and the refusal is sent."""
        found = self.server.repos.get(repo_id)
        mine = self.user is not None and repo_id.startswith(f"{self.user}/")
        if found is None or (found.private and not mine):
            self.send(
                404 if self.user else 401,
                X_Error_Code="RepoNotFound",
                X_Error_Message="Repository not found",
            )
        elif write and not mine:
            self.send(403 if self.user else 401, X_Error_Message="You do not have write access")
        else:
            return found
        return None

    def revision(self, repo: Repo, name: str) -> str | None:
        oid = repo.find(name)
        if oid is None:
            self.send(
                404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {name}"
            )
        return oid

    # -- reading

    def whoami(self) -> None:
        if self.user is None:
            return self.send(
                401,
                {"error": "Invalid credentials"},
                X_Error_Message="Invalid credentials in Authorization header",
            )
        self.send(
            200, {"name": self.user, "type": "user", "orgs": [], "auth": {"type": "access_token"}}
        )

    def info(self, repo: str, rev: str = "main") -> None:
        if (found := self.repo(repo)) and (oid := self.revision(found, rev)):
            siblings = [{"rfilename": name} for name in sorted(found.commits[oid])]
            self.send(200, {"id": repo, "sha": oid, "siblings": siblings, "private": found.private})

    def tree(self, repo: str, rev: str) -> None:
        if (found := self.repo(repo)) and (oid := self.revision(found, rev)):
            rows = []
            for name, file in sorted(found.commits[oid].items()):
                row = {"type": "file", "path": name, "size": len(file.content), "oid": file.oid}
                if file.lfs:
                    row["lfs"] = {
                        "oid": sha256(file.content),
                        "size": len(file.content),
                        "pointerSize": 130,
                    }
                rows.append(row)
            self.send(200, rows)

    def no_folder(self, repo: str, rev: str) -> None:
        self.send(
            404,
            X_Error_Code="EntryNotFound",
            X_Error_Message=f"No folder of this name in {repo} at {rev}",
        )

    def resolve(self, repo: str, rev: str, name: str) -> None:
        if (found := self.repo(repo)) and (oid := self.revision(found, rev)):
            file = found.commits[oid].get(name)
            if file is None:
                return self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            known = {"X_Repo_Commit": oid, "ETag": f'"{file.etag}"'}
            if not file.lfs:
                return self.send(200, file.content, **known)
            known |= {"X_Linked_Etag": f'"{file.etag}"', "X_Linked_Size": str(len(file.content))}
            self.send(
                302,
                **known,
                Location=f"http://localhost:{self.server.server_port}/objects/{file.etag}",
            )  # another host, as the Hub's

    def download(self, oid: str) -> None:
        self.send(200, self.server.objects[oid], ETag=f'"{oid}"')

    # -- writing

    def create(self) -> None:
        wanted = json.loads(self.body())
        owner = wanted.get("organization") or self.user
        repo_id = f"{owner}/{wanted['name']}"
        if self.user is None:
            return self.send(401, X_Error_Message="Invalid username or password.")
        if owner != self.user or self.user == "reader":
            return self.send(
                403,
                X_Error_Message=f"You don't have the rights to create a model under the namespace {owner}",
            )
        if repo_id in self.server.repos:
            return self.send(409, {"error": "You already created this model repo"})
        self.server.add(
            repo_id, private=wanted.get("private") is True or wanted.get("visibility") == "private"
        )
        self.send(200, {"url": f"{self.server.url}/{repo_id}", "id": repo_id})

    def branch(self, repo: str, rev: str) -> None:
        start = json.loads(self.body() or b"{}").get("startingPoint", "main")
        if (found := self.repo(repo, write=True)) and (oid := self.revision(found, start)):
            found.branches[rev] = oid
            self.send(200, {})

    def validate_yaml(self) -> None:
        """Some of the Hub's rules for a card's front matter."""
        content = json.loads(self.body())["content"]
        data = yaml.safe_load(content.split("---\n")[1]) or {}
        faults = []
        if data.get("license") not in LICENCES:
            faults.append('"license" must be one of those that the Hub knows')
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")):
            faults.append('"base_model" is not valid. Use a model id from https://hf.co/models')
        for model in data.get("model-index", []):
            for row in model["results"]:
                if (
                    not row["task"]["type"]
                    or not row["dataset"]["type"]
                    or not row["dataset"]["name"]
                ):
                    faults.append('"model-index" lacks a task or dataset')
                if not all(
                    isinstance(metric["value"], int | float) and metric["type"]
                    for metric in row["metrics"]
                ):
                    faults.append('"model-index" has a metric without a value')
        self.send(
            400 if faults else 200,
            {"errors": [{"message": fault} for fault in faults], "warnings": []},
        )

    def preupload(self, repo: str, rev: str) -> None:
        wanted = json.loads(self.body())["files"]
        if (found := self.repo(repo, write=True)) and (oid := self.revision(found, rev)):
            there = found.commits[oid]
            rows = []
            for file in wanted:
                lfs = file["path"].endswith(".safetensors") or file["size"] >= BIG
                row = {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                }
                rows.append(
                    row | ({"oid": there[file["path"]].etag} if file["path"] in there else {})
                )
            self.send(200, {"files": rows})

    def lfs_batch(self, repo: str) -> None:
        wanted = json.loads(self.body())["objects"]
        if self.repo(repo, write=True) is None:
            return
        rows = []
        for row in wanted:
            steps = {"upload": "objects", "verify": "verify"}
            urls = {
                step: {"href": f"{self.server.url}/{place}/{row['oid']}"}
                for step, place in steps.items()
            }
            rows.append(row if row["oid"] in self.server.objects else {**row, "actions": urls})
        self.send(200, {"transfer": "basic", "objects": rows})

    def upload(self, oid: str) -> None:
        content = self.body()
        if sha256(content) != oid:
            return self.send(400, X_Error_Message="The content does not match its hash")
        self.server.objects[oid] = content
        self.send(200)

    def verify(self, oid: str) -> None:
        wanted = json.loads(self.body())
        whole = len(self.server.objects.get(oid, b"")) == wanted["size"] and wanted["oid"] == oid
        self.send(200 if whole else 404)

    def commit(self, repo: str, rev: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        if not ((found := self.repo(repo, write=True)) and (oid := self.revision(found, rev))):
            return
        [header] = [line["value"] for line in lines if line["key"] == "header"]
        if header.get("parentCommit") not in (None, oid) or rev not in found.branches:
            return self.send(412, X_Error_Message="A commit has happened since")
        files = dict(found.commits[oid])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]))
                case "lfsFile":
                    if value["oid"] not in self.server.objects:
                        return self.send(400, X_Error_Message="An LFS object is missing")
                    files[value["path"]] = File(self.server.objects[value["oid"]], lfs=True)
                case "deletedFile":
                    del files[value["path"]]
        new = found.commit(rev, files)
        self.send(
            200,
            {
                "commitUrl": f"{self.server.url}/{repo}/commit/{new}",
                "commitOid": new,
                "success": True,
            },
        )


_REPO, _REV = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<rev>[^/]+)"
ROUTES: list[tuple[str, Callable]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (rf"GET /api/models/{_REPO}", Handler.info),
    (rf"GET /api/models/{_REPO}/revision/{_REV}", Handler.info),
    (rf"GET /api/models/{_REPO}/tree/{_REV}", Handler.tree),
    (rf"GET /api/models/{_REPO}/tree/{_REV}/.+", Handler.no_folder),
    (rf"(GET|HEAD) /{_REPO}/resolve/{_REV}/(?P<name>.+)", Handler.resolve),
    (r"(GET|HEAD) /objects/(?P<oid>\w+)", Handler.download),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{_REPO}/branch/{_REV}", Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/{_REV}", Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /objects/(?P<oid>\w+)", Handler.upload),
    (r"POST /verify/(?P<oid>\w+)", Handler.verify),
    (rf"POST /api/models/{_REPO}/commit/{_REV}", Handler.commit),
]
