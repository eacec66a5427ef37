"""What a contestant of `frozen.py` and `full.py` is given: data, batch size, epochs, and which parameters train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LR = 1e-3
DECAY = 0.05


@dataclass(frozen=True)
class Task:
    """What every contestant is given; `step_done` is for those whose optimizer is not torch's."""

    data: TensorDataset
    batch: int
    epochs: int
    paths: tuple[str, ...]
    trained: frozenset[str]
    step_done: Callable[[], None]
    told: list[Any] = field(default_factory=list)

    @property
    def everything(self) -> bool:
        """Whether nothing is frozen."""
        return self.paths == ("all",)

    def loader(self) -> DataLoader[Any]:
        """What a person would write; no workers."""
        return DataLoader(self.data, batch_size=self.batch, shuffle=True)

    def freeze(self, model: nn.Module) -> list[nn.Parameter]:
        """Gradients for the trained parameters alone; those are returned."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        return [p for p in model.parameters() if p.requires_grad]

    def frozen_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that hold parameters of their own, all of them frozen."""
        found = []
        for path, module in model.named_modules():
            own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
            if own and not self.trained & set(own):
                found.append(module)
        return found
