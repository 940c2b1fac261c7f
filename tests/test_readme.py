"""What README and docs/ promise: their commands and their Python run from top to bottom, flags and links exist."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer.main
from transformers import AutoConfig, AutoModelForCausalLM

from sparsegpt import calib_data
from sparsegpt.cli import commands as cli
from sparsegpt.settings import naming
from tests.architectures import architecture_table

ROOT = Path(__file__).parents[1]
# In the order in which they are read: what one page writes, a later one may use.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENGINE = re.compile(r"^(?:\$ )?(?:\S*python3? -m )?sparsegpt ")
# A reader's own model cannot be had here: of `--model`, what an earlier command wrote, the demo, and one that is only
# planned for. A benchmark or a study takes minutes, pushing an account, and completion is installed in the home folder.
ELSEWHERE = re.compile(r"--model (?!demo\b|pruned/|opt-175b\b)|bench |^(?:push|study) |--install-completion")
# Less text than a reader would take, for the same commands.
SHORTER = {
    "run": ["--samples", "8", "--seqlen", "64", "--eval", "none"],
    "shrink": ["--samples", "8", "--seqlen", "64", "--eval", "none", "--no-speed"],
    "eval": ["--seqlen", "64", "--eval-windows", "4"],
    "tune": ["--shapes", "32x64", "--tokens", "1", "--rounds", "1"],
}


class Block(NamedTuple):
    """A fenced block of a page. file: the name in its first line, as `# mix.toml`, or ""."""

    language: str
    code: str
    file: str


def blocks_of(page: Path) -> list[Block]:
    found = []
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL):
        name = re.match(r"# (\S+\.(?:py|toml))\n", code)
        found.append(Block(language, code, name[1] if name else ""))
    return found


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def calls(block: Block) -> list[list[str]]:
    """The arguments of every command of a shell block that calls the engine, continued lines joined."""
    if block.language not in ("sh", "bash", "console"):
        return []
    lines = block.code.replace("\\\n", " ").split("\n")
    return [shlex.split(ENGINE.sub("", line), comments=True) for line in lines if ENGINE.match(line)]


def name_of(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else " ".join(value)


ALL_CALLS = [(page, words) for page in PAGES for block in blocks_of(page) for words in calls(block)]
each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


class Reader:
    """Does in one folder what the pages say, block by block, in this process. demo: the folder of the demo model."""

    def __init__(self, folder: Path, demo: Path) -> None:
        self.folder, self.demo = folder, demo
        self.read: set[Path] = set()

    def read_up_to(self, page: Path) -> None:
        """The page, and before it those that come first."""
        for earlier in PAGES[: PAGES.index(page) + 1]:
            if earlier not in self.read:
                self.read.add(earlier)
                for block in blocks_of(earlier):
                    with pytest.MonkeyPatch.context() as patch:
                        patch.chdir(self.folder)
                        patch.syspath_prepend(self.folder)
                        for module in (calib_data, naming):
                            patch.setattr(module, "demo_folder", lambda: self.demo)
                        self.do(block, patch)

    def do(self, block: Block, patch: pytest.MonkeyPatch) -> None:
        if block.file:
            (self.folder / block.file).write_text(block.code, encoding="utf-8")
            sys.modules.pop(Path(block.file).stem, None)  # of another reader
        if block.language == "python":
            exec(compile(block.code, block.file or "<block>", "exec"), {"__name__": "__main__"})
        for words in calls(block):
            if not ELSEWHERE.search(" ".join(words)):
                patch.setattr(sys, "argv", ["sparsegpt", *words, *SHORTER.get(words[0], [])])
                try:
                    cli.main()
                except SystemExit as ended:
                    assert not ended.code, " ".join(words)


def save_narrow_demo(folder: Path) -> Path:
    """The demo with its tokenizer and its blocks, an eighth as wide: for commands, any weights do."""
    shutil.copytree(calib_data.demo_folder(), folder)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.word_embed_proj_dim, config.ffn_dim = 32, 32, 128
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    return Reader(folder, save_narrow_demo(folder / "narrow-demo"))


@each_page
def test_a_page_works_from_top_to_bottom(page, reader):
    reader.read_up_to(page)


def test_the_readme_works_with_the_demo_itself(tmp_path):
    Reader(tmp_path, calib_data.demo_folder()).read_up_to(PAGES[0])
    assert (tmp_path / "pruned/demo/report.json").is_file()
    assert {"sh", "python"} <= {block.language for block in blocks_of(PAGES[0])}


@pytest.mark.parametrize(("page", "words"), ALL_CALLS, ids=name_of)
def test_every_command_and_flag_exists(page, words):
    """Also of commands that need the Hub or a GPU."""
    found, words = typer.main.get_command(cli.app), list(words)
    while hasattr(found, "commands") and not words[0].startswith("-"):
        found = found.commands[words.pop(0)]
    flags = {flag for parameter in found.params for flag in parameter.opts} | {"-h", "--help"}
    assert {word.split("=")[0] for word in words if re.match("--?[a-z]", word)} <= flags


@each_page
def test_targets_of_make_exist(page):
    shell = "".join(block.code for block in blocks_of(page) if block.language in ("sh", "bash", "console"))
    wanted = re.findall(r"^(?:\$ )?make ([\w-]+)", shell, flags=re.MULTILINE)
    wanted += re.findall(r"`make ([\w-]+)", text_of(page))
    assert set(wanted) <= set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))


@each_page
def test_blocks_are_of_languages_that_are_tested(page):
    """What is not run is called text."""
    assert {block.language for block in blocks_of(page)} <= {"sh", "bash", "console", "python", "toml", "text"}
    assert text_of(page).count("```") == 2 * len(blocks_of(page))
    assert all(block.file for block in blocks_of(page) if block.language == "toml")


@each_page
def test_no_place_holder_is_left(page):
    assert not re.findall(r"@@\w+@@|TODO|FIXME", text_of(page))


def prose(page: Path) -> str:
    """A page without its code, in which brackets mean something else."""
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What links to headings of a page are called: small letters and hyphens, without punctuation."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)", prose(page)):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w[^)#]*)", text_of(PAGES[0])))
    assert linked >= {name_of(page) for page in PAGES[1:]}


def test_the_table_of_architectures_is_that_of_the_code():
    """`python -m tests.architectures` prints it."""
    page = text_of(ROOT / "docs/architectures.md")
    found = re.search(r"<!-- architectures -->\n(.*?)\n<!-- /architectures -->", page, flags=re.DOTALL)
    assert found
    assert found[1] == architecture_table()
