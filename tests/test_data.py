"""Promises of data.py: nothing random has a state, no image is lost or seen twice, files are read right or refused."""

import gzip
import math
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
from models import UserError

CPU = torch.device("cpu")


def make_config(**options):
    """A config of glyphs with every augmentation off; keyword arguments change keys of `data`."""
    defaults = dict(set="glyphs", root="", image_size=32, classes=24, train_images=100, validation_images=24,
                    test_images=48, robustness=[], pad=0, resized_crop=None, flip=0.0, randaugment=0.0, erasing=0.0,
                    mixup=0.0, cutmix=0.0, smoothing=0.0, repeats=1, workers=0)
    return {"seed": 3, "data": {**defaults, **options},
            "train": {stage: {"batch": 8, "accumulate": 2, "images": None, "passes": 1, "wrong_labels": 0.0}
                      for stage in ("meta", "student")}}


def random_set(count, size=8, classes=4, seed=0):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(seed))
    return data.ImageSet(torch.arange(count) % classes, [str(c) for c in range(classes)], images)


def save_image(path, colour=(10, 200, 30), size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def rows(images):
    """The images of a batch as a set of byte strings."""
    return {image.numpy().tobytes() for image in images}


# ---------------------------------------------------------------------------------------------------------------------
# Sets


@pytest.mark.parametrize("size", [32, 48])
def test_glyphs_are_the_same_bits_each_time_and_another_picture_each_index(size):
    config = make_config(image_size=size)
    one, two = data.load(config, "test"), data.load(config, "test")
    assert torch.equal(one.images, two.images) and one.images.shape == (48, 3, size, size)
    assert len(rows(one.images)) == 48
    assert torch.bincount(one.labels, minlength=24).tolist() == [2] * 24 and len(set(one.class_names)) == 24


def test_splits_of_drawn_and_of_read_sets_are_disjoint(tmp_path):
    write_fashion(tmp_path, count=60)
    for config in (make_config(), make_config(set="fashion_mnist", root=str(tmp_path), classes=10, train_images=0,
                                              test_images=0)):
        parts = [rows(data.load(config, split).images) for split in ("train", "validation", "test")]
        assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert len(parts[0]) == 60 - 24 and len(parts[1]) == 24   # nothing of the pool is lost


def test_a_stage_sees_its_range_of_the_shuffled_training_set():
    config = make_config()
    config["train"]["meta"]["images"] = [20, 50]
    everything, part = data.load(config, "train"), data.load(config, "train", "meta")
    assert torch.equal(part.images, everything.images[20:50]) and torch.equal(part.labels, everything.labels[20:50])
    assert everything.labels[:24].tolist() != list(range(24))   # shuffled
    config["seed"] = 4
    assert not torch.equal(data.load(config, "train").images, everything.images)
    config["train"]["meta"]["images"] = [50, 101]
    with pytest.raises(UserError, match=r"train\.meta\.images \[50, 101\]"):
        data.load(config, "train", "meta")


def test_wrong_labels_are_the_asked_share_nested_and_never_right(tmp_path):
    write_fashion(tmp_path, count=1000)
    config = make_config(set="fashion_mnist", root=str(tmp_path), classes=10, train_images=0)
    right, wrong = data.load(config, "train").labels, {}
    for share in (0.0, 0.2, 0.6, 1.0):
        config["train"]["meta"]["wrong_labels"] = share
        wrong[share] = data.load(config, "train", "meta").labels
        assert abs((wrong[share] != right).float().mean() - share) < 0.05
    for small, large in ((0.2, 0.6), (0.6, 1.0)):   # what is wrong stays as wrong when more becomes wrong
        assert torch.equal(wrong[large][wrong[small] != right], wrong[small][wrong[small] != right])
    counts = torch.bincount((wrong[1.0] - right) % 10, minlength=10)
    assert counts[0] == 0 and counts[1:].min() > 70   # any other class: some 976 / 9 images each


@pytest.mark.parametrize("name", ["glyphs", "fashion_mnist"])
def test_wrong_labels_are_alike_in_every_stage_and_leave_other_splits_alone(tmp_path, name):
    write_fashion(tmp_path, count=100)
    config = make_config(set=name, root=str(tmp_path), classes=10, train_images=70, validation_images=20)
    splits = ("train", "validation", "test", "renditions")
    right = [data.load(config, split).labels for split in splits]
    config["train"]["meta"].update(images=[0, 50], wrong_labels=0.5)
    config["train"]["student"].update(images=[30, 70], wrong_labels=0.5)
    early, late = (data.load(config, "train", stage) for stage in ("meta", "student"))
    assert torch.equal(early.images[30:], late.images[:20]) and torch.equal(early.labels[30:], late.labels[:20])
    assert 0 < (early.labels[30:] != right[0][30:50]).sum() < 20   # some of them wrong
    assert all(torch.equal(data.load(config, split).labels, labels) for split, labels in zip(splits, right))


def test_renditions_of_drawn_and_of_read_images_keep_labels_and_differ(tmp_path):
    config = make_config()
    plain, drawn = data.load(config, "test"), data.load(config, "renditions")
    assert torch.equal(plain.labels, drawn.labels) and torch.equal(drawn.images, data.load(config, "renditions").images)
    assert (plain.images.float() - drawn.images.float()).abs().mean((1, 2, 3)).min() > 1
    for i in range(3):
        Image.fromarray(plain.images[i].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    files = data.renditions(data.ImageSet([0, 1, 2], "abc", files=[str(tmp_path / f"{i}.png") for i in range(3)]))
    setup = data.Setup(CPU, 0, 1)
    (images, _), = data.eval_batches(files, config, setup)   # drawn while reading
    assert torch.equal(images, data.normalise(drawn.images[:3]))


def test_every_kind_of_rendition_occurs_for_every_class():
    # a kind in step with the label (index % 8 with 24 classes) would make the shift a different one for each class
    kinds = {(i % 24, data.zlib.crc32(str(i).encode()) % len(data.RENDITIONS)) for i in range(2400)}
    assert len(kinds) == 24 * 8


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


def write_fashion(root, count):
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        write_idx(root / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(root / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))


def test_fashion_mnist_is_padded_and_repeated_to_three_channels(tmp_path):
    write_fashion(tmp_path, count=40)
    raw = np.frombuffer(gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz").read(), np.uint8, offset=16)
    test = data.load(make_config(set="fashion_mnist", root=str(tmp_path), classes=10, test_images=0), "test")
    assert test.images.shape == (40, 3, 32, 32) and test.labels[:3].tolist() == [0, 1, 2]
    for channel in range(3):
        assert np.array_equal(test.images[:, channel, 2:30, 2:30].numpy(), raw.reshape(40, 28, 28))
    assert test.images.sum() == 3 * raw.astype(int).sum()   # the border is zero


def test_missing_truncated_and_foreign_fashion_files_are_named(tmp_path):
    config = make_config(set="fashion_mnist", root=str(tmp_path), classes=10, test_images=0)
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte.gz.*dataset-fashion-mnist.*data.root"):
        data.load(config, "test")
    write_fashion(tmp_path, count=40)
    images = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    with gzip.open(images, "wb") as file:
        file.write(bytes((0, 0, 8, 3)) + struct.pack(">3I", 40, 28, 28) + bytes(100))
    with pytest.raises(UserError, match="t10k-images.*holds 100 values"):
        data.load(config, "test")
    for broken in (whole[:len(whole) // 2], b"<html>not found</html>", gzip.compress(b"hello")):
        images.write_bytes(broken)
        with pytest.raises(UserError, match="t10k-images-idx3-ubyte.gz"):
            data.load(config, "test")


def folder_config(root, classes, **options):
    return make_config(**{**dict(set="imagenet", root=str(root), classes=classes, image_size=8, train_images=0,
                                 validation_images=1, test_images=0), **options})


def make_folders(root, part, names, count=2, inner=""):
    for k, name in enumerate(names):
        for i in range(count):
            save_image(root / part / name / inner / f"{name}_{i}.png", (40 * k, 10 * i, 0))


def test_image_folders_are_labelled_by_sorted_name(tmp_path):
    names = ["n03", "n01", "n02"]
    make_folders(tmp_path, "train", names, 3)
    make_folders(tmp_path, "val", names, 2)
    config = folder_config(tmp_path, 3)
    train, validation, test = (data.load(config, split) for split in ("train", "validation", "test"))
    assert test.class_names == ["n01", "n02", "n03"] and test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [os.path.basename(f)[:3] for f in test.files] == [test.class_names[c] for c in test.labels]
    assert len(train) == 8 and len(validation) == 1 and len(set(train.files) | set(validation.files)) == 9
    make_folders(tmp_path, "test", names, 4)
    assert len(data.load(folder_config(tmp_path, 3, set="folder"), "test")) == 12   # test/ before val/
    assert len(data.load(config, "test")) == 6                                      # ImageNet's test/ has no labels


@pytest.mark.parametrize("layout", ["downloaded", "class folders", "class folders with images", "within images"])
def test_tiny_imagenet_is_read_in_every_layout(tmp_path, layout):
    names = ["n1", "n2"]
    make_folders(tmp_path, "train", names, 2, "images")
    if layout == "downloaded":
        for i, colour in enumerate((40, 0, 40)):
            save_image(tmp_path / "val" / "images" / f"val_{i}.png", (colour, 0, 0))
        (tmp_path / "val" / "val_annotations.txt").write_text(
            "val_2.png\tn2\t0\t0\t7\t7\nval_0.png\tn2\t0\t0\t7\t7\nval_1.png\tn1\t0\t0\t7\t7\n")
    else:
        base, inner = ("val/images", "") if layout == "within images" else ("val", layout[19:])
        make_folders(tmp_path, base, names, 1, inner)
        save_image(tmp_path / base / "n2" / inner / "more.png", (40, 0, 0))
    test = data.load(folder_config(tmp_path, 2, set="tiny_imagenet"), "test")
    reds = [test.picture(i).getpixel((0, 0))[0] for i in range(len(test))]
    assert sorted(test.labels.tolist()) == [0, 1, 1] and reds == [40 * c for c in test.labels]
    assert len(data.load(folder_config(tmp_path, 2, set="tiny_imagenet"), "train")) == 3


def test_wrong_folders_are_refused_with_the_folder_named(tmp_path):
    names = ["a", "b"]
    with pytest.raises(UserError, match="data.root .*nowhere"):
        data.load(folder_config(tmp_path / "nowhere", 2), "test")
    with pytest.raises(UserError, match="train does not exist"):
        data.load(folder_config(tmp_path, 2), "test")
    make_folders(tmp_path, "train", ["a"])
    with pytest.raises(UserError, match="train holds 1 class folders"):
        data.load(folder_config(tmp_path, 2), "train")
    make_folders(tmp_path, "train", names)
    save_image(tmp_path / "val" / "flat.png")
    with pytest.raises(UserError, match="val holds 0 class folders and 1 images beside them"):
        data.load(folder_config(tmp_path, 2), "test")
    make_folders(tmp_path, "val", ["a", "c"])
    with pytest.raises(UserError, match="'b'"):
        data.load(folder_config(tmp_path, 2), "test")
    with pytest.raises(UserError, match="data.classes is 5 .* 2 classes"):
        data.load(folder_config(tmp_path, 5), "train")
    (tmp_path / "train" / "z").mkdir()
    with pytest.raises(UserError, match="z holds no images"):
        data.load(folder_config(tmp_path, 3), "train")


def test_robustness_folders_are_matched_by_name(tmp_path):
    make_folders(tmp_path, "train", ["a", "b", "c", "d"])
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
    for part in ("train", "test"):
        records.tofile(tmp_path / f"{part}.bin")
    test = data.load(make_config(set="cifar100", root=str(tmp_path), classes=100, test_images=0), "test")
    assert test.labels.tolist() == [7, 99, 0, 3, 3]
    assert test.images[4, 1, 2, 3] == records[4, 2 + 1024 + 2 * 32 + 3]   # green plane, row 2, column 3
    for foreign in (records.tobytes()[:-1], bytes([200]) * 3074):   # truncated; a label that cannot be
        (tmp_path / "test.bin").write_bytes(foreign)
        with pytest.raises(UserError, match="test.bin"):
            data.load(make_config(set="cifar100", root=str(tmp_path), classes=100, test_images=0), "test")


def test_cub_is_joined_by_image_number(tmp_path):
    root = tmp_path / "CUB_200_2011"
    for name in ("001.A/x.png", "002.B/y.png", "002.B/z.png"):
        save_image(root / "images" / name)
    (root / "images.txt").write_text("1 001.A/x.png\n2 002.B/y.png\n3 002.B/z.png\n")
    (root / "image_class_labels.txt").write_text("3 2\n2 2\n1 1\n")
    (root / "train_test_split.txt").write_text("1 0\n2 1\n3 0\n")
    test = data.load(make_config(set="cub", root=str(tmp_path), classes=2, test_images=0), "test")
    assert [os.path.basename(f) for f in test.files] == ["x.png", "z.png"] and test.labels.tolist() == [0, 1]
    assert test.class_names == ["001.A", "002.B"]


def test_images_of_any_mode_become_rgb(tmp_path):
    def read(image, name, **kind):
        image.save(tmp_path / name, **kind)
        picture = data.read_image(str(tmp_path / name))
        assert picture.mode == "RGB"
        return picture.getpixel((0, 0))

    assert read(Image.new("L", (4, 4), 100), "grey.png") == (100, 100, 100)
    assert read(Image.fromarray(np.full((4, 4), 25700, np.uint16)), "grey16.png") == (100, 100, 100)
    assert read(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "cmyk.tif") == (0, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read(palette, "palette.png") == (10, 20, 30)
    assert read(palette, "transparent.png", transparency=1) == (255, 255, 255)   # not what lies below
    assert read(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "alpha.png") == (255, 255, 255)
    assert read(Image.new("LA", (4, 4), (9, 255)), "la.png") == (9, 9, 9)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_also_from_a_worker(tmp_path, workers):
    good, bad = tmp_path / "good.png", tmp_path / "bad.jpg"
    save_image(good)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bad)
    bad.write_bytes(bad.read_bytes()[:1500])   # a download that broke off
    files = data.ImageSet([0, 1], "ab", files=[str(good), str(bad)])
    with pytest.raises(UserError, match="bad.jpg") as error:
        list(data.eval_batches(files, make_config(image_size=8, workers=workers), data.Setup(CPU, 0, 1)))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Order, resuming, processes

FULL = dict(resized_crop=[0.2, 1], randaugment=9.0, erasing=0.5, flip=0.5)   # image by image, through PIL


def epoch_of(config, imageset, rank=0, world=1, epoch=1, **start):
    return list(data.train_batches(imageset, config, "meta", epoch, data.Setup(CPU, rank, world), **start))


def same(one, two):
    return len(one) == len(two) > 0 and all(torch.equal(a, c) and torch.equal(b, d)
                                            for (a, b), (c, d) in zip(one, two))


@pytest.mark.parametrize("options", [dict(pad=2, flip=0.5), FULL, {**FULL, "workers": 2}])
def test_batches_are_a_function_of_the_position_alone(options):
    config, imageset = make_config(image_size=8, classes=4, mixup=0.8, cutmix=1.0, **options), random_set(70)
    state = torch.get_rng_state()
    whole = epoch_of(config, imageset)
    assert len(whole) == 4 * 2                                                     # 70 // (8 · 2) steps, two each
    torch.rand(3), np.random.rand(3)                                               # nothing global matters …
    assert same(epoch_of(config, imageset, start_step=3), whole[6:])               # … and no step needs those before
    assert not same(epoch_of(config, imageset, epoch=2), whole)
    torch.set_rng_state(state)
    epoch_of(config, imageset)
    assert torch.equal(torch.get_rng_state(), state)                               # … nor is anything global moved
    config["seed"] += 1
    assert not same(epoch_of(config, imageset), whole)


@pytest.mark.parametrize("options", [dict(pad=2, flip=0.5), FULL])
def test_two_processes_with_half_the_batch_see_what_one_sees(options):
    config, imageset = make_config(image_size=8, classes=4, smoothing=0.1, **options), random_set(70)
    one = epoch_of(config, imageset)
    config["train"]["meta"]["batch"] = 4
    halves = [epoch_of(config, imageset, rank, 2) for rank in range(2)]
    assert same([tuple(torch.cat(pair) for pair in zip(a, b)) for a, b in zip(*halves)], one)


def test_an_epoch_shows_every_image_at_most_once_and_repeats_on_request():
    imageset = random_set(70)
    config = make_config(image_size=8, classes=4)
    seen = torch.cat([images for images, _ in epoch_of(config, imageset)])
    assert len(seen) == 64 and len(rows(seen)) == 64 and rows(seen) <= rows(data.normalise(imageset.images))
    config["data"]["repeats"] = 3
    repeated = torch.cat([images for images, _ in epoch_of(config, imageset)])
    assert len(repeated) == 64 and len(rows(repeated)) == 22   # 21 images three times, one once
    config["data"].update(pad=2, flip=0.5)
    assert len(rows(torch.cat([images for images, _ in epoch_of(config, imageset)]))) > 50   # copies differ


def test_too_small_a_set_names_the_batch():
    assert data.steps_per_epoch(100, 8, 2, 3) == 2
    with pytest.raises(UserError, match=r"train\.meta\.batch 8 "):
        epoch_of(make_config(image_size=8, classes=4), random_set(15))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 13, 31])
def test_every_image_is_evaluated_once(count, world):
    imageset = random_set(count, classes=count)   # the label is the image's number
    shares = [[(x, y) for x, y in data.eval_batches(imageset, make_config(image_size=8), data.Setup(CPU, r, world), 4)]
              for r in range(world)]
    labels = torch.cat([y for share in shares for _, y in share])
    images = torch.cat([x for share in shares for x, _ in share])
    assert sorted(labels.tolist()) == list(range(count))
    assert torch.equal(images, data.normalise(imageset.images)[labels])


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


def endless(seed=0):
    """Numbers uniform in 0 … 1, as the transforms of single images take them."""
    return iter(np.random.default_rng(seed).random, None)


def test_the_numbers_of_an_image_depend_on_its_position_alone_and_suffice():
    rows = [list(row) for row in data.uniforms((3, "meta", 1), np.arange(20, 60))]
    assert rows[7:12] == [list(row) for row in data.uniforms((3, "meta", 1), np.arange(27, 32))]
    assert rows != [list(row) for row in data.uniforms((3, "meta", 2), np.arange(20, 60))]
    numbers = np.array(rows)
    assert len(np.unique(numbers)) == 40 * data.DRAWS and abs(numbers.mean() - 0.5) < 0.02
    # the most that one image can use: crop and box fit at the tenth try only, both operations are done
    tries, operation = [0.999, 0.999] * 9 + [0, 0.5, 0.5, 0.5], [0, 0, 0.5, 0.5, 0.5]
    most = tries + [0.5, 0.5, 0.9] + 2 * operation + [0] + tries + [0.5]
    numbers = iter(most)
    options = make_config(resized_crop=[0.08, 1], pad=1, flip=0.5, randaugment=9.0)["data"]
    view = data.augment(Image.new("RGB", (100, 10)), 16, options, numbers)
    data.erase(data.normalise(torch.from_numpy(view.transpose(2, 0, 1).copy())), 1, numbers)
    assert list(numbers) == [] and len(most) == 59 <= data.DRAWS


def test_normalisation_by_hand():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1)
    expected = torch.tensor([-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(data.normalise(images).flatten(), expected)


def test_padding_moves_by_at_most_pad_repeats_edges_and_flips_half():
    column = torch.arange(8, dtype=torch.uint8).expand(3, 8, 8)   # pixel = its column
    imageset = data.ImageSet(torch.zeros(400), ["a", "b"], column.expand(400, 3, 8, 8))
    pool, total = imageset.images, 400
    out = data._crop_and_flip(pool, np.arange(400), 3, 0.25, np.random.default_rng(0), total, slice(0, None)).long()
    flipped = out[:, 0, 0, 0] > out[:, 0, 0, 7]
    assert 0.17 < flipped.float().mean() < 0.33
    upright = torch.where(flipped[:, None, None, None], out.flip(3), out)
    shift = upright[:, 0, 0, 4] - 4
    assert shift.unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    expected = (torch.arange(8) + shift[:, None]).clamp(0, 7)[:, None, None].expand(400, 3, 8, 8)
    assert torch.equal(upright, expected)


def test_padding_an_image_file_does_the_same():
    column = Image.fromarray(np.arange(8, dtype=np.uint8).repeat(3).reshape(1, 8, 3).repeat(8, 0))
    uniform, options = endless(), make_config(pad=2)["data"]
    views = np.stack([data.augment(column, 8, options, uniform)[..., 0] for _ in range(200)])
    shift = views[:, 0, 4].astype(int) - 4
    assert np.unique(shift).tolist() == [-2, -1, 0, 1, 2]
    assert np.array_equal(views, (np.arange(8) + shift[:, None]).clip(0, 7)[:, None].repeat(8, 1))


def test_evaluation_resizes_to_8_7_of_the_size_and_crops_the_centre():
    image = Image.new("RGB", (96, 128))
    ImageDraw.Draw(image).rectangle((30, 40, 65, 87), fill="white")
    view = data.centre_crop(image, 56)                                       # shorter side 64, crop 56
    expected = image.resize((64, 85), Image.Resampling.BICUBIC).crop((4, 14, 60, 70))
    assert np.array_equal(view, expected)
    small = image.resize((32, 32))
    assert data.centre_crop(small, 32) is small                              # no resize at 32 or less
    assert data.centre_crop(image, 28).size == (28, 28)


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


def test_mixup_and_label_smoothing_by_hand():
    images, labels = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4), torch.tensor([0, 2])
    mixed, targets = data.mix(images, labels, 4, 0.8, 0.0, 0.1, Fixed(beta=0.75))
    assert mixed[0].unique().tolist() == [1.25] and mixed[1].unique().tolist() == [1.75]
    # smoothed: .025 everywhere, .925 at the label; .75 · .925 + .25 · .025 = .7
    torch.testing.assert_close(targets, torch.tensor([[0.7, 0.025, 0.25, 0.025], [0.25, 0.025, 0.7, 0.025]]))
    plain, targets = data.mix(images, labels, 4, 0.0, 0.0, 0.1, Fixed())
    assert torch.equal(plain, images)
    torch.testing.assert_close(targets[0], torch.tensor([0.925, 0.025, 0.025, 0.025]))


def test_cutmix_pastes_a_clipped_box_and_corrects_lambda():
    images = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8).clone()
    # λ = .75: sides 8 · √.25 = 4, centre y 1, x 7: rows 0–2 and columns 5–7 are left of it, 9 of 64 pixels
    mixed, targets = data.mix(images, torch.tensor([0, 1]), 2, 0.8, 1.0, 0.0, Fixed(0.4, 0.75, [1, 7]))
    expected = torch.full((8, 8), 1.0)
    expected[0:3, 5:8] = 2.0
    assert torch.equal(mixed[0, 0], expected) and torch.equal(mixed[1, 2], 3 - expected)
    torch.testing.assert_close(targets, torch.tensor([[55 / 64, 9 / 64], [9 / 64, 55 / 64]]))
    mixed, _ = data.mix(images, torch.tensor([0, 1]), 2, 0.8, 1.0, 0.0, Fixed(0.6, 0.75))   # the coin's other side
    assert mixed[0].unique().tolist() == [1.25]


def test_lambda_is_beta_distributed_and_targets_sum_to_one():
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    rng = np.random.default_rng(0)
    targets = torch.stack([data.mix(images, labels, 5, 0.8, 0.0, 0.1, rng)[1] for _ in range(2000)])
    torch.testing.assert_close(targets.sum(-1), torch.ones(2000, 2))
    lam = (targets[:, 0, 0] - 0.02) / 0.9
    assert abs(lam.mean() - 0.5) < 0.02 and abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.006   # Beta(.8, .8)'s


def test_crop_areas_and_aspects_are_as_asked():
    uniform = endless()
    boxes = np.array([data.resized_crop_box(400, 400, (0.1, 0.5), uniform) for _ in range(3000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 400
    quantiles = np.quantile(w * h / 160000, [0.01, 0.25, 0.5, 0.75, 0.99])
    np.testing.assert_allclose(quantiles, [0.104, 0.2, 0.3, 0.4, 0.496], atol=0.015)           # uniform
    quantiles = np.quantile(np.log(w / h) / math.log(4 / 3), [0.01, 0.25, 0.5, 0.75, 0.99])
    np.testing.assert_allclose(quantiles, [-0.98, -0.5, 0, 0.5, 0.98], atol=0.06)              # log-uniform
    left = boxes[:, 0] / (400 - w)
    np.testing.assert_allclose(np.quantile(left, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)
    assert data.resized_crop_box(400, 30, (1, 1), uniform) == (180, 0, 220, 30)                    # nothing fits: centre


def test_erasing_areas_aspects_noise_and_rate():
    uniform = endless()
    areas, ratios, noise = [], [], []
    for _ in range(1500):
        image = data.erase(torch.full((3, 96, 96), 7.0), 0.5, uniform)
        changed = (image != 7).all(0)
        if changed.any():
            y, x = changed.nonzero().T
            h, w = int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1
            assert changed.sum() == h * w                                     # one whole box
            areas.append(h * w / 96 ** 2), ratios.append(math.log(h / w)), noise.append(image[:, changed].flatten())
    assert 0.45 < len(areas) / 1500 < 0.55
    np.testing.assert_allclose(np.quantile(areas, [0.01, 0.5, 0.99]), [0.023, 0.176, 0.33], atol=0.02)
    np.testing.assert_allclose(np.quantile(ratios, [0.01, 0.5, 0.99]), [-1.17, 0, 1.17], atol=0.12)
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


# What each operation should do, written again in numpy: image uint8 H W 3, level m, sign s -> float H W 3


def sampled(image, matrix, fill=(124, 116, 104)):
    """Output pixel (x, y) is the bicubic value at (a x + b y + c, d x + e y + f) of the input, centres at .5."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
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
    t = np.abs(t)   # Keys' kernel with a = -1, Pillow's for transforms
    return np.where(t <= 1, t ** 3 - 2 * t ** 2 + 1, np.where(t < 2, -t ** 3 + 5 * t ** 2 - 8 * t + 4, 0))


def rotated(image, m, s):
    # counter-clockwise on the screen about the centre; the output pixel looks back along the rotation
    cos, sin = math.cos(math.radians(s * 3 * m)), math.sin(math.radians(s * 3 * m))
    cx, cy = image.shape[1] / 2, image.shape[0] / 2
    return sampled(image, (cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy))


def stretched(image, m, s):
    low, high = image.min((0, 1)).astype(float), image.max((0, 1)).astype(float)
    return (image - low) * 255 / (high - low)


def equalised(image, m, s):
    out = np.zeros(image.shape)
    for c in range(3):
        counts = np.bincount(image[..., c].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        table = (step // 2 + np.concatenate([[0], counts.cumsum()[:-1]])) // step
        out[..., c] = table.clip(0, 255)[image[..., c]]
    return out


def grey(image):
    return np.round(image @ np.array([0.299, 0.587, 0.114]))[..., None]


def smooth(image):
    """3 x 3 mean with a centre five times as heavy; the border stays."""
    out, height, width = image.astype(float), *image.shape[:2]
    inner = sum(image[1 + j:height - 1 + j, 1 + i:width - 1 + i].astype(float) * (5 if i == j == 0 else 1)
                for j in (-1, 0, 1) for i in (-1, 0, 1)) / 13
    out[1:-1, 1:-1] = np.round(inner)
    return out


def blended(base):
    return lambda image, m, s: base(image) + (1 + s * 0.09 * m) * (image - base(image))


DEFINITIONS = {
    "AutoContrast": stretched,
    "Equalize": equalised,
    "Invert": lambda image, m, s: 255 - image.astype(int),
    "Rotate": rotated,
    "Posterize": lambda image, m, s: image.astype(int) // 2 ** (4 + int(0.4 * m)) * 2.0 ** (4 + int(0.4 * m)),
    "Solarize": lambda image, m, s: np.where(image < 256 - int(25.6 * m), image, 255 - image.astype(int)),
    "SolarizeAdd": lambda image, m, s: np.where(image < 128, image.astype(int) + int(11 * m), image),
    "Color": blended(grey),
    "Contrast": blended(lambda image: np.round(grey(image).mean())),
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
    assert list(data.OPERATIONS) == list(DEFINITIONS)   # all fifteen
    calls = []
    monkeypatch.setattr(data, "OPERATIONS", {name: lambda image, m, sign, name=name: calls.append((name, m, sign))
                                             for name in data.OPERATIONS})
    uniform = endless()
    for _ in range(3000):
        data.randaugment(None, 9, uniform)
    names, levels, signs = zip(*calls)
    assert abs(len(calls) / 3000 - 1) < 0.05                                  # two operations, each with p = .5
    counts = np.unique(names, return_counts=True)[1]
    assert len(counts) == 15 and counts.min() > 140 and counts.max() < 260
    assert abs(np.mean(signs)) < 0.06 and set(signs) == {-1, 1}
    assert max(levels) == 10 and abs(np.median(levels) - 9) < 0.05
    below = np.array(levels)[np.array(levels) < 9]
    assert abs(np.sqrt(np.mean((below - 9) ** 2)) - 0.5) < 0.04               # half a normal of deviation .5


# ---------------------------------------------------------------------------------------------------------------------
# Few-shot and processes


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert data.setup("cpu") == data.Setup(CPU, 0, 1)
    assert data.sum_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    data.close()


def test_losses_are_shown_as_means_of_the_epoch_and_one_that_is_not_finite_stops():
    # rows: loss · images, correct, images of each process; over both (6 + 3) / 12 and 9 / 12
    sums = torch.tensor([[6.0, 4, 8], [3.0, 5, 4]])
    parts = {0: (None, None, sums), 2: (None, None, sums * torch.tensor([2, 1, 1]))}
    config = {"output_dir": "runs/x"}
    assert data.check_losses(parts, "distill", 40, config) == {"0": "0.750, 75.0 %", "2": "1.500, 75.0 %"}
    assert sums.tolist() == [[6, 4, 8], [3, 5, 4]]   # the epoch goes on
    for bad in (math.nan, math.inf):
        parts[2][2][1, 0] = bad
        with pytest.raises(UserError, match="distill: the loss of module 2 at step 40 .*runs/x"):
            data.check_losses(parts, "distill", 40, config)
    with pytest.raises(UserError, match="meta: the loss at step 7 "):
        data.check_losses({"meta": parts[2]}, "meta", 7, config)


def _sum_in_a_process(rank, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    process = data.setup("cpu")
    assert process == data.Setup(CPU, rank, 2)
    assert data.sum_over_processes(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
    own = torch.zeros(2, 3)
    own[rank] = torch.tensor([1.0 + rank, 1, 2])
    parts = {"meta": (None, None, own)}
    assert data.check_losses(parts, "meta", 20, {"output_dir": ""}) == {"meta": "0.750, 50.0 %"}
    if rank:
        own[1, 0] = math.nan
    with pytest.raises(UserError):   # in both processes, or one would wait for the other
        data.check_losses(parts, "meta", 40, {"output_dir": ""})
    data.close()


def test_two_processes_add_up():
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(_sum_in_a_process, (port,), nprocs=2)
