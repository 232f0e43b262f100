"""What the site's tests share: the pages of the built site, a server for them, a browser, and a site of one page.

That page may have an interactive figure: `live_page`.
"""

import contextlib
import io
import os
import shutil
from pathlib import Path

import pytest
from documents import ROOT, SITE, base_of, read_site
from drawing.pages import STORE, normal
from drawing.store import Store
from snippets import reading

ASSETS = ROOT / "docs" / "assets"


@pytest.fixture(scope="session")
def pages():
    if not SITE.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("site checks skipped: no site/; run `nox -s docs`")
    return read_site(SITE)


# The site as a host would serve it: its own 404 page, and the path it is published under. It is run in a process of its
# own, on a free port, so that a server that hangs is ended with its test.
SERVER = """
    import functools, http.server, sys
    from pathlib import Path

    folder, base = sys.argv[1:]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            return super().translate_path("/" + path.removeprefix(base))

        def send_error(self, code, message=None, explain=None):
            page = Path(self.directory, "404.html")
            if code != 404 or not page.is_file():
                return super().send_error(code, message, explain)
            body = page.read_bytes()
            self.send_response(404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    print("port", server.server_port, flush=True)
    server.serve_forever()
"""


@pytest.fixture(scope="session")
def serve(a_server_of_its_own):
    """A context manager: the address of a server of this folder."""

    @contextlib.contextmanager
    def serving(folder: Path, base: str = "/"):
        with a_server_of_its_own(SERVER, folder, base, ready=r"port (\d+)\n") as found:
            yield f"http://127.0.0.1:{found[1]}{base}"

    return serving


@pytest.fixture(scope="module")
def browser():
    def without(what):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"browser checks skipped: {what}")

    program = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not program:
        without("no Chromium; apt install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("no playwright; pip install playwright")
    quiet = [
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ]
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=program, args=quiet, timeout=60_000)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def site(serve, pages):
    with serve(SITE, base_of(pages)) as address:
        yield address


@pytest.fixture
def home(browser, site):
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.goto(site)
    yield page
    context.close()


PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>t</title><link rel="icon" href="data:,"></head>'
    '<body><main><h1 id="top">t</h1>{}</main></body></html>'
)


@pytest.fixture
def small(tmp_path):
    """A site of one page with the given body."""

    def make(body, **files):
        (tmp_path / "index.html").write_text(PAGE.format(body), encoding="utf-8")
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text, encoding="utf-8")
        return tmp_path

    return make


@pytest.fixture
def live_page(browser, serve, small):
    """A function that serves a page with an interactive figure, and gives another that opens the page.

        opened = live_page(figures.live(...), styled=True)
        page = opened(width=1440)

    `styled` gives the page the site's style sheet and size of type. It is opened in a window of its own, and given once
    the figure is alive; with scripts=False it stays a drawing.
    """
    with contextlib.ExitStack() as stack:

        def serving(figure, *, styled=False):
            if styled:
                look = '<style>html { font-size: 125% }</style><link rel="stylesheet" href="assets/css/shell.css">'
                figure = f'{look}<div class="md-typeset">{figure}</div>'
            folder = small(figure + '<script type="module" src="assets/js/live/start.js"></script>')
            for name in ("css/shell.css", *(f"js/live/{file.name}" for file in (ASSETS / "js/live").iterdir())):
                (folder / "assets" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ASSETS / name, folder / "assets" / name)
            address = stack.enter_context(serve(folder))

            def opened(width=390, *, scripts=True):
                context = browser.new_context(viewport={"width": width, "height": 844}, java_script_enabled=scripts)
                stack.callback(context.close)
                context.set_default_timeout(30_000)
                page = context.new_page()
                page.goto(address)
                if scripts:
                    page.wait_for_selector("figure.alive")
                return page

            return opened

        yield serving


@pytest.fixture(scope="module")
def figure_in():
    """A function: the figure of this script as the page's own code prints it; taken from the build where it drew it."""
    store = Store(ROOT / STORE, ROOT)

    def printed(page, script):
        (fence,) = (fence for fence in reading.fences(page) if f'script="{script}"' in fence.code)
        if kept := store.get(normal(fence.code)):
            return kept.output
        out = io.StringIO()
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
            exec(compile(fence.code, str(page), "exec"), {"__name__": "fence"})
        return out.getvalue()

    return printed
