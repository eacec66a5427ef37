"""What can go wrong while a run is under way, as a person meets it: through `lehr fit`, `lehr resume` and
`lehr.fit`. docs/faults.md is the table of it; the last test holds the table to the tests that there are.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import breaking
import lehr
import small_run
from breaking import FIT, Fault, ends
from lehr.errors import FeedError, NonFiniteError, RunError
from lehr.events import CheckpointWritten, EpochEnded, Interrupted, Resumed, RunFailed, StageStarted
from lehr.journal import Journal, read_journal
from lehr.run import loop
from lehr.run.checkpoint import CheckpointFolder
from lehr.run.saver import Saver
from lehr.run.update import cross_entropy
from nursery import Ended

ROOT = Path(__file__).parent.parent
STEPS = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run of `FIT` comes to where nothing goes wrong."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert ends(*FIT, "--out", out).code == 0
    return came_to(out)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in the middle of its second stage; it has checkpoints of steps 4 and 6."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert ends(*FIT, "--out", out, at={5: partial(breaking.press, signal.SIGINT)}).code == 130
    return out


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, hard links and all, to break."""
    subprocess.run(["cp", "-a", stopped, tmp_path / "run"], check=True)
    return tmp_path / "run"


def came_to(out: Path) -> dict[str, Any]:
    """All that must be the same to the bit, however often a run was stopped."""
    found = CheckpointFolder(out / "checkpoints").newest()
    assert found is not None
    tensors = {name: small_run.bits(t) for name, t in found.snapshot.tensors.items()}
    best = {name: small_run.bits(t) for name, t in load_file(out / "best.safetensors").items()}
    epochs = [e for e in told(out) if isinstance(e, EpochEnded)]
    rows = [(e.epoch, e.step, e.train_loss, sorted(e.metrics.items()), e.best) for e in epochs]
    return {"tensors": tensors, "best": best, "epochs": rows, "losses": small_run.losses(out)}


def told(out: Path) -> list[Any]:
    """All that the journal of a run holds that counts."""
    return small_run.events(out)


def goes_on(out: Path, whole: dict[str, Any] | None = None, *more: object) -> Ended:
    """`lehr resume` works, and ends with the bits of a run that nothing has stopped."""
    ended = ends("resume", out, *more)
    assert ended.code == 0, ended.said
    if whole is not None:
        assert came_to(out) == whole
    return ended


def goes_on_from_before(out: Path, whole: dict[str, Any]) -> None:
    """It goes on from a checkpoint before the stop, whichever was on the disk: the end of the first stage, if its
    writing beside the training was over by then, or the beginning."""
    state = CheckpointFolder(out / "checkpoints").newest_state()
    assert state is not None
    assert state.at.step in (0, 4)
    assert f"resumed at step {state.at.step} of 8" in goes_on(out, whole).said


def is_plain(ended: Ended) -> None:
    """What was said is for a person: no traceback, and at most one line of why."""
    assert "Traceback" not in ended.said
    assert "a mistake in lehr" not in ended.said
    assert ended.said.count("\nlehr: ") <= 1


def last_line(ended: Ended) -> str:
    return ended.said.strip().splitlines()[-1]


def to_go_on(ended: Ended) -> bool:
    """Whether it was said how to go on."""
    return "to go on: lehr resume" in ended.said


# --- the process ---


def test_ctrl_c(run: Path, whole: dict[str, Any]) -> None:
    """Ctrl-C finishes the step, saves the run, says how to go on and exits with 130; the resumed run ends with the
    same bits."""
    state = CheckpointFolder(run / "checkpoints").newest_state()
    assert state is not None
    assert state.at.step == 6
    assert told(run)[-1] == Interrupted(6)
    goes_on(run, whole)


def test_what_ctrl_c_says(tmp_path: Path) -> None:
    """The last lines after Ctrl-C say that the step is finished first, that the run can go on, and how."""
    ended = ends(*FIT, "--out", tmp_path / "run", at={5: partial(breaking.press, signal.SIGINT)})
    assert ended.code == 130
    is_plain(ended)
    said = ended.said.splitlines()
    assert "stopping after this step, with a checkpoint; Ctrl-C again leaves at once" in said
    assert said[-1] == f"to go on: lehr resume {tmp_path / 'run'}"


def test_a_second_ctrl_c(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A second Ctrl-C leaves at once with 130; the run goes on from the checkpoint before."""
    pressed = partial(breaking.press, signal.SIGINT, signal.SIGINT)
    ended = ends(*FIT, "--out", tmp_path / "run", at={5: pressed})
    assert ended.code == 130
    is_plain(ended)
    assert to_go_on(ended)
    goes_on_from_before(tmp_path / "run", whole)


def test_a_kill(tmp_path: Path, whole: dict[str, Any]) -> None:
    """After a SIGKILL, as of a system without memory, the run goes on from its last checkpoint to the same bits."""
    ended = ends(*FIT, "--out", tmp_path / "run", at={6: partial(breaking.press, signal.SIGKILL)})
    assert ended.code == -signal.SIGKILL
    goes_on(tmp_path / "run", whole)


def test_ctrl_c_in_validation(tmp_path: Path, whole: dict[str, Any]) -> None:
    """In the middle of a validation Ctrl-C need not wait for its end; what was trained is saved."""
    first = partial(breaking.in_validation, partial(breaking.press, signal.SIGINT))
    ended = ends(*FIT, "--out", tmp_path / "run", first=first)
    assert ended.code == 130
    assert "interrupted after 4 steps" in ended.said
    assert not any(isinstance(event, EpochEnded) for event in told(tmp_path / "run"))
    goes_on(tmp_path / "run", whole)


def test_a_terminal_that_closes(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Where its terminal is closed, the step is finished, the run saved, and the exit code is 129."""
    ended = ends(*FIT, "--out", tmp_path / "run", first=breaking.in_a_terminal, at={5: breaking.hang_up})
    assert ended.code == 129, ended.said
    assert told(tmp_path / "run")[-1] == Interrupted(6)
    goes_on(tmp_path / "run", whole)


def test_nohup(tmp_path: Path) -> None:
    """Under nohup the run does not care about its terminal."""
    first = partial(breaking.ignore, signal.SIGHUP)
    ended = ends(*FIT, "--out", tmp_path / "run", first=first, at={5: partial(breaking.press, signal.SIGHUP)})
    assert ended.code == 0, ended.said
    assert "interrupted" not in ended.said


@pytest.mark.parametrize("number", [0, signal.SIGINT], ids=["goes on", "Ctrl-C"])
def test_a_reader_of_the_output_that_leaves(number: int, tmp_path: Path, whole: dict[str, Any]) -> None:
    """A pipe that nobody reads any more (`lehr fit ... 2>&1 | head`) changes nothing but what is seen."""
    fault = partial(
        breaking.many, breaking.broken_pipe, *([partial(breaking.press, number)] if number else [])
    )
    ended = ends(*FIT, "--out", tmp_path / "run", at={5: fault})
    assert ended.code == (130 if number else 0), ended.said
    is_plain(ended)
    if number:
        goes_on(tmp_path / "run")
    assert came_to(tmp_path / "run") == whole


def test_without_standard_error(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A run without a standard error is the same run."""
    ended = ends(
        *FIT, "--out", tmp_path / "run", first=breaking.no_standard_error,
        at={5: partial(breaking.press, signal.SIGINT)},
    )  # fmt: skip
    assert ended.code == 130, ended.said
    goes_on(tmp_path / "run", whole)


def test_a_broken_pipe_keeps_the_exit_code() -> None:
    """Where nobody reads why a request was refused, the exit code says that it was."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "lehr", "no-such-command"]
    done = subprocess.run(command, stderr=writes, env=environment(), check=False)
    os.close(writes)
    assert done.returncode == 2


def test_ctrl_c_while_python_loads(tmp_path: Path) -> None:
    """Ctrl-C while the libraries are being loaded ends with 130 and one line, and leaves nothing behind."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "-m", "lehr", "fit", "digits", "--out", "run"], cwd=tmp_path,
        env=environment(tmp_path / "stub"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr.split() == ["lehr:", "interrupted"]
    assert not (tmp_path / "run").exists()


def environment(*first: Path) -> dict[str, str]:
    paths = (*map(str, first), str(Path(lehr.__file__).parents[1]))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_ctrl_c_while_images_are_checked(images: Path, tmp_path: Path) -> None:
    """Ctrl-C while the images are being checked ends with 130, and leaves nothing behind."""
    first = partial(breaking.while_checking, partial(breaking.press, signal.SIGINT))
    ended = ends(
        "fit", images, "--model", "resnet10t", "--no-pretrained", "--out", tmp_path / "run", first=first
    )
    assert ended.code == 130
    is_plain(ended)
    assert not to_go_on(ended)
    assert not (tmp_path / "run").exists()


# --- the disk ---


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = (
        os.geteuid() == 0 and shutil.which("mount") and _mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", where)
    )
    if not mounted:
        pytest.skip("a small disk can be mounted by root only")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def _mount(*arguments: object) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0


def elsewhere(ended: Ended) -> dict[str, torch.Tensor]:
    """The weights that were put elsewhere, from where it is said that they are; taken away."""
    found = re.search(r"the weights are in (\S+/best\.safetensors)", ended.said)
    assert found, ended.said
    weights = load_file(found[1])
    shutil.rmtree(Path(found[1]).parent)
    return weights


def are_best(weights: dict[str, torch.Tensor], whole: dict[str, Any]) -> bool:
    return {name: small_run.bits(t) for name, t in weights.items()} == whole["best"]


# How much room is left, and what can be written then: each file is larger than the room left for it.
ROOM = {
    "model.json": 0,
    "data.json": 20_000,
    "plan.png": 80_000,
    "plan.json": 105_000,
    "a checkpoint": 300_000,
}


@pytest.mark.parametrize("room", ROOM.values(), ids=ROOM)
def test_a_disk_that_is_full_before_the_run_begins(room: int, disk: Path) -> None:
    """Where there is no room for what a run begins with, it is not begun: exit code 1, the disk is named, nothing is
    left behind, and nobody is told to resume it."""
    breaking.fill(disk, room)
    ended = ends(*FIT, "--out", disk / "run")
    assert ended.code == 1, ended.said
    is_plain(ended)
    assert f"lehr: {disk / 'run'}" in last_line(ended)
    assert "No space left on device" in last_line(ended)
    assert "free some space" in last_line(ended)
    assert not to_go_on(ended)
    assert not (disk / "run").exists()


@pytest.mark.parametrize("full_at", [2, 7], ids=["before the second checkpoint", "at the end"])
def test_a_disk_that_stays_full(full_at: int, disk: Path, whole: dict[str, Any]) -> None:
    """The run trains to its end without saying otherwise, its best weights are put elsewhere, and it exits with 1;
    when there is room again, it goes on from the last checkpoint that could be written."""
    ended = ends(*FIT, "--out", disk / "run", at={full_at: partial(breaking.fill, disk)})
    assert ended.code == 1, ended.said
    is_plain(ended)
    assert "the checkpoint of step 8 could not be written: No space left on device" in ended.said
    assert "done · 8 steps" in ended.said
    assert are_best(elsewhere(ended), whole)
    assert to_go_on(ended)
    breaking.clear(disk)
    goes_on(disk / "run", whole)


def test_a_disk_that_is_full_for_a_while(disk: Path, whole: dict[str, Any]) -> None:
    """Where there is room again before the end, everything is there in the end, and the exit code is 0."""
    fill, clear = partial(breaking.fill, disk), partial(breaking.clear, disk)
    ended = ends(*FIT, "--out", disk / "run", at={2: fill, 6: clear})
    assert ended.code == 0, ended.said
    assert "the checkpoint of step 4 could not be written: No space left on device" in ended.said
    assert "training goes on" in ended.said
    assert came_to(disk / "run") == whole


def test_ctrl_c_on_a_full_disk(disk: Path, whole: dict[str, Any]) -> None:
    """Where the run cannot be saved as it stops, that is said, and its weights are put elsewhere; it goes on from the
    checkpoint before."""
    fault = partial(breaking.many, partial(breaking.fill, disk), partial(breaking.press, signal.SIGINT))
    ended = ends(*FIT, "--out", disk / "run", at={6: fault})
    assert ended.code == 130, ended.said
    assert "the checkpoint of step 7 could not be written: No space left on device" in ended.said
    assert "training goes on" not in ended.said
    assert elsewhere(ended)
    breaking.clear(disk)
    goes_on_from_before(disk / "run", whole)


def test_files_that_may_not_grow(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A quota is met like a full disk: told, tried again, and made good when it is lifted."""
    at = {2: partial(breaking.limit, 2000), 6: partial(breaking.limit, None)}
    ended = ends(*FIT, "--out", tmp_path / "run", at=at)
    assert ended.code == 0, ended.said
    assert "the checkpoint of step 4 could not be written: File too large" in ended.said
    assert "journal.jsonl: the lines cannot be written (File too large)" in ended.said
    assert came_to(tmp_path / "run") == whole


def test_a_journal_that_cannot_be_written(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A journal that cannot be written to the end makes the exit code 1, and says so; the rest is all there."""
    out = tmp_path / "run"
    fault = partial(breaking.replace_by_a_folder, out / "journal.jsonl")
    ended = ends(*FIT, "--out", out, at={2: fault})
    assert ended.code == 1, ended.said
    assert "journal.jsonl" in last_line(ended)
    assert are_best(load_file(out / "best.safetensors"), whole)
    assert are_best(elsewhere(ended), whole)


def test_a_read_only_disk(disk: Path) -> None:
    """A directory on a disk that may not be written to is a wrong request: exit code 2, nothing is begun."""
    (disk / "run").mkdir()
    assert _mount("-o", "remount,ro", disk)
    for out, what in ((disk / "run", "/model.json: cannot be written"), (disk / "other", ": cannot be made")):
        ended = ends(*FIT, "--out", out)
        assert ended.code == 2, ended.said
        assert last_line(ended).startswith(f"lehr: {out}{what}: Read-only file system")
        assert not to_go_on(ended)


def test_permission_that_is_lost(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A run that may no longer write into its directory trains to its end, puts its weights elsewhere, and exits
    with 1; with the permission back, it goes on."""
    out = tmp_path / "run"
    ended = ends(*FIT, "--out", out, at={2: partial(breaking.lose_permission, out)})
    for folder in (out, out / "checkpoints"):
        folder.chmod(0o755)
    assert ended.code == 1, ended.said
    is_plain(ended)
    assert "Permission denied" in last_line(ended)
    assert are_best(elsewhere(ended), whole)
    goes_on(out, whole)


def test_a_directory_that_is_removed(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A run whose directory is removed trains to its end, puts its weights elsewhere, and exits with 1; nothing is
    made where it was."""
    out = tmp_path / "run"
    ended = ends(*FIT, "--out", out, at={2: partial(breaking.remove, out)})
    assert ended.code == 1, ended.said
    is_plain(ended)
    assert "No such file or directory" in last_line(ended)
    assert not to_go_on(ended)
    assert are_best(elsewhere(ended), whole)
    assert not out.exists()


def test_checkpoints_that_are_removed(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Checkpoints that are removed while the run goes on are made anew, and all is there in the end."""
    out = tmp_path / "run"
    ended = ends(*FIT, "--out", out, at={6: partial(breaking.remove, out / "checkpoints")})
    assert ended.code == 0, ended.said
    assert came_to(out) == whole
    assert "this run has ended already" in goes_on(out).said


def test_a_device_that_takes_nothing(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Where the device does not confirm what is written, no checkpoint counts as written, and the exit code is 1."""
    out = tmp_path / "run"
    ended = ends(*FIT, "--out", out, at={2: breaking.failing_flushes})
    assert ended.code == 1, ended.said
    is_plain(ended)
    assert "Input/output error" in last_line(ended)
    assert [e.step for e in told(out) if isinstance(e, CheckpointWritten)] == [0]
    assert "nor could the weights be written elsewhere" in last_line(ended)
    goes_on(out, whole)


# --- the files ---

Break = Callable[[Path], object]


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    """One bit of it, in the middle; a hard link to the file keeps what it was."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink()


DAMAGE = [truncated, flipped, missing]


def checkpoint_files(run: Path, kind: str) -> list[Path]:
    return sorted((run / "checkpoints").glob(f"0*{kind}"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(damage: Break, run: Path, whole: dict[str, Any]) -> None:
    """A checkpoint that misses a byte is named and passed over for the one before; the result is the same."""
    last = checkpoint_files(run, "safetensors")[-1]
    damage(last)
    ended = goes_on(run, whole)
    assert f"passed over checkpoints/{last.stem}: {last.name} " in ended.said
    assert "resumed at step 4 of 8" in ended.said


def test_a_damaged_state_of_a_checkpoint(run: Path, whole: dict[str, Any]) -> None:
    """The same goes for its JSON."""
    last = checkpoint_files(run, "json")[-1]
    flipped(last)
    assert f"passed over checkpoints/{last.stem}: " in goes_on(run, whole).said


def test_no_good_checkpoint(run: Path) -> None:
    """Where no checkpoint is good the run is refused with 2: each is named, nothing is changed, and it is not said to
    go on."""
    for path in checkpoint_files(run, "safetensors"):
        truncated(path)
    before = small_run.content(run)
    ended = ends("resume", run)
    assert ended.code == 2
    is_plain(ended)
    assert all(path.name in last_line(ended) for path in checkpoint_files(run, "safetensors"))
    assert not to_go_on(ended)
    assert small_run.content(run) == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_best_weights_of_a_checkpoint(damage: Break, run: Path, whole: dict[str, Any]) -> None:
    """Best weights that a checkpoint needs are taken from best.safetensors, where that has them still."""
    best = run / "checkpoints" / "best-0.safetensors"
    content = best.read_bytes()
    (run / "best.safetensors").unlink()  # else one file under two names
    (run / "best.safetensors").write_bytes(content)
    damage(best)
    goes_on(run, whole)


def test_best_weights_that_are_lost(run: Path) -> None:
    """Where they are in neither place, the run is refused with 2 and the file is named."""
    for path in run.rglob("best*.safetensors"):
        path.unlink()
    ended = ends("resume", run)
    assert ended.code == 2
    assert "best-0.safetensors is missing" in last_line(ended)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("plan.json", missing), ("plan.json", truncated), ("environment.json", missing), ("plan.png", truncated),
        ("best.safetensors", missing),
    ],
)  # fmt: skip
def test_a_file_that_is_not_needed(damage: Break, name: str, run: Path, whole: dict[str, Any]) -> None:
    """A run goes on without what it can make again, and makes it."""
    damage(run / name)
    goes_on(run, whole)
    if name == "plan.json":
        lehr.Plan.load(run / name)


@pytest.mark.parametrize("name", ["model.json", "data.json", "recipe.toml"])
@pytest.mark.parametrize("damage", [truncated, missing])
def test_a_file_that_is_needed(damage: Break, name: str, run: Path) -> None:
    """Where one of the files that say what the run is, is damaged or missing, the resume is refused with 2, names it,
    and changes nothing."""
    damage(run / name)
    before = small_run.content(run)
    ended = ends("resume", run)
    assert ended.code == 2, ended.said
    is_plain(ended)
    assert name in last_line(ended)
    if damage is missing:
        assert f"{name} is missing; put it back" in last_line(ended)
    assert not to_go_on(ended)
    assert small_run.content(run) == before


@pytest.mark.parametrize("damage", [truncated, missing, flipped])
def test_a_damaged_journal(damage: Break, run: Path, whole: dict[str, Any]) -> None:
    """A journal that is damaged or gone does not keep a run from going on; the result is the same, and what the
    journal can still tell, it tells."""
    damage(run / "journal.jsonl")
    goes_on(run)
    found, expected = came_to_without_journal(run), dict(whole)
    del expected["epochs"], expected["losses"]
    assert found == expected
    records = read_journal(run / "journal.jsonl", damaged="note")
    assert any(isinstance(record.event, Resumed) for record in records)


def came_to_without_journal(out: Path) -> dict[str, Any]:
    found = CheckpointFolder(out / "checkpoints").newest()
    assert found is not None
    tensors = {name: small_run.bits(t) for name, t in found.snapshot.tensors.items()}
    best = {name: small_run.bits(t) for name, t in load_file(out / "best.safetensors").items()}
    return {"tensors": tensors, "best": best}


@pytest.mark.parametrize(("pattern", "key"), [("checkpoints/0*.json", "format"), ("data.json", "version")])
def test_a_newer_format(pattern: str, key: str, run: Path) -> None:
    """What a newer lehr has written is not guessed at: refused with 2, and it is said which lehr to use."""
    for path in run.glob(pattern):
        plain = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({**plain, key: 99}), encoding="utf-8")
    ended = ends("resume", run)
    assert ended.code == 2, ended.said
    assert "99" in last_line(ended)
    assert "use the lehr that" in last_line(ended)


# --- the data ---


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of ten small images."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("green", "red")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 50, (32, 32, 3), np.uint8)
            pixels[..., 1 - label] += 200
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


ON_IMAGES = (
    "--model", "mobilenetv3_small_050", "--no-pretrained", "--size", "32", "--device", "cpu", "--set", "batch_size=4",
    "--set", "stages.0.length=2 epochs",
)  # fmt: skip


@pytest.mark.parametrize(("how", "workers"), [("overwritten", 1), ("deleted", 0)])
def test_an_image_that_turns_bad(how: str, workers: int, images: Path, tmp_path: Path) -> None:
    """An image that is overwritten or deleted while the run goes on, and whose pixels are not kept, ends it with 1: step
    and file are named, the run is saved as of its last whole step, and with the image back it goes on."""
    path = images / "red" / "3.png"
    content = path.read_bytes()
    fault = (
        partial(breaking.overwrite, path, b"no image")
        if how == "overwritten"
        else partial(breaking.remove, path)
    )
    out = tmp_path / "run"
    ended = ends(
        "fit",
        images,
        *ON_IMAGES,
        "--workers",
        workers,
        "--out",
        out,
        first=breaking.keep_no_pixels,
        at={0: fault},
    )
    assert ended.code == 1, ended.said
    is_plain(ended)
    said = re.search(r"\nlehr: step (\d+): (.*)", ended.said)
    assert said
    assert "red/3.png" in said[2]
    state = CheckpointFolder(out / "checkpoints").newest_state()
    assert state is not None
    assert state.at.step == int(said[1])
    assert to_go_on(ended)
    path.write_bytes(content)
    assert "done" in goes_on(out).said


def test_an_image_that_turns_bad_when_its_pixels_are_kept(images: Path, tmp_path: Path) -> None:
    """An image that is deleted after it was decoded, and kept, disturbs no run."""
    fault = partial(breaking.remove, images / "red" / "3.png")
    ended = ends("fit", images, *ON_IMAGES, "--workers", 0, "--out", tmp_path / "run", at={0: fault})
    assert ended.code == 0, ended.said
    assert "done" in ended.said


class Samples(TensorDataset):
    """Twenty samples; with `fault`, getting the one of index 13 does that first."""

    fault: Fault | None = None

    def __getitem__(self, index: int) -> Any:
        if index == 13 and self.fault:
            self.fault()
        return super().__getitem__(index)


def samples(fault: Fault | None = None) -> Samples:
    made = Samples(*small_run.data().tensors)
    made.fault = fault
    return made


def raising(error: BaseException) -> None:
    raise error


def small_fit(out: Path, *, model: nn.Module | None = None, **said: Any) -> lehr.Result:
    """Twelve steps in two stages of two epochs."""
    usual = {
        "train": small_run.data(), "valid": small_run.data(9, seed=5), "recipe": small_run.recipe(),
        "device": "cpu", "precision": "fp32", "checkpoint": {"every": "1000 steps", "keep": 9},
    }  # fmt: skip
    return lehr.fit(small_run.net() if model is None else model, **{**usual, **said}, out=out)


FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@FORKS
@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_raises(workers: int, tmp_path: Path) -> None:
    """An error of a person's data set is told with the step, in the words of its last line; the run is saved, and
    goes on when the data set does."""
    out = tmp_path / "run"
    fault = partial(raising, OSError("the share is not mounted"))
    with pytest.raises(FeedError, match=r"^step \d+: the share is not mounted$") as failed:
        small_fit(out, train=samples(fault), workers=workers)
    state = CheckpointFolder(out / "checkpoints").newest_state()
    assert state is not None
    assert str(failed.value).startswith(f"step {state.at.step}: ")
    resumed = small_fit(out, train=samples(), resume=True)
    assert small_run.came_to(resumed) == small_run.came_to(small_fit(tmp_path / "whole", train=samples()))


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_loader_whose_first_sample_of_an_epoch_fails(epoch: int, tmp_path: Path) -> None:
    """What a person's loader drew at random before a sample failed is drawn again: the same order, the same bits."""
    drawn: list[int] = []

    class Failing(Samples):
        def __getitem__(self, index: int) -> Any:
            drawn.append(index)
            if self.fault and len(drawn) == epoch * len(self) + 1:
                self.fault()
            return super(Samples, self).__getitem__(index)

    def trained(out: str, fault: Fault | None = None, **said: Any) -> Any:
        data = Failing(*small_run.data().tensors)
        data.fault = fault
        begun: Any = lambda event: drawn.clear() if isinstance(event, StageStarted) else None  # noqa: E731
        loader = DataLoader(data, batch_size=8, shuffle=True)
        return small_run.came_to(small_fit(tmp_path / out, train=loader, observers=[begun], **said))

    with pytest.raises(FeedError):
        trained("run", partial(raising, OSError("gone")))
    state = CheckpointFolder(tmp_path / "run" / "checkpoints").newest_state()
    assert state is not None
    assert state.at.epoch == epoch
    assert trained("run", resume=True) == trained("whole")


@FORKS
def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """A worker that the system kills ends the run with the step and with what to do; the run goes on without
    workers to the same bits."""
    out = tmp_path / "run"
    fault = partial(breaking.press_in_a_worker, os.getpid(), signal.SIGKILL)
    with pytest.raises(
        RunError, match=r"^step \d+: .*a process that loads samples died.*fewer workers, or none"
    ):
        small_fit(out, train=samples(fault), workers=1)
    resumed = small_fit(out, train=samples(), resume=True)
    assert small_run.came_to(resumed) == small_run.came_to(small_fit(tmp_path / "whole", train=samples()))


class Fewer(DataLoader[Any]):
    """A loader that gives fewer batches than it says."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        next(batches)
        return batches


def test_a_loader_that_runs_short(tmp_path: Path) -> None:
    """A loader that gives fewer batches than it says ends the run at the end of the epoch, with both numbers."""
    with pytest.raises(RunError, match="gave batches for 2 steps, not the 3 planned"):
        small_fit(tmp_path / "run", train=Fewer(small_run.data(24), batch_size=8))
    assert isinstance(told(tmp_path / "run")[-1], RunFailed)


def test_data_that_were_changed(images: Path, tmp_path: Path) -> None:
    """An image that has another content when the run is to go on is named; the resume is refused with 2."""
    out = tmp_path / "run"
    begun = ends(
        "fit", images, *ON_IMAGES, "--workers", 0, "--out", out,
        at={1: partial(breaking.press, signal.SIGINT)},
    )  # fmt: skip
    assert begun.code == 130
    path = images / "red" / "3.png"
    shutil.copy(images / "green" / "3.png", path)
    ended = ends("resume", out)
    assert ended.code == 2, ended.said
    assert "red/3.png" in last_line(ended)
    assert not to_go_on(ended)


# --- the numbers ---


def losing(at: int, value: float | Fault, *, training: bool = True) -> Callable[[nn.Module, Any], Any]:
    """The built-in loss, which in its call `at`, from 0, is `value`, or does that."""
    usual, calls = cross_entropy(), iter(range(10**6))

    def loss(model: nn.Module, batch: Any) -> Any:
        found = usual(model, batch)
        if model.training == training and next(calls) == at:
            if callable(value):
                value()
            else:
                found["loss"] = found["loss"] * value
        return found

    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_loss_that_is_not_finite(value: float, tmp_path: Path) -> None:
    """A loss that is NaN or infinite ends the run with its step, the rates and what to try; the best weights so far
    and the last checkpoint stay, and the run can go on at a lower rate."""
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=rf"^the loss is {value} at step 7 \(stage 2.*try a lower lr"):
        small_fit(out, loss=losing(7, value))
    assert isinstance(told(out)[-1], RunFailed)
    assert all(bool(t.isfinite().all()) for t in load_file(out / "best.safetensors").values())
    resumed = small_fit(out, resume="changed", recipe=small_run.recipe(lr=0.001))
    assert len(resumed.history) == 4


def test_a_validation_loss_that_is_not_finite(tmp_path: Path) -> None:
    """A validation loss that is NaN ends the run, too; no such epoch is ever the best."""
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"^the validation loss is not finite at step 5"):
        small_fit(out, loss=losing(1, float("nan"), training=False))
    resumed = small_fit(out, resume=True)
    assert small_run.came_to(resumed) == small_run.came_to(small_fit(tmp_path / "whole"))


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """Weights that become NaN in the last step, which no loss shows any more, are no success."""
    out = tmp_path / "run"

    def spoil(event: Any) -> None:
        if isinstance(event, EpochEnded) and event.step == small_run.STEPS:
            with torch.no_grad():
                model.fc.bias.fill_(float("nan"))

    model: Any = small_run.net()
    stages = [lehr.Stage("4 epochs", train="all", lr=0.02)]
    with pytest.raises(NonFiniteError, match=r"^the weights are not finite at step 11"):
        small_fit(out, model=model, observers=[spoil], recipe=lehr.Recipe(stages, batch_size=8))
    assert all(bool(t.isfinite().all()) for t in load_file(out / "best.safetensors").values())


def test_a_metric_that_is_not_a_number(tmp_path: Path) -> None:
    """A metric that is NaN is written down as it is, and its epoch is best only where none is better."""

    class Strange(MeanMetric):
        def update(self, *_: torch.Tensor) -> None:
            super().update(float(len(small_run_history)))

        def compute(self) -> torch.Tensor:
            small_run_history.append(1)
            return torch.tensor(float("nan") if len(small_run_history) == 2 else 0.5)

    small_run_history: list[int] = []
    result = small_fit(
        tmp_path / "run", metrics={"odd": Strange(nan_strategy="ignore")},
        recipe=small_run.recipe(monitor="valid_odd"),
    )  # fmt: skip
    assert result is not None
    assert math.isnan(result.history[1]["valid_odd"])
    assert [row["best"] for row in result.history] == [True, False, False, False]


def test_memory_that_runs_out(tmp_path: Path) -> None:
    """Where memory runs out, the step is named, and the batch size that would have fitted; the run goes on with that."""
    out = tmp_path / "run"
    usual, updates = cross_entropy(), iter(range(10**6))

    def loss(model: nn.Module, batch: Any) -> Any:
        if model.training and len(batch[0]) == 8 and next(updates) >= 4:  # from the second epoch on
            raise torch.OutOfMemoryError("out of memory: tried to allocate 20 MiB")
        return usual(model, batch)

    said = {"loss": loss, "train": small_run.data(24)}
    with pytest.raises(
        RunError, match=r"^step 4: out of memory with batches of 8 .* 4 would have fitted"
    ) as failed:
        small_fit(out, checkpoint="1 steps", **said)
    assert "batch_size = 4 with accumulate = 2" in str(failed.value)
    smaller = small_run.recipe(batch_size=4, accumulate=2)
    assert len(small_fit(out, resume="changed", recipe=smaller, **said).history) == 4


class Restless(nn.Module):
    """A frozen part that counts its calls in a buffer, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)
        self.body.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.body.calls += 1
        return self.fc(self.body(x))


def test_a_frozen_buffer_that_changes(tmp_path: Path) -> None:
    """A model that writes to a buffer which is frozen is found out at the end of the stage, by name."""
    with pytest.raises(RunError, match=r"what was frozen has changed: .*body\.calls"):
        small_fit(tmp_path / "run", model=Restless())
    assert isinstance(told(tmp_path / "run")[-1], RunFailed)


# --- the person's own code ---


def test_an_observer_that_raises(tmp_path: Path) -> None:
    """An observer that raises is left out with a warning; the run is the same."""
    observers = [partial(lambda _: raising(ValueError("boo")))]
    with pytest.warns(RuntimeWarning, match="raised ValueError.* and is left out from here on"):
        result = small_fit(tmp_path / "run", observers=observers)
    assert small_run.came_to(result) == small_run.came_to(small_fit(tmp_path / "whole"))


@pytest.mark.parametrize(
    "error",
    [ValueError("boo"), RecursionError("maximum recursion depth exceeded")],
    ids=["error", "recursion"],
)
def test_a_loss_that_raises(error: Exception, tmp_path: Path) -> None:
    """An error of a person's own loss comes as it is; the journal says after how many steps, and the run goes on from
    the last checkpoint."""
    out = tmp_path / "run"
    with pytest.raises(type(error), match=str(error)):
        small_fit(out, loss=losing(7, partial(raising, error)))
    last = told(out)[-1]
    assert isinstance(last, RunFailed)
    assert (last.step, last.error) == (7, f"{type(error).__name__}: {error}")
    resumed = small_fit(out, resume=True)
    assert small_run.came_to(resumed) == small_run.came_to(small_fit(tmp_path / "whole"))


def test_a_loss_that_interrupts(tmp_path: Path) -> None:
    """A KeyboardInterrupt from a person's own code leaves at once; the run goes on from the last checkpoint."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        small_fit(out, loss=losing(7, partial(raising, KeyboardInterrupt())))
    assert told(out)[-1] == Interrupted(7)
    resumed = small_fit(out, resume=True)
    assert small_run.came_to(resumed) == small_run.came_to(small_fit(tmp_path / "whole"))


def test_a_metric_that_raises(tmp_path: Path) -> None:
    """A metric that fails ends the run with its own error; what was trained up to then is kept."""
    out = tmp_path / "run"

    class Failing(MeanMetric):
        def update(self, *_: torch.Tensor) -> None:
            raise ValueError("expected targets of another shape")

    with pytest.raises(ValueError, match="expected targets of another shape"):
        small_fit(out, metrics={"odd": Failing()}, checkpoint="1 steps")
    state = CheckpointFolder(out / "checkpoints").newest_state()
    assert state is not None
    assert state.at.step == 3


# --- the machine ---


@pytest.mark.parametrize("jump", [3600.0 * 9, -3600.0 * 9], ids=["forward", "backward"])
def test_a_clock_that_jumps(jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine slept, or its clock was set back, the run is the same, and only its times tell of it; after a
    sleep it is saved at once."""
    ticks = iter(range(10**6))
    jumping: Callable[[], float] = lambda: 1.7e9 + (tick := next(ticks)) + (jump if tick > 20 else 0.0)  # noqa: E731
    monkeypatch.setattr(loop, "Journal", partial(Journal, clock=jumping))
    if jump > 0:  # a clock that only goes forward does not go back
        monkeypatch.setattr(loop, "Saver", partial(Saver, clock=jumping))
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        small_fit(out, loss=losing(6, partial(breaking.press, signal.SIGINT)), checkpoint="5 hours")
    monkeypatch.undo()
    resumed = small_fit(out, resume=True)
    assert small_run.came_to(resumed) == small_run.came_to(small_fit(tmp_path / "whole"))
    times = [record.time for record in read_journal(out / "journal.jsonl")]
    assert (max(times) - min(times)) > 3600


def test_two_processes(tmp_path: Path) -> None:
    """A second process in the directory of a run that is under way is refused with 2, and not told to resume it; the
    first one does not notice."""
    out = tmp_path / "run"
    second: list[Ended] = []

    def loss(model: nn.Module, batch: Any) -> Any:
        if model.training and not second:
            second.append(ends(*FIT, "--out", out))
            second.append(ends("resume", out))
        return usual(model, batch)

    usual = cross_entropy()
    result = small_fit(out, loss=loss)
    assert [ended.code for ended in second] == [2, 2]
    assert not any(to_go_on(ended) for ended in second)
    assert small_run.came_to(result) == small_run.came_to(small_fit(tmp_path / "whole"))


# --- the request ---


def test_another_recipe(run: Path) -> None:
    """A recipe that was changed by hand is refused with 2; what differs is shown, and how to ask for it."""
    recipe = (run / "recipe.toml").read_text("utf-8")
    (run / "recipe.toml").write_text(re.sub(r"weight_decay = \S+", "weight_decay = 0.5", recipe))
    ended = ends("resume", run)
    assert ended.code == 2, ended.said
    is_plain(ended)
    assert "this is not the run that was begun there" in ended.said
    assert "weight" in ended.said
    assert not to_go_on(ended)


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    """What is no run, or was never saved, is refused with 2 and left alone."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        ended = ends("resume", tmp_path / name)
        assert ended.code == 2
        is_plain(ended)
    assert not list((tmp_path / "empty").iterdir())


def test_a_run_that_has_ended(run: Path) -> None:
    """A run that has ended is not trained again."""
    goes_on(run)
    before = small_run.content(run)
    ended = goes_on(run)
    assert "this run has ended already, and nothing is trained again" in ended.said
    assert small_run.content(run) == before


# --- the table ---


def test_the_table_is_of_tests_that_there_are() -> None:
    """docs/faults.md has 30 rows or more, and each names tests that exist."""
    page = (ROOT / "docs" / "faults.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| fault ")]
    assert len(rows) >= 30
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))]
        assert len(cells) == 3, row
        assert all(cells), row
        named = re.findall(r"`tests/(\w+\.py)::(\w+)`", cells[2])
        assert named, row
        for file, test in named:
            assert test in _tests_in(ROOT / "tests" / file), f"{file}::{test}"


def _tests_in(path: Path) -> set[str]:
    nodes = ast.parse(path.read_text("utf-8")).body
    return {
        node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
