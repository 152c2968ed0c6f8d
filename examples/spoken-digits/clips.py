"""The free spoken digits: "7_jackson_32.wav" is the 33rd seven of one speaker. 0 to 4 are the customary test."""

from pathlib import Path

import pyarrow as pa

import torchkeep as tk

ROOT = Path(__file__).parent / "../../../shared/data/spoken-digits"
AUGMENT = ["random_speed", "random_crop", "random_noise", "spec_mask"]


def clips(split: str, like: tk.AudioTable | None = None) -> tk.AudioTable:
    rows = []
    for path in sorted(ROOT.glob("*.wav")):
        digit, speaker, number = path.stem.split("_")
        if (int(number) < 5) == (split == "test"):
            rows.append({"audio": path.name, "label": digit, "speaker": speaker})
    augment = AUGMENT if split == "train" else []
    return tk.AudioTable(pa.Table.from_pylist(rows), root=ROOT, seconds=1.0, num_mels=40, augment=augment, like=like)
