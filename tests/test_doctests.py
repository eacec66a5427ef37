"""The examples in docstrings work, in every module of the package; a warning is a failure as everywhere."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import lehr
import lehr.schedules

SOURCE = Path(lehr.schedules.__file__).parent


def _modules() -> list[str]:
    """Every module of the package by its dotted name, found as files so that a module nobody imports is not
    missed.
    """
    names = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("lehr", *path.relative_to(SOURCE).with_suffix("").parts)
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if name != "lehr.__main__"]


@pytest.mark.parametrize("name", _modules())
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples in a module's docstrings give what they say, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    if name == "lehr.run.tensorboard":
        pytest.importorskip("tensorboard", reason="the extra lehr[tensorboard] is not installed")
    result = doctest.testmod(import_module(name))
    assert not result.failed, f"{result.failed} of {result.attempted} examples of {name} fail (see above)"


def test_examples_are_found() -> None:
    """The public pure functions have examples, so that the test above cannot pass by finding none."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in (
        "duration",
        "schedules",
        "notation",
        "selection",
        "recipe",
        "planning",
        "resolving",
        "plan_json",
    ):
        examples = [test for test in finder.find(import_module(f"lehr.{name}")) if test.examples]
        assert examples, name


@pytest.mark.parametrize(
    "name",
    [
        "constant",
        "cosine",
        "exponential",
        "hold",
        "linear",
        "one_cycle",
        "polynomial",
        "restarts",
        "step_decay",
        "warmup",
    ],
)
def test_every_schedule_has_an_example(name: str) -> None:
    """Each public schedule shows itself in its docstring."""
    assert ">>> " in (getattr(lehr, name).__doc__ or "")
