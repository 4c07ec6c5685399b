"""The measured part of docs/recipes.md and its picture: which layers to adapt, from results/targets.json."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report.tables import MISSING, Results, table
from lora_utils.tiny.drawing import SUBJECT

BEGIN = "<!-- measured: python -m benchmarks report -->\n"
END = "<!-- end of what was measured -->\n"
CONTENTS = {"ink": "ink style", "blueprint": "blueprint style", SUBJECT: "subject"}
LEARNED = {"ink": "in_style", "blueprint": "in_style", SUBJECT: "shows_subject"}
VARIED = ("caption_dropout_rate", "rank", "steps")
COLOURS = ("#2a6f97", "#e07a1f", "#6a994e")
EQUAL_STEPS = """\
At equal steps. Learning rate (the first values, and while the best of them was at an edge, twice or half of
it) and alpha of each way are those with the lowest held-out loss in the ink style and the subject, on a seed
that the table does not use; the held-out pictures are the same. Mean of three seeds (worst to best):"""

Trials = Sequence[dict[str, Any]]


def renewed(page: str, results: Results) -> str:
    """The page with what was measured between its two marks.

    Raises:
        ValueError: The page lacks the marks.
    """
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    parts = [part for part in _parts(results) if part]
    return before + BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END + after


def draw(results: Results, path: Path) -> None:
    """For each set of layers what it has learned, at equal steps, from the worst seed to the best."""
    groups = _groups(_table_of(results, "equal steps") + _table_of(results, "controls"))
    if not groups:
        return
    figure = Figure(figsize=(8, 1.1 + 0.62 * len(groups)), layout="constrained")
    axis = figure.subplots()
    for row, trials in enumerate(reversed(groups.values())):  # matplotlib counts from below
        for number, content in enumerate(CONTENTS):
            shares = [100 * share for share in _shares(trials, content)]
            if not shares:
                continue
            height = row + 0.24 * (1 - number)
            axis.plot([min(shares), max(shares)], [height] * 2, color=COLOURS[number], linewidth=1.5)
            label = CONTENTS[content] if row == 0 else None
            axis.plot(mean(shares), height, "o", color=COLOURS[number], markersize=6, label=label)
    axis.set_yticks(range(len(groups)), list(reversed(groups)), fontsize=9)
    axis.set_xlim(-2, 102)
    axis.grid(axis="x", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    figure.supxlabel(
        "% of unseen prompts that show what was to be learned; dot: mean, line: all seeds", fontsize=9
    )
    figure.legend(loc="outside upper center", ncols=len(CONTENTS), fontsize=9, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})  # else a new matplotlib makes new bytes


def _parts(results: Results) -> Iterator[str]:
    equal_steps = _table_of(results, "equal steps")
    if not equal_steps:
        yield f"The table is {MISSING}: `python -m benchmarks targets`."
        return
    count = len(results.figures("targets")["trials"])
    yield f"`python -m benchmarks targets`, {results.told('targets')}: {count} runs on the tiny SDXL."
    yield "![What each set of layers has learned](recipes.png)"
    yield EQUAL_STEPS
    controls = _table_of(results, "controls")
    edges = _edges(_table_of(results, "learning rates"))
    groups = _groups(equal_steps + controls)
    yield table(_row(trials, name, edges) for name, trials in groups.items())
    yield "What a step of each costs on SDXL, at 1024 px, batch 1, rank 32, an fp16 base; a forecast:"
    yield table(_sdxl_row(way, **costs) for way, costs in results.figures("targets")["sdxl"].items())
    equal_cost = _groups(_table_of(results, "equal cost"))
    if equal_cost:
        yield "At equal cost, each with as many steps as take the CPU seconds of attention's:"
        yield table({"layers": name} | _cost(each) | _learned(each) for name, each in equal_cost.items())
    varied = _table_of(results, "recipe")
    if varied:
        yield f"`{varied[0]['way']}` with one setting changed, on ink style and subject, two seeds each:"
        yield table(_variations(varied))


def _row(trials: Trials, name: str, edges: dict[str, tuple[float, float]]) -> dict[str, Any]:
    first = trials[0]
    is_edge = first["learning_rate"] in edges.get(first["way"], ())
    row: dict[str, Any] = {
        "layers": name,
        "learning rate": f"{first['learning_rate']:g}" + (" (edge)" if is_edge else ""),
        "alpha / rank": first["alpha_ratio"],
    }
    losses = [each["held_out_loss"] / each["held_out_loss_before"] for each in trials if _is_finished(each)]
    row |= _cost(trials) | _learned(trials)
    row["held-out loss, of the base's"] = f"{mean(losses):.2f}" if losses else None
    return row


def _sdxl_row(way: str, layers: int, **costs: float) -> dict[str, Any]:
    return {"layers": way, "how many": layers} | costs


def _cost(trials: Trials) -> dict[str, Any]:
    steps = trials[0]["steps"]
    costs = [steps * each["step_cpu_seconds"] for each in trials if _is_finished(each)]
    return {"steps": steps, "CPU s": round(mean(costs)) if costs else None}


def _learned(trials: Trials) -> dict[str, str]:
    """For each content the share that was learned, with the spread over seeds, and what was kept."""
    cells = {}
    for content, name in CONTENTS.items():
        chosen = [each for each in trials if each["content"] == content]
        if not chosen:
            continue
        cells[f"{name}, %"] = _spread(_shares(chosen, content))
        if content == SUBJECT:
            cells["unasked, %"] = _spread([each.get("shows_subject_unasked", 0.0) for each in chosen])
    for kept in ("colour", "shape"):
        cells[f"{kept} kept, %"] = _spread([each.get(f"keeps_{kept}", 0.0) for each in trials])
    failed = sum(not _is_finished(each) for each in trials)
    return cells | ({"failed": f"{failed} of {len(trials)}"} if failed else {})


def _variations(trials: Trials) -> Iterator[dict[str, Any]]:
    usual = trials[0]
    for changed, group in _groups(trials, lambda each: _difference(usual, each)).items():
        yield {"changed": changed} | _cost(group) | _learned(group)


def _difference(usual: dict[str, Any], trial: dict[str, Any]) -> str:
    changes = [f"{name} {trial[name]:g}" for name in VARIED if trial[name] != usual[name]]
    return ", ".join(changes) or "nothing: " + ", ".join(f"{name} {usual[name]:g}" for name in VARIED)


def _spread(shares: Sequence[float]) -> str:
    low, high = (round(100 * share) for share in (min(shares), max(shares)))
    middle = f"{100 * mean(shares):.0f}"
    return middle if low == high else f"{middle} ({low} to {high})"


def _shares(trials: Trials, content: str) -> list[float]:
    """Of each trial on the content; one that failed has learned nothing."""
    return [each.get(LEARNED[content], 0.0) for each in trials if each["content"] == content]


def _is_finished(trial: dict[str, Any]) -> bool:
    return trial["status"] == "finished"


def _edges(tuning: Trials) -> dict[str, tuple[float, float]]:
    """Lowest and highest learning rate that was tried for each way."""
    return {
        way: (min(each["learning_rate"] for each in trials), max(each["learning_rate"] for each in trials))
        for way, trials in _groups(tuning, lambda each: each["way"]).items()
    }


def _groups(trials: Trials, name: Callable[[dict[str, Any]], str] | None = None) -> dict[str, Trials]:
    """Trials by what they have in common, in order of appearance; by their layers and steps if not told."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in trials:
        steps = "" if each["steps"] == trials[0]["steps"] else f", {each['steps']} steps"
        groups.setdefault(name(each) if name else each["way"] + steps, []).append(each)
    return dict(groups)


def _table_of(results: Results, phase: str) -> list[dict[str, Any]]:
    """Trials of a phase that are done, in its order."""
    figures = results.figures("targets")
    keys = figures.get("tables", {}).get(phase, [])
    return [figures["trials"][key] for key in keys if key in figures["trials"]]
