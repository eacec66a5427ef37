"""The parameter groups of any torch optimizer as a table: what it will do with which weights, at which settings.

Only reading happens here. It must not know plans: the optimizer may be anybody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from lehr.untrusted import printable
from lehr.wording import Words

_OWN = ("params", "name", "param_names")
_WORDS = Words("utf-8", True)
_VALUE_ROOM, _NAMES_ROOM = 24, 40  # columns
_ABSENT = "-"


@dataclass(frozen=True)
class ParamGroup:
    """One group: how many tensors and scalars it holds, their names where the optimizer knows them, and every
    hyper-parameter as it was when it was looked at (a tensor of one as a number, a list as a tuple).
    """

    index: int
    name: str
    tensors: int
    scalars: int
    param_names: tuple[str, ...]
    settings: Mapping[str, Any]

    def __hash__(self) -> int:
        return hash((self.index, self.name, self.tensors, self.scalars, self.param_names))


@dataclass(frozen=True)
class ParamGroups:
    """What `lehr.param_groups` gives: the groups in their order; printed, a table."""

    optimizer: str
    groups: tuple[ParamGroup, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Every hyper-parameter that any group has, in the order in which they are met."""
        return tuple(dict.fromkeys(key for group in self.groups for key in group.settings))

    def __str__(self) -> str:
        shared = [key for key in self.keys if len(self.groups) > 1 and self._is_shared(key)]
        columns = [key for key in self.keys if key not in shared]
        named = any(group.name for group in self.groups)
        known = any(group.param_names for group in self.groups)
        head = ["group", *(["name"] if named else []), "tensors", "scalars", *columns]
        rows = [head + (["parameters"] if known else [])]
        for group in self.groups:
            row = [str(group.index), *([_cut(group.name) or _ABSENT] if named else [])]
            row += [
                f"{group.tensors:,}",
                f"{group.scalars:,}",
                *(_shown(group.settings, key) for key in columns),
            ]
            rows.append(row + ([_cut(", ".join(group.param_names), _NAMES_ROOM) or _ABSENT] if known else []))
        words = [len(head) if known else -1, 1 if named else -1]
        lines = [f"{self.optimizer}: {_groups(len(self.groups))}", *_table(rows, left=words)]
        if shared:
            lines.append(
                "in all: " + ", ".join(f"{key}={_shown(self.groups[0].settings, key)}" for key in shared)
            )
        return "\n".join(lines)

    def _is_shared(self, key: str) -> bool:
        """Whether all groups have the key, with the same value."""
        first = self.groups[0].settings
        return all(
            key in group.settings and _shown(group.settings, key) == _shown(first, key)
            for group in self.groups
        )


def param_groups(optimizer: torch.optim.Optimizer) -> ParamGroups:
    """The parameter groups of any torch optimizer, with every key that they have; printed, a table.

    Settings that all groups share stand in a line below the table. Values longer than 24 columns and lists of names
    longer than 40 are cut where they are printed; `groups[i].settings` and `param_names` have them whole.

    Args:
        optimizer: any, of any torch version: also one that Accelerate has wrapped.

    Returns:
        A frozen value; later changes of the optimizer do not change it.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> groups = [{"params": net[0].parameters(), "lr": 1e-4}, {"params": net[1].parameters()}]
        >>> table = param_groups(torch.optim.SGD(groups, lr=1e-3, momentum=0.9))
        >>> print("\\n".join(str(table).splitlines()[:3]))
        SGD: 2 groups
        group  tensors  scalars      lr
            0        2       40  0.0001
        >>> table.groups[1].settings["momentum"]
        0.9
    """
    groups = tuple(
        ParamGroup(
            index=index,
            name=str(group.get("name", "")),
            tensors=len(group["params"]),
            scalars=sum(parameter.numel() for parameter in group["params"]),
            param_names=tuple(map(str, group.get("param_names") or ())),
            settings=MappingProxyType(
                {key: _plain(value) for key, value in group.items() if key not in _OWN}
            ),
        )
        for index, group in enumerate(optimizer.param_groups)
    )
    return ParamGroups(type(optimizer).__name__, groups)


def _plain(value: Any) -> Any:
    """A value that stays what it is: no tensor that is filled, no list that grows."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else tuple(value.detach().reshape(-1).tolist())
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return _cut(_written(settings[key])) if key in settings else _ABSENT


def _written(value: Any) -> str:
    """Six significant digits for a number; what it prints as for everything else."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))}{',' * (len(value) == 1)})"
    return str(value)


def _cut(text: str, room: int = _VALUE_ROOM) -> str:
    return _WORDS.cut(printable(text), room)


def _groups(count: int) -> str:
    return f"{count} group{'' if count == 1 else 's'}"


def _table(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """Columns two spaces apart; numbers to the right, words (the columns `left`) to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(room) if index in left else cell.rjust(room)
            for index, (cell, room) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
