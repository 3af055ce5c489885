"""Alarms fire on planted histories, each for its own reason, and stay silent on healthy ones."""

import pandas as pd
import pytest

from reidctl.evaluation.alarms import ALARMS, alarms, collapse, interference, over_regularisation

HEALTHY = {"task_cosine": (0.3, 0.2, 0.1), "pseudo/diversity": (0.4, 0.5, 0.45), "pseudo/mismatch": (0.8, 0.5, 0.4)}
HEALTHY |= {"rank1": (0.3, 0.5, 0.6), "i2i.rank1": (0.4, 0.6, 0.7)}


def history(**changed):
    """Rows of a history: two reports per epoch; validation metrics once."""
    rows = []
    for name, values in {**HEALTHY, **changed}.items():
        split = "val" if name.endswith("rank1") else "train"
        for epoch, value in enumerate(values):
            for step in range(1 if split == "val" else 2):
                rows.append({"split": split, "name": name, "epoch": epoch, "step": 2 * epoch + step, "value": value})
    frame = pd.DataFrame(rows)
    return frame.assign(split=frame["split"].astype("category"), name=frame["name"].astype("category"))


def raised(frame):
    return [name for name, rule in ALARMS.items() if rule(frame) is not None]


@pytest.mark.covers(90, 91, 92)
def test_a_healthy_training_raises_none():
    assert alarms(history()) == []


@pytest.mark.parametrize("nothing", [pd.DataFrame(), history().iloc[:0], history()[history()["name"] == "rank1"]])
def test_a_training_that_logs_nothing_of_the_kind_raises_none(nothing):
    assert alarms(nothing) == []


@pytest.mark.covers(90)
def test_opposed_gradients_are_interference():
    frame = history(task_cosine=(0.3, -0.1, -0.4))
    assert raised(frame) == ["interference"] and "-0.40" in interference(frame)
    assert interference(history(task_cosine=(-0.5, -0.3, 0.1))) is None, "only how it ends counts"
    assert interference(history(task_cosine=(0.1, 0.0, -0.1))) is None


@pytest.mark.covers(90)
def test_one_task_that_falls_while_the_other_holds_is_interference_if_the_gradients_disagree():
    falls = {"rank1": (0.5, 0.6, 0.4)}
    frame = history(**falls, task_cosine=(0.1, 0.0, -0.1))
    assert raised(frame) == ["interference"]
    assert "text to image ended 33 % below" in interference(frame)
    assert interference(history(**falls)) is None, "gradients that agree: this is overfitting"
    both = {**falls, "i2i.rank1": (0.6, 0.7, 0.4)}
    assert interference(history(**both, task_cosine=(0.1, 0.0, -0.1))) is None, "both fall"


@pytest.mark.covers(91)
def test_tokens_that_hardly_depend_on_the_input_are_a_collapse():
    frame = history(**{"pseudo/diversity": (0.01, 0.01, 0.01)})
    assert raised(frame) == ["collapse"] and "1.00 %" in collapse(frame)
    assert collapse(history(**{"pseudo/diversity": (0.01, 0.02, 0.05)})) is None, "it recovered"


@pytest.mark.covers(92)
def test_equal_pairs_at_the_price_of_diversity_are_over_regularisation():
    frame = history(**{"pseudo/diversity": (0.4, 0.2, 0.1), "pseudo/mismatch": (0.8, 0.2, 0.05)})
    assert raised(frame) == ["over_regularisation"] and "25 %" in over_regularisation(frame)
    equal = {"pseudo/mismatch": (0.8, 0.2, 0.05)}
    assert over_regularisation(history(**equal)) is None, "pairs may be equal if people are not"
    shrunk = {"pseudo/diversity": (0.4, 0.2, 0.1)}
    assert over_regularisation(history(**shrunk)) is None, "pairs still differ"
