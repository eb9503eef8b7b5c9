"""The normalization layers: one file per layer or small family; `conf/norm/` names them."""
