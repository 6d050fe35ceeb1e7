"""assemble.py – puts separately trained modules together: <role>_modules/<i>.pt -> <role>_assembled.pt.

    python assemble.py --config configs/demo_nac.yaml role=teacher      after incubation (stage 2 of m2mKD)
    python assemble.py --config configs/demo_nac.yaml                   the student, after m2mKD (stage 4)

Stitch layers are dropped, kept or folded (config key distill.stitches). Every tensor of the whole model either comes
from a module or is named here as fresh; the graph prior is fitted now. finetune.py trains the result end to end.
Right after assembly the accuracy of a student is near chance: its modules have never met.
"""

import data
import models


def main():
    config, words = models.command_line(__doc__, ("student", "teacher"))
    if words.dry_run:
        return models.dry_run(config)
    role = words.role
    process = data.setup(config["device"])
    if process.rank == 0:  # a copy of files: one process does it
        assemble(config, role, words.force, process)
    data.close()


def assemble(config, role, force, process):
    stage, name = f"assemble_{role}", f"{role}_assembled.pt"
    if result := models.finished(config, stage, name, force):
        return models.say(process, f"{stage}: {result} is finished; skipped (force=true repeats it).")
    models.begin(config, process, name)
    whole = models.build(config, role)
    models.say(process, models.fit_graph_prior(whole, config) if role == "student" else "")

    # The modules share the whole model's parameters: reading a module's file fills its place in the whole.
    modules = models.cut(whole, config, role)
    for i, module in enumerate(modules):
        path = models.needed(config, role, "incubate" if role == "teacher" else "distill", f"{role}_modules/{i}.pt")
        models.load_weights(module, path)
    how = config["distill"]["stitches"] if role == "student" else "drop"
    if how == "fold":
        models.fold_stitches(whole, modules)

    taught = {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}
    fresh = [name for name, tensor in whole.state_dict(keep_vars=True).items() if id(tensor) not in taught]
    if role == "student":
        whole, other = carry(whole, models.build(models.on_target(config, role), role))
        fresh += other
    models.save_finished(config, stage, name, whole.state_dict())
    models.say(process, f"{stage}: {len(modules)} modules, stitches {how if role == 'student' else 'none'}; "
               f"fresh tensors: {', '.join(fresh) or 'none'}")


def carry(distilled, student):
    """Weights of the distilled student -> the student of the target data. Returns it, and the names not carried over.

    With another image size or other classes the position grid and the classifier start fresh (in the paper
    Tiny-ImageNet students are distilled on ImageNet); any other mismatch is an error.
    """
    source, state, fresh = distilled.state_dict(), student.state_dict(), []
    for name, tensor in state.items():
        if source[name].shape == tensor.shape:
            state[name] = source[name]
        elif name.startswith(("tokenizer.grid", "pool.to_logits", "head.")):
            fresh.append(name)
        elif name == "pos_embed":
            state[name] = models.resize_pos_embed(source[name], tensor.shape[1])
        else:
            raise models.UserError(f"{name} is {tuple(source[name].shape)} in the distilled modules and "
                                   f"{tuple(tensor.shape)} in the student on target: it cannot be carried over.")
    student.load_state_dict(state)
    return student, fresh


if __name__ == "__main__":
    models.run(main)
