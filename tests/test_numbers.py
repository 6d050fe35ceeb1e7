"""Promise: what can go wrong with numbers, classes, batches and sizes is handled or refused by rule.

What processes, disks and signals can do is in test_runs.py.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import data
import models
from conftest import ROOT
from test_bad_input import command, here, refused, write_folder  # noqa: F401


@pytest.mark.parametrize("value, clip", [
    (torch.nan, 0), (torch.nan, 1), (torch.inf, 0), (torch.inf, 1), (1e25, 1), (3e38, 1),
    (1e25, 0), (3e38, 0)])
@pytest.mark.parametrize("stage", ["meta", "incubate"])
def test_a_gradient_that_overflows_is_never_saved(here, capsys, monkeypatch, value, clip, stage):  # noqa: F811
    """The square of 1e25 is infinite in AdamW: unseen, the parameter would never move again."""
    script, role, name = {"meta": ("finetune", "meta", "meta.pt"),
                          "incubate": ("distill_module", "teacher", "teacher_modules/0.pt")}[stage]
    if script == "distill_module":
        assert command("finetune", "--config", "c.yaml", "role=meta") == 0
    step = models.Stage.step

    def overflow(self):
        module = next(iter(self.modules.values()))
        next(p.grad for p in module.parameters() if p.grad is not None).view(-1)[0] = value
        step(self)

    monkeypatch.setattr(models.Stage, "step", overflow)
    words = [f"role={role}", f"train.{stage}.clip={clip}"]
    if value in (1e25, 3e38) and clip:  # the norm is infinite too, so the clipped step is one of zeros
        assert command(script, "--config", "c.yaml", *words) == 0
        assert all(v.isfinite().all() for v in models.read(here / "runs/c" / name)["model"].values())
        return
    refused(capsys, ["not finite", "step"], script, *words)
    assert not (here / "runs/c" / name).exists() and not list((here / "runs/c").rglob("*unfinished.pt"))


def nac(**student):
    base = dict(kind="nac", width=16, heads=2, head_width=8, latents=[4, 16, 2], propagators=1, grid_width=4,
                tokenizer_blocks=1)
    flat = models.flatten({"student": base | student, "data": {"image_size": 16, "classes": 4}})
    return models.unflatten({key: default for key, (_, default) in models.KEYS.items()} | flat)


@pytest.mark.parametrize("training", [False, True])
def test_a_latent_with_no_sender_hears_all_alike_and_all_stays_finite(training):
    """A signature of zeros is at distance 1 from all, its own too: every pair is truncated."""
    model = models.build(nac(), "student").train(training)
    with torch.no_grad():
        model.mediator_latents.signatures[3] = 0
    delta = models.distance(model.mediator_latents.signatures, model.mediator_latents.signatures)
    assert (delta[3] > models.TRUNCATION).all()
    if not training:
        kernel = models.log_kernel(delta, torch.tensor(1.0)).softmax(-1)
        assert kernel[3].allclose(torch.full((16,), 1 / 16))
        assert (kernel[0][delta[0] > models.TRUNCATION] == 0).all()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model(torch.randn(2, 3, 16, 16)).isfinite().all()


def test_any_other_latent_hears_itself():
    signatures = torch.randn(200, 64)
    assert (models.distance(signatures, signatures).diagonal() < 1e-5).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_a_router_that_collapses_works_on_and_shows_in_the_load(training, capacity):
    torch.manual_seed(0)
    moe = models.MoE(8, 16, experts=4, top_k=1, balance=0.01, capacity=capacity).train(training)
    models.init_linear(moe, 0.5)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.bias.copy_(torch.tensor([50.0, 0, 0, 0]))
    x = torch.randn(3, 5, 8, requires_grad=True)
    out = moe(x)
    (out.sum() + (moe.aux if training else 0)).backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in (x, *moe.parameters()))
    if training:
        assert moe.load.tolist() == [1, 0, 0, 0] and moe.aux > 0
    if training and capacity:  # of 15 tokens the full expert takes ⌈15 / 4⌉ = 4
        assert (out.view(15, 8).abs().sum(1) > 0).tolist() == [True] * 4 + [False] * 11


def test_a_balanced_router_has_a_finite_gradient():
    moe = models.MoE(8, 16, experts=4, balance=0.01).train()
    logits = torch.zeros(6, 4, requires_grad=True)
    moe.auxiliary_loss(logits, logits[:, :1]).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("count, batch", [(1, 256), (5, 4), (7, 7), (13, 1), (2, 300)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_is_evaluated_once_whatever_the_batch_and_the_processes(here, count, batch, world):  # noqa: F811
    """Last batches of one, batches larger than the set, processes without an image."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    images = data.ImageSet(list(range(count)), "abcdefghijklm"[:max(2, count)], images)
    config, seen = models.load_config("c.yaml"), []
    for rank in range(world):
        process = data.Setup(torch.device("cpu"), rank, world)
        for x, labels in data.eval_batches(images, config, process, batch):
            assert len(x) == len(labels)
            seen += labels.tolist()
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("batch, steps", [(1, 32), (31, 1), (32, 1), (33, None)])
def test_a_training_batch_is_whole_and_one_larger_than_the_set_is_refused(here, capsys, batch, steps):  # noqa: F811
    """A batch of one trains too; what does not fill a batch waits for another epoch's order."""
    words = ["role=meta", f"train.meta.batch={batch}", "data.mixup=0.8"]
    if steps is None:
        return refused(capsys, ["train.meta.batch", "33", "32"], "finetune", *words)
    assert command("finetune", "--config", "c.yaml", *words) == 0
    assert json.loads((here / "runs/c/log.jsonl").read_text())["step"] == steps


@pytest.mark.parametrize("words, names", [
    (["data.image_size=20"], ["image_size=20", "meta's patch"]),
    (["data.image_size=20", "meta.patch=4", "teacher.patch=4"], ["image_size=20", "stride 8"]),
    (["target.image_size=20", "meta.patch=4", "teacher.patch=4"], ["image_size=20", "stride 8"])])
def test_an_image_size_that_does_not_divide_is_refused(here, capsys, words, names):  # noqa: F811
    refused(capsys, names, "finetune", "role=meta", *words)


def test_an_empty_class_is_refused_in_training_and_left_out_of_a_robustness_set(here, capsys):  # noqa: F811
    write_folder(here / "set", classes=("a", "b", "c"))
    words = ["role=meta", "data.set=folder", "data.root=set", "data.classes=null", "data.train_images=0",
             "data.test_images=0", "data.validation_images=4"]
    assert command("finetune", "--config", "c.yaml", *words) == 0
    shutil.copytree(here / "set/val", here / "drawings")
    shutil.rmtree(here / "drawings/b")
    assert command("evaluate", "--config", "c.yaml", *words, "data.robustness=[drawings]") == 0
    assert "drawings: 2 of 3 classes are present" in capsys.readouterr().out
    shutil.rmtree(here / "set/train/b")
    (here / "set/train/b").mkdir()
    refused(capsys, "set/train/b", "finetune", *words, "output_dir=again")


def test_a_graph_without_links_is_fitted():
    """Erdős–Rényi graphs of few mediators may have none."""
    linked = torch.zeros(4, 4, dtype=torch.bool)
    near, far = models.fit_signatures(torch.zeros(4, 8), linked.numpy(), steps=3)
    assert near == 1 and 0 <= far <= 1


@pytest.mark.slow
def test_bfloat16_and_float32_agree_on_the_demo(tmp_path):
    """Validation top-1 of the demo's meta model, after 8 epochs."""
    top1 = {}
    for precision in ("float32", "bfloat16"):
        words = ["train.meta.epochs=8", f"precision={precision}", f"output_dir={tmp_path / precision}"]
        line = [sys.executable, "finetune.py", "--config", "configs/demo_nac.yaml", "role=meta", *words]
        subprocess.run(line, cwd=ROOT, check=True)
        lines = (tmp_path / precision / "log.jsonl").read_text().splitlines()
        top1[precision] = json.loads(lines[-1])["val_top1"]
    assert top1["float32"] > 60 and abs(top1["float32"] - top1["bfloat16"]) < 5, top1


def test_in_bfloat16_the_kernel_stays_float32_and_every_gradient_finite():
    """In bfloat16 1 − ε is 1: the kernel of a latent with itself would have an infinite logit."""
    model = models.build(nac(), "student").train()
    signatures = model.mediator_latents.signatures
    with torch.no_grad():
        signatures[1] = signatures[0]
    with torch.autocast("cpu", torch.bfloat16):
        delta = models.distance(signatures, signatures)
        assert delta.dtype == torch.float32
        assert models.log_kernel(delta, torch.tensor(1.0), sample=3).isfinite().all()
        loss = model(torch.randn(4, 3, 16, 16)).float().logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert signatures.grad.norm() > 0
