"""Which pages should keep more bits: loss of a continuation at equal bytes, with pages lowered by
what queries attend to, by age, or all alike.

usage: python benchmarks/salience.py FLOOR UNIFORM [--task text] [--prompt 2048] [--new 512] [--samples 6] [--late]
                                     [--fine] [--rows NAME,…] [--text FILE|DATASET] [--task-data FOLDER] [--queries 64]
                                     [--out artifacts/salience]

FLOOR and UNIFORM are artifacts of one model and one geometry, UNIFORM with more bits. A prompt is
read with pages in 16 bits; then, and before each chunk of the continuation, pages go down FLOOR's
ladder (16, 8, 4 bits, floor) until they take no more bytes than as many of UNIFORM's pages, with
4 bytes a page for an order and the ladder's own tables. KL is to a 16-bit cache, in nats per token
of the continuation, teacher-forced through packed pages in plain torch. Rows:

    uniform        UNIFORM's pages, all on its floor
    age            the progressive policy's order: its layers' harm, then the oldest page
    mass           a step's harm times the page's part of its layer's attention weights
    squares        the same with squared weights: independent errors of tokens add up so
    root           the same with the square root of that part
    monotone       as squares, but a layer's older pages never have more bits than its younger
    monotone root  both
    shuffled       as root, but the parts are given to pages of the layer by lot
    decoding       as squares, with the weights of the chunks since
    drop           as squares; a page may also go altogether, at the harm of 0 bits
    oracle         squares of the continuation's own queries, from a 16-bit cache

Weights are those of the last `queries` queries of the prompt, over all heads; pages after it have
the mean of the last four before its window. Tasks: "text" (windows of a text), "needle" and
"retrieval" (kvfold eval's; the continuation is the right answer, `right` says that all of its
tokens are the likeliest), "code" (HumanEval's problems with their solutions, the last solution is
the continuation). --late ends the prompt of needle and retrieval before the question. --fine has a
rung more, the floor's classes with a bit more each: the policy's next one above a low floor, 4 bits
in all channels, takes several times its bytes.

Prints Markdown with standard errors over samples, differences paired; run again with the same
options and more samples, it goes on where it stopped.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from page_orders import PAGE_ENTRY, Ordered, Watched, fine_ladder
from torch import Tensor
from transformers import DynamicCache

import kvfold.runtime.budget.ladder
from kvfold.compress.bench.runs import Rows, mean_and_error
from kvfold.compress.evaluate import windows_of
from kvfold.compress.models import quiet_transformers
from kvfold.compress.tasks import TASKS
from kvfold.compress.tasks.data import read_rows
from kvfold.compress.tasks.humaneval import FIELDS, FILES
from kvfold.compress.tasks.task import Setting, plain_ids
from kvfold.compress.text import read_documents
from kvfold.exports.architectures import logits_of
from kvfold.exports.spec import LayerSpec
from kvfold.kernels.attention import packed_tokens
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.load import load_pretrained, plain_cache, progressive_policy

SCORED = ("mass", "squares", "root", "monotone", "monotone root", "shuffled", "decoding", "drop")
ROWS = ("uniform", "age", *SCORED, "oracle")
RUNGS = ("floor", "finer", "4", "8", "16", "gone")
PLENTY = 1 << 40
DECAY = 0.5  # of earlier chunks' weights, "decoding"


def cases(task: str, options: argparse.Namespace, tokenizer: Any) -> list[tuple[Tensor, int, int]]:
    """(ids int64 [1, T] of prompt and continuation, tokens of the prompt, first token that counts)
    of each sample."""
    if task == "text":
        name, documents = read_documents(options.text)
        size = options.prompt + options.new
        ids = windows_of(tokenizer, "\n\n".join(documents), size, 0, options.samples, name)
        return [(x, options.prompt, options.prompt) for x in ids]
    if task == "code":
        rows = list(read_rows(options.task_data, FILES, (*FIELDS, "canonical_solution"), None))
        found = []
        for i in range(options.samples):
            shots = rows[i * 8 : i * 8 + 8]
            before = "\n\n".join(r["prompt"] + r["canonical_solution"] for r in shots[:-1])
            start = plain_ids(tokenizer, f"{before}\n\n{shots[-1]['prompt'].rstrip()}\n")
            end = tokenizer(shots[-1]["canonical_solution"], add_special_tokens=False).input_ids
            found.append((torch.tensor([start + end]), len(start), len(start)))
        return found
    haystack = "\n\n".join(read_documents(options.text)[1])
    found = []
    # up to four lengths in turn, of which the longest counts here
    setting = Setting(tokenizer, options.prompt, 4 * options.samples, None, haystack, 0)
    made = TASKS[task].prompts(setting)
    most = max(prompt.facts["length"] for prompt in made)
    for prompt in [x for x in made if x.facts["length"] == most][: options.samples]:
        answer = prompt.facts.get("value") or prompt.facts["number"]
        end = tokenizer(answer, add_special_tokens=False).input_ids
        start = len(prompt.ids)
        if options.late:  # the question, which no query of the prompt has seen
            asked = tokenizer.decode(prompt.ids).rindex("What is the")
            start = len(
                tokenizer(tokenizer.decode(prompt.ids)[:asked], add_special_tokens=False).input_ids
            )
        found.append((torch.tensor([prompt.ids + end]), start, len(prompt.ids)))
    return found


def forward(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Hidden states [T, hidden_size]."""
    return model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[
        0
    ]


def relative(seen: dict[int, Tensor], which: int, packed: int) -> list[Tensor]:
    """Scores of pages relative to their layer's mean; pages that were in the window, which queries
    lean on because they are near, have the mean of the four before."""
    found = []
    for i in sorted(seen):
        score = seen[i][which].clone()
        score[packed:] = score[max(0, packed - 4) : packed].mean()
        found.append(score / score.mean().clamp_min(1e-30))
    return found


def name_of(rung: LayerSpec, floor: LayerSpec) -> str:
    """Of RUNGS: the floor, one of a bit more, or bits of all channels."""
    if rung is floor:
        return "floor"
    fmt = rung.key.format
    if fmt.raw:
        return "16"
    levels = {levels for _, levels in fmt.classes}
    return {frozenset({16}): "4", frozenset({256}): "8"}.get(frozenset(levels), "finer")


class Side:
    """One artifact, its prompt read with pages in 16 bits, and what its queries attended to."""

    def __init__(self, path: Path) -> None:
        self.model: Any = load_pretrained(path, device="cpu", attention="reference")
        self.artifact = self.model.kv_artifact

    def read(self, ids: Tensor, start: int, queries: int) -> None:
        """The first `start` tokens of ids [1, T]; what follows is kept for the oracle."""
        self.watched, self.ids, self.start = Watched(), ids, start
        self.cache = QuantizedKVCache(
            self.artifact.specs, self.artifact.geometry, PLENTY, self.watched,
            progressive_policy(self.artifact),
        )  # fmt: skip
        policy = Ordered(PLENTY, self.cache.policy.ladders)
        layers = self.artifact.metadata.layers
        policy.losses = [(x.key.predicted_loss, x.value.predicted_loss) for x in layers]
        policy.known = {}
        policy.prompt_pages = self.artifact.geometry.num_pages(start)
        self.cache.policy = policy
        self.watched.queries = queries
        self.first = forward(self.model, ids[:, :start], self.cache)[-1:]
        self.seen, self.watched.queries = dict(self.watched.seen), 0

    def oracle(self) -> dict[int, Tensor]:
        """What the continuation's own queries attend to, from pages in 16 bits."""
        cache = copy.deepcopy(self.cache)
        self.watched.queries = self.ids.shape[1] - self.start
        forward(self.model, self.ids[:, self.start :], cache)
        self.watched.queries = 0
        return dict(self.watched.seen)

    def go_on(
        self, order: str, scores: list[Tensor], limit: tuple[float, float], chunk: int
    ) -> tuple[Tensor, float, dict[str, int]]:
        """The continuation with pages in an order.

        Returns:
            log-probabilities [T − start, vocab_size]; bytes of pages at the end; pages by RUNGS.
        """
        cache, g = copy.deepcopy(self.cache), self.artifact.geometry
        policy = cache.policy
        policy.order, policy.scores = order, scores
        policy.page_nbytes, policy.fixed_nbytes = limit
        self.watched.hidden, self.watched.seen = {}, {}
        self.watched.queries = chunk if order == "decoding" else 0
        seen, hidden = {i: x.clone() for i, x in self.seen.items()}, [self.first]
        for begin in range(self.start, self.ids.shape[1] - 1, chunk):
            part = self.ids[:, begin : min(begin + chunk, self.ids.shape[1] - 1)]
            hidden.append(forward(self.model, part, cache))
            if order == "decoding":
                for i, new in self.watched.seen.items():
                    old = torch.nn.functional.pad(seen[i], (0, new.shape[1] - seen[i].shape[1]))
                    seen[i] = DECAY * old + new
                packed = packed_tokens(cache.get_seq_length(), g.sinks, g.window, g.page_tokens)
                policy.scores = relative(seen, 1, packed // g.page_tokens)
        self.watched.queries = 0
        counts = dict.fromkeys(RUNGS, 0)
        for i, layer in enumerate(cache.layers):
            for rung, count in zip(layer.rungs, layer.table.pool.counts, strict=True):
                counts[name_of(rung, layer.rungs[0])] += count
            gone = len(self.watched.hidden.get(i, ()))
            counts["floor"] -= gone
            counts["gone"] += gone
        self.watched.hidden = {}
        logits = logits_of(self.model, torch.cat(hidden)).float().log_softmax(-1)
        return logits, policy.nbytes_now, counts


@torch.inference_mode()
def sample(
    sides: dict[str, Side], ids: Tensor, start: int, first: int, options: argparse.Namespace
) -> dict[str, Any]:
    """KL, loss and `right` of each row, of the tokens from `first` on."""
    wanted = options.rows.split(",")
    floor, uniform = sides["floor"], sides["uniform"]
    with plain_cache(floor.model):
        cache = DynamicCache(config=floor.model.config)
        true = forward(floor.model, ids[:, :-1], cache)[first - 1 :]
    true = logits_of(floor.model, true).float().log_softmax(-1)
    targets, g = ids[0, first:, None], floor.artifact.geometry
    page = sum(s[0] for s in progressive_policy(uniform.artifact).sizes)
    found: dict[str, Any] = {"16 bits": figures(true, true, targets)}
    floor.read(ids, start, options.queries)
    if "uniform" in wanted:
        uniform.read(ids, start, 0)
    packed = g.num_pages(start)
    for name in wanted:
        side, fixed = (
            floor,
            sum(g.segments_nbytes(len(s)) for s in floor.cache.policy.ladders.sizes),
        )
        scores = relative(floor.seen, 0 if name == "mass" else 1, packed)
        ratio = [x[2, :packed].sum() / x[1, :packed].sum() for _, x in sorted(floor.seen.items())]
        lost = relative(floor.seen, 2, packed)
        floor.cache.policy.lost = [(x * n).tolist() for x, n in zip(lost, ratio, strict=True)]
        if name in ("root", "monotone root", "shuffled"):
            scores = [x.sqrt() / x.sqrt().mean() for x in scores]
        if name == "shuffled":
            drawn = torch.Generator().manual_seed(0)
            scores = [x[torch.randperm(len(x), generator=drawn)] for x in scores]
        if name == "oracle":
            scores = relative(floor.oracle(), 1, g.num_pages(ids.shape[1]))
        if name == "uniform":
            side, fixed = uniform, 0
        entries = PAGE_ENTRY * len(side.cache.layers) if name == "uniform" else 0
        ours, nbytes, counts = side.go_on(name, scores, (page + entries, fixed), options.chunk)
        found[name] = figures(ours[first - start :], true, targets) | {
            "nbytes": nbytes,
            "pages": counts,
        }
    return found


def figures(ours: Tensor, true: Tensor, targets: Tensor) -> dict[str, float]:
    """Of log-probabilities [T, vocab_size]: KL to `true`, loss and whether all targets [T, 1] are
    the likeliest."""
    return {
        "kl": float((true.exp() * (true - ours)).sum(-1).mean()),
        "nll": float(-ours.gather(1, targets).mean()),
        "right": float((ours.argmax(-1) == targets[:, 0]).all()),
    }


def table(rows: dict[str, dict[str, Any]], wanted: list[str]) -> str:
    """Markdown; differences are paired by sample."""
    lines = [
        "| row | KL | − uniform's | − age's | loss | right | page bytes | pages: floor, finer, 4, 8, 16 bits, gone |",
        "|---" * 8 + "|",
    ]
    for name in ["16 bits", *wanted]:
        each = [row[name] for row in rows.values()]
        cells = [f"{name} | {cell([x['kl'] for x in each])}"]
        for other in ("uniform", "age"):
            if other in wanted and name not in ("16 bits", other):
                rest = [row[name]["kl"] - row[other]["kl"] for row in rows.values()]
                cells.append(cell(rest, "+"))
            else:
                cells.append("")
        cells += [
            cell([x["nll"] for x in each]),
            f"{sum(x['right'] for x in each):.0f} / {len(each)}",
        ]
        cells.append(f"{sum(x.get('nbytes', 0) for x in each) / len(each):.0f}")
        pages = [x.get("pages", {}) for x in each]
        cells.append(", ".join(str(sum(x.get(rung, 0) for x in pages)) for rung in RUNGS))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: list[float], sign: str = "") -> str:
    mean, error = mean_and_error(values) if len(values) > 1 else (values[0], 0.0)
    return f"{mean:{sign}.4f} ± {error:.4f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("floor", type=Path)
    parser.add_argument("uniform", type=Path)
    parser.add_argument("--task", default="text", choices=["text", "needle", "retrieval", "code"])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--late", action="store_true")
    parser.add_argument("--fine", action="store_true")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--text", default="Salesforce/wikitext:wikitext-2-raw-v1:test")
    parser.add_argument("--task-data")
    parser.add_argument("--out", type=Path, default=Path("artifacts/salience"))
    options = parser.parse_args()
    quiet_transformers()
    torch.set_flush_denormal(True)  # masked softmax is several times slower with denormals on a CPU
    wanted = options.rows.split(",")
    if options.fine:
        kvfold.runtime.budget.ladder.ladder = fine_ladder
    sides = {
        name: Side(path) for name, path in (("floor", options.floor), ("uniform", options.uniform))
    }
    tokenizer = tokenizer_from_pretrained(options.floor)
    kept = {k: str(v) for k, v in vars(options).items() if k not in ("samples", "out")}
    stem = f"{options.floor.name}-{options.task}{'-late' if options.late else ''}{'-fine' if options.fine else ''}.json"
    done = Rows(options.out / stem, kept)
    for i, (ids, start, first) in enumerate(cases(options.task, options, tokenizer)):
        if f"{i}" not in done:
            begun = time.monotonic()
            done.add(f"{i}", sample(sides, ids, start, first, options))
            print(
                f"sample {i}: {start} + {ids.shape[1] - start} tokens, {time.monotonic() - begun:.0f} s",
                flush=True,
            )
    print(table(done.rows, wanted))


if __name__ == "__main__":
    main()
