"""Which layout a whole run takes for its convolution weights: measured once, on the stage that computes the most.

The measuring itself is `layout.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lehr.planned_stage import PlannedStage
from lehr.planning import Plan
from lehr.run.freezing import set_trainable
from lehr.run.layout import Layout, by_rule, may_be_measured, measured
from lehr.run.losses import Losses
from lehr.run.precision import Arithmetic
from lehr.run.sampler import Feed, view_of


def layout_of(plan: Plan, model: nn.Module, feed: Feed, losses: Sequence[Losses], on: Arithmetic) -> Layout:
    """The layout for a run that begins, measured on the first batch of the stage that trains the most weights; by rule where
    a person's own loader makes the batches (which is not asked for one more), or objectives take turns there.

    The model is afterwards as before, but for what is frozen, which each step sets anew.
    """
    stage = max(plan.stages, key=lambda s: _trained(plan, s))
    loss = losses[stage.index].get("")
    if loss is None or feed.loader is not None:
        return by_rule(model, on)
    steps = stage.steps * stage.accumulate
    if not may_be_measured(model, on, steps):  # then no batch is asked for
        return by_rule(model, on)
    set_trainable(model, plan.trainable(stage))
    model.train()
    view = view_of(stage, stage.first_epoch)
    try:
        batch = feed.made_here(feed.indices(stage, stage.first_epoch)[0], view)
    except Exception:  # the run itself will say it, with the step
        return by_rule(model, on)
    keep = (loss,) if isinstance(loss, nn.Module) else ()
    return measured(model, batch, loss, on, steps=steps, keep=keep)


def _trained(plan: Plan, stage: PlannedStage) -> int:
    return sum(plan.parameters[name] for name in plan.trainable(stage))
