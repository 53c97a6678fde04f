"""Fine-tuning by LoRA: adapters of a trained model learn a style, a subject or a domain from few pictures.

    python launch/train.py --config=configs/finetune.py --workdir=runs/mine --config.init_from=bundles/unialign \
        --config.streams.text_to_image.path=data/mine

docs/finetuning.md has a recipe for each use. Rank, rate and steps are the usual ones for few pictures at batch 4; at
full size nobody has run it yet, neither on a GPU nor on a TPU.

    python launch/train.py --config=configs/finetune.py:tiny --workdir=runs/mine

is the same for the demo bundle: 300 steps of 8 on data/finetune/text_to_image.
"""

from ml_collections import ConfigDict

from unialign_jax.configs.base import paper_config, stream, tiny


def get_config(size: str = "") -> ConfigDict:
    config = paper_config(size)
    config.streams.text_to_image = stream("text_to_image", "data/finetune/text_to_image")
    if size == "tiny":
        tiny(config, num_steps=300)
        config.streams.text_to_image.path = "data/finetune/text_to_image"
    config.num_steps = 300 if size == "tiny" else 1000
    config.init_from = "demo" if size == "tiny" else "bundles/unialign"
    config.batch_size = 8 if size == "tiny" else 4
    config.lora.rank = 16
    config.lora.alpha = 16.0
    # With few pictures the others of a batch are often of the same thing, and no negatives; the heads stay out.
    config.loss_weights.update({"cross_modal": 0.0, "intrinsic_modal": 0.0})
    config.optimizer.update({"learning_rate": 2e-3 if size == "tiny" else 1e-4, "warmup_steps": 20})
    config.optimizer.weight_decay = 0.0  # would draw the adapters' factors apart from what they have learned
    config.ema_decay = 0.98 if size == "tiny" else 0.99
    config.data.max_epochs_warning = 0  # few pictures are read very often
    config.checkpoint.update({"every": 100, "keep_every": 0})
    config.samples.every = 0 if size == "tiny" else 250
    return config
