"""Pickles read as data: a machine for the part of the format that spells numbers, texts, lists and tables.

Names are looked up in a table that the caller gives, and nowhere else; whatever other name a pickle calls for
is refused. Python's own reader is not used even so, for a few bytes can make it fill any memory (a memo of
2**31 places) or never end (a table whose key is tuples within tuples). Here every place and every byte must
have been written in the file, and keys are texts and numbers. This file must not know what the names mean.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from mmap import mmap
from typing import IO, Any, Protocol, runtime_checkable

_PLAIN = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_BYTES = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # Python 2's texts, which may be anything
_VALUES: dict[str, Callable[[], object]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict,
}  # fmt: skip
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MOST = 5_000_000  # instructions: a byte in the file may be a table of 64 bytes in memory
_KEYS = (str, bytes, int, float, bool, type(None))


class RefusedError(Exception):
    """A pickle called for something that its kind of file does not need."""


class DamagedError(Exception):
    """Bytes that are no pickle."""


@runtime_checkable
class Built(Protocol):
    """What a pickle may fill after it was made."""

    def build(self, state: object) -> None:
        """Take the state that is in the pickle; anything may be in it."""
        ...


def read_pickle(
    file: IO[bytes] | mmap, names: Mapping[str, object], load: Callable[[object], object] | None = None
) -> Any:
    """The value of the pickle that `file` goes on with; the file then stands behind it.

    Args:
        file: bytes in memory or mapped, so that no more can be read than there is.
        names: what may be called for, as `"module.name"`; functions are called with what the pickle gives
            (anything may be in it), and answer what they refuse with `RefusedError`.
        load: what stands for a persistent id; without it there may be none.

    Raises:
        RefusedError: for a name that is not in `names`, and for a use of one that is not meant.
        DamagedError: for anything that is no whole pickle.
    """
    machine = _Machine(names, load)
    instructions = pickletools.genops(file)  # type: ignore[arg-type]  # it needs read, readline and tell alone
    try:
        for count, (opcode, argument, _) in enumerate(instructions):
            if count > _MOST:
                raise RefusedError(f"it has more than {_MOST:,} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.do(opcode.name, argument)
    except (RefusedError, DamagedError):
        raise
    except Exception as error:  # genops and the stack raise ValueError, IndexError, TypeError and more
        raise DamagedError(str(error) or type(error).__name__) from error
    raise DamagedError("it has no end")


class _Machine:
    """The stack, the marks in it, and the memo."""

    def __init__(self, names: Mapping[str, object], load: Callable[[object], object] | None) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.names, self.load = names, load

    def do(self, name: str, argument: Any) -> None:
        """One instruction."""
        push = self.stack.append
        if name in _PLAIN:
            push(argument)
        elif name in _PUT:
            self.memo[argument] = self.stack[-1]
        elif name in _GET:
            push(self.memo[argument])
        elif name in _BYTES:
            push(argument.encode("latin-1"))
        elif name in _VALUES:
            push(_VALUES[name]())
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif name not in ("PROTO", "FRAME"):
            self._combine(name)

    def _combine(self, name: str) -> None:
        """The instructions that make one value of several."""
        if name in _TUPLES:
            self.stack.append(tuple(self._popped() for _ in range(_TUPLES[name]))[::-1])
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self._since_mark()
            self.stack.append(items if name == "LIST" else tuple(items) if name == "TUPLE" else _table(items))
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else [self._popped()]
            _only(self.stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if name == "SETITEMS" else [self._popped(), self._popped()][::-1]
            _only(self.stack[-1], dict).update(_table(items))
        elif name == "REDUCE":
            arguments, function = _only(self._popped(), tuple), self._popped()
            if not callable(function):  # nothing can be called but what stands in `names`
                raise RefusedError("it calls something that is no function")
            self.stack.append(function(*arguments))
        elif name == "BUILD":
            self._build(self._popped())
        elif name == "BINPERSID" and self.load is not None:
            self.stack.append(self.load(self._popped()))
        else:
            raise RefusedError(f"it uses {name}, which no such file needs")

    def _name(self, argument: Any) -> None:
        if argument is None:  # on the stack, from protocol 4 on
            name, module = _only(self._popped(), str), _only(self._popped(), str)
        else:
            module, _, name = argument.partition(" ")
        if f"{module}.{name}" not in self.names:
            raise RefusedError(f"it calls for {module[:100]}.{name[:100]}")
        self.stack.append(self.names[f"{module}.{name}"])

    def _build(self, state: object) -> None:
        made = self.stack[-1]
        if isinstance(made, Built):
            made.build(state)
        elif not isinstance(made, dict):  # attributes of a table, which say nothing of what is in it
            raise RefusedError("it changes something that it has no business with")

    def _popped(self) -> Any:
        return self.stack.pop()

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items


def _only(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise DamagedError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _table(items: list[Any]) -> dict[Any, Any]:
    """Keys and values in turn, as a table."""
    for key in items[::2]:
        if type(key) not in _KEYS:  # not a tuple: its hash may take for ever
            raise RefusedError(f"a table with a {type(key).__name__} as a key")
    return dict(zip(items[::2], items[1::2], strict=True))
