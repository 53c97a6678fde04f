"""The recipe that all stages share: every key of a configuration with its default and its meaning.

The values are the paper's (arXiv 2509.23760, implementation details); where the paper is silent, the released code's.
A stage file calls `paper_config`, names its streams and changes what differs. `tiny` turns a stage into a run for a
laptop. On the command line every key is `--config.KEY=VALUE`, with dots between groups.
"""

import dataclasses

from ml_collections import ConfigDict

from unialign_jax.data.kinds import KINDS
from unialign_jax.models import presets


def stream(
    kind: str, path: str, weight: float = 1.0, num_conditions: int | None = None, validation_path: str = ""
) -> ConfigDict:
    """One task stream, an entry of `streams`."""
    if num_conditions is None:
        num_conditions = KINDS[kind].num_conditions if kind in KINDS else 0  # the check names an unknown kind
    return ConfigDict(
        {
            "kind": kind,  # of the records, see data/kinds.py: text_to_image, edit, perception, personalization, vqa
            "path": path,  # folder of records
            "weight": float(weight),  # share of the optimizer steps, relative to the other streams; 0: not used
            "num_conditions": num_conditions,  # condition images of a sample
            "validation_path": validation_path,  # folder of held-out records; "": the last records of `path`
        }
    )


def paper_config(size: str = "") -> ConfigDict:
    """The full-size recipe. Raises ValueError for a `size` that is neither "" nor "tiny"."""
    if size not in ("", "tiny"):
        raise ValueError(f"unknown size {size!r} after the configuration's name, expected nothing or :tiny")
    return ConfigDict(
        {
            "name": "",  # of the stage; "": the name of its file
            "seed": 0,  # of the weights, the order of the data, and every random draw
            "num_steps": 0,  # optimizer steps of the run
            "batch_size": 256,  # samples per optimizer step, over all hosts
            "accumulation": 1,  # micro-batches per optimizer step; their gradients are averaged
            "image_size": 512,  # pixels per side
            "text_length": 256,  # tokens
            # Weights to start from
            "init_from": "",  # a run's folder or a bundle; "": random weights
            "init_weights": "raw",  # "raw" or "ema", of the run `init_from`
            "frozen_from": "",  # the bundle of T5 and autoencoder; "": that of init_from, else random encoders
            # "": T5 computes in its dtype. "int8": its matmul weights are kept in 8 bits, half of bfloat16's memory, so
            # that fewer chips share them; "w8a8" and "fp8": their inputs are rounded too (models/quantization.py)
            "quantize_text_encoder": "",
            "tokenizer": "",  # a T5 tokenizer folder; "": that of init_from or frozen_from, else the shapes world's
            "teacher": {
                "path": "",  # the teacher's bundle (launch/convert.py teacher)
                "online": False,  # True: it runs in every step; False: its features are stored with the records
                "grid": 0,  # pixels a side of the cells in which images are compared, such as 32; 0: whole images
            },
            # Low-rank adapters in place of all weights (docs/finetuning.md). Only they are trained, saved and averaged;
            # the transformer of init_from stays as it is, in its compute dtype, and the alignment heads are left out.
            # quantize_base "int8" keeps the matmul weights of its blocks in 8 bits (QLoRA): half of bfloat16's memory.
            "lora": {
                "rank": 0,  # of the adapters; 0: no adapters, all weights are trained
                "alpha": 16.0,  # the change is alpha / rank * A B
                "targets": (r"blocks/.*/(qkv|out)/kernel$",),  # regular expressions over the transformer's paths
                "dora": False,  # True: also a gain of each output's weights (DoRA)
                "dropout": 0.0,  # share of an adapter's inputs that a training step leaves out
                "quantize_base": "",  # "" or "int8"
            },
            # Networks: the fields of their dataclasses in models/, filled from a preset (models/presets.py). Bundles
            # store these groups, so the two switches of the released heads, final_silu and pool, are in `heads`.
            "model": dataclasses.asdict(presets.MMDIT["unialign_2b"]) | {"attention": "auto"},
            "heads": dataclasses.asdict(presets.ALIGNMENT_HEADS["unialign_2b"]),
            "text_encoder": dataclasses.asdict(presets.TEXT_ENCODER["t5_xxl"]),
            "autoencoder": dataclasses.asdict(presets.AUTOENCODER["sd3"]),
            # Diffusion and losses
            "sigma": {"mean": 0.0, "std": 1.0, "shift": 1.0},  # shift(sigmoid(mean + std * normal)), diffusion/flow.py
            "min_mask_fraction": 1e-3,  # mask fractions are uniform from here to 1
            "prompt_dropout": 0.1,  # share of samples whose image pass reads the empty prompt
            "loss_weights": {"flow_matching": 1.0, "masked_text": 0.2, "cross_modal": 0.05, "intrinsic_modal": 0.1},
            "cross_modal": {"temperature": 0.07},
            # Where the paper and its released code differ. Change these to reproduce the one or the other.
            "parity": {
                "flow_matching_form": "velocity",  # the paper's; "x0": times sigma^2, as the checkpoint was trained
                "masked_text_normalization": "positions",  # divide by B * L; "maskable": by the maskable positions
                "cross_modal_direction": "symmetric",  # the code's; "image_to_text": the paper's equation 3
                "sigma_levels": 0,  # 0: continuous sigma; 1000: the code's grid
                "decay_1d": True,  # weight decay on biases and norm scales too, as in the code
            },
            # Optimizer: AdamW, training/optimizer.py
            "optimizer": {
                "learning_rate": 3e-5,
                "warmup_steps": 2000,
                "cooldown_start": 0,  # the step at which the rate begins to fall linearly to 0,
                "cooldown_steps": 0,  # and for how many steps; 0: it stays constant, as in the paper
                "weight_decay": 1e-2,
                "clip_norm": 2.0,  # largest global norm of the gradients
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "mu_dtype": "float32",  # of Adam's first moment; "bfloat16" takes 2 bytes a weight less
                "freeze": (),  # regular expressions over parameter paths, such as "transformer/text_embed"
            },
            "ema_decay": 0.9999,  # of the weights' average; at step n at most (1 + n) / (10 + n); 0: no average
            # Data
            "streams": {},  # {name: stream(...)}
            "data": {
                "num_threads": 16,  # that read rows
                "prefetch": 64,  # batches read ahead, at most
                "prefetch_gb": 4.0,  # memory of each host for batches, in GB of 1e9 bytes
                "buckets": False,  # True: streams' folders hold a folder for each aspect ratio (data/buckets.py)
                "cached_latents": False,  # True: read the autoencoder's moments, not images (prepare_data.py encode)
                "max_epochs_warning": 20,  # a warning when a stream's records are read more often than that; 0: none
                "max_bad_fraction": 0.01,  # a run stops when more of its records cannot be decoded
            },
            # Devices per axis (parallel/sharding.py says what each axis does). All 0: chosen for the machine
            # (training/meshes.py). If any axis is set, the axes left at 0 count as 1; -1 means all remaining devices.
            "mesh": {"replica": 0, "data": 0, "state": 0, "encoder": 0, "fsdp": 0, "context": 0, "tensor": 0},
            "compilation_cache": "",  # keeps compiled programs between starts; "": the user's folder, "none": nothing
            # What a run writes
            "tracker": "",  # beside metrics.jsonl and TensorBoard: "wandb", training/trackers.py; "": none
            "log_every": 20,  # batches of a stream per row of metrics.jsonl
            "checkpoint": {
                "every": 1000,  # steps
                "keep_last": 2,  # newest checkpoints that are kept,
                "keep_every": 10000,  # and those of every so many steps; 0: no others
            },
            "samples": {
                "every": 2000,  # steps; 0: at the end only
                "count": 8,  # of each stream; 0: none
                "prompts": (),  # prompts of one's own, which images are made of as well
                "steps": 28,  # of the image sampler
                "guidance_scale": 7.0,
                "shift": 3.0,  # of the sampler's sigmas
                "caption_steps": 32,
            },
            "validation": {  # losses on held-out records, training/validation.py
                "every": 0,  # steps, and at the end; 0: never
                "records": 64,  # held out of each stream, rounded up to whole batches; training does not draw them
                "scenes": 0,  # of the shapes world, for accuracies per task; 0: none
            },
        }
    )


def tiny(config: ConfigDict, num_steps: int) -> ConfigDict:
    """Changes a stage into a run for a laptop: 2.6 M parameters on the 64-pixel shapes world, minutes on two CPU cores.

    The frozen T5 and autoencoder are small ones, pretrained on the shapes world; the package's demo bundle has them.
    """
    config.update(
        {
            "num_steps": num_steps,
            "frozen_from": "demo",
            "batch_size": 8,
            "image_size": 64,
            "text_length": 32,
            "model": dataclasses.asdict(presets.MMDIT["tiny"]),
            "heads": dataclasses.asdict(presets.ALIGNMENT_HEADS["tiny"]),
            "text_encoder": dataclasses.asdict(presets.TEXT_ENCODER["tiny"]),
            "autoencoder": dataclasses.asdict(presets.AUTOENCODER["tiny"]),
            "sigma": {"shift": 3.0},  # layout is decided near sigma 1, for flat shapes show through much noise
            "loss_weights": {"masked_text": 1.0},  # texts are short, and captions count as much as pictures
            "optimizer": {"learning_rate": 1.2e-3, "warmup_steps": 100, "clip_norm": 1.0, "b2": 0.99},
            "ema_decay": 0.999,
            "data": {"num_threads": 2, "prefetch": 8},
            "checkpoint": {"every": 200, "keep_every": 0},
            "samples": {"every": 0, "steps": 16, "guidance_scale": 2.0, "shift": 2.0},
        }
    )
    # A short run needs a high rate, and a fall at its end: weights at a high rate stay noisy.
    steps = config.get_oneway_ref("num_steps")
    config.optimizer.cooldown_steps = steps * 3 // 10
    config.optimizer.cooldown_start = steps - steps * 3 // 10
    for name, settings in config.streams.items():
        settings.path = f"data/shapes/{name}"
    return config
