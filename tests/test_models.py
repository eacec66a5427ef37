"""Models by name: which there are, how they are made, and what is refused before anything is paid for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lehr.data import Transform
from lehr.errors import ModelError, WeightsError
from lehr.run import models
from lehr.run.facts import inspect
from lehr.run.models import Made, check_fit, check_name, make_model
from lehr.run.weights import write_weights

SMALL = "mobilenetv3_small_050"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            "mobilenetv2_10",
            r'neither timm nor lehr has it; did you mean "mobilenetv2_100"\?.*torchvision/NAME',
        ),
        ("digitsnet", r'did you mean "digits_net"'),
        ("torchvision/resnet81", r'torchvision has no such classifier; did you mean "resnet18"'),
        ("torchvision/fcn_resnet50", "torchvision has no such classifier"),
        ("zzzzzz", r"neither timm nor lehr has it\. torchvision's"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(wrong: str, said: str) -> None:
    """A name that no model has is an error with the nearest names, also before the model is made."""
    for refuse in (check_name, lambda name: make_model(name, 3)):
        with pytest.raises(ModelError, match=said):
            refuse(wrong)


@pytest.mark.parametrize("name", ["digits_net", SMALL, "mobilenetv2_100.ra_in1k", "torchvision/resnet18"])
def test_known_names_are_accepted(name: str) -> None:
    """timm's names, with a tag or without, torchvision's and lehr's own are known."""
    check_name(name)


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [(SMALL, 3, 32), (SMALL, 1, 32), ("torchvision/squeezenet1_1", 3, 32), ("digits_net", 1, None)],
)
def test_a_made_model_classifies_its_own_images(name: str, channels: int, size: int | None) -> None:
    """A model answers with a number for each class for images as its transform makes them; its head is
    known."""
    made = make_model(name, 5, pretrained=False, channels=channels, size=size)
    check_fit(made, 5, name)
    assert made.transform.channels == channels
    assert made.transform.size == ((size or 8),) * 2
    assert inspect(made.module).head
    assert made.notes == ("weights: none; every layer starts anew",)


def test_models_with_side_exits_answer_with_one_output_while_training() -> None:
    """A network that torchvision gives several outputs in training trains like any other."""
    net = make_model("torchvision/googlenet", 3, pretrained=False).module.train()
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_the_digits_network_comes_with_its_weights() -> None:
    """`digits_net` is pretrained unless asked otherwise: its backbone is the same each time, its head is
    new."""
    one, two = (make_model("digits_net", 5, channels=1).module for _ in range(2))
    fresh = make_model("digits_net", 5, channels=1, pretrained=False).module
    assert torch.equal(one.stem[0].weight, two.stem[0].weight)  # type: ignore[union-attr,index,arg-type]
    assert not torch.equal(one.stem[0].weight, fresh.stem[0].weight)  # type: ignore[union-attr,index,arg-type]
    assert not torch.equal(one.head.weight, two.head.weight)  # type: ignore[arg-type,union-attr]


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    """A local file replaces the published weights; what was loaded and what was not is noted."""
    trained = make_model(SMALL, 7, pretrained=False).module
    write_weights(trained.state_dict(), tmp_path / "w.safetensors")
    made = make_model(SMALL, 3, weights=tmp_path / "w.safetensors")
    head = inspect(made.module).head
    theirs = trained.state_dict()
    for name, tensor in made.module.state_dict().items():
        assert name.startswith(head) or torch.equal(tensor, theirs[name]), name
    assert f"{len(theirs) - 2} of the model's {len(theirs)} tensors loaded" in made.notes[0]
    assert "of another shape" in made.notes[1]
    assert "classifier.weight" in made.notes[1]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """A file of another model is an error that names the file."""
    write_weights(nn.Linear(4, 2).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors: nothing of the model's backbone"):
        make_model("digits_net", 3, weights=tmp_path / "w.safetensors")


def test_published_weights_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a network, asking for published weights is one clear error that says the two ways out, and
    no retries' noise."""

    def offline(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("Name or service not known\nand a second line")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", offline)
    for name in (SMALL, "torchvision/squeezenet1_1"):
        with pytest.raises(
            ModelError, match=r"could not be had \(Name or service not known\); .*--weights.*--no-pretrained"
        ):
            make_model(name, 3)
    assert capfd.readouterr().err.count("Retry") <= 1  # torchvision's own are not ours to quiet


def test_a_model_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong without published weights does not speak of them."""

    def broken(*_: object, **__: object) -> None:
        raise TypeError("unexpected")

    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(ModelError, match=r"could not be made: unexpected$"):
        make_model(SMALL, 3, pretrained=False)


def test_a_size_keeps_the_margin_around_the_crop() -> None:
    """Another size scales the resize before the crop as well, and never below the crop."""
    own = make_model("torchvision/squeezenet1_1", 3, pretrained=False).transform
    small = make_model("torchvision/squeezenet1_1", 3, pretrained=False, size=112).transform
    assert (own.size, own.resize) == ((224, 224), 256)
    assert (small.size, small.resize) == ((112, 112), 128)


def test_grey_images_get_the_mean_of_the_published_numbers() -> None:
    """For one channel, mean and deviation are the averages of the three published ones."""
    colour, grey = (make_model(SMALL, 3, pretrained=False, channels=c).transform for c in (3, 1))
    assert grey.mean == pytest.approx((sum(colour.mean) / 3,))
    assert grey.std == pytest.approx((sum(colour.std) / 3,))


def test_a_size_that_the_model_cannot_take_is_refused() -> None:
    """Images too small for the network are refused in words, and the model stays in the mode it was in."""
    made = make_model("torchvision/squeezenet1_1", 3, pretrained=False, size=8)
    with pytest.raises(
        ModelError, match=r"--model squeeze: cannot take images of 8 x 8 pixels .*another --size"
    ):
        check_fit(made, 3, "squeeze")
    assert made.module.training


class _Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x, x


@pytest.mark.parametrize(("module", "said"), [(nn.Identity(), r"\(1, 1, 8, 8\)"), (_Pair(), "tuple")])
def test_what_is_no_classifier_is_refused(module: nn.Module, said: str) -> None:
    """A model that does not answer with a number for each class is refused with what it answers with."""
    made = Made(module, Transform((8, 8), 8, (0.5,), (0.5,), channels=1))
    with pytest.raises(ModelError, match=rf"answers one image with {said}; expected a classifier"):
        check_fit(made, 3, "odd")


def test_colour_only_models_say_so() -> None:
    """torchvision's models take colour images; for grey ones another model is named."""
    with pytest.raises(ModelError, match="colour images only"):
        make_model("torchvision/squeezenet1_1", 3, pretrained=False, channels=1)


def test_the_name_of_the_small_network_is_public() -> None:
    """The command line's default for the built-in data is a model that can be made."""
    check_name(models.DIGITS_NET)
