"""What frozen means, held to the bit: real steps, copies, wrappers, and states that somebody meddled with."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lehr.errors import RunError, SelectionError
from lehr.run import freezing
from lehr.run.facts import by_hand, inspect, named
from lehr.run.freezing import freeze, set_trainable, thaw
from lehr.selection import select

Batch = tuple[Any, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """One thread and a fixed seed: small steps are faster so, and every run is the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Small(nn.Module):
    """Every kind of module that can drift when it is only half frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout2d(0.5),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.BatchNorm2d(8, affine=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.body(x)))


class Bert(nn.Module):
    """A tiny transformers encoder behind the signature that the other models have."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=4,
            attn_implementation="eager",
        )
        self.net = transformers.BertForSequenceClassification(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.net(input_ids=ids).logits


def _images(size: int = 32) -> Batch:
    return torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3])


def _tokens() -> Batch:
    return torch.randint(0, 50, (4, 6)), torch.tensor([0, 1, 2, 3])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "small": (Small, _images),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=4), _images),
    "torchvision efficientnet_b0": (
        lambda: torchvision.models.efficientnet_b0(num_classes=4, stochastic_depth_prob=0.5),
        _images,
    ),
    "timm convnext_atto": (
        lambda: timm.create_model("convnext_atto", num_classes=4, drop_path_rate=0.5, drop_rate=0.2),
        _images,
    ),
    "timm vit_tiny": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            depth=3,
            num_classes=4,
            drop_path_rate=0.5,
            proj_drop_rate=0.2,
        ),
        _images,
    ),
    "transformers bert": (Bert, _tokens),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def _bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in tensors.items()}


def _backbone(model: nn.Module, head: frozenset[str]) -> dict[str, bytes]:
    """The bits of everything outside the head: parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return _bits({name: t for name, t in tensors.items() if name not in head})


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    model.train()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_frozen_is_bit_for_bit(model_name: str, optimizer_name: str) -> None:
    """While the head trains no bit of the backbone changes, also after a thaw and with old gradients."""
    make, data = MODELS[model_name]
    model, batch = make(), data()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    everything = frozenset(named(model))
    head = frozenset(select("head", inspect(model)).names)
    assert head
    assert head < everything
    for _ in range(2):
        set_trainable(model, everything)
        before = _backbone(model, head)
        _step(model, optimizer, batch)  # fills momentum, moves batch statistics, and leaves gradients behind
        assert all(before[name] != now for name, now in _backbone(model, head).items() if _must_move(name))
        set_trainable(model, head)
        before, of_head = _backbone(model, head), _bits({n: p for n, p in named(model).items() if n in head})
        for _ in range(2):
            _step(model, optimizer, batch)
        assert _backbone(model, head) == before
        assert all(p.grad is None for name, p in named(model).items() if name not in head)
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(of_head[name] != now for name, now in _bits({n: named(model)[n] for n in head}).items())


def _must_move(name: str) -> bool:
    """Batch statistics move in every step of training; that shows that the frozen ones could have."""
    return name.endswith(("running_mean", "running_var"))


def test_frozen_output_is_deterministic_in_train_mode() -> None:
    """Dropout and stochastic depth of a frozen model are off although train() was called."""
    make, data = MODELS["timm vit_tiny"]
    model, (x, _) = make(), data()
    freeze(model)
    model.train()
    assert torch.equal(model(x), model(x))
    thaw(model)
    assert not torch.equal(model(x), model(x))


def test_modes_follow_the_trained_parameters() -> None:
    """Wholly frozen modules are in eval mode, parameterless ones follow their ancestor."""
    model = Small()
    freeze(model, "body")
    for _ in range(3):
        model.train()
        assert not any(module.training for module in model.body.modules())
        assert model.training
        assert model.drop.training
        assert model.fc.training
    freeze(model, "fc.weight")
    assert model.train().fc.training  # its bias trains still
    model.eval()
    assert not any(module.training for module in model.modules())
    model.body[1].train()  # asked of one norm alone
    assert not model.body[1].training


def test_a_norm_is_thawed_alone() -> None:
    """Thawing the norms puts them and the containers above in train mode, not their neighbours."""
    model = Small()
    freeze(model)
    assert thaw(model, "norm") == tuple(f"body.{i}.{name}" for i in (1, 5, 6) for name in ("weight", "bias"))
    assert model.body[1].training
    assert model.body[3].training  # a dropout directly under a container that trains
    assert not model.body[0].training
    assert not model.fc.training
    assert not model.body[0].weight.requires_grad


def test_what_is_returned_and_what_stays() -> None:
    """freeze and thaw return the names that were meant and leave all others as they are."""
    model = Small()
    model.fc.bias.requires_grad_(False)
    assert freeze(model, "body.0") == ("body.0.weight", "body.0.bias")
    assert not model.fc.bias.requires_grad
    assert model.fc.weight.requires_grad
    assert thaw(model, "head") == ("fc.weight", "fc.bias")
    assert model.fc.bias.requires_grad
    assert freeze(model) == thaw(model) == tuple(named(model))
    assert all(p.requires_grad for p in model.parameters())
    assert freeze(model, "backbone", head="body.4") == tuple(
        n for n in named(model) if not n.startswith("body.4.")
    )


def test_all_means_all_even_when_everything_was_frozen_by_hand() -> None:
    """freeze and thaw of "all" work on a model whose every parameter was frozen by hand."""
    model = Small().requires_grad_(False)
    assert freeze(model) == tuple(named(model))
    assert not model.train().training
    assert thaw(model) == tuple(named(model))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_unknown_names_change_nothing() -> None:
    """A name that is no parameter is refused with the nearest one, before anything is changed."""
    model = Small()
    told = r"'fc.wieght' is no parameter of Small; did you mean \"fc.weight\""
    with pytest.raises(SelectionError, match=told) as caught:
        set_trainable(model, frozenset({"fc.wieght", "fc.bias"}))
    assert "lehr.inspect" in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(SelectionError, match="bodi"):
        freeze(model, "bodi")


def test_thaw_gives_the_mode_that_was_last_asked_for() -> None:
    """A thawed module is in the mode that the model was last told, even if all of it was frozen then."""
    model = Small()
    freeze(model)
    model.eval()
    thaw(model, "fc")
    assert not model.fc.training
    freeze(model)
    model.train()
    thaw(model, "fc")
    assert model.fc.training
    assert model.training


class _NormsInEval(Small):
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def test_train_of_the_class_keeps_its_say() -> None:
    """A class that overrides train() to hold its norms in eval mode holds them so after a thaw."""
    model = _NormsInEval().train()
    freeze(model)
    thaw(model)
    assert not model.body[1].training
    assert model.body[3].training


def test_a_mode_set_by_hand_outlives_thaws_elsewhere() -> None:
    """A module put in eval mode by the caller, and never frozen, is left so when another is thawed."""
    model = Small()
    freeze(model, "fc")
    model.body[1].eval()
    thaw(model, "fc")
    assert model.fc.training
    assert not model.body[1].training
    assert model.body[0].training


def test_a_train_attribute_of_the_caller_comes_back() -> None:
    """A `train` that the caller had set on a module is back after freeze and thaw."""
    model = Small()
    own = lambda mode=True: model.fc  # noqa: E731, ARG005
    model.fc.train = own
    freeze(model)
    assert model.fc.train is not own
    thaw(model)
    assert model.fc.train is own


# --- no history ---


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.inner = nn.Sequential(
            nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.5)), nn.BatchNorm1d(4, affine=False)
        )
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(self.block(self.embed(ids))))


TIED_NAMES = tuple(named(Tied()))
SUBSETS = st.frozensets(st.sampled_from(TIED_NAMES))
ACTIONS = st.one_of(
    st.tuples(st.just("set"), SUBSETS),
    st.tuples(st.just("mode"), st.booleans()),
    st.tuples(st.just("requires_grad"), st.sampled_from(TIED_NAMES)),
    st.tuples(st.just("grad"), st.sampled_from(TIED_NAMES)),
    st.tuples(st.just("training"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.none()),
    st.tuples(st.just("replace"), st.none()),
    st.tuples(st.just("copy"), st.none()),
)


def _state(model: nn.Module, names: frozenset[str]) -> dict[str, object]:
    """All that freezing decides: what trains, which gradients are gone, every mode now and after train()."""
    flags: dict[str, object] = {name: p.requires_grad for name, p in named(model).items()}
    flags["gradients of the frozen"] = [
        n for n, p in named(model).items() if n not in names and p.grad is not None
    ]
    for mode in (None, True, False):
        if mode is not None:
            model.train(mode)
        flags |= {f"{path} {mode}": module.training for path, module in model.named_modules()}
    return flags


def _act(model: nn.Module, action: str, value: Any) -> nn.Module:
    if action == "set":
        set_trainable(model, value)
    elif action == "mode":
        model.train(value)
    elif action == "requires_grad":
        named(model)[value].requires_grad_(not named(model)[value].requires_grad)
    elif action == "grad":
        named(model)[value].grad = torch.ones_like(named(model)[value])
    elif action == "training":
        frozen = [m for m in model.modules() if not m.training]
        if frozen and model.training:
            frozen[value % len(frozen)].training = True
    elif action == "step" and any(p.requires_grad for p in model.parameters()):
        out = model(torch.tensor([0, 1, 2]))
        if out.requires_grad:
            out.sum().backward()
    elif action == "replace":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        model.out.weight = model.embed.weight  # assigning unties
    elif action == "copy":
        return copy.deepcopy(model)
    return model


@settings(max_examples=100, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=8), last=SUBSETS)
def test_no_history(actions: list[tuple[str, Any]], last: frozenset[str]) -> None:
    """set_trainable leaves the state it leaves on a fresh model, whatever was done before, once or twice."""
    model: nn.Module = Tied()
    asked = True
    for action, value in actions:
        model = _act(model, action, value)
        asked = value if action == "mode" else asked
    set_trainable(model, last)
    fresh = Tied().train(asked)
    set_trainable(fresh, last)
    expected = _state(fresh, last)
    fresh.train(asked)
    assert _state(model, last) == expected
    model.train(asked)
    set_trainable(model, last)
    assert _state(model, last) == expected


HAND_ACTIONS = st.one_of(
    *(st.tuples(st.just(kind), st.sampled_from(TIED_NAMES)) for kind in ("freeze", "thaw", "requires_grad")),
    st.tuples(st.just("set"), SUBSETS),
    st.tuples(st.just("copy"), st.none()),
)


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(HAND_ACTIONS, max_size=6), plans=st.lists(SUBSETS, min_size=1, max_size=3))
def test_a_plan_changes_nothing_that_is_read_off(actions: list[tuple[str, Any]], plans: list[Any]) -> None:
    """`inspect` says the same before and after set_trainable, whoever froze what before."""
    model: nn.Module = Tied()
    for action, value in actions:
        if action in ("freeze", "thaw"):
            {"freeze": freeze, "thaw": thaw}[action](model, value)
            assert (value in by_hand(model)) == (action == "freeze")
        else:
            model = _act(model, action, value)
    facts = inspect(model)
    for names in plans:
        set_trainable(model, names)
        assert inspect(model) == facts


def test_tied_weights_freeze_together() -> None:
    """A tied weight has one name; frozen under it, it is frozen in both places."""
    model = Tied()
    freeze(model, "out")
    assert not model.embed.weight.requires_grad
    assert not model.train().embed.training
    with pytest.raises(SelectionError, match="first name only"):
        set_trainable(model, frozenset({"out.weight"}))


def test_a_settled_model_is_only_looked_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call with the same names does no work, whatever harmless was called in between."""
    model = Small()
    names = frozenset({"fc.weight"})
    set_trainable(model, names)
    monkeypatch.setattr(freezing, "_settle", lambda *_: pytest.fail("settled again"))
    model.train()
    model.eval()
    model(_images()[0]).sum().backward()
    set_trainable(model, names)
    set_trainable(model, frozenset(list(names)))


MEDDLES: dict[str, Callable[[Small], object]] = {
    "a gradient on the frozen": lambda m: setattr(
        m.body[0].weight, "grad", torch.ones_like(m.body[0].weight)
    ),
    "requires_grad of the frozen": lambda m: m.body[0].weight.requires_grad_(True),
    "requires_grad of the trained": lambda m: m.fc.weight.requires_grad_(False),
    "mode of a frozen norm": lambda m: setattr(m.body[1], "training", True),
    "mode of the model alone": lambda m: setattr(m, "training", True),
    "mode of all": lambda m: [setattr(module, "training", True) for module in m.modules()],
}


@pytest.mark.parametrize("names", [frozenset({"fc.weight"}), frozenset()], ids=["head", "nothing"])
@pytest.mark.parametrize("meddle", MEDDLES)
def test_a_meddled_model_is_mended_by_the_same_call(meddle: str, names: frozenset[str]) -> None:
    """What was changed by hand between two calls with the same names is put right by the second."""
    model = Small()
    set_trainable(model, names)
    expected = _state(model, names)
    model.train()
    MEDDLES[meddle](model)
    set_trainable(model, names)
    flags = {path: module.training for path, module in model.named_modules()}
    assert not any(mode for path, mode in flags.items() if path.startswith("body") or not names)
    model.train(expected[" None"])
    assert _state(model, names) == expected


class _Merging(nn.Linear):
    """A layer that acts when its mode changes, as adapters do that merge their weights for evaluation."""

    merged = False

    def train(self, mode: bool = True) -> nn.Module:
        self.merged = not mode
        return super().train(mode)


def test_the_class_is_told_of_eval_mode() -> None:
    """Freezing goes through the module's own train(), so that a layer that acts on its mode does."""
    model = nn.Sequential(_Merging(2, 2), nn.Linear(2, 2))
    freeze(model, "0")
    model.train()
    assert model[0].merged
    thaw(model)
    assert not model[0].merged


def _grow(model: nn.Module) -> None:
    model.body[2].extra = nn.Linear(1, 1)


def _swap_head(model: nn.Module) -> None:
    model.fc = nn.Linear(8, 4)


def _assign(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    model.body[0].weight.requires_grad_(True)


def _replace_last(model: nn.Module) -> None:
    model.fc.bias = nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize("meddle", [_grow, _swap_head, _assign, _replace_last], ids=lambda f: f.__name__)
def test_replaced_parts_are_seen(meddle: Callable[[nn.Module], None]) -> None:
    """A parameter or module that was replaced or added since the last call is frozen by the next one."""
    model = Small()
    set_trainable(model, frozenset({"fc.weight"}))
    meddle(model)
    set_trainable(model, frozenset({"fc.weight"}))
    assert [name for name, p in named(model).items() if p.requires_grad] == ["fc.weight"]
    assert not any(module.training for module in model.train().body.modules())


@pytest.mark.parametrize("convert", ["half", "double", "to_empty"])
def test_conversion_keeps_what_is_frozen(convert: str) -> None:
    """Another dtype or device leaves frozen what was frozen."""
    model = Small()
    freeze(model, "backbone")
    if convert == "to_empty":
        model.to_empty(device="meta")
    else:
        getattr(model, convert)()
    assert [n for n, p in named(model).items() if p.requires_grad] == ["fc.weight", "fc.bias"]
    assert not model.train().body.training


# --- what must go on working ---


def _frozen_body() -> Small:
    model = Small()
    freeze(model, "body")
    return model.train()


def _assert_own_pins(model: nn.Module, original: nn.Module) -> None:
    """`model` is frozen as `original` is, and neither reaches into the other."""
    assert not any(module.training for module in model.body.modules())
    model.eval()
    assert original.training
    assert model.train() is model
    assert model.body.train() is model.body
    assert not model.body[1].training
    thaw(model)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in original.body.modules())
    assert not original.body[0].weight.requires_grad


def test_deepcopy() -> None:
    """A deep copy is frozen like its original and stands on its own."""
    model = _frozen_body()
    _assert_own_pins(copy.deepcopy(model), model)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol: int) -> None:
    """A pickled model comes back frozen, by every protocol that modules support."""
    model = _frozen_body()
    _assert_own_pins(pickle.loads(pickle.dumps(model, protocol)), model)


def test_torch_save() -> None:
    """A model saved whole by torch.save comes back frozen."""
    model, buffer = _frozen_body(), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    _assert_own_pins(torch.load(buffer, weights_only=False), model)


def test_a_frozen_root_survives_copies() -> None:
    """A model that is frozen as a whole stays so in copies, and its copies thaw alone."""
    model = Small()
    freeze(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.train() is other
        assert not other.training
        thaw(other)
        assert other.train().training
        assert not model.train().training


def test_shallow_copy() -> None:
    """A shallow copy stays frozen, is mended by the next call, and says so when only it is left."""
    model = Small()
    freeze(model)
    other = copy.copy(model)
    other.train()
    assert not other.training
    set_trainable(other, frozenset())
    assert other.train() is other
    orphan = copy.copy(model.body)
    inner = orphan.train
    del model, other
    gc.collect()
    with pytest.raises(RunError, match="deepcopy"):
        inner()


def test_state_dict() -> None:
    """Freezing adds nothing to the state_dict, and a round trip leaves frozen what was frozen."""
    plain, model = Small(), _frozen_body()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.load_state_dict(plain.state_dict()).missing_keys == []
    assert _bits(dict(model.state_dict())) == _bits(dict(plain.state_dict()))
    assert not model.body[0].weight.requires_grad
    assert not model.train().body.training


def test_a_plan_leaves_nothing_but_its_notes_behind() -> None:
    """What set_trainable froze of a copy, a pickle or a part is known there to be a plan's; once all of it
    trains again nothing but the record of the model is left."""
    model = Small()
    before = {path: set(vars(m)) for path, m in model.named_modules()}
    set_trainable(model, frozenset({"fc.weight"}))
    for other in (model, copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert by_hand(other) == frozenset()
        assert by_hand(nn.Sequential(other.body, nn.Linear(8, 2))) == frozenset()
    set_trainable(model, frozenset(named(model)))
    assert {p: set(vars(m)) - {"_lehr_frozen"} for p, m in model.named_modules()} == before


def test_classes_stay() -> None:
    """No module changes its class, and nothing is left behind by a thaw but what thaw itself remembers."""
    model = Small()
    before = {path: (type(m), set(vars(m))) for path, m in model.named_modules()}
    freeze(model)
    assert {path: type(m) for path, m in model.named_modules()} == {
        path: kind for path, (kind, _) in before.items()
    }
    thaw(model)
    assert {p: (type(m), set(vars(m)) - {"_lehr_frozen"}) for p, m in model.named_modules()} == before


def test_a_frozen_model_is_freed_at_once() -> None:
    """Dropping the last reference frees a frozen model without waiting for the garbage collector."""
    gc.disable()
    try:
        for what in ("all", "body"):
            model = Small()
            freeze(model, what)
            gone = weakref.ref(model.body)
            del model
            assert gone() is None
    finally:
        gc.enable()


def test_apply_and_hooks() -> None:
    """module.apply reaches frozen modules, and forward hooks go on firing."""
    model, seen = _frozen_body(), []
    model.apply(lambda module: seen.append(type(module)))
    assert nn.BatchNorm2d in seen
    fired = []
    model.body[0].register_forward_hook(lambda *_: fired.append(1))
    model(_images()[0])
    assert fired == [1]


def test_compile_follows_freezing_without_storm() -> None:
    """In a compiled model frozen statistics stay, train() does not recompile, and a thaw is followed."""
    graphs: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    torch.compiler.reset()
    model = Small()
    compiled = torch.compile(model, backend=backend)
    head = frozenset(select("head", inspect(compiled)).names)
    assert head == {"fc.weight", "fc.bias"}
    set_trainable(compiled, head)
    x, target = _images()
    before = _backbone(model, head)
    optimizer = OPTIMIZERS["adamw"](compiled.parameters())
    for _ in range(4):
        set_trainable(compiled, head)
        _step(compiled, optimizer, (x, target))
    assert len(graphs) == 1
    assert _backbone(model, head) == before
    compiled.eval()
    assert torch.equal(compiled(x), model(x))
    thaw(compiled)
    _step(compiled, optimizer, (x, target))
    assert _backbone(model, head)["body.1.running_mean"] != before["body.1.running_mean"]
    torch.compiler.reset()


def test_compiled_part_of_a_model() -> None:
    """A compiled submodule has the names of the plain one and is frozen like it."""
    model = Small()
    names = tuple(named(model))
    model.body = torch.compile(model.body, backend="eager")
    assert tuple(named(model)) == names
    assert inspect(model).head == ("fc",)
    set_trainable(model, frozenset({"fc.weight"}))
    model.train()
    assert not any(module.training for module in model.body.modules())
    thaw(model)
    assert all(module.training for module in model.modules())


def test_symbolic_trace() -> None:
    """A traced copy shares the frozen modules and keeps them frozen."""
    model = _frozen_body()
    traced = torch.fx.symbolic_trace(model)
    before = _bits(dict(model.body.state_dict()))
    traced.train()
    traced(_images()[0])
    assert _bits(dict(model.body.state_dict())) == before


def test_script() -> None:
    """TorchScript compiles a model with frozen parts, and takes over nothing of lehr's."""
    model = Small()
    set_trainable(model, frozenset({"fc.weight"}))
    model.eval()
    x = _images()[0]
    with pytest.warns((DeprecationWarning, FutureWarning)):
        scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))
    assert "_lehr_" not in scripted._c.dump_to_str(True, True, True)  # what lehr keeps in a module begins so


def test_parametrized_modules() -> None:
    """A parametrized module, which has a class of its own, is frozen with its buffers, copied and thawed."""
    model = Small()
    nn.utils.parametrizations.spectral_norm(model.body[0])
    nn.utils.parametrizations.weight_norm(model.body[4])
    freeze(model, "backbone")
    model.train()
    before = _bits(dict(model.body.state_dict()))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for _ in range(2):
        _step(model, optimizer, _images())
    assert _bits(dict(model.body.state_dict())) == before
    other = copy.deepcopy(model)
    thaw(other)
    other.train()(_images()[0])
    assert _bits(dict(other.body.state_dict())) != before
    assert _bits(dict(model.body.state_dict())) == before


def test_distributed() -> None:
    """Inside DistributedDataParallel names are the model's own, frozen stays frozen, and the head trains."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Small()
        freeze(model, "backbone")
        wrapped = nn.parallel.DistributedDataParallel(model)
        head = frozenset({"fc.weight", "fc.bias"})
        assert frozenset(select("head", inspect(wrapped)).names) == head
        before, old = _backbone(model, head), model.fc.weight.detach().clone()
        optimizer = OPTIMIZERS["adamw"](wrapped.parameters())
        for _ in range(2):
            set_trainable(wrapped, head)
            _step(wrapped, optimizer, _images())
        assert _backbone(model, head) == before
        assert not torch.equal(model.fc.weight, old)
        del wrapped
    finally:
        dist.destroy_process_group()
