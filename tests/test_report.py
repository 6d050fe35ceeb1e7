"""Promises of evaluate.py --report, on folders that are written here; nothing is trained:

  - one run: an aligned table, a verdict in a sentence, and report.md with all columns;
  - several: Markdown, a row a name and role, mean ± sample standard deviation over seeds;
  - costs are those of the logs, of shared runs too, and an epoch that was run twice counts once.
"""

import json
import multiprocessing
import re

import pytest
import yaml

import evaluate
import models

CONFIG = """
data: {set: glyphs, image_size: 16, classes: 4, train_images: 32, validation_images: 8, test_images: 16}
meta: {patch: 8, width: 16, heads: 2, depths: [1, 1, 1]}
teacher: {patch: 8, width: 16, heads: 2, depths: [1, 1, 1]}
student: {kind: nac, width: 16, heads: 2, head_width: 8, latents: [4, 16, 2], propagators: 1}
train: {student: {epochs: 2}}
"""
TMAC = {"meta": 1, "incubate": 2, "teacher": 4, "distill": 8, "student": 16, "baseline": 3}  # of an epoch
STAGES = {"meta": 10, "incubate": 10, "teacher": 10, "distill": 10, "student": 2, "baseline": 2}  # epochs


def write_run(folder, top1, stages=(), *overrides):
    """Writes a run's folder: accuracies {role: {set: %}}, and for each stage so many epochs of 10 s."""
    folder.mkdir(parents=True)
    (folder / "c.yaml").write_text(CONFIG)
    config = models.load_config(folder / "c.yaml", [f"output_dir={folder}", *overrides])
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    results = [{"role": role, "set": name, "top1": value, "images": 100} for role, sets in top1.items()
               for name, value in sets.items()]
    (folder / "results.json").write_text(json.dumps(results))
    lines = []
    for stage, epochs in dict(stages).items():
        # A stage of modules writes a line each, with its share of the pass's seconds and multiply-adds.
        modules = range(2) if stage in ("incubate", "distill") else [stage]
        lines += [{"stage": stage, "module": module, "epoch": epoch, "seconds": 10 / len(modules),
                   "tmac": TMAC[stage] / len(modules)} for epoch in range(epochs) for module in modules]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def report(capsys):
    """-> lines of what is printed about these folders."""
    def report(*folders):
        capsys.readouterr()
        evaluate.report([str(folder) for folder in folders])
        return capsys.readouterr().out.splitlines()
    return report


def cells(lines, name):
    """{column: cell} of the row of that name in a table of Markdown."""
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    (row,) = (row for row in rows[2:] if row[0] == name)
    return dict(zip(rows[0], row, strict=True))


def test_seeds_are_one_row_of_mean_and_sample_std_and_other_names_another(tmp_path, report):
    for seed, top1 in enumerate((80.0, 84.0, 91.0)):
        write_run(tmp_path / f"a-s{seed}", {"student": {"test": top1}}, (), f"seed={seed}")
    for seed, top1 in ((0, 70.0), (2, 78.0), (9, 99.0)):
        sets = {"student": {"test": top1, "renditions": 30.0}}
        write_run(tmp_path / f"a-s{seed}-alone", sets, (), "distill.alpha=0", f"seed={seed}")
    lines = report(*(tmp_path / f"a-s{seed}" for seed in range(3)), tmp_path / "a-s0-alone")
    assert all(line.startswith("|") for line in lines) and not list(tmp_path.rglob("report.md"))
    plain, alone = cells(lines, "a student"), cells(lines, "a-alone student")
    # mean (80 + 84 + 91) / 3 = 85; deviations −5, −1, 6: sample variance 62 / 2 = 31, std 5.57
    assert (plain["seeds"], plain["test %"], plain["renditions %"]) == ("3", "85.0 ± 5.6", "–")
    assert (alone["seeds"], alone["test %"], alone["renditions %"]) == ("1", "70.0", "30.0")
    # against the first name, seed by seed: 70 − 80 of seed 0
    assert alone["against a"] == "-10.0"
    # of seeds 0 and 2 −10 and −13: mean −11.5, std 2.1; seed 9 has no partner
    alone = cells(report(*sorted(tmp_path.iterdir())), "a-alone student")
    assert (alone["seeds"], alone["against a"]) == ("3", "-11.5 ± 2.1")


def test_runs_of_one_name_differ_in_their_seed_and_what_was_made_with_it_alone(tmp_path, report):
    for seed in (1, 12):
        words = [f"seed={seed}", f"teacher.checkpoint={tmp_path}/t-s{seed}/t.pt", f"few_shot.images={seed}"]
        write_run(tmp_path / f"a-s{seed}", {"student": {"test": 80.0 + seed}}, (), *words)
    assert cells(report(*tmp_path.iterdir()), "a student")["test %"] == "86.5 ± 7.8"
    write_run(tmp_path / "a-s3", {"student": {"test": 1.0}}, (), "seed=3", "train.student.lr=1")
    with pytest.raises(models.UserError, match=r"train.student.lr was 0.0005 .*named a.* 1"):
        evaluate.report(sorted(tmp_path.iterdir()))


def test_costs_are_a_models_own_and_those_of_all_before(tmp_path, report):
    def cost(folder, role="student"):
        row = cells((folder / "report.md").read_text().splitlines(), role)
        return row["own TMAC"], row["all TMAC"], row["own s"]

    both = {"student": {"test": 80.0}, "baseline": {"test": 10.0}}
    plain = write_run(tmp_path / "a", both, STAGES)
    report(plain)
    # own: 10 epochs of m2mKD and 2 of fine-tuning, 10·8 + 2·16; before: 10·(1 + 2 + 4)
    assert cost(plain) == ("112", "182", "120") and cost(plain, "baseline") == ("6", "6", "20")
    # A run that shares stages counts them too, but not a stage of other settings.
    words = ["train.student.lr=1", f"share={plain}"]
    for name, stages, expected in (("b", {"student": 1}, ("96", "166", "110")),
                                   ("c", {}, ("80", "150", "100"))):
        other = write_run(tmp_path / name, {"student": {"test": 80.0}}, stages, *words)
        report(other)
        assert cost(other) == expected
    # Without a teacher, incubation and the teacher's training are not its cost.
    alone = write_run(tmp_path / "d", {"student": {"test": 80.0}}, STAGES, "distill.alpha=0")
    report(alone)
    assert cost(alone) == ("112", "122", "120")
    # No log, no cost.
    (alone / "log.jsonl").unlink()
    report(alone)
    assert cost(alone) == ("0", "0", "0")


def test_a_student_from_other_weights_does_not_cost_the_modules_of_a_shared_run(tmp_path, report):
    plain = write_run(tmp_path / "a", {"student": {"test": 80.0}}, STAGES)
    words = [f"share={plain}", "student.start=other.pt"]
    lines = report(plain, write_run(tmp_path / "b", {"student": {"test": 80.0}}, {"student": 2}, *words))
    assert cells(lines, "b student")["own TMAC"] == "32"


def test_an_epoch_that_a_kill_repeated_and_a_line_that_was_cut_short_count_once(tmp_path, report):
    folder = write_run(tmp_path / "a", {"meta": {"test": 80.0}}, {"meta": 3})
    *_, last = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps({**json.loads(last), "tmac": 5}) + "\n" + last[:20])
    assert [line["tmac"] for line in evaluate.read_log(folder)] == [1, 1, 5]
    report(folder)
    assert cells((folder / "report.md").read_text().splitlines(), "meta")["own TMAC"] == "7"
    # What follows the torn line stands on a line of its own.
    models.append(folder / "log.jsonl", [{**json.loads(last), "epoch": 3}])
    assert [line["epoch"] for line in evaluate.read_log(folder)] == [0, 1, 2, 3]


def test_one_run_is_an_aligned_table_and_a_verdict_and_report_md_has_all_columns(tmp_path, report):
    sets = {"test": 80.0, "renditions": 30.25, "few-shot lower_case 1-shot 8-way": 5.0, "more": 4.0}
    folder = write_run(tmp_path / "a", {"student": sets, "baseline": {"test": 10.0}, "meta": sets}, STAGES)
    head, *rows, verdict = report(folder)
    columns = ["model", *(f"{name} %" for name in list(sets)[:3]), "own TMAC", "all TMAC"]
    assert re.split("  +", head) == columns
    assert len({len(row) for row in (head, *rows)}) == 1 and len(head) < 100
    assert [re.split("  +", row) for row in rows] == [
        ["student", "80.0", "30.2", "5.0", "112", "182"], ["baseline", "10.0", "–", "–", "6", "6"],
        ["meta", "80.0", "30.2", "5.0", "10", "10"]]
    assert verdict == ("student 80.0 %, the same model end to end for the same epochs 10.0 % (+70.0); chance "
                       "25.0 %; the whole pipeline cost 30.3 times the baseline's multiply-adds")
    markdown = (folder / "report.md").read_text().splitlines()
    assert list(cells(markdown, "meta")) == ["model", "seeds", *columns[1:4], "more %", *columns[4:], "own s"]
    assert cells(markdown, "student")["more %"] == "4.0"


@pytest.mark.parametrize("overrides, words", [
    (["train.baseline_epochs=7"], "for 7 epochs instead of 2 90.0 % (-10.0); chance 25.0 %"),
    (["target.classes=2"], "for the same epochs 90.0 % (-10.0); chance 50.0 %")])
def test_the_verdict_says_what_differs(tmp_path, report, overrides, words):
    results = {"student": {"test": 80.0}, "baseline": {"test": 90.0}}
    assert words in report(write_run(tmp_path / "a", results, STAGES, *overrides))[-1]


def test_without_a_baseline_there_is_no_verdict(tmp_path, report):
    lines = report(write_run(tmp_path / "a", {"student": {"test": 80.0}, "teacher": {"test": 90.0}}, STAGES))
    assert [line.split()[0] for line in lines if line] == ["model", "student", "teacher"]


def test_a_result_replaces_the_older_one_of_its_role_and_set(tmp_path):
    path = tmp_path / "results.json"
    (tmp_path / "config.yaml").touch()
    for role, name, top1 in (("meta", "test", 1.0), ("student", "test", 2.0), ("meta", "test", 3.0)):
        evaluate.keep(path, {"role": role, "set": name, "top1": top1, "images": 100})
    assert [(r["role"], r["top1"]) for r in evaluate.read_results(path)] == [("student", 2.0), ("meta", 3.0)]


def test_runs_scored_on_different_numbers_of_images_are_not_compared(tmp_path, report):
    for seed in (1, 2):
        write_run(tmp_path / f"a-s{seed}", {"student": {"test": 80.0}}, (), f"seed={seed}")
    path = tmp_path / "a-s2/results.json"
    path.write_text(path.read_text().replace('"images": 100', '"images": 50'))
    with pytest.raises(models.UserError, match="a-s2 was scored on 50 images of test, another run on 100"):
        report(tmp_path / "a-s1", tmp_path / "a-s2")


def test_two_evaluations_at_once_lose_no_result(tmp_path):
    path = tmp_path / "results.json"
    (tmp_path / "config.yaml").touch()
    workers = [multiprocessing.get_context("fork").Process(target=lambda role=role: [
        evaluate.keep(path, {"role": role, "set": str(k), "top1": 1.0, "images": 100}) for k in range(30)
    ]) for role in ("meta", "student")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(evaluate.read_results(path)) == 60


def test_a_folder_without_results_is_named(tmp_path):
    write_run(tmp_path / "a", {"student": {"test": 80.0}})
    (tmp_path / "a/results.json").unlink()
    with pytest.raises(models.UserError, match="a holds no results: run evaluate.py first"):
        evaluate.report([tmp_path / "a"])
    with pytest.raises(models.UserError, match="nowhere is not a run's folder"):
        evaluate.report([tmp_path / "nowhere"])
