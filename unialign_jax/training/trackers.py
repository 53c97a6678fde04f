"""A run's metrics in a tracking service, beside metrics.jsonl and TensorBoard: Weights & Biases (`tracker` = "wandb").

Its own settings are its environment variables: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY.
"""

import json
import os
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import jax
from ml_collections import ConfigDict

from unialign_jax.files import first_line, read_json, write_json

RUN_FILE = "wandb.json"  # in the run's folder: the id by which a resumed run is found again


class Tracker(Protocol):
    """A service that shows metrics."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Sends the metrics of a row of metrics.jsonl, by names such as "edit/loss"."""

    def close(self) -> None: ...


class WandbTracker:
    """A run of Weights & Biases with the configuration, the run's folder as its name, and the step as the x-axis.

    A resumed run continues the same one. Steps that are done again give the same numbers, so they may be sent twice.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        """Raises ValueError when Weights & Biases cannot start."""
        path = workdir / RUN_FILE
        run_id = read_json(path).get("id") if path.exists() else secrets.token_hex(8)
        if not isinstance(run_id, str) or not run_id:
            raise ValueError(f"{path} has no id of a run: remove it to start a new one")
        write_json(path, {"id": run_id})
        try:
            import wandb

            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "unialign_jax"),
                id=run_id,
                name=workdir.name,
                group=config.name or None,
                config=json.loads(config.to_json_best_effort()),
                dir=str(workdir),
                resume="allow",
            )
        except Exception as error:
            raise ValueError(
                f"Weights & Biases does not start ({first_line(error, 200)}): `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step} | values)

    def close(self) -> None:
        self._run.finish()


def check_tracker(config: ConfigDict) -> None:
    """Raises ValueError when the package of the configuration's tracker is missing."""
    if config.tracker and find_spec(config.tracker) is None:
        raise ValueError(f"tracker is {config.tracker!r}, but its package is missing: pip install {config.tracker}")


def open_tracker(config: ConfigDict, workdir: Path) -> Tracker | None:
    """The tracker of a run; None without one, and on hosts other than the first."""
    return WandbTracker(config, workdir) if config.tracker and jax.process_index() == 0 else None
