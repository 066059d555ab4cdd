"""Tensors that wait in the host's memory: empty meanwhile, afterwards as before, for all who hold them."""

from __future__ import annotations

import torch

from slime.backends.parking import Parking


def test_content_comes_back_for_views_and_holders_alike() -> None:
    base = torch.arange(12.0)
    view = base[4:8].view(2, 2)
    other = torch.ones(3, dtype=torch.bfloat16)
    parking = Parking()
    parking.park([view, other])
    assert base.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    parking.park([base])  # it is there already
    parking.unpark()
    assert torch.equal(base, torch.arange(12.0))
    assert torch.equal(view, torch.tensor([[4.0, 5.0], [6.0, 7.0]]))
    assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert torch.equal(other, torch.ones(3, dtype=torch.bfloat16))


def test_what_lies_among_what_stays_stays() -> None:
    kept, state = torch.arange(4.0), torch.ones(2)
    parking = Parking()
    parking.park([kept[:2], state], but=[kept])
    assert torch.equal(kept, torch.arange(4.0))
    assert state.untyped_storage().nbytes() == 0
    parking.unpark()
    assert torch.equal(state, torch.ones(2))


def test_a_model_trains_on_as_if_nothing_had_been() -> None:
    def train(parked: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        parking = Parking()
        for _ in range(3):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if parked:
                parking.park(value for state in optimizer.state.values() for value in state.values())
                parking.park(model.parameters())
                assert model.weight.untyped_storage().nbytes() == 0
                parking.unpark()
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(train(True), train(False), strict=True))
