"""Every operation on the files of a run can go wrong: the process dies there, or the system refuses.

A seeded choice runs here, death with all kinds of operations; `scripts/kill.py --injection` does every single one.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from injecting import Whole, died, kinds, refused, whole
from killing import warm_up
from nursery import Nursery, nursery

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are copied")
_ERRORS = ("ENOSPC", "EIO", "EACCES")
_KINDS = {"chmod", "fsync", "hardlink_to", "mkdir", "open", "replace", "save_file", "unlink", "write"}


@pytest.fixture(scope="module")
def place() -> Nursery:
    return nursery(warm_up)


@pytest.fixture(scope="module")
def reference(place: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole(place, tmp_path_factory.mktemp("whole"))


def test_the_operations_are_seen(reference: Whole) -> None:
    """What a run does with its files is counted: each kind of operation, for checkpoints, best weights and journal."""
    names = [operation.split() for operation in reference.operations]
    assert {name for name, _ in names} == _KINDS
    replaced = [file for name, file in names if name == "replace"]
    steps = [
        int(file.split("-")[2].removesuffix(".json"))
        for file in replaced
        if "-step-" in file and "json" in file
    ]
    assert steps == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]  # at first, after each step, at each stage's end
    assert {"journal.jsonl", "best.safetensors", "checkpoints/best-0.safetensors"} <= {
        file for _, file in names
    }


def test_death_at_any_operation(place: Nursery, reference: Whole, tmp_path: Path) -> None:
    """Wherever a process dies between two operations on files, or within one, the resumed run has the same bits."""
    faults = kinds(reference.faults(), random.Random(0))
    wrong = {str(f): said for f in faults if (said := died(place, tmp_path, f, reference))}
    assert not wrong


def test_an_error_at_any_operation(place: Nursery, reference: Whole, tmp_path: Path) -> None:
    """Whatever the system refuses once, training goes on to the same bits, and says so; or it never began."""
    draw = random.Random(1)
    faults = draw.sample(kinds(reference.faults(*_ERRORS), draw), 16)
    wrong = {str(f): said for f in faults if (said := refused(place, tmp_path, f, reference))}
    assert not wrong


def test_errors_from_any_operation_on(place: Nursery, reference: Whole, tmp_path: Path) -> None:
    """Where the system refuses all from some moment on, training goes on to its end, the weights are left
    elsewhere, and when the system is well again the run has the same bits.
    """
    draw = random.Random(2)
    faults = draw.sample(kinds(reference.faults(*_ERRORS, lasting=True), draw), 16)
    wrong = {str(f): said for f in faults if (said := refused(place, tmp_path, f, reference))}
    assert not wrong
