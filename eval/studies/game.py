"""Pruning as a game (arXiv:2512.22106): every hidden unit is a player with a gate s in [0, 1], which starts at 1.

    U_i = alpha s_i <dL, theta_i> - beta |theta_i|^2 s_i^2 - gamma |s_i| - eta s_i sum_j s_j <theta_i, theta_j>, j not i
    s_i <- clip(s_i + rate dU_i/ds_i, 0, 1);  units with s_i < 0.01 leave at the end

theta_i: the weights into unit i and its bias. Its gate multiplies what goes into the ReLU, so that <dL, theta_i> for
the weights that are used, s_i theta_i, is dL/ds_i. That is negative for a unit that lowers the loss: the benefit as
written rewards harm. The study turns its sign, and switches it off.

The paper's data is MNIST. Here it is scikit-learn's digits, 8 x 8 pixels scaled up to 28 x 28: another, smaller and
easier data set. The paper takes 9380 steps at rate 0.001; fewer steps take a rate that moves the gates as far.

Dimension key: N units of a layer, D inputs of the layer and its bias, B samples."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise, product
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.studies.record import Figures, Kept, Panel, Plan, Record, Row, Tensors, grouped, in_words
from sparsegpt.eval.studies.training import LanguageTraining, Rule, gated, train
from sparsegpt.solvers.masks import row_mask

PAPER_STEPS, PAPER_RATE = 9380, 0.001
LEAST_GATE = 0.01
WIDTHS, PIXELS, CLASSES = (512, 256), 28, 10
BATCH, LEARNING_RATE = 128, 0.1
TEST_SHARE = 0.2
# The share of a training after which units leave by magnitude, so that the rest of it mends what that breaks.
EARLY = 0.9
# The language model's steps are so many times fewer.
FEWER = 10


@dataclass(frozen=True)
class Setting:
    """Weights of the terms of the utility."""

    beta: float
    gamma: float = 0.0
    alpha: float = 1.0
    eta: float = 0.0

    def __str__(self) -> str:
        return f"beta {self.beta:g}" + (f", gamma {self.gamma:g}" if self.gamma else "")


# Of the paper's table.
SETTINGS = (Setting(0.1), Setting(0.5), Setting(0.001, 0.1), Setting(0.05, 0.05))
LANGUAGE_SETTINGS = SETTINGS[1:3]
# What the benefit is multiplied by.
BENEFITS = {"as written": 1.0, "reversed": -1.0, "off": 0.0}
DIGITS, LANGUAGE = "digits", "language model"
PANELS = {
    DIGITS: Panel("share of the hidden units that left", "accuracy"),
    LANGUAGE: Panel("share of the MLP's hidden units that left", "held-out bits per byte"),
}


def utility(gates: Tensor, benefit: Tensor, theta: Tensor, setting: Setting) -> Tensor:
    """Gates [N], <dL, theta_i> [N], theta [N, D] -> U [N]."""
    norms = theta.square().sum(1)
    others = gates * (theta @ (gates @ theta)) - norms * gates.square()
    cost = setting.beta * norms * gates.square() + setting.gamma * gates.abs() + setting.eta * others
    return setting.alpha * gates * benefit - cost


def utility_gradient(gates: Tensor, benefit: Tensor, theta: Tensor, setting: Setting) -> Tensor:
    """Gates [N], <dL, theta_i> [N], theta [N, D] -> dU_i/ds_i [N]: each for its own gate, the others' as they are."""
    norms = theta.square().sum(1)
    gradient = setting.alpha * benefit - 2 * setting.beta * norms * gates - setting.gamma * gates.sign()
    if setting.eta:
        gradient -= setting.eta * (theta @ (gates @ theta) - norms * gates)
    return gradient


class Game(Rule):
    """Plays with the outputs of linears, by name. benefit: the benefit's factor; rate: of the gates."""

    def __init__(self, layers: dict[str, nn.Linear], setting: Setting, benefit: float, rate: float) -> None:
        self.layers, self.setting, self.benefit, self.rate = layers, setting, benefit, rate
        self.gates = {name: torch.ones(layer.out_features, requires_grad=True) for name, layer in layers.items()}

    @torch.no_grad()
    def gradients(self, step: int) -> bool:
        """One step of projected ascent for every gate; the weights' step comes after."""
        for name, layer in self.layers.items():
            gate, theta = self.gates[name], torch.cat([layer.weight, layer.bias[:, None]], 1)
            assert gate.grad is not None
            gradient = utility_gradient(gate, self.benefit * gate.grad, theta, self.setting)
            gate.add_(self.rate * gradient).clamp_(0, 1)
            gate.grad = None
        return True

    @torch.no_grad()
    def finish(self) -> None:
        """Units below the threshold leave."""
        for gate in self.gates.values():
            gate.masked_fill_(gate < LEAST_GATE, 0)

    def kept(self) -> dict[str, int]:
        """How many units of each layer are left."""
        return {name: int(gate.count_nonzero()) for name, gate in self.gates.items()}


@torch.no_grad()
def largest_units(layers: dict[str, nn.Linear], kept: dict[str, int]) -> dict[str, Tensor]:
    """Gates [N] by name, 0 or 1: so many units of each layer, those with the largest |theta_i|."""
    gates = {}
    for name, layer in layers.items():
        norms = (layer.weight.square().sum(1) + layer.bias.square())[None]
        gates[name] = row_mask(norms, norms.shape[1] - kept[name])[0].float()
    return gates


class Digits(NamedTuple):
    """Pixels from 0 to 1, [B, 784], and classes, LongTensor [B], of two sets."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor


@cache
def digits(seed: int) -> Digits:
    """scikit-learn's digits scaled up, divided by chance: pixels [B, 784].

    Raises SparseGPTError where scikit-learn is not installed.
    """
    if find_spec("sklearn") is None:
        raise SparseGPTError("scikit-learn, which has the digits, is not installed: pip install scikit-learn")
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    pixels = functional.interpolate(images, size=(PIXELS, PIXELS), mode="bilinear").flatten(1)
    classes, order = (
        torch.tensor(found.target),
        torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed)),
    )
    test, training = order.split([round(TEST_SHARE * len(order)), len(order) - round(TEST_SHARE * len(order))])
    return Digits(pixels[training], classes[training], pixels[test], classes[test])


class ClassifierTraining:
    """A classifier of digits in training by plain SGD: hidden layers with ReLUs, or, without any, a linear model."""

    def __init__(self, widths: tuple[int, ...], steps: int, seed: int) -> None:
        self.data, self.steps, self.seed = digits(seed), steps, seed
        torch.manual_seed(seed)
        sizes = (PIXELS**2, *widths, CLASSES)
        linears = [nn.Linear(*pair) for pair in pairwise(sizes)]
        self.model = nn.Sequential(*[part for linear in linears for part in (linear, nn.ReLU())][:-1])
        self.optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE)

    def run(self, first: int = 0, end: int | None = None, rule: Rule | None = None) -> None:
        """Steps first to end - 1."""
        train(self.model, self.optimizer, self._loss, range(first, self.steps if end is None else end), rule)

    def state(self) -> dict[str, Tensor]:
        """Copies of all weights, by name."""
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` copied: tensors by name."""
        self.model.load_state_dict(state)

    def units(self) -> dict[str, nn.Linear]:
        """The linears whose outputs are hidden units, by name."""
        linears = {name: module for name, module in self.model.named_children() if isinstance(module, nn.Linear)}
        return dict(list(linears.items())[:-1])

    @torch.no_grad()
    def judge(self) -> float:
        """Accuracy on the test set."""
        return float((self.model(self.data.test).argmax(1) == self.data.test_classes).float().mean())

    def _loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randint(len(self.data.train), (BATCH,), generator=generator)
        return functional.cross_entropy(self.model(self.data.train[chosen]), self.data.train_classes[chosen])


class LanguageGame(LanguageTraining):
    """The small language model, with the units of its MLPs as players."""

    def units(self) -> dict[str, nn.Linear]:
        """The linears whose outputs go into ReLUs, by name."""
        modules = dict(self.model.named_modules())
        return {name: module for name, module in modules.items() if name.endswith("fc1")}

    def judge(self) -> float:
        """Held-out bits per byte."""
        return self.bits_per_byte()


Player = ClassifierTraining | LanguageGame


@dataclass(frozen=True)
class Board:
    """What is played on. build(seed): a training of so many steps at its beginning."""

    panel: str
    build: Callable[[int], Player]
    settings: tuple[Setting, ...]
    steps: int


def boards(plan: Plan) -> tuple[Board, ...]:
    """The classifier, and the language model of the plan's size."""
    fewer = max(1, plan.steps // FEWER)
    return (
        Board(DIGITS, partial(ClassifierTraining, WIDTHS, plan.steps), SETTINGS, plan.steps),
        Board(LANGUAGE, partial(LanguageGame, plan.size, fewer), LANGUAGE_SETTINGS, fewer),
    )


def run(record: Record, seeds: int) -> list[Row]:
    """All trainings of the study, or those that are missing; returns the rows of its picture."""
    rows = []
    for board in boards(record.plan):
        for seed in range(seeds):
            trained = record.once(_key(board.panel, "dense", seed), partial(_dense, board, seed))
            if board.panel == DIGITS:
                record.once(_key(DIGITS, "linear", seed), partial(_linear, board.steps, seed))
            for setting, benefit in product(board.settings, BENEFITS):
                name = _key(board.panel, setting, benefit, seed)
                record.once(name, partial(_play, board, setting, benefit, trained, seed))
        rows += _rows(record, board, seeds)
    return rows


def _key(*parts: object) -> str:
    """The name of a training, which is a file's too."""
    return "-".join(str(part).replace(", ", "_").replace(" ", "_") for part in parts)


def _dense(board: Board, seed: int) -> tuple[Figures, Tensors]:
    training = board.build(seed)
    early = round(EARLY * board.steps)
    training.run(end=early)
    tensors = grouped("early", training.state())
    training.run(early)
    return {"score": training.judge()}, tensors | grouped("final", training.state())


def _linear(steps: int, seed: int) -> tuple[Figures, Tensors]:
    training = ClassifierTraining((), steps, seed)
    training.run()
    return {"score": training.judge()}, {}


def _play(board: Board, setting: Setting, benefit: str, trained: Kept, seed: int) -> tuple[Figures, Tensors]:
    """The game, and beside it units that leave the dense training by magnitude, as many of each layer."""
    training = board.build(seed)
    game = Game(training.units(), setting, BENEFITS[benefit], PAPER_RATE * PAPER_STEPS / board.steps)
    with gated(training.units(), game.gates):
        training.run(rule=game)
        score = training.judge()
    kept, early = game.kept(), round(EARLY * board.steps)
    figures = {
        "score": score,
        "removed": 1 - sum(kept.values()) / sum(len(gate) for gate in game.gates.values()),
        "magnitude": _by_magnitude(board, kept, trained.tensors("final"), board.steps, seed),
        "mended": _by_magnitude(board, kept, trained.tensors("early"), early, seed),
    }
    return figures | {f"kept {name}": float(count) for name, count in kept.items()}, {}


def _by_magnitude(board: Board, kept: dict[str, int], state: dict[str, Tensor], first: int, seed: int) -> float:
    """The score of a dense training that loses units before step `first`, and goes on from there."""
    training = board.build(seed)
    training.restore(state)
    with gated(training.units(), largest_units(training.units(), kept)):
        training.run(first)
        return training.judge()


def _figures(
    record: Record, board: Board, setting: Setting, benefit: str, seeds: int, figure: str
) -> tuple[float, ...]:
    return record.values(figure, *(_key(board.panel, setting, benefit, seed) for seed in range(seeds)))


def _rows(record: Record, board: Board, seeds: int) -> list[Row]:
    def lone(line: str, removed: float) -> Row:
        scores = record.values("score", *(_key(board.panel, line, seed) for seed in range(seeds)))
        return Row(board.panel, line, (removed,) * seeds, scores)

    rows = [lone("dense", 0.0), *([lone("linear", 1.0)] if board.panel == DIGITS else [])]
    for benefit, setting in product(BENEFITS, board.settings):
        found = partial(_figures, record, board, setting, benefit, seeds)
        rows.append(Row(board.panel, f"game, benefit {benefit}", found("removed"), found("score")))
    for line, figure in (("magnitude at the end", "magnitude"), ("magnitude, then the last tenth", "mended")):
        for benefit, setting in product(BENEFITS, board.settings):
            found = partial(_figures, record, board, setting, benefit, seeds)
            rows.append(Row(board.panel, line, found("removed"), found(figure)))
    return rows


def tables(record: Record, seeds: int) -> list[Table]:
    """A table for each board: settings and benefits down; means and standard deviations over seeds."""
    found = []
    titles = ("setting", "benefit", "units that left", "game", "magnitude at the end", "magnitude, then the last tenth")
    for board in boards(record.plan):
        table = Table(*titles, title=f"{board.panel}: {PANELS[board.panel].up}")
        for row in record.rows:
            if row.panel == board.panel and row.line in ("dense", "linear"):
                table.add_row(row.line, "", "", row.shown, "", "")
        for setting, benefit in product(board.settings, BENEFITS):
            figures = partial(_figures, record, board, setting, benefit, seeds)
            told = (in_words(figures(figure)) for figure in ("removed", "score", "magnitude", "mended"))
            table.add_row(str(setting), benefit, *told)
        found.append(table)
    return found
