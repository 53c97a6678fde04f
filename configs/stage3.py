"""Stage 3, supervised fine-tuning with question answering added; starts from the weights of stage 2.

    python launch/train.py --config=configs/stage3.py --workdir=runs/stage3 --config.init_from=runs/stage2

30,000 steps on high-quality data (the paper names BLIP-3o, ShareGPT-4o and LLaVA-OneVision).
Time, planned by launch/plan.py and not measured (docs/tpu.md, 2026-11-29): 1.6 h on v5e-256, 4.1 h on v4-128,
2.2 h on v5p-128. Losses at full size are not known: nobody has run it.

    python launch/train.py --config=configs/stage3.py:tiny --workdir=runs/tiny3 --config.init_from=runs/tiny2

Measured on one core of an AMD EPYC virtual machine, 2026-11-24, in the longer run of docs/learning.md: 46 samples/s, so
about 9 minutes for these 3,000 steps of 8 (arithmetic). Its losses were not noted; docs/learning.md has the accuracies.
"""

from ml_collections import ConfigDict

from unialign_jax.configs.base import paper_config, stream, tiny


def get_config(size: str = "") -> ConfigDict:
    config = paper_config(size)
    config.num_steps = 30_000
    config.init_from = "runs/tiny2" if size == "tiny" else "runs/stage2"
    for name in ("text_to_image", "edit", "perception", "personalization"):
        config.streams[name] = stream(name, f"data/{name}")
    config.streams.vqa = stream("vqa", "data/vqa", weight=2.0)
    return tiny(config, num_steps=3000) if size == "tiny" else config
