"""Data for every stage: processes, sets and their splits, batches, augmentation, few-shot episodes.

    config = models.load_config("configs/demo_nac.yaml")
    process = data.setup()                                            # device, rank, world: one process or torchrun's
    train = data.load(config, "train", stage="student")               # an ImageSet
    for images, targets in data.train_batches(train, config, "student", epoch, process): ...
    for images, labels in data.eval_batches(data.load(config, "test"), config, process): ...

What to read: for the method parts 1 to 3, some 370 lines. The rest can be skipped until it is needed.

    1 Processes and device       3 Batches                              5 Images as files: the paper's augmentation
    2 Image sets and splits      4 Few-shot episodes, for evaluate.py   6 Glyphs   7 Renditions   8 Sets on disk

Two ideas carry the file. (1) Nothing random has a state: every draw is a pure function of (seed, stage, epoch, position
in the epoch), so a killed run resumes exactly from a step number, and the same global batch comes out (but for mixup and
cutmix) however many processes share it. (2) Small sets live in memory as uint8 and are cropped and flipped as whole
batches on the device; large ones are read from files, image by image, in worker processes.

Axes: N images, B batch of one process, H = W image size, K classes. Images are uint8 N 3 H W until normalised.
"""

import datetime
import functools
import gzip
import math
import os
import signal
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset

from models import DRAWN, STOP, UserError, check_finite

# ImageNet's, for every set: weights from elsewhere expect them, and a student may be finetuned on another set than its
# modules were distilled on.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------------------
# 1 Processes and device: plain `python` is one process; torchrun says in the environment which one this is.

# How long a process waits for the others: if one hangs, the rest must not wait for ever and keep their GPUs.
PATIENCE = datetime.timedelta(minutes=30)


class Setup(NamedTuple):
    device: torch.device
    rank: int
    world: int


def setup(device="auto"):
    """Device and process group of this process -> Setup. A collective that waits longer than PATIENCE fails."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        # The original needs CUDA. Apple's GPU serves one process only: torch.distributed has no backend for it.
        device = "cuda" if torch.cuda.is_available() else "mps" if world == 1 and _mps_works() else "cpu"
    if device == "cuda" and not torch.cuda.is_available() or device == "mps" and not _mps_works():
        raise UserError(f"device={device} does not work on this machine; use device=auto or device=cpu")
    if device == "cuda":
        # One GPU a process; LOCAL_RANK counts the processes of one machine.
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    device = torch.device(device)
    if world > 1 and not dist.is_initialized():
        # After a restart torchrun's store still holds the addresses of the processes before, and torch 2.13 would use
        # them: each attempt gets keys of its own.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), next(dist.rendezvous("env://"))[0])
        # NCCL for gradients, and gloo beside it for numbers that live on the CPU (stop_asked).
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=world)
    return Setup(device, rank, world)


def _mps_works():
    """Apple's GPU can be reported and still refuse to work (virtual machines): compute something and see."""
    try:
        return torch.backends.mps.is_available() and (torch.ones(2, device="mps") + 1).sum().item() == 4
    except (RuntimeError, NotImplementedError):
        return False


def broadcast_weights(parts, process):
    """Gives every process the first one's weights, part by part: machines that round differently begin differently."""
    for module, *_ in parts.values() if process.world > 1 else ():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)


def average_gradients(parts, process):
    """Averages the gradients of each part {i: (module, optimiser, sums)} over the processes, in place.

    Once a step, not once a micro-batch, and in an order that never changes, so that a resumed run sums in the same one.
    (DistributedDataParallel, which the original uses, regroups its gradients after the first step after every start.)
    """
    for module, *_ in parts.values() if process.world > 1 else ():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        # one message a part: many small ones would cost a round trip each
        mean = sum_over_processes(torch.cat([g.flatten() for g in gradients])) / process.world
        for g, part in zip(gradients, mean.split([g.numel() for g in gradients])):
            g.copy_(part.view_as(g))


def sum_over_processes(tensor):
    """Adds the processes' tensors up, in place, and returns it; with one process the tensor is left as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def check_losses(parts, stage, step, config):
    """Stops all processes if the loss of a part is not finite in any -> loss and accuracy of the epoch so far, for the bar.

    parts: {i: (module, optimiser, sums)}, sums a row of loss·images, correct, images for each process.
    """
    shown = {}
    for i, (_, _, sums) in parts.items():
        # Rows of other processes are still zero here. The sum is a new tensor, for the epoch goes on adding to `sums`;
        # and it is NaN in every process if it is in one, so that all stop together and none waits for the others.
        total = sum_over_processes(sums.sum(0))
        check_finite(total[0], f"{stage}: the loss{'' if i == stage else f' of module {i}'} at step {step}", config)
        shown[str(i)] = f"{total[0] / total[2]:.3f}, {100 * total[1] / total[2]:.1f} %"
    return shown


def stop_asked(process):
    """Whether SIGTERM came to any process: all ask after each step, so all leave at the same one."""
    # Not on the device: to ask need not wait for a GPU.
    asked = torch.tensor(float(bool(STOP)))
    return sum_over_processes(asked).item() > 0


def close():
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# 2 Image sets and splits


class ImageSet:
    """N labelled images, in memory or as files.

    labels       LongTensor N, indices into class_names
    images       uint8 N 3 H W, or None when the images are files
    files        list of N paths, or None when the images are in memory
    present      None, or LongTensor: the classes that this set has at all. Scores are then taken among these only,
                 logits of the others left out, which is how ImageNet-R's numbers are made.
    rendition    whether evaluation draws a rendition of each file (in-memory sets hold theirs already drawn)
    """

    def __init__(self, labels, class_names, images=None, files=None, present=None, rendition=False):
        self.labels, self.class_names = torch.as_tensor(labels, dtype=torch.long), list(class_names)
        self.images, self.files, self.present, self.rendition = images, files, present, rendition

    def __len__(self):
        return len(self.labels)

    def take(self, indices):
        """The images at `indices` (N-long integer array or tensor), in that order, as an ImageSet."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        images = None if self.images is None else self.images[indices]
        files = None if self.files is None else [self.files[i] for i in indices.tolist()]
        return ImageSet(self.labels[indices], self.class_names, images, files, self.present, self.rendition)

    def picture(self, index):
        """Image `index` as an RGB PIL image, H and W as they are on disk or in memory."""
        if self.files is not None:
            return read_image(self.files[index])
        return Image.fromarray(self.images[index].permute(1, 2, 0).contiguous().numpy())


def _rng(*key):
    """A numpy generator that depends on the key alone; texts (stages) enter by their CRC."""
    # Not Python's hash(): that of a text differs from process to process.
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in key])


def load(config, split, stage=None):
    """The images of one split -> ImageSet.

    split: train, validation, test, renditions (the test images, redrawn), or a folder of <class name>/* (robustness).
    One permutation, seeded by config["seed"], cuts the training pool: its last `validation_images` are the validation
    set, of the rest the first `train_images` are the training set, and of these a stage sees train.<stage>.images.
    Glyphs are drawn, each split from indices of its own. Raises UserError where files or numbers do not fit.
    """
    options, seed = config["data"], config["seed"]
    if split in ("train", "validation"):
        pool = _pool(options, split)
        order = np.random.default_rng(seed).permutation(len(pool))
        # Glyphs are drawn for each split, as many as are asked for; sets from disk have one pool for both, cut here.
        if options["set"] not in DRAWN:
            count, held_out = options["train_images"], options["validation_images"]
            if held_out + max(count, 1) > len(pool):
                raise UserError(f"data.train_images {count} and data.validation_images {held_out} ask for more than "
                                f"the {len(pool)} images of {options['set']}'s training pool; lower one of them")
            # Validation from the end: it stays the same whatever train_images is.
            rest = len(pool) - held_out
            order = order[rest:] if split == "validation" else order[:rest][:count or None]
        if split == "validation" or stage is None:
            return pool.take(order)
        # A range of what is shuffled already: stages whose ranges do not overlap share no image, and those whose ranges
        # are equal see the same (few labelled images for one, many for another).
        settings = config["train"][stage]
        if settings["images"] is not None:
            first, stop = settings["images"]
            if not 0 <= first < stop <= len(order):
                raise UserError(f"train.{stage}.images [{first}, {stop}] is not a range within the {len(order)} "
                                "training images; choose 0 <= first < stop <= that number")
            order = order[first:stop]
        # Several passes are so many copies, which an epoch shuffles together.
        order = np.tile(order, settings["passes"])
        images = pool.take(order)
        if settings["wrong_labels"]:
            images.labels = _wrong_labels(pool, settings["wrong_labels"], seed)[order]
        return images
    if split in ("test", "renditions"):
        test, count = _pool(options, "test"), options["test_images"]
        if count > len(test):
            raise UserError(f"data.test_images {count} exceeds the {len(test)} test images; lower it, or 0 for all")
        # The same subset for every seed, so that seeds are compared on the same images; sorted, as the whole set is.
        if 0 < count < len(test):
            test = test.take(np.sort(np.random.default_rng(0).permutation(len(test))[:count]))
        return renditions(test) if split == "renditions" else test
    return _robustness(split, class_names(options))


def _wrong_labels(pool, share, seed):
    """The pool's labels (N), `share` of them wrong. (Not in the paper: does a teacher help against them?)"""
    # Drawn for the whole pool, before any stage takes its part: an image's wrong label is the same in every stage. And
    # u < share: the images that are wrong at a smaller share are wrong, in the same way, at a larger one too.
    rng, classes = _rng(seed, "wrong labels"), len(pool.class_names)
    wrong = torch.from_numpy(rng.random(len(pool)) < share)
    # y' = (y + r) mod K, r uniform in 1 … K-1: each of the other classes alike, never the right one
    moved = (pool.labels + torch.from_numpy(rng.integers(1, classes, len(pool)))) % classes
    return torch.where(wrong, moved, pool.labels)


def class_names(options):
    """The class names of the training set of config["data"], index = label; reads no image where it need not."""
    if options["set"] in ("imagenet", "tiny_imagenet", "folder"):
        return _checked(_class_folders(os.path.join(_root(options), "train")), options)
    if options["set"] in DRAWN:
        return list(GLYPHS[options["set"]])[:options["classes"]]
    return _pool(options, "test").class_names


def _pool(options, split):
    """All images that a split is cut from: train and validation share one pool, but for glyphs, which are drawn."""
    if options["set"] in DRAWN:
        return _glyphs(options, split)
    reader = {"fashion_mnist": _fashion_mnist, "cifar100": _cifar100, "cub": _cub}.get(options["set"], _folders)
    pool = reader(options, "test" if split == "test" else "train")
    _checked(pool.class_names, options)
    return pool


def _checked(names, options):
    """The class names, if they are as many as the models are built for (data.classes; 0 or None: not checked)."""
    if options["classes"] and len(names) != options["classes"]:
        raise UserError(f"data.classes is {options['classes']} but {options['set']} in data.root "
                        f"{options['root'] or '(default)'} has {len(names)} classes; set data.classes={len(names)}")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# 3 Batches


def normalise(images):
    """uint8 ... 3 H W -> float32 with ImageNet's mean and deviation taken out, on the images' device."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    # In place, since memory is what takes the time.
    return (images / 255).sub_(mean).div_(std)


def steps_per_epoch(length, batch, world, accumulate, stage="<stage>"):
    """Optimiser steps in an epoch; what does not fill a last global batch is left for another epoch's order."""
    steps = length // (batch * world * accumulate)
    if not steps:
        raise UserError(f"train.{stage}.batch {batch} x {world} processes x accumulate {accumulate} is more than the "
                        f"{length} training images; lower train.{stage}.batch or add images")
    return steps


def train_batches(imageset, config, stage, epoch, process, start_step=0):
    """Micro-batches of one epoch for this process, from optimiser step `start_step` on.

    Yields images float32 B 3 H W (normalised) and soft targets float32 B K on the device, `accumulate` a step.
    Micro-batch m of B·world images is positions [m·B·world, (m+1)·B·world) of the epoch's order; process r has the
    r-th B of them. So two processes with half the batch see the images of one, augmented alike.
    """
    options, settings = config["data"], config["train"][stage]
    seed, size, batch, accumulate = config["seed"], options["image_size"], settings["batch"], settings["accumulate"]
    steps = steps_per_epoch(len(imageset), batch, process.world, accumulate, stage)
    # Every process draws the whole order, the same one: none has to be told its part.
    order = _rng(seed, stage, epoch).permutation(len(imageset))
    # Repeated augmentation (1901.09335): an epoch shows N / repeats images, each in several views, which keeps its
    # length. The copies stand side by side, so they share a batch; in DeiT they go to different processes.
    order = order.repeat(options["repeats"])[:len(order)]
    total = batch * process.world
    start, stop = start_step * accumulate, steps * accumulate
    # This process's positions in the order. Micro-batches before `start` are left out without being drawn, for each
    # depends on its number alone: that is all there is to resuming.
    positions = np.arange(stop * total).reshape(stop, process.world, batch)[start:, process.rank]   # micro-batches B
    # The fast way, for small sets in memory: whole batches at once, on the device. What is cropped, resized or distorted
    # image by image goes through Pillow in workers.
    on_device = (imageset.images is not None and tuple(imageset.images.shape[-2:]) == (size, size)
                 and not (options["resized_crop"] or options["randaugment"] or options["erasing"]))
    if on_device:
        pool, own = imageset.images.to(process.device), slice(process.rank * batch, (process.rank + 1) * batch)
        pictures = (_crop_and_flip(pool, order[positions[m - start]], options["pad"], options["flip"],
                                   _rng(seed, stage, epoch, m, 1), total, own) for m in range(start, stop))
    else:
        dataset = _Pictures(imageset, options, positions, order, (seed, stage, epoch))
        pictures = _loader(dataset, options["workers"], process.device)
    # The number after m sets kinds of draws apart: 1 crops and flips, 2 mixes.
    for m, images in zip(range(start, stop), pictures):
        labels = imageset.labels[order[positions[m - start]]].to(process.device)
        # Images that were erased are normalised already: the noise is in normalised units.
        images = normalise(images) if images.dtype == torch.uint8 else images
        # Partners for mixup and cutmix are from the process's own batch, with a draw of its own, as in timm: with them two
        # processes train a little differently from one.
        yield mix(images, labels, options["classes"], options["mixup"], options["cutmix"], options["smoothing"],
                  _rng(seed, stage, epoch, m, 2, process.rank))


def _crop_and_flip(pool, indices, pad, flip, rng, total, own):
    """Images `indices` of the pool, each moved by up to ±pad pixels (edges repeated) and flipped: uint8 B 3 H W."""
    # Drawn for all `total` images of the global batch, of which this process has the rows `own`: an image moves alike
    # whichever process it falls to.
    dy, dx = (rng.integers(-pad, pad + 1, total)[own] for _ in range(2))
    flipped = (rng.random(total) < flip)[own]
    height, width = pool.shape[-2:]
    # Shift and flip only say which row and column of the original each pixel comes from: one indexing does both, for a
    # batch of images that each move differently. A place outside is clipped to the edge.
    rows = np.clip(np.arange(height) + dy[:, None], 0, height - 1)                     # B H
    columns = np.clip(np.arange(width) + dx[:, None], 0, width - 1)                    # B W
    columns = np.where(flipped[:, None], columns[:, ::-1], columns)
    image, rows, columns = (torch.from_numpy(v).to(pool.device) for v in (indices, rows, columns))
    picked = pool.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None, :]]   # B H W 3
    return picked.permute(0, 3, 1, 2)


def mix(images, labels, classes, mixup, cutmix, smoothing, rng):
    """Mixup (1710.09412), cutmix (1905.04899) and label smoothing of one batch, as in timm.

    images float B 3 H W, labels int64 B; mixup, cutmix: the α of Beta(α, α), 0 = off, with both on a coin decides for
    the batch. Image b is mixed with image B-1-b. -> images, soft targets B K, whose rows sum to 1.
    """
    # y = (1-s) · onehot(label) + s / K
    on, off = 1 - smoothing + smoothing / classes, smoothing / classes
    targets = torch.full((len(labels), classes), off, device=images.device)
    targets.scatter_(1, labels[:, None], on)                                            # B K
    height, width = images.shape[-2:]
    if cutmix > 0 and (mixup == 0 or rng.random() < 0.5):
        # A box of area 1 - λ round a uniform centre. The border cuts part of it off, so λ is computed again: the target
        # must say how much of each image is really seen.
        top, bottom, left, right = cutmix_box(height, width, rng.beta(cutmix, cutmix), rng)
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


def cutmix_box(height, width, lam, rng):
    """Top, bottom, left, right (stops exclusive) of a box with sides √(1-λ) of the image's, clipped to the image."""
    cut_h, cut_w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return (max(y - cut_h // 2, 0), min(y + cut_h // 2, height), max(x - cut_w // 2, 0), min(x + cut_w // 2, width))


def eval_batches(imageset, config, process, batch=256):
    """This process's share of the set, images rank::world in order: every image exactly once over all processes.

    Yields images float32 B 3 H W (normalised) and labels int64 B on the device.
    """
    # The original drops the last batch here too, and scores a part of the set; and samplers that make the processes'
    # shares equal by repeating images score some twice. Here shares and last batches are as long as they are.
    share, size = np.arange(process.rank, len(imageset), process.world), config["data"]["image_size"]
    batches = [share[k:k + batch] for k in range(0, len(share), batch)]
    if imageset.images is not None and tuple(imageset.images.shape[-2:]) == (size, size):
        pictures = (imageset.images[indices].to(process.device) for indices in batches)
    else:
        pictures = _loader(_Pictures(imageset, config["data"], batches), config["data"]["workers"], process.device)
    for indices, images in zip(batches, pictures):
        yield normalise(images), imageset.labels[indices].to(process.device)


# ---------------------------------------------------------------------------------------------------------------------
# 4 Few-shot episodes


def episodes(labels, ways, shots, queries, count, seed):
    """`count` few-shot episodes out of a set's labels (N): a pure function of the arguments.

    -> support (count, ways·shots) and query (count, ways·queries), indices into the set: class by class, in the same order,
    `shots` and `queries` of each.
    """
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    members = [indices for indices in members if len(indices) >= shots + queries]
    if len(members) < ways:
        raise UserError(f"few_shot.ways={ways} classes of {shots} shots and {queries} queries need {shots + queries} images "
                        f"a class, but only {len(members)} classes of the set have as many; lower few_shot.ways or .shots")
    drawn = []
    for episode in range(count):
        rng = _rng(seed, "few-shot", episode)
        classes = rng.choice(len(members), ways, replace=False)
        # Support and queries are drawn together, so no image is in both. In the original a query may be a
        # support image, and the two do not even have the same classes at every seed.
        drawn.append([rng.permutation(members[c])[:shots + queries] for c in classes])
    support, query = np.split(np.array(drawn), [shots], axis=2)   # count ways shots, count ways queries
    return support.reshape(count, -1), query.reshape(count, -1)


# ---------------------------------------------------------------------------------------------------------------------
# 5 Images as files, and whatever is transformed image by image: read, cropped and distorted by Pillow in worker processes


class _Pictures(Dataset):
    """Reads and transforms a whole batch an item, in a worker process: item m has the images at positions batches[m].

    Without `order` and `key` an image is evaluation's view of image number `position`. With them, it is the training
    view of image order[position], drawn from (*key, position) alone. Items are uint8 B 3 H W, or with erasing float32
    and normalised, or the UserError of an image that cannot be read.
    """

    def __init__(self, imageset, options, batches, order=None, key=None):
        self.imageset, self.options, self.batches, self.order, self.key = imageset, options, batches, order, key

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, m):
        positions, options, draws = self.batches[m], self.options, []
        try:
            if self.order is None:
                views = [centre_crop(self.imageset.picture(index), options["image_size"]) for index in positions.tolist()]
                if self.imageset.rendition:
                    views = [rendition(view, index) for view, index in zip(views, positions.tolist())]
            else:
                draws = uniforms(self.key, positions)
                views = [augment(self.imageset.picture(index), options["image_size"], options, uniform)
                         for index, uniform in zip(self.order[positions].tolist(), draws)]
        except UserError as error:
            # Raised here, the loader would bury the sentence in a traceback of its own: _loader raises it.
            return error
        images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()   # B H W 3 -> B 3 H W
        if draws and options["erasing"]:
            images = normalise(images)
            for image, uniform in zip(images, draws):
                erase(image, options["erasing"], uniform)
        return images


def _ignore_sigterm(worker):
    """A scheduler sends SIGTERM to all processes of a job: the one that trains saves, and still needs its workers then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _loader(dataset, workers, device):
    """The dataset's batches, in order, on the device; raises the UserError of an unreadable image."""
    # An item is a batch already, hence batch_size=None: a worker draws, stacks and sends once a batch. And a generator of
    # its own: the loader draws a number for its workers, which must not move torch's global state.
    # Pinned memory and non_blocking: the next batch is copied to the GPU while it computes.
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, generator=torch.Generator(),
                        worker_init_fn=_ignore_sigterm, pin_memory=device.type == "cuda")
    for images in loader:
        if isinstance(images, UserError):
            raise images
        yield images.to(device, non_blocking=True)


def read_image(path):
    """An image file of any colour mode -> RGB PIL image. A file that cannot be read is a UserError that names it."""
    try:
        with Image.open(path) as image:
            image.load()
            # 16-bit grey: Pillow itself would clip it to white.
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
            # To drop alpha would uncover whatever colour lies below: the image is put on white.
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    # Decoders raise OSError, SyntaxError, ValueError, struct.error, …
    except Exception as error:
        reason = str(error).replace(str(path), "it")
        raise UserError(f"{path} is not a readable image ({reason}); replace or remove it") from None


# `uniform` below is an image's own iterator of numbers uniform in 0 … 1. They are drawn for a batch at once: a call of
# numpy costs more than a number, and seeding a generator for each image as much as a small crop. An image takes at most
# 59 of its DRAWS numbers: crop 22, pad 2, flip 1, RandAugment 10, erasing 24.
DRAWS = 64


def uniforms(key, positions):
    """Random numbers of the images at consecutive positions of an epoch -> for each an iterator of DRAWS floats."""
    rng = _rng(*key, "images")
    # Position p has row p of one endless table, which depends on the key alone: the generator jumps to the first row.
    rng.bit_generator.advance(int(positions[0]) * DRAWS)
    return [iter(row) for row in rng.random((len(positions), DRAWS)).tolist()]


def _between(low, high, uniform):
    return low + (high - low) * next(uniform)


def augment(image, size, options, uniform):
    """The training view of one image -> uint8 H W 3: crop, flip, RandAugment. Erasing comes after normalisation."""
    if options["resized_crop"]:
        box = resized_crop_box(image.width, image.height, options["resized_crop"], uniform)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    else:
        image = centre_crop(image, size)
    # As _crop_and_flip does for whole batches.
    if options["pad"]:
        dy, dx = (int((2 * options["pad"] + 1) * next(uniform)) - options["pad"] for _ in range(2))
        rows, columns = (np.clip(np.arange(size) + d, 0, size - 1) for d in (dy, dx))
        image = Image.fromarray(np.asarray(image)[rows][:, columns])
    if next(uniform) < options["flip"]:
        image = ImageOps.mirror(image)
    if options["randaugment"]:
        image = randaugment(image, options["randaugment"], uniform)
    return np.asarray(image)


def centre_crop(image, size):
    """Evaluation's view: the shorter side to 256/224 · size (to `size` itself at 32 px or less), centre cropped."""
    short = size if size <= 32 else int(size * 256 / 224)
    # Small images that have their size already stay as they are, pixel for pixel.
    if (image.width, image.height) == (size, size) == (short, short):
        return image
    # At least `short`: rounding must not leave a side that is smaller than the crop.
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def resized_crop_box(width, height, scale, uniform):
    """Random resized crop (1409.4842): area uniform in `scale`, aspect log-uniform in 3/4 – 4/3, 10 tries.

    -> left, top, right, bottom in pixels, to be resized.
    """
    for _ in range(10):
        # Area A and aspect r = w / h: w = √(A r), h = √(A / r). Log-uniform, for 3/4 and 4/3 are equally distorted.
        area = _between(*scale, uniform) * width * height
        ratio = math.exp(_between(math.log(3 / 4), math.log(4 / 3), uniform))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int((width - w + 1) * next(uniform)), int((height - h + 1) * next(uniform))
            return left, top, left + w, top + h
    # No luck, so the image is long and thin: the largest centred box of an allowed aspect.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# RandAugment (1909.13719) as timm's "increasing" set: each operation gets worse with the level m in 0 … 10.
# An operation is a function (image, m, sign) -> image; sign is -1 or 1 and ignored where there is no direction.

# Colour of what a rotation, shear or translation moves into the image: ImageNet's mean, 0 once normalised.
FILL = tuple(round(255 * m) for m in MEAN)


def _affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def _posterize(image, m, sign):
    # The lower bits are cleared. At m = 10 these are all eight, which Pillow's own posterize refuses to do.
    low = 2 ** (4 + int(4 * m / 10)) - 1
    return image.point([v & ~low for v in range(256)] * 3)


def _solarize_add(image, m, sign):
    add = int(110 * m / 10)
    return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)


OPERATIONS = {
    "AutoContrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, m, sign: ImageOps.equalize(image),
    "Invert": lambda image, m, sign: ImageOps.invert(image),
    "Rotate": lambda image, m, sign: image.rotate(sign * 30 * m / 10, Image.Resampling.BICUBIC, fillcolor=FILL),
    "Posterize": _posterize,
    "Solarize": lambda image, m, sign: ImageOps.solarize(image, 256 - int(256 * m / 10)),
    "SolarizeAdd": _solarize_add,
    # Pillow's factor 1 leaves the image alone, 0 takes colour, contrast, … away.
    "Color": lambda image, m, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.9 * m / 10),
    "Contrast": lambda image, m, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.9 * m / 10),
    "Brightness": lambda image, m, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.9 * m / 10),
    "Sharpness": lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.9 * m / 10),
    # The six numbers a … f: output pixel (x, y) is the input's (a x + b y + c, d x + e y + f).
    "ShearX": lambda image, m, sign: _affine(image, (1, sign * 0.3 * m / 10, 0, 0, 1, 0)),
    "ShearY": lambda image, m, sign: _affine(image, (1, 0, 0, sign * 0.3 * m / 10, 1, 0)),
    "TranslateX": lambda image, m, sign: _affine(image, (1, 0, sign * 0.45 * m / 10 * image.width, 0, 1, 0)),
    "TranslateY": lambda image, m, sign: _affine(image, (1, 0, 0, 0, 1, sign * 0.45 * m / 10 * image.height)),
}


def randaugment(image, magnitude, uniform):
    """Two operations drawn with replacement, each done with p = .5 at level magnitude + N(0, .5), within 0 … 10."""
    operations = list(OPERATIONS.values())
    for _ in range(2):
        operation = operations[int(len(operations) * next(uniform))]
        if next(uniform) < 0.5:
            # Box–Muller, for `uniform` is all there is: √(-2 ln u) · cos(2π v) is N(0, 1). 1 - u, since ln 0 is infinite.
            normal = math.sqrt(-2 * math.log(1 - next(uniform))) * math.cos(2 * math.pi * next(uniform))
            image = operation(image, min(10, max(0, magnitude + 0.5 * normal)), 1 if next(uniform) < 0.5 else -1)
    return image


def erase(image, probability, uniform):
    """Random erasing (1708.04896) of a normalised image, float 3 H W, in place: the pixels of a box become N(0, 1)."""
    height, width = image.shape[-2:]
    if next(uniform) >= probability:
        return image
    for _ in range(10):
        area = _between(0.02, 1 / 3, uniform) * height * width
        ratio = math.exp(_between(math.log(0.3), math.log(1 / 0.3), uniform))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int((height - h + 1) * next(uniform)), int((width - w + 1) * next(uniform))
            # Too many pixels for the image's few numbers: one of them, with all the 53 bits of a float, seeds the noise.
            generator = torch.Generator().manual_seed(int(2 ** 53 * next(uniform)))
            image[:, top:top + h, left:left + w] = torch.randn(3, h, w, generator=generator)
            return image
    return image


# ---------------------------------------------------------------------------------------------------------------------
# 6 Glyphs: letters and digits drawn on the fly, so that the demo needs no download

# No pair that a small rotation or shear turns into each other (O Q 0, I 1, U V …). `lower_case` is for few-shot, classes
# that no model has seen: no small letter that is a small capital.
GLYPHS = {"glyphs": "ABCDEFGHJKLMNPRSTWXYZ347", "lower_case": "abdefghijmnqrt"}

# A glyph depends on its index alone, and splits never share an index: however many are drawn, no image is in two splits.
FIRST_INDEX = {"train": 0, "validation": 1 << 40, "test": 2 << 40}


def _glyphs(options, split):
    characters, count, size = GLYPHS[options["set"]], options[f"{split}_images"], options["image_size"]
    classes = options["classes"] or len(characters)
    if not 1 < classes <= len(characters):
        raise UserError(f"data.classes {classes} is not possible for {options['set']}; choose 2 to {len(characters)}")
    if count < 1:
        raise UserError(f"data.{split}_images {count} draws no {options['set']}; give a number above 0")
    # By turns, so that every split is balanced; load() shuffles the training images.
    labels = np.arange(count) % classes
    images = np.empty((count, size, size, 3), np.uint8)
    for i, label in enumerate(labels):
        images[i] = draw_glyph(label, FIRST_INDEX[split] + i, size, characters)
    return ImageSet(labels, characters[:classes], torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())


@functools.lru_cache(maxsize=None)
def _glyph_mask(character, side):
    """The character in white on black, `side` pixels square and centred: drawn once, then only transformed."""
    # Pillow's own scalable font: nothing to install. The stroke makes it bolder, to be readable at 32 pixels too.
    font = ImageFont.load_default(size=0.8 * side)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).text((side / 2, side / 2), character, fill=255, font=font, anchor="mm", stroke_width=side / 20)
    return mask


def _placed(character, size, scale, angle, shear, x, y):
    """Mask (size x size) of the character: `scale` times the image, rotated (radians), sheared, centred at x, y."""
    side = max(48, size)
    ratio = side / (scale * size)
    # Pillow wants the map from output to input, u = a·x + b·y + c and v = d·x + e·y + f: the inverse of rotation · shear ·
    # scale. c and f let it take the glyph's place (x, y) to the mask's centre.
    cos, sin = math.cos(angle) * ratio, math.sin(angle) * ratio
    a, b, d, e = cos - shear * -sin, sin - shear * cos, -sin, cos
    c, f = side / 2 - a * x - b * y, side / 2 - d * x - e * y
    return _glyph_mask(character, side).transform((size, size), Image.Transform.AFFINE, (a, b, c, d, e, f),
                                                  Image.Resampling.BILINEAR)


def draw_glyph(label, index, size=32, characters=GLYPHS["glyphs"]):
    """One glyph -> uint8 H W 3, a pure function of its arguments. About .2 ms at 32 x 32."""
    rng = np.random.default_rng(index)
    # All numbers at once: a call of numpy costs more than a number.
    between = functools.partial(_between, uniform=iter(rng.random(64).tolist()))

    # A dark background and a glyph at least 90 grey levels lighter, else it would vanish; clutter of any colour.
    colours = rng.integers(0, 256, (5, 3))
    while (colours[1] - colours[0]) @ (0.299, 0.587, 0.114) < 90:
        colours[:2] = rng.integers(0, 256, (2, 3))
    faint = colours[0] + 0.3 * (colours[1] - colours[0])
    back, fore, *dots, line = map(tuple, colours.tolist())
    canvas = Image.new("RGB", (size, size), back)
    draw = ImageDraw.Draw(canvas)

    # Clutter makes the set hard enough to tell models apart. Below the glyph: a faint piece of another letter, and dots;
    # above it: a thin line, and noise.
    canvas.paste(tuple(faint.astype(int).tolist()), (0, 0),
                 _placed(characters[int(between(0, len(characters)))], size, scale=between(0.5, 0.9), angle=between(-3, 3),
                         shear=0, x=between(0, size), y=between(0, size)))
    for colour in dots:
        x, y, radius = between(0, size), between(0, size), between(0.02, 0.06) * size
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    canvas.paste(fore, (0, 0),
                 _placed(characters[label], size, scale=between(0.85, 1.05), angle=between(-0.25, 0.25),
                         shear=between(-0.2, 0.2), x=between(0.45, 0.55) * size, y=between(0.45, 0.55) * size))
    draw.line([between(0, size) for _ in range(4)], fill=line, width=max(1, size // 32))
    noise = rng.integers(-10, 11, (size, size, 3), dtype=np.int16)
    return np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# 7 Renditions: a robustness set out of any test set, as ImageNet-R is one of ImageNet


def renditions(imageset):
    """The set's images as drawings, prints and the like. In-memory images are redrawn now, files when they are read."""
    if imageset.images is None:
        return ImageSet(imageset.labels, imageset.class_names, None, imageset.files, imageset.present, rendition=True)
    drawn = np.stack([np.asarray(rendition(imageset.picture(i), i)) for i in range(len(imageset))])
    return ImageSet(imageset.labels, imageset.class_names, torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous())


def rendition(image, index):
    """One of eight renditions of an RGB PIL image, chosen by its index alone."""
    # Not index % 8: glyphs' labels are index % K, and each class would have kinds of its own.
    kind = zlib.crc32(str(index).encode()) % len(RENDITIONS)
    return RENDITIONS[kind](image).convert("RGB")


RENDITIONS = (
    lambda image: ImageOps.autocontrast(image.filter(ImageFilter.FIND_EDGES)),       # neon outlines on black
    lambda image: image.convert("L").filter(ImageFilter.EMBOSS),                     # relief
    lambda image: ImageOps.posterize(image, 1),                                      # two levels a channel
    lambda image: ImageOps.solarize(image, 128),                                     # bright parts inverted
    lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 20)),          # out of focus
    lambda image: image.convert("L").filter(ImageFilter.CONTOUR),                    # pencil lines on white
    lambda image: ImageOps.autocontrast(image.convert("L"), cutoff=2).convert("1"),  # newsprint, dithered
    lambda image: ImageOps.invert(image.filter(ImageFilter.ModeFilter(5))),          # negative of a coarse painting
)


# ---------------------------------------------------------------------------------------------------------------------
# 8 Sets on disk. A set that was half downloaded, or unpacked elsewhere, would train without a word on what is left: so
# each reader checks that all is there, and says in one sentence what is not.

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# Where Debian's package dataset-fashion-mnist puts the four files.
FASHION_ROOT = "/usr/share/datasets/fashion-mnist"


def _fashion_mnist(options, part):
    """Grey 28 x 28 images, zero padded to image_size, the same in all three channels (a view: no memory used)."""
    root, size, prefix = options["root"] or FASHION_ROOT, options["image_size"], "t10k" if part == "test" else "train"
    if size < 28:
        raise UserError(f"data.image_size {size} is too small for fashion_mnist; choose 28 or more (32 is usual)")
    images = read_idx(os.path.join(root, f"{prefix}-images-idx3-ubyte.gz"), dimensions=3)
    path = os.path.join(root, f"{prefix}-labels-idx1-ubyte.gz")
    labels = read_idx(path, dimensions=1)
    # MNIST and others have files of the same names; and a pair of files that do not belong together would train, badly.
    if len(labels) != len(images) or labels.max() >= len(FASHION) or images.shape[1:] != (28, 28):
        raise UserError(f"{path} holds {len(labels)} labels up to {labels.max()} for images of shape {images.shape}, "
                        "which is not Fashion-MNIST; download its four .gz files again")
    before, after = (size - 28) // 2, (size - 28 + 1) // 2
    images = F.pad(torch.from_numpy(images), (before, after, before, after))   # N H W
    return ImageSet(labels, FASHION, images[:, None].expand(-1, 3, -1, -1))    # N 3 H W


def read_idx(path, dimensions):
    """A gzipped IDX file of unsigned bytes -> uint8 array. Format: yann.lecun.com/exdb/mnist. Raises UserError."""
    try:
        with gzip.open(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); install Debian's package dataset-fashion-mnist, or download "
                        "Fashion-MNIST's four .gz files and set data.root to their folder") from None
    # Header: bytes 0 0 8 (unsigned byte) d (number of dimensions), then d big-endian 4-byte sizes; then the values.
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path} is not an IDX file of bytes with {dimensions} dimensions; download it again")
    shape = np.frombuffer(raw[4:start], ">i4").astype(int)
    if len(raw) - start != shape.prod():
        raise UserError(f"{path} holds {len(raw) - start} values where its header says {shape.prod()}; "
                        "download it again")
    # A copy: torch takes only arrays that may be written to.
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def _root(options):
    root = options["root"]
    if not root or not os.path.isdir(root):
        raise UserError(f"data.root {root!r} is not a folder; set data.root to where {options['set']} lies")
    return root


def _folders(options, part):
    """train/<class>/* with val/<class>/* (imagenet, tiny_imagenet), or with test/ or else val/ (folder)."""
    root = _root(options)
    names = _class_folders(os.path.join(root, "train"))
    if part == "train":
        return _read_folders(os.path.join(root, "train"), names, names)
    # ImageNet's and Tiny-ImageNet's own test/ has no labels: val/ is what everyone's test accuracies are about.
    test = os.path.join(root, "test")
    if options["set"] != "folder" or not os.path.isdir(test):
        test = os.path.join(root, "val")
    # Tiny-ImageNet's val/ comes as one folder, images/, and a list. Many people have sorted it into classes, within
    # images/ or beside it, and not all of them removed what was there before.
    annotations, flat = os.path.join(test, "val_annotations.txt"), os.path.join(test, "images")
    if options["set"] == "tiny_imagenet" and os.path.isdir(flat):
        if os.path.isfile(annotations) and _image_files(flat):
            return _annotated(annotations, flat, names)
        if _subfolders(flat):
            test = flat
    found = [name for name in _class_folders(test) if name != "images" or name in names]
    if set(found) != set(names):
        odd = sorted(set(found) ^ set(names))
        raise UserError(f"{test} and {os.path.join(root, 'train')} must hold the same class folders, but only one of "
                        f"them has {odd[0]!r} ({len(odd)} such); complete data.root or remove the folder")
    return _read_folders(test, names, names)


def _subfolders(folder):
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _image_files(folder):
    # All that is no folder, a link to nowhere too: an image that is missing is named when it is read, not left out.
    return sorted(e.path for e in os.scandir(folder)
                  if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".") and not e.is_dir())


def _class_folders(folder):
    """The sorted names of the folders in a folder, at least two."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} does not exist; set data.root to the folder that holds it")
    names = _subfolders(folder)
    # One class is never what was meant: a flat folder of images would be learnt as one class, or scored as .5 %.
    if len(names) < 2:
        flat = f" and {len(_image_files(folder))} images beside them" if _image_files(folder) else ""
        raise UserError(f"{folder} holds {len(names)} class folders{flat}; sort its images into one folder a class")
    return names


def _read_folders(folder, found, names):
    """All images of the class folders `found`, labelled by their place in `names`. Empty classes are refused."""
    files, labels, place = [], [], {name: label for label, name in enumerate(names)}
    for name in found:
        # Tiny-ImageNet has one folder more.
        inner = os.path.join(folder, name, "images")
        some = _image_files(inner if os.path.isdir(inner) else os.path.join(folder, name))
        if not some:
            raise UserError(f"{os.path.join(folder, name)} holds no images; complete the class or remove its folder")
        files += some
        labels += [place[name]] * len(some)
    return ImageSet(labels, names, files=files)


def _annotated(annotations, folder, names):
    """Tiny-ImageNet's val as downloaded; a line of the list is file, wnid and a box, separated by tabs."""
    place, files, labels = {name: label for label, name in enumerate(names)}, [], []
    for line in _lines(annotations):
        if len(line) < 2 or line[1] not in place or not os.path.isfile(os.path.join(folder, line[0])):
            raise UserError(f"{annotations} has the line {' '.join(line)!r}, which names no image in {folder} with a "
                            "class of train; download the set again")
        files.append(os.path.join(folder, line[0]))
        labels.append(place[line[1]])
    if len(files) != len(_image_files(folder)):
        raise UserError(f"{annotations} lists {len(files)} images but {folder} holds {len(_image_files(folder))}; "
                        "download the set again")
    return ImageSet(labels, names, files=files)


def _lines(path):
    """The words of each line of a text file."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.split() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); complete data.root") from None


def _robustness(folder, names):
    """A folder of <class name>/*, its classes matched by name with the training set's; `present` says which match."""
    if not os.path.isdir(folder):
        raise UserError(f"data.robustness has {folder!r}, which is not a folder; give 'renditions' or a folder of "
                        "class folders")
    # Folders of other names are left out: the model cannot choose them.
    found = [name for name in _subfolders(folder) if name in set(names)]
    if len(found) < 2:
        raise UserError(f"data.robustness folder {folder} has {len(found)} of the training set's class names; its "
                        f"folders must be named as they are, for example {names[0]!r}")
    imageset = _read_folders(folder, found, names)
    # ImageNet-R has 200 of ImageNet's 1000 classes, and its published numbers let the model choose among these. The
    # original does so for some of its models only; the ViTs are scored over all 1000.
    imageset.present = imageset.labels.unique()
    return imageset


def _inside(root, inner, needed):
    """`root`, or `root/inner` as the archive unpacks, whichever holds the file `needed`."""
    for folder in (root, os.path.join(root, inner)):
        if os.path.isfile(os.path.join(folder, needed)):
            return folder
    raise UserError(f"data.root {root} holds no {needed}; set data.root to the folder of the unpacked {inner}")


def _cifar100(options, part):
    """CIFAR-100's binary version: records of coarse label, fine label, 3072 bytes (RGB planes of 32 x 32)."""
    root = _inside(_root(options), "cifar-100-binary", f"{part}.bin")
    path = os.path.join(root, f"{part}.bin")
    # No header, so all that can be checked is the length and the fine labels, every 3074th byte from the second.
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % 3074 or raw[1::3074].max() > 99:
        raise UserError(f"{path} ({len(raw)} bytes) is not whole CIFAR-100 records of 3074 bytes; download it again")
    records = raw.reshape(-1, 3074)
    names_file = os.path.join(root, "fine_label_names.txt")
    names = [line[0] for line in _lines(names_file)] if os.path.isfile(names_file) else [str(k) for k in range(100)]
    return ImageSet(records[:, 1].astype(np.int64), names,
                    torch.from_numpy(records[:, 2:].reshape(-1, 3, 32, 32).copy()))


def _cub(options, part):
    """CUB-200-2011: three lists, joined by the image's number, say each file's class (from 1) and split."""
    root = _inside(_root(options), "CUB_200_2011", "images.txt")
    paths, classes, train = ({line[0]: line[-1] for line in _lines(os.path.join(root, f"{name}.txt"))}
                             for name in ("images", "image_class_labels", "train_test_split"))
    if not (paths.keys() == classes.keys() == train.keys() and set(train.values()) <= {"0", "1"}
            and all(label.isdecimal() for label in classes.values())):
        raise UserError(f"{root}'s images.txt, image_class_labels.txt and train_test_split.txt do not tell the "
                        "same images' classes and splits; unpack CUB-200-2011 again")
    files, labels, names = [], [], {}
    for number, file in paths.items():
        label = int(classes[number]) - 1
        # Names from both splits: training and test set must have the same classes in the same order.
        names[label] = file.split("/")[0]
        if (train[number] == "1") == (part == "train"):
            files.append(os.path.join(root, "images", file))
            labels.append(label)
    if not files or sorted(names) != list(range(len(names))):
        raise UserError(f"{root} lists {len(files)} {part} images and classes that are not 1 to {len(names)}; "
                        "unpack CUB-200-2011 again")
    return ImageSet(labels, [names[label] for label in range(len(names))], files=files)
