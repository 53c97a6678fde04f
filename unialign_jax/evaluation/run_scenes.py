"""Accuracies of a run under way on held-out scenes, for its validations (`training.loop.train`)."""

import json
import logging
from collections.abc import Callable

import jax
from flax.traverse_util import flatten_dict

from unialign_jax import bundle
from unialign_jax.evaluation import shapes, shapes_run
from unialign_jax.inference.pipeline import Pipeline
from unialign_jax.models.quantization import dequantize_params
from unialign_jax.training import runs
from unialign_jax.training.loop import Trainer

log = logging.getLogger(__name__)

SCENES_AT_ONCE = 32


class RunScenes:
    """Scores a model under training on held-out scenes of the shapes world, as launch/evaluate.py does.

    Images are made by the run's sampling settings, texts by top_k at temperature 0, all on the mesh's first device.
    """

    leading = shapes_run.LEADING

    @classmethod
    def of(cls, trainer: Trainer) -> "RunScenes | None":
        """The scorer of a run, or None and a warning where its streams or processes allow none."""
        kinds = {
            stream.config.kind
            for stream in trainer.streams.values()
            if stream.records.metadata.parameters.get("source") == "shapes"
        }
        reason = "no stream has records of the shapes world" if not kinds else ""
        if jax.process_count() > 1:
            reason = f"they run in a single process, and there are {jax.process_count()}"
        if reason and jax.process_index() == 0:
            log.warning("validation.scenes is passed over: %s", reason)
        if reason:
            return None
        return cls(trainer, [task for task in shapes_run.TASKS if shapes_run.stream_of(task) in kinds])

    def __init__(self, trainer: Trainer, tasks: list[str]):
        config, networks = trainer.config, trainer.networks
        self._count, self._tasks, self._params = config.validation.scenes, tasks, {}
        self._mode = config.quantize_text_encoder
        settings = json.loads(config.to_json_best_effort())
        model = bundle.BundleConfig(
            transformer=networks.transformer.config,
            text_encoder=networks.text_encoder.config,
            autoencoder=networks.autoencoder.config,
            **runs.describe("this run", settings | {"init_from": ""}),
        )
        leaves = lambda name: flatten_dict(self._params[name], sep="/").items()  # noqa: E731
        run = runs.Run("this run", model, trainer.tokenizer, leaves, "", 0, "", None)
        self._pipeline = Pipeline.from_run(run, max_batch=SCENES_AT_ONCE, device=trainer.mesh.devices.flat[0])

    def __call__(self, transformer: dict, frozen: dict, alive: Callable[[], None]) -> dict[str, dict[str, float]]:
        """{task: {figure: its mean}}; `alive` is called before each batch of scenes."""
        if self._mode:
            frozen = frozen | {"text_encoder": dequantize_params(frozen["text_encoder"], self._mode)}
        self._params = frozen | {"transformer": transformer}
        try:
            return {task: self._score(task, alive) for task in self._tasks}
        finally:
            self._pipeline.unload("transformer")  # the next step gives these buffers away
            self._params = {}

    def _score(self, task: str, alive: Callable[[], None]) -> dict[str, float]:
        alive()
        results = shapes_run.run_task(
            self._pipeline,
            task,
            self._count,
            text_options={"decoding": "top_k", "temperature": 0.0},
            batch=SCENES_AT_ONCE,
            progress=lambda _: alive(),
        )
        return {name: figure["mean"] for name, figure in shapes.summary([r.scores for r in results]).items()}
