"""`torch.compile` for a run in stages: compiled in place, once a stage, for batches of any size. It must not know the loop.

A thaw changes which parameters want gradients, and a compiled graph holds for one such set: each stage compiles once.
Validation would compile once for each set as well; there nothing wants gradients, so once is enough for the whole run.
The first batch says that batches have any size, so a short last one compiles nothing.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lehr.errors import RequestError, RunError, nearest
from lehr.run.batches import leaves
from lehr.run.precision import Arithmetic
from lehr.run.untouched import state_kept, without_compiling

Backend: TypeAlias = "str | Callable[..., Any]"
Compile: TypeAlias = "bool | Backend"
"""What a person says: whether to compile, and by which of torch's backends; True is inductor."""
_INDUCTOR = "inductor"
_CALL = "_compiled_call_impl"  # where `nn.Module.compile` puts what is called instead
_WITHOUT = "go without (compile=False, --no-compile)"
_GRAPHS_A_STAGE = 2  # one to train; and one for a batch of a single sample, which torch compiles on its own


def check_compile(said: Compile, model: nn.Module, on: Arithmetic, *, takes_turns: bool = False) -> None:
    """Refuse to compile where it cannot be done; nothing is changed.

    Args:
        said: whether, and by which backend.
        model: the model, not one that is compiled already.
        on: device and arithmetic.
        takes_turns: whether objectives take turns.

    Raises:
        RequestError: naming what is in the way: an unknown backend, a model that is compiled already, objectives, or
            what the backend needs and is missing.
    """
    backend = _backend(said)
    if backend is None:
        return
    if _is_compiled(model):
        raise RequestError(
            "compile: this model is compiled already; leave compile out, or pass the model itself"
        )
    if takes_turns:
        raise RequestError(
            "compile: objectives take turns, and their loss functions call parts of the model, of which none is compiled when "
            "the model is; call compile() of these parts yourself (model.generator.compile()), and leave compile out"
        )
    if why := cannot_compile(on, backend):
        raise RequestError(f"compile: {why}")


def name_of(said: Compile) -> str:
    """The backend in a word; empty where nothing is compiled.

    >>> name_of(True), name_of("eager"), name_of(False)
    ('inductor', 'eager', '')
    """
    backend = _backend(said)
    if backend is None or isinstance(backend, str):
        return backend or ""
    return str(getattr(backend, "__name__", type(backend).__name__))


@contextmanager
def compiled(said: Compile, models: Sequence[nn.Module], on: Arithmetic, *, stages: int = 1) -> Iterator[str]:
    """Within this context `models` are compiled in place, where that was said; it gives a sentence that says so, or "".

    Afterwards they are run as they are written again.
    """
    backend = _backend(said)
    if backend is None:
        yield ""
        return
    with ExitStack() as stack:
        stack.enter_context(_backward_at_once())
        for model in models:
            sentence = compile_in_place(model, on, stages=stages, backend=backend)
            stack.callback(model.__dict__.pop, _CALL, None)
        yield sentence


def compile_in_place(
    model: nn.Module, on: Arithmetic, *, stages: int = 1, backend: Backend = _INDUCTOR
) -> str:
    """Have `model` compiled when it is called next, and anew where a stage trains another part; a sentence that says so.

    The model stays the one that it is: class, parameters and `state_dict` keys; copies of it are not compiled. Results are
    rounded in another order than without. Only calls of the model itself are compiled, not those of its parts alone.

    Args:
        model: the model, not one that is compiled already.
        on: device and arithmetic.
        stages: how many sets of parameters will train. torch gives up, in silence, after a fixed number of graphs of one
            class; this number is raised by what these need, for the rest of the process.
        backend: one of torch's backends, by its name, or a function.

    Raises:
        RequestError: where it cannot be done here: the model is compiled already, or what the backend needs is missing.

    Example:
        >>> from lehr.run.precision import arithmetic
        >>> net = nn.Linear(4, 2)
        >>> compile_in_place(net, arithmetic("cpu"), backend="eager")
        'compiled by eager: each stage at its first step, and validation once; what goes by a cache is not compiled'
        >>> net(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    check_compile(backend, model, on)
    _allow(1 + _GRAPHS_A_STAGE * stages)
    nn.Module.compile(model, backend=backend)  # a model may have a method of that name for something else
    name = name_of(backend)
    model.__dict__[_CALL] = _prepared(model, model.__dict__[_CALL], name)
    return f"compiled by {name}: each stage at its first step, and validation once; what goes by a cache is not compiled"


def _prepared(model: nn.Module, call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The compiled call of `model`, that is given batches of any size, and parameters that want gradients only where some
    are computed.
    """
    from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError

    def prepared(*args: Any, **kwargs: Any) -> Any:
        any_size((args, kwargs))
        try:
            with nullcontext() if torch.is_grad_enabled() else without_gradients(model):
                return call(*args, **kwargs)
        except TorchDynamoException as error:
            if isinstance(error, TorchRuntimeError):  # raised while tracing, perhaps by the model's own code
                _as_written(model, args, kwargs)
            said = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise RunError(f"the model could not be compiled by {name} ({said}); {_WITHOUT}") from error

    return prepared


def _is_compiled(model: nn.Module) -> bool:
    """Whether a model is compiled, or one that is wrapped to run on several devices, or its wrapper."""
    wrapped = [model.module] if isinstance(model, (DataParallel, DistributedDataParallel)) else []
    return any("_orig_mod" in m._modules or m.__dict__.get(_CALL) is not None for m in (model, *wrapped))


def _as_written(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Run the model as it is written: an error of its own is raised in its own words, not as one of compiling."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with state_kept(model, device), without_compiling(model):
        model(*args, **kwargs)


def _backend(said: Compile) -> Backend | None:
    """The backend that is meant; None where nothing is to be compiled."""
    if said is False:
        return None
    if said is True:
        return _INDUCTOR
    if callable(said):
        return said
    near = "."
    if isinstance(said, str):
        from torch._dynamo import list_backends

        known = list_backends(exclude_tags=())
        if said in known:
            return said
        near = nearest(said, known)
    raise RequestError(
        f"compile={said!r}{near} Expected True, False, or one of torch's backends, such as {_INDUCTOR!r}"
    )


def cannot_compile(on: Arithmetic, backend: Backend = _INDUCTOR) -> str:
    """Why nothing can be compiled here, and what would help; empty where it can."""
    from torch._dynamo.eval_frame import check_if_dynamo_supported

    try:
        check_if_dynamo_supported()
    except RuntimeError as error:
        return f"this Python cannot be compiled for ({error}); {_WITHOUT}"
    if backend != _INDUCTOR:
        return ""
    if on.device.type == "cuda":
        return _no_triton()
    return _no_cpp_compiler()


def any_size(batch: Any) -> Any:
    """The batch, its tensors marked: their first dimension, the samples, may have another size the next time."""
    for tensor in leaves(batch):
        if isinstance(tensor, torch.Tensor) and tensor.ndim and len(tensor) > 1:
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


def _backward_at_once() -> AbstractContextManager[Any]:
    """The backward pass is compiled with the forward pass: by itself torch may do that in the midst of it, where what the
    backend cannot do comes as any error at all.
    """
    from torch._functorch import config

    name = "force_non_lazy_backward_lowering"  # not in the first torch that is allowed
    return config.patch({name: True}) if hasattr(config, name) else nullcontext()


def limits() -> dict[str, int]:
    """How many graphs of a function torch makes before it runs that as it is written from then on, in silence; by the
    names of its settings.
    """
    from torch._dynamo import config

    new = ("recompile_limit", "accumulated_recompile_limit")
    old = ("cache_size_limit", "accumulated_cache_size_limit")  # before torch 2.7
    return {name: getattr(config, name) for name in (new if hasattr(config, new[0]) else old)}


def _allow(graphs: int) -> None:
    """So many more: those of runs that have ended count as well, where they were of the same class."""
    from torch._dynamo import config

    for name, limit in limits().items():
        setattr(config, name, limit + graphs)


def _no_triton() -> str:
    from torch.utils._triton import has_triton

    return "" if has_triton() else f"on CUDA it needs Triton (pip install triton); install it, or {_WITHOUT}"


def _no_cpp_compiler() -> str:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, exc.CppCompileError, RuntimeError, OSError):
        asked = f" (CXX={os.environ['CXX']})" if "CXX" in os.environ else ""
        return (
            f"on a CPU it needs a C++ compiler, and there is none{asked}; install one (g++, clang, or Visual C++ on "
            f"Windows), or {_WITHOUT}"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"on a CPU it needs Python's header files, and {header} is not there; install python3-dev, or {_WITHOUT}"
    return ""
