"""Promises about weights from elsewhere: what they mean is kept, and what does not fit is named.

Read: state dicts in timm's and DeiT's names, Deep Incubation's files, the original's single modules, weights
of another image size or precision. A ViT is written out here a second time, from papers and names alone, and
the model must give its logits after load_weights. (test_fixtures.py reads the original's files.)
"""

import math

import pytest
import torch

import models

CLASSES = 7
SIZES = {"vit_tiny": (16, 192, 3, 12), "vit_small": (16, 384, 6, 12), "vit_base": (16, 768, 12, 12),
         "vit_large": (16, 1024, 16, 24)}  # patch, width, heads, depth
SMALL = (4, 24, 3, 4)


def state_dict(patch, width, heads, depth, size, classes=CLASSES, seed=0):
    """Random weights under timm's names, of a scale that lets every one of them matter."""
    g = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return torch.randn(shape, generator=g) * math.prod(shape[1:]) ** -0.5

    def bias(n):
        return 0.2 * torch.randn(n, generator=g)

    state = {"cls_token": torch.randn(1, 1, width, generator=g),
             "pos_embed": torch.randn(1, 1 + (size // patch) ** 2, width, generator=g),
             "patch_embed.proj.weight": weight(width, 3, patch, patch), "patch_embed.proj.bias": bias(width)}
    for k in range(depth):
        for norm in ("norm1", "norm2"):
            state |= {f"blocks.{k}.{norm}.weight": 1 + bias(width), f"blocks.{k}.{norm}.bias": bias(width)}
        for name, a, b in (("attn.qkv", 1, 3), ("attn.proj", 1, 1), ("mlp.fc1", 1, 4), ("mlp.fc2", 4, 1)):
            state[f"blocks.{k}.{name}.weight"] = weight(b * width, a * width)
            state[f"blocks.{k}.{name}.bias"] = bias(b * width)
    return state | {"norm.weight": 1 + bias(width), "norm.bias": bias(width),
                    "head.weight": weight(classes, width), "head.bias": bias(classes)}


def vit(state, images, patch, heads, depth):
    """Logits of a ViT, from its state dict. Images B 3 H W -> B K."""
    def linear(x, name):
        return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def norm(x, name):
        centered = x - x.mean(-1, keepdim=True)
        deviation = torch.sqrt(centered.square().mean(-1, keepdim=True) + 1e-6)
        return centered / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]

    patches = images.unfold(2, patch, patch).unfold(3, patch, patch)  # B 3 rows columns p p
    x = torch.einsum("bcrspq,dcpq->brsd", patches, state["patch_embed.proj.weight"]).flatten(1, 2)
    x = x + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for k in range(depth):
        # the packed rows are all of q, all of k, all of v; within each the first head comes first
        q, key, v = linear(norm(x, f"blocks.{k}.norm1"), f"blocks.{k}.attn.qkv").chunk(3, -1)
        out = []
        for h in range(heads):
            d = x.shape[-1] // heads
            own = slice(h * d, (h + 1) * d)
            weights = torch.exp(torch.einsum("bnd,bmd->bnm", q[..., own], key[..., own]) / math.sqrt(d))
            out.append(torch.einsum("bnm,bmd->bnd", weights / weights.sum(-1, keepdim=True), v[..., own]))
        x = x + linear(torch.cat(out, -1), f"blocks.{k}.attn.proj")
        y = linear(norm(x, f"blocks.{k}.norm2"), f"blocks.{k}.mlp.fc1")
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        x = x + linear(y, f"blocks.{k}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def build(patch, width, heads, depth, size, classes=CLASSES):
    """Our ViT of four modules, with weights of its own."""
    torch.manual_seed(1)
    return models.ViT(size, patch, width, heads, [depth // 4] * 4, classes).eval()


@torch.no_grad()
def check(model, state, sizes, size):
    """The model's logits are those of the state dict."""
    patch, _, heads, depth = sizes
    images = torch.randn(1 if size > 100 else 3, 3, size, size, generator=torch.Generator().manual_seed(2))
    expected = vit(state, images, patch, heads, depth)
    assert expected.std() > 0.1  # else agreement would say nothing
    error = (model(images) - expected).norm() / expected.norm()
    assert error < 1e-5, error


def small(change=lambda state: None, size=16, dtype=torch.float32):
    """A small state dict, after change(state)."""
    state = {name: value.to(dtype) for name, value in state_dict(*SMALL, size).items()}
    change(state)
    return state


def modules(state, depths=(1, 1, 1, 1)):
    """The state dicts of the four modules, each module's blocks numbered from 0."""
    own = [{} for _ in depths]
    own[0] = {name: value for name, value in state.items() if name.startswith(("cls", "pos", "patch"))}
    starts = [sum(depths[:i]) for i in range(len(depths))]
    for i, (start, depth) in enumerate(zip(starts, depths)):
        for k in range(depth):
            old = f"blocks.{start + k}."
            for name in [name for name in state if name.startswith(old)]:
                own[i][f"blocks.{k}.{name[len(old):]}"] = state[name]
    own[-1] |= {name: value for name, value in state.items() if name.startswith(("norm", "head"))}
    return own


# ---------- What is read


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", *(pytest.param(a, marks=pytest.mark.slow)
                                                             for a in ("vit_base", "vit_large"))])
def test_a_timm_state_dict_gives_its_logits_at_true_size(tmp_path, arch):
    sizes = SIZES[arch]
    assert models.ARCHITECTURES[arch] == sizes
    state, model = state_dict(*sizes, 224, classes=1000), build(*sizes, 224, classes=1000)
    torch.save({"model": state}, tmp_path / "w.pth")
    models.load_weights(model, tmp_path / "w.pth")
    check(model, state, sizes, 224)


def deep_incubation(state):
    parts = modules(state)
    doubles = {f"stages.{i}.{name}": value for i, part in enumerate(parts) for name, value in part.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    return {"model": {**doubles, **state}, "model_stages": parts, "epoch": 99, "optimizer": optimizer,
            "lr_scheduler": {"base": [0.1]}}


def parallel(state):
    return {f"module.{name}": value for name, value in state.items()}


WRAPPINGS = {
    "a state dict": lambda s: s, "model": lambda s: {"model": s}, "state_dict": lambda s: {"state_dict": s},
    "with an epoch": lambda s: {"model": s, "epoch": 3}, "Deep Incubation": deep_incubation,
    "ours": lambda s: {"model": s, "stage": "meta", "settings": {}, "config": {}, "class_names": ["a"]},
    "data parallel": lambda s: {"model": parallel(s)},
    "Deep Incubation, data parallel": lambda s: {"model": parallel(deep_incubation(s)["model"])}}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_gives_the_state_dict_s_logits(tmp_path, wrapping):
    state, model = small(), build(*SMALL, 16)
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "w.pth")
    models.load_weights(model, tmp_path / "w.pth")
    check(model, state, SMALL, 16)


def bicubic(grid, new):
    """Bicubic resize (a = −3/4, pixel centers, borders repeated) of a grid H W D, by hand."""
    def kernel(x):
        x, a = abs(x), -0.75
        if x <= 1:
            return ((a + 2) * x - (a + 3)) * x * x + 1
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0

    old = len(grid)
    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        center = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(center) - 1, math.floor(center) + 3):
            weights[i, min(max(j, 0), old - 1)] += kernel(center - j)
    return torch.einsum("ri,sj,ijd->rsd", weights, weights, grid.double())


@pytest.mark.parametrize("old, new", [(16, 32), (32, 16), (28, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_another_image_size_give_the_logits_of_the_resized_grid(tmp_path, old, new, dtype):
    state, model = small(size=old, dtype=dtype), build(*SMALL, new)
    torch.save(state, tmp_path / "w.pth")
    models.load_weights(model, tmp_path / "w.pth")
    state = {name: value.float() for name, value in state.items()}
    grid = bicubic(state["pos_embed"][0, 1:].view(old // 4, old // 4, -1), new // 4).float().flatten(0, 1)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid[None]], 1)
    check(model, state, SMALL, new)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_read_into_float32_exactly(tmp_path, dtype):
    state, model = small(dtype=dtype), build(*SMALL, 16)
    torch.save({"model": state}, tmp_path / "w.pth")
    models.load_weights(model, tmp_path / "w.pth")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float()), name


@pytest.mark.parametrize("depths", [(1, 1, 1, 1), (2, 1, 3, 2)])
def test_the_original_s_teacher_modules_one_file_each_give_the_whole_teacher_s_logits(tmp_path, depths):
    sizes = (*SMALL[:3], sum(depths))
    state = state_dict(*sizes, 16)
    torch.manual_seed(1)
    model = models.ViT(16, *SMALL[:3], list(depths), CLASSES).eval()
    for i, module in enumerate(modules(state, depths)):
        if i == 1:  # saved from DistributedDataParallel
            module = {f"module.{name}": value for name, value in module.items()}
        torch.save({"model_name": "deit_tiny", "block_index": i, "block_state_dict": module,
                    "divided_depths": list(depths)}, tmp_path / f"{i}.pth")
    for i, part in enumerate(model.parts):
        models.load_weights(part, tmp_path / f"{i}.pth")
    check(model, state, sizes, 16)
    whole = models.ViT(16, *SMALL[:3], list(depths), CLASSES).eval()
    models.load_weights(whole, tmp_path)  # the folder at once
    check(whole, state, sizes, 16)
    (tmp_path / "1.pth").unlink()
    refused(whole, tmp_path, "modules 0 to 3, but it holds ['0', '2', '3']")


def test_a_teacher_from_elsewhere_is_what_the_commands_would_use(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {image_size: 16}\n")
    config = models.load_config(tmp_path / "c.yaml", [
        "meta.width=24", "meta.heads=3", "meta.patch=4", "teacher.width=24", "teacher.heads=3",
        "teacher.patch=4", "teacher.depths=[1,2,1]", f"data.classes={CLASSES}",
        f"teacher.checkpoint={tmp_path}/w.pth"])
    state, model = small(), models.build(config, "teacher").eval()
    torch.save(state, tmp_path / "w.pth")
    models.load_weights(model, models.weights_of(config, "teacher"))
    check(model, state, SMALL, 16)


# ---------- What is refused


def put(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})


def drop(part):
    return lambda state: [state.pop(name) for name in list(state) if part in name]


def head_of(classes):
    return lambda s: s.update({"head.weight": torch.zeros(classes, 24), "head.bias": torch.zeros(classes)})


def distilled(state):
    """DeiT's distilled models: a second token, with a place and a head of its own."""
    state |= {"dist_token": torch.zeros(1, 1, 24), "head_dist.weight": torch.zeros(CLASSES, 24),
              "head_dist.bias": torch.zeros(CLASSES), "pos_embed": torch.zeros(1, 18, 24)}


WRONG = {  # what is wrong with the file -> (change, what the sentence must name)
    "DeiT's distillation token": (put("dist_token", 1, 1, 24), "unexpected tensor dist_token (1, 1, 24)"),
    "DeiT's second head": (put("head_dist.weight", 7, 24), "unexpected tensor head_dist.weight (7, 24)"),
    "a distilled DeiT": (distilled, "dist_token"),
    "layer scale": (put("blocks.1.ls1.gamma", 24), "unexpected tensor blocks.1.ls1.gamma (24,)"),
    "a norm after pooling": (put("fc_norm.weight", 24), "unexpected tensor fc_norm.weight (24,)"),
    "one block too many": (put("blocks.4.norm1.bias", 24), "unexpected tensor blocks.4.norm1.bias (24,)"),
    "one block too few": (drop("blocks.3."), "lacks the tensor blocks.3.norm1.weight (24,)"),
    "no qkv bias": (drop("qkv.bias"), "lacks the tensor blocks.0.attn.qkv.bias (72,)"),
    "other classes": (head_of(1000), "head.weight is (1000, 24), the model's (7, 24)"),
    "no head": (drop("head."), "lacks the tensor head.weight (7, 24)"),
    "another patch": (put("patch_embed.proj.weight", 24, 3, 8, 8),
                      "patch_embed.proj.weight is (24, 3, 8, 8), the model's (24, 3, 4, 4)"),
    "another width": (lambda s: s.update(state_dict(4, 48, 3, 4, 16)),
                      "cls_token is (1, 1, 48), the model's (1, 1, 24)"),
    "a grid that is no square": (put("pos_embed", 1, 13, 24),
                                 "pos_embed is (1, 13, 24), the model's (1, 17, 24)"),
    "weights that are not finite": (lambda s: s["blocks.2.mlp.fc1.bias"].fill_(torch.nan),
                                    "mlp.fc1.bias is not finite"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("wrapping", ["a state dict", "Deep Incubation"])
def test_what_does_not_fit_is_named_in_one_sentence(tmp_path, wrong, wrapping):
    change, names = WRONG[wrong]
    state, model, path = small(change), build(*SMALL, 16), tmp_path / "w.pth"
    torch.save(WRAPPINGS[wrapping](state), path)
    refused(model, path, names)


def test_a_single_module_is_not_read_as_another_one_or_as_the_whole(tmp_path):
    model = build(*SMALL, 16)
    for i, module in enumerate(modules(small())):
        torch.save({"block_index": i, "block_state_dict": module}, tmp_path / f"{i}.pth")
    refused(model.parts[0], tmp_path / "1.pth", "cls_token")
    refused(model.parts[1], tmp_path / "0.pth", "cls_token")
    refused(model.parts[1], tmp_path / "3.pth", "norm.weight")
    refused(model, tmp_path / "0.pth", "blocks.1.norm1.weight")


def test_a_vit_is_not_read_as_a_nac_nor_as_a_v_moe(tmp_path):
    torch.save(small(), tmp_path / "w.pth")
    nac = models.NAC(16, 24, 3, 8, (2, 4, 2), 1, CLASSES)
    refused(nac, tmp_path / "w.pth", next(iter(nac.state_dict())))
    refused(v_moe(), tmp_path / "w.pth", "lacks the tensor blocks.1.moe.")


def v_moe(experts=2):
    return models.ViT(16, *SMALL[:3], [1] * 4, CLASSES, moe=dict(experts=experts), moe_blocks=[1])


def test_experts_of_another_number_or_shape_are_named(tmp_path):
    """The original has a tensor per expert, htoh4 (1, H, D) and h4toh (1, D, H); ours are stacked."""
    model, state = v_moe(), v_moe().state_dict()
    for ours, theirs in (("fc1", "htoh4"), ("fc2", "h4toh")):
        for kind in ("weight", "bias"):
            for e, value in enumerate(state.pop(f"blocks.1.moe.{ours}_{kind}")):
                state[f"blocks.1.moe.experts.{e}.{theirs}.{kind}"] = value[None]
    torch.save(state, tmp_path / "w.pth")
    models.load_weights(model, tmp_path / "w.pth")
    fc1 = torch.cat([state[f"blocks.1.moe.experts.{e}.htoh4.weight"] for e in range(2)])
    assert torch.equal(model.blocks[1].moe.fc1_weight, fc1)
    refused(v_moe(experts=3), tmp_path / "w.pth", "moe.fc1_weight is (2, 96, 24), the model's (3, 96, 24)")
    state["blocks.1.moe.experts.1.htoh4.weight"] = torch.zeros(1, 5, 24)
    torch.save(state, tmp_path / "w.pth")
    refused(model, tmp_path / "w.pth", "lacks the tensor blocks.1.moe.fc1_weight (2, 96, 24)")


def refused(model, path, names):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(models.UserError) as refusal:
        models.load_weights(model, path)
    text = str(refusal.value)
    assert text.endswith(".") and "\n" not in text and str(path) in text and names in text, text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
