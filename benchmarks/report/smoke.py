"""Short checks on a card: whether it computes, learns, repeats and resumes as a CPU does."""

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.smoke import AGAIN, FIRST, OTHER_SETTINGS, RUN, STEP
from benchmarks.report.tables import Results, table

MENDED = {"int8, peft's way": ("86959e0", "ff56d1a")}
"""Settings that computed something else, in which commit, and the commit that mends them."""
OLD_SETTINGS = ("channels_last",)
"""Of the first file: with the lean step, which refuses them now."""
DTYPES = {"fp32": "float32", "fp16": "float16"}
REPEATS = {
    "train fp16 again: same bytes?": "trained twice in one process",
    "resumed: same bytes?": "stopped after 2 steps and resumed in it",
}
NODES = "nodes of the lean step, linears against fp64, others against torch's own: largest relative error"
FIVE_DIGITS = 1e-5
Records = dict[str, dict[str, Any]]


def what_holds(results: Results) -> Iterator[str]:
    """A chapter for each card, of what its file holds: the checks may have been cut off anywhere."""
    for name in results.gpus("smoke_"):
        records = results.figures(name)["records"]
        yield "## What holds on a real card"
        yield (
            f"{results.told(name)}: short checks, `python -m benchmarks gpu --smoke`.\nTrainings are of the "
            "tiny SDXL, 4 steps of 2 micro-batches, in fp16 where no other precision is named."
        )
        yield table({"check": check, "outcome": outcome} for check, outcome in rows(records))
        yield (
            "The step of SDXL's size is `ours` of the chapter above, at another host's pace. "
            "Where another process ended in other\nbytes, the reason is not known yet; "
            "which kernels cuDNN and attention run is left to them."
        )


def told(records: Records) -> list[str]:
    """The same as lines, for who ran them."""
    return [f"{check}: {outcome}" for check, outcome in rows(records)]


def rows(records: Records) -> Iterator[tuple[str, str]]:
    """What was checked, and what came of it; nothing of what was not.

    Args:
        records: By the names of the checks.
    """
    done = {name: record for name, record in records.items() if record["status"] == "ok"}
    if "nodes" in done:
        errors = [f"{name} {_largest_error(done['nodes'], dtype)}" for name, dtype in DTYPES.items()]
        yield NODES, ", ".join(errors)
    yield from _repeated(done)
    yield from _sdxl(done)
    yield from _settings(done)
    yield from _memory(done)
    for name, record in records.items():
        if record["status"] != "ok":
            yield name, f"**{record['status']}**: {record.get('message', '')}"


def _repeated(done: Records) -> Iterator[tuple[str, str]]:
    """Where the same training had to end in the same bytes."""
    for name, label in REPEATS.items():
        if _are_comparable(done.get(name), done.get(FIRST)):
            yield label, "same bytes" if done[name]["bytes"] == done[FIRST]["bytes"] else "other bytes"
    for name, record in done.items():
        first = done.get(name.removesuffix(AGAIN))
        if not name.endswith(AGAIN) or not _are_comparable(record, first):
            continue
        others = "other bytes, losses equal to 5 digits" if _are_close(record, first) else "other losses"
        yield name, "same bytes" if record["bytes"] == first["bytes"] else others


def _are_comparable(record: dict[str, Any] | None, first: dict[str, Any] | None) -> bool:
    """Whether both have trained, and are of one commit: others may have other bytes."""
    if record is None or first is None or not {"bytes"} <= record.keys() & first.keys():
        return False
    return record.get("commit") == first.get("commit")


def _are_close(record: dict[str, Any], first: dict[str, Any]) -> bool:
    pairs = zip(record["losses"], first["losses"], strict=True)
    return all(abs(loss - other) <= FIVE_DIGITS / 2 for loss, other in pairs)


def _sdxl(done: Records) -> Iterator[tuple[str, str]]:
    """What has SDXL's own size: a step, and a whole run."""
    for base in ("fp16", "nf4"):
        if whole := done.get(STEP + base):
            yield (
                f"U-Net of SDXL's size, {base} base, 1024 px: a step; a held-out batch of 8",
                f"{whole['ms']:.0f} ms{_gib(', ', whole['training_gib'])}{_gib('; ', whole['held_out_gib'])}",
            )
    if run := done.get(RUN):
        yield (
            f"a run of {run['steps']} steps on a base of SDXL's size, {run['base_gib']:.1f} GiB",
            "; ".join(_telemetry(run)),
        )


def _telemetry(run: dict[str, Any]) -> Iterator[str]:
    skipped = f", {run['skipped']} of them skipped" if run["skipped"] else ""
    yield f"{run['run_seconds']:.0f} s, the first step after {run['first_step_after_seconds']:.0f}{skipped}"
    yield f"a step {run['step_seconds']:.2f} s (at most {run['step_seconds_highest']:.2f})"
    yield f"of it {1000 * run['data_seconds']:.0f} ms for data"
    if run["peak_gib"] is not None:
        yield f"{run['peak_gib']:.2f} GiB{_gib(' (forecast ', run['forecast_gib'], ')')}"
    yield f"host {run['host_gib']:.1f} GiB"
    yield str(run["plan"])
    yield " to ".join(_loss(run[key]) for key in ("first_loss", "last_loss"))


def _loss(value: float | None) -> str:
    return "loss not finite" if value is None else f"loss {value:.3g}"


def _settings(done: Records) -> Iterator[tuple[str, str]]:
    names = [name for name in done if name in OTHER_SETTINGS or name in OLD_SETTINGS]
    if not names or FIRST not in done:
        return
    settings = {name: done[name] for name in names if "losses" in done[name]}
    if settings:
        text = _learning(settings, done[FIRST]["losses"][0])
        yield f"{len(settings)} other settings: {'; '.join(settings)}", text
    for name in names:
        if "refused" in done[name]:
            yield name, f"refused: {done[name]['refused']}"


def _memory(done: Records) -> Iterator[tuple[str, str]]:
    if left := done.get("left behind by a run"):
        yield (
            "memory that a run leaves behind",
            f"{left['after_mib'] - left['before_mib']:.1f} MiB until Python's collector comes, "
            f"then {left['after_collect_mib'] - left['before_mib']:.1f}",
        )
    full = done.get("out of memory")
    if full and "with_room" in full:
        yield (
            "half of what a step takes is there, from the second step on",
            f"{full['failures']} allocations failed; losses within {_off(full, full['with_room'])} % of "
            f"those with room; {full['plan']}",
        )
    elif full and FIRST in done:
        yield (
            "6 MiB free beside the loaded model",
            f"losses within {_off(full, done[FIRST]['losses'])} % of those with room; {full['plan']}",
        )


def _off(full: dict[str, Any], losses: list[float]) -> str:
    off = max(abs(loss / plain - 1) for loss, plain in zip(full["losses"], losses, strict=True))
    return f"{100 * off:.2g}"


def _gib(before: str, value: float | None, after: str = "") -> str:
    """Nothing on a CPU, where memory is not counted."""
    return "" if value is None else f"{before}{value:.2f} GiB{after}"


def _largest_error(nodes: dict[str, Any], dtype: str) -> str:
    errors = [float(error) for node, found in nodes.items() if f"torch.{dtype}" in node for error in found]
    return f"{max(errors):.1e}"


def _learning(settings: Records, expected: float) -> str:
    """Whether all losses are finite and fall, and which begin elsewhere than they should.

    Args:
        settings: Records of trainings, by name.
        expected: The first loss of the plain fp16 training: other settings are other roundings of it, or
            weigh it a little otherwise.
    """
    learned = {name: record["losses"] for name, record in settings.items()}
    good = [all(map(math.isfinite, losses)) and losses[-1] < losses[0] for losses in learned.values()]
    text = f"{sum(good)} of {len(good)} finite and falling"
    for name, (loss, *_) in learned.items():
        if not expected / 2 < loss < expected * 2:
            text += f"; **{name} is wrong**: {loss:.3g} in its first step, where fp16 has {expected:.3g}"
            broken, mended = MENDED.get(name, ("", ""))
            if broken and settings[name].get("commit", "").startswith(broken):
                text += f" (mended in {mended}, not run again on a card yet)"
    return text
