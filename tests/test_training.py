"""All that changes while a run goes on: it is taken and put back to the bit, whatever the run has in it."""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassF1Score

import lehr
from lehr.errors import CheckpointError
from lehr.events import CheckpointWritten, EpochEnded, Resumed, RunEnded, StepsTaken
from lehr.journal import read_journal
from lehr.recipe import Recipe, Stage
from lehr.run.checkpoint import CheckpointFolder
from lehr.run.files import write_tensors
from lehr.run.state import FileSum
from small_run import (
    STEPS,
    Net,
    came_to,
    checkpoints,
    data,
    events,
    fit,
    forge,
    losses,
    net,
    presser,
    pressing,
    recipe,
)

HELD = lehr.constant()
Said = Callable[[], dict[str, Any]]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run comes to that nobody stops."""
    torch.set_num_threads(1)
    return came_to(fit(tmp_path_factory.mktemp("unbroken") / "run"))


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_stopped_after_any_step(stop: int, unbroken: dict[str, Any], tmp_path: Path) -> None:
    """Wherever a run of two stages is stopped and gone on with, it ends with the same bits, in the same model or
    another that was made as the first.
    """
    run = tmp_path / "run"
    assert fit(run, stop=stop) is None
    assert came_to(fit(run, resume=True, model=net(seed=stop))) == unbroken


def test_stopped_after_every_step(unbroken: dict[str, Any], tmp_path: Path) -> None:
    """A run that is stopped after each of its steps ends with the same bits."""
    run = tmp_path / "run"
    for _ in range(STEPS):
        assert fit(run, stop=1, resume="auto") is None
    assert came_to(fit(run, resume="auto", stop=1)) == unbroken
    told = [record.event for record in read_journal(run / "journal.jsonl")]
    assert sum(isinstance(event, Resumed) for event in told) == STEPS


def test_taken_back_to_any_checkpoint(unbroken: dict[str, Any], tmp_path: Path) -> None:
    """From whichever checkpoint a run goes on, in an epoch, between two or at a stage's end, the bits are the same."""
    run = tmp_path / "run"
    fit(run, checkpoint={"every": "1 steps", "keep": 99})
    for path in reversed(checkpoints(run)):
        path.unlink()
        if not checkpoints(run):
            break
        assert came_to(fit(run, resume=True, checkpoint={"every": "1000 steps", "keep": 99})) == unbroken
        for later in checkpoints(run):
            if later.name > path.name:
                later.unlink()


class Counting(nn.Module):
    """A loss with a state of its own, and randomness."""

    def __init__(self, stop: int | None) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(0.0))
        self.press = presser(stop)

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.press(model)
        self.seen += 1
        smoothing = 0.1 * torch.rand(()).item() + 0.01 * float(self.seen)
        return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)


def averaged(stop: int | None) -> Callable[[nn.Module, Any], dict[str, torch.Tensor]]:
    """A person's own loss that says what metrics are to be measured on."""
    usual = pressing(stop)
    return lambda model, batch: usual(model, batch) | {"more": torch.zeros(())}


class Noisy(Dataset[Any]):
    """Samples that are changed at random, by three generators."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, target = data()[index]
        noise = torch.randn(6) + random.gauss(0, 1) + np.random.standard_normal()
        return inputs + 0.1 * noise.float(), target


def loader(**said: Any) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8, **said)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def without_best() -> Recipe:
    stages = [Stage("2 epochs", train="head", lr=0.05), Stage("2 epochs", train="all", lr=0.02)]
    return Recipe(stages, batch_size=8, ema=0.9, seed=3)


def doubles(samples: int) -> TensorDataset:
    inputs, targets = data(samples).tensors
    return TensorDataset(inputs.double(), targets)


def restarting() -> Recipe:
    return recipe(schedule=lehr.restarts("1 epochs", shape=lehr.linear()))


FEATURES: dict[str, Said] = {
    "no average": lambda: {"recipe": recipe(ema=None)},
    "clipping, accumulation": lambda: {"recipe": recipe(batch_size=3, accumulate=2, clip_norm=0.1)},
    "momentum": lambda: {"recipe": recipe(optimizer={"name": "sgd", "momentum": 0.9, "nesterov": True})},
    "restarts": lambda: {"recipe": restarting()},
    "decay and a floor": lambda: {"recipe": recipe(weight_decay=0.1, min_lr=1e-4)},
    "no validation": lambda: {"valid": None, "recipe": recipe(monitor="train_loss")},
    "nothing that says which is best": lambda: {"valid": None, "recipe": without_best()},
    "metrics": lambda: {"metrics": {"f1": MulticlassF1Score(3)}, "recipe": recipe(monitor="valid_f1")},
    "several best": lambda: {"checkpoint": {"every": "2 steps", "keep_best": 3}},
    "a loss of one's own": lambda: {"loss": averaged},
    "a loss with a state": lambda: {"loss": Counting, "metrics": {}},
    "half precision": lambda: {"precision": "bf16"},
    "a scale": lambda: {"precision": "fp16"},
    "doubles": lambda: {"model": net().double(), "train": doubles(20), "valid": doubles(9)},
    "random samples": lambda: {"train": Noisy()},
    "a loader": lambda: {"train": loader(shuffle=True)},
    "a loader with its own generator": lambda: {"train": loader(shuffle=True, generator=seeded())},
    "a loader of random samples": lambda: {"train": DataLoader(Noisy(), batch_size=8, shuffle=True)},
}


@pytest.mark.parametrize("stop", [2, 8])
@pytest.mark.parametrize("feature", FEATURES)
def test_whatever_the_run_has_in_it(feature: str, stop: int, tmp_path: Path) -> None:
    """A run with any of these goes on to the bit from the middle of an epoch: what each keeps is in the checkpoint."""
    straight = came_to(fit(tmp_path / "straight", **FEATURES[feature]()))
    run = tmp_path / "run"
    assert fit(run, stop=stop, **FEATURES[feature]()) is None
    assert came_to(fit(run, resume=True, **FEATURES[feature]())) == straight


def patient() -> Recipe:
    stages = [
        Stage("1 epochs", train="head", lr=0.05),
        Stage("30 epochs", train="all", lr=0.5, restore_best=True),
    ]
    return Recipe(stages, batch_size=8, seed=3, patience="2 epochs", schedule=HELD)


@pytest.mark.parametrize("back", [1, 4, 7])
def test_patience_is_remembered(back: int, tmp_path: Path) -> None:
    """Epochs without a better one are counted on: the run ends where it would have ended, for the same reason."""
    straight = came_to(fit(tmp_path / "straight", recipe=patient()))
    (end,) = [e for e in events(tmp_path / "straight") if isinstance(e, RunEnded)]
    assert end.reason == "patience"
    assert end.step < 90
    run = tmp_path / "run"
    fit(run, stop=end.step - back, recipe=patient())
    assert came_to(fit(run, resume=True, recipe=patient())) == straight
    before = (run / "journal.jsonl").read_bytes()
    assert came_to(fit(run, resume=True, recipe=patient())) == straight
    assert (run / "journal.jsonl").read_bytes() == before


def test_a_refused_update_leaves_its_scale(tmp_path: Path) -> None:
    """The fp16 scale that refused updates have brought down is in the checkpoint, with how long it has held."""
    run = tmp_path / "run"
    fit(run, stop=5, precision="fp16")
    found = CheckpointFolder(run / "checkpoints").newest()
    assert found is not None
    scaler = found.snapshot.state.scalers[""]
    assert scaler["_growth_tracker"] == 5 or scaler["scale"] < 65536.0


SCALES = ({"scale": 1e400}, {"growth_interval": 1.5}, {"_growth_tracker": -1}, {"more": 1}, {"scale": 1})


@pytest.mark.parametrize("change", SCALES, ids=str)
def test_a_scale_that_cannot_be_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """A forged fp16 scale is refused when it is read, not when it is used."""
    run = tmp_path / "run"
    fit(run, stop=1, precision="fp16")
    first, last = checkpoints(run)
    first.unlink()
    forge(last, lambda state: state["scalers"][""].update(change))
    with pytest.raises(CheckpointError, match="scale"):
        fit(run, resume=True, precision="fp16")


def test_the_history_is_all_of_it(tmp_path: Path) -> None:
    """The result of a resumed run has the rows of all epochs, also those of processes before, with their types."""
    straight = fit(None)
    run = tmp_path / "run"
    fit(run, stop=10)
    result = fit(run, resume=True)
    assert straight is not None
    assert result is not None
    assert [row["epoch"] for row in result.history] == [0, 1, 2, 3]
    assert [{k: type(v) for k, v in row.items()} for row in result.history] == [
        {k: type(v) for k, v in row.items()} for row in straight.history
    ]


def test_time_is_added_up(tmp_path: Path) -> None:
    """How long a run has trained is the sum over its processes; while it stood still no time passes."""
    run = tmp_path / "run"
    fit(run, stop=7)
    last = checkpoints(run)[-1]
    forge(last, lambda state: state.update(seconds=1e6))
    fit(run, resume=True)
    (end,) = [e for e in events(run) if isinstance(e, RunEnded)]
    assert 1e6 < end.seconds < 1e6 + 60


def test_the_step_of_every_loss(tmp_path: Path) -> None:
    """The journal of a run that was stopped again and again tells of each step once, in order."""
    run = tmp_path / "run"
    for stop in (2, 3, 4):
        fit(run, stop=stop, resume="auto")
    fit(run, resume=True)
    spans = [(e.start, e.stop) for e in events(run) if isinstance(e, StepsTaken)]
    assert [step for start, stop in spans for step in range(start, stop)] == list(range(STEPS))
    assert [e.epoch for e in events(run) if isinstance(e, EpochEnded)] == [0, 1, 2, 3]
    assert len(losses(run)) == STEPS


def test_a_checkpoint_of_what_was_just_put_back_is_the_same(tmp_path: Path) -> None:
    """A checkpoint that is taken before the loop has come to its epoch has all that the epoch has counted: one of a
    changed plan, in the middle of an epoch.
    """
    run = tmp_path / "run"
    held = {"schedule": HELD}
    fit(run, stop=8, recipe=recipe(**held))
    before = CheckpointFolder(run / "checkpoints").newest()
    fit(run, resume="changed", recipe=recipe("3 epochs", **held))
    paths = [p for p in checkpoints(run) if "step-8" in p.name]
    for path in set(checkpoints(run)) - set(paths):
        path.unlink()
    after = CheckpointFolder(run / "checkpoints").newest()
    assert before is not None
    assert after is not None
    assert len(paths) == 2
    was, now = before.snapshot.state, after.snapshot.state
    assert (now.so_far.loss_sum, now.so_far.samples) == (was.so_far.loss_sum, was.so_far.samples)
    assert now.so_far.samples == 16
    assert now.instead_of == was.plan_hash
    assert (now.at, now.history, now.best, now.random) == (was.at, was.history, was.best, was.random)
    assert all(torch.equal(after.snapshot.tensors[n], t) for n, t in before.snapshot.tensors.items())


def test_the_random_state_of_an_epoch_s_beginning_stays(tmp_path: Path) -> None:
    """A run on a person's own loader that changes its plan in an epoch, and is stopped before its next step, still
    draws that epoch's order.
    """

    def begun(**said: Any) -> dict[str, Any]:
        return {"train": loader(shuffle=True, generator=seeded()), "recipe": recipe(schedule=HELD, **said)}

    run, same = tmp_path / "run", tmp_path / "same"
    longer = {"last": "3 epochs"}
    for folder in (run, same):
        fit(folder, stop=8, **begun())
    straight = came_to(fit(same, resume="changed", **begun(**longer)))
    fit(run, resume="changed", **begun(**longer))
    for path in checkpoints(run):
        if "step-8" not in path.name:
            path.unlink()
    assert came_to(fit(run, resume=True, **begun(**longer))) == straight


# --- what does not fit ---


def test_best_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """Best weights that could not be loaded at the stage's end are refused at its beginning, by name."""
    run = tmp_path / "run"
    fit(run, stop=8)
    for path in checkpoints(run)[:-1]:
        path.unlink()
    (best,) = (run / "checkpoints").glob("best-*.safetensors")
    weights = load_file(best)
    write_tensors(
        best, {**{n: t.clone() for n, t in weights.items() if n != "fc.bias"}, "other": torch.ones(1)}
    )
    total = FileSum(best.stat().st_size, sha256(best.read_bytes()).hexdigest())
    forge(
        checkpoints(run)[-1],
        lambda state: state["files"][best.stem].update(bytes=total.bytes, sha256=total.sha256),
    )
    with pytest.raises(
        CheckpointError, match=r"best weights, of epoch \d, do not fit the model: fc.bias, other"
    ):
        fit(run, resume=True)


class WithBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("extra", torch.zeros(2))


@pytest.mark.parametrize("average", [None, 0.9])
def test_another_buffer_is_refused_by_name(average: float | None, tmp_path: Path) -> None:
    """A model with other buffers, which no plan knows of, is refused by name."""
    run = tmp_path / "run"
    fit(run, stop=8, recipe=recipe(ema=average))
    with pytest.raises(CheckpointError, match="lacks extra; expected the very model"):
        fit(run, resume=True, model=net(WithBuffer), recipe=recipe(ema=average))


def test_an_optimizer_that_keeps_anything_else_is_refused(tmp_path: Path) -> None:
    """What cannot be saved is refused with its name when the run is first saved with it."""

    class Keeping(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["list"] = [1]

    original = torch.optim.SGD
    torch.optim.SGD = Keeping  # type: ignore[misc]
    try:
        with pytest.raises(CheckpointError, match=r"keeps 'list' for '.*', a list"):
            fit(tmp_path / "run", recipe=recipe(optimizer="sgd"))
    finally:
        torch.optim.SGD = original  # type: ignore[misc]


def test_a_checkpoint_is_told_with_its_step(tmp_path: Path) -> None:
    """Each checkpoint that is on the disk stands in the journal with its step, size and times."""
    run = tmp_path / "run"
    fit(run, checkpoint="1 epoch")
    told = [e for e in events(run) if isinstance(e, CheckpointWritten)]
    assert {e.step for e in told} == {0, 3, 6, 9, 12}
    assert all(e.bytes > 0 and e.stall >= 0 and e.seconds > 0 for e in told)
