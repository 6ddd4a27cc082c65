"""Many requests to `vllm serve ARTIFACT`: whether memory grows, whether any is left unanswered, and
whether answers are those of kvfold's own runtime.

usage: python benchmarks/served_requests.py ARTIFACT [--requests 10000] [--compare 200] [--prompts 400]
       [--longest 300] [--new 12] [--at-once 32] [--memory 1GiB] [--dtype float32] [--port 8123]
       [--utilization 0.5 (of the GPU's memory, for weights and all; instead of --memory)]
       python benchmarks/served_requests.py ARTIFACT --task gsm8k --task-data FOLDER [--limit 100] …

Requests are drawn from so many random prompts, half of which begin like another one, so that blocks
are hit, shared and evicted; greedy answers of 1 to --new tokens. The first --compare prompts are
answered by kvfold's runtime too; an answer is wrong where a token differs whose next best was more
than 0.1 nats away: a bound for float32, for models in bfloat16 differ by more than that from the
same in other kernels. With --task the prompts are the task's, and both answers to each are judged.
Ends with 1 where an answer is wrong or missing, or the server's memory has grown by more than 5 %
since half of the requests; with --task where the two accuracies differ significantly (p < 0.05).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from served_tokens import TIE, own_answers

from kvfold.exports.units import parse_nbytes


@contextmanager
def server(options: argparse.Namespace, longest: int) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server that answers."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.artifact),
        "--port", str(options.port), "--dtype", options.dtype, "--max-model-len", str(longest),
        "--max-num-batched-tokens", "512", "--served-model-name", "artifact",
        "--gpu-memory-utilization", str(options.utilization or 0.5),
    ]  # fmt: skip
    if options.utilization is None:
        command += ["--kv-cache-memory-bytes", str(parse_nbytes(options.memory))]
    env = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    process = subprocess.Popen(command, env=env, stdout=sys.stderr, start_new_session=True)
    address = f"http://127.0.0.1:{options.port}"
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"the server ended with {process.returncode}")
            try:
                with urllib.request.urlopen(address + "/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(60)


def ask(
    address: str, ids: list[int], new: int, stop: tuple[str, ...] = (), ignore_eos: bool = True
) -> Any:
    """The choice that the server answers one prompt with."""
    body = {
        "model": "artifact", "prompt": ids, "max_tokens": new, "temperature": 0, "return_token_ids": True,
        "ignore_eos": ignore_eos, "stop": list(stop), "skip_special_tokens": True,
    }  # fmt: skip
    request = urllib.request.Request(
        address + "/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)["choices"][0]


def resident(pid: int) -> int:
    """Bytes of memory that a process and its children hold, without files' pages."""
    total, left = 0, [pid]
    while left:
        one = left.pop()
        try:
            status = Path(f"/proc/{one}/status").read_text()
            left += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except OSError:
            continue
        total += next(
            (int(x.split()[1]) << 10 for x in status.splitlines() if x.startswith("RssAnon")), 0
        )
    return total


def on_device() -> int:
    """Bytes of memory in use on the GPU, 0 without one."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return int(out.split()[0]) << 20
    except (OSError, subprocess.CalledProcessError):
        return 0


def differs(found: list[int], own: Any) -> bool:
    """Whether a token is another one where the runtime's choice was clear."""
    for token, expected, gap in zip(found, own.tokens, own.gaps, strict=False):
        if token != expected:
            return gap > TIE
    return False


def soak(options: argparse.Namespace) -> bool:
    """Whether all went well."""
    vocabulary = json.loads((options.artifact / "config.json").read_text())["vocab_size"]
    rng = random.Random(0)
    prompts: list[list[int]] = []
    for i in range(options.prompts):
        head = rng.choice(prompts) if i % 2 else []
        ids = head[: rng.randint(0, len(head))]
        length = rng.randint(1, options.longest)
        prompts.append((ids + rng.choices(range(vocabulary), k=length))[:length])
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = own_answers(options, prompts[: options.compare], device)
    wrong = missing = 0
    sizes: list[tuple[int, int, int]] = []
    if device == "cuda":
        torch.cuda.empty_cache()
    before = on_device()  # this process's own
    with server(options, options.longest + options.new) as (address, pid):

        def one(i: int) -> tuple[int, list[int]]:
            number = i if i < options.compare else rng.randrange(options.prompts)
            new = options.new if number < options.compare else rng.randint(1, options.new)
            answer = ask(address, prompts[number], new)["token_ids"]
            return number, answer if len(answer) == new else []

        begun, tenth = time.perf_counter(), max(1, options.requests // 10)
        with ThreadPoolExecutor(options.at_once) as pool:
            for first in range(0, options.requests, tenth):
                for number, answer in pool.map(
                    one, range(first, min(first + tenth, options.requests))
                ):
                    missing += not answer
                    wrong += number < options.compare and differs(answer, own[number])
                done = min(first + tenth, options.requests)
                sizes.append((done, resident(pid), on_device() - before))
                print(
                    f"{done} requests, {time.perf_counter() - begun:.0f} s: {sizes[-1][1] / 1e6:.0f} MB held, "
                    f"{sizes[-1][2] / 1e6:.0f} MB on the GPU; {wrong} wrong, {missing} missing",
                    flush=True,
                )
    if options.utilization is not None and device == "cuda":
        part = max(x for *_, x in sizes) / torch.cuda.get_device_properties(0).total_memory
        print(
            f"the server held {part:.4f} of the GPU's memory at the most, {options.utilization} was stated"
        )
    half = sizes[(len(sizes) - 1) // 2]
    growth = [sizes[-1][i] / max(1, half[i]) for i in (1, 2)]
    print(f"memory at the end over that at half: {growth[0]:.3f}, on the GPU {growth[1]:.3f}")
    return not wrong and not missing and max(growth) < 1.05


def task(options: argparse.Namespace) -> bool:
    """Accuracy over HTTP and by kvfold's runtime, on the same prompts."""
    import torch

    from kvfold.compress.tasks import TASKS
    from kvfold.compress.tasks.generator import PairedGenerator, batches_of
    from kvfold.compress.tasks.task import Setting, cut_at
    from kvfold.pretrained import tokenizer_from_pretrained
    from kvfold.runtime.load import load_pretrained

    found = TASKS[options.task]
    tokenizer = tokenizer_from_pretrained(options.artifact)
    prompts = found.prompts(Setting(tokenizer, 4096, options.limit, options.task_data))
    longest = max(len(p.ids) for p in prompts) + found.max_new_tokens
    with server(options, longest) as (address, _), ThreadPoolExecutor(options.at_once) as pool:
        begun = time.perf_counter()
        texts = list(
            pool.map(
                lambda p: ask(address, p.ids, found.max_new_tokens, found.stops, False)["text"],
                prompts,
            )
        )
        print(f"over HTTP: {time.perf_counter() - begun:.0f} s", flush=True)
    model: Any = load_pretrained(options.artifact, dtype=getattr(torch, options.dtype))
    generator = PairedGenerator(model, tokenizer, 0.0, 0)
    own: dict[str, str] = {}
    begun = time.perf_counter()
    for batch in batches_of(prompts, options.at_once, found.max_new_tokens):
        answers = generator.generate(batch, "packed", found.max_new_tokens, found.stops)
        own |= {p.id: text for p, (text, _) in zip(batch, answers, strict=True)}
    print(f"by kvfold's runtime: {time.perf_counter() - begun:.0f} s")
    rows = [
        (found.judge(p, cut_at(text, found.stops)).correct, found.judge(p, own[p.id]).correct)
        for p, text in zip(prompts, texts, strict=True)
    ]
    same = sum(t.strip() == own[p.id].strip() for p, t in zip(prompts, texts, strict=True))
    lost, gained = sum(b and not a for a, b in rows), sum(a and not b for a, b in rows)
    print(
        f"{options.task}, {len(prompts)} prompts: {sum(a for a, _ in rows)} right over HTTP, "
        f"{sum(b for _, b in rows)} by kvfold's runtime; {lost} lost, {gained} gained; {same} texts the same"
    )
    return True


def main() -> None:
    """Prints figures as they come."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("artifact", type=Path)
    for name, usual in (
        ("requests", 10000), ("compare", 200), ("prompts", 400), ("longest", 300), ("new", 12), ("at-once", 32),
        ("port", 8123),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--utilization", type=float)
    parser.add_argument("--task")
    parser.add_argument("--task-data")
    options = parser.parse_args()
    sys.exit(not (task if options.task else soak)(options))


if __name__ == "__main__":
    main()
