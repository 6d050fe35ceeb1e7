"""Promises of single options: student.start, distill.stitches, distill.finetune_alpha, train.<stage>.passes, compile."""

from pathlib import Path

import pytest
import torch

import data
import models
from test_runs import CONFIG, log, run, shell, weights, write_config

PLAIN = {**CONFIG["data"], "mixup": 0, "cutmix": 0}


def test_a_student_is_finetuned_from_any_weights_in_place_of_assembled_modules(tmp_path):
    path = write_config(tmp_path, data=PLAIN)
    run("finetune", path, "role=baseline")
    words = [f"student.start={tmp_path / 'run/baseline.pt'}", f"output_dir={tmp_path / 'more'}"]
    run("finetune", path, *words, "train.student.epochs=0")
    assert torch.equal(weights(tmp_path / "more/student.pt"), weights(tmp_path / "run/baseline.pt"))
    text = run("finetune", path, *words, "student.start=none.pt", "force=true", expect=2)
    assert "none.pt" in text.splitlines()[-1] and "Traceback" not in text, text


def test_assembly_calls_fresh_what_no_module_has_taught_and_folded_stitches_are_taught(tmp_path):
    none = {stage: {**CONFIG["train"][stage], "epochs": 0} for stage in CONFIG["train"]}
    path = write_config(tmp_path, "nac", train=none, distill={"alpha": 0, "stitches": "fold"})
    run("finetune", path, "role=meta")
    run("distill_module", path)
    names = run("assemble", path).split("fresh tensors: ")[1].split()
    assert names == ["input_latents.signatures,", "mediator_latents.signatures,", "output_latents.signatures"]
    assert "stitches.1.weight" in torch.load(tmp_path / "run/student_assembled.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A run that is finished up to the student's modules, each stage after no step -> the path of its config."""
    folder = tmp_path_factory.mktemp("distilled")
    path = write_config(folder, train={stage: {**CONFIG["train"][stage], "epochs": int(stage == "student")}
                                       for stage in CONFIG["train"]})
    for script, role in (("finetune", "meta"), ("distill_module", "teacher"), ("assemble", "teacher"),
                         ("finetune", "teacher"), ("distill_module", "student")):
        run(script, path, f"role={role}")
    return path


def finetuned(distilled, *words):
    """The student's weights after assembly and finetuning in another folder; what comes before is shared."""
    assert "finished; skipped" in run("distill_module", distilled, *words)   # another finetuning, the same modules
    run("assemble", distilled, *words)
    run("finetune", distilled, *words)
    return weights(Path(dict(word.split("=") for word in words)["output_dir"], "student.pt"))


def test_stitches_begin_alike_whether_they_will_be_kept_or_not(tmp_path):
    start = []
    for stitches in ("drop", "keep"):
        config = models.load_config(write_config(tmp_path), [f"distill.stitches={stitches}"])
        start.append([module.state_dict() for module in models.cut(models.build(config, "student"), config, "student")])
    for drop, keep in zip(*start, strict=True):
        assert drop.keys() == keep.keys() and all(torch.equal(drop[name], keep[name]) for name in drop)


def test_a_classifier_is_carried_over_only_to_the_same_classes(distilled, tmp_path):
    for target, fresh in ({"target.image_size": 24}, False), ({"target.set": "lower_case", "target.classes": 4}, True):
        words = [f"share={distilled.parent / 'run'}", f"output_dir={tmp_path / str(fresh)}",
                 *(f"{key}={value}" for key, value in target.items())]
        assert ("head.weight" in run("assemble", distilled, *words)) == fresh
        # nor can a teacher of the ones tell the others
        text = run("assemble", distilled, *words, "distill.finetune_alpha=0.5", "force=true", expect=2 * fresh)
        assert ("finetune_alpha" in text) == fresh
    assert "role=baseline_kd" in run("finetune", distilled, *words, "role=baseline_kd", expect=2)


def test_with_finetune_alpha_1_the_student_learns_from_the_teacher_alone(distilled, tmp_path):
    result = {}
    for alpha in (1, 0.5):
        words = [f"share={distilled.parent / 'run'}", f"output_dir={tmp_path / str(alpha)}", f"distill.finetune_alpha={alpha}"]
        result[alpha, 0] = finetuned(distilled, *words)
        run("finetune", distilled, *words, "train.student.wrong_labels=1", "force=true")
        result[alpha, 1] = weights(tmp_path / f"{alpha}/student.pt")
    assert torch.equal(result[1, 0], result[1, 1])
    assert not torch.equal(result[0.5, 0], result[0.5, 1])
    assert not torch.equal(result[1, 0], weights(tmp_path / "1/student_assembled.pt"))


def test_only_a_finetuning_with_a_teacher_needs_the_teachers_weights(distilled, tmp_path):
    words = [f"share={distilled.parent / 'run'}", f"output_dir={tmp_path / 'run'}"]
    expected, teacher = finetuned(distilled, *words), distilled.parent / "run/teacher.pt"
    teacher.rename(tmp_path / "teacher.pt")
    try:
        run("finetune", distilled, *words, "force=true")
        assert torch.equal(weights(tmp_path / "run/student.pt"), expected)
        words += [f"output_dir={tmp_path / 'half'}", "distill.finetune_alpha=0.5"]
        run("assemble", distilled, *words)
        assert "teacher.pt is not there yet" in run("finetune", distilled, *words, expect=2)
    finally:
        (tmp_path / "teacher.pt").rename(teacher)


def test_an_epoch_of_three_passes_sees_each_image_of_its_range_three_times(tmp_path):
    config = models.load_config(write_config(tmp_path), ["train.meta.images=[5, 25]", "train.meta.passes=3", "train.meta.batch=6",
                                                         "train.meta.accumulate=1", "data.pad=0", "data.mixup=0", "data.cutmix=0"])
    train, every = data.load(config, "train", "meta"), data.load(config, "train")
    assert len(train) == 60 and torch.equal(train.labels, every.labels[5:25].repeat(3))
    seen = torch.cat([x for x, _ in data.train_batches(train, config, "meta", 0, data.setup("cpu"))])
    _, counts = seen.flatten(1).unique(dim=0, return_counts=True)
    assert counts.tolist() == [3] * 20


@pytest.mark.slow
@pytest.mark.parametrize("student", ["vmoe", "nac"])
def test_compiled_every_stage_trains_to_the_same_weights(tmp_path, student):
    """Without noise, for compiled code draws other random numbers."""
    plain = {stage: {**CONFIG["train"][stage], "drop_path": 0, "epochs": 1} for stage in CONFIG["train"]}
    result = []
    for name in ("false", "true"):
        path = write_config(tmp_path / name, student, data=PLAIN, train=plain)
        for script, role in (("finetune", "meta"), ("distill_module", "teacher"), ("distill_module", "student")):
            done = shell("python", f"{script}.py", "--config", path, f"role={role}", f"compile={name}", "distill.alpha=0",
                         timeout=1200)
            assert done.returncode == 0, done
        result.append((tmp_path / name / "run", log(tmp_path / name / "run")))
    (eager, lines), (compiled, other) = result
    assert [line["stage"] for line in lines] == [line["stage"] for line in other]
    for name in ("meta.pt", *(f"teacher_modules/{i}.pt" for i in range(3))):
        a, b = weights(eager / name), weights(compiled / name)
        assert (a - b).norm() < 1e-3 * a.norm(), name
    assert all(torch.isfinite(weights(f)).all() for f in compiled.rglob("?.pt"))
