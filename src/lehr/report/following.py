"""An observer that draws the picture of a run's plan anew where evidence has changed it. It must not know what was measured."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lehr.errors import LehrError, RecipeError
from lehr.events import ConditionMet, Event, RateReduced
from lehr.journal import effective, read_journal
from lehr.planned_stage import Decision
from lehr.planning import Plan
from lehr.report.picture import draw_plan


class PlanPicture:
    """Draws `plan` to `path` where a stage ends or cools; call it with events.

    Args:
        plan: as it was made.
        path: the picture's file.
        journal: of a run that goes on: what was decided before.
    """

    def __init__(self, plan: Plan, path: Path, journal: Path) -> None:
        self._plan, self._path = plan, path
        with suppress(LehrError, OSError):  # a picture stops no run
            if journal.exists():
                for record in effective(read_journal(journal, damaged="note").records):
                    self._follow(record.event)

    def __call__(self, event: Event) -> None:
        """Draw the picture anew where `event` is a decision."""
        if self._follow(event):
            draw_plan(self._plan, self._path)

    def _follow(self, event: Event) -> bool:
        match event:
            case ConditionMet():
                decision = Decision(event.stage, event.step, "end", event.value)
            case RateReduced():
                decision = Decision(event.stage, event.step, "reduce", event.value)
            case _:
                return False
        with suppress(RecipeError):  # of a plan that the run has left since
            self._plan = self._plan.decided(decision)
        return True
