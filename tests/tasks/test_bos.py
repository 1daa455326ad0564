"""BOS: once, whoever wrote it, and every output says who decided."""

import json

import pytest

import relp_cli
from relp_cli.errors import RelpError
from relp_cli.tasks.bos import choose_bos
from relp_cli.tasks.task import load_task
from tests.tasks.helpers import Fake, pieces, word_level, write

TOKENIZER = word_level(["Ann", "Bob", "was", "sad", "she", "he"])
IDS = TOKENIZER.get_vocab()
MODEL = Fake(TOKENIZER, bos=0)
PLAIN = {"original": "Ann was sad", "patch": "Bob was sad", "answer": "she", "foil": "he"}
GIVEN = {**PLAIN, "original": "<bos>Ann was sad", "patch": "<bos>Bob was sad"}


def built(folder, *records, model=MODEL, **options):
    path = write(folder, "a.jsonl", "\n".join(map(json.dumps, records)))
    return load_task(path).build(model, n=None, split="all", **options)


def test_text_that_starts_with_bos_gets_no_other(tmp_path):
    plain, given = built(tmp_path, PLAIN), built(tmp_path, GIVEN)
    for name in ("original", "patch", "answer", "foil"):
        assert getattr(plain.batches[0], name).tolist() == getattr(given.batches[0], name).tolist()
    assert plain.batches[0].roles == given.batches[0].roles == ("bos", "diff", "diff+1", "end")
    assert plain.bos == "<bos> prepended (TransformerLens's default; the tokenizer itself adds none)"
    assert given.bos == plain.bos + "; 1 of 1 pairs start with it as given, and get no other"
    assert f"BOS: {given.bos}" in given.notes


def test_ids_that_start_with_bos_get_no_other(tmp_path):
    ids = {
        "original_ids": [IDS["Ann"], IDS["was"]],
        "patch_ids": [IDS["Bob"], IDS["was"]],
        "answer_id": 1,
        "foil_id": 2,
    }
    with_bos = {**ids, "original_ids": [0, *ids["original_ids"]], "patch_ids": [0, *ids["patch_ids"]]}
    for roles in (None, ["name", "verb"]):
        one = built(tmp_path, {**ids, "roles": roles})
        two = built(tmp_path, {**with_bos, "roles": roles})
        assert one.batches[0].original.tolist() == two.batches[0].original.tolist() == [[0, IDS["Ann"], IDS["was"]]]
        assert one.batches[0].roles == two.batches[0].roles
    counted = built(tmp_path, {**with_bos, "roles": ["bos", "name", "verb"]})
    assert counted.batches[0].roles == ("bos", "name", "verb")


def test_a_written_bos_stays_without_prepending(tmp_path):
    given = built(tmp_path, GIVEN, bos=False)
    assert given.batches[0].original[0, 0] == 0
    assert given.batches[0].roles[0] == "bos"
    assert given.bos.startswith(
        "no <bos> prepended (as asked; the tokenizer itself adds none); 1 of 1 pairs start with it"
    )


def test_roles_as_spans_of_text_with_bos(tmp_path):
    spans = built(tmp_path, {**GIVEN, "roles": {"S": [5, 8], "adj": [13, 16]}})
    assert spans.batches[0].roles == ("bos", "S", "S+1", "end")


def test_a_token_that_stands_for_bos_end_and_unknown_text_alike(tmp_path):
    tokenizer = pieces(["was", "sad", "she", "he"], bos_token="<|endoftext|>", unk_token="<|endoftext|>")
    found = built(tmp_path, {key: text.replace("<bos>", "<|endoftext|>") for key, text in GIVEN.items()},
                  model=Fake(tokenizer, bos=tokenizer.bos_token_id))  # fmt: skip
    first, second = found.batches[0].original[0, :2].tolist()
    assert first == tokenizer.bos_token_id != second
    assert "1 of 1 pairs start with it as given" in found.bos


def test_bos_on_one_side_only(tmp_path):
    with pytest.raises(RelpError, match=r"a\.jsonl:1: one of original and patch starts with the BOS token"):
        built(tmp_path, {**GIVEN, "patch": "Bob was was sad"})


def test_what_is_said():
    gpt2 = pieces(["a"], bos_token="<|endoftext|>")
    token = gpt2.bos_token_id
    said = {
        (None, False): "<|endoftext|> prepended (TransformerLens's default; the tokenizer itself adds none)",
        (None, True): "<|endoftext|> prepended (as asked; the tokenizer itself adds none)",
        (True, False): "<|endoftext|> prepended (as asked; the tokenizer itself adds none)",
        (False, False): "no <|endoftext|> prepended (as asked; the tokenizer itself adds none)",
    }
    for (asked, at_load), about in said.items():
        assert choose_bos(Fake(gpt2, bos=token, bos_asked=at_load), asked).about == about
    adds = word_level(["a"])
    from tokenizers.processors import TemplateProcessing

    adds.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    assert choose_bos(Fake(adds, bos=0), None).about.endswith(
        "(TransformerLens's default; the tokenizer itself adds it)"
    )
    assert choose_bos(Fake(pieces(["a"])), None).about == "none; there is no BOS token"
    assert choose_bos(Fake(None), None).about == "none; there is no tokenizer"
    with pytest.raises(RelpError, match="fake has no BOS token to prepend"):
        choose_bos(Fake(pieces(["a"])), True)


def test_the_embedded_models_number_is_the_same_with_bos_written_out(tmp_path, relp):
    model = relp_cli.load_model("tiny-gpt2", device="cpu")
    pairs = load_task("sva_simple").build(model, n=20).text_pairs
    found = []
    for mark in ("", "<bos>"):
        records = [
            {"original": mark + p.original, "patch": mark + p.patch, "answer": p.answer[0], "foil": p.foil[0]}
            for p in pairs
        ]
        path = write(tmp_path, "rows.jsonl", "\n".join(json.dumps({**r, "split": "discovery"}) for r in records))
        found.append(json.loads(relp("show", path, "--pairs", "20", "--json").out))
    assert found[0]["metric_original"] == found[1]["metric_original"]
    assert "20 of 20 pairs start with it as given" in found[1]["bos"]
