"""A run's directory."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

from lehr.errors import RequestError
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage, load_recipe
from lehr.resolving import resolve
from lehr.run.folder import RunFolder, environment
from lehr.run.precision import arithmetic
from lehr.run.weights import read_weights
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


def test_weights_are_kept_under_one_name(tmp_path: Path) -> None:
    """The weights to keep are in best.safetensors, readable by all."""
    folder = RunFolder.create(tmp_path)
    folder.save_weights({"a": torch.ones(3)})
    assert torch.equal(read_weights(folder.weights)["a"], torch.ones(3))
    assert folder.weights.name == "best.safetensors"
    assert folder.weights.stat().st_mode & 0o044 == 0o044


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    """A directory with a journal is never written into; one without is taken as it is."""
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    folder = RunFolder.create(tmp_path)
    folder.journal.touch()
    with pytest.raises(RequestError, match="holds a run already, and nothing is overwritten"):
        RunFolder.create(tmp_path)


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
