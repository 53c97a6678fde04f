"""Stage 1, image-text pretraining: text to image and captioning from the same pairs (paper, "Multi-Stage Training").

    python launch/train.py --config=configs/stage1.py --workdir=runs/stage1 --config.streams.text_to_image.path=DATA
    python launch/train.py --config=configs/stage1.py:tiny --workdir=runs/tiny

Full size is 40 K of the 80 K steps of the first two stages (the paper gives their sum only), global batch 256, 512 px.
`tiny` trains on the shapes world (`python launch/prepare_data.py --format=shapes --output=data/shapes`).
"""

from unialign_jax.training.config import paper_config, stream, tiny


def get_config(size=""):
    config = paper_config(size)
    config.name = "stage1"
    config.num_steps = 40_000
    config.streams.text_to_image = stream("text_to_image", "data/text_to_image")
    config.model.remat = "dots"  # on 64 chips of v4 or v5p and 256 of v5e it fits; on fewer ask launch/plan.py --search
    if size == "tiny":
        tiny(config, num_steps=3000)
    return config
