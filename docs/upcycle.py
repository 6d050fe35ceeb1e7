"""upcycle.py – sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a V-MoE from a ViT of its shape.

    python docs/upcycle.py --config configs/demo_vmoe.yaml dense=FILE out=FILE

Each expert starts as a copy of its block's MLP, the routers are new. A token's gates sum to 1, so at first
the V-MoE answers as the ViT does. Fine-tune it with student.start=FILE (docs/reproduce.sh, upcycling).
"""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models


def main():
    needed = {"required": True}
    config, words = models.command_line(__doc__, ["student"], dense=needed, out=needed)
    state = models.build(config, "student").state_dict()
    for name, value in models.load(words.dense).state_dict().items():
        expert = re.sub(r"mlp\.(fc\d)\.", r"moe.\1_", name)  # mlp.fc1.weight H D -> moe.fc1_weight E H D
        state[expert] = value.expand_as(state[expert]).clone()
    torch.save(state, words.out)


models.run(main)
