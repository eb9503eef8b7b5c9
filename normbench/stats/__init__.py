"""Which sentence a study may end with: its arms differ, are equivalent, or we cannot tell yet.

    python -m normbench.stats outputs/mbn_stride --baseline obn --margin test_acc=0.005

Reading order: `verdicts` (the rules, fixed before data are seen), `comparison` (one arm against another),
`estimates` and `series` (the tests), `analysis` (a whole command), `sequential` (looking early), `planning`
(how many sessions), `survival` (time to a target). SciPy and statsmodels compute; docs/calibration.md shows
how often each test errs.
"""
