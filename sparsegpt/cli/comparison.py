"""The tables of `compare`."""

from rich.console import Console

from sparsegpt.cli.display import new_table, print_line
from sparsegpt.eval.report import tasks, texts
from sparsegpt.eval.report.differences import Comparison, Difference, Model

WORST = 10


def print_comparison(console: Console, found: Comparison) -> None:
    """What models cost and brought, in which settings they differ, and where their zeros do."""
    names = texts.short_names([model.name for model in found.models])
    _print_models(console, found, names)
    _print_tasks(console, found, names)
    if found.settings:
        known = [names[model.name] for model in found.models if model.run]
        table = new_table("setting", *known, broken=("setting", *known), title="settings that differ")
        for setting, values in found.settings.items():
            table.add_row(setting, *values)
        console.print(table)
    for difference in found.differences:
        _print_difference(console, difference, names)


def _print_models(console: Console, found: Comparison, names: dict[str, str]) -> None:
    data = list(dict.fromkeys(text for model in found.models if model.run for text in model.run.scores))
    shown = texts.short_names(data)
    table = new_table(
        "model", *shown.values(), "zeros", "files", "packed", "seconds", broken=("model", *shown.values())
    )
    for model in found.models:
        run = model.run
        seconds = texts.seconds(run.report.get("seconds", {}).get("total")) if run else texts.UNKNOWN
        scores = [_scored(model, text) for text in data]
        sizes = [texts.size(model.file_bytes), texts.size(run.packed_bytes if run else None)]
        table.add_row(names[model.name], *scores, texts.percent(run.zeros if run else None), *sizes, seconds)
    console.print(table)
    if data:
        print_line(console, "perplexity: dense -> pruned")


def _print_tasks(console: Console, found: Comparison, names: dict[str, str]) -> None:
    runs = {names[model.name]: model.run for model in found.models if model.run}
    metrics = tasks.names(list(runs.values()))
    table = new_table("task", *runs, broken=("task", *runs), title="tasks: dense -> pruned, with their standard errors")
    for metric in metrics:
        pairs = ([tasks.figure(run, metric, which) for which in ("dense", "pruned")] for run in runs.values())
        table.add_row(metric, *map(" -> ".join, pairs))
    if metrics:
        console.print(table)


def _scored(model: Model, text: str) -> str:
    if model.run is None or text not in model.run.scores:
        return texts.UNKNOWN
    return " -> ".join(texts.perplexity(model.run.score(text, which)) for which in ("dense", "pruned"))


def _print_difference(console: Console, found: Difference, names: dict[str, str]) -> None:
    first, second = names[found.first], names[found.second]
    compared = [layer for layer in found.layers if layer.mask is not None]
    changed = found.changed
    mean = sum(layer.mask or 0.0 for layer in changed) / max(1, len(changed))
    share = f", by {mean:.1%} of their places in the mean" if changed else ""
    line = f"{second} against {first}: zeros differ in {len(changed)} of {len(compared)} weights{share}"
    same = sum(layer.equal for layer in compared)
    print_line(console, f"{line}; {same} are equal in every value")
    for title, lone in ((f"only in {first}", found.only_in_first), (f"only in {second}", found.only_in_second)):
        if lone:
            print_line(console, f"  {title}: {len(lone)} weights, {lone[0]} first")
    if other := [layer for layer in found.layers if layer.mask is None]:
        print_line(console, f"  of other shapes: {len(other)} weights, {other[0].name} first")
    if changed:
        table = new_table("weight", "zeros differ", first, second, broken=("weight", first, second))
        for layer in changed[:WORST]:
            assert layer.zeros is not None
            table.add_row(layer.name, texts.percent(layer.mask), *map(texts.percent, layer.zeros))
        console.print(table)
