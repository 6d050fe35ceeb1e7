"""evaluate.py – accuracy of trained models on test and robustness sets; tables and pictures over runs.

    python evaluate.py --config configs/demo_nac.yaml                         the student
    python evaluate.py --config configs/demo_nac.yaml role=all                every finished model of the run, and its report
    python evaluate.py --config configs/demo_nac.yaml checkpoint=other.pt     these weights as the role's
    torchrun --nproc_per_node=8 evaluate.py --config configs/imagenet_vmoe.yaml role=baseline
    python evaluate.py --config configs/demo_nac.yaml few_shot.set=cifar100 few_shot.root=FOLDER    on new classes, too
    python evaluate.py --report runs/demo_nac* [--out FOLDER]                 mean ± std over seeds, as Markdown and PNG

Writes <output_dir>/results.json, a list of {role, set, top1, top5, images, checkpoint}. Every image of a set counts
once, however many processes share it, and the last weights are scored, not the best on the way.
Three parts: scoring · the report's tables (report.md) · its pictures (PNG). Only the first is needed for the numbers.
"""

import functools
import json
import math
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw, ImageFont

import data
import models

ROLES = ("student", "meta", "teacher", "baseline", "baseline_kd", "all")


def main():
    if "--report" in sys.argv:
        return report(*report_words(sys.argv[sys.argv.index("--report") + 1:]))
    config, words = models.command_line(__doc__, ROLES, ("checkpoint",))
    if words.dry_run:
        return models.dry_run(config)
    process = data.setup(config["device"])
    folder = Path(config["output_dir"])
    # `all` means all there is: a run whose teacher came from elsewhere, or whose baseline is still training, has fewer.
    roles = [words.role] if words.role != "all" else [r for r in ROLES[:-1] if find(config, r)]
    sets = {}  # by data block, each loaded once
    for role in roles:
        path = words.checkpoint or find(config, role) or models.needed(config, role)
        # A student is tested where it was finetuned, which need not be where its modules were distilled.
        c = models.on_target(config, role)
        model = models.build(c, role)
        models.load_weights(model, path)
        model.to(process.device).eval()
        for name in ("test", *c["data"]["robustness"]):
            key = (name, json.dumps(c["data"]))
            images = sets[key] = sets[key] if key in sets else data.load(c, name)
            if images.present is not None:
                models.say(process, f"{name}: {len(images.present)} of the model's {c['data']['classes']} classes are "
                           "present; it chooses among these only.")
            top1, top5 = score(model, images, c, process)
            # At once, not at the end: what is scored stays, whatever happens to the next set.
            if process.rank == 0:
                keep_result(folder, {"role": role, "set": name, "top1": top1, "top5": top5, "images": len(images),
                                     "checkpoint": str(path)})
            models.say(process, f"{role}, {name}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(images):,} images")
        if c["few_shot"]["set"]:
            few_shot(model, role, path, c, process)
    if words.role == "all" and process.rank == 0:
        report([folder])
    data.close()


# ------------------------------------------------------------------------------------------------------------------
# Scoring


def find(config, role):
    """Path of a role's weights, or None."""
    if role in ("meta", "teacher") and config[role]["checkpoint"]:
        return config[role]["checkpoint"]
    return models.finished(config, role, f"{role}.pt")


@torch.no_grad()
def score(model, images, config, process):
    """Top-1 and top-5 in % over an ImageSet; logits of classes that it has not are left out."""
    hits = torch.zeros(2, device=process.device)
    absent = None
    if images.present is not None:
        absent = torch.ones(config["data"]["classes"], dtype=torch.bool, device=process.device)
        absent[images.present] = False
    for x, labels in data.eval_batches(images, config, process):
        # logits in float32: in bfloat16 near classes tie, and then the lower index would win
        with models.autocast(config, process.device):
            logits = model(x).float()
        # ImageNet-R has 200 of ImageNet's 1000 classes: an answer outside them would be wrong by construction
        if absent is not None:
            logits = logits.masked_fill(absent, -torch.inf)
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # B 5
        hits += torch.stack([best[:, 0].sum(), best.sum()])
    # Counts are summed, not the processes' means: their shares can differ by one image.
    return (100 * data.sum_over_processes(hits) / len(images)).tolist()


def few_shot(model, role, path, config, process):
    """Accuracy on classes the model has not seen: of each episode's images a few are labelled, and a linear classifier is
    trained on the frozen model's features of these alone. Keeps and prints mean ± 95 % interval over episodes."""
    f = config["few_shot"]
    options = {**config["data"], "set": f["set"], "root": f["root"], "classes": None, "test_images": f["images"]}
    images = data.load({**config, "data": options}, "test")
    # The model is frozen, so each image goes through it once and serves all episodes.
    features = features_of(model, images, config, process)
    for shots in f["shots"]:
        support, query = data.episodes(images.labels.numpy(), f["ways"], shots, 3 * shots, f["episodes"], config["seed"])
        hits = linear_probe(features[support], features[query], f["ways"])  # episodes queries 2
        accuracy = 100 * hits.float().mean(1)
        top1, top5 = accuracy.mean(0).tolist()
        # 95 % interval of a mean: ± 1.96 σ / √episodes. It is about the draw of episodes, not about the training's seed.
        interval = 1.96 * accuracy[:, 0].std().item() / len(accuracy) ** 0.5
        name = f"few-shot {f['set']} {shots} of {f['ways']}"
        if process.rank == 0:
            keep_result(Path(config["output_dir"]), {
                "role": role, "set": name, "top1": top1, "top5": top5, "images": len(images), "checkpoint": str(path),
                "ci95": interval, "episodes": len(accuracy)})
        models.say(process, f"{role}, few-shot on {f['set']}, {f['ways']} ways, {shots} shots: top-1 {top1:.2f} ± "
                   f"{interval:.2f} % (95 % interval of {len(accuracy)} episodes)")


@torch.no_grad()
def features_of(model, images, config, process):
    """What the model's classifier is given, for every image, once. -> N D on every process."""
    # A hook on the classifier: so that ViT, V-MoE and NAC need no forward pass of their own for features.
    classifier, mine = model.pool.to_logits if isinstance(model, models.NAC) else model.head, []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: mine.append(inputs[0].float()))
    for x, _ in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            model(x)
    hook.remove()
    # Each process fills in its own rows, and the sum puts them together.
    features = torch.zeros(len(images), classifier.in_features, device=process.device)
    features[process.rank::process.world] = torch.cat(mine)  # eval_batches' share of each process
    # of equal size for every model, so that one learning rate suits all
    return F.layer_norm(data.sum_over_processes(features), features.shape[1:])


def linear_probe(support, query, ways):
    """Trains a linear classifier for each of E episodes, all side by side. support E ways·n D, query E ways·m D, both class
    by class -> whether the label is among the best 1 and 5 of each query: E ways·m 2."""
    E, D = len(support), support.shape[2]
    # From zero, and convex: no seed. Without a bias, for the classes are balanced and the features have mean 0.
    weight = torch.zeros(E, D, ways, device=support.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    labels = lambda x: torch.arange(ways, device=x.device).repeat_interleave(x.shape[1] // ways).expand(E, -1)  # E ways·n
    for _ in range(100):
        # the sum: an episode's gradient does not depend on how many others there are
        loss = F.cross_entropy((support @ weight).transpose(1, 2), labels(support), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hits = (query @ weight.detach()).topk(min(5, ways)).indices == labels(query)[..., None]
    return torch.stack([hits[..., 0], hits.any(-1)], dim=-1)


def keep_result(folder, result):
    """Adds a result to the run's results.json, in place of an older one of the same role and set."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text()) if path.exists() else []
        results = [r for r in results if (r["role"], r["set"]) != (result["role"], result["set"])] + [result]
    except (ValueError, TypeError, KeyError):
        raise models.UserError(f"{path} is not a list of results; remove it and evaluate again.") from None
    models.write_text(path, json.dumps(results, indent=1))


# ------------------------------------------------------------------------------------------------------------------
# The report: reading runs, and tables

# role: the stages whose cost is the model's own, and those that come before it
STAGES = {"meta": (["meta"], []), "teacher": (["incubate", "teacher"], ["meta"]),
          "student": (["distill", "student"], ["meta", "incubate", "teacher"]), "baseline": (["baseline"], []),
          "baseline_kd": (["baseline_kd"], ["meta", "incubate", "teacher"])}
TRAINED = ("meta", "incubate", "teacher", "distill", "student", "baseline", "baseline_kd")
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, yaml.YAMLError)


def report_words(words):
    """What follows --report on the command line -> run folders, folder to write to or None."""
    if "--out" not in words:
        return words, None
    k = words.index("--out")
    if len(words) < k + 2:
        raise models.UserError("--out needs a folder.")
    return words[:k] + words[k + 2:], words[k + 1]


def report(folders, out=None):
    """Prints the tables of run folders and writes them as report.md, with pictures, to `out`: by default `report` in the
    runs' common parent, or in the one run."""
    counted = {}
    runs = [run for run in (read_run(f, counted) for f in sorted({Path(f).resolve() for f in folders})) if run]
    if not runs:
        raise models.UserError(f"no results in {', '.join(map(str, folders)) or 'no folder'}: run evaluate.py first.")
    out = Path(out or Path(os.path.commonpath([run["folder"] for run in runs]), "report"))
    tables = results_table(runs) + [""] + costs_table(runs) + circuits_table(runs)
    print("\n" + "\n".join(tables))
    models.write_text(out / "report.md", "\n".join(tables) + "\n")
    print(f"\n{out / 'report.md'}")
    for draw in (draw_curves, draw_cost, draw_circuit, draw_experts, draw_contact):
        if picture := draw(runs):
            path = out / f"{draw.__name__.removeprefix('draw_')}.png"
            # drawn at twice the size, so that halving it smooths the edges, which Pillow itself does not
            models.write(path, lambda file: picture.reduce(2).save(file, "PNG"))
            print(path)


def read_run(folder, counted):
    """A run's folder -> {folder, config, top1 {role: {set: %}}, log {(stage, module, epoch): line}, cost {stage: (s, TMAC)}};
    None if it is not a run or not evaluated yet. `counted` keeps what stages cost, for counting takes a moment."""
    try:
        config = full_config(folder)
        top1 = {}
        for r in json.loads((folder / "results.json").read_text()):
            top1.setdefault(r["role"], {})[r["set"]] = number(r["top1"])
        log = read_log(folder)
        # A stage that the run took from another one is in that one's log; it is the same only if its settings are.
        own, other = {stage for stage, *_ in log}, Path(config["share"] or folder)
        for key, line in read_log(other).items() if (other / "config.yaml").exists() else ():
            if key[0] not in own and models.settings(config, key[0]) == models.settings(full_config(other), key[0]):
                log[key] = line
        cost = {}
        for stage in {stage for stage, *_ in log}:
            seconds = sum(line["seconds"] for (s, *_), line in log.items() if s == stage)
            made = (stage, without_seed(config, stage)[0])
            if made not in counted:
                counted[made] = number(models.multiply_adds(config, stage)) / 1e12
            cost[stage] = (seconds, counted[made])
        for role in top1:
            without_seed(config, role)
    except OSError:
        return None
    except DAMAGE as e:
        raise models.UserError(f"{folder}: config.yaml, results.json or log.jsonl is damaged ({e}).") from None
    return dict(folder=folder, config=config, top1=top1, log=log, cost=cost)


def full_config(folder):
    """A run's config; keys that an older version did not have yet are at their defaults."""
    defaults = {key: default for key, (default, _) in models.KEYS.items()}
    return models.unflatten({**defaults, **models.flatten(yaml.safe_load((folder / "config.yaml").read_text()))})


def read_log(folder):
    """A run's log -> {(stage, module or None, epoch): line}; the later of two lines counts: a stage that was forced again."""
    path, log = folder / "log.jsonl", {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        line["seconds"] = number(line["seconds"])
        if "val_top1" in line:
            line["val_top1"] = number(line["val_top1"])
        if "expert_load" in line:
            line["expert_load"] = [[number(share) for share in layer] for layer in line["expert_load"]]
        log[line["stage"], line.get("module"), int(line["epoch"])] = line
    return log


def number(value):
    """The value, if it is a number that can be drawn; else ValueError."""
    if type(value) not in (int, float) or not 0 <= value < 1e30:
        raise ValueError(f"{value!r} is not a number from 0 up")
    return float(value)


def without_seed(config, stage):
    """The settings a stage depends on, without the seed, as JSON; and the seed."""
    made = json.loads(models.settings(config, stage))
    seed = int(made.pop("seed"))
    return json.dumps(made), seed


def grouped(runs, stage, value):
    """Runs that differ only in the seed make one row: {settings: {seed: value(run)}}, of runs whose value is not None."""
    rows = {}
    for run in runs:
        if (v := value(run)) is not None:
            made, seed = without_seed(run["config"], stage)
            rows.setdefault(made, {}).setdefault(seed, v)
    return rows


HEAD = ("student.kind", "data.set")  # other settings follow from these: rows are compared among those that share them
FIRST = ("distill.", "student.", "train.baseline_epochs", "train.student.", "train.distill.")  # named first


def names(rows, most=3):
    """{settings: text}, what sets a row apart, as ", key=value, …". It is compared with the row that differs least from all
    others, the plain one, whose text is empty. At most so many keys, unless two rows would then have the same name."""
    flat = {made: json.loads(made) for made in rows}

    def differences(a, b):
        return [k for k in a if a[k] != b.get(k)]

    def text(made, most):
        a = flat[made]
        family = [b for b in flat.values() if not any(k in HEAD for k in differences(a, b))]
        plain = min(family, key=lambda b: sum(len(differences(b, other)) for other in family))
        keys = [k for k in HEAD if any(k in differences(a, b) for b in flat.values())]
        rank = lambda k: next((i for i, start in enumerate(FIRST) if k.startswith(start)), len(FIRST))
        keys += sorted(differences(a, plain), key=rank)
        # without a teacher it does not matter how it would have been listened to
        if a.get("distill.alpha") == 0:
            keys = [k for k in keys if k not in ("distill.tau", "distill.kind", "distill.reduction")]
        more = f", + {len(keys) - most} more" if len(keys) > most else ""
        return "".join(f", {k}={json.dumps(a[k])}" for k in keys[:most]) + more

    short = {made: text(made, most) for made in rows}
    clash = {name for name in short.values() if [*short.values()].count(name) > 1}
    return {made: text(made, 1000) if name in clash else name for made, name in short.items()}


def total(cost, stages, unit):
    """Seconds (unit 0) or TMAC (unit 1) that a run spent on stages."""
    return sum(cost[stage][unit] for stage in stages if stage in cost)


def results_table(runs):
    """Lines of a Markdown table: accuracy as mean ± sample std over seeds, and what training cost."""
    sets = list(dict.fromkeys(name for run in runs for top1 in run["top1"].values() for name in top1))
    lines = ["| model | " + " | ".join(f"{name} top-1 %" for name in sets)
             + " | seeds | own s | s before | own TMAC | TMAC before |", "|---|" + "---|" * (len(sets) + 5)]
    for role in ROLES[:-1]:
        rows = grouped(runs, role, lambda run: (run["top1"][role], run["cost"]) if role in run["top1"] else None)
        for made, name in names(rows).items():
            values = rows[made].values()
            cells = [mean_std([top1[name] for top1, _ in values if name in top1]) for name in sets] + [f"{len(values)}"]
            cells += [f"{statistics.mean(total(cost, stages, unit) for _, cost in values):{form}}"
                      for unit, form in ((0, ".0f"), (1, ".3g")) for stages in STAGES[role]]
            lines.append(f"| {role}{name} | {' | '.join(cells)} |")
    return lines


def costs_table(runs):
    """Lines of a Markdown table: a row a stage, seconds as mean over seeds and multiply-adds."""
    lines = ["| stage | seeds | s | TMAC (10¹² multiply-adds) |", "|---|---|---|---|"]
    for stage in TRAINED:
        rows = grouped(runs, stage, lambda run: run["cost"].get(stage))
        for made, name in names(rows).items():
            seconds, macs = (statistics.mean(column) for column in zip(*rows[made].values()))
            lines.append(f"| {stage}{name} | {len(rows[made])} | {seconds:.0f} | {macs:.3g} |")
    return lines


def circuits_table(runs):
    """Lines that say how many of a NAC's mediators can hear each other, before finetuning and after; none without a NAC."""
    rows = grouped(runs, "student", lambda run: (pair := circuits(run)) and [linked_share(nac) for nac in pair])
    lines = [f"| student{name} | {' | '.join(mean_std(column) for column in zip(*rows[made].values()))} |"
             for made, name in names(rows).items()]
    return lines and ["", f"| pairs of mediators within the kernel's truncation (δ ≤ {models.TRUNCATION}), % | assembled | "
                      "finetuned |", "|---|---|---|", *lines]


def mean_std(values):
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def student_of(run, stage, name):
    """The run's student with the weights of a stage's file, the run's own or, made with the same settings, that of the run
    it shares; None if there is none."""
    for folder in (run["folder"], run["config"]["share"]):
        path = Path(folder or "", name)
        if folder and path.exists() and (folder == run["folder"] or not models.difference(
                models.read(path), run["config"], stage)):
            model = models.build(models.on_target(run["config"], "student"), "student")
            models.load_weights(model, path)
            return model.eval()
    return None


def circuits(run):
    """A NAC student [before, after] finetuning; None if the run has not both."""
    if run["config"]["student"]["kind"] != "nac":
        return None
    pair = [student_of(run, "assemble_student", "student_assembled.pt"), student_of(run, "student", "student.pt")]
    return None if None in pair else pair


@torch.no_grad()
def linked_share(nac):
    """Share in % of the mediators' pairs that the kernel lets talk."""
    s = nac.mediator_latents.signatures
    linked = (models.distance(s, s) <= models.TRUNCATION).triu(1)
    return 100 * linked.sum().item() / max(1, len(s) * (len(s) - 1) // 2)


# ------------------------------------------------------------------------------------------------------------------
# Pictures, drawn with Pillow. A draw_… function makes an image of twice the size it is written in, or None for lack of data.

WIDTH = 2300
BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY = (  # Okabe and Ito's palette, which the colour-blind can tell apart
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
COLORS = {"student": BLUE, "baseline": RED, "baseline_kd": ORANGE, "teacher": GREEN, "meta": GREY}


@functools.lru_cache(maxsize=None)
def font(size):
    return ImageFont.load_default(size=size)


def paper(height):
    """A white image of the common width, and its pen."""
    image = Image.new("RGB", (WIDTH, int(height)), "white")
    return image, ImageDraw.Draw(image)


def write(draw, xy, text, size=26, fill=BLACK, anchor="lm", width=None):
    """Text at xy; `width` pixels are all there is: what goes beyond them is cut off with an ellipsis."""
    if width and font(size).getlength(text) > width:
        while text and font(size).getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text(xy, text, fill=fill, font=font(size), anchor=anchor)


def ticks(low, high, log=False):
    """Round numbers from low to high: multiples of 1, 2, 5, 10 …, at most six; on a log axis 1, 2, 5 of every decade."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        return [m * 10.0**k for k in decades for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    step = next(m * 10**k for k in range(30) for m in (1, 2, 5) if (high - low) / (m * 10**k) <= 5)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def axes(draw, box, xs, ys, title, x_name, y_name, log=False):
    """Draws axes in box = (left, top, right, bottom) over the ranges xs and ys (x logarithmic with `log`), with title and
    names -> place, which maps x, y to a pixel."""
    left, top, right, bottom = box
    scale = math.log10 if log else float

    def place(x, y):
        across = (scale(x) - scale(xs[0])) / (scale(xs[1]) - scale(xs[0]))
        return left + (right - left) * across, bottom - (bottom - top) * (y - ys[0]) / (ys[1] - ys[0])

    for x in ticks(*xs, log):
        at = place(x, ys[0])
        draw.line([at, (at[0], top)], "#E6E6E6", 2)
        write(draw, (at[0], bottom + 12), f"{x:g}", anchor="mt")
    for y in ticks(*ys):
        at = place(xs[0], y)
        draw.line([at, (right, at[1])], "#E6E6E6", 2)
        write(draw, (left - 12, at[1]), f"{y:g}", anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], BLACK, 3)
    write(draw, (left, top - 62), title, 34)
    # above the axis and not along it: nobody likes to read sideways
    write(draw, (left, top - 24), y_name, fill=GREY)
    write(draw, (right, bottom + 50), x_name, fill=GREY, anchor="rt")
    return place


def dot(draw, at, radius, fill, outline=None):
    draw.ellipse([at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius], fill, outline, 3)


def legend(draw, x, y, entries, width):
    """A line for each (text, colour), from y down."""
    for k, (text, color) in enumerate(entries):
        draw.line([(x, y + 36 * k), (x + 44, y + 36 * k)], color, 7)
        write(draw, (x + 60, y + 36 * k), text, width=width - 60)


def validation_curves(runs, stage):
    """[(text, [(epoch, %), …])] of a stage, mean over seeds: a curve a module, or a row if settings differ (its modules'
    mean then)."""
    def of_run(run):
        points = {k[1:]: line["val_top1"] for k, line in run["log"].items() if k[0] == stage and "val_top1" in line}
        return points or None  # {(module, epoch): %}

    rows, curves = grouped(runs, stage, of_run), []
    for made, name in names(rows).items():
        modules = sorted({module for points in rows[made].values() for module, _ in points}, key=str)
        for chosen in [[m] for m in modules] if len(rows) == 1 else [modules]:
            values = {}
            for points in rows[made].values():
                for (module, epoch), value in points.items():
                    if module in chosen:
                        values.setdefault(epoch, []).append(value)
            what = f"module {chosen[0]}" if len(rows) == 1 and chosen != [None] else stage + name
            curves.append((what, sorted((epoch, statistics.mean(v)) for epoch, v in values.items())))
    return curves


def draw_curves(runs):
    """Validation accuracy against epochs, a panel a stage; both baselines share one."""
    panels = {}
    for stage in TRAINED:
        if curves := validation_curves(runs, stage):
            panels.setdefault(stage.removesuffix("_kd"), []).extend(curves)
    if not panels:
        return None
    shown = {panel: curves[:len(PALETTE)] for panel, curves in panels.items()}
    rows = [list(shown)[k:k + 2] for k in range(0, len(shown), 2)]
    heights = [560 + 36 * max(len(shown[panel]) for panel in row) for row in rows]
    image, draw = paper(sum(heights) + 20)
    top = 0
    for row, height in zip(rows, heights):
        for k, panel in enumerate(row):
            left, curves = 110 + k * WIDTH // 2, shown[panel]
            box = (left, top + 110, left + WIDTH // 2 - 150, top + 430)
            title = {"incubate": "incubate (teacher's modules in the meta model)",
                     "distill": "distill (student's modules in the meta model)"}.get(panel, panel)
            place = axes(draw, box, (0, max(e for _, points in curves for e, _ in points) or 1), (0, 100), title, "epoch",
                         "validation top-1 %")
            for (_, points), color in zip(curves, PALETTE):
                line = [place(epoch, min(value, 100)) for epoch, value in points]
                draw.line(line, color, 5, joint="curve")
                for at in line:
                    dot(draw, at, 7, color)
            more = len(panels[panel]) - len(curves)
            entries = [(text, color) for (text, _), color in zip(curves, PALETTE)]
            entries[-1] = (entries[-1][0] + (f" (and {more} more, not drawn)" if more else ""), entries[-1][1])
            legend(draw, left, box[3] + 112, entries, box[2] - left)
        top += height
    return image


def draw_cost(runs):
    """Test accuracy against the multiply-adds of all stages that went into a model, a point a row of the table."""
    points = []  # role, settings, name, TMAC, accuracies
    for role in STAGES:
        rows = grouped(runs, role, lambda run: (total(run["cost"], sum(STAGES[role], []), 1), run["top1"][role]["test"])
                       if "test" in run["top1"].get(role, ()) else None)
        for made, name in names(rows).items():
            costs, top1 = zip(*rows[made].values())
            if statistics.mean(costs) > 0:
                points.append((role, made, role + name, statistics.mean(costs), top1))
    if not points:
        return None
    points.sort(key=lambda p: p[3])
    image, draw = paper(1010 + 44 * len(points))
    lows, highs = zip(*((statistics.mean(t) - std(t), statistics.mean(t) + std(t)) for *_, t in points))
    ys = (max(0, 10 * math.floor(min(lows) / 10)), min(100, 10 * math.ceil(max(highs) / 10 + 0.1)))
    place = axes(draw, (120, 120, WIDTH - 60, 860), (points[0][3] / 1.3, points[-1][3] * 1.3), ys,
                 "accuracy against cost", "10¹² multiply-adds, of the model's own stages and those before", "test top-1 %", True)
    # Rows that differ only in how long was trained are one curve.
    budgets = {}
    for role, made, _, cost, top1 in points:
        family = {k: v for k, v in json.loads(made).items() if not k.endswith("epochs")}
        budgets.setdefault((role, json.dumps(family)), []).append(place(cost, statistics.mean(top1)))
    for (role, _), line in budgets.items():
        draw.line(line, COLORS[role], 4)
    taken = [place(cost, statistics.mean(top1)) for *_, cost, top1 in points]
    for k, (role, _, name, cost, top1) in enumerate(points):
        mean, color, y = statistics.mean(top1), COLORS[role], 990 + 44 * k
        at = place(cost, mean)
        draw.line([place(cost, max(ys[0], mean - std(top1))), place(cost, min(ys[1], mean + std(top1)))], color, 4)
        dot(draw, at, 12, color)
        # the number goes where it is farthest from all that is drawn already
        spots = [(at[0] + 38 * math.cos(a), at[1] + 38 * math.sin(a)) for a in (math.pi * n / 4 for n in (7, 1, 3, 5, 0, 4))]
        spot = max(spots, key=lambda s: min(math.dist(s, t) for t in taken) // 8)
        taken.append(spot)
        write(draw, spot, f"{k + 1}", 28, color, "mm")
        dot(draw, (140, y), 12, color)
        write(draw, (110, y), f"{k + 1}", 28, color, "rm")
        write(draw, (170, y), name, width=1500)
        write(draw, (1960, y), f"{mean_std(top1)} %", anchor="rm")
        write(draw, (WIDTH - 60, y), f"{cost:.3g} TMAC", anchor="rm")
    return image


def std(values):
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def ring(nac, config):
    """Order of the mediators around a circle, and a colour for each: a graph prior's groups, which are ranges of indices, or
    else by direction in the plane in which the signatures vary most, so that neighbours talk to similar ones."""
    s = F.normalize(nac.mediator_latents.signatures, dim=-1)
    n, c = len(s), config["student"]
    if c["graph"] in ("planted_partition", "ring_of_cliques"):
        return list(range(n)), [PALETTE[k * c["graph_groups"] // n % len(PALETTE)] for k in range(n)]
    u, scales, _ = torch.linalg.svd(s - s.mean(0), full_matrices=False)
    plane = F.pad(u * scales, (0, 2))[:, :2]
    angle = torch.atan2(plane[:, 1], plane[:, 0])
    sector = ((angle / (2 * math.pi) + 0.5) * 6).long() % 6
    return angle.argsort().tolist(), [PALETTE[k] for k in sector.tolist()]


def links(nac):
    """{(sender, receiver): K} of the pairs within the truncation; nodes are numbered inputs, mediators, outputs. K is the
    propagators' mean. (The read-out has no truncation, but its far pairs would hide the near ones.)"""
    inputs, mediators, outputs = (x.signatures for x in (nac.input_latents, nac.mediator_latents, nac.output_latents))
    senders, U, M = torch.cat([inputs, mediators]), len(inputs), len(mediators)
    kernel = lambda s, part: models.log_kernel(models.distance(s, senders), part.attention.bandwidth).exp()
    K = torch.cat([torch.stack([kernel(mediators, p) for p in nac.propagators]).mean(0), kernel(outputs, nac.read_out)])
    K = K.nan_to_num().clamp(0, 1).tolist()  # (M + outputs) × senders; δ_uu can round below 0
    return {(v, U + u): K[u][v] for u in range(len(K)) for v in range(U + M) if K[u][v] > 0 and not U <= U + u <= v}


@torch.no_grad()
def draw_circuit(runs):
    """The first NAC's circuit before and after finetuning: who hears whom, the darker the better."""
    for run in runs:
        if pair := circuits(run):
            break
    else:
        return None
    image, draw = paper(1340)
    order, colors = ring(pair[1], run["config"])
    counts = [len(x.codes) for x in (pair[1].input_latents, pair[1].mediator_latents, pair[1].output_latents)]
    both = [links(nac) for nac in pair]
    for k, (title, mine, others) in enumerate((("assembled", *both), ("finetuned", *both[::-1]))):
        left, middle = k * WIDTH // 2, 660
        column = lambda n: [middle + (i - (n - 1) / 2) * min(60, 940 / n) for i in range(n)]
        at = [(left + 90, y) for y in column(counts[0])] + [None] * counts[1]
        for place, mediator in enumerate(order):
            a = 2 * math.pi * place / counts[1]
            at[counts[0] + mediator] = (left + 575 - 400 * math.cos(a), middle - 400 * math.sin(a))
        at += [(left + 1060, y) for y in column(counts[2])]
        # weak ones first, so that the strong lie on top, and with them what finetuning changed
        for (u, v), K in sorted(mine.items(), key=lambda item: ((item[0] not in others), item[1])):
            new = RED if k else SKY
            draw.line([at[u], at[v]], new if (u, v) not in others else (int(255 * (1 - K)),) * 3, 4)
        shades = [GREY] * counts[0] + colors + [BLACK] * counts[2]
        for place, color in zip(at, shades):
            dot(draw, place, max(6, min(20, 900 // counts[1])), color, "white")
        write(draw, (left + 575, 50), f"{title}: {linked_share(pair[k]):.0f} % of the mediators' pairs linked", 34, anchor="mm")
        for x, text in zip((90, 575, 1060), ("inputs", "mediators", "outputs")):
            write(draw, (left + x, 130), text, fill=GREY, anchor="mm")
    for n in range(101):
        draw.line([(120 + 3 * n, 1240), (120 + 3 * n, 1270)], (int(255 * (1 - n / 100)),) * 3, 4)
    write(draw, (120, 1300), "0", anchor="lm")
    write(draw, (420, 1300), "1", anchor="rm")
    write(draw, (450, 1255), "K = exp(−δ/β)")
    legend(draw, 760, 1240, [("link that finetuning cuts", SKY), ("link that finetuning makes", RED)], 600)
    return image


def draw_experts(runs):
    """Share of tokens by expert, a column a layer, a line of bars a row of settings. Experts are sorted by share in each seed
    before the mean: their numbers mean nothing, and a mean over them would look balanced however lopsided each is."""
    bars = []  # name, layers of shares
    for stage in ("student", "baseline", "baseline_kd"):
        def last_load(run):
            lines = [line for (s, _, epoch), line in sorted(run["log"].items(), key=lambda item: item[0][2])
                     if s == stage and line.get("expert_load")]
            return [sorted(layer, reverse=True) for layer in lines[-1]["expert_load"]] if lines else None

        rows = grouped(runs, stage, last_load)
        for made, name in names(rows).items():
            bars.append((stage, stage + name, [[statistics.mean(shares) for shares in zip(*layers)]
                                               for layers in zip(*rows[made].values())]))
    if not any(layers for *_, layers in bars):
        return None
    image, draw = paper(90 + 420 * len(bars))
    write(draw, (110, 50), "experts' share of the last batch's tokens, by layer, the busiest first; dashed: an even share", 34)
    most = max((share for *_, layers in bars for layer in layers for share in layer), default=0)
    for k, (stage, name, layers) in enumerate(bars):
        step = (WIDTH - 60) / max(1, len(layers))
        for n, shares in enumerate(layers):
            box = (110 + step * n, 220 + 420 * k, step * (n + 1), 410 + 420 * k)
            place = axes(draw, box, (0.5, len(shares) + 0.5), (0, max(1, 100 * most)), "" if n else name, "", f"layer {n}: tokens %")
            for e, share in enumerate(shares):
                (a, b), (c, d) = place(e + 0.6, 100 * share), place(e + 1.4, 0)
                draw.rectangle([a, b, c, d], COLORS[stage])
            even = 100 / max(1, len(shares))
            for x in range(40):
                draw.line([place(0.5 + len(shares) * x / 40, even), place(0.5 + len(shares) * (x + 0.5) / 40, even)], BLACK, 3)
    return image


@torch.no_grad()
def draw_contact(runs):
    """Eight test images and their renditions, with what the first finished student takes them for."""
    for run in runs:
        if model := student_of(run, "student", "student.pt"):
            break
    else:
        return None
    config = models.on_target(run["config"], "student")
    config = {**config, "data": {**config["data"], "workers": 0}}
    try:
        test = data.load(config, "test")
    except models.UserError as e:
        return print(f"contact.png is left out: {e}")
    test = test.take([i * len(test) // 8 for i in range(min(8, len(test)))])
    image, draw = paper(820)
    for row, (what, images) in enumerate((("test", test), ("renditions", data.renditions(test)))):
        write(draw, (20, 40 + 400 * row), f"{what}: what the student sees, and its answer", 34)
        x, labels = next(iter(data.eval_batches(images, config, data.Setup(torch.device("cpu"), 0, 1))))
        answers = model(x).argmax(-1).tolist()
        seen = (x * torch.tensor(data.STD)[:, None, None] + torch.tensor(data.MEAN)[:, None, None]) * 255  # B 3 H W
        for k, (pixels, label, answer) in enumerate(zip(seen, labels.tolist(), answers)):
            left, top, color = 20 + 285 * k, 80 + 400 * row, GREEN if answer == label else RED
            tile = Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
            draw.rectangle([left, top, left + 265, top + 265], color)
            image.paste(tile.resize((250, 250), Image.Resampling.NEAREST), (left + 8, top + 8))
            text = test.class_names[answer] + ("" if answer == label else f", not {test.class_names[label]}")
            write(draw, (left + 132, top + 292), text, 30, color, "mm", 275)
    return image


if __name__ == "__main__":
    models.run(main)
