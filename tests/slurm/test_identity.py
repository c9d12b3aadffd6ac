import pytest

from parallel.errors import ConfigurationError
from slurm.identity import identity_from_environment, job_id
from train.process import ProcessIdentity

STEP = {"SLURM_PROCID": "9", "SLURM_NTASKS": "20", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1"}
TWO_NODES = {**STEP, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "123456"}


def identity(**environment: str) -> ProcessIdentity:
    found = identity_from_environment(environment)
    assert found is not None
    return found


def test_torchrun() -> None:
    found = identity(
        RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="host", MASTER_PORT="7777"
    )
    assert found == ProcessIdentity(3, 4, 1, 2, "host", 7777)


def test_torchrun_inside_srun_wins() -> None:
    assert identity(**STEP, RANK="0", WORLD_SIZE="2").world_size == 2


def test_srun() -> None:
    found = identity(**TWO_NODES, MASTER_ADDR="head", MASTER_PORT="7777", SLURM_STEP_TASKS_PER_NODE="8,12")
    assert found == ProcessIdentity(9, 20, 1, 12, "head", 7777)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}])
def test_neither(environment: dict[str, str]) -> None:
    """The last one is what a batch script sees."""
    assert identity_from_environment(environment) is None


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "10(x2)"}, 10),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,16"}, 16),
        ({"SLURM_TASKS_PER_NODE": "12,8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({}, 10),
    ],
)
def test_tasks_on_this_node(counts: dict[str, str], expected: int) -> None:
    assert identity(**TWO_NODES, **counts).local_world_size == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [("gpu[03-04]", "gpu03"), ("gpu[7,9-11],cpu[1-3]", "gpu7"), ("a-1.site,b-2", "a-1.site"), ("solo", "solo")],
)
def test_first_node(nodes: str, expected: str) -> None:
    assert identity(**{**TWO_NODES, "SLURM_STEP_NODELIST": nodes}).master_address == expected


def test_one_node_needs_no_name() -> None:
    assert identity(**STEP).master_address == "127.0.0.1"


@pytest.mark.parametrize("nodes", ["", "rack[1-2]node[1-4]"])
def test_unreadable_node_list(nodes: str) -> None:
    with pytest.raises(ConfigurationError, match="MASTER_ADDR is not set"):
        identity(**{**TWO_NODES, "SLURM_STEP_NODELIST": nodes})


def test_jobs_on_one_node_get_different_ports() -> None:
    ports = {identity(**{**TWO_NODES, "SLURM_JOB_ID": str(job)}).master_port for job in range(123_456, 123_556)}
    assert len(ports) == 100
    assert all(1024 < port < 32768 for port in ports)


def test_a_task_of_an_array_is_named_as_such() -> None:
    """Slurm takes the bare id of an array's last task for the whole array."""
    assert job_id({"SLURM_JOB_ID": "12"}) == "12"
    assert job_id({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"
