"""What the stages of a plan cost, as values and as a table. Pure: what was measured is handed in (`run/forecast.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lehr.free_room import size_text
from lehr.plan_text import table


@dataclass(frozen=True)
class StageCost:
    """What a stage costs. `after` is the module behind which the model is cut ("" where it is not, and `why` says why);
    `rows` rows of `row_bytes` are kept of `wanted`, in `place`. `load` is the seconds in which a batch is loaded, `first`
    those of a step that loads and computes everything, `step` of a later one; `total` of the stage, without validation.
    `memory` is bytes at the peak of a step, without the cache: weights, gradients, the optimizer's state, and what the
    backward pass needs.
    """

    stage: int
    after: str
    why: str
    share: float
    row_bytes: int
    rows: int
    wanted: int
    place: str
    load: float
    first: float
    step: float
    total: float
    memory: int

    @property
    def cached(self) -> int:
        """The bytes of the cache."""
        return self.rows * self.row_bytes


def costs_text(costs: Sequence[StageCost]) -> str:
    """The costs as a table, with a line for each stage in which nothing is kept.

    >>> print(costs_text([StageCost(0, "layer4", "", 0.9, 2048, 500, 500, "memory", 0.01, 0.4, 0.02, 65.0, 2**28)]))
    Costs, from a few timed steps here, without validation
         once up to  arithmetic  a sample  in all              first steps  later steps      stage   memory
      1  layer4            90 %     2 KiB  1000 KiB in memory       400 ms        20 ms  1 min 5 s  256 MiB
    """
    header = (
        "",
        "once up to",
        "arithmetic",
        "a sample",
        "in all",
        "first steps",
        "later steps",
        "stage",
        "memory",
    )
    rows = [
        (
            str(cost.stage + 1),
            cost.after or "-",
            f"{int(100 * cost.share)} %" if cost.after else "-",
            size_text(cost.row_bytes) if cost.after else "-",
            _in_all(cost) if cost.after else "-",
            _time(cost.first),
            _time(cost.step),
            _time(cost.total),
            size_text(cost.memory),
        )
        for cost in costs
    ]
    said = table(header, rows, "rlrrlrrrr")
    notes = [f"  - stage {cost.stage + 1} keeps nothing: {cost.why}" for cost in costs if cost.why]
    return "\n".join(["Costs, from a few timed steps here, without validation", said, *notes])


def _in_all(cost: StageCost) -> str:
    part = f" ({cost.rows:,} of {cost.wanted:,} samples)" if cost.rows < cost.wanted else ""
    return f"{size_text(cost.cached)} in {cost.place}{part}"


def _time(seconds: float) -> str:
    """A time with two or three digits.

    >>> _time(0.00123), _time(65), _time(7300)
    ('1.2 ms', '1 min 5 s', '2 h 1 min')
    """
    if seconds < 1:
        return f"{1000 * seconds:.2g} ms" if seconds < 0.01 else f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
