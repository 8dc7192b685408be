"""benchmarks/compare.py: the same budget for every method and setting."""

import compare
import pytest


@pytest.mark.parametrize("method", ["twinflow", "rcgm", "dmd2", "dmd_pairs"])
def test_settings_make_as_many_forwards_each(method, tmp_path):
    study, drawn = compare.STUDIES["digits"], []
    budget = study.steps * compare.cost(study, "twinflow")
    for trial in range(3):
        chosen, cost = compare.settings(study, method, trial), compare.cost(study, method, trial)
        assert chosen not in drawn
        drawn.append(chosen)
        for share in (1, 0.25):
            run = compare.Run(method, trial, 42, share)
            steps = run.overrides(study, tmp_path)["train.steps"]
            assert abs(steps * cost - share * budget) <= cost / 2
