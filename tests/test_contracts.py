"""Everything in a registry is what its contract says, and what is not is told by name."""

import types

import pytest

from twinflow_jax import contracts, data, evaluation, objectives
from twinflow_jax.data.sources import Source
from twinflow_jax.evaluation.captioned import CaptionJudge
from twinflow_jax.objectives.form import Form


@pytest.mark.parametrize("name", objectives.FORMS)
def test_every_form_keeps_its_contract(name):
    assert contracts.missing(objectives.FORMS[name], Form) == []


@pytest.mark.parametrize("judge", [evaluation.ClassJudge, CaptionJudge])
def test_every_judge_keeps_its_contract(judge):
    assert contracts.missing(judge, evaluation.Judge) == []


@pytest.mark.parametrize("name", data.SOURCES)
def test_every_source_keeps_its_contract(name):
    assert contracts.missing(data.SOURCES[name], Source) == []


def test_what_is_missing_is_told_by_name():
    form = objectives.FORMS["paper"]
    half = types.SimpleNamespace(ROLES=(), Config=form.Config, counts=form.counts, draw=form.counts)
    assert contracts.missing(half, Form) == [
        "draw takes (batch_size, config), not (key, batch_size, sample_shape, config)",
        "has no loss",
    ]
    half.draw, half.loss = form.draw, lambda *everything, more: None
    assert contracts.missing(half, Form) == [
        "loss takes (everything, more), not (apply, params, teacher_params, batch, draws, config, "
        "totals)"
    ]
