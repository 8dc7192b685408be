"""Memory traffic of a written module, counted by hand."""

from tests.planning.test_hlo import HAND
from twinflow_jax.planning import hlo
from twinflow_jax.planning.traffic import MAIN, moves, step_traffic


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
