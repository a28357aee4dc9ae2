"""Sixty random cases on every change; ``make fuzz`` runs a thousand others."""

from __future__ import annotations

import pytest
from fuzz_cases import Case, cases
from fuzz_check import Failure, Rejected, check
from fuzz_modules import Node
from fuzz_run import MUTATIONS
from hypothesis import HealthCheck, Phase, given, note, reject, settings

QUICK = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    phases=[Phase.generate, Phase.shrink],
)


@QUICK
@given(cases())
def test_a_random_model_keeps_its_values_and_has_unbiased_gradients(case):
    note(f"fails: {case!r}")
    try:
        check(case)
    except Rejected:
        reject()


CHAIN = Case("vectors", (Node("linear"), Node("tanh"), Node("linear")), (("*", "rows:keep=0.5"),))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_chain_is_enough_to_notice_each_mutation(mutation, dtype, monkeypatch):
    case = Case(CHAIN.domain, CHAIN.nodes, CHAIN.rules, dtype)
    assert check(case) == "sketched"
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(Failure, match="biased"):
        check(case)
