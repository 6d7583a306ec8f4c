"""Rows to read."""

import numpy as np
import pytest

from tests.helpers.row_sources import ROWS


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 2))
    return x, 1 + x @ [2.0, -1.0] + 0.5 * rng.normal(size=ROWS)
