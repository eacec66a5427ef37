"""The work behind a `Transform`: resizing, cropping, augmenting, and the step to a tensor.

Every random number here comes from torch's CPU generator, so seeding that one makes a sample repeatable. This
file must not know where images come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lehr.data.images import as_channels
from lehr.data.transforms import Transform

_AREA = (0.5, 1.0)
_STRETCH = math.log(4 / 3)
_PIXEL_AUGMENTS: tuple[tuple[str, Callable[[Image.Image], Image.Image]], ...]


@dataclass(frozen=True)
class Pipeline:
    """Image -> float32 tensor (channels, height, width), with the augmentations in `augment`; picklable."""

    transform: Transform
    augment: frozenset[str]

    def __call__(self, image: Image.Image) -> Tensor:
        """The tensor of one image of any size and mode L or RGB."""
        made = as_channels(image, self.transform.channels)
        made = _random_part(made, self.transform) if "crop" in self.augment else _centre(made, self.transform)
        for name, change in _PIXEL_AUGMENTS:
            if name in self.augment:
                made = change(made)
        tensor = _normalised(made, self.transform)
        return _eraser()(tensor) if "erase" in self.augment else tensor


def _centre(image: Image.Image, transform: Transform) -> Image.Image:
    """Resized, then cropped in the middle: to the pixel what torchvision's Resize and CenterCrop do."""
    width, height = image.size
    if isinstance(transform.resize, int):
        short, long = min(width, height), max(width, height)
        longer = int(transform.resize * long / short)
        target = (transform.resize, longer) if width <= height else (longer, transform.resize)
    else:
        target = (transform.resize[1], transform.resize[0])
    if target != image.size:
        image = image.resize(target, _resampling(transform))
    rows, columns = transform.size
    top, left = round((target[1] - rows) / 2), round((target[0] - columns) / 2)
    return image if (columns, rows) == target else image.crop((left, top, left + columns, top + rows))


def _random_part(image: Image.Image, transform: Transform) -> Image.Image:
    """A random rectangle, resized to the target in one step; one that would not fit is cut to what does."""
    area, stretch, across, down = torch.rand(4).tolist()
    rows, columns = transform.size
    pixels = image.width * image.height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area)
    ratio = columns / rows * math.exp(_STRETCH * (2 * stretch - 1))
    width = min(math.sqrt(pixels * ratio), image.width)
    height = min(math.sqrt(pixels / ratio), image.height)
    left, top = across * (image.width - width), down * (image.height - height)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize((columns, rows), _resampling(transform), box=box)


def _flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()).item() < 0.5 else image


def _shift(image: Image.Image) -> Image.Image:
    """Padding with black and a random crop, in one step."""
    reach = (max(1, image.width // 8), max(1, image.height // 8))
    across, down = (int(torch.randint(-by, by + 1, ()).item()) for by in reach)
    canvas = Image.new(image.mode, image.size)
    canvas.paste(image, (across, down))
    return canvas


def _trivial(image: Image.Image) -> Image.Image:
    changed: Image.Image = _trivial_operation()(image)
    return changed


def _color(image: Image.Image) -> Image.Image:
    changed: Image.Image = _jitter()(image)
    return changed


_PIXEL_AUGMENTS = (("flip", _flip), ("shift", _shift), ("trivial", _trivial), ("color", _color))


# torchvision is imported where it is needed: with it, importing this file takes several times as long.
@lru_cache(maxsize=1)
def _trivial_operation() -> Callable[[Image.Image], Image.Image]:
    from torchvision.transforms import InterpolationMode, TrivialAugmentWide

    operation: Callable[[Image.Image], Image.Image] = TrivialAugmentWide(
        interpolation=InterpolationMode.BILINEAR
    )
    return operation


@lru_cache(maxsize=1)
def _jitter() -> Callable[[Image.Image], Image.Image]:
    from torchvision.transforms import ColorJitter

    operation: Callable[[Image.Image], Image.Image] = ColorJitter(
        brightness=0.2, contrast=0.2, saturation=0.2
    )
    return operation


@lru_cache(maxsize=1)
def _eraser() -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import RandomErasing

    operation: Callable[[Tensor], Tensor] = RandomErasing(p=0.25, scale=(0.02, 0.33), value=0)
    return operation


def _normalised(image: Image.Image, transform: Transform) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    planes = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.unsqueeze(0)
    mean, std = _constants(transform.mean, transform.std)
    return planes.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def _resampling(transform: Transform) -> Image.Resampling:
    return Image.Resampling[transform.interpolation.upper()]
