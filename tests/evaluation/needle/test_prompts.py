"""Needles are where they should be, and answers are judged as they should be."""

import re
from pathlib import Path

import pytest

from data.errors import DataError
from data.tokenizer import Tokenizer
from evaluation.needle.haystack import Haystack, read_haystack
from evaluation.needle.prompts import PromptBuilder
from evaluation.needle.scoring import RANDOM_LEADING_DIGITS, is_found, leading_digits
from evaluation.needle.wording import CITIES, NEEDLE, PROMPT_KINDS
from parallel.errors import ConfigurationError
from tests.evaluation.text import book, small_tokenizer

LENGTH, NEW_TOKENS = 512, 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def haystack(tokenizer: Tokenizer) -> Haystack:
    return Haystack(tokenizer.encode(book()[60_000:70_000]), numbers=0)


@pytest.mark.parametrize("kind", PROMPT_KINDS)
@pytest.mark.parametrize("unit", [1, 8])
@pytest.mark.parametrize("depth", [0, 10, 50, 100])
def test_the_needle_stands_at_its_depth(
    tokenizer: Tokenizer, haystack: Haystack, kind: str, unit: int, depth: int
) -> None:
    builder = PromptBuilder(tokenizer, unit, NEW_TOKENS, seed=3)
    sample = builder.sample(haystack, kind, LENGTH, depth, index=0)
    assert len(sample.prompt) == (LENGTH - NEW_TOKENS) // unit * unit
    found = re.search(r"magic (\w+) number is: (\d{7})\.", tokenizer.decode(sample.prompt))
    assert found is not None
    assert found[2] == sample.number
    needle = tokenizer.encode(NEEDLE.format(city=found[1], number=sample.number))
    frame = PROMPT_KINDS[kind]
    before, after = tokenizer.encode(frame.before), tokenizer.encode(frame.after.format(city=found[1]))
    behind = sample.needle_start + len(needle)
    assert sample.prompt[sample.needle_start : behind] == needle
    assert sample.prompt[: len(before)] == before
    assert sample.prompt[-len(after) :] == after
    text = sample.prompt[len(before) : sample.needle_start] + sample.prompt[behind : len(sample.prompt) - len(after)]
    assert abs((sample.needle_start - len(before)) / len(text) - depth / 100) <= 0.5 / len(text)
    ring = [*haystack.token_ids, *haystack.token_ids]
    assert any(ring[start : start + len(text)] == text for start in range(len(haystack.token_ids)))


def test_a_sample_is_a_function_of_seed_length_depth_and_number(tokenizer: Tokenizer, haystack: Haystack) -> None:
    def prompt(seed: int = 0, length: int = LENGTH, depth: float = 50, index: int = 0) -> list[int]:
        return PromptBuilder(tokenizer, 4, NEW_TOKENS, seed).sample(haystack, "verbatim", length, depth, index).prompt

    assert prompt() == prompt() == prompt(depth=50.0)
    others = [prompt(seed=1), prompt(length=LENGTH + 4), prompt(depth=60), prompt(index=1)]
    assert all(other != prompt() for other in others)
    builder = PromptBuilder(tokenizer, 4, NEW_TOKENS, seed=0)
    numbers = {builder.sample(haystack, kind, LENGTH, 50, 0).number for kind in PROMPT_KINDS}
    assert len(numbers) == 1, "all kinds hide the same needle"


def test_the_verbatim_question_repeats_the_needle(tokenizer: Tokenizer) -> None:
    assert NEEDLE.startswith(PROMPT_KINDS["verbatim"].after)
    asked = tokenizer.encode(PROMPT_KINDS["verbatim"].after.format(city="Oslo"))
    assert tokenizer.encode(NEEDLE.format(city="Oslo", number="1234567"))[: len(asked)] == asked
    assert len(set(CITIES)) == len(CITIES) > 60


def test_a_short_haystack_is_repeated_with_a_warning(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.txt").write_text("Call 1234567, not 12345678.\n")
    (tmp_path / "a.txt").write_text("A bee.")
    haystack = read_haystack(tmp_path, "--haystack", tokenizer, 1000)
    text = "A bee.\n\nCall 1234567, not 12345678.\n\n"
    assert tokenizer.decode(haystack.token_ids) == text
    assert haystack.numbers == 1
    assert "is repeated to fill a context of 1,000" in capsys.readouterr().err
    size = len(haystack.token_ids)
    assert tokenizer.decode(haystack.window(size * 5, size * 3)) == text * 3
    assert haystack.window(size - 1, 3) == [haystack.token_ids[-1], *haystack.token_ids[:2]]


def test_bad_haystacks_and_lengths_are_one_sentence(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="absent does not exist"):
        read_haystack(tmp_path / "absent", "--haystack", tokenizer, 100)
    with pytest.raises(DataError, match=r"--haystack .* finds no file"):
        read_haystack(tmp_path, "--haystack", tokenizer, 100)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt holds no document"):
        read_haystack(tmp_path, "--haystack", tokenizer, 100)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"--haystack .* holds no text"):
        read_haystack(tmp_path, "--haystack", tokenizer, 100)
    builder = PromptBuilder(tokenizer, 4, NEW_TOKENS, seed=0)
    with pytest.raises(
        ConfigurationError, match=r"--needle-lengths 64 is too short.*the answer 20; use (\d+)"
    ) as error:
        builder.check_lengths([64], list(PROMPT_KINDS), "--needle-lengths")
    smallest = int(re.findall(r"\d+", str(error.value))[-1])
    builder.check_lengths([smallest], list(PROMPT_KINDS), "--needle-lengths")
    haystack = Haystack(tokenizer.encode(book()[:2000]), numbers=0)
    assert len(builder.sample(haystack, "gemini", smallest, 50, 0).prompt) == (smallest - NEW_TOKENS) // 4 * 4


def test_answers_are_judged_by_their_digits() -> None:
    assert is_found(" 1234567. The", "1234567")
    assert not is_found(" 123456", "1234567")
    assert leading_digits(" 1234567.", "1234567") == 7
    assert leading_digits("It is 1239567", "1234567") == 3
    assert leading_digits("9, and 1234567", "1234567") == 0, "the first digits count"
    assert leading_digits("none", "1234567") == leading_digits("", "1234567") == 0
    assert pytest.approx(0.1235, abs=1e-4) == RANDOM_LEADING_DIGITS
