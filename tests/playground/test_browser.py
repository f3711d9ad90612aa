"""The playground in Debian's Chromium, driven by Playwright, on JupyterLab and on Voilà."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest

from mendkit.mend.archive import save_archive
from tests.oracles.claims import editor_for
from tests.oracles.tiny import save_tiny, tiny_llama

playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed; `make test-browser` does that"
)
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="Chromium is not installed; `make test-browser` does that"
    ),
]
ROOT = Path(__file__).parents[2]
NOTEBOOK = "06_playground.ipynb"
TOKEN = "browser"
FIRST_ANSWER = 180  # seconds; a busy machine starts servers and kernels slowly
PANEL = ".mendkit:has(button)"  # not the snapshot
ANSWER = "<b id=x>Lyon</b>"
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false"},  # which would ask whether it may
    "notebook-extension/tracker": {
        "windowingMode": "none"
    },  # else cells out of sight are not there
}
VOILA = next(
    line
    for line in (ROOT / "Makefile").read_text().replace("\\\n", "").splitlines()
    if "-m voila" in line
)
SERVERS = {
    "jupyterlab": (["jupyterlab", f"--IdentityProvider.token={TOKEN}"], f"lab/tree/{NOTEBOOK}"),
    "voila": (["voila", "--Voila.ip=127.0.0.1", *VOILA.split()[3:-1], NOTEBOOK], ""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The notebook, set to a tiny model with an archive."""
    folder, base = tmp_path_factory.mktemp("playground"), tiny_llama()
    archive = save_archive(folder / "runs/tiny/archive.safetensors", base, editor_for(base).mend)
    parameters = {
        "config": str(ROOT / "configs/smollm2-135m.yaml"),
        "overrides": [f"model_name={save_tiny(folder / 'model', base)}"],
        "archive": str(archive),
        "facts": 4,
        "strengths": [1],
        "out": str(folder / "out"),
    }
    for name, value in SETTINGS.items():
        file = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(value))
    notebook = nbformat.read(ROOT / "notebooks" / NOTEBOOK, as_version=4)
    given = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(4, nbformat.v4.new_code_cell(given))  # after the parameters
    nbformat.write(notebook, folder / NOTEBOOK)
    return folder


@pytest.fixture(params=SERVERS)
def page(request, folder) -> Iterator["playwright.Page"]:
    """A page on the running notebook; afterwards its console must hold no error."""
    command, path = SERVERS[request.param]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *command, "--no-browser", f"--port={port}"]
    command += ["--allow-root"] * (request.param == "jupyterlab")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    env["JUPYTERLAB_SETTINGS_DIR"] = str(folder / "settings")
    log, errors = folder / f"{request.param}.log", []
    with log.open("wb") as file, playwright.sync_playwright() as driver:
        server = subprocess.Popen(
            command, cwd=folder, env=env, stdout=file, stderr=file, start_new_session=True
        )
        try:
            wait_for(
                f"http://127.0.0.1:{port}/{'api' if request.param == 'jupyterlab' else 'static/'}",
                server,
                log,
            )
            playwright.expect.set_options(timeout=FIRST_ANSWER * 1000)
            browser = driver.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 1400})
            page.set_default_timeout(FIRST_ANSWER * 1000)
            page.route(
                lambda url: "127.0.0.1" not in url, lambda asked: asked.fulfill(status=200, body="")
            )
            page.on(
                "console", lambda said: errors.append(said.text) if said.type == "error" else None
            )
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}/{path}?token={TOKEN}")
            if request.param == "jupyterlab":
                run_all(page)
            yield page
            page.locator(PANEL).first.screenshot(path=folder / f"{request.param}.png")
            browser.close()
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    assert errors == []


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server answers, whatever it says."""
    deadline = time.monotonic() + FIRST_ANSWER
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urlopen(address, timeout=5).close()
            return
        except OSError as error:
            if hasattr(error, "code"):  # it answered
                return
            time.sleep(0.3)
    raise AssertionError(f"no answer: {log.read_text(errors='replace')[-2000:]}")


def run_all(page: "playwright.Page") -> None:
    """By JupyterLab's menu, once there is a kernel."""
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def test_one_can_apply_scale_undo_and_is_told_of_mistakes(page, folder):
    """By mouse and keyboard, as a user would."""
    panel, said = page.locator(PANEL).first, page.locator(".mendkit-said[role]").first
    edits = panel.locator("select[multiple] option, select[size] option")
    in_lab = "/lab" in page.url
    own = 2 if in_lab else 1  # the notebook's edits; Voilà shows the panel alone
    playwright.expect(edits).to_have_count(own)
    assert (page.get_by_role("heading", name="The same by code").count() > 0) == in_lab
    assert panel.get_by_label("prompt", exact=True).input_value() == "The capital of France is"
    panel.get_by_label("new answer").fill(ANSWER)
    panel.get_by_role("button", name="Apply edit").click()
    playwright.expect(said).to_have_text("Applied.")
    playwright.expect(edits).to_have_count(own + 1)
    playwright.expect(panel.locator("table").get_by_text(ANSWER).first).to_be_visible()  # as text
    assert page.locator("#x").count() == 0

    figure = panel.locator("img")
    before = figure.get_attribute("src")
    panel.get_by_role("slider").press("End")
    playwright.expect(panel.get_by_text("3.00")).to_be_visible()
    playwright.expect(figure).not_to_have_attribute("src", before)

    panel.get_by_role("button", name="Undo").click()
    playwright.expect(panel.get_by_role("button", name="Re-apply")).to_be_visible()
    playwright.expect(said).to_have_text("Undone: it stays in the journal.")
    edits.nth(0).click()
    playwright.expect(said).to_have_text("")  # before, buttons are for the edit shown till now
    panel.get_by_role("button", name="Drop").click()
    playwright.expect(edits).to_have_count(own)
    edits.nth(own - 1).click()
    panel.get_by_role("button", name="Re-apply").click()
    playwright.expect(said).to_have_text("In force again.")

    panel.get_by_label("adapter folder").fill(str(folder / "adapter"))
    panel.get_by_role("button", name="Save adapter").click()
    playwright.expect(said).to_contain_text(f"{own} fact(s) in force saved")
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    panel.get_by_label("new answer").fill(" ")
    panel.get_by_role("button", name="Apply edit").click()
    playwright.expect(page.get_by_role("alert")).to_contain_text("no token to predict")
