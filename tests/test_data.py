"""Promises of data.py: randomness has no state, no image is lost or seen twice, files are read or refused."""

import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

import data
from conftest import ROOT, save_image, shell, write_folder, write_npz
from data import UserError

CPU = torch.device("cpu")
ALONE = data.Setup(CPU, 0, 1)

IMAGENET = {"mean": "imagenet", "std": "imagenet"}


def make_config(root="", **options):
    """A config with every augmentation off; keyword arguments change keys of `data`."""
    defaults = dict(root=str(root), image_size=8, classes=None, train_images=0, validation_images=1,
                    test_images=0, robustness=[], pad=0, resized_crop=None, flip=0.0, randaugment=0.0,
                    erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0, repeats=1, workers=0, **IMAGENET)
    return {"seed": 3, "data": {**defaults, **options},
            "train": {stage: {"batch": 8, "accumulate": 2, "images": None, "passes": 1}
                      for stage in ("meta", "student")}}


def random_set(count, size=8, classes=4, seed=0):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(seed))
    return data.ImageSet(torch.arange(count) % classes, [str(c) for c in range(classes)], images)


def rows(images):
    """The images of a batch as a set of byte strings."""
    return {image.numpy().tobytes() for image in images}


# ---------- 1 Sets


@pytest.mark.parametrize("pool, held_out", [(4, 1), (60, 6), (12_345, 1000)])
def test_without_a_number_a_tenth_is_validation_at_most_1000_and_no_image_is_lost(tmp_path, pool, held_out):
    config = make_config(write_npz(tmp_path / "s.npz", train=pool), validation_images=None)
    train, validation, test = (data.load(config, split).images for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (pool - held_out, held_out, 8)
    assert len(rows(train) | rows(validation) | rows(test)) == pool + 8
    # The same images as if the number were given, and whatever the number of training images.
    config["data"] |= dict(validation_images=held_out, train_images=2)
    assert torch.equal(data.load(config, "validation").images, validation)
    assert torch.equal(data.load(config, "train").images, train[:2])
    config["data"]["train_images"] = pool
    with pytest.raises(UserError, match=f"train_images={pool} and data.validation_images={held_out} are"):
        data.load(config, "train")
    config["data"] |= dict(validation_images=0, train_images=0)
    assert len(data.load(config, "train")) == pool and len(data.load(config, "validation")) == 0


def test_a_validation_split_of_its_own_is_used_whole_and_takes_no_training_image(tmp_path):
    own = np.random.default_rng(9).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    more = dict(validation_images=own, validation_labels=np.array([3, 3, 3, 3, 1]))
    path = write_npz(tmp_path / "s.npz", **more)
    for number in (None, 5):
        config = make_config(path, validation_images=number)
        validation = data.load(config, "validation")
        assert rows(validation.images) == rows(torch.from_numpy(own).permute(0, 3, 1, 2).contiguous())
        assert sorted(validation.labels.tolist()) == [1, 3, 3, 3, 3]
        assert len(data.load(config, "train")) == 20
    with pytest.raises(UserError, match="data.validation_images=6 are more than the 5 images"):
        data.load(make_config(path, validation_images=6), "validation")


def test_a_stage_sees_its_range_of_the_shuffled_training_set(tmp_path):
    config = make_config(write_npz(tmp_path / "s.npz", train=101))
    config["train"]["meta"]["images"] = [20, 50]
    whole, part = data.load(config, "train"), data.load(config, "train", "meta")
    assert torch.equal(part.images, whole.images[20:50]) and torch.equal(part.labels, whole.labels[20:50])
    assert whole.labels[:24].tolist() != (np.arange(24) % 4).tolist()  # shuffled
    assert len(part) == 30 and len(data.load(config, "train", "student")) == 100
    config["train"]["meta"]["passes"] = 3
    assert torch.equal(data.load(config, "train", "meta").images, part.images.repeat(3, 1, 1, 1))
    config["seed"] = 4
    assert not torch.equal(data.load(config, "train").images, whole.images)
    config["train"]["meta"]["images"] = [50, 101]
    with pytest.raises(UserError, match=r"train\.meta\.images=\[50, 101\]"):
        data.load(config, "train", "meta")


def test_a_part_of_the_test_images_is_the_same_for_every_seed_and_in_a_further_set_of_equal_size(tmp_path):
    number = np.arange(8, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    more = {f"{split}_images": number for split in ("test", "renditions")} | dict(
        renditions_labels=np.arange(8) % 4, few_images=number[:2], few_labels=np.arange(2))
    config = make_config(write_npz(tmp_path / "s.npz", **more), test_images=3)
    part = data.load(config, "test").images[:, 0, 0, 0].tolist()
    config["seed"] += 1
    for split in ("test", "renditions"):
        assert data.load(config, split).images[:, 0, 0, 0].tolist() == part == sorted(set(part))
    assert len(part) == 3 and part != [0, 1, 2] and len(data.load(config, "few")) == 2
    config["data"]["test_images"] = 9
    with pytest.raises(UserError, match="data.test_images=9 exceeds the 8 test images"):
        data.load(config, "test")


U8, LABELS = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
BAD_ARRAYS = {
    "no names": dict(class_names=None), "pickled names": dict(class_names=np.array([*"abcd"], object)),
    "names in numbers": dict(class_names=LABELS), "a name twice": dict(class_names=np.array([*"aacd"])),
    "no images": dict(train_images=None), "pickled images": dict(train_images=np.array([None] * 4)),
    "floats": dict(train_images=U8 / 1.0), "channels first": dict(train_images=U8.transpose(0, 3, 1, 2)),
    "gray": dict(train_images=U8[..., 0]), "no image": dict(train_images=U8[:0], train_labels=LABELS[:0]),
    "no labels": dict(train_labels=None), "pickled labels": dict(train_labels=np.array([*LABELS], object)),
    "fewer labels": dict(train_labels=LABELS[1:]), "labels in rows": dict(train_labels=LABELS[:, None]),
    "a label too high": dict(train_labels=LABELS + 1), "a label below 0": dict(train_labels=LABELS - 1),
    "broken labels": dict(train_labels=LABELS + 0.5), "words": dict(train_labels=np.array([*"abcd"])),
}
HEAD = b"\x93NUMPY"
DAMAGES = {  # bytes of a good file -> of a bad one
    "empty": lambda good: b"", "a web page": lambda good: b"<html>not found</html>",
    "truncated": lambda good: good[:-100], "a bit flipped": lambda good: good.replace(HEAD, b"\x93NUMPX"),
    "a bare array": lambda good: good[good.index(HEAD):], "a pickle": lambda good: b"\x80\x02K\x03.",
}


@pytest.mark.parametrize("what", [*BAD_ARRAYS, *DAMAGES])
def test_a_bad_npz_is_refused_by_name(tmp_path, what):
    path = write_npz(tmp_path / "s.npz", train=4, **BAD_ARRAYS.get(what, {}))
    if what in DAMAGES:
        path.write_bytes(DAMAGES[what](path.read_bytes()))
    with pytest.raises(UserError, match="s.npz"):
        data.load(make_config(path), "train")


def test_a_set_that_is_not_there_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root, name in (("data/glyphs.npz", "glyphs"), ("sets/cub", "cub")):
        with pytest.raises(UserError, match=f"'{root}' is not .*: python tools/prepare.py {name} {root}"):
            data.load(make_config(root), "test")
    with pytest.raises(UserError, match="data.root='' is not there: set it to a folder"):
        data.load(make_config(""), "test")


def test_image_folders_are_labeled_by_sorted_name(tmp_path):
    write_folder(tmp_path, ["train"], ["n3.png", "n1", "n2"], 3)
    write_folder(tmp_path, ["val"], ["n2", "n3.png", "n1"])
    config = make_config(tmp_path)
    train, validation, test = (data.load(config, split) for split in ("train", "validation", "test"))
    assert test.class_names == ["n1", "n2", "n3.png"] and test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [file.split("/")[-2] for file in test.files] == [test.class_names[k] for k in test.labels]
    assert len(train) == 8 and len(validation) == 1 and len(set(train.files) | set(validation.files)) == 9
    save_image(tmp_path / "test" / "0.png")  # ImageNet's own test/ has no labels
    assert data.load(config, "test").files == test.files
    shutil.rmtree(tmp_path / "test")
    write_folder(tmp_path, ["test"], test.class_names, 4)
    assert len(data.load(config, "test")) == 12


def test_images_in_sub_folders_and_behind_links_are_read_once_and_other_files_are_counted(tmp_path, capsys):
    train = write_folder(tmp_path, count=1) / "train"
    save_image(train / "b/2024/June/x.png")
    save_image(tmp_path / "elsewhere/c.JPG")
    (train / "a/linked").symlink_to(tmp_path / "elsewhere")
    (train / "a/again").symlink_to("linked")
    (train / "a/1.png").symlink_to("0.png")
    (tmp_path / "elsewhere/photo.heic").write_text("no image that can be read")
    save_image(train / "a/._hidden.png")  # macOS leaves such files; they are no images
    save_image(train / "a/.ipynb_checkpoints/a_0-checkpoint.png")
    images = data._pool(make_config(tmp_path)["data"], "train")
    found = [(int(label), os.path.relpath(file, train)) for label, file in zip(images.labels, images.files)]
    assert found == [(0, "a/0.png"), (0, "a/again/c.JPG"), (1, "b/0.png"), (1, "b/2024/June/x.png")]
    assert "1 files do not end like images" in capsys.readouterr().err


def linked(place, target):
    return lambda root: (root / place).symlink_to(target)


FOLDERS = {  # what is odd: (change, what the sentence must say, or None where it changes nothing)
    "a link to the class": (linked("train/a/x", "."), None),
    "a link to what is above": (linked("train/a/x", "../../.."), None),
    "a link to another class": (linked("train/a/x", "../b"), None),
    "a link to another split": (linked("train/a/x", "../../val"), None),
    "a link to another split's class": (linked("train/a/x", "../../val/b"), None),
    "a pipe": (lambda root: os.mkfifo(root / "train/a/7.png"), None),
    "a lost test": (linked("test", "none"), "test is a link to something that is not there"),
    "no train": (lambda root: shutil.rmtree(root / "train"), "train holds 0 class folders"),
    "one class": (lambda root: shutil.rmtree(root / "train/b"), "train holds 1 class folders"),
    "flat": (lambda root: (shutil.rmtree(root / "val"), save_image(root / "val/0.png")),
             "val holds 0 class folders; sort images into one folder per class"),
    "a loose image": (lambda root: save_image(root / "train/0.jpeg"), "train/0.jpeg is in no class"),
    "no test": (lambda root: shutil.rmtree(root / "val"), "neither test/<class>/\\* nor val/<class>/\\*"),
    "a test class short": (lambda root: shutil.rmtree(root / "val/b"), "val holds 1 class folders"),
    "another test class": (lambda root: os.rename(root / "val/b", root / "val/c"), "only one of .* has 'b'"),
    "a test that is val": (linked("test", "val"), None),
    "a test that is train": (linked("test", "train"), "train/a/0.png is in train/ and, by a link, in test/"),
    "a look-alike": (lambda root: (save_image(root / "train/caf\u00e9/0.png"),
                                   save_image(root / "val/cafe\u0301/0.png")), "has .*, some look alike"),
    "an empty class": (lambda root: (root / "train/z").mkdir(), "train/z holds no images"),
    "a lost image": (linked("train/a/7.png", "none.png"), "a/7.png is a link to something that is not there"),
    "a lost class": (linked("train/c", "../none"), "train/c is a link to something that is not there"),
    "a class twice": (linked("train/c", "b"), "train/c/0.png and an image of class 'b' are one"),
    "a class that is all": (linked("train/c", "."), "train/c"),
    "an image of two classes": (linked("train/a/7.png", "../b/1.png"), "an image of class 'a' are one"),
    "a folder of two classes": (lambda root: (save_image(root / "train/b/deep/7.png"),
                                              linked("train/a/x", "../b/deep")(root)), "of class 'a' are"),
    "a test image of train": (linked("val/a/7.png", "../../train/a/0.png"), "train/a/0.png is in train/ and"),
    "a test folder of train": (lambda root: (save_image(root / "train/a/deep/7.png"),
                                             linked("val/a/x", "../../train/a/deep")(root)), "deep/7.png is"),
    "a folder that may not be read": (lambda root: (root / "train/a").chmod(0), "train/a cannot be read"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_wrong_folder_is_refused_by_name_and_no_link_adds_an_image(tmp_path, what):
    if "may not" in what and os.geteuid() == 0:
        pytest.skip("root may read everything")
    (change, words), config = FOLDERS[what], make_config(tmp_path / "set")
    before = data.load(config, "train").files if write_folder(tmp_path / "set") else None
    data._listing.cache_clear()
    change(tmp_path / "set")
    if words is None:
        assert data.load(config, "train").files == before and len(data.load(config, "test")) == 4
        return
    with pytest.raises(UserError, match=words):
        for split in ("train", "test"):
            data.load(config, split)


def test_robustness_folders_are_matched_by_name(tmp_path):
    config = make_config(write_npz(tmp_path / "s.npz"))
    write_folder(tmp_path, ["r"], ["d", "b", "stranger"])
    (tmp_path / "r/a").mkdir()  # a class without images is not present
    write_npz(tmp_path / "s.npz", hard_images=U8[:2], hard_labels=np.array([3, 1]))
    assert data.load(config, "hard").present.tolist() == [False, True, False, True]
    robust = data.load(config, str(tmp_path / "r"))
    assert robust.present.tolist() == [False, True, False, True] and robust.labels.tolist() == [1, 1, 3, 3]
    assert robust.class_names == ["a", "b", "c", "d"] and data.load(config, "train").present.all()
    write_folder(tmp_path, ["other"], "xya")
    with pytest.raises(UserError, match="other has images of 1 of"):
        data.load(config, str(tmp_path / "other"))
    with pytest.raises(UserError, match="data.robustness='sketches' is neither a folder"):
        data.load(config, "sketches")
    write_folder(tmp_path, ["mac"], ["b", "c", "cafe\u0301"])  # a Mac's é
    with pytest.raises(UserError, match="a folder whose name looks like class 'caf\u00e9'"):
        data.load(make_config(write_npz(tmp_path / "é.npz", classes=["café", *"bcd"])), f"{tmp_path}/mac")


def test_a_set_is_known_by_its_class_names_and_training_images_wherever_it_is(tmp_path):
    def known(root):
        data._listing.cache_clear()
        return data.identity(make_config(root)["data"])

    own = dict(validation_images=U8, validation_labels=LABELS)
    npz = known(write_npz(tmp_path / "a.npz"))
    assert npz.keys() == {"data.class_names", "data.checksum"} and npz["data.class_names"] == list("abcd")
    (tmp_path / "else").mkdir()
    assert known(write_npz(tmp_path / "else/b.npz", test=4, train_more_images=U8)) == npz  # not trained on
    others = [known(write_npz(tmp_path / "b.npz", **change)) for change in (
        dict(seed=1), dict(train=21), dict(train_labels=np.arange(20)[::-1] % 4), dict(classes="abce"), own,
        own | dict(validation_images=U8 + 1))]
    folder = known(write_folder(tmp_path / "set"))
    assert folder["data.class_names"] == ["a", "b"]
    shutil.copytree(tmp_path / "set", tmp_path / "else/set")
    before = data.load(make_config(tmp_path / "else/set"), "test").checksum()
    save_image(tmp_path / "else/set/val/a/1.png", size=(90, 90))  # of the same name
    assert data.load(make_config(tmp_path / "else/set"), "test").checksum() != before
    assert known(tmp_path / "else/set") == known(f"{tmp_path}/else/../set/") == folder
    for place in ("train/a/9.png", "train/b/0.jpg"):  # it grew
        save_image(tmp_path / "set" / place)
        others.append(known(tmp_path / "set"))
    os.rename(tmp_path / "set/train/b", tmp_path / "set/train/c")
    others.append(known(tmp_path / "set"))
    assert len({str(one) for one in (npz, folder, *others)}) == 11


def palette(**info):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info |= info
    return image


def filled(value, kind):
    return Image.fromarray(np.full((4, 4), value, kind))


GRAY, WHITE = (100, 100, 100), (255, 255, 255)
MODES = {  # file: (image, its pixel as RGB, or None where it is refused)
    "1.png": (Image.new("1", (4, 4), 1), WHITE), "l.png": (Image.new("L", (4, 4), 100), GRAY),
    "la.png": (Image.new("LA", (4, 4), (9, 255)), (9, 9, 9)), "p.png": (palette(), (10, 20, 30)),
    "rgba.png": (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), WHITE),  # not what lies below
    "transparent.png": (palette(transparency=1), WHITE),
    "cmyk.tif": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255)),
    "16.png": (filled(25700, np.uint16), GRAY), "32 of 8.tif": (filled(100, np.int32), GRAY),
    "32 of 16.tif": (filled(25700, np.int32), GRAY), "float of 1.tif": (filled(100 / 255, "f"), GRAY),
    "float to 255.tif": (filled(100.2, "f"), GRAY), "nan.tif": (filled(np.nan, "f"), None),
    "float below 0.tif": (filled(-0.1, "f"), None), "float of 300.tif": (filled(300, "f"), None),
    "12 bits.tif": (filled(4095, np.uint16), None), "8 in 16 bits.png": (filled(200, np.uint16), None),
    "a mask.tif": (filled(1, np.int32), None), "black.png": (filled(0, np.uint16), (0, 0, 0)),
    "32 below 0.tif": (filled(-1, np.int32), None), "32 of 70000.tif": (filled(70000, np.int32), None),
}


@pytest.mark.parametrize("name", MODES)
def test_images_of_any_mode_become_rgb_or_are_refused_by_name(tmp_path, name):
    image, pixel = MODES[name]
    image.save(tmp_path / name)
    if pixel is None:
        with pytest.raises(UserError, match=f"{name} is not a readable image .*; convert it to 8 bits"):
            data.read_image(str(tmp_path / name))
    else:
        picture = data.read_image(str(tmp_path / name))
        assert picture.mode == "RGB" and picture.getpixel((0, 0)) == pixel


# ---------- 2 Batches

BATCHED = dict(pad=2, flip=0.5, erasing=0.5)  # whole batches, cropped and flipped on the device
SINGLE = dict(resized_crop=[0.2, 1], pad=1, flip=0.5, randaugment=9.0, erasing=0.5)  # one by one, by Pillow
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


@both_ways
def test_batches_are_a_function_of_the_position_alone_whatever_the_workers(options):
    config, imageset = small_config(mixup=0.8, cutmix=1.0, **options), random_set(70)
    state = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    whole = epoch_of(config, imageset)
    assert torch.equal(torch.get_rng_state(), state[0])  # nothing global is moved …
    assert (np.random.get_state()[1].tobytes(), random.getstate()) == state[1:]
    assert len(whole) == 4 * 2  # 70 // (8 · 2) steps, two each
    torch.rand(3), np.random.rand(3), random.random()  # … nor does anything global matter
    assert same(epoch_of(config, imageset), whole)
    assert same(epoch_of(config, imageset, start_step=3), whole[6:])  # no step needs those before
    for config["data"]["workers"] in (1, 2):
        assert same(epoch_of(config, imageset), whole)


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


@pytest.mark.parametrize("options", [BATCHED, SINGLE, {**BATCHED, "repeats": 2}])
def test_two_processes_with_half_the_batch_see_what_one_sees(options):
    imageset = random_set(70)
    one = epoch_of(small_config(smoothing=0.1, **options), imageset)
    half = small_config(batch=4, smoothing=0.1, **options)
    pairs = [zip(*step) for step in zip(*(epoch_of(half, imageset, rank, world=2) for rank in range(2)))]
    if "repeats" not in options:
        assert same([tuple(map(torch.cat, step)) for step in pairs], one)
    else:  # by turns, so that the copies of an image are in both
        assert same([tuple(torch.stack(pair, 1).flatten(0, 1) for pair in step) for step in pairs], one)


def test_draws_are_the_same_in_every_python_process():
    """Python's hash() of a text is not: a resumed run would go on with other draws."""
    assert data.generator(3, "meta", 1).integers(1000, size=4).tolist() == [146, 991, 364, 438]
    column = Image.fromarray(np.arange(32, dtype=np.uint8).repeat(3).reshape(1, 32, 3).repeat(32, 0))
    options = make_config(image_size=32, pad=9, flip=0.5)["data"]
    views = [data.view(column, options, repr((3, "meta", 1, position))) for position in range(4)]
    # Two neighbors of a row: rising where the image is upright, falling where it is flipped.
    assert [view[0, 9:11, 0].tolist() for view in views] == [[18, 19], [5, 6], [16, 15], [11, 12]]


def test_an_epoch_shows_every_image_at_most_once_and_repeats_on_request():
    config, imageset = small_config(), random_set(70)
    seen = torch.cat([images for images, _ in epoch_of(config, imageset)])
    assert len(seen) == 64 and len(rows(seen)) == 64 and rows(seen) <= rows(
        data.normalize(imageset.images, IMAGENET))
    with pytest.raises(UserError, match=r"train\.meta\.batch=8 "):
        epoch_of(config, imageset.take(range(15)))
    config["data"]["repeats"] = 3
    repeated = torch.cat([images for images, _ in epoch_of(config, imageset)])
    assert len(repeated) == 64 and len(rows(repeated)) == 22  # 21 images three times, one once
    # Copies stand side by side, so that they go to three processes, each of which has other images.
    assert all(len(rows(repeated[k:k + 3])) == 1 for k in range(0, 63, 3))
    for options in (dict(pad=2, flip=0.5), {**SINGLE, "erasing": 0.0}):
        views = [images for images, _ in epoch_of(small_config(repeats=3, **options), imageset)]
        assert len(rows(torch.cat(views))) > 50  # copies differ


@pytest.mark.parametrize("count, world, size", [
    (13, 1, 8), (31, 3, 8), (2, 3, 8), (31, 2, 4)])  # 8: as it is in memory; 4: resized in a worker
def test_every_image_is_evaluated_once(count, world, size):
    imageset = random_set(count, classes=count)  # the label is the image's number
    config = make_config(image_size=size, workers=1)
    config["train"]["meta"]["batch"] = 1  # evaluation's are of 4 then
    shares = [list(data.eval_batches(imageset, config, data.Setup(CPU, r, world))) for r in range(world)]
    labels = torch.cat([y for share in shares for _, y in share])
    images = torch.cat([x for share in shares for x, _ in share])
    assert sorted(labels.tolist()) == list(range(count))
    views = [data.center_crop(data.read_image(imageset.source(i)), size) for i in range(count)]
    expected = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    assert torch.equal(images, data.normalize(expected, IMAGENET)[labels])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_that_is_left_early_leaves_nothing_to_the_next(workers):
    config, imageset = small_config(**SINGLE, workers=workers), random_set(70)
    whole = epoch_of(small_config(**SINGLE), imageset)
    for epoch in range(2):
        next(data.train_batches(imageset, config, "meta", epoch, ALONE))
    assert same(epoch_of(config, imageset), whole)
    next(data.eval_batches(imageset, make_config(image_size=4, workers=workers), ALONE))
    assert same(epoch_of(config, imageset), whole)
    assert len(multiprocessing.active_children()) <= workers  # and no worker


def begin_epoch(code, workers=1, **env):
    """Runs code that has `batches`, an epoch with workers, in a Python process -> CompletedProcess."""
    begin = ("import os, pathlib, signal, sys, threading, time; sys.path[:0] = ['tests', '.']\n"
             "from test_data import *\n"
             f"config = small_config(**SINGLE, workers={workers})\n"
             "batches = data.train_batches(random_set(70), config, 'meta', 0, ALONE)\n")
    return shell(sys.executable, "-c", begin + code, cwd=ROOT, env=env, timeout=60)


def test_a_process_with_workers_ends_by_itself_also_in_the_middle_of_an_epoch():
    done = begin_epoch("next(batches); print('end')", workers=2)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the others start workers anew")
def test_a_worker_whose_parent_dies_while_it_starts_ends():
    """It would keep the output open for ever, so that `python … | tee log` never ends."""
    done = begin_epoch("main, start = os.getpid(), torch.set_num_threads\n"
                       "def late(n):  # a worker's first act\n"
                       "    print('begun' if os.getpid() != main else '', flush=True)\n"
                       "    time.sleep(1)\n"
                       "    start(n)\n"
                       "torch.set_num_threads = late\n"
                       "threading.Timer(0.5, lambda: os.kill(main, signal.SIGKILL)).start()\n"
                       "next(batches), time.sleep(60)")
    assert (done.returncode, done.stdout.strip()) == (-signal.SIGKILL, "begun"), done


def test_sockets_of_workers_that_a_cleaner_deletes_are_one_sentence():
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which is too long for a socket
        done = begin_epoch("next(batches)\n"
                           "for path in pathlib.Path(os.environ['TMPDIR']).rglob('*'):\n"
                           "    path.is_socket() and path.unlink()\n"
                           "try:\n"
                           "    list(batches)\n"
                           "except UserError as e:\n"
                           "    print(e)", TMPDIR=folder)
    assert f"sockets in {folder}/pymp-* were deleted" in done.stdout, done


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_also_from_a_worker(tmp_path, workers):
    good, bad = tmp_path / "good.png", tmp_path / "bad.jpg"
    save_image(good)
    Image.effect_noise((64, 64), 99).save(bad)
    bad.write_bytes(bad.read_bytes()[:1500])  # a download that broke off
    config = make_config(image_size=8, workers=workers)
    for path in (bad, tmp_path / "gone.png"):
        files = data.ImageSet([0, 1], "ab", files=[str(good), str(path)])
        with pytest.raises(UserError, match=path.name) as error:
            list(data.eval_batches(files, config, ALONE))
        assert "\n" not in str(error.value)
    (images, _), = data.eval_batches(files.take([0]), config, ALONE)  # the workers are still there
    pixel = torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1)
    assert torch.equal(images, data.normalize(pixel, IMAGENET).expand(1, 3, 8, 8))


# ---------- 3 Transforms


def test_normalization_by_hand():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1)
    expected = torch.tensor([-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(data.normalize(images, IMAGENET).flatten(), expected)
    others = data.normalize(images, {"mean": "half", "std": [0.1, 0.2, 0.5]}).flatten()
    torch.testing.assert_close(others, torch.tensor([-5.0, (128 / 255 - 0.5) / 0.2, 1.0]))


@pytest.mark.parametrize("way", ["batches on the device", "single images by Pillow"])
@pytest.mark.parametrize("axis", [0, 1])
def test_padding_moves_by_at_most_pad_repeats_edges_and_flips_as_often_as_asked(axis, way):
    ramp = np.arange(8, dtype=np.uint8).repeat(8).reshape(8, 8)  # pixel = its row, or its column
    image = np.stack([ramp.T if axis else ramp] * 3, -1)
    options = make_config(pad=2, flip=0.25 * axis)["data"]
    if way.startswith("single"):
        views = np.stack([data.view(Image.fromarray(image), options, key)[..., 0] for key in range(400)])
    else:
        pool, rng = torch.from_numpy(image).permute(2, 0, 1).expand(400, 3, 8, 8), np.random.default_rng(0)
        views = data._crop_and_flip(pool, np.arange(400), options, rng, 400, slice(0, None)).numpy()[:, 0]
    views = (views if axis else views.transpose(0, 2, 1)).astype(int)
    flipped = views[:, 0, 0] > views[:, 0, 7]
    assert 0.17 < flipped.mean() < 0.33 if axis else not flipped.any()
    views[flipped] = views[flipped][..., ::-1]
    shift = views[:, 0, 4] - 4
    assert np.unique(shift).tolist() == [-2, -1, 0, 1, 2]
    assert np.array_equal(views, (np.arange(8) + shift[:, None]).clip(0, 7)[:, None].repeat(8, 1))


def test_an_image_that_takes_too_much_memory_is_named(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda source: np.empty(2**50))  # raises MemoryError
    with pytest.raises(UserError, match="huge.png takes more memory than there is"):
        data.read_image("huge.png")


def test_a_long_thin_image_takes_little_memory(tmp_path):
    """Resized before it is cropped, it would be a million pixels long: 790 MB."""
    Image.new("RGB", (12000, 3)).save(tmp_path / "thin.png")
    code = ("import sys, resource; sys.path.insert(0, '.'); import data\n"
            "image = data.read_image(sys.argv[1])\n"
            "data.view(image.crop((0, 0, 9, 9)), {'image_size': 224}, None)\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before, view = peak(), data.view(image, {'image_size': 224}, None)\n"
            "print(view.shape == (224, 224, 3), peak() - before < 50_000)")
    done = shell(sys.executable, "-c", code, tmp_path / "thin.png", cwd=ROOT)
    assert done.stdout == "True True\n", done


def test_a_tree_of_many_classes_is_listed_once(tmp_path, monkeypatch):
    for k in range(300):
        for split in "train", "val":
            save_image(tmp_path / f"{split}/n{k:03}/{k}.png")
    config, scanned, scandir = make_config(tmp_path), [], os.scandir
    monkeypatch.setattr(data.os, "scandir", lambda path: scanned.append(str(path)) or scandir(path))
    for _ in range(3):  # as a stage asks
        data.identity(config["data"])
        for split in "train", "validation", "test":
            data.load(config, split)
    classes = [path for path in scanned if path[-4] == "n"]
    assert len(classes) == len(set(classes)) == 600


def test_evaluation_resizes_to_8_7_of_the_size_and_crops_the_center():
    image = Image.new("RGB", (96, 128))
    ImageDraw.Draw(image).rectangle((30, 40, 65, 87), fill="white")
    view = data.center_crop(image, 56)  # shorter side 64, crop 56
    expected = image.resize((64, 85), Image.Resampling.BICUBIC).crop((4, 14, 60, 70))
    assert np.array_equal(view, expected)
    small = image.resize((32, 32))
    assert data.center_crop(small, 32) is small  # no resize at 32 or less
    assert data.center_crop(image, 28).size == (28, 28)


def fixed(coin=0.0, beta=0.0, integers=()):
    """A generator whose draws are given, to compute by hand."""
    numbers = list(integers)
    return SimpleNamespace(random=lambda: coin, beta=lambda a, b: beta, integers=lambda high: numbers.pop(0))


def mix(images, labels, rng, **options):
    return data.mix(images, torch.tensor(labels), make_config(**options)["data"], rng)


def test_mixup_and_label_smoothing_by_hand():
    images = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    mixed, targets = mix(images, [0, 2], fixed(beta=0.75), classes=4, mixup=0.8, smoothing=0.1)
    assert mixed[0].unique().tolist() == [1.25] and mixed[1].unique().tolist() == [1.75]
    # smoothed: .025 everywhere, .925 at the label; .75 · .925 + .25 · .025 = .7
    expected = torch.tensor([[0.7, 0.025, 0.25, 0.025], [0.25, 0.025, 0.7, 0.025]])
    torch.testing.assert_close(targets, expected)
    plain, targets = mix(images, [0, 2], fixed(), classes=4, smoothing=0.1)
    assert torch.equal(plain, images)
    torch.testing.assert_close(targets[0], torch.tensor([0.925, 0.025, 0.025, 0.025]))


def test_cutmix_pastes_a_clipped_box_and_corrects_lambda():
    images, both = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8), dict(mixup=0.8, cutmix=1.0)
    # λ = .75: sides 8 · √.25 = 4, center y 1, x 7: rows 0–2 and columns 5–7 are left of it, 9 of 64 pixels
    mixed, targets = mix(images, [0, 1], fixed(0.4, 0.75, [1, 7]), classes=2, **both)
    expected = torch.full((8, 8), 1.0)
    expected[0:3, 5:8] = 2.0
    assert torch.equal(mixed[0, 0], expected) and torch.equal(mixed[1, 2], 3 - expected)
    torch.testing.assert_close(targets, torch.tensor([[55 / 64, 9 / 64], [9 / 64, 55 / 64]]))
    mixed, _ = mix(images, [0, 1], fixed(0.6, 0.75), classes=2, **both)  # the coin's other side
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
    def cubic(t):
        t = np.abs(t)  # Keys' kernel with a = -1, Pillow's for transforms
        return np.where(t <= 1, t**3 - 2 * t**2 + 1, np.where(t < 2, -(t**3) + 5 * t**2 - 8 * t + 4, 0))

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


def rotated(image, m, s):
    # Counter-clockwise on the screen about the center; the output pixel looks back along the rotation.
    cos, sin = math.cos(math.radians(s * 3 * m)), math.sin(math.radians(s * 3 * m))
    cx, cy = image.shape[1] / 2, image.shape[0] / 2
    return sampled(image, (cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy))


def gray(image):
    return np.round(image @ np.array([0.299, 0.587, 0.114]))[..., None]


def blended(base):
    return lambda image, m, s: base(image) + (1 + s * 0.09 * m) * (image - 1.0 * base(image))


DEFINITIONS = {
    "AutoContrast": lambda image, m, s: ImageOps.autocontrast(Image.fromarray(image)),
    "Equalize": lambda image, m, s: ImageOps.equalize(Image.fromarray(image)),
    "Invert": lambda image, m, s: 255 - image.astype(int),
    "Rotate": rotated,
    "Posterize": lambda image, m, s: image.astype(int) // (step := 2 ** (4 + int(0.4 * m))) * step,
    "Solarize": lambda image, m, s: np.where(image < 256 - int(25.6 * m), image, 255 - image.astype(int)),
    "SolarizeAdd": lambda image, m, s: np.where(image < 128, image.astype(int) + int(11 * m), image),
    "Color": blended(gray),
    "Contrast": blended(lambda image: np.round(gray(image).mean())),
    "Brightness": blended(lambda image: 0.0),
    "Sharpness": blended(lambda image: np.asarray(Image.fromarray(image).filter(ImageFilter.SMOOTH))),
    "ShearX": lambda image, m, s: sampled(image, (1, s * 0.03 * m, 0, 0, 1, 0)),
    "ShearY": lambda image, m, s: sampled(image, (1, 0, 0, s * 0.03 * m, 1, 0)),
    "TranslateX": lambda image, m, s: sampled(image, (1, 0, s * 0.045 * m * image.shape[1], 0, 1, 0)),
    "TranslateY": lambda image, m, s: sampled(image, (1, 0, 0, 0, 1, s * 0.045 * m * image.shape[0])),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("level, sign", [(9.3, 1), (10, 1), (2.2, -1)])
def test_randaugment_operation_pixel_for_pixel(name, level, sign):
    coarse = np.random.default_rng(5).integers(20, 230, (6, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((49, 42), Image.Resampling.BILINEAR)
    expected = np.clip(DEFINITIONS[name](np.asarray(image), level, sign), 0, 255)
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


def test_one_process_needs_no_group_and_an_incomplete_launch_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert data.setup("cpu") == ALONE
    assert data.sum_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    data.close()
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for launch in ({"RANK": "1"}, {"WORLD_SIZE": "2", **place},
                   {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "2", **place}):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="start with torchrun"):
            for name, value in launch.items():
                patch.setenv(name, value)
            data.setup("cpu")
