"""A run's description: what trains, on what, how, and what is drawn meanwhile.

It is made once, at the door, and checked there; behind it functions take the part that they need.
The keys of `model` and `objective` are those of the family's and the form's own Config.
"""

import dataclasses
from typing import Any, ClassVar

from twinflow_jax import hub, keys, models, objectives, parallel, seeds
from twinflow_jax.errors import UserError, noted, tell
from twinflow_jax.keys import option
from twinflow_jax.models import int8
from twinflow_jax.models.adapters import Adapter
from twinflow_jax.models.settings import DTYPES, Settings
from twinflow_jax.objectives.config import STUDENT, Shared

RANDOM = "random"  # the `pipeline` of runs that make small random networks for themselves


@dataclasses.dataclass(frozen=True)
class Data(keys.Part):
    """What is trained on."""

    section: ClassVar[str] = "data"

    name: str = option("mnist5k", "labelled images, a name in data.sources.SOURCES")
    records: tuple[str, ...] = option(
        (), "in their place: folders that twinflow encode wrote", is_path=True
    )
    pairs: str = option(
        "", "in place of labelled images: a file of `twinflow sample --pairs`", is_path=True
    )
    weights: tuple[float, ...] = option(
        (), "each folder's share of the rows; none: by its records", above=0
    )
    batch_size: int = option(256, "rows of a step", least=1)
    text_tokens: int | tuple[int, ...] = option(
        64, "that every caption is cut or padded to; of several, such as (128, 256, 512), each "
        "record's are to the least that holds them, and a batch is of one", least=1,
    )

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """The tokens that captions are padded to, increasing."""
        return self.text_tokens if isinstance(self.text_tokens, tuple) else (self.text_tokens,)

    def __post_init__(self):
        super().__post_init__()
        lengths = self.text_lengths
        if not lengths or list(lengths) != sorted(set(lengths)):
            raise UserError(
                f"data.text_tokens is {lengths}; give one number, or increasing ones like "
                "(128, 256, 512)"
            )
        if len(lengths) > 1 and not self.records:
            raise UserError(
                f"data.text_tokens is {lengths}, but only data.records go by the lengths of their "
                "captions: give one number"
            )
        if self.weights and len(self.weights) != len(self.records):
            raise UserError(
                f"data.weights has {len(self.weights)} numbers for {len(self.records)} folders of "
                "data.records: give one for each, or none"
            )


@dataclasses.dataclass(frozen=True)
class Optimizer(keys.Part):
    """How a gradient becomes an update. Paper Table 6: AdamW or RAdam, constant, no decay."""

    section: ClassVar[str] = "optimizer"

    name: str = option("adamw", "the rule", choices=("adamw", "adam", "radam"))
    learning_rate: float = option(1e-4, "of an update, after warm-up", least=0)
    betas: tuple[float, float] = option(
        (0.9, 0.99), "decays of the gradient's two moments", least=0, below=1
    )
    eps: float = option(1e-8, "added to the second moment's root", least=0)
    weight_decay: float = option(0.0, "of adamw", least=0)
    clip_norm: float = option(0.0, "limit on the gradient's global norm; 0 is none", least=0)
    warmup: int = option(0, "steps of linear warm-up", least=0)
    decay_to: float = option(
        1.0, "share of the rate that a cosine ends at; 1 is constant", least=0
    )
    moments: str = option(
        "float32", "that moments are kept in; bfloat16 halves their memory", choices=DTYPES
    )

    @property
    def looks_ahead(self) -> bool:
        """Whether the rate of a step depends on how many there will be."""
        return self.decay_to != 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.weight_decay and self.name != "adamw":
            raise UserError(
                f"optimizer.weight_decay is {self.weight_decay}, but {self.name!r} has none: "
                "use optimizer.name=adamw"
            )
        self.check_betas(self.betas, "optimizer.betas")

    def check_betas(self, betas: tuple[float, float], key: str) -> None:
        """Refuses those of `key` that moments of this type cannot follow."""
        if self.moments != "float32" and betas[1] > 0.995:
            raise UserError(
                f"optimizer.moments is {self.moments!r}, whose three digits a beta of "
                f"{betas[1]} never moves: use {key} up to .995, or optimizer.moments=float32"
            )


@dataclasses.dataclass(frozen=True)
class Mesh(parallel.MeshConfig):
    """How devices share the work, and how layers come by their weights."""

    strategy: str = option(
        "partitioner", "how layers come by weights that are split",
        choices=tuple(parallel.STRATEGIES),
    )


@dataclasses.dataclass(frozen=True)
class Train(keys.Part):
    """How long, from what, and what is kept."""

    section: ClassVar[str] = "train"

    steps: int = option(1000, "optimizer steps in all", least=1)
    seed: int = option(
        42, "of initial weights, data order and all draws", least=0, most=seeds.LARGEST
    )
    weights: str = option(
        "float32", "that trained weights are kept in, or the base of adapters; bfloat16 is rounded "
        "stochastically where it trains, int8 is of a base's kernels", choices=(*DTYPES, int8.NAME),
    )
    micro_steps: int = option(1, "parts of a batch whose gradients add up to one update", least=1)
    ema_decay: float = option(
        0.99, "of the average of the weights that is sampled; 0: sample the raw ones",
        least=0, below=1,
    )
    unconditional: str = option(
        "empty", "what stands for no condition in guidance; permuted: other rows' conditions",
        choices=("empty", "permuted"),
    )
    condition_dropout: float = option(
        0.0, "share of rows that train without their condition", least=0, below=1
    )
    flow_matching_steps: int = option(0, "first steps that only learn velocities", least=0)
    init_from: str = option(
        "", "a run or an imported checkpoint whose weights to start from", is_path=True
    )
    log_every: int = option(50, "steps between two lines of metrics.jsonl", least=1)
    loggers: tuple[str, ...] = option(
        ("tensorboard",), "what takes metrics and pictures beside metrics.jsonl and index.html",
        choices=("tensorboard", "wandb"),
    )
    sample_every: int = option(500, "steps between two sheets of samples", least=1)
    checkpoint_every: int = option(500, "steps between two checkpoints", least=1)
    keep: int = option(3, "checkpoints that stay", least=1)
    hub: str = option(
        "", "USER/NAME: a model repository of the Hugging Face hub that checkpoints are pushed to, "
        "and fetched from where they are newer there"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.hub:
            hub.check_name("train.hub", self.hub)


@dataclasses.dataclass(frozen=True)
class Sample(keys.Part):
    """The pictures and metrics that are made while training."""

    section: ClassVar[str] = "sample"

    steps: tuple[int, ...] = option(
        (1, 2, 4), "evaluations of each block of pictures", least=1, most=1000
    )
    columns: int = option(8, "pictures of each class or prompt", least=1, most=100)
    prompts: tuple[str, ...] = option((), "what to draw from text; none: the data's captions")
    score_count: int = option(
        1000, "samples behind each metric; 0: pictures only", least=0, most=100_000
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.steps:
            raise UserError("sample.steps is (); give evaluations like (1, 2, 4)")
        if not all(map(str.strip, self.prompts)):
            raise UserError("sample.prompts has an empty one: leave it out")


PARTS = {part.section: part for part in (Adapter, Data, Optimizer, Mesh, Train, Sample)}
PIPELINE = keys.Key(
    str, "", "for text: an imported checkpoint, or random for small networks", is_path=True
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A whole run. model: a family's Config; objective: a form's.

    Raises:
      UserError: parts that do not go together; names the keys.
    """

    data: Data
    model: Settings
    objective: Shared
    optimizer: Optimizer
    mesh: Mesh
    train: Train
    sample: Sample
    adapter: Adapter = Adapter()
    pipeline: str = ""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Run":
        """The run of nested fields, as config files and records of runs have them.

        Raises:
          UserError: a key that there is not, or values that no run can have; names the key.
        """
        known, made = parts(fields), {}
        problems = [
            f"no config section {name!r}; there are {', '.join(known)}"
            for name in fields if name not in known and name != "pipeline"
        ]
        for name, part in known.items():
            with noted(problems):
                made[name] = part.of(fields.get(name, {}))
        with noted(problems):
            made["pipeline"] = PIPELINE.read("pipeline", fields.get("pipeline", ""))
        tell(problems)
        return cls(**made)

    @property
    def family(self) -> models.Family:
        return models.FAMILIES[self.model.name]

    @property
    def shape(self) -> models.Shape:
        """Of rows that the network is made for, with the longest text."""
        return models.shape_of(self.model, self.data.text_lengths[-1])

    @property
    def bound_objective(self) -> objectives.Objective:
        return objectives.Objective(self.objective)

    @property
    def only_velocities(self) -> bool:
        """Whether nothing but flow matching is done in it, whatever the objective is."""
        return self.train.steps <= self.train.flow_matching_steps or not self.objective.learns_jumps

    def learns(self, step: int) -> tuple[str, ...]:
        """The networks that learn at a step."""
        after, cycle = step - self.train.flow_matching_steps, self.objective.cycle
        return (STUDENT,) if after < 0 else cycle[after % len(cycle)]

    def updates(self, network: str) -> int:
        """The steps of the run at which a network learns."""
        first, cycle = self.train.flow_matching_steps, self.objective.cycle
        whole, rest = divmod(max(self.train.steps - first, 0), len(cycle))
        count = lambda turns: sum(network in turn for turn in turns)
        alone = min(self.train.steps, first) if network == STUDENT else 0
        return whole * count(cycle) + count(cycle[:rest]) + alone

    def fields(self) -> dict[str, Any]:
        """Every key's value, nested; the inverse of `of`."""
        return dataclasses.asdict(self)

    def __post_init__(self):
        train, rows = self.train, self.data.batch_size
        problems = []
        with noted(problems):
            self.bound_objective.counts(rows)  # refuses a batch too small for the roles
        if rows % train.micro_steps:
            problems.append(
                f"train.micro_steps is {train.micro_steps}, which does not divide the batch of "
                f"{rows}"
            )
        if self.objective.teacher_decay == 1 and not train.init_from:
            problems.append(
                "objective.teacher_decay is 1, a frozen teacher, but it would be random weights: "
                "set train.init_from to a trained run or an imported checkpoint"
            )
        if train.weights == int8.NAME and not self.adapter.rank:
            problems.append(
                "train.weights is 'int8', in which nothing can train: set adapter.rank, whose base "
                "it is for, or train.weights=bfloat16"
            )
        half_r = getattr(self.model, "time_conditioning", "") == "half_r"
        if half_r and self.objective.any_jumps and self.objective.order == 1:
            steps = self.objective.derivative in ("", "substeps")
            more = "objective.order=2, " if steps else ""
            problems.append(
                "objective.order is 1 with jumps of any length, but model.time_conditioning "
                "'half_r' sees t - r / 2 alone, the same for many of them: take "
                f"objective.target_time=zero (twinflow, flow_map), {more}or another "
                "time_conditioning"
            )
        drawn = self.family.text_to_image is not None
        given, source = (
            (self.data.records, "data.records to what `twinflow encode --generate --pairs` wrote")
            if drawn else (self.data.pairs, "data.pairs to a file of `twinflow sample --pairs`")
        )
        if self.objective.pairs and not given:
            problems.append(
                f"the objective learns from pairs: set {source}, or objective.regression_weight=0"
            )
        if self.data.pairs and not self.objective.pairs:
            problems.append(
                f"data.pairs is set, but objective {self.objective.form!r} learns from none: leave "
                "it out"
            )
        elif self.data.pairs and drawn:
            problems.append(f"data.pairs is of classes, but model {self.model.name!r} draws from "
                            f"text: set {source}")
        text = self.family.text_to_image
        if text is not None and text.editing and train.unconditional == "permuted":
            problems.append(
                f"train.unconditional is 'permuted', but model {self.model.name!r} edits pictures, "
                "and what stands for no instruction is about a row's own: take empty"
            )
        if self.objective.auxiliary:
            problems += [
                f"train.steps is {train.steps}, in which objective.turns never trains the {name}: "
                "give more steps, or a smaller objective.every"
                for name in (STUDENT, *self.objective.auxiliary) if not self.updates(name)
            ]
            if not self.optimizer.learning_rate:
                problems.append("optimizer.learning_rate is 0, which never trains the student")
            for name, own in self.objective.auxiliary.items():
                with noted(problems):
                    self.optimizer.check_betas(own["betas"], f"objective.{name}_betas")
        conditional = self.pipeline or self.model.num_classes
        if self.objective.guided and not (drawn or self.model.num_classes):
            problems.append(
                f"{self.objective.guided} compares a condition with none, but model.num_classes is "
                "0: set it to the classes of the data, or guide nothing (objective.guidance=0, "
                "objective.real_guidance=1)"
            )
        untrained = train.unconditional == "empty" and not (
            train.condition_dropout or train.init_from
        )
        if self.objective.guidance and conditional and untrained:
            problems.append(
                "objective.guidance compares with the empty condition, which nothing trains here: "
                "set train.unconditional=permuted, train.condition_dropout=0.1, or train.init_from"
            )
        tell(problems)


def parts(fields: dict[str, Any]) -> dict[str, type[keys.Part]]:
    """The class of each part that nested fields describe, by section.

    Raises:
      UserError: no such family of networks, or form of the objective, or a section that is none.
    """
    names = [field.name for field in dataclasses.fields(Run)[:-1]]
    tell([
        f"{name} is {fields[name]!r}; it takes a section, keys with values"
        for name in names if not isinstance(fields.get(name, {}), dict)
    ])
    of_run = {
        "model": models.config_of(fields.get("model", {}).get("name")),
        "objective": objectives.config_of(fields.get("objective", {}).get("form")),
    } | PARTS
    return {name: of_run[name] for name in names}


def keys_of(fields: dict[str, Any]) -> dict[str, keys.Key]:
    """Every key of the run that nested fields describe, by "section.name"."""
    found = {"pipeline": PIPELINE}
    for section, part in parts(fields).items():
        found |= {f"{section}.{name}": one for name, one in keys.keys_of(part).items()}
    return found
