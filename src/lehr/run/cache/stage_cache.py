"""Which stages of a run go the short way, and what is told of it. The way itself is `shortcut.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lehr.data.datasets import ImageSamples
from lehr.data.drawing import probe
from lehr.errors import RecipeError
from lehr.events import CacheClosed, Note, PrefixCached
from lehr.planned_stage import PlannedStage
from lehr.planning import Plan
from lehr.run.allocator import give_back
from lehr.run.cache.shortcut import Shortcut
from lehr.run.cache.store import Store
from lehr.run.cache.terms import Terms
from lehr.run.cache.ways import Wanted, Way
from lehr.run.facts import named, unwrap
from lehr.run.freezing import is_frozen
from lehr.run.layout import Name
from lehr.run.precision import Arithmetic
from lehr.run.sampler import Feed
from lehr.run.update import Loss
from lehr.run.watch import Tell

_TRAINING, _VALIDATION = "train", "valid"
_NEARLY_ALL = 0.8
"""Of the parameters: a stage that trains more is not expected to have anything to keep."""
_TURNS = "objectives take turns, and what is frozen changes with each"


@dataclass(frozen=True)
class Caching:
    """What is the same for all stages of a run: the model, its arithmetic, where a file may lie, where features are kept for
    other runs (None: nowhere), and how many samples validate.
    """

    model: nn.Module
    on: Arithmetic
    folder: Path | None = None
    cache_dir: Path | None = None
    samples_valid: int = 0


class StageCache:
    """The shortcuts of one stage of `plan`: one for training on `feed`, one for validation, each found with its first batch.

    `loss` is the stage's loss function; None where objectives take turns. `at` says how many updates are done, and `layout`
    how features are to lie, if that is not for the frozen part to say.

    Raises:
        RecipeError: where the stage requires a cache and there can be none.
    """

    def __init__(
        self, caching: Caching, plan: Plan, stage: PlannedStage, feed: Feed, loss: Loss | None, *,
        tell: Tell, at: Callable[[], int], layout: Callable[[], Name | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._caching, self._plan, self._stage, self._tell, self._at = caching, plan, stage, tell, at
        self._layout = layout
        self._valid: Shortcut | None = None
        self.train: Shortcut | None = None
        why, is_news = why_not(plan, stage, feed) if loss else (_TURNS, False)
        if loss and not why:
            self.train = Shortcut(caching.model, feed, loss, self._terms(feed, _TRAINING))
        elif is_news or stage.cache == "require":
            self._lost(_TRAINING, why)

    def validation(self, model: nn.Module, feed: Feed, loss: Loss) -> Shortcut | None:
        """The validation set on its short way through `model`, which may be an average of the weights; None where there
        is none.
        """
        own = self._caching.model
        if self._valid is None and not why_not_validated(self._plan, self._stage, feed, own, model):
            terms = self._terms(feed, _VALIDATION, is_average=model is not own)
            self._valid = Shortcut(model, feed, loss, terms)
        return self._valid

    def end(self) -> None:
        """Leave the stage: what was kept is dropped, and what it was good for is told."""
        for data, shortcut in ((_TRAINING, self.train), (_VALIDATION, self._valid)):
            if shortcut is None:
                continue
            tally = shortcut.clock.tally
            if tally.computed or tally.read:
                self._tell(
                    CacheClosed(self._stage.index, self._at(), data, tally.computed, tally.read, tally.saved)
                )
        self.close()

    def close(self) -> None:
        """Let go of what is kept, without a word."""
        for shortcut in (self.train, self._valid):
            if shortcut:
                shortcut.close()
        give_back()

    def _terms(self, feed: Feed, data: str, *, is_average: bool = False) -> Terms:
        plan, stage, caching, tell = self._plan, self._stage, self._caching, self._tell
        views = 1 if data == _VALIDATION else stage.views
        wanted = wanted_in(plan, stage, feed, caching.samples_valid, views=views)
        return Terms(
            data, plan.trainable(stage), wanted, caching.on, found=partial(self._found, data), lost=partial(self._lost, data),
            said=lambda text: tell(Note(text)), again=partial(not_again, plan, stage, feed, "fresh" if data == _VALIDATION else views),
            folder=caching.folder, cache_dir=caching.cache_dir, is_average=is_average,
            is_fresh=data == _VALIDATION or views == "fresh", layout=self._layout if data == _TRAINING else lambda: None,
        )  # fmt: skip

    def _found(self, data: str, way: Way, store: Store) -> None:
        self._tell(
            PrefixCached(
                self._stage.index, self._at(), data, way.cut.after, round(way.cut.share, 4), store.row_bytes,
                store.slots, way.wanted.rows, store.place, way.route, way.folded,
            )
        )  # fmt: skip
        if way.stilled and data == _TRAINING:
            names = ", ".join(way.stilled)
            self._tell(Note(f"only frozen layers follow the dropout {names}, so it is off in this stage"))

    def _lost(self, data: str, why: str) -> None:
        stage = self._stage
        if stage.cache == "require" and data == _TRAINING:
            raise RecipeError(f"stages.{stage.index}.cache: {why}")
        what = "is trained" if data == _TRAINING else "is validated"
        self._tell(Note(f"stage {stage.index + 1} {what} without a cache: {why}"))


def wanted_in(
    plan: Plan, stage: PlannedStage, feed: Feed, samples_valid: int, *, views: int | str = "fresh"
) -> Wanted:
    """What a stage would keep of the samples of `feed`. Training and validation share the budget by their samples, so that
    neither depends on which of them comes first.
    """
    fixed = views if isinstance(views, int) and type(feed.source) is not TensorDataset else 1
    samples = len(feed.dataset)  # type: ignore[arg-type]  # `feed` has asked for it
    rows = samples * fixed
    budget = plan.caching.budget * samples // max(plan.samples + samples_valid, samples)
    caching = plan.caching
    return Wanted(
        budget, rows, fixed, max(stage.epochs / fixed - 1, 0), caching.dtype, caching.exact,
        required=stage.cache == "require",
    )  # fmt: skip


def why_not(plan: Plan, stage: PlannedStage, feed: Feed) -> tuple[str, bool]:
    """Why a stage is trained without a cache, as far as it is known before its first batch, and whether that is news to a
    person who did not ask for one; "" where nothing speaks against it.
    """
    if stage.cache == "off":
        return 'cache = "off"', False
    if plan.trainable(stage) >= plan.parameters.keys():
        return "it trains the whole model, so nothing stays the same", False
    views = stage.views if isinstance(stage.views, int) else 1
    if stage.epochs <= views:
        return f"it sees no sample twice in {stage.epochs} epoch(s) with {views} view(s)", False
    if feed.untappable:
        return feed.untappable, True
    return "", False


def not_again(plan: Plan, stage: PlannedStage, feed: Feed, views: int | str) -> tuple[str, bool]:
    """Why samples would not be the same again, and whether that is news, as in `why_not`; it makes some of them to find
    out, so it is asked last.
    """
    source = feed.dataset
    if isinstance(views, int):
        drawn = probe(source, plan.seed, fixed=True)
        return f"{drawn}, in the same view, too" if drawn else "", True
    if isinstance(source, ImageSamples) and source.pipeline.augment:
        names = ", ".join(sorted(source.pipeline.augment))
        changed = f"its images are changed at random in each epoch ({names})"
        trained = sum(plan.parameters[name] for name in plan.trainable(stage)) / sum(plan.parameters.values())
        if trained > _NEARLY_ALL:
            return f"it trains {trained:.0%} of the parameters, and {changed}", False
        return f"{changed}; views = 4 makes four of each, once", True
    drawn = probe(source, plan.seed)
    way = (
        "views = 4 makes four fixed views of each sample"
        if feed.loader is None
        else "pass the data set itself and say views = 4, or take the randomness out"
    )
    return f"{drawn}; {way}" if drawn else "", True


def why_not_validated(
    plan: Plan, stage: PlannedStage, feed: Feed, model: nn.Module, judged: nn.Module
) -> str:
    """Why a stage is validated without a cache; it is not told, since training says it."""
    if not stage.is_plain or any(turn.objective for turn in stage.turns):
        return _TURNS
    if stage.cache == "off" or plan.trainable(stage) >= plan.parameters.keys() or stage.epochs < 2:
        return "there is nothing to keep"
    if feed.untappable:
        return feed.untappable
    moves = judged is not model and not _is_at_rest(model, judged, plan.trainable(stage))
    return "the average of the frozen weights still moves" if moves else ""


def _is_at_rest(model: nn.Module, average: nn.Module, trained: frozenset[str]) -> bool:
    """Whether the average has come to the weights that are frozen, so that it stays there to the bit."""
    theirs = unwrap(average)
    weights = named(average)
    if not all(torch.equal(p, weights[n]) for n, p in named(model).items() if n not in trained):
        return False
    return all(
        torch.equal(buffer, theirs.get_submodule(path).get_buffer(name))
        for path, module in unwrap(model).named_modules()
        if is_frozen(module)
        for name, buffer in module.named_buffers(recurse=False)
    )
