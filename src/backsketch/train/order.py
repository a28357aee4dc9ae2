"""Which rows a step sees, and what it draws: pure functions of the seed, the epoch and the step.

So a run that stops after any step continues with exactly the batches that it would have seen, and the number of
processes does not change what is in a batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from backsketch.train.config import TrainConfig
from backsketch.train.errors import TrainError

__all__ = ["AUGMENT", "DROPOUT", "OFFSET", "ORDER", "SAMPLE", "Shares", "stream"]

ORDER, AUGMENT, DROPOUT, OFFSET, SAMPLE = range(5)  # purposes that random streams are kept apart by
EVAL_BATCH = 512  # at most, and at most four times what a training step holds


def stream(seed: int, *keys: int) -> torch.Generator:
    """A CPU generator for one purpose; other keys give an unrelated stream."""
    state = np.random.SeedSequence([seed, *keys]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


class Shares:
    """How the rows of each step are divided between processes and micro-batches.

    Args:
        config: batch size, accumulation and seed.
        num_train: how many rows there are to train on.
        rows: what a row is, for messages.
        rank: this process.
        world: how many processes share each batch.

    Raises:
        TrainError: the batch is larger than the data, or cannot be shared out evenly.
    """

    def __init__(self, config: TrainConfig, num_train: int, rows: str, rank: int, world: int):
        shares = world * config.grad_accumulation
        if config.batch_size > num_train:
            raise TrainError(
                f"the batch of {config.batch_size} is larger than the {num_train} {rows}"
            )
        if config.batch_size % shares:
            raise TrainError(
                f"the batch of {config.batch_size} does not divide into {shares} equal parts "
                f"({world} processes, {config.grad_accumulation} accumulated micro-batches)"
            )
        self.config, self.rank, self.world = config, rank, world
        self.num_train = num_train
        self.steps_per_epoch = num_train // config.batch_size
        self.eval_batch = min(4 * config.batch_size // shares, EVAL_BATCH)

    def order(self, epoch: int) -> Tensor:
        """The rows in the order of an epoch, `(num_train,)`."""
        return torch.randperm(self.num_train, generator=stream(self.config.seed, ORDER, epoch))

    def of_step(self, order: Tensor, step: int) -> Tensor:
        """All rows of a step, over all processes, `(batch_size,)`."""
        size = self.config.batch_size
        return order[step * size : (step + 1) * size]

    def parts(self) -> list[slice]:
        """Which rows of a step are this process's, one slice per micro-batch."""
        size = self.config.batch_size // (self.world * self.config.grad_accumulation)
        starts = range(self.rank * size, self.config.batch_size, self.world * size)
        return [slice(start, start + size) for start in starts]

    def of_test(self, num_test: int, at_most: int = EVAL_BATCH) -> tuple[Tensor, ...]:
        """This process's rows of the test split, batch by batch."""
        rows = torch.arange(self.rank, num_test, self.world)
        return rows.split(min(self.eval_batch, at_most))
