"""Reads a torch model into plain values: names, shapes, norms, ties, head, blocks, order.

Only reading happens here; nothing is changed. It must not know what a stage, a rate or an optimizer is. Where
the head and the blocks are is found in `anatomy`; what is found is kept as `lehr.selection.ModelFacts`, which
needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from lehr.errors import ModelError, SelectionError, nearest
from lehr.run import anatomy, structure
from lehr.selection import ModelFacts, ParameterFacts

BY_HAND = "_lehr_by_hand"
"""Under this a module remembers of its own parameters, by local name, whether a person has them frozen, where
a plan has set `requires_grad` otherwise. `freezing` writes it.
"""

_COMPILED = "_orig_mod"
_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def inspect(model: nn.Module, *, head: str | Sequence[str] | None = None) -> ModelFacts:
    """What lehr understands of a model, as plain values; the model is not changed.

    Args:
        model: any module; the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel` are
            looked through.
        head: the module path (or paths, or parameter names) of the classifier, where lehr should not look for
            it itself.

    Returns:
        The facts. Parameters stand in the model's own order under their first name, other names of a tied
        weight are its `aliases`. `norm` is True for what a normalisation layer owns; `bias` for every other
        parameter called bias (`bias`, `in_proj_bias`, `bias_ih_l0`). `frozen_by_hand` is about the person:
        what `lehr.apply` or `lehr.fit` froze or thawed does not change it. `understood` says in sentences how
        head and blocks were found.

    Raises:
        ModelError: for something that is no module, a model without parameters, lazy parameters, or
            parameters of whole numbers.
        SelectionError: when `head` names nothing in the model.

    Example:
        >>> facts = inspect(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> facts.head, facts.blocks, facts.count()
        (('2',), (('0',),), 58)
    """
    own = unwrap(model)
    names = _names(own)
    _refuse_unusable(own, names)
    first = tuple(aliases[0] for aliases in names.values())
    of_norms, frozen = _norm_parameters(own), by_hand(own)
    norms = frozenset(aliases[0] for parameter, aliases in names.items() if id(parameter) in of_norms)
    found = anatomy.read(own, first, norms=norms, head=None if head is None else _given(head, names, own))
    parameters = tuple(
        ParameterFacts(
            name=aliases[0],
            shape=tuple(parameter.shape),
            norm=aliases[0] in norms,
            bias=aliases[0] not in norms and _is_bias(aliases[0]),
            layer=found.layer[aliases[0]],
            frozen_by_hand=aliases[0] in frozen,
            aliases=aliases[1:],
        )
        for parameter, aliases in names.items()
    )
    return ModelFacts(
        name=type(own).__name__,
        parameters=parameters,
        head=found.head,
        blocks=found.blocks,
        layers=found.layers,
        buffers=sum(1 for _ in own.buffers()),
        understood=(*found.understood, *_remarks(parameters)),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The person's own module, without the wrappers of `torch.compile` and data parallelism.

    Raises:
        ModelError: when `model` is not a module.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrap(net) is net
        True
    """
    while isinstance(model, nn.Module):
        inner = model._modules.get(_COMPILED)
        if inner is None and isinstance(model, (DistributedDataParallel, DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner
    raise ModelError(f"expected a torch.nn.Module, found {type(model).__name__}; hand over the model itself")


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of a model once, in order, by the name that `inspect` gives it.

    Example:
        >>> list(named(nn.Linear(2, 2)))
        ['weight', 'bias']
    """
    return {structure.clean(name): parameter for name, parameter in unwrap(model).named_parameters()}


def by_hand(model: nn.Module) -> frozenset[str]:
    """The parameters that a person has frozen, whatever a plan made of them since, by the names of `named`.

    What no plan has set differently is as `requires_grad` says. What a plan froze already counts as frozen by
    hand only after `lehr.freeze`, and what it thawed as thawed by hand only after `lehr.thaw`: a
    `requires_grad_` that changes nothing cannot be seen.

    Example:
        >>> by_hand(nn.Linear(2, 2).requires_grad_(False)) == {"weight", "bias"}
        True
    """
    frozen: dict[int, bool] = {}
    for module in unwrap(model).modules():
        told = dict(module.__dict__.get(BY_HAND, ()))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                frozen.setdefault(id(parameter), told.get(name, not parameter.requires_grad))
    return frozenset(
        name
        for name, parameter in named(model).items()
        if frozen.get(id(parameter), not parameter.requires_grad)
    )


def _names(model: nn.Module) -> dict[nn.Parameter, tuple[str, ...]]:
    """All names of each parameter, the first one first."""
    names: dict[nn.Parameter, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter] = (*names.get(parameter, ()), structure.clean(name))
    return names


def _refuse_unusable(model: nn.Module, names: dict[nn.Parameter, tuple[str, ...]]) -> None:
    what = type(model).__name__
    if not names:
        raise ModelError(
            f"{what} has no parameters, so there is nothing to train; make its layers attributes of "
            "the module (a plain Python list hides them: use nn.ModuleList)"
        )
    for parameter, (name, *_) in names.items():
        if is_lazy(parameter):
            raise ModelError(
                f"{what}: {name!r} is a lazy parameter that has no shape yet; run one batch through the "
                "model first, for example `model(inputs)` under torch.no_grad()"
            )
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ModelError(
                f"{what}: {name!r} is of type {parameter.dtype}, which cannot be trained; expected floating "
                "point. Load the model without quantisation, or keep whole numbers in a buffer"
            )
    for name, buffer in model.named_buffers():
        if is_lazy(buffer):
            raise ModelError(f"{what}: {name!r} is a lazy buffer; run one batch through the model first")


def _given(
    head: str | Sequence[str], names: dict[nn.Parameter, tuple[str, ...]], model: nn.Module
) -> tuple[str, ...]:
    """The head as the person named it, checked."""
    listed = (head,) if isinstance(head, str) else tuple(head)
    known = [name for aliases in names.values() for name in aliases]
    paths = dict.fromkeys(path for name in known for path in (*structure.above(name), name))
    for path in listed:
        if path not in paths:
            hint = nearest(str(path), paths)
            tops = ", ".join(dict.fromkeys(name.split(".")[0] for name in known))
            raise SelectionError(
                f"head: {path!r} is no module with parameters and no parameter of "
                f"{type(model).__name__}{hint or '.'} Its top-level parts are: {tops}"
            )
    if not listed:
        raise SelectionError("head: an empty list names nothing; leave `head` out to let lehr look for it")
    return listed


def _norm_parameters(model: nn.Module) -> frozenset[int]:
    """The identities of the parameters that normalisation layers own."""
    return frozenset(
        id(parameter)
        for module in model.modules()
        if _is_norm(module)
        for parameter in module.parameters(recurse=False)
    )


def _is_norm(module: nn.Module) -> bool:
    """By type where possible; else by "Norm" in the class name and nothing but vectors of its own."""
    if isinstance(module, _NORMS):
        return True
    own = list(module.parameters(recurse=False))
    return bool(own) and "Norm" in type(module).__name__ and all(_is_vector(p) for p in own)


def _is_vector(parameter: torch.Tensor) -> bool:
    return sum(size != 1 for size in parameter.shape) <= 1


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.endswith("bias") or last.startswith("bias_")


def _remarks(parameters: tuple[ParameterFacts, ...]) -> tuple[str, ...]:
    """What else a reader of the plan should know: ties, and what was frozen by hand."""
    remarks = [
        f"tied: {p.name} is also {', '.join(p.aliases)}: one parameter" for p in parameters if p.aliases
    ]
    frozen = [p.name for p in parameters if p.frozen_by_hand]
    if frozen:
        shown = ", ".join(frozen[:3]) + (f" and {len(frozen) - 3} more" if len(frozen) > 3 else "")
        count = "1 parameter was" if len(frozen) == 1 else f"{len(frozen)} parameters were"
        stay = (
            "it stays so unless a stage names it"
            if len(frozen) == 1
            else "they stay so unless a stage names them"
        )
        remarks.append(f"{count} frozen by hand: {shown}; {stay}")
    return tuple(remarks)
