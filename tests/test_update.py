"""One update: the mean over the window's samples, clipped, finite, and done again where fp16 refused it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lehr
from lehr.errors import NonFiniteError, RunError
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.run.precision import Arithmetic
from lehr.run.sampler import Window
from lehr.run.update import Loss, Update, cross_entropy, placed, scalar_loss

CPU = torch.device("cpu")


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def batches(*sizes: int) -> Window:
    generator = torch.Generator().manual_seed(7)
    return [((torch.randn(n, 6, generator=generator), torch.arange(n) % 3), n) for n in sizes]


def joined(window: Window) -> Window:
    inputs, targets = (torch.cat(parts) for parts in zip(*(batch for batch, _ in window), strict=True))
    return [((inputs, targets), len(inputs))]


def updating(
    model: nn.Module, *, loss: Loss | None = None, precision: str = "fp32", **said: Any
) -> tuple[Update, Plan]:
    """An update of everything in `model` by SGD at rate 0.1, ready for its first step."""
    stage = Stage("100 steps", train="all", lr=0.1, schedule=lehr.constant())
    plan = lehr.plan(Recipe([stage], optimizer={"name": "sgd", "momentum": 0.9}, **said), model, samples=320)
    optimizer = lehr.optimizer(plan, model)
    lehr.apply(plan[0], model, optimizer)
    on = Arithmetic(CPU, precision)
    return Update(model, optimizer, loss or cross_entropy(plan.label_smoothing), plan=plan, on=on), plan


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 4, 2), (5, 1), (3,)], ids=str)
def test_a_window_counts_every_sample_alike(sizes: tuple[int, ...]) -> None:
    """Gradients and loss of several batches, the last one short, are those of one batch of all their
    samples."""
    one, many = (nn.Sequential(nn.Linear(6, 3)) for _ in range(2))
    many.load_state_dict(one.state_dict())
    one = nn.Sequential(nn.Identity(), *one)
    window = batches(*sizes)
    losses = [updating(one)[0](joined(window), 0), updating(many)[0](window, 0)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_the_loss_of_a_window_weighs_batches_by_their_samples() -> None:
    """The loss that is returned is the mean over samples, not the mean over batches, on the device and
    without a graph."""
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 1))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0]).sum() * 0 + float(len(batch[0]))

    mean = updating(model, loss=loss)[0](batches(6, 2), 0)
    assert mean.item() == (6 * 6 + 2 * 2) / 8
    assert not mean.requires_grad


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    """`clip_norm` scales the gradients of the whole window to the norm that was asked for, and leaves
    smaller ones alone."""
    for clip, wanted in ((0.01, 0.01), (1e6, None)):
        model, free = net(), net()
        torch.manual_seed(0)
        updating(model, clip_norm=clip)[0](batches(4, 4), 0)
        torch.manual_seed(0)
        updating(free)[0](batches(4, 4), 0)
        ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, free))
        assert ours.norm().item() == pytest.approx(wanted or theirs.norm().item(), rel=1e-4)
        torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm())


def test_label_smoothing_is_that_of_torch() -> None:
    """The built-in loss smooths the targets as `cross_entropy` does, and shows outputs and targets for
    metrics."""
    model, (inputs, targets) = nn.Linear(6, 3), batches(5)[0][0]
    found = cross_entropy(0.1)(model, (inputs, targets))
    assert torch.equal(found["loss"], functional.cross_entropy(model(inputs), targets, label_smoothing=0.1))
    assert not torch.equal(found["loss"], cross_entropy()(model, (inputs, targets))["loss"])
    assert torch.equal(found["outputs"], model(inputs))
    assert found["targets"] is targets


class Says(nn.Module):
    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said

    def forward(self, _: torch.Tensor) -> Any:
        return self.said


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (
            Says(torch.zeros(2, 3)),
            torch.zeros(2, 6),
            r"a batch is a Tensor, not \(inputs, targets\); pass loss=",
        ),
        (Says(torch.zeros(2, 3)), [torch.zeros(2)] * 3, r"a batch is a list, not \(inputs, targets\)"),
        (Says({"logits": 1}), [torch.zeros(2)] * 2, r"the model returned a dict, not a tensor; pass loss="),
    ],
)
def test_what_the_built_in_loss_cannot_take_is_refused(model: nn.Module, batch: Any, message: str) -> None:
    """Batches that are no pairs, and models that return no tensor, are errors that say to pass a loss."""
    with pytest.raises(RunError, match=message):
        cross_entropy()(model, batch)


def test_a_loss_is_a_scalar_or_a_dict_with_one() -> None:
    """A tensor of one element counts as a scalar, whatever its shape; anything else is refused with what
    was found."""
    one = torch.tensor(2.0, requires_grad=True)
    assert scalar_loss(one) is one
    assert scalar_loss({"loss": one, "outputs": one}) is one
    assert scalar_loss(one.reshape(1, 1)).shape == ()
    for wrong, found in (
        (torch.zeros(3), r"returned \(3,\)"),
        ({"losses": one}, "returned dict"),
        (2.0, "returned float"),
        (None, "returned NoneType"),
    ):
        with pytest.raises(RunError, match=f"the loss function {found}; expected a scalar tensor"):
            scalar_loss(wrong)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone() -> None:
    """On the CPU a NaN in the second batch of a window stops before the weights move; the message says
    where and what to try."""
    model = net()
    update, _ = updating(model)
    update(batches(4, 4), 0)
    before = [p.detach().clone() for p in model.parameters()]
    window = batches(4, 4)
    window[1][0][0][0, 0] = torch.nan
    wanted = (
        r"the loss is nan at step 1 \(stage 1, 'all'; rates: .*0\.1\); "
        r"try a lower lr, a longer warm-up, clip_norm = 1\.0, precision fp32"
    )
    with pytest.raises(NonFiniteError, match=wanted):
        update(window, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Watched(nn.Module):
    """Keeps what each forward pass saw: its samples, its dropout, and a running mean that is replaced, not
    changed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.fc = nn.Linear(16, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.masks: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + len(x)
        hidden = self.body(x)
        mask = torch.rand_like(hidden) > 0.5
        self.masks.append(mask)
        return self.fc(hidden * mask)


@pytest.fixture
def accepted() -> Iterator[list[int]]:
    """The optimizer steps that really happened: an entry each."""
    steps: list[int] = []
    handle = register_optimizer_step_pre_hook(lambda *_: steps.append(len(steps)))
    yield steps
    handle.remove()


def scaled_run(
    monkeypatch: pytest.MonkeyPatch, scale: float, steps: int = 6
) -> tuple[Watched, list[torch.Tensor], list[float]]:
    """Some fp16 updates from a gradient scale: the model, the dropout of each accepted update, and the
    losses."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.grad_scaler.GradScaler, init_scale=scale))
    torch.manual_seed(3)
    model = Watched()
    update, _ = updating(model, precision="fp16")
    model.train()
    torch.manual_seed(4)
    masks, losses = [], []
    for step in range(steps):
        losses.append(update(batches(8), step).item())
        masks.append(model.masks[-1])
    return model, masks, losses


def test_an_update_that_the_gradient_scale_refuses_is_done_again(
    monkeypatch: pytest.MonkeyPatch, accepted: list[int]
) -> None:
    """From a scale that overflows, every update happens once, on its batch, with its dropout and
    statistics, as from a good scale."""
    good, good_masks, good_losses = scaled_run(monkeypatch, 2.0**10)
    assert len(good.masks) == len(accepted) == 6, "this scale refuses nothing"
    accepted.clear()
    model, masks, losses = scaled_run(monkeypatch, 2.0**30)
    assert len(model.masks) > 6 + 5, "this scale is refused several times"
    assert len(accepted) == 6
    assert all(torch.equal(a, b) for a, b in zip(good_masks, masks, strict=True))
    assert losses == pytest.approx(good_losses, rel=1e-3)
    assert model.seen.item() == good.seen.item() == 6 * 8
    found, wanted = dict(model.named_buffers()), dict(good.named_buffers())
    assert found["body.1.num_batches_tracked"].item() == 6
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4)


def test_an_update_that_is_refused_for_ever_stops_the_run() -> None:
    """Gradients that overflow at every scale are a non-finite error after a bounded number of tries,
    weights as they were."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) * 0).abs().sqrt().sum()  # 0, but its gradient is not a number

    model = Watched()
    before = [p.detach().clone() for p in model.parameters()]
    update, _ = updating(model, loss=loss, precision="fp16")
    with pytest.raises(
        NonFiniteError, match=r"fp16 gradients overflowed 40 times in a row.* at step 0 \(stage 1"
    ):
        update(batches(8), 0)
    assert len(model.masks) == 40
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs_on_the_cpu(precision: str) -> None:
    """bf16 and fp16 compute in half precision, keep float32 weights, and lower the loss."""
    model = net()
    update, _ = updating(model, precision=precision)
    dtypes = set()
    model[0].register_forward_hook(lambda *parts: dtypes.add(parts[-1].dtype))
    losses = [update(batches(32), step).item() for step in range(15)]
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[-1] < losses[0]


def test_a_batch_keeps_its_form_when_it_is_moved() -> None:
    """Lists, tuples, named tuples, dicts and what is no tensor come out as they went in, tensors on the
    device."""
    from collections import namedtuple

    pair = namedtuple("pair", "image name")
    batch = {"a": [torch.zeros(2), pair(torch.ones(1), "x")], "b": (1, None)}
    moved = placed(batch, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1].image.is_meta
    assert moved["a"][1].name == "x"
    assert type(moved["a"]) is list
    assert type(moved["a"][1]) is pair
    assert moved["b"] == (1, None)
    assert placed(batch, CPU) is batch
