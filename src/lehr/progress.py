"""An observer that draws a run while it runs: a bar on a terminal or in a notebook, plain lines elsewhere.

It draws what the events of `lehr.journal` say and must know nothing else: no model, no tensor, no recipe.
It draws only when an event comes, so that its cost is set by how often the loop sends `Progressed` (about ten
times a second) and not by the number of steps. Nothing it writes is wider than the terminal: on a narrow one,
the parts of a line that are needed least are left out.

Losses have four significant digits, other metrics up to 1 four decimals (`0.9412`), rates two digits
(`1.0e-03`). `Progress` writes; `_Words` and the functions below it make texts and change nothing.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TextIO, get_args

from tqdm import tqdm

from lehr.errors import RequestError, nearest
from lehr.journal import (
    EpochEnded,
    Event,
    Interrupted,
    Note,
    Progressed,
    RunEnded,
    RunFailed,
    RunStarted,
    StageEnded,
    StageStarted,
    Validating,
)

Mode = Literal["auto", "bar", "lines", "off"]

_NAME_ROOM = 24  # columns that a stage's label or the name of a metric or a group may take
_BAR_ROOM = 6  # columns below which a bar says nothing
_FILLER = 8  # the rank from which parts of a line only fill it up
_GROUPS_NAMED = 4  # with more groups than this, the span of their rates is shown instead of each
_GLUE = "\xa0"  # a space at which no line is broken; written as a space
_BAR = "\0"  # one column of the bar to be; no name can hold it, since names are shown escaped
_BOLD, _RED, _GREEN, _YELLOW = "1", "31", "32", "33"


def progress(
    stream: TextIO | None = None,
    *,
    mode: Mode = "auto",
    environ: Mapping[str, str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """An observer that draws the events of a run on `stream`.

    Args:
        stream: where to; default standard error, and in a notebook standard output.
        mode: "bar" for a bar per epoch that leaves one line, "lines" for that line alone, "off" for nothing;
            "auto" is "bar" on a terminal and in a notebook, "lines" elsewhere (a file, a pipe, `TERM=dumb`).
        environ: the environment, default `os.environ`. Read are `NO_COLOR`, `TERM`, `COLUMNS` (which wins
            over the terminal's own width), and the rank: `RANK`, else `LOCAL_RANK`, else `SLURM_PROCID`
            where `WORLD_SIZE` is set. A process of another rank than 0 draws nothing.
        clock: seconds from any start, for the time that is left.

    Raises:
        RequestError: for an unknown mode.

    Example:
        >>> observer = progress(sys.stdout, mode="lines", environ={})
        >>> observer(EpochEnded(0, 0, 90, 0.5, {"valid_accuracy": 0.9}, {"head": 1e-3}, 3.21, 500.0, True))
        epoch 1 · train_loss=0.5000 valid_accuracy=0.9000 · lr head=1.0e-03 · 500 samples/s · 3.2 s · best
    """
    if mode not in get_args(Mode):
        raise RequestError(
            f"progress: mode is {mode!r}{nearest(str(mode), get_args(Mode)) or ';'} "
            f"expected one of {', '.join(get_args(Mode))}"
        )
    env = os.environ if environ is None else environ
    notebook = stream in (None, sys.stdout, sys.stderr) and _in_notebook()
    chosen = stream or (sys.stdout if notebook else sys.stderr)
    if chosen is None or _rank(env) != "0":  # a windowed program has no standard error
        return Progress(chosen, mode="off", environ=env, clock=clock, notebook=False)
    if mode == "auto":
        mode = "bar" if notebook or (chosen.isatty() and env.get("TERM") != "dumb") else "lines"
    return Progress(chosen, mode=mode, environ=env, clock=clock, notebook=notebook)


class Progress:
    """What `progress` makes: call it with events; `close` takes an unfinished bar away."""

    def __init__(
        self,
        stream: TextIO,
        *,
        mode: Mode,
        environ: Mapping[str, str],
        clock: Callable[[], float],
        notebook: bool,
    ) -> None:
        self._stream, self._mode, self._environ, self._clock = stream, mode, environ, clock
        self._notebook = notebook
        self._terminal = mode != "off" and stream.isatty()
        plain = environ.get("NO_COLOR", "") != "" or environ.get("TERM") == "dumb" or sys.platform == "win32"
        self._colours = mode == "bar" and self._terminal and not plain
        self._words = _Words.of(stream)
        self._bar: tqdm[None] | None = None
        self._bar_is = ("", -1)  # what the bar counts ("training", "validating"), and in which epoch
        self._bar_began = (0.0, 0)  # when it was first drawn, and what it showed then
        self._run: RunStarted | None = None
        self._stage: StageStarted | None = None
        self._epoch = 0
        self._last: Progressed | None = None
        self._headline: tuple[str, float] | None = None

    def __call__(self, event: Event) -> None:
        """Draw `event`. Where the stream has gone (a closed terminal), nothing is drawn any more."""
        if self._mode == "off":
            return
        try:
            self._draw(event)
        except OSError:  # the run is worth more than its picture, and there is no one left to tell
            self._mode, self._bar = "off", None

    def close(self) -> None:
        """Take an unfinished bar away, so that what is printed next begins on a line of its own."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._bar_is = None, ("", -1)

    def _draw(self, event: Event) -> None:
        words = self._words
        match event:
            case Progressed():
                self._epoch, self._last = event.epoch, event
                self._move("training", event.step - event.epoch_start, event.epoch_stop - event.epoch_start)
            case Validating():
                self._move("validating", event.done, event.total)
            case EpochEnded():
                self._epoch, self._headline = event.epoch + 1, _headline(event.metrics)
                self._say(words.epoch(event, self._run, self._room()), _GREEN if event.best else "")
            case RunStarted():
                self._run = event
                self._say(words.run(event))
            case StageStarted():
                self._stage, self._epoch, self._last = event, event.first_epoch, None
                self._say(words.stage(event, self._run), _BOLD)
            case Note():
                self._say(words.note(event), _YELLOW, keep_bar=True)
            case StageEnded() if event.reason != "length" or event.restored_epoch is not None:
                self._say(words.stage_ended(event))
            case RunEnded():
                self._say(words.run_ended(event), _BOLD)
            case RunFailed():
                self._say(words.failed(event), _RED)
            case Interrupted():
                self._say(f"interrupted after {_count(event.step, 'step')}", _YELLOW)
            case _:  # the losses of single steps, and a stage that ended as planned
                pass

    def _move(self, what: str, done: int, total: int) -> None:
        """Draw the bar at `done` of `total`; a new one where another epoch, or its validation, begins."""
        if self._mode != "bar":
            return
        if self._bar_is != (what, self._epoch):
            self.close()
            self._bar_is, self._bar_began = (what, self._epoch), (self._clock(), done)
        room = self._room()
        text = self._bar_text(what, done, total, room)
        # tqdm fills this text as a template; braces are rare in names, and shown as parentheses.
        text = text.replace("{", "(").replace("}", ")").replace(_GLUE, " ").replace(_BAR * _BAR_ROOM, "{bar}")
        columns = None if math.isinf(room) else int(room)
        if self._bar is None:
            self._bar = _tqdm(self._notebook)(
                total=total,
                initial=done,
                file=self._stream,
                leave=False,
                ncols=columns,
                mininterval=0,
                miniters=0,
                ascii=False if self._words.unicode else " #",
                bar_format=text,
                disable=False,
            )
        else:
            self._bar.bar_format, self._bar.ncols = text, columns
            self._bar.update(done - self._bar.n)

    def _bar_text(self, what: str, done: int, total: int, room: float) -> str:
        """The bar's line, with `_BAR` where the bar goes; parts of low rank are kept longest."""
        words, last = self._words, self._last
        loss = f" loss={_loss(last.loss)}" if last else ""
        phase = f" {words.dot} validating" if what == "validating" else ""
        lead = words.where(self._stage, self._run, self._epoch, room - _width(phase + loss)) + phase
        metric = words.metrics(dict([self._headline])) if self._headline else ""
        parts = [
            _Part(0, words.cut(lead, room)),
            _Part(2, f" |{_BAR * _BAR_ROOM}|"),
            _Part(_FILLER, f"{100 * done // max(total, 1):4d}%"),
            _Part(1, loss),
            _Part(3, f" {metric}" if metric else ""),
        ]
        if last and what == "training":
            parts.append(_Part(5, *(f" {text}" for text in words.rates(last.lr))))
            parts.append(_Part(4, words.joined(_speed(last.samples_per_second))))
        began, first = self._bar_began
        if done > first:
            left = (self._clock() - began) / (done - first) * (total - done)
            parts.append(_Part(_FILLER, words.joined(f"{tqdm.format_interval(left)} left")))
        return _fit(parts, room)

    def _say(self, text: str, colour: str = "", *, keep_bar: bool = False) -> None:
        """Write whole lines, above the bar where it is to stay."""
        if not keep_bar:
            if self._bar is not None and self._bar.total:
                self._bar.n = self._bar.total  # or a notebook would keep it, in red
            self.close()
        lines = [line for paragraph in text.split("\n") for line in _fold(paragraph, self._room())]
        shown = "\n".join(lines).replace(_GLUE, " ")
        if colour and self._colours:
            shown = f"\x1b[{colour}m{shown}\x1b[0m"
        if self._mode == "bar":
            tqdm.write(shown, file=self._stream)  # goes above any bar, also one that is not ours
        else:
            self._stream.write(shown + "\n")
        self._stream.flush()

    def _room(self) -> float:
        """The columns that a line may take: all but the last, after which some terminals wrap."""
        widget, file = self._notebook and self._mode == "bar", not self._terminal and self._mode == "lines"
        if widget or file:
            return math.inf
        columns = self._environ.get("COLUMNS", "")
        if columns.isascii() and columns.isdigit() and int(columns) > 0:
            return max(int(columns) - 1, 10)
        try:
            found = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):  # not a terminal, or no file at all
            found = 0
        return max((found or 80) - 1, 10)


@dataclass(frozen=True)
class _Words:
    """Events in words that a stream can show: its `encoding`, and whether that has our signs (`unicode`)."""

    encoding: str
    unicode: bool

    @classmethod
    def of(cls, stream: TextIO | None) -> _Words:
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
        return "·" if self.unicode else "-"

    @property
    def ellipsis(self) -> str:
        return "…" if self.unicode else ".."

    def shown(self, text: str) -> str:
        r"""`text` with every character escaped that is not printable (`\x1b`) or not in the encoding."""
        safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
        return safe.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def name(self, text: str, room: float = _NAME_ROOM) -> str:
        return self.cut(self.shown(text), room)

    def cut(self, text: str, room: float) -> str:
        """`text`, or as much of it as fits before an ellipsis."""
        if _width(text) <= room:
            return text
        return text[: _prefix(text, room - len(self.ellipsis))] + self.ellipsis

    def joined(self, text: str) -> str:
        return f" {self.dot} {text}" if text else ""

    def metrics(self, values: Mapping[str, float]) -> str:
        return " ".join(f"{self.name(name)}={_metric(name, value)}" for name, value in values.items())

    def rates(self, lr: Mapping[str, float]) -> tuple[str, ...]:
        """The rates of all groups, and as a shorter way to say it their span; nothing without groups.

        >>> _Words("utf-8", True).rates({"head": 1e-3, "backbone": 1e-4})
        ('lr head=1.0e-03 backbone=1.0e-04', 'lr 1.0e-04…1.0e-03')
        """
        if not lr:
            return ()
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
        parts = [f"{_count(event.total_epochs, 'epoch')}, {_count(event.total_steps, 'step')}"]
        validate = f", {_count(event.samples_valid)} to validate" if event.samples_valid else ""
        parts.append(_count(event.samples_train, "sample") + validate)
        parts.append(f"{self.shown(event.device)}{_GLUE}{self.shown(event.precision)}")
        return f" {self.dot} ".join(parts)

    def stage(self, event: StageStarted, run: RunStarted | None) -> str:
        of = f"/{run.stages}" if run else ""
        share = event.trained_parameters / max(event.total_parameters, 1)
        trains = f"{_count(event.trained_parameters)} of {_count(event.total_parameters, 'parameter')}"
        return f" {self.dot} ".join(
            [
                f"stage {event.stage + 1}{of}",
                self.shown(event.label),
                _count(event.epochs, "epoch"),
                f"trains {trains} ({_percent(share)})",
            ]
        )

    def epoch(self, event: EpochEnded, run: RunStarted | None, room: float) -> str:
        """The line that an epoch leaves; the parts with the lowest ranks are kept longest."""
        total = str(run.total_epochs) if run else ""
        number = f"{event.epoch + 1:>{len(total)}}/{total}" if run else str(event.epoch + 1)
        headline = _headline(event.metrics)
        parts = [
            _Part(0, f"epoch {number} {self.dot}"),
            _Part(3, f" train_loss={_loss(event.train_loss)}"),
        ]
        for name, value in event.metrics.items():
            rank = 1 if headline and name == headline[0] else 4
            parts.append(_Part(rank, " " + self.metrics({name: value})))
        parts.append(_Part(7, *(self.joined(text) for text in self.rates(event.lr))))
        parts.append(_Part(6, self.joined(_speed(event.samples_per_second))))
        parts.append(_Part(5, self.joined(_seconds(event.seconds))))
        if event.best:
            parts.append(_Part(2, self.joined("best")))
        return _fit(parts, room)

    def note(self, event: Note) -> str:
        lines = [self.shown(line) for line in event.text.splitlines()]
        return "! " + "\n  ".join(lines)

    def stage_ended(self, event: StageEnded) -> str:
        text = f"stage {event.stage + 1} ended"
        if event.reason != "length":
            text += f" early ({self.shown(event.reason)})"
        if event.restored_epoch is not None:
            text += self.joined(f"weights of epoch {event.restored_epoch + 1} restored")
        return text

    def run_ended(self, event: RunEnded) -> str:
        text = "done" if event.reason == "length" else f"done ({self.shown(event.reason)})"
        text += self.joined(f"{_count(event.step, 'step')} in {_seconds(event.seconds)}")
        if event.best_epoch is not None:
            text += self.joined(f"best epoch{_GLUE}{event.best_epoch + 1}")
        return text + self.joined(self.metrics(event.metrics))

    def failed(self, event: RunFailed) -> str:
        error = self.shown(" ".join(event.error.split()))
        return f"failed in stage {event.stage + 1} after {_count(event.step, 'step')}: {error}"


class _Part(NamedTuple):
    """A part of a line: how soon it must go (rank 0 never), its text, and a shorter text for less room."""

    rank: int
    text: str = ""
    shorter: str = ""


def _fit(parts: Sequence[_Part], room: float) -> str:
    """The parts that fit into `room` columns, in the order they stand.

    They are chosen by rank up to the first that does not fit, so that the order in which parts go is the same
    at every width; from `_FILLER` on they are taken wherever there is room for them.

    >>> parts = [_Part(0, "epoch 1"), _Part(2, " lr=0.1"), _Part(1, " valid_accuracy=0.9"), _Part(9, " 50%")]
    >>> _fit(parts, 40), _fit(parts, 27), _fit(parts, 20)
    ('epoch 1 lr=0.1 valid_accuracy=0.9 50%', 'epoch 1 valid_accuracy=0.9', 'epoch 1 50%')
    """
    chosen, used, full = [""] * len(parts), 0, False
    for index in sorted(range(len(parts)), key=lambda index: parts[index].rank):
        rank, text, shorter = parts[index]
        fitting = [choice for choice in (text, shorter) if choice and used + _width(choice) <= room]
        if rank == 0:
            chosen[index] = text
        elif fitting and (not full or rank >= _FILLER):
            chosen[index] = fitting[0]
        full = full or bool(text and not chosen[index])
        used += _width(chosen[index])
    return "".join(chosen)


def _fold(text: str, room: float, indent: str = "  ") -> list[str]:
    """`text` as lines of at most `room` columns, broken at spaces; lines after the first are indented.

    >>> _fold("stage 1/2 trains 6 parameters", 16)
    ['stage 1/2 trains', '  6 parameters']
    """
    if _width(text) <= room:
        return [text]
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line.strip() else line + word
        if _width(longer) > room and line.strip():
            lines.append(line)
            longer = indent + word
        line = longer
        while _width(line) > room:  # one word that is longer than a line
            end = max(_prefix(line, room), len(indent) + 1)
            lines.append(line[:end])
            line = indent + line[end:]
    return [*lines, line]


def _width(text: str) -> int:
    """Columns on a terminal: wide East Asian characters take two; combining marks are counted, to be safe."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(c) in "FW" else 1 for c in text)


def _prefix(text: str, room: float) -> int:
    """How many characters of `text` fit into `room` columns."""
    used = 0
    for index, character in enumerate(text):
        used += _width(character)
        if used > room:
            return index
    return len(text)


def _headline(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """The one metric to show where there is room for one: the first that is no loss."""
    names = sorted(metrics, key=lambda name: "loss" in name)
    return (names[0], metrics[names[0]]) if names else None


def _loss(value: float) -> str:
    """Four significant digits.

    >>> _loss(0.312), _loss(12345.6), _loss(float("nan"))
    ('0.3120', '1.235e+04', 'nan')
    """
    return f"{value:#.4g}".removesuffix(".")


def _metric(name: str, value: float) -> str:
    """Four decimals for shares such as an accuracy, four significant digits for losses and large numbers."""
    return _loss(value) if "loss" in name or abs(value) > 1 else f"{value:.4f}"


def _speed(samples_per_second: float) -> str:
    """`512 samples/s`; nothing where it is not known yet."""
    if not math.isfinite(samples_per_second) or samples_per_second <= 0:
        return ""
    number = f"{samples_per_second:.0f}" if samples_per_second >= 10 else f"{samples_per_second:.2g}"
    return f"{number}{_GLUE}samples/s"


def _seconds(seconds: float) -> str:
    """How long something took.

    >>> [_seconds(s).replace(_GLUE, " ") for s in (0.04, 59.97, 83, 7509)]
    ['0.04 s', '1 min 00 s', '1 min 23 s', '2 h 05 min']
    """
    if seconds < 59.95:
        return f"{seconds:.2f}{_GLUE}s" if seconds < 1 else f"{seconds:.1f}{_GLUE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_GLUE}min{_GLUE}{rest:02d}{_GLUE}s"
    return f"{minutes // 60}{_GLUE}h{_GLUE}{minutes % 60:02d}{_GLUE}min"


def _count(number: int, unit: str = "") -> str:
    """A whole number in groups of three, with its unit.

    >>> _count(2230277, "step").replace(_GLUE, " "), _count(1, "step").replace(_GLUE, " ")
    ('2 230 277 steps', '1 step')
    """
    text = f"{number:,}".replace(",", _GLUE)
    return f"{text}{_GLUE}{unit}{'' if number == 1 else 's'}" if unit else text


def _percent(share: float) -> str:
    """A share as a person reads it: never 0 % for some, nor 100 % for not quite all.

    >>> [_percent(s).replace(_GLUE, " ") for s in (0, 0.00001, 0.00287, 0.42, 0.99999, 1)]
    ['0 %', '< 0.1 %', '0.3 %', '42.0 %', '> 99.9 %', '100 %']
    """
    if share in (0, 1):
        return f"{100 * share:.0f}{_GLUE}%"
    sign, value = ("<", 0.1) if share < 0.001 else (">", 99.9) if share > 0.999 else ("", 100 * share)
    return f"{sign}{_GLUE}{value:.1f}{_GLUE}%".lstrip(_GLUE)


def _rank(environ: Mapping[str, str]) -> str:
    """This process's rank. Slurm's number counts in a distributed run only, for it also numbers a sweep."""
    slurm = environ.get("SLURM_PROCID", "0") if "WORLD_SIZE" in environ else "0"
    return environ.get("RANK") or environ.get("LOCAL_RANK") or slurm


def _in_notebook() -> bool:
    """Whether a notebook's kernel runs us: IPython is loaded already, and was started by one."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def _tqdm(notebook: bool) -> Callable[..., tqdm[None]]:
    """The bar's class: tqdm.auto only where it would draw a widget, since elsewhere importing it warns."""
    if notebook and importlib.util.find_spec("ipywidgets"):
        from tqdm.auto import tqdm as widget

        return widget
    return tqdm
