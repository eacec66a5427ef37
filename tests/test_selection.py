"""Selection: what roles, paths and globs mean, near misses in words, and the disjoint, total partition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.errors import SelectionError
from lehr.selection import ModelFacts, ParameterFacts, Selection, partition, select
from strategies import models

P = ParameterFacts
NET = ModelFacts(
    "Net",
    (
        P("stem.conv.weight", (8, 3, 3, 3), layer=0),
        P("stem.bn.weight", (8,), norm=True, layer=0),
        P("stem.bn.bias", (8,), norm=True, bias=True, layer=0),
        P("blocks.0.fc.weight", (8, 8), layer=1),
        P("blocks.0.fc.bias", (8,), bias=True, layer=1),
        P("blocks.1.fc.weight", (8, 8), layer=2),
        P("blocks.1.fc.bias", (8,), bias=True, layer=2),
        P("blocks.10.fc.weight", (8, 8), layer=3, frozen_by_hand=True),
        P("norm.weight", (8,), norm=True, layer=4),
        P("fc.weight", (5, 8), layer=4, aliases=("embed.weight",)),
        P("fc.bias", (5,), bias=True, layer=4),
    ),
    head=("fc",),
    blocks=(("blocks.0",), ("blocks.1",), ("blocks.10",)),
    layers=5,
)
EVERY = tuple(p.name for p in NET.parameters)
FREE = tuple(name for name in EVERY if name != "blocks.10.fc.weight")


def _but(*left_out: str) -> tuple[str, ...]:
    return tuple(name for name in EVERY if name not in left_out)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("all", FREE),
        ("head", ("fc.weight", "fc.bias")),
        ("backbone", _but("fc.weight", "fc.bias")),
        ("norm", ("stem.bn.weight", "stem.bn.bias", "norm.weight")),
        ("bias", ("stem.bn.bias", "blocks.0.fc.bias", "blocks.1.fc.bias", "fc.bias")),
        ("last block", ("blocks.10.fc.weight",)),
        ("last 1 block", ("blocks.10.fc.weight",)),
        ("last 2 blocks", ("blocks.1.fc.weight", "blocks.1.fc.bias", "blocks.10.fc.weight")),
        (
            ["all", "!norm", "!bias"],
            ("stem.conv.weight", "blocks.0.fc.weight", "blocks.1.fc.weight", "fc.weight"),
        ),
        (["!fc", "last 2 blocks", "fc"], ("blocks.1.fc.weight", "blocks.1.fc.bias", "blocks.10.fc.weight")),
        ("stem", ("stem.conv.weight", "stem.bn.weight", "stem.bn.bias")),
        ("stem.bn", ("stem.bn.weight", "stem.bn.bias")),
        ("fc", ("fc.weight", "fc.bias")),  # a path from the root: not blocks.0.fc
        ("fc.weight", ("fc.weight",)),
        ("blocks.1", ("blocks.1.fc.weight", "blocks.1.fc.bias")),  # and not blocks.10
        ("blocks.1?", ("blocks.10.fc.weight",)),
        ("blocks.[01]", ("blocks.0.fc.weight", "blocks.0.fc.bias", "blocks.1.fc.weight", "blocks.1.fc.bias")),
        ("blocks.1*.weight", ("blocks.1.fc.weight", "blocks.10.fc.weight")),
        ("*.fc.weight", ("blocks.0.fc.weight", "blocks.1.fc.weight", "blocks.10.fc.weight")),
        ("norm.*", ("norm.weight",)),  # the module called norm, not the role
        ("*", EVERY),
        ("embed", ("fc.weight",)),  # the other name of the tied weight
        ("embed.*", ("fc.weight",)),
        (["fc.bias", "stem.conv"], ("stem.conv.weight", "fc.bias")),
        (["head", "norm"], ("stem.bn.weight", "stem.bn.bias", "norm.weight", "fc.weight", "fc.bias")),
        (["all", "blocks.10"], EVERY),
        (("head", "head"), ("fc.weight", "fc.bias")),
    ],
    ids=str,
)
def test_meaning(patterns: str | list[str], names: tuple[str, ...]) -> None:
    """Each way of naming parameters means exactly these, in the model's order."""
    assert select(patterns, NET).names == names


def test_a_selection_is_a_value() -> None:
    """A selection contains, iterates, and tells what each pattern brought."""
    chosen = select(["head", "stem.bn"], NET)
    assert isinstance(chosen, Selection)
    assert "fc.weight" in chosen
    assert "blocks.0.fc.weight" not in chosen
    assert tuple(chosen) == chosen.names
    assert chosen.by_pattern["stem.bn"] == ("stem.bn.weight", "stem.bn.bias")
    assert chosen == select(["head", "stem.bn"], NET)


def test_facts_count_scalars() -> None:
    """A parameter's count is the product of its shape, a tied weight counts once, and an alias leads to
    it.
    """
    assert NET.by_name["stem.conv.weight"].count == 216
    assert P("scale", ()).count == 1
    assert NET.by_name["embed.weight"] is NET.by_name["fc.weight"]
    assert NET.count(["fc.weight", "fc.bias"]) == 45
    assert NET.count() == sum(p.count for p in NET.parameters)
    assert NET.modules[:3] == ("stem", "stem.conv", "stem.bn")


NO_HEAD = ModelFacts("Headless", (P("a.weight", (2,)), P("b.weight", (2,))))
ALL_FROZEN = ModelFacts(
    "Ice", (P("a.weight", (2,), frozen_by_hand=True), P("b.weight", (2,), frozen_by_hand=True))
)


@pytest.mark.parametrize(
    ("patterns", "facts", "message"),
    [
        (
            "blcoks",
            NET,
            'here: \'blcoks\' matches no parameter of Net; did you mean "blocks" or "blocks.1" or '
            '"blocks.0"? The model\'s top-level parts are: '
            "stem, blocks, norm, fc, embed; the roles are: all, backbone, bias, head, norm, last N blocks",
        ),
        (
            "layer4",
            NO_HEAD,
            "here: 'layer4' matches no parameter of Headless. The model's top-level parts are: a, b; "
            "the roles are: all, backbone, bias, head, norm, last N blocks",
        ),
        ("haed", NET, "here: 'haed' matches no parameter of Net; did you mean \"head\"?"),
        ("last two blocks", NET, 'did you mean "last 2 blocks"'),
        ("fc.wieght", NET, 'did you mean "fc.weight"'),
        ("blocks.9*", NET, "here: 'blocks.9*' matches no parameter of Net"),
        ("Head", NET, 'did you mean "head"'),
        ("", NET, "here: '' matches no parameter of Net"),
        (
            "norm",
            NO_HEAD,
            "here: 'norm' matches no parameter of Headless. The model's",
        ),  # a role, and not its own nearest name
        (
            "head",
            NO_HEAD,
            "here: 'head' needs to know the head of Headless, and none was recognised; name the module "
            "instead, for example "
            '"b", or say head="b" to lehr.fit or lehr.plan',
        ),
        ("backbone", NO_HEAD, "'backbone' needs to know the head of Headless"),
        (
            "last 4 blocks",
            NET,
            "here: 'last 4 blocks' of Net, which has 3 recognised blocks; expected a number from 1 to 3",
        ),
        ("last 0 blocks", NET, "expected a number from 1 to 3"),
        (
            "last block",
            NO_HEAD,
            "here: no blocks were recognised in Headless; name its modules instead, for example ('a', 'b')",
        ),
        (
            "all",
            ALL_FROZEN,
            "here: 'all' leaves out what was frozen by hand, and all of Ice was; name what to train, for "
            "example "
            '"b.weight" or "*" for everything',
        ),
        ([], NET, 'here: an empty list selects nothing; name what to train, for example "head" or "all"'),
        ([5], NET, 'here: 5 is not a pattern; expected a text such as "head" or "layer4"'),
        (["head", "layre"], NET, "here: 'layre' matches no parameter"),
    ],
)
def test_near_misses(patterns: str | list[str], facts: ModelFacts, message: str) -> None:
    """A pattern that matches nothing is refused, naming the nearest names and what there is."""
    with pytest.raises(SelectionError) as caught:
        select(patterns, facts, where="here")
    assert message in str(caught.value)


def test_everything_frozen_by_hand_can_be_named() -> None:
    """What was frozen by hand trains when a pattern other than "all" names it, as the message says."""
    assert select("*", ALL_FROZEN).names == ("a.weight", "b.weight")
    assert select("b.weight", ALL_FROZEN).names == ("b.weight",)


def test_partition() -> None:
    """Patterns that do not overlap give each parameter its one owner; what a stage does not train is not
    claimed.
    """
    owner = partition(("backbone", "head"), ("stem.conv.weight", "fc.bias", "fc.weight"), NET, where="lr")
    assert owner == {"stem.conv.weight": "backbone", "fc.bias": "head", "fc.weight": "head"}


@pytest.mark.parametrize(
    ("patterns", "names", "message"),
    [
        (
            ("head", "*"),
            ("fc.weight", "fc.bias"),
            "lr: 'fc.weight' is in both 'head' and '*'; each parameter has one rate, so write patterns that "
            "do not overlap",
        ),
        (
            ("head", "backbone"),
            ("fc.weight", "fc.bias"),
            "lr: 'backbone' names nothing that this stage trains; leave it out, or add it to the stage's "
            "`train`",
        ),
        (
            ("head",),
            ("fc.weight", "stem.conv.weight", "norm.weight"),
            "lr: 'stem.conv.weight' and 1 more would be trained but has no rate: ['head'] leave it out; "
            'add a pattern that names it, for example "backbone"',
        ),
        (("haed",), ("fc.weight",), "lr: 'haed' matches no parameter of Net; did you mean \"head\"?"),
    ],
)
def test_partition_refused(patterns: tuple[str, ...], names: tuple[str, ...], message: str) -> None:
    """Two owners, no owner, or a pattern that owns nothing is an error that names the parameter and the
    mending.
    """
    with pytest.raises(SelectionError) as caught:
        partition(patterns, names, NET, where="lr")
    assert message in str(caught.value)


PATTERNS = st.sampled_from(
    ["all", "head", "backbone", "norm", "bias", "last block", "blocks.0", "*.weight", "head.bias", "*"]
)


@given(models(), st.lists(PATTERNS, min_size=1, max_size=4))
def test_select_properties(facts: ModelFacts, patterns: list[str]) -> None:
    """Selecting is in the model's order, a union whatever the order of the patterns, and idempotent."""
    free = [p.name for p in facts.parameters if not p.frozen_by_hand]
    chosen = select(patterns, facts).names
    order = [p.name for p in facts.parameters]
    assert list(chosen) == sorted(chosen, key=order.index)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) == set().union(*(select(pattern, facts).names for pattern in patterns))
    assert select(patterns[::-1], facts).names == chosen
    assert select(list(chosen), facts).names == chosen
    assert list(select("all", facts).names) == free
    assert set(select("head", facts).names).isdisjoint(select("backbone", facts).names)
    assert select(["head", "backbone"], facts).names == tuple(order)


@given(models())
def test_partition_is_disjoint_and_total(facts: ModelFacts) -> None:
    """Head and backbone share out everything that is trained, each parameter once."""
    names = select("*", facts).names
    owner = partition(("head", "backbone"), names, facts, where="lr")
    assert set(owner) == set(names)
    assert {name for name, pattern in owner.items() if pattern == "head"} == set(select("head", facts).names)


@pytest.mark.parametrize("patterns", [["!norm"], ["head", "!head"]])
def test_a_selection_that_leaves_nothing_is_refused(patterns: list[str]) -> None:
    """Patterns that only take away, or take everything away, are an error that says what to write."""
    with pytest.raises(
        SelectionError, match=r'leaves nothing; name what to keep as well, as in \["all", "!norm"\]'
    ):
        select(patterns, NET)


def test_a_pattern_that_takes_nothing_away_is_refused() -> None:
    """A pattern with ! that matches nothing is a mistake like any other, with the nearest name."""
    with pytest.raises(SelectionError, match="'stm' matches no parameter of Net; did you mean \"stem\""):
        select(["all", "!stm"], NET)
