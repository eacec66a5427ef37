"""Out of memory: which batch would have fitted, found by trying. It must not know steps or stages."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out: on a device, or in the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def fitting(attempt: Callable[[Any], object], batch: Any, size: int) -> int | None:
    """The largest of size/2, size/4, ... samples of `batch` that `attempt` gets through with; 0 where none does,
    None where it fails for another reason, so that nothing can be said.
    """
    while size > 1:
        size //= 2
        _release()
        try:
            attempt(part(batch, size))
        except Exception as error:  # a batch-norm refuses a lone sample, a loss may count on a size
            if not is_out_of_memory(error):
                return None
        else:
            return size
    return 0


def part(batch: Any, size: int) -> Any:
    """The first `size` samples of a batch: of each tensor that is in it.

    >>> part([torch.arange(4), {"x": torch.ones(4, 2)}], 2)
    [tensor([0, 1]), {'x': tensor([[1., 1.],
            [1., 1.]])}]
    """
    if isinstance(batch, torch.Tensor):
        return batch[:size] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: part(value, size) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [part(item, size) for item in batch]
        return type(batch)(parts) if type(batch) in (list, tuple) else type(batch)(*parts)  # a named tuple
    return batch


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
