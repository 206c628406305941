"""Every example runs with --smoke, offline, as a user would start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import REPO

LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def _run(folder: Path, *arguments: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "clean_dataset",
        "puzzlemix_trainer",
        "comixup_trainer",
        "condense_and_push",
        "mixup_gallery",
        "dataset_doctor",
    ],
)
def test_example(name: str, tmp_path: Path) -> None:
    assert _run(tmp_path, str(REPO / "examples" / f"{name}.py"), "--smoke").strip()


def test_multi_gpu_example_on_two_cpu_processes(tmp_path: Path) -> None:
    script = str(REPO / "examples" / "clean_multi_gpu.py")
    two = _run(tmp_path, *LAUNCH, script, "--smoke", "--output-dir", "two")
    one = _run(tmp_path, script, "--smoke", "--output-dir", "one")
    assert "2 processes" in two and "1 processes" in one
    assert two.split("checksum")[1] == one.split("checksum")[1]


def test_ccm_examples(tmp_path: Path) -> None:
    told = _run(tmp_path, str(REPO / "examples" / "train_ccm_adapter.py"), "--smoke")
    none, untrained, full, trained = (
        float(line.split(": ")[1].split()[0]) for line in told.splitlines() if "nats" in line
    )
    assert full < trained < (none + full) / 2 < untrained  # more than half of what the context is worth
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        f.name for f in (tmp_path / "ccm-adapter").iterdir()
    }
    chat = [str(REPO / "examples" / "chat_with_ccm.py"), "--smoke", "--memory", "user42"]
    told = _run(tmp_path, *chat)
    shown = [line for line in told.splitlines() if "tokens seen" in line]
    assert len(shown) == 3 and "4 slots, 4.0 KiB" in shown[0] and "saved (9" in shown[0]
    assert _run(tmp_path, *chat).startswith(shown[-1])  # the saved memory is read again


def test_the_stream_s_example(tmp_path: Path) -> None:
    told = _run(tmp_path, str(REPO / "examples" / "train_ccm_stream.py"), "--smoke")
    window, untrained, trained = (float(line.split(": ")[1]) for line in told.splitlines() if "perplexity" in line)
    assert trained < 0.9 * untrained < window
    assert (tmp_path / "stream-adapter" / "adapter_model.safetensors").is_file()


def test_examples_are_short() -> None:
    for path in (REPO / "examples").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150, path.name
