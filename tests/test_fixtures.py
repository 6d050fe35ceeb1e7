"""Agreement with the original: outputs, losses and gradients of files that its code made (tests/fixtures).

Tensor by tensor, the norm of the difference over the norm is at most 1e-6 in float64; in float32 it is
at most 1e-5 for outputs and 1e-4 for gradients. Weights are read under the original's names.

All files were made in evaluation mode, so nothing of training is seen by them: stochastic depth, the jitter
of codes, the sampled kernel, the noise of seeder, pool and router, an auxiliary loss, learning rates and
initial values. test_models.py and test_config.py have these.
"""

import pytest
import torch
import torch.nn.functional as F

import models
from conftest import fixture
from tools import convert

PRECISIONS = [(torch.float64, 1e-6, 1e-6), (torch.float32, 1e-5, 1e-4)]


def close(ours, theirs, tolerance, what):
    ours, theirs = ours.double(), theirs.double()
    assert ours.shape == theirs.shape, what
    scale = theirs.norm()
    # Absolute where a gradient is zero in theory.
    error = (ours - theirs).norm() / (scale if scale > 1e-12 else 1)
    assert error <= tolerance, f"{what}: {error:.2e}"


def close_gradients(model, theirs, tolerance):
    """Compares all gradients under translated names; none may be left over on either side."""
    theirs = convert.translate(theirs, model)
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in theirs.items():
        zero = torch.zeros_like(gradient)
        close(ours.pop(name, zero), gradient, tolerance, name)
    assert all((gradient == 0).all() for gradient in ours.values()), list(ours)


def config(width, meta_width):
    """Defaults, but for the widths of student and meta model and the codes, which are the original's."""
    options = {key: default for key, (_, default) in models.KEYS.items()}
    return models.unflatten(options | {"student.width": width, "meta.width": meta_width,
                                       "distill.codes": "original"})


def vit(c, depths, **options):
    sizes = (c[key] for key in ("img_size", "patch_size", "embed_dim", "num_heads"))
    return models.ViT(*sizes, depths, c["num_classes"], **options).eval()


def load(model, state, dtype):
    own = {name: value for name, value in model.state_dict().items() if name.endswith("bandwidth")}
    state = convert.translate(state, model)
    if isinstance(model, models.Stitched):  # inside the meta model the original has no kernel
        state = own | state
    models.load_state(model, state, "fixture")
    return model.to(dtype)


def meta_and_teacher(dtype):
    f = fixture("vit")
    for role in ("meta", "teacher"):
        model = vit(f["config"], f["config"][f"{role}_depths"])
        yield load(model, f[role]["model"], dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype, tolerance, _", PRECISIONS)
def test_vit(dtype, tolerance, _):
    f = fixture("vit")
    images = f["images"].to(dtype)
    for model, role in zip(meta_and_teacher(dtype), ("meta", "teacher")):
        close(model(images), f[f"{role}_logits"], tolerance, role)
        for i, state in enumerate(f[role]["model_stages"]):  # the same model, module by module
            load(model.parts[i], state, dtype)
        close(model(images), f[f"{role}_logits"], tolerance, f"{role} from modules")
    huge, expected = vit(f["config"], f["config"]["meta_depths"], qkv_bias=False, eps=1e-5), f["huge_options"]
    close(load(huge, expected["model"], dtype)(images), expected["logits"], tolerance, "huge")


@pytest.mark.parametrize("dtype, tolerance, gradient_tolerance", PRECISIONS)
@pytest.mark.parametrize("stitched", [False, True])
def test_vmoe(dtype, tolerance, gradient_tolerance, stitched):
    f = fixture("vmoe")
    c, expected = f["config"], f["stitched"] if stitched else f
    model = vit(c, c["depths"], moe=dict(experts=c["experts"]), moe_blocks=c["moe_positions"])
    if stitched:
        model.stitches.extend(models.new_stitches(model, config(c["embed_dim"], c["stitch_dim"]))
                              for _ in range(2))
    load(model, expected["model"], dtype)
    logits = model(f["images"].to(dtype))
    close(logits, expected["logits"], tolerance, "logits")
    if "grads" in expected:
        F.cross_entropy(logits, f["labels"]).backward()
        close_gradients(model, expected["grads"], gradient_tolerance)


def nac():
    c = fixture("nac_full")["config"]
    g, t = c["latent_graph_kwargs"], c["input_tokenizer_kwargs"]
    return models.NAC(
        image_size=16, width=c["state_dim"], heads=g["num_heads"], head_width=g["head_dim"],
        classes=c["output_dim"],
        latents=[g[f"num_{kind}_latents"] for kind in ("input", "mediator", "output")],
        propagators=g["num_iterations"], code_width=g["code_dim"], signature_width=g["signature_dim"],
        ffn_ratio=g["ffn_capacity_factor"], tokenizer_blocks=1,
        grid_width=t["positional_grid_kwargs"]["dim"]).eval()


@pytest.mark.parametrize("dtype, tolerance, gradient_tolerance", PRECISIONS)
def test_nac(dtype, tolerance, gradient_tolerance):
    f = fixture("nac_full")
    model = load(nac(), f["state_dict"], dtype)
    logits = model(f["images"].to(dtype))
    close(logits, f["logits"], tolerance, "logits")
    F.cross_entropy(logits, f["labels"]).backward()
    close_gradients(model, f["grads"], gradient_tolerance)


@pytest.mark.parametrize("dtype, tolerance, gradient_tolerance", PRECISIONS)
def test_nac_regularizers(dtype, tolerance, gradient_tolerance):
    f = fixture("nac_full")
    for name, regularizer in (("hinge", lambda m: models.hinge_repulsion(m, threshold=0.9)),
                              ("sbm", lambda m: models.block_model(m, groups=4))):
        model = load(nac(), f["state_dict"], dtype)
        loss = regularizer(model)
        close(loss, f[name], tolerance, name)
        loss.backward()
        close_gradients(model, f[f"{name}_grads"], gradient_tolerance)


def check_pair(student, expected, f, i, dtype, tolerance, gradient_tolerance):
    """A student module in its hybrid: logits of both hybrids, soft and hard loss with their gradients."""
    meta, teacher = meta_and_teacher(dtype)
    alpha, tau = f["config"]["alpha"], f["config"]["tau"]
    h = meta.hidden_states(f["images"].to(dtype))[i]
    teacher_logits = meta.rest(i + 1, teacher.parts[i](h))
    close(teacher_logits, expected["teacher_logits"], tolerance, "teacher hybrid")
    for kind in ("soft", "hard"):
        student.zero_grad()
        student_logits = meta.rest(i + 1, student(h))
        close(student_logits, expected["student_logits"], tolerance, "student hybrid")
        loss = ((1 - alpha) * models.soft_target_ce(student_logits, f["targets"].to(dtype))
                + alpha * models.kd(student_logits, teacher_logits, tau, kind, "mean"))
        close(loss, expected[kind]["loss"], tolerance, kind)
        loss.backward()
        close_gradients(student, expected[kind]["grads"], gradient_tolerance)


@pytest.mark.parametrize("dtype, tolerance, gradient_tolerance", PRECISIONS)
@pytest.mark.parametrize("i, name", list(enumerate(["read_in", "mediator", "read_out"])))
def test_m2mkd_nac(dtype, tolerance, gradient_tolerance, i, name):
    f = fixture("m2mkd_nac")
    c, expected = f["config"], f["students"][name]
    s = c["share"]
    whole = models.NAC(
        image_size=16, width=s["state_dim"], heads=c["heads"], head_width=c["head_dim"], latents=(1, 1, 1),
        propagators=1, classes=5, code_width=s["code_dim"], ffn_ratio=s["ffn_capacity_factor"],
        tokenizer_blocks=1, grid_width=c["tokenizer"]["positional_grid_kwargs"]["dim"])
    student = models.cut(whole, config(s["state_dim"], c["stitch_dim"]), "student")[i].eval()
    load(student, expected["state_dict"], dtype)
    codes = expected["codes"].to(dtype)
    if hasattr(student.body, "token_codes"):
        student.body.token_codes.codes = codes
    if expected["states"] is not None:  # the original has a state for each place in the batch
        student.body.latents.codes, student.body.latents.states = codes, expected["states"].to(dtype)
    check_pair(student, expected, f, i, dtype, tolerance, gradient_tolerance)


@pytest.mark.parametrize("dtype, tolerance, gradient_tolerance", PRECISIONS)
@pytest.mark.parametrize("i", range(3))
def test_m2mkd_vmoe(dtype, tolerance, gradient_tolerance, i):
    f = fixture("m2mkd_vmoe")
    c, expected = f["config"], f["students"][i]
    moe = dict(experts=c["experts"])
    whole = models.ViT(16, 4, c["embed_dim"], c["num_heads"], depths=[1, 1, 1], classes=5, moe=moe)
    student = models.cut(whole, config(c["embed_dim"], c["stitch_dim"]), "student")[i].eval()
    load(student, expected["model"], dtype)
    check_pair(student, expected, f, i, dtype, tolerance, gradient_tolerance)
