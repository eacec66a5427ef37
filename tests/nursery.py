"""Processes to be stopped in the middle of their work: copies of one that has everything loaded.

A test's own process would be a bad parent: it has threads by then, and where there is a GPU, autograd refuses
to work in the copy of a process that has used it. So the first need starts a clean one, which loads what a run
needs, does as it is told, and ends with the tests. It knows nothing of runs.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

LONGEST = 120.0
"""Seconds after which a process is killed in any case."""
_LOOK = 0.0005


@dataclass(frozen=True)
class Kill:
    """When to kill a process: so many seconds after the file `log` has come to a size; after its start, without."""

    seconds: float
    log: Path | None = None
    size: int = 0

    def begun(self) -> bool:
        """Whether the seconds are to be counted now."""
        return self.log is None or (self.log.exists() and self.log.stat().st_size >= self.size)


NEVER = Kill(LONGEST)


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-9 where it was killed), the seconds it lived, what it printed."""

    code: int
    seconds: float
    said: str


class Nursery:
    """Does work in processes of its own, one at a time.

    Args:
        warm_up: done once in the parent of them all, so that none of them has to load anything.
    """

    def __init__(self, warm_up: Callable[[], object]) -> None:
        here = Path(__file__).resolve().parent
        paths = os.pathsep.join([str(here), *filter(None, sys.path)])
        # Without a GPU, the parent may use autograd and its copies, too.
        environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._ask(("warm up", warm_up))

    def run(self, work: Callable[[], object], *, kill: Kill = NEVER) -> Ended:
        """Do `work`, a function of a module or a `partial` of one.

        Its exit code is that of a program: 1 where it raises, 130 for a KeyboardInterrupt.
        """
        ended: Ended = self._ask(("run", work, kill))
        return ended

    def left(self, wait: float) -> int:
        """How many of the processes had begun others that still live, after waiting for them to end."""
        left: int = self._ask(("left", wait))
        return left

    def close(self) -> None:
        """End the parent."""
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _ask(self, what: tuple[Any, ...]) -> Any:
        assert self._server.stdin
        assert self._server.stdout
        try:
            pickle.dump(what, self._server.stdin)
            self._server.stdin.flush()
            return pickle.load(self._server.stdout)
        except (EOFError, BrokenPipeError):
            code = self._server.wait(timeout=LONGEST)
            raise ChildProcessError(f"the parent of the processes has ended with {code}") from None


@cache
def nursery(warm_up: Callable[[], object]) -> Nursery:
    """The one nursery of this process."""
    made = Nursery(warm_up)
    atexit.register(made.close)
    return made


def _serve() -> None:
    """The parent's work: read what is asked, do it, answer, until nobody is there to ask."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    pipes: list[int] = []
    while True:
        try:
            what, *said = pickle.load(questions)
        except EOFError:
            return
        answer: object = None
        if what == "warm up":
            said[0]()
            gc.collect()
            gc.freeze()  # else each child would look at, and so copy, all that was loaded
        elif what == "run":
            answer = _run(*said, pipes)
        else:
            pipes = _open(pipes, said[0])
            answer = len(pipes)
        pickle.dump(answer, answers)
        answers.flush()


def _run(work: Callable[[], object], kill: Kill, pipes: list[int]) -> Ended:
    pipes[:] = _open(pipes, 0.0)
    reads, writes = os.pipe()  # its end that writes is open as long as the child or a child of its own lives
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        child = os.fork()
        if not child:
            _work(work, log)
        os.close(writes)
        pipes.append(reads)
        done = status = 0
        until = began + LONGEST
        while not done and time.monotonic() < until:
            if until == began + LONGEST and kill.begun():
                until = time.monotonic() + kill.seconds
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0 if done else _LOOK)
        if not done:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - began
        log.seek(0)
        said = log.read().decode(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), seconds, said)


def _work(work: Callable[[], object], log: IO[bytes]) -> None:
    """The child's life."""
    for standard in (1, 2):
        os.dup2(log.fileno(), standard)
    code = 1
    try:
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def _open(pipes: list[int], wait: float) -> list[int]:
    """Of the pipes, those that somebody could still write into, after waiting for so many seconds."""
    pipes, until = list(pipes), time.monotonic() + wait
    while pipes:
        ended, _, _ = select.select(pipes, [], [], max(0.0, until - time.monotonic()))
        for pipe in ended:
            os.close(pipe)
            pipes.remove(pipe)
        if not ended:
            break
    return pipes


if __name__ == "__main__":
    import nursery as _itself  # what is pickled is of the module, not of the program

    _itself._serve()
