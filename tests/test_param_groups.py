"""`lehr.param_groups`: any optimizer's groups as a table, whole as a value, and readable in print."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lehr
from lehr.run.param_groups import ParamGroups

OPTIMIZERS = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))


def cells(table: ParamGroups) -> list[list[str]]:
    """The words of the table's lines, without the title and what is the same in all."""
    lines = str(table).splitlines()[1:]
    return [line.split() for line in lines if not line.startswith("in all: ")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_key_of_every_optimizer(name: str) -> None:
    """Of every optimizer of torch's, every key of every group is in the value and in print."""
    model = net()
    made: Any = getattr(torch.optim, name)
    optimizer = made(model.parameters())
    table = lehr.param_groups(optimizer)
    assert table.optimizer == name
    assert [*table.groups[0].settings] == [key for key in optimizer.param_groups[0] if key != "params"]
    assert table.groups[0].settings["lr"] == float(optimizer.param_groups[0]["lr"])
    assert (table.groups[0].tensors, table.groups[0].scalars) == (2, 48)
    title, head, row = str(table).splitlines()
    assert title == f"{name}: 1 group"
    assert head.split() == ["group", "tensors", "scalars", *table.keys]
    assert row.split()[:3] == ["0", "2", "48"]


def test_what_groups_share_is_said_once() -> None:
    """What differs between groups has a column each, what is the same in all stands in a line below."""
    model = net()
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters(), "lr": 1e-4},
        {"params": model[2].parameters(), "momentum": 0.5},
    ]
    table = lehr.param_groups(torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    assert cells(table) == [
        ["group", "tensors", "scalars", "lr", "momentum"],
        ["0", "1", "32", "0.0001", "0.9"],
        ["1", "1", "16", "0.1", "0.5"],
    ]
    below = str(table).splitlines()[-1]
    assert below.startswith("in all: dampening=0, weight_decay=0, nesterov=False")
    shown = {part.split("=")[0].strip() for part in below.removeprefix("in all: ").split(",")}
    assert {"lr", "momentum", *shown} == set(table.keys)


def test_names_where_they_are_known() -> None:
    """A plan's optimizer shows the names of its groups and of their parameters; one made of named parameters shows
    those."""
    model = net()
    stages = [lehr.Stage("1 epoch", train="all", lr={"head": 1e-2, "backbone": 1e-3})]
    optimizer = lehr.optimizer(lehr.plan(lehr.Recipe(stages), model, samples=64), model)
    table = lehr.param_groups(optimizer)
    assert [(group.name, group.param_names) for group in table.groups] == [
        (group["name"], tuple(group["param_names"])) for group in optimizer.param_groups
    ]
    assert {"backbone", "head", "0.weight", "2.weight"} <= {word for row in cells(table) for word in row}
    torch_named = lehr.param_groups(torch.optim.SGD([*model.named_parameters()], lr=0.1))
    assert torch_named.groups[0].param_names == ("0.weight", "2.weight")
    assert "name" not in cells(torch_named)[0]
    assert cells(torch_named)[0][-1] == "parameters"


def test_keys_that_only_some_groups_have() -> None:
    """A key that not every group has is a column, with a dash where it is missing."""
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "layer": 7})
    table = lehr.param_groups(optimizer)
    assert "layer" not in table.groups[0].settings
    assert [row[-1] for row in cells(table)] == ["layer", "-", "7"]


def test_long_values_are_cut_in_print_alone() -> None:
    """A long value, a long name and a long list of names are cut where they are printed, and whole in the value;
    nothing that a terminal would act on comes through."""
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    names = [f"blocks.{i}.weight" for i in range(50)]
    optimizer.param_groups[0].update(note="x" * 99, name="\x1b[2J" * 20, param_names=names)
    table = lehr.param_groups(optimizer)
    assert table.groups[0].settings["note"] == "x" * 99
    assert table.groups[0].param_names == tuple(names)
    assert "x" * 23 + "…" in str(table)
    assert "x" * 24 not in str(table)
    assert "\x1b" not in str(table)
    assert max(map(len, str(table).splitlines())) < 220


def test_it_is_a_value() -> None:
    """What was looked at stays as it was, whatever happens to the optimizer: rates in tensors and lists too."""
    optimizer = torch.optim.AdamW(net().parameters(), lr=torch.tensor(0.5), betas=(0.8, 0.9))
    optimizer.param_groups[0]["milestones"] = [1, 2]
    table, again = lehr.param_groups(optimizer), lehr.param_groups(optimizer)
    printed = str(table)
    assert table == again
    assert hash(table) == hash(again)
    assert table.groups[0].settings["lr"] == 0.5
    optimizer.param_groups[0]["lr"].fill_(7.0)
    optimizer.param_groups[0]["milestones"].append(3)
    assert str(table) == printed
    assert table != lehr.param_groups(optimizer)
    with pytest.raises(TypeError):
        table.groups[0].settings["lr"] = 1.0  # type: ignore[index]
    assert lehr.param_groups(copy.deepcopy(optimizer)).groups[0].settings["milestones"] == (1, 2, 3)
