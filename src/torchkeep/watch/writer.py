"""A stand-in for ``torch.utils.tensorboard.SummaryWriter``: its names, over a record that nothing is lost from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .monitor import Monitor


class SummaryWriter:
    """Takes the calls of TensorBoard's own writer; ``monitor`` has the rest.

    >>> writer = tk.SummaryWriter("runs/mine")
    >>> writer.add_scalar("train/loss", loss, step)
    ``purge_step`` is the step that a resumed run goes on from. A step that is left out is the last one.
    """

    def __init__(self, log_dir: str | Path | None = None, comment: str = "", purge_step: int | None = None, **_: Any):
        place = Path(log_dir) if log_dir is not None else Path("runs") / (time.strftime("%b%d_%H-%M-%S") + comment)
        self.monitor = Monitor(place, from_step=purge_step)
        self.log_dir = str(place)
        self._step = 0

    def _at(self, step: int | None) -> int:
        self._step = self._step if step is None else int(step)
        return self._step

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None, *_: Any, **__: Any) -> None:
        self.monitor.log(self._at(global_step), **{tag: scalar_value})

    def add_scalars(self, main_tag: str, tag_scalar_dict: Mapping[str, Any], global_step: int | None = None) -> None:
        """All in one record, each under "MAIN/NAME": one run with several curves, where TensorBoard makes runs."""
        values = {f"{main_tag}/{tag}": value for tag, value in tag_scalar_dict.items()}
        self.monitor.log(self._at(global_step), **values)

    def add_histogram(self, tag: str, values: Any, global_step: int | None = None, *_: Any, **__: Any) -> None:
        self.monitor.histogram(self._at(global_step), tag, values)

    def add_image(self, tag: str, img_tensor: Any, global_step: int | None = None, *_: Any, **__: Any) -> None:
        self.monitor.image(self._at(global_step), tag, img_tensor)

    def add_images(self, tag: str, img_tensor: Any, global_step: int | None = None, *_: Any, **__: Any) -> None:
        self.monitor.image(self._at(global_step), tag, img_tensor)

    def add_figure(self, tag: str, figure: Any, global_step: int | None = None, close: bool = True) -> None:
        self.monitor.figure(self._at(global_step), tag, figure)
        if close:
            import matplotlib.pyplot

            matplotlib.pyplot.close(figure)

    def add_text(self, tag: str, text_string: str, global_step: int | None = None, *_: Any) -> None:
        self.monitor.text(self._at(global_step), tag, text_string)

    def add_audio(
        self, tag: str, snd_tensor: Any, global_step: int | None = None, sample_rate: int = 44100, *_: Any
    ) -> None:
        self.monitor.audio(self._at(global_step), tag, snd_tensor, sample_rate)

    def add_graph(self, model: Any, input_to_model: Any = None, *_: Any, **__: Any) -> None:
        self.monitor.graph(model, input_to_model)

    def add_pr_curve(
        self, tag: str, labels: Any, predictions: Any, global_step: int | None = None, *_: Any, **__: Any
    ) -> None:
        self.monitor.pr_curve(self._at(global_step), tag, labels, predictions)

    def add_mesh(
        self, tag: str, vertices: Any, colors: Any = None, faces: Any = None, config_dict: Any = None,
        global_step: int | None = None, *_: Any,
    ) -> None:  # fmt: skip
        self.monitor.mesh(self._at(global_step), tag, vertices, faces, colors)

    def add_hparams(self, hparam_dict: Mapping[str, Any], metric_dict: Mapping[str, Any], *_: Any, **__: Any) -> None:
        """Settings and results of this run itself; TensorBoard's writer makes another run for them."""
        self.monitor.config(hparam_dict)
        self.monitor.log(self._step, **metric_dict)

    def flush(self) -> None:
        self.monitor.flush()

    def close(self) -> None:
        self.monitor.close()

    def __enter__(self) -> SummaryWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
