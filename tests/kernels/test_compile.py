"""What load_pretrained compiles ahead: the right kernels, under the key by which they are looked
up, in processes that leave nothing behind; and what happens where that goes wrong."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import prepared
import pytest
import torch

from kvfold import runtime
from kvfold.exports.account import Geometry
from kvfold.exports.reader import read_artifact
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, uniform

pytest.importorskip("triton")
from kvfold.kernels.compile.launch import launch, noting
from kvfold.kernels.gpu import attention as triton_attention
from kvfold.kernels.gpu import encode as triton_encode
from kvfold.runtime.backends import triton
from kvfold.runtime.budget.ladder import ladder
from kvfold.runtime.generate import compile as compilation

ROOT = Path(__file__).parent
GEOMETRY = Geometry(num_kv_heads=1, head_dim=16, sinks=3, window=9, page_tokens=8)
KEY, VALUE = Format(((8, 8), (8, 2))), uniform(16, 3)
SPEC = LayerSpec(
    KeySpec(KEY, matrix=torch.eye(16)[None], offset=torch.ones(1, 16)), ValueSpec(VALUE)
)
KIND = compilation.Kind(SPEC, 0, None, False)


@pytest.fixture
def calls(monkeypatch):
    """(rungs that attention reads, query tokens) and (formats before, after) of pages that go
    down."""
    read, lowered = [], []
    attend, lower = triton_attention.attention, triton_encode.lower_jobs

    def counted_attention(queries, cache, formats, *args, **options):
        read.append((formats, queries.tokens))
        return attend(queries, cache, formats, *args, **options)

    def counted_lower(work, **options):
        lowered.extend((step.old[:2], step.new[:2]) for step in work)
        return lower(work, **options)

    for module in (triton, triton_attention, triton_encode):
        for name, function in (("attention", counted_attention), ("lower_jobs", counted_lower)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)
    return read, lowered


def test_the_floor_needs_a_prompt_and_a_step(calls):
    assert compilation.launches_of([KIND], GEOMETRY, 2, torch.float32)
    read, lowered = calls
    assert {tokens > 1 for _, tokens in read} == {True, False} and not lowered
    assert all(list(formats) == [(KEY, VALUE)] for formats, _ in read)


def test_the_progressive_policy_needs_every_rung_and_way_down(calls):
    assert compilation.launches_of([KIND], GEOMETRY, 2, torch.float32, progressive=True)
    read, lowered = calls
    rungs = [(rung.key.format, rung.value.format) for rung in ladder(SPEC)]
    assert len(rungs) == 4
    assert {tokens > 1 for _, tokens in read} == {True, False} and all(
        list(formats) == rungs for formats, _ in read
    )
    assert set(lowered) >= {(rungs[i], rungs[j]) for i in range(4) for j in range(i)}


def test_noting_runs_nothing():
    class Kernel:
        def __getitem__(self, grid):
            raise AssertionError("it was started")

    with noting() as noted:
        launch(Kernel(), (1,), 2, SIZE=3)
        with noting() as inner:
            pass
        launch(Kernel(), (1,), 4)
    assert [(x.args, x.options) for x in noted] == [((2,), {"SIZE": 3}), ((4,), {})] and not inner
    with pytest.raises(AssertionError, match="it was started"):
        launch(Kernel(), (1,))


def test_a_model_on_a_cpu_has_nothing_to_compile(tiny_artifact):
    assert runtime.warm_up(runtime.load_pretrained(tiny_artifact)) == 0


def test_the_files_alone_say_what_a_model_launches(tiny_artifact):
    """kv_cache.json and config.json give the same launches as the layers' own tensors."""
    from transformers import AutoConfig

    artifact, config = read_artifact(tiny_artifact), AutoConfig.from_pretrained(tiny_artifact)
    kinds = compilation.kinds_of(artifact.specs, config)
    given = compilation.launches_of(
        kinds, artifact.geometry, config.num_attention_heads, config.dtype
    )
    found = compilation.artifact_launches(tiny_artifact, None, False, 132)
    assert len(found) == len(given)
    assert [x.options for x in found] == [x.options for x in given]


# -- with the compiler, in processes of their own: here kernels are the interpreter's --------------


def python(code: str, cache: Path) -> subprocess.CompletedProcess:
    """Runs code that may use what compile_ahead.py has, with a cache folder."""
    code = f"from compile_ahead import *\n{code}"
    done = prepared.python("compiler", code, env={"TRITON_CACHE_DIR": str(cache)}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def begin(code: str, cache: Path) -> prepared.Process:
    """The same, while it runs."""
    env = {"TRITON_CACHE_DIR": str(cache)}
    return prepared.start("compiler", code, env=env, cwd=ROOT, stdout=subprocess.PIPE)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(a folder of compiled kernels, what compiling them gave); don't write into it."""
    folder = tmp_path_factory.mktemp("built")
    return folder, json.loads(python("print(json.dumps(build()))", folder).stdout)


def test_kernels_are_found_under_the_key_they_are_looked_up_by(built):
    """Compiled ahead, then asked for as a launch asks, in a process whose kernels were hashed in
    another order: nothing is compiled."""
    folder, first = built
    assert first["compiled"] == first["count"] > 1 and not first["failed"]
    again = json.loads(python("print(json.dumps(build(reverse=True)))", folder).stdout)
    assert again["compiled"] == 0 and again["hashes"] == first["hashes"]
    looked_up = json.loads(python("print(json.dumps(launch_as_on_a_device()))", folder).stdout)
    assert (
        sorted(looked_up["hashes"]) == first["hashes"]
        and looked_up["hits"] == [True] * first["count"]
    )


def test_an_entry_that_is_not_whole_is_compiled_again(built, tmp_path):
    shutil.copytree(built[0], tmp_path, dirs_exist_ok=True)
    cubin = next(tmp_path.rglob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1])
    listing = next(x for x in tmp_path.rglob("__grp__*.json") if x.parent != cubin.parent)
    listing.write_text(listing.read_text()[:20])
    assert json.loads(python("print(json.dumps(build()))", tmp_path).stdout)["compiled"] == 2
    assert json.loads(python("print(json.dumps(build()))", tmp_path).stdout)["compiled"] == 0
    assert built[1]["count"] > 2


def test_a_folder_may_be_moved(tmp_path):
    python("build()", tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / "here")
    assert (
        json.loads(python("print(json.dumps(build()))", tmp_path / "here").stdout)["compiled"] == 0
    )
    assert not (tmp_path / "there").exists()


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    done = python("print(json.dumps(build(twice=True)))", tmp_path / "file" / "cache")
    found = json.loads(done.stdout)
    assert (
        found["compiled"] == found["count"]
        and not found["failed"]
        and found["built"] == [True] * found["count"]
    )
    assert done.stderr.count("can't be kept in") == 1
    assert not any(Path(path).exists() for path in found["spare"])


def test_a_disk_that_fills_up_costs_one_warning(tmp_path):
    done = python("fill_up(); print(json.dumps(build()))", tmp_path)
    found = json.loads(done.stdout)
    assert found["compiled"] == found["count"] and found["built"] == [True] * found["count"]
    assert done.stderr.count("No space left on device") == 1 and not list(tmp_path.rglob("tmp.*"))


def test_two_processes_compile_the_same_at_once(tmp_path):
    code = "from compile_ahead import *\nprint(json.dumps(build()))"
    both = [begin(code, tmp_path) for _ in range(2)]
    found = []
    for process in both:
        with process:
            found.append(json.loads(process.stdout.read()))
    assert all(x["built"] == [True] * x["count"] and not x["failed"] for x in found)
    assert json.loads(python("print(json.dumps(build()))", tmp_path).stdout)["compiled"] == 0


def test_a_kernel_that_does_not_compile_is_named(tmp_path):
    found = json.loads(python("print(json.dumps(build(broken=True)))", tmp_path).stdout)
    assert found["compiled"] == found["count"] - 2
    (crashed, signalled), (broken, reason) = sorted(
        found["failed"].items(), key=lambda x: "broken" in x[0]
    )
    assert crashed.startswith("crashing") and "SIGABRT" in signalled
    assert broken.startswith("broken") and "not_there" in reason


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_caller_ends(tmp_path, number):
    # a shell's background job is told to ignore Ctrl-C
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = heard + "from compile_ahead import *\nbuild(endless=True)"
    with begin(code, tmp_path) as caller:
        server = int(caller.stdout.readline())
        while len(members(server)) < 2:  # the server and a compiler
            time.sleep(0.05)
        caller.send_signal(number)
        caller.wait()
    end = time.monotonic() + 30
    while members(server) and time.monotonic() < end:
        time.sleep(0.05)
    assert not members(server)


def members(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended
            continue
        if int(sid) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_the_reference_takes_over(tiny_artifact, monkeypatch, caplog):
    """Where a kernel can't be compiled: said, and the results are those of the reference."""
    from types import SimpleNamespace

    job = SimpleNamespace(label="some_kernel[0123](N=8)")
    builder = SimpleNamespace(failed=[(job, "PTXASError: no")], lost=0, wait=lambda: None)
    found = compilation.Compilation([], None, torch.device("cpu"))
    found.builder, found.jobs = builder, [job]
    monkeypatch.setattr("kvfold.runtime.load.choose_triton", lambda *args: True)
    monkeypatch.setattr("kvfold.runtime.load.begin_folder", lambda *args: found)
    ids = torch.arange(1, 90)[None]
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    assert (
        "1 of 1 kernels can't be compiled, some_kernel[0123](N=8) first: PTXASError: no"
        in caplog.text
    )
    assert not model.kv_triton
    monkeypatch.undo()
    plain = runtime.load_pretrained(tiny_artifact, device="cpu", attention="reference")
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    monkeypatch.setattr("kvfold.runtime.load.choose_triton", lambda *args: True)
    monkeypatch.setattr("kvfold.runtime.load.begin_folder", lambda *args: found)
    with pytest.raises(ValueError, match=r"attention='triton' can't be used: 1 of 1 kernels"):
        runtime.load_pretrained(tiny_artifact, device="cpu", attention="triton")


def test_a_load_that_fails_ends_its_compilers(tiny_artifact):
    stopped = []

    class Builder:
        def stop(self):
            stopped.append(self)

    with pytest.raises(KeyboardInterrupt), compilation.compiling():
        compilation._begun.get().append(Builder())
        raise KeyboardInterrupt
    assert len(stopped) == 1 and compilation._begun.get() is None


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["build"], "Nothing says which kernels to compile"),
        (["list", "DIR", "--arch", "sm_1"], "--arch 'sm_1'"),
        (["list", "DIR", "--dtype", "int8"], "--dtype 'int8'"),
        (["list", "DIR", "--policy", "none"], "--policy 'none'"),
        (["build", "--catalogue", "--head-dim", "x"], "--head-dim x"),
        (["list", "DIR"], "TRITON_INTERPRET=1"),
    ],
)
def test_the_command_refuses(options, fault, tiny_artifact, capsys, monkeypatch):

    from kvfold.compress.cli import main

    monkeypatch.setenv(
        "TRITON_INTERPRET", "1"
    )  # the knob itself, once set, would not go by the environment any more
    with pytest.raises(SystemExit) as stopped:
        main(
            ["kernels", *(str(tiny_artifact) if option == "DIR" else option for option in options)]
        )
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and fault in error and error.count("\n") == 1


def test_the_command_lists_what_an_artifact_needs(tiny_artifact, tmp_path):
    code = f"from kvfold.compress.cli import main; main(['kernels', 'list', {str(tiny_artifact)!r}, '--json'])"
    found = json.loads(python(code, tmp_path).stdout)
    hashes = [kernel["hash"] for kernel in found["kernels"]]
    assert len(hashes) == len(set(hashes)) > 4 and not any(
        kernel["compiled"] for kernel in found["kernels"]
    )
    assert found["folder"] == str(tmp_path)
