"""Promises of single options: student.start, distill.stitches, distill.finetune_alpha, train.<stage>.validate, compile."""

from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("script, stage", [("finetune", "meta"), ("distill_module", "incubate")])
def test_a_validation_every_second_epoch_and_after_the_last_leaves_the_training_alone(distilled, tmp_path, script, stage):
    role = "meta" if stage == "meta" else "teacher"
    results, lines = {}, {}
    for validate in (1, 2):
        folder = tmp_path / str(validate)
        run(script, distilled, f"role={role}", f"share={distilled.parent / 'run'}", f"output_dir={folder}",
            f"train.{stage}.epochs=3", f"train.{stage}.validate={validate}")
        results[validate] = [weights(file) for file in sorted(folder.rglob("[m012]*.pt")) if "unfinished" not in file.name]
        lines[validate] = log(folder)
    assert [line["epoch"] for line in lines[2] if "val_top1" in line] == [2, 3] * (1 if role == "meta" else 3)
    assert all("val_top1" in line for line in lines[1])
    assert len(results[1]) == len(results[2]) == (1 if role == "meta" else 3)
    assert all(torch.equal(a, b) for a, b in zip(*results.values()))
    without = [[{k: v for k, v in line.items() if k != "val_top1"} for line in some] for some in lines.values()]
    assert without[0] == without[1]


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
