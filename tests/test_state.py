"""The state of a run as JSON: what comes back, what is noticed, what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lehr.data.fingerprint import Fingerprint
from lehr.errors import CheckpointError
from lehr.run import state as states
from lehr.run.checkpoint import CheckpointFolder
from lehr.run.state import (
    BestSoFar,
    DamageError,
    Decided,
    FileSum,
    Gauge,
    Kept,
    Made,
    Position,
    Settings,
    Slots,
    SoFar,
    State,
    Tally,
    dumps,
    loads,
)  # fmt: skip
from small_run import checkpoints, fit, forge

ROWS = (
    {"epoch": 0, "stage": 0, "step": 3, "train_loss": 1.25, "valid_loss": math.inf, "best": True},
    {
        "epoch": 1,
        "stage": 0,
        "step": 6,
        "train_loss": math.nan,
        "valid_f1": -math.inf,
        "seen": 7,
        "best": False,
    },
)
WHOLE = State(
    at=Position(1, 2, 7), plan_hash="a" * 64, instead_of="b" * 64, records=12, seconds=1.5,
    so_far=SoFar(math.inf, 8, 0.25, {"d": Tally(math.nan, 8)}), history=ROWS,
    decisions=(Decided(0, 6, "end", math.nan), Decided(1, 7, "reduce", 0.5)),
    gauge=Gauge("train_loss plateaus 3 epochs", -math.inf, 2, Tally(1.5, 8), Tally(3.0, 16)),
    best=BestSoFar(Kept(1, math.inf), Kept(0, -math.inf), (Kept(1, math.inf), Kept(0, 0.1)), 1),
    frozen={"body.0.weight": "0123456789abcdef"},
    optimizer={
        "": {
            "fc.weight": Slots(("exp_avg", "step"), {"k": 1, "x": 0.1, "b": True, "s": "é", "n": None}),
            "fc.bias": Slots(("step",), {}, ("step",)),
            "0": Slots((), {}, ()),
        },
        "d": {"fc.weight": Slots(("step",))},
    },
    scalers={"": {"scale": 65536.0, "_growth_tracker": 3}},
    random={"now/python.version": 3, "now/python.gauss": None, "now/numpy.gauss": -0.5, "now/x": "y"},
    train=Fingerprint(20, "probes", ("ab", "cd"), (0, 19)), valid=Fingerprint(9, "none"),
    settings=Settings("10 minutes", 2, 3), rule="contiguous", layout="channels_last", made=Made("0.3", "2.9", "cuda", "bf16", 8),
    files={"tensors": FileSum(17, "c" * 64), "best-1": FileSum(0, "d" * 64)},
)  # fmt: skip
TEXT = dumps(WHOLE)
PLAIN: dict[str, Any] = json.loads(TEXT)


def forged(**changes: Any) -> str:
    """The JSON with other values, and the hash of these."""
    plain = {key: value for key, value in {**PLAIN, **changes}.items() if key != "hash"}
    return json.dumps({**plain, "hash": states._hash(plain)})


def refusal(text: str | bytes) -> str:
    with pytest.raises(DamageError) as caught:
        loads(text)
    return str(caught.value)


def test_every_field_comes_back() -> None:
    """What is written is read back equal, NaN and the infinities too, and with the same types."""
    again = loads(TEXT)
    assert repr(again) == repr(WHOLE)  # NaN is not equal to itself
    assert dumps(again) == TEXT
    assert [type(v) for row in again.history for v in row.values()] == [
        type(v) for row in ROWS for v in row.values()
    ]
    assert replace(again, history=()) == replace(WHOLE, history=())


def test_a_state_with_nothing_in_it_comes_back() -> None:
    """The state before the first step comes back, too."""
    empty = replace(
        WHOLE, at=Position(), instead_of=None, so_far=SoFar(), history=(), best=BestSoFar(), scalers={},
        decisions=(), gauge=Gauge(),
        valid=None, frozen={}, optimizer={}, random={}, files={},
    )  # fmt: skip
    assert loads(dumps(empty)) == empty


def test_it_is_json_that_others_can_read() -> None:
    """The history's numbers that JSON does not have are texts, so that any reader can read them."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads(TEXT, parse_constant=refuse)


@settings(deadline=None)
@given(st.floats(), st.integers(-(2**63), 2**63 - 1))
def test_numbers_come_back_to_the_bit(value: float, whole: int) -> None:
    """Any float and any whole number of 64 bits is read back as it was."""
    slots = {"": {"p": Slots((), {"x": value, "n": whole})}}
    again = loads(dumps(replace(WHOLE, optimizer=slots, best=BestSoFar(Kept(0, value)))))
    assert repr(again.optimizer) == repr(slots)
    assert repr(again.best.run) == repr(Kept(0, value))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    """Whatever byte is flipped, removed or put in, either the state is the same or the file is called damaged."""
    raw = bytearray(TEXT.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(raw) - 2)))
        match data.draw(st.sampled_from(["flip", "remove", "insert", "cut"])):
            case "flip":
                raw[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "remove":
                del raw[at : at + data.draw(st.integers(1, 40))]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del raw[at + 1 :]
    try:
        again = loads(bytes(raw))
    except DamageError:
        return
    assert repr(again) == repr(WHOLE)


@settings(deadline=None)
@given(st.binary() | st.text() | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_anything_else_is_damage(content: str | bytes) -> None:
    """What lehr has not written is refused by one kind of error."""
    refusal(content)


@pytest.mark.parametrize("depth", [*range(60, 1000, 31), 10_000, 1_000_000])
def test_no_depth_is_too_deep(depth: int) -> None:
    """JSON of any depth is refused in words."""
    refusal(TEXT.rstrip()[:-1] + ', "z": ' + "[" * depth + "]" * depth + "}")


@pytest.mark.parametrize("value", [0, 1, 2, 3, 5, 4.0, True, "1", None, [1], "x" * 10**6])
def test_another_format_is_refused(value: object) -> None:
    """A format that this lehr does not know is named, at no greater length than a line."""
    said = refusal(forged(format=value))
    assert len(said) < 200
    assert "format" in said or "hash" in said


def test_an_unknown_field_is_refused() -> None:
    """Nothing is read over: a field that lehr does not know is named, at any depth, in a bounded line."""
    assert "'extra': Unexpected keyword argument" in refusal(forged(extra=1))
    for place in ("at", "so_far", "best", "train", "settings", "made"):
        assert f"'{place}.extra'" in refusal(forged(**{place: {**PLAIN[place], "extra": 1}}))
    assert len(refusal(forged(**{"\x1b[2J" * 10**5: 1}))) < 400


@pytest.mark.parametrize("name", [f.name for f in fields(State) if f.name != "format"])
def test_a_missing_field_is_refused(name: str) -> None:
    """Each field must be there; one that is not is named."""
    plain = {key: value for key, value in PLAIN.items() if key not in (name, "hash")}
    assert repr(name) in refusal(json.dumps({**plain, "hash": states._hash(plain)}))


NEGATIVE = {"stage": -1}, {"epoch": -1}, {"step": -1}
WRONG = [
    *({"at": {**PLAIN["at"], **change}} for change in NEGATIVE),
    {"at": {**PLAIN["at"], "step": 2**63}},
    {"at": {**PLAIN["at"], "step": 7.0}},
    {"at": {**PLAIN["at"], "step": True}},
    {"at": {**PLAIN["at"], "step": "7"}},
    {"at": [1, 2, 7]},
    {"records": -1},
    {"seconds": -1.0},
    {"seconds": math.nan},
    {"seconds": "nan"},
    {"plan_hash": "A" * 64},
    {"plan_hash": "a" * 63},
    {"instead_of": ""},
    {"history": {}},
    {"history": [{**ROWS[0], "train_loss": "low"}, PLAIN["history"][1]]},
    {"history": [{**ROWS[0], "train_loss": None}, PLAIN["history"][1]]},
    {"frozen": {"a": 1}},
    {"optimizer": {"": {"fc.weight": {"tensors": "step"}}}},
    {"optimizer": {"": {"fc.weight": {"tensors": ["step"], "plain": {"x": [1]}}}}},
    {"optimizer": {"fc.weight": {"tensors": ["step"]}}},
    {"scalers": {"": {"scale": "65536"}}},
    {"decisions": [{"stage": 0, "step": 6, "kind": "stop", "value": 0.5}]},
    {"decisions": [{"stage": -1, "step": 6, "kind": "end", "value": 0.5}]},
    {"gauge": {"condition": "", "best": 0.5, "at": -1}},
    {"random": {"now/python.gauss": [0.1]}},
    {"train": None},
    {"train": {**PLAIN["train"], "kind": "other"}},
    {"settings": {**PLAIN["settings"], "keep": 0}},
    {"settings": {**PLAIN["settings"], "every": 5}},
    {"files": {"tensors": {"bytes": -1, "sha256": "c" * 64}}},
    {"files": {"tensors": {"bytes": 1, "sha256": "../etc"}}},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG, ids=lambda change: json.dumps(change)[:60])
def test_a_value_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    """A right hash does not make a value right: type and range of each are checked, and the place is named."""
    assert next(iter(change)) in refusal(forged(**change))


IMPOSSIBLE = {
    "a history of 2 epochs in epoch 3": {"at": {**PLAIN["at"], "epoch": 3}},
    "a history of 0 epochs in epoch 2": {"history": []},
    "row 1 of the history is not that of an epoch": {"history": [PLAIN["history"][0]] * 2},
    "row 0 of the history is not that of an epoch": {"history": [{}, {}]},
    "row 1 of the history ends at step 6": {"at": {**PLAIN["at"], "step": 5}},
    "row 0 of the history ends at step 0": {"history": [{**PLAIN["history"][0], "step": 0}, PLAIN["history"][1]]},
    "0 samples so far in an epoch of which 1 steps": {"so_far": {**PLAIN["so_far"], "samples": 0}},
    "8 samples so far in an epoch of which 0 steps": {"at": {**PLAIN["at"], "step": 6}},
    "a best epoch that has not ended": {"best": {**PLAIN["best"], "run": {"epoch": 2, "value": 0.5}}},
    "a best epoch that has not": {"best": {**PLAIN["best"], "waiting_since": 2}},
    "best epoch that has not": {"best": {**PLAIN["best"], "ranked": [{"epoch": 9, "value": 0.5}]}},
}  # fmt: skip


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_what_cannot_be_is_refused(words: str) -> None:
    """Values that contradict each other are damage, whatever the hash says."""
    assert words in refusal(forged(**IMPOSSIBLE[words]))


FORGERIES: dict[str, Any] = {
    "no place of the plan": lambda s: s["at"].update(stage=7),
    "is no place": lambda s: s["at"].update(stage=1),
    "does not train": lambda s: s["optimizer"][""].update({"../x": {"tensors": [], "plain": {}, "host": []}}),
    "lacks fc.weight/more": lambda s: s["optimizer"][""]["fc.weight"]["tensors"].append("more"),
    "numpy's generator stands at": lambda s: s["random"].update({"random/now/numpy.at": 10**9}),
    "for another run": lambda s: s["random"].update({"random/now/python.version": 9}),
    "written by lehr": lambda s: s["random"].clear(),
    "does not say what best-0.safetensors is": lambda s: s["files"].pop("best-0"),
    "does not say what 0002-step-4.safetensors is": lambda s: s["files"].clear(),
    "it cannot be": lambda s: s["history"].clear(),
}


@pytest.mark.parametrize("words", FORGERIES)
def test_a_forged_checkpoint_is_refused_in_words(words: str, tmp_path: Path) -> None:
    """A checkpoint that says what cannot be, with a right hash, ends in a line that says so; no traceback."""
    run = tmp_path / "run"
    fit(run, stop=4)
    first, last = checkpoints(run)
    first.unlink()
    forge(last, FORGERIES[words])
    with pytest.raises(CheckpointError, match=words):
        fit(run, resume=True)


def test_a_file_of_any_size_is_bounded(tmp_path: Path) -> None:
    """A JSON that is larger than any state is not read."""
    (tmp_path / "checkpoints").mkdir()
    with (tmp_path / "checkpoints" / "0001-step-0.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DamageError, match="larger than 256 MiB"):
        CheckpointFolder(tmp_path / "checkpoints").newest()
