"""Stage 3, supervised fine-tuning with question answering added; starts from the weights of stage 2.

    python launch/train.py --config=configs/stage3.py --workdir=runs/stage3 --config.init_from=runs/stage2
    python launch/train.py --config=configs/stage3.py:tiny --workdir=runs/tiny3 --config.init_from=runs/tiny2

Full size is 30 K steps on high-quality data (the paper names BLIP-3o, ShareGPT-4o and LLaVA-OneVision).
"""

from unialign_jax.training.config import paper_config, stream, tiny


def get_config(size=""):
    config = paper_config(size)
    config.name = "stage3"
    config.num_steps = 30_000
    config.init_from = "runs/stage2"
    config.streams.text_to_image = stream("text_to_image", "data/text_to_image")
    config.streams.edit = stream("edit", "data/edit")
    config.streams.perception = stream("perception", "data/perception")
    config.streams.personalization = stream("personalization", "data/personalization")
    config.streams.vqa = stream("vqa", "data/vqa", weight=2.0)
    if size == "tiny":
        tiny(config, num_steps=3000)
        config.init_from = "runs/tiny2"
    return config
