"""distill_module.py – m2mKD: each student module learns from a teacher module, inside one frozen meta model.

    python distill_module.py --config configs/demo_nac.yaml               stage 4: m2mKD of all modules
    python distill_module.py --config configs/demo_nac.yaml module=2      one module, as a job of its own
    python distill_module.py --config configs/demo_nac.yaml role=teacher  stage 2: the teacher's modules
    torchrun --nproc_per_node=8 distill_module.py --config configs/imagenet_vmoe.yaml

Teacher T, student S and meta model M are each cut into L modules: T = T_{L-1} ∘ … ∘ T_0, and so on. M is
small, one block per module; it was trained first (finetune.py role=meta) and never changes here. T is
finished too (finetune.py role=teacher). To teach S_i, put it in M's place i:

                              ┌─        T_i       ─ M_{i+1} ─ … ─ M_{L-1} ─ logits of the teacher hybrid
    image ─ M_0 ─ … ─ M_{i-1} ┤ h_i                                         │ KD
                              └─ pre ─ S_i ─ post ─ M_{i+1} ─ … ─ M_{L-1} ─ logits of the student hybrid
                                                                            │ CE
    loss = (1−α)·CE + α·KD                                                  label

Only S_i learns, with its stitch layers pre and post, which translate between the student's width and M's (T
has M's width). Of a NAC, what several modules use (seeder, mediator codes) keeps its initial values here and
learns in fine-tuning. The gradient reaches S_i through the frozen M_{i+1} … M_{L-1}. S_0 takes in pixels,
like M_0, and has no pre; S_{L-1} gives logits and has no post. The L pairs (T_i, S_i) do not depend on one
another, but all start from states h of the same M: one run of M over a batch gives h_0 … h_{L-1} to all. The
teacher's own modules are made the same way, without a teacher (α = 0) and without stitches: Deep Incubation.

Why do modules that were trained apart fit together afterwards? Because each of them learned to read and to
write the hidden states of the same M: M is their common interface. assemble.py joins the modules, and
finetune.py trains the whole, so that they learn to do without M.

Writes <output_dir>/<role>_modules/<i>.pt. Skips what is finished, resumes what is not; key=value overrides
any key. finetune.py has the same loop for one whole model.
"""

import torch

import data
import models
from models import kd, soft_target_ce


def main():
    config, args = models.command_line(__doc__, ("student", "teacher"), module=dict(type=int))
    # Stage 2 trains the teacher's modules with labels alone, stage 4 the student's with labels and teacher.
    role, d = args.role, config["distill"]
    name = "incubate" if role == "teacher" else "distill"
    alpha = models.alpha_of(config, name)
    options = {key: d[key] for key in ("tau", "kind", "reduction")}
    process = data.setup(config["device"])
    L = models.modules_of(config)
    if args.module not in (None, *range(L)):
        raise models.UserError(f"module={args.module} is not one of the modules 0 to {L - 1}.")
    wanted = range(L) if args.module is None else [args.module]
    files = {i: file for i, file in enumerate(models.files(config, name))
             if i in wanted and not models.finished(config, name, file)}
    if not files:
        return models.skip(config, process, name, args.module)
    train, validation = data.load(config, "train", name), data.load(config, "validation")

    # The meta model never changes, nor does the teacher. Evaluation mode: no noise but the module's own.
    meta = models.frozen(config, "meta", process)
    teacher = models.frozen(config, "teacher", process) if alpha else None
    # Cut from one whole model, modules start as they would in it. But no parameter that learns belongs to
    # two of them, and each has an optimizer of its own: training all in one pass is training each alone.
    whole = models.build(config, role)
    modules = models.cut(whole, config, role)
    rate = config["train"][name]["drop_path"]
    models.set_drop_path(whole, rate, by_module=True)  # a student's; a teacher's: drop_in_hybrid, below
    students = {i: modules[i].to(process.device) for i in files}
    stage = models.Stage(config, process, name, students, files, train, only=args.module)
    low = compare_hybrids(meta, teacher, validation, config, process)

    for epoch in stage.epochs():
        meta.train(role == "teacher")  # in incubation M's blocks drop with the module's, and only there
        for images, targets in stage.batches(epoch):
            # h_0 = images, h_i = M_{i-1} ∘ … ∘ M_0 (images): one run of M serves all pairs.
            # All pairs share h, so M_0 … can drop at the rates of one hybrid only: the last one.
            if role == "teacher":
                models.drop_in_hybrid(meta, whole, L - 1, rate)
            stage.seed_noise()
            with models.autocast(config, process.device), torch.no_grad():
                hidden = meta.hidden_states(images)
            for i, student in stage.wrapped.items():
                # Noise (drop path, jitter) is drawn from (step, i): the same for modules together or alone.
                if role == "teacher":
                    models.drop_in_hybrid(meta, whole, i, rate)
                stage.seed_noise(i)
                with models.autocast(config, process.device):
                    # Student hybrid: M_{L-1} ∘ … ∘ M_{i+1} ∘ post ∘ S_i ∘ pre (h_i). The rest of M is frozen
                    # but not under no_grad: the gradient must pass through it to reach S.
                    logits = meta.rest(i + 1, student(hidden[i])).float()
                    loss = soft_target_ce(logits, targets)
                    if teacher:
                        with torch.no_grad():
                            # Teacher hybrid, from the same state: M_{L-1} ∘ … ∘ M_{i+1} ∘ T_i (h_i)
                            teacher_logits = meta.rest(i + 1, teacher.parts[i](hidden[i])).float()
                        # L = (1−α)·CE(student hybrid, y) + α·KD(student hybrid, teacher hybrid)
                        lesson = kd(logits, teacher_logits, targets=targets, **options)
                        loss = (1 - alpha) * loss + alpha * lesson
                # Balance losses of a V-MoE's mixtures. 0 for a NAC's modules.
                total = loss + models.regularizer(students[i], config)
                (total / stage.c["accumulate"]).backward()
                stage.record(i, loss, logits, targets)
            stage.step()
        validated = accuracy(meta, students, validation, config, process)
        stage.end_epoch(validated)
        if epoch + 1 == stage.c["epochs"] and low:
            for i in [i for i in students if validated[i] < low]:
                models.say(process, f"module {i}'s hybrid ends at {validated[i]} %, less than half of the "
                           "meta model's accuracy: train it longer")
    stage.finish()


def compare_hybrids(meta, teacher, images, config, process):
    """Prints the accuracies of M and of the teacher hybrids -> half of M's, below which a hybrid is bad."""
    if not len(images):
        return 0
    # M alone is M with its own M_0. If it is near chance it tells nothing.
    alone = accuracy(meta, {0: meta.parts[0]}, images, config, process)[0]
    low = alone / 2 if alone > 200 / config["data"]["classes"] else 0  # 200 / K: twice chance, in %
    if teacher:
        # Far below M alone, T does not fit this M; above it, T has something to add.
        hybrids = [*accuracy(meta, dict(enumerate(teacher.parts)), images, config, process).values()]
        models.say(process, f"validation: meta model {alone} %, teacher hybrids {hybrids} %")
        if min(hybrids) < low:
            models.say(process, "warning: a teacher hybrid has less than half of the meta model's accuracy. "
                       "Was the teacher incubated in this meta model, and for long enough?")
    return low


@torch.no_grad()
def accuracy(meta, modules, images, config, process):
    """Top-1 of each hybrid M_{L-1} ∘ … ∘ module ∘ … ∘ M_0, each image counted once. {i: module} -> {i: %}"""
    if not len(images):
        return dict.fromkeys(modules)
    meta.eval()
    correct = {i: torch.zeros((), device=process.device) for i in modules}
    for x, labels in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            hidden = meta.hidden_states(x)
            for i, module in modules.items():
                correct[i] += (meta.rest(i + 1, module.eval()(hidden[i])).argmax(-1) == labels).sum()
    return {i: round(100 * data.sum_over_processes(c).item() / len(images), 2) for i, c in correct.items()}


if __name__ == "__main__":
    models.run(main)
