"""What notebooks call besides the stages: their config, a finished LoRA, and figures of what happened."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from lora_utils.config.loading import find_config, load_config
from lora_utils.config.schema import RunConfig
from lora_utils.data.images import decode
from lora_utils.memory.forecast import Forecast
from lora_utils.model.lora import WEIGHTS_NAME
from lora_utils.precompute.data_report import DataReport
from lora_utils.stages import train
from lora_utils.storage.log import METRICS, read_summary
from lora_utils.system import redaction
from lora_utils.system.console import accept_any_text
from lora_utils.system.device import MachineError
from lora_utils.tiny.demo_data import draw_demo_data
from lora_utils.training.folders import find_run

GALLERY_COLUMNS = 6
SMOOTHED_STEPS = 20


def configure(preset: str = "auto", overrides: Mapping[str, Any] | None = None, **fields: Any) -> RunConfig:
    """The config of a notebook: a preset, the fields of its form that are filled in, then the overrides.

    Args:
        preset: Name of a preset, path of a YAML file, or auto.
        overrides: Any settings by leaf name.
        fields: Settings too; empty ones are left to the preset. Without train_data_dir and dataset_name the
            demo pictures are drawn.

    Raises:
        UserError: The preset or a setting is unknown or impossible.
    """
    redaction.install()
    accept_any_text()
    file = find_config(choose_preset(preset))
    given = {name: value for name, value in fields.items() if value not in ("", None, [])}
    given |= overrides or {}
    config = load_config(file, given)

    side_px = min(config.data.resolution)
    demo = Path(f"data/demo_{side_px}px")
    if config.data.train_data_dir is None and config.data.dataset_name is None:
        config = load_config(file, given | {"train_data_dir": demo})
    if config.data.train_data_dir == [demo] and not demo.exists():
        draw_demo_data(demo, side_px)
    return config


def choose_preset(wanted: str) -> str:
    """The preset that auto stands for: LORA_PRESET where that is set, t4 on a GPU, else tiny.

    Raises:
        MachineError: On Colab without a GPU, where tiny is most likely not what was meant.
    """
    if wanted != "auto":
        return wanted
    if chosen := os.environ.get("LORA_PRESET"):
        return chosen
    if torch.cuda.is_available():
        return "t4"
    if any(name.startswith("COLAB_") for name in os.environ):
        raise MachineError(
            "this Colab runtime has no GPU: choose Runtime > Change runtime type > T4 GPU, then run all "
            'cells again; preset = "tiny" tries everything on the CPU with a toy model'
        )
    return "tiny"


def run_folder(config: RunConfig) -> Path:
    """Where the run is that the config describes: output_dir, else a folder by name and settings."""
    return find_run(config)


def ensure_trained(config: RunConfig) -> Path:
    """The LoRA of the run that the config describes, trained first, or further, where it is not complete.

    The LoRA of a folder that was given is taken as it is: the data that made it may be elsewhere.
    """
    folder = config.paths.output_dir
    # Without a summary it came from elsewhere: there is no run to complete.
    if folder and (folder / WEIGHTS_NAME).exists() and read_summary(folder).get("status") in (None, "done"):
        return folder / WEIGHTS_NAME
    for _ in train(config):
        pass
    return find_run(config) / WEIGHTS_NAME


def gallery(report: DataReport, count: int = 12) -> Figure:
    """The first images as they will be learned, cropped, with their captions."""
    examples = report.examples[:count]
    rows = -(-len(examples) // GALLERY_COLUMNS)
    size = (2.1 * GALLERY_COLUMNS, 2.5 * rows)
    # squeeze=False: one row comes as a matrix too.
    figure, axes = plt.subplots(rows, GALLERY_COLUMNS, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, inspected in zip(axes.flat, examples, strict=False):
        picture = decode(inspected.example.read(), report.data.alpha_background)
        axis.imshow(inspected.crops[0].apply(picture.image))
        axis.set_title("\n".join(wrap(inspected.captions[0], 32, max_lines=3, placeholder=" …")), fontsize=7)
    return _finish(figure)


def memory_bars(forecast: Forecast) -> Figure:
    """GPU memory that each stage is expected to reserve, by what takes it, against what the card has."""
    stages = list(forecast.stages.values())
    parts = list(stages[0].parts_gib)
    figure, axis = plt.subplots(figsize=(8, 0.55 * len(stages) + 1.2))
    colours = plt.get_cmap("tab20c")
    left = [0.0] * len(stages)
    for number, part in enumerate(parts):
        widths = [stage.parts_gib[part] for stage in stages]
        axis.barh([stage.name for stage in stages], widths, left=left, label=part, color=colours(3 * number))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.axvline(forecast.card.total_gib, color="black", linewidth=1)
    axis.text(forecast.card.total_gib, -0.6, f" {forecast.card.name}", va="bottom", ha="right", fontsize=8)
    axis.set(xlabel="GiB", title=f"Forecast: {forecast.plan}")
    axis.invert_yaxis()
    axis.legend(frameon=False, ncols=len(parts), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return _finish(figure)


def loss_curve(run_folder: Path) -> Figure:
    """Training loss, its running mean, and the held-out loss where it was measured, from metrics.jsonl."""
    lines = (run_folder / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be in the making
    steps = _series(records, "loss")
    held_out = _series(records, "held_out_loss")
    figure, axis = plt.subplots(figsize=(8, 3.2))
    axis.plot(*zip(*steps, strict=True), color="0.8", linewidth=0.8, label="each step")
    axis.plot(*zip(*_running_mean(steps), strict=True), color="tab:blue", label="running mean")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=3, label="held out")
    axis.set(xlabel="step", ylabel="loss")
    # From zero: a curve that is cut off makes every run look like a success.
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return _finish(figure)


def _series(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Step and value of one metric, where it was measured and finite."""
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def _running_mean(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    mean = points[0][1]
    smooth = []
    for step, loss in points:
        mean += (loss - mean) / SMOOTHED_STEPS
        smooth.append((step, mean))
    return smooth


def _finish(figure: Figure) -> Figure:
    figure.tight_layout()
    plt.close(figure)  # else a notebook draws it twice
    return figure
