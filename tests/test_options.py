"""Promises of single options: compile, student.start."""

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
