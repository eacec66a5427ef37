"""A progress bar for anybody's loop: tqdm's, made so that what is set at every step costs next to nothing.

tqdm makes a text of every number that it is given, at every step, and by default draws it. Here `set_postfix` and
`set_description` only keep what they are given; it becomes a text, and a tensor a number, when the bar is drawn anew,
which is at most ten times a second. tqdm still does the drawing, so that bars of both kinds stand below each other.
This file must not know torch, nor what is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Generic, TextIO, TypeVar

from tqdm import tqdm

from lehr.errors import RequestError
from lehr.terminal import Mode, Sink, bar_format, columns_of
from lehr.wording import BAR, BAR_ROOM, FILLER, GLUE, Part, Words, count, fit, width

T = TypeVar("T")
REFRESH = 0.1
"""Seconds between two drawings of a bar, at least."""
LINE = 30.0
"""Seconds between two lines where there is no terminal, at least."""
_VALUE_ROOM = 40  # columns that a value which is no number may take


def bar(
    iterable: Iterable[T] | None = None,
    description: str = "",
    *,
    total: int | None = None,
    leave: bool | None = None,
    stream: TextIO | None = None,
    mode: Mode = "auto",
    environ: Mapping[str, str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Bar[T]:
    """A progress bar over `iterable`, or one that is moved by hand with `update`.

    Use it as an iterable, as a context, or as both. `set_postfix(d_loss=..., g_loss=...)` and `set_description(...)`
    may be called at every step: they keep what they are given, and only what is drawn is made a text, at most ten
    times a second. Tensors are taken as they are: a GPU is waited for when the bar is drawn, not at every step. (A
    tensor that is changed in place shows what it is by then.)

    Args:
        iterable: what to go through; its length, where it has one, is the total. None for a bar moved by `update`.
        description: what stands before the bar.
        total: how many there will be, where `iterable` does not say; None shows counts alone.
        leave: whether the bar stays when it is done; None lets an outermost bar stay and takes an inner one away.
        stream, mode, environ: as in `lehr.progress.progress`: by default a bar on a terminal and in a notebook,
            elsewhere a line now and then (every 30 seconds) and one at the end; "off" draws nothing. A process of
            another rank than 0 draws nothing.
        clock: seconds from any start.

    Raises:
        RequestError: for an unknown mode, a total that is no number from 0 on, or going through a bar that has nothing
            to go through.

    Example:
        >>> import sys
        >>> with bar(range(3), "epoch 1", stream=sys.stdout, mode="lines", clock=lambda: 0.0) as steps:
        ...     for step in steps:
        ...         steps.set_postfix(d_loss=0.6931, g_loss=1.2039, lr=2e-4)
        epoch 1 · 3/3 · d_loss=0.6931 g_loss=1.204 lr=2.0e-04
    """
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total < 0):
        raise RequestError(f"bar: total is {total!r}; expected a whole number from 0 on, or None")
    if total is None and isinstance(iterable, Sized):
        try:
            total = len(iterable)
        except TypeError:  # a DataLoader over a stream of samples says so when it is asked
            total = None
    return Bar(Sink.of("bar", stream, mode, environ), iterable, total, description, leave, clock)


class Bar(Generic[T]):
    """What `lehr.bar` makes. `n` is how many are done, `total` how many there will be, or None."""

    def __init__(
        self,
        sink: Sink,
        iterable: Iterable[T] | None,
        total: int | None,
        description: str,
        leave: bool | None,
        clock: Callable[[], float],
    ) -> None:
        self.n, self.total = 0, total
        self._sink, self._iterable, self._leave, self._clock = sink, iterable, leave, clock
        self._words = Words.of(sink.stream)
        self._description = description
        self._postfix: Mapping[str, Any] = {}
        self._drawn: tqdm[None] | None = None
        self._pause = REFRESH if sink.mode == "bar" else LINE
        self._began: float | None = None  # when it was first drawn; None before, and again when it is closed
        self._due = float("inf")  # so that a bar that draws nothing asks no more than that

    def __iter__(self) -> Iterator[T]:
        if self._iterable is None:
            raise RequestError(
                "bar: there is nothing to go through; give bar(iterable), or move it with update()"
            )
        clock, outermost = self._clock, self._began is None
        if outermost:
            self.n = 0
        self.__enter__()
        try:
            for item in self._iterable:
                yield item
                self.n += 1
                if clock() >= self._due:
                    self.refresh()
        finally:  # at the end, and where the loop is left by break or an error
            if outermost:
                self.close()

    def __enter__(self) -> Bar[T]:
        if self._began is None and self._sink.mode != "off":
            self._began = self._clock()
            self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The total.

        Raises:
            TypeError: where it is not known, as for any iterable without a length.
        """
        if self.total is None:
            raise TypeError("this bar has no length: its total is not known")
        return self.total

    def __bool__(self) -> bool:
        return True  # whatever its length

    def update(self, n: int = 1) -> None:
        """Count `n` more; drawn when the bar is next due."""
        self.n += n
        if self._began is None:
            self.__enter__()
        elif self._clock() >= self._due:
            self.refresh()

    def set_postfix(self, values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """What stands after the bar, in the place of what stood there; numbers, tensors of one, or anything else.

        It is kept as it is and made a text when the bar is next drawn.
        """
        self._postfix = {**values, **named} if values else named
        if self._clock() >= self._due:
            self.refresh()

    def set_description(self, text: str = "") -> None:
        """What stands before the bar; shown when it is next drawn."""
        self._description = text
        if self._clock() >= self._due:
            self.refresh()

    def refresh(self) -> None:
        """Draw the bar as it is now, due or not; where there is no terminal, write a line."""
        if self._began is None:
            return
        try:
            if self._sink.mode == "bar":
                self._draw()
            elif self._due < float("inf"):  # the first line is due after a pause
                self._line()
        except OSError:  # the loop is worth more than its picture, and there is no one left to tell
            self._let_go()
            return
        self._due = self._clock() + self._pause

    def close(self) -> None:
        """Draw the bar a last time, as far as it has come, and leave it; what is printed next begins a new line."""
        if self._began is None:
            return
        try:
            if self._sink.mode == "bar":
                self._draw()
            elif self._leave is not False:
                self._line()
            if self._drawn is not None:
                self._drawn.close()
        except OSError:
            pass
        self._let_go()

    def _let_go(self) -> None:
        if self._drawn is not None:
            self._drawn.disable = True  # it draws no more, not even when it is collected
        self._drawn, self._began, self._due = None, None, float("inf")
        self._postfix = {}  # tensors may hold on to much

    def _draw(self) -> None:
        room = self._sink.room
        text, columns = bar_format(self._text(room)), columns_of(room)
        if self._drawn is None:
            self._drawn = self._sink.tqdm(
                total=self._total, initial=self.n, file=self._sink.stream, leave=self._leave, ncols=columns,
                mininterval=0, miniters=0, ascii=False if self._words.unicode else " #", bar_format=text, disable=False,
            )  # fmt: skip
            if self._leave is None:  # a widget would go even where it is the outermost
                self._drawn.leave = not self._drawn.pos
        else:
            self._drawn.bar_format, self._drawn.ncols = text, columns
            self._drawn.n, self._drawn.total = self.n, self._total
            self._drawn.refresh()

    def _line(self) -> None:
        self._sink.stream.write(self._text(self._sink.room).replace(GLUE, " ") + "\n")
        self._sink.stream.flush()

    @property
    def _total(self) -> int | None:
        """The total, as long as it can be true."""
        return self.total if self.total is not None and self.n <= self.total else None

    def _text(self, room: float) -> str:
        """The line; parts of low rank are kept longest."""
        words, total = self._words, self._total
        lead = words.cut(words.shown(self._description), room / 2)
        done = count(self.n) + (f"/{count(total)}" if total is not None else "")
        barred = self._sink.mode == "bar" and total is not None
        values = " ".join(self._value(name, value) for name, value in self._postfix.items())
        shorter = words.cut(values, max(room - width(lead + done) - 4, 1)) if values else ""
        parts = [Part(1, lead)]
        if barred and total is not None:
            parts.append(Part(3, f" |{BAR * BAR_ROOM}|"))
            parts.append(Part(FILLER, f"{100 * self.n // max(total, 1):4d}%"))
        parts.append(Part(0, f" {done}" if barred or not lead else words.joined(done)))
        parts.append(Part(2, words.joined(values), words.joined(shorter)))
        return fit([*parts, *self._pace(total)], room).strip()

    def _pace(self, total: int | None) -> list[Part]:
        """How fast it goes, and how long it will still take, or has taken."""
        seconds = self._clock() - (self._began or 0.0)
        if not self.n or seconds <= 0:
            return []
        pace = self.n / seconds
        number, unit = (pace, "it/s") if pace >= 1 else (1 / pace, "s/it")
        text = f"{number:,.0f}{GLUE}{unit}" if number >= 10 else f"{number:.2g}{GLUE}{unit}"
        left = total is not None and self.n < total
        time_text = tqdm.format_interval((total - self.n) / pace if left and total else seconds)
        return [
            Part(FILLER, self._words.joined(f"{time_text}{GLUE}left" if left else time_text)),
            Part(FILLER + 1, self._words.joined(text)),
        ]

    def _value(self, name: str, value: Any) -> str:
        """`name=value`, as in the bar of a run: losses with four digits, rates with two."""
        item = getattr(value, "item", None)  # tensors and numpy's numbers
        if callable(item):
            try:
                value = item()
            except (RuntimeError, ValueError):  # more than one element: only its shape has room
                value = f"[{', '.join(map(str, getattr(value, 'shape', ())))}]"
        if isinstance(value, float):
            if name == "lr" or name.endswith("_lr") or name.startswith("lr_"):
                return f"{self._words.name(name)}={value:.1e}"
            return self._words.metrics({name: value})
        text = (
            count(value)
            if isinstance(value, int) and not isinstance(value, bool)
            else self._words.shown(str(value))
        )
        return f"{self._words.name(name)}={self._words.cut(text, _VALUE_ROOM)}"
