"""SemiVL in one file: semi-supervised semantic segmentation with vision-language guidance.
Paper: Hoyer, Tan, Naeem, Van Gool, Tombari, "SemiVL", ECCV 2024, arXiv 2311.16241.

A few images have masks, many have none, and CLIP connects words with images. One training step
takes a crop x of a labelled image with its mask y, and a crop w of an unlabelled image:

    who             reads                                       gives
    STUDENT         x                                           loss x, with the mask y
    EMA TEACHER     w                                           pseudo-labels and their confidence
    FROZEN CLIP     w                                           labels from the words of the classes
    STUDENT         s1, s2: w recoloured; with p = 1/2 a box    losses s1, s2, with the labels of w;
                    shows another image (CutMix)                in the box, those of that image
    STUDENT         w, half of the feature channels off (fp)    loss fp, with the labels of w

Two things are not the published method. The EMA teacher is our addition: the authors' student
makes its own pseudo-labels (`--ema 0`). And their CutMix box shows another crop of the same image,
for which we have no option. .github/DIFFERENCES.md lists all differences. The paper reports 84.0
mIoU on VOC with 92 masks, 6.1 above the best before it. We did not repeat that run, and nothing
here has run on a GPU.

    python semivl.py                                      the built-in toy world: minutes on a CPU
    python semivl.py --dataset FOLDER --labels 8          your own images (section 7)
    python semivl.py --dataset voc --labels 92            published data, schedule, test protocol
    python semivl.py --resume runs/voc-92                 resumes a run that was stopped
    python semivl.py --eval runs/voc-92/last.pt           IoU per class
    python semivl.py --predict runs/voc-92/last.pt a.jpg  mask and overlay of any image

The paper's ideas (the last one comes from UniMatch, Yang et al., CVPR 2023):

    class definitions: several words for a class         section 2    describe_classes
    CLIP as pre-training, an embedding for every patch   section 3    DenseCLIP
    spatial fine-tuning: attention and positions train   section 4    spatial_fine_tuning
    language-guided decoder: from similarity to mask     section 5    LanguageGuidedDecoder
    dense CLIP guidance: frozen CLIP also labels w       section 6    FrozenGuidance
    consistency: w's labels hold in harder views of w    sections 7, 8  STRONG_VIEWS, training_step

Sections 2 to 8 are the method; `training_step` is the table further up as code. For the method
alone stop at section 9: the rest makes a program of it. `pytest -k equal` compares forward pass,
losses and norms of gradients with numbers that the authors' code computed.

The toy world, which data_prep.py paints, has 900 scenes of 96 x 96 pixels: two to four of ten
things (car, cat, castle, ...) on one of four grounds. Its tiny CLIP has learned from 16,000 other
paintings with captions. With 4 masks SemiVL reaches 70.7 mIoU there. "Toy world" in a section says
how many points of mIoU its idea adds, mean (sd) over five or ten seeds. Where the sd is as large as
the mean, the toy world cannot tell.

Letters for shapes, in every comment: B images, N classes, K concepts, H x W image, P patch side,
gh x gw patches (H/P, W/P rounded up), T = 1 + gh*gw tokens, D width of the ViT, E width of CLIP's
joint space of images and text, C channels of one class's map. With ViT-B/16 at crop 512 these are
P = 16, gh = gw = 32, T = 1025, D = 768, E = 512, C = 128; VOC has N = 21 and K = 98. In prose x is
the labelled image; inside a module `x` is whatever features flow through it.
"""

import argparse
import contextlib
import copy
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import open_clip
import timm  # comes with open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm


# 1. Settings: what can be chosen, and what did the paper choose for each data set? ----------------
@dataclasses.dataclass
class Config:
    # Every field is an option of the command line: `vit_lr` is --vit-lr; a bool is on or off. The
    # defaults are VOC's. PRESETS lists what differs for the other data sets. An option that you
    # type wins over both. A checkpoint keeps the settings, so nobody types them twice.
    # Data
    dataset: str = "voc"  # voc, coco, ade20k, cityscapes, toy or FOLDER; if none is typed: toy
    labels: int = 92  # how many images are labelled; all others of train.txt are used without mask
    crop: int = 512  # side of the training crop and of the test window, pixels
    fit: bool = True  # short side -> crop (training: crop * scale); off: own size (times scale)
    scale_min: float = 0.5  # smallest factor of the random scale
    scale_max: float = 2.0  # largest factor of the random scale
    workers: int = 4  # processes that load images, one per CPU core at most; 0: none but the main
    # Networks
    clip: str = "ViT-B-16-quickgelu"  # a plain ViT CLIP of open_clip; toy; or local-dir:FOLDER
    clip_weights: str = "openai"  # a tag of open_clip's pretrained weights, FILE, or none: random
    authors_clip: bool = False  # GELU, eps and colour statistics as the authors have them
    decoder: Literal["language", "vision"] = "language"  # vision: DeepLabV3+
    decoder_channels: int = 128  # C of the language decoder; its other widths are parts of it
    decoder_text: Literal["names", "mean"] = "names"  # text of a class: name, or mean of concepts
    definitions: bool = True  # use a class's concepts (section 2); off: its name instead
    finetune: Literal["spatial", "all", "none"] = "spatial"  # what trains in the ViT (section 4)
    conv_skip: bool = False  # take the shallow skip from a ResNet-101 stem (Cityscapes)
    # Losses (section 8)
    unlabelled: bool = True  # use the unlabelled images
    conf_thresh: float = 0.95  # lowest confidence of a pseudo-label that counts (weighting "pixel")
    weighting: Literal["pixel", "mean"] = "pixel"  # consistency_loss explains them
    guidance: float = 0.1  # weight of frozen CLIP's losses (section 8: lambda); falls to 0
    guidance_conf_thresh: float = 0.9  # lowest confidence of frozen CLIP's labels
    # 0.996 averages over about 1 / (1 - 0.996) = 250 steps; a short run needs a smaller decay.
    ema: float = 0.996  # decay of the EMA teacher; 0: the student teaches itself
    # Optimisation. Gradients of several forwards, a micro-batch each, add up before a step.
    steps: int = 0  # optimiser steps; 0: as many as --epochs has
    epochs: int = 80  # passes over the unlabelled images
    batch: int = 8  # labelled images per step, and as many unlabelled ones
    micro_batch: int = 2  # images per forward, of x, s1, s2 and fp each; should divide batch
    lr: float = 1e-3  # learning rate of the decoder
    vit_lr: float = 1e-6  # learning rate of the ViT, and of the stem of conv_skip
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16: autocast; auto: bf16 on CUDA only
    # Evaluation and the run
    window_mode: Literal["logits", "probabilities"] = "logits"  # see window_starts
    stride: int = 0  # stride of the test window, pixels; 0: 5/6 of the crop
    evals: int = 20  # evaluations during the run, at most
    save_every: int = 250  # steps between two saves of last.pt
    out: str = ""  # folder for what is written; '': runs/DATASET-LABELS, numbered if taken
    seed: int = 0  # for drawing labelled images, weights, order and augmentation
    device: str = "auto"  # auto, cuda, mps or cpu

    def __post_init__(self):
        # Settings of a checkpoint, or of Config(...) in Python, are not read by argparse.
        for name, kind in Config.__annotations__.items():
            value = getattr(self, name)
            choices = get_args(kind)
            require(not choices or value in choices, f"setting {name}: one of {choices}")
            require(isinstance(value, str) or value >= 0, f"setting {name}: not below 0")
        counts = "labels crop decoder_channels epochs batch micro_batch evals save_every"
        for name in counts.split():
            require(getattr(self, name) >= 1, f"setting {name}: at least 1")
        for name in "conf_thresh guidance_conf_thresh ema".split():
            require(0 <= getattr(self, name) <= 1, f"setting {name}: between 0 and 1")
        require(self.scale_min <= self.scale_max, "setting scale_min: above scale_max")
        require(self.stride <= self.crop, "setting stride: above crop, which leaves gaps")
        require(self.decoder_channels % 8 == 0, "setting decoder_channels: take a multiple of 8")
        require(self.seed < 10**9, "setting seed: below 10^9")  # see TrainingSet


PRESETS = {
    "voc": "",
    "coco": "--labels 232 --fit off --epochs 10 --micro-batch 1 --lr 4e-3 --vit-lr 4e-7",
    "ade20k": "--labels 158 --epochs 40 --micro-batch 1 --lr 4e-3 --vit-lr 4e-7",
    # Published: 240 epochs at 186 labels, 83,760 steps. With other numbers of labels the authors
    # change the epochs, so that the length stays within 0.3 % of it.
    "cityscapes": "--labels 100 --fit off --crop 801 --stride 534 --steps 83760 --micro-batch 1 "
    "--lr 5e-4 --vit-lr 5e-6 --conv-skip on --decoder-text mean --weighting mean "
    "--window-mode probabilities",
    # Found by trials on the toy's validation scenes: .github/LADDER.md.
    "toy": "--dataset toy --labels 4 --fit off --crop 96 --scale-min 0.8 --scale-max 1.25 "
    "--workers 0 --clip toy --decoder-channels 32 --conf-thresh 0.8 --guidance 0.5 "
    "--guidance-conf-thresh 0.8 --ema 0.98 --steps 300 --batch 2 --lr 2e-3 --vit-lr 3e-4 --evals 2",
}
IGNORE = 255  # "no label" in masks

# This process, and how many there are. (Some clusters set RANK and WORLD_SIZE without torchrun.)
torchrun = dist.is_available() and dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if torchrun else 0
WORLD = int(os.environ["WORLD_SIZE"]) if torchrun else 1
# disable=None: a bar only on a terminal. Processes above 0 never show one.
progress = partial(tqdm, disable=True if RANK else None, leave=False)


class UserError(ValueError):
    """A mistake in settings or files. `main` prints it as one line and no traceback."""


def require(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def blame(what):
    """Turns an error of its block into a UserError that begins with `what`, mostly a file. PIL,
    json and torch raise errors of any class for damaged files."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:
        reason = str(error) or repr(error)  # a MemoryError has no words
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror.lower()  # without the file, which `what` has
        # One line, the first sentence: torch's message goes on with advice to load unsafely.
        raise UserError(f"{what}: {' '.join(reason.split()).split('. ')[0]}") from error


def say(text: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    if RANK == 0:
        tqdm.write(text)


# 2. Language (paper: Class Definition Guidance): what is a class called, and what does it show? ---
# A class name alone can be a poor prompt: hardly any caption on the web says "background". So a
# class is defined by a list of concepts, for example
#     person: person, people, baby, face        background: building, grass, road, sky, tree, ...
# and frozen CLIP gives a pixel the class of the concept that fits best. VOC and Cityscapes have
# published lists; on COCO and ADE20K a class's only concept is its name.
# The decoder reads one vector per class: the embedding of its name, or (Cityscapes) the mean of its
# concepts. The decoder is trained, so a poor name costs it less.
# Toy world: if frozen CLIP reads names instead of definitions, mIoU falls by 8.3 (sd 4.6); without
# frozen CLIP it falls by 2.5 (sd 2.7). So poor words do more harm than no words.
@torch.no_grad()
def encode_text(clip: open_clip.CLIP, words: list[str]) -> torch.Tensor:
    """Text embeddings of "a photo of a WORD", [len(words), E], not normalised. Sets clip.eval()."""
    spoken = [word.replace("_", " ").strip() for word in words]  # traffic_light, _background_
    tokens = open_clip.tokenize([f"a photo of a {word}" for word in spoken], clip.context_length)
    return clip.eval().encode_text(tokens.to(clip.token_embedding.weight.device)).float()


class Words(NamedTuple):
    """What CLIP's text tower makes of the classes; vectors are L2-normalised."""

    decoder_text: torch.Tensor  # [N, E], what the decoder reads: names, or means (below)
    names: torch.Tensor  # [N, E], of the class names
    concepts: torch.Tensor  # [K, E], class after class
    sizes: list[int]  # how many concepts each class has


def describe_classes(clip, classes: dict[str, list], text_from="names", definitions=True) -> Words:
    """classes: name -> concepts. text_from: what the decoder reads, the class "names" or the "mean"
    of a class's concepts. definitions=False: the name is the only concept of each class."""
    names = encode_text(clip, list(classes))
    groups = list(classes.values()) if definitions else [[name] for name in classes]
    sizes = [len(group) for group in groups]
    concepts = encode_text(clip, sum(groups, []))
    text = names
    if text_from == "mean":  # the mean is taken BEFORE normalising, as the authors do
        text = torch.stack([group.mean(0) for group in concepts.split(sizes)])
    return Words(F.normalize(text), F.normalize(names), F.normalize(concepts), sizes)


# 3. Dense CLIP (paper: Vision-Language Pre-training): how do we get an embedding for every patch? -
# CLIP's image embedding is read from the class token. In the last block, attention takes a weighted
# mean of all tokens' VALUE vectors for it; a projection and the MLP follow, and the result was
# aligned with text. MaskCLIP (Zhou et al., ECCV 2022) found that a single patch's own value vector,
# through the same projection and MLP, lies close to the text of what the patch shows. This "value
# path" mixes no tokens: attention gives each its own value. Residual and MLP stay, and the context
# that this one block would have added is lost.
# The decoder also needs to know where things end. Two skip maps (shallow: of block 0, deep: of
# block 4 of 12) tell it: so early, a patch still describes its own pixels. The authors use value
# paths for these, too, and give no reason; our guess: attention would blur the maps further.
class LeanQuickGELU(nn.Module):
    """x sigmoid(1.702 x), as silu(1.702 x) / 1.702: one tensor is kept for the backward pass, not
    two. With VOC's settings a step on a CPU takes 37 % less time than by open_clip's QuickGELU."""

    def forward(self, x):
        return F.silu(1.702 * x).mul_(1 / 1.702)


def value_path(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A block of open_clip's ViT on tokens [B, T, D], each of which attends to itself alone."""
    attn = block.attn
    D = x.shape[-1]
    weight, bias = attn.in_proj_weight[2 * D :], attn.in_proj_bias[2 * D :]  # rows: q, k, values
    values = F.linear(block.ln_1(x), weight, bias)  # [B, T, D]
    x = x + block.ls_1(attn.out_proj(values))  # ls: layer scale
    return x + block.ls_2(block.mlp(block.ln_2(x)))


# Position embedding [1, T, D], new grid, old grid -> [1, T of the new grid, D], bicubic. The
# authors' weights were trained without antialiasing.
resize_position = partial(timm.layers.resample_abs_pos_embed, antialias=False)


class DenseCLIP(nn.Module):
    """The visual tower of a plain ViT of open_clip, as an encoder of patches.
    visual: `open_clip.create_model(...).visual`, which is kept and modified: it serves one
    DenseCLIP. grid: (gh, gw) at which the position embedding trains; other image sizes interpolate
    from it. authors: exact GELU and LayerNorm eps 1e-6, with which the authors tuned OpenAI's
    weights; OpenAI had QuickGELU and 1e-5."""

    def __init__(self, visual, grid=None, authors=False):
        super().__init__()
        self.visual = visual
        self.patch = visual.conv1.kernel_size[0]
        self.skip_blocks = (0, len(visual.transformer.resblocks) // 3)  # 0 and 4 of 12
        self.width, self.embed_dim = visual.proj.shape
        self.grid = grid or visual.grid_size
        position = resize_position(visual.positional_embedding[None], self.grid, visual.grid_size)
        visual.positional_embedding = nn.Parameter(position[0].detach())  # [T, D]
        for module in visual.modules():
            if authors and isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
            if isinstance(getattr(module, "gelu", None), open_clip.transformer.QuickGELU):
                module.gelu = nn.GELU() if authors else LeanQuickGELU()
        mean = getattr(visual, "image_mean", open_clip.OPENAI_DATASET_MEAN)
        std = getattr(visual, "image_std", open_clip.OPENAI_DATASET_STD)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor):
        """Images [B, 3, H, W] in [0, 1] -> dense embedding [B, E, gh, gw], L2-normalised over E,
        and the skip maps (shallow, deep), [B, D, gh, gw] each."""
        vit = self.visual
        H, W = images.shape[-2:]
        missing = (0, -W % self.patch, 0, -H % self.patch)  # to whole patches: right, below
        x = vit.conv1(F.pad((images - self.mean) / self.std, missing))
        B, _, gh, gw = x.shape  # [B, D, gh, gw]
        x = x.flatten(2).transpose(1, 2)  # [B, gh*gw, D]
        # Under autocast x is bf16, and parameters stay float32.
        x = torch.cat([vit.class_embedding.to(x.dtype).expand(B, 1, -1), x], dim=1)  # [B, T, D]
        position = resize_position(vit.positional_embedding[None], (gh, gw), self.grid)
        x = vit.ln_pre(x + position.to(x.dtype))

        def to_map(tokens):  # [B, T, .] -> [B, ., gh, gw]; the class token is dropped
            return tokens[:, 1:].transpose(1, 2).unflatten(2, (gh, gw))

        *blocks, last = vit.transformer.resblocks
        skips = []  # shallow, deep: [B, D, gh, gw] each
        for i, block in enumerate(blocks):
            if i in self.skip_blocks:  # a side branch; the block itself follows
                skips.append(to_map(value_path(block, x)))
            x = block(x)  # [B, T, D]
        dense = to_map(vit.ln_post(value_path(last, x)) @ vit.proj)  # [B, E, gh, gw]
        return F.normalize(dense, dim=1), skips


# 4. Spatial fine-tuning: which weights may learn without making CLIP forget? ----------------------
# CLIP has learned from whole images, so it is poor at saying where things are. Attention and the
# position embedding decide that, so they train. MLPs are thought to store knowledge, so they stay
# as they are, and with them norms, class token, patch convolution and final projection.
# Toy world: training all of the ViT adds 1.2 (sd 1.8), training none of it 0.7 (sd 1.3): no clear
# difference.
def spatial_fine_tuning(clip: DenseCLIP, mode: str = "spatial") -> None:
    """Sets what trains in the ViT: "spatial" (29.1 of 86.8 million parameters of ViT-B/16 at crop
    512), "all" or "none". To be called before `make_optimizer`, which reads it."""
    for name, tensor in clip.named_parameters():
        spatial = ".attn." in name or name.endswith("positional_embedding")
        tensor.requires_grad_(mode == "all" or (mode == "spatial" and spatial))


# 5. Decoders (paper: Language-Guided Decoder): how does "similar to this text" become a mask? -----
# A usual decoder ends in N filters, each learned from the few masks that show its class. Here the
# decoder's batch has B*N items, one per image and class: a map of one channel, the similarity of
# every patch to the class's text. The same weights clean up the map of any class, so they learn
# from all classes and work for any number of them. The price is N times the convolutions.
# The decoder has 2.2 million parameters, whatever N is; ViT-B/16 has 87 million.
# Toy world: trained on labelled images alone, it is 7.8 (sd 5.8) better than DeepLabV3+. With
# consistency and guidance on, DeepLabV3+ is 3.1 (sd 3.4) better. Our guess: shapes are so simple
# there that unlabelled images teach them without words.
def cosine_maps(dense: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of places and texts: dense [B, E, gh, gw], text [N, E] -> [B, N, gh, gw].
    Normalises both (feature dropout, section 6, changes lengths), in float32 even under autocast:
    bf16 rounds a cosine of 0.3 by up to 0.001, which FrozenGuidance's factor 100 turns into 0.1."""
    with torch.autocast(dense.device.type, enabled=False):
        dense = F.normalize(dense.float(), dim=1)
        text = F.normalize(text.float(), dim=1)
        return torch.einsum("behw,ne->bnhw", dense, text)


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of about 16 channels. It normalises each map by itself, so the maps of a batch (images
    and classes) do not change each other, and small micro-batches do no harm."""
    groups = math.gcd(max(1, channels // 16), channels)  # 8 for 128; it has to divide channels
    return nn.GroupNorm(groups, channels)


# conv_norm_relu(c_in, c_out, kernel, dilation=...): convolution that keeps the size, norm, ReLU
conv_norm_relu = partial(Conv2dNormActivation, norm_layer=group_norm)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (DeepLab): one map seen at five fields of view, a branch of
    `width` channels each. [., c_in, gh, gw] -> [., width, gh, gw]. A 3 x 3 convolution of dilation
    18 reaches 18 patches to each side, so it spans more than the 32 patches of a crop."""

    def __init__(self, c_in: int, width: int, layer=conv_norm_relu):
        super().__init__()
        self.branches = nn.ModuleList([layer(c_in, width, 1)])
        self.branches += [layer(c_in, width, 3, dilation=dilation) for dilation in (6, 12, 18)]
        self.pooled = layer(c_in, width, 1)
        self.project = layer(5 * width, width, 1)

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
        maps = pooled.unflatten(0, (B, N)).permute(0, 3, 4, 1, 2)  # [B, ph, pw, N, C]
        # The text tells the layer which class a token is. Of the 2C channels that it returns, the
        # text's half is dropped: the next layer gets the same text again.
        tokens = torch.cat([maps, text.expand_as(maps)], dim=4)  # [B, ph, pw, N, 2C]
        attended = self.layer(tokens.flatten(0, 2)).view_as(tokens)[..., :C]  # [B, ph, pw, N, C]
        coarse = attended.permute(0, 3, 4, 1, 2).flatten(0, 1)  # [B*N, C, ph, pw]
        refined = F.interpolate(coarse, (gh, gw), mode="bilinear", align_corners=True)
        return x + refined.unflatten(0, (B, N))  # second residual: the layer has its own


class UpStage(nn.Module):
    """Doubles the resolution of x, appends its image's skip, which all classes share, and convolves
    twice. x [B*N, c_in, a, b], skip [B, c_skip, ., .] -> [B*N, c_out, 2a, 2b]."""

    def __init__(self, c_in: int, c_skip: int, c_out: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_in - c_skip, 2, stride=2)
        # Six layers in one list, as in the authors' checkpoints.
        self.conv = nn.Sequential(*conv_norm_relu(c_in, c_out, 3), *conv_norm_relu(c_out, c_out, 3))

    def forward(self, x, skip):
        # c_in - c_skip channels: with the skip's c_skip appended, the convolution reads c_in.
        up = self.up(x)  # [B*N, c_in - c_skip, 2a, 2b]
        skip = F.interpolate(skip, up.shape[2:], mode="bilinear", align_corners=True)  # 2a x 2b
        N = len(up) // len(skip)
        skip = skip.repeat_interleave(N, dim=0)  # [B*N, c_skip, 2a, 2b]
        return self.conv(torch.cat([up, skip], dim=1))


class LanguageGuidedDecoder(nn.Module):
    """Similarity maps -> spatial reasoning -> semantic reasoning -> upsampling.
    embed_dim: E. shallow_dim, deep_dim: channels of the skips. C: should be a multiple of 8.
    shallow_width: channels of the shallow skip once projected, by default C/8."""

    def __init__(self, embed_dim, shallow_dim, deep_dim, C=128, shallow_width=None):
        super().__init__()
        width = shallow_width or C // 8
        self.lift = nn.Conv2d(1, C, 7, padding=3)
        self.aspp = ASPP(C, C)
        self.text_proj = nn.Sequential(nn.Linear(embed_dim, C), nn.ReLU())
        self.semantic = nn.ModuleList([SemanticReasoning(C), SemanticReasoning(C)])
        self.deep_proj = nn.Sequential(nn.Conv2d(deep_dim, C // 4, 3, padding=1), nn.ReLU())
        self.shallow_proj = nn.Sequential(nn.Conv2d(shallow_dim, width, 3, padding=1), nn.ReLU())
        self.up1 = UpStage(C, C // 4, C // 2)
        self.up2 = UpStage(C // 2, width, C // 4)
        self.head = nn.Conv2d(C // 4, 1, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # in which these convolutions are faster

    def forward(self, dense, skips, text):
        """dense [B, E, gh, gw]; skips (shallow, deep), [B, shallow_dim or deep_dim, any, any]; text
        [N, E] -> logits [B, N, 4gh, 4gw]."""
        shallow, deep = skips
        similarity = cosine_maps(dense, text)  # [B, N, gh, gw]

        # Spatial reasoning, within each class.
        x = self.lift(similarity.flatten(0, 1).unsqueeze(1))  # [B*N, 1, gh, gw] -> [B*N, C, gh, gw]
        x = (x + self.aspp(x)).unflatten(0, similarity.shape[:2])  # [B, N, C, gh, gw]

        # Semantic reasoning, across classes, all at once.
        text = self.text_proj(F.normalize(text, dim=1))  # [N, C]
        for layer in self.semantic:
            x = layer(x, text)  # [B, N, C, gh, gw]

        # Upsampling, within each class.
        maps = self.up1(x.flatten(0, 1), self.deep_proj(deep))  # [B*N, C/2, 2gh, 2gw]
        maps = self.up2(maps, self.shallow_proj(shallow))  # [B*N, C/4, 4gh, 4gw]
        return self.head(maps).view(*x.shape[:2], *maps.shape[2:])


class VisionDecoder(nn.Module):
    """The baseline without language: DeepLabV3+ at patch resolution on the same ViT.
    Logits [B, N, gh, gw]; text and shallow skip are ignored. Batch norm: to train it, B > 1."""

    def __init__(self, embed_dim: int, skip_dim: int, num_classes: int, width: int = 64):
        super().__init__()
        layer = Conv2dNormActivation  # its norm is batch norm
        self.aspp = ASPP(embed_dim, width, layer)
        self.skip_proj = layer(skip_dim, 48, 1)
        self.fuse = nn.Sequential(layer(48 + width, 256, 3), layer(256, 256, 3))
        self.head = nn.Conv2d(256, num_classes, 1)

    def forward(self, dense, skips, text=None):
        alone = self.training and len(dense) == 1
        require(not alone, "batch norm needs two images: even --batch and --micro-batch")
        x = torch.cat([self.skip_proj(skips[1]), self.aspp(dense)], dim=1)  # [B, 48+width, gh, gw]
        return self.head(self.fuse(x))


# 6. Three networks: student, frozen CLIP (paper: Dense CLIP Guidance), EMA teacher ----------------
# Who tells the student what to say where there is no mask? The teacher gets better, but it learns
# from the student, so it can confirm the student's mistakes. Frozen CLIP is coarse, but constant.
# Toy world: frozen CLIP adds 2.5 (sd 2.7), the EMA teacher (UniMatch V2 has one) 0.1 (sd 1.0).
def drop_channels(features: torch.Tensor, count: int) -> torch.Tensor:
    """UniMatch's feature perturbation of the last `count` items of a batch [B, ., gh, gw]: each
    channel becomes 0 with p = 1/2, else it doubles. Recolouring changes the image; this changes the
    features. The student has to predict the same labels from about half of its channels."""
    kept, perturbed = features.split([len(features) - count, count])
    return torch.cat([kept, F.dropout2d(perturbed, 0.5)])  # drops in eval mode, too


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
            maps = dense, shallow, deep
            dense, shallow, deep = (drop_channels(features, num_perturbed) for features in maps)
        logits = self.decoder(dense, (shallow, deep), self.text)  # [B, N, 4gh, 4gw]; vision: gh, gw
        # If H or W is no multiple of P, the logits cover the padded image. They are resized to
        # H x W as a whole, so they shift by less than a patch. The authors' code does so, too.
        return F.interpolate(logits.float(), images.shape[2:], mode="bilinear", align_corners=False)


class FrozenGuidance(nn.Module):
    """CLIP as it was before SemiVL's first step, as a zero-shot classifier of pixels.
    clip: images -> (dense [B, E, gh, gw], ...), such as DenseCLIP(visual).eval(); in training
    `frozen_copy(student.clip)`: this class itself freezes nothing. concepts: [K, E] of text, class
    after class. sizes: concepts per class; their sum is K. conf_thresh: less sure labels become
    IGNORE."""

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


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode that gets no gradients."""
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, step: int, decay: float = 0.996) -> None:
    """Mean teacher: a `frozen_copy` of the student that becomes its exponential moving average,
    teacher = decay * teacher + (1 - decay) * student, after optimiser step `step` (from 0). It
    labels crops w: averaging smooths out the mistakes of single steps. It is also what is evaluated
    (as in UniMatch V2). In the first steps the decay is 0, 1/2, 2/3, ...: until it reaches `decay`,
    the teacher is the plain mean of the students after each step."""
    decay = min(1 - 1 / (step + 1), decay)
    for average, p in zip(teacher.parameters(), student.parameters(), strict=True):
        average.lerp_(p, 1 - decay)
    for average, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        if WORLD > 1:  # each process has batch-norm statistics of its own
            dist.broadcast(buffer, 0)
        average.copy_(buffer)  # constants, and those statistics: moving averages already


# 7. Data: a folder of images; crops of them in weak and strong views (UniMatch's) -----------------
# Every data set, published or your own, is one canonical folder. data_prep.py makes one from what
# you have, and `python data_prep.py FOLDER` checks one that you wrote by hand:
#     FOLDER/dataset.json      {"classes": ["sky", "car"], "definitions": {"car": ["car", "van"]}};
#                              definitions are optional. For a class with a list CLIP uses the list
#                              alone: put the name into it if the name should count as well
#     FOLDER/splits/train.txt  an image per line: "IMAGE MASK", or "IMAGE" if it has no mask; a TAB
#                              after IMAGE if a name has blanks; paths are relative to FOLDER
#     FOLDER/splits/val.txt    "IMAGE MASK". Optional: splits/test.txt, splits/8/labeled.txt
# A mask is a PNG whose pixels are class numbers, 0 for the first of "classes", or 255: no label. It
# is as large as its image, turned upright. An entry is the pair (image, mask or None) of a line.
#
# A labelled image gives a crop x of random scale, with its mask y. An unlabelled one gives a crop
# w, the weak view; s1 and s2 are w recoloured, nothing in them moves. So a label of a pixel in w
# is also the label of this pixel in s1 and s2. (CutMix, which moves pixels, is in section 8.)
def read_image(file: Path) -> Image.Image:
    """Any image file -> RGB, turned upright as its EXIF orientation says."""
    with blame(file), Image.open(file) as image:
        deep = image.mode.startswith(("I", "F"))  # PIL would cut values above 255
        require(not deep, f"mode {image.mode}; save it with 8 bits")
        return ImageOps.exif_transpose(image).convert("RGB")


def read_mask(file: Path, num_classes: int, size: tuple) -> torch.Tensor:
    """A PNG of class numbers, as large as its image, (width, height) -> uint8 [H, W]."""
    with blame(f"{file} (python data_prep.py FOLDER tells more)"), Image.open(file) as image:
        # PIL stretches grey of 2 or 4 bits to 0 ... 255; such a file has a raw mode like "L;4".
        exact = image.mode in ("P", "I;16") or (image.mode == "L" and image.tile[0][3] == "L")
        require(exact and image.format == "PNG", "no PNG of class numbers, grey or palette, 8 bits")
        require(image.size == size, f"{image.size} pixels, but its image has {size} upright")
        mask = np.array(image)
        odd = mask[(mask >= num_classes) & (mask != IGNORE)].tolist()
        require(not odd, f"{len(odd)} pixels, such as {odd[:1]}, are neither a class nor 255")
        return torch.from_numpy(mask.astype(np.uint8))


def read_list(file: Path, need_mask: bool = True) -> list[tuple]:
    """Lines of a list -> entries."""
    # utf-8-sig drops the byte-order mark of Windows' editors; paths may have its backslashes.
    with blame(file):
        text = file.read_text("utf-8-sig").replace("\\", "/")
    entries = []
    for line in filter(str.strip, text.splitlines()):
        image, _, mask = line.strip().partition("\t" if "\t" in line else " ")
        require(mask or not need_mask, f"{file}: {line!r} names no mask")
        # Without a dot it is half of a name. (Half of "IMG.2 x.jpg" is not noticed here.)
        whole = "." in Path(image).name or "\t" in line
        require(whole, f"{file}: {line!r}: put a TAB after a name that has blanks")
        entries.append((image.strip(), mask.strip() or None))
    require(entries, f"{file}: no line in it")
    return entries


class Folder:
    """A data set on disk. classes: name -> concepts, in the order of class numbers. train, val,
    test: entries; those of train may lack a mask, and test may be empty."""

    def __init__(self, path: Path):
        self.path = path
        file = path / "dataset.json"
        with blame(f"{file} (of the folder that --dataset names)"):
            content = json.loads(file.read_text("utf-8-sig"))
            # Other programs write these keys, and masks with other values than class numbers.
            old = {"colors", "ignore_index"} & {*content}
            require(not old, f"{old}: python data_prep.py NEW --images {path} converts the masks")
            names = content.get("classes", [])
            definitions = content.get("definitions", {})
            self.classes = {name: definitions.get(name, [name]) for name in names}
            different = len(self.classes) == len(names)
            require(different and 2 <= len(names) <= IGNORE, "needs 2 to 255 different classes")
            other = {*definitions} - {*names}
            require(not other, f"definitions: {other} are no classes")
            for words in (names, *self.classes.values()):
                listed = isinstance(words, list) and all(isinstance(word, str) for word in words)
                require(listed and words, f"{words} should be a list of words in quotes")
        self.train = read_list(path / "splits/train.txt", need_mask=False)
        self.val = read_list(path / "splits/val.txt")
        test = path / "splits/test.txt"
        self.test = read_list(test) if test.exists() else []

    def pair(self, entry: tuple) -> tuple[Image.Image, torch.Tensor]:
        """The image of an entry, and its mask, uint8 [H, W]."""
        image = read_image(self.path / entry[0])
        return image, read_mask(self.path / entry[1], len(self.classes), image.size)


def open_data(dataset: str) -> Folder:
    """The folder behind --dataset. A named set is data/NAME, and made if it is not there."""
    path = Path("data", dataset) if dataset in PRESETS else Path(dataset)
    if dataset in PRESETS and not path.exists():
        require(WORLD == 1, f"{path} is missing: first run python data_prep.py {dataset}")
        with blame(f"{path} is missing, and so is data_prep.py, which makes it"):
            import data_prep
        require(data_prep.main([dataset]) == 0, f"{path} could not be made")
    return Folder(path)


def count_pixels(folder: Folder, entries: list[tuple]) -> torch.Tensor:
    """How many pixels of each value the masks have, [len(entries), 256]."""
    masks = (folder.pair(entry)[1] for entry in progress(entries, "look at masks"))
    return torch.stack([mask.flatten().bincount(minlength=IGNORE + 1) for mask in masks])


def draw_labelled(folder: Folder, count: int, seed: int) -> list[tuple]:
    """The labelled entries: those of splits/COUNT/labeled.txt, or `count` drawn from train.txt. A
    small draw may lack a class: of 100 draws the one whose masks show most classes is taken.
    This looks at masks that then count as unknown: a benchmark should fix its images in a list."""
    file = folder.path / f"splits/{count}/labeled.txt"
    if file.exists():
        return read_list(file)
    masked = [entry for entry in folder.train if entry[1]]
    require(count <= len(masked), f"--labels {count}: {len(masked)} images of train.txt have masks")
    shows = count_pixels(folder, masked)[:, :IGNORE] > 0  # [masks, 255]
    rng = np.random.default_rng(seed)
    draws = [rng.choice(len(masked), count, replace=False) for _ in range(100)]
    shown = [int(shows[draw].any(0).sum()) for draw in draws]  # how many classes each draw shows
    best = draws[shown.index(max(shown))]
    return [masked[i] for i in best]


def check_labelled(folder: Folder, labelled: list[tuple]) -> None:
    """Prints how many labelled pixels each class has. UserError if fewer than two classes do."""
    pixels = count_pixels(folder, labelled).sum(0)  # [256]
    say("labelled pixels:")
    for number, name in [*enumerate(folder.classes), (IGNORE, "no label")]:
        say(f"  {name:22}{pixels[number]:>16,}")
    both = {image for image, _ in labelled} & {image for image, _ in folder.val + folder.test}
    if both:
        say(f"note: {len(both)} labelled images are validation or test images, too: {min(both)}")
    enough = (pixels[:IGNORE] > 0).sum() > 1
    require(enough, f"{folder.path}: masks of 2 classes are needed (255 is no label, not class 1)")


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(height, width) times scale, rounded half up; not below one pixel."""
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def uniform(low: float, high: float) -> float:
    """A random number. Augmentation draws from torch's generator alone: TrainingSet seeds it."""
    return float(torch.empty(()).uniform_(low, high))


def random_size(height: int, width: int, cfg: Config) -> tuple[int, int]:
    """A random (height, width) of the same aspect. With `fit`: draw r from [scale_min, scale_max].
    The short side becomes crop * r, or less if the long side would be above 4 * crop * r. (Paper:
    512 r and 2048 r. At r = 1, 375 x 500 becomes 512 x 683.) Without `fit`: the image's own size
    times a random factor from [scale_min, scale_max]."""
    long, short = max(height, width), min(height, width)
    if cfg.fit:
        r = uniform(cfg.scale_min, cfg.scale_max)
        scale = min(int(4 * cfg.crop * r) / long, int(cfg.crop * r) / short)
    else:
        low, high = int(cfg.scale_min * long), int(cfg.scale_max * long)
        scale = int(torch.randint(low, high + 1, ())) / long
    return scaled_size(height, width, scale)


def scale_crop_flip(image: Image.Image, mask: torch.Tensor, cfg: Config):
    """Random scale, crop, flip of an image and its mask [H, W] -> image and mask of crop x crop.
    A small image is padded at the right and bottom before the flip: black, IGNORE in the mask."""
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
    return image.filter(ImageFilter.GaussianBlur(uniform(0.1, 2.0)))


# PIL image -> recoloured, perhaps blurred; nothing moves. A labelled crop x is not recoloured: the
# student has to see some images as they are at test time.
jitter = v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25)
recolour = v2.RandomApply([jitter], 0.8)
strong_view = v2.Compose([recolour, v2.RandomGrayscale(0.2), v2.RandomApply([blur], 0.5)])
# To add a view, add an entry. It must not move pixels. Its name must not be one that an item ("x",
# "w", "y", ...) or the log ("kept", "lr", ...) has already.
STRONG_VIEWS = {"s1": strong_view, "s2": strong_view}


def cutmix_box(size: int) -> torch.Tensor:
    """A random box (top, left, bottom, right) in a crop of size x size; empty with p = 0.5. A box
    that is not empty has a fifth of the crop's area on average."""
    if torch.rand(()) < 0.5:
        return torch.zeros(4, dtype=torch.long)
    area = uniform(0.02, 0.4) * size * size
    while True:  # the area stays: drawing it anew would favour small boxes
        ratio = uniform(0.3, 1 / 0.3)
        width, height = int(math.sqrt(area / ratio)), int(math.sqrt(area * ratio))
        top, left = torch.randint(size, (2,)).tolist()
        if left + width <= size and top + height <= size:
            return torch.tensor([top, left, top + height, left + width])


class TrainingSet(Dataset):
    """Item i: the i-th labelled and the i-th unlabelled image of the whole run; i does not start
    again with an epoch. Keys: x uint8 [3, crop, crop]; y uint8 [crop, crop]; files, a string; with
    cfg.unlabelled also w, s1, s2 uint8 [3, crop, crop]; padding bool [crop, crop]; s1_box, s2_box
    int64 [4]. An item depends on (seed, i) alone, so a run is the same with any number of workers
    and however often it is resumed."""

    def __init__(self, folder: Folder, labelled: list, cfg: Config):
        self.folder, self.labelled, self.cfg = folder, labelled, cfg
        taken = {image for image, _ in labelled}  # an image is labelled or unlabelled, not both
        self.unlabelled = [entry for entry in folder.train if entry[0] not in taken]
        require(self.unlabelled or not cfg.unlabelled, "no image is unlabelled: --unlabelled off")

    def pick(self, entries: list, i: int) -> tuple:
        """Entry i of a list that is repeated without end and shuffled anew each time. So 92
        labelled images come round 114 times while VOC's 10,490 other images come round once."""
        epoch, place = divmod(i, len(entries))
        which = int(entries is self.labelled)  # so that lists of equal length differ in their order
        rng = np.random.default_rng((self.cfg.seed, which, epoch))
        return entries[rng.permutation(len(entries))[place]]

    def __getitem__(self, i: int) -> dict:
        cfg = self.cfg
        # x is drawn first, then w, the views, the boxes: a further view changes boxes only.
        torch.manual_seed(cfg.seed * 10**9 + i)
        entry = self.pick(self.labelled, i)
        x, y = scale_crop_flip(*self.folder.pair(entry), cfg)
        item = dict(x=VF.pil_to_tensor(x), y=y, files=entry[0])
        if cfg.unlabelled:
            entry = self.pick(self.unlabelled, i)
            image = read_image(self.folder.path / entry[0])
            # A crop does not show where it was padded. So a mask of zeros is cropped with it; it
            # comes back with IGNORE there, and nowhere else.
            marker = torch.zeros(image.height, image.width, dtype=torch.uint8)
            w, marker = scale_crop_flip(image, marker, cfg)
            item["w"] = VF.pil_to_tensor(w)
            item["padding"] = marker == IGNORE
            item["files"] += f" {entry[0]}"
            for name, view in STRONG_VIEWS.items():
                item[name] = VF.pil_to_tensor(view(w))
            for name in STRONG_VIEWS:
                item[f"{name}_box"] = cutmix_box(cfg.crop)
        return item


# 8. Consistency (UniMatch, Yang et al., CVPR 2023): what about an image without a mask? -----------
# Recolouring an image does not change its mask. So each unlabelled image gets two label maps, made
# from its weak view w, and the student has to predict them in views that are harder to recognise:
#     total = 1/2 [L_x + 1/2 (L_s + L_fp)] + lambda * 1/2 (G_s + G_fp)
#     L_x         cross-entropy of the labelled crop x with its mask
#     L_s, L_fp   with the teacher's labels, where its confidence is >= --conf-thresh (Cityscapes:
#                 every pixel counts, times the mean confidence of its image)
#     G_s, G_fp   with frozen CLIP's labels, where its confidence is >= --guidance-conf-thresh
#     s           in w recoloured, with CutMix: the mean over the two views s1 and s2
#     fp          in w with half of the feature channels off
#     lambda      --guidance * (1 - step / steps)
# Why two strong views? They are drawn independently and have the same labels, except in their
# CutMix boxes. So the student also learns that they show the same.
# The trap is confirmation bias: the student learns wrong pseudo-labels, and the teacher follows the
# student. So unsure ones are dropped (or their image counts less), and frozen CLIP, which never
# follows, adds an opinion of its own. Its labels have coarse borders, so lambda falls to 0.
# Toy world: L_s and L_fp add 7.9 (sd 3.8), then G adds 2.5 (sd 2.7). With G on and L_s, L_fp nearly
# off (--conf-thresh 1) the result is the same (+0.1, sd 0.4): there, either of them is enough.
def cutmix(items: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Pastes into each item what its partner has inside the item's box (CutMix, Yun et al., ICCV
    2019). The partner is the item at the mirrored place of the batch; the middle one of an odd
    batch is its own. (The authors': another crop of the same image.) items: [B, H, W] or [B, 3, H,
    W]; box: [B, 4]."""
    mixed = items.clone()
    for i, (top, left, bottom, right) in enumerate(box.tolist()):
        mixed[i, ..., top:bottom, left:right] = items[-1 - i, ..., top:bottom, left:right]
    return mixed


def consistency_loss(logits, label, confidence, conf_thresh=0.95, weighting="pixel"):
    """Cross-entropy with pseudo-labels. Each pixel's loss is multiplied by its weight; the sum over
    all pixels that are not padding is divided by their number. (Divided by the sum of the weights,
    an image with few confident pixels would count as much as one with many.) logits [B, N, H, W];
    label int64, IGNORE at padding, and confidence, [B, H, W] each. Weights: "pixel", 1 where
    confidence reaches conf_thresh, else 0; "mean", the image's mean confidence, after CutMix."""
    valid = label != IGNORE
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # [B, H, W]
    if weighting == "pixel":
        weight = (confidence >= conf_thresh).float()  # [B, H, W]
    else:
        pixels = valid.sum((1, 2), keepdim=True).clamp(min=1)
        weight = (confidence * valid).sum((1, 2), keepdim=True) / pixels  # [B, 1, 1]
    return (loss * weight).sum() / valid.sum().clamp(min=1)


def semivl_loss(logits, y, targets, guidance_weight, conf_thresh=0.95, weighting="pixel") -> dict:
    """The formula of section 8: "total", and its terms "x"; for each view "s1", "guidance_s1", ...
    logits: {"x": ..., "s1": ..., "s2": ..., "fp": ...}, [B, N, H, W] each. y: masks of x, int64 [B,
    H, W]. targets: view (not x) -> the teacher's label (padding: IGNORE), its confidence, frozen
    CLIP's label, [B, H, W] each; if {}, total is L_x. guidance_weight: lambda."""
    # L_x: the mean over known pixels; 0 if there is none.
    loss = F.cross_entropy(logits["x"], y, ignore_index=IGNORE, reduction="sum")
    losses = {"x": loss / (y != IGNORE).sum().clamp(min=1)}
    for view, (label, confidence, clip_label) in targets.items():
        losses[view] = consistency_loss(logits[view], label, confidence, conf_thresh, weighting)
        # Divided by ALL pixels, padding and those without a label of CLIP included: as published.
        loss = F.cross_entropy(logits[view], clip_label, ignore_index=IGNORE, reduction="sum")
        losses[f"guidance_{view}"] = loss / clip_label.numel()
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
    """bf16 for matrix products and convolutions. Losses stay in float32; on CUDA softmax and norms
    do, too. GPUs before Ampere lack bf16: --precision fp32."""
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def training_step(student, teacher, guidance, batch: dict, cfg: Config, step: int) -> dict:
    """One training step without the optimiser's part: label w; CutMix s1 and s2 with their labels;
    let the student predict x, s1, s2 and fp; losses; backward, which adds to the gradients. To save
    memory the student processes the batch in micro-batches.
    student: SemiVL, perhaps in DistributedDataParallel.
    teacher: images in [0, 1] -> logits [B, N, H, W], in eval mode, such as `frozen_copy(student)`.
    guidance: FrozenGuidance.
    batch: stacked items of TrainingSet on one device; images are uint8.
    cfg: its unlabelled, batch, micro_batch, precision, steps (not 0), seed, guidance, conf_thresh
    and weighting are read.
    step: from 0 to cfg.steps - 1. With cfg.seed it seeds torch's generator, a side effect.
    Returns the losses of `semivl_loss`, means over micro-batches, and "kept": the share of pixels
    that have a confident pseudo-label (without cfg.unlabelled only "x" and "total")."""
    device = batch["x"].device
    size = len(batch["x"])  # this process's share of cfg.batch
    images = {"x": batch["x"] / 255}  # view -> [size, 3, crop, crop], values in [0, 1]
    targets = {}  # view -> label, confidence, clip_label; [size, crop, crop] each
    losses = {}
    lam = cfg.guidance * (1 - step / cfg.steps)

    if cfg.unlabelled:
        # Teacher and frozen CLIP label the weak views.
        w = batch["w"] / 255
        padding = batch["padding"]
        with torch.no_grad(), autocast(cfg, device):
            confidence, label = teacher(w).softmax(1).max(1)  # [size, crop, crop]
            clip_label = guidance.labels(w)
        # Padding gets no label, as in masks.
        label = label.masked_fill(padding, IGNORE)
        clip_label = clip_label.masked_fill(padding, IGNORE)
        weak = label, confidence, clip_label
        sure = (confidence >= cfg.conf_thresh) & ~padding
        losses["kept"] = sure.sum() / (~padding).sum().clamp(min=1)

        # CutMix changes images and targets alike. It comes before the split into micro-batches, so
        # images find a partner with --micro-batch 1, too.
        for view in STRONG_VIEWS:
            box = batch[f"{view}_box"]
            images[view] = cutmix(batch[view] / 255, box)
            targets[view] = [cutmix(field, box) for field in weak]
        images["fp"] = w  # last, so that it is perturbed below
        targets["fp"] = weak

    # The student predicts all views of a micro-batch in one forward; losses; backward.
    micro = math.gcd(cfg.micro_batch, size)  # divides this process's share of the batch
    for start in range(0, size, micro):
        chunk = slice(start, start + micro)
        # With several processes only the last micro-batch exchanges gradients. This is a switch of
        # DistributedDataParallel; on a plain SemiVL it has no effect.
        student.require_backward_grad_sync = chunk.stop == size
        # Feature dropout has a seed for each step and micro-batch, so that a resumed run drops the
        # same channels. (TrainingSet seeds with cfg.seed * 10**9 + i; i is below half a billion.)
        first = step * cfg.batch + RANK * size + start
        torch.manual_seed(cfg.seed * 10**9 + 10**9 // 2 + first)
        # x, s1, s2, fp, one after the other: [views * micro, 3, crop, crop]
        pixels = torch.cat([image[chunk] for image in images.values()])
        with autocast(cfg, device):
            logits = student(pixels, num_perturbed=micro if targets else 0)  # "fp" comes last
        logits_of = dict(zip(images, logits.split(micro)))  # view -> [micro, N, crop, crop]
        targets_of = {view: [t[chunk] for t in fields] for view, fields in targets.items()}
        y = batch["y"][chunk].long()
        terms = semivl_loss(logits_of, y, targets_of, lam, cfg.conf_thresh, cfg.weighting)
        # Each micro-batch has divided by its own number of pixels, as each GPU of the authors does.
        # With padding the gradient is close to that of the whole batch, but not equal to it.
        share = micro / size
        (terms["total"] * share).backward()
        for name, loss in terms.items():
            losses[name] = losses.get(name, 0.0) + loss.detach() * share
    return losses


# 9. Evaluation: how good is a model? Sliding window, one confusion matrix, mIoU -------------------
# A ViT works best at the size of its training. So a test image is covered by overlapping windows of
# that size, and where they overlap, their scores are averaged. (VOC: 375 x 500 is resized to 512 x
# 683, which windows of 512 cover from columns 0 and 171 on.) mIoU is the mean over classes of
#     IoU = TP / (TP + FP + FN), counted in pixels over ALL images, not averaged over images.
def window_starts(size: int, window: int, stride: int, mode: str) -> list[int]:
    """Where windows start along a side of `size` pixels. The authors have two protocols. "logits":
    logits are averaged; if the last window would pass the edge, it moves back inside, so that all
    windows are whole (an image below the window's size is one window). "probabilities"
    (Cityscapes): probabilities are averaged, and a window that passes the edge is cut short."""
    if mode == "probabilities":
        return list(range(0, size, stride))
    last = max(size - window, 0)  # start of the last window: of size 683, window 512 it is 171
    return [min(start, last) for start in range(0, last + stride, stride)]


@torch.no_grad()
def sliding_window(model, images, window: int, stride: int, mode: str = "logits"):
    """Logits or probabilities [B, N, H, W] of the model (images -> logits), averaged over windows.
    images [B, 3, H, W]; window and stride in pixels, stride <= window."""
    H, W = images.shape[2:]
    total = None
    count = images.new_zeros(H, W)
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
    teacher and what `load_checkpoint` returns. IGNORE is never predicted."""
    size = (image.height, image.width)
    if cfg.fit:
        height, width = scaled_size(*size, cfg.crop / min(size))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    images = VF.pil_to_tensor(image)[None].to(device) / 255  # [1, 3, h, w]
    stride = cfg.stride or 5 * cfg.crop // 6
    with autocast(cfg, device):
        scores = sliding_window(model, images, cfg.crop, stride, cfg.window_mode)  # [1, N, h, w]
    # Scores are resized, since IoU is counted at the size of the mask and class numbers cannot be
    # interpolated. Aligned corners here, but not in SemiVL.forward: both as in the authors' code.
    best = torch.full(size, -math.inf, device=device)
    label = torch.zeros(size, dtype=torch.uint8, device=device)
    for n, score in enumerate(scores.split(1, dim=1)):  # all classes at once would need much memory
        score = F.interpolate(score, size, mode="bilinear", align_corners=True)[0, 0]  # [H, W]
        label = torch.where(score > best, n, label)
        best = best.maximum(score)
    return label


def confusion_matrix(prediction, target, num_classes: int) -> torch.Tensor:
    """Pixel counts [N, N], rows truth, columns prediction, of label maps; IGNORE is left out."""
    known = target != IGNORE
    truth, predicted = target[known].long(), prediction[known].long()
    # The pair (truth, predicted) as one number, so that one bincount counts all pairs.
    pairs = num_classes * truth + predicted
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def iou_per_class(matrix: torch.Tensor) -> torch.Tensor:
    """Confusion matrix [N, N] -> TP / (TP + FP + FN), percent [N]. NaN for a class without a pixel
    in truth and prediction; the mean leaves it out."""
    hit = matrix.diag().double()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)  # 0 / 0 is NaN


def evaluate(model, folder: Folder, entries: list, cfg: Config, device) -> torch.Tensor:
    """IoU per class [N], percent, of a model (images in [0, 1] -> logits) over entries. Images have
    different sizes, so they are predicted one by one."""
    N = len(folder.classes)
    matrix = torch.zeros(N, N, dtype=torch.long, device=device)
    for entry in progress(entries[RANK::WORLD], "evaluate"):  # this process's share
        image, mask = folder.pair(entry)
        matrix += confusion_matrix(segment(model, image, cfg, device), mask.to(device), N)
    if WORLD > 1:
        dist.all_reduce(matrix)
    return iou_per_class(matrix.cpu())


def report(models: dict, folder: Folder, cfg: Config, device) -> dict:
    """Prints IoU per class on the test images, else on validation; a column for each model.
    models: title -> model; returns title -> mIoU, percent."""
    split = "test" if folder.test else "val"
    entries = folder.test or folder.val
    columns = [evaluate(model, folder, entries, cfg, device) for model in models.values()]
    means = [float(iou.nanmean()) for iou in columns]
    say(f"IoU, {split}".ljust(20) + "".join(f"{title:>21}" for title in models))
    for name, *numbers in [*zip(folder.classes, *columns), ("mIoU", *means)]:
        say(f"{name:20}" + "".join(f"{number:21.1f}" for number in numbers))
    return dict(zip(models, means))


# 10. The run: how do steps become a trained model that can be stopped at any time? ----------------
# last.pt has the student, the teacher, the optimiser and the settings. It has neither the images
# nor frozen CLIP: to resume, images and CLIP's weights have to be where they were. An item of data
# depends on the seed and its number only; CutMix's partner also on --batch and the number of
# processes, feature dropout on these and --micro-batch. If they stay, a run that was stopped goes
# on as if it had not been, bit for bit (on a CPU; CUDA may add in another order).
# Under torchrun every process runs this file: item i goes to process i % WORLD, DDP averages the
# gradients, evaluation shares the images, and process 0 alone reports and writes the run.
def pick_device(name: str) -> torch.device:
    """For "auto" what torch finds (CUDA, Apple's MPS), else the CPU. Under torchrun each process
    takes the GPU of its LOCAL_RANK, and waits here for the others. (Not tried on any GPU.)"""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    if WORLD > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from now on this is "cuda"
        dist.init_process_group()
    with blame(f"--device {name}"):
        return torch.zeros(1, device=name).device  # a device that is not there fails here


def learning_rate(base: float, step: int, steps: int) -> float:
    """DeepLab's polynomial decay: base * (1 - (step - 1) / steps)^0.9. Step 0 has the base rate, as
    step 1 has: as published."""
    return base * (1 - max(step - 1, 0) / steps) ** 0.9


def make_optimizer(student: SemiVL, cfg: Config) -> torch.optim.AdamW:
    """AdamW with two rates: the decoder starts from nothing, the ViT must stay close to CLIP. AdamW
    moves a weight by about its rate in a step, whatever the size of the gradient. Weight decay is
    on everything that trains, norms and biases too, as in the authors' code."""
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    decoder = [p for name, p in trained.items() if name.startswith("decoder.")]
    # The stem of conv_skip is pretrained, so it has the low rate of the ViT, too.
    vit = [p for name, p in trained.items() if not name.startswith("decoder.")]
    groups = [dict(params=decoder, lr=cfg.lr), dict(params=vit, lr=cfg.vit_lr)]
    return torch.optim.AdamW(groups, weight_decay=0.01)


def free_folder(out: str, default: Path) -> Path:
    """OUT, which must not be there yet; if it is '', the first of DEFAULT, DEFAULT-2, DEFAULT-3,
    ... that is not there yet."""
    path = Path(out or default)
    number = 1
    while path.exists():
        require(not out, f"--out {out} already exists")
        number += 1
        path = default.with_name(f"{default.name}-{number}")
    return path


class Run:
    """A run's folder; process 0 alone writes. last.pt is of the last step; best.pt, of the best
    validation, has the teacher alone. modules: what is saved, by key: "student", "model" (the
    teacher), "optimizer". facts: what else the files have. saved: the content of last.pt, to go on
    from there."""

    def __init__(self, cfg: Config, modules: dict, facts: dict, saved: dict | None):
        self.modules, self.facts = modules, facts
        self.step = 0  # optimiser steps that are done
        self.best = -1.0  # validation mIoU
        self.path = Path(cfg.out)
        if saved:
            same = saved["images"] == facts["images"] and [*saved["classes"]] == [*facts["classes"]]
            require(same, f"{cfg.dataset}: its classes or images changed since the run began")
            self.step, self.best = saved["step"], saved["best"]
            with blame(f"{self.path}/last.pt does not fit the settings"):
                for key, module in modules.items():
                    module.load_state_dict(saved[key])
        if RANK > 0:
            return
        if not saved:
            name = f"{Path(cfg.dataset).resolve().name}-{cfg.labels}"
            self.path = free_folder(cfg.out, Path("runs", name))
            self.path.mkdir(parents=True)
            (self.path / "semivl.py").write_bytes(Path(__file__).read_bytes())  # for the record
        # buffering=1: a line is written at once, so a killed run loses no line. The open file also
        # carries the lock.
        self.file = open(self.path / "log.jsonl", "a", buffering=1)  # noqa: SIM115
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            with blame(f"{self.path}: another process uses it"):
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def log(self, **entries) -> None:
        """Appends a line to log.jsonl. A run that was killed repeats the steps since last.pt, and
        these stand there twice: the later line counts."""
        if RANK == 0:
            self.file.write(json.dumps(dict(step=self.step) | entries) + "\n")

    def save(self, name: str) -> None:
        """Writes last.pt or best.pt; the old file is replaced when the new one is complete."""
        if RANK > 0:
            return
        content = dict(step=self.step, best=self.best) | self.facts
        for key, module in self.modules.items():
            if key == "model" or name == "last.pt":
                content[key] = module.state_dict()
        with blame(f"{self.path / name} (disk full? what was saved before is whole)"):
            # In the same folder, since only there the file is replaced in one operation.
            file = self.path / "new.tmp"
            torch.save(content, file)
            file.replace(self.path / name)


def make_networks(cfg: Config, folder: Folder, device: torch.device):
    """Four things: the student; FrozenGuidance for training; the columns of frozen CLIP in tables,
    title -> model; CLIP's config (see `load_clip`)."""
    clip, clip_config = load_clip(cfg)
    words = describe_classes(clip, folder.classes, cfg.decoder_text, cfg.definitions)
    pretrained = cfg.clip_weights != "none"
    student = build_model(cfg, clip.visual, words.decoder_text, pretrained).to(device).train()
    frozen = frozen_copy(student.clip)  # before training, and before a checkpoint is loaded
    guidance = FrozenGuidance(frozen, words.concepts, words.sizes, cfg.guidance_conf_thresh)
    by_names = FrozenGuidance(frozen, words.names, [1] * len(words.names))
    baselines = {"CLIP by names": by_names.to(device)}
    if not torch.equal(words.names, words.concepts):
        baselines["CLIP by definitions"] = guidance  # shows what the definitions are worth
    return student, guidance.to(device), baselines, clip_config


def train(cfg: Config, saved: dict | None = None) -> None:
    """A whole run: images, networks, folder, loop, table. saved: what last.pt holds, to go on from
    there; its folder is cfg.out."""
    require(cfg.batch % WORLD == 0, f"--batch {cfg.batch} cannot be shared by {WORLD} processes")
    folder = open_data(cfg.dataset)
    device = pick_device(cfg.device)

    labelled = saved["labelled"] if saved else draw_labelled(folder, cfg.labels, cfg.seed)
    check_labelled(folder, labelled)
    data = TrainingSet(folder, labelled, cfg)
    # An epoch is a pass over the unlabelled images, also with --unlabelled off.
    steps_per_epoch = max(1, len(data.unlabelled or labelled) // cfg.batch)
    cfg = dataclasses.replace(cfg, steps=cfg.steps or cfg.epochs * steps_per_epoch)

    # The networks. All random weights, and so the decoder's, come from this seed.
    torch.manual_seed(cfg.seed)
    student, guidance, baselines, clip_config = make_networks(cfg, folder, device)
    teacher = frozen_copy(student)
    optimizer = make_optimizer(student, cfg)
    # DistributedDataParallel notes what trains at this moment: after `spatial_fine_tuning`.
    parallel = nn.parallel.DistributedDataParallel(student) if WORLD > 1 else student
    models = baselines | {"SemiVL" if cfg.unlabelled else "labels only": teacher}

    # This comes before the folder is made: most masks that cannot be read fail here.
    for title, model in baselines.items():
        miou = evaluate(model, folder, folder.val[:100], cfg, device).nanmean()
        say(f"frozen {title}: mIoU {miou:.1f} (on at most 100 validation images)")

    # The run's folder. `facts` are what `load_checkpoint` and a resumed run need.
    facts = dict(config=dataclasses.asdict(cfg), classes=folder.classes, clip=clip_config)
    facts |= dict(labelled=labelled, images=len(folder.train))
    run = Run(cfg, dict(student=student, model=teacher, optimizer=optimizer), facts, saved)
    to_train = f"{len(labelled)} labelled, {len(data.unlabelled)} unlabelled"
    to_test = f"{len(folder.val)} validation, {len(folder.test)} test images"
    say(f"{to_train}, {to_test}; {cfg.steps} steps on {device}; writes to {run.path}")

    # The loop: rates, gradients, one step of the optimiser and of the teacher; then the log, and
    # now and then an evaluation. Items i, i + 1, ... go to processes 0, 1, ..., so a step has the
    # same items with any number of processes. TrainingSet shuffles, so the sampler is a range.
    mine = range(run.step * cfg.batch + RANK, cfg.steps * cfg.batch, WORLD)
    workers = min(cfg.workers, os.cpu_count() or 1)
    loader = DataLoader(data, cfg.batch // WORLD, sampler=mine, num_workers=workers)
    clock = time.perf_counter()
    for batch in progress(loader, "train", total=cfg.steps, initial=run.step):
        files = batch.pop("files")
        batch = {key: tensor.to(device) for key, tensor in batch.items()}
        rates = [learning_rate(base, run.step, cfg.steps) for base in (cfg.lr, cfg.vit_lr)]
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        losses = training_step(parallel, teacher, guidance, batch, cfg, run.step)
        means = torch.stack([*losses.values()]) / WORLD
        if WORLD > 1:
            dist.all_reduce(means)
        losses = dict(zip(losses, means.tolist()))
        message = f"step {run.step + 1}: loss {losses['total']}; lower --lr, or look at {files}"
        # Before a weight changes. The mean is the same in all processes, so all of them stop.
        require(math.isfinite(losses["total"]), message)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(teacher, student, run.step, cfg.ema)

        run.step += 1
        seconds = time.perf_counter() - clock
        run.log(**losses, lr=rates, seconds=seconds, gb=torch.cuda.max_memory_allocated() / 1e9)
        if run.step % math.ceil(cfg.steps / cfg.evals) == 0 or run.step == cfg.steps:
            miou = float(evaluate(teacher, folder, folder.val, cfg, device).nanmean())
            run.log(val_miou=miou)
            if miou > run.best:
                run.best = miou
                run.save("best.pt")
            line = f"step {run.step}: loss {losses['total']:.3f}, kept {losses.get('kept', 0):.2f}"
            say(f"{line}, validation mIoU {miou:.1f}, {seconds:.3g} s/step")
            if RANK == 0:  # the models are the same in all processes
                save_sheet(run.path / "sheet.png", folder, models, cfg, device)
            run.save("last.pt")
        elif run.step % cfg.save_every == 0:
            run.save("last.pt")
        clock = time.perf_counter()  # here, so that evaluation and saving are not counted
    # The table is of the last teacher: best.pt was chosen by its validation mIoU, so that number is
    # optimistic.
    result = dict(val_best=run.best) | report(models, folder, cfg, device)
    if RANK == 0:
        (run.path / "result.json").write_text(json.dumps(result))


# 11. Weights: CLIP's, and those of our checkpoints ------------------------------------------------
# A file of weights can hold code, which unpickling would run, so every one is read with
# weights_only. A checkpoint has to fit tensor by tensor. (Of CLIP's weights open_clip resizes the
# position embedding; of the stem's file timm takes what it needs.)
def load_clip(cfg: Config) -> tuple[open_clip.CLIP, dict]:
    """The CLIP of --clip and --clip-weights, and its config, of which open_clip.CLIP(**config)
    makes one with random weights."""
    name, weights = cfg.clip, cfg.clip_weights
    with blame(f"--clip {name} --clip-weights {weights}"):
        if name == "toy":
            from data_prep import TOY_CLIP as config

            name = "local-dir:data/toy"
        else:
            config = open_clip.get_model_config(name) or {}
        # Only a plain ViT has the parts that DenseCLIP calls by name. (ResNets have a list of
        # layers, CoCa a third tower, other text towers a tokenizer of their own.)
        layers = config.get("vision_cfg", {}).get("layers")
        other = {"multimodal_cfg", "hf_tokenizer_name"} & {*config, *config.get("text_cfg", {})}
        plain = isinstance(layers, int) and not other
        require(plain, "no plain ViT CLIP of open_clip, such as ViT-B-16-quickgelu")
        if weights == "none":
            return open_clip.CLIP(**config), config
        if name.startswith("local-dir:"):
            weights = ""  # a folder has its own
        # open_clip only warns of the wrong GELU, which costs accuracy, and goes on.
        quick = config.get("quick_gelu", False)
        trained = open_clip.get_pretrained_cfg(name, weights) or {}
        fits = trained.get("quick_gelu", quick) == quick
        require(fits, f"{weights} was trained with the other GELU; add or drop -quickgelu")
        if Path(weights).is_file():  # which does not say with what GELU it was trained
            say(f"note: {name} uses {'QuickGELU' if quick else 'GELU'}; so must {weights}")
        return open_clip.create_model(name, weights, require_pretrained=True), config


def build_model(cfg: Config, visual: nn.Module, text: torch.Tensor, pretrained=False) -> SemiVL:
    """The model of the settings, around a visual tower and the classes' text [N, E]. pretrained:
    whether the stem of conv_skip gets timm's weights."""
    # Crop 801 gives 50 patches a side, although a padded crop has 51: as in the authors' weights.
    side = cfg.crop // visual.conv1.kernel_size[0]
    require(side, f"--crop {cfg.crop}: smaller than a patch of CLIP")
    if cfg.authors_clip and not cfg.conv_skip:  # as the authors have it
        visual.image_mean = IMAGENET_MEAN
        visual.image_std = IMAGENET_STD
    clip = DenseCLIP(visual, (side, side), cfg.authors_clip)
    spatial_fine_tuning(clip, cfg.finetune)
    E, D, C = clip.embed_dim, clip.width, cfg.decoder_channels
    if cfg.decoder == "vision":  # reads no shallow skip
        return SemiVL(clip, VisionDecoder(E, D, len(text)), text)
    if not cfg.conv_skip:
        return SemiVL(clip, LanguageGuidedDecoder(E, D, D, C), text)
    # Start of timm's resnet101c: images [B, 3, H, W] in [0, 1] -> [[B, 256, H/4, W/4]].
    net = timm.create_model("resnet101c", pretrained, features_only=True, out_indices=(1,))
    stem = nn.Sequential(v2.Normalize(IMAGENET_MEAN, IMAGENET_STD), net)
    return SemiVL(clip, LanguageGuidedDecoder(E, 256, D, C, shallow_width=C // 4), text, stem)


def load_file(file, **changes) -> tuple[Config, dict]:
    """The settings (with these changes) and the content of last.pt or best.pt, read without running
    code that may be in it."""
    # The authors' files are read by `load_authors_checkpoint` in test_semivl.py.
    with blame(f"{file} is no last.pt or best.pt of a run (nor of the authors')"):
        content = torch.load(file, map_location="cpu", weights_only=True)
        missing = {*"config classes clip labelled images step best model".split()} - {*content}
        require(not missing, f"lacks {missing}")
        cfg = Config(**content["config"])
    return dataclasses.replace(cfg, **changes), content


def load_checkpoint(file, **changes) -> tuple[SemiVL, torch.device, Config, dict]:
    """A checkpoint -> model in eval mode, its device, settings, class names and concepts."""
    changes = dict(device="auto", out="") | changes  # the run's may not fit this machine
    cfg, content = load_file(file, **changes)
    with blame(f"{file} and the settings do not fit"):
        # Random weights first: CLIP's file is not needed, since the checkpoint has all, with the
        # mean and standard deviation of colours.
        visual = open_clip.CLIP(**content["clip"]).visual
        model = build_model(cfg, visual, content["model"]["text"])
        model.load_state_dict(content["model"])
    device = pick_device(cfg.device)
    return model.to(device).eval(), device, cfg, content["classes"]


# 12. Pictures: masks in colours, the sheet of a run -----------------------------------------------
# A low mIoU does not say why: masks may be turned by 90 degrees, or two classes swapped. So a run
# draws sheet.png at each evaluation.
def colour_mask(mask: torch.Tensor) -> Image.Image:
    """Class numbers, uint8 [H, W] -> palette image whose values are still the class numbers."""
    # Steps of the golden ratio on the colour wheel; class 0, often the background, is grey.
    colours = [ImageColor.getrgb(f"hsv({7 + 222.5 * n}, 60%, 90%)") for n in range(IGNORE)]
    colours[0] = (77, 82, 92)
    image = Image.fromarray(mask.cpu().numpy())
    image.putpalette(sum(colours, ()) + (255, 255, 255))  # IGNORE is white
    return image


def save_sheet(file: Path, folder: Folder, models: dict, cfg: Config, device) -> None:
    """Up to four validation images, a row each: image, truth, and what each model (title -> images
    to logits) predicts."""
    side = 198  # of a cell, with a margin
    titles = ["image", "truth", *models]
    entries = folder.val[:: math.ceil(len(folder.val) / 4)]  # the first four may be of one scene
    sheet = Image.new("RGB", (len(titles) * side, 24 + len(entries) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * side, 4), title, "black", font_size=14)
    for row, entry in enumerate(entries):
        image, truth = folder.pair(entry)
        masks = [truth, *(segment(model, image, cfg, device) for model in models.values())]
        cells = [image, *(colour_mask(mask).convert("RGB") for mask in masks)]
        for column, cell in enumerate(cells):
            # Resizing mixes colours at borders: the sheet is to look at, --predict writes numbers.
            cell = ImageOps.pad(cell, (side - 6, side - 6), color="white")
            sheet.paste(cell, (column * side, 24 + row * side))
    sheet.save(file)


def predict(checkpoint: str, *names: str, **changes) -> None:
    """--predict: NAME-mask.png (class numbers, in colours) and NAME-overlay.png of each image, also
    of those in a folder. Nothing is overwritten."""
    # Of a folder's files those are taken whose kind PIL can open.
    pictures = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = []
    for path in map(Path, names):
        inside = [file for file in sorted(path.glob("[!.]*")) if file.suffix.lower() in pictures]
        files += inside if path.is_dir() else [path]
    require(files, "--predict CKPT IMAGE ...: name images, too")
    model, device, cfg, _ = load_checkpoint(checkpoint, **changes)
    out = free_folder(cfg.out, Path(checkpoint).parent / "predictions")
    for file in progress(files, "predict"):
        image = read_image(file)
        name = file.stem
        while (out / f"{name}-mask.png").exists():  # images of several folders
            name += "-2"
        mask = colour_mask(segment(model, image, cfg, device))
        out.mkdir(parents=True, exist_ok=True)  # only now: what fails leaves no empty folder
        mask.save(out / f"{name}-mask.png")
        Image.blend(image, mask.convert("RGB"), 0.55).save(out / f"{name}-overlay.png")
    say(f"masks and overlays of {len(files)} images are in {out}")


# 13. Command line ---------------------------------------------------------------------------------
# A user's mistake ends in one line and exit code 2; a bug keeps its traceback.
def on_or_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(text)  # argparse makes its own message of it
    return text == "on"


def parse_args(argv) -> dict:
    """The options that were typed, with their values; --help shows the source of Config."""
    # Config's source is shown as far as its first blank line, so its fields have none.
    parser = argparse.ArgumentParser(
        description=inspect.getsource(Config).partition("\n\n")[0],  # its fields and comments
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = partial(require, False)  # one line instead of the usage
    # SUPPRESS: an option that is not typed is absent, and has no default here. So `preset | typed`
    # lets what is typed win over the preset, and Config fills in the rest.
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped")
    parser.add_argument("--eval", metavar="CKPT", help="IoU per class of a checkpoint")
    parser.add_argument("--predict", nargs="+", metavar=("CKPT", "IMAGE"), help="masks of images")
    for field in dataclasses.fields(Config):
        kind = on_or_off if field.type is bool else type(field.default)  # Config checks choices
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, help=argparse.SUPPRESS)
    return vars(parser.parse_args(argv))


def run_command(typed: dict) -> None:
    """Does what the command line says. typed: what `parse_args` returns."""
    actions = {name: typed.pop(name) for name in ("resume", "eval", "predict") if name in typed}
    require(len(actions) < 2, "one of --resume, --eval, --predict at a time")
    if "epochs" in typed:
        typed.setdefault("steps", 0)  # else the steps of a preset or a checkpoint would win
    if "resume" in actions:
        fixed = {"out", "labels", "decoder_text"} & {*typed}  # last.pt has images and text
        require(not fixed, f"--resume keeps {', '.join(fixed)}")
        train(*load_file(Path(actions["resume"], "last.pt"), out=actions["resume"], **typed))
    elif "eval" in actions:
        model, device, cfg, classes = load_checkpoint(actions["eval"], **typed)
        folder = open_data(cfg.dataset)
        require([*folder.classes] == [*classes], f"{folder.path}: other classes")
        report({"SemiVL": model}, folder, cfg, device)
    elif "predict" in actions:
        predict(*actions["predict"], **typed)
    else:
        dataset = typed.get("dataset", "toy")  # a FOLDER has no preset, so VOC's defaults
        preset = parse_args(PRESETS.get(dataset, "").split())
        train(Config(**preset | typed))
    if WORLD > 1:
        dist.destroy_process_group()


def main(argv=None) -> int:
    """Runs the command line; exit code 2 and one line for a user's mistake, 130 for Ctrl-C."""
    try:
        run_command(parse_args(argv))
        return 0
    except KeyboardInterrupt:
        message, code = "interrupted; --resume RUN goes on from its last.pt, if it has one", 130
    except (UserError, OSError) as error:
        # An error in a loader process comes with its traceback in front; the last line counts.
        message, code = str(error).rpartition("UserError: ")[2].strip(), 2
    except (RuntimeError, MemoryError) as error:
        lack = r"MemoryError|out of memory|allocate memory|shared memory|DataLoader worker \(pid"
        if not re.search(lack, repr(error)):
            raise  # a bug
        message, code = f"out of memory? {error}; try --micro-batch 1 or --workers 0", 2
    print(f"semivl.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has no such method
        sys.stdout.reconfigure(errors="replace")  # for class names that a console cannot print
    # A scheduler's SIGTERM does what Ctrl-C does. Put back afterwards: a notebook lives on.
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    exit_code = main()
    signal.signal(signal.SIGTERM, usual)
    sys.exit(exit_code)
