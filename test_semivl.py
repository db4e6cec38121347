"""What semivl.py and data_prep.py promise, one promise a test.

    pytest -q test_semivl.py            all of it: minutes on a laptop
    pytest -q test_semivl.py -k small   shapes and a tiny overfit first: seconds
    pytest -q test_semivl.py -k equal   equality with the authors' code

The numbers below were computed once by the authors' code (google-research/semivl, commit 13ee65d,
float32, CPU) with weights made by a formula, so that nobody has to carry a weight file.
"""

import ast
import colorsys
import functools
import hashlib
import io
import http.server
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data_prep
import semivl
from semivl import IGNORE, Config, Targets


# The small test -----------------------------------------------------------------------------------
def tiny_model(classes=3, decoder="language", channels=128):
    """A student around a random tiny CLIP."""
    torch.manual_seed(0)
    text, clip = F.normalize(torch.randn(classes, 64), dim=1), open_clip.CLIP(**data_prep.TOY_CLIP)
    cfg = Config(crop=64, decoder=decoder, decoder_channels=channels)
    return semivl.build_model(cfg, clip.visual, text)


@pytest.mark.parametrize("decoder, channels", [("language", 128), ("language", 8), ("vision", 0)])
@pytest.mark.parametrize("size", [(64, 64), (40, 96), (33, 17), (9, 130)])
def test_small_logits_have_the_size_of_the_image(size, decoder, channels):
    model = tiny_model(4, decoder, channels).eval()
    assert model(torch.rand(2, 3, *size)).shape == (2, 4, *size)


def test_small_two_scenes_are_learned_by_heart():
    model, masks = tiny_model(classes=3), torch.zeros(2, 64, 64, dtype=torch.long)
    masks[0, 16:, :32], masks[1, :32, 16:], masks[1, 32:, :32] = 1, 2, 1
    colours = torch.tensor([[0.6, 0.6, 0.4], [0.7, 0.3, 0.5], [0.3, 0.5, 0.7]])
    images = colours[masks].permute(0, 3, 1, 2) + 0.03 * random_normal(2, (2, 3, 64, 64))
    optimizer = semivl.make_optimizer(model, Config(lr=1e-3, vit_lr=1e-3))
    for _ in range(50):
        semivl.supervised_loss(model(images), masks).backward()
        optimizer.step()
        optimizer.zero_grad()
    matrix = semivl.confusion_matrix(model(images).argmax(1), masks, classes=3)
    assert semivl.iou_per_class(matrix).mean() > 95


# Equality with the authors' code. Of each flattened array: values 1, 2, 3, those at two thirds and
# at the end, mean, absolute maximum. Their images are normalised; ours are in [0, 1].

ARRAYS = {
    "skip_layer0": [3.27752, -0.056616, -1.702557, -1.330713, 1.035475, -0.042709, 5.731266],
    "skip_layer4": [0.682463, -2.176073, -0.896271, -2.295802, -0.303443, 0.091571, 9.197062],
    "dense_embed": [0.097947, 0.095571, 0.078342, -0.067863, 0.044389, -0.001207, 0.217205],
    "global_embed": [-0.037101, 0.072955, -0.012894, -0.056386, 0.040614, 0.000366, 0.17356],
    "sim": [0.014675, 0.035255, 0.023586, 0.04007, -0.022069, -0.015729, 0.113589],
    "aspp_out": [0.873607, 0.605794, 0.725779, -0.009924, 2.441332, 0.408567, 3.742311],
    "semantic_out": [5.607229, 5.221578, 5.223725, 4.085968, 11.334358, 1.499726, 12.951447],
    "dec_lowres": [0.415613, 0.101565, 0.362099, 0.488941, 0.208606, 0.431636, 1.725022],
    "logits": [0.286775, 0.302879, 0.335089, 0.380143, 0.208606, 0.431636, 1.542125],
    "odd skip_layer0": [0.057633, 1.988632, 1.797632, -1.369062, -0.050145, -0.0582, 5.80963],
    "odd skip_layer4": [-0.455502, -0.564709, 0.109231, -2.268917, 2.29666, 0.08356, 9.356159],
    "odd dense_embed": [0.079493, 0.036488, 0.048466, 0.024115, 0.029369, -0.000461, 0.193704],
    "certainty": [0.976819, 0.976819, 0.976819, 0.696046, 0.895673, 0.761447, 0.99844],
    "cityscapes skip4": [0.454151, -2.100168, -0.987981, -2.26737, -0.27655, 0.085328, 8.992495],
    "cityscapes embed": [0.097754, 0.093204, 0.078673, -0.062177, 0.047792, -0.001189, 0.218271],
    "cityscapes conv": [0.145112, 0.044765, 0.100693, 0, 0.263131, 0.53414, 3.460292],
    "cityscapes logits": [0.29533, 0.290421, 0.280603, 0.919696, 0.437799, 0.819211, 2.088953],
    "window average": [0.028309, 0.037568, 0.056085, 0.104738, 0.110517, 0.400172, 1.48099],
}

LOSSES = "x s1 s2 fp guidance_s1 guidance_s2 guidance_fp total".split()
GROUPS = (
    "clip. clip.visual.positional_embedding decoder. decoder.aspp decoder.lift "
    "decoder.head.weight decoder.semantic.0 decoder.semantic.1 decoder.deep_proj "
    "decoder.shallow_proj decoder.text_proj decoder.up1 decoder.up2"
).split()
STEPS = [  # confidence threshold, factor on the last layer, LOSSES, norms of GROUPS' gradients
    (
        (0.2068093, 1),
        "1.609751 0.418392 0.447017 0.449153 0.984584 0.9294 0.928661 1.096052",
        "0.0176521 0.000429695 0.0865236 0.0546786 0.0141918 0.010709 0.0160136 0.00776504 "
        "0.00595778 0.00887013 0.00124322 0.0517153 0.0327653",
    ),
    (
        (0.5, 40),
        "1.977586 0.273752 0.279286 0.292153 1.307101 1.216243 1.07721 1.218669",
        "1.5069 0.0355676 5.23835 3.61465 1.06778 0.0141045 1.16373 0.549819 0.277985 0.552701 "
        "0.0707705 2.89203 1.68109",
    ),
]
BATCH_NORM = {"weight": 1, "bias": 1, "running_mean": 1, "running_var": 1, "num_batches_tracked": 0}
ENDS = {
    "-": {".weight": 4},
    "+": {".weight": 4, ".bias": 1},
    "=": {"": 4},
    "~": {f".{name}": dimensions for name, dimensions in BATCH_NORM.items()},
}


def authors_shapes(cityscapes: bool):
    """Names and shapes of an authors' checkpoint: ViT of width 64, full-size decoder. A name below
    stands for the tensors whose ENDS its last character says, with so many of the dimensions."""
    skip, dim = (32, 256) if cityscapes else (16, 64)
    parts = {
        "backbone.": "patch_embed.projection- 64 3 16 16; proj- 512 64 1 1; ln0+ 64; ln1+ 64;"
        "cls_token= 1 1 64; pos_embed= 1 65 64",
        "decode_head.": "conv1+ 128 1 7 7; text_proj.0+ 128 512; skip_proj.0.0+ 32 64 3 3;"
        f"skip_proj.1.0+ {skip} {dim} 3 3; head+ 1 32 3 3",
        "decode_head.aspp.": "aspp_convs.4.gap.1- 128 128 1 1; aspp_convs.4.gap.2+ 128;"
        "project.0- 128 640 1 1; project.1+ 128",
    }
    for i, k in enumerate((1, 3, 3, 3)):
        parts[f"decode_head.aspp.aspp_convs.{i}."] = f"0- 128 128 {k} {k}; 1+ 128"
    for up, c_in, c_up, c in (("up1", 128, 96, 64), ("up2", 64, 64 - skip, 32)):
        parts[f"decode_head.{up}."] = f"""conv.0- {c} {c_in} 3 3; conv.1+ {c}; conv.3- {c} {c} 3 3;
            conv.4+ {c}; up.weight= {c_in} {c_up} 2 2; up.bias= {c_up}"""
    for layers, D, hidden in [(f"backbone.layers.{i}.", 64, 256) for i in range(12)] + [
        (f"decode_head.layers.{i}.transformer.", 256, 512) for i in range(2)
    ]:
        parts[layers] = f"""ln1+ {D}; ln2+ {D}; attn.attn.in_proj_weight= {3 * D} {D};
            attn.attn.in_proj_bias= {3 * D}; attn.attn.out_proj+ {D} {D};
            ffn.layers.0.0+ {hidden} {D}; ffn.layers.1+ {D} {hidden}"""
    if cityscapes:
        parts["conv_encoder."] = "layer1.0.downsample.0- 256 64 1 1; layer1.0.downsample.1~ 256"
        parts["conv_encoder.stem."] = """0- 32 3 3 3; 1~ 32; 3- 32 32 3 3; 4~ 32; 6- 64 32 3 3;
            7~ 64"""
        for i, c in enumerate((64, 256, 256)):
            parts[f"conv_encoder.layer1.{i}."] = f"""conv1- 64 {c} 1 1; bn1~ 64;
                conv2- 64 64 3 3; bn2~ 64; conv3- 256 64 1 1; bn3~ 256"""
    for prefix, text in parts.items():
        for name, *shape in map(str.split, text.split(";")):
            for end, dimensions in ENDS[name[-1]].items():
                yield prefix + name[:-1] + end, tuple(map(int, shape[:dimensions]))


def authors_model(cityscapes=False, factor=1):
    """The weights: normal values seeded by the tensor's name, scaled by its kind."""
    state = {}
    for name, shape in authors_shapes(cityscapes):
        z = random_normal(zlib.crc32(name.encode()), shape) if shape else torch.tensor(0)
        if len(shape) == 1:
            z = 0.1 * (z.abs() if name.endswith("var") else z) + name.endswith(("weight", "var"))
        elif shape:
            fan_in = np.float32(math.sqrt(math.prod(shape[1:])))
            z = 0.5 * z if name.endswith(("cls_token", "pos_embed")) else z / fan_in
        state[name] = z * factor if name.startswith("decode_head.head.") else z
    return semivl.load_authors_checkpoint(state, unit_rows(b"text", 5), heads=2)


authors = pytest.fixture(scope="module")(lambda: authors_model())


def random_normal(seed: int, shape) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def unit_rows(name: bytes, rows: int) -> torch.Tensor:
    return F.normalize(random_normal(zlib.crc32(name), (rows, 512)), dim=1)


CONCEPTS = unit_rows(b"concepts", 9), [3, 2, 1, 1, 2]  # of five classes


def pixels(seed=7, shape=(2, 3, 128, 128)) -> torch.Tensor:
    """The authors' normalised random images, as they were before normalising."""
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (semivl.IMAGENET_MEAN, semivl.IMAGENET_STD))
    return random_normal(seed, shape) * std + mean


def drop_odd_channels(features, p=0.5):
    """Feature dropout without chance."""
    return 2 * features * (torch.arange(features.shape[1]) % 2 == 0)[:, None, None]


def assert_golden(prefix="", atol=1e-5, **arrays):
    for name, array in arrays.items():
        flat, expected = array.detach().flatten().double(), ARRAYS[prefix + name]
        spread = np.linspace(0, len(flat) - 1, 16).astype(int)[[10, 15]]
        values = [*flat[1:4], *flat[spread], flat.mean(), flat.abs().max()]
        np.testing.assert_allclose(values, expected, rtol=0, atol=atol, err_msg=prefix + name)


def test_every_stage_of_the_forward_pass_equals_the_authors(authors):
    images, decoder, text = pixels(), authors.decoder, authors.text
    dense, skips = authors.clip(images)
    whole = authors.clip.visual((images - authors.clip.mean) / authors.clip.std)  # open_clip's own
    similarity = semivl.cosine_maps(dense, text)
    spatial = decoder.spatial_reasoning(similarity)
    semantic = decoder.semantic_reasoning(spatial, text)
    assert_golden(
        skip_layer0=skips[0],
        skip_layer4=skips[1],
        dense_embed=dense,
        sim=similarity,
        global_embed=F.normalize(whole, dim=1),
        aspp_out=spatial.flatten(0, 1),
        semantic_out=semantic.transpose(1, 2),
        dec_lowres=decoder(dense, skips, text),
        logits=authors(images),
    )


def test_features_of_an_image_of_odd_size_equal_the_authors(authors):
    dense, skips = authors.clip(pixels(7, (1, 3, 65, 55)))
    assert dense.shape == (1, 512, 5, 4)
    assert_golden("odd ", skip_layer0=skips[0], skip_layer4=skips[1], dense_embed=dense)


def test_cityscapes_variant_with_its_convolutional_skip_equals_the_authors():
    model, images = authors_model(cityscapes=True), pixels()
    dense, (_, skip4) = model.clip(images)
    assert_golden(
        "cityscapes ", skip4=skip4, embed=dense, conv=model.conv(images)[-1], logits=model(images)
    )


@pytest.mark.parametrize(
    "conf, counts, grid",
    [
        (0.9, {3: 3991, 4: 5081, 255: 23696}, [3, 3, 255, 255, 3, 255, 255, 4]),
        (0.3, {1: 337, 3: 13481, 4: 18950}, [3, 3, 3, 3, 3, 3, 4, 4]),
    ],
)
def test_guidance_labels_equal_the_authors(authors, conf, counts, grid):
    guidance = semivl.FrozenGuidance(authors.clip, *CONCEPTS, conf)
    labels = guidance.labels(images := pixels())
    assert dict(zip(*(t.tolist() for t in labels.unique(return_counts=True)))) == counts
    assert labels[0, 0, ::16].tolist() == grid
    assert_golden(certainty=guidance(images).softmax(1).max(1)[0])


@pytest.mark.parametrize("settings, known, norms", STEPS)
def test_losses_and_gradients_of_a_step_equal_the_authors(settings, known, norms, monkeypatch):
    conf, factor = settings
    known, norms = ([float(number) for number in text.split()] for text in (known, norms))
    monkeypatch.setattr(F, "dropout2d", drop_odd_channels)
    student = authors_model(factor=factor)
    guidance = semivl.FrozenGuidance(semivl.frozen_copy(student.clip), *CONCEPTS, 0.7)
    batch = {name: 255 * pixels(11 + n) for n, name in enumerate(("x", "w", "s1", "s2"))}
    y = torch.from_numpy(np.random.RandomState(15).randint(0, 5, (2, 128, 128)))
    padding = torch.zeros(2, 128, 128, dtype=torch.bool)
    y[:, :8], padding[0, -16:] = IGNORE, True
    boxes = [[64, 16, 128, 80], [0, 0, 0, 0]], [[64, 64, 128, 128]] * 2
    batch |= dict(
        y=y, padding=padding, s1_box=torch.tensor(boxes[0]), s2_box=torch.tensor(boxes[1])
    )
    cfg = Config(batch=2, conf_thresh=conf, steps=4)
    teacher = semivl.EMATeacher(student, 0).model
    losses = semivl.training_step(student, teacher, guidance, batch, cfg, step=1)
    own = semivl.make_targets(teacher, guidance, batch["w"] / 255, padding)
    kept = (own.confidence[~padding] >= conf).double().mean().item()
    assert losses.pop("kept").item() == pytest.approx(kept, rel=1e-6)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        dict(zip(LOSSES, known)), rel=0, abs=1e-5
    )
    for group, norm in zip(GROUPS, norms, strict=True):
        square = sum(
            p.grad.double().square().sum()
            for name, p in student.named_parameters()
            if name.startswith(group) and p.grad is not None
        )
        assert math.sqrt(square) == pytest.approx(norm, rel=1e-4), group
    assert (own.clip_label == 4).sum() == 12364


def test_window_average_equals_the_authors(authors):
    logits = semivl.sliding_window(authors, pixels(21, (1, 3, 150, 300)), 128, 106)
    logits = F.interpolate(logits, (180, 360), mode="bilinear", align_corners=True)
    assert_golden("window ", average=logits, atol=2e-5)
    prediction = logits.argmax(1)[0]
    assert prediction.flatten().bincount().tolist() == [22232, 4377, 31751, 2893, 3547]
    truth = torch.from_numpy(np.random.RandomState(22).randint(0, 5, (180, 360)))
    for rows, hits, mean in (
        (0, [4550, 837, 6377, 545, 726], 8.93640294176507),
        (20, [4115, 699, 5680, 471, 646], 8.904680799734669),
    ):
        truth[:rows] = IGNORE
        matrix = semivl.confusion_matrix(prediction, truth, 5)
        assert matrix.diag().tolist() == hits
        assert semivl.iou_per_class(matrix).mean().item() == pytest.approx(mean, abs=1e-9)


def test_window_probabilities_equal_the_authors_with_one_resize(authors):
    scores = semivl.sliding_window(authors, pixels(21, (1, 3, 150, 310)), 128, 85, "probabilities")
    counts = scores.argmax(1).flatten().bincount()
    more = counts - torch.tensor([15903, 4131, 20706, 3233, 2527])
    assert more.abs().max() <= 3  # near-ties may fall either way on another processor


def test_learning_rate_equals_the_authors():
    rates = [semivl.learning_rate(0.001, step, 100) for step in (0, 1, 2, 50, 99)]
    assert rates == pytest.approx([0.001 * n**0.9 for n in (1, 1, 0.99, 0.51, 0.02)], rel=1e-12)


# The authors' recipes and words -------------------------------------------------------------------
# Columns: labels, rates of decoder and ViT, epochs, steps (0: as many as the epochs have), crop,
# fit, weighting, shallow skip from a ResNet, decoder's text, windows of an image of 375 x 500.
RECIPES = {
    "voc": (92, 1e-3, 1e-6, 80, 0, 512, True, "pixel", False, "names", [(512, 512)] * 2),
    "coco": (232, 4e-3, 4e-7, 10, 0, 512, False, "pixel", False, "names", [(375, 500)]),
    "ade20k": (158, 4e-3, 4e-7, 40, 0, 512, True, "pixel", False, "names", [(512, 512)] * 2),
    "cityscapes": (100, 5e-4, 5e-6, 80, 83_760, 801, False, "mean", True, "mean", [(375, 500)]),
}
SHARED_BY_ALL = dict(batch=8, conf_thresh=0.95, guidance=0.1, guidance_conf_thresh=0.9)
SHARED_BY_ALL |= dict(
    weight_decay=0.01, scale_min=0.5, scale_max=2.0, ema=0.996, finetune="spatial"
)
SHARED_BY_ALL |= dict(decoder="language", decoder_channels=128, definitions=True, unlabelled=True)
SHARED_BY_ALL |= dict(authors_clip=False, clip="ViT-B-16-quickgelu")


def windows_of(cfg: Config, height: int, width: int) -> list[tuple]:
    """Sizes of the windows in which `segment` shows an image to the model."""
    sizes = []

    def model(images):
        sizes.append(tuple(images.shape[2:]))
        return images

    semivl.segment(model, Image.new("RGB", (width, height)), cfg, torch.device("cpu"))
    return sizes


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_the_authors_settings(name):
    cfg = Config(**semivl.PRESETS[name])
    *recipe, windows = RECIPES[name]
    columns = "labels lr vit_lr epochs steps crop fit weighting conv_skip decoder_text".split()
    assert [getattr(cfg, column) for column in columns] == recipe
    assert {key: getattr(cfg, key) for key in SHARED_BY_ALL} == SHARED_BY_ALL
    assert windows_of(cfg, 375, 500) == windows


def test_windows_stride_as_the_authors_do():
    voc, coco, cityscapes = (
        Config(**semivl.PRESETS[name]) for name in ("voc", "coco", "cityscapes")
    )
    assert windows_of(voc, 100, 500) == [(512, 512)] * 6  # as 512 x 2560: 0, 426, ... 2048
    assert windows_of(coco, 600, 939) == [(512, 512)] * 6  # 0, 88; 0, 426, 427
    rows, columns = (801, 490), (801, 801, 801, 446)  # from 0, 534, ... to the image's end
    assert windows_of(cityscapes, 1024, 2048) == [(h, w) for h in rows for w in columns]


@pytest.mark.parametrize("name, digest", [("voc", "daaa22ad"), ("cityscapes", "e15cf9e6")])
def test_definitions_are_the_published_ones(name, digest):
    pairs = [[key, words.split("|")] for key, words in semivl.CONCEPTS[name].items()]
    assert hashlib.sha256(json.dumps(pairs).encode()).hexdigest().startswith(digest)
    assert [*semivl.CONCEPTS[name]] == data_prep.class_names(name)


ADE20K_LISTS = "5b28d705 78f423b1 0a2f3b29 85cb4de0 73d45bc8"


def test_lists_of_ade20k_are_the_published_ones():
    digests = dict(zip((158, 316, 632, 1263, 2526), ADE20K_LISTS.split()))
    for count, digest in digests.items():
        text = data_prep.ade20k_list(f"{count}/labeled.txt")
        assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


def test_every_parameter_that_trains_has_the_rate_of_its_group():
    visual = open_clip.CLIP(**data_prep.TOY_CLIP).visual
    cfg = Config(crop=64, conv_skip=True, lr=1e-3, vit_lr=1e-6)
    student = semivl.build_model(cfg, visual, torch.randn(3, 64))
    decoder, vit = semivl.make_optimizer(student, cfg).param_groups
    names = {p: name for name, p in student.named_parameters()}
    assert {*map(names.get, decoder["params"])} == {
        name for name in names.values() if name.startswith("decoder.")
    }
    assert {*map(names.get, vit["params"])} == {
        name
        for name in names.values()
        if name.startswith("conv.") or ".attn." in name or name.endswith("positional_embedding")
    }
    assert (decoder["lr"], vit["lr"]) == (1e-3, 1e-6)
    for group in (decoder, vit):
        assert group["weight_decay"] == 0.01 and group["betas"] == (0.9, 0.999)
    trained = {p for p in student.parameters() if p.requires_grad}
    assert trained == {*decoder["params"], *vit["params"]}


# CLIP, language, networks -------------------------------------------------------------------------
def test_spatial_fine_tuning_trains_attention_and_position_only(authors):
    trained = [n.split(".")[-2] for n, p in authors.clip.named_parameters() if p.requires_grad]
    assert {*trained} == {"attn", "out_proj", "visual"} and len(trained) == 49
    for mode in ("all", "none"):
        clip = semivl.spatial_fine_tuning(tiny_model().clip, mode)
        assert {p.requires_grad for p in clip.parameters()} == {mode == "all"}


def test_what_would_be_computed_wrongly_is_refused():
    scaled = open_clip.transformer.VisionTransformer(
        32, 8, 32, 2, 2, 4, output_dim=8, block_type="custom", scale_attn_inner=True
    )
    for function, *arguments in (
        (semivl.DenseCLIP, scaled),
        (semivl.DenseCLIP, nn.Identity()),
        (semivl.spatial_fine_tuning, nn.Identity(), "Spatial"),
        (semivl.window_starts, 1, 1, 1, "logit"),
        (semivl.sliding_window, None, torch.zeros(1, 3, 9, 9), 4, 5),
        (semivl.consistency_loss, *[None] * 5, "pixels"),
        (semivl.describe_classes, None, {}, "Mean"),
    ):
        with pytest.raises(semivl.UserError):
            function(*arguments)


MODES = {name: get_args(kind) for name, kind in Config.__annotations__.items() if get_args(kind)}


@pytest.mark.parametrize("name", MODES)
def test_a_misspelt_mode_is_refused(name):
    with pytest.raises(ValueError, match=f"{semivl.option(name)}: take one of "):
        Config(**{name: "Mean"})


def test_definitions_average_for_the_decoder_and_stand_apart_for_guidance():
    clip = open_clip.CLIP(**data_prep.TOY_CLIP)
    classes = {"ground": ["grass", "sand"], "car": ["car"]}
    text, _, concepts, sizes = semivl.describe_classes(clip, classes, decoder_text="mean")
    raw = semivl.encode_text(clip, ["grass", "sand"])
    torch.testing.assert_close(text[0], F.normalize(raw.mean(0), dim=0))
    assert sizes == [2, 1]
    torch.testing.assert_close(concepts[:2], F.normalize(raw, dim=1))
    text, names, concepts, _ = semivl.describe_classes(clip, classes, definitions=False)
    torch.testing.assert_close((text, concepts), (names, names))


def test_text_is_the_published_prompt():
    clip = open_clip.CLIP(**data_prep.TOY_CLIP).eval()
    tokens = open_clip.tokenize("a photo of a potted plant", clip.context_length)
    for written in ("potted plant", "potted_plant", "_potted_plant_"):
        assert torch.equal(semivl.encode_text(clip, [written]), clip.encode_text(tokens).float())


@pytest.mark.parametrize("authors", [False, True])
def test_clip_computes_quickgelu_and_the_authors_gelu_with_their_eps(authors):
    cfg = Config(clip_weights="none", authors_clip=authors)
    clip, _ = semivl.load_clip(cfg)  # the default one: ViT-B-16-quickgelu
    student = semivl.build_model(cfg, clip.visual, torch.randn(2, 512))
    x = torch.linspace(-3, 3, 50)
    known = (1 + torch.erf(x / 2**0.5)) / 2 if authors else torch.sigmoid(1.702 * x)
    for block in student.clip.visual.transformer.resblocks:
        torch.testing.assert_close(block.mlp.gelu(x), x * known)
    norms = [module for module in student.clip.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 26 and {norm.eps for norm in norms} == {1e-6 if authors else 1e-5}
    mean = semivl.IMAGENET_MEAN if authors else open_clip.OPENAI_DATASET_MEAN
    assert student.clip.mean.flatten().tolist() == pytest.approx(mean)


def test_deeplab_reads_the_deep_skip_beside_the_embedding():
    decoder = semivl.VisionDecoder(512, 768, 21).eval()
    dense, deep = torch.rand(1, 512, 6, 8), torch.rand(1, 768, 6, 8)
    logits = decoder(dense, (None, deep))
    assert logits.shape == (1, 21, 6, 8)
    assert not torch.equal(logits, decoder(dense, (None, deep + 1)))
    layers = [layer for layer in decoder.modules() if isinstance(layer, nn.Conv2d)]
    found = [(c.in_channels, c.out_channels, c.kernel_size[0], c.dilation[0]) for c in layers]
    assert found == [
        *((512, 64, k, d) for k, d in ((1, 1), (3, 6), (3, 12), (3, 18), (1, 1))),
        *((320, 64, 1, 1), (768, 48, 1, 1), (112, 256, 3, 1), (256, 256, 3, 1), (256, 21, 1, 1)),
    ]


@pytest.mark.parametrize("name", ["clip.pt", "clip.safetensors"])
def test_a_file_of_clip_weights_is_loaded_whole_or_refused(name, tmp_path):
    config = dict(clip="ViT-S-32-alt", clip_weights=str(tmp_path / name))
    state = semivl.load_clip(Config(**config | {"clip_weights": "none"}))[0].state_dict()
    write = safetensors.torch.save_file if name == "clip.safetensors" else torch.save
    write(state, tmp_path / name)
    loaded = semivl.load_clip(Config(**config))[0].state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())
    write({key: state[key] for key in [*state][1:]}, tmp_path / name)
    with pytest.raises(ValueError, match=name):
        semivl.load_clip(Config(**config))


def test_plain_vits_of_open_clip_fit_and_all_others_are_refused():
    def fits(name):
        try:
            clip, _ = semivl.load_clip(Config(clip=name, clip_weights="none"))
            semivl.DenseCLIP(clip.visual, (4, 4))
        except semivl.UserError:
            return False
        return True

    with torch.device("meta"):
        fitting = {name for name in open_clip.list_models() if fits(name)}
    pattern = r"ViT-(S|M|B|L|H|g|e|bigG)-\d+(-\d+)?(-plus.*|-alt|-quickgelu)?"
    assert fitting == {name for name in open_clip.list_models() if re.fullmatch(pattern, name)}


def test_the_teacher_follows_the_formula():
    student = tiny_model().train()
    teacher = semivl.EMATeacher(student, decay=0.9)
    assert not any(module.training for module in teacher.model.modules())
    name, weight = next((n, p) for n, p in student.named_parameters() if p.requires_grad)
    expected = weight.detach().clone()
    for step in range(15):
        weight.data += 1
        decay = min(1 - 1 / (step + 1), 0.9)
        expected = decay * expected + (1 - decay) * weight.detach()
        teacher.update(student, step)
    torch.testing.assert_close(dict(teacher.model.named_parameters())[name].data, expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_groups_of_classes_change_nothing(monkeypatch, recompute):
    decoder, results = semivl.LanguageGuidedDecoder(16, 8, 8), []
    dense, shallow, deep = (random_normal(c, (2, c, 6, 6)) for c in (16, 8, 8))
    for group in (1000, 6):  # of 2 images times 7 classes: all at once; 3, 3 and 1
        monkeypatch.setattr(semivl, "MAPS_AT_ONCE", group)
        decoder.recompute = recompute and group == 6
        logits = decoder(dense, (shallow, deep), random_normal(1, (7, 16)))
        results.append([logits, *torch.autograd.grad(logits.square().mean(), decoder.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


# Losses, CutMix, evaluation -----------------------------------------------------------------------
def random_targets():
    torch.manual_seed(0)
    label, guidance = torch.randint(3, (2, 2, 8, 8))
    padding = F.pad(torch.ones(1, 3, 8), (0, 0, 5, 0, 0, 1)).bool()  # of image 0, below row 5
    targets = Targets(label, torch.rand(2, 8, 8), padding, guidance.masked_fill(padding, IGNORE))
    return torch.randn(2, 3, 8, 8), targets


@pytest.mark.parametrize("weighting", ["pixel", "mean"])
def test_consistency_loss_is_the_written_formula(weighting):
    (logits, t), total = random_targets(), 0.0
    t.confidence[0, 0, 0] = 0.6  # reaches the threshold
    for z, label, confidence, padding in zip(logits, *t[:3]):
        kept = [(i, j) for i in range(8) for j in range(8) if not padding[i, j]]
        sure = {place: float(confidence[place] >= 0.6) for place in kept}
        weights = {"pixel": sure, "mean": dict.fromkeys(kept, confidence[~padding].mean().item())}
        weights = weights[weighting]
        total -= sum(weights[i, j] * float(z[:, i, j].log_softmax(0)[label[i, j]]) for i, j in kept)
    loss = semivl.consistency_loss(logits, *t[:3], conf_thresh=0.6, weighting=weighting)
    assert loss.item() == pytest.approx(total / int((~t.padding).sum()), rel=1e-5)


def test_cutmix_moves_image_and_all_targets_together():
    value, box = torch.arange(128).reshape(2, 8, 8), torch.tensor([[2, 1, 5, 7], [0, 0, 0, 0]])
    expected = value.clone()
    expected[0, 2:5, 1:7] = value[1, 2:5, 1:7]
    (image, mine), (mixed, right) = (
        (v[:, None].repeat(1, 3, 1, 1), Targets(v, v.float(), v % 2 == 0, v + 1))
        for v in (value, expected)
    )
    assert torch.equal(semivl.cutmix(image, box), mixed)
    assert all(map(torch.equal, mine.mixed(box), right))


def test_miou_is_over_the_classes_that_occur():
    prediction, truth = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, IGNORE])
    iou = semivl.iou_per_class(semivl.confusion_matrix(prediction, truth, 4))
    assert iou[:2].tolist() == [50, 50] and iou[2:].isnan().all() and iou.nanmean() == 50


@pytest.mark.parametrize("mode", ["logits", "probabilities"])
@pytest.mark.parametrize("fit", [True, False])
def test_classes_in_pieces_equal_those_of_all_scores_at_once(fit, mode):
    image, weight = Image.effect_noise((50, 70), 90).convert("RGB"), 5 * torch.randn(20, 3, 1, 1)
    cfg = Config(crop=32, stride=20, fit=fit, window_mode=mode)
    small = image.resize((32, 45), Image.Resampling.BILINEAR) if fit else image
    pixels = semivl.VF.pil_to_tensor(small)[None] / 255
    scores = semivl.sliding_window(lambda x: F.conv2d(x, weight), pixels, 32, 20, mode)
    scores = F.interpolate(scores, (70, 50), mode="bilinear", align_corners=True)[0]
    label = semivl.segment(lambda x: F.conv2d(x, weight), image, cfg, torch.device("cpu"))
    assert label.dtype == torch.uint8 and torch.equal(label, scores.argmax(0))


# Data and augmentation ----------------------------------------------------------------------------
def pairs(*numbers) -> bytes:
    return "".join(f"images/{i}.png masks/{i}.png\n" for i in numbers).encode()


def save(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


CLASSES = data_prep.TOY_CLASSES[:6]


def make_folder(path: Path) -> Path:
    """A small folder of images [64, 64], with six classes, by the toy world's painter."""
    painter = data_prep.Painter("test")
    content = dict(classes=CLASSES, definitions={"car": ["car", "van"]})
    save(path, {"dataset.json": json.dumps(content).encode()})
    save(path / "splits", {"train.txt": pairs(0, 1, 2, 3), "val.txt": pairs(4, 5)})
    (path / "images").mkdir(), (path / "masks").mkdir()
    for i in range(6):
        image, mask = (part.crop((0, 0, 64, 64)) for part in painter.scene())
        image.save(path / f"images/{i}.png")
        mask.point(lambda n: n % 6).save(path / f"masks/{i}.png")
    return path


folder = pytest.fixture(lambda tmp_path: make_folder(tmp_path / "images"))


def open_folder(folder: Path, **entries) -> semivl.Folder:
    """The folder, after these entries of its dataset.json have been changed."""
    content = json.loads((folder / "dataset.json").read_text()) | entries
    (folder / "dataset.json").write_text(json.dumps(content))
    return semivl.open_data(Config(dataset=str(folder)))


def test_masks_hold_class_numbers_and_255_for_no_label(folder):
    entry, data = ("images/0.png", "masks/0.png"), open_folder(folder)
    raw = np.array(Image.open(folder / "masks/0.png"))
    assert raw.max() > 0 and np.array_equal(data.pair(entry)[1], raw)
    ignored = np.where(raw == 0, np.uint8(IGNORE), raw)
    Image.fromarray(ignored).save(folder / "masks/0.png")
    assert np.array_equal(data.pair(entry)[1], ignored)


def test_photographs_are_turned_upright_and_damaged_exif_data_is_passed_over(tmp_path):
    pixels, exif, file = np.zeros((20, 30, 3), np.uint8), Image.Exif(), tmp_path / "a.png"
    pixels[:10] = 200  # bright above
    for orientation, turn, broken in ((3, 2, None), (6, 1, None), (8, 3, None), (6, 0, 20)):
        exif[0x0112] = orientation
        Image.fromarray(np.rot90(pixels, turn)).save(file, exif=exif.tobytes()[:broken])
        assert np.array_equal(semivl.read_image(file), pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_damaged_file_is_read_or_refused_in_one_line_that_names_it(kind, tmp_path):
    noise, rng = Image.effect_noise((40, 30), 90), np.random.default_rng(0)
    noise.convert("P" if kind == "GIF" else "RGB").save(file := tmp_path / "a", kind)
    whole, told = file.read_bytes(), []
    for place in rng.integers(len(whole), size=60):
        file.write_bytes(whole[:place] + (b"%c" % (place % 256) + whole[place + 1 :]) * (place % 2))
        for read, *more in ((semivl.read_image,), (semivl.read_mask, 6, (40, 30))):
            try:
                read(file, *more)
            except ValueError as error:
                told.append(str(error))
    assert len(told) > 60 and all(t.startswith(str(file)) and "\n" not in t for t in told)


def test_before_training_labelled_pixels_are_counted(folder, capsys):
    for i, values in enumerate([(0, 255), (0, 255), (1, 255), (0, 1)]):
        mask = np.uint8(values)[:, None].repeat(32, 0).repeat(64, 1)
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
    data = open_folder(folder)
    with pytest.raises(ValueError, match="2 classes or more are needed"):
        semivl.check_labelled(data, data.train[:2])
    assert {image[7] for image, _ in semivl.draw_labelled(data, 2, 0)} & {*"23"}
    capsys.readouterr()
    semivl.check_labelled(data, data.train[1:3])
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[1:3]] == [["background", "2,048"], ["car", "2,048"]]
    assert said[-1].split() == ["no", "label", "4,096"]


def test_names_with_blanks_stand_before_a_tab(folder):
    (folder / "images/0.png").rename(folder / "images/my photo 0.png")
    lines = b"images/my photo 0.png\tmasks/0.png\nimages/my photo 0.png\t\n\nimages/1.png\n"
    save(folder / "splits", {"train.txt": lines})
    data = open_folder(folder)
    photo = "images/my photo 0.png"
    assert data.train == [(photo, "masks/0.png"), (photo, None), ("images/1.png", None)]
    assert data.image(data.train[1]).size == (64, 64)


def test_labelled_images_are_drawn_by_the_seed_or_taken_from_the_list(folder):
    data = semivl.open_data(Config(dataset=str(folder)))
    assert semivl.draw_labelled(data, 2, 0) == semivl.draw_labelled(data, 2, 0)
    assert len({tuple(semivl.draw_labelled(data, 2, seed)) for seed in range(8)}) > 1
    save(folder / "splits/2", {"labeled.txt": pairs(1, 3)})
    assert [image[7] for image, _ in semivl.draw_labelled(data, 2, 5)] == ["1", "3"]


def test_definitions_of_a_folder_come_before_the_built_in_ones(folder):
    built_in = {name: words.split("|") for name, words in semivl.CONCEPTS["voc"].items()}
    content = json.loads((folder / "dataset.json").read_text())
    del content["definitions"]
    (folder / "dataset.json").write_text(json.dumps(content))
    assert open_folder(folder, classes=[*built_in]).classes == built_in
    alone = {name: [name] for name in built_in}
    assert open_folder(folder, definitions={}).classes == alone
    assert open_folder(folder, definitions={"car": ["van"]}).classes == alone | {"car": ["van"]}


def test_every_item_is_a_function_of_seed_and_position(folder):
    cfg = Config(dataset=str(folder), crop=32, fit=False)
    items = semivl.TrainingSet(data := semivl.open_data(cfg), data.train[:2], data.train[2:], cfg)
    first, state, again = items[7], torch.get_rng_state(), items[7]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are untouched
    assert first.pop("files") == again.pop("files")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["s1"], first["s2"])
    many = [items[i] for i in range(20)]
    for view in ("s1", "s2"):  # 8 % of them stay as they are
        assert sum(not torch.equal(item[view], item["w"]) for item in many) > 12
    assert sum(not torch.equal(item["s1_box"], item["s2_box"]) for item in many) > 8


def test_each_epoch_has_an_order_of_its_own():
    entries = [(f"{i}.png", None) for i in range(20)]
    items = semivl.TrainingSet(None, [], entries, Config())
    orders = [[items.pick(entries, 20 * epoch + i) for i in range(20)] for epoch in range(3)]
    assert all(sorted(order) == sorted(entries) for order in orders)
    assert len({tuple(order) for order in [entries, *orders]}) == 4


SCALED = {0.5: (256, 341), 1.0: (512, 683), 2.0: (1024, 1365), 1.001: (512, 683)}  # of 375 x 500


def test_random_scale_fits_the_image_as_published():
    for r, size in SCALED.items():
        assert semivl.random_size(375, 500, Config(scale_min=r, scale_max=r)) == size
    assert semivl.random_size(100, 500, Config(scale_min=1, scale_max=1)) == (410, 2048)


@pytest.mark.parametrize("fit", [True, False])
def test_image_and_mask_are_scaled_cropped_and_flipped_together(fit):
    # The image's colour is 40 times the mask's class, and no class is black.
    rng, compared = np.random.default_rng(0), 0
    for seed in range(40):
        torch.manual_seed(seed)
        blocks = torch.from_numpy(rng.integers(1, 6, (1, 1, 4, 5))).float()
        whole = F.interpolate(blocks, (*rng.integers(60, 200, 2),))[0, 0].byte()
        image = Image.fromarray((40 * whole).numpy()).convert("RGB")
        image, mask = semivl.scale_crop_flip(image, whole, Config(crop=96, fit=fit))
        image = semivl.VF.pil_to_tensor(image)
        assert image.shape == (3, 96, 96) and mask.shape == (96, 96)
        padding = mask == IGNORE
        assert torch.equal(image == 0, padding.expand(3, -1, -1))
        # Near a border of two classes the image is a mixture: compare where 11 x 11 pixels agree.
        classes = F.pad(mask.float(), [5] * 4)[None, None]
        flat = F.max_pool2d(classes, 11, 1) == -F.max_pool2d(-classes, 11, 1)
        flat = flat[0, 0] & ~padding
        assert torch.equal(image[:, flat], (40 * mask[flat]).expand(3, -1))
        compared += flat.sum()
    assert compared > 40 * 500


def test_crops_lie_anywhere_and_half_of_them_are_flipped():
    across = torch.arange(100, dtype=torch.uint8).expand(100, 100)
    image = semivl.VF.to_pil_image(torch.stack([across, across.T, across]))
    torch.manual_seed(0)
    cfg, flips, corners = Config(crop=64, fit=False, scale_min=1.0, scale_max=1.0), 0, []
    for _ in range(400):
        crop = semivl.VF.pil_to_tensor(semivl.scale_crop_flip(image, across, cfg)[0])
        flips += int(crop[0, 0, 0] > crop[0, 0, 1])
        corners.append([int(crop[1].min()), int(crop[0].min())])
    corners = torch.tensor(corners).double()  # top, left: 0 to 36
    assert flips / 400 == pytest.approx(0.5, abs=0.08)
    assert corners.amin(0).tolist() == [0, 0] and corners.amax(0).tolist() == [36, 36]
    assert corners.mean(0).tolist() == pytest.approx([18, 18], abs=1.5)


@pytest.mark.parametrize(
    "fit, scale, expected", [(True, 1.0, [0, 2, 5, 7]), (False, 0.4, [1, 3, 6, 8])]
)
def test_masks_take_the_nearest_pixel_as_cv2_or_pil_do(fit, scale, expected):
    line = torch.arange(10, dtype=torch.uint8)  # becomes 4 pixels
    cfg = Config(crop=4, fit=fit, scale_min=scale, scale_max=scale)
    _, mask = semivl.scale_crop_flip(Image.new("RGB", (10, 10)), line.expand(10, 10), cfg)
    assert sorted(mask[0].tolist()) == expected


def test_padding_is_black_ignored_and_marked(folder):
    for i in range(4):
        Image.new("RGB", (40, 50), (90, 100, 110)).save(folder / f"images/{i}.png")
        Image.new("L", (40, 50), 1).save(folder / f"masks/{i}.png")
    cfg = Config(crop=64, fit=False, scale_min=1.0, scale_max=1.0)
    data = open_folder(folder)
    for i in range(8):
        item = semivl.TrainingSet(data, data.train[:2], data.train[2:], cfg)[i]
        assert item["padding"].sum() == 64 * 64 - 40 * 50
        assert torch.equal(item["padding"].expand(3, -1, -1), item["w"] == 0)
        assert torch.equal(item["y"] == IGNORE, (item["x"] == 0)[0])


def strong_views(image: np.ndarray) -> np.ndarray:
    """1000 strong views [1000, H, W, 3] of an image [H, W, 3], in float."""
    torch.manual_seed(0)
    views = [semivl.strong_view(Image.fromarray(np.uint8(image))) for _ in range(1000)]
    return np.stack([np.asarray(view, float) for view in views])


def test_strong_views_have_the_published_strength_and_move_nothing():
    bright = strong_views(np.full((32, 32, 3), 100))[:, 16, 16, 0] / 100
    assert 0.46 < bright.min() < 0.55 and 1.45 < bright.max() < 1.52
    assert np.mean(bright == 1) == pytest.approx(0.2, abs=0.06)  # jitter: 0.8
    # Contrast: the difference of two greys beside their mean, which was 0.4.
    greys = np.full((32, 32, 3), 80)
    greys[:, 16:] = 120
    views = strong_views(greys)
    low, high = views[:, 16, 0, 0], views[:, 16, 31, 0]
    contrast = 2 * (high - low) / (high + low) / 0.4
    assert 0.45 < contrast.min() < 0.56 and 1.44 < contrast.max() < 1.62
    # Where the blur does not reach, the two halves stay where they are, each of one colour.
    for half in (views[:, :, :8], views[:, :, 24:]):
        assert np.ptp(half, axis=(1, 2)).max() == 0
    # Hue and grey of a red.
    reds = strong_views(np.full((32, 32, 3), (150, 90, 90)))[:, 16, 16]
    grey = np.ptp(reds, axis=1) == 0
    assert grey.mean() == pytest.approx(0.2, abs=0.06)
    hue = np.array([colorsys.rgb_to_hsv(*red)[0] for red in reds[~grey].tolist()])
    turn = (hue + 0.5) % 1 - 0.5
    assert -0.27 < turn.min() < -0.22 and 0.22 < turn.max() < 0.27
    # Blur: how much of a point's light stays at its place; for sigma 2 it is 4 %.
    point = np.zeros((32, 32, 3))
    point[16, 16] = 250
    points = strong_views(point)[..., 0]
    share = points[:, 16, 16] / points.sum((1, 2))
    assert np.mean(share == 1) == pytest.approx(0.5, abs=0.15)
    assert 0.03 < share.min() < 0.06


def test_cutmix_boxes_have_the_published_distribution():
    torch.manual_seed(0)
    boxes = torch.stack([semivl.cutmix_box(100) for _ in range(4000)]).double()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 100**2
    assert (area == 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    drawn = area[area > 0]
    assert drawn.mean().item() == pytest.approx(0.21, abs=0.01)
    assert drawn.min() > 0.015 and drawn.max() <= 0.4 and boxes.max() <= 100


# Runs ---------------------------------------------------------------------------------------------
TINY = (
    "--clip toy --clip-weights none --crop 32 --fit off --stride 32 --batch 2 --micro-batch 2 "
    "--workers 0 --conf-thresh 0.1 --guidance-conf-thresh 0.1 --lr 1e-3 --vit-lr 5e-4 --device cpu "
    "--labels 2 --steps 4 --evals 1"
).split()
LONG = "--steps 12 --evals 3 --save-every 3".split()


def run(folder, out, *options):
    return semivl.main(["--dataset", str(folder), *TINY, "--out", str(out), *map(str, options)])


def logged(out: Path) -> list[dict]:
    """The steps of log.jsonl; validation has lines of its own."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_miou" not in line]


def assert_resumes_to(whole: Path, out: Path):
    assert semivl.main(["--resume", str(out)]) == 0
    assert_equal_runs(whole, out)


def assert_equal_runs(*runs: Path):
    """The same weights, averaged weights and moments of the optimiser, bit for bit."""
    one, other = (
        [content["student"], content["model"], content["optimizer"]["state"]]
        for content in (semivl.load_file(path / "last.pt") for path in runs)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_run_moves_what_trains_and_nothing_else(folder, tmp_path):
    assert run(folder, out := tmp_path / "run") == 0
    torch.manual_seed(0)
    clip, _ = semivl.load_clip(Config(clip="toy", clip_weights="none"))
    fresh = semivl.build_model(Config(crop=32), clip.visual, torch.randn(6, 64))
    student = semivl.load_file(out / "last.pt")["student"]
    for name, p in fresh.clip.named_parameters():
        # The last block's q and k feed nothing; their rows move by weight decay alone.
        assert torch.equal(p, student[f"clip.{name}"]) == (not p.requires_grad), name
    assert [line["step"] for line in logged(out)] == [1, 2, 3, 4]
    last = logged(out)[-1]
    assert last["kept"] > 0 and last.keys() > {*"x s2 fp guidance_s1 total lr seconds".split()}
    files = "semivl.py log.jsonl last.pt best.pt sheet.png result.json".split()
    assert {file.name for file in out.iterdir()} == {*files}


@pytest.mark.parametrize("definitions, models", [({"car": ["car", "van"]}, 2), ({}, 1)])
def test_clip_by_definitions_is_compared_where_there_are_some(
    definitions, models, folder, tmp_path, capsys
):
    open_folder(folder, definitions=definitions)
    assert run(folder, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "by names" in said and ("by definitions" in said) == (models == 2)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert len(result["val"]) == models + 1
    assert result["val"]["SemiVL"]["mIoU"] == pytest.approx(result["val_last"])


def test_a_run_that_has_ended_goes_on_to_more_steps(whole, tmp_path):
    ended = shutil.copytree(whole, tmp_path / "ended")
    assert_resumes_to(whole, ended)
    assert semivl.main(["--resume", str(ended), "--steps", "14"]) == 0
    assert semivl.load_file(ended / "last.pt")["step"] == len(logged(ended)) == 14


ENDS_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
]


@pytest.mark.parametrize("error", [*ENDS_OF_MEMORY, KeyError("a bug"), RuntimeError("a bug")])
def test_a_lack_of_memory_has_one_line_and_a_bug_its_traceback(
    error, folder, tmp_path, monkeypatch, capsys
):
    def loss(*_, **__):
        raise error

    monkeypatch.setattr(semivl, "semivl_loss", loss)
    if error not in ENDS_OF_MEMORY:
        with pytest.raises(type(error), match="a bug"):
            run(folder, tmp_path / "run")
        return
    assert run(folder, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "--micro-batch 1" in said and len(said.splitlines()) == 1


def test_each_process_takes_its_own_gpu_first(monkeypatch):
    taken = []
    monkeypatch.setattr(semivl, "WORLD", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", taken.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: taken.append("memory"))
    assert semivl.pick_device("cuda") == torch.device("cuda:1")
    assert taken == [torch.device("cuda:1"), "memory", "nccl"]


def test_a_third_strong_view_is_one_more_key(folder, tmp_path, monkeypatch):
    def make_targets(teacher, guidance, *more, old=semivl.make_targets):
        assert not teacher.training and isinstance(guidance, semivl.FrozenGuidance)
        return old(teacher, guidance, *more)

    monkeypatch.setattr(semivl, "make_targets", make_targets)
    monkeypatch.setitem(semivl.STRONG_VIEWS, "s3", semivl.v2.RandomInvert(1.0))
    assert run(folder, tmp_path / "run", "--steps", 2) == 0
    for line in logged(tmp_path / "run"):
        assert line["s3"] > 0 and line["guidance_s3"] > 0
        L, G = (
            sum(line[k + v] for v in ("s1", "s2", "s3")) / 6 + line[k + "fp"] / 2
            for k in ("", "guidance_")
        )
        G *= 0.1 * (1 - (line["step"] - 1) / 2)
        assert line["total"] == pytest.approx((line["x"] + L) / 2 + G, rel=1e-5)


def test_every_view_goes_with_the_targets_of_its_pixels(monkeypatch):
    # Here the colours of w say what its targets are, and strong views are w itself. So after CutMix
    # the colours of each view, also those that were pasted, must still say its targets.
    def targets_of(images):
        red, green, blue = (255 * images).round().long().unbind(1)
        return Targets(red % 6, green / 255, (images == 0).all(1), blue % 6)

    def student(images, num_perturbed):
        assert num_perturbed == 2
        seeds.add(torch.initial_seed())
        return images  # for logits

    def loss(logits, y, targets, **more):
        assert [*logits] == ["x", "s1", "s2", "fp"] and [*targets] == ["s1", "s2", "fp"]
        for view, known in targets.items():
            assert all(map(torch.equal, known, targets_of(logits[view])))
        pasted.append([(logits[view] != logits["fp"]).any().item() for view in ("s1", "s2")])
        return {"total": torch.zeros((), requires_grad=True)}

    seeds, pasted = set(), []
    torch.manual_seed(0)
    x, w = torch.randint(1, 256, (2, 4, 3, 16, 16))
    w[1, :, 10:] = 0  # padding
    boxes = torch.tensor([[2, 3, 9, 12], [0, 0, 0, 0], [5, 0, 16, 16], [1, 1, 2, 2]])
    batch = dict(x=x, w=w, s1=w, s2=w, s1_box=boxes, s2_box=boxes.flip(0), y=w[:, 0] % 6)
    batch["padding"] = (w == 0).all(1)
    monkeypatch.setattr(semivl, "make_targets", lambda _, __, images, ___: targets_of(images))
    monkeypatch.setattr(semivl, "semivl_loss", loss)
    for step in (0, 1):
        cfg = Config(batch=4, micro_batch=2, steps=2)
        semivl.training_step(student, None, None, batch, cfg, step)
    assert pasted == [[True, True]] * 4 and len(seeds) == 4  # two micro-batches in each step


def test_the_last_images_of_a_batch_lose_half_of_their_channels(monkeypatch):
    model, images, dropped = tiny_model().eval(), torch.rand(4, 3, 64, 64), []

    def dropout2d(features, p):
        dropped.append((*features.shape[:2], p))
        return features * 0

    monkeypatch.setattr(F, "dropout2d", dropout2d)
    plain, perturbed = model(images), model(images, num_perturbed=1)
    assert dropped == [(1, 64, 0.5), (1, 96, 0.5), (1, 96, 0.5)]  # embedding, two skips
    torch.testing.assert_close(perturbed[:3], plain[:3], rtol=0, atol=1e-5)
    assert not torch.allclose(perturbed[3:], plain[3:], rtol=0, atol=1e-2)


def test_bf16_changes_losses_by_little_and_similarities_not_at_all(folder, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert run(folder, out, "--steps", 1, "--conf-thresh", 0, "--precision", precision) == 0
        losses[precision] = logged(out)[0]
    assert losses["bf16"]["total"] != losses["fp32"]["total"]
    for name in LOSSES[:4] + ["total"]:
        assert losses["bf16"][name] == pytest.approx(losses["fp32"][name], rel=0.02), name
    dense, text = random_normal(1, (1, 64, 4, 4)).bfloat16(), random_normal(2, (5, 64))
    known = semivl.cosine_maps(dense.float(), text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(semivl.cosine_maps(dense, text), known)


def test_rates_follow_the_schedule_in_both_groups(whole):
    rates = [line["lr"] for line in logged(whole)]
    for step, rest in ((0, 1), (1, 1), (6, 7 / 12), (11, 2 / 12)):
        assert rates[step] == pytest.approx([1e-3 * rest**0.9, 5e-4 * rest**0.9])


def test_best_is_the_first_step_of_the_best_validation(whole):
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    miou = {line["step"]: line["val_miou"] for line in lines if "val_miou" in line}
    best = semivl.load_file(whole / "best.pt")
    assert len(miou) == 3 and best["val_best"] == max(miou.values())
    assert best["step"] == max(miou, key=miou.get) and "student" not in best


def test_epochs_are_passes_over_the_unlabelled_images(folder, tmp_path):
    options = "--steps 0 --epochs 2 --labels 1 --batch 1 --micro-batch 1".split()
    assert run(folder, tmp_path / "run", *options) == 0
    assert len(logged(tmp_path / "run")) == 2 * 3


def make_patterns(path: Path) -> Path:
    """Three classes, which are patterns. In the training images each class also has its colour;
    in the validation images colours are drawn. One image is labelled, seven are not."""
    rng, (y, x) = np.random.default_rng(0), np.indices((64, 64))
    colours = np.array([[200, 60, 60], [60, 190, 60], [60, 60, 200]])
    for name in ("images", "masks"):
        (path / name).mkdir(parents=True)

    def quarters(numbers):
        return numbers.reshape(2, 2).repeat(32, 0).repeat(32, 1)  # [64, 64]

    for i in range(16):
        mask = quarters(rng.permutation(4) % 3)
        colour = mask if i < 8 else quarters(rng.integers(3, size=4))
        light = np.choose(mask, [1 + 0 * x, x // 4 % 2, y // 4 % 2])  # plain, two kinds of stripes
        image = colours[colour] * (0.3 + 0.7 * light[..., None]) + rng.normal(0, 8, (64, 64, 3))
        Image.fromarray(np.uint8(image.clip(0, 255))).save(path / f"images/{i}.png")
        Image.fromarray(np.uint8(mask)).save(path / f"masks/{i}.png")
    classes = {"classes": ["plain", "upright", "level"]}
    save(path, {"dataset.json": json.dumps(classes).encode()})
    save(path / "splits/1", {"labeled.txt": pairs(0)})
    save(path / "splits", {"train.txt": pairs(*range(8)), "val.txt": pairs(*range(8, 16))})
    return path


def test_unlabelled_images_teach_what_one_mask_cannot(tmp_path):
    # From the mask alone colour and pattern explain the classes equally well. Unlabelled images are
    # recoloured at random, so only the pattern is consistent.
    folder, miou = make_patterns(tmp_path / "patterns"), {}
    options = (
        "--labels 1 --crop 64 --scale-min 1 --scale-max 1 --decoder vision --finetune all "
        "--guidance 0 --ema 0.9 --conf-thresh 0.5 --vit-lr 1e-3 --steps 100"
    ).split()
    for unlabelled in ("off", "on"):
        out = tmp_path / unlabelled
        assert run(folder, out, *options, "--unlabelled", unlabelled) == 0
        miou[unlabelled] = json.loads((out / "result.json").read_text())["val_last"]
    assert miou["on"] > miou["off"] + 20


def test_micro_batches_accumulate_to_the_whole_batch(folder, tmp_path, monkeypatch):
    # Dropout would draw other numbers. Without padding every image has as many valid pixels.
    monkeypatch.setattr(F, "dropout2d", lambda f, p: f)
    options = "--steps 1 --conf-thresh 0 --scale-min 1.5 --micro-batch".split()
    for size in (2, 1):
        assert run(folder, tmp_path / str(size), *options, size) == 0
    one, other = (logged(tmp_path / str(size))[0] for size in (2, 1))
    assert one["total"] == pytest.approx(other["total"], rel=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, beside its folder of images."""
    path = tmp_path_factory.mktemp("whole")
    assert run(make_folder(path / "images"), path / "run", *LONG) == 0
    return path / "run"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_run_goes_on_to_the_same_weights(workers, whole, tmp_path):
    command = [sys.executable, semivl.__file__, "--dataset", whole.parent / "images", *TINY, *LONG]
    command += ["--workers", workers, "--out", killed := tmp_path / "killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = killed / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(logged(killed)) >= 5):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert semivl.load_file(killed / "last.pt")["step"] in (0, 3, 4, 6, 8)
    assert_resumes_to(whole, killed)
    assert [line["step"] for line in logged(killed)] == [*range(1, 13)]  # none twice


def test_an_interrupted_run_goes_on_from_its_last_save(whole, tmp_path, monkeypatch, capsys):
    def interrupted(self, student, step, update=semivl.EMATeacher.update):
        if step == 4:
            raise KeyboardInterrupt
        update(self, student, step)

    with monkeypatch.context() as patch:
        patch.setattr(semivl.EMATeacher, "update", interrupted)
        assert run(whole.parent / "images", stopped := tmp_path / "stopped", *LONG) == 130
    told = "semivl.py: interrupted; --resume RUN goes on with a run\n"
    assert capsys.readouterr().err == told
    assert semivl.load_file(stopped / "last.pt")["step"] < 5
    assert_resumes_to(whole, stopped)


def test_a_loss_that_is_not_finite_stops_before_anything_is_written(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "run", "--lr", "1e30", "--steps", 50) == 2
    assert "lower --lr, or look at ['images/" in capsys.readouterr().err
    assert len(logged(tmp_path / "run")) < 50
    student = semivl.load_file(tmp_path / "run/last.pt")["student"]
    assert all(tensor.isfinite().all() for tensor in student.values())


def test_a_run_goes_on_with_its_own_lists_or_with_those_that_are_named(whole, tmp_path, capsys):
    shutil.copytree(whole.parent, tmp_path / "a")
    data, run = tmp_path / "a/images", tmp_path / "a/run"
    content = semivl.load_file(run / "last.pt")
    content["config"]["dataset"] = str(data)
    torch.save(content, run / "last.pt")
    save(data / "splits", {"train.txt": pairs(0, 1, 2)})
    assert semivl.main(["--resume", str(run)]) == 2
    assert "images: its lists or classes changed" in capsys.readouterr().err
    save(data / "splits", {"train.txt": pairs(0, 1, 2, 3)})
    data.rename(tmp_path / "moved")
    assert semivl.main(["--resume", str(run)]) == 2 and "--dataset" in capsys.readouterr().err
    assert semivl.main(["--resume", str(run), "--dataset", str(tmp_path / "moved")]) == 0


def test_a_run_that_is_going_on_is_not_resumed_by_another_process(whole, tmp_path):
    pytest.importorskip("fcntl")
    run = semivl.Run(out := shutil.copytree(whole, tmp_path / "run"), {}, {})
    done = subprocess.run([sys.executable, semivl.__file__, "--resume", out], capture_output=True)
    assert done.returncode == 2 and b"another process is at work" in done.stderr
    run.file.close()


def start(processes: int, *command) -> str:
    """Runs a script of Python, by torchrun if there are several processes; what it printed."""
    several = f"-m torch.distributed.run --standalone --nproc-per-node={processes}".split()
    command = [sys.executable, *several * (processes > 1), *map(str, command)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(semivl.__file__).parent)}
    done = subprocess.run(command, text=True, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes, each of which leaves its student and teacher as `two0` and `two1`;
    two-killed is the run's folder as a kill in the third step would have left it."""
    path = tmp_path_factory.mktemp("two")
    save(make_folder(path / "images") / "splits", {"val.txt": pairs(3, 4, 5)})  # shared unevenly
    spy = path / "spy.py"
    spy.write_text("""
import os, shutil, sys, semivl, torch
out, rank = sys.argv[-1], os.environ["RANK"]
def update(self, student, step, old=semivl.EMATeacher.update):
    old(self, student, step)
    torch.save([student.state_dict(), self.model.state_dict(), torch.initial_seed()], out + rank)
    if step == 2 and rank == "0":
        shutil.copytree(out, out + "-killed")
semivl.EMATeacher.update = update
code = semivl.main()
assert not torch.distributed.is_initialized()
sys.exit(code)
""")
    options = "--batch 4 --steps 5 --save-every 2 --decoder vision --out".split()
    said = start(2, spy, "--dataset", path / "images", *TINY, *options, path / "two")
    assert said.count("writes to") == 1  # one speaks for all
    return path


def test_two_processes_end_with_weights_that_one_evaluates_to_the_same_miou(two):
    (*state, seed), (*other, other_seed) = (torch.load(f"{two}/two{rank}") for rank in (0, 1))
    torch.testing.assert_close(state, other, rtol=0, atol=0)
    assert seed != other_seed  # of feature dropout
    (model, cfg, _), data = semivl.load_checkpoint(two / "two/last.pt"), open_folder(two / "images")
    miou = semivl.evaluate(model, data, data.val, cfg, torch.device("cpu")).nanmean().item()
    result = json.loads((two / "two/result.json").read_text())
    assert result["val"]["SemiVL"]["mIoU"] == pytest.approx(miou, abs=1e-4)


def test_two_processes_go_on_to_the_same_weights_after_a_kill(two):
    killed = two / "two-killed"
    assert semivl.load_file(killed / "last.pt")["step"] == 2
    start(2, semivl.__file__, "--resume", killed, "--device", "cpu")
    assert_equal_runs(two / "two", killed)


def test_two_processes_have_the_gradients_of_one(folder, tmp_path):
    # CutMix takes its partner from the images of a process, in reverse order. Two processes share
    # four images as 0, 2 and 1, 3; in the order 0, 1, 3, 2 one process has the same partners.
    spy = tmp_path / "spy.py"
    spy.write_text("""
import os, sys, semivl, test_semivl, torch
torch.nn.functional.dropout2d = test_semivl.drop_odd_channels
def step(self):
    gradients = [p.grad for group in self.param_groups for p in group["params"]]
    torch.save(gradients, sys.argv[-1] + os.environ.get("RANK", "0"))
def item(self, i, old=semivl.TrainingSet.__getitem__):
    return old(self, {2: 3, 3: 2}.get(i, i))
torch.optim.AdamW.step = step
if "RANK" not in os.environ:
    semivl.TrainingSet.__getitem__ = item
sys.exit(semivl.main())
""")
    options = "--batch 4 --micro-batch 1 --steps 1 --crop 48 --out".split()
    for processes, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        start(processes, spy, "--dataset", folder, *TINY, *options, out)
    one, both, other = (torch.load(f"{tmp_path}/{name}") for name in ("one0", "two0", "two1"))
    torch.testing.assert_close(both, other, rtol=0, atol=0)
    assert max(gradient.abs().max() for gradient in one) > 1e-3
    torch.testing.assert_close(one, both, rtol=1e-5, atol=1e-8)
    losses, shared = (logged(tmp_path / name)[0] for name in ("one", "two"))
    assert [losses[name] for name in LOSSES] == pytest.approx([shared[name] for name in LOSSES])
    assert losses["guidance_s1"] > 0 and losses["s1"] > 0


def test_semivl_alone_in_an_empty_folder_trains_resumes_evaluates_and_predicts(tmp_path):
    # On a console that cannot print a class name, on a cluster that sets WORLD_SIZE.
    alone = tmp_path / "alone"
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "WORLD_SIZE": "2"}
    how = dict(cwd=alone, text=True, capture_output=True, env=env)
    open_folder(make_folder(alone / "pictures"), classes=["天空", *CLASSES[1:]])
    shutil.copy(semivl.__file__, alone)
    config = dict(model_cfg=data_prep.TOY_CLIP, preprocess_cfg={})
    save(alone / "clip", {"open_clip_config.json": json.dumps(config).encode()})
    weights = open_clip.CLIP(**data_prep.TOY_CLIP).state_dict()
    torch.save(weights, alone / "clip/open_clip_pytorch_model.bin")
    for command in (
        "--dataset pictures --labels 2 --clip local-dir:clip --crop 32 --stride 32 --steps 2 "
        "--batch 2 --workers 0",
        "--resume runs/pictures-2",
        "--eval runs/pictures-2/last.pt",
        "--predict runs/pictures-2/last.pt pictures/images/0.png",
    ):
        done = subprocess.run([sys.executable, "semivl.py", *command.split()], **how)
        assert done.returncode == 0, done.stderr
    assert Image.open(alone / "runs/pictures-2/predictions/0-mask.png").mode == "P"
    assert any(name in done.stdout for name in ("??", *CLASSES[1:]))
    result = json.loads((alone / "runs/pictures-2/result.json").read_text("utf-8"))
    assert "天空" in result["val"]["SemiVL"]
    done = subprocess.run([sys.executable, "semivl.py"], **how)
    assert done.returncode == 2 and "data_prep.py, which makes this, is not" in done.stderr


def test_predictions_are_not_overwritten_and_have_the_size_of_the_image(whole, tmp_path, capsys):
    last, image = shutil.copy(whole / "last.pt", tmp_path), tmp_path / "photos/a.jpg"
    image.parent.mkdir()
    Image.effect_noise((70, 33), 90).convert("CMYK").save(image)
    for out in ("predictions", "predictions-2"):
        assert semivl.main(["--predict", last, str(image.parent)]) == 0
        mask = Image.open(tmp_path / out / "a-mask.png")
        assert mask.mode == "P" and mask.size == (70, 33) and np.array(mask).max() < 6
        assert Image.open(tmp_path / out / "a-overlay.png").size == (70, 33)
    assert semivl.main(["--predict", last, str(image), "--out", str(tmp_path / out)]) == 2


def test_eval_writes_what_a_run_has_and_no_empty_list(whole, tmp_path):
    command = ["--eval", str(whole / "last.pt"), "--out", str(tmp_path / "out")]
    assert semivl.main(command) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"result.json"}


# Mistakes end in one line, and nothing is left behind ---------------------------------------------
class Malicious:
    def __reduce__(self):
        return print, ("this must never run",)


def encoded(kind: str, **more) -> bytes:
    Image.new("L" if kind == "JPEG" else "P", (64, 64)).save(file := io.BytesIO(), kind, **more)
    return file.getvalue()


def two_bits() -> bytes:
    b = encoded("PNG", bits=2)  # a palette file, whose header shall say greyscale
    head = b[12:25] + b"\0" + b[26:29]
    return b[:12] + head + zlib.crc32(head).to_bytes(4, "big") + b[33:]


MISTAKES = {  # what is wrong -> (file, content or picture; or options), words of the line
    "a mask of another size": ("masks/0.png", Image.new("L", (9, 9)), "has (64, 64) upright"),
    "a mask as JPEG": ("masks/0.png", encoded("JPEG"), "no PNG"),
    "a mask of 2 bits": ("masks/0.png", two_bits(), "8 bits"),
    "a mask with a class too many": ("masks/0.png", Image.new("L", (64, 64), 77), "77"),
    "a mask of colours": ("masks/0.png", Image.new("RGB", (64, 64)), "no PNG of class numbers"),
    "a 16-bit image": ("images/0.png", Image.new("I;16", (64, 64)), "8 bits"),
    "a truncated mask": ("masks/0.png", encoded("PNG")[:60], "masks/0.png"),
    "an empty list": ("splits/train.txt", b"", "train.txt: no line"),
    "no list": ("splits/val.txt", None, "val.txt: no such file"),
    "broken json": ("dataset.json", b"{", "dataset.json"),
    "a class twice": ("dataset.json", b'{"classes": ["a", "a"]}', "different names"),
    "only one class": ("dataset.json", b'{"classes": ["sky"]}', "2 to 255"),
    "no classes": ("dataset.json", b"{}", "has no 'classes'"),
    "a folder of before": ("dataset.json", b'{"ignore_index": 0}', "makes it anew"),
    "a blank in a name": ("splits/train.txt", b"images/my 0.png masks/0.png\n", "TAB"),
    "nothing left unlabelled": ("splits/train.txt", pairs(0, 1), "--unlabelled off"),
    "more labels than masks": "--labels 200 | --labels 200",
    "unknown CLIP": "--clip ViT-Z | ViT-Z",
    "weights for a folder that has its own": "--clip toy --clip-weights bad.pt | its own weights",
    "a CLIP with a foreign text tower": "--clip roberta-ViT-B-32 | roberta-ViT-B-32",
    "QuickGELU weights for a GELU model": "--clip ViT-B-16 --clip-weights openai | quickgelu",
    "malicious weights": "--clip ViT-S-32-alt --clip-weights bad.pt | bad.pt",
    "a malicious checkpoint": "--eval bad.pt | bad.pt: holds code",
    "windows with gaps between them": "--stride 33 | is above --crop",
    "a width without an eighth": "--decoder-channels 12 | multiple of 8",
    "a crop below the patch": "--crop 7 --stride 7 | patch",
    "no such checkpoint": "--eval nowhere.pt | no such file",
    "a picture for a checkpoint": "--eval images/0.png | images/0.png: holds code, or was not",
    "no image to predict": "--predict images/0.png | name images",
    "a folder for a checkpoint": "--eval masks | is a directory",
    "a file for a run": "--resume dataset.json | dataset.json/last.pt",
    "an output folder that is taken": "--out splits | --out splits is there already",
    "a number out of range": "--conf-thresh 2 | out of range: --conf-thresh",
    "another rate beside --resume": "--resume . --lr 1 | not together with --resume: --lr",
    "an unknown folder": "--dataset nowhere | nowhere/dataset.json",
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_ends_with_one_line_and_exit_code_2(what, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({"model": Malicious()}, "bad.pt")
    save(folder / "splits/2", {"labeled.txt": pairs(0, 1)})
    mistake, options = MISTAKES[what], ["--dataset", ".", *TINY]
    if isinstance(mistake, str):
        mistake, words = mistake.split(" | ")
        is_command = mistake[:5] in ("--eva", "--res", "--pre")  # else one more option of a run
        options = options * (not is_command) + mistake.split()
    else:
        file, content, words = mistake
        Path(file).unlink()
        if isinstance(content, Image.Image):
            content.save(file)
        elif content is not None:
            Path(file).write_bytes(content)
    before = sorted(Path().rglob("*"))
    assert semivl.main(options) == 2
    said = capsys.readouterr()
    assert said.err.startswith("semivl.py: ") and len(said.err.splitlines()) == 1
    assert words in said.err and "must never run" not in said.out
    assert "weights_only" not in said.err  # torch advises to switch it off
    assert sorted(Path().rglob("*")) == before


def test_a_loader_error_ends_the_run_with_its_own_message(folder, tmp_path, capsys):
    save(folder / "splits", {"train.txt": pairs(0, 1) + b"images/none.png\n"})
    assert run(folder, tmp_path / "run", "--workers", 1) == 2
    told = f"{folder}/images/none.png: no such file or directory\n"
    assert capsys.readouterr().err.endswith(told)


# The file itself ----------------------------------------------------------------------------------
def cut_out(name: str):
    """`name` from a namespace that holds only the imports, it, and the definitions it needs."""
    body, needed, todo = ast.parse(Path(semivl.__file__).read_text()).body, set(), {name}
    places = {
        getattr(target, "id", getattr(target, "name", "")): node
        for node in body
        for target in getattr(node, "targets", [node])
    }
    while todo := todo - needed:
        needed |= todo
        todo = {*places} & {getattr(n, "id", None) for part in todo for n in ast.walk(places[part])}
    assert not needed & {"Config", "train"}, needed
    parts, namespace = [places[part] for part in needed], {"__name__": "cut_out"}
    imports = (ast.Import, ast.ImportFrom)
    nodes = [node for node in body if node in parts or isinstance(node, imports)]
    exec("\n".join(map(ast.unparse, nodes)), namespace)
    return namespace[name]


def test_each_piece_works_when_it_is_cut_out():
    images, text = torch.rand(2, 3, 32, 48), random_normal(2, (5, 64))
    clip = cut_out("DenseCLIP")(open_clip.CLIP(**data_prep.TOY_CLIP).visual)
    assert cut_out("LanguageGuidedDecoder")(64, 96, 96)(*clip(images), text).shape == (2, 5, 16, 24)
    assert cut_out("FrozenGuidance")(clip, text, [2, 3])(images).shape == (2, 2, 32, 48)
    teacher = cut_out("EMATeacher")(clip, decay=0.9)
    teacher.update(clip, step=100)
    torch.testing.assert_close(teacher.model(images)[0], clip(images)[0], rtol=0, atol=1e-6)


def test_data_prep_does_not_know_semivl():
    lines = Path(data_prep.__file__).read_text().splitlines()
    assert not {"import semivl", "from semivl"} & {" ".join(line.split()[:2]) for line in lines}


# Data folders: the published sets from small archives of the true layout --------------------------
def packed(archive: str, members: dict) -> bytes:
    file, is_zip = io.BytesIO(), archive.endswith(".zip")
    with zipfile.ZipFile(file, "w") if is_zip else tarfile.open(fileobj=file, mode="w") as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.writestr(name, content) if is_zip else out.addfile(info, io.BytesIO(content))
    return file.getvalue()


VOC, ADE = "VOCdevkit/VOC2012/", "ADEChallengeData2016/"
WORLDS = {  # data set -> three training and two validation images, line of a list, archives' files
    "voc": (
        "12345",
        "JPEGImages/{0}.jpg SegmentationClass/{0}.png",
        [[VOC + "JPEGImages/{0}.jpg", VOC + "SegmentationClass/{0}.png"]],
    ),
    "coco": (
        [f"{'train' if i < 3 else 'val'}2017/{i:012}" for i in range(5)],
        "{0}.jpg masks/{1}.png",
        [["{0}.jpg"], [], ["deep/{1}.png"]],
    ),
    "ade20k": (
        [f"training/ADE_train_{i:08}" for i in (1, 2, 3)]
        + [f"validation/ADE_val_{i:08}" for i in (1, 2)],
        "",
        [[ADE + "images/{0}.jpg", ADE + "annotations/{0}.png"]],
    ),
    "cityscapes": (
        "train/a/a_1 train/a/a_2 train/b/b_3 val/c/c_4 val/c/c_5".split(),
        "leftImg8bit/{0}_leftImg8bit.png gtFine/{0}_gtFine_labelTrainIds.png",
        [
            ["leftImg8bit/{0}_leftImg8bit.png"],
            ["gtFine/{0}_gtFine_labelIds.png", "gtFine/{0}_no_color.png"],
        ],
    ),
}
VALUES = (0, 1, 150, *range(3, 34))
VALUES_OF = {"voc": (*range(21), 255), "coco": (*range(81), 255)}


def small_archives(name: str, values=VALUES) -> dict:
    """Archive -> its bytes. All images and masks are one picture that holds these values."""
    Image.fromarray(np.resize(np.uint8(values), (20, 30))).save(image := io.BytesIO(), "PNG")
    archives = {}
    for archive, paths in zip(data_prep.ARCHIVES[name], WORLDS[name][2]):
        places = [path.format(n, n[-12:]) for path in paths for n in WORLDS[name][0]]
        members = dict.fromkeys(places, image.getvalue())
        if archive.name.endswith(".zip"):
            members["../../no.jpg"] = b""  # must not leave the folder
        archives[archive.name] = packed(archive.name, members)
    return archives


@pytest.fixture
def host(tmp_path):
    """A folder, and the address at which it is served."""
    (place := tmp_path / "host").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=place)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield place, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def publish(name: str, host, monkeypatch) -> dict:
    """data_prep will take the small archives for the published ones."""
    place, url = host
    archives, (names, line, _) = small_archives(name, VALUES_OF.get(name, VALUES)), WORLDS[name]
    lists = {"1/labeled.txt": names[:1], "2/labeled.txt": names[:2], "val.txt": names[3:]}
    lists |= {"train.txt": names[:3]} if name == "voc" else {}
    for file, part in lists.items():
        lines = "\n".join(line.format(n, n[-12:]) for n in part)
        save((place / file).parent, {Path(file).name: lines.encode()})
    save(place, archives)
    monkeypatch.setitem(data_prep.COUNTS, name, (3, 2))
    monkeypatch.setitem(data_prep.LISTS, name, {file: line and file for file in lists})
    monkeypatch.setattr(data_prep, "LIST_HOST", url)
    small = []
    for a in data_prep.ARCHIVES[name]:
        md5 = a.md5 and hashlib.md5(archives[a.name]).hexdigest()
        small.append(a._replace(size=0.001, md5=md5, host=a.host and url))
    monkeypatch.setitem(data_prep.ARCHIVES, name, small)
    return archives


def first_mask(folder) -> list:
    mask = folder / (folder / "splits/val.txt").read_text().split()[1]
    return np.array(Image.open(mask)).flatten()[:34].tolist()


SPELLING = {"voc": "9d8c10a7", "coco": "a4fab23f", "ade20k": "502dcd34", "cityscapes": "3d95bef9"}


@pytest.mark.parametrize("name", WORLDS)
def test_published_sets_are_made_of_archives(name, host, monkeypatch, tmp_path, capsys):
    archives, kept = publish(name, host, monkeypatch), []
    root = tmp_path / "root"
    command, mask = [name, "--root", str(root)], [*range(21), 255, *range(12)]
    if name == "coco":
        mask = [*range(34)]
    elif name == "ade20k":
        mask = [255, 0, 149, *range(2, 33)]
    elif name == "cityscapes":
        assert data_prep.main(command) == 2 and "--source FOLDER" in capsys.readouterr().err
        command += ["--source", save(root / "downloads", kept := archives)]
        trained = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
        mask = [trained.index(i) if i in trained else 255 for i in VALUES]
    assert data_prep.main(command) == 0 and "is complete" in capsys.readouterr().out
    assert {path.name for path in root.glob("downloads/*")} == set(kept)  # the user's own stay
    assert {path.name for path in root.iterdir()} - {"downloads"} == {name}
    assert not list(tmp_path.rglob("no.jpg"))
    made, classes = root / name, data_prep.class_names(name)
    assert first_mask(made) == mask and len((made / "splits/train.txt").read_text().split()) == 3
    assert len((made / "splits/2/labeled.txt").read_text().splitlines()) == 2
    assert json.loads((made / "dataset.json").read_text())["classes"] == classes
    assert hashlib.md5("|".join(classes).encode()).hexdigest().startswith(SPELLING[name])
    before = sorted(root.rglob("*"))
    assert data_prep.main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert sorted(root.rglob("*")) == before


def test_voc_is_fetched_trained_and_evaluated_by_one_command(host, monkeypatch, tmp_path, capsys):
    publish("voc", host, monkeypatch)
    command = ["--dataset", "voc", "--root", str(tmp_path), *TINY, "--steps", "2"]
    assert semivl.main([*command, "--labels", "2", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "2 labelled, 1 unlabelled, 2 validation, 0 test images; 2 steps" in said
    assert "frozen CLIP by names" in said and "frozen CLIP by definitions" in said
    table = json.loads((tmp_path / "run/result.json").read_text())["val"]
    assert [*table] == ["CLIP by names", "CLIP by definitions", "SemiVL"]
    assert [*table["SemiVL"]] == [*semivl.CONCEPTS["voc"], "mIoU"]


def test_masks_of_ade20k_are_never_shifted_twice(host, monkeypatch, tmp_path, capsys):
    publish("ade20k", host, monkeypatch)
    zips = save(tmp_path / "zips", small_archives("ade20k", (255, 0, 149, *VALUES[3:])))
    assert data_prep.main(["ade20k", "--root", str(tmp_path), "--source", zips]) == 2
    assert "no class has [254]" in capsys.readouterr().err


EMPTY_MASK = packed(".zip", {ADE + "annotations/validation/ADE_val_2.png": b""})


@pytest.mark.parametrize(
    "told, more, counts, data",
    [
        ("damaged", "", (3, 2), b"<html>"),
        ("val_2.png: cannot identify", "", (3, 2), EMPTY_MASK),
        ("has 3 images instead of 4", "", (4, 2), None),
        ("No such file", "", (3, 3), None),
        ("no such folder", "--source nowhere", (3, 2), None),
        ("move", "--root zips", (3, 2), None),
    ],
)
def test_mistakes_end_in_one_line(told, more, counts, data, host, monkeypatch, tmp_path, capsys):
    small = publish("ade20k", host, monkeypatch)
    zips = {name: data or whole for name, whole in small.items()}
    save(tmp_path / "zips", zips | {"ade20k": b"a file where the data folder should be"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data_prep.COUNTS, "ade20k", counts)
    assert data_prep.main(f"ade20k --source zips {more}".split()) == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line]
    assert len(shown) == 1 and shown[0].startswith("data_prep.py: ") and told in shown[0]
    assert not list(tmp_path.glob("data/*ade20k*"))


# Own pictures -------------------------------------------------------------------------------------
def test_a_folder_of_own_pictures_is_made_without_torch(folder, tmp_path):
    code = "import sys, data_prep; sys.exit(data_prep.main() or 'torch' in sys.modules)"
    options = ["--images", folder / "images", "--masks", folder / "masks"]
    command = [sys.executable, "-c", code, tmp_path / "new", *options, "--classes"]
    here = Path(data_prep.__file__).parent
    done = subprocess.run([*command, ",".join(CLASSES)], cwd=here, stdout=subprocess.DEVNULL)
    assert done.returncode == 0


@pytest.mark.parametrize("line", ["{0}:{1},7,9::", "{1}, {0}", "{0}"])  # CVAT, Roboflow, labelme
def test_own_pictures_become_a_data_folder(line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    values, masks = [3 * n for n in range(6)] if "1" in line else [*range(6)], []
    for i in range(6):
        masks.append(mask := np.array(Image.open(f"masks/{i}.png")))
        new = np.uint8(values)[mask]
        new = np.stack([new, 0 * new + 7, 0 * new + 9], 2) if ":" in line else new
        Image.fromarray(new).save(f"masks/My {i}_mask.png"), os.remove(f"masks/{i}.png")
        os.rename(f"images/{i}.png", f"images/my {i}.PNG")
    os.remove("masks/My 5_mask.png")
    Path("map.txt").write_text("\n".join(map(line.format, CLASSES, values)))
    command = "mine --images images --masks masks --labelmap map.txt --val 0.4".split()
    assert data_prep.main(command) == 0 and "--dataset mine --labels 3" in capsys.readouterr().out
    data = semivl.open_data(Config(dataset="mine"))
    entries = data.train + data.val
    assert len(data.val) == 2 and sum(not mask for _, mask in entries) == 1
    assert {image for image, _ in entries} == {f"../images/my {i}.PNG" for i in range(6)}
    for image, mask in entries:
        assert not mask or np.array_equal(data.pair((image, mask))[1], masks[int(image[-5])])
    assert data_prep.main(command) == 2 and "is there already" in capsys.readouterr().err
    Image.new("L", (64, 64)).save("masks/my 5.png", "JPEG")
    assert data_prep.main(["new", *command[1:]]) == 2 and not Path("new").exists()
    assert "my 5.png: JPEG may change numbers" in capsys.readouterr().err


def own_lists(folder: Path, *options) -> dict[str, str]:
    """Makes folder/own of folder/images and folder/masks -> the text of its lists."""
    command = [str(folder / "own"), "--images", str(folder / "images"), *map(str, options)]
    assert data_prep.main(command) == 0
    return {file.stem: file.read_text() for file in (folder / "own/splits").glob("*.txt")}


@pytest.mark.parametrize("line", ["{0};{1}", "{0}\t{1}", "{0} {1}", "{0} ; {1}"])
@pytest.mark.parametrize("head", ["", "Pixel Value;Class\n", "value\tname\n"])
def test_label_maps_are_read_as_excel_saves_them(line, head, tmp_path):
    names = ["sky", "pool table", "car"]
    lines = [line.format(value, name) for value, name in enumerate(names, 3)]
    (tmp_path / "map.csv").write_text(head + "\n".join(lines), encoding="utf-8-sig")
    assert data_prep.read_labelmap(tmp_path / "map.csv") == dict(enumerate(names, 3))


@pytest.mark.parametrize("name", ["{}_segmentation", "{}.jpg", "{}_L", "{}-mask", "mask_{}"])
def test_linked_folders_are_followed_and_what_is_left_out_is_said(name, folder, tmp_path, capsys):
    (folder / "images").rename(tmp_path / "disk")
    (folder / "images/run").mkdir(parents=True)
    (folder / "images/disk").symlink_to(tmp_path / "disk")
    (folder / "images/disk/IMG_1.HEIC").write_bytes(b"")
    (folder / "images/run/log.jsonl").write_text("")
    Image.new("RGB", (64, 64)).save(folder / "images/run/sheet.png")
    (folder / "masks").rename(folder / "disk")
    (folder / "masks").mkdir()
    (folder / "disk").rename(folder / "masks/disk")
    for file in (folder / "masks/disk").iterdir():
        file.rename(file.with_stem(name.format(file.stem)))
    lists = own_lists(folder, "--masks", folder / "masks", "--classes", ",".join(CLASSES))
    assert "left out are 1 .heic" in capsys.readouterr().out
    lines = "".join(lists.values()).splitlines()
    assert len(lines) == 6 and all(len(line.split()) == 2 for line in lines)


def test_copies_of_a_picture_stay_on_one_side_and_folders_of_val_validate(folder):
    options = ["--masks", folder / "masks", "--classes", ",".join(CLASSES)]
    for place in ("images", "masks"):
        for i in range(6):
            (folder / place / f"{i}.png").rename(folder / place / f"{i % 2}_jpg.rf.{i}.png")
    lists = own_lists(folder, *options)
    sides = [{line.split("/")[-1][0] for line in text.splitlines()} for text in lists.values()]
    assert len(sides) == 2 and sides[0] != sides[1] and all(len(side) == 1 for side in sides)

    shutil.rmtree(folder / "own")
    for place in ("images", "masks"):
        (folder / place / "valid").mkdir()
        (folder / place / "1_jpg.rf.3.png").rename(folder / place / "valid/a.png")
    lists = own_lists(folder, *options)
    assert lists["val"] == "../images/valid/a.png masks/valid/a.png\n"


@pytest.mark.parametrize("export", ["cvat", "roboflow"])
def test_an_export_is_taken_as_it_is(export, folder, tmp_path, capsys):
    palette = [(0, 0, 0), (250, 50, 83), (51, 221, 255), (9, 9, 0), (9, 0, 9), (0, 9, 9)]
    home = tmp_path / export
    for i in range(6):
        image = Image.open(folder / f"images/{i}.png")
        mask = np.array(Image.open(folder / f"masks/{i}.png"))
        if export == "cvat":
            places = ["JPEGImages/{}.jpg", "SegmentationClass/{}.png", "SegmentationObject/{}.png"]
            places.append("SegmentationClassVisualization/{}.jpg")
            mask = np.uint8(palette)[mask]
        else:
            part = "valid" if i < 2 else "train"
            places = [part + "/{}_jpg.rf.a.jpg", part + "/{}_jpg.rf.a_mask.png"]
        for place, picture in zip(places, [image, *[Image.fromarray(mask)] * 2, image]):
            file = home / place.format(i)
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    if export == "cvat":
        lines = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(CLASSES, palette)]
        (home / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "\n".join(lines))
    else:
        lines = [f"{value}, {name}" for value, name in enumerate(CLASSES)]
        (home / "train/_classes.csv").write_text("Pixel Value, Class\n" + "\n".join(lines))
    assert data_prep.main([str(tmp_path / "made"), "--images", str(home)]) == 0
    assert "left out" not in capsys.readouterr().out
    data = semivl.open_data(Config(dataset=str(tmp_path / "made")))
    entries = data.train + data.val
    assert list(data.classes) == CLASSES and len(entries) == 6
    assert len(data.val) == (1 if export == "cvat" else 2)
    for image, mask in entries:
        truth = np.array(Image.open(folder / f"masks/{Path(image).stem[0]}.png"))
        assert np.array_equal(data.pair((image, mask))[1], truth)


def test_colours_of_a_labelmap_decide_over_the_numbers_of_palette_masks(folder, capsys):
    for file in (folder / "masks").iterdir():
        mask = Image.open(file).convert("L")
        mask.putpalette([0, 0, 0, 10, 200, 10, 200, 10, 10])
        mask.save(file)
    lines = [f"{name}:{n * 50},9,9::" for n, name in enumerate(CLASSES)]
    (folder / "labelmap.txt").write_text("\n".join(lines))
    options = ["--images", folder / "images", "--masks", folder / "masks"]
    command = [folder / "own", *options, "--labelmap", folder / "labelmap.txt"]
    assert data_prep.main([str(word) for word in command]) == 2
    assert " (10, 200, 10): " in capsys.readouterr().err


def test_a_folder_is_checked_and_its_problems_are_listed(folder, capsys):
    save(folder / "splits", {"val.txt": pairs(1, 4), "test.txt": pairs(*range(100, 130))})
    assert data_prep.main([str(folder)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 21 and said[-1] == "... and 10 more" and "images/100.png" in said[0]
    save(folder / "splits", {"test.txt": pairs(5)})
    exif = Image.Exif()
    exif[0x0112] = 3
    for i in range(6):
        Image.new("L", (64, 64), 1).save(folder / f"masks/{i}.png")
        Image.open(folder / f"images/{i}.png").save(folder / f"images/{i}.png", exif=exif)
    assert data_prep.main([str(folder)]) == 2 and "train shows one class" in capsys.readouterr().err
    Image.new("L", (64, 64), 0).save(folder / "masks/0.png")
    assert data_prep.main([str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["background", "0", "(0)", "4,096", "(1)", "0", "(0)"]
    assert any("EXIF orientation turns 6 images; are their masks upright?" in line for line in said)
    assert said[-1] == f"note: 1 images are in train and val, such as {folder}/images/1.png"


def test_several_folders_and_their_parts_are_taken_together(folder, tmp_path):
    for place in ("images", "masks"):
        (folder / place / "test").mkdir()
        (folder / place / "5.png").rename(folder / place / "test/5.png")
        shutil.move(folder / place / "0.png", tmp_path / f"{place}-0.png")
    more = make_folder(tmp_path / "more")
    for i in range(6):
        for place in ("images", "masks"):
            (more / place / f"{i}.png").rename(more / place / f"b{i}.png")
    places = [[str(home / kind) for home in (folder, more)] for kind in ("images", "masks")]
    command = [str(tmp_path / "made"), "--images", *places[0], "--masks", *places[1]]
    assert data_prep.main([*command, "--classes", ",".join(CLASSES)]) == 0
    data = semivl.open_data(Config(dataset=str(tmp_path / "made")))
    assert [len(entries) for entries in (data.train, data.val, data.test)] == [8, 2, 1]
    assert data.test == [("../images/images/test/5.png", "masks/test/5.png")]


def test_the_toy_world_repeats_itself_and_is_complete_or_absent(tmp_path, monkeypatch):
    first, again, other = (np.array(data_prep.Painter(seed).scene()[0]) for seed in "aab")
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    for name, value in dict(SPLITS={"train": 3, "val": 2, "test": 2}, CORPUS=64, STEPS=2).items():
        monkeypatch.setattr(data_prep, name, value)
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(data_prep, "pretrain_tiny_clip", lambda *_: 1 / 0)
        data_prep.prepare("toy", tmp_path)
    assert list(tmp_path.iterdir()) == []
    toy = data_prep.prepare("toy", tmp_path)
    assert len(first_mask(toy)) == 34 and len(list(toy.glob("images/train/*.png"))) == 3
    saved = torch.load(toy / "open_clip_pytorch_model.bin", weights_only=True)
    clip = open_clip.create_model(f"local-dir:{toy}").state_dict()
    assert clip.keys() == saved.keys() and all(torch.equal(clip[k], saved[k]) for k in clip)


# The README's examples ----------------------------------------------------------------------------
def test_examples_of_the_readme_run(tmp_path, monkeypatch):
    def random_weights(name, *_, **__):  # in the place of a download
        return open_clip.CLIP(**open_clip.get_model_config(name))

    text = Path(semivl.__file__).with_name("README.md").read_text("utf-8")
    blocks = [
        block for block in re.findall(r"(?:^    .*\n)+", text, re.M) if "semivl import" in block
    ]
    assert len(blocks) == 2
    monkeypatch.setattr(open_clip, "create_model", random_weights)
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((60, 40), 90).save("photo.jpg")
    for block in blocks:
        exec(textwrap.dedent(block), {})
    assert Image.open("mask.png").size == (60, 40)
    assert {*np.unique(Image.open("mask.png"))} <= {0, 1}
