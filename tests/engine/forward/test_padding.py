from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from symprune_lightning import PruningWarning, prune_model
from symprune_lightning.engine.forward.padding import aligned, valid_tokens

VALID = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ((2, 3), VALID),
        ((3, 2), VALID.T),
        ((2, 3, 4), VALID[:, :, None].expand(2, 3, 4)),
        ((6,), VALID.flatten()),
        ((2, 1, 3), VALID[:, None]),
        ((1, 6), VALID.view(1, 6)),
        ((5,), None),
        ((4, 3), None),
    ],
)
def test_layouts(axes, expected):
    found = aligned(VALID, axes)
    assert (found is None) == (expected is None)
    assert expected is None or torch.equal(found, expected)


def test_rows_of_an_expert():
    rows = torch.tensor([True, False, True])
    assert torch.equal(aligned(rows, (3,)), rows)
    assert aligned(rows, (2, 3)) is None


class SequenceFirst(nn.Module):
    def __init__(self, is_sequence_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_sequence_first = is_sequence_first
        self.embedding, self.linear = nn.Embedding(64, 32), nn.Linear(32, 32)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        return self.linear(x.transpose(0, 1) if self.is_sequence_first else x)


def test_hidden_states_with_the_sequence_first():
    ids, mask = torch.randint(3, 64, (4, 12)), torch.zeros(4, 12, dtype=torch.long)
    for row, length in enumerate((12, 3, 6, 2)):
        mask[row, :length] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    masks = [prune_model(SequenceFirst(first), [batch], score="wanda").masks for first in (0, 1)]
    assert torch.equal(masks[0]["linear"], masks[1]["linear"])


def encoder_decoder() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return tf.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("length", [6, 8])
def test_encoder_and_decoder(length):
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 2:] = 0
    batch = {
        "input_ids": torch.randint(3, 64, (2, 8)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, 64, (2, length)),
    }
    model = encoder_decoder()
    if length == 8:
        with pytest.warns(
            PruningWarning, match="encoder and decoder sequences.*pad to another length"
        ):
            result = prune_model(model, [batch], score="wanda")
    else:
        result = prune_model(model, [batch], score="wanda")
    tokens = {report.name: report.tokens for report in result.layers}
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == 2 * length
    real = 16 if length == 8 else 10
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == real
    assert tokens["decoder.block.0.layer.1.EncDecAttention.k"] == real


def test_a_square_batch_is_ambiguous():
    mask = torch.ones(3, 3)
    mask[0, 1:] = 0
    with pytest.warns(PruningWarning, match="as many sequences as tokens"):
        assert valid_tokens({"attention_mask": mask}, nn.Linear(1, 1)) is None


def test_no_mask_no_padding():
    model = encoder_decoder()
    assert valid_tokens([torch.ones(2, 3)], model) is None
    assert valid_tokens({"attention_mask": torch.ones(2, 3)}, model) is None
    assert valid_tokens({"attention_mask": torch.zeros(2, 1, 3, 3)}, model) is None
