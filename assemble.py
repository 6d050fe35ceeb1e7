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
model that are in no module's file keep their initial values, and are named. A NAC's graph prior is fitted
now. Right after assembly a student's accuracy is near chance: its modules have never met. finetune.py
trains it.
"""

from pathlib import Path

import data
import models


def main():
    config, args = models.command_line(__doc__, ("student", "teacher"))
    process = data.setup(config["device"])
    # A copy of files: under torchrun too, one process does it.
    if process.rank == 0:
        assemble(config, args.role, process)


def assemble(config, role, process):
    name, file = f"assemble_{role}", f"{role}_assembled.pt"
    if models.finished(config, name, file):
        return models.skip(config, process, name)
    models.begin(config, process)
    lock = models.lock(Path(config["output_dir"], file))
    whole = models.build(config, role)
    # Inside the meta model nothing has signatures, so no module's file holds any: they are fitted now.
    models.say(process, models.fit_graph_prior(whole, config))

    # The modules share the whole model's parameters: reading a module's file fills its place in the whole.
    # Stitches belong to the modules, not to the whole: drop ignores them, keep and fold copy them.
    modules = models.cut(whole, config, role)
    made_by = "incubate" if role == "teacher" else "distill"
    for module, module_file in zip(modules, models.files(config, made_by)):
        models.load_weights(module, models.needed(config, made_by, module_file))
    models.join_stitches(whole, modules, config["assemble"]["stitches"])

    # What is in no module's file is found by identity and named. Inside the meta model there is no kernel.
    held = {id(tensor) for module in modules for key, tensor in module.state_dict(keep_vars=True).items()
            if not key.endswith("attention.bandwidth")}
    fresh = [key for key, tensor in whole.state_dict(keep_vars=True).items()
             if id(tensor) not in held and not key.startswith("stitches.")]
    models.save_finished(config, name, file, whole.state_dict())
    Path(lock.name).unlink()
    models.announce(process, f"{name}: {len(modules)} modules; not in their files, so as initialized: "
                    f"{', '.join(fresh) or 'nothing'}")


if __name__ == "__main__":
    models.run(main)
