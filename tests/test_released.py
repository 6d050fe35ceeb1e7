"""Weights from elsewhere: the layouts that the authors and others released are read where they belong.

The files are made here from the fixtures (the original's own tensors and names), in the folders and wrappings
that were released. What is read is compared tensor by tensor; what would run code is refused by the name of
its type.
"""

import argparse
import os

import numpy as np
import pytest
import torch
import yaml

import models
from conftest import FIXTURES
from test_runs import CONFIG, STAGE, run, weights, write_config

WRAPPER = {"model_stages": [{}], "optimizer": {"state": {}}, "lr_scheduler": {"base_lrs": [0.1]}, "epoch": 99,
           "scaler": {}}
VIT = dict(patch=4, width=16, heads=2, mlp_ratio=4, depths=[1, 1, 1])
SMALL = {  # the sizes of the fixtures
    "seed": 3, "device": "cpu", "data": {**CONFIG["data"], "classes": 5, "mixup": 0, "cutmix": 0},
    "meta": dict(VIT), "teacher": dict(VIT, depths=[1, 1, 1]), "distill": {"codes": "original"},
    "train": {stage: dict(STAGE, epochs=1) for stage in CONFIG["train"]}}
NAC = dict(kind="nac", width=24, heads=2, mlp_ratio=2, head_width=8, latents=[6, 12, 4], propagators=1,
           code_width=16, signature_width=8, tokenizer_blocks=1, grid_width=4, grid_size=2)
VMOE = dict(VIT, kind="vmoe", width=12, experts=4)


def fixture(name):
    return torch.load(FIXTURES / f"{name}.pt", weights_only=True)


def config_file(folder, student, **changes):
    config = {**SMALL, "student": student, "output_dir": str(folder / "run"), **changes}
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return folder / "c.yaml"


def nac_modules(folder):
    """The NAC's modules as released -> their state dicts."""
    students = fixture("m2mkd_nac")["students"]
    names = {"read_in": "ReadInStudent", "mediator": "MediatorStudent_1", "read_out": "ReadOutStudent"}
    folder.mkdir()
    for key, name in names.items():
        torch.save({"model": students[key]["state_dict"], **WRAPPER}, folder / f"{name}.pth")
    return [students[key]["state_dict"] for key in names]


def vmoe_modules(folder):
    """The V-MoE's modules as released, a folder each -> their state dicts."""
    students = fixture("m2mkd_vmoe")["students"]
    for i, student in enumerate(students):
        (folder / f"vmoe_base_{i}").mkdir(parents=True)
        # Deep Incubation's files hold each tensor a second time.
        twice = {f"stages.0.{name}": value for name, value in student["model"].items()}
        file = folder / f"vmoe_base_{i}/finished_checkpoint.pth"
        torch.save({"model": {**twice, **student["model"]}, **WRAPPER}, file)
    return [student["model"] for student in students]


@pytest.mark.parametrize("stitches", ["drop", "keep", "fold"])
def test_the_released_nac_modules_are_assembled_fine_tuned_and_scored(tmp_path, stitches):
    states = nac_modules(tmp_path / "modules")
    path = config_file(tmp_path, NAC, assemble={"stitches": stitches})
    word = f"student.modules={tmp_path / 'modules'}"
    text = run("assemble", path, word)
    # original codes are not in the files
    assert "fresh tensors:" in text and "mediator_latents.codes" in text
    whole = torch.load(tmp_path / "run/student_assembled.pt", weights_only=True)["model"]
    for name, value in states[1].items():  # the propagator's tensors
        ours = name.replace("latent_attention.", "attention.")
        if ours.endswith("query.weight"):
            assert torch.equal(whole[f"propagators.0.{ours}"], value)
            break
    parts = models.cut(models.build(models.load_config(path), "student"), models.load_config(path), "student")
    for i, (part, state) in enumerate(zip(parts, states)):
        models.load_state(part, state, "fixture")
        for name, value in part.body.state_dict().items():
            name = name if i != 1 else name.replace("propagator.", "propagators.0.")
            if "bandwidth" not in name:
                assert torch.equal(whole[name], value), name
    if stitches == "fold":
        pre, post = states[1]["pre_stitch.weight"], states[0]["post_stitch.weight"]
        torch.testing.assert_close(whole["stitches.0.weight"], pre @ post)
    run("finetune", path, word)
    run("evaluate", path, word)
    assert not (tmp_path / "run/meta.pt").exists()


def test_the_released_v_moe_modules_are_assembled_with_blocks_numbered_through(tmp_path):
    states = vmoe_modules(tmp_path / "modules")
    path = config_file(tmp_path, VMOE)
    run("assemble", path, f"student.modules={tmp_path / 'modules'}")
    whole = torch.load(tmp_path / "run/student_assembled.pt", weights_only=True)["model"]
    for i, state in enumerate(states):
        assert torch.equal(whole[f"blocks.{i}.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
        expert = state["blocks.0.moe.experts.2.htoh4.weight"][0]
        assert torch.equal(whole[f"blocks.{i}.moe.fc1_weight"][2], expert)
    run("finetune", path, f"student.modules={tmp_path / 'modules'}")


def test_our_own_modules_serve_another_run_and_the_folder_elsewhere_is_the_same_setting(tmp_path):
    path = write_config(tmp_path / "a", "vmoe", distill={"alpha": 0})
    run("finetune", path, "role=meta")
    run("distill_module", path)
    words = [f"output_dir={tmp_path / 'b'}", f"student.modules={tmp_path / 'a/run/student_modules'}"]
    run("assemble", path)
    run("assemble", path, *words)
    first, second = tmp_path / "a/run/student_assembled.pt", tmp_path / "b/student_assembled.pt"
    assert torch.equal(weights(first), weights(second))
    os.rename(tmp_path / "a/run/student_modules", tmp_path / "moved")
    words[1] = f"student.modules={tmp_path / 'moved'}"
    assert "skipped" in run("assemble", path, *words)
    file = tmp_path / "moved/0.pt"
    content = torch.load(file, weights_only=True)
    next(iter(content["model"].values())).mul_(2)
    torch.save(content, file)
    assert "student.modules was" in run("assemble", path, *words, expect=2)


def test_a_module_that_is_missing_or_does_not_fit_is_named_before_anything_trains(tmp_path):
    nac_modules(tmp_path / "modules")
    path = config_file(tmp_path, NAC)
    word = f"student.modules={tmp_path / 'modules'}"
    assert "stage" in run("finetune", path, "--dry-run", word)
    assert "student.width" not in run("finetune", path, "--dry-run", word, "student.code_width=12", expect=2)
    (tmp_path / "modules/MediatorStudent_1.pth").unlink()
    text = run("finetune", path, "--dry-run", word, expect=2)
    assert "modules 0 to 2" in text and "Traceback" not in text


def test_other_files_beside_the_modules_are_no_modules_and_two_of_a_number_are_refused(tmp_path):
    for name in ("vit_large_patch16_224_0", "vit_large_patch16_224_1", "finished_checkpoint", "checkpoint-98",
                 "optimizer", "vit_large_patch16_224", "1.unfinished"):
        (tmp_path / f"{name}.pth").touch()
    (tmp_path / "0.pt.1234abc9.tmp").touch()
    files = models.module_files(tmp_path, 2)
    assert [file.name for file in files] == ["vit_large_patch16_224_0.pth", "vit_large_patch16_224_1.pth"]
    for i in range(2):
        (tmp_path / f"old_{i}").mkdir()
        (tmp_path / f"old_{i}/finished_checkpoint.pth").touch()
    with pytest.raises(models.UserError, match="modules 0 to 1, but it holds .*old_1"):
        models.module_files(tmp_path, 2)
    released = tmp_path / "nac"
    released.mkdir()
    for name in ("ReadInStudent", "MediatorStudent_1", "MediatorStudent_2", "ReadOutStudent"):
        (released / f"{name}.pth").touch()
    first = [file.stem[:5] for file in models.module_files(released, 4)]
    assert first == ["ReadI", "Media", "Media", "ReadO"]
    with pytest.raises(models.UserError, match="modules 0 to 2"):  # a config with a propagator less
        models.module_files(released, 3)


def test_from_given_modules_only_the_students_own_set_is_needed(tmp_path):
    nac_modules(tmp_path / "modules")
    gone = {**SMALL["data"], "set": "folder", "root": str(tmp_path / "gone"), "robustness": []}
    target = {"set": "glyphs", "classes": 5, "train_images": 32, "validation_images": 8, "test_images": 16}
    path = config_file(tmp_path, NAC, data=gone, target=target)
    for script in ("assemble", "finetune", "evaluate"):
        run(script, path, f"student.modules={tmp_path / 'modules'}")
    assert "gone" in run("finetune", path, "role=meta", expect=2)


def test_a_single_command_too_looks_at_every_given_file_before_it_trains(tmp_path):
    path = config_file(tmp_path, NAC)
    word = f"student.start={tmp_path}/nowhere.pth"
    assert "nowhere.pth" in run("finetune", path, "role=meta", word, expect=2)
    assert not (tmp_path / "run/log.jsonl").exists()
    assert "exclude" in run("finetune", path, "teacher.start=a", "teacher.checkpoint=b", expect=2)


def test_paths_may_begin_with_a_tilde_and_hold_a_number_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a #3").mkdir()
    torch.save({"model_ema": vit().state_dict()}, tmp_path / "a #3/b#c.pth")
    words = ["teacher.start=~/a #3/b#c.pth#model_ema", "data.robustness=[~/r]", "share=~"]
    config = models.load_config(config_file(tmp_path, VMOE), words)
    assert config["teacher"]["start"] == f"{tmp_path}/a #3/b#c.pth#model_ema"
    assert config["data"]["robustness"] == [f"{tmp_path}/r"] and config["share"] == str(tmp_path)
    model = vit()
    models.load_start(model, {**config, "data": {**config["data"], "classes": 7}}, "teacher")
    assert torch.equal(model.blocks[0].attn.qkv.weight, vit().blocks[0].attn.qkv.weight)


def vit(depth=3, classes=7):
    torch.manual_seed(5)
    return models.ViT(16, 4, 16, 2, [1] * depth, classes)


def test_a_pretrained_vit_becomes_the_teacher_with_a_fresh_classifier(tmp_path):
    pretrained = vit(classes=1000)
    torch.save({"state_dict": pretrained.state_dict()}, tmp_path / "timm.pth")
    path = config_file(tmp_path, VMOE)
    word = f"teacher.start={tmp_path / 'timm.pth'}"
    names = [stage for *_, stage in models.stages(models.load_config(path, [word]))]
    assert names == ["meta", "teacher", "distill", "assemble_student", "student", "baseline"]
    text = run("finetune", path, "role=teacher", word, "train.teacher.epochs=0")
    assert "fresh tensors: head.weight, head.bias" in text
    teacher = torch.load(tmp_path / "run/teacher.pt", weights_only=True)["model"]
    assert teacher["head.weight"].shape == (5, 16)
    backbone = {k: v for k, v in pretrained.state_dict().items() if not k.startswith("head.")}
    assert all(torch.equal(teacher[k], v) for k, v in backbone.items())


def test_stages_that_given_weights_replace_are_left_out():
    def names(**given):
        config = {"meta": {"checkpoint": None}, "teacher": {"checkpoint": None, "start": None},
                  "student": {"start": None, "modules": None}, "distill": {"alpha": 0.5},
                  "train": {"student": {"alpha": 0.0}}}
        for key, value in given.items():
            block, _, name = key.partition("_")
            config[block][name] = value
        return [stage for *_, stage in models.stages(config)]

    every = ["meta", "incubate", "assemble_teacher", "teacher", "distill", "assemble_student", "student",
             "baseline"]
    assert names() == every
    assert names(meta_checkpoint="x") == every[1:]
    assert names(teacher_checkpoint="x") == ["meta", *every[4:]]
    assert names(student_modules="x") == every[5:]
    assert names(student_start="x") == every[6:]
    assert names(distill_alpha=0) == ["meta", *every[4:]]  # nobody listens to the teacher


# ----------------------------------------------------------------------------------------------------------
# Checkpoints as people have them


WRAPPINGS = {
    "DDP around compile": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "compile around DDP": lambda s: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    "a LightningModule": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
    "DeepSpeed": lambda s: {"module": s},
    "a trainer in a trainer": lambda s: {"state_dict": {"model": s}, "config": "a.yaml"},
    "arguments and numpy numbers": lambda s: {
        "model": s, "args": argparse.Namespace(lr=np.float64(0.1), n=np.int64(3)), "best": np.float32(81.5)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_gives_the_plain_state_dicts_logits(tmp_path, wrapping):
    source, model = vit().eval(), vit().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "w.pth")
    models.load_weights(model, tmp_path / "w.pth")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), source(x))


def test_ema_weights_are_read_on_request(tmp_path):
    plain, ema, model = vit(), vit(), vit()
    with torch.no_grad():
        for p in ema.parameters():
            p.mul_(2)
    torch.save({"model": plain.state_dict(), "model_ema": ema.state_dict()}, tmp_path / "w.pth")
    models.load_weights(model, f"{tmp_path / 'w.pth'}#model_ema")
    assert torch.equal(model.head.weight, ema.head.weight)
    with pytest.raises(models.UserError, match="no ema.*model, model_ema"):
        models.load_weights(model, f"{tmp_path / 'w.pth'}#ema")


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_by_the_name_of_its_type(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": vit().state_dict(), "x": Evil()}, "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(models.UserError) as error:
        models.load_weights(vit(), "w.pth")
    text = str(error.value)
    assert "system" in text and "weights_only" not in text and "\x1b" not in text and "\n" not in text, text
    assert not (tmp_path / "pwned").exists()


def test_an_integer_buffer_and_an_unknown_wrapper_are_named(tmp_path):
    torch.save({**vit().state_dict(), "relative_position_index": torch.arange(4)}, tmp_path / "w.pth")
    with pytest.raises(models.UserError, match="unexpected tensor relative_position_index"):
        models.load_weights(vit(), tmp_path / "w.pth")
    torch.save({"network": vit().state_dict(), "step": 3}, tmp_path / "w.pth")
    with pytest.raises(models.UserError, match="network, step"):
        models.load_weights(vit(), tmp_path / "w.pth")
    torch.save({**vit().state_dict(), "_extra_state": None}, tmp_path / "w.pth")
    with pytest.raises(models.UserError, match="the entry _extra_state is not a dense tensor"):
        models.load_weights(vit(), tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:5000])  # a download that broke off
    with pytest.raises(models.UserError) as error:
        models.load_weights(vit(), tmp_path / "w.pth")
    assert "miniz" not in str(error.value) and ".." not in str(error.value), error.value
    with pytest.raises(models.UserError, match="it is a folder; student.modules takes one"):
        models.load_start(vit(), {"teacher": {"start": str(tmp_path)}, "data": {}}, "teacher")


def test_safetensors_are_read_where_the_package_is(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, model = vit(), vit(classes=7)
    safetensors.save_file(source.state_dict(), str(tmp_path / "w.safetensors"))
    models.load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.head.weight, source.head.weight)


# ----------------------------------------------------------------------------------------------------------
# Mean and deviation


def test_mean_and_std_are_keys_kept_with_the_weights_and_taken_from_a_checkpoint_that_tells(tmp_path):
    import data
    path = config_file(tmp_path, VMOE)
    config = models.load_config(path, ["data.mean=half", "data.std=[0.1, 0.2, 0.5]"])
    image = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    torch.testing.assert_close(data.normalize(image, config["data"]).flatten(), torch.tensor([5.0, 2.5, 1.0]))
    assert models.load_config(path)["data"]["mean"] == "imagenet"
    run("finetune", path, "role=meta", "data.mean=half", "data.std=half", "train.meta.epochs=0")
    assert models.load(tmp_path / "run/meta.pt").config["data"]["std"] == "half"
    other = models.load_config(path, [f"meta.checkpoint={tmp_path / 'run/meta.pt'}"])
    assert other["data"]["mean"] == other["data"]["std"] == "half"
    told = {"mean": (0.5, 0.5, 0.5), "std": (0.4, 0.4, 0.4)}
    torch.save({"state_dict": {}, "pretrained_cfg": told}, tmp_path / "t.pth")
    other = models.load_config(path, [f"teacher.checkpoint={tmp_path / 't.pth'}"])
    assert other["data"]["std"] == [0.4, 0.4, 0.4]
    # What does not fit the keys is no news; two files that tell different things are.
    odd = {"state_dict": {}, "config": "a.yaml", "pretrained_cfg": {"mean": "foo", "std": 1}}
    torch.save(odd, tmp_path / "u.pth")
    words = [f"teacher.checkpoint={tmp_path / 't.pth'}", f"meta.checkpoint={tmp_path / 'u.pth'}"]
    assert models.load_config(path, words)["data"]["std"] == [0.4, 0.4, 0.4]
    words[1] = f"meta.checkpoint={tmp_path / 'run/meta.pt'}"
    with pytest.raises(models.UserError, match="t.pth and .*meta.pt|meta.pt and .*t.pth"):
        models.load_config(path, words)
    assert models.load_config(path, [*words, "data.mean=half", "data.std=half"])["data"]["std"] == "half"
    # A folder of modules tells, too, and what evaluate.py is given.
    folder = tmp_path / "modules"
    folder.mkdir()
    torch.save({"model": {}, "config": {"data": {"mean": "half", "std": "half"}}}, folder / "0.pt")
    assert models.load_config(path, [f"student.modules={folder}"])["data"]["mean"] == "half"
    assert models.load_config(path, (), [tmp_path / "run/meta.pt"])["data"]["mean"] == "half"
