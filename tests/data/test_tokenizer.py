import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.files import sha256_of_file
from data.preparation.tokenizer_training import train_sentencepiece
from data.tokenizer import Tokenizer, load_tokenizer

# SentencePiece spells the space as U+2581, so that one character comes back as a space.
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581\0"))


@pytest.fixture(scope="session", params=["sentencepiece_file", "tokenizer_json"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


@given(text=texts)
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.eos_id not in ids


@pytest.mark.parametrize(
    "text", ["", "  two  spaces  ", "\n\n\ttab\r\n", "<|endoftext|></s><s><unk>", "<0x0A>", "\U0001f600\ufeff"]
)
def test_text_that_tokenizers_often_change(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids


def test_attributes(tokenizer: Tokenizer) -> None:
    assert tokenizer.fingerprint == sha256_of_file(tokenizer.path)
    assert tokenizer.eos_id == (0 if tokenizer.path.suffix == ".model" else 1)
    assert tokenizer.vocab_size == (330 if tokenizer.path.suffix == ".model" else 300)


def test_batches_and_the_end_of_text(tokenizer: Tokenizer) -> None:
    batch = ["the river", "a" * 50, ""]
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]
    assert tokenizer.decode([*tokenizer.encode("stone"), tokenizer.eos_id]) == "stone"


def test_saved_truncation_and_padding_are_off(tokenizer_json: Path) -> None:
    saved = json.loads(tokenizer_json.read_text())
    assert saved["truncation"]
    assert saved["padding"]
    tokenizer = load_tokenizer(tokenizer_json)
    assert len(tokenizer.encode("river " * 30)) >= 30
    assert len(tokenizer.encode("a")) == 1


def test_training_is_deterministic_and_every_newline_is_one_token(corpus_file: Path, tmp_path: Path) -> None:
    for name in ("a.model", "b.model"):
        train_sentencepiece([corpus_file], 330, tmp_path / name, maximum_lines=100)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert len(load_tokenizer(tmp_path / "a.model").encode("\n\n\n")) == 3


def test_training_samples_from_all_of_the_input(corpus_file: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.txt"
    late.write_text("zyzzyva zyzzyva zyzzyva\n" * 5000)
    train_sentencepiece([corpus_file, late], 330, tmp_path / "a.model", maximum_lines=1000)
    tokenizer = load_tokenizer(tmp_path / "a.model")
    assert len(tokenizer.encode("zyzzyva zyzzyva")) <= 3


@pytest.mark.parametrize(
    ("vocab_size", "output", "message"),
    [
        (100, "a.model", "vocabulary size 100 is too small; give at least 320"),
        (50_000, "a.model", "no tokenizer of 50000 tokens can be trained on these files"),
        (330, "a.json", r"a.json must end in .model"),
    ],
)
def test_training_errors(corpus_file: Path, tmp_path: Path, vocab_size: int, output: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_sentencepiece([corpus_file], vocab_size, tmp_path / output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.model", b"no model", "is no SentencePiece model"),
        ("a.json", b"{", "is no valid JSON"),
        ("a.json", b'{"added_tokens": []}', 'has no "model" entry; give the tokenizer.json'),
        ("a.json", b'{"model": 1}', r"is no Hugging Face tokenizer.json"),
        ("a.vocab", b"", "is of an unknown kind"),
    ],
)
def test_bad_tokenizers_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_a_tokenizer_needs_an_end_of_text(tokenizer_json: Path, corpus_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json.read_text().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(DataError, match=r"no end-of-text token; its vocabulary needs one of <\|endoftext\|>, "):
        load_tokenizer(path)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus_file), model_prefix=str(tmp_path / "b"), vocab_size=50, eos_id=-1, minloglevel=2
    )
    with pytest.raises(DataError, match=r"no end-of-sentence token; train one with tools/train_tokenizer.py"):
        load_tokenizer(tmp_path / "b.model")
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "absent.model")
