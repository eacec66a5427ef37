"""A finished run, used again: `load` gives its model, its transform and its classes; `predict` says what is in images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lehr.data import Transform, read_image
from lehr.data.augment import Pipeline
from lehr.errors import DataError, RequestError, WeightsError
from lehr.run.models import make_model
from lehr.run.precision import arithmetic
from lehr.run.weights import read_weights

CARD = "model.json"
_BATCH = 32


class Loaded(NamedTuple):
    """A run's model in eval mode with its best weights, the validation transform (PIL image -> tensor), and the class names.

    For a run of a person's own model, which has neither, `transform` is None and `classes` is empty.
    """

    model: nn.Module
    transform: Pipeline | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """What is needed to make a run's model again: kept in the run as `model.json`."""

    model: str
    classes: tuple[str, ...]
    transform: Transform

    def to_json(self) -> dict[str, Any]:
        """The card as plain values."""
        return {"model": self.model, "classes": list(self.classes), "transform": self.transform.to_json()}


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image: the classes from the likeliest on, with probabilities; or why there is none."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""


def load(run: str | Path, *, model: nn.Module | None = None, device: str = "cpu") -> Loaded:
    """The model of a run, with its best weights, in eval mode; its transform and its classes.

    Args:
        run: a run directory.
        model: the module to load into, for a run of `lehr.fit` on a model of your own; what the command line made needs none.
        device: where the model goes.

    Raises:
        RequestError: where `run` is no run directory, or cannot be made again without `model`.
        WeightsError: where the weights do not fit.

    Example:
        model, transform, classes = lehr.load("runs/digits-digits_net-1")
        probabilities = model(transform(image).unsqueeze(0)).softmax(1)
    """
    folder = Path(run)
    weights = folder / "best.safetensors"
    if not weights.is_file():
        what = (
            "has no best.safetensors yet: no epoch of it has ended"
            if (folder / "journal.jsonl").is_file()
            else "is not a run directory"
        )
        raise RequestError(f"{folder} {what}; expected a directory that lehr fit made")
    card = _read_card(folder)
    if model is None and card is None:
        raise RequestError(
            f"{folder}: a run of your own model, which lehr cannot make; pass it: lehr.load({str(folder)!r}, model=...)"
        )
    module = model or _made(card)
    state = read_weights(weights)
    lacking = module.load_state_dict(state, strict=False)
    if lacking.missing_keys or lacking.unexpected_keys:
        raise WeightsError(
            f"{weights}: does not fit the model: lacks {lacking.missing_keys[:3]}, has {lacking.unexpected_keys[:3]} besides"
        )
    module.to(arithmetic(device).device).eval()
    return Loaded(module, card.transform.valid() if card else None, card.classes if card else ())


def predict(loaded: Loaded, paths: Iterable[str | Path], *, top: int = 3) -> Iterator[Prediction]:
    """What the model says of each image, in order; an image that cannot be read is a prediction with its error.

    Raises:
        RequestError: for a run without a transform of its own.
    """
    if loaded.transform is None:
        raise RequestError(
            "this run has no transform for images, since its model was your own; call the model yourself"
        )
    device = next(loaded.model.parameters()).device
    waiting: list[tuple[str, torch.Tensor | str]] = []
    for path in paths:
        try:
            tensor: torch.Tensor | str = loaded.transform(
                read_image(Path(path), loaded.transform.transform.channels)
            )
        except DataError as error:
            tensor = str(error)
        waiting.append((str(path), tensor))
        if len(waiting) == _BATCH:
            yield from _predicted(loaded, waiting, top, device)
            waiting = []
    yield from _predicted(loaded, waiting, top, device)


def _predicted(
    loaded: Loaded, batch: Sequence[tuple[str, torch.Tensor | str]], top: int, device: torch.device
) -> Iterator[Prediction]:
    good = [item for _, item in batch if isinstance(item, torch.Tensor)]
    rows: Iterator[torch.Tensor] = iter(())
    if good:
        with torch.inference_mode():
            rows = iter(loaded.model(torch.stack(good).to(device)).float().softmax(1).cpu())
    for path, item in batch:
        if isinstance(item, str):
            yield Prediction(path, error=item)
            continue
        values, places = next(rows).topk(min(top, len(loaded.classes)))
        yield Prediction(
            path, tuple((loaded.classes[int(i)], float(p)) for i, p in zip(places, values, strict=True))
        )


def _made(card: Card | None) -> nn.Module:
    assert card is not None
    return make_model(
        card.model, len(card.classes), pretrained=False, channels=card.transform.channels
    ).module


def _read_card(folder: Path) -> Card | None:
    file = folder / CARD
    if not file.is_file():
        return None
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        return Card(
            str(plain["model"]), tuple(map(str, plain["classes"])), Transform.from_json(plain["transform"])
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{file}: damaged: {error}; the model cannot be made from it again") from None
