"""What no run can be trained with, refused before anything is written."""

import dataclasses

from twinflow_jax import checkpoints, data, models, objectives, seeds
from twinflow_jax import config as configs
from twinflow_jax.checkpoints import imported
from twinflow_jax.data.records import Records
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.training import optimizers


def check_values(config) -> None:
    """Refuses values that no run can have.

    Raises:
      UserError: names the key, its value and what it takes.
    """
    objectives.build(config.objective)
    train, sample = config.train, config.sample
    least = {
        "train.steps": 1, "train.micro_steps": 1, "train.log_every": 1,
        "train.sample_every": 1, "train.checkpoint_every": 1, "train.keep": 1,
        "train.flow_matching_steps": 0, "data.batch_size": 1, "sample.columns": 1,
        "data.text_tokens": 1,
        "sample.score_count": 0, "optimizer.warmup": 0,
    }
    flat = configs.flatten(config.to_dict())
    for key, bound in least.items():
        if flat[key] < bound:
            raise UserError(f"{key} is {flat[key]}; give {bound} or more")
    seeds.check(train.seed, "train.seed")
    for key in ("train.ema_decay", "train.condition_dropout"):
        if not 0 <= flat[key] < 1:
            raise UserError(f"{key} is {flat[key]}; it lies in [0, 1)")
    if train.weights not in optimizers.DTYPES:
        raise UserError(
            f"train.weights is {train.weights!r}; choose from {', '.join(optimizers.DTYPES)}"
        )
    if not sample.steps or min(sample.steps) < 1:
        raise UserError(f"sample.steps is {sample.steps}; give evaluations like (1, 2, 4)")
    if len(config.optimizer.betas) != 2 or not all(0 <= b < 1 for b in config.optimizer.betas):
        raise UserError(f"optimizer.betas is {config.optimizer.betas}; give two in [0, 1)")
    frozen = config.objective.teacher_decay == 1
    if frozen and not train.init_from:
        raise UserError(
            "objective.teacher_decay is 1, a frozen teacher, but it would be random weights: "
            "set train.init_from to a trained run"
        )
    conditional = config.pipeline or config.model.get("num_classes", 0) > 0
    guided = config.objective.get("guidance", 0.0) > 0 and conditional
    untrained = train.unconditional == "empty" and not (train.condition_dropout or train.init_from)
    if guided and untrained:
        raise UserError(
            "objective.guidance compares with the empty condition, which nothing trains here: set "
            "train.unconditional=permuted, train.condition_dropout=0.1, or train.init_from"
        )


def check_fit(
    config, family: models.Family, settings, source: data.Dataset | list[Records]
) -> None:
    """Refuses data of less than a batch, a network that does not take it, or a pipeline that
    does not fit it.

    settings: the network's. source: a named dataset, or folders of records.
    Raises:
      UserError: says what differs.
    """
    total = len(source.train) if isinstance(source, data.Dataset) else sum(map(len, source))
    if total < config.data.batch_size:
        raise UserError(
            f"data has {total} rows to train on, too few for a batch of {config.data.batch_size}: "
            "give more, or a smaller data.batch_size"
        )
    if family.text_to_image is not None:
        check_pipeline(config, settings)
        if config.data.records:
            check_encoders(config, source)
        return
    if config.pipeline or config.data.records:
        key = "pipeline" if config.pipeline else "data.records"
        raise UserError(f"{key} is set, but model {config.model.name!r} draws no text")
    shape = source.train.x.shape[1:]
    if tuple(settings.sample_shape) != shape:
        raise UserError(
            f"model.sample_shape is {tuple(settings.sample_shape)}, but data {source.name!r} has "
            f"images of {shape}"
        )
    if settings.num_classes not in (0, source.num_classes):
        raise UserError(
            f"model.num_classes is {settings.num_classes}, but data {source.name!r} has "
            f"{source.num_classes} classes (0 for none)"
        )


def check_length(config, workdir: str) -> None:
    """Refuses another number of steps than a run was started with, where that would change what
    it has done.

    Raises:
      UserError: says what would change, and what to do.
    """
    done = checkpoints.steps_of(workdir)
    if not done:
        return
    steps, before = config.train.steps, checkpoints.read_config(workdir).train.steps
    if steps < done[-1]:
        raise UserError(
            f"{workdir} has done {done[-1]} steps: train.steps is {steps}; give that many or more"
        )
    if steps != before and optimizers.looks_ahead(config.optimizer):
        raise UserError(
            f"{workdir} was started for {before} steps, at the end of which its rate comes to "
            f"optimizer.decay_to={config.optimizer.decay_to}: for {steps}, the steps that are done "
            f"would have had other rates. Give train.steps={before}, or start from its weights in "
            f"another --workdir (train.init_from={workdir})"
        )


def check_start(config, settings) -> None:
    """Refuses to start from what is no run, or from another network. settings: the network's.

    Raises:
      UserError: says what is missing or differs.
    """
    source = config.train.init_from
    if not source or imported.is_imported(source):
        return
    other = models.settings_of(checkpoints.open_weights(source)[0].model)[1]
    theirs, ours = (dataclasses.asdict(one) for one in (other, settings))
    free = {"remat", "dtype"}  # of computing, not of the weights
    differing = [k for k in (theirs.keys() | ours) - free if theirs.get(k) != ours.get(k)]
    if differing:
        raise UserError(
            f"train.init_from {source} is another network: it differs in "
            + ", ".join(f"model.{k} ({theirs.get(k)!r})" for k in sorted(differing))
        )


def check_encoders(config, folders: list[Records]) -> None:
    """Refuses records made with another text encoder or autoencoder than the pipeline's."""
    if config.pipeline == checkpoints.RANDOM:
        raise UserError(
            "pipeline is random, but data.records were made with networks: set pipeline to the "
            "checkpoint that they were encoded with"
        )
    checkpoint = imported.open_imported(config.pipeline)
    for folder in folders:
        for field, network in (("text_encoder", "text_encoder"), ("autoencoder", "vae")):
            mine, theirs = getattr(folder.manifest, field), checkpoint.identity(network)
            if mine and mine != theirs:
                raise UserError(
                    f"the records in {folder.folder} were made with the {field.replace('_', ' ')} "
                    f"{mine}, but pipeline {config.pipeline} has {theirs}: encode them with it"
                )


def check_pipeline(config, settings) -> None:
    """Refuses a pipeline whose transformer is not the one that is trained."""
    if not config.pipeline:
        raise UserError(
            f"model {config.model.name!r} draws from text: set pipeline to an imported checkpoint "
            "(tools/convert.py), or to random for small random networks"
        )
    family = models.FAMILIES[config.model.name].text_to_image

    def theirs_of(name):
        if config.pipeline == checkpoints.RANDOM:
            return family.networks[name].config.from_published(family.tiny[name])
        return imported.open_imported(config.pipeline).config(name)

    network = family.networks["transformer"]
    if not network.published:  # of any size, for that text
        width = theirs_of("text_encoder").width
        if settings.text_width != width:
            raise UserError(
                f"model.text_width is {settings.text_width}, but the text encoder of pipeline "
                f"{config.pipeline} makes tokens of {width} channels: set it to that"
            )
        return
    theirs = theirs_of("transformer")
    ours, theirs = (names.flatten(network.abstract(c)[0]) for c in (settings, theirs))
    differing = [
        path for path in ours.keys() | theirs
        if path not in ours or path not in theirs or ours[path].shape != theirs[path].shape
    ]
    if differing:
        raise UserError(
            f"pipeline {config.pipeline} has another transformer than model: {len(differing)} "
            f"parameters differ, as {min(differing)}; make the model's fields those of its "
            "config.json"
        )
