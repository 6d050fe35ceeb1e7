"""Promises of few-shot evaluation: support and query are disjoint, only a linear classifier is trained.

Episodes depend on the seed alone. Features are what the model's own classifier is given. The result is a mean
with an interval, the same from any number of processes, on any set at the model's image size.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import models
from test_runs import CONFIG, STUDENTS, run, run_processes, write_config

# 10 images of each of 14 letters
FEW = {"set": "lower_case", "images": 140, "ways": 3, "shots": [1, 2], "episodes": 20}
PLAIN = {**CONFIG["data"], "robustness": []}


def test_episodes_are_seeded_disjoint_and_complete():
    labels = np.arange(90) % 9
    labels[labels == 8] = 7  # classes 0–6 have 10 images, 7 has 20
    support, query = data.episodes(labels, ways=4, shots=2, queries=6, count=20, seed=1)
    assert support.shape == (20, 8) and query.shape == (20, 24)
    for s, q in zip(support, query):
        classes = labels[s].reshape(4, 2)[:, 0]
        assert len(set(classes)) == 4
        assert labels[s].tolist() == classes.repeat(2).tolist()
        assert labels[q].tolist() == classes.repeat(6).tolist()
        assert len(set(s) | set(q)) == 4 * 8  # no image twice, none in both
    again, other = (data.episodes(labels, 4, 2, 6, 20, seed) for seed in (1, 2))
    assert (again[0] == support).all() and (again[1] == query).all() and not (other[0] == support).all()
    assert len({tuple(sorted(labels[s])) for s in support}) > 5
    with pytest.raises(models.UserError, match="few_shot.ways=4, but 1 classes have the 11 images"):
        data.episodes(labels, 4, 2, 9, 1, seed=1)


def test_the_probe_learns_what_the_support_tells_and_nothing_else():
    torch.manual_seed(0)
    centers = torch.randn(6, 3, 1, 32)  # E ways 1 D

    def near(n):
        return (centers + 0.1 * torch.randn(6, 3, n, 32)).flatten(1, 2)

    assert evaluate.linear_probe(near(1), near(7), 3).all()
    # Support whose classes stand in another order teaches other labels: not one query is right.
    moved = near(1)[:, [1, 2, 0]]
    assert not evaluate.linear_probe(moved, near(7), 3)[..., 0].any()
    chance = evaluate.linear_probe(torch.randn(200, 8, 32), torch.randn(200, 24, 32), 8)
    assert chance.float().mean((0, 1)).tolist() == pytest.approx([1 / 8, 5 / 8], abs=0.03)


def test_every_episode_is_its_own():
    torch.manual_seed(0)
    support, query = torch.randn(4, 6, 16), torch.randn(4, 9, 16)
    together = evaluate.linear_probe(support, query, 3)
    for one, (s, q) in zip(together, zip(support, query)):
        assert torch.equal(evaluate.linear_probe(s[None], q[None], 3)[0], one)


@pytest.mark.parametrize("student", STUDENTS)
def test_features_are_what_the_classifier_is_given(tmp_path, student):
    config = models.load_config(write_config(tmp_path, student, few_shot=FEW))
    model, process = models.build(config, "student").eval(), data.setup("cpu")
    images = data.load(config, "test")
    classifier = model.pool.to_logits if student == "nac" else model.head
    kept, features = [], evaluate.features_of(model, images, config, process)
    classifier.forward = lambda x: kept.append(x) or x
    with torch.no_grad():
        model(next(data.eval_batches(images, config, process))[0])
    assert torch.allclose(features, F.layer_norm(kept[0], kept[0].shape[1:]), atol=1e-6)


def test_the_command_keeps_mean_and_interval_the_same_from_any_number_of_processes(tmp_path):
    path = write_config(tmp_path, few_shot=FEW, data=PLAIN)
    run("finetune", path, "role=meta")
    results = []
    for world in (1, 3):
        text, *_ = run_processes(world, "evaluate", path, "role=meta")
        assert "meta, few-shot lower_case 2-shot 3-way: top-1" in text and "% of 140 images" in text
        results.append(json.loads((tmp_path / "run/results.json").read_text()))
    _, one, two = results[0]
    assert [few["set"] for few in (one, two)] == [f"few-shot lower_case {n}-shot 3-way" for n in (1, 2)]
    for few in (one, two):
        assert few["episodes"] == 20 and few["images"] == 140 and 0 < few["ci95"] < 20 and few["top5"] == 100
    for a, b in zip(*results):
        assert a["set"] == b["set"] and a["top1"] == pytest.approx(b["top1"], abs=0.5)


def write_cifar100(root):
    """8 images of each of 5 classes, 32×32: the model sees them at its own 16×16."""
    records = np.random.default_rng(0).integers(0, 256, (40, 3074), dtype=np.uint8)
    records[:, 1] = np.arange(40) % 5
    records.tofile(root / "test.bin")


def write_cub(root):
    """8 test images of each of 4 classes, of many sizes; one of a fifth class, too few; one to train on."""
    lines = []
    for k in range(34):
        name = f"{k % 4 + 1 if k < 32 else 5:03d}.Bird/{k}.jpg"
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + k, 30), (5 * k, 90, 50)).save(root / "images" / name)
        lines.append((k + 1, name, int(name[:3]), int(k == 33)))
    for column, name in enumerate(("images", "image_class_labels", "train_test_split"), 1):
        (root / f"{name}.txt").write_text("".join(f"{line[0]} {line[column]}\n" for line in lines))


@pytest.mark.parametrize("name, write, images", [("cifar100", write_cifar100, 40), ("cub", write_cub, 33)])
def test_the_sets_of_the_paper_are_asked_at_the_model_s_size(tmp_path, name, write, images):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set")
    few_shot = {**FEW, "set": name, "root": str(tmp_path / "set"), "images": 0}
    path = write_config(tmp_path, few_shot=few_shot, data=PLAIN)
    run("finetune", path, "role=meta")
    run("evaluate", path, "role=meta")
    few = json.loads((tmp_path / "run/results.json").read_text())[1:]
    assert [r["set"] for r in few] == [f"few-shot {name} {shots}-shot 3-way" for shots in (1, 2)]
    assert all(r["images"] == images and 0 <= r["top1"] <= 100 for r in few)
    assert "few_shot" in run("evaluate", path, "role=meta", "few_shot.ways=6", expect=2)


@pytest.mark.parametrize("word, names", [
    ("few_shot.ways=15", "few_shot.ways=15"), ("few_shot.shots=[3]", "few_shot.shots"),
    ("few_shot.set=cub", "one that holds cub")])
def test_what_cannot_be_asked_is_one_sentence(tmp_path, word, names):
    path = write_config(tmp_path, few_shot=FEW, data=PLAIN)
    run("finetune", path, "role=meta")
    text = run("evaluate", path, "role=meta", word, expect=2)
    assert names in text.splitlines()[-1] and "Traceback" not in text, text
