"""models.py – the models of m2mKD, how they are cut into modules and joined; then what all stages share.

For the method, read in this order:
    ViT and V-MoE                   meta model, teacher, one student; the method needs hidden_states and rest
    Neural Attentive Circuit        the other student, in the order in which an image passes
    Graph priors and regularizers   optional, for the NAC
    Modules inside the meta model   cut(): a whole student -> S_0 … S_{L-1}, each with its stitches
    Losses · Models from a config
Skip the plumbing at first: Config, Weights, Run folder, Stage.

Axis letters in shape comments:  B batch · N tokens · D width · E experts · T = B·N · H hidden · K classes
    for the NAC also  U latents (receivers) · V senders or image tokens · X width of a token · C code
                      S signature · h heads · d head width
Papers: m2mKD 2402.16918, Deep Incubation 2212.04129, NAC 2210.08031, V-MoE 2106.05974, DeiT 2012.12877.
"""

import argparse
import contextlib
import copy
import difflib
import fcntl
import fnmatch
import functools
import inspect
import json
import math
import os
import re
import reprlib
import signal
import sys
import threading
import time
import traceback
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import Count, Fraction, UserError

# ---------- ViT and V-MoE


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's residual branch is left out with probability `rate`."""

    def __init__(self):
        super().__init__()
        self.rate = 0.0

    def forward(self, x):  # B … -> B …
        if not self.training or self.rate == 0:
            return x
        # One draw per sample, for all of its tokens. 1 / (1 − rate) keeps the expected branch.
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * (keep / (1 - self.rate)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention. B N D -> B N D."""

    def __init__(self, width, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        # One matrix holds q, k and v of all heads, in timm's order.
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # B h N d
        # softmax(q kᵀ / √d) v
        x = F.scaled_dot_product_attention(q, k, v)  # B h N d
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers with GELU between. B N D -> B N D."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def without_autocast(x):
    """For what needs float32, or is too small to be worth casts. (torch's device "meta" has no autocast.)"""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class MoE(nn.Module):
    """Mixture of E experts in place of an MLP: out = Σ_k g_k · expert_{e_k}(x), g = softmax(top-k logits).

    `capacity` > 0 is V-MoE's capacity factor: in training an expert takes capacity · k · T / E tokens of a
    batch, first choices first; the others keep their residual. With `balance` > 0 training adds V-MoE's
    router noise and leaves its auxiliary loss in `self.aux`. `self.load`: each expert's share of the last
    training batch.
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
        tokens = x.reshape(-1, x.shape[-1])  # T D
        gates, chosen = self.route(tokens)  # T k, T k
        # Sorted by expert, each expert's share of the T·k (token, expert) pairs is one contiguous slice.
        chosen, order = chosen.flatten().sort(stable=True)
        E = len(self.fc1_weight)
        one_hot = chosen[:, None] == torch.arange(E, device=x.device)  # T·k E
        load = one_hot.sum(0)
        if self.training:
            self.load = load / len(chosen)
        out = self.run_experts(tokens, order // self.top_k, one_hot, load)  # T·k D
        if self.training and self.capacity:
            # A pair's turn in the order (expert, choice, token), less that of its expert's first pair
            choice, token = order % self.top_k, order // self.top_k
            turn = ((chosen * self.top_k + choice) * len(tokens) + token).argsort().argsort()
            place = turn - (load.cumsum(0) - load)[chosen]
            out = out * (place < math.ceil(self.capacity * len(order) / E))[:, None]
        # out_t = Σ_k g_k · expert_{e_k}(x_t), back in the tokens' order (index_copy_'s gradient is a gather)
        out = torch.empty_like(out).index_copy_(0, order, out).view(-1, self.top_k, x.shape[-1])  # T k D
        return (out * gates.to(out.dtype)[..., None]).sum(1).view(x.shape)

    def route(self, x):
        """The gates, which sum to 1, and the k experts of each token. T D -> T k, T k"""
        # At least float32, because bfloat16's 8 bits would often make the k largest logits ties.
        with without_autocast(x):
            logits = clean = self.router(x.to(torch.promote_types(x.dtype, torch.float32)))  # T E
        if self.training and self.balance:
            # V-MoE's noise ε ~ N(0, 1/E²): an expert that is nearly as good is tried too, and learns.
            logits = clean + torch.randn_like(clean) / clean.shape[1]
        top, chosen = logits.topk(self.top_k)
        if self.training and self.balance:
            self.aux = self.auxiliary_loss(clean, top[:, -1:])
        return top.softmax(-1), chosen

    def run_experts(self, x, token, one_hot, load):
        """Each (token, expert) pair's output, the pairs sorted by expert -> T·k D.

        x T D, token T·k (of each pair), one_hot T·k E (its expert), load E (the pairs of each expert)
        """
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weights = self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias
        w1, b1, w2, b2 = (p.to(dtype) for p in weights)
        tokens = x.to(dtype).index_select(0, token)
        if dtype == torch.bfloat16 and x.shape[-1] % 8 == w1.shape[1] % 8 == 0:  # rows of 16 bytes
            # One kernel for all experts; the CPU need not know their shares.
            ends, one_hot = load.cumsum(0, dtype=torch.int32), one_hot.to(dtype)
            hidden = F.gelu(F.grouped_mm(tokens, w1.transpose(1, 2), offs=ends).addmm_(one_hot, b1))
            return F.grouped_mm(hidden, w2.transpose(1, 2), offs=ends).addmm_(one_hot, b2)
        parts = zip(tokens.split(load.tolist()), w1, b1, w2, b2)
        return torch.cat([F.linear(F.gelu(F.linear(t, u, a)), v, b) for t, u, a, v, b in parts])

    def auxiliary_loss(self, logits, threshold):
        """½ (importance + load), each CV² = var / mean² over experts (V-MoE, appendix A). T E, T 1 -> ()"""
        E = logits.shape[1]
        # importance_e = Σ_x softmax(logits)_e
        importance = logits.softmax(-1).sum(0)  # E
        # A count of tokens has no gradient, its expectation under the noise has one:
        # load_e = Σ_x P(e is still chosen if its noise is drawn again) = Σ_x Φ((logit_e − threshold)·E)
        load = torch.special.ndtr((logits - threshold) * E).sum(0)  # E
        # The variance, because the gradient of a standard deviation is NaN at perfect balance.
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
    """Module i of a ViT, sharing its parameters: states B 1+N D -> states.

    The first module starts from pixels (B 3 H W), the last ends in logits (B K).
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
        if self.first:
            x = self.patch_embed(x).flatten(2).transpose(1, 2)  # B N D
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed  # B 1+N D
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0]) if self.last else x


class ViT(nn.Module):
    """Vision transformer with timm's parameter names, cut into L modules of `depths` blocks. B 3 H W -> B K.

    `moe` (a dict of MoE's arguments) turns the MLPs of `moe_blocks` (None: all) into mixtures: the V-MoE.
    `parts` are the L modules; they share the whole model's parameters.
    """

    def __init__(self, image_size, patch, width, heads, depths, classes, mlp_ratio=4.0, qkv_bias=True,
                 eps=1e-6, init_std=0.02, expert_std=None, moe=None, moe_blocks=None):
        super().__init__()
        # A convolution with stride = kernel is one linear map for all patches. Its name is timm's.
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, stride=patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))
        mixtures = range(sum(depths)) if moe_blocks is None else moe_blocks
        self.blocks = nn.ModuleList(
            Block(width, heads, int(width * mlp_ratio), qkv_bias, eps, moe if k in mixtures else None)
            for k in range(sum(depths)))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, classes)
        # Filled by build() where stitches are kept: what stands between module i and module i+1.
        self.stitches = nn.ModuleList()
        self.apply(functools.partial(init_linear, std=init_std, expert_std=expert_std or init_std))
        # As in DeiT, at any width
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        ends = np.cumsum(depths).tolist()
        # A tuple: in a ModuleList each weight would be twice in the state dict.
        self.parts = tuple(ViTModule(self, self.blocks[end - depth:end], i == 0, i == len(depths) - 1)
                           for i, (depth, end) in enumerate(zip(depths, ends)))

    def hidden_states(self, images):
        """[h_0 … h_{L-1}]: h_0 the images, h_i = M_{i-1} ∘ … ∘ M_0 (images), which is what parts[i] takes in.

        One run over a batch serves the modules of all L places.
        """
        states = [images]
        # The logits of the last part are no module's input.
        for part in self.parts[:-1]:
            states.append(part(states[-1]))  # B 1+N D
        return states

    def rest(self, i, x):
        """Modules i … L-1 on the states x: M_{L-1} ∘ … ∘ M_i (x). B N D -> B K."""
        for j in range(i, len(self.parts)):
            x = self.parts[j](x)
            # Only a student that was assembled with its stitches kept has any.
            if len(self.stitches) > j:
                x = self.stitches[j](x)
        return x

    def forward(self, images):
        return self.rest(0, images)


def init_linear(module, std, expert_std):
    """ViT's initialization: weights of linear layers and experts trunc-normal, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, MoE):
        nn.init.trunc_normal_(module.fc1_weight, std=expert_std)
        nn.init.trunc_normal_(module.fc2_weight, std=expert_std)


# ---------- Neural Attentive Circuit
#
# A circuit is a set of latents. Each has a state (B D), which depends on the image, and two learned vectors,
# which do not: its code modulates the shared weights (ModFC), and its signature says whom it talks to, those
# with near signatures (log_kernel). Input latents read the image's tokens. Then, for some rounds, mediators
# listen to input latents and to one another. At last output latents listen to both and vote for a class.


class Jitter(nn.Module):
    """Shakes codes in training, one draw for the whole batch. U C -> U C."""

    def __init__(self):
        super().__init__()
        self.amount = 0.05

    def forward(self, codes):
        if not self.training or self.amount == 0:
            return codes
        # c + U(−.05|c|, +.05|c|), by rand_like, because torch.compile does not fuse uniform_
        return codes + 2 * self.amount * codes * (torch.rand_like(codes) - 0.5)


class ModFC(nn.Module):
    """Linear layer modulated by a code: y = W·(x ⊙ σ(c)) + b. x … n in, c n C (or B n C) -> … n out."""

    def __init__(self, width_in, width_out, code_width, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None
        # At first all latents compute nearly the same.
        self.gain = nn.Parameter(torch.tensor(0.1))
        self.scale = nn.Linear(code_width, width_in, bias=False)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def sigma(self, codes):
        # σ(c) = 1 + g · LN(A c), LN without affine
        with without_autocast(codes):
            scale = self.scale(codes)
            return 1 + self.gain * F.layer_norm(scale, scale.shape[-1:])

    def forward(self, x, codes):
        return F.linear(x * self.sigma(codes), self.weight, self.bias)


class ModFFN(nn.Module):
    """x + γ · ModFC₂(GEGLU(ModFC₁(LN x))), GEGLU(a, b) = a · GELU(b). B U D -> B U D."""

    def __init__(self, width, code_width, ratio):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = ModFC(width, 2 * int(ratio * width), code_width)
        self.fc2 = ModFC(int(ratio * width), width, code_width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))
        self.drop_path = DropPath()

    def forward(self, x, codes):
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
        # Each block starts near the identity.
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x):
        # On CUDA cuDNN's layout of depthwise convolutions; else the weight's own, so its gradient has strides
        # that DistributedDataParallel can use.
        x = x.contiguous(memory_format=torch.channels_last if x.is_cuda else torch.contiguous_format)
        # With channels last a 1×1 convolution is a linear layer.
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # B H W D
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of B D H W."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Tokenizer(nn.Module):
    """ConvNeXt stem and stages, then a position grid of P channels. B 3 H W -> B V X, X = features + P."""

    def __init__(self, width, stages, blocks, grid_width, grid_size):
        super().__init__()
        # With 2 stages 8×8 pixels make a token, with 3 stages 16×16.
        widths = [width // 4, width // 2, width][:stages]
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=1e-6))
        halves = [nn.Sequential(ChannelNorm(a, eps=1e-6), nn.Conv2d(a, b, 2, stride=2))
                  for a, b in zip(widths, widths[1:])]
        self.downsample_layers = nn.ModuleList([stem, *halves])
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
        # The position grid has channels of its own. Images of another size pool it.
        grid = self.grid
        if grid.shape[1:] != x.shape[2:]:
            grid = F.adaptive_avg_pool2d(grid, x.shape[2:])
        x = torch.cat([x, grid.expand(x.shape[0], -1, -1, -1).to(x.dtype)], dim=1)  # B features+P H W
        return x.flatten(2).transpose(1, 2)  # B V X


class Latents(nn.Module):
    """What a group of latents is: a code each (what it computes) and a signature each (whom it talks to)."""

    def __init__(self, count, code_width, signature_width):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(count, code_width))
        self.signatures = nn.Parameter(torch.randn(count, signature_width))


class Seeder(nn.Module):
    """Initial states μ(LN c) + ε ⊙ exp(½ λ(LN c)), ε ~ N(0,1), in evaluation 0. U C -> B U D."""

    def __init__(self, width, code_width):
        super().__init__()
        self.jitter, self.norm = Jitter(), nn.LayerNorm(code_width)
        self.mu = nn.Linear(code_width, width)
        self.logvar = nn.Linear(code_width, width)
        # Noise of std about exp(−2.5) = .08 at first.
        nn.init.constant_(self.logvar.bias, -5.0)

    def forward(self, codes, batch):
        with without_autocast(codes):
            codes = self.norm(self.jitter(codes))
            states = self.mu(codes).expand(batch, -1, -1)  # B U D
            if not self.training:
                return states
            return states + torch.randn_like(states) * torch.exp(0.5 * self.logvar(codes))


class ReadIn(nn.Module):
    """Input latents attend to the image's tokens; keys and values are modulated by the receiver's code.

    states B U D, tokens B V X, codes U C -> B U D.
    """

    def __init__(self, width, token_width, code_width, heads, head_width, ffn_ratio):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        # Names the weights read_in.attention.*, like the propagators'.
        self.attention = nn.Module()
        self.attention.receiver_norm = nn.LayerNorm(width)
        self.attention.sender_norm = nn.LayerNorm(token_width)
        self.attention.query = ModFC(width, inner, code_width, bias=False)
        self.attention.key = ModFC(token_width, inner, code_width, bias=False)
        self.attention.value = ModFC(token_width, inner, code_width, bias=False)
        self.attention.exit = ModFC(inner, width, code_width)
        self.attention.gamma = nn.Parameter(torch.ones(width))
        self.ffn = ModFFN(width, code_width, ffn_ratio)
        self.jitter = Jitter()

    def forward(self, states, tokens, codes):
        att, h = self.attention, self.heads
        B, U, _ = states.shape
        codes = self.jitter(codes)
        q = att.query(att.receiver_norm(states), codes).view(B, U, h, -1)  # B U h d
        x = att.sender_norm(tokens)  # B V X
        # Written out, k_uv = W_k(x_v ⊙ σ_u) is a B×V×U×X tensor and so is v_uv. But (exactly)
        #   q_u · W_k(x_v ⊙ σ_u) = ((W_kᵀ q_u) ⊙ σ_u) · x_v
        #   Σ_v a_uv W_v(x_v ⊙ σ_u) = W_v((Σ_v a_uv x_v) ⊙ σ_u)
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
    """Receivers attend to senders under the kernel: NAC's stochastic kernel modulated dot-product attention.

    The receiver's code modulates q and exit, the sender's k and v. `share_norm`: one LayerNorm for both.
    receivers B U D, senders B V D, log_k = log K (B) U V or None -> B U D (no residual).
    """

    def __init__(self, width, code_width, heads, head_width, share_norm):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        # β of the kernel
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
        def split(x):  # B n h·d -> B h n d
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q = split(self.query(self.receiver_norm(receivers), receiver_codes))
        x = getattr(self, "sender_norm", self.receiver_norm)(senders)
        k, v = split(self.key(x, sender_codes)), split(self.value(x, sender_codes))
        # Σ_v softmax_v(q_u · k_v / √d + log K(u, v)) v_v: K weighs before normalization
        if log_k is not None:
            log_k = log_k.to(q.dtype).view(-1, 1, *log_k.shape[-2:])  # 1 or B, 1 (for all heads) U V
        if log_k is None:
            x = F.scaled_dot_product_attention(q, k, v)
        elif q.is_cuda:
            # Of CUDA's fused kernels this one gives the mask a gradient; MATH is the fallback.
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                x = F.scaled_dot_product_attention(q, k, v, attn_mask=log_k)
        else:
            # On a CPU none does, and torch's fallback keeps the scores twice.
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # B h U V
            x = scores.add_(log_k).softmax(-1) @ v
        return self.gamma * self.exit(x.transpose(1, 2).flatten(2), receiver_codes)


def distance(a, b):
    """δ(u, v) = 1 − cos(s_u, s_v), from 0 (same direction) to 2. U S, V S -> U V."""
    # At least float32: in bfloat16 the kernel of near latents would round to 1, its logit to infinity.
    dtype = a.dtype
    with without_autocast(a):
        if a.is_cuda:  # float32 products may be TF32's there
            a, b = a.double(), b.double()
        return (1 - F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T).to(dtype)


# Latents with a larger δ do not talk to each other. Of random pairs (δ near 1; S = 64) a fifth do.
TRUNCATION = 0.9


def log_kernel(delta, bandwidth, truncate=True, sample=0):
    """log K, K = exp(−δ/β), 0 where δ > .9 (NAC paper). δ U V -> U V, or with sample = B noisy ones B U V.

    In training K is taken as the probability of a link, and each sample of the batch draws links of its own.
    """
    # A truncated pair sends no gradient to the signatures. The division of K by its sum over senders is left
    # out, because the softmax of the attention ignores a constant per row.
    cut = delta > TRUNCATION if truncate else None
    if not sample:
        logs = -delta / bandwidth
        # −1e30 (in training about −32, with noise) weighs 0 in the softmax. With −∞ a receiver with no pair
        # left would get NaN; this way it hears all senders alike.
        return logs.masked_fill(cut, -1e30) if truncate else logs
    kernel = torch.exp(-delta / bandwidth)
    if truncate:
        kernel = kernel.masked_fill(cut, 0.0)
    # A Bernoulli draw has no gradient; a relaxed one (temperature ½) has: log sigmoid((logit K + ℓ) / ½), ℓ
    # logistic. K is clamped to [ε, 1 − ε], because δ_uu can round below 0; a truncated pair gets logit(ε)/½.
    eps = torch.finfo(torch.float32).eps
    noise = torch.rand(sample, *delta.shape, device=delta.device).logit_(eps)  # B U V
    return F.logsigmoid((kernel.logit(eps) + noise) * 2)


class Propagator(nn.Module):
    """One round of talk: the mediators attend to senders. B U D -> B U D."""

    def __init__(self, width, code_width, heads, head_width, ffn_ratio):
        super().__init__()
        self.attention = LatentAttention(width, code_width, heads, head_width, share_norm=True)
        self.ffn = ModFFN(width, code_width, ffn_ratio)
        self.drop_path, self.jitter = DropPath(), Jitter()

    def forward(self, receivers, senders, codes, sender_codes, delta=None):
        """delta U V: the signatures' distances; None (tokens, which have no signature): no kernel."""
        # Two draws: a mediator's code is shaken differently as a receiver's and as a sender's.
        codes, sender_codes = self.jitter(codes), self.jitter(sender_codes)
        sample = len(receivers) if self.training else 0
        log_k = None if delta is None else log_kernel(delta, self.attention.bandwidth, sample=sample)
        x = receivers + self.drop_path(self.attention(receivers, senders, codes, sender_codes, log_k))
        return self.ffn(x, codes)


class ReadOut(nn.Module):
    """Output latents attend to all others. B U D -> B U D.

    Unlike a propagator it has no residual around the attention, truncation, sampling or stochastic depth.
    """

    def __init__(self, width, code_width, heads, head_width, ffn_ratio):
        super().__init__()
        self.attention = LatentAttention(width, code_width, heads, head_width, share_norm=False)
        self.ffn = ModFFN(width, code_width, ffn_ratio)
        self.jitter = Jitter()

    def forward(self, receivers, senders, codes, sender_codes, delta=None):
        codes, sender_codes = self.jitter(codes), self.jitter(sender_codes)
        # Untruncated, every latent is heard a little, so that all get a gradient from the loss.
        log_k = None if delta is None else log_kernel(delta, self.attention.bandwidth, truncate=False)
        return self.ffn(self.attention(receivers, senders, codes, sender_codes, log_k), codes)


class Pool(nn.Module):
    """Output latents vote by confidence: softmax, in training Gumbel-softmax (τ = 1). B U D -> B K."""

    def __init__(self, width, classes):
        super().__init__()
        self.confidence_scorer = nn.Linear(width, 1)
        self.to_logits = nn.Linear(width, classes)

    def forward(self, x):
        confidence = self.confidence_scorer(x)  # B U 1
        # Gumbel noise is −log of an exponential variable.
        if self.training:
            confidence = confidence - torch.empty_like(confidence).exponential_().log()
        return self.to_logits((confidence.softmax(dim=1) * x).sum(1))


class NAC(nn.Module):
    """Neural Attentive Circuit (2210.08031): latents with codes and signatures pass messages. B 3 H W -> B K.

    latents = (U_in, U, U_out). Modules: tokenizer and read-in, each propagator, read-out and pool.
    """

    def __init__(self, image_size, width, heads, head_width, latents, propagators, classes, code_width=None,
                 signature_width=64, ffn_ratio=2.0, tokenizer_stages=2, tokenizer_blocks=3, grid_width=64,
                 grid_size=None):
        super().__init__()
        code_width = code_width or width
        circuit = dict(width=width, code_width=code_width, heads=heads, head_width=head_width,
                       ffn_ratio=ffn_ratio)
        # Without grid_size the grid has as many places as there are tokens.
        grid_size = grid_size or max(1, image_size // 2 ** (tokenizer_stages + 1))
        self.tokenizer = Tokenizer(width, tokenizer_stages, tokenizer_blocks, grid_width, grid_size)
        self.input_latents, self.mediator_latents, self.output_latents = (
            Latents(count, code_width, signature_width) for count in latents)
        self.seeder = Seeder(width, code_width)
        self.read_in = ReadIn(token_width=self.tokenizer.width, **circuit)
        self.propagators = nn.ModuleList(Propagator(**circuit) for _ in range(propagators))
        self.read_out = ReadOut(**circuit)
        self.pool = Pool(width, classes)
        self.stitches = nn.ModuleList()  # filled by build(), as the ViT's

    def forward(self, images):
        inputs, mediators, outputs = self.input_latents, self.mediator_latents, self.output_latents
        sender_codes = torch.cat([inputs.codes, mediators.codes])  # V C, V = U_in + U
        signatures = torch.cat([inputs.signatures, mediators.signatures])  # V S
        # Stitch j stands after module j. Where there is none, next() gives the identity.
        B, stitch = images.shape[0], iter(self.stitches)

        # The image is read once. The input latents' states do not change afterwards.
        x_in = self.read_in(self.seeder(inputs.codes, B), self.tokenizer(images), inputs.codes)  # B U_in D
        x_in = next(stitch, nn.Identity())(x_in)
        x = self.seeder(mediators.codes, B)  # B U D
        # The graph is the same in all rounds, and for all images.
        delta = distance(mediators.signatures, signatures)  # U V
        for propagator in self.propagators:
            x = propagator(x, torch.cat([x_in, x], 1), mediators.codes, sender_codes, delta)
            x = next(stitch, nn.Identity())(x)
        delta = distance(outputs.signatures, signatures)  # U_out V
        x_out = self.seeder(outputs.codes, B)
        x_out = self.read_out(x_out, torch.cat([x_in, x], 1), outputs.codes, sender_codes, delta)
        return self.pool(x_out)  # B K


# ---------- Graph priors and regularizers of the NAC


def random_graph(kind, n, rng, m=2, groups=8, p_in=0.9, p_out=0.2, p=0.1):
    """Adjacency matrix n n (bool, symmetric, empty diagonal) of a random graph; `rng` a numpy Generator.

    scale_free: Barabási–Albert, each new node links to m old ones · planted_partition: links with p_in in a
    group, p_out across · ring_of_cliques: groups are cliques, one edge between neighbors · erdos_renyi: p.
    """
    linked = np.zeros((n, n), bool)
    # Contiguous groups, of equal size where groups divides n.
    group = np.arange(n) * groups // n
    if kind == "scale_free":
        # Drawing from the ends of all edges draws nodes in proportion to their degree.
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
        # The upper triangle has one draw per pair.
        linked = np.triu(rng.random((n, n)) < np.where(group[:, None] == group, p_in, p_out), 1)
    elif kind == "ring_of_cliques":
        linked = group[:, None] == group
        first = np.searchsorted(group, np.arange(groups))
        # One edge to the next clique: from the first node of a clique to the second of the next.
        linked[first, np.roll(first, -1) + 1] = True
    elif kind == "erdos_renyi":
        linked = np.triu(rng.random((n, n)) < p, 1)
    return (linked | linked.T) & ~np.eye(n, dtype=bool)


def fit_signatures(signatures, linked, steps=1000, margin=0.03):
    """Moves signatures (n S, in place) until linked pairs are within the truncation, unlinked ones beyond.

    -> the shares of linked and of unlinked pairs that end there
    """
    # Orthogonal: if n <= S, all pairs start unlinked, at δ = 1.
    s = nn.init.orthogonal_(torch.empty(signatures.shape)).requires_grad_()
    linked = torch.as_tensor(linked)
    unlinked = ~linked & ~torch.eye(len(s), dtype=torch.bool)
    optimizer = torch.optim.Adam([s], lr=1e-3)
    for _ in range(steps):
        delta = distance(s, s)  # n n
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
    # The mean of no pairs is NaN.
    return tuple(share.nan_to_num(1).item() for share in shares)


def hinge_repulsion(nac, threshold=0.4):
    """Pushes apart all pairs of the NAC's signatures that are closer than the threshold."""
    groups = nac.input_latents, nac.mediator_latents, nac.output_latents
    s = torch.cat([latents.signatures for latents in groups])
    # −Σ δ over pairs u < v with δ < threshold
    delta = distance(s, s)
    return -(delta * (delta < threshold).triu(1)).sum()


def match_rows(cost, capacity):
    """Assigns each of n rows to one of G groups, `capacity` rows a group, at the least total cost. n G -> n.

    Exact, like a Hungarian matching. Rows of the block model's target within a group are equal, so this is a
    transport problem with G sinks: start from each row's cheapest group, then move rows from overfull groups
    to groups with room along shortest paths (successive shortest paths).
    """
    cost = cost.double().numpy()
    n, G = cost.shape
    group = cost.argmin(1)
    room = capacity - np.bincount(group, minlength=G)
    while (room < 0).any():
        # price[a, b]: what it costs to move the best suited row, mover[a, b], from group a to group b
        extra = cost - cost[np.arange(n), group, None]  # n G
        extra = np.where((group[:, None] == np.arange(G))[..., None], extra[:, None], np.inf)  # n G G
        price, mover = extra.min(0), extra.argmin(0)
        # Bellman–Ford from all overfull groups, because a step can have a negative price.
        reach, before = np.where(room < 0, 0.0, np.inf), np.full(G, -1)
        for _ in range(G):
            via = reach[:, None] + price
            best, low = via.argmin(0), via.min(0)
            better = low < reach - 1e-12
            reach, before = np.where(better, low, reach), np.where(better, best, before)
        # One row per group moves along the cheapest path, from its end back to its start.
        b = np.where(room > 0, reach, np.inf).argmin()
        room[b] -= 1
        while before[b] >= 0:
            a = before[b]
            group[mover[a, b]] = b
            b = a
        room[b] += 1
    return torch.from_numpy(group)


def block_model(nac, groups=8, p_in=0.9, p_out=0.2):
    """Stochastic block model regularizer: MSE between each propagator's link probabilities K and blocks P.

    K is the U mediators' kernel, truncated and not sampled.
    """
    s = nac.mediator_latents.signatures
    group = torch.arange(len(s), device=s.device) * groups // len(s)
    target = torch.where(torch.arange(groups, device=s.device)[:, None] == group, p_in, p_out).to(s)  # G U
    capacity = np.bincount(np.arange(len(s)) * groups // len(s), minlength=groups)
    delta = distance(s, s)
    kernels = torch.stack([log_kernel(delta, p.attention.bandwidth).exp() for p in nac.propagators])  # P U U
    # K's rows (not its columns) are matched to P's at the least MSE.
    # ‖K_u − P_g‖² = ‖K_u‖² − 2 K_u·P_g + ‖P_g‖²; the first term does not depend on g
    costs = target.square().sum(1) - 2 * kernels @ target.T  # P U G
    # One copy to the CPU for all propagators, because each synchronizes the GPU.
    rows = torch.stack([match_rows(cost, capacity) for cost in costs.detach().cpu()])
    rows = rows.to(s.device, non_blocking=True)
    return (kernels - target[rows]).square().mean((1, 2)).sum()


def regularizer(model, config):
    """What training adds to the loss: a NAC's graph regularizer, or the balance losses of mixtures, or 0."""
    c = config["train"]["student"]
    if not isinstance(model, NAC) or not c["regularizer"]:
        return sum(m.aux for m in model.modules() if isinstance(m, MoE) and m.balance)
    # As in the paper: hinge repulsion for all priors but the planted partition.
    if config["assemble"]["graph"] == "planted_partition":
        return c["regularizer"] * block_model(model, c["block_groups"])
    return c["regularizer"] * hinge_repulsion(model)


# ---------- Modules inside the meta model: cutting, stitches, and what a NAC's modules do among tokens


class Stitched(nn.Module):
    """post ∘ S_i ∘ pre: a student's module with the layers that fit it between the meta model's modules.

    States B N W (W: M's width; first module: images) -> states B U W (last: logits), U = N for a V-MoE.
    """

    def __init__(self, body, pre, post):
        super().__init__()
        self.pre_stitch, self.body, self.post_stitch = pre, body, post

    def forward(self, x):
        # The student hybrid is M_{L-1} ∘ … ∘ M_{i+1} ∘ [post ∘ S_i ∘ pre] ∘ M_{i-1} ∘ … ∘ M_0.
        return self.post_stitch(self.body(self.pre_stitch(x)))


# A NAC's modules inside the meta model M. A ViT's block takes any number of tokens, so a module may hand on
# its U latents in place of the 1+N tokens that came in; the first of them learns to be the class token that
# M's head reads. M has tokens where the circuit has latents, so M's tokens get the codes of latents:
#
#   distill.codes  module             receivers                     senders
#   own            read-in            input latents                 the tokenizer's tokens
#   own            propagator 1       mediators                     M's tokens (as input latents), mediators
#   own            later propagators  M's tokens (as mediators)     the same
#   own            read-out           output latents                M's tokens (as mediators)
#   original       read-in, read-out  one latent of random state    as above
#   original       propagators        M's tokens                    the same
#
# own: latents have the circuit's codes and start from the seeder. What several modules use (seeder, mediator
# codes, codes of tokens) keeps its initial values here and learns in fine-tuning. original, as in the paper's
# code: one fixed random code a module, which does not reach the circuit. Tokens have no signatures, so inside
# M there is no kernel.


class OwnLatents(nn.Module):
    """The circuit's latents as receivers: states from the seeder, and codes. -> B U D, U C"""

    def __init__(self, nac, latents, learn=True):
        super().__init__()
        # Modules are trained apart, so no tensor may learn in two of them. finetune.py builds a new NAC.
        self.codes = latents.codes.requires_grad_(learn)
        self.seeder = nac.seeder.requires_grad_(False)

    def forward(self, batch):
        return self.seeder(self.codes, batch), self.codes


class RandomLatent(nn.Module):
    """One receiver of fixed random code (1 C) and state (1 1 D). -> B 1 D, 1 C"""

    def __init__(self, code, state):
        super().__init__()
        # Not in the state dict: they are a function of the seed.
        self.register_buffer("codes", code, persistent=False)
        self.register_buffer("states", state, persistent=False)

    def forward(self, batch):
        return self.states.expand(batch, -1, -1), self.codes


class TokenCodes(nn.Module):
    """Codes for M's tokens B N D. -> N C"""

    def __init__(self, codes):
        super().__init__()
        self.register_buffer("codes", codes.detach().clone(), persistent=False)

    def forward(self, tokens):
        # With more tokens than codes, codes repeat.
        n = torch.arange(tokens.shape[1], device=tokens.device)
        return self.codes[n % len(self.codes)]


class ReadInModule(nn.Module):
    """Module 0 of a NAC: images B 3 H W -> latents B U D."""

    def __init__(self, nac, latents):
        super().__init__()
        self.latents, self.tokenizer, self.read_in = latents, nac.tokenizer, nac.read_in

    def forward(self, images):
        states, codes = self.latents(len(images))
        return self.read_in(states, self.tokenizer(images), codes)


class PropagatorModule(nn.Module):
    """A propagator among M's tokens. B N D -> B N D."""

    def __init__(self, propagator, token_codes):
        super().__init__()
        self.propagator, self.token_codes = propagator, token_codes
        self.propagator.attention.bandwidth.requires_grad_(False)

    def forward(self, tokens):
        codes = self.token_codes(tokens)
        return self.propagator(tokens, tokens, codes, codes)


class FirstPropagatorModule(PropagatorModule):
    """The first propagator: the mediators hear M's tokens and one another. B N D -> B U D."""

    def __init__(self, propagator, token_codes, latents):
        super().__init__(propagator, token_codes)
        self.latents = latents

    def forward(self, tokens):
        states, codes = self.latents(len(tokens))
        sender_codes = torch.cat([self.token_codes(tokens), codes])
        return self.propagator(states, torch.cat([tokens, states], 1), codes, sender_codes)


class ReadOutModule(nn.Module):
    """The last module of a NAC: M's tokens B N D -> logits B K."""

    def __init__(self, nac, latents, token_codes):
        super().__init__()
        self.latents, self.token_codes = latents, token_codes
        self.read_out, self.pool = nac.read_out, nac.pool
        self.read_out.attention.bandwidth.requires_grad_(False)

    def forward(self, tokens):
        states, codes = self.latents(len(tokens))
        return self.pool(self.read_out(states, tokens, codes, self.token_codes(tokens)))


def own_modules(nac):
    """The L modules of a NAC inside M, for distill.codes=own."""
    first, *later = nac.propagators
    inputs, mediators, outputs = nac.input_latents, nac.mediator_latents, nac.output_latents
    # The mediators' codes are also those of tokens in later modules, so no module trains them.
    return [ReadInModule(nac, OwnLatents(nac, inputs)),
            FirstPropagatorModule(first, TokenCodes(inputs.codes), OwnLatents(nac, mediators, learn=False)),
            *(PropagatorModule(propagator, TokenCodes(mediators.codes)) for propagator in later),
            ReadOutModule(nac, OwnLatents(nac, outputs), TokenCodes(mediators.codes))]


def original_modules(nac):
    """The L modules of a NAC inside M, for distill.codes=original."""
    for module in nac.modules():  # a fixed code is not shaken either
        if isinstance(module, Jitter):
            module.amount = 0
    first, *codes, last = torch.randn(len(nac.propagators) + 2, 1, nac.input_latents.codes.shape[1])
    states = torch.randn(2, 1, 1, nac.seeder.mu.out_features)
    pairs = zip(nac.propagators, codes)
    # The read-out's latent has the code of the tokens that it hears.
    return [ReadInModule(nac, RandomLatent(first, states[0])),
            *(PropagatorModule(propagator, TokenCodes(code)) for propagator, code in pairs),
            ReadOutModule(nac, RandomLatent(last, states[1]), TokenCodes(last))]


NAC_MODULES = {"own": own_modules, "original": original_modules}


def new_stitches(student, config):
    """The layers between two modules: post (to the meta model's width) and pre (back)."""
    width, meta_width = config["student"]["width"], config["meta"]["width"]

    # A V-MoE's stitches have a LayerNorm, so they cannot be folded.
    def stitch(a, b):
        fc = nn.Linear(a, b)
        if std := config["student"]["stitch_std"]:
            nn.init.trunc_normal_(fc.weight, std=std)
            nn.init.zeros_(fc.bias)
        return fc if isinstance(student, NAC) else nn.Sequential(OrderedDict(ln=nn.LayerNorm(a), fc=fc))

    return nn.Sequential(OrderedDict(post=stitch(width, meta_width), pre=stitch(meta_width, width)))


def cut(model, config, role):
    """The L modules of a whole teacher or student, as trained inside the meta model, sharing its parameters.

    A student's modules get stitches, none before the first module and none after the last.
    """
    # A teacher's modules have the meta model's width, as in Deep Incubation.
    if role == "teacher":
        return list(model.parts)
    # Stitches do not depend on which modules are trained together.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        parts = NAC_MODULES[config["distill"]["codes"]](model) if isinstance(model, NAC) else model.parts
        pairs = [new_stitches(model, config) for _ in parts[1:]]
    if config["assemble"]["stitches"] == "fold":
        if not all(isinstance(layer, nn.Linear) for pair in pairs for layer in pair):
            raise UserError("assemble.stitches=fold needs stitches of one nn.Linear each: use drop or keep.")
    pre = [nn.Identity()] + [pair.pre for pair in pairs]
    post = [pair.post for pair in pairs] + [nn.Identity()]
    return list(map(Stitched, parts, pre, post))


@torch.no_grad()
def join_stitches(model, modules, stitches):
    """Fills an assembled student's stitches: both (keep) or as one map (fold)."""
    for i, between in enumerate(model.stitches):
        post, pre = modules[i].post_stitch, modules[i + 1].pre_stitch
        if stitches == "keep":
            between.post.load_state_dict(post.state_dict())
            between.pre.load_state_dict(pre.state_dict())
        else:
            # pre(post(x)) = W_pre (W_post x + b_post) + b_pre: W = W_pre W_post, b = W_pre b_post + b_pre
            between.weight.copy_(pre.weight @ post.weight)
            between.bias.copy_(pre.weight @ post.bias + pre.bias)


# ---------- Losses


def soft_target_ce(logits, targets):
    """Cross entropy with soft targets: −Σ_k y_k log p_k, mean over the batch. B K, B K -> ()"""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()


def kd(student_logits, teacher_logits, tau=1.0, kind="soft", reduction="batchmean", targets=None):
    """Knowledge distillation: soft, a KL divergence at temperature τ, or hard, the teacher's choice as label.

    Logits B K, targets B K (unused, for losses of your own) -> (). reduction (of soft): batchmean divides by
    B; mean, as the paper's code, by B·K.
    """
    if kind == "hard":
        return F.cross_entropy(student_logits, teacher_logits.argmax(-1))
    # Log-probabilities, because one that rounds to 0 would have an infinite logarithm.
    log_p, log_t = F.log_softmax(student_logits / tau, dim=-1), F.log_softmax(teacher_logits / tau, dim=-1)
    # KL(p_teacher ‖ p_student) · τ², summed over batch and classes. Gradients shrink by 1/τ²; the factor
    # makes up for it (Hinton et al., 1503.02531).
    loss = F.kl_div(log_p, log_t, reduction="sum", log_target=True) * tau**2
    return loss / (log_p.numel() if reduction == "mean" else len(log_p))


# ---------- Models from a config

def build(config, role):
    """A whole model with new weights, a function of the seed. A baseline is a student without stitches."""
    c, d = config["student" if role.startswith("baseline") else role], config["data"]
    is_nac = c.get("kind") == "nac"
    stride = 2 ** (c["tokenizer_stages"] + 1) if is_nac else c["patch"]
    if d["image_size"] % stride:
        raise UserError(f"data.image_size={d['image_size']} is not a multiple of {stride}, {role}'s patch or "
                        "stride.")

    def options(keys):
        return {key: c[key] for key in keys.split()}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        common = dict(image_size=d["image_size"], classes=d["classes"], **options("width heads"))
        if not is_nac:
            moe = options("experts top_k balance capacity") if c["experts"] else None
            more = options("patch depths mlp_ratio qkv_bias eps init_std expert_std moe_blocks")
            model = ViT(moe=moe, **common, **more)
        else:
            model = NAC(ffn_ratio=c["mlp_ratio"], **common, **options(
                "head_width latents propagators code_width signature_width tokenizer_stages tokenizer_blocks "
                "grid_width grid_size"))
        for _ in range(modules_of(config) - 1 if role == "student" else 0):
            if config["assemble"]["stitches"] == "keep":
                model.stitches.append(new_stitches(model, config))
            elif config["assemble"]["stitches"] == "fold":
                model.stitches.append(nn.Linear(c["width"], c["width"]))
    return model


def modules_of(config):
    """L, the number of modules."""
    return len(config["meta"]["depths"])


def fit_graph_prior(model, config):
    """Fits a new NAC's mediator signatures to the config's graph -> a line to print, or None."""
    c = config["assemble"]
    if not isinstance(model, NAC) or c["graph"] == "none":
        return None
    n, rng = len(model.mediator_latents.signatures), np.random.default_rng(config["seed"])
    linked = random_graph(c["graph"], n, rng, m=c["graph_m"], groups=c["graph_groups"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        near, far = fit_signatures(model.mediator_latents.signatures, linked)
    return (f"graph prior {c['graph']}: {linked.sum() // 2} links over {n} mediators; after fitting "
            f"{100 * near:.1f} % of linked pairs can talk, {100 * far:.1f} % of unlinked pairs cannot")


def set_drop_path(model, rate, by_module=False):
    """Stochastic depth: from 0 to `rate` over a ViT's blocks, linearly; constant over a NAC's propagators.

    by_module: over each module's blocks, as in m2mKD.
    """
    if isinstance(model, NAC):
        return set_rates(model.propagators, rate, rate)
    for part in model.parts if by_module else [model]:
        set_rates(part.blocks, 0, rate)


def drop_in_hybrid(meta, teacher, i, rate):
    """Stochastic depth over the blocks of the hybrid M_{L-1} ∘ … ∘ T_i ∘ … ∘ M_0, as in Deep Incubation."""
    parts = [*meta.parts[:i], teacher.parts[i], *meta.parts[i + 1:]]
    set_rates([block for part in parts for block in part.blocks], 0, rate)


def set_rates(blocks, first, last):
    """Drop rates of blocks, linearly from the first to the last."""
    for k, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(module, DropPath):
                module.rate = first + (last - first) * k / max(1, len(blocks) - 1)


# ---------- Config: one YAML file. A class is a block, a line is a key: its type, its default, its meaning


class RunKeys:
    seed: int = 0  # everything random is a function of it
    output_dir: str | None = None  # null: runs/<name of the config>
    share: list[str] | str | None = None  # folders of other runs, to take their finished stages from
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPUs that have it
    compile: bool = False  # torch.compile of blocks, or of a NAC as a whole: worth its minutes on a GPU only


class ViTKeys:
    patch: data.Size = 8  # side in pixels
    width: Count = 64  # of a token
    heads: Count = 4  # of attention
    depths: list[Annotated[int, 1, 1000]] = [1, 1, 1]  # blocks of each module
    mlp_ratio: Annotated[float, 0.01, 64] = 4.0  # hidden width of MLPs, experts and a NAC's FFNs, in widths
    qkv_bias: bool = True  # false in the paper's ViT-Huge
    eps: Annotated[float, 1e-12, 1] = 1e-6  # of the LayerNorms; 1e-5 in the paper's ViT-Huge
    init_std: Annotated[float, 1e-6, 10] = 0.02  # of the weights; .02 suits widths from 200, .1 those near 64
    expert_std: Annotated[float, 1e-9, 10] | None = None  # of the experts' weights; null: init_std
    experts: int = 0  # 0: a plain MLP
    top_k: Count = 2  # experts that a token goes to; with 1 (a gate of 1) only `balance` trains the router
    moe_blocks: list[int] | None = None  # which blocks have experts; null: all
    balance: float = 0.0  # weight of V-MoE's importance + load loss; .01 in V-MoE, 0 in m2mKD
    capacity: Annotated[float, 0, 10**6] = 0.0  # V-MoE's capacity factor in training; 0: no limit


class StudentKeys(ViTKeys):  # width, heads and mlp_ratio also serve a NAC
    kind: Literal["nac", "vmoe"] = "nac"
    stitch_std: Annotated[float, 1e-9, 10] | None = None  # of the stitches' weights; null: nn.Linear's own
    latents: tuple[Count, Count, Count] = [16, 32, 4]  # input, mediator, output
    propagators: Annotated[int, 1, 1000] = 1  # L = propagators + 2
    head_width: Count = 16  # a NAC's heads need not divide its width
    code_width: Count | None = None  # null: width
    signature_width: Count = 64
    tokenizer_stages: Annotated[int, 2, 3] = 2  # of ConvNeXt blocks; the stride is 2^(stages + 1)
    tokenizer_blocks: Annotated[int, 1, 1000] = 3
    grid_width: Count = 64  # channels of the position grid
    grid_size: data.Size | None = None  # null: as many places as tokens


class DistillKeys:
    alpha: Fraction = 0.5  # loss = (1-α)·CE + α·KD
    tau: Annotated[float, 0.01, 1000] = 1.0  # temperature
    kind: Literal["soft", "hard"] = "soft"
    reduction: Literal["batchmean", "mean"] = "batchmean"  # of the soft loss; mean: the paper's code
    codes: Literal["own", "original"] = "own"  # of a NAC's modules, see the table above OwnLatents


class AssembleKeys:
    stitches: Literal["drop", "keep", "fold"] = "drop"  # what becomes of them in the assembled student
    graph: Literal["none", "scale_free", "planted_partition", "ring_of_cliques", "erdos_renyi"] = "none"
    graph_m: Count = 2  # scale_free: links of a new node
    graph_groups: Annotated[int, 2, 10**6] = 8  # planted_partition, ring_of_cliques


class TrainKeys:
    epochs: int = 10
    batch: Count = 64  # images per process and step
    accumulate: Count = 1  # gradients of so many batches are averaged into one step
    lr: float = 5e-4  # for a total batch of 512; scales with batch × processes × accumulate
    min_lr: float = 1e-5  # where the cosine ends; not scaled …
    scale_min_lr: bool = False  # … unless this is on
    warmup: float = 0.0  # epochs of linear warm-up from 1e-6
    warmup_prefix: bool = True  # the cosine begins after the warm-up; false: at step 0, under it (the paper)
    betas: tuple[Annotated[float, 0, 0.9999], Annotated[float, 0, 0.9999]] = [0.9, 0.999]  # AdamW's
    weight_decay: float = 0.05  # AdamW's, on matrices
    decay_all: bool = False  # also 1-d parameters and embeddings (the NAC's fine-tuning)
    drop_path: Annotated[float, 0, 0.99] = 0.0  # stochastic depth: the last of several blocks (NAC: all)
    clip: float = 0.0  # gradient norm; 0: none
    images: tuple[int, int] | None = None  # [first, stop) of the shuffled training images; null: all
    passes: Annotated[int, 1, 10**6] = 1  # how often an epoch goes over its images


class TrainStudentKeys(TrainKeys):
    alpha: Fraction = 0.0  # α of fine-tuning, with the whole teacher; the paper has none
    regularizer: float = 0.0  # weight: .1 hinge repulsion, or 1 block model with planted_partition
    block_groups: Annotated[int, 2, 10**6] = 8  # of the block model


class FewShotKeys:  # for tools/few_shot.py
    root: str = ""  # a folder of <class>/* or an .npz, of classes that are new to the model; empty: none
    images: int = 0  # of its test images; 0: all
    ways: Annotated[int, 2, 10**6] = 8  # classes of an episode
    shots: list[Count] = [1, 5]  # labeled images per class; three times as many are asked
    episodes: Annotated[int, 2, 10**6] = 200  # over which mean and interval are taken


BLOCKS = {"": RunKeys, "data.": data.DataKeys, "meta.": ViTKeys, "teacher.": ViTKeys, "student.": StudentKeys,
          "distill.": DistillKeys, "assemble.": AssembleKeys, "few_shot.": FewShotKeys,
          "train.student.": TrainStudentKeys}
BLOCKS |= {f"train.{stage}.": TrainKeys for stage in ("meta", "incubate", "teacher", "distill")}
KEYS = {"train.baseline_epochs": (int | None, None)}  # dotted key: (type, default); null: the student's
for prefix, block in BLOCKS.items():
    for key, kind in get_type_hints(block, include_extras=True).items():
        KEYS[prefix + key] = kind, getattr(block, key)


def allowed(value, kind):
    """Whether a value from YAML has a key's type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return allowed(value, inner[0]) and inner[1] <= value <= inner[2]
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is list:
        return isinstance(value, list) and all(allowed(one, inner[0]) for one in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(allowed, value, inner))
    if inner:
        return any(allowed(value, one) for one in inner)
    if kind in (int, float):
        return type(value) in (int, kind) and 0 <= value < (2**31 if kind is int else 1e30)
    if kind is str:
        return isinstance(value, str) and value.isprintable() and len(value) < 256
    return isinstance(value, kind)


def describe(kind):
    """A type in words: int from 1 to 9 · soft or hard."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{inner[0].__name__} from {inner[1]} to {inner[2]}"
    if origin is Literal:
        return " or ".join(inner)
    if origin is list:
        return f"a list of {describe(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(map(describe, inner))}]"
    if inner:
        return " or ".join(map(describe, inner))
    names = {int: "int from 0", float: "float from 0", bool: "true or false",
             str: "a text of at most 255 printable characters"}
    return names.get(kind, "null")


class Yaml(yaml.SafeLoader):
    """YAML: 5e-4 is a number, 010 and 2024-05-01 are texts, ~ is the home folder, no key may stand twice."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {twice[0]} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


for tag, pattern in {"null": "~|null|", "bool": "true|false", "int": r"[-+]?(0|[1-9]\d*)",
                     "float": r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)|\.nan"}.items():
    Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^({pattern})$"), None)
Yaml.add_constructor("tag:yaml.org,2002:str", lambda loader, node: os.path.expanduser(node.value))


def parse(text, what):
    """YAML -> plain values. Raises UserError that begins with `what`."""
    try:
        return yaml.load(text, Yaml)
    except Exception as e:  # PyYAML raises errors of many kinds
        raise UserError(f"{what} is not YAML that can be read: {e}.") from None


def load_config(path, overrides=()):
    """A YAML config with overrides ("distill.alpha=0.9") -> a nested dict of all keys. Raises UserError."""
    chosen = read_keys(path)
    for override in overrides:
        chosen |= keys_of(override)
    for key, value in chosen.items():
        check_key(key, value)
    flat = {key: copy.deepcopy(chosen.get(key, default)) for key, (_, default) in KEYS.items()}
    flat["output_dir"] = flat["output_dir"] or f"runs/{Path(path).stem}"
    config = unflatten(flat)
    config["data"]["classes"] = config["data"]["classes"] or len(data.class_names(config["data"]))
    check_fit(config)
    return config


def read_keys(path):
    """A YAML file -> {dotted key: value}."""
    try:
        chosen = flatten(parse(Path(path).read_bytes(), f"config {path}"))
    except (OSError, AttributeError, RecursionError) as e:
        raise UserError(f"config {path} is not a readable file of keys: {e}.") from None
    # A block without keys means its defaults.
    blocks = {prefix.rstrip(".") for prefix in BLOCKS} | {"train"}
    chosen = {key: value for key, value in chosen.items() if value is not None or key not in blocks}
    # A run's own config, which has all keys, means the folder where it lies now.
    if Path(path).name == "config.yaml" and len(KEYS.keys() & chosen.keys()) > 0.9 * len(KEYS):
        chosen["output_dir"] = str(Path(path).parent)
    return chosen


def keys_of(override):
    """An override -> {dotted key: value}; train.*.epochs=1 sets it for all stages."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"'{override}' is not an override such as distill.alpha=0.9.")
    values = {}
    for name in fnmatch.filter(KEYS, key) or [key]:
        # A text is not parsed (output_dir=a #3). Null is, and so is a list where the key allows one.
        kind = KEYS.get(name, (int,))[0]
        plain = allowed("text", kind) and text != "null" and not (text[:1] == "[" and allowed([], kind))
        values[name] = os.path.expanduser(text) if plain else parse(text, f"{key}={text}: the value")
    return values


def check_key(key, value):
    """Raises UserError if there is no such key, or if it does not allow the value."""
    if key not in KEYS:
        near = difflib.get_close_matches(str(key), KEYS, 1, 0.5)
        hint = f"the nearest is {near[0]}" if near else "--help lists all keys"
        raise UserError(f"{key} is not a key; {hint}.")
    kind = KEYS[key][0]
    if not allowed(value, kind):
        raise UserError(f"{key}={reprlib.repr(value)} is not allowed: it must be {describe(kind)}.")


def check_fit(c):
    """Raises UserError where keys contradict one another."""
    def require(truth, sentence):
        if not truth:
            raise UserError(sentence)

    L, student, graph = modules_of(c), c["student"], c["assemble"]
    for role in ("meta", "teacher", "student"):
        if role == "student" and student["kind"] == "nac":
            continue
        m, name = c[role], f"{role}.depths={c[role]['depths']}"
        require(L and len(m["depths"]) == L, f"{name} has {len(m['depths'])} modules, meta.depths has {L}.")
        require(m["width"] % m["heads"] == 0,
                f"{role}.width={m['width']} is not a multiple of {role}.heads={m['heads']}.")
        require(not m["experts"] or m["top_k"] <= m["experts"], f"{role}.top_k={m['top_k']} exceeds experts.")
        require(max(m["moe_blocks"] or [0]) < sum(m["depths"]), f"{role}.moe_blocks exceeds {name}.")
    a, b = c["teacher"]["width"], c["meta"]["width"]
    require(a == b, f"teacher.width={a} is not meta.width={b}: a teacher's modules are incubated inside the "
            "meta model without stitches.")
    require(c["few_shot"]["shots"], "few_shot.shots is empty.")
    require(not {"train", "validation", "test"} & {*c["data"]["robustness"]},
            "data.robustness names further test sets, not train, validation or test.")
    if student["kind"] == "vmoe":
        require(student["experts"], "student.kind=vmoe needs student.experts above 0.")
        require(graph["stitches"] != "fold", "assemble.stitches=fold is for a NAC: a V-MoE's stitches have a "
                "LayerNorm between two Linears; use drop or keep.")
        return
    modules, mediators = student["propagators"] + 2, student["latents"][1]
    require(modules == L, f"student.propagators={modules - 2} makes {modules} modules, meta.depths {L}.")
    require(student["width"] % 4 == 0, f"student.width={student['width']} is not a multiple of 4.")
    groups = ("planted_partition", "ring_of_cliques")
    for key, n, graphs in (("graph_m", graph["graph_m"] + 1, ("scale_free",)),
                           ("graph_groups", 2 * graph["graph_groups"], groups),
                           ("block_groups", 2 * c["train"]["student"]["block_groups"], groups[:1])):
        require(n <= mediators or graph["graph"] not in graphs,
                f"{key} is too large for the {mediators} mediators of student.latents.")


def flatten(tree, prefix=""):
    """{"train": {"meta": {"lr": 1}}} -> {"train.meta.lr": 1}"""
    flat = {}
    for key, value in tree.items():
        part = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        if twice := flat.keys() & part.keys():
            raise UserError(f"the key {min(twice)} stands twice.")
        flat |= part
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


def command_line(doc, roles=(), **more):
    """Parses `--config FILE [role=ROLE] [key=value …]` -> the config, and the other options.

    `more` are further options and argparse's words for them. Options work with and without dashes.
    """
    keys = "int, float: from 0; Count: from 1; Fraction: from 0 to 1; Size: pixels.\n"
    if {"-h", "--help"} & {*sys.argv}:  # finding the source of the keys takes a second
        keys += "\n".join(f"{prefix}\n{inspect.getsource(block)}" for prefix, block in BLOCKS.items())
    parser = argparse.ArgumentParser(description=doc, epilog=keys,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    if roles:
        parser.add_argument("--role", default=roles[0], choices=roles)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a key of the config (below)")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    own = tuple(f"{name}=" for name in ("config", "role", *more))
    words = parser.parse_intermixed_args([f"--{w}" if w.startswith(own) else w for w in sys.argv[1:]])
    config = load_config(words.config, words.overrides)
    if config["precision"] == "auto":  # resolved now, because results depend on it
        cuda = config["device"] in ("auto", "cuda") and torch.cuda.is_available()
        fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        config["precision"] = "bfloat16" if fast else "float32"
    return config, words


def run(main):
    """Runs a main(). Bad input, a full disk or too little memory end in one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may know no Greek
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        main()
        data.close()
    except KeyboardInterrupt:  # before there is anything to save
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as e:
        # torch's words for too little memory, no compiler, a dead worker, a taken port, another process's end
        text = " ".join(str(e).split()) or type(e).__name__
        known = "alloc|compiler|DataLoader worker|socket|peer|imed out|onnection"
        if isinstance(e, RuntimeError) and not re.search(known, text):
            raise
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        elif not isinstance(e, UserError):
            text = text.rstrip(".") + ". TRACEBACK=1 in the environment shows where."
        if isinstance(e, RuntimeError) and re.search("imed out|onnection|peer", text):
            text += " Another process hangs or has ended."
        if "DataLoader worker" in text:
            text += " If memory ran out, take fewer data.workers; if /dev/shm did, data.workers=0."
        # Every process prints, because a bad image may be in its share alone.
        print("error:", text, file=sys.stderr)
        sys.exit(2)


# ---------- Weights


def write(path, put):
    """Writes a file so that `path` is always whole: beside it, fsync, rename. UserError where that fails."""
    path = Path(path)
    # Not the process's number, because jobs in containers share these.
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
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


def read(path, whole=True):
    """One of our files; nothing in it is executed. `whole` also compares checksums."""
    try:
        if whole:
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise ValueError(f"the checksum of its record {bad} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
        if not isinstance(content, dict):
            raise ValueError("it holds no dict")
        return content
    except Exception as e:  # pickle, zip and torch have many kinds of errors for broken files
        reason = re.split(r"\n|\. ", str(e))[0].rstrip(".") or type(e).__name__  # EOFError has no words
        raise UserError(f"{path} is no file of this project that can be read: {reason}. (tools/convert.py "
                        "reads those of others.)") from None


def load(path):
    """A finished model from its file alone, in evaluation mode, with .class_names, .image_size, .config."""
    content = read(path)
    whole = content.get("stage") in ("meta", "teacher", "student", "baseline", "baseline_kd")
    if not whole or "config" not in content:
        raise UserError(f"{path} is not a finished model such as runs/demo_nac/student.pt.")
    defaults = {key: default for key, (_, default) in KEYS.items()}  # of keys that are newer than the file
    config = unflatten({**defaults, **flatten(content["config"])})
    model = build(config, content["stage"])
    load_state(model, content["model"], path)
    model.config, model.image_size = config, config["data"]["image_size"]
    model.class_names = content["class_names"]
    return model.eval()


def load_weights(model, path):
    """Reads one of our files into a model or a module."""
    load_state(model, read(path).get("model", {}), path)


def load_state(model, state, path):
    """Loads a state dict, whole or not at all. Raises UserError on a misfit."""
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            what, tensor = ("lacks the", own[name]) if name in own else ("has an unexpected", state[name])
            raise UserError(f"{path} {what} tensor {name} {tuple(tensor.shape)}.")
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise UserError(f"{path}: the tensor {name} is {tuple(state[name].shape)}, the model's "
                            f"{tuple(value.shape)}.")
    model.load_state_dict(check_finite(state, path))


def check_finite(state, what):
    """Returns a state dict of finite tensors; raises UserError for any other."""
    for name, value in state.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(f"{what}: the tensor {name} is not finite (in training a lower learning rate may "
                            "help).")
    return state


# ---------- Run folder: which stage made which file, with which settings

# stage: (script, role, the stages that it builds on, the blocks of the config that it adds to theirs)
STAGES = {
    "meta": ("finetune.py", "meta", [], ["meta", "train.meta"]),
    "incubate": ("distill_module.py", "teacher", ["meta"], ["teacher", "train.incubate"]),
    "assemble_teacher": ("assemble.py", "teacher", ["incubate"], ["teacher"]),
    "teacher": ("finetune.py", "teacher", ["assemble_teacher"], ["teacher", "train.teacher"]),
    "distill": ("distill_module.py", "student", ["meta", "teacher"], ["student", "distill", "train.distill"]),
    "assemble_student": ("assemble.py", "student", ["distill"], ["student", "assemble"]),
    "student": ("finetune.py", "student", ["assemble_student", "teacher"],
                ["student", "assemble", "distill", "train.student"]),
    "baseline": ("finetune.py", "baseline", [],
                 ["student", "assemble", "train.student", "train.baseline_epochs"]),
    "baseline_kd": ("finetune.py", "baseline_kd", ["teacher"],
                    ["student", "assemble", "distill", "train.student", "train.baseline_epochs"]),
}
# Keys that change no result
LEFT_OUT = ("data.root", "data.workers", "data.test_images", "data.robustness")


def parents(config, name):
    """The stages that a stage builds on. A teacher is needed only where α > 0."""
    return [one for one in STAGES[name][2] if one != "teacher" or alpha_of(config, name) > 0]


def files(config, name):
    """The files that a stage writes into a run's folder."""
    role = STAGES[name][1]
    if name in ("incubate", "distill"):
        return [f"{role}_modules/{i}.pt" for i in range(modules_of(config))]
    return [f"{role}_assembled.pt" if name.startswith("assemble") else f"{role}.pt"]


def stages(config, goals=("student", "baseline")):
    """The stages still to be made for the goals, in order. What only finished ones need is left out."""
    wanted, missing = {*goals}, []
    # Backwards, because a stage's parents stand before it.
    for name in reversed(STAGES):
        if name in wanted and not all(finished(config, name, file) for file in files(config, name)):
            missing.insert(0, name)
            wanted.update(parents(config, name))
    return missing


def settings(config, name, evaluating=False, memo=None):
    """{dotted key: value} of what a stage's result depends on: kept in its files, compared later.

    What is built on imported weights depends on these instead of on the stage that would have made them.
    finished() and this function call each other for the parents; `memo` computes each stage's settings once.
    """
    memo = {} if memo is None else memo
    if name not in memo:
        known = {}
        for parent in parents(config, name):
            found = {file: finished(config, parent, file, evaluating, memo) for file in files(config, parent)}
            imported = {file: about(path)["imported"] for file, path in found.items()
                        if path and "imported" in about(path)}
            known |= imported
            if len(imported) < len(found):
                known |= settings(config, parent, evaluating, memo)
        blocks = ["seed", "precision", "data", *STAGES[name][3]]
        known |= {key: value for key, value in flatten(config).items() if key not in LEFT_OUT
                  and any(key == block or key.startswith(f"{block}.") for block in blocks)}
        memo[name] = known | data.identity(config["data"])
    return memo[name]


def about(path):
    """What a file holds beside weights."""
    return about_version(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=1000)
def about_version(path, changed):
    content = read(path, whole=False)
    return {key: value for key, value in content.items() if key != "model"}


def compare(old, new, path, config):
    """Raises UserError for the first setting in which the file at `path` differs from the config."""
    own = folders(config)
    share = own[0] if len(own) == 1 else f"[{','.join(own)}]"
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            key, before, now = data.differing(key, old.get(key), new.get(key))
            if key.startswith(("data.class_names", "data.checksum")):
                alike = " (Unicode NFC, NFD)" if before == now else ""
                raise UserError(f"{path} was made from other images than those of data.root="
                                f"{config['data']['root']}: {key} was {before}, now it is {now}{alike}. Use "
                                "a new output_dir.")
            raise UserError(f"{key} was {before} when {path} was made, now it is {now}. Use a new output_dir "
                            f"and share={share} to keep the stages that do not change.")


def folders(config):
    """The run's folder, then those that it shares."""
    share = config["share"] or []
    return [config["output_dir"], *([share] if isinstance(share, str) else share)]


def paths(config, file):
    """The files of this name: in the run's folder, then in those that it shares."""
    return [path for folder in folders(config) if (path := Path(folder, file)).exists()]


def finished(config, name, file, evaluating=False, memo=None):
    """Path of a stage's finished file, in the run's folder or a shared one; None if it is still to be made.

    A file made with other settings is passed over; in the run's folder it is refused. Imported weights must
    only fit the model. `evaluating`: precision is free, and what the run was built on may be gone.
    """
    for path in paths(config, file):
        made = about(path)
        if "imported" in made:
            old, new = ({key: value for key, value in flatten(one).items()
                         if key in ("data.mean", "data.std") or key.startswith(f"{STAGES[name][1]}.")}
                        for one in (made["config"], config))
            names = made["class_names"]  # numbers if nobody told them
            if names and names != [*map(str, range(len(names)))] and os.path.exists(config["data"]["root"]):
                old["data.class_names"], new["data.class_names"] = names, data.class_names(config["data"])
        else:
            old, new = made.get("settings", {}), settings(config, name, evaluating, memo)
        if evaluating:
            common = [key for key in new if key in old and key != "precision"]
            old, new = ({key: known[key] for key in common} for known in (old, new))
        if old and old == new:
            return path
        if path == Path(config["output_dir"], file):
            compare(old, new, path, config)
    return None


def needed(config, name, file):
    """Path of a finished file. Raises UserError if it is not there."""
    if path := finished(config, name, file):
        return path
    raise UserError(f"{Path(config['output_dir'], file)} is not there yet: run the stage that makes it, or "
                    "run.sh, which runs all in order.")


def check_inputs(config):
    """Checks the shared folders and all sets of images before anything is trained."""
    own, *shared = map(Path, folders(config))
    if os.path.lexists(own) and not own.is_dir():
        raise UserError(f"output_dir={own} is not a folder.")
    for folder in shared:
        if not folder.is_dir():
            raise UserError(f"share={folder} is not a run's folder.")
    for name in ("test", *config["data"]["robustness"]):
        data.load(config, name)


def frozen(config, role, process):
    """The finished meta model or teacher, in evaluation mode, without gradients."""
    model = build(config, role)
    load_weights(model, needed(config, role, f"{role}.pt"))
    if config["compile"]:
        compile_blocks(model)
    return model.to(process.device).requires_grad_(False).eval()


def compile_blocks(model):
    """torch.compile of all blocks, in place, or of a NAC as a whole -> what is called in training."""
    if hasattr(torch._inductor.config, "deterministic"):
        torch._inductor.config.deterministic = True  # no choice by timing, so a resumed run keeps its bits
    # A NAC is thousands of small kernels, also between its blocks. The model itself stays uncompiled, so that
    # evaluation does not compile anew for its batch sizes.
    if isinstance(model, NAC):
        return torch.compile(model, fullgraph=True)
    # Equal blocks share one compilation. Whole modules would share none, and torch gives up after eight.
    for block in model.modules():
        if isinstance(block, (Block, Tokenizer, ReadIn, Propagator, ReadOut)):
            block.compile()
    return model


def begin(config, process):
    """Makes the run's folder with the resolved config."""
    if process.rank == 0:
        path = Path(config["output_dir"], "config.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda file: file.write(yaml.safe_dump(config, sort_keys=False).encode()))


def save_finished(config, name, file, state, class_names=None, imported=None, known=None):
    """Writes a stage's result: the weights and what it takes to use them. known: its settings, if at hand."""
    path = Path(config["output_dir"], file)
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the CPU, for machines without a GPU.
    state = {key: value.cpu() for key, value in check_finite(state, path).items()}
    origin = {"imported": imported}
    if not imported:
        origin = {"settings": known or settings(config, name), "code": code()}
    content = {"model": state, "stage": name, **origin, "config": config, "class_names": class_names}
    write(path, lambda stream: torch.save(content, stream))


@functools.cache
def code():
    """A checksum of the six files. That other code made a result is said, and never a reason to refuse it."""
    names = sorted({"data.py", "evaluate.py", "models.py", *(script for script, *_ in STAGES.values())})
    return f"{zlib.crc32(b''.join(Path(__file__).with_name(name).read_bytes() for name in names)):08x}"


def say(process, text):
    """Prints a line, on the first process only."""
    if text and process.rank == 0:
        print(text, flush=True)


def announce(process, text):
    """Prints a line after run.sh's count of commands."""
    say(process, os.environ.get("STAGE", "") + text)


# ---------- Stage: what every training loop does besides its loss

TITLES = {"meta": "meta model", "incubate": "teacher modules", "distill": "m2mKD"}


class Stage:
    """Optimizers, schedule, noise, log and checkpoint of one stage; finetune.py's loop shows its use.

    Modules {i: module} are trained side by side, each with its own AdamW, and become files {i: file}. A whole
    model is one, named like its stage. only=i: a job for module i alone, with a checkpoint of its own.
    """

    def __init__(self, config, process, name, modules, files, images, only=None):
        self.config, self.process, self.name, self.images = config, process, name, images
        self.modules, self.files, self.title = modules, files, TITLES.get(name, name)
        self.c = c = schedule(config, name)
        self.steps = data.steps_per_epoch(len(images), c["batch"], process.world, c["accumulate"], c["block"])
        self.total_batch = c["batch"] * process.world * c["accumulate"]
        self.optimizers = {i: optimizer(module, c) for i, module in modules.items()}
        self.settings = settings(config, name)
        check_inputs(config)
        self.path = checkpoint_path(config, name, only)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = [self.path, *(Path(config["output_dir"], file) for file in files.values())]
        self.locks = [lock(file) for file in written] if process.rank == 0 else []
        if self.locks and any(finished(config, name, file) for file in files.values()):
            raise UserError(f"{self.title} was finished by another job meanwhile: start again.")
        self.number, resumed = self.resume() if self.path.exists() else (0, "")
        facts = {"stage": name, "step": self.number, "modules": [*modules], "code": code()}
        data.agree(process, facts | self.settings)
        begin(config, process)
        self.compiling = config["compile"]
        self.wrapped = {i: self.distributed(module) for i, module in modules.items()}
        # From here on a signal to end saves first.
        self.stopping, (self.listener, speaker) = False, os.pipe()
        os.set_blocking(speaker, False)
        signal.set_wakeup_fd(speaker, warn_on_full_buffer=False)
        self.signals = [n for n in data.SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # as by nohup
        for number in self.signals:
            signal.signal(number, lambda *_: setattr(self, "stopping", True))
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()
        several = "" if name in modules else f"{len(modules)} modules, "
        epochs = "1 epoch" if c["epochs"] == 1 else f"{c['epochs']} epochs"
        announce(process, f"{self.title}: {several}{sum(map(parameters, modules.values())):,} parameters, "
                 f"{epochs} of {self.steps} steps of {self.total_batch} images{resumed}")

    def listen(self):
        """A thread. The first signal asks the loop to save and leave; one that comes later ends the process.

        A handler of Python's would not run while the process waits for others inside torch. A scheduler and
        torchrun may both send the first one, hence the two seconds.
        """
        first = None
        while number := os.read(self.listener, 1):
            if number[0] in data.SIGNALS:
                first = first or time.monotonic()
                if time.monotonic() - first > 2:
                    os._exit(128 + number[0])

    def resume(self):
        """Loads an unfinished stage's checkpoint -> its step, also in words. Raises UserError on a misfit."""
        saved = read(self.path, whole=self.process.rank == 0)
        if not {"processes", "settings", "modules", "optimizers", "number"} <= saved.keys():
            raise UserError(f"{self.path} is no checkpoint of an unfinished stage; remove it.")
        if (before := saved["processes"]) != self.process.world:
            raise UserError(f"processes was {before} when {self.path} was begun, now it is "
                            f"{self.process.world}: go on with as many as before, or remove it.")
        compare(saved["settings"], self.settings, self.path, self.config)
        for i, module in self.modules.items():
            if i not in saved["modules"]:
                raise UserError(f"{self.path} was begun without module {i}: train it first, with module={i}.")
            module.load_state_dict(saved["modules"][i])
            self.optimizers[i].load_state_dict(saved["optimizers"][i])
        other = " (other code began it)" if saved.get("code") != code() else ""
        return saved["number"], f", resumed at step {saved['number']}{other}"

    def distributed(self, module):
        """The module as the loop calls it: compiled, and wrapped to average the processes' gradients."""
        if self.compiling:
            module = compile_blocks(module)
        if self.process.world == 1:
            return module
        # With find_unused_parameters gradients are never regrouped, so a resumed run sums them in the same
        # order. Torch warns once that none is unused; if one were, each step would wait for the GPU.
        return DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=True)

    def epochs(self):
        return range(self.number // self.steps, self.c["epochs"])

    def batches(self, epoch):
        """The rest of an epoch's (images, targets) of this process."""
        self.epoch, self.began = epoch, time.monotonic()
        first, accumulate = self.number % self.steps, self.c["accumulate"]
        # Loss·images, correct, images; on the device, because reading a number synchronizes the GPU.
        self.sums = {i: torch.zeros(3, device=self.process.device) for i in self.modules}
        for module in self.modules.values():
            module.train()
        batches = data.train_batches(self.images, self.config, self.c["block"], epoch, self.process, first)
        title, total = f"{self.title} {epoch + 1}/{self.c['epochs']}", (self.steps - first) * accumulate
        silent = self.process.rank > 0 or sys.stderr is None or None  # None: unless it is a terminal
        self.bar = tqdm(batches, title, total, disable=silent, leave=False)
        for batch, pair in enumerate(self.bar):
            self.batch = batch
            for module in self.wrapped.values():  # gradients travel once a step, as under DDP.no_sync()
                module.require_backward_grad_sync = (batch + 1) % accumulate == 0
            yield pair
        self.trained = time.monotonic() - self.began

    def seed_noise(self, *part):
        """Makes the noise from here on a function of the place in training.

        So a resumed run needs no random state, and a module gets the same noise alone as among all others.
        """
        micro = self.batch % self.c["accumulate"]
        place = self.config["seed"], self.name, *part, self.number, micro, self.process.rank
        torch.manual_seed(zlib.crc32(repr(place).encode()))

    def record(self, i, loss, logits, targets):
        """Adds a batch to the epoch's loss and accuracy."""
        correct = (logits.argmax(-1) == targets.argmax(-1)).sum()
        images = torch.full_like(correct, len(targets))
        self.sums[i] += torch.stack([loss.detach() * images, correct, images])

    def step(self):
        """One AdamW step of every module, after the last of `accumulate` batches."""
        if (self.batch + 1) % self.c["accumulate"]:
            return
        self.lr = learning_rate(self.number, self.steps, self.c, self.total_batch)
        for i, module in self.modules.items():
            for group in self.optimizers[i].param_groups:
                group["lr"] = self.lr
            if self.c["clip"]:
                nn.utils.clip_grad_norm_(module.parameters(), self.c["clip"])
            self.optimizers[i].step()
            self.optimizers[i].zero_grad()
        self.number += 1
        if self.compiling and self.process.rank == 0:
            self.bar.write(f"compiled; the first step took {time.monotonic() - self.began:.0f} s")
        self.compiling = False
        # Reading a loss synchronizes GPU and processes, so check every 20 steps.
        due = self.number % 20 == 0 or self.stopping and self.process.world == 1
        if due and self.number % self.steps and self.check():
            self.leave()

    def check(self):
        """Whether any process is asked to end. Raises UserError in all if a loss in any is not finite."""
        stop = torch.tensor([float(self.stopping)], device=self.process.device)
        *sums, stop = data.sum_over_processes(torch.cat([*self.sums.values(), stop])).tolist()
        self.totals = {i: sums[3 * k:3 * k + 3] for k, i in enumerate(self.modules)}
        for i, (loss, *_) in self.totals.items():
            if not math.isfinite(loss):
                raise UserError(f"{self.name}: the loss of {i} is not finite at step {self.number}; the last "
                                "good checkpoint stays. A lower learning rate or clipping may help.")
        self.bar.set_postfix_str(f"loss {sum(sums[::3]) / sum(sums[2::3]):.3f}, lr {self.lr:.1e}")
        return stop > 0

    def end_epoch(self, validated):
        """Writes log and checkpoint, prints a line. validated: {i: accuracy in %}"""
        stop, seconds = self.check(), time.monotonic() - self.began
        lines = [self.log_line(i, validated[i], seconds / len(self.modules)) for i in self.modules]
        if self.process.rank == 0:
            # The log first: an epoch that is repeated after a kill logs again, and its last lines count.
            append(Path(self.config["output_dir"], "log.jsonl"), lines)
        self.save()
        self.print_epoch(lines, seconds)
        if stop:
            self.leave()

    def log_line(self, i, val_top1, seconds):
        """A line of log.jsonl (docs/operations.md)."""
        loss, correct, images = self.totals[i]
        return {"stage": self.name, "module": i, "epoch": self.epoch + 1, "step": self.number,
                "loss": loss / images, "top1": 100 * correct / images, "val_top1": val_top1, "lr": self.lr,
                "images_per_second": images / max(self.trained, 1e-3), "seconds": seconds,
                "images": self.steps * self.total_batch, "modules": [*self.modules],
                **log_extras(self.modules[i])}

    def print_epoch(self, lines, seconds):
        losses = [line["loss"] for line in lines]
        digits = 1
        if len(lines) > 4:  # of many modules the mean loss, and whole per cents
            losses, digits = [sum(losses) / len(losses)], 0
        of = f"modules {' '.join(map(str, self.modules))}  " if 1 < len(lines) < 5 else ""
        losses = of + "loss " + " ".join(f"{loss:.3f}" for loss in losses)
        tops = " ".join(f"{line['val_top1']:.{digits}f}" for line in lines if line["val_top1"] is not None)
        tops = f"validation {tops} %" if tops else "no validation"  # data.validation_images=0
        width = len(str(self.c["epochs"]))
        say(self.process, f"{self.title} {self.epoch + 1:{width}}/{self.c['epochs']}  {losses}  {tops}  "
                          f"{seconds:.0f} s")

    def save(self):
        """Writes the checkpoint. Weights that are not finite never replace good ones."""
        for i, module in self.modules.items():
            place, adamw = f"{self.name}: step {self.number} of {i}", self.optimizers[i].state_dict()["state"]
            check_finite(module.state_dict(), place)
            # A gradient's square may overflow; its parameter would never move again.
            check_finite(flatten(adamw), f"{place}, AdamW")
        if self.process.rank == 0:
            content = {"settings": self.settings, "processes": self.process.world, "code": code(),
                       "number": self.number,
                       "modules": {i: module.state_dict() for i, module in self.modules.items()},
                       "optimizers": {i: adamw.state_dict() for i, adamw in self.optimizers.items()}}
            write(self.path, lambda file: torch.save(content, file))

    def leave(self):
        """Saves and leaves, after a signal. Further ones, which torchrun sends now, do not count."""
        for number in self.signals:
            signal.signal(number, signal.SIG_IGN)
        self.save()
        say(self.process, f"stopped: saved at step {self.number}; the same command goes on from there.")
        sys.exit(143)

    def finish(self):
        """Writes each module's file and removes the checkpoint."""
        if self.process.rank == 0:
            for i, file in self.files.items():
                save_finished(self.config, self.name, file, self.modules[i].state_dict(),
                              self.images.class_names, known=self.settings)
            self.path.unlink(missing_ok=True)
            forget(self.config, self.name)
        for held in self.locks:
            Path(held.name).unlink(missing_ok=True)
            held.close()
        for number in self.signals:
            signal.signal(number, signal.SIG_DFL)
        os.close(signal.set_wakeup_fd(-1))  # the thread ends
        self.thread.join()
        os.close(self.listener)


def skip(config, process, name, only=None):
    """Says that a stage is finished, and removes what a kill has left of it."""
    if not name.startswith("assemble"):  # which one process does
        data.agree(process, {"stage": name, "step": "the last"})
    if process.rank == 0:
        forget(config, name, only)
    announce(process, f"{TITLES.get(name, name)}: finished; skipped{by_other_code(config, name)}")


def forget(config, name, only=None):
    """Removes what is left of a finished stage's checkpoints. only=i: of module i's.

    Otherwise a stage whose files are deleted, to train it anew, would go on from its old end. It must be
    finished in the run's own folder: a shared result is no reason to lose an own beginning.
    """
    places = range(len(files(config, name))) if only is None else [only]
    if all(Path(config["output_dir"], files(config, name)[i]).exists() for i in places):
        for path in {checkpoint_path(config, name, i) for i in (only, *places)}:
            with contextlib.suppress(OSError):  # a folder that may not be written
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)


def by_other_code(config, name):
    """A word where other code made a finished stage; imported weights do not tell."""
    found = [finished(config, name, file) for file in files(config, name)]
    codes = {about(path).get("code") for path in found if path}
    return " (other code made it)" if codes - {None, code()} else ""


def checkpoint_path(config, name, only=None):
    """An unfinished stage's file: one for a pass over all modules, another for a job for one."""
    file = Path(config["output_dir"], files(config, name)[only or 0])
    if name in ("incubate", "distill") and only is None:
        return file.with_name("unfinished.pt")
    return file.with_suffix(".unfinished.pt")


def lock(path):
    """Reserves a file that is to be written until this process ends, even if it is killed -> the lock."""
    file = open(path.with_suffix(".lock"), "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{file.name} is locked: another job is at work on this stage.") from None
    except OSError as e:
        data.note(f"{path.parent}: this file system knows no locks ({e}); start no second job here")
        return file
    # Nobody else writes it now, so these were left by jobs that were killed while they wrote.
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    return file


def alpha_of(config, name):
    """α of a stage; 0: it needs no teacher."""
    if name == "student":
        return config["train"]["student"]["alpha"]
    return config["distill"]["alpha"] if name in ("distill", "baseline_kd") else 0.0


def schedule(config, name):
    """A stage's block of `train`, with the block's name, the stage's epochs and α."""
    block = "student" if name.startswith("baseline") else name
    c = {**config["train"][block], "block": block, "alpha": alpha_of(config, name)}
    if block != name and config["train"]["baseline_epochs"] is not None:
        c["epochs"] = config["train"]["baseline_epochs"]
    return c


def optimizer(module, c):
    """AdamW over a module's trainable parameters; `c` is a stage's block of the config.

    Only weights and a NAC's codes, signatures and grid decay: no biases (nor experts'), gains, class token
    and position embedding. With decay_all everything does.
    """
    groups = {True: [], False: []}
    for name, p in module.named_parameters():
        if p.requires_grad:
            plain = p.ndim <= 1 or name.endswith(("bias", "cls_token", "pos_embed"))
            groups[c["decay_all"] or not plain].append(p)
    groups = [{"params": p, "weight_decay": c["weight_decay"] * decay} for decay, p in groups.items() if p]
    return torch.optim.AdamW(groups, lr=c["lr"], betas=tuple(map(float, c["betas"])), eps=1e-8, fused=True)


def learning_rate(step, steps_per_epoch, c, total_batch):
    """Linear warm-up from 1e-6, then a cosine to the minimum: a function of the optimizer step alone."""
    scale = total_batch / 512
    peak = c["lr"] * scale
    low = min(peak, c["min_lr"] * (scale if c["scale_min_lr"] else 1))
    warm, end = c["warmup"] * steps_per_epoch, c["epochs"] * steps_per_epoch
    if step < warm:
        return 1e-6 + (peak - 1e-6) * step / warm
    # lr = low + ½ (peak − low)(1 + cos π·t), t from 0 to 1
    t = (step - warm) / max(1, end - warm) if c["warmup_prefix"] else step / end
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * t))


def autocast(config, device):
    """Mixed precision, where the config's precision is bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "bfloat16")


def log_extras(module):
    """For the log: each expert's share of the last batch's tokens; of a NAC, mediators' linked pairs in %."""
    if isinstance(module, NAC):
        s = module.mediator_latents.signatures
        linked = (distance(s, s) <= TRUNCATION).triu(1).sum().item()
        return {"linked": 100 * linked / max(1, len(s) * (len(s) - 1) // 2)}
    mixtures = [m for m in module.modules() if isinstance(m, MoE)]
    load = [[round(share, 3) for share in m.load.tolist()] for m in mixtures]  # a row per mixture
    return {"expert_load": load} if load else {}


def parameters(module):
    """The number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def append(path, lines):
    """Appends lines to a .jsonl file; a last line that a kill cut short stays a line of its own."""
    with open(path, "a+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in ("", "\n"):
            file.write("\n")
        file.writelines(json.dumps(line) + "\n" for line in lines)
