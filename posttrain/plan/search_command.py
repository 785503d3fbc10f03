"""`posttrain plan CONFIG --topology v5p:2x2x2 --search`: the options, and from them to tables, JSON and the page."""

import json
from typing import TYPE_CHECKING

from posttrain.config import Config
from posttrain.plan.compiles import default_jobs
from posttrain.plan.page import write_plan
from posttrain.plan.search import search
from posttrain.plan.search_report import as_data, show_search
from posttrain.plan.topology import topology_text

if TYPE_CHECKING:
    from posttrain.plan.command import PlanOptions


def search_problems(options: "PlanOptions") -> list[str]:
    """What is wrong with the options themselves."""
    if not options.search:
        given = {"rows-per-device": options.rows_per_device, "jobs": options.jobs, "budget": options.budget}
        return [f"--{name}: says how to search; add --search" for name, value in given.items() if value]
    problems = []
    if not options.topology:
        # The local mesh has no published peaks to rank by, and CPU programs carry no estimates of cycles.
        problems.append("--search needs --topology: only for TPUs can step times be predicted")
    words = options.rows_per_device.replace(",", " ").split()
    if not all(word.isdigit() and int(word) > 0 for word in words):
        problems.append(f"--rows-per-device {options.rows_per_device}: numbers of rows with commas, such as 1,2,4")
    if options.jobs is not None and options.jobs < 1:
        problems.append(f"--jobs {options.jobs}: at least 1")
    if options.sharding:
        problems.append("--sharding: of one plan; search first, then plan with what it found, or read it in --json")
    if options.price is not None and options.tokens is None:
        problems.append("--price: a search tells the cost of so many --tokens; give them too")
    if options.budget is not None and options.budget <= 0:
        problems.append(f"--budget {options.budget}: minutes, above 0")
    return problems


def run_search(config: Config, options: "PlanOptions") -> None:
    """Searches, and tells. The options have no problems."""
    rows = [int(word) for word in options.rows_per_device.replace(",", " ").split()]
    jobs = default_jobs() if options.jobs is None else options.jobs
    budget = None if options.budget is None else 60 * options.budget
    outcome = search(
        config, options.topology, options.slices, rows_per_device=sorted(set(rows)), jobs=jobs, budget=budget
    )
    data = as_data(outcome, tokens=options.tokens, price=options.price)
    if options.html is not None:
        title = topology_text(options.topology, options.slices)
        write_plan(data["best"], options.html, name=config.model.path, title=title, search=data["search"])
    if options.json:
        print(json.dumps(data))
    else:
        show_search(data)
