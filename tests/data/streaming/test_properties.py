"""Random corpora, seeds, layouts and restart points."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.errors import DataError
from data.streaming.stream import SequenceStream
from tests.data.builders import EOS_ID, numbered_documents, write_split


class Corpus(NamedTuple):
    lengths: list[int]
    shard_tokens: int
    block_length: int
    sequence_blocks: int
    left: bool
    boundary: bool
    seed: int


corpora = st.builds(
    Corpus,
    lengths=st.lists(st.integers(1, 30), min_size=8, max_size=60),
    shard_tokens=st.integers(1, 120),
    block_length=st.sampled_from([1, 2, 4, 5, 8]),
    sequence_blocks=st.integers(1, 3),
    left=st.booleans(),
    boundary=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)


def open_corpus(corpus: Corpus, folder: str) -> SequenceStream:
    root = Path(folder) / str(len(list(Path(folder).iterdir())))
    write_split(root, numbered_documents(corpus.lengths), shard_tokens=corpus.shard_tokens)
    config = DataConfig(
        path=root,
        seed=corpus.seed,
        random_left_padding=corpus.left,
        pad_to_block_boundary=corpus.boundary,
        shuffle_window_shards=2,
        isolate_documents=corpus.boundary,
    )
    length = corpus.block_length * corpus.sequence_blocks
    try:
        return SequenceStream(config, "train", block_length=corpus.block_length, sequence_length=length)
    except DataError as error:
        if "gives 0 sequences" not in str(error):
            raise
        reject()


@settings(max_examples=40)
@given(corpora, st.integers(0, 2))
def test_every_token_comes_once_per_epoch_but_for_the_tails(corpus: Corpus, epoch: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stream = open_corpus(corpus, folder)
        count = stream.sequences_per_epoch
        read = stream.read(epoch * count, count)
        tokens = read.token_ids[read.mask]
        found = Counter(tokens[tokens != EOS_ID].tolist())
        assert set(found.values()) <= {1}
        (source,) = stream.sources
        tails = source.packed_lengths.sum() - count * stream.sequence_length
        missing = sum(corpus.lengths) + len(corpus.lengths) - int(read.mask.sum())
        assert 0 <= missing <= tails
        assert f"{tails:,} slots dropped at the ends of shards" in stream.describe()
        # Each end of text is real; whatever is masked is a pad.
        assert (tokens == EOS_ID).sum() <= len(corpus.lengths)
        assert (read.token_ids[~read.mask] == EOS_ID).all()
        if not corpus.left and not corpus.boundary:
            assert read.mask.all()


@settings(max_examples=40)
@given(corpora)
def test_no_block_mixes_documents_and_documents_are_told_apart(corpus: Corpus) -> None:
    corpus = corpus._replace(boundary=True)
    ends = np.cumsum(corpus.lengths)
    with tempfile.TemporaryDirectory() as folder:
        stream = open_corpus(corpus, folder)
        read = stream.read(0, stream.sequences_per_epoch)
        assert read.documents is not None
        blocks = (len(read.mask), -1, corpus.block_length)
        documents = read.documents.reshape(blocks)
        assert (documents == documents[:, :, :1]).all()
        # Token ids rise through the corpus, so they tell their document.
        real = read.mask & (read.token_ids != EOS_ID)
        of_token = np.searchsorted(ends, read.token_ids)
        for row in range(len(real)):
            pairs = set(zip(of_token[row][real[row]].tolist(), read.documents[row][real[row]].tolist(), strict=True))
            assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@settings(max_examples=25)
@given(corpora, st.integers(1, 4), st.integers(1, 3), st.integers(0, 200), st.data())
def test_all_layouts_and_restarts_read_the_same(
    corpus: Corpus, ranks: int, micro_batch: int, start: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        one = open_corpus(corpus, folder)
        steps, stride = 3, ranks * micro_batch
        whole = one.read(start, steps * stride)
        ids = one.sample_ids(start, steps * stride)
        restart = data.draw(st.integers(0, steps - 1))
        found, names = [], []
        for step in range(steps):
            for rank in range(ranks):
                stream = open_corpus(corpus, folder) if step == restart else one
                position = start + step * stride + rank * micro_batch
                found.append(stream.read(position, micro_batch))
                names += stream.sample_ids(position, micro_batch)
        np.testing.assert_array_equal(np.concatenate([part.token_ids for part in found]), whole.token_ids)
        np.testing.assert_array_equal(np.concatenate([part.mask for part in found]), whole.mask)
        assert names == ids


def test_left_pads_are_uniform() -> None:
    """Chi-squared over 20,000 documents; 3 degrees of freedom, 16.3 is the 99.9th percentile."""
    corpus = Corpus([3] * 20_000, 10_000, 4, 16, left=True, boundary=True, seed=5)
    with tempfile.TemporaryDirectory() as folder:
        stream = open_corpus(corpus, folder)
        read = stream.read(0, stream.sequences_per_epoch)
        firsts = np.flatnonzero((read.token_ids.ravel() % 3 == 1) & (read.token_ids.ravel() != EOS_ID))
        counts = np.bincount(firsts % 4, minlength=4)
        assert counts.sum() > 19_000
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 16.3
