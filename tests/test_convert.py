"""Promises of tools/convert.py: what weights from elsewhere mean is kept, and what does not fit is named.

A converted ViT must give the logits of models.ViT with the weights of the file. (test_fixtures.py shows that
these names and logits are the original's.) The authors' layouts are made from the fixtures, their own tensors
and names, in the folders and wrappings that were released. A converted file counts as its stage's result.
"""

import argparse
import os
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import data
import models
from conftest import Trap, fixture, one_sentence, run_main, write_npz
from tools import convert

CLASSES = 5
NAMES = ["ant", "bee", "cat", "dog", "elk"]

# ---------- A ViT's weights under timm's names, and its logits


def vit(depth=4, width=24, size=16, classes=CLASSES):
    return models.ViT(size, 4, width, 3, [depth], classes)


def small(change=lambda state: None, dtype=torch.float32, seed=0, **sizes):
    """A small state dict, after change(state). Its weights are random, so that every one of them matters."""
    torch.manual_seed(seed)
    state = {name: (value + 0.2 * torch.randn_like(value)).to(dtype)
             for name, value in vit(**sizes).state_dict().items()}
    change(state)
    return state


@torch.no_grad()
def check(file, state, **sizes):
    """A converted model's logits are those of the state dict."""
    expected, size = vit(**sizes), sizes.get("size", 16)
    expected.load_state_dict(state)
    images = torch.randn(3, 3, size, size)
    torch.testing.assert_close(models.load(file)(images), expected(images), rtol=1e-5, atol=1e-5)


def modules(state, depths=(1, 1, 1, 1)):
    """The state dicts of the modules, each module's blocks numbered from 0."""
    own = [{} for _ in depths]
    own[0] = {name: value for name, value in state.items() if name.startswith(("cls", "pos", "patch"))}
    starts = [sum(depths[:i]) for i in range(len(depths))]
    for i, (start, depth) in enumerate(zip(starts, depths)):
        for k in range(depth):
            old = f"blocks.{start + k}."
            for name in [name for name in state if name.startswith(old)]:
                own[i][f"blocks.{k}.{name[len(old):]}"] = state[name]
    own[-1] |= {name: value for name, value in state.items() if name.startswith(("norm", "head"))}
    return own


# ---------- Runs

VIT = dict(patch=4, width=24, heads=3, depths=[1, 1, 1, 1])
VMOE = dict(VIT, kind="vmoe", width=12, heads=2, experts=4)
NAC = dict(kind="nac", width=24, heads=2, mlp_ratio=2, head_width=8, latents=[6, 12, 4], propagators=2,
           code_width=16, signature_width=8, tokenizer_blocks=1, grid_width=4, grid_size=2)
# The single modules of the fixtures are of three-module models, as wide as their meta model.
THREE = dict(patch=4, width=16, heads=2, depths=[1, 1, 1])
STAGES = ("meta", "incubate", "teacher", "distill", "student")


def config_file(folder, student=NAC, meta=VIT, names=NAMES, size=16, **changes):
    """Writes the config of a run that lives in `folder`, and its images -> the path of the YAML."""
    root = write_npz(folder / "set.npz", classes=names, train=40, test=12, size=size)
    config = {
        "seed": 3, "device": "cpu", "precision": "float32", "output_dir": str(folder / "run"),
        "meta": meta, "teacher": dict(meta),
        "data": {"root": str(root), "image_size": size, "workers": 0, "validation_images": 8},
        "student": student, "assemble": {"graph_groups": 2},
        "train": {stage: dict(epochs=1, batch=16, lr=0.01) for stage in STAGES}, **changes}
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def run(capsys):
    """Runs a script in this process -> what it printed."""
    def run(script, path, *words, expect=0):
        data.note.cache_clear()
        code = run_main(script, "--config", path, *words)
        text = "".join(capsys.readouterr())
        assert code == expect, text
        return one_sentence(text) if expect else text
    return run


@pytest.fixture
def bring(run):
    """Runs tools/convert.py -> what it printed."""
    return lambda *args, **more: run("tools/convert", *args, **more)


@pytest.fixture
def teacher(tmp_path, bring):
    """Converts a checkpoint's content into a small teacher -> its file; or the error with expect=2."""
    def teacher(content, *words, target="teacher", expect=0):
        torch.save(content, tmp_path / "w.pth")
        path = config_file(tmp_path)
        text = bring(path, f"{target}={tmp_path}/w.pth", *words, expect=expect)
        file = tmp_path / f"run/{target}.pt"
        assert file.exists() == (not expect)
        return text if expect else file
    return teacher


def weights(file):
    return models.read(file)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------- Checkpoints as people have them


def deep_incubation(state):
    parts = modules(state)
    doubles = {f"stages.{i}.{name}": value for i, part in enumerate(parts) for name, value in part.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    return {"model": {**doubles, **state}, "model_stages": parts, "epoch": 99, "optimizer": optimizer,
            "lr_scheduler": {"base": [0.1]}}


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPINGS = {
    "a state dict": lambda s: s, "model": lambda s: {"model": s}, "state_dict": lambda s: {"state_dict": s},
    "with an epoch": lambda s: {"model": s, "epoch": 3}, "Deep Incubation": deep_incubation,
    "data parallel": lambda s: {"model": prefixed("module.", s)},
    "Deep Incubation, data parallel": lambda s: {"model": prefixed("module.", deep_incubation(s)["model"])},
    "DDP around compile": lambda s: {"model": prefixed("module._orig_mod.", s)},
    "compile around DDP": lambda s: {"state_dict": prefixed("_orig_mod.module.", s)},
    "a LightningModule": lambda s: {"state_dict": prefixed("model.", s), "hyper_parameters": {"lr": 1}},
    "DeepSpeed": lambda s: {"module": s}, "a trainer in a trainer": lambda s: {"state_dict": {"model": s},
                                                                               "config": "a.yaml"},
    "arguments and numpy numbers": lambda s: {
        "model": s, "args": argparse.Namespace(lr=np.float64(0.1), n=np.int64(3)), "best": np.float32(81.5)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_gives_the_state_dicts_logits(teacher, wrapping):
    state = small()
    check(teacher(WRAPPINGS[wrapping](state)), state)


def test_what_is_brought_and_what_is_assumed_is_said(tmp_path, bring):
    torch.save(small(), tmp_path / "w.pth")
    text = bring(config_file(tmp_path), f"teacher={tmp_path}/w.pth")
    assert f"run/teacher.pt: from {models.about(tmp_path / 'run/teacher.pt')['imported']}" in text
    assert "fresh: none" in text and "assumed: teacher.heads=3 teacher.eps=1e-06\n" in text


@pytest.mark.parametrize("old, new, dtype", [(16, 32, torch.float32), (32, 16, torch.float16),
                                             (28, 16, torch.float64), (16, 16, torch.bfloat16)])
def test_weights_of_another_image_size_give_the_logits_of_the_resized_grid(teacher, old, new, dtype):
    state = small(size=old, dtype=dtype)
    file = teacher(state, f"data.image_size={new}")
    state = {name: value.float() for name, value in state.items()}
    grid = state["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (old // 4, old // 4))  # 1 D rows columns
    grid = F.interpolate(grid, (new // 4, new // 4), mode="bicubic").flatten(2).transpose(1, 2)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid], 1)
    check(file, state, size=new)


def test_an_entry_of_a_file_is_read_on_request_also_beside_a_number_sign(tmp_path, bring, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    plain, ema = small(), small(seed=1)
    (tmp_path / "a #3").mkdir()
    torch.save({"model": plain, "model_ema": ema}, tmp_path / "a #3/b#c.pth")
    path = config_file(tmp_path)
    bring(path, "teacher=~/a #3/b#c.pth#model_ema", f"meta={tmp_path}/a #3/b#c.pth")
    assert same(weights(tmp_path / "run/teacher.pt"), ema) and same(weights(tmp_path / "run/meta.pt"), plain)
    names = [models.about(tmp_path / f"run/{role}.pt")["imported"] for role in ("teacher", "meta")]
    assert names[0].startswith("b#c.pth#model_ema ") and names[1].startswith("b#c.pth ")
    assert "no ema, but model, model_ema" in bring(path, f"teacher={tmp_path}/a #3/b#c.pth#ema", expect=2)


def test_safetensors_are_read_where_the_package_is(tmp_path, bring):
    safetensors = pytest.importorskip("safetensors.torch")
    state = small()
    safetensors.save_file(state, str(tmp_path / "w.safetensors"))
    bring(config_file(tmp_path), f"teacher={tmp_path}/w.safetensors")
    assert same(weights(tmp_path / "run/teacher.pt"), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_by_the_name_of_its_type(tmp_path, bring, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": small(), "x": Trap()}, "w.pth", _use_new_zipfile_serialization=zipped)
    text = bring(config_file(tmp_path), "teacher=w.pth", expect=2)
    assert "system, which could run code" in text and "weights_only" not in text and "\x1b" not in text, text
    assert not (tmp_path / "pwned").exists()


def test_files_that_are_cut_short_damaged_or_none_are_named(tmp_path, bring):
    path, file = config_file(tmp_path), tmp_path / "w.pth"
    torch.save(small(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:5000])  # a download that broke off
    text = bring(path, f"teacher={file}", expect=2)
    assert "w.pth is not a checkpoint that can be read" in text and "miniz" not in text
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data/0", b"weights")
    file.write_bytes(file.read_bytes().replace(b"weights", b"weighty"))
    assert "checksum of its record data/0 is wrong" in bring(path, f"teacher={file}", expect=2)
    file.write_text("<html>404</html>")
    assert "w.pth is not a checkpoint that can be read" in bring(path, f"teacher={file}", expect=2)
    assert "no.pth" in bring(path, f"teacher={tmp_path}/no.pth", expect=2)
    for content, words in (({"network": small(), "step": 3}, "the entry network is not"), ([1], "a list"),
                           ({**small(), "_extra_state": None}, "the entry _extra_state is not a tensor of"),
                           ({**small(), "index": torch.arange(4)}, "index is not a tensor of float"),
                           ({**small(), "module.cls_token": torch.zeros(1, 1, 8)}, "are called cls_token"),
                           ({**small(), "pos_embed": torch.zeros(5)}, "pos_embed is (5,)")):
        torch.save(content, file)
        assert words in bring(path, f"teacher={file}", expect=2)
    assert not (tmp_path / "run").exists()


# ---------- What does not fit


def put(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})


def drop(part):
    return lambda state: [state.pop(name) for name in list(state) if part in name]


def distilled(state):
    """DeiT's distilled models: a second token, with a place and a head of its own."""
    state |= {"dist_token": torch.zeros(1, 1, 24), "head_dist.weight": torch.zeros(CLASSES, 24),
              "head_dist.bias": torch.zeros(CLASSES), "pos_embed": torch.zeros(1, 18, 24)}


def pooled(state):
    for kind in ("weight", "bias"):
        state[f"fc_norm.{kind}"] = state.pop(f"norm.{kind}")


WRONG = {  # what is wrong with the file -> (change, what the sentence must name)
    "a distilled DeiT": (distilled, ["dist"]),
    "LayerScale": (put("blocks.1.ls1.gamma", 24), ["an unexpected tensor blocks.1.ls1.gamma (24,)"]),
    "registers": (put("reg_token", 1, 4, 24), ["an unexpected tensor reg_token (1, 4, 24)"]),
    "a norm after pooling": (pooled, ["lacks the tensor norm.weight"]),
    "one block too few": (drop("blocks.3."), ["lacks the tensor blocks.3.norm1.weight (24,)"]),
    "no qkv bias": (drop("qkv.bias"), ["lacks the tensor blocks.0.attn.qkv.bias (72,)"]),
    "other classes": (lambda s: s.update(small(classes=1000)),
                      ["head.weight, head.bias would start fresh", "teacher_assembled="]),
    "no head": (drop("head."), ["lacks the tensor head.weight (5, 24)"]),
    "another width": (lambda s: s.update(small(width=48)),
                      ["cls_token is (1, 1, 48), the model's (1, 1, 24)"]),
    "a grid that is no square": (put("pos_embed", 1, 13, 24),
                                 ["pos_embed is (1, 13, 24), the model's (1, 17, 24)"]),
    "weights that are not finite": (lambda s: s["blocks.2.mlp.fc1.bias"].fill_(torch.nan),
                                    ["blocks.2.mlp.fc1.bias is not finite"]),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("wrapping", ["a state dict", "Deep Incubation"])
def test_what_does_not_fit_is_named_in_one_sentence(teacher, wrong, wrapping):
    change, words = WRONG[wrong]
    text = teacher(WRAPPINGS[wrapping](small(change)), expect=2)
    assert "w.pth" in text and all(word in text for word in words), text


def test_experts_of_another_number_or_shape_are_named(tmp_path, bring):
    """The original has a tensor per expert, htoh4 (1, H, D) and h4toh (1, D, H); ours are stacked."""
    state, path = fixture("vmoe")["model"], config_file(tmp_path, dict(VMOE, depths=[1, 1, 1]), THREE)
    torch.save(state, tmp_path / "w.pth")
    text = bring(path, f"student={tmp_path}/w.pth", "student.experts=3", expect=2)
    assert "fc1_weight is (4, 48, 12), the model's (3, 48, 12)" in text
    state["blocks.1.moe.experts.1.htoh4.weight"] = torch.zeros(1, 5, 12)
    torch.save(state, tmp_path / "w.pth")
    text = bring(path, f"student={tmp_path}/w.pth", expect=2)
    assert "lacks the tensor blocks.1.moe.fc1_weight (4, 48, 12)" in text


# ---------- Modules in folders


def save_modules(folder, states):
    """Saves state dicts as the authors' teacher modules."""
    folder.mkdir(exist_ok=True)
    for i, state in enumerate(states):
        torch.save({"model_name": "deit_tiny", "block_index": i, "block_state_dict": state},
                   folder / f"deit_{i}.pth")


@pytest.mark.parametrize("depths", [(1, 1, 1, 1), (2, 1, 3, 2)])
def test_the_authors_teacher_modules_give_the_whole_teachers_logits(tmp_path, bring, depths):
    state = small(depth=sum(depths))
    own = modules(state, depths)
    own[1] = prefixed("module.", own[1])  # saved from DistributedDataParallel
    save_modules(tmp_path / "m", own)
    path, words = config_file(tmp_path), [f"teacher.depths={list(depths)}".replace(" ", "")]
    text = bring(path, *words, f"teacher={tmp_path}/m", f"teacher_modules={tmp_path}/m")
    assert text.count("assumed:") == 1
    check(tmp_path / "run/teacher.pt", state, depth=sum(depths))
    assert models.about(tmp_path / "run/teacher.pt")["imported"].startswith("m ")
    for i in range(4):
        file = tmp_path / f"run/teacher_modules/{i}.pt"
        assert same(weights(file), modules(state, depths)[i])
        assert models.about(file)["imported"].startswith(f"deit_{i}.pth ")
    (tmp_path / "m/deit_1.pth").unlink()
    text = bring(path, *words, f"teacher={tmp_path}/m", expect=2)
    assert "modules 0 to 3, but it holds ['deit_0', 'deit_2', 'deit_3']" in text


def test_a_single_module_is_not_read_as_another_one_or_as_the_whole(tmp_path, bring):
    first, second, *rest = modules(small())
    path = config_file(tmp_path)
    save_modules(tmp_path / "m", [second, first, *rest])
    assert "deit_0.pth lacks the tensor cls_token" in bring(path, f"teacher={tmp_path}/m", expect=2)
    save_modules(tmp_path / "m", [first, first, *rest])
    text = bring(path, f"teacher_modules={tmp_path}/m", expect=2)
    assert "deit_1.pth has an unexpected tensor cls_token" in text
    text = bring(path, f"teacher={tmp_path}/m/deit_0.pth", expect=2)
    assert "lacks the tensor blocks.1.norm1.weight" in text
    assert "modules 0 to 3" in bring(path, f"student_modules={tmp_path}/m/deit_0.pth", expect=2)
    assert not (tmp_path / "run").exists()


def test_other_files_beside_the_modules_are_no_modules_and_two_of_a_number_are_refused(tmp_path):
    for name in ("vit_large_patch16_224_0", "vit_large_patch16_224_1", "finished_checkpoint", "checkpoint-98",
                 "optimizer", "vit_large_patch16_224", "1.unfinished"):
        (tmp_path / f"{name}.pth").touch()
    (tmp_path / "0.pt.1234abc9.tmp").touch()
    files = convert.module_files(tmp_path, 2)
    assert [file.name for file in files] == ["vit_large_patch16_224_0.pth", "vit_large_patch16_224_1.pth"]
    for i in range(2):
        (tmp_path / f"old_{i}").mkdir()
        (tmp_path / f"old_{i}/finished_checkpoint.pth").touch()
    with pytest.raises(models.UserError, match="modules 0 to 1, but it holds .*old_1"):
        convert.module_files(tmp_path, 2)
    released = tmp_path / "nac"
    released.mkdir()
    for name in ("ReadInStudent", "MediatorStudent_1", "MediatorStudent_2", "ReadOutStudent"):
        (released / f"{name}.pth").touch()
    first = [file.stem[:5] for file in convert.module_files(released, 4)]
    assert first == ["ReadI", "Media", "Media", "ReadO"]
    with pytest.raises(models.UserError, match="modules 0 to 2"):  # a config with a propagator less
        convert.module_files(released, 3)


# ---------- What the authors released, made from the fixtures

WRAPPER = {"model_stages": [{}], "optimizer": {"state": {}}, "lr_scheduler": {"base_lrs": [0.1]}, "epoch": 99,
           "scaler": {}}
RELEASED = {"read_in": "ReadInStudent", "mediator": "MediatorStudent_1", "read_out": "ReadOutStudent"}


def stages(path, *words):
    return models.stages(models.load_config(path, words))


@pytest.mark.parametrize("stitches", ["drop", "keep", "fold"])
def test_the_released_nac_modules_are_assembled_fine_tuned_and_scored(tmp_path, bring, run, stitches):
    states = [fixture("m2mkd_nac")["students"][key]["state_dict"] for key in RELEASED]
    (tmp_path / "modules").mkdir()
    for state, name in zip(states, RELEASED.values()):
        torch.save({"model": state, **WRAPPER}, tmp_path / f"modules/{name}.pth")
    path = config_file(tmp_path, dict(NAC, propagators=1), THREE, distill={"codes": "original"},
                       assemble={"stitches": stitches, "graph_groups": 2})
    text = bring(path, "distill.codes=own", f"student_modules={tmp_path}/modules", expect=2)
    assert "ReadInStudent.pth lacks the tensor body.latents.codes (6, 16)" in text
    text = bring(path, f"student_modules={tmp_path}/modules")
    assert text.count("fresh: none") == 3
    assert "student_modules/1.pt: from MediatorStudent_1.pth" in text
    assert text.count("assumed: student.heads=2 student.head_width=8\n") == 1
    assert stages(path) == ["assemble_student", "student", "baseline"]
    assert "mediator_latents.codes" in run("assemble", path)  # original codes are not in the files
    whole = weights(tmp_path / "run/student_assembled.pt")
    for i, theirs, ours in (
            (0, "tokenizer.positional_grid.grid", "tokenizer.grid"),
            (0, "read_in.read_in_attention.key_compiler.native_weight", "read_in.attention.key.weight"),
            (1, "latent_attention.query_compiler.native_weight", "propagators.0.attention.query.weight"),
            (1, "ffn.ffn.0.scale.weight", "propagators.0.ffn.fc1.scale.weight"),
            (2, "latent_attention.sender_layernorm.bias", "read_out.attention.sender_norm.bias"),
            (2, "tokenizer.to_logits.weight", "pool.to_logits.weight")):
        assert torch.equal(whole[ours], states[i][theirs].float()), ours
    if stitches == "fold":
        pre, post = states[1]["pre_stitch.weight"], states[0]["post_stitch.weight"]
        torch.testing.assert_close(whole["stitches.0.weight"], pre @ post)
    run("finetune", path)
    run("evaluate", path)
    assert stages(path) == ["baseline"] and not (tmp_path / "run/meta.pt").exists()


@pytest.mark.parametrize("name", ["nac_full", "vmoe", "stitched vmoe"])
def test_whole_models_of_the_authors_give_their_logits(tmp_path, bring, name):
    f = fixture(name.split()[-1])
    expected = f["stitched"] if "stitched" in name else f
    student, meta = (NAC, VIT) if name == "nac_full" else (dict(VMOE, depths=[1, 1, 1]), THREE)
    stitches = "keep" if "stitched" in name else "drop"
    path = config_file(tmp_path, student, meta, assemble={"stitches": stitches, "graph_groups": 2})
    torch.save({"model": expected.get("state_dict", expected.get("model"))}, tmp_path / "w.pth")
    text = bring(path, f"student={tmp_path}/w.pth", f"student_assembled={tmp_path}/w.pth")
    assert text.count("fresh: none") == 2
    logits = models.load(tmp_path / "run/student.pt")(f["images"].float()).double()
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)
    assert stages(path) == ["baseline"]


# ---------- Ours: from one run to another, with other classes or image sizes


def initial(path, role):
    """Writes a role's initial weights as a finished file of the run -> the file."""
    config = models.load_config(path)
    state, names = models.build(config, role).state_dict(), data.class_names(config["data"])
    models.save_finished(config, role, f"{role}.pt", state, names)
    return f"{config['output_dir']}/{role}.pt"


@pytest.mark.parametrize("student, classifier, grid", [
    (dict(NAC, grid_size=None), ["pool.to_logits.weight", "pool.to_logits.bias"], ["tokenizer.grid"]),
    (VMOE, ["head.weight", "head.bias"], [])])
def test_a_whole_student_is_carried_to_other_classes_and_another_size(tmp_path, bring, student, classifier,
                                                                      grid):
    file = initial(config_file(tmp_path / "a", student), "student")
    other = ["fox", *NAMES[1:]]  # as many, but others
    for names, size, fresh in ((NAMES, 16, []), (NAMES[:3], 16, classifier), (other, 16, classifier),
                               (NAMES, 24, grid), (other, 24, [*classifier, *grid])):
        path = config_file(tmp_path / "b", student, names=names, size=size, seed=8)
        text = bring(path, f"student_assembled={file}")
        assert set(text.strip().split("fresh: ")[1].split(", ")) == set(fresh or ["none"])
        assert "assumed" not in text
        config = models.load_config(path)
        old, new = weights(file), weights(tmp_path / "b/run/student_assembled.pt")
        started = models.build(config, "student").state_dict()
        for name, value in new.items():
            if name != "pos_embed":
                assert torch.equal(value, (started if name in fresh else old)[name]), name
        assert models.about(tmp_path / "b/run/student_assembled.pt")["class_names"] == names
        if fresh:  # no training follows a finished student, so nothing of it may be
            bring(path, f"student={file}", expect=2)
    assert stages(path) == ["student", "baseline"]


def test_a_pretrained_vit_becomes_the_teacher_with_a_fresh_classifier(tmp_path, bring, run):
    for classes in (1000, CLASSES):  # of as many classes, too: a foreign file does not name them
        pretrained = small(classes=classes)
        torch.save({"state_dict": pretrained}, tmp_path / "timm.pth")
        path = config_file(tmp_path)
        text = bring(path, f"teacher_assembled={tmp_path}/timm.pth")
        assert "fresh: head.weight, head.bias" in text
        new = weights(tmp_path / "run/teacher_assembled.pt")
        fresh = models.build(models.load_config(path), "teacher").state_dict()
        assert all(torch.equal(new[name], (fresh if "head" in name else pretrained)[name]) for name in new)
    assert stages(path) == ["meta", "teacher", "distill", "assemble_student", "student", "baseline"]
    run("finetune", path, "role=teacher")
    # Ours names its classes, so the same classes keep their classifier.
    other = config_file(tmp_path / "b")
    word = f"teacher_assembled={tmp_path}/run/teacher.pt"
    assert "fresh: none" in bring(other, word)
    assert same(weights(tmp_path / "b/run/teacher_assembled.pt"), weights(tmp_path / "run/teacher.pt"))
    other = config_file(tmp_path / "c", names=NAMES[::-1])
    assert "fresh: head.weight, head.bias" in bring(other, word)
    text = bring(other, f"teacher={tmp_path}/run/teacher.pt", expect=2)
    assert "head.weight, head.bias would start fresh" in text and "teacher_assembled=" in text


def test_modules_of_one_run_serve_another_on_other_classes_and_sizes(tmp_path, bring, run):
    path = config_file(tmp_path / "a", VMOE, distill={"alpha": 0})
    run("finetune", path, "role=meta")
    run("distill_module", path)
    folder = tmp_path / "a/run/student_modules"
    other = config_file(tmp_path / "b", VMOE, names=NAMES[2:], size=24)
    text = bring(other, f"student_modules={folder}")
    assert text.count("fresh: none") == 3 and "3.pt: from 3.pt" in text
    assert "fresh: body.head.weight, body.head.bias\n" in text
    assert stages(other) == ["assemble_student", "student", "baseline"]
    run("assemble", other)
    whole = weights(tmp_path / "b/run/student_assembled.pt")
    assert torch.equal(whole["blocks.2.attn.qkv.weight"],
                       weights(folder / "2.pt")["body.blocks.0.attn.qkv.weight"])
    assert whole["pos_embed"].shape == (1, 37, 12) and whole["head.weight"].shape == (3, 12)
    # An assembled student names its classes, too.
    run("assemble", path)
    third = config_file(tmp_path / "c", VMOE)
    assert "fresh: none" in bring(third, f"student_assembled={tmp_path}/a/run/student_assembled.pt")
    assert models.about(tmp_path / "c/run/student_assembled.pt")["class_names"] == NAMES


@pytest.mark.parametrize("student, words, names", [
    (VMOE, ["student.heads=3"], "was made with heads=2, but student.heads=3"),
    (VMOE, ["student.eps=1e-5"], "was made with eps=1e-06, but student.eps=1e-05"),
    (VMOE, ["student.top_k=1"], "was made with top_k=2, but student.top_k=1"),
    (NAC, ["student.heads=4", "student.head_width=4"], "was made with heads=2, but student.heads=4"),
])
def test_options_that_shapes_do_not_show_must_agree_with_ours(tmp_path, bring, run, student, words, names):
    file = initial(config_file(tmp_path / "a", student), "student")
    path = config_file(tmp_path / "b", student)
    assert names in bring(path, f"student={file}", *words, expect=2)
    bring(path, f"student={file}")
    key = words[0].partition("=")[0]  # and so must an evaluation
    assert f"{key} was " in run("evaluate", path, *words, expect=2)


def test_a_file_that_tells_its_mean_and_std_must_agree_with_the_config(tmp_path, bring, teacher):
    told = {"mean": (0.5, 0.5, 0.5), "std": (0.4, 0.4, 0.4)}
    content = {"state_dict": small(), "pretrained_cfg": told}
    text = teacher(content, expect=2)
    assert "wants images with data.mean=(0.5, 0.5, 0.5) data.std=(0.4, 0.4, 0.4)" in text
    teacher(content, "data.mean=half", "data.std=[0.4,0.4,0.4]")
    for cfg in (None, {"mean": "foo", "std": 1}):  # what is no number is no news
        teacher({**content, "pretrained_cfg": cfg, "stage": "teacher"})
    file = initial(config_file(tmp_path / "a", data={"classes": 5, "image_size": 16, "mean": "half",
                                                     "root": str(tmp_path / "a/set.npz")}), "meta")
    assert "data.mean=half data.std=imagenet" in bring(config_file(tmp_path / "b"), f"meta={file}", expect=2)
    bring(config_file(tmp_path / "b"), f"meta={file}", "data.mean=[0.5,0.5,0.5]")


# ---------- A converted file in its run


def test_what_is_built_on_a_converted_file_remembers_its_checksum(tmp_path, bring, run):
    torch.save(small(), tmp_path / "w.pth")
    path = config_file(tmp_path, VMOE)
    bring(path, f"meta={tmp_path}/w.pth", f"teacher={tmp_path}/w.pth")
    assert stages(path) == ["distill", "assemble_student", "student", "baseline"]
    # A training key of what was not trained here changes nothing.
    assert stages(path, "train.meta.lr=0.5", "train.incubate.epochs=7") == stages(path)
    run("distill_module", path)
    imported = models.about(tmp_path / "run/teacher.pt")["imported"]
    settings = models.about(tmp_path / "run/student_modules/0.pt")["settings"]
    assert settings["teacher.pt"] == settings["meta.pt"] == imported and "train.meta.lr" not in settings
    assert stages(path) == ["assemble_student", "student", "baseline"]
    # The same file elsewhere is the same setting, another one is another.
    (tmp_path / "moved").mkdir()
    os.rename(tmp_path / "w.pth", tmp_path / "moved/w.pth")
    bring(path, f"teacher={tmp_path}/moved/w.pth")
    assert stages(path) == ["assemble_student", "student", "baseline"]
    torch.save(small(seed=1), tmp_path / "w.pth")
    bring(path, f"teacher={tmp_path}/w.pth")
    text = run("distill_module", path, expect=2)
    assert f"teacher.pt was '{imported}'" in text


def test_a_trained_result_is_not_replaced_and_nothing_is_written_if_a_file_does_not_fit(tmp_path, bring, run):
    torch.save(small(), tmp_path / "w.pth")
    torch.save(small(drop("head.")), tmp_path / "v.pth")
    path = config_file(tmp_path)
    bring(path, f"teacher={tmp_path}/w.pth", f"meta={tmp_path}/v.pth", expect=2)
    assert not (tmp_path / "run").exists()
    run("finetune", path, "role=meta")
    before = (tmp_path / "run/meta.pt").read_bytes()
    text = bring(path, f"meta={tmp_path}/w.pth", expect=2)
    assert "meta.pt was made by training: remove it or choose another output_dir" in text
    assert (tmp_path / "run/meta.pt").read_bytes() == before
    bring(path, f"teacher={tmp_path}/w.pth")
    torch.save(small(seed=1), tmp_path / "w.pth")
    bring(path, f"teacher={tmp_path}/w.pth")
    assert same(weights(tmp_path / "run/teacher.pt"), small(seed=1))
    assert "output_dir" in (tmp_path / "run/config.yaml").read_text()


def test_names_that_begin_with_fresh_stay_as_initialized(tmp_path, bring):
    state = small()
    torch.save(state, tmp_path / "w.pth")
    path = config_file(tmp_path)
    text = bring(path, f"teacher_assembled={tmp_path}/w.pth", "fresh=blocks.3.mlp,cls")
    fresh = {"cls_token", "head.weight", "head.bias",
             *(f"blocks.3.mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))}
    assert {*text.partition("fresh: ")[2].splitlines()[0].split(", ")} == fresh
    new = weights(tmp_path / "run/teacher_assembled.pt")
    started = models.build(models.load_config(path), "teacher").state_dict()
    assert same(new, {name: started[name] if name in fresh else state[name] for name in new})
    # What is fresh need not be in the file.
    save_modules(tmp_path / "m", modules(small(drop("norm2"))))
    text = bring(path, f"teacher_modules={tmp_path}/m", "fresh=blocks.0.norm2")
    assert text.count("fresh: blocks.0.norm2.weight, blocks.0.norm2.bias\n") == 4


def test_without_data_classes_are_numbers_and_an_option_is_needed(tmp_path, bring):
    torch.save(small(), tmp_path / "w.pth")
    path = config_file(tmp_path, data={"root": "gone.npz", "classes": 5, "image_size": 16})
    bring(path, f"teacher={tmp_path}/w.pth")
    assert models.load(tmp_path / "run/teacher.pt").class_names == ["0", "1", "2", "3", "4"]
    assert "give one of meta, teacher" in bring(config_file(tmp_path), expect=2)
