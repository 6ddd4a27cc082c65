"""Writes docs/families.md: what was checked of each model family, and why others are refused.

usage: python benchmarks/families.py [FAMILY …]

One tiny model of each family, of random weights in float32, goes through the whole product
(tests/helpers/family_checks.py, which test_more_families.py has bounds for). With families named,
their rows are printed and no page is written.
"""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]

from conftest import CONFIGS, FAMILIES, MORE_FAMILIES  # noqa: E402
from family_checks import BOUNDS, CONTEXT, IDS, STEPS, measure  # noqa: E402

from kvfold.compress.models import quiet_transformers  # noqa: E402
from kvfold.exports.architectures import TEXT_ALONE, Architecture, architecture_of  # noqa: E402
from kvfold.exports.refused import FIELDS, REFUSED  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
COLUMNS = {
    "fold, float64": "algebra", "keys turned on": "turned", "stock logits": "stock", "KL, one pass": "kl",
    "KL, steps": "decode_kl", "steps − pass": "decode", "padded − alone": "padding", "bytes": "bytes",
    "bits": "payload",
}  # fmt: skip

ABOUT = f"""# Model families

Written by `python benchmarks/families.py`; {{count}} families are supported, {{refused}} are refused by name. For a new
one, see [contributing](contributing.md#recipe-a-model-family).

## What is checked

One tiny model of each family (two or three layers, random weights, float32, random characters for a text) goes through
the whole product, and these are the figures. The bound that a test holds them to stands in the table's first line.

| column | what it is |
|---|---|
| fold, float64 | relative change of an attention's output when a basis of values is folded into its weights |
| keys turned on | keys at seven times their positions, against keys that calibration turned on; relative |
| stock logits | logits that transformers alone computes from the artifact, against the original's; relative |
| KL, one pass | nats between logits read through packed pages, {IDS.shape[1]} tokens at once, and the original's |
| KL, steps | the same of {STEPS} tokens one at a time |
| steps − pass | logits of those steps against those of the pass; relative |
| padded − alone | a row padded on the left against the row alone; relative |
| bytes | bytes that a cache takes less those that `kvfold inspect` says |
| bits | payload bits an element of the artifact, at a budget for {CONTEXT} tokens |

KLs compare families with nothing: weights are random, and so is how sharply they attend.

Not only here: before it searches, `kvfold compress` folds a basis into each layer of the model in hand, compares what
its attention gives, its keys at other positions and its logits with what it takes for granted
(`compress/search/check.py`), and refuses a model that does something else, whatever family its `config.json` names.

Checkpoints of {", ".join(f"`{name}`" for name in sorted(TEXT_ALONE))} are read as their language models alone, as
transformers does.

"""


def traits(row: Architecture) -> str:
    """What a row says beyond Llama's."""
    said = {
        "norms of queries and keys": row.qk_norm and not row.norm_after_rope,
        "norms of queries and keys behind RoPE": row.norm_after_rope,
        "adjacent RoPE pairs": row.rope_pairs == "adjacent",
        "RoPE the other way round": row.rope_pairs == "swapped",
        "RoPE by type of layer": row.rope_by_type,
        "RoPE in sliding layers alone": row.rope_if_sliding,
        "RoPE of three axes": row.rope_axes > 1,
        "sliding layers": row.sliding == "layer_types",
        "every layer may slide": row.sliding == "all",
        "layers that attend in chunks": row.sliding == "chunks",
        "heads of several shapes, layers that read others' keys and values": row.by_layer,
        "a norm of values": row.value_norm,
        "sink logits": row.sink_logits,
        "the language model of several towers": bool(row.tower),
        "layers that keep states": row.hybrid,
        "a gate behind attention": bool(row.gate),
        "scaled logits": bool(row.logit_factor or row.logit_divisor),
    }
    return ", ".join(name for name, holds in said.items() if holds)


def shown(name: str, value: float) -> str:
    if name == "bytes":
        return f"{value:.0f}"
    return f"{value:.2f}" if name == "payload" else f"{value:.0e}".replace("e-0", "e-")


# experts drawn at random, of which a rounding takes others: ten steps lose 0.05 to 0.13 nats by the machine
OWN = {("gpt_oss", "decode_kl"): 0.2}


def table(families: list[str]) -> str:
    """A row for each family."""
    lines = [
        f"| family | {' | '.join(COLUMNS)} | of its own |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    bounds = [
        f"≤ {shown(name, BOUNDS[name])}" if name in BOUNDS else "" for name in COLUMNS.values()
    ]
    lines.append(f"| *bound* | {' | '.join(bounds)} | |")
    for family in families:
        with TemporaryDirectory() as folder:
            found = measure(family, Path(folder))
        cells = [
            shown(name, found[name])
            + (
                " **too much**"
                if found[name] > OWN.get((family, name), BOUNDS.get(name, 99))
                else ""
            )
            for name in COLUMNS.values()
        ]
        lines.append(
            f"| `{family}` | {' | '.join(cells)} | {traits(architecture_of(CONFIGS[family]()))} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def refusals() -> str:
    """Reasons and whom they are given."""
    reasons: dict[str, list[str]] = {}
    for family, reason in sorted(REFUSED.items()):
        reasons.setdefault(reason, []).append(f"`{family}`")
    lines = ["| refused | because |", "|---|---|"]
    lines += [
        f"| {', '.join(names)} | {reason} |"
        for reason, names in sorted(reasons.items(), key=lambda x: x[1])
    ]
    lines += [
        f"| any with `{field}` in its config | {reason} |" for field, reason in FIELDS.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    quiet_transformers()
    named = sys.argv[1:]
    if unknown := set(named) - set(CONFIGS):
        sys.exit(
            f"no tiny configuration of {', '.join(sorted(unknown))}; there are {', '.join(sorted(CONFIGS))}"
        )
    rows = table(named or [*FAMILIES, *MORE_FAMILIES])
    if not named:
        about = ABOUT.format(count=len({*FAMILIES, *MORE_FAMILIES}), refused=len(REFUSED))
        measured = f"## Supported\n\nMeasured on {time.strftime('%Y-%m-%d')} on a CPU.\n\n"
        PAGE.write_text(f"{about}{measured}{rows}\n## Refused\n\n{refusals()}", encoding="utf-8")


if __name__ == "__main__":
    main()
