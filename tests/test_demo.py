"""The demo bundle that comes with the package: found by its name, whole, small, and able to do what its card says."""

import pytest
from PIL import Image

from unialign_jax import Pipeline, bundle
from unialign_jax.evaluation import shapes_run
from unialign_jax.models import presets


def test_it_is_found_by_its_name_unless_a_folder_here_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundle.is_packaged("demo") and bundle.is_bundle(bundle.locate("demo"))
    assert bundle.locate("demos") == bundle.locate("./demos") != bundle.locate("demo")
    (tmp_path / "demo").mkdir()
    assert not bundle.is_packaged("demo") and not bundle.is_bundle(bundle.locate("demo"))


def test_it_is_whole_small_and_of_the_tiny_stages():
    folder = bundle.locate("demo")
    assert bundle.verify(folder) == []
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8e6
    config = bundle.read_config(folder)
    assert config.transformer == presets.MMDIT["tiny"]
    assert {"t2i", "caption"} <= set(config.tasks)


def test_it_draws_backgrounds_and_writes_sentences():
    """Far below its figures (docs/learning.md), and far above chance: a third of the backgrounds, no sentence."""
    pipeline = Pipeline.from_bundle("demo")
    pictures = shapes_run.run_task(pipeline, "text_to_image", 8)
    assert sum(result.scores["background"] for result in pictures) >= 7
    captions = shapes_run.run_task(pipeline, "caption", 8)
    assert sum(result.scores["parses"] for result in captions) >= 6


@pytest.mark.bad_input
def test_longer_texts_than_it_has_positions_for():
    pipeline = Pipeline.from_bundle("demo")
    with pytest.raises(ValueError, match="text_length is 64, expected at most 32"):
        pipeline.caption(Image.new("RGB", (64, 64)), text_length=64)
