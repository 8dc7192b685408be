"""How fast a run is: where its time goes, how well the devices are used, and traces on request."""

import contextlib
import json
import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from twinflow_jax import files
from twinflow_jax.parallel import hosts
from twinflow_jax.parallel.peaks import PEAKS


class Clock:
    """Where a process's time goes, in seconds by name, from now on."""

    def __init__(self):
        self.began, self._begin = time.time(), time.perf_counter()
        self.spent: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str):
        """Around a part of that name."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begin)

    def add(self, name: str, seconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + seconds

    def parts(self) -> dict[str, float]:
        """All of the time since the start; "other" is in no part."""
        whole = time.perf_counter() - self._begin
        return self.spent | {"other": max(whole - sum(self.spent.values()), 0.0)}


class Watch:
    """Writes WORKDIR/speed.jsonl. A file WORKDIR/trace holding a number k, looked for at each
    report, makes the first process leave an xprof trace of the next k steps in WORKDIR/traces/.

    rows: of a step. first: the step to go on from. clock: of this process, started with it; its
    parts "data", "saving" and "pictures" lie between steps or in them. asked: where requests are
    looked for, where that is not the folder of the files.
    """

    def __init__(
        self, workdir: epath.PathLike, rows: int, first: int, clock: Clock,
        asked: epath.PathLike | None = None,
    ):
        self._folder, self._rows, self._clock = epath.Path(workdir), rows, clock
        self._request = epath.Path(asked or workdir) / "trace"
        self._file = self._folder / "speed.jsonl"
        self._began, self._useful = self._before(first)
        self._steps, self._flops, self._since = 0, 0, time.perf_counter()
        self._spent = dict(clock.spent)
        self._trace_left = 0

    def _before(self, first: int) -> tuple[float, float]:
        """When the run began, in seconds since 1970, and the seconds of its steps up to the first
        of this process: from its record."""
        began, useful = self._clock.began, 0.0
        for row in files.rows(self._file):
            began = min(began, row["run_began"])
            if row["step"] <= first:
                useful = row.get("useful_seconds", useful)  # older versions did not write it
        return began, useful

    def step(self, flops: float) -> None:
        """Counts a step of so many model FLOPs on all devices, and ends a trace after its last."""
        self._steps += 1
        self._flops += flops
        if self._trace_left:
            self._trace_left -= 1
            if not self._trace_left:
                jax.profiler.stop_trace()

    def _look_for_requests(self) -> None:
        """Starts a trace on the first process, where one is asked for."""
        request = self._request
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
        now, spent = time.perf_counter(), self._clock.spent
        since = lambda name: spent.get(name, 0.0) - self._spent.get(name, 0.0)
        whole = now - self._since - since("saving") - since("pictures")
        waited, seconds = since("data"), whole / max(self._steps, 1)
        self._clock.add("steps", whole - waited)
        self._useful += whole
        kind, count = jax.devices()[0].device_kind, jax.device_count()
        row = {
            "step": step, "run_began": self._began, "seconds_per_step": seconds,
            "images_per_second": self._rows / seconds,
            "model_tflops_per_second": self._flops / whole / 1e12,
            "data_wait": waited / whole,
            "useful_seconds": self._useful,
            "goodput": min(self._useful / max(time.time() - self._began, 1e-9), 1.0),
            "seconds": self._clock.parts(),
        }
        if kind in PEAKS:
            row["utilisation"] = self._flops / whole / (PEAKS[kind] * count)
        if jax.process_count() > 1:
            every = multihost_utils.process_allgather(np.float32(waited / self._steps))
            row["host_skew_seconds"] = float(every.max() - every.min())
        self._steps, self._flops, self._since, self._spent = 0, 0, now, dict(spent)
        self._look_for_requests()
        if hosts.leads():
            with self._file.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        used = f" {row['utilisation']:.0%} of peak" if "utilisation" in row else ""
        return f"{row['images_per_second']:.3g} img/s{used}, data {row['data_wait']:.0%}"

    def close(self) -> None:
        if self._trace_left:
            jax.profiler.stop_trace()
