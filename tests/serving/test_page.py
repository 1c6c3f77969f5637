"""The web page in a browser: what it draws is what the API draws, by keyboard, mouse and touch."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import urllib.request
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

pytest.importorskip("tokenizers", reason="needs the extra [text]")
pytest.importorskip("playwright", reason="needs Playwright, of the extra [dev]")

from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from ddpm_ray.serving.http import server_routes
from ddpm_ray.serving.http.access import Access, clients_of
from ddpm_ray.serving.http.http_server import HttpSettings
from ddpm_ray.serving.orders import Draw, Event, ImageOrder
from tests.limits import ENDS_S
from tests.serving.local_server import local_server, served
from tests.serving.page_model import Gate, PageModels

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ENDS_MS = ENDS_S * 1000
TOKEN = "a-token-of-this-test"
KNOWN = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
PAGE_FILES = Path(server_routes.__file__).parent / "page"
PHONE = {"width": 360, "height": 740}
FOCUSED = """() => {
    const at = document.activeElement;
    const marked = [at, at.nextElementSibling, at.previousElementSibling].some(
        (node) => node && parseFloat(getComputedStyle(node).outlineWidth) >= 2
            && getComputedStyle(node).outlineStyle === "solid");
    return [at.id || at.textContent, marked];
}"""

DROP = """(file) => {
    const bytes = Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], "a.png", {type: "image/png"}));
    for (const name of ["dragover", "drop"])
        document.body.dispatchEvent(new DragEvent(name, {bubbles: true, dataTransfer}));
}"""


@dataclass
class Server:
    """A server, the orders that it gets, and the gate of its network."""

    url: str
    gate: Gate
    orders: list[ImageOrder] = field(default_factory=list)

    def recorded(self, draw: Draw) -> Draw:
        def drawn(
            order: ImageOrder, source: str, affordable: float, table: str
        ) -> AsyncGenerator[Event, None]:
            self.orders.append(order)
            return draw(order, source, affordable, table)

        return drawn

    def json(self, path: str, body: dict[str, Any] | None = None, method: str = "") -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method or None)
        with urllib.request.urlopen(request, timeout=ENDS_S) as response:
            return json.load(response)

    def drawn(self, **body: Any) -> npt.NDArray[np.uint8]:
        """The image of the API."""
        answer = self.json("v1/images/generations", body)
        return pixels(base64.b64decode(answer["data"][0]["b64_json"]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed: {', '.join(BROWSERS)}")
    expect.set_options(timeout=ENDS_MS)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    made = PageModels()
    found = Server("", made.gate)
    with local_server(served(made.models, max_images=3), draw=found.recorded) as (found.url, _):
        yield found


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.orders.clear()
    yield running
    running.gate.open()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that asks no other host for anything, and whose script raises nothing."""
    context = browser.new_context(has_touch=True)
    made, urls, problems = context.new_page(), [], []
    made.set_default_timeout(ENDS_MS)
    made.on("request", lambda request: urls.append(request.url))
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on(
        "console", lambda one: problems.append(one.text) if "Security Policy" in one.text else None
    )
    yield made
    context.close()
    assert not problems
    assert all(re.match(r"http://127\.0\.0\.1:\d+/|data:|about:", url) for url in urls), urls


def pixels(file: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("L"))


def png(image: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def alpha(file: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)))[..., 3]


def opened(page: Page, server: Server) -> Page:
    page.goto(server.url)
    expect(page.locator("#model-facts")).to_contain_text("8 \u00d7 8 pixels, grey")
    return page


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()


def result(page: Page) -> Locator:
    """The finished image."""
    found = page.locator("#result figure:not(.preview) img")
    expect(found.first).to_be_visible()
    return found.first


def shown(image: Locator) -> npt.NDArray[np.uint8]:
    source = image.get_attribute("src") or ""
    return pixels(base64.b64decode(source.partition(",")[2]))


def upload(page: Page, image: npt.NDArray[np.uint8]) -> None:
    page.get_by_label("Edit", exact=True).check()
    file: Any = {"name": "a.png", "mimeType": "image/png", "buffer": png(image)}
    page.get_by_label(re.compile("Choose an")).set_input_files(file)
    expect(page.locator("#canvas")).to_be_visible()
    page.get_by_label("Steps").fill("2")  # repainting calls the network ten times a step


def tab_to(page: Page, wanted: str) -> None:
    """Press Tab until the element of that id has the focus; every stop shows that it has it."""
    for _ in range(40):
        page.keyboard.press("Tab")
        at, marked = page.evaluate(FOCUSED)
        assert marked or at == "body", f"nothing shows that {at} has the focus"
        if at == wanted:
            return
    raise AssertionError(f"{wanted} is not reached by Tab")


def test_modules_of_the_page_import_one_way_and_are_served() -> None:
    files = {file.name: file.read_text() for file in PAGE_FILES.iterdir()}
    assert files.keys() == {*server_routes.PAGE}
    scripts = {name: text for name, text in files.items() if name.endswith(".js")}
    assert [name for name, text in scripts.items() if text.count("\n") > 300] == []
    imports = {name: re.findall(r'from "\./(.*)";', text) for name, text in scripts.items()}
    assert {*TopologicalSorter(imports).static_order()} == {*scripts}, "raises if there is a cycle"


def test_an_image_is_drawn_by_keyboard_alone_and_is_that_of_the_api(
    page: Page, server: Server
) -> None:
    opened(page, server)
    tab_to(page, "labels")
    page.keyboard.type("bright")
    tab_to(page, "seed")
    page.keyboard.type("5")
    tab_to(page, "steps")
    page.keyboard.type("4")
    tab_to(page, "generate")
    page.keyboard.press("Enter")
    expected = server.drawn(model="classes", labels=[2], seed=5, steps=4)
    assert np.array_equal(shown(result(page)), expected)
    assert expected.mean() > 150
    expect(page.locator("#live")).to_have_text("Finished: 1 image")
    expect(page.locator("#facts")).to_contain_text("Seed 5 · 4 steps")
    tab_to(page, "Download")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert np.array_equal(pixels(download.value.path().read_bytes()), expected)


def test_previews_come_step_by_step_before_the_image(page: Page, server: Server) -> None:
    opened(page, server)
    server.gate.allow(0)
    generate(page)
    expect(page.locator("#running")).to_be_visible()
    images = []
    for number, calls in enumerate((1, 2, 2), start=1):  # of 6 steps
        server.gate.allow(calls)
        preview = page.get_by_alt_text(f"Preview {number} of 3")
        expect(preview).to_be_visible()
        images.append(shown(preview))
        expect(page.locator("#live")).to_have_text(f"Preview {number} of 3")
    expect(page.get_by_role("progressbar")).to_have_js_property("value", 5 / 6)
    server.gate.open()
    images.append(shown(result(page)))
    assert len({image.tobytes() for image in images}) == 4
    expect(page.locator("#running")).to_be_hidden()


def test_the_place_in_the_queue_is_shown(page: Page, server: Server) -> None:
    opened(page, server)
    server.gate.allow(0)
    for job, n in (("runs", 3), ("waits", 1)):  # the engine draws three images at once
        server.json(f"v1/jobs/{job}", {"n": n}, "PUT")
    generate(page)
    expect(page.locator("#running")).to_contain_text("Place 2 in the queue")
    expect(page.locator("#live")).to_have_text("Place 2 in the queue")
    server.gate.open()
    result(page)


def test_cancel_ends_the_job(page: Page, server: Server) -> None:
    opened(page, server)
    server.gate.allow(0)
    with page.expect_request(re.compile("/v1/jobs/[^/]*$")) as put:
        generate(page)
    put.value.response()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#live")).to_have_text("Cancelled")
    expect(page.locator("#running")).to_be_hidden()
    assert server.json(put.value.url.removeprefix(server.url))["status"] == "cancelled"
    before = server.gate.calls
    server.gate.open()
    generate(page)
    result(page)
    assert server.gate.calls <= before + 7, "the cancelled job went on"


def test_a_page_that_is_left_cancels_its_job(page: Page, server: Server) -> None:
    opened(page, server)
    server.gate.allow(0)
    with page.expect_request(re.compile("/v1/jobs/[^/]*/events$")) as events:
        generate(page)
    page.goto("about:blank")
    job = events.value.url.removesuffix("/events").removeprefix(server.url)
    assert server.json(f"{job}?wait=300")["status"] == "cancelled"


def test_a_mask_drawn_with_the_mouse_repaints_the_painted_pixels_only(
    page: Page, server: Server
) -> None:
    opened(page, server)
    upload(page, KNOWN)
    expect(page.get_by_label("Strength")).to_be_visible()
    page.get_by_label("Brush size").fill("1")
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    side = box["width"] / 8
    page.mouse.move(box["x"] + 2.5 * side, box["y"] + 3.5 * side)
    page.mouse.down()
    page.mouse.move(box["x"] + 6.5 * side, box["y"] + 3.5 * side, steps=3)
    page.mouse.up()
    page.get_by_label("Eraser").check()
    page.mouse.click(box["x"] + 6.5 * side, box["y"] + 3.5 * side)
    expect(page.get_by_label("Strength")).to_be_hidden()
    generate(page)
    found = shown(result(page))
    painted = np.zeros((8, 8), bool)
    painted[3, 2:6] = True
    order = server.orders[-1]
    assert np.array_equal(alpha(order.mask or b"") == 0, painted)
    assert np.array_equal(found[~painted], KNOWN[~painted])
    assert (found != KNOWN)[painted].any()
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_label("Strength")).to_be_visible()


def test_strokes_are_undone_one_by_one(page: Page, server: Server) -> None:
    """By the button and by Control+Z, also the erasing of all."""
    opened(page, server)
    upload(page, KNOWN)
    page.get_by_label("Brush size").fill("1")
    undo, canvas = page.get_by_role("button", name="Undo"), page.locator("#canvas")
    strength = page.get_by_label("Strength")
    expect(undo).to_have_attribute("aria-disabled", "true")
    for x, y in ((1, 1), (4, 6), (4, 6)):  # the third changes nothing
        side = page.evaluate("document.querySelector('#canvas').clientWidth / 8")
        canvas.click(position={"x": (x + 0.5) * side, "y": (y + 0.5) * side})
    page.get_by_role("button", name="Clear").click()
    expect(strength).to_be_visible()
    undo.click()  # the Clear
    expect(strength).to_be_hidden()
    canvas.press("Control+z")  # the second stroke
    generate(page)
    result(page)
    painted = np.zeros((8, 8), bool)
    painted[1, 1] = True
    assert np.array_equal(alpha(server.orders[-1].mask or b"") == 0, painted)
    undo.click()
    expect(strength).to_be_visible()
    expect(undo).to_have_attribute("aria-disabled", "true")


def test_the_mask_is_painted_and_the_canvas_enlarged_by_keyboard(
    page: Page, server: Server
) -> None:
    opened(page, server)
    upload(page, KNOWN)
    page.get_by_label("Brush size").fill("1")
    page.get_by_label("Image and mask").focus()
    for key in ("ArrowUp", "ArrowLeft", "Space"):  # from the middle, the pixel (4, 4)
        page.keyboard.press(key)
    page.get_by_label("Left").fill("3")
    page.get_by_label("Bottom").fill("2")
    expect(page.locator("#canvas-size")).to_have_text("11 \u00d7 10 pixels")
    generate(page)
    found = shown(result(page))
    assert found.shape == (10, 11)
    kept = np.ones((8, 8), bool)
    kept[3, 3] = False
    assert np.array_equal(found[:8, 3:][kept], KNOWN[kept])
    sent = alpha(server.orders[-1].image or b"")
    assert np.array_equal(sent == 255, np.pad(kept, ((0, 2), (3, 0))))


def test_a_finger_paints(page: Page, server: Server) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    opened(page, server)
    upload(page, KNOWN)
    page.get_by_label("Brush size").fill("2")
    canvas = page.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.touchscreen.tap(box["x"] + 3 * box["width"] / 8, box["y"] + 5 * box["height"] / 8)
    expect(page.get_by_label("Strength")).to_be_hidden()
    generate(page)
    result(page)
    painted = np.zeros((8, 8), bool)
    painted[4:6, 2:4] = True
    assert np.array_equal(alpha(server.orders[-1].mask or b"") == 0, painted)


def test_transparent_pixels_of_a_file_are_repainted(page: Page, server: Server) -> None:
    opened(page, server)
    hidden = np.arange(64).reshape(8, 8) % 5 == 0
    file = np.stack([KNOWN, KNOWN, KNOWN, np.where(hidden, 0, 255).astype(np.uint8)], axis=-1)
    upload(page, file)
    generate(page)
    found = shown(result(page))
    assert np.array_equal(found[~hidden], KNOWN[~hidden])
    assert (found != KNOWN)[hidden].any()


def test_a_large_image_is_dropped_and_scaled_to_the_model(page: Page, server: Server) -> None:
    opened(page, server)
    page.evaluate(DROP, base64.b64encode(png(np.full((48, 64), 77, np.uint8))).decode())
    expect(page.locator("#canvas-size")).to_have_text("11 \u00d7 8 pixels")
    page.get_by_label("Resolution").select_option("whole")
    expect(page.locator("#canvas-size")).to_have_text("64 \u00d7 48 pixels")
    page.get_by_label("Resolution").select_option("fit")
    generate(page)
    assert shown(result(page)).shape == (8, 11)
    assert np.all(pixels(server.orders[-1].image or b"") == 77)


def test_a_handle_enlarges_the_canvas(page: Page, server: Server) -> None:
    opened(page, server)
    upload(page, KNOWN)
    box = page.locator("#canvas").bounding_box()
    handle = page.locator(".handle[data-side=right]").bounding_box()
    assert box is not None
    assert handle is not None
    middle = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + box["width"] / 2, middle[1])
    page.mouse.up()
    expect(page.get_by_label("Right", exact=True)).to_have_value("4")


def test_a_small_image_has_to_be_extended(page: Page, server: Server) -> None:
    opened(page, server)
    upload(page, KNOWN[:5])
    expect(page.get_by_text("Extend this one by 0 in width and 3 in height.")).to_be_visible()
    generate(page)
    expect(page.locator("[data-field=image]")).to_contain_text("too small")
    page.get_by_label("Top").fill("3")
    generate(page)
    assert np.array_equal(shown(result(page))[3:], KNOWN[:5])


def test_a_drawn_image_is_edited_and_varied(page: Page, server: Server) -> None:
    opened(page, server)
    page.get_by_label("Model").select_option("texts")
    page.get_by_label("Prompt", exact=True).fill("dark")
    page.get_by_label("Prompt", exact=True).press("Enter")
    first = shown(result(page))
    assert server.orders[-1].request.prompt == "dark"
    page.get_by_role("button", name="Edit image").click()
    page.get_by_label("Strength").fill("0.5")
    generate(page)
    expect(page.locator("#result img[alt*='Edit']")).to_be_visible()
    edit = server.orders[-1]
    assert np.array_equal(pixels(edit.image or b""), first)
    assert (edit.mask, getattr(edit.request, "strength", None)) == (None, 0.5)
    page.get_by_role("button", name="Variations of image").click()
    page.get_by_label("Images").fill("2")
    generate(page)
    expect(page.locator("#result img[alt*='Variation']")).to_have_count(2)
    assert server.orders[-1].kind == "variation"


def test_a_model_that_enlarges_its_images_varies_those_of_its_smallest_size(
    page: Page, server: Server
) -> None:
    def larger(route: Route) -> None:
        facts = server.json("v1/models")
        route.fulfill(json={"data": [one | {"size": "32x32"} for one in facts["data"]]})

    page.route("**/v1/models", larger)
    page.goto(server.url)
    page.get_by_label("Model").select_option("texts")
    expect(page.locator("#model-facts")).to_contain_text("32 \u00d7 32 pixels")
    page.get_by_label("Variations", exact=True).check()
    file: Any = {"name": "a.png", "mimeType": "image/png", "buffer": png(np.tile(KNOWN, (2, 3)))}
    page.get_by_label("Choose an image").set_input_files(file)
    expect(page.locator("#canvas-size")).to_contain_text("scaled to 8 \u00d7 8 pixels")
    generate(page)
    assert shown(result(page)).shape == (8, 8)
    assert pixels(server.orders[-1].image or b"").shape == (8, 8)


def test_the_history_gives_settings_and_images_back(page: Page, server: Server) -> None:
    opened(page, server)
    generate(page)
    first = shown(result(page))
    seed = server.orders[-1].settings["seed"]
    page.get_by_role("button", name="Use this seed").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(seed))
    page.get_by_label("Seed", exact=True).fill(str(2**62 + 1))
    page.get_by_label("Class", exact=True).select_option("medium")
    generate(page)
    entries = page.locator("#entries li")
    expect(entries).to_have_count(2)
    assert server.orders[-1].settings["seed"] == 2**62 + 1, "a digit was lost"
    page.get_by_label("Seed", exact=True).fill("")
    page.get_by_role("button", name="Use this seed").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(2**62 + 1))
    entries.last.get_by_role("button").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(seed))
    expect(page.get_by_label("Class", exact=True)).to_have_value("")
    assert np.array_equal(shown(result(page)), first)
    generate(page)
    expect(entries).to_have_count(3)
    assert np.array_equal(shown(result(page)), first)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("Steps", "4000", "the T that the model was trained with"),
        ("Images", "11", "at most 10"),
        ("Seed", "-1", "at least 0"),
        ("Seed", "many", "seed"),
    ],
)
def test_an_error_is_shown_at_its_field(
    page: Page, server: Server, name: str, value: str, says: str
) -> None:
    opened(page, server)
    generate(page)
    first = shown(result(page))
    entry = page.get_by_label(name, exact=True)
    entry.fill(value)
    generate(page)
    expect(page.locator(".field", has=entry).get_by_role("alert")).to_contain_text(says)
    expect(entry).to_have_attribute("aria-invalid", "true")
    expect(entry).to_be_focused()
    assert np.array_equal(shown(result(page)), first)
    entry.fill("3")
    entry.press("Enter")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("#running")).to_be_hidden()
    expect(page.locator("#entries button")).to_have_count(4 if name == "Images" else 2)


def test_an_error_of_no_field_is_shown_at_the_button(page: Page, server: Server) -> None:
    opened(page, server)
    busy = {"error": {"message": "try again in 7 s", "param": None, "code": None}}
    page.route("**/v1/jobs/*", lambda route: route.fulfill(status=429, json=busy))
    generate(page)
    expect(page.locator("[data-field=other]").get_by_role("alert")).to_have_text("try again in 7 s")
    page.unroute("**/v1/jobs/*")
    generate(page)
    result(page)


def test_a_server_that_loads_its_models_is_waited_for(page: Page, server: Server) -> None:
    ways = iter([lambda route: route.abort(), lambda route: route.fulfill(json={"data": []})])
    page.route("**/v1/models", lambda route: next(ways, Route.continue_)(route))
    page.goto(server.url)
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.get_by_role("alert")).to_contain_text("being loaded")
    expect(page.locator("#model-facts")).not_to_be_empty()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_file_that_is_no_image_is_refused(page: Page, server: Server) -> None:
    opened(page, server)
    page.get_by_label("Edit", exact=True).check()
    file: Any = {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"}
    page.get_by_label("Choose an image").set_input_files(file)
    expect(page.locator("[data-field=image]")).to_contain_text("a.png is not an image")


def test_a_server_with_tokens_asks_for_one(page: Page) -> None:
    made = PageModels()
    http = HttpSettings(access=Access(clients_of(TOKEN)))
    with local_server(served(made.models), http=http) as (url, _):
        page.goto(url)
        token = page.get_by_label("Token", exact=True)
        token.fill("a-wrong-token-of-this-test")
        token.press("Enter")
        expect(page.get_by_text("This token is not accepted.")).to_be_visible()
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Enter token").click()
        token.fill(TOKEN)
        token.press("Enter")
        expect(page.locator("#model-facts")).not_to_be_empty()
        generate(page)
        result(page)
        kept = page.evaluate("[sessionStorage.token, localStorage.length, document.cookie]")
        assert kept == [TOKEN, 0, ""]


def test_a_lost_connection_is_taken_up_again(page: Page, server: Server) -> None:
    """Refused, cut in the middle, and an answer of a server that has lost the job."""
    opened(page, server)
    page.get_by_label("Seed", exact=True).fill("8")
    lost = {"error": {"message": "there is no job", "param": "id", "code": None}}
    cut = 'event: progress\ndata: {"type": "progress", "place": 1, "seconds_left": null}\n\nevent: '
    puts: list[str] = []
    page.on("request", lambda one: puts.append(one.url) if one.method == "PUT" else None)
    ways = iter(
        [
            lambda route: route.abort(),
            lambda route: route.fulfill(body=cut, content_type="text/event-stream"),
            lambda route: route.fulfill(status=404, json=lost),
        ]
    )

    def answered(route: Route) -> None:
        next(ways, Route.continue_)(route)

    page.route("**/events", answered)
    generate(page)
    found = shown(result(page))
    assert np.array_equal(found, server.drawn(model="classes", seed=8))
    assert len(puts) == 2
    assert len({*puts}) == 1, "the job got another id"
    assert len(server.orders) == 2, "the job was drawn twice"


def test_a_job_that_begins_again_says_why(page: Page, server: Server) -> None:
    """Its bar stays, and a new process loads the model again, in a minute and more."""
    opened(page, server)
    server.gate.allow(0)
    fields = {"type": "progress", "place": 1, "seconds_left": None, "lost_processes": 1}
    bodies = iter([f"data: {json.dumps(fields)}\n\n"])

    def answered(route: Route) -> None:
        if (body := next(bodies, None)) is None:
            return  # it waits
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/events", answered)
    generate(page)
    said = "Its process was lost. It begins again: next in the queue"
    expect(page.locator("#live")).to_have_text(said)
    page.get_by_role("button", name="Cancel").click()
    server.gate.open()


def test_a_connection_made_again_shows_no_older_preview(page: Page, server: Server) -> None:
    """The events of a job come again from its first preview on."""
    opened(page, server)
    server.gate.allow(0)
    image = base64.b64encode(png(KNOWN)).decode()

    def previews(*numbers: int) -> str:
        fields = {"type": "image_generation.partial_image", "index": 0, "b64_json": image}
        events = [json.dumps({**fields, "partial_image_index": number}) for number in numbers]
        return "".join(f"data: {event}\n\n" for event in events)

    bodies = iter([previews(2), previews(0, 1)])

    def answered(route: Route) -> None:
        if (body := next(bodies, None)) is None:
            route.continue_()
        else:
            route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/events", answered)
    generate(page)
    expect(page.locator("#running-text")).to_have_text(re.compile("^0 %"))
    expect(page.get_by_alt_text("Preview 3 of 3")).to_be_visible()
    server.gate.open()
    result(page)


def test_nothing_is_wider_than_a_phone(page: Page, server: Server) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]

    def require_narrow() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]

    opened(page, server)
    page.get_by_label("Images").fill("3")
    generate(page)
    result(page)
    require_narrow()
    page.get_by_role("button", name="Edit image 2").click()
    page.get_by_label("Right", exact=True).fill("40")
    expect(page.locator("#canvas-size")).to_have_text("48 \u00d7 8 pixels")
    require_narrow()
    page.get_by_label("Seed", exact=True).fill("x" * 200)
    generate(page)
    expect(page.locator(".field .error")).to_be_visible()
    require_narrow()


def test_every_control_has_a_name(page: Page, server: Server) -> None:
    opened(page, server)
    page.get_by_label("Model").select_option("texts")
    generate(page)
    result(page)
    page.get_by_role("button", name="Edit image").click()
    page.get_by_label("Left").fill("2")
    roles = "textbox|spinbutton|combobox|slider|radio|button|link|application|progressbar|img"
    found = re.findall(rf"^\s*- (?:{roles})\b.*$", page.locator("body").aria_snapshot(), re.M)
    assert len(found) > 25
    unnamed = [line for line in found if '"' not in line and "/" not in line]
    assert not unnamed
