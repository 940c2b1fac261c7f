"""Any words and any files: exit code 0, 1 or 2, one line for 1, never a traceback, never more than five seconds.

The files are those that strangers give, or that disks damage: trees of JSON with parts replaced, dropped and renamed,
and bytes spliced. Most are given to the functions that read them, some of each kind to the command line.
"""

import copy
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsegpt.cli.commands import app
from sparsegpt.driver.reports import PruneReport
from sparsegpt.errors import SparseGPTError
from sparsegpt.files.checked_json import CHECKSUM, write_checked
from sparsegpt.files.model_files import read_config, weight_files
from sparsegpt.files.reported import reported_layers
from sparsegpt.files.tensor_files import OpenTensors
from sparsegpt.incoming.model_folder import check_folder
from sparsegpt.kernels.checkpoint.archive import verify_packed
from sparsegpt.kernels.checkpoint.packed_config import read_packed_config
from sparsegpt.model.loading import load_config, sequence_length
from sparsegpt.model.source import Source
from sparsegpt.run.work_folder import WorkFolder
from sparsegpt.settings.prune_settings import resolve_settings
from sparsegpt.settings.recipe import choose, read_recipe
from tests.faults.jobs import finished_blocks, work_folder
from tests.support import save_tokenizer, tiny_model, write_text

HANG = 5.0
LONG = pytest.mark.faults

# What stands in files

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**53, 2**63, -(2**63) - 1, 10**30]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "2:4", "50%", "float16", "F32", "I64", "llama", "int4", "../x", "/etc/passwd", "a\nb", "[x]"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
EDIT = st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "replace", "drop", "rename", "add"]), VALUES)
EDITS = st.lists(EDIT, min_size=1, max_size=3)
SPLICES = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 40)), min_size=1, max_size=2)
CHANGES = st.tuples(st.just("edit"), EDITS) | st.tuples(st.just("splice"), SPLICES)


def edited(content, edits):
    """A tree of JSON with some of its parts replaced, dropped, renamed, and others added."""
    root = [copy.deepcopy(content)]
    for place, action, value in edits:
        spots = list(spots_of(root))
        box, key = spots[place % len(spots)]
        if action == "drop" and box is not root:
            del box[key]
        elif action == "rename" and isinstance(box, dict):
            box[str(value)] = box.pop(key)
        elif action == "add" and isinstance(box[key], dict | list):
            box[key] = [*box[key], value] if isinstance(box[key], list) else {**box[key], "more": value}
        else:
            box[key] = value
    return root[0]


def spots_of(box):
    for key in range(len(box)) if isinstance(box, list) else list(box):
        yield box, key
        if isinstance(box[key], dict | list):
            yield from spots_of(box[key])


def spliced(raw, splices):
    for place, new, cut in splices:
        at = place % (len(raw) + 1)
        raw = raw[:at] + new + raw[at + cut :]
    return raw


def change_json(path, change):
    how, edits = change
    raw = path.read_bytes()
    path.write_bytes(spliced(raw, edits) if how == "splice" else json.dumps(edited(json.loads(raw), edits)).encode())


def change_header(path, change):
    how, edits = change
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    if how == "splice":
        path.write_bytes(spliced(raw[:end], edits) + raw[end:])
    else:
        header = json.dumps(edited(json.loads(raw[8:end]), edits)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


def change_state(path, change):
    """Edited with a checksum that is right: who would deceive writes one."""
    how, edits = change
    known = {key: value for key, value in json.loads(path.read_text()).items() if key != CHECKSUM}
    content = edited(known, edits) if how == "edit" else None
    if isinstance(content, dict):
        write_checked(path, content)
    else:
        change_json(path, change)


def change_recipe(path, change):
    """TOML writes most values as JSON does."""
    how, edits = change
    if how == "splice":
        path.write_bytes(spliced(path.read_bytes(), edits))
        return
    rules = edited([{"modules": "mlp", "sparsity": "2:4", "damping": 0.1}, {"modules": "q_proj", "skip": True}], edits)
    tables = rules if isinstance(rules, list) else [rules]
    lines = [
        line
        for table in tables
        for line in ("[[rule]]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in as_table(table).items()))
    ]
    path.write_text("\n".join(lines) + "\n")


def as_table(value):
    return value if isinstance(value, dict) else {"modules": value}


# Who reads them


def read_model(folder):
    check_folder(folder)
    sequence_length("m", load_config(str(folder), to_prune=True), None)


def read_tensors(folder):
    with OpenTensors(weight_files(folder)) as tensors:
        assert all(tensors[name].dtype == tensors.dtype(name) for name in tensors)
    _ = Source.of(folder).dtype


def read_packed(folder):
    packing = read_packed_config(read_config(folder).get("quantization_config"), folder)
    verify_packed(weight_files(folder), packing, folder)


def go_on(folder):
    target = folder / "out"
    identity = {"model": "m"}
    with WorkFolder(target, resume=True, overwrite=False) as work:
        work.begin(work.state.get("identity", identity), PruneReport(resolve_settings("2:4", "paper")))


NAMES = [f"model.layers.{block}.{part}" for block in range(2) for part in ("mlp.up_proj", "self_attn.q_proj")]


def read_rules(folder):
    choose(resolve_settings("2:4", "paper", recipe=read_recipe(folder / "recipe.toml")), NAMES)


@dataclass(frozen=True)
class Kind:
    """Files of a kind: the folder that one lies in, its name, how it is changed, who reads it and with which words."""

    folder: str
    file: str
    change: Callable[[Path, object], None]
    read: Callable[[Path], object]
    words: tuple[str, ...]


RUN = ("run", "--sparsity=2:4", "--method=wanda", "--samples=2", "--seqlen=16", "--eval=none", "--calib={text}")
ON_IT = (*RUN, "--model={folder}", "--out={out}")
KINDS = {
    "config": Kind("plain", "config.json", change_json, read_model, ON_IT),
    "index": Kind("sharded", "model.safetensors.index.json", change_json, weight_files, ("pack", "{folder}", "{out}")),
    "header": Kind("plain", "model.safetensors", change_header, read_tensors, ("inspect", "{folder}")),
    "report": Kind("pruned", "report.json", change_json, reported_layers, ("inspect", "{folder}")),
    "packed config": Kind("packed", "config.json", change_json, read_packed, ("unpack", "{folder}", "{out}")),
    "state": Kind(
        "unfinished",
        ".out.unfinished/state.json",
        change_state,
        go_on,
        (*RUN, "--model={plain}", "--out={folder}/out", "--resume"),
    ),
    "recipe": Kind(
        "recipes",
        "recipe.toml",
        change_recipe,
        read_rules,
        (*ON_IT[:-2], "--model={plain}", "--recipe={folder}/recipe.toml", "--plan"),
    ),
}


@pytest.fixture(scope="module")
def sources(forker, tiny_job, tmp_path_factory):
    """A sound folder of each kind."""
    base = tmp_path_factory.mktemp("sound")
    found = {name: base / name for name in ("plain", "sharded", "pruned", "packed", "unfinished", "recipes")}
    tiny_model("llama").save_pretrained(found["plain"])
    tiny_model("llama").save_pretrained(found["sharded"], max_shard_size="30KB")
    for name in ("plain", "sharded"):
        save_tokenizer(found[name])
    found["text"] = write_text(base / "calib.txt", words=400)
    run = [word.format(folder=found["plain"], out=found["pruned"], text=found["text"]) for word in ON_IT]
    assert forker.run(run).code == 0
    assert forker.run(["pack", found["pruned"], found["packed"]]).code == 0
    out, calls = found["unfinished"] / "out", base / "calls"
    found["unfinished"].mkdir()
    run[-1] = f"--out={out}"
    fault = {"root": str(base), "calls": str(calls)}
    assert forker.run(run, fault=fault | {"kind": "count", "at": -1}).code == 0
    shutil.rmtree(out)
    second = [at for at, call in enumerate(calls.read_text().splitlines()) if "tensors.writing/" in call][-1]
    assert forker.run(run, fault=fault | {"kind": "kill", "at": second}).code == -9
    assert finished_blocks(out) == 1
    found["recipes"].mkdir()
    (found["recipes"] / "recipe.toml").write_text('[[rule]]\nmodules = "mlp"\nsparsity = "2:4"\ndamping = 0.1\n')
    return found


def fuzz(strategy, count, check):
    """Try so many inputs, other ones each time in the long form; {how they ended: number}."""
    seen: Counter[str] = Counter()

    @settings(max_examples=count, derandomize=count < 50, suppress_health_check=list(HealthCheck), database=None)
    @given(strategy)
    def one(drawn):
        seen[check(drawn)] += 1

    one()
    return seen


def tell(kind, where, seen):
    print(f"\n{kind} {where}: {sum(seen.values())} inputs, {dict(seen)}; 0 tracebacks, 0 hangs, each one line")


@pytest.mark.parametrize("count", [20, pytest.param(700, marks=LONG)])
@pytest.mark.parametrize("name", KINDS)
def test_a_hostile_file_is_read_or_refused(sources, tmp_path, name, count):
    kind, folder = KINDS[name], tmp_path / "folder"

    def check(change):
        shutil.copytree(sources[kind.folder], folder)
        began = time.perf_counter()
        try:
            kind.change(folder / kind.file, change)
            kind.read(folder)
        except SparseGPTError as error:
            assert str(error)
            return "refused"
        finally:
            seconds = time.perf_counter() - began
            shutil.rmtree(folder)
        assert seconds < HANG
        return "read"

    tell(name, "to its reader", fuzz(CHANGES, count, check))


def ended_well(outcome):
    """How a command ended; the property that this file is about."""
    assert outcome.code in (0, 1, 2), (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err
    if outcome.code == 1:
        outcome.refused()
    return f"code {outcome.code}"


@pytest.mark.parametrize("count", [2, pytest.param(60, marks=LONG)])
@pytest.mark.parametrize("name", KINDS)
def test_a_hostile_file_given_to_a_command(forker, sources, tmp_path, name, count):
    kind, folder, out = KINDS[name], tmp_path / "folder", tmp_path / "result"
    places = {**sources, "folder": folder, "out": out}

    def check(change):
        shutil.copytree(sources[kind.folder], folder)
        try:
            kind.change(folder / kind.file, change)
            words = [word.format(**places) for word in kind.words]
            return ended_well(forker.run(words, cwd=str(tmp_path), kill_after=HANG))
        finally:
            for made in (folder, out, work_folder(out)):
                shutil.rmtree(made, ignore_errors=True)

    tell(name, "to a command", fuzz(CHANGES, count, check))


# Words

COMMANDS = typer.main.get_command(app).commands
# What makes a command quick, and gives it something to do; what is drawn comes behind it, and counts more.
BASES = {
    "run": [*ON_IT],
    "eval": ["--model={plain}", "--data={text}", "--eval-windows=1"],
    "inspect": ["{pruned}"],
    "pack": ["{pruned}", "{out}"],
    "unpack": ["{packed}", "{out}"],
    "tune": ["--shapes=32x64", "--tokens=1", "--rounds=1"],
}
BASES["run"].remove("run")
# No zero byte can be given, and nobody asks a test to write into the root or a home.
PRINTABLE = st.text(max_size=12).filter(lambda text: "\0" not in text and not text.startswith(("/", "~")))
NEAR = [
    "",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "1e30",
    "nan",
    "9" * 30,
    "2:4",
    "4:8",
    "50%",
    "0.5",
    "1/2",
    "auto",
    "cpu",
    "cuda:9",
]
NEAR += [
    "float16",
    "int4",
    "paper",
    "wanda",
    "sparsegpt+refit",
    "x:y",
    "dense",
    "none",
    "always",
    "lm_head",
    "0-1",
    "0:1",
]
NEAR += [
    "(",
    ".*",
    "mlp",
    "(a+)+$",
    ".",
    "..",
    "missing",
    "nobody/nothing",
    "[red]",
    "a,b",
    ",",
    "\n",
    "\udcff",
    "=",
    "--",
]
NEAR += [
    "{plain}",
    "{packed}",
    "{text}",
    "{plain}/config.json",
    "{recipes}/recipe.toml",
    "/dev/null",
    "/dev/zero",
    "/proc",
]
WORD = st.sampled_from(NEAR) | PRINTABLE
# Of outputs and of folders to fill; a text without end may not be named as one.
INSIDE = st.sampled_from(["", "x", ".", "..", "a/b", "{plain}", "{text}", "{pruned}", "[x]", "a\nb"])


def flags_of(command):
    return sorted(
        flag for parameter in COMMANDS[command].params for flag in (*parameter.opts, *parameter.secondary_opts)
    )


def drawn_flag(command):
    named = st.sampled_from([flag for flag in flags_of(command) if flag.startswith("-")])
    return named.flatmap(
        lambda flag: st.tuples(st.just(flag), INSIDE if flag in ("--out", "--scratch") else WORD).flatmap(
            lambda pair: st.sampled_from([(pair[0],), (f"{pair[0]}={pair[1]}",), pair])
        )
    )


def words_of(command):
    return st.lists(st.one_of(*[drawn_flag(command)] * 5, WORD.map(lambda word: (word,))), min_size=1, max_size=3).map(
        lambda drawn: [command, *BASES[command], *(word for words in drawn for word in words)]
    )


# As they are, these score or time what takes longer than five seconds.
LONG_WORK = {"eval", "tune", "bench"}
FREE = st.sampled_from([*sorted(COMMANDS.keys() - LONG_WORK), "solver", "--help", "--version", "-h"])
LINES = st.one_of(*map(words_of, BASES), st.lists(PRINTABLE | FREE, max_size=3))


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=LONG)])
def test_any_words(forker, sources, tmp_path, count):
    def check(drawn):
        here = tmp_path / "here"
        here.mkdir()
        places = {**sources, "out": here / "result"}
        try:
            return ended_well(forker.run([fill(word, places) for word in drawn], cwd=str(here), kill_after=HANG))
        finally:
            shutil.rmtree(here)

    tell("words", "as a command", fuzz(LINES, count, check))


def fill(word, places):
    for name, place in places.items():
        word = word.replace(f"{{{name}}}", str(place))
    return word
