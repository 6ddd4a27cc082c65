"""The licence of a base model: found in its folder, carried over into the artifact,
asked about before it is published."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from kvfold.errors import KvfoldError
from kvfold.exports.files import read_small

UNKNOWN = "unknown"  # the Hub's own word for it
TEXTS = (
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)  # what a redistributor has to pass on
LARGEST = 1 << 20  # bytes; no licence is longer

# Hub identifiers of licences that let anyone pass on a changed copy. Everything else is asked
# about.
REDISTRIBUTABLE = re.compile(
    r"apache-2\.0|mit|isc|zlib|unlicense|wtfpl|ncsa|ms-pl|postgresql|bsl-1\.0|afl-3\.0|artistic-2\.0|osl-3\.0"
    r"|ecl-2\.0|epl-[12]\.0|eupl-1\.[12]|mpl-2\.0|lppl-1\.3c|bsd(-[23]-clause(-clear)?)?|(a|l)?gpl(-[23]\.[01])?"
    r"|cc0-1\.0|cc-by(-nc)?(-sa)?-[234]\.[05]|cc|pddl|odc-by|odbl|cdla-permissive-[12]\.0|cdla-sharing-1\.0"
    r"|openrail(\+\+)?|creativeml-openrail-m|bigcode-openrail-m|bigscience-openrail-m|bigscience-bloom-rail-1\.0"
)
NO_DERIVATIVES = re.compile(r"cc-by(-nc)?-nd-\d\.\d")

# How the licence files that models ship begin. The order matters: the first whose words all occur.
WORDINGS = (
    ("apache-2.0", ("Apache License", "Version 2.0, January 2004")),
    ("mit", ("Permission is hereby granted, free of charge", "THE SOFTWARE IS PROVIDED")),
    ("bsd-3-clause", ("Redistribution and use in source and binary forms", "Neither the name")),
    ("bsd-2-clause", ("Redistribution and use in source and binary forms",)),
    ("gemma", ("Gemma Terms of Use",)),
    *(
        (f"llama{v}", (f"LLAMA {v} COMMUNITY LICENSE AGREEMENT",))
        for v in ("4", "3.3", "3.2", "3.1")
    ),
    ("llama3", ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT",)),
    ("llama2", ("LLAMA 2 COMMUNITY LICENSE AGREEMENT",)),
)


@dataclass(frozen=True)
class Licence:
    """A licence as a model card states it.

    Attributes:
        id: the Hub's identifier, e.g. "apache-2.0", "other", "unknown".
        name, link: of one that has no identifier ("other").
        texts: files to carry over: the licence, notices, use policies.
    """

    id: str = UNKNOWN
    name: str | None = None
    link: str | None = None
    texts: tuple[Path, ...] = ()


def find_licence(folder: Path) -> Licence:
    """The licence of the checkpoint in a folder: what its model card says, else its config,
    else the wording of its licence file."""
    texts = tuple(sorted({p for pattern in TEXTS for p in folder.glob(pattern) if _is_text(p)}))
    card = card_fields(folder / "README.md")
    if isinstance(card.get("license"), str):
        link = card.get("license_link")
        shipped = isinstance(link, str) and any(
            link.rsplit("/", 1)[-1] == text.name for text in texts
        )
        # a link that is relative to the base model's folder holds in ours too, if we carry the file
        # over
        return Licence(
            card["license"],
            card.get("license_name"),
            link if shipped or "://" in str(link) else None,
            texts,
        )
    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("license")
    except (OSError, ValueError, AttributeError):
        stated = None
    return Licence(stated if isinstance(stated, str) else _recognise(texts), texts=texts)


def card_fields(card: Path) -> dict[str, Any]:
    """The front matter of a model card; empty if there is none that can be read."""
    try:
        return read_card(read_small(card), str(card)).data.to_dict()
    except (OSError, ValueError, KvfoldError):
        return {}


def read_card(text: str, name: str) -> ModelCard:
    """A model card's front matter (`.data`) and body (`.text`).

    Raises:
        KvfoldError: the front matter is not YAML, or no mapping.
    """
    if not text.lstrip().startswith(
        "---"
    ):  # huggingface_hub logs a warning about an absent front matter
        text = f"---\n{{}}\n---\n{text}"
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except Exception as error:  # yaml's kinds of error, and ValueError
        reason = " ".join(str(error).split())
        raise KvfoldError(
            f"The front matter of '{name}' is not valid ({reason}); correct its YAML."
        ) from None


def check_redistributable(licence_id: Any, model: str, card: Path) -> None:
    """Refuses to publish what may not be passed on, or perhaps not.

    Args:
        licence_id: what the artifact's model card states as `license`.
        model: the base model's name.
        card: where the licence is stated.
    Raises:
        KvfoldError: unless the licence is known to allow anyone to pass on changed copies.
    """
    found = licence_id if isinstance(licence_id, str) and licence_id else UNKNOWN
    if REDISTRIBUTABLE.fullmatch(found):
        return
    if found == UNKNOWN:
        raise KvfoldError(
            f"The licence of the base model '{model}' is unknown; state it as `license:` at the top of '{card}', "
            "or say --i-know if you may redistribute the model."
        )
    fault = (
        "forbids sharing changed versions"
        if NO_DERIVATIVES.fullmatch(found)
        else "has terms of its own for sharing"
    )
    raise KvfoldError(
        f"The licence '{found}' of the base model '{model}' {fault}; read it, "
        "and say --i-know if you may redistribute the model."
    )


def _is_text(path: Path) -> bool:
    return (
        path.is_file()
        and path.stat().st_size <= LARGEST
        and path.suffix.lower() in ("", ".txt", ".md", ".pdf")
    )


def _recognise(texts: tuple[Path, ...]) -> str:
    for text in texts:
        words = " ".join(text.read_text(encoding="utf-8", errors="replace").split())
        for licence_id, wording in WORDINGS:
            if all(part.lower() in words.lower() for part in wording):
                return licence_id
    return UNKNOWN
