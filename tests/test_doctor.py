"""`backsketch doctor` and `--version`."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from backsketch import cli, native
from backsketch.commands import doctor


def by_name() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.findings()}


def test_the_version_is_that_of_the_package():
    done = CliRunner().invoke(cli.make_app(), ["--version"])
    assert (done.exit_code, done.output) == (0, f"backsketch {version('backsketch')}\n")


@pytest.mark.parametrize("argument", ["--version", "doctor"])
def test_both_answer_where_the_packages_of_the_command_line_are_missing(
    argument, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.setattr(sys, "argv", ["backsketch", argument])
    cli.main()
    said = capsys.readouterr().out
    assert f"backsketch {version('backsketch')}" in said
    assert ("C++ compiler" in said) == (argument == "doctor")


def test_the_report_names_what_decides_speed():
    done = CliRunner().invoke(cli.make_app(), ["doctor"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for what in ("versions", "processor", "8-bit products", "threads", "C++ compiler", "CUDA"):
        assert what in done.output
    for what in ("compiled sampling", "compiled rounding", "cache folder", "extra train"):
        assert what in done.output


def test_without_a_compiler_it_says_what_that_costs(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = by_name()["C++ compiler"]
    assert (found.found, found.good) == ("none", False)
    assert "slower" in found.means


def test_kernels_that_cannot_be_loaded_are_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(native.Source, "library", lambda self: None)
    monkeypatch.setattr(native.Source, "why_not", lambda self: "the compiler failed")
    found = by_name()["compiled sampling"]
    assert (found.found, found.good) == ("the compiler failed", False)


@pytest.mark.parametrize(("flags", "fast"), [({"avx2"}, False), ({"avx512_vnni"}, True)])
def test_integer_products_depend_on_the_processor(monkeypatch, flags, fast):
    monkeypatch.setattr(doctor, "_flags", lambda: flags)
    assert by_name()["8-bit products"].good is fast


def test_an_unusable_cache_folder_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "not made yet" in by_name()["cache folder"].found
    (tmp_path / "backsketch").mkdir()
    assert by_name()["cache folder"].good
    monkeypatch.setattr(doctor, "_is_own", lambda folder: False)
    assert not by_name()["cache folder"].good
