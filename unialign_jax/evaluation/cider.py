"""CIDEr-D of captions (arXiv 1411.5726): how like the references they are, by weighted n-grams.

The kept packages of it start a Java program to cut texts into words, so that it is written here. On the same words the
numbers are those of pycocoevalcap 1.2.
"""

import collections
import math
import re
from collections.abc import Sequence

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty on a difference of lengths, in words


def words(text: str) -> list[str]:
    """The words of a text in lower case without punctuation, nearly as Stanford's PTB tokenizer cuts them.

    "The man's t-shirt isn't red." -> the, man, 's, t-shirt, is, n't, red.
    """
    text = re.sub(r"n't\b", " n't", text.lower().replace("\u2019", "'"))
    return re.findall(r"(?<= )n't|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-.]\w+)*", text)


def cider_d(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """The score of each caption, from 0 to 10; the corpus's score is their mean.

    An n-gram weighs its count in the text times log(captions / captions among whose references it is): where there is
    one caption alone, all scores are 0.

    Args:
      captions: words of one caption of each image.
      references: words of each image's references, at least one.
    """
    counted = [[_counts(reference) for reference in group] for group in references]
    found_in = collections.Counter(gram for group in counted for gram in set().union(*group))
    vectors = [[_weighted(counts, found_in, len(captions)) for counts in group] for group in counted]
    scores = []
    for caption, group, texts in zip(captions, vectors, references, strict=True):
        own = _weighted(_counts(caption), found_in, len(captions))
        likeness = [_likeness(own, other) * _penalty(caption, text) for other, text in zip(group, texts, strict=True)]
        scores.append(10 * sum(likeness) / len(likeness))
    return scores


def _counts(text) -> collections.Counter:
    return collections.Counter(tuple(text[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(text) - n + 1))


def _weighted(counts, found_in, total) -> dict:
    return {gram: count * math.log(total / max(1, found_in[gram])) for gram, count in counts.items()}


def _penalty(one, other) -> float:
    # As pycocoevalcap: the length is the number of pairs of neighbours.
    difference = max(0, len(one) - 1) - max(0, len(other) - 1)
    return math.exp(-(difference**2) / (2 * SIGMA**2))


def _likeness(own, other) -> float:
    """The mean over orders of the cosine of two vectors, in which no weight counts for more than the other's."""
    total = 0.0
    for order in range(1, ORDERS + 1):
        norms = [math.sqrt(sum(w * w for gram, w in v.items() if len(gram) == order)) for v in (own, other)]
        if all(norms):
            product = sum(
                min(w, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, w in own.items() if len(gram) == order
            )
            total += product / (norms[0] * norms[1])
    return total / ORDERS
