"""Promises of models.py: its equations, its modules, and its files of weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import literal
import models
from data import UserError

LN3 = math.log(3)


def config(tmp_path, *overrides):
    (tmp_path / "c.yaml").write_text("data: {image_size: 16, classes: 24}\n")
    return models.load_config(tmp_path / "c.yaml", [f"output_dir={tmp_path / 'run'}", *overrides])


def shake(model, std=0.1, seed=0):
    """Moves every parameter off its initial value, so that layer scales, biases and gains take part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += std * torch.randn(p.shape, generator=generator)
    return model


def error(ours, theirs):
    """Norm of the difference over norm; absolute where the norm is next to nothing."""
    norm = theirs.norm()
    return ((ours - theirs).norm() / (norm if norm > 1e-5 else 1)).item()


def compare(model, ours, theirs, x, tolerance, gradient_tolerance, seed=0):
    """Outputs, and gradients of all parameters and of the input, of two functions of the same model."""
    results = []
    for function in (ours, theirs):
        model.zero_grad()
        x = x.detach().requires_grad_()
        torch.manual_seed(seed)
        out = function(x)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (out * direction.to(out)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((out, {"input": x.grad, **gradients}))
    (a, grads), (b, expected) = results
    assert error(a, b) <= tolerance
    for name, gradient in expected.items():
        assert error(grads.pop(name, torch.zeros_like(gradient)), gradient) <= gradient_tolerance, name
    assert all((g == 0).all() for g in grads.values()), list(grads)


# ---------- NAC

SMALL = dict(image_size=32, width=24, heads=2, head_width=12, latents=(5, 11, 3), propagators=2, classes=7,
             signature_width=16, tokenizer_blocks=1, grid_width=8)
SIZES = {
    "small": SMALL,
    "other widths": {**SMALL, "code_width": 20, "heads": 3, "head_width": 5, "ffn_ratio": 1.0},
    "pooled grid": {**SMALL, "width": 16, "tokenizer_stages": 3, "grid_size": 8, "image_size": 48},
    "one of each": {**SMALL, "latents": (1, 1, 1), "propagators": 1, "ffn_ratio": 1.4},
}


@pytest.mark.parametrize("dtype, tolerance, gradient_tolerance",
                         [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-9, 1e-9)])
@pytest.mark.parametrize("size", SIZES)
def test_nac_is_the_literal_circuit(size, dtype, tolerance, gradient_tolerance):
    torch.manual_seed(0)
    model = shake(models.NAC(**SIZES[size])).to(dtype).eval()
    images = torch.randn(3, 3, SIZES[size]["image_size"], SIZES[size]["image_size"], dtype=dtype)
    compare(model, model, lambda x: literal.nac(model, x), images, tolerance, gradient_tolerance)


@pytest.mark.parametrize("size", list(SIZES)[:2])
def test_nac_in_training_is_the_literal_circuit_with_the_same_noise(size):
    torch.manual_seed(0)
    model = shake(models.NAC(**SIZES[size])).train()
    models.set_drop_path(model, 0.3)
    compare(model, model, lambda x: literal.nac(model, x), torch.randn(3, 3, 32, 32), 1e-5, 1e-4)


@pytest.mark.parametrize("sample", [0, 7])
def test_no_gradient_through_truncated_pairs(sample):
    delta = torch.tensor([[0.1, 0.89, 0.91, 1.5]], requires_grad=True)
    beta = torch.tensor(1.0, requires_grad=True)
    weights = (models.log_kernel(delta, beta, sample=sample) + torch.zeros(4)).softmax(-1)
    (weights * torch.arange(4.0)).sum().backward()
    assert (delta.grad[0, :2] != 0).all() and (delta.grad[0, 2:] == 0).all() and beta.grad.isfinite()


@pytest.mark.parametrize("training", [False, True])
def test_a_latent_with_no_sender_hears_all_alike_and_all_stays_finite(training):
    """A signature of zeros is at distance 1 from all, its own too: every pair is truncated."""
    torch.manual_seed(0)
    model = models.NAC(**SMALL).train(training)
    signatures = model.mediator_latents.signatures
    with torch.no_grad():
        signatures[3] = 0
    delta = models.distance(signatures, signatures)
    assert (delta[3] > models.TRUNCATION).all()
    assert (delta.diagonal()[[0, 1, 2, *range(4, 11)]] < 1e-5).all()  # any other latent hears itself
    kernel = models.log_kernel(delta, torch.tensor(1.0)).softmax(-1)
    assert kernel[3].allclose(torch.full((11,), 1 / 11))
    assert (kernel[0][delta[0] > models.TRUNCATION] == 0).all()
    out = model(torch.randn(2, 3, 32, 32))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_in_bfloat16_the_kernel_stays_float32_and_every_gradient_finite():
    """In bfloat16 1 − ε is 1: the kernel of a latent with itself would have an infinite logit."""
    torch.manual_seed(0)
    model = models.NAC(**SMALL).train()
    signatures = model.mediator_latents.signatures
    with torch.no_grad():
        signatures[1] = signatures[0]
    with torch.autocast("cpu", torch.bfloat16):
        delta = models.distance(signatures, signatures)
        assert delta.dtype == torch.float32
        assert models.log_kernel(delta, torch.tensor(1.0), sample=3).isfinite().all()
        loss = model(torch.randn(4, 3, 32, 32)).float().logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert signatures.grad.norm() > 0


# ---------- Graph priors and regularizers


@pytest.mark.parametrize("kind, n", [
    ("planted_partition", 20), ("ring_of_cliques", 64), ("erdos_renyi", 24), ("scale_free", 24)])
def test_fitted_signatures_link_the_graph_s_pairs_only(kind, n):
    torch.manual_seed(0)
    linked = models.random_graph(kind, n, np.random.default_rng(0), groups=8 if n == 64 else 4, p_out=0.05)
    signatures = torch.empty(n, 64)
    near, far = models.fit_signatures(signatures, linked)
    delta = models.distance(signatures, signatures)
    linked, unlinked = torch.from_numpy(linked), torch.from_numpy(~linked & ~np.eye(n, dtype=bool))
    assert near == (delta[linked] <= 0.9).float().mean() and far == (delta[unlinked] > 0.9).float().mean()
    assert near == far == 1


def test_hinge_repulsion_by_hand():
    nac = models.NAC(**{**SMALL, "latents": (1, 2, 1), "signature_width": 2})
    # Unit vectors at 0°, 45°, 90°, 45°: δ = 1 − cos 45° = .2929 for 0–1, 0–3, 1–2, 2–3; 0 for 1–3; 1 for 0–2.
    groups = nac.input_latents, nac.mediator_latents, nac.output_latents
    for latents, degrees in zip(groups, ([0], [45, 90], [45])):
        angle = torch.tensor(degrees) * math.pi / 180
        latents.signatures.data = torch.stack([angle.cos(), angle.sin()], 1)
    assert abs(models.hinge_repulsion(nac) + 4 * 0.2929) < 1e-3
    assert abs(models.hinge_repulsion(nac, threshold=0.2)) < 1e-6


def test_linked_pairs_by_hand():
    nac = models.NAC(**{**SMALL, "latents": (1, 3, 1), "signature_width": 2})
    # δ = 1 − cos: .29 for 0°–45° and 45°–90°, 1 > .9 for 0°–90°: two of three pairs can talk.
    nac.mediator_latents.signatures.data = torch.tensor([[1.0, 0], [1, 1], [0, 1]])
    assert models.log_extras(nac) == {"linked": pytest.approx(200 / 3)}


@pytest.mark.parametrize("n, G", [(6, 3), (7, 3), (8, 7), (5, 5), (256, 8), (768, 8), (250, 7)])
def test_match_rows_is_the_best_assignment(n, G):
    # A transport plan is optimal if and only if no cycle of moves group -> … -> same group lowers its cost.
    rng, capacity = np.random.default_rng(0), np.bincount(np.arange(n) * G // n)
    for digits in (9, 1) * (10 if n < 10 else 1):  # also with ties
        cost = (rng.normal(size=(n, G)) + 2 * rng.normal(size=G)).round(digits)
        group = models.match_rows(torch.from_numpy(cost), capacity).numpy()
        assert (np.bincount(group, minlength=G) == capacity).all()
        # The cheapest row of group a to move to group b.
        move = np.array([(cost[group == a] - cost[group == a, a, None]).min(0) for a in range(G)])
        for k in range(G):  # Floyd–Warshall
            move = np.minimum(move, move[:, k, None] + move[k])
        assert move.diagonal().min() > -1e-9


# ---------- V-MoE


def mixture(routing, width=12, hidden=20, experts=4, **options):
    """A mixture and tokens (3×8) that its router spreads evenly, unevenly, or not at all."""
    torch.manual_seed(0)
    moe = models.MoE(width, hidden, experts, **options)
    for p in moe.parameters():
        nn.init.trunc_normal_(p, std=0.3)
    x = torch.randn(3, 8, width)
    with torch.no_grad():
        if routing == "balanced":  # the largest entries of token t are t and t+1 (mod E)
            moe.router.weight.copy_(torch.eye(experts, width)), moe.router.bias.zero_()
            one = torch.eye(experts)
            x.view(24, width)[:, :experts] = (2 * one + one.roll(1, 1)).repeat(6, 1)
        if routing == "collapsed":
            moe.router.bias.copy_(torch.tensor([100.0, 99, 0, 0]))
        if routing == "without expert 2":
            moe.router.bias[2] = -100
    return moe, x


ROUTINGS = {"balanced": [0.25] * 4, "uneven": None, "without expert 2": None, "collapsed": [0.5, 0.5, 0, 0]}


@pytest.mark.parametrize("routing, load", ROUTINGS.items())
def test_moe_is_the_literal_mixture(routing, load):
    for dtype, tolerance, gradient_tolerance in ((torch.float32, 1e-5, 1e-4), (torch.float64, 1e-9, 1e-9)):
        moe, x = mixture(routing)
        moe, x = moe.to(dtype), x.to(dtype)
        compare(moe, moe, lambda x: literal.moe(moe, x), x, tolerance, gradient_tolerance)
        assert abs(moe.load.sum() - 1) < 1e-6
        if load:
            assert models.log_extras(moe) == {"expert_load": [load]}  # what the log says
        if routing == "without expert 2":
            assert moe.load[2] == 0 and (moe.fc1_weight.grad[2] == 0).all() and moe.load[0] > 0


@pytest.mark.parametrize("routing, sizes", [
    *((routing, (16, 24)) for routing in ROUTINGS), ("uneven", (12, 24)), ("uneven", (16, 20))])
def test_moe_in_bfloat16_is_the_mixture_to_bfloat16_s_precision(routing, sizes):
    moe, x = mixture(routing, *sizes)
    x, results = x.requires_grad_(), []
    for bfloat16 in (True, False):
        moe.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = moe(x)
        out.float().square().sum().backward()
        gradients = {name: p.grad for name, p in moe.named_parameters()}
        results.append((out.dtype, moe.load, {"output": out.float(), "input": x.grad, **gradients}))
    (kind, load, ours), (_, exact_load, exact) = results
    # Tokens go to the experts that float32 chooses.
    assert kind == torch.bfloat16 and torch.equal(load, exact_load)
    assert {name for name in exact if error(ours[name].float(), exact[name]) > 0.02} == set()


@pytest.mark.parametrize("routing", ["balanced", "uneven", "collapsed"])
def test_moe_capacity_is_the_literal_one(routing):
    moe, x = mixture(routing, capacity=0.7)
    assert (moe(x) != moe.eval()(x)).any() and moe.train()
    compare(moe, moe, lambda x: literal.moe(moe, x), x, 1e-5, 1e-4)


def test_balance_loss_by_hand():
    moe = models.MoE(4, 4, experts=2, top_k=1, balance=0.1)
    # importance = softmax(ln 3, 0) = (.75, .25): var/mean² = .0625/.25 = .25
    # load = Φ((ln 3 − ln 3)·2), Φ((0 − ln 3)·2) = .5, .014003: mean .257001, half the difference .242999,
    # var/mean² = .894006
    loss = moe.auxiliary_loss(torch.tensor([[LN3, 0.0]]), torch.tensor([[LN3]]))
    assert abs(loss - 0.1 * 0.5 * (0.25 + 0.894006)) < 1e-5
    logits = torch.zeros(6, 2, requires_grad=True)  # perfect balance
    loss = moe.auxiliary_loss(logits, torch.zeros(6, 1))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_balance_loss_is_off_by_default_and_in_evaluation():
    vit = dict(image_size=8, patch=4, width=8, heads=2, depths=[1, 1], classes=3)
    images, no_graph = torch.randn(2, 3, 8, 8), {"train": {"student": {"regularizer": 0}}}
    model = models.ViT(**vit, moe=dict(experts=4))
    assert model(images) is not None and models.regularizer(model, no_graph) == 0
    model = models.ViT(**vit, moe=dict(experts=4, balance=0.1))
    assert not torch.equal(model(images), model(images))  # router noise
    loss = models.regularizer(model, no_graph)
    loss.backward()
    assert loss > 0 and model.blocks[0].moe.router.weight.grad.norm() > 0
    assert torch.equal(model.eval()(images), model(images))


# ---------- ViT, modules and stitches


@pytest.mark.parametrize("moe", [None, dict(experts=4)])
def test_modules_composed_are_the_whole(moe):
    torch.manual_seed(0)
    model = models.ViT(16, 4, 8, 2, depths=[1, 2, 1], classes=3, moe=moe, moe_blocks=[1, 3]).eval()
    x = images = torch.randn(2, 3, 16, 16)
    logits = model(images)
    for part in model.parts:
        x = part(x)
    assert torch.equal(x, logits) and x.shape == (2, 3)
    hidden = model.hidden_states(images)
    assert hidden[0] is images and len(hidden) == 3 and all(h.shape == (2, 17, 8) for h in hidden[1:])
    for i, h in enumerate(hidden):
        assert torch.equal(model.rest(i, h), logits)
    # the modules share the whole model's parameters, all of them and no others
    own = {id(p) for p in model.parameters()}
    assert own == {id(p) for part in model.parts for p in part.parameters()}


def distilled(c, stitches):
    """A whole student and its modules, as if they had been trained, and joined as assemble.py joins them."""
    whole = shake(models.build({**c, "assemble": {"stitches": stitches}}, "student"))
    modules = models.cut(whole, c, "student")
    for k, stitch in enumerate(stitch for m in modules for stitch in (m.pre_stitch, m.post_stitch)):
        shake(stitch, seed=k)
    models.join_stitches(whole, modules, stitches)
    return whole.eval(), modules


def test_kept_stitches_make_a_student_the_chain_of_its_modules(tmp_path):
    c = config(tmp_path, "student.kind=vmoe", "student.experts=4", "student.width=24", "student.patch=4",
               "student.depths=[2,1,2]", "meta.width=40", "teacher.width=40")
    whole, modules = distilled(c, "keep")
    x = images = torch.randn(2, 3, 16, 16)
    for module in modules:
        x = module.eval()(x)
    assert torch.equal(whole(images), x)
    modules[1].post_stitch.fc.bias.data[0] += 5  # fine-tuning trains copies
    assert not torch.equal(whole(images), modules[2](modules[1](modules[0](images))))
    dropped, _ = distilled(c, "drop")
    assert len(dropped.stitches) == 0 and not torch.allclose(dropped(images), x)


@pytest.mark.parametrize("codes", ["own", "original"])
def test_folded_stitches_are_kept_stitches(tmp_path, codes):
    c = config(tmp_path, f"distill.codes={codes}", "student.propagators=2", "meta.depths=[1,1,1,1]",
               "meta.width=40", "teacher.width=40", "teacher.depths=[1,1,1,1]", "student.width=24")
    (kept, _), (folded, _) = (distilled(c, stitches) for stitches in ("keep", "fold"))
    assert kept.stitches[0].post.weight.shape == (40, 24) and folded.stitches[0].weight.shape == (24, 24)
    own = kept.state_dict()
    folded.load_state_dict({name: own.get(name, value) for name, value in folded.state_dict().items()})
    images = torch.randn(2, 3, 16, 16)
    assert error(folded(images), kept(images)) < 1e-5
    kept.stitches[2].pre.bias.data[0] += 5
    assert error(folded(images), kept(images)) > 1e-3


@pytest.mark.parametrize("kind, codes", [("nac", "own"), ("nac", "original"), ("vmoe", "own")])
def test_a_student_s_modules_fit_the_meta_model(tmp_path, kind, codes):
    c = config(tmp_path, f"student.kind={kind}", f"distill.codes={codes}", "meta.width=40",
               "teacher.width=40", "student.experts=4", "student.depths=[2,1,2]")
    meta, student = models.build(c, "meta"), models.build(c, "student")
    modules = models.cut(student, c, "student")
    with torch.no_grad():
        hidden = meta.hidden_states(torch.randn(2, 3, 16, 16))
    for i, (module, h) in enumerate(zip(modules, hidden)):
        module.train().zero_grad()
        logits = meta.rest(i + 1, module(h))
        assert logits.shape == (2, c["data"]["classes"])
        logits.sum().backward()
        for name, p in module.named_parameters():  # all that train are used
            assert (p.grad is not None) == p.requires_grad, name
        assert torch.equal(module.eval()(h), module(h))
    assert isinstance(modules[0].pre_stitch, nn.Identity) and isinstance(modules[-1].post_stitch, nn.Identity)
    # no two modules train the same tensor: each learns the same alone as with all others
    trained = [id(p) for module in modules for p in module.parameters() if p.requires_grad]
    assert len(trained) == len(set(trained))
    # same seed, same weights and stitches, whether these will be kept or not
    keep = {**c, "assemble": {**c["assemble"], "stitches": "keep"}}
    again = models.cut(models.build(keep, "student"), c, "student")
    for a, b in zip(modules, again):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_fresh_experts_and_stitches_have_their_own_deviation(tmp_path):
    words = ["student.kind=vmoe", "student.width=24", "student.depths=[1,1,1]", "student.experts=4",
             "student.mlp_ratio=2", "student.init_std=0.1"]
    small = 1 / math.sqrt(3 * 24 * 48)  # the original's, for experts of 24 × 48
    for own in (True, False):
        c = config(tmp_path, *words, *[f"student.expert_std={small}", "student.stitch_std=0.02"] * own)
        student = models.build(c, "student")
        block, post = student.blocks[0], models.cut(student, c, "student")[0].post_stitch.fc
        for weight in (block.moe.fc1_weight, block.moe.fc2_weight):
            assert weight.std().item() == pytest.approx(small if own else 0.1, rel=0.1)
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.1, rel=0.1)
        assert block.moe.router.weight.std().item() > 0.05
        assert post.bias.any() != own  # else nn.Linear's own
        assert not own or post.weight.std().item() == pytest.approx(0.02, rel=0.15)


def rates(module):
    """The drop rates of a model's blocks."""
    return [pytest.approx(block.drop_path.rate) for block in module.blocks]


def test_drop_rates_of_every_stage(tmp_path):
    c = config(tmp_path, "student.kind=vmoe", "student.experts=2", "student.depths=[3,3]",
               "meta.depths=[1,1]", "teacher.depths=[3,2]")
    meta, teacher, student = (models.build(c, role) for role in ("meta", "teacher", "student"))
    models.set_drop_path(student, 0.1)  # fine-tuning: over the whole model
    assert rates(student) == [0, 0.02, 0.04, 0.06, 0.08, 0.1]
    models.set_drop_path(student, 0.1, by_module=True)  # m2mKD: over each module
    assert rates(student) == [0, 0.05, 0.1, 0, 0.05, 0.1]
    models.drop_in_hybrid(meta, teacher, 0, 0.1)  # incubation: over T_0 (three blocks) and M_1
    assert rates(teacher.parts[0]) + rates(meta.parts[1]) == [0, 0.1 / 3, 0.2 / 3, 0.1]
    models.drop_in_hybrid(meta, teacher, 1, 0.1)  # M_0 and T_1 (two blocks)
    assert rates(meta.parts[0]) + rates(teacher.parts[1]) == [0, 0.05, 0.1]
    nac = models.NAC(**SMALL)
    for by_module in (False, True):  # constant over a NAC's propagators, and nothing else of it drops
        models.set_drop_path(nac, 0.1, by_module)
        found = {name: m.rate for name, m in nac.named_modules() if isinstance(m, models.DropPath)}
        assert found == {name: 0.1 * name.startswith("propagators") for name in found} and len(found) == 6


def test_no_noise_on_a_fixed_code(tmp_path):
    for codes, noisy in (("own", True), ("original", False)):
        c = config(tmp_path, f"distill.codes={codes}")
        # A propagator, since it has no seeder.
        _, module, last = models.cut(models.build(c, "student"), c, "student")
        x = torch.randn(3, 17, c["meta"]["width"])
        assert torch.equal(module.train()(x), module(x)) != noisy, codes
    # The original has one code a module: the read-out's latent shares the tokens'.
    assert torch.equal(last.body.latents.codes, last.body.token_codes.codes)


# ---------- Losses

#                       teacher (½, ½), student (¾, ¼): KL = ½ ln(2/3) + ½ ln 2 = .143841; sum · τ² = 1.098612
TEACHER = torch.tensor([[2 * LN3, 0.0], [0.0, 0.0]])
STUDENT = torch.tensor([[0.0, 0.0], [2 * LN3, 0.0]])


@pytest.mark.parametrize("reduction, expected", [("batchmean", 1.098612 / 2), ("mean", 1.098612 / 4)])
def test_soft_distillation_loss_by_hand(reduction, expected):
    assert abs(models.kd(STUDENT, TEACHER, 2.0, "soft", reduction) - expected) < 1e-6
    assert abs(models.kd(TEACHER, TEACHER, 2.0, "soft", reduction)) < 1e-7


# ---------- Files of weights


@pytest.mark.parametrize("role, kind", [
    ("meta", "nac"), ("teacher", "nac"), ("student", "nac"), ("baseline", "nac"), ("student", "vmoe")])
@pytest.mark.parametrize("stitches", ["drop", "keep"])
def test_a_finished_file_alone_gives_the_trained_model_back(tmp_path, glyphs, role, kind, stitches):
    c = config(tmp_path, f"student.kind={kind}", "student.experts=4", f"assemble.stitches={stitches}",
               "student.latents=[4,16,2]", f"data.root={glyphs}")
    trained = shake(models.build(c, role)).eval()
    names = [f"class {k}" for k in range(24)]
    models.save_finished(c, role, f"{role}.pt", trained.state_dict(), names)
    loaded, images = models.load(tmp_path / f"run/{role}.pt"), torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), trained(images)) and not loaded.training
    assert (loaded.image_size, loaded.class_names, loaded.config) == (16, names, c)


def test_only_a_finished_whole_model_is_loaded(tmp_path, glyphs):
    c = config(tmp_path, f"data.root={glyphs}")
    module, path = models.cut(models.build(c, "student"), c, "student")[0], tmp_path / "run/foreign.pt"
    models.save_finished(c, "distill", "student_modules/0.pt", module.state_dict())
    torch.save(module.state_dict(), path)
    for other in (tmp_path / "run/student_modules/0.pt", path):
        with pytest.raises(UserError, match=f"{other} is not a finished model"):
            models.load(other)
