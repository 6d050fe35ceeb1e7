"""data.py – images for every stage: processes and device, sets and splits, batches, augmentation.

Sections 1 to 4 go with the method; the others can wait until you need them. Two ideas carry this file:
(1) Randomness has no state: every draw is a function of (seed, stage, epoch, position in the epoch). A killed
    run resumes exactly from a step number, and several processes see the images that one would see.
(2) Small sets (an .npz) live in memory, and whole batches are cropped and flipped on the device. Large sets
    (a folder) are read image by image in data-loader workers. tools/prepare.py converts other formats.

Axes: N images, B batch of one process, H = W image size, K classes. Images: uint8 N 3 H W.
"""

import atexit
import datetime
import functools
import gc
import itertools
import math
import multiprocessing
import multiprocessing.resource_tracker
import os
import random
import re
import reprlib
import signal
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset

# What asks a process to end: a scheduler, Ctrl-C, a closed terminal. Training saves first (models.Stage).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class UserError(ValueError):
    """Something the user can fix. The message is one sentence; the scripts print it and exit with code 2."""


# ---------- 1 Options: the block `data` of a config. A line is a key: its type, its default and its meaning

Count = Annotated[int, 1, 10**8]  # int and float alone mean a number from 0 up
Size = Annotated[int, 1, 4096]
Fraction = Annotated[float, 0, 1]
Divisor = Annotated[float, 1e-6, 1]


class DataKeys:
    root: str = ""  # a folder of train/<class>/* and test/ or else val/<class>/*, or an .npz (docs/extend.md)
    image_size: Size = 32  # pixels; images are square
    classes: Annotated[int, 2, 10**6] | None = None  # null: they are counted
    train_images: int = 0  # how many of the training images to use; 0: all
    validation_images: int | None = None  # held out of train; null: a tenth, at most 1,000; 0: none
    test_images: int = 0  # 0: all
    robustness: list[str] = []  # further test sets: a folder of <class name>/*, or a split of the .npz
    pad: Annotated[int, 0, 4096] = 0  # random crop after padding by so many pixels
    resized_crop: tuple[Fraction, Fraction] | None = None  # random resized crop: range of the area's share
    flip: Fraction = 0.0  # probability of a horizontal flip
    randaugment: Annotated[float, 0, 10] = 0.0  # magnitude; 9 in the paper
    erasing: Fraction = 0.0  # probability that a rectangle becomes noise
    mixup: float = 0.0  # α of Beta(α, α), from which the share of each of two images is drawn; 0: off
    cutmix: float = 0.0  # the same for the area of a box; with both on, a coin decides
    smoothing: Annotated[float, 0, 0.999] = 0.0  # this much of a label is spread over all classes
    repeats: Annotated[int, 1, 100] = 1  # repeated augmentation: views of an image in an epoch
    workers: Annotated[int, 0, 256] = 4  # data-loader workers per process, at most one a core
    # Of the three channels. timm's weights often want `half`.
    mean: Literal["imagenet", "half"] | tuple[Fraction, Fraction, Fraction] = "imagenet"
    std: Literal["imagenet", "half"] | tuple[Divisor, Divisor, Divisor] = "imagenet"


MEAN = {"imagenet": (0.485, 0.456, 0.406), "half": (0.5, 0.5, 0.5)}
STD = {"imagenet": (0.229, 0.224, 0.225), "half": (0.5, 0.5, 0.5)}

# ---------- 2 Processes and device: plain `python` is one process; torchrun says in the environment which one

# How long a process waits for the others. If one hangs, the rest must not keep their GPUs forever.
PATIENCE = datetime.timedelta(minutes=30)


class Setup(NamedTuple):
    device: torch.device
    rank: int
    world: int


def setup(device="auto"):
    """Device and process group of this process. A collective that waits longer than PATIENCE fails."""
    rank, world = environment("RANK", 0), environment("WORLD_SIZE", 1)
    complete = all(map(os.environ.get, ("RANK", "MASTER_ADDR", "MASTER_PORT")))
    if rank >= world or world > 1 and not (complete and environment("MASTER_PORT", 0) < 2**16):
        raise UserError("RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not complete: start with torchrun.")
    works = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        # Apple's GPU serves one process only: torch.distributed has no backend for it.
        device = "cuda" if works["cuda"] else "mps" if works["mps"] and world == 1 else "cpu"
    if not works[device]:
        raise UserError(f"device={device} does not work on this machine; use device=auto or device=cpu.")
    if device == "cuda":
        # One GPU per process; LOCAL_RANK counts the processes of one machine.
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UserError(f"There are more processes than GPUs ({torch.cuda.device_count()}).")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
        # TF32 for float32 products: three times the speed. The NAC's distance stays exact (models.distance).
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        # Python's own handler would wait until the other processes are there.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # After a restart torchrun's store still holds the old addresses: each attempt gets keys of its own.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
        gpu = torch.device(device) if device.startswith("cuda") else None
        dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE, store=store, rank=rank,
                                world_size=world, device_id=gpu)
    return Setup(torch.device(device), rank, world)


def environment(name, default):
    """A whole number that torchrun says in the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or name == "WORLD_SIZE" and not int(text):
        raise UserError(f"{name}={text!r} in the environment is no number that torchrun sets.")
    return int(text)


def agree(process, facts):
    """Raises UserError in all processes if one of them, with a folder or data of its own, has other facts."""
    everyone = [facts] * process.world
    if process.world > 1:
        dist.all_gather_object(everyone, facts)
    first, *others = everyone
    for rank, theirs in enumerate(others, 1):
        for key in first | theirs:
            if first.get(key) != theirs.get(key):
                key, here, there = differing(key, first.get(key), theirs.get(key))
                close()
                raise UserError(f"{key} is {here} for process 0, {there} for process {rank}: all need the "
                                "same output_dir, data and code.")


def differing(key, old, new):
    """A key and two values in short words. Of long lists the first place where they differ: key[6]."""
    if isinstance(old, list) and isinstance(new, list) and reprlib.repr(old) == reprlib.repr(new):
        pairs = enumerate(itertools.zip_longest(old, new))
        place, (old, new) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        key = f"{key}[{place}]"
    return key, reprlib.repr(old), reprlib.repr(new)


def sum_over_processes(tensor):
    """Adds up the processes' tensors, in place, and returns the sum; one process keeps its own."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def close():
    """Leaves the process group, if there is one, when nothing uses it any more."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # Its threads end with its last reference, and DistributedDataParallel is part of cycles. A thread
        # that is still at work when Python shuts down would abort the process.
        gc.collect()


# ---------- 3 Image sets and splits


class ImageSet:
    """N labeled images, in memory (uint8 N 3 H W) or as files (N paths). labels: N indices into class_names.

    present: K booleans, the classes that the model chooses among: all, or those that a robustness folder has.
    """

    def __init__(self, labels, class_names, images=None, files=None, present=None):
        self.labels, self.class_names = torch.as_tensor(labels, dtype=torch.long), list(class_names)
        self.images, self.files = images, files
        self.present = torch.ones(len(self.class_names), dtype=torch.bool) if present is None else present

    def __len__(self):
        return len(self.labels)

    def take(self, indices):
        """The images at `indices` (N integers), in that order, as an ImageSet."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        images = None if self.images is None else self.images[indices]
        files = None if self.files is None else [self.files[i] for i in indices.tolist()]
        return ImageSet(self.labels[indices], self.class_names, images, files, self.present)

    def checksum(self):
        """Of the labels, and of the images in memory or the files' names and sizes."""
        shown = repr([(Path(file).name, os.stat(file).st_size) for file in self.files or []]).encode()
        pixels = b"" if self.images is None else self.images.numpy()
        return f"{zlib.crc32(pixels, zlib.crc32(self.labels.numpy().tobytes() + shown)):08x}"

    def source(self, index):
        """What read_image() makes a picture of: a path, or uint8 H W 3."""
        return self.files[index] if self.images is None else self.images[index].permute(1, 2, 0).numpy()

    def ready(self, size):
        """Whether the images are in memory, and `size` pixels square already."""
        return self.images is not None and tuple(self.images.shape[-2:]) == (size, size)


def generator(*key):
    """A numpy generator that depends on the key alone; texts (stages) enter by their CRC."""
    # Python's own hash() of a text differs from process to process.
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in key])


def load(config, split, stage=None):
    """The images of one split -> ImageSet. Raises UserError where files or numbers do not fit.

    split: train, validation, test, or a robustness set of the config. The training images are shuffled by
    config["seed"]. The last `validation_images` of them are the validation set, unless an .npz has one of its
    own; the first `train_images` are the training set, and of these a stage sees train.<stage>.images.
    """
    options = config["data"]
    if split not in ("train", "validation"):
        return _test_set(options, split)
    own = "validation" in splits(options)
    pool, count = _pool(options, split if own else "train"), options[f"{split}_images"]
    order = np.random.default_rng(config["seed"]).permutation(len(pool))
    if not own:
        held_out = options["validation_images"]
        if held_out is None:
            held_out = max(1, min(1000, len(pool) // 10))
        # Validation from the end: it stays the same whatever train_images is.
        first = max(0, len(pool) - held_out)
        order = order[first:] if split == "validation" else order[:first]
    if count is None or split == "train" and count == 0:  # 0 training images: all; 0 for validation: none
        count = len(order)
    if count > len(order) or split == "train" and count == 0:
        raise UserError(f"data.train_images={options['train_images']} and data.validation_images="
                        f"{options['validation_images']} are more than the {len(pool)} images of "
                        f"{options['root']}; lower one of them.")
    order = order[:count]
    if stage is None:
        return pool.take(order)
    # A slice of the shuffled training set: disjoint slices share no image, equal slices are equal (few
    # labeled images here, many there). Several passes are so many copies.
    settings = config["train"][stage]
    first, stop = settings["images"] or (0, len(order))
    if not first < stop <= len(order):
        raise UserError(f"train.{stage}.images=[{first}, {stop}] is not a range of the {len(order)} training "
                        "images.")
    return pool.take(np.tile(order[first:stop], settings["passes"]))


def _test_set(options, split):
    """The test images, or a robustness set: a split of the .npz, or a folder matched by class names."""
    names, count = class_names(options), options["test_images"]
    if split == "test":
        return subset(_pool(options, split), count, "data.test_images")
    if split in splits(options):
        images = _pool(options, split)
    else:
        folder, count = Path(split), 0
        if not folder.is_dir():
            raise UserError(f"data.robustness={split!r} is neither a folder nor a split of data.root.")
        # Folders of other names are left out: the model cannot choose them.
        found = {*class_folders(folder)}
        if alike := nfc(found - {*names}) & nfc(names):
            raise UserError(f"data.robustness={split} has a folder whose name looks like class "
                            f"{min(alike)!r} (Unicode NFC, NFD); rename it.")
        images = read_folders(folder, names, sorted(found & {*names}))
    images.present = images.labels.bincount(minlength=len(names)) > 0
    if (classes := images.present.sum()) < 2:
        raise UserError(f"data.robustness={split} has images of {classes} of the training set's classes, "
                        f"such as {names[0]!r}; complete it, or rename its folders.")
    # It may be smaller than the test set.
    return subset(images, count if count < len(images) else 0, "data.test_images")


def subset(images, count, key):
    """`count` of the images, or all for 0. The same ones for every seed, to compare seeds on them."""
    if count > len(images):
        raise UserError(f"{key}={count} exceeds the {len(images)} test images; 0 takes all.")
    if not 0 < count < len(images):
        return images
    return images.take(np.sort(np.random.default_rng(0).permutation(len(images))[:count]))


# ---------- 4 Batches


def normalize(images, options):
    """uint8 … 3 H W -> float32, minus the mean, divided by the std of the options, on the images' device."""
    values = (table.get(str(options[key]), options[key]) for key, table in (("mean", MEAN), ("std", STD)))
    mean, std = (_on_device(tuple(v), images.device) for v in values)
    # In place, because memory traffic is what takes the time.
    return (images / 255).sub_(mean).div_(std)


@functools.cache
def _on_device(values, device):
    """Three numbers as a tensor 3 1 1, copied once: a copy makes the GPU wait."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def steps_per_epoch(length, batch, world, accumulate, stage):
    """Optimizer steps in an epoch. The incomplete last batch is dropped; each epoch is shuffled anew."""
    steps = length // (batch * world * accumulate)
    if not steps:
        raise UserError(f"train.{stage}.batch={batch} x {world} processes x accumulate={accumulate} is more "
                        f"than the {length} training images; lower train.{stage}.batch or add images.")
    return steps


def train_batches(imageset, config, stage, epoch, process, start_step=0):
    """Micro-batches of one epoch for this process, from optimizer step `start_step` on, `accumulate` a step.

    Yields images float32 B 3 H W (normalized) and soft targets float32 B K on the device. Micro-batch m is
    positions [m·B·world, (m+1)·B·world) of the epoch's order, and process r has the r-th B of them. So two
    processes with half the batch see the images of one, augmented alike.
    """
    options, settings = config["data"], config["train"][stage]
    key, batch, accumulate = (config["seed"], stage, epoch), settings["batch"], settings["accumulate"]
    steps = steps_per_epoch(len(imageset), batch, process.world, accumulate, stage)
    # Every process draws the whole order, the same one.
    order = generator(*key).permutation(len(imageset))
    # Repeated augmentation (1901.09335): an epoch shows N / repeats images, each in several views, and keeps
    # its length. The copies stand side by side, so they share a batch. Processes take positions in turn then,
    # so that they share the copies, too.
    order = order.repeat(options["repeats"])[:len(order)]
    # Earlier micro-batches are skipped without being drawn, because each depends on its number alone.
    batches = range(start_step * accumulate, steps * accumulate)
    total, own = batch * process.world, slice(process.rank * batch, (process.rank + 1) * batch)
    if options["repeats"] > 1:
        own = slice(process.rank, total, process.world)
    positions = np.arange(steps * accumulate * total).reshape(-1, total)[:, own]  # a row is a micro-batch
    # The number after m separates kinds of draws: 1 crops and flips, 2 mixes.
    if imageset.ready(options["image_size"]) and not (options["resized_crop"] or options["randaugment"]):
        pool = imageset.images.to(process.device)
        views = (_crop_and_flip(pool, order[positions[m]], options, generator(*key, m, 1), total, own)
                 for m in batches)
    else:
        requests = ([(order[p], repr((*key, p))) for p in positions[m].tolist()] for m in batches)
        views = _read(imageset, requests, options, process.device)
    # At once, because a copy makes the GPU wait.
    labels = imageset.labels[order[positions]].to(process.device)
    for m, images in zip(batches, views):
        images = normalize(images, options)
        for image, p in zip(images, positions[m].tolist()) if options["erasing"] else ():
            erase(image, options["erasing"], random.Random(repr((*key, p, "erase"))))
        # Partners for mixup and cutmix come from the process's own batch, with a draw of its own, as in timm.
        # With mixup two processes therefore train a little differently from one.
        yield mix(images, labels[m], options, generator(*key, m, 2, process.rank))


def _crop_and_flip(pool, indices, options, rng, total, own):
    """Images `indices` of the pool, moved by up to ±pad pixels (edges repeated) and flipped. uint8 B 3 H W"""
    pad, (height, width) = options["pad"], pool.shape[-2:]
    # Every process draws for all images of a step, `total`, and takes its own rows.
    dy, dx = (rng.integers(-pad, pad + 1, total)[own] for _ in range(2))
    flipped = (rng.random(total) < options["flip"])[own]
    # Shift and flip only say which row and column each pixel comes from: one indexing operation does both.
    rows = np.clip(np.arange(height) + dy[:, None], 0, height - 1)  # B H
    columns = np.clip(np.arange(width) + dx[:, None], 0, width - 1)  # B W
    columns = np.where(flipped[:, None], columns[:, ::-1], columns)
    places = (torch.from_numpy(v).to(pool.device, non_blocking=True) for v in (indices, rows, columns))
    image, rows, columns = places
    picked = pool.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None, :]]  # B H W 3
    return picked.permute(0, 3, 1, 2)


def mix(images, labels, options, rng):
    """Mixup (1710.09412), cutmix (1905.04899) and label smoothing of one batch, as in timm.

    images float B 3 H W, labels int64 B. Image b is mixed with image B-1-b. -> images, soft targets B K.
    """
    classes, smoothing, mixup, cutmix = (options[k] for k in ("classes", "smoothing", "mixup", "cutmix"))
    # y = (1-s) · onehot(label) + s / K
    targets = torch.full((len(labels), classes), smoothing / classes, device=images.device)
    targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)  # B K
    if cutmix > 0 and (mixup == 0 or rng.random() < 0.5):
        # A box of area 1 - λ, sides √(1-λ), around a uniform center. The border cuts part of it off, so λ is
        # computed again.
        height, width = images.shape[-2:]
        side = math.sqrt(1 - rng.beta(cutmix, cutmix))
        cut_h, cut_w = int(height * side), int(width * side)
        y, x = int(rng.integers(height)), int(rng.integers(width))
        top, bottom = max(y - cut_h // 2, 0), min(y + cut_h // 2, height)
        left, right = max(x - cut_w // 2, 0), min(x + cut_w // 2, width)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
        lam = 1 - (bottom - top) * (right - left) / (height * width)
    elif mixup > 0:
        # x'_b = λ x_b + (1-λ) x_{B-1-b},  λ ~ Beta(α, α)
        lam = rng.beta(mixup, mixup)
        mixed = lam * images + (1 - lam) * images.flip(0)
    else:
        return images, targets
    # y'_b = λ y_b + (1-λ) y_{B-1-b}
    return mixed, lam * targets + (1 - lam) * targets.flip(0)


def eval_batches(imageset, config, process):
    """This process's share of the set, images rank::world in order: each image once over all processes.

    Yields images float32 B 3 H W (normalized) and labels int64 B on the device. Shares and last batches are
    as long as they are: no image is dropped or repeated to make them equal.
    """
    share, options = np.arange(process.rank, len(imageset), process.world), config["data"]
    # Without gradients four times as many fit as in the stage that can bear least.
    batch = min(256, *(4 * c["batch"] for c in config["train"].values() if isinstance(c, dict)))
    batches = [share[k:k + batch] for k in range(0, len(share), batch)]
    if len(batches) == 1:  # not worth starting data-loader workers
        options = {**options, "workers": 0}
    if imageset.ready(options["image_size"]):
        views = (imageset.images[indices].to(process.device, non_blocking=True) for indices in batches)
    else:
        requests = ([(i, None) for i in indices.tolist()] for indices in batches)
        views = _read(imageset, requests, options, process.device)
    for indices, images in zip(batches, views):
        yield normalize(images, options), imageset.labels[indices].to(process.device, non_blocking=True)


# ---------- 5 Sets on disk


def splits(options):
    """The splits of an .npz; a folder has none beside training and test images."""
    root, end = Path(options["root"]), "_images"
    if root.suffix != ".npz":
        return []
    return [name.removesuffix(end) for name in read_npz(root) if name.endswith(end)]


def class_names(options):
    """The class names of a set, index = label."""
    root = Path(options["root"])
    if not options["root"] or not root.exists():
        raise UserError(f"data.root={options['root']!r} is not there: set it to a folder of train/<class>/*, "
                        f"or make the set, if it is known: python tools/prepare.py {root.stem or 'SET'} "
                        f"{options['root'] or 'FILE'}")
    names = _npz_names(root) if root.suffix == ".npz" else class_folders(root / "train")
    if options["classes"] not in (None, len(names)):
        raise UserError(f"data.classes={options['classes']}, but data.root={root} has {len(names)} classes.")
    return names


def identity(options):
    """What a set is known by, wherever it is: its class names, and a checksum of its training images.

    Of an .npz the checksum is over its arrays, of a folder over the names of its training files.
    """
    names, root = class_names(options), Path(options["root"])
    if root.suffix == ".npz":
        with zipfile.ZipFile(root) as archive:  # which holds a checksum of each array
            known = sorted((array.filename, array.CRC) for array in archive.infolist()
                           if re.fullmatch("(train|validation)_(images|labels).npy", array.filename))
    else:
        known = _listing(root / "train", tuple(names))[1]
    return {"data.class_names": names, "data.checksum": f"{zlib.crc32(repr(known).encode()):08x}"}


def _pool(options, split):
    """All images of a split as it is on disk: train, test, or another one of an .npz."""
    root, names = Path(options["root"]), class_names(options)
    if root.suffix != ".npz":
        return read_folders(root / "train" if split == "train" else _test_folder(root, names), names)
    images, labels = read_npz(root, f"{split}_images", f"{split}_labels")
    fine = images.dtype == np.uint8 and images.shape[3:] == (3,) and labels.shape == images.shape[:1]
    fine = fine and labels.dtype.kind in "iu" and images.size
    if not (fine and 0 <= labels.min() <= labels.max() < len(names)):
        raise UserError(f"{root}: {split}_images must be uint8 N H W 3, and {split}_labels N integers below "
                        f"{len(names)}.")
    if split in ("train", "test") and len(np.unique(labels)) < len(names):
        raise UserError(f"{root}: some class has no {split} images; leave its name out or complete it.")
    labels = labels.astype(np.int64)  # torch takes no big-endian numbers
    return ImageSet(labels, names, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())


def read_npz(path, *names):
    """Arrays of an .npz, or without names the names that it has. Nothing in it is executed."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names] if names else arrays.files
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own
        raise UserError(f"{path} is not an .npz that can be read ({error}).") from None


def _npz_names(path):
    [names] = read_npz(path, "class_names")
    if names.ndim != 1 or names.dtype.kind != "U" or len(nfc(names.tolist())) < max(2, len(names)):
        raise UserError(f"{path}: class_names must be at least two texts, no two of which look alike.")
    return names.tolist()


def _test_folder(root, names):
    """The folder of the test images, with the same class folders as train/ but none of its images."""
    folder = root / "test"
    _entries(root)  # refuses links to what is gone
    # ImageNet's own test/ has no labels: everyone's test accuracies are about val/.
    if not (folder.is_dir() and {entry.name for entry in _entries(folder)} & {*names}):
        folder = root / "val"
    if not folder.is_dir():
        raise UserError(f"{root} has neither test/<class>/* nor val/<class>/* for the test accuracy.")
    if odd := sorted({*class_folders(folder)} ^ {*names}):
        alike = ", some look alike: Unicode NFC, NFD" if len(nfc(odd)) < len(odd) else ""
        raise UserError(f"{folder} and {root / 'train'} must hold the same class folders, but only one of "
                        f"them has {odd[0]!r} ({len(odd)} such{alike}); complete data.root or remove the "
                        "folder.")
    own, train = (_listing(part, tuple(names))[0] for part in (folder, root / "train"))
    if both := own.keys() & train.keys():
        raise UserError(f"{min(both)} is in train/ and, by a link, in {folder.name}/ ({len(both)} such); "
                        "remove the link.")
    return folder


SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def _entries(folder):
    """What is in a folder, without hidden files. Raises UserError for what cannot be read."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}).") from None
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(f"{entry.path} is a link to something that is not there; repair or remove it.")
    return entries


def nfc(names):
    """The names as Unicode composes them: é may be one character or two, which look the same."""
    return {unicodedata.normalize("NFC", name) for name in names}


def class_folders(folder):
    """The sorted names of the folders in a folder, at least two."""
    entries = _entries(folder) if Path(folder).is_dir() else []
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if len(names) < 2:
        raise UserError(f"{folder} holds {len(names)} class folders; sort images into one folder per class, "
                        "and set data.root to the folder above it.")
    if len(nfc(names)) < len(names):
        raise UserError(f"{folder} has class folders whose names look alike (Unicode NFC, NFD); join them.")
    if loose := [one.path for one in entries if one.name.lower().endswith(SUFFIXES) and not one.is_dir()]:
        raise UserError(f"{loose[0]} is in no class ({len(loose)} such); move it into a class folder.")
    return names


def _image_files(folder, stop, others):
    """The image files below a folder, sub-folders and links to folders included: {real path: path}."""
    files, walked, folders = {}, set(), [(str(folder), os.path.realpath(folder))]
    while folders:
        path, real = folders.pop()
        for entry in sorted(_entries(path), key=lambda entry: entry.name):
            target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            if entry.is_dir():
                if target not in stop and target not in walked:
                    walked.add(target)
                    folders.append((entry.path, target))
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                files.setdefault(target, entry.path)
            else:
                others.append(entry.path)
    return files


@functools.lru_cache(maxsize=8)
def _listing(folder, found):
    """The class folders `found` -> {an image's real path: (its path, class name)}, a checksum.

    Listed once, since a stage asks for it many times. The checksum is over the files' names and over the
    beginning of each class's first image.
    """
    # A link to a class folder, of another split too, or to what is above it, would lead to other images.
    top, siblings = folder.resolve(), [folder.parent / split for split in ("train", "val", "test")]
    above = {str(top), *map(str, top.parents)}
    places = {place / name for place in (folder, *siblings) for name in ("", *found)}
    stop = above | {os.path.realpath(place) for place in places}
    listing, others = {}, []
    for name in found:
        if os.path.realpath(folder / name) in above:
            raise UserError(f"{folder / name} is a link to a folder that holds it; remove it.")
        files = _image_files(folder / name, stop, others)
        for real in sorted(files, key=files.get):
            if real in listing:
                raise UserError(f"{files[real]} and an image of class {listing[real][1]!r} are one file; "
                                "remove one of the two.")
            listing[real] = files[real], name
    if others:
        note(f"{folder}: {len(others)} files do not end like images and are not read, such as {others[0]}")
    names = "\n".join(path[len(str(folder)):] for path, _ in listing.values())
    checksum = zlib.crc32(names.encode(errors="surrogateescape"))
    for path in {name: path for path, name in reversed(listing.values())}.values():
        with open(path, "rb") as file:
            checksum = zlib.crc32(file.read(4096), checksum)
    return listing, checksum


def read_folders(folder, names, found=None):
    """The images of the class folders, labeled by place in `names`. None may be empty.

    found: the ones of these classes that a robustness set has; it need not have all.
    """
    listing = _listing(Path(folder), tuple(names if found is None else found))[0].values()
    label = {name: k for k, name in enumerate(names)}
    empty = label.keys() - {name for _, name in listing}
    if found is None and empty:
        raise UserError(f"{Path(folder, min(empty))} holds no images; complete it or remove the folder.")
    return ImageSet([label[name] for _, name in listing], names, files=[file for file, _ in listing])


@functools.cache
def note(text):
    """Prints a line once, on the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


# ---------- 6 Images one by one: read, cropped and distorted by Pillow in data-loader workers


class _Views(Dataset):
    """Batches of views, made in data-loader workers; a request is [(an image's index, its key), …]."""

    def __init__(self, imageset, options):
        self.imageset, self.options, self.parent = imageset, options, os.getpid()

    def begin(self, _):
        """A worker's first act. If its parent is dead already, torch's watchdog would not notice."""
        if multiprocessing.get_start_method() == "fork" and os.getppid() != self.parent:
            os._exit(1)

    def __getitem__(self, request):
        views = []
        try:
            for i, key in request:
                views.append(view(read_image(self.imageset.source(i)), self.options, key))
        except UserError as error:
            # Raised here, the sentence would be buried in a traceback of the loader's: _read raises it.
            return error
        views = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()  # B H W 3 -> B 3 H W
        try:  # here, because the thread that sends it would lose the batch without a word
            return views.share_memory_() if torch.utils.data.get_worker_info() else views
        except RuntimeError as error:
            return UserError(f"/dev/shm is too small ({error}); data.workers=0 does without it.")


@functools.cache
def _workers_end_with_process():
    """At exit Python would send SIGTERM and wait, but workers do not hear it (see _read)."""
    def end():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as failed
        for worker in multiprocessing.active_children():
            worker.kill()

    atexit.register(end)


def _read(imageset, requests, options, device):
    """Batches of (index, key) -> uint8 B 3 H W on the device, in order. UserError names a bad image."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A request is a batch already, hence batch_size=None. The generator is the loader's own, because it draws
    # a number for its workers, which must not move torch's global state.
    dataset = _Views(imageset, options)
    loader = DataLoader(dataset, batch_size=None, sampler=requests, worker_init_fn=dataset.begin,
                        num_workers=min(options["workers"], cores), pin_memory=device.type == "cuda",
                        generator=torch.Generator())
    # A longer one would cut off the names of the workers' sockets.
    if loader.num_workers and len(os.fsencode(tempfile.gettempdir())) > 70:
        raise UserError(f"TMPDIR={tempfile.gettempdir()} is too long a path for data-loader workers: set a "
                        "shorter one, or data.workers=0.")
    if loader.num_workers and multiprocessing.get_start_method() != "fork":
        multiprocessing.resource_tracker.ensure_running()  # its start would unblock them
    _workers_end_with_process()
    # Workers inherit blocked signals. These go to all processes of a job, and the one that trains needs its
    # workers until it has saved.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    views = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        for images in views:
            if isinstance(images, UserError):
                raise images
            # From pinned memory, so that the next batch is copied to the GPU while it computes.
            yield images.to(device, non_blocking=True)
    except FileNotFoundError:  # which names no file
        raise UserError(f"The data-loader workers' sockets in {tempfile.gettempdir()}/pymp-* were deleted; "
                        "set TMPDIR to a folder that nobody cleans.") from None


def read_image(source):
    """An image file of any color mode, or uint8 H W 3 -> RGB PIL image. UserError names a bad file."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(source))
    try:
        with Image.open(source) as image:
            image.load()
            if image.mode[0] in "IF":
                image = _gray(np.asarray(image), image.mode)
            # Dropping alpha would uncover whatever color lies below: the image is put on white.
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except MemoryError:
        raise UserError(f"{source} takes more memory than there is; make it smaller or remove it.") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, …
        raise UserError(f"{source} is not a readable image ({error}); replace or remove it.") from None


def _gray(pixels, mode):
    """Gray of 16 or 32 bits or floats -> 8 bits, which Pillow itself would clip; ValueError if in doubt."""
    low, high = pixels.min(), pixels.max()
    if mode == "F" and 0 <= low <= high <= 1:
        pixels = pixels * 255
    elif mode != "F" and 0 <= low and 4096 <= high <= 65535:  # a lower maximum may be one of 12 bits
        pixels = pixels // 257
    elif mode.startswith("I;16") and high or not 0 <= low <= high <= 255 or 0 < high < 32:
        raise ValueError(f"mode {mode} with values from {low} to {high}; convert it to 8 bits")
    return Image.fromarray(pixels.round().astype(np.uint8))


def center_crop(image, size):
    """Resizes the shorter side to 256/224 · size (to `size` itself at 32 px or less) and crops the center."""
    short = size if size <= 32 else int(size * 256 / 224)
    # Small images that have their size already stay as they are, pixel for pixel.
    if image.size == (size, size) == (short, short):
        return image
    if max(image.size) > 4 * min(image.size):  # most of a long, thin image would be resized for nothing
        half, (x, y) = 2 * min(image.size), (side / 2 for side in image.size)
        image = image.crop((max(0, x - half), max(0, y - half), min(2 * x, x + half), min(2 * y, y + half)))
    # At least `short`: rounding must not leave a side that is smaller than the crop.
    width, height = (max(short, round(side * short / min(image.size))) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def view(image, options, key):
    """A view of one image -> uint8 H W 3. Training's, drawn from its key: crop, flip, RandAugment."""
    if key is None:  # evaluation's
        return np.asarray(center_crop(image, options["image_size"]))
    rng, size, pad = random.Random(key), options["image_size"], options["pad"]
    if options["resized_crop"]:
        box = resized_crop_box(image.width, image.height, options["resized_crop"], rng)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    else:
        image = center_crop(image, size)
    if pad:  # as _crop_and_flip does for whole batches
        rows, columns = (np.clip(np.arange(size) + rng.randint(-pad, pad), 0, size - 1) for _ in range(2))
        image = Image.fromarray(np.asarray(image)[rows][:, columns])
    if rng.random() < options["flip"]:
        image = ImageOps.mirror(image)
    if options["randaugment"]:
        image = randaugment(image, options["randaugment"], rng)
    return np.asarray(image)


def _box(area, low, high, ratio, rng):
    """Height and width of a random box: share low … high of the area, aspect 1/ratio … ratio, log-uniform."""
    area *= rng.uniform(low, high)
    # Area A and aspect r = w / h: w = √(A r), h = √(A / r)
    aspect = math.exp(rng.uniform(-math.log(ratio), math.log(ratio)))
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def resized_crop_box(width, height, scale, rng):
    """Random resized crop (1409.4842), 10 tries -> left, top, right, bottom in pixels, to be resized."""
    for _ in range(10):
        h, w = _box(width * height, *scale, 4 / 3, rng)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    # The image is long and thin: the largest centered box of an allowed aspect.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def erase(image, probability, rng):
    """Random erasing (1708.04896) of a normalized image 3 H W, in place: a box becomes N(0, 1). 10 tries."""
    height, width = image.shape[-2:]
    for _ in range(10 if rng.random() < probability else 0):
        h, w = _box(height * width, 0.02, 1 / 3, 10 / 3, rng)
        if 0 < h < height and 0 < w < width:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            # Drawn on the CPU, so that the noise is the same on every device.
            noise = torch.randn(3, h, w, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
            image[:, top:top + h, left:left + w] = noise.to(image.device, non_blocking=True)
            break
    return image


def randaugment(image, magnitude, rng):
    """Two of OPERATIONS, drawn with replacement, each with p = .5 at level magnitude + N(0, .5) in 0 … 10."""
    for operation in rng.choices(list(OPERATIONS.values()), k=2):
        if rng.random() < 0.5:
            image = operation(image, min(10, max(0, rng.gauss(magnitude, 0.5))), rng.choice((-1, 1)))
    return image


# Color of what a rotation, shear or translation moves into the image: ImageNet's mean.
FILL = tuple(round(255 * m) for m in MEAN["imagenet"])


def _affine(image, *matrix):
    # The six numbers a … f: output pixel (x, y) is the input's (a x + b y + c, d x + e y + f).
    affine, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return image.transform(image.size, affine, matrix, bicubic, fillcolor=FILL)


# RandAugment (1909.13719) as timm's "increasing" set: each operation gets worse with the level m in 0 … 10.
# An operation is a function (image, m, sign) -> image; sign is -1 or 1, ignored where there is no direction.
OPERATIONS = {
    "AutoContrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, m, sign: ImageOps.equalize(image),
    "Invert": lambda image, m, sign: ImageOps.invert(image),
    "Rotate": lambda image, m, sign: image.rotate(sign * 3 * m, Image.Resampling.BICUBIC, fillcolor=FILL),
    # The lower bits are cleared. At m = 10 these are all eight, which Pillow's own posterize refuses to do.
    "Posterize": lambda image, m, sign: image.point(lambda v: v & ~(2 ** (4 + int(0.4 * m)) - 1)),
    "Solarize": lambda image, m, sign: ImageOps.solarize(image, 256 - int(25.6 * m)),
    "SolarizeAdd": lambda image, m, sign: image.point(lambda v: min(255, v + int(11 * m) * (v < 128))),
    # Pillow's factor 1 leaves the image alone, 0 takes color, contrast, … away.
    "Color": lambda image, m, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.09 * m),
    "Contrast": lambda image, m, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.09 * m),
    "Brightness": lambda image, m, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.09 * m),
    "Sharpness": lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.09 * m),
    "ShearX": lambda image, m, sign: _affine(image, 1, sign * 0.03 * m, 0, 0, 1, 0),
    "ShearY": lambda image, m, sign: _affine(image, 1, 0, 0, sign * 0.03 * m, 1, 0),
    "TranslateX": lambda image, m, sign: _affine(image, 1, 0, sign * 0.045 * m * image.width, 0, 1, 0),
    "TranslateY": lambda image, m, sign: _affine(image, 1, 0, 0, 0, 1, sign * 0.045 * m * image.height),
}
