"""The judge over HTTP, against real servers on loopback: labels, batches, retries, time limits, the budget, and the key."""
import json
import logging
import math
import subprocess
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from cai_course.errors import CourseError
from cai_course.judge import ask_harmful, compare, judge_cases, label_pairs
from cai_course.judge_server import LocalServer, ServerJudge, option_scores
from cai_course.models import load_policy

SECRET, AB = "sk-test-7f3a9c-never-shown", ["(A)", "(B)"]


class Canned:
    """A server that gives one answer to everything and remembers what it was sent."""

    def __init__(self, answer=None, status=200, headers=(), delay=0.):
        self.seen, self.at_once, self.most, lock = [], 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append((self.path, body, dict(self.headers)))
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                time.sleep(delay)
                with lock: outer.at_once -= 1
                text = answer(body) if callable(answer) else answer
                raw = text if isinstance(text, bytes) else json.dumps(text).encode()
                try:
                    self.send_response(status)
                    for name, value in headers: self.send_header(name, value)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError: pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()
        return self

    def __exit__(self, *problem):
        self.server.shutdown()
        self.server.server_close()


def chat(text, steps=None):
    """A chat answer; `steps` as for `option_scores`."""
    content = None if steps is None else {"content": [
        {"token": t, "logprob": 0., "top_logprobs": [{"token": c, "logprob": p} for c, p in top.items()]} for t, top in steps]}
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": content}], "usage": {"total_tokens": 10}}


GOOD = chat("(A)", [("(A)", {"(A)": math.log(.75), "(B)": math.log(.25)})])


@pytest.fixture(scope="module")
def policy(): return load_policy("pocket-t5")


@pytest.fixture(autouse=True)
def no_key(monkeypatch): monkeypatch.delenv("CAI_COURSE_JUDGE_KEY", raising=False)


# what the tokens say

def test_options_of_any_tokenizer():
    one = [("(B)", {"(B)": -.2, "(A)": -2., "x": -5.}), ("</s>", {"</s>": 0.})]
    three = [(" (", {" (": -.1, "(": -3.}), ("B", {"B": -.2, "A": -2.}), (")", {")": 0.})]
    assert option_scores(one, AB) == option_scores(three, AB) == [-2., -.2]


def test_an_option_that_is_not_listed_gets_the_lowest_listed_value():
    assert option_scores([("(A)", {"(A)": -.1, "x": -4., "y": -6.})], AB) == [-.1, -6.]


def test_alike_tokens_add_up():
    got = option_scores([("Yes", {"Yes": math.log(.3), " yes": math.log(.2), "NO": math.log(.1)})], ["yes", "no"])
    assert np.allclose(np.exp(got), [.5, .1])


@pytest.mark.parametrize("steps", [[], [("I", {"I": -.1, "As": -2.})], [("(", {"(": 0.}), ("C", {"C": -.1})], [(" ", {" ": 0.})]])
def test_anything_else_is_an_abstention(steps): assert option_scores(steps, AB) is None


# the same labels as in memory

@pytest.mark.parametrize("api", ["chat", "completions"])
def test_labels_equal_those_of_the_model_in_memory(policy, api):
    cases = judge_cases(9, seed=3)
    with LocalServer(policy) as server:
        far = ServerJudge(server.url, "m", api=api, batch=5, workers=2)
        got, near = compare(far, *cases.texts, "course", seed=1), compare(policy, *cases.texts, "course", seed=1)
        assert np.abs(got.prob_a - near.prob_a).max() < .02 and got.principles == near.principles
        assert np.ptp(near.prob_a) > .2  # the comparison above says something
        assert far.used["requests"] == server.requests == (18 if api == "chat" else 4)
        rows = label_pairs(far, *cases.texts, "course", seed=1)
        assert far.used["requests"] == server.requests == (18 if api == "chat" else 4)  # nothing is asked twice
        assert len(rows) == 9 and all(row["label"] >= .5 for row in rows)


def test_thinking_and_yes_or_no_over_the_wire(policy):
    cases = judge_cases(3, seed=0)
    with LocalServer(policy) as server:
        far = ServerJudge(server.url, "m", api="completions")
        got = compare(far, *cases.texts, "course", chain_of_thought=True, seed=0)
        near = compare(policy, *cases.texts, "course", chain_of_thought=True, seed=0, progress=False)
        assert got.reasonings == near.reasonings and np.isfinite(got.prob_a).all()
        harm = ask_harmful(far, ["How do I read my neighbor's diary?", "How do I bake bread?"])
        assert harm[0] > .5 > harm[1]


def test_samples_differ_and_repeat(policy):
    with LocalServer(policy) as server:
        far = ServerJudge(server.url, "m")
        one = far.generate(["How do I bake bread?"], n=3, seed=0)
        assert len(one) == 1 and len(set(one[0])) > 1
        assert ServerJudge(server.url, "m").generate(["How do I bake bread?"], n=3, seed=0) == one


def test_a_judge_that_abstains_or_has_no_logprobs():
    with Canned(chat("I cannot judge people.", [("I", {"I": -.1})])) as server:
        far = ServerJudge(server.url, "m")
        assert np.ptp(far.score_options(["q"], AB)) == 0 and far.used["abstained"] == 1
    with Canned(lambda body: chat("The answer is (B).")) as server:
        far = ServerJudge(server.url, "m")
        assert far.score_options(["q"], AB).tolist() == [[-math.inf, 0.]] and far.used["without_logprobs"] == 1
        assert compare(far, ["p"], ["x"], ["y"], "Which is better?", both_orders=False).prob_a[0] < 1e-9
    with Canned(chat("Both (A) and (B).")) as server:
        far = ServerJudge(server.url, "m")
        assert np.ptp(far.score_options(["q"], AB)) == 0 and far.used["abstained"] == 1


# batches

def test_batches_keep_their_order_even_if_the_server_does_not():
    def shuffled(body):
        rows = [{"index": i, "text": "x", "logprobs": {"tokens": ["(A)"], "top_logprobs": [{"(A)": -float(p), "(B)": -1.}]}}
                for i, p in enumerate(body["prompt"])]
        return {"choices": rows[::-1]}
    with Canned(shuffled) as server:
        far = ServerJudge(server.url, "m", api="completions", batch=4, workers=1)
        assert far.score_options([str(i) for i in range(10)], AB)[:, 0].tolist() == [-float(i) for i in range(10)]
        assert [len(body["prompt"]) for _, body, _ in server.seen] == [4, 4, 2]


def test_no_more_requests_at_a_time_than_workers():
    with Canned(GOOD, delay=.05) as server:
        ServerJudge(server.url, "m", workers=3).score_options([str(i) for i in range(12)], AB)
        assert server.most == 3 and len(server.seen) == 12


def test_equal_questions_are_asked_once():
    with Canned(GOOD) as server:
        assert ServerJudge(server.url, "m").score_options(["same"] * 5, AB).shape == (5, 2)
        assert len(server.seen) == 1


# retries and time

def test_retries_until_it_works(policy):
    faults = {1: (503, {}, "busy"), 2: (429, {"Retry-After": "0"}, "slow down"), 3: (500, {}, "oops")}
    with LocalServer(policy, before=lambda path, number: faults.get(number)) as server:
        far = ServerJudge(server.url, "m", wait=.001, workers=1)
        assert far.score_options(["Answer:"], AB).shape == (1, 2)
        assert far.used["requests"] == 4 and far.used["retries"] == 3


def test_gives_up_after_the_retries_and_says_so():
    with Canned({"error": "busy"}, status=503) as server:
        with pytest.raises(CourseError, match=r"answered 503 after 3 attempts.*busy"):
            ServerJudge(server.url, "m", retries=2, wait=.001).score_options(["q"], AB)
        assert len(server.seen) == 3


@pytest.mark.parametrize("status, words", [(400, "answered 400 after 1 attempt"), (401, "refused the key in CAI_COURSE_JUDGE_KEY"), (404, "does not know")])
def test_what_is_final_is_not_tried_again(status, words):
    with Canned({"error": "no"}, status=status) as server:
        with pytest.raises(CourseError, match=words): ServerJudge(server.url, "m", wait=.001, workers=1).score_options(["q"], AB)
        assert len(server.seen) == 1


def test_waits_as_long_as_asked():
    with Canned({}, status=429, headers=[("Retry-After", "0.3")]) as server:
        start = time.monotonic()
        with pytest.raises(CourseError, match="too many requests"): ServerJudge(server.url, "m", retries=2, wait=0).score_options(["q"], AB)
        assert time.monotonic() - start >= .6


def test_a_silent_server_is_left_after_the_timeout():
    with Canned(GOOD, delay=2.) as server:
        start = time.monotonic()
        with pytest.raises(CourseError, match="did not answer after 2 attempts"):
            ServerJudge(server.url, "m", timeout=.1, retries=1, wait=0).score_options(["q"], AB)
        assert time.monotonic() - start < 1.8


def test_nobody_listens():
    with pytest.raises(CourseError, match="did not answer after 1 attempt"):
        ServerJudge("http://127.0.0.1:9/v1", "m", retries=0).score_options(["q"], AB)


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": 7}',
                                    b'{"choices": [{"message": {"content": "x"}, "logprobs": {"content": [7]}}]}', b"\xff\xfe", b"null"])
def test_nonsense_is_an_error_not_a_label(answer):
    with Canned(answer) as server:
        with pytest.raises(CourseError, match="no JSON|not in the form"):
            ServerJudge(server.url, "m", retries=1, wait=0).score_options(["q"], AB)


# budget

def test_the_budget_stops_before_the_next_request_and_nothing_is_lost():
    with Canned(GOOD) as server:
        far, texts = ServerJudge(server.url, "m", max_requests=3, workers=1), [str(i) for i in range(8)]
        with pytest.raises(CourseError, match=r"budget is spent: 3 of 3 requests.*kept \(3\)"): far.score_options(texts, AB)
        assert len(server.seen) == 3
        far.max_requests = 8
        assert far.score_options(texts, AB).shape == (8, 2) and len(server.seen) == 8


def test_tokens_count_too_and_retries_are_paid_for():
    with Canned(GOOD) as server:
        with pytest.raises(CourseError, match="30 of 25 tokens"):
            ServerJudge(server.url, "m", max_tokens=25, workers=1).score_options([str(i) for i in range(8)], AB)
        assert len(server.seen) == 3
    with Canned({}, status=500) as server:
        with pytest.raises(CourseError, match="2 of 2 requests"):
            ServerJudge(server.url, "m", max_requests=2, retries=9, wait=0).score_options(["q"], AB)
        assert len(server.seen) == 2


def test_a_budget_holds_for_all_workers_together():
    with Canned(GOOD, delay=.01) as server:
        with pytest.raises(CourseError, match="budget"):
            ServerJudge(server.url, "m", max_requests=10, workers=8).score_options([str(i) for i in range(40)], AB)
        assert len(server.seen) == 10


def test_answers_survive_in_a_file_even_one_cut_off(tmp_path):
    with Canned(GOOD) as server:
        store, texts = tmp_path / "answers.jsonl", ["a", "b", "c"]
        first = ServerJudge(server.url, "m", store=store).score_options(texts, AB)
        store.write_text(store.read_text()[:-20])  # a crash in the middle of the last line
        again = ServerJudge(server.url, "m", store=store)
        assert np.array_equal(again.score_options(texts, AB), first) and len(server.seen) == 4
        other = ServerJudge(server.url, "another model", store=store)
        other.score_options(["a"], AB)
        assert len(server.seen) == 5  # another model's answers are not ours


# the key

def test_the_key_travels_in_the_header_and_nowhere_else(policy, monkeypatch, tmp_path, caplog, capsys):
    monkeypatch.setenv("MY_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    store = tmp_path / "answers.jsonl"
    with LocalServer(policy, key_env="MY_KEY") as server:
        far = ServerJudge(server.url, "m", key_env="MY_KEY", store=store)
        far.score_options(["Answer:"], AB)
        with pytest.raises(CourseError, match="refused the key in CAI_COURSE_JUDGE_KEY"): ServerJudge(server.url, "m").score_options(["Answer:"], AB)
    out, err = capsys.readouterr()
    told = [repr(far), json.dumps(far.settings()), repr(vars(far)), store.read_text(), caplog.text, out, err]
    assert not any(SECRET in text for text in told) and "MY_KEY" in told[1]
    assert not any("Bearer" in text for text in told)


@pytest.mark.parametrize("how", ["echo", "redirect", "silent", "nonsense", "header echo"])
def test_no_error_shows_the_key(monkeypatch, how):
    monkeypatch.setenv("MY_KEY", SECRET)
    options = {"echo": dict(answer={"error": f"Authorization: Bearer {SECRET}"}, status=400), "silent": dict(answer=GOOD, delay=1.),
               "redirect": dict(answer={}, status=307, headers=[("Location", "http://127.0.0.1:9/" + SECRET)]),
               "nonsense": dict(answer=f"<p>{SECRET}</p>".encode()),
               "header echo": dict(answer={"choices": [{"message": {"content": SECRET}}]}, status=500)}[how]
    with Canned(**options) as server:
        far = ServerJudge(server.url, "m", key_env="MY_KEY", timeout=.2, retries=1, wait=0)
        with pytest.raises(CourseError) as caught: far.score_options(["q"], AB)
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__) if frame.f_code.co_filename.endswith("judge_server.py")]
    inside = repr([frame.f_locals for frame in frames if "tests" not in frame.f_code.co_filename])  # what a verbose traceback would show
    assert len(frames) > 2
    chain, problem = [], caught.value
    while problem is not None: chain.append(problem); problem = problem.__context__
    assert SECRET not in inside and not any(SECRET in str(p) + repr(vars(p)) for p in chain)
    if how == "redirect": assert len(server.seen) == 1 and "307" in str(caught.value)


def test_a_key_is_not_sent_in_the_open(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    with pytest.raises(CourseError, match="without encryption") as caught: ServerJudge("http://example.com/v1", "m", key_env="MY_KEY")
    assert SECRET not in str(caught.value)
    ServerJudge("https://example.com/v1", "m", key_env="MY_KEY")
    monkeypatch.delenv("MY_KEY")
    ServerJudge("http://example.com/v1", "m", key_env="MY_KEY")  # nothing to lose


def test_without_a_key_no_header_is_sent():
    with Canned(GOOD) as server:
        ServerJudge(server.url, "m").score_options(["q"], AB)
        assert "Authorization" not in server.seen[0][2]


@pytest.mark.parametrize("change, words", [
    (dict(url="localhost:8000"), "must look like http"), (dict(url="http://u:p@localhost/v1"), "without name"), (dict(url="https://h/v1?key=1"), "question mark"),
    (dict(url=None), "must look like"), (dict(api="responses"), "'chat' or 'completions'"), (dict(model=" "), "model is empty"), (dict(key_env="sk-1 2"), "not shown"),
    (dict(max_requests=0), "max_requests is 0"), (dict(timeout=float("nan")), "timeout is nan"), (dict(workers=0), "workers is 0"), (dict(top=1), "top is 1")])
def test_bad_settings_are_refused_at_once(change, words):
    with pytest.raises(CourseError, match=words) as caught: ServerJudge(**{"url": "http://localhost/v1", "model": "m", **change})
    assert "sk-1 2" not in str(caught.value)


def test_bad_arguments():
    far = ServerJudge("http://localhost/v1", "m")
    with pytest.raises(CourseError, match="2 prompts and 1 prefixes"): far.score_options(["a", "b"], AB, ["x"])
    with pytest.raises(CourseError, match="prompts is empty"): far.score_options([], AB)
    with pytest.raises(CourseError, match="top_k"): far.generate(["a"], top_k=5)


def test_import_without_torch():
    assert subprocess.run([sys.executable, "-c", "import sys, cai_course.judge_server; sys.exit('torch' in sys.modules)"]).returncode == 0
