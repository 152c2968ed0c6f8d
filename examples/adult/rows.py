"""The test rows of Adult, with the labels that the training rows have: ">50K." becomes ">50K"."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

import torchkeep as tk
from torchkeep.data.frames import Form, read_frame

TEST = Path(__file__).parent / "../../../shared/data/tabular/adult/adult.test"


def test(like: tk.Table) -> tk.Table:
    rows = read_frame(TEST, Form(is_csv=True))
    labels: pa.ChunkedArray = pc.utf8_rtrim(rows["Y"], characters=".")
    return tk.Table(rows.set_column(rows.column_names.index("Y"), "Y", labels), "Y", like=like)
