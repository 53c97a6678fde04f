"""Stage 2, joint pretraining on all image tasks; starts from the weights of stage 1 (paper, "Multi-Stage Training").

    python launch/train.py --config=configs/stage2.py --workdir=runs/stage2 --config.init_from=runs/stage1
    python launch/train.py --config=configs/stage2.py:tiny --workdir=runs/tiny2 --config.init_from=runs/tiny

Full size is the other 40 K of the 80 K steps of the first two stages. The paper interleaves text-to-image batches with
the conditional tasks and gives no shares; as in the released code, every other step here is one of text to image.
"""

from unialign_jax.training.config import paper_config, stream, tiny


def get_config(size=""):
    config = paper_config(size)
    config.name = "stage2"
    config.num_steps = 40_000
    config.init_from = "runs/stage1"
    config.streams.text_to_image = stream("text_to_image", "data/text_to_image", weight=3.0)
    config.streams.edit = stream("edit", "data/edit")
    config.streams.perception = stream("perception", "data/perception")
    config.streams.personalization = stream("personalization", "data/personalization")
    if size == "tiny":
        tiny(config, num_steps=3000)
        config.init_from = "runs/tiny"
    return config
