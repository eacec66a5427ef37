"""An exponential moving average of the weights, counted in steps. It knows a model, nothing else."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from lehr.run.facts import unwrap


class Ema:
    """A second model whose weights follow the first: average += (1 - d) * (weight - average) after each step.

    d at step t (0-based) is min(decay, (1 + t) / (10 + t)), so that a short run is not held at its start (the rule of TensorFlow's
    ExponentialMovingAverage). Floating-point buffers are averaged alike, others copied. What is frozen stays equal to the bit.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = deepcopy(unwrap(model)).eval().requires_grad_(False)
        self._decay = decay
        source, average = _tensors(unwrap(model)), _tensors(self.model)
        floating = [t.is_floating_point() for t in source]
        self._averaged = (
            [t for t, f in zip(average, floating, strict=True) if f],
            [t for t, f in zip(source, floating, strict=True) if f],
        )
        self._copied = [(a, s) for a, s, f in zip(average, source, floating, strict=True) if not f]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step`."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._averaged, 1.0 - decay)
        for average, source in self._copied:
            average.copy_(source)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [t.detach() for t in (*model.parameters(), *model.buffers())]
