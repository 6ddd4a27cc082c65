"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems, judged by the last
number of the answer."""

import re
from decimal import Decimal

from kvfold.compress.tasks.data import read_rows
from kvfold.compress.tasks.task import Judgement, Prompt, Setting, Task, chat_ids, plain_ids
from kvfold.errors import KvfoldError

DEFAULT = "openai/gsm8k:main:test"
FILES = ("gsm8k/test.jsonl", "test.jsonl")
NUMBER = re.compile(r"(?:(?<![\w)])-\s?\$?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")

# Chain of thought (Wei et al. 2022, arXiv 2201.11903) with examples of our own: none is from the
# dataset.
EXAMPLES = (
    ("A baker fills 6 trays with 12 rolls each. He sells 45 rolls in the morning and 18 in the afternoon. "
     "How many rolls are left?",
     "He bakes 6 * 12 = 72 rolls. He sells 45 + 18 = 63 of them. So 72 - 63 = 9 rolls are left. The answer is 9."),
    ("A train ticket costs $14 and a child's ticket half as much. What do two adults and three children pay together?",
     "A child's ticket costs 14 / 2 = 7 dollars. The adults pay 2 * 14 = 28 dollars and the children "
     "3 * 7 = 21 dollars. Together that is 28 + 21 = 49 dollars. The answer is 49."),
    ("Lena reads 20 pages a day for 9 days and then 35 pages a day until she has finished a book of 355 pages. "
     "How many days does she read in all?",
     "In the first 9 days she reads 20 * 9 = 180 pages. 355 - 180 = 175 pages remain, which take 175 / 35 = 5 days. "
     "In all she reads 9 + 5 = 14 days. The answer is 14."),
    ("A tank holds 240 litres. It is three quarters full when 35 litres are taken out and 12 litres are poured in. "
     "How many litres does it hold now?",
     "Three quarters of 240 are 240 * 3 / 4 = 180 litres. Taking 35 out leaves 180 - 35 = 145, "
     "and pouring 12 in makes 145 + 12 = 157 litres. The answer is 157."),
    ("Omar saves $60 a month. After 8 months he buys a bicycle that costs $400, with a discount of 15%. "
     "How much money has he left?",
     "He has saved 60 * 8 = 480 dollars. The discount is 400 * 15 / 100 = 60 dollars, so the bicycle costs "
     "400 - 60 = 340 dollars. He has 480 - 340 = 140 dollars left. The answer is 140."),
)  # fmt: skip


def last_number(text: str) -> Decimal | None:
    """The last number in a text, without currency signs and thousands separators; None if there is
    none."""
    found = NUMBER.findall(text)
    return Decimal(re.sub(r"[\s$,]", "", found[-1])) if found else None


def encode(setting: Setting, question: str, shots: int) -> list[int]:
    """Tokens of a question after `shots` worked examples."""
    if setting.tokenizer.chat_template:
        return chat_ids(setting.tokenizer, EXAMPLES[:shots], question)
    turns = [f"Question: {q}\nAnswer: {a}\n\n" for q, a in EXAMPLES[:shots]]
    return plain_ids(setting.tokenizer, "".join(turns) + f"Question: {question}\nAnswer:")


def prompts(setting: Setting) -> list[Prompt]:
    """The first rows of the dataset, each after as many of the five worked examples as the context
    leaves room for."""
    rows = read_rows(setting.data or DEFAULT, FILES, ("question", "answer"), setting.limit)
    longest = max((row["question"] for row in rows), key=lambda q: len(encode(setting, q, 0)))
    room = setting.context - TASK.max_new_tokens
    shots = next(
        (n for n in range(len(EXAMPLES), -1, -1) if len(encode(setting, longest, n)) <= room), None
    )
    if shots is None:
        raise KvfoldError(
            f"The longest GSM8K question and {TASK.max_new_tokens} tokens of answer pass the context of "
            f"{setting.context}; give a larger --context."
        )
    made = []
    for i, row in enumerate(rows):
        gold = last_number(row["answer"].rpartition("####")[2])
        if gold is None:
            raise KvfoldError(
                f"Row {i} of the GSM8K data has no number after '####'; give the dataset's own file."
            )
        made.append(
            Prompt(
                f"gsm8k/{i}",
                encode(setting, row["question"], shots),
                {"gold": str(gold), "shots": shots},
            )
        )
    return made


def judge(prompt: Prompt, text: str) -> Judgement:
    """Right if the last number equals the dataset's."""
    number = last_number(text)
    return Judgement(
        "" if number is None else str(number),
        number is not None and number == Decimal(prompt.facts["gold"]),
    )


TASK = Task(max_new_tokens=300, prompts=prompts, judge=judge, stops=("\nQuestion:",), has_data=True)
