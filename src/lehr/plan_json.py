"""A plan as a file: canonical JSON, its hash, and a strict reader. It handles plain values and must not
know what a plan means.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lehr.errors import RecipeError
from lehr.untrusted import MIB, printable, read_bytes

FORMAT = 3
# What a model is called changes nothing, nor how a length was written: its parameters and steps count.
# Caches decide how something is computed, not what.
_WITHOUT_EFFECT = ("model", "notes", "said", "caching")
_OF_A_STAGE_WITHOUT_EFFECT = ("cache",)
_MAY_BE_INFINITE = ("clip_norm", "patience")
_LARGEST = 256 * MIB


def content_hash(plain: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything that has an effect: sorted keys, shortest floats that
    round-trip.

    >>> content_hash({"b": 1.0, "a": 2, "notes": ["x"]}) == content_hash({"a": 2, "b": 1.0})
    True
    """
    counted = {key: value for key, value in plain.items() if key not in _WITHOUT_EFFECT}
    if isinstance(stages := counted.get("stages"), list):
        counted["stages"] = [_of_effect(stage) for stage in stages]
    text = json.dumps(
        _strict(counted), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _of_effect(stage: object) -> object:
    if not isinstance(stage, Mapping):
        return stage
    return {key: value for key, value in stage.items() if key not in _OF_A_STAGE_WITHOUT_EFFECT}


def dumps(plain: Mapping[str, Any]) -> str:
    """The file's text: the format, the hash, then the plan."""
    whole = {"format": FORMAT, "hash": content_hash(plain), **plain}
    return json.dumps(_strict(whole), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write(path: str | Path, plain: Mapping[str, Any]) -> None:
    """Write a plan's plain values to `path`."""
    Path(path).write_text(dumps(plain), encoding="utf-8")


def read(path: str | Path) -> dict[str, Any]:
    """The plain values of the plan in `path`.

    Raises:
        RecipeError: where it cannot be read, is of another format, or does not have the hash that it says.
    """
    again = "make it again with `lehr plan --json`"
    name = printable(str(path))
    try:
        whole = json.loads(read_bytes(path, most=_LARGEST).decode("utf-8"))
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}; {again}") from None
    except (ValueError, RecursionError):
        raise RecipeError(f"{name}: not JSON; {again}") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise RecipeError(f"{name}: not a plan of format {FORMAT}; {again}")
    said = whole.pop("hash", None)
    del whole["format"]
    plain: dict[str, Any] = _finite_again(whole)
    if _hash_or_none(plain) != said or said is None:
        raise RecipeError(
            f"{name}: its content does not have the hash that it says, so it was changed or damaged; {again}"
        )
    return plain


def _hash_or_none(plain: Mapping[str, Any]) -> str | None:
    try:
        return content_hash(plain)
    except (ValueError, RecursionError):  # NaN or half a character, which Python's reader lets pass
        return None


def _strict(value: Any) -> Any:
    """JSON has no infinity: it is written as the text "inf"."""
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _finite_again(plain: Any, key: str = "") -> Any:
    if isinstance(plain, dict):
        return {name: _finite_again(value, name) for name, value in plain.items()}
    return math.inf if plain == "inf" and key in _MAY_BE_INFINITE else plain
