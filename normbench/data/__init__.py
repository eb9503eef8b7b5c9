"""Data sets as batches on the device: equal keys give equal batches, whatever the device or worker count."""
