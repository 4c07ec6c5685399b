"""Worker processes: the same pictures as without, in order; a worker that dies is the fault of one image."""

import os
import subprocess
import sys
import time
from io import BytesIO

import numpy as np
import psutil
import pytest
from PIL import Image

from lora_utils.data.crops import Crop
from lora_utils.data.decoding import NO_WORKERS, Job, decode_all, decode_job
from tests.conftest import ROOT

WHOLE = Crop((8, 8), (8, 8), 0, 0, (8, 8))


def png(number):
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def job(number, content=None, **options):
    return Job(number, f"{number}.png", content or png(number), {"whole": WHOLE}, "white", **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_come_in_order_with_refusals_in_their_place(workers):
    contents = {number: png(number) for number in range(30)} | {7: b"no image", 20: png(20)[:40]}
    jobs = [job(number, content) for number, content in contents.items()]
    decoded = list(decode_all(jobs, [64] * len(jobs), workers))
    assert [result.number for result in decoded] == list(range(30))
    assert [result.number for result in decoded if result.refusal] == [7, 20]
    assert [result.refusal.source for result in decoded if result.refusal] == ["7.png", "20.png"]
    for result in decoded:
        assert len(result.pictures) == (0 if result.refusal else 1)
        assert all(picture.key == "whole" and picture.crop == WHOLE for picture in result.pictures)
        assert all(picture.pixels[0, 0, 0] == result.number for picture in result.pictures)


class Killer(bytes):
    """Ends the process that unpickles it, as a crash in a decoder would."""

    def __reduce__(self):
        return os._exit, (1,)


def test_an_image_that_ends_its_worker_is_refused_and_the_rest_goes_on():
    jobs = [job(number, Killer(b"x") if number in (5, 17) else None) for number in range(30)]
    pictures = list(decode_all(jobs, [64] * len(jobs), 2))
    assert [picture.number for picture in pictures] == list(range(30))
    refused = [picture for picture in pictures if picture.refusal]
    assert [picture.number for picture in refused] == [5, 17]
    assert "ended the process" in refused[0].refusal.problem


def test_a_worker_that_dies_while_the_encoder_works_loses_no_image():
    jobs = [job(number, Killer(b"x") if number == 12 else None) for number in range(30)]
    numbers = []
    for picture in decode_all(jobs, [64] * len(jobs), 2):
        time.sleep(0.05)
        numbers.append(picture.number)
    assert numbers == list(range(30))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from lora_utils.data.decoding import _pool\n"
        "if __name__ == '__main__':\n"
        "    pool = _pool(2)\n"
        "    futures = [pool.submit(time.sleep, 0.2) for _ in range(4)]\n"
        "    [future.result() for future in futures]\n"
        "    print(*pool._processes, flush=True)\n"
        "    time.sleep(100)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    workers = [int(number) for number in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(number) for number in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(number) for number in workers)


UNGUARDED = f"""
from lora_utils.data.crops import Crop
from lora_utils.data.decoding import Job, decode_all
print("once")
whole = Crop((8, 8), (8, 8), 0, 0, (8, 8))
jobs = [Job(n, str(n), {png(7)!r}, {{"whole": whole}}, "white") for n in range(10)]
pictures = list(decode_all(jobs, [64] * 10, 2))
print(len(pictures), sum(p.refusal is not None for p in pictures))
"""


@pytest.mark.parametrize("way", ["file", "module", "stdin", "-c", "runpy", "vanished", "daemon"])
def test_a_script_without_a_main_guard_just_works(tmp_path, way):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED, encoding="utf-8")
    lines = {
        "runpy": "import runpy; runpy.run_path('script.py', run_name='__main__')",
        "vanished": "import os; os.remove(__file__)\n" + UNGUARDED,
        "daemon": "import multiprocessing\n"
        "def run(): import script\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=run, daemon=True)\n"
        "    child.start()\n"
        "    child.join()\n",
    }
    (tmp_path / "other.py").write_text(lines.get(way, ""), encoding="utf-8")
    file = "other.py" if way in lines else "script.py"
    command = {"module": ["-m", "script"], "stdin": ["-"], "-c": ["-c", UNGUARDED]}.get(way, [file])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=UNGUARDED if way == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["once", "10", "0"]
    # A daemon may have no children: it decodes by itself, and says so.
    assert done.stderr == ("" if way != "daemon" else f"{NO_WORKERS}\n")


def test_a_script_that_calls_stages_without_a_main_guard_just_works(tmp_path, tiny_settings):
    script = tmp_path / "script.py"
    settings = {name: str(value) for name, value in tiny_settings.items()}
    settings |= {"precompute_dir": "cache", "output_dir": "run", "dataloader_num_workers": 2}
    settings |= {"max_train_steps": 1}
    script.write_text(
        "from lora_utils import stages\n"
        "from lora_utils.config.loading import load_config\n"
        f"config = load_config(None, {settings})\n"
        "stages.precompute(config)\n"
        "print(len(list(stages.train(config))), 'step')\n",
        encoding="utf-8",
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "1 step"
    assert "Traceback" not in done.stderr


def test_where_no_worker_can_be_had_this_process_decodes(monkeypatch, caplog):
    def no_semaphores(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("lora_utils.data.decoding.ProcessPoolExecutor", no_semaphores)
    assert [decoded.number for decoded in decode_all([job(number) for number in range(3)], [64] * 3, 2)] == [
        *range(3)
    ]
    assert caplog.messages == [NO_WORKERS]


def test_a_mask_is_cut_to_latents():
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    buffer = BytesIO()
    mask.save(buffer, "PNG")
    [picture] = decode_job(job(1, mask=buffer.getvalue(), mask_scale=4)).pictures
    np.testing.assert_array_equal(picture.mask, [[255, 0], [255, 0]])


@pytest.mark.parametrize(
    ("mask", "reason"), [(Image.new("L", (8, 8)), "black"), (Image.new("L", (16, 8), 255), "another shape")]
)
def test_a_mask_that_cannot_be_meant_is_refused(mask, reason):
    buffer = BytesIO()
    mask.save(buffer, "PNG")
    assert reason in decode_job(job(1, mask=buffer.getvalue())).refusal.problem


def test_the_alpha_channel_can_be_the_mask():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 4))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    [picture] = decode_job(job(1, buffer.getvalue(), alpha_mask=True, mask_scale=4)).pictures
    np.testing.assert_array_equal(picture.mask, [[0, 0], [255, 255]])
    assert (picture.pixels[:4] == 255).all()
