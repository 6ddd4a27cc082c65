"""A real artifact elsewhere: on a Hub and back, and in onnxruntime."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hub_server import Hub
from real_artifact import MODEL, command, greedy, prose

from kvfold import runtime

pytest_plugins = ("real_artifact",)
pytestmark = pytest.mark.real

# -- ONNX

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="pip install 'kvfold[onnx]'",
)
PROMPT = 300  # tokens: several pages behind sinks and window
NEW = 40  # more than a page


@needs_onnx
@torch.no_grad()
def test_onnxruntime_writes_the_runtimes_text(tmp_path):
    """compress → export onnx → onnxruntime, in pages of 8 bits, where a code that is rounded the
    other way is a small matter. The first here: it needs no artifact that another worker makes
    meanwhile."""
    from kvfold.exports.onnx.runner import OnnxRunner

    recipe = tmp_path / "eight.yaml"
    side = "{transform: none, levels: [256], clip: false}"
    recipe.write_text(
        f"window: 128\nkey: {side}\nvalue: {side}\ncalibration: {{num_sequences: 1, seq_len: 512}}\n"
        # there is one format to choose from
        "sensitivity: {num_sequences: 1, seq_len: 256, directions: 1, conversations: 0}\n"
    )
    eight, out = tmp_path / "eight", tmp_path / "graphs"
    command("compress", MODEL, "--budget", "9.5", "--recipe", recipe, "--out", eight)
    command("export", "onnx", eight, out)
    ids = prose(eight)[None, :PROMPT]
    model = runtime.load_pretrained(eight, device="cpu")
    assert {str(f.classes[0][1]) for pair in model.kv_artifact.formats for f in pair} == {"256"}
    wanted = greedy(model, ids, new=NEW)[0, PROMPT:].tolist()
    assert [int(token[0]) for token in OnnxRunner(out).generate(ids.numpy(), NEW)] == wanted


@pytest.fixture(scope="module")
def graphs(real_artifact, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx") / "graphs"
    command("export", "onnx", real_artifact, out)
    return out


@needs_onnx
@torch.no_grad()
def test_onnxruntime_goes_on_where_the_runtime_is(real_artifact, graphs):
    """On the runtime's own pages the graph gives its next logits: a key that float16 rounds to the
    other side may move them a little."""
    from kvfold.exports.onnx.runner import OnnxRunner

    model, runner = runtime.load_pretrained(real_artifact, device="cpu"), OnnxRunner(graphs)
    ids = prose(real_artifact)[None, : PROMPT + 40]
    cache = model(ids[:, :PROMPT]).past_key_values
    errors, agreed = [], 0
    for at in range(PROMPT, PROMPT + 40):
        logits, present = runner(
            ids[:, at : at + 1].numpy(), runner.cache_of(runtime.onnx_inputs(cache))
        )
        wanted = model(ids[:, at : at + 1], past_key_values=cache).logits[0, 0].numpy()
        errors.append(float(np.abs(logits[0, 0] - wanted).max()))
        agreed += int(logits.argmax() == wanted.argmax())
        grown = runtime.onnx_inputs(cache)
        for name, tensor in present.items():
            assert tensor.numpy().shape == grown[name].shape
    assert np.median(errors) < 1e-3 and max(errors) < 1e-2
    assert agreed >= 39


# -- Hub

GENERATE = """
import sys, torch
from kvfold import runtime
model = runtime.load_pretrained("someone/real", device="cpu")
ids = torch.tensor([[int(i) for i in sys.argv[1].split()]])
print(model.generate(ids, max_new_tokens=16, do_sample=False)[0].tolist())
"""


def test_measured_pushed_and_loaded_by_its_name(real_artifact, tmp_path):
    """compress → eval → push → load by id → the same text; the card's figures are what its command
    prints, from the Hub too."""
    from huggingface_hub import ModelCard

    results = tmp_path / "results.json"
    measure = ["--windows", 2, "--seq-len", 1024]
    command("eval", real_artifact, *measure, "--json", results, "--device", "cpu")
    hub = Hub()
    try:
        hub.add("someone/real")
        environment = hub.environment(tmp_path / "hf")
        command(
            "push",
            real_artifact,
            "someone/real",
            "--results",
            results,
            "--i-know",
            environment=environment,
        )
        repo = hub.repos["someone/real"]
        files = {name: file.content for name, file in repo.commits[repo.branches["main"]].items()}
        for path in real_artifact.iterdir():
            assert path.name == "README.md" or files[path.name] == path.read_bytes()
        card, figures = ModelCard(files["README.md"].decode()), json.loads(results.read_text())
        stated = {r.metric_name: r.metric_value for r in card.data.eval_results}
        assert (
            stated["KL divergence of the packed from the unquantised cache, nats"] == figures["kl"]
        )
        [printed] = re.findall(r"^`kvfold (eval .+)` prints row 1\.$", card.text, re.MULTILINE)
        again = tmp_path / "again.json"
        against = (
            ["--against", real_artifact] if "--against" in printed else []
        )  # a file of this machine
        words = re.sub(r"--against \S+", "", printed).split()
        command(*words, *against, "--json", again, "--device", "cpu", environment=environment)
        assert json.loads(again.read_text())["kl"] == pytest.approx(figures["kl"], rel=1e-3)

        ids = prose(real_artifact)[:200]
        wanted = runtime.load_pretrained(real_artifact, device="cpu").generate(
            ids[None], max_new_tokens=16, do_sample=False
        )
        done = subprocess.run(
            [sys.executable, "-c", GENERATE, " ".join(map(str, ids.tolist()))],
            env=environment | {"HF_HUB_OFFLINE": "1"},  # from the cache that eval has filled
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == wanted[0].tolist()
    finally:
        hub.shutdown()
