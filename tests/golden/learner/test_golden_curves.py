"""Twenty updates of small agents reproduce the curves on file, but for another order of summation."""

import json

import numpy as np
import pytest

from tests.golden.learner.curves import CASES, FILE, UPDATES, curve


@pytest.mark.parametrize("case", list(CASES))
def test_update_reproduces_the_recorded_curve(case):
    recorded = json.loads(FILE.read_text())[case]
    now = curve(case)
    assert set(recorded) <= set(now)
    for name, values in recorded.items():
        assert len(now[name]) == UPDATES
        np.testing.assert_allclose(now[name], values, rtol=1e-4, atol=1e-5, err_msg=f"{case}: {name}")
