"""cost.py – what each stage of a config trains and takes, before it runs.

    python tools/cost.py --config configs/imagenet_vmoe.yaml [key=value …]    (bash run.sh CONFIG --dry-run)
    WORLD_SIZE=8 python tools/cost.py --config …    the same for eight processes
    python tools/cost.py --config … --list          checks everything, prints what run.sh has to run

Models get no memory. The data need not be there if the config says data.classes and nothing is trained yet.
"""

import math
import os
import signal
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import few_shot
import models

TRAIN_IMAGES = {"imagenet": 1281167, "tiny_imagenet": 100000}  # of sets that need not be here, by root's name
TMAC_AN_HOUR = 150 / 2 * 3600  # at 150 TFLOP/s


def main():
    config, words = models.command_line(__doc__, list={"action": "store_true"})
    goal = os.environ.get("GOAL")
    if goal and goal not in models.STAGES:
        raise data.UserError(f"GOAL={goal} is not one of the stages {', '.join(models.STAGES)}.")
    goals = [goal] if goal else ["student", "baseline"]
    to_do = models.stages(config, goals)
    needed = {*goals, *(parent for name in to_do for parent in models.parents(config, name))}
    done = [name for name in models.STAGES if name in needed and name not in to_do]
    if words.list or os.path.exists(config["data"]["root"]):
        models.check_inputs(config)
        if config["few_shot"]["root"] and not goal:
            few_shot.few_shot_set(config)
    if not words.list:
        return print_table(config, to_do, done)
    last = [] if goal else ["evaluate.py role=all", f"tools/report.py {config['output_dir']}"]
    if config["few_shot"]["root"] and not goal:
        last.insert(1, "tools/few_shot.py role=all")
    for name in to_do:
        with torch.device("meta"):
            models.build(config, models.STAGES[name][1])
        if not name.startswith("assemble"):
            steps_of(config, name, 1)
    for name in done:
        models.forget(config, name)
        print(f"{name} is finished{models.by_other_code(config, name)}", file=sys.stderr)
    print(*["{} role={}".format(*models.STAGES[name]) for name in to_do], *last, sep="\n")


def stages_before(config, name, is_given=lambda name: False):
    """The stages that a stage needs, in order, itself last; nothing behind one that is given."""
    parents = [] if is_given(name) else models.parents(config, name)
    names = [one for parent in parents for one in stages_before(config, parent, is_given)]
    return list(dict.fromkeys([*names, name]))


def print_table(config, to_do, done):
    """Prints what each stage trains and takes, and the sum."""
    world, total = data.environment("WORLD_SIZE", 1), 0.0
    print("stage     parameters     images epochs     steps batch  learning rate     state GiB       TMAC"
          "   GPU hours")
    for name in done:
        print(f"{name:16}  finished")
    for name in [name for name in to_do if not name.startswith("assemble")]:
        s = models.schedule(config, name)
        try:
            parameters, state, macs = cost(config, name)
        except data.UserError as e:  # such as a meta model for another image size
            print(f"{name:9}  from elsewhere, by tools/convert.py? {e}")
            continue
        batch, (images, steps) = s["batch"] * world * s["accumulate"], steps_of(config, name, world)
        low = s["min_lr"] * (batch / 512 if s["scale_min_lr"] else 1)
        tmac = macs * steps * world * s["accumulate"] / 1e12
        total += tmac
        print(f"{name:9}{parameters:12,}{images:11,}{s['epochs']:7}{steps:10,}{batch:6}  "
              f"{s['lr'] * batch / 512:7.2g} → {low:<7.2g}{state / 2**30:10.2f}{short(tmac):>11}"
              f"{tmac / TMAC_AN_HOUR:12,.2f}")
    print(f"to do{short(total):>84}{total / TMAC_AN_HOUR:12,.2f}")
    print("images: of an epoch; batch: of all processes; TMAC: 10^12 multiply-adds; state: a process's\n"
          "weights, gradients and AdamW's moments, no activations; GPU hours: of all, at 150 TFLOP/s")


def short(number):
    """Three digits, of thousands all digits before the point."""
    return f"{number:,.0f}" if 1000 <= number < 1e6 else f"{number:.3g}"


def steps_of(config, name, world):
    """Images in an epoch of a stage, and all its steps."""
    s, options = models.schedule(config, name), config["data"]
    if os.path.exists(options["root"]):
        images = len(data.load(config, "train", s["block"]))
    else:
        known = TRAIN_IMAGES.get(Path(options["root"]).name, 0) - (options["validation_images"] or 0)
        first, stop = s["images"] or (0, options["train_images"] or known)
        if stop <= first:
            raise data.UserError(f"data.root={options['root']!r} is not there; set data.train_images.")
        images = (stop - first) * s["passes"]
    return images, s["epochs"] * data.steps_per_epoch(images, s["batch"], world, s["accumulate"], s["block"])


def cost(config, name, only=()):
    """-> trainable parameters; bytes of weights, gradients and AdamW's moments; multiply-adds of a process's
    batch: of matrix products and convolutions, of all modules or of those in `only`.
    """
    role = models.STAGES[name][1]
    s, size = models.schedule(config, name), config["data"]["image_size"]
    with torch.device("meta"):
        whole = models.build(config, role)
        meta = None if name == role else models.build(config, "meta")  # a whole model needs none
        teacher = models.build(config, "teacher") if s["alpha"] else None
        frozen = torch.nn.ModuleList([model for model in (meta, teacher) if model])
        modules = models.cut(whole, config, role) if meta else [whole]
        parameters = sum(map(models.parameters, modules))
        # In float32; a weight that learns has a gradient and two moments beside it.
        state = 16 * parameters + 4 * models.parameters(frozen)
        for block in [*whole.modules(), *frozen.modules()]:
            # Without weights a mixture cannot route tokens: a dense MLP of as much work takes its place.
            if hasattr(block, "moe"):
                _, hidden, width = block.moe.fc1_weight.shape
                block.moe = models.Mlp(width, hidden * block.moe.top_k)
        frozen.requires_grad_(False)
        x, places = torch.zeros(s["batch"], 3, size, size), only or range(len(modules))
        rest = meta.rest if meta else lambda _, logits: logits
        formulas = {torch.ops.aten.convolution_backward: convolution_backward}
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            # What runs forward only: M, once for all modules, and the teacher.
            with torch.no_grad():
                hidden = meta.hidden_states(x) if meta else [x]
                if teacher:
                    for i in places:
                        rest(i + 1, (teacher.parts[i] if meta else teacher)(hidden[i]))
            # Through the rest of M pass gradients of states, but none of its weights is computed.
            for i in places:
                rest(i + 1, modules[i](hidden[i])).sum().backward()
    return parameters, state, counter.get_total_flops() / 2


def convolution_backward(out, x, weight, *rest, out_shape):
    """Flops of a convolution's gradients: as many as forward for its input and its weight, if asked for."""
    # torch's own formula overlooks groups: a depthwise convolution seems to cost its width times as much.
    return 2 * math.prod(out) * math.prod(weight[1:]) * sum(rest[-1][:2])


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    models.run(main)
