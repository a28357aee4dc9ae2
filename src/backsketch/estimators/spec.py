"""Sketches from text: ``rows:keep=0.25,scores=l2``."""

from __future__ import annotations

import dataclasses
import difflib

from backsketch.estimators.base import Sketch, registered

__all__ = ["parse"]


def parse(text: str) -> Sketch:
    """Build a sketch from its text form, the inverse of ``str(sketch)``.

    The grammar is ``name`` or ``name:field=value,field=value``; a value that is itself a sketch stands
    in parentheses: ``split:grad_weight=(rows:keep=0.5)``.

    Raises:
        ValueError: unknown name or field (near ones are listed), a missing field, a value out of range.

    Example:
        >>> import backsketch as bs
        >>> bs.parse("rows:keep=0.25,scores=l2")
        Rows(keep=0.25, scores='l2', design='systematic')
        >>> bs.parse("split:grad_weight=(quantized:bits=4)")
        Split(grad_input=None, grad_weight=Quantized(bits=4, group_size=64))
    """
    if not isinstance(text, str):
        raise ValueError(f"a sketch is described by a text such as 'rows:keep=0.25'; got {text!r}")
    name, _, rest = text.strip().partition(":")
    name = name.strip()
    known = registered()
    if name not in known:
        raise ValueError(f"unknown sketch {name!r} in {text!r}{_near(name, list(known))}")
    cls = known[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for item in _split(rest, text):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{item!r} in {text!r} should read field=value")
        if key not in fields:
            raise ValueError(f"{name} has no field {key!r}{_near(key, list(fields))}")
        if key in arguments:
            raise ValueError(f"{key!r} is given twice in {text!r}")
        arguments[key] = _value(value)
    missing = [
        f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING and f.name not in arguments
    ]
    if missing:
        raise ValueError(
            f"{text!r} lacks {', '.join(missing)}: write for example '{name}:{missing[0]}=...'"
        )
    return cls(**arguments)


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{hint} (known: {', '.join(sorted(known))})"


def _split(rest: str, text: str) -> list[str]:
    """Split at commas outside parentheses."""
    if not rest.strip():
        return []
    items, depth, start = [], 0, 0
    for i, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if depth < 0:
            break
        if char == "," and depth == 0:
            items.append(rest[start:i])
            start = i + 1
    if depth:
        raise ValueError(f"unbalanced parentheses in {text!r}")
    return [*items, rest[start:]]


def _value(text: str) -> object:
    if text.startswith("(") and text.endswith(")"):
        return parse(text[1:-1])
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text
