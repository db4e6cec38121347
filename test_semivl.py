"""What semivl.py guarantees, one claim a test.

    pytest -q test_semivl.py

The numbers below were computed once by the authors' code (google-research/semivl, commit 13ee65d,
float32, CPU) with weights made by a formula, so that nobody has to carry a weight file.
"""

import ast
import doctest
import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

import data_prep
import semivl
from semivl import Config, Targets

IGNORE = semivl.IGNORE

# ----------------------------------------------------------------------------------------------
# Equality with the authors' code. Each array: its first 4 values, 16 values spread evenly over
# it, the mean, the absolute maximum.
# ----------------------------------------------------------------------------------------------

ARRAYS = {
    "skip_layer0": [0.15992, 3.27752, -0.056616, -1.702557, 0.15992, 0.467877, -1.497985,
        1.490614, -2.886765, 1.454157, -2.06006, 1.778295, -0.191506, 0.686713, -1.330713,
        -0.715341, 2.17066, -0.969972, 0.25479, 1.035475, -0.042709, 5.731266],
    "skip_layer4": [-1.654189, 0.682463, -2.176073, -0.896271, -1.654189, 1.530843, -4.347634,
        -1.780601, -3.360172, 2.096778, -2.92831, -0.977327, -0.106253, -0.425296, -2.295802,
        3.127831, 3.445682, -2.107284, -0.646402, -0.303443, 0.091571, 9.197062],
    "dense_embed": [0.081275, 0.097947, 0.095571, 0.078342, 0.081275, 0.028232, 0.100249,
        -0.063952, 0.005497, 0.026015, -0.096476, -0.01425, 0.033275, -0.069387, -0.067863,
        -0.024745, 0.053244, -0.053068, -0.012182, 0.044389, -0.001207, 0.217205],
    "global_embed": [0.066732, -0.037101, 0.072955, -0.012894, 0.066732, 0.062985, 0.028392,
        -0.037435, 0.038273, 0.054403, -0.058688, 0.000324, 0.030147, -0.011709, -0.056386,
        -0.11144, 0.012528, 0.024588, -0.024457, 0.040614, 0.000366, 0.17356],
    "sim": [0.04126, 0.014675, 0.035255, 0.023586, 0.04126, 0.043756, -0.025417, 0.02244,
        -0.061694, -0.047915, -0.026058, -0.007713, 0.035588, 0.061302, 0.04007, -0.078713,
        -0.03793, -0.053377, 0.033665, -0.022069, -0.015729, 0.113589],
    "aspp_out": [0.81357, 0.873607, 0.605794, 0.725779, 0.81357, -0.037424, 1.065153, 2.411487,
        0.034223, 1.017388, 2.046119, -0.031813, 1.954044, 2.419207, -0.009924, 0.20218,
        2.270027, 0.010908, 0.808489, 2.441332, 0.408567, 3.742311],
    "semantic_out": [5.665031, 5.607229, 5.221578, 5.223725, 5.665031, 5.924078, -0.677004,
        6.856942, 5.235291, -4.320525, -1.76364, 0.653395, -0.435463, 2.397645, 4.085968,
        8.879656, -1.087491, -0.856027, 0.810419, 11.334358, 1.499726, 12.951447],
    "dec_lowres": [0.286775, 0.415613, 0.101565, 0.362099, 0.286775, 1.015524, 0.337099,
        -0.186425, 1.0006, 0.34767, -0.178846, 0.982571, 0.356307, 0.192351, 0.488941, 0.44261,
        0.209426, -0.417706, 0.437569, 0.208606, 0.431636, 1.725022],
    "logits": [0.286775, 0.286775, 0.302879, 0.335089, 0.286775, 0.869999, 0.295526, -0.186425,
        0.880205, 0.302807, -0.178846, 0.849566, 0.256424, 0.192351, 0.380143, 0.298598,
        0.209426, 0.31663, 0.29749, 0.208606, 0.431636, 1.542125],
    "odd skip_layer0": [-3.736178, 0.057633, 1.988632, 1.797632, -3.736178, 1.200531,
        -0.104853, 1.496668, 1.240249, -1.068947, 3.359379, 0.875451, -0.812522, -0.337124,
        -1.369062, 1.303784, -3.991397, -1.536647, 0.860699, -0.050145, -0.0582, 5.80963],
    "odd skip_layer4": [-1.350434, -0.455502, -0.564709, 0.109231, -1.350434, 4.013179,
        -3.63347, -0.359648, 1.020209, -1.215565, -0.773783, -1.375085, 1.29303, -0.197985,
        -2.268917, -1.906586, -5.260629, 2.79941, -3.438032, 2.29666, 0.08356, 9.356159],
    "odd dense_embed": [0.037555, 0.079493, 0.036488, 0.048466, 0.037555, 0.090814, 0.033361,
        0.011346, 0.070169, -0.041965, -0.029592, -0.048963, 0.01016, 0.03985, 0.024115,
        -0.035525, -0.103491, -0.005041, -0.028557, 0.029369, -0.000461, 0.193704],
    "certainty": [0.976819, 0.976819, 0.976819, 0.976819, 0.976819, 0.963199, 0.837806,
        0.638957, 0.689342, 0.818689, 0.944212, 0.650537, 0.84889, 0.581812, 0.696046, 0.9932,
        0.763897, 0.897844, 0.72144, 0.895673, 0.761447, 0.99844],
    "cityscapes skip4": [-1.693422, 0.454151, -2.100168, -0.987981, -1.693422, 1.741158,
        -4.500303, -1.687726, -3.290023, 1.976764, -2.97368, -1.057912, 0.035762, -0.263389,
        -2.26737, 2.977394, 3.361702, -2.468182, -0.874962, -0.27655, 0.085328, 8.992495],
    "cityscapes embed": [0.081042, 0.097754, 0.093204, 0.078673, 0.081042, 0.026623, 0.098807,
        -0.060205, 0.005449, 0.029585, -0.093857, -0.014842, 0.030355, -0.074688, -0.062177,
        -0.022469, 0.053919, -0.052972, -0.012568, 0.047792, -0.001189, 0.218271],
    "cityscapes conv": [0.226451, 0.145112, 0.044765, 0.100693, 0.226451, 0.374879, 0, 0.22077,
        0.887478, 1.537844, 0.044439, 0, 1.770502, 0, 0, 0.279906, 0.003025, 0.695469,
        0.381912, 0.263131, 0.53414, 3.460292],
    "cityscapes logits": [0.29533, 0.29533, 0.290421, 0.280603, 0.29533, 1.001029, 0.538707,
        0.444519, 0.835652, 0.542196, 0.441757, 0.967453, 0.965631, 0.427115, 0.919696,
        0.942818, 0.441149, 0.984392, 0.947467, 0.437799, 0.819211, 2.088953],
    "window average": [0.028309, 0.028309, 0.037568, 0.056085, 0.028309, 0.117839, -0.114586,
        0.103002, 0.102513, -0.086269, 0.103278, 0.103999, -0.060985, 0.142996, 0.104738,
        -0.079491, 0.108828, 0.105471, -0.098477, 0.110517, 0.400172, 1.48099],
}

STEP = {  # confidence threshold, factor on the last layer -> losses, gradient norms by group
    (0.2068093, 1): (
        dict(x=1.60975146, s1=0.4183915, s2=0.4470166, fp=0.4491525, guidance_s1=0.98458409,
             guidance_s2=0.92940021, guidance_fp=0.92866051, total=1.09605193),
        {"clip": 0.017652061, "clip.0": 0.0048057933, "clip.1": 0.0058120814,
         "clip.2": 0.0069290205, "clip.3": 0.0067981709, "clip.4": 0.0052575254,
         "clip.5": 0.0046670007, "clip.6": 0.004630072, "clip.7": 0.0043798839,
         "clip.8": 0.0043670068, "clip.9": 0.003800888, "clip.10": 0.0047002005,
         "clip.11": 0.0038282397, "position": 0.00042969495, "decoder": 0.086523607,
         "aspp": 0.054678645, "lift": 0.014191754, "head.weight": 0.010709017,
         "semantic.0": 0.016013566, "semantic.1": 0.0077650407, "deep_proj": 0.0059577831,
         "shallow_proj": 0.0088701337, "text_proj": 0.0012432233, "up1": 0.051715318,
         "up2": 0.032765335}),
    (0.5, 40): (
        dict(x=1.97758615, s1=0.27375245, s2=0.27928621, fp=0.29215267, guidance_s1=1.30710077,
             guidance_s2=1.21624279, guidance_fp=1.07721031, total=1.21866918),
        {"clip": 1.506902, "clip.0": 0.44417033, "clip.1": 0.55804146, "clip.2": 0.54600044,
         "clip.3": 0.53144125, "clip.4": 0.4476859, "clip.5": 0.45936393, "clip.6": 0.40365826,
         "clip.7": 0.36935885, "clip.8": 0.37864082, "clip.9": 0.30105445, "clip.10": 0.37523044,
         "clip.11": 0.30763699, "position": 0.035567643, "decoder": 5.2383538, "aspp": 3.6146547,
         "lift": 1.0677787, "head.weight": 0.014104485, "semantic.0": 1.1637347,
         "semantic.1": 0.54981879, "deep_proj": 0.27798519, "shallow_proj": 0.55270086,
         "text_proj": 0.070770467, "up1": 2.8920327, "up2": 1.6810939}),
}


def authors_shapes(cityscapes: bool) -> dict[str, tuple]:
    """Names and shapes of an authors' checkpoint: ViT of width 64, full-size decoder."""
    D, E, C = 64, 512, 128
    shapes = {"backbone.cls_token": (1, 1, D), "backbone.pos_embed": (1, 65, D),
              "backbone.patch_embed.projection.weight": (D, 3, 16, 16),
              "backbone.proj.weight": (E, D, 1, 1)}

    def layer(name, c_out, *rest, bias=True):
        shapes[f"{name}.weight"] = (c_out, *rest)
        if bias:
            shapes[f"{name}.bias"] = (c_out,)

    def batch_norm(name, c):
        layer(name, c)
        shapes.update({f"{name}.running_mean": (c,), f"{name}.running_var": (c,),
                       f"{name}.num_batches_tracked": ()})

    def transformer(name, D, hidden):
        for norm in ("ln1", "ln2"):
            layer(f"{name}.{norm}", D)
        shapes[f"{name}.attn.attn.in_proj_weight"] = (3 * D, D)
        shapes[f"{name}.attn.attn.in_proj_bias"] = (3 * D,)
        layer(f"{name}.attn.attn.out_proj", D, D)
        layer(f"{name}.ffn.layers.0.0", hidden, D)
        layer(f"{name}.ffn.layers.1", D, hidden)

    for norm in ("ln0", "ln1"):
        layer(f"backbone.{norm}", D)
    for i in range(12):
        transformer(f"backbone.layers.{i}", D, 4 * D)

    head = "decode_head."
    layer(head + "conv1", C, 1, 7, 7)
    for i in range(4):
        layer(f"{head}aspp.aspp_convs.{i}.0", C, C, *([1, 1] if i == 0 else [3, 3]), bias=False)
        layer(f"{head}aspp.aspp_convs.{i}.1", C)
    layer(head + "aspp.aspp_convs.4.gap.1", C, C, 1, 1, bias=False)
    layer(head + "aspp.aspp_convs.4.gap.2", C)
    layer(head + "aspp.project.0", C, 5 * C, 1, 1, bias=False)
    layer(head + "aspp.project.1", C)
    for i in range(2):
        transformer(f"{head}layers.{i}.transformer", 2 * C, 4 * C)
    layer(head + "text_proj.0", C, E)
    skip, dim = (32, 256) if cityscapes else (16, D)
    layer(head + "skip_proj.0.0", 32, D, 3, 3)
    layer(head + "skip_proj.1.0", skip, dim, 3, 3)
    for stage, c_in, c_skip, c_out in (("up1", C, 32, 64), ("up2", 64, skip, 32)):
        shapes[f"{head}{stage}.up.weight"] = (c_in, c_in - c_skip, 2, 2)
        shapes[f"{head}{stage}.up.bias"] = (c_in - c_skip,)
        layer(f"{head}{stage}.conv.0", c_out, c_in, 3, 3, bias=False)
        layer(f"{head}{stage}.conv.1", c_out)
        layer(f"{head}{stage}.conv.3", c_out, c_out, 3, 3, bias=False)
        layer(f"{head}{stage}.conv.4", c_out)
    layer(head + "head", 1, 32, 3, 3)

    if cityscapes:
        for i, (c_in, c_out) in enumerate(((3, 32), (32, 32), (32, 64))):
            layer(f"conv_encoder.stem.{3 * i}", c_out, c_in, 3, 3, bias=False)
            batch_norm(f"conv_encoder.stem.{3 * i + 1}", c_out)
        for i in range(3):
            block = f"conv_encoder.layer1.{i}."
            for j, shape in enumerate(((64, 256 if i else 64, 1), (64, 64, 3), (256, 64, 1)), 1):
                layer(f"{block}conv{j}", shape[0], shape[1], shape[2], shape[2], bias=False)
                batch_norm(f"{block}bn{j}", shape[0])
        layer("conv_encoder.layer1.0.downsample.0", 256, 64, 1, 1, bias=False)
        batch_norm("conv_encoder.layer1.0.downsample.1", 256)
    return shapes


def authors_state(cityscapes=False) -> dict[str, torch.Tensor]:
    """The weights: normal values seeded by the tensor's name, scaled by its kind."""
    state = {}
    for name, shape in authors_shapes(cityscapes).items():
        if not shape:
            state[name] = torch.tensor(0)
            continue
        z = random_normal(zlib.crc32(name.encode()), shape)
        if name.endswith("running_var"):
            value = 1 + 0.1 * z.abs()
        elif len(shape) == 1:
            value = (1 + 0.1 * z) if name.endswith("weight") else 0.1 * z
        elif name.endswith(("cls_token", "pos_embed")):
            value = 0.5 * z
        else:
            value = z / np.float32(math.sqrt(math.prod(shape[1:])))
        state[name] = value
    return state


def random_normal(seed: int, shape) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def unit_rows(name: bytes, rows: int) -> torch.Tensor:
    return F.normalize(random_normal(zlib.crc32(name), (rows, 512)), dim=1)


SIZES = [3, 2, 1, 1, 2]  # nine concepts of five classes


@pytest.fixture(scope="module")
def authors():
    text = unit_rows(b"text", 5)
    return data_prep.load_authors_checkpoint(semivl, authors_state(), text, heads=2)


@pytest.fixture(scope="module")
def cityscapes():
    text = unit_rows(b"text", 5)
    return data_prep.load_authors_checkpoint(semivl, authors_state(True), text, heads=2)


def assert_golden(name: str, array: torch.Tensor, atol: float = 1e-5):
    flat = array.detach().flatten().double()
    spread = torch.from_numpy(np.linspace(0, len(flat) - 1, 16).astype(int))
    values = torch.cat([flat[:4], flat[spread], flat.mean()[None], flat.abs().max()[None]])
    np.testing.assert_allclose(values, ARRAYS[name], rtol=0, atol=atol, err_msg=name)


@torch.no_grad()
def test_every_stage_of_the_forward_pass_equals_the_authors(authors):
    images, decoder = random_normal(7, (2, 3, 128, 128)), authors.decoder
    dense, (skip0, skip4) = authors.clip(images)
    similarity = semivl.cosine_maps(dense, authors.text)
    spatial = decoder.spatial_reasoning(similarity)
    assert_golden("skip_layer0", skip0)
    assert_golden("skip_layer4", skip4)
    assert_golden("dense_embed", dense)
    tokens, _, _ = authors.clip.encode(images, last_attention=True)
    assert_golden("global_embed", F.normalize(tokens[:, 0], dim=1))
    assert_golden("sim", similarity)
    assert_golden("aspp_out", spatial.flatten(0, 1))
    semantic = decoder.semantic_reasoning(spatial, authors.text)
    assert_golden("semantic_out", semantic.transpose(1, 2))
    assert_golden("dec_lowres", decoder(dense, (skip0, skip4), authors.text))
    assert_golden("logits", authors(images))


@torch.no_grad()
def test_features_of_an_image_of_odd_size_equal_the_authors(authors):
    dense, (skip0, skip4) = authors.clip(random_normal(7, (1, 3, 65, 55)))
    assert dense.shape == (1, 512, 5, 4)
    assert_golden("odd skip_layer0", skip0)
    assert_golden("odd skip_layer4", skip4)
    assert_golden("odd dense_embed", dense)


@torch.no_grad()
def test_cityscapes_variant_with_its_convolutional_skip_equals_the_authors(cityscapes):
    images = random_normal(7, (2, 3, 128, 128))
    dense, (_, skip4) = cityscapes.clip(images)
    assert_golden("cityscapes skip4", skip4)
    assert_golden("cityscapes embed", dense)
    assert_golden("cityscapes conv", cityscapes.conv(images)[-1])
    assert_golden("cityscapes logits", cityscapes(images))


@pytest.mark.parametrize("conf, counts, grid", [
    (0.9, {3: 3991, 4: 5081, 255: 23696}, [3, 3, 255, 255, 3, 255, 255, 4]),
    (0.3, {1: 337, 3: 13481, 4: 18950}, [3, 3, 3, 3, 3, 3, 4, 4]),
])
def test_guidance_labels_equal_the_authors(authors, conf, counts, grid):
    guidance = semivl.FrozenGuidance(authors.clip, unit_rows(b"concepts", 9), SIZES, conf)
    images = random_normal(7, (2, 3, 128, 128))
    labels = guidance.labels(images)
    assert dict(zip(*(t.tolist() for t in labels.unique(return_counts=True)))) == counts
    assert labels[0, 0, ::16].tolist() == grid
    assert_golden("certainty", guidance(images).softmax(1).max(1)[0])


@pytest.mark.parametrize("variant", STEP)
def test_losses_and_gradients_of_a_step_equal_the_authors(variant, monkeypatch):
    conf, factor = variant
    state = authors_state()
    for name in ("decode_head.head.weight", "decode_head.head.bias"):
        state[name] = state[name] * factor
    student = data_prep.load_authors_checkpoint(semivl, state, unit_rows(b"text", 5), heads=2)
    # Feature dropout without chance: channels of odd index go, the others double.
    monkeypatch.setattr(F, "dropout2d", lambda f, p: 2 * f * (
        torch.arange(f.shape[1]) % 2 == 0).float()[:, None, None])
    guidance = semivl.FrozenGuidance(
        semivl.copy_trained(student.clip), unit_rows(b"concepts", 9), SIZES, conf=0.7)
    x, w, s1, s2 = (random_normal(seed, (2, 3, 128, 128)) for seed in (11, 12, 13, 14))
    y = torch.from_numpy(np.random.RandomState(15).randint(0, 5, (2, 128, 128)))
    y[:, :8] = IGNORE
    padding = torch.zeros(2, 128, 128, dtype=torch.bool)
    padding[0, -16:] = True
    box1 = torch.tensor([[64, 16, 128, 80], [0, 0, 0, 0]])
    box2 = torch.tensor([[64, 64, 128, 128]] * 2)

    targets = semivl.make_targets(semivl.EMATeacher(student, 0), guidance, w, padding)

    def mixed(view, box):
        def paste(t):
            return semivl.cutmix(t, t.flip(0), box)
        return paste(view), targets.apply(paste)

    views = {"s1": mixed(s1, box1), "s2": mixed(s2, box2), "fp": (w, targets)}
    losses = semivl.semivl_loss(student, x, y, views, guidance_weight=0.075, conf=conf)
    losses["total"].backward()

    expected, norms = STEP[variant]
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        expected, rel=0, abs=1e-5)
    assert (views["s1"][1].clip_label == IGNORE).sum() == 12766
    assert (targets.clip_label == 4).sum() == 12364
    for group, norm in norms.items():
        prefix = {"clip": "clip.", "position": "clip.visual.positional_embedding",
                  "decoder": "decoder."}.get(group, f"decoder.{group}")
        if group.startswith("clip."):
            prefix = f"clip.visual.transformer.resblocks.{group[5:]}."
        square = sum(p.grad.double().square().sum() for name, p in student.named_parameters()
                     if name.startswith(prefix) and p.grad is not None)
        assert math.sqrt(square) == pytest.approx(norm, rel=1e-4), group


@torch.no_grad()
def test_window_average_equals_the_authors(authors):
    logits = semivl.sliding_window(authors, random_normal(21, (1, 3, 150, 300)), 128, 106)
    logits = F.interpolate(logits, (180, 360), mode="bilinear", align_corners=True)
    assert_golden("window average", logits, atol=2e-5)
    prediction = logits.argmax(1)[0]
    assert prediction.flatten().bincount().tolist() == [22232, 4377, 31751, 2893, 3547]
    truth = torch.from_numpy(np.random.RandomState(22).randint(0, 5, (180, 360)))
    for rows, hits, unions, mean in (
        (0, [4550, 837, 6377, 545, 726], [30836, 16416, 38320, 15268, 15725], 8.93640294176507),
        (20, [4115, 699, 5680, 471, 646], [27725, 14481, 33953, 13484, 13946], 8.904680799734669),
    ):
        truth[:rows] = IGNORE
        matrix = semivl.confusion_matrix(prediction, truth, 5)
        assert matrix.diag().tolist() == hits
        assert (matrix.sum(0) + matrix.sum(1) - matrix.diag()).tolist() == unions
        assert semivl.iou_per_class(matrix).mean().item() == pytest.approx(mean, abs=1e-9)


@torch.no_grad()
def test_window_probabilities_equal_the_authors_with_one_resize(authors):
    image = random_normal(21, (1, 3, 150, 310))
    scores = semivl.sliding_window(authors, image, 128, 85, mode="probabilities")
    counts = scores.argmax(1).flatten().bincount()
    # Near-ties may fall either way on another processor: three pixels a class.
    assert (counts - torch.tensor([15903, 4131, 20706, 3233, 2527])).abs().max() <= 3


def test_learning_rate_equals_the_authors():
    rates = [semivl.learning_rate(0.001, step, 100) for step in (0, 1, 2, 50, 99)]
    expected = [0.001, 0.001, 0.001 * 0.99**0.9, 0.001 * 0.51**0.9, 0.001 * 0.02**0.9]
    assert rates == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------------------------------------------
# CLIP
# ----------------------------------------------------------------------------------------------


def tiny_model(classes=3, crop=64, decoder="language", seed=0):
    """A student around a random tiny CLIP."""
    torch.manual_seed(seed)
    cfg = Config(crop=crop, decoder=decoder)
    visual = data_prep.empty_clip("toy").visual
    return semivl.assemble(cfg, visual, F.normalize(torch.randn(classes, 64), dim=1))


@pytest.mark.parametrize("pool", ["tok", "avg"])
@torch.no_grad()
def test_with_attention_kept_the_dense_path_is_open_clips_image_embedding(pool):
    torch.manual_seed(0)
    config = dict(image_size=64, patch_size=16, width=64, layers=3, head_width=32, pool_type=pool)
    clip = open_clip.CLIP(64, config, dict(width=32, heads=2, layers=1), quick_gelu=True).eval()
    images = torch.randn(2, 3, 64, 64)
    theirs = clip.encode_image(images, normalize=True)
    tokens, _, _ = semivl.DenseCLIP(clip.visual).encode(images, last_attention=True)
    ours = F.normalize(tokens[:, 1:].mean(1) if pool == "avg" else tokens[:, 0], dim=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_authors_clip_differs_and_is_switched_by_one_argument():
    def dense(authors):
        torch.manual_seed(0)
        clip = open_clip.CLIP(64, dict(image_size=64, patch_size=16, width=64, layers=3),
                              dict(width=32, heads=2, layers=1), quick_gelu=True)
        return semivl.DenseCLIP(clip.visual, authors=authors)(torch.ones(1, 3, 64, 64))[0]

    assert (dense(True) - dense(False)).abs().max() > 1e-5


def test_spatial_fine_tuning_trains_attention_and_position_only(authors):
    trained = {n.split(".")[-2] for n, p in authors.clip.named_parameters() if p.requires_grad}
    assert trained == {"attn", "out_proj", "visual"}
    assert sum(p.requires_grad for p in authors.clip.parameters()) == 49
    clip = tiny_model().clip
    assert all(p.requires_grad for p in semivl.spatial_fine_tuning(clip, "all").parameters())
    assert not any(p.requires_grad for p in semivl.spatial_fine_tuning(clip, "none").parameters())


def test_what_would_be_computed_wrongly_is_refused():
    visual = data_prep.empty_clip("toy").visual
    semivl.DenseCLIP(visual, (5, 5))
    scaled = open_clip.transformer.VisionTransformer(
        32, 8, 32, 2, 2, 4, output_dim=8, block_type="custom", scale_attn_inner=True)
    for wrong in (lambda: semivl.DenseCLIP(visual), lambda: semivl.DenseCLIP(scaled),
                  lambda: semivl.spatial_fine_tuning(visual, "Spatial"),
                  lambda: semivl.consistency_loss(*[None] * 4, weighting="pixels")):
        with pytest.raises(ValueError):
            wrong()


def test_definitions_average_for_the_decoder_and_stand_apart_for_guidance():
    clip = data_prep.empty_clip("toy")
    classes = {"ground": ["grass", "sand"], "car": ["car"]}
    language = semivl.describe_classes(clip, classes, Config(decoder_text="mean"))
    raw = semivl.encode_text(clip, ["grass", "sand"])
    torch.testing.assert_close(language.decoder_text[0], F.normalize(raw.mean(0), dim=0))
    assert language.sizes == [2, 1]
    torch.testing.assert_close(language.concepts[:2], F.normalize(raw, dim=1))
    off = semivl.describe_classes(clip, classes, Config(definitions=False))
    torch.testing.assert_close(off.concepts, off.names)
    torch.testing.assert_close(off.decoder_text, off.names)


def test_the_published_classes_are_complete():
    counts = {name: (len(c), sum(map(len, c.values()))) for name, c in semivl.CLASSES.items()}
    assert counts == {"voc": (21, 98), "cityscapes": (19, 54), "coco": (81, 81),
                      "ade20k": (150, 150)}


# ----------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["language", "vision"])
@pytest.mark.parametrize("size", [(64, 64), (40, 96), (33, 17), (9, 130)])
@torch.no_grad()
def test_logits_have_the_size_of_the_image(size, decoder):
    model = tiny_model(classes=4, decoder=decoder).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 4, *size)


@torch.no_grad()
def test_permuting_the_classes_permutes_the_logits():
    model, images = tiny_model(classes=5).eval(), torch.randn(1, 3, 64, 64)
    logits, order = model(images), torch.tensor([3, 0, 4, 2, 1])
    model.text = model.text[order]
    torch.testing.assert_close(model(images), logits[:, order], rtol=0, atol=1e-5)
    model.text = torch.randn(9, 64)  # the same weights serve another number of classes
    assert model(images).shape == (1, 9, 64, 64)


@torch.no_grad()
def test_perturbation_touches_only_the_last_images():
    model, images = tiny_model().eval(), torch.randn(3, 3, 64, 64)
    clean, perturbed = model(images), model(images, perturb=1)
    torch.testing.assert_close(clean[:2], perturbed[:2], rtol=0, atol=1e-5)
    assert (clean[2] - perturbed[2]).abs().max() > 1e-3


def test_twins_share_frozen_tensors_and_own_trained_ones():
    student = tiny_model()
    teacher = semivl.EMATeacher(student).model
    for mine, theirs in zip(teacher.parameters(), student.parameters()):
        assert (mine is theirs) == (not theirs.requires_grad)
        assert not mine.requires_grad or not theirs.requires_grad


def test_the_teacher_follows_the_formula():
    student = tiny_model()
    teacher = semivl.EMATeacher(student, decay=0.9)
    name, weight = next((n, p) for n, p in student.named_parameters() if p.requires_grad)
    expected = weight.detach().clone()
    for step in range(15):
        weight.data += 1
        decay = min(1 - 1 / (step + 1), 0.9)
        expected = decay * expected + (1 - decay) * weight.detach()
        teacher.update(student, step)
    torch.testing.assert_close(dict(teacher.model.named_parameters())[name].data, expected)


# ----------------------------------------------------------------------------------------------
# Losses and CutMix
# ----------------------------------------------------------------------------------------------


def random_targets(B=2, N=3, side=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    label = torch.randint(N, (B, side, side), generator=random)
    confidence = torch.rand(B, side, side, generator=random)
    padding = torch.zeros(B, side, side, dtype=torch.bool)
    padding[0, 5:] = True
    guidance = torch.randint(N, (B, side, side), generator=random).masked_fill(padding, IGNORE)
    logits = torch.randn(B, N, side, side, generator=random)
    return logits, Targets(label, confidence, padding, guidance)


@pytest.mark.parametrize("weighting", ["pixel", "mean", "share"])
def test_consistency_loss_is_the_written_formula(weighting):
    logits, t = random_targets()
    total = 0.0
    for b in range(2):
        pixels = [(i, j) for i in range(8) for j in range(8) if not t.padding[b, i, j]]
        mean = np.mean([float(t.confidence[b, i, j]) for i, j in pixels])
        share = np.mean([float(t.confidence[b, i, j] >= 0.6) for i, j in pixels])
        for i, j in pixels:
            kept = float(t.confidence[b, i, j] >= 0.6)
            weight = {"pixel": kept, "mean": mean, "share": share}[weighting]
            total -= weight * float(logits[b, :, i, j].log_softmax(0)[t.label[b, i, j]])
    loss = semivl.consistency_loss(logits, *t[:3], conf=0.6, weighting=weighting)
    assert loss.item() == pytest.approx(total / int((~t.padding).sum()), rel=1e-5)


def test_padding_and_ignored_pixels_have_no_influence():
    logits, t = random_targets()
    y = t.label.masked_fill(t.padding, IGNORE)
    changed = torch.where(t.padding.unsqueeze(1), 100 * torch.randn_like(logits), logits)
    for loss in (
        lambda z: semivl.supervised_loss(z, y),
        lambda z: semivl.guidance_loss(z, t.clip_label),
        *(lambda z, m=m: semivl.consistency_loss(z, *t[:3], 0.5, m)
          for m in ("pixel", "mean", "share")),
    ):
        torch.testing.assert_close(loss(changed), loss(logits), rtol=0, atol=0)


def test_losses_without_any_valid_pixel_are_zero():
    logits, t = random_targets()
    nothing = torch.ones_like(t.padding)
    t = t._replace(padding=nothing, clip_label=torch.full_like(t.clip_label, IGNORE))
    assert semivl.supervised_loss(logits, torch.full_like(t.label, IGNORE)) == 0
    assert semivl.guidance_loss(logits, t.clip_label) == 0
    for weighting in ("pixel", "mean", "share"):
        assert semivl.consistency_loss(logits, *t[:3], 0.5, weighting) == 0


def test_the_confidence_threshold_itself_is_kept():
    logits, t = random_targets()
    t = t._replace(confidence=torch.full_like(t.confidence, 0.5))
    assert semivl.consistency_loss(logits, *t[:3], conf=0.5) > 0
    assert semivl.consistency_loss(logits, *t[:3], conf=0.500001) == 0


def test_cutmix_moves_image_and_all_targets_together():
    value = torch.arange(128).reshape(2, 8, 8)
    targets = Targets(value, value.float(), value % 2 == 0, value + 1)
    images = value.float().unsqueeze(1).repeat(1, 3, 1, 1)
    box = torch.tensor([[2, 1, 5, 7], [0, 0, 0, 0]])
    mixed = semivl.cutmix(images, images.flip(0), box)
    t = targets.apply(lambda t: semivl.cutmix(t, t.flip(0), box))
    expected = value.clone()
    expected[0, 2:5, 1:7] = value[1, 2:5, 1:7]
    assert torch.equal(t.label, expected)
    assert torch.equal(mixed, expected.float().unsqueeze(1).repeat(1, 3, 1, 1))
    assert torch.equal(t.confidence, expected.float())
    assert torch.equal(t.padding, expected % 2 == 0)
    assert torch.equal(t.clip_label, expected + 1)


# ----------------------------------------------------------------------------------------------
# Augmentation and data
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, r, expected", [
    ((375, 500), 0.5, (256, 341)), ((375, 500), 1.0, (512, 683)), ((375, 500), 2.0, (1024, 1365)),
    ((100, 500), 1.0, (410, 2048)),
])
def test_random_scale_fits_the_image_as_published(size, r, expected):
    cfg = Config(scale_min=r, scale_max=r)
    assert tuple(semivl.random_size(*size, cfg)) == expected


def test_scale_crop_flip_keeps_image_and_mask_aligned_and_marks_padding():
    torch.manual_seed(0)
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[10:30, 20:50] = 1
    image = (200 * mask + 55).repeat(3, 1, 1)
    for _ in range(20):
        x, y = semivl.scale_crop_flip(image, mask, Config(crop=64, fit=False))
        assert x.shape == (3, 64, 64) and y.shape == (64, 64)
        assert (x[0][y == IGNORE] == 0).all()
        aligned = ((x[0] > 155) == (y == 1))[y != IGNORE]
        assert aligned.float().mean() > 0.97  # edges are blurred, labels are not


def test_strong_views_have_the_published_distribution():
    torch.manual_seed(0)
    n, grey = 1000, torch.full((3, 16, 16), 100, dtype=torch.uint8)
    # All but brightness leaves a uniform grey as it is.
    factors = torch.stack([semivl.strong_view(grey)[0, 0, 0] for _ in range(n)]).double() / 100
    assert 0.76 < (factors != 1).double().mean() < 0.84  # jitter with p = 0.8
    jittered = factors[factors != 1]
    assert jittered.min() < 0.53 and jittered.max() > 1.47
    assert ((jittered > 0.48) & (jittered < 1.52)).all()
    assert jittered.mean() == pytest.approx(1, abs=0.04)
    assert jittered.std() == pytest.approx(1 / 12**0.5, abs=0.02)  # uniform on [0.5, 1.5]

    edge = torch.zeros(3, 16, 16, dtype=torch.uint8)
    edge[:, :, 8:] = torch.tensor([200, 120, 80], dtype=torch.uint8)[:, None, None]
    views = torch.stack([semivl.strong_view(edge) for _ in range(n)]).double()
    assert 0.16 < (views[:, 0] == views[:, 2]).all(2).all(1).double().mean() < 0.24  # grey, p = 0.2
    dark, bright = views[:, 1, 0, 0], views[:, 1, 0, 15]
    middle = (views[:, 1, 8, 8] - dark) / (bright - dark)  # 1 unless blurred
    # With p = 0.5; a sigma under 0.36 (one draw in 7) does not show.
    assert 0.38 < (middle < 0.98).double().mean() < 0.48
    assert 0.55 < middle.min() < 0.65  # sigma up to 2


def test_cutmix_boxes_have_the_published_distribution():
    torch.manual_seed(0)
    boxes = torch.stack([semivl.cutmix_box(100) for _ in range(4000)]).double()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 100**2
    assert (area == 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    drawn = area[area > 0]
    assert drawn.mean().item() == pytest.approx(0.21, abs=0.01)
    assert 0.015 < drawn.min() and drawn.max() <= 0.4 and boxes.max() <= 100


def make_folder(path: Path, scenes=6, side=48) -> Path:
    """A small folder of pictures by the toy world's painter."""
    painter = data_prep.Painter("test")
    for kind in ("images", "masks", "splits"):
        (path / kind).mkdir(parents=True)
    lines = []
    for i in range(scenes):
        image, mask = painter.scene()
        image.save(path / f"images/{i}.png")
        mask.save(path / f"masks/{i}.png")
        lines.append(f"images/{i}.png masks/{i}.png")
    content = {"classes": data_prep.TOY_CLASSES, "definitions": data_prep.TOY_DEFINITIONS}
    (path / "dataset.json").write_text(json.dumps(content))
    (path / "splits/train.txt").write_text("\n".join(lines[:-2]) + "\nimages/0.png\n")
    (path / "splits/val.txt").write_text("\n".join(lines[-2:]))
    return path


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pictures")


def test_palette_masks_are_read_as_class_numbers(folder):
    data = data_prep.open_folder(folder)
    raw = np.array(Image.open(folder / "masks/0.png"))
    assert Image.open(folder / "masks/0.png").mode == "P" and raw.max() > 0
    assert np.array_equal(data.mask(data.train[0]).numpy(), raw)


def test_the_folders_own_ignore_value_becomes_ours(folder):
    content = json.loads((folder / "dataset.json").read_text()) | {"ignore_index": 0}
    (folder / "dataset.json").write_text(json.dumps(content))
    data = data_prep.open_folder(folder)
    raw = np.array(Image.open(folder / "masks/0.png"))
    assert np.array_equal(data.mask(data.train[0]).numpy() == IGNORE, raw == 0)


def test_labelled_images_are_drawn_by_the_seed_or_taken_from_the_list(folder):
    def draw(seed):
        data = data_prep.open_folder(folder)
        data.choose_labelled(Config(dataset="pictures", labels=2, seed=seed))
        return data

    assert draw(0).labelled == draw(0).labelled
    assert len({tuple(draw(seed).labelled) for seed in range(8)}) > 1
    assert not {i for i, _ in draw(0).labelled} & {i for i, _ in draw(0).unlabelled}
    (folder / "splits/2").mkdir()
    (folder / "splits/2/labeled.txt").write_text(
        "images/1.png masks/1.png\nimages/3.png masks/3.png\n")
    assert [image for image, _ in draw(5).labelled] == ["images/1.png", "images/3.png"]


def test_every_item_is_a_function_of_seed_and_position(folder):
    data = data_prep.open_folder(folder)
    data.choose_labelled(Config(dataset="pictures", labels=2))
    cfg = Config(crop=32, fit=False)
    items = semivl.TrainingPictures(data, data.labelled, data.unlabelled, cfg, length=20)
    first, state = items[7], torch.get_rng_state()
    again = items[7]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are untouched
    for name, value in first.items():
        assert value == again[name] if name == "files" else torch.equal(value, again[name])
    assert not torch.equal(first["s1"], first["s2"])
    once = [items.pick("unlabelled", i) for i in range(len(data.unlabelled))]
    assert sorted(once) == sorted(data.unlabelled)  # an epoch sees every image once


# ----------------------------------------------------------------------------------------------
# The published data sets, from small archives of the true layout, served on this machine
# ----------------------------------------------------------------------------------------------


class Host(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; a path in `server.breaking` is cut off in the middle, once."""

    def do_GET(self):
        host, path = self.server, self.path
        host.seen.append((path, self.headers.get("Range")))
        if path not in host.files:
            return self.send_error(404)
        content, start = host.files[path], 0
        if self.headers.get("Range") and host.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) // 2 if path in host.breaking else len(content)
        host.breaking.discard(path)
        self.wfile.write(content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.files, server.breaking, server.seen, server.ranges = {}, set(), [], True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def encoded(array, kind="PNG", palette=False) -> bytes:
    picture = Image.fromarray(array)
    if palette:
        picture.putpalette(np.random.RandomState(0).randint(0, 255, 768).tolist())
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def archive(kind: str, members: dict) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as out:
            for name, content in members.items():
                out.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode="w") as out:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo("VOCdevkit/VOC2012/JPEGImages/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            out.addfile(link)
    return file.getvalue()


class AlwaysIn:
    """A set that holds everything and loses nothing."""

    def __contains__(self, _):
        return True

    def discard(self, _):
        pass


PHOTO = encoded(np.full((20, 30, 3), 99, np.uint8), "JPEG")
MASK = np.arange(600, dtype=np.uint8).reshape(20, 30) % 19


def small_world(name: str) -> tuple[dict, dict]:
    """Three training and two validation images -> archives {name: bytes}, lists {path: text}."""
    if name == "voc":
        names = ["2007_000001", "2007_000002", "2008_000003", "2007_000004", "2007_000005"]
        root, mask = "VOCdevkit/VOC2012/", MASK.copy()
        mask[0, 0] = IGNORE
        members = {f"{root}JPEGImages/{n}.jpg": PHOTO for n in names}
        members |= {f"{root}SegmentationClass/{n}.png": encoded(mask, palette=True)
                    for n in names if n[3] != "8"}  # 2008_000003 has no mask: it needs none
        members |= {f"{root}Annotations/{names[0]}.xml": b"", "../../escaped.jpg": b"x",
                    f"{root}JPEGImages/../../../../escaped.jpg": b"x"}
        archives = {"VOCtrainval_11-May-2012.tar": archive("tar", members)}
        line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png".format
    elif name == "coco":
        names = [f"{i:012}" for i in (7, 8, 9, 4, 5)]
        archives = {
            "train2017.zip": archive("zip", {f"train2017/{n}.jpg": PHOTO for n in names[:3]}),
            "val2017.zip": archive("zip", {f"val2017/{n}.jpg": PHOTO for n in names[3:]}),
            "ground_truth_coco.zip": archive("zip", {
                f"somewhere/deep/{n}.png": encoded(MASK + 60) for n in names}
                | {f"__MACOSX/._{names[0]}.png": b"", "../../000000000001.png": encoded(MASK)})}
        places = dict.fromkeys(names[:3], "train2017") | dict.fromkeys(names[3:], "val2017")
        line = lambda n: f"{places[n]}/{n}.jpg masks/{n}.png"  # noqa: E731
    elif name == "ade20k":
        names = [f"training/ADE_train_{i:08}" for i in (1, 2, 3)]
        names += [f"validation/ADE_val_{i:08}" for i in (1, 2)]
        root, mask = "ADEChallengeData2016/", MASK.copy()
        mask[0, :3] = 0, 1, 150
        archives = {"ADEChallengeData2016.zip": archive("zip", {
            f"{root}{n}": b"" for n in ("sceneCategories.txt", "images/training/../../../up.jpg")}
            | {f"{root}images/{n}.jpg": PHOTO for n in names}
            | {f"{root}annotations/{n}.png": encoded(mask) for n in names})}
        line = None
    else:
        names = ["train/bonn/bonn_000001_000019", "train/bonn/bonn_000002_000019",
                 "train/jena/jena_000003_000019", "val/ulm/ulm_000004_000019",
                 "val/ulm/ulm_000005_000019"]
        ids = np.arange(600, dtype=np.uint8).reshape(20, 30) % 34
        archives = {
            "leftImg8bit_trainvaltest.zip": archive("zip", {
                f"leftImg8bit/{n}_leftImg8bit.png": encoded(np.zeros((20, 30, 3), np.uint8))
                for n in [*names, "test/rom/rom_000006_000019"]} | {"README": b""}),
            "gtFine_trainvaltest.zip": archive("zip", {
                f"gtFine/{n}_gtFine_labelIds.png": encoded(ids) for n in names}
                | {f"gtFine/{n}_gtFine_color.png": b"" for n in names})}
        line = "leftImg8bit/{0}_leftImg8bit.png gtFine/{0}_gtFine_labelTrainIds.png".format
    if not line:
        return archives, {}
    listed = {"1": names[:1], "2": names[:2], "val": names[3:]}
    if name == "voc":
        listed["train"] = names[:3]
    return archives, {f"splits/{name}/{count}.txt": "\n".join(map(line, entries))
                      for count, entries in listed.items()}


def publish(name: str, host, monkeypatch, wrong_first=False) -> dict:
    """Makes the program believe that the small world is the published one, served by two hosts."""
    archives, lists = small_world(name)
    for path, content in archives.items():
        host.files |= {f"/first/{path}": b"spoilt" + content if wrong_first else content,
                       f"/second/{path}": content}
    for path, text in lists.items():
        host.files |= {f"/lists/{path}": text.encode()}
    monkeypatch.setattr(data_prep, "COUNTS", {name: (data_prep.COUNTS[name][0], 3, 2)})
    monkeypatch.setitem(data_prep.PUBLISHED, name, {1: 0.0, 2: 0.0})
    if name == "ade20k":
        lists = {f"splits/{count}.txt": data_prep.ade20k_list(count) for count in ("1", "2", "val")}
    monkeypatch.setitem(data_prep.LISTS, name, "\n".join(
        f"{Path(path).stem} {path.removeprefix('splits/')} "
        f"{hashlib.sha256(text.encode()).hexdigest()}" for path, text in lists.items()))
    monkeypatch.setattr(data_prep, "LIST_HOSTS", (f"{host.url}/gone/", f"{host.url}/lists/"))
    login = name == "cityscapes"
    monkeypatch.setitem(data_prep.ARCHIVES, name, [data_prep.Archive(
        path, 0.001, "" if "truth" in path or login else f"md5:{hashlib.md5(content).hexdigest()}",
        () if login else (f"{host.url}/first/{path}", f"{host.url}/second/{path}"))
        for path, content in archives.items()])
    return archives


@pytest.mark.parametrize("name", ["voc", "coco", "ade20k", "cityscapes"])
def test_a_published_data_set_is_made_from_its_archives(name, host, monkeypatch, tmp_path, capsys):
    archives = publish(name, host, monkeypatch)
    command, source = [name, "--root", str(tmp_path / "data")], tmp_path / "zips"
    if name == "cityscapes":
        assert data_prep.main(command) == 2
        assert len(capsys.readouterr().err.splitlines()) == 3
        assert not (tmp_path / "data").exists()
        source.mkdir()
        for path, content in archives.items():
            (source / path).write_bytes(content)
        command += ["--source", str(source)]
    assert data_prep.main(command) == 0
    shown = capsys.readouterr().out
    assert "GB" in shown and "3 training, 2 validation images" in shown
    assert [p.name for p in (tmp_path / "data").iterdir()] == [name]  # no archive, no part is left
    assert not list(tmp_path.rglob("*escaped*")) and not list(tmp_path.rglob("*link.jpg"))
    made = tmp_path / "data" / name
    data = data_prep.Folder(made, dict.fromkeys(range(data_prep.COUNTS[name][0])), IGNORE)
    assert all((made / image).is_file() for image, _ in data.train)
    mask = data.mask(data.val[0])
    if name == "voc":
        assert [image for image, _ in data.train][2] == "JPEGImages/2008_000003.jpg"
        assert data.train[0][1] is None
        with Image.open(made / data.val[0][1]) as picture:
            assert picture.mode == "P"  # the very file of the archive
        assert mask[0, :4].tolist() == [IGNORE, 1, 2, 3]
    elif name == "coco":
        assert mask[0, :4].tolist() == [60, 61, 62, 63]
    elif name == "ade20k":
        assert mask[0, :4].tolist() == [IGNORE, 0, 149, 2]
    else:
        known = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11,
                 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
        assert mask.flatten()[:34].tolist() == [known.get(i, IGNORE) for i in range(34)]
        assert [image for image, _ in data.secret] == [
            "leftImg8bit/test/rom/rom_000006_000019_leftImg8bit.png"]
        assert len(list(source.iterdir())) == 2  # the user's own archives stay
    assert {p.parent.name for p in made.glob("splits/*/labeled.txt")} == {"1", "2"}

    before, asked = sorted(tmp_path.rglob("*")), len(host.seen)
    assert data_prep.main(command) == 0  # a second time: nothing to do
    assert "nothing to do" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before and len(host.seen) == asked


def test_training_on_a_published_set_prepares_it_by_itself(host, monkeypatch, tmp_path, capsys):
    publish("voc", host, monkeypatch)
    cfg = Config(dataset="voc", labels=2, root=str(tmp_path))
    folder = data_prep.open_data(cfg, semivl.CLASSES)
    folder.choose_labelled(cfg)
    folder.check(decode_all=False)
    assert (len(folder.labelled), len(folder.unlabelled), len(folder.val)) == (2, 1, 2)
    assert f"making {tmp_path}/voc" in capsys.readouterr().out


def test_masks_of_ade20k_are_never_shifted_twice(host, monkeypatch, tmp_path):
    archives = publish("ade20k", host, monkeypatch)
    (name, content), = archives.items()
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {n: file.read(n) for n in file.namelist()}
    for path in members:
        if path.endswith(".png"):  # a copy in circulation: reduced already
            mask = np.array(Image.open(io.BytesIO(members[path]))).astype(int) - 1
            members[path] = encoded(np.where(mask < 0, IGNORE, mask).astype(np.uint8))
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips" / name).write_bytes(archive("zip", members))
    made = data_prep.prepare("ade20k", tmp_path, str(tmp_path / "zips"))  # other digest: a warning
    data = data_prep.Folder(made, dict.fromkeys(range(150)), IGNORE)
    assert data.mask(data.val[0])[0, :4].tolist() == [IGNORE, 0, 149, 2]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_goes_on_where_it_stopped(ranges, host, tmp_path):
    content = np.random.RandomState(0).bytes(3_000_001)
    host.files, host.breaking, host.ranges = {"/a.bin": content}, {"/a.bin"}, ranges
    data_prep.download(f"{host.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == content
    assert host.seen == [("/a.bin", None), ("/a.bin", "bytes=1500000-")]
    (tmp_path / "b.bin.part").write_bytes(content)  # all there, only the name is not
    data_prep.download(f"{host.url}/a.bin", tmp_path / "b.bin")
    assert (tmp_path / "b.bin").read_bytes() == content


def test_a_part_of_something_else_is_fetched_anew(host, tmp_path):
    content, digest = b"the right one", f"md5:{hashlib.md5(b'the right one').hexdigest()}"
    host.files = {"/a.bin": content}
    (tmp_path / "a.bin.part").write_bytes(b"wrong")
    file, fetched = data_prep.fetch("a.bin", digest, (f"{host.url}/a.bin",), None, tmp_path)
    assert fetched and file.read_bytes() == content
    assert [asked for _, asked in host.seen] == ["bytes=5-", None]


def test_a_wrong_digest_is_refused_and_the_mirror_used(host, monkeypatch, tmp_path, capsys):
    publish("voc", host, monkeypatch, wrong_first=True)
    assert data_prep.main(["voc", "--root", str(tmp_path)]) == 0
    assert [path for path, _ in host.seen if "VOC" in path] == [
        f"/{place}/VOCtrainval_11-May-2012.tar" for place in ("first", "second")]
    host.files.pop("/second/VOCtrainval_11-May-2012.tar")
    capsys.readouterr()
    assert data_prep.main(["voc", "--root", str(tmp_path / "other")]) == 2
    shown = capsys.readouterr().err
    assert "has md5" in shown and "404" not in shown.partition("second")[0]
    assert len(shown.splitlines()) == 1 and "--source" in shown
    assert not (tmp_path / "other/voc").exists()


def test_a_host_that_never_sends_the_whole_is_given_up(host, monkeypatch, tmp_path):
    host.files, host.ranges, host.breaking = {"/a.bin": bytes(100_000)}, False, AlwaysIn()
    with pytest.raises(OSError, match="again and again"):
        data_prep.download(f"{host.url}/a.bin", tmp_path / "a.bin")
    assert len(host.seen) == 2


def test_archives_of_the_user_stay_even_in_our_downloads(host, monkeypatch, tmp_path):
    archives = publish("cityscapes", host, monkeypatch)
    (tmp_path / "downloads").mkdir()
    for path, content in archives.items():
        (tmp_path / "downloads" / path).write_bytes(content)
    data_prep.prepare("cityscapes", tmp_path, str(tmp_path / "downloads"))
    assert {p.name for p in (tmp_path / "downloads").iterdir()} == set(archives)


@pytest.mark.parametrize("damage", ["truncated zip", "no zip", "broken mask", "a file in its place",
                                    "no such source", "wrong arguments"])
def test_mistakes_of_preparation_end_in_one_line(damage, host, monkeypatch, tmp_path, capsys):
    archives, zips = publish("ade20k", host, monkeypatch), tmp_path / "zips"
    (name, content), = archives.items()
    zips.mkdir()
    command = ["ade20k", "--root", str(tmp_path / "data"), "--source", str(zips)]
    if damage == "broken mask":
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            members = {n: file.read(n) for n in file.namelist()}
        broken = next(n for n in members if n.endswith("val_00000002.png"))
        content = archive("zip", members | {broken: members[broken][:60]})
    (zips / name).write_bytes({"truncated zip": content[:-400], "no zip": b"<html>"}.get(
        damage, content))
    if damage == "a file in its place":
        (tmp_path / "data").mkdir()
        (tmp_path / "data/ade20k").write_text("")
    command[4] = str(tmp_path / "nowhere") if damage == "no such source" else command[4]
    command[1] = "--rot" if damage == "wrong arguments" else command[1]
    assert data_prep.main(command) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("data_prep.py: ") and len(shown.splitlines()) == 1
    assert not (tmp_path / "data/ade20k").is_dir()


def test_a_mirror_given_by_hand_comes_first(host, monkeypatch, tmp_path):
    archives = publish("voc", host, monkeypatch)
    host.files |= {f"/mine/{path}": content for path, content in archives.items()}
    data_prep.prepare("voc", tmp_path, f"{host.url}/mine/")
    assert [path for path, _ in host.seen if path.endswith(".tar")] == [f"/mine/{path}"
                                                                         for path in archives]


def test_an_interrupted_build_leaves_no_folder_and_fetches_nothing_twice(
        host, monkeypatch, tmp_path, capsys):
    publish("voc", host, monkeypatch)
    with monkeypatch.context() as broken:
        broken.setattr(data_prep, "settle", lambda *_: signal.raise_signal(signal.SIGINT))
        assert data_prep.main(["voc", "--root", str(tmp_path)]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["downloads"]
    (tmp_path / ".voc.building").mkdir()  # what a killed process would have left
    (tmp_path / ".voc.building/junk").write_text("")
    asked = len(host.seen)
    data_prep.prepare("voc", tmp_path)
    assert len(host.seen) == asked
    assert not (tmp_path / "voc/junk").exists() and [p.name for p in tmp_path.iterdir()] == ["voc"]


def test_of_two_processes_that_want_the_same_folder_one_makes_it(tmp_path):
    made = []

    def make():
        with data_prep.building(tmp_path / "set") as folder:
            if folder:
                time.sleep(0.1)
                made.append(folder)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_disk_too_small_is_noticed_before_anything_is_fetched(
        host, monkeypatch, tmp_path, capsys):
    publish("coco", host, monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5e6))
    assert data_prep.main(["coco", "--root", str(tmp_path)]) == 2
    assert "needs about" in capsys.readouterr().err and not host.seen
    assert list(tmp_path.iterdir()) == []


def test_wrong_counts_and_values_in_an_archive_are_refused(host, monkeypatch, tmp_path, capsys):
    publish("coco", host, monkeypatch)
    monkeypatch.setattr(data_prep, "COUNTS", {"coco": (81, 4, 2)})
    assert data_prep.main(["coco", "--root", str(tmp_path)]) == 2
    assert "3 training and 2 validation images came out" in capsys.readouterr().err
    monkeypatch.setattr(data_prep, "COUNTS", {"coco": (70, 3, 2)})
    assert data_prep.main(["coco", "--root", str(tmp_path)]) == 2
    assert "holds the value 70" in capsys.readouterr().err
    assert not (tmp_path / "coco").exists()


def test_the_published_lists_are_known_by_digest_and_ade20ks_are_made():
    for name, lines in data_prep.LISTS.items():
        listed = [line.split() for line in lines.strip().splitlines()]
        assert [int(count) for count, *_ in listed if count.isdigit()] == list(
            data_prep.PUBLISHED[name])
        assert all(path.endswith(".txt") and len(digest) == 64 for _, path, digest in listed)
        if name == "ade20k":
            for count, _, digest in listed:
                text = data_prep.ade20k_list(count)
                assert hashlib.sha256(text.encode()).hexdigest() == digest
                assert len(text.splitlines()) == (2000 if count == "val" else int(count))


def test_a_list_that_is_not_the_published_one_is_refused(host, monkeypatch, tmp_path, capsys):
    publish("voc", host, monkeypatch)
    host.files["/lists/splits/voc/2.txt"] += b"\nJPEGImages/2007_000004.jpg x"
    assert data_prep.main(["voc", "--root", str(tmp_path)]) == 2
    assert "splits/voc/2.txt: cannot be had" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------


def test_miou_is_over_the_classes_that_occur():
    prediction, truth = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, IGNORE])
    iou = semivl.iou_per_class(semivl.confusion_matrix(prediction, truth, 4))
    assert iou[:2].tolist() == [50, 50] and iou[2:].isnan().all()
    assert iou.nanmean() == 50


@pytest.mark.parametrize("size, window, stride, mode, starts", [
    (150, 128, 106, "logits", [0, 22]), (300, 128, 106, "logits", [0, 106, 172]),
    (100, 128, 106, "logits", [0]), (128, 128, 106, "logits", [0]),
    (310, 128, 85, "probabilities", [0, 85, 170, 255]),
])
def test_windows_start_where_published(size, window, stride, mode, starts):
    assert semivl.window_starts(size, window, stride, mode) == starts


def test_evaluation_fits_the_short_side_to_the_window():
    seen = []

    def model(images):
        seen.append(tuple(images.shape[2:]))
        return torch.zeros(len(images), 2, *images.shape[2:])

    image, cfg = torch.zeros(3, 50, 250, dtype=torch.uint8), Config(crop=64, stride=48)
    scores = semivl.segment(model, image, cfg, torch.device("cpu"))
    assert scores.shape == (2, 50, 250)
    assert set(seen) == {(64, 64)} and len(seen) == 1 + math.ceil((320 - 64) / 48)


# ----------------------------------------------------------------------------------------------
# The authors' checkpoint files
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_clip(tmp_path):
    """The name of a CLIP of the golden ViT's size, as --clip takes it."""
    text = dict(context_length=16, vocab_size=49408, width=64, heads=2, layers=1)
    vision = dict(image_size=128, patch_size=16, width=64, layers=12, head_width=32)
    (tmp_path / "small-golden.json").write_text(json.dumps(
        dict(embed_dim=512, vision_cfg=vision, text_cfg=text, quick_gelu=True)))
    open_clip.add_model_config(tmp_path / "small-golden.json")
    return "small-golden"


@pytest.mark.parametrize("variant", ["voc", "cityscapes"])
def test_eval_takes_a_checkpoint_file_of_the_authors(
        variant, small_clip, folder, tmp_path, monkeypatch, capsys):
    content = json.loads((folder / "dataset.json").read_text())
    names = content["classes"][:5]
    (folder / "dataset.json").write_text(json.dumps({"classes": names}))
    for i in range(6):
        mask = np.array(Image.open(folder / f"masks/{i}.png"))
        Image.fromarray(np.where(mask > 4, IGNORE, mask)).save(folder / f"masks/{i}.png")
    state = authors_state(variant == "cityscapes")
    state |= {f"clip_encoder.{k.removeprefix('backbone.')}": v for k, v in state.items()
              if k.startswith("backbone.")}
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"state": {}},
                "epoch": 79, "previous_best": np.float64(84.0)}, tmp_path / "best.pth")
    text = semivl.Language(unit_rows(b"text", 5), None, None, None)
    monkeypatch.setattr(semivl, "describe_classes", lambda *_: text)
    models, evaluate = [], semivl.evaluate
    monkeypatch.setattr(semivl, "evaluate", lambda model, *rest: (
        models.append((model, rest[2])), evaluate(model, *rest))[1])
    command = (f"--eval {tmp_path}/best.pth --dataset {folder} --crop 128 --clip {small_clip} "
               f"--clip-weights none --save-predictions {tmp_path}/png")
    assert semivl.main(command.split()) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and "best-eval.json" in shown
    model, cfg = models[0]
    assert cfg.authors_clip and cfg.conv_skip == (variant == "cityscapes")
    images = random_normal(7, (2, 3, 128, 128))
    with torch.no_grad():
        assert_golden("logits" if variant == "voc" else "cityscapes logits", model(images))
    written = json.loads((tmp_path / "best-eval.json").read_text())
    assert written["classes"] == names and len(written["val"]["SemiVL"]["iou"]) == 5
    assert sorted(p.name for p in (tmp_path / "png").iterdir()) == ["4.png", "5.png"]
    assert Image.open(tmp_path / "png/4.png").mode == "P"


def test_the_authors_cityscapes_checkpoint_brings_its_protocol(small_clip, tmp_path):
    torch.save({"model": authors_state(cityscapes=True)}, tmp_path / "city.pth")
    model, cfg, classes = data_prep.load_checkpoint(semivl, 
        tmp_path / "city.pth", dict(clip=small_clip, clip_weights="none"))
    assert (cfg.dataset, cfg.window_mode, cfg.crop) == ("cityscapes", "probabilities", 801)
    assert model.text.shape == (19, 512) and classes[0] == "road" and model.conv is not None


def test_predictions_for_the_cityscapes_server_have_its_numbers(tmp_path):
    entry = ("leftImg8bit/test/rom/rom_000006_000019_leftImg8bit.png", None)
    folder = SimpleNamespace(classes=data_prep.CLASSES["cityscapes"], val=[], test=[],
                             secret=[entry])
    write = data_prep.server_files(tmp_path / "out", folder)
    write(entry, torch.arange(19).reshape(1, 19))
    with Image.open(tmp_path / "out/rom_000006_000019_leftImg8bit.png") as picture:
        assert picture.mode == "P"
        assert np.array(picture).tolist() == [list(data_prep.CITYSCAPES_IDS)]
        shown = np.array(picture.convert("RGB"))[0]
    assert np.array_equal(shown, data_prep.palette(list(folder.classes))[:19])


# ----------------------------------------------------------------------------------------------
# CLIP weights
# ----------------------------------------------------------------------------------------------


def scripted(state: dict):
    """A TorchScript module that holds these tensors, as OpenAI's .pt does."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        module, (*path, leaf) = root, name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_buffer(leaf, tensor)
    return torch.jit.script(root)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", ["openai.pt", "laion.safetensors", "laion.bin", "plain.pt"])
def test_clip_weights_of_every_kind_are_loaded(kind, small_clip, tmp_path):
    torch.manual_seed(1)
    clip = data_prep.empty_clip(small_clip)
    state, file = clip.state_dict(), tmp_path / kind
    if kind == "openai.pt":  # half precision, and three numbers among the weights
        state = {k: v.half().float() for k, v in state.items()}
        extra = {k: torch.tensor(224) for k in ("input_resolution", "context_length", "vocab_size")}
        torch.jit.save(scripted({k: v.half() for k, v in state.items()} | extra), file)
    elif kind.endswith("safetensors"):
        safetensors.torch.save_file(state, file)
    elif kind.endswith("bin"):
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    else:
        torch.save(state, file)
    loaded = data_prep.load_clip(small_clip, "openai", str(file), tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    state.pop("visual.proj")
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(semivl.UserError, match="visual.proj"):
        data_prep.load_clip(small_clip, "openai", str(tmp_path / "short.pt"), tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_openais_weights_are_refused_by_a_model_of_another_gelu(tmp_path):
    torch.jit.save(scripted(data_prep.empty_clip("toy").state_dict()), tmp_path / "openai.pt")
    with pytest.raises(semivl.UserError, match="trained with QuickGELU; take --clip toy-quickgelu"):
        data_prep.load_clip("toy", "openai", str(tmp_path / "openai.pt"), tmp_path)


@pytest.mark.parametrize("patch, layers, blocks", [(32, 12, (0, 4)), (14, 24, (0, 8))])
@torch.no_grad()
def test_any_plain_vit_fits(patch, layers, blocks):
    clip = open_clip.CLIP(64, dict(image_size=224, patch_size=patch, width=64, layers=layers),
                          dict(width=32, heads=2, layers=1, context_length=16))
    model = semivl.assemble(Config(crop=128), clip.visual, torch.randn(3, 64))
    assert model.clip.skip_blocks == blocks
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 3, 128, 128)


def test_images_are_normalised_as_the_weights_were_trained():
    image = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    half = Config(clip="ViT-L-14", clip_tag="laion2b_s32b_b82k")  # trained with mean and std 0.5
    torch.testing.assert_close(semivl.normalize(image, half), torch.ones(3, 1, 1))
    mean, std = map(torch.tensor, (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    torch.testing.assert_close(semivl.normalize(image, Config()).flatten(), (1 - mean) / std)
    mean, std = map(torch.tensor, semivl.IMAGENET_STATS)
    torch.testing.assert_close(
        semivl.normalize(image, Config(conv_skip=True)).flatten(), (1 - mean) / std)


# ----------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------


def small_run(folder, **changes):
    """A Training object on a folder, random tiny CLIP."""
    settings = dict(dataset=str(folder), labels=2, clip="toy", clip_weights="none", crop=32,
                    fit=False, stride=32, steps=4, batch=2, micro_batch=2, workers=0, conf=0.1,
                    guidance_conf=0.1, lr=1e-3, vit_lr=1e-3)
    cfg = Config(**settings | changes)
    data = data_prep.open_data(cfg, semivl.CLASSES)
    data.choose_labelled(cfg)
    return semivl.Training(cfg, data, torch.device("cpu"))


def test_a_step_moves_what_trains_and_nothing_else(folder):
    run = small_run(folder)
    before = {name: p.detach().clone() for name, p in run.student.named_parameters()}
    frozen = {name: p.detach().clone() for name, p in run.guidance.named_parameters()}
    for batch in run.batches():
        log = run.train_step(batch)
    assert log["kept"] > 0 and log["guided"] > 0 and log["guidance_fp"] > 0
    for name, p in run.student.named_parameters():
        # The last block's q and k feed nothing; their rows move by weight decay alone.
        assert torch.equal(p, before[name]) == (not p.requires_grad), name
    for name, p in run.guidance.named_parameters():
        assert torch.equal(p, frozen[name]), name


def test_micro_batches_accumulate_to_the_whole_batch(folder):
    weights = []
    for micro_batch in (4, 1):
        run = small_run(folder, batch=4, micro_batch=micro_batch, scale_min=1.5, conf=0)
        # Without padding every image has as many valid pixels, so the means agree; dropout is
        # silenced, since it would draw other numbers.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "dropout2d", lambda f, p: f)
            for batch in run.batches():
                assert not batch["padding"].any()
                log = run.train_step(batch)
                break
        weights.append(log["total"])
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)


def test_two_scenes_are_learned_by_heart():
    model = tiny_model(classes=3)
    masks = torch.zeros(2, 64, 64, dtype=torch.long)
    masks[0, 16:, :32], masks[1, :32, 16:], masks[1, 32:, :32] = 1, 2, 1
    colours = torch.tensor([[0.5, 0.5, -0.5], [1, -1, 0], [-1, 0, 1]])
    images = colours[masks].permute(0, 3, 1, 2) + 0.1 * random_normal(2, (2, 3, 64, 64))
    optimizer = semivl.make_optimizer(model, Config(lr=1e-3, vit_lr=1e-3))
    for _ in range(50):
        semivl.supervised_loss(model(images), masks).backward()
        optimizer.step()
        optimizer.zero_grad()
    iou = semivl.iou_per_class(semivl.confusion_matrix(model(images).argmax(1), masks, 3))
    assert iou.mean() > 95


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path, workers):
    whole = small_run(folder)
    for batch in whole.batches():
        whole.train_step(batch)
    first = small_run(folder)
    for batch in first.batches():
        first.train_step(batch)
        if first.step == 2:
            break
    first.cfg.out = str(tmp_path)
    data_prep.save_run(first, "last.pt", resumable=True)
    second = small_run(folder, workers=workers)
    data_prep.restore_run(second, data_prep.load_file(tmp_path / "last.pt"))
    for batch in second.batches():
        second.train_step(batch)
    for a, b in ((whole.student, second.student), (whole.teacher.model, second.teacher.model)):
        for (name, mine), theirs in zip(a.state_dict().items(), b.state_dict().values()):
            assert torch.equal(mine, theirs), name


def test_a_loss_that_is_not_finite_stops_before_the_update(folder):
    run = small_run(folder)
    run.student.decoder.head.bias.data.fill_(float("nan"))
    before = run.student.decoder.lift.weight.clone()
    with pytest.raises(semivl.UserError, match=r"step 0: the loss is nan.*images/"):
        run.train_step(next(iter(run.batches())))
    assert torch.equal(run.student.decoder.lift.weight, before)


@torch.no_grad()
def test_bf16_logits_differ_from_the_authors_by_two_percent_of_their_range_at_most(authors):
    images = random_normal(7, (2, 3, 128, 128))
    exact = authors(images)
    assert_golden("logits", exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = authors(images)
    assert logits.dtype == torch.float32 and not torch.equal(logits, exact)
    assert (logits - exact).abs().max() < 0.02 * (exact.max() - exact.min())


def test_linear_by_convolution_is_linear():
    x, weight, bias = (random_normal(seed, shape).requires_grad_() for seed, shape in (
        (1, (2, 9, 12)), (2, (20, 12)), (3, (20,))))
    for trained in ((x, weight, bias), (x,), (weight,)):
        results = []
        for linear in (F.linear, data_prep.linear):
            inputs = (t if any(t is u for u in trained) else t.detach() for t in (x, weight, bias))
            y = linear(*inputs)
            grads = torch.autograd.grad(y.square().sum(), trained)
            results.append((y, *grads))
        for mine, theirs in zip(*results):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_groups_of_classes_change_nothing(monkeypatch, recompute):
    decoder = semivl.LanguageGuidedDecoder(16, 8, 8)
    dense, shallow, deep = (random_normal(c, (2, c, 6, 6)) for c in (16, 8, 8))
    results = []
    for group in (1000, 6):  # of 2 images times 7 classes: all at once; 3, 3 and 1
        monkeypatch.setattr(semivl, "MAPS_AT_ONCE", group)
        decoder.recompute = recompute and group == 6
        decoder.zero_grad()
        logits = decoder(dense, (shallow, deep), random_normal(1, (7, 16)))
        logits.square().mean().backward()
        results.append([logits, *(p.grad.clone() for p in decoder.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_memory_table_counts_what_a_step_keeps():
    for recompute in (False, True):
        cfg = Config(dataset="voc", clip="toy", crop=64, micro_batch=1, recompute=recompute)
        counted, _ = data_prep.saved_bytes(semivl, cfg)
        model = semivl.assemble(cfg, data_prep.empty_clip("toy").visual, torch.zeros(21, 64))
        ours, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        image, label = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.long)
        targets = Targets(label, label.float(), label > 0, label)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            views = dict.fromkeys(("s1", "s2", "fp"), (image, targets))
            semivl.semivl_loss(model.train(), image, label, views, 0.1)
        real = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in ours)
        assert counted == real


def test_bf16_autocast_stays_close_to_float32(folder):
    logs = []
    for precision in ("fp32", "bf16"):
        run = small_run(folder, precision=precision, conf=0.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "dropout2d", lambda f, p: f)
            logs.append(run.train_step(next(iter(run.batches()))))
    assert logs[1]["total"] == pytest.approx(logs[0]["total"], rel=0.02)


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def torchrun(processes: int, command: str, start=subprocess.run):
    return start(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={processes}", semivl.__file__, *command.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)


def test_two_processes_train_as_one_that_accumulates_twice(folder, tmp_path):
    with open(folder / "splits/val.txt", "a") as file:  # three images: shared unevenly
        file.write("\nimages/3.png masks/3.png\n")
    command = (f"--dataset {folder} --labels 2 --steps 5 --evals 1 --stride 32 --lr 1e-4 "
               f"--conf 0.1 --vit-lr 1e-5 --guidance-conf 0.1 {TINY} --batch 4 "
               f"--micro-batch 2 --device cpu --out ")
    one, two = tmp_path / "one", tmp_path / "two"
    # One process with one thread, too: sums in another order would flip a near-tie of two classes.
    done = torchrun(2, command + str(two))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("writes to") == 1  # one process speaks for all
    assert torchrun(1, command + str(one)).returncode == 0
    for mine, theirs in zip(logged(one), logged(two), strict=True):
        shares = mine.pop("pseudo_labels", None), theirs.pop("pseudo_labels", None)
        assert shares[0] == shares[1]
        for name in set(mine) - {"images_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], rel=0, abs=1e-5), name


def test_processes_that_are_told_to_stop_stop_together_and_save(folder, tmp_path):
    out = tmp_path / "run"
    running = torchrun(2, f"--dataset {folder} --labels 2 --steps 5000 --save-every 5000 {TINY} "
                          f"--micro-batch 1 --device cpu --out {out}", start=subprocess.Popen)
    while not (out / "log.jsonl").exists() or len(logged(out)) < 3:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate()
    assert data_prep.load_file(out / "last.pt")["step"] == logged(out)[-1]["step"] >= 3
    assert "Connection closed" not in said  # nobody was left alone in an exchange


def test_processes_that_cannot_share_a_batch_evenly_are_told_so(monkeypatch, folder, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for batch, micro_batch in ((1, 1), (6, 2)):
        command = (f"--dataset {folder} --labels 2 --steps 1 {TINY} --batch {batch} "
                   f"--micro-batch {micro_batch} --device cpu")
        assert semivl.main(command.split()) == 2
        assert "cannot be shared evenly by 2 processes" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------
# Copying out: a piece works with the definitions it names and the imports, nothing else of the file
# ----------------------------------------------------------------------------------------------


def cut_out(name: str) -> dict:
    """A fresh namespace that holds `name`, what it needs, and library imports."""
    source = Path(semivl.__file__).read_text()
    places = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        for target in targets:
            places[getattr(target, "id", getattr(target, "name", None))] = node
    needed, todo = [], [name]
    while todo:
        node = places[todo.pop()]
        if node not in needed:
            needed.append(node)
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            assert not used & {"data_prep", "UserError", "Config", "THIS_FILE"}, (name, node.name)
            todo += used & set(places)
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))
               and "data_prep" not in line]
    order = sorted(needed, key=lambda node: node.lineno)
    namespace = {"__name__": "cut_out"}
    lines = source.splitlines()
    first = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
             for node in order]
    parts = ["\n".join(lines[i - 1:node.end_lineno]) for i, node in zip(first, order)]
    exec("\n".join(imports + parts), namespace)
    return namespace


def test_each_piece_works_when_it_is_cut_out():
    images, text = random_normal(1, (2, 3, 32, 48)), random_normal(2, (5, 64))
    dense_clip = cut_out("DenseCLIP")["DenseCLIP"](data_prep.empty_clip("toy").visual)
    dense, skips = dense_clip(images)
    width = skips[0].shape[1]
    decoder = cut_out("LanguageGuidedDecoder")["LanguageGuidedDecoder"](64, width, width)
    logits = decoder(dense, skips, text).detach()
    assert logits.shape == (2, 5, 16, 24)

    label, none = logits.argmax(1), torch.zeros(2, 16, 24, dtype=torch.bool)
    loss = cut_out("consistency_loss")["consistency_loss"](
        logits, label, torch.ones(2, 16, 24), none)
    assert loss == pytest.approx(float(F.cross_entropy(logits, label)))
    views = images[:, :, :16, :24]
    box = torch.tensor([[0, 0, 16, 24], [0, 0, 0, 0]])  # all of the first, nothing of the second
    mixed = cut_out("cutmix")["cutmix"](views, views.flip(0), box)
    assert torch.equal(mixed[0], views[1]) and torch.equal(mixed[1], views[1])

    teacher = cut_out("EMATeacher")["EMATeacher"](dense_clip, decay=0.9)
    teacher.update(dense_clip, step=100)
    assert torch.equal(teacher(images)[0], dense_clip(images)[0])
    scores = cut_out("sliding_window")["sliding_window"](lambda part: part, images, 20, 10)
    torch.testing.assert_close(scores, images)
    matrix = cut_out("confusion_matrix")["confusion_matrix"](label, label, 5)
    assert cut_out("iou_per_class")["iou_per_class"](matrix).nanmean() == 100


def test_the_examples_in_the_docstrings_give_what_they_say():
    result = doctest.testmod(semivl)
    assert result.attempted >= 15 and result.failed == 0


# ----------------------------------------------------------------------------------------------
# The toy world
# ----------------------------------------------------------------------------------------------


def test_the_toy_world_is_complete_or_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "SPLITS", {"train": 3, "val": 2, "test": 2})
    monkeypatch.setattr(data_prep, "CORPUS", 64)
    monkeypatch.setattr(data_prep, "STEPS", 2)
    with monkeypatch.context() as broken:
        broken.setattr(data_prep, "pretrain_tiny_clip", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data_prep.make_toy(tmp_path)
    assert list(tmp_path.iterdir()) == []
    toy = data_prep.open_folder(data_prep.make_toy(tmp_path))
    assert (len(toy.train), len(toy.val), len(toy.test)) == (3, 2, 2)
    data_prep.load_clip("toy", "", "", tmp_path)
    toy.labelled = toy.train
    toy.check()


def test_the_ladder_runs_what_is_missing_and_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = dict(SPLITS={"train": 8, "val": 2, "test": 2}, CORPUS=64, STEPS=2)
    for name, value in small.items():
        monkeypatch.setattr(data_prep, name, value)
    arms = {data_prep.FULL: "--steps 1 --evals 1", "without": "--decoder vision"}
    monkeypatch.setattr(data_prep, "LADDER", arms)
    for arm, seed, score in ((0, 1, 60), (1, 0, 30), (1, 1, 40)):  # only full, seed 0 is missing
        out = Path(f"runs/ladder/{arm}-{seed}")
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")
        models = dict.fromkeys(("CLIP by names", "by definitions", "SemiVL"), {"miou": score})
        (out / "result.json").write_text(json.dumps({"test": models}))
    assert semivl.main(["--ladder", "2"]) == 0
    score = json.loads(Path("runs/ladder/0-0/result.json").read_text())["test"]["SemiVL"]["miou"]
    line = capsys.readouterr().out.splitlines()[-1]
    ahead = [score - 30, 60 - 40]
    assert line.split()[:4] == ["without", "30.0", "40.0", "35.0"]
    assert f"{sum(ahead) / 2:.1f} (sd {abs(ahead[0] - ahead[1]) / 2**0.5:.1f})" in line
    assert semivl.main("--ladder 2 --steps 3".split()) == 2  # its arms have settings of their own


def test_the_painter_repeats_itself_from_its_seed_only():
    def scene(seed):
        return np.concatenate([np.array(p).ravel() for p in data_prep.Painter(seed).scene()])

    assert np.array_equal(scene("a"), scene("a"))
    assert not np.array_equal(scene("a"), scene("b"))


# ----------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------

TINY = "--clip toy --clip-weights none --crop 32 --batch 2 --micro-batch 2 --workers 0 --fit off"


def test_train_evaluate_predict_and_resume_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "run"
    command = f"--dataset {folder} --labels 2 --steps 2 --evals 1 --stride 32 --out {out} {TINY}"
    assert semivl.main(command.split()) == 0
    names = {"config.json", "labeled.txt", "log.jsonl", "semivl.py", "data_prep.py", "last.pt",
             "best.pt", "sheet.png", "views.png", "flow.png", "curves.png", "result.json"}
    assert names <= {file.name for file in out.iterdir()}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 2]
    assert {"x", "s1", "guidance_fp", "kept", "lr", "images_per_second", "val_miou", "student",
            "best", "pseudo_labels"} <= set(log[-1])
    shown = capsys.readouterr().out
    assert "by definitions" in shown and "mIoU" in shown
    assert semivl.main(["--eval", str(out / "last.pt")]) == 0
    value = json.loads((out / "result.json").read_text())["val_last"]
    assert f"{value:.1f}" in capsys.readouterr().out.splitlines()[-2]
    written = json.loads((out / "last-eval.json").read_text())
    assert written["val"]["SemiVL"]["miou"] == pytest.approx(value)
    picture = str(folder / "images/0.png")
    assert semivl.main(["--predict", str(out / "best.pt"), picture]) == 0
    assert semivl.main(["--predict", str(out / "best.pt"), picture]) == 2  # nothing is overwritten
    mask = Image.open(out / "predictions/0-mask.png")
    assert mask.mode == "P" and mask.size == (64, 64) and np.array(mask).max() < 6
    assert semivl.main(["--resume", str(out)]) == 0  # nothing is left to do; tables again
    assert semivl.main(command.split()) == 2  # the run folder is taken, and stays as it is


def test_the_benchmark_prints_json(folder, capsys):
    assert semivl.main(f"--benchmark --dataset {folder} {TINY}".split()) == 0
    shown = capsys.readouterr().out
    result = json.loads(shown[shown.index("{"):])
    phases = result["seconds_per_phase"]
    assert {"teacher", "guidance", "student forward", "backward", "optimiser"} < set(phases)
    assert all(seconds > 0 for seconds in phases.values())
    assert result["samples_per_second_per_core"] > 0


@pytest.mark.parametrize("table, rows", [("memory", 4), ("growth", 1), ("loader", 1)])
def test_the_tables_of_the_benchmark_are_printed(table, rows, monkeypatch, capsys):
    monkeypatch.setattr(data_prep, "PUBLISHED", {"voc": {}})  # of each table VOC's part
    monkeypatch.setattr(data_prep, "GROWTH", [("voc", 64)])
    monkeypatch.setattr(data_prep, "SIZES", {"voc": (500, 375)})
    assert semivl.main(["--benchmark", table]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-rows:]]
    if table == "memory":  # name, classes, crop, precision, recompute, GB kept, ...
        assert [line[4] for line in lines] == ["off", "on"] * 2
        assert 0 < float(lines[1][5]) < float(lines[0][5])
        assert float(lines[2][5]) < float(lines[0][5])  # bf16
    else:  # classes, crop, seconds; or name, size, ..., samples a second
        assert lines[0][0] == {"growth": "21", "loader": "voc"}[table]
        assert float(lines[0][2 if table == "growth" else -1]) > 0


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        semivl.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for field in semivl.dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')} " in shown


class Malicious:
    def __reduce__(self):
        return print, ("this must never run",)


def save_checkpoint(folder: Path) -> dict:
    run = small_run(folder)
    run.cfg.out = str(folder)
    data_prep.save_run(run, "last.pt", resumable=True)
    return data_prep.load_file(folder / "last.pt")


def spoil(folder: Path, what: str) -> str:
    """Breaks one thing; returns the command line that should stumble over it."""
    command = f"--dataset {folder} --labels 2 --steps 1 {TINY}"
    if what == "mask of another size":
        Image.new("L", (9, 9)).save(folder / "masks/4.png")
    elif what == "mask with a class too many":
        Image.new("L", (64, 64), 77).save(folder / "masks/4.png")
    elif what == "colour mask":
        Image.new("RGB", (64, 64)).save(folder / "masks/4.png")
    elif what == "truncated picture":
        data = (folder / "images/4.png").read_bytes()
        (folder / "images/4.png").write_bytes(data[:20])
    elif what == "missing picture":
        (folder / "images/4.png").unlink()
    elif what == "three columns":
        (folder / "splits/val.txt").write_text("a b c")
    elif what == "empty list":
        (folder / "splits/train.txt").write_text("")
    elif what == "no list":
        (folder / "splits/val.txt").unlink()
    elif what == "broken json":
        (folder / "dataset.json").write_text("{")
    elif what == "no classes":
        (folder / "dataset.json").write_text("{}")
    elif what == "a class twice":
        (folder / "dataset.json").write_text('{"classes": ["a", "a"]}')
    elif what == "definition of no class":
        (folder / "dataset.json").write_text('{"classes": ["a"], "definitions": {"b": ["c"]}}')
    elif what == "no such folder":
        command = "--dataset nowhere --labels 2"
    elif what == "more labels than masks":
        command = command.replace("--labels 2", "--labels 200")
    elif what == "nothing left unlabelled":
        (folder / "splits/train.txt").write_text("images/0.png masks/0.png")
        command = command.replace("--labels 2", "--labels 1")
    elif what == "unknown CLIP":
        command = command.replace("--clip toy", "--clip ViT-Z")
    elif what == "no such weights":
        command = command.replace("--clip-weights none", "--clip-weights nowhere.pt")
    elif what == "weights of something else":
        torch.save({"a": torch.zeros(1)}, folder / "x.pt")
        command = command.replace("--clip-weights none", f"--clip-weights {folder}/x.pt")
    elif what == "malicious weights":
        torch.save(Malicious(), folder / "x.pt")
        command = command.replace("--clip-weights none", f"--clip-weights {folder}/x.pt")
    elif what == "micro-batch that does not divide":
        command = command.replace("--micro-batch 2", "--micro-batch 3")
    elif what == "windows with gaps between them":
        command += " --stride 33"
    elif what == "value out of range":
        command += " --conf 1.5"
    elif what == "not a number":
        command += " --lr fast"
    elif what == "unknown option":
        command += " --learning-rate 1"
    elif what == "unknown device":
        command += " --device quantum"
    elif what == "VOC without data":
        command = f"--dataset voc --labels 92 --root {folder}"
    elif what == "a count that is not published":
        command = "--dataset voc --labels 93"
    elif what == "no such checkpoint":
        command = "--eval nowhere.pt"
    elif what == "checkpoint that is none":
        torch.save({"a": torch.zeros(1)}, folder / "x.pt")
        command = f"--eval {folder}/x.pt"
    elif what == "an option that evaluation would ignore":
        save_checkpoint(folder)
        command = f"--eval {folder}/last.pt --lr 1"
    elif what == "nothing to predict":
        save_checkpoint(folder)
        command = f"--predict {folder}/last.pt"
    elif what == "a crop below the patch":
        command = command.replace("--crop 32", "--crop 7")
    elif what == "resume nothing":
        command = f"--resume {folder}"
    elif what == "resume a checkpoint of something else":
        torch.save({"a": torch.zeros(1)}, folder / "last.pt")
        command = f"--resume {folder}"
    elif what == "bytes that are no picture":
        (folder / "images/4.png").write_bytes(b"no picture at all")
    elif what == "truncated mask":
        data = (folder / "masks/4.png").read_bytes()
        (folder / "masks/4.png").write_bytes(data[:len(data) // 2])
    elif what == "broken picture among the unlabelled":
        (folder / "images/0.png").write_bytes((folder / "images/0.png").read_bytes()[:900])
    elif what == "a list that is no text":
        (folder / "splits/train.txt").write_bytes(b"\xff\xfe\x00")
    elif what == "a labelled list of another count":
        (folder / "splits/2").mkdir()
        (folder / "splits/2/labeled.txt").write_text("images/0.png masks/0.png")
    elif what == "class names that are no list":
        (folder / "dataset.json").write_text('{"classes": "sky"}')
    elif what == "more classes than a byte holds":
        (folder / "dataset.json").write_text(json.dumps({"classes": [str(i) for i in range(256)]}))
    elif what == "no labels":
        command = command.replace("--labels 2", "--labels 0")
    elif what == "output below a file":
        command += f" --out {folder}/dataset.json/run"
    elif what == "output folder taken":
        command += f" --out {folder}"
    elif what == "truncated safetensors":
        (folder / "x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
        command = command.replace("--clip-weights none", f"--clip-weights {folder}/x.safetensors")
    elif what == "weights in a folder":
        command = command.replace("--clip-weights none", f"--clip-weights {folder}")
    elif what == "QuickGELU weights for a GELU model":
        command = command.replace("--clip toy --clip-weights none", "--clip ViT-B-16")
    elif what == "unknown tag":
        command = command.replace("--clip toy --clip-weights none", "--clip-tag nobody")
    elif what == "truncated checkpoint":
        save_checkpoint(folder)
        (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:9999])
        command = f"--eval {folder}/last.pt"
    elif what == "checkpoint of other classes":
        save_checkpoint(folder)
        (folder / "dataset.json").write_text('{"classes": ["a", "b", "c"]}')
        command = f"--eval {folder}/last.pt"
    elif what == "checkpoint with a tensor missing":
        content = save_checkpoint(folder)
        content["model"].pop("decoder.lift.weight")
        torch.save(content, folder / "last.pt")
        command = f"--eval {folder}/last.pt"
    elif what == "malicious checkpoint":
        torch.save({"model": Malicious()}, folder / "x.pt")
        command = f"--eval {folder}/x.pt"
    elif what == "authors' checkpoint without its data set":
        torch.save({"model": {"module.decode_head.conv1.weight": torch.zeros(1)}}, folder / "x.pt")
        command = f"--eval {folder}/x.pt"
    elif what == "authors' checkpoint with tensors missing":
        torch.save({"model": {"module.decode_head.conv1.weight": torch.zeros(1)}}, folder / "x.pt")
        command = f"--eval {folder}/x.pt --dataset {folder} --clip toy --clip-weights none"
    elif what == "predictions without evaluation":
        command += " --save-predictions there"
    elif what == "predictions into a folder that is taken":
        save_checkpoint(folder)
        command = f"--eval {folder}/last.pt --save-predictions {folder}"
    elif what == "two actions at once":
        command = "--eval a.pt --resume b"
    elif what == "a picture to predict that is none":
        save_checkpoint(folder)
        command = f"--predict {folder}/last.pt {folder}/dataset.json"
    elif what == "a picture of 16 bits":
        Image.fromarray(np.zeros((64, 64), np.uint16)).save(folder / "images/4.png")
    elif what == "an empty name of a checkpoint":
        command = "--eval="
    elif what == "windows with gaps in a prediction":
        save_checkpoint(folder)
        command = f"--predict {folder}/last.pt {folder}/images/0.png --stride 1000"
    elif what == "a state dict that is none":
        torch.save({"state_dict": [1]}, folder / "x.pt")
        command = command.replace("--clip-weights none", f"--clip-weights {folder}/x.pt")
    elif what == "a checkpoint without weights":
        torch.save({"model": None}, folder / "x.pt")
        command = f"--eval {folder}/x.pt"
    elif what == "a CLIP from the hub":
        command = command.replace("--clip toy", "--clip hf-hub:someone/something")
    elif what == "a CLIP with a foreign text tower":
        command = command.replace("--clip toy", "--clip roberta-ViT-B-32")
    elif what == "resume from the best":
        save_checkpoint(folder)
        content = data_prep.load_file(folder / "last.pt")
        torch.save({k: content[k] for k in ("config", "classes", "model", "step")},
                   folder / "last.pt")
        command = f"--resume {folder}"
    elif what == "resume with the classes in another order":
        save_checkpoint(folder)
        content = json.loads((folder / "dataset.json").read_text())
        content["classes"].reverse()
        (folder / "dataset.json").write_text(json.dumps(content))
        command = f"--resume {folder}"
    elif what == "an unmasked test image that is missing":
        save_checkpoint(folder)
        (folder / "splits/test.txt").write_text("images/99.png")
        command = f"--eval {folder}/last.pt --save-predictions {folder}/png"
    elif what == "evaluation on other classes than VOC's":
        save_checkpoint(folder)
        command = f"--eval {folder}/last.pt --dataset voc"
    elif what == "two pictures of the same name":
        save_checkpoint(folder)
        command = f"--predict {folder}/last.pt {folder}/images/0.png {folder}/masks/0.png"
    return command


MISTAKES = [part.split('"')[0] for part in Path(__file__).read_text().split('what == "')[1:-1]]


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_ends_with_one_line_and_exit_code_2(what, folder, capsys, monkeypatch, tmp_path):
    def contents():
        return {str(p): p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_prep, "LIST_HOSTS", ("http://127.0.0.1:9/",))  # nobody listens there
    command = spoil(folder, what)
    before = contents()
    assert semivl.main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("semivl.py: ") and len(captured.err.splitlines()) == 1
    assert "Traceback" not in captured.err and "must never run" not in captured.out
    assert contents() == before  # nothing was left behind, nothing overwritten


def test_twenty_problems_of_a_folder_are_listed_at_once_with_their_remedy(folder, capsys):
    lines = [f"images/{i}.png masks/{i}.png" for i in range(100, 130)]
    (folder / "splits/val.txt").write_text("\n".join(lines + ["images/0.png masks/5.png"]))
    Image.new("L", (9, 9)).save(folder / "masks/5.png")
    Image.new("L", (64, 64), 77).save(folder / "masks/100.png")
    assert semivl.main(f"--dataset {folder} --labels 2 {TINY}".split()) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 21 and shown[-1] == "... and 11 more"
    assert "masks/100.png: holds the value 77" in shown[0] and "correct the mask" in shown[0]


def test_the_program_runs_as_a_script():
    script = Path(semivl.__file__)
    done = subprocess.run([sys.executable, script, "--dataset", "nowhere"], capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"semivl.py: nowhere/dataset.json")


# ----------------------------------------------------------------------------------------------
# Runs that survive
# ----------------------------------------------------------------------------------------------


def digest_of(run: Path) -> str:
    """SHA-256 over all tensors of a run's last checkpoint: teacher, student, optimiser."""
    content, hasher = data_prep.load_file(run / "last.pt"), hashlib.sha256()
    moments = content["optimizer"]["state"]
    for tensor in [*content["model"].values(), *content["student"].values(),
                   *(t for i in sorted(moments) for t in moments[i].values())]:
        hasher.update(tensor.numpy().tobytes())
    return f"{content['step']} {hasher.hexdigest()}"


def long_run(folder, out, workers=0):
    tiny = TINY.replace("--workers 0", f"--workers {workers}")
    return (f"--dataset {folder} --labels 2 --steps 12 --evals 3 --save-every 3 --stride 32 "
            f"--out {out} {tiny}").split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, beside its folder of pictures."""
    path = tmp_path_factory.mktemp("whole")
    assert semivl.main(long_run(make_folder(path / "pictures"), path / "run")) == 0
    return path / "run"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_to_the_same_weights(workers, whole, tmp_path):
    folder, killed = whole.parent / "pictures", tmp_path / "killed"
    command = [sys.executable, semivl.__file__, *long_run(folder, killed, workers)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = killed / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 5' in log.read_text()):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with open(log, "a") as out:
        out.write('{"step": 6, "lo')  # half a line, as a kill may leave it
    assert data_prep.load_file(killed / "last.pt")["step"] in (3, 4, 6, 8)
    assert semivl.main(["--resume", str(killed)]) == 0
    assert digest_of(killed) == digest_of(whole)
    steps = [[json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
             for run in (killed, whole)]
    assert steps[0] == steps[1] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_signal_ends_a_run_after_saving(where, number, whole, tmp_path, monkeypatch, capsys):
    stopped = tmp_path / "stopped"
    train_step, miou = semivl.Training.train_step, data_prep.Recorder.miou

    def signalled_step(run, batch):
        if where == "step" and run.step == 4:
            signal.raise_signal(number)  # in the middle of the step: it will be finished
        return train_step(run, batch)

    def signalled_miou(recorder, model, entries, title):
        if where == "evaluation" and recorder.run.step == 8:
            signal.raise_signal(number)
        return miou(recorder, model, entries, title)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(semivl.Training, "train_step", signalled_step)
        patch.setattr(data_prep.Recorder, "miou", signalled_miou)
        assert semivl.main(long_run(whole.parent / "pictures", stopped)) == 130
    assert signal.getsignal(number) is before
    captured = capsys.readouterr()
    assert f"go on by --resume {stopped}" in captured.out and "Traceback" not in captured.err
    assert data_prep.load_file(stopped / "last.pt")["step"] == (5 if where == "step" else 8)
    assert semivl.main(["--resume", str(stopped)]) == 0
    assert digest_of(stopped) == digest_of(whole)
    results = [json.loads((run / "result.json").read_text()) for run in (stopped, whole)]
    assert results[0] == results[1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_a_lack_of_memory_is_told_in_one_line(error, folder, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(semivl.Training, "train_step", fail)
    assert semivl.main(long_run(folder, tmp_path / "run", workers=2)) == 2
    assert "take a smaller --micro-batch" in capsys.readouterr().err.splitlines()[-1]
    assert not multiprocessing.active_children()


def test_a_resumed_log_is_the_uninterrupted_one(whole):
    """The means at an evaluation count the steps before the stop too."""
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    run = small_run(whole.parent / "pictures", out=str(whole.parent / "copy"), steps=12)
    (whole.parent / "copy").mkdir()
    (whole.parent / "copy/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run.step = 7  # step 4 was evaluated: 5, 6 and 7 count
    with data_prep.RunLog(run) as log:
        assert log.count == 3
        assert log.sums["total"] == pytest.approx(sum(
            line["total"] for line in lines if line["step"] in (5, 6, 7)))


def test_a_full_disk_loses_nothing_that_was_saved(folder, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    out = tmp_path / "run"
    assert semivl.main([*long_run(folder, out), "--steps", "3"]) == 0
    saved = (out / "last.pt").read_bytes()
    content = data_prep.load_file(out / "last.pt")
    content["config"]["steps"] = 12
    torch.save(content, out / "last.pt")
    saved = (out / "last.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) // 2, hard))  # as if the disk was full
    try:
        assert semivl.main(["--resume", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shown = capsys.readouterr().err.splitlines()
    assert len([line for line in shown if line.startswith("semivl.py: ")]) == 1
    assert "cannot be written" in shown[-1] and "Traceback" not in "".join(shown)
    assert (out / "last.pt").read_bytes() == saved and not list(out.glob("*.tmp"))
