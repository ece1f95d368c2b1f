"""What benchmarks keep: lines that were written whole, and a digest of what decides them."""

from pathlib import Path

from bench import kept


def test_lines_are_found_again_and_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert kept.lines(path) == []
    kept.append(path, {"a": 1})
    whole = path.read_text()
    path.write_text(whole + whole[:4])
    assert kept.lines(path) == [{"a": 1}]
    kept.append(path, {"a": 2})
    assert kept.lines(path) == [{"a": 1}, {"a": 2}]


def test_a_digest_changes_with_words_and_files_and_with_nothing_else(tmp_path: Path) -> None:
    def digest(*words: str) -> str:
        return kept.digest(*words, files=("code/*.py",), repository=tmp_path)

    (tmp_path / "code").mkdir()
    found = [digest("a", "b"), digest("ab"), digest("a")]
    for name, text in (("one.py", "1"), ("one.py", "2"), ("two.py", "2")):
        (tmp_path / "code" / name).write_text(text)
        found.append(digest("a"))
    assert len(set(found)) == len(found)
    (tmp_path / "code" / "notes.md").write_text("3")
    assert digest("a") == found[-1]
