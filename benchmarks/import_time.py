"""Processor time of `import kvfold.runtime`: what of it is PyTorch's, transformers' and kvfold's own.

usage: python benchmarks/import_time.py [--runs 5]

The least of several fresh processes. PyTorch and the part of transformers that kvfold.runtime needs
are imported first; what kvfold adds, pydantic included, is its own.
"""

import argparse
import json
import subprocess
import sys

CODE = """
import json, sys, time
def took(names):
    start = time.process_time()
    for name in names:
        __import__(name)
    return time.process_time() - start
parts = {"torch": took(["torch"]), "transformers": took(TRANSFORMERS)}
known, begun = set(sys.modules), time.process_time()
__import__("kvfold.runtime")
parts["kvfold"] = time.process_time() - begun
added = sorted(set(sys.modules) - known)
print(json.dumps([parts, added]))
"""
# of transformers, what kvfold.runtime imports
NEEDED = ["transformers.cache_utils", "transformers.generation", "transformers.modeling_utils"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    code = CODE.replace("TRANSFORMERS", repr(NEEDED))
    found = []
    for _ in range(options.runs):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout))
    print("| | seconds of one core |\n|---|---|")
    for name in found[0][0]:
        print(f"| {name} | {min(parts[name] for parts, _ in found):.2f} |")
    kinds = [name.partition(".")[0] for name in found[0][1]]
    print(
        f"kvfold's part: {len(kinds)} modules, "
        + ", ".join(
            f"{kinds.count(kind)} of {kind}" for kind in sorted(set(kinds), key=kinds.count)[:-6:-1]
        )
    )


if __name__ == "__main__":
    main()
