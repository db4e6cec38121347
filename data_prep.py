"""Makes data folders for semivl.py: the toy world and the four published data sets.

    python data_prep.py toy                          paints the toy world, trains its tiny CLIP
    python data_prep.py voc                          fetches, unpacks, checks; also coco, ade20k
    python data_prep.py cityscapes --source FOLDER   from the two archives that its login gives

They are made in data/, or in --root. A data folder looks like this:

    FOLDER/dataset.json            {"classes": [...], "ignore_index": 255}
    FOLDER/splits/train.txt        "IMAGE MASK" or "IMAGE" a line, paths relative to FOLDER
    FOLDER/splits/val.txt          "IMAGE MASK" a line; so is test.txt, which only the toy has
    FOLDER/splits/N/labeled.txt    the published list of N labelled images

A mask is a PNG whose pixel values are class numbers (palette or greyscale, never colours). Until it
is complete, a folder is called .NAME-...; one that a killed process left may be removed.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.datasets import Cityscapes
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

IGNORE = 255  # mask value of pixels that belong to no class


def progress(iterable, title: str, **more) -> tqdm:
    """A progress bar; in a log file, where each change is a new line, it changes rarely."""
    return tqdm(iterable, title, mininterval=0.5 if sys.stderr.isatty() else 30, **more)


# ----------------------------------------------------------------------------------------------
# The published data sets
# ----------------------------------------------------------------------------------------------

# Of the 34 classes in the files of Cityscapes, 19 are trained; the others are ignored.
TRAINED = [c for c in Cityscapes.classes if 0 <= c.train_id < IGNORE]
CLASSES = {  # data set -> class names in the order of mask values, spelled as published
    "voc": ("background|aeroplane|bicycle|bird|boat|bottle|bus|car|cat|chair|cow|diningtable|dog|"
        "horse|motorbike|person|pottedplant|sheep|sofa|train|tvmonitor").split("|"),
    "coco": ("background|person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|"
        "fire hydrant|stop sign|parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|"
        "zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|"
        "kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|"
        "fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|"
        "cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|"
        "cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|"
        "hair drier|toothbrush").split("|"),
    "ade20k": ("wall|building|sky|floor|tree|ceiling|road|bed|windowpane|grass|cabinet|sidewalk|"
        "person|earth|door|table|mountain|plant|curtain|chair|car|water|painting|sofa|shelf|house|"
        "sea|mirror|rug|field|armchair|seat|fence|desk|rock|wardrobe|lamp|bathtub|railing|cushion|"
        "base|box|column|signboard|chest of drawers|counter|sand|sink|skyscraper|fireplace|"
        "refrigerator|grandstand|path|stairs|runway|case|pool table|pillow|screen door|stairway|"
        "river|bridge|bookcase|blind|coffee table|toilet|flower|book|hill|bench|countertop|stove|"
        "palm|kitchen island|computer|swivel chair|boat|bar|arcade machine|hovel|bus|towel|light|"
        "truck|tower|chandelier|awning|streetlight|booth|television receiver|airplane|dirt track|"
        "apparel|pole|land|bannister|escalator|ottoman|bottle|buffet|poster|stage|van|ship|"
        "fountain|conveyer belt|canopy|washer|plaything|swimming pool|stool|barrel|basket|"
        "waterfall|tent|bag|minibike|cradle|oven|ball|food|step|tank|trade name|microwave|pot|"
        "animal|bicycle|lake|dishwasher|screen|blanket|sculpture|hood|sconce|vase|traffic light|"
        "tray|ashcan|fan|pier|crt screen|plate|monitor|bulletin board|shower|radiator|glass|clock|"
        "flag").split("|"),
    "cityscapes": [c.name for c in sorted(TRAINED, key=lambda c: c.train_id)],
}

# A file to fetch: its size in GB (about), its MD5 if one is known, where it is served.
Archive = namedtuple("Archive", "name size md5 urls")
ARCHIVES = {
    "voc": [Archive("VOCtrainval_11-May-2012.tar", 2.0, "6cd6e144f989b92b3379bac3b3de84fd", (
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar"))],
    "coco": [
        Archive("train2017.zip", 19.3, "cced6f7f71b7629ddf16f17bbcfab6b2",
                ("http://images.cocodataset.org/zips/train2017.zip",
                 "https://s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip")),
        Archive("val2017.zip", 0.8, "442b8da7639aecaf257c1dceb8ba8c80",
                ("http://images.cocodataset.org/zips/val2017.zip",
                 "https://s3.amazonaws.com/images.cocodataset.org/zips/val2017.zip")),
        Archive("ground_truth_coco.zip", 0.5, None,
                ("https://github.com/google-research/semivl/releases/download/checkpoints/"
                 "ground_truth_coco.zip",))],
    "ade20k": [Archive("ADEChallengeData2016.zip", 1.0, "7328b3957e407ddae1d3cbf487f149ef", (
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",))],
    "cityscapes": [  # both need a login, so they are taken from --source only
        Archive("leftImg8bit_trainvaltest.zip", 11.6, None, ()),
        Archive("gtFine_trainvaltest.zip", 0.25, None, ())],
}
TAKEN = {  # pattern of a path in the archives -> path in the data folder; the rest is left out
    "voc": {r"VOCdevkit/VOC2012/((JPEGImages/[^/]+\.jpg)|(SegmentationClass/[^/]+\.png))": r"\1"},
    "coco": {r"((train|val)2017/\d{12}\.jpg)": r"\1", r"(.*/)?(\d{12}\.png)": r"masks/\2"},
    "ade20k": {r"ADEChallengeData2016/((images|annotations)/(training|validation)/"
               r"ADE_\w+\.(jpg|png))": r"\1"},
    "cityscapes": {r"(leftImg8bit|gtFine)/(train|val)/\w+/\w+_(leftImg8bit|gtFine_labelIds)\.png":
                   r"\g<0>"},
}
COUNTS = {"voc": (10_582, 1_449), "coco": (118_287, 5_000), "ade20k": (20_210, 2_000),
          "cityscapes": (2_975, 500)}  # training images, validation images

# The authors' lists. The URLs pin a commit, so their content cannot change.
COMMIT = "13ee65d6f27e197e0b55d987b346fc880fc811ca"
LIST_HOSTS = (f"https://raw.githubusercontent.com/google-research/semivl/{COMMIT}/",
              f"https://cdn.jsdelivr.net/gh/google-research/semivl@{COMMIT}/")
LISTS = {  # file below our splits/ -> file below theirs, or None: made by ade20k_list()
    "voc": {f"{n}/labeled.txt": f"pascal/{n}/labeled.txt" for n in (92, 183, 366, 732, 1464)}
    | {"val.txt": "pascal/val.txt", "train.txt": "pascal/train_aug.txt"},
    "coco": {f"{n}/labeled.txt": f"coco/1_{part}/labeled.txt" for n, part in (
        (232, 512), (463, 256), (925, 128), (1849, 64), (3697, 32))} | {"val.txt": "coco/val.txt"},
    "ade20k": {f"{n}/labeled.txt": None for n in (158, 316, 632, 1263, 2526)} | {"val.txt": None},
    "cityscapes": {f"{n}/labeled.txt": f"cityscapes/1_{part}/labeled.txt" for n, part in (
        (100, 30), (186, 16), (372, 8), (744, 4), (1488, 2))} | {"val.txt": "cityscapes/val.txt"},
}


def download(url: str, file: Path) -> None:
    """Fetches a URL. What an earlier transfer left in FILE.part is continued, not fetched again."""
    part = file.with_name(file.name + ".part")
    while not file.exists():
        have = part.stat().st_size if part.exists() else 0
        ask = {"User-Agent": "semivl", "Range": f"bytes={have}-"}
        try:
            with urlopen(Request(url, headers=ask), timeout=60) as answer:
                start = have if answer.status == 206 else 0  # some hosts send only the whole file
                size = start + int(answer.headers.get("Content-Length") or 0)
                # Neither truncated nor opened to append: two processes that fetch it at the same
                # time then write the same bytes at the same places, and that does no harm.
                with open(part, "r+b" if part.exists() else "wb") as out, progress(
                        None, file.name, total=size, initial=start, unit="B",
                        unit_scale=True) as bar:
                    out.seek(start)
                    while block := answer.read(1 << 18):
                        bar.update(out.write(block))
            if part.stat().st_size < size:
                raise OSError("the transfer breaks off again and again")
            part.replace(file)
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "code", 0) == 416:  # the part is the whole; its MD5 is checked later
                part.replace(file)
            elif not file.exists() and (not part.exists() or part.stat().st_size <= have):
                raise  # not a single byte came; otherwise the next round continues


def fetch(archive: Archive, downloads: Path) -> Path:
    """The file in `downloads`, from the first URL that serves it with the right MD5."""
    file, failed = downloads / archive.name.replace("/", "-"), []
    for url in archive.urls:
        try:
            download(url, file)  # nothing to do if an interrupted process has fetched it already
            if check_integrity(file, archive.md5):
                return file
            file.unlink()
            raise OSError("the MD5 is wrong")
        except (OSError, ValueError, http.client.HTTPException) as error:
            failed.append(f"{url}: {getattr(error, 'reason', error)}")
    raise OSError(f"{archive.name} cannot be fetched ({'; '.join(failed)}); start again, or put it "
                  "into a FOLDER under this name and run python data_prep.py NAME --source FOLDER")


def unpack(archive: Path, taken: dict[str, str], folder: Path) -> None:
    """The regular files of a tar or zip whose path matches a pattern of `taken`, and no others."""
    def place(name: str) -> str | None:
        return next((match.expand(new) for old, new in taken.items()
                     if (match := re.fullmatch(old, name))), None)

    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                for info in progress(file.infolist(), f"unpack {archive.name}"):
                    if new := place(info.filename):
                        info.filename = new
                        file.extract(info, folder)
        else:
            with tarfile.open(archive) as file:
                for info in progress(file, f"unpack {archive.name}"):
                    if info.isfile() and (new := place(info.name)):
                        file.extract(info.replace(name=new, deep=False), folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive}: damaged ({str(error).splitlines()[0]}); remove it and start "
                         "again") from None


def read_mask(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file.name}: not an image that can be read ({error})") from None


def change_masks(files: list[Path], table: np.ndarray) -> None:
    """Rewrites masks through a table [256] of new values; labelIds become labelTrainIds."""
    def change(file: Path) -> None:
        mask = table[read_mask(file)]
        file.unlink()
        file = file.with_name(file.name.replace("labelIds", "labelTrainIds"))
        Image.fromarray(mask).save(file, compress_level=1)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(progress(pool.map(change, files), "convert masks", total=len(files)))


def reduce_ade20k(folder: Path) -> None:
    """Masks of ADE20K: 0 ("other") becomes IGNORE, 1 to 150 become 0 to 149.

    Some copies in circulation are converted already: they hold 255 and never 150. A second shift
    would turn every class into its neighbour, so they stay as they are.
    """
    files = sorted(folder.glob("annotations/*/*.png"))
    largest = (read_mask(file).max() for file in progress(files, "raw or converted"))
    found = next((value for value in largest if value in (150, IGNORE)), None)
    if not found:
        raise ValueError("ADE20K: the masks hold neither 150 (raw) nor 255 (converted)")
    if found == 150:
        change_masks(files, np.arange(256, dtype=np.uint8) - 1)  # 0 wraps round to 255


def ade20k_list(file: str) -> str:
    """The published list, "N/labeled.txt" or "val.txt", drawn as the authors drew it."""
    train, val = COUNTS["ade20k"]
    if file == "val.txt":
        names = [f"validation/ADE_val_{i:08}" for i in range(1, val + 1)]
    else:
        names = [f"training/ADE_train_{i:08}" for i in range(1, train + 1)]
        random.Random(0).shuffle(names)
        names = names[:int(Path(file).parent.name)]
    return "\n".join(f"images/{name}.jpg annotations/{name}.png" for name in names)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def settle(name: str, folder: Path) -> None:
    """From unpacked archives and lists to a data folder, with a check that it is complete."""
    train = folder / "splits/train.txt"
    if name == "ade20k":
        reduce_ade20k(folder)
    elif name == "cityscapes":
        table = np.full(256, IGNORE, np.uint8)
        table[[c.id for c in TRAINED]] = [c.train_id for c in TRAINED]
        change_masks(sorted(folder.glob("gtFine/*/*/*_labelIds.png")), table)
    if name == "voc":  # most of these masks are not in the archive; unlabelled images need none
        images = [line.split()[0] for line in train.read_text(encoding="utf-8").splitlines()]
    else:
        pattern = {"coco": "train2017/*.jpg", "ade20k": "images/training/*.jpg",
                   "cityscapes": "leftImg8bit/train/*/*.png"}[name]
        images = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
    train.write_text("\n".join(images), encoding="utf-8")
    write_json(folder / "dataset.json", {"classes": CLASSES[name], "ignore_index": IGNORE})

    counts, missing = dict(zip(("train.txt", "val.txt"), COUNTS[name])), set()
    for file in ("train.txt", *LISTS[name]):
        lines = (folder / "splits" / file).read_text(encoding="utf-8").splitlines()
        count = counts.get(file) or int(Path(file).parent.name)
        if len(lines) != count:
            raise ValueError(f"{name}: splits/{file} has {len(lines)} images instead of {count}; "
                             "the archives or the lists are of another version")
        missing |= {path for path in " ".join(lines).split() if not (folder / path).is_file()}
    if missing:
        raise ValueError(f"{name}: {len(missing)} listed files are not in the archives: "
                         + ", ".join(sorted(missing)[:3]) + ", ..." * (len(missing) > 3))


def make_published(name: str, folder: Path, downloads: Path, source: str | None) -> None:
    """Fills `folder` from the archives and lists in `source`, or fetched to `downloads`."""
    lists = [Archive(f"splits/{path}", 0, None, [f"{host}splits/{path}" for host in LIST_HOSTS])
             for path in LISTS[name].values() if path]
    wanted = lists + ARCHIVES[name]
    if source and "://" in source:
        wanted = [a._replace(urls=[f"{source.rstrip('/')}/{a.name}", *a.urls]) for a in wanted]
    files = {a.name: file for a in wanted if source and (file := Path(source) / a.name).is_file()}
    missing = [a for a in wanted if a.name not in files]
    if login := [a.name for a in missing if not a.urls]:
        raise ValueError(f"{name}: {' and '.join(login)} cannot be fetched without a login; get "
                         "the archives from https://www.cityscapes-dataset.com, then run "
                         "python data_prep.py cityscapes --source FOLDER_OF_BOTH")
    print(f"making {downloads.parent / name}; fetched files stay in {downloads} until the end:")
    for a in ARCHIVES[name]:
        print(f"  {a.size:5.1f} GB  {files.get(a.name) or a.urls[0]}", flush=True)
    need = sum(a.size for a in missing + ARCHIVES[name])  # to fetch, and to unpack
    need -= sum(f.stat().st_size for a in missing for f in downloads.glob(f"{a.name}*")) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if free < need:
        raise OSError(f"{name} needs about {need:.1f} GB, but {free:.1f} GB are free in "
                      f"{downloads.parent}; choose another disk by --root")

    downloads.mkdir(exist_ok=True)
    fetched = {a.name: fetch(a, downloads) for a in missing}
    files |= fetched
    for new, path in LISTS[name].items():
        file = folder / "splits" / new
        file.parent.mkdir(parents=True, exist_ok=True)
        text = files[f"splits/{path}"].read_text(encoding="utf-8") if path else ade20k_list(new)
        file.write_text(text, encoding="utf-8")
    for a in ARCHIVES[name]:
        unpack(files[a.name], TAKEN[name], folder)
    settle(name, folder)
    for file in fetched.values():  # the user's own files are not among them
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        downloads.rmdir()  # unless the user keeps something there


def prepare(name: str, root="data", source: str | None = None) -> Path:
    """Makes root/NAME, complete or not at all, if it is not there already, and returns its path.

    source: folder, or URL of a mirror, with the archives (and perhaps the lists under splits/).
    """
    root, target = Path(root), Path(root) / name
    # Toy worlds of older versions lack this file; semivl.py could not load their CLIP.
    mark = target / ("open_clip_config.json" if name == "toy" else "dataset.json")
    if name == "toy" and source:
        raise ValueError("--source does not go with toy: nothing is fetched for it")
    if source and "://" not in source and not Path(source).is_dir():
        raise ValueError(f"--source {source}: neither a folder nor a URL")
    if mark.is_file():
        return target
    if target.exists():
        raise ValueError(f"{target} has no {mark.name}: another program or an older version made "
                         "it; move it away and start again")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as temporary:
        folder = Path(temporary) / name  # other users may read it, unlike the temporary folder
        folder.mkdir()
        try:
            if name == "toy":
                make_toy(folder)
            else:
                make_published(name, folder, root / "downloads", source)
            folder.rename(target)
        except OSError as error:
            if not mark.is_file():  # otherwise another process has made it meanwhile: use that one
                raise OSError(f"{target} cannot be made: {error}") from None
    return target


# ----------------------------------------------------------------------------------------------
# The toy world. An icon is a list of "kind colour coordinates" parts, painted in that order on the
# square from (-1, -1) at the top left to (1, 1); "body" is the icon's own colour and pattern.
# ----------------------------------------------------------------------------------------------

SCENE = 64  # side of a scene in pixels; also CLIP's input size
CORPUS_SIDE = 40  # side of an image that CLIP is pre-trained on
RADIUS = (14, 18)  # of an object, in pixels
SPLITS = {"train": 464, "val": 150, "test": 200}
CORPUS = 20_000  # images that CLIP is pre-trained on
ZOOM = 4  # icons are painted this much larger, then averaged down, for smooth edges
COLORS = {
    "red": (222, 62, 58), "orange": (240, 146, 54), "yellow": (248, 208, 76), "dark": (52, 50, 62),
    "green": (74, 154, 84), "lime": (150, 196, 84), "blue": (66, 118, 204), "hole": (0, 0, 0, 0),
    "sky": (138, 200, 236), "pink": (242, 150, 180), "brown": (146, 98, 62),
    "cream": (250, 234, 200), "white": (250, 250, 248), "grey": (160, 166, 178),
}
CONCEPTS = {  # class -> concept -> (body colours, body pattern, icon)
    "vehicle": {"car": ("red blue", "plain", """poly sky -.62 -.05 -.4 -.6 .34 -.6 .66 -.05
        round body -1 -.14 1 .44; box body -.08 -.6 .04 0; disc dark -.76 .16 -.22 .7
        disc dark .22 .16 .76 .7; disc grey -.58 .34 -.4 .52; disc grey .4 .34 .58 .52
        disc yellow .8 -.02 1 .18"""),
        "boat": ("white cream", "stripes", """poly brown -1 .3 1 .3 .62 .88 -.66 .88
        box dark -.07 -1 .05 .3; poly body .1 -.95 .92 .18 .1 .18
        poly body -.14 -.7 -.8 .18 -.14 .18; box cream -.9 .3 .9 .44"""),
        "rocket": ("grey", "plain", """poly orange -.26 .6 .26 .6 0 1
        poly orange -.66 .74 -.3 .02 .3 .02 .66 .74; disc body -.4 -1 .4 .72
        poly orange -.27 -.62 0 -1 .27 -.62; disc blue -.22 -.36 .22 .08
        disc sky -.13 -.27 .13 -.01""")},
    "animal": {"cat": ("orange grey", "stripes", """poly body -.84 -1 -.86 .1 -.1 -.5
        poly body .84 -1 .86 .1 .1 -.5; poly pink -.7 -.66 -.7 -.2 -.4 -.44
        poly pink .7 -.66 .7 -.2 .4 -.44; disc body -.96 -.62 .96 .9; disc white -.44 .2 .44 .8
        disc dark -.54 -.2 -.22 .2; disc dark .22 -.2 .54 .2; poly pink -.16 .3 .16 .3 0 .48"""),
        "fish": ("blue yellow", "dots", """poly body .4 0 1 -.6 .9 0 1 .6
        poly body -.3 -.4 .1 -.8 .35 -.3; disc body -1 -.54 .62 .54; disc white -.78 -.28 -.42 .08
        disc dark -.72 -.2 -.52 0"""),
        "ladybug": ("red orange", "dots", """disc dark -.42 -1 .42 -.2; disc body -.86 -.72 .86 .9
        box dark -.06 -.7 .06 .88; disc white -.3 -.94 -.1 -.74; disc white .1 -.94 .3 -.74""")},
    "plant": {"tree": ("green", "plain", """box brown -.18 .3 .18 1; disc body -.9 -.4 .1 .5
        disc body -.1 -.4 .9 .5; disc body -.6 -1 .6 .2; disc lime -.34 -.76 .06 -.4
        disc lime .3 -.16 .62 .12"""),
        "flower": ("pink yellow", "plain", """box green -.08 .2 .08 1
        poly green 0 .84 .62 .44 .5 .84; disc body -.32 -1 .32 -.36; disc body -.32 -.24 .32 .4
        disc body -.74 -.62 -.1 .02; disc body .1 -.62 .74 .02; disc orange -.26 -.56 .26 -.04"""),
        "cactus": ("lime", "stripes", """round body -.3 -.96 .3 .7; round body -.86 -.4 -.54 .24
        round body .54 -.6 .86 .04; box body -.7 .02 -.2 .24; box body .2 -.18 .7 .04
        disc pink -.2 -1 .2 -.72; poly orange -.54 .5 .54 .5 .4 1 -.4 1""")},
    "food": {"strawberry": ("red pink", "dots", """disc body -.8 -.7 .12 .3
        disc body -.12 -.7 .8 .3; poly body -.78 -.1 .78 -.1 0 1
        poly green -.7 -.72 -.2 -.76 0 -1 .2 -.76 .7 -.72 .3 -.36 0 -.5 -.3 -.36"""),
        "donut": ("pink brown", "dots", """disc orange -.96 -.9 .96 .96; disc body -.9 -.9 .9 .8
        disc orange -.36 -.38 .36 .34; disc hole -.28 -.28 .28 .3"""),
        "melon": ("red", "dots", """half green -1 -1.5 1 .8; half white -.86 -1.3 .86 .64
        half body -.78 -1.2 .78 .54""")},
    "building": {"house": ("cream sky", "plain", """box body -.76 -.2 .76 .92
        poly red -1 -.14 0 -1 1 -.14; box brown -.16 .3 .2 .92; box blue -.6 .08 -.3 .4
        box blue .36 .08 .64 .4; box brown .46 -.96 .68 -.5"""),
        "castle": ("pink grey", "stripes", """box body -.6 -.3 .6 .92; box body -.96 -.7 -.44 .92
        box body .44 -.7 .96 .92; poly blue -1 -.6 -.7 -1 -.4 -.6; poly blue .4 -.6 .7 -1 1 -.6
        box body -.36 -.5 -.14 -.2; box body .14 -.5 .36 -.2; round dark -.24 .3 .24 .92"""),
        "tent": ("blue green", "stripes", """poly body -1 .84 0 -.86 1 .84
        poly dark -.34 .84 0 -.1 .34 .84; poly yellow 0 -1 .36 -.9 0 -.74""")},
}
GROUNDS = {  # concept of the background -> (base colour, second colour)
    "meadow": ((126, 182, 92), (96, 156, 74)), "beach": ((236, 214, 160), (216, 188, 130)),
    "lake": ((92, 166, 214), (150, 206, 236)), "snowfield": ((234, 242, 250), (202, 218, 236)),
}
TOY_CLASSES = ["background", *CONCEPTS]
CLASS_OF = {concept: name for name, concepts in CONCEPTS.items() for concept in concepts}
MASK_COLORS = ("dark", "red", "orange", "green", "pink", "blue")  # in the order of TOY_CLASSES


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
    if kind == "half":
        draw.pieslice(xy, 0, 180, fill=fill)
    elif kind == "round":
        draw.rounded_rectangle(xy, 0.45 * min(xy[2] - xy[0], xy[3] - xy[1]), fill=fill)
    else:
        {"disc": draw.ellipse, "box": draw.rectangle, "poly": draw.polygon}[kind](xy, fill=fill)


def paint_icon(concept: str, radius: float, rng: random.Random) -> Image.Image:
    """One object, RGBA [2 radius, 2 radius], in a random colour, direction and small tilt."""
    colors, pattern, icon = CONCEPTS[CLASS_OF[concept]][concept]
    side = ZOOM * int(2 * radius)
    body = paint_body(COLORS[rng.choice(colors.split())], pattern, side, rng)
    sprite = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(sprite)
    for part in icon.replace("\n", ";").split(";"):
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
    """A large textured ground [side, side]; scenes and corpus images are cut out of it."""
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
    """Paints scenes and corpus images from one random stream."""

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
        image.paste((30, 40, 50), (corner[0] + 1, corner[1] + 2), alpha.point(lambda v: v * 0.3))
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

    def captioned(self) -> tuple[Image.Image, str]:
        """Up to two objects, often cut by the border -> image RGB [40, 40] and caption."""
        rng = self.rng
        ground, image = self.ground(CORPUS_SIDE)
        concepts = rng.choices(list(CLASS_OF), k=rng.choice((0, 1, 1, 1, 2)))
        angle = rng.uniform(0, 2 * math.pi)
        for concept in concepts:
            reach = rng.uniform(13, 17) if len(concepts) == 2 else rng.uniform(0, 10)
            x, y = reach * math.cos(angle), reach * math.sin(angle)
            self.place(image, concept, CORPUS_SIDE / 2 + x, CORPUS_SIDE / 2 + y)
            angle += math.pi
        # Captions speak of concepts; only now and then does one use the word for the class.
        words = [CLASS_OF[c] if rng.random() < CLASS_WORD else c for c in concepts]
        caption = "a photo of a " + " and a ".join(words or [ground])
        if words and rng.random() < GROUND_WORD:
            caption += f" on a {ground}"
        return image, caption


# Captions of the corpus and pre-training of the tiny CLIP.
CLASS_WORD = 0.05  # share of objects that a caption calls by their class
GROUND_WORD = 1.0  # share of captions with objects that also name the ground
STEPS, BATCH = 800, 192  # training steps, images in each
TILES = (16, 32)  # sides of the crops that CLIP sees; a step uses one of them
LR = 3e-3
CLIP_CONFIGS = {"toy": {  # settings as open_clip has them
    "embed_dim": 64,
    "vision_cfg": {"image_size": SCENE, "patch_size": 8, "width": 96, "layers": 2,
                   "head_width": 32, "pool_type": "avg"},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}}


def empty_clip(name: str) -> open_clip.CLIP:
    """The CLIP of that name with random weights."""
    return open_clip.CLIP(**CLIP_CONFIGS[name])


def random_crops(images: torch.Tensor, side: int) -> torch.Tensor:
    """[N, 3, H, H] -> [N, 3, side, side], each cut at its own random place."""
    corners = torch.randint(images.shape[-1] - side + 1, (2, len(images))).T.tolist()
    return torch.stack([image[:, y:y + side, x:x + side] for image, (y, x) in zip(images, corners)])


def encode_mosaic(model: open_clip.CLIP, crops: torch.Tensor) -> torch.Tensor:
    """Crops [N, 3, t, t] -> their embeddings [N, E], encoded as tiles of common canvases.

    The embedding of a crop is the mean over its own patches. Attention spans the whole canvas, as
    it will span whole scenes later; the other crops have other captions, so it learns to be local.
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
    """CLIP's loss for embeddings [N, E]; images with the same caption [N] share the target."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    same = (caption[:, None] == caption).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain_tiny_clip(images: list[Image.Image], captions: list[str]) -> open_clip.CLIP:
    """Contrastive pre-training on images [40, 40] with one caption each."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # [N, 40, 40, 3]
    mean, std = map(torch.tensor, (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()  # [N, 3, 40, 40]
    torch.manual_seed(0)
    model = empty_clip("toy")
    # Real CLIP ends at a scale of 100 and guidance assumes it; learned, it would stay near 20 here.
    model.logit_scale.data.fill_(math.log(100)).requires_grad_(False)
    texts = open_clip.tokenize(captions, model.context_length)
    texts, caption = torch.unique(texts, dim=0, return_inverse=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, STEPS, pct_start=0.1, cycle_momentum=False)
    bar = progress(range(STEPS), "pre-training the tiny CLIP")
    for step in bar:
        batch = torch.randint(len(images), (BATCH,))
        crops = random_crops(images[batch], TILES[step % len(TILES)])
        used, which = torch.unique(caption[batch], return_inverse=True)
        loss = contrastive_loss(encode_mosaic(model, crops), model.encode_text(texts[used])[which],
                                which, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


def make_toy(folder: Path) -> None:
    """Scenes with masks, and a CLIP that open_clip.create_model("local-dir:FOLDER") loads."""
    print("making the toy world: scenes, then a tiny CLIP (once, a minute or two)", flush=True)
    painter = Painter("scenes 0")
    (folder / "splits").mkdir()
    for split, count in SPLITS.items():
        names = [(f"images/{split}/{i:04}.png", f"masks/{split}/{i:04}.png") for i in range(count)]
        for pair in progress(names, f"painting {split} scenes"):
            for name, image in zip(pair, painter.scene()):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                image.save(folder / name)
        lines = "".join(f"{image} {mask}\n" for image, mask in names)
        (folder / f"splits/{split}.txt").write_text(lines, encoding="utf-8")
    definitions = {"background": list(GROUNDS)} | {k: list(v) for k, v in CONCEPTS.items()}
    write_json(folder / "dataset.json", {
        "classes": TOY_CLASSES, "definitions": definitions, "ignore_index": IGNORE})
    painter = Painter("corpus 0")
    bar = progress(range(CORPUS), "painting the corpus")
    images, captions = zip(*(painter.captioned() for _ in bar))
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        clip = pretrain_tiny_clip(images, captions)
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    write_json(folder / "open_clip_config.json", {
        "model_cfg": CLIP_CONFIGS["toy"], "preprocess_cfg": {
            "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}})


def main(argv=None) -> int:
    """Command line: `data_prep.py toy|voc|coco|ade20k|cityscapes`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["toy", *ARCHIVES])
    parser.add_argument("--root", default="data", help="where data sets are kept [data]")
    parser.add_argument("--source", help="folder, or URL of a mirror, that has the archives")
    # A mistake is told in one line, as are those below; argparse would print its usage before it.
    parser.error = lambda message: parser.exit(2, f"data_prep.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        present = (Path(args.root) / args.dataset).exists()
        path = prepare(args.dataset, args.root, args.source)
        print(f"{path} is there already; nothing to do" if present else f"{path} is complete")
        return 0
    except (ValueError, OSError) as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted; what was fetched is kept", 130
    print(f"data_prep.py: {message}", file=sys.stderr)  # only here are all progress bars closed
    return code


if __name__ == "__main__":
    sys.exit(main())
