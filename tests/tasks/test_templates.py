"""Template tasks: balance, splits, reproducibility, tokenisation, roles, and each mistake as one line."""

from collections import Counter

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from relp_cli.errors import RelpError
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.spec import list_tasks, read_task
from relp_cli.tasks.task import load_task
from tests.tasks.helpers import PEOPLE, PLACES, SWAP, SWAP_WORDS, Fake, pieces, swap_task, word_level, write


@pytest.fixture
def swap(tmp_path):
    return load_task(swap_task(tmp_path))


@pytest.fixture
def model():
    return Fake(word_level(SWAP_WORDS))


def everything() -> Fake:
    """A tokenizer that knows each word of the shipped tasks."""
    words = []
    for name in list_tasks():
        task = read_task(name)
        words += [word for rows in task.lists.values() for row in rows.rows for word in row.words]
        literals = "".join(part if isinstance(part, str) else " " for t in task.templates for part in (*t.parts, " "))
        words += literals.replace(",", " , ").replace(".", " . ").split()
    return Fake(word_level(words), bos=0)


@pytest.mark.parametrize("n", [8, 16, 20, 25, 33])
def test_each_name_is_equally_often_subject_and_object(swap, model, n):
    pairs = swap.build(model, n=n, split="all").text_pairs
    objects = Counter(pair.answer[0] for pair in pairs)
    subjects = Counter(pair.foil[0] for pair in pairs)
    assert objects == subjects
    assert len(set(pairs)) == n
    assert max(objects.values()) - min(objects[name] for name in PEOPLE) <= 1 + (n % 8 == 1)


def test_templates_are_used_equally_often(swap, model):
    starts = Counter(pair.original.startswith("So") for pair in swap.build(model, n=40).text_pairs)
    assert starts == {True: 20, False: 20}


def test_the_patch_exchanges_the_names_in_all_mentions(swap, model):
    for pair in swap.build(model, n=10).text_pairs:
        (answer,), (foil,) = pair.answer, pair.foil
        swapped = {answer: foil, foil: answer}
        assert pair.patch == " ".join(swapped.get(word, word) for word in pair.original.split())
        assert pair.original.split().count(foil) == 2


def test_splits_share_no_prompt_whatever_n_and_seed(swap, model):
    found = {}
    for split in ("discovery", "heldout"):
        builds = [swap.build(model, n=n, seed=seed, split=split) for n, seed in ((20, 0), (24, 1), (None, 2))]
        found[split] = {text for built in builds for pair in built.text_pairs for text in (pair.original, pair.patch)}
    assert found["discovery"]
    assert found["heldout"]
    assert not found["discovery"] & found["heldout"]
    # 8 · 7 ordered names, 5 places, 2 templates; the swap maps this set onto itself.
    assert len(found["discovery"]) + len(found["heldout"]) == 8 * 7 * 5 * 2


@pytest.mark.parametrize("name", list_tasks())
def test_shipped_tasks_build_disjoint_reproducible_splits(name):
    task, fake = load_task(name), everything()
    one, again, other, held = (
        task.build(fake, n=60, seed=seed, split=split)
        for seed, split in ((0, "discovery"), (0, "discovery"), (1, "discovery"), (0, "heldout"))
    )
    assert one.text_pairs == again.text_pairs
    assert all((a.original == b.original).all() for a, b in zip(one.batches, again.batches, strict=True))
    assert set(one.text_pairs) != set(other.text_pairs)
    discovery, heldout = (
        {text for pair in built.text_pairs for text in (pair.original, pair.patch)} for built in (one, held)
    )
    assert not discovery & heldout
    assert sum(map(len, one.batches)) == 60
    assert all(gone == 0 for gone, _ in one.dropped.values())
    for batch in one.batches:
        assert batch.roles[0] == "bos"
        assert batch.roles[-1] == "end"
        assert len(set(batch.roles)) == batch.n_pos
        assert (batch.original[:, 0] == 0).all()


@pytest.mark.parametrize("name", [task for task in list_tasks() if task.startswith("sva")])
def test_both_directions_of_the_number_flip_are_equally_frequent(name):
    task = load_task(name)
    forms = {row.words[0] for row in task.text.lists[task.text.slot_lists["VERB"]].rows}
    pairs = task.build(everything(), n=100).text_pairs
    assert sum(pair.answer[0] in forms for pair in pairs) == 50


def test_paper_order_of_names_in_ioi_and_what_its_variants_change():
    fake = everything()
    for pair in load_task("ioi").build(fake, n=10).text_pairs:
        words = pair.original.replace(".", "").replace(",", "").split()
        assert words[1] == pair.foil[0]  # [B] comes first, and gives
        assert words[3] == pair.answer[0]
    for pair in load_task("ioi_abba").build(fake, n=10).text_pairs:
        words = pair.original.replace(".", "").replace(",", "").split()
        assert (words[1], words[3]) == (pair.answer[0], pair.foil[0])
    for batch in load_task("ioi_s2").pairs(fake, n=10):
        changed = (batch.original != batch.patch).any(0)
        assert [role for role, c in zip(batch.roles, changed.tolist(), strict=True) if c] == ["S2"]
        assert (batch.patch[:, batch.roles.index("S2")] == batch.answer[:, 0]).all()


def test_greater_than_sets_are_the_years_after_and_up_to_the_start():
    built = load_task("greater_than").build(everything(), n=20)
    for pair in built.text_pairs:
        start = {role: pair.original[s:e] for role, s, e in pair.roles}["YY"]
        assert pair.answer == tuple(f"{year:02d}" for year in range(int(start) + 1, 100))
        assert pair.foil == tuple(f"{year:02d}" for year in range(int(start) + 1))
    assert (built.batches[0].answer >= 0).sum(1).tolist() == [
        len(pair.answer) for pair in built.text_pairs[: len(built.batches[0])]
    ]


def test_roles_align_across_templates_of_different_length(swap, model):
    short, long = swap.pairs(model, n=20)
    assert (short.n_pos, long.n_pos) == (11, 12)
    assert long.roles == ("start", *short.roles)
    assert " ".join(short.roles) == "S1 S1+1 IO IO+1 IO+2 PLACE PLACE+1 S2 S2+1 S2+2 end"
    with_bos = swap.pairs(Fake(model.tokenizer, bos=0), n=20)
    assert [batch.roles for batch in with_bos] == [("bos", *short.roles), ("bos", *long.roles)]


def test_rows_of_batches_and_texts_correspond(swap, model):
    built = swap.build(model, n=20)
    texts = iter(built.text_pairs)
    for batch in built.batches:
        assert isinstance(batch, PairBatch)
        for i in range(len(batch)):
            pair = next(texts)
            assert model.tokenizer(pair.original)["input_ids"] == batch.original[i].tolist()
            assert model.tokenizer(pair.patch)["input_ids"] == batch.patch[i].tolist()
            assert model.tokenizer.convert_tokens_to_ids(pair.answer[0]) == batch.answer[i].item()


def test_bos_follows_the_model_and_can_be_overridden(swap, model):
    assert all(len(batch.roles) in (11, 12) for batch in swap.pairs(Fake(model.tokenizer, bos=0), n=8, bos=False))
    forced = swap.pairs(model, n=8, bos=True)
    assert all((batch.original[:, 0] == model.tokenizer.bos_token_id).all() for batch in forced)
    with pytest.raises(RelpError, match="no BOS token"):
        swap.pairs(Fake(pieces(SWAP_WORDS)), n=8, bos=True)


def test_words_of_several_tokens_are_dropped_and_counted(swap):
    known = [word for word in SWAP_WORDS if word not in ("Gus", "farm", "mill")]
    built = swap.build(Fake(word_level(known)), n=10, split="all")
    assert built.dropped == {"people.txt": (1, 7), "places.txt": (2, 3)}
    assert "1 of 8 words of 'people.txt' dropped" in built.notes[1]
    assert not any("Gus" in pair.original or "farm" in pair.original for pair in built.text_pairs)


def test_single_tokens_are_checked_in_their_place(tmp_path):
    """A byte-level tokenizer has ` Ann` but not `Ann`: only the template without a leading space loses the name."""
    path = swap_task(tmp_path, SWAP.replace('  - "{S1=B} met {IO=A} at the {PLACE} . {S2=B} gave it to"\n', ""))
    built = load_task(path).build(Fake(pieces(SWAP_WORDS)), n=10)
    assert built.dropped["people.txt"] == (0, 8)
    with pytest.raises(RelpError, match=r"no word of list 'people.txt' is a single token of fake .*'Ann'"):
        load_task(swap_task(tmp_path)).build(Fake(pieces(SWAP_WORDS)), n=10)


def test_glued_slots_keep_to_combinations_that_stay_apart(tmp_path):
    text = """\
name: glued
slots: {C: {values: ["17", "18"]}, Y: years.txt, F: {values: ["01"]}}
templates: ["from {C}{Y} to"]
patch: {Y: F}
answer: later
foil: sooner
"""
    write(tmp_path, "years.txt", "32\n76\n")
    task = load_task(write(tmp_path, "glued.yaml", text))
    words = ["from", "to", "later", "sooner", "17", "18", "32", "76", "01"]
    tokenizer = pieces(words)
    tokenizer.backend_tokenizer.model = _digits(tokenizer)
    texts = {pair.original for pair in task.build(Fake(tokenizer), n=None, split="all").text_pairs}
    assert texts == {"from 1732 to", "from 1832 to", "from 1876 to"}


def _digits(tokenizer):
    """Two digits are a token after a space and alone, and `1776` is one token of its own."""
    vocabulary = dict(tokenizer.get_vocab())
    old = [(word[:-1], word[-1]) for word, i in sorted(vocabulary.items(), key=lambda item: item[1]) if len(word) > 1]
    extra = [("3", "2"), ("7", "6"), ("0", "1"), ("Ġ17", "76")]
    for one, two in extra:
        vocabulary.setdefault(one + two, len(vocabulary))
    return models.BPE(vocabulary, old + extra)


def test_more_pairs_than_exist_says_how_many_there_are(tmp_path, model):
    task = load_task(swap_task(tmp_path, SWAP.replace("balance: [A, B]\n", "")))
    with pytest.raises(RelpError, match="has 560 pairs in split 'all' for this model, 561 were asked"):
        task.pairs(model, n=561, split="all")
    assert sum(map(len, task.pairs(model, n=560, split="all"))) == 560
    assert sum(map(len, task.pairs(model, n=555, split="all"))) == 555


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "held_out"}, "unknown split 'held_out'; did you mean 'heldout'"),
        ({"n": 0}, "at least one pair"),
    ],
)
def test_wrong_options(swap, model, options, expected):
    with pytest.raises(RelpError, match=expected):
        swap.pairs(model, **options)


def test_a_model_without_tokenizer_is_refused(swap):
    with pytest.raises(RelpError, match="fake has no tokenizer"):
        swap.pairs(Fake(None))


def test_an_unknown_word_of_the_template_is_named(swap):
    known = [word for word in SWAP_WORDS if word != "gave"]
    with pytest.raises(RelpError, match=r"not in the vocabulary of fake: gave$"):
        swap.pairs(Fake(word_level(known)), n=4)


def test_a_constant_answer_of_several_tokens_shows_the_pieces(tmp_path):
    text = SWAP.replace('answer: "{A}"', "answer: ox\nfoil: it")
    task = load_task(swap_task(tmp_path, text.replace('"{S1=B} met', '"So {S1=B} met')))
    with pytest.raises(RelpError, match=r"answer 'ox' is not a single token of fake: .*o\|x"):
        task.pairs(Fake(pieces(SWAP_WORDS)), n=4)


def test_unequal_lengths_show_both_tokenisations(tmp_path):
    text = SWAP.replace("A: people.txt", "A: {list: people.txt, single: false}")
    text = text.replace("B: people.txt", "B: {list: people.txt, single: false}").replace("{A: B, B: A}", "{S2: A}")
    text = text.replace('"{S1=B} met', '"So {S1=B} met').replace('answer: "{A}"', "answer: it\nfoil: at")
    known = [word for word in SWAP_WORDS if word != "Ann"]
    with pytest.raises(RelpError, match=r"different token lengths: original .*\(19\) / patch .*\(16\)"):
        load_task(swap_task(tmp_path, text)).pairs(Fake(pieces(known)), n=None, split="all")


def test_a_difference_outside_the_changed_slots_is_refused(tmp_path):
    """Without word boundaries, `a` pulls the following b into its token and `x` does not: ab|c against x|bc."""
    vocabulary = {piece: i for i, piece in enumerate(["a", "b", "c", "x", "ab", "bc"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c")])), bos_token="x"
    )
    text = "name: t\nslots: {A: {values: [a, x]}}\ntemplates: ['{A}bc']\npatch: {A: other}\n"
    task = load_task(write(tmp_path, "t.yaml", text + "answer: a\nfoil: c\njoin: ''\n"))
    with pytest.raises(
        RelpError, match=r"differ where the pairing rule changes nothing: original (ab|x)\|b?c \(2\) / patch"
    ):
        task.pairs(Fake(tokenizer), n=1, split="all")


def test_all_pairs_of_a_huge_task_are_refused():
    with pytest.raises(RelpError, match="has about 1228800 combinations"):
        load_task("ioi").pairs(everything(), n=None)


def test_the_hash_covers_yaml_includes_and_word_lists(tmp_path):
    first = load_task(swap_task(tmp_path)).hash
    assert load_task(swap_task(tmp_path)).hash == first
    write(tmp_path, "places.txt", "\n".join([*PLACES, "barn"]))
    second = load_task(tmp_path / "swap.yaml").hash
    top = write(tmp_path, "top.yaml", "include: swap.yaml\n")
    third = load_task(top).hash
    write(tmp_path, "swap.yaml", SWAP + "description: changed\n")
    assert len({first, second, third, load_task(top).hash}) == 4


MISTAKES = {
    "unknown slot": (
        "{PLACE}",
        "{PLACES}",
        r"swap\.yaml:7: templates\.\d: unknown slot 'PLACES'; did you mean 'PLACE'",
    ),
    "unknown list": (
        "A: people.txt",
        "A: nams",
        r"swap\.yaml:3: slots\.A: unknown word list 'nams'; did you mean 'names'",
    ),
    "missing list": ("A: people.txt", "A: none.txt", r"swap\.yaml:3: slots\.A: no such word list"),
    "role twice": ("{S2=B}", "{S1=B}", r"templates\.0: role 'S1' occurs twice"),
    "reserved role": ("{S2=B}", "{end=B}", r"templates\.0: role 'end' is given by position"),
    "brace": ("gave it", "gave {it", r"templates\.0: .*brace"),
    "rule target": ("{A: B, B: A}", "{C: B}", r"swap\.yaml:9: patch\.C: unknown slot or role 'C'"),
    "rule source": ("{A: B, B: A}", "{A: Z}", r"swap\.yaml:9: patch\.A: unknown slot 'Z'"),
    "rule idle": ("{IO=A} ", "", r"templates\.0: the patch rule changes nothing|"),
    "other role": ("{A: B, B: A}", "{S2: other}", r"patch\.S2: `other` needs a slot"),
    "foil needed": ("{A: B, B: A}", "{S2: A}", r"foil: missing"),
    "balance": ("[A, B]", "[A, C]", r"balance: unknown slot 'C'"),
    "balance lists": ("[A, B]", "[A, PLACE]", r"balance: .* same word list"),
    "metric": (
        "name: swap",
        "name: swap\nmetric: logitdiff",
        r"swap\.yaml:2: metric: unknown metric 'logitdiff'; did you mean 'logit_diff'",
    ),
    "key": ("answer:", "anser:", r"swap\.yaml:11: anser: unknown key; did you mean 'answer'"),
    "no answer": ('answer: "{A}"', "", r"answer: missing"),
    "slot form": ('answer: "{A}"', 'answer: "{A.plural}"', r"answer: 'people.txt' has no form 'plural'"),
    "long answer": ('answer: "{A}"', 'answer: "to {A}"', r"answer: expected one word or one slot"),
    "slot spec": ("PLACE: places.txt", "PLACE: {single: true}", r"slots\.PLACE: expected either `list: NAME`"),
    "both": ("name: swap", "name: swap\npairs: x.jsonl", r"pairs: a task has either"),
}


@pytest.mark.parametrize("case", [case for case in MISTAKES if case != "rule idle"])
def test_a_mistake_in_the_task_is_one_line(tmp_path, case):
    old, new, expected = MISTAKES[case]
    assert old in SWAP
    with pytest.raises(RelpError, match=expected) as caught:
        load_task(swap_task(tmp_path, SWAP.replace(old, new)))
    assert "\n" not in str(caught.value)


def test_a_rule_that_changes_nothing_in_a_template(tmp_path):
    text = SWAP.replace("{A: B, B: A}", "{PLACE: other}").replace(
        '"So {S1=B} met {IO=A} at the {PLACE} .', '"So {S1=B} .'
    )
    with pytest.raises(RelpError, match=r"swap\.yaml:8: templates\.1: the patch rule changes nothing"):
        load_task(swap_task(tmp_path, text + "foil: it\n"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("places.txt", "\n# only a comment\n", "word list 'places.txt' is empty"),
        ("places.txt", "park\nshop\npark\n", "'park' occurs twice"),
        ("places.csv", "sg,pl\npark\n", r"places\.csv:2: expected 2 words"),
        ("places.yaml", "a: 3\n", "expected a YAML list"),
        ("places.yaml", "- park\n- 7\n", r"expected a word or a mapping of forms, got 7"),
        ("places.yaml", "- {sg: a, pl: b}\n- {sg: c}\n", "all rows need the same keys"),
    ],
)
def test_a_mistake_in_a_word_list_is_one_line(tmp_path, name, content, expected):
    path = swap_task(tmp_path, SWAP.replace("places.txt", name))
    write(tmp_path, name, content)
    with pytest.raises(RelpError, match=expected) as caught:
        load_task(path)
    assert "\n" not in str(caught.value)
