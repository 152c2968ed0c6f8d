"""Make train.parquet, valid.parquet and test.parquet from the digits that scikit-learn carries.

Run once, by whoever wants to make the files again; scikit-learn is needed here and nowhere else:

    pip install scikit-learn && python examples/digits/make_data.py

Pixels:  0..16 becomes uint8 0..255 by round(v * 255 / 16), stored as 8 × 8 grey PNG
Split:   within each class, in file order, counted from 0: n % 10 == 4 → valid, n % 10 == 9 → test, else train
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

HERE = Path(__file__).parent
SPLITS = ("train", "valid", "test")
NUM_CLASSES = 10


def load_pixels() -> tuple[np.ndarray, np.ndarray]:
    """The whole set in file order.

    Shapes:  (N, 8, 8) uint8, (N,) int64
    """
    digits = load_digits()
    return np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target.astype(np.int64)


def split_of(n: int) -> str:
    """Where the n-th sample of its class belongs: every fifth is held out, alternately valid and test."""
    return {4: "valid", 9: "test"}.get(n % 10, "train")


def assign_splits(labels: np.ndarray) -> list[str]:
    seen: Counter[int] = Counter()
    assigned = []
    for label in labels.tolist():
        assigned.append(split_of(seen[label]))
        seen[label] += 1
    return assigned


def encode_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=9)
    return file.getvalue()


def write_split(name: str, images: np.ndarray, labels: np.ndarray) -> Path:
    """One file, one row group, no time and no schema of one library in it: the same bytes from the same versions."""
    table = pa.table(
        {"image": pa.array([encode_png(image) for image in images], pa.binary()), "label": pa.array(labels, pa.int64())}
    )
    path = HERE / f"{name}.parquet"
    pq.write_table(
        table, path, compression="zstd", compression_level=19, use_dictionary=False, store_schema=False, version="2.6"
    )
    return path


def main() -> None:
    images, labels = load_pixels()
    assigned = np.array(assign_splits(labels))
    for name in SPLITS:
        chosen = assigned == name
        path = write_split(name, images[chosen], labels[chosen])
        counts = np.bincount(labels[chosen], minlength=NUM_CLASSES).tolist()
        identity = hashlib.sha256(images[chosen].tobytes() + labels[chosen].astype("<i8").tobytes()).hexdigest()
        print(f"{name:<6} {chosen.sum():>5}  {counts}  {path.stat().st_size} bytes  pixels+labels sha256 {identity}")


if __name__ == "__main__":
    main()
