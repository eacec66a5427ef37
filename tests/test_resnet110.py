"""examples/resnet110.toml says what the paper says; examples/resnet110.py trains, stops in good order and goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import lehr
from lehr.events import ConditionMet
from lehr.journal import read_journal
from lehr.planned_stage import Decision
from lehr.run.cifar_resnet import cifar_resnet

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPE = EXAMPLES / "resnet110.toml"
IMAGES = 50_000  # of CIFAR-10, to train on


@pytest.fixture(scope="module")
def plan() -> lehr.Plan:
    """The plan of the recipe for ResNet-110 and all of CIFAR-10's training images, before anything is measured."""
    return lehr.plan(lehr.load_recipe(RECIPE), cifar_resnet(110), samples=IMAGES)


def test_it_begins_at_a_tenth_of_the_rate(plan: lehr.Plan) -> None:
    """The first stage trains everything at 0.01, ends when less than 80 % are wrong, asks every 50 updates, and waits for
    ten epochs at the most."""
    first = plan.stages[0]
    assert (first.until, first.every) == ("train_error < 0.8", 50)
    assert (first.start, first.stop) == (0, 10 * -(-IMAGES // 128))
    assert set(plan[0].lr.values()) == set(plan[first.stop - 1].lr.values()) == {0.01}


@pytest.mark.parametrize("opened", [50, 400, 3900])
def test_rates_after_the_gate_are_the_papers(plan: lehr.Plan, opened: int) -> None:
    """Whenever the gate opens, the rate is 0.1 from there, 0.01 from update 32,000, 0.001 from 48,000, and the run has
    64,000 updates in all."""
    after = plan.decided(Decision(0, opened, "end", 0.79))
    assert after.total_steps == 64_000
    expected = np.select(
        [np.arange(64_000) < bound for bound in (opened, 32_000, 48_000)], [0.01, 0.1, 0.01], 0.001
    )
    for group in after.groups:
        assert np.allclose(after.lr(group), expected, rtol=1e-12, atol=0)


def test_all_is_decayed_by_sgd_with_momentum(plan: lehr.Plan) -> None:
    """Everything trains by SGD with momentum 0.9 and is decayed by 1e-4, norms and biases too, in batches of 128."""
    optimizer = lehr.optimizer(plan, cifar_resnet(110))
    assert isinstance(optimizer, torch.optim.SGD)
    assert all(
        (g["momentum"], g["nesterov"], g["weight_decay"]) == (0.9, False, 1e-4)
        for g in optimizer.param_groups
    )
    assert {name for group in plan.groups.values() for name in group} == set(plan.parameters)
    assert all(stage.batch_size == 128 for stage in plan.stages)
    assert plan.label_smoothing == plan.ema == 0
    assert plan.augment == ("shift", "flip")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example as a module, on one thread."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield import_module("resnet110")
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("resnet110", None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Forty made-up images of ten kinds, which differ in brightness, and ten to validate."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 10
    pixels = rng.integers(0, 30, (40, 32, 32, 3)) + 25 * labels[:, None, None, None]
    halves = {"x_train": pixels, "x_test": pixels[:10]}
    file = tmp_path / "few.npz"
    np.savez(file, **{k: v.astype(np.uint8) for k, v in halves.items()}, y_train=labels, y_test=labels[:10])
    return file


def test_images_are_in_memory_as_they_are_in_the_file(example: ModuleType, images: Path) -> None:
    """The bytes on the device are those of the file, and the classes stand beside them."""
    train, valid = example.in_memory(str(images), torch.device("cpu"))
    with np.load(images) as file:
        for half, samples in (("train", train), ("test", valid)):
            pixels, targets = samples.tensors
            assert pixels.dtype == torch.uint8
            assert np.array_equal(pixels.permute(0, 2, 3, 1), file[f"x_{half}"])
            assert np.array_equal(targets, file[f"y_{half}"])


def test_augmented_images_are_crops_of_padded_ones(example: ModuleType) -> None:
    """Each image comes out as one of the 81 crops of itself or of its mirror image within 4 black pixels; every crop and
    both sides occur."""
    torch.manual_seed(0)
    whole = torch.arange(1, 33).repeat(32, 1) + 3 * torch.arange(32)[:, None]
    image = torch.stack([whole, 2 * whole, whole + 1]).to(torch.uint8)
    out = example.augmented(image.expand(2000, -1, -1, -1))
    assert out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)
    known = set()
    for side, picture in enumerate((image, image.flip(2))):
        padded = torch.nn.functional.pad(picture, (4, 4, 4, 4))
        for down in range(9):
            for across in range(9):
                part = padded[:, down : down + 32, across : across + 32]
                known.add((side, down, across, part.numpy().tobytes()))
    drawn = {one.contiguous().numpy().tobytes() for one in out}
    assert drawn == {bytes_ for *_, bytes_ in known}


def test_validation_sees_images_as_they_are(example: ModuleType) -> None:
    """In eval mode the loss is that of the normalised images, without anything random."""
    net = cifar_resnet(8).eval()
    batch = [torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8), torch.arange(5)]
    before = torch.get_rng_state()
    said = example.classified(net, batch)
    assert torch.get_rng_state().equal(before)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (example.MEAN, example.STD))
    expected = net((batch[0] / 255 - mean) / std)
    assert torch.allclose(said["outputs"], expected, atol=1e-4)
    assert said["targets"] is batch[1]


def test_operations_are_counted(example: ModuleType) -> None:
    """The operations of an image are three times those of its convolutions and its head forwards, less the gradient
    that the first convolution's input does not need."""
    ends = [3 * 16 * 32 * 32 * 9, 64 * 10]
    rows = [
        16 * 16 * 32 * 32 * 9 * 2,
        (16 * 32 + 32 * 32) * 16 * 16 * 9,
        (32 * 64 + 64 * 64) * 8 * 8 * 9,
    ]
    assert example.flops(cifar_resnet(8)) == 2 * (3 * (sum(ends) + sum(rows)) - ends[0])


_SHORT = (
    "batch_size=8",
    "stages.0.length='2 epochs'",
    "stages.0.every='2 steps'",
    "stages.1.length='15 steps'",
)


def _call(images: Path, out: Path, *more: str) -> list[str]:
    settings = [
        part for setting in (*_SHORT, "stages.1.schedule='constant()'") for part in ("--set", setting)
    ]
    return [str(images), str(out), "--depth", "8", "--device", "cpu", *settings, *more]


def test_it_stops_and_goes_on_to_the_same_bits(
    example: ModuleType, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is stopped after some updates goes on by the same command, through the gate, and ends with the same bits
    as one that was not stopped; both say how long an update takes."""
    whole = example.main(_call(images, tmp_path / "whole"))
    pieces = 0
    while (result := example.main(_call(images, tmp_path / "cut", "--steps", "4"))) is None:
        pieces += 1
        assert pieces < 10
    assert pieces
    told = [record.event for record in read_journal(tmp_path / "cut" / "journal.jsonl")]
    assert any(isinstance(event, ConditionMet) for event in told)
    for name, tensor in whole.model.state_dict().items():
        assert result.model.state_dict()[name].equal(tensor), name
    assert [_unclocked(row) for row in result.history] == [_unclocked(row) for row in whole.history]
    said = capsys.readouterr().out
    assert "stopped as asked; the same command goes on" in said
    assert "ms an update of 8 images" in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_says_how_far_from_the_floor_it_is(
    example: ModuleType, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CUDA device it trains compiled in bf16, and says its time for an update as a multiple of the arithmetic."""
    cuda = ("--device", "cuda", "--compile", "--peak-tflops", "100")
    result = example.main(_call(images, tmp_path / "run", *cuda))
    assert result.history[-1]["step"] == 15
    assert "times the arithmetic floor" in capsys.readouterr().out


def _unclocked(row: Any) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "second" not in key}
