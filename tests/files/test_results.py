"""Results are replaced, and nothing else is: neither a person's files nor what is being read."""

import json
import multiprocessing
import os

import pytest

from sparsegpt.files.results import MARKER, check_target, claimed, is_whole, new_result, read_marker, unfinished_folder
from tests.support import refused


def write(target, content="old", **options):
    with new_result(target, "test", overwrite=True, **options) as draft:
        (draft / "report.json").write_text(content)
        (draft / "model.safetensors").write_bytes(b"weights")
        (draft / "sub").mkdir()
        (draft / "sub" / "deep.txt").write_text(content)


@pytest.fixture
def result(tmp_path):
    write(tmp_path / "result")
    return tmp_path / "result"


@pytest.fixture
def documents(tmp_path):
    """A folder of a person's own."""
    folder = tmp_path / "documents"
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "one.jpg").write_bytes(b"1")
    return folder


def test_a_result_is_marked_and_replaced(result):
    assert read_marker(result).keys() == {"report.json", "model.safetensors", "sub/deep.txt"}
    assert is_whole(result)
    write(result, "new")
    assert (result / "sub" / "deep.txt").read_text() == "new"
    assert is_whole(result)
    assert [path.name for path in result.parent.iterdir()] == ["result"]


def test_it_is_not_replaced_unless_asked(result):
    with refused(str(result), "not empty", settings=["overwrite", "out"]):
        check_target(result, overwrite=False)


def test_an_empty_folder_and_none_may_be_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none", "a/b/c"):
        check_target(tmp_path / name, overwrite=False)


def test_a_persons_folder_is_refused(documents):
    with refused(str(documents), "was not written by this program"):
        check_target(documents, overwrite=True)


@pytest.mark.parametrize("marker", ["", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}', "[" * 100_000])
def test_a_damaged_marker_marks_nothing(documents, marker):
    (documents / MARKER).write_text(marker)
    with refused("was not written by this program"):
        check_target(documents, overwrite=True)


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", ".hidden", "other.safetensors"])
def test_a_file_that_was_added_to_a_result_is_named_and_kept(result, name):
    (result / name).write_text("mine")
    with refused(name, "did not write"):
        check_target(result, overwrite=True)
    with refused(name):
        write(result, "new")
    assert (result / name).read_text() == "mine"
    assert (result / "report.json").read_text() == "old"


def test_a_link_that_was_added_is_kept_too(result, documents):
    (result / "link").symlink_to(documents)
    with refused("link"):
        check_target(result, overwrite=True)


def test_a_file_that_was_edited_is_named_and_kept(result):
    (result / "report.json").write_text("old, with my remarks")
    assert not is_whole(result)
    with refused("report.json", "changed since"):
        check_target(result, overwrite=True)


def test_a_shorter_weight_file_is_not_whole(result):
    (result / "model.safetensors").write_bytes(b"weigh")
    assert not is_whole(result)


def test_a_missing_file_is_not_whole_but_may_be_replaced(result):
    (result / "report.json").unlink()
    assert not is_whole(result)
    check_target(result, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_current_folder_and_those_around_it_are_refused(result, monkeypatch, overwrite):
    (result / "sub").mkdir(exist_ok=True)
    monkeypatch.chdir(result / "sub")
    for target in (result, result.parent, result / "sub"):
        with refused("current folder"):
            check_target(target, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_read_is_refused_by_where_paths_lead(result, tmp_path, overwrite):
    model = tmp_path / "models" / "mine"
    write(model)
    (tmp_path / "way").symlink_to(model)
    for source in (model, tmp_path / "way"):
        for target in (model, model.parent):
            with refused("read"):
                check_target(target, overwrite=overwrite, sources=[source])
        with refused("lies inside"):
            check_target(model / "pruned", overwrite=overwrite, sources=[source])
    (tmp_path / "around").symlink_to(model.parent)
    with refused("read"):
        check_target(tmp_path / "around" / "mine", overwrite=overwrite, sources=[model])
    check_target(model.parent / "other", overwrite=overwrite, sources=[model])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(tmp_path, overwrite):
    (tmp_path / "file").write_text("precious")
    with refused("is a file"):
        check_target(tmp_path / "file", overwrite=overwrite)
    with refused("file"):
        check_target(tmp_path / "file" / "result", overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_link_as_target_is_refused(tmp_path, overwrite, exists):
    if exists:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with refused("symbolic link"):
        check_target(tmp_path / "link", overwrite=overwrite)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/.."])
def test_a_target_without_a_name_of_its_own_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with refused("output"):
        check_target(tmp_path / "a" / name if name != "/" else tmp_path.__class__("/"), overwrite=True)


def test_a_parent_that_cannot_be_written_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with refused("not writable"):
        check_target(tmp_path / "a" / "result", overwrite=False)


# Claims


def _hold(target, ready, done):
    with claimed(target):
        ready.set()
        done.wait(30)


def test_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "result", ready, done))
    holder.start()
    assert ready.wait(60)
    with refused("another process is writing"), claimed(tmp_path / "result"):
        pass
    done.set()
    holder.join()
    write(tmp_path / "result")
    assert not unfinished_folder(tmp_path / "result").exists()


def test_a_claim_clears_up_after_a_killed_one_and_leaves_what_others_keep_there(result):
    (result.parent / f".{result.name}.77.writing").mkdir()
    result.rename(result.parent / f".{result.name}.77.old")
    with claimed(result) as folder:
        assert is_whole(result)
        (folder / "state.json").write_text("{}")
    assert sorted(path.name for path in result.parent.iterdir()) == [f".{result.name}.unfinished", result.name]


@pytest.mark.parametrize("part", ["", "lock"])
def test_no_link_leads_a_claim_away(tmp_path, documents, part):
    folder = unfinished_folder(tmp_path / "result")
    if part:
        folder.mkdir()
    (folder / part).symlink_to(documents if not part else documents / "photos" / "one.jpg")
    with refused("symbolic link"), claimed(tmp_path / "result"):
        pass
    assert (documents / "photos" / "one.jpg").read_bytes() == b"1"


def test_a_failing_command_leaves_the_old_result_and_nothing_else(result):
    before = json.loads((result / MARKER).read_text())
    with pytest.raises(ZeroDivisionError), new_result(result, "test", overwrite=True) as draft:
        (draft / "report.json").write_text("half")
        raise ZeroDivisionError
    assert json.loads((result / MARKER).read_text()) == before
    assert is_whole(result)
    assert [path.name for path in result.parent.iterdir()] == ["result"]


def test_folders_that_were_made_for_nothing_go(tmp_path):
    """Those that were there stay, and so does everything around a result."""
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "there" / "new" / "deep" / "result", tmp_path / "other" / "result"):
        with pytest.raises(ZeroDivisionError), claimed(target):
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    result = tmp_path / "new" / "result"
    with new_result(result, "test", overwrite=False) as draft:
        (draft / "file").touch()
    assert (result / "file").exists()
