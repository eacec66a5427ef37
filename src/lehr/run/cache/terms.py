"""What a shortcut works for, as a value. It must not know how it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lehr.run.cache.store import Store
from lehr.run.cache.ways import Wanted, Way
from lehr.run.layout import Name
from lehr.run.precision import Arithmetic


@dataclass(frozen=True)
class Terms:
    """What a shortcut works for: what trains, what is wanted, on which arithmetic; where a file may lie, and where features
    are kept for other runs.

    `data` is which half of the data it is for. `found` is told of the way that was found, `lost` why there is none, `said`
    what else a person should know. `again` looks whether samples are the same again: why not, and whether that is news. Of
    an average (`is_average`) the weights are written at every step, also where they stay the same. Where `is_fresh`, samples
    that draw random numbers are others each time. `layout` is how features are to lie, None: as they come.
    """

    data: str
    trained: frozenset[str]
    wanted: Wanted
    on: Arithmetic
    found: Callable[[Way, Store], None]
    lost: Callable[[str], None]
    said: Callable[[str], None]
    again: Callable[[], tuple[str, bool]]
    folder: Path | None = None
    cache_dir: Path | None = None
    is_average: bool = False
    is_fresh: bool = False
    layout: Callable[[], Name | None] = lambda: None

    @property
    def views(self) -> int:
        """The number of rows for each sample."""
        return self.wanted.views
