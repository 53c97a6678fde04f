"""Questions about images, answered by a model on this machine instead of an endpoint."""

from collections.abc import Callable, Sequence

from PIL import Image

from unialign_jax.data.images import load_rgb
from unialign_jax.evaluation.judging import FAILED, PARSED, UNPARSED, Journal, Judgement, Question, Unparsed

# (an image, a question about it) -> the answer.
Answerer = Callable[[Image.Image, str], str]


class LocalJudge:
    """Answers as `judging.Judge` does, one question after another, and keeps the answers in the same journal.

    Attributes:
      name: of the model; answers of other models in the journal are not its own.
    """

    def __init__(self, answer: Answerer, name: str, journal: Journal):
        self.name, self.journal, self._answer = name, journal, answer

    def ask(
        self, questions: Sequence[Question], progress: Callable[[Judgement], None] = lambda judgement: None
    ) -> list[Judgement]:
        """A judgement for every question, in their order; each has one image. Raises ValueError for unreadable ones."""
        judgements, opened = [], None
        for question in questions:
            key = question.key(self.name)
            judgement = self.journal.judgements.get(key)
            if judgement is None or judgement.status == FAILED:
                [path] = question.images
                if opened is None or opened[0] != path:
                    opened = path, load_rgb(path)
                text = self._answer(opened[1], question.text)
                facts = {"key": key, "item": question.item, "name": question.name, "answer": text}
                try:
                    judgement = Judgement(status=PARSED, value=question.read(text), **facts)
                except Unparsed as error:
                    judgement = Judgement(status=UNPARSED, reason=str(error), **facts)
                self.journal.add(judgement)
            judgements.append(judgement)
            progress(judgement)
        return judgements
