"""SemiVL in one file: semi-supervised semantic segmentation with vision-language guidance.

Paper: Hoyer, Tan, Naeem, Van Gool, Tombari, "SemiVL", ECCV 2024, arXiv 2311.16241.

A few images with masks, many without, and a CLIP that knows what words look like:

    labelled image x, mask y                      unlabelled image
              |                     /                    |                  \\
       scale, crop, flip        weak view w       strong view s1       strong view s2
              |                 |    |    |              |                    |
              |      EMA TEACHER  FROZEN CLIP |    CutMix, of the views and of the targets
              |            |          |       |          |                    |
              |            +- targets-+       |          |                    |
              v                               v          v                    v
       STUDENT(x)          STUDENT(w, features dropped)  STUDENT(s1)          STUDENT(s2)
              |                               |          |                    |
       cross-entropy with y     cross-entropy with the targets: the teacher's pseudo-labels,
                                and what frozen CLIP takes each pixel for

    The targets go to all three losses; those of s1 and s2 after CutMix, which pastes a box of
    another unlabelled image. The published method has no EMA teacher (`--ema 0`: the student
    teaches itself); section 12 lists every detail that matters.

    python semivl.py                                       the built-in toy world: minutes, a CPU
    python semivl.py --dataset FOLDER --labels 8           your own pictures (README.md)
    python semivl.py --dataset voc --labels 92             the published data, schedule and test;
                                 --ema 0 --authors-clip on  nearest to the published method, too
    python semivl.py --eval CKPT, --predict CKPT a.png     IoU per class; masks of pictures
    python semivl.py --ladder                              what each idea buys, in the toy world

Letters for shapes, in every comment below:
    B images, N classes, K concepts, H x W image, P patch, h = ceil(H/P), w = ceil(W/P), D width of
    the ViT, E width of CLIP's joint space, T = 1 + h*w tokens, C = 128 channels of a class's map.
In sections 7, 8, 10 x is the labelled image, w the weak view; elsewhere x is features, w patches.
"""

import copy
import dataclasses
import math
import sys
from contextlib import closing
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

import data_prep
from data_prep import UserError, setting

# ----------------------------------------------------------------------------------------------
# 1. Settings: one flat config; presets hold the published recipes; the command line overrides
# On a first reading skip to section 2; what matters: conf, guidance, guidance_conf, ema, finetune.

@dataclasses.dataclass
class Config:
    """Every field is an option of the same name (`micro_batch` is `--micro-batch`)."""

    dataset: str = setting("data", "voc", "toy, voc, coco, ade20k, cityscapes, or a FOLDER")
    labels: int = setting("data", 92, "how many labelled images to use", low=1)
    root: str = setting("data", "data", "where data sets are kept")
    crop: int = setting("data", 512, "side of training crop and test window, pixels", low=1)
    fit: bool = setting("data", True, "fit images to the crop before scaling, and for evaluation")
    scale_min: float = setting("data", 0.5, "random scale of training images, from", low=0.1)
    scale_max: float = setting("data", 2.0, "random scale of training images, to", low=0.1)
    workers: int = setting("data", 4, "processes that load images; 0: none")

    clip: str = setting("model", "ViT-B-16-quickgelu", "open_clip model; toy: the tiny one")
    clip_tag: str = setting("model", "openai", "which of open_clip's pretrained weights")
    clip_weights: str = setting("model", "", "FILE of CLIP weights, or none: random; '': by tag")
    authors_clip: bool = setting("model", False, "the authors' GELU, eps, image statistics")
    decoder: str = setting("model", "language", "or DeepLabV3+", choices=("language", "vision"))
    decoder_text: str = setting("model", "names", "text of a class for the decoder: its name, or "
                                "the mean of its concepts", choices=("names", "mean"))
    definitions: bool = setting("model", True, "describe a class by its concepts, not its name")
    finetune: str = setting("model", "spatial", "what trains in the ViT; spatial: attention and "
                            "position embedding", choices=("spatial", "all", "none"))
    conv_skip: bool = setting("model", False, "a ResNet-101 stem for the shallow skip (Cityscapes)")
    conv_weights: str = setting("model", "", "FILE of its weights, or none: random; '': timm's")

    unlabelled: bool = setting("method", True, "use the unlabelled images")
    conf: float = setting("method", 0.95, "confidence from which a pseudo-label counts", high=1)
    weighting: str = setting("method", "pixel", "weight of a pseudo-label; pixel: 1 from conf on, "
                             "else 0; mean: its image's mean confidence; share: its share of ones",
                             choices=("pixel", "mean", "share"))
    guidance: float = setting("method", 0.1, "weight of frozen CLIP's loss; falls to 0 in the run")
    guidance_conf: float = setting("method", 0.9, "conf of frozen CLIP's labels", high=1)
    ema: float = setting("method", 0.996, "decay of the teacher; 0: the student itself", high=1)

    steps: int = setting("training", 0, "optimiser steps; 0: by epochs")
    epochs: int = setting("training", 80, "or by passes over the unlabelled images", low=1)
    batch: int = setting("training", 8, "labelled images a step, and as many unlabelled", low=1)
    micro_batch: int = setting("training", 2, "of these at a time; gradients are averaged", low=1)
    lr: float = setting("training", 1e-3, "learning rate of the decoder")
    vit_lr: float = setting("training", 1e-6, "learning rate of the ViT, and of conv_skip")
    weight_decay: float = setting("training", 0.01, "AdamW's, on everything that trains")
    evals: int = setting("training", 20, "evaluations during a run", low=1)
    save_every: int = setting("training", 500, "steps between writings of last.pt", low=1)
    precision: str = setting("training", "auto", "bf16: autocast; auto: bf16 on CUDA only",
                             choices=("auto", "fp32", "bf16"))
    recompute: bool = setting("training", False, "decoder keeps less memory, takes more time")

    window_mode: str = setting("evaluation", "logits", "what is averaged where windows overlap",
                               choices=("logits", "probabilities"))
    stride: int = setting("evaluation", 0, "step of the window, pixels; 0: 5/6 of the crop")

    out: str = setting("run", "", "folder of the run; '': runs/DATASET-LABELS, numbered")
    seed: int = setting("run", 0, "of labels drawn, weights, order, augmentation", high=10**9)
    device: str = setting("run", "auto", "auto, cuda, mps or cpu")


# What a data set changes of the defaults, which are VOC's (and a FOLDER's). No --dataset: toy,
# whose run is short: a quicker teacher, and frozen CLIP has ten times the say.
PRESETS = {
    "toy": dict(
        dataset="toy", labels=4, crop=64, fit=False, scale_min=0.8, scale_max=1.25, workers=0,
        clip="toy", conf=0.9, guidance=1.0, ema=0.98, steps=240, batch=4, micro_batch=4,
        vit_lr=1e-4, evals=2),
    "voc": dict(),
    "coco": dict(labels=232, fit=False, epochs=10, micro_batch=1, lr=4e-3, vit_lr=4e-7),
    "ade20k": dict(labels=158, epochs=40, micro_batch=1, lr=4e-3, vit_lr=4e-7),
    "cityscapes": dict(
        labels=100, fit=False, crop=801, steps=240 * 349, micro_batch=1, lr=5e-4, vit_lr=5e-6,
        conv_skip=True, decoder_text="mean", weighting="mean", window_mode="probabilities",
        stride=534),
}  # 349 steps: an epoch of the 186 split, whatever --labels is; 534: two thirds of the crop

# All chance is a function of (seed, position in the run), so that a resumed run repeats it. Seed s
# owns the numbers from s * STREAM on: half of them for augmentation, half for feature dropout.
STREAM = 10**9
IGNORE = 255  # "no label" in every mask, whatever a folder's files call it

# ----------------------------------------------------------------------------------------------
# 2. Language: what are classes called, what do they mean? (paper: Class Definition Guidance)
# In: class names and their concepts. Out: text embeddings [N, E] and [K, E].
# A name alone is a poor prompt: hardly any caption says "background". So a class is defined by
# concepts. Two readers get two texts: frozen CLIP compares each place with every concept and
# takes the best of a class; the decoder gets one vector a class, its name (or, on Cityscapes, the
# mean of its concepts): it is trained, so a poor name costs it less. Of VOC: "bus": bus, minibus;
# "person": person, people, baby, face; "background": 45 things, from bed to vehicle interior.

CLASSES = data_prep.CLASSES  # data set -> class, in the order of mask values -> its concepts


@torch.no_grad()
def encode_text(clip: open_clip.CLIP, names: list[str]) -> torch.Tensor:
    """Names -> CLIP's text embeddings of "a photo of a NAME", [len(names), E], not normalised."""
    tokens = open_clip.tokenize([f"a photo of a {name}" for name in names], clip.context_length)
    return clip.eval().encode_text(tokens.to(clip.token_embedding.weight.device)).float()


class Language(NamedTuple):
    """The text embeddings of one data set; all rows are L2-normalised."""

    decoder_text: torch.Tensor  # [N, E], what the decoder reads
    names: torch.Tensor  # [N, E], the class names alone
    concepts: torch.Tensor  # [K, E], what frozen CLIP reads: all concepts, class after class
    sizes: list[int]  # N numbers whose sum is K: how many concepts each class has


def describe_classes(clip, classes: dict[str, list[str]], cfg: Config) -> Language:
    """Embeds class names and definitions as `cfg.definitions` and `cfg.decoder_text` say."""
    names = encode_text(clip, list(classes))
    if not cfg.definitions:
        classes = {name: [name] for name in classes}
    concepts = encode_text(clip, [c for group in classes.values() for c in group])
    sizes = [len(group) for group in classes.values()]
    if cfg.decoder_text == "mean":
        # Mean BEFORE normalising, as the authors do: an embedding of larger norm weighs more.
        text = torch.stack([group.mean(0) for group in concepts.split(sizes)])
    else:
        text = names
    return Language(*(F.normalize(t, dim=-1) for t in (text, names, concepts)), sizes)


# ----------------------------------------------------------------------------------------------
# 3. Vision: CLIP answers one question about a whole image; how to ask it about every patch?
# (Paper: Vision-Language Pre-training; MaskCLIP, Zhou et al., ECCV 2022.)
# In: images [B, 3, H, W]. Out: dense embedding [B, E, h, w], two skip maps [B, D, h, w].
# Attention in the last block gathers the image into the class token, so patch outputs are not
# what the text was trained against. Skipping that attention (MaskCLIP's "value path") lets each
# patch speak for itself. This works: what the class token gathers is a mean of the patches'
# VALUES, so the projection to the text's space has been trained on such things. The price is the
# context that this last attention would have brought. The decoder's skip maps come from early
# blocks, which still know where exactly things end, and are value paths, too (as published).

# Mean and standard deviation of images. CLIP was trained with its own; the authors feed it images
# normalised with ImageNet's (`authors_clip`). The ResNet of `conv_skip` wants ImageNet's: images
# then come with those, and DenseCLIP turns them back into CLIP's (as the authors do there).
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class QuickGELU(nn.Module):
    """open_clip's x sigmoid(1.702 x) = silu(1.702 x) / 1.702: backward keeps one tensor."""

    def forward(self, x):
        return F.silu(1.702 * x).mul_(1 / 1.702)


def transformer_block(block: nn.Module, x: torch.Tensor, attend=True, linear=F.linear):
    """A pre-norm block of open_clip's ViT on tokens [B, T, D]. Without `attend` it is the value
    path: each token looks at itself only, so of query, key and value the value is all it needs.
    linear: or something faster that computes the same."""
    attn, mlp, D = block.attn, block.mlp, x.shape[-1]
    weight, bias, y = attn.in_proj_weight, attn.in_proj_bias, block.ln_1(x)
    if attend:
        y = linear(y, weight, bias).unflatten(2, (3, attn.num_heads, -1))  # [B, T, 3, heads, .]
        q, k, v = y.permute(2, 0, 3, 1, 4)  # [B, heads, T, .] each
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, T, D]
    else:
        y = linear(y, weight[2 * D:], bias[2 * D:])
    x = x + block.ls_1(linear(y, attn.out_proj.weight, attn.out_proj.bias))
    y = mlp.gelu(linear(block.ln_2(x), mlp.c_fc.weight, mlp.c_fc.bias))
    return x + block.ls_2(linear(y, mlp.c_proj.weight, mlp.c_proj.bias))  # ls: layer scale, if any


def resize_position(position: torch.Tensor, old: tuple, new: tuple) -> torch.Tensor:
    """Position embedding [1 + old_h * old_w, D] -> [1 + new_h * new_w, D], bicubic."""
    if old == new:
        return position
    cls, grid = position[:1], position[1:]
    grid = grid.T.reshape(1, -1, *old)  # [1, D, old_h, old_w]
    # No antialiasing: the published weights were trained on exactly this interpolation.
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls, grid[0].flatten(1).T])


class DenseCLIP(nn.Module):
    """The visual tower of a plain open_clip ViT, turned into a per-patch image encoder.

    Args:
        visual: open_clip's VisionTransformer (`open_clip.create_model(...).visual`).
        grid: (h, w) that the position embedding is resized to, once, and trained at; an image of
            any other size interpolates from it in each forward.
        authors: exact GELU and LayerNorm eps 1e-6, which the authors' weights were trained with;
            OpenAI's CLIP has QuickGELU and 1e-5.
        statistics: (mean, std) that images, coming with ImageNet's, are re-normalised to.
        linear: see `transformer_block`.
    `visual` itself is changed (position embedding, and with `authors` GELU and eps).

        >>> vit = open_clip.create_model("ViT-B-16-quickgelu").visual  # pretrained="openai"
        >>> dense, (shallow, deep) = DenseCLIP(vit)(torch.randn(1, 3, 64, 96))
        >>> dense.shape, shallow.shape
        (torch.Size([1, 512, 4, 6]), torch.Size([1, 768, 4, 6]))
    """

    def __init__(self, visual, grid=None, authors=False, statistics=None, linear=F.linear):
        super().__init__()
        plain = isinstance(visual, open_clip.transformer.VisionTransformer) and all(
            type(block) is open_clip.transformer.ResidualAttentionBlock
            for block in visual.transformer.resblocks)
        if not plain or visual.attn_pool or visual.final_ln_after_pool or (
                math.prod(visual.grid_size) + 1 != len(visual.positional_embedding)):
            raise ValueError("DenseCLIP needs a plain ViT of open_clip that no other has wrapped")
        self.visual = visual
        self.patch = visual.conv1.kernel_size[0]
        depth = len(visual.transformer.resblocks)
        self.skip_blocks = (0, depth // 3)  # 0 and 4 of ViT-B's twelve
        self.width, self.embed_dim = visual.proj.shape
        self.grid = grid or tuple(visual.grid_size)
        position = visual.positional_embedding.detach()
        position = resize_position(position, tuple(visual.grid_size), self.grid)
        visual.positional_embedding = nn.Parameter(position.clone())
        for module in visual.modules():
            if authors and isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
            if isinstance(getattr(module, "gelu", None), open_clip.transformer.QuickGELU):
                module.gelu = nn.GELU() if authors else QuickGELU()
        self.statistics, self.linear = statistics, linear

    def encode(self, images: torch.Tensor, last_attention: bool = False):
        """[B, 3, H, W] -> tokens in the joint space [B, T, E], the same as a map [B, E, h, w], and
        the skip maps [B, D, h, w]. With `last_attention`, which the method skips, the first token
        (the mean of the others, if CLIP pools so) is CLIP's embedding of the image: a check that
        all weights are in place."""
        vit, P = self.visual, self.patch
        if self.statistics:
            mean, std = IMAGENET_STATS
            images = VF.normalize(images, [-m / s for m, s in zip(mean, std)], [1 / s for s in std])
            images = VF.normalize(images, *self.statistics)
        H, W = images.shape[-2:]
        x = vit.conv1(F.pad(images, (0, -W % P, 0, -H % P)))  # [B, D, h, w]
        B, _, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)  # [B, h*w, D]
        cls = vit.class_embedding.to(x.dtype).expand(B, 1, -1)
        x = torch.cat([cls, x], dim=1)  # [B, T, D]
        x = x + resize_position(vit.positional_embedding, self.grid, (h, w)).to(x.dtype)
        x = vit.ln_pre(x)

        def to_map(tokens):  # [B, T, c] -> [B, c, h, w], without the class token
            return tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w))

        maps = {}
        for i, block in enumerate(vit.transformer.resblocks):
            if i in self.skip_blocks:
                value = transformer_block(block, x, attend=False, linear=self.linear)
                maps[i] = to_map(value)  # beside the block's own output, which goes on below
            last = i + 1 == len(vit.transformer.resblocks)
            x = transformer_block(block, x, attend=last_attention or not last, linear=self.linear)
        x = vit.ln_post(x) @ vit.proj  # [B, T, E]
        return x, to_map(x), [maps[i] for i in self.skip_blocks]

    def forward(self, images: torch.Tensor):
        """[B, 3, H, W], normalised -> dense embedding [B, E, h, w], L2-normalised over E, and two
        skip maps [B, D, h, w], shallow and deep."""
        _, dense, skips = self.encode(images)
        return F.normalize(dense, dim=1), skips


# ----------------------------------------------------------------------------------------------
# 4. Which weights may learn, so that CLIP does not forget? (paper: Spatial Fine-Tuning)
# In: a DenseCLIP. Out: the same, requires_grad set. Before the optimiser and `copy_trained`.
# What CLIP lacks is local, spatial reasoning, which lives in attention. What it knows lives in
# the MLPs. So attention and the position embedding train, the rest stays as it was.

def spatial_fine_tuning(clip: DenseCLIP, mode: str = "spatial") -> DenseCLIP:
    """Sets what trains in the ViT: "spatial" (attention, position embedding), "all" or "none".

    ViT-B/16 at 512: spatial trains 29.1 of 86.8 million values, in 49 tensors."""
    if mode not in ("spatial", "all", "none"):
        raise ValueError(f"mode {mode!r}: take spatial, all or none")
    for name, tensor in clip.named_parameters():
        spatial = ".attn." in name or name.endswith("positional_embedding")
        tensor.requires_grad_(mode == "all" or (mode == "spatial" and spatial))
    return clip


def copy_trained(module: nn.Module) -> nn.Module:
    """A frozen twin with its own copy of the parameters that train, and the very same frozen ones.

    Teacher and guidance need their own of what trains (the teacher averages them, guidance keeps
    them as they were); the other two thirds exist once in memory. Traps: weights loaded into a twin
    overwrite what it shares; a parameter that begins to train later is still shared."""
    # deepcopy takes what `memo` already holds for an object instead of copying it.
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, memo=shared).requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------------
# 5. Language-guided decoder: how does "how similar is this patch to the text" become a mask?
# (Paper: Language-Guided Decoder.)
# A usual decoder ends in N filters, each learned from the few masks that show its class. Here every
# class is an item of a batch: B*N maps of one channel, the similarity to its text. The same weights
# clean the map of whatever class they are given, so they learn from all classes and take any number
# of them; the price is N times the convolutions. Sizes and align_corners are the authors'.
#     dense [B, E, h, w], text [N, E]
#     -> cosine_maps               [B, N, h, w]
#     -> spatial reasoning         [B, N, C, h, w]    each class alone: 7 x 7 conv, ASPP
#     -> semantic reasoning, twice [B, N, C, h, w]    each place alone: the classes see each other
#     -> two UpStages, with skips  [B, N, 32, 4h, 4w] each class alone
#     -> head                      [B, N, 4h, 4w]     logits

C = 128  # channels of a class's map
MAPS_AT_ONCE = 32  # of the B*N; more are not faster, but take more memory


def cosine_maps(dense: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """How similar is each place to each text? dense [B, E, h, w], text [N, E] -> [B, N, h, w].

    Both sides are normalised here, dense a second time: feature dropout changes its length. float32
    even under autocast: bf16 knows cosines to 0.002 only, and guidance multiplies them by 100."""
    with torch.autocast(dense.device.type, enabled=False):
        dense, text = F.normalize(dense.float(), dim=1), F.normalize(text.float(), dim=1)
        return torch.einsum("behw,ne->bnhw", dense, text)


def group_norm(channels: int) -> nn.GroupNorm:
    """16 channels a group, as everywhere in the language-guided decoder."""
    return nn.GroupNorm(channels // 16, channels)


def conv_norm_relu(c_in, c_out, kernel, dilation=1, norm=group_norm):
    """Convolution that keeps the size, without bias (the norm has one), norm, ReLU."""
    pad = dilation * (kernel // 2)
    conv = nn.Conv2d(c_in, c_out, kernel, padding=pad, dilation=dilation, bias=False)
    # In place is safe: the backward pass of a norm needs its input, not its output.
    return nn.Sequential(conv, norm(c_out), nn.ReLU(inplace=True))


def conv_by_parts(conv: nn.Conv2d, parts: list) -> list:
    """Parts whose sum is conv(torch.cat(parts, dim=1)), for a conv without bias, stride, dilation:
    it is linear, so nothing is concatenated; what classes or places share is convolved once."""
    weights = conv.weight.split([part.shape[1] for part in parts], dim=1)
    return [F.conv2d(part, k, padding=conv.padding) for part, k in zip(parts, weights)]


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (DeepLab): one map seen at five fields of view.

    [B, c_in, h, w] -> [B, c_out, h, w]; each of the five branches has `width` channels."""

    def __init__(self, c_in: int, width: int, c_out: int, norm=group_norm):
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_norm_relu(c_in, width, 1, norm=norm)]
            + [conv_norm_relu(c_in, width, 3, dilation, norm) for dilation in (6, 12, 18)])
        self.pooled = conv_norm_relu(c_in, width, 1, norm=norm)
        self.project = conv_norm_relu(5 * width, c_out, 1, norm=norm)

    def forward(self, x):
        image = self.pooled(x.mean((2, 3), keepdim=True))  # [B, width, 1, 1], for every place
        conv, norm, relu = self.project
        return relu(norm(sum(conv_by_parts(conv, [b(x) for b in self.branches] + [image]))))


class SemanticReasoning(nn.Module):
    """Classes against each other: at each place a transformer layer whose tokens are the classes.

    x [B, N, C, h, w], text [N, C] -> [B, N, C, h, w]. Where "road" is sure, "boat" is unlikely. The
    text tells the layer which class each token is, without a weight for any class."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            2 * C, nhead=4, dim_feedforward=4 * C, dropout=0.0, activation="gelu",
            norm_first=True, batch_first=True)

    def forward(self, x, text):
        B, N, _, h, w = x.shape
        maps = x.flatten(0, 1)  # [B*N, C, h, w]
        # Relations are coarse: of means over 4 x 4 patches, h' = h // 4, w' = w // 4, at least 1. A
        # remainder at the edge is left out, and the result resized to h x w, as published.
        pooled = F.avg_pool2d(maps, (min(4, h), min(4, w)))  # [B*N, C, h', w']
        size = pooled.shape[2:]
        tokens = pooled.unflatten(0, (B, N)).permute(0, 3, 4, 1, 2).flatten(0, 2)  # [B*h'*w', N, C]
        text = text.expand(len(tokens), -1, -1)  # [B*h'*w', N, C]
        # The layer reads the text; the text's half of its output is dropped.
        tokens = self.layer(torch.cat([tokens, text], dim=2))[..., :C]  # [B*h'*w', N, C]
        pooled = tokens.unflatten(0, (B, *size)).permute(0, 3, 4, 1, 2)  # [B, N, C, h', w']
        refined = F.interpolate(pooled.flatten(0, 1), (h, w), mode="bilinear", align_corners=True)
        return x + refined.unflatten(0, (B, N))  # beside the layer's own residual, as published


class UpStage(nn.Module):
    """Twice the resolution, with detail from a skip map that all classes share.

    x [B*N, c_in, a, b], skip [B, c_skip, ., .] -> [B*N, c_out, 2a, 2b]."""

    def __init__(self, c_in: int, c_skip: int, c_out: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_in - c_skip, 2, stride=2)
        self.convs = nn.Sequential(conv_norm_relu(c_in, c_out, 3), conv_norm_relu(c_out, c_out, 3))

    def forward(self, x, skip):
        x = self.up(x)  # [B*N, c_in - c_skip, 2a, 2b]
        skip = F.interpolate(skip, x.shape[2:], mode="bilinear", align_corners=True)  # 2a x 2b
        (conv, norm, relu), second = self.convs
        x, skip = conv_by_parts(conv, [x, skip])  # the skip's part once, for all the classes here
        x = x.unflatten(0, (len(skip), -1)) + skip.unsqueeze(1)  # [B, N, c_out, 2a, 2b]
        return second(relu(norm(x.flatten(0, 1))))


class LanguageGuidedDecoder(nn.Module):
    """Similarity maps -> spatial reasoning -> semantic reasoning -> upsampling.

    Args:
        embed_dim: E, width of CLIP's joint space.
        shallow_dim, deep_dim: channels of the two skip maps.
        shallow_width: channels that the shallow one is projected to.
        recompute: keep less for the backward pass, which then takes longer.

        >>> dense, skip = torch.randn(1, 64, 4, 6), torch.randn(1, 96, 4, 6)
        >>> LanguageGuidedDecoder(64, 96, 96)(dense, (skip, skip), torch.randn(5, 64)).shape
        torch.Size([1, 5, 16, 24])
    """

    def __init__(self, embed_dim, shallow_dim, deep_dim, shallow_width=16, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.lift = nn.Conv2d(1, C, 7, padding=3)
        self.aspp = ASPP(C, C, C)
        self.text_proj = nn.Sequential(nn.Linear(embed_dim, C), nn.ReLU())
        self.semantic = nn.ModuleList([SemanticReasoning(), SemanticReasoning()])
        self.deep_proj, self.shallow_proj = (
            nn.Sequential(nn.Conv2d(dim, width, 3, padding=1), nn.ReLU())
            for dim, width in ((deep_dim, 32), (shallow_dim, shallow_width)))
        self.up1 = UpStage(C, 32, 64)
        self.up2 = UpStage(64, shallow_width, 32)
        self.head = nn.Conv2d(32, 1, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # in which these convolutions are faster

    def spatial_reasoning(self, similarity):
        """Each class alone: [B, N, h, w] -> [B, N, C, h, w]."""
        x = self.lift(similarity.flatten(0, 1).unsqueeze(1))  # [B*N, 1, h, w] -> [B*N, C, h, w]
        return (x + self.aspp(x)).unflatten(0, similarity.shape[:2])

    def semantic_reasoning(self, x, text):
        """Classes against each other, all at once: [B, N, C, h, w], text [N, E] -> the same."""
        text = self.text_proj(F.normalize(text, dim=1))  # [N, C]
        for layer in self.semantic:
            x = layer(x, text)
        return x

    def upsampling(self, x, shallow, deep):
        """Each class alone: [B, N, C, h, w] -> logits [B, N, 4h, 4w]."""
        B, N = x.shape[:2]
        x = self.up1(x.flatten(0, 1), deep)  # [B*N, 64, 2h, 2w]
        x = self.up2(x, shallow)  # [B*N, 32, 4h, 4w]
        return self.head(x).view(B, N, *x.shape[2:])

    def by_classes(self, function, x, *shared):
        """function(x, *shared) on a few of the classes of x [B, N, ...] at a time; inside it, N is
        their number. Without gradients 150 classes then need little more memory than 21; with them,
        too, under `recompute`, where the backward pass computes each group once more."""
        if self.recompute and torch.is_grad_enabled():
            function = partial(checkpoint, function, use_reentrant=False)
        parts = x.split(max(1, MAPS_AT_ONCE // len(x)), dim=1)
        return torch.cat([function(part, *shared) for part in parts], dim=1)

    def forward(self, dense, skips, text):
        """dense [B, E, h, w], skips (shallow, deep) [B, ., ., .], text [N, E]
        -> logits [B, N, 4h, 4w]."""
        shallow, deep = skips
        x = self.by_classes(self.spatial_reasoning, cosine_maps(dense, text))
        x = self.semantic_reasoning(x, text)
        return self.by_classes(self.upsampling, x, self.shallow_proj(shallow), self.deep_proj(deep))


class VisionDecoder(nn.Module):
    """The baseline without language: DeepLabV3+ on the same ViT, as in UniMatch.

    Same arguments as the language-guided decoder's forward (it ignores the text and, as published,
    the shallow skip); the last layer has N fixed outputs. Logits [B, N, h, w]. To train, B > 1."""

    def __init__(self, embed_dim: int, skip_dim: int, classes: int, width: int = 64):
        super().__init__()
        norm = nn.BatchNorm2d
        self.aspp = ASPP(embed_dim, width, width, norm)
        self.skip_proj = conv_norm_relu(skip_dim, 48, 1, norm=norm)
        self.fuse = nn.Sequential(conv_norm_relu(48 + width, 256, 3, norm=norm),
                                  conv_norm_relu(256, 256, 3, norm=norm))
        self.head = nn.Conv2d(256, classes, 1)

    def forward(self, dense, skips, text=None):
        _, deep = skips
        x = torch.cat([self.skip_proj(deep), self.aspp(dense)], dim=1)  # [B, 48 + width, h, w]
        return self.head(self.fuse(x))


# ----------------------------------------------------------------------------------------------
# 6. Three networks: student, frozen CLIP (paper: Dense CLIP Guidance), EMA teacher
# Who tells the student when there is no mask? The teacher is right more and more often, but its
# mistakes feed on themselves. Frozen CLIP is coarse, but what it gets wrong does not grow.
# In: images [B, 3, H, W]. Out: logits [B, N, H, W], or labels [B, H, W].

class SemiVL(nn.Module):
    """Images -> logits: dense CLIP, optional convolutional skip, decoder. Args:
        clip: the image encoder.
        decoder: LanguageGuidedDecoder or VisionDecoder.
        text: [N, E], one embedding a class.
        conv: optional (Cityscapes), images -> list; its last map, [B, 256, H/4, W/4], replaces the
            shallow skip: thin things such as poles are lost in a patch of 16 pixels.
    """

    def __init__(self, clip: DenseCLIP, decoder: nn.Module, text: torch.Tensor, conv=None):
        super().__init__()
        self.clip, self.decoder, self.conv = clip, decoder, conv
        self.register_buffer("text", text)

    def forward(self, images: torch.Tensor, perturb: int = 0) -> torch.Tensor:
        """[B, 3, H, W], normalised -> logits [B, N, H, W].

        The last `perturb` images of the batch get UniMatch's feature perturbation: of the dense
        embedding and each skip map, half of the channels are zeroed whole, the others doubled."""
        dense, (shallow, deep) = self.clip(images)
        if self.conv is not None:
            shallow = self.conv(images)[-1]  # timm gives a list
        features = [dense, shallow, deep]
        if perturb:
            features = [torch.cat([f[:-perturb], F.dropout2d(f[-perturb:], 0.5)])
                        for f in features]
        dense, *skips = features
        logits = self.decoder(dense, skips, self.text)
        # Logits cover the image as `encode` padded it. Resizing squeezes them a little; cutting off
        # the padding would be exact, but the authors' weights are used to this.
        size = images.shape[2:]
        return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


class FrozenGuidance(nn.Module):
    """CLIP as it was before training, asked about every pixel (the paper's dense CLIP guidance).

    It has never seen a mask, but it does not drift: its labels keep the student from confirming its
    own mistakes where the few labelled images say nothing. Traps: without the scale of 100 softmax
    of cosines is flat, and thresholds mean nothing; a class of many concepts has more chances.

    Args:
        clip: a DenseCLIP that nobody trains (see `copy_trained`).
        concepts: [K, E] text embeddings, class after class.
        sizes: how many of them each of the N classes has.
        conf: probability from which a label counts.
    """

    def __init__(self, clip: DenseCLIP, concepts, sizes: list[int], conf=0.9):
        super().__init__()
        self.clip, self.sizes, self.conf = clip, sizes, conf
        self.register_buffer("concepts", concepts)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W], normalised -> zero-shot logits [B, N, H, W], 100 times a cosine."""
        dense, _ = self.clip(images)
        similarity = cosine_maps(dense, self.concepts)  # [B, K, h, w]
        # A class is where ANY of its concepts is: the best one speaks for it.
        groups = similarity.split(self.sizes, dim=1)  # N of [B, concepts of the class, h, w]
        similarity = torch.stack([group.amax(1) for group in groups], dim=1)  # [B, N, h, w]
        similarity = F.interpolate(similarity, images.shape[2:], mode="bilinear")  # [B, N, H, W]
        return 100 * similarity  # 100 is the scale that CLIP's training ended at

    def labels(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> guidance labels [B, H, W], IGNORE where CLIP is not sure."""
        confidence, label = self(images).softmax(1).max(1)
        return label.masked_fill(confidence < self.conf, IGNORE)


class EMATeacher:
    """Mean teacher: an exponential moving average of the student makes the pseudo-labels.

    Averaging smooths out single steps' mistakes, so the labels are steadier than the student's. The
    average is what is tested and saved (UniMatch V2). With decay 0 it equals the student.

        >>> student = nn.Linear(2, 1)
        >>> teacher = EMATeacher(student, decay=0.99)
        >>> teacher.update(student, step=0)  # after each optimiser step
    """

    def __init__(self, student: nn.Module, decay: float = 0.996):
        self.model, self.decay = copy_trained(student), decay

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, N, H, W] of images [B, 3, H, W]."""
        return self.model(images)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """teacher = decay * teacher + (1 - decay) * student, after optimiser step `step` (from 0).

        The decay grows from 0, so that the random initial decoder is forgotten at once."""
        decay = min(1 - 1 / (step + 1), self.decay)
        for mine, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
            if theirs.requires_grad:
                mine.lerp_(theirs, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)  # batch-norm statistics are moving averages already


def assemble(cfg: Config, visual, text: torch.Tensor, conv_weights: str = "none") -> SemiVL:
    """The model that the settings describe, around a visual tower and the classes' text [N, E].

    conv_weights: as the setting; "none" where a checkpoint is about to fill them."""
    # 801 // 16 = 50, though a padded crop has 51 patches a side: the authors' weights hold 50 x 50.
    side = cfg.crop // visual.conv1.kernel_size[0]
    if not side:
        raise UserError(f"--crop {cfg.crop}: smaller than a patch of --clip {cfg.clip}")
    stats = data_prep.clip_statistics(cfg.clip, cfg.clip_tag) if cfg.conv_skip else None
    clip = DenseCLIP(visual, (side, side), cfg.authors_clip, stats, data_prep.linear)
    spatial_fine_tuning(clip, cfg.finetune)
    E, D = clip.embed_dim, clip.width
    if cfg.decoder == "vision":
        return SemiVL(clip, VisionDecoder(E, D, len(text)), text)
    if cfg.conv_skip:
        decoder = LanguageGuidedDecoder(E, 256, D, shallow_width=32, recompute=cfg.recompute)
        return SemiVL(clip, decoder, text, data_prep.conv_encoder(conv_weights))
    return SemiVL(clip, LanguageGuidedDecoder(E, D, D, recompute=cfg.recompute), text)


def normalize(images: torch.Tensor, cfg: Config) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float, by the statistics that section 3 tells of."""
    clip_stats = data_prep.clip_statistics(cfg.clip, cfg.clip_tag)
    mean, std = IMAGENET_STATS if cfg.authors_clip or cfg.conv_skip else clip_stats
    # After the copy to the device: bytes are a quarter of the traffic.
    return VF.normalize(images.float() / 255, mean, std)


# ----------------------------------------------------------------------------------------------
# 7. Augmentation: how to ask twice about the same pixels? (paper: consistency training; UniMatch)
# In: a file. Out: uint8 [3, crop, crop]: a weak view, easy, whose prediction makes the target; two
# strong views of the same crop in other colours, hard, that are to get the same answer. Geometry
# is shared, since a label must stay on its pixel.

def scaled_size(height: int, width: int, scale: float) -> list[int]:
    """[height, width] times scale, rounded half up; not below one pixel."""
    return [max(1, int(n * scale + 0.5)) for n in (height, width)]


def random_size(height: int, width: int, cfg: Config) -> list[int]:
    """A random size for an image, keeping its aspect; r is uniform in [scale_min, scale_max].

    With `fit` the largest whose long side is at most 4 crop r and whose short side at most crop r
    (2048 r, 512 r as published): at r = 1, 500 x 375 becomes 683 x 512. Otherwise the long side
    becomes r times itself."""
    long, short = max(height, width), min(height, width)
    if cfg.fit:
        r = float(torch.empty(()).uniform_(cfg.scale_min, cfg.scale_max))
        return scaled_size(height, width, min(4 * cfg.crop * r / long, cfg.crop * r / short))
    low, high = int(cfg.scale_min * long), int(cfg.scale_max * long)
    return scaled_size(height, width, int(torch.randint(low, high + 1, ())) / long)


def scale_crop_flip(image: torch.Tensor, mask: torch.Tensor, cfg: Config):
    """Random scale, crop and flip: uint8 [3, ., .], [., .] -> [3, crop, crop], [crop, crop].

    A small image is padded at the right and bottom: black, mask IGNORE."""
    crop, size = cfg.crop, random_size(*mask.shape, cfg)
    image = VF.resize(image, size, antialias=True)
    # Careful: torchvision's NEAREST is off by half a pixel; NEAREST_EXACT is PIL's.
    mask = VF.resize(mask[None], size, interpolation=v2.InterpolationMode.NEAREST_EXACT)
    pad = [0, 0, max(crop - size[1], 0), max(crop - size[0], 0)]  # left, top, right, bottom
    image, mask = VF.pad(image, pad, fill=0), VF.pad(mask, pad, fill=IGNORE)
    top, left = (int(torch.randint(n - crop + 1, ())) for n in image.shape[1:])
    image, mask = (VF.crop(t, top, left, crop, crop) for t in (image, mask))
    if torch.rand(()) < 0.5:
        image, mask = VF.horizontal_flip(image), VF.horizontal_flip(mask)
    return image, mask[0]


strong_view = v2.Compose([  # UniMatch's; a kernel of 13 reaches 6 pixels, 3 sigma, each way
    v2.RandomApply([v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25)], 0.8),
    v2.RandomGrayscale(0.2),
    v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], 0.5),
])


def cutmix_box(size: int) -> torch.Tensor:
    """A random box (top, left, bottom, right) in a crop of size x size; empty with p = 0.5."""
    if torch.rand(()) < 0.5:
        return torch.zeros(4, dtype=torch.long)
    area = float(torch.empty(()).uniform_(0.02, 0.4)) * size * size
    while True:  # with the same area until it fits: a new area would favour small boxes
        ratio = float(torch.empty(()).uniform_(0.3, 1 / 0.3))
        width, height = int(math.sqrt(area / ratio)), int(math.sqrt(area * ratio))
        top, left = torch.randint(size, (2,)).tolist()
        if left + width <= size and top + height <= size:
            return torch.tensor([top, left, top + height, left + width])


@lru_cache(maxsize=4)  # two lists, each at the border of two epochs
def shuffled(length: int, *seed: int) -> np.ndarray:
    """A random order of `length` things, the same for the same seed."""
    return np.random.default_rng(seed).permutation(length)


class TrainingPictures(Dataset):
    """Item i is all that position i of a run needs: one labelled and one unlabelled image. Lists
    hold entries (image file, mask file or None). Items: x, w, s1, s2 uint8 [3, crop, crop]; y uint8
    and padding bool [crop, crop]; box1, box2 [4]; files, a string. (Or x, y, files only.)

    Order and augmentation are functions of (seed, i) alone, so a run is the same with any number
    of workers, and a resumed run goes on where it stopped. Each list is shuffled anew whenever it
    has been gone through; the labelled one, being short, comes round more often."""

    def __init__(self, folder, labelled: list, unlabelled: list, cfg: Config, length: int):
        self.folder, self.cfg, self.length = folder, cfg, length
        self.lists = {"labelled": labelled, "unlabelled": unlabelled}

    def __len__(self):
        return self.length

    def pick(self, which: str, i: int):
        """Entry i of the list `which`, repeated without end and shuffled anew each time."""
        entries = self.lists[which]
        epoch, place = divmod(i, len(entries))
        return entries[shuffled(len(entries), self.cfg.seed, which == "labelled", epoch)[place]]

    def __getitem__(self, i: int) -> dict:
        cfg = self.cfg
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed * STREAM + i)
            entry = self.pick("labelled", i)
            x, y = scale_crop_flip(self.folder.image(entry), self.folder.mask(entry), cfg)
            item = dict(x=x, y=y, files=str(entry[0]))
            if self.lists["unlabelled"]:
                entry = self.pick("unlabelled", i)
                image = self.folder.image(entry)
                marker = torch.zeros(image.shape[1:], dtype=torch.uint8)
                w, marker = scale_crop_flip(image, marker, cfg)  # IGNORE where it is padded
                item.update(
                    w=w, s1=strong_view(w), s2=strong_view(w), padding=marker == IGNORE,
                    box1=cutmix_box(cfg.crop), box2=cutmix_box(cfg.crop),
                    files=f"{item['files']} {entry[0]}")
        return item


# ----------------------------------------------------------------------------------------------
# 8. Consistency: what should the student say about an image without a mask? (UniMatch, CVPR 2023)
# In: logits of x, s1, s2, and of w with dropped features. Out: seven losses, their weighted sum.
# Nobody knows the mask, but the answer must not depend on the colours. The teacher labels the weak
# view: argmax is the pseudo-label, its probability the confidence. The student must say the same of
# harder versions: recoloured with a box of another image pasted in (s1, s2: a thing must be known
# without its surroundings), and w itself with half of its feature channels gone (fp, "feature
# perturbation"). The trap is confirmation bias: a wrong pseudo-label is learned like a right one.
# So only confident pixels count (at first hardly any: these losses begin near 0), and frozen CLIP,
# which does not learn from itself, has a say.

class Targets(NamedTuple):
    """What the unlabelled images are taught, per pixel; all [B, H, W]. They travel together."""

    label: torch.Tensor  # int64, pseudo-label of the teacher
    confidence: torch.Tensor  # float32, its probability
    padding: torch.Tensor  # bool, True where there is no image
    clip_label: torch.Tensor  # int64, what frozen CLIP takes it for, or IGNORE

    def apply(self, change) -> "Targets":
        """The same change to each of the four."""
        return Targets(*(change(t) for t in self))


@torch.no_grad()
def make_targets(teacher, guidance, w, padding) -> Targets:
    """Pseudo-labels and guidance labels (`guidance` may be None) of weak views w [B, 3, H, W],
    normalised; padding [B, H, W] is True where there is no image."""
    confidence, label = teacher(w).softmax(1).max(1)
    clip_label = guidance.labels(w) if guidance else torch.full_like(label, IGNORE)
    return Targets(label, confidence, padding, clip_label.masked_fill(padding, IGNORE))


def cutmix(mine: torch.Tensor, partner: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Pastes into each item its box of the partner's item (CutMix, Yun et al., ICCV 2019). The same
    box goes into an image and into each of its targets, or labels and pixels part.

    mine, partner: [B, H, W] or [B, 3, H, W], any dtype; box: [B, 4], top, left, bottom, right.

        >>> image = torch.zeros(1, 3, 4, 4)
        >>> cutmix(image, image + 1, torch.tensor([[0, 0, 2, 4]]))[0, 0, :, 0]
        tensor([1., 1., 0., 0.])
    """
    rows = torch.arange(mine.shape[-2], device=mine.device)[:, None]
    cols = torch.arange(mine.shape[-1], device=mine.device)
    top, left, bottom, right = box.view(-1, 4, 1, 1).unbind(1)  # each [B, 1, 1]
    inside = (rows >= top) & (rows < bottom) & (cols >= left) & (cols < right)  # [B, H, W]
    return torch.where(inside if mine.ndim == 3 else inside.unsqueeze(1), partner, mine)


def supervised_loss(logits, y):
    """Cross-entropy of logits [B, N, H, W] and masks y, int64 [B, H, W]; mean of known pixels."""
    loss = F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="sum")
    return loss / (y != IGNORE).sum().clamp(min=1)  # never 0/0: a crop may hold no label at all


def consistency_loss(logits, label, confidence, padding, conf=0.95, weighting="pixel"):
    """Cross-entropy against pseudo-labels, over all pixels that are not padding.

    logits [B, N, H, W]; label (int64), confidence, padding (bool) [B, H, W]. "pixel" keeps
    confident pixels only. "mean" and "share" keep all, weighed by their image's mean confidence, or
    by its share of confident pixels. The divisor counts all, so unsure images say little.

        >>> label, sure = torch.zeros(1, 2, 2, dtype=torch.long), torch.ones(1, 2, 2)
        >>> loss = consistency_loss(torch.zeros(1, 2, 2, 2), label, sure, padding=sure < 1)
        >>> round(loss.item(), 3)  # log(2): two classes, equal logits
        0.693
    """
    if weighting not in ("pixel", "mean", "share"):
        raise ValueError(f"weighting {weighting!r}: take pixel, mean or share")
    valid, confidence = ~padding.bool(), confidence.detach()
    loss = F.cross_entropy(logits, label, reduction="none")  # [B, H, W]
    weight = confidence if weighting == "mean" else (confidence >= conf).float()  # [B, H, W]
    if weighting != "pixel":
        pixels = valid.sum((1, 2), keepdim=True).clamp(min=1)
        weight = (weight * valid).sum((1, 2), keepdim=True) / pixels  # [B, 1, 1]
    return torch.where(valid, loss * weight, 0).sum() / valid.sum().clamp(min=1)


def guidance_loss(logits, clip_label):
    """Cross-entropy of logits [B, N, H, W] against frozen CLIP's labels [B, H, W], divided by ALL
    pixels (as the authors do; padding, too): where CLIP is rarely sure, it has little to say."""
    loss = F.cross_entropy(logits, clip_label, ignore_index=IGNORE, reduction="sum")
    return loss / clip_label.numel()


def semivl_loss(student, x, y, views, guidance_weight, conf=0.95, weighting="pixel") -> dict:
    """One forward of the student -> scalars: "x"; "s1", "s2", "fp"; "guidance_s1", "guidance_s2",
    "guidance_fp"; and their weighted sum "total".

    UniMatch's weights: labelled and unlabelled count alike, fp as much as both strong views.

    Args:
        student: (images, perturb=count) -> logits, as `SemiVL.forward`.
        x, y: labelled images [B, 3, H, W], normalised (those of views, too), masks [B, H, W].
        views: {"s1": (s1, Targets), "s2": (s2, Targets), "fp": (w, Targets)}, or {}: L_x alone.
    """
    names = ("s1", "s2", "fp") if views else ()  # fp last: its features are perturbed
    images = torch.cat([x] + [views[name][0] for name in names])  # [4 B, 3, H, W]
    logits_x, *rest = student(images, perturb=len(x) if views else 0).split(len(x))
    L_x, L, G = supervised_loss(logits_x, y), {}, {}
    if not views:
        return dict(x=L_x, total=L_x)

    for name, logits in zip(names, rest):  # logits [B, N, H, W]
        _, t = views[name]
        L[name] = consistency_loss(logits, t.label, t.confidence, t.padding, conf, weighting)
        G[name] = guidance_loss(logits, t.clip_label)
    consistency = 0.25 * L["s1"] + 0.25 * L["s2"] + 0.5 * L["fp"]
    guidance = 0.25 * G["s1"] + 0.25 * G["s2"] + 0.5 * G["fp"]
    total = (L_x + consistency) / 2 + guidance_weight * guidance  # halves as published
    return dict(x=L_x, **L, **{f"guidance_{name}": G[name] for name in G}, total=total)


# ----------------------------------------------------------------------------------------------
# 9. Evaluation: how good is a model? Sliding window, one confusion matrix, mIoU
# In: an image [3, H, W] of any size. Out: scores [N, H, W]; of a data set: IoU [N], percent.
# Counts of all images are added before dividing: a mean of each image's own IoU is another number.

def window_starts(size: int, window: int, stride: int, mode: str) -> list[int]:
    """Where windows start along a side of `size` pixels. "logits": every stride, the last one moved
    back inside. "probabilities" (Cityscapes): every stride, the last ones cut off at the edge."""
    if mode not in ("logits", "probabilities"):
        raise ValueError(f"mode {mode!r}: take logits or probabilities")
    if mode == "probabilities":
        return list(range(0, size, stride))
    last = max(size - window, 0)
    return [min(i * stride, last) for i in range(math.ceil(last / stride) + 1)]


@torch.no_grad()
def sliding_window(model, images, window: int, stride: int, mode: str = "logits"):
    """Mean over overlapping windows of logits or of probabilities: [B, 3, H, W] -> [B, N, H, W].
    The ViT is at its best at the size it was trained on, so images are looked at in such pieces.
    window, stride (not above window): pixels; model: in eval mode, pieces [B, 3, ., .] of window x
    window pixels or, at an edge, less -> [B, N, ., .]; mode: also decides upon `window_starts`.

        >>> image = torch.randn(1, 3, 50, 70)
        >>> torch.allclose(sliding_window(lambda part: 2 * part, image, 32, 20), 2 * image)
        True
    """
    B, _, H, W = images.shape
    total, count = None, images.new_zeros(1, 1, H, W)
    for top in window_starts(H, window, stride, mode):
        for left in window_starts(W, window, stride, mode):
            part = (..., slice(top, top + window), slice(left, left + window))
            logits = model(images[part])
            if total is None:
                total = logits.new_zeros(B, logits.shape[1], H, W, dtype=torch.float32)
            total[part] += logits.softmax(1) if mode == "probabilities" else logits
            count[part] += 1
    return total / count


def segment(model, image: torch.Tensor, cfg: Config, device) -> torch.Tensor:
    """The authors' test protocol for one uint8 image [3, H, W] -> scores [N, H, W]."""
    H, W = image.shape[1:]
    stride = cfg.stride or 5 * cfg.crop // 6
    if cfg.fit:  # the short side becomes the window's, whatever the long one does
        image = VF.resize(image, scaled_size(H, W, cfg.crop / min(H, W)), antialias=True)
    images = normalize(image[None].to(device), cfg)
    with data_prep.autocast(cfg, device):
        scores = sliding_window(model, images, cfg.crop, stride, cfg.window_mode)
    # Back to the mask's size. Here the authors align corners; in `SemiVL.forward` they do not.
    return F.interpolate(scores, (H, W), mode="bilinear", align_corners=True)[0]


def confusion_matrix(prediction, target, classes: int) -> torch.Tensor:
    """Pixel counts [N, N], rows truth, columns prediction, of two label maps of one shape; where
    target is IGNORE it is left out. Elsewhere a label of `classes` or more raises ValueError.

        >>> matrix = confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2)
        >>> iou_per_class(matrix).tolist()
        [50.0, 50.0]
    """
    known = target != IGNORE
    truth, predicted = target[known].long(), prediction[known].long()
    if known.any() and max(truth.max(), predicted.max()) >= classes:
        raise ValueError(f"a label of {max(truth.max(), predicted.max())}, but {classes} classes")
    pairs = classes * truth + predicted
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def iou_per_class(matrix: torch.Tensor) -> torch.Tensor:
    """Confusion matrix [N, N] -> TP / (TP + FP + FN) in percent [N]; NaN for a class that occurs
    neither in truth nor in prediction (mIoU is the `nanmean`)."""
    hit = matrix.diag().double()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)  # 0 / 0 is NaN


def evaluate(model, folder, entries, cfg: Config, device, title="evaluate", keep=None):
    """IoU per class [N], percent, of a model (images -> logits) over images with masks.

    `keep(entry, prediction [H, W])` is called for each image, also for those without a mask."""
    matrix = torch.zeros(len(folder.classes), len(folder.classes), dtype=torch.long, device=device)
    rank, processes = data_prep.process()  # each evaluates its share of the images
    for entry in tqdm(entries[rank::processes], title, leave=False, disable=rank > 0 or None):
        prediction = segment(model, folder.image(entry), cfg, device).argmax(0)
        if keep:
            keep(entry, prediction.cpu())
        if entry[1]:
            target = folder.mask(entry).to(device)
            matrix += confusion_matrix(prediction, target, len(folder.classes))
    return iou_per_class(data_prep.total(matrix).cpu())


# ----------------------------------------------------------------------------------------------
# 10. Training: what happens in a step, and around it?
# A step: rates; targets and CutMix (`views`); student, losses, gradients; optimiser; teacher.
# Batches come from section 7, losses from 8; what is logged, saved and drawn is in data_prep.py.

def learning_rate(base: float, step: int, steps: int) -> float:
    """DeepLab's polynomial decay. Steps 0 and 1 both run at the base rate, as in the authors' code,
    which sets the rate after a step."""
    return base * (1 - max(step - 1, 0) / steps) ** 0.9


def make_optimizer(student: SemiVL, cfg: Config) -> torch.optim.AdamW:
    """AdamW with two rates: the decoder starts from nothing, the ViT must not run away."""
    new, pretrained = [], []  # the decoder; ViT and convolutional skip
    for name, p in student.named_parameters():
        if p.requires_grad:
            (new if name.startswith("decoder.") else pretrained).append(p)
    groups = [dict(params=params, lr=lr, base_lr=lr)  # lr will fall from base_lr
              for params, lr in ((new, cfg.lr), (pretrained, cfg.vit_lr))]
    return torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)


class Training:
    """A run: student, EMA teacher, frozen guidance, optimiser, data, and the step they take."""

    def __init__(self, cfg: Config, folder: data_prep.Folder, device: torch.device):
        torch.manual_seed(cfg.seed)
        clip = data_prep.load_clip(cfg.clip, cfg.clip_tag, cfg.clip_weights, cfg.root)
        language = describe_classes(clip, folder.classes, cfg)
        # The text tower has done its work; from here on only the visual one is kept.
        student = assemble(cfg, clip.visual, language.decoder_text, cfg.conv_weights)
        self.cfg, self.folder, self.device = cfg, folder, device
        self.student = student.to(device).train()
        self.parallel = data_prep.parallel_model(self.student, device)  # in DDP under torchrun
        frozen = copy_trained(self.student.clip)  # CLIP as it is before the first step
        self.guidance = FrozenGuidance(
            frozen, language.concepts, language.sizes, cfg.guidance_conf).to(device)
        each = [1] * len(language.names)  # a name is the only concept of its class
        self.frozen_names = FrozenGuidance(frozen, language.names, each).to(device)  # to compare
        self.teacher = EMATeacher(self.student, cfg.ema)
        self.optimizer = make_optimizer(self.student, cfg)
        # Without unlabelled images a run is as long as with them, to be compared.
        images = len(folder.unlabelled or folder.labelled)
        self.steps = cfg.steps or math.ceil(cfg.epochs * images / cfg.batch)
        self.step, self.evaluated = 0, 0  # steps done; steps done at the last evaluation
        self.last = self.best = -1.0  # validation mIoU of the teacher, percent; -1: none yet
        # [N], pixels with a confident pseudo-label of each class since the last evaluation, for log
        self.accepted = torch.zeros(len(folder.classes), dtype=torch.long, device=device)

    def batches(self):
        """The batches from the present step to the last; of each, this process's share."""
        cfg, folder = self.cfg, self.folder
        pictures = TrainingPictures(folder, folder.labelled, folder.unlabelled if cfg.unlabelled
                                    else [], cfg, self.steps * cfg.batch)
        return data_prep.loader(pictures, self.step * cfg.batch, cfg, self.device)

    def micro_batches(self, data: dict) -> list[slice]:
        """Which images of the (share of the) batch go through the networks at a time."""
        size = self.cfg.micro_batch
        return [slice(i, i + size) for i in range(0, len(data["x"]), size)]

    def views(self, data: dict) -> dict:
        """What the student is to learn of unlabelled images: "s1", "s2" (strong views after CutMix)
        and "fp" (the weak view) -> (images, uint8 [B, 3, H, W]; their Targets)."""
        guidance = self.guidance if self.cfg.guidance else None
        with data_prep.autocast(self.cfg, self.device):
            parts = [make_targets(self.teacher, guidance, normalize(data["w"][chunk], self.cfg),
                                  data["padding"][chunk]) for chunk in self.micro_batches(data)]
        targets = Targets(*map(torch.cat, zip(*parts)))  # [B, H, W] each

        def mixed(name, box_name):
            # Image i's partner is image B - 1 - i of the batch (of all processes), so that each
            # image is loaded and predicted once. The middle one of an odd batch is its own partner.
            def paste(mine):
                return cutmix(mine, data_prep.mirrored(mine), data[box_name])
            return paste(data[name]), targets.apply(paste)

        return {"s1": mixed("s1", "box1"), "s2": mixed("s2", "box2"), "fp": (data["w"], targets)}

    def train_step(self, batch: dict) -> dict:
        """One optimiser step on a batch of `batches` -> scalars for the log: the losses of
        `semivl_loss`, and which share of pixels has a confident pseudo-label ("kept"), a label of
        frozen CLIP ("guided"). UserError, before any weight changes, if the loss is not finite."""
        cfg = self.cfg
        # CLIP knows what things are, but not where they end: as the student learns, CLIP falls
        # silent, or its mistakes would hold the student back.
        guidance_weight = cfg.guidance * (1 - self.step / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(group["base_lr"], self.step, self.steps)
        data = data_prep.to_device(batch, self.device)

        # 1. Teacher's pseudo-labels, frozen CLIP's labels, CutMix.
        views = self.views(data) if cfg.unlabelled else {}
        log = data_prep.tally(self, views["fp"][1]) if views else {}

        # 2. Student and losses, one micro-batch after another. Each loss is a mean over its own
        # micro-batch's pixels; the last backward pass averages gradients over processes.
        chunks, sums = self.micro_batches(data), {}
        first = self.step * cfg.batch + data_prep.process()[0] * len(data["x"])
        for chunk in chunks:
            # Seeded by the position in the run: what is dropped depends neither on resuming nor (as
            # long as micro-batches stay as large) on the number of processes.
            torch.manual_seed(cfg.seed * STREAM + STREAM // 2 + first + chunk.start)
            x, y = normalize(data["x"][chunk], cfg), data["y"][chunk].long()
            part = {name: (normalize(view[chunk], cfg), t.apply(lambda a: a[chunk]))
                    for name, (view, t) in views.items()}
            with data_prep.in_step(self.parallel, chunk is chunks[-1]):
                with data_prep.autocast(cfg, self.device):
                    losses = semivl_loss(self.parallel, x, y, part, guidance_weight, cfg.conf,
                                         cfg.weighting)
                (losses["total"] / len(chunks)).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach() / len(chunks)
        log |= data_prep.means(sums)
        if not math.isfinite(log["total"]):
            raise UserError(f"step {self.step}: the loss is {log['total']}, so the run stops. "
                            f"Lower --lr, or look at these files: {' '.join(batch['files'])}")

        # 3. The student learns, then the teacher follows it.
        self.optimizer.step()
        self.optimizer.zero_grad()
        data_prep.average_buffers(self.student)  # batch norm's, over processes
        self.teacher.update(self.student, self.step)
        self.step += 1
        return log


THIS_FILE = sys.modules[__name__]  # data_prep.py calls back what stands above


@data_prep.in_every_process
def train(cfg: Config, resume: dict | None = None) -> None:
    """A whole run; the recorder writes log, checkpoints, pictures, also if it is interrupted."""
    folder = data_prep.training_data(cfg, CLASSES, resume)
    run = Training(cfg, folder, data_prep.pick_device(cfg.device))
    if resume:
        data_prep.restore_run(run, resume)
    else:
        cfg.out = data_prep.new_run(cfg, folder, __file__)
    print(data_prep.describe_run(run), flush=True)

    every, batch = math.ceil(run.steps / cfg.evals), None
    with closing(run.batches()) as batches, data_prep.Recorder(THIS_FILE, run) as recorder:
        if not run.step:
            recorder.frozen_clip()  # its mIoU; near zero, if weights or class names are wrong
        while run.evaluated < run.steps:
            # A run that was stopped while it evaluated does so first when it is resumed.
            if run.evaluated < run.step and (run.step % every == 0 or run.step == run.steps):
                recorder.evaluation(batch)  # of teacher and student; sets run.evaluated
            else:
                batch = next(batches)
                with recorder.uninterrupted():
                    recorder.step(run.train_step(batch))
    models = {"CLIP by names": run.frozen_names, "by definitions": run.guidance}
    data_prep.report(THIS_FILE, run, models | {"SemiVL": run.teacher})


# ----------------------------------------------------------------------------------------------
# 11. Command line

@data_prep.mistakes_in_one_line
def main(argv=None) -> None:
    """Runs the command line. A user's mistake is one line on stderr and exit code 2."""
    typed, args = data_prep.parse_args(argv, Config, PRESETS)
    cfg = Config(**PRESETS.get(typed.get("dataset", "toy"), {}) | typed)
    if args.resume is not None:
        train(*data_prep.load_run(args.resume, Config, typed))
    elif not data_prep.other_action(THIS_FILE, args, typed, cfg):  # --eval, --predict, ...
        data_prep.check_settings(cfg)
        train(cfg)


# ----------------------------------------------------------------------------------------------
# 12. The details that matter. Each: what | where | the authors' code -> ours, where they differ
#
# prompt "a photo of a NAME", no full stop, names spelled as published | encode_text
# decoder reads names, guidance reads definitions | describe_classes | Cityscapes: means of concepts
# GELU, LayerNorm eps, image statistics | DenseCLIP, normalize | exact, 1e-6, ImageNet's -> CLIP's
# last block without attention, skips from value paths of blocks 0 and 4 | DenseCLIP.encode
# position embedding: bicubic, no antialiasing, resized once, then trained | resize_position
# attention and position embedding train, nothing else of the ViT | spatial_fine_tuning
# a class is an item of the batch; text is concatenated, not multiplied | SemanticReasoning
# a skip's convolution, the same numbers | conv_by_parts | once a class -> once a group of classes
# logits of the padded image become H x W | SemiVL.forward | by way of crop x crop -> in one step
# who makes the pseudo-labels | EMATeacher | the student (of its own w in training mode, which batch
#     norm notices) -> its moving average, in eval mode
# best concept of a class, times 100, softmax over classes, then 0.9 | FrozenGuidance
# image padded black before normalising, no loss sees it | scale_crop_flip
# masks are resized to PIL's nearest | scale_crop_flip
# images are resized | scale_crop_flip, segment | VOC, ADE20K: no antialiasing -> always with it
# a CutMix box keeps its area until it fits | cutmix_box
# CutMix partner | Training.views | another crop of the same image -> image B - 1 - i
# feature dropout: whole channels, dense map and skips, not the text | SemiVL.forward
# L_s: divided by all unpadded pixels, kept or not | consistency_loss
# mean and share weighting | consistency_loss | sums of batch and padding -> each image's own
# G: divided by all pixels, padding too; weight falls linearly to 0 | guidance_loss, train_step
# weight decay on norms, too; steps 0 and 1 at the base rate | make_optimizer, learning_rate
# windows: logits averaged, on Cityscapes probabilities, other starts | window_starts
# mIoU over classes that occur | iou_per_class | an absent class counts 0 -> is left out

if __name__ == "__main__":
    sys.exit(main())
