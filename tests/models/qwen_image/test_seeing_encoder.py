"""Qwen2.5-VL with pictures: against transformers, and against what its 4.57 once computed."""

import dataclasses
import functools
import pathlib
import types

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.models import oracles
from tests.models.qwen_image.test_text_encoder import PUBLISHED
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.qwen_image import edit, seeing_encoder, vision
from twinflow_jax.models.qwen_image.seeing_encoder import Config, SeeingEncoder

VISION = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
    "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14,
    "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
}
SMALL = PUBLISHED | {
    "vocab_size": 400, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "image_token_id": 390,
    "video_token_id": 391, "vision_start_token_id": 392, "vision_end_token_id": 393,
    "bos_token_id": 1, "eos_token_id": 2,
    "rope_scaling": {"mrope_section": [2, 2, 2], "type": "mrope", "rope_type": "default"},
    "vision_config": VISION | {
        "depth": 4, "hidden_size": 32, "intermediate_size": 24, "num_heads": 2,
        "out_hidden_size": 48, "fullatt_block_indexes": [1, 3],
    },
}
GOLDEN = pathlib.Path(__file__).parents[2] / "data" / "qwen_vl_tiny_4571.npz"
GRIDS = ((22, 32), (20, 36))  # of patches: no multiples of a window's 8


@pytest.fixture(scope="module")
def both():
    """transformers' model with large weights, our config and the same weights."""
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(**SMALL)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                weight.uniform_(0.5, 1.5)
            elif weight.ndim == 1:
                weight.normal_(0, 0.3)
            else:
                weight.normal_(0, 1.2 * (weight.numel() / len(weight)) ** -0.5)
    ours = Config.from_published(SMALL)
    shapes = abstract(ours)
    return model, ours, oracles.params_of(model, seeing_encoder.table(ours), shapes)


def abstract(config: Config):
    unit = config.vision.unit
    inputs = (
        jnp.zeros((1, 1), int), jnp.ones((1, 1), bool), jnp.zeros((1, 1, 3), int),
        (jnp.zeros((1, unit, unit, 3)),),
    )
    init = functools.partial(SeeingEncoder(config).init, jax.random.key(0))
    return flax.core.meta.unbox(jax.eval_shape(init, *inputs)["params"])


@functools.partial(jax.jit, static_argnums=0, compiler_options=oracles.QUICK)
def apply(config: Config, params, *inputs):
    return SeeingEncoder(config).apply({"params": params}, *inputs)


@functools.partial(jax.jit, static_argnums=0, compiler_options=oracles.QUICK)
def look(config: Config, params, pictures):
    run = nn.compact(lambda module, pictures: vision.tokens(module, pictures))
    tower = type("Tower", (nn.Module,), {"__annotations__": {"config": object}, "__call__": run})
    return tower(config).apply({"params": params}, pictures)


def rows_of(pictures) -> torch.Tensor:
    """Patches as transformers' processor makes them: merge-blocks, (C, T, y, x) in each."""
    parts = []
    for picture in pictures:
        height, width, _ = picture.shape
        x = picture.reshape(height // 28, 2, 14, width // 28, 2, 14, 3)
        x = np.repeat(x.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None], 2, axis=5)
        parts.append(x.reshape(-1, 3 * 2 * 14 * 14))
    return torch.from_numpy(np.concatenate(parts))


def grids_of(pictures) -> torch.Tensor:
    return torch.tensor([[1, len(picture) // 14, len(picture[0]) // 14] for picture in pictures])


def test_the_vision_tower_sees_windows_and_whole_pictures_apart(both):
    model, config, params = both
    pictures = [oracles.randoms(14 * h, 14 * w, 3) for h, w in GRIDS]
    with torch.no_grad():
        theirs = model.model.visual(rows_of(pictures), grid_thw=grids_of(pictures)).pooler_output
    ours = look(config, params, tuple(picture[None] for picture in pictures))
    assert np.abs(theirs.numpy()).mean() > 0.5
    assert oracles.relative_error(ours[0], theirs) <= 1e-5
    alone = look(config, params, (pictures[0][None],))
    np.testing.assert_allclose(alone[0], ours[0, : alone.shape[1]], atol=2e-5)


def raster(config, grids):
    """Places of patches row by row, not token by token."""
    found = PLACES(config, grids)
    where = [np.stack(np.indices(grid), -1).reshape(-1, 2) for grid in grids]
    return dataclasses.replace(found, where=np.concatenate(where))


def seen_by_all(config, grids):
    found = PLACES(config, grids)
    return dataclasses.replace(found, picture=np.zeros_like(found.picture))


def frames_first(params):
    """Weights of patches read as (T, C) where they are (C, T)."""
    kernel = np.asarray(params["patches"])  # (T, y, x, C, width)
    published = kernel.transpose(4, 3, 0, 1, 2)
    read = published.reshape(len(published), kernel.shape[0], 3, *published.shape[3:])
    return params | {"patches": read.transpose(1, 3, 4, 2, 0)}


PLACES = vision.places
MISTAKES = {  # whole layers of the config, the weights, or what takes the place of a function
    "all whole": {"whole": (0, 1, 2, 3)},
    "all windows": {"whole": ()},
    "raster": {"places": raster},
    "pictures see each other": {"places": seen_by_all},
    "frames first": {"weights": frames_first},
    "tanh": {"gelu": lambda x, approximate: jax.nn.gelu(x)},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_the_vision_tower_show(mistake, both, monkeypatch):
    """Each is far beyond the bound of the test above."""
    model, config, params = both
    change = MISTAKES[mistake]
    if "whole" in change:
        tower = dataclasses.replace(config.vision, whole=change["whole"])
        config = dataclasses.replace(config, vision=tower)
    if "places" in change:
        monkeypatch.setattr(vision, "places", change["places"])
    if "gelu" in change:
        functions = types.SimpleNamespace(gelu=change["gelu"])
        monkeypatch.setattr(vision, "jax", types.SimpleNamespace(nn=functions))
    params = change.get("weights", lambda params: params)(params)
    pictures = [oracles.randoms(14 * h, 14 * w, 3) for h, w in GRIDS]
    with torch.no_grad():
        theirs = model.model.visual(rows_of(pictures), grid_thw=grids_of(pictures)).pooler_output
    again = lambda *given: look.__wrapped__(config, *given)  # compiled anew
    ours = jax.jit(again, compiler_options=oracles.QUICK)(
        params, tuple(picture[None] for picture in pictures)
    )
    assert oracles.relative_error(ours[0], theirs) > 1e-4


def prompt(pictures, image: int, start: int = 392, end: int = 393):
    """Ids of two rows of text around pictures, one shorter, and their mask."""
    rng, row = np.random.default_rng(3), []
    for picture in pictures:
        count = picture.shape[0] * picture.shape[1] // 28**2
        row += [*rng.integers(3, 380, 5), start, *[image] * count, end]
    ids = np.stack([np.r_[row, rng.integers(3, 380, 9)] for _ in range(2)]).astype(np.int32)
    mask = np.arange(ids.shape[1]) < np.array([ids.shape[1], ids.shape[1] - 4])[:, None]
    return ids, mask


def test_a_prompt_with_two_pictures(both):
    model, config, params = both
    pictures = [oracles.randoms(14 * h, 14 * w, 3) for h, w in ((10, 16), (12, 6))]
    ids, mask = prompt(pictures, config.image_token)
    where = edit.places(ids, config.image_token, [(5, 8), (6, 3)])

    def theirs(told: bool):
        kinds = torch.from_numpy(ids == config.image_token).int()
        two = [*pictures, *pictures]
        with torch.no_grad():
            return model(
                input_ids=torch.from_numpy(ids).long(), pixel_values=rows_of(two),
                attention_mask=torch.from_numpy(mask).long(), image_grid_thw=grids_of(two),
                output_hidden_states=True, **({"mm_token_type_ids": kinds} if told else {}),
            ).hidden_states[-1].numpy()

    both_rows = tuple(np.stack([picture] * 2) for picture in pictures)
    ours = np.asarray(apply(config, params, ids, mask, where, both_rows))
    told, untold = theirs(True), theirs(False)
    np.testing.assert_allclose(ours[mask], told[mask], atol=2e-5)
    assert np.abs(untold - told)[mask].max() > 1e-2  # plain positions are another model
    assert not ours[~mask].any()


def test_what_transformers_4_57_computed():
    kept = np.load(GOLDEN)
    published = SMALL | {
        "vocab_size": 152064, "image_token_id": 151655,
        "vision_config": SMALL["vision_config"] | {"hidden_size": 32},
    }
    config = dataclasses.replace(
        Config.from_published(published), vocab=len(kept["unique_ids"]),
        image_token=int(np.searchsorted(kept["unique_ids"], 151655)),
    )
    tensors = {key[2:]: kept[key] for key in kept.files if key.startswith("w/")}
    tensors = {key.replace("language_model.", "model."): value for key, value in tensors.items()}
    tensors["model.embed_tokens.weight"] = kept["embed_rows"]
    flat = {}
    for rule in seeing_encoder.table(config).rules:
        leaves = [rule.ours(tensors[key]) for key in names.NameTable(()).keys(rule)]
        flat[rule.path] = np.stack(leaves) if rule.stacked else leaves[0]
    params = names.unflatten(flat)

    seen = [
        edit.looked_at(Image.fromarray(kept[name]), config.vision, 3136, 12_845_056)
        for name in ("image_1", "image_2")
    ]
    pictures = [edit.pixels(picture) for picture in seen]
    rows = rows_of(pictures).numpy()
    np.testing.assert_allclose(rows[:4], kept["pixel_rows_0_3"], atol=1e-6)
    np.testing.assert_allclose(rows.sum(1, dtype=np.float64), kept["pixel_sum"], atol=1e-3)
    assert grids_of(pictures).tolist() == [[1, *grid[1:]] for grid in kept["grid_thw"].tolist()]

    ids = np.searchsorted(kept["unique_ids"], kept["ids"])[None].astype(np.int32)
    grids = [(picture.shape[0] // 28, picture.shape[1] // 28) for picture in pictures]
    where = edit.places(ids, config.image_token, grids)
    np.testing.assert_array_equal(where[0].T, kept["positions"])
    given = tuple(picture[None] for picture in pictures)
    np.testing.assert_allclose(look(config, params, given)[0], kept["vision_out"], atol=3e-5)
    mask = np.ones(ids.shape, bool)
    np.testing.assert_allclose(
        apply(config, params, ids, mask, where, given)[0], kept["hidden"], atol=2e-5
    )


def test_the_published_tower_has_its_tensors():
    config = Config.from_published(PUBLISHED | {"vision_config": VISION, "image_token_id": 151655})
    assert (config.vision, config.sections) == (vision.Config(), (16, 24, 24))
    table, leaves = seeing_encoder.table(config), names.flatten(abstract(config))
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    visual = {key: shape for key, shape in shapes.items() if key.startswith("visual.")}
    assert len(visual) == 390 and sum(map(np.prod, visual.values())) == 676_550_144
    assert visual["visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert visual["visual.blocks.31.attn.qkv.weight"] == (3840, 1280)


@pytest.mark.parametrize("changes, says", [
    ({"rope_scaling": {"mrope_section": [16, 24], "type": "mrope"}}, "mrope_section is"),
    ({"vision_config": VISION | {"hidden_act": "gelu"}}, "hidden_act"),
    ({"vision_config": VISION | {"window_size": 100}}, "window_size is no multiple"),
    ({"vision_config": VISION | {"out_hidden_size": 2048}}, "makes tokens of width 2048"),
])
def test_other_towers_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        Config.from_published(PUBLISHED | {"vision_config": VISION} | changes)
