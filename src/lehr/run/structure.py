"""Reads the order and the repeated blocks of any network off its modules.

The walk opens containers until it meets modules that repeat; what stands before them is the stem, what stands
between or after them belongs to a block. It knows no library by name and must not know of heads' names,
freezing or plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_COMPILED = "_orig_mod"
# Modules one level deep (convolution and norm) are blocks when they hold at least this share of the body; two
# of them in a stem are not.
_SHARE_OF_SHALLOW_BLOCKS = 0.05


@dataclass(frozen=True)
class Order:
    """Blocks as tuples of paths; the depth of each parameter, 0 (stem) to `layers - 1` (head)."""

    blocks: tuple[tuple[str, ...], ...]
    layer: Mapping[str, int]
    layers: int


@dataclass(frozen=True)
class _Piece:
    """A stretch of the network that the walk does not open: paths, the names under them, what it is."""

    paths: tuple[str, ...]
    names: tuple[str, ...]
    kind: str = ""
    height: int = 0
    joins: bool = False  # only norms, or a bare parameter: never a block of its own
    size: int = 0

    def __add__(self, other: _Piece) -> _Piece:
        main = other if self.joins else self
        return _Piece(
            self.paths + other.paths,
            self.names + other.names,
            main.kind,
            main.height,
            self.joins and other.joins,
            self.size + other.size,
        )


def order(model: nn.Module, names: Sequence[str], head: tuple[str, ...], norms: frozenset[str]) -> Order:
    """The order of `model`, whose parameters have the first names `names`, without those of the `head`.

    With a stem, its depth is 0 and the blocks follow; without one (a plain Sequential, say) the first block
    has depth 0.
    """
    in_head = under(head, names)
    pieces = list(_pieces(model, "", head, [name for name in names if name not in in_head], norms))
    stem, blocks = _split(_join_small(pieces))
    layers = bool(stem) + len(blocks) + bool(in_head)
    layer = dict.fromkeys(names, 0) | dict.fromkeys(in_head, layers - 1)
    for depth, block in enumerate(blocks, start=bool(stem)):
        layer |= dict.fromkeys(block.names, depth)
    return Order(tuple(block.paths for block in blocks), layer, max(layers, 1))


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The direct children that hold parameters."""
    return [(name, child) for name, child in module.named_children() if holds(child)]


def holds(module: nn.Module) -> bool:
    """Whether the module or anything inside it has a parameter."""
    return any(True for _ in module.parameters())


def join(path: str, name: str) -> str:
    """A path one step further; the step that `torch.compile` of a submodule adds is none."""
    if name == _COMPILED:
        return path
    return f"{path}.{name}" if path and name else path or name


def clean(name: str) -> str:
    """A name or path without the steps that `torch.compile` of a submodule adds.

    >>> clean("backbone._orig_mod.conv1.weight")
    'backbone.conv1.weight'
    """
    return ".".join(step for step in name.split(".") if step != _COMPILED)


def under(paths: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    """The names that are one of the paths or lie under one."""
    listed = tuple(paths)
    return frozenset(n for n in names if any(n == path or n.startswith(path + ".") for path in listed))


def cover(group: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The fewest module paths (or names) that hold exactly the parameters of `group`, some of `names`.

    >>> cover(["a.0.w", "a.0.b", "a.1.w"], ["a.0.w", "a.0.b", "a.1.w", "a.1.b"])
    ('a.0', 'a.1.w')
    """
    everywhere = Counter(path for name in names for path in above(name))
    inside = Counter(path for name in group for path in above(name))
    whole = (next((path for path in above(name) if inside[path] == everywhere[path]), name) for name in group)
    return tuple(dict.fromkeys(whole))


def above(name: str) -> list[str]:
    """The module paths above a parameter, outermost first."""
    steps = name.split(".")
    return [".".join(steps[:end]) for end in range(1, len(steps))]


def _pieces(
    module: nn.Module, path: str, head: tuple[str, ...], names: Sequence[str], norms: frozenset[str]
) -> Iterator[_Piece]:
    """The pieces of `module` in order; `names` are the first names that matter: a tied module is met once."""
    for name, parameter in module.named_parameters(recurse=False):
        full = join(path, name)
        if full in names:
            # The weights of a bare layer are a piece like any other; a token or a table of positions joins
            # its neighbour.
            yield _Piece((full,), (full,), joins=bool(path) or bool(children(module)), size=parameter.numel())
    inside = children(module)
    kinds = Counter(type(child) for _, child in inside)
    for name, child in inside:
        full = join(path, name)
        found = tuple(n for n in names if n.startswith(full + "."))
        if not found or full in head:
            continue
        twins = kinds[type(child)] > 1
        if any(h.startswith(full + ".") for h in head) or _opens(
            child, isinstance(module, _CONTAINERS), twins
        ):
            yield from _pieces(child, full, head, found, norms)
        else:
            size = sum(parameter.numel() for parameter in child.parameters())
            kind = f"{type(child).__module__}.{type(child).__qualname__}"
            yield _Piece((full,), found, kind, _height(child), norms.issuperset(found), size)


def _opens(module: nn.Module, in_container: bool, twins: bool) -> bool:
    """Whether the walk looks inside `module` instead of taking it as one piece."""
    inside = children(module)
    if not inside:
        return False
    composites = [bool(children(child)) for _, child in inside]
    if isinstance(module, _CONTAINERS):
        plain = type(module) in _CONTAINERS
        if not any(
            composites
        ):  # convolution, norm: one unit among its like, but a whole network when it stands alone
            return plain and not in_container
        return all(composites) or (not in_container and (plain or _holds_stack(module, height=1)))
    if "Stage" in type(module).__name__:
        return _holds_stack(module, height=1)
    if in_container:
        return False
    return _holds_stack(module, height=2 if twins else 1)


def _holds_stack(module: nn.Module, height: int) -> bool:
    """Whether some container inside holds two modules or more that are themselves `height` levels deep."""
    return any(
        sum(_height(child) >= height for child in container.children()) > 1
        for container in module.modules()
        if isinstance(container, _CONTAINERS)
    )


def _height(module: nn.Module) -> int:
    inside = children(module)
    return 1 + max(_height(child) for _, child in inside) if inside else 0


def _join_small(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Norms and bare parameters joined to the piece before them, or at the very start to the one after."""
    joined: list[_Piece] = []
    for piece in pieces:
        if joined and (piece.joins or joined[-1].joins):
            joined[-1] = joined[-1] + piece
        else:
            joined.append(piece)
    return joined


def _split(pieces: list[_Piece]) -> tuple[tuple[_Piece, ...], list[_Piece]]:
    """Stem and blocks. Without repeated modules every piece is a block and there is no stem."""
    kinds = _block_kinds(pieces)
    places = [i for i, piece in enumerate(pieces) if piece.kind in kinds]
    if not places:
        return (), pieces
    blocks: list[_Piece] = []
    waiting: list[_Piece] = []  # between two blocks (a downsampling, say): goes with the block that follows
    for piece in pieces[places[0] : places[-1] + 1]:
        waiting.append(piece)
        if piece.kind in kinds:
            blocks.append(_sum(waiting))
            waiting = []
    neck = pieces[places[-1] + 1 :]
    blocks[-1] = _sum([blocks[-1], *neck])
    return tuple(pieces[: places[0]]), blocks


def _block_kinds(pieces: Sequence[_Piece]) -> frozenset[str]:
    """The classes that stand twice in a row and are more than a stem's convolutions."""
    total = sum(piece.size for piece in pieces)
    size: Counter[str] = Counter()
    for piece in pieces:
        size[piece.kind] += piece.size
    return frozenset(
        a.kind
        for a, b in pairwise(pieces)
        if a.kind == b.kind
        and (a.height > 1 or (a.height == 1 and size[a.kind] >= _SHARE_OF_SHALLOW_BLOCKS * total))
    )


def _sum(pieces: Sequence[_Piece]) -> _Piece:
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    return whole
