"""Promises about training mode, against values computed from the original's formulas.

The fixtures are all in evaluation mode, so they see none of this: the learning rate at each step, what fresh
experts and stitches are drawn from, which blocks drop in which stage, noise on codes, which images a process
gets under repeated augmentation, and training on everything.
"""

import math

import numpy as np
import pytest
import torch

import data
import models
from conftest import ROOT

CPU = torch.device("cpu")
VIT = dict(patch=8, width=16, heads=2, mlp_ratio=2)


def config(npz, **changes):
    """A V-MoE of two modules with three blocks each; `changes` are whole blocks."""
    flat = {f"{block}.{key}": value for block, keys in {
        "data": dict(root=str(npz), image_size=16, workers=0), "meta": dict(VIT, depths=[1, 1]),
        "teacher": dict(VIT, depths=[3, 2]),
        "student": dict(VIT, kind="vmoe", width=24, depths=[3, 3], experts=2)}.items()
        for key, value in {**keys, **changes.get(block, {})}.items()}
    full = {key: flat.get(key, default) for key, (_, default) in models.KEYS.items()}
    full["data.classes"] = 4
    return models.unflatten(full)


def nac_config(npz):
    return config(npz, student=dict(kind="nac", width=16, heads=2, head_width=8, latents=[4, 8, 2],
                                    propagators=2, grid_width=4),
                  meta=dict(VIT, depths=[1] * 4), teacher=dict(VIT, depths=[1] * 4))


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "set.npz"
    rng, labels = np.random.default_rng(0), np.arange(40) % 4
    images = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(path, class_names=np.array(list("abcd")), train_images=images, train_labels=labels,
             test_images=images[:8], test_labels=labels[:8])
    return path


def test_learning_rate_with_and_without_a_prefix():
    c = dict(lr=1.0, min_lr=0.01, scale_min_lr=False, warmup=20, epochs=100, warmup_prefix=False)
    for epoch, cosine in [(0, None), (10, None), (20, 20), (50, 50), (99, 99)]:
        # timm, warmup_prefix=False: min + ½ (peak − min)(1 + cos(π t / E)), t and E from the start
        expected = (1e-6 + (1 - 1e-6) * epoch / 20 if cosine is None
                    else 0.01 + 0.5 * 0.99 * (1 + math.cos(math.pi * cosine / 100)))
        assert models.learning_rate(epoch, 1, c, 512) == pytest.approx(expected)
    assert models.learning_rate(20, 1, c, 512) == pytest.approx(0.905, abs=0.001)
    c["warmup_prefix"] = True  # ours: the cosine begins after the warm-up, at the peak
    assert models.learning_rate(20, 1, c, 512) == pytest.approx(1.0)
    assert models.learning_rate(60, 1, c, 512) == pytest.approx(0.01 + 0.5 * 0.99)


def test_fresh_experts_and_stitches(npz):
    std = 1 / math.sqrt(3 * 768 * 3072)
    assert std == pytest.approx(0.000376, rel=2e-3)
    # 24 × 48: the same formula at this size; everything else keeps init_std
    small = 1 / math.sqrt(3 * 24 * 48)
    c = config(npz, student=dict(width=24, expert_std=small, init_std=0.1, stitch_std=0.02))
    student = models.build(c, "student")
    moe = student.blocks[0].moe
    assert moe.fc1_weight.std().item() == pytest.approx(small, rel=0.1)
    assert moe.fc2_weight.std().item() == pytest.approx(small, rel=0.1)
    assert student.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert moe.router.weight.std().item() > 0.05
    post = models.cut(student, c, "student")[0].post_stitch.fc
    assert post.weight.std().item() == pytest.approx(0.02, rel=0.15) and not post.bias.any()
    c["student"] |= dict(expert_std=None, stitch_std=None)
    student = models.build(c, "student")
    assert student.blocks[0].moe.fc1_weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert models.cut(student, c, "student")[0].post_stitch.fc.bias.any()  # nn.Linear's own


def test_the_paper_configs_hold_the_original_values():
    vmoe = models.load_config(ROOT / "configs/imagenet_vmoe.yaml")
    assert vmoe["student"]["expert_std"] == pytest.approx(1 / math.sqrt(3 * 768 * 3072), rel=1e-3)
    assert vmoe["student"]["stitch_std"] == 0.02
    for name in ("imagenet_vmoe", "imagenet_nac", "tiny_imagenet_modules", "tiny_imagenet_nac"):
        c = models.load_config(ROOT / f"configs/{name}.yaml")
        warm = [stage for stage in c["train"].values() if isinstance(stage, dict) and stage["warmup"]]
        assert warm and not any(stage["warmup_prefix"] for stage in warm), name
        assert c["data"]["validation_images"] == 0, name


def rates(module):
    """The drop rates of a model's blocks, attention and MLP alike."""
    return [pytest.approx(block.drop_path.rate) for block in module.blocks]


def test_drop_rates_of_every_stage(npz):
    c = config(npz)
    meta, teacher, student = (models.build(c, role) for role in ("meta", "teacher", "student"))
    models.set_drop_path(student, 0.1)  # fine-tuning: over the whole model
    assert rates(student) == [0, 0.02, 0.04, 0.06, 0.08, 0.1]
    models.set_drop_path(student, 0.1, by_module=True)  # m2mKD: over each module
    assert rates(student) == [0, 0.05, 0.1, 0, 0.05, 0.1]
    models.drop_in_hybrid(meta, teacher, 0, 0.1)  # incubation: over T_0 (three blocks) and M_1
    assert rates(teacher.parts[0]) + rates(meta.parts[1]) == [0, 0.1 / 3, 0.2 / 3, 0.1]
    models.drop_in_hybrid(meta, teacher, 1, 0.1)  # M_0 and T_1 (two blocks)
    assert rates(meta.parts[0]) + rates(teacher.parts[1]) == [0, 0.05, 0.1]
    nac = nac_config(npz)
    circuit = models.build(nac, "student")
    models.set_drop_path(circuit, 0.1, by_module=True)  # constant over a NAC's propagators
    assert [p.drop_path.rate for p in circuit.propagators] == [0.1, 0.1]
    assert [p.ffn.drop_path.rate for p in circuit.propagators] == [0.1, 0.1]


def test_the_meta_model_drops_in_incubation_alone(npz):
    c = config(npz)
    meta, teacher = models.build(c, "meta").eval(), models.build(c, "teacher")
    models.drop_in_hybrid(meta, teacher, 0, 0.9)
    x = torch.randn(64, 5, 16)
    assert torch.equal(meta.rest(1, x), meta.rest(1, x))  # evaluation mode, as in m2mKD
    meta.train()
    assert not torch.equal(meta.rest(1, x), meta.rest(1, x))


def test_no_noise_on_a_fixed_code(npz):
    nac = nac_config(npz)
    for codes, noisy in (("own", True), ("original", False)):
        nac["distill"]["codes"] = codes
        # A propagator, since it has no seeder.
        module = models.cut(models.build(nac, "student"), nac, "student")[2].train()
        x = torch.randn(3, 5, 16)
        assert torch.equal(module(x), module(x)) != noisy, codes
    whole = models.build(nac, "student").train()  # the circuit's own codes are shaken
    assert not torch.equal(whole.read_in.jitter(torch.ones(2, 3)), torch.ones(2, 3))


def test_distinct_images_of_a_process_under_repeated_augmentation(npz):
    c = config(npz, data=dict(root=str(npz), image_size=16, workers=0, validation_images=0))
    images = data.load(c, "train", "meta")
    images.labels, c["data"]["classes"] = torch.arange(40), 40  # to tell them apart

    def labels(rank, world, batch):
        c["train"]["meta"] |= dict(batch=batch, accumulate=1)
        batches = data.train_batches(images, c, "meta", 0, data.Setup(CPU, rank, world))
        return [targets.argmax(-1).tolist() for _, targets in batches]

    c["data"]["repeats"] = 3
    # The three copies of an image stand side by side and go to three processes: each holds four different
    # images in a batch of four, the same ones as its neighbors.
    for batches in zip(*[labels(rank, 3, 4) for rank in range(3)]):
        assert all(len(set(batch)) == 4 for batch in batches) and batches[0] == batches[1] == batches[2]
    c["data"]["repeats"] = 1  # a process has a block of the batch
    assert sum([labels(rank, 3, 4)[0] for rank in range(3)], []) == labels(0, 1, 12)[0]


def test_no_validation_images(npz):
    c = config(npz, data=dict(root=str(npz), image_size=16, workers=0, validation_images=0))
    assert len(data.load(c, "train")) == 40 and len(data.load(c, "validation")) == 0
