"""One model of benchmarks/coverage.py: cut in six ways, and compared with the whole."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

import lehr
from coverage_models import Case, case
from lehr.run.facts import named
from lehr.run.freezing import set_trainable
from lehr.run.prefix.analysis import Call, CannotSplit, Halves, analyse, choose
from lehr.run.prefix.gradients import apart, shaken
from lehr.run.prefix.proof import prove

BATCH, OTHER = 3, 2
NEAR, ROUNDED = 1e-5, 1e-4
"""How far from the whole model the halves may be, and from the exact features those of the faster prefix."""


def record(name: str) -> dict[str, Any]:
    """The six ways of the model of this name."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    made = case(name)
    thaws = _thaws(made.model, made.head)
    ways = [_way(made, thawed, names, mode) for thawed, names in thaws.items() for mode in ("train", "eval")]
    return {"ways": ways, "parameters": sum(p.numel() for p in made.model.parameters())}


def _thaws(model: nn.Module, head: str | None) -> dict[str, frozenset[str]]:
    """The head, with the last block, and with the last stage: the blocks that lie beside the last one; where those are all
    blocks there are, the last quarter of them.
    """
    facts = lehr.inspect(model, head=head)
    parents = [block[0].rpartition(".")[0] for block in facts.blocks]
    beside = [block for block, parent in zip(facts.blocks, parents, strict=True) if parent == parents[-1]]
    if len(beside) in (1, len(facts.blocks)):
        beside = list(facts.blocks[-max(2, len(facts.blocks) // 4) :])

    def under(*paths: str) -> frozenset[str]:
        return frozenset(n for n in named(model) if any(n == p or n.startswith(f"{p}.") for p in paths))

    return {
        "head": under(*facts.head),
        "block": under(*facts.head, *facts.blocks[-1]),
        "stage": under(*facts.head, *(path for block in beside for path in block)),
    }


def _way(made: Case, thawed: str, names: frozenset[str], mode: str) -> dict[str, Any]:
    model, call = made.model, made.call
    set_trainable(model, names)
    model.train(mode == "train")
    torch.manual_seed(1)
    args, kwargs = call(BATCH)
    record: dict[str, Any] = {"thawed": thawed, "mode": mode, "split": False}
    began = time.process_time()
    seen = _state(model)
    try:
        with torch.set_grad_enabled(mode == "train"):
            analysis = analyse(model, Call(args, kwargs), trained=names)
            cut = choose(analysis.cuts)
            assert cut is not None
            halves = analysis.split(cut)
            loss = (lambda f: _loss(f(*args, **kwargs))) if mode == "train" else None
            prove(model, halves, Call(args, kwargs), loss=loss, store=None)
            fast = _fast(model, halves, Call(args, kwargs), loss) if mode == "train" else halves
    except CannotSplit as why:
        return record | {
            "why": str(why),
            "seconds": round(time.process_time() - began, 2),
            "kept": _same(seen, _state(model)),
        }
    record |= {
        "seconds": round(time.process_time() - began, 2),
        "kept": _same(seen, _state(model)),
        "split": True,
    }
    record |= {
        "share": cut.share,
        "after": cut.after,
        "bytes": cut.bytes_in(None),
        "tensors": len(cut.crossings),
    }
    record |= {
        "route": analysis.route,
        "stilled": analysis.stilled,
        "cuts": len(analysis.cuts),
        "folded": fast.exact is not None,
    }
    record["alone"] = _alone(halves, call)
    record |= {"off": _off(model, halves, call, mode), "off_fast": _rounded(halves, fast, call)}
    return record | {"equal": record["off"] <= NEAR and record["off_fast"] <= ROUNDED}


def _alone(halves: Halves, call: Any) -> float:
    """How far a sample's features are from themselves when it is alone."""
    args, kwargs = call(BATCH)
    whole = halves.prefix(*args, **kwargs)
    alone = halves.prefix(*(a[:1] for a in args), **{k: v[:1] for k, v in kwargs.items()})
    return max(_distance(f[:1], g) for f, g in zip(whole, alone, strict=True))


def _bytes(halves: Halves, made: Case) -> int:
    """What a sample of the usual size takes."""
    args, kwargs = (made.usual or made.call)(1)
    return sum(f.nbytes for f in halves.prefix(*args, **kwargs))


def _fast(model: nn.Module, halves: Halves, call: Call, loss: Any) -> Halves:
    """The faster halves where these are proved, else the exact ones, which `lehr.fit` would use then."""
    try:
        fast = halves.fast()
        if fast is not halves:
            prove(model, fast, call, loss=loss, store=None)
    except CannotSplit:
        return halves
    return fast


def _off(model: nn.Module, halves: Halves, call: Any, mode: str) -> float:
    """The largest difference between halves and model, relative to the norm: outputs, in training also gradients and buffers,
    on another batch.
    """
    torch.manual_seed(2)
    args, kwargs = call(OTHER)
    stilled = {m for path in halves.stilled for m in model.get_submodule(path).modules()}
    configs = [c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", None)]
    try:
        for module in stilled:
            module.training = False
        for config in configs:
            config.use_cache = False
        whole = _run(model, lambda: model(*args, **kwargs), mode)
    finally:
        for config in configs:
            config.use_cache = True
        model.train(mode == "train")
    features = halves.prefix(*args, **kwargs)
    moved = tuple(map(shaken, features))
    ours, again = (_run(model, lambda f=f: halves.suffix(f), mode) for f in (features, moved))
    off = apart(whole.gradients, ours.gradients, again.gradients)
    return max(_furthest(whole.values, ours.values), *off.values(), 0.0)


def _rounded(halves: Halves, fast: Halves, call: Any) -> float:
    """How far the features of the faster prefix are from the exact ones; the suffix is the same."""
    if fast is halves:
        return 0.0
    args, kwargs = call(OTHER)
    both = zip(halves.prefix(*args, **kwargs), fast.prefix(*args, **kwargs), strict=True)
    return max(_distance(exact, rounded) for exact, rounded in both)


def _furthest(whole: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> float:
    if whole.keys() != ours.keys():
        return float("inf")
    return max(_distance(t, ours[key]) for key, t in whole.items())


class _Ran(NamedTuple):
    values: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]


def _run(model: nn.Module, forward: Callable[[], Any], mode: str) -> _Ran:
    """Outputs and buffers, and the gradients of what trains; the model is afterwards as before."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    gradients: dict[str, torch.Tensor | None] = {}
    try:
        with torch.set_grad_enabled(mode == "train"):
            output = forward()
            leaves, spec = pytree.tree_flatten(output)
            values = {
                f"output {n} {spec}"[:200]: t.detach()
                for n, t in enumerate(leaves)
                if isinstance(t, torch.Tensor)
            }
            if mode == "train":
                model.zero_grad()
                _loss(output).backward()
                gradients = {n: p.grad for n, p in named(model).items() if p.requires_grad}
                values |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    finally:
        model.zero_grad()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
    return _Ran(values, gradients)


def _loss(output: Any) -> torch.Tensor:
    """A number that depends on all of an output, in another way for each sample."""
    total = torch.zeros(())
    for number, leaf in enumerate(t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)):
        if leaf.is_floating_point():
            weights = torch.linspace(-1, 1, leaf.numel()).reshape(leaf.shape)
            total = total + (number + 1) * (leaf * weights).mean() + leaf.square().mean()
    return total


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    return float((a.double() - b.double()).norm() / max(float(a.double().norm()), 1e-30))


def _state(model: nn.Module) -> list[Any]:
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    return [*tensors, torch.get_rng_state(), [(n, m.training) for n, m in model.named_modules()],
            [p.grad is None for p in model.parameters()], [sorted(m.__dict__) for m in model.modules()]]  # fmt: skip


def _same(before: list[Any], after: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )
