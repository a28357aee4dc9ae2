"""Families of language models: how one is made, called and kept. A registry by the first part of `--model`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backsketch as bs
from backsketch.models.gpt import continued, gpt
from backsketch.train.errors import TrainError
from backsketch.train.tokens import BYTES, FILE, Tokenizer

__all__ = ["CONTEXT", "IGNORED", "Language", "language_of"]

CONTEXT = 128
IGNORED = -100  # the target of a place that does not count
FOLDER = "model"


class Language(Protocol):
    """What data of text ask of a family of models. Tokens and targets are `(rows, length)` int64."""

    def default_tokenizer(self) -> str:
        """The tokenizer where none is asked for."""

    def build(self, vocab_size: int, context: int, options: Mapping[str, Any]) -> nn.Module:
        """A model over that vocabulary; ValueError with the reason where there is none."""

    def loss(self, model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the targets that count."""

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """`(rows, length, vocabulary)`."""

    def keep(self, core: nn.Module, tokenizer: Tokenizer, out: Path) -> None:
        """Write the trained model for others to read, beside the checkpoint."""


class OwnGPT:
    """The transformer of :mod:`backsketch.models.gpt`. Its checkpoint holds a plain state_dict."""

    def __init__(self, name: str):
        self._name = name

    def default_tokenizer(self) -> str:
        return BYTES

    def build(self, vocab_size: int, context: int, options: Mapping[str, Any]) -> nn.Module:
        parameters = inspect.signature(gpt).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        _only(self._name, options, known)
        return gpt(vocab_size, **{**options, "context": context})

    def loss(self, model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = model(tokens, targets)
        return found

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        found: Tensor = model(tokens)
        return found

    def keep(self, core: nn.Module, tokenizer: Tokenizer, out: Path) -> None:
        """The checkpoint is enough."""


class HuggingFace:
    """Any causal model of `transformers`: random weights from a configuration, or pretrained ones.

    Args:
        name: `hf:` and a `config.json`, a folder with one (pretrained if there are weights beside it), or the
            name of a pretrained model on the hub.
    """

    def __init__(self, name: str):
        self._name, self._source = name, name.partition(":")[2]

    def default_tokenizer(self) -> str:
        own = Path(self._source).expanduser() / FILE
        return str(own) if own.is_file() else BYTES

    def build(self, vocab_size: int, context: int, options: Mapping[str, Any]) -> nn.Module:
        _only(self._name, options, ["context"])
        model = self._model()
        limits = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
        if limits[0] < vocab_size:
            raise TrainError(
                f"the tokenizer has {vocab_size} tokens, more than the vocabulary of {limits[0]} of {self._name}"
            )
        if limits[1] is not None and limits[1] < context:
            raise TrainError(
                f"the context of {context} is longer than the {limits[1]} positions of {self._name}"
            )
        return model.train()

    def loss(self, model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(model, tokens)
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
        return found

    def keep(self, core: nn.Module, tokenizer: Tokenizer, out: Path) -> None:
        """A folder that `from_pretrained` reads, without a trace of the sketch."""
        bs.restore_(core)
        with _quiet_transformers():
            core.save_pretrained(out / FOLDER)  # type: ignore[operator]
        tokenizer.save(out / FOLDER)

    def _model(self) -> Any:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise TrainError(
                "models of Hugging Face need the package transformers: pip install 'backsketch[text]'"
            ) from error
        path = Path(self._source).expanduser()
        if not self._source or (_looks_local(self._source) and not path.exists()):
            raise TrainError(f"there is no model {self._source!r} for --model {self._name}")
        try:
            with _quiet_transformers():
                if path.exists() and not _has_weights(path):
                    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
                return AutoModelForCausalLM.from_pretrained(self._source, dtype=torch.float32)
        except (
            Exception
        ) as error:  # of transformers, safetensors, the hub: all about the user's model
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrainError(f"cannot make the model {self._name}: {told}") from error


_FAMILIES: Mapping[str, Callable[[str], Language]] = MappingProxyType(
    {"gpt": OwnGPT, "hf": HuggingFace}
)


def language_of(model: str) -> Language:
    """The family of a model's name, which the configuration has checked."""
    return _FAMILIES[model.partition(":")[0]](model)


def continuation(
    language: Language,
    core: nn.Module,
    tokens: Tensor,
    count: int,
    context: int,
    generator: torch.Generator,
) -> Tensor:
    """`(1, length)` tokens and `count` more, drawn by an exact model in eval mode."""
    was_training = core.training
    core.eval()
    try:
        with torch.no_grad(), bs.exact(core):
            return continued(
                lambda t: language.logits(core, t), tokens, count, context, generator=generator
            )
    finally:
        core.train(was_training)


def _only(model: str, options: Mapping[str, Any], known: list[str]) -> None:
    if unknown := [name for name in options if name not in known]:
        raise TrainError(f"model {model} has no option {unknown[0]!r}; it has {', '.join(known)}")


def _looks_local(source: str) -> bool:
    return source.startswith((".", "~", "/")) or source.endswith(".json") or source.count("/") > 1


def _has_weights(path: Path) -> bool:
    patterns = ("*.safetensors", "pytorch_model*.bin")
    return path.is_dir() and any(True for pattern in patterns for _ in path.glob(pattern))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and remarks of the library beside our own."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
