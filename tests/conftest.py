"""Every test starts alike: one thread, so that small tensors are quick and the numbers the same
everywhere, and one seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("lehr", deadline=None)  # a busy machine is no failure
settings.load_profile("lehr")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
