"""The one builder of a step: what it knows of a batch without data is what the data are."""

import jax
import pytest

from unialign_jax.training.loop import Trainer
from unialign_jax.training.program import StepProgram


@pytest.mark.parametrize("intrinsic", [0.1, 0.0])
def test_the_shapes_of_a_batch_are_those_of_the_data(small_config, intrinsic):
    trainer = Trainer(small_config("stage3", loss_weights__intrinsic_modal=intrinsic), jax.devices()[:1])
    assert len(trainer.streams) == 5
    for name, stream in trainer.streams.items():
        expected = {key: ((8, *value.shape), value.dtype) for key, value in stream[0].items()}
        assert {key: (x.shape, x.dtype) for key, x in trainer.batch_shapes(name).items()} == expected
        assert ("teacher_text" in expected) == (intrinsic > 0)


@pytest.mark.slow
def test_the_program_needs_no_data(small_config):
    config = small_config("stage2")
    for stream in config.streams.values():
        stream.path = "nowhere"
    program = StepProgram(config, jax.devices()[:2])
    assert program.mesh.size == 2 and set(program.settings) == set(config.streams)
    state, metrics = jax.eval_shape(
        program.step_function("edit"), program.abstract_state, program.abstract_frozen, program.batch_shapes("edit")
    )
    assert jax.tree.structure(state) == jax.tree.structure(program.abstract_state)
    assert metrics["loss"].shape == (2,)
