"""Families beyond the nine that every other test goes through: each by one tiny model through the
whole product."""

from pathlib import Path

import pytest
from conftest import FAMILIES, MORE_FAMILIES
from family_checks import BOUNDS, measure
from family_configs import OWN
from family_configs import TOWERS as TINY_TOWERS

from kvfold.exports.architectures import ARCHITECTURES, TOWERS
from kvfold.exports.refused import REFUSED


def test_every_row_has_a_tiny_model_and_a_line_on_the_page():
    page = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text(
        encoding="utf-8"
    )
    texts = {
        text for text, *_ in TINY_TOWERS.values()
    }  # language models that come with other towers
    rows = {*ARCHITECTURES, *TOWERS}
    assert set(TINY_TOWERS) == set(TOWERS) and {*FAMILIES, *OWN, *TINY_TOWERS} == {
        family for family in rows if family in (*FAMILIES, *OWN) or family not in texts
    }
    assert all(f"\n| `{family}` |" in page for family in (*FAMILIES, *OWN, *TINY_TOWERS))
    assert all(f"`{family}`" in page for family in REFUSED) and not rows & set(REFUSED)


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_a_family_is_what_its_row_says(family, tmp_path, no_plots):
    found = measure(family, tmp_path)
    assert not {
        name: value for name, value in found.items() if not value <= BOUNDS.get(name, value)
    }
    assert found["kl"] > 0 and found["decode_kl"] > 0  # something was quantised
