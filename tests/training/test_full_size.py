"""The full-size stages: what can be known of them without the memory to run them."""

import logging
import math

import jax
import jax.numpy as jnp
import pytest

from unialign_jax.data.shapes.tasks import write_shapes
from unialign_jax.training.config import load_stage
from unialign_jax.training.loop import Trainer

# Steps of the paper: 80K over the first two stages, 30K in the third.
STEPS = {"stage1": 40_000, "stage2": 40_000, "stage3": 30_000}


@pytest.mark.parametrize("stage", STEPS)
def test_recipe_is_the_papers(stage):
    config = load_stage(stage)
    assert config.num_steps == STEPS[stage]
    assert (config.batch_size, config.image_size, config.text_length) == (256, 512, 256)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (3e-5, 1e-2)
    assert dict(config.loss_weights) == {
        "flow_matching": 1.0, "masked_text": 0.2, "cross_modal": 0.05, "intrinsic_modal": 0.1
    }  # fmt: skip
    assert config.model.tap_depth == 8


@pytest.mark.slow
def test_the_step_of_every_stream_fits_together_at_full_size(tmp_path, caplog):
    write_shapes(tmp_path, num_records=2, teacher_width=3584)
    config = load_stage("stage3")
    config.model.attention = "xla"
    for name, stream in config.streams.items():
        stream.path = str(tmp_path / name)
    trainer = Trainer(config, jax.devices())
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainer.abstract_state.params))
    assert trained == 2_102_843_812 + 20_982_784
    # Counted by hand: 17.9 TFLOP a sample of text to image, 24.8 with one condition image.
    assert math.isclose(trainer.sample_flops["edit"], 24.8e12, rel_tol=0.01)
    assert math.isclose(trainer.sample_flops["text_to_image"], 17.9e12, rel_tol=0.01)
    with caplog.at_level(logging.INFO):
        trainer.batches(0)
    # The largest batch is personalization's: four images of 512 pixels, two texts of 256 tokens, teacher features.
    assert "data: 2 batches ahead, 3.24 GB of this host's memory" in caplog.text
    assert "256 rows, up to 809.6 MB a batch" in caplog.text
    for name, stream in trainer.streams.items():
        example = stream[0]
        assert example["image"].shape == (512, 512, 3) and example["text_ids"].shape == (256,)
        batch = {key: jax.ShapeDtypeStruct((256, *x.shape), x.dtype) for key, x in example.items()}
        state, metrics = jax.eval_shape(
            trainer.step_function(name), trainer.abstract_state, trainer.abstract_frozen, batch
        )
        assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, trainer.abstract_state)
        assert metrics["loss"].dtype == jnp.float32
