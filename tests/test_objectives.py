"""Objectives that take turns: what a turn changes and what it leaves alone, counters, scales, averages, resumes."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adversaries
import lehr
from adversaries import Pair, d_loss, g_loss, pair, real, recipe
from lehr.errors import RecipeError, RequestError, RunError
from lehr.events import EpochEnded, FreezeAudited, Progressed, StepsTaken
from lehr.recipe import Objective, Recipe, Stage
from lehr.run.facts import named
from lehr.run.freezing import freeze, set_trainable
from lehr.run.optimizer import apply, optimizer
from lehr.schedules import constant, linear
from small_run import bits, came_to, checkpoints, events

OPTIMIZERS = ["sgd", {"name": "sgd", "momentum": 0.9}, "adamw", "rmsprop", "adam"]


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 2), st.sampled_from(OPTIMIZERS), st.floats(0, 0.1), st.sampled_from([None, 0.5])
)  # fmt: skip
def test_a_turn_changes_nothing_else(
    every: int, repeat: int, kind: Any, decay: float, clip: float | None
) -> None:
    """After any turn every parameter outside the objective, and every buffer of the modules that it froze, is unchanged
    to the bit, and has no gradient, whatever the optimizer, the decay, the momentum and the clipping.
    """
    before: dict[str, Any] = {}

    def watch(name: str, model: Any) -> None:
        _check_turn(before, model)
        own = "discriminator" if name == "d" else "generator"
        before.update(own=own, state={k: v.clone() for k, v in model.state_dict().items()})
        assert all(p.requires_grad == n.startswith(own) for n, p in model.named_parameters())
        assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith(own))
        other = model.generator if name == "d" else model.discriminator
        assert not any(module.training for module in other.modules())
        assert all(module.training for module in getattr(model, own).modules())

    how = recipe(
        {"optimizer": kind}, {"every": every, "repeat": repeat, "clip_norm": clip}, weight_decay=decay
    )
    model = pair()
    adversaries.fit(model=model, watch=watch, recipe=how)
    _check_turn(before, model)


def _check_turn(before: dict[str, Any], model: nn.Module) -> None:
    if before:
        changed = {k for k, v in model.state_dict().items() if bits(v) != bits(before["state"][k])}
        assert changed
        assert all(name.startswith(before["own"]) for name in changed)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_counters_are_their_own(d_every: int, d_repeat: int, g_every: int, g_repeat: int) -> None:
    """Each objective makes the updates that `every` and `repeat` say: its calls, its optimizer's own count and the
    plan's count are the same, and differ between the two where these do.
    """
    calls = {"d": 0, "g": 0}

    def watch(name: str, _: Any) -> None:
        calls[name] += 1

    how = recipe({"every": d_every, "repeat": d_repeat}, {"every": g_every, "repeat": g_repeat})
    result = adversaries.fit(watch=watch, recipe=how)
    expected = {"d": 3 * -(-5 // d_every) * d_repeat, "g": 3 * -(-5 // g_every) * g_repeat}
    assert calls == expected
    assert {name: sum(step.objective == name for step in result.plan) for name in "dg"} == expected


def test_the_optimizers_count_for_themselves(tmp_path: Path) -> None:
    """Each optimizer's state is of its own parameters, and has its own number of steps, in the checkpoint as well."""
    adversaries.fit(tmp_path / "run", recipe=recipe({"repeat": 2}, {"every": 2}))
    from lehr.run.checkpoint import CheckpointFolder

    found = CheckpointFolder(tmp_path / "run" / "checkpoints").newest()
    assert found is not None
    slots = found.snapshot.state.optimizer
    assert {k.split(".")[0] for k in slots["d"]} == {"discriminator"}
    assert {k.split(".")[0] for k in slots["g"]} == {"generator"}
    tensors = found.snapshot.tensors
    assert float(tensors["optimizer.d/discriminator.0.weight/step"]) == 30
    assert float(tensors["optimizer.g/generator.0.weight/step"]) == 9


def test_it_is_the_loop_by_hand() -> None:
    """The weights are those of a loop written by hand in plain PyTorch: two optimizers (fused, as lehr takes them),
    requires_grad, and eval mode for the other network.
    """
    how = recipe(g={"every": 2}, schedule=constant())
    result = adversaries.fit(recipe=how)
    model = pair()
    own = {"d": model.discriminator, "g": model.generator}
    other = {"d": model.generator, "g": model.discriminator}
    optimizers = {
        "d": torch.optim.Adam(model.discriminator.parameters(), lr=0.02, betas=(0.5, 0.999), fused=True),
        "g": torch.optim.Adam(model.generator.parameters(), lr=0.01, betas=(0.5, 0.999), fused=True),
    }
    from lehr.run.sampler import cut, order

    torch.manual_seed(3)
    samples = real().tensors[0]
    for epoch in range(3):
        for number, batch in enumerate(cut(order(40, 3, epoch), 8)):
            for name, loss in (("d", d_loss), ("g", g_loss)):
                if name == "g" and number % 2:
                    continue
                own[name].requires_grad_(True).train()
                other[name].requires_grad_(False).eval()
                optimizers[name].zero_grad()
                loss(model, [samples[batch]]).backward()
                optimizers[name].step()
    found, expected = result.model.state_dict(), model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_frozen_by_hand_stays_frozen() -> None:
    """What the person froze stays unchanged to the bit through all turns (FreezeD), and so do its buffers."""
    model = pair()
    freeze(model, ["discriminator.0", "discriminator.1"])
    before = {k: bits(v) for k, v in model.state_dict().items()}
    result = adversaries.fit(model=model, recipe=recipe({"train": ["all", "!generator"]}))
    after = {k: bits(v) for k, v in result.model.state_dict().items()}
    same = {k for k in before if before[k] == after[k]}
    assert same == {k for k in before if k.startswith(("discriminator.0", "discriminator.1"))}


def test_losses_are_told_by_name(tmp_path: Path) -> None:
    """History, journal and progress have each objective's loss by its name: the mean over the samples of its updates."""
    told: list[Any] = []
    result = adversaries.fit(
        tmp_path / "run", recipe=recipe({"repeat": 2}, {"every": 2}), observers=[told.append]
    )
    rows = [e for e in events(tmp_path / "run") if isinstance(e, EpochEnded)]
    steps = [e for e in events(tmp_path / "run") if isinstance(e, StepsTaken)]
    pairs = [pair for e in steps for pair in zip(e.objectives, e.losses, strict=True)]
    assert [name for name, _ in pairs] == [step.objective for step in result.plan]
    for number, (row, event) in enumerate(zip(result.history, rows, strict=True)):
        of_epoch = pairs[number * 13 : number * 13 + 13]  # five rounds: ten updates of d, three of g
        for name in "dg":
            mean = sum(loss for n, loss in of_epoch if n == name) / sum(n == name for n, _ in of_epoch)
            assert row[f"train_{name}_loss"] == event.metrics[f"train_{name}_loss"] == pytest.approx(mean)
    assert [set(e.losses) for e in told if isinstance(e, Progressed)][-1] == {"d", "g"}


@pytest.mark.parametrize("stop", [1, 2, 3, 7, 13, 14, 16, 30, 38])
def test_a_stop_between_turns_changes_nothing(stop: int, tmp_path: Path) -> None:
    """Stopped in any turn, a run goes on to the same bits, averages and moments of both included; it is saved between
    batches, so that both have had their turn.
    """
    how = recipe({"repeat": 2}, {"every": 2}, ema=0.9)
    whole = adversaries.fit(tmp_path / "whole", recipe=how)
    calls = 0

    def press(_: str, __: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            signal.raise_signal(signal.SIGINT)

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        adversaries.fit(run, watch=press, recipe=how)
    from lehr.run.checkpoint import CheckpointFolder

    at = CheckpointFolder(run / "checkpoints").newest_state().at.step
    assert at >= stop
    assert at == 39 or whole.plan.stages[0].ends_round(at - 1)
    again = adversaries.fit(run, recipe=how, resume=True)
    assert came_to(again) == came_to(whole)


def test_the_average_is_of_what_its_turn_trains() -> None:
    """The moving average of a network takes in its own updates only, counted for itself."""
    how = recipe({"repeat": 3}, {"every": 5}, ema=0.5, schedule=constant())
    weights: dict[str, list[torch.Tensor]] = {"d": [], "g": []}
    model = pair()

    def watch(name: str, now: Any) -> None:
        weights[name].append(
            getattr(now, {"d": "discriminator", "g": "generator"}[name])[0].weight.detach().clone()
        )

    start = {
        "d": model.discriminator[0].weight.detach().clone(),
        "g": model.generator[0].weight.detach().clone(),
    }
    ends: dict[str, torch.Tensor] = {}

    def last(event: Any) -> None:
        if isinstance(event, EpochEnded):
            ends["d"] = model.discriminator[0].weight.detach().clone()
            ends["g"] = model.generator[0].weight.detach().clone()

    result = adversaries.fit(model=model, watch=watch, recipe=how, observers=[last])
    for name, part in (("d", result.model.discriminator), ("g", result.model.generator)):
        average = start[name]
        for count, weight in enumerate([*weights[name][1:], ends[name]]):
            decay = min(0.5, (1 + count) / (10 + count))
            average = average + (1 - decay) * (weight - average)
        torch.testing.assert_close(part[0].weight.detach(), average)


def test_fp16_scales_are_their_own(tmp_path: Path) -> None:
    """With fp16 each objective has a scale of its own; one that has no turn in a stage, since all of it is frozen there,
    keeps its scale and does not fail.
    """
    how = recipe()
    objectives = how.stages[0].objectives
    stages = [
        how.stages[0],
        Stage("1 epoch", objectives=objectives[1:]),
        Stage("1 epoch", objectives=objectives),
    ]
    how = Recipe(stages, batch_size=8, seed=3)
    run = tmp_path / "run"
    result = adversaries.fit(run, recipe=how, precision="fp16")
    assert all(bool(p.isfinite().all()) for p in result.model.parameters())
    from lehr.run.checkpoint import CheckpointFolder

    scales = CheckpointFolder(run / "checkpoints").newest_state().scalers
    assert {name: scale["_growth_tracker"] for name, scale in scales.items()} == {"d": 20, "g": 25}


def test_fp16_with_a_loss_that_reaches_only_some() -> None:
    """An objective some of whose parameters get no gradient, all of those that its optimizer has among them, steps
    nothing and does not fail under fp16.
    """

    class Unused(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.zeros(()))

    def idle(model: Any, _: Any) -> torch.Tensor:
        return (model.spare * 0.0).detach() + model.spare.new_zeros(()).requires_grad_()

    torch.manual_seed(0)
    how = recipe({"loss": idle, "train": "spare"})
    result = adversaries.fit(model=Unused(), recipe=how, precision="fp16")
    assert result.model.spare.item() == 0.0


def test_a_loss_that_reaches_nothing_is_refused() -> None:
    """A loss that depends on nothing that its objective trains is refused with its name, before it could pass for
    training.
    """

    def detached(model: Any, batch: Any) -> torch.Tensor:
        return d_loss(model, batch).detach()

    with pytest.raises(
        RunError, match=r"step 0: the loss of objective 'd' depends on nothing that trains in stage 1"
    ):
        adversaries.fit(recipe=recipe({"loss": detached}))


def test_the_loop_of_ones_own() -> None:
    """Own loop: an optimizer for each objective, `apply` for each step, and the weights that `fit` gives."""
    how = recipe(g={"every": 2})
    model, samples = pair(), real().tensors[0]
    plan = lehr.plan(how, model, samples=40)
    optimizers = {name: lehr.optimizer(plan, model, name) for name in plan.objectives}
    loss = {"d": d_loss, "g": g_loss}
    from lehr.run.sampler import cut, order

    torch.manual_seed(3)
    (stage,) = plan.stages
    model.train()
    for step in plan:
        batch = cut(order(40, plan.seed, step.epoch), 8)[stage.round_of(step.index)]
        lehr.apply(step, model, optimizers[step.objective])
        optimizers[step.objective].zero_grad()
        loss[step.objective](model, [samples[batch]]).backward()
        optimizers[step.objective].step()
    found, expected = model.state_dict(), adversaries.fit(recipe=how).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_whose_optimizer_must_be_said() -> None:
    """The optimizer of a plan with several objectives wants to know whose it is to be; a step refuses another's."""
    model = pair()
    plan = lehr.plan(recipe(), model, samples=40)
    with pytest.raises(RecipeError, match="the plan has several objectives; say whose optimizer"):
        optimizer(plan, model)
    with pytest.raises(RecipeError, match="the plan has no objective 'x'"):
        optimizer(plan, model, "x")
    with pytest.raises(RecipeError, match="the optimizer has the groups"):
        apply(plan[0], model, optimizer(plan, model, "g"))


def test_losses_may_be_given_to_fit() -> None:
    """A recipe without loss functions gets them from `fit`, by name; unknown names and missing ones are refused."""
    bare = recipe({"loss": None}, {"loss": None})
    given = adversaries.fit(recipe=bare, loss={"d": d_loss, "g": g_loss})
    assert came_to(given) == came_to(adversaries.fit())
    with pytest.raises(
        RecipeError, match=r"stages\.0\.objectives: 'g' has no loss function; give it in Python"
    ):
        adversaries.fit(recipe=bare, loss={"d": d_loss})
    with pytest.raises(RequestError, match=r'loss: no objective is called \'dd\'; did you mean "d"'):
        adversaries.fit(loss={"dd": d_loss})
    with pytest.raises(RequestError, match="loss: a function is for stages without objectives"):
        adversaries.fit(loss=d_loss)


def test_a_recipe_with_objectives_is_written_down(tmp_path: Path) -> None:
    """The run's recipe.toml says the objectives, but for their functions, and with these it is the same plan."""
    run = tmp_path / "run"
    adversaries.fit(run)
    read = lehr.load_recipe(run / "recipe.toml")
    assert [o.name for o in read.stages[0].objectives] == ["d", "g"]
    plan = lehr.Plan.load(run / "plan.json")
    assert lehr.plan(read, pair(), samples=40).hash == plan.hash
    assert len(checkpoints(run)) >= 2
    (audit,) = (e for e in events(run) if isinstance(e, FreezeAudited))
    assert (audit.parameters, audit.buffers) == (0, 0)


def test_both_losses_are_validated() -> None:
    """Over a validation set each objective's loss is measured by its name, and their mean is `valid_loss`."""
    result = lehr.fit(pair(), real(), real(9), recipe=recipe(), device="cpu")
    for row in result.history:
        assert row["valid_loss"] == pytest.approx((row["valid_d_loss"] + row["valid_g_loss"]) / 2, rel=1e-6)


def test_objectives_and_ordinary_stages_follow_each_other() -> None:
    """A run may have an ordinary stage before one with objectives; each has its own optimizer, and its own loss."""

    def reconstruct(model: Any, batch: Any) -> torch.Tensor:
        return ((model.generator(batch[0][:, :3]) - batch[0]) ** 2).mean()

    how = recipe()
    first = Stage("2 epochs", train="generator", lr=0.01, schedule=linear())
    how = Recipe([first, how.stages[0]], batch_size=8, seed=3)
    result = lehr.fit(pair(), real(), recipe=how, loss=reconstruct, device="cpu")
    assert list(result.plan.objectives) == ["", "d", "g"]
    assert [sorted(k for k in row if k.startswith("train_")) for row in result.history] == [
        *[["train_loss"]] * 2,
        *[["train_d_loss", "train_g_loss", "train_loss"]] * 3,
    ]


@given(st.lists(st.sampled_from(["d", "g", "all", "d.0", "train", "eval"]), min_size=1, max_size=12))
@settings(max_examples=60)
def test_turns_leave_what_settling_leaves(calls: list[str]) -> None:
    """A model that goes from turn to turn is as one that is settled anew each time: what trains, modes and notes, with
    any calls of train() and eval() between.
    """
    quick, slow = pair(), pair()
    for call in calls:
        for model in (quick, slow):
            if call in ("train", "eval"):
                getattr(model, call)()
                continue
            parts = {"d": "discriminator", "g": "generator", "all": "", "d.0": "discriminator.0"}
            names = frozenset(name for name in named(model) if name.startswith(parts[call]))
            if model is slow:
                slow.__dict__.pop("_lehr_frozen", None)
            set_trainable(model, names)
    assert [p.requires_grad for p in quick.parameters()] == [p.requires_grad for p in slow.parameters()]
    assert [m.training for m in quick.modules()] == [m.training for m in slow.modules()]
    for ours, theirs in zip(quick.modules(), slow.modules(), strict=True):
        assert ours.__dict__.get("_lehr_by_hand") == theirs.__dict__.get("_lehr_by_hand")
        assert ("train" in ours.__dict__) == ("train" in theirs.__dict__)


def test_a_check_without_a_turn_of_the_one_that_is_waited_for() -> None:
    """Where no turn of the objective lies between two checks nothing is measured, and nothing is decided on it."""

    def falling(model: Any, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return g_loss(model, batch) * 0.0 + 10.0 / count

    count = 0
    how = recipe({"repeat": 4}, {"loss": falling})
    stage = how.stages[0]
    how = Recipe(
        [Stage("3 epochs", objectives=stage.objectives, until="train_g_loss plateaus 3 steps", every="1 step")],
        batch_size=8, seed=3, schedule=constant(),
    )  # fmt: skip
    result = adversaries.fit(recipe=how)
    assert result.plan.decisions == ()  # its loss falls at each of its turns


def test_the_average_goes_on_from_ordinary_stages() -> None:
    """An average that has taken in many updates of ordinary stages is not begun anew by the first turn of an objective."""

    counted: list[int] = []
    from lehr.run import ema

    usual = ema.Ema.update

    def seen(self: Any, step: int, trained: Any = None) -> None:
        counted.append(step)
        usual(self, step, trained)

    how = recipe()
    how = Recipe([Stage("2 epochs", train="all", lr=0.01), how.stages[0]], batch_size=8, seed=3, ema=0.99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema.Ema, "update", seen)
        adversaries.fit(recipe=how, loss={"": reconstruct_all, "d": d_loss, "g": g_loss})
    assert counted[:10] == list(range(10))
    assert counted[10:14] == [10, 10, 11, 11]


def reconstruct_all(model: Any, batch: Any) -> torch.Tensor:
    made = model.generator(batch[0][:, :3])
    return ((made - batch[0]) ** 2).mean() + model.discriminator(made).mean() ** 2


def test_gradients_that_validation_does_not_have() -> None:
    """A loss function that wants gradients, such as a gradient penalty, is refused in validation with what to do."""

    def penalised(model: Any, batch: Any) -> torch.Tensor:
        inputs = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model.discriminator(inputs).sum(), inputs, create_graph=model.training)
        return d_loss(model, batch) + (slope.norm(dim=1) - 1).pow(2).mean()

    with pytest.raises(RunError, match=r"validation: the loss function wants gradients .* leave valid= out"):
        lehr.fit(pair(), real(), real(9), recipe=recipe({"loss": penalised}), device="cpu")


def test_scalars_of_objectives_are_validated() -> None:
    """A further scalar of an objective's loss is validated by the objective's name and its own."""

    def more(model: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": d_loss(model, batch), "two": torch.tensor(2.0)}

    result = lehr.fit(pair(), real(), real(9), recipe=recipe({"loss": more}), device="cpu")
    assert [row["valid_d_two"] for row in result.history] == [2.0] * 3


def test_until_waits_for_objectives_of_its_own_stage() -> None:
    """A condition on an objective that has no turn in the stage is refused before anything is trained."""
    how = recipe()
    first = Stage("1 epoch", train="generator", lr=0.01, until="train_d_loss < 0.1")
    with pytest.raises(
        RecipeError, match=r"stages\.0\.until: 'train_d_loss' is of an objective that has no turn"
    ):
        adversaries.fit(recipe=Recipe([first, how.stages[0]], batch_size=8))


class Remembering(nn.Module):
    """A loss with a state of its own."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, model: Any, batch: Any) -> torch.Tensor:
        loss = d_loss(model, batch)
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.mean.clone()


def test_a_loss_with_a_state_in_each_stage(tmp_path: Path) -> None:
    """Two loss functions with a state, of one objective in two stages, are both saved, and a stop in the first stage
    changes nothing.
    """

    def two_stages() -> Recipe:
        made = []
        for _ in range(2):
            d = Objective("d", Remembering(), train="discriminator", lr=0.02)
            made.append(Stage("2 epochs", objectives=[d, Objective("g", g_loss, train="generator", lr=0.01)]))
        return Recipe(made, batch_size=8, seed=3)

    whole = adversaries.fit(tmp_path / "whole", recipe=two_stages())
    how = two_stages()
    stage = how.stages[0]
    g = stage.objectives[1]
    pressed = 0

    def pressing(model: Any, batch: Any) -> torch.Tensor:
        nonlocal pressed
        pressed += 1
        if pressed == 3:
            signal.raise_signal(signal.SIGINT)
        return g_loss(model, batch)

    stopped = Recipe(
        [replace(stage, objectives=[stage.objectives[0], replace(g, loss=pressing)]), how.stages[1]], batch_size=8, seed=3
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        adversaries.fit(tmp_path / "run", recipe=stopped)
    assert came_to(adversaries.fit(tmp_path / "run", recipe=two_stages(), resume=True)) == came_to(whole)


def cut_before_g(**said: Any) -> Recipe:
    """Eleven steps: an epoch of ten, and one more, which is d's."""
    stage = recipe().stages[0]
    until = said.pop("until", None)
    return Recipe([Stage("11 steps", objectives=stage.objectives, until=until)], batch_size=8, seed=3, **said)


def test_an_epoch_without_a_turn_decides_nothing() -> None:
    """In an epoch that is cut before the turn of the objective that is waited for, or watched, nothing is decided, and
    it is not the best.
    """
    result = adversaries.fit(recipe=cut_before_g(until="train_g_loss < 0.0001"))
    assert result.plan.decisions == ()
    assert "train_g_loss" not in result.history[1]
    result = lehr.fit(pair(), real(), real(9), recipe=cut_before_g(monitor="train_g_loss"), device="cpu")
    assert [row["best"] for row in result.history] == [True, False]


def test_the_loss_of_an_objective_may_say_which_is_best() -> None:
    """Without validation an objective's training loss says which epoch is best, and when patience ends; where a stage does
    not have that objective it is refused.
    """
    result = adversaries.fit(recipe=recipe(monitor="train_d_loss", patience="1 epoch", restore_best=True))
    assert any(row["best"] for row in result.history)
    losses = [row["train_d_loss"] for row in result.history]
    assert result.best["train_d_loss"] == min(losses)
    how = recipe()
    mixed = Recipe(
        [Stage("1 epoch", train="generator", lr=0.01), how.stages[0]], batch_size=8, monitor="train_d_loss"
    )
    with pytest.raises(
        RecipeError, match=r"monitor: 'train_d_loss' is not measured in stage 1, where 'd' has no turn"
    ):
        adversaries.fit(recipe=mixed)
