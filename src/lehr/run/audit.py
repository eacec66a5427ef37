"""The proof that frozen was frozen: digests of all that a stage must not change, at its start and at its end.

It knows a model, an optimizer and which names train; nothing of steps or files.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lehr.errors import RunError
from lehr.run.facts import named, unwrap
from lehr.run.freezing import is_frozen, set_trainable
from lehr.run.weights import listed

Digests = dict[str, str]


def frozen_digests(model: nn.Module, trainable: frozenset[str]) -> Digests:
    """A digest of each tensor that does not change while `trainable` trains; the model is frozen so.

    Those are the other parameters, and the buffers of every module that is frozen as a whole. A buffer that is
    not kept in the `state_dict` is a module's own scratch paper and left out.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> list(frozen_digests(net, frozenset({"1.weight", "1.bias"})))
        ['0.weight', '0.bias', '0.running_mean', '0.running_var', '0.num_batches_tracked']
    """
    set_trainable(model, trainable)
    own = unwrap(model)
    frozen = {name: p for name, p in named(own).items() if name not in trainable}
    for path, module in own.named_modules():
        if is_frozen(module):
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    frozen[f"{path}.{name}" if path else name] = buffer
    return {name: digest(tensor) for name, tensor in frozen.items()}


def digest(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of a tensor's values."""
    values = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()[:16]


def audit(
    model: nn.Module,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    trainable: frozenset[str],
    was: Digests,
) -> str:
    """Hold the model to what freezing promises; `was` are the digests of the stage's start. Several optimizers are
    those of the stage's objectives.

    Returns:
        One digest of them all.

    Raises:
        RunError: where a frozen tensor has changed, or a trained parameter is not in exactly one group of an
            optimizer, twice in none; it names them.
    """
    now = frozen_digests(model, trainable)
    changed = [name for name, value in was.items() if now.get(name) != value]
    if changed:
        raise RunError(
            f"what was frozen has changed: {listed(changed)}; something besides the optimizer writes to it "
            "(a forward pass that changes its own buffers in eval mode, a hook, another process)"
        )
    several = optimizers if isinstance(optimizers, Sequence) else [optimizers]
    held = [Counter(id(p) for group in one.param_groups for p in group["params"]) for one in several]
    counts = {
        name: [count[id(p)] for count in held]
        for name, p in named(unwrap(model)).items()
        if name in trainable
    }
    stray = [name for name, found in counts.items() if max(found) != 1]
    if stray:
        raise RunError(
            f"trained, but not in exactly one group of the optimizer: {listed(stray)}; "
            "something has put another parameter in its place, or changed the groups"
        )
    return combined(was)


def combined(digests: Mapping[str, str]) -> str:
    """One digest of many, 16 hexadecimal digits."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
