"""`posttrain plan --search`: what is tried, what is left out and why, what is kept between searches.

The compiler is replaced by laws of time and memory that the search is not told (`search_cases.py`), but for one search.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from posttrain.config import Config
from posttrain.errors import UserErrors
from posttrain.parallel.mesh import AXES
from posttrain.plan import compiles, search
from posttrain.plan.candidates import Candidate, Static
from posttrain.plan.command import PlanOptions, plan
from posttrain.plan.progress import SearchProgress
from posttrain.plan.search import Outcome
from posttrain.plan.search_report import as_data, show_search
from posttrain.plan.topology import ENVIRONMENT
from tests.plan import search_cases as cases
from tests.plan.test_command import TINY


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Answers are kept here; and nobody waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))
    return tmp_path / "cache" / "posttrain" / "plans"


def run(
    monkeypatch: pytest.MonkeyPatch,
    compiler: cases.Compiler,
    *,
    rows: tuple[int, ...] = (),
    budget: float | None = None,
) -> Outcome:
    monkeypatch.setattr(search, "Compilation", compiler)
    return search.search(compiler.base, "v5p:2x2x2", 1, rows_per_device=rows, jobs=2, budget=budget)


def small(**sections: dict[str, Any]) -> Config:
    """Few candidates."""
    return cases.config(train={"global_batch_size": 4}, **sections)


def middle(candidate: Candidate) -> float:
    """Of the predicted time per row, by the laws."""
    core, wires, host = cases.true_seconds(candidate)
    return (max(core, wires, host / 2) + core + wires + host) / 2 / candidate.rows


# ---- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "batch", "rows"), [(8, 16, ()), (8, 64, ()), (8, 16, (1, 2)), (16, 64, ())], ids=str
)
def test_the_fastest_that_fits_is_found(
    monkeypatch: pytest.MonkeyPatch, devices: int, batch: int, rows: tuple[int, ...]
):
    """Among hundreds, of which few are compiled; and every candidate is accounted for, once."""
    compiler = cases.Compiler(cases.config(train={"global_batch_size": batch}), devices)
    found = run(monkeypatch, compiler, rows=rows)
    everything = cases.possible(compiler, rows)
    fitting = [one for one in everything if cases.true_bytes(one) <= cases.CHIP.hbm_bytes]
    best = min(fitting, key=middle)
    assert found.best is not None and middle(found.best.candidate) <= 1.005 * middle(best)
    assert len(everything) > 200 and len(compiler.asked) <= 30
    nearest = min(fitting, key=lambda one: cases.true_seconds(one)[0] / one.rows)
    assert nearest.remat == "offload" and best.remat != "offload", "only what moves to the host speaks against it"
    told = [one.candidate for one in found.tried] + [one.candidate for one in found.left]
    assert len(told) == len(set(told))
    assert set(everything) <= set(told) and set(compiler.asked) <= set(told)
    assert [one.candidate for one in found.ranked] == sorted(
        (one.candidate for one in found.tried if one.prediction.fits), key=middle
    )
    for left in found.left:
        if left.why == "unlikely":
            assert middle(left.candidate) > 0.99 * middle(best) or left.candidate not in fitting
        elif left.why == "implied":
            assert left.candidate not in fitting


def test_the_own_setting_comes_first(monkeypatch: pytest.MonkeyPatch):
    compiler = cases.Compiler(cases.config(), 8)
    found = run(monkeypatch, compiler)
    assert compiler.asked[0] == found.own == Candidate((1, 1, 8, 1, 1, 1), "full", 16, 8, True)


def test_what_cannot_fit_is_not_compiled(monkeypatch: pytest.MonkeyPatch):
    """State beyond memory; and what keeps more than what was too large."""
    monkeypatch.setattr(cases, "PARAMETERS", int(1.3 * cases.PARAMETERS))
    compiler = cases.Compiler(cases.config(train={"global_batch_size": 64}), 2)
    found = run(monkeypatch, compiler)
    whys = Counter(left.why for left in found.left)
    assert whys["too large"] and whys["implied"]
    state = {left.candidate for left in found.left if "parameters, optimizer and batch alone" in left.reason}
    assert {one.mesh for one in state} == {(1, 2, 1, 1, 1, 1)} and not state & set(compiler.asked)
    for number, one in enumerate(compiler.asked):
        earlier = [other for other in compiler.asked[: max(0, number - 1)] if cases.true_bytes(other) > 95 * 2**30]
        assert not any(one.keeps_no_less_than(other) for other in earlier)


def test_progress_tells_why_a_candidate_was_refused(capsys: pytest.CaptureFixture[str]):
    """Not why others are left out because of it."""
    own = Candidate((1, 1, 8, 1, 1, 1), "full", 16, 8, True)
    more = Candidate(**{**vars(own), "remat": "none"})
    one = search._Search(
        Outcome(cases.config(), "v5p:2x2x2", cases.facts(8), cases.CHIP, own), [Static(own), Static(more)], 1
    )
    problem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 150.00G of 95.00G hbm."
    answer = compiles.Answer(None, problem, too_large=True)
    one._take(own, answer, kept=False)
    assert [left.candidate for left in one.outcome.left] == [own, more]
    with SearchProgress(None, 1) as progress:
        progress.compiled(own, answer, one.outcome)
    assert f"{own.text}: the compiler says that it needs 150.00 GiB, of 95.00" in capsys.readouterr().err


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    found = run(monkeypatch, cases.Compiler(cases.config(), 1))
    assert found.best is None and found.tried, "what is too large by its temporaries is known from compiling only"
    data = as_data(found, tokens=None, price=None)
    assert data["best"] is None and data["search"]["settings"] is None
    show_search(data)
    printed = capsys.readouterr().out
    assert f"0 of {len(found.tried)} compiled candidates fit" in printed and "Nothing fits." in printed


def test_answers_are_kept(monkeypatch: pytest.MonkeyPatch, cache: Path):
    """A second search compiles nothing, unless the program's source or the config has changed."""
    first = run(monkeypatch, cases.Compiler(small(), 4))
    again = cases.Compiler(small(), 4)
    second = run(monkeypatch, again)
    assert again.asked == [] and all(one.kept for one in second.tried)
    assert [one.candidate for one in second.ranked] == [one.candidate for one in first.ranked]
    assert len(list(cache.iterdir())) == len(first.tried)
    named = cases.Compiler(small(run={"dir": "elsewhere"}), 4)
    run(monkeypatch, named)
    assert named.asked == [], "where the run lives has no part in its step"
    other = cases.Compiler(small(optimizer={"beta2": 0.95}), 4)
    run(monkeypatch, other)
    assert other.asked
    monkeypatch.setattr(compiles, "source_hash", lambda: "changed")
    changed = cases.Compiler(small(), 4)
    run(monkeypatch, changed)
    assert changed.asked


def test_an_interrupted_search_goes_on(monkeypatch: pytest.MonkeyPatch):
    class Stopped(cases.Compiler):
        def __call__(self, request: dict[str, Any], module: str = "posttrain.plan.worker") -> Any:
            if len(self.asked) == 5:
                raise KeyboardInterrupt
            return super().__call__(request, module)

    stopped = Stopped(small(), 4)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, stopped)
    assert stopped.stopped >= 2, "processes that still run are ended"
    after = cases.Compiler(small(), 4)
    found = run(monkeypatch, after)
    kept = {one.candidate for one in found.tried if one.kept}
    assert len(kept) >= 3 and kept <= set(stopped.asked) and not kept & set(after.asked)


def test_a_budget(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """When the time is over the best so far is shown, and what it was too short for."""
    clock = itertools.count()
    monkeypatch.setattr(search.time, "monotonic", lambda: float(next(clock)))
    compiler = cases.Compiler(small(), 4)
    found = run(monkeypatch, compiler, budget=10.0)
    assert found.best is not None and 1 <= len(found.tried) < 12
    whys = Counter(left.why for left in found.left)
    assert whys["no time"] >= 1
    told = {one.candidate for one in found.tried} | {one.candidate for one in found.left}
    assert set(compiler.asked) <= told
    show_search(as_data(found, tokens=None, price=None))
    assert f"{whys['no time']}" in capsys.readouterr().out


def test_a_budget_that_is_too_short_for_anything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    found = run(monkeypatch, cases.Compiler(small(), 4), budget=1e-9)
    assert not found.tried
    show_search(as_data(found, tokens=None, price=None))
    printed = capsys.readouterr().out
    assert "the time was over first: raise --budget" in printed and "Nothing fits" not in printed


def test_a_failure_is_told_and_not_kept(monkeypatch: pytest.MonkeyPatch):
    def fails(candidate: Candidate) -> str | None:
        return "the machine was out of memory" if candidate.remat == "minimal" else None

    found = run(monkeypatch, cases.Compiler(small(), 4, fails=fails))
    failed = [left for left in found.left if left.why == "failed"]
    assert failed and all("the machine was out of memory" in left.reason for left in failed)
    assert found.best is not None and found.best.candidate.remat != "minimal"
    again = cases.Compiler(small(), 4)
    run(monkeypatch, again)
    assert again.asked[0].remat == "minimal" or any(one.remat == "minimal" for one in again.asked)


def test_data_and_tables_say_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    found = run(monkeypatch, cases.Compiler(cases.config(), 8))
    data = json.loads(json.dumps(as_data(found, tokens=1e9, price=2.0)))
    assert found.best is not None
    best = data["best"]
    low, high = found.best.prediction.step_seconds
    tokens = 16 * cases.LENGTH
    assert best["prediction"]["cost"] == pytest.approx([1e9 / tokens * s / 3600 * 8 * 2.0 for s in (low, high)])
    listed = data["search"]["candidates"]
    assert [one["rank"] for one in listed if one["rank"]] == list(range(1, len(found.ranked) + 1))
    assert sum(one["as_configured"] for one in listed) == 1
    assert len(listed) == len(found.tried) + len(found.left)
    for one in listed[: len(found.ranked)]:
        ends = [seconds / tokens for seconds in one["step_seconds"]]
        assert one["seconds_per_token"] == pytest.approx([ends[0], sum(ends) / 2, ends[1]])
    by_end = {end: min(found.ranked, key=lambda one, end=end: one.per_token[end]) for end in (0, 2)}
    assert data["search"]["fastest_if"] == {
        "all_overlaps": 1 + found.ranked.index(by_end[0]),
        "nothing_overlaps": 1 + found.ranked.index(by_end[2]),
    }
    show_search(data)
    printed = capsys.readouterr().out
    assert f"{len(found.ranked)} of {len(found.tried)} compiled candidates fit on v5p:2x2x2" in printed
    assert data["search"]["flags"] in printed and data["search"]["yaml"] in printed


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (162.29G) "
            "exceeds available HBM (15.75G).",
            162.29 + 1,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded", 17.50),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM", None),
    ],
)
def test_what_the_compiler_says_of_memory(message: str, needed: float | None):
    answer = compiles._failure(f"Traceback ...\njax.errors.JaxRuntimeError: {message}\n", 1.0)
    assert answer.too_large and answer.final
    found = answer.needed(2**30)
    assert found is None if needed is None else found == pytest.approx(needed * 2**30)
    other = compiles._failure("Traceback ...\nMemoryError: RESOURCE_EXHAUSTED on the host", 1.0)
    assert not other.too_large and not other.final


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"search": True}, "--search needs --topology"),
        ({"search": True, "topology": "v5e:2x2", "rows_per_device": "1,x"}, "--rows-per-device 1,x: numbers"),
        ({"search": True, "topology": "v5e:2x2", "jobs": 0}, "--jobs 0: at least 1"),
        ({"search": True, "topology": "v5e:2x2", "budget": -1.0}, "--budget -1.0: minutes, above 0"),
        ({"search": True, "topology": "v5e:2x2", "price": 1.0}, "give them too"),
        ({"search": True, "topology": "v5e:2x2", "sharding": True}, "--sharding: of one plan; search first"),
        ({"topology": "v5e:2x2", "budget": 5.0}, "--budget: says how to search; add --search"),
    ],
)
def test_wrong_options_are_refused(options: dict, reason: str):
    with pytest.raises(UserErrors) as caught:
        plan(cases.config(), PlanOptions(**options))
    assert reason in str(caught.value)


# ---- with the compiler ----------------------------------------------------------------------------------------------

MODEL = TINY | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}

EXAMINE = (
    "import json, sys; from posttrain.plan.static import examine; print(json.dumps(examine(json.load(sys.stdin))))"
)


@pytest.fixture
def model(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return {
        "model": {"path": str(tmp_path), "remat": "full"},
        "data": {"train": [{"path": "none.jsonl"}], "row_length": 1024, "max_length": 512},
        "train": {"global_batch_size": 8},
    }


@pytest.mark.acceptance
def test_candidates_as_runs_build_them(model: dict[str, Any]):
    """Bytes by hand, refusals in the words of a run."""
    pytest.importorskip("libtpu")
    request = {"config": model, "topology": "v5e:2x2", "slices": 1, "rows_per_device": []}
    done = subprocess.run(
        [sys.executable, "-c", EXAMINE],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    layer = 512 * (4 + 2 + 2) * 128 + 4 * 128 * 512 + 3 * 512 * 1536 + 2 * 512
    weights = 4 * layer + 2 * 4096 * 512 + 512
    assert found["facts"]["parameters"] == found["facts"]["trained"] == weights and found["facts"]["devices"] == 4
    for one in found["candidates"]:
        sizes = dict(zip(AXES, one["candidate"]["mesh"], strict=True))
        if one["problems"]:
            assert sizes["tensor"] == 4 and "kv_heads 2 over tensor 4" in one["problems"][0]
            continue
        assert one["batch"] == 4 * 4 * 8 * 1024 // (sizes["data"] * sizes["fsdp"])
        assert one["optimizer"] == pytest.approx(2 * one["params"], rel=1e-3)
        if sizes["data"] == 4:
            assert one["params"] == 4 * weights
        elif sizes["fsdp"] == 4:
            assert one["params"] == pytest.approx(weights, rel=1e-3)
    assert found["own"] == {
        **{"mesh": [1, 1, 4, 1, 1, 1], "remat": "full", "rows": 8, "micro": 4, "collective_matmul": True}
    }


@pytest.mark.acceptance
def test_a_search_as_a_user_calls_it(model: dict[str, Any], tmp_path: Path, cache: Path):
    """As many as three minutes allow, one at the least; then again, from what was kept."""
    pytest.importorskip("libtpu")
    file, page = tmp_path / "run.yaml", tmp_path / "page.html"
    file.write_text(yaml.safe_dump({**model, "train": {"global_batch_size": 4}}))
    command = [sys.executable, "-m", "posttrain.cli", "plan", str(file), "--topology", "v5e:2x2", "--search"]
    first = [*command, "--jobs", "1", "--budget", "3", "--json", "--html", str(page)]
    done = subprocess.run(first, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["search"]
    tried = [one for one in found["candidates"] if one["status"] == "fits"]
    assert tried and all(one["seconds_per_token"][1] >= tried[0]["seconds_per_token"][1] for one in tried)
    assert any(one["as_configured"] for one in tried)
    assert {one["status"] for one in found["candidates"]} <= {"fits", "refused", "unlikely", "no time"}
    assert found["yaml"].splitlines()[0] in page.read_text() and tried[0]["text"] in done.stderr
    again = subprocess.run([*command, "--budget", "0.001"], capture_output=True, text=True)
    assert again.returncode == 0 and "ms a step" in again.stdout and "GiB, " not in again.stderr
    assert found["yaml"] in again.stdout, "nothing is compiled a second time"
