"""Formula of synchronized batch norm: in one process it is batch norm."""

from normbench.formulas.batch import batch_norm

FORMULAS = {"SyncBatchNorm": batch_norm}
