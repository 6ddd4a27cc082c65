"""Instructions that attention takes for each packed token, read off the kernel compiled for sm_90.
Needs no GPU.

usage: python benchmarks/instructions.py [--prompt] [--mean] [k2v2|mixed|catalogue|k2v1.6|k4v4 …]

A loop is a run of code that a branch jumps back over and that holds no other; the first that
multiplies matrices is the one over packed tokens, of which a pass covers 128 of one KV head. Spills
are its loads and stores of local memory.
"""

import argparse
import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))
from compile_kernels import compile_pair
from triton import knobs

from kvfold.kernels.catalogue import key_formats, value_formats
from kvfold.kernels.formats import Format, uniform
from kvfold.kernels.gpu import attention as triton_attention
from kvfold.kernels.key_mean import padded_fast

DIM = 128
PAIRS = {
    "k2v2": (uniform(DIM, 4), uniform(DIM, 4)),
    "mixed": (Format(((32, 16), (16, 8), (32, 4), (32, 2), (16, 0))), uniform(DIM, 4)),
    "catalogue": (key_formats(DIM)[12], value_formats(DIM)[6]),
    "k2v1.6": (uniform(DIM, 4), uniform(DIM, 3)),
    "k4v4": (uniform(DIM, 16), uniform(DIM, 16)),
}
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")


def listing(cubin: bytes) -> str:
    """SASS and resource usage of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-sass", "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def packed_loop(sass: str) -> list[str]:
    """Operations of the loop over packed tokens: LOP3, IMAD, HMMA, …"""
    code = [(int(m[1], 16), m[2]) for line in sass.splitlines() if (m := INSTRUCTION.match(line))]
    loops = []
    for address, text in code:
        jump = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    for first, last in sorted(loops):
        if any(
            first <= low and high <= last for low, high in loops if (low, high) != (first, last)
        ):
            continue
        operations = [
            re.sub(r"^@!?U?P\d+\s+", "", text) for place, text in code if first <= place <= last
        ]
        names = [operation.split()[0].split(".")[0] for operation in operations]
        if "HMMA" in names:
            return names
    raise ValueError("no loop multiplies matrices")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", help=", ".join(PAIRS))
    parser.add_argument(
        "--prompt", action="store_true", help="the kernel of prompts, with 16 columns, not of steps"
    )
    parser.add_argument("--mean", action="store_true", help="keys that lack a rotating mean")
    options = parser.parse_args()
    mean = 2 * padded_fast(DIM) if options.mean else 0
    print(
        "| formats | instructions in the loop | a token | spills | registers | most frequent |\n"
        "|---|---|---|---|---|---|"
    )
    for name in options.pairs or PAIRS:
        if name not in PAIRS:
            parser.error(f"'{name}' is none of {', '.join(PAIRS)}")
        sass = listing(compile_pair(*PAIRS[name], options.prompt, mean=mean).asm["cubin"])
        loop = packed_loop(sass)
        found = re.search(r"REG:(\d+)", sass)
        assert found
        frequent = ", ".join(f"{op} {n}" for op, n in collections.Counter(loop).most_common(5))
        per_token = len(loop) / triton_attention.TILE_TOKENS
        spills = loop.count("LDL") + loop.count("STL")
        print(
            f"| {name} | {len(loop)} | {per_token:.1f} | {spills} | {found[1]} | {frequent} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
