"""What speed.jsonl says of a run's time and work."""

import json

import pytest

from twinflow_jax.training import setup, watch


@pytest.fixture
def now(monkeypatch):
    """A list whose number is the time everywhere in watch."""
    time = [1000.0]
    monkeypatch.setattr(watch.time, "time", lambda: time[0])
    monkeypatch.setattr(watch.time, "perf_counter", lambda: time[0])
    return time


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]


def test_goodput_counts_from_the_start_and_over_restarts(tmp_path, now):
    """10 s of compiling and 2 steps of 5 s; saved at step 2, killed after step 3; started again
    at 40 s, 5 s of compiling, step 3 again in 4 s: 14 of 49 s were of use."""
    clock = watch.Clock()
    with clock.part("compiling"):
        now[0] += 10
    first = watch.Watch(tmp_path, 8, 0, clock)
    for step, seconds in ((1, 5), (2, 5), (3, 5)):
        with clock.part("data"):
            now[0] += 1
        now[0] += seconds - 1
        first.step(2e12 * step)
        first.report(step)
        with clock.part("saving"):
            now[0] += 2
    last = rows(tmp_path)[-1]
    assert last["seconds_per_step"] == 5 and last["data_wait"] == 0.2
    assert last["seconds"] == {
        "compiling": 10, "data": 3, "steps": 12, "saving": 4, "other": 0,
    }
    assert last["goodput"] == pytest.approx(15 / 29)
    assert last["model_tflops_per_second"] == pytest.approx(6 / 5)  # of this step's phase

    now[0] = 1040
    clock = watch.Clock()
    with clock.part("compiling"):
        now[0] += 5
    again = watch.Watch(tmp_path, 8, 2, clock)
    now[0] += 4
    again.step(1)
    again.report(3)
    assert rows(tmp_path)[-1]["goodput"] == pytest.approx(14 / 49)


def test_work_is_of_the_phase(small_config):
    prepared = setup.prepare(small_config("train.flow_matching_steps=5"))
    one = prepared.step_flops("flow_matching") / 3  # a forward and its gradient
    passes = prepared.step_flops("objective") / one
    assert passes == 4 * 3 + 6  # of the tutorial's form, with gradient and without
