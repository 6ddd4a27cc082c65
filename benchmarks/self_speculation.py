"""Would self-speculation pay: greedy drafts on coarse pages, verified on fine ones, both of one
cache (after QuantSpec,
2502.10424)?

usage: python benchmarks/self_speculation.py DIR [--tokens 48] [--draft floor] [--verifiers 16,8] [--gamma 1,2,4,8]
                                             [--text FILE|DATASET] [--prompt 1024] [--prompts 4] [--context 8192]
                                             [--shape NAME] [--device auto] [--json FILE]

A cache holds one precision a page, so the scheme is put together from its parts. What is drafted:
the verifier writes greedily after each prompt; at every place where a round of the scheme would
begin, the drafter, whose pages were packed from the verifier's own keys and values, drafts from
there and is compared. What it takes: steps of both on caches of random keys and values of --context
tokens. A round of γ is γ drafter steps of one token and a verifier step of γ + 1, and gives the
accepted drafts and one token more.

Caches are named by the bits of their pages, `16` being transformers' own (for the time also 16-bit
pages, the faster counts), `floor` the searched formats, 8 and 4 the progressive policy's rungs.
--shape times the random model of that shape of `kvfold bench decode` instead, with --format as its
floor. With Triton on a GPU a step of one token is a replayed graph; a longer one is not, so the
last column says what would be had if verification took no longer than a step of one token.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from speculation_steps import bytes_of, step_times
from torch import Tensor
from transformers import DynamicCache

from kvfold.compress.bench.model import attach_formats, build_model, layer_formats
from kvfold.compress.bench.runs import mean_and_error
from kvfold.compress.evaluate import windows_of
from kvfold.compress.models import quiet_transformers
from kvfold.compress.plan import pick_device
from kvfold.compress.text import HELD_OUT, read_documents
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.spec import LayerSpec
from kvfold.kernels.formats import raw16
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.budget.ladder import finer
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.load import load_pretrained, plain_cache

PLAIN, FLOOR, CACHES = "16", "floor", ("floor", "4", "8", "16")
States = list[
    tuple[Tensor, Tensor]
]  # of each layer, keys after RoPE and values [1, num_kv_heads, T, head_dim]


def specs_of(specs: list[LayerSpec], name: str) -> list[LayerSpec]:
    """The specs of a named cache, in the floor's basis: 16-bit pages for "16"."""

    def side(spec: Any) -> Any:
        fmt = raw16(spec.format.head_dim) if name == PLAIN else finer(spec.format, int(name))
        return replace(spec, format=fmt, clip=spec.clip if fmt == spec.format else None)

    return (
        specs if name == FLOOR else [LayerSpec(side(spec.key), side(spec.value)) for spec in specs]
    )


def greedy(model: Any, ids: Tensor, count: int, verifier: str) -> tuple[list[int], States]:
    """Writes `count` tokens after ids [1, P] with the verifier's cache; the end of a text does not
    end it.

    Returns:
        all P + count tokens, and the keys and values of all but the last.
    """
    artifact = model.kv_artifact
    cache: Any = DynamicCache(config=model.config)
    if verifier != PLAIN:
        cache = QuantizedKVCache(
            specs_of(artifact.specs, verifier), artifact.geometry, None, backend_of(model.kv_triton)
        )
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in artifact.specs]
    update = cache.update

    def record(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        seen[layer].append((keys.clone(), values.clone()))
        return update(keys, values, layer, *args, **kwargs)

    cache.update = record
    text, part = ids[0].tolist(), ids
    for _ in range(count):
        if verifier == PLAIN:
            with plain_cache(model):
                logits = model(
                    input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits
        else:
            logits = model(
                input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
        part = logits[:, -1:].argmax(-1)
        text.append(int(part))
    return text, [
        (torch.cat([k for k, _ in rows], 2), torch.cat([v for _, v in rows], 2)) for rows in seen
    ]


class Drafter:
    """A cache that follows the verifier's keys and values and drafts from any place, the places
    rising.

    Args:
        text, states: as `greedy` returns them.
        most: tokens that are drafted at the most.
    """

    def __init__(
        self, model: Any, specs: list[LayerSpec], text: list[int], states: States, most: int
    ) -> None:
        geometry = replace(model.kv_artifact.geometry, rollback=most)
        self.model, self.text, self.states, self.most = model, text, states, most
        self.cache = QuantizedKVCache(specs, geometry, None, backend_of(model.kv_triton))

    def accepted(self, position: int) -> int:
        """Drafts that are the verifier's own tokens, up to the first that is not, after text[:
        position + 1]."""
        start = self.cache.get_seq_length()
        if position > start:
            for layer, states in enumerate(self.states):
                self.cache.update(*(x[:, :, start:position] for x in states), layer)
                self.cache.layers[layer].release_passed()
        token, count = self.text[position], 0
        while count < self.most:
            ids = torch.tensor([[token]], device=self.model.device)
            logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits
            token = int(logits[0, -1].argmax())
            if token != self.text[position + count + 1]:
                break
            count += 1
        self.cache.crop(position - self.cache.get_seq_length())
        return count


def rounds(
    accepted: Callable[[int], int], gammas: list[int], first: int, last: int
) -> dict[int, list[int]]:
    """Accepted drafts of each round of each γ, of those that begin at positions first … last − 1.

    Args:
        accepted: drafts accepted at a position, of as many as the largest γ; asked once for each,
            in rising order.
    """
    here = dict.fromkeys(gammas, first)
    found: dict[int, list[int]] = {gamma: [] for gamma in gammas}
    while (position := min(here.values())) < last:
        count = accepted(position)
        for gamma in gammas:
            if here[gamma] == position:
                found[gamma].append(min(count, gamma))
                here[gamma] += min(count, gamma) + 1
    return found


@torch.inference_mode()
def acceptance(
    model: Any, prompts: list[Tensor], tokens: int, draft: str, verifier: str, gammas: list[int]
) -> dict[int, dict]:
    """By γ: accepted drafts as a part of all and tokens a round, mean and standard error over
    prompts each."""
    kept: dict[int, list[list[int]]] = {gamma: [] for gamma in gammas}
    for ids in prompts:
        first = ids.shape[1]
        text, states = greedy(model, ids.to(model.device), tokens + max(gammas) + 1, verifier)
        drafter = Drafter(
            model, specs_of(model.kv_artifact.specs, draft), text, states, max(gammas)
        )
        for gamma, found in rounds(drafter.accepted, gammas, first, first + tokens).items():
            kept[gamma].append(found)
    rows = {}
    for gamma, prompts_rounds in kept.items():
        share = mean_and_error([sum(x) / (gamma * len(x)) for x in prompts_rounds])
        a_round = mean_and_error([1 + sum(x) / len(x) for x in prompts_rounds])
        rows[gamma] = {"accepted": share, "tokens_a_round": a_round, "rounds": prompts_rounds}
    return rows


def combine(
    found: dict[int, dict], draft_ms: float, verify_ms: dict[int, float]
) -> dict[int, dict]:
    """Tokens a second of each γ, also as multiples of the verifier's and of the drafter's plain
    decoding.

    Args:
        found: as `acceptance` returns it.
        draft_ms: a drafter step of one token.
        verify_ms: a verifier step by its number of tokens, 1 and each γ + 1.
    """
    rows = {}
    for gamma, row in found.items():
        (tokens, error), least = row["tokens_a_round"], min(verify_ms[1], verify_ms[gamma + 1])
        ms = gamma * draft_ms + verify_ms[gamma + 1]
        rows[gamma] = {
            "ms_a_round": ms,
            "tokens_a_second": 1e3 * tokens / ms,
            "over_verifier": tokens * verify_ms[1] / ms,
            "over_verifier_error": error * verify_ms[1] / ms,
            "over_draft": tokens * draft_ms / ms,
            "over_verifier_bound": tokens * verify_ms[1] / (gamma * draft_ms + least),
        }
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown: one table a context."""
    draft = result["draft"]
    lines = []
    for context, times in result["times"].items():
        lines += [
            (
                f"{context} cached tokens. Plain {draft}: {1e3 / times[draft][1]:.1f} tokens/s, "
                f"{result['bytes'][context][draft] / 2**20:.1f} MiB."
            ),
            "",
            "| verifier | γ | accepted | tokens a round | ms: draft step, verify, round "
            "| tokens/s | × verifier | × plain drafter "
            "| MiB | × verifier, were verification one token's step |",
            "|---" * 10 + "|",
        ]
        for verifier, rows in result["speed"][context].items():
            size = result["bytes"][context]
            plain = times[verifier][1]
            over = times[draft][1] / plain
            lines.append(
                f"| {verifier} | plain | | 1 | {plain:.1f} | {1e3 / plain:.1f} "
                f"| 1 | {over:.2f} | {size[verifier] / 2**20:.1f} | |"
            )
            for gamma, row in rows.items():
                share, a_round = (
                    result["acceptance"][verifier][gamma][name]
                    for name in ("accepted", "tokens_a_round")
                )
                lines.append(
                    f"| {verifier} | {gamma} | {share[0]:.3f} ± {share[1]:.3f} | {a_round[0]:.2f} ± {a_round[1]:.2f} "
                    f"| {times[draft][1]:.1f}, {times[verifier][gamma + 1]:.1f}, {row['ms_a_round']:.1f} "
                    f"| {row['tokens_a_second']:.1f} | {row['over_verifier']:.2f} ± {row['over_verifier_error']:.2f} "
                    f"| {row['over_draft']:.2f} "
                    f"| {size[f'{draft} and {verifier}'] / 2**20:.1f} | {row['over_verifier_bound']:.2f} |"
                )
        lines.append("")
    return "\n".join(lines)


def timed_model(
    options: argparse.Namespace, model: Any, device: torch.device
) -> tuple[Any, list[LayerSpec], Geometry]:
    """The model whose steps are timed, its floor and its geometry: the artifact's, or a random one
    of --shape."""
    g = model.kv_artifact.geometry
    if not options.shape:
        return model, model.kv_artifact.specs, g
    timed = build_model(options.shape, device)
    geometry = Geometry(
        timed.config.num_key_value_heads, timed.config.head_dim, g.sinks, g.window, g.page_tokens
    )
    formats = layer_formats(options.format, geometry.head_dim, timed.config.num_hidden_layers)
    return timed, attach_formats(timed, formats, geometry)[0].specs, geometry


def named(option: str, text: str) -> list[str]:
    """Names of caches in an option.

    Raises:
        KvfoldError: one that is none.
    """
    names = [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in CACHES]:
        raise KvfoldError(
            f"--{option} has '{unknown[0]}', which is no cache; choose from {', '.join(CACHES)}."
        )
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=48, help="that are written after each prompt")
    parser.add_argument("--draft", default=FLOOR)
    parser.add_argument("--verifiers", default="16,8")
    parser.add_argument("--gamma", default="1,2,4,8")
    parser.add_argument("--text")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--context", default="8192", help="cached tokens that steps are timed at")
    parser.add_argument(
        "--shape", default="", help="of the random model that is timed instead, e.g. llama3-8b"
    )
    parser.add_argument("--format", default="k2v2", help="floor of that model")
    parser.add_argument(
        "--repeats", type=int, default=5, help="of a timed step; the fastest counts"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    (draft,), verifiers = named("draft", options.draft), named("verifiers", options.verifiers)
    gammas, contexts = (
        [int(part) for part in text.split(",")] for text in (options.gamma, options.context)
    )
    if min(gammas) < 1:
        raise KvfoldError(f"--gamma {min(gammas)} drafts nothing; give numbers of 1 or more.")
    device = pick_device(options.device)
    model: Any = load_pretrained(options.artifact, device=device)
    name, documents = read_documents(options.text, default=(HELD_OUT,))
    tokenizer = tokenizer_from_pretrained(options.artifact)
    prompts = windows_of(
        tokenizer, "\n\n".join(documents), options.prompt, 0, options.prompts, name
    )
    result: dict[str, Any] = {
        "draft": draft,
        "text": name,
        "device": device.type,
        "shape": options.shape,
        "acceptance": {},
    }
    for verifier in verifiers:
        result["acceptance"][verifier] = acceptance(
            model, prompts, options.tokens, draft, verifier, gammas
        )
    timed, floor, geometry = timed_model(options, model, device)
    caches = {cache: specs_of(floor, cache) for cache in dict.fromkeys([draft, *verifiers])}
    result |= {"times": {}, "speed": {}, "bytes": {}}
    for context in contexts:
        lengths = {
            cache: [1, *(gamma + 1 for gamma in gammas if cache in verifiers)] for cache in caches
        }
        times = step_times(timed, caches, geometry, context, lengths, options.repeats)
        result["times"][context] = times
        result["bytes"][context] = bytes_of(caches, geometry, context, draft)
        result["speed"][context] = {
            verifier: combine(result["acceptance"][verifier], times[draft][1], times[verifier])
            for verifier in verifiers
        }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
