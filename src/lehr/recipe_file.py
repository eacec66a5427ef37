"""A recipe as a file: the strict TOML reader, and settings laid over it. Every mistake is a `RecipeError` that names the
place. What the keys mean is in `recipe.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError

from lehr.errors import RecipeError
from lehr.recipe import READER, ROOMS, Recipe
from lehr.recipe_findings import explain
from lehr.untrusted import MIB, printable, read_bytes

_LARGEST = MIB  # of the text of a recipe; a long one has some thousand bytes


def recipe_from(table: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """A recipe from plain values, as a TOML file holds them.

    Raises:
        RecipeError: listing everything that is wrong, each with its place below `where`.
    """
    try:
        return READER.validate_python(dict(table))
    except ValidationError as error:
        raise RecipeError(explain(error, where, Recipe, ROOMS)) from None
    except RecipeError as error:
        raise type(error)(f"{where}: {error}") from None
    except RecursionError:
        raise RecipeError(
            f"{where}: tables or lists within each other without end; a recipe has two levels"
        ) from None


def load_recipe(path: str | Path, *, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, with `settings` such as `"stages.0.lr=1e-3"` laid over it.

    Raises:
        RecipeError: where the file cannot be read, is no TOML, or says something that cannot be, naming
            file and key.
    """
    name = printable(str(path))
    try:
        text = read_bytes(path, most=_LARGEST).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(
            f"{name}: cannot be read: {reason}; `lehr init DATA` writes a recipe to start from"
        ) from None
    return recipe_from(overridden(_parsed(text, name), settings), where=name)


def _parsed(text: str, where: str) -> dict[str, Any]:
    """What a TOML text says, as plain values."""
    try:
        return tomlkit.parse(text).unwrap()
    except RecursionError:
        raise RecipeError(f"{where}: not TOML that a recipe needs: lists within lists within lists") from None
    except Exception as error:  # tomlkit lets ValueError, AttributeError and more of Python's through
        said = printable(str(error)[:200]) or type(error).__name__
        raise RecipeError(f"{where}: not TOML: {said}") from None


def overridden(table: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of `table` with each `key=value` of `settings` laid over it; keys are dotted, values are TOML.

    Example:
        >>> overridden({"stages": [{"lr": 1e-4}]}, ["stages.0.lr=1e-3", "optimizer=sgd"])
        {'stages': [{'lr': 0.001}], 'optimizer': 'sgd'}
    """
    out: dict[str, Any] = _copied(dict(table))
    for setting in settings:
        key, equals, written = setting.partition("=")
        if not equals or not key.strip():
            raise RecipeError(
                f"--set {printable(setting[:200])}: expected KEY=VALUE, for example --set stages.0.lr=1e-3"
            )
        target: Any = out
        *path, last = key.strip().split(".")
        for part in path:
            target = _step_into(target, part, setting)
        if isinstance(target, list):
            _step_into(target, last, setting)
            target[int(last)] = _toml_value(written)
        elif isinstance(target, dict):
            target[last] = _toml_value(written)
        else:
            raise RecipeError(
                f"--set {printable(setting[:200])}: {printable('.'.join(path))} is a single value, so {last!r} cannot be set inside it"
            )
    return out


def _step_into(target: Any, part: str, setting: str) -> Any:
    if isinstance(target, list):
        if not part.isdecimal() or len(part) > 9 or int(part) >= len(target):
            raise RecipeError(
                f"--set {printable(setting[:200])}: there are {len(target)} entries, 0 to {len(target) - 1}; {part!r} is none of them"
            )
        return target[int(part)]
    if not isinstance(target, dict):
        raise RecipeError(
            f"--set {printable(setting[:200])}: {part!r} lies inside a single value; set that value as a whole"
        )
    return target.setdefault(part, {})


def _toml_value(written: str) -> Any:
    """A TOML value; a bare word is a text, so that `optimizer=sgd` needs no quotes within quotes."""
    try:
        return _parsed(f"x = {written}", "--set")["x"]
    except RecipeError:
        return written.strip()


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value
