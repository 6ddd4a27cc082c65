"""Which files of an artifact's folder a loader reads: each is listed in kv_cache.json, regular, of
the hash that is stated, and, where it holds weights, whole. What a loader would read and nobody
signed is refused.

A file may be a link, as in the Hub's cache: what counts is the content, which is hashed,
and that its name lies in the folder.
"""

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from kvfold.errors import KvfoldError
from kvfold.exports.schema import METADATA_NAME, TENSORS_NAME
from kvfold.exports.scratch import is_part

AGAIN = "the artifact is damaged, write or download it again"
CARD_NAME, REPORT_NAME = "README.md", "report.html"
UNHASHED = {
    METADATA_NAME,
    CARD_NAME,
    REPORT_NAME,
}  # people edit the card, `kvfold report` adds measured rows
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CODE = {".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl"}  # runs, or is unpickled
READ_SUFFIXES = {*CODE, ".safetensors", ".h5", ".msgpack", ".gguf", ".jinja", ".model", ".tiktoken"}
READ_NAMES = {
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "additional_chat_templates", "custom_generate",
}  # fmt: skip
ITEM_NBYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
}
LONGEST_NAME = 255  # bytes, of most file systems
MOST_TEXT = (
    64 << 20
)  # bytes of a text that is read whole; the index of a million tensors is as large
MOST_NBYTES = 256 << 20  # of a file without weights; the largest tokenizers have a tenth of it


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, those of an index or the one there is."""
    index = path / INDEX
    return (
        [path / name for name in sorted(set(read_index(index).values()))]
        if index.is_file()
        else [path / WEIGHTS]
    )


def is_read(name: str) -> bool:
    """Whether transformers reads a file or folder of this name beside a config.json, or may run
    it."""
    return name in READ_NAMES or Path(name).suffix in READ_SUFFIXES or name.endswith(".index.json")


def foreign_names(path: Path, files: Mapping[str, str]) -> list[str]:
    """What lies in an artifact's folder that kvfold did not write.

    Args:
        files: name → sha256, as kv_cache.json lists them.
    """
    ours = {*files, *UNHASHED}
    names = [p.name for p in path.iterdir() if p.name not in ours or not p.is_file()]
    return sorted(name for name in names if not any(is_part(name, whole) for whole in UNHASHED))


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_files(path: Path, files: Mapping[str, str]) -> None:
    """Checks the files of an artifact's folder.

    Args:
        files: name → sha256, as kv_cache.json lists them.
    Raises:
        KvfoldError: what is wrong, by name.
    """
    for name in ("config.json", TENSORS_NAME):
        if name not in files:
            raise KvfoldError(f"{METADATA_NAME} in '{path}' lists no sha256 of {name}; {AGAIN}.")
    for name, digest in files.items():
        _check_name(name)
        if not (path / name).is_file():
            fault = (
                f"holds {name}, which is no regular file"
                if (path / name).exists()
                else f"lacks {name}"
            )
            raise KvfoldError(f"'{path}' {fault}; {AGAIN}.")
        _check_size(path / name)
        if file_sha256(path / name) != digest:
            raise KvfoldError(
                f"{name} in '{path}' does not match its sha256 in {METADATA_NAME}: if you changed it, sign it with "
                f"`kvfold validate --update '{path}'`; if not, {AGAIN}."
            )
    unlisted = sorted(p.name for p in path.iterdir() if p.name not in files and is_read(p.name))
    if unlisted:
        name = unlisted[0]
        fix = (
            f", or sign it with `kvfold validate --update '{path}'`"
            if _may_sign(path, name)
            else ""
        )
        raise KvfoldError(
            f"'{path}' holds {name}, which a loader may read and {METADATA_NAME} does not list; remove it{fix}."
        )
    check_weights(path, files)


def _check_size(file: Path) -> None:
    """Refuses a file that is too big for what it is, before it is hashed."""
    if file.stat().st_size > MOST_NBYTES:
        if file.suffix != ".safetensors":
            raise KvfoldError(
                f"{file.name} in '{file.parent}' has more than {MOST_NBYTES >> 20} MiB; {AGAIN}."
            )
        _keys(file)


def _check_name(name: str) -> None:
    if (
        Path(name).name != name
        or name in ("", "..")
        or "\\" in name
        or not name.isprintable()
        or len(name.encode()) > LONGEST_NAME
    ):
        raise KvfoldError(
            f"{METADATA_NAME} lists the file '{name[:LONGEST_NAME]}', but an artifact's files lie side by side, with "
            f"plain names; {AGAIN}."
        )
    if Path(name).suffix in CODE:
        raise KvfoldError(
            f"{METADATA_NAME} lists {name}, but an artifact holds no code and no pickle; "
            "write it again without that file."
        )


def check_weights(path: Path, files: Mapping[str, str]) -> None:
    """Opens every file of weights that a loader would, and compares the index with what its shards
    hold.

    Raises:
        KvfoldError: none is listed, one is unreadable or cut short, or the index names what isn't
            there.
    """
    if WEIGHTS in files:
        _keys(path / WEIGHTS)
    if INDEX not in files:
        if WEIGHTS in files:
            return
        raise KvfoldError(
            f"{METADATA_NAME} in '{path}' lists neither {WEIGHTS} nor {INDEX}; {AGAIN}."
        )
    shards: dict[str, set[str]] = {}
    for tensor, shard in read_index(path / INDEX).items():
        shards.setdefault(shard, set()).add(tensor)
    for shard, tensors in sorted(shards.items()):
        if shard not in files:
            raise KvfoldError(
                f"{INDEX} in '{path}' names the shard '{shard}', which {METADATA_NAME} does not list; {AGAIN}."
            )
        if absent := sorted(tensors - _keys(path / shard)):
            raise KvfoldError(
                f"{shard} in '{path}' lacks {absent[0]}, which {INDEX} says it holds; {AGAIN}."
            )


def write_index(folder: Path) -> bool:
    """Writes the index of a single file of weights, where there is none: an engine that finds an
    index reads what it names, and one that finds none takes every safetensors file for weights,
    kv_cache.safetensors too.

    Returns:
        Whether it was written.
    """
    weights = folder / WEIGHTS
    if (folder / INDEX).exists() or not weights.is_file():
        return False
    names = sorted(_keys(weights))
    with safe_open(weights, framework="pt") as stored:
        sizes = [
            (stored.get_slice(name).get_shape(), stored.get_slice(name).get_dtype())
            for name in names
        ]
    counts = [prod(shape) for shape, _ in sizes]
    nbytes = sum(n * ITEM_NBYTES[dtype] for n, (_, dtype) in zip(counts, sizes, strict=True))
    index = {
        "metadata": {"total_parameters": sum(counts), "total_size": nbytes},
        "weight_map": dict.fromkeys(names, WEIGHTS),
    }
    (folder / INDEX).write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    return True


def read_small(file: Path, most: int = MOST_TEXT) -> str:
    """The text of a file that is small where it is what it should be, such as JSON.

    Raises:
        ValueError: it has more than `most` bytes, which a hole in it makes at once, or isn't UTF-8.
        OSError: it can't be read.
    """
    if file.stat().st_size > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    return file.read_text(encoding="utf-8")


def read_index(file: Path) -> dict[str, str]:
    """Tensor → shard, of an index of safetensors files.

    Raises:
        KvfoldError: it is none.
    """
    try:
        found = json.loads(read_small(file))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found = None
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(shard, str) for shard in found.values())
    ):
        raise KvfoldError(
            f"'{file}' is not a readable index of safetensors files; download it again."
        )
    return found


def _keys(file: Path) -> set[str]:
    """Names of a file's tensors; opening it compares the header with the file's size."""
    try:
        with safe_open(file, framework="pt") as stored:
            return set(stored.keys())
    except (SafetensorError, OSError) as error:
        raise KvfoldError(
            f"{file.name} in '{file.parent}' is not a whole safetensors file ({error}); {AGAIN}."
        ) from None


def signed_files(path: Path, files: Mapping[str, str]) -> dict[str, str]:
    """What kv_cache.json should list after an edit: the hashes of the files as they are now. One
    that is gone is left out, one that a loader reads is added, unless it is code, or weights that
    no index names.

    Args:
        files: what it lists.
    Raises:
        KvfoldError: one has a name or a size that no file of an artifact has.
    """
    for name in files:
        _check_name(name)
    names = {name for name in files if (path / name).is_file()}
    names |= {p.name for p in path.iterdir() if is_read(p.name) and _may_sign(path, p.name)}
    for name in sorted(names):
        _check_size(path / name)
    return {name: file_sha256(path / name) for name in sorted(names)}


def _may_sign(path: Path, name: str) -> bool:
    if not (path / name).is_file() or Path(name).suffix in CODE or name.endswith(".bin.index.json"):
        return False
    if Path(name).suffix not in (".safetensors", ".gguf", ".h5", ".msgpack"):
        return name != "adapter_config.json"
    if name == WEIGHTS:
        return True
    return (path / INDEX).is_file() and name in read_index(path / INDEX).values()
