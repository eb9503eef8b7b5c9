"""What a person chooses before looking: the options that `stats` and `report` share, and their analysis."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from normbench.values import Refused, nearest

if TYPE_CHECKING:
    from normbench.stats.analysis import Analysis
    from normbench.stats.comparison import Margin


def add_choices(made: argparse.ArgumentParser) -> None:
    """Add the options to a door's."""
    add = made.add_argument
    add(
        "--baseline",
        metavar="ARM",
        help="the arm to compare with (default: obn, torch_bn or bn where there is one, else the first)",
    )
    add(
        "--metric",
        action="append",
        metavar="NAME",
        help="a column of results.csv, or from epochs.csv best_acc, last_acc, auc_acc, time_to_acc=0.93, "
        "epochs_to_acc=0.93; repeatable (default: test_acc and epoch_time_s)",
    )
    add(
        "--margin",
        action="append",
        metavar="METRIC=X",
        help="equivalent within ±X, or ±X%% of the baseline's mean; repeatable",
    )
    add(
        "--alpha",
        type=float,
        default=0.05,
        help="error rate of all findings of one kind: differences, equivalences (default: 0.05)",
    )
    add("--power", type=float, default=0.8, help="for what could be found and is needed (default: 0.8)")
    add(
        "--by",
        action="append",
        metavar="COLUMN",
        help="compare within each value of dataset, batch_size, model …; repeatable",
    )
    add("--all", action="store_true", help="every row of a folder, not only the newest plan's")
    add("--test-images", type=int, metavar="N", help="size of the test set, where the inputs do not say it")
    add(
        "--look-every",
        type=int,
        metavar="N",
        help="you look after every N sessions: alpha is spent over looks",
    )
    add("--planned", type=int, metavar="N", help="sessions an arm planned from the start, with --look-every")
    add("--seed", type=int, default=0, help="of the bootstrap and of permutations (default: 0)")


def check_choices(arguments: argparse.Namespace) -> None:
    """Refuse what is out of range or does not go together."""
    for name, value in (("--alpha", arguments.alpha), ("--power", arguments.power)):
        if not 1e-6 <= value <= 0.999:
            raise Refused(f"{name} must lie between 0 and 1, got {value:g}")
    if arguments.power <= arguments.alpha:
        raise Refused(f"--power={arguments.power:g} must lie above --alpha={arguments.alpha:g}")
    if arguments.seed < 0:
        raise Refused(f"--seed must be an int ≥ 0, got {arguments.seed}")
    for name, number in (("--look-every", arguments.look_every), ("--planned", arguments.planned),
                         ("--test-images", arguments.test_images)):  # fmt: skip
        if number is not None and number < 1:
            raise Refused(f"{name} must be an int ≥ 1, got {number}")
    if (arguments.look_every is None) != (arguments.planned is None):
        raise Refused("--look-every and --planned go together: --look-every 5 --planned 30")


def analysis_of(inputs: Sequence[str], arguments: argparse.Namespace) -> "Analysis":
    """Read the inputs and compare every arm with its baseline, as the options say."""
    from normbench.stats.inputs import choose_metrics, read
    from normbench.stats.metrics import Metric

    asked = [Metric.of(text) for text in dict.fromkeys(arguments.metric)] if arguments.metric else None
    by = columns_of(arguments.by)
    sessions = read(inputs, asked, by, arguments.all)
    metrics = choose_metrics(sessions, asked)

    from normbench.stats.analysis import analyse  # these are dear, and what is read may be refused
    from normbench.stats.comparison import Options
    from normbench.stats.sequential import Looks

    looks = sessions.looks
    if arguments.look_every and looks:
        seen = f"{', '.join(map(str, looks.at))} of {looks.planned}"
        raise Refused(
            f"{inputs[0]} was looked at after {seen} sessions, which counts; leave --look-every out"
        )
    if arguments.look_every:
        most = int(sessions.rows["key"].value_counts().max())
        looks = Looks.every(arguments.look_every, arguments.planned, most)
    options = Options(
        arguments.alpha,
        arguments.power,
        margins_of(arguments.margin, [m.name for m in metrics]),
        looks,
        arguments.test_images,
        seed=arguments.seed,
    )
    return analyse(sessions, metrics, options, arguments.baseline, by)


def margins_of(texts: Sequence[str] | None, metrics: Sequence[str]) -> dict[str, "Margin"]:
    """`--margin` by metric."""
    from normbench.stats.comparison import Margin

    margins: dict[str, Margin] = {}
    for text in texts or []:
        name, sign, value = text.rpartition("=")
        if not sign:
            raise Refused(f"--margin {text}: name the metric, like {metrics[0]}={text}")
        if name not in metrics:
            hint = nearest(name, metrics)
            raise Refused(f"--margin {text}: {name!r} is not compared{hint}; there are {', '.join(metrics)}")
        if name in margins:
            raise Refused(f"--margin {text}: {name} has two margins")
        margins[name] = Margin.of(value, f"--margin {text}")
    return margins


def columns_of(texts: Sequence[str] | None) -> list[str]:
    """`--by a,b --by c` as a list."""
    return list(dict.fromkeys(column for text in texts or [] for column in text.split(",") if column))
