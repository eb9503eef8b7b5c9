"""docs/norms.md is what scripts/catalogue.py makes of the layers as they are."""

import importlib.util
import re
from pathlib import Path

import pandas as pd
import pytest
from layers import NAMES

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("catalogue", ROOT / "scripts" / "catalogue.py")
catalogue = importlib.util.module_from_spec(spec)
spec.loader.exec_module(catalogue)


def test_every_layer_stands_in_one_family():
    assert sorted(" ".join(catalogue.FAMILIES.values()).split()) == NAMES


def test_every_layer_has_a_measured_cost():
    costs = pd.read_csv(catalogue.COSTS)
    assert sorted(costs.norm) == NAMES
    assert (costs.p20 <= costs.times_obn).all() and (costs.times_obn <= costs.p80).all()
    assert costs.torch_version.notna().all() and costs.device.notna().all()
    assert (costs.set_index("norm").times_obn[["obn", "torch_bn"]] - 1).abs().max() < 0.5


@pytest.mark.slow
def test_the_page_is_up_to_date():
    made = catalogue.page(catalogue.entries(), pd.read_csv(catalogue.COSTS))
    assert made == (ROOT / "docs" / "norms.md").read_text(), "run scripts/catalogue.py"


def test_the_page_names_formula_options_source_and_state_of_every_layer():
    page = (ROOT / "docs" / "norms.md").read_text()
    for entry in catalogue.entries():
        section = re.search(rf"^### {entry.name}\n(.*?)(?=^###? |\Z)", page, re.S | re.M)[1]
        for key, _, _ in entry.options:
            assert f"`{key}=" in section, (entry.name, key)
        assert "y = " in section or " again: " in section
        assert "*Source:*" in section or " again: " in section
