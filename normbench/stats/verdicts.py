"""The four verdicts and the rules that give them.

The rules are fixed before data are seen. For one metric of one treatment against one baseline, the first
that holds decides:

1. **not comparable**: fewer than 2 sessions an arm (10 for a time); another data set; for times: hardware,
   precision, torch version, `pack`, `threads` or `slots` known to differ or to vary, no spread at all, or an
   effective sample size below 3.
2. **different**: the primary test's p, after Holm's correction over every test of the command, is below
   alpha.
3. **equivalent**: the arms are identical in all their sessions, 5 or more; or both one-sided tests against
   the stated margin, after Holm's correction over every margin of the command, are below alpha, and every
   session that ended has the metric.
4. **inconclusive**: all else, with the sessions that would settle it.

Alpha bounds each kind of finding by itself: any false "different" of a command, and any false "equivalent".
Looks before the planned end (`--look-every`) spend alpha bit by bit.

The primary test is the paired t where sessions share random numbers (equal seed and session, model, data
set and batch size, by the rows), else Welch's t; for times both with effective numbers of sessions; the
log-rank test for the time to a target. Arms that never vary and yet differ are judged by the exact
permutation test. Comparisons that rule 1 shuts out before any value is looked at are not among Holm's
tests.
"""

import math
from dataclasses import dataclass
from typing import Protocol

FEWEST = 2
FEWEST_TIMES = 10  # with fewer, pairs of AR(1) times err more than 10 times in 100 (docs/calibration.md)
FEWEST_EFFECTIVE = 3.0
FEWEST_IDENTICAL = 5  # accuracies are counts: a few may agree by chance

DIFFERENT, EQUIVALENT = "different", "equivalent"
INCONCLUSIVE, NOT_COMPARABLE = "inconclusive", "not comparable"


class Evidence(Protocol):
    """What a verdict is made from; `comparison.Comparison` has all of it."""

    obstacle: str
    identical: bool
    unmeasured: int
    looks: str
    n_baseline: int
    n_treatment: int
    mean_baseline: float
    sd_baseline: float
    pairs: int
    diverged_baseline: int
    diverged_treatment: int
    fisher_p: float
    fisher_holm: float
    diff: float
    ci_low: float
    ci_high: float
    test: str
    paired_r: float
    p: float
    p_holm: float
    margin: float
    tost_p: float
    tost_p_holm: float
    min_detectable: float
    n_needed: float
    repeats: str


@dataclass(frozen=True)
class Verdict:
    """One of the four words and a line that says why."""

    word: str
    reason: str


def decide(c: Evidence, alpha: float, family: int) -> Verdict:
    """The verdict by the rules of this module."""
    within = c.tost_p_holm < alpha
    if c.obstacle:
        word, why = NOT_COMPARABLE, c.obstacle
    elif c.identical:
        word, why = EQUIVALENT, f"identical in all {c.n_treatment} sessions"
        if c.sd_baseline <= 1e-12 * abs(c.mean_baseline):
            why += ", which all have one value: does anything learn?"
    elif c.p_holm < alpha:
        word, why = DIFFERENT, f"{amount(c)}; {evidence(c, family)}"
        if within:
            why += f", though within the margin of ±{c.margin:.3g}"
    elif within and not c.unmeasured:
        word = EQUIVALENT
        p = f"one-sided p {shown_p(c.tost_p_holm)} of the {margin_test(c)}"
        why = f"within ±{c.margin:.3g}: {amount(c)}; {p}"
    else:
        word, why = INCONCLUSIVE, open_question(c, alpha, within, family)
    return Verdict(word, "; ".join(filter(None, [why, c.repeats, divergence(c, alpha)])))


def amount(c: Evidence) -> str:
    """`higher by 0.0031 (0.0012 to 0.0050)`."""
    if c.diff == 0:
        return "no difference in the means"
    way = "higher" if c.diff > 0 else "lower"
    between = "" if math.isnan(c.ci_low) else f" ({c.ci_low:+.3g} to {c.ci_high:+.3g})"
    return f"{way} by {abs(c.diff):.3g}{between}"


def evidence(c: Evidence, family: int) -> str:
    """The test that decides, its p value, and what that was corrected for."""
    looks = " over all looks" if c.looks else ""
    if family == 1:
        return f"{test_name(c)}: p {shown_p(c.p_holm)}{looks}"
    holm = shown_p(c.p_holm).removeprefix("= ")
    return f"{test_name(c)}: p {shown_p(c.p)}{looks} (Holm over {family} tests: {holm})"


def test_name(c: Evidence) -> str:
    """`paired t, r = 0.95`."""
    return c.test if math.isnan(c.paired_r) else f"{c.test}, r = {c.paired_r:.2f}"


def margin_test(c: Evidence) -> str:
    """What the margin was held against."""
    return "restricted means (t, as if unpaired)" if c.test.startswith("log-rank") else test_name(c)


def shown_p(p: float) -> str:
    """Two figures; nothing below a millionth."""
    return "< 1e-6" if p < 1e-6 else f"= {p:.2g}"


def open_question(c: Evidence, alpha: float, within: bool, family: int) -> str:
    """Why nothing is settled, and what would settle it."""
    words = f"{amount(c)}; {evidence(c, family)}"
    if within:
        return f"{words}; within ±{c.margin:.3g}, but {c.unmeasured} ended sessions have no value"
    if c.looks:
        return f"{words}; looked at after {c.looks} planned sessions"
    if not math.isnan(c.min_detectable):
        words += f"; these sessions find {c.min_detectable:.2g} or more"
    return f"{words}; {sessions_needed(c)}"


def sessions_needed(c: Evidence) -> str:
    """How many sessions an arm would decide it."""
    if math.isnan(c.n_needed):
        return "no number of sessions can be named"
    if c.n_needed == math.inf:
        return "no affordable number of sessions would tell this difference from none; state a margin"
    if abs(c.diff) < c.margin:
        show = f"show equivalence within ±{c.margin:.3g}, if there is no difference"
        return f"about {c.n_needed:,.0f} an arm would {show}"
    return f"about {c.n_needed:,.0f} an arm would find it, if it is real"


def divergence(c: Evidence, alpha: float) -> str:
    """A word on sessions that diverged, where any did."""
    if not (c.diverged_baseline or c.diverged_treatment):
        return ""
    counts = f"{c.diverged_treatment} diverged against {c.diverged_baseline}"
    more = "a different rate" if c.fisher_holm < alpha else "no different rate shown"
    return f"{counts} ({more}; Fisher, Holm: p {shown_p(c.fisher_holm)})"
