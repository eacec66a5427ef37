"""What frozen means: weights and buffers stay the same to the bit, however the model is called.

A frozen parameter has `requires_grad` False and no gradient, so no optimizer touches it. A module all of
whose parameters are frozen runs in eval mode, so its batch statistics stay and its dropout is off; a module
without parameters follows its nearest ancestor that has some. What is frozen is a function of the parameters'
names alone: there is no history. What is remembered is only which of it a person wanted so (`freeze`, `thaw`,
`requires_grad_`), that the next plan may respect it. This file must not know of steps, stages or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from operator import attrgetter, is_, is_not
from types import MappingProxyType

from torch import nn

from lehr.errors import SelectionError, nearest
from lehr.run.facts import BY_HAND, by_hand, inspect, named, unwrap
from lehr.run.pinning import TRAIN, Pin, is_plain, pin_of
from lehr.selection import select

_RECORD = "_lehr_frozen"
_END = (object(),)
_NONE_KNOWN: Mapping[frozenset[str], _Record] = MappingProxyType({})
_NONES = repeat(None)  # endless, so it can be shared

_requires_grad = attrgetter("requires_grad")
_grad = attrgetter("grad")
_training = attrgetter("training")


def freeze(
    model: nn.Module, what: str | Sequence[str] = "all", *, head: str | Sequence[str] | None = None
) -> tuple[str, ...]:
    """Freezes what the patterns name; the other parameters stay as they are.

    Frozen weights and buffers do not change: `requires_grad` is False, gradients are None, and every module
    that is left without a trained parameter (whoever froze it) runs in eval mode however often
    `model.train()` is called.

    Args:
        model: the model; also inside `torch.compile` or `DistributedDataParallel`.
        what: patterns as in a recipe: `"backbone"`, `"layer1"`, `"last 2 blocks"`, `["norm", "blocks.1?"]`.
            `"all"` is all of it.
        head: the module path of the head, where it is not recognised.

    Returns:
        The names of the parameters that the patterns mean, in the model's order.

    Raises:
        SelectionError: for a pattern that matches nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
        >>> freeze(net, "backbone")
        ('0.weight', '0.bias')
        >>> net.train()[0].training
        False
    """
    chosen = _chosen(model, what, head)
    set_trainable(model, _trained_now(model) - frozenset(chosen))
    unwrap(model).__dict__.pop(_RECORD, None)  # the notes of other turns are of another time
    _remember(unwrap(model), by_hand(model) | frozenset(chosen))
    return chosen


def thaw(
    model: nn.Module, what: str | Sequence[str] = "all", *, head: str | Sequence[str] | None = None
) -> tuple[str, ...]:
    """Thaws what the patterns name; the other parameters stay as they are.

    Here `"all"` is everything, whoever froze it: the person asks for it by hand. A module that is thawed
    takes the mode that was last asked for with `model.train()` or `model.eval()`.

    Args:
        model: the model; also inside `torch.compile` or `DistributedDataParallel`.
        what: patterns as in a recipe.
        head: the module path of the head, where it is not recognised.

    Returns:
        The names of the parameters that the patterns mean, in the model's order.

    Raises:
        SelectionError: for a pattern that matches nothing.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> freeze(net) == thaw(net)
        True
        >>> net.weight.requires_grad, net.training
        (True, True)
    """
    chosen = _chosen(model, what, head)
    set_trainable(model, _trained_now(model) | frozenset(chosen))
    unwrap(model).__dict__.pop(_RECORD, None)
    _remember(unwrap(model), by_hand(model) - frozenset(chosen))
    return chosen


def set_trainable(model: nn.Module, names: frozenset[str]) -> None:
    """Lets exactly the parameters `names` train and freezes everything else, whatever the state before.

    Idempotent and without history; meant to be called at every step, so a model that is already as wanted is
    only looked over. Modules that were frozen and now train take the mode that was last asked for with
    `model.train()`; the mode of modules that trained before is the caller's and stays. What a person froze
    stays known: `lehr.inspect` says the same before and after.

    Args:
        model: the model; also inside `torch.compile` or `DistributedDataParallel`.
        names: names as `lehr.inspect` gives them; of a tied weight the first.

    Raises:
        SelectionError: for a name that is no parameter of the model; nothing has changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> set_trainable(net, frozenset({"1.weight"}))
        >>> [p.requires_grad for p in net.parameters()]
        [False, False, True, False]
    """
    settled = model.__dict__.get(_RECORD)
    if settled is None or settled.owner != id(model):  # never seen, wrapped, or a shallow copy
        model = unwrap(model)
        settled = model.__dict__.get(_RECORD)
    if settled is None or settled.owner != id(model) or not settled.now.holds(model):
        _settle(model, frozenset(names))
    elif settled.now.names is not names and settled.now.names != names:  # as it was left, and another's turn
        known = settled.known.get(names)
        if known and known.plain and settled.now.plain:
            _turn(model, settled.now, known)
            settled.now = known
        else:
            _settle(model, frozenset(names), settled.known)


def is_frozen(module: nn.Module) -> bool:
    """Whether the module itself is frozen as a whole: held in eval mode, its buffers unchanged."""
    return pin_of(module) is not None


class _Record:
    """What a settled model looks like, so that the next call sees at a glance whether it still does.

    `plain` says that no module has a say in its own mode.

    """

    def __init__(self, own: nn.Module, names: frozenset[str], pinned: list[nn.Module]) -> None:
        parameters = named(own)
        self.names = names
        self.parameters = list(parameters.values())
        self.wanted = [name in names for name in parameters]
        self.frozen = [parameter for name, parameter in parameters.items() if name not in names]
        # Without the model itself, which holds this record: a cycle would keep it alive after its last use.
        self.pinned = [module for module in pinned if module is not own]
        self.whole = len(self.pinned) < len(pinned)
        self.plain = not self.whole and all(map(is_plain, own.modules()))
        self.notes = [(None if m is own else m, m.__dict__.get(BY_HAND)) for m in own.modules()]
        # Live views of the dictionaries that hold parameters and submodules, and what they held: a part that
        # was replaced or added is seen by its identity; the end marker sees what is added to the last one.
        tables = [table for m in own.modules() for table in (m._parameters, m._modules)]
        self.views: list[Iterable[object]] = [*(table.values() for table in tables if table), _END]
        self.empty = [table for table in tables if not table]
        self.entries = list(chain.from_iterable(self.views))

    def holds(self, own: nn.Module) -> bool:
        """Whether the model still is as it was settled."""
        return (
            all(map(is_, chain.from_iterable(self.views), self.entries))
            and not any(self.empty)
            and list(map(_requires_grad, self.parameters)) == self.wanted
            and not any(map(is_not, map(_grad, self.frozen), _NONES))
            and not any(map(_training, self.pinned))
            and not (self.whole and own.training)
        )


class _Settled:
    """How the model was left, and the records of other names for which it was settled since with nothing else between:
    from the one to the other only a few attributes change.

    It lies in the model's instance dictionary (not in a global table, which would keep alive a model whose
    parts refer back to it) and turns into None in copies and pickles.
    """

    def __init__(self, own: nn.Module, now: _Record, known: Mapping[frozenset[str], _Record]) -> None:
        self.owner, self.now, self.known = id(own), now, {**known, now.names: now}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def _turn(own: nn.Module, now: _Record, then: _Record) -> None:
    """Brings the model from one settled state into another, which leaves what `_settle` leaves, only faster."""
    for parameter, was, wanted in zip(now.parameters, now.wanted, then.wanted, strict=True):
        if was != wanted:
            parameter.requires_grad_(wanted)
            parameter.grad = None
    for (module, note), (_, before) in zip(then.notes, now.notes, strict=True):
        if note != before:
            table = (own if module is None else module).__dict__
            table.pop(BY_HAND, None) if note is None else table.update({BY_HAND: note})
    before, after = set(now.pinned), set(then.pinned)
    for module in now.pinned:
        if module not in after:
            module.__dict__[TRAIN].release(module)
            module.training = own.training
    for module in then.pinned:
        if module not in before:
            module.__dict__[TRAIN] = Pin(module)
            module.training = False


def _settle(
    own: nn.Module, names: frozenset[str], known: Mapping[frozenset[str], _Record] = _NONE_KNOWN
) -> None:
    """Brings the model into the wanted state, whatever it was in, and records it, beside those `known` that hold."""
    parameters = named(own)
    _refuse_unknown(names, parameters, own)
    hand = by_hand(own)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None
    _remember(own, hand)
    trained = {id(parameter) for name, parameter in parameters.items() if name in names}
    training = set(_trained_modules(own, trained, within=True))
    frozen = [module for module in own.modules() if module not in training]
    _thaw_modules(own, {module for module in training if pin_of(module)})
    for module in frozen:
        if pin_of(module) is None:
            module.__dict__[TRAIN] = Pin(module)
    for module in frozen:  # outermost first, so most are in eval mode by the time they are met
        if module.training:
            pin = module.__dict__[TRAIN]
            pin(pin.asked)
    own.__dict__[_RECORD] = _Settled(own, _Record(own, names, frozen), known)


def _remember(own: nn.Module, hand: frozenset[str]) -> None:
    """Leaves a note in each module whose own parameters a plan has set otherwise than the person, who has
    `hand` frozen.

    In the module that holds the parameter, not in a table by names: so the note is there, too, when a part is
    used in another model, goes with copies and pickles, and is gone with a part that is replaced.
    """
    frozen = {id(parameter) for name, parameter in named(own).items() if name in hand}
    for module in own.modules():
        told = frozenset(  # no dict: TorchScript would take that over into its modules
            (name, id(parameter) in frozen)
            for name, parameter in module._parameters.items()
            if parameter is not None and (id(parameter) in frozen) == parameter.requires_grad
        )
        if told:
            module.__dict__[BY_HAND] = told
        else:
            module.__dict__.pop(BY_HAND, None)


def _thaw_modules(own: nn.Module, thawed: set[nn.Module]) -> None:
    """Unpins modules and gives them the mode last asked of the model, as its own `train` hands it down."""
    if not thawed:
        return
    pin = pin_of(own)
    asked = own.training if pin is None else pin.asked
    for module in thawed:
        module.__dict__[TRAIN].release(module)
    # Asking the whole model lets a class that overrides train() (to keep its norms in eval mode, say) have
    # its say; the modules that were not frozen get back the mode they had.
    before = [(module, module.training) for module in own.modules() if module not in thawed]
    own.train(asked)
    for module, mode in before:
        module.training = mode


def _trained_modules(module: nn.Module, trained: set[int], *, within: bool) -> Iterator[nn.Module]:
    """The modules that hold a trained parameter, and the parameterless ones that follow them.

    `within` says whether the nearest ancestor with parameters holds a trained one. A parameterless module in
    several places follows the trained one.
    """
    parameters = [id(parameter) for parameter in module.parameters()]
    if parameters:
        within = not trained.isdisjoint(parameters)
    if within:
        yield module
        for child in module.children():
            yield from _trained_modules(child, trained, within=within)


def _trained_now(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in named(model).items() if parameter.requires_grad)


def _chosen(model: nn.Module, what: str | Sequence[str], head: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names that the patterns mean when nothing counts as frozen by hand."""
    facts = inspect(model, head=head)
    free = tuple(replace(parameter, frozen_by_hand=False) for parameter in facts.parameters)
    selection = select(what, replace(facts, parameters=free))
    return selection.names


def _refuse_unknown(names: frozenset[str], parameters: dict[str, nn.Parameter], own: nn.Module) -> None:
    unknown = sorted(names - parameters.keys())
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise SelectionError(
            f"{unknown[0]!r}{more} is no parameter of {type(own).__name__}"
            f"{nearest(unknown[0], parameters) or '.'} Names are those of lehr.inspect(model), where a tied "
            "weight has its first name only; a plan belongs to the model it was made from"
        )
