"""Reading text: files, folders of them, and datasets with a text column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backsketch.train.errors import TrainError
from backsketch.train.load import TEST_SPLITS, load_splits

if TYPE_CHECKING:
    import datasets as hf

__all__ = ["Texts", "read_texts"]

HELD_OUT = 0.1  # of the characters, at the end
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
SUFFIXES = (".txt", ".text")
COLUMNS = ("text", "content")  # preferred where there are several


@dataclass(frozen=True)
class Texts:
    """Two texts, and where the second comes from."""

    train: str
    test: str
    test_split: str


def read_texts(name: str) -> Texts:
    """Read the text of a language model.

    A text file, or a folder of text files in the order of their names; any other file, folder or hub name is
    for `datasets.load_dataset`, as `NAME` or `NAME:CONFIGURATION`, and its text column is found by feature
    type. Documents are joined by line ends. The test split is the dataset's own, in a folder the files named
    so, else the last 10 % of the text.

    Raises:
        TrainError: nothing there, no text, or bytes that are no text.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() not in TABLES:
        return _divided(name, {"train": _decoded(path)})
    if path.is_dir() and (files := _text_files(path)):
        return _divided(name, _by_split(files))
    if path.suffix.lower() in (*SUFFIXES, *TABLES) and not path.exists():
        raise TrainError(f"there is no file {name}")
    return _divided(name, _from_dataset(name, path))


def _text_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _by_split(files: Iterable[Path]) -> dict[str, str]:
    """A file called `test.txt` or in a folder `test` belongs to that split, all others to the train split."""
    found: dict[str, list[str]] = {}
    for path in files:
        names = [path.stem.lower(), path.parent.name.lower()]
        split = next((s for s in TEST_SPLITS if s in names), "train")
        found.setdefault(split, []).append(_decoded(path))
    return {split: _joined(texts) for split, texts in found.items()}


def _decoded(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainError(f"{path} is not text in UTF-8: {error.reason} at {error.start}") from error
    except OSError as error:
        raise TrainError(f"cannot read {path}: {(error.strerror or '').lower()}") from error
    if "\0" in text:
        raise TrainError(f"{path} is not text: it holds a zero byte")
    return text.replace("\r\n", "\n")


def _from_dataset(name: str, path: Path) -> dict[str, str]:
    if path.is_file():
        splits = load_splits(TABLES[path.suffix.lower()], files=str(path), called=name)
    else:
        source, _, configuration = (name, "", "") if path.exists() else name.partition(":")
        splits = load_splits(source, configuration=configuration or None)
    return {split: _column(name, data) for split, data in splits.items()}


def _column(name: str, split: hf.Dataset) -> str:
    """The text column of a split, all rows of it joined."""
    strings = [
        column
        for column, feature in split.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if not strings:
        has = ", ".join(split.column_names)
        raise TrainError(f"the dataset {name} has no text: its columns are {has}")
    column = next((c for c in COLUMNS if c in strings), strings[0])
    return _joined(text or "" for text in split[column])


def _joined(texts: Iterable[str]) -> str:
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)


def _divided(name: str, splits: Mapping[str, str]) -> Texts:
    """Train and test text, the test text held out by position where there is no split for it."""
    first = next(iter(splits), "train")
    train_name = "train" if "train" in splits else first
    train = splits.get(train_name, "")
    if not train.strip():
        raise TrainError(f"the text {name} is empty")
    for split in TEST_SPLITS:
        if split != train_name and splits.get(split, "").strip():
            return Texts(train, splits[split], split)
    cut = len(train) - int(HELD_OUT * len(train))
    return Texts(train[:cut], train[cut:], f"held out, the last {HELD_OUT:.0%} of the text")
