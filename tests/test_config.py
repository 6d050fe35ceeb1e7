"""Promises of a config: what it is read as, and what its keys do in training.

1 Texts stay texts (010, 2024-05-01, a #3), ~ is the home folder, an emptied block means its defaults,
  train.*.epochs=1 sets every stage, and role=student and --role student are the same.
2 Learning rate, AdamW's groups and α, by hand; assembled stitches are learned, and what is not is named.
3 Compiled training is the plain one, bfloat16 trains as float32 does, and what overflows is never saved.
"""

import importlib
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import models
from conftest import ROOT

STAGES = ("meta", "incubate", "teacher", "distill", "student")
CONFIG = """
device: cpu
data: {image_size: 16, classes: 24, validation_images: 8, workers: 0}
meta: {width: 16, heads: 2}
teacher: {width: 16, heads: 2}
student: {width: 16, heads: 2, head_width: 8, latents: [4, 16, 2], experts: 4, grid_width: 4}
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The path of a small config, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "c.yaml"


@pytest.fixture
def read(path):
    """Reads the config with overrides, or another YAML text."""
    def read(*overrides, text=CONFIG):
        path.write_text(text)
        return models.load_config(path, ["data.classes=24", *overrides])
    return read


@pytest.fixture
def call(path, monkeypatch, glyphs):
    """Runs a script's main() on the small config and set -> its exit code."""
    def call(script, *words):
        words = [f"{script}.py", "--config", str(path), f"data.root={glyphs}", "train.*.batch=16", *words]
        monkeypatch.setattr(sys, "argv", words)
        try:
            models.run(importlib.import_module(script).main)
        except SystemExit as end:
            return end.code
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
        return 0
    return call


# ---------- What a config is read as

TEXTS = ["a #3", "2024-05-01", "12:30", "010", "0x1f", "1e3", "5", "true", "a: b", "a, b", "'quoted'", "é",
         "*x", "yes", ".inf", "~x", "{a: 1}", "a=b", " a", "#"]


@pytest.mark.parametrize("text", TEXTS)
def test_an_override_of_a_text_is_taken_as_it_stands(read, text):
    config = read(f"output_dir={text}", f"data.root={text}", f"share={text}")
    assert config["output_dir"] == config["data"]["root"] == config["share"] == text


def test_the_home_folder_is_expanded_and_null_is_nothing(read):
    home = os.environ["HOME"]
    assert read("output_dir=~/x")["output_dir"] == f"{home}/x"
    assert read("share=[~/x,y]")["share"] == [f"{home}/x", "y"] and read("share=null")["share"] is None
    assert read("output_dir=null")["output_dir"] == "runs/c"


@pytest.mark.parametrize("text", ["2024-05-01", "12:30", "010", "yes", "0x1f", "1_000", "a#3", "'7'"])
def test_a_text_in_the_file_stays_a_text_too(read, text):
    assert read(text=f"data: {{root: {text}}}")["data"]["root"] == text.strip("'")


def test_numbers_are_decimal_and_nothing_else_is_one(read):
    for text, value in (("5e-4", 5e-4), ("1.", 1), (".5", 0.5), ("2", 2), ("+2", 2), ("1e0", 1)):
        assert read(f"train.meta.lr={text}")["train"]["meta"]["lr"] == value
    for text in ("010", "0x1f", "0b1", "1_000", "1:30", "'8'", "2024-05-01"):
        with pytest.raises(models.UserError, match="seed=.* is not allowed: it must be int"):
            read(f"seed={text}")
    for text in ("yes", "on", "True", "1"):
        with pytest.raises(models.UserError, match="compile=.* must be true or false"):
            read(f"compile={text}")


def test_an_alias_is_no_key_that_stands_twice(read):
    with pytest.raises(models.UserError, match="epochs stands twice"):
        read(text="train: {meta: {epochs: 1, epochs: 2}}")
    config = read(text="train: {meta: &a {lr: 0.1}, teacher: *a}\nshare: &b [x]\ndata: {robustness: *b}")
    assert config["train"]["meta"]["lr"] == config["train"]["teacher"]["lr"] == 0.1
    assert config["data"]["robustness"] == ["x"]


@pytest.mark.parametrize("text", ["data:", "data: {}", "data: ~", "train:\n  meta:\n", "few_shot:\nteacher:"])
def test_an_emptied_block_means_its_defaults_and_each_default_is_a_new_value(read, text):
    plain = read(text="{}")
    plain["data"]["robustness"].append("renditions")
    plain["meta"]["depths"].append(1)
    emptied = read(text=text)
    assert emptied == read(text="{}")
    assert emptied["data"]["robustness"] == [] and emptied["meta"]["depths"] == [1, 1, 1]


def test_a_star_sets_the_key_in_every_stage_and_the_last_override_counts(read):
    train = read("train.*.epochs=1", "train.meta.epochs=7", "train.*.lr=0.25", "*.alpha=0.75")["train"]
    assert {stage: train[stage]["epochs"] for stage in STAGES} == {s: 7 if s == "meta" else 1 for s in STAGES}
    assert all(train[stage]["lr"] == 0.25 for stage in STAGES) and train["student"]["alpha"] == 0.75
    with pytest.raises(models.UserError, match=r"train\.\*\.epoch is not a key"):
        read("train.*.epoch=1")


def test_options_work_with_dashes_and_without(path, monkeypatch):
    results = []
    for words in (["role=teacher", "module=2", "seed=5"], ["--role", "teacher", "seed=5", "--module", "2"],
                  ["seed=5", "--role=teacher", "--module=2"]):
        monkeypatch.setattr(sys, "argv", ["x.py", *words, "--config", str(path)])
        config, options = models.command_line("", ("student", "teacher"), module=dict(type=int))
        assert (options.role, options.module, config["seed"]) == ("teacher", 2, 5)
        results.append(config)
    assert results[0] == results[1] == results[2]


# ---------- What its keys do in training


def test_learning_rate_by_hand(read):
    c = read("train.*.lr=1e-3", "train.*.warmup=2", "train.*.epochs=10")["train"]["meta"]

    def rate(step, **changes):  # 5 steps per epoch; peak 1e-3 · 1024/512
        return models.learning_rate(step, 5, {**c, **changes}, total_batch=1024)

    assert rate(0) == 1e-6
    assert rate(5) == pytest.approx(1e-6 + (2e-3 - 1e-6) / 2)  # half of the 10 warm-up steps
    assert rate(10) == pytest.approx(2e-3)
    # A quarter of the 40 others: cos 45°
    assert rate(20) == pytest.approx(1e-5 + 0.5 * (2e-3 - 1e-5) * (1 + math.sqrt(0.5)))
    assert rate(30) == pytest.approx((2e-3 + 1e-5) / 2)
    assert rate(50) == pytest.approx(1e-5)
    assert rate(50, scale_min_lr=True) == pytest.approx(2e-5)
    assert rate(10, scale_min_lr=True) == pytest.approx(2e-3)
    assert rate(0, warmup=0) == pytest.approx(2e-3)
    assert rate(1, warmup=0.4) == pytest.approx((1e-6 + 2e-3) / 2)  # warm-up of 2 steps


def test_optimizer_does_not_decay_biases_norms_and_embeddings():
    model = models.ViT(16, 4, width=8, heads=2, depths=[1, 1], classes=3, moe=dict(experts=2))
    model.head.requires_grad_(False)
    c = dict(lr=1e-3, weight_decay=0.05, decay_all=False, betas=[0.9, 0.999])
    names = {id(p): name for name, p in model.named_parameters()}
    groups = models.optimizer(model, c).param_groups
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    decayed = {"patch_embed.proj.weight"} | {f"blocks.{k}.{name}" for k in (0, 1) for name in (
        "attn.qkv.weight", "attn.proj.weight", "moe.router.weight", "moe.fc1_weight", "moe.fc2_weight")}
    assert groups[0.05] == decayed
    assert groups[0.0] == set(names.values()) - decayed - {"head.weight", "head.bias"}
    everything = models.optimizer(model, {**c, "decay_all": True}).param_groups
    assert [group["weight_decay"] for group in everything] == [0.05]
    assert len(everything[0]["params"]) == len(names) - 2


def test_a_stage_has_its_block_and_a_baseline_the_students_without_its_alpha(read):
    c = read("distill.alpha=0.25", "train.student.alpha=0.75", "train.student.epochs=5",
             "train.baseline_epochs=9")
    stages = {name: models.schedule(c, name) for name in (*STAGES, "baseline", "baseline_kd")}
    assert {name: s["alpha"] for name, s in stages.items()} == {
        "meta": 0, "incubate": 0, "teacher": 0, "distill": 0.25, "student": 0.75, "baseline": 0,
        "baseline_kd": 0.25}
    assert [stages[name]["epochs"] for name in ("student", "baseline", "baseline_kd")] == [5, 9, 9]
    assert {stages[name]["block"] for name in ("student", "baseline", "baseline_kd")} == {"student"}
    assert models.schedule(read("train.student.epochs=5"), "baseline")["epochs"] == 5


def test_assembly_names_what_is_in_no_modules_file_and_folded_stitches_are_in_them(call, tmp_path, capsys):
    words = ["train.*.epochs=0", "distill.alpha=0", "assemble.stitches=fold"]
    assert call("finetune", "role=meta", *words) == call("distill_module", *words) == 0
    capsys.readouterr()
    assert call("assemble", *words) == 0
    names = capsys.readouterr().out.strip().split("as initialized: ")[1].split(", ")
    assert names == [*(f"{kind}_latents.signatures" for kind in ("input", "mediator", "output")),
                     *(f"{part}.attention.bandwidth" for part in ("propagators.0", "read_out"))]
    assert "stitches.1.weight" in models.read(tmp_path / "runs/c/student_assembled.pt")["model"]


@pytest.mark.parametrize("value, clip", [(torch.nan, 0), (torch.inf, 1), (1e25, 0), (3e38, 0), (1e25, 1)])
@pytest.mark.parametrize("stage", ["meta", "incubate"])
def test_a_gradient_that_overflows_is_never_saved(call, tmp_path, capsys, monkeypatch, value, clip, stage):
    """The square of 1e25 is infinite in AdamW: unseen, the parameter would never move again."""
    words = ["train.*.epochs=0", f"train.{stage}.epochs=1", f"train.{stage}.clip={clip}"]
    script, role, name = "finetune", "role=meta", "meta.pt"
    if stage == "incubate":
        assert call(script, role, *words) == 0
        script, role, name = "distill_module", "role=teacher", "teacher_modules/0.pt"
    step = models.Stage.step

    def overflow(self):
        module = next(iter(self.modules.values()))
        next(p.grad for p in module.parameters() if p.grad is not None).view(-1)[0] = value
        step(self)

    monkeypatch.setattr(models.Stage, "step", overflow)
    code = call(script, role, *words)
    file, error = tmp_path / "runs/c" / name, capsys.readouterr().err
    if value == 1e25 and clip:  # the norm is infinite too, so the clipped step is one of zeros
        assert code == 0 and all(v.isfinite().all() for v in models.read(file)["model"].values())
        return
    assert code == 2 and "not finite" in error and "step" in error
    assert not file.exists() and not list((tmp_path / "runs/c").rglob("*unfinished.pt"))


def test_blocks_of_ten_modules_and_their_hybrids_are_all_compiled(monkeypatch):
    """Depths and batches differ, some are frozen, some run without gradients: within torch's eight times."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    meta, teacher, student = (models.ViT(16, 8, 8, 2, depths, 3, mlp_ratio=1)
                              for depths in ([1] * 10, [2] + [1] * 8 + [2], [1] * 10))
    models.set_drop_path(student, 0.1)
    for frozen in (meta, teacher):
        models.compile_blocks(frozen.requires_grad_(False).eval())
    models.compile_blocks(student.train())
    images = torch.randn(4, 3, 16, 16)
    for i, module in enumerate(student.parts):
        with torch.no_grad():
            hidden = meta.hidden_states(images)
            meta.rest(i + 1, teacher.parts[i](hidden[i]))
        meta.rest(i + 1, module(hidden[i]))
        with torch.no_grad():
            meta.rest(i + 1, module.eval()(hidden[i][:3]))
    counters = torch._dynamo.utils.counters
    assert 0 < counters["frames"]["total"] == counters["frames"]["ok"], counters
    assert not counters["unimplemented"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nac", "vmoe"])
def test_compiled_modules_train_to_the_same_weights(call, tmp_path, kind):
    """Without drop path, because compiled code draws other random numbers."""
    weights = []
    for compiled in ("false", "true"):
        words = [f"student.kind={kind}", "train.*.epochs=1", "distill.alpha=0", f"compile={compiled}",
                 f"output_dir={compiled}"]
        assert call("finetune", "role=meta", *words) == 0
        for role in ("teacher", "student"):
            assert call("distill_module", f"role={role}", *words) == 0
        files = ["meta.pt", *(f"teacher_modules/{i}.pt" for i in range(3))]
        files += [f"student_modules/{i}.pt" for i in range(3) if kind == "vmoe"]  # a NAC's codes are shaken
        states = [models.read(tmp_path / compiled / file)["model"].values() for file in files]
        weights.append([torch.cat([value.flatten() for value in state]) for state in states])
    for eager, compiled in zip(*weights):
        assert (eager - compiled).norm() < 1e-3 * eager.norm()


@pytest.mark.slow
def test_bfloat16_and_float32_agree_on_the_demo(tmp_path):
    """Validation top-1 of the demo's meta model, after 8 epochs."""
    top1, root = {}, tmp_path / "glyphs.npz"
    subprocess.run([sys.executable, "tools/prepare.py", "glyphs", root], cwd=ROOT, check=True)
    for precision in ("float32", "bfloat16"):
        words = ["train.meta.epochs=8", f"precision={precision}", f"output_dir={tmp_path / precision}"]
        line = [sys.executable, "finetune.py", "--config", "configs/demo_nac.yaml", "role=meta", *words]
        subprocess.run([*line, f"data.root={root}"], cwd=ROOT, check=True)
        lines = (tmp_path / precision / "log.jsonl").read_text().splitlines()
        top1[precision] = json.loads(lines[-1])["val_top1"]
    assert top1["float32"] > 60 and abs(top1["float32"] - top1["bfloat16"]) < 5, top1
