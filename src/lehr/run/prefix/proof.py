"""The self-check of a cut model on a real batch: whether its halves are the model. Everything is afterwards as before.

It must not know how the halves were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lehr.run.allocator import sparing
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
    checks = _Checks(model, halves, form, tensors, Randomness(device), tolerance(device))
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
            features = checks.features(tensors)
            checks.stored(features, store)
            with sparing():
                checks.samples(features)
                checks.goes_on(features, loss)
            return features
        except CannotSplit:
            raise
        except Exception as error:
            raise CannotSplit(
                f"the model cut behind {halves.cut.after} does not run ({type(error).__name__})"
            ) from error
        finally:
            torch.clear_autocast_cache()


_CLOSER = 0.1
"""The faster form of a prefix is to be that much nearer: it is one convolution's rounding, and nothing behind it."""


@dataclass(frozen=True)
class _Checks:
    """The checks of one pair of halves; `near` is how far two computations of the same may be apart."""

    model: nn.Module
    halves: Halves
    form: Form
    tensors: list[torch.Tensor]
    randomness: Randomness
    near: Tolerance

    @cached_property
    def pair(self) -> list[torch.Tensor]:
        """The last sample and the first, in this order; they are two also where the batch has one."""
        return _ends(at_least(self.tensors, 2))

    @cached_property
    def exact_pair(self) -> tuple[torch.Tensor, ...]:
        """The exact features of the pair, in the arithmetic that is on."""
        return self._exact(self.pair)

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
            self._samples(features, self.exact_pair, self.near)
            return
        device = self.randomness.device
        try:
            with full_precision(device):
                self._samples(self.features(self.tensors), self._exact(self.pair), tolerance(device))
        except CannotSplit:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._samples(features, self.exact_pair, self.near)  # half precision may not run without autocast

    def _samples(
        self, features: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...], within: Tolerance
    ) -> None:
        """The same for these features, and the `exact` ones of the pair."""
        pair = self.features(self.pair) if self.halves.exact else exact
        if len(features[0]) > 1:
            self._same_features(_ends(features), pair, "its batch is of another size or order", within)
        else:
            self._same_features(features, [f[1:] for f in pair], "its batch is larger", within)
        alone = self.features([t[:1] for t in self.pair])
        self._same_features([f[:1] for f in pair], alone, "it is alone", within)
        self._same_rounding(exact, pair, within)

    def _exact(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The exact features, of which those of a faster form are to be a rounding."""
        args, kwargs = self.form.call(tensors)
        return (self.halves.exact or self.halves).prefix(*args, **kwargs)

    def _same_rounding(
        self, exact: Iterable[torch.Tensor], features: Iterable[torch.Tensor], within: Tolerance
    ) -> None:
        closer = within._replace(whole=within.whole * _CLOSER)
        if not all(near(one, other, closer) for one, other in zip(exact, features, strict=True)):
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

    def goes_on(self, features: tuple[torch.Tensor, ...], loss: Judged | None) -> None:
        """The suffix is to go on as the model does: from these features, or where their rounding shows, from the exact ones."""
        try:
            is_same = self.suffix(features, loss)
        except CannotSplit:
            self.again()
            if self.halves.exact is None:
                raise
            exact = self._exact(self.tensors)
            self._same_rounding(exact, features, self.near)
            self.suffix(exact, loss)
        else:
            if not is_same:
                self.again()

    def again(self) -> None:
        """The model is to give the same once more, with the same random numbers: to the bit, on a CPU. Elsewhere sums may be
        taken in another order each time. Halves that give the model's bits are once more as well.
        """
        if self.randomness.device.type != "cpu":
            return
        once = self._run(unwrap(self.model))
        with suppress(Exception):  # what halves do with two samples alone is not asked of them
            if _same(once, self._run(lambda *_, **__: self.halves.suffix(self.exact_pair))):
                return
        if not _same(once, self._run(unwrap(self.model))):
            raise CannotSplit(
                "the model gives something else when it is run again on the same samples with the same random numbers, so it "
                "draws some from a generator of its own; put the layers that do it in eval mode"
            )

    def _run(self, called: Callable[..., Any]) -> list[torch.Tensor]:
        """The tensors that are returned for the pair, by the model or what stands for it. The model is afterwards as before."""
        own = unwrap(self.model)
        args, kwargs = self.form.call(self.pair)
        with (
            state_kept(own, self.randomness.device), attributes_kept(own), without_compiling(own), torch.no_grad()
        ):  # fmt: skip
            returned = pytree.tree_leaves(called(*args, **kwargs))
        return [leaf for leaf in returned if isinstance(leaf, torch.Tensor)]

    def suffix(self, features: tuple[torch.Tensor, ...], loss: Judged | None) -> bool:
        """The suffix is to go on from these features as the model does; whether it does so to the bit, as far as was looked."""
        if loss is not None and torch.is_grad_enabled():
            return self.training(features, loss)
        is_same = self.outputs(features)
        if loss is not None:
            self._same_loss(loss(self.model), loss(lambda *_, **__: self.halves.suffix(features)))
        return is_same

    def outputs(self, features: tuple[torch.Tensor, ...]) -> bool:
        """The suffix is to return what the model returns; whether it is that to the bit."""
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
        return _same(whole, ours)

    def _same_loss(self, whole: torch.Tensor, ours: torch.Tensor) -> None:
        if not near(whole, ours, self.near) and not abs(float(whole - ours)) <= _TINY:
            raise CannotSplit(
                f"the loss is another when the model is cut behind {self.after} ({float(ours):.6g} for {float(whole):.6g})"
            )

    def training(self, features: tuple[torch.Tensor, ...], loss: Judged) -> bool:
        """The loss, the gradients, what else changes, and the random numbers drawn are to be those of the whole model; whether loss and
        gradients are so to the bit. A gradient that is 0 says nothing.
        """
        state = self.randomness.take()
        whole, ours = (
            _step(self.model, loss, f, self.randomness, state)
            for f in (self.model, lambda *_, **__: self.halves.suffix(features))
        )
        self._same_loss(whole.loss, ours.loss)
        if self._another_gradient(whole, ours):
            moved = tuple(map(shaken, features))
            again = _step(
                self.model, loss, lambda *_, **__: self.halves.suffix(moved), self.randomness, state
            )
            if off := self._another_gradient(whole, ours, again.gradients):
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
        found = [g for g in whole.gradients.values() if g is not None]
        return (
            all(bool(g.to_dense().any()) for g in found)
            and _same([whole.loss, *found], [ours.loss, *(g for g in ours.gradients.values() if g is not None)])
        )  # fmt: skip

    def _another_gradient(self, whole: _Step, ours: _Step, moved: Gradients | None = None) -> str:
        """The first parameter whose gradient is another, "" for none; `moved` are those of shaken features."""
        off = apart(whole.gradients, ours.gradients, moved)
        return next((name for name, share in off.items() if not share <= self.near.whole), "")

    def _equal(self, one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            return near(one, other, self.near)
        return type(one) is type(other) and bool(one == other)


def _ends(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The last row and the first."""
    return [torch.cat([t[-1:], t[:1]]) for t in tensors]


def _same(some: list[Any], others: list[Any]) -> bool:
    """Whether all tensors in these are the same bits."""
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(
        same_bits(one, other) for one, other in pairs if isinstance(one, torch.Tensor)
    )


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
