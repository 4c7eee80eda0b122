"""What devices send: of compiled programs whose traffic is known, and of each way in which XLA writes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_domain.planning.collectives import Collective, collectives
from t5x_domain.planning.hlo import Module

LAYERS, WIDTH, ROWS = 5, 64, 16


def mesh(**axes):
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(list(axes.values())), list(axes))


def compiled(function, *arguments):
    return Module.of(jax.jit(function).lower(*arguments).compile().as_text())


def test_layers_whose_parameters_are_gathered_in_a_loop():
    """Each of 5 layers gathers 64 x 64 float32 from 4 devices: a device receives 3/4 of it."""
    over = mesh(data=2, fsdp=4)
    weights = jax.ShapeDtypeStruct(
        (LAYERS, WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(over, PartitionSpec(None, "fsdp"))
    )
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=NamedSharding(over, PartitionSpec(("data", "fsdp"))))
    whole = NamedSharding(over, PartitionSpec())

    def layers(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

        return jax.lax.scan(layer, x, weights)[0]

    found = collectives(compiled(layers, weights, x), 8)
    assert found == [Collective("all-gather", "ici", 4, LAYERS, LAYERS * WIDTH * WIDTH * 4 * 3 / 4)]


def summed_over(axes, x):
    everywhere = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
    return jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=mesh(slice=2, data=2, fsdp=2), **everywhere)(x)


SIZE = ROWS * WIDTH * 4


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ("fsdp", [("ici", 2, 2 * SIZE / 2)]),
        (("data", "fsdp"), [("ici", 4, 2 * SIZE * 3 / 4)]),
        ("slice", [("dcn", 2, 2 * SIZE / 2)]),
        # Within each slice first, so that a device has a quarter of the array to exchange with the other slice.
        (("slice", "data", "fsdp"), [("ici", 4, 2 * SIZE * 3 / 4), ("dcn", 2, 2 * SIZE / 4 / 2)]),
    ],
)
def test_a_sum_over_axes_of_the_mesh(axes, expected):
    found = collectives(compiled(functools.partial(summed_over, axes), jnp.ones((ROWS, WIDTH))), 8, slices=2)
    assert found == [Collective("all-reduce", network, n, 1, size) for network, n, size in expected]


def of_line(line, num_devices=8, slices=1):
    return collectives(
        Module.of(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  ROOT %c.1 = {line}\n}}\n"), num_devices, slices
    )


@pytest.mark.parametrize(
    ("groups", "members", "across"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4, 1),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, 2),
        ("[2,4]<=[8]", 4, 1),
        ("[4,2]<=[2,4]T(1,0)", 2, 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4, 1),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", 4, 2),
        ("{}", 8, 2),
    ],
)
def test_every_way_to_write_groups(groups, members, across):
    """Of 8 devices in 2 slices 0..3 and 4..7."""
    found = of_line(f"f32[4]{{0}} all-to-all(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}", slices=2)
    sizes = {one.network: one.group for one in found}
    assert sizes.get("dcn", 1) == across
    assert sizes.get("ici", 1) * across == members


def test_groups_that_are_not_known_are_no_guess():
    with pytest.raises(ValueError, match="unknown replica groups"):
        of_line("f32[4]{0} all-gather(%x), channel_id=1, replica_groups=ring(4)")


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        # 1,024 bytes gathered, reduced, or reduced to shares, in groups of 4; started and ended apart, or not.
        ("f32[256]{0} all-gather(%x), replica_groups=[2,4]<=[8]", "all-gather", 768),
        ("(f32[64]{0}, f32[256]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8]", "all-gather", 768),
        ("f32[256]{0} all-reduce(%x), replica_groups=[2,4]<=[8]", "all-reduce", 1536),
        ("f32[256]{0} all-reduce-start(%x), replica_groups=[2,4]<=[8]", "all-reduce", 1536),
        ("f32[64]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8]", "reduce-scatter", 768),
        ("(f32[256]{0}, f32[64]{0}) reduce-scatter-start(%x), replica_groups=[2,4]<=[8]", "reduce-scatter", 768),
        ("f32[256]{0} all-to-all(%x), replica_groups=[2,4]<=[8]", "all-to-all", 768),
        ("f32[256]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 1024),
        (
            "(f32[256]{0}, f32[256]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            1024,
        ),
    ],
)
def test_bytes_that_a_device_sends(line, kind, size):
    (one,) = of_line(line)
    assert (one.kind, one.network, one.count, one.bytes) == (kind, "ici", 1, size)


def test_what_libtpu_hands_to_the_hosts_goes_between_slices():
    (one,) = of_line(
        "(f32[2,8,128]{2,1,0}, u32[], token[]) send(%x, %t), channel_id=4, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}',
        num_devices=32,
        slices=2,
    )
    assert one == Collective("all-reduce", "dcn", 2, 1, 2 * 8192 / 2)


GATHER = "all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8]"


def test_pieces_of_one_collective_are_one():
    """Two fusions that other work runs between share a channel."""
    fused = "".join(
        f"%fused_{n} (x: f32[64]) -> f32[256] {{\n  ROOT %g.{n} = f32[256]{{0}} {GATHER}\n}}\n" for n in (1, 2)
    )
    body = "".join(f"  %f.{n} = f32[256]{{0}} fusion(%x), kind=kCustom, calls=%fused_{n}\n" for n in (1, 2))
    (one,) = collectives(Module.of(f"{fused}ENTRY %main (x: f32[64]) -> f32[256] {{\n{body}}}\n"), 8)
    assert one.count == 1


def test_copies_of_a_turn_are_each_one():
    """Unrolled layers keep the channel of the loop's body."""
    body = f"  %a.1 = f32[256]{{0}} {GATHER}\n  ROOT %b.1 = f32[256]{{0}} {GATHER}\n"
    (one,) = collectives(Module.of(f"ENTRY %main (x: f32[64]) -> f32[256] {{\n{body}}}\n"), 8)
    assert (one.count, one.bytes) == (2, 2 * 768)


def test_two_of_one_channel_are_two():
    """libtpu reduces within a slice, sends to the other one, and gathers within the slice, all under one number."""
    within = "channel_id=7, replica_groups=[4,2]<=[8]"
    body = (
        f"  %a.1 = f32[64]{{0}} reduce-scatter(%x), {within}\n  ROOT %b.1 = f32[128]{{0}} all-gather(%a.1), {within}\n"
    )
    found = collectives(Module.of(f"ENTRY %main (x: f32[128]) -> f32[128] {{\n{body}}}\n"), 8, slices=2)
    assert {(one.kind, one.bytes) for one in found} == {("reduce-scatter", 256), ("all-gather", 256)}


def test_what_all_send_to_all_crosses_slices_whole():
    """Of 4,096 bytes for 8 devices half go to the other slice, and 3/8 to the others of the own one."""
    found = of_line("f32[1024]{0} all-to-all(%x), replica_groups={}", slices=2)
    assert {one.network: one.bytes for one in found} == {"dcn": 2048, "ici": 1536}


def test_a_permutation_with_one_pair_across_slices_is_on_their_network():
    (one,) = of_line("f32[256]{0} collective-permute(%x), source_target_pairs={{0,1},{3,4}}", slices=2)
    assert (one.network, one.bytes) == ("dcn", 1024)
