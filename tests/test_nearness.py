"""When two tensors are the same up to rounding."""

from __future__ import annotations

import pytest
import torch

from lehr.run.prefix.nearness import is_full_precision, near, tolerance, without_tf32


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def features(small: float) -> torch.Tensor:
    """Channels of one size but for the first."""
    made = torch.randn(4, 16, 6, 6)
    made[:, 0] *= small
    return made


FP32 = tolerance(torch.device("cpu"))


@pytest.mark.parametrize("small", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_a_wrong_slice_is_seen(small: float, dim: int) -> None:
    """A slice that is wrong by half is seen along each dimension, however large the others are."""
    made = features(small).transpose(0, 1).transpose(0, dim)
    wrong = made.clone()
    wrong.select(dim, 0).mul_(1.5)
    assert not near(made, wrong, FP32)


@pytest.mark.parametrize("small", [1.0, 1e-2, 1e-4, 0.0])
def test_rounding_is_near(small: float) -> None:
    """What rounding makes is near, also where a channel is all that large numbers have left of each other."""
    made = features(small)
    assert near(made, made * (1 + 1e-5 * torch.randn_like(made)), FP32)
    assert near(made, made + 1e-6 * torch.randn_like(made), FP32)
    assert near(made, made + 3 - 3, FP32)


def test_what_is_not_finite() -> None:
    """NaN and infinity are near themselves only, in their places."""
    made = features(1.0)
    made[0, 0, 0], made[1, 1, 1] = float("nan"), float("inf")
    assert near(made, made * (1 + 1e-6), FP32)
    for wrong in (made.nan_to_num(nan=0.0), made.nan_to_num(nan=float("nan"), posinf=1.0), made.roll(1, 1)):
        assert not near(made, wrong, FP32)
        assert not near(wrong, made, FP32)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("cudnn", [True, False])
def test_what_a_person_has_set_of_tf32_is_put_back(
    precision: str, cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For CUDA TF32 is off within, and as it was afterwards, so that it can be read by every name."""
    device = torch.device("cuda")
    was = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", cudnn)
    try:
        torch.set_float32_matmul_precision(precision)
        with without_tf32(device):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert is_full_precision(device)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 is cudnn
        assert is_full_precision(device) is (precision == "highest" and not cudnn)
    finally:
        torch.set_float32_matmul_precision(was)


def test_tf32_by_torch_s_newer_names_is_put_back() -> None:
    """Set by these it is off within, too."""
    matmul, device = torch.backends.cuda.matmul, torch.device("cuda")
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has not got them")
    was = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with without_tf32(device):
            assert matmul.fp32_precision == "ieee"
            assert is_full_precision(device)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = was
