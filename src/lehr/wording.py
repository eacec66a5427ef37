"""Events in words: the texts that `progress.py` shows, fitted to a width. It makes texts and changes nothing.

Losses have four significant digits, other metrics up to 1 four decimals (`0.9412`), rates two digits
(`1.0e-03`).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TextIO

from lehr.events import (
    CacheClosed,
    CheckpointFailed,
    ConditionMet,
    EpochEnded,
    Note,
    PrefixCached,
    RateReduced,
    Resumed,
    RunEnded,
    RunFailed,
    RunStarted,
    StageEnded,
    StageStarted,
)
from lehr.free_room import size_text

_NAME_ROOM = 24  # columns that a stage's label or the name of a metric or a group may take
BAR_ROOM = 6  # columns below which a bar says nothing
FILLER = 8  # the rank from which parts of a line only fill it up
_GROUPS_NAMED = 4  # with more groups than this, the span of their rates is shown instead of each
GLUE = "\xa0"  # a space at which no line is broken; written as a space
BAR = "\0"  # one column of the bar to be; no name can hold it, since names are shown escaped


@dataclass(frozen=True)
class Words:
    """Events in words that a stream can show: its `encoding`, and whether that has our signs (`unicode`)."""

    encoding: str
    unicode: bool

    @classmethod
    def of(cls, stream: TextIO | None) -> Words:
        """The words for a stream: plain ASCII where its encoding lacks our signs."""
        encoding = (stream.encoding if stream else None) or "utf-8"
        try:
            "·…▏█".encode(encoding)
        except UnicodeError:
            return cls(encoding, False)
        except LookupError:  # an encoding that Python does not know
            return cls("ascii", False)
        return cls(encoding, True)

    @property
    def dot(self) -> str:
        """What stands between the parts of a line."""
        return "·" if self.unicode else "-"

    @property
    def ellipsis(self) -> str:
        """What stands for text that was cut off."""
        return "…" if self.unicode else ".."

    def shown(self, text: str) -> str:
        r"""`text` with every character escaped that is not printable (`\x1b`) or not in the encoding."""
        safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
        return safe.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def name(self, text: str, room: float = _NAME_ROOM) -> str:
        """A name that a person chose, safe to show and not too long."""
        return self.cut(self.shown(text), room)

    def cut(self, text: str, room: float) -> str:
        """`text`, or as much of it as fits before an ellipsis."""
        if width(text) <= room:
            return text
        return text[: prefix(text, room - len(self.ellipsis))] + self.ellipsis

    def joined(self, text: str) -> str:
        """`text` after a dot; nothing for nothing."""
        return f" {self.dot} {text}" if text else ""

    def metrics(self, values: Mapping[str, float]) -> str:
        """`name=value` for each metric."""
        return " ".join(f"{self.name(name)}={_metric(name, value)}" for name, value in values.items())

    def rates(self, lr: Mapping[str, float]) -> tuple[str, ...]:
        """The rates of all groups, and as a shorter way to say it their span; nothing without groups.

        >>> Words("utf-8", True).rates({"head": 1e-3, "backbone": 1e-4})
        ('lr head=1.0e-03 backbone=1.0e-04', 'lr 1.0e-04…1.0e-03')
        """
        if not lr:
            return ()
        lr = _distinct(lr)
        low, high = f"{min(lr.values()):.1e}", f"{max(lr.values()):.1e}"
        span = f"lr {low}" if low == high else f"lr {low}{self.ellipsis}{high}"
        if len(lr) > _GROUPS_NAMED:
            return (f"{span} ({len(lr)} groups)", span)
        return ("lr " + " ".join(f"{self.name(group)}={rate:.1e}" for group, rate in lr.items()), span)

    def where(self, stage: StageStarted | None, run: RunStarted | None, epoch: int, room: float) -> str:
        """`stage 2/2 all · epoch 7/20`; the label is cut where it takes more than its share of `room`."""
        at_epoch = f"epoch {epoch + 1}" + (f"/{run.total_epochs}" if run else "")
        if stage is None:
            return at_epoch
        at_stage = f"stage {stage.stage + 1}" + (f"/{run.stages}" if run else "")
        label = min(_NAME_ROOM, max(4, room - len(at_stage) - len(at_epoch) - 4))
        return f"{at_stage} {self.name(stage.label, label)} {self.dot} {at_epoch}"

    def run(self, event: RunStarted) -> str:
        """How long a run is, on how much data, where."""
        parts = [f"{count(event.total_epochs, 'epoch')}, {count(event.total_steps, 'step')}"]
        validate = f", {count(event.samples_valid)} to validate" if event.samples_valid else ""
        parts.append(count(event.samples_train, "sample") + validate)
        parts.append(f"{self.shown(event.device)}{GLUE}{self.shown(event.precision)}")
        return f" {self.dot} ".join(parts)

    def resumed(self, event: Resumed, run: RunStarted) -> str:
        """Where a run goes on; a run of which only the end was missing has no epoch to go on in.

        >>> at, run = Resumed(1200, 1, 4, 99), RunStarted("0.1.0", "", 4000, 13, 9600, 0, "cpu", "fp32", 2)
        >>> Words("utf-8", True).resumed(at, run)
        'resumed at step 1,200 of 4,000 · epoch 5 of 13'
        """
        text = f"resumed at step {count(event.step)} of {count(run.total_steps)}"
        if event.epoch < run.total_epochs:
            text += self.joined(f"epoch {event.epoch + 1} of {run.total_epochs}")
        return text

    def stage(self, event: StageStarted, run: RunStarted | None) -> str:
        """Which stage begins and what it trains."""
        of = f"/{run.stages}" if run else ""
        share = event.trained_parameters / max(event.total_parameters, 1)
        trains = f"{count(event.trained_parameters)} of {count(event.total_parameters, 'parameter')}"
        return f" {self.dot} ".join(
            [
                f"stage {event.stage + 1}{of}",
                self.shown(event.label),
                count(event.epochs, "epoch"),
                f"trains {trains} ({_percent(share)})",
            ]
        )

    def epoch(self, event: EpochEnded, run: RunStarted | None, room: float) -> str:
        """The line that an epoch leaves; the parts with the lowest ranks are kept longest."""
        total = str(run.total_epochs) if run else ""
        number = f"{event.epoch + 1:>{len(total)}}/{total}" if run else str(event.epoch + 1)
        headline = headline_of(event.metrics)
        parts = [Part(0, f"epoch {number} {self.dot}")]
        if not any(
            is_objective_loss(name) for name in event.metrics
        ):  # whose mean says less than each of them
            parts.append(Part(3, f" train_loss={loss_text(event.train_loss)}"))
        for name, value in event.metrics.items():
            rank = 1 if headline and name == headline[0] else 4
            parts.append(Part(rank, " " + self.metrics({name: value})))
        parts.append(Part(7, *(self.joined(text) for text in self.rates(event.lr))))
        parts.append(Part(6, self.joined(speed(event.samples_per_second))))
        parts.append(Part(5, self.joined(_seconds(event.seconds))))
        if event.best:
            parts.append(Part(2, self.joined("best")))
        return fit(parts, room)

    def note(self, event: Note) -> str:
        """A note; its lines are indented."""
        lines = [self.shown(line) for line in event.text.splitlines()]
        return "! " + "\n  ".join(lines)

    def prefix_cached(self, event: PrefixCached) -> str:
        """What is computed once a sample, and how large that is.

        >>> event = PrefixCached(0, 0, "train", "layer3", 0.805, 401408, 500, 500, "memory", "fx", True)
        >>> Words("utf-8", True).prefix_cached(event)
        'training: the frozen 80% up to layer3 is computed once a sample, 500 x 392 KiB = 191 MiB in memory'
        """
        what = "training" if event.data == "train" else "validation"
        size = f"{count(event.rows)} x {size_text(event.bytes)} = {size_text(event.rows * event.bytes)}"
        part = (
            f", of {count(event.wanted)} (the rest is computed each time)"
            if event.rows < event.wanted
            else ""
        )
        return (
            f"{what}: the frozen {int(100 * event.share)}% up to {self.name(event.after, 40)} is computed once a sample, "
            f"{size} in {self.shown(event.place)}{part}"
        )

    def cache_closed(self, event: CacheClosed) -> str:
        """What it was good for.

        >>> Words("utf-8", True).cache_closed(CacheClosed(0, 400, "train", 500, 4500, 81.2)).replace(GLUE, " ")
        'training: features of 500 samples were read 4,500 times, which has saved about 1 min 21 s'
        """
        what = "training" if event.data == "train" else "validation"
        read = f"{count(event.read)} times, which has saved about {_seconds(event.saved)}"
        return f"{what}: features of {count(event.computed)} samples were read {read}"

    def checkpoint_failed(self, event: CheckpointFailed) -> str:
        """That a checkpoint could not be written, why, and what happens next."""
        error = self.shown(" ".join(event.error.split()))
        text = f"! the checkpoint of step {count(event.step)} could not be written: {error}"
        return text + self.joined(
            f"training goes on, next try in {_seconds(event.retry)}" if event.retry else "not tried again"
        )

    def condition_met(self, event: ConditionMet) -> str:
        """What a stage waited for was measured, and how long the run is now."""
        text = f"stage {event.stage + 1} ends after step {count(event.step)}: {self._measured(event)}"
        epochs, steps = count(event.total_epochs, "epoch"), count(event.total_steps, "step")
        return text + self.joined(f"{epochs}, {steps} in all")

    def rate_reduced(self, event: RateReduced) -> str:
        """A plateau was seen, and the rates are lower from there on."""
        text = f"stage {event.stage + 1} cools after step {count(event.step)}: {self._measured(event)}"
        return text + self.joined(f"rates times {event.factor:.3g}")

    def _measured(self, event: ConditionMet | RateReduced) -> str:
        condition = self.shown(event.condition)
        metric = condition.partition(" ")[0]
        return f"{condition}{self.joined(f'{metric}={_metric(metric, event.value)}')}"

    def stage_ended(self, event: StageEnded) -> str:
        """How a stage ended."""
        text = f"stage {event.stage + 1} ended"
        if event.reason not in ("length", "until"):  # what it waited for was told
            text += f" early ({self.shown(event.reason)})"
        if event.restored_epoch is not None:
            text += self.joined(f"weights of epoch {event.restored_epoch + 1} restored")
        return text

    def run_ended(self, event: RunEnded) -> str:
        """How a run ended, and how well."""
        text = "done" if event.reason in ("length", "until") else f"done ({self.shown(event.reason)})"
        text += self.joined(f"{count(event.step, 'step')} in {_seconds(event.seconds)}")
        if event.best_epoch is not None:
            text += self.joined(f"best epoch{GLUE}{event.best_epoch + 1}")
        return text + self.joined(self.metrics(event.metrics))

    def failed(self, event: RunFailed) -> str:
        """Where a run failed, and why."""
        error = self.shown(" ".join(event.error.split()))
        return f"failed in stage {event.stage + 1} after {count(event.step, 'step')}: {error}"


class Part(NamedTuple):
    """A part of a line: how soon it must go (rank 0 never), its text, and a shorter text for less room."""

    rank: int
    text: str = ""
    shorter: str = ""


def fit(parts: Sequence[Part], room: float) -> str:
    """The parts that fit into `room` columns, in the order they stand.

    They are chosen by rank up to the first that does not fit, so that the order in which parts go is the same
    at every width; from `FILLER` on they are taken wherever there is room for them.

    >>> parts = [Part(0, "epoch 1"), Part(2, " lr=0.1"), Part(1, " valid_accuracy=0.9"), Part(9, " 50%")]
    >>> fit(parts, 40), fit(parts, 27), fit(parts, 20)
    ('epoch 1 lr=0.1 valid_accuracy=0.9 50%', 'epoch 1 valid_accuracy=0.9', 'epoch 1 50%')
    """
    chosen, used, full = [""] * len(parts), 0, False
    for index in sorted(range(len(parts)), key=lambda index: parts[index].rank):
        rank, text, shorter = parts[index]
        fitting = [choice for choice in (text, shorter) if choice and used + width(choice) <= room]
        if rank == 0:
            chosen[index] = text
        elif fitting and (not full or rank >= FILLER):
            chosen[index] = fitting[0]
        full = full or bool(text and not chosen[index])
        used += width(chosen[index])
    return "".join(chosen)


def fold(text: str, room: float, indent: str = "  ") -> list[str]:
    """`text` as lines of at most `room` columns, broken at spaces; lines after the first are indented.

    >>> fold("stage 1/2 trains 6 parameters", 16)
    ['stage 1/2 trains', '  6 parameters']
    """
    if width(text) <= room:
        return [text]
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line.strip() else line + word
        if width(longer) > room and line.strip():
            lines.append(line)
            longer = indent + word
        line = longer
        while width(line) > room:  # one word that is longer than a line
            end = max(prefix(line, room), len(indent) + 1)
            lines.append(line[:end])
            line = indent + line[end:]
    return [*lines, line]


def width(text: str) -> int:
    """Columns on a terminal: wide East Asian characters take two; combining marks are counted, to be safe."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(c) in "FW" else 1 for c in text)


def prefix(text: str, room: float) -> int:
    """How many characters of `text` fit into `room` columns."""
    used = 0
    for index, character in enumerate(text):
        used += width(character)
        if used > room:
            return index
    return len(text)


def headline_of(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """The one metric to show where there is room for one: the first of the validation that is no loss, or the next
    best.
    """
    shown = [name for name in metrics if not is_objective_loss(name)]  # the bar has those of its own epoch
    names = sorted(shown, key=lambda name: ("loss" in name, not name.startswith("valid_")))
    return (names[0], metrics[names[0]]) if names else None


def is_objective_loss(name: str) -> bool:
    """Whether a metric is the training loss of one of several objectives.

    >>> is_objective_loss("train_d_loss"), is_objective_loss("train_loss")
    (True, False)
    """
    return name.startswith("train_") and name.endswith("_loss") and name != "train_loss"


def losses_text(loss: float, losses: Mapping[str, float]) -> str:
    """The loss, or that of each objective.

    >>> losses_text(0.5, {}), losses_text(0.5, {"d": 0.693, "g": 1.204})
    ('loss=0.5000', 'd_loss=0.6930 g_loss=1.204')
    """
    if not losses:
        return f"loss={loss_text(loss)}"
    return " ".join(f"{name}_loss={loss_text(value)}" for name, value in losses.items())


def loss_text(value: float) -> str:
    """Four significant digits.

    >>> loss_text(0.312), loss_text(12345.6), loss_text(float("nan"))
    ('0.3120', '1.235e+04', 'nan')
    """
    return f"{value:#.4g}".removesuffix(".")


def _metric(name: str, value: float) -> str:
    """Four decimals for shares such as an accuracy, four significant digits for losses and large numbers."""
    return loss_text(value) if "loss" in name or abs(value) > 1 else f"{value:.4f}"


def speed(samples_per_second: float) -> str:
    """`512 samples/s`; nothing where it is not known yet."""
    if not math.isfinite(samples_per_second) or samples_per_second <= 0:
        return ""
    number = f"{samples_per_second:.0f}" if samples_per_second >= 10 else f"{samples_per_second:.2g}"
    return f"{number}{GLUE}samples/s"


def _seconds(seconds: float) -> str:
    """How long something took.

    >>> [_seconds(s).replace(GLUE, " ") for s in (0.04, 59.97, 83, 7509)]
    ['0.04 s', '1 min 00 s', '1 min 23 s', '2 h 05 min']
    """
    if seconds < 59.95:
        return f"{seconds:.2f}{GLUE}s" if seconds < 1 else f"{seconds:.1f}{GLUE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{GLUE}min{GLUE}{rest:02d}{GLUE}s"
    return f"{minutes // 60}{GLUE}h{GLUE}{minutes % 60:02d}{GLUE}min"


def count(number: int, unit: str = "") -> str:
    """A whole number in groups of three, with its unit.

    >>> count(2230277, "step").replace(GLUE, " "), count(1, "step").replace(GLUE, " ")
    ('2,230,277 steps', '1 step')
    """
    text = f"{number:,}"
    return f"{text}{GLUE}{unit}{'' if number == 1 else 's'}" if unit else text


def _percent(share: float) -> str:
    """A share as a person reads it: never 0 % for some, nor 100 % for not quite all.

    >>> [_percent(s).replace(GLUE, " ") for s in (0, 0.00001, 0.00287, 0.42, 0.99999, 1)]
    ['0 %', '< 0.1 %', '0.3 %', '42.0 %', '> 99.9 %', '100 %']
    """
    if share in (0, 1):
        return f"{100 * share:.0f}{GLUE}%"
    sign, value = ("<", 0.1) if share < 0.001 else (">", 99.9) if share > 0.999 else ("", 100 * share)
    return f"{sign}{GLUE}{value:.1f}{GLUE}%".lstrip(GLUE)


def _distinct(lr: Mapping[str, float]) -> dict[str, float]:
    """Rates without those of groups that differ from another only in their weight decay.

    >>> _distinct({"head": 0.1, "head/no_decay": 0.1})
    {'head': 0.1}
    """
    return {
        group: rate
        for group, rate in lr.items()
        if not group.endswith("/no_decay") or lr.get(group.removesuffix("/no_decay")) != rate
    }
