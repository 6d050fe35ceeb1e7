"""Promises of tools/prepare.py: drawn pixels never move, each set is read, or what it lacks is named."""

import gzip
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import conftest
import data
import prepare
from conftest import ROOT, shell
from data import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(monkeypatch, *words):
    # Absolute, because data.py remembers what it has found in a folder of this name.
    words = [str(Path(word).absolute() if Path(word).is_dir() else word) for word in words]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    prepare.main()


def load(root, split="test"):
    options = dict(root=str(Path(root).absolute()), classes=None, train_images=0, validation_images=1)
    return data.load({"seed": 0, "data": {**options, "test_images": 0}}, split)


def read(root, split="test"):
    """[(class name, red of the first pixel), …] of a set."""
    images = load(root, split)
    reds = [data.read_image(images.source(i)).getpixel((0, 0))[0] for i in range(len(images))]
    return [(images.class_names[k], red) for k, red in zip(images.labels.tolist(), reds)]


def save_image(path, red):
    conftest.save_image(Path(path), (red, 0, 0))


# ---------- 1 Drawn sets and renditions


def test_drawn_pixels_never_move(monkeypatch):
    few = ["train=30", "validation=20", "test=25"]
    run(monkeypatch, "glyphs", "a.npz", *few)
    run(monkeypatch, "lower_case", "b.npz", *few)
    run(monkeypatch, "glyphs", "c.npz", *few, "size=48")
    splits = ("train", "validation", "test", "renditions")
    found = {file: [f"{zlib.crc32(np.load(file)[f'{split}_images']):08x}" for split in splits]
             for file in ("a.npz", "b.npz", "c.npz")}
    assert found == {"a.npz": ["29ecaf0f", "9333235d", "c10d7f54", "694cb859"],
                     "b.npz": ["9ebc77de", "548dfc1d", "5df37764", "6abce6f5"],
                     "c.npz": ["b0162699", "c17bc079", "1d663528", "11af5074"]}


def test_a_drawn_set_is_balanced_disjoint_and_of_the_numbers_asked_for(monkeypatch):
    run(monkeypatch, "glyphs", "new/g.npz", "train=48", "validation=24", "test=48", "size=16")
    with np.load("new/g.npz", allow_pickle=False) as arrays:
        assert "".join(arrays["class_names"]) == "ABCDEFGHJKLMNPRSTWXYZ347"
        splits = {key[:-7]: arrays[key] for key in arrays if key.endswith("_images")}
        for split, images in splits.items():
            labels = arrays[f"{split}_labels"]
            assert images.dtype == np.uint8 and labels.dtype == np.int64 and images.shape[1:] == (16, 16, 3)
            assert set(np.bincount(labels, minlength=24)) == {len(images) // 24}
    assert {split: len(images) for split, images in splits.items()} == {
        "train": 48, "validation": 24, "test": 48, "renditions": 48}
    assert len({image.tobytes() for images in splits.values() for image in images}) == 168


def test_the_demo_has_the_sizes_that_its_configs_expect(monkeypatch):
    monkeypatch.setattr(prepare, "draw_glyph", lambda *_: np.zeros((32, 32, 3), np.uint8))
    monkeypatch.setattr(prepare, "rendition", lambda image, index: image)
    run(monkeypatch, "demo")
    splits = ("train", "validation", "test", "renditions")
    sizes = {name: [len(np.load(f"data/{name}.npz")[f"{split}_labels"]) for split in splits]
             for name in ("glyphs", "lower_case")}
    assert sizes == {"glyphs": [5000, 1000, 2000, 2000], "lower_case": [1400, 700, 1400, 1400]}


def test_every_kind_of_rendition_occurs_for_every_class_and_changes_the_image(monkeypatch):
    image = Image.fromarray(prepare.draw_glyph(3, 3))
    kinds = {zlib.crc32(np.asarray(prepare.rendition(image, i))) for i in range(100)}
    assert len(kinds) == 8 and zlib.crc32(np.asarray(image)) not in kinds
    # With a kind in step with the label, index % 8 of 24 classes, each class would have kinds of its own.
    monkeypatch.setattr(prepare, "RENDITIONS", [lambda _, k=k: Image.new("L", (1, 1), k) for k in range(8)])
    assert len({(i % 24, prepare.rendition(None, i).getpixel((0, 0))) for i in range(2400)}) == 24 * 8


def test_imagenet_r_is_squashed_whatever_its_shape(monkeypatch):
    for name in ("n1", "n2"):
        wide = np.zeros((30, 100, 3), np.uint8)
        wide[:, 50:] = 255
        Path(f"r/{name}").mkdir(parents=True)
        Image.fromarray(wide).save(f"r/{name}/0.png")
    Path("r/README.txt").write_text("not a class")
    run(monkeypatch, "tiny_imagenet_r", "out", "r")
    image = np.asarray(Image.open("out/n2/000001.png"))
    assert image.shape == (64, 64, 3) and not image[:, :28].any() and (image[:, 36:] == 255).all()


# ---------- 2 Sets of others


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


def fashion(root, count=20):
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(root / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))


def test_fashion_mnist_is_padded_and_repeated_to_three_channels(monkeypatch, tmp_path):
    fashion(tmp_path)
    run(monkeypatch, "fashion_mnist", "f.npz", tmp_path)
    arrays = np.load("f.npz")
    for split, prefix in (("train", "train"), ("test", "t10k")):
        raw = np.frombuffer(gzip.open(f"{prefix}-images-idx3-ubyte.gz").read(), np.uint8, offset=16)
        images = arrays[f"{split}_images"]
        assert images.shape == (20, 32, 32, 3) and arrays[f"{split}_labels"].tolist() == [*range(10)] * 2
        assert (images[:, 2:30, 2:30] == raw.reshape(20, 28, 28, 1)).all()
        assert images.sum() == 3 * raw.astype(int).sum()  # the border is zero
    assert arrays["class_names"][9] == "Ankle boot" and len(arrays["renditions_images"]) == 20


BROKEN_IDX = {"empty": b"", "no gzip": b"<html>not found</html>", "no idx": gzip.compress(b"hello"),
              "short": gzip.compress(bytes(16) + bytes(100)), "fewer": gzip.compress(bytes(16 + 19 * 784)),
              "cut off": gzip.compress(os.urandom(5000))[:-400]}


@pytest.mark.parametrize("content", BROKEN_IDX.values(), ids=BROKEN_IDX)
def test_fashion_files_that_are_broken_are_refused(monkeypatch, tmp_path, content):
    fashion(tmp_path)
    Path("t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match="not the whole of fashion_mnist"):
        run(monkeypatch, "fashion_mnist", "f.npz", ".")
    assert not Path("f.npz").exists()


def test_fashion_files_of_another_set_or_nowhere_are_refused(monkeypatch, tmp_path):
    fashion(tmp_path)
    # EMNIST's files have the same names.
    write_idx(Path("train-labels-idx1-ubyte.gz"), np.full(20, 10, np.uint8))
    with pytest.raises(UserError, match="train: 20 images and 20 labels up to 10"):
        run(monkeypatch, "fashion_mnist", "f.npz", ".")
    Path("t10k-labels-idx1-ubyte.gz").unlink()
    Path("train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="train-labels-idx1-ubyte.gz"):
        run(monkeypatch, "fashion_mnist", "f.npz", ".")
    with pytest.raises(UserError, match="nowhere/train-images-idx3-ubyte.gz"):
        run(monkeypatch, "fashion_mnist", "f.npz", "nowhere")


def test_cifar100_records_are_read_by_fine_label_and_planes(monkeypatch):
    records = np.random.default_rng(0).integers(0, 256, (5, 3074), dtype=np.uint8)
    records[:, 1] = [7, 99, 0, 3, 3]
    records.tofile("test.bin")
    records[::-1].tofile("train.bin")
    names = Path("fine_label_names.txt")
    names.write_text("\n".join(f"name{k}" for k in range(100)))
    run(monkeypatch, "cifar100", "c.npz", ".")
    arrays = np.load("c.npz")
    assert arrays["test_labels"].tolist() == [7, 99, 0, 3, 3] == arrays["train_labels"].tolist()[::-1]
    assert arrays["class_names"][99] == "name99"
    assert arrays["test_images"][4, 2, 3, 1] == records[4, 2 + 1024 + 2 * 32 + 3]  # green, row 2, column 3
    whole = Path("train.bin").read_bytes()
    # Truncated, empty, a label that cannot be; a list that is not all there.
    for file, content in (("train.bin", whole[:-1]), ("train.bin", b""), ("train.bin", bytes([200]) * 3074),
                          (names, b"apple")):
        Path("train.bin").write_bytes(whole)
        Path(file).write_bytes(content)
        with pytest.raises(UserError, match="not the whole of cifar100"):
            run(monkeypatch, "cifar100", "d.npz", ".")
    names.unlink()
    with pytest.raises(UserError, match="fine_label_names.txt"):
        run(monkeypatch, "cifar100", "d.npz", ".")


CUB = {"images": ["0 001.a/x.png", "1 001.a/y.png", "2 002.b/x.png", "3 002.b/z.png"],
       "train_test_split": ["0 0", "1 1", "2 0", "3 1"]}


def cub(lists=CUB):
    for red, name in enumerate(("001.a/x", "001.a/y", "002.b/x", "002.b/z")):
        save_image(f"birds/images/{name}.png", red)
    for name, lines in lists.items():
        Path(f"birds/{name}.txt").write_bytes("\n".join(lines).encode("latin-1"))


def test_cub_is_joined_by_image_number_and_linked():
    cub()
    prepare.cub(Path("out"), Path("birds"))  # a relative folder, and yet the links are absolute
    assert read("out") == [("001.a", 0), ("002.b", 2)]
    assert sorted(read("out", "train") + read("out", "validation")) == [("001.a", 1), ("002.b", 3)]
    links = [path for path in Path("out").glob("*/*/*") if path.is_symlink()]
    assert len(links) == 4 and all(os.path.isabs(os.readlink(path)) for path in links)


@pytest.mark.parametrize("name, line", [
    ("images", "0"), ("images", "x 001.a/0.png"), ("images", "0 003.c/x.png"), ("images", "\xff"),
    ("train_test_split", "0 2"), ("train_test_split", ""), ("images", None)])
def test_lists_of_cub_that_do_not_fit_are_refused(monkeypatch, name, line):
    cub({**CUB, name: [*CUB[name][1:], line] if line is not None else []})
    with pytest.raises(UserError, match="not the whole of cub"):
        run(monkeypatch, "cub", "out", "birds")


@pytest.mark.parametrize("name", [*CUB, "images/002.b/z.png"])
def test_what_cub_lacks_is_named_and_nothing_is_left(monkeypatch, name):
    cub()
    path = Path(f"birds/{name}.txt" if name in CUB else f"birds/{name}")
    path.unlink()
    with pytest.raises(UserError, match=str(path)):
        run(monkeypatch, "cub", "out", "birds")
    assert os.listdir() == ["birds"]


def tiny():
    for red, name in enumerate(("n1", "n2")):
        for i in range(2):
            save_image(f"tiny/train/{name}/images/{i}.png", red)
    for i, red in enumerate((1, 0, 1)):
        save_image(f"tiny/val/images/val_{i}.png", red)
    lines = [f"val_{i}.png\tn{(2, 1, 2)[i]}\t0\t0\t7\t7\n" for i in (2, 0, 1)]
    Path("tiny/val/val_annotations.txt").write_text("".join(lines))
    Path("tiny/val/images/.DS_Store").write_text("hidden")


def test_tiny_imagenet_is_sorted_by_its_list(monkeypatch):
    tiny()
    run(monkeypatch, "tiny_imagenet", "out", "tiny")
    assert sorted(read("out")) == [("n1", 0)] + [("n2", 1)] * 2
    assert sorted(read("out", "train") + read("out", "validation")) == [("n1", 0)] * 2 + [("n2", 1)] * 2


@pytest.mark.parametrize("change, named", [
    (lambda: save_image("tiny/val/images/val_3.png", 0), "val_3.png"),
    (lambda: Path("tiny/val/images/val_1.png").unlink(), "val_1.png"),
    (lambda: shutil.rmtree("tiny/val/images"), "val_0.png; a val/ that is sorted .* needs no preparation"),
    (lambda: Path("tiny/val/val_annotations.txt").write_text("val_0.png\n"), "tiny_imagenet"),
    (lambda: Path("tiny/val/val_annotations.txt").unlink(), "val_annotations.txt"),
    (lambda: os.rename("tiny/train/n2", "tiny/train/n3"), "n2"),
    (lambda: Path("tiny/train/n3").symlink_to("nowhere"), "n3"),
    (lambda: Path("tiny/train/n1/images/2.png").symlink_to("nowhere"), "2.png")])
def test_what_tiny_imagenet_lacks_is_named(monkeypatch, change, named):
    tiny()
    change()
    with pytest.raises(UserError, match=named):
        run(monkeypatch, "tiny_imagenet", "out", "tiny")
    assert os.listdir() == ["tiny"]


# ---------- 3 The command


@pytest.mark.parametrize("words", [
    [], ["mnist", "out"], ["cub", "out"], ["cub"], ["glyphs"], ["glyphs", "a.npz", "folder"], ["demo", "out"],
    ["glyphs", "a.npz", "train=0"], ["glyphs", "a.npz", "train=x"], ["glyphs", "a.npz", "classes=4"],
    ["cub", "out", "birds", "train=3"], ["cub", "out", "birds", "more"]])
def test_what_is_no_command_prints_all_sets(monkeypatch, capsys, words):
    with pytest.raises(UserError, match="is none of these commands"):
        run(monkeypatch, *words)
    printed = capsys.readouterr().err
    assert all(f"prepare.py {name}" in printed or f"likewise {name}" in printed for name in prepare.SETS)
    assert not os.listdir()


def test_the_script_runs_from_any_folder_and_ends_with_2():
    done = shell(sys.executable, ROOT / "tools/prepare.py", "cub", "out", "nowhere")
    assert done.returncode == 2 and "nowhere/images.txt" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_is_never_mixed_with_old_files_and_an_npz_is_replaced(monkeypatch):
    cub()
    save_image("out/train/001.a/old.png", 0)
    with pytest.raises(UserError, match="out is not empty"):
        run(monkeypatch, "cub", "out", "birds")
    assert sorted(os.listdir()) == ["birds", "out"] and len(list(Path("out").rglob("*.png"))) == 1
    Path("empty").mkdir()
    run(monkeypatch, "cub", "empty", "birds")
    assert len(list(Path("empty").rglob("*.png"))) == 4
    for count in (3, 2):
        run(monkeypatch, "glyphs", "g.npz", "train=1", "validation=1", f"test={count}", "size=8")
        assert len(np.load("g.npz")["test_images"]) == count
    with pytest.raises(UserError, match="end in .npz"):
        run(monkeypatch, "glyphs", "g", "train=1", "validation=1", "test=1")


@pytest.mark.parametrize("spoil", [lambda file: file.symlink_to("no"), lambda file: file.write_bytes(b"no")])
def test_a_bad_image_is_named_and_leaves_no_half_of_a_folder(monkeypatch, spoil):
    for name in ("a", "b"):
        save_image(f"r/{name}/0.png", 0)
    spoil(Path("r/b/1.png"))
    with pytest.raises(UserError, match="r/b/1.png"):
        run(monkeypatch, "tiny_imagenet_r", "out", "r")
    assert os.listdir() == ["r"]
