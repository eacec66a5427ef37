"""A small model and recipe whose plan can be worked out by hand; shared by the tests of plans."""

from __future__ import annotations

from typing import Any

from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.resolving import resolve
from lehr.schedules import cosine, warmup
from lehr.selection import ModelFacts, ParameterFacts

P = ParameterFacts
NET = ModelFacts(
    "Net",
    (
        P("stem.weight", (8, 3), layer=0),
        P("bn.weight", (8,), norm=True, layer=0),
        P("bn.bias", (8,), norm=True, bias=True, layer=0),
        P("body.weight", (8, 8), layer=1),
        P("body.bias", (8,), bias=True, layer=1),
        P("fc.weight", (5, 8), layer=2, aliases=("embed.weight",)),
        P("fc.bias", (5,), bias=True, layer=2),
    ),
    head=("fc",),
    blocks=(("stem", "bn"), ("body",)),
    layers=3,
    understood=("head: fc, the last linear layer", "tied: fc.weight is also embed.weight"),
)
TWO_STAGES = Recipe(
    [
        Stage("2 epochs", train="head", lr=1e-3),
        Stage("3 epochs", train="all", lr={"head": 1e-3, "backbone": 1e-4}),
    ],
    weight_decay=0.05,
    batch_size=32,
    schedule=warmup("20%") >> cosine(floor=0.01),
)


def plan_of(
    stage: Stage | None = None,
    *,
    facts: ModelFacts = NET,
    samples: int = 320,
    batches: int | None = None,
    **said: Any,
) -> Plan:
    """The plan of a recipe with one stage over ten steps an epoch."""
    stage = stage or Stage("2 epochs", train="all", lr=0.1)
    return resolve(Recipe([stage], **said), facts, samples=samples, batches=batches)
