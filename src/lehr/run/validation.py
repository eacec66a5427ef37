"""Numbers over a data set: weighted by samples, so the same for any batch size; the set is used whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lehr.data.purity import preserved
from lehr.errors import RunError
from lehr.events import Validating
from lehr.run.cache.shortcut import Shortcut
from lehr.run.precision import Arithmetic
from lehr.run.sampler import Feed, size_of
from lehr.run.update import Loss, cross_entropy, placed, scalar_loss
from lehr.run.watch import REFRESH, Tell

Metrics = Mapping[
    str, Any
]  # name -> torchmetrics.Metric; the package is slow to import and is not needed for the type
LOWER_IS_BETTER = ("loss", "error", "perplexity")
HIGHER_IS_BETTER = ("accuracy", "score")


def validate(
    model: nn.Module,
    feed: Feed | Shortcut,
    loss: Loss | None,
    metrics: Metrics | None,
    *,
    batch_size: int,
    on: Arithmetic,
    tell: Tell,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`valid_loss`, every metric as `valid_<name>`, and so every further scalar that the loss function's dict has (a
    mean over the batch), over the whole feed, in eval mode.

    Args:
        loss: as for `fit`; None is plain cross-entropy, without label smoothing.
        metrics: torchmetrics by name; None means accuracy, where the loss function shows its outputs and
            class targets.
        tell: is told about ten times a second how far it is.
        check: is called after each batch, and may raise to break off.

    Raises:
        RunError: for metrics whose loss function returns no `outputs` and `targets`.
    """
    loss = loss or cross_entropy()
    for metric in (metrics or {}).values():
        metric.to(on.device).reset()
    next_look = time.perf_counter() + REFRESH
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total, samples = (
        torch.zeros((), dtype=torch.float64 if on.device.type != "mps" else torch.float32, device=on.device),
        0,
    )
    sums: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad(), preserved():  # training goes on as if there had been no validation
            for batch in feed.sequential(batch_size):
                size = size_of(batch)
                with on.autocast():
                    returned = _called(loss, model, placed(batch, on.device))
                total += scalar_loss(returned).to(total.dtype) * size
                for name, value in _further(returned):
                    sums[name] = sums.get(name, torch.zeros_like(total)) + value.to(total.dtype) * size
                samples += size
                metrics = _counted(returned, metrics, on)
                check()
                if time.perf_counter() >= next_look:
                    tell(Validating(samples, feed.samples))
                    next_look = time.perf_counter() + REFRESH
    finally:
        for module, mode in modes:
            module.training = mode
    values = {"valid_loss": total.item() / samples}
    values |= {f"valid_{name}": value.item() / samples for name, value in sums.items()}
    for name, metric in (metrics or {}).items():
        values[f"valid_{name}"] = _number(metric.compute(), name)
    return values


def _called(loss: Loss, model: nn.Module, batch: Any) -> Any:
    try:
        return loss(model, batch)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RunError(
            f"validation: the loss function wants gradients ({error}), and there are none in validation; leave valid= out, "
            "or let the function do without where torch.is_grad_enabled() is False"
        ) from error


def _further(returned: torch.Tensor | Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """What a loss function measured besides its loss: the scalars in its dict."""
    table = returned if isinstance(returned, Mapping) else {}
    return [
        (name, value.detach().reshape(()))
        for name, value in table.items()
        if name not in ("loss", "outputs", "targets")
        and isinstance(value, torch.Tensor)
        and value.numel() == 1
    ]


def higher_is_better(monitor: str, metrics: Metrics | None) -> bool:
    """Whether more of a metric is better: losses and errors are not, a torchmetric says so itself."""
    metric = (metrics or {}).get(monitor.removeprefix("valid_"))
    if metric is not None and metric.higher_is_better is not None:
        return bool(metric.higher_is_better)
    return not any(word in monitor for word in LOWER_IS_BETTER)


def direction_is_known(monitor: str, metrics: Metrics | None) -> bool:
    """Whether it is known which way a metric goes: a torchmetric says so, or a word in its name."""
    metric = (metrics or {}).get(monitor.removeprefix("valid_"))
    told = metric is not None and metric.higher_is_better is not None
    return told or any(word in monitor for word in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER))


def _number(value: Any, name: str) -> float:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        what = (
            f"a tensor of shape {tuple(value.shape)}"
            if isinstance(value, torch.Tensor)
            else f"a {type(value).__name__}"
        )
        raise RunError(
            f'metrics: {name!r} gives {what}; expected one number, for example with average="macro"'
        )
    return float(value)


def _counted(
    returned: torch.Tensor | Mapping[str, torch.Tensor], metrics: Metrics | None, on: Arithmetic
) -> Metrics | None:
    """Count a batch into the metrics, which are made at the first batch where the person gave none."""
    outputs = returned.get("outputs") if isinstance(returned, Mapping) else None
    targets = returned.get("targets") if isinstance(returned, Mapping) else None
    if outputs is None or targets is None:
        if metrics:
            raise RunError(
                "metrics need what the model said: "
                "let the loss function return {'loss': ..., 'outputs': ..., 'targets': ...}"
            )
        return metrics
    if metrics is None:
        if targets.is_floating_point() or outputs.ndim < 2:
            return {}
        from torchmetrics.classification import MulticlassAccuracy

        metrics = {"accuracy": MulticlassAccuracy(outputs.shape[1], average="micro").to(on.device)}
    for metric in metrics.values():
        metric.update(outputs.float(), targets)
    return metrics
