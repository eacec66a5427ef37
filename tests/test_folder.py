"""A run's directory."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from lehr.errors import RequestError
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.recipe_file import load_recipe
from lehr.resolving import resolve
from lehr.run.folder import RunFolder, environment, opened
from lehr.run.precision import arithmetic
from lehr.selection import ModelFacts, ParameterFacts

FACTS = ModelFacts("net", (ParameterFacts("fc.weight", (2, 4)),))
RECIPE = Recipe([Stage("2 epochs", train="all", lr=1e-2)], seed=3)


def test_what_is_known_before_the_first_batch_reads_back(tmp_path: Path) -> None:
    """recipe.toml and plan.json come back as equal values; nothing half written is left."""
    plan = resolve(RECIPE, FACTS, samples=64)
    folder = RunFolder.create(tmp_path / "deep" / "run")
    folder.describe(RECIPE, plan, arithmetic("cpu"))
    assert load_recipe(folder.path / "recipe.toml") == RECIPE
    assert Plan.load(folder.path / "plan.json").hash == plan.hash
    said = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    assert (said["device"], said["precision"]) == ("cpu", "fp32")
    assert said["versions"]["torch"] == metadata.version("torch")
    assert sorted(p.name for p in folder.path.iterdir()) == ["environment.json", "plan.json", "recipe.toml"]


def test_the_environment_names_no_one() -> None:
    """Where a run happened is versions and hardware: no user, host or path."""
    text = json.dumps(environment(arithmetic("cpu")))
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    """A directory with a journal is never written into; one without is taken as it is."""
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    folder = RunFolder.create(tmp_path)
    folder.journal.touch()
    with pytest.raises(RequestError, match="holds a run already, and nothing is overwritten"):
        RunFolder.create(tmp_path)
    with pytest.raises(RequestError, match=rf"go on with it \(lehr resume {tmp_path}; in Python resume="):
        RunFolder.create(tmp_path)
    assert RunFolder.create(tmp_path, resume=True) == folder


@pytest.mark.parametrize(
    "name", ["recipe.toml", "plan.json", "environment.json", "checkpoints", "best.safetensors"]
)
def test_a_directory_with_a_part_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    """Whatever a run writes is never written over, also where the rest of the run is missing."""
    (tmp_path / name).mkdir()
    with pytest.raises(RequestError, match=rf"holds {name} already, and nothing is overwritten"):
        RunFolder.create(tmp_path)


def test_an_open_directory_is_locked(tmp_path: Path) -> None:
    """While a run is in its directory no other one gets in, for a new run or an old one; afterwards one does."""
    with opened(tmp_path / "run", resume=False) as folder:
        assert folder.lock.is_file()
        for resume in (False, True):
            with (
                pytest.raises(RequestError, match="trains in this directory now"),
                opened(folder.path, resume=resume),
            ):
                pass
    with opened(tmp_path / "run", resume=False) as again:
        assert again == folder


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A file in the way is an error that names it and says what to do."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RequestError, match=r"cannot be made: .*; choose another directory"):
            RunFolder.create(path)


def test_names_that_are_no_unicode_are_written_too(tmp_path: Path) -> None:
    """A file name in an old encoding, which Python holds as surrogates, goes into JSON and comes back."""
    names = {"café": "b\udcff.jpg"}
    RunFolder.create(tmp_path).write_json("data.json", names)
    RunFolder.create(tmp_path).write_json("plain.json", {"café": 1})
    assert json.loads((tmp_path / "data.json").read_text(encoding="utf-8")) == names
    assert "café" in (tmp_path / "plain.json").read_text(encoding="utf-8")


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where writing fails, the old text stays and nothing half is left."""
    folder = RunFolder.create(tmp_path)
    folder.write_text("a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        folder.write_text("a.txt", "new \udcff")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
