"""The self-check of a cut model on a real batch: whether its halves are the model. Everything is afterwards as before.

It must not know how the halves were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lehr.run.allocator import give_back
from lehr.run.facts import named, unwrap
from lehr.run.memory import is_out_of_memory
from lehr.run.prefix.analysis import Halves
from lehr.run.prefix.cuts import Call, CannotSplit
from lehr.run.prefix.forms import Form, at_least
from lehr.run.prefix.gradients import Gradients, apart, shaken
from lehr.run.prefix.nearness import Tolerance, full_precision, is_full_precision, near, tolerance
from lehr.run.randomness import Randomness, RandomState
from lehr.run.untouched import (
    Mark,
    attributes_kept,
    in_eval,
    kept_state,
    same_bits,
    same_random,
    state_kept,
    tensors_kept,
    without_caches,
    without_compiling,
)

Judged = Callable[[Any], torch.Tensor]
_TINY = 1e-6
"""Losses that are no further apart than this are equal: one near 0 is all rounding."""


def prove(
    model: nn.Module, halves: Halves, call: Call, *, loss: Judged | None, store: torch.dtype | None
) -> tuple[torch.Tensor, ...]:
    """Check the halves against the model; the features of the batch that it was checked on.

    Args:
        model: the model, in the mode in which it was analysed.
        halves: its halves.
        call: a call of it on a real batch.
        loss: calls what it is given once as the model, and returns the loss; None compares the outputs alone. Gradients
            are compared where they are enabled.
        store: the type in which features will be stored, if that is narrower; None: as they are.

    Raises:
        CannotSplit: where something is off, in words. The model, its gradients and all random states are as before then, too.
    """
    own = unwrap(model)
    form, tensors = Form.of(call.args, call.kwargs)
    device = tensors[0].device
    checks = _Checks(model, halves, form, tensors, loss, Randomness(device), tolerance(device))
    with ExitStack() as kept:
        for one in (
            state_kept(own, device),
            tensors_kept(tensors),
            in_eval(own, halves.stilled),
            without_caches(own),
        ):
            kept.enter_context(one)
        torch.clear_autocast_cache()
        try:
            checks.again()
            features = checks.features(tensors)
            checks.stored(features, store)
            checks.samples(features)
            give_back()  # small blocks that lie between: the whole model needs the most
            checks.goes_on(features)
            return features
        except CannotSplit:
            raise
        except Exception as error:
            raise CannotSplit(
                f"the model cut behind {halves.cut.after} does not run ({type(error).__name__})"
            ) from error
        finally:
            torch.clear_autocast_cache()


_PAIR = 2
"""Samples that the whole model is run on again."""
_CLOSER = 0.1
"""The faster form of a prefix is to be that much nearer: it is one convolution's rounding, and nothing behind it."""


@dataclass(frozen=True)
class _Checks:
    """The checks of one pair of halves; `near` is how far two computations of the same may be apart."""

    model: nn.Module
    halves: Halves
    form: Form
    tensors: list[torch.Tensor]
    loss: Judged | None
    randomness: Randomness
    near: Tolerance

    def again(self) -> None:
        """The model is to give the same once more, with the same random numbers: to the bit, on a CPU. Elsewhere sums may be
        taken in another order each time.
        """
        if self.randomness.device.type != "cpu":
            return
        tensors = [t[:_PAIR] for t in at_least(self.tensors, _PAIR)]
        once, twice = self._run(tensors), self._run(tensors)
        if not all(map(same_bits, once, twice)):
            raise CannotSplit(
                "the model gives something else when it is run again on the same samples with the same random numbers, so it "
                "draws some from a generator of its own; put the layers that do it in eval mode"
            )

    def _run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that the model returns, which is afterwards as before."""
        own = unwrap(self.model)
        args, kwargs = self.form.call([t.clone() for t in tensors])
        with (
            state_kept(own, self.randomness.device), attributes_kept(own), without_compiling(own), torch.no_grad()
        ):  # fmt: skip
            returned = pytree.tree_leaves(own(*args, **kwargs))
        return [leaf for leaf in returned if isinstance(leaf, torch.Tensor)]

    def features(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the prefix gives, which is to change nothing by the way."""
        args, kwargs = self.form.call(tensors)
        marks = [Mark(p, copied=False) for p in self.model.parameters()]
        marks += [Mark(t, copied=True) for t in kept_state(self.model)]
        before = self.randomness.take()
        features = self.halves.prefix(*args, **kwargs)
        if any(mark.is_changed() for mark in marks):
            raise CannotSplit(f"the part up to {self.after} changes the model's own state")
        if not same_random(before, self.randomness.take()):
            raise CannotSplit(f"the part up to {self.after} draws random numbers")
        return features

    @property
    def after(self) -> str:
        return self.halves.cut.after

    @property
    def is_full(self) -> bool:
        """Whether nothing rounds more than it has to."""
        return is_full_precision(self.randomness.device)

    def samples(self, features: tuple[torch.Tensor, ...]) -> None:
        """A sample's features are to be the same in another order of the batch, and alone, and those of the faster form a
        rounding of the exact ones. In full precision, where the model runs in it: what depends on what shows there best.
        """
        if self.is_full:
            self._samples(features, self.near)
            return
        device = self.randomness.device
        try:
            with full_precision(device):
                self._samples(self.features(self.tensors), tolerance(device))
        except CannotSplit:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._samples(features, self.near)  # weights of half precision may not run without autocast

    def _samples(self, features: tuple[torch.Tensor, ...], within: Tolerance) -> None:
        count = len(features[0])
        picked = torch.tensor(sorted({count - 1, count // 2, 0}, reverse=True))
        tensors = _rows(self.tensors, picked)
        few = self.features(tensors)
        self._same_features(_rows(features, picked), few, "its batch is of another size or order", within)
        alone = self.features([t[:1] for t in tensors])
        self._same_features([f[:1] for f in few], alone, "it is alone", within)
        if count == 1:
            larger = self.features(at_least(self.tensors, 2))
            self._same_features(features, [f[:1] for f in larger], "its batch is larger", within)
        if self.halves.exact is not None:
            self._same_rounding(self._exact(self.halves.exact, tensors), few, _closer(within))

    def _exact(self, exact: Halves, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The `exact` features, of which those of the faster form are to be a rounding."""
        args, kwargs = self.form.call(tensors)
        return exact.prefix(*args, **kwargs)

    def _same_rounding(
        self, exact: Iterable[torch.Tensor], features: Iterable[torch.Tensor], within: Tolerance
    ) -> None:
        if not all(near(one, other, within) for one, other in zip(exact, features, strict=True)):
            raise CannotSplit(f"the faster form of the part up to {self.after} gives other features")

    def _same_features(
        self, some: Iterable[torch.Tensor], others: Iterable[torch.Tensor], how: str, within: Tolerance
    ) -> None:
        if not all(near(one, other, within) for one, other in zip(some, others, strict=True)):
            raise CannotSplit(
                f"a sample's features up to {self.after} are others when {how}, so they depend on the samples "
                "beside it; a layer that mixes samples has to be behind what is frozen"
            )

    def stored(self, features: tuple[torch.Tensor, ...], store: torch.dtype | None) -> None:
        """Nothing is to overflow in the type in which it is stored."""
        for feature in features:
            if store is None or not feature.is_floating_point() or store.itemsize >= feature.dtype.itemsize:
                continue
            if not feature.to(store)[feature.isfinite()].isfinite().all():
                raise CannotSplit(
                    f"features up to {self.after} are too large for {str(store).removeprefix('torch.')}; "
                    'cache_dtype = "fp32" holds them'
                )

    def goes_on(self, features: tuple[torch.Tensor, ...]) -> None:
        """The suffix is to go on as the model does: from these features, or where their rounding shows, from the exact ones."""
        if self.halves.exact is not None:
            try:
                self.suffix(features, rounding=False)
                return
            except CannotSplit:
                pass  # outside of the handler, which holds on to the gradients of the step that failed
            exact = self._exact(self.halves.exact, self.tensors)
            self._same_rounding(exact, features, _closer(self.near) if self.is_full else self.near)
            features = exact
        self.suffix(features)

    def suffix(self, features: tuple[torch.Tensor, ...], *, rounding: bool = True) -> None:
        """The suffix is to go on from these features as the model does; `rounding` of theirs may show in a gradient."""
        if self.loss is not None and torch.is_grad_enabled():
            self.training(features, self.loss, rounding)
            return
        self.outputs(features)
        if self.loss is not None:
            self._same_loss(self.loss(self.model), self.loss(lambda *_, **__: self.halves.suffix(features)))

    def outputs(self, features: tuple[torch.Tensor, ...]) -> None:
        """The suffix is to return what the model returns."""
        args, kwargs = self.form.call([t.clone() for t in self.tensors])
        state = self.randomness.take()
        with torch.no_grad():
            whole, its_form = pytree.tree_flatten(self.model(*args, **kwargs))
            self.randomness.put(state)
            ours, our_form = pytree.tree_flatten(self.halves.suffix(features))
        if its_form != our_form or not all(map(self._equal, whole, ours)):
            raise CannotSplit(
                f"the model cut behind {self.after} returns something else than the whole model"
            )

    def _same_loss(self, whole: torch.Tensor, ours: torch.Tensor) -> None:
        if not near(whole, ours, self.near) and not abs(float(whole - ours)) <= _TINY:
            raise CannotSplit(
                f"the loss is another when the model is cut behind {self.after} ({float(ours):.6g} for {float(whole):.6g})"
            )

    def training(self, features: tuple[torch.Tensor, ...], loss: Judged, rounding: bool) -> None:
        """The loss, the gradients, what else changes, and the random numbers drawn are to be those of the whole model."""
        state, whole = self.whole
        ours = _step(self.model, loss, lambda *_, **__: self.halves.suffix(features), self.randomness, state)
        self._same_loss(whole.loss, ours.loss)
        off = self._another_gradient(whole, ours)
        if off and rounding:
            moved = tuple(map(shaken, features))
            again = _step(
                self.model, loss, lambda *_, **__: self.halves.suffix(moved), self.randomness, state
            )
            off = self._another_gradient(whole, ours, again.gradients)
        if off:
            raise CannotSplit(f"{off} gets another gradient when the model is cut behind {self.after}")
        for name, buffer in whole.buffers.items():
            if name not in ours.buffers or not near(buffer, ours.buffers[name], self.near):
                raise CannotSplit(
                    f"the buffer {name} changes otherwise when the model is cut behind {self.after}"
                )
        if not same_random(whole.random, ours.random):
            raise CannotSplit(
                f"other random numbers are drawn when the model is cut behind {self.after}: its forward draws some of its own"
            )

    @cached_property
    def whole(self) -> tuple[RandomState, _Step]:
        """The random states before a step of the whole model, and the step."""
        assert self.loss is not None
        state = self.randomness.take()
        return state, _step(self.model, self.loss, self.model, self.randomness, state)

    def _another_gradient(self, whole: _Step, ours: _Step, moved: Gradients | None = None) -> str:
        """The first parameter whose gradient is another, "" for none; `moved` are those of shaken features."""
        off = apart(whole.gradients, ours.gradients, moved)
        return next((name for name, share in off.items() if not share <= self.near.whole), "")

    def _equal(self, one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            return near(one, other, self.near)
        return type(one) is type(other) and bool(one == other)


def _closer(within: Tolerance) -> Tolerance:
    return within._replace(whole=within.whole * _CLOSER)


def _rows(tensors: Iterable[torch.Tensor], order: torch.Tensor) -> list[torch.Tensor]:
    return [t[order.to(t.device)] for t in tensors]


@dataclass(frozen=True)
class _Step:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    random: RandomState


def _step(model: nn.Module, loss: Judged, called: Any, randomness: Randomness, state: RandomState) -> _Step:
    """A training step up to its gradients, from these random states on; buffers are afterwards as before."""
    trained = {n: p for n, p in named(model).items() if p.requires_grad}
    buffers = dict(unwrap(model).named_buffers())
    marks = {n: Mark(b, copied=True) for n, b in buffers.items()}
    with state_kept(unwrap(model), randomness.device):
        randomness.put(state)
        value = loss(called)
        found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
        changed = {n: b.clone() for n, b in buffers.items() if marks[n].is_changed()}
        return _Step(value.detach(), dict(zip(trained, found, strict=True)), changed, randomness.take())
