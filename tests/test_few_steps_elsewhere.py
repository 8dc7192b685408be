"""Few steps of a run in diffusers' own pipeline, as docs/text_to_image.md says, are ours."""

import jax
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete

from tests import qwen_folder
from tests.test_text_to_image import SIZE, assert_close, draw, noise_of, normal, pixels
from tests.test_verbs import call
from twinflow_jax import config as configs
from twinflow_jax import convert
from twinflow_jax.checkpoints import importing
from twinflow_jax.training.loop import train


@pytest.mark.slow
def test_half_r_draws_in_diffusers(tmp_path, monkeypatch):
    """Though the weights have moved, so that the network at r = 0 is not the base; and imported
    again, by somebody who knows nothing of the run, they draw what the run draws."""
    pipeline = qwen_folder.write(tmp_path)
    importing.import_folder(str(tmp_path / "pipeline"), str(tmp_path / "base"), progress=False)
    run = configs.parse("configs/qwen20b_tpu.py:tiny", [
        f"pipeline={tmp_path / 'base'}", f"train.init_from={tmp_path / 'base'}", "train.steps=2",
        "model.time_conditioning=half_r", "train.sample_every=1000", "optimizer.learning_rate=.01",
        "train.ema_decay=0", "model.remat=none",
    ])
    train(run, str(tmp_path / "run"), progress=False)
    folder = tmp_path / "exported"
    assert call(convert, "export", str(tmp_path / "run"), str(folder)) == 0
    theirs = QwenImagePipeline.from_pretrained(folder)
    before, after = (p.transformer.img_in.weight.detach() for p in (pipeline, theirs))
    assert (before - after).abs().mean() > 1e-3
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    theirs.set_progress_bar_config(disable=True)
    noise, key = noise_of(0, SIZE)
    for sigmas in [1.0], [0.999, 0.6]:
        fresh = iter(range(len(sigmas)))
        monkeypatch.setattr(
            scheduling_flow_match_euler_discrete, "randn_tensor",
            lambda *_, **__: normal(jax.random.fold_in(key, next(fresh)), SIZE),  # noqa: B023
        )
        drawn = theirs(
            "A red fox", true_cfg_scale=1.0, sigmas=sigmas, num_inference_steps=len(sigmas),
            height=SIZE[0], width=SIZE[1], latents=noise, output_type="pt",
        ).images
        monkeypatch.undo()
        ours = draw(tmp_path / "run", tmp_path / f"out{len(sigmas)}", "--prompt", "A red fox",
                    "--steps", str(len(sigmas)))
        assert_close(ours, np.stack([pixels(2 * image - 1) for image in drawn]))
    again = importing.import_folder(str(folder), str(tmp_path / "again"), progress=False)
    assert again.knows_r and again.config("transformer").time_conditioning == "half_r"
    np.testing.assert_array_equal(
        draw(again.folder, tmp_path / "out", "--prompt", "A red fox", "--steps", "2"), ours
    )
