"""Real Slurm clusters for the tests of this folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Shape, missing_programs


def _start(shape: Shape) -> Iterator[Cluster]:
    assert os.geteuid() == 0, "nodes with namespaces of their own need root: sudo make test"
    missing = missing_programs()
    assert not missing, f"{', '.join(missing)} not found: apt-get install slurmctld slurmd slurm-client munge"
    # Not below pytest's folder, which only its owner may enter.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")), shape)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
    shutil.rmtree(cluster.folder, ignore_errors=True)  # left for the reader if anything failed to start or stop


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, as the tests find and must leave it: all nodes idle, no job."""
    yield from _start(Shape())


@pytest.fixture(scope="session")
def large_cluster() -> Iterator[Cluster]:
    """Sixteen nodes with 8 GPUs each, for what is only asked, not run."""
    yield from _start(Shape(nodes=16, cpus=96))


@pytest.fixture
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """This process is on the cluster's login node, and jobs are to have two nodes."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("SITE_NODES", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return cluster
