"""The page that gathers what a study found: one HTML file that opens from disk, or Markdown.

    python -m normbench.report outputs/mbn_stride --margin test_acc=0.005

Reading order: `study` (what is read), `finding` (the sentence it opens with), `evidence` (warnings, provenance),
`traces` and `layers` (their files and figures), `curves` (learning curves), `drawing` (figures as SVG), `page`
(HTML) and `markdown`. It computes no statistic: all comparisons are those of `normbench.stats`.
"""
