"""A model on a device: its programs and its weights, run in batches; arrays in, arrays out."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unialign_jax import bundle
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.files import shown
from unialign_jax.inference.inputs import batches
from unialign_jax.inference.options import check_whole
from unialign_jax.inference.weights import Weights
from unialign_jax.models.attention import resolve_implementation
from unialign_jax.models.autoencoder import make_autoencoder
from unialign_jax.models.mmdit import MMDiT
from unialign_jax.models.quantization import MODES, quantize_module
from unialign_jax.models.sizes import ImageSizes
from unialign_jax.models.text_encoder import TextEncoder
from unialign_jax.sampling import image as image_sampler
from unialign_jax.sampling.programs import KEPT, Programs, initial_noise
from unialign_jax.sampling.text import TextSample

log = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float32")
ALL = 2**30  # evaluations of a text, more than it has


class Model:
    """The part of a `Pipeline` that runs programs.

    Attributes:
      programs: its compiled programs, a `sampling.programs.Programs`.
      max_batch: the most samples in one forward.
      reproducible: whether every sample has forwards of its own, by the same programs with and without a callback.
      warns_of_cuts: whether the log quotes what is cut off a prompt that is too long. A server tells its clients.
    """

    warns_of_cuts = True

    def __init__(
        self,
        config: bundle.BundleConfig,
        load: Callable[[str], dict],
        tokenizer: Tokenizer,
        *,
        name: str = "the model",
        dtype: str | None = None,
        attention: str = "auto",
        quantize: str | None = None,
        low_memory: bool = False,
        max_batch: int = 8,
        reproducible: bool = False,
        kept_shapes: int = KEPT,
        device: jax.Device | None = None,
    ):
        """`Pipeline.from_bundle` is the usual way in.

        Args:
          load: gives a component's parameters by its name, placed and in their dtypes, when they are first needed.
        """
        self.config, self.tokenizer, self.name = config, tokenizer, name
        self._loras = {}  # {name: (adapters, scale)}, see `Pipeline.load_lora`
        self._said = set()  # warnings that were given, and programs whose compilation was announced
        self.max_batch = check_whole("max_batch", max_batch, 1, 2**16)
        self.reproducible = reproducible
        if reproducible:
            self.max_batch = 1
        for option, value, choices in (("dtype", dtype, DTYPES), ("quantize", quantize, MODES)):
            if value is not None and value not in choices:
                raise ValueError(f"{option} is {shown(value)}, expected one of {', '.join(choices)}")
        if config.transformer is not None and config.autoencoder is not None:
            self.sizes.check(f"{name}: image_size", config.image_size)
        self.device = device or jax.devices()[0]
        dtype = dtype or default_dtype(self.device)
        self._weights = Weights(load, low_memory)

        def module(make, part, **changes):
            return make(dataclasses.replace(part, dtype=dtype, **changes)) if part is not None else None

        if (part := config.transformer) is not None:
            # The flash kernels want heads of 64; the tiny models' are narrower.
            if attention == "auto" and part.head_width % 64:
                attention = "xla"
            attention = resolve_implementation(attention, self.device, dtype)
        transformer = module(MMDiT, config.transformer, attention=attention, remat="none")
        text_encoder = module(TextEncoder, config.text_encoder)
        if quantize:
            transformer, text_encoder = (m and quantize_module(m, quantize) for m in (transformer, text_encoder))
        autoencoder = module(make_autoencoder, config.autoencoder)
        ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id}
        self.programs = Programs.of(transformer, text_encoder, autoencoder, **ids, kept=kept_shapes)

    def load(self) -> None:
        """Reads all weights now, not when a task first needs them. Raises ValueError when they are damaged."""
        for name in ("text_encoder", "transformer", "autoencoder"):
            if getattr(self.config, name) is not None:
                self._weights.get(name)

    def unload(self, component: str) -> None:
        """Frees the weights of a component, such as "transformer"; they are read anew when a task next needs them."""
        self._weights.drop(component)

    def _sample(self, seeds, table, arguments, size, members, callback):
        """The latents of one batch: in one program, or evaluation by evaluation with a call back after each.

        The two round differently, so a reproducible model has the second alone.
        """
        params = self._weights.get("transformer")["transformer"]
        factor, count = self.config.autoencoder.downsample_factor, len(table.sigma)
        shape = size[0] // factor, size[1] // factor, self.config.autoencoder.latent_channels
        *texts, guidance, conditions = arguments
        if callback is None and not self.reproducible:
            kind = str(jax.tree.structure(arguments)), conditions is not None and conditions.shape[1], count
            with self._telling(f"{count_of(len(seeds), 'image')} of {size[1]} x {size[0]} pixels", *kind):
                return self.programs.sample_images(params, seeds, table, *arguments, latent_shape=shape)
        state = image_sampler.start(initial_noise(seeds, shape))
        for i in range(count):
            row = jax.tree.map(lambda x: x[i : i + 1], table)  # noqa: B023
            here = guidance
            if guidance is not None and guidance.active is not None:
                here = guidance._replace(active=guidance.active[i : i + 1])
            state = self.programs.advance_images(params, state, row, *texts, here, conditions)
            if callback is not None:
                callback(Step(i + 1, count, tuple(members), state.clean[: len(members)], self._preview))
        return state.latents

    def _preview(self, latents):
        params = self._weights.get("autoencoder", "transformer")["autoencoder"]
        return [Image.fromarray(array) for array in np.asarray(self.programs.decode_images(params, latents))]

    def _encode_texts(self, texts):
        """({text: row}, T5 embeddings [rows, L, D] on the host) with each different text encoded once."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        length = self.config.text_length
        for text in rows:
            self._warn_of_cut(text, length - 1, "prompt")
        ids = np.stack([self.tokenizer.encode(text, length) for text in rows])
        params = self._weights.get("text_encoder")["text_encoder"]
        parts = [
            (len(members), self.programs.encode_prompts(params, ids[np.array(padded)]))
            for members, padded in self._batches([None] * len(ids))
        ]
        # On the host, where picking rows compiles nothing, however many texts there are.
        return rows, np.concatenate([np.asarray(part)[:count] for count, part in parts])

    def _encode(self, arrays):
        """uint8 [H, W, 3] arrays of any sizes -> their latents [h, w, C]."""
        latents = [None] * len(arrays)
        params = self._weights.get("autoencoder")["autoencoder"]
        for members, padded in self._batches([array.shape for array in arrays]):
            encoded = self.programs.encode_images(params, np.stack([arrays[i] for i in padded]))
            for i, latent in zip(members, encoded, strict=False):
                latents[i] = latent
        self._weights.settle(latents)
        return latents

    def _write_texts(self, latents, ids, is_target, seeds, chosen, callback):
        """ids [B, L] with their targets filled in, as rows on the host; `latents` are those of the images.

        `callback(evaluations, members, ids, is_hidden)` is called after each evaluation, with the rows of `members`.
        """
        numbers = chosen.temperature, chosen.threshold, chosen.entropy_bound
        params = self._weights.get("transformer", "text_encoder")
        filled = [None] * len(latents)
        for members, padded in self._batches([None] * len(latents)):
            padded = np.array(padded)
            # Rows that only fill the batch have nothing to decide, and so cause no step.
            open_rows = is_target[padded] & (np.arange(len(padded)) < len(members))[:, None]
            images = jnp.stack([latents[i] for i in padded])
            # On the device, as what the program returns: the parts of a text are one program, which runs it whole too.
            state = jax.device_put(TextSample(ids[padded], np.int32(0)), self.device)

            def run(state, most, given=(open_rows, seeds[padded], chosen.steps, *numbers), images=images):
                progress = {"evaluations": state.evaluations, "most": most}
                return self.programs.describe(params, images, state.ids, *given, decoding=chosen.decoding, **progress)

            with self._telling(f"{count_of(len(padded), 'text')} of {ids.shape[1]} tokens", chosen.decoding):
                state = run(state, 1 if callback else ALL)
            while callback:
                following = run(state, 1)  # the device works on while the host reads what it has
                rows = np.asarray(state.ids)[: len(members)]
                is_hidden = is_target[members] & (rows == self.tokenizer.mask_id)
                callback(int(state.evaluations), members, rows, is_hidden)
                if not is_hidden.any():
                    break
                state = following
            for i, row in zip(members, np.asarray(state.ids), strict=False):
                filled[i] = row
        return filled

    def _batches(self, keys):
        """Indices of equal key in batches: (members, members filled up to a power of two by repeating the last)."""
        size = lambda members: min(self.max_batch, 1 << (len(members) - 1).bit_length())  # noqa: E731
        groups = batches(keys, self.max_batch)
        return [(members, members + members[-1:] * (size(members) - len(members))) for members in groups]

    def _require(self, task, *names):
        missing = [name for name in names if getattr(self.config, name) is None]
        if missing:
            raise ValueError(
                f"{self.name} lacks {' and '.join(missing)}, which {task} needs: convert the model again with it "
                "(python launch/convert.py --help)"
            )

    @property
    def sizes(self) -> ImageSizes:
        """The heights and widths that images may have."""
        return ImageSizes.of(self.config.transformer, self.config.autoencoder)

    @property
    def edit_limit(self) -> int:
        """The largest side that an edit has unless one is asked for: SD3's own size, 1024 pixels."""
        return self.config.transformer.base_patches * self.sizes.multiple

    @contextlib.contextmanager
    def _telling(self, what, *shape):
        """Around the call of a program: logs, the first time of a shape, that it is compiled and when it runs."""
        is_new, began = (what, shape) not in self._said, time.monotonic()
        self._said.add((what, shape))
        if is_new:
            log.info("compiling the program for %s", what)
        yield
        if is_new:
            log.info("sampling, after %.1f s of compiling", time.monotonic() - began)

    def _say_once(self, line):
        if line not in self._said:
            self._said.add(line)
            log.warning("%s", line)

    def _warn_of_cut(self, text, room, what):
        if not self.warns_of_cuts:
            return
        ids = self.tokenizer.token_ids(text)
        if len(ids) > room:
            log.warning(
                "%s is %d tokens long, the model reads %d; cut off: %r", what, len(ids), room,
                self.tokenizer.decode(ids[room:]),
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """A point in the sampler's loop, handed to a callback.

    Attributes:
      index, count: evaluations of the network done, and in all.
      members: the positions of these images in the call's result.
      latents: the clean latents that the network now predicts, [images, h, w, C] on the device.
    """

    index: int
    count: int
    members: tuple[int, ...]
    latents: jax.Array
    _decode: Callable = dataclasses.field(repr=False)

    def images(self) -> list[Image.Image]:
        """The prediction as images, at the size the network works at."""
        return self._decode(self.latents)


def count_of(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def default_dtype(device: jax.Device) -> str:
    """bfloat16, except on a CPU, which only emulates it."""
    return "float32" if device.platform == "cpu" else "bfloat16"
