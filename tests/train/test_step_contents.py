"""What tools/inspect_data.py says of a step is what the step reads."""

import json
import re
from pathlib import Path

import pytest

from data.tokenizer import load_tokenizer
from parallel.errors import ConfigurationError
from tests.train.small_run import prepare_small_corpus, small_run
from tests.train.test_resume import run, samples
from train.step_contents import describe_step, step_position


def test_a_run_tells_what_its_steps_read(tmp_path: Path) -> None:
    shards = prepare_small_corpus(tmp_path / "corpus")
    length = {"train": {"steps": 8, "stop_step": 4, "global_batch_size": 4}}
    config = small_run(tmp_path, shards, **length)
    run(config)
    read = {position: sample for position, sample, _ in map(json.loads, samples(config))}
    for rank in (0, 1):
        told = describe_step(config.directory, [], 4, rank, None)
        found = re.findall(r"position (\d+): (\w+), epoch (\d+), shard (\d+) sequence (\d+), documents 0 to 0", told)
        assert {int(position): [s, *map(int, rest)] for position, s, *rest in found} == {
            position: read[position] for position in (12 + rank, 14 + rank)
        }
        mine = [json.loads(line)[0] for line in (config.directory / f"samples_{rank}.jsonl").read_text().splitlines()]
        assert [int(position) for position, *_ in found] == mine[-2:]
    both = describe_step(config.directory, [], 8, None, load_tokenizer(shards / "tokenizer.model"))
    assert both.startswith("step 8 of small: sequences 28 to 31 of the stream")
    assert both.count("position ") == 4
    assert max(len(line) for line in both.splitlines()) > 100, "there is text"
    for step, rank, words in ((9, None, "--step 9 must be from 1 to train.steps=8"), (1, 2, "--rank 2 must be from 0")):
        with pytest.raises(ConfigurationError, match=words):
            describe_step(config.directory, [], step, rank, None)
    with pytest.raises(ConfigurationError, match=r"whose settings are recorded; leave out train\.steps=3"):
        describe_step(config.directory, ["train.steps=3"], 1, None, None)


def test_batches_left_out_shift_the_steps_after_them() -> None:
    """As the trainer goes: it passes over each position that is left out."""
    left_out = {8, 12, 24}
    position, expected = 0, []
    for _ in range(8):
        while position in left_out:
            position += 4
        expected.append(position)
        position += 4
    assert [step_position(step, 4, left_out) for step in range(1, 9)] == expected
