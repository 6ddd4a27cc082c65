"""Tasks solved by generation: one row of the table each."""

from kvfold.compress.tasks import gsm8k, humaneval, needle, retrieval
from kvfold.compress.tasks.task import Task

TASKS: dict[str, Task] = {
    "gsm8k": gsm8k.TASK,
    "humaneval": humaneval.TASK,
    "needle": needle.TASK,
    "retrieval": retrieval.TASK,
}
