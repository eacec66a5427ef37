"""Tensors of a model and an optimizer by name: copied out, put back, refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lehr.errors import CheckpointError
from lehr.recipe import Recipe, Stage
from lehr.resolving import resolve
from lehr.run.facts import inspect
from lehr.run.files import write_tensors
from lehr.run.optimizer import optimizer as planned
from lehr.run.snapshot import Copies, fill_slots, put_back, slots_of, tensors_of
from lehr.run.state import Slots
from small_run import bits

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Net(nn.Module):
    """Convolution, batch-norm, a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


class Reordered(Net):
    def __init__(self) -> None:
        super().__init__()
        self._modules = dict(reversed(self._modules.items()))


class Buffers(nn.Module):
    """Buffers of all kinds: kept, scratch, not there yet, one that grows, one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("later", None)
        self.register_buffer("grows", torch.zeros(0), persistent=False)
        self.register_buffer("again", self.count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.scratch += x.detach().mean(0)
        self.later = x.detach().sum(0) if self.later is None else self.later + 1
        self.grows = torch.cat([self.grows, x.detach().mean().reshape(1)])
        return self.layer(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(x))


def through_a_file(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    write_tensors(folder / "x.safetensors", tensors)
    loaded: dict[str, torch.Tensor] = load_file(folder / "x.safetensors")
    return loaded


def everything(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, bytes]]:
    """The bits of all parameters and buffers, by name; the names sorted."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (found[name].shape, found[name].dtype, bits(found[name])) for name in sorted(found)}


# --- the model ---


def test_a_model_comes_back(tmp_path: Path) -> None:
    """Every parameter and buffer comes back to the bit, in place: who holds a tensor goes on holding it."""
    model, other = Net(), Net()
    model(torch.randn(8, 2, 5, 5))
    weight, mean = other.conv.weight, other.norm.running_mean
    put_back("model", other, through_a_file(tensors_of("model", model), tmp_path))
    assert everything(other) == everything(model)
    assert other.conv.weight is weight
    assert other.norm.running_mean is mean


def test_parts_in_another_order_come_back_by_name(tmp_path: Path) -> None:
    """A model that registers its parts in another order gets each tensor by its name."""
    model, other = Net(), Reordered()
    put_back("model", other, through_a_file(tensors_of("model", model), tmp_path))
    assert everything(other) == everything(model)


def test_parts_do_not_mix(tmp_path: Path) -> None:
    """The model and its average are kept apart, also where the name of one begins that of another."""
    parts = {"model": Net(), "mode": Net(), "ema": Net()}
    there: dict[str, torch.Tensor] = {}
    for part, module in parts.items():
        there |= tensors_of(part, module)
    there = through_a_file(there, tmp_path)
    for part, module in parts.items():
        other = Net()
        put_back(part, other, there)
        assert everything(other) == everything(module)


CHANGED: dict[str, Callable[[Net], object]] = {
    "lacks extra.weight": lambda m: m.add_module("extra", nn.Linear(1, 1, bias=False)),
    "has besides norm.weight, norm.bias, norm.running_mean": lambda m: m.__delattr__("norm"),
    "another form of fc.weight .* there, .* here": lambda m: setattr(m, "fc", nn.Linear(4, 5)),
    "norm.running_mean .*float32 there, .*float64 here": lambda m: m.norm.double(),
    "conv.weight .*float32 there, .*bfloat16 here": lambda m: m.bfloat16(),
    "lacks norm.extra": lambda m: m.norm.register_buffer("extra", torch.zeros(2)),
}


@pytest.mark.parametrize("words", CHANGED)
def test_another_model_is_refused_by_name(words: str) -> None:
    """What is missing, too much, or of another shape or type is named, and nothing has changed."""
    there = tensors_of("model", Net())
    other = Net()
    CHANGED[words](other)
    before = everything(other)
    with pytest.raises(CheckpointError, match=words):
        put_back("model", other, there)
    assert everything(other) == before


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    """A parameter under two names is kept under its first, and stays one parameter."""
    model, other = Tied(), Tied()
    there = tensors_of("model", model)
    assert list(there) == ["model/embed.weight"]
    put_back("model", other, through_a_file(there, tmp_path))
    assert other.out.weight is other.embed.weight
    assert everything(other) == everything(model)


def test_every_kind_of_buffer_comes_back(tmp_path: Path) -> None:
    """Buffers come back that the state_dict leaves out, that were None at first, that grew, that have two names."""
    model, other = Buffers(), Buffers()
    for _ in range(3):
        model(torch.randn(4, 2))
    put_back("model", other, through_a_file(tensors_of("model", model), tmp_path))
    assert everything(other) == everything(model)
    assert other.again is other.count
    inputs = torch.randn(4, 2)
    assert torch.equal(model(inputs), other(inputs))
    assert everything(other) == everything(model)


def test_scratch_that_is_not_there_is_no_difference() -> None:
    """A buffer that the state_dict leaves out may be missing, or be of another shape, on either side."""
    there = {name: tensor for name, tensor in tensors_of("model", Buffers()).items() if "grows" not in name}
    put_back("model", Buffers(), {**there, "model/scratch": torch.ones(7)})


def test_what_was_put_back_is_a_copy() -> None:
    """A buffer that takes the place of another does not share its memory with what it was read from."""
    model = Buffers()
    model(torch.randn(4, 2))
    there, other = tensors_of("model", model), Buffers()
    put_back("model", other, there)
    before = bits(other.grows), bits(other.later)
    for tensor in there.values():
        tensor.zero_()
    assert (bits(other.grows), bits(other.later)) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_models_of_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    """A model in half or double precision, or of complex numbers, comes back to the bit."""
    model, other = (nn.Linear(3, 2, dtype=dtype) for _ in range(2))
    put_back("model", other, through_a_file(tensors_of("model", model), tmp_path))
    assert everything(other) == everything(model)


def test_a_layout_stays(tmp_path: Path) -> None:
    """A model that is laid out channels-last is so after a resume, and so is what its optimizer keeps."""
    model, other = (Net().to(memory_format=torch.channels_last) for _ in range(2))
    first, second = (torch.optim.AdamW(with_names(m)) for m in (model, other))
    updates(model, first, 2)
    kept = strides(model, first)
    assert (18, 1, 6, 2) in kept.values()
    slots, tensors = slots_of(first)
    there = through_a_file({**tensors, **tensors_of("model", model)}, tmp_path)
    put_back("model", other, there)
    fill_slots(second, slots, there)
    assert strides(other, second) == kept
    for _ in range(3):
        updates(model, first, 1)
        updates(other, second, 1)
        assert everything(other) == everything(model)
    assert strides(other, second) == strides(model, first)


# --- copies ---


def test_copies_are_copies_in_the_same_memory() -> None:
    """What was copied does not change with its source; the next copies take the same memory, with the layout."""
    source = {"a": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "b": torch.tensor(3)}
    copies = Copies()
    first = copies.of(source)
    before = {name: bits(tensor) for name, tensor in first.items()}
    where = {name: tensor.data_ptr() for name, tensor in first.items()}
    assert first["a"].stride() == source["a"].stride()
    source["a"].add_(1)
    assert {name: bits(tensor) for name, tensor in first.items()} == before
    second = copies.of(source)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == where
    assert torch.equal(second["a"], source["a"])
    assert where.items().isdisjoint({name: tensor.data_ptr() for name, tensor in source.items()}.items())


def test_copies_follow_what_changes() -> None:
    """A tensor that has another shape or type by now, is new or is gone, is copied as it is."""
    copies = Copies()
    copies.of({"a": torch.zeros(2), "gone": torch.zeros(1)})
    now = {"a": torch.ones(3), "new": torch.ones(1, dtype=torch.int8)}
    again = copies.of(now)
    assert again.keys() == now.keys()
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in now.items())


def test_copies_of_parameters_need_no_gradient() -> None:
    """Copies take no part in what autograd follows."""
    layer = nn.Linear(2, 2)
    assert not any(copy.requires_grad for copy in Copies().of(dict(layer.named_parameters())).values())


# --- the optimizer ---

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adam": {"amsgrad": True},
    "adamw": {"foreach": False},
    "adamax": {}, "nadam": {}, "radam": {}, "adagrad": {"initial_accumulator_value": 0.1}, "adadelta": {},
    "asgd": {"t0": 2.0}, "rmsprop": {"momentum": 0.9, "centered": True}, "rprop": {}, "adafactor": {},
}  # fmt: skip


def with_names(model: nn.Module, **said: Any) -> Any:
    return [{"params": list(model.named_parameters()), **said}]


def updates(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 5, 5, generator=generator).to(device)).square().sum().backward()
        optimizer.step()


def strides(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, ...]]:
    found = {name: tensor.stride() for name, tensor in model.named_parameters()}
    kept = {f"optimizer/{n}": t.stride() for n, t in slots_of(optimizer)[1].items()}
    return found | kept


def pair(name: str, settings: dict[str, Any], make: Callable[[], nn.Module] = Net) -> tuple[nn.Module, Any]:
    """A model and the optimizer that lehr makes of a recipe."""
    recipe = Recipe(
        [Stage("1 epoch", train="all", lr=0.01)],
        optimizer={"name": name, **settings},
        weight_decay=0.0,
        batch_size=4,
    )
    model = make()
    return model, planned(resolve(recipe, inspect(model), samples=8), model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on(name: str, tmp_path: Path) -> None:
    """What any optimizer of torch keeps comes back by name: the next updates are the same to the bit, also of a
    model whose parts stand in another order.
    """
    model, first = pair(name, OPTIMIZERS[name])
    other, second = pair(name, OPTIMIZERS[name], Reordered)
    updates(model, first, 3)
    updates(other, second, 1, seed=9)  # what is there before is forgotten
    slots, tensors = slots_of(first)
    there = through_a_file({**Copies().of({**tensors, **tensors_of("model", model)})}, tmp_path)
    put_back("model", other, there)
    fill_slots(second, slots, there)
    assert slots_of(second)[0] == slots
    for seed in range(3):
        updates(model, first, 1, seed=seed)
        updates(other, second, 1, seed=seed)
        assert everything(other) == everything(model)
    for key, tensor in slots_of(first)[1].items():
        again = slots_of(second)[1][key]
        assert (bits(again), again.dtype, again.device) == (bits(tensor), tensor.dtype, tensor.device)


def test_every_optimizer_of_torch_is_tried() -> None:
    """The list above has every optimizer of torch that stages can use on these weights."""
    classes = {
        name.lower() for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    }  # fmt: skip
    # one for sparse gradients, one that evaluates the loss several times, one for matrices alone
    assert classes - set(OPTIMIZERS) - {"optimizer", "sparseadam", "lbfgs", "muon"} == set()


def test_only_what_was_trained_has_a_state() -> None:
    """A parameter that had no update yet has nothing kept, and none after a resume."""
    model = Net()
    model.conv.requires_grad_(False)
    first = torch.optim.Adam(with_names(model))
    updates(model, first, 1)
    slots, tensors = slots_of(first)
    assert not any(name.startswith("conv") for name in (*slots, *(t.split("/")[1] for t in tensors)))
    second = torch.optim.Adam(with_names(Net()))
    fill_slots(second, slots, tensors)
    assert slots_of(second)[0] == slots


def test_what_was_filled_in_is_a_copy() -> None:
    """An optimizer that goes on does not write into what it was filled from."""
    model = Net()
    first, second = torch.optim.Adam(with_names(model)), torch.optim.Adam(with_names(copy.deepcopy(model)))
    updates(model, first, 1)
    slots, tensors = slots_of(first)
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    fill_slots(second, slots, tensors)
    for group in second.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    second.step()
    assert {name: bits(tensor) for name, tensor in tensors.items()} == before


def test_a_stranger_is_refused_by_name() -> None:
    """State of a parameter that is not trained, and state that is missing, are named."""
    second = torch.optim.Adam(with_names(Net()))
    with pytest.raises(CheckpointError, match=r"is of old.weight, which it does not train"):
        fill_slots(second, {"old.weight": Slots(("step",))}, {"optimizer/old.weight/step": torch.ones(())})
    with pytest.raises(CheckpointError, match=r"lacks fc.bias/step"):
        fill_slots(second, {"fc.bias": Slots(("step",))}, {})


def test_a_state_that_is_no_tensor_is_refused() -> None:
    """An optimizer that keeps what is neither a tensor nor a plain value is refused with its name."""
    model = Net()
    optimizer = torch.optim.SGD(with_names(model), lr=0.1)
    optimizer.state[model.fc.bias]["history"] = [1, 2]
    with pytest.raises(CheckpointError, match=r"SGD keeps 'history' for 'fc.bias', a list"):
        slots_of(optimizer)


class OnMeta(nn.Module):
    """A model of which only shapes and a device are there: not the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, device="meta"))


@pytest.mark.parametrize(
    ("host", "said", "expected"),
    [
        (None, {}, {"step": "cpu", "exp_avg": "meta"}),  # from a CPU: counters stay in the host's memory
        (
            None,
            {"capturable": True},
            {"step": "meta", "exp_avg": "meta"},
        ),  # unless the optimizer wants them beside
        (("step",), {}, {"step": "cpu", "exp_avg": "meta"}),  # from a device: where they were
        ((), {}, {"step": "meta", "exp_avg": "meta"}),
        (("step", "exp_avg"), {"capturable": True}, {"step": "cpu", "exp_avg": "cpu"}),
    ],
)
def test_counters_come_back_to_where_they_were(host: Any, said: Any, expected: dict[str, str]) -> None:
    """What an optimizer keeps goes to the parameter's device, but for what it keeps in the host's memory."""
    optimizer = torch.optim.SGD(with_names(OnMeta(), **said), lr=0.1)
    tensors = {"optimizer/weight/step": torch.tensor(3.0), "optimizer/weight/exp_avg": torch.ones(2)}
    fill_slots(optimizer, {"weight": Slots(("step", "exp_avg"), {}, host)}, tensors)
    (kept,) = optimizer.state.values()
    assert {key: value.device.type for key, value in kept.items()} == expected


def test_what_lies_in_the_host_s_memory_is_told() -> None:
    """Of a parameter on a device it is kept which of its tensors lie in the host's memory; on the CPU, nothing."""
    model = OnMeta()
    optimizer = torch.optim.SGD(with_names(model), lr=0.1)
    optimizer.state[model.weight] = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.ones(2, device="meta"),
        "k": 3,
    }
    assert slots_of(optimizer)[0] == {"weight": Slots(("step", "exp_avg"), {"k": 3}, ("step",))}
    here = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(with_names(here), lr=0.1)
    optimizer.state[here.weight] = {"step": torch.tensor(3.0)}
    assert slots_of(optimizer)[0] == {"weight": Slots(("step",), {}, None)}


@CUDA
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("settings", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_an_optimizer_goes_on_on_a_gpu(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """On a GPU, each tensor comes back to the device where it was, and the next updates are the same."""
    cls = next(c for n, c in vars(torch.optim).items() if n.lower() == name)
    models = [Net().cuda() for _ in range(2)]
    try:
        first, second = (cls(with_names(m), lr=0.01, **OPTIMIZERS[name], **settings) for m in models)
        updates(models[0], first, 3)
    except (TypeError, RuntimeError, ValueError) as error:
        pytest.skip(f"{name} has no such setting: {error}")
    slots, tensors = slots_of(first)
    there = through_a_file(Copies().of({**tensors, **tensors_of("model", models[0])}), tmp_path)
    put_back("model", models[1], there)
    fill_slots(second, slots, there)
    before, after = (slots_of(optimizer)[1] for optimizer in (first, second))
    assert {k: t.device for k, t in after.items()} == {k: t.device for k, t in before.items()}
    for model, optimizer in zip(models, (first, second), strict=True):
        updates(model, optimizer, 2, seed=4)
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, other)
