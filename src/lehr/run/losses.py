"""Which loss function each objective of each stage has, and what a validation measures. It calls none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from lehr.errors import RecipeError, RequestError, nearest
from lehr.planning import Plan
from lehr.recipe import Recipe
from lehr.run.update import Loss, Returned, cross_entropy, scalar_loss

Losses: TypeAlias = Mapping[str, Loss]
LossSaid: TypeAlias = "Loss | Losses | None"


def losses_of(recipe: Recipe, plan: Plan, said: LossSaid) -> tuple[Losses, ...]:
    """The loss function of each turn, by the objective's name ("" in an ordinary stage), for every stage.

    Args:
        recipe: may have them in its objectives.
        plan: of the recipe.
        said: what `fit` was given: a function for ordinary stages, or functions by the names of objectives.

    Raises:
        RecipeError: for an objective without a loss function.
        RequestError: for a name that no objective has.
    """
    given: Losses = dict(said) if isinstance(said, Mapping) else {} if said is None else {"": said}
    unknown = [name for name in given if name not in plan.objectives]
    if unknown and unknown != [""]:
        known = ", ".join(filter(None, plan.objectives)) or "none, since no stage has objectives"
        raise RequestError(
            f"loss: no objective is called {unknown[0]!r}{nearest(str(unknown[0]), plan.objectives)} There are: {known}"
        )
    if unknown:
        raise RequestError(
            "loss: a function is for stages without objectives, and the recipe has none; give each objective its own, "
            'for example loss={"d": ..., "g": ...}, or say it in lehr.Objective'
        )
    plain = given.get("", cross_entropy(plan.label_smoothing))
    out: list[Losses] = []
    for index, stage in enumerate(recipe.stages):
        of_stage = {o.name: given.get(o.name, o.loss) for o in stage.objectives}
        silent = [name for name, loss in of_stage.items() if loss is None]
        if silent:
            raise RecipeError(
                f"stages.{index}.objectives: {silent[0]!r} has no loss function; give it in Python, as lehr.Objective("
                f'{silent[0]!r}, loss, ...) or lehr.fit(..., loss={{"{silent[0]}": loss}})'
            )
        out.append({name: loss for name, loss in of_stage.items() if loss is not None} or {"": plain})
    return tuple(out)


def judged_by(losses: Losses, said: LossSaid) -> Loss | None:
    """The loss function that a stage is validated with: the person's own, None for plain cross-entropy; of several
    objectives all, where `loss` is their mean and each stands beside it as `d_loss`.
    """
    if losses.keys() == {""}:
        return losses[""] if said is not None else None

    def together(model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor]:
        table: dict[str, torch.Tensor] = {}
        found: list[torch.Tensor] = []
        for name, loss in losses.items():
            returned: Returned = loss(model, batch)
            found.append(scalar_loss(returned))
            table[f"{name}_loss"] = found[-1]
            if isinstance(returned, Mapping):
                table |= {
                    f"{name}_{k}": v for k, v in returned.items() if k not in ("loss", "outputs", "targets")
                }
            if (
                isinstance(returned, Mapping)
                and "outputs" not in table
                and {"outputs", "targets"} <= returned.keys()
            ):
                table |= {key: returned[key] for key in ("outputs", "targets")}
        return {**table, "loss": torch.stack(found).mean()}

    return together


def modules_of(losses: tuple[Losses, ...]) -> dict[str, nn.Module]:
    """The loss functions that are modules, which may have a state, each once, by the name that it is kept under: another
    one of the same objective in a later stage has the stage's number in it.
    """
    found: dict[str, nn.Module] = {}
    for stage, of_stage in enumerate(losses):
        for name, loss in of_stage.items():
            if isinstance(loss, nn.Module) and not any(loss is known for known in found.values()):
                key = f"loss.{name}" if name else "loss"
                found[f"{key}.{stage}" if key in found else key] = loss
    return found
