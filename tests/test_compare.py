"""benchmarks/compare.py and studies.py: the same budget for every method and setting."""

import sys

import compare
import pytest
import studies


@pytest.mark.parametrize("method", ["twinflow", "rcgm", "dmd2", "dmd_pairs"])
def test_settings_make_as_many_forwards_each(method, tmp_path):
    study, drawn = studies.STUDIES["digits"], []
    budget = study.steps * studies.cost(study, "twinflow")
    for trial in range(3):
        chosen, cost = studies.settings(study, method, trial), studies.cost(study, method, trial)
        assert chosen not in drawn
        drawn.append(chosen)
        for share in (1, 0.25):
            run = compare.Run(method, trial, 42, share)
            steps = run.overrides(study, tmp_path)["train.steps"]
            assert abs(steps * cost - share * budget) <= cost / 2


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_method_of_a_study_parses(name):
    study = studies.STUDIES[name]
    for method in study.methods:
        assert studies.cost(study, method) > 2


def test_trials_may_be_named():
    assert compare.trials_of("dmd2,rcgm:64,rcgm:0") == {"dmd2": [], "rcgm": [64, 0]}


def test_the_folder_of_another_study_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "study.json").write_text('{"study": "mnist", "steps": 8000}')
    monkeypatch.setattr(sys, "argv", ["compare.py", "digits", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        compare.main()
    assert "is of mnist in 8000 steps, not of digits in 2000" in capsys.readouterr().err
