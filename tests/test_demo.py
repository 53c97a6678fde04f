"""The demo bundle that comes with the package: found by its name, whole, small, and able to do what its card says."""

import numpy as np
import pytest
from PIL import Image

from unialign_jax import Pipeline, bundle
from unialign_jax.data.kinds import TASKS
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
    assert set(config.tasks) == set(TASKS)


@pytest.mark.slow
def test_it_does_every_task():
    """Far below its figures (docs/learning.md), and far above chance."""
    pipeline = Pipeline.from_bundle("demo")

    def total(task, figure, records=8):
        return sum(result.scores.get(figure, 0) for result in shapes_run.run_task(pipeline, task, records))

    assert total("text_to_image", "place") >= 5  # of 8; by chance a ninth
    assert total("caption", "true") >= 2  # by chance one in thousands
    assert total("vqa", "correct", 32) >= 20  # a blind guess of the right kind of word: about 10
    edits = shapes_run.run_task(pipeline, "edit", 16)
    distance = lambda image, edit: np.abs(np.float32(image) - edit.wanted).mean()  # noqa: E731
    assert sum(edit.scores["unchanged"] for edit in edits) >= 12  # a copy of the source has all
    assert sum(distance(edit.made, edit) < distance(edit.given[0], edit) for edit in edits) >= 10  # a copy has none
    assert total("perception", "score") >= 2
    assert total("personalization", "background") >= 7  # by chance a third


@pytest.mark.bad_input
def test_longer_texts_than_it_has_positions_for():
    pipeline = Pipeline.from_bundle("demo")
    with pytest.raises(ValueError, match="text_length is 64, expected at most 32"):
        pipeline.caption(Image.new("RGB", (64, 64)), text_length=64)
