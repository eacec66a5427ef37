"""A run that is stopped and gone on with on a GPU ends as one that was not, within what its kernels allow."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import lehr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
_RECIPE = lehr.Recipe(
    [lehr.Stage("3 epochs", train="head", lr=1e-2), lehr.Stage("7 epochs", train="all", lr=1e-3)],
    batch_size=16,
    ema=0.9,
)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(1024, 4)
    )  # fmt: skip


def _data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(160, 3, 8, 8, generator=generator), torch.arange(160) % 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("at", [0, 17, 30, 64])
def test_a_resume_on_cuda(precision: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a run of 100 steps that was stopped after some step agree with the others to 1e-4, where cuDNN takes its sums
    in the same order each time (without that no two runs agree, stopped or not).
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    steps = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal steps
        if model.training and steps == at and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGINT)
        steps += model.training
        return functional.cross_entropy(model(batch[0]), batch[1])

    said: dict[str, Any] = {"recipe": _RECIPE, "device": "cuda", "precision": precision}
    with pytest.raises(KeyboardInterrupt):
        lehr.fit(_net(), _data(), out=tmp_path / "run", loss=loss, **said)
    resumed = lehr.fit(_net(), _data(), out=tmp_path / "run", loss=loss, resume=True, **said).model
    whole = lehr.fit(_net(), _data(), loss=loss, **said).model
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
