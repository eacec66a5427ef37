"""A plan inside the Hugging Face Trainer: `Trainer(..., optimizers=optimizers(plan, model),
callbacks=[PlanCallback(plan)])`.

Before each update the callback makes model and optimizer be as the plan says, by `lehr.apply`: stages, thaws, rates and
decays. Everything else is the Trainer's. This file must not decide anything that the plan says.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from lehr.errors import RequestError
from lehr.integrations.hosts import Host, check, planned_module
from lehr.planning import Plan
from lehr.run.optimizer import apply, optimizer
from lehr.run.torch_scheduler import ClosedFormLR, plan_scheduler

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"lehr.integrations.transformers needs the package transformers, which cannot be imported ({error}); "
        'install it with: pip install "lehr[transformers]"'
    ) from error

_NAME = "the Hugging Face Trainer"


def optimizers(plan: Plan, model: nn.Module) -> tuple[torch.optim.Optimizer, ClosedFormLR]:
    """What `Trainer(optimizers=...)` wants: the plan's optimizer, and a scheduler that says the plan's rates.

    The scheduler sets what the callback sets; with it the `learning_rate` in the Trainer's log is what was used (that
    of the first group, as the Trainer logs), and a checkpoint knows which plan it belongs to.

    Raises:
        RecipeError, ModelError: as `lehr.optimizer`.
    """
    made = optimizer(plan, model)
    return made, plan_scheduler(made, plan)


class PlanCallback(TrainerCallback):
    """Runs a plan inside `transformers.Trainer`.

    `plan[t]` is applied before the forward pass of update `t`, which is `state.global_step`: gradient accumulation
    included, and after `trainer.train(resume_from_checkpoint=...)` at the place where the checkpoint was made. What a
    step does not train is frozen whatever `train()` the Trainer calls. The rates are the plan's also where the Trainer
    makes a scheduler of its own, which then has no effect and is warned of.

    Args:
        plan: made from the model, with the Trainer's batch size. `max_steps` or `num_train_epochs` may end it early,
            not go on after it. (The Trainer clips gradients unless it is told `max_grad_norm=0`.)
        module: the path of the part that the plan is for, where it is not the whole model.

    Raises:
        RequestError: when training starts, before anything is changed, for what cannot be done as the plan says: other
            updates in an epoch than the Trainer makes, another accumulation, clipping or label smoothing, several
            objectives, stages that end on a measured condition, averaged weights, restoring, patience.
        ModelError: for a plan of another model.
    """

    def __init__(self, plan: Plan, module: str = "") -> None:
        self.plan = plan
        self._path = module

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check that the Trainer does what the plan says."""
        planned_module(self.plan, kwargs["model"], self._path)
        check(self.plan, _host(args, state, kwargs["train_dataloader"]))
        smoothing = args.label_smoothing_factor
        if smoothing != self.plan.label_smoothing:
            raise RequestError(
                f"the plan has label_smoothing = {self.plan.label_smoothing:g}, {_NAME} {smoothing:g}; set "
                f"label_smoothing_factor={self.plan.label_smoothing:g}"
            )
        scheduler = kwargs["lr_scheduler"]
        if not isinstance(scheduler, ClosedFormLR):
            warnings.warn(
                f"the Trainer has a scheduler of its own ({type(scheduler).__name__}); the rates are the plan's, and it "
                "has no effect on them, but the learning_rate in the log is its. Give "
                "Trainer(optimizers=lehr.integrations.transformers.optimizers(plan, model))",
                stacklevel=2,
            )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Be as the plan says for the update that begins."""
        module: nn.Module = kwargs["model"].get_submodule(self._path)
        apply(self.plan[state.global_step], module, kwargs["optimizer"])


def _host(args: TrainingArguments, state: TrainerState, loader: Any) -> Host:
    try:
        batches: float = len(loader)
    except TypeError:  # a stream
        batches = math.inf
    return Host(
        name=_NAME,
        batches=batches,
        accumulate=args.gradient_accumulation_steps,
        updates=state.max_steps,
        clip_norm=args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else math.inf,
        accumulate_word="gradient_accumulation_steps",
        updates_word="max_steps",
        clip_word="max_grad_norm",
        unclipped="0",
    )
