"""An exponential moving average of the weights, counted in steps. It knows a model, nothing else."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from lehr.run.facts import named, unwrap
from lehr.run.freezing import is_frozen


class Ema:
    """A second model whose weights follow the first: average += (1 - d) * (weight - average) after each step.

    d at step t (0-based) is min(decay, (1 + t) / (10 + t)), so that a short run is not held at its start (the
    rule of TensorFlow's ExponentialMovingAverage). Floating-point buffers are averaged alike. Whole numbers
    are copied, and so are tensors that hold an infinity (the mask of an attention), of which there is no
    average. What is frozen stays equal to the bit.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._source = unwrap(model)
        self.model = deepcopy(self._source).eval().requires_grad_(False)
        self._decay = decay
        self._choices: dict[frozenset[str], list[bool]] = {}
        self._moves = [t.is_floating_point() and bool(t.isfinite().all()) for t in _tensors(self._source)]

    @torch.no_grad()
    def update(self, step: int, trained: frozenset[str] | None = None) -> None:
        """Take in the weights after update `step`; of what else than `trained` was frozen in it, nothing, since an
        objective's average counts its own updates.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        pairs = list(zip(_tensors(self.model), _tensors(self._source), self._moves, strict=True))
        if trained is not None:
            pairs = [pair for pair, taken in zip(pairs, self._taken(trained), strict=True) if taken]
        torch._foreach_lerp_(
            [a for a, _, moves in pairs if moves], [s for _, s, moves in pairs if moves], 1.0 - decay
        )
        for average, source, moves in pairs:
            if not moves:
                average.copy_(source)

    def _taken(self, trained: frozenset[str]) -> list[bool]:
        """Which tensors an update of `trained` may have changed: these, and the buffers of modules that hold one."""
        if trained not in self._choices:
            active = {
                id(t)
                for module in self._source.modules()
                if not is_frozen(module)
                for t in module.buffers(recurse=False)
            }
            names = {id(p): name for name, p in named(self._source).items()}
            self._choices[trained] = [names.get(id(p)) in trained for p in self._source.parameters()] + [
                id(b) in active for b in self._source.buffers()
            ]
        return self._choices[trained]


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Weights and buffers, looked up anew: a module may put another tensor in a buffer's place."""
    return [t.detach() for t in (*model.parameters(), *model.buffers())]
