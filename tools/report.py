"""report.py – tables over runs, mean ± std over seeds, and what a run shows in a sentence.

    python tools/report.py runs/demo_nac          a run's table and verdict; all columns in its report.md
    python tools/report.py runs/demo_nac*         all columns in Markdown, a row per run name and model

A run's name is its folder's without the seed: runs/demo_nac-s3-alpha0 -> demo_nac-alpha0. Runs of one name
may differ in their seed alone. ±: sample standard deviation over seeds. against X: difference to the same
model of the first name, seed by seed. TMAC: 10¹² multiply-adds in training, counted from the log, of the
stages that train the model itself (own) and of all that it needs.
"""

import functools
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cost
import evaluate
import models


def main():
    runs, folders = [], [Path(word) for word in sys.argv[1:]]
    for folder in folders:
        try:
            run = Run(folder)
            for other in runs:
                run.check_beside(other)
            runs.append(run)
        except (models.UserError, OSError) as e:
            if len(folders) == 1:
                raise
            print(f"{folder} is left out: {e}", file=sys.stderr)
    if not runs:
        raise models.UserError("Name the folders of finished runs: python tools/report.py runs/demo_nac*")
    lines = table(runs, len(folders) > 1)
    rows = [lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)]
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]  # a | that does not end a cell
    markdown = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    if len(folders) > 1:
        return print(markdown, end="")
    columns = ["model", *[c for c in lines[0] if c.endswith("%")][:3], "own TMAC", "all TMAC"]
    rows = [columns, *([line[c] for c in columns] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for model, *numbers in rows:
        print(model.ljust(widths[0]), *map(str.rjust, numbers, widths[1:]), sep="  ")
    print(verdict(runs[0]))
    print(f"all columns: {folders[0] / 'report.md'}")
    print(f"pictures: pip install matplotlib && python tools/figures.py {folders[0]}")
    models.write(folders[0] / "report.md", lambda file: file.write(markdown.encode()))


class Run:
    """What a run's folder says: scores {role: {set: top-1}}, settings, and costs {role: {column: value}}."""

    def __init__(self, folder):
        self.folder, self.name = folder, re.sub(r"-s\d+", "", folder.absolute().name)
        self.config = models.load_config(folder / "config.yaml")
        results = evaluate.read_results(folder / "results.json")
        if not results:
            raise models.UserError(f"{folder} holds no results: run evaluate.py first.")
        known = sorted(results, key=lambda r: r["images"])
        self.sets = {r["set"]: (r["images"], r.get("checksum")) for r in known}
        self.scores = {}
        for r in results:
            if (r["images"], r.get("checksum")) == self.sets[r["set"]]:  # else a part or other images
                self.scores.setdefault(r["role"], {})[r["set"]] = r["top1"]
        # The config, and what the finished files know beside it: the data and what was imported.
        self.settings, self.known = models.flatten(self.config), {}
        for role in self.scores:
            self.known |= self.find(role)[1]
            self.settings |= self.known
        self.count_costs()

    def find(self, name):
        """-> the folder from which this run has a stage's result, and its settings; or None and {}."""
        file = models.files(self.config, name)[0]
        for path in models.paths(self.config, file):
            about = models.about(path)
            settings = about.get("settings") or {file: about.get("imported")}
            if path == self.folder / file or all(self.settings.get(k, v) == v for k, v in settings.items()):
                return path.parents[file.count("/")], settings
        return None, {}

    def check_beside(self, other):
        """Raises UserError if a run of the same name differs from this one in more than its seed."""
        if self.name != other.name:
            return
        also = f"{other.folder}, which is also named {self.name}; rename one of them."
        if self.config["seed"] == other.config["seed"]:
            raise models.UserError(f"the seed is that of {also}")
        for name, images in self.sets.items():
            if images != other.sets.get(name, images):
                raise models.UserError(f"{name} has {images[0]} images here, other ones in {also}")
        if not (self.known and other.known):
            raise models.UserError(f"no finished model tells its data, here or in {also}")
        for key in ["data.checksum", *other.known, *self.known]:
            old, new = (run.settings.get(key) for run in (other, self))
            if key.endswith(".pt"):  # imported: of each seed another file, but of all seeds or none
                old, new = old is not None, new is not None
            if old != new and key != "seed":
                raise models.UserError(f"{key} is {new!r} here and {old!r} in {also}")

    def count_costs(self):
        """Sums up the logs of all stages that each model needs; what is imported or lost is not counted."""
        tmac, self.costs = {}, {}
        for role in self.scores:
            names = cost.stages_before(self.config, role, self.imported)
            tmac |= {name: self.spent(name) for name in names if name not in tmac}
            own = sum(tmac[name] or 0 for name in names if models.STAGES[name][1] == role)
            if every := sum(tmac[name] or 0 for name in names):
                self.costs[role] = {"own TMAC": own, "all TMAC": every}
        self.uncounted = [name for name, number in tmac.items() if number is None]
        if self.uncounted:
            print(f"{self.folder}: not counted, imported or without a log: "
                  f"{', '.join(self.uncounted)}", file=sys.stderr)

    def imported(self, name):
        return any(file in self.settings for file in models.files(self.config, name))

    def spent(self, name):
        """10¹² multiply-adds of a stage, from the log of the run that made it; None without."""
        if self.imported(name):
            return None
        if name.startswith("assemble") or not models.schedule(self.config, name)["epochs"]:
            return 0
        # A stage that was made anew may have lines of more epochs or modules.
        epochs, places = models.schedule(self.config, name)["epochs"], range(models.modules_of(self.config))
        lines = [line for line in read_log(self.find(name)[0] or self.folder) if line["stage"] == name
                 and line["epoch"] <= epochs and {*line["modules"]} <= {name, *places}]
        # Runs that differ in these keys alone cost the same, and are counted once.
        config = json.dumps({**self.config, "seed": 0, "output_dir": "", "share": None})
        return sum(line["images"] / len(line["modules"]) / 1e12
                   * per_image(config, name, tuple(line["modules"])) for line in lines) or None


@functools.cache
def per_image(config, name, modules):
    """Multiply-adds of an image in one pass over these modules."""
    config = json.loads(config)
    only = modules if name in ("incubate", "distill") else ()
    return cost.cost(config, name, only)[2] / models.schedule(config, name)["batch"]


def read_log(folder):
    """A run's log lines; of each stage, module and epoch the last, because a kill makes a run repeat it."""
    path, last = folder / "log.jsonl", {}
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            (line["epoch"] + line["images"]) / len({*line["modules"]})  # TypeError if they are no numbers
            last[line["stage"], line["module"], line["epoch"]] = line
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            continue  # a full disk cut it short, and the epoch was repeated
    return list(last.values())


def table(runs, several):
    """A row {column: cell} for each run name and role."""
    sets = dict.fromkeys(name for run in runs for scores in run.scores.values() for name in scores)
    sets, first, lines = sorted(sets, key=lambda name: name != "test"), runs[0].name, []
    for name, role in dict.fromkeys((run.name, role) for run in runs for role in run.scores):
        own = [run for run in runs if run.name == name and role in run.scores]
        line = {"model": f"{name} {role}" if several else role, "seeds": str(len(own))}
        for one in sets:
            line[f"{one} %"] = mean_std([run.scores[role][one] for run in own if one in run.scores[role]])
        if several:
            pairs = [(run.scores[role], plain.scores.get(role, {})) for run in own for plain in runs
                     if plain.name == first != name and plain.config["seed"] == run.config["seed"]
                     and plain.sets.get("test") == run.sets.get("test")]
            gains = [new["test"] - old["test"] for new, old in pairs if "test" in new and "test" in old]
            line[f"against {first}, test"] = mean_std(gains, "+")
        for column in ("own TMAC", "all TMAC"):
            values = [run.costs[role][column] for run in own if role in run.costs]
            line[column] = cost.short(statistics.mean(values)) if values else "–"
        lines.append(line)
    return lines


def mean_std(values, sign=""):
    if len(values) < 2:
        return f"{values[0]:{sign}.1f}" if values else "–"
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values):.1f}"


def verdict(run):
    both = ("student", "baseline")
    student, baseline = (run.scores.get(role, {}).get("test") for role in both)
    if student is None or baseline is None:
        return "a student and its baseline are needed to compare"
    kept = "" if run.config["assemble"]["stitches"] == "drop" else " without stitches"
    labels = ", with labels alone," if run.config["train"]["student"]["alpha"] else ""
    old, new = (models.schedule(run.config, role)["epochs"] for role in both)
    epochs = "the same epochs" if old == new else f"{new} epochs instead of {old}"
    text = (f"student {student:.1f} %, the same model{kept} end to end{labels} for {epochs} {baseline:.1f} % "
            f"({student - baseline:+.1f}); chance {100 / run.config['data']['classes']:.1f} %")
    if {*both} <= run.costs.keys():
        student, baseline = (run.costs[role]["all TMAC"] for role in both)
        text += f"; the whole pipeline cost {student / baseline:.1f} times the baseline's multiply-adds"
    return text


if __name__ == "__main__":
    models.run(main)
