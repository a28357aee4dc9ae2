"""Runs that are killed and continued end as if nothing had happened: a few cases of the campaign."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

CAMPAIGN = Path(__file__).parent / "campaign.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork")


def campaign(out: Path, *options: str) -> list[dict[str, object]]:
    """The records of some cases."""
    command = [sys.executable, str(CAMPAIGN), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.is_file(), done.stderr
    records: list[dict[str, object]] = json.loads(out.read_text())["records"]
    return records


def test_two_cases_are_clean(tmp_path):
    records = campaign(tmp_path / "found.json", "--only", "0", "3")
    assert [record["fault"] for record in records] == ["", ""]


@pytest.mark.slow
def test_a_case_of_other_jobs_is_clean(tmp_path):
    numbers = map(str, (1, 2, 4, 5, 6, 7, 8, 11))
    records = campaign(tmp_path / "found.json", "--seed", "1", "--only", *numbers)
    assert [record for record in records if record["fault"]] == []
    assert len({record["job"] for record in records}) == 8


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ["random state", "moments", "torn file"])
def test_the_campaign_finds(tmp_path, mutation):
    records = campaign(
        tmp_path / "found.json", "--cases", "12", "--until-fault", "--mutation", mutation
    )
    assert [record for record in records if record["fault"]]
