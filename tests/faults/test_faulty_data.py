"""Datasets with something wrong inside: the row and the reason are named, and nothing is written."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("typer")
from PIL import Image  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from backsketch import cli  # noqa: E402
from backsketch.train import TrainError, load_data  # noqa: E402

CLASSES = datasets.ClassLabel(names=["a", "b", "c"])

pytestmark = pytest.mark.usefixtures("own_cache")


def image(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(picture: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def parquet(root: Path, labels, feature=CLASSES, split: str = "train", images=None) -> str:
    """A split of coloured noise with labels that nothing checks when they are written."""
    root.mkdir(exist_ok=True)
    images = images or [encoded(image(i)) for i in range(len(labels))]
    columns = {"image": [{"bytes": b, "path": None} for b in images], "label": labels}
    raw = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(columns, features=raw).data.table
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return str(root)


def bomb() -> bytes:
    """A PNG of a few bytes that claims to be 30,000 pixels square."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", head), (b"IDAT", pixels), (b"IEND", b""))
    )


def corrupt(root: Path) -> str:
    folder = parquet(root, [0, 1, 2, 0])
    (path,) = root.glob("*.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = b"\xff" * (
        len(content) // 2 - len(content) // 3
    )
    path.write_bytes(content)
    return folder


def truncated(root: Path) -> str:
    folder = parquet(root, [0, 1, 2, 0])
    (path,) = root.glob("*.parquet")
    path.write_bytes(path.read_bytes()[:200])
    return folder


def not_finite(root: Path) -> str:
    pixels = np.full((6, 5), 0.5, np.float32)
    pixels[2, 3] = np.nan
    bad = encoded(Image.fromarray(pixels), "tiff")
    return parquet(root, [0, 1, 2], images=[encoded(image(0)), bad, encoded(image(2))])


def with_bomb(root: Path) -> str:
    return parquet(root, [0, 1, 2], images=[encoded(image(0)), encoded(image(1)), bomb()])


def single_class(root: Path) -> str:
    (root / "train" / "cat").mkdir(parents=True)
    for i in range(3):
        image(i).save(root / "train" / "cat" / f"{i}.png")
    return str(root)


def no_image(root: Path) -> str:
    root.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": CLASSES})
    rows = {"image": [image(0), None, image(2)], "label": [0, 1, 2]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(root / "train-00000-of-00001.parquet")
    return str(root)


def in_the_test_split(root: Path) -> str:
    parquet(root, [0, 1, 2])
    return parquet(root, [0, 1, 5], split="test")


FAULTS = {
    "corrupt parquet": (corrupt, "could not read the dataset"),
    "truncated parquet": (truncated, "could not read the dataset"),
    "NaN in an image": (not_finite, "image 1 of .* it holds values that are not finite"),
    "a decompression bomb": (with_bomb, "image 2 of .* decompression bomb"),
    "a row without an image": (no_image, "image 1 of .* there is none"),
    "one class": (single_class, r"fewer than two classes \(the subfolder 'cat' alone\)"),
    "label null": (lambda root: parquet(root, [0, None, 1]), "row 1 of the train split has none"),
    "label negative": (lambda root: parquet(root, [0, 1, -1]), "row 2 .* negative label -1"),
    "label out of range": (
        lambda root: parquet(root, [0, 3, 1]),
        "row 1 of the train split has the label 3, of 3 classes",
    ),
    "test label out of range": (in_the_test_split, "row 2 of the split test .* 1 of its 3 rows"),
    "all alike": (
        lambda root: parquet(root, [4, 4, 4], datasets.Value("int64")),
        "fewer than two classes",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_in_one_sentence(tmp_path, fault):
    make, message = FAULTS[fault]
    with pytest.raises(TrainError, match=message) as caught:
        load_data(make(tmp_path / "data"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["corrupt parquet", "label out of range", "a decompression bomb"])
def test_the_command_ends_with_two_and_earlier_results_stay(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/checkpoint.pt").write_bytes(b"a day of work")
    folder = FAULTS[fault][0](tmp_path / "data")
    done = CliRunner().invoke(cli.make_app(), ["train", "--data", folder, "--out", "out"])
    assert done.exit_code == 2, done.output
    assert "error:" in done.output
    assert "Traceback" not in done.output
    assert [p.name for p in Path("out").iterdir()] == ["checkpoint.pt"]


def test_withheld_test_labels_are_no_fault(tmp_path):
    parquet(tmp_path / "d", [0, 1, 2, 0])
    parquet(tmp_path / "d", [-1, -1, -1], split="test")
    assert load_data(str(tmp_path / "d")).test_split.startswith("held out")
