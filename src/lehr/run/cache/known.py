"""A weight or buffer as it was when features were computed with it. It must not know what they are for."""

from __future__ import annotations

import torch
from torch import nn

from lehr.run.untouched import same_bits


class Known:
    """A tensor, and whether it is still what it was.

    A weight is known by its version. A buffer is known by its values, since batch-norm moves its statistics without a trace
    in their version; so is all of an average (`by_values`), which is written at every step, also where it stays the same.
    """

    def __init__(self, tensor: torch.Tensor, *, by_values: bool) -> None:
        self._tensor, self._version = tensor, tensor._version
        is_known_by_version = isinstance(tensor, nn.Parameter) and not by_values
        self._copy = None if is_known_by_version else tensor.detach().clone()

    def is_as_it_was(self) -> bool:
        """Whether nothing was written to it since, or nothing else than what was there."""
        if self._copy is None:
            return self._tensor._version == self._version
        return same_bits(self._tensor, self._copy)
