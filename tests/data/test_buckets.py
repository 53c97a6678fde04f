"""The sizes of aspect buckets."""

import pytest

from unialign_jax.data.buckets import bucket_name, bucket_sizes, cropped_share, nearest_buckets, parse_bucket


def test_the_table_of_512():
    assert bucket_sizes(512) == [(320, 768), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384), (768, 320)]


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_buckets_have_about_the_same_number_of_tokens(side):
    sizes = bucket_sizes(side)
    assert (side, side) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.85 * side**2 <= height * width <= side**2


@pytest.mark.parametrize(
    ("image", "bucket"),
    [((480, 640), (448, 576)), ((1000, 1000), (512, 512)), ((3000, 1000), (768, 320)), ((1080, 1920), (384, 640))],
)
def test_an_image_goes_to_the_nearest_shape(image, bucket):
    sizes = bucket_sizes(512)
    assert sizes[nearest_buckets([image[0]], [image[1]], sizes)[0]] == bucket
    assert cropped_share(*image, bucket) == min(cropped_share(*image, size) for size in sizes)


def test_what_is_cropped():
    assert cropped_share(100, 200, (512, 512)) == pytest.approx(0.5)
    assert cropped_share(100, 100, (512, 512)) == 0


def test_names():
    assert parse_bucket(bucket_name((448, 576))) == (448, 576)
    assert parse_bucket("512") is None
    assert parse_bucket("0x512") is None


def test_a_side_that_the_step_does_not_divide():
    with pytest.raises(ValueError, match="multiple of the buckets' step 64"):
        bucket_sizes(500)
