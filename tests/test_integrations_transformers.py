"""A plan, a scheduler and a freeze of lehr's inside the real Hugging Face Trainer.

The Trainer and `lehr.fit` come to the same weights, to the bit: the same updates on the same batches.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lehr
from lehr.errors import CheckpointError, ModelError, RecipeError, RequestError
from one_recipe import (
    PER_EPOCH,
    STEPS,
    Judged,
    Named,
    Order,
    Seen,
    assert_same,
    fitted,
    net,
    plan_of,
    weights,
)

pytest.importorskip("transformers", reason="the extra lehr[transformers] is not installed")
pytest.importorskip("accelerate", reason="the extra lehr[transformers] is not installed")
from transformers import Trainer, TrainingArguments

from lehr.integrations.transformers import PlanCallback, optimizers


class Ordered(Trainer):
    """The Trainer over batches in lehr's order."""

    def _get_train_sampler(self, *_: Any) -> Order:
        return Order()


def arguments(out: Path, **said: Any) -> TrainingArguments:
    usual = {
        "per_device_train_batch_size": 8, "num_train_epochs": 4, "max_grad_norm": 0.0, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(out), **{**usual, **said})


class Run:
    """A network, its plan, and the Trainer that is to run it."""

    def __init__(self, out: Path, plan: dict[str, Any] | None = None, **said: Any) -> None:
        self.model = net(Judged)
        self.plan = plan_of(self.model, **plan or {})
        made = said.pop("optimizers", None) or optimizers(self.plan, self.model)
        callbacks = said.pop("callbacks", [PlanCallback(self.plan)])
        self.trainer = Ordered(
            self.model, arguments(out, **said), train_dataset=Named(), eval_dataset=Named(), optimizers=made,
            callbacks=callbacks,
        )  # fmt: skip
        self.seen = Seen(self.model, made[0])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_the_trainer_and_fit_come_to_the_same(out: Path) -> None:
    """A plan inside the Trainer, evaluation in between, ends with the weights and buffers of `lehr.fit`, to the bit; at
    every update rates, what trains and what sleeps are the plan's, and the log has the rates that were used."""
    run = Run(out, eval_strategy="epoch", logging_strategy="steps", logging_steps=1)
    run.trainer.train()
    run.seen.assert_is(run.plan)
    assert_same(weights(run.model), fitted())
    logged = [row["learning_rate"] for row in run.trainer.state.log_history if "learning_rate" in row]
    assert logged == [next(iter(run.plan[t].lr.values())) for t in range(STEPS)]


@pytest.mark.parametrize("done", [4, 8, 12, 20])
def test_a_resume_goes_on_where_it_was(out: Path, done: int) -> None:
    """From the Trainer's own checkpoint, in an epoch or at its end, before or after the thaw, new objects go on at the
    right step of the plan, to the weights of a run that was not stopped, to the bit."""
    first = Run(out, save_strategy="steps", save_steps=done, max_steps=done)
    first.trainer.train()
    second = Run(out)
    second.trainer.train(resume_from_checkpoint=True)
    first.seen.assert_is(first.plan, 0, done)
    second.seen.assert_is(second.plan, done)
    assert_same(weights(second.model), fitted())


def test_a_checkpoint_of_another_plan_is_refused(out: Path) -> None:
    """A checkpoint that was made with another plan is refused by the hashes of both."""
    first = Run(out, save_strategy="steps", save_steps=3, max_steps=3)
    first.trainer.train()
    other = Run(out, plan={"weight_decay": 0.5})
    message = f"followed the plan {first.plan.hash[:12]}; this one follows the plan {other.plan.hash[:12]}"
    with pytest.raises(CheckpointError, match=message):
        other.trainer.train(resume_from_checkpoint=True)


def test_accumulation_counts_updates(out: Path) -> None:
    """With gradient accumulation the plan's step is the update: all batches of a window are trained by one step, the
    short window at an epoch's end included."""
    run = Run(out, plan={"accumulate": 4}, gradient_accumulation_steps=4)
    assert run.plan.stages[0].steps_per_epoch == 2
    awake: list[bool] = []
    run.model.body[1].register_forward_hook(lambda part, *_: awake.append(part.training))
    run.trainer.train()
    run.seen.assert_is(run.plan)
    assert awake == [False] * 2 * PER_EPOCH + [True] * 2 * PER_EPOCH


def test_a_run_may_end_early(out: Path) -> None:
    """A Trainer that makes fewer updates than the plan has trains the first of them."""
    run = Run(out, max_steps=9)
    run.trainer.train()
    run.seen.assert_is(run.plan, 0, 9)


def test_a_scheduler_of_the_trainers_has_no_effect(out: Path) -> None:
    """Where the Trainer makes a scheduler of its own, it is warned of, and the rates stay the plan's."""
    model = net(Judged)
    plan = plan_of(model)
    optimizer = lehr.optimizer(plan, model)
    seen = Seen(model, optimizer)
    trainer = Ordered(
        model,
        arguments(out),
        train_dataset=Named(),
        optimizers=(optimizer, None),
        callbacks=[PlanCallback(plan)],
    )
    with pytest.warns(UserWarning, match=r"a scheduler of its own \(LambdaLR\); the rates are the plan's"):
        trainer.train()
    seen.assert_is(plan)
    assert_same(weights(model), fitted())


@pytest.mark.parametrize(
    ("said", "set_to", "message"),
    [
        ({"batch_size": 4}, {}, r"has 11 updates in an epoch, .* the Hugging Face Trainer makes 6\."),
        ({}, {"num_train_epochs": 5}, r"would make 30 updates, and the plan has 24; set max_steps=24"),
        ({"accumulate": 2}, {}, r"an update of 2 batches, .* of 1; set gradient_accumulation_steps=2"),
        (
            {},
            {"max_grad_norm": 1.0},
            r"the plan does not clip .* clips them to 1; set max_grad_norm=0, or write clip_norm = 1",
        ),
        (
            {"clip_norm": 0.5},
            {},
            r"to a norm of 0\.5, .* does not; set max_grad_norm=0\.5, or leave clip_norm out",
        ),
        ({"label_smoothing": 0.1}, {}, r"label_smoothing = 0\.1, .* 0; set label_smoothing_factor=0\.1"),
        ({"ema": 0.9}, {}, r"averages the weights \(ema=0\.9\)"),
    ],
)
def test_what_it_cannot_do_is_refused(
    out: Path, said: dict[str, Any], set_to: dict[str, Any], message: str
) -> None:
    """A plan that the Trainer would not train as it says is refused in words before the first update."""
    run = Run(out, plan=said, **set_to)
    with pytest.raises(RequestError, match=message):
        run.trainer.train()
    assert run.seen.rates == []
    assert all(parameter.requires_grad for parameter in run.model.parameters())


def test_what_clips_alike_is_taken(out: Path) -> None:
    """A plan that clips and a Trainer that clips to the same norm come to what `lehr.fit` comes to."""
    run = Run(out, plan={"clip_norm": 0.05}, max_grad_norm=0.05)
    run.trainer.train()
    assert_same(weights(run.model), fitted(clip_norm=0.05))


def test_a_plan_of_another_model_is_refused(out: Path) -> None:
    """A plan is refused for a model that has other parameters, and an optimizer that is not the plan's as well."""
    other = nn.Sequential(nn.Linear(6, 3))
    plan = lehr.plan(
        lehr.Recipe([lehr.Stage("4 epochs", train="all", lr=0.1)], batch_size=8), other, samples=44
    )
    with pytest.raises(ModelError, match=r"the plan is not for Judged: only the plan has '0\.bias'"):
        Run(out, callbacks=[PlanCallback(plan)]).trainer.train()
    model = net(Judged)
    run = Run(out, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    with (
        pytest.warns(UserWarning, match="a scheduler of its own"),
        pytest.raises(RecipeError, match=r"lehr\.optimizer"),
    ):
        run.trainer.train()


def test_a_part_of_a_model(out: Path) -> None:
    """A plan for a part trains that part alone, where its path is given."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(Judged)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> Any:
            return self.net(inputs * self.scale, labels)

    model = Wrapper()
    plan = plan_of(model.net)
    trainer = Ordered(
        model, arguments(out), train_dataset=Named(), optimizers=optimizers(plan, model.net),
        callbacks=[PlanCallback(plan, module="net")],
    )  # fmt: skip
    trainer.train()
    assert_same(weights(model.net), fitted())
    assert model.scale.item() == 1.0


# The parts alone


def test_torch_scheduler_inside_the_trainer(out: Path) -> None:
    """`torch_scheduler` given as `optimizers=(optimizer, scheduler)` is followed at every update, also after a resume,
    without a warning, and is what the log says."""
    curve = (lehr.warmup("3 steps") >> lehr.cosine(0.1)).over(steps=STEPS)
    rates: list[list[float]] = []
    logged: list[float] = []
    for said in ({"save_strategy": "steps", "save_steps": 8, "max_steps": 8}, {}):
        model = net(Judged)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = lehr.torch_scheduler(optimizer, curve)
        seen = Seen(model, optimizer)
        told = {"logging_strategy": "steps", "logging_steps": 1, **said}
        trainer = Ordered(
            model, arguments(out, **told), train_dataset=Named(), optimizers=(optimizer, scheduler)
        )
        trainer.train(resume_from_checkpoint=not said)
        rates += seen.rates
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == [[0.5 * curve(t)] for t in range(STEPS)]
    assert logged == [rate for (rate,) in rates]


def test_frozen_stays_frozen(out: Path) -> None:
    """What `lehr.freeze` froze does not change by a bit under the Trainer's training and evaluation, and trains again
    after `lehr.thaw`."""
    model = net(Judged)
    lehr.freeze(model, "backbone")
    before = weights(model.body)
    told = {"eval_strategy": "epoch", "num_train_epochs": 1, "weight_decay": 0.1, "learning_rate": 0.1}
    Ordered(model, arguments(out, **told), train_dataset=Named(), eval_dataset=Named()).train()
    assert_same(weights(model.body), before)
    lehr.thaw(model)
    Ordered(model, arguments(out, **told), train_dataset=Named(), eval_dataset=Named()).train()
    after = weights(model.body)
    assert not any(torch.equal(after[name], before[name]) for name in before)


def test_without_transformers_the_extra_is_named() -> None:
    """Where the package is missing, importing the callback says which extra to install."""
    code = "import sys; sys.modules['transformers'] = None; import lehr.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "lehr[transformers]"' in done.stderr.splitlines()[-1]
