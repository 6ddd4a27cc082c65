"""Too little memory, by whatever limit, is one sentence that says how much was needed."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from conftest import NIGHTLY

from kvfold import KvfoldError, memory, runtime
from kvfold.compress.models import load_model
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.weights import weights_nbytes
from kvfold.memory import is_out_of_memory, memory_left, need_memory, reason_of_shortage


def test_what_does_not_fit_is_refused_before_it_is_read(tiny_folder, tiny_artifact, monkeypatch):
    need = weights_nbytes(tiny_folder, torch.float32)
    assert (
        need
        == 2 * weights_nbytes(tiny_folder, torch.bfloat16)
        > weights_nbytes(tiny_folder, "auto")
        > 0
    )
    monkeypatch.setattr(memory, "memory_left", lambda: (need - 1, "of a box"))
    for read in (
        lambda: load_model(tiny_folder, torch.float32, torch.device("cpu")),
        lambda: runtime.load_pretrained(tiny_artifact, device="cpu", dtype=torch.float32),
    ):
        with pytest.raises(
            KvfoldError, match=r"too little memory: .*weights alone, takes.*are left \(of a box\)"
        ):
            read()
    monkeypatch.setattr(memory, "memory_left", lambda: (need, "of a box"))
    load_model(tiny_folder, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(memory, "memory_left", lambda: None)
    need_memory(1 << 60, "anything")


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_of_the_control_groups_above_a_process(tmp_path, monkeypatch, version):
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    root = tmp_path if version == 2 else tmp_path / "memory"
    inner = root / "slice" / "job"
    inner.mkdir(parents=True)
    for folder, limit, used, cached in (
        (inner, "max", 5, 0),
        (inner.parent, 1000 << 20, 900 << 20, 30 << 20),
    ):
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 3\n{names[2]} {cached}\n")
    own = tmp_path / "own"
    own.write_text("0::/slice/job\n" if version == 2 else "3:cpu:/x\n2:memory:/slice/job\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN", own)
    assert memory._of_cgroups() == (130 << 20, "of 1000 MiB that its control group may have")
    (inner / names[0]).write_text(str(50 << 20))
    assert memory._of_cgroups() == ((50 << 20) - 5, "of 50 MiB that its control group may have")
    assert memory_left()[0] <= 50 << 20
    own.unlink()
    assert memory._of_cgroups() is None


@pytest.mark.parametrize(
    ("error", "words"),
    [(MemoryError(), "MemoryError"), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate "
      "64000000000 bytes. Error code 12"), "64000000000 bytes more were asked for"),
     (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 …"), "2.50 GiB more were"),
     (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "failed to map segment"),
     (OSError(12, "Cannot allocate memory"), "Cannot allocate memory")],
)  # fmt: skip
def test_what_errors_say(error, words):
    assert is_out_of_memory(error) and words in reason_of_shortage(error)
    assert not is_out_of_memory(ValueError("out of memory")) and not is_out_of_memory(
        RuntimeError("no such thing")
    )


def test_a_process_that_may_not_even_begin():
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 400000; exec "$0" -m kvfold --help', sys.executable],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("kvfold: there is too little memory to begin")
        and "1200 MiB" in done.stderr
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="no such limit")
@pytest.mark.parametrize("headroom", [1, 2, 4, 8, 12, 16, 24] if NIGHTLY else [4])
def test_a_run_that_meets_the_limit_goes_on_without_it(
    tmp_path, tiny_folder, tiny_artifact, text_file, recipe_file, headroom
):
    """With so many MiB more than the process has already; in a child, whose limit ends with it."""
    out = tmp_path / "tiny"

    def run(resume: bool) -> None:
        compress(
            str(tiny_folder),
            "4.0",
            out,
            calib=str(text_file),
            recipe=load_recipe(recipe_file),
            resume=resume,
        )

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "it ended well"
        try:
            torch.set_num_threads(1)  # the parent's pool of threads is none of the child's
            limit = memory._field("/proc/self/status", "VmSize:") + (headroom << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            run(resume=False)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as stream:
        said = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    if said != "it ended well":
        assert said.startswith(("KvfoldError", "Unfinished")) and "too little memory" in said, said
        assert "MiB are left" in said and "ulimit -v" in said
    run(resume=(tmp_path / "tiny.work").is_dir())
    assert (out / "kv_cache.json").read_bytes() == (tiny_artifact / "kv_cache.json").read_bytes()
