"""Data for semivl.py: folders of pictures, weight files, reports, and the built-in toy world.

    python data_prep.py toy                          paints the toy world, trains its tiny CLIP
    python data_prep.py voc                          fetches, unpacks, checks; also coco, ade20k
    python data_prep.py cityscapes --source FOLDER   from the archives that a login gives

A folder of pictures, the toy world included, looks like this:

    FOLDER/dataset.json            {"classes": [...], "definitions": {"car": ["car", "van"]},
                                    "ignore_index": 255}       the last two are optional
    FOLDER/splits/train.txt        "IMAGE MASK" or "IMAGE" a line, paths relative to FOLDER
    FOLDER/splits/val.txt          "IMAGE MASK" a line
    FOLDER/splits/test.txt         optional, read once, at the end of a run
    FOLDER/splits/N/labeled.txt    optional; else N images of train.txt are drawn with the seed

A mask is a PNG whose pixel values are class numbers (palette or greyscale, never colours).
"""

import argparse
import colorsys
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import http.client
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

try:
    import fcntl  # file locks and memory counters; there are none on Windows
    import resource
except ImportError:
    fcntl = resource = None

IGNORE = 255
# What PIL raises for a file that is no picture, or a broken or an enormous one.
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class UserError(Exception):
    """A mistake of the user: one clear line, exit code 2, no traceback."""


# ----------------------------------------------------------------------------------------------
# Folders of pictures
# ----------------------------------------------------------------------------------------------


def read_image(file, upright: bool = False) -> torch.Tensor:
    """Any picture file -> uint8 RGB [3, H, W]; `upright` turns it as a camera's EXIF tag says."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image) if upright else image
            if image.mode[0] in "IF":  # converted, all but the darkest would be white
                raise UserError(f"{file}: a picture of mode {image.mode}; save it with 8 bits")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except BROKEN as error:
        raise UserError(f"{file}: not a picture that can be read ({error})") from None


def read_list(file: Path, need_mask: bool) -> list[tuple]:
    """Lines "IMAGE MASK" or "IMAGE" -> [(image, mask or None)]."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except FileNotFoundError:
        raise UserError(f"{file} is missing: a list of images, one 'IMAGE MASK' a line") from None
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file}: not a UTF-8 text ({error})") from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty: it should list images, one 'IMAGE MASK' a line")
    for number, words in enumerate(lines, 1):
        if len(words) != 2 and (need_mask or len(words) != 1):
            form = "'IMAGE MASK'" if need_mask else "'IMAGE MASK' or 'IMAGE'"
            raise UserError(f"{file}, line {number}: {' '.join(words)!r} should be {form} "
                            "(names without blanks)")
    return [(words[0], words[1] if len(words) == 2 else None) for words in lines]


class Folder:
    """A data set on disk. An entry is a pair (image, mask) of paths; the mask may be None."""

    def __init__(self, path: Path, classes: dict[str, list[str]], ignore: int):
        self.path, self.classes, self.ignore = Path(path), classes, ignore
        splits = self.path / "splits"
        self.train = read_list(splits / "train.txt", need_mask=False)
        self.val = read_list(splits / "val.txt", need_mask=True)
        test = splits / "test.txt"
        test = read_list(test, need_mask=False) if test.exists() else []
        self.test = [entry for entry in test if entry[1]]
        self.secret = [entry for entry in test if not entry[1]]  # a server has the masks
        self.labelled, self.unlabelled, self.drawn = [], [], False

    def image(self, entry: tuple) -> torch.Tensor:
        """uint8 RGB [3, H, W]."""
        return read_image(self.path / entry[0])

    def mask(self, entry: tuple) -> torch.Tensor:
        """uint8 [H, W]: class numbers, IGNORE where the folder's own ignore value stands."""
        file = self.path / entry[1]
        try:
            with Image.open(file) as image:
                # Never convert: a palette PNG's numbers are the labels, its colours are not.
                mode, mask = image.mode, np.array(image)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file") from None
        except BROKEN as error:
            raise UserError(f"{file}: not a mask that can be read ({error})") from None
        if mask.ndim != 2 or mode not in ("P", "L", "I", "I;16"):
            raise UserError(f"{file}: a mask of mode {mode}; save class numbers as a palette (P) "
                            "or greyscale (L) PNG")
        mask = np.where(mask == self.ignore, IGNORE, mask)
        wrong = mask[(mask < 0) | (mask >= len(self.classes)) & (mask != IGNORE)]
        if wrong.size:
            raise UserError(f"{file}: holds the value {wrong[0]}, but there are classes 0 to "
                            f"{len(self.classes) - 1} and ignore_index {self.ignore}; correct "
                            "the mask, or name the class in dataset.json")
        return torch.from_numpy(mask.astype(np.uint8))

    def choose_labelled(self, cfg, chosen: list | None = None) -> None:
        """Splits the training images into `cfg.labels` labelled ones and the unlabelled rest.

        By `chosen` (a run that goes on), by the list in splits/N/labeled.txt, or by a draw with
        the seed. Few images easily miss a class: of 100 draws, the first with the most classes.
        """
        count, fixed = cfg.labels, self.path / "splits" / str(cfg.labels) / "labeled.txt"
        if chosen:
            self.labelled = [tuple(entry) for entry in chosen]
        elif fixed.exists():
            self.labelled = read_list(fixed, need_mask=True)
            if len(self.labelled) != count:
                raise UserError(f"{fixed}: lists {len(self.labelled)} images, not {count}")
        elif cfg.dataset in PUBLISHED:
            raise UserError(f"{fixed} is missing: the published list of {count} images")
        else:
            masked = [entry for entry in self.train if entry[1]]
            if count > len(masked):
                raise UserError(f"--labels {count}: {self.path}/splits/train.txt has only "
                                f"{len(masked)} images with masks")
            shown, most, rng = {}, -1, np.random.default_rng(cfg.seed)
            for _ in range(100):
                draw = [masked[i] for i in rng.choice(len(masked), count, replace=False)]
                for entry in set(draw) - set(shown):
                    with contextlib.suppress(UserError):  # check() tells of all that is wrong
                        shown[entry] = set(self.mask(entry).unique().tolist()) - {IGNORE}
                classes = len(set().union(*(shown.get(entry, ()) for entry in draw)))
                if classes > most:
                    most, self.labelled, self.drawn = classes, draw, True
                if classes == len(self.classes):
                    break
        taken = {image for image, _ in self.labelled}
        self.unlabelled = [entry for entry in self.train if entry[0] not in taken]
        if cfg.unlabelled and not self.unlabelled:
            raise UserError(f"{self.path}: no training image is left unlabelled; use "
                            "--unlabelled off")

    def check(self, decode_all: bool = True) -> None:
        """Opens all that will be used, before it is; says all that is wrong at once, in at most
        20 lines. Of unlabelled images only the header is read unless `decode_all`."""
        def problem(entry: tuple):
            image, mask = self.path / entry[0], None
            try:
                if entry in masked:
                    mask = self.mask(entry)
                if mask is None and not decode_all:
                    Image.open(image).close()
                    return None
                size = self.image(entry).shape[1:]
            except FileNotFoundError:
                return f"{image}: no such file"
            except UserError as error:
                return str(error)
            except BROKEN as error:
                return f"{image}: not a picture that can be read ({error})"
            if mask is not None and mask.shape != size:
                return (f"{self.path / entry[1]}: {mask.shape[1]} x {mask.shape[0]} pixels, but "
                        f"its image has {size[1]} x {size[0]}; save it at the image's size")
            return None

        masked = dict.fromkeys(self.labelled + self.val + self.test)
        entries = masked | dict.fromkeys(self.unlabelled + self.secret)
        problems = list(filter(None, parallel(problem, entries, "check images and masks")))
        if problems:
            more = f"\n... and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise UserError("\n".join(problems[:20]) + more)


def open_folder(path: Path, classes: dict[str, list[str]] | None = None) -> Folder:
    """The folder at `path`; class names from its dataset.json unless they are given."""
    path = Path(path)
    if classes:
        return Folder(path, classes, IGNORE)
    file = path / "dataset.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        names = content["classes"]
        definitions = content.get("definitions", {})
        ignore = int(content.get("ignore_index", IGNORE))
    except OSError:
        raise UserError(f"{file} is missing: a data set is a folder with dataset.json and splits/ "
                        "(README.md, 'Your own pictures')") from None
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f'{file}: needs {{"classes": ["name", ...]}} in JSON ({error!r})') from None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(f"{file}: 'classes' must be a list of names")
    if len(names) > IGNORE:
        raise UserError(f"{file}: {len(names)} classes; a mask of bytes holds at most {IGNORE}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file}: the class name {twice!r} stands there twice")
    if not isinstance(definitions, dict) or not all(
            isinstance(words, list) and words and all(isinstance(word, str) for word in words)
            for words in definitions.values()):
        raise UserError(f"{file}: 'definitions' must map class names to lists of names")
    if unknown := set(definitions) - set(names):
        raise UserError(f"{file}: definitions of {unknown.pop()!r}, which is not a class")
    return Folder(path, {name: definitions.get(name, [name]) for name in names}, ignore)


# Labelled images -> mIoU in the paper (ViT-B/16); these are the published splits.
PUBLISHED = {
    "voc": {92: 84.0, 183: 85.6, 366: 86.0, 732: 86.7, 1464: 87.3},
    "coco": {232: 50.1, 463: 52.8, 925: 53.6, 1849: 55.4, 3697: 56.5},
    "ade20k": {158: 28.1, 316: 33.7, 632: 35.1, 1263: 37.2, 2526: 39.4},
    "cityscapes": {100: 76.2, 186: 77.9, 372: 79.4, 744: 80.3, 1488: 80.6},
}


def open_data(cfg, classes: dict, expected: list[str] | None = None) -> Folder:
    """The folder behind --dataset. classes: published name -> class names with their concepts.

    expected: the class names of a checkpoint; looked at before anything is fetched.
    """
    published = classes.get(cfg.dataset)
    wrong = UserError(f"--dataset {cfg.dataset}: has other classes than the checkpoint")
    if expected and published and list(published) != expected:
        raise wrong
    if cfg.dataset == "toy":
        path = make_toy(cfg.root)
    else:
        path = prepare(cfg.dataset, cfg.root) if cfg.dataset in PUBLISHED else Path(cfg.dataset)
    folder = open_folder(path, published)
    if expected and list(folder.classes) != expected:
        raise wrong
    return folder


# ----------------------------------------------------------------------------------------------
# The published data sets: where they are served, what to take of them, how to lay it out
# ----------------------------------------------------------------------------------------------


class Archive(NamedTuple):
    """A file to fetch: size in GB (about), digest "md5:..." or "" where none is known, URLs."""

    name: str
    size: float
    digest: str
    urls: tuple


ARCHIVES = {
    "voc": [Archive(
        "VOCtrainval_11-May-2012.tar", 2.0, "md5:6cd6e144f989b92b3379bac3b3de84fd",
        ("https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
         "https://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar"))],
    "coco": [
        Archive("train2017.zip", 19.3, "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
                ("http://images.cocodataset.org/zips/train2017.zip",
                 "https://s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip")),
        Archive("val2017.zip", 0.8, "md5:442b8da7639aecaf257c1dceb8ba8c80",
                ("http://images.cocodataset.org/zips/val2017.zip",
                 "https://s3.amazonaws.com/images.cocodataset.org/zips/val2017.zip")),
        Archive("ground_truth_coco.zip", 0.5, "",  # counts and values are checked instead
                ("https://github.com/google-research/semivl/releases/download/checkpoints/"
                 "ground_truth_coco.zip",))],
    "ade20k": [Archive(
        "ADEChallengeData2016.zip", 1.0, "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
        ("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",))],
    "cityscapes": [  # behind a login: taken from --source only
        Archive("leftImg8bit_trainvaltest.zip", 11.6, "", ()),
        Archive("gtFine_trainvaltest.zip", 0.25, "", ())],
}
TAKEN = {  # pattern of a path in the archives -> path in the data folder; all else stays there
    "voc": {r"VOCdevkit/VOC2012/((JPEGImages/[^/]+\.jpg)|(SegmentationClass/[^/]+\.png))": r"\1"},
    "coco": {r"((train|val)2017/\d{12}\.jpg)": r"\1", r"(.*/)?(\d{12}\.png)": r"masks/\2"},
    "ade20k": {r"ADEChallengeData2016/((images|annotations)/(training|validation)/"
               r"ADE_\w+\.(jpg|png))": r"\1"},
    "cityscapes": {r"leftImg8bit/(train|val|test)/\w+/\w+\.png": r"\g<0>",
                   r"gtFine/(train|val)/\w+/\w+_gtFine_labelIds\.png": r"\g<0>"},
}
COUNTS = {  # classes, training images, validation images
    "voc": (21, 10_582, 1_449), "coco": (81, 118_287, 5_000), "ade20k": (150, 20_210, 2_000),
    "cityscapes": (19, 2_975, 500),
}

# The authors' lists: count (or name), path on the hosts, SHA-256. ADE20K's are made, not fetched.
LIST_HOSTS = (
    "https://raw.githubusercontent.com/google-research/semivl/"
    "13ee65d6f27e197e0b55d987b346fc880fc811ca/",
    "https://cdn.jsdelivr.net/gh/google-research/semivl@13ee65d6f27e197e0b55d987b346fc880fc811ca/")
LISTS = {
    "voc": """
    92 pascal/92/labeled.txt 8a02aa6a1253178b105bd25b36f0a27daeedf6b3959f399aa47d24783f3a8306
    183 pascal/183/labeled.txt de3f4680391cb15324402dae17ac0919933d0d9004c11a641c924f3f67147f9f
    366 pascal/366/labeled.txt 74f6bd1e459a8b46fc204529d70b603769f8a45aef4553df8a5c04b5698e77b7
    732 pascal/732/labeled.txt 02c8ec5b62e27364f5bc91eb95bccf54debaa721e9d31c50c07507aea258fd0f
    1464 pascal/1464/labeled.txt b20486876df309c57c8230e957b2957fff5392ff5cb11f225e8453ed6c50ba3e
    val pascal/val.txt df002e3a730c57678f63aa3e46a4c827a4066f1dc1814e24d0e8b215075e0c6c
    train pascal/train_aug.txt f04ab664c71f84950a3a1fd28544b6851500c81a9aff890c4b9279639a32152c
    """,
    "coco": """
    232 coco/1_512/labeled.txt bd0ff85bf2d35b4641d08c2201257ad5b5f02f85ea0da457f44f0b97c4caeb37
    463 coco/1_256/labeled.txt 4cdf41b9d3b3afc3734057a605015860501199ed3680370ccb2c677fc159b127
    925 coco/1_128/labeled.txt 06067c0fb879b8e6ab8f4bdab3dfa641e8e4da2990200fa156daa33670329d79
    1849 coco/1_64/labeled.txt 622b84ccbb5dcba32f4f5bb4ffaf1a9cf3e3f1f460b55dc02605fd099ebf1337
    3697 coco/1_32/labeled.txt 781b5990914f7422ee9e1f6325a914f289e077621b77b9cd066c2d01d33a939e
    val coco/val.txt 5a296a8b638114611e81c3b2257ec1720c8c16300f29ac24fcd8ddf08c9eb6d8
    """,
    "ade20k": """
    158 ade/1_128/labeled.txt 5b28d705e511a35f89b19b997eb68febea76253a6bd88429b62cf4e8446f0d05
    316 ade/1_64/labeled.txt 78f423b10adcb3670e048c02bf43707430ede157036c195b61912dc4bf25602a
    632 ade/1_32/labeled.txt 0a2f3b29515a07ea912f256d49b650a8436b846f838f10b122799ef3b2395f93
    1263 ade/1_16/labeled.txt 85cb4de0a7896e90511e0ad5581f7b60a44d0896cfbdede01e11d1a55cb7b6f8
    2526 ade/1_8/labeled.txt 73d45bc89e256a85419ae72cf88fd86ffbadab0ed86b0a186cae77192815582e
    val ade/val.txt e30a05eab1c9fe423c059d8584289c4fdd9466c03bbf8d259eca8f047ff84524
    """,
    "cityscapes": """
    100 cityscapes/1_30/labeled.txt b11041fef70476fb5564af0ef006a8013622da9cf49c7faf4182f3e26eb32742
    186 cityscapes/1_16/labeled.txt 64195914dce1231133c7dc611fece213bc3a87fe4e0b73fbd96add7dfa8a2f46
    372 cityscapes/1_8/labeled.txt 97291dfc509a8c90ee94e1c5fd1f7668c21205b995f53b963ac133f0ed96ee8e
    744 cityscapes/1_4/labeled.txt 8edd24ae817eed7b49d0a06c95b7bfaf769002c98387e4edeab5e221ab7791c3
    1488 cityscapes/1_2/labeled.txt 90d8e29d4d182c3b3def3d1fac02e454868c4ca632f73696bb521aa05e937ee4
    val cityscapes/val.txt cf5aa35c0e4446bc684b61b6be88e22299ef7b1851852b53fc6a34794f161544
    """,
}
# Number of a class in Cityscapes' own files (and on its server) -> its place among the 19, 0 to 18.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_LOGIN = """cityscapes is behind a login, so it cannot be fetched by a program. Get
  leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com
  python data_prep.py cityscapes --root {} --source FOLDER_OF_THE_TWO_ZIPS"""


def parallel(function, items, title: str) -> list:
    """[function(item), ...] with a progress bar, in threads: PIL leaves Python's lock."""
    items = list(items)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(function, items), title, len(items), leave=False, disable=None))


@contextlib.contextmanager
def building(target: Path):
    """A folder that becomes `target` when the block ends well, and vanishes when it does not.

    Two processes may want the same: the second waits here, and is given None instead.
    """
    folder, lock = target.parent / f".{target.name}.building", None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if fcntl:
            lock = os.open(target.parent, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that works in {target.parent}", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        try:
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
            folder.mkdir()
            yield folder
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error})") from None
    finally:
        if lock is not None:
            os.close(lock)


def wrong_digest(file: Path, digest: str) -> str:
    """"" if the file has the digest ("md5:...", "sha256:..."), else what is wrong with it."""
    kind, _, expected = digest.partition(":")
    if not kind:
        return ""
    hasher = hashlib.new(kind, usedforsecurity=False)
    with open(file, "rb") as data, tqdm(
            desc=f"{kind} of {file.name}", total=file.stat().st_size, unit="B", unit_scale=True,
            leave=False, disable=None) as bar:
        while block := data.read(1 << 20):
            hasher.update(block)
            bar.update(len(block))
    found = hasher.hexdigest()
    return "" if found == expected else f"has {kind} {found}, should have {expected}"


def download(url: str, file: Path) -> None:
    """Fetches a URL. What an earlier transfer left in FILE.part is continued, not fetched again."""
    part = file.with_name(file.name + ".part")
    while True:
        before = start = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"User-Agent": "semivl"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        broken = OSError("the transfer breaks off again and again")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                if answer.status != 206:
                    start = 0  # this host sends the whole only
                size = start + int(answer.headers.get("Content-Length") or 0)
                with open(part, "ab" if start else "wb") as out, tqdm(
                        desc=file.name, total=size, initial=start, unit="B", unit_scale=True,
                        disable=None) as bar:
                    while block := answer.read(1 << 18):
                        out.write(block)
                        bar.update(len(block))
            if part.stat().st_size >= size:
                break
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            break  # nothing is missing: the digest will tell whether it is right
        except (OSError, http.client.HTTPException) as error:
            broken = error
        if not part.exists() or part.stat().st_size <= before:
            raise broken  # not a byte more than the time before
    part.replace(file)


def fetch(name: str, digest: str, urls: tuple, source: str | None, downloads: Path):
    """A file from --source, or from the first URL that serves it with the right digest -> where it
    is, and whether it was downloaded. A URL given as `source` goes before the others."""
    failed = []
    if source and "://" in source:
        urls = (f"{source.rstrip('/')}/{name}", *urls)
    elif source and (file := Path(source) / name).is_file():
        if not (wrong := wrong_digest(file, digest)):
            return file, False
        if not digest.startswith("sha256:"):  # a list must be the published one to the byte
            print(f"warning: {file} {wrong}; going on, as it was given by --source")
            return file, False
        failed.append(f"{file} {wrong}")
    file = downloads / name.replace("/", "-")
    if file.exists() and not wrong_digest(file, digest):
        return file, True  # fetched before, by a process that was interrupted later
    for url in urls:
        # A part may be of something else: after a wrong digest, once more from the beginning.
        for _ in range(1 + file.with_name(file.name + ".part").exists()):
            try:
                download(url, file)
                wrong = wrong_digest(file, digest)
            except (OSError, ValueError, http.client.HTTPException) as error:
                wrong = str(getattr(error, "reason", error))
                break
            if not wrong:
                return file, True
            file.unlink()
        failed.append(f"{url}: {wrong}")
    raise UserError(f"{name}: cannot be had. " + "; ".join(failed or [f"{source}: not there"]) +
                    ". Put it into a folder under that name by other means, and give the folder "
                    "by --source")


def unpack(archive: Path, taken: dict[str, str], folder: Path) -> None:
    """Files of a tar or zip whose path matches a pattern of `taken`, to the path it maps to."""
    def place(name: str):
        return next((m.expand(new) for old, new in taken.items()
                     if (m := re.fullmatch(old, name))), None)

    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                for info in tqdm(file.infolist(), f"unpack {archive.name}", disable=None):
                    if new := place(info.filename):
                        info.filename = new
                        file.extract(info, folder)
        else:
            with tarfile.open(archive) as file:
                for info in tqdm(file, f"unpack {archive.name}", disable=None):
                    if info.isfile() and (new := place(info.name)):
                        file.extract(info.replace(name=new, deep=False), folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"{archive}: damaged ({str(error).splitlines()[0]}); remove it and start "
                        "again") from None


def change_masks(files: list[Path], table: np.ndarray, rename=lambda file: file) -> None:
    """Rewrites masks through a table [256] of new values."""
    def change(file: Path):
        try:
            with Image.open(file) as image:
                mask = table[np.array(image)]
        except (*BROKEN, IndexError) as error:
            raise UserError(f"{file.name}: no mask of bytes that can be read ({error})") from None
        file.unlink()
        Image.fromarray(mask).save(rename(file), compress_level=1)

    parallel(change, files, "convert masks")


def reduce_ade20k(folder: Path) -> None:
    """Masks of ADE20K: 0 ("other") becomes IGNORE, 1 to 150 become 0 to 149.

    Copies in which this was done already are left alone: they hold 255, and never 150.
    """
    files, largest = sorted(folder.glob("annotations/*/*.png")), 0
    for file in tqdm(files, "raw or reduced", leave=False, disable=None):
        with contextlib.suppress(*BROKEN):  # the next will do; change_masks() tells of this one
            with Image.open(file) as image:
                largest = int(np.max(image))
        if largest == IGNORE:
            return
        if largest == 150:
            table = np.arange(256, dtype=np.uint8) - 1  # 0 wraps round to 255
            table[151:] = 254  # never in a raw mask; will be found out
            return change_masks(files, table)
    raise UserError("ADE20K: masks are neither raw (to 150) nor reduced (to 149, and 255)")


def ade20k_list(count: str) -> str:
    """The published list of `count` labelled images (or "val"): the authors drew it like this."""
    _, train, val = COUNTS["ade20k"]
    if count == "val":
        names = [f"validation/ADE_val_{i:08}" for i in range(1, val + 1)]
    else:
        names = [f"training/ADE_train_{i:08}" for i in range(1, train + 1)]
        random.Random(0).shuffle(names)
        names = names[:int(count)]
    return "\n".join(f"images/{name}.jpg annotations/{name}.png" for name in names)


def write_lists(name: str, splits: Path, source: str | None, downloads: Path) -> list[Path]:
    """The published lists, each verified by its SHA-256, into `splits`. Returns what it fetched."""
    fetched = []
    for line in LISTS[name].strip().splitlines():
        count, path, digest = line.split()
        file = splits / (f"{count}/labeled.txt" if count.isdigit() else f"{count}.txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        if name == "ade20k":
            file.write_bytes(ade20k_list(count).encode())
            if wrong := wrong_digest(file, f"sha256:{digest}"):
                raise UserError(f"splits/{path}: {wrong}; Python's shuffle is not what it was")
        else:
            path = f"splits/{path}"
            urls = tuple(host + path for host in LIST_HOSTS)
            found, mine = fetch(path, f"sha256:{digest}", urls, source, downloads)
            shutil.copy(found, file)
            fetched += [found] * mine
    return fetched


def settle(name: str, folder: Path) -> None:
    """From unpacked archives to a data folder: masks, list of training images, a check of all."""
    splits = folder / "splits"

    def listed(pattern: str, file: str) -> None:
        images = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
        (splits / file).write_text("\n".join(images))

    if name == "voc":  # no mask is needed where none will be looked at
        images = (line.split()[0] for line in (splits / "train.txt").read_text().splitlines())
        (splits / "train.txt").write_text("\n".join(images))
    elif name == "coco":
        listed("train2017/*.jpg", "train.txt")
    elif name == "ade20k":
        reduce_ade20k(folder)
        listed("images/training/*.jpg", "train.txt")
    else:
        table = np.full(256, IGNORE, np.uint8)
        table[list(CITYSCAPES_IDS)] = range(19)
        change_masks(sorted(folder.glob("gtFine/*/*/*_labelIds.png")), table, lambda file:
                     file.with_name(file.name.replace("labelIds", "labelTrainIds")))
        listed("leftImg8bit/train/*/*.png", "train.txt")
        listed("leftImg8bit/test/*/*.png", "test.txt")  # without masks: for the server
    classes, train, val = COUNTS[name]
    data = Folder(folder, dict.fromkeys(range(classes)), IGNORE)
    if (len(data.train), len(data.val)) != (train, val):
        raise UserError(f"{name}: {len(data.train)} training and {len(data.val)} validation images "
                        f"came out of the archives instead of {train} and {val}")
    data.labelled = sorted({entry for count in PUBLISHED[name] for entry in
                            read_list(splits / str(count) / "labeled.txt", need_mask=True)})
    data.unlabelled = data.train
    data.check(decode_all=False)


def prepare(name: str, root="data", source: str | None = None) -> Path:
    """Makes root/NAME, complete or not at all. Where it is already, nothing is done.

    source: URL of a mirror, or folder, with the archives (and perhaps the lists under splits/).
    """
    target, downloads = Path(root) / name, Path(root) / "downloads"
    if (target / "splits").is_dir():
        return target
    if target.exists():
        raise UserError(f"{target}: is no data folder made by this program; move it away, and it "
                        "will be made anew")
    if name == "cityscapes" and not source:
        raise UserError(CITYSCAPES_LOGIN.format(root))
    if source and "://" not in source and not Path(source).is_dir():
        raise UserError(f"--source {source}: neither a folder nor a URL")
    with building(target) as folder:
        if folder is None:
            return target
        print(f"making {target}; what is fetched goes to {downloads} until it is unpacked:")
        need = 0.0
        for archive in ARCHIVES[name]:
            near, need = Path(source or downloads) / archive.name, need + archive.size
            if "://" in (source or ""):
                near = f"{source.rstrip('/')}/{archive.name}"
            elif not near.is_file():
                near, part = (*archive.urls, near)[0], downloads / (archive.name + ".part")
                need += archive.size - (part.stat().st_size / 1e9 if part.exists() else 0)
            print(f"  {archive.size:5.1f} GB  {near}")
        print(f"  lists of the {len(PUBLISHED[name])} published splits", flush=True)
        free = shutil.disk_usage(folder).free / 1e9
        if free < need:
            raise UserError(f"{target}: needs about {need:.1f} GB, {free:.1f} GB are free there; "
                            "choose another disk by --root")
        downloads.mkdir(exist_ok=True)
        try:
            fetched = write_lists(name, folder / "splits", source, downloads)
            for archive in ARCHIVES[name]:
                file, mine = fetch(archive.name, archive.digest, archive.urls, source, downloads)
                unpack(file, TAKEN[name], folder)
                fetched += [file] * mine
            settle(name, folder)
            for file in fetched:  # never what stands in --source
                file.unlink()
        finally:
            with contextlib.suppress(OSError):
                downloads.rmdir()  # unless it holds something to go on from
    print(f"{target} is complete: {COUNTS[name][1]} training, {COUNTS[name][2]} validation images",
          flush=True)
    return target


# ----------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------


def load_file(file) -> dict:
    """A dictionary from a file of torch.save, without running any code that is in it."""
    # numpy's numbers are harmless, and often stand in checkpoints beside the tensors.
    numbers = [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)),
               *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
                 for core in ("core", "_core"))]
    try:
        with torch.serialization.safe_globals(numbers):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except Exception:  # truncated, another format, or a pickle that wants to run code
        raise UserError(f"{file}: not a whole file of tensors as torch.save writes it") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def load_weights(file) -> tuple[dict, bool]:
    """Name -> tensor of a weight file: .safetensors, TorchScript as OpenAI's .pt, or torch.save's
    state dict (bare, or under "state_dict"). Also whether it was TorchScript."""
    try:
        if Path(file).suffix == ".safetensors":
            return safetensors.torch.load_file(file), False
        script = zipfile.is_zipfile(file) and any(
            name.endswith("/constants.pkl") for name in zipfile.ZipFile(file).namelist())
        if script:  # holds a compiled model, but no Python that loading would run
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch gives TorchScript up, OpenAI's files stay
                return torch.jit.load(file, map_location="cpu").state_dict(), True
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except Exception:
        raise UserError(f"{file}: not a whole file of weights") from None
    content = load_file(file)
    state = tensors_of(content.get("state_dict", content), file)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}, False


def tensors_of(state, file) -> dict:
    """The same, when it is a state dict."""
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and torch.is_tensor(value) for name, value in state.items()):
        raise UserError(f"{file}: holds no state dict (name -> tensor)")
    return state


def clip_config(name: str) -> dict | None:
    """open_clip's settings of a model; "toy" is the tiny one below."""
    return TINY_CLIP if name == "toy" else open_clip.get_model_config(name)


def empty_clip(name: str) -> open_clip.CLIP:
    """The model of that name with random weights."""
    config = clip_config(name) if ":" not in name else None  # hf-hub:... would ask the network
    if (not config or {"hf_model_name", "hf_tokenizer_name"} & set(config["text_cfg"])
            or set(config) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}):
        raise UserError(f"--clip {name}: not a plain CLIP that open_clip knows; take 'toy', or a "
                        "ViT of open_clip.list_models() such as ViT-B-16-quickgelu")
    clip = open_clip.CLIP(**config)
    vit, blocks = clip.visual, open_clip.transformer.ResidualAttentionBlock
    if (not isinstance(vit, open_clip.transformer.VisionTransformer) or vit.attn_pool
            or vit.final_ln_after_pool
            or not all(type(block) is blocks for block in vit.transformer.resblocks)):
        raise UserError(f"--clip {name}: not a plain ViT; take one such as ViT-B-16-quickgelu")
    return clip


def load_clip(name: str, tag: str, weights: str, root) -> open_clip.CLIP:
    """A CLIP with the weights that --clip, --clip-tag and --clip-weights name, loaded strictly."""
    clip = empty_clip(name)
    if weights == "none":
        print("warning: CLIP has random weights (--clip-weights none); good for tests only")
        return clip
    if not weights and name != "toy":
        if tag not in (tags := open_clip.list_pretrained_tags_by_model(name)):
            raise UserError(f"--clip-tag {tag}: {name} has {', '.join(tags) or 'no weights'}")
        check_gelu(name, open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False), tag)
        try:
            logging.disable(logging.ERROR)  # what open_clip logs is said below, in one line
            return open_clip.create_model(name, pretrained=tag, require_pretrained=True)
        except Exception:  # whatever the network, the hub or the disk may raise
            raise UserError(f"cannot fetch the weights {tag!r} of {name} (no network?); give "
                            "--clip-weights FILE, or none for random ones") from None
        finally:
            logging.disable(logging.NOTSET)
    file = weights or make_toy(root) / "clip.pt"
    state, script = load_weights(file)
    if script:  # OpenAI's own file: three numbers stand among the weights
        check_gelu(name, True, file)
        state = {k: v for k, v in state.items() if v.ndim or k == "logit_scale"}
    load_strictly(clip, state, file, f"--clip {name}")
    return clip


def check_gelu(name: str, quick: bool, weights) -> None:
    """Weights run with the wrong GELU still look right, and are some points worse."""
    if quick != clip_config(name).get("quick_gelu", False):
        other = f"{name}-quickgelu" if quick else name.removesuffix("-quickgelu")
        raise UserError(f"--clip {name}: {weights} was trained with {'Quick' * quick}GELU; take "
                        f"--clip {other}")


def clip_statistics(name: str, tag: str) -> tuple:
    """Mean and standard deviation of the images that a pretrained CLIP was trained on."""
    info = open_clip.get_pretrained_cfg(name, tag) or {}
    return (info.get("mean") or open_clip.OPENAI_DATASET_MEAN,
            info.get("std") or open_clip.OPENAI_DATASET_STD)


def load_strictly(module, state: dict, file, what: str, extra: bool = False) -> None:
    """Every tensor of `module` from `state`, or an error: weights silently not loaded are worse.

    With `extra` the file may hold more than the module needs.
    """
    if extra:
        state = {name: state[name] for name in module.state_dict() if name in state}
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        reason = [line.strip() for line in str(error).splitlines()][:2][-1]
        raise UserError(f"{file}: not the weights of {what} ({reason[:160]})") from None


def conv_encoder(weights: str) -> torch.nn.Module:
    """Cityscapes' shallow skip: deep stem and first stage of timm's resnet101c.

    ImageNet-normalised [B, 3, H, W] -> [[B, 256, ceil(H/4), ceil(W/4)]]. `weights`: "" for timm's
    own download, "none" for random ones, or a file of a whole resnet101c.
    """
    import timm  # comes with open_clip; nothing else needs it

    try:
        net = timm.create_model(
            "resnet101c", features_only=True, out_indices=(1,), pretrained=not weights)
    except Exception as error:  # whatever the network or the hub may raise
        raise UserError("cannot fetch the ImageNet weights of resnet101c; give --conv-weights FILE "
                        f"({str(error)[:120]})") from None
    if weights not in ("", "none"):
        state, _ = load_weights(weights)
        load_strictly(net, state, weights, "timm's resnet101c", extra=True)
    return net


# ----------------------------------------------------------------------------------------------
# Classes of the published data sets, in the order of mask values. Spelling is as published
# ("wolve", "diningtable"): the published weights saw these strings.
# ----------------------------------------------------------------------------------------------

VOC = {
    "background": "background|bed|building|cabinet|ceiling|curtain|door|fence|floor|grass|ground|"
    "mountain|road|rock|shelves|sidewalk|sky|snow|tree|wall|water|window|hang glider|helicopter|"
    "jet ski|go-cart|tractor|emergency vehicle|lorry|truck|lion|stool|bench|wheelchair|"
    "coffee table|desk|side table|picnic bench|wolve|flowers in a vase|goat|tram|laptop|"
    "advertising display|vehicle interior",
    "aeroplane": "aeroplane|airplane|glider", "bicycle": "bicycle|tricycle|unicycle",
    "bird": "bird", "boat": "boat|ship|rowing boat|pedalo", "bottle": "bottle|plastic bottle|"
    "glass bottle|feeding bottle", "bus": "bus|minibus", "car": "car|van|large family car|"
    "realistic toy car", "cat": "cat|domestic cat", "chair": "chair|armchair|deckchair",
    "cow": "cow", "diningtable": "dining table|table for eating at", "dog": "dog|domestic dog",
    "horse": "horse|pony|donkey|mule", "motorbike": "motorbike|moped|scooter|sidecar",
    "person": "person|people|baby|face", "pottedplant": "potted plant|indoor plant in a pot|"
    "outdoor plant in a pot", "sheep": "sheep", "sofa": "sofa", "train": "train|train carriage",
    "tvmonitor": "tv|monitor|standalone screen",
}
CITYSCAPES = {
    "road": "road|street|parking space", "sidewalk": "sidewalk",
    "building": "building|skyscaper|house|bus stop building|garage|car port|scaffolding",
    "wall": "individual standing wall, which is not part of a building",
    "fence": "fence|hole in fence", "pole": "pole|sign pole|traffic light pole",
    "traffic light": "traffic light", "traffic sign": "traffic sign|parking sign|direction sign",
    "vegetation": "vegetation|tree|hedge", "terrain": "terrain|grass|soil|sand", "sky": "sky",
    "person": "person|pedestrian|walking person|standing person|person sitting on the ground|"
    "person sitting on a bench|person sitting on a chair",
    "rider": "rider|cyclist|motorcyclist", "car": "car|jeep|SUV|van",
    "truck": "truck|box truck|pickup truck|truck trailer", "bus": "bus", "train": "train|tram",
    "motorcycle": "motorcycle|moped|scooter", "bicycle": "bicycle",
}
COCO = (
    "background|person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|"
    "fire hydrant|stop sign|parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|"
    "giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite|"
    "baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|"
    "knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|"
    "couch|potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|cell phone|"
    "microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|"
    "toothbrush")
ADE20K = (
    "wall|building|sky|floor|tree|ceiling|road|bed|windowpane|grass|cabinet|sidewalk|person|earth|"
    "door|table|mountain|plant|curtain|chair|car|water|painting|sofa|shelf|house|sea|mirror|rug|"
    "field|armchair|seat|fence|desk|rock|wardrobe|lamp|bathtub|railing|cushion|base|box|column|"
    "signboard|chest of drawers|counter|sand|sink|skyscraper|fireplace|refrigerator|grandstand|"
    "path|stairs|runway|case|pool table|pillow|screen door|stairway|river|bridge|bookcase|blind|"
    "coffee table|toilet|flower|book|hill|bench|countertop|stove|palm|kitchen island|computer|"
    "swivel chair|boat|bar|arcade machine|hovel|bus|towel|light|truck|tower|chandelier|awning|"
    "streetlight|booth|television receiver|airplane|dirt track|apparel|pole|land|bannister|"
    "escalator|ottoman|bottle|buffet|poster|stage|van|ship|fountain|conveyer belt|canopy|washer|"
    "plaything|swimming pool|stool|barrel|basket|waterfall|tent|bag|minibike|cradle|oven|ball|"
    "food|step|tank|trade name|microwave|pot|animal|bicycle|lake|dishwasher|screen|blanket|"
    "sculpture|hood|sconce|vase|traffic light|tray|ashcan|fan|pier|crt screen|plate|monitor|"
    "bulletin board|shower|radiator|glass|clock|flag")
CLASSES = {  # data set -> class -> its concepts; COCO and ADE20K have no definitions
    "voc": {name: words.split("|") for name, words in VOC.items()},
    "cityscapes": {name: words.split("|") for name, words in CITYSCAPES.items()},
    "coco": {name: [name] for name in COCO.split("|")},
    "ade20k": {name: [name] for name in ADE20K.split("|")},
}

# What the authors call our tensors -> ours; replaced in this order.
AUTHORS_NAMES = {
    "module.": "", "decode_head.layers": "decoder.semantic", "decode_head.conv1": "decoder.lift",
    "transformer.ffn.layers.0.0": "layer.linear1", "transformer.ffn.layers.1": "layer.linear2",
    "transformer.attn.attn": "layer.self_attn", "transformer.ln": "layer.norm",
    "aspp_convs.4.gap.1": "pooled.0", "aspp_convs.4.gap.2": "pooled.1", "aspp_convs": "branches",
    "up1.conv.3": "up1.convs.1.0", "up1.conv.4": "up1.convs.1.1", "up1.conv.": "up1.convs.0.",
    "up2.conv.3": "up2.convs.1.0", "up2.conv.4": "up2.convs.1.1", "up2.conv.": "up2.convs.0.",
    "skip_proj.0": "deep_proj", "skip_proj.1": "shallow_proj", "decode_head": "decoder",
    "conv_encoder.stem.7": "conv.bn1", "conv_encoder.stem": "conv.conv1",
    "conv_encoder": "conv", "backbone.ln0": "clip.visual.ln_pre",
    "backbone.ln1": "clip.visual.ln_post", "backbone.cls_token": "clip.visual.class_embedding",
    "backbone.pos_embed": "clip.visual.positional_embedding",
    "backbone.patch_embed.projection": "clip.visual.conv1",
    "backbone.proj.weight": "clip.visual.proj",
    "backbone.layers": "clip.visual.transformer.resblocks", "attn.attn": "attn", ".ln1": ".ln_1",
    ".ln2": ".ln_2", "ffn.layers.0.0": "mlp.c_fc", "ffn.layers.1": "mlp.c_proj",
}


def rename_authors_tensors(state_dict: dict) -> dict:
    """The authors' tensors under our names and in our shapes, without their frozen CLIP."""
    weights = {}
    for key, tensor in state_dict.items():
        for theirs, ours in AUTHORS_NAMES.items():
            key = key.replace(theirs, ours)
        if not key.startswith("clip_encoder."):
            weights[key] = tensor
    vit = "clip.visual."
    weights[vit + "class_embedding"] = weights[vit + "class_embedding"].flatten()
    weights[vit + "positional_embedding"] = weights[vit + "positional_embedding"][0]
    weights[vit + "proj"] = weights[vit + "proj"].flatten(1).T  # was a 1 x 1 convolution
    return weights


def vit_of_shapes(weights: dict, heads: int | None) -> open_clip.transformer.VisionTransformer:
    """A ViT for tensors under our names; heads cannot be seen in them: width / 64 by default."""
    vit = "clip.visual."
    width, _, patch, _ = weights[vit + "conv1.weight"].shape
    return open_clip.transformer.VisionTransformer(
        image_size=math.isqrt(len(weights[vit + "positional_embedding"]) - 1) * patch,
        patch_size=patch, width=width, heads=heads or width // 64, mlp_ratio=4.0,
        layers=sum("mlp.c_fc.weight" in key for key in weights),
        output_dim=weights[vit + "proj"].shape[1])


def load_authors_checkpoint(method, state_dict: dict, text: torch.Tensor, heads: int | None = None):
    """The authors' weights (the "model" entry of their file) as a SemiVL model in eval mode.

    method: the module semivl. text: [N, E], `describe_classes(...).decoder_text` (for Cityscapes
    with decoder_text="mean"). heads: of the ViT; its width / 64 by default. Images come with
    IMAGENET_STATS. Tensors that are missing, too many or misshapen raise KeyError, RuntimeError or
    ValueError.

        file = torch.load("best.pth", map_location="cpu", weights_only=True)
        model = load_authors_checkpoint(semivl, file["model"], text)
    """
    weights = rename_authors_tensors(state_dict)
    visual = vit_of_shapes(weights, heads)
    cfg = method.Config(crop=visual.image_size[0], authors_clip=True,
                        conv_skip="conv.bn1.weight" in weights)
    model = method.assemble(cfg, visual, F.normalize(text.float(), dim=1))
    model.load_state_dict(weights | {"text": model.text})
    return model.eval()


def load_authors_file(method, file: str, weights: dict, typed: dict, free: list[str]):
    """What `load_checkpoint` returns, for the authors' file; it tells neither its data set (but for
    Cityscapes) nor the text, so these come from the options typed."""
    conv_skip = any("conv_encoder." in name for name in weights)
    allow_only(typed, file, "crop", "clip", "clip_tag", "clip_weights", *free)
    dataset = typed.get("dataset", "cityscapes" if conv_skip else "")
    if not dataset:
        raise UserError(f"{file}: a checkpoint of the authors' code does not tell its data set; "
                        "add --dataset voc, coco, ade20k or a FOLDER")
    known = dict(dataset=dataset, authors_clip=True, conv_skip=conv_skip)
    cfg = method.Config(**method.PRESETS.get(dataset, {}) | typed | known)
    check_settings(cfg, training=False)
    classes = method.CLASSES.get(dataset) or open_data(cfg, method.CLASSES).classes
    clip = load_clip(cfg.clip, cfg.clip_tag, cfg.clip_weights, cfg.root)
    text = method.describe_classes(clip, classes, cfg).decoder_text
    try:  # the heads cannot be seen in the tensors; --clip tells
        heads = clip.visual.transformer.resblocks[0].attn.num_heads
        return load_authors_checkpoint(method, weights, text, heads), cfg, list(classes)
    except (KeyError, RuntimeError, IndexError, ValueError, AttributeError) as error:
        reason = str(error).rpartition("\n")[2].strip()[:160]
        raise UserError(f"{file}: not a whole checkpoint of the authors' ({reason})") from None


def load_checkpoint(method, file: str, typed: dict) -> tuple:
    """A checkpoint -> model in eval mode, settings, names of the classes. Ours holds the EMA
    teacher and its settings, the authors' (recognised by its names) tensors only. typed: the
    options on the command line, name -> value."""
    content = load_file(file)
    free = ["dataset", "root", "stride", "window_mode", "device", "out"]  # go with both kinds
    weights = tensors_of(content.get("model", {}), file)
    if "config" in content and "text" in weights:
        allow_only(typed, file, *free)
        typed = dict(device="auto", out="") | typed  # not those of the machine that trained
        cfg = settings_of(content, method.Config, file, typed, "classes")
        check_settings(cfg, training=False)
        model = method.assemble(cfg, empty_clip(cfg.clip).visual, weights["text"])
        load_strictly(model, weights, file, "the model that its settings describe")
        return model.eval(), cfg, list(content["classes"])
    if not any("decode_head." in name for name in weights):
        raise UserError(f"{file}: not a checkpoint of this program, nor of the authors'")
    return load_authors_file(method, file, weights, typed, free)


# ----------------------------------------------------------------------------------------------
# Command line, run folders, tables, pictures
# ----------------------------------------------------------------------------------------------


def setting(group: str, default, meaning: str, choices=None, low=0, high=math.inf):
    """A config field that carries its own line of `--help` and the values it may take."""
    meta = dict(group=group, help=meaning, choices=choices, low=low, high=high)
    return dataclasses.field(default=default, metadata=meta)


def number(kind, low, high):
    """An argparse type: int or float from low to high."""
    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(
                f"{text} is out of range ({low} to {high})" if high < math.inf else
                f"{text} must be at least {low}")
        return value
    parse.__name__ = kind.__name__  # argparse names the type when the text is no number at all
    return parse


def refuse(message: str):
    """What argparse does with a wrong command line."""
    raise UserError(f"{message}; see --help")


def parse_args(argv, config, presets: dict) -> tuple[dict, argparse.Namespace]:
    """Options made of the fields of the dataclass `config` -> those typed, and the actions."""
    parser = argparse.ArgumentParser(
        prog="semivl.py", description="SemiVL: semi-supervised segmentation guided by CLIP.",
        usage="semivl.py [options]", allow_abbrev=False,
        epilog="In brackets: the toy's values. Presets of other data sets: semivl.py, section 1.")

    parser.error = refuse
    fields, shown, groups = dataclasses.fields(config), config(**presets["toy"]), {}
    for field in fields:
        meta, default = field.metadata, getattr(shown, field.name)
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        choices, kind = meta["choices"], field.type
        if kind is bool:
            choices, kind, default = ("on", "off"), str, "on" if default else "off"
        elif kind is not str:
            kind = number(kind, meta["low"], meta["high"])
        groups[meta["group"]].add_argument(
            "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, type=kind,
            choices=choices, help=f"{meta['help']} [{default!s}]")
    group = parser.add_argument_group("instead of a new run")
    group.add_argument("--eval", metavar="CKPT", help="table of IoU per class of a checkpoint")
    group.add_argument("--predict", nargs="+", metavar=("CKPT", "IMAGE"),
                       help="palette PNG and overlay of each image, of any size")
    group.add_argument("--benchmark", nargs="?", const="step", metavar="WHAT",
                       choices=("step", "memory", "growth", "loader"),
                       help="seconds and memory of a step on random images; or a table of the "
                            "memory, growth (with classes and pixels) or loader's speed")
    group.add_argument("--ladder", nargs="?", const=5, type=number(int, 2, 100), metavar="SEEDS",
                       help="what each idea buys in the toy world, with so many seeds [5]")
    group.add_argument("--save-predictions", metavar="DIR",
                       help="with --eval: a PNG of each image, as the data set's server wants it")
    group.add_argument("--resume", metavar="RUN", help="go on with a run that was interrupted")
    args = parser.parse_args(argv)
    if args.save_predictions is not None and args.eval is None:
        refuse("--save-predictions goes with --eval only")
    actions = (args.eval, args.predict, args.resume, args.benchmark, args.ladder)
    if sum(a is not None for a in actions) > 1:
        refuse("--eval, --predict, --resume, --benchmark and --ladder exclude each other")
    if os.environ.get("WORLD_SIZE", "1") != "1" and any(a for a in actions if a != args.resume):
        refuse("torchrun is for training; start this with python")
    typed = {field.name: getattr(args, field.name) == "on" if field.type is bool
             else getattr(args, field.name) for field in fields if hasattr(args, field.name)}
    return typed, args


def settings_of(content: dict, config, file, changes: dict, *needed: str):
    """The settings that a checkpoint was written with, changed as told."""
    try:
        for name in needed:
            content[name]
        return config(**content["config"] | changes)
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: not a checkpoint of this version of the program ({error})"
                        ) from None


def load_run(run: str, config, typed: dict) -> tuple:
    """Settings and content of RUN/last.pt, for `--resume`."""
    allow_only(typed, "--resume", "device", "workers")
    file = Path(run) / "last.pt"
    content = load_file(file)
    return settings_of(content, config, file, typed | dict(out=run),
                       "student", "optimizer", "labelled", "accepted"), content


def check_settings(cfg, training: bool = True) -> None:
    """Settings that cannot work together end here, not in the middle of a run."""
    pick_device(cfg.device)
    published = PUBLISHED.get(cfg.dataset, {})
    if training and published and cfg.labels not in published:
        raise UserError(f"--labels {cfg.labels}: the published splits of {cfg.dataset} have "
                        f"{', '.join(map(str, published))} labelled images")
    if cfg.batch % cfg.micro_batch:
        raise UserError(f"--batch {cfg.batch}: not a multiple of --micro-batch {cfg.micro_batch}")
    if cfg.scale_min > cfg.scale_max:
        raise UserError(f"--scale-min {cfg.scale_min} is above --scale-max {cfg.scale_max}")
    if cfg.stride > cfg.crop:
        raise UserError(f"--stride {cfg.stride}: larger than the window (--crop {cfg.crop}), so "
                        "pixels would be left out")
    if cfg.decoder == "vision" and cfg.conv_skip:
        raise UserError("--decoder vision has no convolutional skip: add --conv-skip off")
    if cfg.decoder == "vision" and cfg.micro_batch == 1 and not cfg.unlabelled:
        raise UserError("--decoder vision has batch norm: take --micro-batch 2 or more")


def allow_only(typed: dict, action: str, *allowed: str) -> None:
    """An option that an action would ignore is a mistake, not a detail."""
    if wrong := set(typed) - set(allowed):
        raise UserError(f"--{wrong.pop().replace('_', '-')} does not go with {action}")


def pick_device(name: str) -> torch.device:
    """"auto" is the accelerator that torch finds (CUDA, MPS), else the CPU."""
    if torch.cuda.is_available() and os.environ.get("WORLD_SIZE", "1") != "1":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything touches GPU 0
    if name == "auto":
        found = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if found else torch.device("cpu")
    try:
        torch.zeros(1, device=name).cpu()  # "meta" makes tensors, but they hold nothing
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: torch finds no such device on this machine") from None


def autocast(cfg, device: torch.device):
    """bf16 for matrix products, float32 for softmax, norms and losses (torch's own lists)."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = cfg.precision == "bf16" or (cfg.precision == "auto" and bf16)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def numbered(path: Path) -> Path:
    """The path, or with -2, -3, ... at its end when there is such a file or folder already."""
    free, number = path, 1
    while free.exists():
        number += 1
        suffix = ".json" if path.suffix == ".json" else ""
        free = path.with_name(f"{path.name.removesuffix(suffix)}-{number}{suffix}")
    return free


def new_folder(path: Path, remedy: str) -> Path:
    """Makes a folder, which must not hold anything yet."""
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: exists already; {remedy}")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror})") from None
    return path


def new_run(cfg, folder: Folder, source: str) -> str:
    """Makes the run's folder, `cfg.out` or runs/DATASET-LABELS, numbered when taken, with the
    settings, the list of labelled images and a copy of the source."""
    out = [None]
    if process()[0]:
        dist.broadcast_object_list(out)
        return out[0]
    name = Path("runs") / f"{Path(cfg.dataset).resolve().name}-{cfg.labels}"
    path = new_folder(Path(cfg.out) if cfg.out else numbered(name),
                      f"take another name for --out, or --resume {cfg.out}")
    write_json(path / "config.json", dataclasses.asdict(cfg) | {"out": str(path)})
    lines = (" ".join(filter(None, entry)) + "\n" for entry in folder.labelled)
    (path / "labeled.txt").write_text("".join(lines))
    for file in (source, __file__):
        shutil.copy(file, path)
    if dist.is_initialized():
        dist.broadcast_object_list([str(path)])
    return str(path)


def save_whole(content: dict, file: Path) -> None:
    """torch.save that leaves the old file as it is unless the new one is complete on the disk."""
    if process()[0]:
        return
    temporary = file.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as out:
            torch.save(content, out)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk into a RuntimeError
        remedy = "the file of the last save is whole; make room, then --resume"
        raise UserError(f"{file}: cannot be written ({str(error).splitlines()[0][:120]}); "
                        f"{remedy if file.exists() else 'make room'}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_run(run, name: str, resumable: bool) -> None:
    """Writes the teacher, and with `resumable` everything the next step depends on."""
    content = {k: getattr(run, k) for k in ("step", "evaluated", "last", "best")}
    content |= dict(config=dataclasses.asdict(run.cfg), classes=run.folder.classes,
                    model=run.teacher.model.state_dict())
    if resumable:  # what student and teacher share is written once: torch.save sees to it
        content |= dict(student=run.student.state_dict(), accepted=run.accepted,
                        optimizer=run.optimizer.state_dict(), labelled=run.folder.labelled)
    save_whole(content, Path(run.cfg.out) / name)


def restore_run(run, content: dict) -> None:
    """Goes on from what `save_run(resumable=True)` wrote."""
    for model, name in ((run.teacher.model, "model"), (run.student, "student")):
        load_strictly(model, content[name], "last.pt", "this run")
    run.optimizer.load_state_dict(content["optimizer"])
    run.accepted.copy_(content["accepted"])
    for name in ("step", "evaluated", "last", "best"):
        setattr(run, name, content[name])


class StopSignals:
    """Ctrl-C and SIGTERM become KeyboardInterrupt, but never inside a `with signals.held():`.

    Of several processes one that stopped by itself would leave the others waiting. So they ask each
    other at the end of each such block, and stop together."""

    def __enter__(self):
        self.holding, self.asked = dist.is_initialized(), False
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            self.before = {number: signal.signal(number, self.handle)
                           for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.asked = True
        if not self.holding:
            self.holding = True  # one signal is enough: the run is being saved
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self):
        """What stands in this block is finished before a signal has its way."""
        self.holding = True
        yield
        asked = self.asked
        if dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            asked = bool(total(torch.tensor(int(asked), device=device)))
        if asked:
            raise KeyboardInterrupt
        self.holding = dist.is_initialized()


def training_data(cfg, classes: dict, resume: dict | None) -> Folder:
    """The folder to train on, labelled images chosen, all of it looked at. resume: a last.pt."""
    folder = open_data(cfg, classes)
    folder.choose_labelled(cfg, resume and resume["labelled"])
    folder.check(decode_all=cfg.dataset not in PUBLISHED)
    if resume and list(resume["classes"].items()) != list(folder.classes.items()):
        raise UserError(f"{folder.path}: the classes are not those that the run started with")
    return folder


def loader(pictures, start: int, cfg, device: torch.device):
    """Batches of items start, start + 1, ... of a data set; of each batch, this process's share.

    A generator: when it is closed, the processes that load end."""
    rank, processes = process()
    share = cfg.batch // processes
    mine = [i for i in range(start, len(pictures)) if i % cfg.batch // share == rank]
    yield from torch.utils.data.DataLoader(
        pictures, share, sampler=mine, worker_init_fn=quiet_worker,
        num_workers=min(cfg.workers, os.cpu_count() or 1), pin_memory=device.type == "cuda")


def to_device(batch: dict, device: torch.device) -> dict:
    """The tensors of a batch, still bytes: a quarter of what floats would take to copy."""
    return {k: v.to(device, non_blocking=True) for k, v in batch.items() if k != "files"}


def mistakes_in_one_line(main):
    """A decorator: main(argv) -> exit code. 2 and one line for a user's mistake, 130 for Ctrl-C."""
    @functools.wraps(main)
    def careful(argv=None) -> int:
        keep_memory()
        try:
            main(argv)
            return 0
        except KeyboardInterrupt:
            print("semivl.py: interrupted", file=sys.stderr)
            return 130
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            print(f"semivl.py: {explain(error)}", file=sys.stderr)
            return 2
    return careful


def explain(error: Exception) -> str:
    """One line for what a user can mend; anything else is raised again."""
    text = str(error).strip()
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return "out of memory: take a smaller --micro-batch or --crop"
    if "DataLoader worker" in text:
        return f"a loader process died ({text.splitlines()[0]}): take fewer --workers"
    if isinstance(error, RuntimeError):
        raise error
    # An error in a loader process arrives with that process's traceback in front.
    return text.rpartition("UserError: ")[2]


def quiet_worker(_) -> None:
    """A loader process leaves signals to the process that trains, and goes when that goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class RunLog:
    """The progress bar, log.jsonl (a line a step, and a line an evaluation), what is printed.

    run: has `step`, `steps`, `cfg`, `device`, `optimizer`.
    """

    def __init__(self, run):
        self.run, self.seconds, self.timed = run, 0.0, 0
        self.said = min(5, run.steps - run.step - 1)  # after so many timed steps, the pace is told
        self.restart()

    def restart(self) -> None:
        self.sums, self.count, self.mark = {}, 0, None

    def __enter__(self):
        if process()[0]:
            self.file, self.bar = open(os.devnull, "w"), tqdm(disable=True)
            return self
        file, kept = Path(self.run.cfg.out) / "log.jsonl", []
        if self.run.step and file.exists():  # without the steps lost since the last checkpoint
            for text in file.read_text().splitlines(keepends=True):
                with contextlib.suppress(ValueError):  # a kill may have left half a line
                    line = json.loads(text)
                    if line["step"] <= self.run.step:
                        kept.append(text)
                        self.restart() if "val_miou" in line else self.add(line)
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(file)
        self.file = open(file, "a")
        self.bar = tqdm(desc="train", total=self.run.steps, initial=self.run.step, disable=None)
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.file.close()

    def add(self, line: dict) -> None:
        self.count += 1
        for name, value in line.items():
            if name not in ("step", "lr"):
                self.sums[name] = self.sums.get(name, 0.0) + value

    def write(self, line: dict) -> None:
        rates = [group["lr"] for group in self.run.optimizer.param_groups]
        self.file.write(json.dumps(dict(step=self.run.step, lr=rates) | line) + "\n")
        self.file.flush()

    def step(self, line: dict) -> None:
        """What one optimiser step says."""
        before, self.mark = self.mark, time.perf_counter()
        if before:  # the first step after a start or an evaluation is not timed
            self.seconds, self.timed = self.seconds + self.mark - before, self.timed + 1
        self.add(line)
        self.write(line)
        self.bar.update()
        self.bar.set_postfix(loss=f"{line['total']:.3f}", kept=f"{line.get('kept', 0):.2f}")
        if before and self.timed == self.said:
            pace = self.seconds / self.timed
            left = pace * (self.run.steps - self.run.step)
            tqdm.write(f"pace       {pace:.3g} s a step, {self.speed():.3g} images/s: "
                       f"{duration(left)} to go, evaluations aside; "
                       f"{peak_memory(self.run.device)} so far")

    def speed(self) -> float:
        """Images a second, labelled and unlabelled."""
        return self.run.cfg.batch * (1 + self.run.cfg.unlabelled) * self.timed / self.seconds

    def evaluation(self, line: dict) -> None:
        """What an evaluation says, with the means since the last time."""
        means = {name: value / self.count for name, value in self.sums.items()} | line
        if self.timed:
            means["images_per_second"] = self.speed()
        self.write(means)
        tqdm.write(f"step {self.run.step:<5} loss {means.get('total', math.nan):.3f}  kept "
                   f"{means.get('kept', 0):.2f}  validation mIoU {line['val_miou']:.1f} (student "
                   f"{line['student']:.1f}, best {line['best']:.1f})")
        self.restart()


class Recorder:
    """What a run leaves behind while it goes on: log, last.pt, best.pt, pictures. When the user or
    the machine stops it (KeyboardInterrupt), it is saved as it is.

        with Recorder(method, run) as recorder: ...
    """

    def __init__(self, method, run):
        self.method, self.run = method, run
        self.log, self.signals = RunLog(run), StopSignals()

    def __enter__(self):
        if not self.run.step:
            save_run(self.run, "last.pt", resumable=True)  # a full disk is told now
        self.log.__enter__()
        self.signals.__enter__()
        return self

    def __exit__(self, error, *_):
        try:
            if error is KeyboardInterrupt:
                save_run(self.run, "last.pt", resumable=True)
                tqdm.write(f"stopped    after step {self.run.step}; go on by --resume "
                           f"{self.run.cfg.out}")
        finally:
            self.signals.__exit__()
            self.log.__exit__()

    def uninterrupted(self):
        """What stands in this block is finished before a signal has its way."""
        return self.signals.held()

    def step(self, line: dict) -> None:
        """After each step, in an `uninterrupted` block with it. line: what `train_step` returns."""
        self.log.step(line)
        if self.run.step % self.run.cfg.save_every == 0:
            save_run(self.run, "last.pt", resumable=True)

    def miou(self, model, entries: list, title: str) -> float:
        """mIoU of a model in percent."""
        run = self.run
        iou = self.method.evaluate(model, run.folder, entries, run.cfg, run.device, title)
        return float(iou.nanmean())

    def frozen_clip(self) -> None:
        """Says what CLIP knows before the first step."""
        run, few = self.run, self.run.folder.val[:100]
        names, concepts = (self.miou(m, few, "frozen") for m in (run.frozen_names, run.guidance))
        tqdm.write(f"frozen     CLIP has {names:.1f} mIoU by class names, {concepts:.1f} by "
                   f"definitions ({len(few)} validation images)")

    def evaluation(self, batch: dict | None) -> None:
        """Validation mIoU of teacher and student (with ema 0 the same model), and the classes'
        shares of the accepted pseudo-labels: if mIoU falls, one may have taken over. Stores the
        run, draws the views of the batch."""
        run = self.run
        teacher = student = self.miou(run.teacher, run.folder.val, "validation, teacher")
        if run.cfg.ema:
            student = self.miou(run.student.eval(), run.folder.val, "validation, student")
            run.student.train()
        with self.uninterrupted():
            shares = (run.accepted / run.accepted.sum().clamp(min=1)).tolist()
            run.accepted.zero_()
            run.evaluated, run.last = run.step, teacher
            if teacher > run.best:
                run.best = teacher
                save_run(run, "best.pt", resumable=False)
            self.log.evaluation(dict(
                val_miou=teacher, student=student, best=run.best,
                pseudo_labels=dict(zip(run.folder.classes, shares))))
            save_run(run, "last.pt", resumable=True)
            draw_progress(self.method, run, batch)


def duration(seconds: float) -> str:
    """"3 h 20 min", "5 min", "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def peak_memory(device: torch.device) -> str:
    """The most memory that this run has held so far: CUDA's own counter, or the process's."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory"
    if resource is None:
        return "unknown memory"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / 1e9:.1f} GB of memory"


def write_json(file, content) -> None:
    """Indented JSON."""
    Path(file).write_text(json.dumps(content, indent=1) + "\n")


def describe_run(run) -> str:
    """What is about to happen, on one screen."""
    cfg, folder = run.cfg, run.folder
    values = [(p.numel(), p.requires_grad) for p in run.student.parameters()]
    held, trained = (sum(n for n, grad in values if grad or every) / 1e6 for every in (1, 0))
    unlabelled, partners = (len(folder.unlabelled), cfg.batch) if cfg.unlabelled else (0, 0)
    return (
        f"data       {cfg.dataset}: {len(folder.labelled)} labelled{' (drawn)' * folder.drawn}, "
        f"{unlabelled} unlabelled, "
        f"{len(folder.val)} validation, {len(folder.test)} test; {len(folder.classes)} classes\n"
        f"model      {cfg.clip}, {cfg.decoder} decoder, fine-tuning {cfg.finetune}: {trained:.2f} "
        f"of {held:.2f} M values train\n"
        f"training   {run.steps} steps of {cfg.batch} labelled + {partners} unlabelled images, "
        f"as {cfg.batch // cfg.micro_batch} x {cfg.micro_batch}, on {run.device}; seed {cfg.seed}\n"
        f"rates      {cfg.lr:g} (decoder), {cfg.vit_lr:g} (ViT)\n"
        f"writes to  {cfg.out}")


def report(method, run, models: dict) -> None:
    """The end of a run: IoU per class of each model on the test images (on the validation ones if
    there are none), printed and written as JSON."""
    cfg, folder, device = run.cfg, run.folder, run.device
    classes = list(folder.classes)
    split, entries = ("test", folder.test) if folder.test else ("val", folder.val)
    table = {name: method.evaluate(model, folder, entries, cfg, device, split)
             for name, model in models.items()}
    if process()[0]:
        return
    print(iou_table(f"IoU, {split}", table, classes))
    print(f"validation mIoU {run.last:.1f} at the last step, {run.best:.1f} at best; pictures: "
          f"{cfg.out}/*.png")
    write_json(f"{cfg.out}/result.json", dict(
        val_last=run.last, val_best=run.best, classes=classes, **{split: as_json(table)}))


def as_json(table: dict) -> dict:
    """IoU [N] of each model, as JSON knows no NaN: a class that does not occur is null."""
    return {name: dict(miou=float(iou.nanmean()), iou=[v if v == v else None
                                                       for v in iou.tolist()])
            for name, iou in table.items()}


def iou_table(title: str, columns: dict, classes: list[str]) -> str:
    """Text table: IoU per class [N] of each column, and the mean over classes that occur."""
    first = max(map(len, [title, *classes]))
    lines = [f"{title:{first}}  " + "  ".join(f"{name:>6}" for name in columns)]
    for i, row in enumerate([*classes, "mIoU"]):
        cells = (f"{iou[i] if i < len(iou) else iou.nanmean():{max(len(name), 6)}.1f}"
                 for name, iou in columns.items())
        lines.append(f"{row:{first}}  " + "  ".join(cells))
    return "\n".join(lines)


def palette(classes: list[str]) -> np.ndarray:
    """A colour for each class [256, 3]: steps of the golden ratio keep neighbours apart.

    "background" is a quiet grey; IGNORE is white.
    """
    colours = np.full((256, 3), 255, np.uint8)
    for n, name in enumerate(classes):
        hue, value = (0.02 + 0.618034 * n) % 1, (0.9, 0.7)[n // 8 % 2]
        rgb = (0.3, 0.32, 0.36) if name == "background" else colorsys.hsv_to_rgb(hue, 0.6, value)
        colours[n] = np.round(255 * np.array(rgb))
    return colours


def colour_mask(mask: torch.Tensor, classes: list[str]) -> Image.Image:
    """Class numbers [H, W] -> palette picture."""
    picture = Image.fromarray(mask.numpy().astype(np.uint8), "P")
    picture.putpalette(palette(classes).flatten().tolist())
    return picture


def legend(classes: list[str], shown: list[int], width: int, size: int = 14) -> Image.Image:
    """Names of the classes in their colours, in as many lines as `width` asks for."""
    font, colours = ImageFont.load_default(size), palette(classes)
    places, x, y = [], 8, 6
    for n in shown:
        wide = int(font.getlength(classes[n])) + 2 * size + 6
        if x > 8 and x + wide > width:
            x, y = 8, y + size + 8
        places.append((n, x, y))
        x += wide
    picture = Image.new("RGB", (width, y + size + 10), "white")
    draw = ImageDraw.Draw(picture)
    for n, x, y in places:
        draw.rectangle([x, y + 1, x + size, y + 1 + size], fill=tuple(map(int, colours[n])))
        draw.text((x + size + 5, y), classes[n], font=font, fill="black")
    return picture


def to_picture(image: torch.Tensor) -> Image.Image:
    """uint8 [3, H, W] -> picture."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def hatched(picture: Image.Image, rejected: torch.Tensor) -> Image.Image:
    """The picture with pale diagonal lines wherever rejected [H, W] is true."""
    where = Image.fromarray(rejected.cpu().numpy()).resize(picture.size, Image.Resampling.NEAREST)
    across = np.add.outer(np.arange(picture.height), np.arange(picture.width)) % 8
    pixels, where = np.array(picture.convert("RGB")), np.array(where)
    pixels[where] = pixels[where] // 2 + 90
    pixels[where & (across < 2)] = 250
    return Image.fromarray(pixels)


def contact_sheet(file, titles: list[str], rows: list, classes: list[str], side: int = 150) -> None:
    """Rows of cells, a column a title, with a legend of all classes below. A cell is an image uint8
    [3, H, W], a mask [H, W], or (mask, rejected [H, W]), whose rejected pixels are hatched."""
    gap, head = 8, 26
    width = gap + len(titles) * (side + gap)
    key = legend(classes, list(range(len(classes))), width)
    heights = [max(1, round(side * row[0].shape[1] / row[0].shape[2])) for row in rows]
    sheet = Image.new("RGB", (width, head + sum(heights) + gap * len(rows) + key.height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, title in enumerate(titles):
        draw.text((gap + i * (side + gap), 5), title, font=font, fill="black")
    y = head
    for row, height in zip(rows, heights):
        for i, cell in enumerate(row):
            mask, rejected = cell if isinstance(cell, tuple) else (cell, None)
            photo = mask.dim() == 3
            picture = to_picture(mask) if photo else colour_mask(mask, classes).convert("RGB")
            shrunk = photo and side < picture.width
            how = Image.Resampling.LANCZOS if shrunk else Image.Resampling.NEAREST
            picture = picture.resize((side, height), how)
            picture = picture if rejected is None else hatched(picture, rejected)
            sheet.paste(picture, (gap + i * (side + gap), y))
        y += height + gap
    sheet.paste(key, (0, y))
    sheet.save(file)


def draw_progress(method, run, batch: dict | None) -> None:
    """Pictures of the present state into the run's folder: sheet.png (validation images through
    every model), views.png (what CutMix made of the last batch), curves.png (the log so far).

    Pseudo-labels are those that the teacher would give; below `conf` they are hatched."""
    cfg, folder, classes = run.cfg, run.folder, list(run.folder.classes)
    views = None
    if cfg.unlabelled and batch is not None:  # by all processes: CutMix takes partners from others
        data = to_device(batch, run.device)
        views = {name: (image.cpu(), targets.apply(torch.Tensor.cpu))
                 for name, (image, targets) in run.views(data).items()}
    if process()[0]:
        return
    rows = []
    for entry in folder.val[:: math.ceil(len(folder.val) / 6)]:
        image = folder.image(entry)
        names, concepts, student, scores = (
            method.segment(model, image, cfg, run.device).cpu() for model in
            (run.frozen_names, run.guidance, run.student.eval(), run.teacher))
        run.student.train()
        teacher = scores.argmax(0)
        if cfg.window_mode == "logits":
            scores = scores.softmax(0)
        rows.append([image, folder.mask(entry), names.argmax(0), concepts.argmax(0),
                     (teacher, scores.amax(0) < cfg.conf), student.argmax(0), teacher])
    titles = ["image", "truth", "CLIP by names", "by definitions", "pseudo-label", "student",
              "EMA teacher"]
    contact_sheet(f"{cfg.out}/sheet.png", titles, rows, classes)
    if views:
        (s1, one), (s2, two), (w, own) = views.values()
        x, y = data["x"].cpu(), data["y"].cpu()

        def target(targets, i):
            unsure = targets.padding[i] | (targets.confidence[i] < cfg.conf)
            return (targets.label[i].masked_fill(targets.padding[i], IGNORE), unsure)

        rows = [[x[i], y[i], w[i], target(own, i), own.clip_label[i], s1[i], target(one, i),
                 one.clip_label[i], s2[i], target(two, i)] for i in range(min(6, len(w)))]
        titles = ["labelled x", "mask y", "weak view w", "pseudo-label", "frozen CLIP",
                  "strong view s1", "its label", "its frozen CLIP", "strong view s2", "its label"]
        contact_sheet(f"{cfg.out}/views.png", titles, rows, classes, side=130)
        areas = [(data[box][:, 2:] - data[box][:, :2]).prod(1) for box in ("box1", "box2")]
        i = int((areas[0] * areas[1] + areas[0]).argmax())  # large boxes in both views, if any
        images = torch.stack([x[i], s1[i], s2[i], w[i]]).to(run.device)
        with torch.no_grad(), torch.random.fork_rng(), autocast(cfg, run.device):
            torch.manual_seed(0)
            said = run.student.eval()(method.normalize(images, cfg), perturb=1).argmax(1).cpu()
        run.student.train()
        draw_flow(Path(cfg.out) / "flow.png", classes, [
            ("labelled x", x[i], "STUDENT", said[0], [("its mask", y[i])], "L_x"),
            ("weak view w", w[i], "EMA TEACHER", target(own, i), [],
             "pseudo-label; unsure: hatched"),
            ("weak view w", w[i], "FROZEN CLIP", own.clip_label[i], [],
             "guidance label; unsure: white"),
            ("strong view s1" + ", no box" * (not areas[0][i]), s1[i], "STUDENT", said[1],
             [("mixed pseudo-label", target(one, i)), ("mixed guidance", one.clip_label[i])],
             "L_s1, G_s1"),
            ("strong view s2" + ", no box" * (not areas[1][i]), s2[i], "STUDENT", said[2],
             [("mixed pseudo-label", target(two, i)), ("mixed guidance", two.clip_label[i])],
             "L_s2, G_s2"),
            ("w, features dropped", w[i], "STUDENT", said[3],
             [("pseudo-label", target(own, i)), ("guidance", own.clip_label[i])], "L_fp, G_fp")])
    draw_curves(Path(cfg.out) / "log.jsonl", Path(cfg.out) / "curves.png")


def draw_flow(file: Path, classes: list[str], rows: list) -> None:
    """How the losses of a step come about, in pictures. A row: (title, image, network, what it
    says, [(title, target), ...], loss). Cells as in `contact_sheet`."""
    side, step, top = 104, 134, 34
    sheet = Image.new("RGB", (960, top + step * len(rows) + 34), "white")
    draw, font, bold = (ImageDraw.Draw(sheet), ImageFont.load_default(13),
                        ImageFont.load_default(15))
    inks = {"STUDENT": (222, 235, 247), "EMA TEACHER": (229, 245, 224),
            "FROZEN CLIP": (254, 230, 206)}

    def paste(cell, title: str, x: int, y: int) -> None:
        mask, rejected = cell if isinstance(cell, tuple) else (cell, None)
        picture = to_picture(mask) if mask.dim() == 3 else colour_mask(mask, classes).convert("RGB")
        picture = picture.resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture if rejected is None else hatched(picture, rejected), (x, y))
        draw.rectangle((x, y, x + side, y + side), outline=(120, 120, 120))
        draw.text((x + side / 2, y - 3), title, font=font, fill="black", anchor="ms")

    def arrow(x0: int, x1: int, y: int) -> None:
        draw.line((x0, y, x1 - 6, y), fill="black", width=2)
        draw.polygon((x1, y, x1 - 8, y - 5, x1 - 8, y + 5), fill="black")

    for place, (title, image, network, said, targets, loss) in enumerate(rows):
        y = top + place * step
        middle = y + side // 2
        paste(image, title, 16, y)
        arrow(16 + side + 6, 176, middle)
        draw.rounded_rectangle((176, middle - 24, 306, middle + 24), 8, inks[network], "black")
        draw.text((241, middle), network, font=bold, fill="black", anchor="mm")
        arrow(306, 356, middle)
        paste(said, "it says", 356, y)
        if targets:
            draw.text((500, middle), "should be", font=font, fill="black", anchor="mm")
        for i, (name, target) in enumerate(targets):
            paste(target, name, 544 + i * (side + 40), y)
        x = 476 if not targets else 544 + len(targets) * (side + 40)
        draw.text((x, middle), loss, font=bold, fill="black", anchor="lm")
    key = legend(classes, list(range(len(classes)))[:12], 940)
    sheet.paste(key, (8, top + step * len(rows) - 8))
    sheet.save(file)


INK = {  # of a curve
    "validation mIoU, teacher": (31, 119, 180), "student": (255, 127, 14),
    "supervised x": (44, 160, 44), "s1": (214, 39, 40), "s2": (227, 119, 194),
    "features dropped": (148, 103, 189), "frozen CLIP on s1": (120, 120, 120),
    "pseudo-label accepted": (31, 119, 180), "frozen CLIP sure": (120, 120, 120)}


def draw_curves(log: Path, file: Path) -> None:
    """Three panels from log.jsonl: mIoU, loss terms, shares of the unlabelled pixels."""
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    steps = [line for line in lines if "val_miou" not in line]
    evaluations = [line for line in lines if "val_miou" in line]

    def curve(lines: list, name: str, smooth: bool) -> list[tuple]:
        points, mean = [], None
        for line in lines:
            if name in line:
                mean = line[name] if mean is None or not smooth else 0.9 * mean + 0.1 * line[name]
                points.append((line["step"], mean))
        return points

    panels = [
        ("mIoU, percent", {"validation mIoU, teacher": curve(evaluations, "val_miou", False),
                           "student": curve(evaluations, "student", False)}),
        ("loss terms (smoothed)", {
            "supervised x": curve(steps, "x", True), "s1": curve(steps, "s1", True),
            "s2": curve(steps, "s2", True), "features dropped": curve(steps, "fp", True),
            "frozen CLIP on s1": curve(steps, "guidance_s1", True)}),
        ("share of unlabelled pixels (smoothed)", {
            "pseudo-label accepted": curve(steps, "kept", True),
            "frozen CLIP sure": curve(steps, "guided", True)})]
    width, height, left, top, bottom = 420, 300, 46, 30, 100
    sheet = Image.new("RGB", (width * len(panels), height + bottom), "white")
    draw, font, small = (ImageDraw.Draw(sheet), ImageFont.load_default(15),
                         ImageFont.load_default(12))
    last = max([line["step"] for line in lines], default=1)
    for i, (title, curves) in enumerate(panels):
        x0, x1, y0, y1 = i * width + left, (i + 1) * width - 16, top, height
        curves = {name: points for name, points in curves.items() if points}
        highest = max([value for points in curves.values() for _, value in points], default=1)
        ceiling = next(nice * 10.0**power for power in range(-4, 7) for nice in (1, 2, 5)
                       if nice * 10.0**power >= highest)
        draw.text((x0, 6), title, font=font, fill="black")
        for tick in range(5):
            y = y1 - (y1 - y0) * tick / 4
            draw.line((x0, y, x1, y), fill=(225, 225, 225))
            draw.text((x0 - 6, y), f"{ceiling * tick / 4:g}", font=small, fill="black", anchor="rm")
            step = last * tick / 4
            draw.text((x0 + (x1 - x0) * tick / 4, y1 + 6), f"{step:.0f}", font=small,
                      fill="black", anchor="ma")
        for place, (name, points) in enumerate(curves.items()):
            xy = [(x0 + (x1 - x0) * step / last, y1 - (y1 - y0) * value / ceiling)
                  for step, value in points]
            draw.line(xy, fill=INK[name], width=2, joint="curve")
            for x, y in xy if len(xy) <= 25 else []:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=INK[name])
            x, y = x0 + place % 2 * 180, y1 + 28 + place // 2 * 20
            draw.rectangle((x, y + 3, x + 14, y + 11), fill=INK[name])
            draw.text((x + 20, y), name, font=small, fill="black")
    sheet.save(file)


def server_files(out: str, folder: Folder):
    """A function (entry, prediction) that writes OUT/NAME.png as the data set's server wants it.

    Palette PNGs of class numbers, but for Cityscapes of its own numbers (7 is road).
    """
    classes, entries = list(folder.classes), folder.val + folder.test + folder.secret
    table = np.arange(256, dtype=np.uint8)
    if classes == list(CITYSCAPES):
        table[:19] = CITYSCAPES_IDS
    names = {image: f"{Path(image).stem}.png" for image, _ in entries}
    if len(set(names.values())) < len(names):
        names = {image: image.replace("/", "_") + ".png" for image in names}
    out = new_folder(Path(out), "take another name for --save-predictions")

    def write(entry: tuple, prediction: torch.Tensor) -> None:
        picture = Image.fromarray(table[prediction.numpy()], "P")
        colours = np.zeros((256, 3), np.uint8)
        colours[table[:len(classes)]] = palette(classes)[:len(classes)]
        colours[IGNORE] = 255
        picture.putpalette(colours.flatten().tolist())
        picture.save(out / names[entry[0]])

    return write


def write_tables(checkpoint: str, cfg, tables: dict, classes: list[str]) -> str:
    """Tables {split: {model: IoU [N]}} beside the checkpoint, as JSON. Returns what to print."""
    file = Path(cfg.out or Path(checkpoint).parent) / f"{Path(checkpoint).stem}-eval.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file = numbered(file)
    write_json(file, dict(checkpoint=checkpoint, config=dataclasses.asdict(cfg), classes=classes,
                          **{split: as_json(table) for split, table in tables.items()}))
    return f"the same as JSON: {file}"


def save_predictions(out: Path, images: list[str], classes: list[str], predict) -> None:
    """OUT/NAME-mask.png (class numbers) and OUT/NAME-overlay.png of picture files of any size.

    predict: function from a uint8 image [3, H, W] to class numbers [H, W].
    """
    if not images:
        raise UserError("--predict: name the checkpoint, then one picture or more")
    names = [Path(image).stem for image in images]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--predict: two pictures are called {name}; predict them in turn")
        for file in (out / f"{name}-mask.png", out / f"{name}-overlay.png"):
            if file.exists():
                raise UserError(f"{file}: exists already; remove it, or give --out")
    for image in images:
        read_image(image)  # all of them, before anything is written
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror})") from None
    for name, file in zip(names, images):
        image = read_image(file, upright=True)
        mask = predict(image)
        colours = colour_mask(mask, classes)
        colours.save(out / f"{name}-mask.png")
        overlay = Image.blend(to_picture(image), colours.convert("RGB"), 0.55)
        zoom = max(1, round(480 / max(overlay.size)))  # small pictures are enlarged to be looked at
        size = (overlay.width * zoom, overlay.height * zoom)
        overlay = overlay.resize(size, Image.Resampling.NEAREST)
        found = mask.unique().tolist()
        key = legend(classes, found, max(overlay.width, 240))
        sheet = Image.new("RGB", (key.width, overlay.height + key.height), "white")
        sheet.paste(overlay, (0, 0))
        sheet.paste(key, (0, overlay.height))
        sheet.save(out / f"{name}-overlay.png")
        print(f"{out / name}-overlay.png: {', '.join(classes[n] for n in found)}")


def evaluate_checkpoint(method, file: str, typed: dict, save_predictions: str | None) -> None:
    """`--eval`: the protocol of the checkpoint's data set, on validation and test images."""
    model, cfg, classes = load_checkpoint(method, file, typed)
    device, folder = pick_device(cfg.device), open_data(cfg, method.CLASSES, classes)
    folder.check()
    tables, keep, secret = {}, None, []  # secret: test images whose masks only a server has
    if save_predictions is not None:
        keep, secret = server_files(save_predictions, folder), folder.secret
    for split, entries in (("val", folder.val), ("test", folder.test), ("secret", secret)):
        iou = method.evaluate(model.to(device), folder, entries, cfg, device, split, keep)
        if iou.isfinite().any():
            tables[split] = {"SemiVL": iou}
            print(iou_table(f"IoU, {split}", tables[split], classes))
    print(write_tables(file, cfg, tables, classes))


def predict(method, file: str, images: list[str], typed: dict) -> None:
    """`--predict`: a palette PNG and an overlay of each picture, beside the checkpoint."""
    model, cfg, classes = load_checkpoint(method, file, typed)
    device, out = pick_device(cfg.device), cfg.out or Path(file).parent / "predictions"
    save_predictions(Path(out), images, classes, lambda image: method.segment(
        model.to(device), image, cfg, device).argmax(0).cpu())


def other_action(method, args, typed: dict, cfg) -> bool:
    """Does what was asked for instead of a training run; False if nothing was."""
    if args.eval is not None:
        evaluate_checkpoint(method, args.eval, typed, args.save_predictions)
    elif args.predict:
        predict(method, args.predict[0], args.predict[1:], typed)
    elif args.benchmark:
        check_settings(cfg)
        benchmark(method, cfg, args.benchmark)
    elif args.ladder:
        ladder(method, typed, args.ladder)
    else:
        return False
    return True


# ----------------------------------------------------------------------------------------------
# A faster step on a CPU, computing the same
# ----------------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Makes glibc keep what is freed. By default a large tensor goes back to Linux, which hands it
    out again page by page, zeroed, for the next one: a third of a training step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation by a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the heap's end back


class ConvolvedLinear(torch.autograd.Function):
    """x [rows, c_in], weight [c_out, c_in], bias [c_out] -> x @ weight.T + bias, as a convolution.

    torch multiplies float32 matrices with MKL, which keeps its AVX-512 kernels for Intel's
    processors, and convolves with oneDNN, which does not: half the time on an AMD EPYC."""

    @staticmethod
    def product(x, weight, bias=None):
        rows = x[None, :, None].permute(0, 3, 1, 2)  # [1, c_in, rows, 1]
        return F.conv2d(rows, weight[..., None, None], bias)[0, :, :, 0].T

    @staticmethod
    def forward(ctx, x, weight, bias):
        # A convolution would keep x for a weight that does not train; all of CLIP's MLPs do not.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return ConvolvedLinear.product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = ConvolvedLinear.product(grad, weight.T)
        if ctx.needs_input_grad[1]:
            rows, grads = (t[None, :, None].permute(0, 3, 1, 2) for t in (x, grad))
            of_weight = torch.nn.grad.conv2d_weight(rows, (*weight.shape, 1, 1), grads)[..., 0, 0]
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(0)
        return of_x, of_weight, of_bias


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """F.linear, by convolution where that is faster: float32 on a CPU with oneDNN."""
    if not x.is_cpu or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    return ConvolvedLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


# ----------------------------------------------------------------------------------------------
# Several processes, started by torchrun: each takes a share of every batch and of every evaluation
# ----------------------------------------------------------------------------------------------


def process() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def in_every_process(train):
    """A decorator: `train(cfg, ...)`, joined with the other processes if torchrun started several.

    Process 0 alone prints results and writes; the others learn cfg.out from it."""
    @functools.wraps(train)
    def joined(cfg, *rest):
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            return train(cfg, *rest)
        share = cfg.batch // world
        at_once = min(share, cfg.micro_batch)
        if cfg.batch % world or share % at_once:
            raise UserError(f"--batch {cfg.batch}, --micro-batch {cfg.micro_batch}: cannot be "
                            f"shared evenly by {world} processes")
        if cfg.decoder == "vision" and at_once == 1 and not cfg.unlabelled:
            raise UserError(f"--decoder vision has batch norm: take a --batch above {world}")
        device = pick_device(cfg.device)
        if device.type not in ("cpu", "cuda") or device.index is not None:
            raise UserError(f"--device {device}: under torchrun take cuda (each process has the "
                            "GPU of its number) or cpu")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        with contextlib.ExitStack() as stack:
            if process()[0]:
                quiet = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(quiet))
            train(cfg, *rest)
            dist.barrier()  # process 0 may still be drawing
        dist.destroy_process_group()  # not after an error: others would be waited for
    return joined


def parallel_model(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model whose gradients are means over the processes; itself if there is one process."""
    if not dist.is_initialized():
        return model
    here = [torch.cuda.current_device()] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=here, broadcast_buffers=False)  # see average_buffers


def in_step(model, last: bool):
    """Around forward and backward of a micro-batch: only the last one exchanges gradients."""
    return contextlib.nullcontext() if last or not dist.is_initialized() else model.no_sync()


def average_buffers(model: torch.nn.Module) -> None:
    """Each process has its own batch-norm statistics after a step; from here on their means."""
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


def gather(share: torch.Tensor) -> torch.Tensor:
    """The whole batch [B, ...] of the shares that the processes hold, in their order."""
    if not dist.is_initialized():
        return share
    share = share.contiguous()
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, share)
    return torch.cat(shares)


def mirrored(share: torch.Tensor) -> torch.Tensor:
    """Of each item of this process's share of the batch, the one at the mirrored place of the whole
    batch, be that in another process: [B, ...] -> [B, ...]."""
    return gather(share).flip(0)[process()[0] * len(share):][:len(share)]


def total(counts: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def means(scalars: dict) -> dict:
    """Tensors -> floats, means over all processes. One copy from the device for all of them."""
    values = total(torch.stack(list(scalars.values()))) / process()[1]
    return dict(zip(scalars, values.tolist()))


def tally(run, targets) -> dict:
    """For the log: share of unpadded pixels with a confident pseudo-label ("kept"), with a guidance
    label ("guided"). Counts the former for each class in run.accepted."""
    kept = (targets.confidence >= run.cfg.conf) & ~targets.padding
    accepted = total(targets.label[kept].bincount(minlength=len(run.accepted)))
    counts = torch.stack([(~targets.padding).sum(), (targets.clip_label != IGNORE).sum()])
    run.accepted += accepted
    pixels, guided = total(counts).tolist()
    return dict(kept=float(accepted.sum()) / max(pixels, 1), guided=guided / max(pixels, 1))


# ----------------------------------------------------------------------------------------------
# The ladder: what each idea buys in the toy world
# ----------------------------------------------------------------------------------------------

# Each rung adds one idea to the one before; then SemiVL with one thing changed.
LADDER = {
    "labelled scenes only, DeepLabV3+": "--decoder vision --unlabelled off",
    "+ consistency (UniMatch, EMA teacher)": "--decoder vision --guidance 0",
    "+ language-guided decoder": "--guidance 0",
    "+ guidance by class names": "--definitions off",
    "+ definitions: SemiVL": "",
    "SemiVL, DeepLabV3+ decoder": "--decoder vision",
    "language decoder, labelled scenes only": "--unlabelled off",
    "SemiVL, whole ViT trained": "--finetune all",
    "SemiVL, ViT not trained": "--finetune none",
    "SemiVL, the student its own teacher": "--ema 0",
}
FULL = "+ definitions: SemiVL"


def last_line(done: subprocess.CompletedProcess) -> str:
    """What a process that failed said at last."""
    return (done.stderr.strip() or f"ended with code {done.returncode}").splitlines()[-1]


def ladder(method, typed: dict, seeds: int) -> None:
    """`--ladder`: every arm of LADDER with every seed, a thread each, as many at a time as there
    are cores (8 at most); then the table of test mIoU. What has been run stays in runs/ladder, so
    that an interrupted ladder goes on where it stopped."""
    allow_only(typed, "--ladder", "root")
    root = typed.get("root", "data")
    make_toy(root)
    place = Path("runs/ladder")

    def run(item):
        seed, arm = item
        out = place / f"{list(LADDER).index(arm)}-{seed}"
        if not (out / "result.json").exists():
            options = (["--resume", str(out)] if (out / "last.pt").exists() else
                       ["--root", str(root), "--seed", str(seed), "--out", str(out),
                        *LADDER[arm].split()])
            done = subprocess.run([sys.executable, method.__file__, *options], text=True,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
            if done.returncode:
                raise UserError(f"{out}: {last_line(done)}")
        result = json.loads((out / "result.json").read_text())["test"]
        begin, end = ((out / name).stat().st_mtime for name in ("config.json", "result.json"))
        return {model: column["miou"] for model, column in result.items()} | dict(time=end - begin)

    items = [(seed, arm) for seed in range(seeds) for arm in LADDER]
    results = dict(zip(items, parallel(run, items, "ladder")))
    full = [results[seed, FULL] for seed in range(seeds)]
    print("test mIoU of the toy world; seeds also draw the four labelled scenes\n")
    print(f"{'':40}" + "".join(f"{'seed ' + str(n):>8}" for n in range(seeds))
          + f"{'mean':>8}{'sd':>6}  {'SemiVL is ahead by':20}{'seconds':>8}")
    for name, model in (("frozen CLIP, class names", "CLIP by names"),
                        ("frozen CLIP, definitions", "by definitions")):
        print(f"{name:40}" + "".join(f"{r[model]:8.1f}" for r in full))
    for arm in LADDER:
        rows = [results[seed, arm] for seed in range(seeds)]
        scores = [r["SemiVL"] for r in rows]
        ahead = [f["SemiVL"] - s for f, s in zip(full, scores)]
        gain = "" if arm == FULL else (
            f"{round(statistics.mean(ahead), 1) + 0.0:.1f} (sd {statistics.stdev(ahead):.1f})")
        print(f"{arm:40}" + "".join(f"{s:8.1f}" for s in scores)
              + f"{statistics.mean(scores):8.1f}{statistics.stdev(scores):6.1f}  {gain:20}"
              f"{statistics.mean(r['time'] for r in rows):8.0f}")


# ----------------------------------------------------------------------------------------------
# Benchmark: the true model on random images; needs no data and no weights
# ----------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds in the phases of a training step, by hooks: the step itself is left as it is."""

    def __init__(self, run):
        self.device, self.seconds, self.began = run.device, {}, {}
        for name, module in (("teacher", run.teacher.model), ("guidance", run.guidance),
                             ("student forward", run.student)):
            module.register_forward_pre_hook(lambda *_, name=name: self.start(name))
            module.register_forward_hook(lambda *_, name=name: self.stop(name))
        run.optimizer.register_step_pre_hook(lambda *_: self.start("optimiser"))
        run.optimizer.register_step_post_hook(lambda *_: self.stop("optimiser"))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels run behind the program's back
        return time.perf_counter()

    def start(self, name: str) -> None:
        self.began[name] = self.now()

    def stop(self, name: str) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - self.began[name]

    @contextlib.contextmanager
    def backward(self):
        """Within this block, backward passes are timed too."""
        original = torch.Tensor.backward

        def timed(*args, **kwargs):
            self.start("backward")
            original(*args, **kwargs)
            self.stop("backward")

        torch.Tensor.backward = timed
        try:
            yield
        finally:
            torch.Tensor.backward = original


def random_batch(cfg) -> dict:
    """What the loader would give, as noise."""
    B, side = cfg.batch, cfg.crop
    images = {name: torch.randint(256, (B, 3, side, side), dtype=torch.uint8)
              for name in ("x", "w", "s1", "s2")}
    box = torch.tensor([[side // 4, side // 4, side // 2, side // 2]] * B)
    return images | dict(y=torch.zeros(B, side, side, dtype=torch.uint8), box1=box, box2=box,
                         padding=torch.zeros(B, side, side, dtype=torch.bool), files=["noise"] * B)


def measure(method, cfg) -> dict:
    """What steps and an evaluation window cost on random images; no data, no weights."""
    classes = method.CLASSES.get(cfg.dataset) or open_data(cfg, method.CLASSES).classes
    entry = ("a.jpg", "a.png")
    folder = types.SimpleNamespace(classes=classes, labelled=[entry], unlabelled=[entry])
    steps = min(cfg.steps or 3, 3)
    cfg = dataclasses.replace(cfg, clip_weights="none", conv_weights="none", steps=1000)
    run = method.Training(cfg, folder, pick_device(cfg.device))
    batch, totals, phases = random_batch(cfg), [], []
    run.train_step(batch)  # warms up
    watch = Stopwatch(run)
    with watch.backward():
        for _ in range(steps):
            watch.seconds = {}
            begin = watch.now()
            run.train_step(batch)
            totals.append(watch.now() - begin)
            rest = totals[-1] - sum(watch.seconds.values())
            phases.append(watch.seconds | {"losses, CutMix, rest": rest})
    memory = peak_memory(run.device)
    window, image = dataclasses.replace(cfg, fit=False, window_mode="logits"), batch["x"][0]
    method.segment(run.teacher, image, window, run.device)
    begin = watch.now()
    method.segment(run.teacher, image, window, run.device)
    evaluation = watch.now() - begin
    trained, held = parameters(run.student, run.teacher.model, run.guidance)
    step = statistics.median(totals)
    return dict(
        device=str(run.device), dtype=precision(cfg, run.device), torch=torch.__version__,
        threads=torch.get_num_threads(), classes=len(classes), crop=cfg.crop,
        images_per_step=f"{cfg.batch} labelled + {cfg.batch * cfg.unlabelled} unlabelled",
        accumulation=f"{cfg.batch // cfg.micro_batch} x {cfg.micro_batch}",
        seconds_per_step=dict(min=min(totals), median=step, max=max(totals)),
        seconds_per_phase={n: statistics.median(p[n] for p in phases) for n in phases[0]},
        images_per_second=(1 + cfg.unlabelled) * cfg.batch / step, peak_memory=memory,
        parameters_trained=trained, parameters_held=held,
        seconds_per_evaluation_window=evaluation)


def parameters(student, *others) -> tuple[int, int]:
    """How many values train in the student; how many are held in all, shared ones once."""
    held = {id(p): p.numel() for m in (student, *others) for p in m.parameters()}
    return sum(p.numel() for p in student.parameters() if p.requires_grad), sum(held.values())


def precision(cfg, device) -> str:
    return "bfloat16 autocast" if autocast(cfg, device)._enabled else "float32"


def saved_bytes(method, cfg) -> tuple[int, int]:
    """Bytes that the backward pass of a micro-batch needs kept, and bytes of weights, gradients and
    optimiser. Counted on tensors that have a shape but no content: exact, and any size fits."""
    classes, B, side = method.CLASSES[cfg.dataset], cfg.micro_batch, cfg.crop
    visual = empty_clip(cfg.clip).visual
    student = method.assemble(cfg, visual, torch.zeros(len(classes), visual.proj.shape[1])).train()
    trained, held = parameters(
        student, method.copy_trained(student), method.copy_trained(student.clip))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other gets its place
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        images, label = torch.empty(B, 3, side, side), torch.zeros(B, side, side, dtype=torch.long)
        targets = method.Targets(label, label.float(), label > 0, label)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), \
                autocast(cfg, torch.device("cpu")):
            views = dict.fromkeys(("s1", "s2", "fp"), (images, targets))
            method.semivl_loss(student, images, label, views, 0.1)
        for p in student.parameters():  # weights, and views of them, are counted by themselves
            for tensor in (p, p.detach()):  # in this mode the latter has a storage of its own
                kept.pop(tensor.untyped_storage()._cdata, None)
    # Of each value that trains: a gradient and two moments.
    return sum(t.untyped_storage().nbytes() for t in kept.values()), 4 * held + 12 * trained


def memory_table(method, cfg) -> None:
    """Which micro-batch fits into which memory, for each data set."""
    cards = 12, 16, 24, 40
    print("GB that a micro-batch of 1 (4 images at once) keeps for the backward pass; the largest\n"
          "micro-batch in cards of 12, 16, 24, 40 GB. Needed: weights, gradients and optimiser,\n"
          "1.2 times what is kept, 1 GB for CUDA.\n")
    print(f"{'':12}{'classes':>8}{'crop':>6}  {'precision':10}{'recompute':>9}{'kept':>7}"
          f"{'weights':>9}  " + "".join(f"{card:>4}" for card in cards))
    for name in PUBLISHED:
        for kind in ("fp32", "bf16"):
            whole = None
            for recompute in (False, True):
                changes = dict(dataset=name, micro_batch=1, precision=kind, recompute=recompute)
                one = method.Config(**method.PRESETS[name] | changes)
                kept, fixed = saved_bytes(method, one)
                maps = 4 * len(method.CLASSES[name])
                # Recomputing brings back what is inside one group of classes at a time.
                whole = whole or kept
                kept += (whole - kept) * min(1, method.MAPS_AT_ONCE / maps)
                fits = [max(0, int((1e9 * (card - 1) - fixed) / (1.2 * kept))) for card in cards]
                print(f"{name:12}{len(method.CLASSES[name]):>8}{one.crop:>6}  {kind:10}"
                      f"{'on' if recompute else 'off':>9}{kept / 1e9:>7.2f}{fixed / 1e9:>9.2f}  "
                      + "".join(f"{n:>4}" for n in fits), flush=True)


GROWTH = [("cityscapes", 512), ("voc", 512), ("coco", 512), ("ade20k", 512), ("voc", 256),
          ("voc", 801)]


def growth_table(method, cfg) -> None:
    """Seconds and memory of a step with 1 + 1 images, and of an evaluation window, as classes and
    pixels grow. Each row is a process of its own: memory is the most that a process has held."""
    print(f"{'classes':>7}{'crop':>6}{'step, s':>9}{'memory':>18}{'evaluation, s':>15}", flush=True)
    for name, crop in GROWTH:
        options = (f"--benchmark step --dataset {name} --crop {crop} --batch 1 --micro-batch 1 "
                   f"--recompute on --conv-skip off --stride 0 --steps 1 "
                   f"--precision {cfg.precision} --device {cfg.device}")
        done = subprocess.run([sys.executable, method.__file__, *options.split()],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"{name} at {crop}: {last_line(done)}")
        row = json.loads(done.stdout[done.stdout.index("{"):])
        print(f"{row['classes']:>7}{crop:>6}{row['seconds_per_step']['median']:>9.1f}"
              f"{row['peak_memory']:>18}{row['seconds_per_evaluation_window']:>15.2f}", flush=True)


SIZES = dict(voc=(500, 375), coco=(640, 480), ade20k=(683, 512), cityscapes=(2048, 1024))


def time_loader(method, cfg, size: tuple[int, int], seconds: float = 4.0) -> float:
    """Samples a second on one core; a sample is a labelled image and an unlabelled one in its three
    views, from JPEGs (Cityscapes: PNGs) of this width and height."""
    with tempfile.TemporaryDirectory() as place:
        noise, entries = np.random.default_rng(0), []
        kind = "png" if cfg.dataset == "cityscapes" else "jpg"
        for i in range(8):
            small = Image.fromarray(noise.integers(256, size=(24, 32, 3), dtype=np.uint8))
            small.resize(size).save(f"{place}/{i}.{kind}", quality=90)
            mask = Image.fromarray(noise.integers(19, size=(6, 8), dtype=np.uint8))
            mask.resize(size, Image.Resampling.NEAREST).save(f"{place}/{i}-mask.png")
            entries.append((f"{i}.{kind}", f"{i}-mask.png"))
        folder = Folder.__new__(Folder)
        folder.path, folder.classes, folder.ignore = Path(place), dict.fromkeys(range(19)), IGNORE
        items = method.TrainingPictures(folder, entries, entries, cfg, 10**6)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a loader process
        try:
            items[0]
            count, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < seconds:
                count += 1
                items[count]
            return count / (time.perf_counter() - begin)
        finally:
            torch.set_num_threads(threads)


def loader_table(method, cfg) -> None:
    print(f"{'':12}{'image':>12}{'crop':>6}{'samples / s / core':>20}")
    for name, size in SIZES.items():
        one = method.Config(**method.PRESETS[name] | dict(dataset=name))
        speed = time_loader(method, one, size)
        print(f"{name:12}{'{} x {}'.format(*size):>12}{one.crop:>6}{speed:>20.1f}", flush=True)


def benchmark(method, cfg, what: str) -> None:
    """`--benchmark step` prints JSON; "memory", "growth" and "loader" each print a table."""
    tables = dict(memory=memory_table, growth=growth_table, loader=loader_table)
    if what in tables:
        tables[what](method, cfg)
    else:
        speed = time_loader(method, cfg, SIZES.get(cfg.dataset, SIZES["voc"]))
        print(json.dumps(measure(method, cfg) | dict(samples_per_second_per_core=speed), indent=1))


# ----------------------------------------------------------------------------------------------
# The world. An icon is a list of "kind colour coordinates" parts, painted in that order on the
# square from (-1, -1) at the top left to (1, 1); "body" is the icon's own colour and pattern.
# ----------------------------------------------------------------------------------------------

SCENE = 64  # side of a scene in pixels; also CLIP's input size
PICTURE = 40  # side of a corpus picture
RADIUS = (14, 18)  # of an object, in pixels
SPLITS = {"train": 464, "val": 150, "test": 200}
CORPUS = 20_000
ZOOM = 4  # icons are painted this much larger, then averaged down, for smooth edges

COLORS = {
    "red": (222, 62, 58), "orange": (240, 146, 54), "yellow": (248, 208, 76),
    "green": (74, 154, 84), "lime": (150, 196, 84), "blue": (66, 118, 204),
    "sky": (138, 200, 236), "pink": (242, 150, 180), "brown": (146, 98, 62),
    "cream": (250, 234, 200), "white": (250, 250, 248), "grey": (160, 166, 178),
    "dark": (52, 50, 62), "hole": (0, 0, 0, 0),
}

CONCEPTS = {  # class -> concept -> (body colours, body pattern, icon)
    "vehicle": {
        "car": ("red blue", "plain", """
            poly sky -.62 -.05 -.4 -.6 .34 -.6 .66 -.05; round body -1 -.14 1 .44
            box body -.08 -.6 .04 0; disc dark -.76 .16 -.22 .7; disc dark .22 .16 .76 .7
            disc grey -.58 .34 -.4 .52; disc grey .4 .34 .58 .52; disc yellow .8 -.02 1 .18"""),
        "boat": ("white cream", "stripes", """
            poly brown -1 .3 1 .3 .62 .88 -.66 .88; box dark -.07 -1 .05 .3
            poly body .1 -.95 .92 .18 .1 .18; poly body -.14 -.7 -.8 .18 -.14 .18
            box cream -.9 .3 .9 .44"""),
        "rocket": ("grey", "plain", """
            poly orange -.26 .6 .26 .6 0 1; poly orange -.66 .74 -.3 .02 .3 .02 .66 .74
            disc body -.4 -1 .4 .72; poly orange -.27 -.62 0 -1 .27 -.62
            disc blue -.22 -.36 .22 .08; disc sky -.13 -.27 .13 -.01"""),
    },
    "animal": {
        "cat": ("orange grey", "stripes", """
            poly body -.84 -1 -.86 .1 -.1 -.5; poly body .84 -1 .86 .1 .1 -.5
            poly pink -.7 -.66 -.7 -.2 -.4 -.44; poly pink .7 -.66 .7 -.2 .4 -.44
            disc body -.96 -.62 .96 .9; disc white -.44 .2 .44 .8; disc dark -.54 -.2 -.22 .2
            disc dark .22 -.2 .54 .2; poly pink -.16 .3 .16 .3 0 .48"""),
        "fish": ("blue yellow", "dots", """
            poly body .4 0 1 -.6 .9 0 1 .6; poly body -.3 -.4 .1 -.8 .35 -.3
            disc body -1 -.54 .62 .54; disc white -.78 -.28 -.42 .08
            disc dark -.72 -.2 -.52 0"""),
        "ladybug": ("red orange", "dots", """
            disc dark -.42 -1 .42 -.2; disc body -.86 -.72 .86 .9; box dark -.06 -.7 .06 .88
            disc white -.3 -.94 -.1 -.74; disc white .1 -.94 .3 -.74"""),
    },
    "plant": {
        "tree": ("green", "plain", """
            box brown -.18 .3 .18 1; disc body -.9 -.4 .1 .5; disc body -.1 -.4 .9 .5
            disc body -.6 -1 .6 .2; disc lime -.34 -.76 .06 -.4; disc lime .3 -.16 .62 .12"""),
        "flower": ("pink yellow", "plain", """
            box green -.08 .2 .08 1; poly green 0 .84 .62 .44 .5 .84
            disc body -.32 -1 .32 -.36; disc body -.32 -.24 .32 .4; disc body -.74 -.62 -.1 .02
            disc body .1 -.62 .74 .02; disc orange -.26 -.56 .26 -.04"""),
        "cactus": ("lime", "stripes", """
            round body -.3 -.96 .3 .7; round body -.86 -.4 -.54 .24; round body .54 -.6 .86 .04
            box body -.7 .02 -.2 .24; box body .2 -.18 .7 .04; disc pink -.2 -1 .2 -.72
            poly orange -.54 .5 .54 .5 .4 1 -.4 1"""),
    },
    "food": {
        "strawberry": ("red pink", "dots", """
            disc body -.8 -.7 .12 .3; disc body -.12 -.7 .8 .3; poly body -.78 -.1 .78 -.1 0 1
            poly green -.7 -.72 -.2 -.76 0 -1 .2 -.76 .7 -.72 .3 -.36 0 -.5 -.3 -.36"""),
        "donut": ("pink brown", "dots", """
            disc orange -.96 -.9 .96 .96; disc body -.9 -.9 .9 .8; disc orange -.36 -.38 .36 .34
            disc hole -.28 -.28 .28 .3"""),
        "melon": ("red", "dots", """
            half green -1 -1.5 1 .8; half white -.86 -1.3 .86 .64; half body -.78 -1.2 .78 .54"""),
    },
    "building": {
        "house": ("cream sky", "plain", """
            box body -.76 -.2 .76 .92; poly red -1 -.14 0 -1 1 -.14; box brown -.16 .3 .2 .92
            box blue -.6 .08 -.3 .4; box blue .36 .08 .64 .4; box brown .46 -.96 .68 -.5"""),
        "castle": ("pink grey", "stripes", """
            box body -.6 -.3 .6 .92; box body -.96 -.7 -.44 .92; box body .44 -.7 .96 .92
            poly blue -1 -.6 -.7 -1 -.4 -.6; poly blue .4 -.6 .7 -1 1 -.6
            box body -.36 -.5 -.14 -.2; box body .14 -.5 .36 -.2; round dark -.24 .3 .24 .92"""),
        "tent": ("blue green", "stripes", """
            poly body -1 .84 0 -.86 1 .84; poly dark -.34 .84 0 -.1 .34 .84
            poly yellow 0 -1 .36 -.9 0 -.74"""),
    },
}
GROUNDS = {  # concept of the background -> (base colour, second colour)
    "meadow": ((126, 182, 92), (96, 156, 74)),
    "beach": ((236, 214, 160), (216, 188, 130)),
    "lake": ((92, 166, 214), (150, 206, 236)),
    "snowfield": ((234, 242, 250), (202, 218, 236)),
}
TOY_CLASSES = ["background", *CONCEPTS]
TOY_DEFINITIONS = {"background": list(GROUNDS), **{k: list(v) for k, v in CONCEPTS.items()}}
CLASS_OF = {concept: name for name, concepts in CONCEPTS.items() for concept in concepts}
MASK_COLORS = ("dark", "red", "orange", "green", "pink", "blue")  # in the order of TOY_CLASSES


# ----------------------------------------------------------------------------------------------
# The painter
# ----------------------------------------------------------------------------------------------


def paint_body(color: tuple, pattern: str, side: int, rng: random.Random) -> Image.Image:
    """A square of cloth [side, side] from which the icon's body is cut."""
    shade = rng.randint(-14, 14)
    color = tuple(min(255, c + shade) for c in color)
    pale = sum(color) > 600  # a pale cloth needs a darker pattern, a strong one a lighter
    cloth = Image.new("RGB", (side, side), color)
    draw = ImageDraw.Draw(cloth)
    step = side // 5
    start = rng.randrange(step)
    if pattern == "stripes":
        mark = tuple(int(c * 0.72) if pale else int(0.4 * c + 153) for c in color)
        for x in range(start, side, step):
            draw.rectangle((x, 0, x + 0.42 * step, side), fill=mark)
    if pattern == "dots":
        mark = tuple(int(c * (0.72 if pale else 0.35)) for c in color)
        for row, y in enumerate(range(start, side, step)):
            for x in range(row % 2 * step // 2, side, step):
                draw.circle((x, y), 0.045 * side, fill=mark)
    return cloth


def draw_part(draw: ImageDraw.ImageDraw, kind: str, xy: list[float], fill) -> None:
    if kind == "disc":
        draw.ellipse(xy, fill=fill)
    elif kind == "half":
        draw.pieslice(xy, 0, 180, fill=fill)
    elif kind == "box":
        draw.rectangle(xy, fill=fill)
    elif kind == "round":
        draw.rounded_rectangle(xy, 0.45 * min(xy[2] - xy[0], xy[3] - xy[1]), fill=fill)
    else:
        draw.polygon(xy, fill=fill)


def paint_icon(concept: str, radius: float, rng: random.Random) -> Image.Image:
    """One object, RGBA [2 radius, 2 radius], in a random colour, direction and small tilt."""
    colors, pattern, icon = CONCEPTS[CLASS_OF[concept]][concept]
    side = ZOOM * int(2 * radius)
    body = paint_body(COLORS[rng.choice(colors.split())], pattern, side, rng)
    sprite = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(sprite)
    for part in icon.replace("\n", ";").split(";"):
        if not part.strip():
            continue
        kind, color, *numbers = part.split()
        xy = [(float(number) + 1) / 2 * (side - 1) for number in numbers]
        if color == "body":
            cut = Image.new("L", (side, side))
            draw_part(ImageDraw.Draw(cut), kind, xy, 255)
            sprite.paste(body, mask=cut)
        else:
            draw_part(draw, kind, xy, COLORS[color])
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return sprite.rotate(rng.uniform(-12, 12)).reduce(ZOOM)


def paint_ground(name: str, rng: random.Random, side: int = 256) -> Image.Image:
    """A large textured ground [side, side]; scenes and pictures are cut out of it."""
    base, second = GROUNDS[name]
    light = tuple(c + (255 - c) * 3 // 5 for c in base)
    dark = tuple(c * 4 // 5 for c in second)
    ground = Image.new("RGB", (side, side), base)
    noise = Image.frombytes("L", (side // 8, side // 8), rng.randbytes((side // 8) ** 2))
    patches = noise.resize((side, side), Image.Resampling.BICUBIC).point(lambda v: v // 2)
    ground.paste(second, mask=patches)
    draw = ImageDraw.Draw(ground)
    if name == "beach":
        for y in range(0, side, 10):
            draw.line([(x, y + 2 * math.sin(x / 7 + y)) for x in range(0, side, 2)], fill=second)
    for _ in range(side * side // (200 if name == "lake" else 70)):
        x, y, ink = rng.randrange(side), rng.randrange(side), rng.choice((dark, light))
        if name == "meadow":
            draw.line((x, y, x + rng.choice((-1, 1)), y - 3), fill=ink)
        elif name == "lake":
            draw.arc((x - 4, y - 2, x + 4, y + 3), 200, 340, fill=light)
        else:
            draw.point((x, y), fill=ink)
    return ground


class Painter:
    """Paints scenes and pictures from one random stream."""

    def __init__(self, seed: str):
        self.rng = random.Random(seed)
        self.grounds = {name: paint_ground(name, self.rng) for name in GROUNDS}

    def ground(self, side: int) -> tuple[str, Image.Image]:
        name, whole = self.rng.choice(list(self.grounds.items()))
        x, y = self.rng.randrange(whole.width - side), self.rng.randrange(whole.height - side)
        return name, whole.crop((x, y, x + side, y + side))

    def place(self, image: Image.Image, concept: str, x: float, y: float) -> tuple:
        """Paints an object with a soft shadow at (x, y) -> its exact outline and corner."""
        sprite = paint_icon(concept, self.rng.uniform(*RADIUS), self.rng)
        corner = (round(x - sprite.width / 2), round(y - sprite.height / 2))
        alpha = sprite.getchannel("A")
        shadow = alpha.point(lambda v: v * 0.3)
        image.paste((30, 40, 50), (corner[0] + 1, corner[1] + 2), shadow)
        image.paste(sprite, corner, alpha)
        return alpha.point(lambda v: 255 * (v > 127)), corner

    def scene(self) -> tuple[Image.Image, Image.Image]:
        """One to three objects, one per quarter -> image RGB [64, 64] and mask P [64, 64]."""
        rng = self.rng
        _, image = self.ground(SCENE)
        mask = Image.new("P", (SCENE, SCENE))
        mask.putpalette([value for color in MASK_COLORS for value in COLORS[color]])
        for quarter in sorted(rng.sample(range(4), rng.choice((1, 2, 3, 3)))):
            concept = rng.choice(list(CLASS_OF))
            x = SCENE * (0.25 + 0.5 * (quarter % 2)) + rng.uniform(-4, 4)
            y = SCENE * (0.25 + 0.5 * (quarter // 2)) + rng.uniform(-4, 4)
            outline, corner = self.place(image, concept, x, y)
            mask.paste(TOY_CLASSES.index(CLASS_OF[concept]), corner, outline)
        return image, mask

    def picture(self) -> tuple[Image.Image, str]:
        """Up to two objects, often cut by the border -> image RGB [40, 40] and caption."""
        rng = self.rng
        ground, image = self.ground(PICTURE)
        concepts = rng.choices(list(CLASS_OF), k=rng.choice((0, 1, 1, 1, 2)))
        angle = rng.uniform(0, 2 * math.pi)
        for concept in concepts:
            reach = rng.uniform(13, 17) if len(concepts) == 2 else rng.uniform(0, 10)
            x, y = reach * math.cos(angle), reach * math.sin(angle)
            self.place(image, concept, PICTURE / 2 + x, PICTURE / 2 + y)
            angle += math.pi
        # Captions speak of concepts; only now and then does one use the word for the class.
        words = [CLASS_OF[c] if rng.random() < CLASS_WORD else c for c in concepts]
        caption = "a photo of a " + " and a ".join(words or [ground])
        if words and rng.random() < GROUND_WORD:
            caption += f" on a {ground}"
        return image, caption


# ----------------------------------------------------------------------------------------------
# The tiny CLIP
# ----------------------------------------------------------------------------------------------

CLASS_WORD = 0.05  # share of objects that a caption calls by their class
GROUND_WORD = 1.0  # share of captions with objects that also name the ground
STEPS = 800
BATCH = 192  # pictures per step
TILES = (16, 32)  # sides of the crops that CLIP sees; a step uses one of them
LR = 3e-3
TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": SCENE, "patch_size": 8, "width": 96, "layers": 2, "head_width": 32,
        "pool_type": "avg",
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1,
    },
}


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """-> normalised [N, 3, H, W]"""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    mean, std = map(torch.tensor, (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def random_crops(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """[N, 3, H, H] -> [N, 3, side, side], each cut at its own random place."""
    n, _, height, _ = pictures.shape
    offset = torch.randint(height - side + 1, (2, n, 1))
    rows, columns = offset + torch.arange(side)
    index = torch.arange(n)[:, None, None]
    crops = pictures[index, :, rows[:, :, None], columns[:, None, :]]  # [N, side, side, 3]
    return crops.permute(0, 3, 1, 2)


def encode_mosaic(model: open_clip.CLIP, crops: torch.Tensor) -> torch.Tensor:
    """Crops [N, 3, t, t] -> their embeddings [N, E], encoded as tiles of common canvases.

    The embedding of a crop is the mean over its own patches, but attention spans the whole canvas,
    as it will span whole scenes later. Most of what a patch could attend to belongs to other
    captions, which should keep it local.
    """
    side, per_row = crops.shape[-1], SCENE // crops.shape[-1]
    canvas = crops.reshape(-1, per_row, per_row, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    canvas = canvas.reshape(-1, 3, SCENE, SCENE)
    patches = model.visual.forward_intermediates(
        canvas, indices=1, normalize_intermediates=True, intermediates_only=True
    )["image_intermediates"][0]  # [canvases, width, grid, grid]
    tiles = F.avg_pool2d(patches, side // model.visual.patch_size[0])
    return tiles.permute(0, 2, 3, 1).flatten(0, 2) @ model.visual.proj


def contrastive_loss(images, texts, caption, scale) -> torch.Tensor:
    """CLIP's loss for embeddings [N, E]; pictures with the same caption [N] share the target."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    same = (caption[:, None] == caption).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain_tiny_clip(pictures, captions: list[str], seed: int = 0) -> open_clip.CLIP:
    """Contrastive pre-training on pictures [N, 3, 40, 40] with one caption each."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**TINY_CLIP)
    # Real CLIP ends at a scale of 100 and guidance assumes it; learned, it would stay near 20 here.
    model.logit_scale.data.fill_(math.log(100)).requires_grad_(False)
    texts = open_clip.tokenize(captions, model.context_length)
    texts, caption = torch.unique(texts, dim=0, return_inverse=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, STEPS, pct_start=0.1, cycle_momentum=False
    )
    progress = tqdm(range(STEPS), "pre-training the tiny CLIP", disable=None)
    for step in progress:
        batch = torch.randint(len(pictures), (BATCH,))
        crops = random_crops(pictures[batch], TILES[step % len(TILES)])
        used, which = torch.unique(caption[batch], return_inverse=True)
        text_embeddings = model.encode_text(texts[used])[which]
        image_embeddings = encode_mosaic(model, crops)
        scale = model.logit_scale.exp()
        loss = contrastive_loss(image_embeddings, text_embeddings, which, scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


# ----------------------------------------------------------------------------------------------
# Writing it all to disk
# ----------------------------------------------------------------------------------------------


def write_scenes(root: Path, seed: int) -> None:
    painter = Painter(f"scenes {seed}")
    (root / "splits").mkdir()
    for split, count in SPLITS.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        lines = []
        for i in tqdm(range(count), f"painting {split} scenes", disable=None):
            names = [f"{kind}/{split}/{i:04d}.png" for kind in ("images", "masks")]
            for name, picture in zip(names, painter.scene()):
                picture.save(root / name)
            lines.append(" ".join(names) + "\n")
        (root / "splits" / f"{split}.txt").write_text("".join(lines))
    description = {"classes": TOY_CLASSES, "definitions": TOY_DEFINITIONS, "ignore_index": 255}
    (root / "dataset.json").write_text(json.dumps(description, indent=2))


def make_toy(root: Path, seed: int = 0) -> Path:
    """Builds root/toy unless it is there; it appears under its name only when it is complete."""
    toy = Path(root) / "toy"
    if toy.exists():
        return toy
    with building(toy) as folder:
        if folder is None:
            return toy
        print(f"making the toy world in {toy}: scenes, then a tiny CLIP (once, about a minute)",
              flush=True)
        write_scenes(folder, seed)
        painter = Painter(f"corpus {seed}")
        bar = tqdm(range(CORPUS), "painting the corpus", disable=None)
        pictures, captions = zip(*(painter.picture() for _ in bar))
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            clip = pretrain_tiny_clip(to_tensor(pictures), captions, seed)
        torch.save(clip.state_dict(), folder / "clip.pt")
    return toy


def main(argv=None) -> int:
    """Command line: `data_prep.py toy|voc|coco|ade20k|cityscapes`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["toy", *ARCHIVES])
    parser.add_argument("--root", default="data", help="where data sets are kept [data]")
    parser.add_argument("--source", help="folder, or URL of a mirror, that has the archives")
    try:
        parser.error = refuse
        args = parser.parse_args(argv)
        if args.dataset == "toy" and args.source:
            raise UserError("--source does not go with toy: nothing is fetched for it")
        present = (Path(args.root) / args.dataset).exists()
        path = (make_toy(args.root) if args.dataset == "toy" else
                prepare(args.dataset, args.root, args.source))
        if present:
            print(f"{path} is there already; nothing to do")
    except (UserError, OSError) as error:
        print(f"data_prep.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep.py: interrupted; what was fetched is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
