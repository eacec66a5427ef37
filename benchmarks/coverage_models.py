"""The models that benchmarks/coverage.py cuts, with random weights, and a batch for each.

25 classifiers of torchvision, 4 networks of its for segmentation and detection, 55 of timm, 11 tiny ones of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TORCHVISION = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet1_0
mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d
shufflenet_v2_x1_0 squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_16 vit_b_32 wide_resnet50_2"""
SEGMENTATION = "deeplabv3_mobilenet_v3_large fcn_resnet50"
DETECTION = "fasterrcnn_mobilenet_v3_large_320_fpn retinanet_resnet50_fpn"
TIMM = """beit_base_patch16_224 cait_xxs24_224 coatnet_pico_rw_224 convnext_atto convnextv2_atto crossvit_tiny_240 davit_tiny
deit3_small_patch16_224 deit_tiny_distilled_patch16_224 densenet121 dm_nfnet_f0 ecaresnet50t edgenext_xx_small
efficientformer_l1 efficientnet_b0 efficientnetv2_rw_t eva02_tiny_patch14_224 fastvit_t8 focalnet_tiny_srf ghostnet_100
gmlp_s16_224 hiera_tiny_224 hrnet_w18_small levit_128s mambaout_femto maxvit_rmlp_pico_rw_256 mixer_s32_224
mobilenetv3_large_100 mobilenetv4_conv_small mobileone_s0 nf_resnet50 poolformer_s12 pvt_v2_b0 regnety_004 repvgg_a0
res2net50_14w_8s resmlp_12_224 resnet18 resnet26t resnet50 rexnet_100 seresnet50 skresnet18 swin_tiny_patch4_window7_224
swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_svt_small vit_base_patch32_224 vit_small_patch14_dinov2
vit_small_patch16_224 vit_tiny_patch16_224 volo_d1_224 vovnet39a xcit_nano_12_p16_224"""
TRANSFORMERS = "bart bert deberta_v2 distilbert gpt2 llama qwen3 roberta swin t5 vit"
CLASSES = 5
_SMALL = 128
_FIXED: tuple[str, ...] = ()  # of timm's, those that say they take any size and do not
_WIDTH, _DEPTH, _LENGTH, _WORDS = 48, 4, 12, 100


Call = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """A model, and what it is called with: `call(n)` makes n samples. `usual` does so in the size that the model is made for,
    where it is compared on smaller pictures to save time.
    """

    model: nn.Module
    call: Call
    head: str | None = None
    usual: Call | None = None


def names() -> list[str]:
    """All models, as "set/name"."""
    lists = {"torchvision": TORCHVISION, "segmentation": SEGMENTATION, "detection": DETECTION, "timm": TIMM,
             "transformers": TRANSFORMERS}  # fmt: skip
    return [f"{kind}/{name}" for kind, listed in lists.items() for name in listed.split()]


def case(name: str) -> Case:
    """The model of this name, from seed 0. Parameters that begin at 0, and vectors, get noise: zeros would hide errors."""
    kind, _, short = name.partition("/")
    torch.manual_seed(0)
    made = {"torchvision": _torchvision, "segmentation": _segmentation, "detection": _detection, "timm": _timm,
            "transformers": _transformers}[kind](short)  # fmt: skip
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.ndim <= 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
        _calibrate(made)
    return made


def _calibrate(made: Case) -> None:
    """Batch-norm's statistics as they are on a batch, with noise: with those of a new network, numbers would explode."""
    norms = [
        m
        for m in made.model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    before = [norm.momentum for norm in norms]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
    args, kwargs = made.call(4)
    made.model.train()(*args, **kwargs)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25))


def _pictures(size: int) -> Call:
    return lambda n: ((torch.randn(n, 3, size, size),), {})


def _torchvision(name: str) -> Case:
    import torchvision

    with_weights = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **with_weights)
    if name.startswith(("vit", "maxvit")):
        return Case(model, _pictures(224))
    if name == "inception_v3":
        return Case(model, _pictures(299))
    return Case(model, _pictures(_SMALL), usual=_pictures(224))


def _segmentation(name: str) -> Case:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)
    return Case(model, _pictures(_SMALL), head="classifier", usual=_pictures(224))


def _detection(name: str) -> Case:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)

    def call(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        box = {"boxes": torch.tensor([[10.0, 10.0, 90.0, 90.0]]), "labels": torch.tensor([1])}
        return ([torch.rand(3, 160, 160) for _ in range(n)], [dict(box) for _ in range(n)]), {}

    return Case(model, call, head="roi_heads" if "rcnn" in name else "head")


def _timm(name: str) -> Case:
    import timm

    sized = {"img_size": 224} if "dinov2" in name else {}  # made for 518 pixels, which would take long
    model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **sized)
    usual = 224 if "dinov2" in name else model.default_cfg["input_size"][-1]
    fixed = model.default_cfg.get("fixed_input_size") or name in _FIXED
    return Case(model, _pictures(usual if fixed else _SMALL), usual=None if fixed else _pictures(usual))


def _transformers(name: str) -> Case:
    import transformers as t

    wide = {
        "hidden_size": _WIDTH,
        "num_hidden_layers": _DEPTH,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    text = {
        "vocab_size": _WORDS,
        "num_labels": CLASSES,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name in ("bert", "roberta", "deberta_v2"):
        kinds = {"bert": t.BertForSequenceClassification, "roberta": t.RobertaForSequenceClassification,
                 "deberta_v2": t.DebertaV2ForSequenceClassification}  # fmt: skip
        return _text(kinds[name](kinds[name].config_class(**wide, **text)))
    if name == "distilbert":
        config = t.DistilBertConfig(dim=_WIDTH, n_layers=_DEPTH, n_heads=4, hidden_dim=96, **text)
        return _text(t.DistilBertForSequenceClassification(config))
    if name == "gpt2":
        return _text(
            t.GPT2ForSequenceClassification(t.GPT2Config(n_embd=_WIDTH, n_layer=_DEPTH, n_head=4, **text))
        )
    if name in ("llama", "qwen3"):
        kind = t.LlamaForSequenceClassification if name == "llama" else t.Qwen3ForSequenceClassification
        return _text(kind(kind.config_class(**wide, num_key_value_heads=4, head_dim=12, **text)))
    if name == "bart":
        config = t.BartConfig(d_model=_WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                              decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, **text)  # fmt: skip
        return _text(t.BartForSequenceClassification(config), end=2)
    if name == "t5":
        return _text(_T5(t), head="head")
    return _picture_transformer(t, name)


def _picture_transformer(t: Any, name: str) -> Case:
    if name == "vit":
        config = t.ViTConfig(hidden_size=_WIDTH, num_hidden_layers=_DEPTH, num_attention_heads=4, intermediate_size=96,
                             image_size=64, patch_size=8, num_labels=CLASSES)  # fmt: skip
        return Case(t.ViTForImageClassification(config), _pictures(64))
    config = t.SwinConfig(image_size=64, patch_size=2, embed_dim=24, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4,
                          num_labels=CLASSES)  # fmt: skip
    return Case(t.SwinForImageClassification(config), _pictures(64))


class _T5(nn.Module):
    """T5's encoder with a mean over the words and a linear head."""

    def __init__(self, t: Any) -> None:
        super().__init__()
        config = t.T5Config(
            d_model=_WIDTH, d_kv=12, d_ff=96, num_layers=_DEPTH, num_heads=4, vocab_size=_WORDS
        )
        self.encoder = t.T5EncoderModel(config)
        self.head = nn.Linear(_WIDTH, CLASSES)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Classes' scores."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head((states * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


def _text(model: nn.Module, *, head: str | None = None, end: int = 0) -> Case:
    def call(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = torch.randint(3, _WORDS, (n, _LENGTH))
        lengths = torch.randint(_LENGTH // 2, _LENGTH + 1, (n,))
        mask = (torch.arange(_LENGTH) < lengths[:, None]).long()
        ids = ids * mask
        if end:  # a sentence ends in it exactly once
            ids[torch.arange(n), lengths - 1] = end
        return (), {"input_ids": ids, "attention_mask": mask}

    return Case(model, call, head)
