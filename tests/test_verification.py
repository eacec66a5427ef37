"""`lehr verify`: a short version of a person's own run, stopped and gone on with; and what is said where that differs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from lehr import trials, verification
from lehr.__main__ import main
from lehr.curves import Schedule
from lehr.data.listing import Item
from lehr.duration import Duration
from lehr.errors import RequestError, RunError
from lehr.job import Job, Request, prepare
from lehr.notation import read_schedule
from lehr.recipe import Recipe, Stage
from lehr.run.outcome import Outcome, differences, outcome
from lehr.run.state import Decided, Gauge
from lehr.shortening import Short, shortened
from lehr.trials import Stop, Trial, Trials

STAGES = (
    Stage("20 epochs", train="head", lr=1e-3),
    Stage("400 steps", train="all", lr={"head": 1e-3, "backbone": 1e-4}, restore_best=True),
)
RECIPE = Recipe(
    STAGES, batch_size=4, accumulate=2, ema=0.9, clip_norm=1.0, monitor="train_loss", augment=("shift",)
)


class Said(NamedTuple):
    code: int
    out: str
    err: str


Lehr = Callable[..., Said]


@pytest.fixture
def lehr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lehr:
    """Runs a command in an empty directory, in which temporary folders are made, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        try:
            main(arguments)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.to_toml(), encoding="utf-8")
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of twelve classes of one image each: all of them train."""
    for label in range(12):
        folder = tmp_path / "images" / f"{label:02d}"
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(label).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / "one.png")
    return tmp_path / "images"


def short_of(recipe: Recipe, data: str = "digits") -> tuple[Job, Short]:
    path = Path("said.toml")
    path.write_text(recipe.to_toml(), encoding="utf-8")
    job = prepare(Request(data, model="digits_net", recipe=str(path)), fetch=False)
    return job, shortened(job.recipe, job.plan, job.facts, job.data.listing)


def test_a_killed_run_ends_with_the_same_bits(lehr: Lehr, images: Path, recipe: Path, tmp_path: Path) -> None:
    """`lehr verify RUN` kills a short version of a run, goes on, finds the same bits, and leaves nothing behind."""
    short = [word for k in (0, 1) for word in ("--set", f"stages.{k}.length=2 steps")]
    asked = ["--model", "digits_net", "--recipe", str(recipe), "--workers", "0", "--out", "run", *short]
    assert lehr("fit", str(images), "--no-scratch", *asked).code == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    said = lehr("verify", "run", "--kills", "1", "--seed", "3")
    assert said.code == 0, said.err
    assert said.out.startswith("1 of 1 stopped run ended with the same bits (")
    assert "frozen in stage 1 (head): 12 parameters and 12 buffers, unchanged" in said.err
    assert "stop 1 of 1: killed, gone on from step " in said.err
    assert "workers, then " in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


class InProcess(NamedTuple):
    """Trains in this process, and changes what a run that is to be stopped ends with."""

    change: Callable[[Outcome], Outcome]

    def to_end(self, runs: Trials, trial: Trial) -> None:
        here = Path.cwd()
        os.chdir(runs.folder)
        try:
            trials._train(trial)
        finally:
            os.chdir(here)

    def stopped(self, runs: Trials, name: str, _: Stop, __: Random) -> str:
        self.to_end(runs, replace(runs.first, out=name))
        return "left alone"

    def outcome(self, run: Path) -> Outcome:
        found = outcome(run)
        return self.change(found) if run.name.startswith("stopped") else found


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[Outcome], Outcome]) -> None:
    world = InProcess(change)
    monkeypatch.setattr(Trials, "to_end", lambda runs, trial: world.to_end(runs, trial))
    monkeypatch.setattr(Trials, "stopped", lambda runs, *how: world.stopped(runs, *how))
    monkeypatch.setattr(verification, "outcome", world.outcome)


def with_another_weight(found: Outcome) -> Outcome:
    tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
    tensors["model/head.bias"][0] += 0.25
    return replace(found, tensors=tensors)


def with_another_loss(found: Outcome) -> Outcome:
    return replace(found, losses=(*found.losses[:3], found.losses[3] + 1, *found.losses[4:]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_another_weight, "tensors: model/head.bias by up to 0.25"),
        (with_another_loss, "the loss of step 3: "),
    ],
    ids=["tensor", "loss"],
)
def test_a_difference_is_named(
    lehr: Lehr,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Outcome], Outcome],
    words: str,
) -> None:
    """A stopped run that ends with another bit ends the command with 1, naming the tensor or the loss and the
    usual cause; what the files say is kept on demand.
    """
    plant(monkeypatch, change)
    said = lehr("verify", str(recipe), "--kills", "1", "--keep-files", "kept")
    assert said.code == 1
    assert said.out.startswith("0 of 1 stopped run ended with the same bits")
    assert words in said.err
    assert "Without a stop the run repeats itself" in said.err
    assert {"whole", "whole-again", "stopped-1", "recipe.toml", "data.json"} <= {
        path.name for path in Path("kept").iterdir()
    }


def test_a_run_that_never_repeats_itself_is_told_apart(
    lehr: Lehr, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run differs without a stop, too, it is not the stop that is blamed."""
    plant(monkeypatch, lambda found: found)
    chance = Random(0)
    same = verification.outcome
    monkeypatch.setattr(
        verification, "outcome", lambda run: replace(same(run), losses=(chance.random(),) * 4)
    )
    said = lehr("verify", str(recipe), "--kills", "2")
    assert said.code == 1
    assert said.out.startswith("0 of 2 stopped runs")
    assert "does not repeat itself without a stop, either" in said.err
    assert "use_deterministic_algorithms" in said.err


@pytest.fixture
def found(lehr: Lehr, recipe: Path, tmp_path: Path) -> Outcome:
    assert lehr("fit", "digits", "--no-scratch", "--recipe", str(recipe), "--out", "run", *QUICK).code == 0
    return outcome(tmp_path / "run")


QUICK = [word for k in (0, 1) for word in ("--set", f"stages.{k}.length=2 steps")]


def test_everything_that_is_compared_can_differ(found: Outcome) -> None:
    """Any bit of a tensor, a missing tensor, an epoch's row and any counter of the state is a difference; lines
    of the journal, time and the names of files are none.
    """
    assert {name.split("/")[0] for name in found.tensors} == {"model", "ema", "optimizer", "random", "best"}
    for name, tensor in found.tensors.items():
        other = tensor.clone()
        other.reshape(-1).view(torch.uint8)[0] ^= 1
        assert name in "".join(differences(found, replace(found, tensors={**found.tensors, name: other})))
    first, *rest = found.tensors
    less = replace(found, tensors={name: found.tensors[name] for name in rest})
    assert differences(found, less) == (f"it lacks {first}",)
    assert differences(less, found) == (f"it has besides {first}",)
    row = {**found.epochs[0], "train_loss": 0.5}
    assert (
        "train_loss of epoch 1: 0.5" in differences(found, replace(found, epochs=(row, *found.epochs[1:])))[0]
    )
    assert differences(found, replace(found, epochs=found.epochs[1:])) == ("the journal has 1 epochs, not 2",)
    state = found.state
    assert not differences(found, replace(found, state=replace(state, records=9, seconds=9.0, files={})))
    for name, value in {
        "scalers": {"": {"scale": 2.0}},
        "random": {},
        "optimizer": {},
        "history": (),
        "gauge": Gauge("x"),
        "decisions": (Decided(0, 1, "end", 0.5),),
    }.items():
        other = replace(found, state=replace(state, **{name: value}))
        assert differences(found, other) == (f"the checkpoint's state: {name}",)


def test_a_short_run_keeps_what_matters(lehr: Lehr) -> None:
    """Shortening keeps all that a recipe says but lengths: at most two epochs and twelve steps a stage, on the
    first samples of each class, with a short last step in the epoch.
    """
    del lehr
    job, short = short_of(replace(RECIPE, batch_size=2, monitor="valid_loss"))
    first, second = short.plan.stages
    assert (first.steps, first.epochs, second.steps) == (10, 2, 10)
    assert short.plan.samples == 19
    assert {item.label for item in short.listing.train} == set(range(5))
    assert len(short.listing.valid) == 48
    assert set(short.listing.train) < set(job.data.listing.train)
    assert short.said == ("stage 1: 2 epochs instead of 20 epochs", "stage 2: 10 steps instead of 400 steps")
    lengths = [
        replace(stage, length=said.length) for stage, said in zip(short.recipe.stages, STAGES, strict=True)
    ]
    assert replace(short.recipe, stages=lengths) == job.recipe


@pytest.mark.parametrize("views", [1, 2, 8])
def test_a_short_run_has_few_views_that_come_again(lehr: Lehr, views: int) -> None:
    """Of many fixed views two are left, and a stage has epochs enough that they come again, as a required cache needs."""
    del lehr
    stage = Stage("20 epochs", train="head", lr=1e-3, cache="require")
    said = replace(RECIPE, stages=(stage,), views=views, batch_size=2, monitor="valid_loss")
    _, short = short_of(said)
    only = short.plan.stages[0]
    assert (only.views, only.cache) == (min(views, 2), "require")
    assert only.epochs > only.views
    assert ("stage 1: 2 views of each sample instead of 8" in short.said) is (views == 8)


@pytest.mark.parametrize("batch_size", [1, 3, 32, 512])
def test_a_short_run_of_any_batch_size(lehr: Lehr, batch_size: int) -> None:
    """However large the batches are against the data, a stage has six to twelve steps where it had more."""
    del lehr
    _, short = short_of(replace(RECIPE, batch_size=batch_size, monitor="valid_loss"))
    assert all(6 <= stage.steps <= 12 for stage in short.plan.stages)


@pytest.mark.parametrize(
    "written",
    [
        'warmup("150 steps") >> cosine()',
        'warmup("5 epochs") >> step_decay(at=["10 epochs", "12 epochs"])',
        'cosine(length="200 steps") >> constant()',
        'one_cycle(up="100 steps")',
        'restarts("30 steps", grow=1) >> hold("100 steps")',
        'warmup("1 epochs", per="epoch") >> step_decay(at=["5 epochs"], per="epoch")',
    ],
)
def test_a_schedule_that_is_too_long_is_scaled(lehr: Lehr, written: str) -> None:
    """A schedule whose lengths are more than a short stage has makes a plan all the same, of the same parts."""
    del lehr
    stage = Stage("400 steps", train="all", lr=1e-3, schedule=read_schedule(written))
    _, short = short_of(replace(RECIPE, stages=(stage,), monitor="valid_loss"))
    now: Schedule = short.recipe.stages[0].schedule or RECIPE.schedule
    shapes = [part.shape.name for part in read_schedule(written).parts]
    assert [part.shape.name for part in now.parts] == shapes
    total = short.plan.total_steps
    assert now.over(steps=total, steps_per_epoch=short.plan.stages[0].steps_per_epoch).steps == total


def test_a_scaled_schedule_is_said(lehr: Lehr) -> None:
    """A schedule that was scaled down is shown, with its seam at the same share of the stage."""
    del lehr
    stage = Stage(
        "400 steps", train="all", lr=1e-3, schedule=read_schedule('warmup("200 steps") >> cosine()')
    )
    _, short = short_of(replace(RECIPE, stages=(stage,), monitor="valid_loss"))
    half = Duration.parse(f"{short.plan.total_steps // 2} steps")
    assert f'scaled down to fit: warmup("{half}") >> cosine(length="{half}")' in short.said[-1]


def test_few_samples_are_of_every_class() -> None:
    """The first of every class come before the second of any, in the order that they had."""
    from lehr.shortening import _few

    items = [Item(f"{label}/{n}", label) for label in (0, 1, 2) for n in range(3)]
    assert [item.path for item in _few(items, 4)] == ["0/0", "0/1", "1/0", "2/0"]
    assert _few(items, 99) == tuple(items)


def test_what_cannot_be_verified_is_refused(lehr: Lehr, recipe: Path, tmp_path: Path) -> None:
    """What is neither a run nor a recipe, and options that a run says itself, end with 2 and in words."""
    (tmp_path / "empty").mkdir()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "journal.jsonl").write_text("", encoding="utf-8")
    for arguments, words in (
        (["recipe.tom"], 'no such file or directory; did you mean "recipe.toml"?'),
        (["empty"], "empty: not a run directory"),
        (["mine"], "a run of your own model or data"),
        (["empty", "--model", "resnet18", "--no-pretrained"], "leave out --model, --no-pretrained"),
        ([str(recipe), "--data", "nothing"], "nothing: no such file or folder"),
        ([str(recipe), "--device", "abacus"], "abacus"),
        ([str(recipe), "--keep-files", "mine"], "mine: holds something already"),
        ([str(recipe), "--kills", "0"], "expected a whole number, 1 or more"),
    ):
        said = lehr("verify", *arguments)
        assert said.code == 2, arguments
        assert words in said.err


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    """What a training says when it fails is what the command says."""
    runs = Trials(tmp_path, Trial("whole", "cpu", "fp32"), (0, 0))
    (tmp_path / "whole.log").write_text(
        "a warning\nlehr: stages: []; a recipe\nneeds one\n", encoding="utf-8"
    )
    with pytest.raises(RunError, match=r"\(exit code 1\): stages: \[\]; a recipe\nneeds one$"):
        runs._check(1, runs.first)


def test_a_process_ends_with_its_parent() -> None:
    """A training does not go on where the command that began it is gone."""
    program = "from lehr.trials import _leave_with_parent as leave; leave()"
    env = {**os.environ, "PYTHONPATH": str(Path(trials.__file__).parents[1])}
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, env=env)
    assert child.stdin
    child.stdin.close()
    assert child.wait(60) == 1


class Sleeper(subprocess.Popen[bytes]):
    """A process that does nothing for a long time, whatever it was to do."""

    def __init__(self, _: object, **how: object) -> None:
        super().__init__([sys.executable, "-c", "input()"], **how)  # type: ignore[call-overload]


def test_a_process_ends_with_its_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever interrupts the command, Ctrl-C too, ends the training that is under way."""
    monkeypatch.setattr(subprocess, "Popen", Sleeper)
    trial = Trial("whole", "cpu", "fp32")
    process = Trials(tmp_path, trial, (0, 0))._process(trial)
    child = process.__enter__()
    assert child.poll() is None
    assert not process.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert child.returncode


def test_sigterm_puts_all_away(tmp_path: Path) -> None:
    """SIGTERM within the command leaves by the usual way out, with the exit code 143, and is then as it was."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, verification._folder(None) as folder, verification._terminated():
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143
    assert not folder.exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert tmp_path.exists()


def test_a_used_directory_is_not_written_into(tmp_path: Path) -> None:
    """A directory for `--keep-files` that holds something, or cannot be made, is refused."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    for kept, words in ((tmp_path, "holds something"), (tmp_path / "file" / "x", "cannot be made")):
        with pytest.raises(RequestError, match=words), verification._folder(str(kept)):
            pass
