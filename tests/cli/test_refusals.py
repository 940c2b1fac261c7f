"""A refusal is one line, comes before anything is loaded, and asks for what was meant."""

import io
import json
import shutil

import pytest
from rich.console import Console

from sparsegpt.cli.display import print_findings, print_report, short_names
from sparsegpt.run import job
from sparsegpt.run.inspection import TensorFinding
from tests.support import save_model, write_text

RUN = {"sparsity": "2:4", "samples": 2, "seqlen": 16, "preset": "paper", "eval": "none"}


@pytest.fixture
def run(run_cli, llama_folder, text_file, tmp_path, monkeypatch):
    """`sparsegpt run` on the tiny Llama in an empty folder; keyword arguments become flags."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object, **flags: object):
        given = {"model": llama_folder, "calib": text_file, "out": "out", **RUN, **flags}
        return run_cli("run", *(f"--{key.replace('_', '-')}={value}" for key, value in given.items()), *words)

    return call


def refused_early(outcome, *fragments):
    """In one line, before anything was loaded."""
    assert outcome.code == 1, outcome.out
    outcome.refused(*fragments)
    assert "loading" not in outcome.out


# Files of a run that are wrong, by name; "" is a folder.
FILES = {
    "empty.txt": b"",
    "blank.txt": b" \n",
    "latin.txt": b"\xff\xfe",
    "no-text.jsonl": b'{"body": "x"}',
    "no.jsonl": b"[",
    "no.parquet": b"PAR1",
    "table.tsv": b"x",
    "folder/notes.rst": b"x",
    "fifty.toml": b"[[rule]]\nmodules = 'x'\nsparsity = '50'\n",
    "prose.txt": b"x",
}


@pytest.fixture
def files(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)


TEXTS = {
    "wikitext": ("unknown text", "did you mean wikitext2?"),
    "WikiText-2": ("did you mean wikitext2?",),
    "c3": ("unknown text", "c4"),
    "missing.txt": ("missing.txt", "no such file"),
    "pros.txt": ("no such file", "did you mean prose.txt?"),
    "no/such/folder": ("no such file",),
    "empty.txt": ("expected text, found none",),
    "blank.txt": ("expected text, found none",),
    "latin.txt": ("UTF-8", "0xff"),
    "no-text.jsonl": ("expected a field 'text', found body",),
    "no.jsonl": ("not JSON",),
    "no.parquet": ("parquet",),
    "table.tsv": (".jsonl, .json, .csv, .parquet", "found .tsv"),
    "folder": ("files in the folder, found none",),
    "~nobody-of-this-name/x.txt": ("cannot be read",),
    "no\nsuch": ("unknown text",),
}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_cannot_serve_is_found_before_the_model_is_loaded(run, run_cli, llama_folder, text_file, text):
    refused_early(run(calib=text), *TEXTS[text], "(--calib)")
    refused_early(run(eval=f"{text_file},{text}"), *TEXTS[text], "(--eval)")
    refused_early(run_cli("eval", "--model", llama_folder, f"--data={text}"), *TEXTS[text], "(--data)")


def test_a_model_folder_is_no_folder_of_texts(run, llama_folder):
    refused_early(run(calib=llama_folder), "found none, and it is a model folder")


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_an_empty_name_is_no_default(run, run_cli, llama_folder, text):
    """As from a shell's variable that is not set."""
    refused_early(run(eval=text), "names no text", "--eval")
    refused_early(run_cli("eval", "--model", llama_folder, f"--data={text}"), "names no text", "--data")
    refused_early(run(calib=""), "unknown text", "--calib")
    refused_early(run(model=""), "has no name", "--model")


SLIPS = [
    ({"sparsity": "50"}, ("did you mean 50%?",)),
    ({"sparsity": "2/4"}, ("did you mean 2:4?",)),
    ({"preset": "papr"}, ("did you mean paper?",)),
    ({"preset": "Best"}, ("did you mean best?",)),
    ({"method": "sparse-gpt"}, ("did you mean sparsegpt?",)),
    ({"method": "wanda+refti"}, ("did you mean wanda+refit?",)),
    ({"method": "admm+refit"}, ("admm refits by itself",)),
    ({"allocation": "owls", "sparsity": "50%"}, ("did you mean owl?",)),
    ({"kernels": "auot"}, ("did you mean auto?", "--kernels")),
    ({"kernels": "auto", "sparsity": "4:8"}, ("2:4 weights only", "--kernels")),
    ({"dtype": "f16"}, ("did you mean fp16?", "--dtype")),
    ({"device": "gpu"}, ("did you mean cuda?", "--device")),
    ({"activations": "disc"}, ("did you mean disk?", "--activations")),
    ({"bos": "alway"}, ("did you mean always?",)),
    ({"include": "lmhead"}, ("did you mean lm_head?", "--include")),
    ({"include": "lm_head", "skip": "head"}, ("lm_head", "--include", "--skip")),
    ({"only": "("}, ("regular expression", "--only")),
    ({"blocks": "0-3"}, ("not understood", "--blocks")),
    ({"blocks": "7:"}, ("out of range", "2 blocks", "--blocks")),
    ({"recipe": "fifty.tml"}, ("cannot be read", "did you mean fifty.toml?")),
    ({"recipe": "fifty.toml"}, ("rule 1", "did you mean 50%?")),
    ({"recipe": "."}, ("give a TOML file", "did you mean fifty.toml?")),
    ({"scratch": "nowhere"}, ("scratch folder nowhere does not exist", "--scratch")),
    ({"scratch": "prose.txt"}, ("scratch folder prose.txt is a file", "--scratch")),
    ({"out": "prose.txt"}, ("is a file", "--out")),
    ({"out": "prose.txt/x"}, ("cannot be made", "--out")),
    ({"revision": "main"}, ("leave it out", "--revision")),
    ({"seqlen": 65}, ("64 positions", "--seqlen")),
    ({"model": "opt-1.3"}, ("did you mean opt-1.3b?",)),
    ({"model": "./foldr"}, ("does not exist", "did you mean folder?")),
    ({"model": "prose.txt"}, ("is a file of text", "calibration")),
]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("flags", "fragments"), SLIPS)
def test_a_slip_in_a_value_is_refused_with_what_was_meant(run, flags, fragments):
    refused_early(run(**flags), *fragments)


@pytest.mark.parametrize(
    "flags", [{"kernels": "dens"}, {"dtype": "f16"}, {"device": "gpu"}, {"bos": "x"}, {"seqlen": 99}]
)
def test_eval_refuses_the_same_before_it_loads(run_cli, llama_folder, text_file, monkeypatch, flags):
    from sparsegpt.model import loading

    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded"))
    words = (f"--{key}={value}" for key, value in flags.items())
    run_cli("eval", "--model", llama_folder, "--data", text_file, *words).refused()


def test_a_plan_refuses_slips_too_but_needs_neither_texts_nor_the_device(run):
    refused_early(run("--plan", kernels="auot"), "did you mean auto?")
    refused_early(run("--plan", activations="disc"), "did you mean disk?")
    assert run("--plan", "--gpu-memory=80", calib="missing.txt", device="cuda:5").code == 0


def test_less_than_one_percent_is_doubted(run):
    outcome = run(sparsity="0.5%")
    assert outcome.code == 0
    assert "WARNING: sparsity 0.5% leaves 0.995 of the weights" in outcome.out
    assert "WARNING: sparsity" not in run("--overwrite", sparsity="0.005").out


# Models that are none


def test_a_model_that_is_not_to_be_had_leaves_no_folder(run_cli, text_file, tmp_path, monkeypatch):
    """Neither the default output folder, nor the one around it."""
    monkeypatch.chdir(tmp_path)
    outcome = run_cli("run", "--model=nobody/no-such-model", "--sparsity=2:4", f"--calib={text_file}", "--eval=none")
    outcome.refused("'nobody/no-such-model'", "without network")
    assert not list(tmp_path.iterdir())


def test_a_packed_folder_is_to_be_unpacked(run, run_cli, tmp_path):
    assert run().code == 0
    assert run_cli("pack", "out", "packed").code == 0
    refused_early(run(model="packed", out="again"), "is packed", "python -m sparsegpt unpack packed OUT")
    for words in (("quality",), ("pipeline",)):
        given = ("--model", "packed", "--calib", tmp_path / "text.txt", "--samples", 2, "--seqlen", 16)
        write_text(tmp_path / "text.txt")
        more = ("--eval", tmp_path / "text.txt") if words == ("quality",) else ()
        run_cli("bench", *words, *given, *more).refused("is packed", "unpack packed OUT")


@pytest.mark.parametrize("model_type", ["llama", "opt", "qwen3"])
def test_a_missing_tokenizer_is_found_first(run, run_cli, tmp_path, text_file, model_type):
    """Of some families the library makes one without a single word, in silence."""
    folder = save_model(tmp_path / "model", model_type)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    said = ("has no tokenizer", "tokenizer.json and tokenizer_config.json", str(folder))
    refused_early(run(model=folder), *said)
    run_cli("eval", "--model", folder, "--data", text_file).refused(*said)
    (folder / "tokenizer_config.json").write_text("{}")  # nothing in it
    run(model=folder).refused("tokenizer")


def test_a_tokenizer_that_does_not_load_is_blamed(run, llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"model": {}}')
    run(model=folder).refused("the tokenizer of model", "could not be loaded")


@pytest.mark.parametrize("command", ["inspect", "pack", "unpack"])
def test_commands_on_a_folder_know_names_and_kinds(run_cli, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.gguf").write_text("x")
    more = () if command == "inspect" else ("out",)
    run_cli(command, "mine", *more).refused("GGUF")
    run_cli(command, "mien", *more).refused("'mien'", "did you mean mine?")
    run_cli(command, "opt-1.3", *more).refused("did you mean opt-1.3b?")
    run_cli(command, "mine/a.gguf", *more).refused("is a file of GGUF weights")
    run_cli(command, "demo", *more, "--revision=old").refused("revision old", "--revision")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_inspect_takes_what_a_model_is_called(run_cli):
    assert run_cli("inspect", "demo").code == 0


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("quality", "--methods=papr"), ("did you mean paper?", "--methods")),
        (("quality", "--patterns=2/4"), ("did you mean 2:4?",)),
        (("quality", "--eval=wikitext", "--calib=pydoc"), ("did you mean wikitext2?", "--eval")),
        (("quality", "--eval=none"), ("name a text", "--eval")),
        (("quality", "--calib=wikitext"), ("did you mean wikitext2?", "--calib")),
        (("quality", "--model=opt-1.3"), ("did you mean opt-1.3b?",)),
        (("quality", "--out=."), ("cannot be written",)),
        (("pipeline", "--calib=wikitext"), ("did you mean wikitext2?", "--calib")),
        (("pipeline", "--device=gpu"), ("did you mean cuda?", "--device")),
        (("pipeline", "--seqlen=9999", "--samples=1"), ("positions", "9999")),
        (("memory", "--presets=papr"), ("did you mean paper?",)),
        (("solver", "--patterns=50"), ("did you mean 50%?",)),
        (("decode", "demo", "demo", "--kernels=auot"), ("did you mean auto?", "--kernels")),
        (("decode", "demo", "demo", "--dtype=f16"), ("did you mean fp16?", "--dtype")),
        (("decode", "demo", "demo"), ("not packed here",)),
    ],
)
def test_benchmarks_refuse_before_they_measure(run_cli, tmp_path, monkeypatch, words, fragments):
    monkeypatch.chdir(tmp_path)
    run_cli("bench", *words).refused(*fragments)


# One line, whatever was typed


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("run",), ("--sparsity", "sparsegpt run --help")),
        (("run", "--sparsty", "2:4"), ("--sparsty", "--sparsity")),
        (("frun",), ("frun", "run", "sparsegpt --help")),
        (("bench", "decod"), ("decode", "sparsegpt bench --help")),
        (("run", "--sparsity", "2:4", "--samples", "x"), ("--samples",)),
        (("run", "--sparsity", "2:4", "--seed", "9" * 30), ("--seed",)),
        (("run", "--sparsity", "2:4", "extra\nwords"), ("extra",)),
        (("run", "--sparsity"), ("--sparsity",)),
        (("run", "--sparsity", "2:4", "--out=~nobody-of-this-name/x"), ("--out", "no such user")),
        (("pack", "here"), ("out",)),
    ],
)
def test_wrong_usage_is_one_line_too(run_cli, words, fragments):
    outcome = run_cli(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("sparsegpt: ")
    assert outcome.err.count("\n") == 1
    assert all(fragment in outcome.err for fragment in fragments)


@pytest.mark.parametrize("words", [(), ("bench",)])
def test_without_words_there_is_help(run_cli, words):
    outcome = run_cli(*words)
    assert outcome.code == 2
    assert "Usage: sparsegpt" in outcome.out
    assert outcome.err == ""


NAMELESS = "no\nsuch\r\nthing\u2028"


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--sparsity", NAMELESS),
        ("run", "--sparsity=2:4", "--model", NAMELESS),
        ("run", "--sparsity=2:4", "--model", f"./{NAMELESS}"),
        ("run", "--sparsity=2:4", "--recipe", NAMELESS),
        ("run", "--sparsity=2:4", "--scratch", NAMELESS),
        ("run", "--sparsity=2:4", "--preset", NAMELESS),
        ("run", "--sparsity=2:4", "--method", NAMELESS),
        ("run", "--sparsity=2:4", "--method", f"{NAMELESS}:x"),
        ("eval", "--data", NAMELESS),
        ("eval", "--model", f"./{NAMELESS}"),
        ("inspect", f"./{NAMELESS}"),
        ("pack", f"./{NAMELESS}", "out"),
        ("unpack", NAMELESS, "out"),
        ("bench", "quality", "--methods", NAMELESS),
        ("bench", "decode", f"./{NAMELESS}", "x"),
        ("bench", NAMELESS),
        ("tune", "--device", NAMELESS),
    ],
)
def test_line_breaks_in_a_name_make_no_lines(run_cli, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    outcome = run_cli(*words)
    assert outcome.code in (1, 2)
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("words", [("eval",), ("run", "--sparsity", "2:4", "--plan"), ("inspect", "demo")])
def test_an_interrupt_anywhere_is_one_line(run_cli, monkeypatch, words):
    from sparsegpt.model import loading
    from sparsegpt.run import inspection, planning

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for module, name in ((loading, "load_config"), (planning, "plan_run"), (inspection, "inspect_folder")):
        monkeypatch.setattr(module, name, interrupt)
    outcome = run_cli(*words)
    assert (outcome.code, outcome.err) == (130, "sparsegpt: interrupted\n")


def test_an_interrupted_run_says_what_is_left(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", interrupt)
    outcome = run()
    assert (outcome.code, outcome.err) == (130, "sparsegpt: interrupted out; nothing was written\n")


def test_a_home_folder_is_found_where_the_shell_leaves_it(run, run_cli, llama_folder, text_file, tmp_path, monkeypatch):
    """As in --model=~/model."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(llama_folder, tmp_path / "model")
    shutil.copy(text_file, tmp_path / "text.txt")
    (tmp_path / "scratch").mkdir()
    outcome = run(model="~/model", calib="~/text.txt", eval="~/text.txt", out="~/pruned", scratch="~/scratch")
    assert outcome.code == 0, outcome.err
    assert run_cli("pack", "~/pruned", "~/packed").code == 0
    assert (tmp_path / "packed" / "config.json").is_file()
    assert not (tmp_path / "~").exists()


def test_other_names_of_dtypes_are_taken(run, tmp_path):
    assert run(dtype="bf16").code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stored_dtype"] == "bfloat16"
    assert run("--overwrite", dtype="fp16").code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stored_dtype"] == "float16"


# Tables in a terminal of 80 columns


LONG = "/home/somebody/projects/language-models/evaluation/held-out/a-collection-of-prose-from-many-sources-part-"


def report_on(*texts: str) -> dict:
    """What `print_report` reads, of a run that was scored on these texts."""
    layer = {"name": "model.decoder.layers.0.fc1", "shape": (9, 9), "zeros": 0.5, "relative_error": 0.1}
    scores = {text: {"dense": 12.5, "pruned": 14.5} for text in texts}
    return {
        "model": "m",
        "sparsity": "2:4",
        "perplexity": scores,
        "bits_per_byte": scores,
        "tokens_per_second": scores,
        "layers": [layer],
        "seconds": {"total": 1.0},
        "peak_memory_bytes": 1 << 30,
        "density_of_pruned_linears": 0.5,
        "bits_per_weight": None,
    }


def printed(print_, *arguments: object, width: int | None = 80) -> str:
    file = io.StringIO()
    print_(Console(width=width, markup=False, emoji=False, highlight=False, file=file), *arguments)
    return file.getvalue()


def column(table: str, index: int) -> list[str]:
    """The cells of a printed table's column, the broken ones joined."""
    cells: list[str] = []
    for line in table.splitlines():
        if line.startswith("│"):
            parts = [part.strip() for part in line.strip("│").split("│")]
            if parts[1]:
                cells.append(parts[index])
            else:
                cells[-1] += parts[index]
    return cells


@pytest.mark.parametrize(
    "texts",
    [
        (f"{LONG}a.txt", f"{LONG}b.txt"),
        (f"{LONG}a/held-out.txt", f"{LONG}b/held-out.txt"),
        ("x" * 90 + "a", "x" * 90 + "b"),
        ("wikitext2", f"{LONG}a.txt"),
    ],
)
def test_texts_that_differ_in_their_last_letters_stay_apart(texts, tmp_path):
    table = printed(print_report, report_on(*texts), tmp_path)
    assert all(len(line) <= 80 for line in table.splitlines() if line.startswith("│"))
    named = column(table, 0)[:4]
    assert named == [short_names(texts)[text] for text in texts for _ in range(2)]
    assert len(set(named)) == 2
    assert column(table, 2)[:4] == ["12.5000", "14.5000"] * 2


@pytest.mark.parametrize(("width", "headings"), [(40, 3), (50, 3), (55, 4), (59, 4), (60, 5)])
def test_a_narrow_terminal_shows_names_and_whole_numbers(monkeypatch, width, headings, tmp_path):
    """What it has no room for stands in report.json."""
    monkeypatch.setenv("COLUMNS", str(width))
    texts = ("wikitext2", f"{LONG}a.txt")
    table = printed(print_report, report_on(*texts), tmp_path, width=None)
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert all(len(line) <= width for line in rows)
    assert rows[0].count("│") == headings + 1
    assert column(table, 0)[:4] == [short_names(texts)[text] for text in texts for _ in range(2)]
    assert column(table, 2)[:4] == ["12.5000", "14.5000"] * 2


def test_short_names_are_the_ends_of_long_ones():
    assert short_names(["ptb", "a/b.txt"]) == {"ptb": "ptb", "a/b.txt": "a/b.txt"}
    assert short_names([f"{LONG}a.txt"]) == {f"{LONG}a.txt": f"{LONG.rpartition('/')[2]}a.txt"}
    assert set(short_names([f"/{'x' * 40}/a/c.txt", "/b/c.txt"]).values()) == {"a/c.txt", "b/c.txt"}
    assert set(short_names([f"{'x' * 40}/", f"{'y' * 40}/"]).values()) == {f"{'x' * 40}/", f"{'y' * 40}/"}


def test_weights_stay_apart_in_the_table_of_inspect():
    names = [f"model.layers.11.block_sparse_moe.experts.12{last}.gate_up_proj" for last in range(8)]
    findings = [TensorFinding(name, (14336, 4096), 0.5, "2:4", ok=True, stored="packed bfloat16") for name in names]
    table = printed(print_findings, findings)
    assert column(table, 0) == names
    assert column(table, 1) == ["14336 x 4096"] * 8
    assert column(table, 3) == ["50.00%"] * 8
