"""TensorBoard's side of a session: every number of epochs.csv against the step, traces, hyperparameters.

`tensorboard --logdir outputs/<study>` shows one run a session, `<setting>/s<session>/tb`, while it trains.
Where a session goes on from a checkpoint TensorBoard forgets what came after it.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from normbench.results import EpochRow, Row

NAMES = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "test_loss": "loss/test",
    "train_acc": "acc/train",
    "val_acc": "acc/val",
    "test_acc": "acc/test",
    "lr": "lr",
    "epoch_time_s": "time/epoch_s",
    "images_per_s": "time/images_per_s",
}
HYPERPARAMETERS = ("model", "norm", "stride", "lr", "batch_size")  # the tab shows five unasked
FINAL = ("test_acc", "test_loss", "epoch_time_s", "best_test_acc", "val_acc", "train_acc")


class Scalars:
    """Writes into `folder`; does nothing for None. A row is on disk when `write` returns.

    Args:
        step: what the session goes on from; 0 begins anew.
    """

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self.writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # dear to import, so only where wanted

            for old in folder.glob("events.*") if not step else ():
                old.unlink()
            self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def begin(self, row: Row) -> None:
        """The session's hyperparameters, for the HPARAMS tab: a line an arm, with its sessions' mean metrics.

        They have the same names in every session, and in one arm the same values.
        """
        if self.writer is None:
            return
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        # a norm without a stride says so: the tab's columns are those of its first session
        values = {name: "none" if row.get(name) is None else row[name] for name in HYPERPARAMETERS}
        values["stride"] = str(values["stride"])
        metrics = {f"final/{name}": 0.0 for name in FINAL}
        experiment, begun, _ = hparams(values, metrics)  # type: ignore[no-untyped-call]
        data = begun.value[0].metadata.plugin_data
        said = HParamsPluginData.FromString(data.content)
        said.session_start_info.group_name = str(row["setting"])
        data.content = said.SerializeToString()
        self.writer.file_writer.add_summary(experiment)
        self.writer.file_writer.add_summary(begun)
        self.writer.flush()

    def write(self, row: EpochRow) -> None:
        """Every finite number of the row."""
        if self.writer is None:
            return
        for column, tag in NAMES.items():
            value = getattr(row, column)
            if value is not None:
                self.add(tag, value, row.step)
        self.writer.flush()

    def add(self, tag: str, value: float, step: int) -> None:
        """One scalar; only a finite one can be drawn."""
        if self.writer is not None and math.isfinite(value):
            self.writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, values: np.ndarray[Any, Any], step: int) -> None:
        """The finite of some values (n,)."""
        if self.writer is None:
            return
        values = values[np.isfinite(values)]
        if values.size:
            self.writer.add_histogram(tag, values, step, bins=64)

    def end(self, row: Mapping[str, Any], step: int) -> None:
        """The numbers that the session reports, and that it has ended."""
        if self.writer is None:
            return
        from tensorboard.plugins.hparams.api_pb2 import Status
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        for name in FINAL:
            if row[name] is not None:
                self.add(f"final/{name}", row[name], step)
        *_, ended = hparams({}, {})  # type: ignore[no-untyped-call]
        data = ended.value[0].metadata.plugin_data
        said = HParamsPluginData.FromString(data.content)
        ended_as = "STATUS_SUCCESS" if row["status"] == "ok" else "STATUS_FAILURE"
        said.session_end_info.status = Status.Value(ended_as)
        said.session_end_info.end_time_secs = time.time()
        data.content = said.SerializeToString()
        self.writer.file_writer.add_summary(ended)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()
