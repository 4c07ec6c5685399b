"""What the figures of steps and stages have to show; without heavy imports."""

from typing import Any

FORECAST_OPTIONS = {"deterministic", "peft"}


def bars(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the figures have to show; passed is None where a figure is missing."""
    ours = [record for record in records.values() if _is_forecast(record["job"])]
    stages = [record for record in records.values() if "function" in record["job"]]
    fitting = [record for record in ours if record.get("forecast", {}).get("fits")]
    full = sum(record["status"] == "out of memory" for record in fitting)
    rows = [
        _bar("forecast of our steps off by at most, % of what tensors took", _worst(ours), 3.0, at_most=True),
        _bar("forecast of other stages off by at most, %", _worst(stages), 3.0, at_most=True),
        _bar("our steps that should fit and ran out of memory", full if fitting else None, 0, at_most=True),
    ]
    for label, slow, bar in (
        ("all recomputed / ours", "ours, all recomputed", 1.3),
        ("example script / ours", "example script", 1.6),
    ):
        for figure, how in (("ms", "events"), ("kernel_ms", "kernels alone")):
            rows.append(_bar(f"{label}, {how}", ratio(records, slow, "ours", figure), bar))
    return rows


def _is_forecast(job: dict[str, Any]) -> bool:
    """Whether it is a step of ours that the forecast knows: no graph has its memory pool counted."""
    return job.get("way") == "ours" and set(job["options"]) <= FORECAST_OPTIONS


def _worst(records: list[dict[str, Any]]) -> float | None:
    return max(
        (abs(record["error_percent"]) for record in records if "error_percent" in record), default=None
    )


def ratio(records: dict[str, dict[str, Any]], first: str, second: str, figure: str) -> float | None:
    """Of one figure of two cases."""
    numerator, denominator = (records.get(name, {}).get(figure) for name in (first, second))
    return numerator / denominator if numerator and denominator else None


def _bar(what: str, value: float | None, bar: float, at_most: bool = False) -> dict[str, Any]:
    passed = None if value is None else value <= bar if at_most else value >= bar
    return {"what": what, "value": value, "bar": bar, "passed": passed}
