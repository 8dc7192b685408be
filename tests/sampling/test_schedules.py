"""The base models' own time grids against diffusers' scheduler and pipeline."""

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from twinflow_jax.errors import UserError
from twinflow_jax.sampling.schedules import dynamic_shift, published

QWEN = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.34.0.dev0",
    "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False,
    "max_image_seq_len": 8192, "max_shift": 0.9, "num_train_timesteps": 1000, "shift": 1.0,
    "shift_terminal": 0.02, "stochastic_sampling": False, "time_shift_type": "exponential",
    "use_beta_sigmas": False, "use_dynamic_shifting": True, "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
SANA = {
    "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++",
    "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001, "euler_at_final": False,
    "final_sigmas_type": "zero", "flow_shift": 3.0, "lambda_min_clipped": -float("inf"),
    "lower_order_final": True, "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
    "solver_order": 2, "solver_type": "midpoint", "thresholding": False,
    "timestep_spacing": "linspace", "use_flow_sigmas": True, "use_karras_sigmas": False,
}
SPARSE = {"use_dynamic_shifting": True}  # everything else as the published class assumes


def theirs(config: dict, steps: int, tokens: int) -> np.ndarray:
    """The sigmas that QwenImagePipeline gets from its scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[key] for key in keys))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return scheduler.sigmas.numpy()


@pytest.mark.parametrize("config", [QWEN, SPARSE, SPARSE | {"shift_terminal": 0.1}])
def test_times_are_the_published_ones(config):
    for steps, tokens in [(2, 24), (6, 256), (7, 4096), (50, 10_000)]:
        schedule = published(config, steps, tokens)
        ours = schedule.times
        assert schedule.told == ours[:-1] and schedule.solver == "euler"
        np.testing.assert_allclose(ours, theirs(config, steps, tokens), rtol=0, atol=1e-6)
        assert ours[-1] == 0 and (np.diff(ours) < 0).all()
    one_step = published(config, 1, 4096).times  # stretched, it is nan there
    assert one_step == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize("steps", [1, 2, 8, 40])
@pytest.mark.parametrize("config", [{"shift": 3.0}, {"shift": 6.0, "use_dynamic_shifting": False}])
def test_static_times_are_the_published_ones(config, steps):
    """Of pipelines that give the times themselves, as Z-Image's, and that do not, as SD3's."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    for twice in (False, True):
        given = {} if twice else {"sigmas": np.linspace(1, 0, steps + 1)[:-1]}
        scheduler.set_timesteps(steps, **given)
        schedule = published(config, steps, 4096, twice)
        np.testing.assert_allclose(schedule.times, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)
        assert schedule.told == schedule.times[:-1] and schedule.solver == "euler"
    np.testing.assert_allclose(1000 * np.array(schedule.told), scheduler.timesteps, atol=1e-3)
    assert published({}, steps, 4096).times == tuple(np.linspace(1, 0, steps + 1))


def test_defaults_are_qwen_images():
    assert dynamic_shift(50, 4096) == published(QWEN, 50, 4096)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_sanas_times_are_the_published_ones(steps):
    scheduler = DPMSolverMultistepScheduler.from_config(SANA)
    scheduler.set_timesteps(steps)
    ours = published(SANA, steps, 256)
    np.testing.assert_allclose(ours.times, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.told, scheduler.timesteps.numpy() / 1000, rtol=0, atol=1e-9)
    assert ours.solver == "dpm"


def test_other_schedulers_are_refused():
    other = QWEN | {
        "time_shift_type": "linear",
        "use_karras_sigmas": True, "max_shift": None, "num_train_timesteps": 500,
    }
    with pytest.raises(UserError) as error:
        published(other, 4, 256)
    problems = str(error.value).removeprefix("scheduler_config.json: ").split("; ")
    assert [problem.split(" is ")[0] for problem in problems] == [
        "num_train_timesteps", "use_karras_sigmas", "time_shift_type", "max_shift",
    ]
    with pytest.raises(UserError, match="shift_terminal is 0.02, only None.*shift is '3', not a"):
        published(QWEN | {"use_dynamic_shifting": False, "shift": "3"}, 4, 256)
    with pytest.raises(UserError, match="steps is 0"):
        published(QWEN, 0, 256)
    with pytest.raises(UserError, match="of class 'SCMScheduler'"):
        published({"_class_name": "SCMScheduler"}, 4, 256)
    with pytest.raises(UserError, match="solver_type is 'heun'.*flow_shift is 'big', not a number"):
        published(SANA | {"solver_type": "heun", "flow_shift": "big"}, 4, 256)
