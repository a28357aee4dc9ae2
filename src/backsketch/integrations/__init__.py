"""Callbacks for trainers of other libraries; each module needs its library, and none is imported on its own.

``backsketch.integrations.transformers.SketchCallback`` is for ``transformers.Trainer``,
``backsketch.integrations.lightning.SketchCallback`` for Lightning's.
"""
