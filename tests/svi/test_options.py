"""Options of a fit: declared once, checked once."""

import inspect
from dataclasses import fields, replace

import cloudpickle
import pytest

from inference import fit
from inference.svi.options import FitOptions, StepRule


def test_fit_and_its_options_agree_in_names_order_types_and_defaults():
    keywords = [p for p in inspect.signature(fit).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    declared = [(option.name, option.type, option.default) for option in fields(FitOptions)]
    assert [(p.name, p.annotation, p.default) for p in keywords] == declared


def test_every_option_has_a_check_and_a_line_of_help():
    for option in fields(FitOptions):
        assert callable(option.metadata["check"])
        assert FitOptions.help_of(option.name).endswith(".")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, StepRule.SEARCHED),
        ({"optimizer": "auto", "steps": 10}, StepRule.SEARCHED_ON_REQUEST),
        ({"steps": 999}, StepRule.FIXED),
        ({"lr": 0.1}, StepRule.FIXED),
        ({"anneal": 10}, StepRule.FIXED),
        ({"optimizer": "adam"}, StepRule.FIXED),
    ],
)
def test_the_step_rule_follows_from_the_options(options, rule):
    assert FitOptions(**options).step_rule is rule


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "auto", "lr": 0.1}, "leave lr and anneal out"),
        ({"stop": "converged", "lr": 0.1}, "goes with steps that are found"),
        ({"resume": True}, "needs the folder of the fit"),
        ({"anneal": 100, "steps": 50}, "flattened target"),
        ({"lr": lambda step: -1.0}, "lr gives -1.0 at step 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_invalid_options_and_combinations_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        FitOptions(**options)


def test_changed_options_are_checked_again_and_follow_the_change():
    options = FitOptions(steps=100, anneal=50)
    assert replace(options, anneal=10).tempering(10) == 1.0
    with pytest.raises(ValueError, match="steps is 0"):
        replace(options, steps=0)


def test_options_travel_to_another_process():
    sent = cloudpickle.loads(cloudpickle.dumps(FitOptions(steps=100, anneal=50)))
    assert sent.tempering(50) == 1.0


def test_the_report_holds_numbers_and_texts():
    report = FitOptions(steps=10, lr=lambda step: 0.5, init={"b": 0, "a": 1}).report()
    assert report["lr"] == "<lambda> from 0.5"
    assert report["init"] == ["a", "b"]
    assert report["optimizer"] == "adam"
