from pathlib import Path

from data.tokenizer import load_tokenizer
from inference.generator import Generator
from inference.sampling import SamplingConfig
from inference.text import continue_text
from tests.inference.models import small_config, small_stage
from tests.train.small_run import VOCABULARY, prepare_small_corpus

PROMPT = "It was a"
TOKENS = 60


def test_the_text_ends_at_the_end_of_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(prepare_small_corpus(tmp_path).parent / "tokenizer.model")
    config = small_config().model_copy(update={"vocab_size": VOCABULARY, "sequence_length": 256})
    generator = Generator(small_stage(config), tokenizer.eos_id)
    prompt = tokenizer.encode(PROMPT)
    stopped = most_pieces = 0
    for seed in range(12):
        sampling = SamplingConfig(temperature=50.0, seed=seed)  # close to uniform, so that the end comes up
        tokens = generator.generate([prompt], TOKENS, sampling)[0]
        end = tokens.index(tokenizer.eos_id) if tokenizer.eos_id in tokens else TOKENS
        pieces: list[str] = []
        made = continue_text(generator, tokenizer, PROMPT, TOKENS, sampling, pieces.append)
        assert made.text == tokenizer.decode(prompt + tokens[:end])
        assert made.text.startswith(PROMPT)
        assert "".join(pieces) == made.continuation
        assert (made.prompt_tokens, made.new_tokens) == (len(prompt), min(end + 1, TOKENS))
        assert 0 < made.first_seconds <= made.seconds
        most_pieces = max(most_pieces, len(pieces))
        stopped += end < TOKENS - 1
    assert stopped
    assert most_pieces > 3
