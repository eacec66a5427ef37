"""The CIFAR networks of He et al. 2015: as large as the paper says, under the names of the published checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

import lehr
from lehr.errors import ModelError
from lehr.job import Request, prepare
from lehr.run.cifar_resnet import DEPTHS, MEAN, STD, cifar_resnet
from lehr.run.models import check_fit, check_name, has_weights, make_model
from lehr.run.weights import load_weights, read_weights

SHARED = Path(__file__).parents[2] / "shared"
IN_MILLIONS = {20: "0.27", 32: "0.46", 44: "0.66", 56: "0.85", 110: "1.7"}  # the paper's table 6


@pytest.mark.parametrize("depth", DEPTHS)
def test_parameters_are_as_many_as_in_the_paper(depth: int) -> None:
    """Each network has as many parameters as table 6 of the paper says, to its last digit."""
    said = IN_MILLIONS[depth]
    millions = sum(p.numel() for p in cifar_resnet(depth).parameters()) / 1e6
    assert f"{millions:.{len(said.partition('.')[2])}f}" == said


@pytest.mark.parametrize("depth", [8, 20, 110])
def test_there_are_as_many_layers_as_its_name_says(depth: int) -> None:
    """A network of 6n + 2 layers has so many convolutions and linear layers, and a norm for each convolution:
    shortcuts have no parameters (option A)."""
    net = cifar_resnet(depth)
    kinds = [type(m) for m in net.modules() if not m._modules]
    assert kinds.count(nn.Conv2d) + kinds.count(nn.Linear) == depth
    assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.Conv2d) == depth - 1
    assert set(kinds) == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}


def test_a_shortcut_takes_every_second_pixel_and_pads_with_zeros() -> None:
    """Where the residual part is 0, a block that halves gives every second pixel in the middle channels and zeros
    around them."""
    block = cifar_resnet(8).get_submodule("layer2.0").eval()
    nn.init.zeros_(block.get_parameter("bn2.weight"))
    images = torch.rand(2, 16, 8, 8)
    with torch.no_grad():
        answer = block(images)
    assert answer.shape == (2, 32, 4, 4)
    assert answer[:, 8:24].equal(images[:, :, ::2, ::2])
    assert not answer[:, :8].any()
    assert not answer[:, 24:].any()


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 21, 111])
def test_other_depths_are_refused(depth: int) -> None:
    """A depth that is not 6n + 2 is refused with the nearest one, which is taken."""
    with pytest.raises(ModelError, match=r"expected 6n \+ 2") as refused:
        cifar_resnet(depth)
    nearest = int(str(refused.value).rpartition(" ")[2])
    assert abs(nearest - depth) <= 3 or nearest == 8
    assert cifar_resnet(nearest)


def test_weights_begin_as_he_and_others_say() -> None:
    """Weights begin with mean 0 and variance 2 / (inputs of a unit), biases at 0 (He et al. 2015b, equation 10)."""
    torch.manual_seed(0)
    net = cifar_resnet(56)
    for name, inputs in (("layer3.0.conv1", 9 * 32), ("layer1.3.conv2", 9 * 16), ("layer3.8.conv2", 9 * 64)):
        weight = net.get_parameter(f"{name}.weight").double()
        many = weight.numel()
        assert abs(weight.var().item() / (2 / inputs) - 1) < 5 * (2 / many) ** 0.5  # five standard errors
        assert abs(weight.mean().item()) < 5 * (2 / inputs / many) ** 0.5
    assert not net.get_parameter("linear.bias").any()


def test_it_can_be_traced_and_compiled() -> None:
    """torch.fx traces the network and torch.compile takes it in one graph; both answer as the network does."""
    torch.manual_seed(0)
    net = cifar_resnet(8).eval()
    images = torch.randn(3, 3, 32, 32)
    expected = net(images)
    assert fx.symbolic_trace(copy.deepcopy(net))(images).equal(expected)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert compiled(images).equal(expected)
    torch._dynamo.reset()


def test_head_and_blocks_are_recognised() -> None:
    """lehr finds the head `linear`, and every block in the order in which an image passes them."""
    facts = lehr.inspect(cifar_resnet(20, classes=7))
    assert facts.head == ("linear",)
    assert facts.blocks == tuple((f"layer{row}.{n}",) for row in (1, 2, 3) for n in range(3))
    depths = {p.name: p.layer for p in facts.parameters}
    assert depths["conv1.weight"] < depths["layer1.0.conv1.weight"] < depths["layer3.2.bn2.bias"]
    assert depths["linear.weight"] == max(depths.values())


@pytest.mark.parametrize("depth", DEPTHS)
def test_they_are_known_by_name(depth: int) -> None:
    """Each depth of the paper is a model by name, with a head for the classes, for 32 x 32 images in colour."""
    name = f"cifar_resnet{depth}"
    check_name(name)
    made = make_model(name, 3)
    check_fit(made, 3, name)
    assert made.transform.size == (32, 32)
    assert (made.transform.mean, made.transform.std) == (MEAN, STD)
    assert made.notes == ("weights: none are published for it; every layer starts anew",)
    assert not has_weights(name)
    assert has_weights("mobilenetv2_100")


def test_what_they_cannot_be_is_refused() -> None:
    """A depth that is not the paper's, and grey images, are refused in words that help."""
    with pytest.raises(ModelError, match=r"neither timm nor lehr has it.*cifar_resnet110"):
        make_model("cifar_resnet111", 10)
    with pytest.raises(ModelError, match="cifar_resnet20: takes colour images only"):
        make_model("cifar_resnet20", 10, channels=1)


@pytest.fixture
def images(tmp_path: Path) -> str:
    """A .npz of forty images of two kinds."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "few.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    return str(tmp_path / "few.npz")


def test_without_weights_all_of_it_trains(images: str) -> None:
    """Where a model has no published weights, lehr's own recipe trains all of it from the start, and the run says that
    nothing was pretrained."""
    job = prepare(Request(images, model="cifar_resnet20"), fetch=True)
    assert [stage.train for stage in job.recipe.stages] == [("all",)]
    assert not job.request.pretrained
    assert "weights: none are published for it; every layer starts anew" in job.notes


def test_a_file_of_weights_is_pretrained(images: str, tmp_path: Path) -> None:
    """With a file in the form of the published checkpoints its tensors are loaded by name, and the head trains first."""
    torch.manual_seed(7)
    known = cifar_resnet(20)
    state = {f"module.{name}": tensor for name, tensor in known.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "resnet20.th")
    request = Request(images, model="cifar_resnet20", weights=str(tmp_path / "resnet20.th"))
    job = prepare(request, fetch=True)
    assert [stage.train for stage in job.recipe.stages] == [("head",), ("all", "!norm")]
    made, own = job.made.module.state_dict(), known.state_dict()
    assert all(made[name].equal(own[name]) for name in own if not name.startswith("linear."))


def test_the_published_checkpoint_classifies_cifar() -> None:
    """The published ResNet-20 loads whole, and classifies more than 91 % of CIFAR-10's test images rightly."""
    weights, subset = (
        SHARED / "weights" / "resnet20-12fca82f.th",
        SHARED / "data" / "cifar10_lossless_subset.npz",
    )
    if not weights.is_file() or not subset.is_file():
        pytest.skip(
            "needs the published checkpoint and images of CIFAR-10, which are not part of this repository"
        )
    made = make_model("cifar_resnet20", 10)
    facts = lehr.inspect(made.module)
    fitted = load_weights(made.module, read_weights(weights), head=facts.head)
    assert (
        len(fitted.loaded) == len(made.module.state_dict()) - 19
    )  # counters of batches are not in all files
    assert not fitted.missing
    assert not fitted.other_shape
    assert not fitted.unknown
    with np.load(subset) as arrays:
        pixels, labels = torch.from_numpy(arrays["x_test"]), torch.from_numpy(arrays["y_test"])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    inputs = (pixels / 255 - mean) / std
    with torch.inference_mode():
        right = made.module.eval()(inputs.contiguous(memory_format=torch.channels_last)).argmax(1) == labels
    assert right.float().mean() > 0.91


def test_the_transform_is_that_of_cifar() -> None:
    """Where CIFAR-10's images are at hand, their mean and deviation by channel are those of the transform, to within what a
    sixth of the images can differ."""
    subset = SHARED / "data" / "cifar10_lossless_subset.npz"
    if not subset.is_file():
        pytest.skip("needs images of CIFAR-10, which are not part of this repository")
    pixels = np.load(subset)["x_train"] / 255
    assert np.allclose(pixels.mean((0, 2, 3)), MEAN, atol=4e-3)
    assert np.allclose(pixels.std((0, 2, 3)), STD, atol=4e-3)
