"""Norm layers of a model, alone and at work: time, bytes, memory, operators, share of the step."""
