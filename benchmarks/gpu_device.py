"""The device that `gpu.py` trains on, and a clock that waits for it; what is trained or measured there is not known here."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class On:
    """Where to train, and how many processes load samples."""

    device: torch.device
    workers: int

    @property
    def is_cuda(self) -> bool:
        """Whether there is a device to wait for; on a CPU this script can only be tried."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def since(self, began: float) -> float:
        """Seconds of the clock from `began` until the device has done all that it was given."""
        self.wait()
        return time.perf_counter() - began
