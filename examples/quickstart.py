"""Generates through a packed cache: from an artifact, or from SmolLM2-135M, which it compresses
first.

python quickstart.py                              # compresses once, some minutes on two cores, then generates
python quickstart.py ARTIFACT --prompt "Once"     # an artifact's folder, or the Hub id of one
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from kvfold import runtime

DEFAULT = Path("artifacts/smollm2-135m-2.5")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example; `argv` as on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "artifact", nargs="?", default=str(DEFAULT), help="folder or Hub id (default: %(default)s)"
    )
    parser.add_argument("--prompt", default="The key-value cache of a language model")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    if args.artifact == str(DEFAULT) and not DEFAULT.exists():
        command = [
            sys.executable,
            "-m",
            "kvfold",
            "compress",
            "smollm2-135m",
            "--budget",
            "2.5",
            "--out",
            str(DEFAULT),
        ]
        subprocess.run(command, check=True)

    model = runtime.load_pretrained(
        args.artifact
    )  # on a GPU if there is one, with its Triton kernels
    tokenizer = AutoTokenizer.from_pretrained(args.artifact)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    out = model.generate(
        **inputs,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))

    cache = out.past_key_values  # a runtime.QuantizedKVCache, which is a transformers Cache
    packed = sum(sum(layer["pages"].values()) for layer in cache.report())
    print(
        f"{cache.get_seq_length()} tokens take {cache.nbytes:,} bytes; "
        f"{packed} pages are packed, the rest is in 16 bits."
    )
    account = (
        model.kv_artifact.metadata.account
    )  # first and latest tokens are never packed: long texts gain most
    print(
        f"{account.at} tokens would take {account.bytes:,} bytes, and {account.bytes_16bit:,} in 16 bits."
    )


if __name__ == "__main__":
    main()
