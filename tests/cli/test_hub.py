"""Archives by name: those of the hub, on a small server of our own, and those in the box."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import mendkit
from mendkit import places
from mendkit.__main__ import main
from mendkit.errors import ArchiveError
from mendkit.hparams import MENDHyperParams
from mendkit.places import archive_file
from tests.oracles.tiny import save_tiny, tiny_gpt2, tiny_llama

COMMIT = "c" * 40
FACT = ["--prompt", "The capital of France is", "--target", "Lima", "--max-new-tokens", "2"]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as one push and one download need."""

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            hub.created = json.loads(body)
            self.answer({"url": f"{hub.address}/me/edits"})
        elif self.path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            for file in files:
                file |= {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = b64decode(value["content"])
            self.answer(
                {
                    "commitUrl": f"{hub.address}/me/edits/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "hookOutput": "",
                }
            )
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, found = self.server, re.fullmatch(r"/me/edits/resolve/(main|v1)/(.+)", self.path)
        if not found or found[2] not in hub.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = hub.files[found[2]]
        start = int(re.findall(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            hub.starts.append(start)
            breaks_off = len(hub.starts) == 1  # the first download
            self.wfile.write(content[start : len(content) // 2 if breaks_off else None])

    def answer(self, values: dict) -> None:
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.starts = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# the client keeps what it has in chunks of 10 MB
SMALL_CHUNKS = (
    "import sys, huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 1000; "
    "from mendkit.__main__ import main; sys.exit(main())"
)


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {"PATH": os.environ["PATH"], "HF_HOME": str(Path("hf").resolve()), "HF_TOKEN": "x"}
    kept |= {"PYTHONPATH": str(Path(mendkit.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", SMALL_CHUNKS, *words],
        capture_output=True,
        text=True,
        env=kept | environment,
        timeout=120,
    )


def test_an_archive_goes_to_the_hub_and_comes_back_though_the_line_breaks(here, hub, capsys):
    # 1. There, with its card.
    about, online = mendkit.inspect_archive("archive.safetensors"), {"HF_ENDPOINT": hub.address}
    scores = {"single.edit_success": 0.75, "single.edit_success.n": 4}
    Path("results.json").write_text(json.dumps(scores))
    words = ["push", "archive.safetensors", "me/edits", "--private", "--license", "mit"]
    done = run(*words, "--results", "results.json", **online)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/me/edits" and "private" in hub.created.values()
    assert (hub.created["organization"], hub.created["name"]) == ("me", "edits")
    assert hub.files["archive.safetensors"] == Path("archive.safetensors").read_bytes()
    text = hub.files["README.md"].decode()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "mit" and header["library_name"] == "mendkit"
    for part in ("single.edit_success | 0.750 |  | 4 |", about["base_model"]["sites_sha256"]):
        assert part in text
    # the card's settings are those of the archive
    told = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert MENDHyperParams(**told).to_dict() == MENDHyperParams(**about["hparams"]).to_dict()
    # 2. Back: the first download breaks off in the middle, and goes on from there.
    for revision in ("", "@v1"):
        done = run("inspect", f"hub:me/edits{revision}", "--json", **online)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sha256"] == about["sha256"]
    assert hub.starts[0] == 0 and hub.starts[1] > 1000 and len(hub.starts) == 2
    # 3. Without a network what is there is found, and another name is one clear error.
    edit = run("edit", "tiny.yaml", "archive=hub:me/edits", *FACT, HF_HUB_OFFLINE="1")
    assert edit.returncode == 0, edit.stderr
    for offline in ({"HF_HUB_OFFLINE": "1"}, online):
        done = run("edit", "tiny.yaml", "archive=hub:me/other", *FACT, **offline)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: hub:me/other: no archive could be")
        assert "HF_HUB_OFFLINE" in done.stderr


def test_push_without_a_network_is_one_clear_error(here):
    done = run("push", "archive.safetensors", "me/edits", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: cannot push to me/edits: ")


@pytest.fixture
def box(here, monkeypatch) -> Path:
    """The kit with an archive named `mine` in it."""
    monkeypatch.setattr(places, "ARCHIVES", here / "box")
    Path("box").mkdir()
    return Path(shutil.copy("archive.safetensors", "box/mine.safetensors")).resolve()


def test_an_archive_of_the_kit_has_a_name_that_a_file_here_may_take(box, here, capsys):
    assert archive_file("mine") == box
    assert main(["edit", "tiny.yaml", "archive=mine", *FACT]) == 0
    for words in (["mine"], ["archive=mine"]):
        assert main(["inspect", *words, "--json"]) == 0
    Path("mine").mkdir()  # a folder without an archive, such as the model's
    assert archive_file("mine") == box
    shutil.copy("archive.safetensors", "mine")
    assert archive_file("mine") == Path("mine/archive.safetensors")
    shutil.rmtree("mine")
    Path("mine").write_text("x")
    assert archive_file("mine") == Path("mine")
    assert archive_file("./mine") == Path("mine")
    with pytest.raises(ArchiveError, match="not a readable archive"):
        mendkit.inspect_archive("mine")


def test_it_is_refused_for_another_model_and_named_where_there_is_none(box, here, capsys):
    other = save_tiny("other", tiny_llama(seed=5))
    assert main(["edit", "tiny.yaml", f"model_name={other}", "archive=mine", *FACT]) == 2
    assert "trained for another model (model) than other: other weights" in capsys.readouterr().err
    other = save_tiny("gpt2", tiny_gpt2())  # has no layer of that name either
    assert main(["edit", "tiny.yaml", f"model_name={other}", "archive=mine", *FACT]) == 2
    assert "than gpt2: class LlamaForCausalLM, here GPT2LMHeadModel" in capsys.readouterr().err
    for i, name in enumerate(("old", "new")):
        Path(f"runs/{name}").mkdir(parents=True)
        os.utime(shutil.copy("archive.safetensors", f"runs/{name}"), (i, i))
    there = "; here are runs/new/archive.safetensors, runs/old/archive.safetensors, mine"
    for archive in ("null", "nowhere"):
        assert main(["edit", "tiny.yaml", f"archive={archive}", *FACT]) == 2
        assert there in capsys.readouterr().err
