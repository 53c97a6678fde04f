"""A model by the name that a command line gives it: checked at once, opened as a `Pipeline` when it is needed."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from unialign_jax import __version__, bundle, files
from unialign_jax.conversion.lora import new_name, parse_reference
from unialign_jax.files.places import place
from unialign_jax.inference.pipeline import Pipeline
from unialign_jax.parallel import processes
from unialign_jax.training import runs


class ModelSource:
    """A bundle, or the newest checkpoint of a training run, by name.

    Attributes:
      folder, config: of the bundle or the run.
      run: the opened `runs.Run`; None for a bundle.
      digest: 16 hexadecimal digits that tell its weights from others, its LoRAs included.
      loras: {name: (file, scale)} of the LoRAs that change it, in this order; names as `Pipeline.load_lora` gives them.
    """

    def __init__(self, name: str | Path, *, weights: str | None = None, verify: bool = True, loras: Sequence[str] = ()):
        """Args:
          weights, verify: as in `Pipeline.from_bundle`.
          loras: FILE or FILE:SCALE each, as `Pipeline.load_lora` reads them.

        Raises FileNotFoundError or ValueError, in one line, for what cannot be opened.
        """
        self._verify, self.run = verify, None
        self.loras = {}
        for path, scale in map(parse_reference, loras):
            self.loras[new_name(path, self.loras)] = (path, scale)
        folder = self.folder = bundle.locate(name)
        if not bundle.is_bundle(folder) and runs.is_run(folder):
            self.run = runs.open_to_sample(folder, weights, verify=verify)
            self.config, self.digest = self.run.config, self._with_loras(self.run.digest)
            return
        if weights:
            raise ValueError(f"--weights goes with a run's folder, and {folder} is none")
        self.config = bundle.read_config(folder, verify=verify)
        # config.json has the hashes of all other files.
        self.digest = self._with_loras(hashlib.sha256((folder / "config.json").read_bytes()).hexdigest())

    def _with_loras(self, digest):
        for path, scale in self.loras.values():
            digest = hashlib.sha256(f"{digest} {lora_digest(path)} {scale}".encode()).hexdigest()
        return digest[:16]

    def check_complete(self) -> None:
        """Raises ValueError when a component is missing that one of the tasks needs."""
        missing = {"transformer", "text_encoder", "autoencoder"}.difference(self.config.components)
        if missing:
            raise ValueError(
                f"{self.folder} lacks {', '.join(sorted(missing))}, it has {', '.join(self.config.components)}: "
                "convert the model again with all parts (python launch/convert.py --help)"
            )

    def stamp(self, dtype: str | None, quantize: str | None, reproducible: bool = False) -> dict:
        """The facts about the model, and how it runs, that go into the parameters of an image."""
        stamp = {"bundle": self.folder.resolve().name}
        if self.run:
            stamp |= {"step": self.run.step, "weights": self.run.weights}
        if self.loras:
            stamp["loras"] = {name: scale for name, (_, scale) in self.loras.items()}
        stamp |= {"bundle_hash": self.digest, "dtype": dtype or "default", "quantize": quantize}
        return stamp | ({"reproducible": True} if reproducible else {}) | {"unialign_jax": __version__}

    def open(self, **options) -> Pipeline:
        """The pipeline; `options` are those of `Pipeline.from_bundle`. JAX takes 95% of a GPU, as in training."""
        processes.take_gpu_memory(os.environ)
        if self.run:
            pipeline = Pipeline.from_run(self.run, **options)
        else:
            pipeline = Pipeline.from_bundle(self.folder, verify=self._verify, **options)
        for name, (path, scale) in self.loras.items():
            pipeline.load_lora(path, scale, name)
        return pipeline


def lora_digest(path: str) -> str:
    """A hash of a LoRA's files; of a run, of what tells its newest checkpoint. Raises FileNotFoundError."""
    if runs.is_run(path):
        described = place(path)
        told = [f"{runs.latest_step(path)} {described}".encode(), (described / "config.json").read_bytes()]
        return hashlib.sha256(b" ".join(told)).hexdigest()
    folder = Path(path)
    if not folder.is_dir():
        files.check_regular(path)
    parts = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return " ".join(files.sha256(part) for part in parts if part.is_file())


def devices_to_use(count: int | None) -> list[jax.Device]:
    """The first `count` devices of this process; None is all, on a CPU one. Raises ValueError for more than there are.

    A device of a CPU shares its cores with the others, so more of them are of no use.
    """
    processes.take_gpu_memory(os.environ)
    devices = jax.local_devices()
    if count is None:
        return devices[:1] if devices[0].platform == "cpu" else devices
    if not 1 <= count <= len(devices):
        raise ValueError(f"--devices is {count}, and this machine has {len(devices)} ({devices[0].platform})")
    return devices[:count]
