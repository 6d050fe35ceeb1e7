"""The definitions of the NAC (2210.08031, with m2mKD's details) and of the mixture of experts, as they stand.

models.py reaches the same numbers by shorter ways. Here nothing is shortened: every key and value of every
pair of latent and token is written out, and the mixture is a loop over tokens. test_models.py shows that
outputs and gradients agree; tools/bench.py shows what the shorter ways save. A function takes a module of
models.py for its parameters only.

In training the noise is drawn in models.py's order and shapes, so with the same seed both see the same draws.
Axes as in models.py: B batch · U receivers · V senders or tokens · D width · X token width · h heads ·
    d head width
"""

import math

import torch
import torch.nn.functional as F
from torch import einsum


def layer_norm(m, x):
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + m.eps) * m.weight + m.bias


def sigma(m, c):
    """σ(c) = 1 + g · LN(A c), LN without affine. … C -> … in."""
    a = einsum("ic,...c->...i", m.scale.weight, c)
    variance, mean = torch.var_mean(a, dim=-1, correction=0, keepdim=True)
    return 1 + m.gain * (a - mean) / torch.sqrt(variance + 1e-5)


def mod_fc(m, x, c):
    """y = W·(x ⊙ σ(c)) + b."""
    y = einsum("oi,...i->...o", m.weight, x * sigma(m, c))
    return y if m.bias is None else y + m.bias


def drop_path(m, x):
    if not m.training or m.rate == 0:
        return x
    return x * (torch.rand(len(x), 1, 1, device=x.device) >= m.rate) / (1 - m.rate)


def mod_ffn(m, x, c):
    """x + γ · ModFC₂(GEGLU(ModFC₁(LN x))), GEGLU(a, b) = a · GELU(b)."""
    a, b = mod_fc(m.fc1, layer_norm(m.norm, x), c).chunk(2, dim=-1)
    return x + drop_path(m.drop_path, m.gamma * mod_fc(m.fc2, a * F.gelu(b), c))


def jitter(c, training):
    """c + U(−.05|c|, +.05|c|): one draw a batch."""
    return c + 0.05 * c * (2 * torch.rand_like(c) - 1) if training else c


def tokenizer(m, images):
    """ConvNeXt without classifier; then the position grid beside the features. B 3 H W -> B V X."""
    to_last, to_first = (lambda x: x.permute(0, 2, 3, 1)), (lambda x: x.permute(0, 3, 1, 2))
    x = images
    for k, (down, stage) in enumerate(zip(m.downsample_layers, m.stages)):
        conv, norm = down if k == 0 else reversed(down)
        if k:
            x = to_first(layer_norm(norm, to_last(x)))
        x = F.conv2d(x, conv.weight, conv.bias, stride=conv.kernel_size)
        if k == 0:
            x = to_first(layer_norm(norm, to_last(x)))
        for block in stage:
            y = F.conv2d(x, block.dwconv.weight, block.dwconv.bias, padding=3, groups=x.shape[1])
            y = F.gelu(F.linear(layer_norm(block.norm, to_last(y)), block.pwconv1.weight, block.pwconv1.bias))
            x = x + to_first(block.gamma * F.linear(y, block.pwconv2.weight, block.pwconv2.bias))
    grid = F.adaptive_avg_pool2d(m.grid, x.shape[2:])
    return torch.cat([x, grid.expand(len(x), -1, -1, -1)], dim=1).flatten(2).transpose(1, 2)


def seeder(m, codes, batch):
    """μ(LN c) + ε ⊙ exp(½ λ(LN c)), ε = 0 in evaluation. U C -> B U D."""
    c = layer_norm(m.norm, jitter(codes, m.training))
    mu = einsum("dc,uc->ud", m.mu.weight, c) + m.mu.bias
    logvar = einsum("dc,uc->ud", m.logvar.weight, c) + m.logvar.bias
    noise = mu.new_zeros(batch, 1, 1)
    if m.training:
        noise = torch.randn(batch, *mu.shape, dtype=mu.dtype, device=mu.device)
    return mu + noise * torch.exp(0.5 * logvar)


def read_in(m, states, tokens, codes):
    codes = jitter(codes, m.training)
    return mod_ffn(m.ffn, read_in_attention(m, states, tokens, codes), codes)


def read_in_attention(m, states, tokens, codes):
    """Input latents attend to tokens, modulated by the receiver's code. B U D, B V X, U C -> B U D."""
    att = m.attention
    q = mod_fc(att.query, layer_norm(att.receiver_norm, states), codes)  # B U h·d
    x = layer_norm(att.sender_norm, tokens)[:, :, None]  # B V 1 X
    k = mod_fc(att.key, x, codes)  # k_uv = ModFC(x_v, c_u): B V U h·d
    v = mod_fc(att.value, x, codes)
    q, k, v = (t.unflatten(-1, (m.heads, -1)) for t in (q, k, v))
    scores = einsum("buhd,bvuhd->bhuv", q, k) / math.sqrt(q.shape[-1])
    out = einsum("bhuv,bvuhd->buhd", scores.softmax(-1), v).flatten(2)
    return states + att.gamma * mod_fc(att.exit, out, codes)


def kernel(signatures_u, signatures_v, bandwidth, truncate=True):
    """K = exp(−δ/β), δ = 1 − cos(s_u, s_v); 0 where δ > .9. U S, V S -> U V."""
    length_u, length_v = (s.norm(dim=1) for s in (signatures_u, signatures_v))
    delta = 1 - einsum("us,vs->uv", signatures_u, signatures_v) / (length_u[:, None] * length_v)
    K = torch.exp(-delta / bandwidth)
    return torch.where(delta > 0.9, 0.0, K) if truncate else K


def sampled_log_kernel(K, batch):
    """log of a relaxed Bernoulli: log sigmoid((logit K + ℓ)/.5), ℓ logistic noise. U V -> B U V."""
    eps = torch.finfo(torch.float32).eps
    K, u = K.clamp(eps, 1 - eps), torch.rand(batch, *K.shape, device=K.device).clamp(eps, 1 - eps)
    return torch.log(torch.sigmoid((torch.log(K / (1 - K)) + torch.log(u / (1 - u))) / 0.5))


def latent_attention(m, receivers, senders, receiver_codes, sender_codes, log_kernel=None):
    """γ · exit(softmax_v(q_u·k_v/√d + log K(u, v)) v_v): q, exit by receivers' codes, k, v by senders'."""
    q = mod_fc(m.query, layer_norm(m.receiver_norm, receivers), receiver_codes)
    x = layer_norm(getattr(m, "sender_norm", m.receiver_norm), senders)
    k, v = mod_fc(m.key, x, sender_codes), mod_fc(m.value, x, sender_codes)
    q, k, v = (t.unflatten(-1, (m.heads, -1)) for t in (q, k, v))
    scores = einsum("buhd,bvhd->bhuv", q, k) / math.sqrt(q.shape[-1])
    if log_kernel is not None:
        scores = scores + (log_kernel if log_kernel.ndim == 2 else log_kernel[:, None])
    out = einsum("bhuv,bvhd->buhd", scores.softmax(-1), v).flatten(2)
    return m.gamma * mod_fc(m.exit, out, receiver_codes)


def propagator(m, receivers, senders, receiver_codes, sender_codes, signatures_u, signatures_v):
    receiver_codes, sender_codes = jitter(receiver_codes, m.training), jitter(sender_codes, m.training)
    K = kernel(signatures_u, signatures_v, m.attention.bandwidth)
    log_K = sampled_log_kernel(K, len(receivers)) if m.training else torch.log(K)
    out = latent_attention(m.attention, receivers, senders, receiver_codes, sender_codes, log_K)
    return mod_ffn(m.ffn, receivers + drop_path(m.drop_path, out), receiver_codes)


def read_out(m, receivers, senders, receiver_codes, sender_codes, signatures_u, signatures_v):
    receiver_codes, sender_codes = jitter(receiver_codes, m.training), jitter(sender_codes, m.training)
    log_K = torch.log(kernel(signatures_u, signatures_v, m.attention.bandwidth, truncate=False))
    out = latent_attention(m.attention, receivers, senders, receiver_codes, sender_codes, log_K)
    return mod_ffn(m.ffn, out, receiver_codes)


def pool(m, x):
    """Softmax over the latents' confidences, in training with Gumbel noise; classifier. B U D -> B K."""
    confidence = einsum("d,bud->bu", m.confidence_scorer.weight[0], x) + m.confidence_scorer.bias
    if m.training:
        noise = torch.empty_like(confidence[..., None]).exponential_()  # models.py's draw is B U 1
        confidence = confidence - torch.log(noise)[..., 0]
    pooled = einsum("bu,bud->bd", confidence.softmax(-1), x)
    return einsum("kd,bd->bk", m.to_logits.weight, pooled) + m.to_logits.bias


def nac(m, images):
    """The whole circuit. B 3 H W -> B K."""
    B, inputs, mediators, outputs = len(images), m.input_latents, m.mediator_latents, m.output_latents
    codes = torch.cat([inputs.codes, mediators.codes])
    signatures = torch.cat([inputs.signatures, mediators.signatures])
    x_in = seeder(m.seeder, inputs.codes, B)
    x_in = read_in(m.read_in, x_in, tokenizer(m.tokenizer, images), inputs.codes)
    x = seeder(m.seeder, mediators.codes, B)
    for p in m.propagators:
        senders = torch.cat([x_in, x], 1)
        x = propagator(p, x, senders, mediators.codes, codes, mediators.signatures, signatures)
    out, senders = seeder(m.seeder, outputs.codes, B), torch.cat([x_in, x], 1)
    out = read_out(m.read_out, out, senders, outputs.codes, codes, outputs.signatures, signatures)
    return pool(m.pool, out)


def moe(m, x):
    """out = Σ_k g_k · expert_{e_k}(x), token by token; a full expert turns a token away. B N D -> B N D."""
    tokens, E = x.flatten(0, 1), m.router.out_features
    limited = m.training and m.capacity
    room = [math.ceil(m.capacity * len(tokens) * m.top_k / E) if limited else len(tokens)] * E
    logits, chosen = (tokens @ m.router.weight.T + m.router.bias).topk(m.top_k)  # T k
    gates, out = logits.softmax(-1), list(torch.zeros_like(tokens))
    for k in range(m.top_k):  # all first choices before any second one
        for t, e in enumerate(chosen[:, k].tolist()):
            if room[e]:
                room[e] -= 1
                hidden = F.gelu(m.fc1_weight[e] @ tokens[t] + m.fc1_bias[e])
                out[t] = out[t] + gates[t, k] * (m.fc2_weight[e] @ hidden + m.fc2_bias[e])
    return torch.stack(out).view_as(x)
