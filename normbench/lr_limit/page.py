"""What people read of a search: the failure as defined, a table, a sentence for every arm; and limits.csv."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from normbench.config import norm_that_runs
from normbench.lr_limit.curve import LEVEL, Interval
from normbench.lr_limit.limits import LARGER, SMALLER, Ratio, Searched
from normbench.lr_limit.trial import LAST, Chance
from normbench.plan import Arm

ODDS_9 = math.log(9.0)  # from 10 to 90 % failure are 2 · log 9 scales of the logistic curve


def definition(chance: Chance) -> str:
    """When a session failed, in the numbers of this data set."""
    return (
        "a session fails at a rate if a loss is not finite, or its mean training loss over the last "
        f"1/{LAST} of the steps is not below {chance.loss:.4f} (guessing by the labels' frequencies), or its "
        f"{chance.part} accuracy is at most {chance.bound:.4f} (two standard errors over {chance.acc:.4f}, "
        f"the commonest class of {chance.images:,} images)"
    )


def matched(arms: Sequence[Arm], seed: int, sessions: int, keys: Sequence[str]) -> str:
    """What all arms share, and what differs between them."""
    values, choices = arms[0].values, arms[0].choices
    optim, schedule = values["optim"], values["optim"]["schedule"]["name"]
    unit = "steps" if values["steps"] else "epochs"
    length = f"{values[unit]} {unit if values[unit] > 1 else unit[:-1]}"
    shared = {  # by the keys that would end it
        ("model",): f"model={choices['model']}",
        ("dataset",): f"dataset={choices['dataset']}",
        ("steps", "epochs"): length,
        ("batch.size",): f"batches of {values['batch']['size']}",
        ("optim.name",): optim["name"],
        ("optim.schedule",): "a constant rate without warm-up" if schedule == "constant"
                             else f"{schedule}, whose peak is the rate",
        ("optim.weight_decay",): f"weight decay {optim['weight_decay']:g}",
    }  # fmt: skip
    said = [words for starts, words in shared.items() if not any(key.startswith(starts) for key in keys)]
    who = f"sessions 0 to {sessions - 1} of seed {seed} start from equal weights"
    if len(arms) == 1:
        return f"one arm: {', '.join(said)}; {who} and see equal batches at every rate"
    batches = "" if any(key.startswith("batch.size") for key in keys) else " and see equal batches"
    more = [key for key in keys if key.split(".")[0] != "norm"]
    beside = f", so their limits speak of {' and '.join(more)} too" if 0 < len(more) < len(keys) else ""
    return (
        f"matched arms: {', '.join(said)}; {who} in the layers that arms share{batches}, at every rate of "
        f"every arm; they differ in {', '.join(keys)}{beside}"
    )


def parameters(names: Sequence[str], sizes: Sequence[tuple[int, int]], bias: bool | None) -> str:
    """Whether the arms are one network beside their norms, by sizes: parameters beside the norms, in them."""
    if len(sizes) == 1:
        return "{:,} parameters beside the norm's own {:,}".format(*sizes[0])
    norms = ", ".join(f"{name} {own:,}" for name, (_, own) in zip(names, sizes, strict=True))
    if len({beside for beside, _ in sizes}) > 1:
        others = ", ".join(f"{name} {beside:,}" for name, (beside, _) in zip(names, sizes, strict=True))
        return f"other networks: parameters beside the norms' own differ ({others}); in norms: {norms}"
    said = f"beside the norms' own parameters ({norms}) every arm has the same {sizes[0][0]:,}"
    bare = [name for name, (_, own) in zip(names, sizes, strict=True) if not own]
    if bias is False and 0 < len(bare) < len(names):
        said += f"; with model.bias=false {' and '.join(bare)} has no bias, model.bias=true gives all one"
    return said


def words(value: float | None) -> str:
    """A rate in three digits; a dash where there is none."""
    return "-" if value is None else f"{float(f'{value:.3g}'):g}"


def percent(level: float) -> str:
    """`95 %`."""
    return f"{100 * level:.3g} %"


def span(interval: Interval) -> str:
    """An interval's ends, said where they are open."""
    if interval.low == 0 and math.isinf(interval.high):
        return "not bounded"
    if interval.low == 0:
        return f"below {words(interval.high)}"
    if math.isinf(interval.high):
        return f"above {words(interval.low)}"
    return f"{words(interval.low)} to {words(interval.high)}"


def limit_table(arms: Sequence[Searched], compared: Mapping[str, Ratio]) -> Table:
    """A row for every arm."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    level = max([r.level for r in compared.values()], default=LEVEL)
    for title in ("arm", "limit", f"{percent(LEVEL)} interval", "all train to", "all fail from", "trials"):
        table.add_column(title, justify="left" if title == "arm" else "right")
    if compared:
        for title in (f"× {arms[0].name}", f"{percent(level)} interval", "verdict"):
            table.add_column(title, justify="left" if title == "verdict" else "right")
    for arm in arms:
        cells = [arm.name, value_words(arm.limit), span(arm.limit)]
        cells += [words(arm.trained_to), words(arm.fails_from), f"{len(arm.trials)}"]
        if arm.name in compared:
            against = compared[arm.name]
            cells += [value_words(against.interval), span(against.interval), against.verdict]
        table.add_row(*cells)
    return table


def value_words(interval: Interval) -> str:
    """The value; where it is beyond the trials the bound that they give, a dash where they give none."""
    if interval.value == 0:
        return f"< {words(interval.high)}" if math.isfinite(interval.high) else "-"
    if math.isinf(interval.value):
        return f"> {words(interval.low)}" if interval.low else "-"
    return words(interval.value)


def sentences(arm: Searched, against: Ratio | None) -> list[str]:
    """What a search found for an arm, in plain words."""
    n, limit = len(arm.sessions), arm.limit
    first, *_, last = map(words, [*arm.seen, max(arm.seen)])
    if not arm.trains:
        said = (
            f"{arm.name}: at none of {len(arm.seen)} rates from {first} to {last}, a factor "
            f"{arm.grid.resolution**arm.grid.stride:.2g} apart, more than half of {n} sessions trained, so "
            "there is no limit; give them more steps, or look elsewhere (optim.lr, lowest, highest)"
        )
    elif math.isinf(limit.value):
        said = f"{arm.name}: more than half of {n} sessions still train at {last}, the largest rate tried"
        said += "" if limit.low else f"; too few of them for a bound at {percent(LEVEL)}"
    else:
        said = (
            f"{arm.name}: half of {n} sessions fail at {words(limit.value)} ({percent(LEVEL)} {span(limit)})"
        )
        if arm.trained_to is not None:
            said += f"; all train at {words(arm.trained_to)}"
        if arm.fails_from is not None:
            said += f", all fail from {words(arm.fails_from)} on"
    lines = [said]
    if arm.contradicting:
        lines.append(
            f"{arm.name}: {arm.contradicting} of {n} sessions trained at a rate above one at which they "
            "failed, so their limits are known less closely"
        )
    if arm.too_small:
        lines.append(
            f"{arm.name}: at {words(max(arm.too_small))} and below sessions failed too: too small a rate to "
            "learn in so many steps; those trials say nothing of the limit"
        )
    if against is not None:
        lines.append(comparison(arm.name, against))
    return lines


def comparison(name: str, against: Ratio) -> str:
    """Which of two arms tolerates the larger rate, and by how much."""
    ratio, base, level = against.interval, against.baseline, percent(against.level)
    if against.verdict == LARGER:
        return f"{name} tolerates a larger rate than {base}: {times(ratio)} as large ({level} {span(ratio)})"
    if against.verdict == SMALLER:
        turned = Interval(inverse(ratio.value), inverse(ratio.high), inverse(ratio.low))
        return (
            f"{base} tolerates a larger rate than {name}: {times(turned)} as large ({level} {span(turned)})"
        )
    if ratio.low == 0 and math.isinf(ratio.high):
        return f"{name} against {base}: the trials do not bound the ratio of their limits"
    found = f"the ratio is {value_words(ratio)} ({level} {span(ratio)})"
    return f"{name} against {base}: no difference found; {found}"


def times(ratio: Interval) -> str:
    """`12 times`."""
    return "many times" if math.isinf(ratio.value) else f"{words(ratio.value)} times"


def inverse(value: float) -> float:
    """1/value, of 0 and infinity too."""
    if value == 0:
        return math.inf
    return 0.0 if math.isinf(value) else 1 / value


def limit_rows(arms: Sequence[tuple[Arm, Searched]], compared: Mapping[str, Ratio], chance: Chance,
               made_at: str) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of limits.csv. Rates are learning rates; 0 and inf: not bounded by the trials."""
    rows = []
    for arm, found in arms:
        values, norm = arm.values, norm_that_runs(arm.values)
        against, last = compared.get(found.name), found.trials[-1]
        known = math.isfinite(found.scale)
        rows.append({
            "arm": found.name,
            "setting": arm.setting,
            "config_hash": arm.config_hash,
            **{group.rpartition("/")[2]: option for group, option in arm.choices.items()},
            "norm_options": json.dumps({k: v for k, v in norm.items() if k != "_partial_"}),
            "stride": norm.get("stride"),
            "batch_size": values["batch"]["size"],
            "steps": values["steps"],
            "epochs": values["epochs"],
            "precision": values["precision"],
            "seed": last.seed,
            "sessions": len(found.sessions),
            "rates": len(found.seen),
            "trials": len(found.trials),
            "failed": sum(trial.failed for trial in found.trials),
            "limit": found.limit.value,
            "limit_low": found.limit.low,
            "limit_high": found.limit.high,
            "level": LEVEL,
            "scale_log": found.scale if known else None,
            "within_log": found.fit.within if known else None,
            "ratio_10_to_90": math.exp(2 * ODDS_9 * found.scale) if known else None,
            "all_train_to": found.trained_to,
            "all_fail_from": found.fails_from,
            "counted_from": found.base,
            "contradicting_sessions": found.contradicting,
            "baseline": against.baseline if against else None,
            "ratio": against.interval.value if against else None,
            "ratio_low": against.interval.low if against else None,
            "ratio_high": against.interval.high if against else None,
            "ratio_level": against.level if against else None,
            "verdict": against.verdict if against else None,
            "chance_loss": chance.loss,
            "chance_acc": chance.acc,
            "acc_bound": chance.bound,
            "judged_on": chance.part,
            "judged_images": chance.images,
            "threads": last.threads,
            "device_name": last.device_name,
            "torch_version": last.torch_version,
            "git_commit": last.git_commit,
            "made_at": made_at,
        })  # fmt: skip
    return rows
