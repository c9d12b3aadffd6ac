"""When attention needs a mask: without one, the fast causal kernels run."""

import torch

from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig
from parallel.inputs import MicroBatch, ModelInputs, prepare_inputs

STACK = DecoderConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
CONFIG = ModelConfig(vocab_size=16, sequence_length=16, block_decoder=STACK, token_decoder=STACK)


def inputs_with_padding(*padded: int) -> ModelInputs:
    """Two sequences of four blocks; these slots of the second one are padding."""
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, list(padded)] = False
    return prepare_inputs(CONFIG, MicroBatch(torch.ones(2, 16, dtype=torch.long), mask))


def test_no_padding_needs_no_mask() -> None:
    inputs = inputs_with_padding()
    assert inputs.global_mask is None
    assert inputs.local_mask is None


def test_padding_of_an_input_token_needs_a_local_mask() -> None:
    inputs = inputs_with_padding(9)
    assert inputs.global_mask is None
    assert inputs.local_mask is not None
    assert inputs.local_mask.shape == (8, 1, 5, 5)
    blocked = ~inputs.local_mask[:, 0] & torch.ones(5, 5, dtype=torch.bool).tril()
    expected = torch.zeros(8, 5, 5, dtype=torch.bool)
    expected[3, 3:, 3] = True  # block 2 of sequence 1 is decoded in row 3; its second token is key 3
    expected[6:, 2:, 2] = expected[6:, 3:, 3] = expected[6:, 4:, 4] = True  # the last rows have no target
    assert torch.equal(blocked, expected)


def test_padding_that_is_no_input_needs_no_local_mask() -> None:
    """The first block is not decoded, and the last token of a block is not read."""
    assert inputs_with_padding(0, 1, 7, 15).local_mask is None


def test_a_padded_block_needs_a_global_mask() -> None:
    mask = inputs_with_padding(4, 5, 6, 7).global_mask
    assert mask is not None
    assert torch.equal(mask[0, 0], torch.ones(4, 4, dtype=torch.bool).tril())
    assert mask[1, 0, :, 1].tolist() == [False] * 4
