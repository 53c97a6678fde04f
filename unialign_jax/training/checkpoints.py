"""Checkpoints of a run: saved in the background, whole or ignored, and restored onto any mesh.

A folder `checkpoints/<step>/state` per save, written by Orbax under a name of its own until it is whole. Restoring
either gives the state or raises: a checkpoint of another architecture is refused with the leaves that differ, a damaged
one is set aside by name and the one before it is taken.
"""

import logging
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from unialign_jax.sharding import path_string
from unialign_jax.training.state import TrainState

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run's folder; all hosts take part in every call."""

    def __init__(self, workdir, *, keep_last=2, keep_every=0):
        self.directory = Path(workdir).absolute() / "checkpoints"
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(keep_last)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=policies.AnyPreservationPolicy(keep)
        )

    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState, step: int):
        """Starts saving and returns once the arrays are copied; the writing goes on in the background."""
        if step not in self.steps():
            self._checkpointer.save_checkpointables_async(step, {"state": state._asdict()}, force=True)

    def restore_latest(self, abstract_state: TrainState) -> TrainState | None:
        """The newest whole checkpoint on the shardings of `abstract_state`, or None when there is none at all.

        Raises ValueError when a checkpoint has other leaves than `abstract_state`, or when every one is damaged.
        """
        unfinished = sorted(path.name for path in self.directory.glob("*") if _is_unfinished(path))
        if unfinished:
            log.warning("%s: ignoring unfinished checkpoints %s", self.directory, ", ".join(unfinished))
        steps = self.steps()
        for step in reversed(steps):
            try:
                found = _leaf_shapes(self._checkpointer.checkpointables_metadata(step).metadata["state"])
                differences = _differences(_leaf_shapes(abstract_state._asdict()), found)
                if not differences:
                    loaded = self._checkpointer.load_checkpointables(step, {"state": abstract_state._asdict()})
            except Exception as error:  # noqa: BLE001 - whatever a damaged file makes Orbax raise; it is reported below
                self._set_aside(step, error)
                continue
            if differences:
                raise ValueError(
                    f"{self.directory}/{step} holds another architecture than this configuration: "
                    + "; ".join(differences)
                    + ". Choose another --workdir, or the configuration that the run was started with"
                )
            return TrainState(**loaded["state"])
        if steps:
            raise ValueError(
                f"{self.directory}: none of the checkpoints {steps} can be read; they are kept as damaged-*. "
                "Choose another --workdir to start anew"
            )
        return None

    def _set_aside(self, step, error):
        damaged = self.directory / f"damaged-{step}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        log.warning("%s/%s cannot be read and is kept as %s: %s", self.directory, step, damaged.name, reason)
        if jax.process_index() == 0:
            number = 1
            while damaged.exists():
                number += 1
                damaged = self.directory / f"damaged-{step}-{number}"
            (self.directory / str(step)).rename(damaged)
        self._checkpointer.reload()

    def close(self):
        """Waits for the save under way, so that it is whole."""
        self._checkpointer.close()


def load_params(run, abstract, weights="raw"):
    """Trained parameters of another run, onto the shardings of `abstract` ({"transformer": ..., "heads": ...}).

    Args:
      run: the other run's folder.
      weights: "raw", or "ema" for the averaged transformer.

    Raises ValueError when the folder has no checkpoint or its leaves differ, FileNotFoundError when it is not there.
    """
    directory = Path(run).absolute() / "checkpoints"
    if not directory.is_dir():
        raise FileNotFoundError(f"init_from: {run} is no run's folder, it has no checkpoints/ inside")
    with ocp.training.Checkpointer(directory) as checkpointer:
        if checkpointer.latest is None:
            raise ValueError(f"init_from: {directory} holds no whole checkpoint")
        step = checkpointer.latest.step
        found = _leaf_shapes(checkpointer.checkpointables_metadata(step).metadata["state"])
    wanted = {"params": dict(abstract)}
    if weights == "ema":
        if not any(path.startswith("ema/") for path in found):
            raise ValueError(f"init_from: {directory}/{step} keeps no EMA; use init_weights=raw")
        wanted = {"params": {"heads": abstract["heads"]}, "ema": abstract["transformer"]}
    expected = _leaf_shapes(wanted)
    branches = ("params/",) if weights == "raw" else ("params/heads/", "ema/")
    differences = _differences(expected, {path: s for path, s in found.items() if path.startswith(branches)})
    if differences:
        raise ValueError(f"init_from: {directory}/{step} does not fit this configuration: {'; '.join(differences)}")
    options = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    with ocp.Context(pytree_options=options):
        loaded = ocp.load_checkpointables(directory / str(step), {"state": wanted})["state"]
    if weights == "ema":
        return {"transformer": loaded["ema"], "heads": loaded["params"]["heads"]}
    return loaded["params"]


def _is_unfinished(path: Path) -> bool:
    return path.is_dir() and "orbax-checkpoint-tmp" in path.name


def _leaf_shapes(tree) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _differences(expected: dict, found: dict, most=8) -> list[str]:
    """What two sets of leaf shapes disagree on, at most `most` lines and a count of the rest."""
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            lines.append(f"{path}: expected {expected.get(path, 'nothing')}, found {found.get(path, 'nothing')}")
    return lines if len(lines) <= most else lines[:most] + [f"and {len(lines) - most} more leaves"]
