"""Promises of --dry-run and of the cost in the log:

  - nothing is allocated, and the table's numbers are those of the run that follows;
  - multiply-adds of an epoch are those computed by hand;
  - a teacher may be a folder with one file per module; one that does not fit the meta model is warned about.
"""

import json
import re
import resource

import pytest
import torch

import evaluate
import models
from conftest import ROOT
from test_runs import CONFIG, run, write_config

NAC, VMOE = (ROOT / f"configs/demo_{name}.yaml" for name in ("nac", "vmoe"))

# ---------- The table


@pytest.mark.parametrize("path", [NAC, VMOE], ids=lambda path: path.stem)
@pytest.mark.parametrize("stage", ["meta", "teacher", "student", "baseline"])
def test_parameters_and_their_state_are_counted(path, stage):
    config = models.load_config(path)
    parameters, state, _ = models.cost(config, stage)
    # weight, gradient and two moments in float32
    assert parameters == models.count(models.build(config, stage)) and state == 16 * parameters


def test_modules_count_the_frozen_models_as_weights_alone():
    config = models.load_config(NAC)
    meta, teacher = (models.count(models.build(config, role)) for role in ("meta", "teacher"))
    parameters, state, _ = models.cost(config, "distill")
    modules = models.cut(models.build(config, "student"), config, "student")
    assert parameters == sum(map(models.count, modules))
    assert state == 16 * parameters + 4 * (meta + teacher)
    assert models.cost(models.load_config(NAC, ["distill.alpha=0"]), "distill")[1] == state - 4 * teacher


def test_the_table_says_what_the_run_then_does(tmp_path):
    path = write_config(tmp_path, "nac")
    lines = run("finetune", path, "--dry-run").splitlines()
    heads = ["stage", "parameters", "images", "epochs", "steps", "batch", "learning rate", "state GiB",
             "TMAC", "GPU hours"]
    assert re.split("  +| (?=epochs|batch)", lines[0]) == heads
    rows = [line.split() for line in lines[1:7]]
    assert [row[0] for row in rows] == ["meta", "incubate", "teacher", "distill", "student", "baseline"]
    assert len({len(line) for line in lines[1:7]}) == 1 and all(len(line) < 110 for line in lines)
    assert not (tmp_path / "run").exists()
    for script, role, (_, parameters, images, epochs, steps, batch, high, _, low, _, tmac, _) in (
            ("finetune", "meta", rows[0]), ("distill_module", "teacher", rows[1])):
        banner = run(script, path, f"role={role}").splitlines()[0]
        said = re.search(r"([\d,]+) parameters, (\d+) epochs of (\d+) steps of (\d+) images", banner)
        assert (parameters, epochs, batch) == (said[1], said[2], said[4]) and images == "67"
        assert int(steps) == int(said[2]) * int(said[3])
        log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        log = [line for line in log if line["stage"] == {"finetune": "meta"}.get(script, "incubate")]
        assert sum(line["tmac"] for line in log) == pytest.approx(float(tmac), rel=0.01)
        assert float(low) <= min(line["lr"] for line in log) <= max(line["lr"] for line in log) <= float(high)


def test_a_model_that_fits_no_memory_is_counted(tmp_path):
    def little_memory():
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))

    words = ["meta.width=65536", "teacher.width=65536", "train.meta.epochs=0"]
    text = run("finetune", write_config(tmp_path), "--dry-run", *words, before=little_memory)
    row = text.splitlines()[1].split()
    assert int(row[1].replace(",", "")) > 2e10 and float(row[-3]) > 300  # GiB


# ---------- Multiply-adds of the demo's ViTs by hand
#
# 32 px, patch 8, so 16 patches and 17 tokens; width 64, MLP 128, 24 classes.

STEM = 16 * (3 * 8 * 8) * 64
# qkv, projection, two layers of the MLP; q·k and the sum over v
LINEAR, ATTENTION = 17 * 64 * (192 + 64 + 128 + 128), 2 * 17 * 17 * 64
BLOCK, HEAD = LINEAR + ATTENTION, 64 * 24
IMAGES = 5000 // 64 * 64  # of an epoch


def work(stage, *overrides, path=NAC):
    return models.cost(models.load_config(path, overrides), stage)[2]


def trained(forward):
    """Backward costs twice the forward: the gradient of the input, and of the weight."""
    return 3 * forward


def test_a_whole_models_multiply_adds_are_those_computed_by_hand():
    # Nobody asks for the gradient of the images.
    assert work("meta") == IMAGES * (trained(STEM + 3 * BLOCK + HEAD) - STEM)


def test_a_frozen_suffix_has_no_gradients_of_weights():
    def frozen(blocks):
        # A linear layer costs 2 times its forward; attention has no weights, both of its inputs are states.
        return 2 * (blocks * LINEAR + HEAD) + 3 * blocks * ATTENTION
    prefix = STEM + 2 * BLOCK  # h_1 and h_2, once for all three modules
    modules = (trained(STEM + 2 * BLOCK) - STEM + frozen(2),  # the teacher's modules have two blocks each
               trained(2 * BLOCK) + frozen(1), trained(2 * BLOCK + HEAD))
    assert work("incubate") == IMAGES * (prefix + sum(modules))


def test_a_teacher_costs_its_forward():
    hybrids = (STEM + 2 * BLOCK) + (2 * BLOCK + HEAD) + (2 * BLOCK) + (2 * BLOCK + HEAD) + (BLOCK + HEAD)
    assert work("distill") - work("distill", "distill.alpha=0") == IMAGES * hybrids
    whole = IMAGES * (STEM + 6 * BLOCK + HEAD)
    assert work("baseline_kd") - work("baseline") == whole
    assert work("student", "train.student.alpha=0.5") - work("student") == whole


def test_multiply_adds_are_those_of_an_epoch_in_proportion_to_its_images():
    assert work("student", "train.student.epochs=6") == work("student")
    forty_steps = work("meta", "train.meta.images=[0, 2560]")
    assert forty_steps * 78 == work("meta") * 40
    assert work("meta", "train.meta.images=[0, 2560]", "train.meta.passes=3") == 3 * forty_steps
    assert work("meta", "train.meta.batch=32", "train.meta.accumulate=2") == work("meta")
    # What depends on codes and signatures alone is computed once a batch.
    assert work("student", "train.student.batch=8") > work("student") * 625 * 8 / IMAGES


def test_a_mixture_counts_the_experts_that_a_token_uses():
    config = models.load_config(VMOE)
    dense = {**config["student"], "experts": 0, "mlp_ratio": 2 * config["student"]["mlp_ratio"]}
    assert work("student", path=VMOE) == models.cost({**config, "student": dense}, "student")[2] > 0
    # Experts in one of three blocks: the other two's MLPs (17 tokens, 2 layers of 48·48) are not doubled.
    less = work("student", path=VMOE) - work("student", "student.moe_blocks=[0]", path=VMOE)
    assert less == IMAGES * 2 * trained(17 * 2 * 48 * 48)


def test_a_depthwise_convolution_costs_each_channel_its_own_filter():
    formulas = {torch.ops.aten.convolution_backward: models.convolution_backward}
    with torch.device("meta"):
        x = torch.zeros(2, 8, 10, 10, requires_grad=True)
        convolution = torch.nn.Conv2d(8, 8, 7, padding=3, groups=8)
        with models.FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            convolution(x).sum().backward()
    assert counter.get_total_flops() / 2 == trained(2 * 10 * 10 * 8 * 7 * 7)


# ---------- A teacher as a folder with one file per module


def write_modules(folder, teacher, original):
    folder.mkdir(parents=True)
    for i, part in enumerate(teacher.parts):
        state = part.state_dict()
        if original:
            content = {"model_name": "vit", "block_index": i, "block_state_dict": state}
            torch.save({**content, "divided_depths": [1, 2, 1]}, folder / f"block{i}.pth")
        else:
            torch.save({"model": state}, folder / f"{i}.pt")


@pytest.mark.parametrize("original", [True, False])
def test_a_teacher_is_read_from_a_folder_of_module_files(tmp_path, original):
    config = models.load_config(write_config(tmp_path))
    teacher = models.build({**config, "seed": 7}, "teacher")
    write_modules(tmp_path / "modules", teacher, original)
    model = models.build(config, "teacher")
    models.load_weights(model, tmp_path / "modules")
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_folder_that_lacks_a_module_or_a_tensor_is_named(tmp_path):
    config = models.load_config(write_config(tmp_path))
    teacher = models.build(config, "teacher")
    write_modules(tmp_path / "modules", teacher, original=True)
    path = tmp_path / "modules/block1.pth"
    content = torch.load(path, weights_only=True)
    del content["block_state_dict"]["blocks.1.norm1.bias"]
    torch.save(content, path)
    with pytest.raises(models.UserError, match="block1.pth lacks the tensor blocks.1.norm1.bias"):
        models.load_weights(models.build(config, "teacher"), tmp_path / "modules")
    path.unlink()
    with pytest.raises(models.UserError, match="modules 0 to 2"):
        models.load_weights(models.build(config, "teacher"), tmp_path / "modules")
    with pytest.raises(models.UserError, match="a file for each of the modules 0 to 2"):
        models.load_weights(models.build(config, "student"), tmp_path)


def test_a_teacher_that_does_not_fit_and_modules_that_stay_at_chance_are_named(tmp_path):
    plain = {**CONFIG["data"], "mixup": 0, "cutmix": 0, "classes": 8, "train_images": 320}
    quick = {**CONFIG["train"]["meta"], "epochs": 10, "lr": 0.3, "drop_path": 0}
    train = {"meta": quick, "incubate": dict(quick), "distill": {**quick, "epochs": 0}}
    path = write_config(tmp_path, data=plain, train=train)
    run("finetune", path, "role=meta")
    run("distill_module", path, "role=teacher")
    (tmp_path / "run/teacher_modules/unfinished.pt").unlink()  # which only these tests keep
    stranger = models.build({**models.load_config(path), "seed": 7}, "teacher")
    write_modules(tmp_path / "stranger", stranger, original=True)
    for modules, warned in ("stranger", True), ("run/teacher_modules", False):
        text = run("distill_module", path, f"teacher.checkpoint={tmp_path / modules}",
                   f"meta.checkpoint={tmp_path / 'run/meta.pt'}", f"output_dir={tmp_path / str(warned)}")
        assert "teacher hybrids [" in text and ("warning: " in text) == warned, text
    words = [f"share={tmp_path / 'run'}", f"output_dir={tmp_path / 'no'}", "train.incubate.lr=0",
             "train.incubate.min_lr=0", "train.incubate.epochs=1"]
    text = run("distill_module", path, "role=teacher", *words)
    named = re.findall(r"^module (\d)'s hybrid ends at ([\d.]+) %, .*train it longer", text, re.M)
    alone, hybrids = (evaluate.read_log(tmp_path / name) for name in ("run", "no"))
    alone = [line["val_top1"] for line in alone if line["stage"] == "meta"][-1]
    low = [(str(i), str(line["val_top1"])) for i, line in enumerate(hybrids) if line["val_top1"] < alone / 2]
    assert named == low != [], text
