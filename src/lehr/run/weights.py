"""Weights files: read without running anything, fitted to a model by name, written as safetensors.

A file may be `.safetensors`, or what `torch.save` wrote (read as data, `pth.py`). Wrappers such as
`{'state_dict': ...}` and prefixes such as `module.` are understood. This file must not know what the weights
are for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lehr.errors import RunError, WeightsError, nearest
from lehr.plain_pickle import RefusedError
from lehr.run.pth import read_pth
from lehr.untrusted import open_file, printable

State = dict[str, torch.Tensor]
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "state_dict_ema",
    "model_ema",
)
_LEAST = 0.1
"""Of the model's tensors: what fits less than this fits by chance."""
_COUNTER = "num_batches_tracked"
"""Batch-norm's count of batches: many files lack it, and nothing but a cumulative average needs it."""


@dataclass(frozen=True)
class Fitted:
    """What came of loading a file into a model, by name.

    `loaded` fitted; `missing` were not in the file; `other_shape` had another shape there; `unknown` are in
    the file alone.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    other_shape: tuple[str, ...]
    unknown: tuple[str, ...]

    def lines(self) -> list[str]:
        """How much of the model was in the file, and one line for each kind of thing that did not fit."""
        whole = len(self.loaded) + len(self.missing) + len(self.other_shape)
        kinds = (
            ("not in the file, so left as initialised", self.missing),
            ("of another shape in the file, so left as initialised", self.other_shape),
            ("in the file but not in the model, so left out", self.unknown),
        )
        return [
            f"{len(self.loaded)} of the model's {_counted(whole)} loaded",
            *(f"{_counted(len(names))} {what}: {listed(names)}" for what, names in kinds if names),
        ]


def read_weights(path: str | Path) -> State:
    """The tensors in a weights file by name, on the CPU, with wrappers taken off.

    Raises:
        WeightsError: where it cannot be read safely, or holds no tensors by name.
    """
    file = Path(path).expanduser()
    name = printable(str(file))
    try:
        # The handle is kept while safetensors, which opens by name, reads: what was looked at stays there.
        with open_file(file) as opened:
            if file.suffix == ".safetensors":
                return dict(load_file(file))
            found = read_pth(opened)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise WeightsError(f"{name}: {_no_file(file)} Expected a .safetensors, .pth or .pt file") from None
    except RefusedError as error:
        raise WeightsError(
            f"{name}: holds more than tensors, and nothing else in it was looked at ({printable(str(error)[:200])}); "
            "save the weights alone: torch.save(model.state_dict(), path), or as safetensors"
        ) from None
    except OSError as error:
        raise WeightsError(
            f"{name}: cannot be read: {error.strerror or error}; mend its permissions, or copy it anew"
        ) from None
    # DamagedError, SafetensorError, and what safetensors lets through of torch's and Python's
    except Exception as error:
        words = str(error).split("\n")[0][:200] if " " in str(error) else ""  # a KeyError says "101"
        said = f" ({printable(words)})" if words else ""
        raise WeightsError(
            f"{name}: not a weights file, or damaged{said}; expected safetensors, or a state_dict that torch.save wrote"
        ) from None
    return _unwrapped(found, file)


def load_weights(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, head: Iterable[str] = (), where: str = "weights"
) -> Fitted:
    """Load what fits into `model` by name and shape, in place.

    Args:
        model: any module.
        state: tensors by name; a prefix that most of them share and the model has not is taken off.
        head: module paths of the classifier, which may lack or differ.
        where: what messages call the file.

    Raises:
        WeightsError: where nothing of the backbone fitted, or less than a tenth of its tensors (names such as
            `bn1.weight` fit by chance), with what is there instead.
    """
    own = model.state_dict()
    state = _renamed(state, own)
    fitting = {name: t for name, t in state.items() if name in own and own[name].shape == t.shape}
    _refuse_strangers(model, state, fitting, tuple(head), where)
    model.load_state_dict(fitting, strict=False)
    tied = _tied(model)
    missing = [n for n in own if n not in state and not any(t in fitting for t in tied.get(n, ()))]
    return Fitted(
        loaded=tuple(fitting),
        missing=tuple(n for n in missing if n.rpartition(".")[2] != _COUNTER),
        other_shape=tuple(n for n in own if n in state and n not in fitting),
        unknown=tuple(n for n in state if n not in own),
    )


def write_weights(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write tensors as safetensors, aside and then renamed into place.

    What shares memory is written under each of its names.

    Raises:
        RunError: where it cannot be written, as on a full disk; what was at `path` before is unharmed.
    """
    file = Path(path)
    aside = file.with_name(f".{file.name}.part")
    seen: set[int] = set()
    whole: State = {}
    for name, tensor in state.items():
        plain = tensor.detach().to("cpu").contiguous()
        whole[name] = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(plain.untyped_storage().data_ptr())
    try:
        save_file(whole, aside, metadata={"format": "pt"})
        aside.chmod(0o644)  # safetensors makes files that only their owner can read
        aside.replace(file)
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        aside.unlink(missing_ok=True)
        raise RunError(f"{file}: cannot be written: {error}; free some space, or write elsewhere") from None


def _unwrapped(found: Any, file: Path) -> State:
    """The table of tensors inside what a file holds, whatever it is wrapped in."""
    for _ in range(4):
        if isinstance(found, Mapping):
            tensors = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
            inner = next((found[w] for w in _WRAPPERS if isinstance(found.get(w), Mapping)), None)
            if inner is None and tensors:
                return tensors
            if inner is not None:
                found = inner
                continue
        break
    held = (
        f"a table with {listed([str(k) for k in found])}"
        if isinstance(found, Mapping)
        else f"a {type(found).__name__}"
    )
    raise WeightsError(
        f"{file}: holds {held}, but no tensors by name; expected a state_dict, also inside "
        f"{', '.join(_WRAPPERS[:3])} or the like"
    )


def _renamed(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> State:
    """The names without the prefix (`module.`, `model.encoder.`) that lets most of them fit, if any does."""

    def fits(name: str, tensor: torch.Tensor) -> bool:
        return name in own and own[name].shape == tensor.shape

    gained: Counter[str] = Counter()
    for name, tensor in state.items():
        dots = [at + 1 for at, letter in enumerate(name) if letter == "."]
        gained.update(name[:at] for at in (0, *dots) if fits(name[at:], tensor))
    prefix = max(gained, key=lambda p: (gained[p], -len(p)), default="")
    if gained[prefix] < _LEAST * len(own):
        return dict(state)
    inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    outside = {name: t for name, t in state.items() if not name.startswith(prefix) and name not in inside}
    return {**inside, **outside}


def _refuse_strangers(
    model: nn.Module, state: State, fitting: State, heads: tuple[str, ...], where: str
) -> None:
    """Raise where hardly a parameter of the backbone is among what fits."""
    body = {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if not any(name == head or name.startswith(f"{head}.") for head in heads)
    }
    found = sum(name in fitting for name in body)
    if not body or (found and found >= _LEAST * len(body)):
        return
    much = (
        f"only {found} of the model's {len(body)} backbone tensors are"
        if found
        else "nothing of the model's backbone is"
    )
    example = next(
        (n for n in body if n in state and n not in fitting), next(n for n in body if n not in fitting)
    )
    there = f" ({tuple(state[example].shape)} in the file)" if example in state else ""
    raise WeightsError(
        f"{where}: {much} in it: the model has {example!r} {body[example]}{there}; the file has "
        f"{_counted(len(state))}: {listed(list(state))}; give the file of this very model, or name with "
        "--model the one that the file is of"
    )


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """For each name of a shared parameter, all its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def listed(names: Sequence[str], most: int = 4) -> str:
    """Some of the names, and how many more there are."""
    shown = ", ".join(printable(name[:100]) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _counted(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _no_file(file: Path) -> str:
    """Why there is no file to read, with the nearest name."""
    if file.is_dir():
        return "a folder, not a file."
    siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
    return f"no such file{nearest(printable(file.name), map(printable, siblings))}"
