"""Whether a directory holds a run to go on with, and whether it is this one: what is refused, and what allowed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import lehr
from lehr.errors import CheckpointError, LehrError, RecipeError, RequestError, RunError
from lehr.events import Note, Resumed, RunEnded, RunStarted, StepsTaken
from lehr.journal import read_journal
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.recipe_file import load_recipe
from lehr.run.folder import RunFolder
from lehr.run.resuming import check_resume
from small_run import (
    STEPS,
    HeadFirst,
    Net,
    bits,
    came_to,
    checkpoints,
    content,
    data,
    events,
    fit,
    forge,
    losses,
    net,
    recipe,
)  # fmt: skip

HELD = lehr.constant()


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was stopped in the middle of its third epoch, the first of all layers."""
    fit(tmp_path / "run", stop=8)
    return tmp_path / "run"


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    fit(tmp_path / "run")
    return tmp_path / "run"


def refusal(run: Path, kind: type[LehrError] = CheckpointError, **said: Any) -> str:
    """What is said of a run that cannot be gone on with; the directory is as it was, but for the lock."""
    before = dict(content(run)) if run.is_dir() else None
    with pytest.raises(kind) as caught:
        fit(run, **{"resume": True, **said})
    after = dict(content(run)) if run.is_dir() else None
    if before is not None and after is not None:
        before.pop(".lock", None), after.pop(".lock", None)
    assert after == before
    return str(caught.value)


# --- what `resume` may be ---


@pytest.mark.parametrize("value", [1, 0, "yes", "Auto", None, "True", b"auto", [], torch.tensor(True)])
def test_what_resume_may_be(value: Any, tmp_path: Path) -> None:
    """Anything but the four known values is refused, and nothing is made."""
    with pytest.raises(RequestError, match='Expected False, True, "auto" or "changed"'):
        fit(tmp_path / "run", resume=value)
    assert not (tmp_path / "run").exists()


def test_resume_needs_a_directory() -> None:
    """To go on, one must say with what."""
    for how in (True, "auto", "changed"):
        with pytest.raises(RequestError, match="out=DIRECTORY"):
            fit(None, resume=how)
    check_resume(False, None)


# --- nothing to go on with ---


@pytest.mark.parametrize("how", [True, "changed"])
def test_no_such_directory(how: Any, tmp_path: Path) -> None:
    """A directory that is not there is not made by a wish to go on with it."""
    assert "no such directory" in refusal(tmp_path / "a" / "run", resume=how)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("how", [True, "changed"])
def test_a_directory_that_is_no_run(how: Any, tmp_path: Path) -> None:
    """A directory without a checkpoint holds no run to go on with."""
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds no checkpoint to go on from" in refusal(tmp_path, resume=how)


@pytest.mark.parametrize(
    "debris", [(), ("recipe.toml", "plan.json"), ("recipe.toml", "journal.jsonl"), ("checkpoints",)]
)
def test_auto_begins_where_nothing_was_trained(debris: tuple[str, ...], tmp_path: Path) -> None:
    """ "auto" begins anew where a process was killed before its first checkpoint, whatever it left."""
    straight = came_to(fit(tmp_path / "straight"))
    run = tmp_path / "run"
    if debris:
        run.mkdir()
    for name in debris:
        if name == "checkpoints":
            (run / name).mkdir()
            (run / name / "0001-step-0.safetensors").write_bytes(b"half")
        elif name == "journal.jsonl":
            lines = (tmp_path / "straight" / name).read_text().splitlines(keepends=True)
            (run / name).write_text(next(line for line in lines if "run_started" in line) + '{"v":2,"ev')
        else:
            (run / name).write_text("half of what")
    assert came_to(fit(run, resume="auto")) == straight
    assert load_recipe(run / "recipe.toml") == recipe()
    assert fit(run, resume=True) is not None


def test_auto_goes_on(stopped: Path, tmp_path: Path) -> None:
    """ "auto" goes on where there is a checkpoint."""
    straight = came_to(fit(tmp_path / "straight"))
    assert came_to(fit(stopped, resume="auto")) == straight


@pytest.mark.parametrize("left", ["best.safetensors", "journal.jsonl"])
def test_a_run_that_lost_its_checkpoints_is_not_written_over(left: str, ended: Path) -> None:
    """A run that has trained, and whose checkpoints are gone, is refused by "auto" too: nothing is overwritten."""
    shutil.rmtree(ended / "checkpoints")
    for name in {"best.safetensors", "journal.jsonl"} - {left}:
        (ended / name).unlink()
    assert "nothing is overwritten" in refusal(ended, resume="auto")
    assert "holds no checkpoint" in refusal(ended)


def test_a_run_is_not_begun_over_another(stopped: Path) -> None:
    """Without `resume`, a directory with a run is refused, and it is said how to go on."""
    assert 'resume="auto"' in refusal(stopped, RequestError, resume=False)


# --- damage ---


def test_a_damaged_checkpoint_is_passed_over(stopped: Path, tmp_path: Path) -> None:
    """A damaged newest checkpoint is named in the journal, and the run goes on from the one before, to the bit."""
    straight = came_to(fit(tmp_path / "straight"))
    (stopped / "checkpoints" / (checkpoints(stopped)[-1].stem + ".safetensors")).write_bytes(b"x")
    assert came_to(fit(stopped, resume=True)) == straight
    (note,) = [e.text for e in events(stopped) if isinstance(e, Note) and "passed over" in e.text]
    assert note.startswith("passed over checkpoints/000")
    told = [record.event for record in read_journal(stopped / "journal.jsonl")]
    assert [e.step for e in told if isinstance(e, Resumed)] == [6]


def test_no_good_checkpoint(stopped: Path) -> None:
    """Where none is good, each is named with what is wrong with it; "auto" begins no new run over it."""
    for path in checkpoints(stopped):
        path.write_text("{}")
    for how in (True, "auto", "changed"):
        said = refusal(stopped, resume=how)
        assert all(path.stem in said for path in checkpoints(stopped))
        assert "put the files back" in said


def test_a_journal_that_is_gone(stopped: Path, tmp_path: Path) -> None:
    """The state does not depend on the journal: without it a run ends with the same bits."""
    straight = came_to(fit(tmp_path / "straight"))
    (stopped / "journal.jsonl").unlink()
    found = came_to(fit(stopped, resume=True))
    assert {k: v for k, v in found.items() if k != "losses"} == {
        k: v for k, v in straight.items() if k != "losses"
    }
    assert len(losses(stopped)) == STEPS - 8


def test_a_journal_with_lines_that_are_damaged(stopped: Path, tmp_path: Path) -> None:
    """Damaged lines are passed over and told; what counts of the rest does not shift."""
    straight = came_to(fit(tmp_path / "straight"))
    path = stopped / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(["garbage\n", *lines[1:], '{"v":2,"half']))
    result = fit(stopped, resume=True)
    assert result is not None
    assert {n: bits(t) for n, t in result.model.state_dict().items()} == straight["weights"]
    with pytest.raises(RunError):
        read_journal(path)
    whole = read_journal(path, damaged="note")
    assert whole.damaged == (1,)


def test_a_journal_that_is_none(stopped: Path) -> None:
    """A file that is no journal is not written to: the run is refused in words."""
    (stopped / "journal.jsonl").write_text("my notes\n")
    assert "nothing in this file is a line of a journal" in refusal(stopped, RunError)


# --- the same plan ---

OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"recipe": recipe(lr=0.01)}, r"stage 2: .*0.01, was 0.02"),
    "length": ({"recipe": recipe("3 epochs")}, r"stage 2: steps 6 to 15, were 6 to 12"),
    "batch_size": ({"recipe": recipe(batch_size=5)}, r"batch_size 5, was 8"),
    "optimizer": ({"recipe": recipe(optimizer="sgd")}, r"optimizer sgd, was adamw"),
    "seed": ({"recipe": recipe(seed=4)}, r"seed 4, was 3"),
    "ema": ({"recipe": recipe(ema=0.5)}, r"ema 0.5, was 0.9"),
    "width": ({"model": lambda: net(lambda: Net(hidden=9))}, r"body.0.weight"),
    "classes": ({"model": lambda: net(lambda: Net(classes=4))}, r"fc.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER)
def test_another_plan_is_refused_with_the_difference(what: str, stopped: Path) -> None:
    """A changed recipe or model is refused, with what differs and how to say that it is meant."""
    said, words = OTHER[what]
    said = {key: value() if callable(value) else value for key, value in said.items()}
    found = refusal(stopped, **said)
    assert re.search(words, found), found
    can_be = what in ("lr", "length", "ema")
    assert ('resume="changed"' if can_be else "it cannot go on with what has changed") in found
    assert re.search(words, refusal(stopped, resume="auto", **said))


def test_another_name_is_refused_by_name(stopped: Path) -> None:
    """A model that calls a part otherwise is refused with both names."""
    model = net()
    model.add_module("head", model.fc)
    del model._modules["fc"]
    model.forward = lambda x: model.head(model.body(x))  # type: ignore[method-assign]
    with pytest.raises(CheckpointError) as caught:
        fit(stopped, resume=True, model=model)
    assert "head.weight" in str(caught.value)
    assert "fc.weight" in str(caught.value)


def test_a_model_in_another_order_is_the_same(stopped: Path, tmp_path: Path) -> None:
    """A model that registers its parts in another order goes on to the same bits, and then in either order."""
    straight = came_to(fit(tmp_path / "straight"))
    assert fit(stopped, resume=True, stop=2, model=net(HeadFirst)) is None
    plan = Plan.load(stopped / "plan.json")
    found = came_to(fit(stopped, resume=True))
    assert {k: v for k, v in found.items() if k != "weights"} == {
        k: v for k, v in straight.items() if k != "weights"
    }
    assert dict(found["weights"]) == dict(straight["weights"])
    assert fit(stopped, resume=True, model=net(HeadFirst)) is not None
    assert plan.parameters.keys() == {name for name, _ in Net().named_parameters()}


@pytest.mark.parametrize("damage", ["gone", "damaged", "of another run"])
def test_without_the_old_plan_a_change_cannot_be_judged(damage: str, stopped: Path) -> None:
    """Where plan.json is not the one of the checkpoint, a change is refused; the same plan needs it not."""
    path = stopped / "plan.json"
    if damage == "gone":
        path.unlink()
    elif damage == "damaged":
        path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    else:
        lehr.plan(recipe(seed=9), net(), 20).save(path)
    assert "put recipe.toml and plan.json back" in refusal(stopped, resume="changed", recipe=recipe(lr=0.01))
    assert fit(stopped, resume=True) is not None


# --- the same data ---


class Made(Dataset[Any]):
    """Samples that are made when they are asked for."""

    def __init__(self, shift: float = 0.0, at: int = 19) -> None:
        self.rows, self.shift, self.at = data(), shift, at

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, target = self.rows[index]
        return inputs + self.shift * (index == self.at), target


def with_one_changed() -> TensorDataset:
    inputs, targets = data().tensors
    inputs = inputs.clone()
    inputs[7, 3] += 1e-6
    return TensorDataset(inputs, targets)


DATA: dict[str, tuple[dict[str, Any], str]] = {
    "content": ({"train": with_one_changed()}, "train: .* tensors with other content"),
    "more": ({"train": data(21)}, "train: .* 21 samples where there were 20"),
    "kind": ({"train": Made()}, "train: .* another kind of data set"),
    "validation content": ({"valid": data(9, seed=6)}, "valid: .* tensors with other content"),
    "no validation": ({"valid": None, "recipe": recipe()}, "valid: .* none where there were some"),
}  # fmt: skip


@pytest.mark.parametrize("what", DATA)
@pytest.mark.parametrize("how", [True, "auto", "changed"])
def test_other_data_are_refused(what: str, how: Any, stopped: Path) -> None:
    """Other data are refused with what differs, however one asks to go on."""
    said, words = DATA[what]
    if what == "no validation":
        with pytest.raises(LehrError):  # a recipe that restores the best needs some
            fit(stopped, resume=how, **said)
        return
    found = refusal(stopped, resume=how, **said)
    assert re.search(words, found), found


@pytest.mark.parametrize("there", [True, False])
def test_validation_comes_and_goes(there: bool, tmp_path: Path) -> None:
    """A validation set that was not there, or is no longer, is other data."""
    plain = Recipe([Stage("4 epochs", train="all", lr=0.05)], batch_size=8, seed=3, monitor="train_loss")
    fit(tmp_path / "run", stop=5, recipe=plain, valid=data(9) if there else None)
    words = "none where there were some" if there else "some where there were none"
    assert words in refusal(tmp_path / "run", recipe=plain, valid=None if there else data(9))


def test_a_changed_sample_is_named(tmp_path: Path) -> None:
    """Of a data set that lehr cannot read, a few samples are looked at; one that is another is named."""
    fit(tmp_path / "run", stop=5, train=Made())
    assert "sample 19 is not what it was" in refusal(tmp_path / "run", train=Made(0.5))
    assert "21 samples" in refusal(tmp_path / "run", train=data(21))
    assert fit(tmp_path / "run", resume=True, train=Made()) is not None


def test_samples_of_another_version_are_a_note(tmp_path: Path) -> None:
    """Samples that are computed may come out otherwise in another torch: the run says so, and goes on."""
    told: list[Any] = []
    fit(tmp_path / "run", stop=5, train=Made())
    forge(checkpoints(tmp_path / "run")[-1], lambda state: state["made"].update({"torch": "2.6.0"}))
    fit(tmp_path / "run", resume=True, train=Made(0.5), observers=[told.append])
    assert any("perhaps not the data" in event.text for event in told if isinstance(event, Note))


# --- another machine ---


@pytest.mark.parametrize(
    ("key", "value"), [("torch", "2.0.0"), ("threads", 64), ("lehr", "0.0.1"), ("device", "cuda")]
)
def test_what_is_not_to_the_bit_is_told(key: str, value: Any, stopped: Path) -> None:
    """On other versions, threads or another device the run goes on, and says that the result is close."""
    forge(checkpoints(stopped)[-1], lambda state: state["made"].update({key: value}))
    assert fit(stopped, resume=True) is not None
    (note,) = [e.text for e in events(stopped) if isinstance(e, Note) and "close" in e.text]
    assert note.startswith("the result will be close, not the same to the bit: ")
    assert f"was {value}" in note


def test_on_the_same_machine_nothing_is_told(stopped: Path) -> None:
    """Where nothing differs, nothing is said of it."""
    fit(stopped, resume=True)
    assert not any(isinstance(e, Note) and "close" in e.text for e in events(stopped))


# --- a run that has ended ---


@pytest.mark.parametrize("how", [True, "auto", "changed"])
def test_an_ended_run_is_not_trained_again(how: Any, tmp_path: Path) -> None:
    """Of a run that has ended, model and result come back, and nothing in its directory changes."""
    run = tmp_path / "run"
    straight = came_to(fit(run))
    before, told = dict(content(run)), list[Any]()
    result = fit(run, resume=how, stop=1, observers=[told.append], model=net(seed=9))
    assert came_to(result) == straight
    assert content(run) == before
    assert [type(event) for event in told] == [Note]


def test_an_ended_run_without_its_best_weights(ended: Path) -> None:
    """Weights that could not be written at the very end are written by the resume, which trains nothing."""
    before = (ended / "best.safetensors").read_bytes()
    (ended / "best.safetensors").unlink()
    told = list[Any]()
    fit(ended, resume=True, stop=1, observers=[told.append])
    assert (ended / "best.safetensors").read_bytes() == before
    assert not any(isinstance(event, StepsTaken) for event in told)


def test_an_ended_run_whose_end_was_not_told(ended: Path) -> None:
    """A run that was killed after its last checkpoint, and before it told its end, ends now, with the same bits."""
    path = ended / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if '"run_ended"' in line)
    straight = (ended / "best.safetensors").read_bytes()
    path.write_text("".join(lines[:at]))
    (ended / "best.safetensors").unlink()
    result = fit(ended, resume=True, stop=1)
    assert result is not None
    assert (ended / "best.safetensors").read_bytes() == straight
    assert isinstance(events(ended)[-1], RunEnded)
    assert len(losses(ended)) == STEPS


# --- a changed plan ---

ALLOWED: dict[str, dict[str, Any]] = {
    "rate": {"lr": 0.01},
    "longer": {"last": "3 epochs"},
    "schedule": {"schedule": HELD},
    "floor": {"min_lr": 1e-5},
    "clipping": {"clip_norm": 1.0},
    "average": {"ema": 0.5},
}


@pytest.mark.parametrize("what", ALLOWED)
def test_a_change_that_can_be(what: str, stopped: Path) -> None:
    """What changes no state is taken up where the run is; recipe.toml and plan.json are the new ones."""
    before = losses(stopped)
    new = recipe(**ALLOWED[what])
    result = fit(stopped, resume="changed", recipe=new)
    assert result is not None
    assert load_recipe(stopped / "recipe.toml") == new
    plan = Plan.load(stopped / "plan.json")
    assert plan.hash == lehr.plan(new, net(), 20).hash
    assert losses(stopped)[:8] == before[:8]
    assert len(losses(stopped)) == plan.total_steps
    resumed = [i for i, e in enumerate(events(stopped)) if isinstance(e, Resumed)]
    assert [events(stopped)[i].step for i in resumed] == [8]
    assert [e.plan_hash for e in events(stopped) if isinstance(e, RunStarted)][-1] == plan.hash
    assert fit(stopped, resume=True, recipe=new) is not None
    words = "it cannot go on with what has changed" if what == "longer" else 'resume="changed"'
    assert words in refusal(stopped)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "batch size": ({"batch_size": 4}, "stage 1 is done"),
    "optimizer": ({"optimizer": "sgd"}, "its state is of no use to another"),
    "monitor": ({"monitor": "valid_accuracy"}, "by which the best weights so far were chosen"),
    "no average": ({"ema": None}, "ema is turned off"),
    "too short": ({"last": "1 steps"}, "which is past"),
    "seed in an epoch": ({"seed": 4}, "in the middle of epoch 3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_change_that_cannot_be(what: str, stopped: Path) -> None:
    """What the state does not fit is refused though it was asked for, with the reason and the way out."""
    said, words = REFUSED[what]
    assert words in refusal(stopped, RecipeError, resume="changed", recipe=recipe(**said))
    assert fit(stopped, resume=True) is not None


def test_another_model_cannot_be_asked_for(stopped: Path) -> None:
    """Another model is refused also where changes were asked for."""
    assert "fc.weight" in refusal(stopped, RecipeError, resume="changed", model=net(lambda: Net(classes=4)))


@pytest.mark.parametrize("place", ["ended", "stopped"])
def test_a_longer_run(place: str, tmp_path: Path) -> None:
    """A run that is made longer, after its end or in the middle, keeps what was done and trains the rest: on a
    schedule that holds, to the bits of a run that was as long from the start.
    """
    straight = came_to(fit(tmp_path / "straight", recipe=recipe("4 epochs", schedule=HELD)))
    run = tmp_path / "run"
    fit(run, stop=None if place == "ended" else 8, recipe=recipe(schedule=HELD))
    old = losses(run)
    found = came_to(fit(run, resume="changed", recipe=recipe("4 epochs", schedule=HELD)))
    assert losses(run)[: len(old)] == old
    assert found == straight
    ends = [event for event in events(run) if isinstance(event, RunEnded)]
    assert [end.step for end in ends][-1] == 18


# --- a change that is cut off ---


class Cut(BaseException):
    """The power goes."""


@pytest.fixture
def cut_off(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose process was killed after the checkpoint of a changed plan, before the plan itself was written."""

    def power_cut(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_plan", power_cut)
        with pytest.raises(Cut):
            fit(stopped, resume="changed", recipe=recipe("3 epochs", schedule=HELD))
    assert load_recipe(stopped / "recipe.toml") == recipe()
    return stopped


def test_a_change_that_was_cut_off_is_undone(cut_off: Path, tmp_path: Path) -> None:
    """With the old recipe the run goes on as if no change had been tried."""
    straight = came_to(fit(tmp_path / "straight"))
    assert came_to(fit(cut_off, resume=True)) == straight
    assert any(
        isinstance(e, Note) and "change of plan that was not finished" in e.text for e in events(cut_off)
    )
    assert came_to(fit(cut_off, resume=True)) == straight


@pytest.mark.parametrize("how", [True, "auto", "changed"])
def test_a_change_that_was_cut_off_is_finished(how: Any, cut_off: Path, tmp_path: Path) -> None:
    """With the new recipe the change is finished: recipe.toml and plan.json are the new ones, and the run can be
    gone on with by them alone.
    """
    new = recipe("3 epochs", schedule=HELD)
    fit(tmp_path / "other", stop=8)
    straight = came_to(fit(tmp_path / "other", resume="changed", recipe=new))
    fit(cut_off, resume=how, recipe=new, stop=2)
    assert load_recipe(cut_off / "recipe.toml") == new
    assert Plan.load(cut_off / "plan.json").hash == lehr.plan(new, net(), 20).hash
    assert came_to(fit(cut_off, resume=True, recipe=load_recipe(cut_off / "recipe.toml"))) == straight


def test_a_third_plan_after_a_change_that_was_cut_off(cut_off: Path) -> None:
    """A third recipe is judged by the plan that is written down, from the last checkpoint of that."""
    third = recipe("4 epochs", schedule=HELD)
    assert fit(cut_off, resume="changed", recipe=third) is not None
    assert load_recipe(cut_off / "recipe.toml") == third


def test_nothing_of_the_old_plan_is_lost_before_the_new_one_is_written(cut_off: Path) -> None:
    """Also with one checkpoint to keep, that of the old plan is there until the new plan is."""
    texts = [json.loads(path.read_bytes()) for path in checkpoints(cut_off)]
    assert len({text["plan_hash"] for text in texts}) == 2


# --- two at once ---


def test_a_second_one_is_refused(stopped: Path) -> None:
    """While a run is going on, another one in its directory is refused, in the same process too."""
    said: list[str] = []

    def second(event: Any) -> None:
        if isinstance(event, Resumed):
            with pytest.raises(RequestError) as caught:
                fit(stopped, resume=True)
            said.append(str(caught.value))

    fit(stopped, resume=True, observers=[second])
    assert len(said) == 1
    assert "trains in this directory now" in said[0]


def test_bits_of_a_model_say_what_differs() -> None:
    """The comparison that these tests rest on sees one bit, and the sign of zero."""
    assert bits(torch.zeros(1)) != bits(-torch.zeros(1))
