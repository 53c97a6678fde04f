"""The weights and the errors of benchmark.py quantize, by hand."""

import argparse

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from unialign_jax.benchmarks import quantize
from unialign_jax.models import presets


def test_relative_errors_by_hand():
    assert quantize.relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.5 / 5)
    assert quantize.relative_error(np.ones(3), np.ones(3)) == 0


def test_the_text_is_heard_and_channels_differ_where_they_should():
    transformer, encoder = presets.MMDIT["tiny"], presets.TEXT_ENCODER["tiny"]
    plain, structured = (flatten_dict(quantize.random_params(transformer, encoder, x), sep="/") for x in (False, True))
    for path, leaf in plain.items():
        if path.endswith("kernel"):
            assert np.all(np.std(leaf, axis=tuple(range(leaf.ndim - 1))) > 0), path
    changed = {path for path, leaf in plain.items() if not np.array_equal(leaf, structured[path])}
    assert all(path.startswith("text_encoder/") for path in changed)
    ratio = structured["text_encoder/layers/mlp_up/kernel"] / plain["text_encoder/layers/mlp_up/kernel"]
    # One factor for each input and one for each output: any two columns are in proportion.
    np.testing.assert_allclose(ratio[0] * ratio[0, 0, 0], ratio[0, :, :1] * ratio[0, :1], rtol=1e-4)
    scales = structured["text_encoder/layers/mlp_norm/scale"]
    assert set(np.unique(scales)) <= {1.0, quantize.OUTLIER}


@pytest.mark.bad_input
def test_texts_are_lines(tmp_path, refuses):
    (tmp_path / "texts").write_text("one\n\n two \n")
    arguments = argparse.Namespace(texts=tmp_path / "texts", count=3)
    assert quantize.read_texts(arguments) == ["one", " two "]
    (tmp_path / "texts").write_text("\n")
    refuses(lambda: quantize.read_texts(arguments), "has no texts, expected one a line")
    arguments.texts = None
    assert len(quantize.read_texts(arguments)) == 3
