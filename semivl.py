"""SemiVL in one file: semi-supervised semantic segmentation with vision-language guidance.
Paper: Hoyer, Tan, Naeem, Van Gool, Tombari, "SemiVL", ECCV 2024, arXiv 2311.16241.

A few images have masks, many have none, and CLIP connects words with images. One training step
takes a crop x of a labelled image with its mask y, and a crop w of an unlabelled image:

    who             reads                                       gives
    STUDENT         x                                           loss x, with the mask y
    EMA TEACHER     w                                           pseudo-labels and their confidence
    FROZEN CLIP     w                                           labels from the words of the classes
    STUDENT         s1, s2: w recoloured, in it a box of        losses s1, s2, with the labels of w
                    another image (CutMix)                      and, in the box, of that image
    STUDENT         w, half of the feature channels off (fp)    loss fp, with the labels of w

The EMA teacher is our addition: in the published method the student makes the pseudo-labels
(`--ema 0`). README.md lists all differences. The paper reports 84.0 mIoU on VOC with 92 masks, 6.1
above the best before it; that run was not repeated by us.

    python semivl.py                                      the built-in toy world: minutes on a CPU
    python semivl.py --dataset FOLDER --labels 8          your own images (section 7)
    python semivl.py --dataset voc --labels 92            published data, schedule, test protocol
    python semivl.py --resume runs/voc-92                 resumes a run that was stopped
    python semivl.py --eval runs/voc-92/last.pt           IoU per class
    python semivl.py --predict runs/voc-92/last.pt a.jpg  mask and overlay of any image

The method is in sections 2 to 6 (networks), 8 (losses) and in `training_step` of section 10; all
else makes a program of it: data, evaluation, runs, files, command line. Sections 2, 4, 5, 6 and 8
say what their idea buys: test mIoU on the toy world with 8 masks, mean of 5 seeds.

Letters for shapes, in every comment: B images, N classes, K concepts, H x W image, P patch side,
gh x gw patches (H/P, W/P rounded up), T = 1 + gh*gw tokens, D width of the ViT, E width of CLIP's
joint space of images and text, C channels of one class's map (128). In prose x is the labelled
image; inside a module `x` is whatever features flow through it.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm


# 1. Settings: one flat Config, PRESETS for each data set, and the command line over both ----------
# Every setting is a field below, and an option of the command line. A preset changes some of the
# defaults for a data set, and what is typed changes them again. A checkpoint keeps the settings.
@dataclasses.dataclass
class Config:
    """The options: `vit_lr` is --vit-lr, `conf_thresh` is --conf. --help shows the comments."""

    dataset: str = "voc"  # toy, voc, coco, ade20k, cityscapes or FOLDER; no --dataset: toy
    labels: int = 92  # how many images are labelled; all others of train.txt are used without mask
    root: str = "data"  # folder in which the named data sets are kept
    crop: int = 512  # side of the training crop and of the test window, pixels
    fit: bool = True  # resize the short side to the crop (in training: to the crop times the scale)
    scale_min: float = 0.5  # smallest factor of the random scale
    scale_max: float = 2.0  # largest factor of the random scale
    workers: int = 4  # processes that load images; 0: the training process itself
    clip: str = "ViT-B-16-quickgelu"  # a plain ViT CLIP of open_clip; toy; or local-dir:FOLDER
    clip_weights: str = "openai"  # a tag of open_clip's pretrained weights, FILE, or none: random
    authors_clip: bool = False  # CLIP as the authors have it: see DenseCLIP
    decoder: Literal["language", "vision"] = "language"  # vision: DeepLabV3+
    decoder_channels: int = 128  # C of the language decoder; all of its widths follow
    decoder_text: Literal["names", "mean"] = "names"  # text of a class: name, or mean of concepts
    definitions: bool = True  # use a class's concepts (section 2); off: its name instead
    finetune: Literal["spatial", "all", "none"] = "spatial"  # what trains in the ViT (section 4)
    conv_skip: bool = False  # take the shallow skip from a ResNet-101 stem (Cityscapes)
    unlabelled: bool = True  # use the unlabelled images
    conf_thresh: float = 0.95  # lowest confidence of a pseudo-label that is used
    weighting: Literal["pixel", "mean"] = "pixel"  # consistency_loss explains them
    guidance: float = 0.1  # weight of frozen CLIP's losses (section 8: lambda); falls to 0
    guidance_conf_thresh: float = 0.9  # lowest probability of frozen CLIP's labels
    ema: float = 0.996  # decay of the EMA teacher; 0: the student teaches itself
    steps: int = 0  # optimiser steps; 0: as many as --epochs has
    epochs: int = 80  # passes over the unlabelled images
    batch: int = 8  # labelled images per step, and as many unlabelled ones
    micro_batch: int = 2  # labelled images per forward, and 3 views of as many unlabelled ones
    lr: float = 1e-3  # learning rate of the decoder
    vit_lr: float = 1e-6  # learning rate of the ViT, and of the stem of conv_skip
    weight_decay: float = 0.01  # AdamW's, on everything that trains
    evals: int = 20  # evaluations during the run
    save_every: int = 250  # steps between two saves of last.pt
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16: autocast; auto: bf16 on CUDA only
    recompute: bool = False  # the decoder takes less memory and more time
    window_mode: Literal["logits", "probabilities"] = "logits"  # see window_starts
    stride: int = 0  # stride of the test window, pixels; 0: 5/6 of the crop
    out: str = ""  # folder for what is written; '': runs/DATASET-LABELS, numbered if taken
    seed: int = 0  # for the labelled draw, weights, order and augmentation
    device: str = "auto"  # auto, cuda, mps or cpu

    def __post_init__(self):
        low = dict.fromkeys("labels crop epochs batch micro_batch evals save_every".split(), 1)
        top = dict(ema=1, conf_thresh=1, guidance_conf_thresh=1, seed=9e9, scale_min=self.scale_max)
        for name, value in vars(self).items():
            if isinstance(value, (int, float)):
                in_range = low.get(name, 0) <= value <= top.get(name, math.inf)
                require(in_range, f"out of range: {option(name)} {value}")
        for name, kind in Config.__annotations__.items():
            if get_args(kind):
                require_one_of(option(name), getattr(self, name), *get_args(kind))
        require(self.batch % self.micro_batch == 0, "--micro-batch must divide --batch")
        require(self.stride <= self.crop, f"--stride {self.stride} is above --crop; 0 fits always")


# What each data set overrides. VOC and a FOLDER use the defaults.
PRESETS = {
    "toy": dict(
        dataset="toy",
        labels=8,
        crop=96,
        fit=False,
        scale_min=0.8,
        scale_max=1.25,
        workers=0,
        clip="toy",
        decoder_channels=32,
        conf_thresh=0.9,
        guidance=0.3,
        ema=0.98,
        steps=300,
        batch=2,
        lr=2e-3,
        vit_lr=1e-4,
        evals=2,
    ),
    "voc": {},
    "coco": dict(labels=232, fit=False, epochs=10, micro_batch=1, lr=4e-3, vit_lr=4e-7),
    "ade20k": dict(labels=158, epochs=40, micro_batch=1, lr=4e-3, vit_lr=4e-7),
    "cityscapes": dict(
        labels=100,
        fit=False,
        crop=801,
        stride=534,
        steps=240 * 349,  # 240 epochs of the 186-label split
        micro_batch=1,
        lr=5e-4,
        vit_lr=5e-6,
        conv_skip=True,
        decoder_text="mean",
        weighting="mean",
        window_mode="probabilities",
    ),
}
IGNORE = 255  # "no label" in masks


class UserError(ValueError):
    """A mistake in settings or files. `main` prints it as one line and no traceback."""


def require(condition, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_one_of(name: str, value, *allowed) -> None:
    """Raises UserError if the value is none of those that are allowed."""
    require(value in allowed, f"{name} {value!r}: take {' or '.join(allowed)}")


def option(name: str) -> str:
    """The option that sets a field of Config."""
    return "--" + name.removesuffix("_thresh").replace("_", "-")


@contextlib.contextmanager
def blame(what):
    """Turns any error of its block into a UserError that begins with `what`, mostly a file."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):  # the file is not to blame
        raise
    except pickle.UnpicklingError:  # torch would advise to load it all the same
        raise UserError(f"{what}: holds code, or was not written by torch.save") from None
    except KeyError as error:
        raise UserError(f"{what}: has no {error}") from None
    except Exception as error:  # PIL, json, torch and the network all raise what they like
        if str(error).startswith("DataLoader worker"):  # main explains it
            raise
        reason = (getattr(error, "strerror", None) or "").lower() or str(error) or repr(error)
        raise UserError(f"{what}: {' '.join(reason.split())[:300]}") from None


# This process, and how many there are (torchrun says so).
RANK, WORLD = 0, 1
if dist.is_available() and dist.is_torchelastic_launched():
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
progress = partial(tqdm, disable=True if RANK else None, leave=False)  # None: only on a terminal


def say(text: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    if RANK == 0:
        tqdm.write(text)


# 2. Language (paper: Class Definition Guidance): what is a class called, what does it look like? --
# A class name alone can be a poor prompt: hardly any caption on the web says "background". So a
# class is defined by a list of concepts, and frozen CLIP gives a pixel the class of the concept
# that fits best. The decoder reads one vector per class: the embedding of its name, or (Cityscapes)
# the mean of its concepts. The decoder is trained, so a poor name costs it less.
# On COCO and ADE20K a class's only concept is its name.
# It buys: 66.5 with definitions, 59.5 with names only. Frozen CLIP itself: 50.7 with, 27.1 without.
CONCEPTS = {  # data set -> class -> its concepts; misspellings ("wolve") are as published
    "voc": {
        "background": (
            "background|bed|building|cabinet|ceiling|curtain|door|fence|floor|grass|ground|"
            "mountain|road|rock|shelves|sidewalk|sky|snow|tree|wall|water|window|hang glider|"
            "helicopter|jet ski|go-cart|tractor|emergency vehicle|lorry|truck|lion|stool|bench|"
            "wheelchair|coffee table|desk|side table|picnic bench|wolve|flowers in a vase|goat|"
            "tram|laptop|advertising display|vehicle interior"
        ),
        "aeroplane": "aeroplane|airplane|glider",
        "bicycle": "bicycle|tricycle|unicycle",
        "bird": "bird",
        "boat": "boat|ship|rowing boat|pedalo",
        "bottle": "bottle|plastic bottle|glass bottle|feeding bottle",
        "bus": "bus|minibus",
        "car": "car|van|large family car|realistic toy car",
        "cat": "cat|domestic cat",
        "chair": "chair|armchair|deckchair",
        "cow": "cow",
        "diningtable": "dining table|table for eating at",
        "dog": "dog|domestic dog",
        "horse": "horse|pony|donkey|mule",
        "motorbike": "motorbike|moped|scooter|sidecar",
        "person": "person|people|baby|face",
        "pottedplant": "potted plant|indoor plant in a pot|outdoor plant in a pot",
        "sheep": "sheep",
        "sofa": "sofa",
        "train": "train|train carriage",
        "tvmonitor": "tv|monitor|standalone screen",
    },
    "cityscapes": {
        "road": "road|street|parking space",
        "sidewalk": "sidewalk",
        "building": "building|skyscaper|house|bus stop building|garage|car port|scaffolding",
        "wall": "individual standing wall, which is not part of a building",
        "fence": "fence|hole in fence",
        "pole": "pole|sign pole|traffic light pole",
        "traffic light": "traffic light",
        "traffic sign": "traffic sign|parking sign|direction sign",
        "vegetation": "vegetation|tree|hedge",
        "terrain": "terrain|grass|soil|sand",
        "sky": "sky",
        "person": (
            "person|pedestrian|walking person|standing person|person sitting on the ground|"
            "person sitting on a bench|person sitting on a chair"
        ),
        "rider": "rider|cyclist|motorcyclist",
        "car": "car|jeep|SUV|van",
        "truck": "truck|box truck|pickup truck|truck trailer",
        "bus": "bus",
        "train": "train|tram",
        "motorcycle": "motorcycle|moped|scooter",
        "bicycle": "bicycle",
    },
}
DEFINITIONS = {
    dataset: {name: text.split("|") for name, text in concepts.items()}
    for dataset, concepts in CONCEPTS.items()
}


@torch.no_grad()
def encode_text(clip: open_clip.CLIP, words: list[str]) -> torch.Tensor:
    """Text embeddings of "a photo of a WORD", [len(words), E], not normalised. Sets clip.eval()."""
    spoken = [word.replace("_", " ").strip() for word in words]  # traffic_light, _background_
    tokens = open_clip.tokenize([f"a photo of a {word}" for word in spoken], clip.context_length)
    return clip.eval().encode_text(tokens.to(clip.token_embedding.weight.device)).float()


class Words(NamedTuple):
    """What CLIP's text tower makes of the classes; vectors are L2-normalised."""

    text: torch.Tensor  # [N, E], what the decoder reads
    names: torch.Tensor  # [N, E], of the class names
    concepts: torch.Tensor  # [K, E], class after class
    sizes: list[int]  # how many concepts each class has


def describe_classes(clip, classes: dict[str, list], *, decoder_text="names", definitions=True):
    """classes: name -> concepts (without `definitions`: the name alone) -> Words. decoder_text:
    whether the decoder reads the "names", or the "mean" of each class's concepts."""
    require_one_of("decoder_text", decoder_text, "names", "mean")
    names = encode_text(clip, list(classes))
    groups = list(classes.values()) if definitions else [[name] for name in classes]
    sizes = [len(group) for group in groups]
    concepts = encode_text(clip, sum(groups, []))
    text = names
    if decoder_text == "mean":  # the mean is taken BEFORE normalising, as the authors do
        text = torch.stack([group.mean(0) for group in concepts.split(sizes)])
    text, names, concepts = (F.normalize(vectors, dim=-1) for vectors in (text, names, concepts))
    return Words(text, names, concepts, sizes)


# 3. Dense CLIP (paper: Vision-Language Pre-training): how do we get an embedding for every patch? -
# CLIP's image embedding is read from the class token. In the last block, attention takes a weighted
# mean of all tokens' VALUE vectors for it; a projection and the MLP follow, and the result was
# aligned with text. MaskCLIP (Zhou et al., ECCV 2022) found that a single patch's own value vector,
# through the same projection and MLP, lies close to the text of what the patch shows. This "value
# path" replaces attention by the token's own value; the context that this one block would have
# added is lost.
# The decoder also needs to know where things end. Two skip maps (shallow: of block 0, deep: of
# block 4 of 12) tell it: so early, a patch still describes its own pixels. The authors use value
# paths for these, too, and give no reason; our guess: attention would blur the maps further.
class LeanQuickGELU(nn.Module):
    """x sigmoid(1.702 x), as silu(1.702 x) / 1.702: the backward pass keeps one tensor, not two,
    which saves 8 % of the memory of a VOC step."""

    def forward(self, x):
        return F.silu(1.702 * x).mul_(1 / 1.702)


def value_path(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A block of open_clip's ViT on tokens [B, T, D], each of which attends to itself alone."""
    attn, D = block.attn, x.shape[-1]
    y = F.linear(block.ln_1(x), attn.in_proj_weight[2 * D :], attn.in_proj_bias[2 * D :])  # values
    x = x + block.ls_1(attn.out_proj(y))  # ls: layer scale
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def resize_position(position: torch.Tensor, old: tuple, new: tuple) -> torch.Tensor:
    """Position embedding [1 + old_h * old_w, D] -> [1 + new_h * new_w, D], bicubic.
    No antialiasing: the authors' weights were trained with exactly this interpolation."""
    if old == new:
        return position
    grid = position[1:].T.reshape(1, -1, *old)  # [1, D, old_h, old_w]
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([position[:1], grid[0].flatten(1).T])


class DenseCLIP(nn.Module):
    """The visual tower of a plain open_clip ViT (else UserError), as an encoder of patches.
    visual: `open_clip.create_model(...).visual`, kept and modified: a second DenseCLIP of it would
    share its weights. grid: (gh, gw) at which the position embedding trains; other image sizes
    interpolate from it. authors: exact GELU and LayerNorm eps 1e-6, with which the authors tuned
    OpenAI's weights; OpenAI had QuickGELU and 1e-5. mean, std: of colours, by default CLIP's."""

    def __init__(self, visual, grid=None, authors=False, mean=None, std=None):
        super().__init__()
        parts = open_clip.transformer
        plain = (
            isinstance(visual, parts.VisionTransformer)
            and not visual.attn_pool
            and not visual.final_ln_after_pool
            and len(visual.transformer.resblocks) > 1
            and len(visual.positional_embedding) == 1 + math.prod(visual.grid_size)
            and {type(block) for block in visual.transformer.resblocks}
            == {parts.ResidualAttentionBlock}
        )
        require(plain, "DenseCLIP needs a plain ViT of two blocks or more, fresh from create_model")
        self.visual, self.patch = visual, visual.conv1.kernel_size[0]
        self.skip_blocks = (0, len(visual.transformer.resblocks) // 3)  # 0 and 4 of 12
        self.width, self.embed_dim = visual.proj.shape
        self.grid = grid or visual.grid_size
        position = resize_position(visual.positional_embedding, visual.grid_size, self.grid)
        visual.positional_embedding = nn.Parameter(position.detach())
        for module in visual.modules():
            if authors and isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
            if isinstance(getattr(module, "gelu", None), parts.QuickGELU):
                module.gelu = nn.GELU() if authors else LeanQuickGELU()
        mean = mean or getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
        std = std or getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor):
        """Images [B, 3, H, W] in [0, 1] -> dense embedding [B, E, gh, gw], L2-normalised over E,
        and the skip maps (shallow, deep), [B, D, gh, gw] each."""
        vit, P, (H, W) = self.visual, self.patch, images.shape[-2:]
        x = vit.conv1(F.pad((images - self.mean) / self.std, (0, -W % P, 0, -H % P)))
        B, _, gh, gw = x.shape  # [B, D, gh, gw], of the image padded to whole patches
        x = x.flatten(2).transpose(1, 2)  # [B, gh*gw, D]
        x = torch.cat([vit.class_embedding.to(x.dtype).expand(B, 1, -1), x], dim=1)  # [B, T, D]
        position = resize_position(vit.positional_embedding, self.grid, (gh, gw))
        x = vit.ln_pre(x + position.to(x.dtype))

        def to_map(tokens):  # [B, T, .] -> [B, ., gh, gw]; the class token is dropped
            return tokens[:, 1:].transpose(1, 2).unflatten(2, (gh, gw))

        *blocks, last = vit.transformer.resblocks
        maps = {}
        for i, block in enumerate(blocks):
            if i in self.skip_blocks:  # a side branch; the block itself follows
                maps[i] = to_map(value_path(block, x))  # [B, D, gh, gw]
            x = block(x)  # [B, T, D]
        dense = to_map(vit.ln_post(value_path(last, x)) @ vit.proj)  # [B, E, gh, gw]
        return F.normalize(dense, dim=1), [maps[i] for i in self.skip_blocks]


# 4. Spatial fine-tuning: which weights may learn without making CLIP forget? ----------------------
# CLIP has learned from whole images, so it is poor at saying where things are. Attention and the
# position embedding decide that, so they train. MLPs are thought to store knowledge, so they stay
# as they are, and with them norms, class token, patch convolution and final projection.
# It buys nothing in the toy's short runs: 66.5 with it, 66.8 if all trains, 66.0 if nothing does.
def spatial_fine_tuning(clip: DenseCLIP, mode: str = "spatial") -> DenseCLIP:
    """Sets what trains in the ViT: "spatial" (29.1 of 86.8 million parameters of ViT-B/16 at crop
    512), "all" or "none". To be called before `make_optimizer` and `frozen_copy`."""
    require_one_of("mode", mode, "spatial", "all", "none")
    for name, tensor in clip.named_parameters():
        spatial = ".attn." in name or name.endswith("positional_embedding")
        tensor.requires_grad_(mode == "all" or (mode == "spatial" and spatial))
    return clip


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode that gets no gradients."""
    return copy.deepcopy(module).requires_grad_(False).eval()


# 5. Decoders (paper: Language-Guided Decoder): how does "similar to this text" become a mask? -----
# A usual decoder ends in N filters, each learned from the few masks that show its class. Here the
# decoder's batch has B*N items, one per image and class: a map of one channel, the similarity of
# every patch to the class's text. The same weights clean up the map of any class, so they learn
# from all classes and work for any number of them. The price is N times the convolutions.
# It buys: 66.5 with it, 60.9 with DeepLabV3+. Both without frozen CLIP's losses: 62.7 and 42.0.
#     dense [B, E, gh, gw], text [N, E]
#     -> cosine_maps               [B, N, gh, gw]
#     -> spatial reasoning         [B, N, C, gh, gw]     within each class: 7 x 7 conv, ASPP
#     -> semantic reasoning, twice [B, N, C, gh, gw]     across classes, at each place
#     -> two UpStages, with skips  [B, N, C/4, 4gh, 4gw] within each class
#     -> head                      [B, N, 4gh, 4gw]      logits
MAPS_AT_ONCE = 64  # `by_classes` runs about this many of the B*N maps at a time, to save memory


def cosine_maps(dense: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of places and texts: dense [B, E, gh, gw], text [N, E] -> [B, N, gh, gw].
    Normalises both (feature dropout, section 6, changes lengths), in float32 even under autocast:
    bf16 rounds a cosine by up to 0.001, which FrozenGuidance's factor 100 turns into 0.1."""
    with torch.autocast(dense.device.type, enabled=False):
        dense, text = F.normalize(dense.float(), dim=1), F.normalize(text.float(), dim=1)
        return torch.einsum("behw,ne->bnhw", dense, text)


def conv_norm_relu(c_in, c_out, kernel, dilation=1, make_norm=None) -> nn.Sequential:
    """Convolution that keeps the size, norm, ReLU. make_norm: channels -> norm, by default
    GroupNorm of about 16 channels a group."""
    if make_norm:
        norm = make_norm(c_out)
    else:
        groups = math.gcd(max(1, c_out // 16), c_out)  # it has to divide c_out
        norm = nn.GroupNorm(groups, c_out)
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(c_in, c_out, kernel, padding=padding, dilation=dilation, bias=False)
    # ReLU may work in place: the backward pass of a norm needs its input, not its output.
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (DeepLab): one map seen at five fields of view, a branch of
    `width` channels each. [., c_in, gh, gw] -> [., c_out, gh, gw]."""

    def __init__(self, c_in: int, width: int, c_out: int, make_norm=None):
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_norm_relu(c_in, width, 1, 1, make_norm)]
            + [conv_norm_relu(c_in, width, 3, dilation, make_norm) for dilation in (6, 12, 18)]
        )
        self.pooled = conv_norm_relu(c_in, width, 1, 1, make_norm)
        self.project = conv_norm_relu(5 * width, c_out, 1, 1, make_norm)

    def forward(self, x):
        views = [branch(x) for branch in self.branches]  # [., width, gh, gw] each
        whole = self.pooled(x.mean((2, 3), keepdim=True))  # [., width, 1, 1], one for all places
        views.append(whole.expand_as(views[0]))
        return self.project(torch.cat(views, dim=1))


class SemanticReasoning(nn.Module):
    """Classes against each other: a transformer layer whose sequence is the N classes at a place.
    x [B, N, C, gh, gw], projected text [N, C] -> x's shape. A strong "cat" can weaken "boat".
    Text alone says which class an item is: classes of (nearly) equal text cannot be told apart."""

    def __init__(self, C: int):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            2 * C,
            nhead=4,
            dim_feedforward=4 * C,
            dropout=0.0,
            activation="gelu",
            norm_first=True,
            batch_first=True,
        )

    def forward(self, x, text):
        B, N, C, gh, gw = x.shape
        # Attention across classes needs no fine grid: it runs on means of 4 x 4 patches, ph x pw of
        # them (gh // 4 by gw // 4, at least 1). Patches left over are not read.
        pooled = F.avg_pool2d(x.flatten(0, 1), (min(4, gh), min(4, gw)))  # [B*N, C, ph, pw]
        ph, pw = pooled.shape[2:]
        by_place = pooled.unflatten(0, (B, N)).permute(0, 3, 4, 1, 2)  # [B, ph, pw, N, C]
        maps = by_place.flatten(0, 2)  # [B*ph*pw, N, C]: N tokens at each place
        words = text.expand(len(maps), -1, -1)  # [B*ph*pw, N, C]
        # The layer reads 2C channels, map and text; of what it returns the map's half is kept.
        attended = self.layer(torch.cat([maps, words], dim=2))[..., :C]  # [B*ph*pw, N, C]
        by_class = attended.unflatten(0, (B, ph, pw)).permute(0, 3, 4, 1, 2)  # [B, N, C, ph, pw]
        coarse = by_class.flatten(0, 1)  # [B*N, C, ph, pw]
        refined = F.interpolate(coarse, (gh, gw), mode="bilinear", align_corners=True)
        return x + refined.unflatten(0, (B, N))  # second residual: the layer has its own


class UpStage(nn.Module):
    """Upsamples to c_in - c_skip channels, joins a skip that all classes share by two convolutions:
    x [B*N, c_in, a, b], skip [B, c_skip, ., .] -> [B*N, c_out, 2a, 2b]."""

    def __init__(self, c_in: int, c_skip: int, c_out: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_in - c_skip, 2, stride=2)
        self.conv = nn.Sequential(*conv_norm_relu(c_in, c_out, 3), *conv_norm_relu(c_out, c_out, 3))

    def forward(self, x, skip):
        up = self.up(x)  # [B*N, c_in - c_skip, 2a, 2b]
        skip = F.interpolate(skip, up.shape[2:], mode="bilinear", align_corners=True)  # 2a x 2b
        # This is self.conv(torch.cat([up, skip of the image], dim=1)). A convolution of joined maps
        # is the sum of their convolutions, so the skip is convolved once, and not for each class.
        conv1, norm1, relu1 = self.conv[:3]
        weight_up, weight_skip = conv1.weight.split([up.shape[1], skip.shape[1]], dim=1)
        up = F.conv2d(up, weight_up, padding=1)  # [B*N, c_out, 2a, 2b]
        skip = F.conv2d(skip, weight_skip, padding=1)  # [B, c_out, 2a, 2b]
        joined = up.unflatten(0, (len(skip), -1)) + skip.unsqueeze(1)  # [B, N, c_out, 2a, 2b]
        features = relu1(norm1(joined.flatten(0, 1)))  # [B*N, c_out, 2a, 2b]
        return self.conv[3:](features)  # the second convolution


class LanguageGuidedDecoder(nn.Module):
    """Similarity maps -> spatial reasoning -> semantic reasoning -> upsampling.
    embed_dim: E. shallow_dim, deep_dim: channels of the skips. channels: C, UserError unless it is
    a multiple of 8. shallow_width: channels of the shallow skip once projected, by default C/8.
    recompute: less memory, more time in training (see `by_classes`)."""

    def __init__(
        self, embed_dim, shallow_dim, deep_dim, channels=128, shallow_width=None, recompute=False
    ):
        super().__init__()
        require(channels > 0 and channels % 8 == 0, "decoder channels: take a multiple of 8")
        self.recompute = recompute
        C = channels
        shallow_width = shallow_width or C // 8
        self.lift = nn.Conv2d(1, C, 7, padding=3)
        self.aspp = ASPP(C, C, C)
        self.text_proj = nn.Sequential(nn.Linear(embed_dim, C), nn.ReLU())
        self.semantic = nn.ModuleList([SemanticReasoning(C), SemanticReasoning(C)])
        self.deep_proj = nn.Sequential(nn.Conv2d(deep_dim, C // 4, 3, padding=1), nn.ReLU())
        self.shallow_proj = nn.Sequential(
            nn.Conv2d(shallow_dim, shallow_width, 3, padding=1), nn.ReLU()
        )
        self.up1 = UpStage(C, C // 4, C // 2)
        self.up2 = UpStage(C // 2, shallow_width, C // 4)
        self.head = nn.Conv2d(C // 4, 1, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # in which these convolutions are faster

    def spatial_reasoning(self, similarity):
        """Within each class: [B, N, gh, gw] -> [B, N, C, gh, gw]."""
        x = self.lift(similarity.flatten(0, 1).unsqueeze(1))  # [B*N, 1, gh, gw] -> [B*N, C, gh, gw]
        return (x + self.aspp(x)).unflatten(0, similarity.shape[:2])

    def semantic_reasoning(self, x, text):
        """Across classes, all at once: x [B, N, C, gh, gw], text [N, E] -> [B, N, C, gh, gw]."""
        text = self.text_proj(F.normalize(text, dim=1))  # [N, C]
        return self.semantic[1](self.semantic[0](x, text), text)

    def upsampling(self, x, shallow, deep):
        """Within each class: x [B, N, C, gh, gw], skips -> logits [B, N, 4gh, 4gw]."""
        maps = self.up2(self.up1(x.flatten(0, 1), deep), shallow)  # [B*N, C/4, 4gh, 4gw]
        return self.head(maps).view(*x.shape[:2], *maps.shape[2:])

    def by_classes(self, function, x, *shared):
        """function(x, *shared) on a few classes of x [B, N, ...] at a time. This saves memory in
        evaluation; in training only with `recompute`, by which backward repeats each forward."""
        if self.recompute and torch.is_grad_enabled():
            function = partial(torch.utils.checkpoint.checkpoint, function, use_reentrant=False)
        parts = x.split(max(1, MAPS_AT_ONCE // len(x)), dim=1)
        return torch.cat([function(part, *shared) for part in parts], dim=1)

    def forward(self, dense, skips, text):
        """dense [B, E, gh, gw], skips (shallow, deep), text [N, E] -> logits [B, N, 4gh, 4gw]."""
        x = self.by_classes(self.spatial_reasoning, cosine_maps(dense, text))
        x = self.semantic_reasoning(x, text)
        shallow, deep = self.shallow_proj(skips[0]), self.deep_proj(skips[1])  # projected
        return self.by_classes(self.upsampling, x, shallow, deep)


class VisionDecoder(nn.Module):
    """The baseline without language: DeepLabV3+ at patch resolution on the same ViT.
    Logits [B, N, gh, gw]; text and shallow skip are ignored. Batch norm: to train it, B > 1."""

    def __init__(self, embed_dim: int, skip_dim: int, num_classes: int, width: int = 64):
        super().__init__()
        layer = partial(conv_norm_relu, make_norm=nn.BatchNorm2d)
        self.aspp = ASPP(embed_dim, width, width, nn.BatchNorm2d)
        self.skip_proj = layer(skip_dim, 48, 1)
        self.fuse = nn.Sequential(layer(48 + width, 256, 3), layer(256, 256, 3))
        self.head = nn.Conv2d(256, num_classes, 1)

    def forward(self, dense, skips, text=None):
        x = torch.cat([self.skip_proj(skips[1]), self.aspp(dense)], dim=1)  # [B, 48+width, gh, gw]
        return self.head(self.fuse(x))


# 6. Three networks: student, frozen CLIP (paper: Dense CLIP Guidance), EMA teacher ----------------
# Who tells the student what to say where there is no mask? The teacher gets better, but it learns
# from the student, so it can confirm the student's mistakes. Frozen CLIP is coarse, but constant.
# Frozen CLIP buys 3.8: 66.5, without it 62.7. The EMA teacher (from UniMatch V2) buys nothing here.
class SemiVL(nn.Module):
    """Images -> logits: dense CLIP, an optional convolutional skip, a decoder.
    text: [N, E], one row per class. conv: images -> list whose last map [B, 256, H/4, W/4]
    replaces the shallow skip. Cityscapes uses it: a patch of 16 pixels loses poles and the like."""

    def __init__(self, clip: DenseCLIP, decoder: nn.Module, text: torch.Tensor, conv=None):
        super().__init__()
        self.clip, self.decoder, self.conv = clip, decoder, conv
        self.register_buffer("text", text)

    def forward(self, images: torch.Tensor, num_perturbed: int = 0) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1] -> logits [B, N, H, W].
        The last `num_perturbed` images of the batch get UniMatch's feature perturbation: each
        channel of the dense embedding and of the skip maps becomes 0 with p = 1/2, else doubles."""
        dense, (shallow, deep) = self.clip(images)
        shallow = self.conv(images)[-1] if self.conv else shallow
        if num_perturbed:
            n = len(images) - num_perturbed
            dense, shallow, deep = (
                torch.cat([f[:n], F.dropout2d(f[n:], 0.5)]) for f in (dense, shallow, deep)
            )
        logits = self.decoder(dense, (shallow, deep), self.text)  # [B, N, 4gh, 4gw]
        # Logits are those of the image padded to whole patches, squeezed to H x W: as published.
        return F.interpolate(logits.float(), images.shape[2:], mode="bilinear", align_corners=False)


class FrozenGuidance(nn.Module):
    """CLIP as it was before SemiVL's first step, as a zero-shot classifier of pixels.
    clip: `frozen_copy(student.clip)`, as nothing is frozen here. concepts: [K, E] of text,
    class after class. sizes: concepts per class. conf_thresh: labels below it become IGNORE."""

    def __init__(self, clip: DenseCLIP, concepts, sizes: list[int], conf_thresh: float = 0.9):
        super().__init__()
        self.clip, self.sizes, self.conf_thresh = clip, sizes, conf_thresh
        self.register_buffer("concepts", concepts)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1] -> zero-shot logits [B, N, H, W], 100 times a cosine."""
        dense, _ = self.clip(images)
        # A pixel belongs to a class if it shows ANY of its concepts, so the best one counts.
        groups = cosine_maps(dense, self.concepts).split(self.sizes, dim=1)  # N x [B, ., gh, gw]
        similarity = torch.stack([group.amax(1) for group in groups], dim=1)  # [B, N, gh, gw]
        similarity = F.interpolate(similarity, images.shape[2:], mode="bilinear")  # [B, N, H, W]
        return 100 * similarity  # logit scale of OpenAI's CLIP; without it softmax would be flat

    def labels(self, images: torch.Tensor) -> torch.Tensor:
        """Images -> int64 [B, H, W]: class, or IGNORE below conf_thresh, perhaps everywhere."""
        confidence, label = self(images).softmax(1).max(1)
        return label.masked_fill(confidence < self.conf_thresh, IGNORE)


class EMATeacher:
    """Mean teacher: `model` is an exponential moving average of the student; it labels weak views.
    Averaging smooths out the mistakes of single steps. The average is also what is evaluated and
    saved, as in UniMatch V2. With decay 0 it equals the student, but in eval mode."""

    def __init__(self, student: nn.Module, decay: float = 0.996):
        self.model, self.decay = frozen_copy(student), decay

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """teacher = decay * teacher + (1 - decay) * student, after optimiser step `step` (from 0).
        The decay grows from 0, so that the random decoder of the first steps is soon forgotten."""
        decay = min(1 - 1 / (step + 1), self.decay)
        for average, p in zip(self.model.parameters(), student.parameters(), strict=True):
            if p.requires_grad:
                average.lerp_(p, 1 - decay)
        for average, buffer in zip(self.model.buffers(), student.buffers(), strict=True):
            average.copy_(buffer)  # batch-norm statistics are moving averages already


# 7. Data: a folder of images; crops of them in weak and strong views (UniMatch's) -----------------
# Every data set, published or your own, is one canonical folder. data_prep.py makes it of what you
# have, and `python data_prep.py FOLDER` checks one that is written by hand:
#     FOLDER/dataset.json      {"classes": ["sky", "car"], "definitions": {"car": ["car", "van"]}};
#                              definitions are optional
#     FOLDER/splits/train.txt  an image per line: "IMAGE MASK", or "IMAGE" if it has no mask; a TAB
#                              between them if a name has blanks; paths are relative to FOLDER
#     FOLDER/splits/val.txt    "IMAGE MASK". Optional: test.txt; 8/labeled.txt, for --labels 8
# A mask is a PNG whose pixels are class numbers, 0 for the first of "classes", or 255: no label. It
# is as large as its upright image. An entry is the pair (image, mask or None) of a line.
#
# A labelled image gives a crop x of random scale, with its mask y. An unlabelled one gives a crop
# w, the weak view; s1 and s2 are w recoloured, nothing in them moves. So a label of a pixel in w
# is also the label of this pixel in s1 and s2, which is what section 8 needs.
def read_image(file: Path) -> torch.Tensor:
    """Any image file -> uint8 RGB [3, H, W], turned upright as its EXIF orientation says."""
    with blame(file), Image.open(file) as image:
        require(not image.mode.startswith(("I", "F")), f"mode {image.mode}; save it with 8 bits")
        image.load()  # PIL may report damage only once, and `suppress` would swallow that
        with contextlib.suppress(Exception):  # damaged EXIF data: the image stays as it is stored
            image = ImageOps.exif_transpose(image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read_mask(file: Path, num_classes: int) -> torch.Tensor:
    """A PNG of class numbers, palette or grey -> uint8 [H, W]; UserError for any other pixel."""
    with blame(file), Image.open(file) as image:
        # PIL stretches grey of 2 or 4 bits to 0 ... 255; such a file has a raw mode like "L;4".
        stretched = image.mode == "L" and image.tile[0][3] != "L"
        require(
            image.format == "PNG" and image.mode in ("P", "L", "I;16") and not stretched,
            f"{image.format} of mode {image.mode} is no PNG of class numbers with 8 bits; "
            "python data_prep.py FOLDER --images DIR --masks DIR makes them",
        )
        mask = np.array(image)
        wrong = mask[(mask >= num_classes) & (mask != IGNORE)]
        require(
            not len(wrong),
            f"{len(wrong)} pixels, the first of value {wrong[:1]}, are neither a class (0 to "
            f"{num_classes - 1}) nor 255, no label; python data_prep.py FOLDER tells more",
        )
        return torch.from_numpy(mask.astype(np.uint8))


def read_list(folder: Path, name: str, need_mask: bool) -> list[tuple]:
    """Lines of FOLDER/splits/NAME -> entries."""
    entries = []
    file = folder / "splits" / name
    with blame(file):
        # Windows writes a byte-order mark in front, and backslashes in paths.
        text = file.read_text("utf-8-sig").replace("\\", "/")
        for line in text.splitlines():
            words = line.split("\t") if "\t" in line else line.split()
            image, mask, *more = [word.strip() for word in words] + ["", ""]
            if not image and not mask:
                continue
            # No TAB, and the first word has no suffix: it is probably half of a name with a blank.
            torn = mask and "." not in image and "\t" not in line
            require(
                image and not any(more) and not torn and (mask or not need_mask),
                f"{line!r}: should be 'IMAGE MASK', with a TAB behind a name that has blanks",
            )
            entries.append((image, mask or None))
        require(entries, "no line in it")
    return entries


@dataclasses.dataclass
class Folder:
    """A data set on disk."""

    path: Path
    classes: dict[str, list[str]]  # name -> concepts, in the order of class numbers
    train: list[tuple]  # entries; the mask may be None
    val: list[tuple]  # entries
    test: list[tuple]  # entries; may be empty

    def lengths(self) -> list[int]:
        return [len(self.train), len(self.val), len(self.test)]

    def image(self, entry: tuple) -> torch.Tensor:
        return read_image(self.path / entry[0])

    def mask(self, entry: tuple) -> torch.Tensor:
        return read_mask(self.path / entry[1], len(self.classes))

    def pair(self, entry: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Image uint8 [3, H, W] and mask uint8 [H, W] of an entry."""
        image, mask = self.image(entry), self.mask(entry)
        height, width = image.shape[1:]
        require(
            mask.shape == (height, width),
            f"{self.path / entry[1]}: {mask.shape[1]} x {mask.shape[0]} pixels, but its image has "
            f"{width} x {height} upright",
        )
        return image, mask


def read_classes(file: Path) -> dict[str, list[str]]:
    """dataset.json -> class name -> concepts, in the order of class numbers."""
    with blame(f"{file} (of the folder that --dataset names)"):
        content = json.loads(file.read_text("utf-8-sig"))
        old = "colors" in content or content.get("ignore_index", IGNORE) != IGNORE
        require(
            not old,
            "'colors' and 'ignore_index' are no longer read; python data_prep.py "
            f"{file.parent} --convert turns the masks into class numbers",
        )
        names = content.get("classes")
        require(is_list_of_names(names), "'classes' should be a list of names")
        require(
            2 <= len(names) <= IGNORE, f"'classes' should have 2 to {IGNORE} names; add background"
        )
        require(len({*names}) == len(names), "'classes' has a name twice")
        definitions = content.get("definitions")
        if definitions is None:  # {} switches the built-in ones off
            built_in = [known for known in DEFINITIONS.values() if [*known] == names]
            definitions = built_in[0] if built_in else {}
        for name, concepts in definitions.items():
            require(name in names, f"'definitions' has {name!r}, which is no class")
            require(is_list_of_names(concepts), f"the definition of {name!r} should be a list")
        return {name: definitions.get(name, [name]) for name in names}


def is_list_of_names(value) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)


@contextlib.contextmanager
def from_data_prep(what: str):
    """The module data_prep, which `what` needs, and its refusals as ours."""
    try:
        import data_prep
    except ModuleNotFoundError as error:
        if error.name != "data_prep":
            raise
        raise UserError(f"{what}: data_prep.py, which makes it, is not beside semivl.py") from None
    try:
        yield data_prep
    except data_prep.UserError as error:
        raise UserError(str(error)) from None


def open_data(cfg: Config) -> Folder:
    """The folder behind --dataset; a named set is made if it is missing."""
    path = Path(cfg.root) / cfg.dataset if cfg.dataset in PRESETS else Path(cfg.dataset)
    if cfg.dataset in PRESETS and not path.exists():
        require(WORLD == 1, f"{path} is missing: first run python data_prep.py {cfg.dataset}")
        with from_data_prep(f"--dataset {cfg.dataset}") as data_prep:
            data_prep.prepare(cfg.dataset, cfg.root)
    classes = read_classes(path / "dataset.json")
    train, val = read_list(path, "train.txt", False), read_list(path, "val.txt", True)
    has_test = (path / "splits/test.txt").exists()
    test = read_list(path, "test.txt", True) if has_test else []
    return Folder(path, classes, train, val, test)


def draw_labelled(folder: Folder, count: int, seed: int) -> list[tuple]:
    """The labelled entries: those of splits/COUNT/labeled.txt, or `count` drawn from train.txt. A
    few images easily miss a class: of 100 draws the one whose masks show most classes is taken."""
    if (folder.path / f"splits/{count}/labeled.txt").exists():
        return read_list(folder.path, f"{count}/labeled.txt", True)
    masks = {image: mask for image, mask in folder.train if mask}  # each image once
    with_mask = [*masks.items()]
    listed = [file.parent.name for file in folder.path.glob("splits/*/labeled.txt")]
    listed = sorted(int(name) for name in listed if name.isdecimal())
    told = f"; there are lists for {', '.join(map(str, listed))}" if listed else ""
    require(
        count <= len(with_mask),
        f"--labels {count}: only {len(with_mask)} images of train.txt have masks{told}",
    )
    rng = np.random.default_rng(seed)
    shown = {}  # place in with_mask -> the classes of this mask
    best, most = [], -1
    for _ in progress(range(100), "look at masks"):
        draw = rng.choice(len(with_mask), count, replace=False).tolist()
        for i in draw:
            if i not in shown:
                shown[i] = {*folder.mask(with_mask[i]).unique().tolist()} - {IGNORE}
        classes = set().union(*(shown[i] for i in draw))
        if len(classes) > most:
            best, most = draw, len(classes)
    return [with_mask[i] for i in best]


def check_labelled(folder: Folder, labelled: list[tuple]) -> None:
    """Prints how many labelled pixels each class has. UserError if fewer than two classes do."""
    pixels = torch.zeros(IGNORE + 1, dtype=torch.long)
    for entry in progress(labelled, "look at labelled images"):
        _, mask = folder.pair(entry)
        pixels += mask.flatten().bincount(minlength=IGNORE + 1)
    say("labelled pixels:")
    for name, count in zip(
        [*folder.classes, "no label"], [*pixels[: len(folder.classes)], pixels[-1]]
    ):
        say(f"  {name:22}{count:>16,}")
    shown = pixels[: len(folder.classes)] > 0
    require(
        shown.sum() > 1,
        f"{folder.path}: the labelled masks show fewer than two classes; label more. Masks of 0 "
        "and 255 are converted by python data_prep.py FOLDER --images DIR --masks DIR",
    )
    both = {image for image, _ in labelled} & {image for image, _ in folder.val + folder.test}
    if both:
        say(f"note: {len(both)} labelled images are validation or test images, too: {min(both)}")


def scaled_size(height: int, width: int, scale: float) -> list[int]:
    """[height, width] times scale, rounded half up; not below one pixel."""
    return [max(1, int(n * scale + 0.5)) for n in (height, width)]


def random_size(height: int, width: int, cfg: Config) -> list[int]:
    """A random [height, width] of the same aspect. With `fit` and r uniform in [scale_min,
    scale_max]: long side at most 4 * crop * r, short side at most crop * r (in the paper 2048 r and
    512 r: 500 x 375 becomes 683 x 512 at r = 1). Without: long side times a uniform factor."""
    long, short = max(height, width), min(height, width)
    if cfg.fit:
        r = float(torch.empty(()).uniform_(cfg.scale_min, cfg.scale_max))
        scale = min(int(4 * cfg.crop * r) / long, int(cfg.crop * r) / short)
        return scaled_size(height, width, scale)
    low, high = int(cfg.scale_min * long), int(cfg.scale_max * long)
    return scaled_size(height, width, int(torch.randint(low, high + 1, ())) / long)


def scale_crop_flip(image: torch.Tensor, mask: torch.Tensor, cfg: Config):
    """Random scale, crop, flip: uint8 [3, ., .], [., .] -> [3, crop, crop], [crop, crop]. Before
    the flip a small image is padded at the right and bottom: black, IGNORE in the mask."""
    crop, size = cfg.crop, random_size(*mask.shape, cfg)
    image = VF.resize(image, size, antialias=True)
    # The authors use cv2's nearest with `fit`, PIL's without: they differ by half a pixel.
    nearest = v2.InterpolationMode.NEAREST if cfg.fit else v2.InterpolationMode.NEAREST_EXACT
    mask = VF.resize(mask[None], size, interpolation=nearest)
    pad = [0, 0, max(crop - size[1], 0), max(crop - size[0], 0)]  # left, top, right, bottom
    image, mask = VF.pad(image, pad, fill=0), VF.pad(mask, pad, fill=IGNORE)
    top, left = (int(torch.randint(n - crop + 1, ())) for n in image.shape[1:])
    image, mask = (VF.crop(t, top, left, crop, crop) for t in (image, mask))
    if torch.rand(()) < 0.5:
        image, mask = VF.horizontal_flip(image), VF.horizontal_flip(mask)
    return image, mask[0]


# uint8 [3, crop, crop] -> recoloured, perhaps blurred; nothing moves.
strong_view = v2.Compose(
    [
        v2.RandomApply(
            [v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25)], 0.8
        ),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], 0.5),
    ]
)
# To add a view, add an entry. Its function must not move pixels and not write to w. Its name must
# not be one that items or the log have already: x, y, w, fp, padding, files, total, kept, step, lr,
# seconds, val_miou.
STRONG_VIEWS = {"s1": strong_view, "s2": strong_view}


def cutmix_box(size: int) -> torch.Tensor:
    """A random box (top, left, bottom, right) in a crop of size x size; empty with p = 0.5."""
    if torch.rand(()) < 0.5:
        return torch.zeros(4, dtype=torch.long)
    area = float(torch.empty(()).uniform_(0.02, 0.4)) * size * size
    while True:  # the area stays: drawing it anew would favour small boxes
        ratio = float(torch.empty(()).uniform_(0.3, 1 / 0.3))
        width, height = int(math.sqrt(area / ratio)), int(math.sqrt(area * ratio))
        top, left = torch.randint(size, (2,)).tolist()
        if left + width <= size and top + height <= size:
            return torch.tensor([top, left, top + height, left + width])


def item_seed(seed: int, i: int) -> int:
    """What torch is seeded with before item i of a run with --seed."""
    return seed * 10**9 + i


def dropout_seed(seed: int, i: int) -> int:
    """The same before the feature dropout of a micro-batch that begins with item i."""
    return item_seed(seed, i) + 10**9 // 2


class TrainingSet(Dataset):
    """Item i of a run, counted over epochs: x, w, s1, s2 uint8 [3, crop, crop]; y uint8, padding
    bool [crop, crop]; s1_box, s2_box int64 [4]; files, a string. An item depends on (seed, i), so
    a run is the same with any number of workers, and a resumed run goes on as it would have."""

    def __init__(self, folder: Folder, labelled: list, unlabelled: list, cfg: Config):
        self.folder, self.labelled, self.unlabelled, self.cfg = folder, labelled, unlabelled, cfg
        self.views = dict(STRONG_VIEWS)

    def pick(self, entries: list, i: int) -> tuple:
        """Entry i of a list that is repeated without end and shuffled anew each time."""
        epoch, place = divmod(i, len(entries))
        of_labelled = entries is self.labelled  # its order is another one
        rng = np.random.default_rng((self.cfg.seed, of_labelled, epoch))
        return entries[rng.permutation(len(entries))[place]]

    def __getitem__(self, i: int) -> dict:
        folder, cfg = self.folder, self.cfg
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(item_seed(cfg.seed, i))
            entry = self.pick(self.labelled, i)
            x, y = scale_crop_flip(*folder.pair(entry), cfg)
            item = dict(x=x, y=y, files=entry[0])
            if self.unlabelled:
                entry = self.pick(self.unlabelled, i)
                image = folder.image(entry)
                marker = torch.zeros(image.shape[1:], dtype=torch.uint8)  # padding adds IGNORE
                w, marker = scale_crop_flip(image, marker, cfg)  # IGNORE where w is padded
                item |= dict(w=w, padding=marker == IGNORE, files=f"{item['files']} {entry[0]}")
                item |= {name: view(w) for name, view in self.views.items()}
                item |= {f"{name}_box": cutmix_box(cfg.crop) for name in self.views}
        return item


# 8. Consistency (UniMatch, Yang et al., CVPR 2023): what about an image without a mask? -----------
#     total = (L_x + mean(L_s) / 2 + L_fp / 2) / 2 + lambda (mean(G_s) + G_fp) / 2
# where the means are over the strong views s and lambda = --guidance * (1 - step/steps). So the
# weights are 1/2 for L_x, 1/8 each for L_s1 and L_s2, 1/4 for L_fp, and (SemiVL's part) lambda/4
# each for G_s1 and G_s2, lambda/2 for G_fp.
# L_x: cross-entropy with the mask. L_s, L_fp: with the teacher's pseudo-labels. G_s, G_fp: with
# frozen CLIP's labels. An image's mask does not depend on its colours. So the teacher labels w,
# and the student has to predict these labels in s1 and s2, which are recoloured and hold a box of
# another image with its labels, and in w with half of its feature channels off (fp: feature
# perturbation). The trap is confirmation bias: the student learns wrong labels, and the teacher
# follows. So unsure labels are dropped, and frozen CLIP, which does not follow, gives labels, too;
# as their borders are coarse, lambda falls.
# On the toy world L_s and L_fp cost 2.3 (68.8 without them, but with G_s and G_fp). The clutter in
# its scenes teaches that an unknown thing is background, and pseudo-labels repeat it confidently.
class Targets(NamedTuple):
    """The targets of unlabelled images, per pixel; all [B, H, W]."""

    label: torch.Tensor  # int64, the teacher's pseudo-label
    confidence: torch.Tensor  # float32, its probability
    padding: torch.Tensor  # bool, True where the crop holds no image
    clip_label: torch.Tensor  # int64, frozen CLIP's label, or IGNORE


@torch.no_grad()
def make_targets(teacher, guidance, w, padding) -> Targets:
    """Pseudo-labels and guidance labels (no `guidance`: all IGNORE) of weak views w [B, 3, H, W] in
    [0, 1]; padding: bool [B, H, W], True where the crop holds no image."""
    confidence, label = teacher(w).softmax(1).max(1)
    clip_label = guidance.labels(w) if guidance else torch.full_like(label, IGNORE)
    return Targets(label, confidence, padding, clip_label.masked_fill(padding, IGNORE))


def cutmix(own: torch.Tensor, partner: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Pastes into each item the part of its partner inside the item's box (CutMix, Yun et al.,
    ICCV 2019). own, partner: [B, H, W] or [B, 3, H, W]; box: [B, 4], top, left, bottom, right."""
    rows = torch.arange(own.shape[-2], device=own.device)[:, None]
    cols = torch.arange(own.shape[-1], device=own.device)
    top, left, bottom, right = box.view(-1, 4, 1, 1).unbind(1)  # each [B, 1, 1]
    inside = (rows >= top) & (rows < bottom) & (cols >= left) & (cols < right)  # [B, H, W]
    return torch.where(inside if own.ndim == 3 else inside.unsqueeze(1), partner, own)


def supervised_loss(logits, y):
    """Cross-entropy of logits [B, N, H, W] and masks y, int64 [B, H, W]; mean over known pixels."""
    loss = F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="sum")
    return loss / (y != IGNORE).sum().clamp(min=1)  # 0 if no pixel is known


def consistency_loss(logits, label, confidence, padding, conf_thresh=0.95, weighting="pixel"):
    """Cross-entropy with pseudo-labels: sum of weight * loss over non-padding pixels, divided by
    their number (not by the weights' sum, so an image with few confident pixels counts less).
    logits [B, N, H, W]; label (int64), confidence, padding (bool) [B, H, W]. Weights: "pixel", 1
    where confidence reaches conf_thresh, else 0; "mean", the (mixed) image's mean confidence."""
    require_one_of("weighting", weighting, "pixel", "mean")
    valid = ~padding
    loss = F.cross_entropy(logits, label, reduction="none")  # [B, H, W]
    if weighting == "pixel":
        weight = (confidence >= conf_thresh).float()  # [B, H, W]
    else:
        pixels = valid.sum((1, 2), keepdim=True).clamp(min=1)
        weight = (confidence * valid).sum((1, 2), keepdim=True) / pixels  # [B, 1, 1]
    return torch.where(valid, loss * weight, 0).sum() / valid.sum().clamp(min=1)


def guidance_loss(logits, clip_label):
    """Cross-entropy of logits [B, N, H, W] with frozen CLIP's labels [B, H, W]: sum over the
    pixels it labels / ALL pixels, padding too, as in the authors' code."""
    loss = F.cross_entropy(logits, clip_label, ignore_index=IGNORE, reduction="sum")
    return loss / clip_label.numel()


def semivl_loss(
    logits: dict,
    y,
    targets: dict,
    guidance_weight: float,
    conf_thresh: float = 0.95,
    weighting: str = "pixel",
) -> dict:
    """The formula above, as scalars: "x"; for each view "s1", "guidance_s1", ...; "total".
    logits: {"x": ..., "s1": ..., "s2": ..., "fp": ...}, [B, N, H, W] each. y: masks of x, int64 [B,
    H, W]. targets: view -> Targets, not for x; if {}, total is L_x. guidance_weight: lambda."""
    require_one_of("weighting", weighting, "pixel", "mean")
    losses = {"x": supervised_loss(logits["x"], y)}
    L_sum = G_sum = 0.0
    strong_views = [view for view in targets if view != "fp"]
    for view, t in targets.items():
        share = 0.5 if view == "fp" else 0.5 / len(strong_views)
        L = consistency_loss(logits[view], t.label, t.confidence, t.padding, conf_thresh, weighting)
        G = guidance_loss(logits[view], t.clip_label)
        losses |= {view: L, f"guidance_{view}": G}
        L_sum, G_sum = L_sum + share * L, G_sum + share * G
    total = (losses["x"] + L_sum) / 2 + guidance_weight * G_sum
    return losses | {"total": total if targets else losses["x"]}


# 9. Evaluation: how good is a model? Sliding window, one confusion matrix, mIoU -------------------
# A ViT works best at the size of its training. So a test image is covered by overlapping windows of
# that size, and where they overlap, their scores are averaged. mIoU is the mean over classes of
#     IoU = TP / (TP + FP + FN), counted in pixels over ALL images, not averaged over images.
def window_starts(size: int, window: int, stride: int, mode: str) -> list[int]:
    """Where windows start along a side of `size` pixels. The authors have two protocols. "logits":
    logits are averaged, and all windows are whole: the last one is moved back inside.
    "probabilities" (Cityscapes): these are averaged, and a window over the edge is cut short."""
    require_one_of("mode", mode, "logits", "probabilities")
    if mode == "probabilities":
        return list(range(0, size, stride))
    last = max(size - window, 0)
    return [min(i * stride, last) for i in range(math.ceil(last / stride) + 1)]


@torch.no_grad()
def sliding_window(model, images, window: int, stride: int, mode: str = "logits"):
    """Logits or probabilities [B, N, H, W] of the model (images -> logits), averaged over windows.
    images [B, 3, H, W]; window and stride in pixels, stride <= window."""
    require(stride <= window, f"stride {stride} is above the window's {window}: it leaves gaps")
    H, W = images.shape[2:]
    total, count = None, images.new_zeros(H, W)
    for top in window_starts(H, window, stride, mode):
        for left in window_starts(W, window, stride, mode):
            rows, columns = slice(top, top + window), slice(left, left + window)
            scores = model(images[..., rows, columns]).float()
            if mode == "probabilities":
                scores = scores.softmax(1)
            if total is None:  # only now is the number of classes known
                total = scores.new_zeros(*scores.shape[:2], H, W)
            total[..., rows, columns] += scores
            count[rows, columns] += 1
    return total / count


def window_scores(model, image: torch.Tensor, cfg: Config, device: torch.device) -> torch.Tensor:
    """The authors' test protocol: uint8 image [3, H, W] -> what `sliding_window` averages, [1, N,
    h, w]. With `fit` the short side h or w is the window's, else the image keeps its size. The
    model has to be in eval mode, as are the EMA teacher and what `load_checkpoint` returns."""
    H, W = image.shape[1:]
    if cfg.fit:  # the short side becomes as long as the window (less, if the image is a thin strip)
        scale = min(cfg.crop / min(H, W), 8 * cfg.crop / max(H, W))
        image = VF.resize(image, scaled_size(H, W, scale), antialias=True)
    images = image[None].to(device) / 255  # [1, 3, h, w]
    stride = cfg.stride or 5 * cfg.crop // 6
    with autocast(cfg, device):
        return sliding_window(model, images, cfg.crop, stride, cfg.window_mode)


def segment(model, image: torch.Tensor, cfg: Config, device: torch.device) -> torch.Tensor:
    """uint8 image [3, H, W] -> class numbers, uint8 [H, W]."""
    scores = window_scores(model, image, cfg, device)
    size = image.shape[1:]
    best = torch.full(size, -math.inf, device=device)
    label = torch.zeros(size, dtype=torch.uint8, device=device)
    for first in range(0, scores.shape[1], 8):  # all classes at full size would fill the memory
        # Aligned corners here, but not in SemiVL.forward: both as in the authors' code.
        group = scores[:, first : first + 8]
        group = F.interpolate(group, size, mode="bilinear", align_corners=True)[0]  # [8, H, W]
        score, index = group.max(0)
        label = torch.where(score > best, (first + index).byte(), label)
        best = best.maximum(score)
    return label


def confusion_matrix(prediction, target, classes: int) -> torch.Tensor:
    """Pixel counts [N, N], rows truth, columns prediction, of label maps; IGNORE is left out."""
    known = target != IGNORE
    truth, predicted = target[known].long(), prediction[known].long()
    return torch.bincount(classes * truth + predicted, minlength=classes**2).view(classes, classes)


def iou_per_class(matrix: torch.Tensor) -> torch.Tensor:
    """Confusion matrix [N, N] -> TP / (TP + FP + FN), percent [N]; NaN if a class never occurs."""
    hit = matrix.diag().double()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)  # 0 / 0 is NaN


def evaluate(model, folder: Folder, entries: list, cfg: Config, device, title="evaluate"):
    """IoU per class [N], percent, of a model (images in [0, 1] -> logits) over entries."""
    N = len(folder.classes)
    matrix = torch.zeros(N, N, dtype=torch.long, device=device)
    for entry in progress(entries[RANK::WORLD], title):  # this process's share
        image, mask = folder.pair(entry)
        matrix += confusion_matrix(segment(model, image, cfg, device), mask.to(device), N)
    return iou_per_class(sum_over_processes(matrix).cpu())


# 10. Training -------------------------------------------------------------------------------------
# `training_step` is the paper's figure as code; `train` is the loop around it. A run is
# reproducible: item i of the data depends on (seed, i) alone, and the feature dropout on the seed,
# the step and the place in the batch. So a run that was stopped goes on bit for bit as it would
# have gone on, with the same --micro-batch and processes (on a CPU; CUDA may add in another order).
#
# Under torchrun every process runs this file: item i goes to process i % WORLD, DDP
# averages the gradients, evaluation shares the images, and process 0 alone prints and writes.
def sum_over_processes(numbers: torch.Tensor) -> torch.Tensor:
    if WORLD > 1:
        dist.all_reduce(numbers)
    return numbers


def pick_device(name: str) -> torch.device:
    """For "auto" what torch finds (CUDA, MPS), else the CPU. Under torchrun each process takes the
    GPU of its LOCAL_RANK."""
    with blame(f"--device {name}"):
        found = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.device(found if name == "auto" else name)
        if WORLD > 1 and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)  # else this process would also open GPU 0
        elif WORLD > 1:
            device = torch.device("cpu")  # gloo, by which processes then talk, knows no other
        torch.zeros(1, device=device).cpu()  # a device that is not there is told here
    return device


def join_processes(device: torch.device) -> None:
    """Waits for the other processes of torchrun, if there are any."""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    """bf16 for matrix products; losses stay in float32, on CUDA softmax and norms do, too."""
    bf16 = cfg.precision == "bf16"
    if cfg.precision == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def learning_rate(base: float, step: int, steps: int) -> float:
    """DeepLab's polynomial decay. Steps 0 and 1 both run at the base rate, as published."""
    return base * (1 - max(step - 1, 0) / steps) ** 0.9


def make_optimizer(student: SemiVL, cfg: Config) -> torch.optim.AdamW:
    """AdamW with two rates: the decoder starts from nothing, the ViT must stay close to CLIP.
    Weight decay is on everything that trains, norms and biases too, as in the authors' code."""
    decoder = dict(params=[], lr=cfg.lr, base_lr=cfg.lr)
    vit = dict(params=[], lr=cfg.vit_lr, base_lr=cfg.vit_lr)
    for name, p in student.named_parameters():
        if p.requires_grad:
            group = decoder if name.startswith("decoder.") else vit
            group["params"].append(p)
    return torch.optim.AdamW([decoder, vit], weight_decay=cfg.weight_decay)


def set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(group["base_lr"], step, steps)


def training_step(student, teacher, guidance, batch: dict, cfg: Config, step: int) -> dict:
    """Forward and backward passes of optimiser step `step` (from 0) of cfg.steps: gradients are
    added to those of the student's parameters. Sets torch's seed, for feature dropout.
    student: SemiVL, perhaps in DistributedDataParallel. teacher: the model that labels. guidance:
    FrozenGuidance, or None. batch: stacked items of TrainingSet on one device, without "files".
    Returns the losses of `semivl_loss`, means over micro-batches, and "kept": the share of pixels
    that have a confident pseudo-label."""
    device, size = batch["x"].device, len(batch["x"])
    micro = math.gcd(cfg.micro_batch, size)  # divides this process's share of the batch
    chunks = [slice(start, start + micro) for start in range(0, size, micro)]
    images = {"x": batch["x"]}  # view -> uint8 [size, 3, crop, crop]
    targets = {}  # view -> Targets

    if cfg.unlabelled:
        # Teacher and frozen CLIP label the weak views.
        parts = []
        for chunk in chunks:
            with autocast(cfg, device):
                w = batch["w"][chunk] / 255
                parts.append(make_targets(teacher, guidance, w, batch["padding"][chunk]))
        own = Targets(*[torch.cat(field) for field in zip(*parts)])  # of w; [size, H, W] each

        # CutMix changes images and targets alike. Partners are this process's images in reverse
        # order (a middle image is not mixed).
        for view in STRONG_VIEWS:
            box = batch[f"{view}_box"]
            images[view] = cutmix(batch[view], batch[view].flip(0), box)
            targets[view] = Targets(*[cutmix(field, field.flip(0), box) for field in own])
        images["fp"] = batch["w"]  # last, so that it is perturbed below
        targets["fp"] = own

    # The student predicts all views of a micro-batch in one forward; losses; backward.
    losses = {}
    for chunk in chunks:
        # DDP averages gradients once per step; a student without DDP does not read this.
        student.require_backward_grad_sync = chunk is chunks[-1]
        first = step * cfg.batch + RANK * size + chunk.start
        torch.manual_seed(dropout_seed(cfg.seed, first))
        # x, s1, s2, fp, one after the other: [views * micro, 3, crop, crop]
        pixels = torch.cat([image[chunk] for image in images.values()]) / 255
        with autocast(cfg, device):
            logits = student(pixels, num_perturbed=micro if targets else 0)  # "fp" comes last
        logits_of = dict(zip(images, logits.split(micro)))  # view -> [micro, N, crop, crop]
        targets_of = {view: Targets(*[field[chunk] for field in targets[view]]) for view in targets}
        terms = semivl_loss(
            logits_of,
            batch["y"][chunk].long(),
            targets_of,
            guidance_weight=cfg.guidance * (1 - step / cfg.steps),
            conf_thresh=cfg.conf_thresh,
            weighting=cfg.weighting,
        )
        (terms["total"] / len(chunks)).backward()
        for name, loss in terms.items():
            losses[name] = losses.get(name, 0.0) + loss.detach() / len(chunks)

    if cfg.unlabelled:
        sure = (own.confidence >= cfg.conf_thresh) & ~own.padding
        losses["kept"] = sure.sum() / (~own.padding).sum().clamp(min=1)
    return losses


def check_out(cfg: Config) -> None:
    """Refuses an --out that is not empty. Process 0 alone looks, as it may have written there."""
    path = Path(cfg.out)
    if cfg.out and RANK == 0 and path.exists():
        require(path.is_dir() and not any(path.iterdir()), f"--out {cfg.out} is not empty")


def new_folder(cfg: Config) -> Path:
    """Makes the folder for what is written: --out, or the first of runs/DATASET-LABELS, -2, -3, ...
    that is free. Of two runs that start at once, one takes the next."""
    if cfg.out:
        check_out(cfg)  # again: another run may have started meanwhile
        path = Path(cfg.out)
        path.mkdir(parents=True, exist_ok=True)
        return path
    base = Path(f"runs/{Path(cfg.dataset).resolve().name}-{cfg.labels}")
    base.parent.mkdir(exist_ok=True)
    path, number = base, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = base.with_name(f"{base.name}-{number}")


class Run:
    """A run's folder: log.jsonl, best.pt with the teacher, last.pt with all that it takes to go on.
    Process 0 alone writes. modules: name in last.pt -> student, teacher ("model"), optimiser;
    facts: what else is saved."""

    def __init__(self, path: Path, modules: dict, facts: dict):
        self.path, self.modules, self.facts = path, modules, facts
        self.step = 0  # optimiser steps that are done
        self.last = self.best = -1.0  # validation mIoU
        self.log = None
        if RANK == 0:
            self.log = open(path / "log.jsonl", "a", 1, encoding="utf-8")  # noqa: SIM115
            self.lock()

    def lock(self) -> None:
        """Locks the log while it is open, so that no other process works in this folder."""
        try:
            import fcntl

            fcntl.lockf(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{self.path}: another process is at work in it") from None
        except (ImportError, OSError):  # Windows and some disks know no locks: go on without
            pass

    def load(self, saved: dict) -> None:
        self.step, self.last, self.best = saved["step"], saved["last"], saved["best"]
        with blame(self.path / "last.pt"):
            for name, module in self.modules.items():
                module.load_state_dict(saved[name])

    def save(self, name: str) -> None:
        """Writes last.pt or best.pt; the old file is replaced when the new one is complete."""
        if RANK > 0:
            return
        content = dict(step=self.step, last=self.last, best=self.best) | self.facts
        for key, module in self.modules.items():
            if key == "model" or name == "last.pt":
                content[key] = module.state_dict()
        with blame(f"{self.path / name} (make room; what was saved before is whole)"):
            torch.save(content, self.path / "new.tmp")
            (self.path / "new.tmp").replace(self.path / name)

    def write(self, **entries) -> None:
        """A line of the log."""
        if RANK == 0:
            self.log.write(json.dumps(dict(step=self.step) | entries) + "\n")

    def evaluated(self, iou: torch.Tensor) -> None:
        """Keeps the best; iou: per class, of the validation images."""
        self.last = float(iou.nanmean())
        self.write(val_miou=self.last)
        if self.last > self.best:
            self.best = self.last
            self.save("best.pt")


def choose_images(folder: Folder, cfg: Config, saved: dict | None) -> tuple[list, list]:
    """The labelled and unlabelled entries of a run. When a run is resumed, the folder must still
    have its classes and as many entries in each list."""
    if saved:
        same_classes = [*saved["classes"].items()] == [*folder.classes.items()]  # and their order
        require(
            same_classes and saved["lists"] == folder.lengths(),
            f"{folder.path}: its lists or classes changed since the run started",
        )
        labelled = saved["labelled"]
    else:
        labelled = draw_labelled(folder, cfg.labels, cfg.seed)
    taken = {image for image, _ in labelled}
    unlabelled = [(image, None) for image, _ in folder.train if image not in taken]
    require(unlabelled or not cfg.unlabelled, "no image is left unlabelled: add --unlabelled off")
    check_labelled(folder, labelled)
    return labelled, unlabelled


def check_batch(cfg: Config) -> None:
    """Refuses a batch that the processes cannot share, and says what a very small one loses."""
    require(cfg.batch % WORLD == 0, f"--batch {cfg.batch} cannot be shared by {WORLD} processes")
    share = cfg.batch // WORLD
    if cfg.decoder == "vision" and not cfg.unlabelled:
        require(
            math.gcd(cfg.micro_batch, share) > 1,
            "--decoder vision has batch norm, which cannot train on one image per forward: raise "
            + ("--batch" if share == 1 else "--micro-batch"),
        )
    if cfg.unlabelled and share == 1:
        say("note: each process has one unlabelled image a step: CutMix has no partner for it")


def train(cfg: Config, saved: dict | None = None) -> None:
    """A whole run. saved: what last.pt holds, to go on from there."""
    check_batch(cfg)
    device = pick_device(cfg.device)
    folder = open_data(cfg)
    join_processes(device)
    torch.manual_seed(cfg.seed)
    clip, clip_config = load_clip(cfg)  # its name may be wrong; looking at the images takes longer
    labelled, unlabelled = choose_images(folder, cfg, saved)
    # Without unlabelled images a run is as long as with them, so that the two can be compared.
    steps_per_epoch = max(1, len(unlabelled or labelled) // cfg.batch)
    cfg = dataclasses.replace(cfg, steps=cfg.steps or cfg.epochs * steps_per_epoch)

    # Networks. "CLIP by names" only serves to compare.
    words = describe_classes(
        clip, folder.classes, decoder_text=cfg.decoder_text, definitions=cfg.definitions
    )
    stem_weights = cfg.clip_weights != "none"
    student = build_model(cfg, clip.visual, words.text, stem_weights).to(device).train()
    del clip  # the text tower has done its work
    frozen = frozen_copy(student.clip)  # before training, and before a checkpoint is loaded
    guidance = FrozenGuidance(frozen, words.concepts, words.sizes, cfg.guidance_conf_thresh)
    guidance.to(device)
    names_only = FrozenGuidance(frozen, words.names, [1] * len(words.names)).to(device)
    ema = EMATeacher(student, cfg.ema)
    optimizer = make_optimizer(student, cfg)
    parallel = distribute(student)
    baselines = {"CLIP by names": names_only}
    if cfg.definitions and any(concepts != [name] for name, concepts in folder.classes.items()):
        baselines["CLIP by definitions"] = guidance
    compared = baselines | {"SemiVL" if cfg.unlabelled else "labels only": ema.model}

    # The run's folder.
    path = Path(cfg.out)
    if RANK == 0 and not saved:
        path = new_folder(cfg)
        lines = "".join(f"{image}\t{mask}\n" for image, mask in labelled)
        (path / "labeled.txt").write_text(lines, encoding="utf-8")
        (path / "semivl.py").write_bytes(Path(__file__).read_bytes())
    facts = dict(
        config=dataclasses.asdict(cfg),
        classes=folder.classes,
        clip=clip_config,
        labelled=labelled,
        lists=folder.lengths(),
    )
    run = Run(path, dict(student=student, model=ema.model, optimizer=optimizer), facts)
    if saved:
        run.load(saved)
    say(
        f"{len(labelled)} labelled, {len(unlabelled)} unlabelled, {len(folder.val)} validation, "
        f"{len(folder.test)} test images; {cfg.steps} steps on {device}; writes to {path}"
    )
    if run.step == 0:
        for name, model in baselines.items():
            miou = evaluate(model, folder, folder.val[:100], cfg, device).nanmean()
            say(f"frozen {name}: mIoU {miou:.1f} ({len(folder.val[:100])} validation images)")
    if run.step >= cfg.steps:
        say(f"the run has ended, after {run.step} steps; a larger --steps would go on")

    loader = DataLoader(
        TrainingSet(folder, labelled, unlabelled if cfg.unlabelled else [], cfg),
        cfg.batch // WORLD,
        num_workers=min(cfg.workers, os.cpu_count() or 1),
        sampler=range(run.step * cfg.batch + RANK, cfg.steps * cfg.batch, WORLD),
        pin_memory=device.type == "cuda",
    )
    clock = time.perf_counter()
    for batch in progress(loader, "train", total=cfg.steps, initial=run.step):
        files = batch.pop("files")
        batch = {name: t.to(device, non_blocking=True) for name, t in batch.items()}
        set_rates(optimizer, run.step, cfg.steps)
        losses = training_step(
            parallel, ema.model, guidance if cfg.guidance else None, batch, cfg, run.step
        )
        means = sum_over_processes(torch.stack([*losses.values()]) / WORLD).tolist()
        line = dict(zip(losses, means))
        require(  # before a weight changes
            math.isfinite(line["total"]),
            f"step {run.step + 1}: the loss is {line['total']}. "
            f"Lower --lr, or look at these files: {' '.join(files)}",
        )
        optimizer.step()
        optimizer.zero_grad()
        broadcast_buffers(student)
        ema.update(student, run.step)

        run.step += 1
        seconds = time.perf_counter() - clock
        run.write(**line, lr=[group["lr"] for group in optimizer.param_groups], seconds=seconds)
        evaluate_now = run.step % math.ceil(cfg.steps / cfg.evals) == 0 or run.step == cfg.steps
        if evaluate_now:
            run.evaluated(evaluate(ema.model, folder, folder.val, cfg, device))
            memory = ""
            if device.type == "cuda":
                memory = f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
            say(
                f"step {run.step}: loss {line['total']:.3f}, kept {line.get('kept', math.nan):.2f}"
                f", validation mIoU {run.last:.1f}, {seconds:.3g} s/step{memory}"
            )
            if RANK == 0:
                save_sheet(path / "sheet.png", folder, compared, cfg, device)
        if evaluate_now or run.step % cfg.save_every == 0:
            run.save("last.pt")
        clock = time.perf_counter()
    report(compared, folder, cfg, device, path, dict(val_last=run.last, val_best=run.best))


def distribute(student: nn.Module) -> nn.Module:
    """The same module, whose gradients are averaged over processes, if there are several."""
    if WORLD == 1:
        return student
    return nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)


def broadcast_buffers(student: nn.Module) -> None:
    """Batch-norm statistics: each process had its own; those of process 0 are taken."""
    if WORLD > 1:
        for buffer in student.buffers():
            dist.broadcast(buffer, 0)


def report(models: dict, folder: Folder, cfg: Config, device, out=None, scores=None) -> None:
    """Prints IoU per class on the test images (or else validation), and writes it with `scores`
    into OUT/result.json. models: title -> model."""
    split, entries = ("test", folder.test) if folder.test else ("val", folder.val)
    names = [*folder.classes, "mIoU"]
    table = {}
    for title, model in models.items():
        iou = evaluate(model, folder, entries, cfg, device, split)
        table[title] = [*iou.tolist(), float(iou.nanmean())]
    if out and RANK == 0:
        result = dict(scores or {})
        result[split] = {
            title: {name: None if math.isnan(v) else v for name, v in zip(names, values)}
            for title, values in table.items()
        }
        (out / "result.json").write_text(json.dumps(result), encoding="utf-8")
    wide = max(map(len, names)) + 2
    say(f"{f'IoU, {split}':{wide}}" + "".join(f"{title:>21}" for title in table))
    for row, name in enumerate(names):
        cells = "".join(f"{values[row]:21.1f}" for values in table.values())
        say(f"{name:{wide}}{cells}")


# 11. Weights: CLIP's, the authors', our checkpoints -----------------------------------------------
# Three kinds of files hold weights: CLIP's, which open_clip fetches or reads; the authors' trained
# models, whose tensors have other names; and last.pt or best.pt of a run of ours, which also hold
# the settings and class names, so that nothing needs to be typed again. A file can hold code, which
# unpickling would run: every one is read with weights_only, and every tensor has to fit.

# For the stem of conv_skip. With `authors_clip` and no conv_skip also for CLIP, as the authors do.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_clip(cfg: Config) -> tuple[open_clip.CLIP, dict]:
    """The CLIP of --clip and --clip-weights, and its config, of which open_clip.CLIP(**config)
    makes one with random weights."""
    name, weights = cfg.clip, cfg.clip_weights
    with blame(f"--clip {name} --clip-weights {weights}"):
        if name == "toy":
            with from_data_prep("--clip toy") as data_prep:
                config = data_prep.TOY_CLIP
                if weights != "none":
                    name = f"local-dir:{data_prep.prepare('toy', cfg.root)}"
        else:
            config = open_clip.get_model_config(name) or {"vision_cfg": {}}
        require(
            {*config} <= {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
            and isinstance(config["vision_cfg"].get("layers"), int)
            and "hf_tokenizer_name" not in config["text_cfg"],
            "no plain ViT CLIP of open_clip, such as ViT-B-16-quickgelu",
        )
        if weights == "none":
            return open_clip.CLIP(**config), config
        if ":" in name:
            require(weights == "openai", f"{name} has its own weights; drop --clip-weights")
            weights = None
        # The wrong GELU costs accuracy, and nothing else would tell.
        known = open_clip.get_pretrained_cfg(name, weights) or {}
        quick = config.get("quick_gelu", False)
        require(
            known.get("quick_gelu", quick) == quick,
            f"{weights} was trained with the other GELU; add or drop -quickgelu",
        )
        # A FILE is read by torch.load(weights_only=True), and all of its tensors have to fit.
        return open_clip.create_model(name, weights, require_pretrained=True), config


def resnet_stem(pretrained: bool) -> nn.Module:
    """Start of timm's resnet101c: images [B, 3, H, W] in [0, 1] -> [[B, 256, H/4, W/4]]."""
    import timm  # comes with open_clip

    with blame("resnet101c"):
        net = timm.create_model("resnet101c", pretrained, features_only=True, out_indices=(1,))
    return nn.Sequential(v2.Normalize(IMAGENET_MEAN, IMAGENET_STD), net)


def build_model(cfg: Config, visual: nn.Module, text: torch.Tensor, pretrained=False) -> SemiVL:
    """The model of the settings, around a visual tower and the classes' text [N, E]. pretrained:
    whether the stem of conv_skip gets timm's weights."""
    # Crop 801 gives 50 patches a side, although a padded crop has 51: as in the authors' weights.
    side = cfg.crop // visual.conv1.kernel_size[0]
    require(side, f"--crop {cfg.crop}: smaller than a patch of CLIP")
    statistics = (IMAGENET_MEAN, IMAGENET_STD) if cfg.authors_clip and not cfg.conv_skip else ()
    clip = DenseCLIP(visual, (side, side), cfg.authors_clip, *statistics)
    spatial_fine_tuning(clip, cfg.finetune)
    E, D, C = clip.embed_dim, clip.width, cfg.decoder_channels
    if cfg.decoder == "vision":  # reads no shallow skip
        return SemiVL(clip, VisionDecoder(E, D, len(text)), text)
    if cfg.conv_skip:
        decoder = LanguageGuidedDecoder(E, 256, D, C, C // 4, cfg.recompute)
        return SemiVL(clip, decoder, text, resnet_stem(pretrained))
    return SemiVL(clip, LanguageGuidedDecoder(E, D, D, C, C // 8, cfg.recompute), text)


AUTHORS_NAMES = [  # theirs, ours; replaced in this order
    ("module.", ""),
    ("decode_head.layers", "decoder.semantic"),
    ("decode_head.conv1", "decoder.lift"),
    ("transformer.ffn.layers.0.0", "layer.linear1"),
    ("transformer.ffn.layers.1", "layer.linear2"),
    ("transformer.attn.attn", "layer.self_attn"),
    ("transformer.ln", "layer.norm"),
    ("aspp_convs.4.gap.1", "pooled.0"),
    ("aspp_convs.4.gap.2", "pooled.1"),
    ("aspp_convs", "branches"),
    ("skip_proj.0", "deep_proj"),
    ("skip_proj.1", "shallow_proj"),
    ("decode_head", "decoder"),
    ("conv_encoder.stem.7", "conv.1.bn1"),
    ("conv_encoder.stem", "conv.1.conv1"),
    ("conv_encoder", "conv.1"),
    ("backbone.ln0", "clip.visual.ln_pre"),
    ("backbone.ln1", "clip.visual.ln_post"),
    ("backbone.cls_token", "clip.visual.class_embedding"),
    ("backbone.pos_embed", "clip.visual.positional_embedding"),
    ("backbone.proj.weight", "clip.visual.proj"),
    ("backbone.patch_embed.projection", "clip.visual.conv1"),
    ("backbone.layers", "clip.visual.transformer.resblocks"),
    ("attn.attn", "attn"),
    (".ln1", ".ln_1"),
    (".ln2", ".ln_2"),
    ("ffn.layers.0.0", "mlp.c_fc"),
    ("ffn.layers.1", "mlp.c_proj"),
]


def load_authors_checkpoint(state_dict: dict, text: torch.Tensor, heads=None) -> SemiVL:
    """The authors' weights, `load_file("best.pth")["model"]`, as a SemiVL in eval mode. text: [N,
    E], as `describe_classes` returns it (Cityscapes: decoder_text="mean")."""
    weights, vit = {}, "clip.visual."
    for name, tensor in state_dict.items():
        for theirs, ours in AUTHORS_NAMES:
            name = name.replace(theirs, ours)
        if not name.startswith("clip_encoder."):  # their frozen CLIP
            weights[name] = tensor
    weights[vit + "class_embedding"] = weights[vit + "class_embedding"].flatten()
    weights[vit + "positional_embedding"] = weights[vit + "positional_embedding"][0]
    weights[vit + "proj"] = weights[vit + "proj"].flatten(1).T  # was a 1 x 1 convolution
    width, _, patch, _ = weights[vit + "conv1.weight"].shape
    side = patch * math.isqrt(len(weights[vit + "positional_embedding"]) - 1)
    visual = open_clip.transformer.VisionTransformer(
        side,
        patch,
        width,
        layers=sum("mlp.c_fc.weight" in name for name in weights),
        heads=heads or width // 64,
        mlp_ratio=4.0,
        output_dim=weights[vit + "proj"].shape[1],
    )
    cfg = Config(crop=side, authors_clip=True, conv_skip="conv.1.bn1.weight" in weights)
    model = build_model(cfg, visual, F.normalize(text.float(), dim=1))
    for name in ("text", "clip.mean", "clip.std"):
        weights[name] = model.state_dict()[name]
    model.load_state_dict(weights)
    return model.eval()


def load_file(file, *needed: str) -> dict:
    """What torch.save wrote, with the entries `needed`, without running code that may be in it."""
    scalar = np.float64(0).__reduce__()[0]  # the authors' files hold scalars of numpy, old or new
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    numbers = [*names, np.dtype, np.dtypes.Float64DType]
    with blame(file), torch.serialization.safe_globals(numbers):
        content = torch.load(file, map_location="cpu", weights_only=True)
        require(
            isinstance(content, dict) and {*needed} <= {*content},
            "no checkpoint of this program (nor of the authors': load_authors_checkpoint)",
        )
        return content


def load_checkpoint(file: str, **changes) -> tuple[SemiVL, Config, dict]:
    """A checkpoint of this program -> model in eval mode, settings, class names and concepts."""
    content = load_file(file, "model", "config", "classes", "clip")
    with blame(file):
        cfg = Config(**content["config"] | dict(device="auto", out="") | changes)
        model = build_model(cfg, open_clip.CLIP(**content["clip"]).visual, content["model"]["text"])
        model.load_state_dict(content["model"])
    return model.eval(), cfg, content["classes"]


# 12. Pictures: masks in colours, the sheet of a run -----------------------------------------------
# Numbers hide mistakes that one picture shows: a mask that is not upright, a class that is never
# predicted, a threshold that no pixel reaches. So a run draws sheet.png at each evaluation.
def colour_mask(mask: torch.Tensor, classes) -> Image.Image:
    """Class numbers [H, W] -> palette image whose values are still the class numbers."""
    palette = [255] * 768  # three numbers each; IGNORE is white
    for n, name in enumerate(classes):
        hue = (7 + 222.5 * n) % 360  # steps of the golden ratio keep neighbours apart
        value = 70 if n // 8 % 2 else 90
        colour = "#4d525c" if name == "background" else f"hsv({hue}, 60%, {value}%)"
        palette[3 * n : 3 * n + 3] = ImageColor.getrgb(colour)
    image = Image.fromarray(mask.cpu().numpy().astype(np.uint8))
    image.putpalette(palette)
    return image


def save_sheet(file: Path, folder: Folder, models: dict, cfg: Config, device) -> None:
    """Up to four validation images, a row each: image, truth, what each model (title -> images to
    logits) predicts, and the last model's pseudo-labels, white below the threshold."""
    side, space = 192, 6
    titles = ["image", "truth", *models, "pseudo-labels"]
    entries = folder.val[:: math.ceil(len(folder.val) / 4)]
    top = (side + space) * len(entries) + 24  # of the legend
    columns = len(titles) * (side + space) // 140
    height = top + 20 * math.ceil(len(folder.classes) / columns)
    sheet = Image.new("RGB", (len(titles) * (side + space), height), "white")
    write = partial(ImageDraw.Draw(sheet).text, fill="black", font=ImageFont.load_default(14))
    for column, title in enumerate(titles):
        write((column * (side + space), 4), title)
    for row, entry in enumerate(entries):
        image, truth = folder.pair(entry)
        masks = [truth, *(segment(model, image, cfg, device) for model in models.values())]
        scores = window_scores([*models.values()][-1], image, cfg, device)
        if cfg.window_mode == "logits":
            scores = scores.softmax(1)
        confidence = F.interpolate(scores.amax(1, keepdim=True), image.shape[1:])[0, 0]  # [H, W]
        masks.append(masks[-1].masked_fill(confidence < cfg.conf_thresh, IGNORE))
        cells = [VF.to_pil_image(image)]
        cells += [colour_mask(mask, folder.classes).convert("RGB") for mask in masks]
        for column, cell in enumerate(cells):
            cell = ImageOps.pad(cell, (side, side), Image.Resampling.BOX, "white")
            sheet.paste(cell, (column * (side + space), 24 + row * (side + space)))
    for n, name in enumerate(folder.classes):
        x, y = n % columns * 140, top + n // columns * 20
        sheet.paste(colour_mask(torch.full((14, 14), n), folder.classes), (x, y))
        write((x + 20, y), name)
    sheet.save(file)


# 13. Command line ---------------------------------------------------------------------------------
# Four things can be done: train (the default), --resume a run, --eval and --predict with a
# checkpoint. A user's mistake ends in one line and exit code 2; a bug keeps its traceback.
def image_files(names: list[str]) -> list[Path]:
    """The files that are named, and the images in folders that are named."""
    files = []
    for path in map(Path, names):
        if not path.is_dir():
            files.append(path)
            continue
        found = [file for file in sorted(path.iterdir()) if file.name[0] != "."]
        known = Image.registered_extensions()
        found = [file for file in found if known.get(file.suffix.lower()) in Image.OPEN]
        ours = ("-mask.png", "-overlay.png")  # what --predict has written
        found = [file for file in found if not file.name.endswith(ours)]
        require(found, f"{path}: no image there")
        files += found
    return files


def predict(checkpoint: str, images: list[str], typed: dict) -> None:
    """--predict: NAME-mask.png (class numbers, in colours) and NAME-overlay.png of each image."""
    require(images, "--predict CKPT IMAGE ...: one of them is missing")
    files = image_files(images)
    model, cfg, classes = load_checkpoint(checkpoint, **typed)
    device = pick_device(cfg.device)
    model.to(device)
    out = Path(cfg.out or Path(checkpoint).parent / "predictions")
    out.mkdir(parents=True, exist_ok=True)
    problems = []
    for file in progress(files, "predict"):
        name, number = file.stem, 1
        while (out / f"{name}-mask.png").exists():  # nothing is overwritten
            number += 1
            name = f"{file.stem}-{number}"
        try:
            image = read_image(file)
        except UserError as error:  # the other images are predicted all the same
            problems.append(str(error))
            continue
        label = segment(model, image, cfg, device)
        mask = colour_mask(label, classes)
        overlay = Image.blend(VF.to_pil_image(image), mask.convert("RGB"), 0.55)
        overlay.save(out / f"{name}-overlay.png")
        mask.save(out / f"{name}-mask.png")
        shown = [[*classes][n] for n in label.unique()]
        say(f"{file} -> {out / name}-mask.png: {', '.join(shown)}")
    require(not problems, "\n".join(problems))


def parse_args(argv) -> tuple[argparse.Namespace, dict]:
    """The command line, and of it the fields of Config that were typed, with their values."""
    parser = argparse.ArgumentParser(usage="semivl.py [options; voc defaults]", allow_abbrev=False)
    source = Path(__file__).read_text("utf-8")
    comments = dict(re.findall(r"    (\w+): .*?  # (.*)", source))  # behind the fields of Config
    for name, kind in Config.__annotations__.items():
        default, choices = getattr(Config, name), get_args(kind) or None
        if kind is bool:
            default, choices = "on" if default else "off", ("on", "off")
        parser.add_argument(
            option(name),
            dest=name,
            type=kind if kind in (int, float) else str,
            choices=choices,
            help=f"{comments[name]} [{default}]",
        )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped")
    actions.add_argument("--eval", metavar="CKPT", help="IoU per class of a checkpoint")
    actions.add_argument("--predict", nargs="+", metavar=("CKPT", "IMAGE"), help="masks of images")
    args = parser.parse_args(argv)
    typed = {}
    for name, kind in Config.__annotations__.items():
        value = getattr(args, name)
        if value is not None:
            typed[name] = value == "on" if kind is bool else value
    return args, typed


def run_command(argv) -> None:
    """Does what the command line says."""
    args, typed = parse_args(argv)
    allowed = {"device", "dataset", "root", "workers"}  # when a checkpoint has the settings
    if args.resume is not None:  # on another machine, or for longer
        allowed |= {"steps", "micro_batch", "recompute", "clip_weights"}
    elif args.eval is not None or args.predict:
        allowed |= {"out", "stride"}
    else:
        allowed = {*Config.__annotations__}
    wrong = [option(name) for name in typed if name not in allowed]
    require(not wrong, f"not to be given here: {', '.join(wrong)}")

    if args.resume is not None:
        file = Path(args.resume) / "last.pt"
        require(file.is_file(), f"{args.resume}: not a run's folder with last.pt")
        needed = "model config classes student optimizer labelled lists step last best"
        saved = load_file(file, *needed.split())
        with blame(file):
            cfg = Config(**saved["config"] | typed | dict(out=args.resume))
        train(cfg, saved)
    elif args.eval is not None:
        model, cfg, classes = load_checkpoint(args.eval, **typed)
        check_out(cfg)
        folder, device = open_data(cfg), pick_device(cfg.device)
        join_processes(device)
        require([*folder.classes] == [*classes], f"{folder.path}: other classes")
        out = new_folder(cfg) if cfg.out and RANK == 0 else None
        report({"SemiVL": model.to(device)}, folder, cfg, device, out)
    elif args.predict:
        if RANK == 0:  # one process does all
            predict(args.predict[0], args.predict[1:], typed)
    else:
        preset = dict(PRESETS.get(typed.get("dataset", "toy"), {}))
        if "epochs" in typed:
            preset["steps"] = 0
        cfg = Config(**preset | typed)
        check_out(cfg)
        train(cfg)
    if WORLD > 1 and dist.is_initialized():  # not after an error: the others would wait for ever
        dist.destroy_process_group()


MEMORY = "out of memory; in training: --micro-batch 1, --recompute on; else a smaller image"


def main(argv=None) -> int:
    """Runs the command line; exit code 2 and one line for a user's mistake, 130 for Ctrl-C."""
    try:
        run_command(argv)
        return 0
    except KeyboardInterrupt:
        print(
            "semivl.py: interrupted; a run goes on from its last.pt by --resume RUN",
            file=sys.stderr,
        )
        return 130
    except (UserError, OSError) as error:
        # An error in a loader process comes with its traceback in front; the last line counts.
        message = str(error).rpartition("UserError: ")[2].strip()
    except (RuntimeError, MemoryError) as error:
        message = str(error)
        if "DataLoader worker (pid" in message or "shared memory" in message:
            message = f"{message.splitlines()[-1]} (--workers 0 needs no other processes)"
        elif isinstance(error, MemoryError) or re.search("out of|allocate memory", message):
            message = MEMORY
        else:  # a bug keeps its traceback
            raise
    print(f"semivl.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's have not
            stream.reconfigure(errors="replace", line_buffering=True)  # for names a console lacks
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends: as Ctrl-C
    sys.exit(main())
