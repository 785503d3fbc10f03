"""What a search found, as plain data (`--json`, and what the page is drawn from) and as tables."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from posttrain.plan.candidates import Candidate, as_flags, as_yaml, fixed_by_environment, mesh_text
from posttrain.plan.predict import plan_data, predict
from posttrain.plan.search import SURE, Outcome, Tried
from posttrain.plan.topology import topology_text
from posttrain.train.chips import GIB
from posttrain.train.metrics import table

WHY = {
    "refused": "a run with it would be refused",
    "too large": "too large",
    "implied": "too large, as another one shows",
    "unlikely": "not compiled: by an estimate fitted to what was",
    "failed": "the compiler failed",
    "no time": "not compiled: the time was over",
}
"""The reasons of `Left`, in the order in which they are listed."""


def as_data(outcome: Outcome, *, tokens: float | None, price: float | None) -> dict[str, Any]:
    """All candidates with their fate, and of the best one what `plan --json` gives (None where nothing fits)."""
    best, ranked = outcome.best, outcome.ranked
    candidates = [_tried_data(outcome, one, rank) for rank, one in enumerate(ranked, 1)]
    candidates += [_tried_data(outcome, one, None) for one in outcome.tried if not one.prediction.fits]
    candidates += [
        {**_setting(outcome, left.candidate), "rank": None, "status": left.why, "reason": left.reason}
        for left in outcome.left
    ]
    found: dict[str, Any] = {
        "topology": outcome.topology,
        "slices": outcome.facts.slices,
        "chip": outcome.chip.name,
        "room_bytes": outcome.room,
        "seconds": outcome.seconds,
        "compiled": len(outcome.tried),
        "candidates": candidates,
        "settings": None,
    }
    if best is None:
        return {"search": found, "best": None}
    low, high = outcome.leaders()
    found["fastest_if"] = {
        "all_overlaps": ranked.index(low) + 1,
        "nothing_overlaps": ranked.index(high) + 1,
    }
    found["settings"] = best.candidate.settings(outcome.config)
    found["yaml"] = as_yaml(best.candidate, outcome.config)
    found["flags"] = as_flags(best.candidate, outcome.config)
    prediction = predict(best.plan, outcome.chip, tokens=tokens, price=price)
    return {
        "search": found,
        "best": plan_data(
            best.plan, outcome.chip, prediction, topology=outcome.topology, slices=outcome.facts.slices, length=None
        ),
    }


def _setting(outcome: Outcome, candidate: Candidate) -> dict[str, Any]:
    return {
        "text": candidate.text,
        "mesh": candidate.sizes,
        "remat": candidate.remat,
        "rows": candidate.rows,
        "micro": candidate.micro,
        "collective_matmul": candidate.collective_matmul,
        "as_configured": candidate == outcome.own,
    }


def _tried_data(outcome: Outcome, tried: Tried, rank: int | None) -> dict[str, Any]:
    found = tried.prediction
    reason = None if rank else f"{tried.plan['memory']['peak'] / GIB:.2f} of {outcome.room / GIB:.2f} GiB"
    return {
        **_setting(outcome, tried.candidate),
        "rank": rank,
        "status": "does not fit" if rank is None else "fits",
        "reason": reason,
        "memory_bytes": tried.plan["memory"]["peak"],
        "step_seconds": found.step_seconds,
        "seconds_per_token": tried.per_token,
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.mfu,
        "compute_seconds": found.compute_seconds,
        "wire_seconds": found.wire_seconds,
        "host_seconds": found.host_seconds,
        "compile_seconds": tried.seconds,
        "kept": tried.kept,
    }


def show_search(data: dict[str, Any]) -> None:
    """The tables, from `as_data`."""
    found = data["search"]
    compiled = [one for one in found["candidates"] if "memory_bytes" in one]
    ranked = [one for one in compiled if one["rank"]]
    title = topology_text(found["topology"], found["slices"])
    print(f"{len(ranked)} of {len(compiled)} compiled candidates fit on {title}\n")
    if compiled:
        table("Ranking", *ranking(compiled, found["room_bytes"]))
        print("\nRanked by the middle of the predicted step per token of the global batch. Low end: collectives and")
        print("transfers to the host hidden behind computation; high end: nothing hidden. " + ends_text(found))
    _show_left(found["candidates"])
    if not ranked:
        if any(one["status"] == "no time" for one in found["candidates"]):
            print("\nNothing that was compiled fits, but the time was over first: raise --budget or leave it out.")
        else:
            print("\nNothing fits. More chips, LoRA, bfloat16 parameters or shorter rows need less memory.")
        return
    print("\nThe first as a piece of a config:\n")
    print(found["yaml"])
    if found["flags"] is not None:
        print(f"and as flags:\n\n{found['flags']}\n")


def ranking(compiled: Sequence[dict[str, Any]], room: float) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table of all that was compiled, those that fit first, ranked."""
    first = next((one["seconds_per_token"][1] for one in compiled if one["rank"] == 1), None)
    rows = []
    for one in compiled:
        low, high = (1000 * seconds for seconds in one["step_seconds"])
        middle = one["seconds_per_token"][1]
        behind = "" if first is None else f"{100 * (middle / first - 1):+.1f} %"
        rows.append(
            (
                f"{one['rank'] or 'does not fit'}{' (as configured)' if one['as_configured'] else ''}",
                mesh_text(one["mesh"]),
                one["remat"],
                f"{one['rows'] // one['micro']} x {one['micro']}",
                "on" if one["collective_matmul"] else "off",
                f"{one['memory_bytes'] / GIB:.2f}",
                f"{low:,.4g} to {high:,.4g}",
                f"{1e6 * middle:,.4g}",
                "first" if one["rank"] == 1 else behind,
                "{:.1f} to {:.1f}".format(*(100 * share for share in one["mfu"])),
            )
        )
    columns = ("rank", "mesh", "remat", "steps x rows", "collective matmul", f"GiB of {room / GIB:.2f}")
    return (*columns, "ms a step", "µs a token", "behind", "MFU %"), rows


def ends_text(search: dict[str, Any]) -> str:
    """Whether the first is first whatever overlaps."""
    if sum(one["rank"] is not None for one in search["candidates"]) < 2:
        return ""
    low, high = search["fastest_if"].values()
    if low == high == 1:
        return "The first is first at both ends."
    return f"If all were hidden number {low} would lead, if nothing were number {high}."


def left_groups(candidates: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """Of those that are not ranked: why, how many, in which words (of many the commonest, with an example)."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in candidates:
        if one["status"] in WHY:
            groups[one["status"]].append(one)
    rows = []
    for why in WHY:
        by_reason: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for one in groups[why]:
            by_reason[one["reason"] if why in ("refused", "too large", "no time") else ""].append(one)
        for reason, ones in sorted(by_reason.items(), key=lambda item: -len(item[1])):
            words = reason or f"for instance {ones[0]['text']}: {ones[0]['reason']}"
            rows.append((WHY[why], len(ones), words))
    return rows


def _show_left(candidates: list[dict[str, Any]]) -> None:
    rows = left_groups(candidates)
    if rows:
        print()
        table("Left out", ("why", "how many", "reason"), rows)
    if any(one["status"] == "unlikely" for one in candidates):
        print(f"\nEstimates are given as two ends, {SURE:g} standard deviations to either side.")
    if fixed_by_environment():
        print("\nCollective matmul was left as LIBTPU_INIT_ARGS has it.")
