"""The folder of checkpoints: which one is taken, what is passed over, what is removed and what stays."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lehr.run import checkpoint as checkpoints
from lehr.run.checkpoint import CheckpointFolder, Snapshot
from lehr.run.state import BestSoFar, DamageError, Kept, Position, SoFar, State, loads
from test_state import WHOLE

Break = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """The folder of checkpoints of a run, with three in it, of steps 10, 20 and 30; epoch 0 is the best."""
    made = CheckpointFolder(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        made.write(snapshot(step))
    return made


def state(step: int, *best: int) -> State:
    """A state after `step` steps, ten an epoch, that knows of the best epochs."""
    rows = tuple(
        {"epoch": e, "stage": 0, "step": 10 * (e + 1), "train_loss": 1.0, "best": e == 0}
        for e in range(step // 10)
    )
    kept = tuple(Kept(epoch, 1.0) for epoch in best)
    known = BestSoFar(kept[0], kept[0], kept, best[0]) if best else BestSoFar()
    at = Position(0, step // 10, step)
    so_far = SoFar(samples=step % 10)
    return replace(WHOLE, at=at, history=rows, best=known, so_far=so_far, instead_of=None, files={})


def snapshot(step: int, *best: int) -> Snapshot:
    best = best or (0,)
    return Snapshot(
        state(step, *best), {"model/w": torch.full((4,), float(step))}, {e: {"w": torch.full((2,), float(e))} for e in best}
    )  # fmt: skip


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir())


def fresh(folder: CheckpointFolder) -> CheckpointFolder:
    """As another process sees it."""
    return CheckpointFolder(folder.path)


def step_of(folder: CheckpointFolder) -> tuple[int, tuple[str, ...]]:
    found = fresh(folder).newest()
    assert found is not None
    assert found.snapshot.tensors["model/w"][0] == found.snapshot.state.at.step
    return found.snapshot.state.at.step, found.passed_over


def test_the_newest_is_taken(folder: CheckpointFolder) -> None:
    """The last one that was written comes back whole: its state, its tensors, its best weights."""
    found = fresh(folder).newest()
    assert found is not None
    assert found.name == "checkpoints/0003-step-30"
    assert not found.passed_over
    assert replace(found.snapshot.state, files={}) == state(30, 0)
    assert {n: t.tolist() for n, t in found.snapshot.tensors.items()} == {"model/w": [30.0] * 4}
    assert {e: w["w"].tolist() for e, w in found.snapshot.best.items()} == {0: [0.0, 0.0]}


def test_newest_means_last_written(folder: CheckpointFolder) -> None:
    """What counts is the number, not the step: a run that was taken back goes on from where it was taken to."""
    folder.write(snapshot(20))
    assert names(folder)[-3:] == ["0004-step-20.json", "0004-step-20.safetensors", "best-0.safetensors"]
    assert step_of(folder) == (20, ())


@pytest.mark.parametrize(
    "there", ["nothing", "an empty folder", "foreign files", "half a checkpoint", "a file"]
)
def test_without_a_checkpoint_there_is_none(there: str, tmp_path: Path) -> None:
    """What is no checkpoint is none, whatever else there is."""
    path = tmp_path / "checkpoints"
    if there == "a file":
        path.write_text("x")
    elif there != "nothing":
        path.mkdir()
    if there == "foreign files":
        for name in (
            "last.ckpt",
            "1-step-2.json",
            "0001-step--2.json",
            "٠٠٠١-step-1.json",
            "x0001-step-2.json",
        ):
            (path / name).write_text("{}")
    if there == "half a checkpoint":
        (path / "0001-step-0.safetensors").write_bytes(b"x" * 9)
        (path / ".0001-step-0.json.part").write_bytes(b"{")
    assert CheckpointFolder(path).newest() is None
    assert CheckpointFolder(path).newest_state() is None
    CheckpointFolder(path).prune(1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGE: list[tuple[str, Break, str]] = [
    ("0003-step-30.json", cut, "not have the hash|not JSON|is no"),
    ("0003-step-30.json", lambda p: p.write_bytes(b""), "not JSON"),
    ("0003-step-30.json", lambda p: p.write_bytes(b"[]"), "holds a list"),
    ("0003-step-30.json", lambda p: p.write_bytes(b"\0" * 999), "not JSON"),
    ("0003-step-30.json", directory, "cannot be read"),
    ("0003-step-30.json", pipe, "cannot be read"),
    ("0003-step-30.json", loop, "cannot be read"),
    ("0003-step-30.safetensors", cut, "bytes, not"),
    ("0003-step-30.safetensors", flip, "0003-step-30.safetensors was changed"),
    ("0003-step-30.safetensors", Path.unlink, "0003-step-30.safetensors is missing"),
    ("0003-step-30.safetensors", directory, "is missing"),
    ("0003-step-30.safetensors", pipe, "is missing"),
    ("0003-step-30.safetensors", loop, "is missing"),
    ("best-2.safetensors", cut, "best-2.safetensors has"),
    ("best-2.safetensors", flip, "best-2.safetensors was changed"),
    ("best-2.safetensors", Path.unlink, "best-2.safetensors is missing"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE)
def test_a_damaged_one_is_passed_over(name: str, damage: Break, words: str, folder: CheckpointFolder) -> None:
    """Of a checkpoint that misses a file or a byte, it is said what is wrong, and the one before is taken."""
    shutil.rmtree(folder.path)
    folder = CheckpointFolder(folder.path)
    for step, best in ((10, 0), (20, 0), (30, 2)):
        folder.write(snapshot(step, best))
    damage(folder.path / name)
    if damage is cut and name.endswith(".json"):  # the last byte is a line feed, which says nothing
        cut(folder.path / name)
    step, (said,) = step_of(folder)
    assert step == 20
    assert said.startswith("checkpoints/0003-step-30: ")
    assert re.search(words, said)


def test_without_its_json_a_checkpoint_is_none(folder: CheckpointFolder) -> None:
    """The JSON makes a checkpoint: without it there is nothing to pass over."""
    (folder.path / "0003-step-30.json").unlink()
    assert step_of(folder) == (20, ())


def test_none_good_names_each(folder: CheckpointFolder) -> None:
    """Where no checkpoint is good, it is said of each what is wrong with it."""
    for number, damage in (("0001-step-10", cut), ("0002-step-20", flip), ("0003-step-30", Path.unlink)):
        damage(folder.path / f"{number}.safetensors")
    with pytest.raises(DamageError) as caught:
        fresh(folder).newest()
    assert [part.split(":")[0] for part in str(caught.value).split("; ")] == [
        "checkpoints/0003-step-30", "checkpoints/0002-step-20", "checkpoints/0001-step-10",
    ]  # fmt: skip
    assert fresh(folder).newest_state() == loads((folder.path / "0003-step-30.json").read_bytes())


def test_no_good_json_names_each(folder: CheckpointFolder) -> None:
    """The newest state is not found to be missing where it is damaged."""
    for path in folder.path.glob("*.json"):
        path.write_text("{}")
    with pytest.raises(DamageError, match=r"0003-step-30: .*; .*0002-step-20: .*; .*0001-step-10: "):
        fresh(folder).newest_state()


def test_one_that_does_not_fit_is_passed_over(folder: CheckpointFolder) -> None:
    """An objection is told like damage, and the one before is taken."""
    found = fresh(folder).newest(lambda state: "too late" if state.at.step > 10 else "")
    assert found is not None
    assert found.snapshot.state.at.step == 10
    assert [said.split(": ")[1] for said in found.passed_over] == ["too late", "too late"]


def test_a_folder_that_cannot_be_listed(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that the system does not let us list is damage in words, not no checkpoint."""

    def refused(_: Path) -> None:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(DamageError, match=r"checkpoints cannot be read .Permission denied"):
        folder.newest()


def test_numbers_only_grow(folder: CheckpointFolder) -> None:
    """After one was passed over, the next has a number that was never used, and nothing is written over."""
    flip(folder.path / "0003-step-30.safetensors")
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    again = fresh(folder)
    again.newest()
    again.write(snapshot(30))
    assert {n: (folder.path / n).read_bytes() for n in before} == before
    assert step_of(folder) == (30, ())
    assert "0004-step-30.json" in names(folder)


@pytest.mark.parametrize("left", ["0009-step-90.safetensors", "0009-step-90.json"])
def test_a_number_of_half_a_checkpoint_is_used(left: str, folder: CheckpointFolder) -> None:
    """The number of tensors that a kill left without their JSON is not used again, nor that of a damaged JSON."""
    (folder.path / left).write_text("x")
    fresh(folder).write(snapshot(40))
    assert "0010-step-40.json" in names(folder)
    assert step_of(folder)[0] == 40


def test_a_number_without_a_next_one_is_told(folder: CheckpointFolder) -> None:
    """Where somebody has put a name with the largest number there is, no checkpoint is written under a name that
    would not be found again: it is said what to remove.
    """
    (folder.path / f"{'9' * 18}-step-1.json").write_text("x")
    with pytest.raises(OSError, match=f"{'9' * 18}-step-1; remove it"):
        fresh(folder).write(snapshot(40))
    assert step_of(folder)[0] == 30


def test_every_number_that_is_written_is_found(folder: CheckpointFolder) -> None:
    """Four digits are no limit: what comes after 9999 is newer, though not by the alphabet."""
    (folder.path / "9999-step-31.safetensors").write_text("half a checkpoint")
    folder.write(snapshot(40))
    assert "10000-step-40.json" in names(folder)
    assert step_of(folder) == (40, ())


STRANGE = (
    "../0009-step-90.json", "0009-step-90.json/../x", "0009-step-90.json.bak", "0009-step-90.JSON", "best-.safetensors",
    "best--1.safetensors", f"{'9' * 19}-step-1.json", "0009-step-90.pt", ".0009-step-90.json",
)  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_strange_names_do_nothing(name: str, folder: CheckpointFolder) -> None:
    """A name that is none of ours is neither read, nor counted, nor removed."""
    path = folder.path / name.replace("/", "_") if "/x" in name else folder.path / name
    path.write_text("{}")
    assert step_of(folder) == (30, ())
    folder.write(snapshot(40))
    assert "0004-step-40.json" in names(folder)
    folder.prune(1)
    assert path.read_text() == "{}"


def test_no_name_is_taken_from_a_file(folder: CheckpointFolder, tmp_path: Path) -> None:
    """What the JSON calls its files leads nowhere: other names than our own are not even looked at."""
    found = fresh(folder).newest()
    assert found is not None
    files = {**found.snapshot.state.files, "../../secret": found.snapshot.state.files["tensors"]}
    (tmp_path / "secret").write_text("x")
    path = folder.path / "0003-step-30.json"
    path.write_text(checkpoints.dumps(replace(found.snapshot.state, files=files)))
    assert step_of(folder) == (30, ())
    folder.prune(1)
    assert (tmp_path / "secret").exists()


# --- removing ---


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_are_kept(keep: int, folder: CheckpointFolder) -> None:
    """As many as were asked for are kept, the newest, each with its tensors, and the best that they refer to."""
    folder.prune(keep)
    stems = ["0001-step-10", "0002-step-20", "0003-step-30"][-keep:]
    files = [f"{stem}.{kind}" for stem in stems for kind in ("json", "safetensors")]
    assert names(folder) == [*files, "best-0.safetensors"]
    assert step_of(folder) == (30, ())


def test_best_weights_stay_as_long_as_any_checkpoint_needs_them(folder: CheckpointFolder) -> None:
    """Best weights are removed with the last checkpoint that refers to them: the run's, the stage's, the few best."""
    folder.write(snapshot(40, 3, 1))
    folder.prune(2)
    assert [n for n in names(folder) if n.startswith("best")] == [f"best-{e}.safetensors" for e in (0, 1, 3)]
    folder.write(snapshot(50, 3))
    folder.prune(2)
    assert [n for n in names(folder) if n.startswith("best")] == [f"best-{e}.safetensors" for e in (1, 3)]


def test_damaged_ones_are_not_counted(folder: CheckpointFolder) -> None:
    """A JSON that cannot be read is none of those to keep: the good ones before it stay."""
    (folder.path / "0003-step-30.json").write_text("{}")
    (folder.path / f"{'9' * 18}-step-1.json").write_text("{}")
    folder.prune(1)
    assert step_of(folder)[0] == 20
    for path in folder.path.glob("0002*.json"):
        path.write_text("{}")
    before = names(folder)
    folder.prune(1)
    assert names(folder) == before


def test_what_a_kill_left_is_removed(folder: CheckpointFolder) -> None:
    """Half-written files and tensors without a JSON go, once they are older than what is kept."""
    left = (
        ".0003-step-30.json.part",
        ".best-7.safetensors.part",
        "0002-step-25.safetensors",
        "best-9.safetensors",
    )
    foreign = (".notes.part", "notes.part", "notes.txt", ".hidden")
    for name in (*left, *foreign):
        (folder.path / name).write_text("x")
    folder.prune(1)
    assert names(folder) == sorted(
        [*foreign, "0003-step-30.json", "0003-step-30.safetensors", "best-0.safetensors"]
    )


def test_what_cannot_be_removed_stays(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be removed harms nothing: the run goes on, and the newest is still found."""

    def refused(self: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    before = names(folder)
    monkeypatch.setattr(Path, "unlink", refused)
    folder.prune(1)
    assert names(folder) == before
    assert step_of(folder) == (30, ())


def test_the_json_goes_first(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of removing leaves no JSON without its tensors."""
    gone: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda self, **_: gone.append(self.name))
    folder.prune(1)
    kinds = [name.endswith(".json") for name in gone]
    assert kinds == sorted(kinds, reverse=True)
    assert sum(kinds) == 2


# --- writing ---


def test_best_weights_are_written_once(folder: CheckpointFolder) -> None:
    """What a process has written or read, it does not write again."""
    before = (folder.path / "best-0.safetensors").stat().st_ino
    folder.keep(0, {"w": torch.zeros(2)})
    again = fresh(folder)
    again.newest()
    again.write(snapshot(40))
    assert (folder.path / "best-0.safetensors").stat().st_ino == before
    (folder.path / "best-0.safetensors").unlink()
    again.write(snapshot(50))
    assert step_of(folder) == (50, ())


def test_a_failed_write_leaves_nothing(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the JSON cannot be written, its tensors go too: tries on a full disk do not fill it further."""
    before = names(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_text", full)
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            folder.write(snapshot(40))
    assert names(folder) == before
    assert step_of(folder) == (30, ())


@pytest.mark.parametrize("vanished", ["run", "checkpoints"])
def test_only_the_folder_itself_is_made(vanished: str, tmp_path: Path) -> None:
    """The folder of checkpoints is made anew where it has gone; the run's directory is not, for a disk may have
    gone with it.
    """
    run = tmp_path / "run"
    run.mkdir()
    folder = CheckpointFolder(run / "checkpoints")
    folder.write(snapshot(10))
    shutil.rmtree(run if vanished == "run" else folder.path)
    if vanished == "run":
        with pytest.raises(FileNotFoundError):
            folder.write(snapshot(20))
        assert not run.exists()
    else:
        folder.write(snapshot(20))
        assert step_of(folder) == (20, ())


def test_a_file_in_its_place_is_not_removed(tmp_path: Path) -> None:
    """Where a file has the name of the folder, nothing is written and the file stays."""
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(FileExistsError):
        CheckpointFolder(tmp_path / "checkpoints").write(snapshot(10))
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_a_folder_on_another_disk(folder: CheckpointFolder, tmp_path: Path) -> None:
    """The folder may be a symbolic link to another disk; removing never goes beyond the names in it."""
    elsewhere = tmp_path / "elsewhere"
    folder.path.rename(elsewhere)
    folder.path.symlink_to(elsewhere, target_is_directory=True)
    (tmp_path / "mine.json").write_text("{}")
    (elsewhere / "0000-step-0.json").symlink_to(tmp_path / "mine.json")
    folder.write(snapshot(40))
    folder.prune(1)
    assert step_of(folder) == (40, ())
    assert (tmp_path / "mine.json").read_text() == "{}"
    assert "0000-step-0.json" not in names(folder)


def test_the_weights_of_the_best_are_in_memory(folder: CheckpointFolder) -> None:
    """What was read of the best weights does not change with its file: a disk that goes away takes nothing along."""
    found = fresh(folder).newest()
    assert found is not None
    path = folder.path / "best-0.safetensors"
    with path.open("rb+") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert found.snapshot.best[0]["w"].tolist() == [0.0, 0.0]


def test_reading_changes_nothing(folder: CheckpointFolder) -> None:
    """To look for a checkpoint leaves every file as it was, damaged ones too."""
    flip(folder.path / "0003-step-30.safetensors")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.path.iterdir()}
    step_of(folder)
    fresh(folder).newest_state()
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.path.iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool])
def test_every_type_comes_back(dtype: torch.dtype, folder: CheckpointFolder) -> None:
    """Tensors of every type that networks have come back to the bit; also without elements or dimensions."""
    tensors = {
        "a": torch.randn(3, 2).to(dtype),
        "b": torch.zeros((), dtype=dtype),
        "c": torch.zeros(0, 4, dtype=dtype),
    }
    folder.write(replace(snapshot(40), tensors=tensors))
    found = fresh(folder).newest()
    assert found is not None
    assert all(
        torch.equal(found.snapshot.tensors[n], t) and found.snapshot.tensors[n].dtype == dtype
        for n, t in tensors.items()
    )


def test_a_type_that_files_cannot_hold_is_told(folder: CheckpointFolder) -> None:
    """A type that safetensors does not know is an error of writing, in words."""
    with pytest.raises(OSError, match=r"cannot hold torch.complex128|complex128"):
        folder.write(replace(snapshot(40), tensors={"a": torch.zeros(2, dtype=torch.complex128)}))


def test_a_checkpoint_that_was_passed_over_does_not_count(tmp_path: Path) -> None:
    """After a resume from the one before, a damaged checkpoint does not take a good one's place among those kept."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        folder.write(snapshot(step))
    damaged = tmp_path / "checkpoints" / "0003-step-30.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    again = CheckpointFolder(tmp_path / "checkpoints")
    found = again.newest()
    assert found is not None
    assert found.name.endswith("0002-step-20")
    again.trust(found.snapshot.state)
    again.write(snapshot(40))
    again.prune(2)
    assert {p.name for p in (tmp_path / "checkpoints").glob("*.json")} >= {
        "0002-step-20.json",
        "0004-step-40.json",
    }
