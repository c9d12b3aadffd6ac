"""An uptraining in stages, submitted to a real cluster from Python."""

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.store import CheckpointStore
from tests.slurm.cluster import Cluster
from tests.slurm.submitted import Submitted
from tests.tools.vanilla_model import save_vanilla_model
from tests.train.small_run import prepare_small_corpus, small_run
from train.config_file import config_text, load_config

TOOL = Path(__file__).resolve().parents[2] / "tools" / "uptrain_from_vanilla.py"


def uptrain(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.whole
def test_every_stage_is_a_job_that_waits_for_the_one_before(on_cluster: Cluster, tmp_path: Path) -> None:
    config = small_run(
        tmp_path / "runs",
        prepare_small_corpus(tmp_path),
        "target",
        model={"embedder": {"kind": "lookup_projection"}},
        train={"steps": 200, "cpu_threads": 1},
        optimizer={"warmup_steps": 1},
    )
    file = tmp_path / "target.yaml"
    file.write_text(config_text(config))
    vanilla = save_vanilla_model(tmp_path / "vanilla")
    arguments = ["--vanilla", vanilla, "--config", file, "--block-lengths", "1,4", "--launcher", "slurm", "--wait"]
    printed = uptrain(*arguments)
    first, last = config.run.name + ".blocks_of_1", config.run.name
    assert "<- vanilla.layers.2.attention.dense.weight" in printed.stdout
    for name in (first, last):
        submitted = Submitted(on_cluster, load_config(file, [f"run.name={name}"]))
        assert f"submitted run {name} as job {submitted.job}" in printed.stdout
        assert f"job {submitted.job}: COMPLETED" in printed.stderr
        assert [result.status for result in submitted.results()] == [0, 0]
        assert f"run {name}: complete at step 10" in submitted.log
        assert CheckpointStore(config.run.root / name / "checkpoints").complete_steps()[-1] == 10
    assert f"job {submitted.job}: PENDING (Dependency)" in printed.stderr
    assert "run target is complete at step 10; nothing to do" in uptrain(*arguments).stdout
