"""Whether a directory holds a run to go on with, and whether it is this one: the same plan and the same data.

It must not know how a state is put back (`training.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lehr.data.fingerprint import Fingerprint, difference
from lehr.errors import CheckpointError, RecipeError, RequestError, RunError, nearest
from lehr.events import RunEnded, StepsTaken
from lehr.journal import effective, read_journal
from lehr.plan_changes import plan_differences
from lehr.planning import Plan
from lehr.replanning import check_continuation
from lehr.run.checkpoint import CheckpointFolder, Found
from lehr.run.folder import RunFolder
from lehr.run.state import DamageError, Made, State
from lehr.run.training import Terms, followed

Resume = Literal[False, True, "auto", "changed"]
_KNOWN = (False, True, "auto", "changed")


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from: the checkpoint, how many of the journal's lines count, the hash of the plan that
    is replaced (None where it is the same), and what the person should know.
    """

    found: Found
    records: int
    replaces: str | None
    ended: bool
    notes: tuple[str, ...]


def check_resume(resume: object, out: object) -> None:
    """Refuse a `resume` that means nothing.

    Raises:
        RequestError: naming what it may be.
    """
    if not any(resume is known or (isinstance(known, str) and resume == known) for known in _KNOWN):
        near = nearest(str(resume), [str(known) for known in _KNOWN])
        raise RequestError(f'resume={resume!r}{near} Expected False, True, "auto" or "changed"')
    if resume and out is None:
        raise RequestError(f"resume={resume!r}: say which run to go on with: out=DIRECTORY")
    if resume in (True, "changed") and not Path(str(out)).exists():
        raise CheckpointError(f"{out}: no such directory; expected the directory of a run of lehr fit")


def resumption(folder: RunFolder, plan: Plan, terms: Terms, made: Made, *, how: Resume) -> Resumption | None:
    """What to go on from in `folder`, with what is `made` by this process; None where no run has begun there and `how` allows
    for that.

    Raises:
        CheckpointError: where there is nothing good to go on from, or it is of another plan or other data,
            with what differs.
        RecipeError: for a changed plan that the run cannot go on with.
    """
    files = CheckpointFolder(folder.checkpoints)
    try:
        found = files.newest(lambda state: _unfinished_change(folder, state, plan))
    except DamageError as why:
        raise CheckpointError(f"{folder.path}: {nothing_good(why)}") from None
    if found is None:
        _refuse_unless_new(folder, how)
        return None
    state = found.snapshot.state
    notes = [f"passed over {words}" for words in found.passed_over]
    was = state.made
    # Data first: of others, the plan differs too, and no change is allowed.
    notes += _same_data(folder, state, terms, same_versions=(made.lehr, made.torch) == (was.lehr, was.torch))
    replaces = _same_plan(folder, state, plan, changed=how == "changed")
    lines, ended_at = _journal(folder)
    other = [
        f"{name} {getattr(made, name) or 'off'}, was {getattr(was, name) or 'off'}"
        for name in ("lehr", "torch", "device", "precision", "threads", "compile")
        if getattr(made, name) != getattr(was, name)
    ]
    if other:
        notes.append(f"the result will be close, not the same to the bit: {'; '.join(other)}")
    ended = ended_at == state.at.step and not replaces
    if ended and not folder.weights.is_file():  # a disk was full to the last; the end is done again
        ended = False
        notes.append("this run has ended already, without its best weights; they are written again")
    return Resumption(found, min(state.records, lines), replaces, ended, tuple(notes))


def nothing_good(why: DamageError) -> str:
    """What to say where there are checkpoints and none can be gone on from."""
    return (
        f"no checkpoint is good: {why}; put the files back from a copy, or begin a new run "
        "in another directory"
    )


def _unfinished_change(folder: RunFolder, state: State, plan: Plan) -> str:
    """A checkpoint of a new plan is the last thing that a change writes before the plan itself."""
    if state.plan_hash == plan.hash or state.instead_of is None:
        return ""
    try:
        written = Plan.load(folder.path / "plan.json").hash
    except RecipeError:
        written = ""
    if state.instead_of in (plan.hash, written):
        return "is of a change of plan that was not finished"
    return ""


def _refuse_unless_new(folder: RunFolder, resume: Resume) -> None:
    """No checkpoint: begin anew where nothing was trained yet."""
    where = folder.path
    if resume != "auto":
        raise CheckpointError(
            f"{where}: holds no checkpoint to go on from; expected the directory of a run of lehr fit"
        )
    if has_begun(folder):
        raise CheckpointError(
            f"{where}: holds a run, and no checkpoint to go on from; nothing is overwritten: choose another "
            "directory, or remove it"
        )


def has_begun(folder: RunFolder) -> bool:
    """Whether something was trained in `folder`, or saved to go on from: then nothing there is overwritten."""
    try:
        if folder.weights.exists() or any(folder.checkpoints.glob("*.json")):
            return True
        records = read_journal(folder.journal, damaged="note") if folder.journal.exists() else ()
    except (OSError, RequestError):  # what cannot be looked at may be anything
        return True
    return any(isinstance(record.event, StepsTaken) for record in records)


def _same_plan(folder: RunFolder, state: State, plan: Plan, *, changed: bool) -> str | None:
    """The hash of the plan that `plan` replaces, or None; refuses another one unless it is wanted."""
    if state.plan_hash == plan.hash:
        return None  # also of a change that was cut off: what it had not written yet, `fit` writes
    try:
        was = Plan.load(folder.path / "plan.json")
        differences = plan_differences(was, plan) if was.hash == state.plan_hash else ("unknown",)
    except RecipeError as error:
        was, differences = plan, (f"unknown, for {error}",)
    if not differences:
        return None  # the same parameters in another order
    if differences[0].startswith("unknown"):
        raise CheckpointError(
            f"{folder.path}: the checkpoint is of another plan, and plan.json is not the one that it was made "
            "by; put recipe.toml and plan.json back, or begin a new run"
        )
    at = state.at
    try:
        check_continuation(
            followed(was, state), followed(plan, state), stage=at.stage, epoch=at.epoch, step=at.step
        )
        way = (
            "or, to go on with what has changed, say so "
            f'(lehr resume {folder.path} --set KEY=VALUE or --extend "10 epochs"; in Python resume="changed")'
        )
    except RecipeError as error:
        if changed:
            raise
        way = f"it cannot go on with what has changed:\n  {error}"
    if not changed:
        lines = "".join(f"\n  {line}" for line in differences)
        raise CheckpointError(
            f"{folder.path}: this is not the run that was begun there:{lines}\nMake it the same again; {way}"
        )
    return state.plan_hash


def _same_data(folder: RunFolder, state: State, terms: Terms, *, same_versions: bool) -> list[str]:
    """Refuse other data. Samples that were computed may come out otherwise in other versions: that is a note."""
    notes = []
    for what, was, now in (("train", state.train, terms.train), ("valid", state.valid, terms.valid)):
        said = _difference(was, now)
        if said and was and was.kind == "probes" and not same_versions:
            notes.append(f"{what}: perhaps not the data that the run was begun with: {said}")
        elif said:
            raise CheckpointError(
                f"{folder.path}: {what}: not the data that the run was begun with: {said}; "
                "give the same data, or begin a new run"
            )
    return notes


def _difference(was: Fingerprint | None, now: Fingerprint | None) -> str:
    if was and now:
        return difference(was, now)
    if was is None and now is None:
        return ""
    return "some where there were none" if now else "none where there were some"


def _journal(folder: RunFolder) -> tuple[int, int | None]:
    """How many lines the journal has, and the step at which the run has ended by the last of them that counts."""
    if not folder.journal.exists():
        return 0, None
    try:
        records = read_journal(folder.journal, damaged="note").records
    except (RunError, RequestError):
        return 0, None
    last = effective(records)[-1:]
    return len(records), last[0].event.step if last and isinstance(last[0].event, RunEnded) else None
