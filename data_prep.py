"""Makes data folders for semivl.py, and checks them.

    python data_prep.py toy                          paints the toy world, trains its tiny CLIP
    python data_prep.py voc                          fetches, unpacks, checks; also coco, ade20k
    python data_prep.py cityscapes --source FOLDER   from the two archives that its login gives
    python data_prep.py FOLDER --images DIR --masks DIR --classes a,b,c   from your own pictures
    python data_prep.py FOLDER --images EXPORT       of CVAT, Roboflow, labelme, a FOLDER of before
    python data_prep.py FOLDER                       checks a folder that is there

Published sets and the toy world are made in data/. A data folder looks like this:

    FOLDER/dataset.json            {"classes": ["sky", "car"], "definitions": {"car": ["auto"]}}
    FOLDER/splits/train.txt        "IMAGE MASK" or "IMAGE" a line, paths relative to FOLDER
    FOLDER/splits/val.txt          "IMAGE MASK" a line; test.txt, optional, the same
    FOLDER/splits/8/labeled.txt    optional: the images that --labels 8 uses
    FOLDER/masks/                  PNG, a pixel is the number of its class, 255: no label

Your own pictures stay where they are, and their masks are written anew into FOLDER/masks. a.jpg
goes with a.png or a_mask.png, also if one DIR holds both; images without mask train unlabelled.
Folders called val, valid or test keep these roles; else --val draws masks to validate. --classes
names the mask values 0, 1, 2 ...; for colours --labelmap FILE has a line NAME:R,G,B for each class
(it may be CVAT's, Roboflow's or labelme's). Pixels of void, ignore or unlabeled have no label.
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageOps
from tqdm import tqdm

# torch, torchvision and open_clip take seconds to import: the functions that need them do it.

IGNORE = 255  # mask value of pixels that belong to no class
SHADES = random.Random(1).randbytes(768)  # a palette, for whoever looks at the masks


class UserError(ValueError):
    """A mistake in arguments or files. `main` prints it as one line and no traceback."""


def require(ok, *problems: str) -> None:
    if not ok:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError("\n".join([*problems[:20], *more]))


@contextlib.contextmanager
def blame(file: Path):
    """Turns what a damaged file makes Pillow or json raise into one line with its name."""
    try:
        yield
    except MemoryError:  # the file is not to blame
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        raise UserError(f"{file}: {' '.join(reason.split())[:300]}") from None


def in_threads(function, items: list, title: str) -> list:
    """[function(item), ...]; the problems of all items are told at once."""

    def run(item):
        try:
            return function(item)
        except UserError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(run, items)
        results = list(tqdm(results, title, len(items), disable=None))
    problems = [str(result) for result in results if isinstance(result, UserError)]
    require(not problems, *problems)
    return results


# The published data sets --------------------------------------------------------------------------
ADE20K_CLASSES = (
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
    "bulletin board|shower|radiator|glass|clock|flag"
).split("|")

# The published definitions: class -> concepts, with | between them; misspellings as published.
DEFINITIONS = {
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


def describe(name: str) -> dict:
    """dataset.json of a published set: its classes, in the order of mask values, and concepts."""
    if name in DEFINITIONS:
        concepts = {title: text.split("|") for title, text in DEFINITIONS[name].items()}
        return {"classes": [*concepts], "definitions": concepts}
    if name == "ade20k":
        return {"classes": ADE20K_CLASSES}
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    things = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]  # without __background__
    return {"classes": ["background"] + [thing for thing in things if thing != "N/A"]}


class Archive(NamedTuple):
    name: str
    host: str | None = None  # what stands before the name in its URL; None: it needs a login
    md5: str | None = None  # if it is known


VOC_HOST = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/"
COCO_HOST = "http://images.cocodataset.org/zips/"
SEMIVL_HOST = "https://github.com/google-research/semivl/releases/download/checkpoints/"
ADE20K_HOST = "http://data.csail.mit.edu/places/ADEchallenge/"
COMMIT = "13ee65d6f27e197e0b55d987b346fc880fc811ca"  # of the authors' lists: they cannot change
LIST_HOST = f"https://raw.githubusercontent.com/google-research/semivl/{COMMIT}/splits/"
ARCHIVES = {
    "voc": [Archive("VOCtrainval_11-May-2012.tar", VOC_HOST, "6cd6e144f989b92b3379bac3b3de84fd")],
    "coco": [
        Archive("train2017.zip", COCO_HOST, "cced6f7f71b7629ddf16f17bbcfab6b2"),
        Archive("val2017.zip", COCO_HOST, "442b8da7639aecaf257c1dceb8ba8c80"),
        Archive("ground_truth_coco.zip", SEMIVL_HOST),
    ],
    "ade20k": [
        Archive("ADEChallengeData2016.zip", ADE20K_HOST, "7328b3957e407ddae1d3cbf487f149ef")
    ],
    "cityscapes": [Archive("leftImg8bit_trainvaltest.zip"), Archive("gtFine_trainvaltest.zip")],
}
TOP = {"voc": "VOCdevkit/VOC2012", "ade20k": "ADEChallengeData2016"}  # folder in the archive
COUNTS = {  # training images, validation images
    "voc": (10_582, 1_449),
    "coco": (118_287, 5_000),
    "ade20k": (20_210, 2_000),
    "cityscapes": (2_975, 500),
}
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
TRAIN_IMAGES = {  # where all training images lie; VOC has a list of them
    "coco": "train2017/*.jpg",
    "ade20k": "images/training/*.jpg",
    "cityscapes": "leftImg8bit/train/*/*.png",
}


def fetch(archive: Archive, folder: Path, place: Path, md5: str | None) -> None:
    """Unpacks an archive into the folder. It lies in `place`, or is fetched to it."""
    from torchvision.datasets.utils import download_url

    file = place / archive.name
    told = f"{archive.name} is behind the login of cityscapes-dataset.com; give --source FOLDER"
    require(archive.host or file.is_file(), told)
    print(file, flush=True)
    with blame(f"{file} is damaged or cannot be had; put it into --source FOLDER"):
        download_url(f"{archive.host}{archive.name}", str(place), archive.name, md5)
        # "data" refuses paths and links that lead out of the folder; for zip this is always so.
        safely = {} if archive.name.endswith(".zip") else {"filter": "data"}
        shutil.unpack_archive(file, folder, **safely)


def change_masks(files: list[Path], table: np.ndarray) -> None:
    """Rewrites masks through a table [256] of new values; labelIds become labelTrainIds."""

    def change(file: Path) -> None:
        with blame(file), Image.open(file) as image:
            mask = table[np.asarray(image)]
        save_mask(mask, file.with_name(file.name.replace("labelIds", "labelTrainIds")))

    in_threads(change, files, "convert masks")


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


def settle(name: str, folder: Path) -> None:
    """From unpacked archives and lists to a canonical folder, which is checked."""
    for path in [*(folder / TOP.get(name, "none")).glob("*")]:
        path.rename(folder / path.name)
    if name == "ade20k":  # 0 is "other" and wraps round to 255; 1 to 150 become 0 to 149
        table = np.arange(256, dtype=np.uint8) - 1
        change_masks(sorted(folder.glob("annotations/*/*.png")), table)
    if name == "cityscapes":
        from torchvision.datasets import Cityscapes

        table = np.full(256, IGNORE, np.uint8)
        for c in Cityscapes.classes:
            if 0 <= c.train_id < IGNORE:
                table[c.id] = c.train_id
        change_masks(sorted(folder.glob("gtFine/*/*/*_labelIds.png")), table)
    if name == "coco":  # where the archive has the masks is not published
        (folder / "masks").mkdir(exist_ok=True)
        for file in [*folder.rglob("*.png")]:
            file.replace(folder / "masks" / file.name)
    train = folder / "splits/train.txt"
    if name == "voc":  # most of these masks are not in the archive; unlabelled images need none
        images = [line.split()[0] for line in train.read_text(encoding="utf-8").splitlines()]
    else:
        files = folder.glob(TRAIN_IMAGES[name])
        images = sorted(file.relative_to(folder).as_posix() for file in files)
    train.write_text("\n".join(images), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(describe(name), indent=2))

    counts = dict(zip(("train.txt", "val.txt"), COUNTS[name]))
    for file in ("train.txt", *LISTS[name]):
        found = len((folder / "splits" / file).read_text(encoding="utf-8").splitlines())
        count = counts.get(file) or int(Path(file).parent.name)
        told = f"{name}: splits/{file} has {found} images instead of {count}: another version"
        require(found == count, told)
    check_folder(folder)


def make_published(name: str, folder: Path, source: str | None) -> None:
    """Fills `folder` from archives and lists. What `source` lacks is fetched into it."""
    from torchvision.datasets.utils import download_url

    place = Path(source or "data/downloads")
    print(f"making data/{name}; archives are kept in {place}, and can be removed afterwards")
    for archive in ARCHIVES[name]:
        fetch(archive, folder, place, md5=None if source else archive.md5)  # or packed anew
    for new, path in LISTS[name].items():
        file = folder / "splits" / new
        file.parent.mkdir(parents=True, exist_ok=True)
        if not path:
            file.write_text(ade20k_list(new), encoding="utf-8")
        elif (place / "splits" / path).is_file():
            shutil.copy(place / "splits" / path, file)
        else:
            with blame(LIST_HOST + path):
                download_url(LIST_HOST + path, str(file.parent), file.name)
    settle(name, folder)


def prepare(name: str, source: str | None = None) -> Path:
    """Makes data/NAME, complete or not at all, if it is not there already, and returns its path.
    source: a folder with archives (and perhaps lists, under splits/)."""
    root, target = Path("data"), Path("data", name)
    require(not source or Path(source).is_dir(), f"--source {source}: there is no such folder")
    if (target / "dataset.json").is_file():
        return target
    require(not target.exists(), f"{target} is no data folder; move it away and start again")
    root.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as temporary:
        folder = Path(temporary) / name  # other users may read it, unlike the temporary folder
        folder.mkdir()
        if name == "toy":
            make_toy(folder)
        else:
            make_published(name, folder, source)
        if not target.exists():  # else another process has made it meanwhile
            folder.rename(target)
    return target


# The toy world ------------------------------------------------------------------------------------
# A scene shows two to four things, each of which is a class, on one of four grounds. The ground is
# the background. CLIP's corpus has captions like "a photo of a cat and a rock on a beach", which
# never say "background": so only a definition tells CLIP what the background is. Some images of the
# corpus show clutter, which no scene has: more words and shapes make the tiny CLIP better.
# An icon is a list of "kind colour coordinates" parts, painted in that order on the square from
# (-1, -1) at the top left to (1, 1); "body" is the icon's own colour and pattern.
SCENE = 96  # side of a scene in pixels; also CLIP's input size
CORPUS_SIDE = 60  # side of an image that CLIP is pre-trained on
RADIUS = (19, 28)  # of an object, in pixels
SPLITS = {"train": 600, "val": 100, "test": 200}
CORPUS = 16_000  # images that CLIP is pre-trained on
ZOOM = 3  # icons are painted this much larger, then averaged down, for smooth edges
THINGS = {  # class -> colours and pattern of its body, then its icon
    "car": """crimson royalblue, plain
poly skyblue -.62 -.05 -.4 -.6 .34 -.6 .66 -.05; round body -1 -.14 1 .44; box body -.08 -.6 .04 0
disc #33323e -.76 .16 -.22 .7; disc #33323e .22 .16 .76 .7; disc darkgray -.58 .34 -.4 .52
disc darkgray .4 .34 .58 .52; disc gold .8 -.02 1 .18""",
    "boat": """white bisque, stripes
poly sienna -1 .3 1 .3 .62 .88 -.66 .88; box #33323e -.07 -1 .05 .3
poly body .1 -.95 .92 .18 .1 .18; poly body -.14 -.7 -.8 .18 -.14 .18; box bisque -.9 .3 .9 .44""",
    "rocket": """white, plain
poly darkorange -.26 .6 .26 .6 0 1; poly darkorange -.66 .74 -.3 .02 .3 .02 .66 .74
disc body -.4 -1 .4 .72; poly darkorange -.27 -.62 0 -1 .27 -.62; disc royalblue -.22 -.36 .22 .08
disc skyblue -.13 -.27 .13 -.01""",
    "cat": """darkorange sienna, stripes
poly body -.84 -1 -.86 .1 -.1 -.5; poly body .84 -1 .86 .1 .1 -.5
poly pink -.7 -.66 -.7 -.2 -.4 -.44; poly pink .7 -.66 .7 -.2 .4 -.44; disc body -.96 -.62 .96 .9
disc white -.44 .2 .44 .8; disc #33323e -.54 -.2 -.22 .2; disc #33323e .22 -.2 .54 .2
poly pink -.16 .3 .16 .3 0 .48""",
    "fish": """royalblue gold, dots
poly body .4 0 1 -.6 .9 0 1 .6; poly body -.3 -.4 .1 -.8 .35 -.3; disc body -1 -.54 .62 .54
disc white -.78 -.28 -.42 .08; disc #33323e -.72 -.2 -.52 0""",
    "ladybug": """crimson darkorange, dots
disc #33323e -.42 -1 .42 -.2; disc body -.86 -.72 .86 .9; box #33323e -.06 -.7 .06 .88
disc white -.3 -.94 -.1 -.74; disc white .1 -.94 .3 -.74""",
    "flower": """hotpink gold, plain
box seagreen -.08 .2 .08 1; poly seagreen 0 .84 .62 .44 .5 .84; disc body -.32 -1 .32 -.36
disc body -.32 -.24 .32 .4; disc body -.74 -.62 -.1 .02; disc body .1 -.62 .74 .02
disc darkorange -.26 -.56 .26 -.04""",
    "cactus": """yellowgreen, stripes
round body -.3 -.96 .3 .7; round body -.86 -.4 -.54 .24; round body .54 -.6 .86 .04
box body -.7 .02 -.2 .24; box body .2 -.18 .7 .04; disc hotpink -.2 -1 .2 -.72
poly darkorange -.54 .5 .54 .5 .4 1 -.4 1""",
    "donut": """hotpink sienna, dots
disc darkorange -.96 -.9 .96 .96; disc body -.9 -.9 .9 .8; disc darkorange -.36 -.38 .36 .34
disc #0000 -.28 -.28 .28 .3""",
    "castle": """pink bisque, stripes
box body -.6 -.3 .6 .92; box body -.96 -.7 -.44 .92; box body .44 -.7 .96 .92
poly royalblue -1 -.6 -.7 -1 -.4 -.6; poly royalblue .4 -.6 .7 -1 1 -.6; box body -.36 -.5 -.14 -.2
box body .14 -.5 .36 -.2; round #33323e -.24 .3 .24 .92""",
}
CLUTTER = {  # the same, for images of the corpus only
    "tree": """seagreen, plain
box sienna -.18 .3 .18 1; disc body -.9 -.4 .1 .5; disc body -.1 -.4 .9 .5; disc body -.6 -1 .6 .2
disc yellowgreen -.34 -.76 .06 -.4; disc yellowgreen .3 -.16 .62 .12""",
    "rock": """darkgray, dots
poly body -1 .7 -.8 -.2 -.3 -.7 .3 -.6 .9 .1 1 .7; poly white -.6 -.1 -.3 -.5 .1 -.4 -.2 -.2""",
    "mushroom": """sienna, plain
round bisque -.25 -.1 .25 .9; poly body -.9 .05 -.7 -.5 -.3 -.78 .3 -.78 .7 -.5 .9 .05""",
}
GROUNDS = {  # ground -> two colours that flow into each other, width and height of its speckles
    "meadow": ("#7eb65c", "#609c4a", 2, 6),
    "beach": ("#ecd6a0", "#d8bc82", 3, 2),
    "lake": ("#5ca6d6", "#96ceec", 16, 2),
    "snowfield": ("#eaf2fa", "#cadaec", 3, 3),
}
TOY_CLASSES = ["background", *THINGS]
TOY_DEFINITIONS = {"background": [*GROUNDS, *CLUTTER]}


def shaded(color: str, factor: float) -> tuple:
    return tuple(min(255, int(factor * c)) for c in ImageColor.getrgb(color)[:3])


def paint_body(color: str, pattern: str, side: int, rng: random.Random) -> Image.Image:
    """A square of cloth [side, side] from which the icon's body is cut."""
    ground = shaded(color, rng.uniform(0.93, 1.07))
    mark = shaded(color, 0.35)
    if sum(ground) > 600:  # a pale cloth has stripes or dots a little darker
        mark = shaded(color, 0.72)
    elif pattern == "stripes":  # a strong one has whitish stripes, dark dots
        mark = tuple(int(0.4 * c + 153) for c in ground)
    cloth = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(cloth)
    step = side // 5
    start = rng.randrange(step)
    for x in range(start, side, step):
        if pattern == "stripes":
            draw.rectangle((x, 0, x + 0.42 * step, side), fill=mark)
        if pattern == "dots":
            for y in range(start, side, step):
                draw.circle((x, y), 0.24 * step, fill=mark)
    return cloth


def paint_icon(name: str, radius: float, rng: random.Random) -> Image.Image:
    """One object, RGBA [2 radius, 2 radius], in a random colour, direction and small tilt."""
    body, *icon = (THINGS | CLUTTER)[name].splitlines()
    colors, pattern = body.split(", ")
    side = ZOOM * int(2 * radius)
    cloth = paint_body(rng.choice(colors.split()), pattern, side, rng)
    sprite = Image.new("RGBA", (side, side))
    for part in ";".join(icon).split(";"):
        kind, color, *numbers = part.split()
        xy = [(float(number) + 1) / 2 * (side - 1) for number in numbers]
        shape = Image.new("L", (side, side))
        draw = ImageDraw.Draw(shape)
        if kind == "round":
            draw.rounded_rectangle(xy, side / 8, fill=255)
        else:
            {"disc": draw.ellipse, "box": draw.rectangle, "poly": draw.polygon}[kind](xy, fill=255)
        sprite.paste(cloth if color == "body" else color, (0, 0, side, side), shape)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return sprite.rotate(rng.uniform(-12, 12)).reduce(ZOOM)


def paint_ground(name: str, rng: random.Random, side: int = 512) -> Image.Image:
    """A large textured ground [side, side]; scenes and corpus images are cut out of it."""
    base, second, width, height = GROUNDS[name]
    ground = Image.new("RGB", (side, side), base)
    noise = Image.frombytes("L", (side // 8, side // 8), rng.randbytes((side // 8) ** 2))
    patches = noise.resize((side, side), Image.Resampling.BICUBIC).point(lambda v: v // 2)
    ground.paste(second, mask=patches)
    draw = ImageDraw.Draw(ground)
    for _ in range(side * side // 300):
        x, y = rng.randrange(side), rng.randrange(side)
        ink = shaded(second, rng.choice((0.8, 1.2)))
        draw.ellipse((x, y, x + width, y + height), fill=ink)
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
        """Two to four things, one per quarter -> image RGB and mask P [96, 96]."""
        _, image = self.ground(SCENE)
        mask = Image.new("P", (SCENE, SCENE))
        mask.putpalette(SHADES)
        for quarter in self.rng.sample(range(4), self.rng.choice((2, 3, 3, 4))):
            name = self.rng.choice([*THINGS])
            x = SCENE * (0.25 + 0.5 * (quarter % 2)) + self.rng.uniform(-6, 6)
            y = SCENE * (0.25 + 0.5 * (quarter // 2)) + self.rng.uniform(-6, 6)
            outline, corner = self.place(image, name, x, y)
            mask.paste(TOY_CLASSES.index(name), corner, outline)
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


STEPS, LR = 1000, 3e-3  # of the pre-training of the tiny CLIP
BATCHES = {24: 192, 48: 96}  # side of the crops that CLIP sees -> images in a step, in turn
VISION = dict(image_size=SCENE, patch_size=8, width=96, layers=3, head_width=32, pool_type="avg")
TEXT = dict(context_length=16, vocab_size=49408, width=64, heads=2, layers=1)
TOY_CLIP = dict(embed_dim=64, vision_cfg=VISION, text_cfg=TEXT)  # settings as open_clip has them


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


def pretrain_tiny_clip(images: list[Image.Image], captions: list[str]):
    """Contrastive pre-training on images [60, 60] with one caption each -> open_clip.CLIP."""
    import open_clip
    import torch
    import torch.nn.functional as F
    from torchvision.transforms import v2

    images = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    images = images.permute(0, 3, 1, 2).contiguous()  # uint8 [N, 3, 60, 60]
    normalize = v2.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    torch.manual_seed(0)
    model = open_clip.CLIP(**TOY_CLIP)
    # Guidance assumes a scale of 100, at which real CLIP ends. Learned, it would stay near 20, and
    # guidance would be too sure. At 100 the decoder learns slower. 50 is a compromise.
    model.logit_scale.data.fill_(math.log(50)).requires_grad_(False)
    texts = open_clip.tokenize(captions, model.context_length)
    texts, caption = torch.unique(texts, dim=0, return_inverse=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = one_cycle(optimizer, LR, STEPS, pct_start=0.1, cycle_momentum=False)
    random_crop = {side: v2.RandomCrop(side) for side in BATCHES}
    for step in tqdm(range(STEPS), "pre-training the tiny CLIP", disable=None):
        side, size = [*BATCHES.items()][step % len(BATCHES)]
        batch = torch.randint(len(images), (size,))
        crops = torch.stack([random_crop[side](image) for image in images[batch]])
        crops = normalize(crops / 255)
        used, which = torch.unique(caption[batch], return_inverse=True)
        words = model.encode_text(texts[used])[which]
        crops = F.normalize(encode_mosaic(model, crops), dim=-1)
        logits = model.logit_scale.exp() * crops @ F.normalize(words, dim=-1).T
        same = (which[:, None] == which).float()  # images with one caption share the target
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
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
        for pair in tqdm(names, f"painting {split} scenes", disable=None):
            for name, image in zip(pair, painter.scene()):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                image.save(folder / name)
        lines = "".join(f"{image} {mask}\n" for image, mask in names)
        (folder / f"splits/{split}.txt").write_text(lines, encoding="utf-8")
    content = {"classes": TOY_CLASSES, "definitions": TOY_DEFINITIONS}
    (folder / "dataset.json").write_text(json.dumps(content, indent=2))
    painter = Painter("corpus 0")
    bar = tqdm(range(CORPUS), "painting the corpus", disable=None)
    images, captions = zip(*(painter.captioned() for _ in bar))
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        clip = pretrain_tiny_clip(images, captions)
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    colors = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": TOY_CLIP, "preprocess_cfg": colors}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


# Your own pictures --------------------------------------------------------------------------------
# Files are found and paired by their names, masks become class numbers, and the folder is checked.
# A value of a mask is a number or, in colour masks, a tuple (red, green, blue).
NO_LABEL = ("void", "ignore", "__ignore__", "unlabeled", "unlabelled")  # these are no classes
LABELMAPS = ("labelmap.txt", "_classes.csv", "class_names.txt", "labels.txt")  # in exports
VAL_LISTS = ("ImageSets/Segmentation/val.txt", "splits/val.txt")  # of VOC; of a data folder
IMAGE_FOLDERS = set("images image img img_dir photos jpegimages".split())
MASK_FOLDERS = set("masks mask masks_machine labels annotations ann_dir segmentationclass".split())
PARTS = {"val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
MASK_NAME = re.compile(r"^mask_|([_-](masks?|labels?|segmentation|l)|\.(jpe?g|png))$")
RULE = "a mask is called NAME.png or NAME_mask.png (or _label), with the NAME of its image"


def read_labelmap(file: Path) -> dict:
    """Value -> name, of CVAT ("NAME:R,G,B::" a line), Roboflow ("VALUE, NAME") or labelme ("NAME").
    For the comma there may be a semicolon or TAB, as Excel writes them, or a blank."""
    names, kinds = {}, set()
    if file.name == "dataset.json":  # of a data folder with "colors" or "ignore_index"
        with blame(file):
            content = json.loads(file.read_text("utf-8-sig"))
            colors = content.get("colors", {})
            for number, name in enumerate(content["classes"]):
                names[tuple(colors[name]) if name in colors else number] = name
            return names | {content.get("ignore_index", IGNORE): "void"}
    for at, line in enumerate(file.read_text("utf-8-sig", "replace").splitlines(), 1):
        line = re.sub(r"\s*([:,;\t])\s*", r"\1", line.strip())
        head = r"(pixel value|value|id|index)[,;\t].*|names?|class(es)?"
        title = re.fullmatch(head, line.lower())
        if not line or line[0] == "#" or (title and not names):
            continue
        if line == "__ignore__" and not names:  # labelme has it first, and does not count it
            continue
        pattern = r"(?:(\d+)[,;\s])?([^:,;\t\ufffd]+)(?::(\d+),(\d+),(\d+)(?::.*)?)?"
        match = re.fullmatch(pattern, line)
        number, name, *color = match.groups() if match else ("256", "", None)
        kinds.add((number is None, color[0] is None))
        value = len(names) if number is None else int(number)
        if color[0]:
            value = tuple(map(int, color))
        told = f"{file}, line {at}: {line!r} should be 'NAME:R,G,B::', 'VALUE, NAME' or 'NAME', as"
        fits = len(kinds) == 1 and np.max(value) < 256 and value not in names
        require(fits, f"{told} all others are, with values to 255, none twice, in UTF-8")
        names[value] = name
    return names


def class_list(names: dict, source: str) -> list[str]:
    """The classes, without what means "no label", in the order of the class numbers to be."""
    classes = [name for name in names.values() if name.lower() not in NO_LABEL]
    twice = [name for name in classes if classes.count(name) > 1]
    require(not twice, f"{source}: {twice[:1]} is there twice")
    told = f"{source}: should name 2 to 255 classes; perhaps background is missing"
    require(all(classes) and 2 <= len(classes) <= IGNORE, told)
    return classes


def find_files(folder: Path) -> list[Path]:
    """All files below a folder, also of linked folders. Left out are hidden ones, instance masks,
    masks painted over images, and what this project wrote: runs, data folders, overlays."""
    require(folder.is_dir(), f"{folder}: there is no such folder")
    found, seen = [], set()
    for path, folders, names in os.walk(folder, followlinks=True):
        here, real = Path(path), os.path.realpath(path)
        ours = "log.jsonl" in names or ("dataset.json" in names and "splits" in folders)
        drawn = re.search("SegmentationObject|Visualization", here.name)  # beside labelme's masks
        if real in seen or (here != folder and (ours or drawn)):
            folders.clear()  # os.walk will not enter them
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [here / n for n in sorted(names) if n[0] != "." and "-overlay.p" not in n]
    return found


def key_of(path: Path) -> str:
    """What an image and its mask have in common: the path in lower case, without its suffix and the
    folders that only tell images from masks."""
    folders = [part.lower() for part in path.parts[:-1]]
    folders = [part for part in folders if part not in IMAGE_FOLDERS | MASK_FOLDERS]
    return unicodedata.normalize("NFC", "/".join([*folders, path.stem.lower()]))


def find_pictures(images: list[Path], masks: list[Path]) -> tuple[dict, dict]:
    """key -> file of the images, and of the masks. In a folder of both their names decide."""
    found, left_out = ({}, {}), Counter()
    roots = [*dict.fromkeys(images + masks)]
    for root in roots:
        inner = [other for other in roots if root in other.parents]
        for file in find_files(root):
            if any(other in file.parents for other in inner):
                continue  # that folder has its own turn
            path, suffix = file.relative_to(root), file.suffix.lower()
            if suffix not in Image.registered_extensions():
                left_out[suffix or file.name] += file.name not in LABELMAPS
                continue
            odd = re.search("[\0-\x1f\x85\u2028\u2029\ud800-\udfff\\\\]", file.as_posix())
            require(not odd, f"{str(file)!r}: letters that lists cannot hold; rename it")
            is_mask = root in masks
            if is_mask and root in images:
                in_folder = MASK_FOLDERS & {part.lower() for part in path.parts[:-1]}
                is_mask = in_folder or re.search("[_-]masks?$", path.stem.lower())
            other = found[bool(is_mask)].setdefault(key_of(path), file)
            require(other == file, f"{other} and {file}: one name for two; rename one")
    told = ", ".join(f"{n} {suffix}" for suffix, n in (+left_out).most_common(5))
    for kind, files in zip(("images", "masks"), found):
        where = ", ".join(map(str, images if kind == "images" else masks))
        but = f", but {told}, which are no pictures" if told else ""
        needed = f"Images are needed, and masks for some (polygons must be drawn first); {RULE}"
        require(files, f"{where}: no {kind} there{but}. {needed}")
    texts = ".txt .csv .json .xml .yaml .npy .md".split()  # nobody takes them for photographs
    told = ", ".join(f"{n} {suffix}" for suffix, n in (+left_out).items() if suffix not in texts)
    if told:
        print(f"note: left out are {told}; photographs of these kinds can be saved as JPEG")
    return found


def pair_pictures(images: list[Path], masks: list[Path]) -> dict[str, tuple]:
    """key -> (image, mask or None), in the order of keys."""
    image_of, found = find_pictures(images, masks)
    mask_of, lost = {}, []
    for key, mask in found.items():
        if key not in image_of:
            folder, slash, name = key.rpartition("/")
            key = folder + slash + MASK_NAME.sub("", name)
        if key not in image_of:
            lost.append(str(mask))
            continue
        other = mask_of.setdefault(key, mask)
        require(other == mask, f"{other} and {mask}: two masks for one image; remove one")
    told = f"{len(lost)} masks have no image of their name, such as {', '.join(lost[:3])}"
    require(mask_of, f"all {told}; images are {next(iter(image_of.values()))}, ...; {RULE}")
    if lost:
        print(f"note: {told}")
    return {key: (image_of[key], mask_of.get(key)) for key in sorted(image_of)}


def read_values(file: Path, by_color: bool) -> tuple[np.ndarray, list]:
    """A mask of any format -> indices [H, W], and the value that each index stands for: a number,
    or a tuple (red, green, blue)."""
    with blame(file), Image.open(file) as image:
        kind = f"{image.format} {image.info.get('compression', '')}".strip()
        exact = re.match("(PNG|TIFF|BMP)(?!.*(jp|webp))", kind)
        require(exact, f"{kind} may change numbers; save masks as PNG")
        raw = re.search("'([^']+)'", str(image.tile[0][3:]))[1]  # what the file has for a pixel
        levels = {"1": 2, "L;2": 4, "L;4": 16}.get(raw)
        plain = image.mode in ("P", "L", "RGB", "RGBA") and (image.mode == "P" or ";" not in raw)
        deep = image.mode in ("I", "I;16")
        told = f"pixels of kind {raw}; save masks as grey, palette or RGB with 8 bits"
        require(plain or levels or deep, told)
        if image.mode[:3] == "RGB":
            return read_colors(image, by_color)
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
        if deep:
            require(pixels.min() >= 0 and pixels.max() <= 255, "values over 255; save 8 bits")
            pixels = pixels.astype(np.uint8)
        if levels and image.mode != "P":  # Pillow stretches them to 0 ... 255
            pixels = pixels // (255 // (levels - 1))
        if not by_color:
            return pixels, [*range(256)]
        if image.mode == "P":
            flat = [*image.getpalette(), *bytes(768)]  # a palette may be shorter than 256
            return pixels, [tuple(flat[i : i + 3]) for i in range(0, 768, 3)]
        return pixels, [(grey, grey, grey) for grey in range(256)]


def read_colors(image: Image.Image, by_color: bool) -> tuple[np.ndarray, list]:
    """The same for a mask of mode RGB or RGBA."""
    if image.mode == "RGBA":
        opaque = image.getchannel("A").getextrema() == (255, 255)
        require(opaque, "some pixels are transparent; save masks without transparency")
    pixels = np.asarray(image.convert("RGBA")).view("<u4")[..., 0] & 0xFFFFFF  # blue, green, red
    there = np.zeros(1 << 24, bool)
    there[pixels] = True
    colors = np.flatnonzero(there)
    require(len(colors) <= 4096, "over 4096 colours; save masks as flat areas with hard edges")
    index_of = np.zeros(1 << 24, np.uint16)
    index_of[colors] = np.arange(len(colors))
    values = [(color & 255, color >> 8 & 255, color >> 16) for color in colors.tolist()]
    if not by_color and all(red == green == blue for red, green, blue in values):
        values = [red for red, _, _ in values]
    return index_of[pixels], values


def save_mask(mask: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette(SHADES)
    image.save(file, compress_level=1)


def convert_masks(place_of: dict[Path, Path], names: dict, source: str) -> None:
    """Writes masks of any format as class numbers to place_of[mask]. names: value -> name."""
    by_color = any(isinstance(value, tuple) for value in names)

    def count(mask: Path) -> dict:
        pixels, values = read_values(mask, by_color)
        counts = np.bincount(pixels.ravel(), minlength=len(values)).tolist()
        found = Counter()
        for value, n in zip(values, counts):  # a palette may hold a colour twice
            found[value] += n
        return +found  # without those that do not occur

    found = dict(zip(place_of, in_threads(count, [*place_of], "read masks")))
    seen = set().union(*found.values())
    in_order = sorted(seen, key=lambda value: (isinstance(value, tuple), value))
    told = f"masks hold {in_order[:30]}: name 0, 1, 2 ... by --classes a,b,c, other values by"
    require(names, f"{told} --labelmap FILE with lines VALUE, NAME, colours with NAME:R,G,B")
    classes = class_list(names, source)
    if [*names] == [0, 1] and 255 in seen <= {0, 255}:
        print(f"note: masks hold 0 and 255 only; read as {names[0]} and {names[1]}")
        names = {0: names[0], 255: names[1]}
    table = {} if by_color else {IGNORE: IGNORE}
    for value, name in names.items():
        table[value] = classes.index(name) if name in classes else IGNORE
    problems = []
    for mask, counts in found.items():
        wrong = {value: n for value, n in counts.items() if value not in table}
        if wrong:
            told = ", ".join(f"{value}: {n} pixels" for value, n in [*wrong.items()][:8])
            problem = f"{mask}: no class of {source} has {told}; correct the mask, or name it"
            if not by_color and isinstance([*wrong][0], tuple):
                problem += " in a --labelmap with lines NAME:R,G,B"
            problems.append(problem)
    require(not problems, *problems)

    def convert(mask: Path) -> None:
        pixels, values = read_values(mask, by_color)
        numbers = np.uint8([table.get(value, IGNORE) for value in values])
        save_mask(numbers[pixels], place_of[mask])

    in_threads(convert, [*place_of], "convert masks")


def list_line(entry: tuple, home: Path) -> str:
    """ "IMAGE MASK" or "IMAGE", with a TAB behind the image if a name has blanks. Paths are
    relative to `home`, or absolute on another drive."""
    words = []
    for file in filter(None, entry):
        try:
            words.append(Path(os.path.relpath(file, home)).as_posix())
        except ValueError:
            words.append(file.as_posix())
    line = " ".join(words)
    return line if line.split() == words else "\t".join([*words, ""][:2])


def divide(pairs: dict[str, tuple], in_val: set, share: float, seed: int) -> dict[str, list]:
    """Name of a list -> pairs: as folders are called, or the names `in_val` say; else a share of
    the masked images is drawn to validate. Copies of one picture stay together."""
    part_of = {}
    for key in pairs:
        *folders, name = key.split("/")
        named = [PARTS[folder] for folder in folders if folder in PARTS]
        part_of[key] = "val" if name in in_val else (named or ["train"])[0]
    masked = [key for key, (_, mask) in pairs.items() if mask]
    if "val" not in [part_of[key] for key in masked]:
        # Roboflow calls augmented copies of NAME.jpg NAME_jpg.rf.HASH.jpg.
        origin = {key: re.sub(r"\.rf\.\w+$", "", key) for key in pairs}
        groups = sorted({origin[key] for key in masked if part_of[key] == "train"})
        require(len(groups) > 1, "one mask only; training and validation need one each")
        count = max(1, min(len(groups) - 1, round(share * len(groups))))
        drawn = {*random.Random(seed).sample(groups, count)}
        print(f"note: {count} of {len(groups)} masked images are drawn to validate")
        part_of |= {key: "val" for key in pairs if origin[key] in drawn}
    lists = {}
    for key, pair in pairs.items():
        if pair[1] or part_of[key] == "train":
            lists.setdefault(part_of[key], []).append(pair)
    require(any(mask for _, mask in lists.get("train", [])), "no image to train on has a mask")
    return lists


def write_folder(home, classes: list, lists: dict, place_of: dict, names: dict, source: str):
    """Makes a canonical folder, whole or not at all. lists: name -> pairs (image, mask or None);
    masks, of any format, become masks/place_of[mask]."""
    place = home if home.exists() else home.parent  # nothing is left of what fails
    place.mkdir(parents=True, exist_ok=True)
    target = home / ("masks-numbers" if (home / "masks").exists() else "masks")
    with tempfile.TemporaryDirectory(prefix=".making-", dir=place) as temporary:
        new = Path(temporary)
        new_place = {mask: new / "masks" / name for mask, name in place_of.items()}
        convert_masks(new_place, names, source)
        new_lists = {}
        for name, pairs in lists.items():
            new_lists[name] = [(image, new_place.get(mask)) for image, mask in pairs]
        check(classes, new_lists, {new: mask for mask, new in new_place.items()})
        (new / "splits").mkdir()
        for name, pairs in lists.items():
            lines = [list_line((i, m and target / place_of[m]), home) for i, m in pairs]
            (new / f"splits/{name}.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
        (new / "dataset.json").write_text(json.dumps({"classes": classes}, indent=2))
        home.mkdir(exist_ok=True)
        (new / "masks").rename(target)
        (new / "splits").rename(home / "splits")
        (new / "dataset.json").rename(home / "dataset.json")


def from_pictures(folder, images, masks=None, classes=None, labelmap=None, val=0.2, seed=0) -> None:
    """Makes a canonical folder from pictures, which stay where they are, as told on top of this
    file. classes: names of the mask values 0, 1, ...; val: share of the masked images."""
    home = Path(folder).resolve()
    images = [Path(path).resolve() for path in images]
    masks = [Path(path).resolve() for path in masks or images]
    require(folder and 0 < val < 1, f"--val {val}: should be between 0 and 1, and FOLDER a name")
    require(not (labelmap and classes), "either --classes or --labelmap names the classes")
    for path in (home / "splits", home / "dataset.json", home / "masks"):
        ours = path in masks + images or not path.exists()
        require(ours, f"{path} is there already; move it, or take another FOLDER")
    roots = dict.fromkeys(images + masks)
    if not (classes or labelmap):  # an export brings it with it
        places = [place for root in roots for place in (root, *sorted(root.glob("*/")))]
        brought = [place / name for place in places for name in LABELMAPS]
        brought += [root / "dataset.json" for root in roots]
        for file in filter(Path.is_file, brought):
            labelmap = labelmap or file
            same = file.name != labelmap.name or file.read_bytes() == labelmap.read_bytes()
            require(same, f"{file} differs from {labelmap}; name the right one by --labelmap")
        if labelmap:
            print(f"note: {labelmap} names the classes")
    names = read_labelmap(Path(labelmap)) if labelmap else dict(enumerate(classes or ()))
    source = str(labelmap or "--classes")
    classes = class_list(names, source) if names or labelmap else []

    pairs = pair_pictures(images, masks)
    lists = [root / name for root in roots for name in VAL_LISTS]
    listed = [file for file in lists if file.is_file()]
    if listed:
        print(f"note: {listed[0]} says which images validate")
    words = [word.lower() for file in listed for word in file.read_text("utf-8").split()]
    in_val = {*words} | {Path(word).stem for word in words}
    lists = divide(pairs, in_val, val, seed)
    place_of = {mask: f"{key}.png" for key, (_, mask) in pairs.items() if mask}
    write_folder(home, classes, lists, place_of, names, source)
    left = sum(mask is not None for _, mask in lists["train"])
    bare = len(lists["train"]) - left
    print(f"{left} images with and {bare} without mask to train, {len(lists['val'])} to validate")
    folder = f'"{folder}"' if " " in str(folder) else folder
    count = left if bare else max(1, left // 4)
    alone = " --unlabelled off" if left == 1 and not bare else ""
    print(f"next:\n    python semivl.py --dataset {folder} --labels {count}{alone}")


# The check of a canonical folder ------------------------------------------------------------------
def read_lists(home: Path) -> dict[str, list]:
    """Name of a list (train, val, 8/labeled) -> pairs of files (image, mask or None)."""
    lists = {}
    for file in sorted((home / "splits").rglob("*.txt")):
        pairs = []
        with blame(file):
            text = file.read_text("utf-8-sig").replace("\\", "/")
            for line in filter(str.strip, text.splitlines()):
                words = line.split("\t") if "\t" in line else line.split()
                image, mask, *more = [word.strip() for word in words] + [""]
                torn = mask and "." not in image and "\t" not in line
                told = f"{line!r} should be 'IMAGE MASK', a TAB behind a name that has blanks"
                require(image and not torn and not any(more), told)
                pairs.append((home / image, home / mask if mask else None))
        lists[file.relative_to(home / "splits").with_suffix("").as_posix()] = pairs
    for name in ("train", "val"):
        require(lists.get(name), f"{home}/splits/{name}.txt: needed, with a line for each image")
    return lists


def image_size(file: Path, turned: list) -> tuple[int, int]:
    """Width and height of an image as it is seen; opens all of it. Notes it if EXIF turns it."""
    with blame(file), Image.open(file) as image:
        require(image.mode[0] not in "IF", f"mode {image.mode}; save it with 8 bits")
        if image.getexif().get(0x0112, 1) > 1:
            turned.append(file)
        return ImageOps.exif_transpose(image).size


def mask_pixels(file: Path, count: int, size: tuple, name: Path | None = None) -> np.ndarray:
    """Pixels of each value of a canonical mask with `count` classes, for an image of that size."""
    with blame(name or file), Image.open(file) as mask:
        exact = mask.mode in ("P", "I;16") or (mask.mode == "L" and mask.tile[0][3] == "L")
        told = f"{mask.format} of mode {mask.mode} is no PNG of class numbers, grey or palette"
        require(exact and mask.format == "PNG", f"{told}, 8 bits; make it anew from --images")
        require(mask.size == size, f"{mask.size} pixels, but its image has {size} upright")
        pixels = np.bincount(np.asarray(mask).ravel(), minlength=256)
        wrong = [v for v in np.flatnonzero(pixels).tolist() if v >= count and v != IGNORE]
        require(not wrong, f"no class has {wrong[:8]}; classes are 0 to {count - 1}")
        return pixels


def check(classes: list[str], lists: dict[str, list], made_of: dict | None = None) -> None:
    """Opens all files of a canonical folder. Prints pixels and masks of each class, and what looks
    like a mistake. UserError with up to 20 problems. made_of: mask -> the file that they name."""
    turned, lists_of = [], {}

    def look(pair: tuple) -> np.ndarray | None:
        size = image_size(pair[0], turned)
        name = (made_of or {}).get(pair[1], pair[1])
        return mask_pixels(pair[1], len(classes), size, name) if pair[1] else None

    pairs = [*dict.fromkeys(pair for pairs in lists.values() for pair in pairs)]
    pixels_of = dict(zip(pairs, in_threads(look, pairs, "check")))
    shown = {}  # list -> pixels [masks, 256]
    for name, pairs in lists.items():
        rows = [pixels_of[pair] for pair in pairs if pair[1]]
        if rows:
            shown[name] = np.stack(rows)
        for image, _ in pairs:
            parts = lists_of.setdefault(os.path.realpath(image), {})
            parts["train" if "/" in name else name] = True
    heads = [f"{name}: {len(lists[name])} images" for name in shown]
    print(f"{'pixels (masks)':22}" + "".join(f"{head:>26}" for head in heads))
    for number, title in [*enumerate(classes), (IGNORE, "no label")]:
        columns = [rows[:, number] for rows in shown.values()]
        cells = [f"{column.sum():,} ({np.count_nonzero(column)})" for column in columns]
        print(f"{title:22}" + "".join(f"{cell:>26}" for cell in cells))
    for name, rows in shown.items():
        absent = [title for number, title in enumerate(classes) if not rows[:, number].any()]
        if absent:
            print(f"note: no mask of {name} shows {', '.join(absent)}")
        require(name != "train" or len(absent) + 1 < len(classes), "train shows one class only")
    if turned:
        print(f"note: EXIF turns {len(turned)} images, such as {turned[0]}; are masks upright?")
    double = [image for image, parts in lists_of.items() if len(parts) > 1]
    if double:
        parts = " and ".join(lists_of[double[0]])
        print(f"note: {len(double)} images are in {parts}, such as {double[0]}")


def check_folder(home: Path) -> None:
    with blame(home / "dataset.json"):
        classes = json.loads((home / "dataset.json").read_text("utf-8-sig"))["classes"]
        require(isinstance(classes, list), "'classes' should be a list of names")
    check(classes, read_lists(home))


def main(argv=None) -> int:
    """The command line, as told on top of this file. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = ["toy", *ARCHIVES]
    parser.add_argument("dataset", metavar="NAME", help=f"{', '.join(sets)}, or a FOLDER")
    parser.add_argument("--source", metavar="FOLDER", help="that has the archives of a named set")
    parser.add_argument("--images", metavar="DIR", nargs="+", help="pictures, also in subfolders")
    parser.add_argument("--masks", metavar="DIR", nargs="+", help="their masks [those in --images]")
    parser.add_argument("--classes", metavar="a,b,c", help="names of the mask values 0, 1, 2 ...")
    parser.add_argument("--labelmap", metavar="FILE", help="or a file of CVAT, Roboflow, labelme")
    parser.add_argument("--val", type=float, help="share of the masks that validates [0.2]")
    parser.error = lambda message: parser.exit(2, f"data_prep.py: {message}\n")
    args = vars(parser.parse_args(argv))
    name, source = args.pop("dataset"), args.pop("source")
    given = {key: value for key, value in args.items() if value is not None}
    try:
        if name in sets:
            require(not given, f"{name} is made as published, without these options")
            print(f"{prepare(name, source)} is complete")
            return 0
        require(not source, f"{name} is none of {', '.join(sets)}")
        if "images" in given:
            if "classes" in given:
                given["classes"] = [word.strip() for word in given["classes"].split(",")]
            from_pictures(name, **given)
            return 0
        told = f"{name}: neither one of {', '.join(sets)}, nor a data folder; --images makes one"
        require(not given and (Path(name) / "dataset.json").exists(), told)
        check_folder(Path(name))
        return 0
    except (UserError, OSError) as error:  # all else is a bug, and keeps its traceback
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted; what was fetched is kept", 130
    print(f"data_prep.py: {message}", file=sys.stderr)  # only here are all progress bars closed
    return code


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's have not
            stream.reconfigure(errors="replace")  # for names that a console cannot print
    sys.exit(main())
