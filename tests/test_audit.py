"""Frozen means bit for bit: a stage that did not keep it fails, and what has changed is named."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import lehr
from lehr.errors import RunError
from lehr.events import EpochEnded, Event, FreezeAudited, RunFailed, StageEnded
from lehr.journal import read_journal
from lehr.run.audit import audit, combined, digest, frozen_digests

HEAD = frozenset({"fc.weight", "fc.bias"})


class Counting(nn.Module):
    """Has a buffer that every forward pass changes, in eval mode too; and one that no checkpoint keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.changes:
            self.seen += 1
        self.scratch += 1
        return x * self.scale

    changes = True


class Net(nn.Module):
    """A backbone with batch-norm and a part that counts, and a head."""

    def __init__(self, *, counts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), Counting())
        self.body[2].changes = counts
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


FROZEN = [
    "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "body.2.scale",
    "body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked", "body.2.seen",
]  # fmt: skip


def data(samples: int = 24) -> TensorDataset:
    inputs = torch.randn(samples, 6, generator=torch.Generator().manual_seed(2))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def recipe(*trained: Any, epochs: int = 1) -> lehr.Recipe:
    return lehr.Recipe(
        [lehr.Stage(f"{epochs} epochs", train=train, lr=0.05) for train in trained], batch_size=8
    )


def fit(model: nn.Module, recipe: lehr.Recipe, **said: Any) -> lehr.Result:
    return lehr.fit(model, data(), data(), recipe=recipe, device="cpu", **said)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for n, p in model.named_parameters() if n in HEAD], lr=0.1)


# --- digests ---


def test_what_a_stage_keeps_frozen() -> None:
    """It is the parameters that do not train, and the buffers that are kept of modules frozen as a whole."""
    assert list(frozen_digests(Net(), HEAD)) == FROZEN
    norm = HEAD | {"body.1.weight"}
    assert set(FROZEN) - set(frozen_digests(Net(), norm)) == {
        "body.1.weight", "body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked",
    }  # fmt: skip
    everything = frozenset(name for name, _ in Net().named_parameters())
    assert frozen_digests(Net(), everything) == {}


def test_scratch_paper_is_left_out() -> None:
    """A buffer that no `state_dict` keeps may change in a frozen module."""
    model = Net()
    before = frozen_digests(model, HEAD)
    model(data().tensors[0])
    assert model.body[2].scratch == 1
    assert frozen_digests(model, HEAD) == before


def test_tied_weights_are_one() -> None:
    """A parameter with two names is there once; frozen under the one, it is frozen under the other."""
    model = Net()
    model.fc.weight = nn.Parameter(torch.randn(3, 4))
    model.again = nn.Linear(4, 3)
    model.again.weight = model.fc.weight
    assert "again.weight" not in frozen_digests(model, HEAD)
    assert [n for n in frozen_digests(model, frozenset({"body.0.weight"})) if n.endswith("c.weight")] == [
        "fc.weight"
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
)
def test_a_digest_is_of_the_bits(dtype: torch.dtype) -> None:
    """It is the SHA-256 of the values in order, whatever the layout in memory, and changes with any bit."""
    tensor = torch.arange(24).reshape(1, 2, 3, 4).to(dtype)
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    assert digest(tensor) == hashlib.sha256(raw.tobytes()).hexdigest()[:16]
    assert digest(tensor.to(memory_format=torch.channels_last)) == digest(tensor)
    assert digest(nn.Parameter(tensor, requires_grad=False)) == digest(tensor)
    changed = raw.copy()
    changed[-1] ^= 1
    assert digest(torch.from_numpy(changed)) != digest(tensor)


def test_digests_stay_from_version_to_version() -> None:
    """Recorded digests: a checkpoint of another version is audited by them, too."""
    assert digest(torch.arange(4.0)) == "4c9c4f354e74153d"
    assert digest(torch.tensor(1.5)) == "c0e336a5f371ef22"
    assert digest(torch.empty(0)) == "e3b0c44298fc1c14"
    assert combined({"b": "2", "a": "1"}) == combined({"a": "1", "b": "2"}) == "2951835de33689a4"
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))


# --- what is found ---


def test_a_frozen_tensor_that_changed_is_named() -> None:
    """Every changed parameter and buffer is named; without a change there is one digest of them all."""
    model = Net()
    was = frozen_digests(model, HEAD)
    assert audit(model, sgd(model), HEAD, was) == combined(was)
    with torch.no_grad():
        model.body[0].bias[1] += 1e-7
        model.body[1].running_var.mul_(1.5)
    with pytest.raises(
        RunError, match=r"what was frozen has changed: body\.0\.bias, body\.1\.running_var; something"
    ):
        audit(model, sgd(model), HEAD, was)


def test_a_frozen_buffer_that_is_gone_has_changed() -> None:
    """What is not there any more is not what it was."""
    model = Net()
    was = frozen_digests(model, HEAD)
    model.body[2].seen = None
    with pytest.raises(RunError, match=r"has changed: body\.2\.seen;"):
        audit(model, sgd(model), HEAD, was)


def test_a_parameter_in_two_groups_is_named() -> None:
    """A trained parameter that two groups move would be moved twice."""
    model = Net()
    optimizer = sgd(model)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model.fc.bias]})
    with pytest.raises(
        RunError, match=r"trained, but not in exactly one group of the optimizer: fc\.bias; something"
    ):
        audit(model, optimizer, HEAD, frozen_digests(model, HEAD))


def test_a_parameter_in_no_group_is_named() -> None:
    """A trained parameter that was replaced is in no group, and nothing moves it."""
    model = Net()
    optimizer = sgd(model)
    model.fc.weight = nn.Parameter(model.fc.weight.detach().clone())
    with pytest.raises(RunError, match=r"not in exactly one group of the optimizer: fc\.weight;"):
        audit(model, optimizer, HEAD, frozen_digests(model, HEAD))


# --- through a run ---


def audits(events: list[Event]) -> list[FreezeAudited]:
    return [event for event in events if isinstance(event, FreezeAudited)]


def test_every_stage_is_audited(tmp_path: Path) -> None:
    """At the end of each stage the counts of frozen parameters and buffers are told, and written, with a digest
    that is that of the tensors; the stage has not ended before."""
    model, events = Net(), list[Event]()
    digests: list[str] = []

    def look(event: Event) -> None:
        events.append(event)
        if isinstance(event, FreezeAudited):
            frozen = {n: t for n, t in model.state_dict().items() if n in FROZEN} if event.stage == 0 else {}
            digests.append(combined({name: digest(tensor) for name, tensor in frozen.items()}))

    fit(model, recipe("head", ["head", "body.1"], "all"), out=tmp_path, observers=[look])
    told = audits(events)
    assert [(e.stage, e.step, e.parameters, e.buffers) for e in told] == [
        (0, 3, 5, 4),
        (1, 6, 3, 1),
        (2, 9, 0, 0),
    ]
    assert told[0].digest == digests[0]
    assert told[2].digest == combined({})
    assert audits([record.event for record in read_journal(tmp_path / "journal.jsonl")]) == told
    order = [type(e) for e in events if isinstance(e, (EpochEnded, FreezeAudited, StageEnded))]
    assert order == [EpochEnded, FreezeAudited, StageEnded] * 3


def test_a_run_tells_the_same_digests_again() -> None:
    """Two runs of one recipe freeze the same bits, and another start freezes others."""
    runs = []
    for shift in (0.0, 0.0, 1e-3):
        model, events = Net(), list[Event]()
        with torch.no_grad():
            model.body[0].bias += shift
        fit(model, recipe("head"), observers=[events.append])
        runs.append(audits(events)[0].digest)
    assert runs[0] == runs[1] != runs[2]


def test_a_module_that_changes_its_own_buffer_is_found(tmp_path: Path) -> None:
    """A forward pass that writes to a frozen module's buffer, in eval mode, fails the stage by name, and the
    best weights are kept."""
    best: list[torch.Tensor] = []
    model = Net(counts=True)

    def keep(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.best:
            best.append(model.fc.weight.detach().clone())

    with pytest.raises(
        RunError, match=r"what was frozen has changed: body\.2\.seen; .*a forward pass that changes"
    ) as failed:
        fit(model, recipe("head", "all"), out=tmp_path, observers=[keep])
    last = read_journal(tmp_path / "journal.jsonl").records[-1].event
    assert last == RunFailed(3, 0, f"RunError: {failed.value}")
    assert torch.equal(load_file(tmp_path / "best.safetensors")["fc.weight"], best[-1])


def test_it_is_no_fault_where_it_trains(tmp_path: Path) -> None:
    """The same module in a stage that trains it may do as it likes."""
    result = fit(Net(counts=True), recipe("all"), out=tmp_path)
    assert result.history[-1]["step"] == 3


def test_a_hook_that_writes_to_a_frozen_weight_is_found() -> None:
    """Whatever writes to what is frozen, it is found at the stage's end."""
    model = Net()

    def hook(module: nn.Linear, *_: object) -> None:
        with torch.no_grad():
            module.weight.mul_(0.999)

    model.body[0].register_forward_hook(hook)
    with pytest.raises(RunError, match=r"what was frozen has changed: body\.0\.weight;"):
        fit(model, recipe("head"))


def test_a_part_that_is_replaced_in_mid_run_is_found() -> None:
    """A head that is put in anew while it trains is trained by nothing, and that is said."""
    model = Net()
    calls = iter(range(99))

    def loss(module: Any, batch: Any) -> torch.Tensor:
        if module.training and next(calls) == 1:
            module.fc.bias = nn.Parameter(torch.zeros(3))
        return functional.cross_entropy(module(batch[0]), batch[1])

    with pytest.raises(RunError, match=r"trained, but not in exactly one group of the optimizer: fc\.bias;"):
        fit(model, recipe("head"), loss=loss)


# --- through a resume ---


def stopped(out: Path) -> Path:
    """A run of two epochs of the head that was stopped within the second; its last checkpoint."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(model.training)
        if sum(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return functional.cross_entropy(model(batch[0]), batch[1])

    calls: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        fit(Net(), recipe("head", "all", epochs=2), loss=loss, out=out)
    return max((out / "checkpoints").glob("0*.safetensors"))


def again(out: Path) -> list[FreezeAudited]:
    events: list[Event] = []
    fit(Net(), recipe("head", "all", epochs=2), out=out, resume=True, observers=[events.append])
    return audits(events)


def test_the_audit_goes_over_a_stop(tmp_path: Path) -> None:
    """A stage that two processes train is audited against its start in the first, with the same digest."""
    stopped(tmp_path / "run")
    events: list[Event] = []
    fit(Net(), recipe("head", "all", epochs=2), observers=[events.append])
    assert again(tmp_path / "run") == audits(events)
    assert audits(events)[0].parameters == 5


@pytest.mark.parametrize("name", ["body.0.weight", "body.1.running_mean"])
def test_what_is_changed_between_two_processes_is_found(tmp_path: Path, name: str) -> None:
    """A frozen tensor that is another one on the disk, with sums that fit, fails the stage by name."""
    path = stopped(tmp_path / "run")
    tensors = load_file(path)
    tensors[f"model/{name}"] = tensors[f"model/{name}"] + 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    state = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert state["at"] == {"stage": 0, "epoch": 1, "step": 4}
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    state["files"]["tensors"] = {"bytes": path.stat().st_size, "sha256": sha}
    del state["hash"]
    plain = json.dumps(state, sort_keys=True, separators=(",", ":"))
    state["hash"] = hashlib.sha256(plain.encode()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(RunError, match=rf"what was frozen has changed: {name};"):
        again(tmp_path / "run")
