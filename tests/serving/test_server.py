"""vLLM's HTTP server in processes of its own, with an artifact and drafts by n-grams."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from urllib.request import Request, urlopen

import pytest
from engine import Answer, assert_same, own, tokens

pytest_plugins = ("engine",)

WAIT = 240  # seconds until it answers
TEXT = tokens(30, 2) * 4  # repeats itself, so that n-grams are found
PROMPTS = [TEXT, tokens(200, 3), TEXT[:50]]
DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


def ask(url: str, **body) -> str:
    """The answer to a GET, or to a POST of JSON."""
    data = json.dumps(body).encode() if body else None
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=120) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def server(served_artifact, tmp_path_factory):
    """The URL of a server for the artifact."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served_artifact),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(16 << 20),
        "--speculative-config", json.dumps(DRAFTS),
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(log, "w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    url, begin = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            assert process.poll() is None and time.monotonic() < begin + WAIT, log.read_text()[
                -4000:
            ]
            try:
                ask(f"{url}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def complete(url: str, artifact, prompts: list[list[int]], new: int) -> list[Answer]:
    body = {
        "model": str(artifact), "prompt": prompts, "max_tokens": new, "temperature": 0, "logprobs": 1,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    choices = json.loads(ask(f"{url}/v1/completions", **body))["choices"]
    return [Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


def test_completions_are_the_runtimes(server, served_artifact):
    """Tokens of a tiny model are anybody's, so drafts are accepted and rejected alike."""
    expected = own(served_artifact, PROMPTS, 60)
    assert_same(complete(server, served_artifact, PROMPTS, 60), expected)
    assert_same(complete(server, served_artifact, PROMPTS, 60), expected)  # from its prefix cache
    text = ask(f"{server}/metrics")
    drafted, accepted, hits = (
        float(re.search(rf"^vllm:{name}_total{{.*}} (.*)$", text, re.MULTILINE)[1])
        for name in (
            "spec_decode_num_draft_tokens",
            "spec_decode_num_accepted_tokens",
            "prefix_cache_hits",
        )
    )
    assert drafted > accepted > 0 and hits >= 128


def test_a_text_is_continued(server, served_artifact):
    body = {
        "model": str(served_artifact),
        "prompt": "the cache of",
        "max_tokens": 8,
        "temperature": 0,
    }
    answer = json.loads(ask(f"{server}/v1/completions", **body))
    assert answer["usage"]["completion_tokens"] == 8 and answer["choices"][0]["text"]
