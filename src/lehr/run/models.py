"""Models by name, with what they were pretrained on: timm's, torchvision's, and the small one of the built-in job.

mobilenetv2_100            any name that timm knows
torchvision/resnet18       any name that torchvision knows
digits_net                 lehr's own, pretrained on the handwritten digits 0 to 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from lehr.data import Transform
from lehr.errors import LehrError, ModelError, nearest
from lehr.run.digits_net import digits_net
from lehr.run.facts import inspect
from lehr.run.weights import State, load_weights, read_weights

DIGITS_NET = "digits_net"
_TORCHVISION = "torchvision/"
_DIGITS_WEIGHTS = "digits_0to4.safetensors"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Made:
    """A model, how its images are prepared, and what should be known of its weights."""

    module: nn.Module
    transform: Transform
    notes: tuple[str, ...] = ()


def make_model(
    name: str,
    classes: int,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    channels: int = 3,
    size: int | None = None,
) -> Made:
    """The model called `name` with a new head for `classes`.

    Args:
        weights: a local file to load instead of the published weights.
        pretrained: load the published weights, where no file is given.
        channels: of the images: 1 or 3.
        size: the side of the square that the model sees, in pixels; the model's own by default.

    Raises:
        ModelError: for an unknown name, or published weights that cannot be had.
        WeightsError: for a file that does not fit.
    """
    if name == DIGITS_NET:
        made = _digits(classes, weights is None and pretrained)
    elif name.startswith(_TORCHVISION):
        made = _torchvision(
            name.removeprefix(_TORCHVISION), classes, weights is None and pretrained, channels
        )
    else:
        made = _timm(name, classes, weights is None and pretrained, channels)
    notes = list(made.notes)
    if weights is not None:
        notes += _loaded(made.module, read_weights(weights), str(weights))
    return Made(made.module, _sized(made.transform, size), tuple(notes))


def _loaded(module: nn.Module, state: State, where: str) -> list[str]:
    fitted = load_weights(module, state, head=inspect(module).head, where=where)
    return [
        f"weights: {len(fitted.loaded)} tensors from {where}",
        *(f"weights: {line}" for line in fitted.lines()),
    ]


def _digits(classes: int, pretrained: bool) -> Made:
    net = digits_net(classes)
    transform = Transform((8, 8), 8, (0.3,), (0.37,), channels=1)
    if not pretrained:
        return Made(net, transform, ("weights: none; every layer starts anew",))
    path = files("lehr.data") / _DIGITS_WEIGHTS
    fitted = load_weights(net, read_weights(Path(str(path))), head=("head",), where=_DIGITS_WEIGHTS)
    return Made(
        net,
        transform,
        (f"weights: {len(fitted.loaded)} tensors pretrained on the digits 0 to 4; the head is new",),
    )


def _timm(name: str, classes: int, pretrained: bool, channels: int) -> Made:
    import timm
    from timm.data.config import resolve_model_data_config

    if not timm.is_model(name):
        known = [*timm.list_models(), *(f"{_TORCHVISION}{n}" for n in _torchvision_names()), DIGITS_NET]
        raise ModelError(
            f"--model {name}: neither timm nor lehr has it{nearest(name, known)} torchvision's are written torchvision/NAME"
        )
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=channels)
    except LehrError:
        raise
    except Exception as error:
        raise _unavailable(name, pretrained, error) from None
    config: dict[str, Any] = resolve_model_data_config(net)
    side = int(config["input_size"][1])
    transform = Transform(
        (side, side), max(side, int(side / config["crop_pct"])), _per_channel(config["mean"], channels), _per_channel(config["std"], channels),
        interpolation=config["interpolation"], channels=channels,
    )  # fmt: skip
    return Made(
        net,
        transform,
        (
            f"weights: {'published by timm; the head is new' if pretrained else 'none; every layer starts anew'}",
        ),
    )


def _torchvision(name: str, classes: int, pretrained: bool, channels: int) -> Made:
    from torchvision import models

    if name not in _torchvision_names():
        raise ModelError(
            f"--model {_TORCHVISION}{name}: torchvision has no such classifier{nearest(name, _torchvision_names())}"
        )
    if channels != 3:
        raise ModelError(
            f"--model {_TORCHVISION}{name}: takes colour images only, these are grey; a timm model takes either"
        )
    net = models.get_model(name, weights=None, num_classes=classes)
    published = models.get_model_weights(name).DEFAULT
    notes = ["weights: none; every layer starts anew"]
    if pretrained:
        try:
            state = published.get_state_dict(progress=False)
        except Exception as error:
            raise _unavailable(_TORCHVISION + name, pretrained, error) from None
        notes = _loaded(net, state, "published by torchvision")
    preset = published.transforms()
    side = int(preset.crop_size[0])
    transform = Transform(
        (side, side),
        int(preset.resize_size[0]),
        tuple(preset.mean),
        tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
    return Made(net, transform, tuple(notes))


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [n for n in models.list_models(module=models) if not n.startswith("quantized_")]


def _unavailable(name: str, pretrained: bool, error: Exception) -> ModelError:
    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if not pretrained:
        return ModelError(f"--model {name}: could not be made: {said}")
    return ModelError(
        f"--model {name}: its published weights could not be had ({said}); give a local file with --weights FILE, "
        "or start from nothing with --no-pretrained"
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Published numbers are for RGB; grey images get their mean."""
    return (
        tuple(float(v) for v in values)
        if len(values) == channels
        else (sum(values) / len(values),) * channels
    )


def _sized(transform: Transform, size: int | None) -> Transform:
    """The same transform at another size, with the same margin around the crop."""
    if size is None:
        return transform
    shorter = transform.resize if isinstance(transform.resize, int) else min(transform.resize)
    from dataclasses import replace

    return replace(transform, size=(size, size), resize=max(size, round(size * shorter / transform.size[0])))
