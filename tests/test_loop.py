"""`fit`, beside a plain torch loop written out by hand; what stops it; and what it tells and keeps."""

from __future__ import annotations

import dataclasses
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import lehr
from lehr.errors import DataError, FeedError, LehrError, NonFiniteError, RecipeError, RequestError, RunError
from lehr.events import (
    CheckpointWritten,
    EpochEnded,
    Event,
    FreezeAudited,
    Interrupted,
    Note,
    RunEnded,
    RunFailed,
    RunStarted,
    StageEnded,
    StageStarted,
    StepsTaken,
)  # fmt: skip
from lehr.journal import read_journal
from lehr.recipe import Recipe, Stage
from lehr.run.checkpoint import CheckpointFolder
from lehr.run.ema import Ema
from lehr.run.sampler import order

FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
HELD = lehr.constant()


class Net(nn.Module):
    """A backbone with batch-norm and dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4))
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def net(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net()


def data(samples: int = 50, seed: int = 2) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def head_then_all(**said: Any) -> Recipe:
    stages = [
        Stage("2 epochs", train="head", lr=0.05),
        Stage("2 epochs", train="all", lr={"head": 0.02, "backbone": 0.005}),
    ]
    return Recipe(stages, **{"batch_size": 8, "schedule": HELD, "seed": 11, **said})


def one_stage(length: str = "2 epochs", **said: Any) -> Recipe:
    return Recipe([Stage(length, train="all", lr=0.02)], **{"batch_size": 8, "schedule": HELD, **said})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses_of(events: list[Event]) -> list[float]:
    return [loss for event in events if isinstance(event, StepsTaken) for loss in event.losses]


def written(result_or_folder: Any) -> list[Event]:
    return [record.event for record in read_journal(Path(result_or_folder) / "journal.jsonl")]


# --- beside a loop by hand ---


def by_hand(
    model: Net, train: TensorDataset, make: Callable[[Any], torch.optim.Optimizer], *, smoothing: float = 0.0,
    clip: float | None = None, decay: float = 0.0,
) -> list[float]:  # fmt: skip
    """Two epochs of the head, two of everything, in plain torch: no line of lehr but the order of the
    data."""
    inputs, targets = train.tensors
    biases_and_norms = [model.body[0].bias, model.body[1].weight, model.body[1].bias]
    groups = [
        {"params": [model.fc.weight], "weight_decay": decay},
        {"params": [model.fc.bias], "weight_decay": 0.0},
        {"params": [model.body[0].weight], "weight_decay": decay},
        {"params": biases_and_norms, "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    losses = []
    torch.manual_seed(11)
    for epoch in range(4):
        frozen = epoch < 2
        for parameter in model.body.parameters():
            parameter.requires_grad_(not frozen)
        for group, lr in zip(optimizer.param_groups, (0.02, 0.02, 0.005, 0.005), strict=True):
            group["lr"] = 0.05 if frozen else lr
        model.train()
        model.body.train(not frozen)
        for batch in order(len(inputs), 11, epoch).split(8):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs[batch]), targets[batch], label_smoothing=smoothing)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("said", "make"),
    [
        (
            {"optimizer": {"name": "sgd", "momentum": 0.9}},
            lambda groups: torch.optim.SGD(groups, momentum=0.9, fused=True),
        ),
        (
            {"optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True}, "weight_decay": 0.01},
            lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True),
        ),
        ({"optimizer": "adamw", "weight_decay": 0.05}, lambda g: torch.optim.AdamW(g, fused=True)),
        ({"optimizer": {"name": "adamw", "fused": False}}, torch.optim.AdamW),
        (
            {"optimizer": {"name": "adam", "betas": [0.8, 0.9]}},
            lambda g: torch.optim.Adam(g, betas=(0.8, 0.9), fused=True),
        ),
        ({"optimizer": "rmsprop", "label_smoothing": 0.1, "clip_norm": 0.5}, torch.optim.RMSprop),
    ],
    ids=["sgd", "nesterov", "adamw", "adamw not fused", "adam", "rmsprop smoothed and clipped"],
)
def test_fit_equals_a_loop_by_hand(said: dict[str, Any], make: Any) -> None:
    """Through a thaw, with batch-norm and dropout: the same loss at every step and the same weights, bit for bit, as with
    the same kernels of torch, which are its fused ones unless a recipe says otherwise."""
    train, model, twin = data(), net(), net()
    events: list[Event] = []
    result = lehr.fit(model, train, recipe=head_then_all(**said), observers=[events.append], device="cpu")
    wanted = by_hand(
        twin, train, make, decay=said.get("weight_decay", 0.0),
        smoothing=said.get("label_smoothing", 0.0), clip=said.get("clip_norm"),
    )  # fmt: skip
    assert result.model is model
    assert losses_of(events) == wanted
    assert same(weights(model), weights(twin))


def test_the_own_loop_is_the_same_loop() -> None:
    """A loop of one's own over the plan, with `apply` and `optimizer`, ends with the bits of `fit`."""
    train, recipe = data(48), head_then_all(schedule=lehr.warmup("20%") >> lehr.cosine(0.1), weight_decay=0.1)
    model, twin = net(), net()
    lehr.fit(model, train, recipe=recipe, device="cpu")
    plan = lehr.plan(recipe, twin, samples=len(train))
    optimizer = lehr.optimizer(plan, twin)
    torch.manual_seed(plan.seed)
    inputs, targets = train.tensors
    for step in plan:
        if step.index % 6 == 0:
            batches = order(len(train), plan.seed, step.epoch).split(8)
            twin.train()
        lehr.apply(step, twin, optimizer)
        batch = batches[step.index % 6]
        optimizer.zero_grad()
        functional.cross_entropy(twin(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    assert same(weights(model), weights(twin))


def test_accumulated_batches_equal_one_large_batch() -> None:
    """Three batches of 4 a step train as batches of 12 do, the short last window included: 21 samples are
    12 and 9."""
    runs = []
    for said in ({"batch_size": 4, "accumulate": 3}, {"batch_size": 12}):
        model = net()
        model.body = nn.Sequential(model.body[0], nn.ReLU())  # batch statistics would tell the batches apart
        events: list[Event] = []
        lehr.fit(
            model, data(21), recipe=one_stage("3 epochs", **said), observers=[events.append], device="cpu"
        )
        runs.append((losses_of(events), weights(model)))
    (losses, found), (wanted_losses, wanted) = runs
    assert len(losses) == 6
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_the_average_is_what_is_validated_and_left() -> None:
    """With `ema` the model ends as the average of its steps, and the frozen part of it keeps its bits."""
    train, model, twin = data(48), net(), net()
    start = weights(model.body)
    recipe = Recipe([Stage("2 epochs", train="head", lr=0.1)], batch_size=8, schedule=HELD, ema=0.7)
    result = lehr.fit(model, train, data(20), recipe=recipe, device="cpu")
    average, steps = Ema(twin, 0.7), iter(range(99))
    handle = register_optimizer_step_post_hook(lambda *_: average.update(next(steps)))
    lehr.fit(twin, train, recipe=dataclasses.replace(recipe, ema=None), device="cpu")
    handle.remove()
    assert same(weights(model), weights(average.model))
    assert not torch.equal(model.fc.weight, twin.fc.weight)
    assert same(weights(model.body), start)
    model.eval()
    inputs, targets = data(20).tensors
    with torch.no_grad():
        loss = functional.cross_entropy(model(inputs), targets).item()
    assert result.history[-1]["valid_loss"] == pytest.approx(loss, rel=1e-6)


# --- data ---


class Augmented(Dataset[Any]):
    """A person's own data set with random augmentation of its own, from all three generators."""

    def __init__(self, samples: int = 26) -> None:
        self.inputs, self.targets = data(samples).tensors

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = 0.1 * torch.randn(6) + random.random() + float(np.random.rand())
        return self.inputs[index] + noise, self.targets[index]


@FORKS
def test_the_number_of_workers_changes_no_bit() -> None:
    """With 0, 1 and 2 workers: equal weights, with dropout, own augmentation, validation, and a stage that
    ends mid-epoch."""
    stages = [
        Stage("6 steps", train="head", lr=0.05),  # an epoch has 4, so the second one is cut short
        Stage("1 epoch", train="all", lr=0.01, batch_size=5),
    ]
    recipe = Recipe(stages, batch_size=8, schedule=HELD)
    runs = []
    for workers in (0, 1, 2):
        model = net()
        result = lehr.fit(model, Augmented(), Augmented(10), recipe=recipe, workers=workers, device="cpu")
        runs.append((weights(model), result.history))
    for found, history in runs[1:]:
        assert same(found, runs[0][0])
        assert history == runs[0][1]
    assert [row["step"] for row in runs[0][1]] == [4, 6, 11]  # of 26 samples in fives, the lone last joins


def test_a_run_can_be_repeated_and_its_seed_matters() -> None:
    """The same seed gives the same bits, whatever was drawn before; another seed gives others."""
    runs = []
    for seed in (0, 0, 1):
        model = net()
        torch.rand(7)
        random.random()
        lehr.fit(model, Augmented(), recipe=one_stage(seed=seed), device="cpu")
        runs.append(weights(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_validation_does_not_touch_the_training() -> None:
    """With a validation set, without one, and with a shuffling loader over one, the model is trained to
    the same bits."""
    runs = []
    for valid in (None, data(20), DataLoader(data(20), batch_size=3, shuffle=True)):
        model = net()
        lehr.fit(model, data(), valid, recipe=one_stage(), device="cpu")
        runs.append(weights(model))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


@pytest.mark.parametrize("own_loader", [False, True])
def test_a_batch_is_gone_when_the_next_one_trains(own_loader: bool) -> None:
    """No batch but the one that trains is in memory at a step, of the loop's own and of a person's loader."""
    seen: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        held.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(batch[0]))
        return functional.cross_entropy(model(batch[0]), batch[1])

    given = DataLoader(data(), batch_size=5) if own_loader else Subset(data(), range(50))
    lehr.fit(net(), given, recipe=one_stage("1 epoch", batch_size=5), loss=loss, device="cpu")
    assert held == [0] * 10


def test_a_lone_last_sample_joins_the_batch_before_it() -> None:
    """17 samples in batches of 8 are 8 and 9: batch-norm never sees a batch of one."""
    sizes = []
    model = net()
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    lehr.fit(model, data(17), recipe=one_stage("1 epoch"), device="cpu")
    assert sizes == [8, 9]


def test_each_stage_has_its_own_batch_size() -> None:
    """Batches are of the stage's size, and a stage begins a new epoch."""
    sizes = []
    model = net()
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    stages = [
        Stage("4 steps", train="head", lr=0.1, batch_size=4),
        Stage("1 epoch", train="all", lr=0.1, batch_size=10),
    ]
    result = lehr.fit(model, data(20), recipe=Recipe(stages), device="cpu")
    assert sizes == [4] * 4 + [10] * 2
    assert [(row["epoch"], row["stage"], row["step"]) for row in result.history] == [(0, 0, 4), (1, 1, 6)]


def test_a_persons_loader_trains_and_validates() -> None:
    """`DataLoader`s are drawn from as they are: the batches and order are theirs."""
    seen = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if model.training:
            seen.append(batch[1].tolist())
        return functional.cross_entropy(model(batch[0]), batch[1])

    train = data(20)
    loader = DataLoader(train, batch_size=8)
    result = lehr.fit(net(), loader, DataLoader(data(9)), recipe=one_stage(), loss=loss, device="cpu")
    targets = train.tensors[1].tolist()
    assert seen == [targets[:8], targets[8:16], targets[16:]] * 2
    assert result.history[-1]["step"] == 6
    assert result.history[-1]["valid_loss"] > 0


class Shrinking(torch.utils.data.Sampler[list[int]]):
    """A batch sampler that says it has five batches and gives three."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2, 3], [4, 5]])

    def __len__(self) -> int:
        return 5


def test_a_loader_that_runs_short_is_an_error(tmp_path: Path) -> None:
    """A loader that gives fewer batches than its length stops the run, in the journal, too."""
    loader = DataLoader(data(10), batch_sampler=Shrinking())
    message = "epoch 1 gave batches for 3 steps, not the 5 planned"
    with pytest.raises(RunError, match=message):
        lehr.fit(net(), loader, recipe=one_stage(), out=tmp_path / "run", device="cpu")
    *_, steps, failed = written(tmp_path / "run")
    assert isinstance(steps, StepsTaken)
    assert (steps.start, steps.stop) == (0, 3)
    assert isinstance(failed, RunFailed)
    assert (failed.step, failed.stage) == (3, 0)
    assert message in failed.error


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(data(8))


REFUSED: list[tuple[str, dict[str, Any], type[LehrError], str]] = [
    ("stream", {"train": Stream()}, DataError, "train: Stream has no samples by index"),
    ("batch size", {"train": DataLoader(data(), batch_size=4)}, RecipeError,
     r"batch_size: stage 1 says 8, the DataLoader makes batches of 4; say batch_size=4 in the recipe"),
    ("restore", {"recipe": one_stage(restore_best=True)}, RecipeError,
     r"restore_best: there is no validation set, so 'valid_loss' is never measured; pass valid="),
    ("patience", {"recipe": one_stage(patience="2 epochs", monitor="valid_accuracy")}, RecipeError,
     r"patience: there is no validation set, so 'valid_accuracy' is never measured"),
    ("monitor", {"recipe": one_stage(monitor="valid_acuracy"), "valid": data(9)}, RecipeError,
     r"called 'valid_acuracy'; did you mean \"valid_accuracy\".*There are: train_loss, valid_loss"),
    ("monitor of metrics", {"recipe": one_stage(monitor="valid_accuracy"), "valid": data(9),
                            "metrics": {"f1": MulticlassF1Score(3)}}, RecipeError, r"There are: .*valid_f1"),
    ("metrics alone", {"metrics": {"f1": MulticlassF1Score(3)}}, RequestError, "there is no validation set"),
    ("one metric", {"metrics": MulticlassF1Score(3), "valid": data(9)}, RequestError,
     r"metrics: a MulticlassF1Score; expected torchmetrics by name"),
    ("optimizer", {"recipe": one_stage(optimizer="adm")}, RecipeError, "torch has no 'adm'"),
    ("device", {"device": "gpu"}, RequestError, "device='gpu'"),
    ("precision", {"precision": "int8"}, RequestError, "precision='int8'"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "kind", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_work_is_refused_before_training(
    tmp_path: Path, said: dict[str, Any], kind: type[LehrError], message: str
) -> None:
    """Nothing was started: no directory, no event, no changed weight; the message says how to mend it."""
    model, heard = net(), []
    before = weights(model)
    wanted = {"train": data(), "recipe": one_stage(), "device": "cpu", **said}
    with pytest.raises(kind, match=message):
        lehr.fit(model, out=tmp_path / "run", observers=[heard.append], **wanted)
    assert not (tmp_path / "run").exists()
    assert heard == []
    assert same(weights(model), before)


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    """A second run into the same directory is refused, and the first stays as it was."""
    lehr.fit(net(), data(), recipe=one_stage("1 epoch"), out=tmp_path, device="cpu")
    journal = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(RequestError, match="holds a run already, and nothing is overwritten"):
        lehr.fit(net(), data(), recipe=one_stage("1 epoch"), out=tmp_path, device="cpu")
    assert (tmp_path / "journal.jsonl").read_bytes() == journal


def test_a_directory_with_a_file_of_a_run_is_refused(tmp_path: Path) -> None:
    """A recipe that lies where the run would write its own is kept, comments and all."""
    (tmp_path / "recipe.toml").write_text("# mine\n", encoding="utf-8")
    with pytest.raises(RequestError, match=r"holds recipe\.toml already, and nothing is overwritten"):
        lehr.fit(net(), data(), recipe=one_stage("1 epoch"), out=tmp_path, device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.toml"]
    assert (tmp_path / "recipe.toml").read_text(encoding="utf-8") == "# mine\n"


def test_workers_with_a_loader_of_ones_own_are_refused() -> None:
    """A DataLoader has its own workers; a number that nothing would follow is refused."""
    loader = torch.utils.data.DataLoader(data(), batch_size=8)
    with pytest.raises(RequestError, match="a DataLoader has its own, so say num_workers there"):
        lehr.fit(net(), loader, recipe=one_stage("1 epoch"), workers=2, device="cpu")


@pytest.mark.parametrize("key", ["augment", "label_smoothing"])
def test_what_nothing_would_follow_is_refused(key: str) -> None:
    """`augment` with a data set of one's own, and `label_smoothing` with a loss of one's own, are refused."""
    said = {"augment": ["flip"]} if key == "augment" else {"label_smoothing": 0.1}
    loss = None if key == "augment" else (lambda m, b: functional.cross_entropy(m(b[0]), b[1]))
    with pytest.raises(RecipeError, match=f"^{key}: .* leave (it|augment) out"):
        lehr.fit(net(), data(), recipe=one_stage("1 epoch", **said), loss=loss, device="cpu")


def test_the_notes_of_the_plan_are_told() -> None:
    """What the plan and the caller want known stands in the journal when the run begins."""
    heard: list[Event] = []
    lehr.fit(
        net(), data(), recipe=Recipe([Stage("1 epoch", train="head", lr=0.1)]), device="cpu",
        observers=[heard.append], notes=["from far away"],
    )  # fmt: skip
    told = [event.text for event in heard if isinstance(event, Note)]
    assert told[0] == "from far away"
    assert any(text.startswith("no stage trains body.0.weight") for text in told)


def test_the_head_can_be_named() -> None:
    """`head=` says where the classifier is, as for lehr.inspect."""
    model = net()
    lehr.fit(
        model, data(), recipe=Recipe([Stage("1 epoch", train="head", lr=0.1)]), head="body.0", device="cpu"
    )
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "body.0.weight",
        "body.0.bias",
    ]


# --- best weights and early stopping ---


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, torch.Tensor]]]:
    """Lets the validation say the given losses, one an epoch, and keeps the weights that it was asked
    about."""

    def script(*losses: float) -> list[dict[str, torch.Tensor]]:
        kept: list[dict[str, torch.Tensor]] = []
        values = iter(losses)

        def validate(model: nn.Module, *_: object, **__: object) -> dict[str, float]:
            kept.append(weights(model))
            return {"valid_loss": next(values)}

        monkeypatch.setattr("lehr.run.loop.validate", validate)
        return kept

    return script


def ends(events: list[Event]) -> list[tuple[int, str, int | None]]:
    return [(e.step, e.reason, e.restored_epoch) for e in events if isinstance(e, StageEnded)]


@pytest.mark.parametrize("ema", [None, 0.8])
def test_each_stage_ends_with_its_best_and_the_run_with_the_best_of_all(
    scripted: Any, tmp_path: Path, ema: float | None
) -> None:
    """restore_best: a stage goes on from its own best epoch; the run ends with the best of all, the
    earlier of two equal ones."""
    kept = scripted(3.0, 1.0, 2.0, 5.0, 4.0, 4.0, 1.0)
    stages = [
        Stage("3 epochs", train="head", lr=0.05),
        Stage("3 epochs", train="all", lr=0.01),
        Stage("1 epoch", train="head", lr=0.01),
    ]
    recipe = Recipe(stages, batch_size=8, restore_best=True, ema=ema)
    model, events = net(), []
    starts: list[dict[str, torch.Tensor]] = []
    said = [events.append, lambda e: starts.append(weights(model)) if isinstance(e, StageStarted) else None]
    result = lehr.fit(model, data(), data(9), recipe=recipe, observers=said, out=tmp_path, device="cpu")
    assert same(starts[1], kept[1]), "the second stage began with the best weights of the first"
    assert same(starts[2], kept[4]), "and the third with those of the second, which are not the run's"
    assert same(weights(model), kept[1])
    assert same(load_file(tmp_path / "best.safetensors"), kept[1])
    assert ends(events) == [(21, "length", 1), (42, "length", 4), (49, "length", 1)]
    assert [row["best"] for row in result.history] == [True, True] + [False] * 5
    assert result.best is result.history[1]
    assert events[-1].best_epoch == 1
    assert events[-1].metrics == {"train_loss": result.history[1]["train_loss"], "valid_loss": 1.0}


def test_a_stage_may_restore_its_best_alone(scripted: Any) -> None:
    """A stage's own restore_best is for that stage; without it the run ends with its last weights."""
    kept = scripted(1.0, 2.0, 5.0, 6.0)
    stages = [
        Stage("2 epochs", train="head", lr=0.05, restore_best=True),
        Stage("2 epochs", train="all", lr=0.01),
    ]
    model, events = net(), []
    lehr.fit(
        model, data(), data(9), recipe=Recipe(stages, batch_size=8), observers=[events.append], device="cpu"
    )
    assert ends(events) == [(14, "length", 0), (28, "length", None)]
    assert same(weights(model), kept[3])


def test_patience_stops_the_last_stage_only(scripted: Any) -> None:
    """Epochs without a new best stop the run in its last stage; an earlier stage runs its length, however
    bad."""
    scripted(1.0, 2.0, 3.0, 4.0, 0.5, 0.6, 0.7, 0.1)
    stages = [Stage("4 epochs", train="head", lr=0.05), Stage("9 epochs", train="all", lr=0.01)]
    events: list[Event] = []
    recipe = Recipe(stages, batch_size=8, patience="2 epochs")
    result = lehr.fit(net(), data(), data(9), recipe=recipe, observers=[events.append], device="cpu")
    assert [row["epoch"] for row in result.history] == list(range(7))
    assert ends(events) == [(28, "length", None), (49, "patience", None)]
    assert (events[-1].step, events[-1].reason, events[-1].best_epoch) == (49, "patience", 4)


def test_the_training_loss_can_be_monitored_without_validation(tmp_path: Path) -> None:
    """monitor = "train_loss" needs no validation set: best weights are kept and put back by it."""
    model = net()
    recipe = one_stage("4 epochs", monitor="train_loss", restore_best=True)
    result = lehr.fit(model, data(), recipe=recipe, out=tmp_path, device="cpu")
    losses = [row["train_loss"] for row in result.history]
    assert result.best["epoch"] == losses.index(min(losses))
    assert same(load_file(tmp_path / "best.safetensors"), weights(model))


def test_without_validation_the_last_weights_are_kept(tmp_path: Path) -> None:
    """Nothing says which weights are best, so the run's are the last ones, and so is the best row."""
    model = net()
    result = lehr.fit(model, data(), recipe=one_stage(), out=tmp_path, device="cpu")
    assert same(load_file(tmp_path / "best.safetensors"), weights(model))
    assert result.best is result.history[-1]
    assert written(tmp_path)[-1].best_epoch is None


# --- what stops a run ---


def failing_at(
    call: int, fail: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[nn.Module, Any], torch.Tensor]:
    """A loss function that goes wrong in the training update `call`."""
    calls = iter(range(10**6))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        value = functional.cross_entropy(model(batch[0]), batch[1])
        return fail(value) if model.training and next(calls) == call else value

    return loss


def interrupted(_: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The error has step, stage, rates and what to try; weights are those before it; journal and best
    weights are kept."""
    model, kept = net(), []
    best: list[dict[str, torch.Tensor]] = []
    handle = register_optimizer_step_post_hook(lambda *_: kept.append(weights(model)))
    observers = [lambda e: best.append(weights(model)) if isinstance(e, EpochEnded) and e.best else None]
    wanted = r"loss is nan at step 18 \(stage 2, 'all'; rates: .*0\.005.*\); try a lower lr, .*clip_norm"
    with pytest.raises(NonFiniteError, match=wanted):
        lehr.fit(
            model, data(), data(20), recipe=head_then_all(), out=tmp_path, observers=observers, device="cpu",
            loss=failing_at(18, lambda loss: loss * torch.nan),
        )  # fmt: skip
    handle.remove()
    assert len(kept) == 18
    assert all(torch.equal(p, kept[-1][name]) for name, p in model.named_parameters())
    events = written(tmp_path)
    assert isinstance(events[-1], RunFailed)
    assert (events[-1].step, events[-1].stage) == (18, 1)
    assert events[-1].error.startswith("NonFiniteError: the loss is nan at step 18")
    assert len(losses_of(events)) == 18
    assert same(load_file(tmp_path / "best.safetensors"), best[-1])


def spoilt(call: int) -> Any:
    """A loss that stays finite while its gradients are NaN at update `call`."""
    calls = iter(range(10**6))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        value = functional.cross_entropy(model(batch[0]), batch[1])
        at = model.training and next(calls) == call
        return value + (model.fc.bias.sum() * 0).sqrt() if at else value

    return loss


@pytest.mark.parametrize("validated", [True, False])
def test_gradients_that_are_not_finite_never_end_as_a_success(tmp_path: Path, validated: bool) -> None:
    """Where the last update spoils the weights though its loss was finite, the run fails and says so."""
    what = "validation loss is not finite" if validated else "weights are not finite"
    with pytest.raises(NonFiniteError, match=rf"the {what} at step 13 \(stage 1"):
        lehr.fit(
            net(), data(), data(20) if validated else None, recipe=one_stage("2 epochs"), loss=spoilt(13),
            out=tmp_path, device="cpu",
        )  # fmt: skip
    assert isinstance(written(tmp_path)[-1], RunFailed)
    kept = tmp_path / "best.safetensors"
    assert not kept.exists() or all(bool(t.isfinite().all()) for t in load_file(kept).values())


def test_an_interrupted_run_says_how_far_it_came(tmp_path: Path) -> None:
    """Ctrl-C goes through; the journal has every update that was done, and ends with their number."""
    with pytest.raises(KeyboardInterrupt):
        lehr.fit(
            net(), data(), recipe=head_then_all(), loss=failing_at(9, interrupted), out=tmp_path, device="cpu"
        )
    events = written(tmp_path)
    assert events[-1] == Interrupted(9)
    assert len(losses_of(events)) == 9


class Bad(TensorDataset):
    """Cannot give one sample while it is out of order."""

    bad: int | None = None

    def __getitem__(self, index: Any) -> Any:
        if index == self.bad:
            raise OSError(f"{index}.png: gone")
        return super().__getitem__(index)


def saved_at(out: Path) -> int:
    state = CheckpointFolder(out / "checkpoints").newest_state()
    assert state is not None
    return state.at.step


def test_a_sample_that_turns_bad_loses_nothing(tmp_path: Path) -> None:
    """The run is saved as of its last whole step and says why it ends; once the sample is there again, the run
    goes on to the bits that it would have had."""
    train, model, twin = Bad(*data().tensors), net(), net()
    wanted = lehr.fit(twin, train, data(20), recipe=head_then_all(), device="cpu")
    step = 7 + order(50, 11, 1).tolist().index(31) // 8

    def spoil(event: Event) -> None:
        if isinstance(event, EpochEnded):
            train.bad = 31

    with pytest.raises(FeedError, match=rf"^step {step}: 31\.png: gone$"):
        lehr.fit(
            net(), train, data(20), recipe=head_then_all(), out=tmp_path, observers=[spoil], device="cpu"
        )
    assert written(tmp_path)[-1] == RunFailed(step, 0, f"FeedError: step {step}: 31.png: gone")
    assert saved_at(tmp_path) == step
    train.bad = None
    result = lehr.fit(model, train, data(20), recipe=head_then_all(), out=tmp_path, resume=True, device="cpu")
    assert same(weights(model), weights(twin))
    assert result.history == wanted.history


def test_a_sample_of_the_validation_that_turns_bad_loses_no_step(tmp_path: Path) -> None:
    """The run is saved between the epoch's last step and its validation, and goes on with that."""
    valid, model, twin = Bad(*data(20).tensors), net(), net()
    wanted = lehr.fit(twin, data(), valid, recipe=head_then_all(), device="cpu")
    valid.bad = 3
    with pytest.raises(FeedError, match=r"^validation: 3\.png: gone$"):
        lehr.fit(net(), data(), valid, recipe=head_then_all(), out=tmp_path, device="cpu")
    assert written(tmp_path)[-1] == RunFailed(7, 0, "FeedError: validation: 3.png: gone")
    assert saved_at(tmp_path) == 7
    valid.bad = None
    result = lehr.fit(model, data(), valid, recipe=head_then_all(), out=tmp_path, resume=True, device="cpu")
    assert same(weights(model), weights(twin))
    assert result.history == wanted.history


def test_a_worker_that_dies_in_the_middle_of_a_step_is_told_with_the_step(tmp_path: Path) -> None:
    """torch says so wherever the program is; what was half done then is not saved."""

    def died(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(
        RunError,
        match=r"^step 9: DataLoader worker \(pid 7\) .*fewer workers, or none \(workers=0, --workers 0\)$",
    ):
        lehr.fit(net(), data(), recipe=head_then_all(), loss=failing_at(9, died), out=tmp_path, device="cpu")
    assert saved_at(tmp_path) == 0
    assert isinstance(written(tmp_path)[-1], RunFailed)


def test_all_global_generators_are_seeded() -> None:
    """A loss that draws from torch's, Python's and numpy's own generators draws the same in every run of a seed."""
    runs = []
    for seed in (0, 0, 1):
        drawn: list[tuple[float, ...]] = []

        def loss(model: nn.Module, batch: Any, drawn: list[tuple[float, ...]] = drawn) -> torch.Tensor:
            drawn.append((torch.rand(()).item(), random.random(), float(np.random.rand())))
            return functional.cross_entropy(model(batch[0]), batch[1])

        lehr.fit(net(), data(), recipe=one_stage("1 epoch", seed=seed), loss=loss, device="cpu")
        torch.rand(3)
        random.random()
        np.random.rand()
        runs.append(drawn)
    assert runs[0] == runs[1]
    assert all(
        a != b for one, other in zip(runs[0], runs[2], strict=True) for a, b in zip(one, other, strict=True)
    )


# --- what is told ---


def test_the_journal_holds_the_whole_run(tmp_path: Path) -> None:
    """Every step's loss once and in order; epoch means, weighted by samples, are those of the history; the
    plan's hash."""
    events: list[Event] = []
    metrics = {"accuracy": MulticlassAccuracy(3, average="micro"), "f1": MulticlassF1Score(3)}
    recipe = head_then_all(accumulate=2)
    result = lehr.fit(
        net(),
        data(),
        data(20),
        recipe=recipe,
        metrics=metrics,
        out=tmp_path,
        observers=[events.append],
        device="cpu",
    )
    plan = lehr.plan(recipe, net(), samples=50)
    journal = written(tmp_path)
    assert journal == [e for e in events if type(e) in {type(w) for w in journal}], (
        "observers hear what is written"
    )
    begun, ended = journal[0], journal[-1]
    assert isinstance(begun, RunStarted)
    assert (begun.plan_hash, begun.total_steps, begun.total_epochs) == (plan.hash, plan.total_steps, 4)
    assert (begun.samples_train, begun.samples_valid, begun.device, begun.precision) == (
        50,
        20,
        "cpu",
        "fp32",
    )
    steps = [e for e in journal if isinstance(e, StepsTaken)]
    assert [t for e in steps for t in range(e.start, e.stop)] == list(range(plan.total_steps))
    epochs = [e for e in journal if isinstance(e, EpochEnded)]
    losses, samples = losses_of(journal), [16, 16, 16, 2]  # 50 samples in sevens of 8, two to a step
    for row, event in zip(result.history, epochs, strict=True):
        own = losses[row["step"] - 4 : row["step"]]
        mean = sum(loss * n for loss, n in zip(own, samples, strict=True)) / 50
        assert row["train_loss"] == event.train_loss == pytest.approx(mean, rel=1e-12)
        assert event.metrics == {k: row[k] for k in ("valid_loss", "valid_accuracy", "valid_f1")}
        assert event.lr == {
            g: float(plan.lr(g)[event.step - 1]) for g in plan.groups if plan.lr(g)[event.step - 1]
        }
    assert isinstance(ended, RunEnded)
    assert (ended.step, ended.reason) == (plan.total_steps, "length")
    saved = [e for e in journal if isinstance(e, CheckpointWritten)]
    assert [e.step for e in saved] == [0, 8, 16], "at the start and at each stage's end"
    assert all(e.bytes > 0 and e.stall >= 0 and e.seconds > 0 for e in saved)
    audited = [e for e in journal if isinstance(e, FreezeAudited)]
    assert [(e.stage, e.step, e.parameters, e.buffers) for e in audited] == [(0, 8, 4, 3), (1, 16, 0, 0)]
    stages = [e for e in journal if isinstance(e, StageStarted)]
    assert [(e.start, e.stop, e.first_epoch, e.epochs) for e in stages] == [(0, 8, 0, 2), (8, 16, 2, 2)]
    assert stages[0].trained_parameters == 16 * 3 + 3
    assert stages[0].total_parameters == sum(p.numel() for p in net().parameters())


def test_a_run_directory_says_what_was_done(tmp_path: Path) -> None:
    """It holds the recipe, the plan, the environment, the journal and the weights; the first two are read
    back as equal."""
    recipe = head_then_all(weight_decay=0.1)
    lehr.fit(net(), data(), recipe=recipe, out=tmp_path / "a" / "b", device="cpu")
    folder = tmp_path / "a" / "b"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "recipe.toml", "plan.json", "environment.json", "journal.jsonl", "best.safetensors", "checkpoints", ".lock",
    }  # fmt: skip
    kinds = {path.suffix for path in (folder / "checkpoints").iterdir()}
    assert kinds == {".json", ".safetensors"}
    assert lehr.load_recipe(folder / "recipe.toml") == recipe
    assert lehr.Plan.load(folder / "plan.json").hash == lehr.plan(recipe, net(), samples=50).hash
    assert str(tmp_path) not in (folder / "environment.json").read_text(), "no names of folders"


def test_an_observer_can_change_nothing(tmp_path: Path) -> None:
    """Events are frozen; one that changes a table in an event, or raises, changes neither weights, history
    nor journal."""
    calm, model = net(), net()
    wanted = lehr.fit(calm, data(), data(9), recipe=one_stage(), out=tmp_path / "calm", device="cpu")

    def meddler(event: Event) -> None:
        for field in dataclasses.fields(event):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(event, field.name, None)
            if isinstance(getattr(event, field.name), dict):
                getattr(event, field.name).clear()

    def broken(_: Event) -> None:
        raise ValueError("mine")

    with pytest.warns(RuntimeWarning, match="raised ValueError"):
        found = lehr.fit(
            model,
            data(),
            data(9),
            recipe=one_stage(),
            out=tmp_path / "run",
            observers=[meddler, broken],
            device="cpu",
        )
    assert same(weights(model), weights(calm))
    assert found.history == wanted.history
    assert losses_of(written(tmp_path / "run")) == losses_of(written(tmp_path / "calm"))
    assert len(written(tmp_path / "run")) == len(written(tmp_path / "calm"))


def test_the_history_is_plain_numbers() -> None:
    """One row an epoch, of Python numbers alone, all with the same keys."""
    history = lehr.fit(net(), data(), data(9), recipe=head_then_all(), device="cpu").history
    assert len(history) == 4
    for row in history:
        assert row.keys() == {"epoch", "stage", "step", "train_loss", "valid_loss", "valid_accuracy", "best"}
        assert {type(value) for value in row.values()} == {int, float, bool}


# --- models and machines ---


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_the_persons_own_parameters(backend: str) -> None:
    """`fit` on a compiled model trains, through a thaw, the parameters of the model that was compiled, as
    without compiling."""
    torch._dynamo.reset()
    model, plain = net(), net()
    for each in (model, plain):
        each.body[3].p = 0.0  # compiled dropout draws other numbers
    compiled = torch.compile(model, backend=backend)
    before = weights(model)
    moved: list[set[str]] = []

    def look(event: Event) -> None:
        if isinstance(event, StageEnded):
            now = weights(model)
            moved.append({name for name in now if not torch.equal(now[name], before[name])})

    result = lehr.fit(compiled, data(), data(9), recipe=head_then_all(), observers=[look], device="cpu")
    lehr.fit(plain, data(), data(9), recipe=head_then_all(), device="cpu")
    assert result.model is compiled
    assert moved == [{"fc.weight", "fc.bias"}, set(before)]
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(model)[name], tensor, rtol=1e-4, atol=1e-5)


def test_what_was_frozen_by_hand_stays_frozen() -> None:
    """`"all"` does not name what a person froze before `fit`: it keeps its bits, buffers included."""
    model = net()
    lehr.freeze(model, "body")
    before = weights(model.body)
    lehr.fit(model, data(), recipe=one_stage(weight_decay=0.1), device="cpu")
    assert same(weights(model.body), before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_on_the_cpu(precision: str) -> None:
    """A run in bf16 or fp16 follows the float32 run to the precision that it has."""
    histories = [
        lehr.fit(net(), data(), data(20), recipe=head_then_all(), precision=p, device="cpu").history
        for p in ("fp32", precision)
    ]
    for wanted, found in zip(*histories, strict=True):
        assert found["step"] == wanted["step"]
        assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=0.05)
        assert found["valid_loss"] == pytest.approx(wanted["valid_loss"], rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_a_run_on_cuda_follows_the_plan(precision: str, tmp_path: Path) -> None:
    """On CUDA, with metrics and workers, every planned step is done, losses are finite, and the frozen
    part keeps its bits."""
    model = net()
    body = weights(model.body)
    recipe = Recipe([Stage("3 epochs", train="head", lr=0.05)], batch_size=8, clip_norm=1.0, ema=0.9)
    metrics = {"f1": MulticlassF1Score(3)}
    result = lehr.fit(
        model, Augmented(40), data(20), recipe=recipe, metrics=metrics, device="cuda", precision=precision,
        workers=2, out=tmp_path,
    )  # fmt: skip
    losses = losses_of(written(tmp_path))
    assert len(losses) == lehr.plan(recipe, net(), samples=40).total_steps == result.history[-1]["step"]
    assert np.isfinite(losses).all()
    assert next(model.parameters()).is_cuda
    assert same({name: tensor.cpu() for name, tensor in weights(model.body).items()}, body)
