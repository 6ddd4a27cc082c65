"""A needle in a haystack: one sentence with a number, at a given depth of a long text, asked for at
its end."""

import random
import re
from functools import cache
from itertools import accumulate

from kvfold.compress.tasks.task import Judgement, Prompt, Setting, Task, ask_ids
from kvfold.errors import KvfoldError

COUNT = 100  # prompts without a limit
# The last fifth is left out: at the shorter lengths it would lie in the 16-bit window.
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8)
LEAST = 256  # tokens of the shortest prompt
CITIES = (
    "Amsterdam", "Bogota", "Cairo", "Dakar", "Edinburgh", "Florence", "Geneva", "Hanoi", "Istanbul", "Jakarta", "Kyoto",
    "Lisbon", "Marseille", "Nairobi", "Oslo", "Prague", "Quito", "Riga", "Seville", "Tunis", "Utrecht", "Vienna",
    "Warsaw", "Zagreb",
)  # fmt: skip
LEAD = "Remember the number that is hidden in this text."


def grid(
    setting: Setting, new_tokens: int, count: int = COUNT
) -> list[tuple[int, int, float, random.Random]]:
    """Cases as (index, tokens of the prompt at the most, depth, generator of its own), lengths and
    depths in turn.

    Lengths are the context less the answer, its half, quarter and eighth. Up to four of them and
    five depths share no factor, so twenty cases have every pair, and any limit leaves a mix; a case
    does not depend on the limit.

    Raises:
        KvfoldError: the context is too short for the shortest prompt.
    """
    lengths = [
        n for n in ((setting.context - new_tokens) >> shift for shift in range(4)) if n >= LEAST
    ]
    if not lengths:
        raise KvfoldError(
            f"A context of {setting.context} is too short for long prompts; give {LEAST + new_tokens} or more."
        )
    return [
        (
            i,
            lengths[i % len(lengths)],
            DEPTHS[i % len(DEPTHS)],
            random.Random(f"{setting.seed}/{i}"),
        )
        for i in range(count if setting.limit is None else setting.limit)
    ]


def sentences(text: str) -> list[str]:
    """A text cut behind full stops, question and exclamation marks; what has digits, a question's
    label or no end is left out, so that the needle is the only number and the only question is the
    last one."""
    pieces = (" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+|\n\n+", text))
    return [
        s
        for s in pieces
        if re.fullmatch(r"[A-Z][^\d{}=_]*[.!?]", s) and not re.search(r"Question:|Answer", s)
    ]


def insert(hay: list[str], sizes: list[int], needle: str, depth: float) -> str:
    """The sentences joined by blanks, the needle before the first one that begins at or after depth
    · sum(sizes)."""
    starts = [0, *accumulate(sizes)]
    at = next(i for i, start in enumerate(starts) if start >= depth * starts[-1])
    return " ".join([*hay[:at], needle, *hay[at:]])


def prompts(setting: Setting) -> list[Prompt]:
    """Seeded cases; the haystack begins anywhere in its text and goes round."""
    pieces = sentences(setting.haystack)
    if not pieces:
        raise KvfoldError("The haystack is empty; give --text a text with sentences.")

    @cache
    def size(i: int) -> int:
        return len(
            setting.tokenizer(" " + pieces[i], add_special_tokens=False, verbose=False).input_ids
        )

    made = []
    for i, length, depth, rng in grid(setting, TASK.max_new_tokens):
        city, number = rng.choice(CITIES), str(rng.randrange(1_000_000, 10_000_000))
        needle = f"The secret number of {city} is {number}."
        question = f"What is the secret number of {city}? Answer with the number alone."
        frame = len(ask_ids(setting.tokenizer, f"{LEAD}\n\n{needle}", question))
        sizes: list[int] = []
        at = first = rng.randrange(len(pieces))
        used = frame
        while used + size(at) <= length:
            sizes.append(size(at))
            used += size(at)
            at = (at + 1) % len(pieces)
        hay = [pieces[(first + k) % len(pieces)] for k in range(len(sizes))]
        ids = []
        while hay:  # the seams may take a few tokens more
            ids = ask_ids(
                setting.tokenizer, f"{LEAD}\n\n{insert(hay, sizes, needle, depth)}", question
            )
            if len(ids) <= length:
                break
            hay, sizes = hay[:-1], sizes[:-1]
        if not hay:
            raise KvfoldError(
                f"A prompt of {length} tokens has no room for needle and text; give a larger --context."
            )
        made.append(
            Prompt(f"needle/{i}", ids, {"length": length, "depth": depth, "number": number})
        )
    return made


def judge(prompt: Prompt, text: str) -> Judgement:
    """Right if the first number of seven digits is the needle's."""
    found = re.search(r"\d{7,}", re.sub(r"(?<=\d),(?=\d)", "", text))
    answer = found.group() if found else ""
    return Judgement(answer, answer == prompt.facts["number"])


TASK = Task(max_new_tokens=32, prompts=prompts, judge=judge, stops=("\nQuestion:",))
