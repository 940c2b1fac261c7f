"""The whole job of `python -m sparsegpt run`: load, score, prune, score again, save.

Prints nothing. What happens meanwhile is told to a `Listener`; everything measured is in the report.
"""

import functools
import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sparsegpt.counting import counting
from sparsegpt.driver.choices import Choices, choose_linears
from sparsegpt.driver.pipeline import prune_blocks
from sparsegpt.driver.ranks import ONE_RANK, Ranks
from sparsegpt.driver.reports import PruneReport
from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.eval.generation import Openings, openings_of
from sparsegpt.eval.perplexity import TextScore
from sparsegpt.eval.report.page import page
from sparsegpt.eval.report.reading import VERSION, run_of
from sparsegpt.eval.tasks import Tasks, TaskScore, load_tasks, score_tasks
from sparsegpt.files.checked_json import PAGE_NAME, REPORT_NAME, read_checked, write_checked
from sparsegpt.files.figures import CARD_NAME
from sparsegpt.files.folders import write_atomically
from sparsegpt.kernels.hf.in_place import pack_linears
from sparsegpt.kernels.layers.linear import explain, set_kernels
from sparsegpt.model.loading import auto_class, load_model, source_folders
from sparsegpt.model.source import Source
from sparsegpt.recovery.training import TrainingOutOfMemory
from sparsegpt.run.identity import facts, fingerprint, surroundings, versions
from sparsegpt.run.memory import PeakWatch, give_back_freed_memory, peak_memory, readable
from sparsegpt.run.memory_plan import Plan, check_fits
from sparsegpt.run.model_card import Card
from sparsegpt.run.options import RunOptions
from sparsegpt.run.planning import check_inputs, check_options, free_gpu_memory, memory_is_scarce, plan_run
from sparsegpt.run.push import push_folder
from sparsegpt.run.saving import rehearse, save
from sparsegpt.run.scored_job import JobListener, ScoredJob
from sparsegpt.run.work_folder import ResumeError, WorkFolder
from sparsegpt.settings.prune_settings import DISTILLATION, PruneSettings
from sparsegpt.settings.selection import name_filter
from sparsegpt.solvers.methods import parse_method


class Listener(JobListener):
    """Told what happens during a run, the prune included; this one listens in silence.

    What is scored is "dense", "pruned" or "kernels": pruned, through the packed kernels.
    """

    def scored_task(self, which: str, score: TaskScore) -> None:
        """The model was scored by one metric of a task."""


def run(
    options: RunOptions, settings: PruneSettings, listener: Listener | None = None, ranks: Ranks = ONE_RANK
) -> dict[str, Any]:
    """Prune a model as told, write the folder `options.out`, return the report that was written with it.

    ranks: who runs it together, of whom rank 0 writes. An old result stays as it was until the new one is whole;
    finished blocks stay in the work folder (`work.WorkFolder`), from which `resume` goes on. What the Hub refuses is
    whole here.
    Raises SparseGPTError for anything refused.
    """
    listener = listener or Listener()
    report = _result(options, settings, listener, ranks)
    if options.push_to_hub is not None:
        listener.stage(f"pushing {options.out} to {options.push_to_hub}")
        ranks.first(lambda: _push(options.out, str(options.push_to_hub)))
    return report


def _push(folder: Path, repository: str) -> None:
    try:
        push_folder(folder, repository)
    except SparseGPTError as error:
        command = f"`sparsegpt push {folder} {repository}`"
        raise SparseGPTError(f"{error}; the result is whole in {folder}, {command} tries again") from error


def _result(options: RunOptions, settings: PruneSettings, listener: Listener, ranks: Ranks) -> dict[str, Any]:
    """The report of the folder that is written."""
    ranks.agree(lambda: facts(options, settings))
    check_options(options, settings)
    with (
        WorkFolder(
            options.out,
            resume=options.resume,
            overwrite=options.overwrite,
            sources=source_folders(options.model),
            ranks=ranks,
        ) as work,
        PeakWatch() as memory,
    ):
        check_inputs(options)
        planned = plan_run(options, settings, ranks.world)
        if memory_is_scarce(options, planned):
            give_back_freed_memory()
        check_fits(planned, free_gpu_memory(options), options.out, options.scratch or options.out, ranks.neighbours)
        job = _Job(options, settings, work, planned.micro_batch, listener, ranks)
        needs = ", ".join(f"{readable(count)} of {kind}" for kind, count in planned.totals().items() if count)
        job.listener.stage(f"needs at most about {needs}")
        with memory.during("load"):
            job.load()
        if not job.begin():
            report = read_checked(options.out / REPORT_NAME)
            job.warn_of_unscored(report["perplexity"])
            return report
        ranks.first(lambda: rehearse(job.loaded, job.waiting, job.card()))
        with memory.during("eval"):
            job.score("dense", ranks)
            ranks.first(lambda: job.write_samples("dense"))
        with memory.during("prune"):
            job.prune()
        with memory.during("eval"):
            job.score("pruned", ranks)
            ranks.first(lambda: job.write_samples("pruned"))
        return ranks.first(lambda: job.write(planned, memory))


def _of_memory(planned: Plan, memory: PeakWatch) -> dict[str, Any]:
    """What the report says of it besides `peak_memory`."""
    return {
        "planned_bytes": planned.totals(),
        "peak_private_memory_bytes": memory.peak,
        "peak_bytes_by_phase": dict(memory.by_phase),
    }


class _Job(ScoredJob):
    """The state of one run."""

    listener: Listener
    source: Source
    tasks: Tasks | None
    choices: Choices

    def __init__(
        self,
        options: RunOptions,
        settings: PruneSettings,
        work: WorkFolder,
        micro_batch: int,
        listener: Listener,
        ranks: Ranks,
    ) -> None:
        super().__init__(options, listener)
        self.settings, self.work, self.ranks = settings, work, ranks
        self.micro_batch = micro_batch
        self.scratch = options.scratch or work.folder
        self.waiting = work.folder / "beside"
        self.pruned = PruneReport(settings)
        self.task_scores: dict[str, tuple[TaskScore, ...]] = {}
        self.openings: list[Openings] = []

    def load(self) -> None:
        """Texts, tasks, model, tokenizer, calibration windows, and what is pruned."""
        options = self.options
        with self.measure("load"):
            self.tasks = load_tasks(options.eval_tasks, options.include_path, options.task_limit)
        self.load_model(stream_through=self.scratch)
        self.source = self.loaded.source
        self.choices = choose_linears(
            self.loaded.decoder,
            self.settings,
            name_filter(options.only, options.skip),
            options.blocks,
            include_head=options.include_head,
        )
        for note in (*self.loaded.notes, *self.choices.notes):
            self.warn(note)

    def begin(self) -> bool:
        """Take up what an unfinished run has done; False when there is nothing left to do."""
        self.ranks.agree(lambda: {**self.identity(), **self.evaluation})
        if self.work.begin(self.identity(), self.pruned):
            self.listener.stage(f"{self.options.out} is finished already")
            return False
        if self.options.resume:
            blocks = self.work.finished
            self.listener.stage(f"going on after block {blocks}" if blocks else "nothing to resume: starting anew")
        self._compare_surroundings()
        # What a GPU's free memory allowed then: other steps would end with other bits.
        self.work.save_state(micro_batch=self.work.state.get("micro_batch", self.micro_batch))
        self.micro_batch = self.work.state["micro_batch"]
        self.seconds = self.work.state.get("run_seconds", self.seconds)
        if self.work.state.get("evaluation") == self.evaluation:
            for data, by_model in self.work.state.get("scores", {}).items():
                self.scores[data] = {which: TextScore(**row) for which, row in by_model.items()}
            if rows := self.work.state.get("task_scores"):
                self.task_scores["dense"] = tuple(TaskScore(**row) for row in rows)
        return True

    def card(self) -> Card:
        """What the model card says about this run, as far as it has got."""
        options, recipe, rotation = self.options, len(self.settings.recipe), self.pruned.rotation
        rows = {
            **({"preset": options.preset} if options.preset else {}),
            **(
                {"integers": f"{self.settings.quantize} by {self.settings.quantizer}"} if self.settings.quantize else {}
            ),
            **({"written in other bases": rotation.turned} if rotation else {}),
            **({"rules of a recipe": str(recipe)} if recipe else {}),
            "calibration": self.calibration_in_words(),
            "pruned": f"{len(self.pruned.layers)} linears",
            "stored as": str(self.loaded.stored_dtype).removeprefix("torch."),
        }
        return Card(
            base=self.source.name,
            patterns=tuple(dict.fromkeys(map(str, self.settings.values_of("sparsity")))),
            method=self.settings.method_name,
            rows=rows,
            perplexities=self.by_text("perplexity"),
            command=options.command,
            loader=auto_class(self.loaded.model.config).__name__,
            trust_remote_code=options.trust_remote_code,
        )

    def warn_of_unscored(self, scores: dict[str, dict[str, float]]) -> None:
        """Say which scores that were asked for are not among those {text: {model: score}} of a finished result."""
        options = self.options
        missing = [data for data in options.evaluate if data not in scores]
        if options.kernels is not None:
            missing += [f"{data} through kernels" for data, known in scores.items() if "kernels" not in known]
        if missing:
            self.warn(
                f"not scored on {', '.join(missing)}: `sparsegpt eval --model {options.out} --data ...` does that"
            )

    def _compare_surroundings(self) -> None:
        """Warn when finished blocks were computed otherwise than those to come, and keep the warning with them."""
        now = {**surroundings(), "ranks": str(self.ranks.world)}
        then = {"ranks": "1", **self.work.state.get("surroundings", now)} if self.work.finished else now
        self.work.save_state(surroundings=then)
        if changed := [name for name in now if then.get(name) != now[name]]:
            text = ", ".join(f"{name} {then.get(name)} then, {now[name]} now" for name in changed)
            self.warn(
                f"the unfinished run began in other surroundings ({text}): its result may differ in the last bits from "
                "that of an uninterrupted run; give --overwrite instead of --resume to start again"
            )
            self.pruned.warnings.append(self.warnings[-1])

    def identity(self) -> dict[str, Any]:
        """Everything that decides the pruned weights; a run goes on only with the same."""
        options, residence = self.options, self.loaded.residence
        assert residence is not None
        return {
            "model": fingerprint(self.loaded),
            "methods of one's own": {
                method.name: method.source_digest
                for method in map(parse_method, self.settings.values_of("method"))
                if not method.is_known
            },
            "calibration windows": self.calibration.token_hash,
            **({"--documents": options.documents} if options.documents in ("pack", "single") else {}),
            "settings": {name: value for name, value in self.settings.as_dict().items() if name not in DISTILLATION},
            "distillation": {"epochs": self.settings.distill, "rate": self.settings.distill_rate},
            "--recipe": {f"rule {number}": str(rule) for number, rule in enumerate(self.settings.recipe, start=1)},
            "--only": options.only,
            "--skip": options.skip,
            "--blocks": options.blocks,
            "--include": options.include_head,
            "--micro-batch": options.micro_batch,
            "device": str(residence.device).split(":")[0],
            "dtype": [str(residence.dtype), str(residence.stored)],
        }

    @functools.cached_property
    def evaluation(self) -> dict[str, Any]:
        """What a score depends on besides the model."""
        options = self.options
        return {
            "texts": {data: hashlib.sha256(text.text.encode()).hexdigest() for data, text in self.texts.items()},
            "length": self.length,
            "windows": options.eval_windows,
            "bos": self.loaded.bos_token(options.bos),
            **({"tasks": [*options.eval_tasks], "task limit": options.task_limit} if options.eval_tasks else {}),
        }

    def score(self, which: str, ranks: Ranks) -> None:
        """Score the model as it now is on every evaluation text and task."""
        self.score_texts(which, self.loaded, ranks)
        if self.options.eval_tasks:
            self._score_tasks(which)
        if which == "dense":
            scores = {data: {key: asdict(row) for key, row in rows.items()} for data, rows in self.scores.items()}
            self.work.save_state(
                evaluation=self.evaluation,
                scores=scores,
                task_scores=[asdict(row) for row in self.task_scores.get("dense", ())],
                run_seconds=self.seconds,
            )

    def _score_tasks(self, which: str) -> None:
        if which not in self.task_scores:
            part = f"scoring the {which} model on {', '.join(self.options.eval_tasks)}"
            self.listener.stage(part)
            with self.measure("eval"):
                self.task_scores[which] = score_tasks(
                    self.loaded.model,
                    self.loaded.tokenizer,
                    self.tasks,
                    batch_size=self.options.batch_size,
                    bos=self.options.bos,
                    counted=counting(self.listener.step, part, "answers"),
                )
        for score in self.task_scores[which]:
            self.listener.scored_task(which, score)

    def write_samples(self, which: str) -> None:
        """Let the model as it now is go on after openings of the texts; one that cannot is no reason to stop."""
        options = self.options
        if which == "dense" and options.sample_tokens:
            self.openings = openings_of(
                self.texts,
                self.loaded.tokenizer,
                self.loaded.model.config.model_type,
                self.length,
                options.sample_tokens,
                options.bos,
            )
        if not self.openings:
            return
        self.listener.stage(f"writing samples with the {which} model")
        try:
            with self.measure("sample"):
                self.openings = [
                    one.continued(self.loaded.model, self.loaded.tokenizer, which) for one in self.openings
                ]
        except SparseGPTError as error:
            self.openings = []
            self.warn(f"no samples of text: {error}")

    def page(self, report: dict[str, Any]) -> str | None:
        """The report for people. What is wrong with it must not cost the result: then there is none, and a warning."""
        try:
            return page([run_of(report, self.options.out.name)])
        except Exception as error:
            self.warn(f"no {PAGE_NAME}: {first_line(error)}; `sparsegpt report` may make one")
            return None

    def prune(self) -> None:
        """Prune block by block; finished blocks go to the work folder."""
        rules = " and a recipe" if self.settings.recipe else ""
        self.listener.stage(f"{self._aim()}{rules}")
        while True:
            try:
                self._prune_blocks()
                break
            except torch.OutOfMemoryError as error:
                self.ranks.give_up(error)
                self._halve_micro_batch(error)
        for warning in self.pruned.warnings:
            if warning not in self.warnings:
                self.warn(warning)

    def _aim(self) -> str:
        """What the run does to weights, in words."""
        settings = self.settings
        rounding = f"{settings.quantize} by {settings.quantizer}" if settings.quantize else ""
        if not settings.sparsity.zeros and rounding:
            return f"rounding to {rounding}"
        return f"pruning to {settings.sparsity} with {settings.method_name}{rounding and f', rounding to {rounding}'}"

    def _halve_micro_batch(self, error: torch.OutOfMemoryError) -> None:
        """Go on after the last finished block with smaller steps, and with a distillation that begins anew."""
        residence = self.loaded.residence
        assert residence is not None
        training, windows = "", self.micro_batch
        if isinstance(error, TrainingOutOfMemory):
            training, windows = error.training, error.windows
        if windows == 1:
            raise ResumeError(
                "the GPU ran out of memory with one window at a time: give --resume "
                f"{'--distill 0' if training == 'distillation' else 'once it has more'}, or --overwrite with a shorter "
                "--seqlen, --preset paper or --device cpu"
            ) from error
        self.micro_batch = windows // 2
        self.pruned.epochs.clear()
        self.work.save_state(micro_batch=self.micro_batch, epochs=[])
        del self.pruned.layers[sum(block.linears for block in self.pruned.blocks) :]  # of the block that failed
        self.warn(f"the GPU ran out of memory: going on with --micro-batch {self.micro_batch}")
        residence.unsettle()
        torch.cuda.empty_cache()

    def _prune_blocks(self) -> None:
        prune_blocks(
            replace(self.loaded.decoder, boundary=self.calibration.boundary),
            self.calibration.windows,
            self.choices,
            micro_batch=self.micro_batch,
            scratch=self.scratch if self.options.activations == "disk" else None,
            residence=self.loaded.residence,
            progress=self.work,
            report=self.pruned,
            listener=self.listener,
            verify=self.options.verify,
            ranks=self.ranks,
        )

    def write(self, planned: Plan, memory: PeakWatch) -> dict[str, Any]:
        """Write the result, which takes its place once it is whole; its report."""
        options = self.options
        self.listener.stage(f"saving {options.out}")
        with self.work.new_result() as draft:
            with memory.during("save"):
                save(self.loaded, self.waiting, draft)
            if options.kernels is not None:
                self.score_through_kernels(options.kernels, draft)
            (draft / CARD_NAME).write_bytes(self.card().added_to(self.source.card))
            page = self.page({**self.report(), **_of_memory(planned, memory)})
            report = {**self.report(), **_of_memory(planned, memory)}  # by now with what a page may have had against it
            write_checked(draft / REPORT_NAME, report)
            if page is not None:
                write_atomically(draft / PAGE_NAME, page)
        return report

    def score_through_kernels(self, kernels: str, folder: Path) -> None:
        """Load the saved model whole, pack its pruned linears in memory and score once more."""
        options = self.options
        try:
            self.loaded = load_model(
                str(folder), dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
            )
            pack_linears(self.loaded.model, kernels=kernels)
            set_kernels(self.loaded.model, kernels)
            self.listener.stage(explain(self.loaded.model))
            self.score("kernels", self.ranks.alone)
        except SparseGPTError as error:
            self.warn(f"not scored through kernels: {error}")

    def report(self) -> dict[str, Any]:
        """The contents of report.json."""
        return {
            "report_version": VERSION,
            "model": self.options.model,
            "preset": self.options.preset,
            "command": self.options.command,
            "date": self.date,
            **self.pruned.as_dict(),
            "seed": self.options.seed,
            "calibration": self.calibration.describe(),
            "evaluation": self.evaluation,
            "perplexity": self.by_text("perplexity"),
            "bits_per_byte": self.by_text("bits_per_byte"),
            "tokens_per_second": self.by_text("tokens_per_second"),
            "tasks": self._by_task(),
            "samples": [sample.as_dict() for one in self.openings for sample in one.samples],
            "seconds": {**self.seconds, **self.pruned.seconds, "total": self.total_seconds},
            "identity": self.work.state["identity"],
            **peak_memory(),
            "stored_dtype": str(self.loaded.stored_dtype).removeprefix("torch."),
            "warnings": self.warnings,
            "ranks": self.ranks.world,
            "surroundings": surroundings(),
            "versions": versions(),
        }

    def _by_task(self) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
        """{task: {metric: {model: {"value", "stderr"}}}}."""
        found: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {}
        for which, rows in self.task_scores.items():
            for row in rows:
                by_model = found.setdefault(row.task, {}).setdefault(row.metric, {})
                by_model[which] = {"value": row.value, "stderr": row.stderr}
        return found
