"""Several processes give the artifact of one to the byte, and end as one."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import char_tokenizer, examples, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from several import several

from kvfold.compress import launch
from kvfold.compress.messages import pack, unpack
from kvfold.compress.pipeline import compress
from kvfold.compress.processes import Processes
from kvfold.compress.recipe import Recipe, load_recipe
from kvfold.errors import KvfoldError
from kvfold.exports.spec import KeySpec
from kvfold.kernels.formats import Format

SHARED = """
window: 24
page_tokens: 8
sinks: 3
calibration: {num_sequences: 5, seq_len: 256, sample_tokens: 128}
"""
RECIPES = {
    "fisher": "sensitivity: {num_sequences: 3, seq_len: 192, directions: 2, conversations: 2}\n",
    "kl": "sensitivity: {method: kl, num_sequences: 3, seq_len: 192, conversations: 0}\n",
    "first-order": "sensitivity: {method: first-order, num_sequences: 3, seq_len: 192}\n"
    "value: {transform: rotate}\n",
}
CHAT = "<user>{{ messages[0].content }}\n<assistant>"
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory) -> Path:
    """A tiny Llama whose tokenizer has a chat template, so that it is probed on conversations."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    tiny_model("llama", torch.bfloat16).save_pretrained(folder)
    tokenizer = char_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(SHARED + text)
    return {name: folder / f"{name}.yaml" for name in RECIPES}


@pytest.fixture(scope="module")
def of_one(tmp_path_factory, chat_folder, recipes, text_file) -> dict[str, Path]:
    """One process's artifact of each recipe, each in a folder `tiny`; don't write into them."""
    found = {}
    for name, recipe in recipes.items():
        out = found[name] = tmp_path_factory.mktemp(name) / "tiny"
        compress(
            str(chat_folder), "4.0", out, calib=str(text_file), recipe=load_recipe(recipe),
            device="cpu",
        )  # fmt: skip
    return found


def options(out, text_file, recipe, *more) -> list[str]:
    words = ["--budget=4.0", f"--out={out}", f"--calib={text_file}", f"--recipe={recipe}"]
    return [*words, "--device=cpu", *more]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sentences(done: list[subprocess.CompletedProcess]) -> list[str]:
    """What was said to be wrong, by any."""
    assert not any("Traceback" in x.stderr for x in done), [x.stderr for x in done]
    stages = r"kvfold: (finding|reading|writing|measuring|choosing|warning)"
    lines = [line for x in done for line in x.stderr.splitlines() if line.startswith("kvfold:")]
    return [line for line in lines if not re.match(stages, line)]


def test_torchrun_gives_the_artifact_of_one_process(
    tmp_path, tiny_folder, tiny_artifact, text_file, recipe_file
):
    """On two processes, of which one has no passage to probe."""
    out = tmp_path / "tiny"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = ["--nproc-per-node=2", "-m", "kvfold", "compress", str(tiny_folder)]
    done = subprocess.run(
        [*torchrun, *command, *options(out, text_file, recipe_file)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:6000]
    assert files_of(out) == files_of(tiny_artifact)
    assert done.stdout.splitlines()[-1] == str(out) and done.stdout.count(str(out)) == 1
    assert done.stderr.count("kvfold: reading") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_those_that_find_nothing_to_do_wait(
    tmp_path, tiny_folder, tiny_artifact, text_file, recipe_file
):
    """Two sequences and one passage, of three processes."""
    words = ["compress", tiny_folder, *options(tmp_path / "tiny", text_file, recipe_file, "--json")]
    done = several(3, tmp_path / "said", *words)
    assert [x.returncode for x in done] == [0] * 3, [x.stderr for x in done]
    assert files_of(tmp_path / "tiny") == files_of(tiny_artifact)
    assert json.loads(done[0].stdout)["artifact"] == str(tmp_path / "tiny")
    assert not any(x.stdout or "kvfold" in x.stderr for x in done[1:])


SEVERAL_RUNS = """
import sys
from pathlib import Path
import torch
from kvfold.compress.launch import join
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
torch.set_flush_denormal(True)
model, text, out, *recipes = sys.argv[1:]
with join("cpu") as device:
    for recipe, memory in [(x, None) for x in recipes] + [(recipes[0], 1000)]:
        folder = Path(out) / (Path(recipe).stem if memory is None else "streamed") / "tiny"
        found = compress(model, "4.0", folder, calib=text, recipe=load_recipe(recipe),
                         device=device, max_memory=memory)
        again = [x.key.matrix is None or bool(x.key.matrix.isfinite().all()) for x in found.specs]
        print(found.path, found.metadata.calibration.kl, all(again))
"""


@pytest.mark.parametrize("size", [2, 3])
def test_every_way_to_measure_gives_the_artifact_of_one_process(
    size, tmp_path, chat_folder, recipes, text_file, of_one
):
    """An odd number of sequences and passages, conversations among them, and layers read from
    their files one by one."""
    out = tmp_path / "out"
    chosen = list(recipes) if size == 2 else ["fisher"]
    done = several(
        size, tmp_path / "said", chat_folder, text_file, out, *(recipes[x] for x in chosen),
        code=SEVERAL_RUNS,
    )  # fmt: skip
    assert [x.returncode for x in done] == [0] * size, [x.stderr for x in done]
    for name in chosen:
        assert files_of(out / name / "tiny") == files_of(of_one[name]), name
    assert files_of(out / "streamed" / "tiny") == files_of(of_one["fisher"])
    assert all(x.stdout == done[0].stdout for x in done) and "True" in done[0].stdout
    assert "writing 2 answers" in done[0].stderr and "layer by layer" in done[0].stderr
    assert not any("kvfold" in x.stderr for x in done[1:])


FAILING = """
import os, signal, sys
from kvfold.compress.processes import Processes
from kvfold.errors import KvfoldError
who, left, how = int(sys.argv.pop(1)), [int(sys.argv.pop(1))], sys.argv.pop(1)
real = Processes.gather
def gather(self, value):
    left[0] -= 1
    if self.rank == who and left[0] == 0:
        if how == "says":
            raise KvfoldError("The disk of this one is full.")
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGINT)
    return real(self, value)
Processes.gather = gather
from kvfold.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("who", "how", "codes", "said"),
    [
        (1, "says", [2, 2, 2], "kvfold: The disk of this one is full."),
        (0, "says", [2, 2, 2], "kvfold: The disk of this one is full."),
        (2, "killed", [2, 2, -signal.SIGKILL], "kvfold: Another of the 3 processes has ended"),
        (1, "interrupted", [2, 130, 2], "kvfold: interrupted; run the same command with --resume"),
    ],
)  # fmt: skip
def test_one_that_fails_ends_all_with_one_sentence(
    who, how, codes, said, tmp_path, chat_folder, recipes, text_file, of_one
):
    out = tmp_path / "tiny"
    words = ["compress", chat_folder, *options(out, text_file, recipes["fisher"])]
    done = several(3, tmp_path / "said", who, 12, how, *words, code=FAILING)
    assert [x.returncode for x in done] == codes, [x.stderr for x in done]
    (sentence,) = sentences(done)
    assert sentence.startswith(said)
    left = sorted(p.name for p in tmp_path.iterdir())
    if (who, how) == (0, "says"):  # bad input leaves nothing behind
        assert left == ["said"]
        return
    assert left == ["said", "tiny.work"]
    if how == "killed":  # fewer go on with what is there
        again = several(2, tmp_path / "again", *words, "--resume")
        assert [x.returncode for x in again] == [0, 0], [x.stderr for x in again]
        assert files_of(out) == files_of(of_one["fisher"])


OTHER = """
import sys
from kvfold.__main__ import main
if rank:
    sys.argv += EXTRA
main()
"""


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--budget=5.0"], "--budget is '5.0' in process 1 and '4.0' in process 0"),
        (["--seed=1"], "The recipe, by its sha256, is "),
        (["--calib=TEXT"], "--calib is 'TEXT' in process 1"),
        (["--device=cuda:0"], "--device 'cuda:0' is one device for all 2 processes"),
    ],
)
def test_processes_of_different_runs_are_refused(
    extra, said, tmp_path, tiny_folder, text_file, recipe_file
):
    words = ["compress", tiny_folder, *options(tmp_path / "tiny", text_file, recipe_file)]
    if "cuda" in extra[0]:  # in all, or the others would wait for it
        words, extra = [*words, *extra], []
    done = several(2, tmp_path / "said", *words, code=OTHER.replace("EXTRA", repr(extra)))
    assert [x.returncode for x in done] == [2, 2]
    assert sentences(done)[0].startswith(f"kvfold: {said}")
    assert len(sentences(done)) == (1 if extra else 2)
    assert [p.name for p in tmp_path.iterdir()] == ["said"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
         "RANK=2, WORLD_SIZE=2 is no numbering"),
        ({"WORLD_SIZE": "many", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
         "WORLD_SIZE=many is no numbering"),
    ],
)  # fmt: skip
def test_variables_that_a_launcher_would_not_set(monkeypatch, variables, said):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KvfoldError, match=said), launch.join("cpu"):
        raise AssertionError("it began")


def test_nobody_who_comes_is_said(monkeypatch):
    for name, value in zip(LAUNCHER, ("2", "1", "1", "2", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "COMING", launch.timedelta(seconds=1))
    with pytest.raises(KvfoldError, match=r"'127\.0\.0\.1:1'"), launch.join("cpu"):
        raise AssertionError("it began")
    assert Processes.current().size == 1


def test_a_single_process_waits_for_nobody(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for size in (None, "1"):
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with launch.join("cuda:3") as device:  # refused later, where it is used
            assert device == "cuda:3" and Processes.current() == Processes()


def test_each_process_has_a_device_of_its_own(monkeypatch):
    third = Processes(rank=6, size=8, local_rank=2, local_size=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launch.own_device(third, "auto") == launch.own_device(third, "cuda") == "cuda:2"
    assert launch.own_device(third, "cpu") == "cpu"
    assert launch.own_device(Processes(), "auto") == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(KvfoldError, match="need 4 CUDA devices, one each, but it has 3; start 3"):
        launch.own_device(third, "auto")


@dataclass
class Table:
    """What threads that stand for processes lay down for each other."""

    size: int
    values: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values, self.all_here = [None] * self.size, threading.Barrier(self.size)


@dataclass(frozen=True)
class Thread(Processes):
    table: Any = None

    def _exchange(self, value: object) -> list:
        self.table.values[self.rank] = value
        self.table.all_here.wait(30)
        found = list(self.table.values)
        self.table.all_here.wait(30)
        return found

    def gather(self, value):
        found = self._exchange(value)
        return found if self.first else []

    def broadcast(self, value):
        return self._exchange(value)[0]


def in_threads(size: int, run) -> list:
    """What `run` gives for each of `size` processes."""
    table = Table(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: run(Thread(rank, size, table=table)), range(size)))


@settings(deadline=None, max_examples=examples(100))
@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=12))
def test_items_come_in_their_order_each_from_the_one_that_has_it(size, costs):
    ran: list[tuple[int, int]] = []

    def run(processes):
        share = processes.share(costs)

        def compute(i: int) -> tuple[int, int]:
            ran.append((i, processes.rank))
            return i, processes.rank

        return share.own, list(share.map(compute)), share.all(lambda i: i * i)

    found = in_threads(size, run)
    owners = {i: rank for rank, (own, _, _) in enumerate(found) for i in own}
    assert sorted(owners) == list(range(len(costs))) and sorted(ran) == sorted(owners.items())
    assert found[0][1] == [(i, owners[i]) for i in range(len(costs))]
    assert all(mapped == [] for _, mapped, _ in found[1:])
    assert all(every == [i * i for i in range(len(costs))] for _, _, every in found)
    loads = [sum(costs[i] for i in own) for own, _, _ in found]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert all(own == sorted(own) for own, _, _ in found)


def test_equal_items_go_round():
    """So that process 0 adds them up as they come, and none waits in its memory."""
    assert Processes(size=3).share([7] * 8).owners == [2, 1, 0, 2, 1, 0, 2, 1]
    assert Processes().share([7] * 3).own == [0, 1, 2]


numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
values = st.recursive(
    numbers,
    lambda x: st.one_of(
        st.lists(x), st.lists(x).map(tuple), st.dictionaries(st.text() | st.integers(), x)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=examples(200))
@given(values)
def test_what_is_sent_arrives(value):
    found = unpack(pack(value))
    assert found == value and repr(found) == repr(value)  # repr: 1 and True, (…) and […]


def test_tensors_arrive_as_they_lie_in_memory():
    base = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sent = [base, base.mT, base.permute(2, 0, 1), base[:, :2].contiguous(), base[0, 0, 0],
            torch.zeros(0, 3), torch.tensor([True]), torch.arange(3), base.bfloat16()]  # fmt: skip
    for a, b in zip(sent, unpack(pack(sent)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) and a.stride() == b.stride()
    spec = KeySpec(Format(((8, 4),)), ("mean",), base.float().mT, frequencies=(0.1, 1 / 3))
    found = unpack(pack({"spec": spec}))["spec"]
    assert isinstance(found, KeySpec) and torch.equal(found.matrix, spec.matrix)
    for name in ("format", "transforms", "frequencies", "offset"):
        assert getattr(found, name) == getattr(spec, name)
    with pytest.raises(TypeError, match="Recipe"):
        pack([Recipe()])


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.Popen",
        "kvfold.compress.messages.Path",
        "kvfold.version.__version__",
        "os.system",
    ],
)
def test_nothing_else_is_called_by_its_name(name):
    text = json.dumps(["object", name, ["args", "touch /tmp/nothing"]]).encode()
    sent = save({"rest": torch.frombuffer(bytearray(text), dtype=torch.uint8)})
    with pytest.raises((TypeError, AttributeError), match=r"no dataclass of kvfold's|no attribute"):
        unpack(sent)
