"""lehr: fine-tune PyTorch models in stages - freeze, warm up, thaw, anneal - along a plan that exists
before the first batch.

The names below are all that is public. They are looked up when they are used, so that `import lehr` loads
neither torch nor anything else that is slow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lehr._version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from lehr.bars import bar
    from lehr.duration import Duration
    from lehr.errors import (
        CheckpointError,
        DataError,
        FeedError,
        LehrError,
        ModelError,
        NonFiniteError,
        RecipeError,
        RequestError,
        RunError,
        SelectionError,
        WeightsError,
    )  # fmt: skip
    from lehr.planning import Plan, Step
    from lehr.recipe import Objective, Recipe, Stage
    from lehr.recipe_file import load_recipe
    from lehr.run.facts import inspect
    from lehr.run.freezing import freeze, thaw
    from lehr.run.loop import Result, fit
    from lehr.run.optimizer import apply, optimizer
    from lehr.run.param_groups import param_groups
    from lehr.run.reload import load
    from lehr.run.torch_scheduler import torch_scheduler
    from lehr.schedules import (
        constant,
        cosine,
        exponential,
        hold,
        linear,
        one_cycle,
        polynomial,
        restarts,
        step_decay,
        warmup,
    )  # fmt: skip
    from lehr.selection import ModelFacts

_HOME = {
    "lehr.bars": ("bar",),
    "lehr.duration": ("Duration",),
    "lehr.errors": (
        "CheckpointError", "DataError", "FeedError", "LehrError", "ModelError", "NonFiniteError", "RecipeError", "RequestError",
        "RunError", "SelectionError", "WeightsError",
    ),
    "lehr.planning": ("Plan", "Step"),
    "lehr.recipe": ("Objective", "Recipe", "Stage"),
    "lehr.recipe_file": ("load_recipe",),
    "lehr.run.facts": ("inspect",),
    "lehr.run.freezing": ("freeze", "thaw"),
    "lehr.run.loop": ("Result", "fit"),
    "lehr.run.optimizer": ("apply", "optimizer"),
    "lehr.run.param_groups": ("param_groups",),
    "lehr.run.reload": ("load",),
    "lehr.run.torch_scheduler": ("torch_scheduler",),
    "lehr.schedules": (
        "constant", "cosine", "exponential", "hold", "linear", "one_cycle", "polynomial", "restarts", "step_decay", "warmup",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CheckpointError", "DataError", "Duration", "FeedError", "LehrError", "ModelError", "NonFiniteError", "Objective", "Plan",
    "Recipe", "RecipeError", "RequestError", "Result", "RunError", "SelectionError", "Stage", "Step", "WeightsError",
    "__version__", "apply", "bar", "constant", "cosine", "exponential", "fit", "freeze", "hold", "inspect", "linear", "load",
    "load_recipe", "one_cycle", "optimizer", "param_groups", "plan", "polynomial", "restarts", "step_decay", "thaw",
    "torch_scheduler", "warmup",
]  # fmt: skip


def plan(
    recipe: Recipe,
    model: nn.Module | ModelFacts,
    samples: int,
    *,
    batches: int | None = None,
    head: str | Sequence[str] | None = None,
) -> Plan:
    """The plan of `recipe` for `model` and `samples` training samples; nothing is trained.

    Args:
        recipe: what trains when, and how fast.
        model: a module, or what `lehr.inspect` said of one (then torch is not needed).
        samples: training samples in one epoch, at least 1.
        batches: batches in one epoch, where a `DataLoader` decides them.
        head: module paths of the classifier, where lehr does not find it.

    Raises:
        RecipeError: for anything that cannot be, naming the stage and the key.

    Example:
        >>> from lehr import Recipe, Stage
        >>> from torch import nn
        >>> plan(Recipe([Stage("2 epochs", train="all", lr=0.1)]), nn.Linear(4, 2), samples=320).total_steps
        20
    """
    from lehr.errors import RequestError
    from lehr.resolving import resolve
    from lehr.selection import ModelFacts

    if isinstance(model, ModelFacts):
        if head is not None:
            raise RequestError(
                "head: the facts say already what the head is; give it to lehr.inspect instead"
            )
        return resolve(recipe, model, samples=samples, batches=batches)
    from lehr.run.facts import inspect

    return resolve(recipe, inspect(model, head=head), samples=samples, batches=batches)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lehr' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
