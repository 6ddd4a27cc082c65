"""`push_to_hub`: an artifact as one commit on the Hub, validated before it goes and compared after
it went.

One `create_commit` carries the whole folder. That is what `upload_folder` itself does without Xet,
but with Xet it cuts large folders into several commits, as `upload_large_folder` always did, and a
reader in between would get half an artifact. Nothing of resuming is lost: large files travel before
the commit, by content, and a second run sends only those (with Xet: only those chunks) that the Hub
does not hold yet.
"""

import hashlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from kvfold.errors import KvfoldError
from kvfold.exports.files import CARD_NAME
from kvfold.exports.page.card import Base, model_card, published_card, read_results
from kvfold.exports.page.licence import card_fields, check_redistributable
from kvfold.exports.reader import Artifact, file_sha256, read_artifact
from kvfold.exports.schema import METADATA_NAME, Metadata, parse_metadata

log = logging.getLogger("kvfold")

MAIN = "main"
OWN_FILES = {".gitattributes"}  # the Hub puts it into every new repository
OPTIONAL = ("report.html",)  # of the artifact's folder, without a hash in kv_cache.json


@dataclass(frozen=True)
class Pushed:
    """Where an artifact went: repository, commit, and the page of that commit's files."""

    repo_id: str
    commit: str
    url: str


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    allow_restricted_licence: bool = False,
    results: Sequence[str | Path] = (),
) -> Pushed:
    """Publishes an artifact; the folder itself is not changed. Interrupted, the same call goes on
    where it was.

    Args:
        path: the artifact's folder. Only its listed files, its card and its report go up.
        repo_id: OWNER/NAME; made if it does not exist.
        private: make it private; an existing repository must be private already.
        revision: branch; made if it does not exist. Default: main.
        token: of the Hub; default: what `hf auth login` or HF_TOKEN set.
        allow_restricted_licence: the caller knows that the base model's licence lets them do this.
        results: files of `kvfold eval … --json FILE`, put into the card's table and its
            `model-index`.
    Raises:
        KvfoldError: the artifact is not valid, its licence is not known to allow it, `repo_id`
            holds something else, or the Hub refuses; nothing is uploaded then, unless the sentence
            says otherwise.
    """
    artifact = read_artifact(path)
    card = _card(
        artifact, repo_id, [read_results(Path(file), artifact.metadata) for file in results]
    )
    if not allow_restricted_licence:
        stated = card_fields(artifact.path / CARD_NAME).get("license")
        check_redistributable(stated, artifact.metadata.provenance.model, artifact.path / CARD_NAME)
    branch = revision or MAIN
    with _one_sentence(repo_id, branch):
        api = HfApi(token=token)
        _check_id(repo_id, api.whoami()["name"])
        parent = _prepare(api, repo_id, branch, private, artifact.metadata)
        remote = _tree(api, repo_id, parent)
        stale = _check_content(api, repo_id, parent, remote, artifact.metadata)
        operations: list[Any] = [
            CommitOperationAdd(name, artifact.path / name) for name in _names(artifact)
        ]
        operations += [
            CommitOperationAdd(CARD_NAME, card.encode()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        with warnings.catch_warnings():  # the Hub's advice on the card's front matter
            warnings.simplefilter("ignore")
            done = api.create_commit(
                repo_id,
                operations,
                commit_message=(
                    f"{artifact.metadata.provenance.model} with a KV cache of "
                    f"{artifact.metadata.account.effective_bits:.2f} bits"
                ),
                revision=branch,
                parent_commit=parent,
            )
        _check_upload(api, repo_id, done.oid, artifact, card)
    return Pushed(repo_id, done.oid, f"{api.endpoint}/{repo_id}/tree/{done.oid}")


def _card(artifact: Artifact, repo_id: str, results: list[dict[str, Any]]) -> str:
    file = artifact.path / CARD_NAME
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = model_card(artifact.metadata, artifact.path.resolve().name, Base())
    except UnicodeDecodeError:
        raise KvfoldError(f"The model card '{file}' is not UTF-8; correct or delete it.") from None
    return published_card(text, artifact.metadata, repo_id, results)


def _check_id(repo_id: str, user: str) -> None:
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise KvfoldError(
            f"REPO_ID '{repo_id}' names no owner; write for example '{user}/{repo_id}'."
        )


def _names(artifact: Artifact) -> list[str]:
    """Files to send, but for the card. Others that lie in the folder stay there."""
    names = [
        *artifact.metadata.files,
        METADATA_NAME,
        *(n for n in OPTIONAL if (artifact.path / n).is_file()),
    ]
    names = sorted(dict.fromkeys(names))
    left = sorted({p.name for p in artifact.path.iterdir()} - {*names, CARD_NAME})
    if left:
        log.warning("not part of the artifact, so not uploaded: %s", ", ".join(left))
    return names


def _prepare(api: HfApi, repo_id: str, branch: str, private: bool, metadata: Metadata) -> str:
    """Makes repository and branch where they don't exist. Returns the branch's commit."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None)  # None: what the owner's settings say
        info = api.model_info(repo_id)
    if private and not info.private:
        raise KvfoldError(
            f"Repository '{repo_id}' exists and is public; make it private in its settings, or drop --private."
        )
    if branch == MAIN:
        return str(info.sha)
    try:
        return str(api.model_info(repo_id, revision=branch).sha)
    except RevisionNotFoundError:
        # checked before the branch is made: a refusal must leave nothing behind
        _check_content(api, repo_id, str(info.sha), _tree(api, repo_id, str(info.sha)), metadata)
        api.create_branch(repo_id, branch=branch, revision=info.sha)
        return str(api.model_info(repo_id, revision=branch).sha)


def _tree(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _check_content(
    api: HfApi, repo_id: str, commit: str, remote: dict[str, RepoFile], metadata: Metadata
) -> list[str]:
    """Refuses to write over anything but an artifact of the same model. Returns that one's files
    that ours lacks."""
    if not remote.keys() - OWN_FILES:
        return []
    if METADATA_NAME not in remote:
        first = sorted(remote.keys() - OWN_FILES)[0]
        raise KvfoldError(
            f"Repository '{repo_id}' already holds {first}, and no artifact; choose another REPO_ID, "
            "or empty it yourself."
        )
    there = _remote_metadata(api, repo_id, commit)
    model = metadata.provenance.model
    if there.provenance.model != model:
        raise KvfoldError(
            f"Repository '{repo_id}' already holds an artifact of '{there.provenance.model}', not of '{model}'; "
            "choose another REPO_ID, or another --revision."
        )
    strays = {
        name for name in remote if name.endswith(".safetensors")
    }  # they would make what is loaded from there invalid
    return sorted(((there.files.keys() & remote.keys()) | strays) - metadata.files.keys())


def _remote_metadata(api: HfApi, repo_id: str, commit: str) -> Metadata:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(api.hf_hub_download(repo_id, METADATA_NAME, revision=commit, local_dir=folder))
        return parse_metadata(
            file.read_text(encoding="utf-8"), f"{METADATA_NAME} of repository '{repo_id}'"
        )


def _check_upload(api: HfApi, repo_id: str, commit: str, artifact: Artifact, card: str) -> None:
    """Compares what the Hub now holds with what was validated."""
    remote = _tree(api, repo_id, commit)
    for name in [*_hashed(artifact), CARD_NAME]:
        content = card.encode() if name == CARD_NAME else None
        if name not in remote or not _same(
            remote[name], artifact.path / name, artifact.metadata.files.get(name), content
        ):
            raise KvfoldError(
                f"{name} in commit {commit} of '{repo_id}' is not what '{artifact.path}' held when it was validated; "
                "push again."
            )
    if _remote_metadata(api, repo_id, commit) != artifact.metadata:
        raise KvfoldError(
            f"{METADATA_NAME} in commit {commit} of '{repo_id}' differs from the local one; push again."
        )


def _hashed(artifact: Artifact) -> list[str]:
    return [*artifact.metadata.files, METADATA_NAME]


def _same(remote: RepoFile, file: Path, sha256: str | None, content: bytes | None) -> bool:
    """Whether a file on the Hub has the content that was validated; small ones are known by git's
    hash, large ones by SHA-256."""
    if remote.lfs is not None:
        return remote.lfs.sha256 == (
            sha256
            or (hashlib.sha256(content).hexdigest() if content is not None else file_sha256(file))
        )
    local = file.read_bytes() if content is None else content
    if sha256 is not None and hashlib.sha256(local).hexdigest() != sha256:
        return False
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(local) + local).hexdigest()


@contextmanager
def _one_sentence(repo_id: str, branch: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence with what to do."""
    try:
        yield
    except KvfoldError:
        raise
    except LocalTokenNotFoundError:
        raise KvfoldError(
            f"No token of the Hub was found, so nothing can be pushed to '{repo_id}'; "
            "run `hf auth login` or set HF_TOKEN."
        ) from None
    except HFValidationError as error:
        raise KvfoldError(
            f"REPO_ID '{repo_id}' is not valid ({_line(error)}); write OWNER/NAME."
        ) from None
    except OfflineModeIsEnabled:
        raise KvfoldError(
            f"HF_HUB_OFFLINE is set, so nothing can be pushed to '{repo_id}'; unset it."
        ) from None
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(
            error, HfHubHTTPError
        ):  # the Hub's check of the card
            reason = _line(error).rstrip(".")
            raise KvfoldError(
                f"The Hub refuses what was to go to '{repo_id}': {reason}; correct it and push again."
            ) from error
        answer = _answer(error)
        if answer is not None:
            raise KvfoldError(_status_sentence(answer, repo_id, branch)) from error
        if isinstance(error, (OSError, RuntimeError, TRANSPORT)):
            raise KvfoldError(
                f"The connection to the Hub broke while pushing to '{repo_id}' ({_line(_root(error))}); "
                "run the same command again, what has arrived is not sent again."
            ) from error
        raise


# httpx's base of everything that can go wrong on the way; huggingface_hub has its own copy of httpx
# in newer releases
TRANSPORT: Any = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")


def _answer(error: BaseException | None) -> Any:
    """The HTTP response behind an error, if the Hub gave one: uploads wrap theirs."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response
        error = error.__cause__
    return None


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _status_sentence(answer: Any, repo_id: str, branch: str) -> str:
    status = answer.status_code
    if status == 401:
        return (
            f"The Hub does not accept the token that was to push to '{repo_id}' (401); run `hf auth login` or set "
            "HF_TOKEN to a valid one."
        )
    if status == 403:
        return f"The token has no right to write to '{repo_id}' (403); use one with write access, or another REPO_ID."
    if status == 404:
        return f"The Hub knows no '{repo_id}' with a branch '{branch}' that this token may see (404); check both names."
    if status == 409:
        return f"The Hub refuses '{repo_id}', since something of this name exists already (409); choose another name."
    if status == 412:
        return (
            f"Someone else has written to '{repo_id}' meanwhile (412); look at it, then push again."
        )
    if status == 429:
        wait = answer.headers.get("Retry-After")
        return (
            f"The Hub limits the rate of requests (429); push to '{repo_id}' again "
            f"{f'in {wait} seconds' if wait else 'later'}."
        )
    said = answer.headers.get("X-Error-Message")
    fix = "try again later" if status >= 500 else "correct that and push again"
    return f"The Hub answered {status} while pushing to '{repo_id}'{f' ({said})' if said else ''}; {fix}."
