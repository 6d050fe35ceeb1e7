"""Promise: bad input ends in exit code 2 and one sentence that names key or file, value and remedy. No traceback, ever.

Fuzz: no mutation of a config, an override or a checkpoint's bytes gives a traceback.
"""

import gzip
import importlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import models
from conftest import ROOT

CONFIG = """
seed: 0
device: cpu
data: {set: glyphs, image_size: 16, classes: 4, train_images: 32, validation_images: 8, test_images: 8, workers: 0}
meta: {patch: 8, width: 16, heads: 2, depths: [1, 1, 1]}
teacher: {patch: 8, width: 16, heads: 2, depths: [1, 1, 1]}
student: {kind: nac, width: 16, heads: 2, head_width: 8, latents: [4, 16, 2], propagators: 1}
train:
  meta: {epochs: 1, batch: 16}
  incubate: {epochs: 1, batch: 16}
  teacher: {epochs: 1, batch: 16}
  distill: {epochs: 1, batch: 16}
  student: {epochs: 1, batch: 16}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with c.yaml, where commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    torch.set_num_threads(1)
    return tmp_path


def command(script, *words):
    """Runs a script's main() here -> its exit code. A traceback fails the test by itself."""
    models.STOP.clear()
    argv, sys.argv = sys.argv, [f"{script}.py", *words]
    try:
        models.run(importlib.import_module(script).main)
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = argv
    return 0


def refused(capsys, names, script, *words, config="c.yaml"):
    """The command must end with code 2 and one sentence that holds each of the names."""
    capsys.readouterr()
    began = time.process_time()
    assert command(script, "--config", config, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for name in [names] if isinstance(names, str) else names:
        assert name in error, error
    assert time.process_time() - began < 5


# override(s): what the sentence must name (key, value or what is allowed)
BAD_OVERRIDES = [
    ("distill.alpa=1", ["distill.alpa", "distill.alpha"]), ("train.meta.epoch=1", "train.meta.epochs"),
    ("alpha=1", ["alpha", "distill.alpha"]), ("train=1", "train"), ("=1", "nearest"), ("seed", ["seed", "key=value"]),
    ("data.set=mnist", ["mnist", "fashion_mnist"]), ("data.set=[a]", "data.set"), ("data.set=3", "data.set"),
    ("data.image_size=0", ["data.image_size=0", "from 1"]), ("data.image_size=17", ["17", "patch"]),
    ("data.image_size=big", ["big", "whole number"]), ("data.image_size=16.5", "16.5"),
    ("data.image_size=1000000000", "data.image_size"), ("data.train_images=-1", "data.train_images=-1"),
    ("data.train_images=1000000000000", "data.train_images"), ("data.classes=1", "data.classes=1"),
    ("data.classes=99", ["data.classes", "99"]), ("data.flip=2", ["data.flip=2", "0 to 1"]),
    ("data.flip=yes", "data.flip"), ("data.smoothing=1", "data.smoothing"), ("data.randaugment=11", "data.randaugment"),
    ("data.resized_crop=0.5", "data.resized_crop"), ("data.resized_crop=[1, 0.08]", ["data.resized_crop", "0.08"]),
    ("data.resized_crop=[0.1]", "a list of 2"), ("data.mixup=-1", "data.mixup"), ("data.mixup=.nan", "data.mixup"),
    ("data.cutmix=.inf", "data.cutmix"), ("data.workers=-2", "data.workers"), ("data.repeats=0", "data.repeats"),
    ("data.robustness=renditions", ["data.robustness", "list"]), ("seed=-1", "seed=-1"), ("seed=1.5", "seed=1.5"),
    ("seed=123456789012345678901234567890", "seed"), ("device=gpu", ["gpu", "cuda"]), ("device=cuda", ["device", "cuda"]),
    ("device=mps", ["device", "mps"]), ("precision=fp16", ["fp16", "bfloat16"]), ("meta.heads=3", ["meta.width=16", "meta.heads=3"]),
    ("meta.depths=[1, 1]", ["meta.depths", "2"]), ("meta.depths=[]", "meta.depths"), ("meta.depths=3", "meta.depths"),
    ("meta.depths=[1, 0, 1]", "meta.depths"), ("meta.depth=7", ["meta.depths", "7"]), ("meta.arch=vit_giant", "vit_huge"),
    ("meta.width=32", ["teacher.width=16", "meta.width=32"]), ("teacher.patch=5", ["teacher.patch=5", "16"]),
    ("meta.eps=0", "meta.eps"), ("meta.qkv_bias=1", ["meta.qkv_bias=1", "true or false"]),
    ("meta.mlp_ratio=0", "meta.mlp_ratio"), ("meta.mlp_ratio=1e300", "meta.mlp_ratio"),
    ("student.kind=cnn", ["cnn", "nac, vmoe"]), ("student.kind=vmoe", "student.experts"), ("student.propagators=2", "student.propagators=2"),
    ("student.width=18", ["student.width=18", "multiple"]), ("student.latents=[4, 16]", "student.latents"),
    ("student.latents=[4, 0, 2]", "student.latents"), ("student.tokenizer_stages=4", "student.tokenizer_stages"),
    ("student.graph=ring", "ring_of_cliques"), ("student.graph_groups=9", "student.graph_groups=9"),
    ("student.graph_m=16", "student.graph_m=16"), ("distill.alpha=1.01", ["distill.alpha=1.01", "0 to 1"]),
    ("distill.tau=0", "distill.tau"), ("distill.kind=medium", "soft, hard"), ("distill.reduction=sum", "batchmean, mean"),
    ("distill.codes=mine", "own, original, fresh"), ("distill.stitches=glue", "drop, keep, fold"),
    ("train.meta.batch=0", "train.meta.batch=0"), ("train.meta.batch=64", ["train.meta.batch", "64", "32"]),
    ("train.meta.accumulate=3", ["accumulate", "32"]), ("train.meta.lr=-1", "train.meta.lr"),
    ("train.meta.lr=fast", ["train.meta.lr", "fast"]), ("train.meta.betas=[0.9, 1]", "train.meta.betas"),
    ("train.meta.drop_path=1", "train.meta.drop_path"), ("train.meta.images=[5, 5]", "train.meta.images"),
    ("train.meta.images=[0, 33]", ["train.meta.images", "33", "32"]), ("train.meta.images=[0]", "train.meta.images"),
    ("role=tutor", ["role=tutor", "teacher"]), ("force=yes", ["force=yes", "true"]), ("module=1", "module"),
    ("share=nowhere", ["share", "nowhere"]), ("output_dir=3", "output_dir"), ("output_dir=c.yaml/run", "c.yaml/run"),
    ("output_dir=" + "x" * 300, "output_dir"), ('output_dir="a\\0b"', "output_dir"), ('share="a\\0b"', "share"),
    ("output_dir=/proc/none", "/proc/none"), ("data.root=[1", ["data.root", "YAML"]), ("data.set=folder", "data.root"),
    (["data.set=imagenet", "data.root=nowhere"], ["nowhere", "data.root"]),
    (["data.set=fashion_mnist", "data.root=nowhere", "data.image_size=32"], ["nowhere", "download"]),
    (["data.set=fashion_mnist", "data.image_size=16"], ["data.image_size", "28"]),
    (["data.set=cifar100", "data.root=nowhere"], "nowhere"), (["data.set=cub", "data.root=nowhere"], "nowhere"),
    # what no memory holds, or would take hours to be found out
    ("meta.depths=[2000000000, 1, 1]", ["meta.depths", "1000"]), ("meta.width=2000000000", "meta.width"),
    ("student.tokenizer_blocks=100000000", "student.tokenizer_blocks"), ("student.latents=[4, 1000000000, 2]", "student.latents"),
    ("data.workers=100000", ["data.workers", "256"]), ("data.repeats=2000000000", "data.repeats"), ("data.classes=2000000000", "data.classes"),
    ("data.image_size=20", ["data.image_size=20", "patch"]), (["data.image_size=20", "meta.patch=4", "teacher.patch=4"], ["20", "stride of 8"]),
    ("target.image_size=4", ["target.image_size=4", "stride of 8"]), ("data.train_images=2147483647", "data.train_images"),
]


@pytest.mark.parametrize("words, names", BAD_OVERRIDES, ids=lambda v: None if isinstance(v, list) else str(v)[:40])
def test_a_bad_override_is_one_sentence(here, capsys, words, names):
    words = [words] if isinstance(words, str) else words
    refused(capsys, names, "finetune", *([] if any(w.startswith("role=") for w in words) else ["role=meta"]), *words)
    assert not list(here.rglob("*.pt"))


@pytest.mark.parametrize("script, words, names", [
    ("distill_module", ["module=3"], ["module=3", "0 to 2"]), ("distill_module", ["module=-1"], "module=-1"),
    ("distill_module", ["module=one"], "module=one"), ("distill_module", ["module="], "module="),
    ("distill_module", ["role=meta"], "role=meta"), ("assemble", ["role=baseline"], "role=baseline"),
    ("assemble", ["module=1"], "module"), ("distill_module", [], "meta.pt is not there yet"),
    ("distill_module", ["meta.checkpoint=none.pt", "distill.alpha=0"], "none.pt"), ("assemble", [], "0.pt is not there yet"),
    ("finetune", [], "student_assembled.pt is not there yet"), ("evaluate", [], "student.pt is not there yet"),
    ("evaluate", ["role=pupil"], "role=pupil"), ("evaluate", ["module=1"], "module"),
    ("evaluate", ["checkpoint=none.pt"], "none.pt"),
])
def test_a_bad_word_or_a_stage_too_early_is_one_sentence(here, capsys, script, words, names):
    refused(capsys, names, script, *words)


BAD_CONFIGS = {
    "an empty file": (b"", "c.yaml"), "a list": (b"- a\n- b\n", "list"), "text": (b"hello", "str"), "binary": (b"\xff\xfe\x00\x9f", "c.yaml"),
    "a control character": (b"seed: \x07", "c.yaml"), "bad indentation": (b"seed: 1\n  data: 2\n", "c.yaml"), "tabs": (b"data:\n\tset: glyphs", "c.yaml"),
    "an open bracket": (b"data: {set: glyphs", "c.yaml"), "an impossible date": (b"seed: 2024-13-45", "c.yaml"),
    "python objects": (b"seed: !!python/object/apply:os.system ['touch pwned']", "c.yaml"),
    "itself": (b"data: &a {set: glyphs, more: *a}", "c.yaml"), "deep nesting": (b"seed: " + b"[" * 3000, "c.yaml"),
    "a key twice": (CONFIG.encode() + b"seed: 1\n", "seed"), "an unknown block": (CONFIG.encode() + b"trian: {meta: {epochs: 1}}\n", "trian"),
    "a number for a block": (b"train: 3", "train"), "a list as key": (b"[1, 2]: 3", "c.yaml"),
    "a number as key": (b"1: 2", "1"), "a null key": (b"~: 2", "None"),
    "an alias": (b"data: {robustness: &a [renditions]}\ntarget: {robustness: *a}\n", "alias"),
    "a billion laughs": (b"a: &a [x, x]\n" + b"".join(b"%c: &%c [%s]\n" % (k, k, b"*%c, " % (k - 1) * 9) for k in range(98, 122)), "c.yaml"),
    "an enormous number": (b"seed: 1" + b"0" * 5000, "c.yaml"), "a long whole number for lr": (b"train: {meta: {lr: 1" + b"0" * 400 + b"}}", "train.meta.lr"),
    "a date": (b"seed: 2024-01-01", "seed"), "bytes": (b"output_dir: !!binary aGVsbG8=", "output_dir"), "a set": (b"meta: !!set {depths}", "meta"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_a_bad_config_is_one_sentence(here, capsys, what):
    content, names = BAD_CONFIGS[what]
    (here / "c.yaml").write_bytes(content)
    refused(capsys, names, "finetune", "role=meta")
    assert not (here / "pwned").exists() and not (here / "runs").exists()


def test_a_config_that_is_no_file_is_one_sentence(here, capsys):
    for path in ("none.yaml", str(here), "x" * 300):
        refused(capsys, path[:20], "finetune", config=path)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def write_folder(root, classes=("a", "b"), count=12, size=(16, 16)):
    for part in ("train", "val"):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", size, (90 * k, 10 * i, 50)).save(root / part / name / f"{i}.png")


def cut_image(root):
    file = root / "train/a/3.png"
    file.write_bytes(file.read_bytes()[:40])


BAD_FOLDERS = {
    "no train folder": (lambda root: shutil.rmtree(root / "train"), "train"),
    "one class": (lambda root: shutil.rmtree(root / "train/b"), "train"),
    "an empty class": (lambda root: [f.unlink() for f in (root / "train/b").iterdir()], "train/b"),
    "images not sorted": (lambda root: [shutil.rmtree(root / "train/b"), shutil.copy(root / "train/a/1.png", root / "train/x.png")], "train"),
    "another number of classes": (lambda root: [(root / p / "c").mkdir() or shutil.copy(root / "train/a/1.png", root / p / "c")
                                                for p in ("train", "val")], ["data.classes", "3"]),
    "a truncated image": (cut_image, "3.png"), "an empty image": (lambda root: (root / "train/a/3.png").write_bytes(b""), "3.png"),
    "text as image": (lambda root: (root / "train/a/3.png").write_text("hello"), "3.png"),
    "all images held out": (lambda root: None, "data.validation_images"),
    "a link to nowhere": (lambda root: [(root / "train/a/3.png").unlink(), (root / "train/a/3.png").symlink_to("none")], "3.png"),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_a_bad_image_folder_is_one_sentence(here, capsys, what):
    write_folder(here / "set")
    damage, names = BAD_FOLDERS[what]
    damage(here / "set")
    held_out = 24 if what == "all images held out" else 4
    words = ["data.set=folder", "data.root=set", "data.classes=2", f"data.validation_images={held_out}", "data.train_images=0",
             "data.test_images=0", "train.meta.batch=20"]
    if what == "a link to nowhere":  # skipping it would be a wrong result in silence: the class would miss an image
        words[-1] = "train.meta.batch=4"
    refused(capsys, names, "finetune", "role=meta", *words)


def test_classes_that_differ_between_train_and_val_are_one_sentence(here, capsys):
    write_folder(here / "set")
    words = ["role=meta", "data.set=folder", "data.root=set", "data.classes=2", "data.validation_images=4", "data.train_images=0",
             "data.test_images=0"]
    assert command("finetune", "--config", "c.yaml", *words) == 0
    refused(capsys, "nowhere", "evaluate", *words, "data.robustness=[nowhere]")
    (here / "set/val/b").rename(here / "set/val/c")
    refused(capsys, "set/val", "evaluate", *words)


@pytest.mark.parametrize("name, line", [("images", "0"), ("images", "x 001.a/0.png"), ("image_class_labels", "0 x"), ("image_class_labels", "0"),
                                        ("image_class_labels", "0 7"), ("image_class_labels", "0 -1"), ("train_test_split", "0 2"),
                                        ("train_test_split", ""), ("images", "\\xff")])
def test_a_bad_list_of_cub_is_one_sentence(here, capsys, name, line):
    (here / "cub").mkdir()
    lists = {"images": ["0 001.a/0.png", "1 002.b/1.png"], "image_class_labels": ["0 1", "1 2"], "train_test_split": ["0 1", "1 0"]}
    lists[name][0] = line
    for file, lines in lists.items():
        (here / f"cub/{file}.txt").write_bytes("\n".join(lines).encode().replace(rb"\xff", b"\xff"))
    refused(capsys, "cub", "finetune", "role=meta", "data.set=cub", "data.root=cub", "data.classes=2", "data.validation_images=1",
            "data.train_images=0", "data.test_images=0")


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b"\0\0\x08\3short"), gzip.compress(b"x" * 2000),
                                     gzip.compress(b"\0\0\x08\3" + np.array([5, 28, 28], ">i4").tobytes() + b"1" * 99),
                                     gzip.compress(os.urandom(5000))[:-400]])
def test_a_bad_idx_file_is_one_sentence(here, capsys, content):
    (here / "train-images-idx3-ubyte.gz").write_bytes(content)
    refused(capsys, "train-images-idx3-ubyte.gz", "finetune", "role=meta", "data.set=fashion_mnist", "data.root=.",
            "data.image_size=32", "data.classes=null")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Trap:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    """The bytes of a trained meta model's file."""
    folder = tmp_path_factory.mktemp("meta")
    (folder / "c.yaml").write_text(CONFIG)
    assert command("finetune", "--config", str(folder / "c.yaml"), "role=meta", f"output_dir={folder}/run") == 0
    return (folder / "run/meta.pt").read_bytes()


def changed(change):
    """A checkpoint whose content went through change()."""
    def write(path, good):
        path.write_bytes(good)
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    return write


def flipped(path, good):
    place = good.index(torch.load(path, weights_only=True)["model"]["blocks.0.attn.qkv.weight"].numpy().tobytes()[:64]) + 5
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])


BAD_CHECKPOINTS = {
    "empty": (lambda path, good: path.write_bytes(b""), []), "text": (lambda path, good: path.write_text("weights"), []),
    "truncated": (lambda path, good: path.write_bytes(good[:len(good) // 2]), []),
    "without its last byte": (lambda path, good: path.write_bytes(good[:-1]), []), "one bit flipped in a tensor": (flipped, []),
    "a pickle that runs a command": (lambda path, good: path.write_bytes(pickle.dumps(Trap())), []),
    "torch.save of one": (lambda path, good: torch.save({"model": Trap()}, path), []),
    "a whole module": (lambda path, good: torch.save(torch.nn.Linear(2, 2), path), []), "a folder": (lambda path, good: path.mkdir(), []),
    "a number": (lambda path, good: torch.save(3, path), []), "a list": (lambda path, good: torch.save([torch.ones(2)], path), []),
    "no tensors": (lambda path, good: torch.save({"model": {}}, path), []),
    "a tensor missing": (changed(lambda c: c["model"].pop("norm.bias")), "norm.bias"),
    "a tensor too many": (changed(lambda c: c["model"].update(extra=torch.ones(1))), "extra"),
    "a tensor of another shape": (changed(lambda c: c["model"].update({"head.bias": torch.ones(7)})), "head.bias"),
    "a number for a tensor": (changed(lambda c: c["model"].update({"head.bias": 7})), []),
    "a key that is no text": (changed(lambda c: c["model"].update({5: torch.ones(1)})), []),
    "a position grid that is none": (changed(lambda c: c["model"].update(pos_embed=torch.ones(1, 0, 16))), "pos_embed"),
    "a position grid of another width": (changed(lambda c: c["model"].update(pos_embed=torch.ones(1, 10, 8))), "pos_embed"),
    "weights that are not finite": (changed(lambda c: c["model"]["head.bias"].fill_(torch.nan)), "head.bias"),
    "whole numbers for weights": (changed(lambda c: c["model"].update({"norm.bias": torch.ones(16, dtype=torch.int64)})), []),
    "complex weights": (changed(lambda c: c["model"].update({"norm.bias": torch.ones(16, dtype=torch.complex64)})), []),
    "weights without values": (changed(lambda c: c["model"].update({"norm.bias": torch.ones(16, device="meta")})), []),
    "weights that are their own wrapper": (changed(lambda c: c["model"].update(model=c["model"])), []),
    "experts that differ": (changed(lambda c: c["model"].update({f"blocks.0.moe.experts.{e}.htoh4.weight": torch.ones(1, e + 2, 3)
                                                                 for e in range(2)})), "expert"),
    "a pipe": (lambda path, good: (path.unlink(), os.mkfifo(path)), []),
    "sparse weights": (changed(lambda c: c["model"].update({"norm.bias": torch.ones(16).to_sparse()})), []),
}


@pytest.mark.parametrize("what", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_one_sentence_and_nothing_in_it_runs(here, capsys, meta, what):
    write, names = BAD_CHECKPOINTS[what]
    (here / "bad.pt").write_bytes(meta)
    if what == "a folder":
        (here / "bad.pt").unlink()
    write(here / "bad.pt", meta)
    refused(capsys, ["bad.pt", *([names] if names else [])], "distill_module", "role=teacher", "meta.checkpoint=bad.pt")
    assert not (here / "pwned").exists() and not list(here.rglob("?.pt"))


@pytest.mark.parametrize("change", [lambda c: c.pop("settings"), lambda c: c.update(settings=3), lambda c: c.update(settings="["),
                                    lambda c: c.update(settings="[1]"), lambda c: c.update(settings='{"seed": 1}')],
                         ids=["none", "number", "broken", "list", "other"])
def test_a_result_without_true_settings_is_refused_by_the_stage_and_its_followers(here, capsys, meta, change):
    path = here / "runs/c/meta.pt"
    path.parent.mkdir(parents=True)
    changed(change)(path, meta)
    refused(capsys, "meta.pt", "finetune", "role=meta")
    refused(capsys, "meta.pt", "distill_module", "role=teacher")


def test_a_folder_that_may_not_be_written_is_one_sentence(here, capsys):
    (here / "runs").write_text("a file where the folder should be")
    refused(capsys, "runs/c", "finetune", "role=meta")


def test_results_and_logs_that_are_no_json_are_one_sentence(here, capsys):
    assert command("finetune", "--config", "c.yaml", "role=meta") == command("evaluate", "--config", "c.yaml", "role=meta") == 0
    good = {name: (here / "runs/c" / name).read_text() for name in ("results.json", "log.jsonl", "config.yaml")}
    for name, bad in (("results.json", "[{"), ("results.json", "[3]"), ("results.json", '{"role": 1}'), ("results.json", "\x00"),
                      ("log.jsonl", '{"stage": "me'), ("log.jsonl", "[]\n"), ("config.yaml", "a: ["), ("config.yaml", "3")):
        (here / "runs/c" / name).write_text(bad)
        if name == "results.json":
            refused(capsys, "results.json", "evaluate", "role=meta")
        assert command("evaluate", "--report", "runs/c") == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1, error
        (here / "runs/c" / name).write_text(good[name])
    assert command("evaluate", "--report", "runs/c", "nowhere") == 0


# ----------------------------------------------------------------------------------------------------------------------
# What a stage that was cut off left


def cut_off(here, monkeypatch, script, role):
    """Stops a stage after its first step -> its unfinished file."""
    rate = models.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(models, "learning_rate", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), rate(*a))[1])
        assert command(script, "--config", "c.yaml", f"role={role}") == 143
    return here / "runs/c" / {"finetune": f"{role}.unfinished.pt", "distill_module": f"{role}_modules/unfinished.pt"}[script]


UNFINISHED = {  # what is changed: what the sentence must name
    "step": (lambda c: c.pop("step"), "step"), "no whole step": (lambda c: c.update(step=1.5), "step"),
    "another step": (lambda c: c.update(step=2), "step"), "parts": (lambda c: c.pop("parts"), "parts"),
    "sums": (lambda c: c["parts"]["meta"].pop("sums"), "sums"), "lines": (lambda c: c.pop("lines"), "lines"),
    "odd lines": (lambda c: c.update(lines=[3]), "lines"), "a tensor in a line": (lambda c: c.update(lines=[{"a": torch.ones(1)}]), "lines"),
    "model": (lambda c: c["parts"]["meta"].pop("model"), "model"), "optimizer": (lambda c: c["parts"]["meta"].pop("optimizer"), "optimizer"),
    "a tensor": (lambda c: c["parts"]["meta"]["model"].pop("head.bias"), "head.bias"),
    "a tensor too many": (lambda c: c["parts"]["meta"]["model"].update(extra=torch.ones(1)), "extra"),
    "something that is no tensor": (lambda c: c["parts"]["meta"]["model"].update({3: 4}), []),
    "odd moments": (lambda c: c["parts"]["meta"]["optimizer"].update({0: 4}), "optimizer 0"),
    "a tensor's shape": (lambda c: c["parts"]["meta"]["model"].update({"head.bias": torch.ones(5)}), "head.bias"),
    "a tensor's type": (lambda c: c["parts"]["meta"]["model"].update({"head.bias": torch.ones(4).double()}), "head.bias"),
    "a moment": (lambda c: c["parts"]["meta"]["optimizer"][3].pop("exp_avg"), "3 exp_avg"),
    "a moment's shape": (lambda c: c["parts"]["meta"]["optimizer"][3].update(exp_avg_sq=torch.ones(7)), "3 exp_avg_sq"),
    "a parameter's moments": (lambda c: c["parts"]["meta"]["optimizer"].pop(0), "optimizer 0"),
    "world": (lambda c: c.pop("world"), "processes"), "settings": (lambda c: c.pop("settings"), "settings"),
}


@pytest.mark.parametrize("what", UNFINISHED)
def test_an_unfinished_stage_that_lacks_a_piece_is_one_sentence(here, capsys, monkeypatch, what):
    path = cut_off(here, monkeypatch, "finetune", "meta")
    change, names = UNFINISHED[what]
    changed(change)(path, path.read_bytes())
    bad = path.read_bytes()
    refused(capsys, ["meta.unfinished.pt", *([names] if names else [])], "finetune", "role=meta")
    assert path.read_bytes() == bad and not (here / "runs/c/meta.pt").exists()


def pieces(content, place=()):
    """The places of all values within nested dicts and lists."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ():
        yield (*place, key)
        yield from pieces(value, (*place, key))


def mutate_content(content, rng):
    """Drops a piece of a checkpoint, or changes its type or its shape."""
    *place, last = rng.choice(list(pieces(content)))
    for key in place:
        content = content[key]
    value, kind = content[last], rng.choice(["drop", "type", "shape", "shape"])
    if kind == "shape" and isinstance(value, torch.Tensor):
        content[last] = rng.choice([value[None], value.flatten(), value.ravel()[:1], torch.cat([value.ravel()] * 2), value.double(), value.long(),
                                    value.to_sparse(), value.ravel()[:0], value.to(torch.bfloat16), value.T if value.ndim == 2 else value[None]])
    elif kind == "drop":
        del content[last]
    else:
        content[last] = rng.choice([None, True, 3, -1, 0.5, "text", "", [], [[]], {}, {"a": 1}, {1: {}}, torch.ones(()), torch.ones(2, 3), 10**30])
    return *place, last


def same_shape(content, place):
    """Weights of another precision are welcome: other people's files have them."""
    for key in place:
        content = content.get(key)
    return isinstance(content, torch.Tensor) and content.is_floating_point() and content.layout == torch.strided and content.shape


@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_no_mutation_of_a_checkpoints_content_gives_a_traceback_or_another_result(here, capsys, monkeypatch, count):
    rng, refusals = random.Random(3), 0
    files = {"meta": here / "runs/c/meta.pt", "teacher": here / "runs/c/teacher_modules/1.pt"}
    for script, role in (("finetune", "meta"), ("distill_module", "teacher")):
        path = cut_off(here, monkeypatch, script, role)
        good = path.read_bytes()
        assert command(script, "--config", "c.yaml", f"role={role}") == 0
        whole, weights = files[role].read_bytes(), torch.load(files[role])["model"]
        for k in range(count):
            unfinished = k % 3  # the others: the finished file, which the stage itself or its followers meet
            content = torch.load(io.BytesIO(good if unfinished else whole), weights_only=True)
            place = mutate_content(content, rng)
            files[role].unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            torch.save(content, path if unfinished else files[role])
            capsys.readouterr()
            try:
                if unfinished:
                    code = command(script, "--config", "c.yaml", f"role={role}")
                else:
                    code = command(*{"meta": ("distill_module", "--config", "c.yaml", "role=teacher", "module=0", "force=true"),
                                     "teacher": ("assemble", "--config", "c.yaml", "role=teacher", "force=true")}[role])
            except Exception as e:
                raise AssertionError((k, place, unfinished)) from e
            error = capsys.readouterr().err
            assert code == 0 or code == 2 and error.count("\n") == 1 and ".pt" in error, (k, place, code, error)
            if code == 0 and unfinished:
                result = torch.load(files[role])["model"]
                assert all(torch.equal(result[name], value) for name, value in weights.items()), (k, place)
            elif code == 0:
                assert place[0] == "model" and same_shape(content, place) == weights[place[1]].shape, (k, place)
            refusals += code == 2
        files[role].write_bytes(whole)
    assert refusals > count


# ----------------------------------------------------------------------------------------------------------------------
# As a user meets it


@pytest.mark.parametrize("script, words, code_names", [
    ("finetune", ["--config", "c.yaml", "role=meta", "meta.hedas=2"], "meta.heads"),
    ("distill_module", ["--config", "c.yaml"], "meta.pt is not there yet"),
    ("assemble", ["--config", "none.yaml"], "none.yaml"),
    ("evaluate", ["--config", "c.yaml", "data.classes=1"], "data.classes=1"),
    ("finetune", ["role=meta"], "--config"),
])
def test_the_commands_end_with_code_2_and_no_traceback(here, script, words, code_names):
    result = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *words], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and code_names in result.stderr and "Traceback" not in result.stderr, result
    assert result.stderr.count("error: ") == 1 and result.stdout == "", result


def test_run_sh_stops_at_the_first_error(here):
    result = subprocess.run(["bash", str(ROOT / "run.sh"), str(here / "c.yaml"), "meta.hedas=2"], capture_output=True, text=True,
                            timeout=60, env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"})
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "meta.heads" in result.stderr, result


# ----------------------------------------------------------------------------------------------------------------------
# Fuzz

COUNTS = [300, pytest.param(2000, marks=pytest.mark.slow)]
VALUES = ["2147483647", "1000000", "1000", "", "0", "1", "-1", "2", "3", "7", "0.5", "-0.5", "1e-3", "1e308", "-1e308", "1e999", "10" * 200, ".nan", ".inf", "true", "null",
          "~", "[]", "[1]", "[1, 2]", "[1, 1, 1]", "[0.1, 0.9]", "[null]", "[[1]]", "{}", "{a: 1}", "text", "'", '"', "!!binary x", "*a",
          "&a", "&a [*a]", "2024-13-01", "12:30:45", "0x1f", "!!python/none", "\x00", "é", "- 1", "? ", "|", ">", "%", "@", "`", "#", "a: b: c",
          "!!float x", "!!int ''", "!!timestamp x", "!!set 3", "<<", "=", "glyphs", "vmoe", "auto", "bfloat16", "keep", "fold"]


def mutate(text, rng):
    """A text or bytes with a few random pieces changed, moved, doubled or lost."""
    for _ in range(rng.randint(1, 3)):
        a = rng.randrange(len(text) + 1)
        b = min(len(text), a + rng.choice([1, 1, 2, 5, 20]))
        piece = rng.choice(VALUES)
        piece = piece.encode() if isinstance(text, bytes) else piece
        text = rng.choice([text[:a] + piece + text[b:], text[:a] + text[b:], text[:b] + text[a:b] + text[b:], text[:a] + text[b:] + text[a:b],
                           text[:a] + rng.choice("{}[]:,-#&*!|>'\"%@` \n\t0 1").encode() + text[b:] if isinstance(text, bytes)
                           else text[:a] + rng.choice("{}[]:,-#&*!|>'\"%@` \n\t01") + text[b:]])
    return text


@pytest.mark.parametrize("count", COUNTS)
def test_no_mutation_of_configs_or_overrides_gives_a_traceback(here, capsys, monkeypatch, count):
    """--dry-run reads, checks and builds every model, on no memory; every tenth time it runs them too."""
    rng, good, cost = random.Random(1), 0, models.cost

    def built(config, stage):
        role = {"incubate": "teacher", "distill": "student"}.get(stage, stage)
        with torch.device("meta"):
            return models.count(models.build(models.on_target(config, role), role)), 0, 0, 0

    texts = [CONFIG] + [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    for k in range(count):
        words = []
        if k % 2:
            (here / "c.yaml").write_text(mutate(rng.choice(texts), rng), encoding="utf-8", errors="surrogateescape")
        else:
            (here / "c.yaml").write_text(CONFIG)
            words = [f"{rng.choice(list(models.KEYS))}={rng.choice(VALUES)}" for _ in range(rng.randint(1, 2))]
            words = [mutate(w, rng) if rng.random() < 0.3 else w for w in words]
        words = [w for w in words if not w.startswith("-")]
        monkeypatch.setattr(models, "cost", built if k % 10 else cost)
        try:
            code = command("finetune", "--config", "c.yaml", "--dry-run", *words)
        except Exception as e:
            raise AssertionError((k, words, (here / "c.yaml").read_bytes() if k % 2 else "")) from e
        error = capsys.readouterr().err
        assert code == 0 or code == 2 and error.count("\n") == 1, (k, words, code, error)
        good += code == 0
    assert 0.02 * count < good < 0.9 * count  # the mutations are neither all harmless nor all fatal


@pytest.mark.parametrize("count", COUNTS)
def test_no_mutation_of_a_checkpoints_bytes_gives_a_traceback_or_other_weights(here, meta, count):
    rng, path = random.Random(2), here / "m.pt"
    config = models.load_config("c.yaml")
    model = models.build(config, "meta")
    path.write_bytes(meta)
    models.load_weights(model, path)
    good = {k: v.clone() for k, v in model.state_dict().items()}
    refusals = 0
    for k in range(count):
        path.write_bytes(mutate(meta, rng))
        try:
            models.load_weights(model, path)
        except models.UserError as e:
            assert "m.pt" in str(e) and "\n" not in str(e), (k, str(e))
            refusals += 1
        assert all(torch.equal(v, good[name]) for name, v in model.state_dict().items()), k
    assert refusals > count / 2
