"""The measured part of docs/recipes.md and its picture: which layers to adapt, from results/targets.json."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report.tables import MISSING, Results, table

BEGIN = "<!-- measured: python -m benchmarks report -->\n"
END = "<!-- end of what was measured -->\n"
CONTENTS = {"ink": "ink style", "blueprint": "blueprint style", "momo": "subject"}
LEARNED = {"ink": "in_style", "blueprint": "in_style", "momo": "shows_subject"}
VARIED = ("caption_dropout_rate", "rank", "steps")
COLOURS = ("#2a6f97", "#e07a1f", "#6a994e")

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
    trials = _of_phases(results, "equal steps", "controls")
    ways = list(dict.fromkeys(trial["way"] for trial in trials))
    figure = Figure(figsize=(8, 1.1 + 0.62 * max(1, len(ways))), layout="constrained")
    axis = figure.subplots()
    for row, way in enumerate(reversed(ways)):  # matplotlib counts from below
        for number, content in enumerate(CONTENTS):
            shares = [100 * trial[LEARNED[content]] for trial in _chosen(trials, way, content)]
            if not shares:
                continue
            height = row + 0.24 * (1 - number)
            axis.plot([min(shares), max(shares)], [height] * 2, color=COLOURS[number], linewidth=1.5)
            label = CONTENTS[content] if row == 0 else None
            axis.plot(mean(shares), height, "o", color=COLOURS[number], markersize=6, label=label)
    axis.set_yticks(range(len(ways)), list(reversed(ways)), fontsize=9)
    axis.set_xlim(-2, 102)
    axis.grid(axis="x", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    figure.supxlabel(
        "% of unseen prompts that show what was to be learned; dot: mean, line: all seeds", fontsize=9
    )
    if ways:
        figure.legend(loc="outside upper center", ncols=len(CONTENTS), fontsize=9, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})  # else a new matplotlib makes new bytes


def _parts(results: Results) -> Iterator[str]:
    trials = _of_phases(results, "equal steps", "controls")
    if not trials:
        yield f"The table is {MISSING}: `python -m benchmarks targets`."
        return
    every = _of_phases(results)
    yield f"`python -m benchmarks targets`, {results.told('targets')}: {len(every)} runs on the tiny SDXL."
    yield "![What each set of layers has learned](recipes.png)"
    yield "Equal steps, the learning rate and alpha of each chosen from the same values by held-out loss:"
    yield table([_row(results, trials, way) for way in dict.fromkeys(trial["way"] for trial in trials)])
    dearer = _of_phases(results, "equal cost")
    if dearer:
        yield "Equal cost, as many steps as take the CPU seconds of `attn`:"
        ways = dict.fromkeys(trial["way"] for trial in dearer)
        yield table([_short_row(dearer, way, {"steps": _chosen(dearer, way)[0]["steps"]}) for way in ways])
    varied = _of_phases(results, "recipe")
    if varied:
        yield "The best way with one setting changed, each on two contents and two seeds:"
        yield table(list(_variations(varied, trials)))


def _row(results: Results, trials: Trials, way: str) -> dict[str, Any]:
    chosen = _chosen(trials, way)
    first = chosen[0]
    row: dict[str, Any] = {
        "layers": way,
        "learning rate": first["learning_rate"],
        "alpha": first["alpha_ratio"],
    }
    row["steps"] = first["steps"]
    row |= _learned(trials, way)
    losses = [trial["held_out_loss"] / trial["held_out_loss_before"] for trial in chosen]
    row["held-out loss, of the base's"] = f"{mean(losses):.2f}"
    row["CPU s"] = round(mean(trial["cpu_seconds"] for trial in chosen))
    sdxl = results.figures("targets").get("sdxl", {}).get(way, {})
    row["SDXL: GiB"] = sdxl.get("reserved_gib", "")
    row["TFLOP"] = sdxl.get("tflop", "")
    row["T4 s"] = sdxl.get("t4_seconds", "")
    return row


def _short_row(trials: Trials, way: str, more: dict[str, Any]) -> dict[str, Any]:
    return {"layers": way} | more | _learned(trials, way)


def _learned(trials: Trials, way: str) -> dict[str, str]:
    """For each content the share that was learned, with the spread over seeds, and what was kept."""
    cells = {}
    for content, name in CONTENTS.items():
        chosen = _chosen(trials, way, content)
        if not chosen:
            continue
        cells[f"{name}, %"] = _spread([trial[LEARNED[content]] for trial in chosen])
        if content == "momo":
            cells["unasked, %"] = _spread([trial["shows_subject_unasked"] for trial in chosen])
    kept = [trial["keeps_colour"] for trial in _chosen(trials, way)]
    return cells | {"colour kept, %": _spread(kept)}


def _variations(varied: Trials, trials: Trials) -> Iterator[dict[str, Any]]:
    way = varied[0]["way"]
    usual = [
        trial
        for trial in _chosen(trials, way)
        if any(_is_like(trial, other, ("content", "seed")) for other in varied)
    ]
    yield _short_row(usual, way, {"changed": "nothing"})
    for name in VARIED:
        for value in sorted({trial[name] for trial in varied} - {usual[0][name]}):
            chosen = [trial for trial in varied if trial[name] == value]
            yield _short_row(chosen, way, {"changed": f"{name} {value:g}"})


def _is_like(trial: dict[str, Any], other: dict[str, Any], names: tuple[str, ...]) -> bool:
    return all(trial[name] == other[name] for name in names)


def _spread(shares: Sequence[float]) -> str:
    low, high = (round(100 * share) for share in (min(shares), max(shares)))
    middle = f"{100 * mean(shares):.0f}"
    return middle if low == high else f"{middle} ({low} to {high})"


def _chosen(trials: Trials, way: str, content: str | None = None) -> Trials:
    return [trial for trial in trials if trial["way"] == way and content in (None, trial["content"])]


def _of_phases(results: Results, *phases: str) -> Trials:
    trials = results.figures("targets").get("trials", {}).values()
    return [trial for trial in trials if not phases or trial["phase"] in phases]
