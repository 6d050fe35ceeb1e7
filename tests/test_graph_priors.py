"""Promises of the NAC's graph priors, at the paper's sizes: 256 and 768 mediators, signatures of 64 numbers.

1 Each graph is the one of its name: links, degrees, densities, components.
2 Each prior has its regularizer; a fitted graph can be held by signatures.

`python -m pytest -m slow -s tests/test_graph_priors.py` prints how well signatures can hold each prior.
"""

import math
import re

import numpy as np
import pytest
import torch

import models
from conftest import ROOT

PRIORS = ["scale_free", "planted_partition", "ring_of_cliques", "erdos_renyi"]
SIZES = {"tiny_imagenet_nac": (256, 2, 8), "imagenet_nac": (768, 6, 12)}  # mediators, graph_m, graph_groups
every_size = pytest.mark.parametrize("name", SIZES)
every_prior = pytest.mark.parametrize("prior", PRIORS)


def config(name, prior):
    """A paper's config with a prior and its regularizer; the rest of the NAC is narrow, to be quick."""
    return models.load_config(ROOT / f"configs/{name}.yaml", [
        f"assemble.graph={prior}", "student.width=16", "student.heads=1", "student.head_width=16",
        f"train.student.regularizer={1 if prior == 'planted_partition' else 0.1}"])


def graph(name, prior, seed=0):
    """The prior's graph, as the config has it, and the group of each node."""
    c = config(name, prior)
    n, a = c["student"]["latents"][1], c["assemble"]
    rng = np.random.default_rng(seed)
    linked = models.random_graph(prior, n, rng, m=a["graph_m"], groups=a["graph_groups"])
    return linked, np.arange(n) // (n // SIZES[name][2])


def components(linked):
    """Number of connected components: each node takes its neighbors' least number, until none changes."""
    least, before = np.arange(len(linked)), None
    while not np.array_equal(least, before):
        least, before = np.minimum(least, np.where(linked, least, len(least)).min(1)), least
    return len(set(least.tolist()))


def within_four_sigma(pairs, p):
    return abs(pairs.mean() - p) < 4 * math.sqrt(p * (1 - p) / len(pairs))


@every_size
def test_the_configs_hold_the_paper_s_graphs(name):
    c = config(name, "scale_free")
    graph = c["student"]["latents"][1], c["assemble"]["graph_m"], c["assemble"]["graph_groups"]
    assert graph == SIZES[name]
    assert c["student"]["signature_width"] == 64 and c["train"]["student"]["block_groups"] == 8


@every_size
@every_prior
def test_a_graph_is_undirected_without_loops_and_another_for_each_seed(name, prior):
    linked, _ = graph(name, prior)
    assert linked.shape == (SIZES[name][0],) * 2
    assert (linked == linked.T).all() and not linked.diagonal().any()
    assert (graph(name, prior, 1)[0] != linked).any() == (prior != "ring_of_cliques")


def test_groups_need_not_divide_the_number_of_nodes():
    for prior in PRIORS:
        linked = models.random_graph(prior, 37, np.random.default_rng(0), groups=4)
        assert linked.dtype == bool and (linked == linked.T).all() and not linked.diagonal().any()
        if prior == "ring_of_cliques":  # of 10, 9, 9, 9 nodes
            assert linked.sum() / 2 == 45 + 3 * 36 + 4 and components(linked) == 1


@every_size
def test_scale_free_degrees_follow_the_power_law(name):
    n, m, _ = SIZES[name]
    degrees = []
    for seed in range(10):
        linked, _ = graph(name, "scale_free", seed)
        degrees.append(linked.sum(1))
        assert linked.sum() == 2 * m * (n - m) and degrees[-1][m:].min() == m
    assert components(linked) == 1
    # Barabási–Albert: P(degree ≥ k) = m(m+1) / k(k+1), so 30 and 8.3 % for k = 2m and 4m of m = 2. A random
    # graph of as many links has next to no node of 4m, twice the mean.
    degrees = np.concatenate(degrees)
    for k in (m + 1, 2 * m, 4 * m):
        assert (degrees >= k).mean() == pytest.approx(m * (m + 1) / (k * (k + 1)), rel=0.15)
    assert degrees.max() > 12 * m


@every_size
def test_planted_partition_has_its_densities_within_and_across_groups(name):
    linked, group = graph(name, "planted_partition")
    same, upper = group[:, None] == group, np.triu(np.ones_like(linked), 1)  # bool n n
    assert within_four_sigma(linked[same & upper], 0.9) and within_four_sigma(linked[~same & upper], 0.2)
    for g in range(group.max() + 1):  # each group, not only their mean
        assert abs(linked[same & upper & (group == g)].mean() - 0.9) < 0.06


@every_size
def test_ring_of_cliques_is_one_ring(name):
    linked, group = graph(name, "ring_of_cliques")
    groups, k = SIZES[name][2], len(group) // SIZES[name][2]
    assert linked.sum() / 2 == groups * math.comb(k, 2) + groups
    bridges = linked & (group[:, None] != group)
    assert components(linked) == 1 and components(linked & ~bridges) == groups
    assert sorted(bridges.sum(1)) == [0] * (len(group) - 2 * groups) + [1] * 2 * groups
    a, b = np.nonzero(np.triu(bridges))
    for one, pieces in ((0, 1), (1, 2)):  # without any one bridge it is a chain, without two it falls apart
        linked[a[one], b[one]] = linked[b[one], a[one]] = False
        assert components(linked) == pieces


@every_size
def test_erdos_renyi_has_its_density_and_no_hubs(name):
    linked, _ = graph(name, "erdos_renyi")
    n = len(linked)
    assert within_four_sigma(linked[np.triu_indices(n, 1)], 0.1)
    deviations = (linked.sum(1) - 0.1 * (n - 1)) / math.sqrt(0.09 * (n - 1))  # binomial degrees
    assert abs(deviations).max() < 5 and 0.8 < deviations.std() < 1.2


@every_prior
def test_the_planted_partition_is_held_by_the_block_model_and_the_others_by_repulsion(prior):
    c = config("tiny_imagenet_nac", prior)
    model = models.build(c, "student")
    with torch.no_grad():  # as after fitting: groups are close together
        group = graph("tiny_imagenet_nac", prior)[1]
        model.mediator_latents.signatures += 12 * torch.from_numpy(np.eye(64, dtype=np.float32)[group])
    if prior == "planted_partition":
        expected = models.block_model(model, groups=8)
    else:
        expected = 0.1 * models.hinge_repulsion(model)
    assert torch.equal(models.regularizer(model, c), expected) and expected != 0


def test_a_graph_without_links_is_fitted():
    """Erdős–Rényi graphs of few mediators may have none."""
    near, far = models.fit_signatures(torch.zeros(4, 8), np.zeros((4, 4), bool), steps=3)
    assert near == 1 and 0 <= far <= 1


@pytest.mark.slow
@every_size
def test_fitted_signatures_hold_each_prior_as_far_as_64_numbers_can(name):
    """256 mediators: all pairs of every prior. 768: a ring of cliques; 64 numbers are too few for others."""
    for prior in PRIORS:
        c = config(name, prior)
        line = models.fit_graph_prior(models.build(c, "student"), c)
        print(f"\n{line}", flush=True)
        near, far = (float(share) for share in re.findall(r"([\d.]+) % of", line))
        assert min(near, far) >= (99 if name == "tiny_imagenet_nac" or prior == "ring_of_cliques" else 75)
