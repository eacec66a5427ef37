"""Where a network's head is, and which blocks it repeats from input to output.

It asks timm and transformers models themselves, knows torchvision's names, and reads everything else by its
structure. It must not know of parameters' values, of freezing, or of plans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn

from lehr.run import structure

_WEIGHT_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_HEAD_NAMES = (
    *("fc", "classifier", "head", "heads", "last_linear", "logits", "classification_head"),
    *("score", "lm_head", "qa_outputs", "embed_out", "cls"),
)
# torchvision's own second classifiers, used in training only; they are heads as a whole.
_AUXILIARY = ("AuxLogits", "aux1", "aux2", "aux_classifier")
# torchvision's classifiers of several pretrained layers, of which only the last is the head. A Sequential
# with another number of layers was put there by the person and is new as a whole.
_PRETRAINED_CLASSIFIERS = {"AlexNet": 3, "VGG": 3, "MobileNetV3": 2, "MaxVit": 2}


@dataclass(frozen=True)
class Anatomy:
    """Head and blocks of a model; `layer` is the depth of each parameter, 0 to `layers - 1` (the head)."""

    head: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    layer: Mapping[str, int]
    layers: int
    understood: tuple[str, ...]


def read(
    model: nn.Module, names: Sequence[str], *, norms: frozenset[str], head: tuple[str, ...] | None = None
) -> Anatomy:
    """The anatomy of an unwrapped model whose parameters have the first names `names`.

    `norms` are the names that belong to normalisation layers; a `head` that the person gave (paths that are
    known to exist) wins over what would be found.
    """
    path, core = _core(model)
    paths, said = (head, f"head: {', '.join(head)} (as given)") if head is not None else _head(core)
    if head is None:
        paths = tuple(structure.join(path, found) for found in paths)
        said = f"head: {', '.join(paths)} ({said})" if paths else f"no head: {said}"
    matcher = _protocol(core, "timm", "group_matcher")
    if matcher is not None:
        order = _timm_order(matcher(coarse=False), path, names, paths)
        how = "timm group_matcher"
    else:
        order = structure.order(model, names, paths, norms)
        how = "repeated modules"
    return Anatomy(paths, order.blocks, order.layer, order.layers, (said, _say_blocks(order, how)))


def _core(model: nn.Module) -> tuple[str, nn.Module]:
    """The network inside wrappers that add no parameters of their own, and its path."""
    path = ""
    while not any(True for _ in model.parameters(recurse=False)):
        inside = structure.children(model)
        if len(inside) != 1 or not structure.children(inside[0][1]):
            break
        if _protocol(model, "timm", "get_classifier") is not None:
            break
        path, model = structure.join(path, inside[0][0]), inside[0][1]
    return path, model


def _protocol(module: nn.Module, package: str, attribute: str) -> Any:
    """What a library documents that its models offer, or None; the only place that asks."""
    if any(kind.__module__.partition(".")[0] == package for kind in type(module).__mro__):
        return getattr(module, attribute, None)
    return None


def _head(core: nn.Module) -> tuple[tuple[str, ...], str]:
    """The paths of the head inside `core`, and how it was found."""
    classifier = _protocol(core, "timm", "get_classifier")
    if classifier is not None:
        found = _paths_of(_call(classifier), core)
        return (
            found,
            "timm get_classifier" if found else "timm's get_classifier() gives none (num_classes=0?)",
        )
    base = _protocol(core, "transformers", "base_model")
    if isinstance(base, nn.Module) and base is not core:
        outside = tuple(name for name, child in structure.children(core) if base not in set(child.modules()))
        if outside:
            return outside, "all outside the transformers base_model"
    by_name = _named_head(core)
    if by_name:
        return by_name, "by its name"
    if base is not None or classifier is not None:
        return (), "the model is a bare backbone"
    last = _last_layer(core, "")
    if last:
        return last, "the last layer; say head=... if that is wrong"
    return (), "none was recognised; say head=... to name it"


def _call(classifier: Any) -> object:
    """What timm's `get_classifier` returns; some models fail there when their head was removed: none."""
    try:
        return classifier()
    except AttributeError:
        return None


def _paths_of(classifier: object, core: nn.Module) -> tuple[str, ...]:
    """The paths of what timm calls the classifier: one module or several, of those that have parameters."""
    modules = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    path_of = {module: path for path, module in core.named_modules()}
    return tuple(
        path_of[m] for m in modules if isinstance(m, nn.Module) and m in path_of and structure.holds(m)
    )


def _named_head(core: nn.Module) -> tuple[str, ...]:
    """The head by the name that torchvision, transformers and most people give it."""
    inside = dict(structure.children(core))
    conventional = [name for name in inside if name in _HEAD_NAMES]
    found = [_narrowed(conventional[-1], inside[conventional[-1]], core)] if conventional else []
    if _protocol(core, "torchvision", "forward") is not None:
        found += [name for name in _AUXILIARY if name in inside]
        if "roi_heads" in inside:  # detection
            predictors = structure.children(inside["roi_heads"])
            found += [f"roi_heads.{name}" for name, _ in predictors if name.endswith("_predictor")]
    return tuple(found)


def _narrowed(name: str, module: nn.Module, core: nn.Module) -> str:
    """Of a Sequential its one layer with weights; else all of it (its other layers may be as new)."""
    if not isinstance(module, nn.Sequential):
        return name
    layers = [path for path, layer in module.named_modules() if isinstance(layer, _WEIGHT_LAYERS)]
    pretrained = _protocol(core, "torchvision", "forward") and _PRETRAINED_CLASSIFIERS.get(
        type(core).__name__
    )
    return structure.join(name, layers[-1]) if layers and len(layers) in (1, pretrained) else name


def _last_layer(module: nn.Module, path: str) -> tuple[str, ...]:
    """The layer with weights that is clearly last, if any; a bare layer is named by its parameters."""
    inside = structure.children(module)
    if not inside:
        if not isinstance(module, _WEIGHT_LAYERS):
            return ()
        return (path,) if path else tuple(name for name, _ in module.named_parameters())
    name, last = inside[-1]
    if (
        isinstance(last, (*_WEIGHT_LAYERS, nn.Sequential))
        or len(inside) == len(structure.children(last)) == 1
    ):
        return _last_layer(last, structure.join(path, name))
    if (
        len(structure.children(last)) == 1
    ):  # a thin wrapper around one layer, such as a U-Net's out-convolution
        return _last_layer(last, structure.join(path, name))
    return ()


def _timm_order(matcher: Any, path: str, names: Sequence[str], head: tuple[str, ...]) -> structure.Order:
    """Blocks and depths as timm's own grouping has them; `path` leads to the timm model among `names`."""
    from timm.models import group_parameters  # only a timm model leads here, so timm is there

    short = {name: name.removeprefix(f"{path}.") for name in names}
    # timm reads nothing but the names; it gets them without what torch.compile of a submodule adds.
    listed: Any = SimpleNamespace(named_parameters=lambda: ((name, None) for name in short.values()))
    depth = group_parameters(listed, matcher, reverse=True)
    layers = max(depth.values()) + 1
    in_head = structure.under(head, names)
    layer = {name: layers - 1 if name in in_head else depth[short[name]] for name in names}
    members: dict[int, list[str]] = {}
    for name in names:
        if name not in in_head:
            members.setdefault(layer[name], []).append(name)
    stem, every = _patterns(matcher)
    if any(re.match(pattern, short[name]) for pattern in stem for name in members.get(0, ())):
        del members[0]
    last = members.get(layers - 1, [])
    if in_head or not any(re.match(pattern, short[name]) for pattern in every for name in last):
        members.pop(layers - 1, None)  # what timm matches nowhere: the neck, which goes with the last block
    else:
        last = []
    groups = [members[depth] for depth in sorted(members)]
    if groups:
        groups[-1] = groups[-1] + last
    return structure.Order(tuple(structure.cover(group, names) for group in groups), layer, layers)


def _patterns(matcher: Any) -> tuple[list[str], list[str]]:
    """The regular expressions of the stem, which timm's matchers name first, and all of them.

    A few models match by a function instead; there the first group is the stem and nothing is left unmatched.
    """
    if not isinstance(matcher, Mapping):
        return [""], [""]
    of = {
        name: [spec] if isinstance(spec, str) else [pattern for pattern, _ in spec or ()]
        for name, spec in matcher.items()
    }
    first = next(iter(of), "")
    return of[first] if first.startswith("stem") else [], [
        pattern for listed in of.values() for pattern in listed
    ]


def _say_blocks(order: structure.Order, how: str) -> str:
    if not order.blocks:
        return "no blocks were recognised"
    ends = order.blocks[0][0] if len(order.blocks) == 1 else f"{order.blocks[0][0]} … {order.blocks[-1][0]}"
    return f"{len(order.blocks)} block{'s' if len(order.blocks) > 1 else ''}: {ends} ({how})"
