"""One optimizer with named groups, and `apply`: the only function that changes what trains and how fast.

Groups are built once, from the plan, over everything that any stage trains; a thaw changes values, never the
list. This file must not know batches or losses.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from lehr.errors import ModelError, RecipeError, nearest
from lehr.planning import Plan, Step
from lehr.run.facts import named
from lehr.run.freezing import set_trainable
from lehr.run.fused import fused_setting, keep_right

_NEEDS_CLOSURE = ("lbfgs",)


def optimizer(plan: Plan, model: nn.Module, objective: str | None = None) -> torch.optim.Optimizer:
    """The plan's optimizer over `model`, with one parameter group for each of its groups, in order.

    Each group carries `name`, `param_names`, and the class's own settings; `lr` and `weight_decay` are those
    of step 0, and `lehr.apply` sets them for every step. Where torch has a fused kernel that is faster and right, it is
    used, on the CPU as well; `optimizer = { name = "adamw", fused = false }` in the recipe turns that off.

    Args:
        plan: what trains when, and how fast.
        model: the model that the plan was made from.
        objective: whose optimizer, where the plan has several (`plan.objectives`).

    Raises:
        RecipeError: for an objective that the plan does not have, or several and none named; for an unknown optimizer
            or setting, or a weight decay that the optimizer does not have.
        ModelError: where the model does not have the plan's parameters.

    Example:
        >>> from lehr.recipe import Recipe, Stage
        >>> from lehr.resolving import resolve
        >>> from lehr.run.facts import inspect as look
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> recipe = Recipe([Stage("1 epoch", train="all", lr=0.1)], optimizer="sgd")
        >>> plan = resolve(recipe, look(net), samples=32)
        >>> [group["param_names"] for group in optimizer(plan, net).param_groups]
        [['0.weight', '0.bias']]
    """
    objective = _chosen(plan, objective)
    planned, names = plan.objectives[objective], plan.groups_of(objective)
    cls: Any = _optimizer_class(planned.optimizer)
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in planned.optimizer_settings.items()
    }
    accepted = inspect.signature(cls).parameters
    for key in settings:
        if key not in accepted:
            known = [name for name in accepted if name not in ("params", "lr", "weight_decay")]
            raise RecipeError(
                f"optimizer: {cls.__name__} has no setting {key!r}{nearest(key, known)} "
                f"It has: {', '.join(known)}"
            )
    decays = any(stage.weight_decay[group] for stage in plan.stages for group in names)
    if decays and "weight_decay" not in accepted:
        raise RecipeError(
            f"optimizer: {cls.__name__} has no weight decay; say weight_decay = 0, or take another optimizer"
        )
    parameters = named(model)
    missing = [name for group in names for name in plan.groups[group] if name not in parameters]
    if missing:
        raise ModelError(
            f"the plan trains {missing[0]!r}, which this model does not have; make the plan from this model"
        )
    groups: list[dict[str, Any]] = [
        {
            "params": [(name, parameters[name]) for name in plan.groups[group]],
            "name": group,
            "lr": float(plan.lr(group)[0]),
            **({"weight_decay": plan.stages[0].weight_decay[group]} if "weight_decay" in accepted else {}),
        }
        for group in names
    ]
    mine = [parameters[name] for group in names for name in plan.groups[group]]
    faster = fused_setting(cls, settings, mine, model)
    try:
        made: torch.optim.Optimizer = cls(groups, lr=1.0, **settings, **faster)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"optimizer: {cls.__name__} refused its settings {settings}: {error}") from None
    if faster:
        keep_right(made)
    return made


def _chosen(plan: Plan, objective: str | None) -> str:
    """The objective that is meant; the only one where none is named."""
    if objective is None and len(plan.objectives) == 1:
        return next(iter(plan.objectives))
    if objective is None or objective not in plan.objectives:
        known = ", ".join(map(repr, plan.objectives))
        said = "several objectives" if objective is None else f"no objective {objective!r}"
        raise RecipeError(
            f"optimizer: the plan has {said}; say whose optimizer it is to be, one of {known}: "
            f"{{name: lehr.optimizer(plan, model, name) for name in plan.objectives}}"
        )
    return objective


def apply(step: Step, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make `model` and `optimizer` be as `step` says: what trains and what not, each group's rate and decay.

    `optimizer` is that of the step's objective, where the plan has several.

    Idempotent and without history: `apply(plan[s], ...); apply(plan[t], ...)` leaves what `apply(plan[t],
    ...)` leaves. What a step does not train is frozen (`lehr.freeze`): no gradients, eval mode, whatever
    `model.train()` says. Cheap enough for every step.

    Raises:
        RecipeError: for an optimizer whose groups are not the plan's (`lehr.optimizer` makes one); nothing
            has changed then.
    """
    names = [group.get("name") for group in optimizer.param_groups]
    if names != list(step.lr):
        raise RecipeError(
            f"the optimizer has the groups {names}, the plan has {list(step.lr)}; "
            "make it with lehr.optimizer(plan, model)"
        )
    set_trainable(model, step.trainable)
    for name, group in zip(names, optimizer.param_groups, strict=True):
        group["lr"] = step.lr[name]
        if "weight_decay" in group:
            group["weight_decay"] = step.weight_decay[name]


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """A class of `torch.optim` by its name in any case."""
    classes = {
        key.lower(): cls
        for key, cls in vars(torch.optim).items()
        if isinstance(cls, type)
        and issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
    }
    usable = sorted(set(classes) - set(_NEEDS_CLOSURE))
    if name.lower() in _NEEDS_CLOSURE:
        raise RecipeError(
            f"optimizer: {name!r} evaluates the loss several times a step, which stages do not do; "
            f"take one of {', '.join(usable)}"
        )
    if name.lower() not in classes:
        raise RecipeError(
            f"optimizer: torch has no {name!r}{nearest(name.lower(), usable)} It has: {', '.join(usable)}"
        )
    return classes[name.lower()]
