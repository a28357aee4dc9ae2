"""List the tests that check that a deliberate error is noticed, one a line with its number of cases.

    python tests/list_mutations.py [folder]   # by default this folder; compare two commits with diff

A test counts if it expects a check to fail (``pytest.raises(AssertionError...)``), or says in a comment or
docstring that it holds the mutation of a claim.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path


def _holds_a_mutation(source: str) -> bool:
    return "raises(AssertionError" in source or "mutation" in source.lower()


def _speed(function: ast.FunctionDef) -> str:
    marks = "\n".join(ast.unparse(d) for d in function.decorator_list)
    if "mark.slow" in marks:
        return "make test-all"
    return "make test, all cases in test-all" if "fast_cases" in marks else "make test"


def mutations(folder: Path) -> list[str]:
    """``file::test | where it runs`` of every test that holds a mutation."""
    lines = []
    for path in sorted(folder.glob("test_*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            if _holds_a_mutation(ast.get_source_segment(text, node) or ""):
                lines.append(f"{path.name}::{node.name} | {_speed(node)}")
    return lines


if __name__ == "__main__":
    print(*mutations(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent), sep="\n")
