"""Suites of prompts with official scorers: pictures as those want them, and their answers."""

from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites import dpg, geneval, longtext, wise
from twinflow_jax.evaluation.suites.suite import Suite, open_prompts

__all__ = ["EDITING", "SUITES", "Suite", "named", "open_prompts"]

SUITES = {
    suite.name: suite for suite in (
        geneval.GENEVAL, dpg.DPG, wise.LEGACY, wise.VERIFIED, longtext.ENGLISH, longtext.CHINESE,
        geneval.GENEVAL_2,
    )
}
EDITING = ("gedit", "imgedit")


def named(name: str) -> Suite:
    """A suite.

    Raises:
      UserError: there is none of that name, or it edits pictures, which no family does yet.
    """
    if name in EDITING:
        raise UserError(f"{name} edits pictures, and no family here does yet: choose another suite")
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}: choose from {', '.join(SUITES)}")
    return SUITES[name]
