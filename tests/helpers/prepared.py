"""Processes of their own that begin with what a test needs already imported: PyTorch and
transformers take seconds to import, and another second to be taken apart at the end.

A process of each kind imports once for all tests of a worker, and forks for each piece of code. What
is tested must not be an import, what is read when something is imported (HF_HUB_OFFLINE and the
like), or how an interpreter ends: such code gets a process of Python's own.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

MODELS = (
    "import torch\nfrom transformers import AutoModelForCausalLM, LlamaForCausalLM, DynamicCache\n"
)
OURS = (
    MODELS + "import kvfold.compress.cli, kvfold.compress.evaluate, kvfold.compress.pipeline\n"
    "import kvfold.exports.page.plots, kvfold.runtime\n"
)
KINDS = {
    "transformers": (MODELS, {}),
    "kvfold": (OURS, {}),
    "compiler": (OURS + "import compile_ahead, compile_kernels\n", {"TRITON_INTERPRET": "0"}),
}
SERVE = """
import atexit, gc, json, os, sys, traceback
gc.disable()
PREPARE
gc.freeze()
gc.enable()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    for number, name in enumerate((os.devnull, job["out"], job["err"])):
        os.dup2(os.open(name, os.O_RDONLY if not number else os.O_WRONLY | os.O_CREAT), number)
    sys.argv, code = ["-c", *job["args"]], 1
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(job["code"], "<string>", "exec"), scope)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        stream.flush()
    os._exit(code)
"""
_servers: dict[str, subprocess.Popen] = {}


def python(
    kind: str,
    code: str,
    *args: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """What `python -c code args…` gives, in a process that has imported what KINDS has for `kind`.

    Args:
        env: variables beside this process's own.
    """
    server = _servers.get(kind) or _start(kind)
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        job = {
            "code": code, "args": [*map(str, args)], "env": dict(env or {}), "cwd": str(cwd or Path.cwd()),
            "out": str(out), "err": str(err),
        }  # fmt: skip
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code_found = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            [kind, *args], code_found, out.read_text(), err.read_text()
        )


def alone(code: str) -> str:
    """Code for an interpreter of its own that imports much, without the look for garbage among that
    and without taking it apart at the end."""
    end = "import os, sys; sys.stdout.flush(); sys.stderr.flush(); os._exit(0)"
    return f"import gc; gc.disable()\n{code}\n{end}\n"


def command(*args: object, **options) -> subprocess.CompletedProcess[str]:
    """What `kvfold args…` gives."""
    return python("kvfold", "from kvfold.__main__ import main; main()", *args, **options)


def _start(kind: str) -> subprocess.Popen:
    prepare, own = KINDS[kind]
    server = _servers[kind] = subprocess.Popen(
        [sys.executable, "-c", SERVE.replace("PREPARE", prepare)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **own},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen) -> None:
    assert server.stdin
    server.stdin.close()
    server.wait()
