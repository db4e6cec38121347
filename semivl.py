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
(`--ema 0`). .github/DIFFERENCES.md lists all differences. The paper reports 84.0 mIoU on VOC with
92 masks, 6.1 above the best before it; that run was not repeated by us, and nothing here has run on
a GPU.

    python semivl.py                                      the built-in toy world: minutes on a CPU
    python semivl.py --dataset FOLDER --labels 8          your own images (section 7)
    python semivl.py --dataset voc --labels 92            published data, schedule, test protocol
    python semivl.py --resume runs/voc-92                 resumes a run that was stopped
    python semivl.py --eval runs/voc-92/last.pt           IoU per class
    python semivl.py --predict runs/voc-92/last.pt a.jpg  mask and overlay of any image

The method is in sections 2 to 6 (networks), in the views of section 7, and in 8 (losses, and
`training_step`, which is the table above as code). All else makes a program of it: files,
evaluation, the loop, weights, command line. Sections 2, 4, 5, 6 and 8 say what their idea buys on
the toy world: test mIoU with 4 masks, mean of 5 seeds, with the preset "toy" of section 1.

Letters for shapes, in every comment: B images, N classes, K concepts, H x W image, P patch side,
gh x gw patches (H/P, W/P rounded up), T = 1 + gh*gw tokens, D width of the ViT, E width of CLIP's
joint space of images and text, C channels of one class's map (128). In prose x is the labelled
image; inside a module `x` is whatever features flow through it.
"""

import argparse
import contextlib
import copy
import dataclasses
import inspect
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
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm


# 1. Settings: what can be chosen, and what did the paper choose for each data set? ----------------
# Every field of Config is an option of the command line: `vit_lr` is --vit-lr. The defaults are
# VOC's. PRESETS has what another data set changes, and what is typed changes that again. A
# checkpoint keeps the settings, so they are never typed twice.
@dataclasses.dataclass
class Config:
    # Data
    dataset: str = "voc"  # toy, voc, coco, ade20k, cityscapes or FOLDER; the program's default: toy
    labels: int = 92  # how many images are labelled; all others of train.txt are used without mask
    root: str = "data"  # folder in which the named data sets are kept
    crop: int = 512  # side of the training crop and of the test window, pixels
    fit: bool = True  # resize the short side to the crop (in training: to the crop times the scale)
    scale_min: float = 0.5  # smallest factor of the random scale
    scale_max: float = 2.0  # largest factor of the random scale
    workers: int = 4  # processes that load images; 0: the training process itself
    # Networks
    clip: str = "ViT-B-16-quickgelu"  # a plain ViT CLIP of open_clip; toy; or local-dir:FOLDER
    clip_weights: str = "openai"  # a tag of open_clip's pretrained weights, FILE, or none: random
    authors_clip: bool = False  # CLIP as the authors have it: see DenseCLIP
    decoder: Literal["language", "vision"] = "language"  # vision: DeepLabV3+
    decoder_channels: int = 128  # C of the language decoder; all of its widths follow
    decoder_text: Literal["names", "mean"] = "names"  # text of a class: name, or mean of concepts
    definitions: bool = True  # use a class's concepts (section 2); off: its name instead
    finetune: Literal["spatial", "all", "none"] = "spatial"  # what trains in the ViT (section 4)
    conv_skip: bool = False  # take the shallow skip from a ResNet-101 stem (Cityscapes)
    recompute: bool = False  # the decoder takes less memory and more time
    # Losses
    unlabelled: bool = True  # use the unlabelled images
    conf_thresh: float = 0.95  # lowest confidence of a pseudo-label that counts (weighting "pixel")
    weighting: Literal["pixel", "mean"] = "pixel"  # consistency_loss explains them
    guidance: float = 0.1  # weight of frozen CLIP's losses (section 8: lambda); falls to 0
    guidance_conf_thresh: float = 0.9  # lowest confidence of frozen CLIP's labels
    ema: float = 0.996  # decay of the EMA teacher; 0: the student teaches itself
    # Optimisation
    steps: int = 0  # optimiser steps; 0: as many as --epochs has
    epochs: int = 80  # passes over the unlabelled images
    batch: int = 8  # labelled images per step, and as many unlabelled ones
    micro_batch: int = 2  # labelled images per forward, and 3 views of as many unlabelled ones
    lr: float = 1e-3  # learning rate of the decoder
    vit_lr: float = 1e-6  # learning rate of the ViT, and of the stem of conv_skip
    weight_decay: float = 0.01  # AdamW's, on everything that trains
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16: autocast; auto: bf16 on CUDA only
    # Evaluation and the run
    window_mode: Literal["logits", "probabilities"] = "logits"  # see window_starts
    stride: int = 0  # stride of the test window, pixels; 0: 5/6 of the crop
    evals: int = 20  # evaluations during the run, at most
    save_every: int = 250  # steps between two saves of last.pt
    out: str = ""  # folder for what is written; '': runs/DATASET-LABELS, numbered if taken
    seed: int = 0  # for the labelled draw, weights, order and augmentation
    device: str = "auto"  # auto, cuda, mps or cpu

    def __post_init__(self):
        from_one = "labels crop epochs batch micro_batch evals save_every".split()
        up_to_one = "ema conf_thresh guidance_conf_thresh".split()
        for name, kind in Config.__annotations__.items():
            value = getattr(self, name)
            if get_args(kind):
                require(value in get_args(kind), f"{option(name)}: take one of {get_args(kind)}")
            elif kind in (int, float):
                low = 1 if name in from_one else 0
                high = 1 if name in up_to_one else math.inf
                require(low <= value <= high, f"out of range: {option(name)} {value}")
        require(self.scale_min <= self.scale_max, "--scale-min is above --scale-max")
        require(self.batch % self.micro_batch == 0, "--micro-batch must divide --batch")
        require(self.stride <= self.crop, f"--stride {self.stride} is above --crop; 0 fits always")


PRESETS = {
    "toy": dict(
        dataset="toy",
        labels=4,
        crop=96,
        fit=False,
        scale_min=0.8,
        scale_max=1.25,
        workers=0,
        clip="toy",
        decoder_channels=32,
        conf_thresh=0.8,
        guidance=0.5,
        guidance_conf_thresh=0.8,
        ema=0.98,
        steps=300,
        batch=2,
        lr=2e-3,
        vit_lr=3e-4,
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
        steps=240 * 349,  # as with 186 labels: 240 epochs of (2975 - 186) / 8 steps, rounded up
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


def option(name: str) -> str:
    """The option that sets a field of Config."""
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def blame(what):
    """Turns an error of its block into a UserError that begins with `what`, mostly a file. It is
    for files and devices of the user: PIL, json and torch raise errors of any class for them."""
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror.lower()  # without the file, which `what` has
        if isinstance(error, KeyError):
            reason = f"has no {reason}"
        if isinstance(error, pickle.UnpicklingError):  # torch would advise to load it all the same
            reason = "holds code, or was not written by torch.save"
        raise UserError(f"{what}: {' '.join(reason.split())[:300]}") from error


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
# Toy world: guidance by definitions 71.3, by names 60.6, no guidance 67.4. So poor words are worse
# than no guidance. (The toy's definitions are in its dataset.json.)

# data set -> class -> its concepts, with | between them (`read_classes` makes lists of them);
# misspellings ("wolve") are as published.
CONCEPTS = {
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


@torch.no_grad()
def encode_text(clip: open_clip.CLIP, words: list[str]) -> torch.Tensor:
    """Text embeddings of "a photo of a WORD", [len(words), E], not normalised. Sets clip.eval()."""
    spoken = [word.replace("_", " ").strip() for word in words]  # traffic_light, _background_
    tokens = open_clip.tokenize([f"a photo of a {word}" for word in spoken], clip.context_length)
    return clip.eval().encode_text(tokens.to(clip.token_embedding.weight.device)).float()


class Words(NamedTuple):
    """What CLIP's text tower makes of the classes; vectors are L2-normalised."""

    decoder_text: torch.Tensor  # [N, E], what the decoder reads: `names`, or means of `concepts`
    names: torch.Tensor  # [N, E], of the class names
    concepts: torch.Tensor  # [K, E], class after class
    sizes: list[int]  # how many concepts each class has


def describe_classes(clip, classes: dict[str, list], decoder_text="names", definitions=True):
    """classes: name -> concepts (without `definitions`: the name alone) -> Words. decoder_text:
    whether the decoder reads the "names", or the "mean" of each class's concepts."""
    require(decoder_text in ("names", "mean"), f"decoder_text {decoder_text!r}: names or mean")
    names = encode_text(clip, list(classes))
    groups = list(classes.values()) if definitions else [[name] for name in classes]
    sizes = [len(group) for group in groups]
    concepts = encode_text(clip, sum(groups, []))
    text = names
    if decoder_text == "mean":  # the mean is taken BEFORE normalising, as the authors do
        text = torch.stack([group.mean(0) for group in concepts.split(sizes)])
    text, names, concepts = (F.normalize(vectors, dim=1) for vectors in (text, names, concepts))
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
    """x sigmoid(1.702 x), as silu(1.702 x) / 1.702: the backward pass keeps one tensor, not two. By
    VOC's recipe 1 + 1 images a step take 7.6 GB and 26 s on a CPU, instead of 8.2 GB and 41 s."""

    def forward(self, x):
        return F.silu(1.702 * x).mul_(1 / 1.702)


def value_path(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A block of open_clip's ViT on tokens [B, T, D], each of which attends to itself alone."""
    attn, D = block.attn, x.shape[-1]
    weight, bias = attn.in_proj_weight[2 * D :], attn.in_proj_bias[2 * D :]  # rows: q, k, values
    values = F.linear(block.ln_1(x), weight, bias)  # [B, T, D]
    x = x + block.ls_1(attn.out_proj(values))  # ls: layer scale
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
        told = "DenseCLIP needs a plain ViT, such as that of ViT-B-16-quickgelu"
        parts = open_clip.transformer
        require(isinstance(visual, parts.VisionTransformer) and not visual.attn_pool, told)
        kinds = {type(block) for block in visual.transformer.resblocks}
        require(kinds == {parts.ResidualAttentionBlock}, told)
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
        vit, P = self.visual, self.patch
        H, W = images.shape[-2:]
        right, below = -W % P, -H % P  # what is missing to whole patches
        images = F.pad((images - self.mean) / self.std, (0, right, 0, below))
        x = vit.conv1(images)
        B, _, gh, gw = x.shape  # [B, D, gh, gw]
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
# as they are, and with them norms, class token, patch convolution and final projection. (The last
# block's queries and keys feed nothing here: their gradient is 0, they only decay.)
# Toy world: little difference, 71.3 with it, 72.1 if all trains, 71.0 if nothing does.
def spatial_fine_tuning(clip: DenseCLIP, mode: str = "spatial") -> DenseCLIP:
    """Sets what trains in the ViT: "spatial" (29.1 of 86.8 million parameters of ViT-B/16 at crop
    512), "all" or "none". To be called before `make_optimizer`, which reads it."""
    require(mode in ("spatial", "all", "none"), f"mode {mode!r}: spatial, all or none")
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
# Toy world, labelled images alone: 61.6, DeepLabV3+ 50.5. With all the rest on, DeepLabV3+ is as
# good.
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
    bf16 rounds a cosine of 0.3 by up to 0.001, which FrozenGuidance's factor 100 turns into 0.1."""
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
    The order of the classes plays no part: two classes of equal text get equal logits."""

    def __init__(self, C: int):
        super().__init__()
        # 2C numbers a token, 4 heads, an MLP of width 4C
        self.layer = nn.TransformerEncoderLayer(
            2 * C, 4, 4 * C, dropout=0.0, activation="gelu", norm_first=True, batch_first=True
        )

    def forward(self, x, text):
        B, N, C, gh, gw = x.shape
        # Attention across classes needs no fine grid: it runs on means of 4 x 4 patches, ph x pw of
        # them (gh // 4 by gw // 4, at least 1). Patches left over are not read.
        pooled = F.avg_pool2d(x.flatten(0, 1), (min(4, gh), min(4, gw)))  # [B*N, C, ph, pw]
        ph, pw = pooled.shape[2:]
        by_place = pooled.unflatten(0, (B, N)).permute(0, 3, 4, 1, 2)  # [B, ph, pw, N, C]
        maps = by_place.flatten(0, 2)  # [B*ph*pw, N, C]: N tokens at each place
        texts = text.expand(len(maps), -1, -1)  # [B*ph*pw, N, C]
        # The layer reads 2C channels, map and text; of what it returns the map's half is kept.
        attended = self.layer(torch.cat([maps, texts], dim=2))[..., :C]  # [B*ph*pw, N, C]
        by_class = attended.unflatten(0, (B, ph, pw)).permute(0, 3, 4, 1, 2)  # [B, N, C, ph, pw]
        coarse = by_class.flatten(0, 1)  # [B*N, C, ph, pw]
        refined = F.interpolate(coarse, (gh, gw), mode="bilinear", align_corners=True)
        return x + refined.unflatten(0, (B, N))  # second residual: the layer has its own


class UpStage(nn.Module):
    """Doubles the resolution of x, appends the skip of its image, which all classes share, and
    applies two convolutions. x [B*N, c_in, a, b], skip [B, c_skip, ., .] -> [B*N, c_out, 2a, 2b].
    """

    def __init__(self, c_in: int, c_skip: int, c_out: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_in - c_skip, 2, stride=2)
        self.conv = nn.Sequential(*conv_norm_relu(c_in, c_out, 3), *conv_norm_relu(c_out, c_out, 3))

    def forward(self, x, skip):
        up = self.up(x)  # [B*N, c_in - c_skip, 2a, 2b]
        skip = F.interpolate(skip, up.shape[2:], mode="bilinear", align_corners=True)  # 2a x 2b
        # What follows equals self.conv(torch.cat([up, skip repeated for each class], dim=1)): a
        # convolution of [up, skip] is the sum of a convolution of up and one of skip. So the skip
        # is convolved once an image, and not once a class; a step takes 4 % less time.
        conv1, norm1, relu1 = self.conv[:3]
        weight_up, weight_skip = conv1.weight.split([up.shape[1], skip.shape[1]], dim=1)
        of_up = F.conv2d(up, weight_up, padding=1)  # [B*N, c_out, 2a, 2b]
        of_skip = F.conv2d(skip, weight_skip, padding=1)  # [B, c_out, 2a, 2b]
        by_image = of_up.unflatten(0, (len(skip), -1))  # [B, N, c_out, 2a, 2b]
        joined = (by_image + of_skip.unsqueeze(1)).flatten(0, 1)  # [B*N, c_out, 2a, 2b]
        return self.conv[3:](relu1(norm1(joined)))  # the second convolution


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
        parts = []
        for part in x.split(max(1, MAPS_AT_ONCE // len(x)), dim=1):
            if self.recompute and torch.is_grad_enabled():
                checkpoint = torch.utils.checkpoint.checkpoint
                parts.append(checkpoint(function, part, *shared, use_reentrant=False))
            else:
                parts.append(function(part, *shared))
        return torch.cat(parts, dim=1)

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
# Toy world: 71.3, without frozen CLIP 67.4; the EMA teacher (from UniMatch V2) makes no difference.
def drop_channels(features: torch.Tensor, count: int) -> torch.Tensor:
    """UniMatch's feature perturbation of the last `count` items of a batch [B, ., gh, gw]: each
    channel becomes 0 with p = 1/2, else it doubles."""
    kept, perturbed = features.split([len(features) - count, count])
    return torch.cat([kept, F.dropout2d(perturbed, 0.5)])


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
        The dense embedding and the skip maps of the last `num_perturbed` images are perturbed."""
        dense, (shallow, deep) = self.clip(images)
        shallow = self.conv(images)[-1] if self.conv else shallow
        if num_perturbed:
            dense = drop_channels(dense, num_perturbed)
            shallow = drop_channels(shallow, num_perturbed)
            deep = drop_channels(deep, num_perturbed)
        logits = self.decoder(dense, (shallow, deep), self.text)  # [B, N, 4gh, 4gw]
        # Logits are those of the image padded to whole patches, squeezed to H x W: as published.
        return F.interpolate(logits.float(), images.shape[2:], mode="bilinear", align_corners=False)


class FrozenGuidance(nn.Module):
    """CLIP as it was before SemiVL's first step, as a zero-shot classifier of pixels.
    clip: `frozen_copy(student.clip)`: this class itself freezes nothing. concepts: [K, E] of text,
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
        """Images -> int64 [B, H, W]: class, or IGNORE where it is less sure than conf_thresh."""
        confidence, label = self(images).softmax(1).max(1)
        return label.masked_fill(confidence < self.conf_thresh, IGNORE)


class EMATeacher:
    """Mean teacher: `model` is an exponential moving average of the student; it labels crops w.
    Averaging smooths out the mistakes of single steps. The average is also what is evaluated and
    saved, as in UniMatch V2. With decay 0 it equals the student, but in eval mode."""

    def __init__(self, student: nn.Module, decay: float = 0.996):
        self.model, self.decay = frozen_copy(student), decay

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """teacher = decay * teacher + (1 - decay) * student, after optimiser step `step` (from 0).
        The decay grows from 0: at first the teacher is the plain mean of all students so far."""
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
# is also the label of this pixel in s1 and s2, which is what section 8 needs. (CutMix comes there.)
def read_image(file: Path) -> Image.Image:
    """Any image file -> RGB, turned upright as its EXIF orientation says."""
    with blame(file), Image.open(file) as image:
        deep = image.mode.startswith(("I", "F"))  # over 8 bits a pixel
        require(not deep, f"mode {image.mode}; save it with 8 bits")
        image.load()  # PIL may report damage only once, and `suppress` would swallow that
        with contextlib.suppress(Exception):  # damaged EXIF data: the image stays as it is stored
            image = ImageOps.exif_transpose(image)
        return image.convert("RGB")


def read_mask(file: Path, num_classes: int, size: tuple) -> torch.Tensor:
    """A PNG of class numbers, as large as its image, (width, height) -> uint8 [H, W]."""
    with blame(f"{file} (python data_prep.py FOLDER tells more)"), Image.open(file) as image:
        # PIL stretches grey of 2 or 4 bits to 0 ... 255; such a file has a raw mode like "L;4".
        exact = image.mode in ("P", "I;16") or (image.mode == "L" and image.tile[0][3] == "L")
        require(exact and image.format == "PNG", "no PNG of class numbers, grey or palette, 8 bits")
        require(image.size == size, f"{image.size} pixels, but its image has {size} upright")
        mask = np.array(image)
        wrong = mask[(mask >= num_classes) & (mask != IGNORE)]
        known = f"a class, 0 to {num_classes - 1}, nor 255, no label"
        require(not len(wrong), f"{len(wrong)} pixels, such as {wrong[:1]}, are neither {known}")
        return torch.from_numpy(mask.astype(np.uint8))


def read_list(file: Path, need_mask: bool) -> list[tuple]:
    """Lines of a list -> entries."""
    with blame(file):
        text = file.read_text("utf-8-sig").replace("\\", "/")  # Windows' mark in front, and paths
    entries = []
    for line in filter(str.strip, text.splitlines()):
        tab = "\t" in line
        image, _, mask = line.strip().partition("\t" if tab else " ")
        require(mask or not need_mask, f"{file}: {line!r} names no mask")
        torn = "." not in image and not tab  # probably half of a name with a blank
        require(not torn, f"{file}: {line!r}: put a TAB behind a name that has blanks")
        entries.append((image.strip(), mask.strip() or None))
    require(entries, f"{file}: no line in it")
    return entries


def read_classes(file: Path) -> dict[str, list[str]]:
    """dataset.json -> class name -> concepts, in the order of class numbers."""
    with blame(f"{file} (of the folder that --dataset names)"):
        content = json.loads(file.read_text("utf-8-sig"))
        old = "colors" in content or content.get("ignore_index", IGNORE) != IGNORE
        require(not old, "masks of colours; python data_prep.py FOLDER --images DIR makes it anew")
        names = content["classes"]
        built_in = {}  # of VOC and Cityscapes, which a folder of the same classes is
        for concepts in CONCEPTS.values():
            if [*concepts] == names:
                built_in = {name: text.split("|") for name, text in concepts.items()}
        definitions = content.get("definitions", built_in)
        different = isinstance(names, list) and len({*names}) == len(names)
        told = f"'classes' should be a list of 2 to {IGNORE} different names"
        require(different and 2 <= len(names) <= IGNORE, told)
        lists = all(isinstance(concepts, list) and concepts for concepts in definitions.values())
        fits = lists and {*definitions} <= {*names}
        require(fits, "'definitions' should have a list of words for each class that it names")
        return {name: definitions.get(name, [name]) for name in names}


@dataclasses.dataclass
class Folder:
    """A data set on disk. Entries of train may lack a mask; test may be empty."""

    path: Path
    classes: dict[str, list[str]]  # name -> concepts, in the order of class numbers
    train: list[tuple]
    val: list[tuple]
    test: list[tuple]

    def image(self, entry: tuple) -> Image.Image:
        return read_image(self.path / entry[0])

    def pair(self, entry: tuple) -> tuple[Image.Image, torch.Tensor]:
        """The image of an entry, and its mask, uint8 [H, W]."""
        image = self.image(entry)
        return image, read_mask(self.path / entry[1], len(self.classes), image.size)


def open_data(cfg: Config) -> Folder:
    """The folder behind --dataset; a named set is made if it is missing."""
    path = Path(cfg.dataset)
    if cfg.dataset in PRESETS:
        path = Path(cfg.root, cfg.dataset)
        if not path.exists():
            require(WORLD == 1, f"{path} is missing: first run python data_prep.py {cfg.dataset}")
            status = import_data_prep().main([cfg.dataset, "--root", cfg.root])
            require(status == 0, f"--dataset {cfg.dataset}: {path} could not be made")
    classes = read_classes(path / "dataset.json")
    train = read_list(path / "splits/train.txt", False)
    val = read_list(path / "splits/val.txt", True)
    test = path / "splits/test.txt"
    return Folder(path, classes, train, val, read_list(test, True) if test.exists() else [])


def import_data_prep():
    """The module that makes named data sets, and the toy's CLIP. All else works without it."""
    try:
        import data_prep
    except ModuleNotFoundError:
        raise UserError("data_prep.py, which makes this, is not beside semivl.py") from None
    return data_prep


def draw_labelled(folder: Folder, count: int, seed: int) -> list[tuple]:
    """The labelled entries: those of splits/COUNT/labeled.txt, or `count` drawn from train.txt. A
    few images easily miss a class: of 100 draws the one whose masks show most classes is taken. As
    all masks are looked at, a benchmark should rather have a list."""
    file = folder.path / f"splits/{count}/labeled.txt"
    if file.exists():
        return read_list(file, True)
    masked = [*{entry[0]: entry for entry in folder.train if entry[1]}.values()]  # each image once
    require(count <= len(masked), f"--labels {count}: {len(masked)} images of train.txt have masks")
    shows = torch.zeros(len(masked), IGNORE + 1, dtype=torch.bool)  # which values a mask has
    for i, entry in enumerate(progress(masked, "look at masks")):
        _, mask = folder.pair(entry)
        shows[i, mask.unique().long()] = True
    rng = np.random.default_rng(seed)
    best, most = None, -1
    for _ in range(100):
        draw = rng.choice(len(masked), count, replace=False)
        classes = int(shows[draw, :IGNORE].any(0).sum())
        if classes > most:
            best, most = draw, classes
    return [masked[i] for i in best]


def check_labelled(folder: Folder, labelled: list[tuple]) -> None:
    """Prints how many labelled pixels each class has. UserError if fewer than two classes do."""
    pixels = torch.zeros(IGNORE + 1, dtype=torch.long)
    for entry in progress(labelled, "look at labelled images"):
        _, mask = folder.pair(entry)
        pixels += mask.flatten().bincount(minlength=IGNORE + 1)
    say("labelled pixels:")
    for number, name in [*enumerate(folder.classes), (IGNORE, "no label")]:
        say(f"  {name:22}{pixels[number]:>16,}")
    enough = (pixels[:IGNORE] > 0).sum() > 1
    require(enough, f"{folder.path}: labelled masks of 2 classes or more are needed (0 and 255?)")
    both = {image for image, _ in labelled} & {image for image, _ in folder.val + folder.test}
    if both:
        say(f"note: {len(both)} labelled images are validation or test images, too: {min(both)}")


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(height, width) times scale, rounded half up; not below one pixel."""
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def random_size(height: int, width: int, cfg: Config) -> tuple[int, int]:
    """A random (height, width) of the same aspect. With `fit` and r uniform in [scale_min,
    scale_max]: long side at most 4 * crop * r, short side at most crop * r (in the paper 2048 r and
    512 r: 500 x 375 becomes 683 x 512 at r = 1). Without: long side times a uniform factor."""
    long, short = max(height, width), min(height, width)
    if cfg.fit:
        r = float(torch.empty(()).uniform_(cfg.scale_min, cfg.scale_max))
        scale = min(int(4 * cfg.crop * r) / long, int(cfg.crop * r) / short)
    else:
        low, high = int(cfg.scale_min * long), int(cfg.scale_max * long)
        scale = int(torch.randint(low, high + 1, ())) / long
    return scaled_size(height, width, scale)


def scale_crop_flip(image: Image.Image, mask: torch.Tensor, cfg: Config):
    """Random scale, crop, flip of an image and its mask [H, W] -> image and mask of crop x crop.
    A small image is padded at the right and bottom: black, IGNORE in the mask."""
    crop = cfg.crop
    height, width = random_size(image.height, image.width, cfg)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    # The authors use cv2's nearest with `fit`, PIL's without: they differ by half a pixel.
    nearest = v2.InterpolationMode.NEAREST if cfg.fit else v2.InterpolationMode.NEAREST_EXACT
    mask = VF.resize(mask[None], [height, width], interpolation=nearest)[0]
    top = int(torch.randint(max(height - crop, 0) + 1, ()))
    left = int(torch.randint(max(width - crop, 0) + 1, ()))
    image = image.crop((left, top, left + crop, top + crop))  # black beyond the border
    mask = mask[top : top + crop, left : left + crop]
    mask = F.pad(mask, (0, crop - mask.shape[1], 0, crop - mask.shape[0]), value=IGNORE)
    if torch.rand(()) < 0.5:
        image, mask = ImageOps.mirror(image), mask.flip(1)
    return image, mask


def blur(image: Image.Image) -> Image.Image:
    """Gaussian blur by a random sigma of 0.1 to 2 pixels."""
    sigma = float(torch.empty(()).uniform_(0.1, 2.0))
    return image.filter(ImageFilter.GaussianBlur(sigma))


# PIL image -> recoloured, perhaps blurred; nothing moves.
recolour = v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5, hue=0.25)], 0.8)  # brightness, contrast...
strong_view = v2.Compose(
    [recolour, v2.RandomGrayscale(0.2), v2.RandomApply([v2.Lambda(blur)], 0.5)]
)
# To add a view, add an entry. It must not move pixels, and its name must not be one that items or
# the log have already: x, y, w, fp, padding, files, total, kept, step, lr, seconds, gb, val_miou.
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


class TrainingSet(Dataset):
    """Item i of a run, counted over epochs without end: x, w, s1, s2 uint8 [3, crop, crop]; y
    uint8, padding bool [crop, crop]; s1_box, s2_box int64 [4]; files, a string. An item depends on
    (seed, i) alone, so a run is the same with any number of workers and however often it is
    resumed. The DataLoader's sampler says which i come."""

    def __init__(self, folder: Folder, labelled: list, unlabelled: list, cfg: Config):
        self.folder, self.labelled, self.unlabelled, self.cfg = folder, labelled, unlabelled, cfg

    def pick(self, entries: list, i: int) -> tuple:
        """Entry i of a list that is repeated without end and shuffled anew each time."""
        epoch, place = divmod(i, len(entries))
        which = int(entries is self.labelled)  # else both lists would have the same order
        rng = np.random.default_rng((self.cfg.seed, which, epoch))
        return entries[rng.permutation(len(entries))[place]]

    def __getitem__(self, i: int) -> dict:
        cfg = self.cfg
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            torch.manual_seed(cfg.seed * 10**9 + i)
            entry = self.pick(self.labelled, i)
            x, y = scale_crop_flip(*self.folder.pair(entry), cfg)
            item = dict(x=VF.pil_to_tensor(x), y=y, files=entry[0])
            if self.unlabelled:
                entry = self.pick(self.unlabelled, i)
                image = self.folder.image(entry)
                marker = torch.zeros(image.height, image.width, dtype=torch.uint8)
                w, marker = scale_crop_flip(image, marker, cfg)  # IGNORE where w is padded
                item |= dict(w=VF.pil_to_tensor(w), padding=marker == IGNORE)
                item["files"] += f" {entry[0]}"
                item |= {name: VF.pil_to_tensor(view(w)) for name, view in STRONG_VIEWS.items()}
                item |= {f"{name}_box": cutmix_box(cfg.crop) for name in STRONG_VIEWS}
        return item


# 8. Consistency (UniMatch, Yang et al., CVPR 2023): what about an image without a mask? -----------
# An image's mask does not depend on its colours. So each unlabelled image gets two label maps, made
# from its weak view w, and the student has to predict them in views that are harder to see:
#     the teacher's pseudo-labels, if as sure as --conf-thresh (Cityscapes: all)    -> losses L
#     frozen CLIP's labels, if as sure as --guidance-conf-thresh (SemiVL)           -> losses G
#     views: s1, s2 (recoloured, CutMix), fp (w, half of the feature channels off)
#     total = (L_x + (L_s + L_fp) / 2) / 2 + lambda * (G_s + G_fp) / 2
# L_s and G_s are means over s1 and s2; L_x is the cross-entropy of the labelled crop x with its
# mask; lambda = --guidance * (1 - t/T) at step t of T.
# The trap is confirmation bias: the student learns wrong pseudo-labels, and the teacher follows the
# student. So unsure ones are dropped (or their image counts less), and frozen CLIP, which never
# follows, has its say. Its labels have coarse borders, so lambda falls to 0.
# Toy world without the losses G: 67.4, without pseudo-labels, too, 61.6. With G on, taking
# consistency away costs only 0.8.
class Targets(NamedTuple):
    """The targets of unlabelled images, per pixel; all [B, H, W]."""

    label: torch.Tensor  # int64, the teacher's pseudo-label
    confidence: torch.Tensor  # float32, its probability
    padding: torch.Tensor  # bool, True where the crop holds no image
    clip_label: torch.Tensor  # int64, frozen CLIP's label, or IGNORE

    def mixed(self, box: torch.Tensor) -> "Targets":
        """CutMix of every field."""
        return Targets(*[cutmix(field, box) for field in self])

    @staticmethod
    def joined(parts: list) -> "Targets":
        """Several Targets as those of one batch."""
        return Targets(*[torch.cat(fields) for fields in zip(*parts)])

    def part(self, chunk: slice) -> "Targets":
        """Some items of the batch."""
        return Targets(*[field[chunk] for field in self])


@torch.no_grad()
def make_targets(teacher, guidance, w, padding) -> Targets:
    """Pseudo-labels and guidance labels (no `guidance`: all IGNORE) of weak views w [B, 3, H, W] in
    [0, 1]; padding: bool [B, H, W], True where the crop holds no image."""
    confidence, label = teacher(w).softmax(1).max(1)
    clip_label = torch.full_like(label, IGNORE)
    if guidance is not None:
        clip_label = guidance.labels(w)
    return Targets(label, confidence, padding, clip_label.masked_fill(padding, IGNORE))


def cutmix(items: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Pastes into each item what its partner has inside the item's box (CutMix, Yun et al., ICCV
    2019). The partner is the item at the mirrored place of the batch; the middle one of an odd
    batch is its own. items: [B, H, W] or [B, 3, H, W]; box: [B, 4], top, left, bottom, right."""
    rows = torch.arange(items.shape[-2], device=items.device)[:, None]
    columns = torch.arange(items.shape[-1], device=items.device)
    top, left, bottom, right = box.view(-1, 4, 1, 1).unbind(1)  # each [B, 1, 1]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # [B, H, W]
    if items.ndim == 4:
        inside = inside.unsqueeze(1)  # [B, 1, H, W]
    return torch.where(inside, items.flip(0), items)


def supervised_loss(logits, y):
    """Cross-entropy of logits [B, N, H, W] and masks y, int64 [B, H, W]; mean over known pixels."""
    loss = F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="sum")
    return loss / (y != IGNORE).sum().clamp(min=1)  # 0 if no pixel is known


def consistency_loss(logits, label, confidence, padding, conf_thresh=0.95, weighting="pixel"):
    """Cross-entropy with pseudo-labels: sum of weight * loss over non-padding pixels, divided by
    their number (not by the weights' sum, so an image with few confident pixels counts less).
    logits [B, N, H, W]; label (int64), confidence, padding (bool) [B, H, W]. Weights: "pixel", 1
    where confidence reaches conf_thresh, else 0; "mean", the (mixed) image's mean confidence."""
    require(weighting in ("pixel", "mean"), f"weighting {weighting!r}: pixel or mean")
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
    logits: dict, y, targets: dict, guidance_weight: float, conf_thresh=0.95, weighting="pixel"
) -> dict:
    """The formula above, as scalars: "x"; for each view "s1", "guidance_s1", ...; "total".
    logits: {"x": ..., "s1": ..., "s2": ..., "fp": ...}, [B, N, H, W] each. y: masks of x, int64 [B,
    H, W]. targets: view -> Targets, not for x; if {}, total is L_x. guidance_weight: lambda."""
    losses = {"x": supervised_loss(logits["x"], y)}
    for view, t in targets.items():
        losses[view] = consistency_loss(
            logits[view], t.label, t.confidence, t.padding, conf_thresh, weighting
        )
        losses[f"guidance_{view}"] = guidance_loss(logits[view], t.clip_label)
    total = losses["x"]
    if targets:
        strong = [view for view in targets if view != "fp"]
        L_s = sum(losses[view] for view in strong) / len(strong)
        G_s = sum(losses[f"guidance_{view}"] for view in strong) / len(strong)
        consistency = (L_s + losses["fp"]) / 2
        guidance = (G_s + losses["guidance_fp"]) / 2
        total = (losses["x"] + consistency) / 2 + guidance_weight * guidance
    return losses | {"total": total}


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    """bf16 for matrix products; losses stay in float32, on CUDA softmax and norms do, too."""
    bf16 = cfg.precision == "bf16"
    if cfg.precision == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def training_step(student, teacher, guidance, batch: dict, cfg: Config, step: int) -> dict:
    """One training step but for the optimiser: label w; CutMix s1 and s2 with their labels; let
    the student predict x, s1, s2 and fp; losses; backward, which adds to the gradients. To save
    memory the batch is worked off in micro-batches.
    student: SemiVL, perhaps in DistributedDataParallel. teacher: the model that labels. guidance:
    FrozenGuidance, or None. batch: stacked items of TrainingSet on one device, without "files".
    step: from 0 to cfg.steps - 1; with cfg.seed it seeds torch, for the feature dropout.
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
            w = batch["w"][chunk] / 255
            with autocast(cfg, device):
                parts.append(make_targets(teacher, guidance, w, batch["padding"][chunk]))
        own = Targets.joined(parts)  # of w; [size, H, W] each

        # CutMix changes images and targets alike.
        strong_views = [name.removesuffix("_box") for name in batch if name.endswith("_box")]
        for view in strong_views:
            box = batch[f"{view}_box"]
            images[view] = cutmix(batch[view], box)
            targets[view] = own.mixed(box)
        images["fp"] = batch["w"]  # last, so that it is perturbed below
        targets["fp"] = own

    # The student predicts all views of a micro-batch in one forward; losses; backward.
    losses = {}
    for chunk in chunks:
        # DDP averages gradients over processes at the last micro-batch only; SemiVL ignores it.
        student.require_backward_grad_sync = chunk is chunks[-1]
        first = step * cfg.batch + RANK * size + chunk.start
        # Feature dropout has a seed of its own in each micro-batch; TrainingSet's are lower ones.
        torch.manual_seed(cfg.seed * 10**9 + 10**9 // 2 + first)
        # x, s1, s2, fp, one after the other: [views * micro, 3, crop, crop]
        pixels = torch.cat([image[chunk] for image in images.values()]) / 255
        with autocast(cfg, device):
            logits = student(pixels, num_perturbed=micro if targets else 0)  # "fp" comes last
        logits_of = dict(zip(images, logits.split(micro)))  # view -> [micro, N, crop, crop]
        targets_of = {view: t.part(chunk) for view, t in targets.items()}
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


# 9. Evaluation: how good is a model? Sliding window, one confusion matrix, mIoU -------------------
# A ViT works best at the size of its training. So a test image is covered by overlapping windows of
# that size, and where they overlap, their scores are averaged. mIoU is the mean over classes of
#     IoU = TP / (TP + FP + FN), counted in pixels over ALL images, not averaged over images.
def window_starts(size: int, window: int, stride: int, mode: str) -> list[int]:
    """Where windows start along a side of `size` pixels. The authors have two protocols. "logits":
    logits are averaged, and all windows are whole: the last one is moved back inside.
    "probabilities" (Cityscapes): these are averaged, and a window over the edge is cut short."""
    require(mode in ("logits", "probabilities"), f"mode {mode!r}: logits or probabilities")
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


def segment(model, image: Image.Image, cfg: Config, device: torch.device) -> torch.Tensor:
    """The authors' test protocol: an image of W x H pixels -> class numbers, uint8 [H, W]. With
    `fit` its short side becomes the window's. The model has to be in eval mode, as are the EMA
    teacher and what `load_checkpoint` returns."""
    size = (image.height, image.width)
    if cfg.fit:
        height, width = scaled_size(*size, cfg.crop / min(size))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    images = VF.pil_to_tensor(image)[None].to(device) / 255  # [1, 3, h, w]
    stride = cfg.stride or 5 * cfg.crop // 6
    with autocast(cfg, device):
        scores = sliding_window(model, images, cfg.crop, stride, cfg.window_mode)  # [1, N, h, w]
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
    """Confusion matrix [N, N] -> TP / (TP + FP + FN), percent [N]; NaN if a class is in neither."""
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


def report(models: dict, folder: Folder, cfg: Config, device, out=None, **scores) -> None:
    """Prints IoU per class on the test images (or else validation), and writes it with `scores`
    into OUT/result.json. models: title -> model."""
    split, entries = ("test", folder.test) if folder.test else ("val", folder.val)
    table = {}  # title -> IoU of each class, mIoU
    for title, model in models.items():
        iou = evaluate(model, folder, entries, cfg, device, split)
        table[title] = [*iou.tolist(), float(iou.nanmean())]
    rows = [*folder.classes, "mIoU"]
    say(f"{f'IoU, {split}':20}" + "".join(f"{title:>21}" for title in table))
    for row, name in enumerate(rows):
        say(f"{name:20}" + "".join(f"{values[row]:21.1f}" for values in table.values()))
    if out and RANK == 0:
        content = {title: dict(zip(rows, values)) for title, values in table.items()}
        text = json.dumps(scores | {split: content}).replace("NaN", "null")  # JSON has no NaN
        (out / "result.json").write_text(text, encoding="utf-8")


# 10. The run: how do steps become a trained model that can be stopped at any time? ----------------
# Each step: learning rates, `training_step`, AdamW, EMA teacher; now and then an evaluation, and
# last.pt, which has all that it takes to go on. Items of data and feature dropout depend on the
# seed and the step alone. So a run that was stopped goes on bit for bit as it would have gone on,
# with the same --micro-batch and processes (on a CPU; CUDA may add in another order).
# Under torchrun every process runs this file: item i goes to process i % WORLD, DDP averages the
# gradients, evaluation shares the images, and process 0 alone prints and writes.
def pick_device(name: str) -> torch.device:
    """For "auto" what torch finds (CUDA, MPS), else the CPU. Under torchrun each process takes the
    GPU of its LOCAL_RANK, and waits here for the others."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with blame(f"--device {name}"):
        device = torch.device(name)
        if WORLD > 1 and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)  # else this process would also open GPU 0
        torch.zeros(1, device=device)  # a device that is not there is told here
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def sum_over_processes(numbers: torch.Tensor) -> torch.Tensor:
    if WORLD > 1:
        dist.all_reduce(numbers)
    return numbers


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


def free_folder(out: str, default: Path) -> Path:
    """OUT, which must not be there yet; if it is '', the first of DEFAULT, DEFAULT-2, DEFAULT-3,
    ... that is not there yet."""
    if out:
        require(not Path(out).exists(), f"--out {out} is there already")
        return Path(out)
    path, number = default, 1
    while path.exists():
        number += 1
        path = default.with_name(f"{default.name}-{number}")
    return path


def set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(group["base_lr"], step, steps)


class Run:
    """A run's folder: log.jsonl, best.pt with the teacher, last.pt with all that it takes to go on.
    Process 0 alone writes. modules: name in last.pt -> student, teacher ("model"), optimiser;
    facts: what else is saved."""

    def __init__(self, path: Path, modules: dict, facts: dict):
        self.path, self.modules, self.facts = path, modules, facts
        self.step = 0  # optimiser steps that are done
        self.val_last = self.val_best = -1.0  # validation mIoU
        if RANK == 0:
            self.file = open(path / "log.jsonl", "a", 1, encoding="utf-8")  # noqa: SIM115
            self.lock()

    def lock(self) -> None:
        """Keeps other processes out of this folder as long as the log is open."""
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            with blame(f"{self.path}: another process is at work in it"):
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def log(self, **entries) -> None:
        """Appends a line to log.jsonl."""
        if RANK == 0:
            self.file.write(json.dumps(dict(step=self.step) | entries) + "\n")

    def save(self, name: str) -> None:
        """Writes last.pt or best.pt; the old file is replaced when the new one is complete."""
        if RANK > 0:
            return
        content = dict(step=self.step, val_last=self.val_last, val_best=self.val_best) | self.facts
        for key, module in self.modules.items():
            if key == "model" or name == "last.pt":
                content[key] = module.state_dict()
        with blame(f"{self.path / name} (make room; what was saved before is whole)"):
            torch.save(content, self.path / "new.tmp")
            (self.path / "new.tmp").replace(self.path / name)

    def evaluated(self, miou: float) -> None:
        """Logs the validation mIoU; keeps the best model."""
        self.val_last = miou
        self.log(val_miou=miou)
        if miou > self.val_best:
            self.val_best = miou
            self.save("best.pt")

    def load(self, saved: dict) -> None:
        """Goes on where last.pt, whose content `saved` is, was written."""
        with blame(self.path / "last.pt"):
            self.step, self.val_last = saved["step"], saved["val_last"]
            self.val_best = saved["val_best"]
            for name, module in self.modules.items():
                module.load_state_dict(saved[name])
        if RANK == 0:  # the log forgets the steps that come again
            lines = (self.path / "log.jsonl").read_text("utf-8").splitlines(keepends=True)
            self.file.truncate(0)
            for line in lines:
                with contextlib.suppress(ValueError):  # a kill may have torn the last line
                    if json.loads(line)["step"] <= self.step:
                        self.file.write(line)


def choose_images(folder: Folder, cfg: Config, saved: dict | None) -> tuple[list, list]:
    """The labelled and unlabelled entries of a run; a resumed run keeps its labelled ones."""
    labelled = saved["labelled"] if saved else draw_labelled(folder, cfg.labels, cfg.seed)
    taken = {image for image, _ in labelled}
    unlabelled = [(image, None) for image, _ in folder.train if image not in taken]
    require(unlabelled or not cfg.unlabelled, "no image is left unlabelled: add --unlabelled off")
    check_labelled(folder, labelled)
    if cfg.unlabelled and cfg.batch == WORLD:
        say("note: each process has one unlabelled image a step: CutMix has no partner for it")
    return labelled, unlabelled


def make_networks(cfg: Config, folder: Folder, device: torch.device):
    """The student, frozen CLIP by definitions and by names, and CLIP's config (see `load_clip`)."""
    clip, clip_config = load_clip(cfg)
    words = describe_classes(clip, folder.classes, cfg.decoder_text, cfg.definitions)
    pretrained = cfg.clip_weights != "none"
    student = build_model(cfg, clip.visual, words.decoder_text, pretrained).to(device).train()
    frozen = frozen_copy(student.clip)  # before training, and before a checkpoint is loaded
    guidance = FrozenGuidance(frozen, words.concepts, words.sizes, cfg.guidance_conf_thresh)
    by_names = FrozenGuidance(frozen, words.names, [1] * len(words.names))
    return student, guidance.to(device), by_names.to(device), clip_config


def train(cfg: Config, saved: dict | None = None) -> None:
    """A whole run. saved: what last.pt holds, to go on from there."""
    require(cfg.batch % WORLD == 0, f"--batch {cfg.batch} cannot be shared by {WORLD} processes")
    name = f"{Path(cfg.dataset).resolve().name}-{cfg.labels}"
    path = Path(cfg.out) if saved else free_folder(cfg.out, Path("runs", name))
    folder, device = open_data(cfg), pick_device(cfg.device)
    torch.manual_seed(cfg.seed)
    student, guidance, by_names, clip_config = make_networks(cfg, folder, device)
    labelled, unlabelled = choose_images(folder, cfg, saved)
    # Without unlabelled images a run is as long as with them, so that the two can be compared.
    steps_per_epoch = max(1, len(unlabelled or labelled) // cfg.batch)
    cfg = dataclasses.replace(cfg, steps=cfg.steps or cfg.epochs * steps_per_epoch)

    ema = EMATeacher(student, cfg.ema)
    optimizer = make_optimizer(student, cfg)
    parallel = student
    if WORLD > 1:
        parallel = nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)
    baselines = {"CLIP by names": by_names}
    if not torch.equal(by_names.concepts, guidance.concepts):
        baselines["CLIP by definitions"] = guidance
    models = baselines | {"SemiVL" if cfg.unlabelled else "labels only": ema.model}

    # The run's folder.
    sizes = [len(folder.train), len(folder.val), len(folder.test)]
    facts = dict(config=dataclasses.asdict(cfg), classes=folder.classes, clip=clip_config)
    facts |= dict(labelled=labelled, lists=sizes)
    if RANK == 0 and not saved:
        path.mkdir(parents=True)
        (path / "semivl.py").write_bytes(Path(__file__).read_bytes())
    run = Run(path, dict(student=student, model=ema.model, optimizer=optimizer), facts)
    if saved:
        same = [*saved["classes"].items()] == [*folder.classes.items()]  # and in the same order
        same = same and saved["lists"] == sizes
        require(same, f"{folder.path}: its lists or classes changed since the run started")
        run.load(saved)
    else:
        run.save("last.pt")  # so that a run can be resumed from its first step on
    say(
        f"{len(labelled)} labelled, {len(unlabelled)} unlabelled, {len(folder.val)} validation, "
        f"{len(folder.test)} test images; {cfg.steps} steps on {device}; writes to {path}"
    )
    for name, model in baselines.items():
        miou = evaluate(model, folder, folder.val[:100], cfg, device).nanmean()
        say(f"frozen {name}: mIoU {miou:.1f} ({len(folder.val[:100])} validation images)")

    loader = DataLoader(
        TrainingSet(folder, labelled, unlabelled if cfg.unlabelled else [], cfg),
        cfg.batch // WORLD,
        num_workers=min(cfg.workers, os.cpu_count() or 1),
        sampler=range(run.step * cfg.batch + RANK, cfg.steps * cfg.batch, WORLD),
        pin_memory=device.type == "cuda",
    )
    guide = guidance if cfg.guidance else None  # without its losses its labels are not needed
    clock = time.perf_counter()
    for batch in progress(loader, "train", total=cfg.steps, initial=run.step):
        files = batch.pop("files")
        batch = {name: t.to(device, non_blocking=True) for name, t in batch.items()}
        set_rates(optimizer, run.step, cfg.steps)
        losses = training_step(parallel, ema.model, guide, batch, cfg, run.step)
        means = sum_over_processes(torch.stack([*losses.values()]) / WORLD)
        losses = dict(zip(losses, means.tolist()))
        require(  # before a weight changes
            math.isfinite(losses["total"]),
            f"step {run.step + 1}: the loss is {losses['total']}; lower --lr, or look at {files}",
        )
        optimizer.step()
        optimizer.zero_grad()
        if WORLD > 1:
            for buffer in student.buffers():
                dist.broadcast(buffer, 0)  # batch-norm statistics: those of process 0 count
        ema.update(student, run.step)

        run.step += 1
        seconds = time.perf_counter() - clock
        rates = [group["lr"] for group in optimizer.param_groups]
        peak = torch.cuda.max_memory_allocated() / 1e9  # 0 without CUDA
        run.log(**losses, lr=rates, seconds=seconds, gb=peak)
        evaluate_now = run.step % math.ceil(cfg.steps / cfg.evals) == 0 or run.step == cfg.steps
        if evaluate_now:
            run.evaluated(float(evaluate(ema.model, folder, folder.val, cfg, device).nanmean()))
            say(
                f"step {run.step}: loss {losses['total']:.3f}, kept {losses.get('kept', 0):.2f}, "
                f"validation mIoU {run.val_last:.1f}, {seconds:.3g} s/step"
            )
            if RANK == 0:
                save_sheet(path / "sheet.png", folder, models, cfg, device)
        if evaluate_now or run.step % cfg.save_every == 0:
            run.save("last.pt")
        clock = time.perf_counter()
    report(models, folder, cfg, device, path, val_last=run.val_last, val_best=run.val_best)


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
            config, name = import_data_prep().TOY_CLIP, f"local-dir:{cfg.root}/toy"
        else:
            config = open_clip.get_model_config(name)
        told = "no plain ViT CLIP of open_clip, such as ViT-B-16-quickgelu"
        require(config, told)
        require({*config} <= {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}, told)
        require(isinstance(config["vision_cfg"].get("layers"), int), told)  # ResNets have a list
        require("hf_tokenizer_name" not in config["text_cfg"], told)  # words of another kind
        if weights == "none":
            return open_clip.CLIP(**config), config
        if name.startswith("local-dir:"):
            require(weights == "openai", f"{name} has its own weights; drop --clip-weights")
            return open_clip.create_model(name, require_pretrained=True), config
        # The wrong GELU costs accuracy, and nothing else would tell.
        quick = config.get("quick_gelu", False)
        known = open_clip.get_pretrained_cfg(name, weights) or {}
        fits = known.get("quick_gelu", quick) == quick
        require(fits, f"{weights} was trained with the other GELU; add or drop -quickgelu")
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


def load_file(file, needed: str = "") -> dict:
    """What torch.save wrote, with the entries `needed`, without running code that may be in it."""
    # The authors' files hold a number of numpy's, whose function has two names by numpy's version.
    scalar = np.float64(0).__reduce__()[0]
    old, new = "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"
    allowed = [(scalar, old), (scalar, new), np.dtype, np.dtypes.Float64DType]
    with blame(file), torch.serialization.safe_globals(allowed):
        content = torch.load(file, map_location="cpu", weights_only=True)
        missing = ", ".join({*needed.split()} - {*content})
        told = (
            f"no checkpoint of ours (nor of the authors', by load_authors_checkpoint): no {missing}"
        )
        require(not missing, told)
        return content


def load_checkpoint(file, **changes) -> tuple[SemiVL, Config, dict]:
    """A checkpoint of this program -> model in eval mode, settings, class names and concepts."""
    content = load_file(file, "model config classes clip")
    with blame(file):
        cfg = Config(**content["config"] | dict(device="auto", out="") | changes)
        model = build_model(cfg, open_clip.CLIP(**content["clip"]).visual, content["model"]["text"])
        model.load_state_dict(content["model"])
    return model.eval(), cfg, content["classes"]


# 12. Pictures: masks in colours, the sheet of a run -----------------------------------------------
# Numbers hide mistakes that one picture shows: a mask that is not upright, a class that is never
# predicted. So a run draws sheet.png at each evaluation.
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
    """Up to four validation images, a row each: image, truth, and what each model (title -> images
    to logits) predicts."""
    side = 198  # of a cell, with a margin
    titles = ["image", "truth", *models]
    entries = folder.val[:: math.ceil(len(folder.val) / 4)]
    columns = len(titles) * side // 140  # of the legend
    legend = 20 * math.ceil(len(folder.classes) / columns)
    size = (len(titles) * side, 24 + len(entries) * side + legend)
    sheet = Image.new("RGB", size, "white")
    write = partial(ImageDraw.Draw(sheet).text, fill="black", font=ImageFont.load_default(14))
    for column, title in enumerate(titles):
        write((column * side, 4), title)
    for row, entry in enumerate(entries):
        image, truth = folder.pair(entry)
        masks = [truth, *(segment(model, image, cfg, device) for model in models.values())]
        cells = [image, *(colour_mask(mask, folder.classes).convert("RGB") for mask in masks)]
        for column, cell in enumerate(cells):
            cell = ImageOps.pad(cell, (side - 6, side - 6), Image.Resampling.BOX, "white")
            sheet.paste(cell, (column * side, 24 + row * side))
    for n, name in enumerate(folder.classes):
        x, y = n % columns * 140, size[1] - legend + n // columns * 20
        sheet.paste(colour_mask(torch.full((14, 14), n), folder.classes), (x, y))
        write((x + 20, y), name)
    sheet.save(file)


def predict(checkpoint: str, names: list[str], changes: dict) -> None:
    """--predict: NAME-mask.png (class numbers, in colours) and NAME-overlay.png of each image."""
    files = []
    for path in map(Path, names):
        inside = sorted(path.glob("*.*")) if path.is_dir() else [path]
        known = Image.registered_extensions()
        files += [file for file in inside if file == path or file.suffix.lower() in known]
    require(files, "--predict CKPT IMAGE ...: name images, or a folder of them")
    model, cfg, classes = load_checkpoint(checkpoint, **changes)
    device = pick_device(cfg.device)
    model.to(device)
    out = free_folder(cfg.out, Path(checkpoint).parent / "predictions")
    out.mkdir(parents=True)
    for file in progress(files, "predict"):
        image = read_image(file)
        label = segment(model, image, cfg, device)
        mask = colour_mask(label, classes)
        overlay = Image.blend(image, mask.convert("RGB"), 0.55)
        name, number = file.stem, 1
        while (out / f"{name}-mask.png").exists():  # images of several folders
            number += 1
            name = f"{file.stem}-{number}"
        mask.save(out / f"{name}-mask.png")
        overlay.save(out / f"{name}-overlay.png")
        shown = [[*classes][n] for n in label.unique()]
        say(f"{file} -> {out / name}-mask.png: {', '.join(shown)}")


# 13. Command line ---------------------------------------------------------------------------------
# Four things can be done: train (the default), --resume a run, --eval and --predict with a
# checkpoint. A user's mistake ends in one line and exit code 2; a bug keeps its traceback.
CHANGES = {  # action -> the settings that may be typed beside those of the checkpoint
    "resume": "dataset root device workers steps micro_batch recompute clip_weights".split(),
    "eval": "dataset root device workers out stride".split(),
    "predict": "device out stride".split(),
}


def on_or_off(text: str) -> bool:
    require(text in ("on", "off"), "take on or off")
    return text == "on"


def parse_args(argv) -> dict:
    """The options that were typed, with their values; --help shows the source of Config."""
    parser = argparse.ArgumentParser(
        usage="semivl.py [options]",
        description="Every field of Config is an option: vit_lr is --vit-lr.",
        epilog=inspect.getsource(Config).partition("\n\n")[0],  # its fields and their comments
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped")
    actions.add_argument("--eval", metavar="CKPT", help="IoU per class of a checkpoint")
    actions.add_argument("--predict", nargs="+", metavar=("CKPT", "IMAGE"), help="masks of images")
    for name, kind in Config.__annotations__.items():
        choices = get_args(kind) or None
        if choices:
            kind = str
        elif kind is bool:
            kind = on_or_off
        parser.add_argument(
            option(name), dest=name, type=kind, choices=choices, help=argparse.SUPPRESS
        )
    return vars(parser.parse_args(argv))


def run_command(argv) -> None:
    """Does what the command line says."""
    typed = parse_args(argv)
    action = next(iter({*CHANGES} & {*typed}), None)
    if action:
        target = typed.pop(action)
        wrong = [option(name) for name in typed if name not in CHANGES[action]]
        require(not wrong, f"not together with --{action}: {', '.join(wrong)}")
    if action == "resume":
        file = Path(target) / "last.pt"
        saved = load_file(file, "config classes labelled lists student model optimizer step")
        with blame(file):
            cfg = Config(**saved["config"] | typed | dict(out=target))
        train(cfg, saved)
    elif action == "eval":
        model, cfg, classes = load_checkpoint(target, **typed)
        out = free_folder(cfg.out, Path()) if cfg.out else None
        folder, device = open_data(cfg), pick_device(cfg.device)
        require([*folder.classes] == [*classes], f"{folder.path}: other classes")
        if out and RANK == 0:
            out.mkdir(parents=True)
        report({"SemiVL": model.to(device)}, folder, cfg, device, out)
    elif action == "predict":
        predict(target[0], target[1:], typed)
    else:
        preset = dict(PRESETS.get(typed.get("dataset", "toy"), {}))
        if "epochs" in typed:
            preset["steps"] = 0  # the toy's and Cityscapes' steps would win
        train(Config(**preset | typed))
    if WORLD > 1:  # not after an error: the others would wait for ever
        dist.destroy_process_group()


def main(argv=None) -> int:
    """Runs the command line; exit code 2 and one line for a user's mistake, 130 for Ctrl-C."""
    try:
        run_command(argv)
        return 0
    except KeyboardInterrupt:
        message, code = "interrupted; --resume RUN goes on with a run", 130
    except (UserError, OSError) as error:
        # An error in a loader process comes with its traceback in front; the last line counts.
        message, code = str(error).rpartition("UserError: ")[2].strip(), 2
    except (RuntimeError, MemoryError) as error:
        lack = "MemoryError|out of memory|allocate memory|shared memory|DataLoader worker"
        if not re.search(lack, repr(error)):
            raise  # a bug
        hint = "smaller images; in training --micro-batch 1, --recompute on, --workers 0"
        message, code = f"out of memory? {error}; to need less: {hint}", 2
    print(f"semivl.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's have not
            stream.reconfigure(errors="replace", line_buffering=True)  # for names a console lacks
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends: as Ctrl-C
    sys.exit(main())
