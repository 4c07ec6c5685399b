"""All stages by the command line, and what one leaves for the next in one process."""

import re

from lora_utils import cli, stages
from lora_utils.checking import check
from tests.pretended_card.conftest import LIBRARY_BYTES


def test_the_whole_road_by_the_command_line(data_dir, tmp_path, card, capsys):
    flags = ["--config", "ci", "--train_data_dir", str(data_dir), "--max_train_steps", "2"]
    flags += ["--output_dir", str(tmp_path / "run")]
    for stage in ("check", "precompute", "train", "compare"):
        assert cli.main([stage, *flags]) == 0, capsys.readouterr().err
        assert card.allocated() <= LIBRARY_BYTES
    said = capsys.readouterr().out
    assert "card        Tesla T4, 14.7 GiB, sm_75" in said
    assert "precision   fp16: sm_75 has no bf16 arithmetic" in said
    assert (tmp_path / "run/compare/sheet.png").is_file()


def test_three_runs_in_one_process_leave_nothing_and_plan_alike(on_card, card, tmp_path, monkeypatch):
    plans = []
    prepare = stages.prepare

    def prepared(*given):
        run = prepare(*given)
        plans.append((run.planned.plan, run.planned.forecast.budget_gib))
        return run

    monkeypatch.setattr(stages, "prepare", prepared)
    for number in range(3):
        for _ in stages.train(on_card(output_dir=tmp_path / str(number))):
            pass
        assert card.allocated() <= LIBRARY_BYTES
    assert plans[0] == plans[1] == plans[2]


def test_a_run_that_is_stopped_or_fails_leaves_nothing(on_card, card, monkeypatch):
    config = on_card()
    for _ in stages.train(config):
        break
    assert card.allocated() <= LIBRARY_BYTES
    monkeypatch.setattr(stages.loop.TrainingState, "update", lambda *_: 1 / 0)
    kept = None
    try:
        list(stages.train(config))
    except ZeroDivisionError as error:
        kept = error  # as a notebook keeps the last one, with its traceback
    assert kept
    assert card.allocated() <= LIBRARY_BYTES


def test_what_tensors_have_is_not_told_as_free(on_card, card):
    import torch

    config = on_card()
    before = check(config).forecast.card.usable_gib
    held = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    assert 0.99 < before - check(config).forecast.card.usable_gib < 1.01
    del held


def test_the_forecast_of_a_card_is_told_in_gib_of_it(on_card):
    text = str(check(on_card()))
    assert re.search(r"Tesla T4: 14\.\d of 14\.7 GiB can be used", text)


def test_check_says_that_this_torch_has_no_kernels_for_the_card(on_card, monkeypatch, capsys, data_dir):
    import torch

    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    for stage in ("check", "train"):
        assert cli.main([stage, "--config", "ci", "--train_data_dir", str(data_dir)]) == 2
        said = capsys.readouterr()
        assert "has no kernels for Tesla T4, sm_75, but for sm_80 sm_90" in said.out + said.err
