"""`python -m sparsegpt shrink`: its options are the fields of ShrinkSettings, ShrinkCall, and some of RunOptions."""

from typing import Any

from sparsegpt.cli.console import open_console, silence_libraries, typed_command
from sparsegpt.cli.options import data_names, given, parameters, takes
from sparsegpt.run.options import RunOptions, default_data
from sparsegpt.run.shrink_options import SHARED, ShrinkCall, default_smaller_folder
from sparsegpt.shrinking.settings import ShrinkSettings

_OF_RUN = [parameter for parameter in parameters(RunOptions) if parameter.name in SHARED]


@takes(*parameters(ShrinkSettings), *parameters(ShrinkCall), *_OF_RUN)
def shrink(**arguments: Any) -> None:
    """Make a smaller dense model of a model: fewer heads, channels, experts or blocks. Any runtime loads it."""
    from sparsegpt.cli.display import ShrinkDisplay, print_smaller
    from sparsegpt.run.shrink_job import shrink as shrink_job

    call, settings = ShrinkCall(**given(ShrinkCall, arguments)), ShrinkSettings(**given(ShrinkSettings, arguments))
    told = {name: arguments[name] for name in SHARED}
    model, calibration, texts = (told[name] for name in ("model", "calibration", "evaluate"))
    told |= {
        "calibration": default_data(model, "calibration") if calibration is None else calibration,
        "evaluate": data_names(default_data(model, "evaluation") if texts is None else texts),
        "out": call.out or default_smaller_folder(model, settings),
    }
    options = RunOptions(**told, command=typed_command())
    console = open_console()
    silence_libraries()
    with ShrinkDisplay(console, quiet=call.quiet) as display:
        report = shrink_job(options, settings, display, speed=call.speed)
    if not call.quiet:
        print_smaller(console, report, options.out)
