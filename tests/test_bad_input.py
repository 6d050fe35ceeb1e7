"""Promise: bad input ends in exit code 2 and one sentence that names key or file, value and remedy.

No traceback, ever: no mutation of a config, an override or a checkpoint's bytes gives one.
"""

import gzip
import importlib
import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import models
from conftest import ROOT

CONFIG = """
seed: 0
device: cpu
data: {set: glyphs, image_size: 16, classes: 4, train_images: 32, validation_images: 8, test_images: 8,
  workers: 0}
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
    argv, sys.argv = sys.argv, [f"{script}.py", *words]
    try:
        models.run(importlib.import_module(script).main)
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0


def one_sentence(error):
    """The error of a command, which is one line; argparse shows the usage before its own."""
    if error.startswith("usage: "):
        error = error[error.index("error: "):]
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def refused(capsys, names, script, *words, config="c.yaml"):
    """The command must end with code 2 and one sentence that holds each of the names."""
    capsys.readouterr()
    began = time.process_time()
    assert command(script, "--config", config, *words) == 2
    error = one_sentence(capsys.readouterr().err)
    for name in [names] if isinstance(names, str) else names:
        assert name in error, error
    assert time.process_time() - began < 5


# override(s): what the sentence must name (key, value or what is allowed)
BAD_OVERRIDES = [
    ("distill.alpa=1", ["distill.alpa", "distill.alpha"]), ("train.meta.epoch=1", "train.meta.epochs"),
    ("alpha=1", ["alpha", "distill.alpha"]), ("train=1", "train"), ("=1", "nearest"),
    ("seed", ["seed", "override"]), ("train.*.epoch=1", "train.*.epoch"), ("force=true", "force"),
    ("data.set=mnist", ["mnist", "fashion_mnist"]), ("data.set=[a]", "data.set"), ("data.set=3", "data.set"),
    ("data.image_size=0", ["data.image_size=0", "from 1"]), ("data.image_size=17", ["17", "patch"]),
    ("data.image_size=big", ["big", "int"]), ("data.image_size=16.5", "16.5"),
    ("data.image_size=1000000000", "data.image_size"), ("data.train_images=-1", "data.train_images=-1"),
    ("data.train_images=1000000000000", "data.train_images"), ("data.classes=1", "data.classes=1"),
    ("data.classes=99", ["data.classes", "99"]), ("data.flip=2", ["data.flip=2", "0 to 1"]),
    ("data.flip=yes", "data.flip"), ("data.smoothing=1", "data.smoothing"),
    ("data.randaugment=11", "data.randaugment"), ("data.resized_crop=0.5", "data.resized_crop"),
    ("data.resized_crop=[0.1]", "data.resized_crop"), ("data.mixup=-1", "data.mixup"),
    ("data.mixup=.nan", "data.mixup"), ("data.cutmix=.inf", "data.cutmix"), ("data.workers=-2", "workers"),
    ("data.repeats=0", "data.repeats"), ("data.robustness=renditions", ["data.robustness", "list"]),
    ("seed=-1", "seed=-1"), ("seed=1.5", "seed=1.5"), ("seed=123456789012345678901234567890", "seed"),
    ("device=gpu", ["gpu", "cuda"]), ("device=cuda", ["device", "cuda"]), ("device=mps", ["device", "mps"]),
    ("precision=fp16", ["fp16", "bfloat16"]), ("meta.heads=3", ["meta.width=16", "meta.heads=3"]),
    ("meta.depths=[1, 1]", ["meta.depths", "2"]), ("meta.depths=[]", "meta.depths"),
    ("meta.depths=3", "meta.depths"), ("meta.depths=[1, 0, 1]", "meta.depths"),
    ("meta.depth=7", ["meta.depths", "7"]), ("meta.arch=vit_giant", "vit_huge"),
    ("meta.width=32", ["teacher.width=16", "meta.width=32"]), ("teacher.patch=5", ["teacher", "5", "16"]),
    ("meta.eps=0", "meta.eps"), ("meta.qkv_bias=1", ["meta.qkv_bias=1", "bool"]),
    ("meta.mlp_ratio=0", "meta.mlp_ratio"), ("meta.mlp_ratio=1e300", "meta.mlp_ratio"),
    ("student.kind=cnn", ["cnn", "nac", "vmoe"]), ("student.kind=vmoe", "student.experts"),
    ("student.propagators=2", "student.propagators=2"), ("student.width=18", "student.width=18"),
    ("student.latents=[4, 16]", "student.latents"), ("student.latents=[4, 0, 2]", "student.latents"),
    ("student.tokenizer_stages=4", "student.tokenizer_stages"), ("assemble.graph=ring", "ring_of_cliques"),
    (["assemble.graph=ring_of_cliques", "assemble.graph_groups=9"], "graph_groups"),
    (["assemble.graph=scale_free", "assemble.graph_m=16"], "graph_m"),
    ("distill.alpha=1.01", ["distill.alpha=1.01", "0 to 1"]), ("distill.tau=0", "distill.tau"),
    ("distill.kind=medium", ["soft", "hard"]), ("distill.reduction=sum", ["batchmean", "mean"]),
    ("distill.codes=mine", ["own", "original"]), ("assemble.stitches=glue", ["drop", "keep", "fold"]),
    ("train.meta.batch=0", "train.meta.batch=0"), ("train.meta.batch=64", ["train.meta.batch", "64", "32"]),
    ("train.meta.accumulate=3", ["accumulate", "32"]), ("train.meta.lr=-1", "train.meta.lr"),
    ("train.meta.lr=fast", ["train.meta.lr", "fast"]), ("train.meta.betas=[0.9, 1]", "train.meta.betas"),
    ("train.meta.drop_path=1", "train.meta.drop_path"), ("train.meta.images=[5, 5]", "train.meta.images"),
    ("train.meta.images=[0, 33]", ["train.meta.images", "33", "32"]),
    ("train.meta.images=[0]", "train.meta.images"), ("role=tutor", ["tutor", "teacher"]),
    ("module=1", "module"), ("share=nowhere", ["share", "nowhere"]), ("output_dir=c.yaml/run", "c.yaml/run"),
    ("output_dir=" + "x" * 300, "output_dir"), ("output_dir=a\0b", "output_dir"), ("share=a\0b", "share"),
    ("output_dir=/proc/none", "/proc/none"), ("data.root=[1", "data.root"),
    ("data.set=folder", "data.root"), (["data.set=imagenet", "data.root=nowhere"], ["nowhere", "data.root"]),
    (["data.set=fashion_mnist", "data.root=nowhere", "data.image_size=32"], ["nowhere", "data.root"]),
    (["data.set=cifar100", "data.root=nowhere"], "nowhere"),
    (["data.set=cub", "data.root=nowhere"], "nowhere"),
    # what no memory holds, or would take hours to be found out
    ("meta.depths=[2000000000, 1, 1]", ["meta.depths", "1000"]), ("meta.width=2000000000", "meta.width"),
    ("student.tokenizer_blocks=100000000", "student.tokenizer_blocks"),
    ("student.latents=[4, 1000000000, 2]", "student.latents"), ("data.workers=100000", ["workers", "256"]),
    ("data.repeats=2000000000", "data.repeats"), ("data.classes=2000000000", "data.classes"),
    ("target.image_size=4", ["image_size=4", "stride 8"]),
]


def brief(value):
    return None if isinstance(value, list) else ascii(value)[:40]


@pytest.mark.parametrize("words, names", BAD_OVERRIDES, ids=brief)
def test_a_bad_override_is_one_sentence(here, capsys, words, names):
    words = [words] if isinstance(words, str) else words
    refused(capsys, names, "finetune", *["role=meta"] * (not words[0].startswith("role=")), *words)
    assert not list(here.rglob("*.pt"))


@pytest.mark.parametrize("script, words, names", [
    ("distill_module", ["module=one"], ["module", "one"]), ("distill_module", ["module="], "module"),
    ("distill_module", ["role=meta"], "meta"), ("assemble", ["role=baseline"], "baseline"),
    ("assemble", ["module=1"], "module"), ("distill_module", [], "meta.pt is not there yet"),
    ("distill_module", ["meta.checkpoint=none.pt", "distill.alpha=0"], "none.pt"),
    ("assemble", [], "0.pt is not there yet"), ("finetune", [], "student_assembled.pt is not there yet"),
    ("evaluate", [], "student.pt is not there yet"), ("evaluate", ["role=pupil"], "pupil"),
    ("evaluate", ["module=1"], "module"), ("evaluate", ["checkpoint=none.pt"], "none.pt"),
    ("evaluate", ["role=all", "checkpoint=none.pt"], "role="), ("evaluate", ["image=none.png"], "student.pt"),
])
def test_a_bad_word_or_a_stage_too_early_is_one_sentence(here, capsys, script, words, names):
    refused(capsys, names, script, *words)


@pytest.mark.parametrize("module", [3, -1])
def test_a_module_that_there_is_not_is_one_sentence(here, capsys, module):
    assert command("finetune", "--config", "c.yaml", "role=meta") == 0
    refused(capsys, ["module", str(module)], "distill_module", "role=teacher", f"module={module}")
    assert not list(here.rglob("*_modules/*.pt"))


def test_too_little_memory_is_one_sentence_and_other_errors_of_torch_are_shown(here, capsys, monkeypatch):
    monkeypatch.setattr(models, "build", lambda *_: torch.empty(2**58))
    refused(capsys, "alloc", "finetune", "role=meta")
    monkeypatch.setattr(models, "build", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        command("finetune", "--config", "c.yaml", "role=meta")


LAUGHS = [b"%c: &%c [%s]\n" % (k, k, b"*%c, " % (k - 1) * 9) for k in range(98, 122)]
BAD_CONFIGS = {  # a file: what the sentence must name
    "an empty file": (b"", "c.yaml"), "a list": (b"- a\n- b\n", "c.yaml"), "text": (b"hello", "c.yaml"),
    "binary": (b"\xff\xfe\x00\x9f", "c.yaml"), "a control character": (b"seed: \x07", "c.yaml"),
    "bad indentation": (b"seed: 1\n  data: 2\n", "c.yaml"), "tabs": (b"data:\n\tset: glyphs", "c.yaml"),
    "an open bracket": (b"data: {set: glyphs", "c.yaml"), "an impossible date": (b"seed: 2024-13-45", "seed"),
    "python objects": (b"seed: !!python/object/apply:os.system ['touch pwned']", "c.yaml"),
    "itself": (b"data: &a {set: glyphs, more: *a}", "c.yaml"),
    "deep nesting": (b"seed: " + b"[" * 3000, "c.yaml"),
    "a key twice": (CONFIG.encode() + b"seed: 1\n", "seed"),
    "an unknown block": (CONFIG.encode() + b"trian: {meta: {epochs: 1}}\n", "trian"),
    "a number for a block": (b"train: 3", "train"), "a block for a number": (b"seed: {a: 1}", "seed.a"),
    "a list as key": (b"[1, 2]: 3", "c.yaml"), "a number as key": (b"1: 2", "1"),
    "a null key": (b"~: 2", "None"),
    "a billion laughs": (b"a: &a [x]\n" + b"".join(LAUGHS), "a"),
    "an enormous number": (b"seed: 1" + b"0" * 5000, "c.yaml"),
    "a long whole number for lr": (b"train: {meta: {lr: 1" + b"0" * 400 + b"}}", "train.meta.lr"),
    "a date": (b"seed: 2024-01-01", "seed"), "a set": (b"meta: !!set {depths}", "meta"),
    "bytes": (b"output_dir: !!binary aGVsbG8=", "output_dir"),
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


# ---------- Data


def write_folder(root, classes=("a", "b"), count=12, size=(16, 16)):
    for part in ("train", "val"):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", size, (90 * k, 10 * i, 50)).save(root / part / name / f"{i}.png")


def third_class(root):
    for part in ("train", "val"):
        (root / part / "c").mkdir()
        shutil.copy(root / "train/a/1.png", root / part / "c")


def flat(root):
    shutil.rmtree(root / "train/b")
    shutil.copy(root / "train/a/1.png", root / "train/x.png")


def lost_link(root):
    (root / "train/a/3.png").unlink()
    (root / "train/a/3.png").symlink_to("none")


def cut_image(root):
    file = root / "train/a/3.png"
    file.write_bytes(file.read_bytes()[:40])


BAD_FOLDERS = {
    "no train folder": (lambda root: shutil.rmtree(root / "train"), "train"),
    "one class": (lambda root: shutil.rmtree(root / "train/b"), "train"),
    "an empty class": (lambda root: [f.unlink() for f in (root / "train/b").iterdir()], "train/b"),
    "images not sorted": (flat, "train"), "another number of classes": (third_class, ["data.classes", "3"]),
    "a truncated image": (cut_image, "3.png"),
    "an empty image": (lambda root: (root / "train/a/3.png").write_bytes(b""), "3.png"),
    "text as image": (lambda root: (root / "train/a/3.png").write_text("hello"), "3.png"),
    "all images held out": (lambda root: None, ["24", "validation"]),
    # Skipped in silence, the class would miss an image.
    "a link to nowhere": (lost_link, "3.png"),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_a_bad_image_folder_is_one_sentence(here, capsys, what):
    write_folder(here / "set")
    damage, names = BAD_FOLDERS[what]
    damage(here / "set")
    held_out, batch = 24 if what == "all images held out" else 4, 4 if what == "a link to nowhere" else 20
    refused(capsys, names, "finetune", "role=meta", "data.set=folder", "data.root=set", "data.classes=2",
            f"data.validation_images={held_out}", "data.train_images=0", "data.test_images=0",
            f"train.meta.batch={batch}")


def test_classes_that_differ_between_train_and_val_are_one_sentence(here, capsys):
    write_folder(here / "set")
    words = ["role=meta", "data.set=folder", "data.root=set", "data.classes=2", "data.validation_images=4",
             "data.train_images=0", "data.test_images=0"]
    assert command("finetune", "--config", "c.yaml", *words) == 0
    refused(capsys, "nowhere", "finetune", *words, "data.robustness=[nowhere]", "output_dir=other")
    # Of a finished model the other sets are still scored.
    assert command("evaluate", "--config", "c.yaml", *words, "data.robustness=[nowhere]") == 0
    assert "nowhere is left out" in capsys.readouterr().out
    (here / "set/val/b").rename(here / "set/val/c")
    refused(capsys, "set/val", "evaluate", *words)


@pytest.mark.parametrize("name, line", [
    ("images", "0"), ("images", "x 001.a/0.png"), ("image_class_labels", "0 x"), ("image_class_labels", "0"),
    ("image_class_labels", "0 7"), ("image_class_labels", "0 -1"), ("train_test_split", "0 2"),
    ("train_test_split", ""), ("images", "\\xff")])
def test_a_bad_list_of_cub_is_one_sentence(here, capsys, name, line):
    (here / "cub").mkdir()
    lists = {"images": ["0 001.a/0.png", "1 002.b/1.png"], "image_class_labels": ["0 1", "1 2"],
             "train_test_split": ["0 1", "1 0"]}
    lists[name][0] = line
    for file, lines in lists.items():
        (here / f"cub/{file}.txt").write_bytes("\n".join(lines).encode().replace(rb"\xff", b"\xff"))
    refused(capsys, "cub", "finetune", "role=meta", "data.set=cub", "data.root=cub", "data.classes=2",
            "data.validation_images=1", "data.train_images=0", "data.test_images=0")


@pytest.mark.parametrize("content", [
    b"", b"no gzip", gzip.compress(b"\0\0\x08\3short"), gzip.compress(b"x" * 2000),
    gzip.compress(b"\0\0\x08\3" + np.array([5, 28, 28], ">i4").tobytes() + b"1" * 99),
    gzip.compress(os.urandom(5000))[:-400],
], ids=["empty", "no gzip", "short", "no idx", "too few", "cut off"])
def test_a_bad_idx_file_is_one_sentence(here, capsys, content):
    for name in ("images-idx3", "labels-idx1"):
        (here / f"train-{name}-ubyte.gz").write_bytes(content)
    refused(capsys, ["Fashion-MNIST", "data.root"], "finetune", "role=meta", "data.set=fashion_mnist",
            "data.root=.", "data.image_size=32", "data.classes=null")


# ---------- Checkpoints


class Trap:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    """The bytes of a trained meta model's file."""
    folder = tmp_path_factory.mktemp("meta")
    (folder / "c.yaml").write_text(CONFIG)
    words = ["--config", str(folder / "c.yaml"), "role=meta", f"output_dir={folder}/run"]
    assert command("finetune", *words) == 0
    return (folder / "run/meta.pt").read_bytes()


def changed(change):
    """A checkpoint whose content went through change()."""
    def write(path, good):
        path.write_bytes(good)
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    return write


def weights(**tensors):
    """A checkpoint with these tensors in place of its own; a _ in a name is a dot."""
    return changed(lambda c: c["model"].update({k.replace("_", "."): v for k, v in tensors.items()}))


def flipped(path, good):
    tensor = torch.load(path, weights_only=True)["model"]["blocks.0.attn.qkv.weight"]
    place = good.index(tensor.numpy().tobytes()[:64]) + 5
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])


def grid(*shape):
    return changed(lambda c: c["model"].update(pos_embed=torch.ones(shape)))


BAD_CHECKPOINTS = {
    "empty": (lambda path, good: path.write_bytes(b""), []),
    "text": (lambda path, good: path.write_text("weights"), []),
    "truncated": (lambda path, good: path.write_bytes(good[:len(good) // 2]), []),
    "without its last byte": (lambda path, good: path.write_bytes(good[:-1]), []),
    "one bit flipped in a tensor": (flipped, "checksum"),
    "a pickle that runs a command": (lambda path, good: path.write_bytes(pickle.dumps(Trap(), 2)), []),
    "torch.save of one": (lambda path, good: torch.save({"model": Trap()}, path), []),
    "a whole module": (lambda path, good: torch.save(torch.nn.Linear(2, 2), path), []),
    "a folder": (lambda path, good: (path.unlink(), path.mkdir()), "must hold a file for each"),
    "a pipe": (lambda path, good: (path.unlink(), os.mkfifo(path)), []),
    "a number": (lambda path, good: torch.save(3, path), []),
    "a list": (lambda path, good: torch.save([torch.ones(2)], path), []),
    "no tensors": (lambda path, good: torch.save({"model": {}}, path), []),
    "a tensor missing": (changed(lambda c: c["model"].pop("norm.bias")), "lacks the tensor norm.bias (16,)"),
    "a tensor too many": (weights(extra=torch.ones(1)), "has an unexpected tensor extra (1,)"),
    "a tensor of another shape": (weights(head_bias=torch.ones(7)),
                                  "the tensor head.bias is (7,), the model's (4,)"),
    "a number for a tensor": (weights(head_bias=7), []),
    "a key that is no text": (changed(lambda c: c["model"].update({5: torch.ones(1)})), []),
    "a position grid that is none": (grid(1, 0, 16), "pos_embed"),
    "a position grid of another width": (grid(1, 10, 8), "pos_embed"),
    "weights that are not finite": (changed(lambda c: c["model"]["head.bias"].fill_(torch.nan)), "head.bias"),
    "whole numbers for weights": (weights(norm_bias=torch.ones(16, dtype=torch.int64)), []),
    "complex weights": (weights(norm_bias=torch.ones(16, dtype=torch.complex64)), []),
    "weights without values": (weights(norm_bias=torch.ones(16, device="meta")), []),
    "sparse weights": (weights(norm_bias=torch.ones(16).to_sparse()), []),
    "weights that are their own wrapper": (changed(lambda c: c["model"].update(model=c["model"])), []),
}


@pytest.mark.parametrize("what", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_one_sentence_and_nothing_in_it_runs(here, capsys, meta, what):
    write, name = BAD_CHECKPOINTS[what]
    (here / "bad.pt").write_bytes(meta)
    write(here / "bad.pt", meta)
    names = ["bad.pt", name] if name else "bad.pt"
    refused(capsys, names, "distill_module", "role=teacher", "meta.checkpoint=bad.pt")
    assert not (here / "pwned").exists() and not list(here.rglob("?.pt"))


def test_a_position_grid_that_is_a_list_is_named(here, capsys, meta):
    grid(10)(here / "bad.pt", meta)
    refused(capsys, ["bad.pt", "pos_embed"], "distill_module", "role=teacher", "meta.checkpoint=bad.pt")


def test_experts_of_two_shapes_are_named(here):
    config = models.load_config("c.yaml", ["student.kind=vmoe", "student.experts=2"])
    model = models.build(config, "student")
    state = {name: value for name, value in model.state_dict().items() if name != "blocks.0.moe.fc1_weight"}
    for expert in (0, 1):
        state[f"blocks.0.moe.experts.{expert}.htoh4.weight"] = torch.ones(1, 64 + expert, 16)
    torch.save(state, "m.pt")
    with pytest.raises(models.UserError, match=r"m.pt lacks the tensor blocks.0.moe.fc1_weight \(2, 64, 16"):
        models.load_weights(model, "m.pt")


@pytest.mark.parametrize("change", [
    lambda c: c.pop("settings"), lambda c: c.update(settings=3), lambda c: c.update(settings={}),
    lambda c: c.update(settings={"seed": 1}), lambda c: c["settings"].pop("meta.eps"),
    lambda c: c["settings"].update(more=1)], ids=["none", "number", "empty", "other", "one less", "one more"])
def test_a_result_without_true_settings_is_refused_by_the_stage_and_its_followers(here, capsys, meta, change):
    path = here / "runs/c/meta.pt"
    path.parent.mkdir(parents=True)
    changed(change)(path, meta)
    refused(capsys, "meta.pt", "finetune", "role=meta")
    refused(capsys, "meta.pt", "distill_module", "role=teacher")


def test_a_folder_that_may_not_be_written_is_one_sentence(here, capsys):
    (here / "runs").write_text("a file where the folder should be")
    refused(capsys, "runs/c", "finetune", "role=meta")


def test_results_and_configs_that_cannot_be_read_are_one_sentence(here, capsys):
    assert command("finetune", "--config", "c.yaml", "role=meta") == 0
    assert command("evaluate", "--config", "c.yaml", "role=meta") == 0
    good = {name: (here / "runs/c" / name).read_text() for name in ("results.json", "config.yaml")}
    bad = [("results.json", "[{"), ("results.json", ""), ("results.json", "\x00"), ("config.yaml", "a: [")]
    for name, text in bad:
        (here / "runs/c" / name).write_text(text)
        if name == "results.json":
            refused(capsys, "results.json", "evaluate", "role=meta")
        capsys.readouterr()
        assert command("evaluate", "--report", "runs/c") == 2
        assert name in one_sentence(capsys.readouterr().err)
        (here / "runs/c" / name).write_text(good[name])
    assert command("evaluate", "--report", "runs/c", "nowhere") == 2
    assert "nowhere" in one_sentence(capsys.readouterr().err)


def cut_off(here, monkeypatch, script, role):
    """Stops a stage after its first step -> its unfinished file."""
    rate = models.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(models, "learning_rate", lambda *a: (signal.raise_signal(signal.SIGTERM), rate(*a))[1])
        assert command(script, "--config", "c.yaml", f"role={role}") == 143
    file = {"finetune": f"{role}.unfinished.pt", "distill_module": f"{role}_modules/unfinished.pt"}[script]
    return here / "runs/c" / file


DAMAGES = {"cut": lambda good: good[:-1], "half": lambda good: good[:len(good) // 2],
           "empty": lambda good: b"",
           "changed": lambda good: good[:20000] + bytes(b ^ 1 for b in good[20000:20008]) + good[20008:]}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("script, role", [("finetune", "meta"), ("distill_module", "teacher")])
def test_a_checkpoint_that_is_not_whole_is_named_and_stays(here, capsys, monkeypatch, script, role, damage):
    if script == "distill_module":
        assert command("finetune", "--config", "c.yaml", "role=meta") == 0
    path = cut_off(here, monkeypatch, script, role)
    path.write_bytes(bad := DAMAGES[damage](path.read_bytes()))
    refused(capsys, "unfinished.pt", script, f"role={role}")
    assert path.read_bytes() == bad and not list(here.rglob(f"{role}.pt" if role == "meta" else "?.pt"))


# ---------- As a user meets it


@pytest.mark.parametrize("script, words, name", [
    ("finetune", ["--config", "c.yaml", "role=meta", "meta.hedas=2"], "meta.heads"),
    ("distill_module", ["--config", "c.yaml"], "meta.pt is not there yet"),
    ("assemble", ["--config", "none.yaml"], "none.yaml"),
    ("finetune", ["role=meta"], "--config"), ("evaluate", ["--report", "nowhere"], "nowhere"),
    ("evaluate", ["--report"], "--report"),
])
def test_the_commands_end_with_code_2_and_no_traceback(here, script, words, name):
    line = [sys.executable, str(ROOT / f"{script}.py"), *words]
    result = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and name in one_sentence(result.stderr) and result.stdout == "", result


# ---------- Fuzz

COUNTS = [300, pytest.param(2000, marks=pytest.mark.slow)]
VALUES = [
    "2147483647", "1000000", "1000", "", "0", "1", "-1", "2", "3", "7", "0.5", "-0.5", "1e-3", "1e308",
    "-1e308", "1e999", "10" * 200, ".nan", ".inf", "true", "null", "~", "[]", "[1]", "[1, 2]", "[1, 1, 1]",
    "[0.1, 0.9]", "[null]", "[[1]]", "{}", "{a: 1}", "text", "'", '"', "!!binary x", "*a", "&a", "&a [*a]",
    "2024-13-01", "12:30:45", "0x1f", "!!python/none", "\x00", "é", "- 1", "? ", "|", ">", "%", "@", "`", "#",
    "a: b: c", "!!float x", "!!int ''", "!!timestamp x", "!!set 3", "<<", "=", "glyphs", "vmoe", "auto",
    "bfloat16", "keep", "fold"]


def mutate(text, rng):
    """A text or bytes with a few random pieces changed, moved, doubled or lost."""
    def like(piece):
        return piece.encode() if isinstance(text, bytes) else piece

    for _ in range(rng.randint(1, 3)):
        a = rng.randrange(len(text) + 1)
        b = min(len(text), a + rng.choice([1, 1, 2, 5, 20]))
        text = rng.choice([text[:a] + like(rng.choice(VALUES)) + text[b:], text[:a] + text[b:],
                           text[:b] + text[a:b] + text[b:], text[:a] + text[b:] + text[a:b],
                           text[:a] + like(rng.choice("{}[]:,-#&*!|>'\"%@` \n\t01")) + text[b:]])
    return text


@pytest.mark.parametrize("count", COUNTS)
def test_no_mutation_of_configs_or_overrides_gives_a_traceback(here, capsys, monkeypatch, count):
    """--dry-run reads, checks and builds every model, on no memory; every tenth time it runs them too."""
    rng, good, cost = random.Random(1), 0, models.cost

    def built(config, stage):
        role = {"incubate": "teacher", "distill": "student"}.get(stage, stage)
        with torch.device("meta"):
            return models.count(models.build(models.on_target(config, role), role)), 0, 0

    texts = [CONFIG] + [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    for k in range(count):
        words = []
        if k % 2:
            text = mutate(rng.choice(texts), rng)
            (here / "c.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
        else:
            (here / "c.yaml").write_text(CONFIG)
            words = rng.choices(list(models.KEYS), k=rng.randint(1, 2))
            words = [f"{word}={rng.choice(VALUES)}" for word in words]
            words = [mutate(word, rng) if rng.random() < 0.3 else word for word in words]
        words = [w for w in words if not w.startswith("-")]
        monkeypatch.setattr(models, "cost", built if k % 10 else cost)
        try:
            code = command("finetune", "--config", "c.yaml", "--dry-run", *words)
        except Exception as e:
            raise AssertionError((k, words, (here / "c.yaml").read_bytes() if k % 2 else "")) from e
        error = capsys.readouterr().err
        assert code == 0 or code == 2 and one_sentence(error), (k, words, code)
        good += code == 0
    assert 0.02 * count < good < 0.9 * count  # the mutations are neither all harmless nor all fatal


def allowed(call, *args):
    """What a call returns; None if it refuses with one sentence that names the file."""
    try:
        return call(*args)
    except models.UserError as e:
        assert "m.pt" in str(e) and "\n" not in str(e), e


def same(a, b):
    """Whether two contents of checkpoints are equal."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("count", COUNTS)
def test_no_mutation_of_a_checkpoints_bytes_gives_a_traceback_or_others(here, meta, monkeypatch, count):
    """Of finished files and of unfinished ones. Those are read whole, so nothing in them can have changed."""
    rng, path = random.Random(2), here / "runs/c/m.pt"
    unfinished = cut_off(here, monkeypatch, "finetune", "meta").read_bytes()
    config = models.load_config("c.yaml")
    model = models.build(config, "meta")
    for good in (meta, unfinished):
        path.write_bytes(good)
        content, refusals = models.read(path), 0
        for k in range(count):
            path.write_bytes(mutate(good, rng))
            read = allowed(models.read, path)
            assert read is None or same(read, content), k
            refusals += read is None
            if good is meta:
                allowed(models.finished, config, "meta", "m.pt")
                allowed(models.load_weights, model, path)
                assert read is None or same(dict(model.state_dict()), content["model"]), k
        assert refusals > count / 2


def pieces(content, place=()):
    """The places of all values within nested dicts."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (*place, key)
        yield from pieces(value, (*place, key))


def mutate_content(content, rng):
    """Drops a piece of a checkpoint, or changes its type or its shape -> its place."""
    *place, last = rng.choice(list(pieces(content)))
    for key in place:
        content = content[key]
    value, kind = content[last], rng.choice(["drop", "type", "shape", "shape"])
    if kind == "shape" and isinstance(value, torch.Tensor):
        content[last] = rng.choice([
            value[None], value.flatten(), value.ravel()[:1], torch.cat([value.ravel()] * 2), value.long(),
            value.transpose(0, -1), value.to_sparse(), value.ravel()[:0], value.to(torch.complex64)])
    elif kind == "drop":
        del content[last]
    else:
        content[last] = rng.choice([None, True, 3, -1, 0.5, "text", "", [], [[]], {}, {"a": 1}, {1: {}},
                                    10**30, torch.ones(()), torch.ones(2, 3)])
    return *place, last


@pytest.mark.parametrize("count", COUNTS)
def test_no_mutation_of_a_checkpoints_weights_gives_a_traceback_or_another_model(here, meta, count):
    rng, path, refusals = random.Random(3), here / "m.pt", 0
    model = models.build(models.load_config("c.yaml"), "meta")
    good = torch.load(io.BytesIO(meta), weights_only=True)["model"]
    for k in range(count):
        content = {"model": torch.load(io.BytesIO(meta), weights_only=True)["model"]}
        place = mutate_content(content, rng)
        if place[-1] == "pos_embed":
            continue  # tested above
        torch.save(content, path)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            models.load_weights(model, path)
            changed = content["model"].get(place[-1]) if len(place) > 1 else None
            assert isinstance(changed, torch.Tensor) and changed.shape == good[place[-1]].shape, (k, place)
        except models.UserError as e:
            assert "m.pt" in str(e) and "\n" not in str(e), (k, place, e)
            assert same(before, dict(model.state_dict())), (k, place)  # nothing was changed
            refusals += 1
    assert refusals > count / 2
