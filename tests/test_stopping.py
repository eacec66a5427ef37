"""Ctrl-C, SIGTERM, SIGHUP: the step under way is finished, the run is saved, the exit code says which it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import lehr
from forking import ended
from lehr.__main__ import main
from lehr.events import Interrupted, StepsTaken
from lehr.journal import effective, read_journal
from lehr.run.checkpoint import CheckpointFolder
from lehr.run.sampler import feed
from lehr.run.stopping import Stopped, stopping, was_asked
from lehr.run.update import Update

FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SAID = "stopping after this step, with a checkpoint; Ctrl-C again leaves at once"


def code_of(error: BaseException) -> int:
    """What a program ends with that ends with this."""
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    assert type(error) is KeyboardInterrupt
    return 130


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in ALL]


@pytest.fixture(autouse=True)
def _usual_handlers() -> Iterator[None]:
    """Handlers as a fresh Python has them, and afterwards what there was."""
    before = handlers()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in zip(ALL, before, strict=True):
        signal.signal(number, handler)


# --- the signals alone ---


@pytest.mark.parametrize("number", ALL)
def test_the_first_is_a_wish(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    """It interrupts nothing, is granted when it is asked about, and is said once on standard error."""
    before = handlers()
    with stopping() as stop:
        stop.check()
        signal.raise_signal(number)
        assert stop.signal == number
        with pytest.raises(Stopped):
            stop.check()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the next one acts"
    assert handlers() == before
    assert code_of(stop.leave()) == CODES[number]
    out, err = capfd.readouterr()
    assert not out
    assert err == f"\n{SAID}\n"


@pytest.mark.parametrize("first", ALL)
def test_a_second_ctrl_c_leaves_at_once(first: int, capfd: pytest.CaptureFixture[str]) -> None:
    """After either signal, Ctrl-C raises where the program is."""

    def twice() -> None:
        with stopping():
            signal.raise_signal(first)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert capfd.readouterr().err.count(SAID) == 1


@FORKS
@pytest.mark.parametrize("first", ALL)
def test_a_sigterm_after_another_kills(first: int) -> None:
    """After any of them, SIGTERM ends the process as it ends any other."""

    def work() -> None:
        with stopping():
            signal.raise_signal(first)
            signal.raise_signal(signal.SIGTERM)

    assert ended(work) == -signal.SIGTERM


@FORKS
@pytest.mark.parametrize("first", ALL)
def test_a_terminal_that_closes_changes_nothing_more(first: int) -> None:
    """The system and the shell both send a SIGHUP; the first signal counts, and the run is being saved."""

    def work() -> None:
        with stopping() as stop:
            signal.raise_signal(first)
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal == first
        assert code_of(stop.leave()) == CODES[first]

    assert ended(work) == 0


def test_where_nothing_is_saved_nothing_is_promised(capfd: pytest.CaptureFixture[str]) -> None:
    """A run without a directory does not speak of a checkpoint."""
    with stopping(saved=False):
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == "\nstopping after this step; Ctrl-C again leaves at once\n"


def test_without_a_terminal_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no standard error, its number may be another file's, and nothing is written."""
    monkeypatch.setattr(sys, "__stderr__", None)
    monkeypatch.setattr(os, "write", lambda *_: pytest.fail("written"))
    with stopping() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.signal == signal.SIGINT


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (KeyboardInterrupt(), True),
        (SystemExit(143), True),
        (SystemExit(129), True),
        (SystemExit(130), False),
        (SystemExit(3), False),
        (SystemExit(), False),
        (ValueError(), False),
    ],
    ids=repr,
)
def test_who_asked_for_the_end(error: BaseException, asked: bool) -> None:
    """Only what comes of a signal is a wish to stop; a program that ends itself is not."""
    assert was_asked(error) == asked


def test_nothing_is_left_behind() -> None:
    """Handlers are as before after a run that nobody stopped, and after one that failed."""
    before = handlers()
    with stopping() as stop:
        assert handlers() != before
    assert stop.signal == 0

    def failing() -> None:
        with stopping():
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        failing()
    assert handlers() == before


def test_a_persons_handler_stays() -> None:
    """A signal that the person handles, or ignores, goes where it went before; the other one is a wish."""
    heard: list[int] = []
    mine = lambda number, _: heard.append(number)  # noqa: E731
    signal.signal(signal.SIGTERM, mine)
    with stopping() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert (heard, stop.signal) == ([signal.SIGTERM], 0)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) is mine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and shells in the background have it
    with stopping() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == 0
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_done() -> None:
    """Where Python knows no signals, a run goes on without them."""
    before, found = handlers(), []

    def work() -> None:
        with stopping() as stop:
            stop.check()
            found.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
    assert handlers() == before


@FORKS
def test_a_worker_ignores_ctrl_c_and_dies_of_sigterm(capfd: pytest.CaptureFixture[str]) -> None:
    """What was forked while a run waits for signals has no wish of its own, says nothing, and can be ended."""

    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == 0
        stop.check()
        signal.raise_signal(signal.SIGTERM)

    with stopping() as stop:
        assert ended(work) == -signal.SIGTERM
        assert stop.signal == 0
    assert capfd.readouterr() == ("", "")


class Whose(Dataset[torch.Tensor]):
    """Samples that say which process loaded them."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(os.getpid())


@FORKS
def test_a_worker_that_loads_samples_goes_on_after_ctrl_c() -> None:
    """Ctrl-C in a terminal reaches the workers, too; the samples of the step under way still come."""
    with stopping():
        batches = feed(Whose(), seed=0, workers=1).sequential(1)
        worker = int(next(batches))
        assert worker != os.getpid()
        os.kill(worker, signal.SIGINT)
        assert [int(batch) for batch in batches] == [worker] * 59


# --- a run ---

RECIPE = lehr.Recipe(
    [lehr.Stage("2 epochs", train="head", lr=0.05), lehr.Stage("2 epochs", train="all", lr=0.02)],
    batch_size=8, ema=0.9,
)  # fmt: skip


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def data(samples: int = 30) -> TensorDataset:
    inputs = torch.randn(samples, 6, generator=torch.Generator().manual_seed(2))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def run(out: Path, **said: Any) -> lehr.Result:
    said = {"recipe": RECIPE, "device": "cpu", "resume": "auto", "checkpoint": "1 hour", **said}
    return lehr.fit(net(), data(), data(40), out=out, **said)


def raising(
    number: int, at: int, *, training: bool = True, times: int = 1
) -> Callable[[nn.Module, Any], Any]:
    """A loss in whose call `at`, counted from 0, the signal comes."""
    calls = iter(range(10**6))

    def loss(model: nn.Module, batch: Any) -> Any:
        if model.training == training and next(calls) == at:
            for _ in range(times):
                signal.raise_signal(number)
        outputs = model(batch[0])
        return {"loss": functional.cross_entropy(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    return loss


def tensors(out: Path) -> dict[str, torch.Tensor]:
    found = CheckpointFolder(out / "checkpoints").newest()
    assert found is not None
    return dict(found.snapshot.tensors)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[lehr.Result, dict[str, torch.Tensor]]:
    """A run that nothing stopped."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return run(out), tensors(out)


@pytest.mark.parametrize(
    ("number", "at", "training", "steps", "place"),
    [
        (signal.SIGINT, 0, True, 1, (0, 0)),
        (signal.SIGTERM, 5, True, 6, (0, 1)),
        (signal.SIGHUP, 7, True, 8, (0, 1)),
        (signal.SIGTERM, 15, True, 16, (1, 3)),
        (signal.SIGINT, 1, False, 4, (0, 0)),
        (signal.SIGTERM, 7, False, 16, (1, 3)),
    ],
    ids=["first step", "in an epoch", "end of a stage", "last step", "validation", "last validation"],
)
def test_a_run_that_is_stopped_finishes_its_step_and_goes_on_to_the_same_bits(
    unbroken: tuple[lehr.Result, dict[str, torch.Tensor]], number: int, at: int, training: bool, steps: int,
    place: tuple[int, int], tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The step is finished, in training or in validation the run is saved as of it and says so, and when it goes on
    it ends as if it had not been stopped."""
    out, before = tmp_path / "run", handlers()
    with pytest.raises((KeyboardInterrupt, SystemExit)) as left:
        run(out, loss=raising(number, at, training=training))
    assert code_of(left.value) == CODES[number]
    assert handlers() == before
    assert capfd.readouterr().err.count(SAID) == 1
    state = CheckpointFolder(out / "checkpoints").newest_state()
    assert state is not None
    assert (state.at.stage, state.at.epoch, state.at.step) == (*place, steps)
    told = [record.event for record in read_journal(out / "journal.jsonl")]
    assert told[-1] == Interrupted(steps)
    assert sum(len(event.losses) for event in told if isinstance(event, StepsTaken)) == steps
    result, found = run(out, loss=raising(number, -1)), tensors(out)
    wanted, bits = unbroken
    assert result.history == wanted.history
    assert found.keys() == bits.keys()
    assert all(torch.equal(found[name], bits[name]) for name in bits)
    counted = [r.event for r in effective(read_journal(out / "journal.jsonl").records)]
    assert sum(len(event.losses) for event in counted if isinstance(event, StepsTaken)) == 16


def test_a_second_ctrl_c_in_a_run_saves_nothing_more(tmp_path: Path) -> None:
    """The run leaves in the middle of the step; what was saved before is what there is."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", loss=raising(signal.SIGINT, 2, times=2))
    state = CheckpointFolder(tmp_path / "run" / "checkpoints").newest_state()
    assert state is not None
    assert state.at.step == 0
    told = [record.event for record in read_journal(tmp_path / "run" / "journal.jsonl")]
    assert told[-1] == Interrupted(2)


@pytest.mark.parametrize("number", ALL)
def test_a_run_without_a_directory_stops_too(number: int) -> None:
    """Without a directory the step is finished all the same, and the model is that of whole steps."""
    steps: list[int] = []
    observers = [lambda event: steps.append(event.stop) if isinstance(event, StepsTaken) else None]
    with pytest.raises((KeyboardInterrupt, SystemExit)) as left:
        lehr.fit(net(), data(), recipe=RECIPE, loss=raising(number, 2), observers=observers, device="cpu")
    assert steps == [3]
    assert code_of(left.value) == CODES[number]


def test_a_bad_sample_while_a_stop_is_wanted_is_a_stop(tmp_path: Path) -> None:
    """Where both come together, the person's wish is what ends the run."""

    class Breaking(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if index == bad:
                signal.raise_signal(signal.SIGTERM)
                raise OSError("gone")
            return super().__getitem__(index)

    source, bad = Breaking(*data().tensors), 13
    with pytest.raises(SystemExit, match="143"):
        lehr.fit(net(), source, recipe=RECIPE, out=tmp_path / "run", device="cpu")
    state = CheckpointFolder(tmp_path / "run" / "checkpoints").newest_state()
    assert state is not None
    assert state.at.step < 4
    assert isinstance(read_journal(tmp_path / "run" / "journal.jsonl").records[-1].event, Interrupted)


def saved_steps(out: Path) -> int:
    state = CheckpointFolder(out / "checkpoints").newest_state()
    assert state is not None
    return state.at.step


@pytest.mark.parametrize("number", ALL)
def test_the_command_line_ends_with_its_code(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`lehr fit` ends with 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, and says how to go on."""
    update = Update.__call__

    def stopped(self: Update, window: Any, step: int) -> torch.Tensor:
        if step == 3:
            signal.raise_signal(number)
        return update(self, window, step)

    monkeypatch.setattr(Update, "__call__", stopped)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["fit", "digits", "--no-scratch", "--out", "run"])
    assert left.value.code == CODES[number]
    said = capfd.readouterr().err
    assert said.count(SAID) == 1
    assert "to go on: lehr resume run" in said
    assert saved_steps(tmp_path / "run") == 4


PROGRAM = """
import os, signal
import torch
from torch import nn
import lehr

def loss(model, batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
recipe = lehr.Recipe([lehr.Stage("2 epochs", train="all", lr=0.1)], batch_size=8)
lehr.fit(nn.Linear(4, 2), data, recipe=recipe, loss=loss, out="run", device="cpu")
"""


def test_a_program_ends_with_its_code(tmp_path: Path) -> None:
    """A program of a person's own that gets a SIGTERM ends with 143 by itself, with no traceback."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(lehr.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 143, done.stderr
    assert done.stderr == f"\n{SAID}\n"
    assert saved_steps(tmp_path / "run") == 1


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="needs SIGCHLD")
def test_what_children_do_is_unheard_while_a_stop_is_wanted() -> None:
    """Workers that die of the signal that stops the run raise nothing in the step that is to be finished."""

    def heard(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    before = signal.signal(signal.SIGCHLD, heard)
    try:
        with stopping() as stop:
            with pytest.raises(RuntimeError, match="is killed"):
                signal.raise_signal(signal.SIGCHLD)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGCHLD)
            assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGCHLD) is heard
    finally:
        signal.signal(signal.SIGCHLD, before)
