"""HumanEval (Chen et al. 2021, arXiv 2107.03374): a function completed from its docstring, judged
by running its tests."""

from kvfold.compress.tasks.data import read_rows
from kvfold.compress.tasks.sandbox import run_program
from kvfold.compress.tasks.task import Judgement, Prompt, Setting, Task, chat_ids, plain_ids
from kvfold.errors import KvfoldError

DEFAULT = "openai/openai_humaneval::test"
FILES = (
    "humaneval/HumanEval.jsonl.gz",
    "HumanEval.jsonl.gz",
    "humaneval/HumanEval.jsonl",
    "HumanEval.jsonl",
)
FIELDS = ("task_id", "prompt", "test", "entry_point")
# the paper's stop sequences, and the end of a fenced block
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")


def encode(setting: Setting, stub: str) -> list[int]:
    """Tokens of a function's head and docstring, to be continued with its body.

    A chat model is asked for the function and its answer begins with the head, so both kinds of
    model write only a body. The head ends with a line break: without it the model must begin in the
    middle of what is one token in most of its texts, and hardly knows how (LOG.md).
    """
    if setting.tokenizer.chat_template:
        ask = (
            "Complete this Python function. Answer with the whole function in one code block.\n\n"
            f"```python\n{stub}\n```"
        )
        return chat_ids(setting.tokenizer, (), ask, answer=f"```python\n{stub}\n")
    return plain_ids(setting.tokenizer, f"{stub}\n")


def prompts(setting: Setting) -> list[Prompt]:
    """The first problems. White space after the docstring is one line break: the body's first token
    is its indentation."""
    made = []
    for row in read_rows(setting.data or DEFAULT, FILES, FIELDS, setting.limit):
        stub = row["prompt"].rstrip()
        prompt = Prompt(
            row["task_id"],
            encode(setting, stub),
            {"stub": stub, **{n: row[n] for n in ("test", "entry_point")}},
        )
        if len(prompt.ids) + TASK.max_new_tokens > setting.context:
            raise KvfoldError(
                f"{prompt.id} has {len(prompt.ids)} tokens, and {TASK.max_new_tokens} of answer pass the context of "
                f"{setting.context}; give a larger --context."
            )
        made.append(prompt)
    return made


def program(prompt: Prompt, body: str) -> str:
    """The completed function, its tests and the call that runs them."""
    facts = prompt.facts
    return f"{facts['stub']}\n{body}\n\n{facts['test']}\n\ncheck({facts['entry_point']})\n"


def judge(prompt: Prompt, text: str) -> Judgement:
    """Right if the tests pass; pass@1 is then the mean."""
    outcome = run_program(program(prompt, text))
    return Judgement(outcome.how, outcome.passed)


TASK = Task(
    max_new_tokens=300, prompts=prompts, judge=judge, stops=STOPS, has_data=True, runs_code=True
)
