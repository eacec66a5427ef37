"""`lehr` and `python -m lehr`: runs the command line and turns what went wrong into a line and an exit code.

0 done; 1 the run failed; 2 the request was wrong; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from lehr.cli import main as cli
from lehr.errors import LehrError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments` (those of the process by default) and exit."""
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="lehr", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as wrong:
        wrong.show()
        sys.exit(2)
    except LehrError as error:
        click.echo(f"lehr: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("lehr: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:  # `lehr plan ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
