"""What bench/feed.py measures: the feeds of torchkeep and of its peers, each made in a process of its own."""

from __future__ import annotations

import itertools
import math
import os
import random
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from measure import ROOT
from works import Feed, LeftOut, by_workers, folder_samples, tree_pss_bytes

DATA = ROOT.parent / "shared" / "data"
HYMENOPTERA = DATA / "hymenoptera" / "train"
FASHION = DATA / "fashion-mnist" / "train-images-idx3-ubyte.gz"

AUGMENT = ["random_resized_crop", "horizontal_flip"]
SIZE, IMAGES_A_BATCH, ROWS_A_BATCH = 224, 32, 256
NUM_CORES, MANY_WORKERS = 2, 8
SAMPLES_AN_EPOCH = 2000
ROW_BYTES = 64
SEEKS, WARM_BATCHES = 9, 30
DATALOADER, DATALOADER_ALONE, INDEX_SELECT = "DataLoader", "DataLoader without workers", "expert: index_select"
CEILING = "decoding alone, 2 threads"

warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores are tried on purpose


# Images


def torchkeep_images(root: Path, size: int = SIZE, **options: Any) -> Any:
    import torchkeep as tk

    images = tk.ImageFolder(root, image_size=size, augment=AUGMENT)
    try:
        return tk.Loader(images, IMAGES_A_BATCH, shuffle=True, **options)
    except tk.TorchkeepError as error:  # a setting that this version does not have
        raise LeftOut(f"{error.where}, got {error.got}") from None


def images_torchkeep(folder: Path, **options: Any) -> dict[str, Feed]:
    loader = torchkeep_images(HYMENOPTERA, **options)
    return {f"{loader.plan.workers} {loader.plan.backend}": loader.__iter__}


def images_dataloader(folder: Path, numbers: tuple[int, ...]) -> dict[str, Feed]:
    return by_workers(Pictures(folder_samples(HYMENOPTERA)), IMAGES_A_BATCH, None, numbers)


class Pictures:
    """The Dataset that most people write: a list of (path, label), and Pillow."""

    def __init__(self, samples: list[tuple[str, int]], size: int = SIZE):
        self.samples, self.size = samples, size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import numpy as np
        from PIL import Image

        path, label = self.samples[index]
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        left, top, width, height = crop_box(*image.size)
        box = (left, top, left + width, top + height)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(image), label


def crop_box(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) by the rule of torchvision's RandomResizedCrop.get_params."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def images_expert(folder: Path) -> dict[str, Feed]:
    """Two threads, simplejpeg and OpenCV, batches written in place, four of them ahead."""
    import cv2
    import numpy as np
    import simplejpeg
    import torch

    cv2.setNumThreads(0)
    samples, pool = folder_samples(HYMENOPTERA), ThreadPoolExecutor(NUM_CORES)

    def read(places: list[int]) -> tuple[Any, Any]:
        images = np.empty((len(places), SIZE, SIZE, 3), np.uint8)
        for row, place in enumerate(places):
            image = simplejpeg.decode_jpeg(Path(samples[place][0]).read_bytes())
            left, top, width, height = crop_box(image.shape[1], image.shape[0])
            cut = cv2.resize(image[top : top + height, left : left + width], (SIZE, SIZE))
            images[row] = cut[:, ::-1] if random.random() < 0.5 else cut
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([samples[place][1] for place in places])

    def epoch() -> Iterator[tuple[Any, Any]]:
        order = torch.randperm(len(samples)).tolist()
        ahead: deque[Any] = deque()
        for i in range(0, len(order), IMAGES_A_BATCH):
            ahead.append(pool.submit(read, order[i : i + IMAGES_A_BATCH]))
            if len(ahead) > 4:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    return {"2 threads": epoch}


def images_decoded(folder: Path) -> dict[str, Feed]:
    """The ceiling: encoded files in memory, decoded and dropped."""
    import simplejpeg

    files = [Path(path).read_bytes() for path, _ in folder_samples(HYMENOPTERA)]
    pool = ThreadPoolExecutor(NUM_CORES)
    return {"2 threads": lambda: pool.map(lambda file: {"decoded": len(simplejpeg.decode_jpeg(file)) > 0}, files)}


def pictures_of(batch: Any) -> dict[str, float]:
    if "decoded" in batch:
        return {"units": int(batch["decoded"])}
    image, label = image_of(batch), label_of(batch)
    assert image.element_size() == 1
    return {
        "units": len(label),
        "labels": int(label.sum()),
        "pixels": image.numel(),
        "about brightness": float(image.float().mean()) * len(label),
    }


def image_of(batch: Any) -> Any:
    return batch["image"] if isinstance(batch, dict) else batch[0]


def label_of(batch: Any) -> Any:
    return batch["label"] if isinstance(batch, dict) else batch[1]


def decoded_differences(folder: Path) -> dict[str, float]:
    """How far the images that torchkeep decodes are from Pillow's, in grey levels."""
    import numpy as np
    from PIL import Image

    import torchkeep as tk

    images = tk.ImageFolder(HYMENOPTERA, image_size=SIZE)
    most, means = 0, list[float]()
    for index, (path, _) in enumerate(folder_samples(HYMENOPTERA)):
        with Image.open(path) as opened:
            theirs = np.asarray(opened.convert("RGB"), np.int16)
        apart = np.abs(images.decoded(index) - theirs)
        most = max(most, int(apart.max()))
        means.append(float(apart.mean()))
    return {"most": most, "mean": statistics.mean(means)}


# Rows in memory


def fashion() -> tuple[Any, Any]:
    """Shapes:  uint8 (60000, 1, 28, 28), int64 (60000,)"""
    import torch

    from torchkeep.data.images import read_idx

    images = torch.tensor(read_idx(FASHION)).unsqueeze(1)
    labels = read_idx(FASHION.with_name(FASHION.name.replace("images-idx3", "labels-idx1")))
    return images, torch.tensor(labels).long()


def memory_torchkeep(folder: Path) -> dict[str, Feed]:
    import torchkeep as tk

    images, labels = fashion()
    loader = tk.Loader(tk.Arrays(image=images, label=labels), ROWS_A_BATCH, shuffle=True)
    return {loader.plan.backend: loader.__iter__}


def memory_idx(folder: Path) -> dict[str, Feed]:
    import torchkeep as tk

    loader = tk.Loader(tk.IdxImages(FASHION), ROWS_A_BATCH, shuffle=True)
    return {loader.plan.backend: loader.__iter__}


def memory_expert(folder: Path) -> dict[str, Feed]:
    import torch

    columns = fashion()

    def epoch() -> Iterator[tuple[Any, Any]]:
        order = torch.randperm(len(columns[1]))
        for i in range(0, len(order), ROWS_A_BATCH):
            rows = order[i : i + ROWS_A_BATCH]
            yield torch.index_select(columns[0], 0, rows), torch.index_select(columns[1], 0, rows)

    return {"index_select": epoch}


def memory_dataloader(folder: Path) -> dict[str, Feed]:
    from torch.utils.data import TensorDataset

    return by_workers(TensorDataset(*fashion()), ROWS_A_BATCH, None, (0, 1, 2))


def rows_of(batch: Any) -> dict[str, float]:
    image, label = image_of(batch), label_of(batch)
    per_image = image.reshape(len(label), -1).long().sum(1)
    return {"units": len(label), "labels": int(label.sum()), "pixels × label": int((per_image * (label + 1)).sum())}


KINDS: dict[str, dict[str, Any]] = {
    "images": {
        "unit": "images/s",
        "content": pictures_of,
        "works": {
            "torchkeep": images_torchkeep,
            "torchkeep again (A/A)": images_torchkeep,
            "torchkeep, cache in memory": partial(images_torchkeep, cache="ram"),
            "torchkeep, processes": partial(images_torchkeep, workers=NUM_CORES, backend="processes"),
            "torchkeep, threaded process": partial(images_torchkeep, workers=NUM_CORES, backend="threaded_process"),
            DATALOADER: partial(images_dataloader, numbers=(1, 2, 4)),
            DATALOADER_ALONE: partial(images_dataloader, numbers=(0,)),
            "expert: simplejpeg, OpenCV, threads": images_expert,
            CEILING: images_decoded,
        },
    },
    "memory": {
        "unit": "rows/s",
        "content": rows_of,
        "works": {
            "torchkeep": memory_torchkeep,
            "torchkeep again (A/A)": memory_torchkeep,
            "torchkeep, the idx file": memory_idx,
            DATALOADER: memory_dataloader,
            INDEX_SELECT: memory_expert,
        },
    },
}


# The first batch of many files


def make_files(folder: Path, encoded: list[bytes], count: int) -> None:
    """folder/files: classes of 1,000 images each, hard links to a few files. They are listed, and the listing saved."""
    for number, data in enumerate(encoded):
        (folder / f"{number}.jpg").write_bytes(data)
    for number in range(count):
        path = folder / "files" / f"class_{number // 1000:05d}" / f"img_{number:08d}.jpg"
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        os.link(folder / f"{number % len(encoded)}.jpg", path)
    time.sleep(2.5)  # the listing of a folder that has just changed is not saved


def listed_s(folder: Path) -> dict[str, float]:
    import torchkeep as tk

    began = time.perf_counter()
    assert len(tk.ImageFolder(folder / "files", image_size=SIZE))
    return {"s": time.perf_counter() - began}


def first_torchkeep(folder: Path) -> dict[str, float]:
    import torchkeep as tk

    assert {tk.ImageFolder, tk.Loader}  # imported at their first use
    began = time.perf_counter()
    loader = torchkeep_images(folder / "files", workers=NUM_CORES, backend="threads")
    return first_of(iter(loader), began)


def first_dataloader(folder: Path) -> dict[str, float]:
    import numpy  # noqa: F401
    import torch.utils.data  # noqa: F401
    from PIL import Image  # noqa: F401

    began = time.perf_counter()
    pictures = Pictures(folder_samples(folder / "files"))
    return first_of(by_workers(pictures, IMAGES_A_BATCH, None, (NUM_CORES,))[f"{NUM_CORES} workers"](), began)


def first_of(batches: Iterator[Any], began: float) -> dict[str, float]:
    batch = next(batches)
    took_s = time.perf_counter() - began
    assert len(image_of(batch)) == IMAGES_A_BATCH
    return {"s": took_s}


# Memory over epochs


def epochs_torchkeep(backend: str, epochs: int, folder: Path) -> dict[str, Any]:
    loader = torchkeep_images(folder / "files", 32, workers=MANY_WORKERS, backend=backend)
    assert loader.plan.backend == backend, loader.plan.reason
    return memory_over(loader.__iter__, epochs)


def epochs_dataloader(workers: int, epochs: int, folder: Path) -> dict[str, Any]:
    pictures = Pictures(folder_samples(folder / "files"), 32)
    return memory_over(by_workers(pictures, IMAGES_A_BATCH, None, (workers,))[f"{workers} workers"], epochs)


def memory_over(feed: Feed, epochs: int) -> dict[str, Any]:
    """Memory of the whole tree at the end of each epoch, all of the index held and a few of its samples read."""
    found = []
    for _ in range(epochs):
        for number, _batch in enumerate(feed(), 1):
            if number * IMAGES_A_BATCH >= SAMPLES_AN_EPOCH:
                break
        found.append(tree_pss_bytes()["all"])
    return {"pss_bytes": found, "growth_bytes": found[-1] - found[2]}


def small_files() -> list[bytes]:
    """Photos of 64 × 48 pixels: what is read costs little beside what is held."""
    import cv2
    import simplejpeg

    images = [simplejpeg.decode_jpeg(Path(path).read_bytes()) for path, _ in folder_samples(HYMENOPTERA)[::4]]
    return [simplejpeg.encode_jpeg(cv2.resize(image, (64, 48)), 90) for image in images]


# Growth


def make_rows(count: int, folder: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(folder / "row.npy", "w+", np.uint8, (count, ROW_BYTES))
    for start in range(0, count, 1 << 18):
        stop = min(count, start + (1 << 18))
        rows[start:stop] = rng.integers(0, 256, (stop - start, ROW_BYTES), np.uint8)
    rows.flush()
    np.save(folder / "label.npy", np.arange(count, dtype=np.int64) % 10)


def mapped_rows(folder: Path) -> dict[str, Any]:
    import numpy as np

    return {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("row", "label")}


def growth_torchkeep(seconds: float, folder: Path) -> dict[str, float]:
    import torchkeep as tk

    assert {tk.Arrays, tk.Loader}  # imported at their first use

    def opened() -> Any:
        return tk.Loader(tk.Arrays(**mapped_rows(folder)), ROWS_A_BATCH, shuffle=True)

    return fed(lambda: opened().__iter__, seconds) | seeks(opened())


def growth_dataloader(seconds: float, folder: Path) -> dict[str, float]:
    import torch
    from torch.utils.data import TensorDataset

    def opened() -> Feed:
        columns = [torch.from_numpy(column) for column in mapped_rows(folder).values()]
        return by_workers(TensorDataset(*columns), ROWS_A_BATCH, None, (0,))["0 workers"]

    return fed(opened, seconds)


def fed(opened: Callable[[], Feed], seconds: float) -> dict[str, float]:
    """The first batch, samples a second from then on over epochs or a part of one, and memory that is no file."""
    before = tree_pss_bytes()["anon"]
    began = time.perf_counter()
    feed = opened()
    batches = iter(feed())
    next(batches)
    first_s = time.perf_counter() - began
    for _ in itertools.islice(batches, WARM_BATCHES):  # a list of 1e7 positions is new to the garbage collector
        pass
    began, num_samples = time.perf_counter(), 0
    while (took_s := time.perf_counter() - began) < seconds:
        batch = next(batches, None)
        if batch is None:
            batches = iter(feed())
            continue
        num_samples += len(label_of(batch))
    held = tree_pss_bytes()["anon"]
    return {"first_s": first_s, "samples_s": num_samples / took_s, "memory_bytes": held - before}


def seeks(loader: Any) -> dict[str, float]:
    """To nine tenths of an epoch: the state and the iterator, the order alone, and the batch that comes then."""
    from torchkeep.chance import ChanceKey
    from torchkeep.data.order import shuffled_order

    state = loader.state_dict() | {"delivered": len(loader) * 9 // 10}
    start = state["delivered"] * ROWS_A_BATCH
    rows = []
    for epoch in range(SEEKS):
        marks = [time.perf_counter()]
        loader.load_state_dict(state | {"epoch": epoch})
        batches = iter(loader)
        marks.append(time.perf_counter())
        ids = shuffled_order(ChanceKey(0, epoch), loader.num_samples)(start, start + ROWS_A_BATCH)
        marks.append(time.perf_counter())
        batch = next(batches)
        marks.append(time.perf_counter())
        assert batch["index"].tolist() == ids.tolist()
        batches.close()
        rows.append([after - before for before, after in itertools.pairwise(marks)])
    state_s, order_s, batch_s = (statistics.median(values) for values in zip(*rows, strict=True))
    return {"seek_state_s": state_s, "seek_order_s": order_s, "seek_batch_s": batch_s}
