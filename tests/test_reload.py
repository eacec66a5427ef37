"""A finished run, used again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import lehr
from lehr.__main__ import main
from lehr.data import open_data
from lehr.errors import RequestError, WeightsError
from lehr.run.reload import load, predict
from lehr.run.weights import read_weights, write_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the command line on the built-in digits."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    stages = ["--set", "stages.0.length=2 epochs", "--set", "stages.1.length=3 epochs"]
    main(["fit", "digits", "--out", str(folder), "--no-scratch", *stages])
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A run of `lehr.fit` on a model that lehr cannot make, and that model as it was trained."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    data = TensorDataset(torch.randn(32, 4), torch.arange(32) % 2)
    model = nn.Linear(4, 2)
    lehr.fit(
        model,
        data,
        recipe=lehr.Recipe([lehr.Stage("2 epochs", train="all", lr=0.1)]),
        out=folder,
        device="cpu",
    )
    return folder, model


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_loaded_model_is_the_best_one_of_the_run(run: Path) -> None:
    """On the validation images, the loaded model has the accuracy and the loss that the run wrote for
    its best epoch."""
    model, transform, classes = lehr.load(run)
    data = open_data("digits")
    assert classes == data.classes == ("5", "6", "7", "8", "9")
    assert not model.training
    assert transform is not None
    valid = data.valid(transform.transform)
    images, targets = torch.stack([image for image, _ in valid]), torch.tensor(valid.targets)
    with torch.no_grad():
        said = model(images)
    rows = [event for event in events(run) if event["event"] == "epoch_ended"]
    best = max(rows, key=lambda row: row["metrics"]["valid_accuracy"])["metrics"]  # type: ignore[index]
    assert (said.argmax(1) == targets).double().mean().item() == pytest.approx(
        best["valid_accuracy"], abs=1e-6
    )
    assert nn.functional.cross_entropy(said, targets).item() == pytest.approx(best["valid_loss"], abs=1e-5)


def test_the_transform_of_a_run_changes_nothing_at_random(run: Path) -> None:
    """What is kept in a run is the validation transform: the same image gives the same tensor."""
    transform = lehr.load(run).transform
    assert transform is not None
    assert not transform.augment
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert torch.equal(transform(image), transform(image))


def test_predictions_come_in_order_with_errors_as_rows(run: Path, tmp_path: Path) -> None:
    """Each path has a prediction, best class first, probabilities that sum to 1; a bad image has its
    error, once."""
    paths: list[Path] = []
    for number in range(40):  # more than one batch
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((8, 8), 6 * number, np.uint8)).save(paths[-1])
    paths[7].write_bytes(b"no image")
    paths.append(tmp_path / "nowhere.png")
    found = list(predict(load(run), paths, top=5))
    assert [p.path for p in found] == [str(path) for path in paths]
    assert [p.path for p in found if p.error] == [str(paths[7]), str(paths[40])]
    assert all(str(tmp_path) not in p.error for p in found)
    for prediction in found:
        values = [p for _, p in prediction.top]
        assert prediction.error or (
            sum(values) == pytest.approx(1) and values == sorted(values, reverse=True)
        )


@pytest.mark.parametrize("weights", [{}, {"weights": {"source": "none"}}])
def test_a_card_that_does_not_say_its_weights_is_read(
    weights: dict[str, object], run: Path, tmp_path: Path
) -> None:
    """A run is used again whether or not its card says what training began with."""
    folder = shutil.copytree(run, tmp_path / "run")
    card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    del card["weights"]
    (folder / "model.json").write_text(json.dumps({**card, **weights}), encoding="utf-8")
    assert load(folder).classes == ("5", "6", "7", "8", "9")


def test_more_classes_than_there_are_is_all_of_them(run: Path, tmp_path: Path) -> None:
    """Asking for the ten likeliest of five classes gives five."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert len(next(predict(load(run), [tmp_path / "a.png"], top=10)).top) == 5


def test_a_run_of_ones_own_model_is_loaded_into_it(own: tuple[Path, nn.Module]) -> None:
    """`lehr.load(run, model=...)` fills a model that lehr cannot make; there is no transform and there
    are no classes."""
    folder, trained = own
    empty = nn.Linear(4, 2)
    model, transform, classes = lehr.load(folder, model=empty)
    assert model is empty
    assert transform is None
    assert classes == ()
    assert torch.equal(empty.weight, read_weights(folder / "best.safetensors")["weight"])
    assert torch.equal(empty.weight, trained.weight)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"lehr\.load\(.*model=\.\.\.\)"):
        lehr.load(folder)
    with pytest.raises(RequestError, match="no transform for images"):
        next(predict(lehr.load(folder, model=empty), ["a.png"]))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(4, 3), r"in another shape weight \(2, 4\) for \(3, 4\), bias"),
        (nn.Linear(4, 2, bias=False), "has besides bias"),
        (nn.Sequential(nn.Linear(4, 2)), r"lacks 0\.weight, 0\.bias; it has besides bias, weight"),
    ],
)
def test_another_model_is_refused_and_unchanged(
    own: tuple[Path, nn.Module], model: nn.Module, said: str
) -> None:
    """A model that is not the one of the run is an error that says how they differ, and keeps its
    weights."""
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(WeightsError, match=rf"best\.safetensors: does not fit the model: .*{said}"):
        lehr.load(own[0], model=model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    """A folder that is no run, one that is not there and a run without weights are told apart."""
    with pytest.raises(RequestError, match="not a run directory"):
        load(tmp_path)
    with pytest.raises(RequestError, match=r'no such directory; did you mean "digits"\? Expected'):
        load(run.parent / "digit")
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(RequestError, match="no epoch of this run has ended"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"model": "digits_net"}', '{"model": 1, "classes": 2, "transform": 3}']
)
def test_a_damaged_card_is_one_clear_error(content: str, run: Path, tmp_path: Path) -> None:
    """Where model.json was edited or cut, the error names it."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model.json").write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=r"model\.json: damaged"):
        load(tmp_path / "run")


def test_a_device_that_is_not_there_is_refused(run: Path) -> None:
    """A wrong device is refused in words."""
    with pytest.raises(RequestError, match="expected"):
        load(run, device="gpu")


def test_a_weights_file_cut_short_is_an_error(run: Path, tmp_path: Path) -> None:
    """Weights that lack a tensor are never loaded in part."""
    shutil.copytree(run, tmp_path / "run")
    state = read_weights(run / "best.safetensors")
    state.pop("head.bias")
    write_weights(state, tmp_path / "run" / "best.safetensors")
    with pytest.raises(WeightsError, match=r"lacks head\.bias"):
        load(tmp_path / "run")
