"""Models that nobody here has written: torchvision's, one of every timm module, transformers'.

Every model comes with random weights and the smallest inputs that show all of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BATCH = 2


class Sample(NamedTuple):
    """A model and what it is called with: positional arguments, or keyword arguments."""

    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]


Build = Callable[[], Sample]


def suite(name: str) -> dict[str, Build]:
    """The models of a suite: name -> how to build it."""
    return {"torchvision": torchvision_models, "timm": timm_models, "transformers": hf_models}[
        name
    ]()


def images(size: int = 64, batch: int = BATCH, frames: int | None = None) -> Tensor:
    """Random images `(N, 3, H, W)`, or clips `(N, 3, T, H, W)`."""
    shape = (batch, 3, size, size) if frames is None else (batch, 3, frames, size, size)
    return torch.randn(shape)


# -- torchvision ---------------------------------------------------------------------------

# Where 64 pixels are too few: Inception for its auxiliary head, MaxViT for its windows.
_IMAGE_SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}
_LARGE_CLIPS = ("mvit_v1_b", "mvit_v2_s", "s3d")  # take no other size
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},  # scipy's truncated normal takes a minute
    "inception_v3": {"init_weights": False},
}


def torchvision_models() -> dict[str, Build]:
    """All of torchvision: classification, segmentation, video, optical flow, detection."""
    from torchvision import models

    kinds = {
        models: _classifier,
        models.segmentation: _segmenter,
        models.video: _video_classifier,
        models.optical_flow: _flow_estimator,
        models.detection: _detector,
    }
    return {
        name: partial(build, name)
        for module, build in kinds.items()
        for name in models.list_models(module=module)
    }


def classifiers() -> list[str]:
    """The names of torchvision's classification models."""
    from torchvision import models

    return models.list_models(module=models)


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """A torchvision model with random weights."""
    from torchvision import models

    return models.get_model(name, weights=None, **_OPTIONS.get(name, {}), **options)


def _classifier(name: str) -> Sample:
    size = _IMAGE_SIZES.get(name, 64)
    options = {"image_size": size} if name.startswith("vit_") else {}
    return Sample(torchvision_model(name, **options), (images(size),))


def _segmenter(name: str) -> Sample:
    return Sample(torchvision_model(name, weights_backbone=None), (images(),))


def _video_classifier(name: str) -> Sample:
    clips = images(224, 1, frames=16) if name in _LARGE_CLIPS else images(64, frames=8)
    return Sample(torchvision_model(name), (clips,))


def _flow_estimator(name: str) -> Sample:
    first, second = images(128), images(128)
    inputs = {"image1": first, "image2": second, "num_flow_updates": 2}
    return Sample(torchvision_model(name), inputs)


def _detector(name: str) -> Sample:
    # Every box counts, however unlikely: random weights find nothing else. So a few must do.
    if "rcnn" in name:
        limits = {"box_score_thresh": 0.0, "box_detections_per_img": 10}
        limits |= {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 50}
    else:
        limits = {"score_thresh": 0.0, "detections_per_img": 10, "topk_candidates": 50}
    size = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 160}
    model = torchvision_model(name, weights_backbone=None, **limits, **size)
    return Sample(model, ([torch.rand(3, 128, 160), torch.rand(3, 128, 160)],))


# -- timm ----------------------------------------------------------------------------------

# A small model of every module file of timm.
_TIMM = """
beitv2_base_patch16_224 halonet_h1 mobileone_s0 cait_xxs24_224 coat_tiny convit_tiny
convmixer_768_32 convnext_atto_rms cpubone_nano crossvit_tiny_240 cs3darknet_s cspnext_tiny
csatv2 davit_tiny
deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 mobilenet_edgetpu_v2_xs efficientvim_m1 efficientvit_b0
efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_mci0 focalnet_tiny_srf gcvit_xxtiny
gemma4_vit_167m ghostnetv2_100 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
hrnet_w18_small iformer_m inception_next_atto inception_resnet_v2 inception_v3 inception_v4
lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0 mambaout_femto
maxvit_pico_rw_256 poolformerv2_s12 gmixer_12_224 mobilenetv3_small_050 mobilenetv5_base
mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small nfnet_l0
pit_xs_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1
res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 samvit_base_patch16 selecsls42
sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224
swinv2_cr_tiny_224 swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
twins_svt_small ese_vovnet19b_slim_dw vgg11 visformer_tiny vit_tiny_patch16_224
vit_srelpos_small_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p
xcit_nano_12_p8_224
""".split()


# The smallest there is of these is large.
_TIMM_OPTIONS: dict[str, dict[str, int]] = {
    "deepseek_vit_412m": {"depth": 4},
    "gemma4_vit_167m": {"depth": 4},
    "samvit_base_patch16": {"img_size": 128},
}


def timm_models() -> dict[str, Build]:
    """One small model of every module file of timm."""
    return {name: partial(_timm_model, name) for name in _TIMM}


def _timm_model(name: str) -> Sample:
    import timm

    options = _TIMM_OPTIONS.get(name, {})
    try:
        model = timm.create_model(name, drop_path_rate=0.0, **options)
    except TypeError:
        model = timm.create_model(name, **options)
    config = model.pretrained_cfg
    size = options.get("img_size", config["input_size"][-1])
    if not config.get("fixed_input_size"):
        size = next(s for s in (96, 128, 160, 192, 224, size) if _runs(model, s))
    return Sample(model, (images(size),))


def _runs(model: nn.Module, size: int) -> bool:
    try:
        with torch.no_grad():
            model.eval()(images(size, 1))
    except (RuntimeError, AssertionError, ValueError):
        return False
    finally:
        model.train()
    return True


# -- transformers --------------------------------------------------------------------------

_TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"intermediate_size": 128, "max_position_embeddings": 64}
_DECODER = _TEXT | {"num_key_value_heads": 2, "use_cache": False}
_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
_VISION |= {"intermediate_size": 128, "patch_size": 8}

_HF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    ),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _TEXT),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VISION),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 64, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "window_size": 4}
        | {"num_heads": [2, 4], "drop_path_rate": 0.0},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 3, 4]}
        | {"decoder_hidden_size": 32, "depths": [1, 1, 1, 1]}
        | {"drop_path_rate": 0.0},
    ),
    "clip_vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", _VISION),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"intermediate_size": 128, "conv_dim": [32] * 4, "conv_kernel": [10, 3, 3, 2]}
        | {"conv_stride": [5, 2, 2, 2], "num_conv_pos_embeddings": 16, "layerdrop": 0.0}
        | {"num_conv_pos_embedding_groups": 4, "apply_spec_augment": False},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"use_cache": False},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2}
        | {"num_heads": 4, "use_cache": False},
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 64]}
        | {"image_size": 64, "num_attention_heads": 2},
    ),
}


def hf_models() -> dict[str, Build]:
    """Small random configurations of transformers' models."""
    return {name: partial(_hf_model, name) for name in _HF}


def _hf_model(name: str) -> Sample:
    transformers = importlib.import_module("transformers")
    class_name, config_name, options = _HF[name]
    config = getattr(transformers, config_name)(**options)
    model = getattr(transformers, class_name)(config)
    tokens = torch.randint(3, 99, (BATCH, 12))
    if model.main_input_name == "pixel_values":
        return Sample(model, {"pixel_values": images(options.get("image_size", 64))})
    if model.main_input_name == "input_values":
        return Sample(model, {"input_values": torch.randn(BATCH, 800)})
    inputs = {"input_ids": tokens}
    if name == "t5":
        inputs["decoder_input_ids"] = tokens[:, :7].clone()
    return Sample(model, inputs)
