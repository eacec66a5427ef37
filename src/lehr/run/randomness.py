"""The random states of a process, taken and put back: torch's on the CPU and the device, `random`, `numpy.random`,
and generators of a person's own. What comes from (seed, view, index) alone is `lehr.data.purity`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Plain = dict[str, "int | float | str | None"]
_MERSENNE = "MT19937"
_WORDS = 624


@dataclass(frozen=True)
class RandomState:
    """All of it at one moment: tensors, and the few plain values beside them."""

    tensors: Mapping[str, torch.Tensor]
    plain: Plain

    def named(self, prefix: str) -> RandomState:
        """The same under longer names."""
        return RandomState(
            {f"{prefix}{name}": tensor for name, tensor in self.tensors.items()},
            {f"{prefix}{name}": value for name, value in self.plain.items()},
        )

    def within(self, prefix: str) -> RandomState:
        """What is under names with this prefix, without it."""
        return RandomState(
            {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)},
            {n.removeprefix(prefix): v for n, v in self.plain.items() if n.startswith(prefix)},
        )


@dataclass(frozen=True)
class Randomness:
    """The generators that a run may draw from on `device`; `own` are those that a person made."""

    device: torch.device
    own: Sequence[torch.Generator] = ()

    def take(self) -> RandomState:
        """The state of each generator now."""
        tensors = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.device.type == "mps":
            tensors["mps"] = torch.mps.get_rng_state()
        for number, generator in enumerate(self.own):
            tensors[f"own-{number}"] = generator.get_state()
        version, words, gauss = random.getstate()
        tensors["python"] = torch.tensor(words)
        plain: Plain = {"python.version": version, "python.gauss": gauss}
        of_numpy: Any = np.random.get_state(legacy=False)
        if (
            of_numpy["bit_generator"] == _MERSENNE
        ):  # another one was set by the person, and is the person's own
            tensors["numpy"] = torch.from_numpy(of_numpy["state"]["key"].astype(np.int64))
            plain["numpy.at"] = int(of_numpy["state"]["pos"])
            plain |= {"numpy.has_gauss": int(of_numpy["has_gauss"]), "numpy.gauss": float(of_numpy["gauss"])}
        return RandomState(tensors, plain)

    def put(self, state: RandomState) -> None:
        """Make every generator be as it was; one that the state does not know stays as it is.

        Raises:
            ValueError, TypeError, RuntimeError, KeyError, OverflowError: for what is no state of it.
        """
        tensors, plain = state.tensors, state.plain
        torch.set_rng_state(tensors["torch"])
        if self.device.type == "cuda" and "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"], self.device)
        if self.device.type == "mps" and "mps" in tensors:
            torch.mps.set_rng_state(tensors["mps"])
        for number, generator in enumerate(self.own):
            if f"own-{number}" in tensors:
                generator.set_state(tensors[f"own-{number}"])
        random.setstate((plain["python.version"], tuple(tensors["python"].tolist()), plain["python.gauss"]))
        if "numpy" in tensors:
            keys = tensors["numpy"].reshape(_WORDS).numpy().astype(np.uint32)
            rest: Any = (plain["numpy.at"], plain["numpy.has_gauss"], plain["numpy.gauss"])
            if not (
                isinstance(rest[0], int) and 0 <= rest[0] <= _WORDS
            ):  # numpy would read beyond its memory
                raise ValueError(f"numpy's generator stands at {rest[0]}, not within its {_WORDS} words")
            np.random.set_state((_MERSENNE, keys, *rest))

    @contextmanager
    def rewound(self, state: RandomState | None) -> Iterator[None]:
        """Within this context the generators are as in `state`; afterwards they are as before."""
        before = self.take()
        try:
            if state is not None:
                self.put(state)
            yield
        finally:
            self.put(before)
