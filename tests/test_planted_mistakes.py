"""The mistakes that `make test-bite` plants still have a place to be planted."""

from pathlib import Path

import pytest
from plant_mistakes import MISTAKES

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mistake", MISTAKES)
def test_its_text_is_in_its_file(mistake):
    file, text, replacement = MISTAKES[mistake]
    assert text in (ROOT / file).read_text() and text != replacement
