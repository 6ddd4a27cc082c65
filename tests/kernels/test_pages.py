"""kernels.pages: the memory that block tables count from."""

import pytest
import torch

from kvfold.kernels import pages


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_anchor_can_be_written_whoever_asks_first(monkeypatch, mode):
    monkeypatch.setattr(pages, "_anchors", {})
    with mode():
        anchor = pages.anchor(torch.device("cpu"))
    assert not anchor.is_inference() and pages.anchor(torch.device("cpu")) is anchor
    anchor[:3] = 7
    assert anchor[:4].tolist() == [7, 7, 7, 0]


def test_an_entry_is_an_address(monkeypatch):
    memory = torch.zeros(1 << 12, dtype=torch.uint8)
    start = -memory.data_ptr() % pages.UNIT
    anchor = memory[start : start + 1024]
    monkeypatch.setattr(pages, "_anchors", {torch.device("cpu"): anchor})
    assert pages.page_address(anchor) == 0
    assert [pages.page_address(memory[start + n * pages.UNIT :]) for n in (1, 5)] == [1, 5]
