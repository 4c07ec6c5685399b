"""The card's benchmarks, rehearsed on a CPU: they say what they will do, keep results, and end in time."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.gpu import cases, gpu, timetable
from benchmarks.gpu.cases import CORE, RATE_SECONDS, REST, Case
from benchmarks.gpu.smoke import CHECKS, FIRST, Check
from benchmarks.gpu.workers import Workers
from benchmarks.report.report import page
from benchmarks.report.smoke import rows

SMOKE = ["--rehearse", "--smoke", "--commit", "abc"]
CASES = ["--rehearse", "--commit", "abc", "--only", "vae encode", "--only", "gradients"]
LIMIT_SECONDS = 480
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch, tmp_path):
    """Footprints are counted here, not found in a home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def records_in(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["figures"]["records"]


@pytest.mark.parametrize("card", ["gpu_t4", "gpu_h200_sm75"])
def test_quick_and_smoke_fit_eight_minutes(card, tmp_path):
    known = timetable.known_records(card, tmp_path)
    quick = timetable.entries_of_jobs(CORE, 3 + gpu.QUICK_STEPS, known)
    smoke = timetable.entries_of_checks(CHECKS, timetable.known_records("gpu_smoke_t4", tmp_path))
    for entries in (quick, smoke):
        assert timetable.FIRST_START_SECONDS + sum(entry.seconds for entry in entries) <= LIMIT_SECONDS
    assert timetable.FIRST_START_SECONDS + sum(RATE_SECONDS.values()) <= 120
    assert all(entry.seconds < timetable.COMPILING_SECONDS for entry in quick)


def test_names_are_unique():
    for jobs in (CORE + REST, CHECKS):
        assert len({job.name for job in jobs}) == len(jobs)


def test_a_job_is_expected_to_take_what_it_took_before():
    unknown, known = (
        timetable.entries_of_jobs([Case("ours", plan="full")], 8, records)[0].seconds
        for records in ({}, {"ours": {"status": "ok", "ms": 6000.0}})
    )
    assert unknown < 30
    assert 60 < known < 80
    checks = timetable.entries_of_checks(CHECKS[:3], {FIRST: {"status": "ok", "seconds": 99}})
    assert [entry.seconds for entry in checks][-1] == 99


def test_smoke_says_what_it_will_do_and_keeps_it(tmp_path, capsys):
    wanted = ["facts", "nodes", FIRST, "train fp16 again: same bytes?"]
    gpu.main([*SMOKE, "--out", str(tmp_path), *(f"--only={name}" for name in wanted)])
    said = capsys.readouterr().out
    beforehand, _, done = said.partition("expected in all, of 480")
    assert all(f" s  {name}" in beforehand for name in wanted)
    assert "trained twice in one process: same bytes" in done
    records = records_in(tmp_path, "gpu_smoke_rehearsal")
    assert list(records) == wanted
    assert all(record["status"] == "ok" and record["seconds"] >= 0 for record in records.values())
    errors = [error for value in records["nodes"].values() if isinstance(value, list) for error in value]
    assert 0 < max(errors) < 1e-2
    assert "| trained twice in one process | same bytes |" in page(tmp_path)


def test_a_second_call_goes_on_from_the_first(tmp_path, capsys):
    gpu.main([*CASES[:-2], "--out", str(tmp_path)])
    gpu.main([*CASES, "--out", str(tmp_path), "--resume"])
    said = capsys.readouterr().out
    assert said.count("vae encode: ok") == 1
    records = records_in(tmp_path, "gpu_rehearsal")
    assert {"vae encode", "gradients"} <= records.keys()
    assert records["vae encode"]["forecast"]["kernels"] > 10
    assert "| vae encode |" in page(tmp_path)


def test_what_the_minutes_do_not_allow_is_left_out_and_told(tmp_path, capsys):
    gpu.main([*CASES, "--out", str(tmp_path), "--minutes", "0.01"])
    said = capsys.readouterr().out
    assert "for which there is no time: vae encode" in said
    assert "left out, for the minutes were over: vae encode" in said
    assert not (tmp_path / "gpu_rehearsal.json").exists()


def test_rates_are_kept_one_kind_after_the_other(tmp_path, capsys):
    gpu.main(["--rehearse", "--micro", "--out", str(tmp_path), "--minutes", "2.1"])
    micro = records_in(tmp_path, "gpu_micro_rehearsal")["micro"]
    assert set(RATE_SECONDS) <= set(micro)
    assert micro["comfy_kitchen"] == "not installed"
    assert micro["int8_gemm"]["1024x1280x1280"] > 0
    assert capsys.readouterr().out.count("micro: ok") == len(RATE_SECONDS)
    assert "comfy_kitchen" not in micro.get("failures", {})
    gpu.main(["--rehearse", "--micro", "--out", str(tmp_path), "--resume"])
    assert "micro: ok" not in capsys.readouterr().out


def test_the_largest_of_a_kind_that_fits_is_chosen():
    grid = [Case("batch", batch=batch) for batch in (1, 2, 3)] + [Case("side", side_px=2048)]
    needed = [{"needed_gib": gib} for gib in (4.0, 6.0, 8.0, 9.0)]
    chosen = cases.largest(grid, [needed[0], needed[1], {}, needed[3]], 7.0, 0.1)
    assert [(case.batch, case.plan) for case in chosen] == [(2, "auto")]


def test_under_a_cap_the_largest_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "BATCHES", (2,))
    monkeypatch.setattr(cases, "SIDES_PX", (512,))
    gpu.main(["--rehearse", "--caps", "1", "--out", str(tmp_path)])
    records = records_in(tmp_path, "gpu_caps_rehearsal")
    assert records["1 GiB, fp16, batch"]["job"]["batch"] == 2
    assert all(record["status"] == "ok" and record["forecast"]["fits"] for record in records.values())
    assert "| 1 GiB, fp16, batch |" in page(tmp_path)


def test_a_check_that_fails_is_a_result_and_costs_the_next_ones_nothing(tmp_path):
    settings = {"rehearse": True, "work": str(tmp_path)}
    with Workers(settings, fork=True) as workers:
        failed = workers.ask("first", 60, "check", Check("broken", "there is no such function", 1))
        assert failed["status"] == "failed"
        assert "KeyError" in failed["message"]
        assert workers.ask("first", 60, "check", CHECKS[0])["status"] == "ok"
        assert workers.ask("first", 0, "check", CHECKS[2])["status"] == "timed out"
        assert workers.ask("second", 60, "check", CHECKS[0])["status"] == "ok"
    told = dict(rows({"broken": failed, "nodes": {"status": "timed out", "message": "after 9 s"}}))
    assert told["nodes"] == "**timed out**: after 9 s"
    assert "KeyError" in told["broken"]


@pytest.mark.parametrize("name", ["gpu_h200_sm75", "gpu_smoke_h200", "gpu_micro_h200"])
def test_the_page_takes_a_file_that_was_cut_off_anywhere(name, tmp_path):
    shutil.copy(RESULTS / "forecast.json", tmp_path)
    whole = json.loads((RESULTS / f"{name}.json").read_text())
    records = whole["figures"]["records"]
    cut = []
    for key, record in records.items():
        cut.append({other: each for other, each in records.items() if other != key})
        failed = {"status": "failed", "message": "it broke", "job": record.get("job", {})}
        cut.append(records | {key: failed})
        for figure in ("forecast", "gemm"):
            cut.append(records | {key: {its: each for its, each in record.items() if its != figure}})
        if "kernel_ms" in record:
            cut.append(records | {key: record | {"kernel_ms": None, "kernels": None}})
    cut += [dict(list(records.items())[:number]) for number in range(1, len(records))]
    for each in cut:
        content = copy.deepcopy(whole)
        content["figures"]["records"] = each
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert "NVIDIA H200" in page(tmp_path)


def test_every_command_of_the_page_and_of_the_notebook_is_understood():
    texts = [
        (ROOT / name).read_text(encoding="utf-8") for name in ("docs/gpu.md", "notebooks/01_setup.ipynb")
    ]
    commands = [
        command for text in texts for command in re.findall(r"python -m benchmarks gpu( --[-\w ]+)", text)
    ]
    assert len(commands) >= 7
    for command in commands:
        assert gpu._options(command.split()).minutes > 0
