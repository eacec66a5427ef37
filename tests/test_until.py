"""Stages that end, or cool, on evidence: the gate as `fit` has it, with a kill on either side of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import lehr
from lehr.errors import NonFiniteError, RecipeError, RunError
from lehr.events import ConditionMet, EpochEnded, RateReduced, StageEnded, StepsTaken
from lehr.planned_stage import Decision
from lehr.recipe import Objective, Recipe, Stage
from lehr.replanning import extended
from lehr.run.update import cross_entropy
from lehr.schedules import constant, warmup
from small_run import came_to, data, events, fit, losses, net, presser

GOLDEN = Path(__file__).parent / "golden" / "gate.txt"


def gated(until: str = "train_error < 0.5", every: str | None = "5 steps", **said: Any) -> Recipe:
    """A stage that waits, ten epochs of three steps at the latest; then two epochs of all."""
    first = Stage("10 epochs", train="head", lr=0.05, until=until, every=every, schedule=constant(), **said)
    second = Stage("2 epochs", train="all", lr=0.02)
    return Recipe([first, second], batch_size=8, seed=3, ema=0.9)


def gate(result: lehr.Result | None) -> int:
    """The step at which the first stage ended."""
    assert result is not None
    (decision,) = (d for d in result.plan.decisions if d.kind == "end")
    return decision.step


def ten_classes(out: Path, **said: Any) -> lehr.Result:
    """A run over ten classes, with He et al.'s condition, checked every ten steps: a small rate, then the peak."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(300, 12, generator=generator)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    stages = [
        Stage(
            "20 epochs",
            train="all",
            lr=0.01,
            until="train_error < 0.80",
            every="10 steps",
            schedule=constant(),
        ),
        Stage("1 epoch", train="all", lr=0.1),
    ]
    recipe = Recipe(stages, optimizer={"name": "sgd", "momentum": 0.9}, batch_size=16, seed=3)
    samples = TensorDataset(inputs, inputs[:, :10].argmax(1))
    return lehr.fit(model, samples, recipe=recipe, device="cpu", out=out, **said)


def test_the_gate_opens_where_the_golden_file_says(tmp_path: Path) -> None:
    """A seeded run's gate, "train_error < 0.80", opens at the step, and at the value, of the golden file."""
    run = tmp_path / "run"
    result = ten_classes(run)
    (met,) = (e for e in events(run) if isinstance(e, ConditionMet))
    found = {"condition": met.condition, "step": met.step, "value": met.value, "total_steps": met.total_steps}
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert result.plan.decisions == (Decision(0, met.step, "end", met.value),)
    rates = result.plan.lr("all")
    assert rates[met.step - 1] == 0.01
    assert rates[met.step :].max() > 0.05


@pytest.mark.parametrize("away", [-1, 0, 1])
def test_the_golden_gate_after_a_kill(away: int, tmp_path: Path) -> None:
    """Stopped just before, in, or just after the step that opens the gate of the golden file, it opens there all the
    same, and the run ends with the same bits.
    """
    opened = json.loads(GOLDEN.read_text(encoding="utf-8"))["step"]
    whole = ten_classes(tmp_path / "whole")
    usual = cross_entropy()
    press = presser(opened + away)

    def stopping(model: nn.Module, batch: Any) -> Any:
        press(model)
        return usual(model, batch)

    with pytest.raises(KeyboardInterrupt):
        ten_classes(tmp_path / "run", loss=stopping)
    again = ten_classes(tmp_path / "run", loss=usual, resume=True)
    assert gate(again) == opened
    assert came_to(again) == came_to(whole)


@pytest.mark.parametrize("away", [-1, 0, 1])
@pytest.mark.parametrize("every", ["5 steps", None], ids=["steps", "epochs"])
def test_a_stop_beside_the_gate_changes_nothing(away: int, every: str | None, tmp_path: Path) -> None:
    """A run that is stopped just before its gate opens, in the step that opens it, or just after, and goes on, ends with
    the same bits, and its gate opens at the same step.
    """
    recipe = gated(every=every)
    whole = fit(tmp_path / "whole", recipe=recipe)
    opened = gate(whole)
    assert 1 < opened < 30  # before its length
    assert fit(tmp_path / "run", recipe=recipe, stop=opened + away) is None
    again = fit(tmp_path / "run", recipe=recipe, resume=True)
    assert came_to(again) == came_to(whole)
    assert gate(again) == opened
    told = [
        [e for e in events(run) if isinstance(e, ConditionMet)]
        for run in (tmp_path / "whole", tmp_path / "run")
    ]
    assert told[0] == told[1]


def test_the_window_is_the_last_steps(tmp_path: Path) -> None:
    """Checked every few steps, a metric is that of the samples of those steps: the loss that the journal has of them."""
    run = tmp_path / "run"
    fit(run, recipe=gated("train_loss < 0.9", "4 steps"))
    (met,) = (e for e in events(run) if isinstance(e, ConditionMet))
    sizes = [8, 8, 4] * 20  # twenty samples in batches of eight
    window = slice(met.step - 4, met.step)
    weighted = [loss * size for loss, size in zip(losses(run)[window], sizes[window], strict=True)]
    assert met.value == sum(weighted) / sum(sizes[window])
    assert met.step % 4 == 0
    for stop in range(4, met.step, 4):
        before = slice(stop - 4, stop)
        total = sum(loss * size for loss, size in zip(losses(run)[before], sizes[before], strict=True))
        assert total / sum(sizes[before]) >= 0.9


def test_an_error_is_counted_exactly() -> None:
    """`train_error` is the share of samples whose largest output is not their target, over all of them: a model that is
    right on 15 of 20 samples has 0.25, at any batch size.
    """
    inputs, targets = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
    targets[::4] = 3  # of every four samples, one is not what the identity says
    for size in (1, 3, 8, 20):
        model = nn.Linear(4, 4, bias=False)
        model.weight.data.copy_(torch.eye(4))
        stage = Stage("1 epoch", train="all", lr=1e-9, until="train_error <= 0.25")
        result = lehr.fit(
            model, TensorDataset(inputs, targets), recipe=Recipe([stage], batch_size=size), device="cpu"
        )
        assert result.history[0]["train_error"] == 0.25
        assert [d.value for d in result.plan.decisions] == [0.25]


def test_the_next_stage_begins_at_once(tmp_path: Path) -> None:
    """After the gate the next stage's epoch begins anew, its schedule at its start; the epoch that was cut is validated,
    and has the numbers of its steps alone.
    """
    run = tmp_path / "run"
    result = fit(run, recipe=gated())
    assert result is not None
    opened = gate(result)
    ended = [e for e in events(run) if isinstance(e, EpochEnded)]
    cut = next(e for e in ended if e.step == opened)
    assert "valid_loss" in cut.metrics
    sizes = [8, 8, 4][: opened - (ended[ended.index(cut) - 1].step)]
    part = losses(run)[opened - len(sizes) : opened]
    assert cut.train_loss == sum(a * b for a, b in zip(part, sizes, strict=True)) / sum(sizes)
    assert result.plan.stages[1].start == opened
    assert [e.reason for e in events(run) if isinstance(e, StageEnded)] == ["until", "length"]
    assert (
        sum(len(e.losses) for e in events(run) if isinstance(e, StepsTaken))
        == opened + 6
        == result.plan.total_steps
    )


METRICS = [
    "train_loss < 5", "train_error < 1.1", "train_accuracy > -1", "valid_loss < 9", "valid_error < 2", "valid_accuracy > -1",
    "valid_loss plateaus 1 epoch", "train_loss plateaus 1 epoch",
]  # fmt: skip


@pytest.mark.parametrize("until", METRICS)
def test_any_metric_by_name(until: str) -> None:
    """Losses, errors and accuracies of the training and of the validation can be waited for by name."""
    result = fit(None, recipe=gated(until, every=None))
    assert result is not None
    assert all(until.split()[0] in {*row, "valid_error"} for row in result.history if row["stage"] == 0)
    if "plateaus" not in until:
        assert gate(result) == 3


def test_a_scalar_of_the_loss_function() -> None:
    """Whatever further scalar a loss function returns is measured by its name, weighted by samples, for training and
    validation.
    """

    def loss(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        inputs, targets = batch
        return {"loss": functional.cross_entropy(model(inputs), targets), "first": inputs[:, 0].mean()}

    for until, of in (("train_first > -9", data()), ("valid_first > -9", data(9, seed=5))):
        result = fit(None, recipe=gated(until, every=None), loss=lambda _: loss)
        assert result is not None
        assert [d.value for d in result.plan.decisions] == pytest.approx([float(of.tensors[0][:, 0].mean())])


def test_a_metric_that_nothing_measures() -> None:
    """A condition on what nothing measures is refused: at once where it is known, at its first check where the person's
    own loss function decides.
    """
    with pytest.raises(
        RecipeError, match=r'stages\.0\.until: no metric is called \'train_eror\'; did you mean "train_error"'
    ):
        lehr.fit(net(), data(), recipe=gated("train_eror < 0.5", every=None), device="cpu")
    with pytest.raises(RecipeError, match=r"stages\.0\.until: there is no validation set"):
        fit(None, recipe=gated("valid_loss < 0.5", every=None), valid=None)

    def bare(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(RunError, match=r"until: 'train_error' needs what the model said and the classes"):
        fit(None, recipe=gated(), loss=lambda _: bare)
    with pytest.raises(RunError, match=r"until: nothing measures 'train_kl'"):
        fit(None, recipe=gated("train_kl < 0.5"), loss=lambda _: bare)
    with pytest.raises(RunError, match=r"until: no metric is called 'valid_kl'.* There are: .*valid_loss"):
        fit(None, recipe=gated("valid_kl < 0.5", every=None), loss=lambda _: bare)


def cooling(**said: Any) -> Recipe:
    """A plateau that cools, after a warm-up of an epoch: on a metric that never gets better."""
    stage = Stage(
        "9 epochs", train="all", lr=0.05, until="valid_flat_loss plateaus 2 epochs", schedule=warmup("3 steps") >> constant(), **said
    )  # fmt: skip
    return Recipe([stage, Stage("1 epoch", train="head", lr=0.01)], batch_size=8, seed=3)


def flat(_: int | None) -> Any:
    def loss(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": functional.cross_entropy(model(batch[0]), batch[1]), "flat_loss": torch.ones(())}

    return loss


def test_a_plateau_cools_after_a_warm_up(tmp_path: Path) -> None:
    """The rates come up along the warm-up, then fall by the factor at each plateau: what torch's SequentialLR cannot
    hold. Without a number of times the stage goes on to its length.
    """
    run = tmp_path / "run"
    result = fit(run, recipe=cooling(reduce=0.1), loss=flat)
    assert result is not None
    told = [(e.step, e.factor) for e in events(run) if isinstance(e, RateReduced)]
    # The first epoch is the warm-up; then two without a new best, and two more, until the ninth.
    assert told == [(9, 0.1), (15, pytest.approx(0.01)), (21, pytest.approx(0.001))]
    rates = result.plan.lr("head")
    assert rates[:3] == pytest.approx([0.05 * k / 4 for k in (1, 2, 3)])
    assert rates[3:27] == pytest.approx([0.05] * 6 + [0.005] * 6 + [5e-4] * 6 + [5e-5] * 6)
    assert [e.reason for e in events(run) if isinstance(e, StageEnded)] == ["length", "length"]


def test_a_plateau_after_the_last_reduction_ends_the_stage(tmp_path: Path) -> None:
    """With a number of times, the plateau after the last reduction ends the stage."""
    run = tmp_path / "run"
    fit(run, recipe=cooling(reduce={"by": 0.1, "times": 1}), loss=flat)
    assert [e.step for e in events(run) if isinstance(e, RateReduced)] == [9]
    assert [e.step for e in events(run) if isinstance(e, ConditionMet)] == [15]


@pytest.mark.parametrize("stop", [8, 9, 10, 14, 16])
def test_cooling_goes_on_after_a_stop(stop: int, tmp_path: Path) -> None:
    """A run that cools, stopped before or after a reduction, ends with the same bits."""
    recipe = cooling(reduce=0.1)
    whole = fit(tmp_path / "whole", recipe=recipe, loss=flat)

    def stopping(stop: int | None) -> Any:
        press, usual = presser(stop), flat(None)

        def loss(model: nn.Module, batch: Any) -> Any:
            press(model)
            return usual(model, batch)

        return loss

    assert fit(tmp_path / "run", recipe=recipe, stop=stop, loss=stopping) is None
    assert came_to(fit(tmp_path / "run", recipe=recipe, resume=True, loss=flat)) == came_to(whole)


def test_the_best_weights_of_a_stage_that_ended_sooner(tmp_path: Path) -> None:
    """A stage that a plateau has ended goes on from its best weights, which are not its last: those of the epoch that is
    told.
    """
    run = tmp_path / "run"
    stages = [
        Stage("20 epochs", train="all", lr=0.5, until="valid_loss plateaus 3 epochs", restore_best=True),
        Stage("1 step", train="head", lr=1e-12),
    ]
    result = fit(
        run, recipe=Recipe(stages, batch_size=8, seed=3), checkpoint={"every": "1 epoch", "keep_best": 1}
    )
    assert result is not None
    of_first = [row for row in result.history if row["stage"] == 0]
    assert len(of_first) < 20
    best = min(of_first, key=lambda row: row["valid_loss"])
    ended = next(e for e in events(run) if isinstance(e, StageEnded))
    assert (ended.reason, ended.restored_epoch) == ("until", best["epoch"])
    assert best["epoch"] == len(of_first) - 4
    assert result.history[-1]["valid_loss"] == pytest.approx(
        best["valid_loss"], rel=1e-6
    )  # what a step of 1e-12 leaves


def test_a_later_condition_may_be_changed(tmp_path: Path) -> None:
    """A run goes on with another condition for what is to come, and what was decided stays."""
    run = tmp_path / "run"
    recipe = gated()
    opened = gate(fit(None, recipe=recipe))
    assert fit(run, recipe=recipe, stop=opened + 1) is None
    other = Recipe(
        [recipe.stages[0], Stage("4 epochs", train="all", lr=0.02, until="train_loss < 99")], batch_size=8, seed=3, ema=0.9
    )  # fmt: skip
    result = fit(run, recipe=other, resume="changed")
    assert result is not None
    assert [(d.stage, d.step) for d in result.plan.decisions] == [(0, opened), (1, opened + 3)]


def test_a_gate_of_an_objective() -> None:
    """A stage with objectives may wait for the loss of one of them, by its name."""

    def half(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1]) / 2

    objectives = [Objective("a", half, train="fc", lr=0.05), Objective("b", half, train="body", lr=0.01)]
    stage = Stage(
        "9 epochs", objectives=objectives, until="train_a_loss < 99", every="4 steps", schedule=constant()
    )
    result = lehr.fit(net(), data(), recipe=Recipe([stage], batch_size=8), device="cpu")
    assert [d.step for d in result.plan.decisions] == [4]
    both = result.history[0]
    assert result.plan.decisions[0].value == pytest.approx(both["train_a_loss"])


def test_workers_do_not_change_the_gate() -> None:
    """An epoch that is cut in its middle, while other processes have loaded what follows, changes nothing: with two
    workers the run ends with the bits of a run without.
    """
    found = [came_to(fit(None, recipe=gated(), train=_Samples(), workers=workers)) for workers in (0, 2)]
    assert found[0] == found[1]


class _Samples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The usual samples, but not as tensors in memory, with noise."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, target = data()[index]
        return inputs + 0.1 * torch.randn(6), target


def test_a_plateau_whose_direction_is_not_known() -> None:
    """A plateau of a metric of which it is not known which way it goes is refused; a word in its name, or a torchmetric,
    says so.
    """
    with pytest.raises(RecipeError, match=r"stages\.0\.until: is more or less of 'valid_mae' better\?"):
        fit(None, recipe=gated("valid_mae plateaus 2 epochs", every=None))


def test_a_nan_that_ends_a_stage_leaves_a_plan_that_can_be_kept(tmp_path: Path) -> None:
    """A plateau may end on a value that is no number; the plan that followed still has a hash, and is read back."""

    def loss(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {
            "loss": functional.cross_entropy(model(batch[0]), batch[1]),
            "odd_loss": torch.tensor(torch.nan),
        }

    result = fit(None, recipe=gated("train_odd_loss plateaus 2 epochs", every=None), loss=lambda _: loss)
    assert result is not None
    (decision,) = result.plan.decisions
    assert math.isnan(decision.value)
    result.plan.save(tmp_path / "plan.json")
    assert lehr.Plan.load(tmp_path / "plan.json").hash == result.plan.hash


def test_an_error_after_an_early_end_names_the_stage_that_it_is_in() -> None:
    """After a stage that ended sooner, a loss that is not finite is told with the stage and rates of the plan that is
    followed.
    """
    done = 0

    def loss(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        nonlocal done
        done += model.training
        said = cross_entropy()(model, batch)
        return {**said, "loss": said["loss"] * (torch.nan if done > 6 else 1.0)}  # type: ignore[call-overload]

    with pytest.raises(NonFiniteError, match=r"at step 6 \(stage 2, 'all'; rates: "):
        fit(None, recipe=gated("train_loss < 99"), loss=lambda _: loss)


def test_what_evidence_has_ended_is_not_made_longer(tmp_path: Path) -> None:
    """A run whose last stage has ended on evidence is not made longer, nor is its condition taken back: that would train
    nothing, and say nothing; a stage after it goes on.
    """
    run = tmp_path / "run"
    recipe = Recipe([Stage("9 epochs", train="all", lr=0.02, until="train_loss < 99")], batch_size=8, seed=3)
    assert gate(fit(run, recipe=recipe)) == 3
    before = (run / "recipe.toml").read_bytes()
    free = Recipe([Stage("20 epochs", train="all", lr=0.02)], batch_size=8, seed=3)
    for changed in (extended(recipe, "2 epochs"), free):
        with pytest.raises(
            RecipeError, match=r"stage 1 has ended on evidence, after step 3 \(train_loss < 99\.0\)"
        ):
            fit(run, recipe=changed, resume="changed")
    assert (run / "recipe.toml").read_bytes() == before
    more = Recipe([*recipe.stages, Stage("1 epoch", train="all", lr=0.01)], batch_size=8, seed=3)
    result = fit(run, recipe=more, resume="changed")
    assert result is not None
    assert result.plan.total_steps == 6


def test_what_has_cooled_keeps_its_factor(tmp_path: Path) -> None:
    """A stage that has cooled goes on with the factor by which it did: another would change what is done."""
    run = tmp_path / "run"
    fit(run, recipe=cooling(reduce=0.1), loss=flat, stop=None)
    other = cooling(reduce=0.5)
    with pytest.raises(
        RecipeError, match=r"stage 1 has cooled by 0\.1 already, 3 times; leave `reduce` as it was"
    ):
        fit(run, recipe=other, loss=flat, resume="changed")
