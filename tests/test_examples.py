"""The examples: the loop by hand and `lehr.fit` do the same work, to the bit. Each runs once, as a script."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lehr.events import CheckpointWritten, EpochEnded, Event, FreezeAudited, Note, StepsTaken
from lehr.journal import read_journal

EXAMPLES = Path(__file__).parent.parent / "examples"
_CLOCKED = ("seconds", "samples_per_second")  # what depends on the machine, not on the work


@dataclass(frozen=True)
class Ran:
    """What an example left: its model and its folder."""

    model: nn.Module
    folder: Path

    @property
    def events(self) -> tuple[Event, ...]:
        return tuple(record.event for record in read_journal(self.folder / "journal.jsonl"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Both examples, each in a folder of its own, with different global random states before them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny, and the machine is shared
    try:
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
            patch.syspath_prepend(str(EXAMPLES))  # as `python examples/own_loop.py` has it
            return {name: _run(name, tmp_path_factory.mktemp(name), patch) for name in ("fit", "own_loop")}
    finally:
        sys.modules.pop("fit", None)
        torch.set_num_threads(threads)


def _run(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Ran:
    patch.setattr(sys, "argv", [f"{name}.py", str(folder)])
    torch.manual_seed(len(name))
    left: dict[str, Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return Ran(left["model"], folder)


def test_every_loss_is_equal(ran: dict[str, Ran]) -> None:
    """The loss of every step is the same float in the loop by hand as in `fit`."""
    losses = {
        name: [loss for event in one.events if isinstance(event, StepsTaken) for loss in event.losses]
        for name, one in ran.items()
    }
    assert losses["own_loop"] == losses["fit"]
    total = json.loads((ran["fit"].folder / "plan.json").read_text())["stages"][-1]["stop"]
    assert len(losses["fit"]) == len(set(losses["fit"])) == total


def test_validation_is_equal(ran: dict[str, Ran]) -> None:
    """Training loss, validation loss, accuracy and rates of every epoch are the same floats."""
    rows = {
        name: [_unclocked(event) for event in one.events if isinstance(event, EpochEnded)]
        for name, one in ran.items()
    }
    assert rows["own_loop"] == rows["fit"]
    assert rows["fit"][-1]["metrics"]["valid_accuracy"] > rows["fit"][0]["metrics"]["valid_accuracy"]


def test_journals_are_equal(ran: dict[str, Ran]) -> None:
    """The journals say the same, event by event, but for what a clock measured, and what is `fit`'s alone: the checkpoints,
    and how it computes; the plans are equal bytes."""

    def is_of_fit(event: Event) -> bool:
        how = ("memory: the C allocator", "is trained without a cache")
        return isinstance(event, CheckpointWritten) or (
            isinstance(event, Note) and any(words in event.text for words in how)
        )

    told = {name: [_unclocked(e) for e in one.events if not is_of_fit(e)] for name, one in ran.items()}
    assert told["own_loop"] == told["fit"]
    assert not any(isinstance(event, CheckpointWritten) for event in ran["own_loop"].events)
    assert any(isinstance(event, CheckpointWritten) for event in ran["fit"].events)
    audited = [event for event in ran["own_loop"].events if isinstance(event, FreezeAudited)]
    assert [event.parameters > 0 for event in audited] == [True, False]
    assert (ran["own_loop"].folder / "plan.json").read_bytes() == (
        ran["fit"].folder / "plan.json"
    ).read_bytes()


def test_final_weights_are_equal(ran: dict[str, Ran]) -> None:
    """The weights and buffers of the two models, and the two files of best weights, are equal to the bit."""
    for by_hand, by_fit in (
        (ran["own_loop"].model.state_dict(), ran["fit"].model.state_dict()),
        (
            load_file(ran["own_loop"].folder / "best.safetensors"),
            load_file(ran["fit"].folder / "best.safetensors"),
        ),
    ):
        assert by_hand.keys() == by_fit.keys()
        assert all(torch.equal(by_hand[name], by_fit[name]) for name in by_hand)


def _unclocked(event: Event) -> dict[str, Any]:
    said = {"event": type(event).__name__, **asdict(event)}
    return {key: value for key, value in said.items() if key not in _CLOCKED}
