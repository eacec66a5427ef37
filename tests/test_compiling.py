"""Compiling: once a stage, for batches of any size, in place, and refused early where it cannot be done."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from counting import Counting, forgotten
from lehr.errors import RequestError
from lehr.run import compiling
from lehr.run.compiling import cannot_compile, compile_in_place, without_gradients
from lehr.run.freezing import set_trainable
from lehr.run.precision import arithmetic

ON = arithmetic("cpu")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with forgotten():
        yield


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def stages(model: nn.Module) -> list[frozenset[str]]:
    """Head, last block, all."""
    names = [name for name, _ in model.named_parameters()]
    return [frozenset(n for n in names if n[0] in part) for part in ("5", "35", "0135")]


def epochs(model: nn.Module, trained: frozenset[str]) -> list[torch.Tensor]:
    """Two epochs of a stage with a short last batch, validated after each; what came out."""
    found = []
    for epoch in range(2):
        model.train()
        for number, size in enumerate((8, 8, 5)):
            set_trainable(model, trained)
            torch.manual_seed(10 * epoch + number)
            out = model(torch.randn(size, 6))
            out.square().sum().backward()
            found.append(out.detach())
        model.eval()
        with torch.no_grad():
            found += [model(torch.ones(size, 6)) for size in (8, 3)]
    return found


def test_a_stage_compiles_once_and_validation_once_in_all() -> None:
    """From head to last block to all, with short batches and validation, there are as many graphs as stages, and one."""
    model, counting = net(), Counting()
    compile_in_place(model, ON, stages=3, backend=counting)
    for number, trained in enumerate(stages(model), start=1):
        epochs(model, trained)
        assert counting.graphs == number + 1
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_many_stages_are_all_compiled() -> None:
    """Where more sets of parameters train than torch has graphs for by itself, it goes on compiling."""
    model, counting = net(), Counting()
    names = [name for name, _ in model.named_parameters()]
    sets = [frozenset(names[start : start + length]) for length in (1, 2, 3) for start in range(5)]
    compile_in_place(model, ON, stages=len(sets), backend=counting)
    model.train()
    for trained in sets:
        set_trainable(model, trained)
        model(torch.randn(4, 6)).sum().backward()
    assert counting.graphs == len(sets)


def test_what_comes_out_is_the_same() -> None:
    """Compiled by a backend that changes nothing, training and validation give the same bits, and so do all gradients."""
    plain, compiled = net(), net()
    compile_in_place(compiled, ON, stages=3, backend="eager")
    for trained in stages(plain):
        for one, other in zip(epochs(plain, trained), epochs(compiled, trained), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or other.grad is None or torch.equal(one.grad, other.grad)


def test_the_model_stays_what_it_is() -> None:
    """Class and keys are the same, and a copy can be made, which is not compiled."""
    model = net()
    keys = list(model.state_dict())
    compile_in_place(model, ON, backend="eager")
    model(torch.zeros(2, 6))
    assert type(model) is nn.Sequential
    assert list(model.state_dict()) == keys
    assert copy.deepcopy(model)._compiled_call_impl is None


def test_a_compiled_model_is_refused() -> None:
    """Twice is an error that says what to do."""
    model = net()
    compile_in_place(model, ON, backend="eager")
    wrapper = nn.DataParallel(net())
    wrapper.compile(backend="eager")
    for twice in (model, nn.DataParallel(model), wrapper, torch.compile(net(), backend="eager")):
        with pytest.raises(RequestError, match="is compiled already; leave compile out"):
            compile_in_place(twice, ON, backend="eager")


def test_without_a_compiler_it_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing C++ compiler or Python header is a sentence before anything is changed."""
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = net()
    with pytest.raises(
        RequestError, match=r"needs a C\+\+ compiler, and there is none \(CXX=no-such-compiler\)"
    ):
        compile_in_place(model, ON)
    assert model._compiled_call_impl is None
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "/nowhere/Python.h is not there" in cannot_compile(ON)


def test_gradients_are_wanted_again_where_validation_fails() -> None:
    """After an error within, the same parameters want gradients."""
    model = net()
    set_trainable(model, stages(model)[0])

    def fails() -> None:
        with without_gradients(model):
            assert not any(p.requires_grad for p in model.parameters())
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == stages(model)[0]
