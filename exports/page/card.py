"""The model card: generated beside the artifact, given its repository's id and measured figures
when it is pushed."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from kvfold.errors import KvfoldError
from kvfold.exports.account import cache_nbytes, effective_bits, stock_nbytes
from kvfold.exports.files import CARD_NAME, read_small
from kvfold.exports.page.licence import UNKNOWN, Licence, read_card
from kvfold.exports.page.plots import BITS_NAME, MEMORY_NAME
from kvfold.exports.schema import Metadata
from kvfold.exports.units import format_nbytes
from kvfold.version import __version__

BUILT_IN = "built-in"  # compress/text.py's name of the text that the package ships
TAGS = ["kvfold", "kv-cache", "quantized"]
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
QUALITY = re.compile(r"<!-- quality -->.*?<!-- /quality -->", re.DOTALL)
LENGTHS = 5  # rows of the memory table

# what the figures of `kvfold eval … --json` must be
FIGURES = {
    "model": str, "text": str, "windows": int, "first_window": int, "seq_len": int,
    "effective_bits": float, "payload_bits": float, "ppl_16bit": float, "ppl": float,
    "kl": float, "top1_agreement": float,
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """What the card says of the base model beyond its name.

    Attributes:
        repo_id: its id on the Hub, if it has one that is known.
        licence: its licence.
    """

    repo_id: str | None = None
    licence: Licence = field(default_factory=Licence)


@cache
def environment(**options: Any) -> Environment:
    """Jinja's environment for the templates of this folder, each compiled once; with more of its
    options."""
    env = Environment(
        loader=PackageLoader("kvfold.exports.page", "."),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        **options,
    )
    env.filters["size"] = format_nbytes
    return env


def render(template: str, **values: Any) -> str:
    """The text of a template of this folder."""
    return environment().get_template(template).render(values)


def model_card(metadata: Metadata, name: str, base: Base) -> str:
    """README.md's text.

    Args:
        name: what the commands in it call the artifact: its folder's name, or its id on the Hub.
    """
    data = ModelCardData(
        base_model=base.repo_id,
        base_model_relation="quantized" if base.repo_id else None,
        library_name="kvfold",
        license=base.licence.id,
        license_name=base.licence.name,
        license_link=base.licence.link,
        pipeline_tag="text-generation",
        tags=TAGS,
    )
    body = render(
        "card.md.jinja",
        m=metadata,
        name=name,
        base=base,
        unknown=UNKNOWN,
        version=__version__,
        lengths=_length_table(metadata),
        compress_command=_compress_command(metadata),
        bits_plot=BITS_NAME,
        memory_plot=MEMORY_NAME,
        quality=quality_section(metadata, name, ()),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def published_card(
    text: str, metadata: Metadata, repo_id: str, results: Sequence[dict[str, Any]]
) -> str:
    """A card as it goes to the Hub: its commands name the repository, its figures are `results`.
    What people wrote stays.

    Args:
        text: README.md of the artifact.
        repo_id: where it goes.
        results: figures of `kvfold eval … --json`, checked by read_results.
    """
    card = read_card(text, CARD_NAME)
    body = re.sub(r'(?m)^(path = ")[^"]*(")', rf"\g<1>{repo_id}\g<2>", card.text)
    body = re.sub(r"(`kvfold (?:inspect|eval|generate|validate) )[^\s`]+", rf"\g<1>{repo_id}", body)
    if results:
        section = quality_section(metadata, repo_id, results)
        body = (
            QUALITY.sub(lambda _: section, body)
            if QUALITY.search(body)
            else f"{body.rstrip()}\n\n{section}\n"
        )
        card.data["model_name"] = repo_id.rpartition("/")[2]
        card.data["eval_results"] = [
            figure for result in results for figure in _eval_results(result)
        ]
    card.text = body
    return str(card)


def read_results(file: Path, metadata: Metadata) -> dict[str, Any]:
    """Reads figures that `kvfold eval … --json FILE` wrote, and checks that they are of this
    artifact.

    Raises:
        KvfoldError: no such file, not such figures, or figures of another artifact.
    """
    try:
        found = json.loads(read_small(file))
    except (OSError, ValueError):
        raise KvfoldError(
            f"Results '{file}' cannot be read as JSON; give what `kvfold eval … --json FILE` wrote."
        ) from None
    for name, kind in FIGURES.items():
        value = found.get(name) if isinstance(found, dict) else None
        if not isinstance(value, kind) or (isinstance(value, float) and not abs(value) < 1e30):
            raise KvfoldError(
                f"Results '{file}' have no figure '{name}'; give what `kvfold eval … --json FILE` wrote."
            )
    geometry, formats = metadata.geometry, metadata.formats
    tokens = found["seq_len"]
    bits = (
        effective_bits(geometry, cache_nbytes(geometry, formats, tokens), [tokens], len(formats))
        if tokens > 0
        else 0
    )
    stated = (found["effective_bits"], found["payload_bits"])
    if (
        max(abs(a - b) for a, b in zip(stated, (bits, metadata.account.payload_bits), strict=True))
        > 1e-9
    ):
        raise KvfoldError(
            f"Results '{file}' are of another artifact: {stated[0]:.4f} effective bits at {tokens} tokens, but this "
            f"one has {bits:.4f}; measure it with `kvfold eval`."
        )
    return found


def quality_section(metadata: Metadata, name: str, results: Sequence[dict[str, Any]]) -> str:
    """The table of measured figures, each row with its command, between marks by which it is found
    again."""
    rows = [{**result, "command": _eval_command(metadata, name, result)} for result in results]
    return render("quality.md.jinja", name=name, rows=rows).strip()


def _eval_command(metadata: Metadata, name: str, result: dict[str, Any]) -> str:
    options = [] if result["text"] == BUILT_IN else ["--text", result["text"]]
    if result["model"] != metadata.provenance.model:
        options += ["--against", result["model"]]
    if result["first_window"]:
        options += ["--first-window", result["first_window"]]
    options += ["--windows", result["windows"], "--seq-len", result["seq_len"]]
    return " ".join(["kvfold eval", name, *(shlex.quote(str(option)) for option in options)])


def _compress_command(metadata: Metadata) -> str:
    budget, source = metadata.budget, metadata.calibration.source
    options = [
        "--budget",
        budget.request,
        *([] if "@" in budget.request else ["--context", budget.at]),
    ]
    options += ["--recipe", "recipe.yaml", *([] if source == BUILT_IN else ["--calib", source])]
    return " ".join(
        [
            "kvfold compress",
            *(shlex.quote(str(word)) for word in (metadata.provenance.model, *options)),
        ]
    )


def _length_table(metadata: Metadata) -> list[tuple[int, int, int]]:
    """(tokens, packed bytes, bytes in 16 bits) of a few lengths, the budget's own among them."""
    geometry, formats = metadata.geometry, metadata.formats
    lengths = sorted(
        {metadata.account.at, *(2**i for i in range(9, 31) if 2**i < metadata.account.at)}
    )[-LENGTHS:]
    return [
        (n, cache_nbytes(geometry, formats, n), stock_nbytes(geometry, n, len(formats)))
        for n in lengths
    ]


def _eval_results(result: dict[str, Any]) -> list[EvalResult]:
    place = {
        "task_type": "text-generation",
        "dataset_type": result["text"].partition(":")[0],
        "dataset_name": f"{result['text']}, {result['windows']} windows of {result['seq_len']} tokens",
    }
    figures = (
        ("perplexity", "perplexity, packed cache", result["ppl"]),
        ("perplexity", "perplexity, unquantised cache", result["ppl_16bit"]),
        (
            "kl_divergence",
            "KL divergence of the packed from the unquantised cache, nats",
            result["kl"],
        ),
        ("top_1_agreement", "top-1 agreement with the unquantised cache", result["top1_agreement"]),
    )
    return [
        EvalResult(**place, metric_type=kind, metric_name=name, metric_value=value)
        for kind, name, value in figures
    ]
