"""The quick interpreter of these tests gives what Triton's own gives, to the bit."""

import prepared
import pytest
import torch

pytest.importorskip("triton")
from test_triton_attention import PAIRS, Case

from kvfold.kernels.formats import Format
from kvfold.kernels.gpu.encode import encode_pages
from kvfold.kernels.gpu.records import PageFormat
from kvfold.kernels.pages import page_address

if torch.cuda.is_available():
    pytest.skip("a GPU interprets nothing", allow_module_level=True)

NAMES = ["mixed keys", "ternary values", "6 and 16 bits"]


def results():
    """Attention over pages, and pages that kernels write, of formats that have every kind of
    code."""
    found = []
    for name in NAMES:
        case = Case(PAIRS[name], [45], 1, 1, 8)
        found.append(case.got(softcap=2.0, sliding=40))
        found.append(written(*PAIRS[name]))
    return found


def written(key: Format, value: Format):
    """The bytes of two pages of 8 tokens."""
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 1, 1, 16, 64, generator=generator).half()
    size = key.nbytes(8) + value.nbytes(8)
    room = torch.zeros(2, -(-size // 16) * 16, dtype=torch.uint8)
    ids = torch.tensor([page_address(row) for row in room])
    first = torch.tensor([0, 8], dtype=torch.int32)
    rows = torch.zeros(2, dtype=torch.int32)
    encode_pages(keys, values, PageFormat(key, value), ids, rows, first, page_tokens=8)
    return room


PLAIN = """
import sys, quick_interpreter, test_quick_interpreter as t, torch
from triton.runtime import interpreter
assert not isinstance(interpreter._patch_lang, quick_interpreter.Patches)
torch.save(t.results(), sys.argv[1])
"""


def test_results_are_those_of_tritons_own(tmp_path):
    done = prepared.python("kvfold", PLAIN, tmp_path / "plain")
    assert done.returncode == 0, done.stderr
    wanted = torch.load(tmp_path / "plain")
    for got, want in zip(results(), wanted, strict=True):
        assert torch.equal(got, want) and not got.float().isnan().any()
