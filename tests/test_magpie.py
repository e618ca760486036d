"""generate_data.py --source magpie on a tiny chat model that chatters at random, through each engine that runs here."""

import base64
import contextlib
import http.server
import json
import os
import shutil
import threading
import time
from importlib.util import find_spec
from urllib.parse import unquote

import pytest

from lib.core import artifact, cli
from lib.data import records
from lib.engines.llamacpp import LlamaCpp
from lib.gguf import writing
from tests.chat_templates import make_tokenizer
from tests.conftest import beside, call, killed, refused

FLAGS = ["--source", "magpie", "--samples", 30, "--max-instruction-tokens", 20, "--max-response-tokens", 16,
         "--response-temperature", 1, "--batch-size", 8, "--threads", 1, "--checkpoint-interval", 4]  # fmt: skip


def flags(model, folder, *more):
    return [*FLAGS, "--model", model, "--output", folder / "raw", "--run-dir", folder / "run", *more]


def texts(folder) -> dict:
    """{id: (instruction, response)}"""
    rows = [row for split in records.SPLITS for row in records.load_split(folder / "raw", split)]
    return {row["id"]: (row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows}


@pytest.fixture(scope="module")
def made(talker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("magpie")
    done = call("generate_data", *flags(talker, folder))
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def talker_gguf(talker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    writing.write_model(talker, folder / "model.gguf", "f16")
    return folder


def test_rows_are_as_many_as_asked_for_whole_and_told_apart_from_the_dropped(made):
    meta = artifact.read(made / "raw", "data")
    metrics, rows = meta["metrics"], texts(made)
    assert len(rows) == sum(metrics[split] for split in records.SPLITS) == 30 and metrics["documents"] == 0
    assert not any("<|" in text or not text for pair in rows.values() for text in pair)
    assert metrics["dropped_instructions"]["without an end of turn"] > 0
    assert metrics["dropped_responses"]["without an end"] > 0
    assert max(int(name.removeprefix("magpie-")) for name in rows) + 1 >= 30 + sum(
        metrics["dropped_responses"].values()
    )
    assert metrics["engine"] == "transformers" and set(meta["inputs"]) == {"model"}
    assert meta["expected_memory_bytes"] > 3e8
    assert {event["stage"] for event in metrics["history"]} == {"instructions", "responses"}
    assert beside(made / "run") == ["log.jsonl"]


def test_batches_change_no_row_and_more_samples_keep_those_there_are(made, talker, tmp_path):
    done = call("generate_data", *flags(talker, tmp_path, "--batch-size", 3, "--samples", 36))
    assert done.code == 0, done.err
    more, fewer = texts(tmp_path), texts(made)
    assert len(more) == 36 and {name: more[name] for name in fewer} == fewer


def test_killed_it_continues_with_the_same_rows(made, talker, tmp_path):
    argv = flags(talker, tmp_path)
    kept = killed("generate_data", argv, tmp_path / "run" / "responses.jsonl", 9)
    assert not (tmp_path / "raw").exists()
    done = call("generate_data", *argv)
    assert done.code == 0, done.err
    assert f"{kept}/30" in done.err and "instructions:   0%" not in done.err  # it goes on from there
    assert texts(tmp_path) == texts(made)


@pytest.mark.slow
def test_what_a_kill_left_out_between_others_is_drawn_before_later_ones(made, talker, tmp_path):
    """Short texts of a batch are on the disk before long ones of lower numbers."""
    longer, argv = tmp_path / "longer", flags(talker, tmp_path)
    killed("generate_data", flags(talker, longer, "--samples", 90), longer / "run" / "responses.jsonl", 1)
    killed("generate_data", argv, tmp_path / "run" / "responses.jsonl", 1)
    lines = (longer / "run" / "instructions.jsonl").read_text().splitlines(keepends=True)
    first = next(line for line in lines if not json.loads(line)["dropped"])
    (tmp_path / "run" / "instructions.jsonl").write_text("".join(line for line in lines if line != first))
    assert call("generate_data", *argv).code == 0
    assert texts(tmp_path) == texts(made)


@pytest.mark.slow
def test_batches_that_run_out_of_memory_lose_no_row(made, talker, tmp_path, monkeypatch):
    import torch

    from lib.engines import batching

    real, largest = batching.Batch.step, []

    def step(held, tokens):
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        largest.append(len(tokens))
        return real(held, tokens)

    monkeypatch.setattr(batching.Batch, "step", step)
    done = call("generate_data", *flags(talker, tmp_path))
    assert done.code == 0, done.err
    assert "out of memory at batch size 8; continuing with batch size 4" in done.err and max(largest) <= 3
    assert texts(tmp_path) == texts(made)


def test_where_not_even_one_row_fits_the_rows_that_are_done_are_kept(talker, tmp_path, monkeypatch):
    import torch

    from lib.engines import batching

    real, steps = batching.Batch.step, []

    def step(held, tokens):
        steps.append(len(tokens))
        if len(steps) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(held, tokens)

    monkeypatch.setattr(batching.Batch, "step", step)
    done = call("generate_data", *flags(talker, tmp_path))
    assert done.code == 3 and "Traceback" not in done.err
    kept = (tmp_path / "run" / "instructions.jsonl").read_text().count("\n")
    assert kept > 4 and f"{kept} instructions are finished and saved in {tmp_path / 'run'}" in done.err


@pytest.mark.slow
def test_a_teacher_responds_in_the_models_place(made, talker, tmp_path):
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(talker, tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(talker)
    with torch.no_grad():
        teacher.lm_head.weight[ord("a") - 64 + 3 :, 0] = -9  # of a few tokens only
    teacher.save_pretrained(tmp_path / "teacher")
    done = call("generate_data", *flags(talker, tmp_path, "--teacher", tmp_path / "teacher"))
    assert done.code == 0, done.err
    ours, theirs = texts(made), texts(tmp_path)
    both = ours.keys() & theirs.keys()
    assert len(both) >= 5 and all(ours[name][0] == theirs[name][0] for name in both)
    assert all(ours[name][1] != theirs[name][1] for name in both)
    assert set(artifact.read(tmp_path / "raw")["inputs"]) == {"model", "teacher"}


def test_llama_cpp_draws_from_a_gguf(talker_gguf, tmp_path):
    done = call("generate_data", *flags(talker_gguf, tmp_path))
    assert done.code == 0, done.err
    metrics = artifact.read(tmp_path / "raw")["metrics"]
    assert metrics["engine"] == "llama.cpp" and len(texts(tmp_path)) == 30
    assert metrics["dropped_instructions"]["without an end of turn"] > 0


# --- models that cannot do it -------------------------------------------------------------------------------


def test_a_model_whose_texts_never_end_is_refused_early(base, tmp_path):
    done = call("generate_data", *flags(base, tmp_path, "--samples", 5000))
    refused(done, "writes no instructions", "16 texts", "without an end of turn")
    assert not (tmp_path / "raw").exists()


def test_a_base_model_is_refused(talker, plain, base, tmp_path):
    (plain / "chat_template.jinja").unlink()
    refused(call("generate_data", *flags(plain, tmp_path)), "no chat template")
    done = call("fetch_base", "--model", plain, "--output", tmp_path / "base")
    assert done.code == 0, done.err
    refused(call("generate_data", *flags(tmp_path / "base", tmp_path)), "is not a chat model")


def test_a_model_whose_responses_never_end_is_refused_after_the_first_round(talker, base, tmp_path):
    done = call("generate_data", *flags(talker, tmp_path, "--teacher", base))
    refused(done, "only 0 of 30 responses are complete", "--max-response-tokens (now 16)")


def test_flags_that_do_not_go_together_are_refused(talker, tmp_path):
    topics = tmp_path / "topics.txt"
    topics.write_text("\n \n")
    output = ["--output", tmp_path / "raw"]
    refused(call("generate_data", "--source", "magpie", *output), "needs --model")
    for more, words in {
        ("--engine", "openai"): ["--base-url"],
        ("--base-url", "http://127.0.0.1:1/v1"): ["--engine openai"],
        ("--topics", topics): ["is empty"],
        ("--topics", tmp_path / "gone"): ["is not a file"],
        ("--topics", topics, "--system", "Be brief."): ["{topic}"],
        ("--engine", "llamacpp"): ["needs a GGUF file"],
        ("--max-response-tokens", 4000): ["more than its context of 2,048"],
        ("--engine", "openai", "--base-url", "x", "--api-key-env", "NO_SUCH_KEY"): ["NO_SUCH_KEY"],
    }.items():
        refused(call("generate_data", *flags(talker, tmp_path, *more)), *words)
    assert not (tmp_path / "raw").exists()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_said(talker, tmp_path):
    refused(call("generate_data", *flags(talker, tmp_path, "--engine", "vllm")), "the package vllm is not installed")


def test_topics_take_turns_in_the_system_turn(talker, tmp_path):
    import generate_data

    (tmp_path / "topics.txt").write_text("rivers\n\nmountains\n")
    argv = flags(talker, tmp_path, "--topics", tmp_path / "topics.txt", "--system", "Ask about {topic}.")
    args = cli.parse(generate_data.make_parser(), list(map(str, argv)))
    assert generate_data.list_system_prompts(args) == ["Ask about rivers.", "Ask about mountains."]
    done = call("generate_data", *argv)
    assert done.code == 0 and "Ask about rivers." in done.out, done.err
    assert "topics" in artifact.read(tmp_path / "raw")["inputs"]


# --- servers ------------------------------------------------------------------------------------------------


def server_flags(url, talker, folder, *more):
    return flags(talker, folder, "--engine", "openai", "--base-url", url, "--timeout", 0.5, "--retries", 1, *more)


def test_an_openai_compatible_server_draws(talker, talker_gguf, tmp_path, monkeypatch):
    """llama.cpp's own, which has the same template; a proxy in the environment is not asked for a loopback address."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    engine = LlamaCpp(talker_gguf / "model.gguf", context=256, parallel=4, threads=1)
    monkeypatch.setenv("A_KEY", engine.key)
    argv = ["--timeout", 60, "--api-key-env", "A_KEY"]
    try:
        done = call("generate_data", *server_flags(f"http://{engine.address}/v1", talker, tmp_path, *argv))
    finally:
        engine.close()
    assert done.code == 0, done.err
    metrics = artifact.read(tmp_path / "raw")["metrics"]
    assert metrics["engine"] == "openai" and len(texts(tmp_path)) == 30
    assert metrics["dropped_responses"]["without an end"] > 0
    assert metrics["dropped_instructions"]["without an end of turn"] > 0
    assert metrics["response_tokens"] > 100


@pytest.fixture
def server():
    """A server that answers as it should, until `fail` is set: then what that says. It notes what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, {"data": [{"id": "served"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.asked.append((self.path, self.headers.get("Authorization"), asked))
            status, body = made.fail(len(made.asked)) or (200, None)
            words = {"usage": {"completion_tokens": 3}}
            text = f"instruction {len(made.asked)}"
            words["choices"] = [{"text": text, "message": {"content": text}, "finish_reason": "stop"}]
            self.answer(status, words if body is None else body)

        def answer(self, status, body):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            with contextlib.suppress(BrokenPipeError):  # the one who asked has given up
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.asked, made.fail = [], lambda n: None
    made.url = f"http://127.0.0.1:{made.server_port}/v1"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def hang(_):
    time.sleep(2)


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (lambda n: (500, b"it broke"), ["HTTP 500", "it broke", "tried 2 times"]),
        (lambda n: (200, b"<html>no model here"), ["not the response of an OpenAI-compatible server", "no model here"]),
        (lambda n: (200, b'{"choices": []}'), ["not the response of an OpenAI-compatible server"]),
        (lambda n: (200, b'{"choices": [{"text": null, "finish_reason": "stop"}]}'), ["not the response of an OpenAI"]),
        (lambda n: (401, b"who are you?"), ["the server rejected the request", "HTTP 401"]),
        (lambda n: (302, b""), ["the server rejected the request", "HTTP 302"]),
        (hang, ["no answer in 0.5 seconds"]),
    ],
    ids=["500", "html", "empty", "null", "401", "redirect", "hangs"],
)
def test_a_server_that_fails_is_said_and_what_was_written_is_kept(server, talker, tmp_path, fail, words):
    server.fail = lambda n: fail(n) if n > 12 else None
    done = call("generate_data", *server_flags(server.url, talker, tmp_path, "--batch-size", 2))
    refused(done, *words, "are finished and saved in")
    kept = (tmp_path / "run" / "instructions.jsonl").read_text().splitlines()
    assert f"{len(kept)} instructions are finished" in done.err and len(kept) >= 11
    server.fail = lambda n: None
    done = call("generate_data", *server_flags(server.url, talker, tmp_path, "--batch-size", 2))
    assert done.code == 0, done.err
    assert len(texts(tmp_path)) == 30


def test_a_server_is_asked_as_one_should_and_what_passes_is_repeated(server, talker, tmp_path, monkeypatch):
    server.fail = lambda n: (429, b"slow down") if n == 5 else (503, b"") if n == 9 else None
    monkeypatch.setenv("A_KEY", "very-secret")
    done = call(
        "generate_data", *server_flags(server.url, talker, tmp_path, "--api-key-env", "A_KEY", "--batch-size", 1)
    )
    assert done.code == 0, done.err
    assert len(server.asked) == 65 and {key for _, key, _ in server.asked} == {"Bearer very-secret"}
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert "very-secret" not in done.out + done.err and b"very-secret" not in written
    (path, _, first), (last_path, _, last) = server.asked[0], server.asked[-1]
    assert path == "/v1/completions" and last_path == "/v1/chat/completions"
    assert first["prompt"] == "<|im_start|>user\n" and first["stop"] == ["<|im_end|>"] and first["model"] == "served"
    assert first["stop_token_ids"] == [2] and "stop_token_ids" not in last
    assert (first["temperature"], first["top_p"], first["max_tokens"], last["temperature"]) == (1.0, 0.95, 20, 1.0)
    assert last["messages"][0]["role"] == "user"
    seeds = [asked["seed"] for _, _, asked in server.asked]
    assert len(set(seeds)) == 63


def find_text(text: str, done, folder) -> bool:
    """Whether a text was printed or stands in a file."""
    written = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    return text in done.out + done.err or text.encode() in written


@pytest.mark.parametrize("login", ["user:CANARY", "CANARY", "user:p%40CANARY%2F", "user:p@ss:CANARY", ":CANARY"])
def test_a_password_in_the_url_is_sent_and_nowhere_written(server, talker, tmp_path, login):
    url = server.url.replace("//", f"//{login}@")
    server.fail = lambda n: (500, b"it broke") if n > 12 else None
    failed = call("generate_data", *server_flags(url, talker, tmp_path, "--batch-size", 2))
    refused(failed, "HTTP 500")
    assert (tmp_path / "run" / "run.json").is_file() and not find_text("CANARY", failed, tmp_path)
    server.fail = lambda n: None
    done = call("generate_data", *server_flags(url, talker, tmp_path, "--batch-size", 2))
    assert done.code == 0 and not find_text("CANARY", done, tmp_path), done.err
    meta = artifact.read(tmp_path / "raw")
    assert meta["arguments"]["base_url"] == server.url and "//***@" in meta["command"]
    user, _, password = map(unquote, login.partition(":"))
    (sent,) = {header for _, header, _ in server.asked}
    assert base64.b64decode(sent.removeprefix("Basic ")).decode() == f"{user}:{password}"


def test_a_password_may_be_in_the_environment(server, talker, tmp_path, monkeypatch):
    monkeypatch.setenv("A_LOGIN", "user:CANARY")
    argv = server_flags(server.url, talker, tmp_path, "--api-key-env", "A_LOGIN")
    done = call("generate_data", *argv)
    assert done.code == 0 and not find_text("CANARY", done, tmp_path), done.err
    assert {header for _, header, _ in server.asked} == {"Basic " + base64.b64encode(b"user:CANARY").decode()}
    refused(call("generate_data", *argv, "--base-url", server.url.replace("//", "//user:x@")), "one of them")


@pytest.mark.parametrize("flag", ["--base-url", "--served-model", "--teacher", "--model", "--source", "--no"])
def test_a_password_in_any_flag_is_not_printed(talker, tmp_path, flag):
    for url in ("http://user:CANARY@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?token=CANARY", "hf_CANARYCANARYCANARY"):
        argv = server_flags("http://127.0.0.1:9/v1", talker, tmp_path, "--retries", 0, flag, url)
        done = call("generate_data", *argv)
        assert done.code == 2 and not find_text("CANARY", done, tmp_path), done.err
    done = call("generate_data", *server_flags("http://x", talker, tmp_path, "--api-key-env", "sk-CANARY"))
    refused(done, "expected the name of an environment variable")
    assert not find_text("CANARY", done, tmp_path)


def test_a_server_that_runs_past_the_end_of_a_turn_is_refused(server, talker, tmp_path):
    shutil.copytree(talker, tmp_path / "model")
    make_tokenizer("mistral0.3").save_pretrained(tmp_path / "model")
    choices = [{"text": "a river a river", "finish_reason": "length"}]
    server.fail = lambda n: (200, {"choices": choices, "usage": {"completion_tokens": 2}})
    done = call("generate_data", *server_flags(server.url, tmp_path / "model", tmp_path))
    refused(done, "this server does not stop at '[/INST]'", "stop_token_ids")
    ((_, _, asked),) = server.asked
    assert list(asked["logit_bias"]) == [str(token) for token in asked["stop_token_ids"]]
    server.fail = lambda n: None
    done = call("generate_data", *server_flags(server.url, tmp_path / "model", tmp_path))
    assert done.code == 0, done.err


def test_a_server_that_is_not_there_is_refused_at_once(talker, tmp_path):
    done = call("generate_data", *server_flags("http://127.0.0.1:9/v1", talker, tmp_path, "--retries", 0))
    refused(done, "no answer", "127.0.0.1:9")
    refused(call("generate_data", *server_flags("not a url", talker, tmp_path)), "--base-url")
    assert os.listdir(tmp_path / "run")
