"""prepare.py – makes sets of images into what data.py reads: an .npz of arrays, or folders of image files.

    python tools/prepare.py demo                            data/glyphs.npz and data/lower_case.npz, drawn
    python tools/prepare.py glyphs OUT.npz [train=N] [validation=N] [test=N] [size=S]; so lower_case
    python tools/prepare.py fashion_mnist OUT.npz [FOLDER]  without FOLDER: Debian's dataset-fashion-mnist
    python tools/prepare.py cifar100 OUT.npz FOLDER         of the binary version
    python tools/prepare.py cub OUT FOLDER                  links, sorted into splits and classes
    python tools/prepare.py tiny_imagenet OUT FOLDER        links, likewise
    python tools/prepare.py renditions OUT FOLDER           the test images of a folder, redrawn
    python tools/prepare.py tiny_imagenet_r OUT FOLDER      ImageNet-R, squashed to 64 x 64 pixels

An .npz also holds renditions of its test images. A set that is not all there is refused. OUT is written whole
or not at all: an .npz is replaced, a folder must be new or empty.
"""

import functools
import gzip
import inspect
import math
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import models
from data import UserError


def main():
    name, *words = sys.argv[1:] or [""]
    numbers = [word for word in words if re.fullmatch("[a-z]+=[1-9][0-9]*", word)]
    paths = [Path(word) for word in words if word not in numbers]
    numbers = {key: int(value) for key, value in (word.split("=") for word in numbers)}
    try:
        inspect.signature(SETS[name]).bind(*paths, **numbers)
    except (KeyError, TypeError):
        print(__doc__, file=sys.stderr)
        raise UserError(f"{' '.join(sys.argv[1:])!r} is none of these commands.") from None
    try:
        SETS[name](*paths, **numbers)
    except UserError:
        raise
    except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error, KeyError, ValueError) as error:
        raise UserError(f"{' '.join(map(str, paths))}: this is not the whole of {name} ({error}); give the "
                        "folder of the set as it was unpacked.") from None


def save_arrays(out, class_names, splits):
    """Writes {split: (images uint8 N H W 3, labels N)}, and renditions of the test images, as an .npz."""
    if out.suffix != ".npz":
        raise UserError(f"{out} would be a file of arrays; choose a name that ends in .npz.")
    images, labels = splits["test"]
    drawn = [np.asarray(rendition(Image.fromarray(image), i)) for i, image in enumerate(images)]
    splits = {**splits, "renditions": (np.stack(drawn), labels)}
    arrays = {"class_names": np.array(class_names)}
    for split, (images, labels) in splits.items():
        arrays |= {f"{split}_images": images, f"{split}_labels": labels.astype(np.int64)}
    out.parent.mkdir(parents=True, exist_ok=True)
    models.write(out, lambda file: np.savez(file, **arrays))
    print(f"{out}:", ", ".join(f"{len(images):,} {split}" for split, (images, _) in splits.items()))


def save_folder(out, files):
    """Writes [(path within `out`, a PIL image, or the path that a link shall lead to), …]."""
    out = out.resolve()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder, or remove it.")
    unfinished = out.with_name(f"{out.name}.{os.urandom(4).hex()}.tmp")
    try:
        for path, content in files:
            file = unfinished / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Image.Image):
                content.save(file)
            elif os.access(content, os.R_OK):
                file.symlink_to(content.resolve())
            else:
                raise UserError(f"{content} is not there or cannot be read; unpack the set again.")
        os.replace(unfinished, out)
        print(out, "is complete")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---------- Glyphs: letters and digits drawn here, so that the demo needs no download

# No pair that a small rotation or shear turns into each other (O Q 0, I 1, U V …). `lower_case` is for
# few-shot, classes that no model has seen: no small letter that is a small capital.
GLYPHS = {"glyphs": "ABCDEFGHJKLMNPRSTWXYZ347", "lower_case": "abdefghijmnqrt"}
# A glyph depends on its index alone, and splits never share an index.
FIRST_INDEX = {"train": 0, "validation": 1 << 40, "test": 2 << 40}


def draw_set(characters, out, train, validation, test, size=32):
    splits = {}
    for split, count in {"train": train, "validation": validation, "test": test}.items():
        # Classes by turns, so that every split is balanced; data.load() shuffles the training images.
        labels = np.arange(count) % len(characters)
        images = np.empty((count, size, size, 3), np.uint8)
        for i, label in enumerate(labels):
            images[i] = draw_glyph(label, FIRST_INDEX[split] + i, size, characters)
        splits[split] = images, labels
    save_arrays(out, list(characters), splits)


glyphs = functools.partial(draw_set, GLYPHS["glyphs"], train=5000, validation=1000, test=2000)
lower_case = functools.partial(draw_set, GLYPHS["lower_case"], train=1400, validation=700, test=1400)


def demo():
    glyphs(Path("data/glyphs.npz"))
    lower_case(Path("data/lower_case.npz"))


@functools.cache
def _glyph_mask(character, side):
    """The character in white on black, `side` pixels square, centered: drawn once, then only transformed."""
    # Pillow's own scalable font: nothing to install. The stroke keeps it readable at 32 pixels.
    mask, font, c = Image.new("L", (side, side)), ImageFont.load_default(size=0.8 * side), side / 2
    ImageDraw.Draw(mask).text((c, c), character, fill=255, font=font, anchor="mm", stroke_width=side / 20)
    return mask


def _placed(character, size, scale, angle, shear, x, y):
    """Mask of the character: `scale` times the image, rotated (radians), sheared, centered at x, y."""
    side = max(48, size)
    ratio = side / (scale * size)
    # Pillow wants the map from output to input, u = a·x + b·y + c and v = d·x + e·y + f: the inverse of
    # rotation · shear · scale. c and f make it take the glyph's place (x, y) to the mask's center.
    cos, sin = math.cos(angle) * ratio, math.sin(angle) * ratio
    a, b, d, e = cos - shear * -sin, sin - shear * cos, -sin, cos
    matrix = a, b, side / 2 - a * x - b * y, d, e, side / 2 - d * x - e * y
    mask = _glyph_mask(character, side)
    return mask.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def draw_glyph(label, index, size=32, characters=GLYPHS["glyphs"]):
    """One glyph -> uint8 H W 3, a pure function of its arguments. About .2 ms at 32 x 32."""
    rng = np.random.default_rng(index)
    # All numbers at once: one call of numpy costs more than many numbers.
    uniform = iter(rng.random(64).tolist())

    def between(low, high):
        return low + (high - low) * next(uniform)

    # A dark background and a glyph at least 90 gray levels lighter, and clutter of any color.
    colors = rng.integers(0, 256, (5, 3))
    while (colors[1] - colors[0]) @ (0.299, 0.587, 0.114) < 90:
        colors[:2] = rng.integers(0, 256, (2, 3))
    faint = colors[0] + 0.3 * (colors[1] - colors[0])
    back, fore, *dots, line = map(tuple, colors.tolist())
    canvas = Image.new("RGB", (size, size), back)
    draw = ImageDraw.Draw(canvas)

    # Clutter makes the set hard enough to tell models apart. Below the glyph: a faint piece of another
    # letter, and dots; above it: a thin line, and noise.
    other = characters[int(between(0, len(characters)))]
    piece = _placed(other, size, scale=between(0.5, 0.9), angle=between(-3, 3), shear=0, x=between(0, size),
                    y=between(0, size))
    canvas.paste(tuple(faint.astype(int).tolist()), (0, 0), piece)
    for color in dots:
        x, y, radius = between(0, size), between(0, size), between(0.02, 0.06) * size
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    glyph = _placed(characters[label], size, scale=between(0.85, 1.05), angle=between(-0.25, 0.25),
                    shear=between(-0.2, 0.2), x=between(0.45, 0.55) * size, y=between(0.45, 0.55) * size)
    canvas.paste(fore, (0, 0), glyph)
    draw.line([between(0, size) for _ in range(4)], fill=line, width=max(1, size // 32))
    noise = rng.integers(-10, 11, (size, size, 3), dtype=np.int16)
    return np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8)


# ---------- Renditions: a robustness set made out of any test set, as ImageNet-R is one of ImageNet


def renditions(out, folder):
    options = {"root": str(folder), "classes": None, "test_images": 0}
    save_folder(out, redrawn(data.load({"data": options}, "test"), rendition))


def tiny_imagenet_r(out, folder):
    """All classes of ImageNet-R. Evaluation takes those of the training set, by name."""
    names = data.class_folders(folder)
    images = data.read_folders(folder, names, names)
    save_folder(out, redrawn(images, lambda image, _: image.resize((64, 64))))


def redrawn(images, change):
    """change(image, index) of each image, in its class folder. The numbers keep the set's order."""
    for i, label in enumerate(images.labels.tolist()):
        yield f"{images.class_names[label]}/{i:06}.png", change(data.read_image(images.source(i)), i)


def rendition(image, index):
    """One of eight renditions of an RGB PIL image, chosen by its index alone."""
    # Not index % 8: glyphs' labels are index % K, and each class would have kinds of its own.
    kind = zlib.crc32(str(index).encode()) % len(RENDITIONS)
    return RENDITIONS[kind](image).convert("RGB")


RENDITIONS = (
    lambda image: ImageOps.autocontrast(image.filter(ImageFilter.FIND_EDGES)),  # neon outlines on black
    lambda image: image.convert("L").filter(ImageFilter.EMBOSS),  # relief
    lambda image: ImageOps.posterize(image, 1),  # two levels a channel
    lambda image: ImageOps.solarize(image, 128),  # bright parts inverted
    lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 20)),  # out of focus
    lambda image: image.convert("L").filter(ImageFilter.CONTOUR),  # pencil lines on white
    lambda image: ImageOps.autocontrast(image.convert("L"), cutoff=2).convert("1"),  # newsprint, dithered
    lambda image: ImageOps.invert(image.filter(ImageFilter.ModeFilter(5))),  # negative of a coarse painting
)

# ---------- Sets of others: each is refused if it is not all there, because it would train without a word

FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
           "Ankle boot"]


def fashion_mnist(out, folder=Path("/usr/share/datasets/fashion-mnist")):
    """Gray 28 x 28 images, zero padded to 32 x 32, the same in all three channels."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; install Debian's dataset-fashion-mnist, or give the folder "
                        "of its four .gz files.")
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        # Gzipped IDX files: a header of 4 bytes and 4 more for each dimension, then the values.
        files = [folder / f"{prefix}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
        images, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
        images, labels = images[16:].reshape(-1, 28, 28), labels[8:]
        # MNIST has files of the same names, and two files that do not belong together would train, badly.
        if len(labels) != len(images) or not len(labels) or labels.max() >= len(FASHION):
            raise ValueError(f"{prefix}: {len(images)} images and {len(labels)} labels up to {max(labels)}")
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))  # N H W
        splits[split] = np.repeat(images[..., None], 3, axis=3), labels  # N H W 3
    save_arrays(out, FASHION, splits)


def cifar100(out, folder):
    """CIFAR-100's binary version: records of coarse label, fine label, 3072 bytes (RGB planes of 32 x 32)."""
    splits = {}
    for split in ("train", "test"):
        raw = np.fromfile(folder / f"{split}.bin", np.uint8)
        # No header, so only length and fine labels, every 3074th byte from the second, can be checked.
        if not len(raw) or len(raw) % 3074 or raw[1::3074].max() > 99:
            raise ValueError(f"{split}.bin does not hold whole records")
        records = raw.reshape(-1, 3074)
        splits[split] = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 1]
    names = (folder / "fine_label_names.txt").read_text().split()
    if len(names) != 100:
        raise ValueError(f"fine_label_names.txt holds {len(names)} names")
    save_arrays(out, names, splits)


def cub(out, folder):
    """CUB-200-2011: three lists, joined by the image's number, say each file's class (from 1) and split."""
    file, label, train = (dict(line.split() for line in (folder / f"{name}.txt").read_text().splitlines())
                          for name in ("images", "image_class_labels", "train_test_split"))
    found = {(file[n].split("/")[0], int(label[n]), train[n]) for n in file}
    # Each class folder has one number, the numbers are 1, 2, 3 …, and each class is in both splits.
    numbers = {name: number for name, number, _ in found}
    whole = {(name, number, split) for name, number in numbers.items() for split in "01"}
    if not found or found != whole or sorted(numbers.values()) != [*range(1, len(numbers) + 1)]:
        raise ValueError("its lists lack classes or splits")
    splits, images = {"1": "train", "0": "test"}, {n: folder / "images" / file[n] for n in file}
    save_folder(out, [(f"{splits[train[n]]}/{image.parent.name}/{image.name}", image)
                      for n, image in images.items()])


def tiny_imagenet(out, folder):
    """train/ is linked as it is, val/ by class. It comes as one folder and a list of file, class and box."""
    train, val, flat = folder / "train", folder / "val", folder / "val/images"
    names = data.class_folders(train)
    data.read_folders(train, names, names)  # refuses what is empty or cannot be read
    # Many people have sorted val/ into classes, within images/ or beside it, and not all of them removed
    # what was there before.
    loose = {path.name for path in flat.glob("[!.]*") if not path.is_dir()}
    if loose and (val / "val_annotations.txt").is_file():
        lines = (val / "val_annotations.txt").read_text().splitlines()
        classes = dict(line.split()[:2] for line in lines)
        if odd := sorted(loose ^ classes.keys()):
            raise ValueError(f"only one of val/images/ and val/val_annotations.txt has {odd[0]}")
        found, links = {*classes.values()}, [(f"val/{classes[file]}/{file}", flat / file) for file in classes]
    else:
        val = flat if (flat / names[0]).is_dir() else val
        found = {*data.class_folders(val)} - {"images"}
        data.read_folders(val, sorted(found), sorted(found))
        links = [(f"val/{name}", val / name) for name in names]
    if odd := sorted(found ^ {*names}):
        raise ValueError(f"only one of {val} and train/ has the class {odd[0]}")
    save_folder(out, [("train", train), *links])


SETS = {"demo": demo, "glyphs": glyphs, "lower_case": lower_case, "fashion_mnist": fashion_mnist,
        "cifar100": cifar100, "cub": cub, "tiny_imagenet": tiny_imagenet, "renditions": renditions,
        "tiny_imagenet_r": tiny_imagenet_r}

if __name__ == "__main__":
    models.run(main)
