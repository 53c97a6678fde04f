"""Checkpoints of a run: saved in the background, whole or ignored, and restored onto any mesh.

Each save is a folder `checkpoints/<step>/state`; Orbax writes it under another name until it is whole. Restoring gives
the state or raises: a checkpoint of another architecture is refused with the leaves that differ, and in place of a
damaged one the one before it is restored. Only the rule on how many to keep deletes anything.

Orbax writes no checksums, so we record them after each save, in the background too, and compare them before a
checkpoint is used: a single flipped bit counts as damage. A checkpoint without them (of an earlier version, or of a run
that was killed between the save and the record) is used when its files are there in their whole length.

In a bucket (gs://) nothing can be renamed at once: there a checkpoint is whole when it has Orbax's marker, and its
checksums are those that the store keeps of its objects.
"""

import contextlib
import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from unialign_jax.files import first_line
from unialign_jax.files.places import Place, is_remote, move, place, reaching
from unialign_jax.integrity import checksums
from unialign_jax.parallel import processes
from unialign_jax.parallel.sharding import path_string
from unialign_jax.training.state import TrainState

log = logging.getLogger(__name__)

MARKER = "commit_success.txt"  # Orbax writes it last


class Checkpoints:
    """The checkpoints of one run's folder, which is made; all hosts take part in every call."""

    def __init__(self, workdir: str | Path, *, keep_last: int = 2, keep_every: int = 0):
        self.directory = place(workdir) / "checkpoints"
        try:
            with reaching(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_remote(self.directory):
                raise
            raise OSError(
                f"the run's folder {workdir} cannot be made ({error.strerror}: {error.filename}): choose another"
            ) from error
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(keep_last)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=policies.AnyPreservationPolicy(keep)
        )
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future | None = None
        self._failed = False

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, as process 0 sees them; all processes ask.

        Raises OSError, in all of them, when one does not see them all.
        """
        own = self._own_steps()
        steps = processes.from_first(own)
        self._refuse_if(
            set(steps) - set(own), f"process 0 sees the checkpoints {steps}, another not all of them (this one: {own})"
        )
        return steps

    def _own_steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def _refuse_if(self, differs, what: str):
        if processes.anywhere(bool(differs)):
            raise OSError(
                f"{self.directory}: {what}. --workdir must be on a file system that all hosts see alike; where a host "
                "keeps listings for a while (NFS), start again"
            )

    def save(self, state: TrainState, step: int) -> None:
        """Starts saving and returns once the arrays are copied; writing and checksums go on in the background.

        Waits for the save before it. Raises OSError when either cannot be written, or processes see different ones.
        """
        self._wait()
        if step in self.steps():
            return
        own = self._own_steps()
        self._refuse_if(step in own, f"process 0 sees no checkpoint {step}, another does (this one: {own})")
        with self._writing():
            response = self._checkpointer.save_checkpointables_async(step, {"state": state._asdict()}, force=True)
        self._under_way = self._background.submit(self._complete, response, self.directory / str(step))

    @staticmethod
    def _complete(response, directory: Place):
        response.result()  # which also ends the event loop and the thread that Orbax keeps for this save
        if jax.process_index() == 0:
            checksums.record(directory)

    def _wait(self):
        """Waits for the save under way. Raises OSError when it cannot be written."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            with self._writing():
                under_way.result()

    @contextlib.contextmanager
    def _writing(self):
        """Turns any error of Orbax's into one line about the disk."""
        try:
            yield
        except Exception as error:
            self._failed = True
            raise OSError(
                f"{self.directory}: the checkpoint could not be written: {_start(error)}. Look at the disk's space and "
                "rights; the checkpoints before it are whole"
            ) from error

    def restore_latest(self, abstract_state: TrainState) -> TrainState | None:
        """The newest whole checkpoint on the shardings of `abstract_state`, or None when there is none at all.

        A damaged one is passed over with a warning, and renamed to damaged-<step> once an older one is restored.
        Raises ValueError when a checkpoint has other leaves than `abstract_state` or another step than its name, or
        when all are damaged, and OSError when the processes see different ones; then nothing has been changed.
        """
        if unfinished := unfinished_checkpoints(self.directory):
            log.warning("%s: ignoring unfinished checkpoints %s", self.directory, ", ".join(unfinished))
        damaged = []
        for step in reversed(self.steps()):
            directory = self.directory / str(step)
            reason = agreed(directory, damage(directory))
            if reason is None:
                if not checksums.is_recorded(directory):
                    log.warning("%s has no checksums, so flipped bits in it would not be found", directory)
                if lines := differences(leaf_shapes(abstract_state._asdict()), stored_shapes(directory)):
                    raise ValueError(
                        f"{directory} holds another architecture than this configuration: {'; '.join(lines)}. "
                        "Choose another --workdir, or the configuration that the run was started with"
                    )
                try:
                    loaded = self._checkpointer.load_checkpointables(step, {"state": abstract_state._asdict()})
                except Exception as error:  # whatever a damaged file makes Orbax raise
                    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                        raise
                    reason = _start(error)
                reason = agreed(directory, reason)
            if reason is None:
                found = int(loaded["state"]["step"])
                if processes.anywhere(found != step):
                    raise ValueError(
                        f"{directory} holds the state of another step (in this process {found}): give the folder the "
                        "name of its step, or move it away"
                    )
                self._set_aside(damaged)
                return TrainState(**loaded["state"])
            log.warning("%s cannot be read: %s", directory, reason)
            damaged.append(step)
        if damaged:
            raise ValueError(
                f"{self.directory}: none of the checkpoints {damaged} can be read; nothing was changed. "
                "Bring one back, or choose another --workdir to start anew"
            )
        return None

    def _set_aside(self, steps):
        """Renames the checkpoints of these steps, so that the steps can be saved again."""
        for step in steps if jax.process_index() == 0 else ():
            kept, number = self.directory / f"damaged-{step}", 1
            while kept.exists():
                number += 1
                kept = self.directory / f"damaged-{step}-{number}"
            log.warning("%s/%d is kept as %s", self.directory, step, kept.name)
            move(self.directory / str(step), kept)
        if steps:
            processes.wait_for_all("damaged checkpoints set aside")
            self._checkpointer.reload()

    def close(self) -> None:
        """Waits until the save under way is whole. Raises OSError when it cannot be written."""
        try:
            self._wait()
        finally:
            self._background.shutdown()
        if not self._failed:  # Orbax would wait once more for a process that is gone
            with self._writing():
                self._checkpointer.close()


def is_committed(directory: Place) -> bool:
    """Whether Orbax has written a checkpoint whole: it renames it then, but in a bucket it adds a marker."""
    return not is_remote(directory) or (directory / MARKER).exists()


def unfinished_checkpoints(checkpoints: Place) -> list[str]:
    """The names of what killed saves left in a folder of checkpoints."""
    if is_remote(checkpoints):
        paths = checkpoints.iterdir() if checkpoints.exists() else ()  # a bucket has no empty folders
        return sorted(path.name for path in paths if path.name.isdigit() and not is_committed(path))
    return sorted(path.name for path in checkpoints.glob("*orbax-checkpoint-tmp*"))


def agreed(directory: Place, reason: str | None) -> str | None:
    """The reason why a checkpoint cannot be read, here or in another process: all must restore the same one."""
    if reason and jax.process_count() > 1:  # the others may be waiting for this process inside Orbax
        log.warning(
            "%s: process %d cannot read it (%s); agreeing with the others may take 5 minutes",
            directory,
            jax.process_index(),
            reason,
        )
    elsewhere = processes.anywhere(reason is not None)
    return reason or ("another process cannot read it" if elsewhere else None)


def damage(directory: Place) -> str | None:
    """The damage to a checkpoint that was once whole, in words, or None. Several processes share the reading.

    Without recorded checksums we check the marker, that the metadata name the arrays that are stored, and the last byte
    of every stored value, which a truncated file lacks: Orbax reads some such checkpoints as empty.
    """
    if checksums.is_recorded(directory):
        return checksums.difference(directory, jax.process_index(), jax.process_count())
    for name in (MARKER, "state/_METADATA", "state/manifest.ocdbt"):
        if not (directory / name).is_file():
            return f"{name} is missing"
    for path in () if is_remote(directory) else directory.rglob("*"):
        if not path.is_dir() and not path.is_file():
            return f"{path.relative_to(directory)} is no file"
    try:
        json.loads((directory / "state/_METADATA").read_bytes())
    except ValueError:
        return "state/_METADATA is damaged"
    if is_remote(directory):  # an object is there whole or not at all
        return None if stored_shapes(directory) else "its arrays are missing"
    try:
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/state/"}).result()
        keys = store.list().result()
        for last_byte in [store.read(key, byte_range=slice(-1, None)) for key in keys]:
            last_byte.result()
        named = {path.replace("/", ".") for path in stored_shapes(directory)}
    except Exception as error:  # tensorstore's errors are ValueErrors of many kinds, Orbax's of every kind
        return _start(error)
    folders = (key.decode().rpartition("/") for key in keys)
    if named != {folder for folder, _, name in folders if name in ("zarr.json", ".zarray")}:
        return "state/_METADATA or state/_sharding is damaged: they do not name the arrays that are stored"
    return None


def stored_shapes(directory: Place) -> dict[str, tuple]:
    """{path: shape} of the arrays in a checkpoint."""
    return leaf_shapes(ocp.checkpointables_metadata(directory).metadata["state"])


def leaf_shapes(tree: Any) -> dict[str, tuple]:
    """{path: shape} of a tree's arrays, or of their metadata."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def differences(expected: dict, found: dict, most: int = 8) -> list[str]:
    """Lines on the leaves in which two sets of shapes differ: at most `most`, and a count of the rest."""
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            lines.append(f"{path}: expected {expected.get(path, 'nothing')}, found {found.get(path, 'nothing')}")
    return lines if len(lines) <= most else lines[:most] + [f"and {len(lines) - most} more leaves"]


def _start(error) -> str:
    """The start of an error's first line: tensorstore's go on with pages of its own settings."""
    return first_line(error, 10_000).split(" [tensorstore_spec")[0][:300]
