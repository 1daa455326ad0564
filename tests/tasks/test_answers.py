"""Answers: the token that follows the prompt's own tokens in the joined text, and the space between the two."""

import json

import pytest

from relp_cli.errors import RelpError
from relp_cli.tasks.spacing import space_between
from relp_cli.tasks.task import load_task
from tests.tasks.helpers import Fake, by_character, metaspace, pieces, word_level, write

WORDS = ["The", "capital", "was", "Paris", "Rome", "He", "She", "said", "Yes", "No", "to", "from"]
BYTES = pieces(WORDS, bare=["Yes", "No", "He", "She"])
LLAMA = metaspace(WORDS)
LEVEL = word_level([*WORDS, '"'])


def answer_of(folder, tokenizer, original, patch, answer, foil, **more):
    """The answer's token as the tokenizer writes it, and what was said."""
    record = {"original": original, "patch": patch, "answer": answer, "foil": foil, **more}
    task = load_task(write(folder, "a.jsonl", json.dumps(record)))
    built = task.build(Fake(tokenizer), n=None, split="all")
    return tokenizer.convert_ids_to_tokens(built.batches[0].answer[0].tolist()), built.notes


@pytest.mark.parametrize(
    ("tokenizer", "bare", "spaced"),
    [(BYTES, "Yes", "ĠParis"), (LLAMA, "Yes", "▁Paris"), (LEVEL, "Yes", "Paris")],
    ids=["byte-level", "metaspace", "word-level"],
)
def test_the_answer_is_the_next_token_of_the_joined_text(tmp_path, tokenizer, bare, spaced):
    assert answer_of(tmp_path, tokenizer, 'He said "', 'She said "', "Yes", "No")[0] == [bare]
    found = answer_of(tmp_path, tokenizer, "He said The capital was", "She said The capital was", "Paris", "Rome")[0]
    assert found == [spaced]
    joined = tokenizer("He said The capital was Paris", add_special_tokens=False)["input_ids"]
    assert found == tokenizer.convert_ids_to_tokens(joined[-1:])


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA], ids=["byte-level", "metaspace"])
def test_a_space_that_the_answers_token_would_take_is_refused(tmp_path, tokenizer):
    with pytest.raises(RelpError, match=r"a\.jsonl:1: answer 'Paris' is not one token more than the prompt") as caught:
        answer_of(tmp_path, tokenizer, "He said The capital was ", "She said The capital was ", "Paris", "Rome")
    assert "end the prompt where a token ends" in str(caught.value)


def test_a_script_without_spaces(tmp_path):
    tokenizer = by_character("法国德的首都是巴柏 ")
    assert answer_of(tmp_path, tokenizer, "法国的首都是", "德国的首都是", "巴", "柏")[0] == ["巴"]


def test_files_say_how_prompt_and_answer_join(tmp_path):
    tokenizer = by_character("ab cd")
    for join, expected in (("", "c"), (None, None)):
        more = {} if join is None else {"join": join}
        if expected:
            assert answer_of(tmp_path, tokenizer, "ab", "bb", "c", "d", **more)[0] == [expected]
        else:  # " c" is two tokens here
            with pytest.raises(RelpError, match=r"answer 'c' is not a single token of fake:  \|c"):
                answer_of(tmp_path, tokenizer, "ab", "bb", "c", "d", **more)
    with pytest.raises(RelpError, match=r"a\.jsonl:1: join: expected text, got 3"):
        answer_of(tmp_path, tokenizer, "ab", "bb", "c", "d", join=3)


def test_a_records_join_goes_before_the_tasks(tmp_path):
    rows = [{"original": "ab", "patch": "bb", "answer": "c", "foil": "d"}]
    rows += [{"original": "aa", "patch": "ba", "answer": "c", "foil": "d", "join": "d"}]
    write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    task = load_task(write(tmp_path, "t.yaml", "name: t\npairs: rows.jsonl\njoin: ''\n"))
    assert [raw.join for raw in task.fixed] == ["", "d"]


def test_an_answer_that_goes_on_with_the_prompts_word_is_read_apart_and_said(tmp_path):
    tokenizer = pieces(["from", "to", "17", "1776"], bare=["76", "32"])
    joined = tokenizer(" from 17 to 1776", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(joined)[-1] == "Ġ1776"
    found, notes = answer_of(tmp_path, tokenizer, "x from 17 to 17", "x from to to 17", "76", "32", join="")
    assert found == ["76"]
    assert any("1 answers merge with the prompt's last word ('17' + '76', the first)" in note for note in notes)
    with pytest.raises(RelpError, match="answer '76' is not one token more than the prompt"):
        answer_of(tmp_path, tokenizer, "x from 17 to 17", "x from to to 17", "76", "32")


@pytest.mark.parametrize(
    ("prompt", "answer", "space"),
    [
        ("She was", "sad", " "), ("She was ", "sad", ""), ("She was\n", "sad", ""), ("", "sad", ""),
        ('He said "', "Yes", ""), ('"', "Yes", ""), ('He said ("', "Yes", ""), ("He said '", "Yes", ""),
        ('"No," he', "said", " "), ('He said "No"', "and", " "), ("He said “", "Yes", ""), ("He said “No”", "and", " "),
        ("(", "Yes", ""), ("(no)", "and", " "), ("Answer:", "Yes", " "), ("Yes,", "and", " "), ("done.", "Then", " "),
        ("a well-", "known", ""), ("either/", "or", ""), ("cat ->", "chat", " "), ("cat =", "chat", " "), ("US$", "x", ""),
        ("from 1732 to 17", "76", ""), ("in 1776", "they", " "), ("Paris", ".", ""), ("she", "'s", ""),
        ("法国的首都是", "巴黎", ""), ("東京は", "日本", ""), ("答え：", "はい", ""), ("ประเทศ", "ไทย", ""),
        ("서울은", "수도", " "), ("यह है", "अच्छा", " "), ("Chinese:", "水", " "), ("столица", "Москва", " "),
    ],
)  # fmt: skip
def test_a_space_stands_where_two_words_would_touch(prompt, answer, space):
    assert space_between(prompt, answer) == space
