"""`python -m sparsegpt run`: its options are the fields of PruneSettings, RunOptions and RunCall."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import typer

from sparsegpt.cli.console import open_console, say, silence_libraries, typed_command
from sparsegpt.cli.options import INTERRUPTED, data_names, given, parameters, takes
from sparsegpt.errors import SparseGPTError, unknown
from sparsegpt.run.options import RunOptions, default_data, default_folder
from sparsegpt.settings.option import Group, option, option_of
from sparsegpt.settings.prune_settings import PRESETS, PruneSettings, resolve_settings
from sparsegpt.sparsity import doubtful


@dataclass(frozen=True)
class RunCall:
    """What the command alone is told."""

    preset: str = field(
        default="default",
        metadata=option("paper (the published algorithm), fast, default or best.", Group.PATTERN),
    )
    plan: bool = field(default=False, metadata=option("Print what the run would need, and stop.", Group.MACHINE))
    log_json: bool = field(
        default=False, metadata=option("Print what happens as one JSON object a line, and no tables.", Group.OUTPUT)
    )
    ranks: int | None = field(
        default=None,
        metadata=option("With --plan: for each of so many processes.", Group.MACHINE, minimum=1, unset="one process"),
    )
    quiet: bool = field(default=False, metadata=option("Print nothing but warnings and errors.", Group.OUTPUT))


def by_preset(preset: str = "default") -> dict[str, str]:
    """What leaving out an option of pruning means, in words."""
    found = {}
    for setting in fields(PruneSettings):
        if (told := option_of(setting)) is None or setting.name == "sparsity":
            continue
        value = PRESETS[preset].get(setting.name, setting.default)
        varies = any(setting.name in row for row in PRESETS.values())
        found[setting.name] = (f"{preset} preset: " if varies else "") + (told.unset or str(value))
    return found


@takes(*parameters(RunCall), *parameters(PruneSettings, by_preset()), *parameters(RunOptions))
def run(**arguments: Any) -> None:
    """Prune a model, score it before and after, and save it with a report."""
    call = RunCall(**given(RunCall, arguments))
    settings = _settings(call.preset, given(PruneSettings, arguments))

    from sparsegpt.cli.display import RunDisplay, print_plan, print_report
    from sparsegpt.driver.ranks import is_restart, started
    from sparsegpt.listeners.json_log import JsonLog
    from sparsegpt.run.job import Listener
    from sparsegpt.run.job import run as run_job
    from sparsegpt.run.planning import check_options, plan_run

    options = replace(_options(given(RunOptions, arguments), settings), preset=call.preset, command=typed_command())
    console = open_console()
    silence_libraries()
    if call.plan:
        check_options(options, settings)
        print_plan(console, options.model, plan_run(options, settings, call.ranks or 1))
        return
    if options.gpu_memory is not None:
        raise SparseGPTError("--gpu-memory is for planning: add --plan, or leave it out")
    if call.ranks is not None:
        raise SparseGPTError("--ranks is for planning: add --plan, or leave it out and start so many with torchrun")
    if call.log_json and call.quiet:
        raise SparseGPTError("--log-json prints what --quiet is to keep silent about: give one of them")
    try:
        with (
            started(options.rank_timeout) as ranks,
            nullcontext(JsonLog(sys.stdout)) if call.log_json else RunDisplay(console, quiet=call.quiet) as display,
        ):
            listener: Listener = display if ranks.speaks else Listener()
            if doubt := doubtful(arguments["sparsity"]):
                listener.warn(doubt)
            placed = replace(options, device=ranks.place(options.device), resume=options.resume or is_restart())
            report = run_job(placed, settings, listener, ranks)
    except KeyboardInterrupt:
        _say_what_is_left(options.out)
        raise typer.Exit(INTERRUPTED) from None
    if ranks.speaks and not (call.quiet or call.log_json):
        print_report(console, report, options.out)


def _settings(preset: str, told: dict[str, Any]) -> PruneSettings:
    if told["recipe"] is not None:
        from sparsegpt.settings.recipe import read_recipe

        told["recipe"] = read_recipe(told["recipe"])
    return resolve_settings(preset=preset, **told)


def _options(told: dict[str, Any], settings: PruneSettings) -> RunOptions:
    """The options of a run, with what follows from the others where nothing was given."""
    model, include, calibration, texts = (told[key] for key in ("model", "include_head", "calibration", "evaluate"))
    if include not in (None, "lm_head"):
        raise unknown("what to include", include, ("lm_head",), settings=("include_head",))
    return RunOptions(
        **told
        | {
            "calibration": default_data(model, "calibration") if calibration is None else calibration,
            "evaluate": data_names(default_data(model, "evaluation") if texts is None else texts),
            "eval_tasks": () if told["eval_tasks"] is None else data_names(told["eval_tasks"], "eval_tasks"),
            "out": told["out"] or default_folder(model, settings.sparsity, settings.quantize),
            "include_head": include is not None,
        }
    )


def _say_what_is_left(out: Path) -> None:
    from sparsegpt.run.work_folder import unfinished_blocks

    finished = unfinished_blocks(out)
    left = f"{finished} finished blocks are kept, go on with --resume" if finished else "nothing was written"
    say(f"interrupted {out}; {left}")
