"""What is read off a model: names, norms, ties, head, blocks, depths, for the families people fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from lehr.errors import ModelError, SelectionError
from lehr.run.facts import by_hand, inspect, named, unwrap
from lehr.selection import ModelFacts, select


def _tv(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(weights=None, **settings)


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **settings)


def _hf(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**settings))

    return make


class WithBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0)
        self.head = nn.Sequential(nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 3))


def _tv_with_new_classifier() -> nn.Module:
    model = torchvision.models.mobilenet_v2()
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, 64), nn.ReLU(), nn.Linear(64, 3))
    return model


def _segmentation() -> nn.Module:
    return torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)


_BERT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 2}

# family: (how to make it, head, number of blocks, last two blocks)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, int, str]] = {
    "tv alexnet": (_tv("alexnet"), "classifier.6", 7, "classifier.1 | classifier.4"),
    "tv vgg11_bn": (_tv("vgg11_bn"), "classifier.6", 10, "classifier.0 | classifier.3"),
    "tv squeezenet": (_tv("squeezenet1_0"), "classifier.1", 8, "features.10 | features.12"),
    "tv resnet18": (_tv("resnet18"), "fc", 8, "layer4.0 | layer4.1"),
    "tv densenet121": (
        _tv("densenet121"),
        "classifier",
        58,
        "features.denseblock4.denselayer15 | features.denseblock4.denselayer16 features.norm5",
    ),
    "tv googlenet": (_tv("googlenet", init_weights=False), "fc aux1 aux2", 9, "inception5a | inception5b"),
    "tv inception_v3": (
        _tv("inception_v3", init_weights=False),
        "fc AuxLogits",
        9,
        "Mixed_7a Mixed_7b | Mixed_7c",
    ),
    "tv mobilenet_v2": (_tv("mobilenet_v2"), "classifier.1", 17, "features.16 | features.17 features.18"),
    "tv mobilenet_v3": (
        _tv("mobilenet_v3_small"),
        "classifier.3",
        11,
        "features.10 | features.11 features.12 classifier.0",
    ),
    "tv new classifier": (_tv_with_new_classifier, "classifier", 17, "features.16 | features.17 features.18"),
    "tv shufflenet": (_tv("shufflenet_v2_x0_5"), "fc", 16, "stage4.2 | stage4.3 conv5.0 conv5.1"),
    "tv efficientnet_b0": (
        _tv("efficientnet_b0"),
        "classifier.1",
        16,
        "features.6.3 | features.7.0 features.8",
    ),
    "tv convnext_tiny": (
        _tv("convnext_tiny"),
        "classifier.2",
        18,
        "features.7.1 | features.7.2 classifier.0",
    ),
    "tv vit_b_16": (
        _tv("vit_b_16"),
        "heads.head",
        12,
        "encoder.layers.encoder_layer_10 | encoder.layers.encoder_layer_11 encoder.ln",
    ),
    "tv swin_t": (_tv("swin_t"), "head", 12, "features.6 features.7.0 | features.7.1 norm"),
    "tv fcn_resnet50": (
        _segmentation,
        "classifier aux_classifier",
        16,
        "backbone.layer4.1 | backbone.layer4.2",
    ),
    "timm resnet18": (_timm("resnet18"), "fc", 8, "layer4.0 | layer4.1"),
    "timm mobilenetv2": (_timm("mobilenetv2_100"), "classifier", 17, "blocks.5.2 | blocks.6 conv_head bn2"),
    "timm efficientnet_b0": (
        _timm("efficientnet_b0"),
        "classifier",
        16,
        "blocks.5.3 | blocks.6 conv_head bn2",
    ),
    "timm convnext_atto": (
        _timm("convnext_atto"),
        "head.fc",
        12,
        "stages.3.downsample stages.3.blocks.0 | stages.3.blocks.1 head.norm",
    ),
    "timm convnext without classifier": (
        _timm("convnext_atto", num_classes=0),
        "",
        12,
        "stages.3.downsample stages.3.blocks.0 | stages.3.blocks.1 head",
    ),
    "timm shvit without classifier": (
        _timm("shvit_s1", num_classes=0),
        "",
        11,
        "stages.2.blocks.3 | stages.2.blocks.4",
    ),
    "timm vit": (_timm("vit_tiny_patch16_224"), "head", 12, "blocks.10 | blocks.11 norm"),
    "timm vit without classifier": (
        _timm("vit_tiny_patch16_224", num_classes=0),
        "",
        12,
        "blocks.10 | blocks.11 norm",
    ),
    "timm distilled deit": (
        _timm("deit_tiny_distilled_patch16_224"),
        "head head_dist",
        12,
        "blocks.10 | blocks.11 norm",
    ),
    "timm swin": (
        _timm("swin_tiny_patch4_window7_224"),
        "head.fc",
        12,
        "layers.3.downsample layers.3.blocks.0 | layers.3.blocks.1 norm",
    ),
    "timm caformer (no group_matcher)": (
        _timm("caformer_s18"),
        "head.fc",
        18,
        "stages.3.blocks.1 | stages.3.blocks.2 head.norm",
    ),
    "timm inside a Sequential": (
        lambda: nn.Sequential(nn.Identity(), timm.create_model("resnet18")),
        "1.fc",
        8,
        "1.layer4.0 | 1.layer4.1",
    ),
    "own head on a timm backbone": (
        WithBackbone,
        "head",
        12,
        "backbone.blocks.10 | backbone.blocks.11 backbone.norm",
    ),
    "hf bert": (
        _hf("BertForSequenceClassification", "BertConfig", **_BERT),
        "classifier",
        3,
        "bert.encoder.layer.1 | bert.encoder.layer.2 bert.pooler",
    ),
    "hf bert without head": (
        _hf("BertModel", "BertConfig", **_BERT),
        "",
        3,
        "encoder.layer.1 | encoder.layer.2 pooler",
    ),
    "hf roberta": (
        _hf("RobertaForSequenceClassification", "RobertaConfig", **_BERT),
        "classifier",
        3,
        "roberta.encoder.layer.1 | roberta.encoder.layer.2",
    ),
    "hf distilbert": (
        _hf(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            dim=32,
            n_layers=3,
            n_heads=2,
            hidden_dim=64,
        ),
        "pre_classifier classifier",
        3,
        "distilbert.transformer.layer.1 | distilbert.transformer.layer.2",
    ),
    "hf question answering": (
        _hf("BertForQuestionAnswering", "BertConfig", **_BERT),
        "qa_outputs",
        3,
        "bert.encoder.layer.1 | bert.encoder.layer.2",
    ),
    "hf gpt2 classifier": (
        _hf("GPT2ForSequenceClassification", "GPT2Config", **_GPT),
        "score",
        3,
        "transformer.h.1 | transformer.h.2 transformer.ln_f",
    ),
    "hf llama": (
        _hf("LlamaForCausalLM", "LlamaConfig", **_BERT, vocab_size=100),
        "lm_head",
        3,
        "model.layers.1 | model.layers.2 model.norm",
    ),
    "hf resnet": (
        _hf("ResNetForImageClassification", "ResNetConfig"),
        "classifier",
        16,
        "resnet.encoder.stages.3.layers.1 | resnet.encoder.stages.3.layers.2",
    ),
    "perceptron": (
        lambda: nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        ),
        "4",
        2,
        "0 | 2 3",
    ),
}


def _facts(make: Callable[[], nn.Module]) -> ModelFacts:
    with torch.device("meta"):
        return inspect(make())


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_blocks(family: str) -> None:
    """Head, number of blocks and the last two blocks of a known family are what a person would point at."""
    make, head, count, last = FAMILIES[family]
    facts = _facts(make)
    assert facts.head == tuple(head.split())
    assert len(facts.blocks) == count
    assert facts.blocks[-2:] == tuple(tuple(block.split()) for block in last.split(" | "))
    _assert_consistent(facts)


def _assert_consistent(facts: ModelFacts) -> None:
    """Blocks do not touch the head or each other; depth grows from the stem over the blocks to the head."""
    head = set(select("head", facts).names) if facts.head else set()
    depths = []
    for paths in facts.blocks:
        block = [p for p in facts.parameters if any(p.name == q or p.name.startswith(q + ".") for q in paths)]
        assert block, f"{paths} holds no parameter"
        assert head.isdisjoint(p.name for p in block)
        depths.append({p.layer for p in block})
    flat = [min(d) for d in depths]
    assert flat == sorted(set(flat))
    assert {p.layer for p in facts.parameters if p.name in head} <= {facts.layers - 1}
    assert {p.layer for p in facts.parameters} == set(range(facts.layers))
    assert len(facts.by_name) == sum(1 + len(p.aliases) for p in facts.parameters)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv2_100"])
def test_depths_are_those_of_timm(name: str) -> None:
    """The depth of each parameter is the layer number that timm's own layer decay uses."""
    with torch.device("meta"):
        model = timm.create_model(name)
    expected = timm.models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert {p.name: p.layer for p in inspect(model).parameters} == expected


def test_understood_says_how() -> None:
    """The plan can tell a reader how head and blocks were found, what is tied and what was frozen by hand."""
    facts = _facts(_timm("vit_tiny_patch16_224"))
    assert facts.understood == (
        "head: head (timm get_classifier)",
        "12 blocks: blocks.0 … blocks.11 (timm group_matcher)",
    )
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    net[1].weight = net[0].weight
    net[0].weight.requires_grad_(False)
    assert inspect(net).understood == (
        "head: 1 (the last layer; say head=... if that is wrong)",
        "1 block: 0 (repeated modules)",
        "tied: 0.weight is also 1.weight: one parameter",
        "2 parameters were frozen by hand: 0.weight, 0.bias; they stay so unless a stage names them",
    )


def test_frozen_by_hand_is_what_requires_grad_says() -> None:
    """On a model that no plan has touched, frozen by hand is what does not require gradients; a tied weight
    under its first name."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    net[1].weight.requires_grad_(False)
    assert by_hand(net) == by_hand(nn.DataParallel(net)) == {"0.weight"}
    assert [p.name for p in inspect(net).parameters if p.frozen_by_hand] == ["0.weight"]


def test_names_shapes_and_order() -> None:
    """Parameters stand in the model's order with their shapes, and buffers are counted."""
    model = torchvision.models.resnet18(num_classes=3)
    facts = inspect(model)
    assert [(p.name, p.shape) for p in facts.parameters] == [
        (n, tuple(p.shape)) for n, p in model.named_parameters()
    ]
    assert facts.buffers == len(list(model.buffers()))
    assert facts.name == "ResNet"
    assert facts.count() == sum(p.numel() for p in model.parameters())
    assert list(named(model)) == [p.name for p in facts.parameters]


def test_tied_weights_are_one_parameter() -> None:
    """A tied weight has its first name, and selecting it by another name or through the head finds it."""
    facts = _facts(_hf("GPT2LMHeadModel", "GPT2Config", **_GPT))
    tied = facts.by_name["lm_head.weight"]
    assert (tied.name, tied.aliases) == ("transformer.wte.weight", ("lm_head.weight",))
    assert select("head", facts).names == ("transformer.wte.weight",)
    assert "tied: transformer.wte.weight is also lm_head.weight: one parameter" in facts.understood


class _VectorNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))


class _NormalisedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.bias = nn.Parameter(torch.ones(4))


def test_norms_and_biases() -> None:
    """What normalisation layers own is norm, by type or class name; others called bias are bias."""
    model = nn.Sequential(
        *(nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)),
        *(
            nn.InstanceNorm1d(4, affine=True),
            nn.RMSNorm(4),
            timm.layers.LayerNorm2d(4),
            timm.layers.RmsNorm(4),
        ),
        *(_VectorNorm(), timm.layers.BatchNormAct2d(4)),
        *(_NormalisedLinear(), nn.MultiheadAttention(4, 2), nn.LSTM(4, 4)),
    )
    facts = inspect(model)
    assert {int(p.name.split(".")[0]) for p in facts.parameters if p.norm} == set(range(10))
    assert all(p.norm for p in facts.parameters if int(p.name.split(".")[0]) < 10)
    assert [p.name for p in facts.parameters if p.bias] == [
        *("10.bias", "11.in_proj_bias", "11.out_proj.bias", "12.bias_ih_l0", "12.bias_hh_l0"),
    ]


@pytest.mark.parametrize("make", [_hf("T5Model", "T5Config"), _hf("LlamaModel", "LlamaConfig", **_BERT)])
def test_norms_of_transformers(make: Callable[[], nn.Module]) -> None:
    """The norm classes of transformers are recognised though they derive from nothing but Module."""
    facts = _facts(make)
    norms = [p.name for p in facts.parameters if p.norm]
    assert norms
    assert set(norms) == {p.name for p in facts.parameters if "norm" in p.name}


def test_head_as_given() -> None:
    """`head=` wins over what lehr would find; it may name several modules or a parameter."""
    model = torchvision.models.resnet18()
    assert inspect(model, head="layer4.1").head == ("layer4.1",)
    facts = inspect(model, head=["fc", "layer4.1.bn2.weight"])
    assert select("head", facts).names == ("layer4.1.bn2.weight", "fc.weight", "fc.bias")
    assert facts.understood[0] == "head: fc, layer4.1.bn2.weight (as given)"
    assert inspect(nn.Sequential(nn.Identity(), timm.create_model("resnet18")), head="1.fc").head == ("1.fc",)


def test_wrong_head_is_refused() -> None:
    """A head that names nothing is refused with the nearest name."""
    model = torchvision.models.mobilenet_v2()
    with pytest.raises(SelectionError, match='"classifier"') as caught:
        inspect(model, head="clasifier")
    assert "top-level parts are: features, classifier" in str(caught.value)
    with pytest.raises(SelectionError, match="names nothing"):
        inspect(model, head=[])
    with pytest.raises(SelectionError, match=r"classifier\.0"):
        inspect(model, head="classifier.0")  # a dropout: it has no parameters


class _Unordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2)


def test_no_head_is_said() -> None:
    """Where no head is clear there is none, and the reader is told how to name it."""
    facts = inspect(_Unordered())
    assert facts.head == ()
    assert facts.understood[0] == "no head: none was recognised; say head=... to name it"


def test_bare_layer() -> None:
    """A model that is one layer is its own head, named by its parameters."""
    facts = inspect(nn.Linear(3, 2))
    assert (facts.head, facts.blocks, facts.layers) == (("weight", "bias"), (), 1)


def test_wrappers_are_looked_through() -> None:
    """torch.compile and DataParallel change no name, outside or inside the model."""
    model = torchvision.models.resnet18()
    facts = inspect(model)
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert inspect(compiled) == facts
    assert unwrap(nn.DataParallel(compiled)) is model
    model.layer4 = torch.compile(model.layer4, backend="eager")
    assert inspect(model) == facts
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    facts = inspect(vit)
    vit.blocks[1] = torch.compile(vit.blocks[1], backend="eager")
    assert inspect(vit) == facts


def test_inspecting_changes_nothing() -> None:
    """Looking at a model leaves its state and its attributes alone."""
    model = torchvision.models.resnet18()
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    inspect(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


class _Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (nn.ReLU, "ReLU has no parameters.*nn.ModuleList"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "'0.weight' is a lazy parameter.*run one batch"),
        (lambda: nn.Sequential(nn.Linear(1, 1), nn.LazyBatchNorm1d(affine=False)), "lazy buffer"),
        (_Quantised, "'weight' is of type torch.int8.*without quantisation"),
        (lambda: 3, "expected a torch.nn.Module, found int"),
    ],
)
def test_models_that_cannot_be_trained(make: Callable[[], Any], said: str) -> None:
    """A model with no, lazy or whole-number parameters, or no model at all, is refused with the fix."""
    with pytest.raises(ModelError, match=said):
        inspect(make())
