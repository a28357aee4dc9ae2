"""Text to whole numbers and back: bytes, a tokenizer from a file or the hub, or byte pairs learnt from data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from backsketch.files import write_whole
from backsketch.train.errors import TrainError

__all__ = ["BYTES", "FILE", "Bytes", "Subwords", "Tokenizer", "read", "tokenizer_of"]

BYTES = "bytes"
BPE = "bpe:"
FILE = "tokenizer.json"
PIECE = 2**20  # characters that are encoded at a time
MERGED = 300  # a smaller vocabulary of byte pairs would hardly have a pair


class Tokenizer(Protocol):
    """A reversible code.

    Attributes:
        size: how many different tokens there are.
        identity: the same for equal codes, and for those only.
    """

    @property
    def size(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def encode(self, text: str) -> Tensor:
        """`(tokens,)` int32."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; what is no text becomes U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write what `read` needs into a folder."""


class Bytes:
    """The 256 bytes of UTF-8."""

    size = 256
    identity = BYTES

    def encode(self, text: str) -> Tensor:
        found = np.frombuffer(text.encode(), dtype=np.uint8)
        return torch.from_numpy(found.astype(np.int32))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < self.size).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """There is nothing to write, and what an earlier run wrote would mislead."""
        (folder / FILE).unlink(missing_ok=True)


class Subwords:
    """A tokenizer of the `tokenizers` library, without its special tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._json = tokenizer.to_str()

    @property
    def size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @property
    def identity(self) -> str:
        return hashlib.sha256(self._json.encode()).hexdigest()[:16]

    def encode(self, text: str) -> Tensor:
        found = [
            np.asarray(self._tokenizer.encode(piece, add_special_tokens=False).ids, dtype=np.int32)
            for piece in _pieces(text)
        ]
        return torch.from_numpy(np.concatenate(found)) if found else torch.empty(0).int()

    def decode(self, tokens: Sequence[int]) -> str:
        known = [t for t in tokens if t < self.size]
        return str(self._tokenizer.decode(known, skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        write_whole(folder / FILE, self._json.encode())


def tokenizer_of(spec: str, text: str) -> Tokenizer:
    """The tokenizer of a run.

    Args:
        spec: `"bytes"`, `"bpe:4096"` for byte pairs learnt from `text`, or a file or hub name.
        text: of the train split.

    Raises:
        TrainError: no such tokenizer.
    """
    if spec == BYTES:
        return Bytes()
    return _byte_pairs(spec, text) if spec.startswith(BPE) else read(spec)


def read(name: str) -> Subwords:
    """A tokenizer from a file, from a folder that holds one, or from the hub.

    Raises:
        TrainError: there is none, or it cannot be read.
    """
    library = _library()
    path = Path(name).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        if path.is_file():
            return Subwords(library.Tokenizer.from_file(str(path)))
        if name.count("/") < 2 and path.suffix != ".json" and not path.is_absolute():
            return Subwords(library.Tokenizer.from_pretrained(name))
    except Exception as error:  # the library raises bare exceptions
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainError(f"cannot read the tokenizer {name}: {told}") from error
    raise TrainError(f"there is no tokenizer file {name}; say bytes, or bpe:4096 to learn one")


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise TrainError(
            "tokenizers other than bytes need the package tokenizers: pip install 'backsketch[text]'"
        ) from error
    return tokenizers


def _byte_pairs(spec: str, text: str) -> Subwords:
    """Byte-pair merges on bytes (Sennrich et al. 2016): every text has a code, and only one text has it."""
    count = spec.removeprefix(BPE)
    if not count.isdigit() or int(count) < MERGED:
        raise TrainError(
            f"the tokenizer {spec} must name a vocabulary of at least {MERGED}, as bpe:4096"
        )
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=int(count),
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(text), trainer)
    return Subwords(tokenizer)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end at a line's end, if there is one."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end
