"""The page: what it says is what reports say, escaped; bad reports are named; a browser shows it without complaint."""

import json
import time
from html.parser import HTMLParser

import pytest

from sparsegpt.eval.report.charts import Axis, Point, Series, chart
from sparsegpt.eval.report.layers import Layers, place_of
from sparsegpt.eval.report.page import page
from sparsegpt.eval.report.reading import read_runs, run_of
from sparsegpt.eval.report.several import settings_of, view
from sparsegpt.files.results import write_marker
from tests.eval.browser import CHROMIUM, Browser
from tests.eval.reports import KINDS, folder, report
from tests.support import refused

MARKUP = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>"


class Read(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [value or "" for _, value in attrs]

    def handle_data(self, data):
        self.text += data


def one(**changes):
    return Read(page([run_of(report(**changes), "run")]))


def many(count, tmp_path):
    scores = [{"held-out": {"dense": 10.0, "pruned": 11.0 + place % 7}} for place in range(count)]
    places = [folder(tmp_path / f"run-{place}", perplexity=score) for place, score in enumerate(scores)]
    return read_runs(places)[0]


def in_tasks(dense, pruned, stderr=0.01):
    scores = {which: {"value": value, "stderr": stderr} for which, value in (("dense", dense), ("pruned", pruned))}
    return {"arc_easy": {"acc": scores}}


# What it says


def test_a_page_of_one_run_says_what_its_report_says():
    found = one()
    for said in (
        "tiny pruned to 2:4",
        "10.00 → 12.50",
        "+25.0%",
        "50.0%",
        "1 min 5 s",
        "a warning of this run",
        "sparsegpt run --model tiny",
        "… more",
        "… less",
        "model.layers.2.mlp.down_proj",  # the worst
        "Training of all blocks together",
        "Training of single blocks",
    ):
        assert said in found.text
    assert found.tags.count("polyline") == 1 + 1 + 3 + 1  # errors, epochs, a line a block, what training left


def test_a_page_of_one_run_has_its_tasks_with_their_errors():
    found = " ".join(one().text.split())
    assert "task and metric dense pruned change" in found
    assert "arc_easy acc 0.5000 ± 0.0158 0.4688 -0.0312" in found  # of the pruned model no error is known
    packed = {**in_tasks(0.5, 0.25)["arc_easy"]["acc"], "kernels": {"value": 0.75, "stderr": None}}
    found = " ".join(one(tasks={"arc_easy": {"acc": packed}}).text.split())
    assert "dense pruned kernels change" in found
    assert "0.2500 ± 0.0100 0.7500 -0.2500" in found
    assert "task and metric" not in one(tasks={}).text


def test_sizes_are_those_of_the_definition():
    """Half of the model's weights are pruned, to 2:4: 9 bits of 16 each."""
    run = run_of(report(), "run")
    weights = 3 * len(KINDS) * 64 * 32
    assert run.dense_bytes == 2 * 2 * weights
    assert run.packed_bytes == weights * 2 + weights * 9 // 8
    assert run.zeros == 0.5


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.mlp.up_proj", 3, "mlp.up_proj"),
        ("transformer.h.11.attn.c_attn", 11, "attn.c_attn"),
        ("model.layers.3.mlp.experts.7.up_proj", 3, "mlp.experts.*.up_proj"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_a_layer_has_a_block_and_a_kind(name, block, kind):
    assert place_of(name) == (block, kind)


def test_a_heat_map_has_the_mean_error_of_each_kind_in_each_block():
    layers = report()["layers"]
    experts = [{**layers[0], "name": f"model.layers.1.mlp.experts.{n}.up", "relative_error": n / 10} for n in range(3)]
    [heat] = Layers(run_of(report(layers=layers + experts), "run")).maps
    rows = dict(heat.rows)
    assert heat.blocks == (0, 1, 2)
    assert [cell.value for cell in rows["mlp.down_proj"]] == pytest.approx([0.004, 0.008, 0.012])
    assert rows["mlp.experts.*.up"][0] is None
    assert rows["mlp.experts.*.up"][1].value == pytest.approx(0.1)
    assert rows["mlp.experts.*.up"][1].share == pytest.approx(1.0)


def test_marks_lie_where_their_numbers_say():
    linear = Axis.over("", [0.0, 10.0], str, from_zero=True)
    assert linear.place(5) - linear.place(0) == pytest.approx(linear.place(10) - linear.place(5))
    ratios = Axis.over("", [1.0, 100.0], str)
    assert ratios.place(10) - ratios.place(1) == pytest.approx(ratios.place(100) - ratios.place(10))
    for axis in (linear, ratios):
        assert all(0 <= tick.at <= 100 for tick in axis.ticks)
        assert len(axis.ticks) >= 2


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-1e29, 1e29], [1e-320, 1.0], [5.0, 5.0 + 1e-15], [1, 2, 1e9]])
def test_any_numbers_can_be_drawn(values):
    points = tuple(Point(place, value, "") for place, value in enumerate(values))
    drawn = chart("", [Series("", points)], ("", str), ("", str))
    assert all(0 <= drawn.y.place(value) <= 100 for value in values)
    assert drawn.y.ticks


def test_numbers_without_end_are_left_out_of_plots():
    points = tuple(Point(place, value, "") for place, value in enumerate([1.0, float("inf"), float("nan"), 2.0]))
    assert [point.y for point in chart("", [Series("", points)], ("", str), ("", str)).series[0].points] == [1.0, 2.0]
    assert chart("", [Series("", points[1:3])], ("", str), ("", str)) is None


# Several


def test_settings_that_differ_are_told_from_those_that_are_alike():
    runs = [run_of(report(settings={"damping": value, "distill": 2}), str(value)) for value in (None, None, 0.1)]
    differing, alike = settings_of(runs)
    assert differing == {"damping": ["none", "none", "0.1"]}
    assert alike["distill"] == "2"


def test_the_best_of_as_many_zeros_is_named(tmp_path):
    found = Read(page(many(6, tmp_path)))
    assert "6 runs compared" in found.text
    assert "about 50% zeros: 11.00, " in found.text
    assert found.tags.count("svg") >= 3


def test_scores_in_tasks_stand_side_by_side_and_sort_as_numbers(tmp_path):
    other = {"boolq": {"f1": {"pruned": {"value": 0.9, "stderr": None}}}}
    both = [folder(tmp_path / "a", tasks=in_tasks(0.5, 0.25)), folder(tmp_path / "b", tasks=other)]
    table = view(read_runs([*both, folder(tmp_path / "c", tasks={})])[0])["tasks"]
    assert table.heads == ["pruned on arc_easy acc", "dense on arc_easy acc", "pruned on boolq f1", "dense on boolq f1"]
    assert [value.text for value in table.rows[0].values] == ["0.2500 ± 0.0100", "0.5000 ± 0.0100", "–", "–"]
    assert [value.key for value in table.rows[1].values] == [None, None, 0.9, None]
    assert view(read_runs([folder(tmp_path / "none", tasks={})])[0])["tasks"] is None


def test_what_scores_depend_on_is_among_the_settings_that_differ():
    runs = [run_of(report(evaluation={"task limit": limit}), str(limit)) for limit in (None, 100)]
    assert settings_of(runs)[0] == {"evaluation task limit": ["none", "100"]}


def test_two_hundred_runs_are_one_page(tmp_path):
    runs = many(200, tmp_path)
    found = page(runs)
    assert len(found) < 3e6
    assert all(f"run-{place}<" in found for place in (0, 99, 199))


def test_a_model_of_eighty_blocks_is_a_small_page():
    started = time.process_time()
    text = page([run_of(report(blocks=80), "run")])
    taken = time.process_time() - started
    print(f"80 blocks: {len(text)} bytes in {taken:.2f} CPU s")
    assert len(text.encode()) < 3e6


# Bad input


def test_markup_is_text_everywhere():
    """Every text of a report is replaced by markup; the page has the elements that it had before, and no more."""

    def spoilt(value, key=""):
        if isinstance(value, dict):
            return {(f"{MARKUP}{name}" if key in FREE else name): spoilt(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [spoilt(item, key) for item in value]
        return value + MARKUP if isinstance(value, str) else value

    free = {"perplexity": {MARKUP: {"dense": 10.0, "pruned": 12.5}}, "seconds": {MARKUP: 4.0, "total": 5.0}}
    free |= {"tasks": {MARKUP: {MARKUP: {MARKUP: {"value": 0.5}}}}}
    dirty = {**spoilt(report()), **free, "stored_dtype": MARKUP}
    clean = one(seconds={"else": 4.0, "total": 5.0})
    found = Read(page([run_of(dirty, MARKUP)], (MARKUP,)))
    assert found.tags.count("script") == clean.tags.count("script") == 1
    assert "img" not in found.tags
    assert MARKUP in found.text
    compared = Read(page([run_of(dirty, MARKUP), run_of(report(), "b")], (MARKUP,)))
    assert compared.tags.count("script") == 1
    assert "img" not in compared.tags
    assert MARKUP in compared.text


FREE = ("settings", "versions", "perplexity")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "expected a report.json"),
        (lambda path: path.write_text("{"), "cannot be read as JSON"),
        (lambda path: path.write_text("[]"), "checksum"),
        (lambda path: path.write_text(path.read_text().replace("12.5", "11.5")), "checksum does not match"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "damaged"),
    ],
    ids=["none", "no JSON", "a list", "a digit", "binary"],
)
def test_a_damaged_report_is_named_and_skipped(tmp_path, spoil, said):
    good, bad = folder(tmp_path / "good"), folder(tmp_path / "bad")
    spoil(bad / "report.json")
    runs, [line] = read_runs([good, bad])
    assert [run.report["model"] for run in runs] == ["tiny"]
    assert str(bad) in line
    assert said in line
    with refused(str(bad), said):
        read_runs([bad])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"report_version": 2}, "update sparsegpt"),
        ({"layers": "none"}, "report.layers"),
        ({"layers": [{"name": "a"}]}, "lacks"),
        ({"perplexity": {"a": 3}}, "report.perplexity.a"),
        ({"tasks": {"arc_easy": {"acc": {"dense": 0.5}}}}, "report.tasks.arc_easy.acc.dense"),
        ({"before_change": {"perplexity": {"a": 3}}}, "report.perplexity.a"),
        ({"peak_memory_bytes": 10**300}, "beyond all bounds"),
    ],
    ids=["newer", "no layers", "no shape", "no scores", "no task scores", "no scores before", "huge"],
)
def test_a_report_of_another_version_is_named_and_skipped(tmp_path, changes, said):
    good, other = folder(tmp_path / "good"), folder(tmp_path / "other", **changes)
    runs, [line] = read_runs([good, other])
    assert len(runs) == 1
    assert f"{other}/report.json" in line
    assert said in line


@pytest.mark.parametrize(
    "left", ["perplexity", "tasks", "samples", "seconds", "blocks", "epochs", "parameters", "calibration"]
)
def test_an_older_report_has_a_page_without_what_it_lacks(left):
    full = report()
    del full[left]
    assert "tiny pruned to 2:4" in page(
        [
            run_of(full, "run"),
        ][:1]
    )
    assert "2 runs compared" in page([run_of(full, "run"), run_of(report(), "other")])


def test_a_run_without_a_score_says_so():
    assert "was not scored" in one(perplexity={}, tasks={}).text
    assert "nothing says which is best" in Read(page([run_of(report(perplexity={}), name) for name in "ab"])).text


def test_infinite_and_missing_numbers_are_shown_as_such():
    layers = report()["layers"]
    layers[0] |= {"relative_error": float("nan"), "zeros": float("inf")}
    found = one(perplexity={"a": {"dense": float("inf"), "pruned": float("nan")}}, layers=layers, seconds={"total": -1})
    assert "∞ → –" in found.text


def test_scores_of_changed_weights_are_those_before():
    scores = report()["perplexity"]
    before = {"change": "values rounded to int4", "perplexity": scores, "tasks": in_tasks(0.5, 0.25)}
    found = one(perplexity={}, tasks={}, before_change=before)
    assert "values rounded to int4" in found.text
    assert "10.00 → 12.50" in found.text
    assert "0.2500 ± 0.0100" in found.text


def test_a_page_never_replaces_what_it_must_not(tmp_path, run_cli):
    run, out = folder(tmp_path / "run"), tmp_path / "page.html"
    assert run_cli("report", run, "--out", out).code == 0
    run_cli("report", run, "--out", out).refused("exists", "--overwrite")
    assert run_cli("report", run, run, "--out", out, "--overwrite").code == 0
    run_cli("report", run, "--out", tmp_path).refused("is a folder")
    write_marker(run, "run")
    run_cli("report", run, "--out", run / "page.html").refused("keeps whole")
    assert sorted(path.name for path in run.iterdir()) == [".sparsegpt.json", "report.json"]


def test_what_is_skipped_is_said_on_the_page_too(tmp_path, run_cli):
    outcome = run_cli("report", folder(tmp_path / "a"), tmp_path / "nowhere", "--out", tmp_path / "page.html")
    assert outcome.code == 0
    assert outcome.err.count("\n") == 1
    assert "nowhere" in outcome.err
    assert "nowhere" in (tmp_path / "page.html").read_text()


# In a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: Debian's package `chromium` has one")
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    place = tmp_path_factory.mktemp("pages")
    (place / "one.html").write_text(page([run_of(report(), "run")]))
    (place / "long.html").write_text(page([run_of(report(blocks=80, model="m" * 90), "run")]))
    (place / "several.html").write_text(page(many(6, place)))
    return place


SMALLEST = """Math.min(...[...document.querySelectorAll("body *")].filter(part => [...part.childNodes].some(
    child => child.nodeType === 3 && child.data.trim())).map(part => parseFloat(getComputedStyle(part).fontSize)))"""
# Marks, lines and cells that are there to be seen.
DRAWN = """[...document.querySelectorAll(".plot circle, .plot polyline, .heat td")].filter(part => {
    const box = part.getBoundingClientRect(); return box.width > 0 && box.height > 0}).length"""
CONTRAST = """(() => {
    const light = (text) => { const c = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
    const [a, b] = [getComputedStyle(document.querySelector(".lead")).color,
        getComputedStyle(document.body).backgroundColor].map(light);
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); })()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("name", ["one", "long", "several"])
def test_a_page_opens_without_complaint_and_fits(browser, pages, name, width, dark):
    browser.open(pages / f"{name}.html", width=width, dark=dark)
    assert browser.complaints == []
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value(SMALLEST) >= 12
    assert browser.value(DRAWN) >= (18 if name == "several" else 12)
    assert browser.value(
        "[...document.querySelectorAll('.plot > svg')].every(part => part.getBoundingClientRect().height > 0)"
    )
    assert browser.value(CONTRAST) >= 4.5


def column(browser, place):
    rows = f"[...document.querySelectorAll('.sortable')[0].tBodies[0].rows].map(row => row.cells[{place}].textContent)"
    return browser.value(rows)


def test_the_table_sorts_by_keyboard_and_says_so(browser, pages):
    browser.open(pages / "several.html", width=1200)
    before = [float(text) for text in column(browser, 2)]
    head = "document.querySelectorAll('.sortable')[0].tHead.rows[0].cells[2]"
    for direction, order in (("ascending", sorted(before)), ("descending", sorted(before, reverse=True))):
        browser.value(f"{head}.firstElementChild.focus()")
        browser.press("Enter", 13)
        assert [float(text) for text in column(browser, 2)] == order
        assert browser.value(f"{head}.getAttribute('aria-sort')") == direction


def test_what_scrolls_and_what_opens_can_be_reached_by_keyboard(browser, pages):
    browser.open(pages / "one.html", width=360)
    seen = set()
    for _ in range(20):
        browser.press("Tab", 9)
        seen.add(browser.value("document.activeElement.className || document.activeElement.tagName"))
    assert {"skip", "scroll", "SUMMARY"} <= seen
    unnamed = "[...document.querySelectorAll('svg[role=img], [role=region]')].filter(part => !part.ariaLabel).length"
    assert browser.value(unnamed) == 0
    assert browser.value("[...document.querySelectorAll('th')].every(head => head.scope)")


def test_a_page_asks_nothing_of_a_network(pages):
    for name in ("one", "several"):
        found = Read((pages / f"{name}.html").read_text())
        assert not [value for value in found.attributes if value.startswith(("http", "//"))]
        assert json.dumps(found.tags).count('"link"') == 1  # the empty icon
