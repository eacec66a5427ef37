"""An exponential moving average of the weights, counted in steps. It knows a model, nothing else."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from lehr.run.facts import unwrap


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
        self._moves = [t.is_floating_point() and bool(t.isfinite().all()) for t in _tensors(self._source)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step`."""
        decay = min(self._decay, (1 + step) / (10 + step))
        pairs = list(zip(_tensors(self.model), _tensors(self._source), self._moves, strict=True))
        torch._foreach_lerp_(
            [a for a, _, moves in pairs if moves], [s for _, s, moves in pairs if moves], 1.0 - decay
        )
        for average, source, moves in pairs:
            if not moves:
                average.copy_(source)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Weights and buffers, looked up anew: a module may put another tensor in a buffer's place."""
    return [t.detach() for t in (*model.parameters(), *model.buffers())]
