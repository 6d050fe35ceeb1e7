"""cost.py – what each stage of a config trains and takes, before it runs.

    python tools/cost.py --config configs/imagenet_vmoe.yaml [key=value …]      (bash run.sh CONFIG --dry-run)
    WORLD_SIZE=8 python tools/cost.py --config …        the same for eight processes
    GOAL=distill python tools/cost.py --config …        only this stage and what it needs
    python tools/cost.py --config … --list              checks everything, prints what run.sh has to run

The models get no memory, and the data need not be there if the config says data.classes.
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
from data import UserError

# Training images of sets that need not be on this machine, by the name of data.root.
TRAIN_IMAGES = {"imagenet": 1281167, "tiny_imagenet": 100000}
TMAC_AN_HOUR = 150 / 2 * 3600  # at 150 TFLOP/s


def main():
    option = {"action": "store_true", "help": "check everything and print what run.sh has to run"}
    config, words = models.command_line(__doc__, list=option)
    if int(os.environ.get("RANK", 0)):
        return
    goal = os.environ.get("GOAL")
    if goal and goal not in models.STAGES:
        raise UserError(f"GOAL={goal} is not one of the stages {', '.join(models.STAGES)}.")
    if words.list:
        models.check_inputs(config)
    to_do, done = plan(config, [goal] if goal else ["student", "baseline"])
    if not words.list:
        return print_table(config, to_do, done)
    last = [] if goal else ["evaluate.py role=all", f"tools/report.py {config['output_dir']}"]
    if config["few_shot"]["root"] and not goal:
        few_shot.few_shot_set(config)
        last.insert(1, "tools/few_shot.py role=all")
    for name in to_do:
        try:
            with torch.device("meta"):
                models.build(config, models.STAGES[name][1])
        except UserError as e:
            raise UserError(f"{name}: {e} Is it from elsewhere? Use tools/convert.py first.") from None
        if not name.startswith("assemble"):
            steps_of(config, name, 1)
    if done:
        print(f"finished already: {', '.join(done)}{by_other_code(config, done)}", file=sys.stderr)
    print(*["{} role={}".format(*models.STAGES[name]) for name in to_do], *last, sep="\n")


def plan(config, goals):
    """-> the names of the stages that have to run, and of the finished ones that they or the goals need."""
    if os.path.exists(config["data"]["root"]):
        to_do = [name for *_, name in models.stages(config, goals)]
    else:  # only of imported files is it known that they fit
        given = [name for name in models.STAGES
                 if all(imported(config, file) for file in models.files(config, name))]
        before = {name for goal in goals for name in stages_before(config, goal, given)}
        to_do = [name for name in models.STAGES if name in before and name not in given]
    needed = {*goals, *(parent for name in to_do for parent in models.parents(config, name))}
    return to_do, [name for name in models.STAGES if name in needed and name not in to_do]


def imported(config, file):
    """Whether tools/convert.py made a file of the run."""
    return any("imported" in models.about(path) for path in models.paths(config, file))


def stages_before(config, name, stop=()):
    """The names of the stages that a stage needs, in order, itself last. Nothing behind a stage in `stop`."""
    names = []
    for parent in models.parents(config, name) if name not in stop else ():
        names += stages_before(config, parent, stop)
    return list(dict.fromkeys([*names, name]))


def by_other_code(config, done):
    """The finished stages that another version of the code made, in words. Imported weights do not tell."""
    files = [(name, file) for name in done for file in models.files(config, name)]
    codes = {name: models.about(models.finished(config, name, file)).get("code") for name, file in files}
    names = [name for name, code in codes.items() if code not in (None, models.code())]
    return f" ({', '.join(names)}: made by other code)" if names else ""


def print_table(config, to_do, done):
    """Prints what each stage trains and takes, and the sum over all that are still to be made."""
    world, total = int(os.environ.get("WORLD_SIZE", 1)), 0.0
    print("stage     parameters     images epochs     steps batch  learning rate     state GiB       TMAC"
          "   GPU hours")
    for name in done:
        print(f"{name:16}  finished")
    for name in [name for name in to_do if not name.startswith("assemble")]:
        s = models.schedule(config, name)
        try:
            parameters, state, macs = cost(config, name)
        except UserError as e:  # such as a meta model for ImageNet's size in a config for Tiny-ImageNet
            print(f"{name:9}  from elsewhere, by tools/convert.py? {e}")
            continue
        batch, (images, steps) = s["batch"] * world * s["accumulate"], steps_of(config, name, world)
        low = s["min_lr"] * (batch / 512 if s["scale_min_lr"] else 1)
        tmac = macs * steps * world * s["accumulate"] / 1e12
        total += tmac
        print(f"{name:9}{parameters:12,}{images:11,}{s['epochs']:7}{steps:10,}{batch:6}  "
              f"{s['lr'] * batch / 512:7.2g} → {low:<7.2g}{state / 2**30:10.2f}{short(tmac):>11}"
              f"{short(tmac / TMAC_AN_HOUR, 0.01):>12}")
    print(f"to do{short(total):>84}{short(total / TMAC_AN_HOUR, 0.01):>12}")
    print("images: of an epoch; batch: of all processes and one step; state: weights, gradients and AdamW's\n"
          "moments of a process in float32, and activations come on top; TMAC: 10^12 multiply-adds of all\n"
          "epochs, forward and backward; GPU hours: hours at 150 TFLOP/s a GPU, of all GPUs together")


def short(number, least=0.0):
    """Three digits, of thousands all digits before the point."""
    if 0 < number < least:
        return f"< {least}"
    return f"{number:,.0f}" if 1000 <= number < 1e6 else f"{number:.3g}"


def steps_of(config, name, world):
    """Images in an epoch of a stage, and all its steps. The size of a set that is not here is told."""
    s, options = models.schedule(config, name), config["data"]
    if os.path.exists(options["root"]):
        images = data.epoch_images(config, s["block"])
    else:
        known = TRAIN_IMAGES.get(Path(options["root"]).name, 0) - (options["validation_images"] or 0)
        first, stop = s["images"] or (0, options["train_images"] or known)
        if stop < 1:
            raise UserError(f"data.root={options['root']!r} is not there; set data.train_images.")
        images = (stop - first) * s["passes"]
    return images, s["epochs"] * data.steps_per_epoch(images, s["batch"], world, s["accumulate"], s["block"])


def cost(config, name, only=()):
    """-> trainable parameters; bytes of weights, gradients and AdamW's moments; multiply-adds of a batch.

    The batch is that of one process. Multiply-adds are those of matrix products and convolutions in training,
    of a stage of modules those of the modules in `only`, if it names any.
    """
    role = {"incubate": "teacher", "distill": "student"}.get(name, name)
    alone = name == role  # a whole model, not modules in the meta model
    s, size = models.schedule(config, name), config["data"]["image_size"]
    with torch.device("meta"):
        whole = models.build(config, role)
        meta = None if alone else models.build(config, "meta")
        teacher = models.build(config, "teacher") if s["alpha"] else None
        frozen = [model for model in (meta, teacher) if model]
        modules = [whole] if alone else models.cut(whole, config, role)
        parameters = sum(map(models.parameters, modules))
        # In float32; a weight that learns has a gradient and two moments beside it.
        state = 16 * parameters + 4 * sum(map(models.parameters, frozen))
        for block in [block for model in (whole, *frozen) for block in getattr(model, "blocks", ())]:
            # Without weights a mixture cannot route tokens: a dense MLP of as much work takes its place.
            if hasattr(block, "moe"):
                _, hidden, width = block.moe.fc1_weight.shape
                block.moe = models.Mlp(width, hidden * block.moe.top_k)
        for model in frozen:
            model.requires_grad_(False)
        x, places = torch.zeros(s["batch"], 3, size, size), only or range(len(modules))
        formulas = {torch.ops.aten.convolution_backward: convolution_backward}
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            # What runs forward only: M, once for all modules, and the teacher.
            with torch.no_grad():
                hidden = [x] if alone else meta.hidden_states(x)
                if teacher and alone:
                    teacher(x)
                elif teacher:
                    for i in places:
                        meta.rest(i + 1, teacher.parts[i](hidden[i]))
            # Through the rest of M pass gradients of states, but none of its weights is computed.
            for i in places:
                out = modules[i](hidden[i])
                (out if alone else meta.rest(i + 1, out)).sum().backward()
    return parameters, state, counter.get_total_flops() / 2


def convolution_backward(out, x, weight, *rest, out_shape):
    """Flops of a convolution's gradients: as many as forward for its input and its weight, if asked for."""
    # torch's own formula overlooks groups: a depthwise convolution seems to cost its width times as much.
    return 2 * math.prod(out) * math.prod(weight[1:]) * sum(rest[-1][:2])


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    models.run(main)
