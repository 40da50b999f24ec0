"""The chat page in a real browser, against a live server with the demo model."""

import json
import re
import time
import urllib.request

import pytest

from teal_fast.tests.server.chromium import Chromium, find
from teal_fast.tests.server.live import serving

pytestmark = pytest.mark.skipif(find() is None, reason="needs Chromium: apt-get install chromium")
SIZES = [(1280, 800), (390, 844)]
HOSTILE = "<img src=x onerror=\"document.title='run'\"> <script>document.title = 'run'</script> & </p>"

# The lowest ratio of each text's color to what lies behind it, with the text; large text counts as 1.5 times as much.
# https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
CONTRAST = """(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = parse(getComputedStyle(element).backgroundColor);
      if (color[3] === undefined || color[3] === 1) return color;
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const texts = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
    if (!texts.length || !element.checkVisibility({ visibilityProperty: true })) continue;
    const style = getComputedStyle(element);
    const color = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(parse(color)), light(behind(element))].sort((a, b) => b - a);
    const large = parseFloat(style.fontSize) >= 24 ? 1.5 : 1;
    found.push([large * (a + 0.05) / (b + 0.05), texts[0].data.trim()]);
  }
  return found.sort((a, b) => a[0] - b[0])[0].concat(found.length);
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = Chromium(str(tmp_path_factory.mktemp("profile")))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def server(demo):
    with serving(demo, sparsity=0.5) as live:
        yield live


@pytest.fixture
def open_page(browser, server):
    """Opens the page; what it asked for and complained about is checked once the test is over."""
    pages = []

    def open_page(url=server.url, complaints=0, **options):
        pages.append((page := browser.page(f"{url}/", **options), url, complaints))
        return page

    yield open_page
    for page, url, complaints in pages:
        try:
            asked = [event["request"]["url"] for event in page.seen("Network.requestWillBeSent")]
            assert [address for address in asked if not address.startswith(f"{url}/")] == []
            assert page.seen("Runtime.exceptionThrown", "Runtime.consoleAPICalled") == []
            end = time.monotonic() + 5  # a complaint may come after what the page shows
            while len(page.seen("Log.entryAdded")) < complaints and time.monotonic() < end:
                time.sleep(0.02)
            logged = [event["entry"]["text"] for event in page.seen("Log.entryAdded")]
            assert len(logged) == complaints, logged
        finally:
            page.close()


def ask(page, text, tokens=12):
    page.run(f"document.querySelector('#tokens').value = {tokens}")
    page.type(text)
    page.press("Enter")


def end(page):
    """Waits until the last answer has ended; its text."""
    page.wait("!document.querySelector('#send').hidden")
    return page.run("document.querySelector('.assistant:last-child .text').innerText")


def begun(page, tokens=4):
    """Waits until the plot shows so many tokens."""
    page.wait(f"document.querySelector('#plot .set-line')?.points.length >= {tokens}")


def bodies(page, method="POST"):
    """The JSON of the requests that the page has sent."""
    sent = [event["request"] for event in page.seen("Network.requestWillBeSent")]
    return [json.loads(request["postData"]) for request in sent if request["method"] == method]


def articles(page):
    return page.run("[...document.querySelectorAll('article')].map((article) => article.className)")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width, height", SIZES)
def test_fits_and_reads_well_before_and_after_an_answer(open_page, width, height, theme):
    page = open_page(width=width, height=height, theme=theme)
    ratio, text, texts = page.run(CONTRAST)
    assert texts > 8 and ratio >= 4.5, text
    assert page.run("[document.documentElement.scrollWidth, document.querySelector('#nominal').innerText]") == [
        width,
        "50%",
    ]
    ask(page, "Say `x` and " + "very" * 40)
    end(page)
    ratio, text, texts = page.run(CONTRAST)
    assert texts > 12 and ratio >= 4.5, text
    assert page.run("document.documentElement.scrollWidth") == width
    shown = page.run("document.querySelector('#composer').getBoundingClientRect().bottom")
    assert shown <= height  # the composer is never pushed out of the window


def test_the_contrast_check_sees_a_faint_text(open_page):
    page = open_page()
    page.run("document.querySelector('h1').style.color = '#bbb'")
    assert page.run(CONTRAST)[0] < 2 and page.run(CONTRAST)[1] == "teal"


def test_a_chat_by_keyboard_alone(open_page):
    page = open_page()
    assert page.run("document.activeElement.id") == "message"
    ask(page, "The capital of France?")
    first = end(page)
    assert first and page.run("document.activeElement.id") == "message"
    facts = page.run("document.querySelector('.facts').textContent")
    assert "tokens/s" in facts and "% skipped" in facts
    page.type("one")
    page.press("Enter", "shift")
    page.type("two")
    page.press("Enter")
    end(page)
    body = bodies(page)[-1]
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][2]["content"] == "one\ntwo" and body["sparsity"] == 0.5 and body["max_tokens"] == 12
    words = re.compile(r"\w+")  # what is shown has no signs of Markdown
    assert words.findall(body["messages"][1]["content"]) == words.findall(first)


def test_tab_reaches_every_control_once(open_page):
    page = open_page()
    seen = []
    for _ in range(12):
        page.press("Tab")
        seen.append(page.run("document.activeElement.id || document.activeElement.className"))
    for control in ("new", "open-settings", "theme", "scroller", "example", "sparsity", "message", "send"):
        assert control in seen
    page.run("document.querySelector('#sparsity').focus({ focusVisible: true })")
    assert page.run("getComputedStyle(document.querySelector('.dial')).getPropertyValue('--halo')") != ""


def test_the_dial_acts_on_the_running_answer(open_page, server):
    page = open_page()
    ask(page, "Write a long story about a lighthouse.", tokens=200)
    begun(page)
    page.run(
        "for (const value of [55, 60, 65, 70])"
        "{ sparsity.value = value; sparsity.dispatchEvent(new Event('input', { bubbles: true })); }"
    )
    page.wait("document.querySelector('#set').textContent === '70%'")  # what the server says of its tokens
    assert bodies(page, "PATCH") == [{"sparsity": 0.7}]
    levels = "new Set([...document.querySelector('.set-line').points].map((point) => Math.round(point.y))).size"
    assert page.run(levels) == 2
    page.press("ArrowUp", "alt")
    page.wait("document.querySelector('#set').textContent === '75%'")
    page.press("Escape")
    end(page)
    ask(page, "Shorter.", tokens=4)
    end(page)
    assert bodies(page)[-1]["sparsity"] == 0.75


def test_the_dial_turned_before_the_first_token_is_heard_of(open_page):
    page = open_page()
    ask(page, "Write a long story.", tokens=100)
    page.press("ArrowUp", "alt")
    page.wait("document.querySelector('#set').textContent === '55%'")
    page.press("Escape")


def test_escape_stops_the_answer_and_frees_the_engine(open_page, server):
    page = open_page()
    ask(page, "Write a long story about the sea.", tokens=1000)
    begun(page)
    page.press("Escape")
    text = end(page)
    assert "stopped" in page.run("document.querySelector('.facts').textContent") and text
    ask(page, "Go on.", tokens=4)  # would wait for hundreds of tokens if the engine still made the first answer
    assert end(page)
    assert page.run("document.querySelector('.text:not(.user .text)').innerText") == text
    assert [message["content"] for message in bodies(page)[-1]["messages"]][1].strip()[:10] == text.strip()[:10]


def test_an_edited_message_cuts_what_came_after_it(open_page):
    page = open_page()
    for text in ("First", "Second"):
        ask(page, text, tokens=4)
        end(page)
    page.run("document.querySelector('[data-act=edit]').click()")
    assert page.run("document.activeElement.value") == "First"
    page.press("Escape")
    assert articles(page) == ["user", "assistant"] * 2
    page.run("document.querySelector('[data-act=edit]').click()")
    page.run("document.activeElement.select()")
    page.type("Another")
    page.press("Enter")
    end(page)
    assert bodies(page)[-1]["messages"] == [{"role": "user", "content": "Another"}]
    assert articles(page) == ["user", "assistant"]


def test_regenerate_settings_and_new_chat(open_page):
    page = open_page()
    page.run("document.querySelector('#open-settings').click()")
    page.type("You are a poet.")
    page.press("Escape")
    page.run("document.querySelector('#temperature').value = 0; document.querySelector('#message').focus()")
    ask(page, "Hello", tokens=6)
    assert end(page)
    page.run("document.querySelector('[data-act=again]').click()")
    assert end(page)  # the same up to rounding: now the prompt's keys and values come from the cache
    assert bodies(page)[0] == bodies(page)[1] and bodies(page)[0]["temperature"] == 0
    assert bodies(page)[0]["messages"][0] == {"role": "system", "content": "You are a poet."}
    assert articles(page) == ["user", "assistant"]
    page.run("document.querySelector('#new').click()")
    assert articles(page) == [] and page.run("document.querySelector('#welcome').checkVisibility()")


def test_a_lossless_answer_is_dense_and_hears_of_no_dial(open_page):
    page = open_page()
    page.run("document.querySelector('#open-settings').click()")
    page.run("document.querySelector('#lossless').click()")
    page.press("Escape")
    page.run("document.querySelector('#message').focus()")
    ask(page, "Count from one to twenty.", tokens=40)
    begun(page)
    page.press("ArrowUp", "alt")  # 55 %: for the next answer that is not lossless
    assert end(page) and bodies(page, "PATCH") == []
    assert page.run("document.querySelector('#set').textContent") == "0%"
    page.run("location.reload()")
    page.wait("document.querySelector('#model')?.textContent && !document.querySelector('article')")
    assert page.run("document.querySelector('#lossless').checked")
    page.run("document.querySelector('#lossless').click(); document.querySelector('#message').focus()")
    ask(page, "Hello", tokens=4)
    assert end(page)
    lossless, sparse = bodies(page)
    assert lossless["lossless"] is True and "sparsity" not in lossless
    assert "lossless" not in sparse and sparse["sparsity"] == 0.5


def answer_with(page, *pieces):
    """Lets the page receive an answer of these pieces, for what the demo model does not say."""
    chunks = [{"id": "chatcmpl-0", "choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    page.run(f"fetch = async () => new Response({json.dumps(stream)})")


def test_markup_is_shown_as_text(open_page):
    page = open_page()
    answer_with(page, {"content": f"{HOSTILE}\n\n- **{HOSTILE}**\n\n```html\n{HOSTILE}\n```\n\n# {HOSTILE}"})
    ask(page, HOSTILE)
    end(page)
    shown = [page.run(f"document.querySelector('.{name} .text').textContent") for name in ("user", "assistant")]
    assert shown[0] == HOSTILE and shown[1].count(HOSTILE) == 4
    assert page.run("document.querySelectorAll('img, main script, main p p').length") == 0
    assert page.run("document.title") == "teal-fast"


def test_thinking_is_shown_apart_and_a_stream_that_breaks_off_is_told(open_page):
    page = open_page()
    answer_with(page, {"reasoning_content": "Hm, "}, {"reasoning_content": "so."}, {"content": "Yes."})
    ask(page, "Is it?")
    assert end(page) == "Yes."
    thinking = "document.querySelector('.thinking')"
    assert page.run(f"[{thinking}.open, {thinking}.lastElementChild.textContent]") == [False, "Hm, so."]
    assert page.run("document.querySelector('#error').innerText").startswith("The answer was cut off.")
    ask(page, "And now?")
    end(page)
    asked = page.run("document.querySelectorAll('article').length")
    assert asked == 4 and page.run("document.querySelector('.text').textContent") == "Is it?"


def render(page, source):
    return page.run(
        "import('./page/markdown.js').then(({ render }) => { const place = document.createElement('div');"
        f"render(place, {json.dumps(source)}); return {{ text: place.textContent, "
        "tags: [...place.querySelectorAll('*')].map((element) => element.tagName) }; })"
    )


@pytest.mark.parametrize(
    "source, tags",
    [
        ("a\nb", ["P"]),
        ("a **b** `c *d*` *e*", ["P", "STRONG", "CODE", "EM"]),
        ("2 * 3 * 4, a_b_c, **", ["P"]),
        ("# Title\ntext", ["H3", "P"]),
        ("text\n- a\n- b\n  more\n\n3. c", ["P", "UL", "LI", "LI", "OL", "LI"]),
        ("```py\nopen", ["DIV", "P", "SPAN", "BUTTON", "PRE", "CODE"]),
        ("1. a\n   - b", ["OL", "LI", "LI"]),
        ("~~~\n```\n~~~\nafter", ["DIV", "P", "SPAN", "BUTTON", "PRE", "CODE", "P"]),
    ],
)
def test_markdown(open_page, source, tags):
    assert render(open_page(), source)["tags"] == tags


def test_a_block_that_stays_keeps_its_node(open_page):
    growing = (
        "import('./page/markdown.js').then(({ render }) => { const place = document.createElement('div');"
        "render(place, 'a\\n\\nb'); const first = place.firstChild; render(place, 'a\\n\\nbc\\n\\nd');"
        "return [first === place.firstChild, place.innerText]; })"
    )
    assert open_page().run(growing) == [True, "abcd"]


def test_the_reader_who_scrolls_up_is_left_alone(open_page):
    page = open_page(height=420)
    ask(page, "Write a long story about a ship.\n" + "\n" * 20 + "Go on.", tokens=300)
    begun(page, 8)
    assert page.run("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 32")
    page.run("scroller.scrollTop = 10")
    begun(page, 24)
    assert page.run("scroller.scrollTop") == 10
    page.run("document.querySelector('#latest').click()")
    page.wait("document.querySelector('#latest').hidden")
    page.press("Escape")
    end(page)


def test_an_error_is_one_line_and_can_be_tried_again(open_page):
    page = open_page(complaints=2)
    ask(page, "word " * 3000)
    page.wait("!document.querySelector('#error').hidden")
    assert "too long" in page.run("document.querySelector('#error span').textContent")
    assert articles(page) == ["user"]
    page.run("document.querySelector('#retry').click()")
    page.wait("!document.querySelector('#error').hidden")
    page.wait("document.querySelector('#error span').textContent.includes('too long')")
    first, second = bodies(page)
    assert first == second


def test_the_theme_can_be_turned(open_page):
    page = open_page(theme="dark")
    color = "getComputedStyle(document.body).backgroundColor"
    dark = page.run(color)
    page.run("document.querySelector('#theme').click()")
    light = page.run(color)
    page.theme("light")
    assert dark != light == page.run(color)


def test_asks_for_the_key_and_disables_the_dial_without_a_calibration(open_page, tiny):
    with serving(tiny, calibrated=False, api_key="sesame") as live:
        page = open_page(live.url, complaints=4, ready="document.querySelector('#ask-key')?.open")
        page.type("wrong")
        page.press("Enter")
        page.wait("document.querySelector('#key-note').textContent.includes('did not take')")
        page.type("sesame")
        page.press("Enter")
        page.wait("document.querySelector('#model').textContent")
        assert page.run("document.querySelector('#sparsity').disabled")
        assert "no calibration" in page.run("document.querySelector('#word').textContent")
        page.run("document.querySelector('#message').focus()")
        ask(page, "Hello", tokens=4)
        end(page)
        assert "sparsity" not in bodies(page)[-1] and "0% skipped" in page.run(
            "document.querySelector('.facts').textContent"
        )


def test_files_have_their_types_and_a_strict_policy(server):
    kinds = {
        "": "text/html",
        "page/page.css": "text/css",
        "page/api.js": "text/javascript",
        "page/icon.svg": "image/svg",
    }
    for name, kind in kinds.items():
        with urllib.request.urlopen(f"{server.url}/{name}") as answer:
            assert answer.headers["Content-Type"].startswith(kind)
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self';")
    for name in ("page/", "page/..", "page/missing.js", "page/..%2fapp.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server.url}/{name}")
