"""The networks, one file each; every one takes `norm`, a callable from a number of channels to a layer."""
