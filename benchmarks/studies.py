"""What benchmarks/compare.py compares: methods, what a search of each draws, studies, and costs."""

import dataclasses
import functools
import itertools
import pathlib
import random
import statistics
from collections.abc import Callable

from twinflow_jax import config as configs
from twinflow_jax import objectives
from twinflow_jax.objectives.config import Shared
from twinflow_jax.training import flops

Settings = dict[str, object]  # overrides of a config, by key


@dataclasses.dataclass(frozen=True)
class Method:
    """Overrides of a study's config, and what a search draws in their place, by key."""

    own: Settings
    search: dict[str, tuple] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Judge:
    """command: `(run, evaluations with commas, file of scores) ->` arguments of Python. scores:
    those that stand in the table, and their digits. distance: the one that ranks, the lower the
    better, and what it is."""

    command: Callable[[str, str, str], list[str]]
    scores: dict[str, int]
    distance: tuple[str, str] = ("frechet", "Frechet distance")


@dataclasses.dataclass(frozen=True)
class Study:
    """What all methods share. start: steps that learn velocities first, or a run that did. steps:
    of the first method, after them; the others make as many forwards. rates, guidance: what a
    search takes the study's own times. shared: overrides of all, of the start too. presets: whether
    each trial 0 is one, which stands in the table beside what a search found."""

    config: str
    judge: Judge
    start: int | str
    steps: int
    methods: dict[str, Method]
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    guidance: tuple[float, ...] = (1.0,)
    shared: Settings = dataclasses.field(default_factory=dict)
    presets: bool = True

    @functools.cached_property
    def own(self) -> Settings:
        """The config's values and the shared ones, by key."""
        return configs.flatten(configs.load(self.config).to_dict()) | self.shared


def method(preset: dict[str, object], **search: tuple) -> Method:
    """Of an objective's fields, and of those that a search draws."""
    keyed = lambda fields: {f"objective.{key}": value for key, value in fields.items()}
    return Method(keyed(preset), keyed(search))


def rivals(guidance: float, twin_share: float = 0.05) -> dict[str, Method]:
    """Every objective, TwinFlow first. twin_share: of twin_meanflow's rows."""
    frozen = in_effect(guidance) - 1  # a frozen teacher's g guides by 1 + g
    twinflow = objectives.preset("released", distance="l2", guidance=guidance)
    released = {"teacher_decay": (0.99, 0.999)}
    preset = functools.partial(objectives.preset, guidance=guidance)
    jumps = {
        "diagonal": (0.25, 0.5, 0.75), "logit_normal": ((), (-0.4, 1.0), (0.4, 1.0)),
        "exponent": (0.5, 1.0),
    }
    return {
        "twinflow": method(
            twinflow, **released, rectify_weight=(1.0, 2.0, 3.0),
            ratios=((1.0, 1.0, 1.0, 1.0), (0.2, 0.3, 0.3, 0.2), (0.05, 0.45, 0.45, 0.05)),
        ),
        "rcgm": method(
            twinflow | {"ratios": (1.0, 1.0, 1.0, 0.0), "rectify_weight": 0.0}, **released,
            order=(1, 2), dt=(0.01, 0.03, 0.1),
            ratios=((1.0, 1.0, 1.0, 0.0), (0.2, 0.4, 0.4, 0.0), (0.05, 0.475, 0.475, 0.0)),
        ),
        "flow_matching": method(
            preset("flow_matching", teacher_decay=0.99), sample_weight=(True, False)
        ),
        "consistency_training": method(
            preset("consistency_training"), last_step=(1 / 256, 1 / 128, 1 / 32),
            limit=(0.3, 1.0, 4.0),
        ),
        "consistency_distillation": method(
            preset("consistency_distillation", guidance=frozen), step=(1 / 128, 1 / 64, 1 / 16),
            limit=(0.3, 1.0, 4.0),
        ),
        "scm": method(
            preset("scm"), limit=(0.03, 0.1, 1.0), logit_normal=((), (-1.0, 1.4), (0.0, 1.4))
        ),
        "shortcut": method(preset("shortcut"), diagonal=(0.5, 0.75, 0.875)),
    } | {
        name: method(preset(name), **jumps)
        for name in ("meanflow", "meanflow_difference", "improved_meanflow", "alphaflow")
    } | {
        "twin_meanflow": method(
            preset("twin_meanflow", twin_share=twin_share), **jumps,
            twin_share=(twin_share, 2 * twin_share, 4 * twin_share),
            rectify_weight=(0.05, 0.1, 0.3),
        )
    } | {
        "vsd": matching("vsd", guidance), "dmd": matching("dmd", guidance, regression_weight=0.0),
        "dmd2": matching("dmd2", guidance), "sid": matching("sid", guidance),
    }


def in_effect(guidance: float) -> float:
    """What a moving teacher's guidance comes to: it learns its own guided targets."""
    return 1 / (1 - guidance)


def matching(preset: str, guidance: float, **fields: float) -> Method:
    """Of the scores of two networks, the data's guided as much as a moving teacher comes to."""
    scales = 1.0, in_effect(1.5 * guidance), in_effect(guidance)  # none, more, and the study's
    guided = objectives.preset(preset, real_guidance=scales[-1], **fields)
    own = method(
        guided, fake_learning_rate=(1e-4, 3e-4, 1e-3),
        real_guidance=tuple(dict.fromkeys(scales)),
    )
    return Method(own.own | {"optimizer.learning_rate": 2e-4}, own.search)


def regressed(guidance: float) -> dict[str, Method]:
    """DMD with its regression, on noise and what the start makes of it, without guidance."""
    dmd = matching("dmd", guidance)
    return {"dmd_pairs": Method(dmd.own | {"data.pairs": "the start's"}, dmd.search)}


def adapters(guidance: float, *rates: float) -> dict[str, Method]:
    """Ways to train adapters (LoRA), and all weights first. guidance: as its targets come to it,
    1 being none: a moving teacher's is 1 / (1 - g), a frozen one's 1 + g. rates: beside .001."""
    moving, frozen = 1 - 1 / guidance, guidance - 1

    def one(
        rank: int, times: str = "second_embedder", order: int = 2, teacher: float = 0.99,
        target: str = "sampled",
    ) -> Method:
        fields = objectives.preset(
            "released", distance="l2", order=order, teacher_decay=teacher, target_time=target,
            guidance=frozen if teacher == 1 else moving,
        )
        gated = {"adapter.whole": ("gated_time_embedder/.*",)} if times == "gated" else {}
        return Method(method(fields).own | gated | {
            "model.time_conditioning": times, "adapter.rank": rank,
            "optimizer.learning_rate": 1e-3,
        }, {"optimizer.learning_rate": rates})

    return {
        "full": one(0), "rank 4": one(4), "rank 16": one(16), "rank 64": one(64),
        "half_r": one(16, "half_r"), "gated": one(16, "gated"),
        "student teaches": one(16, teacher=0.0), "base teaches": one(16, teacher=1.0),
        "order 1": one(16, order=1), "order 1 and base teaches": one(16, order=1, teacher=1.0),
        "order 1 and gated": one(16, "gated", 1),
        "order 1 to 0": one(16, order=1, teacher=1.0, target="zero"),
        "order 1 to 0 and half_r": one(16, "half_r", 1, 1.0, "zero"),
    }


def evaluate(*which: str) -> Callable[[str, str, str], list[str]]:
    """`twinflow evaluate`, of so much."""
    return lambda run, steps, file: [
        "-m", "twinflow_jax.evaluate", *which, "--checkpoint", run, "--steps", steps,
        "--json", file,
    ]


CLASSES = Judge(evaluate("classes"), {"accuracy": 3, "frechet": 1, "diversity": 2})
CAPTIONS = Judge(
    evaluate(
        "captions", "--records", "data/emoji32/held_out_concepts",
        "--train-records", "data/emoji32/train", "--features", "features.safetensors",
    ),
    {"retrieval": 3, "frechet": 1, "diversity": 2},
)
EDITS = Judge(
    lambda run, steps, file: [
        str(pathlib.Path(__file__).with_name("edits.py")), f"{run}:{steps}", "--json", file,
    ],
    {"right": 3, "another instruction": 3, "error": 4}, ("error", "mean square error"),
)
STUDIES = {
    "digits": Study("configs/digits.py", CLASSES, 1000, 2000, rivals(0.0) | regressed(0.0)),
    "digits_lora": Study(
        "configs/digits.py", CLASSES, 3000, 800, adapters(2.0, 1e-4, 3e-4, 3e-3),
        presets=False, shared={
            "model.name": "dit", "model.sample_shape": (8, 8, 1), "model.patch": 2,
            "model.width": 64, "model.depth": 2, "objective.guidance": 0.0,
            "train.condition_dropout": 0.1, "data.batch_size": 64,
        },
    ),
    "mnist": Study(
        "configs/mnist.py:released", CLASSES, 2000, 8000, rivals(0.25) | regressed(0.25),
        rates=(1.0, 2.0), guidance=(1.0, 1.5),
    ),
    "emoji": Study(
        "configs/emoji.py:released", CAPTIONS, "runs/emoji_flow", 6000, rivals(0.5, 0.1),
        rates=(1.0, 2.0), guidance=(1.0, 1.5),
    ),
    "emoji_lora": Study(
        "configs/emoji.py:released", CAPTIONS, "runs/emoji_flow", 400, adapters(2.0, 3e-4, 3e-3),
        shared={"optimizer.warmup": 20}, presets=False,
    ),
    "edits_lora": Study(
        "configs/emoji_edit.py", EDITS, 2400, 300, adapters(1.0, 3e-4, 3e-3),
        presets=False, shared={
            "pipeline": "random", "train.init_from": "", "data.name": "digits", "data.records": (),
            "data.text_tokens": 24, "model.sample_shape": (8, 8, 3), "model.patch": 2,
            "model.layers": 3, "model.heads": 4, "model.head_dim": 16,
            "model.rope_axes": (4, 6, 6), "model.text_width": 48, "train.ema_decay": 0.99,
            "optimizer.learning_rate": 2e-3, "optimizer.warmup": 20, "objective.guidance": 0.0,
        },
    ),
}


def color(method: str) -> str:
    """In plots: methods with twin losses stand out, and all weights among adapters."""
    return "tab:orange" if method in ("twinflow", "twin_meanflow", "full") else "tab:blue"


def settings(study: Study, name: str, trial: int) -> Settings:
    """Of one trial, no two alike until all were drawn; 0 is the method's own, or the start's none.
    """
    if name == "start":
        return {}
    chosen = study.methods[name]
    if trial == 0:
        return chosen.own
    times = lambda key, by: {key: [(study.own | chosen.own)[key] * factor for factor in by]}
    space = times("optimizer.learning_rate", study.rates) | chosen.search
    if "objective.guidance" in chosen.own:
        space |= times("objective.guidance", study.guidance)
    points = list(itertools.product(*space.values()))
    random.Random(name).shuffle(points)
    known = study.own | chosen.own
    if (own := tuple(known[key] for key in space)) in points:  # trial 0; the last takes its place
        points[points.index(own)] = points[-1]
        points.pop()
    return chosen.own | dict(zip(space, points[(trial - 1) % len(points)], strict=True))


def cost(study: Study, name: str, trial: int = 0) -> float:
    """Forward-equivalents of a step, of its batch: a role's rows cost more than another's."""
    changes = study.shared | settings(study, name, trial) | {"train.init_from": "start"}
    run = configs.parse(study.config, [f"{key}={value}" for key, value in changes.items()])
    return forwards(turns_of(run.objective), run.data.batch_size)


def turns_of(config: Shared) -> list[objectives.Objective]:
    """The objective of each step of a cycle."""
    return [objectives.Objective(config, learns) for learns in config.cycle]


def forwards(turns: list[objectives.Objective], rows: int) -> float:
    """Forward-equivalents of a step, of its batch, in the mean over turns."""
    worth = [flops.worth(flops.Forward(1, 0), flops.calls(turn, rows, (2,))) for turn in turns]
    return statistics.mean(worth) / rows


def spanning(chosen: Settings, steps: int) -> Settings:
    """Settings whose schedules are of a whole training of so many steps."""
    parts = {"objective.anneal_steps": steps, "objective.warmup": steps // 10}
    return chosen | {key: span for key, span in parts.items() if chosen.get(key)}
