"""The command `kvfold`, before anything large is imported: an interrupt in those seconds ends it in
a sentence too."""

import gc
import importlib
import os
import signal
import sys
from typing import Any

from kvfold.memory import address_space_left, is_out_of_memory, reason_of_shortage

LEAST_MIB = 1200  # that the libraries map; little of it is ever touched


def main(args: list[str] | None = None, prog: str = "kvfold") -> None:
    """Imports the command line and runs it; `args` and `prog` as in kvfold.compress.cli.main."""
    before: Any = signal.getsignal(signal.SIGINT)
    mine = (
        before is signal.default_int_handler
    )  # else a job in the background, which is not to hear it, or someone else's handler
    if mine:
        signal.signal(signal.SIGINT, _leave)
    left = address_space_left()
    if left is not None and left[0] < LEAST_MIB << 20:  # libraries would abort, each in its words
        _too_little(f"{max(0, left[0]) >> 20} MiB are left, {left[1]}")
    # read when OpenMP is loaded: threads that spin while they wait make a machine with other work
    # on it some thirty times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # what is imported stays: looking through it for garbage takes a second of four, now and at exit
    collecting = gc.isenabled()
    gc.disable()
    try:
        from kvfold.compress.cli import main as run

        importlib.import_module("kvfold.compress.models")  # which every command needs
    except (ImportError, OSError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _too_little(reason_of_shortage(error))
    finally:
        if collecting:
            gc.enable()

    gc.freeze()
    if mine:
        signal.signal(signal.SIGINT, before)
    try:
        run(args, prog)
    finally:
        if mine:  # all is done and said, though a large library may take seconds to leave
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _too_little(reason: str) -> None:
    """Ends the process with a sentence."""
    print(
        f"kvfold: there is too little memory to begin ({reason}): {LEAST_MIB} MiB of addresses are needed (ulimit -v) "
        "before any model is read; raise the limit.",
        file=sys.stderr,
    )
    sys.exit(2)


def _leave(number: int, frame: Any) -> None:
    """Ends the process at once: nothing is under way yet,
    and an exception could come out of an import as another one."""
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one says so
        print("kvfold: interrupted.", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    main()
