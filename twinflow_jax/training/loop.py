"""The training loop: step, watch, save, and leave cleanly whatever happens."""

import contextlib
import dataclasses
import signal
import time

import jax
import ml_collections
from tqdm import tqdm

from twinflow_jax import checkpoints, data, models, objectives
from twinflow_jax.checkpoints import imported, store
from twinflow_jax.checkpoints.saver import abstract
from twinflow_jax.errors import UserError
from twinflow_jax.training import checks, inputs, optimizers, state, step
from twinflow_jax.training.log import Log
from twinflow_jax.training.preview import Preview


class Interrupted(Exception):
    """A signal asked training to stop; the state is saved. `signal` is its number."""

    def __init__(self, signal_number: int, at_step: int):
        super().__init__(f"stopped at step {at_step}")
        self.signal, self.step = signal_number, at_step


def train(
    config: ml_collections.ConfigDict, workdir: str, progress: bool = True
) -> state.TrainState:
    """Trains, or goes on training, the run of `config` in `workdir`; returns its last state.

    Everything about the run is in workdir: config.json, checkpoints/, samples/, metrics.jsonl
    and tensorboard/. Killed and started again, it ends with the same bits.

    Raises:
      UserError: a config that cannot be trained, a workdir of another run, no room to save, or
        a loss that became NaN (with its step and term).
      Interrupted: after SIGTERM or SIGINT, the state being saved.
    """
    family, settings = models.settings_of(config.model)
    objective = objectives.build(config.objective)
    checks.check_values(config)
    objective.counts(config.data.batch_size)  # refuses a batch too small for the roles
    optimizer = optimizers.create(config.optimizer, config.train.steps)
    dataset = data.load(config.data.name)
    checks.check_fit(config, family, settings, dataset)
    checkpoints.claim(workdir, config)
    try:
        prepared = inputs.prepare(config, dataset, workdir)
        steps = make_steps(config, prepared.model, objective, optimizer)
        return run(config, workdir, prepared, objective, optimizer, steps, progress)
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir} ({error.strerror or error}): make room there, then start "
            "the same command again; it goes on from the last complete checkpoint"
        ) from error


def run(
    config, workdir, prepared: inputs.Inputs, objective, optimizer, steps, progress
) -> state.TrainState:
    """The loop itself, from the newest checkpoint of `workdir` to the last step."""
    model = prepared.model
    with contextlib.ExitStack() as stack:
        saver = checkpoints.Saver(workdir, config.train.keep)
        stack.callback(saver.close)
        current = start(config, model, objective, optimizer, saver)
        first = int(current.step)
        preview = Preview(config, prepared, workdir)
        log = stack.enter_context(Log(workdir, first))
        if preview.missing(first):  # killed between a checkpoint and its pictures
            log.write_samples(first, preview.make(state.sampling_params(current), first))
        if first >= config.train.steps:
            print(f"{workdir} is complete: step {first} of {config.train.steps}", flush=True)
            return current
        batches = data.batches(prepared.split, config.data.batch_size, config.train.seed, first)
        compiled = compile_steps(steps, current, prepared, first, config, progress)
        stopper = stack.enter_context(Stopper())
        bar = stack.enter_context(
            tqdm(total=config.train.steps, initial=first, unit="step", disable=not progress,
                 dynamic_ncols=True, smoothing=0.1)
        )

        pending = None  # metrics of the step before, read while this one runs
        for i in range(first, config.train.steps):
            choice = "flow_matching" if i < config.train.flow_matching_steps else "objective"
            current, metrics = compiled[choice](current, prepared.batch(next(batches)))
            if pending:
                log.add(*pending)
            pending = (i + 1, metrics)
            done, last = i + 1, i + 1 == config.train.steps
            bar.update()
            stop = stopper.signal  # read once: one that comes later waits for the next step
            report = done % config.train.log_every == 0 or last
            keep = done % config.train.checkpoint_every == 0 or last or stop
            if report or keep:
                log.add(*pending)  # a state with NaN is never saved
                pending = None
            if report:
                bar.set_postfix_str(log.write(done))
            if keep:
                saver.save(done, state.to_parts(current))
            if done % config.train.sample_every == 0 or last:
                scores = preview.make(state.sampling_params(current), done)
                log.write_samples(done, scores)
                bar.write(Preview.line(done, scores)) if progress else None
            if stop and not last:
                saver.wait()
                raise Interrupted(stop, done)
        saver.wait()
    return current


def make_steps(config, model, objective, optimizer) -> dict:
    """The jitted steps of the two phases: flow matching first, where asked for, then the rest."""
    train = config.train
    settings = step.StepConfig(
        train.seed, train.micro_steps, train.ema_decay, train.unconditional,
        train.condition_dropout,
    )
    phases = {"objective": objective}
    if train.flow_matching_steps:
        phases["flow_matching"] = objectives.build(
            objectives.preset("flow_matching", teacher_decay=objective.config.teacher_decay)
        )
    return {
        name: step.make_step(phase, model.apply, model.null_cond, optimizer, settings)
        for name, phase in phases.items()
    }


def compile_steps(
    steps, current, prepared: inputs.Inputs, first: int, config, progress: bool
) -> dict:
    """The steps compiled for this state and batch, before the clock of training starts."""
    begin = time.perf_counter()
    example = prepared.example(config.data.batch_size)
    needed = set()
    if first < config.train.flow_matching_steps:
        needed.add("flow_matching")
    if config.train.steps > config.train.flow_matching_steps:
        needed.add("objective")
    compiled = {name: steps[name].lower(current, example).compile() for name in needed}
    if progress:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(current.params))
        print(
            f"{config.model.name} of {parameters:,} parameters; "
            f"compiled in {time.perf_counter() - begin:.1f} s",
            flush=True,
        )
    return compiled


def start(config, model, objective, optimizer, saver: checkpoints.Saver) -> state.TrainState:
    """The state to go on from: the newest checkpoint, another run's weights, or fresh ones."""

    def fresh(params) -> state.TrainState:
        decays = objective.config.teacher_decay, config.train.ema_decay
        return state.create(params, optimizer, *decays)

    key = jax.random.fold_in(jax.random.key(config.train.seed), 2**31 - 1)  # no step's key
    begin = jax.jit(lambda: fresh(model.init(key)))()
    restored = saver.restore(abstract(state.to_parts(begin)))
    if restored is not None:
        return state.from_parts(restored)
    if config.train.init_from and imported.is_imported(config.train.init_from):
        return fresh(load_transformer(config.train.init_from, model))
    if config.train.init_from:
        _, other, params, _ = checkpoints.load_weights(config.train.init_from)
        theirs, ours = (dataclasses.asdict(m.config) for m in (other, model))
        differing = [k for k in theirs.keys() | ours if theirs.get(k) != ours.get(k)]
        if differing:
            raise UserError(
                f"train.init_from {config.train.init_from} is another network: it differs in "
                + ", ".join(f"model.{k} ({theirs.get(k)!r})" for k in sorted(differing))
            )
        return fresh(params)
    return begin


def load_transformer(folder: str, model: models.Model):
    """The velocity network of an imported checkpoint, as float32 master weights.

    Raises:
      UserError: it is of another architecture.
    """
    arrays = imported.open_imported(folder).arrays("transformer")
    abstract = store.on_one_device(model.abstract_params())
    return store.load(arrays, abstract, f"{folder}: transformer")


class Stopper:
    """Notes SIGTERM and SIGINT instead of dying; a second one is not held back."""

    def __init__(self):
        self.signal = 0

    def __enter__(self):
        self._before = {}
        with contextlib.suppress(ValueError):  # signals are the main thread's
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.signal = number
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_):
        self._restore()
