"""Other processes for tests: copies of this one, which have everything loaded."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def forked(work: Callable[[], object]) -> int:
    """Begin `work` in another process; its id. The process ends with 0, or 1 where `work` raised."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(work: Callable[[], object]) -> int:
    """Do `work` in another process: its exit code, or minus the signal that it died of."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
