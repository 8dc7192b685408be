"""Sheets: blocks of images under their captions."""

import numpy as np

from twinflow_jax import images


def test_a_caption_wider_than_its_block_moves_the_next_block():
    """One column of 8 pixels; under white paper only the second block is dark."""
    bright, dark = np.ones((2, 8, 8, 3)), -np.ones((2, 8, 8, 3))
    sheets = [
        np.asarray(images.sheet({caption: bright, "b": dark}, 1))
        for caption in ("a", "a caption that is much wider than its block of pictures" * 4)
    ]
    below = [sheet[60].max(axis=-1) for sheet in sheets]
    starts = [np.flatnonzero(columns < 50)[0] for columns in below]
    assert starts[0] < 300 and starts[1] > 1000
    assert all(sheet.shape[1] > start for sheet, start in zip(sheets, starts, strict=True))
