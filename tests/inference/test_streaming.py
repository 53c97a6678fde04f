"""Texts while they are written: the same words, without compiling, and what is settled never changes."""

import numpy as np
import pytest
from PIL import Image

from unialign_jax import Pipeline
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.inference.streaming import settled_text


def test_settled_words_stay_whatever_follows():
    tokenizer, generator = load_tokenizer(), np.random.default_rng(0)
    joined = tokenizer.token_ids("it 's n't . ' , a red ' circle he 'm")  # what `clean_up` joins
    last = 0
    for _ in range(300):
        ids = generator.choice([*joined, *range(3, 200), tokenizer.eos_id], size=12)
        whole = tokenizer.decode(ids).strip()
        order, is_hidden, before = generator.permutation(12), np.ones(12, bool), ""
        for position in order:
            is_hidden[position] = False
            masked = np.where(is_hidden, tokenizer.mask_id, ids)
            text = settled_text(tokenizer, masked, is_hidden)
            assert whole.startswith(text) and text.startswith(before)
            before = text
        assert before == whole
        last += len(whole)
    assert last > 3000
    red = np.array([*tokenizer.token_ids("a large red"), tokenizer.mask_id])
    assert settled_text(tokenizer, red, red == tokenizer.mask_id) == "a large"


@pytest.mark.slow
def test_a_callback_hears_what_is_settled_and_changes_and_compiles_nothing(positioned_bundle):
    pipeline = Pipeline.from_bundle(positioned_bundle, max_batch=2)
    images = [Image.new("RGB", (32, 32), (value, 50, 50)) for value in (10, 90, 200)]
    given = {"questions": ["what is it?", "where is it?", "a?"], "seed": 5, "decoding": "ancestral", "temperature": 1.0}
    given["steps"] = 24
    expected = pipeline.answer(images, **given)
    programs, steps = pipeline.programs.describe._cache_size(), []
    assert pipeline.answer(images, **given, callback=steps.append) == expected
    assert pipeline.programs.describe._cache_size() == programs
    assert {step.members for step in steps} == {(0, 1), (2,)}
    parts = 0
    for index, whole in enumerate(expected):
        heard = [step.texts[step.members.index(index)] for step in steps if index in step.members]
        assert heard[-1] == whole and all(whole.startswith(text) for text in heard)
        assert [len(text) for text in heard] == sorted(map(len, heard))
        parts += len(set(heard) - {"", whole})
    assert parts  # some words came before the end
    counts = [step.index for step in steps if step.members == (2,)]
    assert counts == list(range(1, len(counts) + 1)) and len(counts) > 2
