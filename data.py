"""data.py – images for every stage: processes and device, sets and splits, batches, augmentation.

Sections 1 to 4 go with the method; the others can wait until you need them. Two ideas carry this file:
(1) Randomness has no state: every draw is a function of (seed, stage, epoch, position in the epoch). A killed
    run resumes exactly from a step number, and several processes see the images that one would see.
(2) Small sets live in memory as uint8, and whole batches are cropped and flipped on the device. Large sets
    are read image by image in data-loader workers.

Axes: N images, B batch of one process, H = W image size, K classes. Images: uint8 N 3 H W.
"""

import atexit
import datetime
import functools
import gc
import gzip
import math
import multiprocessing
import multiprocessing.resource_tracker
import os
import random
import signal
import sys
import zlib
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset


class UserError(ValueError):
    """Something the user can fix. The message is one sentence; the scripts print it and exit with code 2."""


# ---------- 1 Options: the block `data` of a config. A line is a key: its type, its default and its meaning

Count = Annotated[int, 1, 10**8]  # int and float alone mean a number from 0 up
Size = Annotated[int, 1, 4096]
Share = Annotated[float, 0, 1]
CLASSES = {"glyphs": 24, "lower_case": 14, "fashion_mnist": 10, "tiny_imagenet": 200, "imagenet": 1000,
           "cifar100": 100, "cub": 200}
TRAIN_IMAGES = {"fashion_mnist": 60000, "tiny_imagenet": 100000, "imagenet": 1281167, "cifar100": 50000,
                "cub": 5994}
DRAWN = ("glyphs", "lower_case")  # sets of any size, drawn by Pillow
Set = Literal[(*CLASSES, "folder")]


class Data:
    set: Set = "glyphs"
    root: str = ""  # folder of the set's files; empty: where Debian's package puts them, if there is one
    image_size: Size = 32  # pixels; images are square
    classes: Annotated[int, 2, 10**6] | None = None  # null: what the set has; those of a folder are counted
    train_images: int = 0  # how many to use, or to draw (glyphs); 0: all
    validation_images: Count | None = None  # held out of train; null: a tenth, at most 1,000
    test_images: int = 0  # 0: all
    robustness: list[str] = []  # further test sets: renditions, or a folder of <class name>/*
    pad: Annotated[int, 0, 4096] = 0  # random crop after padding by so many pixels
    resized_crop: tuple[Share, Share] | None = None  # random resized crop: range of the area's share
    flip: Share = 0.0  # probability of a horizontal flip
    randaugment: Annotated[float, 0, 10] = 0.0  # magnitude; 9 in the paper
    erasing: Share = 0.0  # probability that a rectangle becomes noise
    mixup: float = 0.0  # α of Beta(α, α), from which the share of each of two images is drawn; 0: off
    cutmix: float = 0.0  # the same for the area of a box; with both on, a coin decides
    smoothing: Annotated[float, 0, 0.999] = 0.0  # this much of a label is spread over all classes
    repeats: Annotated[int, 1, 100] = 1  # repeated augmentation: views of an image in an epoch
    workers: Annotated[int, 0, 256] = 4  # data-loader workers per process, at most one a core
    # Of the three channels. null: what a given checkpoint tells, else ImageNet's; timm often wants `half`.
    mean: Literal["imagenet", "half"] | tuple[Share, Share, Share] | None = None
    std: Literal["imagenet", "half"] | tuple[Share, Share, Share] | None = None


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
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    complete = world == 1 or {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not (0 <= rank < world and complete):
        raise UserError(f"RANK={rank}, WORLD_SIZE={world}, MASTER_ADDR and MASTER_PORT are not complete: "
                        "start with torchrun.")
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
            raise UserError(f"more processes were started than this machine has GPUs, "
                            f"{torch.cuda.device_count()}.")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
        # TF32 for float32 products: three times the speed. The NAC's distance stays exact (models.distance).
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        # After a restart torchrun's store still holds the old addresses: each attempt gets keys of its own.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
        gpu = torch.device(device) if device.startswith("cuda") else None
        dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE, store=store, rank=rank,
                                world_size=world, device_id=gpu)
    return Setup(torch.device(device), rank, world)


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

    present: None, or the only classes that this set has. The model then chooses among these alone, which is
    how ImageNet-R's published numbers are made. rendition: whether evaluation draws a rendition of each file.
    """

    def __init__(self, labels, class_names, images=None, files=None, present=None, rendition=False):
        self.labels, self.class_names = torch.as_tensor(labels, dtype=torch.long), list(class_names)
        self.images, self.files, self.present, self.rendition = images, files, present, rendition
        self.views = {}  # see eval_batches

    def __len__(self):
        return len(self.labels)

    def take(self, indices):
        """The images at `indices` (N integers), in that order, as an ImageSet."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        images = None if self.images is None else self.images[indices]
        files = None if self.files is None else [self.files[i] for i in indices.tolist()]
        return ImageSet(self.labels[indices], self.class_names, images, files, self.present, self.rendition)

    def source(self, index):
        """What read_image() makes a picture of: a path, or uint8 H W 3."""
        return self.files[index] if self.images is None else self.images[index].permute(1, 2, 0).numpy()

    def fits(self, size):
        """Whether the images are in memory, and of this size already."""
        return self.images is not None and tuple(self.images.shape[-2:]) == (size, size)


def _rng(*key):
    """A numpy generator that depends on the key alone; texts (stages) enter by their CRC."""
    # Python's own hash() of a text differs from process to process.
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in key])


def load(config, split, stage=None):
    """The images of one split -> ImageSet. Raises UserError where files or numbers do not fit.

    split: train, validation, test, renditions (the test images, redrawn), or a folder of <class name>/*.
    One permutation, seeded by config["seed"], cuts the training pool: its last `validation_images` are the
    validation set, the first `train_images` of the rest are the training set, and of these a stage sees
    train.<stage>.images. Glyphs are drawn, each split from indices of its own.
    """
    options = config["data"]
    if split in ("test", "renditions"):
        test = _some(_pool(options, "test"), options["test_images"])
        return renditions(test) if split == "renditions" else test
    if split not in ("train", "validation"):
        return _robustness(Path(split), class_names(options))
    pool = _pool(options, split)
    order = np.random.default_rng(config["seed"]).permutation(len(pool))
    if options["set"] not in DRAWN:
        count, rest = options["train_images"], len(pool) - held_out(options, len(pool))
        if max(count, 1) > rest:
            raise UserError(f"data.train_images={count} and {len(pool) - rest} for validation are more than "
                            f"the {len(pool)} images of {options['set']}; lower one of them.")
        # Validation from the end: it stays the same whatever train_images is.
        order = order[rest:] if split == "validation" else order[:rest][:count or None]
    if split == "validation" or stage is None:
        return pool.take(order)
    # A slice of the shuffled training set: disjoint slices share no image, equal slices are equal (few
    # labeled images here, many there). Several passes are so many copies.
    settings = config["train"][stage]
    first, stop = settings["images"] or (0, len(order))
    if not first < stop <= len(order):
        raise UserError(f"train.{stage}.images=[{first}, {stop}] is not a range within the {len(order)} "
                        "training images; choose 0 <= first < stop <= that number.")
    return pool.take(np.tile(order[first:stop], settings["passes"]))


def _some(test, count):
    """`count` of the test images, or all for 0. The same ones for every seed, to compare seeds on them."""
    if count > len(test):
        raise UserError(f"data.test_images={count} exceeds the {len(test)} test images; 0 takes all.")
    if not 0 < count < len(test):
        return test
    return test.take(np.sort(np.random.default_rng(0).permutation(len(test))[:count]))


def held_out(options, pool):
    """How many of the training pool's images are validation images."""
    return options["validation_images"] or max(1, min(1000, pool // 10))


def epoch_images(config, stage):
    """The number of images in an epoch of a stage. Only a folder's files are looked at."""
    options, settings = config["data"], config["train"][stage]
    images = options["train_images"]
    if options["set"] not in DRAWN and not images:
        whole = options["classes"] in (None, CLASSES.get(options["set"]))  # no subset of the classes
        pool = whole and TRAIN_IMAGES.get(options["set"]) or len(_pool(options, "train"))
        images = max(0, pool - held_out(options, pool))
    first, stop = settings["images"] or (0, images)
    return max(0, min(images, stop) - first) * settings["passes"]


def class_names(options):
    """The class names of a set, index = label."""
    return _pool(options, "test").class_names


def _pool(options, split):
    """All images that a split is cut from. Train and validation share one pool, unless they are drawn."""
    if options["set"] in DRAWN:
        return _glyphs(options, split)
    readers = {"fashion_mnist": _fashion_mnist, "cifar100": _cifar100, "cub": _cub}
    pool = readers.get(options["set"], _folders)(options, "test" if split == "test" else "train")
    if options["classes"] not in (None, len(pool.class_names)):
        raise UserError(f"data.classes={options['classes']}, but {options['set']} in data.root="
                        f"{options['root']!r} has {len(pool.class_names)} classes.")
    return pool


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


def steps_per_epoch(length, batch, world, accumulate, stage="<stage>"):
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
    order = _rng(*key).permutation(len(imageset))
    # Repeated augmentation (1901.09335): an epoch shows N / repeats images, each in several views, and keeps
    # its length. The copies stand side by side, so they share a batch.
    order = order.repeat(options["repeats"])[:len(order)]
    # Earlier micro-batches are skipped without being drawn, because each depends on its number alone.
    batches = range(start_step * accumulate, steps * accumulate)
    total, own = batch * process.world, slice(process.rank * batch, (process.rank + 1) * batch)
    positions = {m: np.arange(m * total, (m + 1) * total)[own] for m in batches}
    # The number after m separates kinds of draws: 1 crops and flips, 2 mixes.
    if imageset.fits(options["image_size"]) and not (options["resized_crop"] or options["randaugment"]):
        pool = imageset.images.to(process.device)
        views = (_crop_and_flip(pool, order[positions[m]], options, _rng(*key, m, 1), total, own)
                 for m in batches)
    else:
        views = _read(([(imageset.source(order[p]), repr((*key, p))) for p in positions[m].tolist()]
                       for m in batches), options, augment, process.device)
    labels = imageset.labels[order].to(process.device)  # once an epoch, because a copy makes the GPU wait
    for m, images in zip(batches, views):
        images = normalize(images, options)
        for image, p in zip(images, positions[m].tolist()) if options["erasing"] else ():
            erase(image, options["erasing"], random.Random(repr((*key, p, "erase"))))
        # Partners for mixup and cutmix come from the process's own batch, with a draw of its own, as in timm.
        # With mixup two processes therefore train a little differently from one.
        yield mix(images, labels[m * total:][own], options, _rng(*key, m, 2, process.rank))


def _crop_and_flip(pool, indices, options, rng, total, own):
    """Images `indices` of the pool, moved by up to ±pad pixels (edges repeated) and flipped. uint8 B 3 H W"""
    pad, (height, width) = options["pad"], pool.shape[-2:]
    # Every process draws for all images of a step, `total`, and takes its own rows.
    dy, dx = (rng.integers(-pad, pad + 1, total)[own] for _ in range(2))
    flipped = (rng.random(total) < options["flip"])[own]
    # Shift and flip only say which row and column each pixel comes from, so one indexing operation does both,
    # for a batch of images that each move differently. A place outside is clipped to the edge.
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
        # computed again: the target must say how much of each image is really seen.
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


SMALL = 2**28  # bytes; Tiny-ImageNet's 10,000 validation images at 64 pixels take 123 MB


def eval_batches(imageset, config, process, batch=256):
    """This process's share of the set, images rank::world in order: each image once over all processes.

    Yields images float32 B 3 H W (normalized) and labels int64 B on the device. Shares and last batches are
    as long as they are: no image is dropped or repeated to make them equal. A small set is read once:
    a validation set comes back after every epoch.
    """
    share, options = np.arange(process.rank, len(imageset), process.world), config["data"]
    batches = [share[k:k + batch] for k in range(0, len(share), batch)]
    size, key, kept = options["image_size"], (process, options["image_size"], batch), []
    if imageset.fits(size):
        views = (imageset.images[indices].to(process.device, non_blocking=True) for indices in batches)
    elif key in imageset.views:
        views = imageset.views[key]
    else:
        views = _read(([(imageset.source(i), i if imageset.rendition else None) for i in indices.tolist()]
                       for indices in batches), options, center_view, process.device)
    for indices, images in zip(batches, views):
        if imageset.files and len(share) * 3 * size**2 < SMALL:
            kept.append(images)
        yield normalize(images, options), imageset.labels[indices].to(process.device, non_blocking=True)
    if kept:
        imageset.views[key] = kept


# ---------- 5 Few-shot episodes


def episodes(labels, ways, shots, queries, count, seed):
    """`count` few-shot episodes out of a set's labels (N): a pure function of the arguments.

    -> support (count, ways·shots) and query (count, ways·queries), indices into the set, class by class.
    """
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    members = [indices for indices in members if len(indices) >= shots + queries]
    if len(members) < ways:
        raise UserError(f"few_shot.ways={ways}, but {len(members)} classes have the {shots + queries} images "
                        f"of {shots} shots and {queries} queries; lower few_shot.ways or few_shot.shots.")
    drawn = []
    for episode in range(count):
        rng = _rng(seed, "few-shot", episode)
        classes = rng.choice(len(members), ways, replace=False)
        # Support and queries are drawn together, so no image is in both.
        drawn.append([rng.permutation(members[c])[:shots + queries] for c in classes])
    support, query = np.split(np.array(drawn), [shots], axis=2)  # count ways shots, count ways queries
    return support.reshape(count, -1), query.reshape(count, -1)


# ---------- 6 Images one by one: read, cropped and distorted by Pillow in data-loader workers


class _Views(Dataset):
    """A batch of views, in a data-loader worker; a request is [(source, draw), …], options, view."""

    def __getitem__(self, request):
        images, options, view = request
        try:
            views = np.stack([view(read_image(source), options, draw) for source, draw in images])
        except UserError as error:
            # Raised here, the sentence would be buried in a traceback of the loader's: _read raises it.
            return error
        views = torch.from_numpy(views).permute(0, 3, 1, 2).contiguous()  # B H W 3 -> B 3 H W
        try:  # here, because the thread that sends it would lose the batch without a word
            return views.share_memory_() if torch.utils.data.get_worker_info() else views
        except RuntimeError as error:
            return UserError(f"/dev/shm is too small ({error}); data.workers=0 does without it.")


class _Requests:
    """What the workers are asked for next."""

    def __iter__(self):
        return self.items


@functools.lru_cache(maxsize=1)
def _loader(workers, pin_memory):
    """One loader for training and evaluation: its workers know no set, and live as long as the process."""
    atexit.register(_end_workers)
    # A request is a batch already, hence batch_size=None. The generator is the loader's own, because it draws
    # a number for its workers, which must not move torch's global state.
    return DataLoader(_Views(), batch_size=None, sampler=_Requests(), num_workers=workers,
                      persistent_workers=workers > 0, generator=torch.Generator(), pin_memory=pin_memory)


def _end_workers():
    """Python would send SIGTERM and wait, but workers do not hear SIGTERM (see _read)."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as failed
    for worker in multiprocessing.active_children():
        worker.kill()


def _read(batches, options, view, device):
    """Batches of (source, draw) -> uint8 B 3 H W on the device, in order. UserError names a bad image."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = _loader(min(options["workers"], cores), device.type == "cuda")
    loader.sampler.items = ((images, options, view) for images in batches)
    # Workers inherit a blocked SIGTERM. A scheduler sends it to all processes of a job, and the one that
    # trains needs its workers until it has saved.
    if loader.num_workers and multiprocessing.get_start_method() != "fork":
        multiprocessing.resource_tracker.ensure_running()  # its start would unblock SIGTERM
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    views = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for images in views:
        if isinstance(images, UserError):
            raise images
        # From pinned memory, so that the next batch is copied to the GPU while it computes.
        yield images.to(device, non_blocking=True)


def read_image(source):
    """An image file of any color mode, or uint8 H W 3 -> RGB PIL image. UserError names a bad file."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(source))
    try:
        with Image.open(source) as image:
            image.load()
            # 16-bit gray: Pillow itself would clip it to white.
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            # Dropping alpha would uncover whatever color lies below: the image is put on white.
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, …
        raise UserError(f"{source} is not a readable image ({error}); replace or remove it.") from None


def center_view(image, options, index):
    """Evaluation's view -> uint8 H W 3; with an index, its rendition."""
    view = center_crop(image, options["image_size"])
    return np.asarray(view if index is None else rendition(view, index))


def center_crop(image, size):
    """Resizes the shorter side to 256/224 · size (to `size` itself at 32 px or less) and crops the center."""
    short = size if size <= 32 else int(size * 256 / 224)
    # Small images that have their size already stay as they are, pixel for pixel.
    if image.size == (size, size) == (short, short):
        return image
    # At least `short`: rounding must not leave a side that is smaller than the crop.
    width, height = (max(short, round(side * short / min(image.size))) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def augment(image, options, key):
    """The training view of one image, drawn from its key -> uint8 H W 3: crop, flip, RandAugment."""
    # Python's generator, because seeding one of numpy's takes as long as a small crop.
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
    # Area A and aspect r = w / h: w = √(A r), h = √(A / r). Log-uniform, because 3/4 and 4/3 distort equally.
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


def _table(image, value):
    return image.point([value(v) for v in range(256)] * 3)


# RandAugment (1909.13719) as timm's "increasing" set: each operation gets worse with the level m in 0 … 10.
# An operation is a function (image, m, sign) -> image; sign is -1 or 1, ignored where there is no direction.
OPERATIONS = {
    "AutoContrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, m, sign: ImageOps.equalize(image),
    "Invert": lambda image, m, sign: ImageOps.invert(image),
    "Rotate": lambda image, m, sign: image.rotate(sign * 3 * m, Image.Resampling.BICUBIC, fillcolor=FILL),
    # The lower bits are cleared. At m = 10 these are all eight, which Pillow's own posterize refuses to do.
    "Posterize": lambda image, m, sign: _table(image, lambda v: v & ~(2 ** (4 + int(0.4 * m)) - 1)),
    "Solarize": lambda image, m, sign: ImageOps.solarize(image, 256 - int(25.6 * m)),
    "SolarizeAdd": lambda image, m, sign: _table(image, lambda v: min(255, v + int(11 * m) * (v < 128))),
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

# ---------- 7 Glyphs: letters and digits drawn on the fly, so that the demo needs no download

# No pair that a small rotation or shear turns into each other (O Q 0, I 1, U V …). `lower_case` is for
# few-shot, classes that no model has seen: no small letter that is a small capital.
GLYPHS = {"glyphs": "ABCDEFGHJKLMNPRSTWXYZ347", "lower_case": "abdefghijmnqrt"}
# A glyph depends on its index alone, and splits never share an index.
FIRST_INDEX = {"train": 0, "validation": 1 << 40, "test": 2 << 40}


def _glyphs(options, split):
    characters, count, size = GLYPHS[options["set"]], options[f"{split}_images"], options["image_size"]
    if split == "validation":
        count = held_out(options, options["train_images"])
    classes = options["classes"] or len(characters)
    if not count or classes > len(characters):
        raise UserError(f"data.{split}_images={count} of data.classes={classes} {options['set']} cannot be "
                        f"drawn; choose a number above 0, and 2 to {len(characters)} classes.")
    # Classes by turns, so that every split is balanced; load() shuffles the training images.
    labels = np.arange(count) % classes
    images = np.empty((count, size, size, 3), np.uint8)
    for i, label in enumerate(labels):
        images[i] = draw_glyph(label, FIRST_INDEX[split] + i, size, characters)
    return ImageSet(labels, characters[:classes], torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())


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


# ---------- 8 Renditions: a robustness set made out of any test set, as ImageNet-R is one of ImageNet


def renditions(imageset):
    """The set's images as drawings, prints and the like. Those in memory are redrawn now, files when read."""
    labels, names = imageset.labels, imageset.class_names
    if imageset.images is None:
        return ImageSet(labels, names, None, imageset.files, imageset.present, rendition=True)
    drawn = np.stack([rendition(read_image(imageset.source(i)), i) for i in range(len(imageset))])
    return ImageSet(labels, names, torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous())


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

# ---------- 9 Sets on disk: each reader refuses a set that is not all there, which would train without a word

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
           "Ankle boot")
FASHION_ROOT = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def _fashion_mnist(options, part):
    """Gray 28 x 28 images, zero padded to image_size, the same in all three channels (a view)."""
    root, border = Path(options["root"] or FASHION_ROOT), options["image_size"] - 28
    prefix = "t10k" if part == "test" else "train"
    try:
        # Gzipped IDX files: a header of 4 bytes and 4 more for each dimension, then the values.
        files = [root / f"{prefix}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
        images, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
        images, labels = images[16:].reshape(-1, 28, 28), labels[8:]
        # MNIST has files of the same names, and two files that do not belong together would train, badly.
        if len(labels) != len(images) or not len(labels) or labels.max() >= len(FASHION):
            raise ValueError(f"{len(images)} images, but {len(labels)} labels")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{root} does not hold Fashion-MNIST ({error}); install Debian's "
                        "dataset-fashion-mnist, or set data.root to the folder of its .gz files.") from None
    if border < 0:
        raise UserError(f"data.image_size={28 + border} is too small for fashion_mnist; choose 28 or more.")
    before, after = border // 2, (border + 1) // 2
    images = F.pad(torch.tensor(images), (before, after, before, after))  # N H W
    return ImageSet(labels.astype(int), FASHION, images[:, None].expand(-1, 3, -1, -1))  # N 3 H W


def _root(options):
    root = Path(options["root"])
    if not options["root"] or not root.is_dir():
        what = "train/<class>/*" if options["set"] == "folder" else options["set"]
        raise UserError(f"data.root={options['root']!r} is not a folder; set it to one that holds {what}.")
    return root


def _folders(options, part):
    """train/<class>/* with val/<class>/* (imagenet, tiny_imagenet), or with test/ or else val/ (folder)."""
    root = _root(options)
    names = _class_folders(root / "train")
    if part == "train":
        return _read_folders(root / "train", names, names)
    # ImageNet's and Tiny-ImageNet's own test/ has no labels: everyone's test accuracies are about val/.
    test = root / "test" if options["set"] == "folder" and (root / "test").is_dir() else root / "val"
    # Tiny-ImageNet's val/ comes as one folder, images/, and a list. Many people have sorted it into classes,
    # within images/ or beside it, and not all of them removed what was there before.
    flat = test / "images"
    if options["set"] == "tiny_imagenet" and flat.is_dir():
        if (test / "val_annotations.txt").is_file() and any(path.is_file() for path in flat.iterdir()):
            return _annotated(test / "val_annotations.txt", flat, names)
        test = flat if _subfolders(flat) else test
    if not test.is_dir():
        raise UserError(f"{root} has no {test.name}/<class>/* for the test accuracy.")
    found = [name for name in _class_folders(test) if name != "images" or name in names]
    if odd := sorted(set(found) ^ set(names)):
        raise UserError(f"{test} and {root / 'train'} must hold the same class folders, but only one of them "
                        f"has {odd[0]!r} ({len(odd)} such); complete data.root or remove the folder.")
    return _read_folders(test, names, names)


def _subfolders(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_folders(folder):
    """The sorted names of the folders in a folder, at least two: a flat folder of images is no set."""
    names = _subfolders(folder) if folder.is_dir() else []
    if len(names) < 2:
        raise UserError(f"{folder} holds {len(names)} class folders; sort images into one folder per class, "
                        "and set data.root to the folder above it.")
    return names


def _read_folders(folder, found, names, complete=True):
    """All images in the class folders `found`, labeled by place in `names`. Empty: refused if `complete`."""
    files, labels, others = [], [], []
    for name in found:
        # In sub-folders too. A link to nowhere counts, and is named when it is read.
        walk = os.walk(folder / name, followlinks=True)
        paths = [os.path.join(at, file) for at, _, some in walk for file in some]
        # Hidden files and folders (._cat.jpg, .ipynb_checkpoints) are nobody's images.
        paths = [path for path in paths if "/." not in path[len(str(folder)):]]
        images = sorted(path for path in paths if path.lower().endswith(SUFFIXES))
        if not images and complete:
            raise UserError(f"{folder / name} holds no images; complete the class or remove its folder.")
        others += [path for path in paths if not path.lower().endswith(SUFFIXES)]
        files += images
        labels += [names.index(name)] * len(images)
    if others:
        note(f"{folder}: {len(others)} files do not end like images and are not read, such as {others[0]}")
    return ImageSet(labels, names, files=files)


@functools.cache
def note(text):
    """Prints a line once, on the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def _annotated(path, folder, names):
    """Tiny-ImageNet's val as downloaded; a line of the list is file, wnid and a box."""
    try:
        labels = {file: names.index(wnid) for file, wnid, *_ in map(str.split, path.read_text().splitlines())}
        if odd := set(labels) ^ {file for file in os.listdir(folder) if not file.startswith(".")}:
            raise ValueError(f"{sorted(odd)[0]} is in one of them only")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not list {folder}'s images ({error}); download it again.") from None
    return ImageSet(list(labels.values()), names, files=[str(folder / file) for file in labels])


def _robustness(folder, names):
    """A folder of <class name>/*, matched by name with the training set's classes; `present`: which match."""
    if not folder.is_dir():
        raise UserError(f"data.robustness={str(folder)!r} is neither 'renditions' nor a folder of classes.")
    # Folders of other names are left out: the model cannot choose them.
    found = [name for name in _subfolders(folder) if name in names]
    if len(found) < 2:
        raise UserError(f"data.robustness={folder} has {len(found)} of the training set's class names, "
                        f"for example {names[0]!r}; rename its folders.")
    imageset = _read_folders(folder, found, names, complete=False)
    imageset.present = imageset.labels.unique()
    if len(imageset.present) < 2:
        raise UserError(f"data.robustness={folder} has images of {len(imageset.present)} classes only.")
    return imageset


def few_shot_set(config):
    """The test images of the few-shot set. Of a folder: <class>/* in its test/, its val/ or itself."""
    f = config["few_shot"]
    # Images as the model knows them (size, crop), but of another set, with all its classes.
    other = {"set": f["set"], "root": f["root"], "classes": None, "test_images": f["images"]}
    options = {**config["data"], **other}
    try:
        if f["set"] != "folder":
            return load({"data": options}, "test")
        root = _root(options)
        folder = next((folder for folder in (root / "test", root / "val") if folder.is_dir()), root)
        names = _class_folders(folder)
        return _some(_read_folders(folder, names, names), f["images"])
    except UserError as e:
        text = str(e).replace("data.test_images", "few_shot.images").replace("data.", "few_shot.")
        raise UserError(text) from None


def _cifar100(options, part):
    """CIFAR-100's binary version: records of coarse label, fine label, 3072 bytes (RGB planes of 32 x 32)."""
    path = _root(options) / f"{part}.bin"
    raw = np.fromfile(path, np.uint8) if path.is_file() else np.empty(0)
    # No header, so only the length and the fine labels, every 3074th byte from the second, can be checked.
    if not len(raw) or len(raw) % 3074 or raw[1::3074].max() > 99:
        raise UserError(f"{path} is missing or not whole CIFAR-100 records; set data.root to the folder "
                        "cifar-100-binary, or download it again.")
    records, names = raw.reshape(-1, 3074), path.with_name("fine_label_names.txt")
    names = names.read_text().split() if names.is_file() else map(str, range(100))
    return ImageSet(records[:, 1].astype(int), names, torch.tensor(records[:, 2:].reshape(-1, 3, 32, 32)))


def _cub(options, part):
    """CUB-200-2011: three lists, joined by the image's number, say each file's class (from 1) and split."""
    root = _root(options)
    try:
        file, label, train = (dict(line.split() for line in (root / f"{name}.txt").read_text().splitlines())
                              for name in ("images", "image_class_labels", "train_test_split"))
        own = [n for n in file if (train[n], part) in (("1", "train"), ("0", "test"))]
        # Names from both splits: training and test set must have the same classes in the same order.
        names = {int(label[n]): file[n].split("/")[0] for n in file}
        if sorted(names) != list(range(1, len(names) + 1)) or not own or set(train.values()) != {"0", "1"}:
            raise ValueError("classes or splits are missing")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{root} does not hold CUB-200-2011 ({error}); set data.root to the folder of its "
                        "images.txt, or unpack it again.") from None
    return ImageSet([int(label[n]) - 1 for n in own], [names[k + 1] for k in range(len(names))],
                    files=[str(root / "images" / file[n]) for n in own])
