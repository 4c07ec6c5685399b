"""The page of benchmarks comes from result files, and the GPU program runs where there is no GPU."""

import json
import re
from pathlib import Path

from benchmarks.gpu import gpu
from benchmarks.report.report import page

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_tool_makes_of_the_results():
    assert page() == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


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
    assert re.search(r"^\| ours, nothing recomputed \| .* 9.7 \| 100 \|", text, re.MULTILINE)
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
    measured["figures"]["checks"]["nf4"]["losses"] = [0.9, 0.5, 0.4, 0.3]
    measured["figures"]["checks"]["resumed: same bytes?"]["bytes"] = "0"
    (tmp_path / "gpu_smoke_a.json").write_text(json.dumps(measured))
    text = page(tmp_path)
    assert "**nf4 is wrong**: 0.9 in its first step" in text
    assert "**nf4, peft's way is wrong**" not in text
    assert "| trained twice in one process | same bytes |" in text
    assert "resumed in it | other bytes |" in text
