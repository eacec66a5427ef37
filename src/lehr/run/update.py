"""One update: a window of batches becomes one optimizer step. It must not know schedules or epochs.

The loss of a window is the mean over its samples, so the last short window, and a short last batch in it,
count in full. An fp16 update that the gradient scale refuses is done again on the same window, from the same
random state and buffers, at the smaller scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from lehr.errors import NonFiniteError, RunError
from lehr.planning import Plan
from lehr.run.memory import fitting, is_out_of_memory
from lehr.run.precision import Arithmetic
from lehr.run.sampler import Window, samples_in
from lehr.run.watch import non_finite

Returned: TypeAlias = "torch.Tensor | Mapping[str, torch.Tensor]"
Loss = Callable[[nn.Module, Any], Returned]
Measure = Callable[[Returned, torch.Tensor, int], torch.Tensor]
"""(what a loss function returned, the loss in it, samples) -> a sum over the samples, a scalar on the device."""
_BUILTIN = "_lehr_builtin"
_MOST_TRIES = 40  # 2**40: from the largest useful scale to below 1


class Update:
    """Does one update of `model` on a window of batches; returns the mean loss, detached, on the device.

    `plan` is the one that is followed, and `loss` the loss function. `measure` finds a number in what that returns;
    `measured` then has it for each batch of the last window.

    Raises:
        NonFiniteError: for a loss that is not finite (before the weights are touched, where reading it is
            free), or an fp16 update refused at every scale.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss | None = None,
        *,
        plan: Plan,
        on: Arithmetic,
        objective: str = "",
    ) -> None:
        self.loss = loss or cross_entropy(plan.label_smoothing)
        self.measure: Measure | None = None
        self.measured: list[torch.Tensor] = []
        self._model, self._optimizer = model, optimizer
        self.plan, self._on = plan, on
        self._clip_norm = plan.objectives[objective].clip_norm
        # Looked up once: for the smallest networks these cost as much as a layer.
        self._reads, self._here = on.synchronous, on.device.type == "cpu"
        self._autocast = on.autocast()  # may be entered again and again
        self._scaler = torch.amp.GradScaler(on.device.type) if on.precision == "fp16" else None

    @property
    def scaling(self) -> dict[str, Any] | None:
        """The state of the fp16 scale, as plain numbers; None where there is none."""
        return None if self._scaler is None else self._scaler.state_dict()

    def resume(self, scaling: Mapping[str, Any] | None) -> None:
        """Go on with a scale as it was.

        Raises:
            ValueError: for what is no state of it.
        """
        if self._scaler is not None and scaling is not None:
            if not _like(scaling, self._scaler.state_dict()):
                raise ValueError("the state of the fp16 scale has other fields, or numbers that cannot be")
            self._scaler.load_state_dict(dict(scaling))

    def __call__(self, window: Window, step: int) -> torch.Tensor:
        """Do update `step` (its number is for messages only)."""
        total = samples_in(window)
        try:
            if self._scaler is not None:
                return self._scaled(self._scaler, window, total, step)
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._backward(window, total, step)
            self._clip()
            self._optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
        else:
            return loss
        # Outside of the handler, which holds on to every tensor of the forward pass that failed.
        raise RunError(self._too_large(window, step, said))

    def _too_large(self, window: Window, step: int, said: str) -> str:
        """What to say where memory has run out: which batch would have fitted, found by trying."""
        self._optimizer.zero_grad(set_to_none=True)
        batch, size = max(window, key=lambda pair: pair[1])
        fits = fitting(lambda part: self._backward([(part, size)], size, step), batch, size)
        self._optimizer.zero_grad(set_to_none=True)
        stage = self.plan.stage_at(step)
        samples = stage.batch_size * stage.accumulate
        if fits is None:
            way = "try a smaller batch_size, and accumulate as many times more"
        elif not fits:
            way = "not even one sample fits: a smaller model or smaller samples are needed, or precision bf16"
        else:
            times = -(-samples // fits)
            way = (
                f"{fits} would have fitted: batch_size = {fits} with accumulate = {times} makes "
                + ("the same update of" if fits * times == samples else f"updates of {fits * times}, not of")
                + f" {samples} samples (batch-norms see the smaller batch)"
            )
        return f"step {step}: out of memory with batches of {size} ({said}); {way}"

    def _backward(self, window: Window, total: int, step: int) -> torch.Tensor:
        """Gradients of the mean loss over the window's samples."""
        means: list[torch.Tensor] = []
        self.measured.clear()
        for batch, size in window:
            with self._autocast:
                here = batch if self._here else placed(batch, self._on.device)
                returned = self.loss(self._model, here)
                loss = scalar_loss(returned)
            if not loss.requires_grad:
                raise RunError(_unreached(step, self.plan))
            if self.measure:
                self.measured.append(self.measure(returned, loss, size))
            if self._reads and not math.isfinite(loss.item()):
                raise NonFiniteError(non_finite(f"the loss is {loss.item()}", step, self.plan))
            if size != total:
                loss = loss * (size / total)
            torch.autograd.backward(loss if self._scaler is None else self._scaler.scale(loss))
            means.append(loss.detach())
        return means[0] if len(means) == 1 else torch.stack(means).sum()

    def _clip(self) -> None:
        if self._clip_norm != math.inf:
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self._clip_norm)

    def _scaled(self, scaler: torch.amp.GradScaler, window: Window, total: int, step: int) -> torch.Tensor:
        undo = _undo(self._model, self._on.device)
        for _ in range(_MOST_TRIES):
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._backward(window, total, step)
            if not any(p.grad is not None for group in self._optimizer.param_groups for p in group["params"]):
                return loss  # nothing to step: a scale that has seen no gradient may not be updated
            scaler.unscale_(self._optimizer)
            self._clip()
            scale = scaler.get_scale()
            scaler.step(self._optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:
                return loss
            undo()
        lowest = f"down to a scale of {scaler.get_scale():g}"
        what = f"the fp16 gradients overflowed {_MOST_TRIES} times in a row, {lowest},"
        raise NonFiniteError(non_finite(what, step, self.plan))


def _unreached(step: int, plan: Plan) -> str:
    """What to say where the loss depends on nothing that trains."""
    stage = plan.stage_at(step)
    name = stage.turns[stage.turn_at(step)].objective
    whose = f"the loss of objective {name!r}" if name else "the loss"
    return (
        f"step {step}: {whose} depends on nothing that trains in stage {stage.index + 1}, {stage.label!r}; let it reach "
        "those parameters (is something detached, or computed under no_grad?), or train others"
    )


def _like(found: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """The same fields, each with a number of the same type that a scale may have."""
    return found.keys() == known.keys() and all(
        type(found[key]) is type(value) and 0 <= found[key] < 2**63 for key, value in known.items()
    )


def _undo(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """A function that makes buffers and random states again what they are now."""
    before = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    on_cpu = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def undo() -> None:
        for table, name, buffer, value in before:
            buffer.copy_(value)
            table[name] = buffer  # a module may have put another tensor in its place
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    return undo


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """The loss of `(inputs, targets)` batches: cross-entropy of `model(inputs)`, shape [N, classes]."""

    def loss(model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor]:
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            raise RunError(
                f"a batch is a {type(batch).__name__}, not (inputs, targets); "
                "pass loss=, a function of (model, batch)"
            )
        inputs, targets = batch
        outputs = model(inputs)
        if not isinstance(outputs, torch.Tensor):
            raise RunError(
                f"the model returned a {type(outputs).__name__}, not a tensor; "
                "pass loss=, a function of (model, batch)"
            )
        return {
            "loss": functional.cross_entropy(outputs, targets, label_smoothing=label_smoothing),
            "outputs": outputs,
            "targets": targets,
        }

    loss.__dict__[_BUILTIN] = True
    return loss


def is_builtin(loss: Loss) -> bool:
    """Whether a loss function is one that `cross_entropy` made, which measures loss, error and accuracy."""
    return _BUILTIN in getattr(loss, "__dict__", {})


def scalar_loss(returned: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The scalar that is minimised: what a loss function returned, or its `"loss"`."""
    loss = (
        returned
        if isinstance(returned, torch.Tensor)
        else returned.get("loss")
        if isinstance(returned, Mapping)
        else None
    )
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(returned).__name__
        raise RunError(
            f"the loss function returned {shape}; expected a scalar tensor, or a dict with one as 'loss'"
        )
    return loss if loss.ndim == 0 else loss.reshape(())


def placed(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; copies from pinned memory to CUDA do not wait (on MPS, memory that is
    given back too early would be read).
    """
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):  # one on meta has no values: it stands for inputs that nobody reads
        return batch if batch.is_meta else batch.to(device, non_blocking=device.type == "cuda")
    if isinstance(batch, Mapping):
        return {key: placed(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [placed(part, device) for part in batch]
        return type(batch)(parts) if type(batch) in (list, tuple) else type(batch)(*parts)  # a named tuple
    return batch
