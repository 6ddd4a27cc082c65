"""The catalogue's kernels, compiled behind those of the first artifact: they are the ones that the
next artifact asks for, and the process that compiles them ends with its caller."""

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import prepared
import pytest
import torch
from conftest import NIGHTLY, TINY_RECIPE

from kvfold import runtime
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe

pytest.importorskip("triton")
from kvfold.kernels import catalogue
from kvfold.runtime.generate import ahead
from kvfold.runtime.generate.compile import launches_of, read_kinds

# an artifact of six pairs in one process, the catalogue by another artifact of one pair: keys of
# Triton's cache of both
COVERED = """
import json, torch
from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels import catalogue
from kvfold.kernels.compile.build import jobs_of, target_of
from kvfold.runtime.generate.ahead import catalogue_kinds
from kvfold.runtime.generate.compile import Kind, launches_of
def kind(key, value):
    basis = dict(matrix=torch.eye(64)[None].contiguous(), offset=torch.ones(1, 64), frequencies=(1.0,)) \
if key.params != "none" else {}
    clip = torch.ones(1) if key.params == "scale_min" else None
    return Kind(LayerSpec(KeySpec(key, clip=clip, **basis), ValueSpec(value)), 0, None, False)
geometry = Geometry(1, 64, 64, 128, 32)
def hashes(kinds):
    return {job.hash: job.name for job in \
jobs_of(launches_of(kinds, geometry, 4, torch.bfloat16, PROGRESSIVE), target_of("sm_90"))}
pairs = catalogue.pairs(64)
own, others = pairs[3], pairs[-4:]
if not NIGHTLY:  # a shorter list, in which theirs must be all the same
    catalogue.pairs = lambda head_dim: (own, *others)
first, second = hashes([kind(*own)]), hashes([kind(*pair) for pair in others])
listed = hashes(catalogue_kinds([kind(*own)]))
print(json.dumps([len(second), [name for x, name in second.items() if x not in listed], \
[n for x, n in first.items() if x not in listed]]))
"""


@pytest.mark.parametrize("progressive", [False, True])
def test_another_artifacts_kernels_are_all_among_the_catalogues(progressive):
    code = COVERED.replace("PROGRESSIVE", str(progressive)).replace("NIGHTLY", str(NIGHTLY))
    done = prepared.python("compiler", code)
    assert done.returncode == 0, done.stderr
    count, missing, own = json.loads(done.stdout)
    assert count > 8 and not missing and not own


def test_pairs_are_the_catalogues_formats_at_every_head_dim():
    for dim in catalogue.HEAD_DIMS:
        found = catalogue.pairs(dim)
        assert len(found) == len(set(found)) == len(catalogue.PAIRS)
        assert all(
            k in catalogue.key_formats(dim) and v in catalogue.value_formats(dim) for k, v in found
        )
        sizes = [k.payload_bits + v.payload_bits for k, v in found]
        smallest = [
            min(f.payload_bits for f in formats(dim))
            for formats in (catalogue.key_formats, catalogue.value_formats)
        ]
        assert min(sizes) == sum(smallest) and max(sizes) == 32.0
    assert catalogue.pairs(72) == ()


def task(folder: Path) -> dict:
    return {
        "folder": str(folder),
        "dtype": None,
        "progressive": False,
        "arch": 90,
        "multiprocessors": 132,
    }


def test_an_artifact_without_the_catalogues_pairs_has_its_own_compiled(tiny_artifact, monkeypatch):
    """For drafts; on a CPU nothing is started."""
    model = read_kinds(tiny_artifact, None)
    assert ahead.wanted_kinds(model.kinds) == model.kinds
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started")
    )
    ahead.begin_ahead(tiny_artifact, torch.device("cpu"), None, False)
    assert runtime.load_pretrained(tiny_artifact).kv_triton in (False, True)


def test_stamps_tell_apart_what_was_compiled(tiny_artifact, plain_artifact):
    tasks = [task(tiny_artifact), task(plain_artifact), {**task(tiny_artifact), "arch": 80}]
    assert len({ahead.stamp(x) for x in tasks}) == 3
    assert ahead.stamp(tasks[0]) == ahead.stamp(task(tiny_artifact))


def test_drafts_take_kernels_of_their_own(tiny_artifact):
    """For which the first answer does not wait."""
    model = read_kinds(tiny_artifact, None)
    geometry = replace(model.geometry, sinks=64, window=128, page_tokens=32)
    found = [
        launches_of(model.kinds, geometry, model.num_heads, model.dtype, drafts=drafts)
        for drafts in (True, False)
    ]
    prompts = [[x for x in launches if x.options.get("PROMPT")] for launches in found]
    assert prompts[0] and not prompts[1] and len(found[1]) < len(found[0])


MAIN = """
import sys
from pathlib import Path
from kvfold.runtime.generate import ahead
ahead.wanted_kinds = lambda kinds: list(kinds)[:1]
ahead.stamp = lambda task: Path(sys.argv[2])
ahead.main(sys.argv[1])
"""


@pytest.fixture(scope="module")
def plain_artifact(tmp_path_factory, tiny_folder, text_file):
    """One of two formats of one class each, whose kernels are soon compiled; those of the others
    are compiled in test_triton_attention.py."""
    folder = tmp_path_factory.mktemp("plain")
    side = "{transform: none, levels: [4], clip: false}"
    (folder / "recipe.yaml").write_text(f"{TINY_RECIPE}key: {side}\nvalue: {side}\n")
    recipe = load_recipe(folder / "recipe.yaml")
    out = folder / "out"
    options = {"calib": str(text_file), "recipe": recipe, "accept_loss": True}
    return compress(str(tiny_folder), "6.0", out, **options).path


def start(folder: Path, cache: Path) -> prepared.Process:
    return prepared.start(
        "compiler", MAIN, json.dumps(task(folder)), cache / "stamp",
        env={"TRITON_CACHE_DIR": str(cache)}, stdin=subprocess.PIPE, session=True,
    )  # fmt: skip


def test_all_is_compiled_and_stamped(plain_artifact, tmp_path):
    (tmp_path / "cache").mkdir()
    with start(plain_artifact, tmp_path / "cache") as process:
        assert process.wait(600) == 0
    assert (tmp_path / "cache" / "stamp").is_file() and len(list(tmp_path.rglob("*.cubin"))) > 4


def test_it_ends_with_its_caller(plain_artifact, tmp_path):
    (tmp_path / "cache").mkdir()
    with start(plain_artifact, tmp_path / "cache") as process:
        process.stdin.close()
        assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "cache" / "stamp").exists()
