"""Models by name, with what they were pretrained on: timm's, torchvision's, and lehr's own small ones.

mobilenetv2_100            any name that timm knows
torchvision/resnet18       any name that torchvision knows
digits_net                 lehr's own, pretrained on the handwritten digits 0 to 4
cifar_resnet110            lehr's own, without weights: the networks of He et al. 2015 for 32 x 32 images, also with 20, 32, 44, 56
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lehr.data import Transform
from lehr.errors import ModelError, nearest
from lehr.run import cifar_resnet as cifar
from lehr.run.digits_net import MEAN, STD, digits_net
from lehr.run.facts import inspect
from lehr.run.weights import State, load_weights, read_weights

DIGITS_NET = "digits_net"
_CIFAR = {f"cifar_resnet{depth}": depth for depth in cifar.DEPTHS}
_OWN = (DIGITS_NET, *_CIFAR)
_TORCHVISION = "torchvision/"
_DIGITS_WEIGHTS = "digits_0to4.safetensors"
_WITHOUT_SIDE_EXITS = {"aux_logits": False, "init_weights": True, "transform_input": True}
"""For the two of torchvision that would answer with several outputs while training; their published weights
want the last of these.
"""


_NONE = "weights: none; every layer starts anew"
_UNPUBLISHED = "weights: none are published for it; every layer starts anew"
_PUBLISHED = "weights: published by timm; the head is new"


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
        pretrained: load the published weights, where no file is given and there are any (`has_weights`).
        channels: of the images: 1 or 3.
        size: the side of the square that the model sees, in pixels; the model's own by default.

    Raises:
        ModelError: for an unknown name, or published weights that cannot be had.
        WeightsError: for a file that does not fit.
    """
    check_name(name)
    published = weights is None and pretrained
    if name == DIGITS_NET:
        made = _digits(classes, published)
    elif name in _CIFAR:
        made = _cifar(name, classes, channels)
    elif name.startswith(_TORCHVISION):
        made = _torchvision(name.removeprefix(_TORCHVISION), classes, published, channels)
    else:
        made = _timm(name, classes, published, channels)
    notes = made.notes if weights is None else _loaded(made.module, read_weights(weights), str(weights))
    return Made(made.module, _sized(made.transform, size), tuple(notes))


def check_name(name: str) -> None:
    """Refuse a name that no model has.

    Raises:
        ModelError: with the nearest names.
    """
    if name in _OWN:
        return
    import timm  # seconds, which lehr's own small ones need not wait for

    if name.startswith(_TORCHVISION):
        own = name.removeprefix(_TORCHVISION)
        if own not in _torchvision_names():
            near = _near(own, _torchvision_names())
            raise ModelError(f"--model {name}: torchvision has no such classifier{near}")
    elif not timm.is_model(name):
        known = [*timm.list_models(), *(f"{_TORCHVISION}{n}" for n in _torchvision_names()), *_OWN]
        raise ModelError(
            f"--model {name}: neither timm nor lehr has it{_near(name, known)} "
            f"torchvision's are written {_TORCHVISION}NAME"
        )


def has_weights(name: str) -> bool:
    """Whether a model of this name comes with weights; if not, it starts anew unless a file is given."""
    return name not in _CIFAR


def check_fit(made: Made, classes: int, name: str) -> None:
    """Show the model one black image, so that a size or a model that cannot work is refused at once.

    Raises:
        ModelError: where the model takes no images of this size, or does not say one number for each class.
    """
    height, width = made.transform.size
    training = made.module.training
    try:
        with torch.no_grad():
            answer = made.module.eval()(torch.zeros(1, made.transform.channels, height, width))
    except Exception as error:  # models refuse in many ways: RuntimeError, AssertionError, ValueError
        raise ModelError(
            f"--model {name}: cannot take images of {height} x {width} pixels ({_first_line(error)}); "
            "say another --size, or leave it out for the model's own"
        ) from None
    finally:
        made.module.train(training)
    found = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
    if found != (1, classes):
        raise ModelError(
            f"--model {name}: answers one image with {found}; expected a classifier, which answers with "
            f"{(1, classes)}: a number for each class"
        )


def _loaded(module: nn.Module, state: State, where: str) -> tuple[str, ...]:
    fitted = load_weights(module, state, head=inspect(module).head, where=where)
    first, *rest = fitted.lines()
    return (f"weights: {where}: {first}", *(f"weights: {line}" for line in rest))


def _digits(classes: int, pretrained: bool) -> Made:
    net = digits_net(classes)
    transform = Transform((8, 8), 8, (MEAN,), (STD,), channels=1)
    if not pretrained:
        return Made(net, transform, (_NONE,))
    path = files("lehr.data") / _DIGITS_WEIGHTS
    load_weights(net, read_weights(Path(str(path))), head=("head",), where=_DIGITS_WEIGHTS)
    return Made(net, transform, ("weights: pretrained on the digits 0 to 4; the head is new",))


def _cifar(name: str, classes: int, channels: int) -> Made:
    if channels != 3:
        raise ModelError(f"--model {name}: takes colour images only; for grey ones name a timm model")
    transform = Transform((cifar.SIDE, cifar.SIDE), cifar.SIDE, cifar.MEAN, cifar.STD)
    return Made(cifar.cifar_resnet(_CIFAR[name], classes), transform, (_UNPUBLISHED,))


def _timm(name: str, classes: int, pretrained: bool, channels: int) -> Made:
    import timm
    from timm.data.config import resolve_model_data_config

    try:
        with _quiet("huggingface_hub", "timm"):
            net: Any = timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=channels)
    except Exception as error:
        raise _unavailable(name, pretrained, error) from None
    if not pretrained or net.pretrained_cfg.get("num_classes") != classes:
        _start_head(net)
    config: dict[str, Any] = resolve_model_data_config(net)  # type: ignore[no-untyped-call]
    side = int(config["input_size"][1])
    transform = Transform(
        (side, side),
        max(side, int(side / config["crop_pct"])),
        _per_channel(config["mean"], channels),
        _per_channel(config["std"], channels),
        interpolation=config["interpolation"],
        channels=channels,
    )
    return Made(net, transform, (_PUBLISHED if pretrained else _NONE,))


def _start_head(net: nn.Module) -> None:
    """Start a new head as torch starts a layer: within 1 / sqrt(its inputs).

    Some of timm's models draw theirs within 1 / sqrt(classes), for a thousand classes; for five that begins at a
    loss far above chance, and 500 steps of a head stage do not make up for it.
    """
    for path in inspect(net).head:
        for layer in net.get_submodule(path).modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.reset_parameters()


def _torchvision(name: str, classes: int, pretrained: bool, channels: int) -> Made:
    from torchvision import models

    if channels != 3:
        raise ModelError(
            f"--model {_TORCHVISION}{name}: takes colour images only; for grey ones name a timm model"
        )
    published = models.get_model_weights(name).DEFAULT
    preset = published.transforms()
    side = int(preset.crop_size[0])
    own: dict[str, Any] = _WITHOUT_SIDE_EXITS if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        own = {"image_size": side}  # some published weights are for another size than the model's default
    net = models.get_model(name, weights=None, num_classes=classes, **own)
    notes: tuple[str, ...] = (_NONE,)
    if pretrained:
        try:
            state = published.get_state_dict(progress=True, check_hash=True)
        except Exception as error:
            raise _unavailable(_TORCHVISION + name, pretrained, error) from None
        notes = _loaded(net, state, "published by torchvision")
    transform = Transform(
        (side, side),
        int(preset.resize_size[0]),
        tuple(preset.mean),
        tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
    return Made(net, transform, notes)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [n for n in models.list_models(module=models) if not n.startswith("quantized_")]


def _unavailable(name: str, pretrained: bool, error: Exception) -> ModelError:
    said = _first_line(error)
    if not pretrained:
        return ModelError(f"--model {name}: could not be made: {said}")
    return ModelError(
        f"--model {name}: its published weights could not be had ({said}); "
        "give a local file with --weights FILE, or start from nothing with --no-pretrained"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(" .")


def _near(name: str, known: Sequence[str]) -> str:
    """The known names that begin as `name` does, before those that only look like it."""
    return nearest(name, [k for k in known if k.startswith(name)] or known)


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Without other packages' warnings, such as a line for each retry: what fails is raised and said once."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


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
    return replace(transform, size=(size, size), resize=max(size, round(size * shorter / transform.size[0])))
