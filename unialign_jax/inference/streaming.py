"""Texts while they are written: what of them is settled after each evaluation of the network."""

import dataclasses

import numpy as np

from unialign_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextStep:
    """A point in the text sampler's loop, handed to a callback.

    Attributes:
      index: evaluations of the network done.
      members: the positions of these texts in the call's result.
      texts: how each of them begins, as far as that is settled. The whole text is the call's result.
    """

    index: int
    members: tuple[int, ...]
    texts: tuple[str, ...]


def settled_text(tokenizer: Tokenizer, ids: np.ndarray, is_hidden: np.ndarray) -> str:
    """How a text begins, whatever the hidden tokens will be: its words before the first of them.

    The last word before it is left out: the next token may go on with it, and `clean_up` may join the two.

    Args:
      ids, is_hidden: [L], those of the text alone, without a question.
    """
    known = ids[: np.argmax(is_hidden)] if is_hidden.any() else ids
    text = tokenizer.decode(known).strip()
    if not is_hidden.any() or tokenizer.eos_id in known:
        return text
    return text[: max(text.rfind(" "), 0)].rstrip()
