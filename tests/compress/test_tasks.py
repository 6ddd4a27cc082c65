"""Tasks by generation: what is asked, how answers are read and judged, pairing, resumption,
refusals."""

import gzip
import importlib.util
import json
import re
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from conftest import char_tokenizer, tiny_model
from tokenizers import decoders

from kvfold import KvfoldError, runtime
from kvfold.autoclass import stock_from_pretrained
from kvfold.compress.cli import main
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.compress.tasks import TASKS, gsm8k, humaneval, needle, retrieval
from kvfold.compress.tasks.data import read_rows
from kvfold.compress.tasks.generator import BATCH_TOKENS, PairedGenerator, batches_of
from kvfold.compress.tasks.mcnemar import compare, compare_draws
from kvfold.compress.tasks.options import check_options, parse_tasks
from kvfold.compress.tasks.report import packed_share
from kvfold.compress.tasks.run import run_tasks
from kvfold.compress.tasks.samples import Samples
from kvfold.compress.tasks.task import DRAW, Judgement, Prompt, Setting, Task, ask_ids, cut_at
from kvfold.compress.text import HELD_OUT, data_text
from kvfold.exports.account import Geometry

RECIPE = """
window: 24
page_tokens: 16
sinks: 3
calibration: {num_sequences: 2, seq_len: 256, sample_tokens: 128}
sensitivity: {num_sequences: 1, seq_len: 192}
"""
ROOT = Path(__file__).resolve().parents[2]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = data_text(HELD_OUT)


def tokenizer(chat: bool = False):
    """One token a character, and back."""
    made = char_tokenizer()
    made.backend_tokenizer.decoder = decoders.Fuse()
    made.chat_template = CHAT if chat else None
    return made


def written(ids: list[int]) -> str:
    return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, text_file) -> Path:
    """An artifact of a tiny Qwen2 at few bits, so that the two caches part ways; its context is
    2048 tokens."""
    folder = tmp_path_factory.mktemp("tasks")
    tiny_model("qwen2", torch.bfloat16).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(folder / "recipe.yaml")
    compress(str(folder / "model"), "3.0", folder / "tiny", calib=str(text_file), recipe=recipe)
    return folder / "tiny"


@pytest.fixture(scope="module")
def model(artifact):
    return runtime.load_pretrained(artifact, device="cpu")


# -- pieces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7. The answer is 7.", "7"),
        ("The answer is $1,234.50.", "1234.50"),
        ("He has 10-3 left", "3"),
        ("x = -7", "-7"),
        ("it fell to -$12,000", "-12000"),
        ("1,2,3", "3"),
        ("a share of .5", ".5"),
        ("12,3456", "3456"),
        ("18%", "18"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number(text, number):
    assert gsm8k.last_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_is_right_if_the_numbers_are_equal():
    prompt = Prompt("gsm8k/0", [1], {"gold": "18"})
    assert gsm8k.judge(prompt, "3 * 6 = 18. The answer is 18.00") == Judgement("18.00", True)
    assert gsm8k.judge(prompt, "The answer is 180") == Judgement("180", False)
    assert gsm8k.judge(prompt, "I don't know") == Judgement("", False)


def test_the_worked_examples_are_right():
    for question, answer in gsm8k.EXAMPLES:
        sums = re.findall(r"(\d[\d +*/-]*) = (\d+)", answer)
        assert len(sums) >= 2 and all(eval(left) == int(right) for left, right in sums), question
        assert answer.endswith(f"The answer is {sums[-1][1]}.")


def test_cut_at_the_first_stop():
    assert cut_at("a\nQ: b\n\nc", ("\n\n", "\nQ:")) == "a"
    assert cut_at("abc", ("x",)) == "abc" == cut_at("abc", ())


@pytest.mark.parametrize(
    ("pairs", "lost", "gained", "p"),
    [
        ([(1, 1)] * 7 + [(0, 0)] * 2, 0, 0, 1.0),
        ([(1, 0)], 1, 0, 1.0),
        ([(1, 0)] * 5, 5, 0, 2 / 2**5),
        ([(1, 0)] * 1 + [(0, 1)] * 5 + [(1, 1)] * 3, 1, 5, 2 * (1 + 6) / 2**6),
        ([(1, 0)] * 8 + [(0, 1)] * 2, 8, 2, 2 * (1 + 10 + 45) / 2**10),
        ([(1, 0)] * 4 + [(0, 1)] * 4, 4, 4, 1.0),
    ],
)
def test_mcnemar_by_hand(pairs, lost, gained, p):
    found = compare([bool(a) for a, _ in pairs], [bool(b) for _, b in pairs])
    assert (found.n, found.lost, found.gained) == (len(pairs), lost, gained)
    assert found.p == pytest.approx(p, abs=1e-12)
    assert found.points == pytest.approx(100 * (gained - lost) / len(pairs))
    differences = torch.tensor([float(b - a) for a, b in pairs], dtype=torch.float64)
    if len(pairs) > 1:
        assert found.points_se == pytest.approx(100 * differences.std().item() / len(pairs) ** 0.5)
    else:
        assert found.points_se is None
    with pytest.raises(ValueError):
        compare([True], [])


def test_share_of_packed_tokens():
    geometry = Geometry(num_kv_heads=2, head_dim=16, sinks=3, window=24, page_tokens=16)
    assert packed_share(geometry, 27, 0) == 0
    assert packed_share(geometry, 43, 0) == packed_share(geometry, 43, 1) == 16 / 43
    assert packed_share(geometry, 42, 3) == pytest.approx((0 + 16 / 43 + 16 / 44) / 3)


def test_batches_are_of_like_length_and_bounded():
    prompts = [
        Prompt(f"p/{i}", [1] * n) for i, n in enumerate([9, 3, 40_000, 7, 50_000, 5, 60_000])
    ]
    batches = batches_of(prompts, 3, 10)
    assert [[len(p.ids) for p in batch] for batch in batches] == [
        [3, 5, 7],
        [9, 40_000, 50_000],
        [60_000],
    ]
    assert all(len(b) * (len(b[-1].ids) + 10) <= BATCH_TOKENS for b in batches)
    assert [
        [len(p.ids) for p in batch]
        for batch in batches_of([Prompt(f"p/{i}", [1] * 100_000) for i in range(3)], 3, 10)
    ] == [[100_000] * 2, [100_000]]
    assert batches_of([Prompt("p", [1] * 2 * BATCH_TOKENS)], 3, 10) == [
        [Prompt("p", [1] * 2 * BATCH_TOKENS)]
    ]


# -- prompts ---------------------------------------------------------------------------------------


def setting(**options) -> Setting:
    return Setting(**{"tokenizer": tokenizer(), "context": 2048, "haystack": TEXT, **options})


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.2, 0.4, 0.6, 0.8])
def test_the_needle_lies_at_its_depth(chat, depth):
    made = needle.prompts(setting(tokenizer=tokenizer(chat), context=4096, limit=40))
    of_depth = [p for p in made if p.facts["depth"] == depth]
    assert len(of_depth) == 8 and {p.facts["length"] for p in of_depth} == {
        4064 >> s for s in range(4)
    }
    for prompt in of_depth:
        text = written(prompt.ids)
        sentence = f"is {prompt.facts['number']}."
        assert text.count(prompt.facts["number"]) == 1 and sentence in text
        assert prompt.facts["length"] - 700 < len(text) <= prompt.facts["length"]
        start = text.index(needle.LEAD) + len(needle.LEAD) + 2
        end = text.index("\n\n", start)
        at = text.index("The secret number of") - start
        hay = end - start - len(f"The secret number of X is {prompt.facts['number']}. ")
        assert (
            depth * hay - 20 <= at <= depth * hay + 700
        )  # before the first sentence that begins at or after the depth
        assert at == 0 or depth > 0
        assert text.endswith("<assistant>" if chat else "Answer:")


def test_insertion_by_hand():
    hay = ["A.", "B.", "C.", "D."]
    at = [
        needle.insert(hay, [10, 10, 10, 10], "N.", d).split().index("N.")
        for d in (0, 0.1, 0.25, 0.26, 0.5, 0.8, 1)
    ]
    assert at == [0, 1, 1, 2, 2, 4, 4]


def test_only_whole_sentences_without_numbers_are_hay():
    text = "One two. Is it? x = {1}. It has 3 parts! Question: why?\n\nA heading\n\nLast\none."
    assert needle.sentences(text) == ["One two.", "Is it?", "Last one."]


def test_synthetic_prompts_are_seeded_and_do_not_depend_on_the_limit():
    for task in (needle, retrieval):
        few, many = (task.prompts(setting(limit=n)) for n in (3, 9))
        assert [p.sha256 for p in few] == [p.sha256 for p in many][:3]
        assert len({p.sha256 for p in many}) == 9
        assert few != task.prompts(setting(limit=3, seed=1))
    assert len(needle.prompts(setting())) == needle.COUNT
    assert (
        len(
            {
                (p.facts["length"], p.facts["depth"])
                for p in needle.prompts(setting(context=4096, limit=20))
            }
        )
        == 20
    )


def test_retrieval_asks_for_one_of_the_pairs():
    for chat in (False, True):
        for prompt in retrieval.prompts(setting(tokenizer=tokenizer(chat), limit=12)):
            text = written(prompt.ids)
            pairs = json.loads(text[text.index("{") : text.index("}") + 1])
            assert len(pairs) == prompt.facts["pairs"] >= 2
            assert (
                pairs[prompt.facts["key"]] == prompt.facts["value"]
                and text.count(prompt.facts["key"]) == 2
            )
            assert list(pairs).index(prompt.facts["key"]) == min(
                int(prompt.facts["depth"] * len(pairs)), len(pairs) - 1
            )
            assert (
                prompt.facts["length"] - 81 < len(prompt.ids) <= prompt.facts["length"]
            )  # one more pair takes 81


def test_long_context_answers_are_judged():
    prompt = Prompt("needle/0", [1], {"number": "1234567"})
    assert needle.judge(prompt, "The secret number is 1,234,567.").correct
    assert (
        not needle.judge(prompt, "12345678").correct
        and not needle.judge(prompt, "It is 7654321, not 1234567").correct
    )
    key, value = "0" * 8 + "-0000-4000-8000-" + "0" * 12, "a" * 8 + "-bbbb-4ccc-8ddd-" + "e" * 12
    prompt = Prompt("retrieval/0", [1], {"key": key, "value": value})
    assert retrieval.judge(prompt, f'The value of "{key}" is "{value.upper()}".') == Judgement(
        value, True
    )
    assert retrieval.judge(prompt, f"{key}") == Judgement("", False)
    assert not retrieval.judge(prompt, value[:-1]).correct


def gsm8k_file(folder: Path, count: int = 5) -> Path:
    path = folder / "test.jsonl"
    rows = [
        {"question": f"What is {i} plus {1000 * i}?", "answer": f"Add. #### {1001 * i:,}"}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_gsm8k_prompts(tmp_path):
    path = gsm8k_file(tmp_path)
    made = gsm8k.prompts(setting(data=str(path), context=4096))
    assert [p.facts for p in made] == [{"gold": str(1001 * i), "shots": 5} for i in range(5)]
    text = written(made[1].ids)
    assert text.startswith("Question: A baker") and text.endswith(
        "\n\nQuestion: What is 1 plus 1000?\nAnswer:"
    )
    assert text.count("The answer is") == 5
    few = gsm8k.prompts(setting(data=str(path), context=1024, limit=2))
    assert [p.facts["shots"] for p in few] == [2, 2] and all(len(p.ids) + 300 <= 1024 for p in few)
    chat = gsm8k.prompts(setting(tokenizer=tokenizer(True), data=str(tmp_path), context=4096))
    text = written(chat[1].ids)
    assert (
        text.endswith("<user>What is 1 plus 1000?\n<assistant>") and text.count("<assistant>") == 6
    )
    with pytest.raises(KvfoldError, match="context of 310"):
        gsm8k.prompts(setting(data=str(path), context=310))


PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "canonical_solution": "    return 2 * x\n",
}


def humaneval_file(folder: Path) -> Path:
    path = folder / "HumanEval.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(PROBLEM) + "\n")
    return path


def test_humaneval_prompts_and_programs(tmp_path):
    humaneval_file(tmp_path)
    (plain,) = humaneval.prompts(setting(data=str(tmp_path)))
    assert written(plain.ids) == PROBLEM["prompt"]
    (chat,) = humaneval.prompts(setting(tokenizer=tokenizer(True), data=str(tmp_path)))
    assert written(chat.ids).endswith("<assistant>```python\n" + PROBLEM["prompt"])
    right = cut_at("    return 2 * x\n\nprint(double(1))\n```\nDone.", humaneval.STOPS)
    assert humaneval.judge(plain, right) == Judgement("passed", True)
    assert humaneval.judge(plain, "    return x") == Judgement("AssertionError", False)
    with pytest.raises(KvfoldError, match="HumanEval/0 has"):
        humaneval.prompts(setting(data=str(tmp_path), context=320))


# -- data ------------------------------------------------------------------------------------------


def test_rows_of_a_file_a_folder_and_a_gz(tmp_path):
    path = gsm8k_file(tmp_path)
    assert len(read_rows(str(path), (), ("question",))) == 5
    assert len(read_rows(str(path), (), ("question",), 2)) == 2
    assert len(read_rows(str(tmp_path), ("absent.jsonl", "test.jsonl"), ("question",))) == 5
    assert read_rows(str(humaneval_file(tmp_path)), (), ("prompt",)) == [PROBLEM]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("{nonsense", "no JSON-lines file"),
        ('{"question": "q"}\n[1]', "Row 0 .* no text 'answer'"),
        ('{"question": "q", "answer": "a"}\n7', "Row 1 .* no text 'question'"),
        ('{"question": "q", "answer": 7}', "Row 0 .* no text 'answer'"),
    ],
)
def test_bad_data_is_refused(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(KvfoldError, match=message):
        read_rows(str(path), (), ("question", "answer"))


def test_data_that_is_not_there_is_refused(tmp_path, monkeypatch):
    for source, message in (
        ("./no.jsonl", "does not exist"),
        (str(tmp_path), "is a folder without test.jsonl"),
    ):
        with pytest.raises(KvfoldError, match=message):
            read_rows(source, ("test.jsonl",), ())
    with pytest.raises(KvfoldError, match="can be loaded"):
        read_rows("no-one/no-such-dataset", (), ())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KvfoldError, match="is not installed"):
        read_rows("openai/gsm8k:main:test", (), ())
    path = tmp_path / "gold.jsonl"
    path.write_text('{"question": "q", "answer": "none"}')
    with pytest.raises(KvfoldError, match="no number after"):
        gsm8k.prompts(setting(data=str(path)))


# -- generation ------------------------------------------------------------------------------------


def test_draws_of_one_question_count_as_one_difference():
    """By hand: shares of right answers differ by −1/2, 0, 1/2 and 1/2."""
    first = [[True, True], [False, True], [False, False], [False, True]]
    second = [[False, True], [True, False], [True, False], [True, True]]
    found = compare_draws(first, second)
    assert (found.n, found.lost, found.gained) == (8, 2, 3)
    assert (found.accuracy_first, found.accuracy) == (0.5, 5 / 8)
    differences = torch.tensor([-0.5, 0.0, 0.5, 0.5], dtype=torch.float64)
    assert found.points == pytest.approx(12.5)
    assert found.points_se == pytest.approx(100 * float(differences.std()) / 2)
    assert found.p == pytest.approx(1.0)  # three halves of any signs add up to one half at least
    clear = compare_draws([[False, False]] * 10, [[True, False]] * 10)
    assert clear.p == pytest.approx(2 / 2**10, abs=2e-3)


def test_sampled_answers_are_seeded_and_differ_by_draw(model):
    prompts = [draw for prompt in some_prompts(2) for draw in prompt.draws(3)]
    assert [p.id for p in prompts] == [f"p/{i}#{k}" for i in range(2) for k in range(3)]
    texts = [
        PairedGenerator(model, tokenizer(), 1.0, seed).generate(prompts, "packed", 12)
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len({text for text, _ in texts[0]}) > 3
    # where nothing is packed, both caches draw the same
    short = Prompt("short", prompts[0].ids[:8]).draws(4)
    plain, packed = (
        PairedGenerator(model, tokenizer(), 1.0).generate(short, cache, 12)
        for cache in ("16bit", "packed")
    )
    assert plain == packed and len({text for text, _ in plain}) > 2


def some_prompts(count: int = 5) -> list[Prompt]:
    words = TEXT.encode("ascii", "ignore").decode()
    return [Prompt(f"p/{i}", list(words[100 * i : 160 * i + 45].encode())) for i in range(count)]


def test_a_batch_gives_each_prompt_what_it_gets_alone_from_either_cache(
    artifact, model, monkeypatch
):
    prompts, tok = some_prompts(), tokenizer()
    stock = stock_from_pretrained(artifact, dtype=torch.float32)
    generator = PairedGenerator(model, tok)
    alike = []
    for cache, reference in (("16bit", stock), ("packed", model)):
        together = generator.generate(prompts, cache, 20)
        for prompt, (text, count) in zip(prompts, together, strict=True):
            alone = reference.generate(
                torch.tensor([prompt.ids]),
                max_new_tokens=20,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=0,
            )[0, len(prompt.ids) :].tolist()
            alone = alone[: alone.index(0)] if 0 in alone else alone
            assert (text, count) == (tok.decode(alone, skip_special_tokens=True), len(alone))
        alike.append(together)
        monkeypatch.setattr("kvfold.compress.tasks.generator.PREFILL_CHUNK", 64)
        assert [t[:1] for t, _ in generator.generate(prompts, cache, 20)] == [
            t[:1] for t, _ in together
        ]
        monkeypatch.undo()
    assert alike[0] != alike[1]  # the packed cache was read
    assert model.base_model.kv_packed


def test_a_row_ends_at_its_stop_or_end_token(model):
    prompts, tok = some_prompts(4), tokenizer()
    generator = PairedGenerator(model, tok)
    free = generator.generate(prompts, "packed", 24)
    stop = free[0][0][5:7]
    for (text, count), (whole, most) in zip(
        generator.generate(prompts, "packed", 24, (stop,)), free, strict=True
    ):
        assert text == cut_at(whole, (stop,))
        assert count == (min(most, whole.index(stop) + 2) if stop in whole else most)
    for prompt, (whole, most) in zip(prompts, free, strict=True):  # a stop in the prompt is none
        stop = written(prompt.ids[-2:])
        ends = whole.index(stop) + 2 if stop in whole else most
        assert generator.generate([prompt], "packed", 24, (stop, "\x01" * 6)) == [
            (cut_at(whole, (stop,)), ends)
        ]
    assert max(most for _, most in free) > 6
    generator.ends = [ord(free[1][0][9])]
    text, count = generator.generate(prompts, "packed", 24)[1]
    assert text == free[1][0][:count] and count == free[1][0].index(free[1][0][9])


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def parity_task(fail_at: int | None = None, calls: list | None = None) -> Task:
    """Ten prompts; a continuation is right if its characters' sum is even: both outcomes occur."""
    calls = [] if calls is None else calls

    def judge(prompt: Prompt, text: str) -> Judgement:
        calls.append(prompt.id)
        if fail_at is not None and len(calls) > fail_at:
            raise Interrupted
        return Judgement(text[:3], sum(map(ord, text)) % 2 == 0)

    return Task(max_new_tokens=12, prompts=lambda s: some_prompts(10)[: s.limit], judge=judge)


def test_a_run_and_its_resumption(artifact, tmp_path, monkeypatch):
    def run(task: Task, folder: str, **options) -> dict:
        monkeypatch.setitem(TASKS, "gsm8k", task)
        return run_tasks(
            str(artifact),
            "gsm8k",
            samples=tmp_path / folder,
            device="cpu",
            **{"batch_size": 3, **options},
        )

    whole = run(parity_task(), "whole")
    (result,) = whole["tasks"]
    assert (result["prompts"], result["pairs"]) == (10, 10)
    lines = [
        json.loads(line) for line in (tmp_path / "whole" / "gsm8k.jsonl").read_text().splitlines()
    ]
    assert lines[0]["task"] == "gsm8k" and sorted(r["id"] for r in lines[1:]) == [
        f"p/{i}" for i in range(10)
    ]
    right = {cache: sum(r[cache]["correct"] for r in lines[1:]) for cache in ("16bit", "packed")}
    assert (result["accuracy_16bit"], result["accuracy"]) == (
        right["16bit"] / 10,
        right["packed"] / 10,
    )
    assert 0 < right["16bit"] < 10 and result["lost"] + result["gained"] > 0
    assert result["points"] == pytest.approx(100 * (result["accuracy"] - result["accuracy_16bit"]))
    assert (
        0 < result["packed_share"] < 1
        and 3.0 < result["effective_bits"] < 16
        and result["same_text"] < 1
    )

    with pytest.raises(Interrupted):
        run(parity_task(fail_at=12), "cut")
    path = tmp_path / "cut" / "gsm8k.jsonl"
    kept = len(path.read_text().splitlines()) - 1
    assert 3 <= kept <= 6  # whole batches
    path.write_text(path.read_text()[:-9])  # killed in the middle of a line
    calls: list[str] = []
    again = run(parity_task(calls=calls), "cut", resume=True, batch_size=2)
    assert len(set(calls)) == 10 - kept + 1
    figures = lambda r: {k: v for k, v in r["tasks"][0].items() if not k.startswith("seconds")}  # noqa: E731
    assert figures(again) == figures(whole)
    assert figures(run(parity_task(fail_at=0), "cut", resume=True)) == figures(
        whole
    )  # nothing is left to answer

    drawn = run(parity_task(), "drawn", draws=3, temperature=1.0, limit=4)["tasks"][0]
    assert (drawn["prompts"], drawn["pairs"]) == (4, 12) and drawn["points_se"] is not None
    with pytest.raises(KvfoldError, match="another temperature"):
        run(parity_task(), "drawn", draws=3, temperature=0.5, limit=4, resume=True)
    run(parity_task(), "rounds", draws=3, temperature=1.0, limit=4, batch_size=4)
    names = [
        json.loads(line)["id"]
        for line in (tmp_path / "rounds" / "gsm8k.jsonl").read_text().splitlines()[1:]
    ]
    for start in (
        0,
        4,
        8,
    ):  # a batch has one answer to each prompt, so a run that is cut off has answers to all
        prompts, draws = zip(
            *(name.rpartition(DRAW)[::2] for name in names[start : start + 4]), strict=True
        )
        assert len(set(prompts)) == 4 and len(set(draws)) == 1
    few = run(parity_task(fail_at=0), "cut", resume=True, limit=4)["tasks"][0]
    assert (few["prompts"], few["pairs"]) == (4, 4)
    short = run(parity_task(), "short", time_limit=1e-9 + 60 * 60)["tasks"][0]
    assert short["pairs"] == 10
    with pytest.raises(KvfoldError, match="--time-limit 0 left no time"):
        run(parity_task(), "none", time_limit=0.0)


def test_a_time_limit_stops_after_a_batch(artifact, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("kvfold.compress.tasks.run.time.monotonic", lambda: clock[0])

    def judge(prompt, text):
        clock[0] += 1.0
        return Judgement("", True)

    task = Task(max_new_tokens=2, prompts=lambda s: some_prompts(10), judge=judge)
    monkeypatch.setattr(
        PairedGenerator, "generate", lambda self, prompts, *a: [("a", 1)] * len(prompts)
    )
    for name in ("gsm8k", "humaneval"):
        monkeypatch.setitem(TASKS, name, task)
    report = run_tasks(
        str(artifact),
        "gsm8k,humaneval",
        samples=tmp_path,
        device="cpu",
        batch_size=2,
        time_limit=9.0,
        run_code=True,
    )
    # a batch takes two seconds: two of them in half of nine seconds, and two in the five that are
    # left
    assert [(r["prompts"], r["pairs"], r["same_text"]) for r in report["tasks"]] == [
        (10, 4, 1.0),
        (10, 4, 1.0),
    ]
    report = run_tasks(
        str(artifact),
        "gsm8k,humaneval",
        samples=tmp_path,
        device="cpu",
        batch_size=9,
        time_limit=1.0,
        run_code=True,
    )
    assert [(r["task"], r["pairs"]) for r in report["tasks"]] == [
        ("gsm8k", 9)
    ]  # it took all the time that there was


def test_answers_of_another_run_are_refused(tmp_path):
    path = tmp_path / "new" / "t.jsonl"
    prompt = Prompt("t/0", [1, 2], {"gold": "3"})
    record = {"id": "t/0", "prompt_sha256": prompt.sha256}
    Samples(path, {"dtype": "bfloat16"}, resume=False).add([record])
    assert Samples(path, {"dtype": "bfloat16"}, resume=True).has(prompt)
    assert not Samples(path, {"dtype": "bfloat16"}, resume=True).has(Prompt("t/1", [1, 2]))
    with pytest.raises(KvfoldError, match="another dtype"):
        Samples(path, {"dtype": "float32"}, resume=True)
    with pytest.raises(KvfoldError, match="another question under t/0"):
        Samples(path, {"dtype": "bfloat16"}, resume=True).has(Prompt("t/0", [1, 2], {"gold": "4"}))
    path.write_text(path.read_text()[:7])  # killed while the first line was written
    assert not Samples(path, {"dtype": "float32"}, resume=True).has(prompt)
    assert Samples(path, {"dtype": "float32"}, resume=True).records == {}
    for content in ('{"dtype": "float32"}\n[1]\n', "text\n"):
        path.write_text(content)
        with pytest.raises(KvfoldError, match="not a file of answers"):
            Samples(path, {"dtype": "float32"}, resume=True)
    assert Samples(path, {"dtype": "float32"}, resume=False).records == {}
    with pytest.raises(KvfoldError, match="cannot be written"):
        Samples(path / "below", {}, resume=False)


# -- the command -----------------------------------------------------------------------------------


def kvfold(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["kvfold", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


def test_the_command_end_to_end(artifact, tmp_path, monkeypatch, capsys):
    gsm8k_file(tmp_path, 2)
    humaneval_file(tmp_path)
    options = [
        "--limit",
        2,
        "--batch-size",
        2,
        "--task-data",
        tmp_path,
        "--run-code",
        "--samples",
        tmp_path / "answers",
    ]
    options += ["--context", 1200, "--json", tmp_path / "report.json", "--device", "cpu"]
    code, out, err = kvfold(
        monkeypatch, capsys, "eval", artifact, "--tasks", ",".join(TASKS), *options
    )
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(r["task"], r["pairs"]) for r in report["tasks"]] == [
        ("gsm8k", 2),
        ("humaneval", 1),
        ("needle", 2),
        ("retrieval", 2),
    ]
    assert (report["dtype"], report["context"]) == ("float32", 1200)
    for task in TASKS:
        assert task in out and (tmp_path / "answers" / f"{task}.jsonl").is_file()
    assert str(tmp_path / "answers") in out
    assert sorted(p.name for p in artifact.iterdir() if p.suffix == ".jsonl") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "gsm8k,mmlu"], "'mmlu' is not a task"),
        (["--tasks", ","], "names no task"),
        (["--tasks", "gsm8k,humaneval"], "humaneval runs programs that the model writes"),
        (["--tasks", "needle", "--task-data", "x.jsonl"], "'x.jsonl' is read by none of needle"),
        (
            ["--tasks", "gsm8k,humaneval", "--run-code", "--task-data", "x.jsonl"],
            "a folder that holds both",
        ),
        (["--tasks", "needle", "--windows", "3"], "--windows belongs to"),
        (["--tasks", "needle", "--against", "x"], "--against belongs to"),
        (["--limit", "3"], "--limit says"),
        (["--resume"], "--resume says"),
        (["--tasks", "needle", "--context", "4096"], "--context 4096 passes"),
        (["--tasks", "needle", "--context", "100"], "context of 100 is too short"),
        (["--tasks", "gsm8k", "--task-data", "absent.jsonl"], "'absent.jsonl' does not exist"),
        (["--tasks", "needle", "--limit", "0"], "--limit"),
        (["--tasks", "needle", "--draws", "3"], "the same greedy answer 3 times"),
        (["--temperature", "0.5"], "--temperature says"),
    ],
)
def test_options_are_refused_in_one_line(artifact, tmp_path, monkeypatch, capsys, options, message):
    extra = ["--samples", tmp_path] if "--tasks" in options else []
    code, out, err = kvfold(
        monkeypatch, capsys, "eval", artifact, "--device", "cpu", *options, *extra
    )
    assert (code, out) == (2, "") and message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_options_and_tasks():
    check_options({"artifact", "device", "json_file", "text", "limit"}, "needle")
    check_options({"artifact", "windows", "against", "text"}, None)
    assert parse_tasks(" needle, gsm8k,needle", None, False) == ["needle", "gsm8k"]
    assert ask_ids(tokenizer(), "doc", "why?") == list(b"doc\n\nQuestion: why?\nAnswer:")


def test_the_harness_is_asked_for_where_it_is_missing(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(
        "lm_eval_run", ROOT / "benchmarks" / "lm_eval_run.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(KvfoldError, match=r"pip install 'kvfold\[lm-eval\]'"):
        script.import_harness()
    found = {
        "results": {
            "t": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "t"},
            "n": {"bits_per_byte,none": 1.25},
        }
    }
    figures = script.figures(found)
    assert figures == {
        "t": {"acc,none": 0.5, "acc_stderr,none": 0.1},
        "n": {"bits_per_byte,none": 1.25},
    }
    script.print_table({"16bit": figures, "packed": figures})
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| t | acc,none | 0.5000 ± 0.1000 | 0.5000 ± 0.1000 |",
        "| n | bits_per_byte,none | 1.2500 | 1.2500 |",
    ]
