"""Reads a schedule as a person writes it: the text that it prints as, or the small table of a TOML recipe.

The text is parsed as an expression and walked; only the constructors of `schedules.py`, `>>`, texts,
numbers and lists are understood. Nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lehr import schedules
from lehr.curves import Schedule
from lehr.errors import ScheduleError, nearest
from lehr.untrusted import brief

CONSTRUCTORS: dict[str, Callable[..., Schedule]] = {
    f.__name__: f
    for f in (
        schedules.constant, schedules.cosine, schedules.exponential, schedules.hold, schedules.linear, schedules.one_cycle,
        schedules.polynomial, schedules.restarts, schedules.step_decay, schedules.warmup,
    )
}  # fmt: skip
_LONGEST = 2000


def read_schedule(written: object, *, where: str = "schedule") -> Schedule:
    """A schedule from a `Schedule`, its text, or a table such as `{ warmup = "5%", shape = "cosine", floor
    = 0.01 }`.

    A table holds `warmup` (a duration) with `start` and `curve`, then `hold` (a duration), then `shape`
    (the name of a constructor) with the keywords of that constructor; each of the three may be left out,
    `shape` then is constant.

    Raises:
        ScheduleError: for anything else, naming `where`.

    Example:
        >>> read_schedule({"warmup": "5%", "shape": "cosine", "floor": 0.01})
        warmup("5%") >> cosine(floor=0.01)
        >>> read_schedule('restarts("10 epochs", grow=3)')
        restarts(first="10 epochs", grow=3)
    """
    if isinstance(written, Schedule):
        return written
    if isinstance(written, Mapping):
        return _from_table(dict(written), where)
    if not isinstance(written, str) or len(written) > _LONGEST:
        said = brief(written, 80)
        said = said if isinstance(written, str) else f"'{said}'"
        raise ScheduleError(
            f"{where}: {said} is not a schedule; expected a text such as 'warmup(\"5%\") >> cosine(floor=0.01)' "
            'or a table such as { warmup = "5%", shape = "cosine" }'
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python finds odd about the text as a program
            tree = ast.parse(written.strip(), mode="eval").body
        return _schedule(tree, where)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, ScheduleError):
            raise
        raise ScheduleError(
            f"{where}: {brief(written)} cannot be read as a schedule; write for example 'warmup(\"5%\") >> cosine(floor=0.01)'"
        ) from None


def _from_table(table: dict[str, Any], where: str) -> Schedule:
    parts: list[Schedule] = []
    if "warmup" in table:
        ramp: dict[str, Any] = {key: table.pop(key) for key in ("start", "curve") if key in table}
        parts.append(_call("warmup", (table.pop("warmup"),), ramp, where))
    if "hold" in table:
        parts.append(_call("hold", (table.pop("hold"),), {}, where))
    shape = table.pop("shape", "constant")
    if not isinstance(shape, str):
        raise ScheduleError(f'{where}.shape: {shape!r} is not a name; expected one such as "cosine"')
    parts.append(_call(shape, (), table, where))
    joined = parts[0]
    for part in parts[1:]:
        joined = joined >> part
    return joined


def _schedule(node: ast.expr, where: str) -> Schedule:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return _schedule(node.left, where) >> _schedule(node.right, where)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        args = tuple(_value(arg, where) for arg in node.args)
        keywords = {str(k.arg): _value(k.value, where) for k in node.keywords}
        if len(keywords) < len(node.keywords):
            raise ScheduleError(f"{where}: {brief(ast.unparse(node))} says something twice; write it once")
        return _call(node.func.id, args, keywords, where)
    raise ScheduleError(
        f'{where}: {brief(ast.unparse(node))} is not a schedule; expected a call such as cosine() or warmup("5%")'
    )


def _value(node: ast.expr, where: str) -> object:
    if isinstance(node, (ast.Call, ast.BinOp)):
        return _schedule(node, where)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ScheduleError(
            f"{where}: {brief(ast.unparse(node))} is neither a number, a text, a list nor a schedule"
        ) from None


def _call(name: str, args: tuple[object, ...], keywords: dict[str, Any], where: str) -> Schedule:
    if name not in CONSTRUCTORS:
        raise ScheduleError(
            f"{where}: no schedule is called {brief(name)}{nearest(name, CONSTRUCTORS)} Known: {', '.join(CONSTRUCTORS)}"
        )
    signature = inspect.signature(CONSTRUCTORS[name])
    for key in keywords:
        if key not in signature.parameters:
            raise ScheduleError(
                f"{where}: {name} has no setting {brief(key)}{nearest(key, signature.parameters)} "
                f"It takes: {', '.join(signature.parameters)}"
            )
    for value in (*args, *keywords.values()):
        _refuse_odd(value, f"{where}: {name}")
    try:
        signature.bind(*args, **keywords)
    except TypeError as error:
        raise ScheduleError(f"{where}: {name}: {error}; it takes {', '.join(signature.parameters)}") from None
    try:
        return CONSTRUCTORS[name](*args, **keywords)
    except TypeError as error:
        raise ScheduleError(f"{where}: {name}: {error}") from None
    except ValueError as error:
        raise ScheduleError(f"{where}: {error}") from None


def _refuse_odd(value: object, where: str) -> None:
    """Raise for what no setting takes: other things than numbers, texts and lists, numbers beyond float64."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _refuse_odd(item, where)
    elif isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
        raise ScheduleError(f"{where}: {brief(value)} is no number that a rate can be multiplied by")
    elif value is not None and not isinstance(value, (str, int, float, Schedule)):
        raise ScheduleError(f"{where}: {brief(value)}; expected a number, a text, a list or a schedule")
