"""Makes data folders for semivl.py: the toy world, the four published data sets, your own pictures.

    python data_prep.py toy                          paints the toy world, trains its tiny CLIP
    python data_prep.py voc                          fetches, unpacks, checks; also coco, ade20k
    python data_prep.py cityscapes --source FOLDER   from the two archives that its login gives
    python data_prep.py FOLDER --images DIR --masks DIR --classes a,b,c    of your own pictures

Sets are made in data/, or in --root. A data folder looks like this:

    FOLDER/dataset.json            {"classes": [...], "ignore_index": 255}, perhaps "colors"
    FOLDER/splits/train.txt        "IMAGE MASK" or "IMAGE" a line, paths relative to FOLDER
    FOLDER/splits/val.txt          "IMAGE MASK" a line; so is test.txt, which only the toy has
    FOLDER/splits/N/labeled.txt    the published list of N labelled images

A mask is a PNG whose pixel values are class numbers (palette or greyscale), unless "colors" tells
each class's value or [r, g, b]. A folder .NAME-... is being made, or a killed process has left it.

Your own pictures stay where they are: a.jpg goes with a.png or a_mask.png, also if one DIR holds
both; images without mask train unlabelled, those in folders called val or valid validate.
--classes names the mask values 0, 1, 2 ...; instead, --labelmap FILE takes labelmap.txt of CVAT,
_classes.csv of Roboflow or a name a line, as labelme has it. For an export of these programs,
--images EXPORT is enough. What is called void, ignore or unlabeled is no class: its pixels have
no label.
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
import unicodedata
import zipfile
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# torch, torchvision and open_clip take seconds to import, and a folder of your own pictures needs
# none of them. So they are imported in the functions that use them.

IGNORE = 255  # mask value of pixels that belong to no class


class UserError(ValueError):
    """A mistake in arguments or files. `main` prints it as one line and no traceback."""


def require(ok, *problems: str) -> None:
    if not ok:
        more = (f"... and {len(problems) - 20} more",) * (len(problems) > 20)
        raise UserError("\n".join(problems[:20] + more))


def progress(iterable, title: str, **more) -> tqdm:
    """A progress bar; where there is no terminal, a line twice a minute."""
    lines = (
        {}
        if sys.stderr and sys.stderr.isatty()
        else dict(
            miniters=1, mininterval=30, delay=30, bar_format="{desc}: {n_fmt} of {total_fmt}\n"
        )
    )
    return tqdm(iterable, title, **lines, **more)


# The published data sets --------------------------------------------------------------------------

CLASSES = {  # data set -> class names in the order of mask values, spelled as published
    "voc": (
        "background|aeroplane|bicycle|bird|boat|bottle|bus|car|cat|chair|cow|diningtable|dog|"
        "horse|motorbike|person|pottedplant|sheep|sofa|train|tvmonitor"
    ).split("|"),
    "ade20k": (
        "wall|building|sky|floor|tree|ceiling|road|bed|windowpane|grass|cabinet|sidewalk|"
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
        "flag"
    ).split("|"),
}


def cityscapes_trained() -> list:
    """Of the 34 classes in the files of Cityscapes, the 19 that are trained, in their order."""
    from torchvision.datasets import Cityscapes

    trained = [c for c in Cityscapes.classes if 0 <= c.train_id < IGNORE]
    return sorted(trained, key=lambda c: c.train_id)


def class_names(name: str) -> list[str]:
    """The classes of a published set, in the order of mask values, spelled as published."""
    if name == "cityscapes":
        return [c.name for c in cityscapes_trained()]
    if name == "coco":
        from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

        things = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
        return ["background"] + [thing for thing in things if thing != "N/A"]
    return CLASSES[name]


# size: GB, about. md5: if it is known. hosts: what stands before the name in URLs.
Archive = namedtuple("Archive", "name size md5 hosts")
VOC_HOSTS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/",
    "https://d2l-data.s3-accelerate.amazonaws.com/",
)
COCO_HOSTS = (
    "http://images.cocodataset.org/zips/",
    "https://s3.amazonaws.com/images.cocodataset.org/zips/",
)
COCO_MASKS_HOSTS = ("https://github.com/google-research/semivl/releases/download/checkpoints/",)
ADE20K_HOSTS = ("http://data.csail.mit.edu/places/ADEchallenge/",)
ARCHIVES = {
    "voc": [
        Archive("VOCtrainval_11-May-2012.tar", 2.0, "6cd6e144f989b92b3379bac3b3de84fd", VOC_HOSTS)
    ],
    "coco": [
        Archive("train2017.zip", 19.3, "cced6f7f71b7629ddf16f17bbcfab6b2", COCO_HOSTS),
        Archive("val2017.zip", 0.8, "442b8da7639aecaf257c1dceb8ba8c80", COCO_HOSTS),
        Archive("ground_truth_coco.zip", 0.5, None, COCO_MASKS_HOSTS),
    ],
    "ade20k": [
        Archive("ADEChallengeData2016.zip", 1.0, "7328b3957e407ddae1d3cbf487f149ef", ADE20K_HOSTS)
    ],
    "cityscapes": [  # both need a login, so they are taken from --source only
        Archive("leftImg8bit_trainvaltest.zip", 11.6, None, ()),
        Archive("gtFine_trainvaltest.zip", 0.25, None, ()),
    ],
}
TAKEN = {  # pattern of a path in the archives -> path in the data folder; the rest is left out
    "voc": {r"VOCdevkit/VOC2012/((JPEGImages/[^/]+\.jpg)|(SegmentationClass/[^/]+\.png))": r"\1"},
    "coco": {r"((train|val)2017/\d{12}\.jpg)": r"\1", r"(.*/)?(\d{12}\.png)": r"masks/\2"},
    "ade20k": {
        r"ADEChallengeData2016/((images|annotations)/(training|validation)/"
        r"ADE_\w+\.(jpg|png))": r"\1"
    },
    "cityscapes": {
        r"(leftImg8bit|gtFine)/(train|val)/\w+/\w+_(leftImg8bit|gtFine_labelIds)\.png": r"\g<0>"
    },
}
COUNTS = {  # training images, validation images
    "voc": (10_582, 1_449),
    "coco": (118_287, 5_000),
    "ade20k": (20_210, 2_000),
    "cityscapes": (2_975, 500),
}

COMMIT = "13ee65d6f27e197e0b55d987b346fc880fc811ca"  # of the authors' lists: they cannot change
LIST_HOSTS = (
    f"https://raw.githubusercontent.com/google-research/semivl/{COMMIT}/",
    f"https://cdn.jsdelivr.net/gh/google-research/semivl@{COMMIT}/",
)
LISTS = {  # file below our splits/ -> file below theirs, or None: made by ade20k_list()
    "voc": {f"{n}/labeled.txt": f"pascal/{n}/labeled.txt" for n in (92, 183, 366, 732, 1464)}
    | {"val.txt": "pascal/val.txt", "train.txt": "pascal/train_aug.txt"},
    "coco": {
        f"{n}/labeled.txt": f"coco/1_{part}/labeled.txt"
        for n, part in ((232, 512), (463, 256), (925, 128), (1849, 64), (3697, 32))
    }
    | {"val.txt": "coco/val.txt"},
    "ade20k": {f"{n}/labeled.txt": None for n in (158, 316, 632, 1263, 2526)} | {"val.txt": None},
    "cityscapes": {
        f"{n}/labeled.txt": f"cityscapes/1_{part}/labeled.txt"
        for n, part in ((100, 30), (186, 16), (372, 8), (744, 4), (1488, 2))
    }
    | {"val.txt": "cityscapes/val.txt"},
}


def fetch(archive: Archive, downloads: Path) -> Path:
    """The file in `downloads`, from the first URL that serves it with the right MD5."""
    from torch.hub import download_url_to_file
    from torchvision.datasets.utils import check_integrity

    file, failed = downloads / archive.name.replace("/", "-"), []
    for url in [host + archive.name for host in archive.hosts]:
        try:
            if not file.exists():  # else an interrupted process has fetched it already
                download_url_to_file(url, str(file))
            if check_integrity(file, archive.md5):
                return file
            file.unlink()
            raise OSError("the MD5 is wrong")
        except (OSError, ValueError, http.client.HTTPException) as error:
            failed.append(f"{url}: {getattr(error, 'reason', error)}")
    raise OSError(
        f"{archive.name} cannot be fetched ({'; '.join(failed)}); start again, or put it "
        "into a FOLDER under this name and run python data_prep.py NAME --source FOLDER"
    )


def unpack(archive: Path, taken: dict[str, str], folder: Path) -> None:
    """The regular files of a tar or zip whose path matches a pattern of `taken`, and no others."""

    def place(name: str) -> str | None:
        return next(
            (match.expand(new) for old, new in taken.items() if (match := re.fullmatch(old, name))),
            None,
        )

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
        raise UserError(
            f"{archive}: damaged ({str(error).splitlines()[0]}); remove it and start again"
        ) from None


def read_mask(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.array(image)
    except MemoryError:  # the file is not to blame
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise UserError(f"{file.name}: not an image that can be read ({error})") from None


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
    """Masks of ADE20K: 0 ("other") becomes IGNORE, 1 to 150 become 0 to 149. Some copies
    in circulation are converted already: they hold 255 and never 150. A second shift would turn
    every class into its neighbour, so they stay as they are."""
    files = sorted(folder.glob("annotations/*/*.png"))
    largest = (read_mask(file).max() for file in progress(files, "raw or converted"))
    found = next((value for value in largest if value in (150, IGNORE)), None)
    require(found, "ADE20K: the masks hold neither 150 (raw) nor 255 (converted)")
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
        names = names[: int(Path(file).parent.name)]
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
        for c in cityscapes_trained():
            table[c.id] = c.train_id
        change_masks(sorted(folder.glob("gtFine/*/*/*_labelIds.png")), table)
    if name == "voc":  # most of these masks are not in the archive; unlabelled images need none
        images = [line.split()[0] for line in train.read_text(encoding="utf-8").splitlines()]
    else:
        pattern = {
            "coco": "train2017/*.jpg",
            "ade20k": "images/training/*.jpg",
            "cityscapes": "leftImg8bit/train/*/*.png",
        }[name]
        images = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
    train.write_text("\n".join(images), encoding="utf-8")
    write_json(folder / "dataset.json", {"classes": class_names(name), "ignore_index": IGNORE})

    counts, missing = dict(zip(("train.txt", "val.txt"), COUNTS[name])), set()
    for file in ("train.txt", *LISTS[name]):
        lines = (folder / "splits" / file).read_text(encoding="utf-8").splitlines()
        count = counts.get(file) or int(Path(file).parent.name)
        require(
            len(lines) == count,
            f"{name}: splits/{file} has {len(lines)} images instead of "
            f"{count}; the archives or the lists are of another version",
        )
        missing |= {path for path in " ".join(lines).split() if not (folder / path).is_file()}
    require(
        not missing,
        f"{name}: {len(missing)} listed files are not in the archives: "
        + ", ".join(sorted(missing)[:3])
        + ", ..." * (len(missing) > 3),
    )


def make_published(name: str, folder: Path, downloads: Path, source: str | None) -> None:
    """Fills `folder` from the archives and lists in `source`, or fetched to `downloads`."""
    published = [path for path in LISTS[name].values() if path]
    lists = [Archive(f"splits/{path}", 0, None, LIST_HOSTS) for path in published]
    wanted = lists + ARCHIVES[name]
    if source and "://" in source:
        mirror = source.rstrip("/") + "/"
        wanted = [a._replace(hosts=(mirror, *a.hosts)) for a in wanted]
    files = {a.name: file for a in wanted if source and (file := Path(source) / a.name).is_file()}
    missing = [a for a in wanted if a.name not in files]
    login = [a.name for a in missing if not a.hosts]
    require(
        not login,
        f"{name}: {' and '.join(login)} cannot be fetched without a login; get the "
        "archives from https://www.cityscapes-dataset.com, then run python data_prep.py "
        "cityscapes --source FOLDER_OF_BOTH",
    )
    print(f"making {downloads.parent / name}; fetched files stay in {downloads} until the end:")
    for a in ARCHIVES[name]:
        print(f"  {a.size:5.1f} GB  {files.get(a.name) or a.hosts[0] + a.name}", flush=True)
    need = sum(a.size for a in missing + ARCHIVES[name])  # to fetch, and to unpack
    need -= sum(f.stat().st_size for a in missing for f in downloads.glob(f"{a.name}*")) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if free < need:
        raise OSError(
            f"{name} needs about {need:.1f} GB, but {free:.1f} GB are free in "
            f"{downloads.parent}; choose another disk by --root"
        )

    downloads.mkdir(exist_ok=True)
    fetched = {a.name: fetch(a, downloads) for a in missing}
    files |= fetched
    for new, path in LISTS[name].items():
        file = folder / "splits" / new
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            text = files[f"splits/{path}"].read_text("utf-8") if path else ade20k_list(new)
        except UnicodeDecodeError:
            raise UserError(f"{files[f'splits/{path}']}: no text in UTF-8") from None
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
    source: folder, or URL of a mirror, with the archives (and perhaps the lists under splits/)."""
    root, target = Path(root), Path(root) / name
    # Toy worlds of older versions lack this file; semivl.py could not load their CLIP.
    mark = target / ("open_clip_config.json" if name == "toy" else "dataset.json")
    require(name != "toy" or not source, "--source does not go with toy: nothing is fetched for it")
    require(
        not source or "://" in source or Path(source).is_dir(),
        f"--source {source}: neither a folder nor a URL",
    )
    if mark.is_file():
        return target
    require(
        not target.exists(),
        f"{target} has no {mark.name}: another program or an older "
        "version made it; move it away and start again",
    )
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


# The toy world ------------------------------------------------------------------------------------
# A scene shows things, each of which is a class, on one of four grounds, and clutter. Ground and
# clutter are the background. CLIP's corpus has captions like "a photo of a cat and a rock on a
# beach", which never say "background": so only a definition tells CLIP what the background is.
# An icon is a list of "kind colour coordinates" parts, painted in that order on the square from
# (-1, -1) at the top left to (1, 1); "body" is the icon's own colour and pattern.

SCENE = 96  # side of a scene in pixels; also CLIP's input size
CORPUS_SIDE = 60  # side of an image that CLIP is pre-trained on
RADIUS = (19, 28)  # of an object, in pixels
SPLITS = {"train": 600, "val": 100, "test": 200}
CORPUS = 16_000  # images that CLIP is pre-trained on
ZOOM = 3  # icons are painted this much larger, then averaged down, for smooth edges
COLORS = {
    "red": (222, 62, 58),
    "orange": (240, 146, 54),
    "yellow": (248, 208, 76),
    "dark": (52, 50, 62),
    "green": (74, 154, 84),
    "lime": (150, 196, 84),
    "blue": (66, 118, 204),
    "hole": (0, 0, 0, 0),
    "sky": (138, 200, 236),
    "pink": (242, 150, 180),
    "brown": (146, 98, 62),
    "cream": (250, 234, 200),
    "white": (250, 250, 248),
    "grey": (160, 166, 178),
}
THINGS = {  # class -> colours and pattern of its body; then its icon
    "car": """red blue, plain
poly sky -.62 -.05 -.4 -.6 .34 -.6 .66 -.05
round body -1 -.14 1 .44; box body -.08 -.6 .04 0; disc dark -.76 .16 -.22 .7
disc dark .22 .16 .76 .7; disc grey -.58 .34 -.4 .52; disc grey .4 .34 .58 .52
disc yellow .8 -.02 1 .18""",
    "boat": """white cream, stripes
poly brown -1 .3 1 .3 .62 .88 -.66 .88
box dark -.07 -1 .05 .3; poly body .1 -.95 .92 .18 .1 .18
poly body -.14 -.7 -.8 .18 -.14 .18; box cream -.9 .3 .9 .44""",
    "rocket": """white, plain
poly orange -.26 .6 .26 .6 0 1
poly orange -.66 .74 -.3 .02 .3 .02 .66 .74; disc body -.4 -1 .4 .72
poly orange -.27 -.62 0 -1 .27 -.62; disc blue -.22 -.36 .22 .08
disc sky -.13 -.27 .13 -.01""",
    "cat": """orange brown, stripes
poly body -.84 -1 -.86 .1 -.1 -.5
poly body .84 -1 .86 .1 .1 -.5; poly pink -.7 -.66 -.7 -.2 -.4 -.44
poly pink .7 -.66 .7 -.2 .4 -.44; disc body -.96 -.62 .96 .9; disc white -.44 .2 .44 .8
disc dark -.54 -.2 -.22 .2; disc dark .22 -.2 .54 .2; poly pink -.16 .3 .16 .3 0 .48""",
    "fish": """blue yellow, dots
poly body .4 0 1 -.6 .9 0 1 .6
poly body -.3 -.4 .1 -.8 .35 -.3; disc body -1 -.54 .62 .54; disc white -.78 -.28 -.42 .08
disc dark -.72 -.2 -.52 0""",
    "ladybug": """red orange, dots
disc dark -.42 -1 .42 -.2; disc body -.86 -.72 .86 .9
box dark -.06 -.7 .06 .88; disc white -.3 -.94 -.1 -.74; disc white .1 -.94 .3 -.74""",
    "flower": """pink yellow, plain
box green -.08 .2 .08 1
poly green 0 .84 .62 .44 .5 .84; disc body -.32 -1 .32 -.36; disc body -.32 -.24 .32 .4
disc body -.74 -.62 -.1 .02; disc body .1 -.62 .74 .02; disc orange -.26 -.56 .26 -.04""",
    "cactus": """lime, stripes
round body -.3 -.96 .3 .7; round body -.86 -.4 -.54 .24
round body .54 -.6 .86 .04; box body -.7 .02 -.2 .24; box body .2 -.18 .7 .04
disc pink -.2 -1 .2 -.72; poly orange -.54 .5 .54 .5 .4 1 -.4 1""",
    "donut": """pink brown, dots
disc orange -.96 -.9 .96 .96; disc body -.9 -.9 .9 .8
disc orange -.36 -.38 .36 .34; disc hole -.28 -.28 .28 .3""",
    "castle": """pink cream, stripes
box body -.6 -.3 .6 .92; box body -.96 -.7 -.44 .92
box body .44 -.7 .96 .92; poly blue -1 -.6 -.7 -1 -.4 -.6; poly blue .4 -.6 .7 -1 1 -.6
box body -.36 -.5 -.14 -.2; box body .14 -.5 .36 -.2; round dark -.24 .3 .24 .92""",
}
CLUTTER = {  # the same, of what belongs to the background
    "tree": """green, plain
box brown -.18 .3 .18 1; disc body -.9 -.4 .1 .5
disc body -.1 -.4 .9 .5; disc body -.6 -1 .6 .2; disc lime -.34 -.76 .06 -.4
disc lime .3 -.16 .62 .12""",
    "rock": """grey, dots
poly body -1 .7 -.8 -.2 -.3 -.7 .3 -.6 .9 .1 1 .7
poly white -.6 -.1 -.3 -.5 .1 -.4 -.2 -.2""",
    "mushroom": """brown, plain
round cream -.25 -.1 .25 .9; dome body -.9 -.8 .9 .9""",
}
GROUNDS = {  # ground -> (base colour, second colour)
    "meadow": ((126, 182, 92), (96, 156, 74)),
    "beach": ((236, 214, 160), (216, 188, 130)),
    "lake": ((92, 166, 214), (150, 206, 236)),
    "snowfield": ((234, 242, 250), (202, 218, 236)),
}
TOY_CLASSES = ["background", *THINGS]
TOY_DEFINITIONS = {"background": [*GROUNDS, *CLUTTER]}
MASK_COLORS = "dark red orange yellow green lime blue sky pink brown cream".split()


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
    if kind == "dome":
        draw.pieslice(xy, 180, 360, fill=fill)
    elif kind == "round":
        draw.rounded_rectangle(xy, 0.45 * min(xy[2] - xy[0], xy[3] - xy[1]), fill=fill)
    else:
        {"disc": draw.ellipse, "box": draw.rectangle, "poly": draw.polygon}[kind](xy, fill=fill)


def paint_icon(name: str, radius: float, rng: random.Random) -> Image.Image:
    """One object, RGBA [2 radius, 2 radius], in a random colour, direction and small tilt."""
    head, icon = (THINGS | CLUTTER)[name].split("\n", 1)
    colors, pattern = head.split(", ")
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


def paint_ground(name: str, rng: random.Random, side: int = 512) -> Image.Image:
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
        for y in range(0, side, 18):
            wave = [(x, y + 4 * math.sin(x / 14 + y)) for x in range(0, side, 2)]
            draw.line(wave, fill=second, width=2)
    for _ in range(side * side // (700 if name == "lake" else 260)):
        x, y, ink = rng.randrange(side), rng.randrange(side), rng.choice((dark, light))
        if name == "meadow":
            draw.line((x, y, x + rng.choice((-2, 2)), y - 6), fill=ink, width=2)
        elif name == "lake":
            draw.arc((x - 8, y - 4, x + 8, y + 6), 200, 340, fill=light, width=2)
        else:
            draw.circle((x, y), 1.2, fill=ink)
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

    def place(self, image: Image.Image, name: str, x: float, y: float) -> tuple:
        """Paints an object with a soft shadow at (x, y) -> its exact outline and corner."""
        sprite = paint_icon(name, self.rng.uniform(*RADIUS), self.rng)
        corner = (round(x - sprite.width / 2), round(y - sprite.height / 2))
        alpha = sprite.getchannel("A")
        image.paste((30, 40, 50), (corner[0] + 2, corner[1] + 4), alpha.point(lambda v: v * 0.3))
        image.paste(sprite, corner, alpha)
        return alpha.point(lambda v: 255 * (v > 127)), corner

    def scene(self) -> tuple[Image.Image, Image.Image]:
        """One to three things, and clutter, one per quarter -> image RGB and mask P [96, 96]."""
        rng = self.rng
        _, image = self.ground(SCENE)
        mask = Image.new("P", (SCENE, SCENE))
        mask.putpalette([value for color in MASK_COLORS for value in COLORS[color]])
        things = rng.choice((1, 2, 3, 3))
        for i, quarter in enumerate(rng.sample(range(4), 4)):
            if i >= things and rng.random() < 0.4:
                continue  # nothing in this quarter
            name = rng.choice([*(THINGS if i < things else CLUTTER)])
            x = SCENE * (0.25 + 0.5 * (quarter % 2)) + rng.uniform(-6, 6)
            y = SCENE * (0.25 + 0.5 * (quarter // 2)) + rng.uniform(-6, 6)
            outline, corner = self.place(image, name, x, y)
            mask.paste(TOY_CLASSES.index(name) if i < things else 0, corner, outline)
        return image, mask

    def captioned(self) -> tuple[Image.Image, str]:
        """Up to two objects, often cut by the border -> image RGB [60, 60] and caption."""
        rng = self.rng
        ground, image = self.ground(CORPUS_SIDE)
        names = rng.choices([*THINGS, *CLUTTER], k=rng.choice((0, 1, 1, 1, 2)))
        angle = rng.uniform(0, 2 * math.pi)
        for name in names:
            reach = rng.uniform(20, 26) if len(names) == 2 else rng.uniform(0, 15)
            x, y = reach * math.cos(angle), reach * math.sin(angle)
            self.place(image, name, CORPUS_SIDE / 2 + x, CORPUS_SIDE / 2 + y)
            angle += math.pi
        caption = "a photo of a " + " and a ".join(names or [ground])
        return image, caption + f" on a {ground}" * bool(names)


# Pre-training of the tiny CLIP
STEPS = 600
BATCHES = {24: 192, 48: 96}  # side of the crops that CLIP sees -> images in a step, in turn
LR = 3e-3
CLIP_CONFIGS = {
    "toy": {  # settings as open_clip has them
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": SCENE,
            "patch_size": 8,
            "width": 96,
            "layers": 3,
            "head_width": 32,
            "pool_type": "avg",
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 1,
        },
    }
}


def empty_clip(name: str):
    """The open_clip.CLIP of that name with random weights."""
    import open_clip

    return open_clip.CLIP(**CLIP_CONFIGS[name])


def random_crops(images, side: int):
    """[N, 3, H, H] -> [N, 3, side, side], each cut at its own random place."""
    import torch

    corners = torch.randint(images.shape[-1] - side + 1, (2, len(images))).T.tolist()
    return torch.stack(
        [image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners)]
    )


def encode_mosaic(model, crops):
    """Crops [N, 3, t, t] -> their embeddings [N, E], encoded as tiles of common canvases. The
    embedding of a crop is the mean over its own patches. Attention spans the whole canvas, as it
    will span whole scenes later; the other crops have other captions, so it learns to be local."""
    import torch.nn.functional as F

    side, per_row = crops.shape[-1], SCENE // crops.shape[-1]
    canvas = crops.reshape(-1, per_row, per_row, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    canvas = canvas.reshape(-1, 3, SCENE, SCENE)
    patches = model.visual.forward_intermediates(
        canvas, indices=1, normalize_intermediates=True, intermediates_only=True
    )["image_intermediates"][0]  # [canvases, width, grid, grid]
    tiles = F.avg_pool2d(patches, side // model.visual.patch_size[0])
    return tiles.permute(0, 2, 3, 1).flatten(0, 2) @ model.visual.proj


def contrastive_loss(images, texts, caption, scale):
    """CLIP's loss for embeddings [N, E]; images with the same caption [N] share the target."""
    import torch.nn.functional as F

    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    same = (caption[:, None] == caption).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain_tiny_clip(images: list[Image.Image], captions: list[str]):
    """Contrastive pre-training on images [60, 60] with one caption each -> open_clip.CLIP."""
    import open_clip
    import torch

    images = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    images = images.permute(0, 3, 1, 2).contiguous()  # uint8 [N, 3, 60, 60]
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    torch.manual_seed(0)
    model = empty_clip("toy")
    # Guidance assumes a scale of 100, at which real CLIP ends. Learned, it would stay near 20 here,
    # and guidance would be too sure. At 100 cosines differ less, and the decoder learns slower.
    # 50 is a compromise.
    model.logit_scale.data.fill_(math.log(50)).requires_grad_(False)
    texts = open_clip.tokenize(captions, model.context_length)
    texts, caption = torch.unique(texts, dim=0, return_inverse=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, STEPS, pct_start=0.1, cycle_momentum=False
    )
    bar = progress(range(STEPS), "pre-training the tiny CLIP")
    for step in bar:
        side, size = [*BATCHES.items()][step % len(BATCHES)]
        batch = torch.randint(len(images), (size,))
        crops = (random_crops(images[batch], side) / 255 - mean) / std
        used, which = torch.unique(caption[batch], return_inverse=True)
        loss = contrastive_loss(
            encode_mosaic(model, crops),
            model.encode_text(texts[used])[which],
            which,
            model.logit_scale.exp(),
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


def make_toy(folder: Path) -> None:
    """Scenes with masks, and a CLIP that open_clip.create_model("local-dir:FOLDER") loads."""
    import open_clip
    import torch

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
    write_json(
        folder / "dataset.json",
        {"classes": TOY_CLASSES, "definitions": TOY_DEFINITIONS, "ignore_index": IGNORE},
    )
    painter = Painter("corpus 0")
    bar = progress(range(CORPUS), "painting the corpus")
    images, captions = zip(*(painter.captioned() for _ in bar))
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        clip = pretrain_tiny_clip(images, captions)
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    write_json(
        folder / "open_clip_config.json",
        {
            "model_cfg": CLIP_CONFIGS["toy"],
            "preprocess_cfg": {
                "mean": open_clip.OPENAI_DATASET_MEAN,
                "std": open_clip.OPENAI_DATASET_STD,
            },
        },
    )


# Your own pictures --------------------------------------------------------------------------------
# A label is (class name, its number in masks, its colour in masks or None).

NO_LABEL = ("void", "ignore", "__ignore__", "unlabeled", "unlabelled")  # these are no classes


def read_labelmap(file: Path) -> list[tuple]:
    """Labels of CVAT ("NAME:R,G,B::" a line), Roboflow ("VALUE, NAME") or labelme ("NAME")."""
    labels, kinds = [], set()
    title = r"(pixel value|value|id|index|number),.*|names?|class(es)?"
    for at, line in enumerate(file.read_text("utf-8-sig", "replace").splitlines(), 1):
        # Excel writes semicolons or TABs where the commas were, and a person a blank.
        line = re.sub(r"^(\d+) +(?=[^\s,;])", r"\1,", re.sub(r"[;\t]", ",", line.strip()))
        line = re.sub(r"\s*([:,])\s*", r"\1", line)
        if not line or line[0] == "#" or (not labels and re.fullmatch(title, line.lower())):
            continue
        match = re.fullmatch(r"(?:(\d+),)?([^:,\ufffd]+)(?::(\d+,\d+,\d+)(?::.*)?)?", line)
        number, name, color = match.groups() if match else ("256", "", None)
        color = color and tuple(map(int, color.split(",")))
        kinds.add((number is None, color is None))
        require(
            len(kinds) == 1 and max(int(number or 0), *(color or [0])) < 256,
            f"{file}, line "
            f"{at}: {line!r} should be 'NAME:R,G,B::', 'VALUE, NAME' or 'NAME' (to 255, UTF-8)",
        )
        if labels or line != "__ignore__":  # as the first line, labelme does not count it
            labels.append((name, len(labels) if number is None else int(number), color))
    return labels


def find_files(folder: Path) -> list[Path]:
    """All files below a folder, also of linked folders. Left out are hidden ones, instance masks
    (SegmentationObject), and what this project wrote: runs, data folders, overlays."""
    require(folder.is_dir(), f"{folder}: there is no such folder")
    found, seen = [], set()
    for path, folders, names in os.walk(folder, followlinks=True):
        here, real = Path(path), os.path.realpath(path)
        ours = "log.jsonl" in names or ("dataset.json" in names and "splits" in folders)
        if real in seen or (here != folder and (ours or here.name == "SegmentationObject")):
            folders.clear()  # os.walk will not enter them
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [here / n for n in names if n[0] != "." and "-overlay.p" not in n]
    return sorted(found)


MASK_NAME = re.compile(r"^mask_|([_-](masks?|labels?|segmentation|l)|\.(jpe?g|png))$")
MASK_FOLDERS = set("masks mask labels annotations ann_dir segmentationclass".split())
KINDS = MASK_FOLDERS | set("images image img img_dir jpegimages".split())
LABELMAPS = ("labelmap.txt", "_classes.csv", "class_names.txt", "labels.txt")  # in exports
RULE = "a mask is called NAME.png or NAME_mask.png, with the NAME of its image"


def pair_pictures(images: Path, masks: Path) -> list[tuple]:
    """(image, mask of the same name or None), in the order of names: paths without suffix."""
    found, problems, left_out = ({}, {}), [], Counter()
    suffixes = Image.registered_extensions()
    for kind, (folder, other) in enumerate([(images, masks), (masks, images)]):
        for file in find_files(folder):
            path = file.relative_to(folder)
            *folders, name = unicodedata.normalize("NFC", path.as_posix().lower()).split("/")
            name = Path(name).stem
            is_mask = re.search("[_-]masks?$", name) or MASK_FOLDERS & {*folders}
            if folder == other and bool(is_mask) != kind:
                continue
            name = "/".join([*(part for part in folders if part not in KINDS), name])
            if folder in other.parents and other in file.parents:
                continue
            if file.suffix.lower() not in suffixes:
                left_out[file.suffix.lower() or file.name] += file.name not in LABELMAPS
                continue
            if kind and name not in found[0]:
                start, slash, last = name.rpartition("/")
                name = start + slash + MASK_NAME.sub("", last)
            if found[kind].setdefault(name, file) != file:
                problems.append(f"{found[kind][name]} and {file}: one name for two; rename one")
            if re.search("[\0-\x1f\x85\u2028\u2029\ud800-\udfff\\\\]", path.as_posix()):
                problems.append(f"{str(file)!r}: letters that lists cannot hold; rename it")
        others = ", ".join(f"{n} {suffix}" for suffix, n in (+left_out).most_common(5))
        told = f", but {others}, which are no pictures" if others else ""
        require(
            found[kind],
            f"{folder}: no {('images', 'masks')[kind]} there{told}; images are needed, and masks "
            "for some, as pictures (polygons must be drawn first), in --masks DIR or as "
            "NAME_mask.png beside NAME.jpg",
        )
        if others and not kind:
            print(f"note: left out are {others}; photographs of these kinds can be saved as JPEG")
        left_out.clear()
    require(not problems, *problems)
    lost = [str(file) for name, file in found[1].items() if name not in found[0]]
    told = f"masks have no image of their name: {', '.join(lost[:3])}" + ", ..." * (len(lost) > 3)
    some = next(iter(found[0].values()))
    require(len(lost) < len(found[1]), f"all {told}; images are {some}, ...; {RULE}")
    if lost:
        print(f"note: {len(lost)} {told}")
    return [(image, found[1].get(name)) for name, image in sorted(found[0].items())]


def count_pixels(file: Path) -> tuple[dict, dict] | str:
    """A mask's pixels by number (empty if it is drawn in RGB) and by colour, or what is wrong."""
    try:
        with Image.open(file) as image:
            kind = f"{image.format} {image.info.get('compression', '')}".strip()
            require(
                re.match("(PNG|TIFF|BMP)(?!.*(jp|webp))", kind),
                f"{kind} may change numbers; export masks as PNG",
            )
            require(
                image.mode in ("P", "L", "I", "I;16", "RGB", "RGBA")
                and not re.search("'[^IP']*;", str(image.tile)),
                f"mode {image.mode}, or not 8 bits a value, would "
                "change numbers; export masks as greyscale, palette or RGB with 8 bits",
            )
            opaque = image.mode != "RGBA" or image.getchannel("A").getextrema() == (255, 255)
            require(opaque, "some pixels are transparent; export masks without transparency")
            colors = image.convert("RGB").getcolors(4096)
            require(colors, "over 4096 colours; export masks as flat areas with hard edges")
            numbers = {}
            if image.mode in ("P", "L"):
                numbers = {value: n for value, n in enumerate(image.histogram()) if n}
            elif image.mode[0] == "I":
                numbers = Counter(np.asarray(image).ravel().tolist())
            return numbers, {color: n for n, color in colors}
    except MemoryError:  # the file is not to blame
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        return f"{file}: {error}"


def relative(file: Path, home: Path) -> str:
    """The path of a file as lists have it: relative to `home`, or absolute on another drive."""
    with contextlib.suppress(ValueError):
        return Path(os.path.relpath(file, home)).as_posix()
    return file.as_posix()


def list_line(pair: tuple, home: Path) -> str:
    """ "IMAGE MASK" or "IMAGE"; with a TAB behind the image if a name has blanks."""
    words = [relative(file, home) for file in pair if file]
    line = " ".join(words)
    return line if line.split() == words else "\t".join([*words, ""][:2])


def draw_val(masked: list[tuple], images: Path, share: float, seed: int) -> set[tuple]:
    """The pairs that validate: those in a folder called val, or else a random share. Copies of one
    picture stay together: Roboflow calls those of NAME.jpg NAME_jpg.rf.HASH.jpg."""
    in_val = set()
    for pair in masked:
        folders = {part.lower() for part in pair[0].relative_to(images).parts[:-1]}
        if folders & {"val", "valid", "validation"}:
            in_val.add(pair)
    if in_val:
        print(f"note: {len(in_val)} masked images are in folders of val; they validate")
        return in_val
    origin = {pair: re.sub(r"\.rf\.\w+$", "", str(pair[0].with_suffix(""))) for pair in masked}
    groups = [*dict.fromkeys(origin.values())]
    require(len(groups) > 1, "copies of one image only; training and validation need one each")
    count = max(1, min(len(groups) - 1, round(share * len(groups))))
    drawn = {*random.Random(seed).sample(groups, count)}
    return {pair for pair in masked if origin[pair] in drawn}


def from_pictures(folder, images, masks=None, classes=None, labelmap=None, val=0.2, seed=0) -> None:
    """Makes a data folder that points to pictures where they lie, as told on top of this file.
    classes: names of the mask values 0, 1, ...; val: share of the masked images for validation."""
    home, images, masks = (Path(path).resolve() for path in (folder, images, masks or images))
    made = (home / "splits", home / "dataset.json")
    if not (labelmap or classes):  # an export brings it with it
        places = [images, *sorted(images.glob("*/"))]
        brought = [place / name for place in places for name in LABELMAPS]
        labelmap = next(filter(Path.is_file, brought), None)
    source = labelmap or "--classes"
    require(folder and 0 < val < 1, f"--val {val}: should be between 0 and 1, and FOLDER a name")
    require(not (labelmap and classes), "either --classes or --labelmap names the classes")
    for path in made:
        require(not path.exists(), f"{path} is there already; move it, or take another FOLDER")
    labels = [(name, number, None) for number, name in enumerate(classes or ())]
    labels = read_labelmap(Path(labelmap)) if labelmap else labels
    for column in zip(*labels):
        twice = [v for v in column if v is not None and column.count(v) > 1]
        require(not twice, f"{source}: {twice[:1]} is there twice")
    void = [label[0] for label in labels if label[0].lower() in NO_LABEL]
    require(
        not (labelmap or classes)
        or all(name for name, *_ in labels)
        and len(void) < 2
        and 2 <= len(labels) - len(void) <= 255,
        f"{source}: should name 2 to 255 classes "
        f"(not ''), and at most one of {', '.join(NO_LABEL)}",
    )

    pairs = pair_pictures(images, masks)
    masked = [pair for pair in pairs if pair[1]]
    require(len(masked) > 1, f"{masks}: one mask only; training and validation need one each")
    found = [count_pixels(mask) for _, mask in progress(masked, "read masks")]
    require(not (problems := [told for told in found if isinstance(told, str)]), *problems)
    numbers = {number: name for name, number, _ in labels}
    colors = {color: name for name, _, color in labels if color}
    fits = [
        sum({*counts[i]} <= {*table, IGNORE} for counts in found)
        for i, table in enumerate((numbers, colors))
    ]
    # Colours of a labelmap decide. Only grey masks may be meant by its order instead.
    grey = all(len({*color}) == 1 for counts in found for color in counts[1])
    by_order = grey and fits[0] > fits[1]
    colored = any(not counts[0] for counts in found) or bool(colors) and not by_order
    pixels, shown = Counter(), Counter()
    for counts in found:
        pixels.update(counts[colored])
        shown.update([*counts[colored]])
    require(
        labels,
        f"masks hold {sorted(pixels)[:30]}: name 0, 1, 2 ... by --classes a,b,c, other "
        "values by --labelmap FILE with lines VALUE, NAME, colours with lines NAME:R,G,B",
    )
    names = colors if colors and colored else numbers  # value in the masks -> class
    ends = ((0, 0, 0), (255, 255, 255)) if colored else (0, 255)
    if [*names] == [0, 1] and ends[1] in pixels.keys() <= {*ends}:
        names = dict(zip(ends, names.values()))
        print("note: masks hold 0 and 255 only; read as {} and {}".format(*names.values()))
    keys = {name: value for value, name in names.items()}
    ignore = keys.pop(void[0]) if void else -1 if IGNORE in names else IGNORE
    names[ignore] = "(no label)"
    for (_, mask), counts in zip(masked, found):
        if wrong := sorted((v, n) for v, n in counts[colored].items() if v not in names):
            told = ", ".join(f"{v}: {n} pixels" for v, n in wrong[:8]) + ", ..." * (len(wrong) > 8)
            where = source if colors or not colored else "a --labelmap: a line NAME:R,G,B for each"
            problems.append(f"{mask}: no class has {told}; correct it, or name it in {where}")
    require(not problems, *problems)

    drawn = draw_val(masked, images, val, seed)
    require(len(drawn) < len(masked), "no image to train on has a mask; all are in folders of val")
    content = {"classes": [*keys], "ignore_index": ignore}
    if [*keys.values()] != [*range(len(keys))]:
        content["colors"] = keys
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".splits-", dir=home) as temporary:
        new = [Path(temporary) / path.name for path in made]
        new[0].mkdir()
        for name in ("train", "val"):
            entries = [pair for pair in pairs if (pair in drawn) == (name == "val")]
            lines = [list_line(pair, home) + "\n" for pair in entries]
            (new[0] / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
        write_json(new[1], content)
        for file, path in zip(new, made):
            file.rename(path)
    for v, name in names.items():
        print(f"{pixels[v] / pixels.total():7.2%} of pixels, {shown[v] or 'no':>5} masks: {name}")
    left, bare = len(masked) - len(drawn), len(pairs) - len(masked)
    print(f"{left} images with and {bare} without mask to train, {len(drawn)} to validate; next:")
    folder = f'"{folder}"' if " " in str(folder) else folder
    print(
        f"python semivl.py --dataset {folder} --labels {left if bare else max(1, left // 4)}"
        + " --unlabelled off" * (left == 1 and not bare)
    )


def main(argv=None) -> int:
    """Command line: `data_prep.py toy|voc|coco|ade20k|cityscapes`, or FOLDER --images DIR."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = ["toy", *ARCHIVES]
    parser.add_argument("dataset", help=f"{', '.join(sets)}; with --images a FOLDER to make")
    parser.add_argument("--root", help="where data sets are kept [data]")
    parser.add_argument("--source", help="folder, or URL of a mirror, that has the archives")
    parser.add_argument("--images", metavar="DIR", help="your own pictures, also in subfolders")
    parser.add_argument("--masks", metavar="DIR", help="their masks [NAME_mask.png in --images]")
    parser.add_argument(
        "--classes",
        metavar="a,b,c",
        help="names of the mask values 0, 1, 2 ...",
        type=lambda text: [name.strip() for name in text.split(",")],
    )
    parser.add_argument("--labelmap", metavar="FILE", help="or a file of CVAT, Roboflow, labelme")
    parser.add_argument("--val", type=float, help="share of the masks for validation [0.2]")
    # A mistake is told in one line, as are those below; argparse would print its usage before it.
    parser.error = lambda message: parser.exit(2, f"data_prep.py: {message}\n")
    args = vars(parser.parse_args(argv))
    name, root, source = map(args.pop, ("dataset", "root", "source"))
    own = {key: value for key, value in args.items() if value is not None}
    try:
        require(
            not own if name in sets else "images" in own and not root and not source,
            f"{name}: should be one of {', '.join(sets)} (with --root, --source), or a "
            "new FOLDER, with --images DIR (and --masks, --classes, --labelmap, --val)",
        )
        if own:
            from_pictures(name, **own)
        else:
            present = (Path(root or "data") / name).exists()
            path = prepare(name, root or "data", source)
            print(f"{path} is there already; nothing to do" if present else f"{path} is complete")
        return 0
    except (UserError, OSError) as error:  # all else is a bug, and keeps its traceback
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted" + "; what was fetched is kept" * (not own), 130
    print(f"data_prep.py: {message}", file=sys.stderr)  # only here are all progress bars closed
    return code


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's have not
            stream.reconfigure(errors="replace")  # for names that a console cannot print
    sys.exit(main())
