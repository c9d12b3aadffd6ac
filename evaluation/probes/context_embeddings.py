"""Which tokens the vectors of a context embedding lie next to (paper section 4.1, appendix S).

B sequences, N blocks, L block length, K vectors of a context embedding, V vocabulary.
"""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from data.tokenizer import Tokenizer
from evaluation.documents import DocumentChunks
from evaluation.probes.context_embeddings_result import ContextEmbeddingsResult, Example, NearestTokens
from parallel.config import ModelConfig
from parallel.errors import ConfigurationError
from parallel.inputs import MicroBatch, prepare_inputs
from parallel.stage import Stage
from parallel.token_inputs import TokenInput

COMMON_TOKENS = 5
EXAMPLES = 8
# Cosines that exist at once: 64 MiB.
MAXIMUM_COSINES = 2**24


def check_context_embeddings(model: ModelConfig) -> None:
    """Checks that a model has what is compared.

    Raises:
        ConfigurationError: it is vanilla, or its token decoder embeds no tokens.
    """
    if not model.is_block:
        raise ConfigurationError(
            "context_embeddings needs a model with model.architecture=block, and this one is vanilla; leave it out of "
            "--tasks"
        )
    if not model.embeds_local_tokens:
        raise ConfigurationError(
            f"context_embeddings compares with the token decoder's embedding table, and with model.block_length="
            f"{model.block_length} and model.token_decoder_input=prefix there is none; leave it out of --tasks"
        )


@torch.no_grad()
def probe_context_embeddings(
    stage: Stage, tokenizer: Tokenizer, chunks: DocumentChunks, batch_tokens: int
) -> ContextEmbeddingsResult:
    """Finds the nearest token, by cosine, of each vector and compares it with the tokens of the blocks around.

    Args:
        stage: the whole model.
        tokenizer: its tokenizer; rows of the table that only pad it are left out.
        chunks: text; whole blocks of the model.
        batch_tokens: tokens of a forward pass.
    """
    count, length = stage.model_config.num_context_vectors, stage.model_config.block_length
    # Hits [K, 2, L + 1]: in the current and the next block; by position, and anywhere. By chance: in another block.
    hits, chance = torch.zeros(2, count, 2, length + 1, dtype=torch.float64)
    frequencies = torch.zeros(count, tokenizer.vocab_size, dtype=torch.int64)
    examples: list[Example] = []
    blocks = 0
    for blocks_of_batch, nearest in _nearest(stage, tokenizer, chunks, batch_tokens):
        current, following, mine = blocks_of_batch[:-1], blocks_of_batch[1:], nearest[:-1]
        # Those of a block half a sequence away: as much like any other of the same text.
        others = mine.roll(max(1, len(mine) // 2), dims=0)
        for sums, tokens in ((hits, mine), (chance, others)):
            sums += torch.stack([_hits(tokens, block) for block in (current, following)], dim=1)
        for vector in range(count):
            frequencies[vector] += torch.bincount(mine[..., vector].flatten(), minlength=tokenizer.vocab_size)
        blocks += mine[..., 0].numel()
        if not examples:
            examples = _examples(tokenizer, current[:, 0], following[:, 0], mine[:, 0])
    return ContextEmbeddingsResult(
        blocks=blocks,
        vectors=tuple(
            NearestTokens(
                current=(hits[k, 0] / blocks).tolist(),
                following=(hits[k, 1] / blocks).tolist(),
                current_by_chance=(chance[k, 0] / blocks).tolist(),
                following_by_chance=(chance[k, 1] / blocks).tolist(),
                common=_common(tokenizer, frequencies[k]),
            )
            for k in range(count)
        ),
        examples=tuple(examples),
    )


def _nearest(
    stage: Stage, tokenizer: Tokenizer, chunks: DocumentChunks, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch, on the CPU: ids of the blocks [N, B, L], and the nearest token of each vector [N, B, K]."""
    config = stage.model_config
    expansion = cast(TokenInput, stage.piece("token_decoder.input"))
    assert expansion.embedding is not None
    table = F.normalize(expansion.embedding.weight[: tokenizer.vocab_size].float(), dim=-1)
    names = stage.names[: stage.names.index("token_decoder.input")]
    for batch in chunks.batches(batch_tokens, table.device):
        inputs = prepare_inputs(config, MicroBatch(batch, torch.ones_like(batch, dtype=torch.bool)))
        vectors = expansion.expand(stage.run(None, inputs, names)).flatten(0, 1)
        rows = max(1, MAXIMUM_COSINES // len(table))
        # The length of a vector does not change which token is nearest to it.
        nearest = torch.cat([(part.float() @ table.t()).argmax(dim=-1) for part in vectors.split(rows)])
        ids = inputs.token_ids.transpose(0, 1)
        yield ids.cpu(), nearest.view(*ids.shape[:2], -1).cpu()


def _hits(nearest: Tensor, block: Tensor) -> Tensor:
    """How often each vector's token [N, B, K] is each token of a block [N, B, L], and any of them: [K, L + 1]."""
    same = nearest[..., :, None] == block[..., None, :]
    return torch.cat((same, same.any(dim=-1, keepdim=True)), dim=-1).sum(dim=(0, 1)).double()


def _common(tokenizer: Tokenizer, frequencies: Tensor) -> tuple[tuple[str, float], ...]:
    """The tokens that are nearest most often, and how often."""
    counts, ids = frequencies.topk(COMMON_TOKENS)
    shares = (counts / frequencies.sum()).tolist()
    return tuple((_text(tokenizer, token), share) for token, share in zip(ids.tolist(), shares, strict=True) if share)


def _examples(tokenizer: Tokenizer, current: Tensor, following: Tensor, nearest: Tensor) -> list[Example]:
    """Blocks from all over a sequence: ids [N, L] of a block and the one behind it, nearest tokens [N, K]."""
    step = max(1, len(current) // EXAMPLES)
    return [
        Example(
            tokenizer.decode(current[place].tolist()),
            tokenizer.decode(following[place].tolist()),
            tuple(_text(tokenizer, token) for token in nearest[place].tolist()),
        )
        for place in range(0, len(current), step)
    ][:EXAMPLES]


def _text(tokenizer: Tokenizer, token: int) -> str:
    """A token for a person; the end of text has no characters."""
    return "<end of text>" if token == tokenizer.eos_id else tokenizer.decode([token])
