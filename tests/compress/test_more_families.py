"""Families beyond the nine that every other test goes through: each by one tiny model through the whole product."""

import pytest
from conftest import MORE_FAMILIES
from family_checks import BOUNDS, measure


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_a_family_is_what_its_row_says(family, tmp_path, monkeypatch):
    monkeypatch.setattr("kvfold.exports.writer.draw_plots", lambda folder, metadata: None)  # the same for all families
    found = measure(family, tmp_path)
    assert not {name: value for name, value in found.items() if not value <= BOUNDS.get(name, value)}
    assert found["kl"] > 0 and found["decode_kl"] > 0  # something was quantised
