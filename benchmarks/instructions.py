"""Instructions that a decoding step's attention takes for each packed token, read off the kernel compiled for sm_90. Needs no GPU.

usage: python benchmarks/instructions.py [k2v2|mixed|k2v1.6|k4v4 …]

The loop over packed tokens is the longest run of code that a branch jumps back over; a pass covers 128 tokens of one KV head.
"""

import argparse
import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from compile_kernels import compile_pair
from triton import knobs

from kvfold.kernels import triton_attention
from kvfold.kernels.formats import Format, uniform

DIM = 128
PAIRS = {
    "k2v2": (uniform(DIM, 4), uniform(DIM, 4)),
    "mixed": (Format(((32, 16), (16, 8), (32, 4), (32, 2), (16, 0))), uniform(DIM, 4)),
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


def longest_loop(sass: str) -> list[str]:
    """Operations of the longest loop: LOP3, IMAD, HMMA, … Jumps back over another loop are not one: they come from code that is rarely
    run, which the compiler puts behind everything else."""
    code = [(int(m[1], 16), m[2]) for line in sass.splitlines() if (m := INSTRUCTION.match(line))]
    jumps = []
    for address, text in code:
        jump = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            jumps.append((int(jump[1], 16), address))
    inner = [(a, b) for a, b in jumps if not any(a <= c and d < b for c, d in jumps)]
    loops = [[text for place, text in code if first <= place <= last] for first, last in inner]
    operations = [re.sub(r"^@!?U?P\d+\s+", "", text) for text in max(loops, key=len)]
    return [operation.split()[0].split(".")[0] for operation in operations]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", help=", ".join(PAIRS))
    options = parser.parse_args()
    print("| formats | instructions in the loop | a token | registers | most frequent |\n|---|---|---|---|---|")
    for name in options.pairs or PAIRS:
        if name not in PAIRS:
            parser.error(f"'{name}' is none of {', '.join(PAIRS)}")
        sass = listing(compile_pair(*PAIRS[name]).asm["cubin"])
        loop = longest_loop(sass)
        found = re.search(r"REG:(\d+)", sass)
        assert found
        frequent = ", ".join(f"{op} {n}" for op, n in collections.Counter(loop).most_common(5))
        per_token = len(loop) / triton_attention.TILE_TOKENS
        print(f"| {name} | {len(loop)} | {per_token:.1f} | {found[1]} | {frequent} |", flush=True)


if __name__ == "__main__":
    main()
