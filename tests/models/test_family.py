"""Every family is what its contract says, and what one lacks is told by name."""

import dataclasses

import pytest

from twinflow_jax import models
from twinflow_jax.models import mlp, names, sana
from twinflow_jax.models.family import Family, check_family

SANA = models.FAMILIES["sana"]


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_family_keeps_its_contract(name):
    assert check_family(name, models.FAMILIES[name]) == []


class Halved(mlp.MLP):
    """Half of a velocity."""

    def __call__(self, x_t, *others):
        return x_t[:, :1]


@dataclasses.dataclass(frozen=True)
class Shapeless(mlp.Config):
    sample_shape: tuple[int, ...] = ()


def changed(**networks) -> Family:
    """SANA with other networks, or without those that are None."""
    found = {k: n for k, n in (SANA.text_to_image.networks | networks).items() if n is not None}
    text = dataclasses.replace(SANA.text_to_image, networks=found)
    return dataclasses.replace(SANA, text_to_image=text)


def test_what_a_family_lacks_is_told():
    assert check_family("dit", models.FAMILIES["mlp"]) == ["config's name is 'mlp', not 'dit'"]
    text = Family(mlp.Config, mlp.MLP, SANA.text_to_image)
    assert check_family("mlp", text) == ["config derives from no TextSettings"]
    assert check_family("mlp", Family(mlp.Config, Halved)) == [
        "module: the velocity is float32 (1, 1), of samples float32 (1, 2)"
    ]
    assert check_family("mlp", Family(Shapeless, mlp.MLP)) == ["config has no sample_shape"]
    [told] = check_family("mlp", Family(mlp.Config, lambda config: None))
    assert told.startswith("module: AttributeError: ")

    vae, encoder = sana.NETWORKS["vae"], sana.NETWORKS["text_encoder"]
    assert check_family("sana", changed(vae=None, text_encoder=None)) == [
        "has no network 'vae'", "has no TextNetwork"
    ]
    assert check_family("sana", changed(vae=dataclasses.replace(vae, module=mlp.MLP))) == [
        "vae: has no encode", "vae: has no decode"
    ]
    short = dataclasses.replace(vae, config=mlp.Config)
    assert check_family("sana", changed(vae=short)) == [
        "vae: has no downscale", "vae: has no latent_channels", "vae: has no from_published"
    ]
    second = dataclasses.replace(encoder, folder="text_encoder_2")
    assert check_family("sana", changed(text_encoder_2=second)) == [
        "text_encoder_2: has no config in tiny"
    ]

    def with_text(**members):
        text = dataclasses.replace(SANA.text_to_image, **members)
        return check_family("sana", dataclasses.replace(SANA, text_to_image=text))

    [told] = with_text(tokenize=lambda tokenizers, prompts: {})
    assert told.startswith("tokenize: __call__ takes (tokenizers, prompts), not (tokenizers, ")
    [told] = with_text(embed=lambda configs, params: ())
    assert told == "embed: __call__ takes (configs, params), not (configs, params, prompts)"
    [told] = with_text(embed=lambda configs, params, prompts: prompts["none"])
    assert told == "embed: KeyError: 'none'"
    narrow = lambda configs, params, prompts: (SANA.text_to_image.embed(
        configs, params, prompts)[0][..., :5], None)
    assert with_text(embed=narrow) == ["embed: tokens are 5 wide, the transformer takes 48"]
    broken = dataclasses.replace(sana.NETWORKS["transformer"], table=lambda config: config.rules)
    [told] = check_family("sana", changed(transformer=broken))
    assert told.startswith("transformer: AttributeError: ")
    assert check_family("sana", dataclasses.replace(SANA, module=mlp.MLP)) == [
        "config and module are not those of its transformer"
    ]

    def table(config):
        whole = encoder.table(config)
        return dataclasses.replace(whole, rules=(*whole.rules[1:], names.Rule("a.b", "a/b")))

    other = dataclasses.replace(encoder, table=table)
    assert check_family("sana", changed(text_encoder=other)) == [
        "text_encoder: no rule is of parameter embedding",
        "text_encoder: a rule is of a/b, which is no parameter",
    ]
