"""Recipes are read as data; errors name the place and the nearest valid name."""

import subprocess
import sys
from pathlib import Path

import pytest

from edgewhisper.compress import METHODS
from edgewhisper.compress.tspar import Options
from edgewhisper.recipe import (
    available,
    load_recipe,
    parse,
    searchable,
    summary,
    value_at,
    with_values,
)
from edgewhisper.search import Dimension
from edgewhisper.training import Training
from export.problem import Problem

TSPAR = '[[step]]\nmethod = "tspar"\n'


def refusal(text: str) -> str:
    """Return message and hint of the error for a recipe with this text."""
    with pytest.raises(Problem) as caught:
        parse("mine", text)
    return f"{caught.value} | {caught.value.hint}"


def test_a_step_becomes_the_methods_options():
    recipe = parse("mine", TSPAR + 'c1 = 1\nc2 = inf\nreg_mode = "proximal"\n')
    assert recipe.steps[0].method == "tspar"
    assert recipe.steps[0].options == Options(c1=1, c2=float("inf"), reg_mode="proximal")


def test_steps_keep_their_order_and_the_text_is_kept_verbatim():
    text = TSPAR + '# a remark\n[[step]]\nmethod = "shrink"\n'
    recipe = parse("mine", text)
    assert [step.method for step in recipe.steps] == ["tspar", "shrink"]
    assert recipe.text == text


def test_a_nested_table_becomes_the_training():
    recipe = parse("mine", TSPAR + "[step.training]\nsteps = 7\nlearning_rate = 1e-3\n")
    assert recipe.steps[0].options.training == Training(steps=7, learning_rate=1e-3)


def test_every_shipped_recipe_loads_and_has_a_summary():
    assert "tspar" in available()
    for name in available():
        assert load_recipe(name).steps
        assert len(summary(name)) > 20


def test_a_wrong_name_and_a_directory_are_not_recipes(tmp_path: Path):
    with pytest.raises(Problem, match="no included recipe of that name; did you mean 'oneshot'"):
        load_recipe("oneshoot")
    with pytest.raises(Problem, match="it is a directory"):
        load_recipe(tmp_path)


def test_a_file_loads_like_a_shipped_recipe(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(load_recipe("tspar").text)
    assert load_recipe(path).steps == load_recipe("tspar").steps
    assert load_recipe(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(TSPAR + "c3 = 1.0", "step 1 (tspar): there is no field 'c3'", id="unknown"),
        pytest.param(TSPAR + "reg_mod = 'l2'", "did you mean 'reg_mode'?", id="nearest field"),
        pytest.param(
            TSPAR + "[step.training]\nlearning_rat = 1.0",
            "training: there is no field 'learning_rat'; did you mean 'learning_rate'?",
            id="nearest nested field",
        ),
        pytest.param('[[step]]\nmethod = "tspr"', "did you mean 'tspar'?", id="nearest method"),
        pytest.param('[[step]]\nmethod = "os.system"', "no method 'os.system'", id="not a method"),
        pytest.param("[[step]]\nc1 = 1.0", "it has no method", id="no method"),
        pytest.param('[[stp]]\nmethod = "tspar"', "did you mean 'step'?", id="nearest table"),
        pytest.param("step = 3", "it has no [[step]]", id="step is a number"),
        pytest.param("", "it has no [[step]]", id="empty"),
        pytest.param(TSPAR + 'c1 = "1.0"', "c1: '1.0' is not a number", id="text"),
        pytest.param(TSPAR + "c1 = true", "c1: True is not a number", id="bool for float"),
        pytest.param(
            TSPAR + "evaluations = 7.5", "evaluations: 7.5 is not an integer", id="fraction"
        ),
        pytest.param(TSPAR + "rho = 1.5", "rho: 1.5 is not between 0 and 1", id="high"),
        pytest.param(TSPAR + "c1 = -1.0", "c1: -1.0 is not between 0 and inf", id="low"),
        pytest.param(TSPAR + "c1 = nan", "c1: nan is not between", id="nan"),
        pytest.param(
            TSPAR + 'reg_mode = "prox"',
            "'prox' is not one of 'subgradient', 'proximal'",
            id="choice",
        ),
        pytest.param(TSPAR + "training = 3", "3 is not a table", id="number for a table"),
        pytest.param(TSPAR + "c1 = = 2", "not valid TOML: Invalid value (at line 3", id="broken"),
    ],
)
def test_an_invalid_recipe_is_refused_with_its_place(text: str, message: str):
    assert message in refusal(text)


def in_order(*steps: str) -> str:
    """Return a recipe of these methods. The text after a method's name is added to its table."""
    tables = [step.partition(" ") for step in steps]
    return "".join(f'[[step]]\nmethod = "{name}"\n{more}\n' for name, _, more in tables)


NO_TRAINING = "[step.training]\nsteps = 0"
QUANTISERS = ["qat", "kdq"]


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in QUANTISERS])
def test_a_step_that_changes_weights_may_not_follow_one_that_quantises(quantiser, method):
    text = refusal(in_order("shrink", quantiser, "qat", method))
    assert f"step 4 ({method}) would change weights that step 3 (qat) has quantised" in text
    assert "move step 3 (qat) after step 4" in text
    parse("mine", in_order("shrink", method, quantiser, "qat"))


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(("qat", "qat", "kdq"), id="quantising again"),
        pytest.param(("qat", f"short {NO_TRAINING}"), id="windows recorded"),
        pytest.param(
            ("qat encoder = 32\ndecoder = 32\ntoken_table = 32", "tspar"), id="training in 32 bits"
        ),
        pytest.param(
            ("kdq [step.quantise]\nencoder = 32\ndecoder = 32\ntoken_table = 32", "shrink"),
            id="distilled in 32 bits",
        ),
    ],
)
def test_steps_that_keep_the_quantised_weights_may_follow(steps):
    assert len(parse("mine", in_order(*steps)).steps) == len(steps)


def test_a_step_that_quantises_one_part_must_come_last():
    qat = "qat encoder = 32\ndecoder = 32\ntoken_table = 32\nstem = 8"
    assert "step 2 (lite) would change weights" in refusal(in_order(qat, "lite"))


def searching(**fields: str) -> str:
    """Return a recipe with one [[search]]; values are in TOML syntax."""
    return TSPAR + "[[search]]\n" + "".join(f"{key} = {value}\n" for key, value in fields.items())


def test_a_search_names_a_field_and_its_bounds():
    recipe = parse(
        "mine",
        searching(field='"step.1.c1"', low="0.1", high="2", log="true")
        + '[[search]]\nfield = "step.1.training.steps"\nlow = 10\nhigh = 20\n'
        + '[[search]]\nfield = "step.1.group_norm"\nchoices = ["l2", "l2_squared"]\n',
    )
    assert [knob.dimension for knob in recipe.knobs] == [
        Dimension(0.1, 2.0, log=True),
        Dimension(10, 20, whole=True),
        Dimension(choices=("l2", "l2_squared")),
    ]
    assert [value_at(recipe, knob) for knob in recipe.knobs] == [1.0, 400, "l2"]


def test_with_values_changes_only_the_given_fields():
    recipe = parse("mine", searching(field='"step.1.training.steps"', low="1", high="9"))
    changed = with_values(recipe, {"step.1.training.steps": 7})
    assert changed.steps[0].options.training.steps == 7
    assert recipe.steps[0].options.training.steps == 400
    back = with_values(changed, {"step.1.training.steps": 400})
    assert back == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param(
            dict(field='"step.1.min_remvoed"', low="0", high="1"),
            "there is no field 'min_remvoed'; did you mean 'min_removed'?",
            id="nearest field",
        ),
        pytest.param(
            dict(field='"step.1.training.step"', low="0", high="1"),
            "did you mean 'steps'?",
            id="nearest nested field",
        ),
        pytest.param(dict(feld='"step.1.c1"'), "did you mean 'field'?", id="unknown key"),
        pytest.param(dict(low="0", high="1"), "field is None, which is not", id="no field"),
        pytest.param(dict(field='"c1"', low="0"), "which is not a field of a step", id="no step"),
        pytest.param(
            dict(field='"step.2.c1"', low="0", high="1"),
            "there is no step 2, the recipe has 1",
            id="step",
        ),
        pytest.param(
            dict(field='"step.0.c1"', low="0", high="1"), "there is no step 0", id="step zero"
        ),
        pytest.param(
            dict(field='"step.1.training"', low="0", high="1"), "training is a table", id="table"
        ),
        pytest.param(
            dict(field='"step.1.c1.low"', low="0", high="1"), "is nested too deeply", id="too deep"
        ),
        pytest.param(
            dict(field='"step.1.rho"', low="0", high="1.5"),
            "high: 1.5 is not between 0 and 1",
            id="range",
        ),
        pytest.param(
            dict(field='"step.1.evaluations"', low="1", high="2.5"),
            "high: 2.5 is not an integer",
            id="fraction",
        ),
        pytest.param(
            dict(field='"step.1.c1"', low="0.5", high="0.5"), "low is 0.5 and high is 0.5", id="one"
        ),
        pytest.param(
            dict(field='"step.1.c1"', low="0", high="1", log="true"),
            "low must be above 0",
            id="log of zero",
        ),
        pytest.param(
            dict(field='"step.1.c1"', low="0", high="inf"), "both finite", id="no upper bound"
        ),
        pytest.param(dict(field='"step.1.c1"', low="0"), "high missing", id="no high"),
        pytest.param(
            dict(field='"step.1.group_norm"', low="0", high="1"),
            "the field is not a number",
            id="text",
        ),
        pytest.param(
            dict(field='"step.1.group_norm"', choices='["l3"]'), "'l3' is not one of", id="choice"
        ),
        pytest.param(dict(field='"step.1.c1"', choices="[]"), "choices are []", id="no choices"),
        pytest.param(
            dict(field='"step.1.c1"', choices="[1.0]", low="0"), "choices and low given", id="both"
        ),
    ],
)
def test_an_invalid_search_is_refused_with_its_place(fields: dict, message: str):
    text = refusal(searching(**fields))
    assert message in text
    assert "recipe mine, search 1" in text


def test_a_field_may_be_searched_once():
    once = '[[search]]\nfield = "step.1.c1"\nlow = 0\nhigh = 1\n'
    assert "search 2: step.1.c1 has an earlier [[search]]" in refusal(TSPAR + once + once)
    assert "search is not a list of tables" in refusal("search = 3\n" + TSPAR)


def test_searchable_lists_the_fields_of_shipped_recipes():
    assert {"quick", "tspar", "lite", "bald"} <= {name for name in available() if searchable(name)}
    for name in available():
        assert [knob.field for knob in load_recipe(name).knobs] == searchable(name)


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(Problem, match=r"recipe tspra: there is no such file.*'tspar'") as caught:
        load_recipe("tspra")
    assert "tspar" in caught.value.hint


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    (tmp_path / "weights.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Problem, match="cannot be read as UTF-8"):
        load_recipe(tmp_path / "weights.toml")


def test_a_huge_file_is_refused_without_reading_it(tmp_path: Path):
    (tmp_path / "huge.toml").write_bytes(b"#" * 200_000)
    with pytest.raises(Problem, match="200000 bytes"):
        load_recipe(tmp_path / "huge.toml")


def test_listing_the_recipes_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from edgewhisper.recipe import available; assert available();"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
