"""The page that gathers what a study found: one HTML file that opens from disk, or Markdown.

    python -m normbench.report outputs/mbn_stride --margin test_acc=0.005

Reading order: `study` (what is read), `sections` (what is said, in order), `finding` (the sentence it opens
with), `evidence` (warnings, provenance), `method`; `curves`, `traces`, `layers` (their files and figures),
`panels`, `drawing` (figures as SVG); `page` (HTML) and `markdown`. No comparison is computed here: all are
those of `normbench.stats`.
"""
