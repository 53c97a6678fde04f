"""The image sizes that a model takes: one rule for training, sampling, jobs and benchmarks. Does not import JAX."""

from typing import Any, NamedTuple

from unialign_jax.files import shown


class ImageSizes(NamedTuple):
    """Heights and widths are multiples of `multiple` pixels, a patch of latents (SD3: 16), up to `largest`, the side of
    the positional grid (SD3: 192 patches, 3072 pixels)."""

    multiple: int
    largest: int

    @classmethod
    def of(cls, transformer: Any, autoencoder: Any) -> "ImageSizes":
        """The sizes of an MMDiTConfig and an AutoencoderConfig, or of objects with their fields."""
        multiple = autoencoder.downsample_factor * transformer.patch_size
        return cls(multiple, multiple * transformer.max_patches)

    def problem(self, name: str, value: Any) -> str | None:
        """The error message if `value` is not a valid side `name` of an image, else None."""
        is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
        if is_whole and value % self.multiple == 0 and self.multiple <= value <= self.largest:
            return None
        fitting = min(self.largest, max(self.multiple, value // self.multiple * self.multiple)) if is_whole else None
        return (
            f"{name} is {shown(value)}, expected a multiple of {self.multiple} up to {self.largest}, such as "
            f"{fitting or self.multiple}"
        )

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError when `value` is not a valid side of an image."""
        if problem := self.problem(name, value):
            raise ValueError(problem)

    def of_edit(self, height: int, width: int, most: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) at which the network edits an image of that size, and at which the edit is returned.

        The first are the nearest multiples. No side is longer than `most`: a larger image is shrunk first.
        """
        shrink = min(1.0, most / max(height, width))
        working = tuple(max(self.multiple, round(s * shrink / self.multiple) * self.multiple) for s in (height, width))
        return working, tuple(max(1, round(side * shrink)) for side in (height, width))
