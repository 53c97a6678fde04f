"""The program of a training step, built in one place for runs, plans and benchmarks. Nothing is allocated or read."""

from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from unialign_jax import bundle
from unialign_jax.models.lora import LoraConfig
from unialign_jax.models.quantization import quantize_module
from unialign_jax.models.teacher import TeacherConfig
from unialign_jax.parallel.mesh import make_mesh
from unialign_jax.training.config import active_streams, build_configs, config_problems, listed
from unialign_jax.training.meshes import mesh_for
from unialign_jax.training.optimizer import make_optimizer
from unialign_jax.training.state import Networks, abstract_frozen, abstract_state
from unialign_jax.training.step import batch_shapes, lower_train_step, make_train_step


def check_config(config: ConfigDict, devices: Sequence[jax.Device]) -> None:
    """Raises ValueError with all problems of a configuration on these devices."""
    if problems := config_problems(config, len(devices), devices[0]):
        raise ValueError(listed("the configuration cannot run", problems))


def make_networks(config: ConfigDict, devices: Sequence[jax.Device]) -> Networks:
    """The networks of a configuration that can run on these devices.

    Raises ValueError with all its problems, and FileNotFoundError or ValueError for a teacher that cannot be read.
    """
    check_config(config, devices)
    networks = Networks.create(*build_configs(config, devices[0]))
    if config.quantize_text_encoder:
        module = quantize_module(networks.text_encoder, config.quantize_text_encoder)
        networks = networks._replace(text_encoder=module)
    if config.teacher.online and config.loss_weights.intrinsic_modal:
        networks = networks._replace(teacher=read_teacher(config))
    return networks._replace(lora=LoraConfig.of(config.lora.to_dict()))


def read_teacher(config: ConfigDict) -> TeacherConfig:
    """The architecture of the teacher of `teacher.path`. Raises FileNotFoundError or ValueError as bundles do."""
    teacher = bundle.read_config(config.teacher.path, verify=False).teacher
    if teacher is None:
        raise ValueError(f"teacher.path: {config.teacher.path} holds no teacher (launch/convert.py teacher)")
    if teacher.output_width != config.heads.teacher_width:
        raise ValueError(
            f"the teacher {config.teacher.path} has features of width {teacher.output_width}, "
            f"heads.teacher_width is {config.heads.teacher_width}"
        )
    return teacher


class StepProgram:
    """Everything that the train steps of a configuration are compiled from, for some devices.

    Attributes:
      settings: {stream: its configuration}, of the streams with a weight above 0.
      mesh_choice: sizes of the mesh's axes, with the reason.
      tx, schedule: the optimizer and its learning rate.
      abstract_state, abstract_frozen: shapes, dtypes and shardings of the state and of the frozen networks.
      token_ids: of mask and end of text. They change no shape, so any serve where no data is read.
    """

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device]):
        """Raises ValueError with all problems of the configuration."""
        networks = make_networks(config, devices)
        self.config, self.settings = config, active_streams(config)
        self.mesh_choice = mesh_for(config, devices, networks)
        self.mesh = make_mesh(**self.mesh_choice.sizes, devices=devices)
        self.networks = networks.on(self.mesh)
        self.tx, self.schedule = make_optimizer(**config.optimizer, decay_1d=config.parity.decay_1d)
        self.abstract_state = abstract_state(self.networks, self.tx, config.ema_decay, self.mesh)
        self.abstract_frozen = abstract_frozen(self.networks, self.mesh)
        self.token_ids = (config.model.vocab_size - 1, 1)

    def batch_shapes(self, name: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The global batch of a stream."""
        return batch_shapes(self.config, self.settings[name])

    def step_function(self, name: str):
        """The stream's step (state, frozen, batch) -> (state, metrics), not compiled."""
        kind = self.settings[name].kind
        return make_train_step(self.config, self.networks, self.tx, self.schedule, kind, *self.token_ids)

    def lower_step(self, name: str) -> jax.stages.Lowered:
        """The stream's step, ready to compile."""
        step, batch = self.step_function(name), self.batch_shapes(name)
        return lower_train_step(step, self.mesh, self.abstract_state, self.abstract_frozen, batch)

    def compile_step(self, name: str) -> jax.stages.Compiled:
        """The stream's step as one executable: it cannot compile again, and refuses another shape."""
        return self.lower_step(name).compile()
