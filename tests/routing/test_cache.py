"""What a cache says of ids, masks and positions, in numbers; no model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from hf_dataopt.errors import DroppedTokensError
from hf_dataopt.routing.cache import RoutedCache

KNOWN = [5, 6, 7]


class Known(RoutedCache):
    """Holds `length` tokens, the first three of them known."""

    def __init__(self, length: int = 3, read: Any = None, known: bool = True) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.length, self.known = length, known
        self.read_ids = torch.tensor(read) if isinstance(read, list) else read

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def known_ids(self) -> torch.Tensor | None:
        return torch.tensor([KNOWN]) if self.known else None


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_ids_that_begin_with_the_cache() -> None:
    assert Known().begins(ids([*KNOWN, 9])) and Known().begins(ids([*KNOWN, 9], [*KNOWN, 8]))
    assert not Known().begins(ids(KNOWN)), "one more token at least"
    assert not Known().begins(ids([*KNOWN, 9])[0]) and not Known(known=False).begins(ids([*KNOWN, 9]))
    assert not Known().begins(ids([5, 6, 0, 9])) and not Known().begins(ids([*KNOWN, 9], [0, 6, 7, 9]))
    one = Known(5, [[1, 2]])
    assert one.begins(ids([*KNOWN, 1, 2, 9])) and one.begins(ids([*KNOWN, 1, 2, 9], [*KNOWN, 1, 2, 8]))
    assert not one.begins(ids([*KNOWN, 1, 2])) and not one.begins(ids([*KNOWN, 1, 3, 9]))
    assert not one.begins(ids([*KNOWN, 0, 2, 9])) and not one.begins(ids([*KNOWN, 1, 2, 9], [*KNOWN, 1, 3, 8]))
    two = Known(4, [[1], [2]])
    rows = [[*KNOWN, n, 9] for n in (1, 1, 2, 2)]
    assert two.begins(ids(*rows)) and two.begins(ids(rows[0], rows[2]))
    assert not two.begins(ids(rows[0], rows[2], rows[0], rows[2])), "beams of a row stand together"
    assert not two.begins(ids(*rows[:3])) and not two.begins(ids(rows[0])), "not a multiple of the rows read"
    assert Known(5, False).begins(ids([*KNOWN, 1, 3, 9])), "nothing is known of embeddings"


def test_what_generate_is_about_to_cut() -> None:
    full, other = ids([*KNOWN, 9]), ids([1, 2, 3, 4])

    def cut(given: torch.Tensor, cache: RoutedCache | None = None, **kwargs: Any) -> Any:
        (Known() if cache is None else cache).prepare(given, kwargs)
        return kwargs.get("next_sequence_length")

    first: dict[str, Any] = {"is_first_iteration": True}
    assert cut(other, **first, next_sequence_length=1, inputs_embeds=torch.zeros(1)) == 1
    assert cut(other, Known(known=False), **first, next_sequence_length=1) == 1
    assert cut(full, **first, next_sequence_length=1) == 1
    with pytest.raises(DroppedTokensError, match="start with the 3 tokens"):
        cut(other, **first, next_sequence_length=1)
    for mask in (None, torch.ones(1, 4)):
        assert cut(full, **first, attention_mask=mask) == 1
        assert cut(ids([*KNOWN, 9, 9]), **first, attention_mask=None if mask is None else torch.ones(1, 5)) == 2
    assert cut(other, **first) is None, "new ids"
    with pytest.raises(DroppedTokensError):
        cut(other, **first, attention_mask=torch.ones(1, 4))
    assert cut(other, **first, attention_mask=torch.ones(1, 7)) is None, "new ids with a full-length mask"
    assert cut(full, **first, attention_mask=torch.ones(1, 7)) is None
    for again in (full, ids(KNOWN), ids(KNOWN[:1])):
        assert cut(again, next_sequence_length=1) == 1
        with pytest.raises(DroppedTokensError, match="again behind itself"):
            cut(again)
    for new in (other, ids([5, 6, 0, 1]), torch.zeros(1, 0, dtype=torch.int64), ids([*KNOWN, 9], [1, 2, 3, 4])):
        assert cut(new) is None


def test_positions_behind_padding_and_behind_the_cache() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert Known().positions(3, mask).tolist() == [[0, 1, 2], [2, 3, 0]]
    assert Known().positions(5, mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 0]]
    for ready in (None, torch.ones(1, 1, 2, 5), {"full": mask}):
        assert Known(4).positions(2, ready).tolist() == [[4, 5]]


def test_calls_that_do_not_continue_the_cache() -> None:
    Known().check_call(1, None)
    Known().check_call(2, torch.ones(1, 5))
    Known().check_call(2, torch.ones(1, 1, 2, 9))
    with pytest.raises(DroppedTokensError, match="no token is left after the 3 cached ones"):
        Known().check_call(0, None)
    for width in (4, 6, 2):
        with pytest.raises(DroppedTokensError, match=f"covers {width} tokens, the cache 3 and the call 2"):
            Known().check_call(2, torch.ones(1, width))


def test_ids_are_remembered_call_by_call() -> None:
    cache = Known()
    cache._read(ids([1, 2]))
    cache._read(ids([3]))
    assert cache.read_ids.tolist() == [[1, 2, 3]]
    cache._read(ids([4], [5]))
    assert cache.read_ids.tolist() == [[1, 2, 3, 4], [1, 2, 3, 5]], "one row, then beams of it"
    cache._read(ids([6], [7], [8], [9]))
    assert cache.read_ids[:, -2:].tolist() == [[4, 6], [4, 7], [5, 8], [5, 9]]
    for lost in (ids([1], [2], [3]), torch.zeros(4, 1, 8)):
        one = Known(read=[[1], [2]])
        one._read(lost)
        assert one.read_ids is False
        one._read(ids([1], [2]))
        assert one.read_ids is False
    plain = Known(known=False)
    plain._read(ids([1, 2]))
    assert plain.read_ids is None


def test_cropping_forgets_read_ids_only() -> None:
    for remove, left in ((0, [[1, 2, 3]]), (-1, [[1, 2]]), (-2, [[1]]), (-3, None), (-5, None)):
        cache = Known(6, [[1, 2, 3]])
        cache.crop(remove)
        assert (None if cache.read_ids is None else cache.read_ids.tolist()) == left
    with pytest.raises(ValueError, match="got 1; pass -1"):
        Known().crop(1)


def test_a_view_becomes_the_cache_once_its_tokens_are_in() -> None:
    module, cache = torch.nn.Linear(1, 1), Known()
    view = cache.view(module, ids([8, 9]), None)
    assert view is not cache and view.origin is cache and view.opened_by is module
    assert cache.read_ids is None and view.read_ids.tolist() == [[8, 9]]
    with pytest.raises(ValueError, match="did not write its tokens"):
        view.close()
    view.length = 5
    assert view.close() is cache and cache.length == 5 and cache.read_ids.tolist() == [[8, 9]]
    assert cache.origin is None and cache.opened_by is None
    with pytest.raises(ValueError, match="call `cache.attach"):
        cache.check_open()
