"""Studies: each rule against its formula, masks at every step, rewinding and resuming to the bit; on a tiny model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsegpt.eval.studies import day_one, game, ticket
from sparsegpt.eval.studies import training as training_file
from sparsegpt.eval.studies.record import Plan, Record, in_words
from sparsegpt.eval.studies.training import LanguageTraining, Masked, Rule, gated, train
from sparsegpt.solvers.masks import layer_mask
from sparsegpt.sparsity import NM, Unstructured
from tests.support import refused

STEPS = 6


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """To judge and to calibrate takes most of the time on so small a model."""
    monkeypatch.setattr(training_file, "HELD_OUT_WINDOWS", 2)
    monkeypatch.setattr(training_file, "CALIBRATION_WINDOWS", 2)


def training(**options: Any) -> LanguageTraining:
    return LanguageTraining("tiny", STEPS, **{"seed": 0, **options})


def random_masks(of: LanguageTraining, zeros: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    chances = {name: torch.rand(weight.shape, generator=generator) for name, weight in of.linears().items()}
    return {name: layer_mask(chance, Unstructured(zeros)) for name, chance in chances.items()}


class Watched(Rule):
    """Another rule, of which every step is looked at by `check`, when the model has computed and after the step."""

    def __init__(self, rule: Rule, check: Any) -> None:
        self.rule, self.check, self.checked = rule, check, 0

    def before(self, step: int) -> None:
        self.rule.before(step)

    def gradients(self, step: int) -> bool:
        self.check("computed")
        return self.rule.gradients(step)

    def after(self, step: int) -> None:
        self.rule.after(step)
        self.check("stepped")
        self.checked += 1

    def finish(self) -> None:
        self.rule.finish()


def test_a_mask_is_exact_at_every_step_and_what_is_kept_moves() -> None:
    one = training()
    one.run(end=2)  # so that Adam remembers gradients of what the mask then removes
    masks, before = random_masks(one, 0.5), {name: weight.clone() for name, weight in one.linears().items()}

    def check(when: str) -> None:
        assert all(torch.equal(weight != 0, masks[name]) for name, weight in one.linears().items())

    watched = Watched(Masked(one.model, masks), check)
    one.run(2, rule=watched)
    assert watched.checked == STEPS - 2
    assert all((weight != before[name])[masks[name]].all() for name, weight in one.linears().items())


def test_rewinding_restores_the_bits_and_repeats_the_training() -> None:
    one = training()
    start = one.state()
    one.run(end=2)
    early = one.state()
    one.run(2)
    late = one.state()
    other = training(seed=5, order=0)
    for state in (start, early):
        other.restore(state)
        assert other.state().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state().items())
    other.run(2)
    assert all(torch.equal(tensor, late[name]) for name, tensor in other.state().items())
    assert any(not torch.equal(tensor, early[name]) for name, tensor in other.state().items())


def test_masks_of_a_round_lose_the_smallest_of_what_is_left() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(10, 20, generator=generator)}
    masks = {"w": torch.ones(10, 20, dtype=torch.bool)}
    for rounds in (1, 2, 3):
        weights["w"].masked_fill_(~masks["w"], 0)
        after = ticket.next_masks(weights, masks, rounds)["w"]
        assert int((~after).sum()) == round((1 - 0.8**rounds) * 200)
        assert not (after & ~masks["w"]).any()
        left, gone = weights["w"].abs()[after], weights["w"].abs()[masks["w"] & ~after]
        assert gone.max() < left.min()
        masks = {"w": after}


def test_sr_ste_has_its_gradient_and_computes_with_two_of_four() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(8, 3, bias=False).double(), torch.randn(5, 8, dtype=torch.float64)
    weight = model.weight.detach().clone()
    order = weight.view(3, 2, 4).abs().argsort(-1).argsort(-1)
    mask = (order >= 2).view(3, 8)
    rule = day_one.StraightThrough({"weight": model.weight}, NM(2, 4))
    rule.before(0)
    assert torch.equal(model.weight, weight.masked_fill(~mask, 0))
    torch.autograd.backward((model(inputs) ** 3).sum())
    assert rule.gradients(0)
    # d/dV sum (x V^T)^3 at V = mask * W, by hand
    of_used = (3 * (inputs @ (mask * weight).T) ** 2).T @ inputs
    torch.testing.assert_close(model.weight.grad, of_used + 2e-4 * (~mask) * weight)
    assert torch.equal(model.weight, weight)


def test_sr_ste_keeps_two_of_four_at_every_step() -> None:
    one = training()
    rule = day_one.StraightThrough(one.linears(), NM(2, 4))

    def check(when: str) -> None:
        kept = {int(n) for weight in one.linears().values() for n in (weight.view(-1, 4) != 0).sum(1).unique()}
        assert kept == {2} if when == "computed" else 4 in kept

    one.run(rule=Watched(rule, check))
    check("computed")


def test_rigl_drops_and_grows_by_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(6, 10, generator=generator) for _ in range(2))
    mask = layer_mask(torch.rand(6, 10, generator=generator), Unstructured(0.5))
    stay, come = day_one.drop_and_grow(weight * mask, gradient, mask, 0.2)
    places = range(60)
    kept = [place for place in places if mask.flatten()[place]]
    by_size = sorted(kept, key=lambda place: abs(float(weight.flatten()[place])))
    expected = set(by_size[6:])  # a fifth of 30 leaves
    assert {place for place in places if stay.flatten()[place]} == expected
    rest = sorted(set(places) - expected, key=lambda place: -abs(float(gradient.flatten()[place])))
    assert {place for place in places if come.flatten()[place]} == set(rest[:6])


def test_rigl_keeps_counts_moves_until_three_quarters_and_grows_from_zero() -> None:
    one = training()
    masks = random_masks(one, 0.7)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    rule = day_one.RigL(one.model, dict(masks), STEPS)
    assert [step for step in range(STEPS) if rule.moves(step)] == [1, 2, 3]  # of 6 steps, the last before 4.5

    def check(when: str) -> None:
        for name, weight in one.linears().items():
            assert int(rule.masks[name].sum()) == counts[name]
            assert not weight[~rule.masks[name]].any()

    one.run(rule=Watched(rule, check))
    assert all(not torch.equal(rule.masks[name], mask) for name, mask in masks.items())
    published = day_one.RigL(one.model, random_masks(one, 0.7), 100_000)
    assert (published.interval, published.end) == (100, 75_000)


def test_the_share_that_rigl_drops_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, shares = training(), []
    rule = day_one.RigL(one.model, random_masks(one, 0.5), STEPS)
    drop_and_grow = day_one.drop_and_grow

    def noted(weight: Tensor, gradient: Tensor, mask: Tensor, share: float) -> Any:
        shares.append(share)
        return drop_and_grow(weight, gradient, mask, share)

    monkeypatch.setattr(day_one, "drop_and_grow", noted)
    one.run(end=3, rule=rule)
    assert sorted(set(shares), reverse=True) == pytest.approx([0.15 * (1 + math.cos(math.pi * t / 4)) for t in (1, 2)])


def test_the_gradient_of_the_utility_against_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(5, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    benefit = torch.randn(5, generator=generator, dtype=torch.float64)
    theta = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    setting, h = game.Setting(beta=0.3, gamma=0.2, alpha=1.5, eta=0.4), 1e-6
    found = game.utility_gradient(gates, benefit, theta, setting)
    for unit in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[unit] = h
        more, less = (game.utility(moved, benefit, theta, setting)[unit] for moved in (gates + step, gates - step))
        assert float(found[unit]) == pytest.approx(float((more - less) / (2 * h)), rel=1e-6)


def test_the_utility_is_the_papers() -> None:
    gates, benefit = torch.tensor([0.5, 1.0]), torch.tensor([2.0, -1.0])
    theta = torch.tensor([[1.0, 2.0], [3.0, 1.0]])  # squares 5 and 10, product 5
    found = game.utility(gates, benefit, theta, game.Setting(beta=0.1, gamma=0.3, alpha=2.0, eta=0.01))
    first = 2 * 0.5 * 2 - 0.1 * 5 * 0.25 - 0.3 * 0.5 - 0.01 * 0.5 * 1.0 * 5
    second = 2 * 1.0 * -1 - 0.1 * 10 * 1 - 0.3 * 1.0 - 0.01 * 1.0 * 0.5 * 5
    assert found.tolist() == pytest.approx([first, second])


@pytest.mark.parametrize("benefit", game.BENEFITS.values())
def test_a_step_of_the_game_is_projected_ascent(benefit: float) -> None:
    """<dL, theta> by the gradient for the weights that are used, s theta, which a second model has as its own."""
    torch.manual_seed(0)
    layer, inputs, rate = nn.Linear(6, 4), torch.randn(9, 6), 0.5
    setting = game.Setting(beta=0.2, gamma=0.1)
    rule = game.Game({"layer": layer}, setting, benefit, rate)
    used = nn.Linear(6, 4)
    with torch.no_grad():
        rule.gates["layer"].copy_(start := torch.tensor([0.9, 0.05, 1.0, 0.4]))
        used.weight.copy_(start[:, None] * layer.weight)
        used.bias.copy_(start * layer.bias)
    torch.autograd.backward(used(inputs).relu().square().mean())
    with gated({"layer": layer}, rule.gates):
        torch.autograd.backward(layer(inputs).relu().square().mean())
    assert used.weight.grad is not None and used.bias.grad is not None
    inner = (used.weight.grad * layer.weight).sum(1) + used.bias.grad * layer.bias
    norms = layer.weight.square().sum(1) + layer.bias.square()
    expected = (start + rate * (benefit * inner - 0.4 * norms * start - 0.1)).clamp(0, 1)
    rule.gradients(0)
    torch.testing.assert_close(rule.gates["layer"].detach(), expected.detach())
    rule.finish()
    assert rule.kept() == {"layer": int((expected >= 0.01).sum())}


def test_units_by_magnitude_and_gates_of_zero_remove_units() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5), nn.Linear(5, 2)
    gates = game.largest_units({"first": first}, {"first": 3})
    norms = first.weight.square().sum(1) + first.bias.square()
    kept = norms.argsort(descending=True)[:3].sort().values
    assert gates["first"].nonzero()[:, 0].tolist() == kept.tolist()
    inputs = torch.randn(4, 6)
    with gated({"first": first}, gates):
        found = second(first(inputs).relu())
    smaller = (inputs @ first.weight[kept].T + first.bias[kept]).relu() @ second.weight[:, kept].T + second.bias
    torch.testing.assert_close(found, smaller)
    assert not torch.allclose(found, second(first(inputs).relu()))  # outside, the hooks are gone


def test_digits_are_divided_and_scaled() -> None:
    found = game.digits(0)
    assert [tuple(part.shape) for part in found] == [(1438, 784), (1438,), (359, 784), (359,)]
    assert 0 <= float(found.train.min()) < float(found.train.max()) <= 1
    assert not torch.equal(found.test, game.digits(1).test)


def without_seconds(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "study.json").read_text())
    del content["sha256"]
    for one in content["trainings"].values():
        assert one.pop("seconds") > 0 and one.pop("cpu_seconds") > 0
    return content


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("study", [ticket, day_one, game], ids=lambda study: study.__name__.rpartition(".")[2])
def test_a_killed_study_goes_on_and_finds_the_same(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticket, "ROUNDS", 2)
    monkeypatch.setattr(day_one, "PATTERNS", {"unstructured": ("0.5",), "2:4": ("2:4",)})
    monkeypatch.setattr(game, "SETTINGS", game.SETTINGS[1:2])
    monkeypatch.setattr(game, "LANGUAGE_SETTINGS", game.LANGUAGE_SETTINGS[:1])
    plan = Plan(study.__name__, "tiny", 3)
    with Record.opened(tmp_path / "whole", plan) as record:
        record.finish(study.run(record, 1))
        assert study.tables(record, 1)
    told: list[str] = []

    def stop(line: str) -> None:
        told.append(line)
        if len(told) == 4:
            raise StoppedError

    with pytest.raises(StoppedError), Record.opened(tmp_path / "killed", plan, stop) as record:
        study.run(record, 1)
    with Record.opened(tmp_path / "killed", plan, told.append) as record:
        record.finish(study.run(record, 1))
    assert without_seconds(tmp_path / "killed") == without_seconds(tmp_path / "whole")
    assert len(told) == len(set(told)) == len(without_seconds(tmp_path / "whole")["trainings"])


def test_another_study_and_another_size_are_refused(tmp_path: Path, run_cli: Any) -> None:
    with Record.opened(tmp_path / "out", Plan("ticket", "tiny", 3)) as record:
        record.once("dense-0", lambda: ({"bits_per_byte": 1.0}, {}))
    with refused("holds another study"), Record.opened(tmp_path / "out", Plan("ticket", "tiny", 4)):
        pass
    run_cli("study", "ticket", "--size", "bose", "--out", tmp_path / "other").refused("did you mean base", "--size")


def test_the_command_draws_and_prints(tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(day_one, "PATTERNS", {"2:4": ("2:4",)})
    monkeypatch.setattr(day_one, "PANELS", {"2:4": day_one.PANELS["2:4"]})
    outcome = run_cli("study", "day-one", "--size", "tiny", "--steps", 2, "--seeds", 2, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "sparse from day one" in outcome.out and "one-shot at the end" in outcome.out
    rows = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert all(in_words(row["values"]) in outcome.out for row in rows)
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in ("study.png", "study.svg"))


def test_gradients_are_cut_and_rates_followed() -> None:
    model = nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    loss = 100 * torch.ones(1, 2)
    train(model, torch.optim.SGD(model.parameters(), 9.0), lambda step: model(loss).sum(), range(3), None,
          lambda step: 0.5**step, longest=1.0)  # fmt: skip
    torch.testing.assert_close(model.weight.detach(), start - 1.75 * torch.ones(1, 2) / math.sqrt(2))
