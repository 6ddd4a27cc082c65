"""Several processes of one run, as torchrun would start them, each with its own stdout and stderr."""

import socket
from pathlib import Path
from subprocess import CompletedProcess

import prepared

START = """
import os, signal, sys, traceback
code, folder, port, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
words = sys.argv[5:]
children = {}
for rank in range(size):
    child = os.fork()
    if child:
        children[child] = rank
        continue
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    )
    for number, name in ((1, "out"), (2, "err")):
        path = os.path.join(folder, f"{name}{rank}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv, status = ["-c", *words], 1
    signal.alarm(LIMIT)
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "rank": rank})
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
for _ in children:
    child, status = os.wait()
    with open(os.path.join(folder, f"code{children[child]}"), "w") as file:
        file.write(str(os.waitstatus_to_exitcode(status)))
"""
LIMIT = 200  # seconds: one that waits for ever is ended by SIGALRM
COMMAND = "from kvfold.__main__ import main; main()"


def several(
    size: int, folder: Path, *words: object, code: str = COMMAND
) -> list[CompletedProcess[str]]:
    """What each of `size` processes gives, by rank.

    Args:
        folder: an empty one.
        words: what each finds in sys.argv.
        code: that each runs, with its `rank`; default: the command line.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    started = prepared.python(
        "kvfold", START.replace("LIMIT", str(LIMIT)), code, folder, port, size, *words
    )
    assert started.returncode == 0, started.stderr
    return [
        CompletedProcess(
            [*map(str, words)],
            int((folder / f"code{rank}").read_text()),
            *((folder / f"{name}{rank}").read_text() for name in ("out", "err")),
        )
        for rank in range(size)
    ]
