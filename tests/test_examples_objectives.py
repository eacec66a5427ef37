"""The examples of several objectives, in short: they run, they resume to the bit, they can fail their bar."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lehr.events import EpochEnded, FreezeAudited
from small_run import bits, came_to, events, presser

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("digit_judge", "gan", "distil", "two_heads")


@pytest.fixture(scope="module")
def examples() -> Iterator[dict[str, Any]]:
    """The examples as modules, importable by each other as when they are run as scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def gan(examples: dict[str, Any]) -> Any:
    return examples["gan"]


@pytest.fixture(scope="module")
def judge(examples: dict[str, Any]) -> Any:
    return examples["digit_judge"].Judge(examples["digit_judge"].digits())


def _script(name: str, *arguments: str) -> dict[str, Any]:
    """An example run as a script; what it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def _same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(bits(one[name]) == bits(other[name]) for name in one)


def test_gan_runs_as_a_script(
    examples: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script leaves a grid of a hundred pictures as a PNG, one of every second epoch, both losses of each epoch, and
    a verdict; the weights beside them are those of the model.
    """
    _script("gan", str(tmp_path), "--epochs", "2", "--every", "2")
    for name in ("samples.png", "epoch-0002.png"):
        with Image.open(tmp_path / name) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (338, 338), "L")
    assert not (tmp_path / "epoch-0001.png").exists()
    told = [event.metrics for event in events(tmp_path) if isinstance(event, EpochEnded)]
    assert all({"train_d_loss", "train_g_loss"} <= set(row) for row in told)
    assert len(told) == 2
    said = capsys.readouterr().out
    assert "drawn digits: " in said
    assert "the bar is missed: recognised" in said
    weights = load_file(tmp_path / "gan.safetensors")
    again = examples["gan"].pair(seed=1)
    again.load_state_dict(weights)
    examples["gan"].grid(examples["gan"].draw(again, 100)).save(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "samples.png").read_bytes()


def test_gan_goes_on_to_the_same_bits(gan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped in the middle and begun again ends with the weights, averages, losses and pictures of one
    that was not.
    """
    asked = {"epochs": 3, "every": 1, "seed": 4}
    whole = gan.train(asked, tmp_path / "whole")
    press, usual = presser(stop=30), gan.d_loss
    with monkeypatch.context() as patch:
        patch.setattr(gan, "d_loss", lambda model, batch: (press(model), usual(model, batch))[1])
        with pytest.raises(KeyboardInterrupt):
            gan.train(asked, tmp_path / "parts")
    before = [event for event in events(tmp_path / "parts") if isinstance(event, EpochEnded)]
    assert len(before) == 1  # it stopped in the second epoch
    parts = gan.train(asked, tmp_path / "parts")
    found, expected = came_to_without_best(parts), came_to_without_best(whole)
    assert found == expected
    for epoch in (1, 2, 3):
        name = f"epoch-{epoch:04d}.png"
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def came_to_without_best(result: Any) -> dict[str, Any]:
    """What a run came to; one without validation leaves no best weights."""
    run = result.run
    (run / "best.safetensors").touch()
    found = came_to(result)
    (run / "best.safetensors").unlink()
    return found


def test_drawing_disturbs_nothing(gan: Any) -> None:
    """Drawing pictures in the middle of a run leaves weights, statistics, modes and the random state as they were."""
    model = gan.pair(seed=2)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first = gan.draw(model, 20)
    assert _same(before, model.state_dict())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, gan.draw(model, 20))


def test_freeze_d_stays_frozen_to_the_bit(gan: Any, tmp_path: Path) -> None:
    """With FreezeD the first block of the discriminator is to the bit what another run learnt; the rest of both networks
    learns.
    """
    start = {name: tensor.contiguous() for name, tensor in gan.pair(seed=5).state_dict().items()}
    gan.save_file(start, tmp_path / "gan.safetensors")
    asked = {"epochs": 1, "start": tmp_path / "gan.safetensors", "freeze_d": 1}
    after = gan.train(asked, tmp_path / "run").model.state_dict()
    kept = {name for name in start if name.startswith("discriminator.0.")}
    assert kept
    assert all((bits(after[name]) == bits(start[name])) == (name in kept) for name in start)


def test_what_was_frozen_by_hand_stays_so_in_every_turn(gan: Any) -> None:
    """A block that was frozen by hand before the run stays frozen through both objectives, where none of them names it."""
    model, usual = gan.pair(seed=6), gan.recipe(epochs=1)
    gan.lehr.freeze(model, "discriminator.0")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    d, g = usual.stages[0].objectives
    stage = replace(usual.stages[0], objectives=[replace(d, train=["all", "!generator"]), g])
    gan.lehr.fit(model, gan.digit_pictures(), recipe=replace(usual, stages=[stage]), device="cpu")
    same = {name for name, now in model.state_dict().items() if bits(now) == bits(start[name])}
    assert same == {"discriminator.0.0.weight", "discriminator.0.0.bias"}


def test_gan_takes_a_folder_of_images(gan: Any, tmp_path: Path) -> None:
    """With a folder of class folders the networks grow to the size that is asked for, in colour."""
    for kind in ("a", "b"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number in range(6):
            colour = (40 * number, 90, 200 if kind == "a" else 10)
            Image.new("RGB", (40, 30), colour).save(tmp_path / "data" / kind / f"{number}.png")
    asked = {"data": tmp_path / "data", "size": 32, "epochs": 1, "every": 1}
    gan.train(asked, tmp_path / "run")
    with Image.open(tmp_path / "run" / "epoch-0001.png") as image:
        assert (image.mode, image.size) == ("RGB", (10 * 130 - 2, 10 * 130 - 2))


def test_the_judge_accepts_real_digits(examples: dict[str, Any], judge: Any) -> None:
    """Held-out real digits pass the bar, and both classifiers name nearly all of them rightly."""
    module = examples["digit_judge"]
    verdict = judge(module.digits().held_out)
    assert verdict.misses(module.BAR) == []
    assert min(judge.accuracy) > 0.97


def test_the_judge_refuses_cheats(examples: dict[str, Any], judge: Any) -> None:
    """Noise, shuffled pixels, mixtures, copies and collapse all miss the bar, each by the figure that is meant for it."""
    module = examples["digit_judge"]
    missed = {
        name: {miss.split(" ")[0] for miss in judge(pictures).misses(module.BAR)}
        for name, pictures in module.cheats(module.digits()).items()
    }
    assert {"recognised", "classes", "distance"} <= missed["noise"]
    assert {"recognised", "distance"} <= missed["real digits, pixels shuffled"]
    assert "recognised" in missed["means of two real digits"]
    assert missed["training images"] == {"distance", "copies"}
    assert {"classes", "entropy"} <= missed["only the digit 3"]
    assert missed["one image of each digit"] == {"variety"}


def test_distil_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The student is better with the teacher than without, after equal updates, and the teacher is to the bit what it was."""
    left = _script("distil", str(tmp_path), "--epochs", "60")
    outcome = left["outcome"]
    assert outcome.alone + 0.02 < outcome.taught < outcome.teacher
    assert f"with the teacher as well {outcome.taught:.3f}" in capsys.readouterr().out
    steps = {
        name: [event.step for event in events(tmp_path / name) if isinstance(event, EpochEnded)][-1]
        for name in ("alone", "taught")
    }
    assert steps["alone"] == steps["taught"] == 120
    audits = [event for event in events(tmp_path / "taught") if isinstance(event, FreezeAudited)]
    assert [(event.parameters, event.digest) for event in audits] == [(6, outcome.frozen.digest)]


def test_distil_leaves_the_teacher_alone(examples: dict[str, Any]) -> None:
    """Not a bit of the teacher changes, its dropout is off, and it has no gradients, while the student learns from it."""
    distil, lehr = examples["distil"], examples["distil"].lehr
    teacher, student = distil.teacher_net(), distil.student_net()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    images, labels = torch.randn(20, 64), torch.arange(20) % 10
    recipe = lehr.Recipe([lehr.Stage("2 epochs", train="student", lr=0.01)], batch_size=5)
    room = distil.classroom(teacher, student)
    lehr.fit(
        room, distil.TensorDataset(images, labels), recipe=recipe, loss=distil.distillation(), device="cpu"
    )
    assert _same(before, teacher.state_dict())
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert not _same(start, student.state_dict())


def test_both_heads_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In turns and summed, both heads learn: far above what guessing the commonest class gives."""
    found = _script("two_heads", str(tmp_path), "--epochs", "2")["found"]
    assert found.keys() == {"turns", "sum"}
    for heads in found.values():
        assert heads["digit"] > 0.8  # guessing: 0.10
        assert heads["loop"] > 0.8  # guessing: 0.60
    said = capsys.readouterr().out
    assert "turns: 180 updates" in said
    assert "sum: 90 updates" in said
    assert said.count("valid_loop_loss") == 4


def test_the_other_head_waits(examples: dict[str, Any]) -> None:
    """In the turn of one task the other's head does not change, and the trunk does in both."""
    two, lehr = examples["two_heads"], examples["two_heads"].lehr
    train, _ = two._data()
    plan = lehr.plan(two.in_turns(1, 0), model := two.TwoHeads(), samples=len(train))
    optimizers = {name: lehr.optimizer(plan, model, name) for name in plan.objectives}
    losses = {"digit": two.digit_loss, "loop": two.loop_loss}
    batch = [tensor[:32] for tensor in train.tensors]
    for step in (plan[0], plan[1]):
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        lehr.apply(step, model, optimizers[step.objective])
        losses[step.objective](model, batch).backward()
        optimizers[step.objective].step()
        changed = {
            name.split(".")[0] for name, now in model.named_parameters() if not torch.equal(now, before[name])
        }
        assert changed == {"trunk", step.objective}
