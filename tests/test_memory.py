"""Out of memory: the message has the step, and the batch that would have fitted, found by trying."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import lehr
from lehr.errors import RunError
from lehr.events import RunFailed
from lehr.journal import read_journal
from lehr.run import memory
from lehr.run.checkpoint import CheckpointFolder
from lehr.run.memory import fitting, is_out_of_memory, part

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")
HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
)
Pair = namedtuple("Pair", "image name")


def data(samples: int = 72) -> TensorDataset:
    inputs = torch.randn(samples, 6, generator=torch.Generator().manual_seed(2))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


class Memory:
    """A loss with room for `room` samples, from training update `after` on."""

    def __init__(self, room: int, *, after: int = 0, error: Exception = CUDA) -> None:
        self.room, self.after, self.error, self.updates = room, after, error, 0

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.updates += model.training
        if self.updates > self.after and len(batch[0]) > self.room:
            raise self.error
        return functional.cross_entropy(model(batch[0]), batch[1])


def fit(loss: Callable[..., torch.Tensor], model: nn.Module | None = None, **said: Any) -> lehr.Result:
    recipe = {key: said.pop(key) for key in ("batch_size", "accumulate") if key in said}
    stages = [lehr.Stage("1 epoch", train="all", lr=0.1)]
    return lehr.fit(
        model or nn.Linear(6, 3), said.pop("train", None) or data(), recipe=lehr.Recipe(stages, **recipe), loss=loss,
        device="cpu", **said,
    )  # fmt: skip


# --- what it is ---


@pytest.mark.parametrize("error", [CUDA, HOST, MemoryError()], ids=["device", "host", "python"])
def test_memory_that_has_run_out_is_known(error: BaseException) -> None:
    """On a device, in torch's host memory, and in Python's own."""
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: out of luck"), ValueError("memory"), KeyboardInterrupt()]
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    """What only sounds like it goes its own way."""
    assert not is_out_of_memory(error)


def test_a_real_allocation_that_fails_is_known() -> None:
    """torch says in words that we look for that the host has not so much memory."""
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_the_largest_half_that_fits_is_found(size: int, room: int) -> None:
    """It is size / 2**k for the least k of at least 1 that fits, or 0 where not even one sample does."""
    tried: list[int] = []

    def attempt(batch: torch.Tensor) -> None:
        tried.append(len(batch))
        if len(batch) > room:
            raise CUDA

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_release", lambda: None)  # a hundred collections of garbage take a minute
        found = fitting(attempt, torch.zeros(size), size)
    halves = [size >> k for k in range(1, 20) if size >> k]
    assert found == next((half for half in halves if half <= room), 0)
    assert tried == halves[: len(tried)]


def test_another_failure_says_nothing_of_what_fits() -> None:
    """A smaller batch may fail for another reason; then nothing is claimed."""

    def attempt(batch: torch.Tensor) -> None:
        raise ValueError("Expected more than 1 value per channel") if len(batch) == 1 else CUDA

    assert fitting(attempt, torch.zeros(8), 8) is None


def test_a_part_of_a_batch_keeps_its_form() -> None:
    """Lists, tuples, named tuples and dicts come out as they were, each tensor cut; the rest stays."""
    batch = {"a": [torch.arange(4), Pair(torch.ones(4, 2), "x")], "b": (torch.tensor(7), None)}
    cut = part(batch, 3)
    assert cut["a"][0].tolist() == [0, 1, 2]
    assert cut["a"][1].image.shape == (3, 2)
    assert (type(cut["a"]), type(cut["a"][1]), cut["a"][1].name) == (list, Pair, "x")
    assert (cut["b"][0].item(), cut["b"][1]) == (7, None)


# --- what a run says ---


@pytest.mark.parametrize(
    ("said", "room", "fits", "times", "same"),
    [
        ({"batch_size": 32}, 31, 16, 2, True),
        ({"batch_size": 32}, 9, 8, 4, True),
        ({"batch_size": 32}, 1, 1, 32, True),
        ({"batch_size": 16, "accumulate": 2}, 5, 4, 8, True),
        ({"batch_size": 7}, 5, 3, 3, False),
        ({"batch_size": 12, "accumulate": 2}, 3, 3, 8, True),
    ],
)
def test_what_would_have_fitted_is_said_and_does(
    said: dict[str, int], room: int, fits: int, times: int, same: bool
) -> None:
    """The batch that is named fits, with as many samples in an update as before, or it is said how many."""
    message = (
        rf"step 0: out of memory with batches of {said['batch_size']} "
        r"\(CUDA out of memory\. Tried to allocate 20\.00 GiB\.\); "
        rf"{fits} would have fitted: batch_size = {fits} with accumulate = {times} makes "
    )
    samples = said["batch_size"] * said.get("accumulate", 1)
    end = (
        f"the same update of {samples} samples"
        if same
        else rf"updates of {fits * times}, not of {samples} samples"
    )
    with pytest.raises(RunError, match=message + end):
        fit(Memory(room), **said)
    again = fit(Memory(room), batch_size=fits, accumulate=times)
    assert again.history[-1]["step"] == -(-72 // (fits * times))
    assert (fits * times == samples) == same


def test_the_same_update_is_the_same(tmp_path: Path) -> None:
    """What is advised trains to the weights that the larger batch would have."""
    torch.manual_seed(3)
    one, other = (nn.Linear(6, 3) for _ in range(2))
    other.load_state_dict(one.state_dict())
    with pytest.raises(RunError) as failed:
        fit(Memory(10), batch_size=32, out=tmp_path / "run")
    advice = re.search(r"batch_size = (\d+) with accumulate = (\d+)", str(failed.value))
    assert advice
    fit(Memory(64), one, batch_size=32)
    fit(Memory(10), other, batch_size=int(advice[1]), accumulate=int(advice[2]))
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-5, atol=1e-6)


def test_the_step_is_that_of_the_failure(tmp_path: Path) -> None:
    """A run that fails in mid-way names the step, in the journal, too, and goes on from its last checkpoint."""
    loss = Memory(4, after=5)
    with pytest.raises(RunError, match=r"^step 5: out of memory with batches of 8 \(") as failed:
        fit(loss, batch_size=8, out=tmp_path / "run", checkpoint="2 steps")
    last = read_journal(tmp_path / "run" / "journal.jsonl").records[-1].event
    assert last == RunFailed(5, 0, f"RunError: {failed.value}")
    state = CheckpointFolder(tmp_path / "run" / "checkpoints").newest_state()
    assert state is not None
    assert state.at.step == 4
    result = fit(Memory(64), batch_size=8, out=tmp_path / "run", resume=True)
    assert result.history[-1]["step"] == 9


def test_where_nothing_fits_that_is_said() -> None:
    """Not even one sample: no batch size is advised."""
    with pytest.raises(
        RunError, match=r"not even one sample fits: a smaller model or smaller samples are needed"
    ):
        fit(Memory(0), batch_size=8)


def test_where_it_cannot_be_tried_that_is_no_other_error() -> None:
    """A batch-norm refuses a lone sample; the message is still that of the memory, and names no size."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(
        RunError, match=r"step 0: out of memory .*; try a smaller batch_size, and accumulate as many"
    ):
        fit(Memory(1), model, batch_size=8)


@pytest.mark.parametrize(
    ("error", "words"),
    [(MemoryError(), r"\(MemoryError\)"), (HOST, "DefaultCPUAllocator: can't allocate")],
    ids=["python", "torch"],
)
def test_the_memory_of_the_host_runs_out_alike(error: Exception, words: str) -> None:
    """Python's error, which has no words, and torch's are told in the same way."""
    with pytest.raises(
        RunError, match=rf"step 0: out of memory with batches of 8 .*{words}.*; 4 would have fitted"
    ):
        fit(Memory(4, error=error), batch_size=8)


def test_the_lone_sample_that_joined_is_not_counted() -> None:
    """17 samples in batches of 16 are a batch of 17, and the advice is still for updates of 16."""
    with pytest.raises(
        RunError,
        match=r"batches of 17 .*; 8 would have fitted: .* accumulate = 2 makes the same update of 16",
    ):
        fit(Memory(16), batch_size=16, train=data(17))


def test_nothing_holds_on_to_what_failed() -> None:
    """The tensors of the pass that failed, and all gradients, are free when the smaller batch is tried."""
    import gc
    import weakref

    model, seen = nn.Linear(6, 3), []
    alive: list[tuple[int, bool]] = []

    def loss(module: nn.Module, batch: Any) -> torch.Tensor:
        held = any(p.grad is not None for p in module.parameters())
        alive.append((sum(ref() is not None for ref in seen), held))
        outputs = module(batch[0])
        seen.append(weakref.ref(outputs))
        if len(seen) > 1 and len(batch[0]) > 2:
            raise torch.OutOfMemoryError("full")
        return functional.cross_entropy(outputs, batch[1])

    gc.disable()
    try:
        with pytest.raises(RunError, match="2 would have fitted"):
            fit(loss, model, batch_size=8, accumulate=2)
    finally:
        gc.enable()
    assert alive == [(0, False), (0, True), (0, False), (0, False)]  # two batches; then 4 samples, 2 samples


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ZeroDivisionError()])
def test_other_failures_come_as_they_are(error: Exception) -> None:
    """What is not memory is not caught."""
    with pytest.raises(type(error)) as failed:
        fit(Memory(0, error=error), batch_size=8)
    assert failed.value is error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_that_is_full() -> None:
    """On CUDA the advice is found by trying, and it fits."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        total = torch.cuda.get_device_properties(0).total_memory
        room = torch.empty(int(total * 0.3) * len(batch[0]) // 4, dtype=torch.uint8, device="cuda")
        return functional.cross_entropy(model(batch[0]), batch[1]) + 0.0 * room[0]

    stages = [lehr.Stage("1 epoch", train="all", lr=0.1)]
    with pytest.raises(RunError, match=r"step 0: out of memory with batches of 16 .*; 8 would have fitted: "):
        lehr.fit(
            nn.Linear(6, 3), data(16), recipe=lehr.Recipe(stages, batch_size=16), loss=loss, device="cuda"
        )
