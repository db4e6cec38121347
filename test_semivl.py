"""What semivl.py and data_prep.py promise, one promise a test.

    pytest -q test_semivl.py            all of it: minutes on a laptop
    pytest -q test_semivl.py -k small   shapes and a tiny overfit first: seconds
    pytest -q test_semivl.py -k equal   equality with the authors' code

The numbers below were computed once by the authors' code (google-research/semivl, commit 13ee65d,
float32, CPU) with weights made by a formula, so that nobody has to carry a weight file.
"""

import colorsys
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data_prep
import semivl
from semivl import IGNORE, Config


# The small test -----------------------------------------------------------------------------------
def tiny_model(classes=3, decoder="language", channels=128):
    """A student around a random tiny CLIP."""
    torch.manual_seed(0)
    text, clip = F.normalize(torch.randn(classes, 64), dim=1), open_clip.CLIP(**data_prep.TOY_CLIP)
    cfg = Config(crop=64, decoder=decoder, decoder_channels=channels)
    return semivl.build_model(cfg, clip.visual, text)


@pytest.mark.parametrize("decoder, channels", [("language", 128), ("language", 8), ("vision", 8)])
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
        semivl.semivl_loss({"x": model(images)}, masks, {}, 0)["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
    matrix = semivl.confusion_matrix(model(images).argmax(1), masks, num_classes=3)
    assert semivl.iou_per_class(matrix).mean() > 95


# Names of the authors' checkpoints --------------------------------------------------------------
AUTHORS_NAMES = [  # ours, theirs; replaced in this order
    ("clip.visual.transformer.resblocks", "backbone.layers"),
    ("clip.visual.ln_pre", "backbone.ln0"),
    ("clip.visual.ln_post", "backbone.ln1"),
    ("clip.visual.class_embedding", "backbone.cls_token"),
    ("clip.visual.positional_embedding", "backbone.pos_embed"),
    ("clip.visual.proj", "backbone.proj.weight"),
    ("clip.visual.conv1", "backbone.patch_embed.projection"),
    (".attn.", ".attn.attn."),
    (".ln_", ".ln"),
    ("mlp.c_fc", "ffn.layers.0.0"),
    ("mlp.c_proj", "ffn.layers.1"),
    ("decoder.semantic", "decode_head.layers"),
    ("decoder.lift", "decode_head.conv1"),
    ("layer.linear1", "transformer.ffn.layers.0.0"),
    ("layer.linear2", "transformer.ffn.layers.1"),
    ("layer.self_attn", "transformer.attn.attn"),
    ("layer.norm", "transformer.ln"),
    ("branches", "aspp_convs"),
    ("pooled.0", "aspp_convs.4.gap.1"),
    ("pooled.1", "aspp_convs.4.gap.2"),
    ("deep_proj", "skip_proj.0"),
    ("shallow_proj", "skip_proj.1"),
    ("decoder.", "decode_head."),
    ("conv.1.conv1", "conv_encoder.stem"),
    ("conv.1.bn1", "conv_encoder.stem.7"),
    ("conv.1.layer1", "conv_encoder.layer1"),
]


def authors_layout(model: semivl.SemiVL) -> dict[str, tuple]:
    """Our name of a tensor -> its name and shape in the authors' checkpoints."""
    layout = {}
    for name, tensor in model.state_dict().items():
        if name in ("text", "clip.mean", "clip.std"):  # no weights
            continue
        theirs, shape = name, (*tensor.shape,)
        for ours, new in AUTHORS_NAMES:
            theirs = theirs.replace(ours, new)
        if name.endswith("visual.proj"):  # theirs is a 1 x 1 convolution
            shape = (*shape[::-1], 1, 1)
        if name.endswith("positional_embedding"):
            shape = (1, *shape)
        if name.endswith("class_embedding"):
            shape = (1, 1, *shape)
        layout[name] = theirs, shape
    return layout


def load_authors_checkpoint(model: semivl.SemiVL, weights: dict) -> semivl.SemiVL:
    """Puts the authors' weights, the "model" of their best.pth, into a model that `build_model`
    made with authors_clip=True (Cityscapes: conv_skip=True, text by decoder_text="mean")."""
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    state = model.state_dict()
    for name, (theirs, shape) in authors_layout(model).items():
        tensor = weights.pop(theirs)
        assert tensor.shape == shape, f"{theirs}: {tensor.shape}"
        if name.endswith("visual.proj"):
            tensor = tensor.flatten(1).T
        if name.endswith("embedding"):
            tensor = tensor.view(state[name].shape)
        state[name] = tensor
    assert all("clip_encoder." in name for name in weights)  # their frozen CLIP
    model.load_state_dict(state)
    return model.eval()


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
    "vision eval": [0.292934, 0.357502, 0.366772, -0.147382, -0.071386, 0.066833, 0.526768],
    "vision train": [1.013136, 0.75578, -0.090391, 0.067602, -0.236981, 0.066949, 2.08529],
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


def formula(name: str, shape: tuple) -> torch.Tensor:
    """A weight: normal values seeded by the tensor's name, scaled by its kind."""
    z = random_normal(zlib.crc32(name.encode()), shape) if shape else torch.tensor(0)
    if len(shape) == 1:
        return 0.1 * (z.abs() if name.endswith("var") else z) + name.endswith(("weight", "var"))
    if name.endswith(("cls_token", "pos_embed")):
        return 0.5 * z
    return z / np.float32(math.sqrt(math.prod(shape[1:]))) if shape else z


def authors_model(cityscapes=False, factor=1):
    """A ViT of width 64 and a full-size decoder, with the weights of the formula."""
    visual = open_clip.transformer.VisionTransformer(
        128, 16, 64, layers=12, heads=2, mlp_ratio=4.0, output_dim=512
    )
    cfg = Config(crop=128, authors_clip=True, conv_skip=cityscapes)
    model, state = semivl.build_model(cfg, visual, unit_rows(b"text", 5)), {}
    for name, shape in authors_layout(model).values():
        scale = factor if name.startswith("decode_head.head.") else 1
        state[name] = scale * formula(name, shape)
    return load_authors_checkpoint(model, state)


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


def test_every_stage_of_the_forward_pass_equals_the_authors(authors, monkeypatch):
    images, decoder, text = pixels(), authors.decoder, authors.text
    dense, skips = authors.clip(images)
    whole = authors.clip.visual((images - authors.clip.mean) / authors.clip.std)  # open_clip's own
    stages, forward = [], semivl.SemanticReasoning.forward

    def spy(layer, x, text):
        stages.append((x, forward(layer, x, text)))
        return stages[-1][1]

    monkeypatch.setattr(semivl.SemanticReasoning, "forward", spy)
    lowres = decoder(dense, skips, text)
    assert_golden(
        skip_layer0=skips[0],
        skip_layer4=skips[1],
        dense_embed=dense,
        sim=semivl.cosine_maps(dense, text),
        global_embed=F.normalize(whole, dim=1),
        aspp_out=stages[0][0].flatten(0, 1),
        semantic_out=stages[1][1].transpose(1, 2),
        dec_lowres=lowres,
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


def test_the_decoder_without_language_equals_the_authors():
    decoder = semivl.VisionDecoder(512, 64, 5)
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    decoder.load_state_dict({name: formula(name, shape) for name, shape in shapes.items()})
    dense, skip = random_normal(31, (2, 512, 8, 8)), random_normal(32, (2, 64, 8, 8))
    for mode in ("eval", "train"):  # numbers of a transcript of their head, without mmsegmentation
        decoder.train(mode == "train")
        assert_golden("vision ", **{mode: decoder(dense, (None, skip))})


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
    batch["s1_box"] = torch.tensor([[64, 16, 128, 80], [0, 0, 0, 0]])
    batch["s2_box"] = torch.tensor([[64, 64, 128, 128]] * 2)
    batch |= dict(y=y, padding=padding)
    cfg = Config(batch=2, conf_thresh=conf, steps=4)
    teacher = semivl.frozen_copy(student)
    losses = semivl.training_step(student, teacher, guidance, batch, cfg, step=1)
    confidence = teacher(batch["w"] / 255).softmax(1).amax(1)
    kept = (confidence[~padding] >= conf).double().mean().item()
    assert losses.pop("kept").item() == pytest.approx(kept, rel=1e-6)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        dict(zip(LOSSES, known)), rel=0, abs=1e-5
    )
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    for group, norm in zip(GROUPS, norms, strict=True):
        parts = [grad.norm() for name, grad in grads.items() if name.startswith(group)]
        assert torch.stack(parts).norm().item() == pytest.approx(norm, rel=1e-4), group


def test_mean_weighting_of_one_image_equals_the_authors():
    rng, logits = np.random.RandomState(42), random_normal(41, (1, 5, 16, 16))
    targets = map(torch.from_numpy, (rng.randint(0, 5, (1, 16, 16)), rng.rand(1, 16, 16)))
    loss = semivl.consistency_loss(logits, *targets, weighting="mean")
    assert loss.item() == pytest.approx(1.018715, abs=1e-5)  # of a transcript of their function


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
    more = scores.argmax(1).flatten().bincount() - torch.tensor([15903, 4131, 20706, 3233, 2527])
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
SHARED_BY_ALL |= dict(scale_min=0.5, scale_max=2.0, ema=0.996, finetune="spatial")
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


def preset(name: str) -> Config:
    return Config(**semivl.parse_args(semivl.PRESETS[name].split()))


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_the_authors_settings(name):
    cfg = preset(name)
    *recipe, windows = RECIPES[name]
    columns = "labels lr vit_lr epochs steps crop fit weighting conv_skip decoder_text".split()
    assert [getattr(cfg, column) for column in columns] == recipe
    assert {key: getattr(cfg, key) for key in SHARED_BY_ALL} == SHARED_BY_ALL
    assert windows_of(cfg, 375, 500) == windows


def test_windows_stride_as_the_authors_do():
    assert windows_of(preset("voc"), 100, 500) == [(512, 512)] * 6  # as 512 x 2560: 0, 426, ...
    assert windows_of(preset("coco"), 600, 939) == [(512, 512)] * 6  # 0, 88; 0, 426, 427
    rows, columns = (801, 490), (801, 801, 801, 446)  # from 0, 534, ... to the image's end
    windows = [(h, w) for h in rows for w in columns]
    assert windows_of(preset("cityscapes"), 1024, 2048) == windows


@pytest.mark.parametrize("name, digest", [("voc", "daaa22ad"), ("cityscapes", "e15cf9e6")])
def test_definitions_are_the_published_ones(name, digest):
    pairs = [*map(list, data_prep.describe(name)["definitions"].items())]
    assert hashlib.sha256(json.dumps(pairs).encode()).hexdigest().startswith(digest)


def test_lists_of_ade20k_are_the_published_ones():
    digests = "5b28d705 78f423b1 0a2f3b29 85cb4de0 73d45bc8".split()
    for count, digest in zip((158, 316, 632, 1263, 2526), digests):
        text = data_prep.ade20k_list(f"{count}/labeled.txt")
        assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


def test_every_parameter_that_trains_has_the_rate_of_its_group():
    visual = open_clip.CLIP(**data_prep.TOY_CLIP).visual
    cfg = Config(crop=64, conv_skip=True, lr=1e-3, vit_lr=1e-6)
    student = semivl.build_model(cfg, visual, torch.randn(3, 64))
    groups = semivl.make_optimizer(student, cfg).param_groups
    rate_of = {p: group["lr"] for group in groups for p in group["params"]}
    for name, p in student.named_parameters():
        low = name.startswith("conv.") or ".attn." in name or name.endswith("positional_embedding")
        known = 1e-6 if low else None
        if name.startswith("decoder."):
            known = 1e-3
        assert rate_of.get(p) == known and p.requires_grad == (known is not None), name
    assert {(group["weight_decay"], group["betas"]) for group in groups} == {(0.01, (0.9, 0.999))}


# CLIP, language, networks -------------------------------------------------------------------------
def test_definitions_average_for_the_decoder_and_stand_apart_for_guidance():
    clip = open_clip.CLIP(**data_prep.TOY_CLIP)
    classes = {"ground": ["grass", "sand"], "car": ["car"]}
    text, _, concepts, sizes = semivl.describe_classes(clip, classes, text_from="mean")
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


def test_plain_vits_of_open_clip_fit_and_all_others_are_refused():
    fitting = set()
    for name in open_clip.list_models():
        with contextlib.suppress(semivl.UserError), torch.device("meta"):
            clip, _ = semivl.load_clip(Config(clip=name, clip_weights="none"))
            semivl.DenseCLIP(clip.visual, (4, 4))
            fitting.add(name)
    pattern = r"ViT-(S|M|B|L|H|g|e|bigG)-\d+(-\d+)?(-plus.*|-alt|-quickgelu)?"
    assert fitting == {name for name in open_clip.list_models() if re.fullmatch(pattern, name)}


def test_the_teacher_follows_the_formula(monkeypatch):
    student = tiny_model().train()
    teacher = semivl.frozen_copy(student)
    assert not any(module.training for module in teacher.modules())
    name, weight = next((n, p) for n, p in student.named_parameters() if p.requires_grad)
    expected = weight.detach().clone()
    for step in range(15):
        weight.data += 1
        decay = min(1 - 1 / (step + 1), 0.9)
        expected = decay * expected + (1 - decay) * weight.detach()
        semivl.update_teacher(teacher, student, step, decay=0.9)
    torch.testing.assert_close(dict(teacher.named_parameters())[name].data, expected)
    monkeypatch.setattr(semivl, "WORLD", 2)  # of several processes the buffers of process 0 count
    monkeypatch.setattr(semivl.dist, "broadcast", lambda buffer, source: buffer.fill_(source + 5))
    semivl.update_teacher(teacher, student, 15)
    assert all((buffer == 5).all() for buffer in [*teacher.buffers(), *student.buffers()])


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


# Losses, CutMix, evaluation -----------------------------------------------------------------------
@pytest.mark.parametrize("weighting", ["pixel", "mean"])
def test_consistency_loss_is_the_written_formula(weighting):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 8, 8))
    confidence, total = torch.rand(2, 8, 8), 0.0
    labels[0, 5:] = IGNORE  # padding
    confidence[0, 0, 0] = 0.6  # reaches the threshold
    for b, i, j in (labels != IGNORE).nonzero().tolist():
        sure = float(confidence[b, i, j] >= 0.6)
        mean = confidence[b][labels[b] != IGNORE].mean().item()
        loss = -logits[b, :, i, j].log_softmax(0)[labels[b, i, j]].item()
        total += loss * {"pixel": sure, "mean": mean}[weighting]
    loss = semivl.consistency_loss(logits, labels, confidence, 0.6, weighting).item()
    assert loss == pytest.approx(total / (128 - 24), rel=1e-5)


def test_cutmix_moves_images_and_labels_alike():
    value, box = torch.arange(128).reshape(2, 8, 8), torch.tensor([[2, 1, 5, 7], [0, 0, 0, 0]])
    expected = value.clone()
    expected[0, 2:5, 1:7] = value[1, 2:5, 1:7]
    assert torch.equal(semivl.cutmix(value, box), expected)
    images, mixed = (v[:, None].repeat(1, 3, 1, 1) for v in (value, expected))
    assert torch.equal(semivl.cutmix(images, box), mixed)


def test_miou_is_over_the_classes_that_occur():
    prediction, truth = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, IGNORE])
    iou = semivl.iou_per_class(semivl.confusion_matrix(prediction, truth, 4))
    assert iou[:2].tolist() == [50, 50] and iou[2:].isnan().all() and iou.nanmean() == 50


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


def test_photographs_are_turned_upright(tmp_path):
    pixels, exif, file = np.zeros((20, 30, 3), np.uint8), Image.Exif(), tmp_path / "a.png"
    pixels[:10] = 200  # bright above
    for orientation, turn in ((3, 2), (6, 1), (8, 3)):
        exif[0x0112] = orientation
        Image.fromarray(np.rot90(pixels, turn)).save(file, exif=exif)
        assert np.array_equal(semivl.read_image(file), pixels)


@pytest.mark.filterwarnings("ignore")  # PIL's, of broken TIFF
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
    data = semivl.open_data(str(folder))
    assert {image[7] for image, _ in semivl.draw_labelled(data, 2, 0)} & {*"23"}
    with pytest.raises(ValueError, match="masks of 2 classes are needed"):
        semivl.check_labelled(data, data.train[:2])
    semivl.check_labelled(data, data.train[1:3])
    said = capsys.readouterr().out.splitlines()[-8:]
    assert [line.split() for line in said[1:3]] == [["background", "2,048"], ["car", "2,048"]]
    assert said[-1].split() == ["no", "label", "4,096"]


def test_labelled_images_are_drawn_by_the_seed_or_taken_from_the_list(folder):
    data = semivl.open_data(str(folder))
    assert semivl.draw_labelled(data, 2, 0) == semivl.draw_labelled(data, 2, 0)
    assert len({tuple(semivl.draw_labelled(data, 2, seed)) for seed in range(8)}) > 1
    lines = b"images/my photo.png\tmasks/1.png\nimages/3.png masks/3.png\n"  # a name with a blank
    save(folder / "splits/2", {"labeled.txt": lines})
    drawn = [("images/my photo.png", "masks/1.png"), ("images/3.png", "masks/3.png")]
    assert semivl.draw_labelled(data, 2, 5) == drawn


def test_every_item_is_a_function_of_seed_and_position(folder):
    cfg, data = Config(crop=32, fit=False), semivl.open_data(str(folder))
    items = semivl.TrainingSet(data, data.train[:2], cfg)
    first, again = items[7], items[7]
    assert first.pop("files") == again.pop("files")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    many = [items[i] for i in range(20)]
    for one, other in (("s1", "w"), ("s2", "w"), ("s1", "s2"), ("s1_box", "s2_box")):
        assert sum(not torch.equal(item[one], item[other]) for item in many) > 8


def test_random_scale_fits_the_image_as_published():
    scaled = {0.5: (256, 341), 1.0: (512, 683), 2.0: (1024, 1365), 1.001: (512, 683)}
    for r, size in scaled.items():
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


@pytest.mark.parametrize("fit, scale, kept", [(True, 1, [0, 2, 5, 7]), (False, 0.4, [1, 3, 6, 8])])
def test_masks_take_the_nearest_pixel_as_cv2_or_pil_do(fit, scale, kept):
    line = torch.arange(10, dtype=torch.uint8)  # becomes 4 pixels
    cfg = Config(crop=4, fit=fit, scale_min=scale, scale_max=scale)
    _, mask = semivl.scale_crop_flip(Image.new("RGB", (10, 10)), line.expand(10, 10), cfg)
    assert sorted(mask[0].tolist()) == kept


def test_padding_is_black_ignored_and_marked(folder):
    for i in range(4):
        Image.new("RGB", (40, 50), (90, 100, 110)).save(folder / f"images/{i}.png")
        Image.new("L", (40, 50), 1).save(folder / f"masks/{i}.png")
    cfg = Config(crop=64, fit=False, scale_min=1.0, scale_max=1.0)
    data = semivl.open_data(str(folder))
    for i in range(8):
        item = semivl.TrainingSet(data, data.train[:2], cfg)[i]
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
    return [line for line in lines if "total" in line]


def table(out: Path) -> dict:
    """The last table: title -> mIoU."""
    result = json.loads((out / "result.json").read_text())
    return {title: miou for title, miou in result.items() if title != "val_best"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, beside its folder of images."""
    path = tmp_path_factory.mktemp("whole")
    assert run(make_folder(path / "images"), path / "run", *LONG) == 0
    return path / "run"


def test_a_run_moves_what_trains_and_nothing_else(folder, tmp_path):
    assert run(folder, out := tmp_path / "run") == 0
    torch.manual_seed(0)
    clip, _ = semivl.load_clip(Config(clip="toy", clip_weights="none"))
    fresh = semivl.build_model(Config(crop=32), clip.visual, torch.randn(6, 64))
    student = semivl.load_file(out / "last.pt")[1]["student"]
    for name, p in fresh.clip.named_parameters():
        # The last block's q and k feed nothing; their rows move by weight decay alone.
        assert torch.equal(p, student[f"clip.{name}"]) == (not p.requires_grad), name
    assert [line["step"] for line in logged(out)] == [1, 2, 3, 4]
    last = logged(out)[-1]
    assert last["kept"] > 0 and last.keys() > {*"x s2 fp guidance_s1 total lr seconds".split()}
    files = "semivl.py log.jsonl last.pt best.pt sheet.png result.json".split()
    assert {file.name for file in out.iterdir()} == {*files}


def test_bf16_changes_losses_by_little(folder, tmp_path):
    for precision in ("fp32", "bf16"):
        options = "--steps 1 --conf-thresh 0 --precision".split()
        assert run(folder, tmp_path / precision, *options, precision) == 0
    exact, rounded = (logged(tmp_path / precision)[0] for precision in ("fp32", "bf16"))
    assert exact["total"] != rounded["total"]
    for name in LOSSES[:4] + ["total"]:
        assert rounded[name] == pytest.approx(exact[name], rel=0.02), name


def test_micro_batches_accumulate_to_the_whole_batch(folder, tmp_path, monkeypatch):
    # Dropout would draw other numbers. Without padding every image has as many valid pixels.
    monkeypatch.setattr(F, "dropout2d", lambda f, p: f)
    options = "--steps 1 --conf-thresh 0 --scale-min 1.5 --micro-batch".split()
    for size in (2, 1):
        assert run(folder, tmp_path / str(size), *options, size) == 0
    one, other = (logged(tmp_path / str(size))[0] for size in (2, 1))
    assert one["total"] == pytest.approx(other["total"], rel=1e-5)


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
    assert semivl.load_file(killed / "last.pt")[1]["step"] in (3, 4, 6, 8)
    assert semivl.main(["--resume", str(killed)]) == 0
    one, other = (semivl.load_file(path / "last.pt")[1] for path in (whole, killed))
    for part in ("student", "model", "optimizer", "best"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "run", "--lr", "1e30", "--steps", 50) == 2
    assert "lower --lr, or look at ['images/" in capsys.readouterr().err
    assert len(logged(tmp_path / "run")) < 50


def test_a_run_goes_on_with_its_own_images_or_not_at_all(whole, tmp_path, capsys):
    shutil.copytree(whole.parent, tmp_path / "a")
    data, run = str(tmp_path / "a/images"), str(tmp_path / "a/run")
    assert semivl.main(["--resume", run, "--dataset", data, "--steps", "14"]) == 0
    assert semivl.load_file(f"{run}/last.pt")[1]["step"] == 14
    save(Path(data, "splits"), {"train.txt": pairs(0, 1, 2)})
    assert semivl.main(["--resume", run, "--dataset", data]) == 2
    assert "images: its classes or images changed" in capsys.readouterr().err


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
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(semivl.__file__).parent)}
    several = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    options = "--batch 4 --micro-batch 1 --steps 1 --crop 48 --out".split()
    for start, out in (([], tmp_path / "one"), (several, tmp_path / "two")):
        command = [sys.executable, *start, spy, "--dataset", folder, *TINY, *options, out]
        done = subprocess.run(command, text=True, env=env, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("writes to") == 1  # one process speaks for all
    one, both, other = (torch.load(f"{tmp_path}/{name}") for name in ("one0", "two0", "two1"))
    torch.testing.assert_close(both, other, rtol=0, atol=0)
    assert max(gradient.abs().max() for gradient in one) > 1e-3
    torch.testing.assert_close(one, both, rtol=1e-5, atol=1e-8)
    losses, shared = (logged(tmp_path / name)[0] for name in ("one", "two"))
    assert [losses[name] for name in LOSSES] == pytest.approx([shared[name] for name in LOSSES])
    assert losses["guidance_s1"] > 0 and losses["s1"] > 0
    assert table(tmp_path / "one") == pytest.approx(table(tmp_path / "two"), abs=1e-4)


def test_semivl_alone_in_an_empty_folder_trains_resumes_evaluates_and_predicts(tmp_path):
    alone = tmp_path / "alone"
    how = dict(cwd=alone, text=True, capture_output=True)
    make_folder(alone / "pictures")
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
    done = subprocess.run([sys.executable, "semivl.py"], **how)
    assert done.returncode == 2 and "No module named 'data_prep'" in done.stderr


def test_predictions_are_not_overwritten_and_have_the_size_of_the_image(whole, tmp_path):
    last, image = shutil.copy(whole / "last.pt", tmp_path), str(tmp_path / "a.jpg")
    Image.effect_noise((70, 33), 90).convert("CMYK").save(image)
    for out in ("predictions", "predictions-2"):
        assert semivl.main(["--predict", last, image]) == 0
        mask = Image.open(tmp_path / out / "a-mask.png")
        assert mask.mode == "P" and mask.size == (70, 33) and np.array(mask).max() < 6
        assert Image.open(tmp_path / out / "a-overlay.png").size == (70, 33)
    assert semivl.main(["--predict", last, image, "--out", str(tmp_path / out)]) == 2
    assert semivl.main(["--predict", last, image, image]) == 0


# Mistakes end in one line, and nothing is left behind ---------------------------------------------
class Malicious:
    def __reduce__(self):
        return print, ("this must never run",)


MISTAKES = {  # what is wrong -> (file, content or picture; or options), words of the line
    "a mask of another size": ("masks/0.png", Image.new("L", (9, 9)), "has (64, 64) upright"),
    "a mask with a class too many": ("masks/0.png", Image.new("L", (64, 64), 77), "77"),
    "a mask of colours": ("masks/0.png", Image.new("RGB", (64, 64)), "no PNG of class numbers"),
    "a 16-bit image": ("images/0.png", Image.new("I;16", (64, 64)), "8 bits"),
    "a truncated mask": ("masks/0.png", b"\x89PNG", "masks/0.png"),
    "an empty list": ("splits/train.txt", b"", "train.txt: no line"),
    "a line without mask": ("splits/val.txt", b"images/0.png", "'images/0.png' names no mask"),
    "broken json": ("dataset.json", b"{", "dataset.json"),
    "only one class": ("dataset.json", b'{"classes": ["sky"]}', "2 to 255"),
    "nothing left unlabelled": ("splits/train.txt", pairs(0, 1), "--unlabelled off"),
    "more labels than masks": "--labels 200 | --labels 200",
    "unknown CLIP": "--clip ViT-Z | ViT-Z",
    "a CLIP with a foreign text tower": "--clip roberta-ViT-B-32 | roberta-ViT-B-32",
    "QuickGELU weights for a GELU model": "--clip ViT-B-16 --clip-weights openai | quickgelu",
    "malicious weights": "--clip ViT-S-32-alt --clip-weights bad.pt | bad.pt",
    "a malicious checkpoint": "--eval bad.pt | bad.pt is no last.pt",
    "a width without an eighth": "--decoder-channels 12 | multiple of 8",
    "a crop below the patch": "--crop 7 --stride 7 | patch",
    "no image to predict": "--predict images/0.png | name images",
    "a file for a run": "--resume dataset.json | dataset.json/last.pt",
    "an output folder that is taken": "--out splits | --out splits already exists",
    "a number out of range": "--conf-thresh 2 | conf_thresh: between 0 and 1",
    "a word for a number": "--labels many | argument --labels: invalid int value",
    "classes that are numbers": ("dataset.json", b'{"classes": [0, 1]}', "words in quotes"),
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
        else:
            Path(file).write_bytes(content)
    before = sorted(Path().rglob("*"))
    assert semivl.main(options) == 2
    said = capsys.readouterr()
    assert said.err.startswith("semivl.py: ") and words in said.err
    assert len(said.err.splitlines()) == 1 and "must never run" not in said.out
    assert sorted(Path().rglob("*")) == before


def test_a_loader_error_ends_the_run_with_its_own_message(folder, tmp_path, capsys):
    save(folder / "splits", {"train.txt": pairs(0, 1) + b"images/none.png\n"})
    assert run(folder, tmp_path / "run", "--workers", 1) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"semivl.py: {folder}/images/none.png: ") and said.count("\n") == 1


# Data folders: the published sets from small archives of the true layout --------------------------
WORLDS = {  # data set -> three training and two validation images, line of a list, archives' files
    "voc": (
        "12345",
        "JPEGImages/{0}.jpg SegmentationClass/{0}.png",
        "VOCdevkit/VOC2012/JPEGImages/{0}.jpg VOCdevkit/VOC2012/SegmentationClass/{0}.png",
    ),
    "coco": (
        [f"{'train' if i < 3 else 'val'}2017/{i:012}" for i in range(5)],
        "{0}.jpg masks/{1}.png",
        "{0}.jpg deep/{1}.png",
    ),
    "ade20k": (
        "training/ADE_train_{0}1 training/ADE_train_{0}2 training/ADE_train_{0}3 "
        "validation/ADE_val_{0}1 validation/ADE_val_{0}2".format("0000000").split(),
        "",
        "ADEChallengeData2016/images/{0}.jpg ADEChallengeData2016/annotations/{0}.png",
    ),
    "cityscapes": (
        "train/a/a_1 train/a/a_2 train/b/b_3 val/c/c_4 val/c/c_5".split(),
        "leftImg8bit/{0}_leftImg8bit.png gtFine/{0}_gtFine_labelTrainIds.png",
        "leftImg8bit/{0}_leftImg8bit.png gtFine/{0}_gtFine_labelIds.png gtFine/{0}_no_color.png",
    ),
}
VALUES = (0, 1, 150, *range(3, 34))
VALUES_OF = {"voc": (*range(21), 255), "coco": (*range(81), 255)}
TRAINED = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]  # of the classes of Cityscapes


def publish(name: str, values: tuple, monkeypatch) -> None:
    """In ./downloads small archives and lists, which data_prep will take for the published ones.
    All images and masks are one picture that holds these values."""
    names, line, paths = WORLDS[name]
    for path in paths.split():
        for n in names:
            file = Path("layout", path.format(n, n[-12:]))
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.resize(np.uint8(values), (20, 30))).save(file, "PNG")
    lists = {"1/labeled.txt": names[:1], "2/labeled.txt": names[:2], "val.txt": names[3:]}
    lists |= {"train.txt": names[:3]} if name == "voc" else {}
    for file, part in lists.items():
        lines = "\n".join(line.format(n, n[-12:]) for n in part)
        save(Path("downloads/splits", file).parent, {Path(file).name: lines.encode()})
    for archive in data_prep.ARCHIVES[name]:  # each holds all
        made = shutil.make_archive("downloads/new", archive.name[-3:], "layout")
        os.rename(made, f"downloads/{archive.name}")
    monkeypatch.setitem(data_prep.COUNTS, name, (3, 2))
    monkeypatch.setitem(data_prep.LISTS, name, {file: line and file for file in lists})


def first_mask(folder) -> list:
    mask = folder / (folder / "splits/val.txt").read_text().split()[1]
    return np.array(Image.open(mask)).flatten()[:34].tolist()


SPELLING = {"voc": "9d8c10a7", "coco": "a4fab23f", "ade20k": "502dcd34", "cityscapes": "3d95bef9"}
MASKS = {  # what becomes of VALUES
    "voc": [*range(21), 255, *range(12)],
    "coco": [*range(34)],
    "ade20k": [255, 0, 149, *range(2, 33)],
    "cityscapes": [TRAINED.index(i) if i in TRAINED else 255 for i in VALUES],
}


@pytest.mark.parametrize("name", WORLDS)
def test_published_sets_are_made_of_archives(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    publish(name, VALUES_OF.get(name, VALUES), monkeypatch)
    command, home = [name, "--source", "downloads"], Path("data", name)
    assert data_prep.main(command) == 0 and "is complete" in capsys.readouterr().out
    archives = {archive.name for archive in data_prep.ARCHIVES[name]}
    assert archives < {path.name for path in Path("downloads").iterdir()}  # the user's own stay
    assert [path.name for path in Path("data").iterdir()] == [name]
    assert first_mask(home) == MASKS[name]
    assert len((home / "splits/train.txt").read_text().split()) == 3
    classes = json.loads((home / "dataset.json").read_text())["classes"]
    assert hashlib.md5("|".join(classes).encode()).hexdigest().startswith(SPELLING[name])


def test_voc_is_made_trained_and_evaluated_by_one_command(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    publish("voc", VALUES_OF["voc"], monkeypatch)
    prepare = data_prep.prepare
    monkeypatch.setattr(data_prep, "prepare", lambda name, _: prepare(name, "downloads"))
    assert semivl.main(["--dataset", "voc", *TINY, "--labels", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 labelled, 1 unlabelled, 2 validation, 0 test images; 4 steps" in said
    assert [*table(Path("runs/voc-2"))] == ["CLIP by names", "CLIP by definitions", "SemiVL"]


def test_the_toy_world_repeats_itself_and_is_complete_or_absent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, again, other = (np.array(data_prep.Painter(seed).scene()[0]) for seed in "aab")
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    for name, value in dict(SPLITS={"train": 3, "val": 2, "test": 2}, CORPUS=64, STEPS=2).items():
        monkeypatch.setattr(data_prep, name, value)
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(data_prep, "pretrain_tiny_clip", lambda *_: 1 / 0)
        data_prep.prepare("toy")
    assert list(Path("data").iterdir()) == []
    toy = data_prep.prepare("toy")
    assert len(first_mask(toy)) == 34 and len(list(toy.glob("images/train/*.png"))) == 3
    saved = torch.load(toy / "open_clip_pytorch_model.bin", weights_only=True)
    clip = semivl.load_clip(preset("toy"))[0].state_dict()
    assert clip.keys() == saved.keys() and all(torch.equal(clip[k], saved[k]) for k in clip)


# Own pictures -------------------------------------------------------------------------------------
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
    data = semivl.open_data("mine")
    entries = data.train + data.val
    assert len(data.val) == 2 and sum(not mask for _, mask in entries) == 1
    for image, mask in entries:
        assert not mask or np.array_equal(data.pair((image, mask))[1], masks[int(image[-5])])
    assert data_prep.main(command) == 2 and "is there already" in capsys.readouterr().err


def own_lists(folder: Path, *options) -> dict[str, str]:
    """Makes folder/own of folder/images and folder/masks -> the text of its lists."""
    command = [str(folder / "own"), "--images", str(folder / "images"), *map(str, options)]
    assert data_prep.main(command) == 0
    return {file.stem: file.read_text() for file in (folder / "own/splits").glob("*.txt")}


def test_copies_of_a_picture_stay_on_one_side_and_folders_of_val_validate(folder, capsys):
    for place in ("images", "masks"):
        for i in range(6):
            (folder / place / f"{i}.png").rename(folder / place / f"{i % 2}_jpg.rf.{i}.png")
    (folder / "images/IMG_1.HEIC").write_bytes(b"")
    options = ["--masks", folder / "masks", "--classes", ",".join(CLASSES)]
    lists = own_lists(folder, *options)
    assert "left out are 1 .heic" in capsys.readouterr().out
    sides = [{line.split("/")[-1][0] for line in text.splitlines()} for text in lists.values()]
    assert sorted(sides, key=min) == [{"0"}, {"1"}]
    shutil.rmtree(folder / "own")
    for place in ("images", "masks"):
        (folder / place / "valid").mkdir()
        (folder / place / "1_jpg.rf.3.png").rename(folder / place / "valid/a.png")
    assert own_lists(folder, *options)["val"] == "../images/valid/a.png masks/valid/a.png\n"


@pytest.mark.parametrize("kind", ["CVAT", "a data folder of before"])
def test_an_export_is_taken_as_it_is(kind, folder, tmp_path, capsys):
    palette = [(0, 0, 0), (250, 50, 83), (51, 221, 255), (9, 9, 0), (9, 0, 9), (0, 9, 9)]
    export = tmp_path / "export"
    for place in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (export / place).mkdir(parents=True)
    for i in range(6):
        Image.open(folder / f"images/{i}.png").save(export / f"JPEGImages/{i}.jpg")
        mask = np.array(Image.open(folder / f"masks/{i}.png"))
        for place in ("SegmentationClass", "SegmentationObject"):
            Image.fromarray(np.uint8(palette)[mask]).save(export / f"{place}/{i}.png")
    if kind == "CVAT":
        lines = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(CLASSES, palette)]
        (export / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))
    else:
        content = json.dumps(dict(classes=CLASSES, colors=dict(zip(CLASSES, palette))))
        (export / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=f"NEW --images {export} converts"):
            semivl.open_data(str(export))
    assert data_prep.main([str(tmp_path / "made"), "--images", str(export)]) == 0
    assert "left out" not in capsys.readouterr().out
    data = semivl.open_data(str(tmp_path / "made"))
    assert list(data.classes) == CLASSES and (len(data.train), len(data.val)) == (5, 1)
    for image, mask in data.train + data.val:
        truth = np.array(Image.open(folder / f"masks/{Path(image).stem}.png"))
        assert np.array_equal(data.pair((image, mask))[1], truth)
    Image.new("RGB", (9, 9)).save(export / "SegmentationClass/0.png")
    assert data_prep.main([str(tmp_path / "again"), "--images", str(export)]) == 2
    assert f"{export}/SegmentationClass/0.png: (9, 9) pixels" in capsys.readouterr().err


def test_a_folder_is_checked_and_its_problems_are_listed(folder, capsys):
    save(folder / "splits", {"val.txt": pairs(1, 4), "test.txt": pairs(*range(100, 130))})
    assert data_prep.main([str(folder)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 21 and said[-1] == "... and 10 more" and "images/100.png" in said[0]
    save(folder / "splits", {"test.txt": pairs(5)})
    for i in range(6):
        Image.new("L", (64, 64), 1).save(folder / f"masks/{i}.png")
    assert data_prep.main([str(folder)]) == 2 and "train shows one class" in capsys.readouterr().err
    Image.new("L", (64, 64), 0).save(folder / "masks/0.png")
    assert data_prep.main([str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["background", "0", "(0)", "4,096", "(1)", "0", "(0)"]
    assert said[-1] == f"note: 1 images are in train and val, such as {folder}/images/1.png"


# The README's examples ----------------------------------------------------------------------------
def test_examples_of_the_readme_run(tmp_path, monkeypatch):
    def random_weights(name, *_, **__):  # in the place of a download
        return open_clip.CLIP(**open_clip.get_model_config(name))

    text = Path(semivl.__file__).with_name("README.md").read_text("utf-8")
    blocks = re.findall(r"(?:^    .*\n)+", text, re.M)
    blocks = [block for block in blocks if "semivl import" in block]
    assert len(blocks) == 2
    monkeypatch.setattr(open_clip, "create_model", random_weights)
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((60, 40), 90).save("photo.jpg")
    for block in blocks:
        exec(textwrap.dedent(block), {})
    assert Image.open("mask.png").size == (60, 40)
    assert {*np.unique(Image.open("mask.png"))} <= {0, 1}
