"""An observer that draws a run while it runs: a bar on a terminal or in a notebook, plain lines elsewhere.

It draws what the events of `lehr.events` say and must know nothing else: no model, no tensor, no recipe.
It draws only when an event comes, so that its cost is set by how often the loop sends `Progressed` (about ten
times a second) and not by the number of steps. Nothing it writes is wider than the terminal: on a narrow one,
the parts of a line that are needed least are left out.

Losses have four significant digits, other metrics up to 1 four decimals (`0.9412`), rates two digits
(`1.0e-03`). `Progress` writes; `Words` and the functions below it make texts and change nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TextIO

from tqdm import tqdm

from lehr.events import (
    CacheClosed,
    CheckpointFailed,
    ConditionMet,
    EpochEnded,
    Event,
    Interrupted,
    Note,
    PrefixCached,
    Progressed,
    RateReduced,
    Resumed,
    RunEnded,
    RunFailed,
    RunStarted,
    StageEnded,
    StageStarted,
    Validating,
)
from lehr.terminal import Mode, Sink, bar_format, columns_of
from lehr.wording import (
    BAR,
    BAR_ROOM,
    FILLER,
    GLUE,
    Part,
    Words,
    count,
    fit,
    fold,
    headline_of,
    losses_text,
    speed,
    width,
)

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
    return Progress(Sink.of("progress", stream, mode, environ), clock=clock)


class Progress:
    """What `progress` makes: call it with events; `close` takes an unfinished bar away."""

    def __init__(self, sink: Sink, *, clock: Callable[[], float]) -> None:
        self._sink, self._clock = sink, clock
        self._stream, self._mode = sink.stream, sink.mode
        env = sink.environ
        plain = env.get("NO_COLOR", "") != "" or env.get("TERM") == "dumb" or sys.platform == "win32"
        self._colours = sink.mode == "bar" and sink.terminal and not plain
        self._words = Words.of(sink.stream)
        self._bar: tqdm[None] | None = None
        self._bar_is = ("", -1)  # what the bar counts ("training", "validating"), and in which epoch
        self._bar_began = (0.0, 0)  # when it was first drawn, and what it showed then
        self._run: RunStarted | None = None
        self._resumed: Resumed | None = None  # until the stage in which the run goes on is told
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
                self._epoch, self._headline = event.epoch + 1, headline_of(event.metrics)
                self._say(words.epoch(event, self._run, self._sink.room), _GREEN if event.best else "")
            case Resumed():  # shown below, once it is known how long the run is
                self._resumed = event
            case RunStarted():
                self._run = event
                self._say(words.run(event))
                if self._resumed:
                    self._say(words.resumed(self._resumed, event), _BOLD)
            case StageStarted():
                epoch = self._resumed.epoch if self._resumed else event.first_epoch
                self._stage, self._epoch, self._last, self._resumed = event, epoch, None, None
                self._say(words.stage(event, self._run), _BOLD)
            case Note():
                self._say(words.note(event), _YELLOW, keep_bar=True)
            case ConditionMet():
                if self._run:
                    self._run = replace(
                        self._run, total_steps=event.total_steps, total_epochs=event.total_epochs
                    )
                self._say(words.condition_met(event), _BOLD)
            case RateReduced():
                self._say(words.rate_reduced(event), _BOLD)
            case PrefixCached() if event.data == "train":
                self._say(words.prefix_cached(event), keep_bar=True)
            case CacheClosed() if event.data == "train" and event.read:
                self._say(words.cache_closed(event))
            case StageEnded() if event.reason == "patience" or event.restored_epoch is not None:
                self._say(words.stage_ended(event))
            case RunEnded():
                self._say(words.run_ended(event), _BOLD)
            case RunFailed():
                self._say(words.failed(event), _RED)
            case Interrupted():
                self._say(f"interrupted after {count(event.step, 'step')}", _YELLOW)
            case CheckpointFailed():
                self._say(words.checkpoint_failed(event), _RED, keep_bar=True)
            case _:  # the losses of single steps, and what went as planned
                pass

    def _move(self, what: str, done: int, total: int) -> None:
        """Draw the bar at `done` of `total`; a new one where another epoch, or its validation, begins."""
        if self._mode != "bar":
            return
        if self._bar_is != (what, self._epoch):
            self.close()
            self._bar_is, self._bar_began = (what, self._epoch), (self._clock(), done)
        room = self._sink.room
        text = self._bar_text(what, done, total, room)
        text, columns = bar_format(text), columns_of(room)
        if self._bar is None:
            self._bar = self._sink.tqdm(
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
        """The bar's line, with `BAR` where the bar goes; parts of low rank are kept longest."""
        words, last = self._words, self._last
        loss = f" {losses_text(last.loss, last.losses)}" if last else ""
        phase = f" {words.dot} validating" if what == "validating" else ""
        lead = words.where(self._stage, self._run, self._epoch, room - width(phase + loss)) + phase
        metric = words.metrics(dict([self._headline])) if self._headline else ""
        parts = [
            Part(0, words.cut(lead, room)),
            Part(2, f" |{BAR * BAR_ROOM}|"),
            Part(FILLER, f"{100 * done // max(total, 1):4d}%"),
            Part(1, loss),
            Part(3, f" {metric}" if metric else ""),
        ]
        if last and what == "training":
            parts.append(Part(5, *(f" {text}" for text in words.rates(last.lr))))
            parts.append(Part(4, words.joined(speed(last.samples_per_second))))
        began, first = self._bar_began
        if done > first:
            left = (self._clock() - began) / (done - first) * (total - done)
            parts.append(Part(FILLER, words.joined(f"{tqdm.format_interval(left)} left")))
        return fit(parts, room)

    def _say(self, text: str, colour: str = "", *, keep_bar: bool = False) -> None:
        """Write whole lines, above the bar where it is to stay."""
        if not keep_bar:
            if self._bar is not None and self._bar.total:
                self._bar.n = self._bar.total  # or a notebook would keep it, in red
            self.close()
        lines = [line for paragraph in text.split("\n") for line in fold(paragraph, self._sink.room)]
        shown = "\n".join(lines).replace(GLUE, " ")
        if colour and self._colours:
            shown = f"\x1b[{colour}m{shown}\x1b[0m"
        if self._mode == "bar":
            tqdm.write(shown, file=self._stream)  # goes above any bar, also one that is not ours
        else:
            self._stream.write(shown + "\n")
        self._stream.flush()
