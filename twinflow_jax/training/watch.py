"""How fast a run is: where its time goes, how well the devices are used, and traces on request."""

import contextlib
import json
import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from twinflow_jax.parallel import hosts
from twinflow_jax.parallel.peaks import PEAKS


class Watch:
    """Writes WORKDIR/speed.jsonl. A file WORKDIR/trace holding a number k, looked for at each
    report, makes the first process leave an xprof trace of the next k steps in WORKDIR/traces/.

    rows: of a step. step_flops: of a step on all devices, recomputation not counted.
    """

    def __init__(self, workdir: epath.PathLike, rows: int, step_flops: float):
        self._folder, self._rows, self._flops = epath.Path(workdir), rows, step_flops
        self._file = self._folder / "speed.jsonl"
        self._began = self._run_began()
        self._waited, self._steps, self._since = 0.0, 0, time.perf_counter()
        self._own = 0.0
        self._trace_left = 0

    def _run_began(self) -> float:
        """When the run's first step began, in seconds since 1970: from its record, or now."""
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            return json.loads(self._file.read_text().splitlines()[0])["run_began"]
        return time.time()

    @contextlib.contextmanager
    def waiting(self):
        """Around what fetches a batch."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def elsewhere(self):
        """Around what is no step: saving, drawing pictures."""
        begin = time.perf_counter()
        yield
        self._own += time.perf_counter() - begin

    def step(self) -> None:
        """Counts a step, and ends a trace after its last."""
        self._steps += 1
        if self._trace_left:
            self._trace_left -= 1
            if not self._trace_left:
                jax.profiler.stop_trace()

    def _look_for_requests(self) -> None:
        """Starts a trace on the first process, where one is asked for."""
        request = self._folder / "trace"
        if self._trace_left or not hosts.leads() or not request.exists():
            return
        with contextlib.suppress(OSError, ValueError):
            steps = max(int(request.read_text().strip() or 1), 1)
            request.unlink()
            jax.profiler.start_trace(str(self._folder / "traces"))
            self._trace_left = steps

    def report(self, step: int) -> str:
        """Writes what was measured since the last report; returns it for the progress line.

        To be called by every process when its step is done; the first one writes.
        """
        now = time.perf_counter()
        whole = now - self._since - self._own
        seconds = whole / max(self._steps, 1)
        kind, count = jax.devices()[0].device_kind, jax.device_count()
        row = {
            "step": step, "run_began": self._began, "seconds_per_step": seconds,
            "images_per_second": self._rows / seconds,
            "model_tflops_per_second": self._flops / seconds / 1e12,
            "data_wait": self._waited / whole,
            "goodput": self._goodput(step, seconds),
        }
        if kind in PEAKS:
            row["utilisation"] = self._flops / seconds / (PEAKS[kind] * count)
        if jax.process_count() > 1:
            every = multihost_utils.process_allgather(np.float32(self._waited / self._steps))
            row["host_skew_seconds"] = float(every.max() - every.min())
        self._waited, self._steps, self._since, self._own = 0.0, 0, now, 0.0
        self._look_for_requests()
        if hosts.leads():
            with self._file.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        used = f" {row['utilisation']:.0%} of peak" if "utilisation" in row else ""
        return f"{row['images_per_second']:.3g} img/s{used}, data {row['data_wait']:.0%}"

    def _goodput(self, step: int, seconds: float) -> float:
        """The share of the time since the run's first step that its steps would have taken."""
        return min(step * seconds / max(time.time() - self._began, 1e-9), 1.0)

    def close(self) -> None:
        if self._trace_left:
            jax.profiler.stop_trace()
