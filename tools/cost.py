"""cost.py – what each stage of a config trains and takes, before it runs.

    python tools/cost.py --config configs/imagenet_vmoe.yaml [key=value …]      (bash run.sh CONFIG --dry-run)
    torchrun --nproc_per_node=8 tools/cost.py --config …      the same for eight processes
    python tools/cost.py --config … --list                    checks everything, prints what run.sh has to run

The models get no memory, and the data need not be there if the config says data.classes. The environment
variable GOAL, such as GOAL=distill, ends table and list with that stage.
"""

import math
import os
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import few_shot
import models

# Training images of sets that need not be on this machine. name of data.root, with _ for -: images
TRAIN_IMAGES = {"imagenet": 1281167, "tiny_imagenet": 100000, "tiny_imagenet_200": 100000}


def main():
    option = {"action": "store_true", "help": "check everything and print what run.sh has to run"}
    config, words = models.command_line(__doc__, list=option)
    goal = os.environ.get("GOAL")
    if goal and goal not in models.STAGES:
        raise data.UserError(f"GOAL={goal} is not one of the stages {', '.join(models.STAGES)}.")
    if int(os.environ.get("RANK", 0)):
        return
    to_do, done = plan(config, [goal] if goal else ["student", "baseline"], words.list)
    if not words.list:
        return print_table(config, to_do, done)
    last = [] if goal else ["evaluate.py role=all", f"tools/report.py {config['output_dir']}"]
    if config["few_shot"]["root"] and not goal:
        few_shot.few_shot_set(config)
        last.insert(1, "tools/few_shot.py role=all")
    if done:
        odd = [name for name in done if made_by_other_code(config, name)]
        note = f" ({', '.join(odd)}: made by other code)" if odd else ""
        print(f"finished already: {', '.join(done)}{note}", file=sys.stderr)
    print(*[f"{models.STAGES[name][0]} role={models.STAGES[name][1]}" for name in to_do], *last, sep="\n")


def plan(config, goals, strict):
    """-> the names of the stages that have to run, and of the finished ones that these or the goals need.

    Raises UserError where the run would. Sets that are not here are an error only if `strict`.
    """
    if strict or os.path.exists(config["data"]["root"]):
        models.check_inputs(config)
        to_do = [name for *_, name in models.stages(config, goals)]
    else:  # only of imported files is it known that they fit
        given = [name for name in models.STAGES
                 if all(models.imported_from(config, file) for file in models.files(config, name))]
        before = {name for goal in goals for name in stages_before(config, goal, given)}
        to_do = [name for name in models.STAGES if name in before and name not in given]
    for name in to_do:
        with torch.device("meta"):
            models.build(config, models.STAGES[name][1])
        if not name.startswith("assemble"):
            s = models.schedule(config, name)
            data.steps_per_epoch(images_of(config, name), s["batch"], 1, s["accumulate"], s["block"])
    needed = {*goals, *(parent for name in to_do for parent in models.parents(config, name))}
    return to_do, [name for name in models.STAGES if name in needed and name not in to_do]


def stages_before(config, name, stop=()):
    """The names of the stages that a stage needs, in order, itself last. Nothing behind a stage in `stop`."""
    names = []
    for parent in models.parents(config, name) if name not in stop else ():
        names += stages_before(config, parent, stop)
    return list(dict.fromkeys([*names, name]))


def made_by_other_code(config, name):
    """Whether the code has changed since a stage was finished. Imported weights were made by no code of ours."""
    paths = [models.finished(config, name, file) for file in models.files(config, name)]
    return any(models.about(path).get("code", models.code()) != models.code() for path in paths)


def print_table(config, to_do, done):
    """Prints what each stage trains and takes, and the sum over all that are still to be made."""
    world, total = int(os.environ.get("WORLD_SIZE", 1)), 0.0
    print("stage     parameters     images epochs     steps batch  learning rate     state GiB       TMAC"
          "   GPU hours")
    for name in done:
        print(f"{name:16}  finished")
    for name in [name for name in to_do if not name.startswith("assemble")]:
        s, images = models.schedule(config, name), images_of(config, name)
        parameters, state, macs = cost(config, name)
        batch = s["batch"] * world * s["accumulate"]
        low = s["min_lr"] * (batch / 512 if s["scale_min_lr"] else 1)
        steps = data.steps_per_epoch(images, s["batch"], world, s["accumulate"], s["block"]) * s["epochs"]
        macs *= steps * world * s["accumulate"]
        total += macs
        print(f"{name:9}{parameters:12,}{images:11,}{s['epochs']:7}{steps:10,}{batch:6}  "
              f"{s['lr'] * batch / 512:7.2g} → {low:<7.2g}{state / 2**30:10.2f}{tmac_and_hours(macs)}")
    print(f"to do{tmac_and_hours(total):>96}")
    print("images: of an epoch; batch: of all processes and one step; state: weights, gradients and AdamW's\n"
          "moments of a process in float32, and activations come on top; TMAC: 10^12 multiply-adds of all\n"
          "epochs, forward and backward; GPU hours: hours at 150 TFLOP/s a GPU, of all GPUs together")


def tmac_and_hours(macs):
    hours = 2 * macs / 150e12 / 3600
    return f"{short(macs / 1e12):>11}{'< 0.01' if 0 < hours < 0.01 else short(hours):>12}"


def short(number):
    """Three digits, of thousands all digits before the point."""
    return f"{number:,.0f}" if 1000 <= number < 1e6 else f"{number:.3g}"


def images_of(config, name):
    """Images in an epoch of a stage. Of a set that is not here: from data.train_images, or its known size."""
    options, block = config["data"], models.schedule(config, name)["block"]
    if os.path.exists(options["root"]):
        return data.epoch_images(config, block)
    known = TRAIN_IMAGES.get(Path(options["root"]).stem.lower().replace("-", "_"), 0)
    images = options["train_images"] or known - (options["validation_images"] or 1000)
    if images < 1:
        raise data.UserError(f"data.root={options['root']!r} is not there; set data.train_images to count "
                             "without it.")
    first, stop = config["train"][block]["images"] or (0, images)
    return max(0, min(images, stop) - first) * config["train"][block]["passes"]


def cost(config, name, only=()):
    """-> trainable parameters; bytes of weights, gradients and AdamW's moments; multiply-adds of a batch.

    The batch is that of one process. The multiply-adds are those of matrix products and convolutions in
    training, of a stage of modules those of the modules in `only`, if it names any.
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
                for i in places if teacher else ():
                    teacher(x) if alone else meta.rest(i + 1, teacher.parts[i](hidden[i]))
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
    models.run(main)
