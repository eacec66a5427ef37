"""How a model is called, apart from the tensors it is called with. It must not know models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lehr.run.prefix.cuts import Call, CannotSplit

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)


@dataclass(frozen=True)
class Form:
    """How a model is called: the tree of its arguments, and the leaves that are no tensors (a tensor's place holds None)."""

    spec: pytree.TreeSpec
    is_tensor: tuple[bool, ...]
    plain: tuple[Any, ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Any) -> tuple[Form, list[torch.Tensor]]:
        """The form of a call, and its tensors."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        is_tensor = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
        plain = tuple(None if t else leaf for leaf, t in zip(leaves, is_tensor, strict=True))
        return cls(spec, is_tensor, plain), [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if t else leaf for leaf, t in zip(self.plain, self.is_tensor, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


def checked_form(call: Call) -> tuple[Form, list[torch.Tensor]]:
    """The form of a call and its tensors, which all have the same number of samples.

    Raises:
        CannotSplit: for anything else.
    """
    form, tensors = Form.of(call.args, call.kwargs)
    for leaf, is_tensor in zip(form.plain, form.is_tensor, strict=True):
        if not is_tensor and not isinstance(leaf, PLAIN):
            raise CannotSplit(
                f"the model is called with a {type(leaf).__name__}; only tensors, and lists, tuples and dicts of them, "
                "can be followed through it"
            )
    if not tensors or any(not t.ndim or not len(t) for t in tensors):
        raise CannotSplit("the model is called without a tensor that has a row for each sample")
    if len({len(t) for t in tensors}) > 1 or _is_listed(call):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:4])
        raise CannotSplit(
            f"the model's inputs do not have a row for each sample (their shapes are {shapes}); a list of pictures cannot "
            "be cut into samples, one tensor [batch, ...] can"
        )
    return form, tensors


def at_least(tensors: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """The tensors with so many different samples: where there are fewer, their values are turned round within a sample.

    >>> at_least([torch.tensor([[1, 2, 3]]), torch.tensor([7])], 2)
    [tensor([[1, 2, 3],
            [3, 1, 2]]), tensor([7, 7])]
    """
    have = len(tensors[0])
    turns = range(-(-max(count - have, 0) // have))
    more = [[t.roll(turn + 1, -1) if t.ndim > 1 else t for turn in turns] for t in tensors]
    return [torch.cat([t, *rest])[: max(count, have)] for t, rest in zip(tensors, more, strict=True)]


def _is_listed(call: Call) -> bool:
    """Whether an argument is a list of tensors: there a sample is an element and not a row."""
    given = (*call.args, *call.kwargs.values())
    return any(isinstance(a, (list, tuple)) and any(isinstance(t, torch.Tensor) for t in a) for a in given)
