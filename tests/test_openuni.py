"""OpenUni end to end: its folder out of four sources, and pictures against diffusers' pipeline."""

import json
import pathlib
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath
from transformers import Qwen2TokenizerFast

from tests import openuni_oracle, sana_folder
from tests.qwen_folder import randomise
from tests.test_sana import noise_of
from tests.test_text_to_image import assert_close, assert_same_tensors, draw, pixels
from tests.test_verbs import call
from tools import openuni as tool
from twinflow_jax import convert
from twinflow_jax.checkpoints import exporting, imported, importing
from twinflow_jax.models.openuni import NETWORKS, prompt, tiny

PROMPTS = ["A red fox", "two cats, one of them asleep"]
SIZE = (128, 192)  # height, width
TEXT = tiny.CONFIGS["text_encoder"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Small sources in the forms in which they are published, and what the tool makes of them."""
    folder = tmp_path_factory.mktemp("openuni")
    pipeline = sana_folder.write(folder)
    encoder = randomise(openuni_oracle.Encoder(TEXT), 5).float().eval()
    state = encoder.state_dict()
    internvl = folder / "internvl"
    tiny.save_tokenizer(internvl)
    body = {k: v.contiguous() for k, v in state.items() if k.startswith("language_model.")}
    vision = {"vision_model.embeddings.class_embedding": torch.zeros(1, 1, 4)}
    head = {"language_model.lm_head.weight": torch.zeros(4, 64)}
    safetensors.torch.save_file(body | vision | head, internvl / "model.safetensors")
    (internvl / "config.json").write_text(json.dumps({
        "architectures": ["InternVLChatModel"], "vision_config": {}, "llm_config":
        TEXT["llm_config"] | {"architectures": ["Qwen2ForCausalLM"], "_name_or_path": "x",
                              "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    }))
    own = {k: v for k, v in state.items() if not k.startswith("language_model.")}
    drawing = {f"transformer.{k}": v for k, v in pipeline.transformer.state_dict().items()}
    pth = folder / "openuni.pth"
    torch.save({"state_dict": {k: v.bfloat16() for k, v in (own | drawing).items()}}, pth)
    for module, mine in ((encoder, own), (pipeline.transformer, drawing)):
        rounded = {k: v.bfloat16().float() for k, v in mine.items()}
        module.load_state_dict(
            {k.removeprefix("transformer."): v for k, v in rounded.items()}, strict=False
        )
    assembled = folder / "assembled"
    sources = [epath.Path(folder / name) for name in ("internvl", "pipeline", "pipeline/vae")]
    tool.assemble(tool.read_pickle(epath.Path(pth)), *sources, epath.Path(assembled),
                  TEXT["connector"])
    checkpoint = importing.import_folder(str(assembled), str(folder / "checkpoint"), progress=False)
    return types.SimpleNamespace(
        folder=folder, pipeline=pipeline, encoder=encoder, pth=pth, sources=sources,
        assembled=assembled, checkpoint=checkpoint,
    )


def embedded(made, prompts: list[str]) -> torch.Tensor:
    """As OpenUni's code makes them: padded to the longest, the queries after that."""
    tokenizer = Qwen2TokenizerFast.from_pretrained(made.folder / "internvl")
    told = [f"Generate an image: {one}" if one else "Generate an image." for one in prompts]
    rows = tokenizer([prompt.TEMPLATE.format(one) for one in told], padding=True,
                     padding_side="right", return_tensors="pt")
    return made.encoder(rows["input_ids"], rows["attention_mask"])


def test_base_sampling_is_the_published_pipeline(made, tmp_path):
    assert made.checkpoint.family == "openuni" and not made.checkpoint.knows_r
    asked = [part for one in PROMPTS for part in ("--prompt", one)]
    ours = draw(made.checkpoint.folder, tmp_path, *asked, "--base", "--steps", "4", size=SIZE)
    tokens = embedded(made, [*PROMPTS, ""])
    mask = torch.ones(2, 256)
    theirs = made.pipeline(
        prompt_embeds=tokens[:2], prompt_attention_mask=mask,
        negative_prompt_embeds=tokens[2:].expand(2, -1, -1), negative_prompt_attention_mask=mask,
        prompt=None, negative_prompt=None, complex_human_instruction=None,
        use_resolution_binning=False, guidance_scale=4.5, num_inference_steps=4,
        height=ours.shape[1], width=ours.shape[2],
        latents=noise_of(0, SIZE)[0].expand(2, -1, -1, -1), output_type="pt",
    ).images
    assert_close(ours, np.stack([pixels(2 * image - 1) for image in theirs]))


def test_goes_back_byte_for_byte(made, tmp_path):
    exporting.export_folder(made.checkpoint, tmp_path, progress=False)
    assert_same_tensors(made.assembled, tmp_path, NETWORKS)


def test_sources_that_are_others(made, tmp_path, capsys):
    """One line each, and nothing left behind."""
    internvl, sana, vae = made.sources
    target, whole = tmp_path / "target", tool.read_pickle(epath.Path(made.pth))

    def says(what: str, trained=None, connector=TEXT["connector"], **changed) -> None:
        sources = {"internvl": internvl, "sana": sana, "vae": vae} | changed
        with pytest.raises(tool.UserError, match=what):
            tool.assemble(trained or whole, *sources.values(),
                          epath.Path(target), connector)
        assert not target.exists()

    says("is not OpenUni's .it holds lmm.x.", whole | {"lmm.x": whole["meta_queries"]})
    says("it lacks some of its parts", {"meta_queries": whole["meta_queries"]})
    says("num_queries is 3, not 256", whole | {"meta_queries": whole["meta_queries"][:3]})
    says("missing: connector.layers.2", connector=TEXT["connector"] | {"num_hidden_layers": 3})
    says("has no llm_config", internvl=sana / "transformer")
    says("lacks config.json: download it whole", vae=epath.Path(made.folder))
    evil = tmp_path / "evil.pth"
    torch.save({"a": pathlib.Path("x")}, evil)
    with pytest.raises(tool.UserError, match="evil.pth holds more than PyTorch tensors"):
        tool.read_pickle(evil)
    assert call(convert, "import", str(made.pth), str(tmp_path / "in")) == 2
    assert "is a pickle" in (said := capsys.readouterr().err) and "tools/openuni.py" in said


def test_the_text_encoder_of_another_family_is_another_family(made):
    """SANA's own folder stays SANA's, though both share two networks."""
    found = importing.import_folder(
        str(made.folder / "pipeline"), str(made.folder / "sana"), progress=False
    )
    assert found.family == "sana" and imported.open_imported(found.folder).family == "sana"
