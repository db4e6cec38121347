"""What semivl.py and data_prep.py promise, one promise a test.

    pytest -q test_semivl.py            all of it: minutes on a laptop
    pytest -q test_semivl.py -k small   shapes and a tiny overfit first: seconds
    pytest -q test_semivl.py -k equal   equality with the authors' code

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

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data_prep
import semivl
from semivl import IGNORE, Config, Targets

# ----------------------------------------------------------------------------------------------
# The small test

def tiny_model(classes=3, crop=64, decoder="language"):
    """A student around a random tiny CLIP."""
    torch.manual_seed(0)
    text = F.normalize(torch.randn(classes, 64), dim=1)
    return semivl.build_model(Config(crop=crop, decoder=decoder), data_prep.empty_clip("toy").visual,
                              text)

@pytest.mark.parametrize("decoder", ["language", "vision"])
@pytest.mark.parametrize("size", [(64, 64), (40, 96), (33, 17), (9, 130)])
@torch.no_grad()
def test_small_logits_have_the_size_of_the_image(size, decoder):
    model = tiny_model(classes=4, decoder=decoder).eval()
    assert model(torch.rand(2, 3, *size)).shape == (2, 4, *size)

def test_small_two_scenes_are_learned_by_heart():
    model = tiny_model(classes=3)
    masks = torch.zeros(2, 64, 64, dtype=torch.long)
    masks[0, 16:, :32], masks[1, :32, 16:], masks[1, 32:, :32] = 1, 2, 1
    colours = torch.tensor([[0.6, 0.6, 0.4], [0.7, 0.3, 0.5], [0.3, 0.5, 0.7]])
    images = colours[masks].permute(0, 3, 1, 2) + 0.03 * random_normal(2, (2, 3, 64, 64))
    optimizer = semivl.make_optimizer(model, Config(lr=1e-3, vit_lr=1e-3))
    for _ in range(50):
        semivl.supervised_loss(model(images), masks).backward()
        optimizer.step()
        optimizer.zero_grad()
    iou = semivl.iou_per_class(semivl.confusion_matrix(model(images).argmax(1), masks, 3))
    assert iou.mean() > 95

# ----------------------------------------------------------------------------------------------
# Equality with the authors' code. Of each array: its first 4 values, 3 more at a third, two thirds
# and the end, mean and absolute maximum. Their images are normalised; ours are in [0, 1].

ARRAYS = {
    "skip_layer0": [0.15992, 3.27752, -0.056616, -1.702557, 1.454157, -1.330713, 1.035475,
        -0.042709, 5.731266],
    "skip_layer4": [-1.654189, 0.682463, -2.176073, -0.896271, 2.096778, -2.295802, -0.303443,
        0.091571, 9.197062],
    "dense_embed": [0.081275, 0.097947, 0.095571, 0.078342, 0.026015, -0.067863, 0.044389,
        -0.001207, 0.217205],
    "global_embed": [0.066732, -0.037101, 0.072955, -0.012894, 0.054403, -0.056386, 0.040614,
        0.000366, 0.17356],
    "sim": [0.04126, 0.014675, 0.035255, 0.023586, -0.047915, 0.04007, -0.022069, -0.015729,
        0.113589],
    "aspp_out": [0.81357, 0.873607, 0.605794, 0.725779, 1.017388, -0.009924, 2.441332, 0.408567,
        3.742311],
    "semantic_out": [5.665031, 5.607229, 5.221578, 5.223725, -4.320525, 4.085968, 11.334358,
        1.499726, 12.951447],
    "dec_lowres": [0.286775, 0.415613, 0.101565, 0.362099, 0.34767, 0.488941, 0.208606, 0.431636,
        1.725022],
    "logits": [0.286775, 0.286775, 0.302879, 0.335089, 0.302807, 0.380143, 0.208606, 0.431636,
        1.542125],
    "odd skip_layer0": [-3.736178, 0.057633, 1.988632, 1.797632, -1.068947, -1.369062, -0.050145,
        -0.0582, 5.80963],
    "odd skip_layer4": [-1.350434, -0.455502, -0.564709, 0.109231, -1.215565, -2.268917, 2.29666,
        0.08356, 9.356159],
    "odd dense_embed": [0.037555, 0.079493, 0.036488, 0.048466, -0.041965, 0.024115, 0.029369,
        -0.000461, 0.193704],
    "certainty": [0.976819, 0.976819, 0.976819, 0.976819, 0.818689, 0.696046, 0.895673, 0.761447,
        0.99844],
    "cityscapes skip4": [-1.693422, 0.454151, -2.100168, -0.987981, 1.976764, -2.26737, -0.27655,
        0.085328, 8.992495],
    "cityscapes embed": [0.081042, 0.097754, 0.093204, 0.078673, 0.029585, -0.062177, 0.047792,
        -0.001189, 0.218271],
    "cityscapes conv": [0.226451, 0.145112, 0.044765, 0.100693, 1.537844, 0, 0.263131, 0.53414,
        3.460292],
    "cityscapes logits": [0.29533, 0.29533, 0.290421, 0.280603, 0.542196, 0.919696, 0.437799,
        0.819211, 2.088953],
    "window average": [0.028309, 0.028309, 0.037568, 0.056085, -0.086269, 0.104738, 0.110517,
        0.400172, 1.48099],
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
    """Names and shapes of an authors' checkpoint: ViT of width 64, full-size decoder. Below a name
    stands for its .weight alone, with + also for a .bias, with ~ for a batch norm."""
    D, E, C = 64, 512, 128
    entries = [("backbone.patch_embed.projection", D, 3, 16, 16), ("backbone.proj", E, D, 1, 1),
               ("backbone.ln0+", D), ("backbone.ln1+", D)]
    blocks = {f"backbone.layers.{i}": (D, 4 * D) for i in range(12)} | {
        f"decode_head.layers.{i}.transformer": (2 * C, 4 * C) for i in range(2)}
    for name, (width, hidden) in blocks.items():
        entries += [(f"{name}.ln1+", width), (f"{name}.ln2+", width),
                    (f"{name}.attn.attn.out_proj+", width, width),
                    (f"{name}.ffn.layers.0.0+", hidden, width), (f"{name}.ffn.layers.1+", width, hidden)]
    skip, dim = (32, 256) if cityscapes else (16, D)
    head = [("conv1+", C, 1, 7, 7), ("aspp.aspp_convs.4.gap.1", C, C, 1, 1), ("text_proj.0+", C, E),
            ("aspp.aspp_convs.4.gap.2+", C), ("aspp.project.0", C, 5 * C, 1, 1),
            ("aspp.project.1+", C), ("head+", 1, 32, 3, 3), ("skip_proj.0.0+", 32, D, 3, 3),
            ("skip_proj.1.0+", skip, dim, 3, 3)]
    for i, k in enumerate((1, 3, 3, 3)):
        head += [(f"aspp.aspp_convs.{i}.0", C, C, k, k), (f"aspp.aspp_convs.{i}.1+", C)]
    for up, c_in, c_skip, c_out in (("up1", C, 32, 64), ("up2", 64, skip, 32)):
        head += [(f"{up}.conv.0", c_out, c_in, 3, 3), (f"{up}.conv.1+", c_out),
                 (f"{up}.conv.3", c_out, c_out, 3, 3), (f"{up}.conv.4+", c_out)]
    entries += [(f"decode_head.{name}", *shape) for name, *shape in head]
    if cityscapes:
        net = [(f"stem.{3 * i}", c_out, c_in, 3, 3) for i, (c_in, c_out) in enumerate(
            ((3, 32), (32, 32), (32, 64)))] + [(f"stem.{3 * i + 1}~", (32, 32, 64)[i]) for i in range(3)]
        for i, j in ((i, j) for i in range(3) for j in range(3)):
            c_out, c_in, k = ((64, 256 if i else 64, 1), (64, 64, 3), (256, 64, 1))[j]
            net += [(f"layer1.{i}.conv{j + 1}", c_out, c_in, k, k), (f"layer1.{i}.bn{j + 1}~", c_out)]
        net += [("layer1.0.downsample.0", 256, 64, 1, 1), ("layer1.0.downsample.1~", 256)]
        entries += [(f"conv_encoder.{name}", *shape) for name, *shape in net]
    shapes = {"backbone.cls_token": (1, 1, D), "backbone.pos_embed": (1, 65, D)}
    for up, c_in, c_up in (("up1", C, C - 32), ("up2", 64, 64 - skip)):
        shapes |= {f"decode_head.{up}.up.weight": (c_in, c_up, 2, 2), f"decode_head.{up}.up.bias": (c_up,)}
    for name, (width, _) in blocks.items():
        shapes |= {f"{name}.attn.attn.in_proj_weight": (3 * width, width),
                   f"{name}.attn.attn.in_proj_bias": (3 * width,)}
    for name, *shape in entries:
        base = name.rstrip("+~")
        shapes[f"{base}.weight"] = tuple(shape)
        if name != base:
            shapes[f"{base}.bias"] = (shape[0],)
        if name.endswith("~"):
            shapes |= {f"{base}.running_mean": (shape[0],), f"{base}.running_var": (shape[0],),
                       f"{base}.num_batches_tracked": ()}
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

def pixels(seed: int, shape) -> torch.Tensor:
    """The authors' normalised random images, as they were before normalising."""
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (semivl.IMAGENET_MEAN, semivl.IMAGENET_STD))
    return random_normal(seed, shape) * std + mean

def authors_model(cityscapes=False, factor=1):
    state = authors_state(cityscapes)
    for name in ("decode_head.head.weight", "decode_head.head.bias"):
        state[name] = state[name] * factor
    return semivl.load_authors_checkpoint(state, unit_rows(b"text", 5), heads=2)

@pytest.fixture(scope="module")
def authors():
    return authors_model()

def assert_golden(name: str, array: torch.Tensor, atol: float = 1e-5):
    flat = array.detach().flatten().double()
    spread = torch.from_numpy(np.linspace(0, len(flat) - 1, 16).astype(int))[[5, 10, 15]]
    values = torch.cat([flat[:4], flat[spread], flat.mean()[None], flat.abs().max()[None]])
    np.testing.assert_allclose(values, ARRAYS[name], rtol=0, atol=atol, err_msg=name)

@torch.no_grad()
def test_every_stage_of_the_forward_pass_equals_the_authors(authors):
    images, decoder = pixels(7, (2, 3, 128, 128)), authors.decoder
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
    dense, (skip0, skip4) = authors.clip(pixels(7, (1, 3, 65, 55)))
    assert dense.shape == (1, 512, 5, 4)
    assert_golden("odd skip_layer0", skip0)
    assert_golden("odd skip_layer4", skip4)
    assert_golden("odd dense_embed", dense)

@torch.no_grad()
def test_cityscapes_variant_with_its_convolutional_skip_equals_the_authors():
    model, images = authors_model(cityscapes=True), pixels(7, (2, 3, 128, 128))
    dense, (_, skip4) = model.clip(images)
    assert_golden("cityscapes skip4", skip4)
    assert_golden("cityscapes embed", dense)
    assert_golden("cityscapes conv", model.conv(images)[-1])
    assert_golden("cityscapes logits", model(images))

@pytest.mark.parametrize("conf, counts, grid", [
    (0.9, {3: 3991, 4: 5081, 255: 23696}, [3, 3, 255, 255, 3, 255, 255, 4]),
    (0.3, {1: 337, 3: 13481, 4: 18950}, [3, 3, 3, 3, 3, 3, 4, 4]),
])
def test_guidance_labels_equal_the_authors(authors, conf, counts, grid):
    guidance = semivl.FrozenGuidance(authors.clip, unit_rows(b"concepts", 9), SIZES, conf)
    images = pixels(7, (2, 3, 128, 128))
    labels = guidance.labels(images)
    assert dict(zip(*(t.tolist() for t in labels.unique(return_counts=True)))) == counts
    assert labels[0, 0, ::16].tolist() == grid
    assert_golden("certainty", guidance(images).softmax(1).max(1)[0])

@pytest.mark.parametrize("variant", STEP)
def test_losses_and_gradients_of_a_step_equal_the_authors(variant, monkeypatch):
    conf, factor = variant
    student = authors_model(factor=factor)
    # Feature dropout without chance: channels of odd index go, the others double.
    monkeypatch.setattr(F, "dropout2d", lambda f, p: 2 * f * (
        torch.arange(f.shape[1]) % 2 == 0).float()[:, None, None])
    guidance = semivl.FrozenGuidance(
        semivl.copy_trained(student.clip), unit_rows(b"concepts", 9), SIZES, 0.7)
    x, w, s1, s2 = (pixels(seed, (2, 3, 128, 128)) for seed in (11, 12, 13, 14))
    y = torch.from_numpy(np.random.RandomState(15).randint(0, 5, (2, 128, 128)))
    y[:, :8] = IGNORE
    padding = torch.zeros(2, 128, 128, dtype=torch.bool)
    padding[0, -16:] = True
    box1 = torch.tensor([[64, 16, 128, 80], [0, 0, 0, 0]])
    box2 = torch.tensor([[64, 64, 128, 128]] * 2)
    own = semivl.make_targets(semivl.EMATeacher(student, 0), guidance, w, padding)
    images, targets = {"x": x}, {}
    for name, view, box in (("s1", s1, box1), ("s2", s2, box2)):
        images[name] = semivl.cutmix(view, view.flip(0), box)
        targets[name] = own.map(lambda t: semivl.cutmix(t, t.flip(0), box))
    images["fp"], targets["fp"] = w, own
    logits = student(torch.cat([*images.values()]), num_perturbed=2).split(2)
    losses = semivl.semivl_loss(dict(zip(images, logits)), y, targets, 0.075, conf)
    losses["total"].backward()

    expected, norms = STEP[variant]
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        expected, rel=0, abs=1e-5)
    assert (targets["s1"].clip_label == IGNORE).sum() == 12766
    assert (own.clip_label == 4).sum() == 12364
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
    logits = semivl.sliding_window(authors, pixels(21, (1, 3, 150, 300)), 128, 106)
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
    scores = semivl.sliding_window(authors, pixels(21, (1, 3, 150, 310)), 128, 85, "probabilities")
    counts = scores.argmax(1).flatten().bincount()
    # Near-ties may fall either way on another processor: three pixels a class.
    assert (counts - torch.tensor([15903, 4131, 20706, 3233, 2527])).abs().max() <= 3

def test_learning_rate_equals_the_authors():
    rates = [semivl.learning_rate(0.001, step, 100) for step in (0, 1, 2, 50, 99)]
    expected = [0.001, 0.001, 0.001 * 0.99**0.9, 0.001 * 0.51**0.9, 0.001 * 0.02**0.9]
    assert rates == pytest.approx(expected, rel=1e-12)

@torch.no_grad()
def test_bf16_logits_equal_the_authors_but_for_two_percent_of_their_range(authors):
    images = pixels(7, (2, 3, 128, 128))
    exact = authors(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = authors(images)
    assert logits.dtype == torch.float32 and not torch.equal(logits, exact)
    assert (logits - exact).abs().max() < 0.02 * (exact.max() - exact.min())

# ----------------------------------------------------------------------------------------------
# CLIP and language

@pytest.mark.parametrize("pool", ["tok", "avg"])
@torch.no_grad()
def test_with_attention_kept_the_dense_path_is_open_clips_image_embedding(pool):
    torch.manual_seed(0)
    config = dict(image_size=64, patch_size=16, width=64, layers=3, head_width=32, pool_type=pool)
    clip = open_clip.CLIP(64, config, dict(width=32, heads=2, layers=1), quick_gelu=True).eval()
    clip.visual.image_mean, clip.visual.image_std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    theirs = clip.encode_image((images - mean) / std, normalize=True)
    tokens, _, _ = semivl.DenseCLIP(clip.visual).encode(images, last_attention=True)
    ours = F.normalize(tokens[:, 1:].mean(1) if pool == "avg" else tokens[:, 0], dim=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

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
                  lambda: semivl.window_starts(1, 1, 1, "logit"),
                  lambda: semivl.consistency_loss(*[None] * 4, weighting="pixels")):
        with pytest.raises(ValueError):
            wrong()

def test_definitions_average_for_the_decoder_and_stand_apart_for_guidance():
    clip = data_prep.empty_clip("toy")
    classes = {"ground": ["grass", "sand"], "car": ["car"]}
    text, _, concepts, sizes = semivl.describe_classes(clip, classes, Config(decoder_text="mean"))
    raw = semivl.encode_text(clip, ["grass", "sand"])
    torch.testing.assert_close(text[0], F.normalize(raw.mean(0), dim=0))
    assert sizes == [2, 1]
    torch.testing.assert_close(concepts[:2], F.normalize(raw, dim=1))
    text, names, concepts, _ = semivl.describe_classes(clip, classes, Config(definitions=False))
    torch.testing.assert_close(concepts, names)
    torch.testing.assert_close(text, names)

def test_the_published_definitions_are_complete():
    counts = {name: (len(c), sum(map(len, c.values()))) for name, c in semivl.DEFINITIONS.items()}
    assert counts == {"voc": (21, 98), "cityscapes": (19, 54)}
    for name, classes in semivl.DEFINITIONS.items():
        assert list(classes) == data_prep.CLASSES[name]
    assert semivl.DEFINITIONS["voc"]["tvmonitor"] == ["tv", "monitor", "standalone screen"]
    assert semivl.DEFINITIONS["cityscapes"]["wall"] == [
        "individual standing wall, which is not part of a building"]

# ----------------------------------------------------------------------------------------------
# The networks

@torch.no_grad()
def test_perturbation_touches_only_the_last_images():
    model, images = tiny_model().eval(), torch.rand(3, 3, 64, 64)
    clean, perturbed = model(images), model(images, num_perturbed=1)
    torch.testing.assert_close(clean[:2], perturbed[:2], rtol=0, atol=1e-5)
    assert (clean[2] - perturbed[2]).abs().max() > 1e-3

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

# ----------------------------------------------------------------------------------------------
# Losses and CutMix

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
    loss = semivl.consistency_loss(logits, *t[:3], conf_thresh=0.6, weighting=weighting)
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

def test_strong_views_share_half_of_the_weight_however_many_they_are():
    logits, t = random_targets()
    views = ("s1", "s2", "s3", "fp")
    losses = semivl.semivl_loss(dict.fromkeys(("x", *views), logits), t.label,
                                dict.fromkeys(views, t), 0.3, 0.5)
    L, G = losses["s3"], losses["guidance_s3"]  # all views are the same here
    assert losses["total"] == pytest.approx(float((losses["x"] + L) / 2 + 0.3 * G))
    assert semivl.semivl_loss({"x": logits}, t.label, {}, 0.3)["total"] == losses["x"]

def test_cutmix_moves_image_and_all_targets_together():
    value = torch.arange(128).reshape(2, 8, 8)
    targets = Targets(value, value.float(), value % 2 == 0, value + 1)
    images = value.float().unsqueeze(1).repeat(1, 3, 1, 1)
    box = torch.tensor([[2, 1, 5, 7], [0, 0, 0, 0]])
    mixed = semivl.cutmix(images, images.flip(0), box)
    t = targets.map(lambda t: semivl.cutmix(t, t.flip(0), box))
    expected = value.clone()
    expected[0, 2:5, 1:7] = value[1, 2:5, 1:7]
    assert torch.equal(mixed, expected.float().unsqueeze(1).repeat(1, 3, 1, 1))
    assert torch.equal(t.label, expected) and torch.equal(t.confidence, expected.float())
    assert torch.equal(t.padding, expected % 2 == 0) and torch.equal(t.clip_label, expected + 1)

# ----------------------------------------------------------------------------------------------
# Data and augmentation

def make_folder(path: Path, scenes=6) -> Path:
    """A small folder of images by the toy world's painter."""
    painter = data_prep.Painter("test")
    for kind in ("images", "masks", "splits"):
        (path / kind).mkdir(parents=True)
    for i in range(scenes):
        image, mask = painter.scene()
        image.save(path / f"images/{i}.png")
        mask.save(path / f"masks/{i}.png")
    lines = [f"images/{i}.png masks/{i}.png" for i in range(scenes)]
    content = dict(classes=data_prep.TOY_CLASSES, definitions={"vehicle": ["car", "boat"]})
    (path / "dataset.json").write_text(json.dumps(content))
    (path / "splits/train.txt").write_text("\n".join(lines[:-2]))
    (path / "splits/val.txt").write_text("\n".join(lines[-2:]))
    return path

@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images")

def test_palette_masks_are_read_as_class_numbers_and_ignore_index_as_ignore(folder):
    file = folder / "masks/0.png"
    raw = np.array(Image.open(file))
    assert Image.open(file).mode == "P" and raw.max() > 0
    assert np.array_equal(semivl.read_mask(file, 6), raw)
    assert np.array_equal(semivl.read_mask(file, 6, ignore=0) == IGNORE, raw == 0)

def test_photographs_are_turned_upright(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10] = 200  # bright above
    for orientation, turn in ((3, 2), (6, 1), (8, 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.rot90(pixels, turn)).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(semivl.read_image(tmp_path / "a.png").permute(1, 2, 0), pixels)

def test_labelled_images_are_drawn_by_the_seed_or_taken_from_the_list(folder):
    data = semivl.open_data(Config(dataset=str(folder)))
    assert semivl.draw_labelled(data, 2, 0) == semivl.draw_labelled(data, 2, 0)
    assert len({tuple(semivl.draw_labelled(data, 2, seed)) for seed in range(8)}) > 1
    (folder / "splits/2").mkdir()
    (folder / "splits/2/labeled.txt").write_text(
        "images/1.png masks/1.png\nimages/3.png masks/3.png\n")
    assert [image for image, _ in semivl.draw_labelled(data, 2, 5)] == ["images/1.png",
                                                                        "images/3.png"]

def test_every_item_is_a_function_of_seed_and_position(folder):
    cfg = Config(dataset=str(folder), crop=32, fit=False)
    data = semivl.open_data(cfg)
    items = semivl.TrainingSet(data, data.train[:2], data.train[2:], cfg)
    first, state = items[7], torch.get_rng_state()
    again = items[7]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are untouched
    for name, value in first.items():
        assert value == again[name] if name == "files" else torch.equal(value, again[name])
    assert not torch.equal(first["s1"], first["s2"])
    once = [items.pick(items.unlabelled, i) for i in range(len(items.unlabelled))]
    assert sorted(once) == sorted(items.unlabelled)  # an epoch sees every image once

@pytest.mark.parametrize("size, r, expected", [
    ((375, 500), 0.5, (256, 341)), ((375, 500), 1.0, (512, 683)), ((375, 500), 2.0, (1024, 1365)),
    ((100, 500), 1.0, (410, 2048)), ((375, 500), 1.001, (512, 683)),
])
def test_random_scale_fits_the_image_as_published(size, r, expected):
    cfg = Config(scale_min=r, scale_max=r)
    assert tuple(semivl.random_size(*size, cfg)) == expected

def test_masks_are_resized_to_the_nearest_of_cv2_with_fit_and_of_pil_without():
    image, mask = torch.zeros(3, 4, 10, dtype=torch.uint8), torch.arange(40).byte().view(4, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semivl, "random_size", lambda *_: [4, 7])
        patch.setattr(torch, "rand", lambda *_: torch.tensor(1.0))  # no flip
        rows = {fit: semivl.scale_crop_flip(image, mask, Config(crop=7, fit=fit))[1][0].tolist()
                for fit in (True, False)}
    assert rows[True] == [int(i * 10 / 7) for i in range(7)]
    assert rows[False] == np.array(Image.fromarray(mask.numpy()).resize(
        (7, 4), Image.Resampling.NEAREST))[0].tolist() != rows[True]

def test_scale_crop_flip_keeps_image_and_mask_aligned_and_marks_padding():
    torch.manual_seed(0)
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[10:30, 20:50] = 1
    image = (200 * mask + 55).repeat(3, 1, 1)
    for i in range(20):
        x, y = semivl.scale_crop_flip(image, mask, Config(crop=64, fit=i % 2 == 0))
        assert x.shape == (3, 64, 64) and y.shape == (64, 64)
        assert (x[0][y == IGNORE] == 0).all()
        aligned = ((x[0] > 155) == (y == 1))[y != IGNORE]
        assert aligned.float().mean() > 0.95  # edges are blurred, labels are not

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

# ----------------------------------------------------------------------------------------------
# Evaluation

def test_miou_is_over_the_classes_that_occur():
    prediction, truth = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, IGNORE])
    iou = semivl.iou_per_class(semivl.confusion_matrix(prediction, truth, 4))
    assert iou[:2].tolist() == [50, 50] and iou[2:].isnan().all() and iou.nanmean() == 50

@pytest.mark.parametrize("size, window, stride, mode, starts", [
    (150, 128, 106, "logits", [0, 22]), (300, 128, 106, "logits", [0, 106, 172]),
    (100, 128, 106, "logits", [0]), (128, 128, 106, "logits", [0]),
    (310, 128, 85, "probabilities", [0, 85, 170, 255]),
])
def test_windows_start_where_published(size, window, stride, mode, starts):
    assert semivl.window_starts(size, window, stride, mode) == starts

# ----------------------------------------------------------------------------------------------
# Runs

TINY = ("--clip toy --clip-weights none --crop 32 --fit off --stride 32 --batch 2 --micro-batch 2 "
        "--workers 0 --conf 0.1 --guidance-conf 0.1 --lr 1e-3 --vit-lr 1e-3 --device cpu").split()

def run(folder, out, *options, labels=2):
    return semivl.main(["--dataset", str(folder), "--labels", str(labels), *TINY, "--steps", "4",
                        "--evals", "1", "--out", str(out), *map(str, options)])

def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

def weights(out: Path) -> dict:
    content = semivl.load_file(out / "last.pt")
    moments = content["optimizer"]["state"]
    return {**{f"{kind} {name}": t for kind in ("student", "model")
               for name, t in content[kind].items()},
            **{f"moment {i} {k}": t for i in moments for k, t in moments[i].items()}}

def assert_same(a: Path, b: Path):
    mine, theirs = weights(a), weights(b)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name

def test_a_run_moves_what_trains_and_nothing_else(folder, tmp_path):
    assert run(folder, tmp_path / "run") == 0
    torch.manual_seed(0)
    clip, _ = semivl.load_clip(Config(clip="toy", clip_weights="none"))
    fresh = semivl.build_model(Config(crop=32), clip.visual, torch.randn(6, 64))
    student = semivl.load_file(tmp_path / "run/last.pt")["student"]
    for name, p in fresh.clip.named_parameters():
        # The last block's q and k feed nothing; their rows move by weight decay alone.
        assert torch.equal(p, student[f"clip.{name}"]) == (not p.requires_grad), name
    log = logged(tmp_path / "run")
    assert [line["step"] for line in log] == [1, 2, 3, 4] and log[-1]["kept"] > 0
    assert {"x", "s1", "s2", "fp", "guidance_fp", "total", "lr", "seconds", "val_miou"} <= {*log[-1]}
    names = {"semivl.py", "labeled.txt", "log.jsonl", "last.pt", "best.pt", "sheet.png", "result.json"}
    assert names == {file.name for file in (tmp_path / "run").iterdir()}

def test_a_third_strong_view_is_one_more_key(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(semivl.STRONG_VIEWS, "s3", lambda w: 255 - w)
    assert run(folder, tmp_path / "run", "--steps", 2) == 0
    for line in logged(tmp_path / "run"):
        assert line["s3"] > 0 and line["guidance_s3"] > 0
        L, G = (sum(line[k + v] for v in ("s1", "s2", "s3")) / 6 + line[k + "fp"] / 2
                for k in ("", "guidance_"))
        weight = 0.1 * (1 - (line["step"] - 1) / 2)
        assert line["total"] == pytest.approx((line["x"] + L) / 2 + weight * G, rel=1e-5)

def test_micro_batches_accumulate_to_the_whole_batch(folder, tmp_path, monkeypatch):
    # Dropout would draw other numbers. Without padding every image has as many valid pixels.
    monkeypatch.setattr(F, "dropout2d", lambda f, p: f)
    for size in (2, 1):
        run(folder, tmp_path / str(size), "--steps", 1, "--micro-batch", size, "--conf", 0,
            "--scale-min", 1.5)
    one, other = (logged(tmp_path / str(size))[0] for size in (2, 1))
    assert one["total"] == pytest.approx(other["total"], rel=1e-5)

def test_without_unlabelled_images_a_run_is_supervised(folder, tmp_path):
    assert run(folder, tmp_path / "run", "--unlabelled", "off", "--decoder", "vision") == 0
    assert all(line["total"] == line["x"] for line in logged(tmp_path / "run"))

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, beside its folder of images."""
    path = tmp_path_factory.mktemp("whole")
    assert run(make_folder(path / "images"), path / "run", *LONG) == 0
    return path / "run"

LONG = "--steps 12 --evals 3 --save-every 3".split()

@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_to_the_same_weights(workers, whole, tmp_path):
    killed = tmp_path / "killed"
    command = [sys.executable, semivl.__file__, "--dataset", whole.parent / "images", "--labels", "2",
               *TINY, *LONG, "--workers", str(workers), "--out", killed]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (
            (killed / "log.jsonl").exists() and len(logged(killed)) >= 5):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert semivl.load_file(killed / "last.pt")["step"] in (3, 4, 6, 8)
    assert semivl.main(["--resume", str(killed)]) == 0
    assert_same(killed, whole)

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_saving(number, whole, tmp_path, monkeypatch, capsys):
    stopped, loss = tmp_path / "stopped", semivl.semivl_loss
    calls = []

    def signalled(*args):
        calls.append(args)
        if len(calls) == 5:
            signal.raise_signal(number)  # in the middle of the step: it will be finished
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(semivl, "semivl_loss", signalled)
        assert run(whole.parent / "images", stopped, *LONG) == 130
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert f"go on by --resume {stopped}" in capsys.readouterr().out
    assert semivl.load_file(stopped / "last.pt")["step"] == 5
    assert semivl.main(["--resume", str(stopped)]) == 0
    assert_same(stopped, whole)

def test_a_loss_that_is_not_finite_stops_before_anything_is_written(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "run", "--lr", "1e30", "--steps", 50) == 2
    assert "Lower --lr, or look at these files: images/" in capsys.readouterr().err
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values()) if (
        tmp_path / "run/last.pt").exists() else not (tmp_path / "run/best.pt").exists()

def test_a_full_disk_loses_nothing_that_was_saved(whole, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run/last.pt"
    content = semivl.load_file(file)
    content["config"]["steps"] = 14
    torch.save(content, file)
    saved, (soft, hard) = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) // 2, hard))  # as if the disk was full
    try:
        assert semivl.main(["--resume", str(tmp_path / "run")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "make room" in capsys.readouterr().err.splitlines()[-1]
    assert file.read_bytes() == saved

def torchrun(processes: int, *options, start=subprocess.run):
    return start([sys.executable, "-m", "torch.distributed.run", "--standalone",
                  f"--nproc-per-node={processes}", semivl.__file__, *map(str, options)],
                 env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
                 stderr=subprocess.PIPE)

def test_two_processes_end_with_weights_that_one_evaluates_to_the_same_miou(folder, tmp_path):
    (folder / "splits/val.txt").open("a").write("\nimages/3.png masks/3.png")  # shared unevenly
    spy = tmp_path / "spy.py"  # each process leaves its own student
    spy.write_text("import os, sys, torch; sys.path.insert(0, sys.argv.pop(1))\n"
                   "import semivl; update = semivl.EMATeacher.update\n"
                   "def keep(self, student, step):\n"
                   "    update(self, student, step)\n"
                   "    torch.save([student.state_dict(), self.model.state_dict()],\n"
                   "               sys.argv[-1] + os.environ['RANK'])\n"
                   "semivl.EMATeacher.update = keep\nsys.exit(semivl.main())\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", spy,
         Path(semivl.__file__).parent, "--dataset", folder, "--labels", "2", *TINY, "--batch", "4",
         "--steps", "5", "--evals", "1", "--decoder", "vision", "--out", tmp_path / "two"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("writes to") == 1  # one process speaks for all
    for one, other in zip(*(torch.load(f"{tmp_path}/two{rank}") for rank in (0, 1))):
        assert all(torch.equal(t, other[name]) for name, t in one.items())
    assert semivl.main(["--eval", str(tmp_path / "two/last.pt"), "--out", str(tmp_path / "e")]) == 0
    both = [json.loads((tmp_path / r / "result.json").read_text())["val"]["SemiVL"]["mIoU"]
            for r in ("two", "e")]
    assert both[0] == pytest.approx(both[1], abs=1e-4)

def test_processes_that_are_told_to_stop_stop_together_and_save(folder, tmp_path):
    out = tmp_path / "run"
    running = torchrun(2, "--dataset", folder, "--labels", 2, *TINY, "--steps", 5000, "--out", out,
                       start=subprocess.Popen)
    while not (out / "log.jsonl").exists() or len(logged(out)) < 3:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    running.communicate()
    assert semivl.load_file(out / "last.pt")["step"] == logged(out)[-1]["step"] >= 3

def test_semivl_alone_in_an_empty_folder_trains_resumes_evaluates_and_predicts(tmp_path):
    alone = tmp_path / "alone"
    make_folder(alone / "pictures")
    shutil.copy(semivl.__file__, alone)
    (alone / "clip").mkdir()
    config = dict(model_cfg=data_prep.CLIP_CONFIGS["toy"], preprocess_cfg={})
    (alone / "clip/open_clip_config.json").write_text(json.dumps(config))
    torch.save(data_prep.empty_clip("toy").state_dict(), alone / "clip/open_clip_pytorch_model.bin")
    for command in (
            "--dataset pictures --labels 2 --clip local-dir:clip --crop 32 --stride 32 --steps 2 "
            "--batch 2 --workers 0", "--resume runs/pictures-2", "--eval runs/pictures-2/last.pt",
            "--predict runs/pictures-2/last.pt pictures/images/0.png"):
        done = subprocess.run([sys.executable, "semivl.py", *command.split()], cwd=alone, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
    assert Image.open(alone / "runs/pictures-2/predictions/0-mask.png").mode == "P"
    assert "plant" in done.stdout or "background" in done.stdout
    done = subprocess.run([sys.executable, "semivl.py"], cwd=alone, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr == "semivl.py: No module named 'data_prep'\n"

def test_the_benchmark_measures_training_steps(capsys):
    assert semivl.main(["--benchmark", "--dataset", "voc", *TINY]) == 0
    assert "s a step" in capsys.readouterr().out

def test_predictions_are_not_overwritten_and_have_the_size_of_the_image(whole, tmp_path, capsys):
    checkpoint, image = str(whole / "last.pt"), tmp_path / "a.jpg"
    Image.effect_noise((70, 33), 90).convert("CMYK").save(image)
    command = ["--predict", checkpoint, str(image), "--out", str(tmp_path / "out")]
    assert semivl.main(command) == 0
    mask = Image.open(tmp_path / "out/a-mask.png")
    assert mask.mode == "P" and mask.size == (70, 33) and np.array(mask).max() < 6
    assert semivl.main(command) == 2 and "exists" in capsys.readouterr().err

# ----------------------------------------------------------------------------------------------
# Mistakes end in one line, and nothing is left behind

class Malicious:
    def __reduce__(self):
        return print, ("this must never run",)

MISTAKES = {  # what is done to a folder -> (file, content or picture; or options), words of the line
    "a mask of another size": ("masks/4.png", Image.new("L", (9, 9)), "64 x 64"),
    "a mask with a class too many": ("masks/4.png", Image.new("L", (64, 64), 77), "77"),
    "a mask of colours": ("masks/4.png", Image.new("RGB", (64, 64)), "palette"),
    "an image of 16 bits": ("images/4.png", Image.fromarray(np.zeros((64, 64), np.uint16)), "8 bits"),
    "bytes that are no image": ("images/4.png", b"no image at all", "images/4.png"),
    "a broken unlabelled image": ("images/0.png", lambda b: b[:900], "images/0.png"),
    "a truncated mask": ("masks/4.png", lambda b: b[:len(b) // 2], "masks/4.png"),
    "three columns": ("splits/val.txt", b"a b c", "IMAGE MASK"),
    "an empty list": ("splits/train.txt", b"", "train.txt"),
    "a list that is no text": ("splits/train.txt", b"\xff\xfe\x00", "train.txt"),
    "broken json": ("dataset.json", b"{", "dataset.json"),
    "no classes": ("dataset.json", b"{}", "classes"),
    "a class twice": ("dataset.json", b'{"classes": ["a", "a"]}', "twice"),
    "a definition of no class": (
        "dataset.json", b'{"classes": ["a"], "definitions": {"b": ["c"]}}', "definitions"),
    "classes that are no list": ("dataset.json", b'{"classes": "sky"}', "list"),
    "more classes than a byte holds": (
        "dataset.json", json.dumps({"classes": [str(i) for i in range(256)]}).encode(), "255"),
    "nothing left unlabelled": ("splits/train.txt", b"images/0.png masks/0.png\n"
                                b"images/1.png masks/1.png", "--unlabelled off"),
    "no such folder": "--dataset nowhere | dataset.json",
    "more labels than masks": "--labels 200 | --labels 200",
    "no labels": "--labels 0 | labels",
    "unknown CLIP": "--clip ViT-Z | ViT-Z",
    "a CLIP with a foreign text tower": "--clip roberta-ViT-B-32 | no plain ViT",
    "QuickGELU weights for a GELU model": "--clip ViT-B-16 --clip-weights= | quickgelu",
    "no such weights": "--clip-weights nowhere.pt | nowhere.pt",
    "no weights but a text": "--clip-weights dataset.json | dataset.json",
    "malicious weights": "--clip-weights bad.pt | bad.pt",
    "a malicious checkpoint": "--eval bad.pt | bad.pt",
    "malicious stem weights": "--conv-skip on --conv-weights bad.pt | bad.pt",
    "a micro-batch that does not divide": "--micro-batch 3 --batch 4 | divide",
    "windows with gaps between them": "--stride 33 | pixels would be left out",
    "a value out of range": "--conf 1.5 | conf",
    "a crop below the patch": "--crop 7 --stride 7 | patch",
    "unknown device": "--device quantum | quantum",
    "no such checkpoint": "--eval nowhere.pt | no such file",
    "a folder for a checkpoint": "--eval splits | directory",
    "resuming nothing": "--resume splits | last.pt",
    "an output folder that is taken": "--out splits | splits",
}

@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_ends_with_one_line_and_exit_code_2(what, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({"model": Malicious()}, "bad.pt")
    mistake, options = MISTAKES[what], ["--dataset", ".", "--labels", "2", *TINY]
    if isinstance(mistake, str):
        mistake, _, words = mistake.partition(" | ")
        options = mistake.split() if "--eval" in mistake or "--resume" in mistake else [
            *options, *mistake.split()]
    else:
        file, content, words = mistake
        if isinstance(content, Image.Image):
            content.save(file)
        else:
            old = Path(file).read_bytes()
            Path(file).write_bytes(content(old) if callable(content) else content)
    before = sorted(Path().rglob("*"))
    assert semivl.main(options) == 2
    said = capsys.readouterr()
    assert said.err.startswith("semivl.py: ") and len(said.err.splitlines()) == 1
    assert words in said.err and "must never run" not in said.out
    assert sorted(Path().rglob("*")) == before

def test_twenty_problems_of_a_folder_are_listed_at_once(folder, tmp_path, capsys):
    lines = [f"images/{i}.png masks/{i}.png" for i in range(100, 130)]
    (folder / "splits/val.txt").write_text("\n".join(lines))
    assert run(folder, tmp_path / "run") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 21 and said[-1] == "... and 10 more" and "images/100.png" in said[0]

def test_an_error_in_a_loader_process_ends_the_run_with_its_own_message(folder, tmp_path, monkeypatch,
                                                                        capsys):
    monkeypatch.setattr(semivl, "check_folder", lambda *_: (folder / "images/0.png").unlink())
    assert run(folder, tmp_path / "run", "--workers", 1) == 2
    assert capsys.readouterr().err.endswith(f"{folder}/images/0.png: no such file or directory\n")

def test_help_shows_every_setting_and_a_wrong_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        semivl.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for name in vars(Config()):
        assert f"--{name.replace('_', '-')} " in said
    with pytest.raises(SystemExit) as stop:
        semivl.main(["--learning-rate", "1"])
    assert stop.value.code == 2

# ----------------------------------------------------------------------------------------------
# The file itself

def cut_out(name: str) -> dict:
    """A fresh namespace that holds `name`, the definitions that it names, and the imports."""
    source = Path(semivl.__file__).read_text()
    places, needed, todo = {}, [], [name]
    for node in ast.parse(source).body:
        for target in node.targets if isinstance(node, ast.Assign) else [node]:
            places[getattr(target, "id", getattr(target, "name", None))] = node
    while todo:
        node = places[todo.pop()]
        if node not in needed:
            needed.append(node)
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            assert not used & {"Config", "train"}, (name, node.name)
            todo += used & set(places)
    imports = [node for node in ast.parse(source).body
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    parts = [ast.unparse(node) for node in imports + sorted(needed, key=lambda node: node.lineno)]
    namespace = {"__name__": "cut_out"}
    exec("\n".join(parts), namespace)
    return namespace

def test_each_piece_works_when_it_is_cut_out():
    images, text = torch.rand(2, 3, 32, 48), random_normal(2, (5, 64))
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
    guidance = cut_out("FrozenGuidance")["FrozenGuidance"](dense_clip, text, [2, 3])
    assert guidance(images).shape == (2, 2, 32, 48)
    teacher = cut_out("EMATeacher")["EMATeacher"](dense_clip, decay=0.9)
    teacher.update(dense_clip, step=100)
    assert torch.equal(teacher(images)[0], dense_clip(images)[0])
    scores = cut_out("sliding_window")["sliding_window"](lambda part: part, images, 20, 10)
    torch.testing.assert_close(scores, images)

def test_the_examples_in_the_docstrings_give_what_they_say():
    result = doctest.testmod(semivl)
    assert result.attempted >= 7 and result.failed == 0

def test_the_three_files_keep_to_their_rooms():
    here = Path(semivl.__file__).parent
    for name, most in (("semivl.py", 1400), ("data_prep.py", 800), ("test_semivl.py", 1000)):
        assert len((here / name).read_text().splitlines()) <= most, name
    assert "semivl" not in {a.name for node in ast.walk(ast.parse((here / "data_prep.py").read_text()))
                            if isinstance(node, ast.Import) for a in node.names}

# ----------------------------------------------------------------------------------------------
# Data folders: the published sets from small archives of the true layout, served on this machine

class Host(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; breaks off in the middle of a file `server.cuts[path]` times."""
    log_message = lambda *_: None  # noqa: E731

    def do_GET(self):
        host, path = self.server, self.path
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        host.seen.append((path, start))
        content, start = host.files.get(path), start * host.ranges
        if content is None or 0 < len(content) <= start:
            return self.send_error(404 if content is None else 416)
        self.send_response(206 if host.ranges else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        host.cuts[path] = host.cuts.get(path, 0) - 1
        self.wfile.write(content[start:len(content) // 2 if host.cuts[path] >= 0 else None])

@pytest.fixture
def host():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.files, server.cuts, server.seen, server.ranges = {}, {}, [], True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()

def packed(archive: str, members: dict) -> bytes:
    file, is_zip = io.BytesIO(), archive.endswith(".zip")
    with zipfile.ZipFile(file, "w") if is_zip else tarfile.open(fileobj=file, mode="w") as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.linkname = len(content), "/etc/passwd"
            info.type = tarfile.SYMTYPE if "link" in name else tarfile.REGTYPE
            out.writestr(name, content) if is_zip else out.addfile(info, io.BytesIO(content))
    return file.getvalue()

VOC, ADE = "VOCdevkit/VOC2012/", "ADEChallengeData2016/"
WORLDS = {  # data set -> three training and two validation images, line of a list, archives' files
    "voc": ("12345", "JPEGImages/{0}.jpg SegmentationClass/{0}.png",
            [[VOC + "JPEGImages/{0}.jpg", VOC + "SegmentationClass/{0}.png"]]),
    "coco": ([f"{'train' if i < 3 else 'val'}2017/{i:012}" for i in range(5)],
             "{0}.jpg masks/{1}.png", [["{0}.jpg"], [], ["deep/{1}.png"]]),
    "ade20k": ([f"training/ADE_train_{i:08}" for i in (1, 2, 3)]
               + [f"validation/ADE_val_{i:08}" for i in (1, 2)], "",
               [[ADE + "images/{0}.jpg", ADE + "annotations/{0}.png"]]),
    "cityscapes": (["train/a/a_1", "train/a/a_2", "train/b/b_3", "val/c/c_4", "val/c/c_5"],
                   "leftImg8bit/{0}_leftImg8bit.png gtFine/{0}_gtFine_labelTrainIds.png",
                   [["leftImg8bit/{0}_leftImg8bit.png"],
                    ["gtFine/{0}_gtFine_labelIds.png", "gtFine/{0}_no_color.png"]]),
}
FOREIGN = dict.fromkeys([  # members that must stay in their archive
    "../../no.jpg", VOC + "JPEGImages/link_no.jpg", VOC + "JPEGImages/../../../../no.jpg",
    ADE + "images/training/../../../../no.jpg", "leftImg8bit/test/no/no_1_leftImg8bit.png"], b"")

def small_archives(name: str, first=(0, 1, 150)) -> dict:
    """Archive -> its bytes. All files are one mask of 0 to 33, but its first values are `first`."""
    mask = np.resize(np.uint8([*first, *range(3, 34)]), (20, 30))
    Image.fromarray(mask).save(image := io.BytesIO(), "PNG")
    return {archive.name: packed(archive.name, FOREIGN | {
        path.format(n, n[-12:]): image.getvalue() for path in paths for n in WORLDS[name][0]})
        for archive, paths in zip(data_prep.ARCHIVES[name], WORLDS[name][2])}

def publish(name: str, host, monkeypatch) -> dict:
    """data_prep will take the small archives for the published ones, on two hosts."""
    archives, (names, line, _) = small_archives(name), WORLDS[name]
    lists = {"1/labeled.txt": names[:1], "2/labeled.txt": names[:2], "val.txt": names[3:]}
    lists |= {"train.txt": names[:3]} if name == "voc" else {}
    for file, part in lists.items():
        text = "\n".join(line.format(n, n[-12:]) for n in part)
        host.files[f"/lists/splits/{file}"] = text.encode()
    for file, content in archives.items():
        host.files |= {f"/first/{file}": content, f"/second/{file}": content}
    monkeypatch.setitem(data_prep.COUNTS, name, (3, 2))
    monkeypatch.setitem(data_prep.LISTS, name, {file: line and file for file in lists})
    monkeypatch.setattr(data_prep, "LIST_HOSTS", (f"{host.url}/gone/", f"{host.url}/lists/"))
    monkeypatch.setitem(data_prep.ARCHIVES, name, [a._replace(
        size=0.001, md5=a.md5 and hashlib.md5(archives[a.name]).hexdigest(),
        urls=[f"{host.url}/{place}/{a.name}" for place in ("first", "second") if a.urls])
        for a in data_prep.ARCHIVES[name]])
    return archives

def save(folder, files: dict) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)

def first_mask(folder) -> list:
    mask = folder / (folder / "splits/val.txt").read_text().split()[1]
    return np.array(Image.open(mask)).flatten()[:34].tolist()

@pytest.mark.parametrize("name, spelling", [
    ("voc", "9d8c10a7"), ("coco", "a4fab23f"), ("ade20k", "502dcd34"), ("cityscapes", "3d95bef9")])
def test_a_published_set_is_made_from_its_archives(
        name, spelling, host, monkeypatch, tmp_path, capsys):
    archives, kept = publish(name, host, monkeypatch), []
    command, mask = [name, "--root", str(tmp_path)], [0, 1, 150, *range(3, 34)]
    if name == "ade20k":
        mask = [255, 0, 149, *range(2, 33)]
    elif name == "cityscapes":
        assert data_prep.main(command) == 2 and "--source FOLDER" in capsys.readouterr().err
        command += ["--source", save(tmp_path / "downloads", kept := archives)]
        trained = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
        mask = [trained.index(i) if i in trained else 255 for i in mask]
    assert data_prep.main(command) == 0 and "is complete" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("downloads/*")} == set(kept)  # the user's own stay
    assert {path.name for path in tmp_path.iterdir()} - {"downloads"} == {name}
    assert not list(tmp_path.rglob("*no*.[jp][pn]g"))
    made, classes = tmp_path / name, data_prep.CLASSES[name]
    assert first_mask(made) == mask and len((made / "splits/train.txt").read_text().split()) == 3
    assert len((made / "splits/2/labeled.txt").read_text().splitlines()) == 2
    assert json.loads((made / "dataset.json").read_text())["classes"] == classes
    assert hashlib.md5("|".join(classes).encode()).hexdigest().startswith(spelling)
    before, asked = sorted(tmp_path.rglob("*")), len(host.seen)
    assert data_prep.main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before and len(host.seen) == asked

def test_masks_of_ade20k_are_never_shifted_twice(host, monkeypatch, tmp_path):
    publish("ade20k", host, monkeypatch)
    zips = save(tmp_path / "zips", small_archives("ade20k", first=(255, 0, 149)))  # converted ones
    assert first_mask(data_prep.prepare("ade20k", tmp_path, zips))[:4] == [255, 0, 149, 3]

@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_goes_on_where_it_stopped(ranges, host, tmp_path):
    content, host.ranges = np.random.RandomState(0).bytes(3_000_001), ranges
    host.files, host.cuts = {"/a": content, "/b": content}, {"/a": 1, "/b": 9}
    (tmp_path / "c.part").write_bytes(content)  # all is there, only the name is not
    for name in "ac":
        data_prep.download(f"{host.url}/a", tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    assert host.seen == [("/a", 0), ("/a", 1_500_000), ("/a", 3_000_001)]
    with pytest.raises((OSError, http.client.HTTPException)):  # this one never sends the rest
        data_prep.download(f"{host.url}/b", tmp_path / "b")

def test_a_wrong_md5_is_refused_and_the_mirror_used(host, monkeypatch, tmp_path, capsys):
    archive, = publish("voc", host, monkeypatch)
    host.files[f"/first/{archive}"] += b"spoilt"
    assert data_prep.main(["voc", "--root", str(tmp_path)]) == 0
    assert {(f"/first/{archive}", 0), (f"/second/{archive}", 0)} < set(host.seen)
    host.files.pop(f"/second/{archive}")
    assert data_prep.main(["voc", "--root", str(tmp_path / "other")]) == 2
    assert "MD5 is wrong" in capsys.readouterr().err and not (tmp_path / "other/voc").exists()

def test_an_interrupted_build_is_absent_and_fetches_no_more(host, monkeypatch, tmp_path):
    publish("coco", host, monkeypatch)
    with monkeypatch.context() as broken:
        broken.setattr(data_prep, "settle", lambda *_: signal.raise_signal(signal.SIGINT))
        assert data_prep.main(["coco", "--root", str(tmp_path)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]
    host.files.clear()
    data_prep.prepare("coco", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]

def test_the_folder_of_a_faster_process_is_used(host, monkeypatch, tmp_path):
    publish("voc", host, monkeypatch)
    theirs, files = tmp_path / "voc", {"dataset.json": b"theirs"}
    monkeypatch.setattr(data_prep, "settle", lambda *_: save(theirs, files))
    assert [path.read_text() for path in data_prep.prepare("voc", tmp_path).iterdir()] == ["theirs"]

@pytest.mark.parametrize("told, more, counts, data", [
    ("damaged", "", (3, 2), b"<html>"), ("val_2.png: not an image", "", (3, 2), packed(
        ".zip", {ADE + "annotations/validation/ADE_val_2.png": b""})),
    ("has 3 images instead of 4", "", (4, 2), None), ("2 listed files are", "", (3, 3), None),
    ("neither a folder", "--source nowhere", (3, 2), None), ("move", "--root zips", (3, 2), None)])
def test_mistakes_end_in_one_line(told, more, counts, data, host, monkeypatch, tmp_path, capsys):
    zips = {name: data or whole for name, whole in publish("ade20k", host, monkeypatch).items()}
    save(tmp_path / "zips", zips | {"ade20k": b"a file where the data folder should be"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data_prep.COUNTS, "ade20k", counts)
    assert data_prep.main(f"ade20k --source zips {more}".split()) == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line]
    assert len(shown) == 1 and shown[0].startswith("data_prep.py: ") and told in shown[0]
    assert not list(tmp_path.glob("data/*ade20k*"))

def test_a_disk_too_small_is_noticed_first(host, monkeypatch, tmp_path, capsys):
    publish("coco", host, monkeypatch)
    monkeypatch.setitem(data_prep.ARCHIVES, "coco", [data_prep.Archive("a.zip", 1e9, None, ["x"])])
    assert data_prep.main(["coco", "--root", str(tmp_path)]) == 2 and not host.seen
    assert "needs about" in capsys.readouterr().err and list(tmp_path.iterdir()) == []

def test_the_lists_of_ade20k_are_the_published_ones():
    for n, digest in {158: "5b28d705e511", 316: "78f423b10adc", 632: "0a2f3b29515a",
                      1263: "85cb4de0a789", 2526: "73d45bc89e25"}.items():
        text = data_prep.ade20k_list(f"{n}/labeled.txt").encode()
        assert hashlib.sha256(text).hexdigest().startswith(digest)

def test_the_toy_world_is_complete_or_absent(tmp_path, monkeypatch):
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

def test_the_painter_repeats_itself_from_its_seed_only():
    first, again, other = (np.array(data_prep.Painter(seed).scene()[0]) for seed in "aab")
    assert np.array_equal(first, again) and not np.array_equal(first, other)
