"""models.py – every model of m2mKD, how models are cut into modules and put together, and the weights' plumbing.

What to read for the method, in this order (sections are marked by a line of dashes):
    ViT and V-MoE                       ViT.hidden_states and ViT.rest are all that the method asks of the meta model M.
                                        From the inside out: Attention, Mlp, MoE -> Block -> ViTModule -> ViT
    Modules inside the meta model       cut: a whole student -> S_1 … S_L, each Stitched so that it fits into M
    Neural Attentive Circuit            the other student. ModFC and ModFFN; then in the order in which an image passes:
                                        Tokenizer, Seeder, ReadIn, Propagator (LatentAttention, log_kernel), ReadOut, Pool
    Graph priors and graph regularisers what a NAC's signatures are fitted to; the method works without
    From a config to a model            build: a config -> a whole model (images B×3×H×W -> logits B×classes)
Plumbing of the stage scripts, to be skipped at first:
    Config · Reading and writing weights · A run's folder · What the training loops share · What a run will take

Axis letters in shape comments:  B batch · N tokens · D width · E experts · T = B·N · H hidden · K classes
    for the NAC also  U latents (receivers) · V senders or image tokens · X width of a token · C code · S signature
                      h heads · d head width
Papers: m2mKD 2402.16918, Deep Incubation 2212.04129, NAC 2210.08031, V-MoE 2106.05974, DeiT 2012.12877.
"""

import argparse
import contextlib
import difflib
import functools
import json
import math
import os
import re
import shlex
import signal
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class UserError(ValueError):
    """Something the user can mend. The message is one sentence; the scripts print it and exit with code 2."""


# ------------------------------------------------------------------------------------------------------------------
# ViT and V-MoE


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's residual branch is left out with probability `rate`."""

    def __init__(self):
        super().__init__()
        self.rate = 0.0

    def forward(self, x):  # B … -> B …
        if not self.training or self.rate == 0:
            return x
        # One draw a sample, for all of its tokens. 1 / (1 − rate) makes the expected branch that of evaluation.
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * (keep / (1 - self.rate)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with packed q, k, v. B N D -> B N D."""

    def __init__(self, width, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        # One matrix holds q, k and v of all heads, in timm's order, so that its weights load as they are.
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each B h N d
        # softmax(q kᵀ / √d) v
        x = F.scaled_dot_product_attention(q, k, v)  # B h N d
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """The transformer's feed-forward layer. B N D -> B N D."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class MoE(nn.Module):
    """Mixture of E experts in place of an MLP: out = Σ_k g_k · expert_{e_k}(x), g = softmax over the top-k router logits.

    No token is dropped unless `capacity` > 0: then an expert takes at most capacity · k · T / E tokens of a training
    batch (V-MoE's capacity factor; the first come, a token that is turned away keeps only its residual).
    With `balance` > 0 training adds V-MoE's router noise and leaves its auxiliary loss in `self.aux`.
    `self.load` is the share of (token, choice) pairs that each expert got in the last training batch.
    """

    def __init__(self, width, hidden, experts, top_k=2, balance=0.0, capacity=0.0):
        super().__init__()
        self.top_k, self.balance, self.capacity, self.load = top_k, balance, capacity, torch.zeros(experts)
        self.router = nn.Linear(width, experts)
        self.fc1_weight = nn.Parameter(torch.empty(experts, hidden, width))
        self.fc1_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(experts, width, hidden))
        self.fc2_bias = nn.Parameter(torch.zeros(experts, width))

    def forward(self, x):  # B N D
        shape, k = x.shape, self.top_k
        # Tokens are routed each by itself, whatever image they are from.
        x = x.reshape(-1, shape[-1])  # T D
        logits = self.router(x)  # T E
        # Float32 at least: the auxiliary loss sums over all tokens of a batch.
        logits = clean = logits.to(torch.promote_types(logits.dtype, torch.float32))
        E = logits.shape[1]
        if self.training and self.balance:
            # V-MoE's noise ε ~ N(0, 1/E²): an expert that is nearly as good is tried too, and learns.
            logits = clean + torch.randn_like(clean) / E
        # Softmax over the k chosen logits, as in the original m2mKD; V-MoE's gates are the k largest of a softmax over
        # all E experts, so they do not sum to 1.
        top, chosen = logits.topk(k)  # T k
        gates = top.softmax(-1).to(x.dtype)
        if self.training and self.balance:
            self.aux = self.auxiliary_loss(clean, top[:, -1:])

        # Sorting the T·k (token, expert) pairs by expert makes each expert's share one contiguous slice: every expert
        # is then two dense products over just its own tokens, T·k rows in all, however uneven the shares are.
        chosen = chosen.flatten()
        order = chosen.argsort(stable=True)
        load = chosen.bincount(minlength=E)
        if self.training:
            self.load = load / len(chosen)
        # Pair p belongs to token p // k. The loads go to the CPU for the split: a GPU is waited for here.
        experts = zip(x[order // k].split(load.tolist()), self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        out = torch.cat([F.linear(F.gelu(F.linear(t, w1, b1)), w2, b2) for t, w1, b1, w2, b2 in experts])  # T·k D
        if self.training and self.capacity:
            # The sort is stable, so a pair's place in its expert's queue is its index less that of the expert's first pair.
            place = torch.arange(len(order), device=x.device) - (load.cumsum(0) - load)[chosen[order]]
            out = out * (place < math.ceil(self.capacity * len(order) / E))[:, None]
        # out_t = Σ_k g_k · expert_{e_k}(x_t), back in the tokens' order
        out = out[order.argsort()].view(-1, k, shape[-1])  # T k D
        return (out * gates[..., None]).sum(1).view(shape)

    def auxiliary_loss(self, logits, threshold):
        """½ (importance + load), each CV² = var / mean² over the experts (V-MoE, appendix A). logits T E, threshold T 1."""
        E = logits.shape[1]
        # importance_e = Σ_x softmax(logits)_e: how much weight an expert gets
        importance = logits.softmax(-1).sum(0)  # E
        # How many tokens an expert gets is a count, without gradient. Its expectation under the noise has one:
        # load_e = Σ_x P(expert e is still chosen if its noise of std 1/E is drawn again) = Σ_x Φ((logit_e − threshold)·E)
        load = torch.special.ndtr((logits - threshold) * E).sum(0)  # E
        # var / mean² and not (std / mean)²: at perfect balance the gradient of a square root is NaN
        return self.balance * 0.5 * sum(v.var(correction=0) / v.mean() ** 2 for v in (importance, load))


class Block(nn.Module):
    """Pre-norm transformer block; with `moe` its MLP is a mixture of experts. B N D -> B N D."""

    def __init__(self, width, heads, hidden, qkv_bias, eps, moe=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        if moe:
            self.moe = MoE(width, hidden, **moe)
        else:
            self.mlp = Mlp(width, hidden)
        self.drop_path = DropPath()

    def forward(self, x):
        # x ← x + Attention(LN x);  x ← x + MLP(LN x), or the mixture in the MLP's place
        x = x + self.drop_path(self.attn(self.norm1(x)))
        feed_forward = self.moe if hasattr(self, "moe") else self.mlp
        return x + self.drop_path(feed_forward(self.norm2(x)))


class ViTModule(nn.Module):
    """Module i of a ViT, sharing its parameters: states B×(1+N)×D -> states.

    The first module starts from pixels (B×3×H×W) in the ViT's stem, the last ends in logits (B×K).
    Its blocks are numbered from 0, as in the original's files of single modules.
    """

    def __init__(self, vit, blocks, first, last):
        super().__init__()
        self.first, self.last = first, last
        if first:
            self.patch_embed, self.cls_token, self.pos_embed = vit.patch_embed, vit.cls_token, vit.pos_embed
        self.blocks = nn.ModuleList(blocks)
        if last:
            self.norm, self.head = vit.norm, vit.head

    def forward(self, x):
        # The first hybrid starts from pixels in the student's (or teacher's) own stem, the last ends in its own head.
        if self.first:
            x = self.patch_embed(x).flatten(2).transpose(1, 2)  # B N D
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # B 1+N D
        for block in self.blocks:
            x = block(x)
        # the class token alone is classified
        return self.head(self.norm(x)[:, 0]) if self.last else x


class ViT(nn.Module):
    """Vision transformer with timm's parameter names, cut into L modules of `depths` blocks. B×3×H×W -> B×K.

    `moe` (a dict of MoE's arguments) turns the MLPs of `moe_blocks` (None: all) into mixtures: the V-MoE.
    `parts` are the L modules; they share the parameters, which carry the whole model's names.
    """

    def __init__(self, image_size, patch, width, heads, depths, classes, mlp_ratio=4.0, qkv_bias=True, eps=1e-6,
                 init_std=0.02, moe=None, moe_blocks=None):
        super().__init__()
        # A convolution with stride = kernel is one linear map for all patches. The Sequential only gives it timm's name,
        # patch_embed.proj.
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, stride=patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, int(width * mlp_ratio), qkv_bias, eps,
                  moe if moe_blocks is None or k in moe_blocks else None)
            for k in range(sum(depths)))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, classes)
        # filled by build() where stitches are kept or folded: what stands between module i and module i+1
        self.stitches = nn.ModuleList()
        self.apply(functools.partial(init_linear, std=init_std))
        # DeiT's .02 at any width
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        ends = np.cumsum(depths).tolist()
        # a tuple, which nn.Module does not look into: else each weight would stand twice in the state dict
        self.parts = tuple(ViTModule(self, self.blocks[end - depth:end], i == 0, i == len(depths) - 1)
                           for i, (depth, end) in enumerate(zip(depths, ends)))

    def hidden_states(self, images):
        """[h_0 … h_{L-1}]: h_0 the images, h_i = M_i … M_1(images): what parts[i], module i+1 of the text, takes in.

        One run over a batch serves the modules of all L places.
        """
        states = [images]
        # M_L's logits are no module's input
        for part in self.parts[:-1]:
            states.append(part(states[-1]))  # B 1+N D
        return states

    def rest(self, i, x):
        """Modules i … L-1 (counted from 0) on the states x: M_L ∘ … ∘ M_{i+1}(x). B N D -> B K."""
        for j in range(i, len(self.parts)):
            x = self.parts[j](x)
            # only a student that was assembled with its stitches kept has any
            if len(self.stitches) > j:
                x = self.stitches[j](x)
        return x

    def forward(self, images):
        return self.rest(0, images)


def init_linear(module, std):
    """ViT's initialisation: Linear (and experts') weights trunc-normal, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, MoE):
        nn.init.trunc_normal_(module.fc1_weight, std=std)
        nn.init.trunc_normal_(module.fc2_weight, std=std)


# ------------------------------------------------------------------------------------------------------------------
# Neural Attentive Circuit
#
# A circuit is a set of latents. Each has a state (B D), which depends on the image, and two learnt vectors, which do not:
# its code says what it computes (the same weights, modulated differently: ModFC), its signature who it talks to (near
# signatures do, distant ones do not: log_kernel). Input latents read the image's tokens, then for some rounds mediators
# listen to input latents and to one another, and last output latents listen to both and vote for a class.


def jitter(codes, training):
    """In training codes are shaken by up to 5 %, one draw for the whole batch."""
    # c + U(−.05|c|, +.05|c|)
    return codes + 0.05 * codes * (2 * torch.rand_like(codes) - 1) if training else codes


class ModFC(nn.Module):
    """Linear layer modulated by a code: y = W·(x ⊙ σ(c)) + b. x … n in, c n C (or B n C) -> … n out."""

    def __init__(self, width_in, width_out, code_width, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None
        # g small: at first all latents compute nearly the same, and their codes lead them apart
        self.gain = nn.Parameter(torch.tensor(0.1))
        self.scale = nn.Linear(code_width, width_in, bias=False)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def sigma(self, codes):
        # σ(c) = 1 + g · LN(A c), LN without affine
        scale = self.scale(codes)
        return 1 + self.gain * F.layer_norm(scale, scale.shape[-1:])

    def forward(self, x, codes):
        # W is shared by all latents. The code only says which of its inputs count: σ is a vector a latent, not a matrix.
        return F.linear(x * self.sigma(codes), self.weight, self.bias)


class ModFFN(nn.Module):
    """x + γ · ModFC₂(GEGLU(ModFC₁(LN x))), GEGLU(a, b) = a · GELU(b). B U D -> B U D."""

    def __init__(self, width, code_width, ratio):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = ModFC(width, int(2 * ratio * width), code_width)
        self.fc2 = ModFC(int(ratio * width), width, code_width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))
        self.drop_path = DropPath()

    def forward(self, x, codes):
        # 2·r·D channels, of which one half gates the other
        a, b = self.fc1(self.norm(x), codes).chunk(2, dim=-1)  # each B U r·D
        return x + self.drop_path(self.gamma * self.fc2(a * F.gelu(b), codes))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, LayerNorm, two linear layers, layer scale, residual. B D H W -> B D H W."""

    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        # layer scale: each block starts as (nearly) the identity
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x):
        # Contiguous, so that the gradient of the weight has the strides of the weight.
        x = x.contiguous()
        # channels last, where a 1×1 convolution is a plain linear layer
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # B H W D
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of B D H W."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Tokenizer(nn.Module):
    """ConvNeXt stem and stages, then a learnt position grid beside the features. B×3×H×W -> B×V×(features + P)."""

    def __init__(self, width, stages, blocks, grid_width, grid_size):
        super().__init__()
        # more stages, fewer tokens: 2 leave one for 8×8 pixels, 3 for 16×16
        widths = [width // 4, width // 2, width][:stages]
        self.downsample_layers = nn.ModuleList([
            nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=1e-6))])
        for a, b in zip(widths, widths[1:]):
            self.downsample_layers.append(nn.Sequential(ChannelNorm(a, eps=1e-6), nn.Conv2d(a, b, 2, stride=2)))
        self.stages = nn.ModuleList(nn.Sequential(*[ConvNeXtBlock(w) for _ in range(blocks)]) for w in widths)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.grid = nn.Parameter(torch.randn(grid_width, grid_size, grid_size))
        self.width = widths[-1] + grid_width

    def forward(self, x):
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))  # B width H W; H and W a quarter of the image's, then half at each stage
        # The grid has channels of its own beside the features and is not added to them, as a ViT's is. So it need not have
        # their width, and images of another size pool it.
        grid = self.grid if self.grid.shape[1:] == x.shape[2:] else F.adaptive_avg_pool2d(self.grid, x.shape[2:])
        x = torch.cat([x, grid.expand(len(x), -1, -1, -1).to(x.dtype)], dim=1)  # B features+P H W
        return x.flatten(2).transpose(1, 2)  # B V X


class Latents(nn.Module):
    """What a group of latents is: a code each (what it computes) and a signature each (who it talks to)."""

    def __init__(self, count, code_width, signature_width):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(count, code_width))
        self.signatures = nn.Parameter(torch.randn(count, signature_width))


class Seeder(nn.Module):
    """Initial state of latent u: μ(LN c_u) + ε ⊙ exp(½ λ(LN c_u)), ε ~ N(0,1) a sample; ε = 0 in evaluation.

    codes U C -> states B U D.
    """

    def __init__(self, width, code_width):
        super().__init__()
        self.norm = nn.LayerNorm(code_width)
        self.mu = nn.Linear(code_width, width)
        self.logvar = nn.Linear(code_width, width)
        # noise of std about exp(−2.5) = .08 at first
        nn.init.constant_(self.logvar.bias, -5.0)

    def forward(self, codes, batch):
        codes = self.norm(jitter(codes, self.training))
        states = self.mu(codes).expand(batch, -1, -1)  # B U D
        # The original samples here too, so that its accuracy changes from one evaluation to the next.
        if not self.training:
            return states
        return states + torch.randn_like(states) * torch.exp(0.5 * self.logvar(codes))


class ReadIn(nn.Module):
    """Input latents attend to the image's tokens; keys and values are modulated by the receiver's code.

    states B U D, tokens B V X, codes U C -> states B U D.
    """

    def __init__(self, width, token_width, code_width, heads, head_width, ffn_ratio):
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        # only a name: weights are called read_in.attention.*, like the propagators'
        self.attention = nn.Module()
        self.attention.receiver_norm = nn.LayerNorm(width)
        self.attention.sender_norm = nn.LayerNorm(token_width)
        self.attention.query = ModFC(width, inner, code_width, bias=False)
        self.attention.key = ModFC(token_width, inner, code_width, bias=False)
        self.attention.value = ModFC(token_width, inner, code_width, bias=False)
        self.attention.exit = ModFC(inner, width, code_width)
        self.attention.gamma = nn.Parameter(torch.ones(width))
        self.ffn = ModFFN(width, code_width, ffn_ratio)

    def forward(self, states, tokens, codes):
        att, h = self.attention, self.heads
        B, U, _ = states.shape
        codes = jitter(codes, self.training)
        q = att.query(att.receiver_norm(states), codes).view(B, U, h, -1)  # B U h d
        x = att.sender_norm(tokens)  # B V X
        # Written out, k_uv = W_k(x_v ⊙ σ_u) is a B×V×U×X tensor and so is v_uv. But (exactly)
        #   q_u · W_k(x_v ⊙ σ_u) = ((W_kᵀ q_u) ⊙ σ_u) · x_v   and   Σ_v a_uv W_v(x_v ⊙ σ_u) = W_v((Σ_v a_uv x_v) ⊙ σ_u)
        # so it is plain attention with the tokens themselves as keys and as values, shared by all heads.
        w_k = att.key.weight.view(h, -1, x.shape[-1])  # h d X
        w_v = att.value.weight.view(h, -1, x.shape[-1])
        scale = q.shape[-1] ** -0.5
        # (W_kᵀ q_u) ⊙ σ_u
        q = torch.einsum("buhd,hdx->bhux", q, w_k) * att.key.sigma(codes)  # B h U X
        # Σ_v a_uv x_v, a the softmax over v; h·U queries in one head
        mean = F.scaled_dot_product_attention(q.flatten(1, 2)[:, None], x[:, None], x[:, None], scale=scale)
        mean = mean.view(B, h, U, -1) * att.value.sigma(codes)  # B h U X
        out = torch.einsum("bhux,hdx->buhd", mean, w_v).flatten(2)  # B U h·d
        return self.ffn(states + att.gamma * att.exit(out, codes), codes)


class LatentAttention(nn.Module):
    """Receivers attend to senders under the kernel: the NAC paper's stochastic kernel modulated dot-product attention.

    q and exit are modulated by the receiver's code, k and v by the sender's. Without `sender_norm` one LayerNorm
    serves both sides. receivers B U D, senders B V D, log_k = log K (B) U V or None -> B U D (no residual).
    """

    def __init__(self, width, code_width, heads, head_width, share_norm):
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        # β of the kernel: each propagator learns how far its latents listen
        self.bandwidth = nn.Parameter(torch.tensor(1.0))
        self.receiver_norm = nn.LayerNorm(width)
        if not share_norm:
            self.sender_norm = nn.LayerNorm(width)
        self.query = ModFC(width, inner, code_width, bias=False)
        self.key = ModFC(width, inner, code_width, bias=False)
        self.value = ModFC(width, inner, code_width, bias=False)
        self.exit = ModFC(inner, width, code_width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, receivers, senders, receiver_codes, sender_codes, log_k=None):
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B n h·d -> B h n d
        q = split(self.query(self.receiver_norm(receivers), receiver_codes))
        x = getattr(self, "sender_norm", self.receiver_norm)(senders)
        k, v = split(self.key(x, sender_codes)), split(self.value(x, sender_codes))
        # Σ_v softmax_v(q_u · k_v / √d + log K(u, v)) v_v: K multiplies the attention weights before they are normalised
        if log_k is not None:
            # one kernel for all heads: the graph says who may talk, the heads about what
            log_k = log_k.to(q.dtype).view(-1, 1, *log_k.shape[-2:])  # 1 or B, 1 U V
        if log_k is None:
            x = F.scaled_dot_product_attention(q, k, v)
        elif q.is_cuda:
            # Of CUDA's kernels the one that gives the mask a gradient, and what stands in for it.
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                x = F.scaled_dot_product_attention(q, k, v, attn_mask=log_k)
        else:
            # On a CPU no fused attention gives the kernel a gradient, and what stands in for it keeps the scores twice.
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # B h U V
            x = scores.add_(log_k).softmax(-1) @ v
        return self.gamma * self.exit(x.transpose(1, 2).flatten(2), receiver_codes)


def distance(a, b):
    """δ(u, v) = 1 − cos(s_u, s_v), from 0 (same direction) to 2. U S, V S -> U V."""
    # Always in float32 or better: in bfloat16 the kernel of near latents would round to 1, and its logit be infinite.
    # (The device of models without weights, "meta", knows no autocast.)
    with torch.autocast("cpu" if a.is_meta else a.device.type, enabled=False):
        return 1 - F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


# Latents whose δ is larger do not talk to each other. Random signatures have δ near 1, so most pairs start unlinked.
TRUNCATION = 0.9


def log_kernel(delta, bandwidth, truncate=True, sample=0):
    """log K, K = exp(−δ/β), 0 where δ > .9 (NAC paper). δ U V -> U V, or with sample = B noisy ones B U V.

    In training K is taken as the probability of a link, and each sample of the batch draws links of its own.
    """
    # A truncated pair sends no gradient to the signatures: the original announces a straight-through gradient there, but
    # its code comes to this, and so do we. It also divides K by its sum over senders: a constant a row, which the softmax
    # of the attention ignores, so it is left out.
    cut = delta.detach() > TRUNCATION if truncate else None
    if not sample:
        logs = -delta / bandwidth
        # −1e30 (in training about −32, below) weighs 0 in the softmax; with −∞ a receiver all of whose pairs are truncated
        # would get NaN, and so it hears all alike.
        return logs.masked_fill(cut, -1e30) if truncate else logs
    kernel = torch.exp(-delta / bandwidth)
    if truncate:
        kernel = kernel.masked_fill(cut, 0.0)
    # A Bernoulli draw has no gradient; a relaxed one (temperature ½) has: log sigmoid((logit K + ℓ) / ½), ℓ logistic.
    # K is clamped to [ε, 1 − ε], for δ_uu can round below 0; a truncated pair gets logit(ε)/½, about −32.
    eps = torch.finfo(torch.float32).eps
    noise = torch.rand(sample, *delta.shape, device=delta.device).clamp_(eps, 1 - eps).logit_()  # B U V
    return F.logsigmoid((kernel.clamp(eps, 1 - eps).logit() + noise) * 2)


class Propagator(nn.Module):
    """One round of talk: the mediators attend to senders. B U D -> B U D."""

    def __init__(self, width, code_width, heads, head_width, ffn_ratio):
        super().__init__()
        self.attention = LatentAttention(width, code_width, heads, head_width, share_norm=True)
        self.ffn = ModFFN(width, code_width, ffn_ratio)
        self.drop_path = DropPath()

    def forward(self, receivers, senders, receiver_codes, sender_codes, delta=None):
        """delta U V: the signatures' distances; None (tokens, which have no signature): attention without kernel."""
        # Two draws, as in the original, although the mediators are among the senders.
        receiver_codes, sender_codes = jitter(receiver_codes, self.training), jitter(sender_codes, self.training)
        log_k = None
        if delta is not None:
            log_k = log_kernel(delta, self.attention.bandwidth, sample=len(receivers) if self.training else 0)
        x = receivers + self.drop_path(self.attention(receivers, senders, receiver_codes, sender_codes, log_k))
        return self.ffn(x, receiver_codes)


class ReadOut(nn.Module):
    """Output latents attend to all others. B U D -> B U D.

    Unlike a propagator: no residual around the attention, no truncation and no sampling of the kernel, no stochastic depth.
    """

    def __init__(self, width, code_width, heads, head_width, ffn_ratio):
        super().__init__()
        self.attention = LatentAttention(width, code_width, heads, head_width, share_norm=False)
        self.ffn = ModFFN(width, code_width, ffn_ratio)

    def forward(self, receivers, senders, receiver_codes, sender_codes, delta=None):
        receiver_codes, sender_codes = jitter(receiver_codes, self.training), jitter(sender_codes, self.training)
        # untruncated, every latent is heard a little, so that all get a gradient from the loss
        log_k = None if delta is None else log_kernel(delta, self.attention.bandwidth, truncate=False)
        return self.ffn(self.attention(receivers, senders, receiver_codes, sender_codes, log_k), receiver_codes)


class Pool(nn.Module):
    """The output latents vote by confidence: softmax weights, Gumbel-softmax (τ = 1) in training. B U D -> B K."""

    def __init__(self, width, classes):
        super().__init__()
        self.confidence_scorer = nn.Linear(width, 1)
        self.to_logits = nn.Linear(width, classes)

    def forward(self, x):
        confidence = self.confidence_scorer(x)  # B U 1
        # Gumbel noise, −log of an exponential variable. The original draws it in evaluation too.
        if self.training:
            confidence = confidence - torch.empty_like(confidence).exponential_().log()
        return self.to_logits((confidence.softmax(dim=1) * x).sum(1))


class NAC(nn.Module):
    """Neural Attentive Circuit (2210.08031): latents with codes and signatures pass messages. B×3×H×W -> B×K.

    latents = (U_in, U, U_out). Its modules are the read-in (with tokenizer), each propagator, the read-out (with pool).
    """

    def __init__(self, image_size, width, heads, head_width, latents, propagators, classes, code_width=None,
                 signature_width=64, ffn_ratio=2.0, tokenizer_stages=2, tokenizer_blocks=3, grid_width=64,
                 grid_size=None):
        super().__init__()
        code_width = code_width or width
        circuit = dict(width=width, code_width=code_width, heads=heads, head_width=head_width, ffn_ratio=ffn_ratio)
        # without grid_size: as many places in the grid as there are tokens
        self.tokenizer = Tokenizer(width, tokenizer_stages, tokenizer_blocks, grid_width,
                                   grid_size or max(1, image_size // 2 ** (tokenizer_stages + 1)))
        self.input_latents, self.mediator_latents, self.output_latents = (
            Latents(count, code_width, signature_width) for count in latents)
        self.seeder = Seeder(width, code_width)
        self.read_in = ReadIn(token_width=self.tokenizer.width, **circuit)
        self.propagators = nn.ModuleList(Propagator(**circuit) for _ in range(propagators))
        self.read_out = ReadOut(**circuit)
        self.pool = Pool(width, classes)
        # filled by build() where stitches are kept or folded: what stands between module i and module i+1
        self.stitches = nn.ModuleList()

    def forward(self, images):
        inputs, mediators, outputs = self.input_latents, self.mediator_latents, self.output_latents
        # Who sends is the same in all rounds: input latents and mediators.
        sender_codes = torch.cat([inputs.codes, mediators.codes])  # V C, V = U_in + U
        sender_signatures = torch.cat([inputs.signatures, mediators.signatures])
        # Stitch j stands after module j. Where they were dropped the iterator is empty, and each next() is the identity.
        B, stitch = len(images), iter(self.stitches)

        # The image is read once, by the input latents; their states stay as they are from then on.
        x_in = self.read_in(self.seeder(inputs.codes, B), self.tokenizer(images), inputs.codes)  # B U_in D
        x_in = next(stitch, nn.Identity())(x_in)
        x = self.seeder(mediators.codes, B)  # B U D
        # Signatures are not part of the state: the graph is the same in all rounds, and for all images.
        delta = distance(mediators.signatures, sender_signatures)  # U V
        for propagator in self.propagators:
            x = propagator(x, torch.cat([x_in, x], 1), mediators.codes, sender_codes, delta)
            x = next(stitch, nn.Identity())(x)
        delta = distance(outputs.signatures, sender_signatures)  # U_out V
        x = self.read_out(self.seeder(outputs.codes, B), torch.cat([x_in, x], 1), outputs.codes, sender_codes, delta)
        return self.pool(x)  # B K


# ------------------------------------------------------------------------------------------------------------------
# Graph priors and graph regularisers of the NAC


def random_graph(kind, n, rng, m=2, groups=8, p_in=0.9, p_out=0.2, p=0.1):
    """Adjacency matrix n×n (bool, symmetric, empty diagonal) of a random graph; `rng` a numpy Generator.

    scale_free: Barabási–Albert, each new node links to m old ones · planted_partition: groups linked within with p_in,
    across with p_out · ring_of_cliques: groups are cliques, one edge between neighbours · erdos_renyi: p.
    """
    linked = np.zeros((n, n), bool)
    # contiguous groups, of equal size where groups divides n
    group = np.arange(n) * groups // n
    if kind == "scale_free":
        # Preferential attachment: a node drawn from the list of all edges' ends is drawn in proportion to its degree.
        ends, targets = [], list(range(m))
        for node in range(m, n):
            linked[node, targets] = True
            ends += targets + [node] * m
            # m different nodes
            targets = []
            while len(targets) < m:
                end = ends[rng.integers(len(ends))]
                targets += [end] if end not in targets else []
    elif kind == "planted_partition":
        # the upper triangle: one draw a pair
        linked = np.triu(rng.random((n, n)) < np.where(group[:, None] == group, p_in, p_out), 1)
    elif kind == "ring_of_cliques":
        linked = group[:, None] == group
        first = np.searchsorted(group, np.arange(groups))
        # one edge to the next clique: from the first node of a clique to the second of the next
        linked[first, np.roll(first, -1) + 1] = True
    elif kind == "erdos_renyi":
        linked = np.triu(rng.random((n, n)) < p, 1)
    else:
        raise UserError(f"student.graph={kind} is not a graph prior.")
    return (linked | linked.T) & ~np.eye(n, dtype=bool)


def fit_signatures(signatures, linked, steps=1000, margin=0.03):
    """Moves signatures (n×S, in place) until linked pairs are within the kernel's truncation and unlinked ones beyond it.

    Adam, lr 1e-3, from a semi-orthogonal matrix. Returns the shares of linked and of unlinked pairs that end where they
    should.
    """
    # orthogonal: all pairs start at δ = 1, unlinked, and none has a head start (as far as n vectors fit in S dimensions)
    s = nn.init.orthogonal_(torch.empty(signatures.shape)).requires_grad_()
    linked = torch.as_tensor(linked)
    unlinked = ~linked & ~torch.eye(len(s), dtype=torch.bool)
    optimizer = torch.optim.Adam([s], lr=1e-3)
    for _ in range(steps):
        delta = distance(s, s)  # n n
        # The original takes the mean over all pairs of max(δ, t) or max(−δ, −t), t = .8: most unlinked pairs stop short of
        # the truncation at .9, and few links count little among many pairs. So t is .9 ∓ margin here, and both kinds of
        # pairs weigh the same:
        # mean over linked pairs of max(δ, .87) + mean over unlinked pairs of max(−δ, −.93)
        loss = ((delta.clamp(min=TRUNCATION - margin) * linked).sum() / linked.sum().clamp(min=1)
                + ((-delta).clamp(min=-TRUNCATION - margin) * unlinked).sum() / unlinked.sum().clamp(min=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        signatures.copy_(s)
        near = distance(s, s) <= TRUNCATION
    shares = near[linked].float().mean(), (~near)[unlinked].float().mean()
    # the mean of no pairs is NaN; none of them is in the wrong place
    return tuple(share.nan_to_num(1).item() for share in shares)


def hinge_repulsion(nac, threshold=0.4):
    """Pushes apart all pairs of the NAC's signatures, of latents of all three kinds, that are closer than the threshold."""
    s = torch.cat([latents.signatures for latents in (nac.input_latents, nac.mediator_latents, nac.output_latents)])
    # −Σ δ over pairs u < v with δ < threshold: each pair counts once, and one that is far enough not at all
    delta = distance(s, s)
    return -(delta * (delta < threshold).triu(1)).sum()


def match_rows(cost, capacity):
    """Assigns each of n rows to one of G groups, `capacity` rows a group, at the least total cost. n×G -> n group numbers.

    Exact, as the original's Hungarian matching by scipy is.
    """
    # Rows of the block model's target within a group are equal, so the n×n assignment problem is a transport problem with
    # G sinks: start from each row's cheapest group, then move rows from overfull groups to groups with room along shortest
    # paths in the graph of G groups (successive shortest paths).
    cost = cost.detach().double().cpu().numpy()
    n, G = cost.shape
    group = cost.argmin(1)
    room = capacity - np.bincount(group, minlength=G)
    while (room < 0).any():
        # price[a, b]: what it costs to move the best suited row from group a to group b
        price = np.full((G, G), np.inf)
        mover = np.zeros((G, G), int)
        for a in range(G):
            rows = np.flatnonzero(group == a)
            if len(rows):
                extra = cost[rows] - cost[rows, a, None]
                best = extra.argmin(0)
                price[a], mover[a] = extra[best, np.arange(G)], rows[best]
        # Bellman–Ford from all overfull groups: a step can have a negative price, so Dijkstra's algorithm does not do
        reach = np.where(room < 0, 0.0, np.inf)
        before = np.full(G, -1)
        for _ in range(G):
            via = reach[:, None] + price
            best = via.argmin(0)
            better = via[best, np.arange(G)] < reach - 1e-12
            reach, before = np.where(better, via[best, np.arange(G)], reach), np.where(better, best, before)
        # one row a group moves along the cheapest path, from its end back to its start
        b = np.where(room > 0, reach, np.inf).argmin()
        room[b] -= 1
        while before[b] >= 0:
            a = before[b]
            group[mover[a, b]] = b
            b = a
        room[b] += 1
    return torch.from_numpy(group)


def block_model(nac, groups=8, p_in=0.9, p_out=0.2):
    """Stochastic block model regulariser: MSE between each propagator's link probabilities K and a block matrix P.

    K is that of the U mediators, truncated and not sampled. Gradients reach signatures and bandwidths through it.
    """
    s = nac.mediator_latents.signatures
    group = torch.arange(len(s), device=s.device) * groups // len(s)
    target = torch.where(torch.arange(groups, device=s.device)[:, None] == group, p_in, p_out).to(s)  # G U
    capacity = group.bincount(minlength=groups).cpu().numpy()
    delta, loss = distance(s, s), 0
    for propagator in nac.propagators:
        kernel = log_kernel(delta, propagator.attention.bandwidth).exp()  # U U
        # Which mediators make a block is free: K's rows are matched to P's at the least MSE. (Its columns are not matched
        # along with them, as in the original.)
        # ‖K_u − P_g‖² = ‖K_u‖² − 2 K_u·P_g + ‖P_g‖²; the first term does not depend on g
        rows = match_rows(target.square().sum(1) - 2 * kernel @ target.T, capacity).to(s.device)
        loss = loss + (kernel - target[rows]).square().mean()
    return loss


def regularizer(model, config):
    """What training adds to the loss: a NAC's graph regulariser, the balance losses of mixtures; else 0."""
    weight = config["student"]["regularizer"]
    if not isinstance(model, NAC) or not weight:
        return sum(m.aux for m in model.modules() if isinstance(m, MoE) and m.balance)
    # the paper's choice: the block model for the planted partition, hinge repulsion for all other priors
    if config["student"]["graph"] == "planted_partition":
        return weight * block_model(model, config["student"]["sbm_groups"])
    return weight * hinge_repulsion(model)


# ------------------------------------------------------------------------------------------------------------------
# Modules inside the meta model: cutting a whole model up, stitches, and what a NAC's modules do among tokens


class Stitched(nn.Module):
    """post ∘ S_i ∘ pre: a student's module with the layers that let it stand between the meta model's modules.

    states B×N×W (W the meta's width; images for the first module) -> states B×U×W (logits for the last), U = N for a V-MoE.
    """

    def __init__(self, body, pre, post):
        super().__init__()
        self.pre_stitch, self.body, self.post_stitch = pre, body, post

    def forward(self, x):
        # the student's hybrid is M_L ∘ … ∘ M_{i+1} ∘ [post ∘ S_i ∘ pre] ∘ M_{i-1} ∘ … ∘ M_1
        return self.post_stitch(self.body(self.pre_stitch(x)))


class NACModule(nn.Module):
    """Module i of a NAC inside the meta model, sharing the NAC's parameters. B N D (or images) -> B U D (or logits).

    A ViT's block takes any number of tokens, so a module may hand on its U latents in place of the 1+N tokens that came in.
    The meta model's head then reads the first of them, which is thereby taught to be the class token.
    Inside the meta model there are tokens instead of latents. `mode` says whose codes and states go with them:
      own       the circuit's own: as near to a module's later use as tokens allow. Read-in and read-out have their U_in and
                U_out latents, states from the seeder. In the first propagator the tokens stand for input latents, and the
                seeded mediators listen to them; later, and for the read-out, tokens stand for mediators. What several
                modules share (seeder, mediator codes, the codes that tokens get) stays as initialised here; codes and
                seeder are carried on into the circuit.
      original  the paper's code: one fixed random code for everything; read-in and read-out have one latent, of fixed
                random state; a propagator's tokens are receivers and senders. None of it reaches the circuit.
      fresh     as own, but the codes are drawn anew for each batch (in evaluation: one fixed draw).
    Tokens have no signatures, so there is no kernel here, and its bandwidth does not learn.
    """

    def __init__(self, nac, i, mode):
        super().__init__()
        self.mode, last = mode, len(nac.propagators) + 1
        self.kind = "read_in" if i == 0 else "read_out" if i == last else "propagator"
        # who listens to the tokens (None: they do), and whom the tokens stand for
        listeners, stand_in = None, nac.mediator_latents
        if i == 0:
            self.tokenizer, self.read_in, listeners = nac.tokenizer, nac.read_in, nac.input_latents
        elif i == last:
            self.read_out, self.pool, listeners = nac.read_out, nac.pool, nac.output_latents
        else:
            self.propagator = nac.propagators[i - 1]
            if i == 1 and mode != "original":
                listeners, stand_in = nac.mediator_latents, nac.input_latents
        # without kernel β has no part in the loss: it does not learn here, and is not counted
        if i:
            (self.read_out if i == last else self.propagator).attention.bandwidth.requires_grad_(False)

        # These buffers are not in the state dict: like all initial values they are a function of the seed.
        draw = lambda latents: torch.randn_like(latents.codes[:1] if mode == "original" else latents.codes)
        token_codes = stand_in.codes.detach().clone() if mode == "own" else draw(stand_in)
        self.register_buffer("token_codes", token_codes, persistent=False)
        if listeners and mode == "own":
            # Two modules may not pull at one tensor, for each is trained alone. The mediators' codes are also those of the
            # tokens in later modules, so the first propagator leaves them be. (This freezes them in the NAC itself, which
            # here only lends its parameters: finetune.py builds another, in which all learns.)
            self.codes = listeners.codes.requires_grad_(i != 1)
        else:
            self.register_buffer("codes", listeners and draw(listeners), persistent=False)
        if mode == "original":
            self.register_buffer("states", torch.randn(1, 1, nac.seeder.mu.out_features), persistent=False)
        elif listeners is not None:
            self.seeder = nac.seeder.requires_grad_(False)

    def forward(self, x):
        draw = torch.randn_like if self.mode == "fresh" and self.training else nn.Identity()
        if self.kind != "read_in":
            # one code a token, from the first again where tokens are more than codes
            n = torch.arange(x.shape[1], device=x.device)
            token_codes = draw(self.token_codes)[n % len(self.token_codes)]  # N C
        if self.codes is None:
            # tokens talk to tokens
            return self.propagator(x, x, token_codes, token_codes)  # B N D
        codes = draw(self.codes)  # U C
        states = self.states.expand(len(x), -1, -1) if self.mode == "original" else self.seeder(codes, len(x))  # B U D
        if self.kind == "read_in":
            return self.read_in(states, self.tokenizer(x), codes)
        if self.kind == "propagator":
            # senders as in the circuit: input latents (here the tokens), then mediators
            return self.propagator(states, torch.cat([x, states], 1), codes, torch.cat([token_codes, codes]))
        return self.pool(self.read_out(states, x, codes, token_codes))


def new_stitches(student, config):
    """The layers between two modules of a student: post (to the meta's width) and pre (back)."""
    width, meta_width = config["student"]["width"], config["meta"]["width"]

    # as in the original: plain Linear for a NAC, LayerNorm + Linear for a V-MoE
    def stitch(a, b):
        fc = nn.Linear(a, b)
        return fc if isinstance(student, NAC) else nn.Sequential(OrderedDict(ln=nn.LayerNorm(a), fc=fc))

    return nn.Sequential(OrderedDict(post=stitch(width, meta_width), pre=stitch(meta_width, width)))


def cut(model, config, role):
    """The L modules of a whole teacher or student as they are trained inside the meta model, sharing its parameters.

    A student's modules get stitches, none before the first module and none after the last.
    """
    # A teacher's modules have the meta model's width, as in Deep Incubation, and fit into it as they are.
    if role == "teacher":
        return list(model.parts)
    # Seeded anew, so that stitches are the same for each way of training: all modules at once, one by one, in processes.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        if isinstance(model, NAC):
            parts = [NACModule(model, i, config["distill"]["codes"]) for i in range(len(model.propagators) + 2)]
        else:
            parts = model.parts
        pairs = nn.ModuleList(new_stitches(model, config) for _ in parts[1:])
    # Kept stitches are part of the assembled student, so they are trained in place, as the other weights are.
    if len(model.stitches) and config["distill"]["stitches"] == "keep":
        model.stitches.load_state_dict(pairs.state_dict())
        pairs = model.stitches
    pre = [nn.Identity()] + [pair.pre for pair in pairs]
    post = [pair.post for pair in pairs] + [nn.Identity()]
    return [Stitched(*three) for three in zip(parts, pre, post)]


def fold_stitches(model, modules):
    """Sets a NAC's folded stitches: between two modules pre_{i+1} ∘ post_i is one affine map, D -> D."""
    for i, folded in enumerate(model.stitches):
        post, pre = modules[i].post_stitch, modules[i + 1].pre_stitch
        # pre(post(x)) = W_pre (W_post x + b_post) + b_pre: W = W_pre W_post, b = W_pre b_post + b_pre
        with torch.no_grad():
            folded.weight.copy_(pre.weight @ post.weight)
            folded.bias.copy_(pre.weight @ post.bias + pre.bias)


# ------------------------------------------------------------------------------------------------------------------
# From a config to a model

# name: patch, width, heads, depth
ARCHITECTURES = {
    "vit_tiny": (16, 192, 3, 12), "vit_small": (16, 384, 6, 12), "vit_base": (16, 768, 12, 12),
    "vit_large": (16, 1024, 16, 24), "vit_huge": (14, 1280, 16, 32),
}


def build(config, role):
    """A whole model with fresh weights: role meta, teacher, student, or baseline (a student without stitches).

    Images B×3×H×W -> logits B×classes. Same seed, same weights. Under `with torch.device("meta")` nothing is allocated.
    """
    c = config["student" if role.startswith("baseline") else role]

    def options(*keys):
        return {key: c[key] for key in keys}

    common = dict(image_size=config["data"]["image_size"], classes=config["data"]["classes"],
                  **options("width", "heads"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        if role in ("meta", "teacher") or c["kind"] == "vmoe":
            moe = options("experts", "top_k", "balance", "capacity") if c["experts"] else None
            model = ViT(moe=moe, **common, **options("patch", "depths", "mlp_ratio", "qkv_bias", "eps", "init_std",
                                                     "moe_blocks"))
        else:
            model = NAC(ffn_ratio=c["mlp_ratio"], **common,
                        **options("head_width", "latents", "propagators", "code_width", "signature_width",
                                  "tokenizer_stages", "tokenizer_blocks", "grid_width", "grid_size"))
        # A student that keeps its stitches, or has them folded, is a larger model than its baseline.
        stitches = config["distill"]["stitches"] if role == "student" else "drop"
        for _ in range(modules_of(config) - 1 if stitches != "drop" else 0):
            model.stitches.append(new_stitches(model, config) if stitches == "keep" else
                                  nn.Linear(c["width"], c["width"]))
    return model


def on_target(config, role):
    """The config as a stage of `role` sees it: students and baselines as a whole have `target` in place of `data`."""
    if role not in ("student", "baseline", "baseline_kd"):
        return config
    target = {k: v for k, v in config["target"].items() if v is not None}
    return {**config, "data": {**config["data"], **target}}


def new_classes(config):
    """Whether `target` has other classes than `data`, so that what knows the one cannot tell the other. (The same set in
    another folder counts as other classes: nobody has looked inside.)"""
    target = on_target(config, "student")["data"]
    return any(target[key] != config["data"][key] for key in ("set", "root", "classes"))


def modules_of(config):
    """L, the number of modules: that of the meta model's `depths`."""
    return len(config["meta"]["depths"])


def fit_graph_prior(model, config):
    """Fits a fresh NAC's mediator signatures to the config's random graph (seeded); returns a line for the log, or None."""
    c = config["student"]
    if not isinstance(model, NAC) or c["graph"] == "none":
        return None
    n = len(model.mediator_latents.signatures)
    linked = random_graph(c["graph"], n, np.random.default_rng(config["seed"]), m=c["graph_m"], groups=c["graph_groups"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        near, far = fit_signatures(model.mediator_latents.signatures, linked)
    return (f"graph prior {c['graph']}: {linked.sum() // 2} links over {n} mediators; after fitting {100 * near:.1f} % of "
            f"linked pairs can talk, {100 * far:.1f} % of unlinked pairs cannot")


# ------------------------------------------------------------------------------------------------------------------
# Config: one YAML file, checked key by key before any data or weights are read


def whole(low=0, high=2**31 - 1):
    words = f"a whole number from {low} up" if high == 2**31 - 1 else f"a whole number from {low} to {high}"
    return (lambda v: type(v) is int and low <= v <= high), words


def number(low=0.0, high=math.inf):
    words = f"a number from {low:g} up" if high == math.inf else f"a number from {low:g} to {high:g}"
    return (lambda v: type(v) in (int, float) and low <= v <= min(high, 1e30)), words


def one_of(*names):
    return (lambda v: v in names and type(v) is str), "one of " + ", ".join(names)


def numbers(rule, count=None):
    """A list in which each entry obeys a rule."""
    words = f"a list of {count or 'one or more'}, each {rule[1]}"
    return (lambda v: type(v) is list and len(v) == (count or max(1, len(v))) and all(map(rule[0], v))), words


def or_null(rule):
    return (lambda v: v is None or rule[0](v)), rule[1] + ", or null"


MANY = 1_000_000  # of anything in a model: more is a slip of the keyboard, which no memory would hold
FLAG = (lambda v: type(v) is bool), "true or false"
TEXT = (lambda v: type(v) is str and v.isprintable() and len(v) < 256), "printable text of at most 255 characters"
TEXTS = (lambda v: type(v) is list and all(type(x) is str for x in v)), "a list of texts"

CLASSES = {"glyphs": 24, "lower_case": 14, "fashion_mnist": 10, "tiny_imagenet": 200, "imagenet": 1000, "cifar100": 100,
           "cub": 200}
DRAWN = ("glyphs", "lower_case")  # sets of any size, drawn by Pillow
TRAIN_IMAGES = {"fashion_mnist": 60000, "tiny_imagenet": 100000, "imagenet": 1281167,
                "cifar100": 50000, "cub": 5994}

DATA_KEYS = {
    "set": ("glyphs", one_of(*CLASSES, "folder")),
    "root": ("", TEXT),  # folder of the set's files; empty: where Debian's package of it puts them, if there is one
    "image_size": (32, whole(1, 4096)),  # pixels: images are square
    "classes": (None, or_null(whole(2, MANY))),  # null: what the set has
    "train_images": (0, whole(0, 10**8)),  # how many to use, or to draw (glyphs); 0: all
    "validation_images": (1000, whole(1, 10**8)),  # held out from the training images; choices are made on them
    "test_images": (0, whole(0, 10**8)),  # 0: all
    "robustness": ([], TEXTS),  # further test sets: renditions, or a folder of <class name>/*
    "pad": (0, whole()),  # random crop after padding by so many pixels
    "resized_crop": (None, or_null(numbers(number(0.001, 1), 2))),  # random resized crop: range of areas
    "flip": (0.0, number(0, 1)),  # probability of a horizontal flip
    "randaugment": (0.0, number(0, 10)),  # magnitude; 9 in the paper
    "erasing": (0.0, number(0, 1)),  # probability that a rectangle becomes noise
    "mixup": (0.0, number()),  # α of Beta(α, α), from which the share of each of two images is drawn; 0: off
    "cutmix": (0.0, number()),  # the same for the area of a box; with both on, a coin decides
    "smoothing": (0.0, number(0, 0.999)),  # of labels: this much of the target is spread over all classes
    "repeats": (1, whole(1, 100)),  # repeated augmentation
    "workers": (4, whole(0, 256)),  # processes that read image files, per process that trains
}

VIT_KEYS = {
    "arch": (None, or_null(one_of(*ARCHITECTURES))),  # fills patch, width, heads and depth
    "depth": (None, or_null(whole(1))),  # only a check: what depths must sum to
    "patch": (8, whole(1, 4096)),  # side in pixels
    "width": (64, whole(1, MANY)),  # of a token
    "heads": (4, whole(1, MANY)),  # of attention
    "depths": ([1, 1, 1], numbers(whole(1, 1000))),  # blocks of each module
    "mlp_ratio": (4.0, number(0.01, 64)),  # hidden width of MLPs, of experts and of a NAC's FFNs, in widths
    "qkv_bias": (True, FLAG),  # off in the original's ViT-Huge
    "eps": (1e-6, number(1e-12)),  # of the LayerNorms; 1e-5 in the original's ViT-Huge
    "init_std": (0.02, number(1e-6)),  # of the weights; DeiT's .02 suits widths from about 200 up, .1 widths near 64
    "experts": (0, whole(0, MANY)),  # 0: a plain MLP
    "top_k": (2, whole(1)),  # experts that a token goes to
    "moe_blocks": (None, or_null(numbers(whole()))),  # which blocks have experts; null: all
    "balance": (0.0, number()),  # weight of V-MoE's importance + load loss; .01 in V-MoE, 0 in m2mKD
    "capacity": (0.0, number()),  # V-MoE's capacity factor in training; 0: no limit
}

STAGE_KEYS = {
    "epochs": (10, whole()),
    "batch": (64, whole(1)),  # images per process and step
    "accumulate": (1, whole(1)),  # gradients of so many batches are averaged into one step
    "lr": (5e-4, number()),  # for a total batch of 512; scales with batch × processes × accumulate
    "min_lr": (1e-5, number()),  # where the cosine ends; not scaled …
    "scale_min_lr": (False, FLAG),  # … unless this is on
    "warmup": (0, number()),  # epochs of linear warm-up from 1e-6
    "betas": ([0.9, 0.999], numbers(number(0, 0.9999), 2)),  # AdamW's
    "weight_decay": (0.05, number()),  # AdamW's, on matrices
    "decay_all": (False, FLAG),  # also 1-d parameters and embeddings (the NAC's finetuning)
    "drop_path": (0.0, number(0, 0.99)),  # stochastic depth: rate of the last block (of all, in a NAC)
    "clip": (0.0, number()),  # gradient norm; 0: none
    "images": (None, or_null(numbers(whole(), 2))),  # [first, stop) of the shuffled training images; null: all
    "wrong_labels": (0.0, number(0, 1)),  # this share of the images gets a random wrong label, the same one in every stage
    "passes": (1, whole(1, 10**6)),  # how often an epoch goes over its images: a few images would make many short epochs
}

KEYS = {
    "seed": (0, whole()),  # everything random is a function of it
    "output_dir": (None, or_null(TEXT)),  # null: runs/<name of the config>
    # folders of other runs: what they have finished with the same settings is not trained again
    "share": (None, (lambda v: v is None or TEXT[0](v) or type(v) is list and all(map(TEXT[0], v)),
                     "a run's folder, a list of such folders, or null")),
    "device": ("auto", one_of("auto", "cpu", "cuda", "mps")),
    "precision": ("auto", one_of("auto", "float32", "bfloat16")),  # auto: bfloat16 autocast on CUDA, float32 elsewhere

    "compile": (False, FLAG),  # torch.compile of what is trained: worth its minutes on a GPU only

    **{f"data.{k}": v for k, v in DATA_KEYS.items()},
    # where the student is finetuned and tested, if that is another set than its modules are distilled on: what is not
    # null here stands in for the same key of data (Tiny-ImageNet students are distilled on ImageNet)
    **{f"target.{k}": (None, or_null(rule)) for k, (_, rule) in DATA_KEYS.items()},

    **{f"meta.{k}": v for k, v in VIT_KEYS.items()},
    **{f"teacher.{k}": v for k, v in VIT_KEYS.items()},
    **{f"student.{k}": v for k, v in VIT_KEYS.items()},
    "meta.checkpoint": (None, or_null(TEXT)),  # weights from elsewhere; their stages are left out
    "teacher.checkpoint": (None, or_null(TEXT)),
    "student.start": (None, or_null(TEXT)),  # weights to finetune in place of the assembled modules

    "student.kind": ("nac", one_of("nac", "vmoe")),
    # the NAC's own keys; width, heads and mlp_ratio (of its FFNs) are shared with the ViT
    "student.latents": ([16, 32, 4], numbers(whole(1, MANY), 3)),  # input, mediator, output
    "student.propagators": (1, whole(1, 1000)),  # L = propagators + 2
    "student.head_width": (16, whole(1, MANY)),  # a NAC's heads need not divide its width
    "student.code_width": (None, or_null(whole(1, MANY))),  # null: width
    "student.signature_width": (64, whole(1, MANY)),
    "student.tokenizer_stages": (2, whole(2)),  # of ConvNeXt blocks; the stride is 2^(stages + 1)
    "student.tokenizer_blocks": (3, whole(1, 1000)),
    "student.grid_width": (64, whole(1, MANY)),  # channels of the position grid
    "student.grid_size": (None, or_null(whole(1, 4096))),  # null: as many places as tokens
    "student.graph": ("none", one_of("none", "scale_free", "planted_partition", "ring_of_cliques", "erdos_renyi")),
    "student.graph_m": (2, whole(1)),  # scale_free: links of a new node
    "student.graph_groups": (8, whole(2)),  # planted_partition, ring_of_cliques
    "student.sbm_groups": (8, whole(2)),  # of the block-model regulariser's target
    "student.regularizer": (0.0, number()),  # weight: .1 hinge repulsion, or 1 block model with planted_partition

    "few_shot.set": (None, or_null(one_of(*CLASSES, "folder"))),  # classes that the model has not seen; null: no few-shot
    "few_shot.root": ("", TEXT),
    "few_shot.images": (0, whole()),  # of its test split; 0: all
    "few_shot.ways": (8, whole(2)),  # classes of an episode
    "few_shot.shots": ([1, 5], numbers(whole(1))),  # labelled images a class; three times as many are asked
    "few_shot.episodes": (200, whole(2)),  # over which mean and interval are taken

    "distill.alpha": (0.5, number(0, 1)),  # loss = (1-α)·CE + α·KD
    "distill.tau": (1.0, number(0.01)),  # temperature
    "distill.kind": ("soft", one_of("soft", "hard")),
    "distill.reduction": ("batchmean", one_of("batchmean", "mean")),  # of the soft loss; mean: the original's
    "distill.codes": ("own", one_of("own", "original", "fresh")),  # of a NAC's modules, see NACModule
    "distill.stitches": ("drop", one_of("drop", "keep", "fold")),  # what becomes of them in the assembled student
    "distill.finetune_alpha": (0.0, number(0, 1)),  # α of the student's finetuning, the whole T its teacher; paper: 0

    **{f"train.{stage}.{k}": v for stage in ("meta", "incubate", "teacher", "distill", "student")
       for k, v in STAGE_KEYS.items()},
    "train.baseline_epochs": (None, or_null(whole())),  # null: the student's
}


class Yaml(yaml.SafeLoader):
    """YAML; a key that stands twice in a block is refused, for the first would be lost in silence, and so are aliases,
    with which a few lines can stand for more than memory holds."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*) is not allowed{self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {twice[0]} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def parse(text, what):
    """YAML -> plain values. Raises UserError that begins with `what`."""
    try:
        value = yaml.load(text, Yaml)
        json.dumps(value, default=str)  # refuses numbers of thousands of digits …
        return value
    except Exception as e:  # PyYAML lets out errors of many kinds: 2024-13-45 looks like a date, !!timestamp x …
        raise UserError(f"{what} is not YAML that can be read: {' '.join(str(e).split())}.") from None


def load_config(path, overrides=()):
    """Reads a YAML config, applies overrides ("distill.alpha=0.9"), checks every key. Returns the complete nested dict.

    Raises UserError (one sentence: key, value, what is allowed, nearest right name).
    """
    try:
        text = Path(path).read_bytes()
    except (OSError, ValueError) as e:
        raise UserError(f"config {path} cannot be read: {getattr(e, 'strerror', e)}.") from None
    tree = parse(text, f"config {path}")
    if not isinstance(tree, dict):
        raise UserError(f"config {path} must hold keys such as 'data:' and 'train:', not {type(tree).__name__}.")
    given = flatten(tree)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is not an override: write key=value, for example distill.alpha=0.9.")
        given[key] = parse(value, f"{key}={value}: the value")
    flat = {}
    for key, value in given.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0)[0]
            raise UserError(f"{key} is not a key; the nearest is {near}.")
        default, (allowed, words) = KEYS[key]
        if isinstance(value, str) and not allowed(value):  # YAML reads 5e-4 as text: it wants 5.0e-4
            try:
                value = float(value)
            except ValueError:
                pass
        if not allowed(value):
            raise UserError(f"{key}={json.dumps(value, default=str)} is not allowed: it must be {words}.")
        flat[key] = float(value) if isinstance(default, float) else value
    flat = {key: flat.get(key, default) for key, (default, _) in KEYS.items()}
    flat["output_dir"] = flat["output_dir"] or f"runs/{Path(path).stem}"
    for role in ("meta", "teacher", "student"):
        if flat[f"{role}.arch"]:
            for key, value in zip(("patch", "width", "heads", "depth"), ARCHITECTURES[flat[f"{role}.arch"]]):
                flat[f"{role}.{key}"] = given.get(f"{role}.{key}", value)
    for block in ("data", "target"):
        flat[f"{block}.classes"] = flat[f"{block}.classes"] or CLASSES.get(flat[f"{block}.set"])
    check_fit(flat)
    return unflatten(flat)


def check_fit(c):
    """What must hold between keys (c is flat). Raises UserError."""
    def require(truth, sentence):
        if not truth:
            raise UserError(sentence)

    def images_divide_by(stride, what, blocks):
        for block in blocks:
            size = c[f"{block}.image_size"] or c["data.image_size"]
            require(size % stride == 0, f"{block}.image_size={size} is not a multiple of {what}.")

    L = len(c["meta.depths"])
    vmoe = c["student.kind"] == "vmoe"
    for folder in folders(c)[1:]:
        require(Path(folder).is_dir(), f"share={folder} is not a run's folder.")
    for block in ("data", "target"):
        require(c[f"{block}.classes"] or c[f"{block}.set"] != "folder",
                f"{block}.classes must be given for {block}.set=folder.")
    for role in ("meta", "teacher") + ("student",) * vmoe:
        depths, depth, width, heads, patch, experts, top_k, moe_blocks = (
            c[f"{role}.{key}"] for key in ("depths", "depth", "width", "heads", "patch", "experts", "top_k", "moe_blocks"))
        blocks = sum(depths)
        require(len(depths) == L, f"{role}.depths={depths} has {len(depths)} modules, meta.depths has {L}.")
        require(depth in (None, blocks),
                f"{role}.depths={depths} sums to {blocks}, but the model has {depth} blocks ({role}.depth).")
        require(width % heads == 0, f"{role}.width={width} does not divide into {role}.heads={heads} heads.")
        images_divide_by(patch, f"{role}.patch={patch}", ("data", "target") if role == "student" else ("data",))
        require(experts == 0 or top_k <= experts, f"{role}.top_k={top_k} is more than {role}.experts={experts}.")
        require(all(k < blocks for k in moe_blocks or []),
                f"{role}.moe_blocks={moe_blocks} names a block that the model of {blocks} has not.")
    require(c["teacher.width"] == c["meta.width"], f"teacher.width={c['teacher.width']} must be "
            f"meta.width={c['meta.width']}: a teacher's modules are incubated inside the meta model without stitches.")
    if vmoe:
        require(c["student.experts"] > 0, "student.kind=vmoe needs student.experts above 0.")
        require(c["distill.stitches"] != "fold", "distill.stitches=fold is for a NAC: a V-MoE's stitches have a "
                "LayerNorm between two Linears and do not fold into one; use drop or keep.")
    else:
        modules, mediators, stages = c["student.propagators"] + 2, c["student.latents"][1], c["student.tokenizer_stages"]
        require(modules == L, f"student.propagators={c['student.propagators']} makes {modules} modules with read-in and "
                f"read-out, meta.depths has {L}.")
        require(c["student.width"] % 4 == 0, f"student.width={c['student.width']} must be a multiple of 4.")
        require(stages <= 3, "student.tokenizer_stages must be 2 or 3.")
        stride = 2 ** (stages + 1)
        images_divide_by(stride, f"the tokenizer's stride of {stride}", ("data", "target"))
        for key in ("student.graph_groups", "student.sbm_groups"):
            require(c[key] * 2 <= mediators, f"{key}={c[key]} leaves groups of fewer than two mediators.")
        require(c["student.graph_m"] < mediators,
                f"student.graph_m={c['student.graph_m']} must be below the number of mediators.")
    require(not c["distill.finetune_alpha"] or not new_classes(unflatten(c)),
            "distill.finetune_alpha needs a teacher that knows the classes of `target`; here it knows those of `data`.")
    ways, shots, few = c["few_shot.ways"], max(c["few_shot.shots"]), c["few_shot.set"]
    require(ways <= CLASSES.get(few, ways), f"few_shot.ways={ways} is more than the {CLASSES.get(few)} classes of {few}.")
    require(few not in DRAWN or c["few_shot.images"] // CLASSES[few] >= 4 * shots,
            f"few_shot.images={c['few_shot.images']} is too few for few_shot.shots={c['few_shot.shots']}: {shots} shots and "
            f"{3 * shots} queries of {CLASSES.get(few)} classes need {4 * shots * CLASSES.get(few, 0)}.")
    for key, value in c.items():
        if key.endswith(".resized_crop") and value:
            require(value[0] <= value[1], f"{key}={value} is not a range: write [smallest area, largest].")
        if key.startswith("train.") and key.endswith(".images") and value:
            require(value[0] < value[1], f"{key}={value} is empty: write [first, stop] with first < stop.")


def flatten(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def unflatten(flat):
    tree = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


# ------------------------------------------------------------------------------------------------------------------
# Reading and writing weights


def save(path, content):
    """Writes a checkpoint: tensors, numbers and strings only. Its folder is begin()'s to make: if it has vanished, so has
    what the run had finished, and that must not go unnoticed."""
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: the folder {path.parent} has vanished; start again to begin anew.")
    write(path, lambda file: torch.save(content, file))


def write_text(path, text):
    write(path, lambda file: file.write(text.encode()))


def write(path, put):
    """Writes a file so that `path` is always whole: beside it, fsync, rename. Raises UserError where that fails."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")  # jobs in containers share process numbers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch turns a full disk into a RuntimeError
        raise UserError(f"{path} cannot be written ({e}); what was there before is unharmed.") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read(path):
    """Reads a checkpoint with weights_only=True: nothing in it is executed. Raises UserError if it is not whole."""
    try:
        if not Path(path).is_file():  # a pipe or a device might never end
            raise UserError(f"{path} cannot be read: there is no such file.")
        if zipfile.is_zipfile(path):  # torch does not check the checksums that it writes
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise UserError(f"{path} is damaged: the checksum of its record {bad} is wrong.")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}.") from None
    except Exception as e:  # pickle, zip and torch each have errors of their own for a broken or foreign file
        raise UserError(f"{path} is not a checkpoint that can be read safely "
                        f"({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}).") from None


# The original's names -> ours, in this order.
ORIGINAL_NAMES = [(re.compile(pattern), ours) for pattern, ours in [
    (r"^latent_graphs\.0\.", ""), (r"(codes|signatures)_$", r"\1"),
    (r"^latent_seeder\.", "seeder."), (r"code_to_state_", ""),
    (r"(^|\.)(read_in|latent)_attention\.", r"\1attention."), (r"attention\.kernel\.", "attention."),
    (r"(sender|receiver)_layernorm", r"\1_norm"), (r"(^|\.)layernorm\.", r"\1norm."),
    (r"_compiler\.", "."), (r"exit_layer\.", "exit."), (r"native_", ""), (r"scale_gain$", "gain"),
    (r"layer_scale\.gamma", "gamma"), (r"ffn\.ffn\.0\.", "ffn.fc1."), (r"ffn\.ffn\.2\.", "ffn.fc2."),
    (r"^(input_)?tokenizer\.backbone\.", "tokenizer."), (r"^(input_)?tokenizer\.positional_grid\.", "tokenizer."),
    (r"^(output_)?tokenizer\.(confidence_scorer|to_logits)", r"pool.\2"),
    (r"\.moe\.gate\.gate\.", ".moe.router."),
]]


def translate(state, model, path="a checkpoint"):
    """A state dict with timm's, Deep Incubation's, the original's or our names -> our names for `model`."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if not isinstance(model, NAC):  # Deep Incubation keeps every tensor twice; the copies under blocks.* are the plain model
        state = {k: v for k, v in state.items() if not k.startswith("stages.")}
    out = {}
    for name, value in state.items():
        for pattern, ours in ORIGINAL_NAMES:
            name = pattern.sub(ours, name)
        out[name] = value
    # one tensor an expert, htoh4 (1, H, D) -> all experts in one, fc1 (E, H, D)
    experts = [name for name in out if ".moe.experts.0." in name]
    for name in experts:
        rows = []
        while (one := name.replace(".experts.0.", f".experts.{len(rows)}.")) in out:
            rows.append(out.pop(one).squeeze(0))
        if any(row.shape != rows[0].shape for row in rows):
            raise UserError(f"{path}: the tensors {name} and those of the other experts differ in shape.")
        out[name.replace("experts.0.htoh4.", "fc1_").replace("experts.0.h4toh.", "fc2_")] = torch.stack(rows)
    if isinstance(model, ViT):  # kept stitches stand in the last block of one module and in the first of the next
        ends = np.cumsum([len(part.blocks) for part in model.parts]).tolist()
        for i, end in enumerate(ends[:-1]):
            rename(out, f"blocks.{end - 1}.post_stitch.", f"stitches.{i}.post.")
            rename(out, f"blocks.{end}.pre_stitch.", f"stitches.{i}.pre.")
    if isinstance(model, Stitched) and not any(name.startswith("body.") for name in out):
        rename(out, "", "body.")
        for name in list(out):
            if stitch := re.search(r"(pre|post)_stitch\..*", name):
                out[stitch[0]] = out.pop(name)
        kind = getattr(model.body, "kind", None)
        if kind in ("propagator", "read_out"):
            rename(out, "body.attention.", f"body.{kind}.attention.")
            rename(out, "body.ffn.", f"body.{kind}.ffn.")
    return out


def rename(state, old, new):
    """Replaces a prefix of names in a state dict, in place."""
    for name in [name for name in state if name.startswith(old)]:
        state[new + name[len(old):]] = state.pop(name)


def unwrap(content, path):
    """The state dict in a checkpoint's content, whatever it is wrapped in."""
    for key in ("model", "state_dict", "block_state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided and v.is_floating_point()
            and v.device.type == "cpu" for k, v in content.items()):
        raise UserError(f"{path} holds no state dict (names to dense tensors of floating-point numbers).")
    return check_weights(content, path)


def check_weights(state, what):
    """Returns a state dict; raises UserError, beginning with `what`, if a tensor in it is not finite."""
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{what}: the tensor {name} is not finite; train again with a lower learning rate, warm-up "
                            "or gradient clipping.")
    return state


def resize_pos_embed(pos_embed, tokens):
    """Bicubically resizes a position grid of another image size; the class token's is kept. 1 1+N D -> 1 tokens D."""
    grid = pos_embed[:, 1:]
    old, new = math.isqrt(grid.shape[1]), math.isqrt(tokens - 1)
    if not old or old * old != grid.shape[1] or new * new != tokens - 1:
        return pos_embed  # not a square grid: the shape check will name it
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), (new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def load_weights(model, path):
    """Reads a whole model's (or one module's) weights into `model`: our own file or any format of other people's.

    timm / DeiT state dicts, Deep Incubation's files, the original's V-MoE, NAC and single modules; for a ViT also a folder
    with one file a module, ours or the original's. A ViT's position grid of another image size is resized. Raises UserError
    (a ValueError) naming the first tensor that is missing, unexpected or of another shape; the model is then unchanged.
    """
    state = join_modules(model, path) if Path(path).is_dir() else unwrap(read(path), path)
    load_state(model, state, path)


def join_modules(model, folder):
    """The state dict of a whole ViT from a folder with one file a module, whose blocks are numbered from 0 in each."""
    state, files = {}, {}
    for file in sorted(Path(folder).iterdir()):
        if file.suffix not in (".pt", ".pth") or "unfinished" in file.name:
            continue
        content = read(file)
        index = content.get("block_index", file.stem) if isinstance(content, dict) else None
        files[int(index) if str(index).isdecimal() else file.name] = unwrap(content, file)
    parts = getattr(model, "parts", ())
    if not parts or set(files) != set(range(len(parts))):
        raise UserError(f"{folder} is a folder: it must hold one file for each of the modules 0 to {len(parts) - 1} of a "
                        f"ViT, but it holds {sorted(map(str, files)) or 'none'}.")
    # the number in the whole of a module's first block
    first = 0
    for i, part in enumerate(parts):
        for name, value in files[i].items():
            state[re.sub(r"^blocks\.(\d+)", lambda k: f"blocks.{first + int(k[1])}", name)] = value
        first += len(part.blocks)
    return state


def load_state(model, state, path):
    state, own = translate(state, model, path), model.state_dict()
    if "pos_embed" in own and "pos_embed" in state and state["pos_embed"].ndim == 3:
        if state["pos_embed"].shape != own["pos_embed"].shape:
            state["pos_embed"] = resize_pos_embed(state["pos_embed"], own["pos_embed"].shape[1])
    for name, value in own.items():
        if isinstance(model, Stitched) and name.endswith("attention.bandwidth"):
            state.setdefault(name, value)  # the original's NAC modules have no kernel
        if name not in state:
            raise UserError(f"{path} lacks the tensor {name} {tuple(value.shape)}.")
    for name, value in state.items():
        if name not in own:
            raise UserError(f"{path} holds the tensor {name} {tuple(value.shape)}, which the model has not.")
    for name, value in own.items():  # last: a distilled DeiT is better known by its dist_token than by its positions
        if state[name].shape != value.shape:
            raise UserError(f"{path}: the tensor {name} is {tuple(state[name].shape)}, the model's {tuple(value.shape)}.")
    model.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------------
# A run's folder: which stage made which file, with which settings

# stage: the keys that its result depends on (a stage depends on all before it)
MADE_FROM = {"meta": ["seed", "precision", "data", "meta", "train.meta"]}
MADE_FROM["incubate"] = MADE_FROM["assemble_teacher"] = MADE_FROM["meta"] + ["teacher", "train.incubate"]
MADE_FROM["teacher"] = MADE_FROM["incubate"] + ["train.teacher"]
MADE_FROM["distill"] = MADE_FROM["teacher"] + ["student", "distill", "train.distill"]
MADE_FROM["assemble_student"] = MADE_FROM["distill"] + ["target"]
MADE_FROM["student"] = MADE_FROM["assemble_student"] + ["train.student"]
MADE_FROM["baseline"] = ["seed", "precision", "data", "target", "student", "train.student", "train.baseline_epochs"]
MADE_FROM["baseline_kd"] = MADE_FROM["teacher"] + MADE_FROM["baseline"] + [
    f"distill.{key}" for key in ("alpha", "tau", "kind", "reduction")]
# what changes no result; and what does not matter yet where modules are distilled, or where they are assembled
IDLE = tuple(f"{block}.{k}" for block in ("data", "target") for k in ("root", "workers", "test_images", "robustness"))
LATER = {"assemble_student": ("student.start", "student.regularizer", "student.sbm", "distill.finetune_alpha")}
LATER["baseline"] = LATER["baseline_kd"] = ("student.start",)
LATER["distill"] = (*LATER["assemble_student"], "student.graph", "distill.stitches")


def settings(config, stage):
    """The part of a config that a stage's result depends on, as JSON: kept in its checkpoints, compared later."""
    def counts(key):
        return (any(key == k or key.startswith(k + ".") for k in MADE_FROM[stage]) and not key.startswith(IDLE)
                and not key.startswith(LATER.get(stage, ())))

    return json.dumps({k: v for k, v in flatten(config).items() if counts(k)})


def difference(content, config, stage):
    """In words, the first setting in which a checkpoint differs from the config; None if there is no difference."""
    try:
        old, new = json.loads(content["settings"]), json.loads(settings(config, stage))
    except (LookupError, TypeError, ValueError):
        old = None
    if not isinstance(old, dict):
        return "settings that it does not tell"
    # A key that a file does not know yet had no other value than its default when the file was made.
    old = {**{key: KEYS[key][0] for key in new}, **old}
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            return f"{key}={json.dumps(old.get(key))} instead of {json.dumps(new.get(key))}"
    return None


def folders(config):
    """The run's own folder, then those of the runs that it shares."""
    share = config["share"] or []
    return [config["output_dir"], *([share] if isinstance(share, str) else share)]


def finished(config, stage, name, force=False):
    """Path of a stage's finished file, in the run's folder or in the one it shares; None if it is still to be made.

    A file that was made with other settings is never taken for the stage's result: in the run's folder it is refused.
    """
    for folder in folders(config):
        path = Path(folder, name)
        if path.exists() and not force:
            other = difference(read(path), config, stage)
            if not other:
                return path
            if folder == config["output_dir"]:
                raise UserError(f"{path} was made with {other}; choose another output_dir, or force=true to make it "
                                "again.")
    return None


def needed(config, role, stage=None, name=None):
    """Path of the weights that a stage builds on: <role>.checkpoint, or the finished file. Raises UserError without."""
    if name is None and config.get(role, {}).get("checkpoint"):
        return config[role]["checkpoint"]
    name = name or f"{role}.pt"
    path = finished(config, stage or role, name)
    if path is None:
        raise UserError(f"{Path(config['output_dir'], name)} is not there yet: run the stage that makes it first "
                        "(run.sh runs all stages in order).")
    return path


def begin(config, process, name):
    """Makes the run's folder, the one that the stage's file `name` goes to, and the resolved config in it."""
    for block in ("data", "target"):
        for other in config[block]["robustness"] or []:  # first used when all is trained, so look now
            if other != "renditions" and not os.path.isdir(other):
                raise UserError(f"{block}.robustness has {other}, which is not a folder; {block}.robustness=[] goes "
                                "without.")
    if process.rank == 0:
        folder = Path(config["output_dir"])
        write_text(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))
        Path(folder, name).parent.mkdir(exist_ok=True)


def unfinished(config, stage, name, force=False):
    """What a stage that was cut off left behind; None if there is nothing, or force. Raises UserError on other settings."""
    path = Path(config["output_dir"], name)
    if force or not path.exists():
        return None
    content, world = read(path), int(os.environ.get("WORLD_SIZE", 1))
    other = difference(content, config, stage)
    if not other and str(content.get("world")) != str(world):  # a step would be of another number of images
        other = f"{content.get('world')} processes instead of {world}"
    if other:
        raise UserError(f"{path} was begun with {other}; choose another output_dir, or force=true to start again.")
    return content


def resume(config, process, name, content, parts):
    """Puts what unfinished() found back into `parts` -> the step to go on from; 0 if it found nothing (None).

    parts: {i: (module, its AdamW, its sums)}, as in save_unfinished. Raises UserError naming the first piece that is
    missing, or of another type or shape. From here on SIGTERM asks the loop to save and leave; before, it just ends us.
    """
    signal.signal(signal.SIGTERM, lambda *_: STOP.append(True))
    if content is None:
        return 0
    path = Path(config["output_dir"], name)
    check_like(content, {"step": 0, "lines": [], "parts": {}}, f"{path}:")
    try:
        json.dumps([{**line} for line in content["lines"]])
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: lines are not the log's ({e}); force=true starts the stage again.") from None
    for i, (module, optimizer, sums) in parts.items():
        if i not in content["parts"]:
            raise UserError(f"{path} was begun without module {i}, whose own file is missing now: train it with "
                            f"module={i} first, or repeat all with force=true.")
        groups, part = optimizer.state_dict()["param_groups"], content["parts"][i]
        weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        moments = {n: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for n, p in enumerate(weights)}
        check_like(part, {"model": module.state_dict(), "optimizer": moments, "sums": sums}, f"{path}: {i}")
        if any(part["optimizer"][n]["step"].item() != content["step"] for n in moments):
            raise UserError(f"{path}: step {content['step']} is not {i}'s optimizer's; force=true starts the stage again.")
        load_state(module, unwrap(part, path), path)
        optimizer.load_state_dict({"state": part["optimizer"], "param_groups": groups})
        sums[process.rank].copy_(part["sums"][process.rank])
    add_log(config, process, content["lines"])
    return content["step"]


def check_like(content, example, what):
    """Raises UserError, beginning with `what`, where content lacks a piece of the example or has another type or shape."""
    if isinstance(content, dict) and isinstance(example, dict):
        for key in example:
            check_like(content.get(key), example[key], f"{what} {key}")
        return
    old, new = (f"a tensor {tuple(v.shape)} {v.dtype} {v.layout}" if isinstance(v, torch.Tensor) else
                "missing" if v is None else type(v).__name__ for v in (content, example))
    if old != new:
        raise UserError(f"{what} is {old}, not {new}; force=true starts the stage again.")


def save_unfinished(config, process, stage, name, parts, step, lines):
    """Writes all that a stage needs to go on: of each part (module, optimiser, sums) the tensors, the step, the last lines
    of the log. Something that is not finite stops every process, before it can replace the last good checkpoint."""
    parts = {i: {"model": module.state_dict(), "optimizer": optimizer.state_dict()["state"], "sums": sums}
             for i, (module, optimizer, sums) in parts.items()}
    check_weights(flatten(parts), f"{Path(config['output_dir'], name)} stays as it was before step {step}")
    if process.rank == 0:
        save(Path(config["output_dir"], name), {
            "parts": parts, "step": step, "lines": lines, "settings": settings(config, stage), "world": process.world})


def save_finished(config, stage, name, state):
    """Writes a stage's result: the weights, and the settings that they were made with."""
    path = Path(config["output_dir"], name)
    save(path, {"model": check_weights(state, path), "settings": settings(config, stage)})


def remove(config, name):
    """Removes what was unfinished and is finished now, and what kills left of attempts to write it."""
    for path in Path(config["output_dir"]).glob(f"{name}*"):
        path.unlink(missing_ok=True)


def add_log(config, process, lines):
    """Appends lines to the run's log.jsonl, but none twice: after a resume the last ones may be there already."""
    path = Path(config["output_dir"], "log.jsonl")
    if process.rank or not lines:
        return
    try:
        texts = [json.dumps(line) + "\n" for line in lines]
        with open(path, "a+b") as file:
            file.seek(0)
            old = file.read()
            if not old.endswith(b"\n"):  # a disk that was full may have cut a line short; it comes again now
                file.truncate(old.rfind(b"\n") + 1)
            file.write("".join(text for text in texts if text.encode() not in old).encode())
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e}); all is saved: start again to go on.") from None
    for line in lines:
        say(process, "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))


# ------------------------------------------------------------------------------------------------------------------
# What the training loops share


def expert_load(model):
    """For the log: each mixture's share of tokens by expert, last training batch, one row a layer; {} without experts."""
    load = [[round(share, 3) for share in m.load.tolist()] for m in model.modules() if isinstance(m, MoE)]
    return {"expert_load": load} if load else {}


def set_drop_path(model, rate):
    """Stochastic depth: rises linearly from 0 to `rate` over a ViT's blocks, is constant over a NAC's propagators."""
    blocks = model.propagators if isinstance(model, NAC) else model.blocks
    for k, block in enumerate(blocks):
        value = rate if isinstance(model, NAC) else rate * k / max(1, len(blocks) - 1)
        for module in block.modules():
            if isinstance(module, DropPath):
                module.rate = value


def optimizer(module, c):
    """AdamW over a module's trainable parameters; 1-d ones, class token and position embedding do not decay.

    `c` is a stage's block of the config; decay_all decays them too.
    """
    groups = {True: [], False: []}
    for name, p in module.named_parameters():
        if p.requires_grad:
            plain = p.ndim <= 1 or name.endswith(("bias", "cls_token", "pos_embed"))
            groups[c["decay_all"] or not plain].append(p)
    groups = [{"params": params, "weight_decay": c["weight_decay"] * decay} for decay, params in groups.items() if params]
    return torch.optim.AdamW(groups, lr=c["lr"], betas=tuple(c["betas"]), eps=1e-8, fused=True)


def learning_rate(step, steps_per_epoch, c, total_batch):
    """Linear warm-up from 1e-6, then a cosine to the minimum: a pure function of the optimiser step."""
    scale = total_batch / 512
    peak, low = c["lr"] * scale, c["min_lr"] * (scale if c["scale_min_lr"] else 1)
    warm, end = c["warmup"] * steps_per_epoch, c["epochs"] * steps_per_epoch
    if step < warm:
        return 1e-6 + (peak - 1e-6) * step / warm
    # lr = low + ½ (peak − low)(1 + cos π·t), t from 0 to 1 after the warm-up
    return min(peak, low) + 0.5 * max(0.0, peak - low) * (1 + math.cos(math.pi * (step - warm) / max(1, end - warm)))


def autocast(config, device):
    """Mixed precision: bfloat16 on CUDA by default, off elsewhere (config key precision)."""
    use = config["precision"] == "bfloat16" or (config["precision"] == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=use)


def update(parts, lr, clip):
    """One optimiser step of each part (module, optimiser, sums) at rate `lr`, its gradient's norm clipped (0: not)."""
    for module, optimizer, _ in parts.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
        if clip:
            nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], clip)
        optimizer.step()
        optimizer.zero_grad()


def announce(process, stage, parts, images, c, steps, total_batch, step):
    """Prints what a stage is about to do."""
    sizes = [count(module) for module, *_ in parts.values()]
    what = f"{sizes[0]:,}" if stage in parts else f"modules {[*parts]} of {sizes}"
    resumed = f", resumed at step {step}" if step else ""
    say(process, f"{stage}: {what} parameters, {images:,} images, {c['epochs']} epochs of {steps} steps of {total_batch} "
        f"images, learning rate {c['lr'] * total_batch / 512:g}{resumed}")


def epoch_lines(parts, validated, stage, **common):
    """The log's lines of an epoch, one a part: loss and training accuracy over all its images, and what `common` holds.
    The sums (rows of loss·images, correct, images, one a process) start again from zero."""
    lines = []
    for i, (module, _, sums) in parts.items():
        loss, correct, images = sums.sum(0).tolist()
        lines.append({"stage": stage, **({"module": i} if i != stage else {}), **common, "loss": loss / images,
                      "top1": 100 * correct / images, "val_top1": validated[i],
                      **expert_load(module)})
        sums.zero_()
    return lines


def seed_noise(config, *place):
    """Makes all noise from here on (stochastic depth, jitter, kernel and Gumbel samples) a function of seed and place.

    So a resumed run needs no random state, and a module gets the same noise alone as among all others.
    """
    torch.manual_seed(zlib.crc32(repr((config["seed"], *place)).encode()))


def check_finite(value, what, config):
    if not math.isfinite(value):
        raise UserError(f"{what} is not finite; the last good checkpoint is in {config['output_dir']}. A lower learning "
                        "rate, warm-up or gradient clipping may help.")


STOP = []  # filled by SIGTERM


def leave(process, stop):
    """Leaves after SIGTERM: all is saved."""
    if stop:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))  # torchrun's: processes on this machine
        launch = f"torchrun --nproc_per_node={local}" if local else "python"
        if local and process.world > local:
            launch += f" --nnodes={process.world // local} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
        # What was to be repeated has begun: force would begin it once more.
        say(process, f"SIGTERM: saved; to go on: {launch} {shlex.join(w for w in sys.argv if w != 'force=true')}")
        sys.exit(143)


def say(process, text):
    """Prints a line, on the first process only."""
    if text and process.rank == 0:
        print(text, flush=True)


def count(module):
    """Trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def command_line(doc, roles, more=()):
    """Parses `--config FILE [--dry-run] [key=value …]`. Returns the config, and the words of the command line alone:
    words.role, .force, .dry_run, and what a script names in `more` (module, checkpoint)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--dry-run", action="store_true", help="build everything without weights, print the stages")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a config key by its dotted path, or "
                        f"role={'|'.join(roles)}, module=i, force=true")
    words = parser.parse_intermixed_args()
    rest = []
    words.role, words.module, words.force, words.checkpoint = roles[0], None, "false", None
    choices = {"role": roles, "force": ("true", "false")}
    for item in words.overrides:
        key, _, value = item.partition("=")
        if key in choices and value not in choices[key]:
            raise UserError(f"{key}={value} is not allowed: it must be one of {', '.join(choices[key])}.")
        if key in choices or key in more:
            setattr(words, key, value)
        else:
            rest.append(item)
    words.force = words.force == "true"
    config = load_config(words.config, rest)
    if words.module is not None:
        L = modules_of(config)
        if not words.module.isdecimal() or int(words.module) >= L:
            raise UserError(f"module={words.module} is not allowed: it must be a whole number from 0 to {L - 1}.")
        words.module = int(words.module)
    return config, words


def run(main):
    """Runs a stage's main(). Bad input, a full disk or too little memory end in one sentence and exit code 2."""
    try:
        main()
    except (UserError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "alloc" not in str(e):  # torch's words when memory does not suffice
            raise
        # on every process: the one bad image may be in this one's share
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------------------------------
# What a run will take, without running it


def plan(config, stage):
    """A stage's block of `train`, with the stage's epochs, and the number of images that it trains on (0: not known)."""
    c = dict(config["train"]["student" if stage.startswith("baseline") else stage])
    if stage.startswith("baseline") and config["train"]["baseline_epochs"] is not None:
        c["epochs"] = config["train"]["baseline_epochs"]
    d = on_target(config, stage)["data"]
    # drawn sets draw their validation images besides, others hold them out
    held_out = 0 if d["set"] in DRAWN else d["validation_images"]
    images = d["train_images"] or max(0, TRAIN_IMAGES.get(d["set"], 0) - held_out)
    if c["images"]:
        first, stop = c["images"]
        images = min(images or stop, stop) - first
    return c, images * c["passes"]


def dry_run(config):
    """Builds every model of the config without weights, and prints the table of stages: what trains, how long, how fast,
    and what it takes."""
    if os.environ.get("RANK", "0") != "0":
        return
    world = int(os.environ.get("WORLD_SIZE", 1))
    print(f"{'stage':8}{'parameters':>12}{'images':>11}{'epochs':>7}{'steps':>9}{'batch':>7}{'seen':>9}  "
          f"{'learning rate':18}{'state':>6}{'activations':>12}{'TMAC':>11}")
    for stage in ("meta", "incubate", "teacher", "distill", "student", "baseline"):
        c, images = plan(config, stage)
        batch = c["batch"] * world * c["accumulate"]
        steps = images // batch * c["epochs"]
        low = c["min_lr"] * (batch / 512 if c["scale_min_lr"] else 1)
        parameters, state, activations, work = cost(config, stage)
        known = (f"{images:,}", steps, f"{steps * batch / 1e6:.2f} M", f"{work / 1e12:,.3g}") if images else "????"
        print(f"{stage:8}{parameters:12,}{known[0]:>11}{c['epochs']:7}{known[1]:>9}{batch:7}{known[2]:>9}  "
              f"{c['lr'] * batch / 512:7.2g} → {low:<8.2g}{state / 2**30:6.2f}{activations / 2**30:12.2f}{known[3]:>11}")
    print("images: of an epoch, data.root is not read; batch: of all processes and one step; seen: images in all, with\n"
          "augmented copies; GiB of a process in float32: state: weights, gradients, AdamW's moments; activations: what\n"
          "the backward pass needs (bfloat16 with fused attention: half); TMAC: 10^12 multiply-adds, forward and backward")


def multiply_adds(config, stage):
    """Multiply-adds of a whole stage: forward and backward of all images that it sees; 0 if their number is not known.

    stage: meta, incubate, teacher, distill, student, baseline or baseline_kd. See cost().
    """
    return cost(config, stage)[3]


def cost(config, stage):
    """What a stage takes in one process: trainable parameters; bytes of weights, gradients and AdamW's moments; bytes that
    autograd keeps of a batch; multiply-adds of all steps (0: the number of images is not known).

    Multiply-adds are those of matrix products and convolutions, as the loops run them; what is small beside them is left
    out (routers, the graph regulariser), and so is validation.
    """
    d, role = config["distill"], {"incubate": "teacher", "distill": "student"}.get(stage, stage)
    alone = stage == role  # a whole model, not modules in the meta model
    taught = {"distill": d["alpha"], "baseline_kd": d["alpha"], "student": d["finetune_alpha"]}.get(stage, 0) > 0
    c = on_target(config, role) if alone else config

    def dense(model):
        """Without weights a mixture cannot route tokens: a dense MLP that does the same work takes its place."""
        for block in getattr(model, "blocks", ()):
            if hasattr(block, "moe"):
                _, hidden, width = block.moe.fc1_weight.shape
                block.moe = Mlp(width, hidden * block.moe.top_k)
        return model

    def one_step(images):
        """-> multiply-adds of a step on so many images, and the bytes that each module's hybrid keeps for its backward."""
        kept, formulas = [], {torch.ops.aten.convolution_backward: convolution_backward}
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            # What runs forward only: M, once for all modules, and the teacher.
            with torch.no_grad():
                x = torch.zeros(images, 3, c["data"]["image_size"], c["data"]["image_size"])
                hidden = [x] if alone else meta.hidden_states(x)
                for i, h in enumerate(hidden if taught else []):
                    teacher(h) if alone else meta.rest(i + 1, teacher.parts[i](h))
            # Through the rest of M gradients of states pass, but none of its weights is computed.
            for i, (module, h) in enumerate(zip(stand_ins, hidden)):
                storages = {}

                def keep(tensor):
                    storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
                    return tensor

                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    out = module(h) if alone else meta.rest(i + 1, module(h))
                out.sum().backward()
                kept.append(sum(size for storage, size in storages.items() if storage not in weights))
        return counter.get_total_flops() / 2, kept

    with torch.device("meta"):
        whole = build(c, role)
        parameters = sum(map(count, [whole] if alone else cut(whole, c, role)))
        stand_ins = [dense(whole)] if alone else cut(dense(whole), c, role)
        meta, teacher = (dense(build(c, r)).requires_grad_(False) for r in ("meta", "teacher"))
        weights = {p.untyped_storage()._cdata for m in (*stand_ins, meta, teacher) for p in m.parameters()}
        # Of one image and of two: what is computed from codes and signatures alone does not grow with the batch.
        (work, kept), (work_two, kept_two) = one_step(1), one_step(2)
        frozen = sum(count(build(c, r)) for r, used in (("meta", not alone), ("teacher", taught)) if used)

    block, images = plan(config, stage)
    batch, accumulate = block["batch"], block["accumulate"]
    batches = images // (batch * accumulate) * accumulate * block["epochs"]
    activations = max(one + (batch - 1) * (two - one) for one, two in zip(kept, kept_two))
    return parameters, 16 * parameters + 4 * frozen, activations, batches * (work + (batch - 1) * (work_two - work))


def convolution_backward(out, x, weight, *rest, out_shape):
    """Flops of a convolution's gradients, from shapes: as many as forward for its input and for its weight, if asked for.
    (torch's own formula overlooks groups, so that a depthwise convolution seems to cost its width times as much.)"""
    return 2 * math.prod(out) * math.prod(weight[1:]) * sum(rest[-1][:2])
