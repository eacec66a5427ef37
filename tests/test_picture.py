"""The plan as a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

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


class Drawn:
    """What was given to matplotlib: each line's steps and rates, and how it was to look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from matplotlib.axes import Axes

        self.lines: list[tuple[list[int], list[float], dict[str, object]]] = []
        plot = Axes.plot

        def spy(axes: Axes, x: Any, y: Any, **how: Any) -> object:
            self.lines.append((x.tolist(), y.tolist(), how))
            return plot(axes, x, y, **how)

        monkeypatch.setattr(Axes, "plot", spy)

    def rates(self, **how: object) -> dict[int, float]:
        """The rate at each step of all lines that look so."""
        return {
            step: rate
            for steps, rates, its in self.lines
            if all(its.get(key) == value for key, value in how.items())
            for step, rate in zip(steps, rates, strict=True)
            if rate == rate
        }


def test_a_run_that_changed_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solid is what was done, the old plan up to the step where the run went on and the new one from there;
    what either plan had besides is dashed; the step and the dashes are named."""
    drawn = Drawn(monkeypatch)
    before = plan_of(HEAD, ALL)
    plan = plan_of(HEAD, replace(ALL, length="6 epochs"))
    draw_plan(plan, tmp_path / "plan.svg", before=before, at=37)
    old, new = before.lr("head").tolist(), plan.lr("head").tolist()
    assert drawn.rates(color="C1") == {t: rate for t, rate in enumerate([*old[:37], *new[37:]]) if rate}
    dashed = drawn.rates(linestyle=(0, (4, 2.5)))
    assert sorted(dashed) == list(range(50))
    text = (tmp_path / "plan.svg").read_text(encoding="utf-8")
    for word in ("resumed at 37", "planned, not followed"):
        assert text.count(f"<!-- {word} -->") == 1, word


def test_a_plan_beside_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a step the plan before is dashed as a whole behind the new one, and the axis has room for
    both."""
    drawn = Drawn(monkeypatch)
    before, plan = plan_of(HEAD, ALL), plan_of(HEAD, replace(ALL, length="1 epoch"))
    draw_plan(plan, tmp_path / "plan.svg", before=before)
    assert max(drawn.rates(linestyle=(0, (4, 2.5)))) == 49
    assert max(drawn.rates(color="C1")) == 29
    text = (tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert text.count("<!-- the plan before -->") == 1
    assert "resumed" not in text


def test_a_plan_that_was_not_changed_has_no_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone a plan is drawn in full, in solid lines."""
    drawn = Drawn(monkeypatch)
    plan = plan_of(HEAD, ALL)
    draw_plan(plan, tmp_path / "plan.png")
    assert not drawn.rates(linestyle=(0, (4, 2.5)))
    assert drawn.rates(color="C1") == {t: rate for t, rate in enumerate(plan.lr("head").tolist()) if rate}


def test_a_run_resumed_at_its_end_or_start_can_be_drawn(tmp_path: Path) -> None:
    """The first step, the old plan's end and groups that the old plan did not have make a picture too."""
    before, plan = plan_of(HEAD), plan_of(HEAD, ALL)
    for at in (0, 20, 50):
        draw_plan(plan, tmp_path / "plan.png", before=before, at=at)
        draw_plan(before, tmp_path / "plan.png", before=plan, at=at)
    with Image.open(tmp_path / "plan.png") as image:
        assert image.size == (1170, 598)
