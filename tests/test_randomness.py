"""The random states of a process: taken, put back, and rewound for a while."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr.run.checkpoint import CheckpointFolder, Snapshot
from lehr.run.randomness import Randomness, RandomState
from test_state import WHOLE

CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def drawn(*own: torch.Generator) -> list[Any]:
    """A little of everything; an odd number of gaussians, of which numpy and `random` make two at a time."""
    return [
        torch.rand(3).tolist(), torch.randn(17).tolist(), torch.randperm(9).tolist(),
        random.random(), random.gauss(0, 1), random.sample(range(99), 5),
        np.random.rand(2).tolist(), np.random.standard_normal(), np.random.permutation(9).tolist(),
        *(torch.rand(2, generator=generator).tolist() for generator in own),
    ]  # fmt: skip


def through_files(state: RandomState, folder: Path) -> RandomState:
    """As a checkpoint keeps it."""
    files = CheckpointFolder(folder / "checkpoints")
    files.write(
        Snapshot(
            replace(WHOLE, random=state.plain, best=replace(WHOLE.best, run=None, stage=None, ranked=())),
            dict(state.tensors),
            {},
        )
    )
    found = files.newest()
    assert found is not None
    return RandomState(found.snapshot.tensors, found.snapshot.state.random)


@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_everything_goes_on(before: int, tmp_path: Path) -> None:
    """From a state that went through a checkpoint's files, torch, `random`, numpy and a person's own generators
    draw the same once more; also where a gaussian was drawn and its twin waits.
    """
    own = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    randomness = Randomness(CPU, own)
    for _ in range(before):
        drawn(*own)
    state = through_files(randomness.take(), tmp_path)
    first, second = drawn(*own), drawn(*own)
    randomness.put(state)
    assert [drawn(*own), drawn(*own)] == [first, second]


def test_a_waiting_gaussian_is_kept() -> None:
    """The second of two gaussians that were made together is part of the state, and so is that there is none."""
    np.random.seed(1)
    random.seed(1)
    none = Randomness(CPU).take()
    assert none.plain["numpy.has_gauss"] == 0
    assert none.plain["python.gauss"] is None
    np.random.standard_normal()
    random.gauss(0, 1)
    one = Randomness(CPU).take()
    assert one.plain["numpy.has_gauss"] == 1
    twins = random.gauss(0, 1), np.random.standard_normal()
    Randomness(CPU).put(none)
    assert (random.gauss(0, 1), np.random.standard_normal()) != twins
    Randomness(CPU).put(one)
    assert (random.gauss(0, 1), np.random.standard_normal()) == twins


def test_taking_draws_nothing() -> None:
    """To take the state changes nothing that is drawn."""
    own = torch.Generator().manual_seed(3)
    state = Randomness(CPU, [own]).take()
    first = drawn(own)
    Randomness(CPU, [own]).put(state)
    Randomness(CPU, [own]).take()
    assert drawn(own) == first


def test_rewound_for_a_while() -> None:
    """Within the context all is as it was in a state; after it, also after an error, as if nothing was drawn."""
    own = torch.Generator().manual_seed(3)
    randomness = Randomness(CPU, [own])
    then = randomness.take()
    first = drawn(own)
    now = randomness.take()
    following = drawn(own)
    randomness.put(now)
    with randomness.rewound(then):
        assert drawn(own) == first
    with suppress(KeyError), randomness.rewound(then):
        drawn(own)
        raise KeyError
    with randomness.rewound(None):
        pass
    assert drawn(own) == following


def test_generators_that_are_not_in_the_state_stay() -> None:
    """A generator that was not there when the state was taken goes on from where it is; one that has gone is left out."""
    with_one, with_two = ([torch.Generator().manual_seed(n) for n in range(k)] for k in (1, 2))
    state = Randomness(CPU, with_one).take()
    before = with_two[1].get_state()
    Randomness(CPU, with_two).put(state)
    assert torch.equal(with_two[0].get_state(), with_one[0].get_state())
    assert torch.equal(with_two[1].get_state(), before)
    Randomness(CPU).put(Randomness(CPU, with_two).take())


def test_another_device_is_no_matter() -> None:
    """The state of a device that is not there is left out: the rest comes back."""
    state = Randomness(CPU).take()
    first = drawn()
    Randomness(CPU).put(
        RandomState({**state.tensors, "cuda": torch.zeros(16, dtype=torch.uint8)}, state.plain)
    )
    assert drawn() == first


def test_names_are_told_apart() -> None:
    """Two states under prefixes lie side by side, and each comes back alone."""
    state = Randomness(CPU).take()
    here, there = state.named("random/now/"), state.named("random/epoch/")
    both = RandomState({**here.tensors, **there.tensors, "model/x": torch.ones(1)}, here.plain | there.plain)
    found = both.within("random/now/")
    assert found.plain == state.plain
    assert found.tensors.keys() == state.tensors.keys()


FORGED: dict[str, Any] = {
    "numpy.at": [-1, 625, 10**9, 2**63 - 1, None, "1", 1.5],
    "python.version": [None, 1, "3"],
    "python.gauss": [],
    "torch": [torch.zeros(3, dtype=torch.uint8), torch.zeros(5056)],
    "python": [torch.zeros(624, dtype=torch.int64), torch.full((625,), -1), torch.full((625,), 2**40)],
    "numpy": [torch.zeros(3, dtype=torch.int64)],
    "own-0": [torch.zeros(3, dtype=torch.uint8)],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in FORGED.items() for v in values])
def test_what_is_no_state_is_refused(name: str, value: Any) -> None:
    """A state that no generator can have is refused before anything could read beyond its memory."""
    randomness = Randomness(CPU, [torch.Generator()])
    state = randomness.take()
    try:
        forged = (
            RandomState({**state.tensors, name: value}, state.plain)
            if isinstance(value, torch.Tensor)
            else RandomState(state.tensors, {**state.plain, name: value})
        )
        with pytest.raises((RuntimeError, ValueError, TypeError, KeyError, OverflowError)):
            randomness.put(forged)
    finally:
        randomness.put(state)


def test_a_missing_part_is_refused() -> None:
    """A state without the generators that every process has is refused."""
    with pytest.raises(KeyError):
        Randomness(CPU).put(RandomState({}, {}))


def test_a_person_s_numpy_generator_is_their_own() -> None:
    """Where a person has put another generator in numpy's place, lehr leaves it alone, and says nothing of it."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        state = Randomness(CPU).take()
        assert "numpy" not in state.tensors
        first = np.random.rand()
        Randomness(CPU).put(state)
        assert np.random.rand() != first
    finally:
        np.random.set_bit_generator(before)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 700))
def test_any_moment_comes_back(seed: int, draws: int) -> None:
    """Wherever in their cycle of 624 words the generators stand, they go on from there."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(draws):
        random.getrandbits(32)
    np.random.randint(0, 2**32, draws, dtype=np.uint32)
    torch.randint(9, (draws,))
    state = Randomness(CPU).take()
    first = drawn()
    Randomness(CPU).put(state)
    assert drawn() == first


@CUDA
def test_a_gpu_goes_on() -> None:
    """The generator of the GPU comes back, too."""
    randomness = Randomness(torch.device("cuda"))
    state = randomness.take()
    first = torch.rand(5, device="cuda").tolist()
    randomness.put(state)
    assert torch.rand(5, device="cuda").tolist() == first
