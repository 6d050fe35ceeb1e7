"""figures.py – pictures of finished runs, and the method in one picture. Needs matplotlib.

    python docs/figures.py runs/demo_nac                       writes runs/demo_nac/figures/*.png
    python docs/figures.py runs/fashion_vmoe-s* --out docs     several runs, into a folder
    python docs/figures.py --sandwich docs/sandwich.svg        the method, for the README

A run's name is its folder's without the seed: runs/fashion_vmoe-s3 -> fashion_vmoe. cost and length compare
all runs. The others are of those with the first run's name: curves and experts of all, as a mean over seeds,
circuit and contact of the first. Each picture is a function, runs -> figure, or None without data for it.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

try:
    import matplotlib.pyplot as plt
    from matplotlib import collections, patches, ticker
except ImportError:
    print("error: the pictures need matplotlib; install it with: pip install matplotlib", file=sys.stderr)
    sys.exit(2)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
import models

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
    parser.add_argument("--out", help="where the pictures go, instead of the first run's figures/")
    parser.add_argument("--sandwich", metavar="FILE", help="draws the method into this .svg")
    words = parser.parse_args()
    if words.sandwich:  # without the date, so that the same code writes the same bytes
        sandwich().savefig(words.sandwich, facecolor="white", metadata={"Date": None})
    elif not words.runs:
        parser.error("name a run's folder, or --sandwich FILE")
    runs = [read_run(Path(folder)) for folder in words.runs]
    for draw in (curves, cost, length, circuit, experts, contact) if runs else ():
        path = Path(words.out or Path(words.runs[0], "figures"), f"{draw.__name__}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = runs if draw in (cost, length) else [run for run in runs if run.name == runs[0].name]
        try:
            if figure := draw(shown):
                figure.savefig(path)
            print(path if figure else f"{path.name}: nothing to show")
        except models.UserError as error:  # for example a set of images that is not here any more
            print(f"{path.name} is left out: {error}")


def read_run(folder):
    """A run: its name, seed, config, test accuracies {role: %}, costs {role: {…}} and log {stage: lines}."""
    # The folder may have been moved since it was made. Where it is says where its files are.
    config, log = {**evaluate.read_config(folder), "output_dir": str(folder)}, {}
    for source in map(Path, models.folders(config)):
        other, done = evaluate.read_config(source), list(log)
        for line in evaluate.read_log(source):
            stage = line["stage"]
            # A stage that was taken from a shared run has its log there.
            if stage not in done and models.settings(config, stage) == models.settings(other, stage):
                log.setdefault(stage, []).append(line)
    top1 = {r["role"]: r["top1"] for r in evaluate.read_results(folder / "results.json")
            if r["set"] == "test" and not r.get("given")}
    return SimpleNamespace(name=re.sub(r"-s\d+", "", folder.name), seed=config["seed"], config=config,
                           top1=top1, costs=evaluate.costs(folder, config), log=log)


def made_with(run, role, *free):
    """The settings that a role's result depends on, as a text, without the seed and the keys in `free`."""
    settings = models.settings(run.config, role)
    return str(sorted((key, str(value)) for key, value in settings.items() if key not in ("seed", *free)))


def mean_std(values):
    """Mean and sample standard deviation, which is 0 for a single value."""
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


def page(runs, title, rows=1, columns=1, height=3.6, log=False):
    """A figure with a title that says how many seeds it shows, and its axes, of test accuracy if `log`."""
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False)
    n = len({run.seed for run in runs})
    seeds = f"mean ± standard deviation of {n} seeds" if n > 1 else f"seed {runs[0].seed}"
    figure.suptitle(f"{runs[0].name}: {title}, {seeds}")
    if log:
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
    last = [run.log["meta"][-1]["val_top1"] for run in runs if "meta" in run.log]
    for axis, (title, *stages) in zip(axes.flat, (
            ("student and baseline", "student", "baseline", "baseline_kd"),
            ("m2mKD: student modules in the meta model", "distill"),
            ("meta model and teacher", "meta", "teacher"),
            ("incubation: teacher modules in the meta model", "incubate"))):
        lines, levels = {}, {}  # {a stage's name or a module's number: {epoch: values}}, {name: value}
        for line in [line for stage in stages for run in runs for line in run.log.get(stage, ())]:
            lines.setdefault(line["module"], {}).setdefault(line["epoch"], []).append(line["val_top1"])
        # Modules have an order, which lightness shows however many they are.
        shades = plt.cm.viridis(np.linspace(0, 0.7, len(lines)))
        ends = [plot(axis, points, *LOOKS.get(key, (f"module {key}", shade)))
                for (key, points), shade in zip(lines.items(), shades)]
        if "student" in lines:
            levels["chance"] = 100 / models.on_target(runs[0].config, "student")["data"]["classes"]
            # On other classes the meta model's accuracy says nothing about the student's.
            if last and not models.new_classes(runs[0].config):
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
    return figure if any(run.log for run in runs) else None


def cost(runs):
    """Test accuracy against the multiply-adds of all stages that went into a model."""
    made = {}  # settings: (role, run's name, {seed: (TMAC, %)})
    for run in runs:
        for role, top1 in run.top1.items():
            tmac, unknown = run.costs[role]["all TMAC"], role == "student" and run.config["student"]["start"]
            # What weights from elsewhere cost is not known. On other classes meta and teacher do not compare.
            unlike = role in ("meta", "teacher") and models.new_classes(run.config)
            if tmac and not unknown and not unlike:
                # The key makes one point of a baseline that runs of several names share.
                made.setdefault((role, made_with(run, role)), (role, run.name, {}))[2][run.seed] = tmac, top1
    points = sorted((*map(mean_std, zip(*seeds.values())), role, name) for role, name, seeds in made.values())
    if not points:
        return None
    figure, [[axis]] = page(runs, "accuracy against total cost", height=4 + 0.1 * len(points), log=True)
    axis.set_xlabel("$10^{12}$ multiply-adds (TMAC) of all stages that went into the model")
    for number, ((x, _), (y, std), role, name) in enumerate(points, 1):
        what, color = LOOKS[role]
        what += f", {name.removeprefix(runs[0].name).strip('-')}" * (name != runs[0].name)
        label = f"{number}  {what}: {y:.1f}{f' ± {std:.1f}' if std else ''} %, {x:.2g} TMAC"
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
    free, panels = ("train.student.epochs", "train.baseline_epochs", "distill.alpha"), {}
    for run, role in [(run, role) for run in runs for role in ("student", "baseline") if role in run.top1]:
        alone, epochs = run.config["distill"]["alpha"] == 0, models.schedule(run.config, role)["epochs"]
        # A panel's title is that of its first run.
        title = f"{run.name} ({models.on_target(run.config, role)['data']['set']})"
        _, lines = panels.setdefault(made_with(run, "student", *free), (title, {}))
        line = lines.setdefault("alone" if alone and role == "student" else role, {})
        # By seed, because runs that share a baseline report the same one.
        line.setdefault(epochs, {})[run.seed] = run.top1[role]
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
    for stage, file in ("assemble_student", "student_assembled.pt"), ("student", "student.pt"):
        path = models.finished(config, stage, file)
        if not path or config["student"]["kind"] != "nac":
            return None
        model = models.build(models.on_target(config, "student"), "student")
        models.load_weights(model, path)
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
        last = [run.log[role][-1] for run in runs if role in run.log]
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
        axis.set_xticks(range(layers), [f"layer {k + 1}" for k in range(layers)])
        axis.set(title=LOOKS[role][0], ylabel="share of tokens (%)")
        axis.grid(axis="x", visible=False)
    return figure if figure.axes else None


@torch.no_grad()
def contact(runs):
    """Eight test images and their renditions, with what the student takes them for."""
    path = models.finished(runs[0].config, "student", "student.pt")
    if not path:
        return None
    model = models.load(path)
    test = data.load(model.config, "test")
    # Far apart, and not in step with the classes, which drawn sets go through by turns.
    test = test.take([k * (len(test) // 8 + 1) % len(test) for k in range(8)])
    ends = torch.tensor([0, 255]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    black, white = data.normalize(ends, model.config["data"])
    figure, axes = page(runs[:1], "what the student takes images for (green: right, red: wrong)", 2, 8, 3.1)
    for row, title, images in zip(axes, ("test images", "renditions"), (test, data.renditions(test))):
        row[0].set_ylabel(title)
        x, labels = next(data.eval_batches(images, model.config, data.Setup(torch.device("cpu"), 0, 1)))
        answers, x = model(x).argmax(-1), (x - black) / (white - black)
        for axis, image, label, answer in zip(row, x, labels, answers):
            name, right = (test.class_names[k][:13] for k in (answer, label))
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
