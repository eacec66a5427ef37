"""`lehr` and `python -m lehr`: runs the command line and turns what went wrong into a line and an exit code.

0 done; 1 the run failed; 2 the request was wrong; 130 interrupted (143 by SIGTERM, 129 by a terminal that closed).
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields

import click

from lehr.cli import main as cli
from lehr.cli import silence
from lehr.errors import LehrError, nearest
from lehr.untrusted import printable_lines

_FROM_WORKER = re.compile(r"Caught \w+ in (DataLoader|pin memory)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments` (those of the process by default) and exit."""
    try:
        _run(arguments)
    finally:
        try:
            if sys.stderr is not None:  # None where it was closed from the start
                sys.stderr.flush()
        except OSError:
            silence(sys.stderr)


def _run(arguments: Sequence[str] | None) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what a terminal cannot show
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="lehr", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.UsageError as wrong:
        _end(_misused(wrong), 2)
    except (KeyboardInterrupt, click.Abort):
        _end("interrupted", 130)
    except BrokenPipeError:  # `lehr plan ... | head`: the reader has seen enough
        silence(sys.stdout)
        sys.exit(1)
    except LehrError as error:
        _end(_plain(error), error.exit_code)
    except Exception as error:
        said = _outside(error)
        if said is None or os.environ.get("LEHR_TRACEBACK"):
            click.echo("lehr: a mistake in lehr itself; please report it with the lines below", err=True)
            raise
        _end(f"{said}  [LEHR_TRACEBACK=1 shows where]", 1)


def _end(said: str, code: int) -> None:
    """Say why, with all escaped that a terminal might act on: a message may hold names from anywhere."""
    with suppress(OSError):  # a closed terminal
        click.echo(f"lehr: {printable_lines(said)}", err=True)
    sys.exit(code)


def _misused(wrong: click.UsageError) -> str:
    """One line on a command that was written wrongly."""
    path = wrong.ctx.command_path if wrong.ctx else "lehr"
    if isinstance(wrong, click.NoSuchOption):
        option = wrong.option_name
        place = _in_the_recipe(option)
        near = nearest(option, wrong.possibilities or ()).removesuffix(".")
        said = f"no such option {option}{f'; it is said in the recipe: --set {place}' if place else near}"
    else:
        said = wrong.format_message().strip().rstrip(".")
    return f"{said[:1].lower()}{said[1:]}{' See' if said.endswith('?') else '; see'} {path} --help"


def _in_the_recipe(option: str) -> str | None:
    """How the recipe says what is no option; None where it does not, either."""
    from lehr.recipe import Recipe, Stage

    key = option.lstrip("-").replace("-", "_")
    if key in ("epochs", "steps", "length"):
        return f'"stages.0.length=5 {"steps" if key == "steps" else "epochs"}"'
    for cls, place in ((Recipe, ""), (Stage, "stages.0.")):
        if key in (f.name for f in fields(cls)):
            return f"{place}{key}=..."
    return None


def _plain(error: Exception) -> str:
    """The message; of an error in a worker process, which torch sends with its traceback, the last line."""
    said = str(error).strip()
    if not _FROM_WORKER.match(said):
        return said
    return re.sub(r"^[\w.]+(Error|Exception): ", "", said.splitlines()[-1])


def _outside(error: Exception) -> str | None:
    """What to say of what the machine or another package could not do; None where lehr must be at fault."""
    said = next(iter(_plain(error).splitlines()), "") or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        ways = "a smaller batch_size with accumulate, a smaller --size, or --precision bf16"
        return f"out of memory: {said}; try {ways}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{where}{error.strerror or said}" + ("; free some space, or write elsewhere" if full else "")
    if isinstance(error, RuntimeError) and "DataLoader worker" in said:
        return f"{said}; a process that loads images died, often for want of memory: try --workers 0"
    if isinstance(error, (RuntimeError, ImportError)):
        return f"{type(error).__name__}: {said}"
    return None


if __name__ == "__main__":
    main()
