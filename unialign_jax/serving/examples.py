"""Examples that the web page offers: sentences and pictures of the shapes world where a model reads its tokenizer, and
general sentences otherwise."""

import dataclasses

from PIL import Image

from unialign_jax.data.shapes.tasks import shapes_example
from unialign_jax.data.tokenizer import Tokenizer, load_tokenizer

IMAGE_SIZE = 64  # pixels a side of the shapes world's pictures, as the demo model was trained on
_SEED = 2**20  # far from those that data sets are made with


@dataclasses.dataclass(frozen=True)
class Examples:
    """Of each task, what a user may begin with.

    Attributes:
      prompts: of text_to_image.
      edits: (picture or None, instruction).
      references: (pictures, prompt) of personalization.
      photos: of perception and captions.
      questions: (picture or None, question).
      map_instructions: of perception, by kind; a kind that is not there has the pipeline's own.
    """

    prompts: tuple[str, ...]
    edits: tuple[tuple[Image.Image | None, str], ...]
    references: tuple[tuple[tuple[Image.Image, ...], str], ...]
    photos: tuple[Image.Image, ...]
    questions: tuple[tuple[Image.Image | None, str], ...]
    map_instructions: dict[str, str] = dataclasses.field(default_factory=dict)


GENERAL = Examples(
    prompts=(
        "a red fox in the snow, morning light",
        "a watercolor of a harbor with fishing boats",
        "a bowl of ramen on a wooden table, seen from above",
        "an astronaut reading a newspaper on a park bench",
    ),
    edits=((None, "make it winter"), (None, "replace the background with a beach"), (None, "make it a pencil drawing")),
    references=(),
    photos=(),
    questions=((None, "What is in the foreground?"), (None, "How many people are there?"), (None, "What is written?")),
)


def examples_for(tokenizer: Tokenizer) -> Examples:
    """The examples that fit a model with this tokenizer."""
    sentence = "a large red circle at the center on a white background"
    if tokenizer.token_ids(sentence) == load_tokenizer().token_ids(sentence):
        return shapes_examples()
    return GENERAL


def shapes_examples() -> Examples:
    """Scenes of the shapes world."""

    def made(stream: str, count: int) -> list:
        return [shapes_example(stream, _SEED, index, image_size=IMAGE_SIZE) for index in range(count)]

    def pictures(arrays) -> tuple[Image.Image, ...]:
        return tuple(map(Image.fromarray, arrays))

    return Examples(
        prompts=tuple(example.caption for example in made("text_to_image", 6)),
        edits=tuple((*pictures(example.conditions), example.instruction) for example in made("edit", 4)),
        references=tuple((pictures(e.conditions), e.instruction) for e in made("personalization", 3)),
        photos=tuple(image for example in made("perception", 4) for image in pictures(example.conditions)),
        questions=tuple((*pictures([example.image]), example.question) for example in made("vqa", 4)),
        map_instructions={"canny": "detect the edges", "depth": "estimate the depth", "pose": "find the keypoints"},
    )
