"""Flow maps in a run: what counts the steps counts their own."""

import dataclasses

import jax
import pytest

from twinflow_jax import objectives
from twinflow_jax.objectives import flow_map
from twinflow_jax.training.loop import train


@pytest.mark.parametrize("preset, fields", [
    ("consistency_training", {}), ("alphaflow", {"anneal_steps": 8}), ("scm", {"warmup": 8}),
])
def test_steps_of_velocities_do_not_count(preset, fields, small_config, tmp_path, monkeypatch):
    """Two steps of velocities, then two of the flow map, and two more of the same run later."""
    seen = set()

    def told(whole):
        def wrapped(*given):
            batch = next(one for one in given if isinstance(one, objectives.Batch))
            jax.debug.callback(lambda done: seen.update(done.tolist()), batch.done)
            return whole(*given)

        return wrapped

    for name in ("span", "residual"):
        monkeypatch.setattr(flow_map, name, told(getattr(flow_map, name)))
    objective = objectives.build(objectives.preset(preset, **fields)).config
    assert objective.counts_steps
    for steps, done in ((4, {0, 1}), (6, {2, 3})):
        run = small_config(
            f"train.steps={steps}", "train.flow_matching_steps=2", "train.ema_decay=0.9",
            "optimizer.decay_to=1",
        )
        state = train(
            dataclasses.replace(run, objective=objective), str(tmp_path), progress=False
        )
        jax.effects_barrier()
        assert int(state.step) == steps and seen == done
        seen.clear()
