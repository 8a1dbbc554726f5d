"""`neuron-mask` and `shadow-outlier` in one config."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.config import load_config
from graphopt.errors import ConfigError
from tests.calibration.observed import observed
from tests.models import TINY, token_ids
from tests.passes.neuron_codes import decoded_in_codes, dequantised
from tests.passes.neuron_oracle import decoded, shallow
from tests.rewriting import rewritten

INT8 = "shadow-outlier{activations=float,weights=file}"
STEPS = 4


def inputs():
    ids = token_ids(1, 20)
    return ids, torch.ones_like(ids), token_ids(1, STEPS, 1)


def remarks_of(report, name):
    (record,) = (r for r in report.records if r.name == name)
    return record.remarks


@pytest.mark.parametrize(
    ("name", "layer", "buffers"), [("llama", 1, "int8"), ("opt", 0, "float")]
)
def test_core_neurons_of_a_model_in_int8(name, layer, buffers):
    """Prompts run on codes and choose; steps run on what was gathered in float."""
    model = TINY[name]().requires_grad_(False) if layer else shallow(name)
    masking = f"neuron-mask{{layers=[{layer}],min_tokens=10,buffers={buffers}}}"
    text, reports = f"structured-mask,{masking},{INT8},skinny-linear", []
    expected = decoded_in_codes(dequantised(model), inputs(), layer, model, buffers)
    fast = rewritten(model, text, reports=reports)
    for _ in range(2):  # the floats that are gathered lie on a file at last
        cache = graphopt.Cache.from_config(text, model, max_tokens=128)
        actual = decoded(fast, *inputs(), cache)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    for report in reports:
        assert remarks_of(report, "neuron-mask")[0].code == "rewritten"
    whole, step = (remarks_of(report, "shadow-outlier") for report in reports)
    assert [r.code for r in whole if r.kind == "missed"] == ["layer"]  # the head
    left = {"int8": "done", "float": "changes"}[buffers]
    parts = 3 if name == "llama" else 2
    assert [r.code for r in step].count(left) == parts
    assert [r.code for r in step].count("rewritten") == 14 - parts if layer else 4


def test_the_order_is_told():
    with pytest.raises(ConfigError, match=r"behind shadow-outlier.*name neuron-mask"):
        load_config(f"{INT8},neuron-mask")
    load_config(f"neuron-mask,{INT8}")


@pytest.mark.parametrize("method", ["teal", "cats"])
def test_sparse_steps_behind_a_prompt_in_int8(tmp_path, method):
    model = shallow("llama")
    observed(model, token_ids(1, 40, seed=3)).write(tmp_path / "found")
    path = tmp_path / "found.toml"
    sparse = f'neuron-mask{{method={method},thresholds="{path}",force=true}}'
    reports, text = [], f"structured-mask,{sparse},{INT8}"
    cache = graphopt.Cache(max_tokens=128)
    actual = decoded(rewritten(model, text, reports=reports), *inputs(), cache)
    whole, step = (remarks_of(report, "shadow-outlier") for report in reports)
    assert [r.code for r in whole].count("rewritten") == 7
    done = {"teal": 7, "cats": 2}[method]  # up and down are read in part
    assert [r.code for r in step].count("done") == done
    assert [r.code for r in step].count("rewritten") == 7 - done
    alone = rewritten(model, f"structured-mask,{sparse}")
    beside = decoded(alone, *inputs(), graphopt.Cache(max_tokens=128))
    assert 0 < (actual - beside).norm() / beside.norm() < 0.02
