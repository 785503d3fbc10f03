"""What a search may try, and how what it found is written down."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.cli import _config_command
from posttrain.config import load_config, parse_config
from posttrain.parallel.mesh import resolve_sizes
from posttrain.plan.candidates import COLLECTIVE_MATMUL, Candidate, as_configured, as_flags, as_yaml, combinations
from posttrain.plan.command import PlanOptions
from tests.plan import search_cases as cases


def test_meshes_and_batches_are_all_that_multiply_out():
    base = cases.config(train={"global_batch_size": 12})
    found = combinations(base, devices=8, slices=1, batches=[12], experts=False)
    meshes = {
        sizes
        for sizes in itertools.product((1, 2, 4, 8), repeat=4)
        if math.prod(sizes) == 8 and 12 % (sizes[0] * sizes[1]) == 0
    }
    assert {one.mesh for one in found} == {(1, data, fsdp, c, t, 1) for data, fsdp, c, t in meshes}
    for mesh in {one.mesh for one in found}:
        shards = mesh[1] * mesh[2]
        assert {one.micro for one in found if one.mesh == mesh} == {
            micro for micro in range(1, 13) if 12 % micro == 0 and micro % shards == 0
        }
    assert len(found) == len(set(found))
    assert {one.remat for one in found} == {"none", "minimal", "dots", "full", "offload"}
    assert {one.collective_matmul for one in found} == {True, False}


def test_slices_and_experts():
    base = cases.config(train={"global_batch_size": 32})
    found = combinations(base, devices=16, slices=2, batches=[32], experts=True)
    assert {one.sizes["replica"] for one in found} == {2}
    assert {one.sizes["expert"] for one in found} == {1, 2, 4, 8}
    assert all(math.prod(one.mesh) == 16 for one in found)
    alone = [one for one in found if one.sizes["data"] == 8]
    assert alone and all(one.collective_matmul for one in alone), "no product waits for a gather there"


def test_the_environment_may_fix_collective_matmul(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{COLLECTIVE_MATMUL}=1000000")
    found = combinations(cases.config(), devices=8, slices=1, batches=[16], experts=False)
    assert {one.collective_matmul for one in found} == {True}, "the config, which leaves it on, stays as it is"


@pytest.mark.parametrize("options", [{}, {"xla_tpu_scoped_vmem_limit_kib": 1000}, {COLLECTIVE_MATMUL: 7}])
def test_settings_can_be_pasted(tmp_path: Path, options: dict):
    """As YAML over the base, and as flags: both are the candidate's config, and all else is as it was."""
    base = cases.config(train={"xla_options": options, "global_batch_size": 64}, objective={"name": "ipo", "beta": 0.3})
    file = tmp_path / "base.yaml"
    raw = base.model_dump(mode="json")
    file.write_text(yaml.safe_dump(raw))
    for collective in (True, False):
        candidate = Candidate((1, 2, 2, 1, 2, 1), "dots", 32, 16, collective)
        chosen = candidate.config(base)
        assert as_configured(chosen, resolve_sizes(chosen.mesh, 8)) == candidate
        assert chosen.objective == base.objective and chosen.data == base.data
        kept = {name: value for name, value in options.items() if name != COLLECTIVE_MATMUL or collective}
        assert kept.items() <= chosen.train.xla_options.items()
        assert (int(chosen.train.xla_options.get(COLLECTIVE_MATMUL, 0)) >= 1_000_000) != collective
        pasted = yaml.safe_load(as_yaml(candidate, base))
        merged = {name: {**values, **pasted.get(name, {})} for name, values in raw.items()}
        assert parse_config(merged, "pasted") == chosen
        flags = as_flags(candidate, base)
        assert (flags is None) == (not collective and COLLECTIVE_MATMUL not in options and bool(options))
        if flags is not None:
            assert _config_command("plan", [str(file), *flags.split()], PlanOptions)[0] == chosen
    assert load_config(str(file)) == base


def test_what_keeps_more():
    """The order of remat policies and of rows at a time; nothing is said of other meshes or of unknown policies."""
    base = Candidate((1, 1, 8, 1, 1, 1), "dots", 32, 16, True)

    def more(**changed: Any) -> bool:
        return Candidate(**{**vars(base), **changed}).keeps_no_less_than(base)

    assert more() and more(remat="minimal") and more(remat="none") and more(micro=32)
    assert not more(remat="full") and not more(micro=8) and not more(remat="none", micro=8)
    assert not more(remat="offload") and not more(mesh=(1, 2, 4, 1, 1, 1)) and not more(collective_matmul=False)
    assert not more(rows=64)
