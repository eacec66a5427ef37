"""`torch.compile` for a run in stages: compiled in place, once a stage, for batches of any size. It must not know the loop.

A thaw changes which parameters want gradients, and a compiled graph holds for one such set: each stage compiles once.
Validation would compile once for each set as well; there nothing wants gradients (`without_gradients`), so once is enough
for the whole run. The first batch says that batches have any size, so a short last one compiles nothing.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lehr.errors import RequestError
from lehr.run.batches import leaves
from lehr.run.precision import Arithmetic

_INDUCTOR = "inductor"
_GRAPHS_A_STAGE = 2  # one to train; and one for a batch of a single sample, which torch compiles on its own


def compile_in_place(
    model: nn.Module, on: Arithmetic, *, stages: int = 1, backend: str | Callable[..., Any] = _INDUCTOR
) -> str:
    """Have `model` compiled when it is called next, and anew where a stage trains another part; a sentence that says so.

    The model stays the one that it is: class, parameters and `state_dict` keys; copies of it are not compiled. Results are
    rounded in another order than without.

    Args:
        model: the model, not one that is compiled already.
        on: device and arithmetic.
        stages: how many sets of parameters will train; torch gives up, in silence, after a fixed number of graphs.
        backend: one of torch's backends, by its name, or a function.

    Raises:
        RequestError: where it cannot be done here: the model is compiled already, or what the backend needs is missing.

    Example:
        >>> from lehr.run.precision import arithmetic
        >>> net = nn.Linear(4, 2)
        >>> compile_in_place(net, arithmetic("cpu"), backend="eager")
        'compiled by eager: each stage compiles once, at its first step; compile=False turns that off'
        >>> net(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise RequestError(
            "compile: this model is compiled already; leave compile out, or pass the model itself"
        )
    if why := cannot_compile(on, backend):
        raise RequestError(f"compile: {why}")
    _allow(8 + _GRAPHS_A_STAGE * stages)
    model.compile(backend=backend)
    name = backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
    return f"compiled by {name}: each stage compiles once, at its first step; compile=False turns that off"


def cannot_compile(on: Arithmetic, backend: str | Callable[..., Any] = _INDUCTOR) -> str:
    """Why nothing can be compiled here, and what would help; empty where it can."""
    from torch._dynamo.eval_frame import check_if_dynamo_supported

    try:
        check_if_dynamo_supported()
    except RuntimeError as error:
        return f"this Python cannot be compiled for ({error}); leave compile out"
    if backend != _INDUCTOR:
        return ""
    if on.device.type == "cuda":
        return _no_triton()
    return _no_cpp_compiler()


def any_size(batch: Any) -> Any:
    """The batch, its tensors marked: their first dimension, the samples, may have another size the next time."""
    for tensor in leaves(batch):
        if tensor.ndim and len(tensor) > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return batch


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter wants gradients for the time being, whatever trains: a graph made here holds in every stage."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _allow(graphs: int) -> None:
    """torch stops compiling a function that has had this many graphs, and runs it as it is written from then on."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    setattr(config, name, max(getattr(config, name), graphs))


def _no_triton() -> str:
    from torch.utils._triton import has_triton

    return (
        ""
        if has_triton()
        else "on CUDA it needs Triton (pip install triton); install it, or leave compile out"
    )


def _no_cpp_compiler() -> str:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, exc.CppCompileError, RuntimeError, OSError):
        asked = f" (CXX={os.environ['CXX']})" if "CXX" in os.environ else ""
        return (
            f"on a CPU it needs a C++ compiler, and there is none{asked}; install one (g++, clang, or Visual C++ on "
            "Windows), or leave compile out"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"on a CPU it needs Python's header files, and {header} is not there; install python3-dev, or leave compile out"
    return ""
