"""Promises of data.py: randomness has no state, no image is lost or seen twice, files are read or refused.

1 Sets: drawn, read from files and split; what is not all there is named.
2 Batches: a view depends on seed, stage, epoch and position alone, whatever the workers and the processes;
  evaluation sees every image once; a bad image is named.
3 Transforms: each against numbers by hand, a second definition in numpy, or its distribution.
4 Processes: one needs no group, two add up.
"""

import gzip
import math
import multiprocessing
import os
import random
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import models
from conftest import ROOT
from data import UserError

CPU = torch.device("cpu")
ALONE = data.Setup(CPU, 0, 1)

IMAGENET = {"mean": "imagenet", "std": "imagenet"}


def make_config(**options):
    """A config of glyphs with every augmentation off; keyword arguments change keys of `data`."""
    defaults = dict(set="glyphs", root="", image_size=32, classes=24, train_images=100, validation_images=24,
                    test_images=48, robustness=[], pad=0, resized_crop=None, flip=0.0, randaugment=0.0,
                    erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0, repeats=1, workers=0, **IMAGENET)
    return {"seed": 3, "data": {**defaults, **options},
            "train": {stage: {"batch": 8, "accumulate": 2, "images": None, "passes": 1}
                      for stage in ("meta", "student")}}


def random_set(count, size=8, classes=4, seed=0):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(seed))
    return data.ImageSet(torch.arange(count) % classes, [str(c) for c in range(classes)], images)


def save_image(path, color=(10, 200, 30), size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def rows(images):
    """The images of a batch as a set of byte strings."""
    return {image.numpy().tobytes() for image in images}


# ---------- 1 Sets


@pytest.mark.parametrize("size", [32, 48])
def test_glyphs_are_the_same_bits_each_time_and_another_picture_each_index(size):
    config = make_config(image_size=size)
    one, two = data.load(config, "test"), data.load(config, "test")
    assert torch.equal(one.images, two.images) and one.images.shape == (48, 3, size, size)
    assert len(rows(one.images)) == 48
    assert torch.bincount(one.labels, minlength=24).tolist() == [2] * 24 and len(set(one.class_names)) == 24


def test_splits_of_drawn_and_of_read_sets_are_disjoint(tmp_path):
    write_fashion(tmp_path, count=60)
    for config in (make_config(), fashion_config(tmp_path)):
        parts = [rows(data.load(config, split).images) for split in ("train", "validation", "test")]
        assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert len(parts[0]) == 60 - 24 and len(parts[1]) == 24  # nothing of the pool is lost


@pytest.mark.parametrize("pool, held_out", [(4, 1), (60, 6), (12_345, 1000)])
def test_without_a_number_a_tenth_is_validation_but_at_most_1000(tmp_path, pool, held_out):
    write_fashion(tmp_path, count=pool)
    config = fashion_config(tmp_path, validation_images=None)
    parts = {split: data.load(config, split).images for split in ("train", "validation")}
    assert {split: len(images) for split, images in parts.items()} == {
        "train": pool - held_out, "validation": held_out}
    assert not rows(parts["train"]) & rows(parts["validation"])
    config["data"]["validation_images"] = held_out  # the same images as if the number were given
    assert torch.equal(parts["validation"], data.load(config, "validation").images)


def test_a_stage_sees_its_range_of_the_shuffled_training_set():
    config = make_config()
    config["train"]["meta"]["images"] = [20, 50]
    whole, part = data.load(config, "train"), data.load(config, "train", "meta")
    assert torch.equal(part.images, whole.images[20:50]) and torch.equal(part.labels, whole.labels[20:50])
    assert whole.labels[:24].tolist() != list(range(24))  # shuffled
    assert data.epoch_images(config, "meta") == len(part) and data.epoch_images(config, "student") == 100
    config["train"]["meta"]["passes"] = 3
    assert torch.equal(data.load(config, "train", "meta").images, part.images.repeat(3, 1, 1, 1))
    assert data.epoch_images(config, "meta") == 90
    config["seed"] = 4
    assert not torch.equal(data.load(config, "train").images, whole.images)
    config["train"]["meta"]["images"] = [50, 101]
    with pytest.raises(UserError, match=r"train\.meta\.images=\[50, 101\]"):
        data.load(config, "train", "meta")


def test_renditions_of_drawn_and_of_read_images_keep_labels_and_differ(tmp_path):
    config = make_config()
    plain, drawn = data.load(config, "test"), data.load(config, "renditions")
    assert torch.equal(plain.labels, drawn.labels)
    assert torch.equal(drawn.images, data.load(config, "renditions").images)
    assert (plain.images.float() - drawn.images.float()).abs().mean((1, 2, 3)).min() > 1
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        data.read_image(plain.source(i)).save(path)
    files = data.renditions(data.ImageSet([0, 1, 2], "abc", files=paths))
    (images, _), = data.eval_batches(files, config, ALONE)  # drawn while reading
    assert torch.equal(images, data.normalize(drawn.images[:3], IMAGENET))


def test_every_kind_of_rendition_occurs_for_every_class(monkeypatch):
    # With a kind in step with the label, index % 8 of 24 classes, each class would have kinds of its own.
    monkeypatch.setattr(data, "RENDITIONS", [lambda image, k=k: Image.new("L", (1, 1), k) for k in range(8)])
    kinds = {(i % 24, data.rendition(None, i).getpixel((0, 0))) for i in range(2400)}
    assert len(kinds) == 24 * 8


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


def write_fashion(root, count):
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(root / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))


def fashion_config(root, **options):
    options = {"train_images": 0, "test_images": 0, **options}
    return make_config(set="fashion_mnist", root=str(root), classes=10, **options)


def test_fashion_mnist_is_padded_and_repeated_to_three_channels(tmp_path):
    write_fashion(tmp_path, count=40)
    raw = np.frombuffer(gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz").read(), np.uint8, offset=16)
    test = data.load(fashion_config(tmp_path), "test")
    assert test.images.shape == (40, 3, 32, 32) and test.labels[:3].tolist() == [0, 1, 2]
    for channel in range(3):
        assert np.array_equal(test.images[:, channel, 2:30, 2:30].numpy(), raw.reshape(40, 28, 28))
    assert test.images.sum() == 3 * raw.astype(int).sum()  # the border is zero


def test_missing_truncated_and_foreign_fashion_files_are_refused(tmp_path):
    config = fashion_config(tmp_path)
    named = f"{tmp_path} does not hold Fashion-MNIST"
    with pytest.raises(UserError, match=f"{named}.*t10k-images.*dataset-fashion-mnist.*data.root"):
        data.load(config, "test")
    write_fashion(tmp_path, count=40)
    images, labels = (tmp_path / f"t10k-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    whole, zeros = images.read_bytes(), np.zeros((40, 28, 28), np.uint8)
    short = gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 40, 28, 28) + bytes(100))
    fewer = gzip.compress(bytes(16) + zeros[1:].tobytes())
    for broken in (short, fewer, whole[:len(whole) // 2], b"<html>not found</html>", gzip.compress(b"hello")):
        images.write_bytes(broken)
        with pytest.raises(UserError, match=named):
            data.load(config, "test")
    images.write_bytes(whole)
    write_idx(labels, np.full(40, 10, np.uint8))  # EMNIST's letters have files of the same names
    with pytest.raises(UserError, match=named):
        data.load(config, "test")
    with pytest.raises(UserError, match="image_size=24 is too small"):
        data.load(fashion_config(tmp_path, image_size=24), "train")


def folder_config(root, classes, **options):
    defaults = dict(set="imagenet", root=str(root), classes=classes, image_size=8, train_images=0,
                    validation_images=1, test_images=0)
    return make_config(**{**defaults, **options})


def make_folders(root, part, names, count=2, inner=""):
    for k, name in enumerate(names):
        for i in range(count):
            save_image(root / part / name / inner / f"{name}_{i}.png", (40 * k, 10 * i, 0))


def test_image_folders_are_labeled_by_sorted_name(tmp_path):
    names = ["n03", "n01", "n02"]
    make_folders(tmp_path, "train", names, 3)
    make_folders(tmp_path, "val", names, 2)
    config = folder_config(tmp_path, 3)
    train, validation, test = (data.load(config, split) for split in ("train", "validation", "test"))
    assert test.class_names == ["n01", "n02", "n03"] and test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [os.path.basename(f)[:3] for f in test.files] == [test.class_names[c] for c in test.labels]
    assert len(train) == 8 and len(validation) == 1 and len(set(train.files) | set(validation.files)) == 9
    make_folders(tmp_path, "test", names, 4)
    assert len(data.load(folder_config(tmp_path, 3, set="folder"), "test")) == 12  # test/ before val/
    assert len(data.load(config, "test")) == 6  # ImageNet's test/ has no labels


def test_images_in_sub_folders_of_a_class_are_read(tmp_path):
    for part in ("train", "val"):
        make_folders(tmp_path, part, ["a", "b"], 1)
    make_folders(tmp_path, "train", ["b"], 2, "2024/June")
    save_image(tmp_path / "elsewhere" / "c.JPG")
    (tmp_path / "train/a/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/a/linked/notes.txt").write_text("no image")
    save_image(tmp_path / "train/a/._hidden.png")  # macOS leaves such files; they are no images
    save_image(tmp_path / "train/a/.ipynb_checkpoints/a_0-checkpoint.png")
    config = folder_config(tmp_path, 2, set="folder")
    sets = [data.load(config, split) for split in ("train", "validation")]
    found = sorted((int(label), os.path.relpath(file, tmp_path / "train"))
                   for imageset in sets for label, file in zip(imageset.labels, imageset.files))
    assert found == [(0, "a/a_0.png"), (0, "a/linked/c.JPG"), (1, "b/2024/June/b_0.png"),
                     (1, "b/2024/June/b_1.png"), (1, "b/b_0.png")]
    assert data.epoch_images(config, "meta") == 4


def test_the_classes_of_a_folder_are_counted(tmp_path):
    for part in ("train", "test"):
        make_folders(tmp_path, part, ["x", "y", "z"])
    (tmp_path / "c.yaml").write_text(f"data: {{set: folder, root: {tmp_path}, image_size: 8}}")

    def classes(*words):
        config = models.load_config(tmp_path / "c.yaml", words)
        return config["data"]["classes"], config["target"]["classes"]

    assert classes() == (3, None)
    assert classes("data.set=cifar100", "target.set=folder", f"target.root={tmp_path}") == (100, 3)
    assert classes("target.set=folder") == classes(f"target.root={tmp_path}") == (3, 3)
    assert classes("data.classes=4") == (4, None)
    make_folders(tmp_path / "other", "train", "pqrs"), make_folders(tmp_path / "other", "test", "pqrs")
    assert classes(f"target.root={tmp_path / 'other'}") == (3, 4)
    with pytest.raises(UserError, match="data.root='' is not a folder"):
        classes("data.root=")
    with pytest.raises(UserError, match="data.classes=4, but folder in .* has 3 classes"):
        data.load(models.load_config(tmp_path / "c.yaml", ["data.classes=4"]), "test")


@pytest.mark.parametrize("layout", [
    "downloaded", "class folders", "class folders with images", "within images"])
def test_tiny_imagenet_is_read_in_every_layout(tmp_path, layout):
    names = ["n1", "n2"]
    make_folders(tmp_path, "train", names, 2, "images")
    if layout == "downloaded":
        for i, color in enumerate((40, 0, 40)):
            save_image(tmp_path / "val" / "images" / f"val_{i}.png", (color, 0, 0))
        (tmp_path / "val" / "val_annotations.txt").write_text(
            "val_2.png\tn2\t0\t0\t7\t7\nval_0.png\tn2\t0\t0\t7\t7\nval_1.png\tn1\t0\t0\t7\t7\n")
    else:
        base, inner = ("val/images", "") if layout == "within images" else ("val", layout[19:])
        make_folders(tmp_path, base, names, 1, inner)
        save_image(tmp_path / base / "n2" / inner / "more.png", (40, 0, 0))
    config = folder_config(tmp_path, 2, set="tiny_imagenet")
    test = data.load(config, "test")
    reds = [data.read_image(test.source(i)).getpixel((0, 0))[0] for i in range(len(test))]
    assert sorted(test.labels.tolist()) == [0, 1, 1] and reds == [40 * c for c in test.labels]
    assert len(data.load(config, "train")) == 3
    if layout == "downloaded":
        (tmp_path / "val" / "images" / ".DS_Store").write_text("")
        assert len(data.load(config, "test")) == 3
        save_image(tmp_path / "val" / "images" / "val_3.png")
        with pytest.raises(UserError, match="val_annotations.txt does not list .*val_3.png"):
            data.load(config, "test")


def test_wrong_folders_are_refused_with_the_folder_named(tmp_path):
    config = folder_config(tmp_path, 2)
    with pytest.raises(UserError, match="data.root=.*nowhere"):
        data.load(folder_config(tmp_path / "nowhere", 2), "test")
    with pytest.raises(UserError, match="train holds 0 class folders"):
        data.load(config, "test")
    make_folders(tmp_path, "train", ["a"])
    with pytest.raises(UserError, match="train holds 1 class folders"):
        data.load(config, "train")
    make_folders(tmp_path, "train", ["a", "b"])
    save_image(tmp_path / "val" / "flat.png")
    with pytest.raises(UserError, match="val holds 0 class folders; sort images into one folder per class"):
        data.load(config, "test")
    make_folders(tmp_path, "val", ["a", "c"])
    with pytest.raises(UserError, match="'b'"):
        data.load(config, "test")
    with pytest.raises(UserError, match="data.classes=5, but .* has 2 classes"):
        data.load(folder_config(tmp_path, 5), "train")
    (tmp_path / "train" / "z").mkdir()
    with pytest.raises(UserError, match="z holds no images"):
        data.load(folder_config(tmp_path, 3), "train")


def test_robustness_folders_are_matched_by_name(tmp_path):
    for part in ("train", "val"):
        make_folders(tmp_path, part, ["a", "b", "c", "d"])
    make_folders(tmp_path, "r", ["d", "b", "stranger"], 2)
    config = folder_config(tmp_path, 4)
    robust = data.load(config, str(tmp_path / "r"))
    assert robust.present.tolist() == [1, 3] and robust.labels.tolist() == [1, 1, 3, 3]
    assert robust.class_names == ["a", "b", "c", "d"] and data.load(config, "train").present is None
    make_folders(tmp_path, "other", ["x", "y"])
    with pytest.raises(UserError, match="other has 0 of"):
        data.load(config, str(tmp_path / "other"))


def test_cifar100_records_are_read_by_fine_label_and_planes(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (5, 3074), dtype=np.uint8)
    records[:, 1] = [7, 99, 0, 3, 3]
    config = make_config(set="cifar100", root=str(tmp_path), classes=100, test_images=0)
    with pytest.raises(UserError, match="test.bin is missing .*data.root"):
        data.load(config, "test")
    records.tofile(tmp_path / "test.bin")
    test = data.load(config, "test")
    assert test.labels.tolist() == [7, 99, 0, 3, 3]
    assert test.images[4, 1, 2, 3] == records[4, 2 + 1024 + 2 * 32 + 3]  # green plane, row 2, column 3
    for foreign in (records.tobytes()[:-1], bytes([200]) * 3074):  # truncated; a label that cannot be
        (tmp_path / "test.bin").write_bytes(foreign)
        with pytest.raises(UserError, match="test.bin"):
            data.load(config, "test")


def test_cub_is_joined_by_image_number(tmp_path):
    for name in ("001.A/x.png", "002.B/y.png", "002.B/z.png"):
        save_image(tmp_path / "images" / name)
    lists = {"images": "1 001.A/x.png\n2 002.B/y.png\n3 002.B/z.png\n",
             "image_class_labels": "3 2\n2 2\n1 1\n", "train_test_split": "1 0\n2 1\n3 0\n"}
    config = make_config(set="cub", root=str(tmp_path), classes=2, test_images=0)
    for name, text in lists.items():
        with pytest.raises(UserError, match=f"{tmp_path} does not hold CUB-200-2011 .*{name}.txt"):
            data.load(config, "test")
        (tmp_path / f"{name}.txt").write_text(text)
    test = data.load(config, "test")
    assert [os.path.basename(f) for f in test.files] == ["x.png", "z.png"] and test.labels.tolist() == [0, 1]
    assert test.class_names == ["001.A", "002.B"]
    for name, text in (("image_class_labels", "1 1\n2 3\n3 3\n"), ("train_test_split", "1 0\n2 1\n")):
        (tmp_path / f"{name}.txt").write_text(text)  # no class 2; no split of image 3
        with pytest.raises(UserError, match="does not hold CUB-200-2011"):
            data.load(config, "test")
        (tmp_path / f"{name}.txt").write_text(lists[name])


def test_images_of_any_mode_become_rgb(tmp_path):
    def read(image, name, **kind):
        image.save(tmp_path / name, **kind)
        picture = data.read_image(str(tmp_path / name))
        assert picture.mode == "RGB"
        return picture.getpixel((0, 0))

    assert read(Image.new("L", (4, 4), 100), "gray.png") == (100, 100, 100)
    assert read(Image.fromarray(np.full((4, 4), 25700, np.uint16)), "gray16.png") == (100, 100, 100)
    assert read(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "cmyk.tif") == (0, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read(palette, "palette.png") == (10, 20, 30)
    assert read(palette, "transparent.png", transparency=1) == (255, 255, 255)  # not what lies below
    assert read(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "alpha.png") == (255, 255, 255)
    assert read(Image.new("LA", (4, 4), (9, 255)), "la.png") == (9, 9, 9)


# ---------- 2 Batches

BATCHED = dict(pad=2, flip=0.5, erasing=0.5)  # whole batches, cropped and flipped on the device
SINGLE = dict(resized_crop=[0.2, 1], pad=1, flip=0.5, randaugment=9.0, erasing=0.5)  # one by one, by Pillow
every_way = pytest.mark.parametrize("options", [BATCHED, *({**SINGLE, "workers": n} for n in range(3))])
both_ways = pytest.mark.parametrize("options", [BATCHED, SINGLE])


def small_config(batch=8, accumulate=2, **options):
    config = make_config(image_size=8, classes=4, **options)
    config["train"]["meta"].update(batch=batch, accumulate=accumulate)
    return config


def epoch_of(config, imageset, rank=0, world=1, epoch=1, stage="meta", **start):
    return list(data.train_batches(imageset, config, stage, epoch, data.Setup(CPU, rank, world), **start))


def same(one, two):
    return len(one) == len(two) > 0 and all(torch.equal(a, c) and torch.equal(b, d)
                                            for (a, b), (c, d) in zip(one, two))


def global_states():
    return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()


@every_way
def test_batches_are_a_function_of_the_position_alone(options):
    config, imageset = small_config(mixup=0.8, cutmix=1.0, **options), random_set(70)
    state = global_states()
    whole = epoch_of(config, imageset)
    assert global_states() == state  # nothing global is moved …
    assert len(whole) == 4 * 2  # 70 // (8 · 2) steps, two each
    torch.rand(3), np.random.rand(3), random.random()  # … nor does anything global matter
    assert same(epoch_of(config, imageset), whole)
    assert same(epoch_of(config, imageset, start_step=3), whole[6:])  # no step needs those before


@both_ways
def test_each_view_is_drawn_from_seed_stage_epoch_and_position(options):
    """All images are equal, so that the order changes nothing: what differs are the draws."""
    config, imageset = small_config(**options), random_set(1).take([0] * 64)
    whole = epoch_of(config, imageset)
    assert len(rows(torch.cat([images for images, _ in whole]))) > 50
    for change in (dict(epoch=2), dict(stage="student")):
        assert not rows(epoch_of(config, imageset, **change)[0][0]) & rows(whole[0][0])
    config["seed"] += 1
    assert not rows(epoch_of(config, imageset)[0][0]) & rows(whole[0][0])


def test_workers_change_nothing():
    imageset = random_set(70)
    none, one, two = (epoch_of(small_config(**SINGLE, workers=n), imageset) for n in range(3))
    assert same(none, one) and same(none, two)


@both_ways
def test_two_processes_with_half_the_batch_see_what_one_sees(options):
    imageset = random_set(70)
    one = epoch_of(small_config(smoothing=0.1, **options), imageset)
    half = small_config(batch=4, smoothing=0.1, **options)
    halves = [epoch_of(half, imageset, rank, world=2) for rank in range(2)]
    assert same([tuple(torch.cat(pair) for pair in zip(a, b)) for a, b in zip(*halves)], one)


@pytest.mark.parametrize("options", [dict(erasing=0.5), SINGLE])
def test_views_of_single_images_do_not_depend_on_the_batch(options):
    imageset = random_set(64)
    images = [torch.cat([x for x, _ in epoch_of(small_config(batch, n, **options), imageset)])
              for batch, n in ((8, 2), (16, 1), (4, 4))]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_draws_are_the_same_in_every_python_process():
    """Python's hash() of a text is not: a resumed run would go on with other draws."""
    assert data._rng(3, "meta", 1).integers(1000, size=4).tolist() == [146, 991, 364, 438]
    column = Image.fromarray(np.arange(32, dtype=np.uint8).repeat(3).reshape(1, 32, 3).repeat(32, 0))
    options = make_config(pad=9, flip=0.5)["data"]
    views = [data.augment(column, options, repr((3, "meta", 1, position))) for position in range(4)]
    # Two neighbors of a row: rising where the image is upright, falling where it is flipped.
    assert [view[0, 9:11, 0].tolist() for view in views] == [[18, 19], [5, 6], [16, 15], [11, 12]]


def test_an_epoch_shows_every_image_at_most_once_and_repeats_on_request():
    config, imageset = small_config(), random_set(70)
    seen = torch.cat([images for images, _ in epoch_of(config, imageset)])
    assert len(seen) == 64 and len(rows(seen)) == 64 and rows(seen) <= rows(
        data.normalize(imageset.images, IMAGENET))
    config["data"]["repeats"] = 3
    repeated = torch.cat([images for images, _ in epoch_of(config, imageset)])
    assert len(repeated) == 64 and len(rows(repeated)) == 22  # 21 images three times, one once
    for options in (dict(pad=2, flip=0.5), {**SINGLE, "erasing": 0.0}):
        views = [images for images, _ in epoch_of(small_config(repeats=3, **options), imageset)]
        assert len(rows(torch.cat(views))) > 50  # copies differ


def test_too_small_a_set_names_the_batch():
    assert data.steps_per_epoch(100, 8, 2, 3) == 2
    with pytest.raises(UserError, match=r"train\.meta\.batch=8 "):
        epoch_of(small_config(), random_set(15))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 13, 31])
@pytest.mark.parametrize("size", [8, 4])  # as it is in memory; resized in a worker
def test_every_image_is_evaluated_once(count, world, size):
    imageset = random_set(count, classes=count)  # the label is the image's number
    config = make_config(image_size=size, workers=1)
    shares = [list(data.eval_batches(imageset, config, data.Setup(CPU, r, world), 4)) for r in range(world)]
    labels = torch.cat([y for share in shares for _, y in share])
    images = torch.cat([x for share in shares for x, _ in share])
    assert sorted(labels.tolist()) == list(range(count))
    views = [data.center_crop(data.read_image(imageset.source(i)), size) for i in range(count)]
    expected = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    assert torch.equal(images, data.normalize(expected, IMAGENET)[labels])


def test_the_files_of_a_small_set_are_read_once(tmp_path, monkeypatch):
    files = [str(tmp_path / f"{k}.png") for k in range(5)]
    for k, file in enumerate(files):
        Image.new("RGB", (9, 9), (50 * k, 0, 0)).save(file)
    imageset, config = data.ImageSet(range(5), "abcde", files=files), make_config(image_size=8, workers=0)
    first = list(data.eval_batches(imageset, config, ALONE, 2))
    for file in files[1:]:
        Path(file).unlink()
    assert same(list(data.eval_batches(imageset, config, ALONE, 2)), first) and len(first) == 3
    with pytest.raises(UserError):  # another process has other images
        list(data.eval_batches(imageset, config, data.Setup(CPU, 1, 2), 2))
    monkeypatch.setattr(data, "SMALL", 100)  # too large to be kept
    large = data.ImageSet([0], "abcde", files=files[:1])
    assert same(list(data.eval_batches(large, config, ALONE)), list(data.eval_batches(large, config, ALONE)))
    assert imageset.views and not large.views


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_that_is_left_early_leaves_nothing_to_the_next_and_workers_stay(workers):
    config, imageset = small_config(**SINGLE, workers=workers), random_set(70)
    whole, children = epoch_of(small_config(**SINGLE), imageset), set()
    for epoch in range(2):
        next(data.train_batches(imageset, config, "meta", epoch, ALONE))
        children |= {child.pid for child in multiprocessing.active_children()}
    assert same(epoch_of(config, imageset), whole)
    next(data.eval_batches(imageset, make_config(image_size=4, workers=workers), ALONE, 4))
    assert same(epoch_of(config, imageset), whole)
    assert children == {child.pid for child in multiprocessing.active_children()} and len(children) == workers


def test_a_process_with_workers_ends_by_itself_also_in_the_middle_of_an_epoch():
    code = ("import sys; sys.path[:0] = ['tests', '.']; from test_data import *\n"
            "config = small_config(**SINGLE, workers=2)\n"
            "batches = data.train_batches(random_set(70), config, 'meta', 0, ALONE)\n"
            "next(batches); print('end')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_also_from_a_worker(tmp_path, workers):
    good, bad = tmp_path / "good.png", tmp_path / "bad.jpg"
    save_image(good)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bad)
    bad.write_bytes(bad.read_bytes()[:1500])  # a download that broke off
    config = make_config(image_size=8, workers=workers)
    for path in (bad, tmp_path / "gone.png"):
        files = data.ImageSet([0, 1], "ab", files=[str(good), str(path)])
        with pytest.raises(UserError, match=path.name) as error:
            list(data.eval_batches(files, config, ALONE))
        assert "\n" not in str(error.value)
    (images, _), = data.eval_batches(files.take([0]), config, ALONE)  # the workers are still there
    assert torch.equal(images, data.normalize(torch.tensor([10, 200, 30], dtype=torch.uint8)
                                              .view(1, 3, 1, 1).expand(1, 3, 8, 8), IMAGENET))


# ---------- 3 Transforms


def test_normalization_by_hand():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1)
    expected = torch.tensor([-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(data.normalize(images, IMAGENET).flatten(), expected)


def test_padding_moves_by_at_most_pad_repeats_edges_and_flips_as_often_as_asked():
    pool = torch.arange(8, dtype=torch.uint8).expand(400, 3, 8, 8)  # pixel = its column
    options, rng = dict(pad=3, flip=0.25), np.random.default_rng(0)
    out = data._crop_and_flip(pool, np.arange(400), options, rng, 400, slice(0, None)).long()
    flipped = out[:, 0, 0, 0] > out[:, 0, 0, 7]
    assert 0.17 < flipped.float().mean() < 0.33
    upright = torch.where(flipped[:, None, None, None], out.flip(3), out)
    shift = upright[:, 0, 0, 4] - 4
    assert shift.unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    expected = (torch.arange(8) + shift[:, None]).clamp(0, 7)[:, None, None].expand(400, 3, 8, 8)
    assert torch.equal(upright, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_padding_an_image_file_does_the_same(axis):
    ramp = np.arange(8, dtype=np.uint8).repeat(8).reshape(8, 8)  # pixel = its row, or its column
    image = Image.fromarray(np.stack([ramp.T if axis else ramp] * 3, -1))
    options = make_config(image_size=8, pad=2, flip=0.25 * axis)["data"]
    views = np.stack([data.augment(image, options, key)[..., 0].astype(int) for key in range(400)])
    views = views if axis else views.transpose(0, 2, 1)
    flipped = views[:, 0, 0] > views[:, 0, 7]
    assert 0.17 < flipped.mean() < 0.33 if axis else not flipped.any()
    views[flipped] = views[flipped][..., ::-1]
    shift = views[:, 0, 4] - 4
    assert np.unique(shift).tolist() == [-2, -1, 0, 1, 2]
    assert np.array_equal(views, (np.arange(8) + shift[:, None]).clip(0, 7)[:, None].repeat(8, 1))


def test_evaluation_resizes_to_8_7_of_the_size_and_crops_the_center():
    image = Image.new("RGB", (96, 128))
    ImageDraw.Draw(image).rectangle((30, 40, 65, 87), fill="white")
    view = data.center_crop(image, 56)  # shorter side 64, crop 56
    expected = image.resize((64, 85), Image.Resampling.BICUBIC).crop((4, 14, 60, 70))
    assert np.array_equal(view, expected)
    small = image.resize((32, 32))
    assert data.center_crop(small, 32) is small  # no resize at 32 or less
    assert data.center_crop(image, 28).size == (28, 28)


class Fixed:
    """A generator whose draws are given, to compute by hand."""

    def __init__(self, coin=0.0, beta=0.0, integers=()):
        self.coin, self.value, self.numbers = coin, beta, list(integers)

    def random(self):
        return self.coin

    def beta(self, a, b):
        return self.value

    def integers(self, high):
        return self.numbers.pop(0)


def mix(images, labels, rng, **options):
    return data.mix(images, torch.tensor(labels), make_config(**options)["data"], rng)


def test_mixup_and_label_smoothing_by_hand():
    images = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    mixed, targets = mix(images, [0, 2], Fixed(beta=0.75), classes=4, mixup=0.8, smoothing=0.1)
    assert mixed[0].unique().tolist() == [1.25] and mixed[1].unique().tolist() == [1.75]
    # smoothed: .025 everywhere, .925 at the label; .75 · .925 + .25 · .025 = .7
    expected = torch.tensor([[0.7, 0.025, 0.25, 0.025], [0.25, 0.025, 0.7, 0.025]])
    torch.testing.assert_close(targets, expected)
    plain, targets = mix(images, [0, 2], Fixed(), classes=4, smoothing=0.1)
    assert torch.equal(plain, images)
    torch.testing.assert_close(targets[0], torch.tensor([0.925, 0.025, 0.025, 0.025]))


def test_cutmix_pastes_a_clipped_box_and_corrects_lambda():
    images, both = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8), dict(mixup=0.8, cutmix=1.0)
    # λ = .75: sides 8 · √.25 = 4, center y 1, x 7: rows 0–2 and columns 5–7 are left of it, 9 of 64 pixels
    mixed, targets = mix(images, [0, 1], Fixed(0.4, 0.75, [1, 7]), classes=2, **both)
    expected = torch.full((8, 8), 1.0)
    expected[0:3, 5:8] = 2.0
    assert torch.equal(mixed[0, 0], expected) and torch.equal(mixed[1, 2], 3 - expected)
    torch.testing.assert_close(targets, torch.tensor([[55 / 64, 9 / 64], [9 / 64, 55 / 64]]))
    mixed, _ = mix(images, [0, 1], Fixed(0.6, 0.75), classes=2, **both)  # the coin's other side
    assert mixed[0].unique().tolist() == [1.25]


def test_lambda_is_beta_distributed_and_targets_sum_to_one():
    images, rng = torch.zeros(2, 3, 4, 4), np.random.default_rng(0)
    draws = [mix(images, [0, 1], rng, classes=5, mixup=0.8, smoothing=0.1)[1] for _ in range(2000)]
    targets = torch.stack(draws)
    torch.testing.assert_close(targets.sum(-1), torch.ones(2000, 2))
    lam = (targets[:, 0, 0] - 0.02) / 0.9
    assert abs(lam.mean() - 0.5) < 0.02 and abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.006  # Beta(.8, .8)'s


def test_crop_areas_and_aspects_are_as_asked():
    rng = random.Random(0)
    boxes = np.array([data.resized_crop_box(400, 400, (0.1, 0.5), rng) for _ in range(3000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 400
    quantiles = np.quantile(w * h / 160000, [0.01, 0.25, 0.5, 0.75, 0.99])
    np.testing.assert_allclose(quantiles, [0.104, 0.2, 0.3, 0.4, 0.496], atol=0.015)  # uniform
    quantiles = np.quantile(np.log(w / h) / math.log(4 / 3), [0.01, 0.25, 0.5, 0.75, 0.99])
    np.testing.assert_allclose(quantiles, [-0.98, -0.5, 0, 0.5, 0.98], atol=0.06)  # log-uniform
    for start, side in ((boxes[:, 0], w), (boxes[:, 1], h)):
        places = np.quantile(start / (400 - side), [0.25, 0.5, 0.75])
        np.testing.assert_allclose(places, [0.25, 0.5, 0.75], atol=0.03)
    assert data.resized_crop_box(400, 30, (1, 1), rng) == (180, 0, 220, 30)  # nothing fits: the center


def test_erasing_areas_aspects_noise_and_rate():
    rng, areas, ratios, noise = random.Random(0), [], [], []
    for _ in range(1500):
        image = data.erase(torch.full((3, 96, 96), 7.0), 0.5, rng)
        changed = (image != 7).all(0)
        if changed.any():
            y, x = changed.nonzero().T
            h, w = int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1
            assert changed.sum() == h * w  # one whole box
            areas.append(h * w / 96**2)
            ratios.append(math.log(h / w))
            noise.append(image[:, changed].flatten())
    assert 0.45 < len(areas) / 1500 < 0.55
    np.testing.assert_allclose(np.quantile(areas, [0.01, 0.5, 0.99]), [0.023, 0.176, 0.33], atol=0.02)
    np.testing.assert_allclose(np.quantile(ratios, [0.01, 0.5, 0.99]), [-1.17, 0, 1.17], atol=0.12)
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


# What each operation does, written again in numpy: image uint8 H W 3, level m, sign s -> float H W 3


def sampled(image, matrix, fill=(124, 116, 104)):
    """Output pixel (x, y) is the bicubic value of the input at (a x + b y + c, d x + e y + f)."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5  # centers of pixels
    u, v = (matrix[k] * x + matrix[k + 1] * y + matrix[k + 2] for k in (0, 3))
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    column, row = np.floor(u - 0.5).astype(int), np.floor(v - 0.5).astype(int)
    value = np.zeros(image.shape)
    for j in range(-1, 3):
        for i in range(-1, 3):
            weight = cubic(v - 0.5 - row - j) * cubic(u - 0.5 - column - i)
            value += weight[..., None] * image[(row + j).clip(0, height - 1), (column + i).clip(0, width - 1)]
    return np.where(inside[..., None], value, fill)


def cubic(t):
    t = np.abs(t)  # Keys' kernel with a = -1, Pillow's for transforms
    return np.where(t <= 1, t**3 - 2 * t**2 + 1, np.where(t < 2, -(t**3) + 5 * t**2 - 8 * t + 4, 0))


def rotated(image, m, s):
    # Counter-clockwise on the screen about the center; the output pixel looks back along the rotation.
    cos, sin = math.cos(math.radians(s * 3 * m)), math.sin(math.radians(s * 3 * m))
    cx, cy = image.shape[1] / 2, image.shape[0] / 2
    return sampled(image, (cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy))


def stretched(image, m, s):
    low, high = image.min((0, 1)).astype(float), image.max((0, 1)).astype(float)
    return (image - low) * 255 / (high - low)


def equalized(image, m, s):
    out = np.zeros(image.shape)
    for c in range(3):
        counts = np.bincount(image[..., c].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        table = (step // 2 + np.concatenate([[0], counts.cumsum()[:-1]])) // step
        out[..., c] = table.clip(0, 255)[image[..., c]]
    return out


def posterized(image, m, s):
    step = 2 ** (4 + int(0.4 * m))
    return image.astype(int) // step * step


def gray(image):
    return np.round(image @ np.array([0.299, 0.587, 0.114]))[..., None]


def smooth(image):
    """3 x 3 mean with a center five times as heavy; the border stays."""
    out, height, width = image.astype(float), *image.shape[:2]
    inner = sum(image[1 + j:height - 1 + j, 1 + i:width - 1 + i].astype(float) * (5 if i == j == 0 else 1)
                for j in (-1, 0, 1) for i in (-1, 0, 1)) / 13
    out[1:-1, 1:-1] = np.round(inner)
    return out


def blended(base):
    return lambda image, m, s: base(image) + (1 + s * 0.09 * m) * (image - base(image))


DEFINITIONS = {
    "AutoContrast": stretched,
    "Equalize": equalized,
    "Invert": lambda image, m, s: 255 - image.astype(int),
    "Rotate": rotated,
    "Posterize": posterized,
    "Solarize": lambda image, m, s: np.where(image < 256 - int(25.6 * m), image, 255 - image.astype(int)),
    "SolarizeAdd": lambda image, m, s: np.where(image < 128, image.astype(int) + int(11 * m), image),
    "Color": blended(gray),
    "Contrast": blended(lambda image: np.round(gray(image).mean())),
    "Brightness": blended(lambda image: 0.0),
    "Sharpness": blended(smooth),
    "ShearX": lambda image, m, s: sampled(image, (1, s * 0.03 * m, 0, 0, 1, 0)),
    "ShearY": lambda image, m, s: sampled(image, (1, 0, 0, s * 0.03 * m, 1, 0)),
    "TranslateX": lambda image, m, s: sampled(image, (1, 0, s * 0.045 * m * image.shape[1], 0, 1, 0)),
    "TranslateY": lambda image, m, s: sampled(image, (1, 0, 0, 0, 1, s * 0.045 * m * image.shape[0])),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("level, sign", [(9.3, 1), (8.6, -1), (10, 1), (2.2, -1)])
def test_randaugment_operation_pixel_for_pixel(name, level, sign):
    coarse = np.random.default_rng(5).integers(20, 230, (6, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((49, 42), Image.Resampling.BILINEAR)
    expected = DEFINITIONS[name](np.asarray(image), level, sign).clip(0, 255)
    difference = np.abs(np.asarray(data.OPERATIONS[name](image, level, sign)) - expected)
    assert difference.max() <= (1.01 if name in ("AutoContrast", "Rotate") or name[-1] in "XYrts" else 0)


def test_randaugment_draws_operations_levels_and_signs_as_said(monkeypatch):
    assert list(data.OPERATIONS) == list(DEFINITIONS)  # all fifteen
    calls, rng = [], random.Random(0)
    monkeypatch.setattr(data, "OPERATIONS", {
        name: lambda image, m, sign, name=name: calls.append((name, m, sign)) for name in data.OPERATIONS})
    for _ in range(3000):
        data.randaugment(None, 9, rng)
    names, levels, signs = zip(*calls)
    assert abs(len(calls) / 3000 - 1) < 0.05  # two operations, each with p = .5
    counts = np.unique(names, return_counts=True)[1]
    assert len(counts) == 15 and counts.min() > 140 and counts.max() < 260
    assert abs(np.mean(signs)) < 0.06 and set(signs) == {-1, 1}
    assert max(levels) == 10 and abs(np.median(levels) - 9) < 0.05
    below = np.array(levels)[np.array(levels) < 9]
    assert abs(np.sqrt(np.mean((below - 9) ** 2)) - 0.5) < 0.04  # half a normal of deviation .5


# ---------- 4 Processes


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert data.setup("cpu") == ALONE
    assert data.sum_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    data.close()


def _sum_in_a_process(rank, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=port)
    assert data.setup("cpu") == data.Setup(CPU, rank, 2)
    own = torch.tensor([1.0, rank])
    assert data.sum_over_processes(own) is own and own.tolist() == [2.0, 1.0]
    data.close()
    assert not torch.distributed.is_initialized()


def test_two_processes_add_up():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(_sum_in_a_process, (port,), nprocs=2)
