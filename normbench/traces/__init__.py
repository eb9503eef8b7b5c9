"""Looks inside a session while it trains: norm layers' statistics and parameters, features' quantiles.

`choosing` finds the layers, `moments` sees what a layer measures, `norms` and `features` watch, `tables` are
the files, `reading` gathers a study's, `figures` draws them. Nothing is computed again: a forward pass is
watched while it runs anyway.
"""
