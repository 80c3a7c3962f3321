"""Twenty updates of small agents reproduce the curves on file, but for another order of summation."""

import json

import numpy as np
import pytest

from learner.native.library import absence, available
from tests.golden.learner.curves import CASES, FILE, UPDATES, curve


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("case", list(CASES))
def test_update_reproduces_the_recorded_curve(case, backend):
    if backend == "native" and not available():
        pytest.skip(f"no compiled regions: {absence()}")
    recorded = json.loads(FILE.read_text())[case]
    now = curve(case, backend)
    assert set(recorded) <= set(now)
    for name, values in recorded.items():
        assert len(now[name]) == UPDATES
        np.testing.assert_allclose(now[name], values, rtol=1e-4, atol=1e-5, err_msg=f"{case}: {name}")
