"""Reading schedules: both forms a person writes, and that nothing in a text is ever run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr import schedules
from lehr.curves import Schedule
from lehr.errors import ScheduleError
from lehr.notation import CONSTRUCTORS, read_schedule
from lehr.schedules import cosine, hold, linear, one_cycle, restarts, step_decay, warmup
from strategies import joins


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("cosine()", cosine()),
        (" cosine( floor = 0.01 ) ", cosine(0.01)),
        ('warmup("5%")>>cosine(0.01)', warmup("5%") >> cosine(0.01)),
        ("warmup('5%') >> hold('75%') >> linear(0)", warmup("5%") >> hold("75%") >> linear()),
        ('warmup("5%") >> (hold("75%") >> linear())', warmup("5%") >> hold("75%") >> linear()),
        (
            'restarts("10 epochs", grow=2, shape=cosine(0.1))',
            restarts("10 epochs", grow=2, shape=cosine(0.1)),
        ),
        ('step_decay(at=["30 epochs", "60 epochs"], by=0.1)', step_decay(["30 epochs", "60 epochs"])),
        ('cosine(length="10 epochs", per="epoch")', cosine(length="10 epochs", per="epoch")),
        ({"warmup": "5%", "shape": "cosine", "floor": 0.01}, warmup("5%") >> cosine(0.01)),
        (
            {"warmup": "5%", "start": 0.1, "curve": "quadratic", "shape": "linear"},
            warmup("5%", 0.1, "quadratic") >> linear(),
        ),
        (
            {"warmup": "5%", "hold": "75%", "shape": "linear", "floor": 0},
            warmup("5%") >> hold("75%") >> linear(),
        ),
        ({"warmup": "5%"}, warmup("5%") >> schedules.constant()),
        ({}, schedules.constant()),
        ({"shape": "one_cycle", "start": 0.1, "curve": "linear"}, one_cycle(start=0.1, curve="linear")),
        ({"shape": "step_decay", "at": ["50%"], "by": 0.5}, step_decay(["50%"], 0.5)),
        ({"shape": "cosine", "per": "epoch"}, cosine(per="epoch")),
        (cosine(), cosine()),
    ],
    ids=str,
)
def test_understood(written: object, meant: Schedule) -> None:
    """A text and a table mean the schedule that the same words make in Python."""
    assert read_schedule(written) == meant


@settings(max_examples=40)
@given(joins())
def test_round_trip(schedule: Schedule) -> None:
    """Whatever prints reads back: equal, and printing the same."""
    assert read_schedule(str(schedule)) == schedule
    assert str(read_schedule(str(schedule))) == str(schedule)


def test_every_constructor_is_known() -> None:
    """Each public schedule can be written, and nothing else can be called."""
    public = {
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
    }
    assert set(CONSTRUCTORS) == public
    assert all(CONSTRUCTORS[name] is getattr(schedules, name) for name in public)


@pytest.mark.parametrize(
    ("written", "helpful"),
    [
        (
            "cosin()",
            "no schedule is called 'cosin'; did you mean \"cosine\"? Known: constant, cosine, exponential",
        ),
        ("nothing_like_it()", "no schedule is called 'nothing_like_it'. Known:"),
        (
            "cosine(flor=0.1)",
            "cosine has no setting 'flor'; did you mean \"floor\"? It takes: floor, length, per",
        ),
        ("cosine(1, 2)", "cosine: too many positional arguments; it takes floor, length, per"),
        ("warmup()", "warmup: missing a required argument: 'length'; it takes length, start, curve, per"),
        ("cosine(floor=2)", "cosine: floor=2; expected a share of the peak rate, from 0 to 1"),
        ("cosine(length=5)", '5 has no unit; write "5 epochs"'),
        ("step_decay(at='30 epochs')", "at='30 epochs'; expected a list of durations"),
        ("polynomial('2')", "polynomial: power='2'; expected a number above 0"),
        ("restarts('5%', shape='cosine')", "shape='cosine'; expected a schedule"),
        ("cosine", "'cosine' is not a schedule; expected a call such as cosine() or warmup(\"5%\")"),
        ("cosine() + linear()", "'cosine() + linear()' is not a schedule"),
        ("-cosine()", "is not a schedule"),
        ("cosine() >> 5", "'5' is not a schedule"),
        ("cosine(floor=x)", "'x' is neither a number, a text, a list nor a schedule"),
        ("cosine({[]: 1})", "is neither a number, a text, a list nor a schedule"),
        ("cosine(*[0.1])", "is neither a number, a text, a list nor a schedule"),
        ("cosine(**{})", "cosine has no setting"),
        ("cosine() >>", "cannot be read as a schedule; write for example"),
        ("", "'' cannot be read as a schedule"),
        ("cosine()\x00", "cannot be read as a schedule"),
        ("(" * 900 + ")" * 900, "cannot be read as a schedule"),
        ("cosine() >> linear()", "both take what the others leave"),
        ("a" * 5000, "is not a schedule; expected a text such as"),
        (5, "'5' is not a schedule; expected a text such as 'warmup(\"5%\") >> cosine(floor=0.01)'"),
        (None, "'None' is not a schedule"),
        ({"shape": "cosin"}, "no schedule is called 'cosin'; did you mean \"cosine\"?"),
        ({"shape": 5}, 'here.shape: 5 is not a name; expected one such as "cosine"'),
        ({"shape": "cosine", "flor": 1}, "cosine has no setting 'flor'; did you mean \"floor\"?"),
        ({"warmup": 5, "shape": "cosine"}, "warmup(length): 5 has no unit"),
        ({"warmup": "5%", "start": 2}, "warmup: start=2; expected a share"),
        ({"floor": 0.1}, "constant has no setting 'floor'"),
        ({"hold": "5"}, "hold(length): '5' has no unit"),
    ],
)
def test_refused(written: object, helpful: str) -> None:
    """What is no schedule is refused in words that say what was meant, where it stands and what would do."""
    with pytest.raises(ScheduleError) as caught:
        read_schedule(written, where="here")
    assert helpful in str(caught.value)


@pytest.mark.parametrize(
    "written",
    [
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "cosine(floor=(lambda: 0)())",
        "cosine().over(steps=3)",
        "cosine.__globals__",
        "[cosine() for _ in 'ab']",
        "cosine(floor=open('x'))",
        "print('run')",
        "exec('x')",
    ],
)
def test_nothing_is_run(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A text that would do something is refused, not run."""
    with pytest.raises(ScheduleError):
        read_schedule(written)
    assert capsys.readouterr().out == ""


@given(st.text(max_size=60) | st.text(alphabet='cosine()wrmup"5%>=.,[]{}*\\ ', max_size=40))
def test_any_text_is_read_or_refused(written: str) -> None:
    """No text makes anything but a schedule or a ScheduleError."""
    try:
        schedule = read_schedule(written)
    except ScheduleError:
        return
    assert read_schedule(str(schedule)) == schedule
