"""Reads a schedule as a person writes it: the text that it prints as, or the small table of a TOML recipe.

The text is parsed as an expression and walked; only the constructors of `schedules.py`, `>>`, texts,
numbers and lists are understood. Nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lehr import schedules
from lehr.curves import Schedule
from lehr.errors import ScheduleError, nearest

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
        raise ScheduleError(
            f"{where}: {str(written)[:80]!r} is not a schedule; expected a text such as 'warmup(\"5%\") >> cosine(floor=0.01)' "
            'or a table such as { warmup = "5%", shape = "cosine" }'
        )
    try:
        tree = ast.parse(written.strip(), mode="eval").body
        return _schedule(tree, where)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, ScheduleError):
            raise
        raise ScheduleError(
            f"{where}: {written!r} cannot be read as a schedule; write for example 'warmup(\"5%\") >> cosine(floor=0.01)'"
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
        return _call(node.func.id, args, keywords, where)
    raise ScheduleError(
        f'{where}: {ast.unparse(node)!r} is not a schedule; expected a call such as cosine() or warmup("5%")'
    )


def _value(node: ast.expr, where: str) -> object:
    if isinstance(node, (ast.Call, ast.BinOp)):
        return _schedule(node, where)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ScheduleError(
            f"{where}: {ast.unparse(node)!r} is neither a number, a text, a list nor a schedule"
        ) from None


def _call(name: str, args: tuple[object, ...], keywords: dict[str, Any], where: str) -> Schedule:
    if name not in CONSTRUCTORS:
        raise ScheduleError(
            f"{where}: no schedule is called {name!r}{nearest(name, CONSTRUCTORS)} Known: {', '.join(CONSTRUCTORS)}"
        )
    signature = inspect.signature(CONSTRUCTORS[name])
    for key in keywords:
        if key not in signature.parameters:
            raise ScheduleError(
                f"{where}: {name} has no setting {key!r}{nearest(key, signature.parameters)} It takes: {', '.join(signature.parameters)}"
            )
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
