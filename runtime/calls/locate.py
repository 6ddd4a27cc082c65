"""Whether what transformers is to load is an artifact, at the price of no request that transformers
doesn't make itself.

Of a repository on the Hub transformers first asks which commit a revision is. The same answer lists
the repository's files; the commit is handed on, so that nobody asks twice. Where the Hub can't be
reached the commit is known from the Hub's cache, and so are its files.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from kvfold.exports.reader import is_artifact
from kvfold.exports.schema import METADATA_NAME

CONFIG = "config.json"


class _Asking(HfApi):
    """Notes which files the repository holds whose revision it is asked for."""

    names: set[str] | None = None

    def repo_info(self, *args: Any, **kwargs: Any) -> Any:
        found = super().repo_info(*args, **kwargs)
        siblings = getattr(found, "siblings", None)
        if siblings is not None:
            self.names = {sibling.rfilename for sibling in siblings}
        return found


def locate(name: Any, hub: dict[str, Any]) -> tuple[bool, str | None]:
    """Whether a folder or a Hub repository is an artifact, and the revision by which to load it.

    Args:
        name: as `from_pretrained` takes it.
        hub: options of hf_hub_download that were given.
    Returns:
        (it is one, the revision with the commit that it was found to be; None where nothing was
        found out).
    """
    try:
        if Path(name).exists():
            return is_artifact(Path(name)), None
        return _ask(str(name), hub)
    except (
        Exception
    ):  # not there, or not to be reached: what transformers says of it is the better message
        return False, None


def _ask(repo_id: str, hub: dict[str, Any]) -> tuple[bool, str | None]:
    options: dict[str, Any] = {
        name: hub[name] for name in ("revision", "cache_dir", "token") if name in hub
    }
    options["local_files_only"] = bool(hub.get("local_files_only")) or constants.HF_HUB_OFFLINE
    api = _Asking()
    if not hasattr(
        api, "resolve_revision"
    ):  # older huggingface_hub: a file is asked for, as its transformers does for each
        return _fetched(repo_id, hub), None
    revision = api.resolve_revision(repo_id, **options)
    if api.names is not None:
        return METADATA_NAME in api.names, revision
    there = {
        name: try_to_load_from_cache(
            repo_id, name, cache_dir=hub.get("cache_dir"), revision=revision.resolved
        )
        for name in (METADATA_NAME, CONFIG)
    }
    if any(isinstance(found, str) for found in there.values()):
        return isinstance(there[METADATA_NAME], str), revision
    return _fetched(
        repo_id, {**hub, "revision": revision}
    ), revision  # a commit by its hash, of which nothing is here


def _fetched(repo_id: str, hub: dict[str, Any]) -> bool:
    try:
        hf_hub_download(repo_id, METADATA_NAME, **hub)
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return False
    return True
