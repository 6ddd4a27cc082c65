"""What a task is, and how its prompts become tokens."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

DRAW = "#"  # between a question's id and the number of an answer drawn for it


@dataclass(frozen=True)
class Setting:
    """What prompts are made from.

    Attributes:
        tokenizer: the artifact's.
        context: tokens that prompt and answer together may take.
        limit: prompts at the most; None for all that the task has.
        data: where a task with data of its own reads it: file, folder or datasets id; None for its
            default id.
        haystack: text that long prompts are filled with.
        seed: of everything random.
    """

    tokenizer: Any
    context: int
    limit: int | None = None
    data: str | None = None
    haystack: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        id: stable from run to run.
        ids: tokens of the whole prompt.
        facts: plain data that the answer is judged by.
    """

    id: str
    ids: list[int]
    facts: dict[str, Any] = field(default_factory=dict)

    def draws(self, count: int) -> "list[Prompt]":
        """The same question `count` times, told apart by their ids."""
        return (
            [self]
            if count == 1
            else [replace(self, id=f"{self.id}{DRAW}{i}") for i in range(count)]
        )

    @property
    def sha256(self) -> str:
        """Of the tokens and the facts: equal exactly if the question is."""
        return hashlib.sha256(
            json.dumps([self.ids, self.facts], sort_keys=True).encode()
        ).hexdigest()


@dataclass(frozen=True)
class Judgement:
    """What was made of a continuation: the answer found in it, in words, and whether it is
    right."""

    answer: str
    correct: bool


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        max_new_tokens: after which a continuation is cut off.
        prompts: makes the questions, in an order of which any beginning is a fair sample.
        judge: of (prompt, continuation up to the first stop).
        stops: texts that end a continuation; they are not part of it.
        has_data: reads a dataset, so --task-data concerns it.
        runs_code: executes what the model writes.
    """

    max_new_tokens: int
    prompts: Callable[[Setting], list[Prompt]]
    judge: Callable[[Prompt, str], Judgement]
    stops: tuple[str, ...] = ()
    has_data: bool = False
    runs_code: bool = False


def chat_ids(
    tokenizer: Any, turns: Sequence[tuple[str, str]], user: str, answer: str = ""
) -> list[int]:
    """Tokens of a conversation that the model is to continue.

    Args:
        tokenizer: with a chat template.
        turns: (user, assistant) turns before.
        user: the last user turn.
        answer: how the model's own turn begins already.
    """
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": user}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text + answer, add_special_tokens=False, verbose=False).input_ids)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text to continue, for models without a chat template; a BOS token comes first if
    the tokenizer adds one."""
    return list(tokenizer(text, verbose=False).input_ids)


def ask_ids(tokenizer: Any, document: str, question: str) -> list[int]:
    """Tokens of a question after a document: one user turn, or plain text that ends in
    "Answer:"."""
    if tokenizer.chat_template:
        return chat_ids(tokenizer, (), f"{document}\n\n{question}")
    return plain_ids(tokenizer, f"{document}\n\nQuestion: {question}\nAnswer:")


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
