"""Weights files: what is read, what is fitted, what is refused, and how they are written."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from lehr.errors import RunError, WeightsError
from lehr.run import weights as weights_module
from lehr.run.weights import load_weights, read_weights, write_weights


def net(classes: int = 3) -> nn.Sequential:
    """A body of three layers with batch-norm, and a head."""
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    model.add_module("body", nn.Conv2d(4, 4, 3))
    model.add_module("head", nn.Linear(4, classes))
    return model


def same(a: nn.Module, b: nn.Module, *, but: tuple[str, ...] = ()) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(t, theirs[n]) for n, t in a.state_dict().items() if not n.startswith(but))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin", ".safetensors"])
def test_every_ending_is_read(suffix: str, tmp_path: Path) -> None:
    """A file that torch.save wrote under any name, and safetensors, come back as the same tensors by
    name."""
    state, path = net().state_dict(), tmp_path / f"w{suffix}"
    write_weights(state, path) if suffix == ".safetensors" else torch.save(state, path)
    found = read_weights(path)
    assert list(found)
    assert set(found) == set(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["model_state_dict"], ["state_dict", "net"]])
def test_wrappers_are_taken_off(keys: list[str], tmp_path: Path) -> None:
    """A state_dict is found inside the usual wrappers, beside numbers and optimizer states."""
    state = net().state_dict()
    whole: object = state
    for key in reversed(keys):
        whole = {"epoch": 7, key: whole, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(whole, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth")) == set(state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module.student.backbone."])
def test_a_common_prefix_is_taken_off(prefix: str) -> None:
    """Names under any common prefix fit the model, whatever else is in the file."""
    trained, fresh = net(), net()
    state = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    fitted = load_weights(fresh, {**state, "teacher.queue": torch.zeros(2)}, head=("head",))
    assert same(fresh, trained)
    assert not fitted.missing
    assert not fitted.other_shape
    assert fitted.unknown == ("teacher.queue",)


def test_another_head_is_left_as_initialised() -> None:
    """A head of other classes is no error: its tensors are named, the rest is loaded, and the new head
    keeps its values."""
    trained, fresh = net(10), net(3)
    before = fresh.head.weight.clone()  # type: ignore[union-attr,operator]
    fitted = load_weights(fresh, trained.state_dict(), head=("head",))
    assert fitted.other_shape == ("head.weight", "head.bias")
    assert torch.equal(fresh.head.weight, before)  # type: ignore[arg-type]
    assert same(fresh, trained, but=("head",))
    assert fitted.lines()[0] == "9 of the model's 11 tensors loaded"
    assert "2 tensors of another shape" in fitted.lines()[1]
    assert "head.weight" in fitted.lines()[1]


def test_what_did_not_fit_is_listed() -> None:
    """Missing and superfluous tensors are counted and named in a line each; batch-norm's counters are
    not worth one."""
    state = net().state_dict()
    del state["body.bias"], state["stem.1.num_batches_tracked"]
    state["extra.weight"] = torch.zeros(1)
    fitted = load_weights(net(), state, head=("head",))
    assert fitted.missing == ("body.bias",)
    assert fitted.unknown == ("extra.weight",)
    assert len(fitted.lines()) == 3


def test_a_stranger_is_refused_and_changes_nothing() -> None:
    """Weights of another model are an error that shows names of both, and the model keeps every bit."""
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strange = {"encoder.layer.0.weight": torch.zeros(8, 8), "head.weight": torch.zeros(3, 4)}
    with pytest.raises(
        WeightsError, match=r"here: nothing of the model's backbone is in it.*stem\.0\.weight.*encoder"
    ):
        load_weights(model, strange, head=("head",), where="here")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_file_of_other_shapes_says_which() -> None:
    """A file with the model's names and other sizes is refused with both shapes of one tensor."""
    state = {name: torch.zeros(2, *t.shape) for name, t in net().state_dict().items()}
    with pytest.raises(
        WeightsError, match=r"stem\.0\.weight' \(4, 1, 3, 3\) \(\(2, 4, 1, 3, 3\) in the file\)"
    ):
        load_weights(net(), state, head=("head",))


def test_a_fit_by_chance_is_refused() -> None:
    """Where less than a tenth of the backbone fits, it is another model's file."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    with pytest.raises(WeightsError, match="only 2 of the model's 24 backbone tensors"):
        load_weights(model, nn.Sequential(nn.Linear(3, 3)).state_dict())


def test_a_chance_match_below_a_long_prefix_renames_nothing() -> None:
    """One tensor that happens to fit somewhere deep in the file does not make its path the file's
    prefix."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    state = {"module.layer3.0.5.bias": torch.ones(3), "module.conv1.weight": torch.ones(2)}
    with pytest.raises(WeightsError, match=r"module\.layer3\.0\.5\.bias, module\.conv1\.weight"):
        load_weights(model, state)


def test_tied_weights_need_one_name() -> None:
    """A tensor that the model holds under two names is not missing where the file has it once."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight  # type: ignore[union-attr]
    fitted = load_weights(model, {"0.weight": torch.eye(4)})
    assert not fitted.missing
    assert torch.equal(model[1].weight, torch.eye(4))  # type: ignore[arg-type]


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    """A file that is not there is an error with the nearest file beside it; a folder is called one."""
    (tmp_path / "resnet18.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match=r'resnet8\.pth: no such file; did you mean "resnet18\.pth"\?'):
        read_weights(tmp_path / "resnet8.pth")
    with pytest.raises(WeightsError, match="a folder, not a file"):
        read_weights(tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        read_weights(tmp_path / "no" / "where.pth")


@pytest.mark.parametrize(
    ("name", "content"),
    [("w.safetensors", b"hello"), ("w.pth", b"hello\n"), ("w.pth", b""), ("w.pth", b"PK\x03\x04broken")],
)
def test_damaged_files_are_one_clear_error(name: str, content: bytes, tmp_path: Path) -> None:
    """What is no weights file is an error that names the file, in one line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_weights(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    """A file that holds objects is refused, with how to save the weights alone."""
    torch.save({"state_dict": net().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"more than tensors.*torch\.save\(model\.state_dict\(\), path\)"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(("held", "said"), [([1, 2], "a list"), ({"epoch": 1}, "a table with epoch")])
def test_a_file_without_tensors_says_what_it_holds(held: object, said: str, tmp_path: Path) -> None:
    """A file that torch can read but that has no tensors by name is refused with what is in it."""
    torch.save(held, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=said):
        read_weights(tmp_path / "w.pth")


def test_what_shares_memory_is_written_under_each_name(tmp_path: Path) -> None:
    """Tied weights, views and tensors out of order are written and come back as they were."""
    whole = torch.arange(12.0).view(3, 4)
    state = {"a": whole, "b": whole, "part": whole[1], "turned": whole.t()}
    write_weights(state, tmp_path / "w.safetensors")
    found = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file cannot be written, that is said in one line, the old one stays whole, and nothing
    half is left."""
    path = tmp_path / "w.safetensors"
    write_weights({"a": torch.ones(2)}, path)
    before = path.read_bytes()

    def full(_state: object, aside: Path, **_: object) -> None:
        aside.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_module, "save_file", full)
    with pytest.raises(RunError, match=r"w\.safetensors: cannot be written: .*No space left"):
        write_weights({"a": torch.zeros(2)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
