"""Fixtures of the tests of data_prep."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers.slide_files import KIDNEY


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    """A real picture, 200 x 300, neither square nor a multiple of a tile."""
    with Image.open(KIDNEY) as picture:
        return np.asarray(picture)[100:300, 200:500].copy()
