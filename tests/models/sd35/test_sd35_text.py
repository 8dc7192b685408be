"""The text encoders against transformers', and whole prompts against diffusers' pipeline."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import transformers

from tests import sd35_folder
from tests.models import oracles
from tests.models.oracles import BOUNDS, relative_error
from twinflow_jax import models
from twinflow_jax.checkpoints import importing
from twinflow_jax.drawing import Pipeline, text
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.sd35 import NETWORKS, clip, prompt, t5, tiny

CLIP = {  # text_encoder/config.json of stabilityai/stable-diffusion-3.5-medium
    "architectures": ["CLIPTextModelWithProjection"], "attention_dropout": 0.0, "bos_token_id": 0,
    "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
    "torch_dtype": "float16", "transformers_version": "4.41.2", "vocab_size": 49408,
}
PUBLISHED = {
    "text_encoder": CLIP,
    "text_encoder_2": CLIP | {
        "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120,
        "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
    },
    "text_encoder_3": {
        "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64,
        "d_model": 4096, "decoder_start_token_id": 0, "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True,
        "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64,
        "num_layers": 24, "output_past": True, "pad_token_id": 0,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.41.2",
        "use_cache": True, "vocab_size": 32128,
    },
}
SMALL = {name: PUBLISHED[name] | tiny.CONFIGS[name] for name in PUBLISHED}
WIDE = {  # one layer that is read, or two
    "text_encoder_2": PUBLISHED["text_encoder_2"] | {
        "num_hidden_layers": 2, "vocab_size": 100, "intermediate_size": 256, "eos_token_id": 7,
    },
    "text_encoder_3": PUBLISHED["text_encoder_3"] | {
        "num_layers": 1, "vocab_size": 100, "d_ff": 256,
    },
}
CASES = [*SMALL.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in WIDE.items())]


def torch_model(published):
    if published["model_type"] == "t5":
        return transformers.T5EncoderModel(transformers.T5Config(**published)).float().eval()
    config = transformers.CLIPTextConfig(**published)
    return transformers.CLIPTextModelWithProjection(config).float().eval()


def both(name: str, published):
    """A PyTorch model with every weight random, our config and the same weights as ours."""
    torch.manual_seed(0)
    model = torch_model(published)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1.0 if "norm" in key and "weight" in key else 0.0, 0.3)
            else:
                small = "embed" in key or "shared" in key or "relative" in key
                weight.normal_(0, 1 if small else weight.shape[-1] ** -0.5)
    config = NETWORKS[name].config.from_published(published)
    return model, config, oracles.converted(model, NETWORKS[name], config)


@torch.no_grad()
def theirs(model, ids) -> tuple[torch.Tensor, ...]:
    out = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    clip = hasattr(out, "text_embeds")
    return (out.hidden_states[-2], out.text_embeds) if clip else (out.last_hidden_state,)


@pytest.mark.parametrize(("name", "published"), CASES)
def test_states(name, published):
    """Tokens after the end, its number wherever it first is; T5's distances beyond the last."""
    model, config, params = both(name, published)
    length = 150 if name.endswith("3") and published["d_model"] < 999 else 77
    ids = np.random.default_rng(1).integers(8, config.vocab, (3, length), np.int32)
    ids[:, [30, 50]] = 7  # ConfigG's end in WIDE: the first counts, where the highest does not
    expected = theirs(model, ids)
    for dtype, bound in BOUNDS.items():
        network = NETWORKS[name]
        run = oracles.compiled(network, dataclasses.replace(config, dtype=dtype))
        ours = run(params, ids, np.ones_like(ids, bool))
        for mine, other in zip(ours if len(expected) > 1 else (ours,), expected, strict=True):
            assert mine.dtype == dtype
            assert relative_error(np.asarray(mine, np.float32), other) <= bound


@pytest.mark.parametrize(("name", "keys", "count"), [
    ("text_encoder", 197, 123_650_304), ("text_encoder_2", 517, 694_659_840),
    ("text_encoder_3", 219, 4_762_310_656),
])
def test_published_names(name, keys, count):
    network = NETWORKS[name]
    config = network.config.from_published(PUBLISHED[name])
    assert config == network.config()
    leaves = names.flatten(network.abstract(config)[0])
    table = network.table(config)
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    with torch.device("meta"):
        module = torch_model(PUBLISHED[name])
    base = {key: tuple(p.shape) for key, p in module.named_parameters()}  # tied ones once
    assert shapes == base
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (keys, count)
    more = "encoder.embed_tokens.weight" if "3" in name else "text_model.embeddings.position_ids"
    assert table.is_carried(more)


def test_configs_that_compute_something_else():
    with pytest.raises(UserError) as error:
        clip.Config.from_published(CLIP | {
            "architectures": ["CLIPTextModel"], "hidden_act": "relu", "num_attention_heads": 7,
            "num_hidden_layers": 1, "window": 3, "eos_token_id": [2],
        })
    for part in ("architectures", "'relu'", "no multiple", "num_hidden_layers is 1", "window",
                 "eos_token_id"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="feed_forward_proj is 'relu'.*d_kv is 'x'"):
        old = {k: v for k, v in PUBLISHED["text_encoder_3"].items() if "gated" not in str(v)}
        t5.Config.from_published(old | {"d_kv": "x"})


def test_logical_axes():
    axes = oracles.logical_axes(NETWORKS["text_encoder_3"], t5.Config(layers=2))
    assert axes["layers/query/kernel"] == ("layers", "embed", "heads")
    assert axes["layers/mlp/down/kernel"] == ("layers", "mlp", "embed")
    axes = oracles.logical_axes(NETWORKS["text_encoder_2"], clip.ConfigG(layers=3))
    assert axes["last/up/kernel"] == ("embed", "mlp")
    assert axes["layers/out/kernel"] == ("layers", "heads", "embed")


# Prompts.

PROMPTS = ["Generate an Image.", "two cats,\n one of them 猫 ! in a {box}", "x", "1 " * 60]
LONG = "very long " * 40  # for CLIP, and for T5


@pytest.fixture(scope="module", params=[True, False], ids=["T5", "no T5"])
def made(request, tmp_path_factory):
    """A small pipeline of diffusers', with T5 or without, and its import."""
    folder, whole = tmp_path_factory.mktemp("sd35"), request.param
    pipeline = sd35_folder.write(
        folder, t5=whole, **{} if whole else {"joint_attention_dim": t5.Config.width}
    )
    checkpoint = importing.import_folder(
        str(folder / "pipeline"), str(folder / "checkpoint"), progress=False
    )
    return pipeline, checkpoint


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:prompt 5 of 5")
def test_embeddings_are_the_pipelines(made):
    pipeline, checkpoint = made
    prompts = [*PROMPTS, LONG]
    ours = text.embed(Pipeline(checkpoint, "float32", progress=False), prompts, negative="")
    assert ours.mask.all() and ours.mask.shape == (6, prompt.TOKENS)
    assert checkpoint.text_width == ours.tokens.shape[-1]
    positive, negative, *pooled = pipeline.encode_prompt(
        prompts, None, None, "cpu", negative_prompt=""
    )
    tokens = torch.cat([positive, negative[:1]])
    assert relative_error(ours.tokens[:, 1:], tokens) <= 2e-5
    pooled = torch.cat([pooled[0], pooled[1][:1]])
    width = pooled.shape[-1]
    assert relative_error(ours.tokens[:, 0, :width], pooled) <= 2e-5
    assert not ours.tokens[:, 0, width:].any()


def test_who_is_left_out(made):
    pipeline, checkpoint = made
    whole = pipeline.text_encoder_3 is not None
    encoders = checkpoint.text_to_image.encoders
    assert list(encoders) == list(prompt.LENGTHS)[: 3 if whole else 2]
    assert ("T5EncoderModel" in checkpoint.text_identity) == whole
    assert len(models.FAMILIES["sd35"].text_to_image.encoders) == 3


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    loaded = {}
    for name in prompt.LENGTHS:
        folder = tmp_path_factory.mktemp(name)
        NETWORKS[name].save_tiny_tokenizer(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded[name] = NETWORKS[name].load_tokenizer(folder)
    return loaded


def test_ids(tokenizers):
    rows = prompt.tokenize(tokenizers, ["An image!", "x"], prompt.TOKENS)
    for name, (ids, mask) in rows.items():
        assert ids.shape == mask.shape == (2, prompt.LENGTHS[name])
        tokenizer = tokenizers[name]
        assert (ids[~mask] == tokenizer.pad_token_id).all()
        assert ids[0, mask[0]][-1] == tokenizer.eos_token_id
        assert len(tokenizer) <= tiny.CONFIGS[name]["vocab_size"]
    first, second, last = (rows[name][0][0] for name in rows)
    said = tokenizers["text_encoder"].convert_ids_to_tokens(first[:6])
    end = "<|endoftext|>"
    assert said == ["<|startoftext|>", "an</w>", "image</w>", "!</w>", end, end]
    assert second[3] == 0 and second[5] == 0 != first[5]  # CLIP-G's padding is a letter
    pieces = tokenizers["text_encoder_3"].convert_ids_to_tokens(last[:12])
    assert "".join(pieces) == "▁An▁image!</s><pad>"


def test_long_prompts_are_cut_before_the_end(tokenizers):
    only = {name: tokenizers[name] for name in ("text_encoder", "text_encoder_2")}
    with warnings.catch_warnings():  # T5 reads all of it
        warnings.simplefilter("error")
        rows = prompt.tokenize(tokenizers, ["x " * 100])
    for name in only:
        ids, mask = rows[name]
        assert mask.all() and ids[0, -1] == tokenizers[name].eos_token_id
    with pytest.warns(UserWarning, match="makes 102 tokens: only the first 77") as said:
        prompt.tokenize(only, ["x " * 100])
    assert len(said) == 1
    with pytest.warns(UserWarning, match="only the first 256"):
        rows = prompt.tokenize(tokenizers, [LONG])
    assert rows["text_encoder_3"][0][0, -1] == 1


def test_prompts_that_are_refused(tokenizers, tmp_path):
    with pytest.raises(UserError, match="prompt 2 of 2 is empty"):
        prompt.tokenize(tokenizers, ["a", " "])
    with pytest.raises(UserError, match="text of 128 tokens is asked for; .* takes 334"):
        prompt.tokenize(tokenizers, ["a"], 128)
    tiny.save_t5_tokenizer(tmp_path / "t5")
    tiny.save_clip_tokenizer(tmp_path / "clip")
    with pytest.raises(UserError, match="not like CLIP's"):
        prompt.load_clip(tmp_path / "t5")
    with pytest.raises(UserError, match="holds no tokenizer .*: give 'tokenizer_3'"):
        prompt.load_t5(tmp_path / "clip")
