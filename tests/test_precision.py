"""Which device, and which numbers: `"auto"` resolved, and what is not there refused."""

from __future__ import annotations

import pytest
import torch

from lehr.errors import RequestError
from lehr.run import precision as precisions
from lehr.run.precision import Arithmetic, arithmetic, slow_arithmetic


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with nothing but a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


def test_auto_takes_what_is_there(machine: pytest.MonkeyPatch) -> None:
    """CUDA before MPS before the CPU; bf16 on a CUDA device that computes it itself, float32 elsewhere."""
    assert arithmetic() == Arithmetic(torch.device("cpu"), "fp32")
    machine.setattr(torch.backends.mps, "is_available", lambda: True)
    assert arithmetic() == Arithmetic(torch.device("mps"), "fp32")
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    for native, wanted in ((True, "bf16"), (False, "fp32")):

        def supported(including_emulation: bool = True, native: bool = native) -> bool:
            return native or including_emulation

        machine.setattr(torch.cuda, "is_bf16_supported", supported)
        assert arithmetic() == Arithmetic(torch.device("cuda"), wanted)
        assert arithmetic("cuda:1", "fp16") == Arithmetic(torch.device("cuda:1"), "fp16")


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("cpu", "half", r"precision='half'; expected \"auto\", \"fp32\", \"bf16\" or \"fp16\""),
        ("gpu", "auto", r"device='gpu'; expected \"auto\", \"cpu\", \"cuda\""),
        ("cuda", "auto", r'device="cuda": this machine has no CUDA device.*say "auto" or "cpu"'),
        ("mps", "auto", r'device="mps": this machine has no Apple GPU'),
    ],
)
@pytest.mark.usefixtures("machine")
def test_what_is_not_there_is_refused(device: str, precision: str, message: str) -> None:
    """An unknown word or a device that the machine lacks is an error that says what to write."""
    with pytest.raises(RequestError, match=message):
        arithmetic(device, precision)


def test_a_cuda_device_past_the_last_is_refused(machine: pytest.MonkeyPatch) -> None:
    """`cuda:2` of two devices is an error that counts them."""
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RequestError, match="there are 2 CUDA devices, counted from 0"):
        arithmetic("cuda:2")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_forward_passes_run_in_the_numbers_that_were_asked_for(precision: str, dtype: torch.dtype) -> None:
    """Matrix products inside `autocast` come out in the precision's own type, and outside in float32."""
    on = arithmetic("cpu", precision)
    with on.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert on.synchronous
    assert not Arithmetic(torch.device("cuda"), precision).synchronous


@pytest.mark.parametrize(
    ("features", "slow"),
    [
        ({"avx2", "fma"}, {"bf16", "fp16"}),
        ({"avx512_bf16"}, {"fp16"}),
        ({"amx_bf16", "avx512_fp16"}, set()),
        ({"asimd", "asimdhp"}, {"bf16"}),
        ({"bf16", "asimdhp"}, set()),
        (set(), set()),
    ],
)
def test_numbers_that_a_cpu_has_no_units_for_are_named(
    monkeypatch: pytest.MonkeyPatch, features: set[str], slow: set[str]
) -> None:
    """A sentence says so, and what to write; not for float32, on a GPU, nor where the processor is not known."""
    monkeypatch.setattr(precisions, "_cpu_features", lambda: frozenset(features))
    for precision in ("fp32", "bf16", "fp16"):
        said = slow_arithmetic(Arithmetic(torch.device("cpu"), precision))
        assert bool(said) == (precision in slow)
        assert not said or f'precision="{precision}": this CPU has no units' in said
        assert not slow_arithmetic(Arithmetic(torch.device("cuda"), precision))
