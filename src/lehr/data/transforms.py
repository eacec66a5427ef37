"""What happens between an image and the tensor a model sees, as a frozen value that a run directory can keep.

This file holds words and numbers; `augment.py` does the work, and only it imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from lehr.errors import DataError, RecipeError, nearest

if TYPE_CHECKING:
    from lehr.data.augment import Pipeline

AUGMENTS = ("color", "crop", "erase", "flip", "shift", "trivial")
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")


@dataclass(frozen=True)
class Transform:
    """From an image to a float32 (channels, height, width) tensor.

    For validation and prediction: resize, crop the centre to `size`, scale to [0, 1], normalise. For training
    the augmentations come in between, always in this order, whatever order they are named in:

    - `"crop"`: instead of resize and centre crop, a random part of 50 to 100 % of the area, its sides
      stretched by at most 4 : 3;
    - `"flip"`: left and right change places, half the time;
    - `"shift"`: moved by up to 1/8 of the side (at least one pixel) each way, black coming in (for small
      images);
    - `"trivial"`: one random operation of random strength (TrivialAugment: Mueller & Hutter 2021,
      arXiv:2103.10158);
    - `"color"`: brightness, contrast and saturation each by a factor from 0.8 to 1.2;
    - `"erase"`: a rectangle of 2 to 33 % of the area set to the mean, a quarter of the time (Zhong et al.
      2017, arXiv:1708.04896).

    Args:
        size: (height, width) in pixels of what the model sees.
        resize: the shorter side in pixels before the centre crop, at least the larger of `size`; or (height,
            width), which may change the proportions.
        mean: what is subtracted, one number a channel, for values in [0, 1].
        std: what is divided by, one number a channel, above 0.
        interpolation: one of bicubic, bilinear, box, hamming, lanczos, nearest.
        channels: 3 (RGB) or 1 (grey).
        augment: names from the list above; lists are taken too.

    Raises:
        RecipeError: for an augmentation that is not in the list.
        DataError: for any other value that cannot be.

    Example:
        >>> Transform((8, 8), 8, (0.5,), (0.25,), channels=1, augment=("shift",)).augment
        ('shift',)
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    channels: int = 3
    augment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("size", "resize", "mean", "std", "augment"):  # JSON and recipes have lists only
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _check(self)

    def train(self) -> Pipeline:
        """Image -> tensor with the augmentations; draws from torch's CPU generator and from no other."""
        from lehr.data.augment import Pipeline

        return Pipeline(self, frozenset(self.augment))

    def valid(self) -> Pipeline:
        """Image -> tensor without augmentation: the same image gives the same tensor."""
        from lehr.data.augment import Pipeline

        return Pipeline(self, frozenset())

    def to_json(self) -> dict[str, Any]:
        """The transform as a dict for `json.dumps`; `from_json` gives an equal one back."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Transform:
        """The transform that `to_json` wrote.

        Raises:
            DataError: for an unknown or a missing name.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise DataError(
                    f"a transform with {name!r}{nearest(name, known)} Expected {', '.join(known)}"
                )
        missing = [name for name in known[:4] if name not in values]
        if missing:
            raise DataError(f"a transform without {', '.join(missing)}; expected all of {', '.join(known)}")
        return cls(**values)


def _check(transform: Transform) -> None:
    for name in transform.augment:
        if name not in AUGMENTS:
            hint = nearest(str(name), AUGMENTS)
            raise RecipeError(
                f"augment: {name!r} is not an augmentation{hint} Expected {', '.join(AUGMENTS)}"
            )
    if transform.interpolation not in INTERPOLATIONS:
        hint = nearest(str(transform.interpolation), INTERPOLATIONS)
        raise DataError(
            f"interpolation: {transform.interpolation!r}{hint} Expected {', '.join(INTERPOLATIONS)}"
        )
    if transform.channels not in (1, 3):
        raise DataError(f"channels: {transform.channels!r}; expected 1 (grey) or 3 (RGB)")
    if not _pair(transform.size):
        raise DataError(f"size: {transform.size!r}; expected (height, width) in pixels, at least 1 each")
    height, width = transform.size
    resize = transform.resize
    if isinstance(resize, int) and resize < max(height, width):
        raise DataError(
            f"resize: a shorter side of {resize} cannot be cropped to {height} x {width}; expected "
            f"at least {max(height, width)}"
        )
    if not isinstance(resize, int) and not (_pair(resize) and resize[0] >= height and resize[1] >= width):
        raise DataError(
            f"resize: {resize!r} cannot be cropped to {height} x {width}; expected (height, width), "
            "at least that"
        )
    for name, values in (("mean", transform.mean), ("std", transform.std)):
        if len(values) != transform.channels or not all(math.isfinite(value) for value in values):
            raise DataError(
                f"{name}: {values!r}; expected {transform.channels} finite number(s), one a channel"
            )
    if min(transform.std) <= 0:
        raise DataError(f"std: {transform.std!r}; expected numbers above 0")


def _pair(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(side, int) and side >= 1 for side in value)
    )
