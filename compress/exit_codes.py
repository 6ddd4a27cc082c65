"""How the command `kvfold` ends: its exit code, and one sentence where it is interrupted or can't
print."""

import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import typer

from kvfold.memory import is_out_of_memory, reason_of_shortage

INTERRUPTED = 130  # 128 and the signal's number, as of shells
UNWRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def exit_code(run: Callable[[], int | None], words: list[str]) -> int:
    """Runs a command and says on stderr why it ended, where that is not its own doing.

    Args:
        run: the command; returns its exit code, None for 0.
        words: its arguments: whether an interrupted one can be gone on with.
    Returns:
        The process's exit code.
    """
    interrupted: list[bool] = []

    def note(number: int, frame: Any) -> None:
        interrupted.append(True)
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    if ours := ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    code: int | None = None
    printed = _copy_of_stdout()  # rich turns the descriptor itself to nowhere
    try:
        code = run()
        _flush()
    except BaseException as error:
        code = 1
        if _is_broken_pipe(error) and printed is not None and _is_unread(printed):
            # the reader, `head` perhaps, has seen enough; printing is the last that a command does
            code = 0
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), 1
            )  # or the interpreter tries again at its end
        elif interrupted or isinstance(
            error, KeyboardInterrupt
        ):  # a library may have made something else of it
            code = INTERRUPTED
        elif isinstance(error, OSError) and error.errno in UNWRITTEN and error.filename is None:
            print(
                f"kvfold: what was to be printed could not be written ({error.strerror}).",
                file=sys.stderr,
            )
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), 1
            )  # or the interpreter tries again at its end
        elif is_out_of_memory(error):
            print(
                f"kvfold: there is too little memory ({reason_of_shortage(error)}); free some, raise the limit or "
                "choose a smaller model.",
                file=sys.stderr,
            )
            code = 2
        elif isinstance(error, typer.Abort):
            print("kvfold: aborted.", file=sys.stderr)
        else:
            raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if printed is not None:
            os.close(printed)
    if code == INTERRUPTED:  # typer makes that code of an interrupt
        resumed = words[0] == "compress" or (words[0] == "eval" and "--tasks" in " ".join(words))
        again = "; run the same command with --resume to go on" if resumed else ""
        print(f"kvfold: interrupted{again}.", file=sys.stderr)
    return code or 0


def _copy_of_stdout() -> int | None:
    try:
        return os.dup(1)
    except OSError:  # closed
        return None


def _is_unread(descriptor: int) -> bool:
    """Whether the other end of a pipe is closed."""
    watch = select.poll()
    watch.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def _is_broken_pipe(error: BaseException) -> bool:
    """Whether somebody has stopped reading; click and rich make a SystemExit of that."""
    return isinstance(error, BrokenPipeError) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    )


def _flush() -> None:
    """Writes out what was printed, so that a full disk behind stdout is an error and no message of
    the interpreter's."""
    if sys.stdout is not None:
        sys.stdout.flush()
