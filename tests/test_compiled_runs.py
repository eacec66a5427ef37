"""`fit(compile=...)`: a graph a stage and one to validate, the same bits, the same model afterwards; refused early."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.data import DataLoader

import adversaries
import lehr
import short_runs
import small_run
from counting import Counting, forgotten
from lehr.errors import RequestError, RunError
from lehr.events import Event, Note, StageEnded
from lehr.run import layout
from lehr.run.compiling import cannot_compile
from lehr.run.precision import arithmetic
from lehr.run.update import cross_entropy
from small_run import came_to, data, fit, net

MISSING = cannot_compile(arithmetic("cpu"))


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with forgotten():
        yield


def thawing(*trained: Any, **said: Any) -> lehr.Recipe:
    """A stage of two epochs for each, of batches of 8, 8 and 4."""
    stages = [lehr.Stage("2 epochs", train=train, lr=0.02) for train in trained]
    return lehr.Recipe(stages, **{"batch_size": 8, "ema": 0.9, "seed": 3, "cache": "off", **said})


def _as_traced(graph: fx.GraphModule, _: Any) -> Any:
    return make_boxed_func(graph.forward)


HEAD, SOME, ALL = "head", ["head", "body.1"], "all"


def graphs_by_stage(*trained: Any, made: Callable[[int | None], Any] | None = None, **said: Any) -> list[int]:
    """How many graphs there were when each stage had ended; 35 samples validate, in batches of 32 and 3."""
    counting, found = Counting(), []

    def look(event: Event) -> None:
        if isinstance(event, StageEnded):
            found.append(counting.graphs)

    fit(
        None, recipe=thawing(*trained, **said), valid=data(35, seed=5), compile=counting, observers=[look], loss=made
    )  # fmt: skip
    return found


def is_as_it_came(model: nn.Module) -> bool:
    return "_compiled_call_impl" not in model.__dict__ and list(model.state_dict()) == list(
        net().state_dict()
    )


# --- how often ---


@pytest.mark.parametrize(
    "more", [{}, {"ema": None}, {"accumulate": 2}], ids=["average", "plain", "accumulate"]
)
def test_a_graph_a_stage_and_one_to_validate(more: dict[str, Any]) -> None:
    """With short last batches and validation a stage that thaws compiles once, and one that freezes again not at all."""
    assert graphs_by_stage(HEAD, SOME, ALL, HEAD, **more) == [2, 3, 4, 4]


def test_a_last_batch_of_one_sample() -> None:
    """Where a person's own loader ends with a single sample, a stage has one graph more: torch compiles for that alone."""

    def graphs(epochs: int) -> int:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        stages = [lehr.Stage(f"{epochs} epochs", train=train, lr=0.02) for train in (HEAD, ALL)]
        counting, loader = Counting(), DataLoader(data(17), batch_size=8)
        fit(
            None, model=model, train=loader, recipe=lehr.Recipe(stages, batch_size=8, cache="off"), compile=counting
        )  # fmt: skip
        return counting.graphs

    assert graphs(1) == graphs(3) == 2 * 2 + 1


def test_inputs_that_the_loss_function_makes() -> None:
    """Batches that a loss function has changed have any size, too."""

    def made(_: int | None) -> Any:
        usual = cross_entropy()
        return lambda model, batch: usual(model, (batch[0] * 1.5, batch[1]))

    assert graphs_by_stage(HEAD, ALL, made=made) == [2, 3]


def test_many_runs_of_one_process() -> None:
    """torch's limit of graphs for a class is never met, however many models of it are trained."""
    for hidden in range(4, 14):
        counting = Counting()
        fit(None, model=small_run.Net(hidden), recipe=thawing(HEAD, ALL), compile=counting)
        assert counting.graphs == 3


def test_a_run_that_goes_on_compiles_once_a_stage(tmp_path: Path) -> None:
    """Stopped within its second stage, a run goes on with a graph for each stage that is left, to the same bits."""
    said = {"recipe": thawing(HEAD, SOME, ALL)}
    whole = came_to(fit(tmp_path / "whole", compile=Counting(), **said))
    assert fit(tmp_path / "run", stop=9, compile=Counting(), **said) is None
    torch._dynamo.reset()
    counting, told = Counting(), []
    again = fit(tmp_path / "run", resume=True, compile=counting, observers=[told.append], **said)
    assert came_to(again) == whole
    assert counting.graphs == 3
    assert not [e for e in told if isinstance(e, Note) and "close" in e.text]


@pytest.mark.parametrize(("first", "then"), [("eager", False), (False, "eager")])
def test_another_way_than_before_is_told(first: Any, then: Any, tmp_path: Path) -> None:
    """A compiled run goes on as it is written, and the other way round, and says that the result will be close; by a backend
    that changes nothing it is the same.
    """
    fit(tmp_path / "run", stop=9, compile=first)
    told: list[Event] = []
    again = fit(tmp_path / "run", resume=True, compile=then, observers=[told.append])
    assert f"compile {then or 'off'}, was {first or 'off'}" in "".join(
        e.text for e in told if isinstance(e, Note)
    )
    assert came_to(again) == came_to(fit(tmp_path / "whole"))


# --- what comes out ---


def test_the_same_bits_and_the_same_model(tmp_path: Path) -> None:
    """By a backend that changes nothing a run ends with the bits of one that is not compiled, and says that it was; the
    model is the one that it was, with its keys, and can be pickled.
    """
    model = net()
    usual, ours = fit(tmp_path / "usual"), fit(tmp_path / "ours", model=model, compile="eager")
    assert came_to(ours) == came_to(usual)
    assert ours is not None
    assert ours.model is model
    assert is_as_it_came(model)
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()
    notes = [
        [e.text for e in small_run.events(tmp_path / run) if isinstance(e, Note)] for run in ("usual", "ours")
    ]
    assert [[text for text in texts if "compiled by eager" in text] != [] for texts in notes] == [False, True]


def test_traced_for_gradients_too() -> None:
    """Forward and backward traced and run as they are, the losses are the same but for rounding, with as many graphs of each."""
    graphs = {"forward": 0, "backward": 0}

    def counted(which: str) -> Callable[..., Any]:
        def compiler(graph: fx.GraphModule, example: Any) -> Any:
            graphs[which] += 1
            return _as_traced(graph, example)

        return compiler

    backend = aot_autograd(fw_compiler=counted("forward"), bw_compiler=counted("backward"))
    recipe = thawing(HEAD, ALL, optimizer="sgd")
    ours, usual = fit(None, recipe=recipe, compile=backend), fit(None, recipe=recipe)
    assert ours is not None
    assert usual is not None
    for one, other in zip(ours.history, usual.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    assert graphs == {"forward": 3, "backward": 2}


@pytest.mark.parametrize("how", ["error", "interrupted"])
def test_a_run_that_ends_early(how: str, tmp_path: Path) -> None:
    """The model is run as it is written again, also after an error or Ctrl-C."""
    model, calls = net(), 0

    def fails(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            if how == "error":
                raise ValueError("no")
            signal.raise_signal(signal.SIGINT)
        assert model._compiled_call_impl is not None
        return cross_entropy()(model, batch)

    with pytest.raises((ValueError, KeyboardInterrupt)):
        lehr.fit(
            model, data(), recipe=thawing(HEAD, ALL), loss=fails, compile="eager", device="cpu", out=tmp_path
        )
    assert calls == 5
    assert is_as_it_came(model)


def unable(_: fx.GraphModule, __: Any) -> Any:
    raise ValueError("no such operation")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_the_backend_cannot_do_is_said(where: str, tmp_path: Path) -> None:
    """A backend that fails, for the backward pass too, ends the run in words before that step is made; from there it goes on
    without.
    """
    backend = unable if where == "forward" else aot_autograd(fw_compiler=_as_traced, bw_compiler=unable)
    model = net()
    with pytest.raises(
        RunError,
        match=r"could not be compiled by .* \(.*no such operation.*\); go without \(compile=False, --no",
    ):
        fit(tmp_path / "run", model=model, compile=backend)
    assert is_as_it_came(model)
    assert all(torch.equal(t, net().state_dict()[name]) for name, t in model.state_dict().items())
    assert came_to(fit(tmp_path / "run", resume=True)) == came_to(fit(tmp_path / "usual"))


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_inductor() -> None:
    """Code that torch's own backend makes trains to the same losses but for rounding, through a thaw."""

    def losses(**said: Any) -> list[float]:
        model = net()
        model.body[3].p = 0.0  # compiled dropout draws other numbers
        # Adam would make steps of what rounding leaves of the gradient of a bias before a batch-norm.
        result = fit(None, model=model, recipe=thawing(HEAD, ALL, optimizer="sgd"), **said)
        assert result is not None
        assert is_as_it_came(model)
        return [row[key] for row in result.history for key in ("train_loss", "valid_loss")]

    assert losses(compile=True) == pytest.approx(losses(), rel=1e-4)


# --- beside what else is done ---


@pytest.mark.parametrize("ema", [None, 0.9])
def test_cached_stages_are_not_compiled(ema: float | None) -> None:
    """What goes by a cache is found, proved and trained without a graph; a stage after it compiles once."""
    stages = [
        lehr.Stage("3 epochs", train="head", lr=0.02, cache="require"),
        lehr.Stage("2 epochs", train="all", lr=0.02),
    ]
    recipe = lehr.Recipe(stages, batch_size=8, seed=3, ema=ema, cache_exact=True)
    counting, found = Counting(), []

    def look(event: Event) -> None:
        if isinstance(event, StageEnded):
            found.append(counting.graphs)

    ours = short_runs.ran(recipe, compile=counting, observed=look)
    assert set(ours.cached) == {"train", "valid"}
    assert found == [0, 2]
    assert short_runs.same(ours, short_runs.ran(recipe))


@pytest.mark.parametrize("is_compiled", [True, False])
def test_no_layout_is_tried(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layout is another graph: where a stage is compiled none but the rule's is taken."""
    tried, usual = [], layout.Trial.took
    monkeypatch.setattr(layout, "_LEAST", 1)
    monkeypatch.setattr(layout, "_FEWEST_STEPS", 1)
    monkeypatch.setattr(layout.Trial, "took", lambda *said: tried.append(said) or usual(*said))
    counting = Counting()
    recipe = lehr.Recipe([lehr.Stage("2 epochs", train="all", lr=0.02)], batch_size=8, seed=3)
    short_runs.ran(recipe, valid=None, compile=counting if is_compiled else False)
    assert (counting.graphs, tried != []) == ((1, False) if is_compiled else (0, True))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # torch's own, for inputs that want gradients
def test_turns_of_parts_that_are_compiled() -> None:
    """Where objectives take turns, and a person has compiled the parts, each turn has its graphs once."""

    def graphs(length: str) -> int:
        torch._dynamo.reset()
        model, counting = adversaries.pair(), Counting()
        for part in model.children():
            part.compile(backend=counting)
        recipe = adversaries.recipe()
        stage = lehr.Stage(length, objectives=recipe.stages[0].objectives)
        adversaries.fit(model=model, recipe=lehr.Recipe([stage], batch_size=8, seed=3))
        return counting.graphs

    assert graphs("2 epochs") == graphs("6 epochs") <= 6


# --- what is refused ---


def refused(model: nn.Module, out: Path, **said: Any) -> str:
    """What is said; nothing was changed or written."""
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RequestError) as caught:
        fit(out, model=model, **said)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert not out.exists()
    return str(caught.value)


def test_what_is_no_backend(tmp_path: Path) -> None:
    """A name that torch does not know is refused with the nearest one, and so is what is no name."""
    for said, expected in (
        ("eagr", 'did you mean "eager"'),
        (1, "True, False"),
        (None, "True, False"),
        ("", "True, False"),
    ):
        text = refused(net(), tmp_path / "run", compile=said)
        assert text.startswith(f"compile={said!r}")
        assert expected in text


def test_what_is_compiled_already(tmp_path: Path) -> None:
    """A model that a person has compiled is refused, and is left compiled."""
    own = net()
    own.compile(backend="eager")
    call = own._compiled_call_impl
    for model in (own, torch.compile(net(), backend="eager")):
        assert "compiled already; leave compile out" in refused(model, tmp_path / "run", compile="eager")
    assert own._compiled_call_impl is call


def test_a_method_of_that_name() -> None:
    """A model's own `compile`, which does something else, is left alone."""

    class Own(small_run.Net):
        def compile(self) -> None:  # type: ignore[override]
            raise AssertionError

    model, counting = Own(), Counting()
    fit(None, model=model, recipe=thawing(HEAD), compile=counting)
    assert counting.graphs
    assert is_as_it_came(model)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a C++ compiler nothing is begun."""
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "needs a C++ compiler" in refused(net(), tmp_path / "run", compile=True)


def test_objectives(tmp_path: Path) -> None:
    """Objectives call parts of the model, which would not be compiled: that is said, with the way."""
    with pytest.raises(RequestError, match=r"objectives take turns.*model\.generator\.compile\(\)"):
        adversaries.fit(tmp_path / "run", compile="eager")
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_model_s_own_is_told_as_such() -> None:
    """Wrong shapes end a compiled run in the words in which they end any other, and not as a failure of the compiler."""

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(9, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    said: list[str] = []
    for compile in (False, "eager"):
        with pytest.raises(Exception, match="shapes cannot be multiplied") as caught:
            fit(None, model=Wrong(), recipe=thawing(ALL), compile=compile)
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    assert said[0] == said[1]
