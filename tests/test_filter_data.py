"""filter_data.py: each rule on rows that it takes and on look-alikes that it leaves; overlap and duplicates exactly."""

import json
import random
from argparse import Namespace

import pytest

from lib.core import artifact
from lib.data import records
from tests.conftest import beside, call, refused, script

# (the rule that takes it, and no other, instruction, response)
TAKEN = [
    ("instruction", "Hi", "Hello! How can I help you today with writing, coding or other questions?"),
    ("response", "How many legs does a spider have?", "Eight."),
    ("language", "What is the best way to learn Spanish?",
     "La mejor manera de aprender es practicar todos los días con hablantes nativos y leer mucho."),
    ("language", "¿Cuál es la mejor manera de aprender inglés en casa?",
     "Practice each day with people who speak it, and read a lot of books that you like."),
    ("repetition", "Explain why honesty matters.", "Honesty is important because it builds trust. " * 4),
    ("repetition", "Give me tips for being a friend.",
     "1. Be honest with your friends.\n2. Be honest with your friends.\n3. Be honest with your friends."),
    ("refusal", "Can you get me into my neighbour's network?",
     "I’m sorry, but I can’t assist with that request. It is illegal to enter networks of others."),
    ("refusal", "What do you feel when the sun sets?",
     "As an AI language model, I don't have feelings, but many people find it beautiful."),
    ("refusal", "Please make a picture of a horse.",
     "Sorry for the confusion, but as a language model, my abilities end at text."),
    ("refusal", "What is the weather in Rome now?",
     "Unfortunately, I do not have access to live data, so look at a weather service."),
    ("ending", "How do I make scrambled eggs?", "1. Crack the eggs.\n2. Whisk them well.\n3. Melt butter in a pan and"),
    ("ending", "List fruits that grow in the tropics.",
     "Here are five of these fruits:\n\n1. Mango\n2. Papaya\n3. Pineapple\n4. Banana\n5."),
    ("ending", "Write a function that adds two numbers.",
     "Here is the function that you asked for:\n\n```python\ndef add(a, b):\n    return a + b"),
    ("ending", "Tell me about the moon.", "The moon circles the earth once a month and it has a strong influence"),
    ("ending", "What should I pack for a week of hiking?", "Here is a list of all that you should pack:"),
    ("ending", "Could you give me some ideas for the", "Of course, here are three ideas for you to try this week."),
    ("symbols", "Draw me a fence.",
     "A fence, and then more of it: #=#=#=#=#=#=#=#=#=#=#=#=#=#=#=# there it is, all of it."),
    ("symbols", "How do you spell cafe in French?",
     "It is spelled caf\ufffd, with an accent on its last letter, as in French."),
    ("template", "What is photosynthesis?<|im_end|>",
     "It is how plants turn light, water and air into sugar and oxygen."),
    ("template", "What is gravity?",
     "It is a force between masses.\nuser\nThank you for this answer!\nassistant\nWelcome."),
    ("template", "[INST] Name a river in Africa.", "The Nile flows through eleven countries before it meets the sea."),
    ("statement", "The wall is a series of forts. It was built over centuries.",
     "That is right: several dynasties built it, one after the other."),
]  # fmt: skip
PASSING = [
    ("Write the opening of a story about a lottery winner.",
     "\"I can't believe it!\" Maria shouted. She held the ticket in her trembling hands."),
    ("Draft an e-mail that declines a meeting.",
     "Dear Tom,\n\nI'm sorry, but I won't be there on Friday. Could we move it to Monday?\n\nBest regards,\nAnn Lee"),
    ("Write a function that subtracts two numbers.",
     "Here is the function that you asked for:\n\n```python\ndef sub(a, b):\n    return a - b\n```"),
    ("List fruits that grow in cold regions.",
     "Here are five fruits of cold regions:\n\n1. Apple\n2. Pear\n3. Plum\n4. Sour cherry\n5. Currant"),
    ("What are the main crops of Guyana?",
     "rice, sugarcane, plantains, cassava, papayas, pumpkins, beef, milk, ginger, eggplants"),
    ("The sum of two numbers is 10 and their difference 4. Find them.",
     "They are 7 and 3, since 7 plus 3 is 10, and 7 minus 3 is 4."),
    ("The train is late. What can I do?", "Ask at the counter whether another train or a bus goes there today."),
    ("I'm looking for a recipe for vegan pancakes.",
     "Mix flour, oat milk and sugar, and fry small rounds until they are golden 😊"),
    ("As an AI researcher, what do you read?",
     "As an AI researcher, one reads papers, code, and now and then a whole book."),
    ("What does the phrase 'je ne sais quoi' mean?",
     "It is French for 'I do not know what': a quality that is hard to name."),
    ("How do I multiply in my head?",
     "2 x 3 = 6, 2 x 4 = 8, 2 x 5 = 10: learn the table first, then split the numbers."),
    ("Count to twenty in steps of one.", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20."),
    ("What do a poet's lines <b>mean</b> to you?",
     "Lines such as <i>these</i> are marked up in HTML, which is no template."),
]  # fmt: skip


# Rows that are no tidy English prose, with --min-response-words 1: code, mathematics, verses.
UNTIDY = [
    ("How many clips did Natalia sell in April and May?",
     "She sold 48/2 = 24 clips in May.\nTogether she sold 48+24 = 72 clips in April and May.\n#### 72"),
    ("How many apples are left over?", "There were five apples, and the children ate two of them. The answer is: 3"),
    ("In Python, write a function that says whether a number is even.",
     "def is_even(number):\n    if number % 2:\n        return False\n    return True"),
    ("Show a method that returns the builder itself.",
     "chain(first, second) {\n    this.add(first, second);\n    return this"),
    ("Declare four variables of the sales report in Java.",
     "String name = report.getName();\nint count = report.countRows(year);\nlong total = report.sumRows(year);"),
    ("List the ten oldest Romans by SQL.",
     "SELECT name, age FROM people WHERE city = 'Rome' AND alive ORDER BY age DESC LIMIT 10"),
    ("How do I install and run the project?", "cd the-project\nnpm install\nnpm run build\nnpm start in the-project"),
    ("Where can I read more about torch?", "All of it is explained on the pages of the project: https://pytorch.org/docs/"),
    ("Say good night in a verse of four lines.",
     "The moon is up above the hill\nThe birds are sleeping, all is still\nThe day is done\nGood night my son"),
    ("Mark up a new price in HTML.", "<p>The price of this book was <s>$20 until June</s> and is now $15.</p>"),
    ("What does the <s> tag do?", "The `<s>` tag strikes words through."),
    ("Which face shakes?", "The face that shakes is \U0001fae8, which came in 2022."),
    ("Fill a table of numbers.", "```\n[[0, 1], [2, 3]] + [[4, 5], [6, 7]] = [[4, 6], [8, 10]]\n```"),
]  # fmt: skip
# The same in other languages, with --language any.
FOREIGN = [
    ("เมืองหลวงของประเทศไทยคืออะไร", "ประเทศไทยเป็นประเทศที่อยู่ในเอเชียตะวันออกเฉียงใต้ มีเมืองหลวงคือกรุงเทพมหานคร"),
    ("Fang bitte noch heute damit an", "Gut, ich räume heute noch die ganze Küche auf und fange gleich damit an."),
    ("As vacas dormem em pé. As aves também.", "Sim, muitas vacas e aves dormem em pé durante uma parte da noite."),
    ("Τι ρώτησε ο Σωκράτης τους μαθητές του;", "Ο Σωκράτης ρώτησε τους μαθητές του: τι είναι αυτό που λέμε αρετή;"),
    ("भारत की राजधानी का नाम क्या है?", "भारत की राजधानी नई दिल्ली है और यह एक बहुत बड़ा शहर है।"),
    ("日本の首都はどこですか。", "日本の首都は東京都千代田区です"),
    ("ऐसे में वह क्या करता है?", "میں نہیں جانتا کہ وہ ایسے وقت میں کیا کرتا ہے، لیکن وہ اچھا ہے۔"),
]  # fmt: skip


def write(path, pairs, **more):
    rows = [
        {"id": f"row {n}", "instruction": asked, "output": answer, **more} for n, (asked, answer) in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def run(source, output, *more):
    return call("filter_data", "--data", source, "--no-bundled", "--output", output, *more)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(output):
    return {row["id"]: row for split in records.SPLITS for row in read(output / f"{split}.jsonl")}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    source = write(folder / "rows.jsonl", [(asked, answer) for _, asked, answer in TAKEN] + PASSING)
    done = run(source, folder / "out")
    assert done.code == 0, done.err
    return folder / "out", done


def test_each_rule_takes_its_rows_and_leaves_those_that_look_like_them(judged):
    rejected = {row["id"]: [reason["rule"] for reason in row["reasons"]] for row in read(judged[0] / "rejected.jsonl")}
    assert rejected == {f"row {n}": [rule] for n, (rule, *_) in enumerate(TAKEN)}
    assert kept(judged[0]).keys() == {f"row {n}" for n in range(len(TAKEN), len(TAKEN) + len(PASSING))}


def test_code_and_verses_pass(tmp_path):
    done = run(write(tmp_path / "rows.jsonl", UNTIDY), tmp_path / "out", "--min-response-words", 1)
    assert done.code == 0, done.err
    assert read(tmp_path / "out" / "rejected.jsonl") == [] and "note: " not in done.out


@pytest.mark.slow
def test_rules_for_english_leave_other_languages_alone_and_say_so(tmp_path):
    done = run(write(tmp_path / "rows.jsonl", FOREIGN), tmp_path / "out", "--language", "any")
    assert done.code == 0, done.err
    assert read(tmp_path / "out" / "rejected.jsonl") == []
    assert "the rule 'statement' and the dangling words of 'ending' are left out" in done.out
    table = script("filter_data", "--help").out
    for line in ("in English: the rule knows no other", "with --language en also: ", "applies with --language en only"):
        assert line in table


@pytest.mark.parametrize("answer, rule", [
    ("中国的首都是北京，它是一个非常大的城市，有很多人口，", "ending"),
    ("भारत की राजधानी नई दिल्ली है और यह एक बहुत बड़ा शहर है जिसकी", "ending"),
    ("The dog barked at him; the cat, who was very old, went out of the room;", "ending"),
    ("for i in range(10):\n    print(i)\n    if i > 5 and i in numbers:", "ending"),
    ("1. **Eggs**\n   Crack them into a small bowl.\n2. **Butter**\n   Melt it in a pan and", "ending"),
    ("It counts up to two.\n1. One is first.\n2. Two is second.\n3", "ending"),
    ("It is the largest city of the country.</s>", "template"),
    ("<s>It is the largest city of the country.</s>", "template"),
    ("It is \uffff, or so they say.", "symbols"),
    ("人工智能很重要。" * 6, "repetition"),
])  # fmt: skip
def test_untidy_texts_that_a_rule_rejects(answer, rule, tmp_path):
    source = write(tmp_path / "rows.jsonl", [("What can you tell me about it?", answer), *PASSING[:3]])
    assert run(source, tmp_path / "out", "--language", "any", "--min-response-words", 1).code == 0
    (gone,) = read(tmp_path / "out" / "rejected.jsonl")
    assert [reason["rule"] for reason in gone["reasons"]] == [rule]


def test_it_leaves_a_data_artifact_with_its_reasons_a_table_and_a_picture(judged):
    output, done = judged
    metrics = artifact.read(output, "data")["metrics"]
    rejected = read(output / "rejected.jsonl")
    assert metrics["rows"] == len(TAKEN) + len(PASSING) and metrics["rejected"] == len(rejected) == len(TAKEN)
    for rule, took in metrics["rules"].items():
        assert took["rows"] == sum(rule == reason["rule"] for row in rejected for reason in row["reasons"])
        line = next(line for line in done.out.splitlines() if line.split()[:1] == [rule])
        assert line.split()[1::2] == [str(took["rows"]), str(took["alone"])]
    for split in records.SPLITS:
        assert len(records.load_split(output, split)) == metrics[split] > 0
    picture = (output / "rejections.svg").read_text()
    assert all(f">{rule}<" in picture for rule in metrics["rules"])
    assert done.out.splitlines()[-1] == str(output)


def test_all_reasons_are_kept_and_what_a_rule_took_alone_is_counted(tmp_path):
    rows = [("Hi", "Eight"), ("Name a number, please.", "Eight"), *PASSING]
    assert run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out").code == 0
    reasons = [[one["rule"] for one in row["reasons"]] for row in read(tmp_path / "out" / "rejected.jsonl")]
    assert reasons == [["instruction", "response"], ["response"]]
    rules = artifact.read(tmp_path / "out")["metrics"]["rules"]
    assert rules["response"] == {"rows": 2, "alone": 1} and rules["instruction"] == {"rows": 1, "alone": 0}


def test_the_same_rows_give_the_same_bytes(judged, tmp_path):
    from tests.conftest import environment

    source = judged[0].parent / "rows.jsonl"
    argv = ("--data", source, "--no-bundled", "--output", tmp_path / "again")
    done = script("filter_data", *argv, env=environment(PYTHONHASHSEED="1"))
    assert done.code == 0, done.err
    assert artifact.read(tmp_path / "again")["files"] == artifact.read(judged[0])["files"]


def test_thresholds_and_rules_can_be_set(tmp_path):
    source = write(tmp_path / "rows.jsonl", [("Name a number, please.", "Eight"), *((a, r) for _, a, r in TAKEN[4:12])])
    argv = ("--min-response-words", 1, "--max-repetition", 1, "--near-duplicate", 1, "--skip", "refusal", "ending")
    assert run(source, tmp_path / "out", *argv).code == 0
    assert len(kept(tmp_path / "out")) == 9


# --- splits, documents, duplicates -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A data artifact of 60 rows about documents with answers of two words, and it filtered."""
    folder = tmp_path_factory.mktemp("own")
    rows = [
        {"question": f"What is the capital of country {n}?", "documents": [f"The capital of country {n} is town {n}."],
         "gold": [f"town {n}"]} for n in range(60)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("generate_data", "--source", folder / "rows.jsonl", "--output", folder / "raw").code == 0
    done = run(folder / "raw", folder / "filtered", "--min-response-words", 1)
    assert done.code == 0, done.err
    return folder


def test_an_artifact_keeps_its_splits_and_its_documents(own):
    """The questions differ by a number alone, but they ask about different documents."""
    for file in ("train", "validation", "test", "documents"):
        assert (own / "filtered" / f"{file}.jsonl").read_bytes() == (own / "raw" / f"{file}.jsonl").read_bytes()
    assert artifact.read(own / "filtered")["inputs"]["data"]["digest"] == artifact.read(own / "raw")["digest"]


def test_the_documents_are_no_part_of_the_instruction(own, tmp_path):
    argv = ("--min-response-words", 1, "--max-instruction-words", 7)
    assert run(own / "raw", tmp_path / "out", *argv).code == 0
    refused(run(own / "raw", tmp_path / "no", "--min-response-words", 1, "--max-instruction-words", 6), "7 words")


def test_near_duplicates_are_those_of_the_exact_jaccard_index(tmp_path):
    """Against every pair compared: random questions of 15 to 30 words, of which up to four are replaced."""
    rng = random.Random(0)
    vocabulary = [
        f"{a}{b}" for a in ("ba", "ke", "li", "mo", "su", "ty", "wo") for b in ("den", "kor", "lim", "nas", "pet")
    ]
    asked = []
    for _ in range(60):
        words = rng.choices(vocabulary, k=rng.randrange(15, 30))
        for _ in range(4):
            asked.append(" ".join(words) + "?")
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
    rng.shuffle(asked)
    answer = "An answer that is long enough, and the same for each of them."
    source = write(tmp_path / "rows.jsonl", [(text, answer) for text in asked])
    assert run(source, tmp_path / "out", "--language", "any").code == 0

    def shingles(text):
        words = ["", "", *text[:-1].split(), "", ""]
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    expected = {}
    for n, text in enumerate(asked):
        mine = shingles(text)
        if not any(len(mine & other) >= 0.7 * len(mine | other) for other in expected.values()):
            expected[n] = mine
    assert kept(tmp_path / "out").keys() == {f"row {n}" for n in expected}
    assert 60 <= len(expected) < 200


def test_of_two_that_are_alike_training_gives_way(tmp_path):
    long = "Can you recommend a good book about the history of ancient Rome for a beginner who knows {} of it yet?"
    answer = "A good choice is Rubicon by Tom Holland, which reads like a novel and needs nothing."
    source = write(
        tmp_path / "rows.jsonl", [(long.format("nothing"), answer), (long.format("little"), answer), *PASSING]
    )
    assert call("generate_data", "--source", source, "--output", tmp_path / "raw").code == 0
    where = {row["id"]: split for split in records.SPLITS for row in records.load_split(tmp_path / "raw", split)}
    assert run(tmp_path / "raw", tmp_path / "out").code == 0
    (gone,) = read(tmp_path / "out" / "rejected.jsonl")
    other = ({"row 0", "row 1"} - {gone["id"]}).pop()
    assert gone["reasons"][0]["rule"] == "duplicate" and other in gone["reasons"][0]["why"]
    rank = ["test", "validation", "train"].index
    assert rank(where[gone["id"]]) >= rank(where[other])


def test_a_held_out_row_that_is_rejected_still_takes_its_near_duplicate_out_of_training(tmp_path):
    """The unfiltered test split may be evaluated on, as `make align ALIGN_DATA=file` does."""
    long = "Can you recommend a good book about the history of ancient Rome for a beginner who knows {} of it yet?"
    rows = {"nothing": "No.", "little": "A good choice is Rubicon by Tom Holland, which reads like a novel."}
    source = write(tmp_path / "rows.jsonl", [(long.format(word), said) for word, said in rows.items()] + PASSING)
    assert call("generate_data", "--source", source, "--output", tmp_path / "raw").code == 0
    splits = {split: records.load_split(tmp_path / "raw", split) for split in records.SPLITS}
    by_id = {row["id"]: row for part in splits.values() for row in part}
    splits["test"] = [by_id["row 0"]]
    splits["train"] = [row for name, row in by_id.items() if name not in ("row 0", splits["validation"][0]["id"])]
    splits["train"] = [row for row in splits["train"] if row["id"] != "row 1"] + [by_id["row 1"]]
    with artifact.write_artifact(tmp_path / "raw", "data", Namespace(seed=1)) as build:
        for split, part in {**splits, "documents": []}.items():
            records.write(build.path / f"{split}.jsonl", part)
    assert run(tmp_path / "raw", tmp_path / "out").code == 0
    reasons = {
        row["id"]: [reason["rule"] for reason in row["reasons"]] for row in read(tmp_path / "out" / "rejected.jsonl")
    }
    assert reasons["row 0"][0] == "response" and reasons["row 1"] == ["duplicate"]


def test_a_second_evaluation_flag_adds_to_the_first(tmp_path):
    """As FILTER_FLAGS="--evaluation x" does behind the one that make gives."""
    source = write(tmp_path / "rows.jsonl", [("Which bird stands in rivers?", PASSING[0][1]), *PASSING[:5]])
    first = held_out(tmp_path / "first.jsonl", ["Which bird stands in rivers?"])
    second = held_out(tmp_path / "second.jsonl", ["Which fish swims in ponds?"])
    assert run(source, tmp_path / "out", "--evaluation", first, "--evaluation", second).code == 0
    assert "row 0" not in kept(tmp_path / "out")


def test_a_row_that_is_rejected_takes_no_other_with_it(tmp_path):
    asked = "Tell me what the moon is made of, how old it is, and how far from us it is today."
    rows = [
        (asked, "The moon is made of rock, it is old, and it is"),
        (asked, "It is rock, 4.5 billion years old, and far away."),
    ]
    assert run(write(tmp_path / "rows.jsonl", rows + PASSING), tmp_path / "out").code == 0
    assert "row 1" in kept(tmp_path / "out") and "row 0" not in kept(tmp_path / "out")


@pytest.mark.parametrize("one, other, alike", [
    ("What is 12 - 5?", "What is 12 + 5?", False),
    ("What is (8 - 3) * 2?", "What is 8 - (3 * 2)?", False),
    ("What is 1.5?", "What is 1,5?", False),
    ("Which is x < 5?", "Which is x > 5?", False),
    ("Who uses C++?", "Who uses C#?", False),
    ("What does 🏠 mean?", "What does 🌳 mean?", False),
    ("उसका क्या?", "उसकी क्या?", False),  # differ in a vowel sign
    ("কলা কী?", "কালা কী?", False),
    ("ราคาไม้", "ราคาไม่", False),
    ("What is **12 – 5**?", "What is 12-5?", True),
    ("Où est l’été à Zu\u0308rich?", "Où est l'été à Zürich ?", True),
    ("１２ ＋ ５ は？", "12 + 5 は?", True),
])  # fmt: skip
def test_instructions_that_differ_in_a_sign_are_no_duplicates(one, other, alike, tmp_path):
    answers = [(text, "An answer that is long enough, and the same for each of them.") for text in (one, other)]
    source = write(tmp_path / "rows.jsonl", answers + PASSING[:2])
    argv = ("--language", "any", "--min-instruction-words", 1)
    assert run(source, tmp_path / "out", *argv).code == 0
    assert [row["reasons"][0]["rule"] for row in read(tmp_path / "out" / "rejected.jsonl")] == ["duplicate"] * alike


# --- overlap ------------------------------------------------------------------------------------------------------

SENTENCE = "a heron stood in the shallow river all morning and caught three small silver fish before noon"


def held_out(path, questions, **more):
    rows = [{"question": question, "gold": ["a grey heron"], **more} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("evaluated, instruction, taken", [
    (SENTENCE, f"Comment on this: {' '.join(SENTENCE.split()[2:15])}", True),
    (SENTENCE, f"Comment on this: {' '.join(SENTENCE.split()[2:14])}", False),
    (SENTENCE, f"Comment: {SENTENCE.upper().replace(' ', ', ')}", True),
    ("Which bird stands in rivers?", "Tell me: which BIRD, in – fact, stands in rivers?", False),
    ("Which bird stands in rivers?", "A riddle:\n1. Which BIRD stands – in rivers? Answer it.", True),
    ("Which bird stands in rivers?", "Which bird stands in rivers at night, and why?", False),
    ("It stands in rivers. Which bird is it?", "Think. It stands in rivers! Which bird is it?", True),
    ("Neural networks:", "Tell me how neural networks learn.", False),
    ("Neural networks:", "I have a question. Neural networks? Explain.", True),
    ("Does the cat's tail move?", "Answer: does the cats tail move", True),
])  # fmt: skip
def test_overlap_is_thirteen_words_or_a_whole_shorter_question(tmp_path, evaluated, instruction, taken):
    source = write(tmp_path / "rows.jsonl", [(instruction, PASSING[0][1]), *PASSING[:5]])
    argv = ("--evaluation", held_out(tmp_path / "held.jsonl", [evaluated]), "--skip", "statement")
    assert run(source, tmp_path / "out", *argv).code == 0
    assert ("row 0" not in kept(tmp_path / "out")) == taken
    if taken:
        assert str(tmp_path / "held.jsonl") in read(tmp_path / "out" / "rejected.jsonl")[0]["reasons"][0]["why"]


OPTIONS = ["The sun is a star", "The moon is a star"]


@pytest.mark.parametrize("question, turns, taken", [
    ("Which of the following is true?", ["Which of the following is true of cats? They bark."], False),
    ("Which of the following is true?", ["Which of the following is true?\nA. Cats bark\nB. Dogs bark"], False),
    ("Which of the following is true?", ["Which of the following is true?\nA) Cats bark\nB) The moon is a star"], True),
    ("Which of the following is true?", ["Say which of the following is true", "The sun is a star."], True),
    ("What do we see at night?", ["Tell me what do we see at night, and why"], False),
    ("What do we see at night?", ["Think first. What do we see at night?"], True),
])  # fmt: skip
def test_a_short_question_counts_as_a_whole_line_and_a_stem_with_its_options(question, turns, taken):
    import filter_data

    assert bool(filter_data.Forbidden([("mmlu", question, OPTIONS)]).where(turns)) == taken


def test_the_form_of_many_questions_is_no_overlap():
    import filter_data

    form = "In which of these two cases does the person who tells the story do something wrong, case {} or case {}?"
    texts = [("mmlu", form.format(n, f"number {n} of the list"), OPTIONS) for n in range(11)]
    asked = [form.format("one", "two")]
    assert filter_data.Forbidden(texts[:10]).where(asked) and not filter_data.Forbidden(texts).where(asked)
    assert filter_data.Forbidden(texts).where([texts[7][1]])


def test_a_question_whose_options_are_symbols_counts_without_them():
    import filter_data

    question = "In Python 3, which of the following is floor division?"
    assert filter_data.Forbidden([("mmlu", question, ["/", "//", "|"])]).where([question])


def test_overlap_is_seen_in_every_turn_and_in_documents(tmp_path):
    plain = {"role": "user", "content": "What do you make of it?"}
    answer = {"role": "assistant", "content": PASSING[0][1]}
    long = {"role": "assistant", "content": f"They say that {SENTENCE}."}
    rows = [
        {"id": "system", "messages": [{"role": "system", "content": SENTENCE}, plain, answer]},
        {"id": "earlier", "messages": [plain, long, plain, answer]},
        {"id": "response", "messages": [plain, long]},
        {"id": "document", "question": "What does it say?", "documents": [f"{SENTENCE}."], "gold": [PASSING[0][1]]},
        {"id": "apart", "prompt": "What does it say?", "completion": PASSING[0][1], "documents": [f"{SENTENCE}."]},
        *({"id": f"{n}", "instruction": asked, "output": said} for n, (asked, said) in enumerate(PASSING)),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = held_out(tmp_path / "held.jsonl", ["What did the heron do?"], documents=[f"One day {SENTENCE}!"])
    assert run(tmp_path / "rows.jsonl", tmp_path / "out", "--evaluation", held).code == 0
    taken = {r["id"] for r in read(tmp_path / "out" / "rejected.jsonl") if r["reasons"][-1]["rule"] == "overlap"}
    assert taken == {"system", "earlier", "response", "document", "apart"}


def test_nothing_that_overlaps_passes(tmp_path):
    """Against a search by plain strings, on random texts over few words, so that long runs are shared by chance."""
    rng = random.Random(1)

    def text(least, most):
        return " ".join(rng.choices(["red", "blue"], k=rng.randrange(least, most)))

    questions = [text(13, 40) for _ in range(25)]
    pairs = [(text(20, 40), text(20, 40)) for _ in range(80)]
    source = write(tmp_path / "rows.jsonl", pairs + PASSING)
    held = held_out(tmp_path / "held.jsonl", questions)
    skipped = ("language", "repetition", "ending", "duplicate")
    assert run(source, tmp_path / "out", "--evaluation", held, "--skip", *skipped).code == 0
    parts = []
    for question in questions:
        words = question.split()
        parts += [f" {' '.join(words[i : i + 13])} " for i in range(max(1, len(words) - 12))]
    expected = {
        f"row {n}" for n, pair in enumerate(pairs) if any(part in f" {side} " for part in parts for side in pair)
    }
    taken = {row["id"] for row in read(tmp_path / "out" / "rejected.jsonl")}
    assert taken == expected and 20 < len(expected) < 60


def test_bundled_sets_are_kept_out_unless_told_otherwise(bundled, tmp_path):
    rows = [
        ("Where do people live? Name three places.", PASSING[0][1]),
        ("Is the first series of notes still legal tender?", PASSING[0][1]),
        ("Start every sentence of it with the letter A.", PASSING[0][1]),
        *PASSING,
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    assert call("filter_data", "--data", source, "--output", tmp_path / "out").code == 0
    reasons = {row["id"]: row["reasons"][0] for row in read(tmp_path / "out" / "rejected.jsonl")}
    assert {name: reason["why"].split(":")[0] for name, reason in reasons.items()} == {
        "row 0": "commonsense_qa", "row 1": "boolq", "row 2": "mt_bench",
    }  # fmt: skip
    assert run(source, tmp_path / "without").code == 0 and len(kept(tmp_path / "without")) == len(rows)


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A function: the directory of a tiny random sequence-classification model with so many outputs."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from lib.model import tiny

    def make(outputs):
        folder = tmp_path_factory.mktemp("reward")
        tokenizer = tiny.tokenizer()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_labels=outputs, pad_token_id=2,
        )  # fmt: skip
        LlamaForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def test_a_reward_model_scores_the_whole_chat(reward, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = reward(1)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    for asked, said in PASSING:
        text = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"
        with torch.inference_mode():
            expected.append(model(**tokenizer(text, return_tensors="pt")).logits.item())
    middle = sorted(expected)[len(expected) // 2]
    source = write(tmp_path / "rows.jsonl", PASSING)
    done = run(source, tmp_path / "out", "--scorer", f"reward:{folder}", "--min-score", middle - 1e-5)
    assert done.code == 0, done.err
    assert kept(tmp_path / "out").keys() == {f"row {n}" for n, score in enumerate(expected) if score >= middle}
    said = {row["id"]: row["reasons"][0] for row in read(tmp_path / "out" / "rejected.jsonl")}
    assert all(f"{expected[int(name.split()[1])]:.3f}" in reason["why"] for name, reason in said.items())
    assert artifact.state(tmp_path / "out")[0] == "intact"
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert artifact.state(tmp_path / "out") == ("stale", str(folder))


def test_a_scorer_that_is_no_reward_model_is_refused(reward, base, tmp_path):
    source = write(tmp_path / "rows.jsonl", PASSING)
    for name, words in {
        f"reward:{reward(2)}": ("has 2 outputs", "expected one"),
        f"reward:{base}": ("outputs, expected one",),
        f"reward:{tmp_path}": ("transformers cannot load it",),
        "rewards": ("none of embedding, reward:",),
        "reward:": ("expected reward:MODEL",),
    }.items():
        refused(run(source, tmp_path / "out", "--scorer", name), *words)
    assert beside(tmp_path) == ["rows.jsonl"]


# --- bad input ----------------------------------------------------------------------------------------------------


def test_where_no_row_passes_the_rule_that_took_most_is_named(tmp_path):
    source = write(tmp_path / "rows.jsonl", [("Hi", "Eight"), ("Name a number, please.", "Eight")])
    done = run(source, tmp_path / "out")
    refused(
        done, "no example passes; the rule 'response' rejected most", "2 of 2 examples", "1 words, expected 10 to 2000"
    )
    assert beside(tmp_path) == ["rows.jsonl"]


def test_a_rule_that_rejects_most_shows_three_examples_and_what_to_do(tmp_path):
    foreign = [
        ("하늘은 무슨 색인가요? 짧게 대답해 주세요.", "맑은 날 낮의 하늘은 파란색이며 해가 지면 붉은색으로 변합니다."),
        ("Quelle est la couleur du ciel pendant la journée ?", "Le ciel est bleu pendant la journée et devient rouge."),
        (
            "¿De qué color es el cielo durante el día claro?",
            "El cielo es azul durante el día y se vuelve rojo después.",
        ),
        ("Welche Farbe hat der Himmel am hellen Tag?", "Der Himmel ist am Tag blau und wird am Abend langsam rot."),
    ]
    done = run(write(tmp_path / "rows.jsonl", [*foreign, *PASSING[:3]]), tmp_path / "out")
    assert done.code == 0 and "warning: the rule 'language' rejects 4 of 7 examples, for instance" in done.out
    assert [f"    row {n}: instruction: language" in done.out for n in range(4)] == [True, True, True, False]
    assert "--language is en, and these look like ko, fr, es, de: give --language ko to keep" in done.out
    refused(
        run(write(tmp_path / "rows.jsonl", [*foreign, PASSING[0]]), tmp_path / "no"),
        "only 1 of 5 examples pass, with 1 different prompts", "the rule 'language' rejected most, 4 of 5",
        "--language is en", "or --language any to keep all",
    )  # fmt: skip
    assert "warning" not in run(write(tmp_path / "rows.jsonl", [*foreign[:3], *PASSING[:3]]), tmp_path / "half").out


def test_where_all_overlaps_no_message_advises_to_skip_the_rule(tmp_path):
    source = write(tmp_path / "rows.jsonl", [(SENTENCE, PASSING[0][1])])
    argv = ("--evaluation", held_out(tmp_path / "held.jsonl", [SENTENCE]), "--skip", "statement")
    done = run(source, tmp_path / "out", *argv)
    refused(done, "the rule 'overlap' rejected most", "use other examples")
    assert "--skip overlap" not in done.err


def test_bad_values_are_refused_before_anything_is_written(own, tmp_path):
    source = write(tmp_path / "rows.jsonl", PASSING)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for argv, words in {
        ("--language", "xx"): ("--language xx", "expected any, or one of", " en, "),
        ("--min-response-words", 9, "--max-response-words", 8): ("--min-response-words 9", "no row could pass"),
        ("--skip", "overlap"): ("invalid choice",),
        ("--max-repetition", 1.5): ("out of range",),
        ("--near-duplicate", 0.4): ("out of range", "0.5 to 1"),
        ("--evaluation", tmp_path / "gone.jsonl"): ("does not exist",),
        ("--evaluation", source): ("is --data itself",),
    }.items():
        refused(run(source, tmp_path / "out", *argv), *map(str, words))
    refused(run(empty, tmp_path / "out"), "contains no rows")
    refused(run(tmp_path / "gone", tmp_path / "out"), "does not exist")
    assert beside(tmp_path) == ["empty.jsonl", "rows.jsonl"]
    refused(run(own / "raw", tmp_path / "out", "--evaluation", own / "raw"), "is --data itself")


def test_a_held_out_split_may_be_left_empty(tmp_path):
    source = write(tmp_path / "rows.jsonl", PASSING)
    assert call("generate_data", "--source", source, "--output", tmp_path / "raw").code == 0
    held = records.load_split(tmp_path / "raw", "test")
    assert len(held) == 1
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": held[0]["prompt"], "completion": held[0]["completion"]}))
    done = run(tmp_path / "raw", tmp_path / "out", "--evaluation", tmp_path / "held.jsonl")
    assert done.code == 0 and "no test examples are left" in done.out
    again = run(tmp_path / "out", tmp_path / "again")
    assert again.code == 0 and len(kept(tmp_path / "again")) == len(PASSING) - 1


def test_long_runs_of_digits_and_capitals_take_no_time_and_no_traceback():
    import filter_data

    assert filter_data.check_ending("Digits:\n" + "3" * 5000, True) is None
    text = "Here is the reversed sequence,\n" + "GATTACA" * 300 + " and it has the same length as the other"
    assert filter_data.check_ending(text, True)


def test_a_signature_ends_the_text_and_not_a_line_of_it():
    import filter_data

    broken = "Dear Anna,\nHappy Birthday\nI hope that all of your wishes come to be fulfilled very"
    assert filter_data.check_ending(broken, True)
    assert (
        filter_data.check_ending("Thank you for the invitation to the party on Friday.\n\nBest regards,\nAnn Lee", True)
        is None
    )
