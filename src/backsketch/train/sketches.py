"""The text of ``--sketch``: one sketch, or a JSON object from pattern to sketch."""

from __future__ import annotations

import json
from typing import Any

import backsketch as bs
from backsketch.estimators import Sketch

__all__ = ["parse_rules"]


def parse_rules(text: str) -> Sketch | dict[str, Sketch | None]:
    """What :func:`backsketch.sketch_` takes, from text.

    Args:
        text: one sketch for :func:`backsketch.parse`, or a JSON object from patterns to such texts, in
            which ``null`` leaves a module exact.

    Raises:
        ValueError: a text that is neither, or an empty object.

    Example:
        >>> parse_rules("rows:keep=0.5")
        Rows(keep=0.5, scores='optimal', design='systematic')
        >>> parse_rules('{"head": null, "": "mask:keep=0.75"}')
        {'head': None, '': Mask(keep=0.75, row_dims=1)}
    """
    if not text.lstrip().startswith("{"):
        return bs.parse(text)
    try:
        rules: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the sketch {text} is not a JSON object: {error}") from error
    if not rules:
        raise ValueError("the sketch {} has no rules; say none for exact training")
    return {pattern: None if rule is None else bs.parse(rule) for pattern, rule in rules.items()}
