"""Perception records from plain images: edges by OpenCV, depth and pose by functions of the user."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.kinds import PERCEPTION
from unialign_jax.data.preparation import maps
from unialign_jax.data.records import open_records
from unialign_jax.data.streams import Stream, StreamConfig
from unialign_jax.data.tokenizer import load_tokenizer

FUNCTIONS = """
import numpy as np
from PIL import Image

def depth(image):  # the darker, the nearer
    assert image.mode == "RGB"
    return image.convert("L")

def pose(image):
    return np.full((8, 8, 3), (255, 0, 0), np.uint8)

def fails(image):
    raise RuntimeError("out of\\nluck")

def floats(image):
    return np.zeros((8, 8))

nothing = None
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's folder, with functions, and two pictures of a white square on black, of which one has a caption."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    maps.find_function.cache_clear()
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "pictures").mkdir()
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[16:32, 16:32] = 255
    for name in ("a", "b"):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "pictures" / "a.txt").write_text("a white square")
    return tmp_path


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_depth_and_pose_by_the_users_functions(prepare, home):
    options = ["--maps=depth,pose", "--depth-model=mine:depth", "--pose-model=mine:pose"]
    found = prepare(home / "pictures", "perception", *options)
    assert [(record.key, record.caption) for record in found.records] == [
        ("pictures/a.png/depth", "a depth map of this: a white square"),
        ("pictures/a.png/pose", "a pose map of this: a white square"),
        ("pictures/b.png/depth", "a depth map"),
        ("pictures/b.png/pose", "a pose map"),
    ]
    depth, pose = found.records[:2]
    assert (depth.instruction, pose.instruction) == (PERCEPTION["depth"], PERCEPTION["pose"])
    source = (home / "pictures" / "a.png").read_bytes()
    assert depth.conditions == pose.conditions == (source,), "the image as it is stored"
    np.testing.assert_array_equal(pixels_of(depth.image), pixels_of(source)[:, :, 0])
    assert pixels_of(pose.image).shape == (48, 64, 3) and (pixels_of(pose.image) == (255, 0, 0)).all()
    assert open_records(found.folder).metadata.parameters["maps"] == ["depth", "pose"]
    stream = Stream(StreamConfig("maps", "perception", str(found.folder), num_conditions=1), load_tokenizer(None))
    assert stream[0]["image"].shape == (64, 64, 3) and stream[0]["conditions"].shape == (1, 64, 64, 3)


def test_edges_by_opencv(prepare, home):
    pytest.importorskip("cv2")
    found = prepare(home / "pictures", "perception", "--maps=canny")
    assert [record.caption for record in found.records] == [
        "a canny edge map of this: a white square",
        "a canny edge map",
    ]
    edges = pixels_of(found.records[0].image)
    assert edges.shape == (48, 64) and set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges)
    # The outline of the square alone, to a pixel.
    distance = np.minimum.reduce([abs(rows - 15.5), abs(rows - 31.5), abs(columns - 15.5), abs(columns - 31.5)])
    assert len(rows) > 50 and distance.max() <= 1.5
    assert min(rows.min(), columns.min()) >= 14 and max(rows.max(), columns.max()) <= 33


def test_maps_of_one_image_are_held_out_together(prepare, home):
    for number in range(12):
        Image.new("RGB", (64, 48), (number, 0, 0)).save(home / "pictures" / f"{number}.png")
    options = ["--maps=depth,pose", "--depth-model=mine:depth", "--pose-model=mine:pose", "--holdout=0.3"]
    found = prepare(home / "pictures", "perception", *options)
    assert len(found.records) % 2 == 0 and 0 < len(found.records) < 28
    assert [record.key.rpartition("/")[0] for record in found.records[::2]] == [
        record.key.rpartition("/")[0] for record in found.records[1::2]
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("fails", "RuntimeError: out of"), ("floats", "the map is an array of float64, expected uint8")],
)
def test_a_function_that_fails_makes_a_bad_row(prepare, home, capsys, name, reason):
    given = ["--maps=depth", f"--depth-model=mine:{name}"]
    with pytest.raises(SystemExit) as stopped:
        prepare(home / "pictures", "perception", *given)
    assert "2 of 2 rows are bad" in stopped.value.code and "map cannot be made: depth" in stopped.value.code
    assert reason in stopped.value.code


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--maps=edges"], "--maps has 'edges', expected some of canny, depth, pose"),
        (["--maps=depth"], "--maps=depth needs --depth-model=package.module:function"),
        (["--maps=depth", "--depth-model=nowhere:f"], "cannot be imported: ModuleNotFoundError"),
        (["--maps=depth", "--depth-model=mine:f"], "cannot be imported: AttributeError"),
        (["--maps=depth", "--depth-model=mine:nothing"], "is a NoneType, expected a function"),
        (["--pose-model=mine:pose"], "--maps does not have pose"),
        (["--maps=depth", "--depth-model=mine:depth", "--stream=edit"], "--maps makes perception records"),
    ],
)
def test_maps_that_cannot_be_made(command_refuses, home, options, words):
    given = ["--source=pictures", "--output=out", "--min-side=1", "--processes=1", "--stream=perception", *options]
    command_refuses("prepare_data", given, words)


@pytest.mark.bad_input
def test_edges_without_opencv(command_refuses, home, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    given = ["--source=pictures", "--output=out", "--stream=perception", "--maps=canny"]
    command_refuses("prepare_data", given, "--maps=canny needs OpenCV: pip install opencv-python-headless")
