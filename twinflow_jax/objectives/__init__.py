"""What is minimised. Pure functions of `apply(params, x_t, t, r, cond) -> velocity`.

The forms, one module each (`form.Form` says what one is):
`twinflow` (as released: roles), `tutorial` (five full-batch losses), `paper` (its losses),
`flow_map` (the rivals that learn jumps: consistency models, MeanFlow and their kind) and `matching`
(those that move a generator by the difference of two scores).
A preset is a name for one Config; `build` binds a Config to its form.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from twinflow_jax.arrays import Apply, Scalar
from twinflow_jax.errors import UserError
from twinflow_jax.objectives import flow_map, matching, paper, tutorial, twinflow
from twinflow_jax.objectives.batch import Batch
from twinflow_jax.objectives.config import STUDENT, Shared
from twinflow_jax.objectives.draws import Counts, Draws, cut
from twinflow_jax.objectives.form import Form, drawn

FORMS: dict[str, Form] = {
    "twinflow": twinflow,
    "tutorial": tutorial,
    "paper": paper,
    "flow_map": flow_map,
    "matching": matching,
}

PRESETS = {
    "released": twinflow.Config(),
    "tutorial": tutorial.Config(),
    "paper": paper.Config(),
    "rcgm": twinflow.Config(ratios=(1.0, 1.0, 1.0, 0.0), rectify_weight=0.0),
    "flow_matching": twinflow.Config(
        ratios=(0.0, 1.0, 0.0, 0.0), consistency_ratio=0.0, order=0, guidance=0.0,
        rectify_weight=0.0, teacher_decay=0.0, sample_weight=False, distance="l2",
    ),
    "image_free": twinflow.Config(
        image_free=True, teacher_decay=1.0, guidance=4.0, rectify_weight=0.75
    ),
    # The paper's rivals: each one's source, and the values that differ here. In all: the linear
    # path, no guidance, no dropout in networks, mean squares; optimizer and condition dropout are
    # the run's. docs/method.md has more of the published settings.
    # Consistency training, 2303.01469 sections 3 and 5; iCT 2310.14189: no average for the second
    # jump, segments that double from 10 to 1280, lognormal indices, weights 1 / (t_i - t_(i+1)),
    # pseudo-Huber with c = .00054 sqrt(D). Here 10 to 128 segments, smoothly; uniform times, equal
    # weights, and errors clipped to +-1.
    "consistency_training": flow_map.Config(
        diagonal=0.0, target_time="zero", derivative="substeps", step=0.1, last_step=1 / 128,
        anneal_steps=5000, normaliser="clip",
    ),
    # Consistency distillation, 2303.01469 section 4: a Heun step of a frozen teacher, the average's
    # second jump, LPIPS. Here an Euler step of 1/64 from uniform times, the student's own second
    # jump, and squares of errors clipped to +-1.
    "consistency_distillation": flow_map.Config(
        diagonal=0.0, target_time="zero", derivative="substeps", step=1 / 64, velocity="teacher",
        teacher_decay=1.0, normaliser="clip",
    ),
    # sCM, 2410.11081 section 4: TrigFlow with sigma_d, tangent over its norm + .1, warmed up over
    # 10,000 steps; a learned weighting; lognormal times (-1, 1.4); RAdam, rate near 1e-4, dropout
    # .2 on CIFAR-10. Here the root mean square in place of the norm, 1,000 steps, no weighting.
    "scm": flow_map.Config(
        diagonal=0.0, target_time="zero", logit_normal=(-1.0, 1.4), normaliser="unit", limit=0.1,
        warmup=1000,
    ),
    # MeanFlow, 2505.13447 section 4: r = t on 75 % of the rows, logit-normal times (-.4, 1), p = 1,
    # c = .01, sums of squares; omega, kappa of (1, .5) or (2, 0) within an interval of t; class
    # dropout .1. Here r = t on half, as improved MeanFlow, and means; kappa is `guidance`, omega 1.
    "meanflow": flow_map.Config(
        logit_normal=(-0.4, 1.0), normaliser="power", limit=0.01, exponent=1.0
    ),
    # The same by differences, as TwinFlow's paper trained it at scale (2512.05150 Table 3, which
    # states no length). .005 is that of its authors' UCGM code.
    "meanflow_difference": flow_map.Config(
        logit_normal=(-0.4, 1.0), normaliser="power", limit=0.01, exponent=1.0,
        derivative="difference", step=0.005,
    ),
    # Improved MeanFlow, 2512.02012: the derivative along the network's own velocity, of another
    # head or F(x, t, t); guidance of [1, 8] and its interval are inputs; dropout .1; rate 1e-4 with
    # 10 epochs of warm-up. Here F(x, t, t), and no such inputs; the rest as meanflow.
    "improved_meanflow": flow_map.Config(
        logit_normal=(-0.4, 1.0), normaliser="power", limit=0.01, exponent=1.0, along="own"
    ),
    # The same beside TwinFlow's twin losses (2512.05150), which its paper has beside RCGM: ours.
    "twin_meanflow": flow_map.Config(
        logit_normal=(-0.4, 1.0), normaliser="power", limit=0.01, exponent=0.5, along="own",
        twin_share=0.05, rectify_weight=0.1,
    ),
    # alpha-Flow, 2510.20771: alpha falls as a sigmoid (gamma 25) from 1 to 0, in 400,000 steps;
    # within .005 of 0 it is the exact derivative. Rows weigh alpha / (mean square + c), targets are
    # clipped to +-4. Here to .005 in 10,000 steps and no further; weights of the sum of squares;
    # errors per unit of alpha, so that c stands where theirs is c / alpha^2; no clip.
    "alphaflow": flow_map.Config(
        logit_normal=(-0.4, 1.0), normaliser="power", limit=0.01, exponent=1.0,
        derivative="substeps", piece="ratio", step=1.0, last_step=0.005, anneal="sigmoid",
        anneal_steps=10_000,
    ),
    # Shortcut models, 2410.12557 section 3: an eighth of the rows, steps of a grid down to 1/128,
    # two half jumps of the average (.999), clipped to +-4; t on multiples of the step; guidance 1.5
    # at the smallest step, class dropout .1, weight decay .1. Here times are any where r = t,
    # errors are per unit of alpha (twice as large), and nothing is clipped.
    "shortcut": flow_map.Config(
        diagonal=0.875, target_time="grid", derivative="substeps", piece="ratio", step=0.5,
        velocity="jump", teacher_decay=0.999,
    ),
    # The four below are re-implementations from their papers, for one evaluation. In all:
    # velocities of the linear path in place of each paper's own network, so tau is uniform on it;
    # no guidance; rates are this project's but for vsd's (docs/method.md has the published ones, of
    # large networks); the fake is a copy of the start, or adapters over it where the run has those
    # (adapter.rank).
    #
    # ProlificDreamer, 2305.16213 section 3; for images SwiftBrush, 2312.05239: guidance 7.5 on both
    # scores, a LoRA of rank 64 and alpha 108 as the fake, its rate 1e-3, far above the student's.
    "vsd": matching.Config(rule="vsd", every=1, fake_learning_rate=1e-3),
    # DMD, 2311.18828 section 3: tau in [.02, .98], and a regression on the teacher's pictures (3.3)
    # of weight .25, in LPIPS, on a batch of its own. Here the squared distance of latents, on the
    # conditions of the same batch.
    "dmd": matching.Config(every=1, regression_weight=0.25),
    # DMD2, 2405.14867 section 4.2: two time scales, 5 updates of the fake for one of the student;
    # rates 2e-6 (ImageNet-64), 5e-7 (SDXL); guidance 8 (SDXL), 1.75 (SD1.5); clip 10. Without its
    # GAN (4.3) and several steps (4.4).
    "dmd2": matching.Config(),
    # SiD, 2404.04057 algorithm 1: tau up to .8 of its range, the fake first, each on fresh samples;
    # rates 1e-5, the student's loss times 100, sums. Here means; alpha 1 as for text, 1.2 with EDM.
    "sid": matching.Config(
        rule="sid", tau=(0.02, 0.8), turns="fake_first", every=2, fake_betas=(0.0, 0.999)
    ),
}


def preset(name: str, **fields: Any) -> dict[str, Any]:
    """The fields of a preset, some replaced, as a dict for a config file.

    Raises:
      UserError: no preset of that name, or a field that its form does not have.
    """
    if name not in PRESETS:
        raise UserError(f"no objective preset {name!r}; choose from {', '.join(PRESETS)}")
    known = dataclasses.asdict(PRESETS[name])
    for field in fields:
        if field not in known:
            raise UserError(
                f"the objective preset {name!r} has no field {field!r}; it has {', '.join(known)}"
            )
    return known | fields


@dataclasses.dataclass(frozen=True)
class Objective:
    """A form bound to its Config, for steps at which the networks `learns` do. Hashable, so that it
    can be a static argument of jit."""

    config: Shared
    learns: tuple[str, ...] = (STUDENT,)

    @property
    def form(self) -> Form:
        return FORMS[self.config.form]

    def counts(self, batch_size: int) -> Counts:
        """Rows per role of a batch, in row order.

        Raises:
          UserError: the batch is too small for each role in use to have a row.
        """
        counts = self.form.counts(batch_size, self.config)
        if not self._fills(batch_size):
            larger = next(filter(self._fills, range(batch_size + 1, batch_size + 100_000)), None)
            advice = f"a batch of {larger} fills all" if larger else "give it a larger share"
            raise UserError(
                f"a batch of {batch_size} leaves a role without rows "
                f"({', '.join(f'{role} {n}' for role, n in counts.items())}): {advice}; "
                "train.micro_steps splits a batch where memory is short"
            )
        return counts

    def _fills(self, batch_size: int) -> bool:
        used = self.form.counts(100_000, self.config)
        mine = self.form.counts(batch_size, self.config)
        return all(mine[role] > 0 for role, rows in used.items() if rows > 0)

    def draw(self, key, batch_size: int, sample_shape: tuple[int, ...]) -> Draws:
        return drawn(self.form, key, batch_size, sample_shape, self.config)

    def loss(
        self, apply: Apply, params, teacher_params, batch: Batch, draws: Draws,
        totals: Counts | None = None,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """As `Form.loss`, which says what params are."""
        more = {"learns": self.learns} if self.config.auxiliary else {}
        return self.form.loss(
            apply, params, teacher_params, batch, draws, self.config, totals, **more
        )

    def cut(self, draws: Draws, start: int, stop: int) -> Draws:
        """The draws of batch rows start to stop: those of one micro-batch."""
        return cut(draws, self.form.ROLES, start, stop)


def config_of(form: Any) -> type[Shared]:
    """The Config class of a form.

    Raises:
      UserError: no such form.
    """
    if form not in list(FORMS):  # what a config gives may have no hash
        raise UserError(f"objective.form is {form!r}; choose from {', '.join(FORMS)}")
    return FORMS[form].Config


def build(fields: Mapping[str, Any]) -> Objective:
    """An objective from a config's fields (`preset(...)`, perhaps overridden).

    Raises:
      UserError: unknown form or field, or a value that cannot be trained with.
    """
    return Objective(config_of(fields.get("form")).of(fields))
