"""A plan, or a search's result, as one HTML page: no script, no network, no other file.

Drawn from the plain data that `--json` prints, so both say the same. All text of it, paths and names above all, is
escaped where the markup is made (`markup.py`).
"""

from collections.abc import Sequence
from typing import Any

from posttrain.data.page import base_style, policy, resource, write
from posttrain.plan.candidates import mesh_text
from posttrain.plan.markup import Markup, facts, table, tag
from posttrain.plan.page_plots import Part, legend, milliseconds, scatter, side_by_side, size, stacked
from posttrain.plan.predict import KERNEL_SHARE
from posttrain.plan.search_report import ends_text, left_groups, ranking
from posttrain.plan.show import MEMORY, calibration_text, ends, work_rows
from posttrain.train.chips import CHIPS, GIB, Chip


def write_plan(
    plan: dict[str, Any] | None, path: str, *, name: str, title: str, search: dict[str, Any] | None = None
) -> None:
    """Writes the page to `path` (any path that epath opens). Raises `UserError`."""
    write(path, plan_html(plan, name=name, title=title, search=search))


def plan_html(plan: dict[str, Any] | None, *, name: str, title: str, search: dict[str, Any] | None = None) -> str:
    """The page: of what `plan --json` gives, and of a search's data, of which `plan` is the best one if any fits.

    `name` is the model's, `title` says for what is planned.
    """
    style = base_style() + resource("posttrain.plan", "page.css")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy(style)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{name} on {title}: plan"),
        tag("style", Markup(style)),
    )
    sections = _search_sections(search) if search else []
    if plan is not None:
        sections = [*_verdict(plan, name, title), *sections, *_plan_sections(plan)]
    else:
        sections = [_nothing_fits(name, title), *sections]
    return "<!doctype html>\n" + tag("html", head, tag("body", *sections), lang="en")


def _section(title: str, *children: str | None) -> Markup:
    return tag("section", tag("h2", title), *children)


def _note(text: str) -> Markup:
    return tag("p", text, class_="quiet")


# ---- the verdict ----------------------------------------------------------------------------------------------------


def _verdict(plan: dict[str, Any], name: str, title: str) -> list[Markup]:
    found, chip = plan["prediction"], CHIPS[plan["chip"]]
    room, peak = chip.device.hbm_bytes, plan["memory"]["peak"]
    word = tag("span", "Fits", class_="yes") if found["fits"] else tag("span", "Does not fit", class_="no")
    numbers: list[tuple[str, Markup | str, str]] = [
        ("Verdict", word, f"{peak / GIB:.2f} of {room / GIB:.2f} GiB a device"),
        (
            "Step",
            _time(found["step_seconds"]),
            f"{plan['work']['tokens']:,} tokens, {plan['work']['rows']:,} rows",
        ),
        ("Tokens a second", ends(found["tokens_per_second"]), f"on {found['chips']:,} {chip.name} chips"),
        ("MFU", ends([100 * share for share in found["mfu"]], "%"), "useful FLOPs over peak"),
    ]
    if found["hours"] is not None:
        cost = "" if found["cost"] is None else f", {ends(found['chip_hours'])} chip hours"
        main = ("Chip hours", found["chip_hours"]) if found["cost"] is None else ("Cost", found["cost"])
        numbers.append((main[0], ends(main[1]), f"{ends(found['hours'], 'h')}{cost}"))
    headline = tag(
        "dl",
        *(
            tag("div", tag("dt", label), tag("dd", value, class_="value"), tag("dd", note, class_="note"))
            for label, value, note in numbers
        ),
        id="headline",
    )
    subtitle = f"{name} · {mesh_text(plan['mesh'])} · {plan['attention']} attention · {plan['compute_dtype']} compute"
    return [tag("header", tag("h1", f"Plan for {title}"), _note(subtitle)), tag("section", headline)]


def _nothing_fits(name: str, title: str) -> Markup:
    word = tag("p", tag("span", "Nothing that was compiled fits", class_="no"), class_="value")
    return tag("header", tag("h1", f"Plan for {title}"), _note(name), word)


def _time(seconds: Sequence[float]) -> str:
    """A range, in what can be read best."""
    return ends(seconds, "s") if seconds[1] >= 10 else ends([1000 * end for end in seconds], "ms")


# ---- one plan -------------------------------------------------------------------------------------------------------


def _plan_sections(plan: dict[str, Any]) -> list[Markup]:
    chip = CHIPS[plan["chip"]].device
    return [
        _memory(plan, chip),
        tag("div", _parts_of_time(plan), _resources(plan, chip), class_="columns"),
        _work(plan),
        _collectives(plan),
        _parameters(plan),
        _assumptions(plan),
        _section("Not modelled", _listed(plan["not_modelled"])),
    ]


def _memory(plan: dict[str, Any], chip: Chip) -> Markup:
    memory = plan["memory"]
    within = ("temporaries",) if memory["activations"] is None else ("activations", "gradients", "other")
    amounts = {
        MEMORY[key]: float(memory[key]) for key in ("params", "optimizer", "batch", *within, "results", "reference")
    }
    amounts["what else XLA counts"] = memory["peak"] - sum(amounts.values())
    told = [(name, amount) for name, amount in amounts.items() if amount > 0]
    parts = [Part(name, amount, min(number, 8)) for number, (name, amount) in enumerate(told, 1)]
    bar = stacked([("At the step's peak", parts)], show=size, limit=("memory", chip.hbm_bytes))
    host = _note(f"{memory['host'] / GIB:.2f} GiB a device are on the host.") if memory["host"] else None
    return _section("Memory of a device", bar, legend(parts, show=size), host)


def _parts_of_time(plan: dict[str, Any]) -> Markup:
    found = plan["prediction"]
    at_peak = found["attention_seconds"] + found["expert_seconds"]
    core = Part("TensorCore, but for kernels", found["compute_seconds"] - at_peak, 1)
    kernels = [Part("kernels of attention and experts", seconds, 2) for seconds in (at_peak, at_peak / KERNEL_SHARE)]
    wires = [
        Part(f"collectives over {axes}", seconds, min(number, 7))
        for number, (axes, seconds) in enumerate(_by_axis(found["wires"]), 3)
    ]
    host = [Part("to and from the host", found["host_seconds"], 8)] if found["host_seconds"] else []
    low, high = found["step_seconds"]
    hidden, shown = [core, kernels[0]], [core, kernels[1], *wires, *host]
    waiting = low - sum(part.amount for part in hidden)
    if waiting > 1e-9:
        behind = max([*wires, *host], key=lambda part: part.amount)
        hidden.append(Part("waiting for what cannot be hidden", waiting, behind.number))
    plot = stacked([("All hidden", hidden), ("Nothing hidden", shown)], show=milliseconds, limit=None)
    text = (
        f"{1000 * low:,.4g} ms if all overlaps wholly, with kernels at peak; {1000 * high:,.4g} ms if one comes after "
        f"the other, with kernels at {KERNEL_SHARE:.0%} of peak."
    )
    return _section("Where a step's time goes", _note(text), plot, legend(shown, show=milliseconds))


def _by_axis(wires: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    sums: dict[str, float] = {}
    for wire in wires:
        axes = f"{' x '.join(wire['axes']) or 'no axis'} ({wire['network'].upper()})"
        sums[axes] = sums.get(axes, 0.0) + wire["seconds"]
    return sorted(sums.items(), key=lambda item: -item[1])


def _resources(plan: dict[str, Any], chip: Chip) -> Markup:
    """What each of the machine's limits would allow alone."""
    found = plan["prediction"]
    networks = {"ici": 0.0, "dcn": 0.0}
    for wire in found["wires"]:
        networks[wire["network"]] += wire["seconds"]
    bars = [
        ("TensorCore, as XLA estimates it", found["compute_seconds"]),
        ("Matrix products at peak", found["matmul_seconds"]),
        ("Memory traffic at peak", found["hbm_seconds"]),
        ("Links between chips at peak (ICI)", networks["ici"]),
        ("Network between slices at peak (DCN)", networks["dcn"]),
        ("Link to the host at peak, one way after the other", found["host_seconds"]),
    ]
    text = (
        f"Each alone, at {chip.bf16_flops / 1e12:,.0f} TFLOP/s, {chip.hbm_bandwidth / 1e9:,.0f} GB/s of memory, "
        f"{chip.ici_bandwidth / 1e9:,.0f} GB/s of links and {chip.dcn_bandwidth / 1e9:,.3g} GB/s of network a device: "
        "the longest is what limits the step."
    )
    bars = [(name, seconds) for name, seconds in bars if seconds]
    return _section("What limits the step", _note(text), side_by_side(bars, found["step_seconds"]))


def _work(plan: dict[str, Any]) -> Markup:
    return _section("Work of a device in a step", facts(work_rows(plan)))


def _collectives(plan: dict[str, Any]) -> Markup:
    rows = [
        (
            w["kind"],
            " x ".join(w["axes"]) or "-",
            w["network"].upper(),
            f"{w['executed']:,.0f}",
            f"{w['payload_bytes'] / 1e9:,.3f}",
            f"{w['wire_bytes'] / 1e9:,.3f}",
            f"{1000 * w['seconds']:,.3f}",
        )
        for w in plan["prediction"]["wires"]
    ]
    if not rows:
        return _section("Collectives", _note("None."))
    columns = ("kind", "axes", "network", "times a step", "payload GB", "wire GB", "ms at peak")
    return _section("Collectives", table(columns, rows, label="Collectives"))


def _parameters(plan: dict[str, Any]) -> Markup:
    rows = [
        (
            p["name"],
            " x ".join(map(str, p["shape"])),
            p["dtype"],
            ", ".join(" x ".join(entry) or "-" for entry in p["split"]) or "-",
            f"{p['bytes'] / 2**20:,.2f}",
            "; ".join(p["kept_whole"]),
        )
        for p in plan["sharding"]
    ]
    columns = ("name", "shape", "dtype", "split over", "MiB a device", "kept whole")
    count, work = len(rows), plan["work"]
    text = f"{work['parameters']:,} in {count} arrays, of which {work['trained']:,} are trained."
    details = tag(
        "details", tag("summary", f"All {count}"), table(columns, rows, label="Parameters", words=("kept whole",))
    )
    return _section("Parameters", _note(text), details)


def _assumptions(plan: dict[str, Any]) -> Markup:
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    pairs = [
        ("Compiled with", f"{versions}, in {plan['compile_seconds']:.0f} s"),
        ("Accumulation steps", f"{plan['accumulation']}"),
        ("Layers", f"{plan['num_layers']}"),
        ("Calibration", calibration_text(plan["calibration"])),
    ]
    if plan["length"] is not None:
        told = (
            "{steps:,} steps, {epoch_steps:,} an epoch of {epoch_tokens:,} tokens, which fill its rows to {filled:.1%}"
        )
        pairs.insert(0, ("The run, by its data", told.format(**plan["length"])))
    if plan["prediction"]["epoch_hours"] is not None:
        pairs.insert(1, ("Hours an epoch", ends(plan["prediction"]["epoch_hours"], "h")))
    if plan["prediction"]["untimed"]:
        pairs.append(("Custom calls without a time", ", ".join(plan["prediction"]["untimed"])))
    unknown = [loop["op_name"] or loop["name"] for loop in plan["cost"]["loops"] if loop["trips"] is None]
    if unknown:
        pairs.append(("Counted once", f"{', '.join(unknown)}: how often depends on data, so all is a lower bound"))
    return _section("Assumptions", facts(pairs), _listed(plan["assumptions"]))


def _listed(lines: Sequence[str]) -> Markup:
    return tag("ul", *(tag("li", line) for line in lines), class_="plain")


# ---- a search -------------------------------------------------------------------------------------------------------


def _search_sections(search: dict[str, Any]) -> list[Markup]:
    compiled = [one for one in search["candidates"] if "memory_bytes" in one]
    ranked = [one for one in compiled if one["rank"]]
    text = (
        f"{len(ranked)} of {len(compiled)} compiled candidates fit. The middle of the prediction ranks them, per token "
    )
    text += f"of the global batch; lines are its range. {ends_text(search)}"
    sections = []
    if compiled:
        plot = scatter(compiled, search["room_bytes"])
        key = "The first is green; filled: fits; hollow: does not fit; with a ring: the config as it stands."
        columns, rows = ranking(compiled, search["room_bytes"])
        ranks = table(columns, rows, label="Ranking", words=("mesh", "remat"), marked=0 if ranked else None)
        sections.append(_section("The search", _note(text), plot, _note(key), ranks))
    if search["settings"] is not None:
        texts = [tag("pre", text, tabindex="0") for text in (search["yaml"], search["flags"]) if text is not None]
        sections.append(_section("Settings of the first", *texts))
    groups = [(why, f"{count:,}", reason) for why, count, reason in left_groups(search["candidates"])]
    if groups:
        rows = table(("why", "how many", "reason"), groups, label="Left out", words=("why", "reason"))
        sections.append(_section("Left out", rows))
    return sections
