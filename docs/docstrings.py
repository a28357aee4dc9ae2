"""The examples of the docstrings are shown as code: griffe does that for a section named ``Examples``."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section ``Example`` of every docstring."""

    def on_instance(self, *, obj: griffe.Object, **arguments: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:", "\nExamples:")
