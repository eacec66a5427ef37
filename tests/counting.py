"""A backend of torch.compile that counts graphs, and a compiler that has forgotten what others have compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from lehr.run.compiling import limits


class Counting:
    """A backend that compiles nothing, and counts what it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


@contextmanager
def forgotten() -> Iterator[None]:
    """What others have compiled does not count, and what is allowed here is not allowed them."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(limits()):
        yield
    torch._dynamo.reset()
