"""The built-in data: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, grey.

`digits` is the classes 5 to 9 with few labels; the classes 0 to 4 are there to pretrain a backbone on, so
that no image is in both.
"""

from __future__ import annotations

import numpy as np

from lehr.data.arrays import Arrays, items_of
from lehr.data.listing import Item

PER_CLASS = 5  # labels of each class that `digits` trains on


def load_digits_few() -> Arrays:
    """The classes "5" to "9": the first five of each to train on; all the rest to validate.

    Which images are labelled matters more here than all else, so it is the same for every seed.
    """
    arrays = digits_of(range(5, 10))
    by_class = [
        [item for item in arrays.train if item.label == label] for label in range(len(arrays.classes))
    ]
    train = tuple(item for items in by_class for item in items[:PER_CLASS])
    valid = tuple(item for items in by_class for item in items[PER_CLASS:])
    split = f"the first {PER_CLASS} images of each class train, all others validate"
    return Arrays(arrays.pixels, arrays.classes, train, valid, split=split)


def digits_of(classes: range) -> Arrays:
    """All digits of `classes`, none held out.

    `pixels["digits"]` is uint8 (images, 8, 8) of all ten classes; `train` lists the rows of the wanted ones.

    >>> len(digits_of(range(5)).train), digits_of(range(5)).classes
    (901, ('0', '1', '2', '3', '4'))
    """
    from sklearn.datasets import (
        load_digits,
    )  # here, because importing it takes longer than all else in this package

    bundle = load_digits()
    pixels = np.rint(bundle.images * (255 / 16)).astype(np.uint8)  # its pixels go from 0 to 16
    wanted = [item for item in items_of("digits", bundle.target.tolist()) if item.label in classes]
    items = tuple(Item(item.path, item.label - classes.start) for item in wanted)
    return Arrays({"digits": pixels}, tuple(str(digit) for digit in classes), items, None)
