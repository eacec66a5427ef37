"""What lehr raises. It must know nothing of the rest of the package.

LehrError                      anything lehr says no to
├── RequestError (ValueError)  the request was wrong: nothing was started; the command line exits with 2
│   ├── RecipeError            a recipe says something that cannot be done
│   │   ├── DurationError      "5" instead of "5 epochs"
│   │   ├── ScheduleError      a curve that cannot be
│   │   ├── ConditionError     "train_eror < 0.8": what ends a stage cannot be understood
│   │   └── SelectionError     a pattern that matches nothing, two rates for one parameter
│   ├── DataError              images, arrays or classes that cannot be trained on
│   ├── WeightsError           a weights file that does not fit the model
│   ├── ModelError             a model that cannot be made or understood
│   └── CheckpointError        a run that cannot be gone on with: nothing to go on from, or another plan
└── RunError                   the run failed after it had begun; the command line exits with 1
    ├── NonFiniteError         the loss or the gradients became NaN or infinite
    └── FeedError              a sample could not be had, or a process that loads samples died

Every message says what was found and where, what was expected, the nearest right thing where there is one,
and how to mend it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class LehrError(Exception):
    """The root of everything lehr raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class RequestError(LehrError, ValueError):
    """The request was wrong; nothing was started and nothing was changed."""

    exit_code = 2


class RecipeError(RequestError):
    """A recipe (or an argument that could stand in one) says something that cannot be done."""


class DurationError(RecipeError):
    """A text that is not a duration, or a duration that makes no sense where it stands."""


class ScheduleError(RecipeError):
    """A schedule that cannot be: an unknown shape, a floor above the peak, parts longer than the whole."""


class ConditionError(RecipeError):
    """A condition that is none, or that nothing measures."""


class SelectionError(RecipeError):
    """A pattern that matches nothing, a parameter with two rates or none."""


class DataError(RequestError):
    """Data that cannot be trained on as it is."""


class WeightsError(RequestError):
    """A weights file that cannot be read or does not fit the model."""


class ModelError(RequestError):
    """A model that cannot be made, or about which something is missing."""


class CheckpointError(RequestError):
    """A run that cannot be gone on with: there is no good checkpoint, or it is of another plan, model or data."""


class RunError(LehrError):
    """The run failed after it had begun."""


class NonFiniteError(RunError):
    """The loss or the gradients became NaN or infinite and stayed so."""


class FeedError(RunError):
    """A sample could not be had between two steps, or a process that loads samples died."""


_FROM_WORKER = re.compile(r"Caught \w+ in (DataLoader|pin memory)")


def is_from_worker(error: BaseException) -> bool:
    """Whether an error was raised in a worker process, and sent here by torch."""
    return bool(_FROM_WORKER.match(str(error).strip()))


def plain_words(error: BaseException) -> str:
    """The message of an error; of one in a worker process, which torch sends with its traceback, the last line.

    >>> plain_words(RuntimeError("Caught OSError in DataLoader worker process 0.\\nTraceback ...\\nOSError: gone"))
    'gone'
    """
    said = str(error).strip()
    if is_from_worker(error):
        said = re.sub(r"^[\w.]+(Error|Exception): ", "", said.splitlines()[-1])
    return said or type(error).__name__


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """The end of a sentence that names the known words nearest to `word`: ``; did you mean "cosine"?``, or
    a full stop.

    >>> nearest("cosin", ["cosine", "linear"])
    '; did you mean "cosine"?'
    >>> nearest("zzz", ["cosine"])
    '.'
    """
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=n, cutoff=0.55)
    return "; did you mean " + " or ".join(f'"{name}"' for name in close) + "?" if close else "."
