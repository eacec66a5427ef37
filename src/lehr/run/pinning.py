"""How a frozen module is held in eval mode: a pin stands in for its `train`. It must not know which modules are frozen."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from lehr.errors import RunError

TRAIN = "train"
"""Under this name a pin lies in a module's instance dictionary."""


class Pin:
    """Stands in for `module.train` while `module` is frozen: whatever mode is asked for, it stays in eval.

    It lies in the module's instance dictionary, so class, `state_dict` and hooks stay as they are, and
    `deepcopy` and pickle carry it over to the copy, whose own it becomes. The module is held weakly so that a
    frozen model is freed as soon as it is dropped.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.asked = module.training
        self.displaced = module.__dict__.get(TRAIN)  # a `train` that the person had put there

    def __call__(self, mode: bool = True) -> nn.Module:
        """Stay in eval mode, and remember what was asked for."""
        module = self._module()
        if module is None:
            raise RunError(
                "train() was called on a shallow copy of a frozen module whose original is gone; "
                "use copy.deepcopy, or lehr.thaw before copying"
            )
        self.asked = mode
        type(module).train(module, False)
        module.training = False  # also where the class's own train() ignores the mode
        return module

    def holds(self, module: nn.Module) -> bool:
        """Whether this is the module's own pin; a shallow copy carries that of its original."""
        return self._module() is module

    def release(self, module: nn.Module) -> None:
        """Gives the module its own `train` back."""
        if self.displaced is None:
            del module.__dict__[TRAIN]
        else:
            module.__dict__[TRAIN] = self.displaced

    def __getstate__(self) -> tuple[nn.Module | None, bool, Any]:
        return self._module(), self.asked, self.displaced

    def __setstate__(self, state: tuple[nn.Module, bool, Any]) -> None:
        module, self.asked, self.displaced = state
        self._module = weakref.ref(module)


def pin_of(module: nn.Module) -> Pin | None:
    """The module's own pin. What a shallow copy took over from its original is none, and is dropped."""
    pin = module.__dict__.get(TRAIN)
    if not isinstance(pin, Pin):
        return None
    if pin.holds(module):
        return pin
    pin.release(module)
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether its mode is its own affair: neither the class nor a person has put another `train` in place."""
    own = module.__dict__.get(TRAIN)
    displaced = own.displaced if isinstance(own, Pin) else own
    return type(module).train is nn.Module.train and displaced is None
