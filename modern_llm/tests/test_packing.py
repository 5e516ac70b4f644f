"""Packing as properties: no token lost, none twice, no row too long, and the batch of a step a
function of the step alone.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modern_llm.data import corpus, packing


quick = settings(max_examples=60, deadline=None, derandomize=True)
lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def cache_of(lengths, start=0, tokenizer="t", nats=None):
    """A token cache in memory whose tokens are all different."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(start, start + offsets[-1] + 1)
    return packing.TokenCache(Path("nowhere"), {"tokenizer": tokenizer}, tokens, offsets,
                              np.asarray(lengths) * 3, nats)


def naive_best_fit(lengths, capacity):
    """Best fit by looking at every row."""
    room, rows = [], []
    for length in lengths:
        fitting = [left for left in room if left >= length]
        if not fitting:
            room.append(capacity)
        rows.append(room.index(min(fitting)) if fitting else len(room) - 1)
        room[rows[-1]] -= length
    return room


@quick
@given(lengths_of, st.integers(40, 100))
def test_best_fit_leaves_the_room_that_a_slow_search_leaves(lengths, capacity):
    row = packing.best_fit_rows(lengths, capacity)
    fill = np.bincount(row, weights=lengths)
    assert sorted(capacity - fill) == sorted(naive_best_fit(lengths, capacity))


@quick
@given(lengths_of, st.integers(40, 100), st.randoms(use_true_random=False))
def test_packed_documents_fit_and_the_order_of_equals_changes_no_count(lengths, capacity, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    fills = []
    for found in (packing.pack_documents(lengths, capacity),
                  packing.pack_documents(lengths, capacity, np.array(order))):
        fill = np.bincount(found, weights=lengths)
        assert fill.max() <= capacity and fill.min() > 0 and len(found) == len(lengths)
        assert math.ceil(sum(lengths) / capacity) <= len(fill) <= 2 * sum(lengths) / capacity + 1
        fills.append(sorted(fill))
    assert fills[0] == fills[1]


@quick
@given(lengths_of, st.integers(40, 64), st.floats(0, 1))
def test_a_row_pattern_places_every_token_once(lengths, capacity, min_density):
    lengths = np.sort(lengths)[::-1]
    parts = packing.row_pattern(lengths, capacity, min_density)
    fill = np.bincount(parts["row"], weights=parts["length"])
    assert fill.max() <= capacity and fill.min() > 0
    for document, length in enumerate(lengths):
        mine = sorted(zip(parts["offset"][parts["document"] == document],
                          parts["length"][parts["document"] == document]))
        assert ([begin for begin, _ in mine]
                == [0, *itertools.accumulate(size for _, size in mine)][:-1])
        assert sum(size for _, size in mine) == length
    cut = parts["length"] < lengths[parts["document"]]
    assert min_density or not cut.any()
    assert len(fill) <= max(math.ceil(sum(lengths) / capacity),
                            sum(lengths) / capacity / max(min_density, 1e-9))


def spans(batch):
    """The runs of tokens that belong together in a batch: lists of (token, label)."""
    for ids, labels, segments in zip(
        *(batch[name].tolist() for name in ("input_ids", "labels", "segment_ids"))):
        for segment, run in itertools.groupby(
            zip(segments, ids, labels), key=lambda triple: triple[0]):
            if segment:
                yield [pair for _, *pair in run]
            else:
                assert all(label == -100 for *_, label in run)


@quick
@given(st.lists(lengths_of, min_size=1, max_size=3), st.integers(8, 64),
       st.integers(1, 5), st.floats(0, 1), st.integers(0, 9))
def test_an_epoch_scores_every_token_of_every_cache_once(corpora, context, batch_size,
                                                         min_density, seed):
    starts = np.cumsum([0, *(sum(lengths) + 1 for lengths in corpora)])
    caches = [cache_of(lengths, start) for lengths, start in zip(corpora, starts)]
    batches = packing.PackedBatches(caches, context, batch_size, seed, min_density=min_density)
    steps = math.ceil(2 * batches.rows_per_epoch / batch_size)
    rows = [row for step in range(steps)
            for row in zip(*(value.tolist() for value in batches(step).values()))]
    for epoch in range(2):
        mine = rows[epoch * batches.rows_per_epoch:(epoch + 1) * batches.rows_per_epoch]
        labels = sorted(label for _, row, _ in mine for label in row if label != -100)
        assert labels == sorted(int(token) for cache in caches for token in cache.tokens[1:])
    assert all(label == token + 1 for run in spans(batches(0)) for token, label in run), (
        "the label is the next token of the document")
    assert all(np.array_equal(batches(step)[name], value) for step in (steps // 2, 0)
               for name, value in batches(step).items())
    assert (batches.density
            == pytest.approx(batches.tokens_per_epoch / (batches.rows_per_epoch * context)))


@quick
@given(lengths_of, st.integers(8, 64), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 200)))
def test_validation_scores_every_token_of_the_head_once_and_knows_its_document(
    lengths, context, batch_size, limit
):
    cache = cache_of(lengths)
    head = cache.head(limit)
    found = list(packing.validation_batches(cache, context, batch_size, limit))
    labels = [(label, document) for batch in found
              for row, owners in zip(batch["labels"].tolist(), batch["document_ids"].tolist())
              for label, document in zip(row, owners) if label != -100]
    owner = np.repeat(range(len(head)), np.diff(head.offsets))
    assert sorted(labels) == list(zip(range(1, head.num_tokens + 1), owner))
    assert limit is None or head.num_tokens <= limit or len(head) == 1
    assert all(len(batch["labels"]) <= batch_size for batch in found)


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30))
def test_documents_longer_than_a_row_are_cut_into_pieces(first, second, context):
    pieces = packing.Pieces.of([cache_of([first, second])], context)
    assert (pieces.length.sum() == first + second and 1 <= pieces.length.min()
            and pieces.length.max() <= context)
    assert len(pieces.length) == math.ceil(first / context) + math.ceil(second / context)


@pytest.mark.fault("one-lacks")
@pytest.mark.parametrize("floors", [(1.0, None), (None, 1.0), (None, None), (1.0, 2.0)])
def test_a_data_card_has_no_number_that_json_lacks(floors, tmp_path):
    import json

    from modern_llm.files import write_json

    meta = {"tokenizer": "t", "source": "s", "split": "train", "where": "file", "licence": "",
            "fingerprint": "f"}
    caches = [
        packing.TokenCache(tmp_path, meta, *(cache.tokens, cache.offsets, cache.bytes), cache.nats)
        for floor in floors
        for cache in [cache_of([4, 5], nats=None if floor is None else np.full(2, floor))]]
    rows = corpus.data_card(caches).to_dict("records")
    assert ([row["floor bits per byte"] is None for row in rows]
            == [floor is None for floor in floors])
    assert (json.loads(json.dumps(rows, allow_nan=False))
            == json.loads(write_json(tmp_path / "card.json", rows).read_text()))


@quick
@given(lengths_of)
def test_caches_of_different_tokenizers_are_not_mixed(lengths):
    assume(len(lengths) > 1)
    with pytest.raises(packing.DataError, match="different tokenizers"):
        packing.Pieces.of([cache_of(lengths), cache_of(lengths, tokenizer="other")], 8)
