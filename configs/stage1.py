"""Stage 1, image-text pretraining: text to image and captioning from the same pairs (paper, "Multi-Stage Training").

    python launch/train.py --config=configs/stage1.py --workdir=runs/stage1 --config.streams.text_to_image.path=DATA

40,000 of the 80,000 steps that the paper gives for the first two stages together; batch 256, 512 px.
Time, planned by launch/plan.py and not measured (docs/tpu.md, 2026-11-29): 1.6 h on v5e-256, 4.0 h on v4-128,
2.3 h on v5p-128, 1.5 h on v6e-64, 0.5 h on v6e-256. Losses at full size are not known: nobody has run it.

    python launch/train.py --config=configs/stage1.py:tiny --workdir=runs/tiny

trains on the shapes world (`python launch/prepare_data.py --format=shapes --output=data/shapes`), 3,000 steps of 8.
Measured on one core of an AMD EPYC virtual machine, 2026-11-24: 45 samples/s, so about 9 minutes (arithmetic). A run of
1,200 steps (ema_decay=0.995, mean of three seeds) ended at validation losses of 0.72 (flow matching) and 0.46 (masked
text); docs/learning.md has the accuracies.
"""

from ml_collections import ConfigDict

from unialign_jax.configs.base import paper_config, stream, tiny


def get_config(size: str = "") -> ConfigDict:
    config = paper_config(size)
    config.num_steps = 40_000
    config.streams.text_to_image = stream("text_to_image", "data/text_to_image")
    config.model.remat = "dots"  # fits on 64 chips of v4 or v5p and 256 of v5e; on fewer use launch/plan.py --search
    return tiny(config, num_steps=3000) if size == "tiny" else config
