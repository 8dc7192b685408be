"""Everything in a registry is what its contract says, and what is not is told by name."""

import types

import jax.numpy as jnp
import pytest

from twinflow_jax import contracts, data, evaluation, objectives
from twinflow_jax.config import Train
from twinflow_jax.data.sources import Source
from twinflow_jax.evaluation.captioned import CaptionJudge
from twinflow_jax.keys import keys_of
from twinflow_jax.objectives import Batch
from twinflow_jax.objectives.form import Form, check_form
from twinflow_jax.training.loggers import LOGGERS, JsonLines, Logger


def scaled(factor):
    """The paper's loss times a number."""
    def loss(apply, params, teacher_params, batch, draws, config, totals=None):
        given = apply, params, teacher_params, batch, draws, config, totals
        whole, terms = objectives.FORMS["paper"].loss(*given)
        return factor * whole, {name: factor * term for name, term in terms.items()}

    return loss


@pytest.mark.parametrize("name", objectives.FORMS)
def test_every_form_keeps_its_contract(name):
    assert check_form(name, objectives.FORMS[name]) == []


@pytest.mark.parametrize(("change", "said"), [
    ({"Config": Batch}, "Config derives from no config.Shared"),
    ({"Config": objectives.FORMS["tutorial"].Config}, "Config's form is 'tutorial', not 'paper'"),
    ({"ROLES": ("base", "twin")}, "counts gives {'twin': 8, 'base': 16} of 24 rows, in ROLES"),
    ({"counts": lambda batch_size, config: {"twin": 8, "base": 8}}, "counts gives"),
    ({"draw": lambda key, batch_size, sample_shape, config: {}}, "TypeError: paper: draw gives"),
    ({"loss": lambda *_, **__: (jnp.float32(jnp.nan), {})}, "loss takes"),
    ({"loss": scaled(jnp.nan)}, "the loss is nan, its terms"),
    ({"loss": scaled(0)}, "the loss has the gradient 0.0"),
])
def test_what_a_form_lacks_is_told(change, said):
    form = types.SimpleNamespace(**vars(objectives.FORMS["paper"]) | change)
    found = check_form("paper", form)
    assert found[0].startswith(said), found


@pytest.mark.parametrize("judge", [evaluation.ClassJudge, CaptionJudge])
def test_every_judge_keeps_its_contract(judge):
    assert contracts.missing(judge, evaluation.Judge) == []


@pytest.mark.parametrize("name", data.SOURCES)
def test_every_source_keeps_its_contract(name):
    assert contracts.missing(data.SOURCES[name], Source) == []


@pytest.mark.parametrize("logger", [JsonLines, *LOGGERS.values()])
def test_every_logger_keeps_its_contract(logger):
    assert contracts.missing(logger, Logger) == []
    assert keys_of(Train)["loggers"].bounds.choices == tuple(LOGGERS)


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
