"""What runs and how often, in written modules and in recorded texts."""

import pytest

from tests.planning.programs import LAYERS, read, trips
from twinflow_jax.planning import hlo
from twinflow_jax.planning.collectives import collectives
from twinflow_jax.planning.work import step_kernels

HAND = """HloModule hand, num_partitions=2

%fused (p0: f32[3,8], p1: s32[]) -> f32[8] {
  %p0 = f32[3,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %slice = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,8}
  ROOT %row = f32[8]{0} bitcast(%slice)
}

%update (p0: f32[3,8], p1: f32[1,8], p2: s32[]) -> f32[3,8] {
  %p0 = f32[3,8]{1,0} parameter(0)
  %p1 = f32[1,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %u = f32[3,8]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%body (b: (s32[], f32[3,8], s32[])) -> (s32[], f32[3,8], s32[]) {
  %b = (s32[], f32[3,8]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %a = f32[3,8]{1,0} get-tuple-element(%b), index=1
  %limit = s32[] get-tuple-element(%b), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %taken = f32[8]{0} fusion(%a, %i), kind=kLoop, calls=%fused
  %gathered = (f32[8]{0}, f32[16]{0:T(8,128)S(1)}) all-gather-start(%taken), \
replica_groups={{0,1}}, dimensions={0}
  %sum = f32[8]{0:T(8,128)(2,1)} add(%taken, %taken)
  %whole = f32[16]{0} all-gather-done(%gathered)
  %line = f32[1,8]{1,0} bitcast(%sum)
  %kept = f32[3,8]{1,0} fusion(%a, %line, %i), kind=kLoop, calls=%update
  ROOT %state = (s32[], f32[3,8]{1,0}, s32[]) tuple(%next, %kept, %limit)
}

%condition (c: (s32[], f32[3,8], s32[])) -> pred[] {
  %c = (s32[], f32[3,8]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
  %limit.1 = s32[] get-tuple-element(%c), index=2
  ROOT %less = pred[] compare(%i.1, %limit.1), direction=LT
}

ENTRY %main (x: f32[3,8]) -> f32[3,8] {
  %x = f32[3,8]{1,0} parameter(0)
  %one = s32[] constant(1)
  %ten = s32[] constant(10)
  %copy = s32[] copy(%ten)
  %kernel.3 = f32[3,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"block": "a \\" } quote"
}}, metadata={op_name="jit(f)/own/pallas_call"}
  %start = (s32[], f32[3,8]{1,0}, s32[]) tuple(%one, %kernel.3, %copy)
  %while = (s32[], f32[3,8]{1,0}, s32[]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[3,8]{1,0} get-tuple-element(%while), index=1
}
"""


def test_a_loop_of_a_written_module():
    program = hlo.parse(HAND)
    assert trips(program) == {"while": 5}  # 1, 3, 5, 7, 9: the limit comes with the state
    gather, = collectives(program)
    assert (gather.kind, gather.count, gather.bytes, gather.group) == ("all-gather", 5, 64, 2)
    assert gather.overlapped and gather.covers == ("sum",)
    kernels = [kernel for step in program.steps for kernel in step_kernels(program, step)]
    assert [kernel.name for kernel in kernels] == ["own"]
    unknown = hlo.parse(HAND.replace("constant(10)", "parameter(1)"))
    assert unknown.unknown_loops == ("while",) and trips(unknown) == {"while": 1}


def test_loops_of_recorded_programs():
    assert set(trips(read("explicit")).values()) == {LAYERS}
    # The backward loop between slices was rotated: it starts at 1, and the first pass is outside.
    assert sorted(trips(read("slices")).values()) == [LAYERS - 1, LAYERS]


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="not an HLO module"):
        hlo.parse("HloModule cut\n\nENTRY %main (x: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n")
