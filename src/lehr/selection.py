"""Patterns and roles over parameter names: which parameters does a word mean?

What lehr knows of a model is a value here (`ModelFacts`), made by `lehr.inspect` and readable without
torch. Everything in this file is a pure function of such facts; it must not know what a stage, a rate or a
tensor is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from lehr.errors import SelectionError, nearest

ROLES = ("all", "backbone", "bias", "head", "norm")
_LAST_BLOCKS = re.compile(r"last(?: (\d+))? blocks?")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class ParameterFacts:
    """One parameter of a model, by its first name.

    `layer` counts from 0 at the input to `ModelFacts.layers - 1` at the head; `frozen_by_hand` is True
    where `requires_grad` was set to False by a person, not by a plan; `aliases` are the other names of a
    tied weight.
    """

    name: str
    shape: tuple[int, ...]
    norm: bool = False
    bias: bool = False
    layer: int = 0
    frozen_by_hand: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of scalars in the parameter."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class ModelFacts:
    """What lehr understood of a model, as plain values.

    `parameters` in the model's own order; `head` the module paths (or parameter names) of its classifier,
    `()` when none was recognised; `blocks` the module paths of its repeated blocks from input to output,
    each entry the paths that make one block; `understood` one sentence on how each was found, for the plan
    to print.
    """

    name: str
    parameters: tuple[ParameterFacts, ...]
    head: tuple[str, ...] = ()
    blocks: tuple[tuple[str, ...], ...] = ()
    layers: int = 1
    buffers: int = 0
    understood: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, ParameterFacts]:
        """Parameters by name; aliases of tied weights lead to the same parameter."""
        return {name: p for p in self.parameters for name in (p.name, *p.aliases)}

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every module path that holds a parameter, in order."""
        return tuple(dict.fromkeys(path for name in self.by_name for path in _ancestors(name)))

    def count(self, names: Iterable[str] | None = None) -> int:
        """The number of scalars in the parameters `names`, or in all."""
        return (
            sum(p.count for p in self.parameters)
            if names is None
            else sum(self.by_name[n].count for n in names)
        )


@dataclass(frozen=True)
class Selection:
    """The parameters that a list of patterns means, in the model's order, and what each pattern brought."""

    patterns: tuple[str, ...]
    names: tuple[str, ...]
    by_pattern: Mapping[str, tuple[str, ...]] = field(compare=False)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)


def select(patterns: str | Sequence[str], facts: ModelFacts, *, where: str = "selection") -> Selection:
    """The parameters that `patterns` mean: the union, each once, in the model's order; `"!norm"` takes away
    again.

    A pattern is a role (`"head"`, `"backbone"`, `"norm"`, `"bias"`, `"all"`, `"last 2 blocks"`), a module
    path or a parameter name (`"layer4"`, `"fc.weight"`), or a glob over either (`"blocks.1?.*"`; `*`
    crosses dots). A role wins over a module of the same name: write `"norm.*"` for a module called `norm`.
    `"all"` leaves out what was frozen by hand; every other pattern names it.

    Raises:
        SelectionError: for a pattern that matches nothing, with the nearest names, and where nothing is left.

    Example:
        >>> facts = ModelFacts("net", (ParameterFacts("body.weight", (4, 4)), ParameterFacts("fc.weight", (2, 4))), head=("fc",))
        >>> select(["head"], facts).names
        ('fc.weight',)
        >>> select("bod?", facts).names
        ('body.weight',)
        >>> select(["all", "!head"], facts).names
        ('body.weight',)
    """
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not listed:
        raise SelectionError(
            f'{where}: an empty list selects nothing; name what to train, for example "head" or "all"'
        )
    by_pattern = {pattern: _match(_positive(pattern), facts, where) for pattern in listed}
    chosen = {
        name for pattern, names in by_pattern.items() if pattern == _positive(pattern) for name in names
    }
    chosen -= {
        name for pattern, names in by_pattern.items() if pattern != _positive(pattern) for name in names
    }
    if not chosen:
        raise SelectionError(
            f'{where}: {list(listed)} leaves nothing; name what to keep as well, as in ["all", "!norm"]'
        )
    return Selection(listed, tuple(p.name for p in facts.parameters if p.name in chosen), by_pattern)


def partition(
    patterns: Sequence[str], names: Iterable[str], facts: ModelFacts, *, where: str
) -> dict[str, str]:
    """The one pattern that each of `names` belongs to: disjoint and total.

    Raises:
        SelectionError: where two patterns claim one parameter, none does, or a pattern claims nothing of
            `names`.
    """
    wanted = dict.fromkeys(names)
    owner: dict[str, str] = {}
    for pattern in patterns:
        claimed = [name for name in _match(pattern, facts, where) if name in wanted]
        if not claimed:
            raise SelectionError(
                f"{where}: {pattern!r} names nothing that this stage trains; leave it out, or add it to the stage's `train`"
            )
        for name in claimed:
            if name in owner:
                raise SelectionError(
                    f"{where}: {name!r} is in both {owner[name]!r} and {pattern!r}; each parameter has one rate, "
                    'so write patterns that do not overlap (for example "head" and "backbone" instead of "head" and "all")'
                )
            owner[name] = pattern
    missing = [name for name in wanted if name not in owner]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SelectionError(
            f"{where}: {missing[0]!r}{more} would be trained but has no rate: {list(patterns)} leave it out; "
            'add a pattern that names it, for example "backbone"'
        )
    return owner


def _positive(pattern: str) -> str:
    """A pattern without the mark of one that takes away."""
    return pattern.removeprefix("!") if isinstance(pattern, str) else pattern


def _match(pattern: str, facts: ModelFacts, where: str) -> tuple[str, ...]:
    """The names that one pattern means; never empty."""
    if not isinstance(pattern, str):
        raise SelectionError(
            f'{where}: {pattern!r} is not a pattern; expected a text such as "head" or "layer4"'
        )
    found = _role(pattern, facts, where)
    if found is None:
        found = tuple(
            p.name for p in facts.parameters if any(_names(pattern, name) for name in (p.name, *p.aliases))
        )
    if not found and pattern == "all" and facts.parameters:
        raise SelectionError(
            f"{where}: 'all' leaves out what was frozen by hand, and all of {facts.name} was; "
            f'name what to train, for example "{facts.parameters[-1].name}" or "*" for everything'
        )
    if not found:
        known = (*ROLES, "last 2 blocks", *facts.modules, *facts.by_name)
        hint = nearest(pattern, (word for word in known if word != pattern))
        roots = ", ".join(dict.fromkeys(name.split(".")[0] for name in facts.by_name))
        raise SelectionError(
            f"{where}: {pattern!r} matches no parameter of {facts.name}{hint} The model's top-level parts are: {roots}; "
            f"the roles are: {', '.join(ROLES)}, last N blocks"
        )
    return found


def _role(pattern: str, facts: ModelFacts, where: str) -> tuple[str, ...] | None:
    """What a role means, or None where `pattern` is no role."""
    blocks = _LAST_BLOCKS.fullmatch(pattern)
    if blocks:
        return _last_blocks(int(blocks.group(1) or 1), facts, where)
    if pattern == "all":
        return tuple(p.name for p in facts.parameters if not p.frozen_by_hand)
    if pattern == "norm":
        return tuple(p.name for p in facts.parameters if p.norm)
    if pattern == "bias":
        return tuple(p.name for p in facts.parameters if p.bias)
    if pattern in ("head", "backbone"):
        if not facts.head:
            last = facts.modules[-1] if facts.modules else "fc"
            raise SelectionError(
                f"{where}: {pattern!r} needs to know the head of {facts.name}, and none was recognised; "
                f'name the module instead, for example "{last}", or say head="{last}" to lehr.fit or lehr.plan'
            )
        head = {
            p.name
            for p in facts.parameters
            if any(_names(path, n) for path in facts.head for n in (p.name, *p.aliases))
        }
        return tuple(p.name for p in facts.parameters if (p.name in head) == (pattern == "head"))
    return None


def hides_module(pattern: str, facts: ModelFacts) -> bool:
    """Whether a pattern is a role, and the model has a module of that name which is something else.

    >>> norms = (ParameterFacts("body.1.weight", (4,), norm=True), ParameterFacts("norm.weight", (4,), norm=True))
    >>> hides_module("norm", ModelFacts("net", norms)), hides_module("norm", ModelFacts("net", norms[1:]))
    (True, False)
    """
    module = {p.name for p in facts.parameters if p.name.startswith(f"{pattern}.")}
    return bool(module) and module != set(_role(pattern, facts, "train") or module)


def _last_blocks(count: int, facts: ModelFacts, where: str) -> tuple[str, ...]:
    if not 1 <= count <= len(facts.blocks):
        raise SelectionError(
            f"{where}: 'last {count} blocks' of {facts.name}, which has {len(facts.blocks)} recognised blocks; "
            f"expected a number from 1 to {len(facts.blocks)}"
            if facts.blocks
            else f"{where}: no blocks were recognised in {facts.name}; name its modules instead, for example {facts.modules[:3]}"
        )
    paths = [path for block in facts.blocks[-count:] for path in block]
    return tuple(
        p.name
        for p in facts.parameters
        if any(_names(path, n) for path in paths for n in (p.name, *p.aliases))
    )


def _names(pattern: str, name: str) -> bool:
    """Whether `pattern` is `name`, a module that holds it, or a glob over either."""
    if not _GLOB.search(pattern):
        return name == pattern or name.startswith(pattern + ".")
    return any(fnmatchcase(candidate, pattern) for candidate in (name, *_ancestors(name)))


def _ancestors(name: str) -> list[str]:
    """The module paths above a parameter, outermost first.

    >>> _ancestors("layer1.0.conv.weight")
    ['layer1', 'layer1.0', 'layer1.0.conv']
    """
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
