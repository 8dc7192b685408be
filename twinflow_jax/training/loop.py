"""The training loop: step, watch, save, and leave cleanly whatever happens."""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from twinflow_jax import buckets, checkpoints, data, files, models, parallel, seeds
from twinflow_jax.checkpoints import store
from twinflow_jax.config import Run, to_json
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.parallel import flags, hosts
from twinflow_jax.training import checks, inputs, loggers, page, setup, state
from twinflow_jax.training import preview as previews
from twinflow_jax.training.log import Log
from twinflow_jax.training.watch import Clock, Watch

PACKAGE = pathlib.Path(__file__).resolve().parents[1]


class Interrupted(Exception):
    """A signal asked training to stop. `signal` is its number; saved: whether the state was,
    which needs no saving before the first step."""

    def __init__(self, signal_number: int, at_step: int, saved: bool):
        super().__init__(f"stopped at step {at_step}")
        self.signal, self.step, self.saved = signal_number, at_step, saved


def train(run: Run, workdir: str, progress: bool = True) -> state.TrainState:
    """Trains, or goes on training, a run in `workdir`; returns its last state.

    Everything about the run is in workdir: config.json, checkpoints/, samples/, metrics.jsonl,
    tensorboard/, and index.html to look at. Killed and started again, it ends with the same bits.

    Raises:
      UserError: data or a start that does not go with the run, a workdir of another run, no room
        to save or in memory, or a loss that became NaN (with its step and term).
      Interrupted: after SIGTERM or SIGINT, the state being saved.
    """
    clock = Clock()
    hosts.agree({"config": to_json(run).encode(), "code": hosts.code(PACKAGE)})
    prepared = setup.prepare(run)
    checks.check_memory(prepared)
    source = inputs.open_data(run)
    checks.check_fit(run, source)
    shares = inputs.shapes(run, source)
    if progress and len(run.data.text_lengths) > 1:
        told = inputs.by_text(shares).items()
        print("text tokens: " + ", ".join(f"{n} for {part:.1%} of rows" for n, part in told))
    shapes = list(shares)
    if not (epath.Path(workdir) / "checkpoints").exists():
        checks.check_start(run)
    try:
        with contextlib.ExitStack() as stack:
            rows = inputs.digest(source)
            carrier = checkpoints.Carrier(workdir, run, rows, hosts.leads())
            hosts.first(lambda: stack.enter_context(claimed(run, workdir, rows, carrier)))
            stack.enter_context(contextlib.closing(carrier))
            keep_compiled(workdir)
            mirror = buckets.Mirror(workdir, ("metrics.jsonl", "speed.jsonl"), hosts.leads())
            stack.enter_context(contextlib.closing(mirror))  # after the saver, which settles it
            saver = checkpoints.Saver(workdir, run.train.keep)
            stack.enter_context(contextlib.closing(saver))
            # Before anything slow, so that errors come early.
            newest = hosts.told(saver.steps[-1] if saver.steps else 0)
            with clock.part("compiling"):
                steps = compile_phases(prepared, shapes, newest, progress, {})
            with clock.part("inputs"):
                known = inputs.prepare(run, source, workdir)
            return loop(
                prepared, known, shapes, steps, saver, mirror, carrier, workdir, progress, clock
            )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"training does not fit the devices' memory: {checks.SMALLER}") from error
    except OSError as error:
        if answered := buckets.explained(error):
            raise answered from error
        advice = "make room there" if files.is_full(error) else "put that right"
        raise UserError(
            f"{error.filename or workdir} cannot be read or written ({error.strerror or error}): "
            f"{advice}, then start the same command again; it goes on from the last complete "
            "checkpoint. Where it never will be, choose another --workdir"
        ) from error


@contextlib.contextmanager
def claimed(
    run: Run, workdir: str, rows: str, carrier: checkpoints.Carrier
) -> Iterator[None]:
    """The folder as this run's, unless it cannot be: then nothing in it is touched. First comes
    what the hub has, if that is newer."""
    checkpoints.check_claim(workdir, run, rows)
    loggers.check(run)
    carrier.fetch()
    checks.check_length(run, workdir)
    with checkpoints.claim(workdir, run, rows):
        carrier.claim()
        yield


def loop(
    prepared: setup.Setup, known: inputs.Inputs, shapes: list[models.Shape], steps: dict,
    saver: checkpoints.Saver, mirror: buckets.Mirror, carrier: checkpoints.Carrier, workdir: str,
    progress: bool, clock: Clock,
) -> state.TrainState:
    """The loop itself, from the newest checkpoint of `workdir` to the last step."""
    train, count = prepared.run.train, prepared.run.data.batch_size
    with contextlib.ExitStack() as stack:
        with clock.part("state"):
            current = start(prepared, saver)
        first = int(current.step)
        preview = previews.Preview(prepared, known, workdir)
        log = stack.enter_context(Log(workdir, prepared.run, first, mirror.folder))
        metrics = files.rows(mirror.folder / "metrics.jsonl")
        if hosts.told(preview.missing(first, metrics)):  # killed between a checkpoint and these
            with clock.part("pictures"):
                show(preview, log, state.sampling_params(current), first, progress)
        page.write(workdir, prepared.run, known.names, mirror.folder)
        if first >= train.steps:
            print(f"{workdir} is complete: step {first} of {train.steps}", flush=True)
            return current
        # Again, where a torn one was passed over.
        with clock.part("compiling"):
            steps = compile_phases(prepared, shapes, first, progress, steps)
        work = {key: prepared.step_flops(*key) for key in steps}
        rows = hosts.rows_held(prepared.over_rows, count)
        batches = data.batches(known.streams, count, train.seed, first, rows)
        whole = parallel.replicated(prepared.strategy.mesh)
        null = {n: hosts.put(known.null(n), whole) for n in {shape.text for shape in shapes}}
        stopper = stack.enter_context(Stopper())
        watch = stack.enter_context(
            contextlib.closing(Watch(mirror.folder, count, first, clock, workdir))
        )
        bar = stack.enter_context(
            tqdm(total=train.steps, initial=first, unit="step", disable=not progress,
                 dynamic_ncols=True, smoothing=0.1)
        )

        if stop := hosts.stop_requested(stopper.signal):  # while it compiled or restored
            raise Interrupted(stop, first, saved=False)
        pending = None  # metrics of the step before, read while this one runs
        for i in range(first, train.steps):
            with clock.part("data"):
                shape, batch = next(batches)
                batch = hosts.put_rows(batch, prepared.over_rows, rows, count)
            kind = prepared.phase(i), shapes[shape]
            current, metrics = steps[kind](current, {"null": null[shapes[shape].text]} | batch)
            if pending:
                log.add(*pending)
            pending = (i + 1, metrics)
            done, last = i + 1, i + 1 == train.steps
            bar.update()
            watch.step(work[kind])
            stop = hosts.stop_requested(stopper.signal)  # later ones wait for the next step
            report = done % train.log_every == 0 or last
            keep = done % train.checkpoint_every == 0 or last or stop
            draw = done % train.sample_every == 0 or last
            if report or keep or hosts.in_step():
                log.add(*pending)  # a state with NaN is never saved
                pending = None
            if report:
                bar.set_postfix_str(f"{log.write(done)} {watch.report(done)}")
                mirror.copy()
                carrier.copy()
            if keep:
                with clock.part("saving"):
                    saver.save(done, state.to_parts(current), mirror.settle)
            if draw:
                with clock.part("pictures"):
                    show(preview, log, state.sampling_params(current), done, progress)
            if keep or draw:
                with clock.part("pictures"):
                    page.write(workdir, prepared.run, known.names, mirror.folder)
            if stop and not last:
                saver.wait()
                raise Interrupted(stop, done, saved=True)
        saver.wait()
    return current


def show(preview: previews.Preview, log: Log, params, step: int, progress: bool) -> None:
    """Draws pictures of some weights, and says where they are before they are scored."""
    sheet, drawn = preview.draw(params, step)
    if progress:
        tqdm.write(preview.where(step))
    scores = preview.score(drawn)
    log.write_samples(step, scores, sheet)
    if progress and scores:
        tqdm.write(previews.line(step, scores))


def keep_compiled(workdir: str) -> None:
    """Compiled programs are kept on disk, so that a restart does not compile again: of one
    process for all its runs; of several in WORKDIR/compiled, since only the first writes them."""
    if jax.default_backend() == "cpu" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # a CPU's are for one kind of processor only
    folder = pathlib.Path.home() / ".cache" / "twinflow_jax"
    if jax.process_count() > 1:
        folder = buckets.absolute(workdir) / "compiled"
    compilation_cache.reset_cache()  # what has compiled before may have found none
    jax.config.update("jax_compilation_cache_dir", str(folder))


def compile_phases(
    prepared: setup.Setup, shapes: list[models.Shape], first: int, progress: bool, done: dict
) -> dict:
    """The steps of each phase that lies ahead, for each shape of samples, compiled.

    done: those that already are, by (phase, shape).
    """
    begin = time.perf_counter()
    options = flags.options(jax.devices()[0].device_kind) or None
    compiled = {
        kind: interruptible(compile_step, prepared.lower(*kind), options)
        for kind in prepared.ahead(shapes, first) if kind not in done
    }
    if not compiled:
        return done
    if progress:
        parameters = sum(
            leaf.size for leaf in jax.tree.leaves(prepared.model.abstract_params())
        )
        print(
            f"{prepared.run.model.name} of {parameters:,} parameters; "
            f"compiled in {time.perf_counter() - begin:.1f} s for {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}",
            flush=True,
        )
    return done | compiled


def compile_step(lowered: jax.stages.Lowered, options: dict[str, str] | None):
    """The program, compiled with XLA's options.

    Raises:
      UserError: the compiler is of another version, and does not know one of them.
    """
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        unknown = re.search(r"No such compile option: '(\w+)'", str(error))
        if not unknown:
            raise
        raise UserError(
            f"this compiler does not know the option {unknown[1]}, which parallel/flags.py gives "
            "for libtpu 0.0.42: pip install 'libtpu==0.0.42.*', or take it out there"
        ) from error


def interruptible(function: Callable, *arguments):
    """What a function that does not run in Python returns, unless a signal comes first."""
    result = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result()


def start(prepared: setup.Setup, saver: checkpoints.Saver) -> state.TrainState:
    """The state to go on from: the newest checkpoint, another run's weights, or fresh ones."""
    abstract, fixed = prepared.abstract_state(), prepared.model.fixed
    restored = saver.restore(state.to_parts(abstract))
    if restored is not None and not abstract.on_base:
        return state.from_parts(restored, fixed)
    train, model = prepared.run.train, prepared.model
    if train.init_from:
        arrays, leaves = checkpoints.open_start(train.init_from), names.flatten(abstract.params)
        fresh = [path for path in leaves if path not in arrays and models.may_be_new(path)]

        def drawn():
            initial = names.flatten(model.init(seeds.initial(train.seed)))
            return {path: initial[path] for path in fresh}

        made = jax.jit(drawn)() if fresh else {}
        there = names.unflatten({k: leaf for k, leaf in leaves.items() if k not in made})
        loaded = store.load(arrays, there, f"{train.init_from}: transformer")
        whole = names.unflatten(names.flatten(loaded) | made)
        first = prepared.started()(whole)
    else:
        first = prepared.initial()()
    return first if restored is None else state.from_parts(restored, fixed, first.params)


class Stopper:
    """Notes SIGTERM and SIGINT instead of dying. A second Ctrl-C is not held back; a second
    SIGTERM is, since on a host that shuts down a launcher and the system both send one."""

    def __init__(self):
        self.signal = 0

    def __enter__(self):
        self._before = {}
        with contextlib.suppress(ValueError):  # signals are the main thread's
            if jax.process_count() > 1:  # SIGTERM is then JAX's, which tells all processes
                forward = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, forward)
                return self
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
