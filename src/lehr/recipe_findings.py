"""What is wrong with a recipe, in words: pydantic's findings as one line each, with the place, what was found, what was
expected, and how to mend it. It must not know what a recipe is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import ValidationError

from lehr.errors import RecipeError, nearest
from lehr.untrusted import brief, printable

_T = TypeVar("_T")
_MOST_FINDINGS = 20  # lines in one message


class MisplacedError(ValueError):
    """What several keys say together cannot be; `key` is the one to look at."""

    def __init__(self, key: str, said: str) -> None:
        super().__init__(said)
        self.key = key


def explain(error: ValidationError, where: str, cls: type, rooms: Mapping[str, type]) -> str:
    """Every finding as a line, each once.

    Args:
        error: pydantic's.
        where: what the places lie in.
        cls: the class that was to be made.
        rooms: the classes within it, by the key that holds a list of them.
    """
    lines = list(dict.fromkeys(f"{where}: {_finding(dict(found), cls, rooms)}" for found in error.errors()))
    more = [f"{where}: and {len(lines) - _MOST_FINDINGS} more"] * (len(lines) > _MOST_FINDINGS)
    return "\n".join(lines[:_MOST_FINDINGS] + more)


def speaking(cls: type[_T], rooms: Mapping[str, type]) -> None:
    """Let a direct call such as `Stage(...)` raise `RecipeError` too, in the words of `explain`."""
    plain: Callable[..., None] = cls.__init__

    def __init__(self: _T, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is the __init__
        try:
            plain(self, *args, **kwargs)
        except ValidationError as error:
            raise RecipeError(explain(error, cls.__name__, cls, rooms)) from None

    __init__.__wrapped__ = plain  # type: ignore[attr-defined]  # keeps the signature for help() and inspect
    cls.__init__ = __init__  # type: ignore[method-assign,assignment]


def _finding(found: dict[str, Any], cls: type, rooms: Mapping[str, type]) -> str:
    loc, kind = tuple(found["loc"]), found["type"]
    if kind == "unexpected_positional_argument":
        first, *others = (f.name for f in fields(cls))
        names = [first, *(name for name in others if name not in rooms)]
        meant = names[loc[0]] if isinstance(loc[0], int) and loc[0] < len(names) else names[1]
        said = brief(found["input"])
        return f"{said}; only {names[0]!r} may stand without its name: write {meant}={said} or the like"
    if loc and isinstance(loc[0], int):  # a positional argument of a direct call
        loc = (fields(cls)[loc[0]].name, *loc[1:])
    error = found.get("ctx", {}).get("error")
    if isinstance(error, MisplacedError):
        loc = (*loc, error.key)
    place = ".".join(printable(str(part)[:100]) for part in loc)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{place}: {_no_such_key(str(loc[-1]), _class_at(loc, cls, rooms), rooms)}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{place}: {missing(place.rsplit('.', 1)[-1])}"
    if kind == "value_error":  # the place says what it is of
        said = str(error)
        for room in ("duration: ", "schedule: ", "size: "):
            said = said.removeprefix(room)
        return ": ".join(filter(None, (place, said)))
    if loc and loc[-1] in rooms:
        key = str(loc[-1])
        return (
            f"{place}: {brief(found['input'])}; expected a list of {key}: {_TABLES.get(key, f'[[{key}]]')} in TOML, "
            f"{key}=[lehr.{rooms[key].__name__}(...)] in Python"
        )
    if kind == "dataclass_type":
        room = next((key for key in reversed(loc) if key in _MEMBERS), "")
        return f"{place}: {brief(found['input'])}; expected {_MEMBERS.get(room, 'a table')}"
    return f"{place}: {brief(found['input'])}; {_expected(kind, found)}"


def missing(key: str) -> str:
    """What to say where a key is not there.

    >>> missing("train")
    'missing; what does it train? For example train = "head"'
    """
    return "missing; " + _EXAMPLE.get(key, "it has no default, so write it")


def _class_at(loc: tuple[Any, ...], cls: type, rooms: Mapping[str, type]) -> type:
    """The class whose key stands at the end of a place."""
    return next((rooms[part] for part in reversed(loc[:-1]) if part in rooms), cls)


def _no_such_key(key: str, cls: type, rooms: Mapping[str, type]) -> str:
    known = [f.name for f in fields(cls)]
    others = [other for other in rooms.values() if key in {f.name for f in fields(other)}]
    hint = f"; it belongs to the {others[0].__name__.lower()}." if others else nearest(key, known)
    return f"no such key in {_A[cls.__name__]}{hint} Known: {', '.join(known)}"


def _expected(kind: str, found: dict[str, Any]) -> str:
    """What stands instead of pydantic's words; those where it has a kind that is not known here."""
    words = _EXPECTED.get(kind)
    if words is None:
        return f"{found['msg'][0].lower()}{found['msg'][1:]}"
    return "expected " + words.format(**{k: _plain(v) for k, v in found.get("ctx", {}).items()})


def _plain(limit: object) -> object:
    return f"{limit:g}" if isinstance(limit, float) else limit


_EXPECTED = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "literal_error": "{expected}",
}


_EXAMPLE = {
    "stages": "a recipe needs at least one stage: [[stages]] in TOML, stages=[lehr.Stage(...)] in Python",
    "length": 'how long is the stage? For example length = "5 epochs"',
    "train": 'what does it train? For example train = "head"',
    "lr": "at which peak rate? For example lr = 1e-3",
    "name": 'what is it called? For example name = "d"',
}
_TABLES = {"objectives": "[[stages.objectives]]"}
_A = {"Recipe": "a recipe", "Stage": "a stage", "Objective": "an objective"}
_MEMBERS = {
    "stages": "a stage: a table with length, train and lr",
    "objectives": "an objective: a table with name, train and lr",
}
