"""Weights files: read without running anything, fitted to a model by name, written as safetensors.

A file may be `.safetensors`, or what `torch.save` wrote (read with `weights_only`). Wrappers such as `{'state_dict': ...}` and
prefixes such as `module.` are understood. This file must not know what the weights are for.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lehr.errors import WeightsError, nearest

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
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "encoder.", "backbone.")


@dataclass(frozen=True)
class Fitted:
    """What came of loading a file into a model: names that were loaded, lacked a tensor, had another shape, or no place."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    other_shape: tuple[str, ...]
    unknown: tuple[str, ...]

    def lines(self) -> list[str]:
        """One line for each kind of thing that did not fit."""
        kinds = (
            ("not in the file, so left as initialised", self.missing),
            ("of another shape in the file, so left as initialised", self.other_shape),
            ("in the file but not in the model, so left out", self.unknown),
        )
        return [f"{_counted(names)} {what}: {_listed(names)}" for what, names in kinds if names]


def read_weights(path: str | Path) -> State:
    """The tensors in a weights file by name, on the CPU, with wrappers taken off.

    Raises:
        WeightsError: where it cannot be read safely, or holds no tensors by name.
    """
    file = Path(path)
    if not file.is_file():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise WeightsError(
            f"{file}: no such file{nearest(file.name, siblings)} Expected a .safetensors, .pth or .pt file"
        )
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{file}: holds more than tensors, or is damaged, and reading it could run code, so it was not read; "
            "save the weights alone: torch.save(model.state_dict(), path), or as safetensors"
        ) from None
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WeightsError(
            f"{file}: not a weights file: {said}; expected safetensors, or a state_dict that torch.save wrote"
        ) from None
    return _unwrapped(found, file)


def load_weights(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, head: Iterable[str] = (), where: str = "weights"
) -> Fitted:
    """Load what fits into `model` by name and shape, in place.

    Args:
        head: module paths of the classifier, which may lack or differ; a file that fits nothing of the rest is an error.

    Raises:
        WeightsError: where nothing of the backbone fitted, with the nearest names.
    """
    own = model.state_dict()
    state = _renamed(state, own)
    fitting = {name: t for name, t in state.items() if name in own and own[name].shape == t.shape}
    heads = tuple(head)
    body = [
        name
        for name, p in model.named_parameters()
        if not any(name == h or name.startswith(h + ".") for h in heads)
    ]
    if body and not any(name in fitting for name in body):
        example = body[0]
        same_name = f" ({example} is {tuple(state[example].shape)} there)" if example in state else ""
        raise WeightsError(
            f"{where}: nothing of the model's backbone is in it: the model has {len(body)} tensors such as {example!r} "
            f"{tuple(own[example].shape)}{same_name}, the file such as {_listed(list(state))}{nearest(example, state)} "
            "Is it the file of this --model?"
        )
    model.load_state_dict(fitting, strict=False)
    tied = _tied(model)
    return Fitted(
        loaded=tuple(fitting),
        missing=tuple(n for n in own if n not in state and not any(t in fitting for t in tied.get(n, ()))),
        other_shape=tuple(n for n in own if n in state and n not in fitting),
        unknown=tuple(n for n in state if n not in own),
    )


def write_weights(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write tensors as safetensors, aside and then renamed into place; tensors that share memory are written once each name."""
    file = Path(path)
    aside = file.with_name(f".{file.name}.part")
    seen: set[int] = set()
    whole: State = {}
    for name, tensor in state.items():
        plain = tensor.detach().to("cpu").contiguous()
        whole[name] = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(plain.untyped_storage().data_ptr())
    save_file(whole, aside, metadata={"format": "pt"})
    aside.chmod(0o644)  # safetensors makes files that only their owner can read
    os.replace(aside, file)


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
        f"a table with {_listed([str(k) for k in found])}"
        if isinstance(found, Mapping)
        else f"a {type(found).__name__}"
    )
    raise WeightsError(
        f"{file}: holds {held}, but no tensors by name; expected a state_dict, also inside {', '.join(_WRAPPERS[:3])} …"
    )


def _renamed(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> State:
    """The names without a common prefix, where that makes more of them fit."""

    def fits(candidate: Mapping[str, torch.Tensor]) -> int:
        return sum(name in own and own[name].shape == t.shape for name, t in candidate.items())

    best = dict(state)
    current = dict(state)
    for _ in range(3):
        prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in current)), None)
        if prefix is None:
            break
        current = {name.removeprefix(prefix): t for name, t in current.items()}
        if fits(current) > fits(best):
            best = current
    return best


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """For each name of a shared parameter, all its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"
