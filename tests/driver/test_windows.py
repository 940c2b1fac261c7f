"""Calibration windows in the forms that people hold: the same tokens whatever they come in."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sparsegpt.driver.windows import micro_batches
from sparsegpt.model.decoder import DecoderModel
from tests.support import block_linears, prune_model, random_windows, refused, tiny_model

TOKENS = random_windows(6, 12)


@pytest.fixture(scope="module")
def decoder():
    return DecoderModel.of(tiny_model("llama"))


def forms():
    padded = torch.cat([TOKENS, torch.full((6, 3), 3)], dim=1)
    mask = torch.cat([torch.ones_like(TOKENS), torch.zeros(6, 3, dtype=torch.long)], dim=1)
    left = {"input_ids": padded.flip(1).tolist(), "attention_mask": mask.flip(1).tolist()}
    dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in TOKENS]
    return {
        "tensor": TOKENS,
        "int32": TOKENS.int(),
        "list of tensors": list(TOKENS),
        "list of batches": list(TOKENS.split(4)),
        "lists": TOKENS.tolist(),
        "tuple of lists": tuple(TOKENS.tolist()),
        "array": TOKENS.numpy(),
        "list of arrays": list(TOKENS.numpy()),
        "dictionary": {"input_ids": TOKENS},
        "dictionary of lists": {"input_ids": TOKENS.tolist()},
        "list of dictionaries": dataset,
        "padded": {"input_ids": padded, "attention_mask": mask},
        "padded on the left": {key: [row[::-1] for row in rows] for key, rows in left.items()},
        "loader": DataLoader(TOKENS, batch_size=4),
        "loader of dictionaries": DataLoader(dataset, batch_size=4),
        "generator": (row for row in TOKENS),
    }


@pytest.mark.parametrize("form", forms())
def test_every_form_gives_the_same_tokens(decoder, form):
    batches = micro_batches(forms()[form], decoder, 4)
    assert [tuple(batch.shape) for batch in batches] == [(4, 12), (2, 12)]
    assert torch.equal(torch.cat(batches), TOKENS)
    assert {batch.dtype for batch in batches} == {torch.long}


def test_windows_of_different_lengths_go_apart_and_padding_counts_nowhere(decoder):
    rows = [TOKENS[0], TOKENS[1, :5], TOKENS[2], TOKENS[3, :5]]
    padded = torch.full((4, 12), 3)
    mask = torch.zeros(4, 12, dtype=torch.long)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
        mask[number, : len(row)] = 1
    for windows in (rows, {"input_ids": padded, "attention_mask": mask}):
        batches = micro_batches(windows, decoder)
        assert [batch.tolist() for batch in batches] == [
            [TOKENS[0].tolist(), TOKENS[2].tolist()],
            [TOKENS[1, :5].tolist(), TOKENS[3, :5].tolist()],
        ]


@pytest.mark.parametrize("preset", ["paper", "default", "best"])
def test_padded_windows_prune_to_the_bits_of_the_same_windows_without_padding(preset):
    options = {"reconstruct": 1, "distill": 1, "look_ahead": 1} if preset == "best" else {}
    rows = [row[: 12 - 3 * (number % 2)] for number, row in enumerate(random_windows(12, 12))]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    results, reports = [], []
    for windows in (rows, {"input_ids": padded, "attention_mask": mask}):
        model = tiny_model("llama")
        reports.append(prune_model(model, windows, "2:4", preset=preset, **options))
        results.append({name: linear.weight.detach() for name, linear in block_linears(model).items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert {layer.tokens for layer in reports[1].layers} == {sum(map(len, rows))}


@pytest.mark.parametrize(
    "windows",
    [
        3,
        None,
        "text",
        [],
        {},
        [[]],
        [1, 2, 3],
        torch.zeros(8, dtype=torch.long),
        np.zeros((2, 3, 4), dtype=np.int64),
        [["a", "b"]],
        [[1.5, 2.5]],
        torch.zeros(2, 8),
        {"input_ids": TOKENS, "attention_mask": torch.zeros_like(TOKENS)},
    ],
    ids=str,
)
def test_other_forms_are_refused_with_what_was_expected(windows):
    with refused("expected calibration windows", "LongTensor [samples, sequence_length]", "found"):
        prune_model(tiny_model("llama"), windows, "2:4")


def test_a_mask_of_another_shape_is_refused():
    with refused("attention_mask", "6 rows of 4 tokens", "6 of 12"):
        prune_model(tiny_model("llama"), {"input_ids": TOKENS, "attention_mask": torch.ones(6, 4)}, "2:4")


@pytest.mark.parametrize("model_type", ["llama", "opt", "mpt", "gpt2"])
def test_windows_beyond_the_positions_are_refused_with_the_limit(model_type):
    model = tiny_model(model_type)
    limit = DecoderModel.of(model).positions
    assert limit
    with refused(f"{limit} positions", f"{limit + 1} tokens"):
        prune_model(model, random_windows(2, limit + 1), "2:4")
