"""assemble.py – puts separately trained modules together: <role>_modules/<i>.pt -> <role>_assembled.pt.

    python assemble.py --config configs/demo_nac.yaml role=teacher      after incubation (stage 2)
    python assemble.py --config configs/demo_nac.yaml                   the student, after m2mKD (stage 4)

Nothing is trained here; tensors are only copied. A teacher's modules fit one another as they are. A student's
module was trained between two stitch layers, from the meta model's width to its own and back:

    m2mKD    M_{i-1} ─ pre_i ─ S_i ─ post_i ─ M_{i+1}      M: meta model; no pre_0 and post_{L-1}
    drop     … S_i ─ S_{i+1} …                             without stitches; fine-tuning joins the modules
    keep     … S_i ─ post_i ─ pre_{i+1} ─ S_{i+1} …        both stay: S_{i+1} hears S_i through M's width
    fold     … S_i ─ (pre_{i+1} ∘ post_i) ─ S_{i+1} …      the same function as keep, as one affine map

(Key assemble.stitches; fold is for a NAC, because a V-MoE's stitches hold LayerNorms.) Tensors of the whole
model that are in no module's file are named as fresh. A NAC's graph prior is fitted now. Right after
assembly a student's accuracy is near chance: its modules have never met. finetune.py trains it.
"""

import data
import models


def main():
    config, args = models.command_line(__doc__, ("student", "teacher"))
    if args.dry_run:
        return models.dry_run(config)
    process = data.setup(config["device"])
    # A copy of files: under torchrun too, one process does it.
    if process.rank == 0:
        assemble(config, args.role, process)


def assemble(config, role, process):
    stage, name = f"assemble_{role}", f"{role}_assembled.pt"
    if models.finished(config, stage, name):
        return models.announce(process, f"{stage}: finished; skipped")
    models.begin(config, process)
    whole = models.build(config, role)
    # Inside the meta model nothing has signatures, so no module's file holds any: they are fitted now.
    models.say(process, models.fit_graph_prior(whole, config))

    # The modules share the whole model's parameters: reading a module's file fills its place in the whole.
    # Stitches belong to the modules, not to the whole: drop ignores them, keep and fold copy them.
    modules = models.cut(whole, config, role)
    if role == "student" and config["student"]["modules"]:
        models.load_modules(modules, config["student"]["modules"])
    else:
        made_by = "incubate" if role == "teacher" else "distill"
        for i, module in enumerate(modules):
            models.load_weights(module, models.needed(config, made_by, f"{role}_modules/{i}.pt"))
    models.join_stitches(whole, modules, config["assemble"]["stitches"])

    # What no module has learned is found by identity and named. Inside the meta model there is no kernel.
    learned = {id(tensor) for module in modules for key, tensor in module.state_dict(keep_vars=True).items()
               if not key.endswith("attention.bandwidth")}
    fresh = [key for key, tensor in whole.state_dict(keep_vars=True).items()
             if id(tensor) not in learned and not key.startswith("stitches.")]
    if role == "student":
        # In the paper Tiny-ImageNet's students are distilled on ImageNet: image size and classes differ.
        student = models.build(models.on_target(config, role), role)
        fresh += models.carry(whole.state_dict(), student, "its modules", models.new_classes(config))
        whole = student
    models.save_finished(config, stage, name, whole.state_dict())
    models.announce(process, f"{stage}: {len(modules)} modules; fresh tensors: {', '.join(fresh) or 'none'}")


if __name__ == "__main__":
    models.run(main)
