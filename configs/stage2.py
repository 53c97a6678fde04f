"""Stage 2, joint pretraining on all image tasks; starts from the weights of stage 1 (paper, "Multi-Stage Training").

    python launch/train.py --config=configs/stage2.py --workdir=runs/stage2 --config.init_from=runs/stage1

The other 40,000 of the 80,000 steps of the first two stages. The paper interleaves text-to-image batches with the
conditional tasks and gives no shares; every other step here is text to image, as in the released code.
Time, planned by launch/plan.py and not measured (docs/tpu.md, 2026-11-29): 2.4 h on v5e-256, 6.0 h on v4-128,
3.3 h on v5p-128. Losses at full size are not known: nobody has run it.

    python launch/train.py --config=configs/stage2.py:tiny --workdir=runs/tiny2 --config.init_from=runs/tiny

Measured on one core of an AMD EPYC virtual machine, 2026-11-24, in the longer run of docs/learning.md: 37 samples/s, so
about 11 minutes for these 3,000 steps of 8 (arithmetic). After 400 steps of edits and text to image, on top of 1,200
steps of stage 1, the validation loss of edits was 0.81 (flow matching).
"""

from ml_collections import ConfigDict

from unialign_jax.configs.base import paper_config, stream, tiny


def get_config(size: str = "") -> ConfigDict:
    config = paper_config(size)
    config.num_steps = 40_000
    config.init_from = "runs/tiny" if size == "tiny" else "runs/stage1"
    config.streams.text_to_image = stream("text_to_image", "data/text_to_image", weight=3.0)
    for name in ("edit", "perception", "personalization"):
        config.streams[name] = stream(name, f"data/{name}")
    return tiny(config, num_steps=3000) if size == "tiny" else config
