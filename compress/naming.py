"""Where an artifact goes that nobody named: artifacts/MODEL-BUDGET. `python -m
kvfold.compress.naming MODEL BUDGET` prints it."""

import sys
from pathlib import Path


def default_output(model: str, budget: str) -> Path:
    """The folder that `kvfold compress MODEL --budget BUDGET` writes where no --out is given.

    Args:
        model: alias, folder (`.` and `..` are named by what they are), .gguf or Hub id.
    """
    path = Path(model)
    name = path.stem if path.suffix.lower() == ".gguf" else path.name
    if name in ("", ".."):
        name = path.resolve().name or "model"
    return Path("artifacts") / f"{name}-{budget.replace('@', '-at-').replace('/', '-')}"


if __name__ == "__main__":
    print(default_output(*sys.argv[1:3]))
