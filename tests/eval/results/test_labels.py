"""Short names: unique, and no longer than they have to be."""

from speedstack.eval.results.labels import numbered, printable, short_file_names, short_names


def test_names_are_as_much_of_the_end_as_tells_them_apart() -> None:
    assert short_names([("x", "runs", "wide", "qat"), ("x", "runs", "deep", "drafter")]) == ["qat", "drafter"]
    # One length for all: "deep/qat" beside "qat" would leave open whose the second is.
    paths = [("x", "wide", "qat"), ("x", "wide", "drafter"), ("x", "deep", "qat")]
    assert short_names(paths) == ["wide/qat", "wide/drafter", "deep/qat"]
    assert short_names([("/", "qat"), ("/", "old", "qat")]) == ["/qat", "old/qat"]
    assert short_names([]) == [] and short_names([()]) == [""]


def test_no_name_is_given_twice() -> None:
    assert short_names([("a", "b"), ("a", "b"), ("a", "c")]) == ["b", "b (2)", "c"]
    assert short_names([("a/b",), ("a", "b")]) == ["a/b", "b"]
    assert numbered(["a", "a (2)", "a"]) == ["a", "a (2)", "a (3)"]


def test_files_are_named_without_suffix() -> None:
    assert short_file_names(["runs/a/timing.json", "runs/b/timing.json", ""]) == ["a/timing", "b/timing", ""]


def test_bytes_that_are_no_text_are_escaped() -> None:
    assert printable("caf\udce9/qat") == "caf\\udce9/qat" and printable("café") == "café"
