"""Every layer of `conf/norm/` against the contract of a norm; a new YAML is found by itself.

The checks are those of `python -m normbench.audit`: what a stranger's layer is asked, ours are asked.
"""

import functools
import inspect
import re

import pytest
import torch
from hydra.utils import instantiate
from layers import NAMES, options
from omegaconf import OmegaConf
from torch import nn

from normbench.audit.card import CHECKS, run_check
from normbench.audit.numbers import compiles
from normbench.audit.subject import Subject, activations, measures_batches
from normbench.config import conf_dir

CONF = conf_dir() / "norm"
# what is right in these layers and would be a mistake in most others
WARNED = {
    **{(name, "gradients"): "held constant" for name in ("brn", "brnc")},  # r and d are constants to autograd
}
# what the sources start elsewhere than at weight one and bias zero
OTHER_STARTS = {"grn"}


# the others keep the contract in the whole suite; `pytest -k <name>` asks one of them
FIRST = (
    "obn",
    "mbn",
    "brnc",
    "bin",
    "gn",
    "iternorm",
    "pit_uniform",
    "dyt",
)
EVERY = [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in NAMES]


@functools.cache
def subject(name: str) -> Subject:
    return Subject(options(name), 12)


def build(name: str, shape: tuple[int, ...] = (4, 12, 5, 3), **changes: object) -> nn.Module:
    """In float64, with parameters away from one and zero."""
    return subject(name).build(shape=shape, changes=changes)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", EVERY)
def test_keeps_the_contract(name, check):
    found = run_check(subject(name), check, CHECKS[check])
    expected = WARNED.get((name, check))
    assert found.status == ("warn" if expected else "pass"), found.seen
    assert expected is None or expected in found.seen


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EVERY)
def test_compiles_as_one_graph(name, backend):
    found = run_check(subject(name), "compile", functools.partial(compiles, backend=backend))
    assert found.status == "pass", found.seen


@pytest.mark.parametrize("name", NAMES)
def test_takes_every_rank_and_refuses_the_others_by_name(name):
    assert [len(shape) for shape in subject(name).shapes] == [2, 3, 4, 5]
    for shape in [(4, 11, 5, 3), (4, 13), (12,), (2, 12, 1, 1, 1, 1)]:
        for norm in (build(name), build(name).eval()):
            with pytest.raises(ValueError, match=rf"num_features=12 .*got \({shape[0]},"):
                norm(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_starts_at_weight_one_and_bias_zero_with_torchs_names(name):
    norm = build(name) if name in OTHER_STARTS else subject(name).build(fresh=True)
    for key, start in (("weight", 1), ("bias", 0)):
        values = getattr(norm, key, None)
        if values is not None and name not in OTHER_STARTS:
            assert (values == start).all()
    if measures_batches(norm):
        assert norm.num_batches_tracked.dtype == torch.int64 and norm.num_batches_tracked.shape == ()
    for key, buffer in norm.named_buffers():
        assert buffer.is_floating_point() or buffer.dtype == torch.int64, key


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_option_is_refused_by_name(name):
    with pytest.raises(TypeError, match="epz"):
        type(build(name))(12, epz=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_spells_out_every_option_and_no_other(name):
    assert (CONF / f"{name}.yaml").read_text().startswith("# ")
    given = options(name)
    assert given.pop("_partial_") is True
    given.pop("_target_")
    norm = build(name)
    signature = inspect.signature(type(norm)).parameters
    assert next(iter(signature)) == "num_features"
    named = [key for key, parameter in signature.items() if parameter.kind == parameter.KEYWORD_ONLY]
    assert sorted(given) == sorted(key for key in named if key not in ("spatial_shape", "fed_by"))
    for key in given:
        assert f"{key}=" in repr(norm)
    assert "12" in repr(norm)


@pytest.mark.parametrize("name", NAMES)
def test_public_docstring_has_every_part(name):
    doc = inspect.getdoc(type(build(name)))
    assert "y = " in doc
    for part in ("Args:", "Shape:", "State:", "Raises:", "Source:", "Differs from the source in:"):
        assert part in doc, part
    for key in options(name).keys() - {"_target_", "_partial_"}:
        assert f"    {key}: " in doc, key


@pytest.mark.parametrize("name", [name for name in NAMES if "affine" in options(name)])
def test_halves_of_the_affine_freeze_and_drop(name):
    x = activations((4, 12, 5, 3))
    for frozen, trained in (("weight", "bias"), ("bias", "weight")):
        norm = build(name, **{"affine": True, f"train_{frozen}": False})
        norm(x).square().sum().backward()
        assert getattr(norm, frozen).grad is None
        assert getattr(norm, trained).grad.abs().min() > 0
    norm = build(name, affine=False)
    assert norm.weight is None and norm.bias is None
    assert norm(x).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_meta_tensors(name):
    for momentum in (0.1, None):
        changes = {"momentum": momentum} if "momentum" in options(name) else {}
        norm = build(name, **changes).to("meta")
        assert norm(torch.empty(4, 12, 5, 3, device="meta")).shape == (4, 12, 5, 3)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_wrong_values_by_name(name):
    """Every number and flag of the constructor is checked, not stored as it comes."""
    for key in options(name).keys() - {"_target_", "_partial_"}:
        with pytest.raises((ValueError, TypeError), match=re.escape(key)):
            build(name, **{key: "nonsense"})


@pytest.fixture(scope="module")
def one_process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("ddp") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in NAMES if list(build(name).parameters())])
def test_trains_under_data_parallel(name, one_process_group):
    norm = build(name).float()
    wrapped = nn.parallel.DistributedDataParallel(norm)
    for step in range(2):
        wrapped(activations((4, 12, 5, 3), torch.float32, seed=step)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in norm.parameters() if parameter.requires_grad)


def test_the_custom_yaml_takes_a_users_layer():
    config = OmegaConf.load(CONF / "custom.yaml")
    assert OmegaConf.is_missing(config, "_target_")
    config._target_ = "torch.nn.BatchNorm2d"
    assert isinstance(instantiate(config)(6), nn.BatchNorm2d)
