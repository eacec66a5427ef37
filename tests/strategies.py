"""Hypothesis strategies: random durations, schedules, recipes and model facts. Only values; no test lives
here.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from lehr import schedules as s
from lehr.curves import Schedule
from lehr.duration import Duration
from lehr.recipe import Recipe, Stage
from lehr.selection import ModelFacts, ParameterFacts

shares = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0.0, 1.0, allow_subnormal=False))
floors_above_zero = st.floats(1e-6, 1.0)
percents = st.integers(0, 1000).map(lambda tenths: str(Duration(Fraction(tenths, 10), "%")))


def durations() -> st.SearchStrategy[Duration]:
    """Every kind of duration, with at most three decimals where decimals are allowed."""
    thousandths = st.integers(0, 50_000).map(lambda n: Fraction(n, 1000))
    return st.one_of(
        thousandths.map(lambda amount: Duration(amount, "epochs")),
        st.integers(0, 10**9).map(lambda amount: Duration(Fraction(amount), "steps")),
        st.integers(0, 100_000).map(lambda n: Duration(Fraction(n, 1000), "%")),
    )


def shapes(length: str | None = None, per: str = "step") -> st.SearchStrategy[Schedule]:
    """One part that comes down from the peak, or stays there; `length` None takes what the others leave."""
    where: dict[str, Any] = {"length": length, "per": per}
    marks = st.lists(percents, min_size=1, max_size=3)
    return st.one_of(
        st.just(s.constant(length=length)),
        shares.map(lambda floor: s.cosine(floor, **where)),
        shares.map(lambda floor: s.linear(floor, **where)),
        st.builds(lambda power, floor: s.polynomial(power, floor, **where), st.floats(0.1, 5.0), shares),
        floors_above_zero.map(lambda floor: s.exponential(floor, **where)),
        st.builds(lambda at, by: s.step_decay(at, by, **where), marks, shares),
        st.builds(
            lambda up, start, end, curve: s.one_cycle(up, start=start, end=end, curve=curve, **where),
            percents,
            shares,
            shares,
            st.sampled_from(["cosine", "linear"]),
        ),
        st.builds(
            lambda first, grow, decay, inner: s.restarts(first, grow, decay, inner, **where),
            st.sampled_from(["1%", "10%", "30%", "100%"]),
            st.floats(1.0, 4.0),
            shares,
            st.one_of(st.none(), shares.map(s.cosine), shares.map(s.linear), st.just(s.one_cycle("40%"))),
        ),
    )


def warmups(length: st.SearchStrategy[str] = percents) -> st.SearchStrategy[Schedule]:
    """A warm-up of either curve, with or without a start of its own."""
    return st.builds(s.warmup, length, st.none() | shares, st.sampled_from(["linear", "quadratic"]))


@st.composite
def joins(draw: st.DrawFn) -> Schedule:
    """A schedule of one to five parts that fits any number of steps: shares of at most 100 % together."""
    cuts = sorted(draw(st.lists(st.integers(0, 1000), max_size=4, unique=True)))
    tenths = [
        b - a for a, b in zip([0, *cuts], [*cuts, draw(st.integers(max(cuts, default=0), 1000))], strict=True)
    ]
    lengths = [str(Duration(Fraction(n, 10), "%")) for n in tenths]
    open_at = draw(st.none() | st.integers(0, len(lengths)))
    parts: list[Schedule] = []
    for index, length in enumerate(lengths):
        if index == open_at:
            parts.append(draw(shapes()))
        held = st.just(s.hold(length))
        parts.append(draw(st.one_of(shapes(length), held, warmups(st.just(length)))))
    joined = parts[0]
    for part in parts[1:]:
        joined = joined >> part
    return joined


views = st.just("fresh") | st.integers(1, 100)
caches = st.sampled_from(["auto", "off", "require"])
byte_sizes = st.builds(
    "{} {}".format, st.integers(1, 900), st.sampled_from(["bytes", "kB", "KiB", "MB", "MiB", "GiB", "TB"])
)


def _stages() -> st.SearchStrategy[Stage]:
    rate = st.floats(1e-6, 10.0)
    patterns = st.sampled_from(["all", "head", "backbone", "norm", "bias", "last 2 blocks", "layer4.*"])
    return st.builds(
        Stage,
        st.one_of(
            st.integers(1, 90).map("{} epochs".format),
            st.integers(1, 10**6).map("{} steps".format),
            st.just("2.5 epochs"),
        ),
        train=patterns | st.lists(patterns, min_size=1, max_size=3, unique=True),
        lr=rate | st.dictionaries(patterns, rate, min_size=1, max_size=3),
        schedule=st.none() | joins(),
        batch_size=st.none() | st.integers(1, 4096),
        accumulate=st.none() | st.integers(1, 64),
        weight_decay=st.none() | st.floats(0.0, 1.0),
        layer_decay=st.none() | st.floats(0.1, 1.0),
        restore_best=st.none() | st.booleans(),
        views=st.none() | views,
        cache=st.none() | caches,
    )


def recipes() -> st.SearchStrategy[Recipe]:
    """Any recipe: every key, at its default or not."""
    settings = st.dictionaries(
        st.sampled_from(["momentum", "nesterov", "eps", "betas", "foreach"]),
        st.one_of(
            st.booleans(), st.integers(-5, 5), st.floats(-1e9, 1e9), st.lists(st.floats(0.0, 1.0), max_size=2)
        ),
        max_size=3,
    )
    text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=8)
    return st.builds(
        Recipe,
        st.lists(_stages(), min_size=1, max_size=3),
        optimizer=st.one_of(
            st.just("adamw"), text, st.builds(lambda name, more: {"name": name, **more}, text, settings)
        ),
        schedule=joins(),
        batch_size=st.integers(1, 4096),
        accumulate=st.integers(1, 64),
        weight_decay=st.floats(0.0, 1.0),
        no_decay=st.lists(st.sampled_from(["norm", "bias", "*.scale"]), max_size=3),
        layer_decay=st.floats(0.1, 1.0),
        min_lr=st.floats(0.0, 1.0),
        lr_rule=st.sampled_from(["fixed", "linear"]),
        clip_norm=st.none() | st.floats(1e-3, 100.0),
        ema=st.none() | st.floats(0.1, 0.9999),
        label_smoothing=st.floats(0.0, 0.99),
        seed=st.integers(0, 2**40),
        monitor=text,
        patience=st.none() | st.integers(1, 50).map("{} epochs".format),
        restore_best=st.booleans(),
        augment=st.none() | st.lists(text, max_size=3),
        views=views,
        cache=caches,
        cache_budget=byte_sizes,
        cache_dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
        cache_exact=st.booleans(),
    )


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    """A model of one to eight blocks of weight, bias and norm, with a head; here and there a parameter that
    was frozen by hand.
    """
    depth = draw(st.integers(1, 8))
    frozen = draw(st.sets(st.integers(0, 3 * depth - 1), max_size=3))
    parameters = []
    for block in range(depth):
        for k, (leaf, shape) in enumerate(
            [("conv.weight", (4, 4, 3)), ("conv.bias", (4,)), ("norm.weight", (4,))]
        ):
            parameters.append(
                ParameterFacts(
                    f"blocks.{block}.{leaf}",
                    shape,
                    norm=k == 2,
                    bias=k == 1,
                    layer=block,
                    frozen_by_hand=3 * block + k in frozen,
                )
            )
    tied = draw(st.booleans())
    parameters.append(
        ParameterFacts("head.weight", (2, 4), layer=depth, aliases=("tied.weight",) if tied else ())
    )
    parameters.append(ParameterFacts("head.bias", (2,), bias=True, layer=depth))
    return ModelFacts(
        "random",
        tuple(parameters),
        head=("head",),
        blocks=tuple((f"blocks.{i}",) for i in range(depth)),
        layers=depth + 1,
    )
