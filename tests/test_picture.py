"""The plan as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lehr.errors import RequestError
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.report.picture import draw_plan
from lehr.resolving import resolve
from lehr.schedules import cosine, hold, linear
from lehr.selection import ModelFacts, ParameterFacts

FACTS = ModelFacts(
    "net",
    (
        ParameterFacts("body.weight", (40, 4)),
        ParameterFacts("body.bias", (4,), bias=True),
        ParameterFacts("$fc$", (2, 4)),
    ),
    head=("$fc$",),
)


def plan_of(*stages: Stage) -> Plan:
    return resolve(Recipe(stages, schedule=cosine(), weight_decay=0.1), FACTS, samples=320)


HEAD = Stage("2 epochs", train="head", lr=1e-2)
ALL = Stage("3 epochs", train="all", lr={"head": 1e-2, "backbone": 1e-3}, schedule=hold("10%") >> linear())


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".svg", ".pdf"])
def test_a_plan_is_drawn_in_each_format(suffix: str, tmp_path: Path) -> None:
    """A picture is written in the format of its ending, and nothing else is left beside it."""
    path = tmp_path / f"plan{suffix}"
    draw_plan(plan_of(HEAD, ALL), path)
    head = path.read_bytes()[:200]
    assert {".png": b"PNG", ".svg": b"<svg", ".pdf": b"%PDF"}[suffix.lower()] in head or b"svg" in head
    assert list(tmp_path.iterdir()) == [path]


def test_the_picture_names_stages_and_groups(tmp_path: Path) -> None:
    """The model, each stage with what it trains and each group that has a curve of its own are written in
    the picture; a group that differs in weight decay alone is not."""
    draw_plan(plan_of(HEAD, ALL), tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text(encoding="utf-8")
    for word in ("head", "all", "4.7 % of parameters", "100.0 % of parameters", "backbone", "learning rate"):
        assert f"<!-- {word}" in text, word
    assert "<!-- net -->" in text
    assert "no_decay" not in text


def test_a_long_recipe_and_a_single_step_can_be_drawn(tmp_path: Path) -> None:
    """Twenty stages, a stage of one step and rates that fall to nothing make a picture of the usual
    size."""
    stages = [Stage("1 steps", train="head", lr=1e-3), *[ALL, HEAD] * 10]
    draw_plan(plan_of(*stages), tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        assert image.size == (1170, 598)


def test_frozen_steps_have_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a group is frozen nothing is drawn: its rate of 0 has no place on a logarithmic axis."""
    from matplotlib.axes import Axes

    drawn: list[tuple[str | None, int]] = []
    plot = Axes.plot

    def spy(self: Axes, x: object, y: object, **how: object) -> object:
        drawn.append((str(how["label"]), int(sum(v == v for v in y))))  # type: ignore[attr-defined]
        return plot(self, x, y, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "plot", spy)
    draw_plan(plan_of(HEAD, ALL), tmp_path / "plan.png")
    assert ("backbone", 0) in drawn
    assert ("head", 20) in drawn


@pytest.mark.parametrize("name", ["plan", "plan.gif", "no/plan.png"])
def test_what_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    """Another ending or a directory that is not there is a wrong request, and nothing is written."""
    with pytest.raises(RequestError, match=r"a picture is written as one of|there is no directory"):
        draw_plan(plan_of(HEAD), tmp_path / name)
    assert not list(tmp_path.iterdir())
