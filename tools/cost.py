"""cost.py – what each stage of a config trains and takes, before it runs.

    python tools/cost.py --config configs/imagenet_vmoe.yaml [key=value …]      (bash run.sh CONFIG --dry-run)
    torchrun --nproc_per_node=8 tools/cost.py --config …      the same for eight processes
    python tools/cost.py --config … --list                    checks everything, prints what run.sh has to run

The models get no memory, and the data need not be there if the config says data.classes. The environment
variable GOAL, such as GOAL=distill, ends table and list with that stage.
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

# Training images of sets that need not be on this machine. name of data.root, with _ for -: images
TRAIN_IMAGES = {"imagenet": 1281167, "tiny_imagenet": 100000, "tiny_imagenet_200": 100000}


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this process without a traceback
    option = {"action": "store_true", "help": "check everything and print what run.sh has to run"}
    config, words = models.command_line(__doc__, list=option)
    goal = os.environ.get("GOAL")
    if goal and goal not in models.STAGES:
        raise data.UserError(f"GOAL={goal} is not one of the stages {', '.join(models.STAGES)}.")
    if int(os.environ.get("RANK", 0)):
        return
    few = config["few_shot"]["root"]
    if few and (os.path.exists(few) or words.list and not goal):
        few_shot.few_shot_set(config)
    to_do, done = plan(config, [goal] if goal else ["student", "baseline"], words.list)
    if not words.list:
        return print_table(config, to_do, done)
    if done:
        print(f"finished already: {', '.join(done)}", file=sys.stderr)
    lines = [f"{script} role={role}" for script, role, _ in to_do]
    if not goal:
        lines.append("evaluate.py role=all")
        if few:
            lines.append("tools/few_shot.py role=all")
        lines.append(f"tools/report.py {config['output_dir']}")
    print(*lines, sep="\n")


def plan(config, goals, strict):
    """-> what has to run, [(script, role, name)], and the names of the finished stages that it builds on.

    Raises UserError where the run would. Sets that are not here are an error only if `strict`.
    """
    if strict or os.path.exists(config["data"]["root"]):
        models.check_inputs(config)
        to_do = models.stages(config, goals)
    else:  # only of imported files is it known that they fit
        given = [name for name in models.STAGES
                 if all(models.imported_from(config, file) for file in models.files(config, name))]
        names = {name for goal in goals for name in stages_before(config, goal, given)} - {*given}
        to_do = [(*models.STAGES[name][:2], name) for name in models.STAGES if name in names]
    names = [name for _, _, name in to_do]
    for script, role, name in to_do:
        if script != "assemble.py":
            s = models.schedule(config, name)
            data.steps_per_epoch(images_of(config, name), s["batch"], 1, s["accumulate"], s["block"])
        try:
            with torch.device("meta"):
                models.build(config, role)
        except data.UserError as e:
            raise data.UserError(f"{name} cannot be made: {e} If its result, or that of a later stage, comes "
                                 "from elsewhere, import it first with tools/convert.py.") from None
    wanted = {*goals, *(parent for name in names for parent in models.parents(config, name))}
    return to_do, [name for name in models.STAGES if name in wanted and name not in names]


def stages_before(config, name, stop=()):
    """The names of the stages that a stage needs, in order, itself last. Nothing behind a stage in `stop`."""
    names = []
    for parent in models.parents(config, name) if name not in stop else ():
        names += stages_before(config, parent, stop)
    return list(dict.fromkeys([*names, name]))


def print_table(config, to_do, done):
    """Prints what each stage trains and takes, and the sum over all that are still to be made."""
    world, sums = int(os.environ.get("WORLD_SIZE", 1)), [0.0, 0.0]
    print("stage     parameters     images epochs     steps batch  learning rate     state GiB       TMAC"
          "   GPU hours")
    for name in done:
        print(f"{name:16}  finished")
    for name in [name for script, _, name in to_do if script != "assemble.py"]:
        s, images = models.schedule(config, name), images_of(config, name)
        parameters, state, macs = cost(config, name)
        batch = s["batch"] * world * s["accumulate"]
        low = s["min_lr"] * (batch / 512 if s["scale_min_lr"] else 1)
        steps = data.steps_per_epoch(images, s["batch"], world, s["accumulate"], s["block"]) * s["epochs"]
        tmac = macs * steps * world * s["accumulate"] / 1e12
        hours = 2 * tmac / 150 / 3600
        sums = [sums[0] + tmac, sums[1] + hours]
        print(f"{name:9}{parameters:12,}{images:11,}{s['epochs']:7}{steps:10,}{batch:6}  "
              f"{s['lr'] * batch / 512:7.2g} → {low:<7.2g}{state / 2**30:10.2f}{short(tmac):>11}"
              f"{short(hours, 0.01):>12}")
    print(f"to do{short(sums[0]):>84}{short(sums[1], 0.01):>12}")
    print("images: of an epoch; batch: of all processes and one step; state: weights, gradients and AdamW's\n"
          "moments of a process in float32, and activations come on top; TMAC: 10^12 multiply-adds of all\n"
          "epochs, forward and backward; GPU hours: hours at 150 TFLOP/s a GPU, of all GPUs together")


def short(number, least=0.0):
    """Three digits, of thousands all digits before the point."""
    if 0 < number < least:
        return f"< {least}"
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

    The batch is that of one process, train.<stage>.batch images. The bytes do not count activations.
    Of a stage of modules, the multiply-adds are of those that `only` names, if it names any.
    Multiply-adds are those of matrix products and convolutions, as the loops run them. What is small beside
    them is left out (routers, the graph regularizer), and so is validation.
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
