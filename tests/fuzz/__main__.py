"""`make fuzz [ARGS="--cases N --seed S --kind artifact --only N --jobs N"]`: cases in processes of
their own.

Prints what became of them, and a line for each that failed; ends with 1 if one did. A process that
says nothing for a minute, or dies, has failed at the case that it began, and another goes on behind
it.
"""

import argparse
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fuzz.run import Report, Target, pick, run_case

SHARES = {"artifact": 60, "cache": 25, "gguf": 14, "work": 1}
SILENCE = 60.0  # seconds; a case of a work folder computes a whole run
SLOW = {"work": 50.0}  # seconds, of kinds whose cases may take longer than others'


def targets(kinds: Sequence[str], scratch: Path) -> list[Target]:
    """What cases are made from, built in `scratch`."""
    from conftest import TINY_RECIPE, save_tiny

    from fuzz.artifacts import Artifacts
    from fuzz.caches import Caches
    from fuzz.ggufs import Ggufs
    from fuzz.works import WORDS, Works
    from kvfold.compress.models import quiet_transformers
    from kvfold.compress.pipeline import compress
    from kvfold.compress.recipe import load_recipe

    quiet_transformers()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    (scratch / "text.txt").write_text(WORDS * 60)
    (scratch / "recipe.yaml").write_text(TINY_RECIPE)
    model, base = save_tiny(scratch / "tiny"), scratch / "base"
    compress(
        str(model),
        "4.0",
        base,
        calib=str(scratch / "text.txt"),
        recipe=load_recipe(scratch / "recipe.yaml"),
    )
    made = {
        "artifact": lambda: Artifacts(base),
        "cache": lambda: Caches(base, scratch),
        "gguf": lambda: Ggufs(scratch),
        "work": lambda: Works(scratch),
    }
    return [made[kind]() for kind in kinds]


def work(kinds: Sequence[str], seed: int, first: int, step: int, count: int) -> None:
    """Runs cases first, first + step, … below `count`, and says each on stdout before and after."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with tempfile.TemporaryDirectory(prefix="kvfold-fuzz-") as folder:
        scratch = Path(folder)
        made = targets(kinds, scratch)
        for number in range(first, count, step):
            target = pick(made, [SHARES[kind] for kind in kinds], seed, number)
            print(json.dumps({"begin": number, "kind": target.name}), file=said, flush=True)
            report = Report()
            run_case(target, seed, number, scratch, report, SLOW.get(target.name, 5.0))
            line = {
                "kind": target.name,
                "outcome": next(iter(report.outcomes)),
                "failures": report.failures,
            }
            print(json.dumps({**line, "slowest": report.slowest}), file=said, flush=True)


def follow(options: argparse.Namespace, worker: int, total: Report, lock: threading.Lock) -> None:
    """Has a worker's share of the cases run, in one process after another."""
    number, begun = worker, worker
    while number < options.cases:
        command = [
            sys.executable,
            "-m",
            "fuzz",
            "--kind",
            *options.kind,
            "--seed",
            str(options.seed),
        ]
        command += ["--cases", str(options.cases), "--worker", str(number), str(options.jobs)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        wait, finished = 600.0, False  # the first line comes when all is built
        while True:
            try:
                text = lines.get(timeout=wait)
            except queue.Empty:
                fault = f"said nothing for {SILENCE:.0f} s"
                break
            if not text:
                finished, fault = (
                    process.wait() == 0,
                    f"the process ended with {process.returncode}",
                )
                break
            line, wait = json.loads(text), SILENCE
            if "begin" in line:
                begun = line["begin"]
                continue
            with lock:
                total.outcomes[f"{line['kind']} {line['outcome']}"] += 1
                total.failures += line["failures"]
                for failure in line["failures"]:
                    print(f"FAILED {failure}", flush=True)
                total.slowest = max(total.slowest, tuple(line["slowest"]))
        process.kill()
        process.wait()
        if finished:
            return
        with lock:
            total.failures.append(f"case {begun}: {fault}")
            print(f"FAILED {total.failures[-1]}", flush=True)
        number = begun + options.jobs


def _read(process: subprocess.Popen, lines: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kind", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--only", type=int, help="one case, in this process")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.kind, options.seed, *options.worker, options.cases)
        return 0
    start, total = time.time(), Report()
    if options.only is not None:
        with tempfile.TemporaryDirectory(prefix="kvfold-fuzz-") as folder:
            made = targets(options.kind, Path(folder))
            target = pick(made, [SHARES[kind] for kind in options.kind], options.seed, options.only)
            run_case(
                target, options.seed, options.only, Path(folder), total, SLOW.get(target.name, 5.0)
            )
        print("\n".join(f"FAILED {failure}" for failure in total.failures))
    else:
        lock = threading.Lock()
        workers = [
            threading.Thread(target=follow, args=(options, i, total, lock))
            for i in range(min(options.jobs, options.cases))
        ]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join()
    print(
        f"seed {options.seed}, {time.time() - start:.0f} s; slowest: {total.slowest[0]:.1f} s, {total.slowest[1]}"
    )
    print("\n".join(f"{count:6} {name}" for name, count in sorted(Counter(total.outcomes).items())))
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
