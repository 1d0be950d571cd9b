"""data.py: tokens, labels, files, batches, and the embedded set."""
import collections
import functools
import gzip
import http.server
import json
import threading

import pytest

import data as D
import questions as Q
from model import IGNORE, InputError


def example(i="Say hi.", x="", o="hi", g=""):
    return dict(instruction=i, input=x, output=o, group=g)


# --- tokenizer ---------------------------------------------------------------------------------------------------------


def test_the_tokenizer_has_llamas_ids_and_loses_nothing(tokenizer):
    assert tokenizer.size <= 512 and (tokenizer.bos, tokenizer.eos) == (1, 2) and tokenizer.sp.unk_id() == 0
    for text in ("a  b\n\n\tc", " two leading", "naïve 东京 🙂", "It's 12345!", D.WITH_INPUT + "x" + D.INPUT + "y" + D.RESPONSE):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("hi", bos=True, eos=True) == [1, *tokenizer.encode("hi"), 2]
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 2]) == "hi"
    odd = tokenizer.size + 1                             # a row of a model whose vocabulary was padded
    assert tokenizer.decode([odd, *tokenizer.encode("hi"), odd], [odd]) == "hi"


def test_each_part_of_the_template_is_one_piece_and_digits_stand_alone(tokenizer):
    ids = tokenizer.encode(D.prompt_text(example("Sort", "a b")))
    pieces = [tokenizer.sp.id_to_piece(i).replace("\u2581", " ") for i in ids]
    assert pieces[0] == " " + D.WITH_INPUT and D.INPUT in pieces and pieces[-1] == D.RESPONSE
    assert tokenizer.sp.id_to_piece(tokenizer.encode(D.prompt_text(example()))[0]).replace("\u2581", " ") == " " + D.NO_INPUT
    assert tokenizer.sp.encode("417", out_type=str) == ["\u2581", "4", "1", "7"]


def test_decoding_after_a_prompt_keeps_the_space_between(tokenizer):
    before, new = tokenizer.encode("The sun", bos=True), tokenizer.encode("is red")
    assert tokenizer.decode(new, before) == " is red" and tokenizer.decode(new) == "is red"
    nothing = [tokenizer.size, tokenizer.size + 7]       # rows of a model that has more than the tokenizer has pieces
    assert tokenizer.decode(nothing + new, before + nothing) == " is red"


def test_a_broken_tokenizer_is_one_line(tmp_path, tokenizer):
    for content in (b"", b"no model", tokenizer.model_bytes[:2000]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(InputError, match="tokenizer.model"):
            D.Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "7b").mkdir()
    with pytest.raises(InputError, match="no tokenizer.model"):
        D.Tokenizer.load(tmp_path / "7b")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    assert D.Tokenizer.load(tmp_path / "7b").size == tokenizer.size          # in the parent, where Meta puts it
    (tmp_path / "links").mkdir()
    (tmp_path / "links/model").symlink_to(tmp_path / "7b")
    assert D.Tokenizer.load(tmp_path / "links/model").size == tokenizer.size         # of the folder itself, not of a link to it
    with pytest.raises(InputError, match="rows"):
        D.Tokenizer.load(tmp_path / "7b", vocab_size=100)


# --- prompts and labels ------------------------------------------------------------------------------------------------


def test_prompts_are_alpacas():
    assert D.prompt_text(example("Do it.")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo it.\n\n### Response:")
    assert D.prompt_text(example("Do it.", "now")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nDo it.\n\n### Input:\nnow\n\n### Response:")


def test_only_response_and_eos_carry_loss(tokenizer):
    rows = D.tokenize([example(o="a b c"), example("Say more than that.", "x", "d")], tokenizer, 64)
    tokens, labels = D.collate(rows)
    for (ids, n), t, l in zip(rows, tokens.tolist(), labels.tolist()):
        for i in range(len(t)):
            want = ids[i + 1] if n <= i + 1 < len(ids) else IGNORE
            assert l[i] == want
            assert t[i] == (ids[i] if i < len(ids) - 1 else 0)
    first = [x for x in labels[0].tolist() if x != IGNORE]
    assert first == tokenizer.encode("a b c", eos=True)


def test_long_examples_are_cut_or_dropped_and_counted_aloud(tokenizer):
    short, cut, dropped = example(), example(o="a b c d e f g h"), example("a b c d e f g h i j k l m n o p", "", "x")
    limit, said = len(tokenizer.encode(D.prompt_text(short), bos=True)) + 4, []
    rows = D.tokenize([short, cut, dropped], tokenizer, limit, said.append)
    assert [len(ids) for ids, _ in rows] == [len(rows[0][0]), limit] and len(rows[0][0]) <= limit
    assert said[0].startswith("1 of 3 examples dropped") and said[1].startswith("1 of 3 examples cut")
    with pytest.raises(InputError, match="every example's prompt"):
        D.tokenize([dropped], tokenizer, limit, said.append)
    with pytest.raises(InputError, match="every example's prompt"):              # a prompt that just fits leaves no room for an answer
        D.tokenize([short], tokenizer, limit - 4, said.append)
    assert len(D.tokenize([short], tokenizer, limit - 3, said.append)[0][0]) == limit - 3 and said[-1].startswith("1 of 1 examples cut")


# --- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, size, world, micro", [(103, 8, 1, 8), (103, 8, 2, 2), (103, 8, 3, 2), (5, 16, 4, 1), (9, 4, 8, 3)])
def test_every_epoch_sees_each_example_once_at_any_rank_count(n, size, world, micro):
    rows = [([0] * (5 + i * 7 % 31), 2) for i in range(n)]
    seen, parts = [], []
    for batch in D.batches(rows, size, seed=3, epoch=1):
        shares = [D.share(batch, rank, world, micro) for rank in range(world)]
        assert len({len(s) for s in shares}) == 1                         # equal calls on every rank
        assert all(len(part) <= micro for s in shares for part in s)
        seen += [i for s in shares for part in s for i in part]
        parts += [part for s in shares for part in s]
    assert sorted(seen) == list(range(n))
    if world == 4:
        assert [] in parts                                                # a rank without rows runs one of weight zero
        tokens, labels = D.collate([])
        assert tokens.shape == (1, 1) and (labels == IGNORE).all()


def test_batches_are_seeded_new_each_epoch_and_sorted_within():
    rows = [([0] * (5 + i * 37 % 101), 2) for i in range(400)]
    a, b, c = (D.batches(rows, 16, s, e) for s, e in ((0, 0), (0, 1), (1, 0)))
    assert a == D.batches(rows, 16, 0, 0) and a != b and a != c
    assert all(len(rows[i][0]) <= len(rows[j][0]) for batch in a for i, j in zip(batch, batch[1:]))

    def padding(parts):
        return sum(max(len(rows[i][0]) for i in x) * len(x) for x in parts) / sum(len(ids) for ids, _ in rows)

    assert padding(m for batch in a for m in D.share(batch, 0, 1, 4)) < 1.2 < padding(range(i, i + 4) for i in range(0, 400, 4))
    lengths = [len(rows[x[0]][0]) for x in a]
    assert lengths != sorted(lengths)                                     # short and long batches alternate


def test_batches_are_of_new_company_each_epoch_and_the_short_one_comes_anywhere():
    rows = [([0] * 5, 2)] * 22                           # 5 batches of 4 and one of 2
    epochs = [D.batches(rows, 4, 0, epoch) for epoch in range(30)]
    assert len({frozenset(map(frozenset, cuts)) for cuts in epochs}) == 30
    assert {[len(cut) for cut in cuts].index(2) for cuts in epochs} == {*range(6)}


# --- files -------------------------------------------------------------------------------------------------------------


def test_alpaca_json_and_jsonl_read_the_same(tmp_path):
    records = [dict(instruction="A", input="B\u2028C", output="D"), dict(instruction="E", output="F")]
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n")
    want = [example("A", "B\u2028C", "D"), example("E", "", "F")]
    assert D.read_examples(tmp_path / "a.json") == D.read_examples(tmp_path / "a.jsonl") == want


def test_a_limit_takes_examples_evenly_spaced(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([dict(instruction=str(i), output="") for i in range(10)]))
    told = [[int(e["instruction"]) for e in D.read_examples(tmp_path / "a.json", limit)] for limit in (1, 3, 10, 99, None)]
    assert told == [[0], [0, 3, 6], [*range(10)], [*range(10)], [*range(10)]]


FORMATS = {
    '{"question_id": 1, "text": "Q", "category": "generic"}': example("Q", "", None, "generic"),
    '{"id": "koala_5", "prompt": "Q"}': example("Q", "", None, ""),
    '{"idx": 1, "Skill": "Math", "Difficulty": 3, "Instruction": "Q"}': example("Q", "", None, "Math; level 3"),
    '{"id": "t0", "motivation_app": "Tool", "instruction": "Q", "instances": [{"input": "I", "output": "O"}]}':
        example("Q", "I", "O", "Tool")}


@pytest.mark.parametrize("line", FORMATS)
def test_the_four_test_sets_formats(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line)
    assert D.read_examples(tmp_path / "x.jsonl") == [FORMATS[line]]


@pytest.mark.parametrize("name, n", [("alpaca_train.json", 3812), ("alpaca_val.json", 200), ("vicuna.jsonl", 40),
                                     ("koala.jsonl", 90), ("wizardlm.jsonl", 109), ("self_instruct.jsonl", 126)])
def test_the_real_sets_are_read_whole(shared, name, n):
    examples = D.read_examples(shared / name)
    assert len(examples) == n and all(e["instruction"] for e in examples)


@pytest.mark.parametrize("name, text, message", [
    ("no.json", None, "no such file"), ("e.json", "", "empty"), ("e.json", "[]", "empty"),
    ("b.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "line 3: not JSON"), ("b.json", '[{"a": 1},\n {]', "line 2: not JSON"),
    ("k.json", '[{"instruction": "a", "output": "b"}, {"question": "a"}]', "entry 2: found keys question"),
    ("k.jsonl", '{"prompt": "a"}\n{"text": "a"}', "line 2: found keys text"), ("s.json", '["a"]', "entry 1: found a str"),
    ("t.json", '[{"instruction": 3, "output": "b"}]', "entry 1: found keys"),
    ("i.jsonl", '{"instruction": "a", "instances": [], "motivation_app": "b"}', "line 1"), ("o.json", '{"a": 1}', "line 1"),
    ("n.json", "[" * 100000, "line 1: not JSON"), ("n.jsonl", '{"prompt": "a"}\n{"prompt": ' + "7" * 5000 + "}", "line 2: not JSON"),
    ("z.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3" + b"\xff" * 20, "invalid block type"),
    ("c.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "ended before"), ("u.jsonl", b'{"prompt": "\xff"}', "can't decode"),
    ("h.jsonl", '{"prompt": "\\ud800"}', "line 1: found keys prompt")])
def test_bad_files_name_file_and_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=message) as e:
        D.read_examples(tmp_path / name)
    assert name in str(e.value) and "\n" not in str(e.value)


@pytest.fixture
def server(tmp_path):
    """A local mirror: GitHub's raw paths under tmp_path/www."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "www"))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield tmp_path / "www", f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def test_fetching_everything_from_a_mirror(server, tmp_path, monkeypatch, capsys):
    www, url = server
    lines = ['[{"instruction": "a", "output": "b"}]', *FORMATS]
    for place, text in zip(D.SOURCES.values(), lines):
        (www / place).parent.mkdir(parents=True)
        (www / place).write_text(text)
    monkeypatch.setattr("sys.argv", ["data.py", "--out", str(tmp_path / "data"), "--base", url])
    D.main()
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == sorted(D.SOURCES)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    D.main()
    assert capsys.readouterr().out.count("already there") == 5
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}


def test_a_failed_fetch_writes_nothing(server, tmp_path):
    www, url = server
    (www / "page.json").write_text("<html>not found</html>")
    for name, message in (("absent.json", "404"), ("page.json", "not JSON")):
        with pytest.raises(InputError, match=message):
            D.fetch(f"{url}/{name}", tmp_path / "data" / name)
    for url in ("http://127.0.0.1:9/x.json", "127.0.0.1/x.json", "http://a b/x.json"):
        with pytest.raises(InputError, match="nothing was written"):
            D.fetch(url, tmp_path / "data" / "x.json")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_connection_cut_short_writes_nothing(tmp_path):
    class Short(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b'[{"instruction": "a", "output": "b"}]')

        def log_message(self, *args):
            pass

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Short)
    threading.Thread(target=httpd.handle_request, daemon=True).start()
    with pytest.raises(InputError):
        D.fetch(f"http://127.0.0.1:{httpd.server_port}/x.json", tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


# --- the embedded set --------------------------------------------------------------------------------------------------


def test_the_files_in_tiny_are_what_the_maker_makes(tokenizer):
    assert D.embedded(10**6) == Q.embedded(89600) and D.embedded(10**6, "test") == Q.embedded(4000, split="test")
    assert Q.train_tokenizer().model_bytes == tokenizer.model_bytes and tokenizer.size == 512


def test_the_embedded_set_is_seeded_and_endless():
    assert Q.embedded(50, seed=4) == Q.embedded(50, seed=4) != Q.embedded(50, seed=5)
    assert Q.embedded(3000)[:50] == Q.embedded(50)


def test_train_and_test_share_no_underlying_input():
    """Split before phrasing: no question of the test set was trained on in any other words or order."""
    def key(e):
        text = (e["instruction"] + " " + e["input"]).replace(",", " ").replace(".", " ").replace("?", " ")
        words = [w for w in text.split() if w.isdigit() or len(w) == 1 or w in content]
        if " from " in text:
            words.remove(text.split(" from ")[1].split()[0])            # where to start is the question, not its input
        return e["group"].rsplit(" ", 1)[0], tuple(sorted(words))

    def inputs(split):
        return {key(e) for e in Q.embedded(20000, split=split)}

    content = {*Q.WORDS, *Q.NAMES}
    train, test = inputs("train"), inputs("test")
    assert len(test) > 1000 and not train & test


def test_ten_families_three_phrasings_and_whole_sentences():
    assert len(Q.FAMILIES) == 10 and all(len(phrasings) >= 3 for _, phrasings, _ in Q.FAMILIES.values())
    counts = collections.Counter(e["group"].rsplit(" ", 1)[0] for e in Q.embedded(4000))
    assert set(counts) == set(Q.FAMILIES) and min(counts.values()) > 150
    for e in Q.embedded(500):
        assert e["output"][0].isupper() and e["output"].endswith(".")


def answer_to(e):
    """Solve a question of the embedded set from its own words, by other means than the maker's."""
    text = (e["instruction"] + " " + e["input"]).replace(",", "").replace("?", "").replace(".", "")
    words, kind = text.split(), e["group"].rsplit(" ", 1)[0]
    items = [w for w in words if w in Q.WORDS]
    letters = [w for w in words if len(w) == 1 and w in Q.LETTERS]
    numbers = [int(w) for w in words if w.isdigit()]
    if kind == "echo":
        return items
    if kind == "pick":
        a, b = numbers
        return [items[a - 1], "and", items[b - 1]]
    if kind == "reverse":
        return items[::-1]
    if kind == "sort":
        return sorted(letters)
    if kind == "rank":
        return [sorted(letters)[numbers[0] - 1]]
    if kind == "larger":
        return [str(max(numbers))]
    if kind == "next":
        return [str(numbers[0] + 1)]
    if kind == "sort by":
        return [b for a, b in sorted((a, b) for b, a in zip(words, words[1:]) if a in Q.LETTERS and b in Q.WORDS)]
    start, names = text.split("from ")[1].split()[0], [w for w in words if w in Q.NAMES]
    at = 1 if names[0] == start and names.count(start) == 2 and e["instruction"].split()[0] != "Given" else 0
    links = names[at:] if not e["input"] and at else [w for w in (e["input"] or e["instruction"].split("from")[0]).replace(
        ",", " ").split() if w in Q.NAMES]
    after, out = dict(zip(links[::2], links[1::2])), [start]
    while out[-1] in after:
        out.append(after[out[-1]])
    return out[::2] if kind == "jump" else out


def test_every_answer_is_right():
    for e in Q.embedded(3000, split="test"):
        given, want = e["output"].rstrip(".").split(), answer_to(e)
        assert given[-len(want):] == want, e
