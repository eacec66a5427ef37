"""A finished run, used again: `load` gives model, transform and classes; `predict` says what is in images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lehr.data import Transform, read_image
from lehr.data.augment import Pipeline
from lehr.data.listing import shown
from lehr.errors import DataError, LehrError, RequestError, WeightsError, nearest
from lehr.run.facts import unwrap
from lehr.run.folder import RunFolder
from lehr.run.models import make_model
from lehr.run.precision import arithmetic
from lehr.run.weights import listed, read_weights
from lehr.untrusted import MIB, printable, read_bytes

CARD = "model.json"
_LARGEST_CARD = 64 * MIB  # names of a million classes
_BATCH = 32


class Loaded(NamedTuple):
    """A run's model with its best weights, in eval mode; its validation transform; the names of its classes.

    `transform` turns a PIL image into a tensor. For a run of a person's own model, which has neither,
    `transform` is None and `classes` is empty.
    """

    model: nn.Module
    transform: Pipeline | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """What is needed to make a run's model again: kept in the run as `model.json`.

    `weights` says what training began with: its `source` is `"published"`, `"none"` or the name of a file, of
    which there is the `sha256`, too. It is empty where a run does not say it.
    """

    model: str
    classes: tuple[str, ...]
    transform: Transform
    weights: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The card as plain values."""
        return {
            "model": self.model,
            "classes": list(self.classes),
            "transform": self.transform.to_json(),
            "weights": dict(self.weights),
        }


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image: the likeliest classes with probabilities, best first; or its error."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""


def load(run: str | Path, *, model: nn.Module | None = None, device: str = "cpu") -> Loaded:
    """The model of a run, with its best weights, in eval mode; its transform and its classes.

    Args:
        run: a run directory.
        model: the module to load into, for a run of `lehr.fit` on a model of your own; for a run of the
            command line it may be left out.
        device: where the model goes: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"` or `"auto"`.

    Raises:
        RequestError: where `run` is no run directory, or its model cannot be made without `model`.
        WeightsError: where the weights do not fit; `model` is unchanged.

    Example:
        model, transform, classes = lehr.load("runs/digits-digits_net-1")
        probabilities = model(transform(image).unsqueeze(0)).softmax(1)
    """
    folder = Path(run).expanduser()
    place = arithmetic(device).device
    weights = RunFolder(folder).weights
    if not weights.is_file():
        raise RequestError(f"{folder}: {_no_weights(folder)} Expected a directory that lehr fit made")
    card = read_card(folder)
    if model is None and card is None:
        raise RequestError(
            f"{folder}: a run of your own model, which lehr cannot make; "
            f"pass it: lehr.load({str(folder)!r}, model=...)"
        )
    module = _made(card) if model is None else model
    _fill(unwrap(module), read_weights(weights), weights)
    module.to(place).eval()
    return Loaded(module, card.transform.valid() if card else None, card.classes if card else ())


def predict(loaded: Loaded, paths: Iterable[str | Path], *, top: int = 3) -> Iterator[Prediction]:
    """What the model says of each image, in order; of one that cannot be read, why not.

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
            tensor = _in_row(error, path)
        waiting.append((str(path), tensor))
        if len(waiting) == _BATCH:
            yield from _predicted(loaded, waiting, top, device)
            waiting = []
    yield from _predicted(loaded, waiting, top, device)


def _in_row(error: DataError, path: str | Path) -> str:
    """What stands in the row of an image: the row names it, and nothing is trained on it that must be mended."""
    return str(error).removeprefix(f"{shown(str(path))}: ").removesuffix("; mend or remove it")


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
    channels = card.transform.channels
    return make_model(card.model, len(card.classes), pretrained=False, channels=channels).module


def _fill(module: nn.Module, state: Mapping[str, torch.Tensor], where: Path) -> None:
    """Load exactly `state`, all of it or nothing."""
    own = module.state_dict()
    lacking = [name for name in own if name not in state]
    besides = [name for name in state if name not in own]
    other = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if lacking or besides or other:
        found = (("lacks", lacking), ("has besides", besides), ("has in another shape", other))
        said = "; ".join(f"it {what} {listed(names)}" for what, names in found if names)
        raise WeightsError(
            f"{where}: does not fit the model: {said}; expected the very model that was trained"
        )
    module.load_state_dict(state)


def _no_weights(folder: Path) -> str:
    """Why there is nothing to load from `folder`."""
    if RunFolder(folder).journal.is_file():
        return f"has no {RunFolder(folder).weights.name}: no epoch of this run has ended."
    if folder.exists():
        return "not a run directory."
    runs = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    return "no such directory" + nearest(folder.name, runs)


def read_card(folder: Path) -> Card | None:
    """The card of a run; None for a run of a person's own model.

    Raises:
        RequestError: for a damaged one.
    """
    file = folder / CARD
    if not file.exists():  # a pipe of this name is no card, but not the lack of one either
        return None
    try:
        plain = json.loads(read_bytes(file, most=_LARGEST_CARD).decode("utf-8"))
        model, classes, weights = plain["model"], plain["classes"], plain.get("weights", {})
        texts = (model, *classes, *weights, *weights.values())
        if type(classes) is not list or not all(isinstance(text, str) for text in texts):
            raise ValueError("model, classes and weights are not texts")
        return Card(model, tuple(classes), Transform.from_json(plain["transform"]), weights)
    except LehrError as error:
        said = str(error)
    except OSError as error:
        said = error.strerror or str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        said = str(error)
    raise RequestError(
        f"{printable(str(file))}: damaged: {printable(said[:200])}; the model cannot be made from it again"
    )
