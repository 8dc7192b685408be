"""DPM-Solver++ against diffusers' scheduler."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from twinflow_jax.sampling.dpm import dpm_solve


def velocity(params, x, t, r, cond):
    """Some smooth field that bends."""
    return jnp.sin(params * x) + cond["shift"][:, None] * t[:, None]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_equals_the_published_scheduler(steps, guidance):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    noise = np.random.default_rng(steps).standard_normal((3, 4)).astype(np.float32)
    cond, null = ({"shift": jnp.full(3, s)} for s in (0.7, -0.2))
    x = torch.tensor(noise)
    for t in scheduler.timesteps:
        at = jnp.full(3, float(t) / 1000)
        with_cond, without = (
            np.asarray(velocity(1.3, x.numpy(), at, at, c)) for c in (cond, null)
        )
        v = with_cond if guidance == 1 else without + guidance * (with_cond - without)
        x = scheduler.step(torch.tensor(v), t, x, return_dict=False)[0]

    times = tuple(scheduler.sigmas.double().tolist())
    told = tuple((scheduler.timesteps.double() / 1000).tolist())
    ours = dpm_solve(velocity, 1.3, noise, cond, null, times, told, guidance)
    np.testing.assert_allclose(ours, x.numpy(), rtol=2e-4, atol=2e-5)
