"""Promises of --dry-run: nothing is allocated, the stages' numbers are those of the run, memory is about what it will be."""

import re

import pytest
import torch

import models
from conftest import ROOT
from test_runs import CONFIG, run, write_config

DEMOS = [ROOT / f"configs/{name}.yaml" for name in ("demo_nac", "demo_vmoe")]


def kept_for_backward(model, images):
    """Bytes that autograd really keeps, apart from weights."""
    sizes, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
    return sum(size for place, size in sizes.items() if place not in weights), out


@pytest.mark.parametrize("path", DEMOS, ids=lambda p: p.stem)
@pytest.mark.parametrize("stage", ["meta", "teacher", "student"])
def test_memory_is_about_what_a_real_step_keeps(path, stage):
    config = models.load_config(path, [f"train.{stage}.batch=32"])
    model = models.build(config, stage)
    real = kept_for_backward(model, torch.randn(32, 3, 32, 32))[0]
    parameters, state, activations, _ = models.cost(config, stage)
    assert parameters == models.count(model) and state == 16 * parameters
    # what a mixture keeps besides a dense MLP's states is not counted
    assert activations == pytest.approx(real, rel=0.4 if (path.stem, stage) == ("demo_vmoe", "student") else 0.15)


def test_modules_count_the_frozen_models_and_the_largest_hybrid():
    config = models.load_config(DEMOS[0], ["train.distill.batch=32"])
    meta, teacher = (sum(p.numel() for p in models.build(config, role).parameters()) for role in ("meta", "teacher"))
    parameters, state, activations, _ = models.cost(config, "distill")
    assert state == 16 * parameters + 4 * (meta + teacher)
    assert models.cost({**config, "distill": {**config["distill"], "alpha": 0}}, "distill")[1] == state - 4 * teacher
    module = models.cut(models.build(config, "student"), config, "student")[1]
    frozen = models.build(config, "meta").requires_grad_(False)
    hybrid = torch.nn.Sequential(module, frozen.parts[2])
    assert activations >= 0.85 * kept_for_backward(hybrid, torch.randn(32, 17, 64))[0]


def test_the_table_says_what_the_run_then_does(tmp_path):
    path = write_config(tmp_path, "nac")
    table = run("finetune", path, "--dry-run")
    assert [line.split()[0] for line in table.splitlines()[1:7]] == ["meta", "incubate", "teacher", "distill", "student", "baseline"]
    _, parameters, images, epochs, steps, batch, *_ = table.splitlines()[1].split()
    text = run("finetune", path, "role=meta")
    said = re.search(r"meta: ([\d,]+) parameters, (\d+) images, (\d+) epochs of (\d+) steps of (\d+) images", text)
    assert (parameters, images, epochs, batch) == (said[1], said[2], said[3], said[5])
    assert int(steps) == int(said[3]) * int(said[4])


# ----------------------------------------------------------------------------------------------------------------------
# Multiply-adds of the demo's ViTs by hand: 32 px, patch 8, so 16 patches and 17 tokens, width 64, MLP 128, 24 classes.

STEM = 16 * (3 * 8 * 8) * 64
# qkv, projection, two layers of the MLP; q·k and the sum over v
LINEAR, ATTENTION = 17 * 64 * (192 + 64 + 128 + 128), 2 * 17 * 17 * 64
BLOCK, HEAD = LINEAR + ATTENTION, 64 * 24
IMAGES = 5000 // 64 * 64  # of an epoch


def work(stage, *overrides):
    return models.multiply_adds(models.load_config(DEMOS[0], overrides), stage)


def trained(forward):
    """Backward costs twice the forward: the gradient of the input, and of the weight."""
    return 3 * forward


def test_a_whole_models_multiply_adds_are_those_computed_by_hand():
    # nobody asks for the gradient of the images
    assert work("meta") == 20 * IMAGES * (trained(STEM + 3 * BLOCK + HEAD) - STEM)


def test_a_frozen_suffix_has_no_gradients_of_weights():
    def frozen(blocks):  # a linear layer costs 2 times its forward; attention has no weights, both its inputs are states
        return 2 * (blocks * LINEAR + HEAD) + 3 * blocks * ATTENTION
    prefix = STEM + 2 * BLOCK  # h_1 and h_2, once for all three modules
    modules = (trained(STEM + 2 * BLOCK) - STEM + frozen(2),  # the teacher's modules have two blocks each
               trained(2 * BLOCK) + frozen(1),
               trained(2 * BLOCK + HEAD))
    assert work("incubate") == 5 * IMAGES * (prefix + sum(modules))


def test_a_teacher_costs_its_forward():
    hybrids = (STEM + 2 * BLOCK) + (2 * BLOCK + HEAD) + (2 * BLOCK) + (2 * BLOCK + HEAD) + (BLOCK + HEAD)
    assert work("distill") - work("distill", "distill.alpha=0") == 3 * IMAGES * hybrids
    whole = 2 * IMAGES * (STEM + 6 * BLOCK + HEAD)
    assert work("baseline_kd") - work("baseline") == whole
    assert work("student", "distill.finetune_alpha=0.5") - work("student") == whole


def test_multiply_adds_are_proportional_to_the_images_seen():
    assert work("student", "train.student.epochs=6") == 3 * work("student")
    assert work("baseline", "train.baseline_epochs=6") == 3 * work("baseline")
    assert work("meta", "train.meta.images=[0, 2560]") == 40 / 78 * work("meta")
    assert work("meta", "train.meta.batch=32", "train.meta.accumulate=2") == work("meta")
    assert work("meta", "data.set=folder", "data.classes=24", "data.train_images=0") == 0
    # what depends on codes and signatures alone is computed once a batch
    assert work("student", "train.student.batch=8") > work("student") * 625 * 8 / IMAGES


def test_a_mixture_counts_the_experts_that_a_token_uses():
    config = models.load_config(DEMOS[1])
    c = {**config["student"], "experts": 0, "mlp_ratio": 2 * config["student"]["mlp_ratio"]}
    assert models.multiply_adds(config, "student") == models.multiply_adds({**config, "student": c}, "student") > 0
    # experts in one of three blocks; the MLPs of the other two (17 tokens, 2 layers of 48·48) are not doubled
    some = {**config, "student": {**config["student"], "moe_blocks": [0]}}
    images = 4 * (5000 // 64 * 64)
    assert models.multiply_adds(config, "student") - models.multiply_adds(some, "student") == images * 2 * trained(17 * 2 * 48 * 48)


def test_a_depthwise_convolution_costs_each_channel_its_own_filter():
    with torch.device("meta"):
        convolution, x = torch.nn.Conv2d(8, 8, 7, padding=3, groups=8), torch.zeros(2, 8, 10, 10, requires_grad=True)
        with models.FlopCounterMode(
                display=False, custom_mapping={torch.ops.aten.convolution_backward: models.convolution_backward}) as counter:
            convolution(x).sum().backward()
    assert counter.get_total_flops() / 2 == trained(2 * 10 * 10 * 8 * 7 * 7)


# ----------------------------------------------------------------------------------------------------------------------
# A teacher as a folder with one file a module


def write_modules(folder, teacher, original):
    folder.mkdir(parents=True)
    for i, part in enumerate(teacher.parts):
        content = {"model_name": "vit", "block_index": i, "block_state_dict": part.state_dict(), "divided_depths": [1, 2, 1]}
        torch.save(content if original else {"model": part.state_dict()}, folder / (f"block{i}.pth" if original else f"{i}.pt"))


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
    with pytest.raises(models.UserError, match="lacks the tensor blocks.2.norm1.bias"):  # 1 block before this module
        models.load_weights(models.build(config, "teacher"), tmp_path / "modules")
    path.unlink()
    with pytest.raises(models.UserError, match="modules 0 to 2"):
        models.load_weights(models.build(config, "teacher"), tmp_path / "modules")
    with pytest.raises(models.UserError, match="is a folder"):
        models.load_weights(models.build(config, "student"), tmp_path)


def test_a_teacher_from_elsewhere_works_and_is_warned_about_if_it_does_not_fit(tmp_path):
    plain = {**CONFIG["data"], "mixup": 0, "cutmix": 0, "classes": 8, "train_images": 320}
    quick = {**CONFIG["train"]["meta"], "epochs": 10, "lr": 0.3, "drop_path": 0}
    path = write_config(tmp_path, data=plain, train={"meta": quick, "incubate": dict(quick), "distill": {**quick, "epochs": 0}})
    run("finetune", path, "role=meta")
    run("distill_module", path, "role=teacher")
    config = models.load_config(path)
    write_modules(tmp_path / "stranger", models.build({**config, "seed": 7}, "teacher"), original=True)
    words = [f"meta.checkpoint={tmp_path / 'run/meta.pt'}", "force=true"]
    strange = run("distill_module", path, f"teacher.checkpoint={tmp_path / 'stranger'}", *words)
    own = run("distill_module", path, f"teacher.checkpoint={tmp_path / 'run/teacher_modules'}", *words)
    assert "validation top-1 of the teacher hybrids" in strange and "warning" in strange, strange
    assert "warning" not in own, own
