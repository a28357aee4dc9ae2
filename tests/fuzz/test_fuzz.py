"""Sixty random cases on every change; ``make fuzz`` runs a thousand others."""

from __future__ import annotations

import dataclasses

import fuzz_check
import pytest
from fuzz_cases import Case, case_of, smaller
from fuzz_check import QUICK, Failure, Rejected, check
from fuzz_modules import Node
from fuzz_run import MUTATIONS, Ended, cases_until_found, checked, explain, run_cases

from backsketch.estimators.base import registered

LOOK = (60,)
ON_EVERY_CHANGE = (30, 300, 2000)
"""Draws of each look at a case: half as many in the first one as ``make fuzz`` takes."""


@pytest.mark.parametrize("seed", range(60))
def test_a_random_model_keeps_its_values_and_has_unbiased_gradients(seed):
    try:
        check(case_of(seed), ON_EVERY_CHANGE)
    except Rejected as reason:
        pytest.skip(f"PyTorch refuses the model: {reason}")
    except Exception:
        pytest.fail(explain(seed), pytrace=False)


def test_every_sketch_is_in_a_thousand_cases():
    texts = [text.split(":")[0] for seed in range(1000) for _, text in case_of(seed).rules]
    rare = [name for name in registered() if name != "exact" and texts.count(name) < 40]
    assert not rare


ROWS = Case("vectors", (Node("linear"), Node("tanh"), Node("linear")), (("*", "rows:keep=0.5"),))
COLUMNS = Case(
    "vectors", (Node("linear"), Node("linear")), (("*", "columns:keep=0.5,scores=uniform"),), seed=5
)
NOTICED_IN = {"a forgotten weight": ROWS, "a wrong row": ROWS, "a shared seed": COLUMNS}


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param("bfloat16", marks=pytest.mark.slow),
        pytest.param("autocast", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_chain_is_enough_to_notice_each_mutation(mutation, dtype, monkeypatch):
    case = dataclasses.replace(NOTICED_IN[mutation], dtype=dtype)
    assert check(case, QUICK) == "sketched"
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(Failure, match="biased"):
        check(case, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_mutation_is_found_within_a_hundred_random_cases(mutation):
    assert cases_until_found(mutation, start=1000) is not None


def test_a_failing_case_says_how_to_run_it_and_is_made_smaller(monkeypatch):
    MUTATIONS["a forgotten weight"](monkeypatch)
    monkeypatch.setattr(fuzz_check, "QUICK", LOOK)
    seed = 218  # two activations between the stem and the head, rows at keep 0.4
    text = explain(seed, LOOK)
    assert "biased" in text
    assert f"--case {seed}" in text
    small = eval(text.split("made smaller")[1], {"Case": Case, "Node": Node})
    assert len(list(smaller(small))) < len(list(smaller(case_of(seed))))
    with pytest.raises(Failure, match="biased"):
        check(small, LOOK)


def test_a_run_counts_how_cases_end_and_begins_none_when_the_time_is_over():
    told, written = [], []
    ends = [Ended(7, "failed", "case 7 fails", 1.0), Ended(3, "sketched", "", 2.0)]
    run_cases(ends, told.append, written.append)
    assert told[0] == "case 7 fails"
    assert written[-1]["failures"] == [7]
    assert written[-1]["outcomes"] == {"failed": 1, "sketched": 1}
    assert written[-1]["processor_seconds"] == 3
    assert list(checked(range(3), "cpu", 1, limit=0)) == []
