"""Key-value retrieval (Liu et al. 2023, arXiv 2307.03172): one value asked for out of a JSON object
of random UUIDs."""

import json
import random
import re
import uuid

from kvfold.compress.tasks.needle import grid
from kvfold.compress.tasks.task import Judgement, Prompt, Setting, Task, ask_ids
from kvfold.errors import KvfoldError

LEAD = "Extract the value of the given key from this JSON object."
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def make_uuid(rng: random.Random) -> str:
    """A random UUID of version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def encode(setting: Setting, pairs: list[tuple[str, str]], key: str) -> list[int]:
    """Tokens of the object, one pair a line, and the question."""
    return ask_ids(
        setting.tokenizer,
        f"{LEAD}\n\n{json.dumps(dict(pairs), indent=0)}",
        f'What is the value of the key "{key}"? Answer with the value alone.',
    )


def prompts(setting: Setting) -> list[Prompt]:
    """Seeded cases: as many pairs as fit, the one asked for at the given depth of them."""
    made = []
    for i, length, depth, rng in grid(setting, TASK.max_new_tokens):
        pairs = [
            (make_uuid(rng), make_uuid(rng)) for _ in range(length // 36 + 2)
        ]  # two UUIDs are never fewer tokens
        sample = min(12, len(pairs))
        least, more = (len(encode(setting, pairs[:n], pairs[0][0])) for n in (2, sample))
        count = min(
            len(pairs), 2 + int((length - least) * (sample - 2) / (more - least)) + 2
        )  # then down to what fits
        while count >= 2:
            asked = min(int(depth * count), count - 1)
            ids = encode(setting, pairs[:count], pairs[asked][0])
            if len(ids) <= length:
                break
            count -= 1
        if count < 2:
            raise KvfoldError(
                f"A prompt of {length} tokens has no room for two pairs; give a larger --context."
            )
        facts = {
            "length": length,
            "depth": depth,
            "pairs": count,
            "key": pairs[asked][0],
            "value": pairs[asked][1],
        }
        made.append(Prompt(f"retrieval/{i}", ids, facts))
    return made


def judge(prompt: Prompt, text: str) -> Judgement:
    """Right if the first UUID is the value; the key, which an answer may repeat, doesn't count."""
    answer = next(
        (found for found in UUID.findall(text.lower()) if found != prompt.facts["key"]), ""
    )
    return Judgement(answer, answer == prompt.facts["value"])


TASK = Task(max_new_tokens=96, prompts=prompts, judge=judge, stops=("\nQuestion:",))
