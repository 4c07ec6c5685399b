"""The page of benchmarks comes from result files, and the GPU program runs where there is no GPU."""

import json
import re
from pathlib import Path

from benchmarks.gpu import gpu
from benchmarks.report import recipes
from benchmarks.report.report import page
from benchmarks.report.tables import Results
from lora_utils.tiny.drawing import SUBJECT

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_tool_makes_of_the_results():
    assert page() == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_recipes_hold_what_was_measured():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipes.renewed(text, Results(ROOT / "benchmarks" / "results")) == text


def test_a_trial_reaches_the_recipes_with_its_spread(tmp_path):
    def trial(way, content, seed, share, **more):
        learned = {"shows_subject" if content == SUBJECT else "in_style": share}
        return {
            "way": way, "content": content, "seed": seed, "steps": 300, "learning_rate": 2e-3,
            "alpha_ratio": 1.0, "rank": 16, "caption_dropout_rate": 0.3, "held_out_loss_before": 0.2,
            "held_out_loss": 0.05, "step_cpu_seconds": 0.2, "keeps_colour": 1.0, "keeps_shape": 0.9,
            "shows_subject_unasked": 0.02, "status": "finished",
        } | learned | more  # fmt: skip

    trials = {}

    def table_of(*those):
        trials.update({f"{len(trials) + number}": each for number, each in enumerate(those)})
        return list(trials)[-len(those) :]

    attention = [
        trial("attn", content, seed, 0.1 * seed) for content in recipes.CONTENTS for seed in range(3)
    ]
    full = [trial("full", content, seed, 0.9) for content in recipes.CONTENTS for seed in range(3)]
    broken = [{**each, "way": "broken", "status": "DivergenceError: the loss is nan"} for each in full]
    for each in broken:
        del each["held_out_loss"], each["step_cpu_seconds"]
    rates = [trial("attn", "ink", 9, 0, learning_rate=rate) for rate in (1e-3, 2e-3)]
    changed = [full[0], trial("full", "ink", 0, 0.5, rank=4)]
    tables = {
        "learning rates": table_of(*rates),
        "equal steps": table_of(*attention, *full, *broken),
        "recipe": table_of(*changed),
    }
    costs = {"layers": 771, "GiB reserved": 12.4, "TFLOP": 15.5, "T4 s": 1.05}
    figures = {"trials": trials, "tables": tables, "sdxl": {"full": costs}}
    content = {"figures": figures, "machine": "two cores", "date": "2027-01-01", "commit": "abc"}
    (tmp_path / "targets.json").write_text(json.dumps(content))
    results = Results(tmp_path)
    page = recipes.renewed(f"before\n{recipes.BEGIN}old\n{recipes.END}after\n", results)
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert re.search(r"^\| attn \| 0.002 \(edge\) .* 10 \(0 to 20\) \|", page, re.MULTILINE)
    assert re.search(r"^\| full \| 0.002 \|.* 300 \| 60 \| 90 \|.* 0.25 \|", page, re.MULTILINE)
    assert re.search(r"^\| broken .* 9 of 9 \|", page, re.MULTILINE)
    assert re.search(r"^\| full \| 771 \| 12.4 \| 15.5 \| 1.05 \|$", page, re.MULTILINE)
    assert re.search(r"^\| rank 4 \| 300 \| 60 \| 50 \|", page, re.MULTILINE)
    recipes.draw(results, tmp_path / "recipes.png")
    assert (tmp_path / "recipes.png").stat().st_size > 5000


def test_a_result_file_that_is_sent_in_reaches_the_page(tmp_path):
    assert "24.8" not in page(tmp_path)
    figures = {"records": {"micro": {"status": "ok", "gemm": {"4096x4096x4096": 24.83}, "launch_us": 7.1}}}
    content = {"figures": figures, "machine": "two cores", "date": "2027-01-01", "commit": "abc"}
    (tmp_path / "gpu_micro_t4.json").write_text(json.dumps(content))
    assert "24.8" in page(tmp_path)


def test_what_ran_out_of_memory_says_so_on_the_page(tmp_path):
    ours = {
        "status": "ok",
        "ms": 100.0,
        "allocated_gib": 9.7,
        "loss": 1.0,
        "forecast": {"allocated_gib": 9.6, "recomputes": "nothing is recomputed"},
    }
    script = {"status": "out of memory", "allocated_gib": 14.2, "forecast": {"allocated_gib": 14.5}}
    records = {"ours": ours, "example script, nothing recomputed": script}
    figures = {"settings": {"vram_gib": 14.3, "emulate": "sm75"}, "records": records, "bars": []}
    card = {"name": "A card", "driver": "1", "cuda": "13.0"}
    content = {"figures": figures, "machine": "two cores", "gpu": card, "date": "2027-01-01"}
    content["commit"] = "abcdef0123456789"
    (tmp_path / "gpu_a_sm75.json").write_text(json.dumps(content))
    text = page(tmp_path)
    assert "A card (driver 1, CUDA 13.0), 2027-01-01, commit abcdef0" in text
    assert "abcdef01" not in text
    assert "| example script, nothing recomputed | 14.5 | out of memory |" in text
    # The plan of "ours" recomputed nothing, so it is what that row asks for, and no case that is still owed.
    assert re.search(r"^\| ours, attention, nothing recomputed \| .* 9.7 \| 100 \|", text, re.MULTILINE)
    assert "Not run yet: ours, all recomputed;" in text


def test_the_gpu_program_rehearses_on_a_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu.main(["--rehearse", "--only", "ours", "--only", "example script", "--only", "vae encode"])
    lines = capsys.readouterr().out.splitlines()
    for case in ("ours", "example script", "vae encode"):
        assert any(line.startswith(f"{case}: ok") for line in lines)
    assert any(line.startswith("example script / ours, events: ") for line in lines)


def test_a_setting_that_computes_something_else_is_called_wrong(tmp_path):
    measured = json.loads((ROOT / "benchmarks" / "results" / "gpu_smoke_h200.json").read_text())
    measured["figures"]["records"]["nf4"]["losses"] = [0.9, 0.5, 0.4, 0.3]
    measured["figures"]["records"]["resumed: same bytes?"]["bytes"] = "0"
    (tmp_path / "gpu_smoke_a.json").write_text(json.dumps(measured))
    text = page(tmp_path)
    assert "**nf4 is wrong**: 0.9 in its first step" in text
    assert "**nf4, peft's way is wrong**" not in text
    assert "| trained twice in one process | same bytes |" in text
    assert "resumed in it | other bytes |" in text
