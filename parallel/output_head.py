"""The last piece of the model: final norm, head over the vocabulary, cross entropy."""

from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.config import ModelConfig
from parallel.inputs import ModelInputs
from parallel.linear import ColumnLinear, column_parallel
from parallel.linear_cross_entropy import linear_cross_entropy, score_targets
from parallel.norms import build_norm


class VocabularyHead(ColumnLinear):
    """Linear layer to the vocabulary, split over the tensor-parallel group, and the cross entropy of what it gives.

    One module, because ZeRO 3 has a weight gathered only while its own module runs.
    """

    def forward(self, hidden: Tensor, inputs: ModelInputs | None = None) -> Tensor:
        """Hidden states -> this rank's logits [..., V / TP]; with inputs, what OutputHead returns."""
        if inputs is None:
            logits: Tensor = super().forward(hidden)[0]
            return logits
        gather = (
            gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        )
        rows = gather(hidden, group=parallel_state.get_tensor_model_parallel_group())
        score = score_targets if inputs.scores_greedy else linear_cross_entropy
        return score(rows, self.weight, inputs.targets, inputs.target_mask)


class OutputHead(nn.Module):
    """Final norm, head over the vocabulary and cross entropy."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        width = config.stacks[-1].hidden_size
        # The last leading position predicts the block's first token; vanilla keeps every position.
        first = config.leading_positions - 1
        self.predicting = slice(first, first + config.block_length) if config.is_block else slice(None)
        self.norm = build_norm(width, config.backbone, megatron)
        self.head = column_parallel(
            width,
            config.vocab_size,
            megatron,
            bias=False,
            own_weight=not config.tie_word_embeddings,
            layer_class=VocabularyHead,
        )

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """Hidden states -> cross entropy per target, fp32, shape of inputs.targets; 0 for targets that do not count.

        With inputs.scores_greedy it comes first of two, [2, ...]; second whether the target is the most likely token.
        """
        loss: Tensor = self.head(self.norm(hidden[:, self.predicting]), inputs)
        return loss

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states -> logits over the whole vocabulary, [N * B, L, V] or [S, B, V]."""
        return self.logits_of(hidden[:, self.predicting])

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] over the whole vocabulary of chosen positions [..., D]."""
        return gather_from_tensor_model_parallel_region(
            self.head(self.norm(hidden)), group=parallel_state.get_tensor_model_parallel_group()
        )


def tie_head(output: nn.Module, table: nn.Module) -> None:
    """Makes the head's weight the embedding table of an input piece on the same stage."""
    assert isinstance(output, OutputHead)
    output.head.weight = table.get_parameter("embedding.weight")
