"""Memory traffic of a written module, counted by hand."""

from tests.planning.test_hlo import HAND
from twinflow_jax.planning import hlo
from twinflow_jax.planning.traffic import CHIP, HOST, MAIN, moves, step_traffic


def test_slices_and_updates_count_by_what_they_touch():
    program = hlo.parse(HAND)
    traffic = {}
    for step in program.steps:
        if moves(program, step):
            traffic[step.op.name] = step_traffic(program, step)[MAIN]
    # A row of 32 bytes is read and written, not the array; indices are 4 bytes each.
    assert traffic["taken"] == 32 + 4 + 32
    assert traffic["kept"] == 32 + 4 + 32
    assert traffic["sum"] == 3 * 32


# As the TPU's compiler writes copies that go on beside other work, here of 16 of 64 rows of 32
# bytes, on the chip and to and from the host's memory.
STARTED = """HloModule started, is_scheduled=true

ENTRY %main (p0: f32[64,8], p1: f32[16,8], p2: s32[]) -> f32[16,8] {
  %p0 = f32[64,8]{1,0} parameter(0)
  %p1 = f32[16,8]{1,0} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %host = f32[64,8]{1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %whole = (f32[64,8]{1,0:S(1)}, f32[64,8]{1,0}, u32[]{:S(2)}) copy-start(%p0)
  %whole-done = f32[64,8]{1,0:S(1)} copy-done(%whole)
  %cut = ((f32[64,8]{1,0}), f32[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p0), \\
slice={[0:16],[0:8]}
  %cut-done = f32[16,8]{1,0:S(1)} slice-done(%cut)
  %away = ((f32[64,8]{1,0:S(5)}, f32[16,8]{1,0}, s32[]{:T(128)}, /*index=3*/s32[]{:T(128)}), \
f32[64,8]{1,0:S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%host, %p1, %p2, %p2)
  %away-done = f32[64,8]{1,0:S(5)} dynamic-update-slice-done(%away)
  %back = ((f32[64,8]{1,0:S(5)}, s32[], s32[]), f32[16,8]{1,0}, u32[]{:S(2)}) \
dynamic-slice-start(%away-done, %p2, %p2), dynamic_slice_sizes={16,8}
  ROOT %back-done = f32[16,8]{1,0} dynamic-slice-done(%back)
}
"""


def test_copies_beside_other_work_count_what_moves():
    """Neither the array that a slice is of, nor the operands that a result repeats."""
    program = hlo.parse(STARTED)
    found = {
        step.op.name: dict(step_traffic(program, step))
        for step in program.steps if moves(program, step)
    }
    rows, everything = 16 * 32, 64 * 32
    assert found == {
        "whole": {MAIN: everything, CHIP: everything}, "cut": {MAIN: rows, CHIP: rows},
        "away": {MAIN: rows, HOST: rows}, "back": {HOST: rows, MAIN: rows},
    }
