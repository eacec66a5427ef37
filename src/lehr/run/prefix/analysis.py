"""The part of a model's forward pass that is the same in each epoch, cut off: found, chosen by a caller, and run apart.

`analyse` looks; `Analysis.split` cuts; `Halves` run. Whether the halves are the model is `proof`'s to say. It must not know
data sets, losses, or where features are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lehr.run.facts import named, unwrap
from lehr.run.pinning import pin_of
from lehr.run.prefix.cuts import Call, CannotSplit, CannotTrace, Crossing, Cut, choose
from lehr.run.prefix.cutting import Place, places
from lehr.run.prefix.folding import faster, piece_of
from lehr.run.prefix.forms import Form, checked_form
from lehr.run.prefix.halving import Parts, Prefix, Suffix, halve
from lehr.run.prefix.pureness import Source, below, purity
from lehr.run.prefix.seen import filled
from lehr.run.prefix.tracing import Route, Traced, trace
from lehr.run.prefix.unmoved import refuse_sparse
from lehr.run.prefix.walking import Memory, walk
from lehr.run.structure import clean
from lehr.run.untouched import in_eval

__all__ = ["Analysis", "Call", "CannotSplit", "Crossing", "Cut", "Halves", "analyse", "choose"]

_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_ENOUGH = 0.2
"""Below this share torch.export is asked, too: what torch.fx calls as a whole it looks into."""


@dataclass(frozen=True)
class Halves:
    """A model as prefix and suffix, which run its own modules with its own parameters, in the modes these are in.

    `cut` is where; `code` is what both compute, as text; `reads` the parameters and buffers that decide the features.
    `exact` are the halves of which these are the faster form, if they are one. The prefix takes at most `piece` samples at a time (0: all).
    """

    cut: Cut
    code: str
    reads: tuple[torch.Tensor, ...]
    stilled: tuple[str, ...]
    form: Form
    _spec: pytree.TreeSpec
    _first: Prefix
    _second: Suffix
    exact: Halves | None = None
    piece: int = 0

    def prefix(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """What crosses the cut, for these arguments of the model: tensors [batch, ...], without gradients.

        Raises:
            CannotSplit: where the model is called in another way than it was analysed for.
        """
        form, tensors = Form.of(args, kwargs)
        if form != self.form:
            raise CannotSplit("the model is called in another way than on the batch that was looked at first")
        count = -(-len(tensors[0]) // self.piece) if self.piece else 1
        pieces = [torch.tensor_split(t, count) for t in tensors]  # none much smaller than another
        with torch.no_grad():
            features = [self._crossing(list(piece)) for piece in zip(*pieces, strict=True)]
            return features[0] if len(features) == 1 else tuple(map(torch.cat, zip(*features, strict=True)))

    def _crossing(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        batch = len(tensors[0])
        given = [t.clone() if n in self._first.written else t for n, t in enumerate(tensors)]
        features, sizes = self._first.module.forward(*given)
        if any(size != filled(value, batch) for size, value in zip(sizes, self._first.sizes, strict=True)):
            raise CannotSplit("a size in the model does not grow with the batch in a simple way")
        if any(len(feature) != batch for feature in features):
            raise CannotSplit("what crosses the cut has not a row for each sample in a batch of this size")
        return tuple(features)

    def suffix(self, features: tuple[torch.Tensor, ...]) -> Any:
        """What the model would have returned, with gradients for what trains. The features are not changed."""
        given = [t.clone() if n in self._second.written else t for n, t in enumerate(features)]
        leaves = self._second.module.forward(len(features[0]), *given)
        return pytree.tree_unflatten(leaves, self._spec)

    def fast(self) -> Halves:
        """The same with a prefix that may round differently: batch-norm folded into convolutions, channels
        last, linear layers by oneDNN, on a CPU a few samples at a time.

        Where there is nothing to gain the prefix stays what it is.
        """
        try:
            with torch.no_grad():
                first = faster(self._first)
                piece = piece_of(first or self._first)
        except Exception:  # without it all is as well, only slower
            return self
        if first is None:
            return replace(self, piece=piece) if piece else self
        return replace(self, exact=self, piece=piece, _first=first)


@dataclass(frozen=True)
class Analysis:
    """What was found of a model: the `cuts` of which none is worse than another in both share and bytes, the largest share
    first; how it was traced; and the paths of dropouts that have to run in eval mode, since only what is frozen follows.
    """

    cuts: tuple[Cut, ...]
    route: Route
    stilled: tuple[str, ...]
    _parts: Parts
    _places: tuple[Place, ...]

    def split(self, cut: Cut) -> Halves:
        """The halves of the model at one of the `cuts`.

        Raises:
            CannotSplit: where it cannot be cut there after all.
        """
        place = next(place for place in self._places if place.cut == cut)
        try:
            first, second = halve(self._parts, place)
        except CannotSplit:
            raise
        except Exception as error:
            raise CannotSplit(
                f"the model cannot be cut behind {cut.after} ({type(error).__name__})"
            ) from error
        traced = self._parts.traced
        reads = tuple({id(t): t for t in (*first.reads, *second.reads)}.values())
        return Halves(cut, _code(traced, cut), reads, self.stilled, traced.form, traced.spec, first, second)


def analyse(model: nn.Module, call: Call, *, trained: frozenset[str]) -> Analysis:
    """Where `model`, in the mode it is in, can be cut before all that trains. The model is afterwards as before.

    Args:
        model: the model; also inside `torch.compile` or `DistributedDataParallel`.
        call: one call of it on a real batch, of three samples or more if possible.
        trained: the parameters that train, named as `lehr.inspect` names them.

    Returns:
        The analysis, with at least one cut.

    Raises:
        CannotSplit: where there is none; says why.
    """
    own = unwrap(model)
    refuse_sparse(own)
    form, tensors = checked_form(call)
    parameters = {n: p for n, p in named(own).items() if n in trained}
    _refuse_hooks(own, {id(p) for p in parameters.values()})
    best: Analysis | None = None
    reasons: list[CannotSplit] = []
    for route in ("fx", "export"):
        try:
            found = _analysed(own, form, tensors, parameters, route)
        except CannotSplit as error:
            reasons.append(error)
            continue
        if best is None or found.cuts[0].share > best.cuts[0].share:
            best = found
        if best.cuts[0].share >= _ENOUGH:
            break
    if best is None:
        raise next((r for r in reversed(reasons) if not isinstance(r, CannotTrace)), reasons[0])
    return best


def _refuse_hooks(model: nn.Module, trained: set[int]) -> None:
    for path, module in model.named_modules():
        inside = path == "" or any(True for _ in module.children())
        if inside and (module._forward_hooks or module._forward_pre_hooks):
            raise CannotSplit(
                f"a hook on {path or 'the model'} would not be called, since its parts are called one by one; remove it where "
                "it is not needed"
            )
        if module._forward_hooks and not any(id(p) in trained for p in module.parameters()):
            raise CannotSplit(
                f"a forward hook on {path or 'the model'} looks at what is frozen, and would not be called for features that "
                "are read; remove it where it is not needed"
            )


def _analysed(
    model: nn.Module, form: Form, tensors: list[torch.Tensor], trained: Mapping[str, nn.Parameter], route: Any
) -> Analysis:  # fmt: skip
    parts = _parts(model, form, tensors, trained, route, frozenset())
    stilled = _to_still(parts, model)
    while stilled != parts.stilled:
        parts = _parts(model, form, tensors, trained, route, stilled)
        stilled = _of_use(parts)
    found = places(parts.traced, parts.seen, parts.found)
    if not found:
        raise CannotSplit(_why_nothing(parts, trained, model))
    return Analysis(tuple(p.cut for p in found), route, tuple(sorted(parts.stilled)), parts, found)


def _parts(
    model: nn.Module, form: Form, tensors: list[torch.Tensor], trained: Mapping[str, nn.Parameter], route: Any,
    stilled: frozenset[str],
) -> Parts:  # fmt: skip
    with in_eval(model, stilled):
        traced = trace(model, form, tensors, route)
        memory = Memory.of(model)
        seen = walk(traced, model, tensors, memory)
    groups = memory.of_state([*trained.values(), *_moving(model)])
    return Parts(traced, seen, purity(traced, seen, groups), stilled)


def _moving(model: nn.Module) -> list[torch.Tensor]:
    """In evaluation: the batch statistics that training moves, as far as can be told: those of what is not pinned in eval
    mode. In training a forward pass shows it.
    """
    return [
        buffer
        for module in model.modules()
        if not model.training and isinstance(module, _STATISTICS) and pin_of(module) is None
        for buffer in module.buffers(recurse=False)
    ]


def _to_still(parts: Parts, model: nn.Module) -> frozenset[str]:
    """The modules without parameters that draw random numbers although nothing that trains comes before them, and
    something frozen comes after, before anything that trains: they belong to the frozen part, and are off in it.
    """
    trained = {n for first in parts.found.training for n in (first, *below(first))}
    stilled = set()
    drawing = [node for node, s in parts.seen.items() if s.draws]
    first = [source.node for source in parts.found.sources if source.kind == "random"]
    for node in first if parts.traced.route == "export" else drawing:
        path = next(iter(reversed(parts.traced.path(node))), "")
        module = model.get_submodule(path) if path else model
        if not path or not module.training or any(True for _ in module.parameters()):
            continue
        calls = [n for n in drawing if (parts.traced.path(n) or ("",))[-1] == path]
        if all(_is_before_frozen(parts, call, trained) for call in calls):
            stilled.add(path)
    return frozenset(stilled)


def _of_use(parts: Parts) -> frozenset[str]:
    """Of the stilled modules those before the largest cut: behind it, where something else keeps all from being cut, they go on
    drawing. torch.export's graph has nothing left of them, and only names the first ones.
    """
    found = places(parts.traced, parts.seen, parts.found)
    before = found[0].before if found else frozenset()
    late = {path for n in parts.seen if n not in before for path in parts.traced.path(n)[-1:]}
    return parts.stilled - late


def _is_before_frozen(parts: Parts, node: fx.Node, trained: set[fx.Node]) -> bool:
    """Whether nothing that trains comes before a node, and something frozen comes after it, before anything that trains."""
    return node not in trained and any(
        _uses_parameter(parts, after) for after in below(node) if after not in trained
    )


def _uses_parameter(parts: Parts, node: fx.Node) -> bool:
    held = [
        parts.traced.target(n) for n in (node, *node.all_input_nodes) if n.op in ("get_attr", "call_module")
    ]
    return any(
        isinstance(h, nn.Parameter) or (isinstance(h, nn.Module) and any(True for _ in h.parameters()))
        for h in held
    )


def _why_nothing(parts: Parts, trained: Mapping[str, nn.Parameter], model: nn.Module) -> str:
    """The first thing that keeps everything behind it from being kept."""
    number = {node: n for n, node in enumerate(parts.seen)}
    sources = sorted(
        parts.found.sources, key=lambda s: min((number[u] for u in s.node.users if u in number), default=0)
    )
    if not sources:
        return "nothing of the model lies before what trains"
    first = sources[0]
    where = (parts.traced.path(first.node) or ("the model's own forward",))[-1]
    if first.kind == "trained":
        return _why_trained(parts, first, trained, model)
    if first.kind == "random":
        return f"nothing to cache: {where} draws random numbers before anything frozen is computed; put it in eval mode"
    if first.kind == "batch":
        return f"nothing to cache: {where} mixes the samples of a batch; freeze it, or put it in eval mode"
    return f"nothing to cache: {where} changes the model's own state while it runs; freeze it, or put it in eval mode"


def _why_trained(parts: Parts, first: Source, trained: Mapping[str, nn.Parameter], model: nn.Module) -> str:
    held = parts.traced.target(first.node) if first.node.op in ("get_attr", "call_module") else None
    inside = {id(p) for p in held.parameters()} if isinstance(held, nn.Module) else {id(held)}
    name, parameter = next(((n, p) for n, p in trained.items() if id(p) in inside), ("a parameter", None))
    others = [
        clean(n)
        for n, p in model.named_parameters(remove_duplicate=False)
        if p is parameter and clean(n) != name
    ]
    shared = f"; it is shared with {', '.join(others)}" if others else ""
    return f"nothing to cache: {name} trains and is used first{shared}"


def _code(traced: Traced, cut: Cut) -> str:
    """What the model computes and where it is cut, as text that another process would come to as well."""
    named = tuple((c.name, c.shape, str(c.dtype)) for c in cut.crossings)
    modules = [_described(traced.target(n)) for n in traced.graph.nodes if n.op == "call_module"]
    called = [str(getattr(n.target, "__module__", "")) for n in traced.graph.nodes if n.op == "call_function"]
    parts = hashlib.blake2b(repr((modules, called)).encode(), digest_size=16).hexdigest()
    return f"{parts} {traced.route} {hashlib.blake2b(str(traced.graph).encode(), digest_size=16).hexdigest()} {cut.after} {named}"


def _described(module: Any) -> object:
    """What a module computes besides its weights: its class, and its plain settings."""
    plain = {
        k: v
        for k, v in vars(module).items()
        if isinstance(v, (bool, int, float, str, tuple)) and k != "training"
    }
    return (
        type(module).__module__,
        type(module).__qualname__,
        module.extra_repr(),
        sorted(plain.items(), key=str),
    )
