"""Task data: deterministic, answerable, made of real lines, and refused when there is too little text."""

import json
import random
from pathlib import Path

import pytest

from speedstack.eval.data.task_data import TaskSizes, make_prompt_sets, make_same_text, make_tasks, read_documents

SIZES = TaskSizes(num_perplexity_documents=6, perplexity_chars=500, num_next_line=40, num_close_line=30)


def read_items(directory: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def test_same_seed_same_bytes_whatever_the_order(documents: dict[str, str], tmp_path: Path) -> None:
    names = list(documents)
    random.Random(1).shuffle(names)
    counts = make_tasks(documents, tmp_path / "a", seed=3, sizes=SIZES)
    make_tasks({name: documents[name] for name in names}, tmp_path / "b", seed=3, sizes=SIZES)
    make_tasks(documents, tmp_path / "c", seed=4, sizes=SIZES)
    assert counts == {"heldout_perplexity": 6, "next_line": 40, "close_line": 30}
    for name in counts:
        file = f"{name}.jsonl"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_next_line_is_the_next_line_and_distractors_are_real(documents: dict[str, str], tmp_path: Path) -> None:
    make_tasks(documents, tmp_path, sizes=SIZES)
    all_lines = {line.rstrip() for text in documents.values() for line in text.splitlines()}
    labels = set()
    for item in read_items(tmp_path, "next_line"):
        text = "\n".join(line.rstrip() for line in documents[item["name"]].splitlines())
        assert item["context"] + item["choices"][item["label"]] + "\n" in text
        assert len({choice.strip() for choice in item["choices"]}) == 4
        assert set(item["choices"]) <= all_lines
        # Equal indentation, so that the shape of the text does not give the answer away.
        assert len({len(choice) - len(choice.lstrip()) for choice in item["choices"]}) == 1
        context_lines = {line.strip() for line in item["context"].splitlines()}
        assert not context_lines & {choice.strip() for choice in item["choices"]}
        labels.add(item["label"])
    assert labels == {0, 1, 2, 3}


def test_lines_to_close_are_real_and_half_have_brackets(documents: dict[str, str], tmp_path: Path) -> None:
    make_tasks(documents, tmp_path, sizes=SIZES)
    items = read_items(tmp_path, "close_line")
    for item in items:
        text = "\n".join(line.rstrip() for line in documents[item["name"]].splitlines())
        assert f"{item['context']}{item['answer']}\n" in text + "\n"
        assert item["context"][-1].isalnum() or item["context"][-1] == "_"
        assert item["answer"].endswith(":") and set(item["answer"]) <= set(")]}:")
    assert sum(item["answer"] == ":" for item in items) == len(items) // 2


def test_no_document_dominates(documents: dict[str, str], tmp_path: Path) -> None:
    make_tasks(documents, tmp_path, sizes=SIZES)
    names = [item["name"] for item in read_items(tmp_path, "next_line")]
    assert max(names.count(name) for name in names) <= 15  # 3 x (1 + 40 // 10 documents)
    assert len(set(names)) >= 8


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 held-out documents give no item for task next_line and close_line"):
        make_tasks({"a.py": "x = 1\n"}, tmp_path, tasks=("heldout_perplexity", "next_line", "close_line"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="give 0 of 2 prompts"):
        make_prompt_sets({"a.py": "x = 1\n"}, lambda text: list(text.encode()), 2, 16, prefix_id=0)


def test_prompts_are_long_enough_and_start_where_they_say(documents: dict[str, str]) -> None:
    sets = make_prompt_sets(documents, lambda text: list(text.encode()), 4, 48, prefix_id=256)
    assert sets == make_prompt_sets(dict(reversed(documents.items())), lambda t: list(t.encode()), 4, 48, prefix_id=256)
    for opening in sets["module opening"]:
        assert len(opening) == 48 and opening[0] == 256
        assert any(text.encode().startswith(bytes(opening[1:])) for text in documents.values())
    for body in sets["function body"]:
        assert len(body) == 48
        assert bytes(body).decode().rstrip("\n").splitlines()[-1].endswith("):")


PARAGRAPH = "The harbour lay still, and the boats knocked against each other in the dark. " * 40
LETTERS = {f"letter {n}": f"Dear {n},\n\n{PARAGRAPH}\n\n{PARAGRAPH}\n\n{PARAGRAPH}\nYours" for n in range(3)}


def test_prose_has_the_tasks_that_it_has_items_for(tmp_path: Path) -> None:
    documents = {name: text.partition("\n\n")[2] for name, text in LETTERS.items()}
    with pytest.warns(UserWarning, match="3 held-out documents give no item for task next_line and close_line"):
        assert make_tasks(documents, tmp_path, sizes=SIZES) == {"heldout_perplexity": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["heldout_perplexity.jsonl"]
    # A paragraph in a line is longer than an item, and cut.
    assert {item["text"] for item in read_items(tmp_path, "heldout_perplexity")} == {PARAGRAPH[:500]}
    assert make_tasks(documents, tmp_path / "one", sizes=SIZES, tasks=["heldout_perplexity"]) == {
        "heldout_perplexity": 3
    }
    with pytest.raises(ValueError, match="no item for task next_line: hold out more text, or leave the task out"):
        make_tasks(documents, tmp_path / "two", sizes=SIZES, tasks=["heldout_perplexity", "next_line"])
    assert not (tmp_path / "two").exists()


def test_contexts_of_prose_are_not_empty(tmp_path: Path) -> None:
    asked: list[str] = []

    def write(contexts: list[str]) -> list[str]:
        asked.extend(contexts)
        return contexts

    assert make_same_text(LETTERS, write, tmp_path, num_items=6) == 6
    assert all(len(context) == 901 and PARAGRAPH.rstrip().endswith(context.rstrip()) for context in asked)


def test_prompts_of_prose_end_at_no_function() -> None:
    documents = {name: text.partition("\n\n")[2] for name, text in LETTERS.items()}
    with pytest.warns(UserWarning, match="none of 3 held-out documents has a function"):
        sets = make_prompt_sets(documents, lambda text: list(text.encode()), 2, 48, prefix_id=256)
    assert sets == {"module opening": [[256, *PARAGRAPH.encode()[:47]]] * 2}


def test_read_documents(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    good, bad = tmp_path / "pkg" / "a.py", tmp_path / "latin.py"
    good.write_text("x = 1\n")
    bad.write_bytes(b"# caf\xe9\n")
    assert read_documents([good], root=tmp_path) == {"pkg/a.py": "x = 1\n"}
    for path in (bad, tmp_path / "none.py"):
        with pytest.raises(ValueError, match=f"cannot read {path}"):
            read_documents([path])
