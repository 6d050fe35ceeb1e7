"""prepare.py – makes sets of images into what data.py reads: an .npz of arrays, or folders of image files.

    python tools/prepare.py demo                            data/glyphs.npz and data/lower_case.npz, drawn
    python tools/prepare.py glyphs OUT.npz [train=N] [validation=N] [test=N] [size=S]; likewise lower_case
    python tools/prepare.py fashion_mnist OUT.npz [FOLDER]  without FOLDER: Debian's dataset-fashion-mnist
    python tools/prepare.py cifar100 OUT.npz FOLDER         of the binary version
    python tools/prepare.py cub OUT FOLDER                  links, sorted into splits and classes
    python tools/prepare.py tiny_imagenet OUT FOLDER        links, likewise
    python tools/prepare.py renditions OUT FOLDER           the test images of a folder, redrawn
    python tools/prepare.py tiny_imagenet_r OUT FOLDER      ImageNet-R, squashed to 64 x 64 pixels

An .npz also holds renditions of its test images, and replaces an old one; a folder must be new or empty.
"""

import functools
import gzip
import inspect
import math
import re
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import models


def main():
    name, *words = sys.argv[1:] or [""]
    numbers = {key: int(n) for word in words for key, n in re.findall("^([a-z]+)=([1-9][0-9]*)$", word)}
    paths = [Path(word) for word in words if word.rpartition("=")[0] not in numbers]
    try:
        inspect.signature(SETS[name]).bind(*paths, **numbers)
    except (KeyError, TypeError):
        print(__doc__, file=sys.stderr)
        raise data.UserError(f"{' '.join(sys.argv[1:])!r} is none of these commands.") from None
    try:
        SETS[name](*paths, **numbers)
    except data.UserError:
        raise
    except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error, KeyError, ValueError) as error:
        raise data.UserError(f"{' '.join(words)}: not the whole of {name} as unpacked ({error}).") from None


def save_arrays(out, class_names, splits):
    """Writes {split: (images uint8 N H W 3, labels N)}, and renditions of the test images, as an .npz."""
    if out.suffix != ".npz":
        raise data.UserError(f"{out} must end in .npz.")
    arrays = {"class_names": np.array(class_names)}
    for split, (images, labels) in splits.items():
        # Files that do not belong together would train, badly; MNIST's have the names of Fashion-MNIST's.
        if len(labels) != len(images) or max(labels) >= len(class_names):
            raise ValueError(f"{split}: {len(images)} images and {len(labels)} labels up to {max(labels)}")
        arrays |= {f"{split}_images": images, f"{split}_labels": labels.astype(np.int64)}
    drawn = [rendition(Image.fromarray(image), i) for i, image in enumerate(arrays["test_images"])]
    arrays |= {"renditions_images": np.stack(drawn), "renditions_labels": arrays["test_labels"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    models.write(out, lambda file: np.savez(file, **arrays))


def save_folder(out, files):
    """Writes [(path within `out`, a PIL image, or the path that a link shall lead to), …]."""
    out = out.resolve()
    if out.exists() and any(out.iterdir()):
        raise data.UserError(f"{out} is not empty.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        for path, content in files:
            file = Path(temporary, out.name, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Image.Image):
                content.save(file)
            else:
                file.symlink_to(content.resolve(strict=True))
        Path(temporary, out.name).replace(out)


# ---------- Glyphs: drawn here, so that the demo needs no download

# No pair that a small rotation or shear turns into each other (O Q 0, I 1, U V …). `lower_case`, for
# few-shot, has no letter that is a small capital: no model has seen its classes.
GLYPHS, LOWER_CASE = "ABCDEFGHJKLMNPRSTWXYZ347", "abdefghijmnqrt"


def draw_set(characters, out, train, validation, test, size=32):
    splits = {}
    for k, (split, count) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        labels, first = np.arange(count) % len(characters), k << 40  # splits never share a glyph's index
        images = [draw_glyph(label, first + i, size, characters) for i, label in enumerate(labels)]
        splits[split] = np.stack(images), labels
    save_arrays(out, list(characters), splits)


glyphs = functools.partial(draw_set, GLYPHS, train=5000, validation=1000, test=2000)
lower_case = functools.partial(draw_set, LOWER_CASE, train=1400, validation=700, test=1400)


def demo():
    glyphs(Path("data/glyphs.npz"))
    lower_case(Path("data/lower_case.npz"))


@functools.cache
def _glyph_mask(character, side):
    """The character in white on black, `side` pixels square, centered: drawn once, then only transformed."""
    mask, font = Image.new("L", (side, side)), ImageFont.load_default(size=0.8 * side)  # Pillow's own font
    # The stroke keeps it readable at 32 pixels.
    ImageDraw.Draw(mask).text((side / 2, side / 2), character, 255, font, "mm", stroke_width=side / 20)
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


def draw_glyph(label, index, size=32, characters=GLYPHS):
    """One glyph -> uint8 H W 3, a pure function of its arguments."""
    rng = np.random.default_rng(index)
    uniform = iter(rng.random(64).tolist())  # at once, because each call of numpy costs more

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

    # Clutter makes the set hard: a faint piece of a letter and dots below the glyph, a line and noise above.
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


# ---------- Renditions: a robustness set made out of a test set


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

# ---------- Sets of others: each is refused if it is not all there

FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")


def fashion_mnist(out, folder=Path("/usr/share/datasets/fashion-mnist")):
    """Gray 28 x 28 images, zero padded to 32 x 32, the same in all three channels."""
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        # Gzipped IDX files: a header of 4 bytes and 4 more for each dimension, then the values.
        files = [folder / f"{prefix}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
        images, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
        images = np.pad(images[16:].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))  # N H W
        splits[split] = np.repeat(images[..., None], 3, axis=3), labels[8:]  # N H W 3
    save_arrays(out, FASHION, splits)


def cifar100(out, folder):
    """CIFAR-100's binary version: records of coarse label, fine label, 3072 bytes (RGB planes of 32 x 32)."""
    names, splits = (folder / "fine_label_names.txt").read_text().split(), {}
    for split in ("train", "test"):
        records = np.fromfile(folder / f"{split}.bin", np.uint8).reshape(-1, 3074)
        splits[split] = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 1]
    save_arrays(out, names, splits)


def cub(out, folder):
    """CUB-200-2011: two lists, joined by the image's number, say each file's class folder and split."""
    files, train = (dict(line.split() for line in (folder / f"{name}.txt").read_text().splitlines())
                    for name in ("images", "train_test_split"))
    if files.keys() != train.keys():
        raise ValueError("images.txt and train_test_split.txt do not list the same images")
    splits = {"1": "train", "0": "test"}
    save_folder(out, [(f"{splits[train[n]]}/{file}", folder / "images" / file) for n, file in files.items()])


def tiny_imagenet_r(out, folder):
    """All classes of ImageNet-R. Evaluation takes those of the training set, by name."""
    names = data.class_folders(folder)
    files = data.read_folders(folder, names).files
    save_folder(out, ((f"{Path(file).relative_to(folder).parts[0]}/{i:06}.png",
                       data.read_image(file).resize((64, 64))) for i, file in enumerate(files)))


def tiny_imagenet(out, folder):
    """train/ is linked as it is, val/ by class. It comes as one folder and a list of file, class and box."""
    names, flat = data.class_folders(folder / "train"), folder / "val/images"
    data.read_folders(folder / "train", names)  # refuses what is empty or cannot be read
    lines = (folder / "val/val_annotations.txt").read_text().splitlines()
    classes = dict(line.split()[:2] for line in lines)
    if odd := {path.name for path in flat.glob("[!.]*")} ^ classes.keys() or {*classes.values()} ^ {*names}:
        raise ValueError(f"val/ is odd at {min(odd)}; a val/ that is sorted by class needs no preparation")
    images = [(f"val/{name}/{file}", flat / file) for file, name in classes.items()]
    save_folder(out, [("train", folder / "train"), *images])


def renditions(out, folder):
    """A robustness set for a folder of images, as the .npz have one."""
    test = data.load({"data": {"root": str(folder), "classes": None, "test_images": 0}}, "test")
    names = [f"{test.class_names[label]}/{i:06}.png" for i, label in enumerate(test.labels.tolist())]
    images = (rendition(data.read_image(test.source(i)), i) for i in range(len(test)))
    save_folder(out, zip(names, images))


SETS = {"demo": demo, "glyphs": glyphs, "lower_case": lower_case, "fashion_mnist": fashion_mnist,
        "cifar100": cifar100, "cub": cub, "tiny_imagenet": tiny_imagenet, "renditions": renditions,
        "tiny_imagenet_r": tiny_imagenet_r}

if __name__ == "__main__":
    models.run(main)
