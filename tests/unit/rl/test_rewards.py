"""Rewards: functions that misbehave, in processes of their own; a judge behind a real HTTP server."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.chat_server import Answer as Reply
from support.chat_server import Fake, said, served

from mirage_ds import chat
from mirage_ds.config.rl import RlSettings
from mirage_ds.errors import Stopped, UserError
from mirage_ds.rl.functions import Asked, OwnFunction, answer_format
from mirage_ds.rl.judge import Judge, read_number
from mirage_ds.rl.rewards import Answer, Rewards, Scored, read_rewards

OWN = r'''
import os, re, signal, subprocess, sys, threading, time

def by_text(answers, records, blocks, truncated):
    assert len(answers) == len(records) == len(blocks) == len(truncated)
    if "none at all" in answers:
        return None
    if "one too many" in answers:
        return [0.0] * (len(answers) + 1)
    if "a number" in answers:
        return 1.0
    return (one(text) for text in answers)

def one(text):
    if text == "raise":
        raise ValueError("boom\nand more")
    if text == "hang":
        subprocess.Popen(["sleep", f"61.{os.getppid()}"])
        re.match("(a+)+b", "a" * 60)
    if text == "thread":
        threading.Thread(target=time.sleep, args=(60,)).start()
    if text == "program":
        subprocess.run("echo $$; exec sleep 60", shell=True)
    if text == "exit":
        os._exit(3)
    if text == "system exit":
        sys.exit(0)
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "print":
        print("x" * 1_000_000)
    if text == "modules":
        return float("torch" in sys.modules) + len(os.environ["CUDA_VISIBLE_DEVICES"])
    values = {"nan": float("nan"), "inf": float("inf"), "text": "0.5", "none": None, "true": True}
    return values.get(text, len(text) / 8)

def first(answers, records):
    """Sees the whole group."""
    return [answers[0] == answer for answer in answers]

def minus(answers, records, **extras):
    return [-sum(blocks) - 10 * cut for blocks, cut in zip(extras["blocks"], extras["truncated"])]

def as_text(prompts, completions, **kwargs):
    return [(prompt + text).count("a") for prompt, text in zip(prompts, completions, strict=True)]

def as_message(completions, solution, level=None, **kwargs):
    return [float(solution[at] in one[0]["content"]) + level[at] for at, one in enumerate(completions)]

def passes(completions):
    return [None if text == "pass" else 1.0 for text in completions]

async def later(completions, **kwargs):
    return [1.0] * len(completions)

class Later:
    async def __call__(self, answers, records):
        return [1.0]

later_too = Later()
number = 3

def three(answers, records, third):
    return [1.0] * len(answers)

def needs(completions, solution, other):
    return [1.0] * len(completions)

def always_wrong(answers, records):
    return ["good"] * len(answers)
'''


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with the user's own modules."""
    folder, before = tmp_path_factory.mktemp("own"), Path.cwd()
    (folder / "own_rewards.py").write_text(OWN)
    (folder / "broken_rewards.py").write_text("import math\nmath.nothing\n")
    (folder / "torch_rewards.py").write_text(
        "import torch\ndef half(answers, records):\n    return torch.full((len(answers),), 0.5)\n"
    )
    os.chdir(folder)
    yield folder
    os.chdir(before)
    sys.modules.pop("own_rewards", None)


@pytest.fixture(scope="module")
def by_text(modules: Path) -> Iterator[Rewards]:
    with opened(["own_rewards:by_text"], reward_timeout=0.7, reward_workers=1, max_reward_faults=1.0) as rewards:
        yield rewards


def opened(names: list[str], asked: Callable[[], bool] = lambda: False, **settings: Any) -> Rewards:
    return Rewards(RlSettings(reward=names, **settings), asked=asked)


def answers(*texts: str, row: int = 7, **record: Any) -> list[Answer]:
    return [Answer(row, record, text, (4,) * (at % 2), at == 2) for at, text in enumerate(texts)]


def same(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and all(
        one == other or (math.isnan(one) and math.isnan(other)) for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("raise", r"raises boom, .*own_rewards\.py line \d+"),
        ("hang", "takes longer than 0.7 s"),
        ("exit", "ends its process with code 3"),
        ("system exit", "ends its process with code 0"),
        ("kill", r"ends its process by SIGKILL \(out of memory\?\)"),
        ("none at all", "returns None, not a list of 1 numbers"),
        ("a number", r"returns 1\.0, not a list of 1 numbers"),
        ("one too many", "returns 2 results for 1 answers"),
        ("nan", "returns nan, no number"),
        ("inf", "returns inf, no number"),
        ("text", "returns '0.5', no number"),
        ("none", "returns None, no number"),
    ],
)
def test_one_bad_answer_costs_no_other(by_text: Rewards, text: str, sentence: str) -> None:
    scored = by_text.score(answers("ab", text, "abcd"))
    assert same(scored.total, [0.25, math.nan, 0.5])
    ((row, name, told),) = scored.faults
    assert (row, name) == (7, "own_rewards:by_text")
    assert re.fullmatch(sentence, told)
    # Nor is anything left of what it has started.
    assert not [
        one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", f"61.{os.getpid()}"]
    ]


def test_what_is_no_fault(by_text: Rewards) -> None:
    """Truth values count; megabytes of output block nothing; the process has neither torch nor a GPU."""
    assert by_text.score(answers("true", "print", "modules")) == Scored(
        [1.0, 0.625, 0.0], {"own_rewards:by_text": [1.0, 0.625, 0.0]}, []
    )
    assert by_text.score([]) == Scored([], {"own_rewards:by_text": []}, [])


def test_order_groups_weights_and_columns(modules: Path) -> None:
    record = {"text_input": "banana?", "solution": "b", "level": 3}
    given = [
        *answers("b", "c", "b", row=1, **record),
        *answers("c", "c", row=2, **record),
        *answers("pass", row=1, **record),
        # The same prompt at the rollout's next place: a group of its own.
        answers("b", row=1, **record)[0]._replace(place=1),
    ]
    names = ["first*0.5", "minus*0", "as_text*0.25", "as_message", "passes*0"]
    with opened([f"own_rewards:{name}" for name in names], reward_timeout=20, reward_workers=2) as rewards:
        rewards.check(dict(enumerate([record | {"text_output": "b"}])))
        scored = rewards.score(given)
    first, minus, text, message, passes = scored.by_function.values()
    assert first == [1, 0, 1, 1, 1, 1, 1]
    assert minus == [0, -4, -10, 0, -4, 0, 0]
    assert text == [3, 3, 3, 3, 3, 4, 3]
    assert message == [4, 3, 4, 3, 3, 3, 4]
    assert same(passes, [1, 1, 1, 1, 1, math.nan, 1])
    assert scored.total == [a / 2 + b / 4 + c for a, b, c in zip(first, text, message, strict=True)]
    assert scored.faults == []


def test_the_papers_rewards(modules: Path) -> None:
    record = {"text_input": "Use <think> tags.", "text_output": r"<think> x </think>It is \boxed{A}.", "task": "boxed"}
    texts = {
        r"<think> x </think><think> y </think>It is \boxed{a}.": 1.0,
        r"It is \boxed{A}.": 0.9,
        r"<think> x </think>It is \boxed{B}.": 0.1,
        r"<think> \boxed{A} </think>": 0.9,
        r"<think> x \boxed{B": 0.0,
        "": 0.0,
    }
    with opened(["accuracy*.9", "format*.1"], reward_workers=1) as rewards:
        rewards.check(dict(enumerate([record])))
        scored = rewards.score(answers(*texts, **record))
        assert scored.total == pytest.approx(list(texts.values()))
        # Of a record that cannot be scored the sentence says what it lacks; it is told before anything is decoded.
        lacking = {"text_input": "?", "task": "vsp-spatial-planning"}
        with pytest.raises(UserError, match=r"^reward 'accuracy', tried with record 6: the record has no 'map_desc'"):
            rewards.check({0: record, 5: lacking})
        with pytest.raises(UserError, match="'own_rewards:first' is code, which data must not choose"):
            rewards.check(dict(enumerate([{"text_input": "?", "task": "own_rewards:first"}])))
    direct = Asked((0,) * 2, "format", {"text_input": "?"}, (r"\boxed{1}", "1"), ((),) * 2, (False,) * 2)
    assert answer_format(direct) == [1.0, 0.0]


@pytest.mark.parametrize(("share", "bad", "ends"), [(0.0, 1, True), (0.1, 1, False), (0.1, 2, True), (0.5, 2, False)])
def test_the_share_of_faults(
    by_text: Rewards, share: float, bad: int, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_text.config, "max_reward_faults", share)
    given = answers(*["nan"] * bad, *["abcd"] * (4 - bad), row=3)
    if not ends:
        assert len(by_text.score(given).faults) == bad
        return
    with pytest.raises(UserError) as caught:
        by_text.score(given)
    assert re.fullmatch(
        rf"{bad} of 4 answers are without a reward, more than --max_reward_faults {share:g} allows; the first: "
        r"record 4, own_rewards:by_text: returns nan, no number; fix the reward, or raise the share",
        str(caught.value),
    )
    assert not caught.value.everywhere


@pytest.mark.parametrize(
    ("names", "weights", "expected"),
    [
        (["accuracy", "format"], None, {"accuracy": 1.0, "format": 1.0}),
        (["accuracy*.9", " format * 0.1"], None, {"accuracy": 0.9, "format": 0.1}),
        (["judge", "a.b:c"], [1, -0.5], {"judge": 1.0, "a.b:c": -0.5}),
        (["acuracy"], None, r"unknown reward 'acuracy' \(did you mean 'accuracy'\?\); there are: accuracy, format,"),
        (["scores.py:points"], None, "reward 'scores.py:points' is not of the form package.module:name"),
        (["format*x"], None, "neither NAME nor NAME.WEIGHT"),
        (["format*nan"], None, "neither NAME nor NAME.WEIGHT"),
        (["format"], [math.inf], "no weight but 0, or one that is no number"),
        (["format*1"], [1], "has a weight, and --reward_weights too"),
        (["format"], [1, 2], "2 weights for 1 rewards"),
        (["format", "format*2"], None, "format stands there twice"),
        (["format*0"], None, "no weight but 0"),
    ],
)  # fmt: skip
def test_names_and_weights(names: list[str], weights: list[float] | None, expected: dict[str, float] | str) -> None:
    if isinstance(expected, dict):
        assert read_rewards(names, weights) == expected
        return
    with pytest.raises(UserError, match=expected):
        read_rewards(names, weights)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing_rewards:x", "reward 'missing_rewards:x': missing_rewards cannot be imported"),
        ("broken_rewards:x", r"cannot be imported \(AttributeError: .*broken_rewards\.py line 2\)"),
        ("own_rewards:nothing", "own_rewards has no function nothing"),
        ("own_rewards:number", "own_rewards has no function number"),
        ("own_rewards:later", "is async"),
        ("own_rewards:later_too", "is async"),
        ("own_rewards:three", "missing a required argument: 'third'"),
    ],
)
def test_a_function_that_cannot_be_used(modules: Path, name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        OwnFunction(name)


def test_it_is_told_before_anything_starts(modules: Path) -> None:
    """A process that cannot import is told on entering; a function that is never right by `check`; none is left."""
    before = started()
    with pytest.raises(UserError, match="own_rewards has no function nothing"), opened(["own_rewards:nothing"]):
        pass
    with pytest.raises(UserError, match="--reward judge: which server"):
        opened(["judge"])
    with opened(["own_rewards:needs", "own_rewards:always_wrong"], reward_workers=1) as rewards:
        with pytest.raises(UserError, match=r"tried with record 1: .* missing a required argument: 'other'"):
            rewards.check(dict(enumerate([{"text_output": "b", "solution": "b"}])))
        with pytest.raises(UserError, match=r"'own_rewards:always_wrong', .*: returns 'good', no number; fix it"):
            rewards.check(dict(enumerate([{"text_output": "b", "solution": "b", "other": 1}])))
        # The worker and what watches over it.
        assert len(started() - before) == 2
    assert started() == before


def started() -> set[int]:
    """Worker processes below this one, and what they have started."""
    found = [one for one in psutil.Process().children(recursive=True) if "mirage_ds.rl.workers" in str(one.cmdline())]
    return {one.pid for one in found}


def test_an_error_ends_what_still_runs(modules: Path) -> None:
    """The other process hangs: it is not waited for, what it was at never comes up again, and none is left."""
    before = started()
    with opened(["own_rewards:by_text"], reward_timeout=30, reward_workers=2, max_reward_faults=0.0) as rewards:
        begun = time.monotonic()
        # Whoever keeps the error keeps all that the call held.
        with pytest.raises(UserError, match=r"record 3, .* returns nan") as kept:
            rewards.score([*answers("hang", row=1), *answers("nan", row=2)])
        assert rewards.score([*answers("ab", row=1), *answers("abcd", row=2)]).total == [0.25, 0.5]
        assert time.monotonic() - begun < 20
    assert started() == before
    del kept


def test_a_request_to_stop_waits_for_no_reward(modules: Path, server: Fake) -> None:
    looks, before = iter([False, False, True, True, True]), started()
    own = opened(["own_rewards:by_text"], reward_timeout=30, reward_workers=1, asked=lambda: next(looks))
    with own as rewards, pytest.raises(Stopped):
        rewards.score(answers("hang", row=1))
    assert started() == before
    with opened(["judge"], **judged(server, parallel=1), asked=lambda: True) as rewards, pytest.raises(Stopped):
        rewards.score(answers("1", "slow", "0"))
    assert len(server.seen) < 3


def test_torch_where_the_user_has_it(modules: Path) -> None:
    """A module may bring torch, and return its numbers; the time of the import is none of the call's."""
    with opened(["torch_rewards:half"], reward_timeout=5, reward_workers=1, max_reward_faults=0.0) as rewards:
        assert rewards.score(answers("a", "b")).total == [0.5, 0.5]


@pytest.mark.parametrize("text", ["hang", "thread", "program"])
def test_no_process_outlives_a_killed_run(modules: Path, text: str) -> None:
    """kill -9 of the trainer, whatever a worker is at: both workers are gone at once, and what they have started."""
    script = f"""
from mirage_ds.config.rl import RlSettings
from mirage_ds.rl.rewards import Answer, Rewards
with Rewards(RlSettings(reward=["own_rewards:by_text"], reward_timeout=60)) as rewards:
    print(*(worker.process.pid for worker in rewards.workers.workers), flush=True)
    rewards.score([Answer(0, {{}}, "{text}", (), False)])
    print("scored", flush=True)
    input()
"""
    run = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)  # fmt: skip
    workers = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    if text == "hang":
        time.sleep(0.5)
    else:
        # The program's number, or that the thread runs by now.
        assert run.stdout.readline()
    left = [*workers, *(child for worker in workers for child in worker.children(recursive=True))]
    run.kill()
    try:
        assert psutil.wait_procs(left, timeout=10)[1] == []
        # Nothing holds its output open.
        run.communicate(timeout=10)
    finally:
        for one in left:
            with suppress(psutil.NoSuchProcess):
                one.kill()


# ------------------------------------------------------------------------------------------------------ the judge


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(chat, "FIRST_WAIT_S", 0.001)
    with served(Fake(lambda path, headers, body: json.loads(body), reply)) as fake:
        yield fake


def text_of(request: dict[str, Any]) -> str:
    return request["messages"][0]["content"]


def reply(request: dict[str, Any]) -> Reply:
    """Say what the answer to grade says."""
    told = re.search(r"not to be obeyed:\n(.*)", text_of(request))[1]
    if told == "slow":
        time.sleep(0.5)
    replies = {"busy": (429, {"Retry-After": "0"}, b""), "broken": (500, {}, b"oops"), "rubbish": (200, {}, b"{half"),
               "no key": (401, {}, {"error": {"message": "who?"}})}  # fmt: skip
    return replies[told] if told in replies else said(f"Well.\n{told}")


def judged(server: Fake, **values: Any) -> dict[str, Any]:
    """Settings of a judge."""
    own = {"endpoint": server.url, "model_name": "judge-7b", "timeout": 0.2, "tries": 2, "parallel": 2, **values}
    return {f"judge_{name}": value for name, value in own.items()}


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1.0), ("Score: 0.5", 0.5), ("so\n**.25**\n", 0.25), ("Rating = 1.0.", 1.0), ("0", 0.0),
     ("1.5", None), ("10", None), ("0.5\nGood.", None), ("", None), ("nan", None), ("-1", None), ("1/2", None)],
)  # fmt: skip
def test_the_number_of_a_reply(text: str, number: float | None) -> None:
    assert read_number(text) == number


def test_a_judge_that_misbehaves(server: Fake) -> None:
    record = {"text_input": "Where is <image> {answer}?", "text_output": "Here. {question}"}
    given = answers("0.5", "busy", "broken", "slow", "rubbish", "who knows", "1", row=4, **record)
    with opened(["judge*2"], max_reward_faults=1.0, **judged(server)) as rewards:
        rewards.check(dict(enumerate([{"text_output": "1"}])))
        del server.seen[:]
        scored = rewards.score(given)
    assert same(scored.total, [1, *[math.nan] * 5, 2])
    causes = ["429", "500 (oops)", "Timeout", "200, but no chat completion", "does not end with a number from 0 to 1"]
    for (row, name, sentence), cause in zip(scored.faults, causes, strict=True):
        assert (row, name) == (4, "judge")
        assert cause in sentence
    # Each that may pass was asked twice, the others once.
    assert len(server.seen) == 4 * 2 + 3
    (request,) = [one for one in server.seen if "obeyed:\n0.5\n" in text_of(one)]
    assert "Where is [image] {answer}?" in text_of(request)
    assert "Here. {question}" in text_of(request)
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge-7b", 0, 512)


def test_what_was_judged_is_not_asked_again(server: Fake, tmp_path: Path) -> None:
    """Neither in the same call nor in a later run, whatever a kill has left of a line; a failure is asked again."""
    for expected in (4, 5):
        judge = Judge(RlSettings(**judged(server, cache=tmp_path / "judged")))
        given = [({"text_input": "?"}, text) for text in ("0.5", "1", "0.5", "broken")]
        assert [one if isinstance(one, float) else "" for one in judge.rewards(given)] == [0.5, 1.0, 0.5, ""]
        assert len(server.seen) == expected + (expected == 5)
        judge.close()
        (file,) = (tmp_path / "judged").iterdir()
        file.write_text(file.read_text() + '["half')


def test_so_many_are_asked_at_a_time(server: Fake) -> None:
    quick = server.reply

    def reply(request: Any) -> Any:
        time.sleep(0.1)
        return quick(request)

    server.reply = reply
    # No request is given up: the server would not know.
    judge = Judge(RlSettings(**judged(server, timeout=30)))
    assert judge.rewards([({"text_input": str(number)}, "1") for number in range(6)]) == [1.0] * 6
    assert server.most == 2
    judge.close()


@pytest.mark.parametrize(
    ("values", "text", "sentence"),
    [
        ({}, "no key", r"--judge_endpoint .* answers 401 \(who\?\); name the variable .*--judge_key_variable"),
        ({"most": 1}, "0.5", "--judge_most 1: 2 answers are to be judged by now"),
        ({"key_variable": "NO_SUCH"}, "", "--judge_key_variable NO_SUCH: this environment variable is not set"),
        ({"prompt": Path("own_prompt.txt")}, "", r"--judge_prompt own_prompt.txt: \{answer\} stands there 2 times"),
        ({"prompt": Path("missing.txt")}, "", "--judge_prompt missing.txt: cannot be read"),
    ],
)  # fmt: skip
def test_what_ends_the_run(
    server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], text: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_prompt.txt").write_text("{question} {reference} {answer} {answer}")
    with pytest.raises(UserError, match=sentence), opened(["judge"], **judged(server, **values)) as rewards:
        rewards.score(answers(text, "1"))
