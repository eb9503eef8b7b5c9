"""Every layer of `conf/norm/` against its formula in NumPy: three batches with state, then evaluation."""

import numpy as np
import pytest
from test_norm_contract import NAMES, activations, build

from normbench.formulas import formula_of, options_of, state_of

SHAPES = [(8, 6), (5, 6, 7), (4, 6, 5, 3), (3, 6, 2, 3, 5), (9, 4, 3, 3), (2, 1, 5, 5)]
DRAWS = {"mbn_random"}  # what it measures is drawn; test_norms_batch.py holds it to its draws


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DRAWS])
def test_is_its_formula_written_out(name):
    for shape in SHAPES:
        norm = build(name, shape[1], spatial_shape=shape[2:])
        formula = formula_of(norm)
        assert formula is not None, f"{type(norm).__name__} has no formula in normbench/formulas"
        for seed, training in ((1, True), (2, True), (3, True), (4, False)):
            x = activations(shape, seed=seed)
            state = state_of(norm)
            y = norm.train(training)(x)
            expected, changed = formula(x.numpy(), state, options_of(norm), training)
            assert expected.shape == shape
            where = f"{name} {shape} batch {seed} training={training}"
            np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-9, atol=1e-9, err_msg=where)
            after = state_of(norm)
            assert changed.keys() <= after.keys(), where
            for key, value in after.items():
                wanted = changed.get(key, state[key])
                np.testing.assert_allclose(value, wanted, rtol=1e-9, atol=1e-9, err_msg=f"{where} {key}")
