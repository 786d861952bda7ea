"""Open the pages that `asv publish` wrote in a headless browser, and picture a benchmark's graph.

    python -m asv_bench.pages kernels.Activations.time_array --picture asv.png

Needs ``pip install playwright`` and a Chromium: its own (``playwright install chromium``) or the system's. Exit status
0: the graph is there; 1: it is not; 2: there is no browser, or the pages' scripts cannot be had. asv's pages load these
from the web: where that cannot be reached, ``--scripts`` is the folder node_modules after

    npm install jquery@3.3.1 flot@0.8.3 flot-orderbars@1.0.0 stupid-table-plugin@1.1.3
    npm install blueimp-md5@2.19.0 bootstrap@3.1.1
"""

import argparse
import functools
import re
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# What the names of files on the web end with, and where npm puts them.
FILES = {
    r"jquery-[\d.]+\.min\.js": "jquery/dist/jquery.min.js",
    r"jquery\.flot(\.(?!min)\w+)?(\.min)?\.js": r"flot/jquery.flot\1.js",
    r"jquery\.flot\.orderBars\.js": "flot-orderbars/js/jquery.flot.orderBars.js",
    r"stupidtable\.min\.js": "stupid-table-plugin/stupidtable.min.js",
    r"md5\.min\.js": "blueimp-md5/js/md5.min.js",
    r"bootstrap\.min\.js": "bootstrap/dist/js/bootstrap.min.js",
    r"bootstrap\.min\.css": "bootstrap/dist/css/bootstrap.min.css",
}
GRAPH = "#main-graph canvas.flot-base"
SECONDS = 30


class NoBrowser(Exception):
    """There is no browser, or what the pages need cannot be had."""


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format, *arguments):
        pass


def script(folder, url):
    """The file in npm's folder for a script on the web, or None."""
    name = url.partition("?")[0].rpartition("/")[2]
    for pattern in sorted(FILES, key=len, reverse=True):
        if match := re.fullmatch(pattern, name):
            file = Path(folder) / match.expand(FILES[pattern])
            if file.exists():
                return file
    return None


def serve_scripts(page, html, folder):
    """Answer for the web from npm's folder; the page's checksums are those of other builds of the same versions."""
    index = re.sub(r'\s(integrity|crossorigin)="[^"]*"', "", (html / "index.html").read_text())

    def answer(route):
        url = route.request.url.partition("#")[0]
        if re.fullmatch(r"http://127\.0\.0\.1:\d+/(index\.html)?", url):
            route.fulfill(body=index, content_type="text/html")
        elif url.startswith("http://127.0.0.1"):
            route.continue_()
        elif file := script(folder, url):
            route.fulfill(path=file)
        else:
            route.abort()

    page.route("**/*", answer)


def launch(playwright):
    """Playwright's Chromium or, where it is not installed, the system's."""
    from playwright.sync_api import Error

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = [None, *filter(None, map(shutil.which, names))]
    for path in found:
        try:
            return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            last = error
    raise NoBrowser(f"no Chromium could be started: {str(last).splitlines()[0]}")


def open_graph(html, benchmark, picture=None, scripts=None):
    """The number of points in a benchmark's graph, as the page has drawn it."""
    try:
        from playwright.sync_api import TimeoutError as TooLong
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise NoBrowser(str(error)) from None
    html = Path(html).resolve()
    if not (html / "index.html").exists():
        raise FileNotFoundError(f"{html}: expected what asv publish writes")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as playwright:
            browser = launch(playwright)
            page = browser.new_page(viewport={"width": 1000, "height": 560})
            if scripts is not None:
                serve_scripts(page, html, scripts)
            page.goto(f"http://127.0.0.1:{server.server_port}/#{benchmark}", wait_until="commit")
            try:
                page.wait_for_function(f"document.querySelector({GRAPH!r}) || location.pathname == '/error.html'")
            except TooLong:
                return 0
            if page.url.endswith("error.html"):
                raise NoBrowser("the pages' scripts cannot be reached: see --scripts")
            page.wait_for_timeout(1000)  # until all is drawn
            drawn = (
                "$('#main-graph').data('plot').getData().reduce((n, s) => n + s.data.filter(p => p && p[1]).length, 0)"
            )
            points = page.evaluate(drawn)
            if picture is not None:
                page.screenshot(path=str(picture))
            return points
    finally:
        server.shutdown()
        server.server_close()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark")
    parser.add_argument("--html", type=Path, default=Path(__file__).resolve().parent / "html", metavar="DIR")
    parser.add_argument("--picture", type=Path, metavar="PNG")
    parser.add_argument("--scripts", type=Path, metavar="DIR", help="npm's node_modules")
    options = parser.parse_args(arguments)
    try:
        points = open_graph(options.html, options.benchmark, options.picture, options.scripts)
    except NoBrowser as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.benchmark}: {points} points")
    return 0 if points else 1


if __name__ == "__main__":
    sys.exit(main())
