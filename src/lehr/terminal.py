"""Where a bar is drawn: on a terminal, in a notebook, in a file; how wide that is, and by which of tqdm's classes.

For `progress.py`, which draws the events of a run, and `bars.py`, which draws anybody's loop. It must not know what
is drawn.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TextIO, get_args

from tqdm import tqdm

from lehr.errors import RequestError, nearest
from lehr.wording import BAR, BAR_ROOM, GLUE

Mode = Literal["auto", "bar", "lines", "off"]


@dataclass(frozen=True)
class Sink:
    """Where to draw, and how: `mode` is "bar", "lines" or "off", no longer "auto"; `terminal` says whether what is
    drawn goes to one.
    """

    stream: TextIO
    mode: Mode
    notebook: bool
    terminal: bool
    environ: Mapping[str, str]

    @classmethod
    def of(cls, what: str, stream: TextIO | None, mode: Mode, environ: Mapping[str, str] | None) -> Sink:
        """The sink that `mode` asks for; a process of another rank than 0 draws nothing.

        Raises:
            RequestError: for an unknown mode, in the name of `what`.
        """
        if mode not in get_args(Mode):
            raise RequestError(
                f"{what}: mode is {mode!r}{nearest(str(mode), get_args(Mode)) or ';'} "
                f"expected one of {', '.join(get_args(Mode))}"
            )
        env = os.environ if environ is None else environ
        notebook = stream in (None, sys.stdout, sys.stderr) and _in_notebook()
        chosen = stream or (sys.stdout if notebook else sys.stderr)
        if chosen is None or _rank(env) != "0":  # a windowed program has no standard error
            return cls(chosen, "off", False, False, env)
        if mode == "auto":
            mode = "bar" if notebook or (chosen.isatty() and env.get("TERM") != "dumb") else "lines"
        return cls(chosen, mode, notebook, mode != "off" and chosen.isatty(), env)

    @property
    def room(self) -> float:
        """The columns that a line may take: all but the last, after which some terminals wrap."""
        widget, file = self.notebook and self.mode == "bar", not self.terminal and self.mode == "lines"
        if widget or file:
            return math.inf
        columns = self.environ.get("COLUMNS", "")
        if columns.isascii() and columns.isdigit() and int(columns) > 0:
            return max(int(columns) - 1, 10)
        try:
            found = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):  # not a terminal, or no file at all
            found = 0
        return max((found or 80) - 1, 10)

    @property
    def tqdm(self) -> Callable[..., tqdm[None]]:
        """The bar's class: tqdm.auto only where it would draw a widget, since elsewhere importing it warns."""
        if self.notebook and importlib.util.find_spec("ipywidgets"):
            from tqdm.auto import tqdm as widget

            return widget
        return tqdm


def columns_of(room: float) -> int | None:
    """`room` as tqdm wants it: None where there is no limit."""
    return None if math.isinf(room) else int(room)


def bar_format(text: str) -> str:
    """`text` as tqdm takes it, with its bar where `BAR` stands: it fills this as a template, so braces, which are
    rare in names, are shown as parentheses.

    >>> bar_format("{x}" + BAR * BAR_ROOM)
    '(x){bar}'
    """
    return text.replace("{", "(").replace("}", ")").replace(GLUE, " ").replace(BAR * BAR_ROOM, "{bar}")


def _rank(environ: Mapping[str, str]) -> str:
    """This process's rank. Slurm's number counts in a distributed run only, for it also numbers a sweep."""
    slurm = environ.get("SLURM_PROCID", "0") if "WORLD_SIZE" in environ else "0"
    return environ.get("RANK") or environ.get("LOCAL_RANK") or slurm


def _in_notebook() -> bool:
    """Whether a notebook's kernel runs us: IPython is loaded already, and was started by one."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config
