"""Conversations that a chat model is probed on: prompts, its own answers, and that the search reads
them."""

import pytest
import torch
from conftest import save_tiny, tiny_model
from test_tasks import tokenizer, written

from kvfold.compress.models.attention_hook import NAME
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import Recipe
from kvfold.compress.search import conversations as module
from kvfold.compress.search.conversations import (
    ANSWER_TOKENS,
    PASSAGE_TOKENS,
    QUESTIONS,
    answer,
    ask,
    write_conversations,
)


def sequences(*lengths):
    return [
        torch.randint(97, 123, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths
    ]


def test_prompts_are_passages_of_all_sequences_with_a_question():
    texts = sequences(500, 400, 100)
    found = [written(ids) for ids in ask(tokenizer(chat=True), texts, 5, seed=3)]
    turns = [
        text.removeprefix("<user>").removesuffix("\n<assistant>").split("\n\n") for text in found
    ]
    assert all(text.startswith("<user>") and text.endswith("\n<assistant>") for text in found)
    for i, parts in enumerate(turns):
        (question,) = set(parts) & set(QUESTIONS)
        (passage,) = set(parts) - {question}
        source = written(texts[i % 3][0].tolist())
        assert (
            question == QUESTIONS[i]
            and passage in source
            and len(passage) == min(PASSAGE_TOKENS, len(source))
        )
    assert {parts[0] in QUESTIONS for parts in turns} == {True, False}  # before and after
    assert ask(tokenizer(chat=True), texts, 5, seed=3) == ask(
        tokenizer(chat=True), texts, 5, seed=3
    )
    assert ask(tokenizer(chat=True), texts, 5, seed=4) != ask(
        tokenizer(chat=True), texts, 5, seed=3
    )


def test_without_a_template_that_takes_a_question_there_are_none(capsys):
    assert ask(tokenizer(), sequences(400), 4, 0) == []
    strict = tokenizer(chat=True)
    strict.chat_template = "{{ raise_exception('a system prompt is needed') }}"
    assert ask(strict, sequences(400), 4, 0) == []
    assert "a system prompt is needed" in capsys.readouterr().err


@pytest.fixture(scope="module", params=["qwen2", "gemma2"])
def model(request):
    made = tiny_model(request.param)
    made.set_attn_implementation(NAME)
    return made


@torch.no_grad()
def test_answers_are_the_models_own_greedy_ones(model, monkeypatch):
    monkeypatch.setattr(module, "ANSWER_TOKENS", 12)
    prompts = [ids[0].tolist() for ids in sequences(40, 23, 31)]
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    free = answer(model, prompts)
    for prompt, found in zip(prompts, free, strict=True):
        ids = prompt + found
        greedy = model(torch.tensor([ids[:-1]])).logits[0, len(prompt) - 1 :].argmax(-1)
        assert len(found) == 12 and found == greedy.tolist()
    end = free[0][4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    for before, after in zip(free, answer(model, prompts), strict=True):
        assert after == (before[: before.index(end) + 1] if end in before else before)


def test_a_resumed_run_reads_the_same_conversations(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    texts = sequences(300, 260)
    first = write_conversations(model, tokenizer(chat=True), texts, 3, 1024, 0, tmp_path)
    again = write_conversations(None, None, [], 0, 0, 0, tmp_path)
    assert len(first) == 3
    for (ids, prompt), (other, start) in zip(first, again, strict=True):
        assert (
            torch.equal(ids, other) and prompt == start and ids.shape == (1, prompt + ANSWER_TOKENS)
        )


def test_short_answers_and_long_prompts_are_left_out(model, tmp_path, monkeypatch):
    texts = sequences(300, 260)
    assert write_conversations(model, tokenizer(chat=True), texts, 3, 300, 0, tmp_path) == []
    monkeypatch.setattr(module, "answer", lambda model, prompts: [[65] * n for n in (15, 16, 17)])
    found = write_conversations(model, tokenizer(chat=True), texts, 3, 1024, 0, tmp_path)
    assert [ids.shape[1] - prompt for ids, prompt in found] == [16, 17]


def test_the_search_probes_them(tmp_path, text_file):
    """The same model and text, with a chat template and without: other losses. And all the same
    with none asked for."""
    recipe = Recipe.model_validate(
        {
            "window": 24,
            "page_tokens": 8,
            "sinks": 3,
            "calibration": {"num_sequences": 2, "seq_len": 256, "sample_tokens": 128},
            "sensitivity": {"num_sequences": 1, "seq_len": 192, "conversations": 2},
        }
    )
    none = recipe.model_copy(
        update={"sensitivity": recipe.sensitivity.model_copy(update={"conversations": 0})}
    )
    source = save_tiny(tmp_path / "model")

    def losses(name, recipe):
        made = compress(
            str(source), "4.0", tmp_path / name, calib=str(text_file), recipe=recipe
        ).metadata
        return [(layer.key.predicted_loss, layer.value.predicted_loss) for layer in made.layers]

    plain = losses("plain", recipe)
    tokenizer(chat=True).save_pretrained(source)
    chat = losses("chat", recipe)
    assert losses("without", none) == plain and chat != plain
    assert all(loss > 0 for layer in chat for loss in layer)
