"""A plan as a page that a person reads: stages, what trains, rates, unit conversions, notes. Only words: no
number on it is new.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lehr.planned_stage import Decision, PlannedStage
    from lehr.planning import Plan


def plan_text(plan: Plan) -> str:
    """The page that `print(plan)` shows."""
    total = sum(plan.parameters.values())
    head = [
        f"lehr plan: {plan.model}, {total:,} parameters, {plan.samples:,} training samples",
        f"{_n(len(plan.stages), 'stage')}, {_n(plan.total_epochs, 'epoch')}, {_n(plan.total_steps, 'step')}"
        f"{' at the most' if any(_is_open(plan, stage) for stage in plan.stages) else ''}; "
        f"{_optimizers(plan)}; seed {plan.seed}; hash {plan.hash[:12]}",
    ]
    blocks = [
        "\n".join(head),
        _stages(plan, total),
        _evidence(plan),
        _groups(plan),
        _curves(plan),
        _rest(plan),
    ]
    if plan.notes:
        blocks.append("Notes\n" + "\n".join(f"  - {note}" for note in plan.notes))
    return "\n\n".join(block for block in blocks if block)


def _optimizers(plan: Plan) -> str:
    """The optimizer, or that of each objective; those that are alike are told once."""
    said: dict[str, list[str]] = {}
    for name, objective in plan.objectives.items():
        settings = "".join(f", {key}={value!r}" for key, value in objective.optimizer_settings.items())
        said.setdefault(f"{objective.optimizer}{settings}", []).append(name)
    if len(said) == 1:
        return next(iter(said))
    return "; ".join(
        f"{' and '.join(name or 'others' for name in names)}: {text}" for text, names in said.items()
    )


def _is_open(plan: Plan, stage: PlannedStage) -> bool:
    """Whether evidence may still end a stage before its length."""
    ended = any(d.kind == "end" and d.stage == stage.index for d in plan.decisions)
    return stage.may_end_sooner and not ended


def _evidence(plan: Plan) -> str:
    """What ends a stage, or cools it, before its length; and what was decided so far."""
    lines = []
    for stage in plan.stages:
        if not stage.until:
            continue
        often = (
            f"checked every {_n(stage.every, 'step')}" if stage.every else "checked at the end of each epoch"
        )
        what = f"ends when {stage.until}"
        if stage.reduce < 1:
            what = f"rates times {stage.reduce:g} when {stage.until}"
            if stage.may_end_sooner:
                what += f", {_n(stage.reductions, 'time')}; ends when it does so again"
        at_latest = "at the latest at" if _is_open(plan, stage) else "until"
        lines.append(f"  {stage.index + 1}  {what} ({often}); {at_latest} step {stage.stop:,}")
    lines += [f"     decided: {decision_text(plan.decisions[k])}" for k in range(len(plan.decisions))]
    return "\n".join(["Ends on evidence", *lines]) if lines else ""


def decision_text(decision: Decision) -> str:
    """A decision in words.

    >>> from lehr.planned_stage import Decision
    >>> decision_text(Decision(0, 400, "end", 0.7912))
    'stage 1 ended after step 400, at 0.7912'
    """
    what = "ended" if decision.kind == "end" else "cooled"
    return f"stage {decision.stage + 1} {what} after step {decision.step:,}, at {decision.value:.4g}"


def _stages(plan: Plan, total: int) -> str:
    rows = []
    for stage in plan.stages:
        trained = sum(plan.parameters[name] for name in plan.trainable(stage))
        batch = str(stage.batch_size) + (f" x {stage.accumulate}" if stage.accumulate > 1 else "")
        rows.append(
            (
                str(stage.index + 1),
                stage.label,
                f"{stage.start:,} to {stage.stop:,}",
                f"{stage.steps:,}",
                f"{stage.steps / stage.steps_per_epoch:g}",
                batch,
                f"{len(plan.trainable(stage))} tensors",
                f"{trained:,}",
                _share(trained, total),
            )
        )
    columns = ("", "trains", "steps", "count", "epochs", "batch", "tensors", "parameters", "share")
    header, *lines = table(columns, rows, "rlrrrrrrr").split("\n")
    named = [
        f"{line}\n     = {listed(_covering(plan.trainable(stage), plan.parameters))}"
        for stage, line in zip(plan.stages, lines, strict=True)
    ]
    return "\n".join(["Stages", header, *named])


def _covering(trained: Collection[str], every: Iterable[str]) -> list[str]:
    """The shortest module paths that say what trains: a module stands for its parameters where all of them
    train.

    >>> _covering({"a.x.weight", "a.x.bias", "b.weight"}, ["a.x.weight", "a.x.bias", "b.weight", "b.bias"])
    ['a', 'b.weight']
    """
    if len(trained) == len(every := list(every)):
        return ["the whole model"]
    left_out = {path for name in every if name not in trained for path in _paths(name)}
    return list(
        dict.fromkeys(
            next((path for path in _paths(name) if path not in left_out), name)
            for name in every
            if name in trained
        )
    )


def _paths(name: str) -> list[str]:
    """The modules that hold a parameter, the outermost first, and its own name.

    >>> _paths("a.x.bias")
    ['a', 'a.x', 'a.x.bias']
    """
    return list(accumulate(name.split("."), "{}.{}".format))


def _groups(plan: Plan) -> str:
    header = ["group", "tensors", "parameters"]
    for stage in plan.stages:
        header += [f"{stage.index + 1}: peak", "last", "decay"]
    rows = []
    for group, names in plan.groups.items():
        row = [group, str(len(names)), f"{sum(plan.parameters[n] for n in names):,}"]
        for stage in plan.stages:
            frozen = not stage.peak_lr[group]
            last = _last_rate(plan, stage, group)
            row += (
                ["frozen", "", ""]
                if frozen
                else [_rate(stage.peak_lr[group]), _rate(last), f"{stage.weight_decay[group]:g}"]
            )
        rows.append(row)
    return "Groups (peak and last rate in each stage, weight decay)\n" + table(
        header, rows, "l" + "r" * (len(header) - 1)
    )


def _curves(plan: Plan) -> str:
    lines = []
    for stage, of_stage in zip(plan.stages, plan.said, strict=True):
        for index, (turn, said) in enumerate(zip(stage.turns, of_stage, strict=True)):
            number = f"{stage.index + 1}" if index == 0 else " " * len(f"{stage.index + 1}")
            if turn.objective:
                lines.append(f"  {number}  {turn.objective}: {said}\n     = {_own_parts(stage, index)}")
            else:
                lines.append(
                    f"  {number}  {said}\n     = {_parts(stage)}; an epoch is {_n(stage.steps_per_epoch, 'step')}"
                )
    return "Schedules\n" + "\n".join(lines)


def _parts(stage: PlannedStage) -> str:
    """The parts of an ordinary stage's schedule, at the run's steps; those that are over before it begins are left out."""
    origin = stage.start if stage.clock == "stage" else 0
    return ", then ".join(
        f"{seg.part.shape.name} {_n(stop - start, 'step')} ({start:,} to {stop:,})"
        for seg in stage.curves[0].segments
        if (stop := origin + seg.stop) > (start := max(stage.start, origin + seg.start))
    )


def _own_parts(stage: PlannedStage, index: int) -> str:
    """The parts of an objective's schedule, in its own updates, and which of the batches are its own."""
    turn = stage.turns[index]
    parts = ", then ".join(
        f"{seg.part.shape.name} {_n(seg.stop - seg.start, 'update')}" for seg in stage.curves[index].segments
    )
    which = "each batch" if turn.every == 1 else f"one batch in {turn.every}"
    often = "" if turn.repeat == 1 else f", {turn.repeat} times"
    own = _n(turn.updates(stage.rounds_per_epoch), "update")
    return f"{parts}; on {which}{often}: {own} of the {stage.steps_per_epoch:,} steps of an epoch"


def _rest(plan: Plan) -> str:
    said = [
        f"lowest rate {plan.min_lr:g} (min_lr)" if plan.min_lr else "",
        *_clipped(plan),
        f"moving average of the weights, decay {plan.ema:g}" if plan.ema else "",
        f"label smoothing {plan.label_smoothing:g}" if plan.label_smoothing else "",
        f"training images changed at random: {', '.join(plan.augment)}" if plan.augment else "",
        *_views(plan),
        f"best by {plan.monitor}"
        if any(s.restore_best for s in plan.stages) or plan.patience != float("inf")
        else "",
        f"restores the best weights after stage {_and(s.index + 1 for s in plan.stages if s.restore_best)}"
        if any(s.restore_best for s in plan.stages)
        else "",
        f"stops after {plan.patience:g} epochs of the last stage without a new best"
        if plan.patience != float("inf")
        else "",
    ]
    return "\n".join(line[0].upper() + line[1:] for line in said if line)


def _views(plan: Plan) -> list[str]:
    """Which stages have fixed views of each sample, and how many."""
    numbers = dict.fromkeys(stage.views for stage in plan.stages if stage.views != "fresh")
    where = {n: _and(s.index + 1 for s in plan.stages if s.views == n) for n in numbers}
    return [
        f"each sample as it is, without random changes, in stage {where[n]}"
        if n == 1
        else f"{n:,} fixed views of each sample in stage {where[n]}, one an epoch in turn"
        for n in numbers
    ]


def _clipped(plan: Plan) -> list[str]:
    """At which norm gradients are clipped, of each objective."""
    norms = {name: o.clip_norm for name, o in plan.objectives.items() if o.clip_norm != float("inf")}
    if len(norms) == len(plan.objectives) and len(set(norms.values())) == 1:
        return [f"gradients clipped at norm {next(iter(norms.values())):g}"]
    return [
        f"gradients of {name or 'ordinary stages'} clipped at norm {norm:g}" for name, norm in norms.items()
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns two spaces apart; `align` has "l" or "r" for each."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  "
        + "  ".join(
            cell.ljust(w) if a == "l" else cell.rjust(w)
            for cell, w, a in zip(row, widths, align, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def _last_rate(plan: Plan, stage: PlannedStage, group: str) -> float:
    """The rate of a group at the last update of the stage that trains it."""
    rates = plan.lr(group)[stage.start : stage.stop]
    return float(rates[rates > 0][-1]) if rates.any() else 0.0


def _rate(value: float) -> str:
    """A rate with three digits: 1.00e-03.

    >>> _rate(0.001)
    '1.00e-03'
    """
    return f"{value:.2e}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if part * 1000 >= whole or not part else "< 0.1 %"


def _n(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first `most` of `names`, and how many more there are.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _and(items: Iterable[object]) -> str:
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
