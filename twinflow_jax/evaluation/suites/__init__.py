"""Suites of prompts with official scorers: pictures as those want them, and their answers."""

from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites import dpg, gedit, geneval, imgedit, longtext, wise
from twinflow_jax.evaluation.suites.suite import Suite, open_prompts

__all__ = ["SUITES", "Suite", "named", "open_prompts"]

SUITES = {
    suite.name: suite for suite in (
        geneval.GENEVAL, dpg.DPG, wise.LEGACY, wise.VERIFIED, longtext.ENGLISH, longtext.CHINESE,
        geneval.GENEVAL_2, gedit.ENGLISH, gedit.CHINESE, imgedit.IMGEDIT,
    )
}


def named(name: str) -> Suite:
    """A suite.

    Raises:
      UserError: there is none of that name.
    """
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}: choose from {', '.join(SUITES)}")
    return SUITES[name]
