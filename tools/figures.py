"""figures.py – pictures of finished runs, and the method in one picture. Needs matplotlib.

    python tools/figures.py runs/demo_nac                         writes runs/demo_nac/figures/*.png
    python tools/figures.py runs/fashion_vmoe-s* out=FOLDER       several runs, into a folder of your choice
    python tools/figures.py sandwich=docs/sandwich.svg            the method, for the README
    python tools/figures.py depth=docs/depth.png                  gain by number of modules, from results.csv

A run's name is its folder's without the seed: runs/fashion_vmoe-s3 -> fashion_vmoe. cost and length compare
all runs. The others are of those with the first run's name: curves and experts of all, as a mean over seeds,
circuit and contact of the first. Each picture is a function, runs -> figure, or None without data for it.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import numpy as np
import torch

try:
    import matplotlib.pyplot as plt
    from matplotlib import collections, patches, ticker
except ImportError:
    print("error: the pictures need matplotlib; install it with: pip install matplotlib", file=sys.stderr)
    sys.exit(2)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cost as costs
import data
import models
import report

# Okabe and Ito's colors, which color-blind people can tell apart.
BLUE, RED, GREEN, ORANGE, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
BLACK, GRAY = "black", "#777777"
LOOKS = {"student": ("m2mKD student", BLUE), "alone": ("student without teacher (distill.alpha=0)", SKY),
         "baseline": ("baseline", RED), "baseline_kd": ("baseline with KD", ORANGE),
         "teacher": ("teacher", GREEN), "meta": ("meta model", GRAY)}
WIDTH = 8.33  # inches: 800 pixels in a browser, so a font's size here is about its size on the page
plt.rcParams.update({
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E6E6E6", "lines.markersize": 5,
    "savefig.dpi": 200, "figure.constrained_layout.use": True,
    "svg.hashsalt": "m2mKD", "hatch.linewidth": 0.25})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="FOLDER", help="a run's folder, such as runs/demo_nac")
    parser.add_argument("--out", metavar="FOLDER", help="where the pictures go; a single run has a default")
    parser.add_argument("--sandwich", metavar="FILE", help="draws the method into this .svg")
    parser.add_argument("--depth", metavar="FILE", help="draws the gain by number of modules into this .png")
    own = ("out=", "sandwich=", "depth=")  # options work without their dashes, too
    words = parser.parse_intermixed_args([f"--{w}" if w.startswith(own) else w for w in sys.argv[1:]])
    if words.sandwich:  # without the date, so that the same code writes the same bytes
        sandwich().savefig(words.sandwich, facecolor="white", metadata={"Date": None})
    elif words.depth:
        depth(Path(__file__).resolve().parents[1] / "docs/results.csv").savefig(words.depth, dpi=120)
    elif not words.runs:
        parser.error("name a run's folder, sandwich=FILE or depth=FILE")
    if len(words.runs) > 1 and not words.out:
        raise data.UserError("These pictures are of several runs: say with out=FOLDER where they go.")
    runs = [report.Run(Path(folder)) for folder in words.runs]
    for i, run in enumerate(runs):
        for other in runs[:i]:
            run.check_beside(other)
    plt.rcParams["text.parse_math"] = False  # a run's or a class's name may hold a $
    for draw in (curves, cost, length, circuit, experts, contact) if runs else ():
        path = Path(words.out or Path(words.runs[0], "figures"), f"{draw.__name__}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = runs if draw in (cost, length) else [run for run in runs if run.name == runs[0].name]
        try:
            if figure := draw(shown):
                figure.savefig(path)
            print(path if figure else f"{path.name}: nothing to show")
        except data.UserError as error:  # for example a set of images that is not here any more
            print(f"{path.name} is left out: {error}")


def log(run, *names):
    """The log's lines of some stages. A stage that was taken from a shared run has its log there."""
    found = []
    for name in names:
        for folder in (run.folder, run.find(name)[0]):
            lines = [line for line in report.read_log(folder) if line["stage"] == name] if folder else []
            found += lines
            if lines:
                break
    return found


def look(run, role):
    """Which of LOOKS a model has."""
    return "alone" if role == "student" and run.config["distill"]["alpha"] == 0 else role


def made_with(settings, *free):
    """Settings as a text, without the seed and the keys in `free`; imported weights differ between seeds."""
    keys = sorted(settings.keys() - {"seed", *free})
    return str([(key, "imported" if key.endswith(".pt") else settings[key]) for key in keys])


def mean_std(values):
    """Mean and sample standard deviation, which is 0 for a single value."""
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


def page(runs, title, rows=1, columns=1, height=3.6, log_axis=False):
    """A figure with a title that says how many seeds it shows, and its axes."""
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False)
    n = len({run.config["seed"] for run in runs})
    seeds = f"mean ± standard deviation of {n} seeds" if n > 1 else f"seed {runs[0].config['seed']}"
    figure.suptitle(f"{runs[0].name}: {title}, {seeds}")
    if log_axis:
        axes[0, 0].set(xscale="log", ylabel="test top-1 (%)")
        axes[0, 0].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes[0, 0].xaxis.set_major_formatter("{x:g}")  # 0.2 in place of 2·10⁻¹
        axes[0, 0].minorticks_off()
    return figure, axes


def plot(axis, points, name, color):
    """A line through the means of {x: values}, with a band of ± one standard deviation -> its end."""
    xs = sorted(points)
    mean, std = np.array([mean_std(points[x]) for x in xs]).T
    axis.plot(xs, mean, "o-" if len(xs) < 30 else "-", color=color, label=name)
    axis.fill_between(xs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    return mean[-1], name, color


def curves(runs):
    """Validation accuracy against epochs: students and baselines, modules of both kinds, meta and teacher."""
    figure, axes = page(runs, "accuracy in training", 2, 2, 5.5)

    def validated(run, *names):
        return [line for line in log(run, *names) if line["val_top1"] is not None]

    last = [lines[-1]["val_top1"] for run in runs if (lines := validated(run, "meta"))]
    for axis, (title, *names) in zip(axes.flat, (
            ("student and baseline", "student", "baseline", "baseline_kd"),
            ("m2mKD: student modules in the meta model", "distill"),
            ("meta model and teacher", "meta", "teacher"),
            ("incubation: teacher modules in the meta model", "incubate"))):
        lines, levels = {}, {}  # {a stage's name or a module's number: {epoch: values}}, {name: value}
        for line in [line for run in runs for line in validated(run, *names)]:
            lines.setdefault(line["module"], {}).setdefault(line["epoch"], []).append(line["val_top1"])
        # Modules have an order, which lightness shows however many they are.
        shades = plt.cm.viridis(np.linspace(0, 0.7, len(lines)))
        ends = [plot(axis, points, *LOOKS.get(key, (f"module {key}", shade)))
                for (key, points), shade in zip(lines.items(), shades)]
        if "student" in lines:
            levels["chance"] = 100 / runs[0].config["data"]["classes"]
            if last:
                levels["meta model"] = np.mean(last)
        for name, level in levels.items():
            axis.axhline(level, color=BLACK, linestyle=":" if name == "chance" else "--", linewidth=1)
            ends.append((level, name, BLACK))
        axis.set(title=title, xlabel="epoch", ylabel="validation top-1 (%)", ylim=(0, 103))
        axis.set_visible(bool(lines))
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        place = 110.0
        for y, name, color in sorted(ends, key=lambda end: -end[0]):
            # Beside its line's end, or below the name before: a row of text takes 7.5 % of the height.
            place = min(y, place - 7.5)
            axis.annotate(f"{name}: {y:.1f}", (1.02, place), xycoords=("axes fraction", "data"), color=color,
                          va="center", size=8)
    return figure if any(axis.get_visible() for axis in axes.flat) else None


def cost(runs):
    """Test accuracy against the multiply-adds of all stages that went into a model."""
    made = {}  # (role, settings): (look, run's name, {seed: (TMAC, %)})
    for run in runs:
        lost = {text.split()[0] for text in run.uncounted}
        for role, scores in run.scores.items():
            # What imported weights cost is not known.
            unknown = lost & {*costs.stages_before(run.config, role)}
            if "test" in scores and run.costs.get(role) and not unknown:
                # The key makes one point of a baseline that runs of several names share.
                key = role, made_with(run.find(role)[1] or run.settings)
                seeds = made.setdefault(key, (look(run, role), run.name, {}))[2]
                seeds[run.config["seed"]] = run.costs[role]["all TMAC"], scores["test"]
    points = sorted((*map(mean_std, zip(*seeds.values())), role, name) for role, name, seeds in made.values())
    if not points:
        return None
    figure, [[axis]] = page(runs, "accuracy against total cost", height=4 + 0.1 * len(points), log_axis=True)
    axis.set_xlabel("10¹² multiply-adds (TMAC) of all stages that went into the model")
    for number, ((x, _), (y, std), role, name) in enumerate(points, 1):
        what, color = LOOKS[role]
        what += f", {name.removeprefix(runs[0].name).strip('-')}" * (name != runs[0].name)
        label = f"{number}  {what}: {y:.1f}{f' ± {std:.1f}' if std else ''} %, {x:.3g} TMAC"
        axis.errorbar(x, y, std, fmt="o", color=color, capsize=2, label=label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.draw_without_rendering()  # computes the layout, and with it where on the page points are
    at = axis.transData.transform([(x, y) for (x, _), (y, _), *_ in points]) * 72 / figure.dpi
    taken = list(at)
    for k, (_, _, role, _) in enumerate(points):
        # A point's number stands on the side with most room, but not above or below, where the whisker is.
        spots = at[k] + ((11, 0), (10, 5), (10, -5), (-11, 0), (-10, 5), (-10, -5))
        taken.append(max(spots, key=lambda spot: min(np.linalg.norm(spot - other) for other in taken)))
        axis.annotate(k + 1, taken[-1], xycoords="figure points", ha="center", va="center", size=8,
                      color=LOOKS[role][1])
    return figure


def length(runs):
    """Test accuracy against the length of fine-tuning: a panel for all runs that differ in nothing else."""
    free = ("train.student.epochs", "train.baseline_epochs", "distill.alpha", "output_dir", "share", "device")
    panels = {}
    for run in runs:
        for role in {"student", "baseline"} & {role for role in run.scores if "test" in run.scores[role]}:
            data_set = Path(run.config["data"]["root"]).stem
            key = data_set, made_with(models.flatten(run.config), *free, *models.LEFT_OUT)
            # A panel's title is that of its first run.
            panel = panels.setdefault(key, (f"{run.name} ({data_set})", {}))[1]
            line = panel.setdefault(look(run, role), {})
            # By seed, because runs that share a baseline report the same one.
            epochs = models.schedule(run.config, role)["epochs"]
            line.setdefault(epochs, {})[run.config["seed"]] = run.scores[role]["test"]
    panels = [panel for panel in panels.values() if any(len(line) > 1 for line in panel[1].values())]
    if not panels:
        return None
    rows = math.ceil(len(panels) / 2)
    figure, axes = page(runs, "", rows, min(len(panels), 2), 0.6 + 2.6 * rows)
    counts = [len(seeds) for _, lines in panels for line in lines.values() for seeds in line.values()]
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    figure.suptitle(f"accuracy against the length of fine-tuning, mean ± standard deviation of {seeds} seeds")
    for axis, (title, lines) in zip(axes.flat, panels):
        for key in sorted(lines, key=list(LOOKS).index):
            plot(axis, {x: [*seeds.values()] for x, seeds in lines[key].items()}, *LOOKS[key])
        axis.set(title=title, xscale="log", ylabel="test top-1 (%)", xlabel="epochs")
        axis.set_xticks(sorted({x for line in lines.values() for x in line}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    handles = {name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


DEPTHS = {  # panel: [(name of the runs, epochs of the plain run, its line, color), …]
    "NAC, glyphs": [("demo_nac", 6, "3 modules", SKY), ("six_nac", None, "6 modules", BLUE),
                    ("deep_nac", None, "10 modules", BLACK)],
    "V-MoE, glyphs": [("demo_vmoe", 8, "3 modules of 1 block", SKY),
                      ("deep_vmoe", None, "4 modules of 3 blocks", BLUE),
                      ("eight_vmoe", None, "8 modules of 1 block", BLACK)],
    "NAC, Fashion-MNIST": [("fashion_nac", 3, "3 modules", SKY),
                           ("fashion_deep_nac", None, "10 modules", BLACK)],
    "V-MoE, Fashion-MNIST": [("fashion_vmoe", 3, "3 modules of 1 block", SKY),
                             ("fashion_deep_vmoe", None, "4 modules of 3 blocks", BLUE)]}


def depth(results):
    """The gain, m2mKD minus end to end of the same seed, against the length of fine-tuning, by modules."""
    top1 = {}  # (run, seed, role): % of the test set
    with open(results) as file:
        for run, seed, role, data_set, accuracy in csv.reader(file):
            if data_set == "test":  # 24 epochs of that NAC have another name
                top1[run.replace("fashion_nac-total", "fashion_nac-b24"), seed, role] = float(accuracy)
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.4), sharey=True)
    for axis, (title, lines) in zip(axes.flat, DEPTHS.items()):
        ticks = set()
        for name, plain, label, color in lines:
            gains = {}  # epochs: [points, …]
            for (run, seed, role), accuracy in top1.items():
                epochs = run.removeprefix(f"{name}-f")
                if role == "student" and run == name and plain:
                    gains.setdefault(plain, []).append(accuracy - top1[run, seed, "baseline"])
                elif role == "student" and (f"{name}-b{epochs}", seed, "baseline") in top1:
                    baseline = top1[f"{name}-b{epochs}", seed, "baseline"]
                    gains.setdefault(int(epochs), []).append(accuracy - baseline)
            if gains:
                plot(axis, gains, label, color)
            ticks |= gains.keys()
        axis.set(title=title, xscale="log", yscale="symlog", xlabel="epochs", xticks=sorted(ticks))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yticks([0, 1, 3, 10, 30, 60], ["0", "1", "3", "10", "30", "60"])
        axis.minorticks_off()
        axis.legend(frameon=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("gain (points)")
    figure.suptitle("gain of m2mKD over end to end, mean ± standard deviation of 3 to 10 seeds")
    return figure


def links(model):
    """K of each pair within the truncation, else 0: row u hears column v. Inputs, mediators, outputs."""
    parts = model.input_latents, model.mediator_latents, model.output_latents
    s, (U, M, _) = torch.cat([part.signatures for part in parts]), [len(part.signatures) for part in parts]
    # Propagators differ in their bandwidth alone: drawn is that of their mean.
    bandwidth = torch.stack([p.attention.bandwidth for p in model.propagators]).mean().repeat(len(s))
    bandwidth[U + M:] = model.read_out.attention.bandwidth
    # One half, because among mediators K is symmetric. (The read-out hears distant latents too, but drawn
    # they would hide the near ones.) Input latents hear tokens only, and nobody hears output latents.
    K = models.log_kernel(models.distance(s, s), bandwidth[:, None]).exp().tril(-1)
    K[:U], K[:, U + M:] = 0, 0
    return K.numpy()


@torch.no_grad()
def circuit(runs):
    """A NAC's circuit before and after fine-tuning: who hears whom, darker for a larger kernel."""
    config, K = runs[0].config, []
    for name in ("assemble_student", "student"):
        folder = runs[0].find(name)[0]
        if not folder or config["student"]["kind"] != "nac":
            return None
        model = models.build(config, "student")
        models.load_weights(model, folder / models.files(config, name)[0])
        K.append(links(model))
    # Input latents left, mediators on a ring (a graph prior's groups are neighbors), output latents right.
    (U, M, O), K = config["student"]["latents"], np.stack(K)
    at = np.concatenate([-1.35 + 1j * np.linspace(1, -1, U), np.exp(2j * np.pi * np.arange(M) / M),
                         1.35 + 1j * np.linspace(1, -1, O) * min(1, 0.07 * O)])  # complex: x + iy
    at, fill = np.stack([at.real, at.imag], 1), np.repeat([BLACK, GREEN, PINK], [U, M, O])
    figure, [axes] = page(runs[:1], "circuit", 1, 2, 4.7)
    for axis, mine, other, when, change, color in zip(
            axes, K, K[::-1], ("before", "after"), ("cut", "made"), (BLUE, RED)):
        # The strong lines lie above the weak, and what fine-tuning changes above all.
        pairs, changed = np.argwhere(mine), np.argwhere((mine > 0) & (other == 0))
        pairs = pairs[mine[tuple(pairs.T)].argsort()]
        kernel = axis.add_collection(collections.LineCollection(
            at[pairs], array=mine[tuple(pairs.T)], cmap="Greys", linewidths=min(0.8, 400 / (len(pairs) + 1)),
            clim=(0.9 * K[K > 0].min(initial=1), K.max())))
        axis.plot(*at[changed].T, color=color, linewidth=min(1.6, 200 / (len(changed) + 1)))
        axis.text(0, -1.25, f"{len(changed)} links {change} in fine-tuning", color=color, ha="center")
        axis.scatter(*at.T, s=min(40, 3000 / len(at)), color=fill, ec="white", lw=0.7, zorder=3)
        for x, name in (-1.35, "inputs"), (0, "mediators"), (1.35, "outputs"):
            axis.text(x, 1.12, name, ha="center", color=GRAY)
        share = 100 * np.mean(mine[U:U + M, U:U + M][np.tril_indices(M, -1)] > 0)
        axis.set_title(f"{when} fine-tuning: {share:.1f} % of mediator pairs linked", pad=18)
        axis.set_aspect("equal")
        axis.axis("off")
    figure.colorbar(kernel, ax=axes, location="bottom", shrink=0.3, aspect=30, label="kernel K of a link")
    return figure


def experts(runs):
    """Share of the last batch's tokens that each expert got, for student and baseline."""
    figure, axes = page(runs, "experts of each mixture layer, the busiest first", 2, 1, 4.3)
    axes[0, 0].sharey(axes[1, 0])
    for axis, role in zip(axes.flat, ("student", "baseline")):
        # Experts' numbers mean nothing, so each seed's are sorted by share before the mean is taken: a mean
        # by number would look even however lopsided each seed is.
        last = [lines[-1] for run in runs if (lines := log(run, role))]
        loads = [np.sort(line["expert_load"])[:, ::-1] for line in last if "expert_load" in line]
        if not loads:
            axis.remove()
            continue
        layers, E = loads[0].shape
        share, std = 100 * np.apply_along_axis(mean_std, 0, loads)  # layers experts
        x = np.arange(layers)[:, None] + 0.8 * ((np.arange(E) + 0.5) / E - 0.5)  # a layer is 0.8 wide
        axis.bar(x.ravel(), share.ravel(), 0.7 / E, yerr=std.ravel(), color=LOOKS[role][1])
        axis.axhline(100 / E, color=BLACK, linestyle="--", linewidth=1)
        axis.annotate("even", (1.01, 100 / E), xycoords=("axes fraction", "data"), va="center", size=8)
        axis.set_xticks(range(layers), [f"layer {k}" for k in range(layers)])
        axis.set(title=LOOKS[role][0], ylabel="share of tokens (%)")
        axis.grid(axis="x", visible=False)
    return figure if figure.axes else None


@torch.no_grad()
def contact(runs):
    """Eight test images and their renditions, with what the student takes them for."""
    folder = runs[0].find("student")[0]
    if not folder:
        return None
    model = models.load(folder / "student.pt")
    # Of renditions image k is image k of the test set; other robustness sets have images of their own.
    names = ["test", *({"renditions"} & {*model.config["data"]["robustness"]})]
    ends = torch.tensor([0, 255]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    black, white = data.normalize(ends, model.config["data"])
    title = "what the student takes images for (green: right, red: wrong)"
    figure, axes = page(runs[:1], title, len(names), 8, 0.4 + 1.35 * len(names))
    for row, name in zip(axes, names):
        row[0].set_ylabel({"test": "test images"}.get(name, name))
        images = data.load(model.config, name)
        # Far apart, and not in step with the classes, which drawn sets go through by turns.
        images = images.take([k * (len(images) // 8 + 1) % len(images) for k in range(8)])
        x, labels = next(data.eval_batches(images, model.config, data.Setup(torch.device("cpu"), 0, 1)))
        answers, x = model(x).argmax(-1), (x - black) / (white - black)
        for axis, image, label, answer in zip(row, x, labels, answers):
            name, right = (model.class_names[k][:13] for k in (answer, label))
            color, text = (GREEN, name) if answer == label else (RED, f"{name}\nnot {right}")
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(text, color=color, size=8)
            axis.spines[:].set(visible=True, color=color, linewidth=3)
    return figure


def sandwich():
    """The method: teacher and student hybrid from the same state h_i, and the losses between them."""
    figure, (t, m, b) = plt.figure(figsize=(WIDTH, 3.2), layout="none"), (243, 166, 89)  # top, middle, bottom
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 800), ylim=(0, 307))  # in pixels at a width of 800
    axis.axis("off")
    for x, y, text, color, *size in (  # texts, and boxes around those with a size
            (36, m, "", "#34495E", 48, 48), (105, m, "$M_0$", GRAY, 46, 46), (326, t, "$T_i$", GREEN, 60, 46),
            (182, m, "$M_{i{-}1}$", GRAY, 52, 46), (272, b, "pre", BLUE, 37, 32),
            (382, b, "post", BLUE, 41, 32), (326, b, "$S_i$", BLUE, 60, 46), (607, m, "KD", RED, 40, 26),
            (454, t, "$M_{i{+}1}$", GRAY, 52, 46), (535, t, "$M_{L{-}1}$", GRAY, 54, 46),
            (454, b, "$M_{i{+}1}$", GRAY, 52, 46), (535, b, "$M_{L{-}1}$", GRAY, 54, 46),
            (687, b, "CE", RED, 40, 26), (142, m, "…", BLACK), (494, t, "…", BLACK), (494, b, "…", BLACK),
            (145, m + 36, "meta model M", GRAY), (488, t + 36, "rest of M", GRAY), (250, m, "$h_i$", BLACK),
            (145, m - 75, "the same for every\nmodule $i = 0\\ \\ldots\\ L-1$", BLACK),
            (326, t + 36, "teacher module", GREEN), (607, t + 36, "teacher hybrid's logits", GREEN),
            (326, b + 36, "student module", BLUE), (607, b - 33, "student hybrid's logits", BLUE),
            (495, m, "same frozen weights", GRAY), (766, b, "label A", BLACK), (36, m - 36, "image", BLACK),
            (714, m, r"loss $= (1-\alpha)\cdot$CE $+\;\alpha\cdot$KD", RED),
            (495, 22, "the gradient passes through the frozen modules (hatched); only blue ones learn", RED)):
        frozen = size and color in (GRAY, GREEN)
        if size:
            axis.add_patch(patches.FancyBboxPatch(
                (x - size[0] / 2, y - size[1] / 2), *size, "round,pad=0,rounding_size=4", ec=color,
                fc="#F4F4F4" if frozen else color, hatch="///" if frozen else None))
        axis.text(x, y, text, ha="center", va="center", size=12 if size or text == "…" else 9,
                  color=BLACK if frozen else "white" if size else color)
    axis.text(36, m, "A", ha="center", va="center", color=ORANGE, size=27, rotation=12, weight="bold")
    axis.plot(230, m, "ko")
    for y, color, logits in (t, GREEN, (10, 36, 16, 6, 22)), (b, BLUE, (15, 28, 21, 9, 17)):
        axis.bar(range(591, 624, 8), logits, 6, y - 19, color=color)
    for color, line, *way in (  # arrows: x, y, x, y …
            *((BLACK, "-", *way) for way in (
                (60, m, 82, m), (208, m, 230, m, 230, t, 296, t), (230, m, 230, b, 254, b), (356, t, 428, t),
                (402, b, 428, b), (562, t, 584, t), (562, b, 584, b), (607, t - 26, 607, m + 14),
                (607, b + 24, 607, m - 14), (636, b, 667, b), (738, b, 707, b))),
            (GRAY, ":", 495, m + 11, 495, t - 28), (GRAY, ":", 495, m - 11, 495, b + 28),
            (RED, "--", 687, b - 14, 687, 34, 326, 34, 326, b - 25)):
        axis.plot(way[::2], way[1::2], line, color=color, lw=1.3, solid_capstyle="butt")
        axis.annotate("", way[-2:], way[-4:-2], arrowprops={
            "arrowstyle": "-|>", "color": color, "lw": 0, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11})
    return figure


if __name__ == "__main__":
    models.run(main)
