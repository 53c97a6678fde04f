"""Bytes between chips: from HLO text written by hand, and of programs whose traffic is known by arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unialign_jax.parallel.gradients import split_dot_general
from unialign_jax.parallel.mesh import make_mesh
from unialign_jax.planning.collectives import read_collectives, read_groups, type_bytes

LOOP = """\
HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter (input: bf16[8,16]) -> bf16[2,16] {
  %input = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[8,16]{1,0} all-reduce(%input), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %piece = bf16[2,16]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,16}
}

%part (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %chained = f32[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, \
frontend_attributes={chain_id="0"}
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%state), index=0
  %held = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %note = f32[] custom-call(), custom_call_target="x", backend_config={"text":"a brace: \\
}}, metadata={op_name="jit(f)/while"}
  %reduced = f32[4,8]{1,0} all-reduce(%held), channel_id=1, replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply=%add, \
metadata={op_name="jit(f)/while/body/psum"}
  %part.1 = f32[16,8]{1,0} fusion(%held), kind=kCustom, calls=%part
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%index, %reduced)
}

%condition (state.1: (s32[], f32[4,8])) -> pred[] {
  %state.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %index.1 = s32[] get-tuple-element(%state.1), index=0
  %rounds = s32[] constant(24)
  ROOT %more = pred[] compare(%index.1, %rounds), direction=LT
}

ENTRY %main (a: f32[4,8], b: bf16[8,16]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %begin = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%a), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %end = f32[16,8]{1,0} all-gather-done(%begin)
  %part.2 = f32[16,8]{1,0} fusion(%a), kind=kCustom, calls=%part
  %scattered = bf16[2,16]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter
  %moved = f32[4,8]{1,0} collective-permute(%a), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %zero.1 = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero.1, %a)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body NOTE
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("note", "rounds"), [("", 24), (', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{}}', 5)]
)
def test_a_module_written_by_hand(note, rounds):
    collectives = read_collectives(LOOP.replace(" NOTE", note))
    found = {(c.kind, c.times, c.overlaps): c for c in collectives}
    assert len(collectives) == 5
    # f32[4,8] is 128 bytes, bf16[8,16] is 256.
    # Two gathers: a start with its end, and the chained one, whose copy in the loop is not another.
    assert [c.received for c in collectives if c.kind == "all-gather"] == [3 * 128, 3 * 128]
    assert found["reduce-scatter", 1, False].received == 3 / 4 * 256
    assert found["collective-permute", 1, False].received == 128
    reduced = found["all-reduce", rounds, False]
    assert reduced.received == rounds * 2 * 1 / 2 * 128
    assert reduced.name == "jit(f)/while/body/psum"
    np.testing.assert_array_equal(reduced.groups, [[0, 1], [2, 3]])


def test_rounds_that_nobody_knows_are_an_error():
    text = LOOP.replace(" NOTE", "").replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="^the rounds of the loop loop are not in the program"):
        read_collectives(text)
    with pytest.raises(ValueError, match="^this is no HLO module"):
        read_collectives("nothing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_every_spelling(text, expected):
    np.testing.assert_array_equal(read_groups(text), expected)


def test_bytes_of_types():
    assert type_bytes("bf16[24,1536]{1,0:T(8,128)(2,1)S(1)}") == 2 * 24 * 1536
    assert type_bytes("(f32[], s8[3]{0}, pred[7], f8e4m3fn[5])") == 4 + 3 + 7 + 5


def test_what_crosses_slices():
    (reduced,) = (c for c in read_collectives(LOOP.replace(" NOTE", "")) if c.kind == "all-reduce")
    assert reduced.received_across(np.array([0, 0, 1, 1])) == 0  # groups (0 1) and (2 3)
    assert reduced.received_across(np.array([0, 1, 0, 1])) == reduced.received
    (scattered,) = (c for c in read_collectives(LOOP.replace(" NOTE", "")) if c.kind == "reduce-scatter")
    # Four in two slices, 256 bytes: of the three pieces of 64 that a device receives, one comes from the other slice.
    assert scattered.received_across(np.array([0, 0, 1, 1])) == 64


def test_transfers_between_slices():
    """As the TPU's compiler writes them for four slices: here in a loop of 24 rounds, of 128 bytes each."""
    lines = """\
  %token = token[] after-all()
  %sent = (f32[4,8]{1,0}, u32[], token[]) send(%held, %token), channel_id=8, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="psum.150_0",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="SLICESx{0:7}",_xla_megascale_transfer_type="KIND"}
  ROOT %next"""
    for slices, count in (("{1,2,3,4}", 4), ("{1:3}", 3), ("{1,4:6}", 4)):
        for kind, factor in (
            ("ALL_REDUCE", 2 * (count - 1) / count),
            ("ALL_GATHER", count - 1),
            ("REDUCE_SCATTER", (count - 1) / count),
            ("ONE_TO_ONE", 1),
        ):
            text = LOOP.replace("  ROOT %next", lines.replace("SLICES", slices).replace("KIND", kind), 1)
            (found,) = (c for c in read_collectives(text.replace(" NOTE", "")) if c.between_slices)
            assert (found.name, found.times) == ("psum.150_0", 24)
            assert found.received == found.received_across(np.zeros(8, int)) == pytest.approx(24 * 128 * factor)
    with pytest.raises(ValueError, match="^this transfer between slices cannot be read"):
        read_collectives(text.replace(" NOTE", "").replace("ONE_TO_ONE", "SOME"))


def test_a_program_of_eight_devices_moves_what_arithmetic_says():
    """A scan of six rounds: each gathers a [16, 8] float32 weight over four devices and sums [8] over all eight."""
    mesh = make_mesh(data=2, fsdp=4)
    weights = jax.ShapeDtypeStruct((6, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None)))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    def step(weights, x):
        def body(x, weight):
            weight = jax.lax.with_sharding_constraint(weight, P())
            x = jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), P(("data", "fsdp")))
            return x, jnp.sum(x, axis=0)

        return jax.lax.scan(body, x, weights)

    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(weights, x).compile().as_text()
    found = read_collectives(text)
    gathered = sum(c.received for c in found if c.kind == "all-gather")
    summed = sum(c.received for c in found if c.kind == "all-reduce")
    assert gathered == 6 * 3 / 4 * 16 * 16 * 4
    assert summed == 6 * 2 * 7 / 8 * 16 * 4
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}


@pytest.mark.parametrize(("path", "piece"), [("text_head/kernel", (2, 4)), ("blocks/image/mlp_out/kernel", (8, 1))])
def test_a_weights_gradient_is_reduced_into_pieces(path, piece):
    mesh = make_mesh(replica=2, data=2, fsdp=2)
    generator = np.random.default_rng(0)
    x, weight = generator.normal(size=(16, 3, 8)), generator.normal(size=(8, 4))

    def loss(x, weight, dot_general):
        return jnp.sum(jnp.sin(dot_general(x, weight, (((2,), (0,)), ((), ())))))

    expected = jax.grad(loss, (0, 1))(x, weight, jax.lax.dot_general)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(lambda x, weight: loss(x, weight, split_dot_general(path)), (0, 1)))
        found = step(x, weight)
    assert found[1].sharding.shard_shape((8, 4)) == piece
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
