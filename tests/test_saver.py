"""When a run is saved, beside the training; and what becomes of a checkpoint that cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lehr.cadence import Cadence, Every
from lehr.errors import RunError
from lehr.events import CheckpointFailed, CheckpointWritten, Event, Note
from lehr.run import checkpoint as checkpoints
from lehr.run.checkpoint import CheckpointFolder, Snapshot
from lehr.run.folder import RunFolder
from lehr.run.saver import RETRY, Saver
from lehr.run.state import BestSoFar, Kept, Position, SoFar
from test_state import WHOLE

PATIENCE = 20.0  # seconds after which a test that waits for a thread has failed


@dataclass
class World:
    """A saver in a directory, with a clock that goes when it is told to; ten steps are an epoch."""

    run: Path
    every: str = "10 minutes"
    keep: int = 9
    now: float = 1000.0
    told: list[Event] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    best: tuple[int, ...] = ()
    instead_of: str | None = None
    step: int = 0

    def __post_init__(self) -> None:
        self.others = set(threading.enumerate())
        self.run.mkdir(exist_ok=True)
        (self.run / "journal.jsonl").touch()
        cadence = Cadence(Every.parse(self.every), keep=self.keep)
        self.saver = Saver(RunFolder(self.run), cadence, self.take, self.told.append, clock=lambda: self.now)

    def take(self) -> Snapshot:
        self.taken.append(self.step)
        rows = tuple(
            {"epoch": e, "stage": 0, "step": 10 * (e + 1), "train_loss": 1.0, "best": False}
            for e in range(self.step // 10)
        )
        kept = tuple(Kept(epoch, 0.5) for epoch in self.best)
        state = replace(
            WHOLE, at=Position(0, self.step // 10, self.step), history=rows, so_far=SoFar(samples=self.step % 10),
            best=BestSoFar(ranked=kept), instead_of=self.instead_of, files={},
        )  # fmt: skip
        return Snapshot(state, {"model/w": torch.full((3,), float(self.step))}, {})

    def offer(self, step: int, *, passed: float = 0.0, ended: bool = False) -> bool:
        """Offer a checkpoint of `step`, `passed` seconds after the last offer; whether it was taken."""
        self.now, self.step = self.now + passed, step
        before = len(self.taken)
        self.saver.offer(step, step // 10, epoch_ended=ended)
        return len(self.taken) > before

    def save(self, step: int) -> None:
        self.step = step
        self.saver.save(step, step // 10, wait=True)

    def written(self) -> list[int]:
        return [e.step for e in self.told if isinstance(e, CheckpointWritten)]

    def failed(self) -> list[CheckpointFailed]:
        return [e for e in self.told if isinstance(e, CheckpointFailed)]

    def on_disk(self) -> int | None:
        found = CheckpointFolder(self.run / "checkpoints").newest()
        return found.snapshot.state.at.step if found else None

    def writing(self) -> set[threading.Thread]:
        return set(threading.enumerate()) - self.others

    def idle(self) -> None:
        """Wait until nothing is being written."""
        for thread in self.writing():
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path / "run")
    made.saver.begin()
    return made


@dataclass
class Disk:
    """What stands in the way of writing: an error, or a gate that must be opened first."""

    error: BaseException | None = None
    gate: threading.Event | None = None
    tries: int = 0

    def pass_by(self) -> None:
        self.tries += 1
        if self.gate:
            assert self.gate.wait(PATIENCE)
        if self.error:
            raise self.error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made, write = Disk(), checkpoints.write_tensors

    def slowly(path: Path, tensors: Any) -> None:
        made.pass_by()
        write(path, tensors)

    monkeypatch.setattr(checkpoints, "write_tensors", slowly)
    yield made
    if made.gate:
        made.gate.set()


FULL = OSError(errno.ENOSPC, "No space left on device", "/secret/folder/.0002-step-5.safetensors.part")


# --- when ---


def test_a_run_is_saved_before_its_first_step(world: World) -> None:
    """When `begin` returns, there is a checkpoint to go on from."""
    assert world.on_disk() == 0
    assert world.written() == [0]


def test_by_time(world: World) -> None:
    """By time: when so much has passed since the last one, not before."""
    assert not world.offer(1, passed=599.0)
    assert world.offer(2, passed=1.0)
    world.idle()
    assert not world.offer(3, passed=599.9)
    assert world.offer(4, passed=0.1)
    world.idle()
    world.offer(5)
    assert world.written() == [0, 2, 4]


def test_by_time_also_at_the_end_of_an_epoch(world: World) -> None:
    """By time: the end of an epoch is saved where a minute has passed."""
    assert not world.offer(10, passed=59.0, ended=True)
    assert world.offer(20, passed=1.0, ended=True)
    assert not world.offer(21, passed=61.0)


@pytest.mark.parametrize(("every", "due"), [("4 steps", [4, 8, 12, 16, 20]), ("1 epoch", [10, 20])])
def test_by_steps_and_epochs(every: str, due: list[int], tmp_path: Path) -> None:
    """By steps or epochs: at their multiples, whatever the time."""
    world = World(tmp_path / "run", every)
    world.saver.begin()
    assert [
        s for s in range(1, 21) if world.offer(s, passed=1e6) or (s % 10 == 0 and world.offer(s, ended=True))
    ] == due
    world.idle()
    assert world.on_disk() == 20


@pytest.mark.usefixtures("disk")
def test_by_steps_no_step_is_left_out(tmp_path: Path) -> None:
    """By steps every one that is due is written, though the one before may not be on the disk yet."""
    world = World(tmp_path / "run", "1 steps")
    for step in range(1, 6):
        assert world.offer(step)
    world.saver.wait()
    assert world.written() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("every", ["10 minutes", "4 steps", "1 epoch"])
def test_a_run_that_goes_on_counts_from_there(every: str, tmp_path: Path) -> None:
    """Where another process has saved the run, the next checkpoint is due as if that had been this one."""
    World(tmp_path / "run").save(14)
    found = CheckpointFolder(tmp_path / "run" / "checkpoints").newest()
    assert found is not None
    world = World(tmp_path / "run", every)
    world.saver.go_on(found.snapshot.state)
    assert not world.offer(15, passed=1.0)
    if every == "4 steps":
        assert world.offer(16)


def test_a_clock_that_goes_backwards(world: World) -> None:
    """A clock that is set back makes nothing due and breaks nothing; steps and stages are saved all the same."""
    assert not world.offer(1, passed=-1e9)
    world.save(2)
    assert world.on_disk() == 2
    assert not world.offer(3, passed=599.0)
    assert world.offer(4, passed=1.0)


def test_as_many_are_kept_as_were_asked_for(tmp_path: Path) -> None:
    """After each checkpoint the oldest beyond those to keep are removed."""
    world = World(tmp_path / "run", keep=2)
    for step in (0, 1, 2, 3):
        world.save(step)
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").glob("*.json"))] == [
        "0003-step-2.json", "0004-step-3.json"
    ]  # fmt: skip


def test_nothing_is_removed_while_a_plan_changes(tmp_path: Path) -> None:
    """The first checkpoint of a changed plan leaves those of the old one: they are needed until it is written."""
    world = World(tmp_path / "run", keep=1)
    world.save(0)
    world.instead_of = "e" * 64
    world.save(1)
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.json"))) == 2
    world.instead_of = None
    world.save(2)
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.json"))) == 1


# --- beside the training ---


def test_a_slow_disk_does_not_hold_up_the_steps(world: World, disk: Disk) -> None:
    """While a checkpoint is being written, by time, the loop goes on and takes no other; what it wrote is told at
    the next step after.
    """
    disk.gate = threading.Event()
    assert world.offer(1, passed=600.0)
    for step in range(2, 50):
        assert not world.offer(step, passed=600.0)
    assert world.written() == [0]
    disk.gate.set()
    world.idle()
    world.offer(50)
    assert world.written() == [0, 1]


def test_what_is_written_is_what_was_taken(world: World, disk: Disk) -> None:
    """A checkpoint holds the step that it was taken at, however far the run has come since."""
    disk.gate = threading.Event()
    world.offer(1, passed=600.0)
    world.offer(7, passed=1.0)
    disk.gate.set()
    world.idle()
    assert world.on_disk() == 1


def test_the_stall_is_measured(tmp_path: Path) -> None:
    """`stall` is how long the loop stood still, with the wait for the one before; `seconds`, how long writing took."""
    world = World(tmp_path / "run")
    take = world.take

    def slowly() -> Snapshot:
        world.now += 3.0
        return take()

    world.saver._take = slowly
    world.save(1)
    (event,) = [e for e in world.told if isinstance(e, CheckpointWritten)]
    assert (event.step, event.stall) == (1, 3.0)
    tensors = tmp_path / "run" / "checkpoints" / "0001-step-1.safetensors"
    assert event.bytes == tensors.stat().st_size


# --- what goes wrong ---


def test_a_full_disk_does_not_end_the_run(world: World, disk: Disk) -> None:
    """A checkpoint that cannot be written is told with the reason, without folders, and tried again after a minute;
    when it can be written, all is well.
    """
    disk.error = FULL
    assert world.offer(5, passed=600.0)
    world.idle()
    assert not world.offer(6)
    assert world.failed() == [CheckpointFailed(5, "No space left on device: 0002-step-5.safetensors", RETRY)]
    assert world.saver.problem == "No space left on device: 0002-step-5.safetensors"
    assert not world.offer(7, passed=RETRY - 1)
    assert world.offer(8, passed=1.0)
    world.idle()
    disk.error = None
    assert not world.offer(9)
    assert len(world.failed()) == 2
    assert world.offer(10, passed=RETRY)
    world.idle()
    world.offer(11)
    assert world.written() == [0, 10]
    assert not world.saver.problem
    assert not world.offer(12, passed=RETRY + 1)
    assert world.on_disk() == 10


def test_a_failure_by_steps_is_tried_again_once(tmp_path: Path, disk: Disk) -> None:
    """By steps, too, the next try comes after a minute, and it is one try, not one a step."""
    world = World(tmp_path / "run", "1000 steps")
    disk.error = FULL
    world.save(1)
    disk.error, disk.gate = None, threading.Event()
    assert not world.offer(2, passed=RETRY - 1)
    assert world.offer(3, passed=1.0)
    assert not any(world.offer(step, passed=1.0) for step in range(4, 9))
    disk.gate.set()
    world.idle()
    world.offer(9)
    assert world.written() == [3]


def test_a_run_that_cannot_be_saved_is_not_begun(tmp_path: Path, disk: Disk) -> None:
    """Where not even the first checkpoint can be written, the run is refused before it trains."""
    disk.error = FULL
    with pytest.raises(RunError, match="not begun: No space left on device"):
        World(tmp_path / "run").saver.begin()


@pytest.mark.parametrize("when", ["offer", "save", "finish", "wait"])
def test_a_mistake_is_not_swallowed(when: str, world: World, disk: Disk) -> None:
    """What goes wrong in the thread and is no matter of the disk is raised where the run is."""
    disk.error = ZeroDivisionError("a mistake")
    world.offer(1, passed=600.0)
    world.idle()
    ways: dict[str, Callable[[], object]] = {
        "offer": lambda: world.offer(2),
        "save": lambda: world.save(2),
        "finish": lambda: world.saver.finish(2, {}, None),
        "wait": world.saver.wait,
    }
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        ways[when]()


def test_a_directory_that_vanished_is_not_made_again(world: World) -> None:
    """Where the run's directory has gone, a disk may have gone with it: nothing is made in its place, and when it
    is back, the run is saved again.
    """
    world.run.rename(world.run.with_name("away"))
    world.offer(1, passed=600.0)
    world.idle()
    world.offer(2)
    assert [event.step for event in world.failed()] == [1]
    assert "No such file or directory" in world.saver.problem
    assert not world.run.exists()
    world.run.with_name("away").rename(world.run)
    world.offer(3, passed=RETRY)
    world.idle()
    assert world.on_disk() == 3


def test_a_folder_of_checkpoints_that_vanished_is_made_anew(world: World) -> None:
    """Where only the checkpoints were removed, the next one is written into a new folder."""
    shutil.rmtree(world.run / "checkpoints")
    world.offer(1, passed=600.0)
    world.idle()
    assert world.on_disk() == 1
    assert not world.failed()


def test_permission_that_is_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that may no longer be written to is told, and tried again."""
    system = os.open

    def refused(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT and "checkpoints" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return system(path, flags, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        world.offer(1, passed=600.0)
        world.idle()
        world.offer(2)
    assert world.failed()[0].error == "Permission denied: 0002-step-1.json"
    assert world.offer(3, passed=RETRY)
    world.idle()
    assert world.on_disk() == 3


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs a user who can become another")
def test_a_directory_of_another_user(world: World) -> None:
    """A directory that belongs to another user by now is told by the system itself, in words."""
    for path in (world.run, world.run / "checkpoints"):
        path.chmod(0o555)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.seteuid(65534)
            world.save(1)
            code = 0 if "Permission denied" in world.failed()[0].error and not world.written()[1:] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- the best weights ---


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value)}


def best_of(run: Path) -> float:
    return float(load_file(run / "best.safetensors")["w"][0])


def test_the_best_weights_are_there_at_once(world: World) -> None:
    """The weights of a best epoch are on the disk soon after it, as the run's, without a checkpoint."""
    world.saver.keep(0, weights(0.0), True)
    world.idle()
    assert best_of(world.run) == 0.0
    world.saver.keep(1, weights(1.0), False)
    world.idle()
    assert best_of(world.run) == 0.0
    assert (world.run / "checkpoints" / "best-1.safetensors").exists()
    assert world.written() == [0]


def test_best_weights_wait_for_the_disk(world: World, disk: Disk) -> None:
    """Best weights that cannot be written wait in memory, and come before the next checkpoint, which needs them."""
    disk.error = FULL
    world.saver.keep(0, weights(0.0), True)
    world.idle()
    world.offer(11)
    assert any(isinstance(event, Note) and "best weights" in event.text for event in world.told)
    disk.error, world.best = None, (0,)
    assert world.offer(12, passed=RETRY)
    world.idle()
    assert best_of(world.run) == 0.0
    assert world.on_disk() == 12


def test_best_weights_do_not_pile_up(world: World, disk: Disk) -> None:
    """On a disk that stays full, weights that are no longer among the best are not held in memory any longer."""
    disk.error = FULL
    for epoch in range(8):
        world.best = (epoch,)
        world.saver.keep(epoch, weights(epoch), True)
        world.save(10 * (epoch + 1))
    assert list(world.saver._best) == [7]
    disk.error = None
    world.save(90)
    assert best_of(world.run) == 7.0


# --- the end ---


@pytest.mark.parametrize("epoch", [None, 4])
def test_the_weights_are_left_at_the_end(epoch: int | None, world: World) -> None:
    """At the end the run's weights are on the disk: the best, or the last where nothing said which were best."""
    world.saver.finish(50, weights(7.0), epoch)
    assert best_of(world.run) == 7.0
    assert not world.saver.problem


def test_the_last_state_is_tried_once_more_at_the_end(world: World, disk: Disk) -> None:
    """Where the last checkpoint could not be written, the same one is tried again: by now the model has its best
    weights, which are not those of the last step.
    """
    disk.error = FULL
    world.save(30)
    disk.error, before = None, len(world.taken)
    world.saver.finish(30, weights(7.0), None)
    assert len(world.taken) == before
    assert world.on_disk() == 30
    assert not world.saver.problem
    assert best_of(world.run) == 7.0


def test_what_is_missing_at_the_end_is_told(world: World, disk: Disk) -> None:
    """What could not be left on the disk is a problem that can be read after the end."""
    disk.error = FULL
    world.save(30)
    world.saver.finish(30, weights(7.0), 2)
    assert "No space left" in world.saver.problem
    assert world.on_disk() == 0


def test_the_end_of_a_run_whose_directory_is_gone(world: World) -> None:
    """A directory that is gone at the end is told, and not made again."""
    shutil.rmtree(world.run)
    world.saver.finish(30, weights(7.0), None)
    assert world.saver.problem
    assert not world.run.exists()


def test_no_thread_outlives_a_wait(world: World) -> None:
    """After a save that was waited for, nothing is being written."""
    world.offer(3, passed=600.0)
    world.save(5)
    assert not world.writing()
    assert world.on_disk() == 5


def test_best_weights_do_not_hold_up_the_steps(world: World, disk: Disk) -> None:
    """The weights of a best epoch are written beside the training, also while a checkpoint is being written."""
    disk.gate = threading.Event()
    world.offer(9, passed=600.0)
    world.best = (0, 1)
    world.saver.keep(0, weights(0.0), True)
    world.saver.keep(1, weights(1.0), True)
    assert not world.offer(21, passed=600.0)
    disk.gate.set()
    world.idle()
    assert best_of(world.run) == 1.0
    assert world.on_disk() == 9


def test_best_weights_that_a_waiting_checkpoint_does_not_know_stay(tmp_path: Path, disk: Disk) -> None:
    """Where the disk is so slow that an epoch ends before the last one's checkpoint is begun, its weights stay."""
    world = World(tmp_path / "run", every="1 epoch", keep=1)
    world.saver.begin()
    disk.gate, world.best = threading.Event(), (0,)
    world.saver.keep(0, weights(0.0), True)  # stands at the gate, and the checkpoint behind it
    assert world.offer(10)
    world.best = (0, 1)
    world.saver.keep(1, weights(1.0), False)
    disk.gate.set()
    world.saver.wait()
    assert world.on_disk() == 10
    assert (world.run / "checkpoints" / "best-1.safetensors").is_file()


def test_a_program_that_changes_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's relative directory is where it was when the run began."""
    monkeypatch.chdir(tmp_path)
    world = World(Path("run"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    world.saver.begin()
    world.saver.finish(0, weights(1.0), None)
    monkeypatch.chdir(tmp_path)
    assert world.on_disk() == 0
    assert best_of(world.run) == 1.0
    assert not world.saver.problem


@pytest.mark.parametrize("when", ["before it starts", "while it starts"])
def test_a_start_that_is_broken_off(world: World, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """torch tells of a worker that died in the middle of anything: where that is the start of the thread that writes, the
    checkpoint is written all the same, once, and what follows as well.
    """
    begin = threading.Thread.start

    def broken_off(thread: threading.Thread) -> None:
        if when == "while it starts":
            begin(thread)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", broken_off)
        world.step = 10
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            world.saver.save(10, 1)
    world.save(20)
    assert world.written() == [0, 10, 20]
    assert world.on_disk() == 20
