"""Text for language models in memory, packed into rows of equal length, and the batches drawn from it.

A row is `context` tokens and the targets are the tokens after them. Each epoch cuts the text at an offset of its
own and takes the rows in an order of its own, both pure functions of the seed and the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backsketch.train.config import TrainConfig
from backsketch.train.errors import TrainError
from backsketch.train.history import History
from backsketch.train.language import CONTEXT, IGNORED, Language, continuation, language_of
from backsketch.train.order import OFFSET, SAMPLE, Shares, stream
from backsketch.train.texts import read_texts
from backsketch.train.tokens import FILE, Tokenizer, read, tokenizer_of

__all__ = ["TextBatches", "TextData", "TokenBatch", "load_text"]

EVAL_LOGITS = 2**24  # entries at a time
PROMPT, SAMPLE_TOKENS = 16, 160


@dataclass(frozen=True)
class TokenBatch:
    """`tokens` and `targets`, `(rows, context)` int64."""

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True)
class TextData:
    """A train and a test text as tokens, `(tokens,)` int32, for one family of models."""

    name: str
    train_tokens: Tensor
    test_tokens: Tensor
    tokenizer: Tokenizer
    context: int
    test_split: str
    language: Language

    def __post_init__(self) -> None:
        if len(self.train_tokens) <= self.context:
            raise TrainError(
                f"the text {self.name} has {len(self.train_tokens)} tokens to train on, too few for a "
                f"context of {self.context}: give more text, or a smaller --context"
            )
        if len(self.test_tokens) < 2:
            raise TrainError(f"the text {self.name} is too short to hold some of it out for a test")

    @property
    def num_train(self) -> int:
        """Rows of an epoch. One less than would fit leaves room for the offset."""
        return max((len(self.train_tokens) - 1) // self.context - 1, 1)

    @property
    def num_test(self) -> int:
        """Tokens that are predicted."""
        return len(self.test_tokens) - 1

    def summary(self) -> dict[str, Any]:
        """What `result.json` says about the data, and what a checkpoint must agree with."""
        return {
            "name": self.name,
            "num_train": len(self.train_tokens),
            "num_test": self.num_test,
            "vocabulary": self.tokenizer.size,
            "context": self.context,
            "tokenizer": self.tokenizer.identity,
            "test_split": self.test_split,
        }

    def build(self, config: TrainConfig) -> nn.Module:
        """A new model over this vocabulary.

        Raises:
            ValueError: the model has no such option, or does not fit the vocabulary or the context.
        """
        return self.language.build(self.tokenizer.size, self.context, config.model_options)

    def batches(
        self, config: TrainConfig, device: torch.device, rank: int, world: int
    ) -> TextBatches:
        """The batches of one process; see `TextBatches`."""
        return TextBatches(self, config, device, rank, world)

    def loss(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Mean cross-entropy in nats a token."""
        return self.language.loss(model, batch.tokens, batch.targets)

    def score(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Number of tokens predicted correctly, and the sum of their losses."""
        logits = self.language.logits(model, batch.tokens).float().flatten(0, 1)
        targets = batch.targets.flatten()
        correct = (logits.argmax(1) == targets).sum()
        return correct, F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    def outcome(self, config: TrainConfig, core: nn.Module, history: History) -> dict[str, Any]:
        """What a run has to say of text.

        Returns:
            `perplexity`, the exponential of the test loss; `tokens_per_second` of a median step; `sample`, what
            the model writes after the first words of the test text.
        """
        loss = history.evaluations[-1].loss
        seconds = history.median_step_seconds()
        return {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "tokens_per_second": config.batch_size * self.context / seconds,
            "sample": self._sample(config, core) if math.isfinite(loss) else "",
        }

    def keep(self, out: Path) -> None:
        """Write the tokenizer beside the results."""
        self.tokenizer.save(out)

    def keep_model(self, core: nn.Module, out: Path) -> None:
        """Write the model in the form of its own library, where it has one."""
        self.language.keep(core, self.tokenizer, out)

    def limited(self, limit: int | None) -> TextData:
        """The same data with the first `limit` tokens of the train text.

        Raises:
            TrainError: there are fewer tokens than that, or too few for one row.
        """
        if limit is None:
            return self
        if not 1 <= limit <= len(self.train_tokens):
            raise TrainError(
                f"the limit on training tokens must be in 1..{len(self.train_tokens)}, got {limit}"
            )
        return replace(self, train_tokens=self.train_tokens[:limit].clone())

    def _sample(self, config: TrainConfig, core: nn.Module) -> str:
        device = next(core.parameters()).device
        prompt = self.test_tokens[None, : min(PROMPT, self.context)].long().to(device)
        generator = torch.Generator(device).manual_seed(stream(config.seed, SAMPLE).initial_seed())
        count = min(SAMPLE_TOKENS, 4 * self.context)
        found = continuation(self.language, core, prompt, count, self.context, generator)
        return self.tokenizer.decode(found[0].tolist())


class TextBatches:
    """The batches that one process sees.

    Raises:
        TrainError: the batch is larger than the data, or cannot be shared out evenly.
    """

    def __init__(
        self, data: TextData, config: TrainConfig, device: torch.device, rank: int, world: int
    ):
        self.config, self.device, self.context = config, device, data.context
        self._shares = Shares(config, data.num_train, "rows of train text", rank, world)
        self.steps_per_epoch = self._shares.steps_per_epoch
        self._train, self._test = data.train_tokens.to(device), data.test_tokens.to(device)
        self._eval_rows = max(1, EVAL_LOGITS // (data.context * data.tokenizer.size))
        self._slack = len(data.train_tokens) - data.num_train * data.context

    def train(self, epoch: int, first_step: int = 0) -> Iterator[list[TokenBatch]]:
        """The optimizer steps of an epoch, each a list of this process's micro-batches."""
        generator = stream(self.config.seed, OFFSET, epoch)
        offset = int(torch.randint(self._slack, (1,), generator=generator))
        starts = offset + self.context * self._shares.order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            rows = self._shares.of_step(starts, step)
            yield [self._batch(rows[part]) for part in self._shares.parts()]

    def test(self) -> Iterator[TokenBatch]:
        """This process's share of the test text, in order; the last row is filled up with what does not count."""
        count = -(-(len(self._test) - 1) // self.context)
        padded = F.pad(self._test.long(), (0, count * self.context + 1 - len(self._test)), value=-1)
        tokens = padded[:-1].view(count, self.context).clamp(min=0)
        targets = padded[1:].view(count, self.context)
        targets = targets.where(targets >= 0, IGNORED)
        for rows in self._shares.of_test(count, self._eval_rows):
            rows = rows.to(self.device)
            yield TokenBatch(tokens[rows], targets[rows])

    def _batch(self, starts: Tensor) -> TokenBatch:
        places = starts[:, None] + torch.arange(self.context + 1)
        tokens = self._train[places.to(self.device)].long()
        return TokenBatch(tokens[:, :-1], tokens[:, 1:])


def load_text(options: Mapping[str, Any], stored: Path | None = None) -> TextData:
    """The text that a run's options name, as tokens.

    Args:
        options: fields of `TrainConfig`.
        stored: the folder of an earlier run, whose tokenizer is used again if there is one.

    Raises:
        TrainError: no such text or tokenizer, an empty or a binary file, or less text than one row.
    """
    if "data" not in options:
        raise TrainError(
            f"model {options['model']} needs --data: a text file, a folder of them, or a dataset with a "
            "text column"
        )
    context = options.get("model_options", {}).get("context", CONTEXT)
    if context < 1:
        raise TrainError(f"context must be positive, got {context}")
    texts = read_texts(options["data"])
    language = language_of(options["model"])
    if stored is not None and (stored / FILE).is_file():
        tokenizer: Tokenizer = read(str(stored / FILE))
    else:
        spec = options.get("tokenizer") or language.default_tokenizer()
        tokenizer = tokenizer_of(spec, texts.train)
    return TextData(
        options["data"],
        tokenizer.encode(texts.train),
        tokenizer.encode(texts.test),
        tokenizer,
        context,
        texts.test_split,
        language,
    ).limited(options.get("limit_train"))
