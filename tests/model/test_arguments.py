"""Arguments of blocks: equal tensors kept once, shared objects one object within a stream and apart between streams."""

from collections import UserDict
from types import SimpleNamespace

import torch

from sparsegpt.model.arguments import SharedArguments, tensors_within, to_device, with_own_objects


def test_tensors_that_are_equal_for_every_micro_batch_are_kept_once():
    shared = SharedArguments()
    first = shared.share({"rotary": torch.ones(3), "own": torch.zeros(2)})
    second = shared.share({"rotary": torch.ones(3), "own": torch.ones(2)})
    assert second["rotary"] is first["rotary"]
    assert torch.equal(second["own"], torch.ones(2))


def test_one_tensor_given_twice_is_one_tensor_still():
    mask = torch.ones(2)
    found = SharedArguments().share(([mask], {"mask": mask}))
    assert found[0][0] is found[1]["mask"]


def test_stores_are_shared_within_a_stream_and_not_between_streams():
    store, state = UserDict(), SimpleNamespace(seen={})
    calls = ({"store": store, "state": state}, {"store": store, "state": state})
    dense, pruned = with_own_objects(calls), with_own_objects(calls)
    dense[0]["store"]["keys"] = torch.ones(1)
    dense[0]["state"].seen["keys"] = torch.ones(1)
    assert "keys" in dense[1]["store"]
    assert "keys" in dense[1]["state"].seen
    assert not pruned[0]["store"]
    assert not pruned[0]["state"].seen
    assert not store
    assert (tensors_within(dense), tensors_within(pruned)) == (4, 0)


def test_named_tuples_and_tensors_come_through():
    tensor = torch.ones(2)
    found = with_own_objects((torch.Size([2]), torch.return_types.max((tensor, tensor)), "text", None, torch.float32))
    assert found[0] == torch.Size([2])
    assert found[1].values is tensor
    assert found[2:] == ("text", None, torch.float32)


def test_a_store_that_is_moved_is_the_same_object():
    store = UserDict(keys=(torch.ones(1), torch.zeros(1)))
    assert to_device(store, torch.device("meta")) is store
    assert all(tensor.is_meta for tensor in store["keys"])
    plain = {"a": [torch.ones(1)]}
    assert to_device(plain, torch.device("meta")) is plain
    assert plain["a"][0].is_meta
