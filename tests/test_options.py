"""Promises of single options and of what a config is read as:

  - texts stay texts (010, 2024-05-01, a #3), ~ is the home folder, an emptied block means its defaults;
  - train.*.epochs=1 sets every stage; role=student and --role student are the same;
  - student.start, assemble.stitches, train.student.alpha, train.<stage>.passes and compile do what they say.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

import data
import models
from test_runs import CONFIG, PIPELINE, STAGES, STUDENTS, log, run, shell, weights, write_config

PLAIN = {**CONFIG["data"], "mixup": 0, "cutmix": 0}

# ---------- What a config is read as


@pytest.fixture
def read(tmp_path):
    """Reads a config with overrides, or with another YAML text."""
    def read(*overrides, text=None):
        path = write_config(tmp_path, "nac")
        if text is not None:
            path.write_text(text)
        return models.load_config(path, overrides)
    return read


TEXTS = ["a #3", "2024-05-01", "12:30", "010", "0x1f", "1e3", "5", "true", "a: b", "a, b", "'quoted'", "é",
         "*x", "yes", ".inf", "~x", "{a: 1}", "a=b", " a", "#"]


@pytest.mark.parametrize("text", TEXTS)
def test_an_override_of_a_text_is_taken_as_it_stands(read, text):
    config = read(f"output_dir={text}", f"data.root={text}", f"meta.checkpoint={text}")
    assert config["output_dir"] == config["data"]["root"] == config["meta"]["checkpoint"] == text


def test_the_home_folder_is_expanded_and_null_is_nothing(read):
    assert read("output_dir=~/x")["output_dir"] == f"{os.environ['HOME']}/x"
    assert read("output_dir=null")["output_dir"] == "runs/nac"
    assert read("meta.checkpoint=null")["meta"]["checkpoint"] is None


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
        with pytest.raises(models.UserError, match="compile=.* must be bool"):
            read(f"compile={text}")


def test_a_key_twice_is_an_error_and_aliases_are_none(read):
    with pytest.raises(models.UserError, match="epochs stands twice"):
        read(text="train: {meta: {epochs: 1, epochs: 2}}")
    config = read(text="train: {meta: &a {lr: 0.1}, teacher: *a}")
    assert config["train"]["meta"]["lr"] == config["train"]["teacher"]["lr"] == 0.1
    assert read(text="data: {robustness: &a [renditions]}\ntarget: {robustness: *a}")["target"]["robustness"]


@pytest.mark.parametrize("text", ["data:", "data: {}", "data: ~", "train:\n  meta:\n", "few_shot:\nteacher:"])
def test_an_emptied_block_means_its_defaults(read, text):
    assert read(text=text) == read(text="{}")


def test_a_star_sets_the_key_in_every_stage_and_the_last_override_counts(read):
    train = read("train.*.epochs=1", "train.meta.epochs=7", "train.*.lr=0.25", "*.alpha=0.75")["train"]
    assert {stage: train[stage]["epochs"] for stage in STAGES} == {s: 7 if s == "meta" else 1 for s in STAGES}
    assert all(train[stage]["lr"] == 0.25 for stage in STAGES) and train["student"]["alpha"] == 0.75
    with pytest.raises(models.UserError, match=r"train\.\*\.epoch is not a key"):
        read("train.*.epoch=1")


def test_a_default_is_a_new_value_each_time(read):
    config = read(text="{}")
    config["data"]["robustness"].append("renditions")
    config["meta"]["depths"].append(1)
    assert read(text="{}")["data"]["robustness"] == [] and read(text="{}")["meta"]["depths"] == [1, 1, 1]


def test_options_work_with_dashes_and_without(tmp_path, capsys, monkeypatch):
    path, read = str(write_config(tmp_path, "nac")), []
    for words in (["role=teacher", "module=2", "seed=5"], ["--role", "teacher", "seed=5", "--module", "2"],
                  ["seed=5", "--role=teacher", "--module=2"]):
        monkeypatch.setattr(sys, "argv", ["x.py", *words, "--config", path])
        read.append(models.command_line("", ("student", "teacher"), module=dict(type=int)))
        assert (read[-1][1].role, read[-1][1].module, read[-1][0]["seed"]) == ("teacher", 2, 5)
    assert read[0] == read[1] == read[2]


# ---------- Stages


def test_a_student_is_finetuned_from_any_weights_in_place_of_assembled_modules(tmp_path):
    path = write_config(tmp_path, data=PLAIN)
    run("finetune", path, "role=baseline")
    words = [f"student.start={tmp_path / 'run/baseline.pt'}", f"output_dir={tmp_path / 'more'}"]
    run("finetune", path, *words, "train.student.epochs=0")
    assert torch.equal(weights(tmp_path / "more/student.pt"), weights(tmp_path / "run/baseline.pt"))
    text = run("finetune", path, "student.start=none.pt", f"output_dir={tmp_path / 'none'}", expect=2)
    assert "none.pt" in text.splitlines()[-1] and "Traceback" not in text, text


@pytest.mark.parametrize("kind, fresh", [
    ("nac", "tokenizer.grid, pool.to_logits.weight, pool.to_logits.bias"),
    ("vmoe", "head.weight, head.bias")])
def test_a_whole_student_is_carried_to_other_classes_and_another_size(tmp_path, kind, fresh):
    path = write_config(tmp_path, kind, data=PLAIN)
    run("finetune", path, "role=baseline")
    words = [f"student.start={tmp_path / 'run/baseline.pt'}", "train.student.epochs=0"]
    other = ["target.image_size=24", "target.classes=3", f"output_dir={tmp_path / 'other'}"]
    assert f"fresh tensors: {fresh}\n" in run("finetune", path, *words, *other)
    old, new = (models.read(tmp_path / f)["model"] for f in ("run/baseline.pt", "other/student.pt"))
    same = [name for name in old if old[name].shape == new[name].shape and torch.equal(old[name], new[name])]
    assert set(old) - set(same) <= {*fresh.split(", "), "pos_embed"}
    # On its own set a student of other sizes is refused.
    text = run("finetune", path, *words, "data.classes=3", f"output_dir={tmp_path / 'no'}", expect=2)
    assert "baseline.pt" in text


def test_assembly_calls_fresh_what_no_module_has_taught_and_folded_stitches_are_taught(tmp_path):
    path = write_config(tmp_path, "nac")
    words = ["train.*.epochs=0", "distill.alpha=0", "assemble.stitches=fold"]
    run("finetune", path, "role=meta", *words)
    run("distill_module", path, *words)
    names = run("assemble", path, *words).strip().split("fresh tensors: ")[1].split(", ")
    assert names == [*(f"{kind}_latents.signatures" for kind in ("input", "mediator", "output")),
                     *(f"{part}.attention.bandwidth" for part in ("propagators.0", "read_out"))]
    assert "stitches.1.weight" in models.read(tmp_path / "run/student_assembled.pt")["model"]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A run that is finished up to the student's modules, each after no step -> the path of its config."""
    folder = tmp_path_factory.mktemp("distilled")
    path = write_config(folder, train={stage: {**CONFIG["train"][stage], "epochs": int(stage == "student")}
                                       for stage in STAGES})
    for script, role in (("finetune", "meta"), ("distill_module", "teacher"), ("assemble", "teacher"),
                         ("finetune", "teacher"), ("distill_module", "student")):
        run(script, path, f"role={role}")
    return path


def shared(distilled, folder):
    """Overrides that take the stages of that run into another folder."""
    return [f"share={distilled.parent / 'run'}", f"output_dir={folder}"]


def finetuned(distilled, *words, before=None):
    """The student's weights after assembly and fine-tuning in another folder; what comes before is shared."""
    assert "finished; skipped" in run("distill_module", distilled, *words)
    run("assemble", distilled, *words)
    run("finetune", distilled, *words, before=before)
    return weights(Path(words[1].removeprefix("output_dir="), "student.pt"))


def test_stitches_begin_alike_whether_they_will_be_kept_or_not(tmp_path):
    start = []
    for stitches in ("drop", "keep"):
        config = models.load_config(write_config(tmp_path), [f"assemble.stitches={stitches}"])
        modules = models.cut(models.build(config, "student"), config, "student")
        start.append([module.state_dict() for module in modules])
    for drop, keep in zip(*start, strict=True):
        assert drop.keys() == keep.keys() and all(torch.equal(drop[name], keep[name]) for name in drop)


def test_a_classifier_is_carried_over_only_to_the_same_classes(distilled, tmp_path):
    words = [*shared(distilled, tmp_path / "size"), "target.image_size=24"]
    assert "head.weight" not in run("assemble", distilled, *words)
    words = [*shared(distilled, tmp_path / "classes"), "target.set=lower_case", "target.classes=4"]
    assert "head.weight" in run("assemble", distilled, *words)
    # Nor can a teacher of the ones tell the others.
    for more in ("train.student.alpha=0.5", "role=baseline_kd"):
        assert "need a teacher of the same classes" in run("finetune", distilled, *words, more, expect=2)


@pytest.mark.parametrize("more", ["train.student.alpha=0.5", "role=baseline_kd"])
def test_a_teacher_of_the_same_classes_teaches_on_images_of_another_size(distilled, tmp_path, more):
    words = [*shared(distilled, tmp_path), "target.image_size=24"]
    run("assemble", distilled, *words)
    run("finetune", distilled, *words, more)


def shift_labels():
    load = data.load

    def shifted(*args):
        images = load(*args)
        images.labels = (images.labels + 1) % 4
        return images
    data.load = shifted


def test_with_student_alpha_1_the_student_learns_from_the_teacher_alone(distilled, tmp_path):
    result = {}
    for alpha in (1, 0.5):
        for lie in (None, shift_labels):
            words = [*shared(distilled, tmp_path / f"{alpha}{bool(lie)}"), f"train.student.alpha={alpha}"]
            result[alpha, bool(lie)] = finetuned(distilled, *words, before=lie)
    assert torch.equal(result[1, False], result[1, True])
    assert not torch.equal(result[0.5, False], result[0.5, True])
    assert not torch.equal(result[1, False], weights(tmp_path / "1False/student_assembled.pt"))


def test_only_a_finetuning_with_a_teacher_needs_the_teachers_weights(distilled, tmp_path):
    expected = finetuned(distilled, *shared(distilled, tmp_path / "run"))
    teacher = distilled.parent / "run/teacher.pt"
    teacher.rename(tmp_path / "teacher.pt")
    try:
        assert torch.equal(finetuned(distilled, *shared(distilled, tmp_path / "again")), expected)
        words = [*shared(distilled, tmp_path / "half"), "train.student.alpha=0.5"]
        run("assemble", distilled, *words)
        assert "teacher.pt is not there yet" in run("finetune", distilled, *words, expect=2)
    finally:
        (tmp_path / "teacher.pt").rename(teacher)


def test_an_epoch_of_three_passes_sees_each_image_of_its_range_three_times(tmp_path):
    words = ["images=[5, 25]", "passes=3", "batch=6", "accumulate=1"]
    config = models.load_config(write_config(tmp_path, data={**PLAIN, "pad": 0}),
                                [f"train.meta.{word}" for word in words])
    train, every = data.load(config, "train", "meta"), data.load(config, "train")
    assert len(train) == 60 and torch.equal(train.labels, every.labels[5:25].repeat(3))
    seen = torch.cat([x for x, _ in data.train_batches(train, config, "meta", 0, data.setup("cpu"))])
    _, counts = seen.flatten(1).unique(dim=0, return_counts=True)
    assert counts.tolist() == [3] * 20


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
@pytest.mark.parametrize("student", STUDENTS)
def test_compiled_every_stage_trains_to_the_same_weights(tmp_path, student):
    """Without noise, because compiled code draws other random numbers."""
    plain = {stage: {**CONFIG["train"][stage], "drop_path": 0, "epochs": 1} for stage in STAGES}
    result = []
    for name in ("false", "true"):
        path = write_config(tmp_path / name, student, data=PLAIN, train=plain)
        for script, role in (PIPELINE[k] for k in (0, 1, 4)):
            done = shell(sys.executable, f"{script}.py", "--config", path, f"role={role}", f"compile={name}",
                         "distill.alpha=0", timeout=1200)
            assert done.returncode == 0, done
        result.append((tmp_path / name / "run", log(tmp_path / name / "run")))
    (eager, lines), (compiled, other) = result
    assert [line["stage"] for line in lines] == [line["stage"] for line in other]
    for name in ("meta.pt", *(f"teacher_modules/{i}.pt" for i in range(3))):
        a, b = weights(eager / name), weights(compiled / name)
        assert (a - b).norm() < 1e-3 * a.norm(), name
    assert all(torch.isfinite(weights(f)).all() for f in compiled.rglob("?.pt"))
