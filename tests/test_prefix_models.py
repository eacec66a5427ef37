"""Real architectures with random weights, cut before their last block: the halves are the model, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from halving import analysed, assert_same, proved
from lehr.run.prefix.analysis import Call

_TEXT = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(**small, **_TEXT))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **_TEXT))


def _pictures(size: int) -> Callable[[int], Call]:
    return lambda n: Call((torch.randn(n, 3, size, size),), {})


def _text(n: int) -> Call:
    mask = (torch.arange(10) < torch.arange(10, 10 - n, -1)[:, None]).long()
    return Call((), {"input_ids": torch.randint(3, 50, (n, 10)) * mask, "attention_mask": mask})


MODELS: dict[str, tuple[Any, Callable[[int], Call], tuple[str, ...], str]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=3), _pictures(32), ("layer4", "fc"), "layer3"),
    "mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=3), _pictures(32), ("features.12", "classifier"), "features.11",
    ),
    "vit": (
        lambda: timm.models.VisionTransformer(32, 8, embed_dim=32, depth=3, num_heads=2, num_classes=3), _pictures(32),
        ("blocks.2", "norm", "head"), "blocks.1",
    ),
    "convnext": (
        lambda: timm.create_model("convnext_atto", num_classes=3), _pictures(32), ("stages.3", "head"), "stages.2",
    ),
    "bert": (_bert, _text, ("bert.encoder.layer.1", "classifier"), "bert.encoder.layer.0"),
    "gpt2": (_gpt2, _text, ("transformer.h.1", "score"), "transformer.h.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_real_models(name: str, training: bool) -> None:
    """The cut lies where a person would expect it, and outputs, gradients and buffers are the model's own for any batch."""
    torch.manual_seed(0)
    make, call, trained, after = MODELS[name]
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():  # a scale that begins at 0 would hide errors
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.ndim < 2 else 0)
    with torch.set_grad_enabled(training):
        analysis = analysed(model, call(4), *trained, training=training)
        assert analysis.stilled == (("transformer.drop",) if name == "gpt2" and training else ())
        halves = analysis.split(next(cut for cut in analysis.cuts if cut.after == after))
        proved(model, halves, call(4))
        for size in (2, 3):
            _assert_same(model, halves, call(size))


def _assert_same(model: nn.Module, halves: Any, call: Call) -> None:
    """transformers' caches are no part of what a suffix returns."""
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if cached:
        config.use_cache = False
    assert_same(model, halves, call)
    if cached:
        config.use_cache = cached
