"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8, in its package, so nothing is downloaded.

Source: UCI ML "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998), its test part.
"""

from __future__ import annotations

import numpy as np

from stages.datasets.listing import Listing, list_arrays


def list_digits() -> Listing:
    """All digits in scikit-learn's order, which is their id; grey levels 0..16 become 0..255."""
    from sklearn.datasets import load_digits  # half a second that other sets need not pay

    digits = load_digits()
    levels = digits.images.astype(np.int64)
    images = ((levels * 255 + 8) // 16).astype(np.uint8)
    return list_arrays("digits", images, digits.target.astype(np.int64), whole=True)
