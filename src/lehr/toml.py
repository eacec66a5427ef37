"""How lehr writes TOML, as people do: 3e-3, inline tables, single quotes around a text with quotes in it.

It knows nothing of recipes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal


def toml_lines(table: Mapping[str, object]) -> list[str]:
    """A line for each key.

    >>> toml_lines({"train": ["all"], "lr": {"head": 1e-3, "a.*": 0.5}})
    ['train = ["all"]', 'lr = { head = 1e-3, "a.*" = 0.5 }']
    """
    return [f"{_key(key)} = {toml_value(value)}" for key, value in table.items()]


def toml_value(value: object) -> str:
    """A value as TOML writes it; tables inline.

    >>> print(toml_value('warmup("5%")'), toml_value(True), toml_value("head"))
    'warmup("5%")' true "head"
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{ " + ", ".join(toml_lines(value)) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        plain = '"' in value and "'" not in value and value.isprintable()
        return f"'{value}'" if plain else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return _number(value) if isinstance(value, float) else repr(value)


def _number(value: float) -> str:
    """The shortest text that is the same number; small ones as people write rates.

    >>> _number(0.001), _number(0.01), _number(0.05), _number(3e-4)
    ('1e-3', '1e-2', '0.05', '3e-4')
    """
    small = 0 < abs(value) <= 0.01
    return f"{Decimal(repr(value)).normalize():e}" if small else repr(value)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else toml_value(name)
