"""The time model against times computed by hand."""

import itertools
import pathlib
from types import SimpleNamespace

import pytest

from twinflow_jax.errors import UserError
from twinflow_jax.planning import cost, hlo
from twinflow_jax.planning.collectives import Collective, axes_at_once
from twinflow_jax.planning.topology import GENERATIONS

HERE = pathlib.Path(__file__).parent
V5P = GENERATIONS["v5p"]


def read(name):
    return hlo.parse((HERE / f"{name}.hlo.txt").read_text())


def grid(kind, *shape, slices=1, cores=1):
    """Devices of a torus, the first axis fastest, as libtpu numbers them."""
    return [SimpleNamespace(device_kind=kind, coords=coords[::-1], slice_index=number)
            for number in range(slices)
            for coords in itertools.product(*map(range, shape[::-1])) for _ in range(cores)]


def part(prediction, name):
    return next(row for row in prediction.components if row.name == name)


def one(kind, size, groups, network="ici", axes=0):
    return Collective(kind, 1, size, len(groups[0]), groups, axes, network, False, False, (), 0)


def seconds(generation, devices, collective):
    return cost.Network(GENERATIONS[generation], devices).seconds(collective)


def test_collectives_are_charged_per_axis_spanned():
    cube = grid("TPU v5", 4, 4, 4)
    along_x, plane = (tuple(range(4)),), (tuple(range(16)),)
    gigabyte = 10**9
    assert seconds("v5p", cube, one("all-gather", gigabyte, along_x)) == pytest.approx(.75 / 180)
    assert seconds("v5p", cube, one("reduce-scatter", gigabyte, plane)) == pytest.approx(
        15 / 16 / 360)
    assert seconds("v5p", cube, one("all-reduce", gigabyte, plane)) == pytest.approx(
        2 * 15 / 16 / 360)
    # The slowest group counts: the second spans only one axis.
    mixed = ((0, 1, 4, 5), (16, 17, 18, 19))
    assert seconds("v5p", cube, one("all-gather", gigabyte, mixed)) == pytest.approx(.75 / 180)
    assert seconds("v5p", cube, one("collective-permute", gigabyte, ((0, 1),))) == pytest.approx(
        1 / 180)


@pytest.mark.parametrize("says, axes", [
    ('{"emitter":"1DAllGatherNonMajorDimImbalanced"}', 1),
    ('{"emitter":"2DAllGatherOnMajorDim"}', 2),
    ('{"emitter":"AllGatherWithNetRouterEmitter"}', 0), ("", 0),
    ('{"strategy":"StrategyRing","debug":"\\nStrategyRing{colors:1 phases:1 cores:{16}"}', 1),
    ('{"strategy":"StrategyND","debug":"\\nStrategyND{colors:2 phases:2 cores:{16 16}"}', 2),
    ('{"strategy":"UniDirectionNDRingStrategy","debug":"\\nUniD{colors:6 phases:3 cores:{4}"}', 3),
    ('{"strategy":"UniDirection1DRingStrategy","debug":"\\nUniD{colors:2 phases:1 cores:{4}"}', 1),
    ('{"color_strategies":[{"phase_rings":[{}]},{"phase_rings":[{}]}]}', 1),  # both ways round
    ('{"color_strategies":[' + 4 * '{"phase_rings":[{},{}]},' + "]}", 2),
])
def test_a_collective_uses_as_many_axes_at_once_as_its_algorithm(says, axes):
    assert axes_at_once(says) == axes
    # A ring through a plane, or through one whose sides are lines, has the links of one axis.
    cube, plane = grid("TPU v5", 4, 4, 4), (tuple(range(16)),)
    gather = one("all-gather", 10**9, plane, axes=axes)
    assert seconds("v5p", cube, gather) == pytest.approx(15 / 16 / (180 if axes == 1 else 360))
    flat = grid("TPU v5 lite", 4, 4, 1)
    assert seconds("v5e", flat, gather) == pytest.approx(15 / 16 / 90)


def test_axes_without_a_ring_have_half_the_rate():
    flat = grid("TPU v5 lite", 4, 4, 1)
    assert seconds("v5e", flat, one("all-gather", 10**9, (tuple(range(4)),))) == pytest.approx(
        .75 / 45)
    ring = grid("TPU v5 lite", 16, 16, 1)
    assert seconds("v5e", ring, one("all-gather", 10**9, (tuple(range(16)),))) == pytest.approx(
        15 / 16 / 90)


def test_groups_between_slices_are_charged_to_the_data_centre_network():
    two = grid("TPU v5", 2, 2, 1, slices=2)
    across = one("all-gather", 10**9, ((0, 4), (1, 5)))
    assert seconds("v5p", two, across) == pytest.approx(.5 / 6.25)
    sent = one("all-reduce", 10**9, ((0, 1),), "dcn")
    assert seconds("v5p", two, sent) == pytest.approx(2 * .5 / 6.25)


def test_two_devices_share_a_chips_links():
    halves = grid("TPU7x", 2, 2, 1, cores=2)
    assert seconds("tpu7x", halves, one("all-gather", 10**9, ((0, 1),))) == pytest.approx(
        .5 / (90 * 6))
    assert seconds("tpu7x", halves, one("all-gather", 10**9, ((0, 2),))) == pytest.approx(
        .5 / 45)


def test_a_recorded_program_is_the_sum_of_its_parts():
    found = cost.predict(read("explicit"), grid("TPU v5", 2, 2, 2))
    gathers = part(found, "all-gather (ici)")
    weight = 256 * 512 * 2
    # The mesh is (4, 2) over devices in torus order: pairs along x, fours over y and z.
    assert gathers.count == 24 and gathers.amount == 12 * (weight + weight // 4)
    assert gathers.seconds == pytest.approx(
        12 * (weight * 3 / 4 / 180e9 + weight / 4 / 2 / 90e9))
    assert part(found, "matmul").amount == 3 * 7 * 2 * 128 * 256 * 512
    assert part(found, "matmul").seconds >= part(found, "matmul").amount / V5P.peak
    assert found.seconds == pytest.approx(sum(row.seconds for row in found.components))
    assert 0 < found.overlapped <= found.seconds
    assert gathers.hidden == 0


def test_overlap_hides_at_most_the_work_beside_it():
    found = cost.predict(read("overlapped"), grid("TPU v5", 2, 2, 2))
    gathers = part(found, "all-gather (ici)")
    beside = 2 * 1024 * 1024 * 4096 / V5P.peak  # one matrix product beside each of 6 gathers
    assert 6 * beside <= gathers.hidden < 6 * 1.25 * beside
    assert gathers.hidden < gathers.seconds
    assert found.overlapped < found.seconds


@pytest.mark.parametrize("name, products", [
    ("splash", 6 * 2 + 3 * 5),  # forward 2; keys', values' and queries' gradients in one kernel: 5
    ("splash_apart", 6 * 2 + 3 * 4 + 3 * 3),
])
def test_attention_is_charged_by_its_products(name, products):
    found = cost.predict(read(name), grid("TPU v5", 2, 2, 1))
    row = part(found, "attention kernels")
    assert row.amount == products * 2 * (2 * 4) * 1024 * 1024 * 128
    assert row.seconds == pytest.approx(row.amount / (.75 * 459e12))
    assert found.notes == ()


def test_slices_use_both_networks():
    found = cost.predict(read("slices"), grid("TPU v5", 2, 2, 1, slices=2))
    between = part(found, "all-gather (dcn)")
    assert between.seconds == pytest.approx(12 * (65536 * .5) / 6.25e9)
    assert part(found, "all-gather (ici)").seconds == pytest.approx(18 * 262144 * .75 / 180e9)


OWN = """HloModule own, num_partitions=1

ENTRY %main (x: f32[1024,1024], w: bf16[1024,1024]) -> f32[1024,1024] {
  %x = f32[1024,1024]{1,0} parameter(0)
  %w = bf16[1024,1024]{1,0} parameter(1)
  %own.3 = f32[1024,1024]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %dot = f32[1024,1024]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %away = (f32[1024,1024]{1,0:S(5)}, f32[1024,1024]{1,0}, u32[]) copy-start(%x)
  %slow = f32[1024,1024]{1,0} add(%own.3, %dot), \
backend_config={"window_config":{"estimated_cycles":"1000000"}}
  %there = f32[1024,1024]{1,0:S(5)} copy-done(%away)
  %small = f32[1024,1024]{1,0} negate(%slow), \
backend_config={"window_config":{"estimated_cycles":"175"}}
  ROOT %flat = f32[1024,1024]{1,0:S(1)} copy(%small)
}
"""


def test_rules_for_single_instructions():
    found = cost.predict(hlo.parse(OWN), grid("TPU v5", 1, 1, 1))
    array = 1024 * 1024 * 4
    # An unknown kernel is charged for its memory, and named.
    assert part(found, "other kernels").seconds == pytest.approx(2 * array / 2765e9)
    assert found.notes == ("kernel own: FLOPs unknown, charged for its memory traffic",)
    # No cycles: by the share of peak, or the memory if that is slower.
    assert part(found, "matmul").seconds == pytest.approx(2 * 1024**3 / (.9 * 459e12))
    # Three arrays at the memory's rate, 175 cycles, and one array read.
    assert part(found, "memory").seconds == pytest.approx(3 * array / 2765e9 + 1e-7
                                                          + array / 2765e9)
    away = part(found, "host copies")
    assert away.seconds == pytest.approx(array / 16e9)
    assert away.hidden == pytest.approx(3 * array / 2765e9)


@pytest.mark.parametrize("rows, cycles, seconds", [
    (4096, 3_000_000, 2 * 4096**3 / (.85 * 459e12)),  # never slower than that share of peak,
    (4096, 550_000, 550_000 / 1.75e9),  # the compiler's word above it,
    (4096, 175_000, 2 * 4096**3 / 459e12),  # never faster than the chip,
    (8, 3_000_000, (4096**2 + 2 * 8 * 4096) * 4 / 2765e9),  # nor than the memory
])
def test_products_are_charged_between_two_shares_of_peak(rows, cycles, seconds):
    text = f"""HloModule product, num_partitions=1

ENTRY %main (x: f32[{rows},4096], w: f32[4096,4096]) -> f32[{rows},4096] {{
  %x = f32[{rows},4096]{{1,0}} parameter(0)
  %w = f32[4096,4096]{{1,0}} parameter(1)
  ROOT %dot = f32[{rows},4096]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, \
rhs_contracting_dims={{0}}, backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}
}}
"""
    found = cost.predict(hlo.parse(text), grid("TPU v5", 1, 1, 1))
    assert part(found, "matmul").seconds == pytest.approx(seconds)


def test_devices_without_figures_are_refused():
    with pytest.raises(UserError, match="no figures"):
        cost.predict(read("explicit"), grid("cpu", 2, 2, 2))
