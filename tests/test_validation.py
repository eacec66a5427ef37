"""Numbers over a data set: weighted by samples, whole, and without a trace on the model or the random
state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from lehr.errors import RunError
from lehr.events import Event, Validating
from lehr.run import validation
from lehr.run.precision import Arithmetic
from lehr.run.sampler import feed
from lehr.run.validation import higher_is_better, validate

CPU = Arithmetic(torch.device("cpu"), "fp32")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def data(samples: int = 23) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 4), torch.randint(3, (samples,)))


def measured(model: nn.Module, source: Any, *, batch_size: int = 5, **said: Any) -> dict[str, float]:
    told: list[Event] = said.pop("told", [])
    loss, metrics = said.pop("loss", None), said.pop("metrics", None)
    held = feed(source, seed=0, what="valid")
    return validate(model, held, loss, metrics, batch_size=batch_size, on=CPU, tell=told.append)


def test_the_numbers_do_not_depend_on_the_batch_size() -> None:
    """For any batch size, a lone last sample included, loss and accuracy are those over the whole set at
    once."""
    model, source = net(), data(23)
    inputs, targets = source.tensors
    model.eval()
    with torch.no_grad():
        outputs = model(inputs)
    wanted = {
        "valid_loss": functional.cross_entropy(outputs, targets).item(),
        "valid_accuracy": (outputs.argmax(1) == targets).float().mean().item(),
    }
    for size in (1, 2, 5, 11, 22, 23, 64):
        assert measured(model, source, batch_size=size) == pytest.approx(wanted, rel=1e-6), size
    loader = DataLoader(source, batch_size=7, shuffle=True)
    assert measured(model, loader) == pytest.approx(wanted, rel=1e-6)


def test_the_model_and_the_random_state_are_as_before() -> None:
    """Modes, buffers, gradients and the random state are left as they were found, also by a loader that
    shuffles."""
    model = net().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    loader = DataLoader(data(), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    measured(model, loader)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_come_back_after_an_error() -> None:
    """A validation that fails leaves the model training as it was."""
    model = net().train()
    with pytest.raises(RunError, match="the loss function returned"):
        measured(model, data(), loss=lambda model, batch: model(batch[0]))
    assert all(module.training for module in model.modules())


def test_metrics_are_the_persons_own() -> None:
    """torchmetrics given by name are measured over the set, every time anew, and instead of accuracy."""
    model, source = net(), data()
    metrics = {"f1": MulticlassF1Score(3), "top2": MulticlassAccuracy(3, top_k=2, average="micro")}
    metrics["f1"].update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))  # a rest from somewhere else
    first = measured(model, source, metrics=metrics)
    assert first.keys() == {"valid_loss", "valid_f1", "valid_top2"}
    assert measured(model, source, metrics=metrics, batch_size=3) == pytest.approx(first)
    with torch.no_grad():
        model.eval()
        alone = MulticlassF1Score(3)(model(source.tensors[0]), source.tensors[1])
    assert first["valid_f1"] == pytest.approx(alone.item())


def test_a_collection_of_metrics_works_as_a_mapping_does() -> None:
    """A torchmetrics `MetricCollection` is metrics by name, too."""
    model, source = net(), data()
    parts = {"f1": MulticlassF1Score(3), "accuracy": MulticlassAccuracy(3, average="micro")}
    found = measured(model, source, metrics=MetricCollection(dict(parts)))
    assert found == pytest.approx(measured(model, source, metrics=parts))


def test_a_loss_of_ones_own_may_show_what_metrics_need() -> None:
    """A loss function that returns `outputs` and `targets` beside the loss is measured by metrics;
    regression has no accuracy."""

    def loss(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        inputs, targets = batch
        outputs = model(inputs)[:, 0]
        return {"loss": (outputs - targets).square().mean(), "outputs": outputs, "targets": targets.float()}

    model, source = net(), data()
    assert measured(model, source, loss=loss).keys() == {"valid_loss"}
    found = measured(model, source, loss=loss, metrics={"mse": MeanSquaredError()})
    assert found["valid_mse"] == pytest.approx(found["valid_loss"], rel=1e-5)


def test_metrics_without_outputs_are_refused() -> None:
    """Metrics beside a loss that shows no outputs are an error that says what to return."""
    metrics = {"accuracy": MulticlassAccuracy(3)}
    with pytest.raises(RunError, match=r"let the loss function return \{'loss': \.\.\., 'outputs'"):
        measured(net(), data(), loss=lambda model, batch: model(batch[0]).sum(), metrics=metrics)


def test_a_metric_of_many_numbers_is_refused() -> None:
    """A metric that gives a table or a list of numbers is an error that names it and its shape."""
    wrong: list[tuple[Metric, str]] = [
        (MulticlassAccuracy(3, average="none"), r"\(3,\)"),
        (MulticlassConfusionMatrix(3), r"\(3, 3\)"),
    ]
    for metric, shape in wrong:
        with pytest.raises(
            RunError, match=f"metrics: 'each' gives a tensor of shape {shape}; expected one number"
        ):
            measured(net(), data(), metrics={"each": metric})


def test_it_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Validating` counts the samples done of all of them, at most one in each refresh."""
    told: list[Event] = []
    measured(net(), data(23), told=told)
    assert told == [], "it was done before the first refresh"
    monkeypatch.setattr(validation, "REFRESH", 0.0)
    measured(net(), data(23), told=told)
    assert told == [Validating(done, 23) for done in (5, 10, 15, 20, 23)]


@pytest.mark.parametrize(
    ("monitor", "metrics", "higher"),
    [
        ("valid_loss", None, False),
        ("train_loss", None, False),
        ("valid_accuracy", None, True),
        ("valid_error", None, False),
        ("valid_mse", {"mse": MeanSquaredError()}, False),
        ("valid_f1", {"f1": MulticlassF1Score(3)}, True),
        ("valid_loss", {"f1": MulticlassF1Score(3)}, False),
    ],
)
def test_a_metric_says_itself_which_way_is_better(monitor: str, metrics: Any, higher: bool) -> None:
    """torchmetrics know their direction; of other names, losses and errors are to be low."""
    assert higher_is_better(monitor, metrics) is higher
