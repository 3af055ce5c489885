import pytest
from pydantic import Field

from reidctl import config
from reidctl.cli.methods import command as list_methods
from reidctl.config import Section, load_recipe, parse_section, recipe_names
from reidctl.errors import UsageError


class Inner(Section):
    margin: float = 0.3


class Outer(Section):
    epochs: int = Field(5, ge=1)
    lr: float = 1e-5
    triplet: Inner = Inner()


@pytest.mark.covers(224)
def test_an_unknown_key_names_the_nearest_one():
    with pytest.raises(UsageError, match=r"`train\.epoch`.*`epochs`"):
        parse_section(Outer, {"epoch": 3}, "train")
    with pytest.raises(UsageError, match=r"`train\.triplet\.margn`.*`margin`"):
        parse_section(Outer, {"triplet": {"margn": 3}}, "train")


def test_a_wrong_value_names_key_and_value():
    with pytest.raises(UsageError, match=r"train\.epochs.*'many'"):
        parse_section(Outer, {"epochs": "many"}, "train")
    with pytest.raises(UsageError, match=r"train\.epochs"):
        parse_section(Outer, {"epochs": 0}, "train")


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("train: {lr: 1e-5}")
    assert parse_section(Outer, load_recipe(file)["train"], "train").lr == 1e-5


def test_overrides_reach_nested_settings_and_keep_the_rest(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("train: {epochs: 7, triplet: {margin: 0.1}}")
    recipe = load_recipe(file, ["train.triplet.margin=0.5", "seed=3", "method.x=[1, 2]"])
    assert recipe == {"train": {"epochs": 7, "triplet": {"margin": 0.5}}, "seed": 3, "method": {"x": [1, 2]}}


@pytest.mark.parametrize("override", ["train.epochs", "=3", "seed.x=1"])
def test_a_malformed_override_is_a_usage_error(tmp_path, override):
    file = tmp_path / "r.yaml"
    file.write_text("seed: 1")
    with pytest.raises(UsageError, match="--set"):
        load_recipe(file, [override])


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "trian: {}"])
def test_a_recipe_that_is_no_recipe_is_a_usage_error(tmp_path, text):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UsageError):
        load_recipe(file)


def test_an_unknown_section_names_the_nearest_one():
    with pytest.raises(UsageError, match=r"`trian`.*`train`"):
        load_recipe(None, ["trian.epochs=3"])


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(UsageError, match="bdam"):
        load_recipe("no-such-recipe")


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_parses_against_the_code(name):
    from reidctl.captioning.config import CaptionConfig
    from reidctl.methods.base import method_class
    from reidctl.stages.building import BackboneSettings
    from reidctl.synthped.config import SynthConfig
    from reidctl.training.config import TrainConfig

    recipe = load_recipe(name)
    method = dict(recipe["method"])
    parse_section(method_class(method.pop("name")).Config, method, "method")
    parse_section(BackboneSettings, recipe["backbone"], "backbone")
    parse_section(TrainConfig, recipe["train"], "train")
    parse_section(SynthConfig, recipe.get("synth"), "synth")
    parse_section(CaptionConfig, recipe.get("caption"), "caption")
    assert recipe["about"]


def test_the_list_of_methods_names_every_recipe(capsys):
    list_methods(json_=False)
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipe_names())


def test_section_names_are_the_ones_a_recipe_may_have():
    assert "method" in config.SECTIONS and len(set(config.SECTIONS)) == len(config.SECTIONS)
