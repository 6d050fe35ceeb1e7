"""upcycle.py – sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a V-MoE from a ViT of its shape.

    python tools/upcycle.py --config configs/demo_vmoe.yaml dense=FILE out=FILE

Each expert starts as a copy of its block's MLP, the routers are new. A token's gates sum to 1, so at first
the V-MoE answers as the ViT does. To fine-tune it: tools/convert.py student_assembled=FILE.
"""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models


def main():
    config, words = models.command_line(__doc__, dense={"required": True}, out={"required": True})
    model, dense = models.build(config, "student"), models.load(words.dense)
    state = model.state_dict()
    for name, value in dense.state_dict().items():
        expert = re.sub(r"mlp\.(fc\d)\.", r"moe.\1_", name)  # mlp.fc1.weight H D -> moe.fc1_weight E H D
        name = expert if expert in state else name
        state[name] = value.expand_as(state[name]).clone() if name in state else value
    models.load_state(model, state, words.dense)
    content = {"model": state, "stage": "student", "imported": f"upcycled {Path(words.dense).name}",
               "config": config, "class_names": dense.class_names}
    models.write(words.out, lambda file: torch.save(content, file))


if __name__ == "__main__":
    models.run(main)
