"""Teacher features and latents of a data folder, computed once, against the networks called directly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from unialign_jax.data import caches
from unialign_jax.data.records import open_records, write_records
from unialign_jax.data.shapes.tasks import write_shapes
from unialign_jax.data.streams import Stream, StreamConfig
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.models import presets
from unialign_jax.models import teacher as teachers
from unialign_jax.models.autoencoder import make_autoencoder
from unialign_jax.parallel.mesh import make_mesh
from unialign_jax.training import caching

TEACHER = teachers.TeacherConfig(
    depth=2,
    width=16,
    num_heads=2,
    mlp_width=20,
    full_attention_layers=(1,),
    output_width=8,
    vocab_size=300,
    dtype="float32",
)
COUNT = 10
FEATURES = functools.partial(teachers.pooled_features, config=TEACHER, cell=16)


@pytest.fixture(scope="module")
def params():
    return teachers.init_teacher(jax.random.key(0), TEACHER)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of single bytes."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(map(chr, range(256)))}, []))
    return backend


@pytest.fixture
def world(tmp_path):
    write_shapes(tmp_path, COUNT, image_size=32, teacher_width=0, streams=("text_to_image", "edit", "vqa"))
    return tmp_path


TEACHER_INPUTS = ("image", "teacher_ids", "teacher_is_token")


def open_stream(folder, kind, conditions=0, teacher_tokenizer=None, **changes):
    config = StreamConfig("s", kind, str(folder / kind), num_conditions=conditions, image_size=32, text_length=32)
    return Stream(dataclasses.replace(config, **changes), load_tokenizer(), teacher_tokenizer)


def taught(stream):
    return caching.Examples(stream, TEACHER_INPUTS)


def fill(folder, kind, function, params, read, name, rows=4, conditions=0, batch_size=4, mesh=None, options=None):
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    description = caches.Description(
        name=name,
        records=caches.records_digest(folder / kind),
        num_records=COUNT,
        size=(32, 32),
        network="x",
        arrays=caching.row_shapes(function, params, read(0)),
        rows=rows,
        options=options or {},
    )
    writer = caches.Writer(folder / kind, description)
    return caching.fill_cache(writer, read, function, params, mesh, batch_size=batch_size)


@pytest.mark.parametrize("kind", ["text_to_image", "vqa"])
def test_cached_features_are_the_teachers(world, params, words, kind):
    source = open_stream(world, kind, use_teacher=False)
    read = taught(open_stream(world, kind, teacher_tokenizer=words))
    assert fill(world, kind, FEATURES, params, read, "teacher") == 0

    cached = open_stream(world, kind)
    assert cached.teacher_width == 8
    for index in range(COUNT):
        record = source.records[index]
        text = record.caption if kind == "text_to_image" else f"Q: {record.question} A: {record.answer}"
        ids = words.encode(text).ids
        expected = np.asarray(params["token_embedding"])[ids].mean(axis=0)
        np.testing.assert_allclose(cached[index]["teacher_text"], expected, rtol=2e-3, atol=1e-4)
    images = np.stack([source[index]["image"] for index in range(COUNT)])
    expected = jax.jit(lambda images: teachers.encode_images(params, images, TEACHER))(images)
    found = np.stack([cached[index]["teacher_image"] for index in range(COUNT)])
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)
    assert "teacher_grid" not in cached[0]


def test_the_cached_grid_is_that_of_a_teacher_in_the_step(world, params, words):
    """The batch of a run with a cache, against what its step makes of the batch of one without."""
    online = open_stream(world, "text_to_image", teacher_tokenizer=words, teacher_cell=16)
    fill(world, "text_to_image", FEATURES, params, taught(online), "teacher", options={"cell": 16})
    cached = open_stream(world, "text_to_image", teacher_cell=16)
    batches = [{key: np.stack([stream[i][key] for i in range(4)]) for key in stream[0]} for stream in (online, cached)]
    expected = batches[0] | jax.jit(FEATURES)(params, {key: batches[0][key] for key in TEACHER_INPUTS})
    assert batches[1].keys() == expected.keys() - {"teacher_ids", "teacher_is_token"}
    assert batches[1]["teacher_grid"].shape == (4, 4, 8)
    for key, value in batches[1].items():
        np.testing.assert_allclose(value, expected[key], rtol=2e-3, atol=1e-3, err_msg=key)
    # The cells of an image have the mean of the whole.
    np.testing.assert_allclose(batches[1]["teacher_grid"].mean(axis=1), batches[1]["teacher_image"], atol=2e-3)


def test_a_grid_of_another_size_is_told(world, params, words, refuses):
    read = taught(open_stream(world, "text_to_image", teacher_tokenizer=words))
    given = lambda cell: lambda: open_stream(world, "text_to_image", teacher_cell=cell)  # noqa: E731
    refuses(given(16), "no grid of teacher features", "encode --teacher-grid=16")
    fill(world, "text_to_image", FEATURES, params, read, "teacher", options={"cell": 16})
    refuses(given(8), "a grid with cells of 16 pixels, teacher.grid is 8", "--teacher-grid=8")
    for file in (world / "text_to_image/teacher").iterdir():
        file.unlink()
    pooled = functools.partial(FEATURES, cell=0)
    fill(world, "text_to_image", pooled, params, read, "teacher")
    refuses(given(16), "text_to_image/teacher has no grid, teacher.grid is 16")


def test_any_batch_size_and_mesh_give_the_same_cache(world, params, words):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    read = taught(open_stream(world, "text_to_image", teacher_tokenizer=words))
    function = FEATURES
    found = []
    for batch_size, mesh in ((4, None), (2, make_mesh(fsdp=2, devices=jax.devices()[:2]))):
        fill(world, "text_to_image", function, params, read, "teacher", rows=7, batch_size=batch_size, mesh=mesh)
        cache = caches.Cache(world / "text_to_image", "teacher")
        found.append(np.stack([cache[index]["teacher_image"] for index in range(COUNT)]))
        for file in (world / "text_to_image" / "teacher").iterdir():
            file.unlink()
    np.testing.assert_allclose(found[0], found[1], rtol=2e-3, atol=1e-3)


def test_cached_latents_are_the_autoencoders_moments(world):
    config = presets.AUTOENCODER["tiny"]
    autoencoder = make_autoencoder(config)
    params = jax.jit(autoencoder.init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))["params"]
    source = open_stream(world, "edit", 2, use_teacher=False)
    function = functools.partial(caching.image_moments, autoencoder=autoencoder)
    fill(world, "edit", function, params, caching.Examples(source, ("image", "conditions")), "latents")

    cached = open_stream(world, "edit", 2, use_latents=True)
    side, channels = 32 // config.downsample_factor, config.latent_channels
    example, plain = cached[3], source[3]
    assert "image" not in example and example["image_moments"].shape == (side, side, 2 * channels)
    assert example["condition_moments"].shape == (2, side, side, 2 * channels)
    pixels = plain["conditions"].astype(np.float32) / 127.5 - 1
    mean, log_variance = autoencoder.apply({"params": params}, pixels, method="encode")
    expected = np.concatenate([mean, log_variance], axis=-1)
    np.testing.assert_allclose(example["condition_moments"], expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="has 2 conditions of each record, the stream has num_conditions 1"):
        open_stream(world, "edit", 1, use_latents=True)


def test_a_damaged_record_is_marked_and_its_neighbour_stands_in(world, params, words, tmp_path):
    folder = world / "text_to_image"
    records = [open_records(folder)[index] for index in range(COUNT)]
    records[5] = dataclasses.replace(records[5], image=records[5].image[:40])
    write_records(folder, records, kind="text_to_image", overwrite=True)
    read = taught(open_stream(world, "text_to_image", teacher_tokenizer=words))
    bad = fill(world, "text_to_image", FEATURES, params, read, "teacher")
    assert bad == 1
    cached = open_stream(world, "text_to_image")
    assert bool(cached[5]["replaced"])
    np.testing.assert_array_equal(cached[5]["teacher_image"], cached[6]["teacher_image"])
