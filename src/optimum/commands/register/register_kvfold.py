"""`optimum-cli kvfold …`: kvfold's own command line under optimum's.

No `__init__.py` here: `optimum` is a namespace package, to which every distribution may add files.
Where optimum itself is not installed, these folders make transformers' `is_optimum_available()`
true; what it then imports from optimum is missing all the same.

Nothing else of optimum is used. Its data helpers for calibration (optimum.gptq.data) give lists of
single sequences collated with padding, the first thousand rows of WikiText-2 only, and WikiText-2's
test split under the name "validation"; kvfold calibrates on unpadded sequences from any text or
dataset, and measures on that test split.
"""

import argparse
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class KvfoldCommand(BaseOptimumCLICommand):
    """Hands everything that stands behind `kvfold` to kvfold, so that verbs and options are the
    same."""

    COMMAND = CommandInfo(
        name="kvfold", help="Compress a language model so that its KV cache is small."
    )

    @staticmethod
    def parse_args(parser: Any) -> None:
        parser.add_argument("args", nargs=argparse.REMAINDER, help="As of the command `kvfold`.")
        parser.print_help = lambda file=None: _run(
            ["--help"]
        )  # argparse keeps a first --help for itself

    def run(self) -> None:
        assert self.args is not None
        _run(self.args.args)


def _run(args: list[str]) -> None:
    from kvfold.__main__ import (
        main,
    )  # only now: optimum-cli loads this file for each of its commands

    main(args, prog="optimum-cli kvfold")


# An iterator, so that it is taken once: optimum reads it for each folder on the path that holds
# this file, and a checkout beside an installed kvfold makes two.
REGISTER_COMMANDS = iter([KvfoldCommand])
