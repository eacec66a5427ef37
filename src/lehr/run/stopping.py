"""Ctrl-C, SIGTERM and a terminal that closes (SIGHUP), as a wish that the loop grants between two steps.

It knows signals, nothing of runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_USUAL: dict[signal.Signals, Any] = {
    number: signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    for number in signal.Signals
    if number.name in ("SIGINT", "SIGTERM", "SIGHUP")  # the last is unknown on Windows
}

_OF_CHILDREN = [number for number in signal.Signals if number.name == "SIGCHLD"]
"""Unheard while a stop is wanted: a SIGTERM to all processes of a job kills the workers too, of which torch would
raise an error in the middle of the step that is to be finished."""


class Stopped(BaseException):
    """The person, or the system, wants the run to stop; the state is that of a whole step."""


class Stop:
    """Whether the run is wanted to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal = 0

    def check(self) -> None:
        """Raise `Stopped` where a stop is wanted."""
        if self.signal:
            raise Stopped

    def leave(self) -> BaseException:
        """What ends the program now that all is saved: exit code 130 after Ctrl-C, 143 after SIGTERM, 129 after
        SIGHUP.
        """
        return KeyboardInterrupt() if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


def _unheard(_: int, __: FrameType | None) -> None:
    """Not SIG_DFL: of a signal that is on its way Python would say that it was ignored."""


def was_asked(error: BaseException) -> bool:
    """Whether an error is a wish to stop: Ctrl-C, or what `Stop.leave` makes of the other signals."""
    codes = [128 + number for number in _USUAL if number != signal.SIGINT]
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in codes)


@contextmanager
def stopping(*, saved: bool = True) -> Iterator[Stop]:
    """Within this context the first Ctrl-C, SIGTERM or SIGHUP becomes a wish. A Ctrl-C or SIGTERM after that acts
    as it always did; a SIGHUP changes nothing more, since of one closed terminal both the system and the shell
    send it.

    A handler that the person has installed is left in its place, and so is a signal that is ignored (`nohup`);
    so is everything outside the main thread, where Python knows no signals. `saved` is for the words that are
    said: whether there will be a checkpoint.
    """
    stop, owner = Stop(), os.getpid()
    how = ", with a checkpoint" if saved else ""
    said = f"\nstopping after this step{how}; Ctrl-C again leaves at once\n".encode()
    before: dict[int, Any] = {}

    def wish(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker, which has inherited this: the step under way needs its samples
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if stop.signal:
            return
        stop.signal = number
        for each in before.keys() & {signal.SIGINT, signal.SIGTERM}:
            signal.signal(each, before[each])
        for each in _OF_CHILDREN:
            if (handler := signal.getsignal(each)) is not None:
                before[each] = handler
                signal.signal(each, _unheard)
        if sys.__stderr__ is not None:  # else its number may be another file's
            with suppress(OSError, ValueError):  # not print: a signal may come in the middle of one
                os.write(sys.__stderr__.fileno(), said)

    if threading.current_thread() is threading.main_thread():
        before = {each: handler for each, handler in _USUAL.items() if signal.getsignal(each) == handler}
        for each in before:
            signal.signal(each, wish)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
