"""Data: from what a person points at to samples of a training and a validation half.

Nothing of torch is imported here: `open_data` looks and checks, `Data.train` and `Data.valid` make torch
datasets. This package knows images, arrays, classes and augmentation; it must not know what a model, a plan
or a stage is.
"""

from lehr.data.comparing import listing_differences
from lehr.data.images import read_image
from lehr.data.listing import Finding, Item, Listing
from lehr.data.opening import Data, digits_pretraining, open_data, reopened
from lehr.data.transforms import Transform

__all__ = [
    "Data",
    "Finding",
    "Item",
    "Listing",
    "Transform",
    "digits_pretraining",
    "listing_differences",
    "open_data",
    "read_image",
    "reopened",
]
