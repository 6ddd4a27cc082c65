"""One hash for each kernel that models launch: of its PTX for a GPU without debug lines and the
kernel's name. Needs no GPU.

usage: python benchmarks/kernel_hashes.py [--arch sm_90] [CASE …] > after.txt; diff before.txt after.txt

What changes names, files and lines, but no instruction, leaves every line as it was. Each line is a
case, a kernel and the hash; a kernel that several cases launch is compiled once. `--list` prints
the cases.
"""

import argparse
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(
    prefix="kernel-hashes-"
)  # nobody else may find what is compiled here
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import ASTSource, compile

from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.catalogue import named_keys, named_values
from kvfold.kernels.compile.build import CAPABILITIES, Job, function_of, jobs_of
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.runtime.generate.compile import Kind, launches_of

HEADS, KV_HEADS, SINKS, WINDOW = 8, 2, 4, 40


class Case(NamedTuple):
    """A layer, and how it is launched."""

    key: Format
    value: Format
    matrix: bool = False
    offset: bool = False
    turns: bool = False  # the mean rotates
    sliding: int = 0
    softcap: float | None = None
    sink_logits: bool = False
    progressive: bool = False
    page_tokens: int = 32
    clip: bool = False


def _named(dim: int, pair: str) -> tuple[Format, Format]:
    key, value = pair.split("/")
    return named_keys(dim)[key], named_values(dim)[value]


CASES = {
    "64 2 bits": Case(uniform(64, 4), uniform(64, 4)),
    "64 2 bits, clip, pages of 8": Case(uniform(64, 4), uniform(64, 4), clip=True, page_tokens=8),
    "64 mixed, ternary, mean": Case(*_named(64, "0.75b/1.6"), matrix=True, offset=True, turns=True),
    "64 mixed, sink logits": Case(*_named(64, "2a/2a"), matrix=True, offset=True, sink_logits=True),
    "64 mixed, progressive": Case(
        *_named(64, "1.5a/2"), matrix=True, offset=True, turns=True, progressive=True
    ),
    "64 ternary, 3 bits": Case(uniform(64, 3), uniform(64, 8, "fp16")),
    "64 groups": Case(uniform(64, 4, "e4m3", 32), uniform(64, 8, "e4m3", 16)),
    "64 16 and 8 bits": Case(raw16(64), uniform(64, 256, "fp16")),
    "64 6 and 16 bits, cap": Case(uniform(64, 64, "fp16"), raw16(64), softcap=30.0),
    "80 ternary symmetric": Case(Format(((80, 3),), "scale"), Format(((80, 3),), "scale")),
    "96 5 bits, pages of 128": Case(uniform(96, 16), uniform(96, 32, "fp16"), page_tokens=128),
    "128 mixed, mean": Case(*_named(128, "2a/2.5a"), matrix=True, offset=True, turns=True),
    "128 mixed, 2 bits": Case(*_named(128, "1.5a/2"), matrix=True, offset=True),
    "128 4 bits": Case(*_named(128, "4.5a/4")),
    "128 4 bits, uniform, sliding": Case(uniform(128, 16), uniform(128, 16), sliding=256),
    "256 mixed, sliding, cap": Case(
        *_named(256, "2a/1.5a"), matrix=True, offset=True, turns=True, sliding=256, softcap=50.0
    ),
    "256 ternary values, cap": Case(*_named(256, "2a/2"), matrix=True, offset=True, softcap=50.0),
    "256 6 and 3 bits": Case(*_named(256, "5a/3"), matrix=True, offset=True),
    "96 8 and 6 bits, mean, pages of 64": Case(
        uniform(96, 256, "fp16"), uniform(96, 64, "fp16"), offset=True, turns=True, page_tokens=64
    ),
}


def launches(case: Case) -> list[Any]:
    """What prompts and steps of a layer launch."""
    dim = case.key.head_dim
    matrix = torch.eye(dim).expand(KV_HEADS, dim, dim).contiguous() if case.matrix else None
    offset = torch.ones(KV_HEADS, dim) if case.offset else None
    clip = torch.ones(KV_HEADS) if case.clip else None
    frequencies = (1.0,) if case.turns else None
    key = KeySpec(case.key, matrix=matrix, offset=offset, clip=clip, frequencies=frequencies)
    kind = Kind(
        LayerSpec(key, ValueSpec(case.value, clip=clip)),
        case.sliding,
        case.softcap,
        case.sink_logits,
    )
    geometry = Geometry(KV_HEADS, dim, SINKS, WINDOW, case.page_tokens)
    return launches_of([kind], geometry, HEADS, torch.bfloat16, case.progressive)


def ptx_hash(job: Job) -> str:
    """Of the PTX without comments, debug lines and sections, and names of kernels and files."""
    source = ASTSource(function_of(job), job.signature, job.constants, job.attrs)
    ptx = compile(source, target=GPUTarget(*job.target), options=job.options).asm["ptx"]
    text = re.sub(r"//.*|^\s*\.(loc|file)\b.*", "", ptx.split("\t.section")[0], flags=re.MULTILINE)
    lines = (line.strip() for line in text.replace(job.name, "kernel").splitlines())
    return hashlib.sha256("\n".join(line for line in lines if line).encode()).hexdigest()[:16]


def hashes(names: list[str], arch: str) -> Iterator[str]:
    """Lines of the output, sorted within a case."""
    known: dict[str, str] = {}
    for name in names:
        lines = []
        for job in jobs_of(launches(CASES[name]), GPUTarget("cuda", CAPABILITIES[arch], 32)):
            if job.hash not in known:
                known[job.hash] = ptx_hash(job)
            lines.append(f"{name}: {job.name.strip('_')} {known[job.hash]}")
        yield from sorted(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="names, or beginnings of names; default: all"
    )
    parser.add_argument("--arch", default="sm_90", choices=CAPABILITIES)
    parser.add_argument(
        "--list", action="store_true", help="print the cases and how many kernels each launches"
    )
    options = parser.parse_args()
    names = [name for name in CASES if not options.cases or name.startswith(tuple(options.cases))]
    CUDABackend.make_cubin = lambda *args: b""  # PTX is enough: ptxas would take half the time
    if options.list:
        for name in names:
            print(
                f"{name}: {len(jobs_of(launches(CASES[name]), GPUTarget('cuda', CAPABILITIES[options.arch], 32)))}"
            )
        return
    for line in hashes(names, options.arch):
        print(line, flush=True)


if __name__ == "__main__":
    main()
