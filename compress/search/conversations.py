"""Conversations that a chat model is probed on: questions about passages of the calibration text,
and its own answers.

What a model writes in answer to a question hangs on a few of the question's words, which stand in
pages by then, and on other layers than plain text does, whose next words follow mostly from the
last ones (benchmarks/LOG.md). So a model whose tokenizer has a chat template is probed on both; the
answers are its own, greedy and unquantised, and only they count.
"""

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from kvfold.compress.progress import stage
from kvfold.compress.work import keep, kept

# with a template's some 30, sinks and the window that is probed, a third of a prompt is in pages
PASSAGE_TOKENS = 288
ANSWER_TOKENS = 96
LEAST_TOKENS = 16  # of an answer that says anything
QUESTIONS = (
    "Explain this step by step.",
    "Write Python code that does what is described here, or that works with what is listed here.",
    "Summarise this in a few sentences.",
    "List everything that is named here, and what is said of it.",
    "What follows from this? Give your reasons.",
    "Rewrite this more clearly.",
    "Write a similar example, then work it out.",
    "Which part of this is the most important one, and why?",
)


def ask(tokenizer: Any, sequences: list[Tensor], count: int, seed: int) -> list[list[int]]:
    """Token ids of `count` prompts, one user turn each: a passage of the sequences in turn, and a
    question before or after it.

    Args:
        tokenizer: with or without a chat template; [] without.
        sequences: int64 [1, T].
    """
    if not tokenizer.chat_template:
        return []
    rng = random.Random(seed)
    prompts = []
    for i in range(count):
        ids = sequences[i % len(sequences)][0]
        start = rng.randrange(max(1, len(ids) - PASSAGE_TOKENS))
        passage = tokenizer.decode(
            ids[start : start + PASSAGE_TOKENS], skip_special_tokens=True
        ).strip()
        turn = [QUESTIONS[i % len(QUESTIONS)], passage]
        if rng.random() < 0.5:
            turn.reverse()
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "\n\n".join(turn)}],
                add_generation_prompt=True,
                tokenize=False,
            )
        except (
            Exception
        ) as error:  # a template is a program: it may divide by zero, or ask for what isn't there
            stage(
                f"the chat template refuses a single user turn ({error}): probing plain text alone"
            )
            return []
        prompts.append(list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids))
    return prompts


@torch.inference_mode()
def answer(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The model's greedy answers, token ids with the one that ends them, ANSWER_TOKENS at the
    most."""
    ends = model.generation_config.eos_token_id
    ends = sorted({i for i in (ends if isinstance(ends, list) else [ends]) if i is not None})
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    # the model's own generation config may ask for sampling or a repetition penalty
    config = GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=ANSWER_TOKENS,
        eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
    )  # fmt: skip
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
    )
    found = []
    for row in out[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        found.append(row[:end])
    return found


def write_conversations(
    model: Any,
    tokenizer: Any,
    sequences: list[Tensor],
    count: int,
    most: int,
    seed: int,
    work: Path,
) -> list[tuple[Tensor, int]]:
    """Prompts with answers.

    Args:
        model: unquantised, on its device.
        sequences: int64 [1, T], what passages are taken from.
        count: how many; answers of a few tokens are left out.
        most: tokens of a conversation at the most, the model's maximum.
        work: folder that keeps what was written, for a run that is resumed.
    Returns:
        (int64 [1, T], tokens of the prompt) each; [] where the tokenizer has no chat template.
    """
    path = work / "conversations.safetensors"
    if (written := kept(path, _read)) is not None:
        return written
    prompts = [p for p in ask(tokenizer, sequences, count, seed) if len(p) + ANSWER_TOKENS <= most]
    if not prompts:
        return []
    stage(f"writing {len(prompts)} answers to be probed on")
    answers = answer(model, prompts)
    found = [
        (torch.tensor([p + a]), len(p))
        for p, a in zip(prompts, answers, strict=True)
        if len(a) >= LEAST_TOKENS
    ]
    if found:
        tensors = {
            name: tensor
            for i, (ids, start) in enumerate(found)
            for name, tensor in ((f"{i}.ids", ids), (f"{i}.prompt", torch.tensor(start)))
        }
        keep(path, lambda scratch: save_file(tensors, scratch))
    return found


def _read(path: Path) -> list[tuple[Tensor, int]]:
    stored = load_file(path)
    return [(stored[f"{i}.ids"], int(stored[f"{i}.prompt"])) for i in range(len(stored) // 2)]
