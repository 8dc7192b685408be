"""Config files and overrides: typed, locked, and helpful when something is misspelled."""

import dataclasses
import json
import pathlib

import pytest

from twinflow_jax import config as configs
from twinflow_jax import keys, models, objectives, train
from twinflow_jax.config import reference
from twinflow_jax.errors import UserError
from twinflow_jax.training import optimizers

FILES = sorted(pathlib.Path("configs").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_config_file_builds(file):
    run = configs.parse(str(file))
    assert sum(run.bound_objective.counts(run.data.batch_size).values()) == run.data.batch_size
    optimizers.create(run.optimizer, run.train.steps)
    assert models.build(run.model).abstract_params()
    assert configs.Run.of(json.loads(configs.to_json(run))) == run


def test_baseline_differs_only_in_the_objective():
    mnist = configs.load("configs/mnist.py").to_dict()
    rcgm = configs.load("configs/mnist_rcgm.py").to_dict()
    ours, baseline = mnist.pop("objective"), rcgm.pop("objective")
    differing = {key for key in ours if ours[key] != baseline[key]}
    assert differing == {"ratios", "rectify_weight"}
    assert mnist == rcgm


@pytest.mark.parametrize("variant, objective", [
    ("order2", (2, "sampled", 0.99, 0.8)), ("order1", (1, "zero", 1.0, 4.0)),
])
def test_edits_have_the_papers_settings(variant, objective):
    run = configs.parse(f"configs/qwen_edit_lora_tpu.py:{variant}")
    assert (run.adapter.rank, run.data.batch_size, run.train.steps) == (64, 24, 7000)
    assert run.train.micro_steps == 4  # each of one role
    o = run.objective
    assert o.ratios == (1.0, 1.0, 1.0, 1.0)
    assert (o.order, o.target_time, o.teacher_decay, o.guidance) == objective


def test_overrides_keep_types():
    config = configs.parse(
        "configs/digits.py",
        ["train.steps=7", "optimizer.learning_rate=1", "sample.steps=(1,8)",
         "objective.twin=False", "data.name=mnist5k"],
    )
    assert config.train.steps == 7 and config.sample.steps == (1, 8)
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.objective.twin is False and config.data.name == "mnist5k"


def test_overrides_reach_keys_that_a_file_does_not_name(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("from twinflow_jax.training import defaults\nget_config = defaults.get\n")
    overrides = [
        "model.patch=7", "model.dtype=bfloat16", "model.name=dit", "train.unconditional=permuted",
    ]
    run = configs.parse(str(file), overrides)
    assert (run.model.name, run.model.patch, run.model.dtype) == ("dit", 7, "bfloat16")
    with pytest.raises(UserError, match="no config key 'model.patch'"):
        configs.parse(str(file), overrides[:1])


def test_a_preset_by_name_replaces_the_objective():
    """Whatever the order, and without what belonged to the file's."""
    overrides = ["objective.guidance=0.3", "objective=meanflow"]
    run = configs.parse("configs/mnist.py", overrides)
    assert run.objective == objectives.build(objectives.preset("meanflow", guidance=0.3)).config
    with pytest.raises(UserError, match="no config key 'objective.ratios'"):
        configs.parse("configs/mnist.py", [*overrides, "objective.ratios=(1,1,1,1)"])


def test_a_key_may_take_one_value_or_several(tmp_path):
    file = tmp_path / "lengths.py"
    file.write_text(
        "from twinflow_jax import config as configs\n"
        "def get_config():\n    config = configs.load('emoji')\n"
        "    config.data.text_tokens = (16, 64)\n    return config\n"
    )
    several, one = configs.parse(str(file)), configs.parse(str(file), ["data.text_tokens=32"])
    assert (several.data.text_lengths, one.data.text_lengths) == ((16, 64), (32,))
    assert one.data.text_tokens == 32
    assert configs.Run.of(json.loads(configs.to_json(several))) == several


def test_a_record_without_some_keys_has_their_defaults():
    run = configs.parse("configs/mnist.py")
    fields = json.loads(configs.to_json(run))
    del fields["objective"]["merge_passes"], fields["train"]["weights"], fields["mesh"]
    assert configs.Run.of(json.loads(json.dumps(fields))) == run
    fields["train"]["speed"] = 3
    with pytest.raises(UserError, match="train has no key 'speed'"):
        configs.Run.of(json.loads(json.dumps(fields)))


def test_the_reference_of_all_keys_is_current():
    """Make it again: python -m twinflow_jax.config.reference > docs/configs.md"""
    assert pathlib.Path("docs/configs.md").read_text() == reference.reference()


def test_help_config_prints_every_key_with_its_present_value(capsys, monkeypatch):
    command = ["train", "--config", "configs/digits.py", "--config.train.steps=7", "--help-config"]
    monkeypatch.setattr("sys.argv", command)
    assert train.main() == 0
    told = capsys.readouterr().out
    assert "train.steps = 7  (default 1000)\n    int: optimizer steps in all; 1 or more\n" in told
    fields = configs.parse("configs/digits.py").fields()
    assert {line.split(" = ")[0] for line in told.splitlines() if " = " in line} == (
        configs.flatten(fields).keys()
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=7", "did you mean 'train.steps'"),
        ("optimiser.learning_rate=1", "did you mean 'optimizer.learning_rate'"),
        ("objective.guidence=.5", "did you mean 'objective.guidance'"),
        ("train.steps=many", "takes int .* not 'many'"),
        ("train.steps=1.5", "takes int"),
        ("objective.twin=1", "takes bool"),
        ("data.text_tokens=1.5", "takes int or tuple of int"),
        ("train.steps", "has no value"),
        ("optimizer.betas=(.9,'x')", "takes tuple of 2 float"),
        ("optimizer.betas=(.9,)", "takes tuple of 2 float"),
        ("train=1", "is a section"),
        ("objective=meanflw", "no objective preset 'meanflw'; choose from .*meanflow"),
        ("train.steps.x=1", "no config key"),
    ],
)
def test_bad_overrides_name_what_is_meant(override, message):
    with pytest.raises(UserError, match=message):
        configs.parse("configs/digits.py", [override])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": 5}, "model is 5; it takes a section"),
        ({"train": None}, "train is None; it takes a section"),
        ({"model": {"name": ["mlp"]}}, r"model.name is \['mlp'\]; choose from mlp"),
        ({"objective": {"form": {}}}, "objective.form is {}; choose from twinflow"),
        ({"pipeline": 5}, "pipeline is 5; it takes str"),
        ({"train": {"steps": 10**12}}, "train.steps is 1000000000000; give 2147483647 or less"),
        ({"sample": {"steps": (10**12,)}}, r"sample.steps is \(1000000000000,\); give a number in"),
        ({"data": {"weights": (1.0, float("inf"))}}, "weights is .*; give a finite number"),
        ({"optimizer": {"decay_to": float("nan")}}, "decay_to is nan; give a finite number"),
        ({"train": {"init_from": "s3://b/x"}}, "train.init_from: s3://b/x is no path"),
        ({"train": {"steps": 0, "sped": 1}, "sample": {"steps": 1}, "oddity": {}},
         "no config section 'oddity'.*; train has no key 'sped'.*; sample.steps is 1; it takes"),
    ],
)
def test_every_mistake_of_a_description_is_told_with_its_key(fields, message):
    sections = {"model": {"name": "mlp"}, "objective": {"form": "twinflow"}}
    with pytest.raises(UserError, match=message):
        configs.Run.of(sections | fields)


def test_mistakes_are_told_together_with_the_file(tmp_path):
    overrides = ["model.width=0", "train.steps=0", "train.micro_steps=0"]
    with pytest.raises(UserError, match="^configs/digits.py: model.width is 0.*; train.steps is 0.*"
                                        "; train.micro_steps is 0; give 1 or more$"):
        configs.parse("configs/digits.py", overrides)
    with pytest.raises(UserError, match="train.stesp.*; .*model.widht"):
        configs.parse("configs/digits.py", ["train.stesp=1", "model.widht=3"])
    with pytest.raises(UserError, match="does not divide .*; objective.guidance compares"):
        configs.parse(
            "configs/digits.py",
            ["train.micro_steps=7", "objective.guidance=.5", "train.unconditional=empty",
             "train.condition_dropout=0"],
        )


@pytest.mark.parametrize("choice, gone, stays", [
    ("model.name=dit", "model.times", ("model", "width")),
    ("objective.form=paper", "objective.twin", ("objective", "order")),
])
def test_another_family_or_form_leaves_out_keys_of_the_file(choice, gone, stays):
    section, key = stays
    with pytest.warns(UserWarning, match=f"^{section} is of another kind .*{gone}.* left out$"):
        fields = configs.parse("configs/digits.py", [choice, "model.num_classes=0"]).fields()
    before = configs.parse("configs/digits.py").fields()
    assert fields[section][key] == before[section][key]
    first, value = choice.split("=")
    assert fields[section][first.split(".")[1]] == value


def test_bad_config_files(tmp_path):
    with pytest.raises(UserError, match="no config file .*: digits, emoji"):
        configs.load("configs/nothing.py")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match="line 1 is not valid Python"):
        configs.load(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="no get_config"):
        configs.load(str(tmp_path / "empty.py"))
    (tmp_path / "typo.py").write_text(
        "from twinflow_jax.training import defaults\n"
        "def get_config():\n    config = defaults.get()\n    config.train.update(stpes=3)\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match="line 4.*stpes"):
        configs.load(str(tmp_path / "typo.py"))
    with pytest.raises(UserError, match="no variants"):
        configs.load("configs/digits.py:tiny")


def test_configs_that_come_along_have_names(tmp_path, monkeypatch):
    here = configs.parse("configs/qwen20b_tpu.py:tiny")
    monkeypatch.chdir(tmp_path)
    for name in ("qwen20b_tpu:tiny", "configs/qwen20b_tpu.py:tiny", "qwen20b_tpu.py:tiny"):
        assert configs.parse(name) == here
    with pytest.raises(UserError, match="no config file"):
        configs.parse("elsewhere/mnist.py")


def test_a_key_without_meaning_or_of_another_kind_is_told():
    @dataclasses.dataclass(frozen=True)
    class Bare(keys.Part):
        section = "bare"
        speed: int = 3

    @dataclasses.dataclass(frozen=True)
    class Other(keys.Part):
        section = "other"
        speed: dict | None = keys.option(None, "of it")

    for part, message in ((Bare, "Bare.speed has no meaning"), (Other, "Other.speed is .*: a key")):
        with pytest.raises(TypeError, match=message):
            part()


def test_unknown_model_and_objective_fields():
    with pytest.raises(UserError, match="has no key 'widht'"):
        models.create({"name": "mlp", "widht": 3})
    with pytest.raises(UserError, match="choose from mlp, unet, dit"):
        models.create({"name": "vgg"})
    with pytest.raises(UserError, match="choose from twinflow, tutorial, paper"):
        objectives.build({"form": "gan"})
