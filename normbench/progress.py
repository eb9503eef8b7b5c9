"""What a person sees while a session trains: a bar on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from normbench.doors import say
from normbench.results import EpochRow


class SessionProgress:
    """Progress of a session or pack: `step` at every update, `row` at every row; `quiet` hides it."""

    def __init__(self, title: str, total_steps: int, quiet: bool = False) -> None:
        self.title, self.total_steps, self.quiet = title, total_steps, quiet
        self.console = Console(file=sys.stdout, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.losses = ""
        self.images, self.shown_at = 0, time.perf_counter()
        self.task = self.bar.add_task(title, total=total_steps, state="")

    def __enter__(self) -> "SessionProgress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def skip(self, steps: int) -> None:
        """So many steps were done before."""
        self.bar.advance(self.task, steps)
        if self.quiet:
            return
        say(f"{self.title}: goes on from step {steps}/{self.total_steps}")

    def step(self, images: int) -> None:
        """One update is done, on so many images; costs a counter, and the bar's text twice a second."""
        if self.bar.disable:
            return
        self.images += images
        self.bar.advance(self.task)
        now = time.perf_counter()
        if now - self.shown_at > 0.5:
            rate = self.images / (now - self.shown_at)
            self.bar.update(self.task, state=f"{self.losses}  {rate:,.0f} images/s")
            self.images, self.shown_at = 0, now

    def row(self, row: EpochRow, title: str) -> None:
        """A row of the session `title` has landed: the bar shows it, a log gets a line."""
        test = "" if row.test_acc is None else f"  test {row.test_acc:.4f}"
        val = "" if row.val_acc is None else f"  val {row.val_acc:.4f}"
        self.losses = f"loss {row.train_loss:.4f}  train {row.train_acc:.4f}{val}{test}"
        if not self.console.is_terminal and not self.quiet:
            at = f"{title}  epoch {row.epoch}  step {row.step}/{self.total_steps}"
            rate = "" if row.images_per_s is None else f"  {row.images_per_s:,.0f} images/s"
            say(f"{at}  {self.losses}{rate}")
