"""The roofline's arithmetic, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.parallel import hardware
from unialign_jax.parallel.gradients import scan_reducing_late
from unialign_jax.parallel.mesh import make_mesh
from unialign_jax.planning import roofline
from unialign_jax.planning.collectives import Collective, read_collectives
from unialign_jax.planning.roofline import Roofline
from unialign_jax.training.config import build_configs, read_config
from unialign_jax.training.state import Networks, TrainState

V4, V5E = (next(chip for chip in hardware.CHIPS if chip.name == name) for name in ("v4", "v5e"))
NONE = {"backward": 0.0, "text encoder": 0.0, "autoencoder": 0.0}  # seconds of compute
ROOFLINE = Roofline(20e12, 200e12, compute=0.10, hbm=0.05, ici_overlapped=0.08, ici_exposed=0.02, dcn=0.01)


def test_overlapped_times_count_once_and_exposed_ones_add():
    assert ROOFLINE.seconds == pytest.approx(0.10 + 0.02 + 0.01)
    assert dataclasses.replace(ROOFLINE, ici_overlapped=0.3).seconds == pytest.approx(0.3 + 0.02 + 0.01)
    assert ROOFLINE.mfu == pytest.approx(20e12 / 0.13 / 200e12)
    assert ROOFLINE.mfu_overlapped == pytest.approx(20e12 / 0.10 / 200e12)


def grid(*sizes):
    return np.stack(np.meshgrid(*(np.arange(size) for size in sizes), indexing="ij"), axis=-1).reshape(-1, len(sizes))


def test_the_memory_traffic_of_a_chip():
    """Of 8 chips: a weight of 64 numbers whole, of a modulation's 768 an eighth, and whole where fsdp gathers it."""
    config = read_config("stage1", ["model.remat=block", "accumulation=2"])
    shapes = {"out": (8, 8), "modulation": (2, 8, 6, 8)}
    for axes, numbers in (({"data": 4, "encoder": 2}, 64 + 768 / 8), ({"fsdp": 8}, 64 + 768)):
        mesh = make_mesh(jax.devices()[:8], **({"fsdp": 1} | axes))
        whole = jax.NamedSharding(mesh, jax.P())
        leaves = {
            name: {"kernel": jax.ShapeDtypeStruct(shape, "float32", sharding=whole)} for name, shape in shapes.items()
        }
        state, frozen = TrainState(None, {"blocks": {"joint": {"image": leaves}}}, {}, ()), leaves["out"]
        # Three passes of each of two micro-batches read bfloat16 weights; gradients and the state's 832 float32 numbers
        # are written and read, as are 1,000 bytes of temporaries.
        expected = 2 * (3 * 2 * numbers + 4 * 64) + 2 * 2 * numbers + 2 * 4 * 832 + 2 * 1000
        assert roofline.hbm_bytes(config, state, frozen, mesh, 1000) == expected


def test_a_groups_links():
    """Both chips have links of 4.5e10 bytes/s, one way: two along each axis that is a ring, otherwise one."""
    link = 4.5e10
    assert roofline.group_bandwidth(V4, grid(4, 4, 4), (4, 4, 4)) == 3 * 2 * link
    assert roofline.group_bandwidth(V5E, grid(16, 16), (16, 16)) == 2 * 2 * link
    assert roofline.group_bandwidth(V5E, grid(4, 4), (4, 4)) == 2 * link  # no rings
    assert roofline.group_bandwidth(V4, grid(1, 1, 4), (4, 4, 4)) == 2 * link  # one ring of four
    assert roofline.group_bandwidth(V4, grid(1, 1, 4), (2, 2, 4)) == link  # not of whole cubes: an open line
    assert roofline.group_bandwidth(V5E, grid(2, 2), (16, 16)) == 2 * link
    assert roofline.group_bandwidth(V5E, 2 * grid(8, 8), (16, 16)) == 2 * 2 * link / 2  # every second chip


def test_overlapped_and_exposed_collectives():
    devices = [type("Device", (), {"coords": (i, 0, 0)})() for i in range(4)]
    groups = np.arange(4)[None]
    both = [Collective("all-gather", "", 9_000_000, groups, 2, overlaps) for overlaps in (True, False)]
    overlapped, exposed = roofline.ici_seconds(both, V5E, devices, np.zeros(4, int), NONE)
    assert overlapped == exposed == pytest.approx(2 * 3 * 9e6 / 4.5e10)
    # Of two such slices: of the seven pieces of others a chip fetches one from the other slice, six come by the ICI.
    groups, slice_of = np.arange(8)[None], np.repeat([0, 1], 4)
    gather = [Collective("all-gather", "", 9_000_000, groups, 2, False)]
    expected = 2 * 6 * 9e6 / 4.5e10
    assert roofline.ici_seconds(gather, V5E, 2 * devices, slice_of, NONE) == (0.0, pytest.approx(expected))


def test_an_all_to_alls_busiest_link():
    """Of four chips in a line the link in the middle takes, each way, the pieces of two for two."""
    devices = [type("Device", (), {"coords": (i, 0, 0)})() for i in range(4)]
    exchange = [Collective("all-to-all", "", 9_000_000, np.arange(4)[None], 2, False)]
    seconds = roofline.ici_seconds(exchange, V5E, devices, np.zeros(4, int), NONE)
    assert seconds == (0.0, pytest.approx(2 * 4 * 9e6 / 4 / 4.5e10))


def test_permutes_load_links_and_both_ways_at_once():
    ring = np.stack([grid(1, 16), np.roll(grid(1, 16), -1, axis=0)], axis=1)  # each to the next, the last to the first
    assert roofline.link_flows(V5E, ring, (16, 16)) == {(1, 1): 1}
    assert roofline.link_flows(V5E, ring[:, ::-1], (16, 16)) == {(1, -1): 1}
    line = np.stack([grid(1, 4), np.roll(grid(1, 4), -1, axis=0)], axis=1)
    assert roofline.link_flows(V5E, line, (16, 16)) == {(1, 1): 1, (1, -1): 1}  # back over the three links between
    apart = np.stack([grid(1, 16), np.roll(grid(1, 16), -4, axis=0)], axis=1)
    assert roofline.link_flows(V5E, apart, (16, 16)) == {(1, 1): 4}

    devices = [type("Device", (), {"coords": (0, i, 0)})() for i in range(16)]
    devices += [type("Device", (), {"coords": (15, 15, 0)})()]  # so that the slice is 16 x 16
    pairs = np.stack([np.arange(16), np.roll(np.arange(16), -1)], axis=1)
    both = [Collective("collective-permute", "", 4_500_000, way, 15, True) for way in (pairs, pairs[:, ::-1])]
    slice_of = np.zeros(17, int)
    once = 15 * 4.5e6 / 4.5e10
    assert roofline.ici_seconds(both, V5E, devices, slice_of, NONE) == (pytest.approx(once), 0.0)
    alone = [dataclasses.replace(collective, overlaps=False) for collective in both]
    assert roofline.ici_seconds(alone, V5E, devices, slice_of, NONE) == (0.0, pytest.approx(2 * once))

    # Gradient reductions overlap with the blocks' backward pass; the last block's reduction is exposed.
    def named(name):
        return [dataclasses.replace(collective, name=name) for collective in both]

    in_blocks = named("jit(train_step)/transpose(jvp(MMDiT))/shard_map/while/body/closed_call/ppermute")
    after = named("jit(train_step)/transpose(jvp(MMDiT))/shard_map/ppermute")
    seconds = roofline.ici_seconds(in_blocks + after, V5E, devices, slice_of, NONE | {"backward": 10 * once})
    assert seconds == (pytest.approx(once), pytest.approx(once))
    seconds = roofline.ici_seconds(in_blocks, V5E, devices, slice_of, NONE | {"backward": 0.25 * once})
    assert seconds == (pytest.approx(0.25 * once), pytest.approx(0.75 * once))
    # So do gathers of weights with the text encoder's layers, or with the autoencoder.
    for part, name in (
        ("text encoder", "jit(train_step)/jvp(TextEncoder)/while/body/jit(dynamic_index_in_dim)/squeeze"),
        ("autoencoder", "jit(train_step)/jvp()/convert_element_type"),
    ):
        gather = Collective("all-gather", name, 9_000_000, pairs[:1], 24, True)
        whole = 24 * 9e6 / 4.5e10
        for seconds in (2 * whole, 0.25 * whole):
            found = roofline.ici_seconds([gather], V5E, devices, slice_of, NONE | {part: seconds})
            hidden = min(seconds, whole)
            assert found == (pytest.approx(hidden), pytest.approx(whole - hidden))
    # One axis comes after the other.
    assert roofline.both_ways({(0, 1): 1.0, (0, -1): 2.0, (1, 1): 4.0}) == 6.0


def test_sums_between_slices_overlap_with_the_blocks_they_run_beside():
    """Of two slices 24 sums of 1.25 MB in the backward pass of 24 blocks, and one of 25 MB after it: 12 ms and 10."""
    chip = dataclasses.replace(V5E, network=2.5e9)
    slices, slice_of = np.array([[0, 1]]), np.repeat([0, 1], 4)
    of_blocks = Collective("all-reduce", "psum.1", 1_250_000, slices, 24, True, between_slices=True)
    other = Collective("all-reduce", "psum.2", 25_000_000, slices, 1, True, between_slices=True)
    exposed = lambda times, room: roofline.dcn_seconds([of_blocks, other], chip, slice_of, times, room)  # noqa: E731
    assert exposed(24, 0.1) == pytest.approx(0.01)
    assert exposed(24, 0.004) == pytest.approx(0.01 + 0.008)
    assert exposed(48, 0.1) == pytest.approx(0.01 + 0.012)  # of two micro-batches: once for both is not in the blocks
    assert roofline.dcn_seconds([other], dataclasses.replace(V5E, network=0), slice_of, 24, 0.1) == 0.0


def test_sums_of_gradients_are_known_by_their_names():
    def layer(params, index, carry, inputs, shared):
        return jnp.tanh(carry @ params["image"]["mlp_in"]["kernel"]) + shared

    def loss(params, x):
        return jnp.sum(scan_reducing_late(layer, params, x, None, x, "blocks"))

    params = {"image": {"mlp_in": {"kernel": jnp.ones((3, 8, 8))}}}
    with jax.set_mesh(make_mesh(data=8, fsdp=1)):
        text = jax.jit(jax.grad(loss)).lower(params, jnp.ones((8, 8))).compile().as_text()
    permutes = [found for found in read_collectives(text) if found.kind == "collective-permute"]
    inside = sum(found.times for found in permutes if roofline.IN_BLOCKS.search(found.name))
    assert inside == 3 * sum(found.times for found in permutes) / 4 == 3 * 7


def test_work_on_paper():
    """A sample of text_to_image by hand, in TFLOP: forward, the image pass takes 1.98 and the text pass 2.01 (24 blocks
    of width 1536 on 1024 image and 256 text tokens), with the backward pass three times that; T5 takes 2.40 for each
    of two texts, the VAE 1.1. Remat of all blocks adds a forward of the blocks of both passes, 3.95.
    """
    config = read_config("configs/stage1.py", ["model.remat=block"])
    networks = Networks.create(*build_configs(config, "tpu"))
    work = roofline.step_work(config, networks, config.streams.text_to_image, 256)
    assert work["model"] == pytest.approx((3 * (1.98 + 2.01) + 2 * 2.40 + 1.1) * 1e12, rel=0.02)
    config.model.remat = "none"
    none = roofline.step_work(config, networks, config.streams.text_to_image, 256)
    done = [work["matmul"] + work["attention"] for work in (work, none)]
    assert done[0] - done[1] == pytest.approx(3.95e12, rel=0.03)
    # Twice the forward pass of the blocks, and it once more where they are computed again.
    backward = (
        none["parts"]["backward"]["matmul"] + none["parts"]["backward"]["attention"] * 2 / roofline.ATTENTION_BACKWARD
    )
    assert backward == pytest.approx(2 * 3.95e12, rel=0.03)
    of_texts = work["parts"]["text encoder"]
    assert of_texts["matmul"] + of_texts["attention"] == pytest.approx(2 * 2.40e12, rel=0.02)
    assert work["parts"]["autoencoder"]["matmul"] == pytest.approx(1.1e12, rel=0.05)
    assert work["parts"]["backward"]["matmul"] == pytest.approx(1.5 * none["parts"]["backward"]["matmul"])
    assert none["matmul"] + none["attention"] / (1 + roofline.ATTENTION_BACKWARD) * 3 == pytest.approx(none["model"])
    # T5's matmuls, all of its FLOPs but the attention's 0.03 of each text, at twice the speed where they have 8 bits.
    config.quantize_text_encoder = "w8a8"
    quick = roofline.step_work(config, networks, config.streams.text_to_image, 256)
    assert quick["w8a8"] == pytest.approx(2 * (2.397 - 0.026) * 1e12, rel=0.002)
    assert quick["model"] == none["model"] and quick["matmul"] + quick["w8a8"] == pytest.approx(none["matmul"])
    saved = [roofline.compute_seconds(work, V5E, 64) for work in (none, quick)]
    assert saved[0] - saved[1] == pytest.approx(quick["w8a8"] / 2 / (0.85 * 197e12))
    config.quantize_text_encoder = "int8"  # of the weights alone: they are multiplied as bfloat16
    assert roofline.step_work(config, networks, config.streams.text_to_image, 256) == none
