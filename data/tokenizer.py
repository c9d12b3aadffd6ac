"""One interface to SentencePiece models and Hugging Face tokenizer.json files."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from data.errors import DataError

END_OF_TEXT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<end_of_text>",
    "<|end_of_sentence|>",
)


class Tokenizer(ABC):
    """Turns text into token ids and back.

    Attributes:
        path: The file it was loaded from.
        fingerprint: Hexadecimal SHA-256 of that file.
        vocab_size: One more than the largest token id.
        eos_id: Id of the token that ends a document.
    """

    def __init__(self, path: Path, fingerprint: str, vocab_size: int, eos_id: int) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.vocab_size = vocab_size
        self.eos_id = eos_id

    def encode(self, text: str) -> list[int]:
        """Encodes a text; no token is added, and text that spells a special token stays text.

        Args:
            text: Any text.

        Returns:
            Token ids.
        """
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes several texts, each as `encode` does."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decodes token ids to text; special tokens such as the end of text give no characters."""


class _SentencePieceTokenizer(Tokenizer):
    def __init__(self, path: Path, content: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise DataError(f"tokenizer {path} is no SentencePiece model ({error}); fetch or train it again") from None
        eos_id = self._processor.eos_id()
        if eos_id < 0:
            raise DataError(f"tokenizer {path} has no end-of-sentence token; train one with tools/train_tokenizer.py")
        super().__init__(path, hashlib.sha256(content).hexdigest(), self._processor.get_piece_size(), eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(token) for token in ids])
        return text


class _HuggingFaceTokenizer(Tokenizer):
    def __init__(self, path: Path, content: bytes) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # The library raises bare Exception and ValueError.
            raise DataError(f"tokenizer {path} is no Hugging Face tokenizer.json ({error}); fetch it again") from None
        # A file may carry the settings of whoever saved it; here a text is encoded whole and unpadded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Otherwise a document that mentions "<|endoftext|>" would be cut in two.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        eos_id = next((vocabulary[name] for name in END_OF_TEXT_NAMES if name in vocabulary), None)
        if eos_id is None:
            raise DataError(
                f"tokenizer {path} has no end-of-text token; its vocabulary needs one of {', '.join(END_OF_TEXT_NAMES)}"
            )
        super().__init__(path, hashlib.sha256(content).hexdigest(), max(vocabulary.values()) + 1, eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Loads a SentencePiece `.model` or a Hugging Face `tokenizer.json` (any name that ends in .json).

    Args:
        path: The tokenizer file.

    Returns:
        The tokenizer.

    Raises:
        DataError: The file is missing, of another kind, damaged, or has no end-of-text token.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"tokenizer file {path} does not exist; make one with tools/train_tokenizer.py")
    if path.suffix == ".model":
        return _SentencePieceTokenizer(path, path.read_bytes())
    if path.suffix == ".json":
        content = path.read_bytes()
        _check_tokenizer_json(path, content)
        return _HuggingFaceTokenizer(path, content)
    raise DataError(
        f"tokenizer file {path} is of an unknown kind; give a SentencePiece .model or a Hugging Face tokenizer.json"
    )


def _check_tokenizer_json(path: Path, content: bytes) -> None:
    """Catches the usual mix-up with the other JSON files beside a tokenizer.json."""
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise DataError(f"tokenizer {path} is no valid JSON ({error}); fetch it again") from None
    if not isinstance(parsed, dict) or "model" not in parsed:
        raise DataError(f'tokenizer {path} has no "model" entry; give the tokenizer.json, not one of its companions')
