"""What every suite is told: the checked keys of the command, the device, how often to measure."""

from dataclasses import dataclass
from pathlib import Path

import torch

from normbench.config import Composer, Config, Values
from normbench.sweep import quoted


@dataclass(frozen=True)
class Bench:
    """One command.

    Args:
        values: the command's keys, checked.
        device: what it measures on.
        sessions: composes what `normbench.train` would run.
    """

    values: Values
    device: torch.device
    sessions: Composer

    @property
    def quick(self) -> bool:
        """Whether only to show that everything runs: small, few rounds."""
        return bool(self.values["quick"])

    @property
    def rounds(self) -> int:
        """Turns of sides that are measured in this process."""
        return 3 if self.quick else int(self.values["rounds"])

    @property
    def process_rounds(self) -> int:
        """Turns of sides that are whole processes."""
        return 1 if self.quick else int(self.values["process_rounds"])

    @property
    def sample_s(self) -> float:
        """How long one sample lasts at least, by repeating what is quicker."""
        return 0.002 if self.quick else 0.03

    @property
    def words(self) -> tuple[str, ...]:
        """What every command is told that a suite starts."""
        threads = self.values["threads"] or "null"
        data_dir = quoted(Path(self.values["data_dir"]))
        return f"device={self.values['device']}", f"data_dir={data_dir}", f"threads={threads}"

    def of(self, suite: str) -> Values:
        """The keys of one suite."""
        own: Values = self.values[suite]
        return own

    def session(self, overrides: list[str]) -> Config:
        """One session's config; Refused as `normbench.train` would."""
        values, choices = self.sessions.compose(overrides)
        return Config.of(values, choices)
