"""The tests' own cluster is a real one: it runs steps on its nodes."""

from tests.slurm.cluster import Cluster


def test_runs_tasks_on_both_nodes(cluster: Cluster) -> None:
    answer = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "hostname").stdout.split()
    assert sorted(answer) == ["node1", "node1", "node2", "node2"]
