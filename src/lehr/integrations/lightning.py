"""A plan inside Lightning: `Trainer(callbacks=[PlanCallback(plan)])`, with `lehr.optimizer(plan, self)` returned from
`configure_optimizers`.

Before each batch the callback makes module and optimizer be as the plan says for the update under way, by `lehr.apply`:
stages, thaws, rates and decays. Everything else is Lightning's. This file must not decide anything that the plan says.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import nn

from lehr.errors import RequestError
from lehr.integrations.hosts import Host, check, planned_module, same_plan
from lehr.planning import Plan
from lehr.run.optimizer import apply

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy
except ImportError as error:
    raise ImportError(
        f"lehr.integrations.lightning needs the package lightning, which cannot be imported ({error}); "
        'install it with: pip install "lehr[lightning]"'
    ) from error

_NAME = "the Lightning Trainer"


class PlanCallback(Callback):
    """Runs a plan inside `lightning.pytorch.Trainer`.

    `plan[t]` is applied before the forward pass of update `t`, which is `trainer.global_step`: gradient accumulation
    included, and after `trainer.fit(..., ckpt_path=...)` at the place where the checkpoint was made. What a step does
    not train is frozen whatever `train()` Lightning calls. The rates are the plan's also where `configure_optimizers`
    gives a scheduler, which then has no effect and is warned of. An update that an fp16 gradient scaler skips counts
    as one, since it does in Lightning. The loss, and so label smoothing, is the module's own.

    Args:
        plan: made from the module (or the part of it that is named), with the loader's batch size. `max_epochs` or
            `max_steps` may end it early, not go on after it.
        module: the path of the part that the plan is for, where it is not the whole `LightningModule`: `"net"`.

    Raises:
        RequestError: when training starts, before anything is changed, for what cannot be done as the plan says: other
            updates in an epoch than the trainer makes, another accumulation or clipping, several objectives, stages
            that end on a measured condition, averaged weights, restoring, patience, manual optimisation.
        ModelError: for a plan of another model.
        CheckpointError: for a checkpoint that was made with another plan.
    """

    def __init__(self, plan: Plan, module: str = "") -> None:
        self.plan = plan
        self._path = module
        self._module: nn.Module | None = None

    @property
    def state_key(self) -> str:
        """Under which Lightning keeps the state of this callback: that of one part of the module."""
        return f"lehr.PlanCallback({self._path!r})"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the trainer does what the plan says."""
        self._module = planned_module(self.plan, pl_module, self._path)
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise RequestError(
                f"{_NAME} has {len(trainer.optimizers)} optimizers"
                f"{'' if pl_module.automatic_optimization else ' and optimises by hand'}; a plan has one: return "
                "lehr.optimizer(plan, self) from configure_optimizers. In a training_step that optimises by hand, call "
                "lehr.apply(plan[t], ...) there"
            )
        check(self.plan, _host(trainer))
        _check_ddp(self.plan, trainer)
        if trainer.lr_scheduler_configs:
            scheduler = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            warnings.warn(
                f"configure_optimizers gives a scheduler ({scheduler}) as well; the rates are the plan's, and it has no "
                "effect on them. Return the optimizer alone",
                stacklevel=2,
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Be as the plan says for the update that this batch belongs to."""
        assert self._module is not None
        apply(self.plan[trainer.global_step], self._module, trainer.optimizers[0])

    def state_dict(self) -> dict[str, Any]:
        """Which plan a checkpoint belongs to."""
        return {"plan": self.plan.hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another plan."""
        same_plan(self.plan, str(state_dict["plan"]))


def _host(trainer: Trainer) -> Host:
    clips, algorithm = trainer.gradient_clip_val, str(trainer.gradient_clip_algorithm or "norm")
    algorithm = algorithm.rpartition(".")[2].lower()  # a text, or a member of an enumeration
    if clips and algorithm != "norm":
        raise RequestError(f"{_NAME} clips gradients by {algorithm}; a plan clips by norm, or not at all")
    return Host(
        name=_NAME,
        batches=trainer.num_training_batches,
        accumulate=trainer.accumulate_grad_batches,
        updates=trainer.estimated_stepping_batches,
        clip_norm=float(clips) if clips else math.inf,
        accumulate_word="accumulate_grad_batches",
        updates_word="max_steps",
        clip_word="gradient_clip_val",
        unclipped="None",
    )


def _check_ddp(plan: Plan, trainer: Trainer) -> None:
    """Data parallelism waits for a gradient of every parameter that trained when it was set up."""
    strategy = trainer.strategy
    freezes = any(plan.trainable(stage) != plan.parameters.keys() for stage in plan.stages)
    if (
        freezes
        and isinstance(strategy, DDPStrategy)
        and not strategy._ddp_kwargs.get("find_unused_parameters")
    ):
        raise RequestError(
            "the plan freezes parameters, for whose gradients DDP would wait; use "
            'Trainer(strategy="ddp_find_unused_parameters_true")'
        )
